"""Does any of the other cuts beat a well-set top-p? All at the same mean entropy of their laws.

    python -m benchmarks.cuts            ten minutes of one core; chapter 12 quotes it
    python -m benchmarks.cuts --quick    a short look, nothing recorded

The model is SmolLM2 in float32, at temperature 1 but for the arms that are temperatures.

1. `match`: 240 rows along the model's own text (T = 1, after 24 openings of curse.py). The laws of
   top-p .9 have some mean entropy on them; each rival gets the setting that gives the same to 1 %.
2. `read`: a text that the model did not write, this book's own prose. The share of its tokens that
   each rule leaves possible, at those settings. No randomness.
3. `text`: openings of audit.py, each continued by every arm with one seed and one noise. For each:
   entropy of the laws, log-probability under the model, repetition. Differences to top-p are taken
   opening by opening, with a bootstrap interval of 95 %.
"""

import json
import math

from benchmarks.audit import PROMPTS, mean, repeated
from benchmarks.common import ROOT, arguments, save
from benchmarks.curse import OPENINGS

TOP_P = 0.9
XTC = dict(xtc_probability=0.5, xtc_threshold=0.1)
ARMS = {  # the parameter that is matched, from a number that rises with the entropy; bounds of it
    "temperature": (lambda x: dict(temperature=x), 0.2, 1.0),
    "min-p": (lambda x: dict(min_p=1 / x), 2.0, 3000.0),
    "typical": (lambda x: dict(typical_p=x), 0.3, 0.999),
    "epsilon": (lambda x: dict(epsilon_cutoff=1 / x), 10.0, 1e5),
    "eta": (lambda x: dict(eta_cutoff=1 / x), 2.0, 1e5),
    "top-n-sigma": (lambda x: dict(top_n_sigma=x), 0.2, 8.0),
    "tail-free": (lambda x: dict(tail_free=1 - 1 / x), 1.5, 1e4),
    "dynamic": (lambda x: dict(temperature=x, dynatemp_range=x / 2), 0.2, 2.0),
    "XTC, min-p": (lambda x: dict(min_p=1 / x, **XTC), 1.2, 3000.0),
}


def mean_bits(rows, params):
    "The mean entropy of the laws that a sampler makes of some rows."
    from decoding_book.entropy import entropy
    from decoding_book.sampler import Sampler, truncate

    sampler = Sampler(**params)
    return mean([x for z in rows.split(40) for x in entropy(truncate(z, sampler)).tolist()])


def own_rows(model, openings, tokens):
    "Rows of logits along the model's own text at T = 1, (n, V)."
    import torch

    from decoding_book.loop import generate
    from decoding_book.sampler import Sampler

    texts = generate(model, openings, Sampler(seed=1), tokens, ignore_eos=True, alternatives=0)
    rows = []
    for given, new in zip(texts.prompt_ids, texts.ids):
        z = model(torch.cat([given, new])[None], last_only=False).logits[0]
        rows.append(z[len(given) - 1 :: max(1, tokens // 10)][:10])
    return torch.cat(rows)


def match(rows):
    "The settings of all arms, at the entropy of top-p."
    found = {"top-p": dict(top_p=TOP_P)}
    bits = {"top-p": mean_bits(rows, found["top-p"])}
    for name, (of, low, high) in ARMS.items():
        for _ in range(14):  # halve the interval of its logarithm
            at = math.sqrt(low * high)
            found[name], bits[name] = of(at), mean_bits(rows, of(at))
            if abs(bits[name] / bits["top-p"] - 1) < 0.01:
                break
            low, high = (at, high) if bits[name] < bits["top-p"] else (low, at)
    return found, bits


def prose(model, tokens):
    "Paragraphs of this book's prose, as ids."
    texts = []
    for path in sorted((ROOT / "nbs").glob("0*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if (
                cell["cell_type"] == "markdown"
                and len(text) > 300
                and not set("$|#`*[") & set(text)
            ):
                texts.append(model.encode(text)[:120])
    while sum(map(len, texts)) > tokens:
        texts.pop()
    return texts


def read(model, settings, tokens):
    "For each arm and token of the prose: did it stay possible?"
    import torch

    from decoding_book.sampler import Sampler, truncate

    stayed = {name: [] for name in settings}
    for ids in prose(model, tokens):
        ids = torch.tensor(ids)
        z = model(ids[None], last_only=False).logits[0, :-1]
        for name, params in settings.items():
            if "temperature" in params:
                continue  # removes nothing
            left = truncate(z, Sampler(**params)).isfinite()
            stayed[name] += left.gather(1, ids[1:, None])[:, 0].tolist()
    return {name: x for name, x in stayed.items() if x}


class Watch:
    "A chooser that also notes the entropy of the law it draws from."

    def __init__(self, choose):
        self.choose = choose

    def __call__(self, prediction, context):
        from decoding_book.cuts import max_surprisal
        from decoding_book.entropy import entropy
        from decoding_book.sampler import Sampler, truncate

        if isinstance(self.choose, Sampler):
            z = truncate(prediction.logits, self.choose)
        else:
            z = max_surprisal(prediction.logits, self.choose.limit(context))
        out = self.choose(prediction, context)
        out.bits = entropy(z)
        return out


def write(model, choose, prompts, tokens):
    "What each opening became: entropy, log-probability, repetition."
    from decoding_book.loop import generate

    g = generate(model, prompts, Watch(choose), tokens, ignore_eos=True, alternatives=0)
    bits = g.by_row(lambda s, j: s.draw.bits[j].item())
    return {
        "bits": [mean(x) for x in bits],
        "logprob": [x.mean().item() for x in g.logprobs],
        "rep-2": [repeated(x.tolist(), 2) for x in g.ids],
        "different": [len(set(x.tolist())) / len(x) for x in g.ids],
    }


def interval(values, repeats=4000):
    "The mean and its bootstrap interval."
    import torch

    x = torch.tensor(values, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    picks = torch.randint(len(x), (repeats, len(x)), generator=rng)
    low, high = x[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [round(v, 4) for v in (x.mean().item(), low.item(), high.item())]


def against(found, base="top-p"):
    "Differences to top-p, pair by pair, with their intervals."
    return {
        name: {
            what: interval([a - b for a, b in zip(x, found[base][what])]) for what, x in arm.items()
        }
        for name, arm in found.items()
        if name != base
    }


def figures(params):
    return {k: float(f"{v:.4g}") for k, v in params.items()}


def main():
    import torch

    from decoding_book.sampler import Mirostat, Sampler
    from decoding_book.smollm import SmolLM2

    usual = dict(openings=24, tokens=36, prompts=52, prose=1500)
    quick = dict(openings=4, tokens=12, prompts=4, prose=200)
    args = arguments(__doc__, "cuts.json", usual, quick)
    model, prompts = SmolLM2(), PROMPTS[: args.prompts]
    with torch.inference_mode():
        settings, bits = match(own_rows(model, OPENINGS[: args.openings], 20))
        settings = {name: figures(params) for name, params in settings.items()}
        print(json.dumps({n: [settings[n], round(bits[n], 3)] for n in settings}, indent=1))
        stayed = read(model, settings, args.prose)
        texts = {}
        for name, params in settings.items():
            texts[name] = write(model, Sampler(seed=1, **params), prompts, args.tokens)
            print(name, {k: round(mean(v), 3) for k, v in texts[name].items()}, flush=True)
        target = -mean(texts["top-p"]["logprob"]) / math.log(2)
        texts["mirostat"] = write(
            model, Mirostat(target, 0.1, Sampler(seed=1)), prompts, args.tokens
        )
    result = {
        "settings": settings | {"mirostat": {"target": round(target, 3), "rate": 0.1}},
        "match": {name: round(x, 4) for name, x in bits.items()},
        "read": {name: round(mean(x), 4) for name, x in stayed.items()},
        "read_tokens": len(stayed["top-p"]),
        "read_against": {
            n: interval([a - b for a, b in zip(x, stayed["top-p"])])
            for n, x in stayed.items()
            if n != "top-p"
        },
        "prompts": len(prompts),
        "tokens": args.tokens,
        "texts": {
            name: {k: round(mean(v), 4) for k, v in arm.items()} for name, arm in texts.items()
        },
        "against": against(texts),
    }
    print(json.dumps(result, indent=1))
    if not args.quick:
        save(args.out, **result)


if __name__ == "__main__":
    main()
