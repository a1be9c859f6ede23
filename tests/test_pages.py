"""What the build changes in rendered pages, on small pieces of HTML of both renderers."""

import re

import pytest
from pages import (
    better_index,
    folded,
    for_everyone,
    glossary_of,
    is_table,
    plain_math,
    plural,
    unbroken,
    with_terms,
)


@pytest.mark.parametrize(
    "tex, plain",
    [
        (r"-\log_2 p", "-log_2 p"),
        (r"\frac1n", "1/n"),
        (r"\tfrac{1}{2} \sum_j p_{j}", "1/2 ∑_j p_j"),
        (r"-\infty", "-∞"),
        (r"\text{score}(x) \le \mathrm{PE}", "score(x) ≤PE"),
        (r"\theta \in \{1, 2\}", "θ∈{1, 2}"),
    ],
)
def test_mathematics_is_said_in_words_and_signs(tex, plain):
    assert plain_math(tex) == plain


def test_no_line_ends_inside_a_number_or_before_a_comma():
    page = (
        "<main><p>All 49 152 of <code>49 152</code>, 52 % in 2 steps of 1 0000: "
        r'<span class="math inline">\(-\infty\)</span>, so</p></main><p>49 152</p>'
    )
    assert unbroken(page) == (
        "<main><p>All 49\xa0152 of <code>49 152</code>, 52\xa0% in 2 steps of 1 0000: "
        r'<span class="unbroken"><span class="math inline">\(-\infty\)</span>,</span> so'
        "</p></main><p>49 152</p>"
    )
    long = rf'<main><p><span class="math inline">\({"x + " * 9} y\)</span>.</p></main>'
    assert unbroken(long) == long
    assert unbroken("<p>49 152</p>") == "<p>49 152</p>"


def test_columns_are_told_from_text():
    assert is_table(["width  1: missed 80", "width  2: missed 44"]) and is_table(
        ["a   b", "1   2", "end"]
    )
    assert not is_table(["one line   of it"]) and not is_table(
        ["plain text", "and more", "with  a gap"]
    )
    assert not is_table(["a   " + "long " * 30, "b   " + "long " * 30])


QUARTO = (
    '<title>x</title><nav id="TOC" role="doc-toc"><h2>On this page</h2>'
    '<ul><li><a href="#a" id="toc-a" '
    'class="nav-link">A</a></li></ul></nav><div class="run-line">…</div><ul><li>later</li></ul>'
    '<div class="callout-header d-flex" data-bs-toggle="collapse" '
    'data-bs-target=".callout-1-contents" '
    'aria-controls="callout-1"></div><div class="callout-header"></div>'
    '<div class="cell-output cell-output-stdout"><pre><code>a  &lt;\nb  2</code></pre></div>'
)


def test_a_page_gets_contents_for_a_phone_headers_for_the_keyboard_and_frames_for_columns():
    page = for_everyone(QUARTO, "../")
    assert (
        '<summary>On this page</summary><ul><li><a href="#a">A</a></li></ul>'
        '</details>\n<div class="run-line">' in page
    )
    assert page.count("later") == 1 and page.count('id="toc-a"') == 1
    assert page.count('role="button" tabindex="0"') == 1 and '<pre class="columns"><code>a' in page
    assert '<script src="../book.js" defer></script>' in page
    assert for_everyone("<p>nothing to do</p>", "") == "<p>nothing to do</p>"


def test_the_index_is_in_the_order_of_the_book_and_knows_what_a_section_defines():
    pages = {
        "b.html": '<section id="s">The scores are <strong>logits</strong>, '
        "<strong>a sentence in bold is not one"
        r'</strong> <span class="math inline">\(x \le 1\)</span></section>',
        "a.html": "",
    }
    entries = [
        {"href": "a.html", "text": r"\le", "title": "A", "section": ""},
        {"href": "b.html#s", "text": r"logits x \le 1", "title": "B", "section": "S"},
    ]
    first, second = better_index(entries, pages)
    assert first["terms"] == "logits" and first["text"] == "logits x ≤1"
    assert second["text"] == r"\le" and second["terms"] == ""  # code, not mathematics


# Pandoc's sections, as both renderers have them; Quarto's attributes come in another order.
MARKED = [
    '<section id="as-it-is-shipped" class="level2">\n<h2 class="anchored" data-anchor-id="x">As it '
    'is shipped</h2>\n<div class="shipped-note">\n<p>4 minutes</p>\n</div>',
    '<section class="level2" id="as-it-is-shipped">\n<h2>As it is shipped</h2>',
]


@pytest.mark.parametrize("start", MARKED)
def test_what_stands_below_the_mark_is_a_part_that_folds(start):
    below = '\n<p>below</p><section id="a"><h3>A</h3><section></section></section>\n'
    after = '</section>\n<section id="references"><h2>References</h2></section>'
    page = folded("<main><h2>first</h2>" + start + below + after)
    before, part = page.split(start + '\n<div class="shipped" id="below-the-mark"><script>\n')
    script, part = part.split("</script>", 1)
    assert before == "<main><h2>first</h2>" and "until-found" in script
    assert part == below + "</div>\n<script>shipped.look()</script>\n" + after
    assert "</" not in script


def test_a_page_without_the_mark_is_not_folded():
    page = '<section id="in-short"><h2>In short</h2>As it is shipped</section>'
    assert folded(page) == page


# ---- words of the glossary

GLOSSARY = glossary_of(
    '<main><ul><li><a id="law"></a><strong>law</strong>: All &lt; one. '
    '<a href="sampler.html#x">S</a></li><li>\n<a id="tied-rows"></a><strong>tied rows</strong>, '
    "<strong>tie</strong>: Equal. "
    '<a href="notation.html">N</a></li><li><a id="top-p"></a><strong>top-p</strong>: Mass. '
    '<a href="topp.html">P</a></li><li><a id="key"></a><strong>key</strong>: Names. '
    '<a href="noise.html">K</a></li></ul></main>'
)
NO_PROSE = [
    "<h2>A law</h2>",
    "<p><code>law</code></p>",
    "<p><a href='x.html'>the <em>law</em></a></p>",
    '<p><span class="math inline">\\(law\\)</span></p>',
    '<div class="cell"><p>law</p></div>',
    '<div class="callout callout-tip"><div><p>law</p></div></div>',
    "<p><svg><text>law</text></svg></p>",
    '<section id="references" class="level2"><p>law</p></section>',
    '<div class="run-line"><p>law</p></div>',
    "<table><tr><td>law</td></tr></table>",
    "<p>lawful, in-law, law-like</p>",
    "<p>law of this very page</p>",
]


def test_words_have_plurals():
    assert [plural(w) for w in ("law", "penalty", "hypothesis", "bits", "KV cache")] == [
        "laws",
        "penalties",
        "hypotheses",
        "bits",
        "KV caches",
    ]


def test_the_glossary_is_read_with_places_meanings_and_homes():
    assert GLOSSARY["law"] == ("law", "law: All < one. S", "sampler.html")
    assert GLOSSARY["ties"] == GLOSSARY["tied rows"] == GLOSSARY["tie"]


def test_the_first_use_of_a_word_in_running_text_is_a_link():
    page = (
        "<main><p>No <b>Law</b> and no law.<br>Two<br>ties and a tie.</p><li>top-p</li></main>law"
    )
    assert with_terms(page, GLOSSARY, "a/loop.html", "../") == (
        '<main><p>No <b><a class="term" href="../glossary.html#law" title="law: All &lt; one. S">'
        'Law</a></b> and no law.<br>Two<br><a class="term" href="../glossary.html#tied-rows" '
        'title="tied rows, tie: Equal. N">ties</a> and a tie.</p><li><a class="term" '
        'href="../glossary.html#top-p" title="top-p: Mass. P">top-p</a></li></main>law'
    )


@pytest.mark.parametrize("part", NO_PROSE)
def test_no_other_place_gets_a_link(part):
    name = "sampler.html" if "this very page" in part else "loop.html"
    page = f"<main>{part}<p>and then the law</p></main>"
    new = with_terms(page, GLOSSARY, name)
    assert part in new and (">law</a></p>" in new) == (name == "loop.html")


def test_some_pages_and_keys_get_no_link():
    for name, words in (
        ("glossary.html", "law"),
        ("references.html", "law"),
        ("a.html", "tab key"),
    ):
        assert "term" not in with_terms(f"<main><p>{words}</p></main>", GLOSSARY, name)


def test_the_site_links_words_to_places_that_the_glossary_has(site):
    glossary = (site / "glossary.html").read_text(encoding="utf-8")
    assert len(set(re.findall(r'<a id="([\w-]+)"></a><strong>', glossary))) >= 40
    page = (site / "topk.html").read_text(encoding="utf-8")
    places = re.findall(r'class="term" href="glossary.html#([\w-]+)"', page)
    assert len(places) == len(set(places)) >= 5 and "logit" in places and "top-k" not in places
