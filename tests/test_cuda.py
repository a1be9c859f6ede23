"""The CUDA kernels: interpreted where there is no GPU, and compiled where there is one, against
the plain draw."""

import itertools
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import numpy_draw as reference
from helpers.triton_interpreter import speed_up
from test_draw import recorded, tensor

from decoding_book.loop import generate
from decoding_book.noise import Key
from decoding_book.sampler import Sampler, draw
from decoding_book.topp import whole_weights
from decoding_book.toy import six_words

HAVE = find_spec("triton") is not None
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on masked lanes
needs_triton = pytest.mark.skipif(
    not HAVE, reason="Triton is not installed: pip install triton==3.7.1"
)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INF, NAN, ROOT = math.inf, math.nan, Path(__file__).resolve().parent.parent


if HAVE:
    if not GPU:
        assert os.environ["TRITON_INTERPRET"] == "1"  # conftest.py says so before all imports
    import decoding_book.cuda as C

    if not GPU:
        speed_up()

FAST = {} if GPU else dict(block=8192, wide=1024, pivots=64)  # wide blocks suit the interpreter


# ---------------------------------------------------------------- rows of all kinds

TYPES = ("float32", "bfloat16", "float16")
WAYS = [
    dict(slots=1024),
    dict(slots=16),
    dict(slots=64, slices=2, block=32),
    dict(slots=32, slices=4, block=64),
    dict(slots=64, task=1),
]  # room enough; too little; slices; the token only


def some_cases(rng, V, kind, dtype, B):
    "Rows (B, V) of one kind, parameters and a key, each one a row."
    cases = [reference.a_case(rng, V, kind, dtype) for _ in range(B)]
    params, key = ({n: [case[i][n] for case in cases] for n in cases[0][i]} for i in (1, 2))
    return torch.stack([tensor(row, dtype) for row, *_ in cases]), params, Key(**key)


def measured(z):
    "Entropy and varentropy by their definitions, in float64."
    log_q = z.double().log_softmax(-1)
    q, log_q = log_q.exp(), log_q.where(log_q > -800, 0)
    H = -(q * log_q).sum(-1)
    return (H / math.log(2)).float(), (
        (q * (log_q + H[:, None]) ** 2).sum(-1) / math.log(2) ** 2
    ).float()


def compare(z, params, key, task=2, **options):
    "The kernels against the plain form: every id and every count, in every row."
    found = C.launch(
        z.to(DEVICE), C.ask(len(z), DEVICE, **params, key=key), task=task, **FAST | options
    )
    plain = draw(z, Sampler(**params), key, "plain")
    assert found.ids.cpu().equal(plain.ids), (params, key, found.ids, plain.ids)
    if task == 2:
        assert found.kept.cpu().equal(plain.kept), (params, found.kept, plain.kept)
        torch.testing.assert_close(found.logprob.cpu(), plain.logprob.float(), rtol=1e-6, atol=1e-6)
    for mine, true in zip((found.entropy, found.varentropy), measured(z)):
        torch.testing.assert_close(mine.cpu(), true, rtol=2e-5, atol=1e-7)
    return len(z)


@needs_triton
@pytest.mark.parametrize("kind", reference.KINDS)
def test_the_plain_form_in_every_row(kind, full, record):
    "Ties and masses met at the boundary, extreme temperatures, -inf, subnormals: none is left out."
    rng, rows = np.random.default_rng(reference.KINDS.index(kind)), 0
    for i, V in enumerate(reference.SIZES * (6 if full else 1)):
        rows += compare(*some_cases(rng, V, kind, TYPES[i % 3], 4 if full else 2), **WAYS[i % 5])
    record(f"cuda_rows_{kind}", rows)
    assert rows >= (3000 / len(reference.KINDS) if full else 26)


@needs_triton
@pytest.mark.parametrize("V", [1000, 4096, 5003, 50_257, 262_144])
def test_longer_rows_give_the_same_tokens(V, full, record):
    rng, rows = np.random.default_rng(V), 0
    kinds = reference.KINDS if full else reference.KINDS[V % 3 :: 3 if V < 10_000 else 5]
    for i, kind in enumerate(kinds):
        block = dict(block=max(256, V // 8)) if "slices" in WAYS[i % 5] else {}
        if block:
            block["block"] = 1 << block["block"].bit_length() - 1
        rows += compare(*some_cases(rng, V, kind, TYPES[i % 3], 1), **WAYS[i % 5] | block)
    record(f"cuda_rows_{V}", rows)


@needs_triton
def test_the_recorded_draws():
    "The vectors that any language can be tested with; those of float64 are left to the plain form."
    rows = [r for r in recorded() if len(r[0]) <= 4096]
    for z, params, key, token, kept, logprob in rows[::7]:
        out = draw(
            z[None].to(DEVICE),
            Sampler(**params),
            Key(**{n: [v] for n, v in key.items()}),
            backend="cuda",
        )
        assert (out.ids.item(), out.kept.item()) == (token, kept), (params, key)
        assert out.logprob.item() == pytest.approx(logprob, abs=1e-6, rel=1e-6)
    assert len(rows[::7]) > 50


# ---------------------------------------------------------------- hard rows


KEY = Key(3)


def run(z, params=None, key=KEY, **options):
    z = z.to(DEVICE)
    found = C.launch(z, C.ask(len(z), DEVICE, **params or {}, key=key), **FAST | options)
    return type(found)(*(None if v is None else v.cpu() for v in vars(found).values()))


SETTINGS = [
    {},
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_p=0.8),
    dict(min_p=0.1),
    dict(temperature=1.2, top_k=40, top_p=0.9, min_p=0.01),
    dict(temperature=0),
]


@needs_triton
@pytest.mark.parametrize("slices", [1, 2])
def test_bad_rows_are_reported_and_disturb_nobody(slices):
    good = 3 * torch.randn(7, 600, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[1, 599], bad[3], bad[5, 0] = NAN, -INF, INF
    for params in SETTINGS:
        a, b = (run(z, params, slices=slices, block=256, slots=128) for z in (good, bad))
        assert b.ids[[1, 3, 5]].tolist() == [-1] * 3 and b.kept[[1, 3, 5]].tolist() == [0] * 3
        for name in ("logprob", "entropy", "varentropy"):
            assert getattr(b, name)[[1, 3, 5]].isnan().all()
            assert getattr(b, name)[::2][[0, 1, 3]].equal(getattr(a, name)[::2][[0, 1, 3]])
        assert b.ids[[0, 2, 4, 6]].equal(a.ids[[0, 2, 4, 6]]) and (a.ids >= 0).all()


@needs_triton
def test_greedy_is_the_first_maximum():
    z = torch.zeros(3, 700)
    z[0, [650, 300]], z[1, [0, 699]] = 2.0, 5.0
    found = run(z, dict(temperature=[0, 0.0, 0], top_p=0.5, top_k=[None, 7, 0]))
    assert found.ids.tolist() == [300, 0, 0] and found.kept.tolist() == [1, 1, 1]
    assert found.logprob.tolist() == [0, 0, 0]


@needs_triton
@pytest.mark.parametrize(
    "size,T", [(1, 1e-40), (1e30, 1e-10), (3e38, 0.5), (1, 1e30), (1e-40, 1.0)]
)
def test_extreme_temperatures_and_logits(size, T):
    z = size * torch.randn(4, 300, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    z[2] = z[2].where(torch.arange(300) % 3 == 0, -INF)
    for extra in ({}, dict(top_p=0.693), dict(top_k=9), dict(min_p=0.5)):
        params = dict(temperature=T) | extra
        found, plain = run(z, params, slots=64), draw(z, Sampler(**params), Key(3), "plain")
        assert found.ids.equal(plain.ids) and found.kept.equal(plain.kept), (size, T, extra)


@needs_triton
@pytest.mark.parametrize("task", [1, 2])
def test_a_mass_met_exactly_and_one_float_off(task):
    """The share of the first n tokens, the float below it and the float above: three sizes of the
    nucleus."""
    z = torch.stack(
        [
            torch.zeros(64),
            torch.arange(64) // 16 * -0.5,
            torch.randn(64, generator=torch.Generator().manual_seed(5)),
        ]
    )
    for row in z:
        mass = whole_weights(row)[row.argsort(descending=True, stable=True)].cumsum(0)
        meets = [(mass[n] / mass[-1]).item() for n in (0, 8, 15, 16, 40)]
        ps = [float(np.nextafter(p, to)) for p in meets for to in (0, p, 1)]
        for slots in (16, 1024):
            found = run(row.expand(len(ps), -1), dict(top_p=ps), task=task, slots=slots)
            plain = draw(row.expand(len(ps), -1), Sampler(top_p=ps), Key(3), "plain")
            assert found.ids.equal(plain.ids) and (task == 1 or found.kept.equal(plain.kept))
    assert len({*plain.kept.tolist()}) >= 8


@needs_triton
def test_an_unfiltered_draw_is_about_the_largest_logit_of_the_row():
    """A leader found before the row's maximum is known would be scored about another one, and
    rounded elsewhere."""
    z = torch.full((40, 96), -20.0)
    z[:, ::3], z[:, 40] = torch.arange(1, 33) * 1e-6 - 1, 0.5
    for T in (1.0, 3e7):
        for options in (dict(), dict(slices=2, block=32)):
            compare(z, dict(temperature=T), Key(1), **options)


@needs_triton
def test_a_slice_far_below_the_best_has_no_winner():
    """Its tokens are not looked at again, and its place in the runoff is empty. Token 0 stands for
    nobody."""
    z = torch.full((6, 64), -1000.0)
    z[:, :8] = -torch.arange(8.0) / 4
    for key in range(4):
        compare(z, dict(temperature=1.0), Key(key), slices=2, block=32)


@needs_triton
def test_a_parameter_as_one_number_is_one_a_row():
    "In float64: a mass met exactly is missed by a p of float32."
    z = torch.arange(64)[None] // 16 * -0.5
    mass = whole_weights(z[0]).cumsum(0)
    for n in (5, 20, 40):
        p = (mass[n] / mass[-1]).item()
        assert C.ask(1, DEVICE, top_p=p).numbers[1].item() == p
        for given in (p, [p]):
            compare(z, dict(top_p=given), Key(1))


@needs_triton
def test_min_p_meets_a_token_exactly_and_one_float_off():
    "m of 0 and 1 too. The line is the book's own logarithm."
    z = torch.randn(40, generator=torch.Generator().manual_seed(2))
    d = (z - z.max()).double()
    ms = [
        float(np.nextafter(m, to)) for m in d.exp().sort().values[::4].tolist() for to in (0, m, 1)
    ] + [0.0, 1.0, 1e-300]
    compare(z.expand(len(ms), -1), dict(min_p=ms), Key(1))
    lines = C.ask(len(ms), DEVICE, min_p=ms).numbers[2].cpu()
    assert lines.tolist() == [reference.log(m)[0] if m else -INF for m in ms]


@needs_triton
@pytest.mark.parametrize("slices", [1, 2])
def test_every_launch_says_that_nothing_may_be_fused(slices, monkeypatch):
    "And with it the tests of the compiled code hold for what is run."
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(options)

        rewrite = None

    for name in ("draw_kernel", "scan_kernel", "weigh_kernel", "finish_kernel"):
        monkeypatch.setattr(C, name, Kernel())
    C.launch(torch.zeros(1, 4096), C.ask(1, "cpu"), slices=slices)
    assert len(seen) == (1 if slices == 1 else 3) and all(
        o["enable_fp_fusion"] is False for o in seen
    )


@needs_triton
def test_logits_too_far_apart_to_subtract():
    "Their difference is -inf in float32. They count, and the measures are numbers."
    z = torch.tensor([[3e38, -3e38, 0.0, 3e38], [-3e38, 3e38, 3e38, -math.inf]]).repeat(1, 20)
    for options in (dict(), dict(slices=2, block=32)):
        compare(z, dict(top_p=[0.999, 1.0]), Key(1), **options)


@needs_triton
def test_strides_of_a_view_change_no_token():
    z = 3 * torch.randn(8, 130, generator=torch.Generator().manual_seed(2))
    for view in (z[::2, 5:70], z.T[:9], z[:3, ::3], z[3:4].expand(3, -1), z.flip(0)[5:, 1:]):
        assert view.shape[0] > 1
        for params in (dict(top_k=5, top_p=0.9), {}, dict(top_p=0.8)):
            found, plain = (
                run(view, params, slots=32),
                draw(view, Sampler(**params), Key(3), "plain"),
            )
            assert found.ids.equal(plain.ids) and found.kept.equal(plain.kept)


@needs_triton
def test_every_part_of_the_key_counts():
    z = torch.zeros(6, 50_000)
    keys = [
        Key(5),
        Key(5 + 2**32),
        Key(2**64 - 1),
        Key(5, row=7),
        Key(5, position=[3, 4, 5, 6, 7, 8]),
        Key(5, draw=1),
        Key([1, 2, 3, 4, 5, 2**63 + 9], 0, 0, torch.arange(6)),
    ]
    ids = [run(z, key=key, slices=1, block=2048).ids for key in keys]
    for key, mine in zip(keys, ids):
        assert mine.equal(draw(z, Sampler(), key, "plain").ids)
    assert len({tuple(i.tolist()) for i in ids}) == len(keys)


@needs_triton
def test_alone_in_a_batch_and_in_slices():
    z = 2 * torch.randn(6, 1500, generator=torch.Generator().manual_seed(4))
    for params in SETTINGS:
        batch = run(z, params, Key(8, torch.arange(6)), slots=256)
        alone = [run(z[i : i + 1], params, Key(8, i), slots=256).ids.item() for i in range(6)]
        sliced = run(z, params, Key(8, torch.arange(6)), slots=256, slices=4, block=256)
        assert batch.ids.tolist() == alone == sliced.ids.tolist()
        assert batch.kept.equal(sliced.kept)
        torch.testing.assert_close(batch.varentropy, sliced.varentropy)


@needs_triton
def test_top_k_at_every_size_of_the_buffer():
    "k below, at and above the room; all chunks tied; candidates that just fit and just do not."
    rng = torch.Generator().manual_seed(6)
    z = torch.stack(
        [
            torch.randn(400, generator=rng),
            torch.zeros(400),
            torch.randint(0, 3, (400,), generator=rng).float(),
        ]
    )
    for slots, k in itertools.product(
        (16, 32, 64), (1, 15, 16, 17, 63, 64, 65, 399, 400, 401, 10**12)
    ):
        found, plain = (
            run(z, dict(top_k=k), slots=slots),
            draw(z, Sampler(top_k=k), Key(3), "plain"),
        )
        assert found.ids.equal(plain.ids) and found.kept.equal(plain.kept), (slots, k)


@needs_triton
def test_varentropy_of_a_flat_row_with_one_token_on_top():
    """The second moment is a small difference of large sums here: float32 sums are wrong in the
    fourth digit."""
    z = torch.zeros(2, 20_000)
    z[:, 77] = torch.tensor([2.0, 5.0])
    q = z.double().softmax(-1)
    H = -(q * q.log2()).sum(-1)
    expected = (q * (q.log2() + H[:, None]) ** 2).sum(-1).float()
    entropy, varentropy = C.measures(z.to(DEVICE))
    torch.testing.assert_close(varentropy.cpu(), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(entropy.cpu(), H.float(), rtol=2e-5, atol=0)


@needs_triton
def test_token_only_is_verified():
    """Without log-probabilities the nucleus is never computed; the token is the same, at small p
    on even rows."""
    z = 0.1 * torch.randn(12, 300, generator=torch.Generator().manual_seed(7))
    for p in (0.05, 0.31, 0.72):
        found, plain = (
            run(z, dict(top_p=p), task=1, slots=64),
            draw(z, Sampler(top_p=p), Key(3), "plain"),
        )
        assert found.ids.equal(plain.ids) and found.logprob is None and found.kept is None


# ---------------------------------------------------------------- the seam


@needs_triton
def test_the_loop_draws_with_the_kernels():
    table = six_words()
    table.logs = [rows.float() for rows in table.logs]
    plain, ours = (
        generate(table, [[3, 2]] * 3, Sampler(top_p=0.9, seed=2, backend=b), 5)
        for b in ("plain", "cuda")
    )
    assert [i.tolist() for i in plain.ids] == [i.tolist() for i in ours.ids]
    assert ours.steps[0].draw.entropy is not None


@needs_triton
def test_what_is_refused():
    z = torch.randn(2, 9, device=DEVICE)
    for params in (
        dict(joint=True),
        dict(ties="all"),
        dict(boundary="exceed"),
        Sampler.dialect("vllm"),
    ):
        sampler = params if isinstance(params, Sampler) else Sampler(**params)
        with pytest.raises(ValueError, match="backend 'cuda' knows only"):
            draw(z, sampler, Key(), "cuda")
    with pytest.raises(TypeError, match="float64, the kernels take"):
        C.launch(z.double())
    with pytest.raises(TypeError, match="list, the kernels take"):
        C.launch([[1.0]])
    with pytest.raises(ValueError, match=r"shape \(9,\)"):
        C.launch(z[0])
    with pytest.raises(ValueError, match=r"shape \(0, 9\)"):
        C.launch(z[:0])
    with pytest.raises(ValueError, match=r"top_p, row 1: 1.5"):
        C.ask(2, DEVICE, top_p=[0.5, 1.5])
    with pytest.raises(ValueError, match=r"row 0: -3"):
        C.ask(2, DEVICE, key=Key(0, [-3, 1]))
    wide = draw(z.double(), Sampler(top_k=3), Key(1), "cuda")  # float64: the plain form
    assert wide.logprob.dtype == torch.float64
    assert wide.ids.equal(draw(z.double(), Sampler(top_k=3), Key(1), "plain").ids)


@needs_triton
def test_slices_are_a_power_of_two_and_not_too_many():
    for B, V in itertools.product(
        (1, 3, 8, 32, 65, 66, 128, 5000), (1, 2048, 2049, 32_000, 262_144)
    ):
        n = C.slices_for(B, V)
        assert (
            n & n - 1 == 0
            and 1 <= n <= 64
            and (n - 1) * 2048 < max(V, 2048)
            and (n == 1 or n * B <= 264)
        )
    assert C.slices_for(1, 151_936) == 64 and C.slices_for(66, 151_936) == 1


def test_without_triton_and_without_a_gpu():
    "The package imports, and says what is missing; with Triton, that the kernels run on a GPU."
    code = """
import sys, torch
sys.modules["triton"] = None
from decoding_book.sampler import Sampler, draw
from decoding_book.noise import Key
try: draw(torch.zeros(1, 3), Sampler(), Key(), backend="cuda")
except ValueError as e: print(e)
for name in ("triton", "decoding_book.cuda", "decoding_book.kernels"): sys.modules.pop(name)
try: draw(torch.zeros(1, 3), Sampler(), Key(), backend="cuda")
except (ImportError, ValueError) as e: print(e)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    first, second = done.stdout.splitlines() or ("", done.stderr)
    assert (
        "pip install triton" in first and ("set TRITON_INTERPRET=1" if HAVE else first) in second
    ), second


HIDE = "import sys\nsys.modules['triton'] = None\n"


def without(code, *args):
    "What a process says in which Triton cannot be imported."
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code, *map(str, args)], capture_output=True, text=True
    )
    notes = [x for x in done.stderr.splitlines() if "compiling" not in x]  # on a slow machine
    return "\n".join([*done.stdout.splitlines(), *notes])


def test_without_triton_everything_else_works():
    """Every module is imported, the draw is made, and whoever asks for the kernels is told what is
    missing."""
    said = without("""
import pkgutil, importlib, torch, decoding_book
for m in pkgutil.iter_modules(decoding_book.__path__):
    importlib.import_module("decoding_book." + m.name)
import decoding_book.cuda as C
from decoding_book.noise import Key
from decoding_book.sampler import Sampler, draw, draw_plain, find_backend
assert find_backend(None, Sampler(), "cuda") is draw_plain
print(draw(torch.tensor([[0., 9.]]), Sampler(top_p=.5), Key()).ids.tolist())
row = torch.zeros(1, 3)
for ask in (lambda: find_backend("cuda"), lambda: C.launch(row), lambda: C.measures(row)):
    try: ask()
    except (ImportError, ValueError) as e: print(type(e).__name__, e)
""").splitlines()
    why = "Triton is not installed: pip install triton==3.7.1"
    assert said == [
        "[1]",
        f"ValueError backend: 'cuda' is not there ({why})",
        *[f"ImportError {why}"] * 2,
    ], said


def test_without_triton_the_tests_of_the_kernels_are_skipped():
    "Each with its reason; none fails, none is forgotten."
    files = sorted(ROOT.glob("tests/test_cuda*.py"))
    said = without(
        "import pytest\nsay = '-q -rs -p no:cacheprovider -k'.split()\n"
        "pytest.main([*say, 'not without', *sys.argv[1:]])",
        *files,
    )
    assert "failed" not in said and "error" not in said.lower() and "passed" not in said, said
    assert (
        said.count("pip install triton==3.7.1") >= 3
        and said.rstrip().splitlines()[-1].count("skipped") == 1
    ), said


AS_IT_COMES = """
import sys, torch, decoding_book.cuda as C
from decoding_book.noise import Key
def findings():
    rng = torch.Generator().manual_seed(1)
    wide, tied = 3 * torch.randn(2, 300, generator=rng), 2 * torch.randn(1, 90, generator=rng)
    settings = dict(top_k=20, top_p=.9, min_p=.01), dict(temperature=.7), dict(top_p=.8)
    for z in (wide, tied.bfloat16().round()):
        for i, params in enumerate(settings):
            asked = C.ask(len(z), "cpu", **params, key=Key(2))
            found = C.launch(z, asked, slots=64, slices=1 + i % 2)
            yield [None if v is None else v.double().tolist() for v in vars(found).values()]
if __name__ == "__main__": print(list(findings()))
"""


@needs_triton
def test_interpreted_as_it_comes():
    "In a process of its own, with no shortcuts in the interpreter: the same to the last bit."
    done = subprocess.run(
        [sys.executable, "-c", AS_IT_COMES],
        capture_output=True,
        text=True,
        env=dict(os.environ, TRITON_INTERPRET="1"),
    )
    here = {"__name__": "here"}
    exec(AS_IT_COMES, here)
    mine = list(here["findings"]()) if not GPU else eval(done.stdout)
    assert len(mine) == 6 and all(found[0] and min(found[0]) >= 0 for found in mine)
    assert done.stdout.strip() == str(mine), done.stderr


# ---------------------------------------------------------------- on a GPU only


@pytest.mark.skipif(not GPU, reason="there is no GPU here")
def test_graph_and_no_synchronisation():
    "Captured once and replayed with other logits and positions; nothing in `launch` waits."
    for B in (3, 200):
        z, asked = (
            torch.randn(B, 5000, device="cuda"),
            C.ask(B, "cuda", top_k=50, top_p=0.9, key=Key(1)),
        )
        C.launch(z, asked)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = C.launch(z, asked)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for step in range(3):
            z.normal_()
            graph.replay()
            key = Key(1, torch.arange(B), step)
            assert found.ids.cpu().equal(
                draw(z.cpu(), Sampler(top_k=50, top_p=0.9), key, "plain").ids
            )
            asked.advance()
