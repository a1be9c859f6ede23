"Exhaustive and best-first search: the oracle's cases, bounds, caches and refusals."

import math
from functools import partial

import pytest
from helpers.worlds import CASES, Cached, Deep, case, padded
from tqdm import tqdm

from decoding_book.exhaustive import (
    best_first_search,
    exhaustive_search,
    search_cost,
)
from decoding_book.toy import six_words


def test_all_cases_are_there():
    assert len(CASES) == 24


@pytest.mark.parametrize("name", CASES)
def test_both_searches_find_the_best_text_of_the_oracle(name):
    model, T, get = case(name)
    exhaustive = exhaustive_search(model, "", T)
    assert model.calls <= T and model.rows == exhaustive.rows
    for found in (
        exhaustive,
        best_first_search(model, "", T),
        best_first_search(model, "", T, n_best=10, batch=7, chunk=2),
    ):
        assert padded(found[0], T) == get("best_seq").tolist()
        assert abs(found[0].logprob - get("best_logp")) < 1e-9 and found.proven


def test_best_first_with_a_cache():
    for prompt in ([2], [1, 2, 3], [0, 3, 3, 1]):
        plain, cached = Deep(), Cached(Deep())
        a, b = (best_first_search(m, prompt, 5, n_best=6, batch=3) for m in (plain, cached))
        assert [(h.ids.tolist(), h.logprob) for h in a] == [(h.ids.tolist(), h.logprob) for h in b]
        if len(prompt) > 1:
            assert cached.fed[0] == (1, len(prompt) - 1)
        assert max(T for _, T in cached.fed[1:]) <= 5


# Refusals


class Numbers:
    """A large vocabulary that must never be asked."""

    vocab_size, eos, start_ids = 49152, 2, []

    def __call__(self, ids, **options):
        raise AssertionError("asked")


def test_what_is_refused_names_its_argument():
    w = six_words()
    refusals = [
        (lambda: exhaustive_search(Numbers(), [], 3), "49152^3 = 118,747,255,799,808 texts"),
        (lambda: exhaustive_search(w, "", 5, limit=7775), "best_first_search"),
        (lambda: exhaustive_search(w, "", 0), "max_new_tokens: 0"),
        (lambda: exhaustive_search(w, "", 5, n_best=0), "n_best: 0"),
        (lambda: exhaustive_search(w, "I like cold coffee stop", 5), "no room in a context of 5"),
        (lambda: best_first_search(w, "", 5, max_rows=0), "max_rows: 0"),
        (lambda: best_first_search(w, "", 5, stop="I"), "a search compares ids"),
        (lambda: best_first_search(w, "", 5, stop=9), "outside the vocabulary"),
    ]
    for call, text in refusals:
        with pytest.raises(ValueError) as error:
            call()
        assert text in str(error.value), error.value


def test_giving_up_says_so():
    truth = exhaustive_search(six_words(), "", 5)[0].logprob
    for rows in (1, 5, 10):
        found = best_first_search(six_words(), "", 5, max_rows=rows)
        assert not found.proven and found.rows <= rows and found.bound >= truth - 1e-12
        assert "not proven" in repr(found)
    assert best_first_search(six_words(), "", 5).proven


def test_the_cost_is_said_before_the_work(capsys, monkeypatch):
    # whatever TQDM_DISABLE says
    monkeypatch.setattr("tqdm.auto.tqdm", partial(tqdm, disable=False))
    assert search_cost(6, 5)[:2] == (7776, 1555)
    exhaustive_search(six_words(), "", 5, progress=True)
    assert "6^5 = 7,776 texts" in capsys.readouterr().err


WORLD = six_words()


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
