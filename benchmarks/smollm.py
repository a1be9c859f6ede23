"""Greedy tokens a second: this book's SmolLM2 against transformers, on the same weights.

    python -m benchmarks.smollm                    two threads, batches of 1 and 8, both dtypes
    python -m benchmarks.smollm --quick            a short look, nothing recorded

Both models run in one process, in turns, so that a busy machine slows both. transformers runs as
its users run it: `model.generate`, greedy, with its cache, in inference mode. Both make exactly the
same number of tokens: the end mark is off.
"""

import json
import statistics
import time

from benchmarks.common import PROMPT, arguments, load, reference_weights, save, transformers_peer


def run_ours(model, ids, n):
    "Greedy decoding with the cache; seconds, and the ids."
    import torch

    start = time.perf_counter()
    cache, new, out = model.new_cache(len(ids), ids.shape[1] + n), ids, []
    for _ in range(n):
        new = model(new, cache=cache).logits.argmax(-1, keepdim=True)
        out.append(new)
    return time.perf_counter() - start, torch.cat(out, 1)


def run_loop(model, ids, n):
    "The same through the book's `generate`, with all that it records."
    import torch

    from decoding_book.loop import generate

    start = time.perf_counter()
    out = generate(model, ids, max_new_tokens=n, ignore_eos=True)
    return time.perf_counter() - start, torch.stack(out.ids)


def run_transformers(model, ids, n):
    "transformers' own `generate`, greedy."
    import torch

    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            do_sample=False,
            use_cache=True,
        )
    return time.perf_counter() - start, out[:, ids.shape[1] :]


def compare(dtype, batch, tokens, repeats, weights):
    "Medians in tokens a second, and the median of the ratios of neighbouring runs."
    import torch

    from decoding_book.smollm import SmolLM2

    ours, peer = SmolLM2(dtype=dtype), transformers_peer(weights, dtype)
    ids = torch.tensor([ours.encode(PROMPT)] * batch)
    runs = {
        "model": (run_ours, ours),
        "generate": (run_loop, ours),
        "transformers": (run_transformers, peer),
    }
    speed = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first round only warms up
        for name, (run, model) in runs.items():
            seconds, out = run(model, ids, tokens)
            assert out.shape == (batch, tokens), (name, out.shape)
            if repeat:
                speed[name].append(batch * tokens / seconds)
    row = {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "tokens": tokens,
        "repeats": repeats,
    }
    row |= {
        f"{name}_tokens_per_second": round(statistics.median(s), 1) for name, s in speed.items()
    }
    for name in ("model", "generate"):
        ratios = [a / b for a, b in zip(speed[name], speed["transformers"])]
        row[f"{name}_ratio"] = round(statistics.median(ratios), 2)
        row[f"{name}_ratio_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    row["load_average"] = load()
    return row


def main():
    import torch

    from decoding_book.smollm import weights_path

    args = arguments(__doc__, "smollm.json", dict(tokens=64, repeats=7), dict(tokens=16, repeats=1))
    weights, _ = reference_weights(weights_path())
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 8):
            rows.append(compare(dtype, batch, args.tokens, args.repeats, weights))
            print(json.dumps(rows[-1]), flush=True)
    if not args.quick:
        save(args.out, prompt=PROMPT, rows=rows)


if __name__ == "__main__":
    main()
