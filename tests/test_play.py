"""The model that runs in the page `play`, in a browser that reaches this machine only: its greedy
tokens against the package's four-bit form, its drawn tokens against Python's `draw`."""

import base64
import os
import threading
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from engine import VERSION, engine, link
from pages import LIVE, for_everyone
from serve import server

from decoding_book.beam import beam_search
from decoding_book.loop import Prediction
from decoding_book.noise import Key
from decoding_book.sampler import Sampler, draw, penalize

MARGIN = 0.7  # nats that a log-probability of the engine, whose layers get 8 bits, may be off
TEXTS = [
    "Once upon a time", "def add(a, b):\n    return", "naïve café, 日本語 🙂 x", "1234 56,7",
    "  two  spaces\n\n\ttab", "<|im_start|>user\nHi<|im_end|>\n", "it's I'LL don’t ½ ²", "a\r\nb ",
]  # fmt: skip
POINTS = """() => {
  const text = (row) => {
    const bytes = new Uint8Array(row.buffer);
    let out = '';
    for (let i = 0; i < bytes.length; i += 32768)
      out += String.fromCharCode(...bytes.subarray(i, i + 32768));
    return btoa(out);
  };
  return document.querySelector('.kb-live').board.points.map(
    ({ids, given, took, logits}) => ({ids, given, took, logits: text(logits)})); }"""
IDS = "() => document.querySelector('.kb-live').board.row.ids"
IDLE = """() => {
  const place = document.querySelector('.kb-live');
  return place.board.engine && place.board.row && !('busy' in place.dataset); }"""


@pytest.fixture(scope="module")
def address(site):
    with server(site) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture(scope="module")
def visit(browser, address):
    "A function that opens the page; at the end nothing may have gone wrong in it."
    wrong, contexts = [], []

    def opened(hash="", context=None, prepare=None, **options):
        context = context or browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.loaded = []
        page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("requestfinished", lambda r: page.loaded.append(r))
        if prepare:
            prepare(page)
        page.goto(f"{address}/play.html{hash and '#'}{hash}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def live(visit, site):
    "The page with its model loaded."
    if '"engine": null' in (site / "play/engine.js").read_text(encoding="utf-8"):
        pytest.skip("this site was built without the engine (npm or the network was not there)")
    page = visit()
    page.get_by_role("button", name="Load the model (98 MB)").click()
    page.wait_for_function(IDLE, timeout=240_000)
    return page


def go(page, hash):
    "Begin anew with a prompt and settings."
    page.evaluate("document.querySelector('.kb-live').board.text = null")
    page.evaluate("hash => document.querySelector('.kb-live').board.take(hash)", hash)
    page.wait_for_function(IDLE, timeout=120_000)


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()
    page.wait_for_function(IDLE, timeout=240_000)


def points(page):
    "The rows of each step: ids so far, the token taken, the row, float32 (V,)."
    found = page.evaluate(POINTS)
    for point in found:
        row = np.frombuffer(base64.b64decode(point["logits"]), np.float32)
        point["logits"] = torch.tensor(row)[None]
    return found


def new(page):
    found = page.evaluate("""() => { const {row} = document.querySelector('.kb-live').board;
      return row.ids.slice(row.given); }""")
    return found


def test_its_ids_are_the_package_s(live, model):
    for text in TEXTS:
        ids = live.evaluate("t => document.querySelector('.kb-live').board.engine.encode(t)", text)
        assert ids == model.encode(text), text


def test_greedy_tokens_are_those_of_the_four_bits_up_to_a_margin(live, record):
    from decoding_book.smollm import SmolLM2

    go(live, "prompt=Once%20upon%20a%20time&temperature=0")
    press(live, "Run 32")
    found = points(live)
    ids, given = found[-1]["ids"], found[0]["given"]
    assert len(ids) == given + 32
    ours = SmolLM2(weights="q4")(torch.tensor([ids[:-1]]), last_only=False).logits[0, given - 1 :]
    ours = ours.float().log_softmax(-1)
    theirs = torch.cat([point["logits"] for point in found[:-1]])
    taken = torch.tensor(ids[given:])
    assert (theirs.argmax(-1) == taken).all()
    behind = ours.amax(-1) - ours.gather(-1, taken[:, None])[:, 0]
    lead = ours.topk(50).indices
    off = (ours - theirs).gather(-1, lead).abs().max().item()
    equal = (ours.argmax(-1) == taken).sum().item()
    seconds = float(live.locator(".kb-live").get_attribute("data-seconds"))
    record(
        "live_page",
        {
            "equal of 32": equal,
            "furthest behind, nats": behind.max().item(),
            "50 leading, nats": off,
            "tokens a second": round(32 / seconds, 1),
        },
    )
    assert behind.max() <= MARGIN and off <= MARGIN and equal >= 30
    said = live.locator(".kb-said[role=status]").last.inner_text()
    assert "32 tokens in " in said and " a second" in said


@pytest.mark.parametrize(
    "hash, knobs, system, seed",
    [
        ("temperature=0.7&top_p=0.9&seed=3", dict(temperature=0.7, top_p=0.9), "book", 3),
        ("dialect=llama.cpp&temperature=1.5&min_p=0.05&repetition_penalty=1.2&seed=11",
         dict(temperature=1.5, min_p=0.05, repetition_penalty=1.2), "llama.cpp", 11),
    ],
)  # fmt: skip
def test_drawn_tokens_are_python_s_for_the_same_rows_and_keys(live, hash, knobs, system, seed):
    go(live, f"prompt=It%20was%20a%20quiet%20morning&{hash}")
    press(live, "Run 32")
    found, sampler = points(live), Sampler.dialect(system, **knobs)
    assert len(found) == 33 or live.evaluate("ids => ids.at(-1)", found[-1]["ids"]) == 2
    for point in found[:-1]:
        ids = torch.tensor([point["ids"]])
        z = penalize(point["logits"], sampler, ids, None, point["given"])
        assert draw(z, sampler, Key(seed, 0, ids.shape[1]), "plain").ids.item() == point["took"]


def test_back_another_token_and_on_and_the_same_key_gives_the_same_text(live):
    hash = "prompt=My%20name%20is&temperature=0.8&top_p=0.95&seed=5"
    go(live, hash)
    press(live, "Run 32")
    first, rows = new(live), points(live)
    live.locator(".kb-pieces [data-at='4']").click()
    live.wait_for_function(IDLE)
    assert new(live) == first[:4]
    other = live.locator(".kb-bars tbody tr:not(.kb-drawn) .kb-take").first
    token = int(live.locator(".kb-bars tbody tr:not(.kb-drawn)").first.get_attribute("data-token"))
    other.click()
    live.wait_for_function(IDLE)
    assert new(live) == [*first[:4], token] and token != first[4]
    assert live.locator(".kb-pieces .kb-hand").count() == 1
    press(live, "Step")
    assert len(new(live)) == 6
    press(live, "Back")
    press(live, "Back")
    assert new(live) == first[:4]
    press(live, "Run 32")
    assert new(live)[: len(first)] == first
    again = points(live)  # to the last bit, though another branch was read between
    assert all(torch.equal(a["logits"], b["logits"]) for a, b in zip(again, rows))
    go(live, hash)
    press(live, "Run 32")
    assert new(live) == first


class Recorded:
    "A model that knows the rows of a page's search: {new ids: log-probabilities}."

    def __init__(self, rows, given):
        self.rows, self.given = rows, given
        self.vocab_size, self.eos = len(next(iter(rows.values()))), 2

    def __call__(self, ids, mask=None, cache=None, last_only=True, attention=False):
        rows = [self.rows[tuple(row)] for row in ids[:, self.given :].tolist()]
        return Prediction(torch.stack(rows))


ROW = """ids => { const { engine, row } = document.querySelector('.kb-live').board;
  return engine.row(ids, row.given).then(row => btoa(
    Array.from(new Uint8Array(row.buffer), c => String.fromCharCode(c)).join(''))); }"""


@pytest.mark.parametrize("width", [1, 3])
def test_a_beam_from_here_is_the_package_s_on_the_same_rows(live, width):
    go(live, "prompt=The%20capital%20of%20France%20is&temperature=0")
    live.get_by_label("of width").select_option(str(width))
    press(live, "Beam search")
    found = live.evaluate("document.querySelector('.kb-live').board.searched")
    given, rows = found["ids"], {}
    before = [()]
    for step in found["steps"]:
        for new in before:
            row = base64.b64decode(live.evaluate(ROW, [*given, *new]))
            rows[new] = torch.tensor(np.frombuffer(row, np.float32))
        before = [tuple(path["ids"]) for path in step["kept"] if not path["ended"]]
    steps = beam_search(Recorded(rows, len(given)), torch.tensor(given), width, 8).steps
    assert len(steps) == len(found["steps"]) == found["limit"] == 8
    for ours, theirs in zip(steps, found["steps"]):
        for one, other in zip(ours, (theirs["kept"], theirs["cut"])):
            assert [path.ids for path in one] == [tuple(path["ids"]) for path in other]
            sums = [path["total"] for path in other]
            # the engine's probabilities do not quite sum to one
            assert sums == pytest.approx([path.total for path in one], abs=1e-2)


def test_a_beam_is_stepped_through_by_keyboard(live):
    section = live.get_by_role("region", name="Beam search")
    section.locator(".dw").focus()
    for key, at in (("ArrowRight", "1"), ("ArrowRight", "2"), ("ArrowLeft", "1"), ("End", "15")):
        live.keyboard.press(key)
        assert section.locator(".dw").get_attribute("data-at") == at
    assert "The search is over: " in section.locator(".dw-now").inner_text()
    assert live.evaluate(IDS)[-1] != 2 and len(new(live)) == 0  # the text itself stays


SAID = ".kb-said[role=status]"


def test_without_a_prompt_nothing_runs(live):
    go(live, "prompt=My%20name%20is")
    live.get_by_label("Prompt").fill("")
    for name in ("Step", "Run 32", "Beam search"):
        press(live, name)
        assert new(live) == [] and "Type a prompt first." in live.locator(SAID).last.inner_text()
    assert live.locator("section[aria-label='Beam search']").is_hidden()


BREAK = """() => {
  const { core } = document.querySelector('.kb-live').board.engine, { decode } = core;
  let n = 3;
  core.decode = (...given) => {
    if (n--) return decode.apply(core, given);
    core.decode = decode;
    throw new Error('it broke');
  }; }"""


def test_what_breaks_in_a_run_is_said_and_stays_said(live):
    go(live, "prompt=My%20name%20is&temperature=0")
    live.evaluate(BREAK)
    press(live, "Run 32")
    live.wait_for_timeout(400)  # a sentence that was to come would be here now
    assert live.locator(SAID).last.inner_text() == "That failed: it broke."
    assert len(new(live)) == 3


def test_an_address_that_comes_in_a_run_begins_its_text(live):
    go(live, "prompt=My%20name%20is&temperature=0")
    live.get_by_role("button", name="Run 32", exact=True).click()
    live.evaluate("location.hash = 'prompt=One,%20two&temperature=0.3'")
    live.wait_for_function("document.querySelector('.kb-live').board.text === 'One, two'")
    live.wait_for_function(IDLE)
    assert new(live) == [] and live.get_by_label("Prompt").input_value() == "One, two"
    assert live.get_by_label("Temperature, a number").input_value() == "0.3"


def test_by_keyboard_alone(live):
    go(live, "prompt=The%20capital%20of&temperature=0")
    live.get_by_label("Prompt").focus()
    live.keyboard.press("Control+a")
    live.keyboard.type("The capital of France is")
    live.keyboard.press("Control+Enter")
    live.wait_for_function("document.querySelector('.kb-live').board.text?.endsWith(' is')")
    live.wait_for_function(IDLE)
    reached = []
    for wanted in ("Begin", "Step"):
        while not reached or reached[-1] != wanted:
            live.keyboard.press("Tab")
            reached.append(live.evaluate("document.activeElement.textContent"))
            assert len(reached) < 20, reached
    live.keyboard.press("Enter")
    live.wait_for_function("document.querySelector('.kb-live').board.points.length === 2")
    live.wait_for_function(IDLE)
    assert live.evaluate("document.activeElement.textContent") == "Step"
    text = live.locator(".kb-pieces").inner_text()
    assert text == "The capital of France is Paris?"
    live.locator(".kb-said").filter(has_text="Next: “").wait_for()  # said after a pause
    live.locator(".kb-take").nth(1).focus()
    live.keyboard.press("Enter")
    live.wait_for_function("document.querySelector('.kb-live').board.points.length === 3")
    live.wait_for_function(IDLE)
    assert live.evaluate("document.activeElement.className") == "kb-take"
    assert live.url.endswith("#prompt=The%20capital%20of%20France%20is&temperature=0")


def test_it_fits_a_phone(live):
    press(live, "Beam search")
    live.set_viewport_size({"width": 390, "height": 844})
    assert live.evaluate("document.documentElement.scrollWidth") <= 390
    small = live.evaluate(
        "[...document.querySelectorAll('.kb-live :is(button, select, input, textarea)')]"
        ".filter(e => e.offsetHeight && e.offsetHeight < (e.matches('.kb-take') ? 24 : 36))"
        ".map(e => e.id || e.textContent)"
    )
    live.set_viewport_size({"width": 1280, "height": 900})
    assert small == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(live, scheme):
    go(live, "prompt=My%20name%20is&temperature=1.5&top_k=1000")  # tokens of many bits
    press(live, "Run 32")
    press(live, "Beam search")
    live.emulate_media(color_scheme=scheme)
    dark = "document.querySelector('.quarto-dark') !== null"
    live.wait_for_function(f"({dark}) === {'true' if scheme == 'dark' else 'false'}")
    package = pytest.importorskip("axe_playwright_python")
    live.evaluate((Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = live.evaluate("""async () => (await axe.run('.kb-live', {preload: false})).violations
      .flatMap(v => v.nodes.map(n => `${v.impact} ${v.id}: ${n.target}`))""")
    assert [line for line in found if not line.startswith(("minor", "moderate"))] == []


def test_the_browser_keeps_the_model_until_it_is_told_to_forget_it(live, visit):
    page = visit(context=live.context)
    page.get_by_role("button", name="Start the model").wait_for()
    page.get_by_role("button", name="Forget it").click()
    page.get_by_role("button", name="Load the model (98 MB)").wait_for()
    assert not [r.url for r in page.loaded if r.url.partition("?")[0].endswith(".gguf")]
    page.close()


def test_before_the_button_the_page_is_light(visit):
    page = visit()
    page.locator(".kb-live[data-ready], .kb-live .kb-load > *").first.wait_for()
    page.wait_for_load_state("networkidle")
    weight = sum(r.sizes()["responseBodySize"] for r in page.loaded)
    names = [urlsplit(r.url).path for r in page.loaded]
    assert weight < 1_000_000, (weight, names)
    assert not [name for name in names if name.endswith((".wasm", ".gguf", "wllama.js"))]
    page.close()


def test_opened_from_a_file_it_says_what_to_type(browser, site):
    page = browser.new_page()
    page.goto((site / "play.html").as_uri())
    said = page.locator(".kb-load").inner_text()
    if '"engine": null' not in (site / "play/engine.js").read_text(encoding="utf-8"):
        assert "make serve" in said
    assert page.get_by_role("link", name="The knob board", exact=True).last.is_visible()
    page.close()


def test_without_the_engine_it_says_so_and_offers_the_board(visit):
    none = "(globalThis.knobBoard ??= {}).engine = null;"
    page = visit(prepare=lambda page: page.route(
        "**/engine.js", lambda route: route.fulfill(body=none, content_type="text/javascript")
    ))  # fmt: skip
    said = page.locator(".kb-load")
    said.filter(has_text="built without the engine").wait_for()
    link = said.get_by_role("link", name="The knob board")
    assert urlsplit(link.evaluate("a => a.href")).path == "/board.html"
    page.close()


# ---- what needs no browser


def npm(folder, script, monkeypatch):
    "A pretended npm, alone on the PATH with the shell's own commands."
    path = folder / "npm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin")


@pytest.mark.parametrize(
    "script, why",
    [
        (None, "npm is not installed"),
        ("exit 1", f"npm could not fetch @wllama/wllama {VERSION}"),
        ('echo x > "$5/w.tgz"', "is not the archive that this book was made with"),
    ],
)
def test_without_the_package_itself_there_is_no_engine_and_one_line(
    script, why, tmp_path, monkeypatch, capsys
):
    if script:
        npm(tmp_path, script, monkeypatch)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    assert engine(tmp_path / "cache") is None
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1 and not list((tmp_path / "cache").iterdir())


def test_an_engine_that_was_fetched_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / VERSION).mkdir()
    assert engine(tmp_path) == tmp_path / VERSION


def test_a_file_that_cannot_be_linked_is_copied(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("weights")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")

    def refuse(*args):
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    link(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "weights"


@pytest.mark.parametrize("several", [True, False])
def test_the_server_names_types_and_allows_threads_if_asked(several, tmp_path):
    (tmp_path / "a.wasm").write_bytes(b"x")
    with server(tmp_path, threads=several) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        asked = HTTPConnection("127.0.0.1", http.server_port)
        asked.request("GET", "/a.wasm")
        answer = asked.getresponse()
        assert answer.headers["Content-Type"] == "application/wasm" and answer.read() == b"x"
        apart = answer.headers["Cross-Origin-Embedder-Policy"]
        assert apart == ("require-corp" if several else None)
        http.shutdown()


def test_a_page_with_a_place_gets_the_scripts_of_board_and_play():
    page = for_everyone(f"<title>x</title><div {LIVE}></div>", "../")
    scripts = ["board/draw.js", "board/board.js", "play/engine.js", "play/play.js"]
    assert all(page.count(f"../{script}") == 1 for script in scripts)
    assert "play/" not in for_everyone("<title>x</title>", "")


def test_words_that_could_not_be_read_are_asked_for_again(browser, address):
    page, lost = browser.new_page(), []
    page.route(
        "**/board/words.js", lambda route: route.continue_() if lost else lost.append(route.abort())
    )
    page.goto(f"{address}/board.html")
    page.locator(".knob-board[data-ready]").wait_for()
    page.get_by_role("button", name="Draw one").click()
    page.locator(".kb-said", has_text="words.js could not be read").wait_for()
    page.get_by_role("button", name="Draw one").click()
    page.locator(".kb-said", has_text="Drawn: ").wait_for()
    page.close()
