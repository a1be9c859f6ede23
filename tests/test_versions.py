"""The versions that settings.ini promises: every cell and file is in the grammar of the least
Python and calls nothing newer, and the workflow runs all of them."""

import re
import subprocess
import sys

import nbformat
import pytest
import yaml
from helpers.project_files import NOTEBOOKS, ROOT, cells
from nbfilter import settings

LEAST = settings(ROOT)["min_python"]
FILES = sorted(
    p
    for part in ("decoding_book", "tools", "tests", "benchmarks", ".")
    for p in (ROOT / part).glob("*.py")
)


def too_new(*paths, code=None):
    "What ruff finds that the grammar of the least Python lacks, in files, notebooks or `code`."
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select=E9"),
            *("--target-version", "py" + LEAST.replace(".", ""), "--output-format=concise"),
            *(map(str, paths) if code is None else "-"),
        ],
        input=code,
        capture_output=True,
        text=True,
    )
    assert not done.stderr, done.stderr
    return [line for line in done.stdout.splitlines() if "invalid-syntax" in line]


@pytest.mark.parametrize(
    "code",
    [
        "times[name, *request]",
        "try: pass\nexcept* OSError: pass",
        "type X = int",
        "def first[T](x: T): pass",
        'f"{x["a"]}"',
    ],
)
def test_newer_grammar_is_noticed(code):
    assert too_new(code=code)


def test_every_cell_and_file_is_in_the_grammar_of_the_least_python(tmp_path):
    assert len(NOTEBOOKS) > 30 and len(FILES) > 80
    assert too_new(*NOTEBOOKS, *FILES) == []
    cell = nbformat.v4.new_code_cell("times[name, *request]")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb")
    assert too_new(tmp_path / "x.ipynb")


def newer_calls(*paths):
    """What vermin finds that the least Python does not have. `tomllib` has a fallback where it is
    used."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from vermin import main; main()",
            f"-t={LEAST}-",
            "--violations",
            "--no-tips",
            "--exclude",
            "tomllib",
            *map(str, paths),
        ],
        capture_output=True,
        text=True,
    )
    return [line.strip() for line in done.stdout.splitlines() if line.startswith("  '")]


def test_nothing_is_called_that_the_least_python_lacks(tmp_path, full):
    "The package and the tools; with the full counts, every cell and test too."
    for path in NOTEBOOKS if full else ():
        code = "\n\n".join(source for _, source in cells(path))
        (tmp_path / f"{path.stem}.py").write_text(code, encoding="utf-8")
    files = [p for p in FILES if full or p.parent.name != "tests"]
    assert newer_calls(tmp_path, *files) == []
    newer = tmp_path / "newer.py"
    newer.write_text(
        "from itertools import batched\nimport datetime\nprint(datetime.UTC)", encoding="utf-8"
    )
    assert len(newer_calls(newer)) == 2


def test_the_workflow_runs_every_version_that_is_promised():
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["versions"]["strategy"]["matrix"]["include"]
    assert {m["python"] for m in matrix} == set(settings(ROOT)["pythons"].split())
    least = next(m for m in matrix if "least" in m)
    promised = dict(
        re.fullmatch(r"([\w-]+)>=([\d.]+)", r).groups()
        for r in settings(ROOT)["requirements"].split()
    )
    for name, version in (pin.split("==") for pin in least["least"].split()):
        assert version == promised.pop(name) + ".0"
    assert not promised and least["python"] == LEAST
