"""The shared checks: what is refused, by which error, and that one kind of mistake is one type of error everywhere."""
import numpy as np
import pytest
import torch

from decoding_book.beam import beam_search
from decoding_book.checks import (NotAnInteger, check_answer, check_logits, check_number, key_part, log_normalizer,
                                  one_of, per_row, row_name, whole)
from decoding_book.entropix import EntropixConfig, EntropySampler, PublishedConfig
from decoding_book.exhaustive import best_first_search, exhaustive_search
from decoding_book.fused import fused_sample
from decoding_book.greedy import greedy_search, repeated_ngrams
from decoding_book.loop import generate, score, stream
from decoding_book.noise import Key, gumbel
from decoding_book.penalties import logit_bias, min_length, no_repeat_ngram, repetition_penalty
from decoding_book.sampler import Sampler
from decoding_book.temperature import temperature
from decoding_book.topk import top_k
from decoding_book.topp import min_p, top_p
from decoding_book.toy import TableModel, sequence_law, six_words


W, Z, SAID = six_words(), torch.zeros(2, 6), torch.zeros(2, 3, dtype=torch.long)
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("at, name", [([], "row 0"), ((3,), "row 3"), ([0, 1], "row 0, 1")])
def test_a_row_is_named_by_its_place(at, name):
    assert row_name(at) == name


@pytest.mark.parametrize("check", [log_normalizer, check_logits])
@pytest.mark.parametrize("bad, text", [(NAN, "has NaN"), (INF, r"has \+inf"), (-INF, "has no finite logit")])
def test_a_row_that_is_no_distribution_is_named(check, bad, text):
    z = torch.zeros(2, 3, 4)
    z[1, 2] = bad
    with pytest.raises(ValueError, match=f"^logits: row 1, 2 {text}"): check(z)
    with pytest.raises(ValueError, match=f"^logits: row 0 {text}"): check(z[1, 2])


def test_sound_logits_pass_unchanged():
    z = torch.randn(3, 5, dtype=torch.float64)
    assert check_logits(z) is z and log_normalizer(z).allclose(z.exp().sum(-1).log())
    z[:, 0] = -INF
    assert torch.equal(check_logits(z.half()), z.half().float())
    assert log_normalizer(z.bfloat16()).dtype == torch.float32


def test_an_answer_of_another_shape_is_refused():
    check_answer(torch.zeros(2, 3), 2, 3)
    for shape in ((3, 2), (2, 3, 1), (2,)):
        with pytest.raises(ValueError, match="^model: returned logits of shape"): check_answer(torch.zeros(2, 3), *shape)


@pytest.mark.parametrize("value", [2.5, 2.0, "2", None, True, np.bool_(True), NAN, torch.tensor(2), [2]])
def test_a_count_is_an_integer_and_nothing_else(value):
    with pytest.raises(NotAnInteger, match="^n: .* is not an integer"): whole("n", value)


def test_who_catches_a_type_error_or_a_value_error_catches_what_is_no_integer():
    assert issubclass(NotAnInteger, TypeError) and issubclass(NotAnInteger, ValueError)


def test_counts_have_limits():
    assert [whole("n", 1), whole("n", np.uint8(8), most=8), whole("n", 0, least=0)] == [1, 8, 0]
    for value, text in (0, "n: 0 is below 1"), (9, "n: 9 is above 8, the width"):
        with pytest.raises(ValueError, match=text) as error: whole("n", value, most=8, why=", the width")
        assert not isinstance(error.value, TypeError)


@pytest.mark.parametrize("value, limits, error, text", [
    ("1", {}, TypeError, "x: '1' is not a number"), (None, {}, TypeError, "x: None is not"),
    (True, {}, TypeError, "x: True is not"), (1j, {}, TypeError, "x: 1j is not"),
    (NAN, {}, ValueError, r"x: nan is outside \(-inf, inf\)"), (INF, {}, ValueError, "x: inf is outside"),
    (-1, dict(low=0), ValueError, r"x: -1 is outside \[0, inf\)"),
    (0, dict(low=0, high=1, open_low=True), ValueError, r"x: 0 is outside \(0, 1\]"),
    (np.float32(1.5), dict(low=0, high=1), ValueError, r"x: 1.5 is outside \[0, 1\]"),
    (2.5, dict(integer=True), NotAnInteger, "x: 2.5 is not an integer"),
    (10**400, {}, ValueError, "is outside"),
])
def test_one_number(value, limits, error, text):
    with pytest.raises(error, match=text): check_number("x", value, **limits)
    rows = torch.zeros(2, 3)
    with pytest.raises(error, match=text.replace("x: ", "x, row 1: ")): per_row("x", [limits.get("high", 1), value], rows, **limits)


def test_numbers_come_back_plain():
    for value, found in ((1, 1.), (np.float64(.5), .5), (0, 0.)):
        x = check_number("x", value)
        assert type(x) is float and x == found
    assert check_number("x", 2.0, integer=True) == 2 and type(check_number("x", 2.0, integer=True)) is int


@pytest.mark.parametrize("value, bits, error, text", [
    (1.0, 32, NotAnInteger, "k: 1.0 is not an integer"), (True, 32, NotAnInteger, "k: True"),
    ([0, None], 32, NotAnInteger, "k, row 1: None"), (torch.tensor([1.]), 32, NotAnInteger, "k: torch.float32"),
    (-1, 64, ValueError, r"k: -1 is outside 0..2\^64 - 1"), (2**32, 32, ValueError, "k: 4294967296 is outside"),
    (torch.tensor([0, -1]), 64, ValueError, "k, row 1: -1"), (torch.tensor([0, 2**32]), 32, ValueError, "k, row 1"),
    ([[1]], 32, ValueError, r"k: shape \(1, 1\)"),
])
def test_parts_of_a_key(value, bits, error, text):
    with pytest.raises(error, match=text): key_part("k", value, bits)


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
    "TableModel eos": lambda n: TableModel([.5, .5], [[.5, .5]] * 2, eos=n),
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
    "logit_bias logit_bias": lambda n: logit_bias(Z, {n: 1.}),
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
    "No number: TypeError. 2.5 for an integer: TypeError. Out of bounds: ValueError and nothing else. Each names its argument."
    call = (COUNTS | WHOLE | NUMBERS)[name]
    def error(value):
        with pytest.raises((TypeError, ValueError)) as caught: call(value)
        assert name.split()[1] in str(caught.value).split(":")[0], caught.value
        return caught.value
    for value in (1j, b"x", True): assert isinstance(error(value), TypeError), value
    if name not in NUMBERS: assert isinstance(error(2.5), TypeError)
    if name in WHOLE: call(2.0)
    if name in COUNTS: assert isinstance(error(2.0), TypeError)
    assert not isinstance(error(-65), TypeError)
    if name not in COUNTS: assert not isinstance(error(NAN), TypeError)


NAMES = {
    "beam_search dialect": lambda x: beam_search(W, "I", 2, 2, dialect=x),
    "beam_search early_stopping": lambda x: beam_search(W, "I", 2, 2, early_stopping=x),
    "EntropixConfig off": lambda x: EntropixConfig(off=(x,)),
    "Sampler ties": lambda x: Sampler(ties=x),
    "Sampler boundary": lambda x: Sampler(boundary=x),
    "Sampler order": lambda x: Sampler(order=(x,)),
    "Sampler.dialect system": lambda x: Sampler.dialect(x),
    "top_p ties": lambda x: top_p(Z, .5, ties=x),
    "top_p boundary": lambda x: top_p(Z, .5, boundary=x),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["other", 7, 2.5])
def test_what_is_none_of_the_names_is_a_value_error(name, value):
    with pytest.raises(ValueError, match=f"^{name.split()[1]}"): NAMES[name](value)


def test_a_parameter_a_row_has_one_entry_a_row():
    rows = torch.zeros(2, 3, 4)
    for value in ([1, 2, 3], [1, 2], torch.ones(3, 2), torch.ones(6), torch.ones(2, 3, 1)):
        with pytest.raises(ValueError, match=r"x: shape .*, expected \(\) or \(2, 3\)"): per_row("x", value, rows)
    assert per_row("x", torch.ones(2, 3), rows).shape == (2, 3, 1)
