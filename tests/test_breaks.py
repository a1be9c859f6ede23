"The breaks of tests/breaks/ fit the package: `tools/mutate.py` applies them in `make verify`."

import shlex
from pathlib import Path

import pytest
from mutate import ROOT, read_breaks

BREAKS = list(read_breaks())


@pytest.mark.parametrize("row", BREAKS, ids=["{module}: {why}".format(**b) for b in BREAKS])
def test_a_break_fits_its_module_and_names_tests_that_exist(row):
    text = (ROOT / "decoding_book" / f"{row['module']}.py").read_text(encoding="utf-8")
    assert text.count(row["old"]) == 1
    assert row["old"] != row["new"]
    assert all((ROOT / a).exists() for a in shlex.split(row["tests"]) if a.startswith("tests/"))


def test_every_file_of_breaks_has_its_module():
    modules = {p.stem for p in (ROOT / "decoding_book").glob("[a-z]*.py")}
    assert {p.stem for p in Path(ROOT / "tests/breaks").glob("*.toml")} <= modules
