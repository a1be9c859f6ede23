"Top-k, alone and after temperature: oracle, laws, properties, hostile input."

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.rows import exact_softmax, kept, rows, tied
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_book.noise import Key, chi_square, gumbel_max
from decoding_book.temperature import temperature
from decoding_book.topk import top_k

INF, NAN = float("inf"), float("nan")


ORACLE = np.load(Path(__file__).parent / "oracle/cases.npz")


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def define_top_k(z, k):
    "The definition, in plain Python: rank by (-logit, id), keep the first min(k, finite)."
    order = sorted((i for i in range(len(z)) if z[i] > -INF), key=lambda i: (-z[i], i))
    kept = set(order[: k or None])
    return [z[i] if i in kept else -INF for i in range(len(z))]


# ---- the oracle


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_oracle_one_row_at_a_time(dtype, atol):
    for i in range(70):
        V = ORACLE["filt_V"][i]
        z = temperature(
            torch.tensor(ORACLE["filt_logits"][i, :V], dtype=dtype), ORACLE["filt_T"][i]
        )
        k = top_k(z, ORACLE["filt_top_k"][i])
        assert z.dtype == dtype
        assert np.abs(z.softmax(-1).numpy() - ORACLE["filt_p_T"][i, :V]).max() < atol
        assert np.abs(k.softmax(-1).numpy() - ORACLE["filt_p_topk"][i, :V]).max() < atol
        if dtype == torch.float64 or ORACLE["filt_kind"][i] != 5:
            assert (kept(k).numpy() == ORACLE["filt_keep_topk"][i, :V]).all()


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_oracle_as_one_batch_with_a_parameter_a_row(dtype, atol):
    z = torch.tensor(
        np.nan_to_num(ORACLE["filt_logits"], nan=-INF, neginf=-INF, posinf=INF), dtype=dtype
    )
    z = temperature(z, ORACLE["filt_T"])
    k = top_k(z, ORACLE["filt_top_k"])
    sure = torch.tensor(ORACLE["filt_kind"] != 5) | (dtype == torch.float64)
    assert np.abs(z.softmax(-1).numpy() - ORACLE["filt_p_T"]).max() < atol
    assert np.abs(k.softmax(-1).numpy() - ORACLE["filt_p_topk"]).max() < atol
    assert (kept(k)[sure].numpy() == ORACLE["filt_keep_topk"][sure.numpy()]).all()


# ---- the law of the draws


@pytest.mark.parametrize(
    "name, T, k", [("temperature", 0.7, None), ("top_k", 1.0, 5), ("both", 1.4, 6)]
)
def test_a_million_draws_over_the_filter(name, T, k, full, record):
    z = rows(1, 14, 5)[0].float()
    z[3] = z[9]
    n = 1_000_000 if full or name == "both" else 200_000
    cut = top_k(temperature(z, T), k)
    counts = torch.zeros(14, dtype=torch.long)
    for first in range(0, n, 10_000):
        counts += gumbel_max(cut, Key(17, draw=torch.arange(first, first + 10_000))).bincount(
            minlength=14
        )
    p = (z.double() / T).exp() * torch.tensor([x > -INF for x in define_top_k(z.tolist(), k)])
    record(f"chi_square_{name}", dict(draws=n, p=chi_square(counts, p / p.sum())))
    assert chi_square(counts, p / p.sum()) > 1e-4  # 0 if any lies outside the support


# ---- what holds for every row


def test_top_k_is_its_definition(full):
    n = 20_000 if full else 3000
    z = tied(n, 11)
    k = torch.randint(0, 14, (n,), generator=torch.Generator().manual_seed(1))
    assert top_k(z, k).tolist() == [define_top_k(r, int(j)) for r, j in zip(z.tolist(), k)]
    finite = kept(z).sum(-1)
    assert torch.equal(kept(top_k(z, k)).sum(-1), torch.where(k == 0, finite, k.minimum(finite)))


def test_a_long_row_equals_a_stable_sort():
    z = rows(3, 20_000, 2, torch.float32).bfloat16()  # ties by the hundred
    rank = z.float().argsort(dim=-1, descending=True, stable=True).argsort(-1)
    for k in (1, 7, 500, 4096, 19_999):
        assert torch.equal(kept(top_k(z, k)), rank < k)


def test_properties_of_top_k():
    z = tied(1000, 12, 3)
    k = torch.arange(1000) % 14
    out = top_k(z, k)
    assert torch.equal(top_k(out, k), out)  # idempotent
    assert torch.equal(out[kept(out)], z[kept(out)])  # only removes
    assert (
        torch.equal(top_k(z, 1).argmax(-1), z.argmax(-1)) and (kept(top_k(z, 1)).sum(-1) == 1).all()
    )
    for off in (None, 0, 12, 13, 10**30, [None] * 500 + [0] * 500):
        assert torch.equal(top_k(z, off), z)
    bigger = top_k(z, torch.where(k > 0, k + 1, 0))
    assert not (kept(out) & ~kept(bigger)).any()  # nested
    free, perm = rows(1000, 12, 4), torch.randperm(12)
    assert torch.equal(top_k(free[:, perm], k), top_k(free, k)[:, perm])
    assert [top_k(z[i], int(k[i])).tolist() for i in range(1000)] == out.tolist()
    order = torch.randperm(1000)
    assert torch.equal(top_k(z[order], k[order]), out[order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (0, 9), (2, 0, 9), (1, 1)])
def test_types_shapes_and_untouched_input(dtype, shape):
    z = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    before, lead = z.clone(), shape[:-1]
    T = torch.rand(lead, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    k = torch.randint(0, 12, lead, generator=torch.Generator().manual_seed(2))
    for f, args in (
        (temperature, (0, 0.7, T, T.numpy(), T.tolist(), T.half())),
        (top_k, (None, 0, 3, 99, k, k.numpy(), k.tolist(), k.to(torch.uint8))),
    ):
        for arg in args:
            out = f(z, arg)
            assert out.shape == shape and out.dtype == (
                torch.float64 if dtype == torch.float64 else torch.float32
            )
            assert out.data_ptr() != z.data_ptr() or not z.numel()
            assert torch.equal(z, before)
            out.fill_(0)  # the result is the caller's own
            assert torch.equal(z, before)
    if z.numel() and lead:
        odd = torch.stack([z, -z], -1)[..., 0]  # strided
        flipped = z.transpose(0, -1).contiguous().transpose(0, -1)
        for f, arg in ((temperature, T), (top_k, k)):
            assert torch.equal(f(odd, arg), f(z, arg)) and torch.equal(f(flipped, arg), f(z, arg))
        flat = z.reshape(-1, shape[-1])
        assert torch.equal(temperature(flat, T.reshape(-1)).reshape(shape), temperature(z, T))
        assert torch.equal(top_k(flat, k.reshape(-1)).reshape(shape), top_k(z, k))


# ---- hostile input

ODD = [
    NAN,
    INF,
    -INF,
    -1.0,
    -1e-300,
    0.0,
    1e-300,
    5e-324,
    0.5,
    1.0,
    2.0,
    7.5,
    1e30,
    1e300,
    10**30,
    -3,
    3,
    True,
    None,
    "a",
    1j,
    "",
    (),
    {},
]


def call(f, z, value, names):
    """A checked result, or an error that names an argument; never another exception or a wrong
    result."""
    try:
        out = f(z, value)
    except (ValueError, TypeError) as e:
        assert str(e).startswith(names), e
        return "refused"
    z = torch.as_tensor(z)
    assert (
        out.shape == z.shape
        and not out.isnan().any()
        and (out < INF).all()
        and kept(out).any(-1).all()
    )
    z = z if z.dtype == torch.float64 else z.float()
    assert not (kept(out) & ~kept(z)).any()
    assert z.isnan().logical_not().all() and (z < INF).all()  # bad logits never pass
    plain = np.array(value.tolist() if torch.is_tensor(value) else value, dtype=object)
    for at in np.ndindex(z.shape[:-1]):
        row, got, own = z[at].tolist(), out[at], plain[at] if plain.ndim else plain[()]
        if f is top_k:
            assert own is None or (own >= 0 and own == int(own))
            assert got.tolist() == define_top_k(row, 0 if own is None else int(own))
        else:
            assert 0 <= own < INF
            limits = torch.finfo(z.dtype)
            expected = (
                np.eye(len(row))[int(np.argmax(row))]
                if own == 0
                else exact_softmax(row, min(max(float(own), limits.smallest_normal), limits.max))
            )
            assert np.abs(got.softmax(-1).numpy() - expected).max() < 2e-5
    return "right"


def test_hostile_calls_are_right_or_refused(full, record):
    "Rows, parameters, types and shapes drawn at random, most of them wrong."
    rng = np.random.default_rng(0)
    n, outcome = (100_000 if full else 3000), {"right": 0, "refused": 0}
    values = np.array([NAN, INF, -INF, 3e38, -3e38, 1e30, 0.0, 1.0, 2.0, 2.0, -1.0, 88.0, 1e-40])
    common = np.array([-INF, 0.0, 1.0, 2.0, 2.0, -1.0, 88.0, 1e30])
    for _ in range(n):
        shape = [(3,), (2, 3), (2, 2, 3), (0, 3), (1, 4), (2, 0), ()][
            rng.choice(7, p=[0.25, 0.35, 0.15, 0.05, 0.1, 0.05, 0.05])
        ]
        z = torch.tensor(
            rng.choice(values if rng.random() < 0.15 else common, shape),
            dtype=DTYPES[rng.integers(4)],
        )
        if rng.random() < 0.05:
            z = [z.long(), z > 0, z.tolist(), z.double() + 1j, None, "z"][rng.integers(6)]
        value = (
            ODD[rng.integers(len(ODD))]
            if rng.random() < 0.5
            else [0, 1, 0.5, 2, 3.0][rng.integers(5)]
        )
        if rng.random() < 0.4:
            lead = (
                shape[:-1]
                if rng.random() < 0.8
                else [(2,), (3,), (1,), (2, 2), (5, 1)][rng.integers(5)]
            )
            pick = ODD if rng.random() < 0.3 else [0, 1, 2, 3, 5]
            array = np.empty(lead, dtype=object)
            for at in np.ndindex(lead):
                array[at] = pick[rng.integers(len(pick))]
            value = array.tolist()
            if rng.random() < 0.5:
                try:
                    value = torch.tensor(value)
                except (TypeError, ValueError, RuntimeError):
                    pass
        f, name = ((temperature, "T"), (top_k, "k"))[rng.integers(2)]
        outcome[call(f, z, value, ("logits", name))] += 1
    record("hostile_temperature_topk", outcome)
    assert min(outcome.values()) > n / 10


def test_hostile_by_hypothesis(full):
    number = st.one_of(
        st.floats(),
        st.integers(),
        st.integers(-2, 9),
        st.none(),
        st.booleans(),
        st.text(max_size=1),
    )
    logit = st.one_of(st.floats(width=32), st.floats(-50, 50, width=32))

    @settings(max_examples=2000 if full else 200, deadline=None)
    @given(
        st.integers(1, 3).flatmap(
            lambda v: st.lists(st.lists(logit, min_size=v, max_size=v), min_size=1, max_size=3)
        ),
        st.one_of(
            number, st.lists(number, max_size=3), st.lists(st.floats(0, 3), min_size=1, max_size=3)
        ),
        st.booleans(),
    )
    def any_call(z, value, first):
        call(
            temperature if first else top_k,
            torch.tensor(z),
            value,
            ("logits", "T" if first else "k"),
        )

    any_call()
