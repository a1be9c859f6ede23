"""The CUDA kernels: interpreted where there is no GPU, and compiled where there is one, against the plain draw."""
import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from interpreter import speed_up

from decoding_book.loop import generate
from decoding_book.noise import Key, gumbel_of, uniform_bits
from decoding_book.sampler import Sampler, draw, truncate
from decoding_book.toy import six_words

HAVE = find_spec("triton") is not None
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")      # NumPy's, on masked lanes
needs_triton = pytest.mark.skipif(not HAVE, reason="Triton is not installed: pip install triton==3.7.1")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INF, NAN, ROOT = math.inf, math.nan, Path(__file__).resolve().parent.parent


if HAVE:
    if not GPU: os.environ["TRITON_INTERPRET"] = "1"           # before the module defines its kernels
    import decoding_book.cuda as C
    if not GPU: speed_up()

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
    plain = draw(z, Sampler(**params), key, "plain")
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
    assert tally["rows"] >= 800 and tally["close calls"] < tally["rows"] / 500


@needs_triton
@pytest.mark.parametrize("slices,slots,task,rows", [(1, 1024, 2, 102), (1, 64, 1, 68), (1, 300, 2, 51),
                                                    (4, 200, 2, 34), (2, 16, 2, 17)])
def test_a_thousand_tokens(slices, slots, task, rows, full, record):
    "The row itself; the token only; a short list; slices; a buffer so small that it overflows."
    tally = Counter()
    block = {} if GPU or slices == 1 else dict(block=256)
    options = dict(slices=slices, slots=slots, task=task)
    sweep(1000, 2 * rows if full else rows, tally, slices + slots, **options, **block)
    record(f"cuda_1000_{slices}_{slots}_{task}", dict(tally))
    assert tally["rows"] >= 136 and tally["close calls"] <= max(1, tally["rows"] / 500)


@needs_triton
def test_larger_vocabularies(full, record):
    tally = Counter()
    sweep(5003, 17 if not full else 51, tally, 1)
    rng = torch.Generator().manual_seed(3)
    z = torch.cat([make_rows(kind, 50_257, 1, rng).float() for kind in ("gauss", "peaked", "ties", "flat")])
    settings = dict(temperature=[.8, 1., 1.3, 1.], top_k=[50, 0, 0, 2000], top_p=[.9, .9, .95, .5],
                    min_p=[0., 0., .01, 0.])
    compare(z, settings, Key(9), tally, slices=2)
    if full: compare(z, settings, Key(9), tally, slices=1, task=1)
    record("cuda_larger", dict(tally))
    assert tally["rows"] >= 136 and tally["close calls"] <= max(1, tally["rows"] / 500)


@needs_triton
def test_counts_are_enough():
    "The rows that the tests above compare, in the quick tier."
    assert 3 * 8 * 34 + 8 * (102 + 68 + 51 + 34 + 17) + 8 * 17 >= 3000


# ---------------------------------------------------------------- hard rows

def run(z, params=None, key=Key(3), **options):
    z = z.to(DEVICE)
    found = C.launch(z, C.ask(len(z), DEVICE, **params or {}, key=key), **FAST | options)
    return type(found)(*(None if v is None else v.cpu() for v in vars(found).values()))


SETTINGS = [{}, dict(temperature=.7), dict(top_k=5), dict(top_p=.8), dict(min_p=.1),
            dict(temperature=1.2, top_k=40, top_p=.9, min_p=.01), dict(temperature=0)]


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
    z[0, [650, 300]], z[1, [0, 699]] = 2., 5.
    found = run(z, dict(temperature=[0, 0., 0], top_p=.5, top_k=[None, 7, 0]))
    assert found.ids.tolist() == [300, 0, 0] and found.kept.tolist() == [1, 1, 1]
    assert found.logprob.tolist() == [0, 0, 0]


@needs_triton
@pytest.mark.parametrize("size,T", [(1, 1e-40), (1e30, 1e-10), (3e38, .5), (1, 1e30), (1e-40, 1.)])
def test_extreme_temperatures_and_logits(size, T):
    z = (size * torch.randn(4, 300, generator=torch.Generator().manual_seed(1)).clamp(-1, 1))
    z[2] = z[2].where(torch.arange(300) % 3 == 0, -INF)
    for extra in ({}, dict(top_p=.693), dict(top_k=9), dict(min_p=.5)):
        params = dict(temperature=T) | extra
        found, plain = run(z, params, slots=64), draw(z, Sampler(**params), Key(3), "plain")
        assert found.ids.equal(plain.ids), (size, T, extra)
        assert (found.kept - plain.kept).abs().max() <= ("top_p" in params), (size, T, extra)


@needs_triton
def test_strides():
    z = 3 * torch.randn(8, 130, generator=torch.Generator().manual_seed(2))
    for view in (z[::2, 5:70], z.T[:9], z[:3, ::3], z[3:4].expand(3, -1), z.flip(0)[5:, 1:]):
        assert view.shape[0] > 1
        for params in (dict(top_k=5, top_p=.9), {}, dict(top_p=.8)):
            found, plain = run(view, params, slots=32), draw(view, Sampler(**params), Key(3), "plain")
            assert found.ids.equal(plain.ids) and found.kept.equal(plain.kept)


@needs_triton
def test_every_part_of_the_key_counts():
    z = torch.zeros(6, 50_000)
    keys = [Key(5), Key(5 + 2**32), Key(2**64 - 1), Key(5, row=7), Key(5, position=[3, 4, 5, 6, 7, 8]), Key(5, draw=1),
            Key([1, 2, 3, 4, 5, 2**63 + 9], 0, 0, torch.arange(6))]
    ids = [run(z, key=key, slices=1, block=2048).ids for key in keys]
    for key, mine in zip(keys, ids): assert mine.equal(draw(z, Sampler(), key, "plain").ids)
    assert len({tuple(i.tolist()) for i in ids}) == len(keys)


@needs_triton
def test_alone_in_a_batch_and_in_slices():
    z = 2 * torch.randn(6, 1500, generator=torch.Generator().manual_seed(4))
    for params in SETTINGS:
        batch = run(z, params, Key(8, torch.arange(6)), slots=256)
        alone = [run(z[i:i + 1], params, Key(8, i), slots=256).ids.item() for i in range(6)]
        sliced = run(z, params, Key(8, torch.arange(6)), slots=256, slices=4, block=256)
        assert batch.ids.tolist() == alone == sliced.ids.tolist()
        assert batch.kept.equal(sliced.kept)
        torch.testing.assert_close(batch.varentropy, sliced.varentropy)


@needs_triton
def test_top_k_at_every_size_of_the_buffer():
    "k below, at and above the room; all chunks tied; candidates that just fit and just do not."
    rng = torch.Generator().manual_seed(6)
    z = torch.stack([torch.randn(400, generator=rng), torch.zeros(400), torch.randint(0, 3, (400,), generator=rng).float()])
    for slots, k in itertools.product((16, 32, 64), (1, 15, 16, 17, 63, 64, 65, 399, 400, 401, 10**12)):
        found, plain = run(z, dict(top_k=k), slots=slots), draw(z, Sampler(top_k=k), Key(3), "plain")
        assert found.ids.equal(plain.ids) and found.kept.equal(plain.kept), (slots, k)


@needs_triton
def test_varentropy_of_a_flat_row_with_one_token_on_top():
    "The second moment is a small difference of large sums here: float32 sums are wrong in the fourth digit."
    z = torch.zeros(2, 20_000)
    z[:, 77] = torch.tensor([2., 5.])
    q = z.double().softmax(-1)
    H = -(q * q.log2()).sum(-1)
    expected = (q * (q.log2() + H[:, None])**2).sum(-1).float()
    entropy, varentropy = C.measures(z.to(DEVICE))
    torch.testing.assert_close(varentropy.cpu(), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(entropy.cpu(), H.float(), rtol=2e-5, atol=0)


@needs_triton
def test_token_only_is_verified():
    "Without log-probabilities the nucleus is never computed; the token is the same, at small p on even rows."
    z = .1 * torch.randn(12, 300, generator=torch.Generator().manual_seed(7))
    for p in (.05, .31, .72):
        found, plain = run(z, dict(top_p=p), task=1, slots=64), draw(z, Sampler(top_p=p), Key(3), "plain")
        assert found.ids.equal(plain.ids) and found.logprob is None and found.kept is None


# ---------------------------------------------------------------- the seam

@needs_triton
def test_the_loop_draws_with_the_kernels():
    table = six_words()
    table.logs = [rows.float() for rows in table.logs]
    plain, ours = (generate(table, [[3, 2]] * 3, Sampler(top_p=.9, seed=2, backend=b), 5) for b in ("plain", "cuda"))
    assert [i.tolist() for i in plain.ids] == [i.tolist() for i in ours.ids]
    assert ours.steps[0].draw.entropy is not None


@needs_triton
def test_what_is_refused():
    z = torch.randn(2, 9, device=DEVICE)
    for params in (dict(joint=True), dict(ties="all"), dict(boundary="exceed"), Sampler.dialect("vllm")):
        sampler = params if isinstance(params, Sampler) else Sampler(**params)
        with pytest.raises(ValueError, match="backend 'cuda' knows only"): draw(z, sampler, Key(), "cuda")
    with pytest.raises(TypeError, match="float64, the kernels take"): C.launch(z.double())
    with pytest.raises(TypeError, match="list, the kernels take"): C.launch([[1.]])
    with pytest.raises(ValueError, match=r"shape \(9,\)"): C.launch(z[0])
    with pytest.raises(ValueError, match=r"shape \(0, 9\)"): C.launch(z[:0])
    with pytest.raises(ValueError, match=r"top_p, row 1: 1.5"): C.ask(2, DEVICE, top_p=[.5, 1.5])
    with pytest.raises(ValueError, match=r"row 0: -3"): C.ask(2, DEVICE, key=Key(0, [-3, 1]))
    wide = draw(z.double(), Sampler(top_k=3), Key(1), "cuda")         # float64: the plain form
    assert wide.logprob.dtype == torch.float64
    assert wide.ids.equal(draw(z.double(), Sampler(top_k=3), Key(1), "plain").ids)


@needs_triton
def test_slices():
    for B, V in itertools.product((1, 3, 8, 32, 65, 66, 128, 5000), (1, 2048, 2049, 32_000, 262_144)):
        n = C.slices_for(B, V)
        assert n & n - 1 == 0 and 1 <= n <= 64 and (n - 1) * 2048 < max(V, 2048) and (n == 1 or n * B <= 264)
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
del sys.modules["triton"], sys.modules["decoding_book.cuda"]
try: draw(torch.zeros(1, 3), Sampler(), Key(), backend="cuda")
except (ImportError, ValueError) as e: print(e)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    first, second = done.stdout.splitlines() or ("", done.stderr)
    assert "pip install triton" in first and ("set TRITON_INTERPRET=1" if HAVE else first) in second, second


HIDE = "import sys\nsys.modules['triton'] = None\n"


def without(code, *args):
    "What a process says in which Triton cannot be imported."
    done = subprocess.run([sys.executable, "-c", HIDE + code, *map(str, args)], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_without_triton_everything_else_works():
    "Every module is imported, the draw is made, and whoever asks for the kernels is told what is missing."
    said = without("""
import pkgutil, importlib, torch, decoding_book
for m in pkgutil.iter_modules(decoding_book.__path__): importlib.import_module("decoding_book." + m.name)
import decoding_book.cuda as C
from decoding_book.noise import Key
from decoding_book.sampler import Sampler, draw, draw_plain, find_backend
assert find_backend(None, Sampler(), "cuda") is draw_plain
print(draw(torch.tensor([[0., 9.]]), Sampler(top_p=.5), Key()).ids.tolist())
for ask in (lambda: find_backend("cuda"), lambda: C.launch(torch.zeros(1, 3)), lambda: C.measures(torch.zeros(1, 3))):
    try: ask()
    except (ImportError, ValueError) as e: print(type(e).__name__, e)
""").splitlines()
    why = "Triton is not installed: pip install triton==3.7.1"
    assert said == ["[1]", f"ValueError backend: 'cuda' is not there ({why})", *[f"ImportError {why}"] * 2], said


def test_without_triton_the_tests_of_the_kernels_are_skipped():
    "Each with its reason; none fails, none is forgotten."
    files = sorted(ROOT.glob("tests/test_cuda*.py"))
    said = without("import pytest\npytest.main(['-q', '-rs', '-p', 'no:cacheprovider', '-k', 'not without', *sys.argv[1:]])", *files)
    assert "failed" not in said and "error" not in said.lower() and "passed" not in said, said
    assert said.count("pip install triton==3.7.1") >= 3 and said.rstrip().splitlines()[-1].count("skipped") == 1, said


AS_IT_COMES = """
import sys, torch, decoding_book.cuda as C
from decoding_book.noise import Key
def findings():
    rng = torch.Generator().manual_seed(1)
    for z in (3 * torch.randn(2, 300, generator=rng), (2 * torch.randn(1, 90, generator=rng)).bfloat16().round()):
        for i, params in enumerate((dict(top_k=20, top_p=.9, min_p=.01), dict(temperature=.7), dict(top_p=.8))):
            found = C.launch(z, C.ask(len(z), "cpu", **params, key=Key(2)), slots=64, slices=1 + i % 2)
            yield [None if v is None else v.double().tolist() for v in vars(found).values()]
if __name__ == "__main__": print(list(findings()))
"""


@needs_triton
def test_interpreted_as_it_comes():
    "In a process of its own, with no shortcuts in the interpreter: the same to the last bit."
    done = subprocess.run([sys.executable, "-c", AS_IT_COMES], capture_output=True, text=True,
                          env=dict(os.environ, TRITON_INTERPRET="1"))
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
        z, asked = torch.randn(B, 5000, device="cuda"), C.ask(B, "cuda", top_k=50, top_p=.9, key=Key(1))
        C.launch(z, asked)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph): found = C.launch(z, asked)
        finally: torch.cuda.set_sync_debug_mode("default")
        for step in range(3):
            z.normal_()
            graph.replay()
            key = Key(1, torch.arange(B), step)
            assert found.ids.cpu().equal(draw(z.cpu(), Sampler(top_k=50, top_p=.9), key, "plain").ids)
            asked.advance()
