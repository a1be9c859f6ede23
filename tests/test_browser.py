"""The site in a browser that can reach nothing else: math, figures, search, the dark, pop-ups, a
phone's width."""

import contextlib
import functools
import http.server
import json
import re
import shutil
import threading
from pathlib import Path

import nbformat
import pytest
import yaml
from build_site import build
from helpers.project_files import ROOT

from decoding_book.beam import beam_search
from decoding_book.show import percent
from decoding_book.toy import six_words
from decoding_book.trees import panels_of, stepper_html


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder):
    "The address of a server of a folder."
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def address(site):
    with served(site) as address:
        yield address


def watched(page, name, wrong, address):
    "Note in `wrong` what goes wrong in a page, and whatever it asks for beside the site."
    ours = (address, "data:", "blob:", "file:")
    page.on(
        "request", lambda r: r.url.startswith(ours) or wrong.append(f"{name} asked for {r.url}")
    )
    page.on(
        "console",
        lambda m: (
            m.type == "error"
            and "favicon" not in json.dumps(m.location)
            and wrong.append(f"{name}: {m.text}")
        ),
    )
    page.on("pageerror", lambda e: wrong.append(f"{name}: {e}"))


@pytest.fixture
def tab(browser, address):
    "A function that opens a page of the site; at the end nothing may have gone wrong in it."
    wrong, contexts = [], []

    def opened(name, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        watched(page, name, wrong, address)
        page.goto(name if ":" in name else f"{address}/{name}.html")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong, "\n".join(wrong)


LOOK = """({
  katex: document.querySelectorAll('.katex').length,
  bad: document.querySelectorAll('.katex-error').length,
  raw: [...document.querySelectorAll('main .math')].filter(m => !m.querySelector('.katex')).length,
  images: [...document.querySelectorAll('main img')].map(i => i.naturalWidth),
  cut: [...document.querySelectorAll('main .cell-output, '
      + 'main .cell-output *:not(svg *), main .math.display')]
    .filter(box => box.clientWidth && box.scrollWidth > box.clientWidth + 1)
    .filter(box => {
      if (box.closest('.cell-output pre:not(.columns)')) return true;   // text wraps
      for (let e = box; e && !e.matches('main'); e = e.parentElement)
        if (/auto|scroll/.test(getComputedStyle(e).overflowX)) return e.tabIndex < 0;
      return true; })
    .map(box => box.textContent.trim().slice(0, 40)),
  code: [...document.querySelectorAll('main pre')].map(
    p => parseFloat(getComputedStyle(p).fontSize)),
  width: document.documentElement.scrollWidth})"""


JUMPS = """window.jumps = 0; new PerformanceObserver(list => {
    for (const e of list.getEntries()) if (!e.hadRecentInput) window.jumps += e.value
  }).observe({type: 'layout-shift', buffered: true})"""


LOADED = """document.fonts.ready.then(() => new Promise(done => setTimeout(done, 100)))
  .then(() => ({
  jumps: window.jumps,
  bytes: ['navigation', 'resource'].flatMap(kind => performance.getEntriesByType(kind))
    .reduce((sum, e) => sum + e.decodedBodySize, 0)}))"""


UNFOLD = """document.querySelectorAll('details').forEach(d => { d.open = true });
  window.shipped?.show(true);
  document.querySelectorAll('.callout-collapse').forEach(c => { c.classList.add('show') })"""


@pytest.fixture(scope="module")
def tour(browser, address, site, full):
    "What every page looks like, on a laptop and on a phone, and what went wrong in it."
    facts, wrong = {}, []
    context = browser.new_context()
    for name in sorted(p.stem for p in site.glob("*.html")):
        page = context.new_page()
        watched(page, name, wrong, address)
        page.set_viewport_size({"width": 1280, "height": 800})
        page.add_init_script(JUMPS)
        page.goto(f"{address}/{name}.html")
        loaded = page.evaluate(LOADED)
        page.evaluate(UNFOLD)
        for width in (1280, 390, 375) if full else (1280, 375):
            page.set_viewport_size({"width": width, "height": 800})
            page.evaluate(
                "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
            )
            facts[name, width] = loaded | page.evaluate(LOOK)
        page.close()
    context.close()
    return facts, wrong


def visible(page, selector):
    return page.locator(selector).locator("visible=true")


def test_the_index_shows_what_this_is(tab):
    page = tab("index")
    assert "Decoding" in page.title()
    assert page.locator("main a[href$='.html'], main a[href*='.html#']").count() >= 3


def test_every_page_opens_without_an_error(tour):
    facts, wrong = tour
    assert facts and not wrong, "\n".join(wrong)


def test_nothing_jumps_while_a_page_loads(tour):
    "Up to .1 is called good on the web. Math whose font comes last moves the lines beside it."
    facts, _ = tour
    assert not {name: seen["jumps"] for (name, _), seen in facts.items() if seen["jumps"] > 0.1}


def test_a_page_with_all_that_it_loads_is_under_two_megabytes(tour):
    "As a server without compression sends it. The board asks for its rows later: `test_board.py`."
    facts, _ = tour
    assert not {name: seen["bytes"] for (name, _), seen in facts.items() if seen["bytes"] > 2e6}
    assert facts["loop", 1280]["bytes"] > 1e5


def test_math_is_rendered(tour):
    facts, _ = tour
    assert facts["loop", 1280]["katex"] > 0
    for page, seen in facts.items():
        assert seen["bad"] == seen["raw"] == 0, page


def test_math_has_its_fonts(tab):
    page = tab("loop")
    page.evaluate("document.fonts.ready")
    assert page.evaluate(
        "[...document.fonts].some(f => f.family == 'KaTeX_Main' && f.status == 'loaded')"
    )


def test_figures_are_shown(tour):
    facts, _ = tour
    assert sum(len(seen["images"]) for seen in facts.values()) > 0
    for page, seen in facts.items():
        assert all(seen["images"]), page


def test_no_page_is_wider_than_the_screen(tour):
    facts, _ = tour
    assert not {k: v["width"] for k, v in facts.items() if v["width"] > k[1]}


def test_an_output_is_no_wider_than_its_box_or_scrolls_in_a_frame_that_a_keyboard_reaches(tour):
    facts, _ = tour
    assert not {k: v["cut"] for k, v in facts.items() if v["cut"]}


def test_code_is_nearly_as_large_as_prose(tour):
    facts, _ = tour
    for page, seen in facts.items():
        assert all(14 <= size <= 16 for size in seen["code"]), page


def test_a_phone_has_the_contents_of_the_page(tab):
    page = tab("loop", viewport={"width": 390, "height": 750})
    contents = page.locator(".toc-phone")
    contents.locator("summary").click()
    contents.locator("a[href='#when-to-stop']").click()
    page.wait_for_function(
        "document.querySelector('#when-to-stop').getBoundingClientRect().top < 400"
    )
    assert not tab("loop").locator(".toc-phone").is_visible()


def test_a_solution_opens_by_keyboard(tab):
    page = tab("notation")
    header, body = page.locator(".callout-header").last, page.locator(".callout-collapse").last
    assert not body.is_visible()
    header.focus()
    page.keyboard.press("Enter")
    body.locator("code").first.wait_for(state="visible", timeout=3000)
    assert header.get_attribute("aria-expanded") == "true"


def found(page, query):
    "What the search shows: (page, section) of each result, and the text of them all."
    visible(page, "input[type=search], .smalldocs-search input").first.fill(query)
    page.locator(".search-result").first.wait_for(timeout=5000)
    page.wait_for_timeout(300)
    results = page.locator(".search-result")
    places = [r.get_attribute("href").split("/")[-1].partition("#")[::2] for r in results.all()]
    return places, " ".join(results.all_inner_texts())


@pytest.mark.parametrize(
    "query, first",
    [
        ("logits", "loop.html"),
        ("beam search", "beam.html"),
        ("temperature", "temperature.html"),
        ("top-p", "topp.html"),
        ("varentropy", "entropy.html"),
        ("perplexity", None),
        ("repetition penalty", "penalties.html"),
    ],
)
def test_search_names_the_place_that_explains_a_word_first_and_shows_no_tex(tab, query, first):
    places, said = found(tab("index"), query)
    assert first in (None, places[0][0])
    assert first is None or "exercises" not in [section for _, section in places[:3]]
    assert not re.search(
        r"\\[dt]?(frac|log|sum|text|infty|cdot|mid|sqrt|lvert|left|mathrm)\b|[_^]\{", said
    )


def test_search_forgives_a_typing_error(tab):
    assert ("temperature.html", "") in found(tab("index"), "temp" + "rature")[0]


def test_search_finds_a_chapter(tab):
    page = tab("index")
    visible(page, "input[type=search], .smalldocs-search input").first.fill("padding")
    results = page.locator(".search-result, .aa-Item")
    results.first.wait_for(timeout=5000)
    assert results.count() > 0
    results.first.click()
    page.wait_for_load_state()
    assert "padding" in page.inner_text("body").lower()


def test_search_works_from_a_file(tab, site):
    page = tab((site / "loop.html").as_uri())
    visible(page, "input[type=search], .smalldocs-search input").first.fill("padding")
    page.locator(".search-result").first.wait_for(timeout=5000)


def brightness(page):
    "0 (black) … 255 (white), of the page's background."
    return page.evaluate("""(() => { const c = getComputedStyle(document.body).backgroundColor
        .match(/[\\d.]+/g).map(Number); return (c[0] + c[1] + c[2]) / 3 })()""")


def test_the_dark_mode_can_be_chosen_and_stays(tab):
    page = tab("loop", color_scheme="light")
    assert brightness(page) > 200
    visible(page, ".quarto-color-scheme-toggle").first.click()
    page.wait_for_timeout(300)
    assert brightness(page) < 80
    page.reload()
    page.wait_for_timeout(300)
    assert brightness(page) < 80


def test_the_reader_s_preference_for_dark_is_kept(tab):
    assert brightness(tab("loop", color_scheme="dark")) < 80


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_token_shows_its_alternatives(tab, scheme):
    page = tab("show", color_scheme=scheme)
    token = page.locator(".db-t[tabindex='0']").first
    popup = token.locator(".db-p")
    assert not popup.is_visible()
    token.focus()
    assert popup.is_visible() and "%" in popup.inner_text()
    page.evaluate("document.activeElement.blur()")
    token.hover()
    assert popup.is_visible()


def test_a_token_shows_its_alternatives_by_touch(tab):
    page = tab("show", viewport={"width": 375, "height": 750}, has_touch=True, is_mobile=True)
    token = page.locator(".db-t[tabindex='0']").first
    token.scroll_into_view_if_needed()
    token.tap()
    popup = token.locator(".db-p")
    assert popup.is_visible()
    box = popup.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 376


# ---- steps, one at a time

STEPPED = """box => [...box.querySelectorAll('.dw-now .dw-c > div')].map(panel => ({
  said: [...panel.querySelectorAll('p[data-p]')].filter(seen).map(p => p.textContent),
  lines: [...panel.querySelectorAll('.dw-l li')].map(line => [...line.children].slice(1).map(
    part => seen(part) ? part.textContent.trim() : ''))}))"""


@pytest.fixture(scope="module")
def record():
    "What Python knows of the beams of three widths: for each step its panels."
    results = {f"width {k}": beam_search(six_words(), "", k, 5) for k in (1, 2, 3)}
    return [dict(zip(results, step)) for step in zip(*panels_of(results, None, 10)[0].values())]


def of_panel(panel, phase):
    "What a panel shows in a phase, and what is read aloud."
    lines = [
        [line.name, line.score, percent(line.p), line.fate if phase == 2 else ""]
        for line in panel.lines
    ]
    return {"said": panel.said[:phase], "lines": lines}


@pytest.mark.parametrize("width", [1280, 390])
def test_a_whole_beam_is_stepped_through_by_keyboard_as_python_recorded_it(tab, record, width):
    page = tab("beam", viewport={"width": width, "height": 844})
    page.evaluate("() => { window.seen = e => getComputedStyle(e).visibility === 'visible' }")
    box = page.locator(".dw").first
    box.focus()
    height = box.bounding_box()["height"]
    frames = [(step, phase) for step in record for phase in (1, 2)]
    moves = [("ArrowRight", n) for n in range(1, 10)]
    moves += [("ArrowLeft", n) for n in (8, 7)] + [("Home", 0), ("End", 9), ("ArrowRight", 9)]
    assert box.get_by_role("status").inner_text() == ""  # nothing is read while a page loads
    for key, n in [(None, 0), *moves]:
        if key:
            page.keyboard.press(key)
        step, phase = frames[n]
        assert box.evaluate(STEPPED) == [of_panel(p, phase) for p in step.values()]
        assert f"{n + 1} of {len(frames)}" in box.locator(".dw-b").inner_text()
        if key:
            aloud = " ".join(f"{name}: {p.said[phase - 1]}" for name, p in step.items())
            assert box.get_by_role("status").inner_text() == aloud
        assert box.bounding_box()["height"] == height  # nothing jumps
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_buttons_step_too_and_play_goes_to_the_end_and_stops(tab):
    page = tab("loop", viewport={"width": 390, "height": 844})
    box = page.locator(".dw").first
    back, following, play = (box.get_by_role("button", name=n) for n in ("Back", "Next", "Play"))
    assert back.get_attribute("aria-disabled") == "true"
    following.click()
    assert box.get_attribute("data-at") == "1"
    back.focus()
    page.keyboard.press("Enter")
    assert box.get_attribute("data-at") == "0"
    page.keyboard.press("End")
    last = int(box.get_attribute("data-at"))
    assert following.get_attribute("aria-disabled") == "true"
    assert 'Appended: "I like cold coffee stop".' in box.get_by_role("status").inner_text()
    page.keyboard.press("ArrowLeft")
    play.click()
    page.wait_for_function(f"document.querySelector('.dw').dataset.at == {last}")
    assert box.get_by_role("button", name="Play").is_visible()


def test_several_steppers_on_one_page_do_not_know_each_other_and_show_all_without_a_script(
    browser, tmp_path, record
):
    one = stepper_html(beam_search(six_words(), "", 2, 5))
    path = tmp_path / "two.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{one}{one}", encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    page.locator(".dw").last.focus()
    page.keyboard.press("ArrowRight")
    assert [box.get_attribute("data-at") for box in page.locator(".dw").all()] == ["0", "1"]
    page.emulate_media(media="print")
    assert page.locator(".dw").first.get_by_text("The search is over").is_visible()
    page.close()
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    said = [p.inner_text() for p in page.locator(".dw").first.locator("p[data-p]").all()]
    assert said == [sentence for step in record for sentence in step["width 2"].said]
    assert page.locator("button").count() == 0
    tops = [p.bounding_box()["y"] for p in page.locator("p[data-p]").all()]
    assert tops == sorted(set(tops))
    context.close()


def test_the_chapters_can_be_reached_on_a_phone(tab):
    page = tab("loop", viewport={"width": 375, "height": 750})
    visible(page, ".quarto-btn-toggle").first.click()
    link = visible(page, "#quarto-sidebar a[href$='references.html']").first
    link.click()
    page.wait_for_url("**/references.html")


def test_the_search_index_is_the_same_in_both_forms(site):
    data = json.loads((site / "search.json").read_text(encoding="utf-8"))
    script = (site / "search.json.js").read_text(encoding="utf-8")
    assert json.loads(script.removeprefix("window.searchIndex = ").rstrip(";\n")) == data


# ---- below the mark, on a page of the tests' own

LONG = "A line of prose.\n\n" * 60
MARKED = f"""# A marked page

> With an idea, and more.

## The problem

{LONG} [Deep inside](#a-guarantee).

## As it is shipped

For users.

### A guarantee

{LONG} The word xylophone.

## References

The end."""


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    "The folder of a built site whose one chapter has the mark."
    project = tmp_path_factory.mktemp("marked")
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    names = ["index", "marked"]
    config["website"]["sidebar"]["contents"] = [f"nbs/{name}.ipynb" for name in names]
    for part in ("nbs", "tools"):
        (project / part).mkdir()
    (project / "_quarto.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for part in ("settings.ini", "tools/book.css"):
        shutil.copy(ROOT / part, project / part)
    for name in names:
        front = f"---\noutput-file: {name}.html\ntitle: {name}\n---"
        cells = [nbformat.v4.new_raw_cell(front), nbformat.v4.new_markdown_cell(MARKED)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), project / f"nbs/{name}.ipynb")
    return build(project, project / "_site")


@pytest.fixture(scope="module")
def marked_address(marked):
    with served(marked) as address:
        yield f"{address}/marked.html"


@pytest.fixture
def chapter(browser, marked_address):
    "A function that opens the marked page at a place; it notes how far things jumped meanwhile."
    contexts = []

    def opened(hash="", **options):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.add_init_script(JUMPS)
        page.goto(marked_address + hash)
        return page

    yield opened
    for context in contexts:
        context.close()


BUTTON = "#as-it-is-shipped > h2 > button"


def is_open(page):
    said = page.locator(BUTTON).get_attribute("aria-expanded")
    height = page.evaluate("document.querySelector('.shipped').getBoundingClientRect().height")
    assert said == ("true" if height > 500 else "false")
    return height > 500


def in_view(page, place):
    page.wait_for_function(
        f"(y => y >= 0 && y < 300)(document.querySelector('{place}').getBoundingClientRect().top)"
    )


def test_below_the_mark_is_folded_and_opens_by_keyboard(chapter):
    page = chapter()
    button = page.get_by_role("button", name="As it is shipped")
    assert not is_open(page) and page.locator("#references").is_visible()
    assert "A guarantee: about 1 minute." in page.locator(".shipped-note").inner_text()
    for key in ("Enter", "Space", "Enter"):
        was = is_open(page)
        button.focus()
        page.keyboard.press(key)
        assert is_open(page) != was


def test_nothing_jumps_while_a_folded_page_loads(chapter):
    page = chapter()
    page.wait_for_timeout(300)
    assert page.evaluate("window.jumps") < 0.01
    height = "document.documentElement.scrollHeight"
    assert page.evaluate(height) < 0.8 * (page.locator(BUTTON).click() or page.evaluate(height))


@pytest.mark.parametrize("place", ["#a-guarantee", "#as-it-is-shipped"])
def test_a_link_to_a_place_below_the_mark_opens_it(chapter, place):
    page = chapter(place)
    in_view(page, place)
    assert is_open(page)


def test_links_of_the_page_and_its_contents_open_it(chapter):
    page = chapter()
    for link in ("main p a[href='#a-guarantee']", "#TOC a[href='#a-guarantee']"):
        page.locator(link).click()
        in_view(page, "#a-guarantee")
        assert is_open(page)
        page.locator(BUTTON).click()  # closed; the address stays, so no hashchange tells of it
        assert not is_open(page)
    page.evaluate("location.hash = 'references'")
    page.wait_for_timeout(100)
    assert not is_open(page)
    page.evaluate("location.hash = 'a-guarantee'")
    in_view(page, "#a-guarantee")
    assert is_open(page)


def test_a_hit_of_the_search_opens_it(chapter):
    page = chapter()
    visible(page, ".smalldocs-search input").first.fill("xylophone")
    page.locator(".search-result[href*='marked.html#a-guarantee']").first.click()
    in_view(page, "#a-guarantee")
    assert is_open(page)


def test_a_reload_finds_it_as_it_was_left(chapter):
    page = chapter()
    page.locator(BUTTON).click()
    page.reload()
    assert is_open(page)
    page.locator(BUTTON).click()
    page.reload()
    assert not is_open(page)


def test_the_browser_s_search_looks_inside_and_opens_it(chapter):
    page = chapter()
    body = page.locator(".shipped")
    assert body.get_attribute("hidden") == "until-found"
    assert body.evaluate("e => getComputedStyle(e).contentVisibility") == "hidden"
    assert body.evaluate("e => getComputedStyle(e).display") == "block"
    # A link to a piece of text goes the way of the browser's search
    page = chapter("#:~:text=xylophone")
    page.wait_for_timeout(300)
    assert is_open(page)


def test_a_browser_without_that_search_folds_all_the_same(browser, marked_address):
    page = browser.new_page()
    page.add_init_script("delete HTMLElement.prototype.onbeforematch")
    page.goto(marked_address)
    assert page.locator(".shipped").get_attribute("hidden") == "" and not is_open(page)
    page.goto(marked_address + "#a-guarantee")
    in_view(page, "#a-guarantee")
    assert is_open(page)
    page.close()


def test_without_javascript_and_in_print_all_is_open(chapter):
    page = chapter(java_script_enabled=False)
    assert page.locator(BUTTON).count() == 0
    assert page.locator("#a-guarantee").bounding_box()["height"] > 500
    page = chapter()
    page.emulate_media(media="print")
    assert page.locator("#a-guarantee").bounding_box()["height"] > 500


@pytest.mark.parametrize("place", ["", "#a-guarantee"])
def test_a_file_folds_too(chapter, marked, place):
    page = chapter()
    page.goto((marked / "marked.html").as_uri() + place)
    assert is_open(page) == bool(place)


# It takes minutes for all pages. These have every kind of thing between them; the contrast of
# thousands of spans takes
# most of the time, and all pages have the same colours.
KINDS = {"index", "references", "notation", "toy", "trees", "benchmarks"}
CONTRASTS = {"references", "notation"}
AXE = """async ([contrast, code]) => {
  const found = await axe.run({exclude: code ? [] : [['pre'], ['.katex']]},
    {resultTypes: ['violations'], rules: {'color-contrast': {enabled: contrast}}});
  return found.violations.filter(v => ['serious', 'critical'].includes(v.impact)).flatMap(
    v => v.nodes.map(node => `${v.id}: ${node.target} ${node.failureSummary}`)); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_page(browser, address, site, full, scheme):
    package = pytest.importorskip(
        "axe_playwright_python", reason="pip install axe-playwright-python"
    )
    engine = (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    context, found = (
        browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900}),
        [],
    )
    for name in sorted(p.stem for p in site.glob("*.html")):
        if not full and name not in (KINDS if scheme == "light" else CONTRASTS):
            continue
        page = context.new_page()
        page.goto(f"{address}/{name}.html")
        page.evaluate(engine)
        found += [
            f"{name}: {line}" for line in page.evaluate(AXE, [full or name in CONTRASTS, full])
        ]
        page.close()
    context.close()
    assert not found, "\n".join(found)
