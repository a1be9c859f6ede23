"""What the docstrings promise, called as they say, at the edges: small cases from every module."""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from decoding_book.beam import beam_search
from decoding_book.entropix import Decision, PublishedConfig, calibrate, draw_decided
from decoding_book.entropy import follow, measure
from decoding_book.exhaustive import best_first_search, exhaustive_search
from decoding_book.fused import fused_sample
from decoding_book.loop import generate, score
from decoding_book.noise import Key, chi_square, gumbel_max, inverse_cdf, uniform_bits
from decoding_book.penalties import bias_vector, frequency_penalty, logit_bias, presence_penalty
from decoding_book.sampler import Sampler, draw
from decoding_book.show import surprisal
from decoding_book.toy import sequence_law, six_words
from decoding_book.topp import top_p_mask
from decoding_book.transformer import GPT, GPTConfig
from decoding_book.trees import tree_html

INF, NAN, WORLD = math.inf, math.nan, six_words()


def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig("abcdef ", context=16, width=16, layers=2, heads=2)).requires_grad_(False)


# ---- what a search says of itself

def test_a_beam_claims_no_proof():
    found = beam_search(WORLD, "I", 1, 3)
    assert not found.proven and found.bound == math.inf and repr(found).endswith("not proven")
    assert found[0].logprob < exhaustive_search(WORLD, "I", 3, 1)[0].logprob


@pytest.mark.parametrize("search", [best_first_search, exhaustive_search])
def test_no_text_outside_is_above_the_bound(search):
    for prompt in "", "I", "cold coffee":
        for length in 1, 2, 3:
            every = exhaustive_search(WORLD, prompt, length, 10**6)
            for n in 1, 2, 7, 10**6:
                found = search(WORLD, prompt, length, n)
                inside = {tuple(h.ids.tolist()) for h in found}
                outside = [h.logprob for h in every if tuple(h.ids.tolist()) not in inside]
                assert found.proven and all(p <= found.bound + 1e-12 for p in outside)
                assert outside or found.bound == -math.inf


def test_a_found_text_can_be_looked_for():
    found = exhaustive_search(WORLD, "I", 3, 4)
    assert found[2] in found and found.index(found[2]) == 2 and found[0] != found[1]


# ---- Python's floats are not rounded on the way

def test_a_list_means_what_an_array_means():
    assert inverse_cdf([.3, .7], .3) == inverse_cdf(np.array([.3, .7]), .3) == 1
    assert top_p_mask([.7, .3], .7).tolist() == top_p_mask(np.array([.7, .3]), .7).tolist() == [True, False]
    assert bias_vector({0: .1}, 1).item() == bias_vector([.1]).item() == .1
    assert logit_bias(torch.zeros(2).double(), {0: 1e300})[0] == 1e300


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.uint8])
def test_token_ids_of_any_integer_type(kind):
    expected = uniform_bits(Key(1), torch.tensor([[0, 2]]))
    assert uniform_bits(Key(1), np.array([[0, 2]], dtype=kind)).equal(expected)
    assert uniform_bits(Key(1), torch.tensor([0, 2], dtype=torch.uint32)).equal(expected[0])


# ---- the law of a world, and its loop

def test_a_law_ends_where_the_loop_ends():
    assert set(sequence_law(WORLD, 9)) == set(sequence_law(WORLD, 5)) and sequence_law(WORLD, 0) == {(): 1.}
    assert generate(WORLD, "", max_new_tokens=9, ignore_eos=True).reason == "context"
    world = six_words()
    world.end_ids = [2]
    law = sequence_law(world, 3)
    assert (2,) in law and not any(2 in ids[:-1] for ids in law)


# ---- a key is a key

def test_a_key_without_rows_names_them_by_place():
    z = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(3).double()
    decision = Decision(torch.full((3,), 4), torch.full((3,), 3), ones, ones, 0 * ones.long(), 0 * ones)   # all draw n times
    for key in Key(5), Key(torch.tensor(5)):
        ids, kept = draw_decided(z, decision, key, 3)
        same, _ = draw_decided(z, decision, Key(5, row=[0, 1, 2]), 3)
        assert ids.equal(same) and len(kept) == 3


# ---- refused, with the argument and the value

REFUSED = [
    (lambda: chi_square([90, 10], [NAN, 1.]), ValueError, r"probabilities: \[nan, 1.0\]"),
    (lambda: chi_square([90, 10], [-.5, 1.5]), ValueError, r"probabilities: \[-0.5, 1.5\]"),
    (lambda: chi_square([0, 0], [.5, .5]), ValueError, r"counts: \[0.0, 0.0\]"),
    (lambda: chi_square([5, 5], [.5, .3, .2]), ValueError, r"counts: shape \(2,\), probabilities \(3,\)"),
    (lambda: inverse_cdf([[.5, .5], [.2, .8]], [[.3], [.1]]), ValueError, r"u: shape \(2, 1\), expected \(\) or \(2,\)"),
    (lambda: gumbel_max(torch.zeros(3), 5), TypeError, "key: 5 is no Key"),
    (lambda: uniform_bits(5, 3), TypeError, "key: 5 is no Key"),
    (lambda: draw(torch.zeros(1, 3), Sampler(), 5), TypeError, "key: 5 is no Key"),
    (lambda: draw(torch.zeros(2, 6), Sampler(), Key(0, [1])), ValueError, r"key: row of shape \(1,\)"),
    (lambda: fused_sample(torch.zeros(2, 6), row=[1]), ValueError, r"key: row of shape \(1,\)"),
    (lambda: logit_bias(torch.zeros(8), {5: 1., 7: NAN}), ValueError, "id 7: nan"),
    (lambda: bias_vector([True, False]), TypeError, "logit_bias: torch.bool"),
    (lambda: sequence_law(WORLD, 1, prompt=["I", "cold"]), ValueError, "prompt: 2 prompts"),
    (lambda: sequence_law(WORLD, -1), ValueError, "max_new_tokens: -1"),
    (lambda: WORLD.decode([-1]), ValueError, r"ids: id -1 at index 0 is outside the vocabulary 0\.\.5"),
    (lambda: tiny().decode([9]), ValueError, r"ids: id 9 at index 0 is outside the vocabulary 0\.\.8"),
    (lambda: tiny()(torch.tensor([[0, -1]])), ValueError, "ids: -1 is outside"),
    (lambda: tiny()(torch.tensor([[0, 2, 3]]), mask=torch.tensor([[True]])), ValueError, r"mask: shape \(1, 1\), expected \(1, 3\)"),
    (lambda: follow(tiny(), "a" * 16), ValueError, "texts, row 0: 17 tokens, the context has 16"),
    (lambda: measure(tiny()(torch.tensor([[0, 2]]), attention=True), 0), ValueError, "layers: 0 of a model with 2 layers"),
    (lambda: measure(tiny()(torch.tensor([[0, 2]]), attention=True), [7]), ValueError, r"layers: \[7\]"),
    (lambda: measure(tiny()(torch.tensor([[0, 2]]), attention=True), slice(5, 9)), ValueError, "layers: slice"),
    (lambda: calibrate(tiny(), "abc", PublishedConfig()), TypeError, "config: PublishedConfig"),
    (lambda: score(WORLD, "I like", 1.5), ValueError, "chunk: 1.5"),
    (lambda: exhaustive_search(WORLD, "I", 2, limit=None), ValueError, "limit: None"),
    (lambda: tree_html({(): .5, ("a",): .5}, {"x": ()}), ValueError, "paths: 'x' is empty"),
]


@pytest.mark.parametrize("call,kind,words", REFUSED)
def test_refused(call, kind, words):
    with pytest.raises(kind, match=words): call()


def test_what_is_no_number_stays_none():
    assert math.isnan(surprisal(NAN)) and str(surprisal(0.)) == "0.0"


def test_length_penalty_is_any_real_number_that_fits():
    "NumPy's numbers are numbers; a power that no float holds is refused."
    first, second = (beam_search(WORLD, "", 2, 5, length_penalty=a) for a in (np.float32(.5), .5))
    assert repr(first) == repr(second)
    assert math.isfinite(beam_search(WORLD, "", 2, 5, length_penalty=-64)[0].score)
    for bad in (64.5, -400., 10**400, True, "1", None, NAN):
        kind = ValueError if type(bad) in (float, int) else TypeError
        with pytest.raises(kind, match="^length_penalty: .* is (outside|not a number)"):
            beam_search(WORLD, "", 2, 5, length_penalty=bad)


@pytest.mark.parametrize("name, bad", [("rows", -1), ("rows", [1, 2**32]), ("seed", -1), ("seed", 2**64), ("rows", "a")])
def test_a_sampler_names_the_part_of_its_key(name, bad):
    with pytest.raises((ValueError, TypeError), match=f"^{name}"): Sampler(**{name: bad})


def test_penalties_leave_removed_tokens_alone():
    "A number that overflows on a token which is not there is no reason for NaN or an error."
    z = torch.tensor([-INF, 1.])
    for f in (frequency_penalty, presence_penalty): assert f(z, [0], -1e39).tolist() == [-INF, 1.]
    assert logit_bias(z, {0: 1e39}).tolist() == [-INF, 1.]
    assert Sampler(frequency_penalty=-1e39).distribution(z, [0]).tolist() == [0., 1.]


def test_a_bias_is_any_real_number():
    for value in (10**30, Fraction(1, 2), 2**63, np.float32(2)):
        assert logit_bias(torch.tensor([0., 1.]), {1: value})[1].item() == pytest.approx(float(value) + 1)
    for value in (10**400, -10**400, INF, NAN):
        with pytest.raises(ValueError, match="logit_bias: id 1: .* is neither finite nor -inf"): bias_vector({1: value})


def test_a_trace_names_what_had_no_probability_left():
    assert Sampler(top_k=1).trace(torch.tensor([0., -200., -INF])).stages[1].removed == [1]


def test_a_sampler_for_no_rows():
    assert len(Sampler(top_k=[1, 2, 3]).at(torch.tensor([], dtype=torch.long)).top_k) == 0
