"""One chooser serves two streams, two threads and a batch: what it must remember of a row lives
with the row."""

import random
import sys
import threading

import pytest
import torch

from decoding_book.constrained import Constrained, Pattern, Vocabulary, token_bytes
from decoding_book.entropix import EntropixConfig, EntropySampler, PublishedConfig
from decoding_book.loop import Draw, Prediction, generate, greedy, stream
from decoding_book.noise import Key, gumbel_max
from decoding_book.sampler import Mirostat, Sampler
from decoding_book.signature import ContextSampler
from decoding_book.toy import TableModel

V, WORDS = 6, ["cold", "coffee", "I", "like", "water", "tea"]
TABLE = torch.rand(V, V, generator=torch.Generator().manual_seed(1)).add(0.2)
MODEL = TableModel([1 / V] * V, TABLE / TABLE.sum(1, keepdim=True), WORDS)
PROMPTS = ["cold", "water I", "tea tea like", "I"]
# always HELV
UNSURE = dict(low_ent_thresh=0, high_ent_thresh=0, low_vent_thresh=1e3, high_vent_thresh=1e4)
# every branch
MIXED = dict(low_ent_thresh=2.35, high_ent_thresh=2.4, low_vent_thresh=0.35, high_vent_thresh=0.45)


def policy(config, **options):
    return EntropySampler(config, tokenizer=MODEL, attention=False, **options)


class Follow:
    """Draws among what surprises less than a limit, which follows the surprise: as long as the loop
    carries it along."""

    def __init__(self, target=2.0, rate=0.4):
        self.target, self.rate = target, rate

    def __call__(self, prediction, context):
        bits = -prediction.logits.log_softmax(-1) / torch.tensor(2.0).log()
        limit = context.memory.get(self, bits.new_full((len(bits),), 2 * self.target))
        z = (-bits).where(
            (bits <= limit[:, None]) | (bits == bits.amin(1, keepdim=True)), -torch.inf
        )
        ids = gumbel_max(z, Key(5, context.row * 0, context.lengths))
        context.memory[self] = limit - self.rate * (
            bits.gather(1, ids[:, None])[:, 0] - self.target
        )
        return Draw(ids)


class Alternate:
    "A list in memory: each row says its own word again after every two drawn words."

    def __call__(self, prediction, context):
        said = context.memory.setdefault(self, [[] for _ in context.row])
        ids = gumbel_max(prediction.logits, Key(6, context.row * 0, context.lengths)).tolist()
        for j, words in enumerate(said):
            if len(words) % 3 == 2:
                ids[j] = words[0]
            words.append(ids[j])
        return Draw(torch.tensor(ids))


CHOOSERS = {
    "greedy": greedy,
    "sampler": Sampler(rows=0, seed=3),
    "sampler, filters": Sampler(temperature=0.8, top_k=4, top_p=0.9, min_p=0.05, rows=0, seed=4),
    "sampler, plain": Sampler(temperature=0.8, top_k=4, top_p=0.9, rows=0, backend="plain"),
    "sampler, penalties": Sampler(
        1.2,
        repetition_penalty=1.3,
        frequency_penalty=0.2,
        presence_penalty=0.1,
        no_repeat_ngram=3,
        logit_bias={1: -1.0},
        min_new_tokens=5,
        eos=5,
        rows=0,
    ),
    **{
        f"sampler as {system}": Sampler.dialect(
            system, temperature=0.9, top_k=4, top_p=0.8, min_p=0.05, rows=0
        )
        for system in ("book", "huggingface", "vllm", "sglang", "llama.cpp")
    },
    "policy": policy(EntropixConfig(**MIXED), rows=0),
    "policy as published": policy(PublishedConfig(**MIXED, med_ent_thresh=2.4), rows=0),
    "policy, one id": policy(EntropixConfig(**UNSURE), clarify=5, rows=0),
    "policy, a text": policy(EntropixConfig(**UNSURE), clarify="I like tea", rows=0),
    "policy, a text now and then": policy(
        EntropixConfig(**MIXED), clarify="I like tea", rows=0, seed=2
    ),
    "sampler by the last tokens": ContextSampler(0.8, top_k=4, seed=3, last=2),
    "sampler, cuts": Sampler(
        1.2,
        typical_p=0.9,
        tail_free=0.99,
        xtc_probability=0.5,
        dynatemp_range=0.5,
        rows=0,
        dry_multiplier=0.5,
    ),
    "mirostat": Mirostat(2.0, 0.4, Sampler(0.9, rows=0, seed=6)),
    "constrained": Constrained(
        Pattern(r"((cold|I|like) (coffee|water|I) ){30}", Vocabulary(token_bytes(MODEL), [5])),
        Sampler(rows=0, seed=7),
    ),
    "follow": Follow(),
    "alternate": Alternate(),
}


def record(steps):
    "All that each row saw, for comparison bit for bit."
    rows = {}
    for step in steps:
        for j, r in enumerate(step.row.tolist()):
            one = step.only(j)
            rows.setdefault(r, []).append(
                (one.ids.item(), one.logprobs.item(), one.text, one.ended, repr(one.draw))
            )
    return rows


def run(prompt, choose, n=10):
    return stream(MODEL, prompt, choose, n, stop=["coffee", "water"])


def alone(choose):
    return [record(run(p, choose))[0] for p in PROMPTS]


@pytest.mark.parametrize("name", CHOOSERS)
def test_streams_in_turns(name):
    "Whatever the turns, each stream gets what it gets alone."
    choose = CHOOSERS[name]
    expected, order = alone(choose), random.Random(name)
    for _ in range(2):
        streams = dict(enumerate(run(p, choose) for p in PROMPTS))
        steps = [[] for _ in PROMPTS]
        while streams:
            i = order.choice(list(streams))
            try:
                steps[i].append(next(streams[i]))
            except StopIteration:
                del streams[i]
        assert [record(s)[0] for s in steps] == expected
    abandoned = run("I like", choose)
    next(abandoned, None), next(abandoned, None)  # left in the middle of a text
    assert alone(choose) == expected


@pytest.mark.parametrize("name", CHOOSERS)
def test_streams_in_threads(name):
    choose, found, old = CHOOSERS[name], {}, sys.getswitchinterval()
    expected = alone(choose)

    def work(i):
        for n in range(2):
            found[i, n] = record(run(PROMPTS[i % len(PROMPTS)], choose))[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    sys.setswitchinterval(1e-5)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(old)
    assert len(found) == 8 and all(found[i, n] == expected[i % len(PROMPTS)] for i, n in found)


@pytest.mark.parametrize("name", CHOOSERS)
def test_rows_of_a_batch_that_leave_at_different_times(name):
    """A row is the same in a batch as alone, though its neighbours end before it and take their
    memory with them."""
    choose = CHOOSERS[name]
    one = greedy if choose is greedy else choose
    if hasattr(choose, "rows"):  # all rows have the number that a lone row has
        one = type(choose)(
            **{f: getattr(choose, f) for f in choose.__dataclass_fields__}
            | {"rows": [0] * len(PROMPTS)}
        )
    assert record(run(PROMPTS, one)) == dict(enumerate(alone(choose)))


def test_rows_do_leave_early():
    "Without this the test above would say nothing."
    for name in ("sampler", "policy, a text now and then", "mirostat", "alternate"):
        assert len({len(row) for row in alone(CHOOSERS[name])}) > 1, name


def test_two_choosers_in_one_context_do_not_meet():
    a, b = (
        policy(EntropixConfig(**UNSURE), clarify="I like tea"),
        policy(EntropixConfig(**UNSURE), clarify="tea like"),
    )

    def both(prediction, context):
        a(prediction, context)
        return b(prediction, context)

    assert generate(MODEL, "cold", both, 8).text == generate(MODEL, "cold", b, 8).text


def test_a_new_generation_remembers_nothing():
    choose = CHOOSERS["policy, a text"]
    for n in (1, 2, 4, 5):  # cut in the middle of the clarifying text
        assert (
            generate(MODEL, "cold", choose, n).text.split()
            == generate(MODEL, "cold", choose, 8).text.split()[:n]
        )


def test_memory_is_of_the_rows_still_there():
    seen = []

    def watch(prediction, context):
        at = context.memory.setdefault(watch, torch.arange(len(context.row)))
        names = context.memory.setdefault("names", [f"row {i}" for i in range(len(context.row))])
        seen.append(context.row.tolist())
        assert at.equal(context.row) and names == [f"row {i}" for i in context.row.tolist()]
        return Draw(torch.where(context.row == len(seen), 5, 0))

    class Ends:
        vocab_size, eos = V, 5

        def __call__(self, ids, **options):
            return Prediction(torch.zeros(len(ids), V))

    generate(Ends(), [[1]] * 4, watch, 6)
    assert seen == [[0, 1, 2, 3], [0, 2, 3], [0, 3], [0], [0], [0]]


def test_a_chooser_cannot_change_where_rows_stand():
    "What it writes over in its context is gone at the next step; only `memory` is carried along."

    def careless(prediction, context):
        chosen = greedy(prediction)
        context.ids, context.mask, context.row, context.memory = None, None, None, {}
        return chosen

    assert [s.ids.tolist() for s in run(PROMPTS, careless)] == [
        s.ids.tolist() for s in run(PROMPTS, greedy)
    ]
