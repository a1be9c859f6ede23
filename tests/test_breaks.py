"The breaks of tests/breaks/ fit the package: `tools/mutate.py` applies them in `make verify`."

import re
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


@pytest.mark.parametrize("tests", sorted({row["tests"] for row in BREAKS}))
def test_each_word_that_chooses_tests_occurs_in_their_file(tests):
    "Of `-k`: in a test's name, or in what a test is given. A renamed test would be missed."
    words = shlex.split(tests)
    files = [ROOT / word.partition("::")[0] for word in words if word.startswith("tests/")]
    files += (ROOT / "tests/helpers").glob("*.py")
    text = "\n".join([f.read_text(encoding="utf-8") for f in files] + [f.stem for f in files])
    chosen = words[words.index("-k") + 1] if "-k" in words else ""
    chosen = re.sub(r"\b(and|or|not)\b", " ", chosen)
    assert [w for w in re.findall(r"[^\s()]+", chosen) if w.lower() not in text.lower()] == []
    named = [word.split("::")[1].partition("[")[0] for word in words if "::" in word]
    assert [name for name in named if f"def {name}(" not in text] == []


def test_every_file_of_breaks_has_its_module():
    modules = {p.stem for p in (ROOT / "decoding_book").glob("[a-z]*.py")}
    assert {p.stem for p in Path(ROOT / "tests/breaks").glob("*.toml")} <= modules
