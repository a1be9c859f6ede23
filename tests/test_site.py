"""The built site: links and anchors resolve, nothing comes from elsewhere, every chapter is in the
navigation."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from nbfilter import page_names

ROOT = Path(__file__).resolve().parent.parent
LOADS = {
    ("script", "src"),
    ("img", "src"),
    ("link", "href"),
    ("source", "src"),
    ("iframe", "src"),
    ("video", "src"),
    ("audio", "src"),
    ("image", "href"),
    ("object", "data"),
}
CSS_URL = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s*['\"]([^'\"]+)")


class Links(HTMLParser):
    "Collects what a page links to, what it loads, its anchors and its navigation."

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids, self.styles = [], [], set(), []
        self.sidebar, self.turns, self.tag = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tag = tag
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        for key, value in attrs.items():
            if (tag, key) in LOADS and value:
                self.loads.append(value)
            if key == "style" and value:
                self.styles.append(value)
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
            if "sidebar-link" in (attrs.get("class") or ""):
                self.sidebar.append(attrs["href"])
            if "pagination-link" in (attrs.get("class") or ""):
                self.turns.append(attrs["href"])

    def handle_data(self, data):
        if self.tag == "style":
            self.styles.append(data)

    def handle_endtag(self, tag):
        self.tag = None


@pytest.fixture(scope="module")
def pages(site):
    return {p: Links(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}


def chapters():
    "Page names in the order of `_quarto.yml`."

    def walk(entry):
        if isinstance(entry, str):
            return [entry]
        items = entry.get("contents", []) if isinstance(entry, dict) else entry
        return [name for item in items for name in walk(item)]

    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    pages = page_names(ROOT)
    return [pages.get(Path(n).name, n) for n in walk(config["website"]["sidebar"])]


def remote(url):
    return url.startswith("//") or urlsplit(url).scheme not in ("", "data")


def test_every_internal_link_and_anchor_resolves(site, pages):
    broken = []
    for path, page in pages.items():
        for href in page.links:
            if urlsplit(href).scheme or href.startswith("//"):
                continue
            target, _, anchor = href.partition("#")
            file = (path.parent / unquote(target.partition("?")[0])).resolve() if target else path
            if file.is_dir():
                file = file / "index.html"
            if not file.is_file():
                broken.append(f"{path.name}: {href}")
            elif file.name in ("board.html", "play.html") and "=" in anchor:
                continue  # settings, which tests/test_board.py and test_play.py try
            elif anchor and file in pages and unquote(anchor) not in pages[file].ids:
                broken.append(f"{path.name}: {href} (no such anchor)")
    assert not broken, "\n".join(broken)


def test_every_file_a_page_loads_is_in_the_site(site, pages):
    missing = [
        f"{path.name}: {url}"
        for path, page in pages.items()
        for url in page.loads
        if not remote(url)
        and not url.startswith(("data:", "#"))
        and not (path.parent / unquote(url.partition("?")[0])).is_file()
    ]
    assert not missing, "\n".join(missing)


def test_nothing_is_loaded_from_elsewhere(site, pages):
    outside = [f"{p.name}: {u}" for p, page in pages.items() for u in page.loads if remote(u)]
    sheets = {p: p.read_text(encoding="utf-8") for p in site.rglob("*.css")}
    sheets |= {path: "\n".join(page.styles) for path, page in pages.items()}
    for path, text in sheets.items():
        for match in CSS_URL.finditer(text):
            url = match[1] or match[2]
            if remote(url):
                outside.append(f"{path.name}: {url}")
            elif not url.startswith(("data:", "#")):
                file = path.parent / unquote(re.split(r"[?#]", url)[0])
                assert file.is_file(), f"{path.name}: {url} is not in the site"
    assert not outside, "\n".join(outside)


def test_every_notebook_is_in_the_navigation(site):
    assert sorted(chapters()) == sorted(page_names(ROOT).values())
    for page in chapters():
        assert (site / f"{page}.html").is_file(), page


def test_the_navigation_has_the_chapters_in_order(pages):
    order = [f"{c}.html" for c in chapters()]
    for path, page in pages.items():
        if path.name in order and path.parent == next(iter(pages)).parent:
            seen = [Path(h).name for h in page.sidebar if Path(h).name in order]
            assert list(dict.fromkeys(seen)) == order, path.name


def test_previous_and_next_follow_the_order(site, pages):
    order = [f"{c}.html" for c in chapters()]
    for i, name in enumerate(order):
        near = [Path(h).name for h in pages[site / name].turns]
        assert near == order[max(0, i - 1) : i] + order[i + 1 : i + 2], name


def test_every_chapter_says_how_to_run_it_and_links_its_source(site):
    for name, page in page_names(ROOT).items():
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        assert f"nbs/{name}" in text, name
        if re.match(r"\d|[A-Z]_", name):
            assert "colab.research.google.com/github/" in text and "make lab" in text, name


def test_pages_have_one_title_and_no_error(site, pages):
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert text.count("<h1") == 1, f"{path.name}: {text.count('<h1')} first-level headings"
        assert "cell-output-error" not in text, path.name


def test_words_for_figures_are_words(site):
    for path in site.glob("*.html"):
        for alt in re.findall(r'<img[^>]*?\balt="([^"]*)"', path.read_text(encoding="utf-8")):
            assert len(alt) > 25 and not re.match(r"#|pip |\\", alt), (path.name, alt)
