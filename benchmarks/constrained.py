"""Masks at V = 49 152: compiling a pattern, the first mask of a state and later ones, a step.

    python -m benchmarks.constrained            100 texts a pattern
    python -m benchmarks.constrained --quick    a short look, nothing recorded

Texts are drawn from random logits over SmolLM2's tokens. A first mask walks the trie and makes the
rows of the automaton that no text has needed yet; a later one is looked up. `llguidance`, where it
is installed, computes each mask anew. Every figure but the first is a
median; `mean mask` is the mean over all masks of the texts.
"""

import json
import statistics
import time
from functools import partial

from benchmarks.common import arguments, load, save

MEMBER = {"type": "string", "maxLength": 20}
SCHEMA = {
    "type": "object",
    "required": ["name", "born", "places"],
    "properties": {
        "name": MEMBER,
        "born": {"type": "integer"},
        "kind": {"enum": ["scientist", "artist", "other"]},
        "places": {"type": "array", "items": MEMBER, "maxItems": 3},
    },
}


def taken(times, what, f, *args):
    "Call, and note the milliseconds."
    start = time.perf_counter()
    out = f(*args)
    times.setdefault(what, []).append(1000 * (time.perf_counter() - start))
    return out


def text(shape, times, seen, generator, vocabulary, longest=100):
    "One text from random logits; times of its masks."
    import torch

    state, n = shape.start, 0
    while n < longest:
        new = id(state) if not isinstance(state, int) else state
        what = "later mask" if new in seen else "first mask"
        seen.add(new)
        mask = taken(times, what, shape.allowed, state)
        z = torch.randn(len(vocabulary), generator=generator).where(mask, -torch.inf)
        token = z.argmax().item()
        if token in vocabulary.ends:
            return
        state, n = shape.advance(state, token), n + 1


def measured(name, make, vocabulary, texts):
    "One row of the record."
    import torch

    times, seen = {}, set()
    shape = taken(times, "compile", make)
    for seed in range(texts):
        text(shape, times, seen, torch.Generator().manual_seed(seed), vocabulary)
    row = {what: round(statistics.median(values), 3) for what, values in times.items()}
    states = len(shape.automaton) if hasattr(shape, "automaton") else None
    masks = times["first mask"] + times.get("later mask", [])
    row["mean mask"] = round(statistics.mean(masks), 3)
    out = dict(pattern=name, states=states, masks=len(masks), **row)
    print(json.dumps(out), flush=True)
    return out


def step(shape, vocabulary, texts):
    "Milliseconds that a chooser takes for one row, alone and in a shape that it knows."
    import torch

    from decoding_book.constrained import Constrained
    from decoding_book.loop import Context, Prediction, greedy

    ids = torch.zeros(1, 1, dtype=torch.long)
    own = Context(ids, ids == 0, torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    said, times, constrained = Prediction(torch.randn(1, len(vocabulary))), {}, Constrained(shape)
    for _ in range(texts):
        taken(times, "greedy", greedy, said, own)
        taken(times, "constrained greedy", constrained, said, own)
    return {what: round(statistics.median(values), 3) for what, values in times.items()}


def main():
    args = arguments(__doc__, "constrained.json", dict(texts=100), dict(texts=5))
    from decoding_book.constrained import Grammar, Pattern, Vocabulary, json_pattern
    from decoding_book.smollm import SmolLM2

    vocabulary = Vocabulary.of(SmolLM2(weights="q4"))
    patterns = {
        "a time": r" \d\d?:\d\d",
        "a sentence": r"([A-Z][a-z]*)( [a-z]+){2,9}\.",
        "any text": r"(.|\n)*",
        "20 letters": r"\w{1,20}",
        "JSON by a schema": json_pattern(SCHEMA, space=""),
    }
    rows = [
        measured(name, partial(Pattern, p, vocabulary), vocabulary, args.texts)
        for name, p in patterns.items()
    ]
    try:
        own = partial(Grammar, "json_schema", SCHEMA, vocabulary, whitespace_flexible=False)
        rows.append(measured("the same by llguidance", own, vocabulary, args.texts))
    except ImportError as error:
        print(error)
    steps = step(Pattern(patterns["a time"], vocabulary), vocabulary, 50 * args.texts)
    print(json.dumps(steps), load())
    if not args.quick:
        save(args.out, rows=rows, step=steps, texts=args.texts, vocabulary=len(vocabulary))


if __name__ == "__main__":
    main()
