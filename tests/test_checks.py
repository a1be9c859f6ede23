"""The shared checks: what is refused, by which error, and that one kind of mistake is one type of
error everywhere."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from decoding_book.beam import beam_search
from decoding_book.checks import (
    NotAnInteger,
    check_answer,
    check_logits,
    check_number,
    key_part,
    log_normalizer,
    one_of,
    per_row,
    row_name,
    whole,
)
from decoding_book.entropix import (
    EntropixConfig,
    EntropySampler,
    PublishedConfig,
    calibrate,
)
from decoding_book.entropy import follow, measure
from decoding_book.exhaustive import best_first_search, exhaustive_search
from decoding_book.fused import fused_sample
from decoding_book.greedy import greedy_search, repeated_ngrams
from decoding_book.loop import generate, score, stream
from decoding_book.noise import Key, chi_square, gumbel, gumbel_max, inverse_cdf, uniform_bits
from decoding_book.penalties import (
    bias_vector,
    logit_bias,
    min_length,
    no_repeat_ngram,
    repetition_penalty,
)
from decoding_book.sampler import Sampler, draw
from decoding_book.temperature import temperature
from decoding_book.topk import top_k
from decoding_book.topp import min_p, top_p, top_p_mask
from decoding_book.toy import TableModel, sequence_law, six_words
from decoding_book.transformer import GPT, GPTConfig
from decoding_book.trees import tree_html

W, Z, SAID = six_words(), torch.zeros(2, 6), torch.zeros(2, 3, dtype=torch.long)
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("at, name", [([], "row 0"), ((3,), "row 3"), ([0, 1], "row 0, 1")])
def test_a_row_is_named_by_its_place(at, name):
    assert row_name(at) == name


@pytest.mark.parametrize("check", [log_normalizer, check_logits])
@pytest.mark.parametrize(
    "bad, text", [(NAN, "has NaN"), (INF, r"has \+inf"), (-INF, "has no finite logit")]
)
def test_a_row_that_is_no_distribution_is_named(check, bad, text):
    z = torch.zeros(2, 3, 4)
    z[1, 2] = bad
    with pytest.raises(ValueError, match=f"^logits: row 1, 2 {text}"):
        check(z)
    with pytest.raises(ValueError, match=f"^logits: row 0 {text}"):
        check(z[1, 2])


def test_sound_logits_pass_unchanged():
    z = torch.randn(3, 5, dtype=torch.float64)
    assert check_logits(z) is z and log_normalizer(z).allclose(z.exp().sum(-1).log())
    z[:, 0] = -INF
    assert torch.equal(check_logits(z.half()), z.half().float())
    assert log_normalizer(z.bfloat16()).dtype == torch.float32


def test_an_answer_of_another_shape_is_refused():
    check_answer(torch.zeros(2, 3), 2, 3)
    for shape in ((3, 2), (2, 3, 1), (2,)):
        with pytest.raises(ValueError, match="^model: returned logits of shape"):
            check_answer(torch.zeros(2, 3), *shape)


@pytest.mark.parametrize(
    "value", [2.5, 2.0, "2", None, True, np.bool_(True), NAN, torch.tensor(2), [2]]
)
def test_a_count_is_an_integer_and_nothing_else(value):
    with pytest.raises(NotAnInteger, match="^n: .* is not an integer"):
        whole("n", value)


def test_who_catches_a_type_error_or_a_value_error_catches_what_is_no_integer():
    assert issubclass(NotAnInteger, TypeError) and issubclass(NotAnInteger, ValueError)


def test_counts_have_limits():
    assert [whole("n", 1), whole("n", np.uint8(8), most=8), whole("n", 0, least=0)] == [1, 8, 0]
    for value, text in (0, "n: 0 is below 1"), (9, "n: 9 is above 8, the width"):
        with pytest.raises(ValueError, match=text) as error:
            whole("n", value, most=8, why=", the width")
        assert not isinstance(error.value, TypeError)


@pytest.mark.parametrize(
    "value, limits, error, text",
    [
        ("1", {}, TypeError, "x: '1' is not a number"),
        (None, {}, TypeError, "x: None is not"),
        (True, {}, TypeError, "x: True is not"),
        (1j, {}, TypeError, "x: 1j is not"),
        (NAN, {}, ValueError, r"x: nan is outside \(-inf, inf\)"),
        (INF, {}, ValueError, "x: inf is outside"),
        (-1, dict(low=0), ValueError, r"x: -1 is outside \[0, inf\)"),
        (0, dict(low=0, high=1, open_low=True), ValueError, r"x: 0 is outside \(0, 1\]"),
        (np.float32(1.5), dict(low=0, high=1), ValueError, r"x: 1.5 is outside \[0, 1\]"),
        (2.5, dict(integer=True), NotAnInteger, "x: 2.5 is not an integer"),
        (10**400, {}, ValueError, "is outside"),
    ],
)
def test_one_number_is_refused_by_its_name(value, limits, error, text):
    with pytest.raises(error, match=text):
        check_number("x", value, **limits)
    rows = torch.zeros(2, 3)
    with pytest.raises(error, match=text.replace("x: ", "x, row 1: ")):
        per_row("x", [limits.get("high", 1), value], rows, **limits)


def test_numbers_come_back_plain():
    for value, found in ((1, 1.0), (np.float64(0.5), 0.5), (0, 0.0)):
        x = check_number("x", value)
        assert type(x) is float and x == found
    assert (
        check_number("x", 2.0, integer=True) == 2
        and type(check_number("x", 2.0, integer=True)) is int
    )


@pytest.mark.parametrize(
    "value, bits, error, text",
    [
        (1.0, 32, NotAnInteger, "k: 1.0 is not an integer"),
        (True, 32, NotAnInteger, "k: True"),
        ([0, None], 32, NotAnInteger, "k, row 1: None"),
        (torch.tensor([1.0]), 32, NotAnInteger, "k: torch.float32"),
        (-1, 64, ValueError, r"k: -1 is outside 0..2\^64 - 1"),
        (2**32, 32, ValueError, "k: 4294967296 is outside"),
        (torch.tensor([0, -1]), 64, ValueError, "k, row 1: -1"),
        (torch.tensor([0, 2**32]), 32, ValueError, "k, row 1"),
        ([[1]], 32, ValueError, r"k: shape \(1, 1\)"),
    ],
)
def test_parts_of_a_key(value, bits, error, text):
    with pytest.raises(error, match=text):
        key_part("k", value, bits)


def test_a_seed_keeps_its_64_bits():
    assert key_part("seed", 2**64 - 1, 64) == 2**64 - 1
    assert key_part("seed", [2**64 - 1, 5], 64).tolist() == [-1, 5]
    assert key_part("seed", torch.tensor([2**64 - 1], dtype=torch.uint64), 64).tolist() == [-1]


def test_a_choice_is_one_of_its_names():
    assert one_of("early", False, (None, True, False)) is False
    for bad in (0, "true", [True], {}):
        with pytest.raises(ValueError, match="^early: .* is not one of None, True, False"):
            one_of("early", bad, (None, True, False))


def test_old_import_paths_still_work():
    from decoding_book import exhaustive, loop, temperature

    assert loop.log_normalizer is log_normalizer and exhaustive.whole is whole
    assert temperature.check_logits is check_logits and temperature.per_row is per_row


# ---- one kind of mistake is one type of error, wherever it is made

COUNTS = {  # argument: a call with it; integers only
    "generate max_new_tokens": lambda n: generate(W, "I", max_new_tokens=n),
    "generate alternatives": lambda n: generate(W, "I", alternatives=n),
    "stream max_new_tokens": lambda n: stream(W, "I", max_new_tokens=n),
    "score chunk": lambda n: score(W, "I like", chunk=n),
    "sequence_law max_new_tokens": lambda n: sequence_law(W, n),
    "TableModel eos": lambda n: TableModel([0.5, 0.5], [[0.5, 0.5]] * 2, eos=n),
    "exhaustive_search max_new_tokens": lambda n: exhaustive_search(W, "I", n),
    "exhaustive_search n_best": lambda n: exhaustive_search(W, "I", 2, n_best=n),
    "exhaustive_search limit": lambda n: exhaustive_search(W, "I", 2, limit=n),
    "exhaustive_search batch": lambda n: exhaustive_search(W, "I", 2, batch=n),
    "best_first_search max_new_tokens": lambda n: best_first_search(W, "I", n),
    "best_first_search n_best": lambda n: best_first_search(W, "I", 2, n_best=n),
    "best_first_search max_rows": lambda n: best_first_search(W, "I", 2, max_rows=n),
    "best_first_search batch": lambda n: best_first_search(W, "I", 2, batch=n),
    "best_first_search chunk": lambda n: best_first_search(W, "I", 2, chunk=n),
    "greedy_search max_new_tokens": lambda n: greedy_search(W, "I", n),
    "repeated_ngrams n": lambda n: repeated_ngrams([1, 2, 3], n),
    "beam_search width": lambda n: beam_search(W, "I", n, 2),
    "beam_search max_new_tokens": lambda n: beam_search(W, "I", 2, n),
    "beam_search n_best": lambda n: beam_search(W, "I", 2, 2, n_best=n),
    "Key seed": lambda n: Key(seed=n).words(),
    "Key position": lambda n: Key(position=n).words(),
    "gumbel tokens": lambda n: gumbel(Key(), n),
    "Sampler seed": lambda n: Sampler(seed=n),
    "Sampler rows": lambda n: Sampler(rows=[n]),
    "Sampler eos": lambda n: Sampler(eos=[n]),
    "fused_sample seed": lambda n: fused_sample(Z, seed=n),
    "fused_sample position": lambda n: fused_sample(Z, position=n),
    "EntropySampler seed": lambda n: EntropySampler(seed=n),
    "EntropySampler clarify": lambda n: EntropySampler(clarify=n),
    "min_length eos": lambda n: min_length(Z, 0, 1, n),
    "logit_bias logit_bias": lambda n: logit_bias(Z, {n: 1.0}),
    "generate stop": lambda n: generate(W, "I", stop=[n]),
}
WHOLE = {  # whole numbers, of any type
    "top_k k": lambda k: top_k(Z, k),
    "no_repeat_ngram n": lambda n: no_repeat_ngram(Z, SAID, n),
    "min_length generated": lambda n: min_length(Z, n, 2, 5),
    "min_length least": lambda n: min_length(Z, 0, n, 5),
    "Sampler top_k": lambda k: Sampler(top_k=[1, k]),
    "Sampler no_repeat_ngram": lambda n: Sampler(no_repeat_ngram=n),
    "Sampler min_new_tokens": lambda n: Sampler(min_new_tokens=n, eos=5),
    "fused_sample top_k": lambda k: fused_sample(Z, top_k=k),
    "EntropixConfig top_k": lambda k: EntropixConfig(top_k=k),
    "EntropixConfig n_adaptive_samples": lambda n: EntropixConfig(n_adaptive_samples=n),
    "PublishedConfig top_k": lambda k: PublishedConfig(top_k=k),
}
NUMBERS = {  # real numbers, none of which may be below -64
    "temperature T": lambda x: temperature(Z, [1, x]),
    "top_p p": lambda x: top_p(Z, x),
    "min_p m": lambda x: min_p(Z, x),
    "repetition_penalty theta": lambda x: repetition_penalty(Z, SAID, x),
    "Sampler temperature": lambda x: Sampler(temperature=x),
    "Sampler top_p": lambda x: Sampler(top_p=x),
    "Sampler min_p": lambda x: Sampler(min_p=x),
    "Sampler repetition_penalty": lambda x: Sampler(repetition_penalty=x),
    "fused_sample temperature": lambda x: fused_sample(Z, temperature=x),
    "beam_search length_penalty": lambda x: beam_search(W, "I", 2, 2, length_penalty=x),
    "EntropixConfig temp": lambda x: EntropixConfig(temp=x),
    "EntropixConfig typical": lambda x: EntropixConfig(typical=(1, 1, 1, 1, 1, x)),
}


@pytest.mark.parametrize("name", COUNTS | WHOLE | NUMBERS)
def test_one_kind_of_mistake_is_one_type_of_error(name):
    """No number: TypeError. 2.5 for an integer: TypeError. Out of bounds: ValueError and nothing
    else. Each names its argument."""
    call = (COUNTS | WHOLE | NUMBERS)[name]

    def error(value):
        with pytest.raises((TypeError, ValueError)) as caught:
            call(value)
        assert name.split()[1] in str(caught.value).split(":")[0], caught.value
        return caught.value

    for value in (1j, b"x", True):
        assert isinstance(error(value), TypeError), value
    if name not in NUMBERS:
        assert isinstance(error(2.5), TypeError)
    if name in WHOLE:
        call(2.0)
    if name in COUNTS:
        assert isinstance(error(2.0), TypeError)
    assert not isinstance(error(-65), TypeError)
    if name not in COUNTS:
        assert not isinstance(error(NAN), TypeError)


NAMES = {
    "beam_search dialect": lambda x: beam_search(W, "I", 2, 2, dialect=x),
    "beam_search early_stopping": lambda x: beam_search(W, "I", 2, 2, early_stopping=x),
    "EntropixConfig off": lambda x: EntropixConfig(off=(x,)),
    "Sampler ties": lambda x: Sampler(ties=x),
    "Sampler boundary": lambda x: Sampler(boundary=x),
    "Sampler order": lambda x: Sampler(order=(x,)),
    "Sampler.dialect system": lambda x: Sampler.dialect(x),
    "top_p ties": lambda x: top_p(Z, 0.5, ties=x),
    "top_p boundary": lambda x: top_p(Z, 0.5, boundary=x),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["other", 7, 2.5])
def test_what_is_none_of_the_names_is_a_value_error(name, value):
    with pytest.raises(ValueError, match=f"^{name.split()[1]}"):
        NAMES[name](value)


def test_a_parameter_a_row_has_one_entry_a_row():
    rows = torch.zeros(2, 3, 4)
    for value in ([1, 2, 3], [1, 2], torch.ones(3, 2), torch.ones(6), torch.ones(2, 3, 1)):
        with pytest.raises(ValueError, match=r"x: shape .*, expected \(\) or \(2, 3\)"):
            per_row("x", value, rows)
    assert per_row("x", torch.ones(2, 3), rows).shape == (2, 3, 1)


# ---- the checks


@pytest.mark.parametrize(
    "logits, error, text",
    [
        (torch.tensor([[0.0, 1], [NAN, 0]]), ValueError, "logits: row 1 has NaN"),
        (torch.tensor([[0.0, 1], [INF, 0]]), ValueError, "logits: row 1 has [+]inf"),
        (torch.full((2, 2, 3), -INF), ValueError, "logits: row 0, 0 has no finite logit"),
        (torch.tensor([NAN, 0.0]), ValueError, "logits: row 0 has NaN"),
        (torch.zeros(3, 0), ValueError, "logits: shape"),
        (torch.tensor(1.0), ValueError, "logits: shape"),
        (1.0, ValueError, "logits: shape"),
        (torch.zeros(2, 2, dtype=torch.long), TypeError, "int64"),
        (torch.zeros(2, 2, dtype=torch.bool), TypeError, "bool"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "complex"),
        ([1, 2], TypeError, "int64"),
        ("ab", TypeError, "logits"),
        (None, TypeError, "logits"),
        ([[1.0], [1.0, 2.0]], TypeError, "logits"),
        ([], ValueError, "logits: shape"),
        ({}, TypeError, "logits"),
    ],
)
def test_bad_logits_are_refused_by_their_row(logits, error, text):
    for f in (check_logits, lambda z: temperature(z, 1.0), lambda z: top_k(z, 3)):
        with pytest.raises(error, match=text):
            f(logits)


def test_good_logits_keep_their_values():
    assert check_logits([1.0, -INF]).tolist() == [1.0, -INF]
    assert check_logits(np.array([1.0, 2.0])).dtype == torch.float64
    assert check_logits(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert check_logits(torch.ones(0, 4)).shape == (0, 4)
    assert check_logits(torch.tensor([3.4e38] * 9)).isfinite().all()


@pytest.mark.parametrize(
    "value, error, text",
    [
        (-0.1, ValueError, r"x: -0.1 is outside \[0, 1\]"),
        (NAN, ValueError, "x: nan"),
        (INF, ValueError, "x: inf"),
        (2, ValueError, "x: 2 is"),
        ([0, -1.0], ValueError, "x, row 1: -1.0"),
        (torch.tensor([0, NAN]), ValueError, "x, row 1: nan"),
        ([1.0, 1.0, 1.0], ValueError, r"x: shape \(3,\), expected \(\) or \(2,\)"),
        ([[1.0, 1.0]], ValueError, "x: shape"),
        ([], ValueError, "x: shape"),
        ([1.0, [1.0, 1.0]], (TypeError, ValueError), "x"),
        (True, TypeError, "x: True"),
        ([True, False], TypeError, "x, row 0: True"),
        (torch.tensor([True, False]), TypeError, "x, row 0: True"),
        ("a", TypeError, "x: 'a'"),
        (["a", "b"], TypeError, "x, row 0: 'a'"),
        (1j, TypeError, "x"),
        (torch.tensor(1j), TypeError, "x"),
        (None, TypeError, "x: None"),
        ([None, 0.5], TypeError, "x, row 0: None"),
        ({}, TypeError, "x"),
        (Decimal("0.5"), TypeError, "x"),
        (np.array([0.5, 7.0]), ValueError, "x, row 1: 7.0"),
        (10**400, ValueError, "x: 1000"),
        (object(), TypeError, "x"),
    ],
)
def test_bad_parameters_are_refused_by_their_limits(value, error, text):
    with pytest.raises(error, match=text):
        per_row("x", value, torch.zeros(2, 5), low=0, high=1)


def test_good_parameters_take_a_value_a_row():
    z = torch.zeros(2, 3, 5)
    assert per_row("x", 0.5, z).shape == per_row("x", torch.tensor(0.5), z).shape == (1,)
    assert (
        per_row("x", np.float32(0.5), z).item() == 0.5
        and per_row("x", Fraction(1, 2), z).item() == 0.5
    )
    assert per_row("x", torch.rand(2, 3), z).shape == (2, 3, 1)
    assert (
        per_row("x", torch.rand(2, 3), z).dtype == torch.float64
        and per_row("x", 3, z, integer=True).dtype == torch.int64
    )
    assert per_row("x", [[1, None, 2]] * 2, z, integer=True, off=7)[0, :, 0].tolist() == [1, 7, 2]
    assert (
        per_row("x", None, z, off=0.0).item() == 0.0
        and per_row("x", 2.0, z, integer=True).item() == 2
    )
    assert per_row("x", 0, z, low=0).item() == 0
    for bad in (0, -1):
        pytest.raises(ValueError, per_row, "x", bad, z, low=0, open_low=True)
    with pytest.raises(ValueError, match=r"x: 0 is outside \(0, inf\)"):
        per_row("x", 0, z, low=0, open_low=True)
    with pytest.raises(ValueError, match="2.5 is not an integer"):
        per_row("x", 2.5, z, integer=True)
    for bad in (NAN, INF, -INF):
        pytest.raises(ValueError, per_row, "x", bad, z, integer=True)
    assert (
        per_row("x", 10**30, z, integer=True).item() == 2**62
        and per_row("x", -5.5, z).item() == -5.5
    )


def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig("abcdef ", context=16, width=16, layers=2, heads=2)).requires_grad_(False)


# ---- Python's floats are not rounded on the way


def test_a_list_means_what_an_array_means():
    assert inverse_cdf([0.3, 0.7], 0.3) == inverse_cdf(np.array([0.3, 0.7]), 0.3) == 1
    assert (
        top_p_mask([0.7, 0.3], 0.7).tolist()
        == top_p_mask(np.array([0.7, 0.3]), 0.7).tolist()
        == [True, False]
    )
    assert bias_vector({0: 0.1}, 1).item() == bias_vector([0.1]).item() == 0.1
    assert logit_bias(torch.zeros(2).double(), {0: 1e300})[0] == 1e300


# ---- refused, with the argument and the value

REFUSED = [
    (lambda: chi_square([90, 10], [NAN, 1.0]), ValueError, r"probabilities: \[nan, 1.0\]"),
    (lambda: chi_square([90, 10], [-0.5, 1.5]), ValueError, r"probabilities: \[-0.5, 1.5\]"),
    (lambda: chi_square([0, 0], [0.5, 0.5]), ValueError, r"counts: \[0.0, 0.0\]"),
    (
        lambda: chi_square([5, 5], [0.5, 0.3, 0.2]),
        ValueError,
        r"counts: shape \(2,\), probabilities \(3,\)",
    ),
    (
        lambda: inverse_cdf([[0.5, 0.5], [0.2, 0.8]], [[0.3], [0.1]]),
        ValueError,
        r"u: shape \(2, 1\), expected \(\) or \(2,\)",
    ),
    (lambda: gumbel_max(torch.zeros(3), 5), TypeError, "key: 5 is no Key"),
    (lambda: uniform_bits(5, 3), TypeError, "key: 5 is no Key"),
    (lambda: draw(torch.zeros(1, 3), Sampler(), 5), TypeError, "key: 5 is no Key"),
    (
        lambda: draw(torch.zeros(2, 6), Sampler(), Key(0, [1])),
        ValueError,
        r"key: row of shape \(1,\)",
    ),
    (lambda: fused_sample(torch.zeros(2, 6), row=[1]), ValueError, r"key: row of shape \(1,\)"),
    (lambda: logit_bias(torch.zeros(8), {5: 1.0, 7: NAN}), ValueError, "id 7: nan"),
    (lambda: bias_vector([True, False]), TypeError, "logit_bias: torch.bool"),
    (lambda: sequence_law(W, 1, prompt=["I", "cold"]), ValueError, "prompt: 2 prompts"),
    (lambda: sequence_law(W, -1), ValueError, "max_new_tokens: -1"),
    (lambda: W.decode([-1]), ValueError, r"ids: id -1 at index 0 is outside the vocabulary 0\.\.5"),
    (
        lambda: tiny().decode([9]),
        ValueError,
        r"ids: id 9 at index 0 is outside the vocabulary 0\.\.8",
    ),
    (lambda: tiny()(torch.tensor([[0, -1]])), ValueError, "ids: -1 is outside"),
    (
        lambda: tiny()(torch.tensor([[0, 2, 3]]), mask=torch.tensor([[True]])),
        ValueError,
        r"mask: shape \(1, 1\), expected \(1, 3\)",
    ),
    (lambda: follow(tiny(), "a" * 16), ValueError, "texts, row 0: 17 tokens, the context has 16"),
    (
        lambda: measure(tiny()(torch.tensor([[0, 2]]), attention=True), 0),
        ValueError,
        "layers: 0 of a model with 2 layers",
    ),
    (
        lambda: measure(tiny()(torch.tensor([[0, 2]]), attention=True), [7]),
        ValueError,
        r"layers: \[7\]",
    ),
    (
        lambda: measure(tiny()(torch.tensor([[0, 2]]), attention=True), slice(5, 9)),
        ValueError,
        "layers: slice",
    ),
    (lambda: calibrate(tiny(), "abc", PublishedConfig()), TypeError, "config: PublishedConfig"),
    (lambda: score(W, "I like", 1.5), ValueError, "chunk: 1.5"),
    (lambda: exhaustive_search(W, "I", 2, limit=None), ValueError, "limit: None"),
    (lambda: tree_html({(): 0.5, ("a",): 0.5}, {"x": ()}), ValueError, "paths: 'x' is empty"),
]


@pytest.mark.parametrize("call,kind,words", REFUSED)
def test_what_is_refused_names_its_argument(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
