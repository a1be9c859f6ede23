"""Write README.md from nbs/index.ipynb: its prose, its code, and the text form of its outputs.

python tools/readme.py            write README.md
python tools/readme.py --check    only say whether it is up to date
"""

import re
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parent))
from nbfilter import MINUTES  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BOARD = re.compile(r'.*\n\n<div class="knob-board".*\n?')  # and the paragraph that speaks of it


def readme():
    "The text of README.md."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    source = f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}/nbs"
    notebook = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    notebook.cells = [
        c for c in notebook.cells if c.cell_type != "raw" and "#| hide" not in c.source
    ]
    for cell in notebook.cells:  # what only the site has
        cell.source = MINUTES.sub("", BOARD.sub("", cell.source))
    notebook.metadata["language_info"] = {"name": "python"}
    text_only = Config(NbConvertBase={"display_data_priority": ["text/plain", "text/markdown"]})
    text, _ = MarkdownExporter(config=text_only).from_notebook_node(notebook)
    # a page of the site is a notebook in the repository: loop.html is nbs/01_loop.ipynb
    names = {re.sub(r"^\w\w?_", "", p.stem): p.name for p in (ROOT / "nbs").glob("*.ipynb")}
    link = re.compile(r"\]\((\w+)\.html(?:#[\w-]+)?\)")  # there, its headings have no anchors
    text = link.sub(lambda m: f"]({source}/{names[m[1]]})", text)
    note = "<!-- Written from nbs/index.ipynb by tools/readme.py: edit there. -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    path = ROOT / "README.md"
    if "--check" in sys.argv:
        sys.exit(
            0
            if path.is_file() and path.read_text(encoding="utf-8") == readme()
            else "README.md is not what nbs/index.ipynb says: run `make outputs`"
        )
    path.write_text(readme(), encoding="utf-8")
