"Drafts: the text of the plain loop whoever drafts, the published rule's law, what a pass gives."

import inspect
import pickle
from collections import Counter
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from fastcore.docments import docments
from helpers.texts import PROMPTS as TEXTS
from hypothesis import given
from hypothesis import strategies as st
from test_choosers import CHOOSERS, MODEL, PROMPTS, Mirostat

from decoding_book.entropix import EntropySampler
from decoding_book.loop import (
    Generation,
    Prediction,
    PromptCache,
    generate,
    greedy,
    score,
    stream,
)
from decoding_book.noise import Key, chi_square, gumbel_max
from decoding_book.sampler import Sampler
from decoding_book.smollm import SmolLM2
from decoding_book.speculative import (
    AcceptReject,
    Drafting,
    EarlyExit,
    Guessed,
    ModelDrafter,
    Pass,
    PromptLookup,
    agreement,
    overlap,
    published_rule,
    speculate,
)
from decoding_book.toy import TableModel, sequence_law, six_words
from decoding_book.transformer import GPT, GPTConfig

V = 6
OTHER = torch.rand(V, V, generator=torch.Generator().manual_seed(2)).add(0.1)
OTHER = TableModel([1 / V] * V, OTHER / OTHER.sum(1, keepdim=True), MODEL.words)


def nonsense(row, n):
    "Now this, now that, and sometimes fewer than asked for."
    at = len(row.ids)
    return [(at * 7 + i * i) % V for i in range(n - at % 3 % (n + 1))], None


DRAFTERS = {
    "lookup": PromptLookup(),
    "the model itself": ModelDrafter(MODEL),
    "another": ModelDrafter(OTHER),
    "nonsense": nonsense,
    "silent": lambda row, n: ([], None),
}


def rows(found):
    return [ids.tolist() for ids in ([found.ids] if found.single else found.ids)]


def same(a, b):
    "All that two results hold, bit for bit."
    assert rows(a) == rows(b) and a.text == b.text and a.reason == b.reason
    for x, y in zip(a.steps, b.steps):
        assert x.logprobs.equal(y.logprobs) and repr(x.draw) == repr(y.draw)


@pytest.mark.parametrize("name", CHOOSERS)
def test_every_chooser_gets_the_plain_loops_text_whoever_drafts(name, full):
    choose = CHOOSERS[name]
    options = dict(max_new_tokens=30 if full else 8, stop=["coffee", "water"])
    plain = generate(MODEL, PROMPTS, choose, **options)
    chosen = DRAFTERS if full else ["another", "nonsense"]
    for drafter, drafts in product(chosen, (1, 5) if full else (3,)):
        found = speculate(
            MODEL, PROMPTS, choose, drafter=DRAFTERS[drafter], drafts=drafts, **options
        )
        same(found, plain)


def test_the_chooser_cannot_tell_the_difference():
    "It is called as often, and sees the same contexts: a refused draft is in none of them."

    class Watching:
        def __init__(self):
            self.seen = []

        def __call__(self, prediction, context):
            self.seen.append((context.row.tolist(), context.ids.tolist(), context.mask.tolist()))
            return CHOOSERS["sampler, penalties"](prediction, context)

    plain, drafted = Watching(), Watching()
    generate(MODEL, PROMPTS, plain, 9)
    speculate(MODEL, PROMPTS, drafted, 9, drafter=nonsense)
    assert plain.seen == drafted.seen and len(plain.seen) == 9


def test_a_drafter_that_knows_the_text_needs_one_pass_a_group_of_drafts():
    sampler = Sampler(seed=3)
    found = speculate(MODEL, "cold", sampler, 13, drafter=ModelDrafter(MODEL), drafts=3)
    assert found.accepted.tolist() == [0, 3, 3, 3] and found.drafted.equal(found.accepted)
    assert [p.position for p in found.passes] == [1, 2, 6, 10]
    last = speculate(MODEL, "cold", sampler, 7, drafter=ModelDrafter(MODEL), drafts=3)
    assert last.drafted.tolist() == [0, 3, 1]  # no more than the text has room for


@pytest.mark.parametrize("drafts", [1, 2, 8])
def test_what_passes_give_adds_up_to_the_text(drafts, full):
    for seed in range(20 if full else 3):
        found = speculate(MODEL, "I like", Sampler(seed=seed), 20, drafter=nonsense, drafts=drafts)
        gave = found.accepted + 1
        assert len(found.ids) in (gave.sum(), gave.sum() - 1)  # the last draft may be the end
        assert (found.accepted <= found.drafted).all() and found.drafted.max() <= drafts
        starts = [1 + 1 + g for g in gave.cumsum(0).tolist()]
        assert [p.position for p in found.passes] == [2, *starts[:-1]]


def test_rows_accept_different_numbers_and_are_what_they_are_alone():
    sampler = Sampler(seed=1)
    together = speculate(MODEL, PROMPTS, sampler, 16, drafter=ModelDrafter(OTHER), drafts=4)
    assert len({len(a) for a in together.accepted}) > 1
    for i, prompt in enumerate(PROMPTS):
        own = replace(sampler, rows=torch.tensor([i]))
        alone = speculate(MODEL, prompt, own, 16, drafter=ModelDrafter(OTHER), drafts=4)
        assert alone.ids.equal(together.ids[i])
        assert together.accepted[i].equal(alone.accepted) and together[i].accepted.equal(
            alone.accepted
        )
        assert [replace(p, row=0) for p in together.passes if p.row == i] == alone.passes


def test_parameters_differ_by_row(full):
    mixed = Sampler([0, 0.5, 1, 2], top_k=[1, 3, None, 5], seed=[1, 2, 3, 4])
    for drafter in DRAFTERS.values() if full else [PromptLookup(), ModelDrafter(OTHER)]:
        same(
            speculate(MODEL, PROMPTS, mixed, 12, drafter=drafter, drafts=3),
            generate(MODEL, PROMPTS, mixed, 12),
        )


# ---- where a text ends


@pytest.mark.parametrize("stop", ["coffee", "like tea", 2, [5, "water I"]])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_inside_a_draft(stop, include, full):
    for seed in range(12 if full else 2):
        options = dict(max_new_tokens=14, stop=stop, include_stop=include)
        found = speculate(MODEL, "tea", Sampler(seed=seed), drafter=ModelDrafter(MODEL), **options)
        same(found, generate(MODEL, "tea", Sampler(seed=seed), **options))


def test_an_end_mark_and_the_end_of_the_context(full):
    "The tree has five words: a draft beyond it would be refused by the model."
    world = six_words()
    markov = TableModel(world.logs[0].exp(), world.logs[1].exp(), world.words, "stop")
    passes = []
    for seed in range(30 if full else 4):
        for drafter in (ModelDrafter(world), ModelDrafter(markov), PromptLookup()):
            options = dict(max_new_tokens=9, drafter=drafter)
            found = speculate(world, ["", "I", "like cold"], Sampler(seed=seed), **options)
            same(found, generate(world, ["", "I", "like cold"], Sampler(seed=seed), 9))
            passes += found.passes
    ends = [p.drafted for p in passes if world.eos in p.drafted]
    assert ends and all(d.index(world.eos) == len(d) - 1 for d in ends)


def test_a_time_limit_ends_at_a_step():
    found = speculate(MODEL, "I", greedy, 50, max_time=0, drafter=ModelDrafter(MODEL))
    assert (len(found.ids), found.reason) == (1, "time")


# ---- the memory of a model


def small_gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig("abcdefgh", context=64, width=16, layers=2, heads=2)).double().eval()
    for p in model.parameters():
        p.data.mul_(2)
    return model


def test_wrong_drafts_are_forgotten_without_copying(full):
    "In float64 nothing is decided by rounding. The memory stays where it is."
    model, seen = small_gpt(), []

    def watching(row, n):
        seen.append((row.memory.keys.data_ptr(), row.memory.length, len(row.ids)))
        return [(len(row.ids) * 3 + i) % 10 for i in range(n)], None

    prompts, n = ["abab", "hgfedcba", "a"], 50 if full else 14
    for choose in (greedy, Sampler(seed=2), Sampler(1.3, repetition_penalty=1.3, seed=5)):
        plain = generate(model, prompts, choose, n)
        for drafter in (PromptLookup(), watching, ModelDrafter(small_gpt())):
            found = speculate(model, prompts, choose, n, drafter=drafter, drafts=5)
            assert rows(found) == rows(plain) and found.reason == plain.reason
    assert len({address for address, *_ in seen[:10]}) == 3
    assert all(length == n - 1 for _, length, n in seen)  # all but the newest token


def test_the_end_of_the_models_context_with_a_cache():
    model = small_gpt()
    found = speculate(model, "ab" * 25, Sampler(seed=1), 40, drafter=PromptLookup())
    plain = generate(model, "ab" * 25, Sampler(seed=1), 40)
    assert found.reason == plain.reason and rows(found) == rows(plain)
    assert len(plain.prompt_ids) + len(plain.ids) == 64 or plain.reason == "eos"


def test_a_kept_prompt_is_shared_and_left_as_it_is():
    model = small_gpt()
    kept = PromptCache(model, "abcabc")
    before = kept.memory.keys[:, :, :, : kept.memory.length].clone()
    prompts = ["abcabca", "abcabc", "abch"]
    for _ in range(2):
        found = speculate(model, prompts, Sampler(seed=4), 20, cache=kept)
        assert rows(found) == rows(generate(model, prompts, Sampler(seed=4), 20, cache=kept))
    assert before.equal(kept.memory.keys[:, :, :, : kept.memory.length]) and kept.model is model
    of_drafting = PromptCache(Drafting(model), "abcabc")
    steps = list(stream(of_drafting.model, "abcabca", max_new_tokens=9, cache=of_drafting))
    assert [s.ids.item() for s in steps] == generate(
        model, "abcabca", max_new_tokens=9
    ).ids.tolist()


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mamba"])
def test_models_of_transformers(name, full):
    if not full:
        pytest.skip("with the full counts: importing transformers takes longer than this file")
    from helpers.architectures import tiny

    from decoding_book.huggingface import HuggingFace

    model = HuggingFace(tiny(name).double())
    for choose in (greedy, Sampler(seed=3)):
        for prompt in ([5, 6, 7, 5, 6], [[3, 4, 3], [9, 8, 7, 6, 9]]):
            plain = generate(model, prompt, choose, 16)
            found = speculate(model, prompt, choose, 16, drafter=PromptLookup(), drafts=4)
            assert rows(found) == rows(plain)


def test_a_drafter_catches_up_on_what_the_text_became():
    "What its own cache holds is always the beginning of the text that it goes on from."
    model, calls = small_gpt(), []

    class Watched:
        vocab_size, eos, context = model.vocab_size, model.eos, 64
        new_cache = staticmethod(model.new_cache)

        def __call__(self, ids, cache=None):
            calls.append(cache.length + ids.shape[1])
            return model(ids, cache=cache)

    class Hints(ModelDrafter):
        def __call__(self, row, n):
            found = super().__call__(row, n)
            own = row.notes[self]
            assert own.cache.length == len(own.read) and own.read[: len(row.ids)] == row.ids
            return found

    sampler = Sampler(1.5, seed=6)
    found = speculate(model, "abc", sampler, 30, drafter=Hints(Watched()), drafts=4)
    assert rows(found) == rows(generate(model, "abc", sampler, 30))
    assert found.accepted.equal(found.drafted) and calls


# ---- the published rule

LAWS = st.lists(st.floats(0, 1), min_size=V, max_size=V).filter(lambda x: sum(x) > 0.01)


def normal(x):
    x = torch.tensor(x, dtype=torch.float64)
    return x / x.sum()


@given(LAWS, LAWS)
def test_accepted_and_replaced_tokens_have_the_targets_law(p, q):
    p, q = normal(p), normal(q)
    chance, instead = published_rule(p, q)
    assert ((chance >= 0) & (chance <= 1)).all() and abs(instead.sum() - 1) < 1e-12
    made = q * chance + (q * (1 - chance)).sum() * instead
    assert (made - p).abs().max() < 1e-12
    assert abs((q * chance).sum() - overlap(p, q)) < 1e-12


@given(LAWS, LAWS)
def test_two_draws_with_one_key_agree_as_often_as_pairs_say(p, q):
    p, q = normal(p), normal(q)
    by_pairs = sum(
        1 / (p / p[i]).maximum(q / q[i]).sum().item() for i in range(V) if p[i] > 0 and q[i] > 0
    )
    found = agreement(p, q).item()
    assert abs(found - by_pairs) < 1e-9
    most, tv = overlap(p, q).item(), 1 - overlap(p, q).item()
    assert (1 - tv) / (1 + tv) - 1e-9 <= found <= most + 1e-9


def test_agreement_of_batches_of_equal_and_of_strange_laws():
    p = torch.rand(5, 3, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = p / p.sum(-1, keepdim=True)
    assert agreement(p, p).allclose(torch.ones(5, 3).double()) and overlap(p, p).shape == (5, 3)
    ends = torch.eye(2, dtype=torch.float64)
    assert agreement(ends[0], ends[1]) == overlap(ends[0], ends[1]) == 0


def draws(p, q, drafted_by_law, n):
    "Tokens of n rows at one place, whose drafts come from q, or were not drawn."
    rule = AcceptReject(Sampler(seed=7))
    z, zq = p.log().expand(n, -1), q.log().expand(n, -1)
    ids = torch.ones(n, 4, dtype=torch.long)
    context = SimpleNamespace(
        row=torch.arange(n), ids=ids, mask=ids > 0, prompt_lengths=ids[:, 0], lengths=ids[:, 0] * 4
    )
    guessed = rule.guess(Prediction(zq), context).ids.tolist()
    laws = list(zq) if drafted_by_law else [None] * n
    if not drafted_by_law:
        guessed = [2] * n
    drawn = rule(Guessed(z, None, None, None, guessed, laws), context)
    return drawn.ids, torch.tensor(guessed)


def test_both_rules_accept_as_often_as_they_should(full, record):
    "At one place, 100 000 rows: law by χ², acceptance within five standard deviations."
    n, rng = 100_000 if full else 10_000, torch.Generator().manual_seed(5)
    p, q = torch.rand(2, V, dtype=torch.float64, generator=rng).softmax(-1).pow(4).unbind()
    p, q = p / p.sum(), q / q.sum()
    drawn, guessed = draws(p, q, True, n)
    assert chi_square(guessed.bincount(minlength=V), q) > 1e-4
    assert chi_square(drawn.bincount(minlength=V), p) > 1e-4
    one_sd = (overlap(p, q) * (1 - overlap(p, q)) / n) ** 0.5
    # a refused draft is never drawn again: the law in its place has none of it
    rate = (drawn == guessed).double().mean()
    assert abs(rate - overlap(p, q)) < 5 * one_sd
    certain, _ = draws(p, q, False, n)
    assert chi_square(certain.bincount(minlength=V), p) > 1e-4
    keys = Key(seed=3, position=torch.arange(n))
    keyed = gumbel_max(p.log().expand(n, -1), keys) == gumbel_max(q.log().expand(n, -1), keys)
    assert abs(keyed.double().mean() - agreement(p, q)) < 5 * one_sd
    record(
        "acceptance at one place: 1 - TV, published, keyed, keyed exactly",
        [overlap(p, q), rate, keyed.double().mean(), agreement(p, q)],
    )


def law_by_events(target, drafter, k, n):
    "The law of texts of up to n words under the rule, all events followed, the end mark counted."
    states, law = {((), 0): 1.0}, Counter()
    for _ in range(n):
        grown = Counter()
        for (text, left), mass in states.items():
            p, q = (m(torch.tensor([text]).long()).logits[0].exp() for m in (target, drafter))
            chance, instead = published_rule(p, q)
            for i in range(V):
                if not left:
                    grown[text + (i,), k] += mass * p[i].item()
                    continue
                grown[text + (i,), left - 1] += mass * (q[i] * chance[i]).item()
                for j in range(V):
                    refused = q[i] * (1 - chance[i]) * instead[j]
                    grown[text + (j,), k] += mass * refused.item()
        states = Counter()
        for (text, left), mass in grown.items():
            if text[-1] == target.eos or len(text) == n:
                law[text] += mass
            else:
                states[text, left] += mass
    return law


def worlds():
    world = six_words()
    return world, TableModel(world.logs[0].exp(), world.logs[1].exp(), world.words, "stop")


@pytest.mark.parametrize("k", [1, 2])
def test_the_law_of_texts_is_the_targets_by_enumeration(k, full):
    world, markov = worlds()
    n = 4 if full else 3
    exact, found = sequence_law(world, n), law_by_events(world, markov, k, n)
    found = {text: mass for text, mass in found.items() if mass > 0}
    assert max(abs(found.get(t, 0) - m) for t, m in exact.items()) < 1e-14
    assert abs(sum(found.values()) - 1) < 1e-12


def test_the_law_of_drawn_texts_by_chi_squared(full, record):
    world, markov = worlds()
    n, size = (100_000, 1000) if full else (150, 150)
    exact, counts = sequence_law(world, 3), Counter()
    for first in range(0, n, size):
        rule = AcceptReject(Sampler(seed=1, rows=torch.arange(first, first + size)))
        found = speculate(world, [""] * size, rule, 3, drafter=ModelDrafter(markov), drafts=2)
        counts.update(map(tuple, rows(found)))
    common = [t for t, m in exact.items() if m * n > 5]
    observed = [counts[t] for t in common]
    p = torch.tensor([exact[t] for t in common], dtype=torch.float64)
    value = chi_square([*observed, n - sum(observed)], [*p.tolist(), 1 - p.sum().item()])
    record("published rule, texts and p-value", [n, value])
    assert value > 1e-4 and set(counts) <= set(exact)


def test_the_published_rule_with_filters_at_temperature_0_and_without_drafts():
    rule = AcceptReject(Sampler(temperature=0))
    found = speculate(MODEL, PROMPTS, rule, 10, drafter=ModelDrafter(OTHER))
    assert rows(found) == rows(generate(MODEL, PROMPTS, greedy, 10))
    few = AcceptReject(Sampler(top_k=[1, 2, 3, 6], repetition_penalty=1.2, seed=[1, 2, 3, 4]))
    for drafter in (PromptLookup(), ModelDrafter(OTHER)):
        found = speculate(MODEL, PROMPTS, few, 12, drafter=drafter)
        assert (found.steps[-1].draw.kept <= torch.tensor([1, 2, 3, 6])).all()
    alone = generate(MODEL, PROMPTS, AcceptReject(Sampler(seed=4)), 12)
    assert rows(alone) == rows(generate(MODEL, PROMPTS, Sampler(seed=4), 12))


def test_the_published_text_depends_on_the_drafter():
    rule = AcceptReject(Sampler(seed=2))
    a, b = (speculate(MODEL, PROMPTS, rule, 12, drafter=DRAFTERS[d]) for d in ("another", "lookup"))
    assert rows(a) != rows(b)


# ---- results, errors


def test_a_result_is_a_generation():
    found = speculate(MODEL, PROMPTS[:2], Sampler(seed=1), 6, drafter=ModelDrafter(MODEL), drafts=2)
    assert isinstance(found, Generation) and len(found) == 2
    assert repr(found).count(" passes") == 2 and repr(found[1]) == repr(found).split("\n")[1]
    assert [x.ids.tolist() for x in found[:]] == rows(found) and found[-1].ids.equal(found.ids[1])
    again = pickle.loads(pickle.dumps(found))
    assert repr(again) == repr(found) and again.passes == found.passes
    assert found._repr_html_() == again._repr_html_()
    assert found[0].passes[0] == Pass(0, 1, [])


def test_an_error_carries_what_there_was():
    def failing(row, n):
        if len(row.ids) > 4:
            raise RuntimeError("no idea")
        return [], None

    with pytest.raises(RuntimeError, match="no idea") as error:
        speculate(MODEL, "I", greedy, 9, drafter=failing)
    assert len(error.value.generation.ids) == 4 and len(error.value.generation.passes) == 4


class NoCrop:
    vocab_size, eos = V, None

    def new_cache(self, rows, length):
        return SimpleNamespace(length=0, keep=None)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(drafts=0), "drafts: 0 is below 1"),
        (dict(drafts=1.5), "drafts: 1.5"),
        (dict(drafter=5), "drafter: 5 is not callable"),
        (dict(drafter=lambda row, n: ([9], None)), "drafter: id 9 at index 0"),
        (dict(drafter=lambda row, n: ([1] * (n + 1), None)), "3 ids, but 2 were asked for"),
        (dict(drafter=lambda row, n: ([1], [])), "1 ids with 0 laws"),
        (dict(drafter=lambda row, n: (["a"], None)), "drafter: "),
        (dict(drafter=ModelDrafter(TableModel([1.0], [[1.0]]))), "vocabulary of 1, the model's"),
        (dict(choose=EntropySampler(tokenizer=MODEL)), "choose: it reads attention"),
        (dict(choose=3), "choose: 3 is not callable"),
        (dict(cache=7), "cache: 7 is not a PromptCache"),
        (dict(cache=PromptCache(small_gpt(), "ab")), "is another model's"),
        (dict(stop=""), "stop: "),
        (dict(max_new_tokens=-1), "max_new_tokens: -1"),
    ],
)
def test_what_cannot_work_is_refused(options, words):
    options = dict(max_new_tokens=8, drafts=2) | options
    with pytest.raises((ValueError, TypeError), match=words.replace("(", r"\(")):
        speculate(MODEL, "I like", **options)


def test_more_that_is_refused():
    with pytest.raises(ValueError, match="NoCrop has a cache without `crop`"):
        speculate(NoCrop(), [1])
    with pytest.raises(TypeError, match="the rule needs a Sampler"):
        AcceptReject(greedy)
    with pytest.raises(TypeError, match="no layers to leave early"):
        EarlyExit(MODEL, 1)
    for sizes in ((0, 1), (2, 3)):
        with pytest.raises(ValueError, match="longest|shortest"):
            PromptLookup(*sizes)
    model = Drafting(MODEL)
    with pytest.raises(ValueError, match="logits of the newest position"):
        model(torch.tensor([[1]]), cache=model.new_cache(1, 5), last_only=False)


def test_a_drafting_model_is_its_model_elsewhere():
    model = Drafting(MODEL)
    assert model.encode("I like") == MODEL.encode("I like") and model.eos is MODEL.eos
    ids = torch.tensor([[1, 2, 3]])
    assert model(ids, last_only=False).logits.equal(MODEL(ids, last_only=False).logits)
    with pytest.raises(AttributeError):
        print(model.no_such_name)
    told = "".join(s.text[0] for s in stream(model, "I", Sampler(seed=3), 8))
    assert told == generate(MODEL, "I", Sampler(seed=3), 8).text


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 6), st.integers(1, 3))
def test_prompt_lookup_by_its_definition(ids, n, longest):
    "The latest earlier place of the longest known end; from there the text repeats itself."
    expected = []
    for size in range(longest, 0, -1):
        places = [e for e in range(size, len(ids)) if ids[e - size : e] == ids[-size:]]
        if places and len(ids) > size:
            tail = ids[places[-1] :]
            expected = [tail[i % len(tail)] for i in range(n)]
            break
    assert PromptLookup(longest)(SimpleNamespace(ids=ids), n) == (expected, None)


def test_a_chooser_with_memory_is_asked_once_a_token():
    "Mirostat's limit would move with each draft that it is asked about."
    found = speculate(MODEL, PROMPTS, Mirostat(), 20, drafter=ModelDrafter(OTHER), drafts=6)
    assert rows(found) == rows(generate(MODEL, PROMPTS, Mirostat(), 20))


# ---- the real model

SAMPLERS = {
    "greedy": greedy,
    "top-p": Sampler(temperature=0.8, top_p=0.95, seed=1),
    "top-k": Sampler(temperature=1.0, top_k=40, seed=2),
    "penalties": Sampler(0.9, repetition_penalty=1.2, no_repeat_ngram=3, min_p=0.02, seed=3),
}
WORDS = ["", " The", " and then", " 1, 2,", "\n", " but", " of the", " In"]


def by_length(model, prompts):
    "(row numbers, prompts) of batches without padding, at most eight rows each."
    groups = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(len(model.encode(prompt)), []).append(i)
    for group in groups.values():
        for first in range(0, len(group), 8):
            part = group[first : first + 8]
            yield part, [prompts[i] for i in part]


def first_difference(a, b, row):
    """Where a row's texts part, or None. The most probable tokens must have the same
    log-probabilities there, to rounding: the texts before it are the same."""
    for n, (x, y) in enumerate(zip(a[row].steps, b[row].steps)):
        assert (x.top_logprobs - y.top_logprobs).abs().max() < 2e-3, (row, n)
        if not x.ids.equal(y.ids):
            return n
    assert len(a[row].ids) == len(b[row].ids)
    return None


def test_smollm_writes_the_same_text_with_three_drafters_and_four_samplers(full, record):
    "Rows in which rounding between one pass and several decided are counted."
    four_bits = SmolLM2(weights="q4")
    whole = SmolLM2() if full else four_bits
    texts, tokens = [p + w for p in TEXTS for w in WORDS], 8
    if not full:
        texts, tokens = texts[17:18], 5
    cases = [
        ("prompt lookup", four_bits, PromptLookup(), 4),
        ("27 of 30 layers", four_bits, EarlyExit(four_bits, 27), 2),
        ("the q4 form", whole, ModelDrafter(four_bits), 7),
    ]
    parted = compared = 0
    accepted, proposed = Counter(), Counter()
    for numbers, prompts in by_length(four_bits, texts):
        for sampler in SAMPLERS.values():
            own = sampler
            if sampler is not greedy:
                own = replace(sampler, rows=torch.tensor(numbers))
            plain = {m: generate(m, prompts, own, tokens) for m in {four_bits, whole}}
            for label, model, drafter, drafts in cases:
                options = dict(drafter=drafter, drafts=drafts)
                found = speculate(model, prompts, own, tokens, **options)
                for row in range(len(prompts)):
                    n = first_difference(plain[model], found, row)
                    parted += n is not None
                    compared += len(found[row].ids) if n is None else n + 1
                accepted[label] += sum(a.sum().item() for a in found.accepted)
                proposed[label] += sum(d.sum().item() for d in found.drafted)
    record("SmolLM2 with drafts: rows, and rows in which rounding decided", [compared, parted])
    record("SmolLM2 with drafts: accepted of drafted", [dict(accepted), dict(proposed)])
    assert len(texts) == (200 if full else 1) and parted < 0.001 * compared
    assert all(accepted.values()) if full else any(accepted.values())


def test_early_layers_work_in_the_targets_memory():
    "They share its weights, and what they write stands behind its length."
    model = SmolLM2(weights="q4")
    drafter = EarlyExit(model, 20)
    assert drafter.model.weights.layers[3] is model.weights.layers[3]
    assert len(drafter.model.weights.layers) == 20 and len(model.weights.layers) == 30
    seen = []

    def watching(row, n):
        n_before, before = row.memory.length, row.memory.keys[:, :, :, : row.memory.length].clone()
        found = drafter(row, n)
        assert row.memory.length == n_before
        assert before.equal(row.memory.keys[:, :, :, :n_before])
        seen.append(len(found[0]))
        return found

    watching.vocab_size = model.vocab_size
    prompt = "The capital of France is"
    found = speculate(model, prompt, greedy, 6, drafter=watching, drafts=2)
    assert found.ids.equal(generate(model, prompt, greedy, 6).ids) and seen[0] == 2
    with pytest.raises(ValueError, match="layers of another model"):
        speculate(small_gpt(), "ab", greedy, 6, drafter=lambda row, n: drafter(row, n))


def test_scores_of_a_drafting_model_are_refused_by_name():
    with pytest.raises(ValueError, match="last_only: False"):
        score(Drafting(small_gpt()), "abab")


def test_speculate_takes_what_generate_and_stream_take_in_the_same_words():
    """Each signature stands in full: an editor shows it without running anything, and the package
    needs no fastcore. So the three are held together here."""
    takes = {f: inspect.signature(f).parameters for f in (stream, generate, speculate)}
    said = {f: docments(f) for f in takes}
    assert list(takes[stream]) == list(takes[generate])
    assert list(takes[speculate]) == [*takes[generate], "drafter", "drafts"]
    for f in (stream, speculate):
        for name, parameter in takes[generate].items():
            assert takes[f][name].default == parameter.default, name
            assert takes[f][name].annotation == parameter.annotation or name == "model", name
            own = f is speculate and name in {"model", "choose"}
            assert own or said[f][name] == said[generate][name], name
