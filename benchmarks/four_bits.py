"""Tokens a second of every form of SmolLM2's weights: this book, transformers, and llama.cpp where
its Python wheel is there.

    python -m benchmarks.four_bits              one thread and two; batches, beams, a long prompt
    python -m benchmarks.four_bits --quick      a short look, nothing recorded
    python -m benchmarks.four_bits --load       only: seconds and memory of loading, a fresh process
    python -m benchmarks.four_bits --only "batch 16"      the other rows stay as recorded

All forms run in one process, in turns, greedy, with the end mark off, from the same prompt. Each is
run as its users run it: `generate` here, `model.generate` of transformers, `eval` and the largest
logit in llama.cpp, on the same file. A form's medians and the medians of ratios of one round are
kept.
"""

import json
import statistics
import subprocess
import sys
import time

from benchmarks.common import (
    PROMPT,
    arguments,
    load,
    reference_weights,
    save,
    transformers_peer,
)
from benchmarks.smollm import run_loop, run_ours, run_transformers

LOADING = """
import resource, sys, time
import numpy, torch, numba
from decoding_book import four_bits, smollm
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
before, start = resident(), time.perf_counter()
model = smollm.SmolLM2(weights=sys.argv[1])
seconds = time.perf_counter() - start
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(seconds, resident() - before, most - before)
"""


def loading(form):
    "Seconds and megabytes, after the libraries are imported, of a fresh process."
    done = subprocess.run(
        [sys.executable, "-c", LOADING, form], capture_output=True, text=True, check=True
    )
    seconds, kept, most = map(float, done.stdout.split())
    return {"seconds": round(seconds, 2), "megabytes": round(kept), "most": round(most)}


def llama(threads, rows):
    "llama.cpp's greedy loop over the file, or None where the wheel is not installed."
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    from decoding_book.smollm import weights_path

    if rows > 1:
        return None
    model = Llama(
        str(weights_path()),
        n_ctx=1024,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=False,
        verbose=False,
    )

    def run(_, ids, n):
        import numpy as np

        start = time.perf_counter()
        model.reset()
        model.eval(ids[0].tolist())
        for i in range(n):
            logits = np.ctypeslib.as_array(model._ctx.get_logits(), (49152,))
            best = int(logits.argmax())
            if i < n - 1:
                model.eval([best])
        return time.perf_counter() - start, None

    return run


def run_beam(model, ids, n):
    "Four beams, here."
    from decoding_book.beam import beam_search

    start = time.perf_counter()
    beam_search(model, ids, 4, n)
    return time.perf_counter() - start, None


def run_beam_transformers(model, ids, n):
    "Four beams, in transformers."
    import torch

    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            num_beams=4,
            do_sample=False,
        )
    return time.perf_counter() - start, None


def entrants(models, peers, what, threads, rows):
    "Name -> (a way to run, a model)."
    here, there = (run_beam, run_beam_transformers) if what == "beam 4" else (run_loop, None)
    there = there or run_transformers
    found = {name: (here, model) for name, model in models.items()}
    found |= {f"transformers {name}": (there, peer) for name, peer in peers.items()}
    if what != "beam 4":
        found["q4, the model alone"] = (run_ours, models["q4"])
        if run := llama(threads, rows):
            found["llama.cpp"] = (run, None)
    return found


def compare(models, peers, what, ids, tokens, rounds, threads):
    "Tokens a second of each form, and its ratio to each peer."
    runs = entrants(models, peers, what, threads, len(ids))
    speed = {name: [] for name in runs}
    for turn in range(rounds + 1):  # the first only warms up
        for name, (run, model) in runs.items():
            seconds, _ = run(model, ids, tokens)
            if turn:
                speed[name].append(len(ids) * tokens / seconds)
    row = {"what": what, "threads": threads, "tokens": tokens, "rounds": rounds}
    row["tokens_per_second"] = {n: round(statistics.median(s), 1) for n, s in speed.items()}
    row["ratios"] = {
        f"{ours} to {theirs}": round(
            statistics.median(a / b for a, b in zip(speed[ours], speed[theirs])), 2
        )
        for ours in models
        for theirs in speed
        if theirs.startswith(("transformers", "llama"))
    }
    row["load_average"] = load()
    print(json.dumps(row), flush=True)
    return row


def step_of(model):
    "What the compiled step of one row reads and writes, after 63 positions."
    import numpy as np

    from decoding_book import four_bits as F

    one, cache = model.weights.one_position, model.new_cache(1, 64)
    desk, turn = one.desk(1, 64, 1), np.ones((1, one.sizes.size // 2, 2), np.float32)
    desk.x[:] = 0.1
    for array, value in zip(desk.inputs, (1, 32, 0.1, 0.1)):
        array[:] = value
    past = F.Past(cache.keys.numpy(), cache.values.numpy(), np.ones((1, 64), bool), turn)
    return one, cache, past, desk, F.Team(0, 1, np.zeros(1, np.int64))


def products(one, desk, team):
    "Every matrix of every layer, once."
    from decoding_book import four_bits as F

    w = one.layers
    for n in range(len(w.attn_norm)):
        for m, out in ((w.qkv, desk.qkv), (w.out, desk.x), (w.up, desk.both), (w.down, desk.x)):
            tiles = out.reshape(1, -1, F.LANES)
            F.add_product(F.part_of(m, n), desk.inputs, tiles, team)


def step_parts(model, rounds=200):
    "Microseconds of one step's parts, one thread, each measured alone."
    import torch

    from decoding_book import four_bits as F

    torch.set_num_threads(1)
    one, cache, past, desk, team = step_of(model)
    logits = desk.logits.reshape(1, -1, F.LANES)

    def step():
        team.counter[:] = 0
        F.run_step(one.layers, one.head, one.sizes, past, desk, team)

    def call():
        cache.length = 63
        model(torch.tensor([[5]]), cache=cache)

    parts = {
        "products": lambda: products(one, desk, team),
        "head": lambda: F.add_product(one.head.matrix, desk.inputs, logits, team),
        "step": step,
        "call": call,
    }
    times = {name: median_microseconds(part, rounds) for name, part in parts.items()}
    print(json.dumps(times), flush=True)
    return times


def median_microseconds(f, rounds):
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        f()
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken[1:]) * 1e6)


def command_line():
    "--load and --only, and what all benchmarks know."
    words, only = [a for a in sys.argv if a != "--load"], None
    loading_only = len(words) < len(sys.argv)
    if "--only" in words:
        place = words.index("--only")
        only = words[place + 1]
        del words[place : place + 2]
    sys.argv = words
    usual, quick = dict(tokens=32, rounds=5, batch=16), dict(tokens=12, rounds=1, batch=4)
    return arguments(__doc__, "four_bits.json", usual, quick), loading_only, only


def settings(model, args):
    "(what, ids, tokens) of each row."
    import torch

    one = torch.tensor([model.encode(PROMPT)])
    long = one.repeat(1, 512 // one.shape[1] + 1)[:, :512]
    return (
        ("batch 1", one, args.tokens),
        ("batch 4", one.repeat(4, 1), args.tokens // 2),
        (f"batch {args.batch}", one.repeat(args.batch, 1), args.tokens),
        ("beam 4", one, args.tokens // 2),
        ("a prompt of 512", long, 1),
    )


def main():
    import torch

    from decoding_book.smollm import SmolLM2, weights_path

    args, loading_only, only = command_line()
    loads = {form: loading(form) for form in ("q4", "bfloat16", "float32")}
    print(json.dumps(loads), flush=True)
    if loading_only:
        return
    weights, _ = reference_weights(weights_path())
    models = {name: SmolLM2(weights=name) for name in ("q4", "float32", "bfloat16")}
    loops = dict(models)
    models |= {"plain float32": SmolLM2(), "plain bfloat16": SmolLM2(torch.bfloat16)}
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    peers = {name: transformers_peer(weights, kind) for name, kind in kinds.items()}
    parts, rows = {name: step_parts(model) for name, model in loops.items()}, []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for what, ids, n in settings(models["q4"], args):
            if only in (None, what):
                rows.append(compare(models, peers, what, ids, n, args.rounds, threads))
    if only:
        kept = json.loads(args.out.read_text())
        rows += [row for row in kept["rows"] if row["what"] != only]
        loads, parts = kept["loading"], kept["step_microseconds"]
    if not args.quick:
        save(args.out, prompt=PROMPT, rows=rows, loading=loads, step_microseconds=parts)


if __name__ == "__main__":
    main()
