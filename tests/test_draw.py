"One token everywhere: plain chain, NumPy reference, recorded vectors; on rows of all kinds."

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import numpy_draw as reference
from helpers.numpy_draw import KINDS, LONG, SIZES, TYPES

from decoding_book.noise import Key, exact_log, gumbel_of
from decoding_book.sampler import Sampler, draw
from decoding_book.topp import exact_exp


def tensor(z, dtype):
    "A row of the reference as a torch tensor."
    return torch.tensor(z).to(getattr(torch, dtype))


def compare(rng, V, kind, dtype, B, backend="plain"):
    "B rows of one kind, all at once: ids, kept counts and log-probabilities against the reference."
    cases = [reference.a_case(rng, V, kind, dtype) for _ in range(B)]
    z = torch.stack([tensor(row, dtype) for row, _, _ in cases])
    params = {n: [p[n] for _, p, _ in cases] for n in cases[0][1]}
    key = Key(**{n: [k[n] for _, _, k in cases] for n in cases[0][2]})
    out = draw(z, Sampler(**params), key, backend=backend)
    for i, (row, p, k) in enumerate(cases):
        won, kept, logprob = reference.draw_row(row, k, **p)
        assert (out.ids[i], out.kept[i]) == (won, kept), (V, kind, dtype, p, k)
        assert out.logprob[i].item() == pytest.approx(logprob, abs=1e-6, rel=1e-6), (
            V,
            kind,
            dtype,
            p,
            k,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_chain_is_the_reference(kind, full, record):
    rng, rounds, rows = np.random.default_rng(KINDS.index(kind)), 75 if full else 1, 0
    for n in range(rounds):
        for V in SIZES:
            compare(rng, V, kind, TYPES[(n + V) % len(TYPES)], 20)
            rows += 20
    record(f"draw_plain_is_reference_{kind}", rows)


@pytest.mark.parametrize("V", LONG)
def test_long_rows_give_the_tokens_of_the_reference(V, full, record):
    rng, rows = np.random.default_rng(V), 4 if full else 1
    kinds = KINDS if full else KINDS[LONG.index(V) % 2 :: 2]
    types = TYPES if full else [str(rng.choice(TYPES))]
    for kind, dtype in product(kinds, types):
        compare(rng, V, kind, dtype, rows)
    record(f"draw_plain_is_reference_{V}", rows * len(kinds) * len(types))


# ---------------------------------------------------------------- the recorded vectors

VECTORS = np.load(Path(__file__).parent / "oracle/draw.npz", allow_pickle=False)
PARAMS, KEY = ("temperature", "top_k", "top_p", "min_p"), ("seed", "row", "position", "draw")


def recorded():
    "Each row in its float type, its parameters and key, and what must come out."
    rows = np.split(VECTORS["logits"], VECTORS["size"].cumsum()[:-1])
    for i, row in enumerate(rows):
        p, k = ({n: VECTORS[n][i].item() for n in names} for names in (PARAMS, KEY))
        yield (
            tensor(row, reference.FLOATS[VECTORS["type"][i]]),
            p,
            k,
            VECTORS["token"][i],
            VECTORS["kept"][i],
            VECTORS["logprob"][i],
        )


def test_recorded_draws_are_drawn_again():
    "By the plain chain and by the reference."
    for z, p, k, token, kept, logprob in recorded():
        out = draw(z[None], Sampler(**p), Key(**{n: [v] for n, v in k.items()}), backend="plain")
        assert (out.ids.item(), out.kept.item()) == (token, kept), (p, k)
        assert out.logprob.item() == pytest.approx(logprob, abs=1e-6, rel=1e-6)
        wide = z if z.dtype == torch.float64 else z.float()
        assert reference.draw_row(wide.numpy(), k, **p)[:2] == (token, kept), (p, k)


def test_recorded_functions_give_the_same_bits():
    def same(ours, name):
        return ours.tobytes() == VECTORS[name].tobytes()

    bits, x, d = (VECTORS[n] for n in ("noise_bits", "log_x", "exp_x"))
    for kind in (np.array, torch.tensor):
        assert same(np.asarray(gumbel_of(kind(bits))), "noise")
        assert same(np.asarray(exact_log(kind(x))), "log_y") and same(
            np.asarray(exact_exp(kind(d))), "exp_y"
        )


def test_the_recorded_rows_hold_what_they_should():
    "Every filter on and off, ties at boundaries, a mass met exactly, every float type and size."
    T, k, p, m = (VECTORS[n] for n in PARAMS)
    for on in (
        T != 1,
        T == 0,
        T == 1e-30,
        T == 1e30,
        k > 0,
        p < 1,
        m > 0,
        (k > 0) & (p < 1) & (m > 0),
    ):
        assert on.sum() > 5
    assert set(VECTORS["type"]) == {0, 1, 2, 3} and {1, 262_144} <= set(VECTORS["size"])
    assert (VECTORS["kept"] == 1).sum() > 20 and (VECTORS["kept"] == VECTORS["size"]).sum() > 20
    met = one_less = tied = 0
    for z, params, *_, kept, _ in recorded():
        if not params["top_p"] < 1 or params["min_p"]:
            continue
        s = reference.divide(
            (z if z.dtype == torch.float64 else z.float()).numpy(), params["temperature"]
        )
        order = np.lexsort((np.arange(len(s)), -s))[: params["top_k"] or None]
        w = reference.weights(s)[order]
        met += w[:kept].sum() == params["top_p"] * w.sum()
        one_less += w[: kept - 1].sum() == np.nextafter(params["top_p"], 0) * w.sum()
        tied += kept < len(order) and s[order[kept - 1]] == s[order[kept]]
    assert met > 5 and one_less > 3 and tied > 5
