"Temperature, top-k and the checks that all filters share: oracle, peers, laws, properties, hostile input."
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from decoding_book.noise import Key, chi_square, gumbel_max
from decoding_book.temperature import check_logits, per_row, temperature
from decoding_book.topk import top_k

INF, NAN = float("inf"), float("nan")
O = np.load(Path(__file__).parent / "oracle/open.npz")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rows(n, V, seed=0, dtype=torch.float64, spread=3.):
    return (torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread).to(dtype)


def tied(n, V, seed=0, removed=.2):
    "Small integers with some -inf; at least one finite logit a row."
    rng = torch.Generator().manual_seed(seed)
    z = torch.randint(-2, 3, (n, V), generator=rng).float()
    z = z.masked_fill(torch.rand(n, V, generator=rng) < removed, -INF)
    z[torch.arange(n), torch.randint(0, V, (n,), generator=rng)] = 2.
    return z


def define_top_k(z, k):
    "The definition, in plain Python: rank by (-logit, id), keep the first min(k, finite)."
    order = sorted((i for i in range(len(z)) if z[i] > -INF), key=lambda i: (-z[i], i))
    kept = set(order[:k or None])
    return [z[i] if i in kept else -INF for i in range(len(z))]


def kept(z):
    return z > -INF


# ---- the oracle

@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_oracle_one_row_at_a_time(dtype, atol):
    for i in range(70):
        V = O["filt_V"][i]
        z = temperature(torch.tensor(O["filt_logits"][i, :V], dtype=dtype), O["filt_T"][i])
        k = top_k(z, O["filt_top_k"][i])
        assert z.dtype == dtype
        assert np.abs(z.softmax(-1).numpy() - O["filt_p_T"][i, :V]).max() < atol
        assert np.abs(k.softmax(-1).numpy() - O["filt_p_topk"][i, :V]).max() < atol
        if dtype == torch.float64 or O["filt_kind"][i] != 5:
            assert (kept(k).numpy() == O["filt_keep_topk"][i, :V]).all()


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_oracle_as_one_batch_with_a_parameter_a_row(dtype, atol):
    z = torch.tensor(np.nan_to_num(O["filt_logits"], nan=-INF, neginf=-INF, posinf=INF), dtype=dtype)
    z = temperature(z, O["filt_T"])
    k = top_k(z, O["filt_top_k"])
    sure = torch.tensor(O["filt_kind"] != 5) | (dtype == torch.float64)
    assert np.abs(z.softmax(-1).numpy() - O["filt_p_T"]).max() < atol
    assert np.abs(k.softmax(-1).numpy() - O["filt_p_topk"]).max() < atol
    assert (kept(k)[sure].numpy() == O["filt_keep_topk"][sure.numpy()]).all()


# ---- transformers

def test_agrees_with_transformers(full, record):
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper
    n, V = (20_000 if full else 10_000), 40
    z = rows(n, V, 1, torch.float32)
    rng, worst = np.random.default_rng(0), 0.
    for part in z.split(200):
        T, k = float(rng.uniform(.1, 4)), int(rng.integers(1, V + 5))
        theirs = TopKLogitsWarper(k)(None, TemperatureLogitsWarper(T)(None, part.clone()))
        ours = top_k(temperature(part, T), k)
        assert torch.equal(kept(ours), kept(theirs))
        worst = max(worst, (ours.softmax(-1) - theirs.softmax(-1)).abs().max().item())
    record("temperature_topk_transformers", dict(rows=n, worst=worst))
    assert worst < 1e-6
    z = tied(500, 12)                                        # theirs keeps all that tie with the k-th
    for k in range(1, 13):
        theirs = TopKLogitsWarper(k)(None, z.clone())
        ours = top_k(z, k)
        assert not (kept(ours) & ~kept(theirs)).any()
        edge = ours.masked_fill(~kept(ours), INF).amin(-1, True)
        assert (z[kept(theirs) & ~kept(ours)] == edge.expand_as(z)[kept(theirs) & ~kept(ours)]).all()


# ---- the law of the draws

@pytest.mark.parametrize("name, T, k", [("temperature", .7, None), ("top_k", 1., 5), ("both", 1.4, 6)])
def test_a_million_draws_over_the_filter(name, T, k, full, record):
    z = rows(1, 14, 5)[0].float()
    z[3] = z[9]
    n = 1_000_000 if full or name == "both" else 200_000
    cut = top_k(temperature(z, T), k)
    counts = torch.zeros(14, dtype=torch.long)
    for first in range(0, n, 10_000):
        counts += gumbel_max(cut, Key(17, draw=torch.arange(first, first + 10_000))).bincount(minlength=14)
    p = (z.double() / T).exp() * torch.tensor([x > -INF for x in define_top_k(z.tolist(), k)])
    record(f"chi_square_{name}", dict(draws=n, p=chi_square(counts, p / p.sum())))
    assert chi_square(counts, p / p.sum()) > 1e-4                     # 0 if any lies outside the support


# ---- what holds for every row

def test_top_k_is_its_definition(full):
    n = 20_000 if full else 3000
    z = tied(n, 11)
    k = torch.randint(0, 14, (n,), generator=torch.Generator().manual_seed(1))
    assert top_k(z, k).tolist() == [define_top_k(r, int(j)) for r, j in zip(z.tolist(), k)]
    finite = kept(z).sum(-1)
    assert torch.equal(kept(top_k(z, k)).sum(-1), torch.where(k == 0, finite, k.minimum(finite)))


def test_a_long_row_equals_a_stable_sort():
    z = rows(3, 20_000, 2, torch.float32).bfloat16()                  # ties by the hundred
    rank = z.float().argsort(dim=-1, descending=True, stable=True).argsort(-1)
    for k in (1, 7, 500, 4096, 19_999):
        assert torch.equal(kept(top_k(z, k)), rank < k)


def test_properties_of_top_k():
    z = tied(1000, 12, 3)
    k = torch.arange(1000) % 14
    out = top_k(z, k)
    assert torch.equal(top_k(out, k), out)                              # idempotent
    assert torch.equal(out[kept(out)], z[kept(out)])                    # only removes
    assert torch.equal(top_k(z, 1).argmax(-1), z.argmax(-1)) and (kept(top_k(z, 1)).sum(-1) == 1).all()
    for off in (None, 0, 12, 13, 10**30, [None] * 500 + [0] * 500): assert torch.equal(top_k(z, off), z)
    bigger = top_k(z, torch.where(k > 0, k + 1, 0))
    assert not (kept(out) & ~kept(bigger)).any()                        # nested
    free, perm = rows(1000, 12, 4), torch.randperm(12)
    assert torch.equal(top_k(free[:, perm], k), top_k(free, k)[:, perm])
    assert [top_k(z[i], int(k[i])).tolist() for i in range(1000)] == out.tolist()
    order = torch.randperm(1000)
    assert torch.equal(top_k(z[order], k[order]), out[order])


def test_properties_of_temperature():
    z = rows(500, 12, 5)
    z[:, 4] = -INF
    T = torch.linspace(0, 3, 500, dtype=torch.float64)
    out, perm = temperature(z, T), torch.randperm(12)
    assert torch.equal(out[1:], z[1:] / T[1:, None])
    assert torch.equal(temperature(z, 1), z) and (kept(out)[1:] == kept(z)[1:]).all()
    assert torch.equal(temperature(z[:, perm], T), out[:, perm])
    assert [temperature(z[i], T[i]).tolist() for i in range(500)] == out.tolist()
    assert torch.equal(temperature(z, 0).argmax(-1), z.argmax(-1)) and (kept(temperature(z, 0)).sum(-1) == 1).all()
    assert torch.equal(temperature(z, 0).amax(-1), z.amax(-1))
    p = temperature(z.float(), 1e-4).softmax(-1)
    assert torch.equal((p > .5).int().argmax(-1), z.argmax(-1))
    assert torch.equal(top_k(temperature(z, 0), 3), temperature(z, 0))
    ties = tied(300, 9, 6)
    assert torch.equal(temperature(ties, 0), top_k(ties, 1))            # the first maximum, both


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (0, 9), (2, 0, 9), (1, 1)])
def test_types_shapes_and_untouched_input(dtype, shape):
    z = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    before, lead = z.clone(), shape[:-1]
    T = torch.rand(lead, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + .1
    k = torch.randint(0, 12, lead, generator=torch.Generator().manual_seed(2))
    for f, args in ((temperature, (0, .7, T, T.numpy(), T.tolist(), T.half())),
                    (top_k, (None, 0, 3, 99, k, k.numpy(), k.tolist(), k.to(torch.uint8)))):
        for arg in args:
            out = f(z, arg)
            assert out.shape == shape and out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert out.data_ptr() != z.data_ptr() or not z.numel()
            assert torch.equal(z, before)
            out.fill_(0)                                                # the result is the caller's own
            assert torch.equal(z, before)
    if z.numel() and lead:
        odd = torch.stack([z, -z], -1)[..., 0]                           # strided
        flipped = z.transpose(0, -1).contiguous().transpose(0, -1)
        for f, arg in ((temperature, T), (top_k, k)):
            assert torch.equal(f(odd, arg), f(z, arg)) and torch.equal(f(flipped, arg), f(z, arg))
        flat = z.reshape(-1, shape[-1])
        assert torch.equal(temperature(flat, T.reshape(-1)).reshape(shape), temperature(z, T))
        assert torch.equal(top_k(flat, k.reshape(-1)).reshape(shape), top_k(z, k))


# ---- extremes

def exact_softmax(z, T):
    "Probabilities by rational arithmetic; exponents below -800 are 0."
    best = max(z)
    gaps = [Fraction(x) - Fraction(best) if x > -INF else None for x in z]
    w = [math.exp(float(max(g / Fraction(T), Fraction(-800)))) if g is not None else 0. for g in gaps]
    w = [0. if x < 1e-300 else x for x in w]
    return [x / sum(w) for x in w]


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-5), (torch.float64, 1e-9)])
def test_no_temperature_overflows(dtype, atol):
    big = torch.finfo(dtype).max
    cases = [[1e30, 5e29, -1e30, -INF], [0., -1., -2., 1.], [big, big, -big, 0.], [-big, -big, -INF, -big],
             [1e-30, 0., -1e-30, 2e-30], [3e38, -3e38, 2.9e38, 3e38], [88., 87., 0., -500.]]
    for z in cases:
        z = torch.tensor(z, dtype=dtype)
        for T in (1e-30, 1e-300, 5e-324, 1e-10, .3, 1., 7., 1e10, 1e38, 1e300):
            out = temperature(z, T)
            assert not out.isnan().any() and (out < INF).all() and torch.equal(kept(out), kept(z))
            low = max(T, torch.finfo(dtype).smallest_normal)            # as the chapter states
            high = min(low, torch.finfo(dtype).max)
            expected = exact_softmax(z.tolist(), high)
            assert np.abs(out.softmax(-1).numpy() - expected).max() < atol, (z, T)


def test_a_row_that_overflows_leaves_its_neighbours_alone():
    z = torch.tensor([[1., 2.], [1e30, 0.], [3., 1.]])
    out = temperature(z, [.5, 1e-30, 2.])
    assert torch.equal(out[0], z[0] / .5) and torch.equal(out[2], z[2] / 2) and out[1, 0] == 0


# ---- the checks

@pytest.mark.parametrize("logits, error, text", [
    (torch.tensor([[0., 1], [NAN, 0]]), ValueError, "logits: row 1 has NaN"),
    (torch.tensor([[0., 1], [INF, 0]]), ValueError, "logits: row 1 has [+]inf"),
    (torch.full((2, 2, 3), -INF), ValueError, "logits: row 0, 0 has no finite logit"),
    (torch.tensor([NAN, 0.]), ValueError, "logits: row 0 has NaN"),
    (torch.zeros(3, 0), ValueError, "logits: shape"), (torch.tensor(1.), ValueError, "logits: shape"), (1., ValueError, "logits: shape"),
    (torch.zeros(2, 2, dtype=torch.long), TypeError, "int64"), (torch.zeros(2, 2, dtype=torch.bool), TypeError, "bool"),
    (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "complex"), ([1, 2], TypeError, "int64"), ("ab", TypeError, "logits"),
    (None, TypeError, "logits"), ([[1.], [1., 2.]], TypeError, "logits"), ([], ValueError, "logits: shape"), ({}, TypeError, "logits")])
def test_bad_logits(logits, error, text):
    for f in (check_logits, lambda z: temperature(z, 1.), lambda z: top_k(z, 3)):
        with pytest.raises(error, match=text):
            f(logits)


def test_good_logits():
    assert check_logits([1., -INF]).tolist() == [1., -INF]
    assert check_logits(np.array([1., 2.])).dtype == torch.float64
    assert check_logits(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert check_logits(torch.ones(0, 4)).shape == (0, 4)
    assert check_logits(torch.tensor([3.4e38] * 9)).isfinite().all()


@pytest.mark.parametrize("value, error, text", [
    (-.1, ValueError, r"x: -0.1 is outside \[0, 1\]"), (NAN, ValueError, "x: nan"), (INF, ValueError, "x: inf"), (2, ValueError, "x: 2 is"),
    ([0, -1.], ValueError, "x, row 1: -1.0"), (torch.tensor([0, NAN]), ValueError, "x, row 1: nan"), ([1., 1., 1.], ValueError, r"x: shape \(3,\), expected \(\) or \(2,\)"),
    ([[1., 1.]], ValueError, "x: shape"), ([], ValueError, "x: shape"), ([1., [1., 1.]], (TypeError, ValueError), "x"),
    (True, TypeError, "x: True"), ([True, False], TypeError, "x, row 0: True"), (torch.tensor([True, False]), TypeError, "x, row 0: True"),
    ("a", TypeError, "x: 'a'"), (["a", "b"], TypeError, "x, row 0: 'a'"), (1j, TypeError, "x"), (torch.tensor(1j), TypeError, "x"),
    (None, TypeError, "x: None"), ([None, .5], TypeError, "x, row 0: None"), ({}, TypeError, "x"), (Decimal("0.5"), TypeError, "x"),
    (np.array([.5, 7.]), ValueError, "x, row 1: 7.0"), (10**400, ValueError, "x: 1000"), (object(), TypeError, "x")])
def test_bad_parameters(value, error, text):
    with pytest.raises(error, match=text):
        per_row("x", value, torch.zeros(2, 5), low=0, high=1)


def test_good_parameters():
    z = torch.zeros(2, 3, 5)
    assert per_row("x", .5, z).shape == per_row("x", torch.tensor(.5), z).shape == (1,)
    assert per_row("x", np.float32(.5), z).item() == .5 and per_row("x", Fraction(1, 2), z).item() == .5
    assert per_row("x", torch.rand(2, 3), z).shape == (2, 3, 1)
    assert per_row("x", torch.rand(2, 3), z).dtype == torch.float64 and per_row("x", 3, z, integer=True).dtype == torch.int64
    assert per_row("x", [[1, None, 2]] * 2, z, integer=True, off=7)[0, :, 0].tolist() == [1, 7, 2]
    assert per_row("x", None, z, off=0.).item() == 0. and per_row("x", 2., z, integer=True).item() == 2
    assert per_row("x", 0, z, low=0).item() == 0
    for bad in (0, -1): pytest.raises(ValueError, per_row, "x", bad, z, low=0, open_low=True)
    with pytest.raises(ValueError, match=r"x: 0 is outside \(0, inf\)"): per_row("x", 0, z, low=0, open_low=True)
    with pytest.raises(ValueError, match="2.5 is not an integer"): per_row("x", 2.5, z, integer=True)
    for bad in (NAN, INF, -INF): pytest.raises(ValueError, per_row, "x", bad, z, integer=True)
    assert per_row("x", 10**30, z, integer=True).item() == 2**62 and per_row("x", -5.5, z).item() == -5.5


# ---- hostile input

ODD = [NAN, INF, -INF, -1., -1e-300, 0., 1e-300, 5e-324, .5, 1., 2., 7.5, 1e30, 1e300, 10**30, -3, 3, True, None, "a", 1j, "", (), {}]


def call(f, z, value, names):
    "A checked result, or an error that names an argument; never another exception or a wrong result."
    try: out = f(z, value)
    except (ValueError, TypeError) as e:
        assert str(e).startswith(names), e
        return "refused"
    z = torch.as_tensor(z)
    assert out.shape == z.shape and not out.isnan().any() and (out < INF).all() and kept(out).any(-1).all()
    z = z if z.dtype == torch.float64 else z.float()
    assert not (kept(out) & ~kept(z)).any()
    assert z.isnan().logical_not().all() and (z < INF).all()            # bad logits never pass
    plain = np.array(value.tolist() if torch.is_tensor(value) else value, dtype=object)
    for at in np.ndindex(z.shape[:-1]):
        row, got, own = z[at].tolist(), out[at], plain[at] if plain.ndim else plain[()]
        if f is top_k:
            assert own is None or (own >= 0 and own == int(own))
            assert got.tolist() == define_top_k(row, 0 if own is None else int(own))
        else:
            assert 0 <= own < INF
            limits = torch.finfo(z.dtype)
            expected = (np.eye(len(row))[int(np.argmax(row))] if own == 0 else
                        exact_softmax(row, min(max(float(own), limits.smallest_normal), limits.max)))
            assert np.abs(got.softmax(-1).numpy() - expected).max() < 2e-5
    return "right"


def test_hostile_calls(full, record):
    "Rows, parameters, types and shapes drawn at random, most of them wrong."
    rng = np.random.default_rng(0)
    n, outcome = (100_000 if full else 3000), {"right": 0, "refused": 0}
    values = np.array([NAN, INF, -INF, 3e38, -3e38, 1e30, 0., 1., 2., 2., -1., 88., 1e-40])
    common = np.array([-INF, 0., 1., 2., 2., -1., 88., 1e30])
    for _ in range(n):
        shape = [(3,), (2, 3), (2, 2, 3), (0, 3), (1, 4), (2, 0), ()][rng.choice(7, p=[.25, .35, .15, .05, .1, .05, .05])]
        z = torch.tensor(rng.choice(values if rng.random() < .15 else common, shape), dtype=DTYPES[rng.integers(4)])
        if rng.random() < .05: z = [z.long(), z > 0, z.tolist(), z.double() + 1j, None, "z"][rng.integers(6)]
        value = ODD[rng.integers(len(ODD))] if rng.random() < .5 else [0, 1, .5, 2, 3.][rng.integers(5)]
        if rng.random() < .4:
            lead = shape[:-1] if rng.random() < .8 else [(2,), (3,), (1,), (2, 2), (5, 1)][rng.integers(5)]
            pick = ODD if rng.random() < .3 else [0, 1, 2, 3, 5]
            array = np.empty(lead, dtype=object)
            for at in np.ndindex(lead): array[at] = pick[rng.integers(len(pick))]
            value = array.tolist()
            if rng.random() < .5:
                try: value = torch.tensor(value)
                except (TypeError, ValueError, RuntimeError): pass
        f, name = ((temperature, "T"), (top_k, "k"))[rng.integers(2)]
        outcome[call(f, z, value, ("logits", name))] += 1
    record("hostile_temperature_topk", outcome)
    assert min(outcome.values()) > n / 10


def test_hostile_by_hypothesis(full):
    number = st.one_of(st.floats(), st.integers(), st.integers(-2, 9), st.none(), st.booleans(), st.text(max_size=1))
    logit = st.one_of(st.floats(width=32), st.floats(-50, 50, width=32))
    @settings(max_examples=2000 if full else 200, deadline=None)
    @given(st.integers(1, 3).flatmap(lambda v: st.lists(st.lists(logit, min_size=v, max_size=v), min_size=1, max_size=3)),
           st.one_of(number, st.lists(number, max_size=3), st.lists(st.floats(0, 3), min_size=1, max_size=3)), st.booleans())
    def any_call(z, value, first):
        call(temperature if first else top_k, torch.tensor(z), value, ("logits", "T" if first else "k"))
    any_call()
