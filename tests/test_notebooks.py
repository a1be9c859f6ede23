"""A reader runs a cell again: every cell of every notebook runs twice in a row."""

import subprocess
from pathlib import Path

import execute
import nbformat
import pytest
from execute import ThisPython, kernel_environment
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
QUICK = ("A_checks",)  # without the full counts


def each_cell_twice(path, scratch):
    """Numbers of the cells that fail, with what they say; a cell that fails does not stop the
    others."""
    nb = nbformat.read(path, as_version=4)
    numbers = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code"]
    nb.cells = [nbformat.v4.new_code_cell(nb.cells[i].source) for i in numbers for _ in range(2)]
    NotebookClient(
        nb,
        timeout=1800,
        kernel_name="python3",
        allow_errors=True,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute(env=kernel_environment(ROOT, 1, scratch))
    said = {
        n: [f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"]
        for n, cell in enumerate(nb.cells)
    }
    return [
        f"cell {numbers[n // 2]}, run {n % 2 + 1}: {error[0]}" for n, error in said.items() if error
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_every_cell_runs_twice_in_a_row(path, full, tmp_path):
    if not full and path.stem not in QUICK:
        pytest.skip("with --full")
    assert not each_cell_twice(path, tmp_path)


def test_a_cell_that_runs_only_once_is_found(tmp_path):
    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("x = 0"),
            nbformat.v4.new_code_cell("x = [1]"),
            nbformat.v4.new_code_cell("y = x.pop()"),
            nbformat.v4.new_code_cell("assert y"),
        ]
    )
    path = tmp_path / "once.ipynb"
    nbformat.write(nb, path)
    assert each_cell_twice(path, tmp_path) == ["cell 2, run 2: IndexError: pop from empty list"]


def test_the_notebooks_that_differ_from_the_last_commit(tmp_path, monkeypatch):
    "What `make test` runs: changed, and new; outside a repository all."
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    (tmp_path / "nbs").mkdir()
    for name in ("kept", "changed", "removed"):
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / f"nbs/{name}.ipynb")
    assert execute.changed() == ["changed.ipynb", "kept.ipynb", "removed.ipynb"]
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    assert execute.changed() == []
    (tmp_path / "nbs/changed.ipynb").write_text("{}")
    (tmp_path / "nbs/removed.ipynb").unlink()
    (tmp_path / "nbs/new.ipynb").write_text("{}")
    assert execute.changed() == ["changed.ipynb", "new.ipynb"]
