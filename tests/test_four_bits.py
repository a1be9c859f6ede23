"""The model at the bits of its file: the same weights, the logits of float32, and whose work it is
to compute them."""

import copy
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers.gguf_files import gguf, packed
from helpers.texts import PROMPTS, TOLERANCE, ids_of

from benchmarks.prefix import measure
from decoding_book import four_bits
from decoding_book.beam import beam_search
from decoding_book.four_bits import InTiles, Matrix, in_digits, new_inputs
from decoding_book.loop import PromptCache, as_prompts, first_cache, generate, left_pad, score
from decoding_book.smollm import SmolLM2, form_of
from decoding_book.transformer import shakespeare

pytest.importorskip("numba")


@pytest.fixture(scope="module")
def quick():
    return SmolLM2(weights="q4")


@pytest.fixture(scope="module")
def floats():
    "The model in float32, in the same loops."
    return SmolLM2(weights="float32")


@pytest.fixture
def threads():
    "Sets torch's number of threads, and puts it back."
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def stepped(model, rows, mask=None, **options):
    "The prediction after the last of (B, T) ids, one position at a time."
    cache = model.new_cache(len(rows), rows.shape[1])
    for t in range(rows.shape[1]):
        part = None if mask is None else mask[:, : t + 1]
        seen = None if mask is None else part[:, -1:]
        out = model(rows[:, t : t + 1], seen, cache=cache, **options)
    return out


# ---------------------------------------------------------------- the weights


def test_the_weights_are_those_of_float32(quick, model, full):
    for n in range(30) if full else (0, 29):
        ours, theirs = quick.weights.layers[n], model.weights.layers[n]
        for name in ("qkv", "out", "up", "down"):
            want = getattr(theirs, name)
            want = want if torch.is_tensor(want) else want.plain()
            assert torch.equal(getattr(ours, name).plain(), want), (n, name)
    assert torch.equal(quick.weights.embedding.plain(), model.weights.embedding)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("outputs", [1, 191, 192, 193, 400])
def test_any_number_of_outputs(kind, outputs):
    "Tiles that are not full; two lists, each with tiles of its own."
    number = gguf.GGMLQuantizationType[kind]
    tensors, plain = {}, []
    for n, name in enumerate("ab"):
        data, weights = packed((outputs, 64), number, n)
        rows = torch.from_numpy(np.array(data)).flatten()
        tensors[f"{name}.weight"] = rows, int(number), (outputs, 64)
        plain.append(weights)
    plain = torch.cat(plain)
    for lists in ([["a", "b"]], [["a"], ["b"]]):
        m = Matrix(*map(np.ascontiguousarray, four_bits.four_bits(tensors, *lists)))
        w = InTiles(m, 2 * outputs, len(lists))
        assert torch.equal(w.plain(), plain)
        for rows in (1, 3, 150):
            x = torch.randn(rows, 2, 64, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(w.times(x), x @ plain.T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("outputs", [1, 95, 96, 97, 200])
def test_floats_are_multiplied_as_they_are(bits, outputs):
    "Any number of outputs and rows: one at a time, four at a time, and by torch."
    rng = torch.Generator().manual_seed(outputs)
    kind, made = four_bits.FLOAT_OF[bits], torch.randn(2, outputs, 64, generator=rng)
    made = made.bfloat16().float()
    data = {f"{n}.weight": (w.flatten().view(torch.uint8), 0, w.shape) for n, w in zip("ab", made)}
    for lists in ([["a", "b"]], [["a"], ["b"]]):
        m = Matrix(*map(np.ascontiguousarray, four_bits.floats(bits, data, *lists)))
        w = InTiles(m, 2 * outputs, len(lists))
        assert w.plain().equal(made.flatten(0, 1).to(kind))
        for rows in (0, 1, 3, 4, 5, 11, 150):
            x = torch.randn(rows, 64, generator=rng).bfloat16().float()
            want = x @ made.flatten(0, 1).T
            loose = 0.03 if bits == 16 and rows == 150 else 2e-6  # torch rounds the products
            torch.testing.assert_close(w.times(x), want, atol=1e-5, rtol=loose)


def test_no_rows_one_row_and_rows_with_gaps_are_multiplied(quick):
    "Whatever a plain matrix takes: slices with steps, turned axes, a single row of no batch."
    w = quick.weights.layers[0].out
    plain = w.plain().T
    x = torch.randn(8, 1152, generator=torch.Generator().manual_seed(0))
    turned = x.view(2, 4, 1152)[..., 1::2].transpose(0, 1)
    none = x[:0, :576]
    for rows in (x[0, :576], x[::2, ::2], x[:, :576].flip(0), turned, none, none[None]):
        got = w.times(rows)
        assert got.shape == rows.shape
        torch.testing.assert_close(got, rows @ plain, atol=1e-4, rtol=1e-5)


def test_rows_of_another_type_or_width_are_refused(quick):
    "The loops read bits, as many as the matrix has inputs: they would read on past short rows."
    w = quick.weights.layers[0].out
    x = torch.ones(2, 576)
    for wrong in (x.double(), x.long(), x.bfloat16(), x[:, :32], torch.ones(2, 1152)):
        with pytest.raises(ValueError, match=r"x: .*, expected torch.float32 with 576 numbers"):
            w.times(wrong)


def test_a_copied_or_pickled_model_is_sealed_and_gives_the_same_logits(quick):
    "Copies share what nobody writes to: the packed numbers, and the norms of the steps."
    ids = torch.tensor([[5]])
    want = quick(ids, cache=quick.new_cache(1, 1)).logits
    again, other = copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))
    assert again.weights.one_position is quick.weights.one_position
    for one in (quick, again, other):
        w, step = one.weights, one.weights.one_position
        arrays = [step.layers.attn_norm, step.layers.ffn_norm, step.head.norm]
        for m in (step.layers.qkv, step.head.matrix, w.layers[0].qkv.m, w.embedding.m):
            arrays += m
        for array in arrays:
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0
        assert one(ids, cache=one.new_cache(1, 1)).logits.equal(want)


# ---------------------------------------------------------------- whole numbers


def in_whole_numbers(x):
    "`Inputs` of (n, 32) numbers, and what they stand for, in float64."
    inputs = new_inputs(len(x))
    in_digits(np.ascontiguousarray(x, np.float32), inputs)
    q = np.einsum("p,npj->nj", [65536.0, 256.0, 1.0], inputs.digits.astype(float))
    return inputs, q * inputs.unit[:, None].astype(float)


def test_digits_stand_for_the_inputs_to_half_a_unit():
    "Of any size: zeros, denormal and huge numbers, one large among small, powers of two."
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 32)) * 10.0 ** rng.integers(-30, 30, (400, 1))
    x[0], x[1], x[2, 5], x[3] = 0, 1e-40, 1e6, 2.0 ** rng.integers(-20, 20, 32)
    x[4], x[5] = np.float32(3.4e38), -(2.0**20)
    inputs, found = in_whole_numbers(x)
    assert (np.abs(found - x.astype(np.float32)) <= inputs.unit[:, None] / 2).all()
    most = np.abs(x.astype(np.float32)).max(1)
    assert (inputs.unit[2:] <= most[2:] * 2.0**-21).all()
    assert (inputs.totals == inputs.digits.sum(2)).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(wrong):
    x = np.ones((2, 32))
    x[1, 7] = wrong
    inputs, _ = in_whole_numbers(x)
    assert np.isnan(inputs.unit[1]) and inputs.unit[0] == 2.0**-21


NAMES = {"plain": ("plain_one", "plain_two"), "at_once": ("one_at_once", "two_at_once")}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", ["plain", "at_once"])
def test_a_block_is_the_sum_of_its_products(bits, block):
    "Both forms of it against NumPy, the largest codes and digits among them."
    if block == "at_once" and not four_bits.multiplies_bytes():
        pytest.skip("this processor does not multiply bytes")
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((50, 32))
    x[0], x[1] = 1, -1
    inputs, exact = in_whole_numbers(x)
    codes = rng.integers(0, 2**bits, (50, 32, four_bits.LANES))
    codes[:2, :, 0], codes[:2, :, 1] = 0, 2**bits - 1
    scales = rng.standard_normal((50, 8 // bits, four_bits.LANES)).astype(np.float16)
    parts = codes.reshape(50, 8 // bits, -1, four_bits.LANES).astype(np.uint8)
    parts = parts[:, 0] | parts[:, 1] << 4 if bits == 4 else parts[:, 0]
    words = four_bits.by_fours(parts[None])[0]
    one, two = (getattr(four_bits, name) for name in NAMES[block])
    for b in range(50):
        outs = np.ones((3, four_bits.LANES), np.float32)
        rows = [(inputs.digits[b], inputs.totals[b], inputs.unit[b : b + 1], o) for o in outs]
        one(words[b], scales[b].view(np.uint16), rows[0])
        two(words[b], scales[b].view(np.uint16), *rows[1:])
        out = outs[0]
        assert (outs == out).all()
        steps = scales[b].astype(float)
        weights = steps[0] * codes[b] + steps[1] if bits == 4 else steps[0] * (codes[b] - 128)
        size = 1 + np.abs(weights * exact[b][:, None]).sum(0)
        assert (np.abs(out - 1 - exact[b] @ weights) <= 3e-7 * size).all()


def test_halves_are_read_as_they_are():
    "All 65536 of them but infinities and no-numbers, which no file has as a scale."
    every = np.arange(65536, dtype=np.uint16)
    every = every[np.isfinite(every.view(np.float16))]
    found = np.array([four_bits.from_half(h) for h in every], np.float32)
    assert (found == every.view(np.float16)).all()


def test_a_column_of_an_array_is_refused_by_the_instruction():
    "It reads on from the first number, so what lies elsewhere must not get there."
    if not four_bits.multiplies_bytes():
        pytest.skip("this processor does not multiply bytes")
    from numba import TypingError, njit

    read = njit(lambda a: four_bits.counted((a,)))
    counter = np.arange(6).reshape(3, 2)
    assert read(counter[1]) == 2
    with pytest.raises(TypingError):
        read(counter[:, 1])


def test_without_the_instruction_the_tokens_are_the_same(quick, full):
    "A process whose compiler is not told of it; the plain loops do all the work."
    if not full:
        pytest.skip("compiles the step once more: --full")
    from numba.core.registry import cpu_target

    has = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    features = ",".join(f for f in has if "vnni" not in f)
    code = f"""
from decoding_book import four_bits, generate, SmolLM2
assert not four_bits.multiplies_bytes()
assert four_bits.add_one is four_bits.plain_one
print(generate(SmolLM2(weights="q4"), {PROMPTS[0]!r}, max_new_tokens=24).ids.tolist())
"""
    env = os.environ | {"NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=env
    )
    want = generate(quick, PROMPTS[0], max_new_tokens=24).ids.tolist()
    assert done.stdout == f"{want}\n", done.stderr


def test_without_numba_the_plain_loops_are_python_and_others_say_what_is_missing():
    "The same digits and products, one number at a time; an instruction cannot be had."
    code = """
import sys
sys.modules["numba"] = None
import numpy as np
from decoding_book.four_bits import *
x = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
inputs = new_inputs(1)
in_digits(x, inputs)
q = np.einsum("p,pj->j", [65536, 256, 1], inputs.digits[0].astype(int))
assert (np.abs(q * inputs.unit.astype(float) - x) <= inputs.unit / 2).all()
every = np.arange(65536, dtype=np.uint16)
every = every[np.isfinite(every.view(np.float16))][::11]
assert all(from_half(h) == h.view(np.float16) for h in every)
codes = np.full((4, LANES), 0x73737373, np.uint32)
scales = np.full((2, LANES), [[0.5], [-2]]).astype(np.float16).view(np.uint16)
out = np.zeros(LANES, np.float32)
plain_block(codes, scales, inputs.digits[0], inputs.totals[0], inputs.unit, out)
assert np.abs(out - x[0] @ (0.5 * np.repeat([3, 7], 16) - 2)).max() < 1e-5
try: meet(np.zeros(1, np.int64), 1)
except ImportError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "it needs the package numba" in done.stdout, done.stderr


# ---------------------------------------------------------------- the logits


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("form", ["quick", "floats"])
def test_logits_are_those_of_float32(form, model, prompt, request):
    "At once and position by position; the newest position's raw attention scores too."
    ids, mine = ids_of(model, prompt), request.getfixturevalue(form)
    want = model(ids, attention=True)
    for got in (mine(ids, attention=True), stepped(mine, ids, attention=True)):
        torch.testing.assert_close(got.logits, want.logits, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(got.attention, want.attention, atol=TOLERANCE, rtol=1e-4)
        assert got.key_mask.equal(want.key_mask)


def test_padding_is_not_seen(quick, model):
    rows = [ids_of(model, p)[0] for p in PROMPTS[:6]]
    ids, mask = left_pad(rows)
    want = torch.cat([model(row[None]).logits for row in rows])
    torch.testing.assert_close(quick(ids, mask).logits, want, atol=TOLERANCE, rtol=0)
    cache = quick.new_cache(6, ids.shape[1] + 2)
    quick(ids, mask, cache=cache)
    new = torch.tensor([[7]] * 6)
    got = quick(new, cache=cache).logits
    want = torch.cat([model(torch.cat([row, new[0]])[None]).logits for row in rows])
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
    raw = quick(new, cache=cache, attention=True)
    assert raw.attention.shape == (6, 30, 9, ids.shape[1] + 2)
    assert raw.key_mask[:, :-2].equal(mask)


def test_a_row_of_padding_only_is_a_number_and_spoils_nothing(quick, model):
    "Position by position from the first column, where short rows have nothing but padding yet."
    rows = [ids_of(model, p)[0] for p in PROMPTS[:3]]
    ids, mask = left_pad([*rows, torch.arange(9, 40)])
    assert not mask[:, :3].all()
    cache, like = (m.new_cache(*ids.shape) for m in (quick, model))
    for t in range(ids.shape[1]):
        got, want = (
            m(ids[:, t : t + 1], mask[:, t : t + 1], cache=c, last_only=False, attention=True)
            for m, c in ((quick, cache), (model, like))
        )
        assert got.logits.isfinite().all() and got.attention.isfinite().all()
        assert got.key_mask.equal(mask[:, : t + 1])
    torch.testing.assert_close(got.logits, want.logits, atol=TOLERANCE, rtol=0)
    for one, other in zip(score(quick, rows, chunk=1), score(model, rows)):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0, equal_nan=True)


@pytest.mark.parametrize("form", ["q4", "float32", "bfloat16"])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(form, threads):
    mine = SmolLM2(weights=form)
    found = [ids_of(mine, p)[0] for p in PROMPTS]
    rows = torch.stack([ids[:3] for ids in found if len(ids) > 2])[:11]
    assert len(rows) == 11  # two fours, and three alone
    found = {}
    for n in (1, 2, 3):
        threads(n)
        found[n] = stepped(mine, rows).logits
    threads(1)
    alone = torch.cat([stepped(mine, row[None]).logits for row in rows])
    assert all(logits.equal(alone) for logits in found.values())


def test_caches_grow_reorder_and_are_cut(quick, model):
    ids = ids_of(model, PROMPTS[2])
    cache = quick.new_cache(3, 20)
    quick(ids, cache=cache)
    cache.reorder([0, 0, 0])
    new = torch.tensor([[5], [6], [7]])
    quick(new, cache=cache)
    cache.keep([2, 0])
    got = quick(torch.tensor([[8], [9]]), cache=cache, last_only=False)
    assert got.logits.shape == (2, 1, 49152)
    for i, row in enumerate(([7, 8], [5, 9])):
        want = model(torch.cat([ids, torch.tensor([row])], 1)).logits[0]
        torch.testing.assert_close(got.logits[i, 0], want, atol=TOLERANCE, rtol=0)
    with pytest.raises(ValueError, match="more do not fit"):
        for _ in range(20):
            quick(torch.tensor([[8], [9]]), cache=cache)


def test_a_cache_of_another_model_is_refused(quick):
    "The loops would write past its end."
    from decoding_book.transformer import KVCache

    for sizes in ((2, 1, 3, 6, 64), (30, 1, 4, 6, 64), (30, 1, 3, 6, 32)):
        with pytest.raises(ValueError, match="cache: layers, heads, size and type"):
            quick(torch.tensor([[5]]), cache=KVCache(sizes, torch.float32, torch.device("cpu")))
    half = KVCache((30, 1, 3, 6, 64), torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ValueError, match="cache: .*bfloat16"):
        quick(torch.tensor([[5]]), cache=half)


def test_texts_are_those_of_float32(quick, batch, full):
    "Greedy tokens of ten prompts, alone and as one batch."
    n = 64 if full else 16
    ours = generate(quick, PROMPTS[:10], max_new_tokens=n, ignore_eos=True)
    for a, b in zip(ours.ids, batch.ids):
        assert a.equal(b[:n])
    for prompt, want in list(zip(PROMPTS[:10], batch.ids))[: None if full else 2]:
        assert generate(quick, prompt, max_new_tokens=n, ignore_eos=True).ids.equal(want[:n])


def test_search_and_scores(quick, model):
    ours, theirs = (beam_search(m, PROMPTS[0], 4, 8)[0] for m in (quick, model))
    assert list(ours.ids) == list(theirs.ids)
    a, b = (score(m, "The three laws of motion are old.") for m in (quick, model))
    torch.testing.assert_close(a[:, 1:], b[:, 1:], atol=TOLERANCE, rtol=0)


def test_agreement_and_perplexity_on_real_text(quick, model, full, record):
    """Argmax agreement with float32, and perplexity, of every form of the weights on the same
    text."""
    size, pieces = (256, 8) if full else (64, 1)
    text = "\n".join(shakespeare()[1])[:20_000]
    ids = torch.tensor(model.encode(text)[: size * pieces]).view(pieces, size)
    forms = {"float32": model, "q4": quick, "bfloat16": SmolLM2(torch.bfloat16)}
    forms |= {f"{form}, in loops": SmolLM2(weights=form) for form in ("float32", "bfloat16")}
    best = model(ids, last_only=False).logits.argmax(-1)
    found = {}
    for name, form in forms.items():
        logits = form(ids, last_only=False).logits
        nats = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
        agreement = (logits.argmax(-1) == best).float().mean().item()
        found[name] = {"agreement": agreement, "perplexity": (-nats).exp().item()}
    record("four_bits: forms on real text", found | {"positions": best.numel()})
    assert found["q4"]["agreement"] >= found["bfloat16"]["agreement"] - 0.01
    assert found["bfloat16, in loops"]["agreement"] >= found["bfloat16"]["agreement"] - 0.01
    assert min(found[form]["agreement"] for form in ("q4", "float32, in loops")) > 0.998
    assert found["q4"]["perplexity"] == pytest.approx(found["float32"]["perplexity"], rel=1e-4)


# ---------------------------------------------------------------- threads and processes


def test_two_streams_at_once(quick, threads):
    threads(2)
    want = {p: generate(quick, p, max_new_tokens=12).ids.tolist() for p in PROMPTS[:3]}
    found = {}

    def run(p):
        found[p] = generate(quick, p, max_new_tokens=12).ids.tolist()

    running = [threading.Thread(target=run, args=(p,)) for p in want]
    for t in running:
        t.start()
    for t in running:
        t.join(120)
    assert found == want


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, torch
torch.set_num_threads(2)
from decoding_book.smollm import SmolLM2
model = SmolLM2(weights="q4")
def step(): return model(torch.tensor([[5]]), cache=model.new_cache(1, 1)).logits.argmax().item()
before = step()
child = os.fork()
if child == 0: os._exit(0 if step() == before else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "0\n", done.stderr


# ---------------------------------------------------------------- what is refused


def test_what_is_refused(quick, monkeypatch):
    with pytest.raises(ValueError, match=r"weights: 'q3', expected one of \['q4', 'float32'"):
        SmolLM2(weights="q3")
    with pytest.raises(ValueError, match="device: cuda, but weights='q4' runs on the CPU only"):
        SmolLM2(weights="q4", device="cuda")
    monkeypatch.setattr(four_bits, "MISSING", "it needs numba")
    with pytest.raises(ImportError, match="weights: 'q4' cannot be had, it needs numba"):
        four_bits.packed(quick.config, {}, "q4")


def test_weights_by_the_name_of_a_type(monkeypatch):
    "In loops where there are loops: on the CPU, with numba. Otherwise plain."
    for name in ("float32", "bfloat16"):
        assert SmolLM2(weights=name).form == form_of(name, None, "cpu") == name
        assert form_of(name, None, "cuda") is getattr(torch, name)
    assert SmolLM2(weights="float16").form is torch.float16
    monkeypatch.setitem(sys.modules, "numba", None)
    assert form_of("float32", None, "cpu") is torch.float32


def test_a_file_stored_otherwise_is_refused_by_tensor():
    tensors = {"a.weight": (torch.zeros(34, dtype=torch.uint8), 8, (1, 32))}
    with pytest.raises(ValueError, match=r"reads a as \['Q4_1', 'Q4_0'\], .* it is Q8_0"):
        four_bits.four_bits(tensors, ["a"])


def test_one_piece_of_work_at_a_time(threads):
    "Else the parts of one could wait for a thread that waits for the parts of another."
    threads(2)
    busy, most = [], []

    def work(part, parts):
        busy.append(part)
        most.append(len(busy))
        threading.Event().wait(0.02)
        busy.remove(part)

    pieces = [threading.Thread(target=four_bits.run_parts, args=(work,)) for _ in range(3)]
    for t in pieces:
        t.start()
    for t in pieces:
        t.join()
    assert max(most) == 2 and len(most) == 6


def test_an_interrupted_step_leaves_no_thread_waiting(quick, monkeypatch, threads):
    threads(2)
    ids = torch.tensor([[5]])
    want = quick(ids, cache=quick.new_cache(1, 1)).logits
    here, left = threading.Event(), threading.Event()

    def interrupted(*args):
        team = args[-1]
        if team.part == 0:
            here.wait(20)
            raise KeyboardInterrupt
        here.set()
        four_bits.meet(team.counter, 2)
        left.set()

    with monkeypatch.context() as m:
        m.setattr(four_bits, "run_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick(ids, cache=quick.new_cache(1, 1))
    assert left.wait(20)
    assert quick(ids, cache=quick.new_cache(1, 1)).logits.equal(want)


@pytest.mark.parametrize("form", ["quick", "model"])
def test_a_kept_prompt_gives_the_logits_to_rounding_and_the_tokens(form, request, full):
    mine = request.getfixturevalue(form)
    ids = mine.encode("You are a clerk in a small museum. Be kind. " * 50)[: 500 if full else 60]
    kept = PromptCache(mine, ids)
    questions = [ids + mine.encode(text) for text in (" The oldest thing here is", " We")]
    for prompt in questions:
        (whole,), _ = as_prompts(mine, prompt)
        cache, held = first_cache(mine, [whole], 1, len(whole), kept)
        assert held == len(ids)
        got = mine(whole[None, held:], cache=cache).logits
        torch.testing.assert_close(got, mine(whole[None]).logits, atol=2e-3, rtol=0)
    want = generate(mine, questions, max_new_tokens=8, ignore_eos=True)
    got = generate(mine, questions, max_new_tokens=8, ignore_eos=True, cache=kept)
    assert [a.tolist() for a in got.ids] == [a.tolist() for a in want.ids]


def test_a_kept_prompt_of_500_tokens_brings_the_first_token_five_times_sooner(full, record):
    for form in ("q4", "float32") if full else ("q4",):
        found = measure(form, 500, 3 if full else 1)
        assert found["prefix"] == found["held"] == 500
        assert found["times shorter"] >= 5, found
        assert found["16 tokens equal"] and found["largest logit difference"] < 2e-3
        assert found["largest log-probability difference"] < 2e-3
        record(f"a kept prompt of 500 tokens, {form}: times sooner", found["times shorter"])
