"""The signature in keyed noise: its p-values without the key, its law with it, places and windows,
keys of the last tokens, green lists, hostile input."""

import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.project_files import ROOT
from helpers.rows import rows
from scipy import stats

from decoding_book.loop import generate, greedy
from decoding_book.noise import Key, chi_square, gumbel_max, hash_bits, key_state, uniform_bits
from decoding_book.sampler import Mirostat, Sampler
from decoding_book.signature import (
    CELL,
    NOTHING,
    ContextSampler,
    binomial_tail,
    context_key,
    gamma_edge,
    gamma_tail,
    green_logits,
    green_test,
    luck_scores,
    mean_score,
    power_at,
    score_law,
    signature,
    tokens_needed,
)
from decoding_book.speculative import AcceptReject
from decoding_book.toy import TableModel, sequence_law

TABLE = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.3, 0.3, 0.4]]).double()
WORLD = TableModel([0.3, 0.4, 0.3], TABLE, ["sun", "rain", "and"])
WIDE = torch.rand(40, 40, generator=torch.Generator().manual_seed(2)).double() ** 4 + 1e-3
MARKOV = TableModel([1 / 40] * 40, WIDE / WIDE.sum(1, keepdim=True))
ROW = torch.tensor([2.2, 2.0, 1.1, 0.7, 0.4, 0.1, -1.5])
P = ROW.double().softmax(-1)


def signed(seed, n, texts=1, logits=ROW):
    "Texts (texts, n) drawn from one row; text i has the key's row number i."
    number, place = torch.arange(texts).repeat_interleave(n), torch.arange(n).repeat(texts)
    ids = gumbel_max(logits.expand(texts * n, -1), Key(seed, number, place))
    return ids.view(texts, n)


def unsigned(n, seed=0, loops=False):
    "Texts of 1 to 50 tokens that no key has seen; with `loops` of three tokens, which repeat."
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 51, (n,), generator=rng).tolist()
    words = 3 if loops else 1000
    return [torch.randint(words, (m,), generator=rng) for m in lengths]


# ---------------------------------------------------------------- without the key


@pytest.mark.parametrize("last, loops", [(None, False), (None, True), (2, True)])
def test_p_values_are_uniform_without_the_key(last, loops, full, record):
    n = 10_000 if full else 500
    texts = unsigned(n, loops=loops)
    if last:
        texts = [t for t in texts if len(t) > last]  # else nothing counts, and p is 1
    found = signature(texts, Key(torch.arange(len(texts)) + 5), last=last)
    p = stats.kstest([s.p_value for s in found], "uniform").pvalue
    record(f"signature: uniform p-values, last {last}, loops {loops}", dict(texts=len(texts), p=p))
    assert p > 1e-4


def test_a_printed_text_is_not_accused(full):
    "Pieces of the project's own prose, as bytes, under as many keys."
    data = torch.tensor(list((ROOT / "LICENSE").read_bytes()))
    pieces = [data[i : i + 40] for i in range(0, 10_000, 1 if full else 25)]
    found = signature(pieces, Key(11, row=torch.arange(len(pieces))))
    assert stats.kstest([s.p_value for s in found], "uniform").pvalue > 1e-4


def test_repeated_passages_counted_twice_would_be_accused():
    "Why a key of last tokens counts each passage once."
    loop = torch.arange(3).repeat(40)
    seeds = torch.arange(200)
    once = signature([loop] * 200, Key(seeds), last=2)
    assert {s.counted for s in once} == {3}
    assert sum(s.p_value < 0.01 for s in once) < 10
    twice = [
        luck_scores(loop[2:], context_key(Key(int(s)), loop.unfold(0, 2, 1)[:-1])) for s in seeds
    ]
    assert sum(gamma_tail(118, t.sum()) < 0.01 for t in twice) > 40


def test_tries_are_paid_for():
    texts = signed(3, 60, 100)
    found = signature(list(texts), Key(99), shifts=range(-10, 10), window=20)
    assert {s.tries for s in found} == {20 * 41}
    assert sum(s.p_value <= 0.05 for s in found) <= 14 and min(s.p_value for s in found) > 1e-4


def test_the_gamma_tail_is_the_sum_that_defines_it():
    for n, total in [(1, 0.5), (4, 10.6), (50, 200.0), (200, 900.0), (7, 0.0)]:
        if n < 100:
            terms = sum(total**k / math.factorial(k) for k in range(n))
            assert math.isclose(gamma_tail(n, total), math.exp(-total) * terms, rel_tol=1e-11)
        assert math.isclose(gamma_tail(n, total), stats.gamma.sf(total, n), rel_tol=1e-11)
    assert gamma_tail(torch.tensor([0, 1]), torch.tensor([0.0, 2.0])).tolist() == [
        1.0,
        pytest.approx(math.exp(-2)),
    ]


# ---------------------------------------------------------------- with the key


def test_scores_are_those_of_the_noise():
    ids = torch.tensor([3, 0, 6])
    for t, score in enumerate(luck_scores(ids, Key(7, 2, torch.tensor([4, 5, 6])))):
        bits = hash_bits(ids[t].item(), 7, 0, 2, 4 + t, 0)
        assert score.item() == pytest.approx(-math.log((bits + 0.5) / 2**32), rel=1e-14)


def test_the_law_of_a_signed_score():
    scores = luck_scores(signed(1, 100_000)[0], Key(1, 0, torch.arange(100_000)))
    edges = torch.arange(1, 2561) * CELL
    law = score_law(P).cumsum(0)
    empirical = (scores.sort().values[None] <= edges[::16, None]).double().mean(1)
    assert (empirical - law[::16]).abs().max() < 0.006  # Kolmogorov: 1.9 / sqrt(100 000)
    assert scores.mean().item() == pytest.approx(mean_score(P).item(), abs=0.02)


@pytest.mark.parametrize("m", [1, 2, 7, 1000])
def test_the_mean_of_equal_words_is_a_harmonic_number(m):
    harmonic = sum(1 / k for k in range(1, m + 1))
    assert mean_score(torch.full((m,), 1 / m)).item() == pytest.approx(harmonic, rel=1e-6)
    law = score_law(torch.full((m,), 1 / m).double())
    assert (law * (torch.arange(2560) + 0.5)).sum() * CELL == pytest.approx(harmonic, abs=1e-3)


def test_a_sure_row_has_the_law_of_an_unsigned_text():
    law = score_law([1.0])
    for n in (1, 7, 60, 300):
        for level in (0.3, 1e-3):
            assert power_at(n, law, level) == pytest.approx(level, rel=0.01)


def test_the_power_lies_between_bounds_that_round_down_and_up():
    law = score_law(P)
    for n in (5, 20, 60):
        edge, sums = gamma_edge(n, 1e-6), torch.fft.irfft(torch.fft.rfft(law, 2**18) ** n, 2**18)
        low, high = (sums[torch.arange(2**18) * CELL + d >= edge].sum() for d in (0, n * CELL))
        assert low < power_at(n, law, 1e-6) < high and high - low < 0.04


def test_as_many_texts_are_found_as_the_law_says(full):
    texts = 10_000 if full else 400
    for n in (15, 26, 38):
        ids = signed(8, n, texts)
        p = torch.tensor([s.p_value for s in signature(ids, Key(8))])
        want = power_at(n, score_law(P), 1e-6)
        deviation = math.sqrt(want * (1 - want) / texts)
        assert (p <= 1e-6).double().mean().item() == pytest.approx(want, abs=4 * deviation + 0.002)


def test_tokens_needed_is_the_least_number():
    for row in ([0.5, 0.5], P, torch.full((50,), 0.02)):
        law = score_law(row)
        for level, power in ((1e-6, 0.9), (1e-3, 0.5)):
            n = tokens_needed(row, level, power)
            assert power_at(n, law, level) >= power > power_at(n - 1, law, level)
    both = tokens_needed([[0.5, 0.5], [1.0, 0.0]])
    assert both.tolist() == [tokens_needed([0.5, 0.5]), math.inf]


def test_a_reworded_share_is_a_share_of_sure_tokens():
    p, w = torch.cat([P, torch.ones(1)]), torch.cat([0.7 * P, torch.tensor([0.3])])
    ids, n = signed(4, 60, 500), 60
    rng = torch.Generator().manual_seed(1)
    new = torch.randint(7, ids.shape, generator=rng)  # by chance the old one, which is signed
    changed = new.where(torch.rand(ids.shape, generator=rng) < 0.3, ids)
    found = torch.tensor([s.p_value for s in signature(changed, Key(4))])
    assert (
        power_at(n, score_law(p, w), 1e-6) - 0.06
        < (found <= 1e-6).double().mean()
        < power_at(n, score_law(P), 1e-6)
    )


SAMPLERS = [
    Sampler(seed=5),
    Sampler(0.8, top_k=12, seed=5),
    Sampler(1.3, top_p=0.95, min_p=0.01, seed=5, backend="plain"),
    Sampler(repetition_penalty=1.3, frequency_penalty=0.2, seed=5),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=range(4))
def test_the_sampler_s_texts_are_found_from_their_places(sampler):
    made = generate(MARKOV, [[1], [2, 3, 4], [5, 6]], sampler, 60, alternatives=0)
    starts = [len(p) for p in made.prompt_ids]
    found = signature(made.ids, Key(5, position=starts))
    assert max(s.p_value for s in found) < 1e-6
    wrong = [Key(6, position=starts), Key(5, [1, 2, 0], starts), Key(5), Key(5, None, starts, 1)]
    for key in wrong:
        assert min(s.p_value for s in signature(made.ids, key)) > 1e-4
    whole = [torch.cat([p, i]) for p, i in zip(made.prompt_ids, made.ids)]
    assert max(s.p_value for s in signature(whole, Key(5))) < 1e-6  # with their prompts, from 0


def test_greedy_carries_no_signature():
    for choose in (greedy, Sampler(temperature=0, seed=5)):
        ids = generate(MARKOV, [[i] for i in range(20)], choose, 40, alternatives=0).ids
        assert min(s.p_value for s in signature(ids, Key(5, position=1))) > 1e-4


def test_a_real_text_is_found(full):
    from decoding_book.smollm import SmolLM2

    model = SmolLM2(weights="q4")
    made = generate(model, "The harbour was", Sampler(0.9, seed=5), 30)
    found = signature(made.ids, Key(5, 0, len(made.prompt_ids)), model)
    assert found.p_value < 1e-6 and found.counted == 30
    assert "".join(found.tokens) == made.text and "luck under the key" in found._repr_html_()
    text = signature(made.text, Key(5, 0, len(made.prompt_ids)), model)
    assert len(text.per_token) == len(model.encode(made.text))
    assert signature(made.ids, Key(6, 0, len(made.prompt_ids)), model).p_value > 1e-3


# ---------------------------------------------------------------- places


def test_a_shift_finds_a_text_whose_beginning_is_lost():
    ids = signed(5, 100)[0]
    assert signature(ids[40:], Key(5)).p_value > 1e-4
    found = signature(ids[40:], Key(5), shifts=range(80))
    assert found.shift == 40 and found.tries == 80 and found.p_value < 1e-6
    alone = signature(ids[40:], Key(5, position=40))
    assert found.p_value == pytest.approx(80 * alone.p_value)
    assert torch.equal(found.per_token, alone.per_token)


def test_a_window_finds_what_an_insertion_leaves():
    ids = signed(5, 120)[0]
    for edited in (
        torch.cat([ids[:60], torch.tensor([1, 2, 3]), ids[60:]]),
        torch.cat([ids[:60], ids[61:]]),
    ):
        found = signature(edited, Key(5), shifts=range(-5, 6), window=50)
        assert found.p_value < 1e-6 and found.counted == 50
    quoted = torch.cat([signed(6, 100)[0], ids[20:100], signed(7, 50)[0]])
    found = signature(quoted, Key(5), shifts=range(-150, 50), window=50)
    assert found.p_value < 1e-6 and found.shift == -80 and 95 <= found.start <= 135


def test_places_before_the_first_have_no_score():
    found = signature(torch.arange(10), Key(5), shifts=[-4])
    assert found.per_token[:4].tolist() == [0] * 4
    assert torch.equal(found.per_token[4:], signature(torch.arange(4, 10), Key(5)).per_token)


def test_a_window_longer_than_the_text_is_the_text():
    ids = signed(5, 20)[0]
    assert signature(ids, Key(5), window=50).p_value == signature(ids, Key(5)).p_value


# ---------------------------------------------------------------- batches


def test_a_text_has_the_same_signature_alone_and_in_a_batch():
    texts = unsigned(12) + [[]]
    key = Key([*range(13)], [7] * 13, [*range(40, 53)], 2)
    for options in (dict(), dict(shifts=range(-3, 4), window=9), dict(last=3)):
        together = signature(texts, key, **options)
        for i, text in enumerate(texts):
            alone = signature(text, Key(i, 7, 40 + i, 2), **options)
            assert alone.p_value == together[i].p_value
            assert torch.equal(alone.per_token.nan_to_num(9), together[i].per_token.nan_to_num(9))
            assert green_test(text, Key(i, 7, 40 + i, 2)) == green_test(texts, key)[i]


def test_rows_have_their_numbers_unless_the_key_says_otherwise():
    ids = signed(5, 50, 3)
    assert max(s.p_value for s in signature(ids, Key(5))) < 1e-6
    assert signature(ids[2], Key(5, row=2)).p_value < 1e-6 < signature(ids[2], Key(5)).p_value
    assert signature(ids.tolist(), Key(5))[1].p_value == signature(ids, Key(5))[1].p_value


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, lambda x: torch.tensor(x).numpy()])
def test_one_text_in_any_form(form):
    assert signature(form([4, 2, 5]), Key(1)).p_value == signature([4, 2, 5], Key(1)).p_value


def test_no_token_is_no_evidence():
    for text in ([], torch.tensor([], dtype=torch.long), ""):
        for options in (dict(), dict(last=2), dict(window=3, shifts=[0, 1])):
            found = signature(text, Key(1), WORLD, **options)
            assert (found.p_value, found.statistic, found.counted) == (1.0, 0.0, 0)
            assert "0 tokens" in repr(found) and found._repr_html_()
    one = signature([5], Key(1, 0)).p_value
    assert one == pytest.approx((uniform_bits(Key(1, 0), [5]).item() + 0.5) / 2**32, rel=1e-12)
    assert signature([5], Key(1), last=1).p_value == 1
    assert green_test([], Key(1)) == (0, 0, 0.0, 1.0)


# ---------------------------------------------------------------- a key of the last tokens


def test_a_context_key_depends_on_seed_tokens_and_draw_only():
    before = torch.tensor([[3, 4], [4, 3], [3, 4]])
    key = context_key(Key(9, row=5, position=7, draw=2), before)
    assert key.seed[0] == key.seed[2] != key.seed[1] and (key.draw, key.row) == (2, 0)
    a, b = key_state([9, 0, 3, 4])
    assert key.seed[0] == (a & 0x7FFFFFFF) << 32 | b
    for other in (Key(10), Key(2**40 + 9)):
        assert context_key(other, before).seed[0] != key.seed[0]
    assert context_key(Key([1, 2, 3]), before).seed.unique().numel() == 3
    many = context_key(Key(9), torch.cartesian_prod(torch.arange(200), torch.arange(200)))
    assert many.seed.unique().numel() == 40_000 and (many.seed >= 0).all()


def test_its_texts_are_found_without_places():
    choose = ContextSampler(seed=5, last=2)
    made = generate(MARKOV, [[1], [2, 3, 4]], choose, 80, alternatives=0)
    found = signature(made.ids, Key(5), last=2)
    assert max(s.p_value for s in found) < 1e-6
    assert max(s.p_value for s in signature([i[30:] for i in made.ids], Key(5), last=2)) < 1e-4
    cut = [torch.cat([i[:40], i[43:]]) for i in made.ids]
    assert max(s.p_value for s in signature(cut, Key(5), last=2)) < 1e-4
    assert min(s.p_value for s in signature(made.ids, Key(6), last=2)) > 1e-4
    assert min(s.p_value for s in signature(made.ids, Key(5), last=3)) > 1e-4


def test_the_first_tokens_and_repeated_ones_do_not_count():
    found = signature([1, 2, 3, 1, 2, 3, 1, 2, 4], Key(5), last=2)
    assert found.per_token.isnan().tolist() == [True, True, *[False] * 3, True, True, True, False]
    assert found.counted == 4 and found.start == 2
    assert found.statistic == pytest.approx(found.per_token.nansum().item())


def test_a_chooser_by_context_is_the_same_in_any_batch():
    choose = ContextSampler(0.9, top_k=20, seed=5, last=3)
    prompts = [[1], [2, 3, 4, 5], [6, 7]]
    together = generate(MARKOV, prompts, choose, 20).ids
    for prompt, ids in zip(prompts, together):
        assert torch.equal(generate(MARKOV, prompt, choose, 20).ids, ids)
    seeds = replace(choose, seed=[4, 5, 6])
    assert torch.equal(generate(MARKOV, prompts, seeds, 20).ids[1], together[1])
    cold = ContextSampler(temperature=0, last=3)
    assert torch.equal(generate(MARKOV, [1], cold, 9).ids, generate(MARKOV, [1], greedy, 9).ids)


def test_the_law_of_a_text_by_place_and_by_context(full):
    """Over the keys, a text keyed by place has the model's law. Keyed by the last word, a word has
    one successor for the whole text."""
    n, exact = 60_000 if full else 12_000, sequence_law(WORLD, 4)

    def counts(choose_key):
        ids = torch.zeros(n, 0, dtype=torch.long)
        for place in range(4):
            new = gumbel_max(WORLD(ids).logits, choose_key(ids, place))
            ids = torch.cat([ids, new[:, None]], 1)
        return (ids @ torch.tensor([27, 9, 3, 1])).bincount(minlength=81)

    def last_word(ids, place):
        before = ids[:, -1:] if place else torch.full((n, 1), NOTHING)
        return context_key(Key(torch.arange(n)), before)

    def tied(ids):
        steps = set(zip(ids, ids[1:]))
        free = len({a for a, b in steps}) == len(steps)
        return free * (0.3, 0.4, 0.3)[ids[0]] * math.prod(TABLE[a, b].item() for a, b in steps)

    by_place = counts(lambda ids, place: Key(torch.arange(n), 0, place))
    by_context = counts(last_word)
    assert chi_square(by_place, list(exact.values())) > 1e-4
    assert chi_square(by_context, [tied(ids) for ids in exact]) > 1e-4
    assert chi_square(by_context, list(exact.values())) == 0
    assert sum(tied(ids) for ids in exact) == pytest.approx(1)


def test_the_chooser_has_the_law_by_context():
    choose = ContextSampler(seed=torch.arange(600), last=1)
    ids = torch.stack(generate(WORLD, [[0]] * 600, choose, 2, alternatives=0).ids)
    law = torch.zeros(3, 3).double()
    for a in range(3):
        for b in range(3):  # after 0 comes a, after a comes b; after 0 always the same
            law[a, b] = TABLE[0, a] * (TABLE[a, b] if a else float(b == 0))
    assert chi_square((ids @ torch.tensor([3, 1])).bincount(minlength=9), law.flatten()) > 1e-4


# ---------------------------------------------------------------- green lists


def test_the_binomial_tail():
    for n, k, share in [(10, 4, 0.5), (300, 200, 0.5), (100, 46, 0.25), (5, 0, 0.3), (5, 6, 0.3)]:
        want = stats.binom.sf(k - 1, n, share)
        assert binomial_tail(n, k, share) == pytest.approx(want, rel=1e-9)


def test_green_tokens_are_lifted_and_no_others():
    z = rows(4, 200, 1)
    key = Key(3, [5, 6, 7, 8], 2)
    lifted = green_logits(z, key, [0.1, 0.5, 0.9, 1.0], [1.0, 2.0, 3.0, 0.5])
    green = uniform_bits(key, 200) < torch.tensor([[0.1], [0.5], [0.9], [1.0]]) * 2**32
    assert torch.equal(lifted != z, green) and green[3].all() and 5 < green[0].sum() < 40
    assert torch.allclose((lifted - z).amax(1), torch.tensor([1.0, 2.0, 3.0, 0.5]).double())
    alone = green_logits(z[1], Key(3, 6, 2), 0.5, 2.0)
    assert torch.equal(alone, lifted[1])
    assert torch.equal(green_logits(z, Key(3), bias=2.0)[2], green_logits(z[2], Key(3, 2)))


def test_green_texts_are_found_and_others_have_valid_p_values():
    places = torch.arange(80)
    ids = gumbel_max(green_logits(ROW.expand(80, 7), Key(3, 0, places)), Key(4, 0, places))
    assert green_test(ids, Key(3)).p_value < 1e-6 and green_test(ids, Key(3)).z > 5
    assert green_test(ids, Key(9)).p_value > 1e-4
    found = green_test(unsigned(600), Key(1), share=0.3)
    for level in (0.5, 0.1, 0.01):
        share = sum(t.p_value <= level for t in found) / 600
        assert share <= level + 3 * math.sqrt(level / 600)
    loops = green_test(unsigned(600, loops=True), Key(torch.arange(600)), share=0.3, last=2)
    assert sum(t.p_value <= 0.01 for t in loops) <= 14


def test_given_its_list_our_logits_are_transformers():
    from transformers import WatermarkLogitsProcessor

    z, key = rows(500, 64, 3, torch.float32), Key(3, torch.arange(500))
    green = uniform_bits(key, 64) < 0.25 * 2**32
    process = WatermarkLogitsProcessor(64, "cpu", greenlist_ratio=0.25, bias=2.5)
    lists = iter(green)
    process._get_greenlist_ids = lambda ids: next(lists).nonzero()[:, 0]
    theirs = process(torch.zeros(500, 3, dtype=torch.long), z.clone())
    assert torch.equal(theirs, green_logits(z, key, 0.25, 2.5))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: signature([2, 60], Key(1), WORLD), "text: id 60 at index 1 is outside"),
        (lambda: signature([[1], [-2]], Key(1)), "text, row 1: id -2 at index 0"),
        (lambda: signature("sun", Key(1)), "text: 'sun' needs a model"),
        (lambda: signature("moon", Key(1), WORLD), "'moon' is not one of"),
        (lambda: signature(5, Key(1)), "text: 5 is not a sequence"),
        (lambda: signature(None, Key(1)), "text: None is not a sequence"),
        (lambda: signature([1.5], Key(1)), "text.*is not a sequence of integer ids"),
        (lambda: signature([True], Key(1)), "is not a sequence of integer ids"),
        (lambda: signature([1], 5), "key: 5 is no Key"),
        (lambda: signature([[1], [2]], Key([1, 2, 3])), "key: seed of shape"),
        (lambda: signature([1], Key(-1)), "seed: -1 is outside"),
        (lambda: signature([1], Key(1, position=-3)), "position: -3 is outside"),
        (lambda: signature([1], Key(1), shifts=[]), r"shifts: \[\] holds no number"),
        (lambda: signature([1], Key(1), shifts=1.5), "shifts: 1.5 is not an integer"),
        (lambda: signature([1], Key(1), window=0), "window: 0 is below 1"),
        (lambda: signature([1], Key(1), last=0), "last: 0 is below 1"),
        (lambda: signature([1], Key(1), last=2, window=3), "last: 2, but a key of the last"),
        (lambda: ContextSampler(last=0), "last: 0 is below 1"),
        (lambda: ContextSampler(top_p=2), "top_p: 2 is outside"),
        (lambda: score_law([0.5, 0.4]), "probabilities: .* sums to 0.9"),
        (lambda: score_law([1.5, -0.5]), "are no law of a token"),
        (lambda: score_law([0.5, 0.5], [0.5, 0.4]), "weights: .* sums to 0.9"),
        (lambda: score_law([0.5, 0.5], [1.0]), "are no law of a token"),
        (lambda: tokens_needed(P, level=0), "level: 0 is outside"),
        (lambda: tokens_needed(P, power=2), "power: 2 is outside"),
        (lambda: green_logits(ROW, Key(1), share=0), "share: 0 is outside"),
        (lambda: green_logits(ROW, Key(1), bias=math.inf), "bias: inf is outside"),
        (lambda: green_logits(ROW.expand(1, 1, 7), Key(1)), r"expected \(V,\) or \(B, V\)"),
        (lambda: green_test([1], Key(1), share=1.5), "share: 1.5 is outside"),
    ],
)
def test_what_is_no_text_no_key_and_no_law_is_refused_by_name(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_a_signature_says_what_it_found():
    found = signature(signed(5, 100)[0][30:], Key(5), shifts=range(40), window=30)
    assert repr(found).startswith("p = ") and "in 30 tokens" in repr(found)
    assert "moved by 30" in repr(found)
    html = signature([1, 2, 1, 2, 1, 2], Key(5), WORLD, last=1)._repr_html_()
    assert "not counted" in html and "rain" in html


# ---------------------------------------------------------------- the record


def test_the_record_is_what_the_law_says():
    "SmolLM2's scores against their average by the probabilities of the tokens drawn."
    record = json.loads((ROOT / "benchmarks/signature.json").read_text())
    assert [r["what"] for r in record["rows"]][:4] == ["T = 0.5", "T = 0.7", "T = 1", "T = 1.3"]
    for row in record["rows"]:
        deviation = math.sqrt(3 / (record["texts"] * record["tokens"])) * row["mean score"]
        want = row["mean score, from the probabilities"]
        assert row["mean score"] == pytest.approx(want, abs=4 * deviation)


def test_ids_may_be_numpy_integers():
    assert (
        signature([np.int64(3), np.int64(4)], Key(1)).p_value == signature([3, 4], Key(1)).p_value
    )


def test_the_binomial_tail_has_all_its_digits():
    exact = sum(
        math.comb(1000, k) * Fraction(3, 10) ** k * Fraction(7, 10) ** (1000 - k)
        for k in range(400, 1001)
    )
    assert math.isclose(binomial_tail(1000, 400, 0.3), float(exact), rel_tol=1e-9)


def test_a_mean_score_is_of_probabilities():
    with pytest.raises(ValueError, match="are no probabilities"):
        mean_score([0.5, 0.6, -1.0])


@pytest.mark.parametrize("chooser", [lambda s: Mirostat(sampler=s), AcceptReject])
def test_who_draws_with_other_noise_refuses_a_key_of_last_words(chooser):
    with pytest.raises(TypeError, match="sampler: ContextSampler has noise of its own"):
        chooser(ContextSampler(seed=1))
