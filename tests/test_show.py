"""The HTML views and figures of `decoding_book.show`."""

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_book import show as S
from decoding_book.show import (
    LEGEND,
    PALETTE,
    STYLE,
    UNDERLINES,
    bars,
    draw_moves,
    figure_style,
    heat,
    in_words,
    level,
    level_css,
    percent,
    rows_html,
    spoken,
    surprisal,
    text_on,
    token_face,
    token_name,
    tokens_html,
)

WORDS = ["cold", "coffee", "I", "like", "water", "stop"]
LOG = math.log
TOP = [(" stop", LOG(1 / 2)), (" I", LOG(1 / 4)), (" water", LOG(1 / 8))]


class Page(HTMLParser):
    """What a browser would find: elements, attributes, and the text outside the style sheet."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.attributes, self.text, self.open = [], [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def body(html):
    return html.replace(STYLE, "")


def words_of(html):
    return re.findall(r'<b(?: class="db-c")?>(.*?)</b>', html)


# HTML: safety

EVIL = '"><img src=x onerror=alert(1)></style></span><script>alert("http://x")</script>&amp;'


def test_everything_is_escaped():
    html = tokens_html([EVIL], [-1], [[(EVIL, -2), (EVIL, -1)]], EVIL, EVIL, [EVIL])
    page = Page(html)
    assert not page.open
    assert set(page.elements) == {"style", "div", "span", "b", "i", "em"}
    names = {key for key, _ in page.attributes}
    assert names == {"class", "tabindex", "role", "aria-label", "style"}
    assert page.text.count(EVIL) == 4  # caption, prompt, the token, its note
    assert page.text.count(token_name(EVIL)) == 3  # the pop-up's head and two alternatives
    assert html.count("<style") == 1 and "<script" not in html


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.text(max_size=6), st.floats(-40, 0)), max_size=5), st.text(max_size=8))
def test_any_text_gives_balanced_one_line_html(pairs, prompt):
    tokens, logprobs = [t for t, _ in pairs], [lp for _, lp in pairs]
    html = tokens_html(tokens, logprobs, [pairs] * len(pairs), prompt)
    page = Page(html)
    assert not page.open and "\n" not in html and "\r" not in html
    assert set(page.elements) <= {"style", "div", "span", "b", "i", "em", "br"}
    assert html.count('tabindex="0"') == len(pairs)
    html.encode()  # no lone surrogate either
    assert html.count('class="db-c"') == len(pairs)


def test_no_script_no_address():
    html = tokens_html([" like"] * 3, [-1, -2, -3], [TOP] * 3, "I", "caption", ["a", None, ""])
    for word in "<script", "http", "url(", "//", "src=", "href", "@import", "javascript":
        assert word not in html, word
    assert not re.search(r"\son\w+\s*=", html)


def test_mathematics_is_never_typeset():
    html = body(tokens_html(["$5 and $6", r"\(x\)"], [-1, -1], prompt=r"$$a$$ \[b\]"))
    shown = re.sub(r'aria-label="[^"]*"', "", html)
    for text in re.findall(r">([^<]*)<", shown):
        assert text.count("$") <= (text == "$") and text.count("\\") <= (text == "\\")
    assert "tex2jax_ignore" in html and "mathjax_ignore" in html


def test_css_is_scoped():
    css = STYLE.removeprefix("<style>").removesuffix("</style>")
    rules = re.findall(r"([^{}]+)\{[^{}]*\}", css)
    selectors = [s for rule in rules for s in rule.split(",")]
    assert len(selectors) > 25 and all(s.startswith(".db-") for s in selectors)
    assert css.count("{") == css.count("}")


def test_the_size_of_a_text_s_html_stays_small():
    top = [(f" alternative{i}", LOG(0.19)) for i in range(5)]
    html = tokens_html([" coffee"] * 64, [-2.5] * 64, [top] * 64, prompt="I like " * 20)
    assert len(html.encode()) < 45_000, len(html.encode())
    assert len(tokens_html(["a"], [-1]).encode()) < 5_000


# HTML: content


def test_tokens_are_focusable_and_labelled():
    html = tokens_html([" like", "\n", ".", ""], [LOG(1 / 2), LOG(1 / 8), 0, LOG(1 / 32)])
    assert html.count('tabindex="0"') == 4 and html.count('tabindex="-1"') == 1
    assert re.findall('role="group" aria-label="(.*?)"', html) == [
        "like, 50.0 %, 1.0 bits",
        "new line, 12.5 %, 3.0 bits",
        "full stop, 100.0 %, 0.0 bits",
        "empty, 3.1 %, 5.0 bits",
    ]
    assert 'aria-label="Generated text, 4 tokens, 9.0 bits"' in html


def test_alternatives_are_listed_with_probabilities():
    html = body(tokens_html([" I"], [LOG(1 / 4)], [TOP]))
    assert words_of(html) == ["·I", "·stop", "▸ ·I", "·water"]
    assert re.findall("<em>(.*?)</em>", html) == ["50.0 %", "25.0 %", "12.5 %"]
    assert re.findall(r'<i style="width:(.*?)%">', html) == ["50", "25", "12.5"]
    assert "…" not in html


def test_the_chosen_token_outside_the_list():
    html = body(tokens_html([" like"], [LOG(1 / 32)], [TOP]))
    assert words_of(html)[1:] == ["·stop", "·I", "·water", "▸ ·like"]
    assert html.count("…") == 1 and html.count('class="db-c"') == 1
    assert re.findall("<em>(.*?)</em>", html)[-1] == "3.1 %"


def test_equal_texts_are_told_apart_by_probability():
    top = [("\ufffd", LOG(0.5)), ("\ufffd", LOG(0.25)), ("\ufffd", LOG(0.125))]
    inside = words_of(body(tokens_html(["\ufffd"], [LOG(0.25)], [top])))[1:]
    assert [w.startswith("▸") for w in inside] == [False, True, False]
    outside = words_of(body(tokens_html(["\ufffd"], [LOG(0.01)], [top])))[1:]
    assert [w.startswith("▸") for w in outside] == [False, False, False, True]


def test_a_space_lost_in_decoding_still_matches():
    top = [("like", LOG(0.25)), (" like", LOG(0.25)), ("cold", LOG(0.25))]

    def marked(token):
        return [
            w.startswith("▸") for w in words_of(body(tokens_html([token], [LOG(0.25)], [top])))[1:]
        ]

    assert marked(" cold") == [False, False, True]
    assert marked(" like") == [False, True, False]  # an equal text goes first
    assert marked("water") == [False, False, False, True]


def test_no_alternatives_still_has_a_card():
    html = body(tokens_html(["a"], [LOG(1 / 2)]))
    assert "<b>a</b> 50.0 %, 1.0 bits" in html and "<em>" not in html


def test_prompt_caption_and_note():
    html = body(tokens_html(["b"], [-1], prompt="x\n y", caption="<c>", chosen_note=["by top-k"]))
    assert '<span class="db-q">x<br> y</span>' in html
    assert "&lt;c&gt;" in html and "by top-k" in html


def test_an_empty_generation_has_no_bits():
    html = tokens_html([], [], [], prompt="I")
    assert "0 tokens, 0.0 bits" in html and 'tabindex="0"' not in html


def test_special_characters_are_visible():
    assert [token_face(t) for t in ["\n", " ", "\t", "a\n\nb", "x\r"]] == [
        '<span class="db-m">↵</span><br>',
        '<span class="db-m">·</span>',
        "⇥",
        'a<span class="db-m">↵</span><br><span class="db-m">↵</span><br>b',
        "x␍",
    ]
    assert [
        token_name(t) for t in ["", " a b", "\x00", "\u202e", "\ud800", "\u2028", "\ufffd"]
    ] == ["∅", "·a·b", "‹0000›", "‹202E›", "‹D800›", "‹2028›", "\ufffd"]
    assert token_name("👩\u200d🔬") == "👩\u200d🔬"
    assert spoken("\ufffd") == "replacement character" and spoken(" 12 ") == "12"


def test_shading_is_monotone_and_not_by_colour_alone():
    rules = re.findall(
        r"\.db-(\d+)\{background:rgba\(213,94,0,([\d.]+)\);border-bottom:(.*?)\}", level_css()
    )
    assert [int(n) for n, _, _ in rules] == list(range(11))
    alphas = [float(a) for _, a, _ in rules]
    assert alphas == sorted(set(alphas)) and alphas[0] == 0 and alphas[-1] <= 0.6
    widths = [int(line[0]) for line in UNDERLINES]
    assert widths == sorted(widths) and len(set(UNDERLINES)) == 6
    logprobs = [-0.5 * i for i in range(30)]
    levels = [int(n) for n in re.findall(r"db-t db-(\d+)", tokens_html(["a"] * 30, logprobs))]
    assert levels == [min(10, int(-lp / LOG(2))) for lp in logprobs] == sorted(levels)


def test_surprisal_is_in_bits_and_its_levels_end():
    assert [surprisal(LOG(p)) for p in (1, 1 / 2)] == [0, 1]
    assert surprisal(LOG(1 / 8)) == pytest.approx(3) and surprisal(-math.inf) == math.inf
    assert math.copysign(1, surprisal(0.0)) == 1
    assert [level(b) for b in (0, 0.999, 1, 9.99, 10, 500, math.inf)] == [0, 0, 1, 9, 10, 10, 10]


def test_percent_is_never_falsely_certain():
    for p in 0.9995, 0.99999, 1 - 2**-52:
        assert percent(p) == "> 99.9 %"
    assert [percent(p) for p in (1, 0.9994, 0.01, 0.00999, 1e-5, 9e-6, 1e-300, 0)] == [
        "100.0 %",
        "99.9 %",
        "1.0 %",
        "0.999 %",
        "0.001 %",
        "< 0.001 %",
        "< 0.001 %",
        "0 %",
    ]


def test_tensors_are_taken():
    torch = pytest.importorskip("torch")
    html = tokens_html(["a", "b"], torch.tensor([-1.0, -2.0]), [[("c", torch.tensor(-1.0))]] * 2)
    assert html == tokens_html(["a", "b"], [-1.0, -2.0], [[("c", -1.0)]] * 2)


def test_rows_share_one_style_and_one_legend():
    one, two = tokens_html(["a"], [-1], [TOP]), tokens_html(["b", "c"], [-1, -2])
    html = rows_html([one, two])
    assert html.count("<style>") == html.count(LEGEND) == 1 and html.count('tabindex="0"') == 3
    assert html.index("row 0") < html.index(">a<") < html.index("row 1") < html.index(">b<")
    assert not Page(html).open and "\n" not in html
    assert "row 0" not in rows_html([])
    with pytest.raises(TypeError, match="rows"):
        rows_html(one)


# HTML: bad input


@pytest.mark.parametrize(
    "args, kind, says",
    [
        ((["a", "b"], [-1]), ValueError, "logprobs has length 1, but there are 2 tokens"),
        ((["a"], [-1], []), ValueError, "alternatives has length 0, but there are 1 tokens"),
        ((["a"], [-1], None, "", "", ["x", "y"]), ValueError, "chosen_note has length 2"),
        ((["a", "b"], [-1, 0.125]), ValueError, r"logprobs\[1\] is 0.125"),
        ((["a"], [math.nan]), ValueError, r"logprobs\[0\] is nan"),
        ((["a"], [math.inf]), ValueError, r"logprobs\[0\] is inf"),
        ((["a"], [-1], [[("b", 0.5)]]), ValueError, r"alternatives\[0\] \('b'\) is 0.5"),
        ((["a"], [-1], [[("b", math.nan)]]), ValueError, r"alternatives\[0\] \('b'\) is nan"),
        (([17], [-1]), TypeError, r"tokens\[0\] is 17"),
    ],
)
def test_bad_input_is_refused_by_its_name(args, kind, says):
    with pytest.raises(kind, match=says):
        tokens_html(*args)


def test_rounding_and_zero_probability_are_allowed():
    assert "100.0 %, 0.0 bits" in tokens_html(["a"], [5e-7])
    html = tokens_html(["a"], [-math.inf], [[("a", -math.inf), ("b", 0.0)]])
    assert "0 %, ∞ bits" in html and "db-t db-10" in html and html.count('class="db-c"') == 1


# Figures


@pytest.fixture(autouse=True)
def no_window():
    import matplotlib

    matplotlib.use("Agg")
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_import_is_light():
    code = (
        "import sys, decoding_book.show;"
        "print([m for m in ('matplotlib', 'torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bars_have_their_words_and_hatch_what_is_removed():
    torch = pytest.importorskip("torch")
    p = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125])
    ax = bars(p, WORDS, keep=p > 0.1, title="six words")
    assert [bar.get_width() for bar in ax.patches] == p.tolist()
    assert [label.get_text() for label in ax.get_yticklabels()] == WORDS
    assert [bool(bar.get_hatch()) for bar in ax.patches] == [False] * 3 + [True] * 3
    assert [t.get_text().strip() for t in ax.texts] == [
        "50.0 %",
        "25.0 %",
        "12.5 %",
        "6.2 % removed",
        "3.1 % removed",
        "3.1 % removed",
    ]
    assert ax.get_title() == "six words" and ax.yaxis_inverted()
    ax.figure.canvas.draw()
    assert max(t.get_window_extent().x1 for t in ax.texts) <= ax.figure.bbox.x1


def test_numbers_of_one_figure_have_one_form():
    ax = bars([0.7, 0.1, 0.00613, 3.38e-05, 0.0])
    assert [t.get_text().strip() for t in ax.texts] == [
        "70.0 %",
        "10.0 %",
        "0.6 %",
        "<0.1 %",
        "0.0 %",
    ]
    ax = heat([[-0.5, -2e-9], [12.5, math.nan]])
    assert [t.get_text() for t in ax.texts] == ["-0.5", ">-0.1", "12.5", "nan"]
    assert [t.get_text() for t in heat([[0.0, 0.0]]).texts] == ["0", "0"]


def contrast(a, b):
    "By WCAG 2, from 1 to 21; 4.5 is legible."
    from matplotlib.colors import to_rgb

    def light(colour):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted(map(light, (a, b)))
    return (high + 0.05) / (low + 0.05)


def test_text_on_any_colour_is_legible():
    import numpy as np

    assert all(contrast(c, text_on(c)) >= 4.5 for c in PALETTE.values())
    for colour in np.random.default_rng(0).random((500, 3)):
        assert contrast(colour, text_on(colour)) >= 4.5
    for text in heat(np.arange(144.0).reshape(12, 12)).texts:
        assert text.get_color() in ("black", "white")


def test_the_marks_of_a_drawing_stand_in_words_too():
    assert in_words("<svg><path/></svg>") == ""
    words = in_words("<rect><title>a &lt; b: 5 %</title></rect><g><title>c</title></g>")
    assert "<details" in words and "a &lt; b: 5 %<br>c" in words and "2 marks" in words


def test_bars_in_given_axes_with_awkward_words():
    import matplotlib.pyplot as plt

    given_axes = plt.subplots()[1]
    ax = bars([0.0, 1.0, 0.0], ["$x", "a$ \n", "$$"], ax=given_axes)
    assert ax is given_axes
    ax.figure.canvas.draw()
    assert [t.get_text() for t in bars([0.5, 0.5]).get_yticklabels()] == ["0", "1"]


@pytest.mark.parametrize(
    "args, says",
    [
        (([0.5, math.nan],), r"probabilities\[1\] is nan"),
        (([-0.1],), r"probabilities\[0\] is -0.1"),
        (([1.5],), r"probabilities\[0\] is 1.5"),
        (([],), "probabilities has length 0"),
        (([0.01] * 41,), "probabilities has length 41"),
        (([0.5, 0.5], ["a"]), "words has length 1"),
        (([0.5, 0.5], None, [True]), "keep has length 1"),
    ],
)
def test_bars_bad_input(args, says):
    with pytest.raises(ValueError, match=says):
        bars(*args)


def test_heat_prints_its_numbers_and_names():
    ax = heat([[0.5, 0.25], [0, -math.inf]], ["a", "b"], ["c", "d"], "two by two")
    assert ax.images[0].get_array().tolist()[0] == [0.5, 0.25]
    assert [t.get_text() for t in ax.texts] == ["0.500", "0.250", "0", "-inf"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["c", "d"]
    assert ax.get_title() == "two by two"
    ax.figure.canvas.draw()


def test_heat_sizes_and_own_axes():
    import matplotlib.pyplot as plt

    torch = pytest.importorskip("torch")
    assert len(heat(torch.rand(12, 12)).texts) == 144
    big = heat(torch.rand(13, 2))
    assert not big.texts and len(big.figure.axes) == 2  # a colour bar instead
    own = plt.subplots()[1]
    assert heat([[1]], ax=own) is own
    heat([[-math.inf, math.nan]]).figure.canvas.draw()


@pytest.mark.parametrize(
    "args, says",
    [
        (([],), "matrix"),
        (([[]],), "matrix"),
        (([[1, 2], [3]],), r"rows of length \[2, 1\]"),
        (([[1, 2]], ["a"]), "xlabels has length 1"),
        (([[1, 2]], None, ["a", "b"]), "ylabels has length 2"),
    ],
)
def test_heat_bad_input(args, says):
    with pytest.raises(ValueError, match=says):
        heat(*args)


def test_moves_of_an_automaton():
    ax = draw_moves({0: {" ": 1, "$x$": 2}, 1: {"a": 1}, 2: {"b": 0}}, {2})
    arrows = [text for text in ax.texts if text.get_text() == ""]
    names = [text for text in ax.texts if text.get_text()]
    assert [text.get_text() for text in names] == ["·", "$x$", "a", "b", "0", "1", "2"]
    assert [arrow.xy[0] > arrow.xyann[0] for arrow in arrows] == [True, True, True, False]
    assert names[1].get_position()[1] > names[0].get_position()[1] > 0 > names[3].get_position()[1]
    colours = [text.get_bbox_patch().get_facecolor() for text in names[-3:]]
    assert colours[0] == colours[1] != colours[2]


def test_figure_style_restores_what_it_changed():
    import matplotlib as mpl

    mpl.rcdefaults()  # nothing of the style is left from other tests
    before = dict(mpl.rcParams)
    with pytest.raises(KeyError), figure_style():
        assert mpl.rcParams["figure.facecolor"] == "white"
        cycle = [entry["color"] for entry in mpl.rcParams["axes.prop_cycle"]]
        assert cycle == list(PALETTE.values())
        raise KeyError
    assert dict(mpl.rcParams) == before


# In a browser


def open_page(browser, width, dark=False, touch=False):
    context = browser.new_context(
        viewport={"width": width, "height": 700},
        has_touch=touch,
        is_mobile=touch,
        java_script_enabled=True,
        offline=True,
    )
    page = context.new_page()
    look = "background:#111;color:#eee" if dark else ""
    many = 40
    view = tokens_html([" coffee", " like"] * many, [-0.7, -3.5] * many, [TOP] * 2 * many, "I")
    page.set_content(
        '<!doctype html><meta name="viewport" content="width=device-width">'
        f'<body style="{look}"><p>before</p>{view}<p style="margin-top:900px">after</p>'
    )
    return page


def inside(page):
    box = page.locator(".db-p:visible").bounding_box()
    size = page.viewport_size
    return (
        box["x"] >= 0
        and box["y"] >= 0
        and box["x"] + box["width"] <= size["width"]
        and box["y"] + box["height"] <= size["height"]
    )


def test_focus_shows_one_popup(browser):
    page = open_page(browser, 1280)
    assert page.locator(".db-p:visible").count() == 0
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    card = page.locator(".db-t:focus > .db-p")
    assert card.is_visible() and page.locator(".db-p:visible").count() == 1
    assert "3.0 %, 5.0 bits" in card.inner_text() and "50.0 %" in card.inner_text()
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"
    page.locator(".db-t").nth(5).hover()  # the hovered one takes over from the focused one
    assert page.locator(".db-p:visible").count() == 1
    page.context.close()


@pytest.mark.parametrize("width", [600, 1280])
def test_every_popup_stays_inside_the_window(browser, width):
    page = open_page(browser, width)
    for i in list(range(0, 80, 7)) + [79]:
        page.locator(".db-t").nth(i).hover()
        assert inside(page), i
    page.context.close()


def test_tap_on_a_phone(browser):
    page = open_page(browser, 375, touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.locator(".db-t").nth(7).tap()
    assert page.locator(".db-p:visible").count() == 1 and inside(page)
    page.locator(".db-t").nth(2).tap()
    assert page.locator(".db-p:visible").count() == 1 and inside(page)
    page.locator(".db-l").tap()  # anywhere else in the view closes it
    assert page.locator(".db-p:visible").count() == 0
    page.context.close()


@pytest.mark.parametrize("dark", [False, True])
def test_colours_follow_the_page(browser, dark):
    page = open_page(browser, 1280, dark=dark)
    page.keyboard.press("Tab")
    colour = "([s, p]) => getComputedStyle(document.querySelector(s))[p]"
    text = page.evaluate(colour, [".db-t", "color"])
    assert text == ("rgb(238, 238, 238)" if dark else "rgb(0, 0, 0)")
    assert page.evaluate(colour, [".db-t:focus>.db-p", "color"]) == "rgb(255, 255, 255)"
    assert page.evaluate(colour, [".db-t:focus>.db-p", "backgroundColor"]) == "rgb(34, 34, 34)"
    page.context.close()


# ---------------------------------------------------------------- a row on its way through a
# sampler


def stage(name, probabilities, removed, value=None):
    return SimpleNamespace(
        name=name,
        setting=value,
        probabilities=probabilities,
        removed=removed,
        mass=0.5,
        bits_before=2.0,
        bits=1.0,
    )


def test_a_trace_names_what_was_removed():
    last = stage("top_k", [1.0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6], 1)
    texts = S.stage_texts(last, ["a", "<b>", "$x$", "c", "d", "e", "f"])
    assert (
        texts["removed"] == "<b>, $x$, c, d and 2 more"
        and texts["kept"] == "1"
        and texts["setting"] == "1"
    )
    assert (
        S.stage_texts(last)["removed"].startswith("1, 2, 3, 4")
        and S.stage_texts(last, most=9)["removed"][-1] == "6"
    )
    table = S.trace_html(
        [stage("logits", [0.5, 0.5], []), last], ["a", "<b>", "$x$", "c", "d", "e", "f"]
    )
    assert (
        table.count("<tr>") == 3
        and "<b>" not in table
        and "$x$" not in table
        and "&lt;b&gt;" in table
    )


def test_a_trace_as_bars():
    rows = [
        stage("logits", torch.tensor([0.1, 0.6, 0.3]), []),
        stage("min_p", torch.tensor([0.0, 1.0, 0.0]), [2, 0]),
    ]
    figure = S.trace_figure(rows, ["a", "$", "c"], n=2)
    assert [[bar.get_width() for bar in ax.patches] for ax in figure.axes] == [
        pytest.approx([0.6, 0.3]),
        [1.0, 0.0],
    ]
    assert [[t.get_text() for t in ax.texts] for ax in figure.axes] == [[], [" ×"]]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [r"\$", "c"]


NAN = math.nan


def test_what_is_no_number_stays_none():
    assert math.isnan(surprisal(NAN)) and str(surprisal(0.0)) == "0.0"
