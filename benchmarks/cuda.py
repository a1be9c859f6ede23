"""The CUDA draw against its peers, from logits to tokens, on a GPU.

    python -m benchmarks.cuda             everything; results go to benchmarks/cuda.json
    python -m benchmarks.cuda --check     first: the tests on this GPU, and compute-sanitizer
    python -m benchmarks.cuda --quick     two shapes, nothing recorded
    python -m benchmarks.cuda --dry       the script's logic at toy sizes, no GPU needed

It saves after every cell and stops after `--minutes` (9): the same command again goes on where it
stopped, as long as the GPU, torch, Triton and the kernels are the same. The cells that the goals
are about come first. Where a machine is lent and lost, keep the file of results and put it back
before the next command. On one that runs commands of ten minutes:

    python -m benchmarks.cuda --check    (nine minutes at the most)
    python -m benchmarks.cuda            (as often as it says that cells are left)

Every peer starts from the same logits and ends with tokens. The peers of one cell take turns in one
process, over inputs that rotate so that no cache holds them all; the figures are medians over
rounds of CUDA events, once as plain launches and once as replays of a CUDA graph. `read` is one
`amax` over the logits, the least that anything which looks at them must take. Before anything is
timed, each peer's law is tested. FlashInfer and vLLM take part if they can be imported; folders to
look in for them can be named in PYTHONPATH.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common import HERE, ROOT, now, write

SETTINGS = {
    "temperature": dict(temperature=0.8),
    "top-k": dict(temperature=0.8, top_k=50),
    "top-p": dict(temperature=0.8, top_p=0.9),
    "both": dict(temperature=0.8, top_k=50, top_p=0.9),
}
SIZES, BATCHES, REAL = (32_000, 128_256, 151_936, 262_144), (1, 8, 32, 128, 512), 49_152


# ---------------------------------------------------------------- who takes part
# A peer is make(B, V, settings, device) -> a function of logits (B, V) that returns tokens (B,), or
# None if it has no form
# for these settings. What does not depend on the logits is done in make.


def tensors(B, settings, device):
    import torch

    T, k, p = settings.get("temperature", 1.0), settings.get("top_k"), settings.get("top_p")
    return (
        T,
        None if k is None else torch.full((B,), k, dtype=torch.int32, device=device),
        None if p is None else torch.full((B,), p, device=device),
    )


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
            asked.advance()  # a launch of its own, so that each call draws anew
            return cuda.launch(logits, asked, task).ids

        return run

    return make


def plain(B, V, settings, device):
    "The book's definition, on the device."
    from decoding_book.noise import Key
    from decoding_book.sampler import Sampler, draw

    calls = iter(range(10**9))
    return lambda logits: (
        draw(logits, Sampler(**settings), Key(1, position=next(calls)), "plain").ids
    )


def two_stage(B, V, settings, device):  # long: a peer, whole
    """The book's design for the CPU, as torch on the device: maxima of groups, few candidates,
    noise for those alone."""
    import torch

    T, k, p = tensors(B, settings, device)
    if k is None and p is None:
        return lambda logits: race(logits.float() / T)
    want = min(V, settings.get("top_k", 1024))
    width = 16 if V >= 64 * want else 1
    groups = V // width

    def candidates(z):
        "The `want` best of each row, best first."
        if width == 1:
            return z.topk(want, -1)
        best = z[:, : groups * width].view(B, width, groups).amax(1).topk(want, -1).indices
        ids = (best[:, None] + groups * torch.arange(width, device=device)[:, None]).flatten(1)
        ids = torch.cat([ids, torch.arange(groups * width, V, device=device).expand(B, -1)], 1)
        top = z.gather(1, ids).topk(want, -1)
        return top.values, ids.gather(1, top.indices)

    def run(logits):
        z, ids = candidates(logits.float() / T)
        if p is not None:
            norm = z.logsumexp(-1) if k is not None else (logits.float() / T).logsumexp(-1)
            q = (z - norm[:, None]).exp()
            before = q.cumsum(-1) - q
            if k is None and ((before[:, -1] + q[:, -1]) < p).any():
                return whole(logits)  # a look, and so a wait
            z = z.masked_fill(before >= p[:, None], -torch.inf)
        return ids.gather(1, race(z)[:, None])[:, 0]

    whole = torch_sort(B, V, settings, device)
    return run


def torch_sort(B, V, settings, device):
    "Sort, mask, scatter, softmax, race: what systems do without a kernel."
    import torch

    T, k, p = tensors(B, settings, device)

    def run(logits):
        z = logits.float() / T
        if k is None and p is None:
            return race(z)
        z, ids = z.sort(-1)  # ascending
        if k is not None:
            z = z.masked_fill(z < z.gather(1, (V - k.long())[:, None].clamp(min=0)), -torch.inf)
        if p is not None:
            drop = z.softmax(-1).cumsum(-1) <= 1 - p[:, None]
            drop[:, -1] = False
            z = z.masked_fill(drop, -torch.inf)
        return race(torch.empty_like(z).scatter_(1, ids, z))

    return run


def torch_topk(B, V, settings, device):
    "torch.topk first, and the rest on its survivors. Needs a k."
    import torch

    if "top_k" not in settings:
        return None
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
        if k is not None and p is not None:
            return F.top_k_top_p_sampling_from_logits(z, k, p, filter_apply_order="top_k_first")
        if k is None and p is None and hasattr(F, "sampling_from_logits"):
            return F.sampling_from_logits(z)
        q = z.softmax(-1)
        if k is not None:
            return F.top_k_sampling_from_probs(q, k)
        if p is not None:
            return F.top_p_sampling_from_probs(q, p)
        return F.sampling_from_probs(q)

    return run


def flashinfer_probabilities(B, V, settings, device):
    "Without its softmax: the argument holds probabilities. Beside the others, not among them."
    import flashinfer.sampling as F

    T, k, p = tensors(B, settings, device)

    def run(q):
        if k is not None and p is not None:
            return F.top_k_top_p_sampling_from_probs(q, k, p, filter_apply_order="joint")
        if k is not None:
            return F.top_k_sampling_from_probs(q, k)
        if p is not None:
            return F.top_p_sampling_from_probs(q, p)
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


def read(B, V, settings, device):
    return lambda logits: logits.amax(-1)


PEERS = {
    "read": read,
    "book": book(2),
    "book, token only": book(1),
    "book, plain": plain,
    "book, as on the CPU": two_stage,
    "torch sort": torch_sort,
    "torch topk": torch_topk,
    "flashinfer": flashinfer,
    "flashinfer from probabilities": flashinfer_probabilities,
    "vllm": vllm,
}


def who_is_here(device):
    "The peers that run at all, and why the others do not."
    import torch

    here, missing = {}, {}
    for name, make in PEERS.items():
        try:
            for settings in SETTINGS.values():
                run = make(2, 64, settings, device)
                if run:
                    run(torch.randn(2, 64, device=device).softmax(-1))
            here[name] = make
        except Exception as e:
            missing[name] = f"{type(e).__name__}: {e}"[:200]
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
        if run is None:
            continue
        given = (z / settings["temperature"]).softmax(-1) if "probabilities" in name else z
        ids = run(given.to(device).expand(draws, -1).contiguous()).long().cpu()
        q = Sampler(**settings).distribution(z.double())
        out[label] = round(pooled_chi2(ids.bincount(minlength=64), q), 6)
    run = make(n := min(draws, 200), 3, dict(temperature=1.0, top_k=2), device)
    if run:
        tied = torch.tensor([0.4, 0.3, 0.3])
        given = tied if "probabilities" in name else tied.log()
        out["tie kept"] = sorted(set(run(given.to(device).expand(n, -1).contiguous()).tolist()))
    return out


# ---------------------------------------------------------------- then fast


def rows_of(kind, B, V, dtype, device, generator, real=None):
    import torch

    if kind == "real":
        z = real[torch.randint(len(real), (B,), generator=generator)]
    else:
        z = torch.randn(B, V, generator=generator)
    if kind == "peaked":
        z = 3 * z
    if kind == "flat":
        z = 0.3 * z
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

    def __init__(self, gpu):
        self.gpu = gpu

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
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# long: all forms of all peers, in turns
def cell(peers, B, V, kind, dtype, settings, device, rounds, real=None, seconds=3.0):
    "Medians of every peer, taking turns: `rounds` of them, or what fits into `seconds`, but five."
    import torch

    gpu, generator = device == "cuda", torch.Generator().manual_seed(1)
    bytes_ = B * V * dtype.itemsize
    copies = max(2, min(16, -(-200_000_000 // bytes_))) if gpu else 2  # more than any cache
    inputs = [rows_of(kind, B, V, dtype, device, generator, real) for _ in range(copies)]
    chances = [(z.float() / settings["temperature"]).softmax(-1) for z in inputs]
    runs, notes = {}, {}
    for name, make in peers.items():
        one = make(B, V, settings, device)
        if one is None:
            continue
        given = chances if "probabilities" in name else inputs

        def loop(one=one, given=given):
            for z in given:
                one(z)

        try:
            for _ in range(3):
                loop()  # compiles, warms up
            runs[name, "plain"] = loop
            if gpu:
                torch.cuda.synchronize()
                runs[name, "graph"] = graphed(loop)
        except Exception as e:
            notes[name] = f"{type(e).__name__}: {e}"[:120]
        if gpu:
            torch.cuda.synchronize()
    clock, times, start = Clock(gpu), {key: [] for key in runs}, time.monotonic()
    for n in range(rounds):
        if n >= 5 and time.monotonic() - start > seconds:
            break
        for key, run in runs.items():
            times[key].append(clock(run, copies))
    out = {f"{name} ({how})": round(statistics.median(t), 2) for (name, how), t in times.items()}
    spread = {f"{name} ({how})": round(max(t) / min(t), 2) for (name, how), t in times.items()}
    return {
        "B": B,
        "V": V,
        "rows": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "us": out,
        "max/min": spread,
        **({"failed": notes} if notes else {}),
    }


def machine():
    import torch
    import triton

    gpu = torch.cuda.get_device_properties(0)
    return {
        "date": now(),
        "gpu": gpu.name,
        "processors": gpu.multi_processor_count,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


def plan(args):
    """The cells (filters, B, V, rows, dtype): first those that the goals are about, then every
    other."""
    import torch

    both = (torch.float32, torch.bfloat16)
    if args.dry:
        cells = [(2, 300, "peaked", both[0]), (3, 200, "flat", both[1])]
    elif args.quick:
        cells = [(8, 151_936, "peaked", both[0]), (128, 151_936, "peaked", both[0])]
    else:
        cells = [
            (B, 151_936, kind, both[0]) for kind in ("peaked", "flat") for B in (128, 8, 1, 512)
        ]
        cells += [(B, REAL, "real", d) for B in BATCHES for d in both]
        cells += [
            (B, V, kind, d)
            for d in both
            for V in SIZES
            for kind in ("peaked", "flat")
            for B in BATCHES
        ]
    return [(label, *c) for c in dict.fromkeys(cells) for label in SETTINGS]


def code():
    "What the figures depend on: a hash of the kernels and of this script."
    modules = [ROOT / "decoding_book" / name for name in ("kernels.py", "cuda.py")]
    files = [*modules, Path(__file__)]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def resumed(path, here):
    "What an earlier run on the same machine, with the same code, has left."
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = [n for n in here if n != "date"]
    return (
        old
        if old.get("code") == code() and all(old["machine"].get(n) == here[n] for n in same)
        else {}
    )


def verdict(cells):
    """The goals: at most three reads for large batches, 15 µs for small ones, ahead of FlashInfer.
    Where they are missed."""
    out = {"over three reads": [], "over 15 us": [], "FlashInfer is ahead": [], "cells": len(cells)}
    for c in cells:
        us, name = c["us"], "{filters}, {rows}, B={B}, V={V}, {dtype}".format(**c)
        book, read = us.get("book (graph)"), us.get("read (graph)")
        if book is None:
            continue
        goal = c["V"] == 151_936
        if goal and c["B"] >= 128 and read and book > 3 * read:
            out["over three reads"].append(f"{name}: {book / read:.1f}")
        if goal and c["B"] <= 8 and book > 15:
            out["over 15 us"].append(f"{name}: {book:.1f}")
        peer = us.get("flashinfer (graph)", us.get("flashinfer (plain)"))
        if peer and book > peer:
            out["FlashInfer is ahead"].append(f"{name}: {book:.1f} against {peer:.1f}")
    return out


# ---------------------------------------------------------------- tests and sanitizer

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def small():
    """Every kernel, dtype and path once, at small sizes, against the plain form: what the sanitizer
    watches."""
    import torch

    from decoding_book import cuda
    from decoding_book.noise import Key
    from decoding_book.sampler import Sampler, draw

    generator, seen = torch.Generator().manual_seed(1), 0
    for V, dtype in ((7, torch.float32), (1000, torch.bfloat16), (5003, torch.float16)):
        z = (3 * torch.randn(3, V, generator=generator)).to(dtype)
        for settings in [*SETTINGS.values(), dict(top_k=600), dict(min_p=0.1)]:
            plain = draw(z, Sampler(**settings), Key(1), "plain").ids
            asked = cuda.ask(3, "cuda", **settings, key=Key(1))
            for more in (
                dict(slices=1),
                dict(slices=2),
                dict(slices=1, slots=32),
                dict(slices=1, task=1),
            ):
                assert cuda.launch(z.cuda(), asked, **more).ids.cpu().equal(plain), (
                    V,
                    settings,
                    more,
                )
                seen += 1
    cuda.measures(z.cuda())
    print(f"{seen} small draws, each the plain form's tokens")


def check_all():
    "The tests of the kernels, compiled; then each of compute-sanitizer's tools on `small`."
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    failed = []

    def go(name, limit, command, **more):
        start = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env | more, timeout=limit, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            done = None
        said = (
            f"no end in {limit} s" if done is None else (done.stdout + done.stderr).strip()[-1500:]
        )
        if done is None or done.returncode:
            failed.append(name)
        verdict = "failed" if name in failed else "passed"
        print(f"--- {name}: {verdict}, {time.monotonic() - start:.0f} s\n{said}", flush=True)

    go("small", 100, [sys.executable, "-m", "benchmarks.cuda", "--small"])
    several = ["-n", "8"] if find_spec("xdist") else []  # they compile much
    go(
        "tests",
        240,
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/test_cuda.py",
            *several,
        ],
    )
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        print("compute-sanitizer is not on this machine: not run")
    else:
        for name in SANITIZERS:  # no cache of memory, so that a read past the end is one
            go(
                name,
                60,
                [
                    tool,
                    "--tool",
                    name,
                    "--error-exitcode",
                    "9",
                    sys.executable,
                    "-m",
                    "benchmarks.cuda",
                    "--small",
                ],
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def main():  # long: the command line, then every cell in turn
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, nothing recorded")
    parser.add_argument(
        "--dry", action="store_true", help="toy sizes, on any machine, nothing recorded"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="the tests on this GPU, and compute-sanitizer; no timing",
    )
    parser.add_argument(
        "--small", action="store_true", help="a small run of every kernel, no timing"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--minutes",
        type=float,
        default=9,
        help="stop after this long; the next run goes on from there",
    )
    parser.add_argument("--out", type=Path, default=HERE / "cuda.json")
    args = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))  # kept between commands
    start = time.monotonic()
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and not args.dry:
        print(
            "There is no GPU here, so nothing was measured and nothing was recorded "
            "(--dry tries the script itself at toy sizes)."
        )
        return
    if args.check:
        check_all()
    if args.small:
        return small()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    device, record = "cuda" if gpu else "cpu", not (args.dry or args.quick)
    old = resumed(args.out, machine()) if record else {}
    peers, missing = who_is_here(device)
    for name, why in missing.items():
        print(f"not here: {name}: {why}")
    checks = old.get("law") or {
        name: check(name, make, device, 100_000 if gpu else 8)
        for name, make in peers.items()
        if name != "read"
    }
    for name, found in checks.items():
        print(json.dumps({name: found}), flush=True)
    wrong = [
        n for n, c in checks.items() if any(isinstance(v, float) and v < 1e-4 for v in c.values())
    ]
    if wrong:
        print("the law is wrong for:", ", ".join(wrong))
    cells, left = old.get("cells", []), []
    done = {(c["filters"], c["B"], c["V"], c["rows"], c["dtype"]) for c in cells}
    real = None
    for label, B, V, kind, dtype in plan(args):
        if (label, B, V, kind, str(dtype).removeprefix("torch.")) in done:
            continue
        if time.monotonic() - start > 60 * args.minutes:
            left.append(label)
            continue
        if kind == "real" and real is None:
            real = real_rows()
        rounds = 1 if args.dry else args.rounds
        cells.append(
            {"filters": label}
            | cell(peers, B, V, kind, dtype, SETTINGS[label], device, rounds, real)
        )
        print(json.dumps(cells[-1]), flush=True)
        if gpu:
            torch.cuda.empty_cache()
        result = (
            {
                "machine": machine(),
                "code": code(),
                "settings": SETTINGS,
                "law": checks,
                "wrong law": wrong,
                "not here": missing,
                "goals": verdict(cells),
                "cells": cells,
            }
            if record
            else None
        )
        if record:
            write(args.out, result)
    print(json.dumps(verdict(cells), indent=1))
    if args.dry:
        print("dry run: the times above are of an interpreter at toy sizes and mean nothing")
    elif record:
        print(
            f"{len(cells)} cells in {args.out}, {len(left)} left: run the same command again"
            if left
            else f"all {len(cells)} cells in {args.out}"
        )


if __name__ == "__main__":
    main()
