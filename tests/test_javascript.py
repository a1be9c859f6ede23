"""The draw in JavaScript: the token and the size of the kept set on every row, as in Python."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.numpy_draw import FLOATS, KINDS, LONG, SIZES, TYPES, a_case
from helpers.stable_sort import stable_argsort

from decoding_book.beam import beam_search
from decoding_book.entropy import measures
from decoding_book.noise import Key
from decoding_book.sampler import (
    DIALECTS,
    ORDER,
    Sampler,
    draw,
    penalize,
    stages,
    truncate,
)
from decoding_book.toy import TableModel
from decoding_book.trees import beam_panels

ROOT = Path(__file__).resolve().parent.parent
VECTORS = np.load(ROOT / "tests/oracle/draw.npz", allow_pickle=False)
KEY = ("seed", "row", "position", "draw")
NODE = shutil.which("node")
SCRIPT = """
function run(cases, numbers) {
  const out = [];
  let start = 0;
  for (const { size, single, settings, key } of cases) {
    let z = numbers.subarray(start, start += size);
    if (single) z = Float32Array.from(z);
    const drawn = decodingBook.draw(z, settings, { ...key, seed: BigInt(key.seed) });
    out.push([drawn.token, drawn.kept, drawn.logprob]);
  }
  return out;
}
"""
IN_NODE = """
const fs = require("fs");
require(process.argv[1]);
const numbers = new Float64Array(new Uint8Array(fs.readFileSync(process.argv[2] + ".bin")).buffer);
console.log(JSON.stringify(run(JSON.parse(fs.readFileSync(process.argv[2] + ".json")), numbers)));
"""


def in_node(cases, numbers, folder):
    "Results of all cases, by one Node."
    (folder / "rows.bin").write_bytes(numbers.tobytes())
    (folder / "rows.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [NODE, "-e", SCRIPT + IN_NODE, ROOT / "tools/draw.js", folder / "rows"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def case(row, dtype, params, key):
    "What JavaScript is told of one draw."
    names = dict(zip(ORDER, ("temperature", "topK", "topP", "minP")))
    return {
        "size": len(row), "single": dtype != "float64",
        "settings": {names[n]: params[n] for n in ORDER},
        "key": {n: str(int(key[n])) if n == "seed" else int(key[n]) for n in KEY},
    }  # fmt: skip


def recorded(every=1):
    "Recorded draws as JavaScript is told of them, their rows, and what was drawn."
    rows = np.split(VECTORS["logits"], VECTORS["size"].cumsum()[:-1])
    tried = range(0, len(rows), every)
    cases = [
        case(rows[i], FLOATS[VECTORS["type"][i]], {n: VECTORS[n][i].item() for n in ORDER},
             {n: VECTORS[n][i] for n in KEY})
        for i in tried
    ]  # fmt: skip
    drawn = [[VECTORS[n][i] for n in ("token", "kept", "logprob")] for i in tried]
    return cases, np.concatenate([rows[i] for i in tried]), drawn


def same(found, drawn, cases):
    "The same tokens and sizes, and log-probabilities up to rounding."
    for (token, kept, logprob), true, what in zip(found, drawn, cases, strict=True):
        assert [token, kept] == true[:2], what
        assert logprob == pytest.approx(true[2], abs=1e-6, rel=1e-6)


@pytest.mark.skipif(NODE is None, reason="no Node on the PATH")
def test_recorded_draws_are_drawn_again(tmp_path):
    cases, numbers, drawn = recorded()
    same(in_node(cases, numbers, tmp_path), drawn, cases)


def test_recorded_draws_in_a_browser(browser, full):
    "Every eighth: all take minutes."
    cases, numbers, drawn = recorded(1 if full else 8)
    page = browser.new_page()
    page.add_script_tag(path=ROOT / "tools/draw.js")
    words = [None if np.isinf(x) else x for x in numbers.tolist()]  # JSON knows no infinity
    code = f"([cases, numbers]) => {{ {SCRIPT} return run(cases, Float64Array.from(" \
           "numbers, (x) => x === null ? -Infinity : x)); }"  # fmt: skip
    same(page.evaluate(code, [cases, words]), drawn, cases)
    page.close()


@pytest.mark.skipif(NODE is None, reason="no Node on the PATH")
@pytest.mark.parametrize("kind", KINDS)
def test_same_token_as_the_plain_chain(kind, tmp_path, full, record):
    "Against the plain chain, on rows of all kinds; some of them long."
    rng, B, total = np.random.default_rng(KINDS.index(kind)), 40, 0
    for turn in range(36 if full else 1):
        cases, numbers, truth = [], [], []
        long = [int(rng.choice(LONG))] if turn % 4 == 0 else []
        for V in (*SIZES, *long):
            dtype = TYPES[turn % len(TYPES)]
            made = [a_case(rng, V, kind, dtype) for _ in range(2 if V > 300 else B)]
            z = torch.stack([torch.tensor(row).to(getattr(torch, dtype)) for row, _, _ in made])
            params = Sampler(**{n: [p[n] for _, p, _ in made] for n in ORDER})
            out = draw(z, params, Key(**{n: [k[n] for _, _, k in made] for n in KEY}), "plain")
            truth += zip(out.ids.tolist(), out.kept.tolist(), out.logprob.tolist())
            cases += [case(row, dtype, p, k) for row, p, k in made]
            numbers += [row.astype(np.float64) for row, _, _ in made]
        found = in_node(cases, np.concatenate(numbers), tmp_path)
        for one, true, what in zip(found, truth, cases):
            assert tuple(one[:2]) == true[:2], what
            assert one[2] == pytest.approx(true[2], abs=1e-4, rel=1e-5)
        total += len(found)
    record(f"javascript_same_token_{kind}", {"rows": total, "left out": 0})


@pytest.mark.skipif(NODE is None, reason="no Node on the PATH")
def test_functions_bit_for_bit():
    "The logarithm, the exponential and the noise, on the recorded numbers."
    code = f"""
const book = require({json.dumps(str(ROOT / "tools/draw.js"))});
const given = JSON.parse(require("fs").readFileSync(0));
console.log(JSON.stringify({{ log: given.log.map(book.log), exp: given.exp.map(book.exp),
                              noise: given.noise.map(book.noise) }}));"""
    given = {"log": VECTORS["log_x"].tolist(), "exp": VECTORS["exp_x"].tolist(),
             "noise": VECTORS["noise_bits"].tolist()}  # fmt: skip
    done = subprocess.run(
        [NODE, "-e", code], input=json.dumps(given), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    for name, truth in ("log", "log_y"), ("exp", "exp_y"), ("noise", "noise"):
        assert out[name] == VECTORS[truth].astype(float).tolist(), name


@pytest.mark.skipif(NODE is None, reason="no Node on the PATH")
def test_a_bad_option_is_refused_by_its_name():
    "By the name of what is wrong; and an ES module may import the file."
    wrong = {
        "[0, NaN], {}": "logits: NaN",
        "[-Infinity], {}": "logits: no finite logit",
        "[], {}": "logits: no finite logit",
        "[0], { topP: 0 }": "topP: 0",
        "[0], { topK: 1.5 }": "topK: 1.5",
        "[0], { temperature: -1 }": "temperature: -1",
        "[0], { minP: 2 }": "minP: 2",
        "[0], { ties: 'low' }": "ties: low",
        "[0], { order: ['top_k'] }": "order: top_k",
        "[0], decodingBook.dialect('tgi')": "dialect: tgi",
        "decodingBook.penalize([9e307], [0], 1, { repetitionPenalty: .1 })": "repetitionPenalty: "
        "0.1",
    }
    code = f"import {json.dumps(str(ROOT / 'tools/draw.js'))};\n" + "".join(
        f"try {{ decodingBook.draw({call}) }} catch (error) {{ console.log(error.message) }}\n"
        for call in wrong
    )
    done = subprocess.run([NODE, "--input-type=module", "-e", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == list(wrong.values()), done.stderr


OTHERS = """
const book = require(process.argv[1]);
const asked = JSON.parse(require("fs").readFileSync(0));
const out = asked.map(({ row, ids, given, system, own, key }) => {
  const settings = book.dialect(system, own), z = book.penalize(
    Float32Array.from(row, (x) => x ?? -Infinity), ids, given, settings);
  const kept = book.filter(z, settings), { entropy, varentropy } = book.measures(kept);
  return { z: Array.from(z, (x) => Number.isFinite(x) ? x : null), kept: kept.ids, entropy,
           varentropy, stages: kept.stages, token: book.draw(z, settings, key).token };
});
console.log(JSON.stringify({ out, dialects: book.DIALECTS }));
"""
JS_NAMES = {
    "temperature": "temperature", "top_k": "topK", "top_p": "topP", "min_p": "minP",
    "repetition_penalty": "repetitionPenalty", "count_prompt": "countPrompt",
    "penalty_window": "penaltyWindow",
}  # fmt: skip


def a_request(rng):
    "A short row with many equals, a text, a dialect, knobs."
    V = int(rng.choice([3, 17, 60, 900]))
    row = rng.integers(-8, 9, V) / 2
    row = np.where(rng.random(V) < 0.1, -np.inf, row)
    row[rng.integers(V)] = 3.5
    knobs = {
        "temperature": float(rng.choice([0, 0.3, 1, 1, 1.7])),
        "top_k": int(rng.choice([0, 0, 1, 5, V])),
        "top_p": float(rng.choice([0.01, 0.5, 0.9, 1, 1])),
        "min_p": float(rng.choice([0, 0, 0.05, 0.4, 1])),
        "repetition_penalty": float(rng.choice([1, 0.7, 1.3])),
    }
    ids = rng.integers(V, size=rng.integers(1, 90)).tolist()
    key = {n: int(rng.integers(2**32)) for n in KEY}
    return row, ids, int(rng.integers(len(ids) + 1)), str(rng.choice(list(DIALECTS))), knobs, key


@pytest.mark.skipif(NODE is None, reason="no Node on the PATH")
def test_dialects_and_penalties(full, record, monkeypatch):
    "What each system's rules keep of rows with many equals, the penalty before, the draw after."
    monkeypatch.setattr(torch.Tensor, "argsort", stable_argsort)
    rng = np.random.default_rng(18)
    requests = [a_request(rng) for _ in range(6000 if full else 400)]
    given = [
        {"row": [x if np.isfinite(x) else None for x in row.tolist()], "ids": ids, "given": n,
         "system": system, "own": {JS_NAMES[k]: v for k, v in knobs.items()}, "key": key}
        for row, ids, n, system, knobs, key in requests
    ]  # fmt: skip
    done = subprocess.run(
        [NODE, "-e", OTHERS, ROOT / "tools/draw.js"],
        input=json.dumps(given), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    known = {  # of the filters, JavaScript has the four
        s: d | {"order": [n for n in d["order"] if n in ORDER]} if "order" in d else d
        for s, d in DIALECTS.items()
    }
    named = {s: {JS_NAMES.get(k, k): v for k, v in d.items()} for s, d in known.items()}
    assert found["dialects"] == json.loads(json.dumps(named))
    for (row, ids, n, system, knobs, key), js in zip(requests, found["out"]):
        what = (row, system, knobs)
        sampler = Sampler.dialect(system, **knobs)
        z = penalize(torch.tensor(row).float()[None], sampler, torch.tensor([ids]), None, n)
        assert js["z"] == [x if np.isfinite(x) else None for x in z[0].tolist()], what
        cut = truncate(z, sampler)
        assert sorted(js["kept"]) == cut[0].isfinite().nonzero()[:, 0].tolist(), what
        left = [[name, after.isfinite().sum().item()] for name, after in stages(z, sampler)]
        heat = "temperature"
        assert [s for s in js["stages"] if s[0] != heat] == [s for s in left if s[0] != heat], what
        assert js["token"] == draw(z, sampler, Key(**key), "plain").ids.item(), what
        H, V = measures(cut.double())
        assert (js["entropy"], js["varentropy"]) == pytest.approx((H.item(), V.item()), abs=1e-6)
    record("javascript_dialects", {"rows": len(requests), "left out": 0})


# ---- beam search on the page `play`

BEAM = """
const fs = require("fs"), vm = require("vm");
const make = (tag, attributes = {}, ...inside) => ({ tag, attributes, inside });
const text = (node) => node.inside?.map(text).join("") ?? String(node);
const found = (node, fits) => !node.inside ? []
  : [...fits(node) ? [node] : [], ...node.inside.flatMap((part) => found(part, fits))];
globalThis.knobBoard = { stepper: { style: "", script: "" }, tools: { make,
  percent: (p) => `${(100 * p).toFixed(p >= 0.01 ? 1 : 3)} %` } };
vm.runInThisContext(fs.readFileSync(process.argv[1], "utf8"));
const { search, stepper } = knobBoard.beam;
const { table, words, prompt, width, end } = JSON.parse(process.argv[2]);
const textOf = (ids) => ids.map((id) => words[id]).join(" ");
search(async (ids) => table[[prompt, ...ids].at(-1)], (id) => id === end, width, 5)
  .then((steps) => console.log(JSON.stringify(
    found(stepper(steps, textOf([prompt]), textOf), (n) => n.attributes.class === "dw-f")
      .map((frame) => [
        found(frame, (n) => n.tag === "b" || n.tag === "em").map(text),
        found(frame, (n) => n.tag === "p" && n.attributes["data-p"]).map(text)]))));
"""


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("odd", ["", "\u202e\u200b"])
def test_the_page_s_beam_says_what_the_package_s_stepper_says(width, odd):
    "Texts that end among them, and signs that cannot be seen."
    words = ["cold", "coffee", "I", f"like{odd}", "water", "stop"]
    numbers = torch.Generator().manual_seed(width)
    rows = (3 * torch.randn(6, 6, generator=numbers, dtype=torch.float64)).softmax(-1)
    world = TableModel([1 / 6] * 6, rows.tolist(), words, eos="stop")
    result = beam_search(world, "coffee", width, 5)
    given = {"table": rows.log().tolist(), "words": words, "prompt": 1, "width": width, "end": 5}
    command = [NODE, "-e", BEAM, ROOT / "tools/beam.js", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    panels = beam_panels(result, tuple(result[0].ids.tolist()))
    said = [[[x for line in p.lines for x in (line.name, line.fate)], p.said] for p in panels]
    assert json.loads(done.stdout) == said
