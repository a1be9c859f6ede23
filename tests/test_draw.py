"One token everywhere: the plain chain against the NumPy reference and the recorded vectors, on rows of all kinds."
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
from decoding_book.noise import Key
from decoding_book.sampler import Sampler, draw
from reference import KINDS, LONG, SIZES, TYPES


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
        assert out.logprob[i].item() == pytest.approx(logprob, abs=1e-6, rel=1e-6), (V, kind, dtype, p, k)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_chain_is_the_reference(kind, full, record):
    rng, rounds, rows = np.random.default_rng(KINDS.index(kind)), 300 if full else 3, 0
    for n in range(rounds):
        for V in SIZES:
            compare(rng, V, kind, TYPES[n % len(TYPES)], 5)
            rows += 5
    record(f"draw_plain_is_reference_{kind}", rows)


@pytest.mark.parametrize("V", LONG)
def test_long_rows(V, full, record):
    rng, rows = np.random.default_rng(V), 20 if full else 1
    for kind in KINDS if full else KINDS[V % 2::2]:
        for dtype in TYPES if full else [str(rng.choice(TYPES))]: compare(rng, V, kind, dtype, rows)
    record(f"draw_plain_is_reference_{V}", rows * len(KINDS) * (len(TYPES) if full else 1))
