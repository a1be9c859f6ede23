"Two depths: a chapter's idea is short and stands before the mark; what is shipped comes after."

import json
import re

import pytest
from helpers.project_files import NOTEBOOKS, ROOT
from nbfilter import split_directives
from test_exercises import missing

MARK = "## As it is shipped"
MOST_WORDS, MOST_LINES, LONGEST_PLAIN = 1300, 60, 15
SET_APART = re.compile(r"```.*?```|^:::.*$|<svg.*?</svg>|<!--.*?-->", re.S | re.M)


def read(path):
    "(kind, source) of a notebook's cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(c["cell_type"], "".join(c["source"])) for c in cells]


def is_marked(kind, source):
    return kind == "markdown" and re.search(rf"^{MARK}$", source, re.M)


def first_depth(path):
    "The cells before the mark, or None where a notebook has no mark."
    found = read(path)
    places = [i for i, cell in enumerate(found) if is_marked(*cell)]
    assert len(places) < 2, "the mark stands once"
    return found[: places[0]] if places else None


def without_solutions(found):
    "The cells that are not folded in a callout with a solution."
    inside, out = False, []
    for kind, source in found:
        if kind == "markdown" and re.search(r"^:::", source, re.M):
            inside = "## Solution" in source.rsplit(":::", 1)[1]
        if kind == "markdown" or not inside:
            out.append((kind, source))
    return out


def words(found):
    "Words of prose; fences, drawings and the marks of callouts apart."
    return sum(len(SET_APART.sub(" ", s).split()) for kind, s in found if kind == "markdown")


def shown(source):
    "A cell's lines of code, if readers see it unfolded."
    lines = [x for x in source.splitlines() if x.strip() and not x.startswith("#|")]
    folded = re.search(r"^#\|\s*(hide\b|code-fold: true)", source, re.M) or all(
        re.match(r"\s*(from|import|#|[\w, ]+\)$)", x) for x in lines
    )
    return [] if folded else lines


MARKED = [p for p in NOTEBOOKS if first_depth(p) is not None]


def test_chapters_have_two_depths_and_the_appendix_one():
    "What is looked up has no mark: the notation, the index, and what has a letter for a number."
    chapters = {p.stem for p in NOTEBOOKS if re.match(r"\d\d_", p.stem)} - {"00_notation"}
    assert {p.stem for p in MARKED} == chapters


def test_numbers_in_prose_have_one_format():
    "49 152 and 52 %, not 49,152 and 52%."
    apart = re.compile(r"`[^`]*`|<[^>]*>|\]\([^)]*\)")
    for path in NOTEBOOKS:
        for kind, source in read(path):
            if kind == "markdown":
                prose = apart.sub("", SET_APART.sub("", source)).split("## References")[0]
                assert not re.search(r"\b\d{1,3},\d{3}\b|\d%", prose), (path.stem, prose)


@pytest.mark.parametrize("path", MARKED, ids=lambda p: p.stem)
def test_the_idea_is_short(path):
    idea = without_solutions(first_depth(path))
    lines = sum(len(shown(s)) for kind, s in idea if kind == "code")
    assert (words(idea) <= MOST_WORDS, lines <= MOST_LINES) == (True, True), (words(idea), lines)


@pytest.mark.parametrize("path", MARKED, ids=lambda p: p.stem)
def test_the_idea_is_whole(path):
    "Problem, a summary and something to try stand before the mark; only references after it."
    heads = re.findall(
        r"^## (.+)$", "\n".join(s for k, s in first_depth(path) if k != "code"), re.M
    )
    assert {"The problem", "In short", "Exercises"} <= set(heads)
    prose = "\n".join(s for k, s in read(path) if k == "markdown")
    after = re.findall(r"^## (.+)$", prose.split(MARK + "\n", 1)[1], re.M)
    assert set(after) <= {"References", "Solution"}


@pytest.mark.parametrize("path", MARKED, ids=lambda p: p.stem)
def test_plain_forms_are_short(path):
    "No function before the mark is longer than a page of a notebook shows at a glance."
    for kind, source in first_depth(path):
        if kind == "code":
            for text in re.split(r"(?m)^(?=def )", source):
                body = [x for x in text.splitlines()[1:] if x.startswith((" ", ")"))]
                assert not text.startswith("def ") or len(body) <= LONGEST_PLAIN, text


@pytest.mark.parametrize("path", MARKED, ids=lambda p: p.stem)
def test_the_idea_uses_nothing_from_below_the_mark(path):
    "Who stops at the mark has run everything that the idea needs."
    assert not missing(split_directives(s)[1] for kind, s in first_depth(path) if kind == "code")


def test_the_index_marks_the_chapters_that_call_themselves_optional():
    def page(path):
        return re.search(r"output-file: (\S+)", read(path)[0][1])[1]

    optional = {page(p) for p in NOTEBOOKS if any("**Optional reading**" in s for _, s in read(p))}
    prose = "\n".join(s for _, s in read(ROOT / "nbs/index.ipynb"))
    assert set(re.findall(r"\((\S+\.html)\) ◦ \|", prose)) == optional and len(optional) == 6
