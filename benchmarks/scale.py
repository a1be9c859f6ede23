"""Many prompts: the plain loop over batches, `decode_file` in this process, and on workers of Ray.

    python -m benchmarks.scale            64 prompts, batches of 16, 24 new tokens
    python -m benchmarks.scale --quick    a short look, nothing recorded

Every process has one thread. The workers' time holds the start of Ray's processes, in which each
loads its model; the start of Ray itself is left out.
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.common import arguments, load, save


def plain(model, prompts, choose, size, tokens):
    "The loop of the chapter's first part."
    import torch

    from decoding_book.loop import generate

    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        own = replace(choose, rows=torch.arange(first, first + len(batch)))
        generate(model, batch, own, max_new_tokens=tokens)


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def one_turn(model, make, choose, prompts, tokens):
    "Seconds of each way, one after the other."
    from decoding_book.scale import decode_file

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "prompts.jsonl"
        source.write_text("".join(json.dumps(p) + "\n" for p in prompts))
        taken = {"the plain loop": seconds(lambda: plain(model, prompts, choose, 16, tokens))}
        for what, n in (("this process", 0), ("one worker", 1), ("two workers", 2)):
            run = partial(decode_file, source, Path(folder) / what, make, choose, workers=n)
            taken[f"decode_file, {what}"] = seconds(partial(run, max_new_tokens=tokens))
    print(json.dumps(taken), flush=True)
    return taken


def main():
    usual, quick = dict(prompts=64, tokens=24, rounds=3), dict(prompts=32, tokens=8, rounds=1)
    args = arguments(__doc__, "scale.json", usual, quick)
    import ray
    import torch

    from decoding_book.sampler import Sampler
    from decoding_book.smollm import SmolLM2

    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    make, choose = partial(SmolLM2, weights="q4"), Sampler(temperature=0.8, top_p=0.95, seed=1)
    prompts = [f"{i} things about the sea:" for i in range(args.prompts)]
    model = make()
    plain(model, prompts[:16], choose, 16, 2)
    turns = [one_turn(model, make, choose, prompts, args.tokens) for _ in range(args.rounds)]
    ray.shutdown()
    rows = [
        dict(what=what, seconds=round(statistics.median(t[what] for t in turns), 1))
        for what in turns[0]
    ]
    print(json.dumps(rows), load())
    if not args.quick:
        size = dict(prompts=args.prompts, tokens=args.tokens, batch=16)
        save(args.out, rows=rows, ray=ray.__version__, **size)


if __name__ == "__main__":
    main()
