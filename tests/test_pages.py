"""What the build changes in rendered pages, on small pieces of HTML of both renderers."""

import pytest
from pages import better_index, folded, for_everyone, is_table, plain_math


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
