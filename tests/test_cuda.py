"""The CUDA kernels: interpreted where there is no GPU, and compiled where there is one, against the plain draw."""
import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import pytest
import torch

from decoding_book.loop import generate
from decoding_book.noise import Key, gumbel_of, uniform_bits
from decoding_book.sampler import Sampler, draw, truncate
from decoding_book.toy import six_words

HAVE = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAVE, reason="Triton is not installed: pip install triton==3.7.1")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INF, NAN = math.inf, math.nan


def speed_up_the_interpreter():
    "Its two habits that cost most: to patch the language at each inner call, and to check sums for overflow."
    from triton.runtime import interpreter as I
    options = getattr(getattr(I, "interpreter_builder", None), "options", None)
    if not hasattr(I, "_patch_lang") or not hasattr(options, "sanitize_overflow"): return
    object.__setattr__(options, "sanitize_overflow", False)
    run, patched = I.InterpretedFunction.run, set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            I._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    def start(self, *args, **kwargs):
        patched.clear()
        return run(self, *args, **kwargs)

    I.InterpretedFunction.__call__, I.InterpretedFunction.run = call, start


if HAVE:
    if not GPU: os.environ["TRITON_INTERPRET"] = "1"           # before the module defines its kernels
    import decoding_book.cuda as C
    if not GPU: speed_up_the_interpreter()

FAST = {} if GPU else dict(block=8192, wide=1024, pivots=64)    # wide blocks suit the interpreter


# ---------------------------------------------------------------- rows

def make_rows(kind, V, n, rng):
    z = torch.randn(n, V, generator=rng)
    if kind == "gauss": z = z * torch.rand(n, 1, generator=rng) * 6
    if kind == "peaked": z = z.where(torch.rand(n, V, generator=rng) > 3 / V, z + 12)
    if kind == "flat": z = z * .01
    if kind == "ties": z = (2 * z).round()
    if kind == "bf16": z = (3 * z).bfloat16()
    if kind == "fp16": z = (3 * z).half()
    if kind == "holes": z = (3 * z).where(torch.rand(n, V, generator=rng) < .3, -INF)
    if kind == "holes": z[:, rng_int(rng, V)] = .5                 # one token at least
    if kind == "offset": z = 3 * z + 10_000
    return z


def rng_int(rng, n): return torch.randint(n, (), generator=rng).item()


KINDS = ["gauss", "peaked", "flat", "ties", "bf16", "fp16", "holes", "offset"]


def pick_settings(n, V, rng, which):
    "Parameters by row; `which` says what is on: bits 0 T, 1 k, 2 p, 3 min-p."
    u = torch.rand(4, n, generator=rng).double()
    on = torch.tensor([which >> i & 1 for i in range(4)])[:, None].bool().expand(4, n) \
        if which < 16 else torch.rand(4, n, generator=rng) < .5      # mixed rows
    k = (1 + u[1] * torch.rand(n, generator=rng) * min(V + 3, 300)).long()
    return dict(temperature=torch.where(on[0], .2 + 2 * u[0], 1.), top_k=torch.where(on[1], k, 0),
                top_p=torch.where(on[2], .02 + .97 * u[2], 1.),
                min_p=torch.where(on[3], .3 * u[3]**3, 0.))


def is_close_call(z, key):
    "Whether the best two of a row are within 1e-5, or what stands for it at the size of its logits."
    V = z.shape[-1]
    if V == 1: return torch.zeros(len(z), dtype=bool)
    score = z - z.amax(-1, keepdim=True) + gumbel_of(uniform_bits(key, torch.arange(V).expand(len(z), V)))
    two = score.topk(2).values
    return two[:, 0] - two[:, 1] < 1e-5


def mass_gap(z, params, n):
    "How near to p the mass of the first n tokens comes, in each row."
    free = Sampler(**{k: v for k, v in params.items() if k in ("temperature", "top_k")})
    q = truncate(z, free).double().softmax(-1).sort(descending=True).values.cumsum(-1)
    p = torch.as_tensor(params["top_p"]).double().expand(len(z))
    return (q.gather(1, (n - 1).clamp(min=0)[:, None])[:, 0] - p).abs()


def compare(z, params, key, tally, task=2, **options):
    "The kernels against the plain form; counts what was seen."
    found = C.launch(z.to(DEVICE), C.ask(len(z), DEVICE, **params, key=key), task=task, **FAST | options)
    plain = draw(z, Sampler(**params), key)
    cut = truncate(z, Sampler(**params))
    close = is_close_call(cut, key)
    if task == 2:
        kept = found.kept.cpu()
        off = (kept - plain.kept).abs()
        fewer = torch.minimum(kept, plain.kept)
        excused = (off == 1) & (mass_gap(z, params, fewer) < 1e-6)
        assert ((off == 0) | excused).all(), (params, kept, plain.kept)
        close |= off > 0
    same = found.ids.cpu() == plain.ids
    assert (same | close).all(), (params, found.ids, plain.ids)
    tally["rows"] += len(z)
    tally["close calls"] += close.sum().item()
    if task == 2:
        torch.testing.assert_close(found.logprob.cpu()[~close], plain.logprob[~close].float(), rtol=2e-5, atol=4e-6)
    z = z.double()
    log_q = z.log_softmax(-1)
    H = -torch.special.xlogy(log_q.exp(), log_q.exp()).sum(-1)
    spread = (log_q.exp() * (log_q.where(log_q.isfinite(), 0) + H[:, None])**2).sum(-1)
    torch.testing.assert_close(found.entropy.cpu(), (H / math.log(2)).float(), rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(found.varentropy.cpu(), (spread / math.log(2)**2).float(), rtol=2e-5, atol=1e-7)
    return found


def sweep(V, per_kind, tally, seed, **options):
    rng = torch.Generator().manual_seed(seed)
    for i, kind in enumerate(KINDS):
        for which in range(17):
            n = max(1, per_kind // 17 + (which < per_kind % 17))
            z = make_rows(kind, V, n, rng)
            params = pick_settings(n, V, rng, which)
            key = Key(seed * 100 + i, torch.arange(n) + which * 50, position=V)
            compare(z, params, key, tally, **options)


@needs_triton
def test_small_vocabularies(full, record):
    tally = Counter()
    for V in (1, 2, 7): sweep(V, 34 if not full else 170, tally, V)
    record("cuda_small_vocabularies", dict(tally))
    assert tally["close calls"] < max(2, tally["rows"] / 500)


@needs_triton
@pytest.mark.parametrize("slices,slots,task", [(1, 1024, 2), (4, 200, 2), (1, 64, 1), (2, 16, 2)])
def test_a_thousand_tokens(slices, slots, task, full, record):
    "The row itself, a short list, the token only, and a buffer so small that it overflows."
    tally = Counter()
    block = {} if GPU else dict(block=256) if slices > 1 else {}
    sweep(1000, 68 if not full else 510, tally, slices + slots, slices=slices, slots=slots, task=task, **block)
    record(f"cuda_1000_{slices}_{slots}_{task}", dict(tally))
    assert tally["close calls"] < max(2, tally["rows"] / 500)
