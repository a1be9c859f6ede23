"""Drafts: tokens a second of the plain loop and of `speculate`, four kinds of text, three drafters.

    python -m benchmarks.speculative            48 tokens a text, 3 rounds
    python -m benchmarks.speculative --quick    a short look, nothing recorded

The two loops take turns; figures are medians. Every text is compared with the plain loop's.
"""

import statistics
import time

from benchmarks.common import arguments, load, save

STORY = (
    "The quick brown fox jumps over the lazy dog while seven small boats drift past the old stone "
    "bridge at noon. Nobody on the boats looks up, and the dog sleeps on. Later the fox returns "
    "with a red letter in its mouth."
)
CODE = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def add(self, other):
        return Point(self.x + other.x, self.y + other.y)

    def subtract(self, other):
        return Point("""


def texts(model):
    "A prompt of each kind, by name."
    asked = [{"role": "user", "content": "Repeat this text word for word:\n\n" + STORY}]
    return {
        "copy": model.chat(asked),
        "code": CODE,
        "prose": "It was a quiet morning in the city when",
        "list": "Fruits and their colours:\n1. Apple: red\n2. Banana: yellow\n3. Lime: green\n4.",
    }


def drafters(name, model, quick):
    "What drafts for a target, and how many tokens a pass."
    from decoding_book.speculative import EarlyExit, ModelDrafter, PromptLookup

    found = {"prompt lookup": (PromptLookup(), 8)}
    if name != "q4":
        found["the q4 form"] = ModelDrafter(quick), 8
    if name != "bfloat16":
        found["24 of 30 layers"] = EarlyExit(model, 24), 3
    return found


def timed(f):
    start = time.perf_counter()
    found = f()
    return found, time.perf_counter() - start


def as_rows(found, of):
    "A property of a result, a list of rows also for one prompt."
    return [getattr(found, of)] if found.single else getattr(found, of)


def compare(model, prompt, choose, tokens, drafting, rounds):
    "The plain loop and each drafter in turns: rows of the record, without names."
    from decoding_book.loop import generate
    from decoding_book.speculative import speculate

    plain, taken, found = [], {label: [] for label in drafting}, {}
    for _ in range(rounds):
        usual, seconds = timed(lambda: generate(model, prompt, choose, tokens))
        plain.append(seconds)
        for label, (drafter, drafts) in drafting.items():
            options = dict(drafter=drafter, drafts=drafts)
            found[label], seconds = timed(
                lambda options=options: speculate(model, prompt, choose, tokens, **options)
            )
            taken[label].append(seconds)
    texts = as_rows(usual, "ids")
    n = sum(map(len, texts))
    for label, result in found.items():
        same = map(torch_equal, texts, as_rows(result, "ids"))
        yield dict(
            drafter=label,
            drafts=drafting[label][1],
            plain=round(n / statistics.median(plain), 1),
            drafted=round(n / statistics.median(taken[label]), 1),
            times=round(statistics.median(x / y for x, y in zip(plain, taken[label])), 2),
            passes=len(result.passes),
            a_pass=round(n / len(result.passes), 2),
            accepted=sum(x.sum().item() for x in as_rows(result, "accepted")),
            proposed=sum(x.sum().item() for x in as_rows(result, "drafted")),
            same=all(same),
        )


def torch_equal(a, b):
    return a.equal(b)


def main():
    usual, quick = dict(tokens=48, rounds=3), dict(tokens=16, rounds=1)
    args = arguments(__doc__, "speculative.json", usual, quick)
    import torch

    from decoding_book.loop import generate
    from decoding_book.sampler import Sampler
    from decoding_book.smollm import SmolLM2

    choose, rows = Sampler(temperature=0.7, top_p=0.95, seed=1), []
    four_bits = SmolLM2(weights="q4")
    targets = {"float32": SmolLM2(), "bfloat16": SmolLM2(torch.bfloat16), "q4": four_bits}
    for name, model in targets.items():
        prompts = texts(model)
        generate(model, "warm up", choose, 4)
        kinds = {**prompts, "a batch of all four": list(prompts.values())}
        for kind, prompt in kinds.items():
            drafting = drafters(name, model, four_bits)
            if "batch" in kind:
                drafting = {"prompt lookup": drafting["prompt lookup"]}
            for row in compare(model, prompt, choose, args.tokens, drafting, args.rounds):
                rows.append(dict(target=name, text=kind) | row)
                print(rows[-1], load(), flush=True)
    if not args.quick:
        save(args.out, tokens=args.tokens, rounds=args.rounds, rows=rows)


if __name__ == "__main__":
    main()
