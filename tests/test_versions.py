"""The versions that settings.ini promises: every cell and file is in the grammar of the least
Python and calls nothing newer, and the workflow runs all of them."""

import ast
import re
import subprocess
import sys

import parso
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


def first_error(code):
    """What the grammar of the least Python does not know in it: `ast.parse` has the new grammar,
    whatever version it is told."""
    try:
        parso.load_grammar(version=LEAST).parse(code.rstrip("\n") + "\n", error_recovery=False)
    except parso.ParserSyntaxError as error:
        return f"line {error.error_leaf.start_pos[0]}"


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
    ast.parse("times[name, *request]", feature_version=(3, 10))  # as if it were in 3.10
    assert first_error(code)


def test_every_cell_and_file_is_in_the_grammar_of_the_least_python():
    texts = [(f"{p.name}, cell {i}", source) for p in NOTEBOOKS for i, source in cells(p)]
    texts += [(path.name, path.read_text(encoding="utf-8")) for path in FILES]
    assert len(texts) > 1000
    assert not [f"{place}: {error}" for place, code in texts if (error := first_error(code))]


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


def test_nothing_is_called_that_the_least_python_lacks(tmp_path):
    for path in NOTEBOOKS:
        code = "\n\n".join(source for _, source in cells(path))
        (tmp_path / f"{path.stem}.py").write_text(code, encoding="utf-8")
    assert newer_calls(tmp_path, *FILES) == []
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
