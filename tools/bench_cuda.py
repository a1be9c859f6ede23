"""The CUDA draw against its peers, from logits to tokens, on a GPU.

    python tools/bench_cuda.py             everything; results go to benchmarks/cuda.json
    python tools/bench_cuda.py --quick     two shapes, nothing recorded
    python tools/bench_cuda.py --dry       the script's logic at toy sizes, no GPU needed, nothing recorded

Every peer starts from the same logits and ends with tokens. The peers of one cell take turns in one process, over inputs that
rotate so that no cache holds them all; the figures are medians over rounds of CUDA events, once as plain launches and once as
replays of a CUDA graph. `read` is one `amax` over the logits, the least that anything which looks at them must take. Before
anything is timed, each peer's law is tested.
"""
import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SETTINGS = {"temperature": dict(temperature=.8), "top-k": dict(temperature=.8, top_k=50),
            "top-p": dict(temperature=.8, top_p=.9), "both": dict(temperature=.8, top_k=50, top_p=.9)}
SIZES, BATCHES, REAL = (32_000, 128_256, 151_936, 262_144), (1, 8, 32, 128, 512), 49_152


# ---------------------------------------------------------------- who takes part
# A peer is make(B, V, settings, device) -> a function of logits (B, V) that returns tokens (B,), or None if it has no form
# for these settings. What does not depend on the logits is done in make.

def tensors(B, settings, device):
    import torch
    T, k, p = settings.get("temperature", 1.), settings.get("top_k"), settings.get("top_p")
    return T, None if k is None else torch.full((B,), k, dtype=torch.int32, device=device), \
        None if p is None else torch.full((B,), p, device=device)


def race(logits):
    "Exponential times, as torch.multinomial does inside, without its checks on the CPU."
    import torch
    q = logits.softmax(-1)
    return (q / torch.empty_like(q).exponential_()).argmax(-1)


def book(task):
    def make(B, V, settings, device):
        from decoding_book import cuda
        from decoding_book.noise import Key
        asked = cuda.ask(B, device, **settings, key=Key(1))

        def run(logits):
            asked.advance()                                # a launch of its own, so that each call draws anew
            return cuda.launch(logits, asked, task).ids
        return run
    return make


def plain(B, V, settings, device):
    "The book's definition, on the device."
    from decoding_book.noise import Key
    from decoding_book.sampler import Sampler, draw
    calls = iter(range(10**9))
    return lambda logits: draw(logits, Sampler(**settings), Key(1, position=next(calls)), "plain").ids


def fused(B, V, settings, device):
    "The book's form for the CPU, on the device: `draw` under that name."
    from decoding_book.noise import Key
    from decoding_book.sampler import Sampler, draw
    calls = iter(range(10**9))
    return lambda logits: draw(logits, Sampler(**settings), Key(1, position=next(calls)), "fused").ids


def torch_sort(B, V, settings, device):
    "Sort, mask, scatter, softmax, race: what systems do without a kernel."
    import torch
    T, k, p = tensors(B, settings, device)

    def run(logits):
        z = logits.float() / T
        if k is None and p is None: return race(z)
        z, ids = z.sort(-1)                                                       # ascending
        if k is not None: z = z.masked_fill(z < z.gather(1, (V - k.long())[:, None].clamp(min=0)), -torch.inf)
        if p is not None:
            drop = z.softmax(-1).cumsum(-1) <= 1 - p[:, None]
            drop[:, -1] = False
            z = z.masked_fill(drop, -torch.inf)
        return race(torch.empty_like(z).scatter_(1, ids, z))
    return run


def torch_topk(B, V, settings, device):
    "torch.topk first, and the rest on its survivors. Needs a k."
    import torch
    if "top_k" not in settings: return None
    T, _, p = tensors(B, settings, device)

    def run(logits):
        z, ids = logits.topk(min(settings["top_k"], V), -1)
        z = z.float() / T
        if p is not None:
            q = z.softmax(-1)
            z = z.masked_fill(q.cumsum(-1) - q >= p[:, None], -torch.inf)
        return ids.gather(1, race(z)[:, None])[:, 0]
    return run


def flashinfer(B, V, settings, device):
    import flashinfer.sampling as F
    T, k, p = tensors(B, settings, device)

    def run(logits):
        z = logits.float() / T
        if k is not None and p is not None: return F.top_k_top_p_sampling_from_logits(z, k, p, filter_apply_order="top_k_first")
        q = z.softmax(-1)
        if k is not None: return F.top_k_sampling_from_probs(q, k)
        if p is not None: return F.top_p_sampling_from_probs(q, p)
        return F.sampling_from_probs(q)
    return run


def flashinfer_probabilities(B, V, settings, device):
    "Without its softmax: the argument holds probabilities. Beside the others, not among them."
    import flashinfer.sampling as F
    T, k, p = tensors(B, settings, device)

    def run(q):
        if k is not None and p is not None: return F.top_k_top_p_sampling_from_probs(q, k, p, filter_apply_order="joint")
        if k is not None: return F.top_k_sampling_from_probs(q, k)
        if p is not None: return F.top_p_sampling_from_probs(q, p)
        return F.sampling_from_probs(q)
    return run


def vllm(B, V, settings, device):
    "Its Triton kernel masks in place; softmax and race after."
    from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton
    T, k, p = tensors(B, settings, device)

    def run(logits):
        z = logits.float() / T
        return race(z if k is None and p is None else apply_top_k_top_p_triton(z, k, p))
    return run


def read(B, V, settings, device): return lambda logits: logits.amax(-1)


PEERS = {"read": read, "book": book(2), "book, token only": book(1), "book, plain": plain, "book, fused": fused,
         "torch sort": torch_sort, "torch topk": torch_topk, "flashinfer": flashinfer,
         "flashinfer from probabilities": flashinfer_probabilities, "vllm": vllm}


def who_is_here(device):
    "The peers that run at all, and why the others do not."
    import torch
    here, missing = {}, {}
    for name, make in PEERS.items():
        try:
            for settings in SETTINGS.values():
                run = make(2, 64, settings, device)
                if run: run(torch.randn(2, 64, device=device).softmax(-1))
            here[name] = make
        except Exception as e: missing[name] = f"{type(e).__name__}: {e}"[:200]
    return here, missing


# ---------------------------------------------------------------- right first

def pooled_chi2(counts, q):
    "p-value of counts against a law; cells expected fewer than 5 times are pooled."
    import torch
    from decoding_book.noise import chi_square
    few = q * counts.sum() < 5
    pool = torch.stack([counts[few].sum(), q[few].sum() * counts.sum()])
    c = torch.cat([counts[~few].double(), pool[:1].double()])
    return chi_square(c, torch.cat([q[~few], q[few].sum()[None]]))


def check(name, make, device, draws):
    "The law of each setting by chi-square, and what is kept of .4, .3, .3 with k = 2."
    import torch
    from decoding_book.sampler import Sampler
    z = (2 * torch.randn(64, generator=torch.Generator().manual_seed(5))).float()
    out = {}
    for label, settings in SETTINGS.items():
        settings = settings if "top_k" not in settings else settings | dict(top_k=12)
        run = make(draws, 64, settings, device)
        if run is None: continue
        given = (z / settings["temperature"]).softmax(-1) if "probabilities" in name else z
        ids = run(given.to(device).expand(draws, -1).contiguous()).long().cpu()
        q = Sampler(**settings).distribution(z.double())
        out[label] = round(pooled_chi2(ids.bincount(minlength=64), q), 6)
    run = make(200, 3, dict(temperature=1., top_k=2), device)
    if run:
        tied = torch.tensor([.4, .3, .3])
        given = tied if "probabilities" in name else tied.log()
        out["tie kept"] = sorted(set(run(given.to(device).expand(200, -1).contiguous()).tolist()))
    return out


# ---------------------------------------------------------------- then fast

def rows_of(kind, B, V, dtype, device, generator, real=None):
    import torch
    if kind == "real": z = real[torch.randint(len(real), (B,), generator=generator)]
    else: z = torch.randn(B, V, generator=generator)
    if kind == "peaked": z = 3 * z
    if kind == "flat": z = .3 * z
    return z.to(device, dtype)


def real_rows():
    "Logits of SmolLM2 at the positions of a text, (N, 49152)."
    import torch
    from decoding_book.smollm import SmolLM2
    model = SmolLM2()
    text = "The decoder reads a prompt and writes one token after the other. " * 12
    return model(torch.tensor([model.encode(text)]), last_only=False).logits[0].float()


class Clock:
    "Microseconds a call: CUDA events on a GPU, the wall clock otherwise."
    def __init__(self, gpu): self.gpu = gpu

    def __call__(self, run, calls):
        import torch
        if not self.gpu:
            start = time.perf_counter()
            run()
            return 1e6 * (time.perf_counter() - start) / calls
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        run()
        b.record()
        b.synchronize()
        return 1e3 * a.elapsed_time(b) / calls


def graphed(run):
    "The same calls as a replay of a CUDA graph."
    import torch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): run()
    return graph.replay


def cell(peers, B, V, kind, dtype, settings, device, rounds, real=None):
    "Medians of every peer, taking turns."
    import torch
    gpu, generator = device == "cuda", torch.Generator().manual_seed(1)
    bytes_ = B * V * dtype.itemsize
    copies = max(2, min(16, -(-200_000_000 // bytes_))) if gpu else 2              # more than any cache
    inputs = [rows_of(kind, B, V, dtype, device, generator, real) for _ in range(copies)]
    chances = [(z.float() / settings["temperature"]).softmax(-1) for z in inputs]
    runs, notes = {}, {}
    for name, make in peers.items():
        one = make(B, V, settings, device)
        if one is None: continue
        given = chances if "probabilities" in name else inputs
        def loop(one=one, given=given):
            for z in given: one(z)
        try:
            for _ in range(3): loop()                                              # compiles, warms up
            runs[name, "plain"] = loop
            if gpu:
                torch.cuda.synchronize()
                runs[name, "graph"] = graphed(loop)
        except Exception as e: notes[name] = f"{type(e).__name__}: {e}"[:120]
        if gpu: torch.cuda.synchronize()
    clock, times = Clock(gpu), {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items(): times[key].append(clock(run, copies))
    out = {f"{name} ({how})": round(statistics.median(t), 2) for (name, how), t in times.items()}
    spread = {f"{name} ({how})": round(max(t) / min(t), 2) for (name, how), t in times.items()}
    return {"B": B, "V": V, "rows": kind, "dtype": str(dtype).removeprefix("torch."), "us": out,
            "max/min": spread, **({"failed": notes} if notes else {})}


def machine():
    import torch
    import triton
    gpu = torch.cuda.get_device_properties(0)
    return {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "gpu": gpu.name,
            "processors": gpu.multi_processor_count, "system": platform.system(), "python": platform.python_version(),
            "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}


def plan(args):
    "The cells: every shape at peaked rows; the other kinds where they tell most."
    import torch
    if args.dry: return [(2, 300, "peaked", torch.float32), (3, 200, "flat", torch.bfloat16)]
    if args.quick: return [(8, 151_936, "peaked", torch.float32), (128, 151_936, "peaked", torch.float32)]
    both = (torch.float32, torch.bfloat16)
    return [(B, V, kind, d) for kind in ("peaked", "flat") for V in SIZES for B in BATCHES for d in both] + \
        [(B, REAL, "real", d) for B in BATCHES for d in both]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, nothing recorded")
    parser.add_argument("--dry", action="store_true", help="toy sizes, on any machine, nothing recorded")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=25, help="stop after this long, and record what there is")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/cuda.json")
    args = parser.parse_args()
    import torch
    gpu = torch.cuda.is_available()
    if not gpu and not args.dry:
        print("bench_cuda: there is no GPU here, so nothing was measured and nothing was recorded "
              "(--dry tries the script itself at toy sizes).")
        return
    if not gpu: os.environ["TRITON_INTERPRET"] = "1"
    device = "cuda" if gpu else "cpu"
    peers, missing = who_is_here(device)
    for name, why in missing.items(): print(f"not here: {name}: {why}")
    checks = {name: check(name, make, device, 100_000 if gpu else 40) for name, make in peers.items() if name != "read"}
    for name, found in checks.items(): print(json.dumps({name: found}), flush=True)
    wrong = [n for n, c in checks.items() if any(isinstance(v, float) and v < 1e-4 for v in c.values())]
    if wrong: print("the law is wrong for:", ", ".join(wrong))
    cells, start = [], time.monotonic()
    real = real_rows() if gpu and not args.quick and not args.dry else None
    for label, settings in SETTINGS.items():
        for B, V, kind, dtype in plan(args):
            if time.monotonic() - start > 60 * args.minutes: break
            rounds = 1 if args.dry else args.rounds
            cells.append({"filters": label} | cell(peers, B, V, kind, dtype, settings, device, rounds, real))
            print(json.dumps(cells[-1]), flush=True)
            if gpu: torch.cuda.empty_cache()
    if args.dry: print("dry run: the times above are of an interpreter at toy sizes and mean nothing")
    elif not args.quick:
        result = {"machine": machine(), "settings": SETTINGS, "law": checks, "wrong law": wrong, "not here": missing,
                  "cells": cells}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"recorded in {args.out}")


if __name__ == "__main__":
    main()
