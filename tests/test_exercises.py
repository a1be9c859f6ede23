"""Exercises and visible cells: whoever runs a notebook is told if an empty hole passes its check or
the solution fails it (`make book` runs them all), and a page imports what it uses."""

import builtins
import json
import re
import subprocess
import symtable
import sys
from pathlib import Path

import nbformat
import pytest
from execute import CHECK
from nbfilter import split_directives, text

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
SENTENCE = (
    "Write the line marked `hole`, take the `#` away before the check, and run both: "
    "no error means solved."
)


def cells(path):
    return nbformat.read(path, as_version=4).cells


@each_notebook
def test_an_exercise_is_a_hole_a_check_for_the_reader_and_a_solution_that_passes_it(path):
    found = cells(path)
    code = [c.source for c in found if c.cell_type == "code"]
    holes = [i for i, source in enumerate(code) if "# hole" in source]
    for i in holes:
        call = CHECK.search(code[i + 1])
        assert call and code[i + 1].endswith(call[0]), f"{code[i + 1]}\nends without the check"
        name, answer = re.fullmatch(r"(check_\w+)\((\w+)\)", call[1]).groups()
        assert f"def {name}(" in code[i + 1]
        assert re.search(rf"^(def {answer}\(|{answer} = )", code[i], re.M), code[i]
        solution = "\n".join(code[i + 2 : i + 4])  # its imports may stand in a cell of their own
        assert call[1] in solution.splitlines(), f"{solution}\ndoes not try the solution"
    headings = [c.source for c in found if re.search("^## Exercises$", c.source, re.M)]
    assert len(headings) == bool(holes)
    assert all(f"## Exercises\n\n{SENTENCE}\n" in source for source in headings)
    assert sum(bool(CHECK.search(source)) for source in code) == len(holes)


def run(project, *names):
    "Run notebooks of the copy `project` as `make` does: (exit status, what went wrong)."
    done = subprocess.run(
        [sys.executable, project / "tools/execute.py", "--jobs", "1", *names],
        text=True,
        capture_output=True,
    )
    return done.returncode, done.stderr


def test_a_hole_that_passes_and_a_solution_that_fails_are_found_when_the_notebook_runs(project):
    path = project / "nbs/00_notation.ipynb"
    before = path.read_text(encoding="utf-8")
    solved = before.replace(
        "    ...                                          # hole",
        "    return row.sort(stable=True).indices            # hole",
    )
    broken = before.replace("    return row.sort(stable=True).indices", "    return row")
    assert before not in (solved, broken)
    for name, changed in (("solved", solved), ("broken", broken)):
        path.with_name(f"{name}.ipynb").write_text(changed, encoding="utf-8")
    status, wrong = run(project, path.name, "solved.ipynb", "broken.ipynb")
    assert status == 1
    assert [c.source for c in cells(path)] == [c.source for c in cells(ROOT / "nbs" / path.name)]
    assert "2 of 3 failed: solved.ipynb, broken.ipynb" in wrong
    assert "The empty hole passes the check." in wrong and "check_below(from_below)" in wrong


# ---- a page can be copied


def visible_code(path):
    "The code cells that the page shows, folded or not."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        directives, code = split_directives(text(cell)) if cell["cell_type"] == "code" else ({}, "")
        if code and "hide" not in directives:
            yield code


def scopes(table):
    yield table
    for inner in table.get_children():
        yield from scopes(inner)


def missing(sources):
    """Names that the cells use and none of them defines, or none before it where the line runs at
    once."""
    known, later, lost = {*dir(builtins), "display", "__name__"}, set(), set()
    for source in sources:
        table = symtable.symtable(source, "cell", "exec")
        names = table.get_symbols()
        known |= {s.get_name() for s in names if s.is_assigned() or s.is_imported()}
        lost |= {s.get_name() for s in names if s.is_referenced()} - known
        later |= {
            s.get_name()
            for t in scopes(table)
            if t is not table
            for s in t.get_symbols()
            if s.is_global()
        }
    return sorted(lost | later - known)


def test_missing_names_are_found():
    assert missing(["import a as b", "b.x = c", "c = 1"]) == ["c"]
    assert missing(["def f(x): return g(x) + h", "def g(y): return [z for z in y]"]) == ["h"]
    assert missing(["test_eq(1, 1)", "from fastcore.test import test_eq"]) == ["test_eq"]
    assert missing(["class A:\n    def f(self): return A, B", "print(len(A().f()))"]) == ["B"]


@each_notebook
def test_the_visible_cells_of_a_page_define_every_name_they_use(path):
    assert not missing(visible_code(path))


@each_notebook
def test_figures_are_drawn_in_the_book_s_style(path):
    for source in (c.source for c in cells(path) if c.cell_type == "code"):
        assert "subplots(" not in source or "figure_style()" in source or "def panels" in source, (
            source
        )
