"""The house rules: what modules take from each other; how long cells, functions and lines may be;
style and spelling."""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.project_files import MODULES, NOTEBOOKS, ROOT, cells, tracked

LONGEST_CELL, LONGEST_FUNCTION, WIDEST = 30, 25, 100
REASON = "# long: "  # on the line of a longer function's `def`, or the one before


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def exported(path):
    "The names in a module's `__all__`."
    for node in parse(path).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def own_imports(path):
    "(module, name) of what a module takes from the package, at its top or within functions."
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = (node.module or "").removeprefix("decoding_book").lstrip(".")
        if node.level or (node.module or "").startswith("decoding_book"):
            yield from ((module, a.name) for a in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_private_name_crosses_a_wall(path):
    found = [f"{m}.{n}" for m, n in own_imports(path) if n.startswith("_")]
    assert found == []


def test_no_name_is_exported_twice():
    "But by a module that says so (`_all_`, a name that lived there once and is imported)."
    homes = Counter(
        name for path in MODULES for name in set(exported(path)) - {n for _, n in own_imports(path)}
    )
    assert {name for name, n in homes.items() if n > 1} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_cell_is_long(path):
    sizes = {n: sum(map(bool, s.split("\n"))) for n, s in cells(path)}
    assert {n: size for n, size in sizes.items() if size > LONGEST_CELL} == {}


def functions(path):
    """(name, its size, the text around its `def`). The size is in lines without the signature and
    the docstring; in scripts, which a formatter lays out, in statements."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        size = sum(isinstance(n, ast.stmt) for part in body for n in ast.walk(part))
        if path in MODULES:
            size = len([x for x in lines[body[0].lineno - 1 : node.end_lineno] if x.strip()])
        yield node.name, size, "\n".join(lines[max(0, node.lineno - 2) : node.lineno])


SCRIPTS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_long_function_says_why(path):
    long = {
        name: size
        for name, size, around in functions(path)
        if size > LONGEST_FUNCTION and REASON not in around
    }
    assert long == {}


def code(path):
    """(place, source) of what a file holds of code. The package's own lines are those of cells,
    between lines that the export writes; whoever breaks a line on purpose may write a long one."""
    if path.suffix == ".ipynb":
        yield from ((f"cell {n}", source) for n, source in cells(path))
    elif (
        path.suffix in {".py", ".toml", ".css", ".js", ".yml", ".yaml"} or path.parent.name == ".ci"
    ):
        if path.parent.name not in {"decoding_book", "breaks"}:
            yield "line", path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", tracked(), ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_are_at_most_100_columns_wide(path):
    wide = [
        f"{place}: {line}"
        for place, source in code(path)
        for line in source.splitlines()
        if len(line) > WIDEST
    ]
    assert wide == []


@pytest.mark.parametrize("command", [["check", "--quiet"], ["format", "--check", "--quiet"]])
def test_scripts_and_tests_are_in_the_style_of_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def misspelt(folder):
    "What codespell finds in a folder, by the words of .codespellrc."
    done = subprocess.run(
        [Path(sys.executable).with_name("codespell"), folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def test_words_are_spelt_as_dictionaries_have_them(tmp_path):
    for path in tracked():
        text = path.read_text(encoding="utf-8") if path.suffix in {".md", ".py", ".toml"} else ""
        if path.suffix == ".ipynb":
            nb = json.loads(path.read_text(encoding="utf-8"))
            text = "\n".join("".join(c["source"]) for c in nb["cells"])
        if text:
            name = str(path.relative_to(ROOT)).replace("/", "-")
            (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    assert len(list(tmp_path.iterdir())) > 100
    assert misspelt(tmp_path) == []
    (tmp_path / "wrong.txt").write_text("the temp" + "rature", encoding="utf-8")
    assert len(misspelt(tmp_path)) == 1
