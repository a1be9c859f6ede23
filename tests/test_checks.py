"""The shared checks: what is refused, by which error, and that one kind of mistake is one type of error everywhere."""
import numpy as np
import pytest
import torch

from decoding_book.checks import (NotAnInteger, check_answer, check_logits, check_number, key_part, log_normalizer,
                                  one_of, per_row, row_name, whole)

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
