"""Is it worth choosing the sampler by entropy? The policy of chapter 16 against plain sampling.

    python -m benchmarks.audit                 all of it, an hour of one core
    python -m benchmarks.audit --minutes 3.5   as many pieces as fit; the next call goes on
    python -m benchmarks.audit --quick         a few prompts and items, nothing recorded

All arms are compared at the same mean entropy of their draws; chapter 16 draws the result. What is
done so far is kept in build/audit.json.

1. `calibrate`: the policy's thresholds, on the model's own text (T = 1) after the 40 openings of
   curse.py.
2. `match`: the temperature, the min-p and the top-p whose draws have the policy's mean entropy, on
   those same openings for texts, and for each task on items of their own.
3. `text`: 104 other openings, four seeds, each arm: repetition, distinct n-grams, likelihood,
   entropy of draws, branches.
4. `task`: three tasks of 200 items each, two seeds, each arm, plain samplers also with the settings
   matched on texts: is the answer right?

Every prompt and item is paired over the arms; what several seeds gave for it is averaged; intervals
are bootstrapped over prompts and items. The first seed is done first; from then on each call
records what there is, and how many seeds each arm has.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

from benchmarks.common import HERE, ROOT, machine, write
from benchmarks.curse import OPENINGS

PROMPTS = """The old bridge across the river was
Every morning before work, she
The first thing you notice about the town is
A good recipe for pancakes starts with
The children had never been told that
When the lights went out, everyone
The purpose of a library is
Many people are afraid of
The captain of the small boat said
In the last hundred years, farming has
The oldest tree in the park
My brother and I used to
The difference between a frog and a toad is
To repair a broken chair, first
The moon was so bright that
Scientists who study whales have found
The letter arrived three weeks late because
A healthy breakfast should include
The king had three daughters, and
Learning to play the violin takes
The shop at the corner sells
When water freezes, it
The committee decided that the school
On her way home, Anna met
The most common mistake when painting a room is
There are many reasons why cities grow
The dog stopped at the door and
After the storm had passed, the harbour
The invention of the printing press
If you ever visit the coast, you should
His first job was in a factory that
The soup tasted strange, so
Volcanoes are formed when
The teacher wrote a sentence on the board:
Nobody knew who had painted
The train to the north leaves
The best time to plant a tree
A long time ago, in a village by the sea,
The main advantage of solar power is
She opened the drawer and found
The doctor asked him whether
In winter the lake freezes and
The new museum has a room full of
Before you buy a used car, check
The story begins on a rainy evening when
Bees are important because
The mayor promised the people that
To write a good story, you need
The desert is not empty; it
The clock in the tower had stopped
Most birds build their nests
The two sisters did not agree about
The ship carried a cargo of
A computer program is a list of
The farmer looked at the sky and
During the war, many families
The secret of good bread is
The boy who lived next door
Rivers change the land by
The concert was cancelled because
In the garden behind the house
The police found no sign of
The human heart beats
Her grandfather had built the house with
The road through the mountains is
An honest answer would be that
The cat watched the snow fall and
The theory of evolution explains
The market opens at six, and by then
He could not remember where
A map is useful only if
The island has been uninhabited since
The judge listened carefully and then
Good friends are people who
The library was closed, so they
The festival takes place every year in
The smallest planet in the solar system
When I was ten years old, my family
The old woman at the window smiled because
Plastic waste in the oceans
The winner of the race was
The book on the table belonged to
The earth turns around the sun, and
The company was founded by two
A storm at sea is
The guide told the visitors not to
The history of chess goes back to
The bus was full, but
The experiment failed because
The language of the island people
At midnight the bells began to
The apples in this region are
The most difficult part of climbing is
The young doctor had just
The bicycle was invented in
The forest fire began when
Their first house was so small that
The report says that the number of
Coffee is grown in
The actor forgot his lines and
The stars are visible only when
The window was open, and
The soldiers had been waiting for
The price of a stamp""".splitlines()

CAPITALS = """
France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna
Switzerland:Bern Belgium:Brussels Netherlands:Amsterdam Denmark:Copenhagen Norway:Oslo
Sweden:Stockholm Finland:Helsinki Iceland:Reykjavik Ireland:Dublin Poland:Warsaw
Hungary:Budapest Romania:Bucharest Bulgaria:Sofia Greece:Athens Turkey:Ankara Russia:Moscow
Ukraine:Kyiv Belarus:Minsk Lithuania:Vilnius Latvia:Riga Estonia:Tallinn Croatia:Zagreb
Serbia:Belgrade Slovenia:Ljubljana Slovakia:Bratislava Albania:Tirana Malta:Valletta
Cyprus:Nicosia Georgia:Tbilisi Armenia:Yerevan Azerbaijan:Baku Iran:Tehran Iraq:Baghdad
Syria:Damascus Lebanon:Beirut Jordan:Amman Israel:Jerusalem Qatar:Doha Oman:Muscat Yemen:Sanaa
Kuwait:Kuwait_City Egypt:Cairo Libya:Tripoli Tunisia:Tunis Algeria:Algiers Morocco:Rabat
Sudan:Khartoum Ethiopia:Addis_Ababa Kenya:Nairobi Uganda:Kampala Rwanda:Kigali Tanzania:Dodoma
Zambia:Lusaka Zimbabwe:Harare Angola:Luanda Namibia:Windhoek Botswana:Gaborone Mozambique:Maputo
Madagascar:Antananarivo Ghana:Accra Nigeria:Abuja Senegal:Dakar Mali:Bamako Niger:Niamey
Chad:N'Djamena Cameroon:Yaounde Gabon:Libreville Somalia:Mogadishu Eritrea:Asmara
Liberia:Monrovia China:Beijing Japan:Tokyo Mongolia:Ulaanbaatar Thailand:Bangkok Vietnam:Hanoi
Laos:Vientiane Cambodia:Phnom_Penh Malaysia:Kuala_Lumpur Indonesia:Jakarta Philippines:Manila
India:New_Delhi Pakistan:Islamabad Bangladesh:Dhaka Nepal:Kathmandu Bhutan:Thimphu
Afghanistan:Kabul Uzbekistan:Tashkent Kazakhstan:Astana Canada:Ottawa Mexico:Mexico_City
Cuba:Havana Jamaica:Kingston Haiti:Port-au-Prince Guatemala:Guatemala_City Honduras:Tegucigalpa
Nicaragua:Managua Panama:Panama_City Colombia:Bogota Venezuela:Caracas Ecuador:Quito Peru:Lima
Bolivia:La_Paz Chile:Santiago Argentina:Buenos_Aires Uruguay:Montevideo Paraguay:Asuncion
Brazil:Brasilia Australia:Canberra Fiji:Suva Bahrain:Manama Turkmenistan:Ashgabat
Kyrgyzstan:Bishkek Tajikistan:Dushanbe Moldova:Chisinau Montenegro:Podgorica
""".split()
CAPITALS = dict(line.split(":") for line in CAPITALS)

SEEDS, TOKENS, CLARIFY = (1, 2, 3, 4), 48, "..."
OFF = {f"no {name}": name for name in ("LELV", "HELV", "LEHV", "HEHV", "adaptive")}
ARMS = [
    "policy",
    "temperature",
    "min-p",
    "top-p",
    "published",
    "temperature, published",
    "no attention",
    "no clarify",
    "draw once",
    *OFF,
]


TASKS = ("sum", "copy", "capital")
MORE = [
    ("text", ARMS, 2),
    ("task", TASKS, 2),
    ("text", ARMS, 3),
    ("text", ARMS, 4),
]  # after the first seed
CARRIED = {
    f"{arm}, as in texts": arm
    for arm in ("temperature", "min-p", "top-p", "temperature, published")
}  # for tasks


def all_items(task):
    "Every item of a task: question, answer; in an order that depends on nothing."
    rng = random.Random(task)
    if task == "sum":
        items = [(f"{a} + {b} =", f"{a + b}") for a in range(10, 50) for b in range(2, 10)]
    elif task == "copy":
        items = [
            (" ".join(w) + " ->", " ".join(w))
            for w in ([rng.choice("bcdfghklmnprstvwz") for _ in range(7)] for _ in range(300))
        ]
    else:
        pairs = [(a, b.replace("_", " ")) for a, b in CAPITALS.items()]
        items = [(f"The capital of {a} is", b) for a, b in pairs]
        items += [(f"{b} is the capital of", a) for a, b in pairs]
    rng.shuffle(items)
    return items


def task_items(task):
    "Five examples for the prompt, 30 items to calibrate on, the rest to measure."
    items = all_items(task)
    examples = "".join(f"{q} {a}\n" for q, a in items[:5])
    ask = [(examples + q, a) for q, a in items[5:]]
    return ask[:30], ask[30:]


def draw_short(logits, params, key):
    """The draw when no more than 128 tokens can survive: filter and noise for the 128 best only.
    The same tokens as `plain`."""
    import torch

    from decoding_book.loop import Draw
    from decoding_book.noise import gumbel_of, hash_bits
    from decoding_book.sampler import truncate

    z, ids = logits.topk(128)
    z = truncate(z, params)
    noise = gumbel_of(hash_bits(ids, *key.words(len(z), z.device)))
    at = (z - z.amax(-1, keepdim=True) + noise).argmax(-1, keepdim=True)
    return Draw(ids.gather(1, at)[:, 0], torch.zeros(len(z)), z.isfinite().sum(-1))


class Watch:
    "A chooser that also notes the entropy of the law it draws from."

    def __init__(self, choose):
        self.choose, self.attention = choose, getattr(choose, "attention", False)

    def __call__(self, prediction, context):
        from decoding_book.entropix import EntropySampler, law_of
        from decoding_book.entropy import entropy
        from decoding_book.loop import Draw
        from decoding_book.noise import Key, gumbel_max
        from decoding_book.sampler import truncate

        if isinstance(self.choose, EntropySampler):
            out, n = self.choose(prediction, context), self.choose.config.n_adaptive_samples
            law = law_of(
                prediction.logits.topk(128).values, out.decision, n, (0,)
            )  # the clarifying token: some sure token
            out.bits = entropy(law.log()).float()
            return out
        z = truncate(prediction.logits, self.choose)  # what `draw` does, without filtering twice
        out = Draw(gumbel_max(z, Key(self.choose.seed, context.row, context.lengths)))
        out.bits = entropy(z)
        return out


def chooser(arm, seed, settings, matched):
    """The chooser of an arm; `matched` holds the temperatures that give it the entropy of the
    policy."""
    from dataclasses import replace

    from decoding_book.entropix import EntropixConfig, EntropySampler, PublishedConfig
    from decoding_book.sampler import Sampler

    if arm == "temperature":
        return Sampler(temperature=matched["policy"]["temperature"], seed=seed)
    if arm == "temperature, published":
        return Sampler(temperature=matched["published"]["temperature"], seed=seed)
    if arm == "min-p":
        return Sampler(min_p=matched["policy"]["min_p"], seed=seed)
    if arm == "top-p":
        return Sampler(top_p=matched["policy"]["top_p"], seed=seed)
    clarify = None if arm == "no clarify" else settings["clarify_id"]
    if arm == "published":
        config = PublishedConfig()
    else:
        config = EntropixConfig(
            **settings["config"] | {"typical": tuple(settings["config"]["typical"])}
        )
    if arm == "draw once":
        config = replace(config, n_adaptive_samples=1)
    if arm in OFF:
        config = replace(config, off=(OFF[arm],))
    return EntropySampler(config, seed, clarify, attention=arm != "no attention", backend="short")


class Prefilled:
    "A model that has read its prompts already: many runs from one reading."

    def __init__(self, model, prompts, length):
        import torch

        from decoding_book.loop import left_pad

        self.model, self.vocab_size, self.eos, self.device = (
            model,
            model.vocab_size,
            model.eos,
            model.device,
        )
        self.encode, self.decode = model.encode, model.decode
        ids, mask = left_pad([torch.tensor(model.encode(p)) for p in prompts])
        self.width = ids.shape[1]
        self.cache = model.new_cache(len(ids), self.width + length)
        self.first = model(ids, mask=mask, cache=self.cache, attention=True)

    def new_cache(self, rows, length):
        import copy

        cache = copy.copy(self.cache)
        cache.keys, cache.values, cache.mask = (
            x.clone() for x in (cache.keys, cache.values, cache.mask)
        )
        return cache

    def __call__(self, ids, mask=None, cache=None, last_only=True, attention=False):
        from decoding_book.loop import Prediction

        if ids.shape[1] < self.width:
            return self.model(ids, mask, cache, last_only, attention)
        return Prediction(
            self.first.logits,
            cache,
            *(self.first.attention, self.first.key_mask) if attention else (None, None),
        )


def run(model, prompts, choose, tokens, stop=None):
    """One generation of all prompts: ids, texts, log-probabilities, entropies of the laws and
    branches, a list for each prompt."""
    from decoding_book.loop import generate

    g = generate(
        model, prompts, Watch(choose), tokens, stop=stop, ignore_eos=stop is None, alternatives=0
    )
    bits = g.by_row(lambda s, j: s.draw.bits[j].item())
    has = g.steps[0].draw.branch is not None
    branch = g.by_row(lambda s, j: s.draw.branch[j].item()) if has else [[] for _ in prompts]
    return dict(
        ids=[x.tolist() for x in g.ids],
        text=g.text,
        logprobs=[x.tolist() for x in g.logprobs],
        bits=bits,
        branch=branch,
    )


def mean(x):
    return sum(x) / len(x)


def flat(rows):
    return [x for row in rows for x in row]


def find_match(target, measure, low, high, steps=9):
    """The parameter (searched by its logarithm) at which `measure` gives `target` to 3 %, and what
    it gave. It must rise."""
    low, high, ends, tried = math.log(low), math.log(high), [None, None], []
    for step in range(steps):
        share = (
            0.5
            if None in ends or step % 2
            else min(max((target - ends[0]) / (ends[1] - ends[0]), 0.05), 0.95)
        )
        at = low + share * (high - low)
        value = measure(math.exp(at))
        tried.append((abs(value - target), math.exp(at), value))
        if abs(value - target) < 0.03 * target:
            break
        if value < target:
            low, ends[0] = at, value
        else:
            high, ends[1] = at, value
    return {"value": min(tried)[1], "bits": round(min(tried)[2], 4)}


def match(run_arm):
    """For the policy and the published form: parameters of plain samplers with the same mean
    entropy of draws."""
    from decoding_book.sampler import Sampler

    found = {}
    for arm in ("policy", "published"):
        target = mean(flat(run_arm(arm)["bits"]))

        def bits(**params):
            return mean(flat(run_arm(Sampler(seed=1, **params))["bits"]))

        found[arm] = {"bits": round(target, 4)}
        ways = {"temperature": (lambda t: bits(temperature=t), 0.1, 4.0)}
        if arm == "policy":
            ways["min_p"] = (lambda x: bits(min_p=1 / x), 1.2, 1000.0)  # rises as min-p falls
            ways["top_p"] = (lambda x: bits(top_p=x), 0.05, 1.0)
        for name, (f, low, high) in ways.items():
            got = find_match(target, f, low, high)
            value = 1 / got["value"] if name == "min_p" else got["value"]
            found[arm] |= {name: round(value, 4), name + " bits": got["bits"]}
    return found


def repeated(ids, n):
    "The share of n-grams that occurred before."
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def pieces(model, size, more):  # long: the list of the experiments, each a few lines
    "Every piece of work as (name, function of what was found so far); later ones need the earlier."
    import torch

    from decoding_book.entropix import calibrate
    from decoding_book.loop import generate
    from decoding_book.sampler import Sampler

    few, prompts = OPENINGS[: size["openings"]], PROMPTS[: size["prompts"]]

    def do_calibrate(found):
        from dataclasses import asdict

        g = generate(model, few, Sampler(seed=5), 48, ignore_eos=True, alternatives=0)
        texts = [torch.cat(pair) for pair in zip(g.prompt_ids, g.ids)]
        config = asdict(calibrate(model, texts))
        ids = model.encode(CLARIFY)
        assert len(ids) == 1, ids
        return {
            "config": config,
            "clarify_id": ids[0],
            "clarify": CLARIFY,
            "positions": sum(len(t) - 1 for t in texts),
        }

    def do_check(found):  # the fast draw is the plain draw, in the loop
        policy, plain = (chooser("policy", 1, found["calibrate"], None) for _ in range(2))
        plain.__dict__["backend"] = None
        a, b = (run(model, few[:4], c, 16) for c in (policy, plain))
        assert a["ids"] == b["ids"]
        return {"tokens": len(flat(a["ids"]))}

    def do_match(found):
        def run_arm(arm):
            choose = chooser(arm, 1, found["calibrate"], None) if isinstance(arm, str) else arm
            return run(model, few, choose, 32)

        return match(run_arm)

    def do_text(arm, seed):
        def work(found):
            out = run(
                model, prompts, chooser(arm, seed, found["calibrate"], found["match"]), TOKENS
            )
            return {
                "ids": out["ids"],
                "logprob": [mean(x) for x in out["logprobs"]],
                "bits": [mean(x) for x in out["bits"]],
                "branches": [flat(out["branch"]).count(i) for i in range(5)],
            }

        return work

    readings = {}

    def reading(task, part, a, b):
        "The items a .. b of a part of a task, read once."
        if (task, part, a) not in readings:
            readings.clear()
            readings[task, part, a] = Prefilled(
                model, [q for q, _ in task_items(task)[part][a:b]], size["answer"][task]
            )
        return readings[task, part, a]

    def answer(task, part, a, b, choose):
        items = task_items(task)[part][a:b]
        return run(
            reading(task, part, a, b),
            [q for q, _ in items],
            choose,
            size["answer"][task],
            stop="\n",
        ), items

    def do_task_match(task):
        def work(found):
            def run_arm(arm):
                choose = chooser(arm, 1, found["calibrate"], None) if isinstance(arm, str) else arm
                return answer(task, 0, 0, size["fit"], choose)[0]

            return match(run_arm)

        return work

    def do_task(task, a, b, seed):
        def work(found):
            out = {}
            for arm in [*ARMS, *CARRIED]:
                matched = found["match" if arm in CARRIED else f"match {task}"]
                got, items = answer(
                    task, 1, a, b, chooser(CARRIED.get(arm, arm), seed, found["calibrate"], matched)
                )
                right = [int(x.strip() == y) for x, (_, y) in zip(got["text"], items)]
                out[arm] = {
                    "right": right,
                    "bits": [mean(x) for x in got["bits"]],
                    "text": got["text"][:5],
                    "branches": [flat(got["branch"]).count(i) for i in range(5)],
                }
            from decoding_book.sampler import Sampler

            got, items = answer(task, 1, a, b, Sampler(temperature=0))
            out["greedy"] = {
                "right": [int(x.strip() == y) for x, (_, y) in zip(got["text"], items)],
                "bits": [0.0] * len(items),
                "text": got["text"][:5],
                "branches": [0] * 5,
            }
            return out

        return work

    yield "calibrate", do_calibrate
    yield "check", do_check
    yield "match", do_match

    def tasks(task, seed):
        n = min(len(task_items(task)[1]), size["items"])
        for a in range(0, n, 80):
            yield f"task {task} {a} {seed}", do_task(task, a, min(a + 80, n), seed)

    for arm in ARMS:
        yield f"text {arm} 1", do_text(arm, 1)
    for task in TASKS:
        yield f"match {task}", do_task_match(task)
        yield from tasks(task, 1)
    for kind, names, seed in more:
        for name in names:
            if kind == "task":
                yield from tasks(name, seed)
            else:
                yield f"text {name} {seed}", do_text(name, seed)


def bootstrap(values, n=4000, seed=0):
    "Mean and its 95 % interval over resampled units."
    import numpy as np

    x, rng = np.asarray(values, float), np.random.default_rng(seed)
    means = x[rng.integers(0, len(x), (n, len(x)))].mean(1)
    return [round(float(v), 4) for v in (x.mean(), *np.quantile(means, [0.025, 0.975]))]


def text_measures(runs):
    "For each prompt the measures of its texts, means over the runs of several seeds."
    rows = list(zip(*(r["ids"] for r in runs)))
    pairs = [[list(zip(t, t[1:])) for t in row] for row in rows]
    return {
        "rep-4": [mean([repeated(t, 4) for t in row]) for row in rows],
        "distinct-2": [mean([len(set(p)) / len(p) for p in row]) for row in pairs],
        "distinct-2 over seeds": [len(set(flat(row[:2]))) / len(flat(row[:2])) for row in pairs],
        "logprob": [mean(x) for x in zip(*(r["logprob"] for r in runs))],
        "bits": [mean(x) for x in zip(*(r["bits"] for r in runs))],
    }


def summary(found):
    """The table of means, the differences of arms on the same prompts, seeds and items, and the
    branches; intervals of 95 %."""
    seeds = {arm: [s for s in SEEDS if f"text {arm} {s}" in found] for arm in ARMS}
    names = {
        (t, s): sorted(
            (k for k in found if k.startswith(f"task {t} ") and k.endswith(f" {s}")),
            key=lambda k: int(k.split()[2]),
        )
        for t in TASKS
        for s in SEEDS
    }
    task_seeds = {
        t: [s for s in SEEDS if len(names[t, s]) == len(names[t, 1])] for t in TASKS
    }  # the whole ones
    parts = {t: [found[k] for s in task_seeds[t] for k in names[t, s]] for t in TASKS}

    def right(arm, task):
        "For each item the share of seeds that answered it right."
        return [
            mean(x)
            for x in zip(
                *(flat([found[k][arm]["right"] for k in names[task, s]]) for s in task_seeds[task])
            )
        ]

    def values(arm, seeds):
        texts = text_measures([found[f"text {arm} {s}"] for s in seeds]) if seeds else {}
        return texts | {task: right(arm, task) for task in TASKS}

    def difference(arm, base):
        both = [s for s in seeds.get(arm, []) if s in seeds.get(base, [])]
        a, b = values(arm, both), values(base, both)
        return {"arm": arm, "against": base, "seeds": len(both)} | {
            m: bootstrap([x - y for x, y in zip(a[m], b[m])]) for m in a
        }

    pairs = [
        (arm, other)
        for arm in ("policy", "no clarify")
        for other in ("temperature", "min-p", "top-p")
    ]
    pairs += [("published", "temperature, published")] + [(arm, "policy") for arm in ARMS[6:]]
    pairs += [("policy", f"{x}, as in texts") for x in ("temperature", "min-p", "top-p")]
    pairs += [("published", "temperature, published, as in texts")]
    every = [*ARMS, *CARRIED, "greedy"]
    table = {
        arm: {m: bootstrap(v) for m, v in values(arm, seeds.get(arm)).items()} for arm in every
    }

    def branches(runs):
        return [sum(x) for x in zip(*(r["branches"] for r in runs))]

    with_branches = [arm for arm in ARMS if arm not in CARRIED.values()]
    return {
        "seeds": {arm: len(s) for arm, s in seeds.items()},
        "task_seeds": {t: len(s) for t, s in task_seeds.items()},
        "table": table,
        "differences": [difference(*p) for p in pairs],
        "items": {t: len(values("greedy", [])[t]) for t in TASKS},
        "task_bits": {
            t: {arm: round(mean(flat([p[arm]["bits"] for p in parts[t]])), 4) for arm in every}
            for t in TASKS
        },
        "branches": {
            arm: branches([found[f"text {arm} {s}"] for s in seeds[arm]]) for arm in with_branches
        },
        "task_branches": {
            t: {arm: branches([p[arm] for p in parts[t]]) for arm in with_branches} for t in TASKS
        },
        "samples": {arm: found[f"text {arm} 1"]["ids"][:2] for arm in ARMS},
    }


def main():  # long: the command line, then every piece in turn
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few prompts and items, nothing recorded"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop before a piece that starts later than this",
    )
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 2)))
    parser.add_argument("--out", type=Path, default=HERE / "audit.json")
    args = parser.parse_args()
    begin = time.perf_counter()
    os.environ["TQDM_DISABLE"] = "1"
    size, more, work = (
        dict(openings=40, prompts=104, items=200, fit=30, answer=dict(sum=4, copy=9, capital=6)),
        MORE,
        ROOT / "build/audit.json",
    )
    if args.quick:
        size, more, work = (
            size | dict(openings=4, prompts=3, items=4, fit=4),
            [],
            ROOT / "build/audit-quick.json",
        )
    import torch

    from decoding_book import sampler
    from decoding_book.smollm import SmolLM2

    torch.set_num_threads(args.threads)
    sampler.BACKENDS["short"] = "benchmarks.audit:draw_short"
    sampler.CHOICES["backend"] = (*sampler.CHOICES["backend"], "short")
    found = json.loads(work.read_text()) if work.is_file() else {}
    model = SmolLM2()
    for name, do in pieces(model, size, more):
        if name in found:
            continue
        start = time.perf_counter()
        if start - begin > 60 * args.minutes:
            print("more to do: run it again")
            break
        found[name] = do(found) | {"seconds": None}
        found[name]["seconds"] = round(time.perf_counter() - start, 1)
        work.parent.mkdir(exist_ok=True)
        work.write_text(json.dumps(found))
        print(f"{name}: {found[name]['seconds']} s", flush=True)
    if any(name not in found for name, _ in pieces(model, size, [])):
        return  # not yet whole
    result = {
        "machine": machine(),
        "prompts": size["prompts"],
        "tokens": TOKENS,
        "seconds": round(sum(x["seconds"] for x in found.values())),
        "calibrate": found["calibrate"],
        "match": {k: v for k, v in found.items() if k.startswith("match")},
    } | summary(found)
    result["samples"] = {
        arm: [model.decode(t) for t in texts] for arm, texts in result["samples"].items()
    }
    if args.quick:
        return print(json.dumps(result["table"], indent=1)[:1500])
    write(args.out, result)
    print(f"recorded in {args.out}")


if __name__ == "__main__":
    main()
