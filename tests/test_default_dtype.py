"""Whatever torch's default dtype is, and on a device without float64: the same results."""

from functools import lru_cache

import pytest
import torch
from helpers.pretend_mps import NAME, OnMPS, PretendMPS

from decoding_book.beam import beam_search
from decoding_book.checks import check_logits, float64_home, in_float64, per_row
from decoding_book.cuts import (
    dynamic_temperature,
    epsilon_cutoff,
    eta_cutoff,
    max_surprisal,
    tail_free,
    top_n_sigma,
    typical_p,
    xtc,
)
from decoding_book.distinct import (
    diverse_beam_search,
    gumbel_top_k,
    inclusion_probabilities,
    stochastic_beam_search,
)
from decoding_book.entropix import EntropySampler
from decoding_book.entropy import attention_measures, entropy, follow, varentropy
from decoding_book.exhaustive import best_first_search, exhaustive_search
from decoding_book.fused import fused_sample
from decoding_book.greedy import greedy_search
from decoding_book.loop import Prediction, generate, score
from decoding_book.noise import Key, gumbel, gumbel_max, inverse_cdf
from decoding_book.penalties import (
    dry,
    frequency_penalty,
    logit_bias,
    no_repeat_ngram,
    presence_penalty,
    repetition_penalty,
)
from decoding_book.sampler import Mirostat, Sampler, draw
from decoding_book.signature import binomial_tail, green_logits, green_test, tokens_needed
from decoding_book.smollm import SmolLM2, turns
from decoding_book.speculative import AcceptReject, ModelDrafter, speculate
from decoding_book.temperature import temperature
from decoding_book.topk import top_k
from decoding_book.topp import min_p, top_p
from decoding_book.toy import sequence_law, six_words
from decoding_book.transformer import (
    GPT,
    GPTConfig,
    Recipe,
    Trainer,
    held_out_loss,
    initialise,
    pack,
    sinusoids,
)

LOGITS = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 3
IDS = [[1, 2, 2], [3, 4, 3], [5, 6, 7]]
ROW = [2.5, 1.25, 0.1, -3.3, 0.7]


def searched(found):
    return [(h.ids.tolist(), h.logprob, h.score) for h in found]


def gpt():
    model = initialise(GPT(GPTConfig(" abcdeg", context=16, width=16, layers=2, heads=2)))
    ids = pack(model, ["bad", "a cab", "egg bag", "dead"])
    trainer = Trainer(model, ids, ids, Recipe(steps=3, batch=2, warmup=2, every=3)).run()
    return model, trainer


def trained():
    model, trainer = gpt()
    losses = torch.tensor(
        trainer.losses + [held_out_loss(model, trainer.held, 3)], dtype=torch.float64
    )
    return (
        losses,
        model(torch.tensor([model.encode("a bad cab")])).logits.detach(),
        score(model, "a bad cab"),
    )


def smollm():
    model = SmolLM2()
    return model(torch.tensor([model.encode("The capital of")])).logits, generate(
        model, "The capital of", max_new_tokens=3
    ).ids


FILTERS = [
    lambda z: temperature(z, 0.7),
    lambda z: temperature(z, [0, 0.5, 2]),
    lambda z: top_k(z, 5),
    lambda z: top_p(z, 0.8),
    lambda z: top_p(z, [0.1, 0.5, 0.9]),
    lambda z: min_p(z, 0.1),
    lambda z: repetition_penalty(z, IDS, 1.3),
    lambda z: frequency_penalty(z, IDS, 0.3),
    lambda z: presence_penalty(z, IDS, [0.1, 0.2, 0.3]),
    lambda z: no_repeat_ngram(z, IDS, 2),
    lambda z: logit_bias(z, {3: -1.1, 4: float("-inf")}),
    lambda z: dry(z, IDS, 0.8, allowed=1, breakers=[2]),
    lambda z: epsilon_cutoff(z, [0.01, 0.1, 0.5]),
    lambda z: eta_cutoff(z, 0.1),
    lambda z: typical_p(z, 0.6, "all"),
    lambda z: top_n_sigma(z, 1.1),
    lambda z: tail_free(z, 0.9),
    lambda z: xtc(z, 0.02),
    lambda z: dynamic_temperature(z, [0.5, 1, 2], 0.7, 2),
    lambda z: max_surprisal(z, 3.3),
    lambda z: Sampler(xtc_probability=[0.2, 0.5, 1], tail_free=0.95).distribution(z),
    lambda z: entropy(z),
    lambda z: varentropy(z),
    lambda z: gumbel_max(z, Key(3)),
    lambda z: gumbel_top_k(z, [1, 4, 2], Key(3)),
    lambda z: check_logits(z),
    lambda z: green_logits(z, Key(3, [1, 2, 3]), 0.5, [1, 2.1, 3]),
]
DRAWS = [
    lambda: Sampler(0.8, top_k=20, top_p=0.9, seed=1).distribution(LOGITS),
    lambda: fused_sample(LOGITS, 0.8, top_p=0.9, seed=1),
    lambda: (
        generate(
            six_words(), ["I like", "cold"], Sampler(0.8, top_p=0.9, min_p=0.05), max_new_tokens=5
        ).ids
    ),
    lambda: generate(six_words(), "I like", EntropySampler(attention=False), max_new_tokens=5).ids,
]
LISTS = [
    lambda: check_logits(ROW),
    lambda: entropy(ROW),
    lambda: varentropy(ROW),
    lambda: temperature(ROW, 0.7),
    lambda: top_p(ROW, 0.8),
    lambda: Sampler(0.8, top_p=0.9).distribution(ROW),
]
CALLS = {
    **{f"filter {n}": (lambda f: lambda: f(LOGITS))(f) for n, f in enumerate(FILTERS)},
    **{f"draw {n}": f for n, f in enumerate(DRAWS)},
    **{f"list {n}": f for n, f in enumerate(LISTS)},
    "noise": lambda: gumbel(Key(3), 1000),
    "cdf": lambda: inverse_cdf([0.2, 0.3, 0.5], [0.1, 0.6, 0.9]),
    "toy": lambda: six_words()(torch.tensor([[0, 1]])).logits,
    "law": lambda: sequence_law(six_words(), 3),
    "attention": lambda: tuple(vars(attention_measures(LOGITS[None])).values()),
    "greedy": lambda: searched([greedy_search(six_words(), "I", 4)]),
    "beam": lambda: searched(beam_search(six_words(), "I", 3, 4, n_best=3)),
    "different texts": lambda: searched(
        stochastic_beam_search(six_words(), "I", 3, 4, process=Sampler(0.8, top_p=0.9))
    ),
    "inclusion": lambda: inclusion_probabilities([0.5, 0.3, 0.2], 2),
    "groups": lambda: searched(diverse_beam_search(six_words(), "I", 4, 2, 4)),
    "exhaustive": lambda: searched(exhaustive_search(six_words(), "I", 3)),
    "best first": lambda: searched(best_first_search(six_words(), "I", 3)),
    "score": lambda: score(six_words(), ["I like", "cold"]),
    "green test": lambda: tuple(green_test([1, 2, 3, 4] * 9, Key(3), 0.3)),
    "binomial": lambda: binomial_tail(30, 20, 0.3),
    "tokens needed": lambda: tokens_needed([[0.5, 0.3, 0.15, 0.05], [0.2, 0.2, 0.3, 0.3]]),
    "sinusoids": lambda: sinusoids(300, 32),
    "turns": lambda: turns(300, 16, 1e4),
    "gpt": trained,
    "smollm": smollm,
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            same(x, y)
    elif isinstance(a, dict):
        same(list(a.items()), list(b.items()))
    else:
        assert a == b


@lru_cache(maxsize=None)
def usual(name):
    assert torch.get_default_dtype() == torch.float32
    return CALLS[name]()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_default_dtype_changes_nothing(name, dtype):
    want = usual(name)
    torch.set_default_dtype(dtype)
    try:
        got = CALLS[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    same(got, want)


def test_a_model_loaded_under_another_default_is_the_same():
    from decoding_book import smollm as module

    want = smollm()
    module.load.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = smollm()
    finally:
        torch.set_default_dtype(torch.float32)
    same(got, want)


# ---- a device without float64


class There:
    "A model whose logits, and whose ids, are on the pretended device."

    device = torch.device(NAME)

    def __init__(self, model):
        self.model, self.vocab_size, self.eos = model, model.vocab_size, model.eos
        self.encode, self.decode = model.encode, model.decode

    def __call__(self, ids, mask=None, cache=None, last_only=True, attention=False):
        logits = self.model(
            ids.cpu(), None if mask is None else mask.cpu(), last_only=last_only
        ).logits
        return Prediction(logits.float().to(NAME))


class Here(There):
    "The same on the CPU, with the same float32 logits."

    device = torch.device("cpu")

    def __call__(self, ids, mask=None, cache=None, last_only=True, attention=False):
        return Prediction(self.model(ids, mask, last_only=last_only).logits.float())


def test_the_pretended_device_has_no_float64():
    with PretendMPS():
        x = torch.ones(3).to(NAME)
        assert isinstance(x, OnMPS) and isinstance(x + 1, OnMPS) and x.device.type == NAME
        for wrong in (
            x.double,
            lambda: torch.ones(3, dtype=torch.float64, device=NAME),
            lambda: x.to("cpu", torch.float64),
            lambda: torch.tensor([1.0], dtype=torch.float64, device=NAME),
            lambda: x + torch.ones(3),
        ):
            with pytest.raises((TypeError, RuntimeError)):
                wrong()


def test_float64_numbers_of_such_a_device_are_kept_on_the_cpu():
    assert float64_home("mps") == torch.device("cpu") and float64_home("cuda:0") == torch.device(
        "cuda:0"
    )
    with PretendMPS():
        z = LOGITS.to(NAME)
        assert in_float64(z).equal(LOGITS.double())
        assert (
            per_row("T", [0.5, 1, 2], z).device.type == "cpu"
            and per_row("k", 3, z, integer=True).device.type == NAME
        )


@pytest.mark.parametrize("n", range(len(FILTERS)))
def test_filters_on_a_device_without_float64(n):
    want = FILTERS[n](LOGITS)
    with PretendMPS():
        got = FILTERS[n](LOGITS.to(NAME))
        assert got.device.type == NAME
        same(got.cpu(), want)


def test_a_draw_on_a_device_without_float64():
    sampler, key = Sampler(0.8, top_k=20, top_p=0.9, min_p=0.02), Key(3)
    want, law = draw(LOGITS, sampler, key, backend="plain"), sampler.distribution(LOGITS)
    with PretendMPS():
        z = LOGITS.to(NAME)
        got = draw(z, sampler, key)
        for x, y in zip(
            (got.ids, got.kept, got.logprob, sampler.distribution(z)),
            (want.ids, want.kept, want.logprob, law),
        ):
            assert x.device.type == NAME
            same(x.cpu(), y)


@pytest.mark.parametrize(
    "f",
    [
        lambda m: score(m, ["I like", "cold"]),
        lambda m: generate(m, ["I like", "cold"], max_new_tokens=4).ids,
        lambda m: searched([greedy_search(m, "I", 4)]),
        lambda m: searched(beam_search(m, "I", 3, 4, n_best=3)),
        lambda m: searched(stochastic_beam_search(m, ["I", "I like"], 3, 3)[1]),
        lambda m: searched(diverse_beam_search(m, "I", 4, 2, 4)),
        lambda m: searched(exhaustive_search(m, "I", 3)),
        lambda m: searched(best_first_search(m, "I", 3)),
        lambda m: generate(m, ["I", "cold"], Mirostat(2.0, 0.4), 4).ids,
        lambda m: speculate(m, ["I"], AcceptReject(Sampler()), 4, drafter=ModelDrafter(m)).ids,
        lambda m: follow(m, ["I like", "cold coffee"], attention=False).logprobs,
    ],
    ids=[
        "score",
        "generate",
        "greedy",
        "beam",
        "distinct",
        "groups",
        "exhaustive",
        "best first",
        "mirostat",
        "drafts",
        "follow",
    ],
)
def test_searches_and_scores_on_a_device_without_float64(f):
    want = f(Here(six_words()))
    with PretendMPS():
        got = f(There(six_words()))
        if isinstance(got, torch.Tensor):
            got = got.cpu()
        elif isinstance(got, list) and isinstance(got[0], torch.Tensor):
            got = [x.cpu() for x in got]
    same(got, want)


def test_the_policy_says_that_such_a_device_is_not_enough():
    with PretendMPS(), pytest.raises(ValueError, match="has no float64, which the policy needs"):
        generate(There(six_words()), "I", EntropySampler(attention=False), 3)
