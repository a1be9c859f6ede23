"""Beam search: this book's against transformers' on the same weights; exhaustive search on a table.

    python -m benchmarks.search              beam 4 over 64 tokens, two threads, float32
    python -m benchmarks.search --quick      a short look, nothing recorded

Both beams run in one process, in turns, so that a busy machine slows both, and both must return the
same hypotheses. The share of the model is the time that our search spends inside the model's call
and its cache's `reorder`.
"""

import json
import statistics
import time

from benchmarks.common import arguments, load, reference_weights, save, transformers_peer

PROMPTS = [
    "It was a quiet morning in the city when",
    "The capital of France is",
    "In a shocking finding, scientists discovered",
    "To make a good soup, you",
]


class Timed:
    "A model that adds up the seconds spent inside it."

    def __init__(self, model):
        self.model, self.seconds = model, 0.0
        for name in ("vocab_size", "eos", "context", "device", "encode", "decode"):
            setattr(self, name, getattr(model, name))

    def timed(self, call, *args, **options):
        start = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            self.seconds += time.perf_counter() - start

    def new_cache(self, rows, length):
        cache = self.model.new_cache(rows, length)
        reorder = cache.reorder
        cache.reorder = lambda rows: self.timed(reorder, rows)
        return cache

    def __call__(self, *args, **options):
        return self.timed(self.model, *args, **options)


def run_ours(model, prompts, width, tokens, options):
    "Our search with transformers' rules; seconds, texts, seconds inside the model."
    from decoding_book.beam import beam_search

    timed = Timed(model)
    start = time.perf_counter()
    found = beam_search(
        timed, prompts, width, tokens, 1.0, n_best=width, dialect="huggingface", **options
    )
    return (
        time.perf_counter() - start,
        [[h.ids.tolist() for h in one] for one in found],
        timed.seconds,
    )


def run_transformers(model, prompts, width, tokens, options):
    "transformers' own `generate`; seconds and texts."
    import torch

    from decoding_book.loop import left_pad

    eos = options.get("stop")
    ids, mask = left_pad(prompts)
    model.generation_config.eos_token_id = eos
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask.long(),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=tokens,
            length_penalty=1.0,
            early_stopping=options["early_stopping"],
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=2,
        )
    seconds = time.perf_counter() - start
    rows = [r[: r.index(eos) + 1] if eos in r else r for r in out[:, ids.shape[1] :].tolist()]
    return seconds, [rows[i : i + width] for i in range(0, len(rows), width)]


def compare(name, ours, peer, prompts, width, tokens, repeats, options):
    "Medians of seconds, and the median of the ratios of neighbouring runs."
    seconds, theirs, inside = [], [], []
    for repeat in range(repeats + 1):  # the first round only warms up
        a, found, model = run_ours(ours, prompts, width, tokens, options)
        b, expected = run_transformers(peer, prompts, width, tokens, options)
        assert found == expected, f"{name}: the hypotheses differ"
        if repeat:
            seconds.append(a), theirs.append(b), inside.append(model)
    ratios = [a / b for a, b in zip(seconds, theirs)]
    return {
        "case": name,
        "prompts": len(prompts),
        "width": width,
        "tokens": tokens,
        "repeats": repeats,
        "seconds": round(statistics.median(seconds), 3),
        "transformers_seconds": round(statistics.median(theirs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "share_of_the_model": round(statistics.median(m / s for m, s in zip(inside, seconds)), 3),
        "same_hypotheses": True,
        "load_average": load(),
    }


def exhaustive(repeats=50):
    "Milliseconds for the 6^5 texts of the six words, without an end mark."
    from decoding_book.exhaustive import exhaustive_search
    from decoding_book.toy import six_words

    world, times = six_words(eos=None), []
    for _ in range(repeats):
        start = time.perf_counter()
        exhaustive_search(world, "", 5)
        times.append(1000 * (time.perf_counter() - start))
    return {
        "case": "all 6^5 texts of the six words",
        "repeats": repeats,
        "median_ms": round(statistics.median(times), 2),
        "fastest_ms": round(min(times), 2),
        "load_average": load(),
    }


def main():
    import torch

    from decoding_book.smollm import SmolLM2, weights_path

    args = arguments(__doc__, "search.json", dict(tokens=64, repeats=5), dict(tokens=12, repeats=1))
    rows = [exhaustive()]
    print(json.dumps(rows[-1]), flush=True)
    ours, peer = SmolLM2(), transformers_peer(reference_weights(weights_path())[0])
    prompts, dot = [torch.tensor(ours.encode(p)) for p in PROMPTS], ours.encode(".")[0]
    no_end = {"early_stopping": False, "ignore_eos": True}
    dots = {"early_stopping": True, "ignore_eos": True, "stop": dot}
    for name, batch, options in (
        ("beam 4, no end mark", prompts[:1], no_end),
        ("beam 4, four prompts, no end mark", prompts, no_end),
        ("beam 4, four prompts, '.' ends a text, early stopping", prompts, dots),
    ):
        rows.append(compare(name, ours, peer, batch, 4, args.tokens, args.repeats, options))
        print(json.dumps(rows[-1]), flush=True)
    if not args.quick:
        save(args.out, rows=rows)


if __name__ == "__main__":
    main()
