"""The fused draw against its peers: time for one token a row, in one process, in turns.

    python -m benchmarks.fused                one thread and two, every vocabulary, and the share of
                                              a decode step
    python -m benchmarks.fused --threads 1    one part; the others stay as recorded
    python -m benchmarks.fused --quick        a short look, nothing recorded
    python -m benchmarks.fused --llama        llama.cpp's samplers, where its Python wheel is there

Peers: the plain chain, the naive form that most sources print, transformers' processors with
`multinomial`, and vLLM's native method written from its description (one sort for top-k and top-p,
exponential noise). All start from the same logits. Rows rotate, so that no branch predictor learns
one of them by heart. Peers take turns. A turn is a few calls, of which the first does not count.
For the figures under `cold` a turn is one call, after the product with a matrix of a model's size,
as in a decode loop: so everybody finds the processor's caches full of that, whoever came before. A
figure is a median; `softmax` and `amax` of the same rows are the limits.
"""

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path

from benchmarks.common import HERE, load, machine, write

VOCABULARIES, BATCHES = (32_000, 50_257, 128_256, 151_936, 262_144), (1, 8, 64)
KINDS = ("peaked", "flat", "tied", "real")
FILTERS = {
    "top-k": dict(top_k=50),
    "top-p": dict(top_p=0.9),
    "both": dict(top_k=50, top_p=0.9),
    "min-p": dict(min_p=0.05),
    "temperature": {},
}
GOALS = {  # transformers' time over ours, on peaked rows of the fourth vocabulary
    1: {"top-k": 50, "top-p": 80, "both": 80, "min-p": 60, "temperature": 30},
    8: {"top-k": 90, "top-p": 150, "both": 180, "min-p": 90, "temperature": 45},
}
MATRIX = 49_152, 576  # the last of SmolLM2, 113 MB
LIMIT = 4  # times one `amax`, cold, with top-k or min-p
T = 0.8
TEXT = (
    "It was a quiet morning in the city when the old man opened the door and looked at the sky. "
    "The first tram of the day came round the corner, and nobody got off. He had waited for this "
    "moment for years, and now that it was here"
)


def make_rows(kind, B, V, seed):
    "Logits (B, V): peaked like a language model's, flat, or of a few values."
    import torch

    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(B, V, generator=rng)
    if kind == "flat":
        return 0.5 * z
    if kind == "tied":
        return (2 * z).round()
    ids = torch.randint(0, V, (B, 40), generator=rng)
    return (2 * z).scatter(
        1, ids, 16 - 0.7 * torch.arange(40.0) + torch.randn(B, 40, generator=rng)
    )


def naive(z, top_k=0, top_p=1.0, min_p=0.0):
    "Softmax, sort, cut, draw: the form that most sources print, its mistakes repaired."
    import torch

    q = (z / T).softmax(-1)
    if top_k:
        q = q.where(q >= q.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        q = q / q.sum(-1, keepdim=True)
        ranked, order = q.sort(descending=True)
        ranked = ranked.where(ranked.cumsum(-1) - ranked < top_p, 0)
        q = torch.zeros_like(q).scatter(-1, order, ranked)
    if min_p:
        q = q.where(q >= min_p * q.amax(-1, keepdim=True), 0)
    return q.multinomial(1)


def transformers_form(z, top_k=0, top_p=1.0, min_p=0.0):
    "transformers' processors in its own order, softmax, `multinomial`."
    from transformers.generation import logits_process as hf

    z = hf.TemperatureLogitsWarper(T)(None, z)
    if top_k:
        z = hf.TopKLogitsWarper(top_k)(None, z)
    if top_p < 1:
        z = hf.TopPLogitsWarper(top_p)(None, z)
    if min_p:
        z = hf.MinPLogitsWarper(min_p)(None, z)
    return z.softmax(-1).multinomial(1)


def native(z, top_k=0, top_p=1.0, min_p=0.0):
    "vLLM's path without kernels: min-p, one ascending sort for top-k and top-p, exponential noise."
    import torch

    z = z / T
    if min_p:
        q = z.softmax(-1)
        z = z.masked_fill(q < min_p * q.amax(-1, keepdim=True), -torch.inf)
    if top_p < 1:
        ranked, order = z.sort(dim=-1)
        if top_k:
            ranked = ranked.masked_fill(ranked < ranked[:, -top_k:][:, :1], -torch.inf)
        cut = ranked.softmax(-1).cumsum(-1) <= 1 - top_p
        cut[:, -1] = False
        z = torch.empty_like(z).scatter_(-1, order, ranked.masked_fill(cut, -torch.inf))
    elif top_k:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
    return (z.softmax(-1) / torch.empty_like(z).exponential_()).argmax(-1)


def peers():
    from decoding_book.fused import fused_sample
    from decoding_book.noise import Key
    from decoding_book.sampler import Sampler, draw

    made = {str(f): Sampler(T, **f) for f in FILTERS.values()}
    return {
        "fused": lambda z, **f: fused_sample(z, T, **f),
        "draw": lambda z, **f: draw(z, made[str(f)], Key(1)),
        "plain": lambda z, **f: draw(z, made[str(f)], Key(1), "plain"),
        "naive": naive,
        "transformers": transformers_form,
        "native": native,
        "softmax": lambda z, **f: z.softmax(-1),
        "amax": lambda z, **f: z.amax(-1),
    }


def spent(run, z):
    "Milliseconds of one call."
    start = time.perf_counter()
    run(z)
    return 1000 * (time.perf_counter() - start)


def take_turns(runs, sets, turns, calls):
    "Medians in milliseconds of each function on sets of rows: (in a row, after other work)."
    import torch

    warm, cold = ({name: [] for name in runs} for _ in range(2))
    for turn in range(turns + (turns > 1)):  # with several turns, the first only warms up
        for name, run in runs.items():
            times = [spent(run, sets[(turn + call) % len(sets)]) for call in range(calls + 1)]
            if turn or turns == 1:
                warm[name] += times[1:]
    head, hidden = torch.ones(MATRIX), torch.ones(MATRIX[1])
    for turn in range(max(turns, 3)):
        for name, run in runs.items():
            head @ hidden
            cold[name].append(spent(run, sets[turn % len(sets)]))
    return [{name: round(statistics.median(t[name]), 4) for name in runs} for t in (warm, cold)]


def measure(sets, filters, turns, calls, skip=()):
    "`take_turns` of the peers."
    runs = {
        name: lambda z, run=run: run(z, **filters)
        for name, run in peers().items()
        if name not in skip
    }
    return take_turns(runs, sets, turns, calls)


def cell(kind, V, B, name, sets, turns, calls):
    "One setting on one kind of rows."
    skip = ("draw", "naive", "native", "softmax") if B > 8 else ()
    warm, cold = measure(sets, FILTERS[name], turns, calls, skip)
    for times in (warm, cold):
        times["ratio"] = round(times["transformers"] / times["fused"], 1)
        times["over_plain"] = round(times["plain"] / times["fused"], 1)
    row = {"rows": kind, "V": V, "B": B, "filter": name, **warm, "cold": cold}
    if (kind, V) == ("peaked", VOCABULARIES[3]) and B in GOALS:
        row["goal"] = GOALS[B][name]
    print(json.dumps(row), flush=True)
    return row


def llama_chain(top_k=0, top_p=1.0, min_p=0.0):
    "llama.cpp's samplers, by its low-level calls: a function of a row. Its array is filled too."
    import ctypes

    import llama_cpp as lib
    import numpy as np

    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    if top_k:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(top_k))
    if top_p < 1:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(top_p, 1))
    if min_p:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(min_p, 1))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(T))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(1))
    data = (lib.llama_token_data * VOCABULARIES[3])()
    fields = np.frombuffer(data, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    every = np.arange(len(fields), dtype=np.int32)

    def run(z):
        fields["id"], fields["logit"], fields["p"] = every, z[0].numpy(), 0
        rows = lib.llama_token_data_array(data, len(fields), -1, False)
        lib.llama_sampler_apply(chain, ctypes.byref(rows))
        return rows.data[rows.selected].id

    return run


def against_llama(turns, calls):
    "Milliseconds of one row: llama.cpp, transformers and the fused draw, in turns."
    import torch

    from decoding_book.fused import fused_sample

    torch.set_num_threads(1)
    sets, out = [make_rows("peaked", 1, VOCABULARIES[3], seed) for seed in range(8)], []
    for name, params in FILTERS.items():
        runs = {
            "llama.cpp": llama_chain(**params),
            "transformers": lambda z, f=params: transformers_form(z, **f),
            "fused": lambda z, f=params: fused_sample(z, T, **f),
        }
        times = take_turns(runs, sets, turns, calls)[0]
        times["ratio"] = round(times["llama.cpp"] / times["fused"], 1)
        out.append({"filter": name, **times})
        print(json.dumps(out[-1]), flush=True)
    return out


def real_rows():
    "SmolLM2's logits at the positions of a text, (T, 49152)."
    import torch

    from decoding_book.smollm import SmolLM2

    model = SmolLM2()
    return model(torch.tensor([model.encode(TEXT)]), last_only=False).logits[0].clone()


def steps_of(model, ids, sampler, backend, tokens):
    "Median milliseconds of the model and of the draw over the steps of a text."
    from decoding_book.noise import Key
    from decoding_book.sampler import draw

    spent = {"model": [], "draw": []}
    cache, new = model.new_cache(len(ids), ids.shape[1] + tokens), ids
    for i in range(tokens):
        start = time.perf_counter()
        z = model(new, cache=cache).logits
        middle = time.perf_counter()
        new = draw(z, sampler, Key(1, None, i), backend).ids[:, None]
        if i:  # the first step reads the prompt
            spent["model"].append(middle - start)
            spent["draw"].append(time.perf_counter() - middle)
    return [1000 * statistics.median(times) for times in spent.values()]


def decode_share(tokens=48):
    "The sampler's share of a decode step on SmolLM2, batch 1 and 8."
    import torch

    from decoding_book.sampler import Sampler
    from decoding_book.smollm import SmolLM2

    model, out = SmolLM2(), []
    ids = torch.tensor([model.encode(TEXT)[:20]])
    for B, backend, name in product((1, 8), ("fused", "plain"), FILTERS):
        sampler = Sampler(T, **FILTERS[name])
        step, own = steps_of(model, ids.expand(B, -1), sampler, backend, tokens)
        row = {"B": B, "backend": backend, "filter": name, "model_ms": round(step, 3)}
        row |= {"draw_ms": round(own, 4), "share": round(own / (own + step), 4)}
        print(json.dumps(row), flush=True)
        out.append(row)
    return out


def cells_of(B, quick, vocabularies, kinds):
    "All cells of one batch size."
    often = {1: (4, 20), 8: (5, 4)}.get(B, (1, 2)) if not quick else (1, 3)
    rows = []
    for V, kind in product(VOCABULARIES[3:4] if quick else vocabularies, kinds):
        if kind == "real":
            continue
        turns, calls = often if V == VOCABULARIES[3] else (1, 2)  # goals are set for one V
        sets = [make_rows(kind, B, V, seed) for seed in range(8 if B == 1 else 2)]
        rows += [cell(kind, V, B, name, sets, turns, calls) for name in FILTERS]
    if B < 64 and "real" in kinds:
        real = real_rows()
        sets = [real[i : i + B] for i in range(0, len(real) - B + 1, B)]
        rows += [cell("real", real.shape[1], B, name, sets, *often) for name in FILTERS]
    return rows


def record(path, part, **found):
    "Write what was found beside what the file holds; cells of other batch sizes stay."
    data = json.loads(path.read_text()) if path.exists() else {}
    old = data.get(part, {})
    if "cells" in found and "cells" in old:
        sizes = {r.get("B") for r in found["cells"]}
        found["cells"] = [r for r in old["cells"] if r.get("B") not in sizes] + found["cells"]
    data[part] = old | {"machine": machine(), "load_average": load()} | found
    write(path, data)
    print(f"recorded in {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short look, nothing recorded")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--vocabularies", type=int, nargs="*", default=VOCABULARIES)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--llama", action="store_true", help="only llama.cpp's samplers")
    parser.add_argument("--share", action="store_true", help="only the share of a decode step")
    parser.add_argument("--out", type=Path, default=HERE / "fused.json")
    args = parser.parse_args()
    import torch

    from decoding_book.fused import fused_sample

    fused_sample(make_rows("peaked", 1, 1000, 0), T)  # compiled now, and in no cell
    if args.llama:
        return record(args.out, "llama.cpp", cells=against_llama(4, 20))
    for threads in args.threads:
        torch.set_num_threads(threads)
        found = {}
        if not args.share:
            sizes = args.quick, args.vocabularies, args.kinds
            found["cells"] = [row for B in args.batches for row in cells_of(B, *sizes)]
        if args.share or args.threads == [1, 2]:
            found["decode"] = decode_share(12 if args.quick else 48)
        if not args.quick:
            record(args.out, f"threads_{threads}", **found)


if __name__ == "__main__":
    main()
