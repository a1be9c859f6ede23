"""What tools/build_site.py changes in rendered pages, whichever renderer made them: for keyboards,
phones, and the search."""

import json
import re
from html import escape, unescape
from pathlib import Path

HEADER = re.compile(r'<div class="callout-header(?=[^>]*data-bs-toggle)(?![^>]*\srole=)')
OUTPUT = re.compile(r'(<div class="cell-output[^>]*>\s*<pre)(>.*?</pre>)', re.S)
CONTENTS = re.compile(r'<nav id="TOC".*?(<ul.*?)</nav>', re.S)
MATH = re.compile(r'<span class="math \w+">\\[(\[](.*?)\\[)\]]</span>', re.S)
TAG = re.compile(r"<[^>]+>")
MARK = re.compile(
    r'<section\b(?=[^>]*\bid="as-it-is-shipped")[^>]*>\s*<h2\b.*?</h2>'
    r'(?:\s*<div class="shipped-note">.*?</div>)?',
    re.S,
)
TERM = re.compile(r'<li>\s*<a id="([\w-]+)"></a>(.*?)</li>', re.S)
PIECE = re.compile(  # of a page: what holds no prose in one piece, and every other tag
    r"(<!--.*?-->|<script\b.*?</script>|<style\b.*?</style>|<svg\b.*?</svg>|<[^>]+>)", re.S
)
PROSE = {"p", "li"}
NO_PROSE = {"a", "code", "pre", "h1", "h2", "h3", "h4", "button", "summary", "header", "nav"}
APART = re.compile(  # parts that are no running text
    r'class="[^"]*\b(?:math|cell|callout|run-line|toc-phone|shipped-note|exported|katex)\b'
    r'|id="references"'
)
WITHOUT_TERMS = {"glossary.html", "references.html"}
NUMBER = re.compile(r"(?<=\d) (?=\d{3}(?!\d)|%)")  # as this book writes them: 49 152, 52 %
FORMULA = re.compile(  # in running text, with what must not start a line after it
    r'(<span class="math inline">\\\(([^<]*)\\\)</span>)([,.;:?!)]+)'
)
SHORT = 20  # signs of a formula that fits on any line
EMPTY = {"br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
FOLD = Path(__file__).with_name("fold.js")
PLACE = 'class="knob-board"'  # a page with it gets the knob board's scripts
LIVE = 'class="knob-board kb-live"'  # and those of the model that runs in the page
BOARD = """<link rel="stylesheet" href="{up}board/board.css">
<script src="{up}board/draw.js" defer></script>
<script src="{up}board/board.js" defer></script>
"""
ENGINE = """<link rel="stylesheet" href="{up}play/play.css">
<script src="{up}play/engine.js" defer></script>
<script src="{up}play/beam.js" defer></script>
<script src="{up}play/play.js" defer></script>
"""
SIGNS = {
    "infty": "∞",
    "sum": "∑",
    "prod": "∏",
    "log": "log",
    "le": "≤",
    "leq": "≤",
    "ge": "≥",
    "geq": "≥",
    "cdot": "·",
    "times": "×",
    "dots": "…",
    "ldots": "…",
    "cdots": "…",
    "approx": "≈",
    "in": "∈",
    "mid": "|",
    "to": "→",
    "ne": "≠",
    "neq": "≠",
    "pm": "±",
    "sqrt": "√",
    "ln": "ln",
    "exp": "exp",
    "max": "max",
    "min": "min",
    "alpha": "α",
    "beta": "β",
    "gamma": "γ",
    "delta": "δ",
    "epsilon": "ε",
    "varepsilon": "ε",
    "theta": "θ",
    "lambda": "λ",
    "mu": "μ",
    "pi": "π",
    "sigma": "σ",
    "tau": "τ",
    "lfloor": "⌊",
    "rfloor": "⌋",
    "lceil": "⌈",
    "rceil": "⌉",
    "quad": " ",
    "qquad": " ",
    "left": "",
    "right": "",
    "big": "",
    "Big": "",
}


def plain_math(
    tex,  # TeX, as the author wrote it
):
    r"The words and signs of a formula, on one line: `\frac1n` is `1/n`."
    tex = re.sub(r"\\[dt]?frac\s*(\{[^{}]*\}|\w)\s*(\{[^{}]*\}|\w)", r"\1/\2", tex)
    tex = re.sub(r"\\(begin|end)\{\w+\}", " ", tex)
    tex = re.sub(
        r"\\([A-Za-z]+) ?",
        lambda m: SIGNS.get(
            m[1], "" if m[1].startswith(("text", "math", "operator")) else m[1] + " "
        ),
        tex,
    )
    tex = re.sub(r"\\([{}%$&_#])", r"\1", re.sub(r"(?<!\\)[{}]|\\[,;:! \\]|&", "", tex))
    return " ".join(tex.split())


def is_table(
    lines,  # of an output
):
    """Whether it is set in columns: short lines, and most with a gap of spaces after their first
    word."""
    gaps = sum(bool(re.search(r"\S {2,}\S", line)) for line in lines)
    return len(lines) > 1 and gaps > len(lines) / 2 and max(map(len, lines)) <= 100


def frame(
    match,  # An output's text, as HTML
):
    "The output, marked where it is set in columns: those scroll, other text wraps."
    table = is_table(unescape(TAG.sub("", "<pre" + match[2])).splitlines())
    return match[1] + (' class="columns"' if table else "") + match[2]


def plural(
    term,  # One word or several
):
    "More than one of it."
    for end, ends in {"y": "ies", "is": "es", "s": "s", "": "s"}.items():
        if term.endswith(end):
            return term.removesuffix(end) + ends


def glossary_of(
    page,  # HTML of the glossary
):
    "Word -> (its place in the glossary, what is said of it, the page that explains it)."
    words = {}
    for place, item in TERM.findall(page):
        said = " ".join(unescape(TAG.sub("", item)).split())
        home = re.search(r'href="([^"#]+)', item)
        for term in re.findall(r"<strong>(.*?)</strong>", item.partition(": ")[0]):
            for form in (term, plural(term)):
                words[form.lower()] = (place, said, home[1] if home else None)
    return words


def prose_of(
    pieces,  # A page, split by `PIECE`: text and tags in turn
):
    "The places of the pieces that are running text."
    inside = []  # of each open tag: its name, and whether text in it is prose (None: not decided)
    for n, piece in enumerate(pieces):
        if n % 2 == 0:
            kinds = [kind for _, kind in inside]
            if piece.strip() and True in kinds and False not in kinds:
                yield n
            continue
        tag = re.match(r"<(/?)(\w+)", piece)
        if not tag or tag[2] in EMPTY | {"script", "style", "svg"}:
            continue
        if tag[1]:
            while inside and inside.pop()[0] != tag[2]:
                pass
        else:
            apart = tag[2] in NO_PROSE or APART.search(piece)
            prose = True if tag[2] in PROSE else None
            inside.append((tag[2], False if apart else prose))


def with_terms(
    page,  # HTML of a rendered page
    words,  # `glossary_of` the glossary
    name,  # The page's, as links give it
    up="",  # The way to the site's top
):
    """The page with the first use of each of the glossary's words as a link to it, in running text
    only. The page that explains a word needs no such link."""
    words = {word: entry for word, entry in words.items() if entry[2] != name}
    start, end = page.find("<main"), page.find("</main>")
    if not words or start < 0 or name in WITHOUT_TERMS:
        return page
    any_word = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w-])(?<!tab )(?:{any_word})(?![\w-])", re.I)
    seen = set()

    def link(match):
        place, said, _ = words[match[0].lower()]
        if place in seen:
            return match[0]
        seen.add(place)
        title = escape(said)
        return f'<a class="term" href="{up}glossary.html#{place}" title="{title}">{match[0]}</a>'

    pieces = PIECE.split(page[start:end])
    for n in prose_of(pieces):
        pieces[n] = pattern.sub(link, pieces[n])
    return page[:start] + "".join(pieces) + page[end:]


def unbroken(
    page,  # HTML of a rendered page
):
    "The page with no line's end inside a number, or between a short formula and its comma."
    start, end = page.find("<main"), page.find("</main>")
    pieces = PIECE.split(page[start:end])
    for n in prose_of(pieces):
        pieces[n] = NUMBER.sub("\N{NO-BREAK SPACE}", pieces[n])

    def keep(match):
        if len(plain_math(unescape(match[2]))) > SHORT:
            return match[0]
        return f'<span class="unbroken">{match[0]}</span>'

    main = FORMULA.sub(keep, "".join(pieces))
    return page[:start] + main + page[end:] if 0 <= start < end else page


def end_of_section(
    page,  # HTML
    start,  # Where its first tag ends
):
    "Where the section's closing tag begins."
    depth = 1
    for tag in re.compile(r"<(/?)section\b").finditer(page, start):
        depth += -1 if tag[1] else 1
        if not depth:
            return tag.start()
    return len(page)


def folded(
    page,  # HTML of a rendered page
):
    "The page with what follows its mark in a part of its own, which folds before it is painted."
    mark = MARK.search(page)
    if not mark:
        return page
    end = end_of_section(page, mark.end())
    script = FOLD.read_text(encoding="utf-8").strip()
    start = f'<div class="shipped" id="below-the-mark"><script>\n{script}\n</script>'
    close = "</div>\n<script>shipped.look()</script>\n"
    return f"{page[: mark.end()]}\n{start}{page[mark.end() : end]}{close}{page[end:]}"


def for_everyone(
    page,  # HTML of a rendered page
    up,  # The way to the site's top: "" or "../" and so on
):
    """The page with headers that a keyboard reaches, frames for tables and, for a phone, its
    contents on top; below the mark it is folded."""
    page = folded(page)
    page = HEADER.sub(r'<div role="button" tabindex="0" class="callout-header', page)
    page = re.sub(r'(<i class="bi [\w-]+") role="img"></i>', r'\1 aria-hidden="true"></i>', page)
    page = OUTPUT.sub(frame, page)
    if contents := CONTENTS.search(page):
        entries = re.sub(r' (id|class|data-[\w-]+)="[^"]*"', "", contents[1])
        short = f'<details class="toc-phone"><summary>On this page</summary>{entries}</details>\n'
        page = page.replace('<div class="run-line">', short + '<div class="run-line">', 1)
    scripts = BOARD if PLACE in page or LIVE in page else ""
    scripts += ENGINE if LIVE in page else ""
    scripts += '<script src="{up}book.js" defer></script>'
    return page.replace("</title>", "</title>\n" + scripts.format(up=up), 1)


def terms(
    page,  # HTML of a rendered page
):
    "Section -> its terms: what it sets in bold, in up to three words."
    found, parts = {}, re.split(r'<section id="([^"]*)"', page)
    for name, part in zip(["", *parts[1::2]], parts[::2]):
        bold = [unescape(TAG.sub("", b)) for b in re.findall(r"<strong>(.*?)</strong>", part, re.S)]
        found[name] = " ".join(b for b in bold if len(b.split()) <= 3)
    return found


def better_index(
    entries,  # The search index: objects with href, title, section, text
    pages,  # Page -> its HTML, in the order of the book
):
    "The index in the order of the book, without TeX, with the terms that each section defines."
    # a chapter defines a word, the glossary only says it again
    found = {name: terms(page) for name, page in pages.items() if name != "glossary.html"}
    order = {name: n for n, name in enumerate(pages)}
    for entry in entries:
        name, _, section = entry["href"].partition("#")
        entry["terms"] = found.get(name, {}).get(section, "")
        for tex in sorted(set(MATH.findall(pages.get(name, ""))), key=len, reverse=True):
            tex = " ".join(unescape(tex).split())
            if "\\" in tex or "{" in tex:
                entry["text"] = entry["text"].replace(tex, plain_math(tex))
    return sorted(entries, key=lambda e: order.get(e["href"].partition("#")[0], len(order)))


def improve(
    site,  # The rendered site
):
    "Change every page, and the search index."
    pages, glossary = {}, site / "glossary.html"
    words = glossary_of(glossary.read_text(encoding="utf-8")) if glossary.is_file() else {}
    for path in sorted(site.rglob("*.html")):
        up = "../" * (len(path.relative_to(site).parts) - 1)
        pages[path.relative_to(site).as_posix()] = page = path.read_text(encoding="utf-8")
        page = with_terms(unbroken(page), words, path.relative_to(site).as_posix(), up)
        path.write_text(for_everyone(page, up), encoding="utf-8")
    index = site / "search.json"
    if index.is_file():
        order = list(
            dict.fromkeys(re.findall(r'href="(?:\./)?([\w/-]+\.html)"', pages["index.html"]))
        )
        pages = {name: pages[name] for name in order + list(pages) if name in pages}
        entries = better_index(json.loads(index.read_text(encoding="utf-8")), pages)
        index.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
