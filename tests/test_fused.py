"""The fused draw: the plain chain's token on every row, its parts, its law, how it is compiled, and
what it refuses."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from helpers.laws import chi_square
from helpers.new_process import run_python
from helpers.numpy_draw import FLOATS, KINDS, SIZES, TYPES, a_case

from decoding_book import fused, noise, topp
from decoding_book.fused import draw_fused, fused_sample
from decoding_book.loop import generate
from decoding_book.noise import Key, hash_bits
from decoding_book.sampler import DIALECTS, ORDER, Sampler, draw, draw_plain, find_backend, missing
from decoding_book.toy import six_words

INF = float("inf")
ROOT = Path(__file__).resolve().parent.parent
OPEN = np.load(ROOT / "tests/oracle/cases.npz", allow_pickle=False)
DRAWS = np.load(ROOT / "tests/oracle/draw.npz", allow_pickle=False)
OFF = dict(temperature=1.0, top_k=None, top_p=1.0, min_p=0.0)


# ------------------------------------------------------------------ the same token


def same(z, params, key):
    "Both forms of the draw: ids, kept counts, log-probabilities; and ids alone."
    sampler = Sampler(**params)
    fast, slow = draw(z, sampler, key, "fused"), draw(z, sampler, key, "plain")
    assert fast.ids.equal(slow.ids), (z.shape, params, fast.ids, slow.ids)
    assert fast.kept.equal(slow.kept), (z.shape, params, fast.kept, slow.kept)
    assert fast.logprob.dtype == slow.logprob.dtype
    wide = 1e-6 if z.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(fast.logprob, slow.logprob, atol=wide, rtol=wide)
    short = fused_sample(z, **params, seed=key.seed, row=key.row, position=key.position)
    assert key.draw or short.equal(slow.ids)
    return len(z)


def peaked(rng, B, V):
    "A broad floor and up to 40 tokens that stand out."
    z = 2 * rng.normal(size=(B, V))
    ids = rng.integers(0, V, (B, min(V, 40)))
    np.put_along_axis(z, ids, 16 - 0.7 * np.arange(ids.shape[1]) + rng.normal(size=ids.shape), 1)
    return z


def special(rng, kind, B, V):
    "Rows that strain the lists: blocks of equals, steps, neighbouring floats, finite masks."
    if kind == "peaked":
        return peaked(rng, B, V)
    if kind == "steps":
        return np.broadcast_to(-(np.arange(V) // rng.integers(1, 50)) * 0.1, (B, V))
    if kind == "neighbours":
        start = np.full((B, V), rng.choice([1.0, 3.3, -2.0, 1e4]), np.float32).view(np.int32)
        return (start + rng.integers(0, rng.choice([3, 300]), (B, V), np.int32)).view(np.float32)
    if kind == "mask":
        z = 3 * rng.normal(size=(B, V))
        return np.where(z > rng.choice([-1, 1]), z, np.finfo(np.float32).min)
    z = np.full((B, V), -3.0)
    z[:, rng.permutation(V)[: rng.choice([10, 64, 1000, 9000])]] = 1.0
    z[:, rng.integers(0, V, rng.integers(1, 80))] = rng.choice([2.5, 5.0])
    return z


SPECIAL = ("peaked", "steps", "neighbours", "mask", "block")


def request(rng, B, V):
    "Parameters: plain numbers, or one a row with rows that are off."
    values = dict(
        temperature=float(rng.choice([1, 0.8, 0.5, 1.5, 0.05, 3, 0, 1e-30, 1e30])),
        top_k=int(rng.choice([1, 2, 5, 50, 400, V, 3 * V])),
        top_p=float(rng.choice([0.9, 0.5, 0.99, 0.1, 0.999, 1e-9, 0.25, 2 / 3, 1 - 1e-7])),
        min_p=float(rng.choice([0.05, 0.5, 1e-4, 1, 1e-8, np.exp(-1), np.exp(-4)])),
    )
    on = dict(zip(values, rng.random(4) < [0.8, 0.4, 0.45, 0.35]))
    if rng.random() < 0.7:
        return {n: v for n, v in values.items() if on[n]}
    return {
        n: [v if on[n] and rng.random() < 0.6 else OFF[n] for _ in range(B)]
        for n, v in values.items()
    }


def in_type(z, dtype):
    "float64 numbers as a tensor of a float type, no number infinite that was not."
    z, most = torch.as_tensor(np.ascontiguousarray(z)).double(), torch.finfo(dtype).max
    return z.clamp(-most, most).where(z.isfinite(), z).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_same_token_as_the_plain_chain(kind, full, record):
    "Rows, parameters and keys of the draw's reference: one of everything in each batch."
    rng, rows, B = np.random.default_rng(KINDS.index(kind)), 0, 40
    for turn in range(34 if full else 1):
        for V in SIZES:
            dtype = TYPES[turn % len(TYPES)]
            cases = [a_case(rng, V, kind, dtype) for _ in range(B)]
            z = torch.stack([torch.tensor(row).to(getattr(torch, dtype)) for row, _, _ in cases])
            params = {n: [p[n] for _, p, _ in cases] for n in ORDER}
            rows += same(z, params, Key(**{n: [k[n] for _, _, k in cases] for n in cases[0][2]}))
    record(f"fused_same_token_{kind}", {"rows": rows, "left out": 0})


@pytest.mark.parametrize("sizes", [(1, 2, 7, 50, 300), (1024, 1025, 1500, 3000, 5003)], ids=str)
def test_same_token_in_lists(sizes, full, record):
    "Rows that strain the lists, plain numbers as parameters and lists of them."
    rng, rows, seen = np.random.default_rng(sizes[0]), 0, Counter()
    enough = 700
    if full:
        enough = 100_000 if sizes[0] == 1 else 40_000
    while rows < enough:
        V, B, kind = int(rng.choice(sizes)), int(rng.integers(1, 25)), str(rng.choice(SPECIAL))
        z = in_type(special(rng, kind, B, V), getattr(torch, str(rng.choice(TYPES))))
        row = None if rng.random() < 0.5 else torch.from_numpy(rng.integers(0, 2**32, B))
        key = Key(int(rng.integers(0, 2**63)), row, int(rng.integers(0, 5000)))
        rows += same(z, request(rng, B, V), key)
        seen[kind] += B
    assert set(seen) == set(SPECIAL)
    record(f"fused_same_token_{sizes}", {"rows": rows, "left out": 0, "kinds": dict(seen)})


@pytest.mark.parametrize("V", [32_000, 50_257, 151_936, 262_144])
def test_same_token_large(V, full, record):
    rng, rows = np.random.default_rng(V), 0
    kinds = [*SPECIAL, *KINDS]
    for kind in kinds * (20 if full else 1) if full else kinds[V % 4 :: 4]:
        if kind in SPECIAL:
            z = in_type(special(rng, kind, 2, V), getattr(torch, str(rng.choice(TYPES))))
            rows += same(z, request(rng, 2, V), Key(int(rng.integers(2**63))))
            continue
        dtype = str(rng.choice(TYPES))
        z, params, key = a_case(rng, V, kind, dtype)
        rows += same(torch.tensor(z).to(getattr(torch, dtype))[None], params, Key(**key))
    record(f"fused_same_token_{V}", {"rows": rows, "left out": 0})


def test_recorded_draws_are_drawn_again():
    "The vectors that every language has."
    rows = np.split(DRAWS["logits"], DRAWS["size"].cumsum()[:-1])
    for i, row in enumerate(rows):
        z = torch.tensor(row).to(getattr(torch, FLOATS[DRAWS["type"][i]]))
        params = Sampler(**{n: DRAWS[n][i].item() for n in ORDER})
        key = Key(**{n: [DRAWS[n][i].item()] for n in ("seed", "row", "position", "draw")})
        out = draw_fused(z[None], params, key)
        assert (out.ids.item(), out.kept.item()) == (DRAWS["token"][i], DRAWS["kept"][i]), i
        assert out.logprob.item() == pytest.approx(DRAWS["logprob"][i], abs=1e-6, rel=1e-6)


def test_oracle_kept_sets():
    "The size of the kept set, and 200 draws that never leave it and reach most of it."
    sets = dict(topk=("top_k",), topp=("top_p",), minp=("min_p",), joint=("top_k", "top_p"))
    for i in range(70):
        V = OPEN["filt_V"][i]
        z = torch.tensor(OPEN["filt_logits"][i, :V]).expand(200, -1)
        for name, on in dict(sets, joint_minp=ORDER[1:]).items():
            params = {n: OPEN[f"filt_{n}"][i].item() for n in on}
            keep = torch.tensor(OPEN[f"filt_keep_{name}"][i, :V])
            out = fused_sample(z, OPEN["filt_T"][i].item(), **params, seed=i, details=True)
            assert out.kept.unique().tolist() == [keep.sum().item()] and keep[out.ids].all()
            p = torch.tensor(OPEN[f"filt_p_{name}"][i, :V])
            torch.testing.assert_close(out.logprob, p[out.ids].log(), atol=1e-9, rtol=1e-9)
            assert set((p > 0.1).nonzero()[:, 0].tolist()) <= set(out.ids.tolist())


# ------------------------------------------------------------------ where it is close


def test_ties_at_the_kth_and_at_the_crossing():
    "Blocks of equal logits across the cut, at every id: lower ids stay."
    rng = np.random.default_rng(3)
    for V in (40, 3000):
        for trial in range(40):
            z = torch.full((4, V), -3.0)
            high = torch.from_numpy(rng.permutation(V)[:30])
            z[:, high[:10]], z[:, high[10:]] = 2.0, 1.0
            k, p = int(rng.integers(1, 31)), float(rng.uniform(0.05, 0.95))
            for params in dict(top_k=k), dict(top_p=p), dict(top_k=25, top_p=p), dict(min_p=0.36):
                same(z, params, Key(trial, torch.arange(4) + 100))


def test_division_makes_ties():
    "Neighbouring floats, equal after the division by T, across the k-th place, ids reversed."
    for T in (0.8, 0.3, 1.7, 1e30, 1e-30, 1e37):  # the last leaves denormal scores
        for start in (1.6, 1e-3, 3.3):
            bits = np.float32(start).view(np.int32) + np.arange(300, dtype=np.int32)
            z = torch.full((3, 5000), -2.0)
            z[:, torch.arange(300) * 16 + 5] = torch.from_numpy(bits.view(np.float32))
            for k in (10, 64, 65, 299):
                same(z, dict(temperature=T, top_k=k), Key(k))
            same(z, dict(temperature=T, top_p=0.0025), Key(1))


def test_masses_that_are_met():
    "Whole numbers: p at a mass of the row, and one float to each side of it."
    z = torch.log(torch.tensor([[4.0, 2, 1, 1] + [0] * 2000]))
    flat = torch.zeros(4, 20_000)
    for p in (0.25, 0.5, 0.75, 0.875):
        for q in (p, np.nextafter(p, 0).item(), np.nextafter(p, 1).item()):
            for params in dict(top_p=q), dict(top_k=4, top_p=q), dict(top_p=q, min_p=0.2):
                same(z, params, Key(0))
                same(flat, params, Key(3))
    sizes = [draw(flat, Sampler(top_p=p), Key(0), "fused").kept[0].item() for p in (0.25, 0.5)]
    assert sizes == [5000, 10_000]


def test_the_mass_is_exact_where_bounds_do_not_tell():
    "Many tokens about the crossing, each lighter than the bounds are apart."
    rng = np.random.default_rng(5)
    for V in (5000, 40_000):
        z = np.full((1, V), -12.0)
        z[0, :1000] = rng.permutation(1000) * 1e-4
        for p in rng.uniform(0.05, 0.99, 30):
            same(torch.tensor(z, dtype=torch.float32), dict(top_p=float(p)), Key(2))


@pytest.mark.parametrize("big, dtype", [(3e38, torch.float32), (1e308, torch.float64)])
def test_numbers_that_overflow(big, dtype):
    "The row is shifted, or a difference is infinite; a removed token stays removed."
    for V in (3, 3000):
        for values in ((big,), (-big,), (big, -big), (big, big * (1 - 1e-6))):
            for rest in (0.0, -INF, -big):
                z = torch.full((2, V), rest, dtype=dtype)
                z[:, [V // 2, 0][: len(values)]] = torch.tensor(values, dtype=dtype)
                for T in (1.0, 0.5, 1e-5, 3.0):
                    for params in ({}, dict(top_k=2), dict(top_p=0.9), dict(min_p=0.1)):
                        same(z, dict(temperature=T, **params), Key(0))


def test_min_p_between_two_floats():
    "A logit of float32(log m) is below log m: the line is float64."
    for V in (3, 5000):
        z = torch.full((1, V), float(np.float32(np.log(0.1))))
        z[0, : V // 2] += 1e-4
        z[0, 0] = 0.0
        assert draw(z, Sampler(min_p=0.1), Key(0), "fused").kept.item() == max(1, V // 2)
        for seed in range(5):
            same(z, dict(min_p=0.1), Key(seed))


def test_equal_scores_go_to_the_lower_id():
    "Two tokens with equal logits and equal noise, among the candidates and in the race."
    V = 1 << 18
    for seed in range(3):
        bits = hash_bits(np.arange(V), *Key(seed).words())
        order = bits.argsort()
        g = noise.gumbel_of(bits[order])
        for at in np.flatnonzero(g[1:] == g[:-1])[:3]:  # the first are the luckiest
            pair = sorted(order[at : at + 2].tolist())
            alone = torch.full((1, V), -INF)
            alone[0, pair] = 1.0
            assert fused_sample(alone, seed=seed).item() == pair[0]
            outside = torch.full((1, V), -INF)
            outside[0, order[-100:]] = g[at].item() / 2  # a list of the unluckiest
            outside[0, pair] = 0.0
            assert fused_sample(outside, seed=seed).item() == pair[0]
            same(outside, dict(min_p=1e-9), Key(seed))


def test_worst_rows_are_drawn_alike():
    "Rows on which no short list helps, and rows that mislead a search for the edge."
    V = 40_000
    rows = {
        "equal": torch.zeros(V),
        "stairs": -(torch.arange(V) // (V // 30)).float() * 0.2,
        "two": (torch.arange(V) % 2).float(),
        "rising": torch.linspace(0, 0.01, V),
        "roof": -(torch.arange(V) - V // 2).abs().float() * 1e-6,
        "late": torch.cat([torch.zeros(V - 9000), torch.full((9000,), 3.0)]),
        "lonely": torch.cat([torch.full((V - 1,), -INF), torch.zeros(1)]),
    }
    requests = [dict(top_k=50), dict(top_k=V - 1), dict(top_k=9000, top_p=0.5), dict(top_p=0.5),
                dict(top_p=1e-3), dict(top_p=0.5, min_p=0.9), dict(min_p=0.3), {}]  # fmt: skip
    for z in rows.values():
        for params in requests:
            same(z[None], params, Key(1))


# ------------------------------------------------------------------ the parts


def as_row(z, T, G, line=-INF):
    "What the loops know of a row: its logits, the scale, best score, line, maxima, coins."
    scale = fused.scale_of.py_func(z, z.max(), T)
    best = z.dtype.type(fused.scaled(z.max(), scale))
    line = z.dtype.type(line)
    return fused.Row(z, scale, best, line, fused.group_maxima(z, G), topp.coins(len(z)))


def room(V, dtype):
    "A list that all tokens fit into."
    return fused.TokenList(np.empty(V, np.int64), np.empty(V, dtype), np.empty(V, np.int64))


def scores_of(row):
    "The scores of all tokens."
    return np.array([fused.scaled(x, row.scale) for x in row.z], row.z.dtype)


@pytest.mark.parametrize("V, G", [(8, 4), (1000, 1000), (5003, 1024), (50_257, 1024)])
def test_groups_and_candidates(V, G):
    "All tokens whose score reaches the floor, by rising id; the wanted best are among them."
    rng = np.random.default_rng(V)
    listed = room(V, np.float32)
    for kind in ("peaked", "steps", "neighbours", "block"):
        z = np.ascontiguousarray(special(rng, kind, 1, V)[0], np.float32)
        z[rng.random(V) < 0.1] = -INF
        row = as_row(z, 0.7, G)
        s, maxima = scores_of(row), row.maxima
        assert all(maxima[g] == z[g::G].max() for g in range(G))
        for wanted in (1, 2, 50, G - 1, G, V):
            floor = fused.floor_of(row, wanted, True)
            n = fused.candidates(row, np.float32(floor), listed)
            ids = np.flatnonzero((s >= floor) & (s > -INF))
            assert np.array_equal(listed.ids[:n], ids) and np.array_equal(listed.scores[:n], s[ids])
            assert n >= min(wanted, (s > -INF).sum())
            if wanted < G:
                assert floor <= np.sort(maxima / np.float32(0.7))[-wanted]


@pytest.mark.parametrize("step", [2, 8, 16])
def test_a_pattern_in_the_ids_does_not_lengthen_the_list(step):
    "The best stand at every so manyth id."
    V, rng = 151_936, np.random.default_rng(9)
    z = rng.normal(size=V).astype(np.float32)
    z[::step][:500] += 10
    row = as_row(z, 0.8, V // 1024 * 16)
    assert 64 <= fused.candidates(row, fused.floor_of(row, 64, True), room(V, np.float32)) < 200


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_line_is_a_floor_where_few_groups_reach_it(dtype):
    "All that min-p keeps is listed, and hardly more; if the list would be long, the best are."
    rng, listed = np.random.default_rng(6), room(5003, dtype)
    for trial in range(40):
        z = (rng.normal(size=5003) * 10.0 ** rng.uniform(-2, 1)).astype(dtype)
        if trial % 4 == 0:
            z[rng.random(5003) < 0.97] = -INF
        row = as_row(z, 0.7, 1024, np.log(rng.uniform(0.001, 0.9)) if trial % 3 else -INF)
        s = scores_of(row)
        kept = np.flatnonzero((s > -INF) & (s - row.best >= row.line))
        floor = dtype(fused.floor_of(row, 64, False))
        n = fused.candidates(row, floor, listed)
        if len({token % 1024 for token in kept}) < 1024:
            assert np.array_equal(np.intersect1d(listed.ids[:n], kept), kept) and n <= len(kept) + 1
            assert floor == -INF or floor - row.best < row.line
        else:
            assert 64 <= n < 200


def test_a_nan_anywhere_is_seen():
    for V, at in ((3, 2), (3000, 5), (3000, 2999), (50_257, 40_000)):
        z = np.zeros(V, np.float32)
        z[at] = np.nan
        z[at // 2] = 1
        assert np.isnan(fused.group_maxima(z, min(V, 1024)).max())


def test_the_crossing_is_where_a_sort_has_it():
    "The search for the edge and the cut against a sort, with weights of 0 and ties."
    rng = np.random.default_rng(2)
    for _ in range(400):
        n = int(rng.integers(1, 60))
        scores = rng.integers(0, rng.choice([3, 1000]), n).astype(float)
        weights = (scores * rng.integers(0, 3) + rng.integers(0, 2)).astype(np.int64)
        if not weights.sum():
            continue
        target = float(weights.sum() * rng.choice([1, rng.random() + 1e-9]))
        order = np.lexsort((np.arange(n), -scores))
        before = weights[order].cumsum() - weights[order]
        keep = np.sort(order[before < target])
        listed = fused.TokenList(np.arange(n), scores.copy(), weights.copy())
        left = fused.keep_prefix(listed, n, target)
        assert np.array_equal(listed.ids[:left], keep) and np.array_equal(
            listed.weights[:left], weights[keep]
        )
        edge, above = fused.crossing(scores, weights, target)
        assert edge == scores[order[(before < target).sum() - 1]]
        assert above == weights[scores > edge].sum()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masses_are_as_exact_as_promised(dtype):
    "The exact mass is the sum of the plain chain's weights; the rough one keeps its promise."
    rng, worst = np.random.default_rng(4), 0.0
    for V in (1, 8, 1000, 5003, 151_936):
        for kind in ("peaked", "steps", "mask", "block", "lonely", "two"):
            z = np.full((1, V), -INF) if kind == "lonely" else special(rng, kind, 1, V).copy()
            z[0, rng.integers(V)] = z.max() if np.isfinite(z.max()) else 2.0
            if kind == "two":  # whose roundings all point one way
                z = np.where(z == z.max(), 0.0, -24.0)
            z = np.ascontiguousarray(z[0], dtype)
            row = as_row(z, 0.8, max(min(V, 1024), V // 1024 * 16))
            s, unit = scores_of(row), row.unit
            weights = topp.whole_weights(torch.tensor(s)).sum().item()
            assert fused.mass(row) == weights
            count, rough = fused.rough_mass(row, dtype(-INF))
            assert count == np.isfinite(z).sum()
            far = abs(rough * unit - weights)
            assert far <= 0.5e-4 * weights + V / 2
            worst = max(worst, (far - V / 2) / weights)
            above = s - s.max() >= dtype(-3)
            count, rough = fused.rough_mass(row, dtype(-3))
            assert count == above.sum()
            exact = np.exp((s[above] - s.max()).astype(float)).sum()
            assert abs(rough / exact - 1) < 2e-6
    assert worst < 2e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_size_and_mass_of_what_is_kept(dtype):
    "From a list, and of a whole row; a float64 row to the last bits but few."
    rng = np.random.default_rng(7)
    for V in (5, 3000, 60_000):
        z = (3 * rng.normal(size=V)).astype(dtype)
        z[rng.random(V) < 0.1] = -INF
        for line in (-INF, -2.0):
            row = as_row(z, 0.8, min(V, 1024), line)
            s = scores_of(row)
            far = s.astype(float) - float(row.best)
            kept = far[(s - row.best >= row.line) & (z > -INF)]
            listed = room(V, dtype)
            n = fused.candidates(row, dtype(-INF), listed)
            for enough in (True, False):
                count, log_mass = fused.log_mass(row, listed, n, enough)
                close = 1e-12 if enough or dtype is np.float64 else 1e-6
                assert count == len(kept) and abs(log_mass - np.log(np.exp(kept).sum())) < close


def test_bits_beyond_the_bound_give_less_noise():
    "Whatever noise a token needs, bits above the bound do not give it; the bound is hardly wide."
    rng = np.random.default_rng(1)
    for kind in (np.float32, np.float64):
        for _ in range(300):
            top, d = kind(rng.uniform(-4, 23)), kind(-rng.uniform(0, 27))
            most = fused.most_bits(top - d)
            bits = np.array([min(int(most) + 1, 2**32 - 1)])
            if most < 2**32 - 1:
                assert d + noise.gumbel_of(bits)[0] < top
            if 15 > top - d > 5:
                assert noise.gumbel_of(bits)[0] > top - d - 0.01
    start = np.concatenate([rng.integers(0, 2**32 - 1, 100_000), np.arange(1000)])
    assert (noise.gumbel_of(start) >= noise.gumbel_of(start + 1)).all()
    assert noise.gumbel_of(np.array([2**32 - 1]))[0] > -4


def test_the_lucky_are_all_that_might_win():
    "By rising id, with their scores; every token that beats the top from below the floor is there."
    V, key = 90_000, Key(3)
    z = np.random.default_rng(8).normal(size=V).astype(np.float32)
    row, state = as_row(z, 0.8, 1024), fused.key_state(np.array(key.words(), np.uint32))
    listed, s = room(V, np.float32), scores_of(row)
    sums = s - row.best + noise.gumbel(key, V).numpy()
    for share in (0.5, 0.99):
        floor, top = np.quantile(s, share).astype(np.float32), np.float32(np.sort(sums)[-20])
        start, found, parts = 0, [], 0
        while start < V:
            n, start = fused.lucky(row, floor, state, top, start, listed)
            found += listed.ids[:n].tolist()
            assert np.array_equal(listed.scores[:n], s[listed.ids[:n]])
            parts += 1
        assert (np.diff(found) > 0).all() and len(found) < V / 4 and parts > (share > 0.9)
        assert set(np.flatnonzero((sums >= top) & (s < floor))) <= set(found)


# ------------------------------------------------------------------ the law


LAWS = [dict(), dict(top_k=7), dict(top_p=0.9), dict(min_p=0.2),
        dict(temperature=1.4, top_k=9, top_p=0.95, min_p=0.05)]  # fmt: skip


@pytest.mark.parametrize("params", LAWS, ids=str)
@pytest.mark.parametrize("V", [12, 1400])
def test_chi_square_of_the_draws_fits_their_law(V, params, full, record):
    n = 100_000 if V == 12 else 4000
    if full:
        n = 1_000_000 if V == 12 else 40_000
    z = torch.randn(1, V, generator=torch.Generator().manual_seed(5)) * (1.5 if V == 12 else 0.7)
    q, counts, batch = Sampler(**params).distribution(z.double())[0], torch.zeros(V), n // 20
    for position in range(20):
        out = fused_sample(z.expand(batch, -1), **params, seed=13, position=position, details=True)
        counts += out.ids.bincount(minlength=V)
        assert out.kept.eq((q > 0).sum()).all()
    assert counts[q == 0].sum() == 0
    p = chi_square(counts, q, n)
    record(f"chi2_fused_{V}_{'_'.join(params) or 'plain'}", {"draws": n, "p": p})
    assert p > 1e-4


# ------------------------------------------------------------------ compiled


def test_nothing_is_imported_or_compiled_before_it_is_needed(tmp_path):
    code = "import sys, decoding_book, decoding_book.sampler; print('numba' in sys.modules)"
    out, err = run_python(code).communicate()
    assert out.strip() == "False", err
    out, err = run_python("import decoding_book.fused", NUMBA_CACHE_DIR=str(tmp_path)).communicate()
    assert not err and not list(tmp_path.rglob("*.nbc"))


def test_without_numba_the_plain_chain_draws():
    code = """
import sys; sys.modules["numba"] = None
import torch
from decoding_book.noise import Key
from decoding_book.sampler import Sampler, draw, draw_plain, find_backend
assert find_backend() is draw_plain and find_backend(None, Sampler(), "cpu") is draw_plain
print(draw(torch.zeros(1, 5), Sampler(), Key(3)).ids.item())
try: draw(torch.zeros(1, 5), Sampler(), Key(3), backend="fused")
except ValueError as error: print(error)
from decoding_book.fused import fused_sample
try: fused_sample(torch.zeros(1, 5))
except ImportError as error: print(error)"""
    out, err = run_python(code).communicate()
    token, *errors = out.splitlines()
    assert int(token) == draw(torch.zeros(1, 5), Sampler(), Key(3), "plain").ids.item(), err
    assert len(errors) == 2 and all("pip install 'decoding_book[fast]'" in e for e in errors)
    assert errors[0].startswith("backend: 'fused' is not there")


def test_a_long_compilation_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(fused, "_ready", set())
    monkeypatch.setattr(fused, "draw_rows", lambda z, *rest: time.sleep(0 if len(z) else 1.3))
    for _ in range(2):
        monkeypatch.setattr(fused, "run_rows", lambda *rest: True)
        fused_sample(torch.zeros(2, 9))
    out, err = capsys.readouterr()
    assert not out and err.count("compiling") == 1 and "float32" in err
    monkeypatch.setattr(fused, "draw_rows", lambda z, *rest: None)
    fused_sample(torch.zeros(2, 9).double())
    time.sleep(1.2)
    assert capsys.readouterr().err == ""


def test_every_thread_has_room_of_its_own():
    "Wide enough, and the same when asked again."
    mine = fused.room_for_list(50)
    assert fused.room_for_list(7) is mine and fused.room_for_list(3000).shape[1] >= 3000
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fused.room_for_list, 50).result() is not fused.room_for_list(50)


def test_threads_change_no_token(monkeypatch):
    "By several threads, and from several: the same tokens."
    z = torch.tensor(peaked(np.random.default_rng(1), 7, 3000))
    params, before = dict(temperature=[0.5, 1, 2, 0, 1.5, 1, 3], top_p=0.9, row=torch.arange(7)), []
    alone, bad = fused_sample(z, **params, details=True), z.clone()
    bad[6, 5] = float("nan")
    monkeypatch.setattr(fused, "THREADS_PAY", 0)
    was = torch.get_num_threads()
    try:
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            out = fused_sample(z, **params, details=True)
            assert out.ids.equal(alone.ids) and out.logprob.equal(alone.logprob)
            with pytest.raises(ValueError, match="logits: row 6"):
                fused_sample(bad, **params)
    finally:
        torch.set_num_threads(was)

    def run():
        before.extend(fused_sample(z, **params).equal(alone.ids) for _ in range(50))

    several = [Thread(target=run) for _ in range(4)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    assert before == [True] * 200


# ------------------------------------------------------------------ the seam


def test_the_sampler_takes_it_by_itself():
    assert find_backend() is draw_fused and find_backend(None, Sampler()) is draw_fused
    assert find_backend(None, Sampler(), torch.device("cpu")) is draw_fused
    assert find_backend(None, Sampler(repetition_penalty=1.2, logit_bias={0: 1.0})) is draw_fused
    for name in set(DIALECTS) - {"book"}:
        assert find_backend(None, Sampler.dialect(name)) is draw_plain
    assert find_backend(None, Sampler(boundary="exclude")) is draw_plain
    assert find_backend("plain", Sampler()) is draw_plain
    assert (find_backend(None, Sampler(), "cuda") is draw_plain) == bool(missing("cuda"))
    assert find_backend(None, Sampler(), "meta") is draw_plain


def test_in_the_loop():
    "Texts with penalties, early ends and parameters by row are those of the plain chain."
    world, prompts = six_words(), ["I", "", "cold coffee", "I like", "water"] * 4
    params = dict(temperature=[0.5, 1.0, 2.0, 0.0, 1.5] * 4, top_p=[0.9, 0.8, 1.0, 0.7, 0.95] * 4)
    fast, slow = (
        generate(world, prompts, Sampler(**params, repetition_penalty=1.3, seed=5, backend=b), 6)
        for b in (None, "plain")
    )
    assert [i.tolist() for i in fast.ids] == [i.tolist() for i in slow.ids]
    for a, b in zip(fast.steps, slow.steps):
        assert a.draw.kept.equal(b.draw.kept)


def test_a_row_alone_equals_the_row_in_a_batch():
    z, n = (
        in_type(3 * np.random.default_rng(1).normal(size=(9, 4000)), torch.float32),
        torch.arange(9),
    )
    params = dict(temperature=[0.5, 1.0, 2.0] * 3, top_k=[0, 0, 50] * 3, top_p=[0.9, 1.0, 0.8] * 3,
                  min_p=[0.0, 0.01, 0.0] * 3)  # fmt: skip
    whole = fused_sample(z, **params, row=n + 50, details=True)
    for some in ([3], [8, 0, 5], [2, 7]):
        part = fused_sample(z[some], **{name: [v[i] for i in some] for name, v in params.items()},
                            row=n[some] + 50, details=True)  # fmt: skip
        assert part.ids.equal(whole.ids[some]) and part.kept.equal(whole.kept[some])
        assert part.logprob.equal(whole.logprob[some])


def test_input_is_left_alone_and_layout_does_not_matter():
    z = in_type(3 * np.random.default_rng(2).normal(size=(4, 3000)), torch.float32)
    copy, wide = z.clone(), torch.zeros(4, 6000)
    wide[:, ::2] = z
    ids = fused_sample(z, 0.8, top_p=0.9)
    assert z.equal(copy) and fused_sample(wide[:, ::2], 0.8, top_p=0.9).equal(ids)
    assert fused_sample(z.T.contiguous().T, 0.8, top_p=0.9).equal(ids)
    assert fused_sample(z.requires_grad_(), 0.8, top_p=0.9).equal(ids)
    assert fused_sample(copy[0].expand(3, -1), 0.8, top_p=0.9, row=0).unique().numel() == 1
    lazy = torch.complex(torch.randn(3, 2000), torch.randn(3, 2000)).conj().imag
    assert lazy.is_neg()
    same(lazy, dict(top_k=5), Key(3))
    same(torch._neg_view(torch.randn(3, 2000)), {}, Key(3))


def test_shapes_of_what_is_drawn_are_those_of_the_rows():
    none = torch.zeros(0, 5)
    assert fused_sample(none, 0.8, 3, 0.9, 0.1).shape == (0,)
    assert fused_sample([[0.0, 1.0]], top_k=1).tolist() == [1]
    out = fused_sample(torch.randn(3, 2000).double(), details=True)
    assert out.ids.dtype == torch.int64 and out.kept.tolist() == [2000] * 3
    assert out.logprob.dtype == torch.float64 and fused_sample(torch.randn(2, 9)).shape == (2,)
    with pytest.raises(ValueError, match="temperature: -1"):
        fused_sample(none, -1)
    for backend in ("fused", "plain"):
        with pytest.raises(ValueError, match="top_k"):
            draw(none, Sampler(top_k=[1, 2]), Key(0), backend)


REFUSED = [
    (dict(temperature=-1), ValueError, r"temperature: -1 is outside \[0, inf\)"),
    (dict(temperature=None), TypeError, "temperature"),
    (dict(temperature=float("nan")), ValueError, "temperature: nan"),
    (dict(temperature=True), TypeError, "temperature: True"),
    (dict(temperature=[1.0, -2.0, 1.0]), ValueError, "temperature, row 1: -2.0"),
    (dict(top_k=-1), ValueError, "top_k: -1"),
    (dict(top_k=1.5), ValueError, "top_k: 1.5 is not an integer"),
    (dict(top_k="5"), TypeError, "top_k: '5'"),
    (dict(top_p=0), ValueError, r"top_p: 0 is outside \(0, 1\]"),
    (dict(top_p=None), TypeError, "top_p"),
    (dict(top_p=torch.tensor([0.5, 1.5, 1.0])), ValueError, "top_p, row 1: 1.5"),
    (dict(min_p=2), ValueError, "min_p: 2"),
    (dict(min_p=[0.1, 0.2]), ValueError, r"min_p: shape \(2,\)"),
    (dict(seed=-1), ValueError, "seed: -1"),
    (dict(seed=0.5), TypeError, "seed: 0.5"),
    (dict(seed=True), TypeError, "seed: True"),
    (dict(row=[1, 2**32, 3]), ValueError, "row, row 1"),
    (dict(row=[1, 2]), ValueError, r"key: row of shape \(2,\)"),
    (dict(position=-3), ValueError, "position: -3"),
]


@pytest.mark.parametrize("bad, error, text", REFUSED)
def test_what_is_wrong_is_refused_by_its_name(bad, error, text):
    with pytest.raises(error, match=text):
        fused_sample(torch.zeros(3, 9), **bad)


@pytest.mark.parametrize("V", [9, 3000])
def test_bad_logits_are_refused_by_their_row(V):
    for value in (float("nan"), INF):
        z = torch.zeros(3, V)
        z[1, 5] = value
        for params in ({}, dict(top_k=3), dict(top_p=0.5, temperature=0.7), dict(temperature=0)):
            with pytest.raises(ValueError, match="logits: row 1"):
                fused_sample(z, **params)
            with pytest.raises(ValueError, match="logits: row 1"):
                draw(z, Sampler(**params), Key(0))
    z = torch.zeros(3, V)
    z[2] = -INF
    with pytest.raises(ValueError, match="logits: row 2 has no finite logit"):
        fused_sample(z, 0.5)
    with pytest.raises(TypeError, match="logits: torch.int64"):
        fused_sample(torch.zeros(3, V).long())
    for shape in ((V,), (2, 3, V), (3, 0)):
        with pytest.raises(ValueError, match="logits: shape"):
            fused_sample(torch.zeros(shape))
    with pytest.raises(ValueError, match="logits: .* meta"):
        fused_sample(torch.zeros(3, V, device="meta"))
    with pytest.raises(ValueError, match="'fused' knows order"):
        draw_fused(torch.zeros(3, V), Sampler(ties="all"), Key())
