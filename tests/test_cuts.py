"""The cuts beyond top-p: their definitions in plain Python, edges, laws, one set in every batch."""

import math

import numpy as np
import pytest
import torch
from helpers import llama_filters as llama
from helpers.rows import INF, kept, rows, tied
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_book import cuts
from decoding_book.cuts import (
    COIN,
    dynamic_temperature,
    entropy_temperature,
    epsilon_cutoff,
    eta_cutoff,
    max_surprisal,
    mean_surprisal,
    surprisals,
    tail_free,
    top_n_sigma,
    typical_p,
    whole_sum,
    xtc,
    xtc_coin,
)
from decoding_book.noise import Key, chi_square, hash_bits

CUTS = {  # with settings from off to as hard as it gets
    epsilon_cutoff: (0.0, 1e-5, 0.03, 0.3, 1.0),
    eta_cutoff: (0.0, 1e-5, 0.03, 0.3, 1.0),
    typical_p: (1.0, 0.95, 0.5, 0.1, 1e-9),
    top_n_sigma: (0.0, 8.0, 1.5, 0.5, 1e-9),
    tail_free: (1.0, 0.99, 0.9, 0.4, 0.0),
    xtc: (1.0, 0.4, 0.1, 0.01, 1e-9),
    max_surprisal: (50.0, 9.0, 3.0, 0.5, -1.0),
}
OFF = {epsilon_cutoff: 0, eta_cutoff: 0, typical_p: 1, top_n_sigma: 0, tail_free: 1, xtc: 1}
NAMES = {f: f.__name__ for f in CUTS}


def sets(z):
    "The ids that stay, a set a row."
    return [set(row.nonzero()[:, 0].tolist()) for row in kept(z)]


def some_rows(n, seed):
    "Rows without ties: half of them with holes, spread from nearly flat to nearly sure."
    z = rows(n, 24, seed) * torch.linspace(0.05, 2.5, n, dtype=torch.float64)[:, None]
    holes = torch.rand(n, 24, generator=torch.Generator().manual_seed(seed)) < 0.4
    holes[::2], holes[:, 3] = False, False
    return z.masked_fill(holes, -INF)


# ---------------------------------------------------------------- the definitions, by other means

REFERENCES = {
    top_n_sigma: (llama.top_n_sigma, (0.1, 3.0)),
    typical_p: (llama.typical, (0.02, 0.99)),
    tail_free: (llama.tail_free, (0.02, 0.999)),
    xtc: (llama.xtc, (0.01, 0.6)),
    max_surprisal: (llama.mirostat, (-1.0, 8.0)),
}


@pytest.mark.parametrize("cut", REFERENCES, ids=NAMES.get)
def test_filters_of_llama_cpp_are_their_definitions(cut, full, record):
    reference, (low, high) = REFERENCES[cut]
    n = 20_000 if full else 2000
    z = some_rows(n, 1)
    setting = torch.tensor(np.random.default_rng(2).uniform(low, high, n))
    found = sets(cut(z, setting))
    assert found == [reference(row, x) for row, x in zip(z.tolist(), setting.tolist())]
    record(f"cuts: {cut.__name__} as defined", dict(rows=n, smallest=min(map(len, found))))


def plain_threshold(row, limit):
    q = llama.shares(row)
    return {i for i, x in q.items() if x >= limit} or {llama.ranked(row)[0]}


def test_epsilon_and_eta_are_their_definitions(full):
    n = 20_000 if full else 2000
    z = some_rows(n, 3)
    e = torch.tensor(10 ** np.random.default_rng(4).uniform(-4, -0.1, n))
    assert sets(epsilon_cutoff(z, e)) == [
        plain_threshold(r, x) for r, x in zip(z.tolist(), e.tolist())
    ]
    want = [
        plain_threshold(r, min(x, math.sqrt(x) * math.exp(-llama.nats(r))))
        for r, x in zip(z.tolist(), e.tolist())
    ]
    assert sets(eta_cutoff(z, e)) == want


def test_equals_go_by_rank():
    "On rows of small integers: of equal tokens the lower id ranks first."
    z = tied(1500, 12, 5).double()
    share = torch.tensor(np.random.default_rng(6).uniform(0.02, 0.98, 1500))
    for cut in (tail_free, xtc):
        reference = REFERENCES[cut][0]
        found = sets(cut(z, share))
        assert found == [reference(r, x) for r, x in zip(z.tolist(), share.tolist())]


def test_dynamic_temperature_is_its_definition(full):
    n = 20_000 if full else 2000
    z, rng = some_rows(n, 7), np.random.default_rng(8)
    T, spread, exponent = (torch.tensor(rng.uniform(0, x, n)) for x in (2, 3, 4))
    spread[::5] = 0
    found = entropy_temperature(z, T, spread, exponent)
    want = [
        llama.dynamic_temperature(*x)
        for x in zip(z.tolist(), T.tolist(), spread.tolist(), exponent.tolist())
    ]
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), atol=1e-9, rtol=1e-9)
    assert torch.equal(found[::5], T[::5])


def test_dynamic_temperature_at_its_ends():
    sure, flat = torch.full((8,), -INF), torch.zeros(8)
    sure[5] = 1.0
    both = torch.stack([sure, flat])
    for spread, ends in ((0.4, [0.6, 1.4]), (3.0, [0.0, 4.0])):
        found = entropy_temperature(both, 1.0, spread)
        torch.testing.assert_close(
            found, torch.tensor(ends, dtype=torch.float64), atol=1e-12, rtol=0
        )
        assert found[0].item() == ends[0]
    assert entropy_temperature(both, 1.0, 0.4, 0.0).tolist() == [1.4, 1.4]  # 0^0 = 1
    assert dynamic_temperature(both, 0.5, 0.5)[0].tolist() == sure.tolist()
    torch.testing.assert_close(dynamic_temperature(flat + 1, 0.5, 1.0), (flat + 1) / 1.5)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("cut", CUTS, ids=NAMES.get)
def test_something_stays_and_nothing_comes_back(cut):
    for z in (tied(200, 9).float(), torch.zeros(4, 7), some_rows(200, 9).float()):
        before = z.clone()
        for x in CUTS[cut]:
            out = cut(z, x)
            assert kept(out).any(-1).all()
            assert torch.equal(out[kept(out)], z[kept(out)]) and not (kept(out) & ~kept(z)).any()
        assert torch.equal(z, before)


@pytest.mark.parametrize("cut", OFF, ids=NAMES.get)
def test_off_is_off(cut):
    for z in (tied(200, 9), some_rows(200, 10)):
        assert torch.equal(cut(z, OFF[cut]), z)


@pytest.mark.parametrize("cut", CUTS, ids=NAMES.get)
def test_a_single_token_stays(cut):
    lone = torch.full((6,), -INF)
    lone[4] = -3.0
    for x in CUTS[cut]:
        assert torch.equal(cut(lone, x), lone)
        assert torch.equal(cut(torch.tensor([2.0]), x), torch.tensor([2.0]))


@pytest.mark.parametrize("cut", CUTS, ids=NAMES.get)
def test_a_row_is_cut_alike_in_any_company(cut):
    "Alone, in a batch, in another order of its tokens, beside removed tokens: the same set."
    z = 3 * torch.randn(40, 3000, generator=torch.Generator().manual_seed(11))
    for x in CUTS[cut][1:4]:
        out = cut(z, x)
        assert torch.equal(torch.stack([cut(row, x) for row in z]), out)
        order = torch.randperm(3000, generator=torch.Generator().manual_seed(12))
        assert torch.equal(cut(z[:, order], x), out[:, order])
        assert torch.equal(cut(z.reshape(5, 8, -1), x).reshape(40, -1), out)


@pytest.mark.parametrize("cut", CUTS, ids=NAMES.get)
def test_each_row_has_its_setting(cut):
    z = some_rows(5, 13)
    out = cut(z, list(CUTS[cut]))
    assert torch.equal(out, torch.stack([cut(row, x) for row, x in zip(z, CUTS[cut])]))


def test_the_threshold_itself_is_reached():
    "Powers of two: a probability that equals the line stays, and reaches XTC's threshold."
    z = torch.tensor([0.5, 0.25, 0.125, 0.125]).log2().double() * math.log(2)
    z = torch.tensor([0.0, -1, -2, -2], dtype=torch.float64) * math.log(2)
    assert sets(epsilon_cutoff(z[None], 0.125 * (1 - 1e-12)))[0] == {0, 1, 2, 3}
    assert sets(epsilon_cutoff(z[None], 0.125 * (1 + 1e-9)))[0] == {0, 1}
    assert sets(xtc(z[None], 0.25 * (1 - 1e-12)))[0] == {1, 2, 3}
    assert sets(xtc(z[None], 0.125 * (1 - 1e-12)))[0] == {3}
    assert sets(typical_p(torch.zeros(1, 4), 0.5))[0] == {0, 1}  # the sum reaches p: enough
    assert sets(typical_p(torch.zeros(1, 4), 0.51))[0] == {0, 1, 2}  # the crossing token stays
    assert sets(typical_p(torch.zeros(1, 4), 0.5, ties="all"))[0] == {0, 1, 2, 3}
    assert sets(top_n_sigma(torch.tensor([[1.0, -1, 1, -1]]), 2.0))[0] == {0, 1, 2, 3}
    assert sets(top_n_sigma(torch.tensor([[1.0, -1, 1, -1]]), 1.999))[0] == {0, 2}


def test_all_cut_leaves_the_best_and_its_equals():
    z = torch.tensor([[0.0, 2, 1, 2, -INF]])
    for cut, x in ((epsilon_cutoff, 0.9), (eta_cutoff, 1.0), (max_surprisal, -1.0)):
        assert sets(cut(z, x))[0] == {1, 3}


def test_a_straight_line_has_no_tail():
    "No bend at all: all places weigh alike."
    z = torch.zeros(1, 12)
    assert [len(sets(tail_free(z, x))[0]) for x in (0.0, 0.45, 0.85, 1.0)] == [1, 4, 8, 12]


def test_typical_can_remove_the_best():
    z = torch.tensor([0.5, 0.25, 0.09, 0.06, 0.04, 0.03, 0.02, 0.01]).log()
    assert sets(typical_p(z[None], 0.2))[0] == {1}


@pytest.mark.parametrize("cut", CUTS, ids=NAMES.get)
@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1.7e308])
def test_extreme_logits_leave_a_token(cut, size):
    z = torch.tensor([[1.0, -1.0, 0.5, -0.25, 0.0, -INF]], dtype=torch.float64) * size
    for x in CUTS[cut]:
        out = cut(z, x)
        assert kept(out).any() and not out.isnan().any()
        assert torch.equal(out, cut(z / 2, x) * 2) or cut is not top_n_sigma  # no unit of its own
    small = z.float() if size < 1e38 else z.clamp(min=-1e38, max=1e38).float()
    for x in CUTS[cut]:
        assert kept(cut(small, x)).any() and cut(small, x).dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-50, 50, width=32) | st.just(-INF), min_size=2, max_size=9),
    st.sampled_from(sorted(CUTS, key=NAMES.get)),
    st.integers(0, 4),
    st.floats(-20, 20, width=32),
)
def test_where_zero_lies_changes_nothing(row, cut, which, shift):
    "Logits are defined up to a constant, if adding it rounds nothing."
    z = torch.tensor(row, dtype=torch.float64)
    moved = z + shift
    if not kept(z).any() or not torch.equal(moved - shift, z):
        return
    d, e = (x.amax() - x for x in (z, moved))
    if torch.equal(d[kept(z)], e[kept(z)]):
        x = CUTS[cut][which]
        assert torch.equal(kept(cut(z, x)), kept(cut(moved, x)))


# ---------------------------------------------------------------- sums


def test_sums_do_not_depend_on_the_order():
    rng = torch.Generator().manual_seed(14)
    for V in (1, 2, 3, 1000, 49_152):
        x = (
            torch.randn(V, dtype=torch.float64, generator=rng)
            * 10 ** torch.randint(-9, 9, ()).item()
        )
        found = {whole_sum(x[torch.randperm(V, generator=rng)]).item() for _ in range(8)}
        (s,) = found
        step = x.abs().max().item() * 2.0 ** (2 + V.bit_length() - 52)
        assert abs(s - math.fsum(x.tolist())) <= V * step / 2
        if V > 3:
            orders = [torch.randperm(V, generator=rng) for _ in range(20)]
            z = 3 * x / x.std()
            assert len({mean_surprisal(surprisals(z[o])).item() for o in orders}) == 1


@pytest.mark.parametrize("size", [0.0, 5e-324, 1e-300, 1.0, 1e300])
def test_sums_of_any_size(size):
    x = torch.tensor([[1.0, 0.5, -0.25, 0.0]], dtype=torch.float64) * size
    assert abs(whole_sum(x).item() - math.fsum(x[0].tolist())) <= 1e-12 * size + 4 * 2.0**-1022


def test_surprisals_are_minus_log_probabilities(full):
    for dtype in (torch.float32, torch.float64):
        z = (3 * torch.randn(20, 49_152 if full else 5000, dtype=torch.float64)).to(dtype)
        s = surprisals(z)
        torch.testing.assert_close(s, -z.double().log_softmax(-1), atol=1e-7, rtol=0)
        H = -(z.double().softmax(-1) * z.double().log_softmax(-1)).sum(-1, keepdim=True)
        torch.testing.assert_close(mean_surprisal(s), H, atol=1e-6, rtol=0)
    holes = tied(50, 8)
    assert torch.equal(surprisals(holes) == INF, ~kept(holes))
    assert mean_surprisal(surprisals(torch.tensor([3.0, -INF]))).item() == 0


# ---------------------------------------------------------------- XTC's coin


def test_the_coin_is_the_bits_of_a_token_that_no_vocabulary_has():
    z = torch.zeros(5, 3)
    for key in (Key(1, position=7), Key(2**63, [4, 4, 5, 6, 9], 3, 2)):
        bits = torch.as_tensor(hash_bits(COIN, *key.words(5)))[:, 0]
        for p in (0.0, 0.2, 0.5, 1.0):
            coin = xtc_coin(key, p, z)
            assert coin.tolist() == [(b + 0.5) / 2**32 < p for b in bits.tolist()]
        own = [0.0, 0.3, 1.0, 0.7, 0.5]
        rowwise = [xtc_coin(key, p, z)[i].item() for i, p in enumerate(own)]
        assert xtc_coin(key, own, z).tolist() == rowwise
    assert xtc_coin(Key(1, 5, 6), 0.5, z).tolist() == [xtc_coin(Key(1, 5, 6), 0.5, z)[0].item()] * 5


def test_the_coin_falls_as_often_as_it_should(full):
    n = 1_000_000 if full else 50_000
    for p in (0.02, 0.5, 0.93):
        yes = xtc_coin(Key(seed=9), p, torch.zeros(n, 1)).sum()
        assert chi_square([yes, n - yes], [p, 1 - p]) > 1e-4


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "call, says",
    [
        (
            lambda z: epsilon_cutoff(z, -0.1),
            r"epsilon \(epsilon_cutoff\): -0.1 is outside \[0, 1\]",
        ),
        (lambda z: eta_cutoff(z, [0.1, 1.1]), r"eta \(eta_cutoff\), row 1: 1.1"),
        (lambda z: typical_p(z, 0), r"p \(typical_p\): 0 is outside \(0, 1\]"),
        (lambda z: typical_p(z, 0.5, ties="some"), "ties: 'some'"),
        (lambda z: top_n_sigma(z, float("nan")), r"n \(top_n_sigma\): nan"),
        (lambda z: tail_free(z, 2), r"share \(tail_free\): 2"),
        (lambda z: xtc(z, 0), r"threshold \(xtc_threshold\): 0"),
        (lambda z: xtc(z, 0.1, 0.5), "coin: torch.float32"),
        (lambda z: xtc(z, 0.1, [True]), r"coin: shape \(1,\)"),
        (lambda z: xtc_coin(Key(), [0.5, -1], z), r"probability \(xtc_probability\), row 1: -1"),
        (lambda z: xtc_coin("key", 0.5, z), "key: 'key' is no Key"),
        (lambda z: entropy_temperature(z, -1, 0.5), r"T \(temperature\): -1"),
        (lambda z: entropy_temperature(z, 1, [0.5, -1]), r"spread \(dynatemp_range\), row 1: -1"),
        (lambda z: entropy_temperature(z, 1, 1, -2), r"exponent \(dynatemp_exponent\): -2"),
        (lambda z: max_surprisal(z, float("inf")), "bits: inf"),
        (lambda z: top_n_sigma(z * float("nan"), 1), "logits: row 0 has NaN"),
        (lambda z: tail_free(z.long(), 0.5), "logits: torch.int64"),
        (lambda z: typical_p(z, [0.5]), r"p \(typical_p\): shape \(1,\)"),
    ],
)
def test_nonsense_is_refused_by_name(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call(torch.randn(2, 5))


def test_what_the_module_exports_has_a_test_here():
    assert set(cuts.__all__) - {"power_of_two", "as_nats", "within"} <= set(globals())
