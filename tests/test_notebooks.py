"""A reader runs a cell again: every cell of every notebook runs twice in a row."""

import base64
import io
import subprocess
from pathlib import Path

import execute
import nbformat
import numpy as np
import pytest
from execute import ThisPython, kernel_environment
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

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


def figure(background):
    "A heat map and a line, as a notebook keeps it."
    drawn = Figure(facecolor=background)
    axes = drawn.subplots(1, 2)
    axes[0].imshow(np.arange(100).reshape(10, 10), cmap="cividis")
    axes[1].plot([0, 2, 1], lw=3)
    file = io.BytesIO()
    drawn.savefig(file, format="png")
    return base64.b64encode(file.getvalue()).decode() + "\n"


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")).astype(int)


def test_a_figure_takes_half_the_room_and_looks_the_same():
    before = figure("white")
    after = execute.fewer_colours(before)
    assert len(after) < len(before) / 2
    assert abs(pixels(after) - pixels(before)).max() <= 12
    assert execute.fewer_colours(after) == after


def test_a_figure_that_lets_the_page_through_stays_as_it_is():
    before = figure("none")
    assert execute.fewer_colours(before) == before
