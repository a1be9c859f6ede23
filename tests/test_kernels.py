"""The steps of the kernels one by one, interpreted: the plain form's bits, and exact places at a
cut."""

import math

import numpy as np
import pytest
import torch
from test_cuda import DEVICE, FAST, HAVE, needs_triton  # the kernels are interpreted from here on
from test_draw import VECTORS

from decoding_book.topp import coins, whole_weights

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), needs_triton]

if HAVE:
    import triton
    import triton.language as tl

    import decoding_book.kernels as K

    @triton.jit
    def look(F: tl.constexpr, x, out, n, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(out + at, F(tl.load(x + at, at < n, -1.0)), at < n)

    @triton.jit
    def noise32(x):
        return K.noise_of(x.to(tl.uint32))

    @triton.jit
    def look_at_bits(x, out, n, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(out + at, noise32(tl.load(x + at, at < n, 0)), at < n)

    @triton.jit
    def weigh_all(y, out, n, top, scale, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(
            out + at, K.weigh(tl.load(y + at, at < n, -float("inf")), tl.load(top), scale), at < n
        )

    @triton.jit
    def look_at_places(held, each, equals, target, out, n, N: tl.constexpr):
        at = tl.arange(0, N)
        there = at < n
        found = K.places_at(
            tl.load(held + at, there, 0.0),
            tl.load(each + at, there, 1.0),
            tl.load(equals + at, there, 1.0),
            tl.load(target + at, there, 1.0),
        )
        tl.store(out + at, found, there)


def test_logarithm_exponential_and_noise_have_the_recorded_bits():
    "Those that any language can be tested with."
    for name, inputs, outputs in (
        ("log_exactly", "log_x", "log_y"),
        ("exp_exactly", "exp_x", "exp_y"),
    ):
        x, y = torch.tensor(VECTORS[inputs]), VECTORS[outputs]
        normal = x.abs() >= 2.0**-1022
        x, y, out = (
            x[normal].to(DEVICE),
            y[normal.numpy()],
            torch.empty(int(normal.sum()), dtype=torch.float64, device=DEVICE),
        )
        look[(1,)](getattr(K, name), x, out, len(x), N=1024, enable_fp_fusion=False)
        assert out.cpu().numpy().tobytes() == y.tobytes() and len(y) > 400
    bits = torch.tensor(VECTORS["noise_bits"]).to(DEVICE)
    out = torch.empty(len(bits), device=DEVICE)
    look_at_bits[(1,)](bits, out, len(bits), N=512, enable_fp_fusion=False)
    assert out.cpu().numpy().tobytes() == VECTORS["noise"].tobytes()


@pytest.mark.parametrize("V", [1, 2, 3, 1000, 4096])
def test_weights_are_the_plain_forms(V):
    rng = torch.Generator().manual_seed(V)
    for z in (
        8 * torch.randn(V, generator=rng),
        1e38 * torch.randn(V, generator=rng).clamp(-3, 3),
        torch.full((V,), -1e-40),
    ):
        z[V // 2 :].masked_fill_(torch.rand(V - V // 2, generator=rng) < 0.1, -math.inf)
        if V < 3:
            z[0] = 0.5
        out = torch.empty(V, dtype=torch.float64, device=DEVICE)
        weigh_all[(1,)](
            z.to(DEVICE), out, V, z.amax().to(DEVICE), coins(V), N=4096, enable_fp_fusion=False
        )
        assert out.cpu().equal(whole_weights(z))


def test_places_at_a_cut_are_counted_exactly(full):
    "Against a count of whole numbers: targets at, just below and just above held + i each."
    rng = np.random.default_rng(3)
    n = 1 << 12
    each = 2 ** rng.integers(0, 34, n)
    equals = rng.integers(1, 2000, n)
    held = rng.integers(0, 2**51, n) // np.where(rng.random(n) < 0.5, 1, 2**40)
    held = np.minimum(held, 2**52 - each * equals)
    i = np.minimum(rng.integers(0, 2000, n), equals + 3)
    target = (held + i * each).astype(float)
    target = np.where(
        rng.random(n) < 0.3,
        np.nextafter(target, 0),
        np.where(rng.random(n) < 0.4, np.nextafter(target, np.inf), target),
    )
    args = [
        torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (held, each, equals, target)
    ]
    out = torch.empty(n, dtype=torch.float64, device=DEVICE)
    look_at_places[(1,)](*args, out, n, N=n, enable_fp_fusion=False)
    for h, e, q, t, found in zip(
        held.tolist(), each.tolist(), equals.tolist(), target.tolist(), out.tolist()
    ):
        up = math.ceil(t)  # h + i e < t, whole numbers: < its ceiling
        assert found == min(max(-((h - up) // e), 1), q), (h, e, q, t, found)


def test_a_chunk_that_is_not_read_again_weighs_nothing():
    "Tokens just above and just below the line where a coin begins, in chunks of their own."
    import decoding_book.cuda as C
    from decoding_book.noise import Key
    from decoding_book.sampler import Sampler, draw

    V = 512
    line = -math.log(2 * coins(V))
    z = torch.full((1, V), line - 0.5)
    z[0, 0], z[0, 20], z[0, 40] = 0.0, line + 1e-3, line - 1e-3
    w = whole_weights(z)
    assert w[0, 20] == 1 and w[0, 40] == 0
    for p in ((w[0, 0] / w.sum()).item(), 1 - 2**-53):
        found = C.launch(
            z.to(DEVICE), C.ask(1, DEVICE, top_p=p, key=Key(1)), slots=16, **FAST | dict(block=256)
        )
        assert found.kept.item() == draw(z, Sampler(top_p=p), Key(1), "plain").kept.item()


def test_nothing_of_the_kernels_is_exported():
    assert K.__all__ == []
    import decoding_book.cuda as C

    assert "measures" not in C.__all__ and {"launch", "ask", "draw_cuda"} <= set(C.__all__)
