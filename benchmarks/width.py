"""What a beam's width costs beside greedy: processor seconds, rows of logits, bytes of cache.

    python -m benchmarks.width              64 tokens, greedy and widths 1 to 8, one thread, float32
    python -m benchmarks.width --quick      a short look, nothing recorded

All run in one process, in turns. Seconds are of the processor and not of the clock, so that other
work on the machine counts little.
"""

import json
import statistics
import time

from benchmarks.common import PROMPT, arguments, load, save

WIDTHS = (1, 2, 4, 8)


class Asked:
    "A model that counts the rows it was asked for, and the bytes of its largest cache."

    def __init__(self, model):
        self.model, self.rows, self.bytes = model, 0, 0
        for name in ("vocab_size", "eos", "context", "device", "encode", "decode"):
            setattr(self, name, getattr(model, name))

    def new_cache(self, rows, length):
        cache = self.model.new_cache(rows, length)
        size = sum(part.untyped_storage().nbytes() for part in (cache.keys, cache.values))
        self.bytes = max(self.bytes, size)
        return cache

    def __call__(self, ids, *args, **options):
        self.rows += len(ids)
        return self.model(ids, *args, **options)


def search(model, width, tokens):
    "Greedy for width 0, else a beam; the text's log-probability."
    from decoding_book.beam import beam_search
    from decoding_book.greedy import greedy_search

    if width == 0:
        return greedy_search(model, PROMPT, tokens, ignore_eos=True).logprob
    return beam_search(model, PROMPT, width, tokens, ignore_eos=True)[0].logprob


def measure(model, tokens, repeats):
    "A row for greedy and for each width: medians over rounds in turns."
    widths, seconds = (0, *WIDTHS), {}
    found = {}
    for repeat in range(repeats + 1):  # the first round only warms up
        for width in widths:
            asked = Asked(model)
            start = time.process_time()
            logprob = search(asked, width, tokens)
            if repeat:
                seconds.setdefault(width, []).append(time.process_time() - start)
            found[width] = dict(rows=asked.rows, cache_bytes=asked.bytes, logprob=round(logprob, 3))
    return [
        {
            "case": f"beam {width}" if width else "greedy",
            "width": width or 1,
            "tokens": tokens,
            "repeats": repeats,
            "processor_seconds": round(statistics.median(seconds[width]), 3),
            "times_greedy": round(
                statistics.median(a / b for a, b in zip(seconds[width], seconds[0])), 2
            ),
            **found[width],
            "load_average": load(),
        }
        for width in widths
    ]


def main():
    import torch

    from decoding_book.smollm import SmolLM2

    args = arguments(__doc__, "width.json", dict(tokens=64, repeats=3), dict(tokens=8, repeats=1))
    torch.set_num_threads(1)
    rows = measure(SmolLM2(), args.tokens, args.repeats)
    for row in rows:
        print(json.dumps(row), flush=True)
    if not args.quick:
        save(args.out, rows=rows)


if __name__ == "__main__":
    main()
