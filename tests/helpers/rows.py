"Rows of logits that several tests share."

import math
from fractions import Fraction

import torch

INF = float("inf")


def rows(n, V, seed=0, dtype=torch.float64, spread=3.0):
    return (
        torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * spread
    ).to(dtype)


def tied(n, V, seed=0, removed=0.2):
    "Small integers with some -inf; at least one finite logit a row."
    rng = torch.Generator().manual_seed(seed)
    z = torch.randint(-2, 3, (n, V), generator=rng).float()
    z = z.masked_fill(torch.rand(n, V, generator=rng) < removed, -INF)
    z[torch.arange(n), torch.randint(0, V, (n,), generator=rng)] = 2.0
    return z


def kept(z):
    return z > -INF


# ---- extremes


def exact_softmax(z, T):
    "Probabilities by rational arithmetic; exponents below -800 are 0."
    best = max(z)
    gaps = [Fraction(x) - Fraction(best) if x > -INF else None for x in z]
    w = [
        math.exp(float(max(g / Fraction(T), Fraction(-800)))) if g is not None else 0.0
        for g in gaps
    ]
    w = [0.0 if x < 1e-300 else x for x in w]
    return [x / sum(w) for x in w]


def history(rng, B, V, N):
    "Random logits (B, V), ids (B, N) that repeat themselves, and a left-padding mask."
    logits = torch.tensor(rng.normal(size=(B, V)))
    ids = torch.tensor(rng.integers(0, V, (B, N)))
    real = torch.tensor(rng.integers(0, N + 1, B))
    return logits, ids, torch.arange(N) >= N - real[:, None]
