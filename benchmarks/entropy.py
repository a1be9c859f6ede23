"""What do the measures and the policy cost, as a share of a SmolLM2 step?

    python -m benchmarks.entropy            a minute; chapters 15 and 16 quote the result
    python -m benchmarks.entropy --quick    a short look, nothing recorded

A step is one token for each row after 128 tokens of context, with the cache, float32, greedy. The
parts are timed one after the other in every round; each figure is a median. `attention` is what it
costs the model to hand out its scores.
"""

import json
import statistics
import time

from benchmarks.common import PROMPT, arguments, save

CONTEXT = 128


def timed(work):
    "Milliseconds, and the result."
    start = time.perf_counter()
    result = work()
    return 1000 * (time.perf_counter() - start), result


def one_round(model, new, cache, attention_first):
    "Milliseconds of each part of a step, by name."
    from decoding_book.entropix import EntropySampler
    from decoding_book.entropy import attention_measures, measure, measures

    policy, parts = EntropySampler(), {}
    for attention in (attention_first, not attention_first):
        cache.length = CONTEXT
        name = "step with attention" if attention else "step"
        parts[name], found = timed(lambda: model(new, cache=cache, attention=attention))
        if attention:
            p = found
    keys = p.key_mask[:, None]
    parts["logit measures"], _ = timed(lambda: measures(p.logits))
    parts["attention measures"], _ = timed(lambda: attention_measures(p.attention, keys))
    parts["measures"], found = timed(lambda: measure(p))
    parts["policy"], _ = timed(lambda: policy.decide(found))
    return parts


def compare(model, batch, rounds):
    "Medians in milliseconds for one batch size, and shares of a step."
    import torch

    ids = torch.tensor([(model.encode(PROMPT) * 9)[:CONTEXT]] * batch)
    cache = model.new_cache(batch, CONTEXT + 1)
    model(ids, cache=cache)
    found = {}
    for round in range(rounds + 2):  # two rounds to warm up
        # in turns: who is first has a colder cache
        parts = one_round(model, ids[:, :1], cache, attention_first=round % 2 == 0)
        if round >= 2:
            for name, ms in parts.items():
                found.setdefault(name, []).append(ms)
    ms = {name: round_(statistics.median(x)) for name, x in found.items()}
    cost = ms["measures"] + ms["policy"]
    extra = statistics.median(b - a for a, b in zip(found["step"], found["step with attention"]))
    return {
        "batch": batch,
        "context": CONTEXT,
        "rounds": rounds,
        "ms": ms,
        "attention_ms": round_(extra),
        "share": round_(cost / ms["step"]),
        "share_with_attention": round_((cost + max(extra, 0)) / ms["step"]),
    }


def round_(x):
    return float(f"{x:.3g}")


def main():
    import torch

    from decoding_book.smollm import SmolLM2

    args = arguments(__doc__, "entropy.json", dict(rounds=150), dict(rounds=5))
    model, rows = SmolLM2(), []
    with torch.inference_mode():
        for batch in (1, 8):
            rows.append(compare(model, batch, args.rounds))
    print(json.dumps(rows, indent=1))
    if not args.quick:
        save(args.out, rows=rows)


if __name__ == "__main__":
    main()
