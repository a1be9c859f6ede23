"""The draw of one row in plain NumPy, from its definition alone, and rows of all kinds to try.

Nothing of the book is imported here. The forms are chosen to differ where they can: the logarithm
takes the bits apart by integers, masses are added as integers, the ranking is one sort by two keys,
filters are lists of ids.
"""

import math
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------- exact arithmetic

HIGH, LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
LG = [
    None,
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
]


def log(x):
    "Natural logarithm of positive finite float64, as fdlibm computes it."
    x = np.atleast_1d(np.asarray(x, np.float64))
    tiny = x < 2.0**-1022
    bits = (x * np.where(tiny, 2.0**54, 1.0)).view(np.int64)
    high, low = (bits >> 32) + (0x3FF00000 - 0x3FE6A09E), bits & 0xFFFFFFFF
    e = ((high >> 20) - 0x3FF - 54 * tiny).astype(np.float64)
    high = (high & 0xFFFFF) + 0x3FE6A09E
    f = (high << 32 | low).view(np.float64) - 1
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    t1 = w * (LG[2] + w * (LG[4] + w * LG[6]))
    t2 = z * (LG[1] + w * (LG[3] + w * (LG[5] + w * LG[7])))
    half = 0.5 * f * f
    return e * HIGH - ((half - (s * (half + (t2 + t1)) + e * LOW)) - f)


def exp(d):
    "e^d for d <= 0 in float64; 0 below -700."
    near = np.asarray(d, np.float64) >= -700
    d = np.where(near, d, 0.0)
    n = np.floor(d * 1.4426950408889634 + 0.5)
    r = (d - n * HIGH) - n * LOW
    y = 1 / math.factorial(11)
    for i in range(10, -1, -1):
        y = y * r + 1 / math.factorial(i)
    return np.where(near, np.ldexp(y, n.astype(int)), 0.0)


def weights(scores):
    "Whole numbers (int64)."
    bits = math.ceil(math.log2(len(scores)))
    d = scores.astype(np.float64) - np.float64(scores.max())
    return np.floor(exp(d) * 2.0 ** min(52 - bits, 50) + 0.5).astype(np.int64)


# ---------------------------------------------------------------- noise


def mix(x):
    "On uint32, which wraps."
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint32)
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x21F0AAAD)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0x735A2D97)
        return x ^ x >> np.uint32(15)


def hash_bits(tokens, words):
    "Five words and tokens to 32 bits a token."
    a, b = np.uint32(0x243F6A88), np.uint32(0x85A308D3)
    for word in words:
        a = mix(a ^ np.uint32(word))
        b = mix(b ^ a)
    return mix(mix(np.asarray(tokens, np.uint32) ^ a) ^ b)


def noise(V, seed=0, row=0, position=0, draw=0):
    "float32 Gumbel noise of the tokens 0 .. V-1."
    bits = hash_bits(np.arange(V), (seed & 0xFFFFFFFF, seed >> 32, row, position, draw))
    w = 1 - (bits.astype(np.float64) + 0.5) / 2.0**32
    return (-log(-log(w))).astype(np.float32)


# ---------------------------------------------------------------- the draw


def divide(z, T):
    "Logits at a temperature, in their own float type."
    kind = z.dtype.type
    if T == 0:
        out = np.full_like(z, -np.inf)
        out[z.argmax()] = z.max()
        return out
    with np.errstate(over="ignore"):
        t = kind(np.clip(T, float(np.finfo(kind).smallest_normal), float(np.finfo(kind).max)))
        shift = z.max() if np.isinf(z.max() / t) else kind(0)
        out = (z - shift) / t
    return np.where(z > -np.inf, np.maximum(out, np.finfo(kind).min), z)


def draw_row(logits, key, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    "(token, kept, log-probability) of one row: float16, float32 or float64, at least one finite."
    z = logits if logits.dtype == np.float64 else logits.astype(np.float32)
    s = divide(z, temperature)
    best, ids = s.max(), np.arange(len(s))
    with np.errstate(over="ignore"):
        d = s - best
    kept = np.lexsort((ids, -s))
    kept = kept[s[kept] > -np.inf]
    if top_k:
        kept = kept[:top_k]
    if top_p < 1:
        w = weights(s)[kept]
        kept = kept[w.cumsum() - w < top_p * float(w.sum())]
    if min_p:
        kept = kept[d[kept].astype(np.float64) >= log(min_p)]
    score = (d + noise(len(s), **key))[kept]
    won = int(kept[score == score.max()].min())
    d64 = s.astype(np.float64) - np.float64(best)
    return won, len(kept), d64[won] - math.log(math.fsum(exp(d64[kept])))


# ---------------------------------------------------------------- rows of all kinds

TYPES = ("float32", "float32", "float64", "float16", "bfloat16")
SIZES = (1, 2, 3, 5, 7, 8, 9, 31, 64, 100, 128, 129, 300)
LONG = (1000, 4096, 32_000, 50_257, 151_936, 262_144)
TEMPERATURES = (0, 1, 1, 1, 0.8, 0.8, 0.3, 2, 1e-30, 1e-12, 1e-3, 100, 1e12, 1e30)
KEYS = dict(seed=2**64 - 1, row=2**32 - 1, position=2**32 - 1, draw=2**32 - 1)


def a_row(rng, V, kind):
    "One row of float64 logits (V,) of a kind."
    z = rng.normal(size=V) * rng.choice([0.1, 1, 3, 10])
    ranks = rng.permutation(V) + 1.0
    if kind == "power":
        z = -rng.uniform(1, 3) * np.log(ranks) + rng.normal(size=V) * 0.5
    if kind == "ties":
        z = rng.integers(-3, 4, V).astype(float)
    if kind == "equal":
        z = np.full(V, rng.choice([0.0, -0.0, 7.25, -1e4, 6e4]))
    if kind == "zeros":
        z = rng.choice([0.0, -0.0, -1.0], V)
    if kind == "halves":
        z = -np.log(2) * np.minimum(ranks, rng.integers(1, 40))  # masses 1/2, 1/4, ...
    if kind == "denormal":
        z = rng.integers(-9, 10, V) * rng.choice([5e-324, 1e-45, 1e-42, 6e-8])
    if kind == "huge":
        z = rng.normal(size=V) * rng.choice([1e4, 1e30, 1e38])
    if kind == "near":
        z = 5.0 - rng.integers(0, 4, V) * rng.choice([1e-7, 2.0**-21, 2.0**-10])
    if kind in ("gaps", "lonely"):
        z[rng.random(V) < (0.3 if kind == "gaps" else 0.99)] = -np.inf
    z[rng.integers(V)] = z[np.isfinite(z)].max() if np.isfinite(z).any() else 1.0
    return z


KINDS = (
    "normal",
    "power",
    "ties",
    "equal",
    "zeros",
    "halves",
    "denormal",
    "huge",
    "near",
    "gaps",
    "lonely",
)


def boundary(rng, s, k, what):
    "A p at which the mass of some prefix is met, or one float off; or an m that meets some token."
    order = np.lexsort((np.arange(len(s)), -s))
    order = order[:k] if k else order
    if what == "min_p":
        value = float(exp(float(s[rng.choice(order)]) - float(s.max())))
    else:
        w = weights(s)[order].cumsum()
        value = float(w[rng.integers(len(w))]) / float(w[-1])
    value = float(rng.choice([value, np.nextafter(value, 0), np.nextafter(value, 1)]))
    return min(max(value, 5e-324), 1.0)


def in_type(z, dtype):
    "Float64 numbers in a float type; bfloat16 as float32 with the lower half of its bits cut off."
    kind = np.float32 if dtype == "bfloat16" else np.dtype(dtype).type
    with np.errstate(over="ignore"):
        z = np.minimum(z.astype(kind), np.finfo(kind).max)
    if not np.isfinite(z).any():
        z[0] = 0
    return (
        (z.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) if dtype == "bfloat16" else z
    )


def a_case(rng, V, kind, dtype):
    "A row in its float type, parameters of a sampler, and the parts of a key."
    z = in_type(a_row(rng, V, kind), dtype)
    on = rng.random(3) < 0.5
    out = dict(temperature=float(rng.choice(TEMPERATURES)), top_k=0, top_p=1.0, min_p=0.0)
    if on[0]:
        out["top_k"] = int(rng.choice([1, 2, 5, 50, V, V + 1, rng.integers(1, V + 1)]))
    s = divide(z if z.dtype == np.float64 else z.astype(np.float32), out["temperature"])
    if on[1]:
        out["top_p"] = float(
            rng.choice([0.9, 0.5, 0.999, 1e-300, 1 - 2**-53, rng.uniform(1e-3, 1)])
        )
    if on[1] and rng.random() < 0.5:
        out["top_p"] = boundary(rng, s, out["top_k"], "top_p")
    if on[2]:
        out["min_p"] = float(rng.choice([0.05, 0.5, 1, 1e-9, 1e-300, rng.uniform(0, 1)]))
    if on[2] and rng.random() < 0.5:
        out["min_p"] = boundary(rng, s, out["top_k"], "min_p")
    key = {
        name: int(rng.integers(0, high, dtype=np.uint64, endpoint=True))
        for name, high in KEYS.items()
    }
    return z, out, key


# ------------------------------------------------------ the vectors of tests/oracle/draw.npz

FLOATS = ("float16", "bfloat16", "float32", "float64")


def cases(rng):
    "What is recorded: short rows of all kinds; long ones of few numbers, which pack well."
    for kind in 3 * KINDS:
        for V in SIZES:
            for dtype in FLOATS[2:] if V < 10 else [str(rng.choice(FLOATS))]:
                yield V, kind, dtype
    for V in LONG:
        yield V, "equal", "float32"
    yield from ((1000, "power", "float32"), (1000, "near", "float32"), (4096, "ties", "bfloat16"))


def record(path):
    "Write rows one after the other, their parameters and keys, and what is drawn from them."
    rng, out = np.random.default_rng(16), {}

    def add(**values):
        for name, value in values.items():
            out.setdefault(name, []).append(value)

    for V, kind, dtype in cases(rng):
        z, params, key = a_case(rng, V, kind, dtype)
        token, kept, logprob = draw_row(z, key, **params)
        add(
            logits=z.astype(np.float64),
            size=V,
            type=FLOATS.index(dtype),
            **params,
            **key,
            token=token,
            kept=kept,
            logprob=logprob,
        )
    out["logits"] = np.concatenate(out["logits"])
    out["noise_bits"] = np.concatenate(
        [rng.integers(0, 2**32, 400), np.arange(50), 2**32 - 1 - np.arange(50)]
    )
    out["noise"] = (-log(-log(1 - (out["noise_bits"] + 0.5) / 2.0**32))).astype(np.float32)
    out["log_x"] = np.concatenate(
        [rng.integers(1, 0x7FF << 52, 300).view(np.float64), 1 + rng.normal(size=200) * 1e-3]
    )
    out["exp_x"] = -np.concatenate([rng.uniform(0, 700, 300), 10.0 ** rng.uniform(-20, 0, 200)])
    out["log_y"], out["exp_y"] = log(out["log_x"]), exp(out["exp_x"])
    out["seed"] = np.array(out["seed"], np.uint64)
    np.savez_compressed(path, **out)


if __name__ == "__main__":
    record(Path(__file__).parents[1] / "oracle/draw.npz")
