"""The fused draw: the plain chain's token on every kind of row, its law, its limits, and what it refuses."""
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from decoding_book import fused
from decoding_book.fused import contenders, draw_fused, fused_sample, group_maxima, lucky
from decoding_book.loop import generate
from decoding_book.noise import Key, gumbel_of, uniform_bits
from decoding_book.sampler import DIALECTS, ORDER, Sampler, draw, draw_plain, find_backend, truncate
from decoding_book.toy import six_words
from laws import chi_square

INF = float("inf")
DATA = np.load(Path(__file__).parent / "oracle/open.npz", allow_pickle=False)
OFF = dict(temperature=1., top_k=None, top_p=1., min_p=0.)
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rows(rng, kind, B, V):
    "Logits (B, V) of a kind."
    z = torch.randn(B, V, generator=torch.Generator().manual_seed(int(rng.integers(1 << 40))))
    if kind == "peaked":
        best = torch.from_numpy(rng.integers(0, V, (B, min(V, 40))))
        return (2 * z).scatter(1, best, 16 - .7 * torch.arange(best.shape[1]).float().expand(B, -1))
    if kind == "masked":
        z = (3 * z).where(z > float(rng.choice([-1, 0, 1.5])), -INF)
        z[:, int(rng.integers(V))] = 0.
        return z
    if kind == "finite mask": return (3 * z).where(z > -1, torch.finfo(torch.float32).min)
    if kind == "steps": return -(torch.arange(V) // int(rng.integers(1, 50))).float().expand(B, V) * .1
    if kind == "neighbours":                               # floats one after the other
        start = np.full((B, V), rng.choice([1., 3.3, -2., 1e4]), np.float32).view(np.int32)
        return torch.from_numpy((start + rng.integers(0, int(rng.choice([3, 300])), (B, V), np.int32)).view(np.float32))
    if kind == "block":                                    # many equal ones, and a few above them
        z = torch.full((B, V), -3.).index_fill(1, torch.from_numpy(rng.permutation(V)[:int(rng.choice([10, 64, 1000, 9000]))]), 1.)
        return z.index_fill(1, torch.from_numpy(rng.integers(0, V, int(rng.integers(1, 80)))), float(rng.choice([2.5, 5.])))
    return {"wide": 3 * z, "tail": z + 5 * (torch.arange(V) >= V // 128 * 128), "flat": .1 * z, "narrow": .01 * z, "tied": (2 * z).round(), "huge": 1e30 * z,
            "equal": torch.zeros(B, V), "half steps": (4 * z).round() / 2}[kind]


KINDS = ["peaked", "wide", "flat", "narrow", "tied", "half steps", "masked", "finite mask", "steps", "huge", "equal",
         "neighbours", "block", "tail"]


def request(rng, B, V):
    "Parameters: plain numbers, or one a row with rows that are off."
    values = dict(temperature=rng.choice([1., .8, .5, 1.5, .05, 3., 0., 1e-30]), top_k=int(rng.choice([1, 2, 5, 50, 400, V, 3 * V])),
                  top_p=rng.choice([.9, .5, .99, .1, .999, 1e-9, .25, 2 / 3, .999999, 1 - 1e-7]),
                  min_p=rng.choice([.05, .5, 1e-4, 1., 1e-8, np.exp(-1), np.exp(-4)]))
    on = rng.random(4) < [.8, .4, .45, .35]
    if rng.random() < .3:
        return {n: [v if rng.random() < .6 and use else OFF[n] for _ in range(B)] for (n, v), use in zip(values.items(), on)}
    return {n: float(v) if n != "top_k" else v for (n, v), use in zip(values.items(), on) if use}


def compare(z, params, key):
    "Both forms agree: token, kept set's size, log-probability; returns whether the row went to plain."
    sampler = Sampler(**params)
    fast, slow = draw(z, sampler, key, "fused"), draw(z, sampler, key, "plain")
    assert fast.ids.equal(slow.ids), (z.shape, params, fast.ids, slow.ids)
    assert fast.kept.equal(slow.kept), (z.shape, params, fast.kept, slow.kept)
    assert fast.logprob.dtype == slow.logprob.dtype
    law = truncate(z, sampler).double().log_softmax(-1).gather(-1, slow.ids[:, None])[:, 0]   # plain's float32 sum drifts
    torch.testing.assert_close(fast.logprob.double(), law, atol=1e-5 if z.shape[1] < 5000 else 1e-4, rtol=1e-5)
    short = fused_sample(z, **params, seed=key.seed, row=key.row, position=key.position)
    assert short.equal(slow.ids)


@pytest.fixture
def paths(monkeypatch):
    "How often each way through the module is taken."
    seen = Counter()
    for name in ("_plain", "_race", "_first_kept", "_divided", "_pick"):
        real = getattr(fused, name)
        def counted(*args, name=name, real=real, **more):
            seen[name] += 1
            return real(*args, **more)
        monkeypatch.setattr(fused, name, counted)
    return seen


# ---------------------------------------------------------------- the same token

def same_token(total, sizes, batch, rng, seen):
    "Rows of every kind until `total`; a row is one request, answered by both forms."
    n = 0
    while n < total:
        V, B, kind = int(rng.choice(sizes)), int(rng.integers(1, batch + 1)), str(rng.choice(KINDS))
        z = rows(rng, kind, B, V).to(DTYPES[rng.integers(len(DTYPES))])
        if not torch.isfinite(z.float().amax(-1)).all(): continue                 # float16 overflowed
        row = None if rng.random() < .5 else torch.from_numpy(rng.integers(0, 2**32, B))
        key = Key(int(rng.integers(0, 2**63)), row, int(rng.integers(0, 5000)))
        compare(z, request(rng, B, V), key)
        n += B
        seen[kind] += B
    return n


@pytest.mark.parametrize("part", range(4))
def test_same_token(part, full, record, paths):
    "The issue's count, small vocabularies; half of it where groups are used."
    rng, seen = np.random.default_rng(part), Counter()
    sizes = [[1, 2, 3, 7, 50], [100, 300, 1024], [1025, 1100, 1500, 2000], [1300, 2000]][part]
    n = same_token(49_000 if full else 1000, sizes, 24, rng, seen)
    assert set(seen) == set(KINDS)
    if part > 1: assert min(paths["_race"], paths["_first_kept"], paths["_divided"]) > 10
    assert paths["_plain"] <= n / 10                       # of 2 n draws
    record(f"fused_same_token_{part}", {"rows": n, "left out": 0, "V": sizes, "plain": paths["_plain"], "raced": paths["_race"]})


@pytest.mark.parametrize("V", [50_257, 151_936])
def test_same_token_large(V, full, record, paths):
    rng, seen = np.random.default_rng(V), Counter()
    n = same_token(2000 if full else 24, [V], 4, rng, seen)
    record(f"fused_same_token_{V}", {"rows": n, "left out": 0, "plain": paths["_plain"], "raced": paths["_race"]})


def test_oracle_kept_sets():
    "The size of the kept set, and 200 draws that never leave it and reach most of it."
    names = {"topk": ("top_k",), "topp": ("top_p",), "minp": ("min_p",), "joint": ("top_k", "top_p"), "joint_minp": ORDER[1:]}
    for i in range(70):
        V = DATA["filt_V"][i]
        z = torch.tensor(DATA["filt_logits"][i, :V]).expand(200, -1)
        for name, on in names.items():
            params = {n: DATA[f"filt_{n}"][i].item() for n in on}
            keep = torch.tensor(DATA[f"filt_keep_{name}"][i, :V])
            out = fused_sample(z, DATA["filt_T"][i].item(), **params, seed=i, details=True)
            assert out.kept.unique().tolist() == [keep.sum().item()] and keep[out.ids].all(), (i, name)
            p = torch.tensor(DATA[f"filt_p_{name}"][i, :V])
            torch.testing.assert_close(out.logprob, p[out.ids].log(), atol=1e-9, rtol=1e-9)
            likely = (p > .1).nonzero()[:, 0].tolist()
            assert set(likely) <= set(out.ids.tolist())


def test_ties_at_the_kth_and_at_the_crossing():
    "Blocks of equal logits across the cut, at every id: lower ids stay."
    rng = np.random.default_rng(3)
    for V in (40, 3000):
        for trial in range(60):
            z = torch.full((4, V), -3.)
            high = torch.from_numpy(rng.permutation(V)[:30])
            z[:, high[:10]] = 2.
            z[:, high[10:]] = 1.
            key = Key(trial, torch.arange(4) + 100)
            for params in (dict(top_k=int(rng.integers(1, 31))), dict(top_p=float(rng.uniform(.05, .95))),
                           dict(top_k=25, top_p=float(rng.uniform(.2, .99))), dict(min_p=float(np.exp(-1.)))):
                compare(z, params, key)


def test_division_makes_ties():
    "Neighbouring floats that are equal after the division by T, across the k-th place, ids reversed."
    for T in (.8, .3, 1.7, 2.3):
        for start in (1.6, 1.1, 3.3):
            x = [torch.tensor(start)]
            for _ in range(299): x.append(torch.nextafter(x[-1], torch.tensor(10.)))
            z = torch.full((3, 5000), -2.)
            z[:, torch.arange(300) * 16 + 5] = torch.stack(x)                    # the best has the highest id
            for k in (10, 64, 65, 200, 299):
                for seed in range(5): compare(z, dict(temperature=T, top_k=k), Key(seed))
            compare(z, dict(temperature=T, top_p=.0025), Key(1))


def test_logits_that_overflow(paths):
    "A row that T would make infinite is divided as the plain chain does it; a removed token is no reason to."
    z = 1e34 * torch.randn(6, 3000, generator=torch.Generator().manual_seed(1))
    for params in (dict(top_k=20), dict(top_p=.9), dict(min_p=.1), {}): compare(z, dict(temperature=1e-5, **params), Key(0))
    assert paths["_divided"] >= 8
    for V in 3, 3000, 5000:                                # one large logit, and no other
        for big, T in (3e38, .5), (1e34, 1e-5), (-3e38, .5):
            z = torch.zeros(2, V) if big > 0 else torch.full((2, V), -INF)
            z[0, V // 2] = z[1, 0] = big
            for params in (dict(top_k=2), dict(top_p=.9), dict(min_p=.1), {}): compare(z, dict(temperature=T, **params), Key(0))
    before = paths["_divided"]
    compare(torch.randn(4, 3000).index_fill(1, torch.arange(9), -INF), dict(temperature=.5, top_k=20), Key(0))
    compare(torch.randn(4, 3000).index_fill(1, torch.arange(9), -3e38), dict(temperature=.5, top_p=.9), Key(0))
    assert paths["_divided"] == before


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("V", [900, 3000, 50_257])
@pytest.mark.parametrize("least", [-3.4028234663852886e38, -3e38, -1e38, -1e30])
def test_masks_of_finite_numbers(V, least):
    "Few tokens are allowed, the others have a hopeless finite logit: such a token counts, ranks by id and is not drawn."
    z = torch.full((3, V), least)
    z[:, [5, V // 2, V - 1]] = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    z[1, :V // 3] = -INF
    z[2] = 3 * torch.randn(V, generator=torch.Generator().manual_seed(3))
    z[2, :V // 2] = least
    for T in (1., .8, .1, 3.):
        for params in (dict(top_k=50), dict(top_k=2), dict(top_p=.9), dict(top_k=50, top_p=.99), dict(min_p=.1), {}):
            for part in (z, z[2:]): compare(part, dict(temperature=T, **params), Key(7))


def test_equal_scores_go_to_the_lower_id(monkeypatch):
    "With the noise switched off every token of the best logit has the same score."
    monkeypatch.setattr(fused, "_gumbel", lambda bits: np.zeros(bits.shape, np.float32))
    for V in (50, 3000, 8000):
        z = torch.zeros(2, V)
        z[:, V // 3:V // 3 + 9] = 2.
        for params in (dict(top_k=20), dict(top_k=30, top_p=.99), dict(min_p=.5)):
            assert fused_sample(z, **params).tolist() == [V // 3] * 2, (V, params)


def test_where_rounding_decides(paths):
    "A mass of exactly p: the rows go to plain, and only such rows."
    z = torch.log(torch.tensor([[4., 2, 1, 1] + [0] * 2000]))
    compare(z, dict(top_k=4, top_p=.5), Key(0))
    assert paths["_plain"] == 2                            # once by draw, once by fused_sample
    compare(z, dict(top_k=4, top_p=.7), Key(0))
    assert paths["_plain"] == 2
    flat = torch.zeros(20, 20_000)
    for p in (.25, .5, .75): compare(flat, dict(top_p=p), Key(3))
    assert paths["_first_kept"] == 120


@pytest.mark.parametrize("V", [8, 5000])
def test_where_rounding_decides_with_min_p(V, paths):
    "Min-p does not settle what the margin left open: three equal tokens, and p at the mass of two, where floats differ."
    z = torch.full((40, V), -30.)
    z[:, [1, 4, 6]] = 2.
    for k, p in ((5, 2 / 3), (5, .66666667), (50, .33333334), (3, .333333)):
        compare(z, dict(top_k=k, top_p=p, min_p=.01), Key(3))
    assert paths["_plain"] == 2 * 40 * (4 if V > 50 else 3)                     # a k of 50 is none for eight tokens


@pytest.mark.parametrize("V", [20_000, 60_000])
def test_a_list_that_was_cut_off(V, paths):
    "More candidates than a list holds, the best of them at its end: the list's winner may be out of the nucleus."
    z = torch.zeros(1, V)
    if V > 20_000: z[0, 20_000:-1000] = -9.
    z[0, -1000:-500] = 1.
    z[0, -500:] = 3.
    for p in (.35, .3):
        for seed in range(30): compare(z, dict(top_p=p), Key(seed))
    z[0, -900:] = .5                                       # the best: too few to hold p, while what is left of the list does
    for seed in range(10): compare(z, dict(top_p=.3), Key(seed))
    assert paths["_first_kept"] >= 60 and paths["_plain"] < 60


@pytest.mark.parametrize("V", [3, 900, 5000])
def test_min_p_between_two_floats(V):
    "A logit of float32(log m) is below log m: the line is float64, as the plain chain's."
    z = torch.full((1, V), float(np.float32(np.log(.1))))
    z[0, :V // 2] += 1e-4
    z[0, 0] = 0.
    for seed in range(10): compare(z, dict(min_p=.1), Key(seed))
    assert draw(z, Sampler(min_p=.1), Key(0)).kept.item() == max(1, V // 2)


def test_top_p_that_rounding_never_reaches():
    "Probabilities that sum to less than p: every finite token is kept."
    hopeless = torch.full((1, 3000), -1e4)
    hopeless[0, :2] = torch.tensor([0., 2.])
    hopeless[0, -5:] = -INF
    compare(hopeless, dict(top_p=1 - 1e-8), Key(0))
    wide = 4 * torch.randn(40, 1500, generator=torch.Generator().manual_seed(18))
    for p in (1 - 1e-7, 1 - 1e-6, 1 - 1e-8): compare(wide, dict(top_p=p), Key(18))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("big, dtype", [(3e38, torch.float32), (3e38, torch.bfloat16), (1e308, torch.float64)])
def test_differences_that_overflow(big, dtype):
    "The largest and the least number side by side: nothing is printed."
    for V in 2, 5000:
        z = torch.full((1, V), -big, dtype=dtype)
        z[0, V // 2] = big
        for T in (1., .9, 3.):
            for params in ({}, dict(top_k=2), dict(top_p=.9), dict(min_p=.1)): compare(z, dict(temperature=T, **params), Key(0))


def test_logits_that_are_lazily_negated():
    z = torch.complex(torch.randn(3, 2000), torch.randn(3, 2000)).conj().imag
    assert z.is_neg()
    compare(z, dict(top_k=5), Key(3))
    compare(torch._neg_view(torch.randn(3, 2000)), {}, Key(3))                  # contiguous as it is


def test_no_rows_and_bad_parameters():
    none = torch.zeros(0, 5)
    assert fused_sample(none, .8, 3, .9, .1).shape == (0,)
    with pytest.raises(ValueError, match="temperature: -1"): fused_sample(none, -1)
    for backend in ("fused", "plain"):
        with pytest.raises(ValueError, match="top_k"): draw(none, Sampler(top_k=[1, 2]), Key(0), backend)


def test_margin(full, record):
    "Masses of the survivors of top-k differ from the plain chain's by far less than the margin."
    rng, worst = np.random.default_rng(8), 0.
    for trial in range(2000 if full else 150):
        V, k = int(rng.integers(1100, 60_000)), int(rng.choice([5, 50, 1000]))
        z = rows(rng, str(rng.choice(["peaked", "wide", "flat", "tied"])), 1, V)
        cut = truncate(z, Sampler(top_k=k))
        q, order = cut.softmax(-1)[0].double(), cut[0].argsort(descending=True, stable=True)[:k]
        d = (z[0, order] - z[0, order[0]]).numpy()
        e = np.exp(d)
        ours = (e / e.sum()).cumsum(dtype=np.float64)
        worst = max(worst, np.abs(ours - q[order].cumsum(0).numpy()).max())
    record("fused_margin", {"largest difference of a mass": worst, "margin": 1e-5})
    assert worst < 1e-5 / 5


# ---------------------------------------------------------------- the parts

@pytest.mark.parametrize("V", [1025, 2048, 3000, 32_000, 50_257])
def test_contenders(V):
    rng = np.random.default_rng(V)
    for kind in ("wide", "flat", "tied", "masked", "equal", "steps"):
        row = rows(rng, kind, 1, V)[0].contiguous()
        for n in (1, 2, 50, 64, 300, 1000):
            ids, floor, top = contenders(row[None], [n])
            assert top == row.max().item()
            assert np.array_equal(ids, np.flatnonzero(row.numpy() > floor[0]))
            best = row.sort(descending=True).values[n - 1].item()
            assert floor < best or best == -INF


@pytest.mark.parametrize("V", [1025, 3000, 50_257])
def test_contenders_of_a_batch(V):
    "Each row has its own floor; what stands in it does not depend on the others."
    rng, n = np.random.default_rng(V), [1, 50, 1000, 64, 7, 300]
    z = torch.cat([rows(rng, kind, 1, V) for kind in ("wide", "flat", "tied", "masked", "equal", "steps")])
    z[:, -1] = 20 + torch.arange(6)                                # in the rest that is in no group
    for part in (slice(0, 6), slice(0, 4), slice(0, 2)):           # the last has groups of 16, if V allows
        places, floor, top = contenders(z[part], n[part])
        of, ids = np.divmod(places, V)
        for i, row in enumerate(z[part]):
            nth = row.sort(descending=True).values[n[i] - 1].item()
            assert np.array_equal(ids[of == i], np.flatnonzero(row.numpy() > floor[i])) and top[i] == row.max()
            assert floor[i] < nth or nth == -INF


def test_group_maxima_cover_the_row():
    for V in (1025, 16 * 1024, 50_257):
        row = torch.randperm(V).float()
        grouped = row[:V // 128 * 128]
        first, last = (x[0] for x in group_maxima(row[None], 8))
        for block in (first, last): assert block.max() == grouped.max() and len(np.unique(block)) == len(block)
        for best in range(V - 1, V - 9, -1): assert (first >= best).sum() <= V - best


def test_lucky_tokens_have_the_noise_chapters_bits():
    rng = np.random.default_rng(0)
    for V in (1, 5, 1024, 1_000_000):
        for limit in (0, V // 3, V // 2 - 1, V // 2, 2**17, 2**28, 2**32 - 1):       # backwards below V / 2
            key = Key(int(rng.integers(0, 2**63)), int(rng.integers(0, 2**32)), 7, 2)
            ids, bits = lucky(V, key.words(), limit)
            every = uniform_bits(key, V)
            assert np.array_equal(bits, every[ids].numpy())
            assert set((every <= limit).nonzero()[:, 0].tolist()) <= set(ids.tolist())
            assert (bits <= (limit | 0x1ffff)).all() and np.array_equal(ids, np.unique(ids))


def test_noise_bit_for_bit(full):
    bits = torch.randint(0, 2**32, (20_000_000 if full else 500_000,))
    bits[:4] = torch.tensor([0, 1, 2**32 - 1, 2**32 - 257])
    whole = gumbel_of(bits)
    assert torch.from_numpy(fused._gumbel(bits.numpy())).equal(whole)
    for n in (1, 3, 17, 50, 65):                           # nor does the place in a vector matter
        at = torch.randint(0, len(bits), (n,))
        assert torch.from_numpy(fused._gumbel(bits[at].numpy())).equal(whole[at])


# ---------------------------------------------------------------- the law

@pytest.mark.parametrize("params", [dict(), dict(top_k=7), dict(top_p=.9), dict(min_p=.2),
                                    dict(temperature=1.4, top_k=9, top_p=.95, min_p=.05)], ids=str)
@pytest.mark.parametrize("V", [12, 1400])
def test_chi_square(V, params, full, record):
    n = (1_000_000 if V == 12 else 40_000) if full else (100_000 if V == 12 else 2000)
    z = torch.randn(1, V, generator=torch.Generator().manual_seed(5)) * (1.5 if V == 12 else .7)
    q, counts, batch = Sampler(**params).distribution(z.double())[0], torch.zeros(V), 50_000 if V == 12 else 2000
    for position in range(n // batch):
        out = fused_sample(z.expand(batch, -1), **params, seed=13, position=position, details=True)
        counts += out.ids.bincount(minlength=V)
        assert out.kept.eq((q > 0).sum()).all()
    assert counts[q == 0].sum() == 0
    p = chi_square(counts, q, n)
    record(f"chi2_fused_{V}_{'_'.join(params) or 'plain'}", {"draws": n, "p": p})
    assert p > 1e-4


# ---------------------------------------------------------------- worst rows

def test_worst_rows_take_bounded_time(full, paths):
    "No row takes more than a fixed number of looks at it, whatever is asked."
    V = 151_936 if full else 40_000
    exact = torch.cat([torch.tensor([V - 1.]).log(), torch.zeros(V - 1)])
    cases = {"uniform": torch.zeros(V), "stairs": -(torch.arange(V) // (V // 30)).float() * .2, "exact": exact,
             "two values": (torch.arange(V) % 2).float(), "rising": torch.linspace(0, .01, V),
             "late": torch.cat([torch.zeros(V - 9000), torch.full((9000,), 3.)])}
    for z in cases.values():
        for params in (dict(top_k=50), dict(top_k=V - 1), dict(top_p=.5), dict(top_p=.001), dict(top_p=.9), dict(min_p=.3),
                       dict(top_p=.5, min_p=.9), dict(top_k=9000, top_p=.5), {}):
            for seed in range(2):
                before = sum(paths.values())
                compare(z[None], params, Key(seed))
                assert sum(paths.values()) - before <= 12


def test_proposals_are_few(monkeypatch):
    "On a flat row and a small p the sums needed grow like log(1/p), not like 1/p."
    sums, real = [], fused._mass_before
    monkeypatch.setattr(fused, "_mass_before", lambda *a: sums.append(1) or real(*a))
    z = .01 * torch.randn(1, 100_000, generator=torch.Generator().manual_seed(1))
    for seed in range(60): fused_sample(z, top_p=.02, seed=seed)
    assert 60 <= len(sums) < 60 * 9


# ---------------------------------------------------------------- the seam

def test_the_sampler_takes_it_by_itself():
    assert find_backend() is draw_fused and find_backend(None, Sampler()) is draw_fused
    assert find_backend(None, Sampler(), torch.device("cpu")) is draw_fused
    assert find_backend(None, Sampler(repetition_penalty=1.2, logit_bias={0: 1.})) is draw_fused
    for name in set(DIALECTS) - {"book"}: assert find_backend(None, Sampler.dialect(name)) is draw_plain
    assert find_backend(None, Sampler(boundary="exclude")) is draw_plain
    assert find_backend("plain", Sampler()) is draw_plain
    import importlib.util
    gpu = all(map(importlib.util.find_spec, ("triton", "decoding_book.cuda")))
    if not gpu: assert find_backend(None, Sampler(), "cuda") is draw_plain
    assert find_backend(None, Sampler(), "meta") is draw_plain


def test_in_the_loop():
    "Texts with penalties, early ends and parameters by row are those of the plain chain."
    world, prompts = six_words(), ["I", "", "cold coffee", "I like", "water"] * 4
    params = dict(temperature=[.5, 1., 2., 0., 1.5] * 4, top_p=[.9, .8, 1., .7, .95] * 4, repetition_penalty=1.3, seed=5)
    fast, slow = (generate(world, prompts, Sampler(**params, backend=b), max_new_tokens=6) for b in (None, "plain"))
    assert [i.tolist() for i in fast.ids] == [i.tolist() for i in slow.ids]
    for a, b in zip(fast.steps, slow.steps): assert a.draw.kept.equal(b.draw.kept)


def test_a_row_alone_equals_the_row_in_a_batch():
    z, n = rows(np.random.default_rng(1), "wide", 9, 4000), torch.arange(9) + 50
    params = dict(temperature=[.5, 1., 2.] * 3, top_k=[0, 0, 50] * 3, top_p=[.9, 1., .8] * 3, min_p=[0., .01, 0.] * 3)
    whole = fused_sample(z, **params, seed=[3] * 9, row=n, position=n, details=True)
    for some in ([4], [8, 0], [2, 2, 5]):
        part = fused_sample(z[some], **{m: [v[i] for i in some] for m, v in params.items()}, seed=3, row=n[some],
                            position=n[some], details=True)
        assert part.ids.equal(whole.ids[some]) and part.kept.equal(whole.kept[some]) and part.logprob.equal(whole.logprob[some])


def test_input_is_left_alone_and_layout_does_not_matter():
    z = rows(np.random.default_rng(2), "wide", 4, 3000)
    copy, wide = z.clone(), torch.zeros(4, 6000)
    wide[:, ::2] = z
    ids = fused_sample(z, .8, top_p=.9)
    assert z.equal(copy) and fused_sample(wide[:, ::2], .8, top_p=.9).equal(ids)
    assert fused_sample(z.T.contiguous().T, .8, top_p=.9).equal(ids)
    assert fused_sample(z.requires_grad_(), .8, top_p=.9).equal(ids)
    assert fused_sample(copy[0].expand(3, -1), .8, top_p=.9, row=0).unique().numel() == 1


def test_shapes():
    assert fused_sample(torch.zeros(0, 5)).shape == (0,)
    assert fused_sample([[0., 1.]], top_k=1).tolist() == [1]
    out = fused_sample(torch.randn(3, 2000).double(), details=True)
    assert out.ids.dtype == torch.int64 and out.kept.tolist() == [2000] * 3 and out.logprob.dtype == torch.float64
    assert fused_sample(torch.randn(2, 9)).shape == (2,)


@pytest.mark.parametrize("V", [9, 3000])
@pytest.mark.parametrize("bad,error,text", [
    (dict(temperature=-1), ValueError, r"temperature: -1 is outside \[0, inf\)"), (dict(temperature=None), TypeError, "temperature"),
    (dict(temperature=float("nan")), ValueError, "temperature: nan"), (dict(temperature=True), TypeError, "temperature: True"),
    (dict(temperature=[1., -2., 1.]), ValueError, "temperature, row 1: -2.0"), (dict(top_k=-1), ValueError, "top_k: -1"),
    (dict(top_k=1.5), ValueError, "top_k: 1.5 is not an integer"), (dict(top_k="5"), TypeError, "top_k: '5'"),
    (dict(top_p=0), ValueError, r"top_p: 0 is outside \(0, 1\]"), (dict(top_p=None), TypeError, "top_p"),
    (dict(top_p=torch.tensor([.5, 1.5, 1.])), ValueError, "top_p, row 1: 1.5"), (dict(min_p=2), ValueError, "min_p: 2"),
    (dict(min_p=[.1, .2]), ValueError, r"min_p: shape \(2,\)"), (dict(seed=-1), ValueError, "seed: -1"),
    (dict(seed=.5), TypeError, "seed: 0.5"), (dict(row=[1, 2**32, 3]), ValueError, "row, row 1"), (dict(row=[1, 2]), ValueError, r"key: row of shape \(2,\)"),
    (dict(position=-3), ValueError, "position: -3"), (dict(seed=True), TypeError, "seed: True"),
])
def test_refused(V, bad, error, text):
    with pytest.raises(error, match=text): fused_sample(torch.zeros(3, V), **bad)


@pytest.mark.parametrize("V", [9, 3000])
def test_bad_logits(V):
    for value in (float("nan"), INF):
        z = torch.zeros(3, V)
        z[1, 5] = value
        for params in ({}, dict(top_k=3), dict(top_p=.5, temperature=.7)):
            with pytest.raises(ValueError, match="logits: row 1"): fused_sample(z, **params)
    z = torch.zeros(3, V)
    z[2] = -INF
    with pytest.raises(ValueError, match="logits: row 2 has no finite logit"): fused_sample(z, .5)
    with pytest.raises(TypeError, match="logits: torch.int64"): fused_sample(torch.zeros(3, V).long())
    for shape in ((V,), (2, 3, V), (3, 0)):
        with pytest.raises(ValueError, match="logits: shape"): fused_sample(torch.zeros(shape))
    with pytest.raises(ValueError, match="logits: .* meta"): fused_sample(torch.zeros(3, V, device="meta"))
    with pytest.raises(ValueError, match="'fused' knows order"): draw_fused(torch.zeros(3, V), Sampler(ties="all"), Key())
