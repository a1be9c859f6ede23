"The project's files, for the tests that look at all of them."

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "decoding_book").glob("[a-z]*.py"))
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
FOLDERS = [
    "",
    "nbs",
    "tests",
    "tests/breaks",
    "tests/helpers",
    "tools",
    "benchmarks",
    "decoding_book",
    ".ci",
]


def cells(path, kind="code"):
    "(number, source) of a notebook's cells of one kind."
    nb = json.loads(path.read_text(encoding="utf-8"))
    numbered = enumerate(nb["cells"])
    return [(i, "".join(c["source"])) for i, c in numbered if c["cell_type"] == kind]


def tracked():
    """The text files that git knows, or would add; without a repository, those of the folders that
    people write in."""
    ls = ["git", "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(ls, cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in done.stdout.splitlines() if "vendor" not in name]
    paths = paths or [p for name in FOLDERS for p in sorted((ROOT / name).glob("*"))]
    return [p for p in paths if p.is_file() and b"\0" not in p.read_bytes()[:4096]]
