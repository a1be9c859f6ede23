"""The fused draw against its peers: time for one token a row, in one process, in turns.

    python -m benchmarks.fused                     one thread and two, every vocabulary, and the share of a decode step
    python -m benchmarks.fused --threads 1         one part; the others stay as recorded
    python -m benchmarks.fused --quick             a short look, nothing recorded

Peers: the naive form that most sources print, transformers' processors with `multinomial`, and vLLM's native method written from
its description (one sort for top-k and top-p, exponential noise). All start from the same logits. Rows rotate, so that no branch
predictor learns one of them by heart. Peers take turns. A turn is a few calls: the first finds the processor's caches full of the
other peers' work and is recorded apart, as `cold`. A figure is a median; `softmax` and `amax` of the same rows are the limits.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks.common import HERE, load, machine, write

VOCABULARIES, BATCHES = (32_000, 50_257, 128_256, 151_936), (1, 8, 64)
FILTERS = {"top-k": dict(top_k=50), "top-p": dict(top_p=.9), "both": dict(top_k=50, top_p=.9), "min-p": dict(min_p=.05),
           "temperature": {}}
GOALS = {1: {"top-k": 20, "top-p": 30, "both": 35, "min-p": 10, "temperature": 6},
         8: {"top-k": 40, "top-p": 40, "both": 70, "min-p": 10, "temperature": 8}}
T = .8
TEXT = ("It was a quiet morning in the city when the old man opened the door and looked at the sky. The first tram of the day came "
        "round the corner, and nobody got off. He had waited for this moment for years, and now that it was here")


def make_rows(kind, B, V, seed):
    "Logits (B, V): peaked like a language model's, or flat."
    import torch
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(B, V, generator=rng)
    if kind == "flat": return .5 * z
    ids = torch.randint(0, V, (B, 40), generator=rng)
    return (2 * z).scatter(1, ids, 16 - .7 * torch.arange(40.) + torch.randn(B, 40, generator=rng))


def naive(z, top_k=0, top_p=1., min_p=0.):
    "Softmax, sort, cut, draw: the form that most sources print, its mistakes repaired."
    import torch
    q = (z / T).softmax(-1)
    if top_k: q = q.where(q >= q.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        q = q / q.sum(-1, keepdim=True)
        ranked, order = q.sort(descending=True)
        ranked = ranked.where(ranked.cumsum(-1) - ranked < top_p, 0)
        q = torch.zeros_like(q).scatter(-1, order, ranked)
    if min_p: q = q.where(q >= min_p * q.amax(-1, keepdim=True), 0)
    return q.multinomial(1)


def transformers_form(z, top_k=0, top_p=1., min_p=0.):
    "transformers' processors in its own order, softmax, `multinomial`."
    from transformers.generation import logits_process as hf
    z = hf.TemperatureLogitsWarper(T)(None, z)
    if top_k: z = hf.TopKLogitsWarper(top_k)(None, z)
    if top_p < 1: z = hf.TopPLogitsWarper(top_p)(None, z)
    if min_p: z = hf.MinPLogitsWarper(min_p)(None, z)
    return z.softmax(-1).multinomial(1)


def native(z, top_k=0, top_p=1., min_p=0.):
    "vLLM's path without kernels: min-p, one ascending sort for top-k and top-p, exponential noise."
    import torch
    z = z / T
    if min_p:
        q = z.softmax(-1)
        z = z.masked_fill(q < min_p * q.amax(-1, keepdim=True), -torch.inf)
    if top_p < 1:
        ranked, order = z.sort(dim=-1)
        if top_k: ranked = ranked.masked_fill(ranked < ranked[:, -top_k:][:, :1], -torch.inf)
        cut = ranked.softmax(-1).cumsum(-1) <= 1 - top_p
        cut[:, -1] = False
        z = torch.empty_like(z).scatter_(-1, order, ranked.masked_fill(cut, -torch.inf))
    elif top_k: z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
    return (z.softmax(-1) / torch.empty_like(z).exponential_()).argmax(-1)


def peers():
    import torch
    from decoding_book.fused import fused_sample
    from decoding_book.noise import Key
    from decoding_book.sampler import Sampler, draw
    made = {str(f): Sampler(T, **f) for f in FILTERS.values()}
    return {"fused": lambda z, **f: fused_sample(z, T, **f),
            "draw": lambda z, **f: draw(z, made[str(f)], Key(1)),
            "plain": lambda z, **f: draw(z, made[str(f)], Key(1), "plain"),
            "naive": naive, "transformers": transformers_form, "native": native,
            "softmax": lambda z, **f: z.softmax(-1), "amax": lambda z, **f: z.amax(-1)}


def measure(sets, filters, turns, calls, skip=()):
    "Medians in milliseconds of each peer on sets of rows, in turns: (later calls, first calls)."
    runs = {name: run for name, run in peers().items() if name not in skip}
    times = {name: ([], []) for name in runs}
    for turn in range(turns + (turns > 1)):               # with several turns, the first only warms up
        for name, run in runs.items():
            for call in range(calls + 1):
                z = sets[(turn + call) % len(sets)]
                start = time.perf_counter()
                run(z, **filters)
                spent = 1000 * (time.perf_counter() - start)
                if turn or turns == 1: times[name][call == 0].append(spent)
    return [{name: round(statistics.median(t[i]), 4) for name, t in times.items()} for i in (0, 1)]


def cell(kind, V, B, name, sets, turns, calls):
    warm, cold = measure(sets, FILTERS[name], turns, calls, ("plain", "draw") if B > 8 else ())
    row = {"rows": kind, "V": V, "B": B, "filter": name, **warm, "cold": cold}
    row["ratio"] = round(row["transformers"] / row["fused"], 1)
    cold["ratio"] = round(cold["transformers"] / cold["fused"], 1)
    goal = GOALS.get(B, {}).get(name) if (kind, V) == ("peaked", 151_936) else 1 if kind != "peaked" else None
    if goal: row["goal"] = goal
    print(json.dumps(row), flush=True)
    return row


def real_rows():
    "SmolLM2's logits at the positions of a text, (T, 49152)."
    import torch
    from decoding_book.smollm import SmolLM2
    model = SmolLM2()
    return model(torch.tensor([model.encode(TEXT)]), last_only=False).logits[0].clone()


def decode_share(tokens=48):
    "The sampler's share of a decode step on SmolLM2, batch 1 and 8: medians over the steps of a text."
    import torch
    from decoding_book.noise import Key
    from decoding_book.sampler import Sampler, draw
    from decoding_book.smollm import SmolLM2
    model, out = SmolLM2(), []
    ids = torch.tensor([model.encode(TEXT)[:20]])
    for B in (1, 8):
        for backend in ("fused", "plain"):
            for name in FILTERS:
                sampler, spent = Sampler(T, **FILTERS[name]), {"model": [], "draw": []}
                cache, new = model.new_cache(B, 20 + tokens), ids.expand(B, -1)
                for i in range(tokens):
                    a = time.perf_counter()
                    z = model(new, cache=cache).logits
                    b = time.perf_counter()
                    new = draw(z, sampler, Key(1, None, i), backend).ids[:, None]
                    if i: spent["model"].append(b - a); spent["draw"].append(time.perf_counter() - b)
                ms = {n: 1000 * statistics.median(t) for n, t in spent.items()}
                row = {"B": B, "backend": backend, "filter": name, "model_ms": round(ms["model"], 3), "draw_ms": round(ms["draw"], 4),
                       "share": round(ms["draw"] / (ms["draw"] + ms["model"]), 4)}
                print(json.dumps(row), flush=True)
                out.append(row)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the largest vocabulary, few calls, nothing recorded")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--share", action="store_true", help="only the share of a decode step")
    parser.add_argument("--out", type=Path, default=HERE / "fused.json")
    args = parser.parse_args()
    import torch
    whole = args.threads == [1, 2] and not args.share
    for threads in args.threads:
        torch.set_num_threads(threads)
        busy, rows, part = load(), [], f"threads_{threads}"
        if not args.share:
            for B in args.batches:
                size = {1: (4, 20), 8: (6, 4)}.get(B, (1, 2)) if not args.quick else (1, 3)
                for V in VOCABULARIES[-1:] if args.quick else VOCABULARIES:
                    for kind in ("peaked", "flat"):
                        sets = [make_rows(kind, B, V, seed) for seed in range(8 if B == 1 else 2)]
                        rows += [cell(kind, V, B, name, sets, *size) for name in FILTERS]
                if B < 64:
                    real = real_rows()
                    sets = [real[i:i + B] for i in range(0, len(real) - B + 1, B)]
                    rows += [cell("real", real.shape[1], B, name, sets, *size) for name in FILTERS]
        share = decode_share(12 if args.quick else 48) if args.share or whole else None
        if args.quick: continue
        data = json.loads(args.out.read_text()) if args.out.exists() else {}
        old = [r for r in data.get(part, {}).get("cells", []) if args.share or r["B"] not in args.batches]
        data[part] = data.get(part, {}) | {"machine": machine(), "load_average": busy,
                                           "cells": sorted(old + rows, key=lambda r: r["B"])}
        if share: data[part]["decode"] = share
        write(args.out, data)
        print(f"recorded in {args.out}, load average {busy}")


if __name__ == "__main__":
    main()
