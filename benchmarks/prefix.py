"""Time to the first token behind a long prompt: read anew, and from a kept cache.

    python -m benchmarks.prefix                    500 tokens, float32 and 4 bits
    python -m benchmarks.prefix --quick            a short look, nothing recorded

Each repeat asks the same question three ways, in turns: without a cache, with the prompt kept by
`PromptCache`, and for four questions at once with it. Time runs from the call to the first step.
"""

import json
import statistics
import time

from benchmarks.common import arguments, load, save

INSTRUCTION = "You are a clerk in a small museum. Answer in one sentence, and be kind. "
QUESTION = "The oldest thing that we show here is"


def first_step(model, prompt, **options):
    "Seconds until the first step, and the step."
    from decoding_book.loop import stream

    start = time.perf_counter()
    step = next(stream(model, prompt, max_new_tokens=16, **options))
    return time.perf_counter() - start, step


def tokens_and_difference(model, prompt, kept, n):
    "Whether the tokens are equal, and the largest difference of their log-probabilities."
    from decoding_book.loop import generate

    options = dict(max_new_tokens=n, ignore_eos=True)
    one, other = generate(model, prompt, **options), generate(model, prompt, cache=kept, **options)
    return one.ids.equal(other.ids), (one.logprobs - other.logprobs).abs().max().item()


def logit_difference(model, prompt, kept):
    "The largest difference of the first logits, read anew and from the kept cache."
    from decoding_book.loop import as_prompts, first_cache

    prompts, _ = as_prompts(model, prompt)
    cache, held = first_cache(model, prompts, 1, len(prompts[0]), kept)
    anew, ours = model(prompts[0][None]), model(prompts[0][None, held:], cache=cache)
    return (anew.logits - ours.logits).abs().max().item(), held


def measure(form, tokens, repeats):
    "One form of the weights."
    from decoding_book.loop import PromptCache
    from decoding_book.smollm import SmolLM2

    model = SmolLM2(weights=form)
    ids = model.encode(INSTRUCTION * (tokens // 10))[:tokens]
    asked = ids + model.encode(" " + QUESTION)
    kept = PromptCache(model, ids)
    rows = {"anew": ([asked], {}), "kept": ([asked], {"cache": kept})}
    rows["kept, 4 rows"] = ([asked] * 4, {"cache": kept})
    seconds = {name: [] for name in rows}
    for repeat in range(repeats + 1):  # the first round only warms up
        for name, (prompt, options) in rows.items():
            spent, _ = first_step(model, prompt, **options)
            if repeat:
                seconds[name].append(spent)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    logits, held = logit_difference(model, asked, kept)
    equal, difference = tokens_and_difference(model, asked, kept, 16)
    return {
        "form": form,
        "prefix": len(ids),
        "held": held,
        "prompt": len(asked),
        "repeats": repeats,
        **{f"seconds, {name}": round(s, 4) for name, s in median.items()},
        "times shorter": round(median["anew"] / median["kept"], 1),
        "largest logit difference": logits,
        "16 tokens equal": equal,
        "largest log-probability difference": difference,
        "load_average": load(),
    }


def main():
    args = arguments(
        __doc__, "prefix.json", dict(tokens=500, repeats=3), dict(tokens=60, repeats=1)
    )
    rows = []
    for form in ("q4", "float32"):
        rows.append(measure(form, args.tokens, args.repeats))
        print(json.dumps(rows[-1]), flush=True)
    if not args.quick:
        save(args.out, rows=rows)


if __name__ == "__main__":
    main()
