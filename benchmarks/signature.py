"""A signature in SmolLM2's texts: how many tokens find it, at several temperatures.

    python -m benchmarks.signature            24 texts of 200 tokens each
    python -m benchmarks.signature --quick    a short look, nothing recorded

Nothing here is a time. Of each token its score and the probability with which it was drawn are
kept; what is recorded follows from the two.
"""

import json
import math

from benchmarks.common import arguments, save

SETTINGS = {
    "T = 0.5": dict(temperature=0.5),
    "T = 0.7": dict(temperature=0.7),
    "T = 1": dict(temperature=1.0),
    "T = 1.3": dict(temperature=1.3),
    "T = 1, top-p 0.9": dict(temperature=1.0, top_p=0.9),
}
PROMPTS = [
    "It was a quiet morning in the city when",
    "The recipe starts with two onions and",
    "My grandmother used to say that",
    "The committee has decided that from next year",
    "In the deep sea there lives a fish that",
    "Dear Sir, I am writing to you because",
    "The history of the bicycle begins",
    "She opened the letter and",
]
LEVEL = 1e-6


def texts_of(model, settings, texts, tokens):
    "Scores (texts, tokens) and the probabilities of the drawn tokens, likewise."
    import torch

    from decoding_book.loop import generate
    from decoding_book.noise import Key
    from decoding_book.sampler import Sampler
    from decoding_book.signature import signature

    scores, drawn = [], []
    for first in range(0, texts, len(PROMPTS)):
        rows = torch.arange(first, first + len(PROMPTS))
        sampler = Sampler(seed=2026, rows=rows, **settings)
        made = generate(model, PROMPTS, sampler, tokens, ignore_eos=True, alternatives=0)
        starts = [len(p) for p in made.prompt_ids]
        found = signature(made.ids, Key(2026, rows, starts))
        scores += [s.per_token for s in found]
        drawn.append(torch.stack([s.draw.logprob for s in made.steps], 1).double().exp())
        print(first, [f"{s.p_value:.1e}" for s in found], flush=True)
    return torch.stack(scores), torch.cat(drawn)


def first_found(scores):
    "After how many tokens each text reaches the level; one more than it has if it never does."
    import torch

    from decoding_book.signature import gamma_tail

    n = torch.arange(1, scores.shape[1] + 1)
    reached = gamma_tail(n, scores.cumsum(1)) <= LEVEL
    return [int(r.int().argmax()) + 1 if r.any() else scores.shape[1] + 1 for r in reached]


def row_of(name, scores, drawn):
    "What is recorded of one setting."
    import torch

    from decoding_book.signature import gamma_tail, mean_score, tokens_needed

    p = drawn.flatten()
    weights = torch.full_like(p, 1 / len(p))
    lengths = [n for n in (25, 50, 100, 200) if n <= scores.shape[1]]
    found = {
        n: (gamma_tail(n, scores[:, :n].sum(1)) <= LEVEL).double().mean().item() for n in lengths
    }
    first = sorted(first_found(scores))
    return {
        "what": name,
        "bits a token": round(-p.log2().mean().item(), 3),
        "mean score": round(scores.mean().item(), 3),
        "mean score, from the probabilities": round((mean_score(p[:, None]) / p).mean().item(), 3),
        "found after": {str(n): round(share, 3) for n, share in found.items()},
        "half are found after": first[len(first) // 2],
        "nine tenths are found after": first[math.ceil(0.9 * len(first)) - 1],
        "tokens needed, if steps were independent": tokens_needed(p, LEVEL, 0.9, weights),
        "half needed, if steps were independent": tokens_needed(p, LEVEL, 0.5, weights),
    }


def main():
    usual, quick = dict(texts=24, tokens=200), dict(texts=8, tokens=24)
    args = arguments(__doc__, "signature.json", usual, quick)
    from decoding_book.smollm import SmolLM2

    model, rows = SmolLM2(weights="q4"), []
    for name, settings in SETTINGS.items():
        rows.append(row_of(name, *texts_of(model, settings, args.texts, args.tokens)))
        print(json.dumps(rows[-1]), flush=True)
    if not args.quick:
        save(args.out, rows=rows, texts=args.texts, tokens=args.tokens, level=LEVEL)


if __name__ == "__main__":
    main()
