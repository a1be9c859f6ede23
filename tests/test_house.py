"""The house rules: what modules take from each other; how long cells, functions and lines may be;
style and spelling."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers.project_files import MODULES, NOTEBOOKS, ROOT, cells, tracked

LONGEST_CELL, LONGEST_FUNCTION, WIDEST = 30, 25, 100
REASON = "# long: "  # on the line of a longer function's `def`, or the one before


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def python(path):
    "(place, source) of a file's Python; lines of IPython's own (`%pip …`) are left out."
    if path.suffix == ".ipynb":
        for n, source in cells(path):
            lines = source.splitlines()
            yield f"cell {n}", "\n".join("" if x[:1] in {"%", "!"} else x for x in lines)
    else:
        yield "line", path.read_text(encoding="utf-8")


WRITTEN = [*NOTEBOOKS, *(p for p in tracked() if p.suffix == ".py" and p not in MODULES)]


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


# Names with an underscore that are not this project's, and why there is no other way.
PRIVATE_OF_OTHERS = {
    "_repr_html_": "Jupyter's word for how an object is drawn",
    "_replace": "in Python's documentation: a named tuple with other values",
    "_exit": "in Python's documentation: the end of a process without its cleaning up",
    "_ctx": "llama.cpp's wheel reads logits by no other name",
    "_forward_hooks": "torch does not tell otherwise which hooks a module has",
    "_forward_pre_hooks": "torch does not tell otherwise which hooks a module has",
    "_parameters": "torch's table, for tensors that `load_state_dict` would refuse",
    "_buffers": "torch's table, for tensors that `load_state_dict` would refuse",
}


def names_given(tree):
    "What a file itself defines or sets: functions, classes, fields, attributes."
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield getattr(node, "id", None) or node.attr


def private_of_others(tree):
    """Attributes with an underscore of what another file defines. torch's own functions of that
    kind are called where it has none without."""
    own = {*names_given(tree), *PRIVATE_OF_OTHERS}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr in own:
            continue
        whose = ast.unparse(node.value)
        if whose in {"self", "cls"} or whose.split(".")[0] == "torch":
            continue
        if node.attr.startswith("_") and not node.attr.endswith("__"):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_private_attribute_is_read_across_a_wall(path):
    tree = ast.parse("\n".join(source for _, source in python(path)))
    assert set(private_of_others(tree)) == set()


def test_no_name_is_exported_twice():
    "But by a module that says so (`_all_`, a name that lived there once and is imported)."
    homes = Counter(
        name for path in MODULES for name in set(exported(path)) - {n for _, n in own_imports(path)}
    )
    assert {name for name, n in homes.items() if n > 1} == set()


# Names that stand in two modules and mean one thing, and why they stand twice.
SAID_TWICE = {
    "exact_exp exact_log gumbel_of hash_bits key_state mix": "of one number, compiled for `fused`",
    "crossing scaled winner": "steps of the draw, in `fused` and as kernels",
    "measures": "entropy and varentropy, on a GPU too",
    "MISSING": "what to install, where a module needs it",
    "_own": "what each thread has of its own",
}


def at_the_top(block):
    "The names that statements of a module give, those within its `if` and `try` too."
    for node in block:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in getattr(node, "targets", None) or [node.target]:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
        elif isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
            yield from at_the_top(ast.iter_child_nodes(node))


def test_a_name_means_one_thing_in_all_modules():
    homes = Counter(
        name
        for path in MODULES
        for name in set(at_the_top(parse(path).body))
        if not name.startswith("__") and name != "_all_"
    )
    twice = {name for name, n in homes.items() if n > 1}
    assert twice == set(" ".join(SAID_TWICE).split())


def hidden_imports(path):
    "Parameters and variables of functions that hide what the module has from another of ours."
    tree = parse(path)
    ours = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.level]
    taken = {alias.name for node in ours for alias in node.names}
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    for node in (node for function in functions for node in ast.walk(function)):
        if isinstance(node, ast.arg) and node.arg in taken:
            yield node.arg
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in taken:
            yield node.id


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_name_in_a_function_hides_an_imported_one(path):
    by_need = {"kernels": {"LOG2_E"}}  # a kernel sees no global: it is the parameter's default
    assert set(hidden_imports(path)) == by_need.get(path.stem, set())


def rows_named(tree):
    "The lines that write `row` before a number into a text."
    for node in ast.walk(tree):
        values = node.values if isinstance(node, ast.JoinedStr) else []
        for before, after in zip(values, values[1:]):
            if isinstance(after, ast.FormattedValue) and isinstance(before, ast.Constant):
                if re.search(r"\brow $", before.value):
                    yield ast.unparse(node)


# `row_name` itself, a row of a Parquet file, what stands above the rows of a picture.
ROWS_BY_HAND = {"checks": 1, "scale": 1, "show": 1, "trees": 1}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_row_that_is_refused_is_named_by_row_name(path):
    assert len(list(rows_named(parse(path)))) == ROWS_BY_HAND.get(path.stem, 0)


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


def is_recorded(path):
    """Whether a program wrote the file, or another project: lines of such files are not ours. The
    package's lines are those of cells, README.md's those of the index."""
    inside = path.relative_to(ROOT)
    written = {"README.md", "LICENSE"}
    by_hand = {"__init__.py", "__main__.py"}  # as tools/front_door.py has them
    return (
        str(inside) in written
        or path.suffix == ".json"
        or "oracle" in inside.parts
        or (path.parent.name == "decoding_book" and path.name not in by_hand)
    )


def code(path):
    """(place, source) of what people write in a file. A notebook's paragraphs are as wide as its
    writer's window; its code is not."""
    if path.suffix == ".ipynb":
        yield from ((f"cell {n}", source) for n, source in cells(path))
    elif not is_recorded(path):
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


def crowded(source):
    """The lines that hold two statements. A `;` at a line's end, by which a cell shows no value, is
    not between two; `class Refused(ValueError): "Its words"` holds one."""
    for node in ast.walk(ast.parse(source)):
        for part in ("body", "orelse", "finalbody"):
            block = getattr(node, part, [])
            pairs = zip(block, block[1:]) if isinstance(block, list) else ()
            yield from (two.lineno for one, two in pairs if two.lineno <= one.end_lineno)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_line_holds_one_statement(path):
    found = {f"{place}: {line}" for place, s in python(path) for line in crowded(s)}
    assert found == set()


def choices_in_choices(source):
    "The lines of `a if x else b if y else c`, and of its like."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.IfExp):
            parts = node.test, node.body, node.orelse
            yield from (node.lineno for part in parts if isinstance(part, ast.IfExp))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_conditional_expression_holds_no_other(path):
    found = {f"{place}: {line}" for place, s in python(path) for line in choices_in_choices(s)}
    assert found == set()


TESTS = sorted((ROOT / "tests").glob("test_*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.stem)
def test_a_test_is_named_for_what_it_holds(path):
    "A word or two say what is looked at (`test_shapes`), not what is so."
    names = [n.name for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef)]
    short = [name for name in names if name.startswith("test_") and name.count("_") < 3]
    assert short == []


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


def test_each_hook_before_a_commit_runs_a_check_that_is_there():
    """ruff, its format, codespell as `.codespellrc` has it (which the program finds by itself), and
    what cleans and exports notebooks."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    assert {"ruff", "format", "codespell", "clean", "export"} <= set(hooks)
    programs = {hook["entry"].split()[0] for hook in hooks.values()} - {"make"}
    assert all(Path(sys.executable).with_name(Path(p).name).exists() for p in programs)
    words = [str(p) for p in tracked() if p.suffix in {".md", ".py", ".toml"}]
    done = subprocess.run(
        [Path(sys.executable).with_name(Path(hooks["codespell"]["entry"]).name), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")
