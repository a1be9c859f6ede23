"""The knob board in a browser without a network: what it shows of a row is what Python computes,
and the token that it draws is the token that Python draws."""

import json
import re
from pathlib import Path

import board as tool
import numpy as np
import pytest
import torch
from helpers.project_files import NOTEBOOKS, cells
from helpers.stable_sort import stable_argsort
from pages import PLACE, for_everyone

from decoding_book.entropy import measures
from decoding_book.noise import Key
from decoding_book.sampler import DIALECTS, Sampler, draw, penalize, truncate

KNOBS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
CHAPTERS = {"temperature", "topk", "topp", "penalties", "sampler", "entropy"}  # with a board
READY = """hash => {
  const place = document.querySelector('.knob-board');
  return place.dataset.ready === hash && document.querySelector('.kb-said').textContent !== ''; }"""
SEEN = """() => {
  const { law, drawn } = document.querySelector('.knob-board').board;
  return {drawn, kept: law.kept.ids, after: law.kept.ids.map(law.after), doubt: law.doubt,
          before: law.kept.ids.map(law.before), mass: law.mass, held: law.held,
          said: document.querySelector('.kb-side').innerText}; }"""


@pytest.fixture(scope="module")
def rows(site):
    "The board's rows as Python reads them."
    return tool.read_rows(site / "board")


@pytest.fixture
def visit(browser, site):
    "A function that opens the board as a file; at the end nothing may have gone wrong in it."
    wrong, contexts = [], []

    def opened(settings="", page=None, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        tab = context.new_page()
        tab.asked = []
        tab.on("request", lambda r: tab.asked.append(r.url))
        tab.on("console", lambda m: m.type == "error" and wrong.append(m.text))
        tab.on("pageerror", lambda e: wrong.append(str(e)))
        tab.goto((page or site / "board.html").as_uri() + (settings and f"#{settings}"))
        tab.locator(".knob-board[data-ready]").first.wait_for(timeout=20000)
        wrong.extend(url for url in tab.asked if not url.startswith(("file:", "data:")))
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not wrong, "\n".join(wrong)


def go(tab, settings):
    "Set the address, wait for the board, return what it holds."
    tab.evaluate("hash => { location.hash = hash }", settings)
    tab.wait_for_function(READY, arg=settings)
    return tab.evaluate(SEEN)


def a_setting(rng, name):
    "Settings of any kind: (the address's text, what Python is told)."
    knobs = {
        "temperature": round(float(rng.choice([0, 0.05, 1, 1, rng.uniform(0.2, 2)])), 3),
        "top_k": int(rng.choice([0, 0, 1, 40, 200, 60000, rng.integers(2, 5000)])),
        "top_p": round(float(rng.choice([1, 1, 0.001, 0.9, rng.uniform(0.1, 1)])), 3),
        "min_p": round(float(rng.choice([0, 0, 0.05, rng.uniform(0, 0.3)])), 4),
        "repetition_penalty": round(float(rng.choice([1, 1, 1.2, rng.uniform(0.8, 1.8)])), 2),
    }
    off = dict(zip(KNOBS, (1, 0, 1, 0, 1)))
    system, seed = str(rng.choice(list(DIALECTS))), int(rng.integers(2**64, dtype=np.uint64))
    at = int(rng.integers(1000))
    said = [f"prompt={name}"]
    said += [f"dialect={system}"] if system != "book" else []
    said += [f"seed={seed}"] + [f"{k}={v:g}" for k, v in knobs.items() if v != off[k]]
    return "&".join([*said, f"draw={at}"]), (knobs, system, seed, at)


def in_python(row, knobs, system, seed=0, at=0):
    "(the filtered logits, their probabilities, the token) by the package."
    sampler = Sampler.dialect(system, **knobs)
    ids = torch.tensor([row["ids"]])
    z = penalize(torch.tensor(row["logits"]).float()[None], sampler, ids, None, row["given"])
    token = draw(z, sampler, Key(seed, 0, len(row["ids"]), at), "plain").ids.item()
    cut = truncate(z, sampler)
    law = sampler.distribution(z[0].new_tensor(row["logits"])[None], ids, None, row["given"])
    return cut[0], law[0], token


def test_every_setting_is_python_s(visit, rows, full, record, monkeypatch):
    "Kept set, probabilities, entropy, varentropy and the drawn token, over all rows."
    monkeypatch.setattr(torch.Tensor, "argsort", stable_argsort)
    rng, tab, worst, count = np.random.default_rng(3), visit(), 0, 228 if full else 25
    for n in range(count):
        name = list(rows)[n % len(rows)]
        text, (knobs, system, seed, at) = a_setting(rng, name)
        seen = go(tab, text)
        cut, law, token = in_python(rows[name], knobs, system, seed, at)
        assert sorted(seen["kept"]) == cut.isfinite().nonzero()[:, 0].tolist(), text
        assert seen["drawn"] == token, text
        after = torch.tensor(seen["after"], dtype=torch.float64)
        worst = max(worst, (law[seen["kept"]].double() - after).abs().max().item())
        model = torch.tensor(rows[name]["logits"]).double().softmax(-1)[seen["kept"]]
        assert torch.tensor(seen["before"]).sub(model).abs().max() < 1e-6, text
        assert seen["mass"] == pytest.approx(model.sum().item(), abs=1e-6), text
        warm = {name: knobs[name] for name in ("temperature", "repetition_penalty")}
        _, uncut, _ = in_python(rows[name], warm, system)
        assert seen["held"] == pytest.approx(uncut[seen["kept"]].double().sum().item(), abs=1e-5)
        H, V = (x.item() for x in measures(cut.double()))
        assert seen["doubt"]["entropy"] == pytest.approx(H, abs=1e-6), text
        assert seen["doubt"]["varentropy"] == pytest.approx(V, abs=1e-5), text
        kept = int(re.search(r"([\d ]+) tokens?", seen["said"])[1].replace(" ", ""))
        assert kept == len(seen["kept"]) and f"→ {H:.2f} bits" in seen["said"], seen["said"]
    assert worst < 1e-6
    record("board_settings", {"settings": count, "rows": len(rows), "worst": float(worst)})


@pytest.mark.parametrize("system", ["huggingface", "vllm"])
def test_a_sort_that_promises_nothing_changes_only_which_of_the_equals(rows, visit, system):
    "As torch's sort leaves them on this machine, and not as the other tests fix it."
    tab = visit()
    for name in ("quiet", "bank", "name"):
        knobs = dict(temperature=1.0, top_k=0, top_p=0.8, min_p=0.0, repetition_penalty=1.0)
        prompt = f"prompt={name}&dialect={system}&top_p=0.8"
        kept = go(tab, prompt)["kept"]
        cut, _, _ = in_python(rows[name], knobs, system)
        logits = rows[name]["logits"]
        assert sorted(logits[kept]) == sorted(logits[cut.isfinite().numpy()])


@pytest.mark.parametrize(
    "text, knobs",
    [
        ("prompt=year", {}),
        ("temperature=0.8&top_p=0.9&seed=5", dict(temperature=0.8, top_p=0.9)),
        ("prompt=name", {}),
        ("prompt=list&top_k=3&repetition_penalty=1.3", dict(top_k=3, repetition_penalty=1.3)),
        ("prompt=code&temperature=0", dict(temperature=0)),
    ],
)
def test_a_thousand_draws(visit, rows, full, text, knobs):
    "The same thousand tokens as Python's, in the same bins, with scipy's tail."
    if not full and text not in ("prompt=year", "prompt=code&temperature=0"):
        pytest.skip("with --full")
    tab = visit(text)
    tab.get_by_role("button", name="Draw a thousand").click()
    panel = tab.locator("section[aria-label='A thousand draws']")
    panel.wait_for(timeout=30000)
    found = panel.evaluate("e => ({...e.dataset})")
    seen = json.loads(found["seen"])
    row = rows[re.search(r"prompt=([\w-]+)", text)[1] if "prompt" in text else "capital"]
    sampler = Sampler(**knobs)
    ids, at = torch.tensor([row["ids"]]), len(row["ids"])
    z = penalize(torch.tensor(row["logits"]).float()[None], sampler, ids)
    law = sampler.distribution(z.new_tensor(row["logits"])[None], ids)[0]
    rank = law.argsort(dim=-1, descending=True, stable=True)[: len(seen) - 1]
    seed = int((re.search(r"seed=(\d+)", text) or [0, 0])[1])
    drawn = torch.cat(
        [
            draw(z.expand(100, -1), sampler, Key(seed, 0, at, torch.arange(n, n + 100))).ids
            for n in range(0, 1000, 100)
        ]
    )
    counts = [(drawn == i).sum().item() for i in rank]
    assert seen == [*counts, 1000 - sum(counts)]
    expected = [1000 * law[i].item() for i in rank]
    expected.append(1000 - sum(expected))
    chi = sum((s - e) ** 2 / e for s, e in zip(seen, expected) if len(seen) > 1)
    assert float(found["chi"]) == pytest.approx(chi, rel=1e-3, abs=1e-9)
    if len(seen) > 1:
        from scipy.stats import chi2

        assert min(expected) >= 5 and float(found["above"]) > 1e-4
        above = chi2.sf(float(found["chi"]), len(seen) - 1)
        assert float(found["above"]) == pytest.approx(above, abs=1e-9)
    assert "χ²" in panel.inner_text() or "nothing to test" in panel.inner_text()


@pytest.mark.parametrize(
    "text, says",
    [
        ("temperature=0.7&top_p=0.9", "3 tokens kept: 93.3 % of the cooled row, 72.5 % of the row"),
        ("temperature=1.5&top_p=0.9", "3 306 tokens kept: 90.0 % of the heated row, 99.7 % of"),
        ("top_p=0.9", "27 tokens kept: 90.2 % of the model's mass"),
        ("temperature=0&repetition_penalty=1.2", "1 token kept: 100.0 % of the penalised and cool"),
    ],
)
def test_both_shares_are_said(visit, text, says):
    "Top-p's share is that of the row as it was when it was cut; the model's own is another."
    tab = visit(f"prompt=quiet&{text}")
    tab.locator(".kb-said", has_text=says).wait_for(timeout=5000)
    assert says.split(": ")[1] in tab.locator(".kb-side").inner_text()


def test_half_precision_moves_no_share_by_more_than_a_fifth_of_a_per_cent(model):
    for _, prompt in tool.PROMPTS.values():
        z = model(torch.tensor([model.encode(prompt)])).logits[0].float()
        moved = z.half().float().softmax(-1) - z.softmax(-1)
        assert moved.abs().max() < 0.0021, prompt


def test_the_same_luck_at_other_temperatures(visit, rows):
    tab = visit("prompt=bank&top_k=40&seed=11")
    tab.get_by_role("button", name="The same luck").click()
    tab.locator(".kb-heats li").first.wait_for()
    words = tool.read_words(Path(tab.url.removeprefix("file://").split("#")[0]).parent / "board")
    for item in tab.locator(".kb-heats li").all():
        T, word, share = item.locator("span, b").all_inner_texts()
        knobs = {"temperature": float(T.removeprefix("T ")), "top_k": 40}
        _, law, token = in_python(rows["bank"], knobs, "book", 11)
        assert word == words[token], T
        if law[token] > 0.01:
            assert share.startswith(f"{100 * law[token].item():.1f}"), T


def test_the_race_shows_scores_and_luck_and_the_largest_sum_wins(visit, rows):
    tab = visit("prompt=quiet&temperature=1.5&seed=4&draw=2")
    lines = [line.split("\t") for line in tab.locator(".kb-races tbody tr").all_inner_texts()]
    number = [[float(x.replace("−", "-")) for x in line[-3:]] for line in lines]
    assert all(s + n == pytest.approx(total, abs=0.011) for s, n, total in number)
    winner = max(range(len(lines)), key=lambda n: number[n][2])
    assert tab.locator(".kb-wins th").inner_text() == lines[winner][0]
    key = Key(4, 0, len(rows["quiet"]["ids"]), 2)
    z = torch.tensor(rows["quiet"]["logits"]).float()[None]
    token = draw(z, Sampler(temperature=1.5), key).ids.item()
    assert tab.evaluate(SEEN)["drawn"] == token


def test_the_python_that_it_shows_draws_its_token(visit, model):
    tab = visit("prompt=story-55&dialect=llama.cpp&repetition_penalty=1.2&min_p=0.01&seed=9&draw=3")
    code = tab.locator(".kb-python code").text_content()
    *before, last = code.splitlines()
    names = {}
    exec("\n".join([*before, f"drawn = {last}"]), names)
    assert names["drawn"].item() == tab.evaluate(SEEN)["drawn"]


def test_a_link_shares_what_one_sees(visit):
    tab = visit()
    tab.get_by_label("Text so far").select_option("list")
    tab.get_by_label("Temperature", exact=True).fill("0.75")
    tab.get_by_label("Top-k, a number").fill("30")
    tab.get_by_label("Cuts as").select_option("vllm")
    tab.get_by_label("Seed").fill("77")
    tab.get_by_role("button", name="Draw one").click()
    tab.get_by_role("button", name="Draw one").click()
    hash = "prompt=list&dialect=vllm&seed=77&temperature=0.75&top_k=30&draw=1"
    tab.wait_for_function(READY, arg=hash)
    assert tab.url.partition("#")[2] == hash
    other = visit(hash)
    assert other.evaluate(SEEN) == tab.evaluate(SEEN)
    one, two = (t.locator(".kb-races").inner_text() for t in (tab, other))
    assert one == two


def test_a_thousand_is_drawn_from_the_row_that_is_asked_for(visit):
    tab = visit("prompt=list&top_k=3")
    button, panel = "Draw a thousand", tab.locator("section[aria-label='A thousand draws']")
    tab.get_by_role("button", name=button).click()
    panel.wait_for(timeout=30000)
    seen = panel.inner_text()
    tab = visit("prompt=capital&top_k=3")
    tab.evaluate("""() => { const { board } = document.querySelector('.knob-board');
      board.change({ prompt: 'list', draw: 0 });
      board.part.many.click(); }""")
    panel = tab.locator("section[aria-label='A thousand draws']")
    panel.wait_for(timeout=30000)
    assert panel.inner_text() == seen


def test_wrong_settings_are_named_and_left_out(visit):
    tab = visit("temperature=-1&top_p=0&flavour=2&top_k=7")
    assert tab.evaluate(SEEN)["kept"].__len__() == 7
    said = tab.locator(".kb-said")
    said.filter(has_text="left out").wait_for()
    assert "temperature=-1, top_p=0, flavour=2" in said.inner_text()
    number = tab.get_by_label("Top-p, a number")
    number.fill("3")
    assert number.get_attribute("aria-invalid") == "true"  # an empty value says false
    assert len(tab.evaluate(SEEN)["kept"]) == 7
    number.blur()
    assert number.input_value() == "1" and number.get_attribute("aria-invalid") is None


def test_a_heading_of_the_page_is_no_setting(visit):
    tab = visit("top_k=7")
    tab.evaluate("location.hash = 'five-things-to-try'")
    tab.wait_for_timeout(200)
    assert len(tab.evaluate(SEEN)["kept"]) == 7 and tab.url.endswith("#five-things-to-try")


def test_by_keyboard_alone(visit):
    tab = visit()

    def reach(name):
        for _ in range(60):
            tab.keyboard.press("Tab")
            at = tab.evaluate("""(e => e.getAttribute('aria-label') || e.labels?.[0]?.textContent
              || e.textContent)(document.activeElement)""")
            if at.startswith(name):
                return
        raise AssertionError(f"{name} is not reached")

    tab.locator(".kb-text select").focus()
    reach("Temperature")
    for _ in range(6):
        tab.keyboard.press("ArrowLeft")
    reach("Top-k")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function(READY, arg="prompt=capital&temperature=0.7&top_k=1")
    assert len(tab.evaluate(SEEN)["kept"]) == 1
    reach("The 40 leading tokens")
    reach("Draw one")
    tab.keyboard.press("Enter")
    tab.wait_for_function(READY, arg="prompt=capital&temperature=0.7&top_k=1&draw=0")
    assert tab.evaluate("document.activeElement.textContent") == "Draw one"
    said = tab.locator(".kb-said[role=status]")
    said.filter(has_text="Drawn: “Paris”, 100.0 %. 1 token kept").wait_for()
    reach("The same draw in Python")
    tab.keyboard.press("Enter")
    assert tab.locator(".kb-python code").is_visible()


def test_on_a_phone_by_touch(visit):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    tab = visit("prompt=code&top_p=0.9", **phone)
    for name in ("Draw one", "The same luck", "Draw a thousand"):
        tab.get_by_role("button", name=name).tap()
    tab.locator("section[aria-label='A thousand draws']").wait_for(timeout=30000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    small = tab.evaluate(
        "[...document.querySelectorAll('.knob-board :is(button, select, input)')]"
        ".filter(e => e.offsetHeight && e.offsetHeight < 36).map(e => e.id || e.textContent)"
    )
    assert small == []


def test_cut_words_are_crossed_out(visit):
    tab = visit("top_k=3")
    crossed = tab.locator(".kb-bars tbody tr").evaluate_all(
        "rows => rows.map(r => [!!r.querySelector('s'), r.lastChild.textContent === 'cut'])"
    )
    assert crossed == [[False, False]] * 3 + [[True, True]] * 37


EMBEDDED = """<!doctype html><html lang="en"><title>x</title><h1>x</h1>
<link rel="stylesheet" href="{0}/board.css">
<div class="knob-board" data-settings="prompt=year&amp;top_p=.9" data-knobs="top_p"
 data-rows="12"></div><div class="knob-board" data-settings=""></div>
<script src="{0}/draw.js"></script><script src="{0}/board.js"></script>"""


def test_a_board_in_a_chapter_leaves_the_address_alone(visit, site, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(EMBEDDED.format((site / "board").as_uri()), encoding="utf-8")
    tab = visit("a-heading", page)
    first, second = tab.locator(".knob-board").all()
    assert first.locator(".kb-knob:visible label").all_inner_texts() == ["Top-p"]
    assert first.locator(".kb-bars tbody tr").count() == 12
    first.get_by_label("Top-p, a number").fill("0.5")
    link = first.get_by_role("link", name="This board on a page of its own")
    tab.wait_for_function("document.querySelector('.knob-board').dataset.ready.endsWith('=0.5')")
    assert link.get_attribute("href").endswith("/board.html#prompt=year&top_p=0.5")
    assert tab.url.endswith("page.html#a-heading")
    second.scroll_into_view_if_needed()
    second.locator(".kb-bars tbody th", has_text="Paris").first.wait_for()


def test_the_page_for_jupyter_shows_the_same(visit):
    tab = visit("prompt=sum&top_k=2", tool.make() / "index.html")
    assert len(tab.evaluate(SEEN)["kept"]) == 2 and len(tab.asked) == 1


def test_the_page_is_light_fast_and_does_not_jump(visit, rows, site, record):
    jumps = """new PerformanceObserver(list => { window.jumped = (window.jumped ?? 0)
      + list.getEntries().reduce((sum, e) => sum + e.value, 0) })
      .observe({type: 'layout-shift', buffered: true})"""
    times, shifts = [], []
    for _ in range(3):
        tab = visit()
        times.append(
            tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        )
        tab.evaluate(jumps)
        tab.wait_for_timeout(300)
        shifts.append(tab.evaluate("window.jumped ?? 0"))
    for name in rows:
        go(tab, f"prompt={name}&draw=0")
    loaded = {re.split("[?#]", url.removeprefix("file://"))[0] for url in tab.asked}
    assert sum("row-" in url for url in loaded) == len(rows)
    weight = sum(Path(url).stat().st_size for url in loaded if url.startswith("/"))
    record("board_page", {"bytes": weight, "first paint, ms": round(min(times)), "shift": shifts})
    assert weight < 3_000_000 and min(times) < 1000 and min(shifts) < 0.1, (weight, times, shifts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, scheme):
    package = pytest.importorskip("axe_playwright_python")
    engine = (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    tab = visit("prompt=bank&top_k=20&repetition_penalty=1.2&draw=1", color_scheme=scheme)
    tab.get_by_role("button", name="The same luck").click()
    tab.get_by_role("button", name="Draw a thousand").click()
    tab.locator("section[aria-label='A thousand draws']").wait_for(timeout=30000)
    tab.evaluate(engine)
    found = tab.evaluate("""async () => (await axe.run('.knob-board', {preload: false})).violations
      .flatMap(v => v.nodes.map(n => `${v.impact} ${v.id}: ${n.target}`))""")
    assert [line for line in found if not line.startswith(("minor", "moderate"))] == []


def settings_in_the_book():
    "(notebook, settings) of each link to the board and of each board in a chapter."
    for path in NOTEBOOKS:
        text = "\n".join(source for _, source in cells(path, "markdown"))
        found = re.findall(r"board\.html#([^)\s\"]*=[^)\s\"]*)|data-settings=\"([^\"]*)\"", text)
        yield from ((path.stem, (link or held).replace("&amp;", "&")) for link, held in found)


def test_the_board_understands_every_setting_in_the_book(visit):
    tab, found = visit(), list(settings_in_the_book())
    assert {stem[3:] for stem, _ in found} >= CHAPTERS and len(found) >= 20
    for stem, text in found:
        tab.evaluate("text => document.querySelector('.knob-board').board.take(text)", text)
        assert tab.evaluate("document.querySelector('.knob-board').board.wrong") == "", (stem, text)


# ---- the rows


def test_python_reads_the_rows_that_the_model_gives(rows, model):
    for name, kind, ids, given in tool.texts(model):
        row = rows[name]
        assert (row["ids"], row["given"], row["kind"]) == (ids, given, kind)
        assert row["logits"].dtype == np.float16 and row["logits"].shape == (model.vocab_size,)
        assert "".join(row["pieces"]) == row["text"] == model.decode(ids)
        z = model(torch.tensor([ids])).logits[0]
        assert (torch.tensor(row["logits"]).float() - z).abs().max() < 0.02


def test_the_story_is_greedy(model):
    ids, given = model.encode("".join(tool.STORY)), len(model.encode(tool.STORY[0]))
    best = model(torch.tensor([ids]), last_only=False).logits[0].argmax(-1)
    assert ids[given:] == best[given - 1 : -1].tolist()


def test_packing_keeps_every_bit():
    row = np.arange(65536, dtype=np.uint16).view(np.float16)
    assert (tool.unpack(tool.pack(row)).view(np.uint16) == row.view(np.uint16)).all()


def test_pandoc_leaves_a_place_as_the_build_looks_for_it():
    "As Quarto would read it in a notebook's text."
    pypandoc = pytest.importorskip("pypandoc")
    held = 'data-settings="prompt=year&amp;top_p=0.9" data-rows="12"'
    written = f'Words.\n\n<div class="knob-board" {held}>A</div>\n'
    html = " ".join(pypandoc.convert_text(written, "html", format="markdown").split())
    assert f"<div {PLACE} {held}>" in html
    page = for_everyone(f"<title>x</title>{html}", "../")
    assert page.count("../board/board.js") == 1 and "board/" not in for_everyone("<title>x", "")
