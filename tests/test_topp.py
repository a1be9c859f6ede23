"""Top-p and min-p: oracle, boundaries, the smallest set, ties, the counted mass, refusals."""

from itertools import combinations

import numpy as np
import pytest
import torch
from helpers import numpy_draw as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_book.topp import exact_exp, min_p, ranked_prefix, top_p, top_p_mask, whole_weights

INF = float("inf")


@pytest.fixture(scope="module")
def oracle():
    from pathlib import Path

    return np.load(Path(__file__).parent / "oracle/cases.npz", allow_pickle=False)


def cases(oracle, dtype):
    "Each filt case: its number, kind, logits over T, and its entries of the oracle by name."
    for i, V in enumerate(oracle["filt_V"]):
        z = torch.tensor(oracle["filt_logits"][i, :V]).to(dtype) / oracle["filt_T"][i]
        yield i, oracle["filt_kind"][i], z, lambda name: oracle[f"filt_{name}"][i][:V]


@pytest.mark.parametrize(
    "name,filter,parameter", [("topp", top_p, "filt_top_p"), ("minp", min_p, "filt_min_p")]
)
@pytest.mark.parametrize("dtype,atol", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_filters_keep_what_the_oracle_keeps(oracle, name, filter, parameter, dtype, atol):
    n = 0
    for i, kind, z, entry in cases(oracle, dtype):
        out = filter(z, float(oracle[parameter][i]))
        assert out.dtype == dtype
        np.testing.assert_allclose(
            out.softmax(-1), entry(f"p_{name}"), atol=atol, rtol=0, err_msg=f"case {i}"
        )
        if dtype == torch.float64 or kind != 5:
            assert out.isfinite().tolist() == entry(f"keep_{name}").tolist(), i
        n += 1
    assert n == 70


def test_oracle_mask_of_probabilities(oracle):
    for i, kind, z, entry in cases(oracle, torch.float64):
        if kind in (5,):
            continue  # ranks by logits, and equal zeros hide them
        assert (
            top_p_mask(z.softmax(-1), float(oracle["filt_top_p"][i])).tolist()
            == entry("keep_topp").tolist()
        ), i


def test_exact_boundaries_are_those_of_the_oracle(oracle):
    for q, V, p, keep in zip(*(oracle[f"exact_{n}"] for n in ("probs", "V", "p", "keep"))):
        for dtype in (torch.float64, torch.float32, torch.float16):
            assert top_p_mask(torch.tensor(q[:V]).to(dtype), float(p)).tolist() == keep[:V].tolist()


# ---------------------------------------------------------------- the definition, by other means

weights = st.lists(st.integers(1, 40), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(weights, st.integers(1, 64))
def test_no_smaller_set_reaches_p(parts, share):
    "Dyadic probabilities and p, so that equality happens and sums are exact."
    total = 1 << (sum(parts) - 1).bit_length()
    parts = parts + [total - sum(parts)] * (total > sum(parts))
    q, p = torch.tensor(parts, dtype=torch.float64) / total, share / 64
    mask = top_p_mask(q, p)
    fewest = next(
        n for n in range(1, len(q) + 1) if any(sum(c) >= p for c in combinations(q.tolist(), n))
    )
    if p < 1:
        assert mask.sum() == fewest
    assert q[mask].sum() >= p and q[mask].min() >= (q[~mask].max() if (~mask).any() else 0)


def test_equal_logits_by_lower_id():
    z = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
    q1 = z.softmax(-1)[1].item()
    assert top_p(z, q1 * 1.5).isfinite().tolist() == [False, True, True, False, False]
    out = top_p(z, q1 * 1.5, ties="sort").isfinite()  # two of the three, the sort knows which
    assert out.sum() == 2 and not out[0] and not out[4]
    assert top_p_mask(torch.full((8,), 0.125), 0.5).tolist() == [True] * 4 + [False] * 4


def test_ranks_by_logits_where_probabilities_are_equal():
    z = torch.tensor([0.0, -800.0, -799.0, 0.0])  # both underflow to probability 0
    assert top_p(z, 1).tolist() == z.tolist()
    order = z.argsort(descending=True, stable=True)
    assert ranked_prefix(order, z.softmax(-1), torch.tensor([0.75])).tolist() == [
        True,
        False,
        False,
        True,
    ]
    z = torch.tensor([0.0, 1e-9, 0.0])  # softmax rounds the difference away
    assert top_p(z, 0.2).isfinite().tolist() == [False, True, False]


def test_boundaries_say_whether_the_last_token_is_in():
    q = torch.tensor([0.5, 0.25, 0.125, 0.125])
    expected = {
        "include": {0.5: 1, 0.75: 2, 0.8: 3, 1: 4},
        "exceed": {0.5: 2, 0.75: 3, 0.8: 3, 1: 4},
        "exclude": {0.5: 1, 0.75: 2, 0.8: 2, 0.3: 1, 1: 4},
    }
    for boundary, sizes in expected.items():
        for p, n in sizes.items():
            assert top_p_mask(q, p, boundary).sum() == n, (boundary, p)


def test_minus_infinity_is_never_kept():
    z = torch.tensor([[0.0, -INF, 1.0, -INF], [-INF, -INF, -INF, 2.0]])
    for out in (
        top_p(z, 0.999),
        top_p(z, 1),
        min_p(z, 0),
        min_p(z, 0.001),
        top_p(z, 1, ties="sort"),
    ):
        assert out.isfinite().tolist() == z.isfinite().tolist()
    assert top_p_mask(z.softmax(-1), 1).tolist() == z.isfinite().tolist()


def test_limits_of_a_parameter_keep_the_best_or_all():
    z = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    for p in (1e-300, 1e-30, 1e-9):
        assert top_p(z, p).isfinite().sum(-1).eq(1).all() and top_p(z, p).argmax(-1).equal(
            z.argmax(-1)
        )
    assert (
        top_p(z, 1).equal(z) and min_p(z, 0).equal(z) and top_p(z, 1, boundary="exclude").equal(z)
    )
    assert min_p(z, 1).isfinite().sum(-1).eq(1).all()
    assert min_p(torch.tensor([3.0, 1.0, 3.0]), 1).isfinite().tolist() == [True, False, True]


def test_min_p_is_exact_at_one():
    z = torch.tensor([0.0, -2e-8, -1e-7])  # exp rounds all three to 1 in float32
    assert min_p(z, 1).isfinite().tolist() == [True, False, False]


def test_p_of_one_keeps_every_token_of_large_float32_rows():
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        z = 3 * torch.randn(10, 32_000, generator=rng)
        assert top_p(z, 1).equal(z) and top_p_mask(z.softmax(-1), 1).all()


def test_sums_have_more_digits_than_their_terms():
    "On flat rows the size is known: ceil(p V). Float32 sums miss it by many."
    for V in (100_000, 150_000, 250_007):
        for p in (0.3, 0.7, 0.95):
            kept = top_p(torch.zeros(V), p).isfinite().sum().item()
            assert abs(kept - np.ceil(p * V)) <= 1, (V, p, kept)


# ---------------------------------------------------------------- the mass, counted


def depths(n):
    "Numbers from 0 down to where e^d ends, and at the seams of the exponent."
    rng = np.random.default_rng(2)
    seams = (np.arange(-1009, 0) + 0.5) * np.log(2)
    return np.concatenate(
        [
            -rng.uniform(0, 700, n),
            -(10.0 ** rng.uniform(-300, 0, n)),
            seams,
            np.nextafter(seams, 0),
            np.nextafter(seams, -INF),
            [0.0, -0.0, -700, -5e-324],
        ]
    )


def test_the_exponential_is_right(full, record):
    "Against mpmath's with 40 digits; 0 where it says so."
    import mpmath

    d = depths(50_000 if full else 2000)
    with mpmath.workdps(40):
        worst = max(
            float(abs(y / mpmath.exp(x) - 1)) for x, y in zip(d.tolist(), exact_exp(d).tolist())
        )
    record("exact_exp_worst_relative_error", worst)
    assert worst < 1e-14
    assert exact_exp([np.nextafter(-700.0, -INF), -1e300, -INF]).tolist() == [0, 0, 0]
    assert exact_exp([0.0, -0.0]).tolist() == [1, 1] and exact_exp(-1.0).item() == reference.exp(
        -1.0
    )


def test_the_exponential_has_the_same_bits_by_other_means(full):
    d = depths(1_000_000 if full else 50_000)
    ours = exact_exp(d)
    assert (
        exact_exp(torch.tensor(d)).numpy().tobytes() == ours.tobytes() == reference.exp(d).tobytes()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("V", [1, 2, 3, 4, 5, 8, 9, 1000, 1024, 151_936, 262_144])
def test_weights_are_whole_and_fit(dtype, V):
    "Also where all are equal, and where sums are taken in any order; the same by NumPy."
    rng = torch.Generator().manual_seed(V)
    rows = torch.stack(
        [torch.zeros(V), 4 * torch.randn(V, generator=rng), -1.5 * torch.arange(1, V + 1).log()]
    ).to(dtype)
    rows[1, rng.seed() % V if V > 1 else 0] = 9
    if V > 3:
        rows[2, 1::3] = -INF
    w = whole_weights(rows)
    assert w.dtype == torch.float64 and w.equal(w.floor()) and (w >= 0).all()
    wide = rows if dtype == torch.float64 else rows.float()
    for row, own in zip(wide, w):
        assert (
            reference.weights(row.numpy()).tolist() == own.tolist() == whole_weights(row).tolist()
        )
        total = sum(map(int, own.tolist()))  # Python's whole numbers
        assert total <= 2**52 and own.sum() == own.flip(0).sum() == own.cumsum(-1)[-1] == total
    assert w.amax(-1).eq(2.0 ** min(50, 52 - int(np.ceil(np.log2(V))))).all()
    assert w[rows == -INF].eq(0).all()


def test_the_mask_does_not_depend_on_order_batch_or_strides():
    rng = torch.Generator().manual_seed(3)
    z = -1.8 * torch.arange(1, 20_001).log() + 0.8 * torch.randn(6, 20_000, generator=rng)
    for p in (0.5, 0.9, 0.999, 0.99999):
        kept = top_p(z, p).isfinite()
        for i in range(6):
            assert top_p(z[i], p).isfinite().equal(kept[i])
        o = torch.randperm(20_000, generator=rng)
        assert top_p(z[:, o], p).isfinite().equal(kept[:, o])
        assert top_p(z.mT.contiguous().mT, p).isfinite().equal(kept)


def sizes(z, p):
    "The size of the definition: exponentials, sorted, added from the top in extended precision."
    q = np.sort(np.exp(np.asarray(z, np.longdouble)), -1)[..., ::-1]
    return (q.cumsum(-1) < p * q.sum(-1, keepdims=True)).sum(-1) + 1


def real_rows(n):
    "SmolLM2's logits along a text of n tokens."
    from decoding_book.smollm import SmolLM2

    model = SmolLM2()
    text = (
        "The old man went down to the sea and looked at the boats. Nobody had told him that the "
        "harbour was closed, and so he waited there until the evening, thinking of his brother, "
        "of the war, and of the price of fish in 1952."
    )
    with torch.no_grad():
        return model(torch.tensor([model.encode(text)[:n]]), last_only=False).logits[0]


def long_rows(kind, n):
    rng = torch.Generator().manual_seed(0)
    if kind == "normal":
        return 3 * torch.randn(n, 50_257, generator=rng)
    if kind == "power":
        return -1.8 * torch.arange(1, 50_258).log() + 0.8 * torch.randn(n, 50_257, generator=rng)
    return real_rows(n)


@pytest.mark.parametrize("kind", ["normal", "power", "SmolLM2"])
def test_sizes_are_those_of_the_definition(kind, full, record):
    "A float32 softmax, whose total is off by 1e-5, keeps the wrong number in most rows at .999."
    z, wrong = long_rows(kind, 60 if full else 8), {}
    scaled = z - z.amax(-1, keepdim=True)
    for p in (0.9, 0.95, 0.99, 0.999):
        miss = np.abs(top_p(z, p).isfinite().sum(-1).numpy() - sizes(scaled, p))
        assert miss.max() <= (p == 0.999), p
        order = z.argsort(dim=-1, descending=True, stable=True)
        single = (
            torch.nn.functional.pad(
                z.softmax(-1).gather(-1, order).double().cumsum(-1)[:, :-1], (1, 0)
            )
            < p
        )
        wrong[p] = dict(
            rows=len(z),
            ours=int((miss > 0).sum()),
            by_a_float32_softmax=int((single.sum(-1).numpy() != sizes(scaled, p)).sum()),
        )
    record(f"top_p_sizes_{kind}", wrong)
    if kind != "normal":
        assert wrong[0.999]["by_a_float32_softmax"] > len(z) / 2


def test_a_mass_of_exactly_p():
    "Equal logits weigh the same: a prefix of exactly p is complete; a float more, one more."
    for V in (2, 4, 8, 64, 1024, 2**17):
        for n in {1, V // 4 or 1, V // 2, V - 1}:
            p = n / V
            assert top_p(torch.zeros(V), p).isfinite().sum() == n
            assert top_p(torch.zeros(V), np.nextafter(p, 1)).isfinite().sum() == n + 1
            assert top_p(torch.zeros(V), p, boundary="exceed").isfinite().sum() == n + 1
            assert top_p(torch.zeros(V), p, boundary="exclude").isfinite().sum() == n
            assert top_p_mask(torch.full((V,), 1 / V), p).sum() == n


def test_the_line_of_min_p():
    "m = e^d is met by a token at d, or missed by a hair."
    for m in (1e-300, 0.05, 0.3, 0.999):
        line = np.log(m)
        z = torch.tensor(
            [0.0, line + 1e-12 * abs(line), line - 1e-12 * abs(line)], dtype=torch.float64
        )
        assert min_p(z, m).isfinite().tolist() == [True, True, False]
    for m in (5e-324, 2.0**-1074, 1e-310):
        assert min_p(torch.tensor([0.0, -713.0]).double(), m).isfinite().all()
    assert min_p(torch.tensor([0.0, -1e30]), 5e-324).isfinite().tolist() == [True, False]


# ---------------------------------------------------------------- properties


@pytest.fixture(params=[(top_p, 0.8), (min_p, 0.2)], ids=["top_p", "min_p"])
def filter(request):
    f, value = request.param
    return lambda z: f(z, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9)])
def test_shapes_dtypes_and_input_left_alone(filter, dtype, shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = z.clone()
    out = filter(z)
    assert z.equal(before) and out.shape == z.shape
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out[out.isfinite()].equal(z.to(out.dtype)[out.isfinite()])  # it only removes
    flat = out.reshape(-1, 9)
    for i, row in enumerate(z.reshape(-1, 9)):
        assert filter(row).equal(flat[i])


def test_non_contiguous_and_permuted(filter):
    z = torch.randn(30, 12, generator=torch.Generator().manual_seed(3))
    assert filter(z.T.contiguous().T).equal(filter(z))
    assert filter(torch.stack([z, -z], -1)[..., 0]).equal(filter(z))
    perm = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    assert filter(z[:, perm]).equal(filter(z)[:, perm])
    assert filter(z + 5).isfinite().equal(filter(z).isfinite())


def test_parameters_one_a_row():
    z = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(5))
    values = torch.tensor([[0.1, 0.5, 0.9], [1.0, 0.01, 0.7]])
    for f in (top_p, min_p):
        for kind in (values, values.numpy(), values.tolist()):
            out = f(z, kind)
            for i in range(2):
                for j in range(3):
                    assert out[i, j].equal(f(z[i, j], values[i, j].item()))


def test_min_p_is_idempotent_and_top_p_only_shrinks():
    z = torch.randn(200, 40, generator=torch.Generator().manual_seed(6))
    assert min_p(min_p(z, 0.1), 0.1).equal(min_p(z, 0.1))
    once, twice = top_p(z, 0.8).isfinite(), top_p(top_p(z, 0.8), 0.8).isfinite()
    assert (twice <= once).all() and (twice != once).any()


def test_larger_p_and_smaller_m_keep_more():
    z = torch.randn(100, 30, generator=torch.Generator().manual_seed(7))
    for a, b in ((0.2, 0.5), (0.5, 0.9), (0.9, 1.0)):
        assert (top_p(z, a).isfinite() <= top_p(z, b).isfinite()).all()
        assert (min_p(z, a).isfinite() >= min_p(z, b).isfinite()).all()


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("p", [0, -0.1, 1.0001, float("nan"), INF, -INF])
def test_top_p_refuses(p):
    for call in (lambda: top_p(torch.zeros(3), p), lambda: top_p_mask(torch.full((4,), 0.25), p)):
        with pytest.raises(ValueError, match=r"p \(top_p\).*is outside \(0, 1\]"):
            call()


@pytest.mark.parametrize("m", [-1e-9, 1.0001, float("nan"), INF])
def test_min_p_refuses(m):
    with pytest.raises(ValueError, match=r"m \(min_p\).*is outside \[0, 1\]"):
        min_p(torch.zeros(3), m)


def test_refusals_name_argument_row_and_value():
    z = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"p \(top_p\), row 1: 2.0"):
        top_p(z, torch.tensor([0.5, 2.0, 0.5]))
    with pytest.raises(ValueError, match=r"p \(top_p\): shape \(2,\), expected \(\) or \(3,\)"):
        top_p(z, [0.5, 0.5])
    with pytest.raises(TypeError, match="p .top_p.: '.5'"):
        top_p(z, ".5")
    with pytest.raises(TypeError, match="p .top_p.: None"):
        top_p(z, None)
    with pytest.raises(TypeError, match="m .min_p.: True"):
        min_p(z, True)
    with pytest.raises(TypeError, match="logits: torch.int64"):
        top_p(torch.zeros(3, dtype=torch.long), 0.5)
    with pytest.raises(ValueError, match="boundary: 'above'"):
        top_p(z, 0.5, "above")
    with pytest.raises(ValueError, match="ties: 'both'"):
        top_p(z, 0.5, ties="both")
    bad = z.clone()
    bad[2] = -INF
    with pytest.raises(ValueError, match="logits: row 2 has no finite logit"):
        min_p(bad, 0.5)
    bad[2, 1] = float("nan")
    with pytest.raises(ValueError, match="logits: row 2 has NaN"):
        top_p(bad, 0.5)


@pytest.mark.parametrize(
    "q", [[0.5, 0.6], [0.5, 0.4], [1.5, -0.5], [float("nan"), 0.5], [INF, 0.0], [0.0, 0.0]]
)
def test_mask_refuses_what_is_no_distribution(q):
    with pytest.raises(ValueError, match="probabilities: row 1"):
        top_p_mask(torch.tensor([[0.5, 0.5], q]), 0.5)
