"""Turn a notebook as it is written into the notebook that the site shows.

Quarto runs this as a filter (a notebook on stdin, a notebook on stdout); tools/build_site.py
imports it. It drops the cells marked `#| hide`, folds cells of imports, gives every exported name
an anchor and a link to its source, links names in backticks and notebooks by their pages, makes the
first heading the page's title, and adds how to run the chapter and how long it takes to read.
"""

import ast
import json
import re
import runpy
import sys
from configparser import ConfigParser
from functools import cache
from html import escape
from pathlib import Path

import yaml
from pages import plain_math

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\|\s*(\w+)\s*:?\s*(.*)$")
OWN = {"default_exp", "export", "exporti", "exports", "hide", "hide_input"}
BACKTICKS = re.compile(r"(?<![\[`])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])")
SLUG = re.compile(r"[^\w\- ]")
MARK = re.compile(r"^## As it is shipped *$", re.M)
REFERENCES = re.compile(r"^## References *$", re.M)
APART = re.compile(r"```.*?```|^:::.*$|<svg.*?</svg>|<!--.*?-->", re.S | re.M)
# Other pages' minutes, which index.ipynb asks for.
MINUTES = re.compile(r' ?<span data-minutes="([\w ]+)" data-say="([^"]*)"></span>')
WORDS, CODE_LINES = 200, 12  # read in a minute
FOLD = '#| code-fold: true\n#| code-summary: "Imports"\n'


def settings(
    project,  # Folder that holds settings.ini
):
    "The project's metadata."
    config = ConfigParser(delimiters=["="])
    config.read(Path(project) / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


@cache
def page_names(
    project,  # Folder that holds nbs/
):
    "Notebook name -> page name, as its front matter says: `01_loop.ipynb` becomes `loop`."
    pages = {}
    for path in sorted((Path(project) / "nbs").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        page = re.search(r"^output-file:\s*(\S+)\.html", text(cells[0]) if cells else "", re.M)
        pages[path.name] = page[1] if page else path.stem
    return pages


def exported(
    path,  # A module of the package
):
    "The names in a module's `__all__`."
    tree = parsed(path.read_text(encoding="utf-8"))
    lists = [
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in n.targets)
    ]
    return set(ast.literal_eval(lists[0])) if lists else set()


@cache
def name_index(
    project,  # Folder that holds the exported package
):
    """Name -> {module: page#anchor}, from the index that the export writes: exported names and
    their public methods, each also with its module in front."""
    package = Path(project) / settings(project)["lib_path"]
    if not (package / "_modidx.py").is_file():
        return {}
    # nbdev drops a leading number and nothing else
    pages = {
        re.sub(r"^\d+[a-z0-9]*_", "", n.lower().removesuffix(".ipynb")): page
        for n, page in page_names(project).items()
    }
    index = {}
    for module, names in runpy.run_path(str(package / "_modidx.py"))["d"]["syms"].items():
        public = exported(package / f"{module.rpartition('.')[2]}.py")
        for name, (place, _) in names.items():
            bare = name.removeprefix(module + ".")
            if bare.partition(".")[0] not in public:
                continue
            page, _, anchor = place.partition("#")
            page = page.removesuffix(".html")
            place = f"{pages.get(page, page)}.html#{anchor}"
            for spelled in (bare, name):
                index.setdefault(spelled, {})[module] = place
    return index


def split_directives(
    source,  # A code cell
):
    "nbdev's own directives of a cell, and the cell without them."
    found, kept, lines = {}, [], source.split("\n")
    while lines and (m := DIRECTIVE.match(lines[0])):
        line = lines.pop(0)
        if m[1] in OWN and not line.rstrip().endswith(": false"):
            found[m[1]] = m[2]
        else:
            kept.append(line)
    return found, "\n".join(kept + lines).strip("\n")


def defined_names(
    tree,  # Parsed code
):
    "Functions, classes and their methods, as (name, node)."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                yield from ((f"{node.name}.{n.name}", n) for n in node.body if isinstance(n, kinds))


def local_names(
    tree,  # Parsed code of a cell
):
    "Names that a cell gives to values of its own: parameters, assignments, functions and classes."
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name


def imported_names(
    tree,  # Parsed code of a cell
):
    "(name, module) of all that a cell imports by name."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node.module) for alias in node.names)


def parsed(
    code,  # Code of a cell
):
    "The syntax tree, or an empty one where the cell is not plain Python."
    try:
        return ast.parse(code)
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def solutions_apart(
    cells,  # of a notebook
):
    "The cells that are not folded in a callout with a solution."
    inside = False
    for cell in cells:
        if cell["cell_type"] == "markdown" and re.search(r"^:::", text(cell), re.M):
            inside = "## Solution" in text(cell).rsplit(":::", 1)[1]
        if cell["cell_type"] == "markdown" or not inside:
            yield cell


def only_imports(
    tree,  # Parsed code of a cell
):
    "Whether a cell does nothing but import, which the site folds."
    body = [
        n for n in tree.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
    ]
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def shown_lines(
    source,  # A code cell
):
    "How many lines of its code stand open on the page."
    directives, code = split_directives(source)
    if "hide" in directives or code.startswith("#| code-fold: true") or only_imports(parsed(code)):
        return 0
    return sum(bool(x.strip()) and not x.startswith("#|") for x in code.split("\n"))


def reading_time(
    cells,  # of a notebook
):
    """Minutes to the mark and minutes below it (None where a notebook has no mark), by its words
    and its lines of code. Folded solutions and references are not counted."""
    spent, part = [0.0, 0.0], 0
    for cell in solutions_apart(cells):
        if cell["cell_type"] == "code":
            spent[part] += shown_lines(text(cell)) / CODE_LINES
        elif cell["cell_type"] == "markdown":
            prose = REFERENCES.split(text(cell))
            for n, piece in enumerate(MARK.split(prose[0])):
                part = 1 if n else part
                spent[part] += len(APART.sub(" ", piece).split()) / WORDS
            if len(prose) > 1:
                break
    first, rest = (max(1, round(minutes)) for minutes in spent)
    return first, rest if part else None


@cache
def reading_times(
    project,  # Folder that holds nbs/
):
    "Page -> its minutes to the mark, and below it."
    times = {}
    for name, page in page_names(project).items():
        nb = json.loads((Path(project) / "nbs" / name).read_text(encoding="utf-8"))
        times[page] = reading_time(nb["cells"])
    return times


def many(
    minutes,  # A whole number
):
    "`1 minute`, `9 minutes`."
    return f"{minutes} minute{'s' * (minutes != 1)}"


def joined(
    names,  # Of sections
    most=4,  # How many to name
):
    "The names in a row, as many as are read at a glance."
    rest = len(names) - most
    return " · ".join(names[:most]) + (f" · and {rest} more" if rest > 0 else "")


class Page:
    "What the filter knows of one notebook while it works on it."

    def __init__(
        self,
        project,  # Folder that holds settings.ini, nbs/ and the package
        nb,  # The notebook's content
        name,  # Its file name
    ):
        self.project, self.nb, self.name = Path(project), nb, name
        self.cfg, self.index = settings(project), name_index(project)
        self.pages = page_names(project)
        self.page = self.pages.get(name, Path(name).stem)
        self.minutes = reading_time(nb["cells"])
        self.blob = f"{self.cfg['git_url']}/blob/{self.cfg['branch']}"
        self.module = next(
            (d["default_exp"] for d, _ in map(split_directives, self.code()) if "default_exp" in d),
            None,
        )
        path = self.project / self.cfg["lib_path"] / f"{self.module}.py"
        tree = parsed(path.read_text(encoding="utf-8")) if path.is_file() else parsed("")
        self.line_of = {
            name: f"#L{node.lineno}" for name, node in defined_names(tree)
        }  # in the generated module
        headings = re.findall(r"^##+ +(.+?) *$", "\n".join(self.code("markdown")), re.M)
        self.slugs = {SLUG.sub("", h).strip().lower().replace(" ", "-") for h in headings}
        trees = [parsed(source) for source in self.code()]
        door = self.project / self.cfg["lib_path"] / "__init__.py"
        front = parsed(door.read_text(encoding="utf-8")) if door.is_file() else parsed("")
        self.front = {name for name, _ in imported_names(front)}  # what the package itself offers
        self.locals = {name for tree in trees for name in local_names(tree)}
        self.imports = {name: module for tree in trees for name, module in imported_names(tree)}

    def code(self, kind="code"):
        "The sources of the cells of one kind."
        return [text(c) for c in self.nb["cells"] if c["cell_type"] == kind]

    def place(self, name, called):
        """Where a name leads: to this notebook's own export; else, unless it is a local of this
        notebook (`name()` is a function all the same), to the export it imports, or to the only one
        where no plain word could be meant."""
        places, first = self.index.get(name, {}), name.partition(".")[0]
        own = places.get(f"{self.cfg['lib_path']}.{self.module}")
        if own or (first in self.locals and not called):
            return own
        if first in self.imports and self.imports[first] in places:
            return places[self.imports[first]]
        sure = called or first in self.front or not re.fullmatch("[a-z]+", name)
        return next(iter(places.values())) if sure and len(places) == 1 else None

    def link(self, match):
        "A name in backticks, as a link to where it is defined."
        place = self.place(match[1], match[2])
        if place is None:
            return match[0]
        page, _, anchor = place.partition("#")
        target = f"#{anchor}" if page == f"{self.page}.html" else place
        return f"[{match[0]}]({target})"

    def linked(self, source):
        """Markdown with its names linked, outside code, headings and existing links; notebooks are
        pages."""
        out, fence = [], False
        source = re.sub(
            r"\]\(([\w.]+\.ipynb)",
            lambda m: f"]({self.pages[m[1]]}.html" if m[1] in self.pages else m[0],
            source,
        )
        for line in source.split("\n"):
            fence ^= line.lstrip().startswith("```")
            plain = not fence and not line.startswith(("#", "    "))
            parts = re.split(r"(\[[^\]]*\]\([^)]*\)|\$[^$]+\$)", line) if plain else [line]
            out.append(
                "".join(
                    p if not plain or i % 2 else BACKTICKS.sub(self.link, p)
                    for i, p in enumerate(parts)
                )
            )
        return "\n".join(out)

    def label(self, tree):
        "The line above an exported cell: anchors for its names, and a link to the module."
        names = [n for n, _ in defined_names(tree)]
        if not names:
            return None
        ids = "".join(f'<a id="{n.lower()}"></a>' for n in names if n.lower() not in self.slugs)
        url = f"{self.blob}/{self.cfg['lib_path']}/{self.module}.py{self.line_of.get(names[0], '')}"
        module = f"{self.cfg['lib_path']}.{self.module}"
        return markdown(
            f'```{{=html}}\n<div class="exported">{ids}in <a href="{url}" '
            f'title="Its source, as exported"><code>{module}</code></a></div>\n```'
        )

    def code_cells(self, cell, before=""):
        "What the site shows for one code cell, which stands after the text `before`."
        directives, code = split_directives(text(cell))
        if not code or "hide" in directives:
            return []
        tree = parsed(code)
        if only_imports(tree):
            code = FOLD + code
        elif any("image/png" in o.get("data", {}) for o in cell.get("outputs", [])):
            code = (
                f"#| fig-alt: {json.dumps(figure_text(code, before), ensure_ascii=False)}\n{code}"
            )
        label = self.label(tree) if directives.keys() & {"export", "exporti", "exports"} else None
        return [c for c in (label, {**cell, "source": code}) if c]

    def reading_line(self):
        "How long the page takes to read, to its mark and on."
        first, rest = self.minutes
        whole = f"About {many(first)} to read"
        if rest is not None:
            whole = f"About {many(first)} to [As it is shipped](#as-it-is-shipped), {rest} more"
            whole += " for all"
        return f"{whole}."

    def marked(self, source):
        "Markdown with a line under the mark: what follows, and how long it takes."
        prose = "\n".join(self.code("markdown"))
        if not MARK.search(source):
            return source
        below = REFERENCES.split(MARK.split(prose)[1])[0]
        names = [re.sub(r"[`*]", "", name) for name in re.findall(r"^### +(.+?) *$", below, re.M)]
        said = f"{joined(names)}: about {many(self.minutes[1])}." if names else ""
        said = said or f"About {many(self.minutes[1])}."
        note = f"\n\n::: {{.shipped-note}}\n{said}\n:::\n"
        return MARK.sub(lambda m: m[0] + note, source)

    def run_line(self):
        "How long this chapter takes, how to run it, and where its source is."
        path, cfg = f"nbs/{self.name}", self.cfg
        source = f"[source]({self.blob}/{path})"
        if self.name == "index.ipynb":
            return markdown(f"::: {{.run-line}}\n{source}\n:::")
        if not any(self.code()):
            return markdown(f"::: {{.run-line}}\n{self.reading_line()} Its {source}.\n:::")
        colab = (
            f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}"
            f"/blob/{cfg['branch']}/{path}"
        )
        return markdown(
            f"::: {{.run-line}}\n{self.reading_line()}\n\n"
            f"**Run this chapter**: `make lab`, then open `{path}`; or "
            f"[open it in Colab]({colab}). Read its {source}.\n\n"
            f"```{{=html}}\n<details><summary>Colab needs this cell first</summary>"
            f"<pre><code>{escape(install_cell(cfg))}</code></pre></details>\n```\n:::"
        )

    def minutes_of(self, match):
        "Other pages' minutes to their marks, as `data-say` says them."
        times = reading_times(self.project)
        total = sum(times[page][0] for page in match[1].split())
        return " " + match[2].replace("{}", many(total))

    def head(self, cells):
        "The front matter with title and subtitle, how to run it, then the cells without these."
        front = {}
        if cells and cells[0]["cell_type"] == "raw":
            raw = text(cells[0]).strip()
            if raw.startswith("---"):
                front, cells = yaml.safe_load(raw.strip("-\n")) or {}, cells[1:]
        first = next((i for i, c in enumerate(cells) if c["cell_type"] == "markdown"), None)
        if first is not None and (m := re.match(r"# +(.+)\n*", text(cells[first]))):
            rest = text(cells[first])[m.end() :]
            front.setdefault("title", m[1].strip())
            if sub := re.match(r"> *(.+(?:\n>.*)*)\n*", rest):
                front.setdefault("subtitle", re.sub(r"\n> *", " ", sub[1]).strip())
                rest = rest[sub.end() :]
            cells = cells[:first] + [markdown(rest)] * bool(rest.strip()) + cells[first + 1 :]
        front["output-file"] = f"{self.page}.html"
        raw = "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---"
        return [{"cell_type": "raw", "metadata": {}, "source": raw}, self.run_line(), *cells]

    def filtered(self):
        "The notebook that the site shows."
        out, before = [], ""
        for cell in self.head(self.nb["cells"]):
            if cell["cell_type"] == "code":
                new = self.code_cells(cell, before)
                if out and new and all(text(c).startswith(FOLD) for c in (out[-1], new[0])):
                    first = out.pop()  # one fold for imports that stand together
                    new[0] = {
                        **new[0],
                        "source": text(first) + "\n" + text(new[0]).removeprefix(FOLD),
                    }
                out += new
            elif cell["cell_type"] == "markdown":
                before = text(cell)
                source = MINUTES.sub(self.minutes_of, self.linked(before))
                out.append({**cell, "source": self.marked(source)})
            else:
                out.append(cell)
        return {**self.nb, "cells": [finished(cell, n) for n, cell in enumerate(out)]}


def text(
    cell,  # A notebook cell
):
    "The source of a cell, which may be stored as a list of lines."
    return "".join(cell["source"])


def install_cell(
    cfg,  # The project's metadata
):
    """What `make env` does, as a cell for a notebook opened elsewhere: the folder, so that
    benchmarks/ is found, the package and what the chapters import beside it, the two wheels. Large
    libraries stay as they are there."""
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    beside = [pin for pin in pins if pin.startswith(("fastcore==", "gguf==", "transformers=="))]
    wheels = re.search(r"^FILES := (.+)$", make, re.M)[1]
    return (
        f"!git clone -q --depth 1 {cfg['git_url']}\n%cd {cfg['repo']}/nbs\n"
        f'%pip install -q "..[model,fast]" {" ".join(beside)} triton\n'
        f"%pip install -q --no-deps {wheels}"
    )


def lines(
    words,  # Text, whole or as a list of lines
):
    """Text as a list of lines, which is how notebooks are stored and the only form that Quarto
    reads."""
    return "".join(words).splitlines(keepends=True)


def raw_html(
    html,  # HTML, whole or as a list of lines
):
    "The same as a raw block of Markdown, which its content cannot close."
    html = "".join(html).strip("\n")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", html))])
    return f"{fence}{{=html}}\n{html}\n{fence}\n"


def stored_output(
    output,  # Of a code cell
):
    """An output as it is stored: lines, and HTML as Markdown that holds it. Quarto takes any output
    of type text/html for a widget, and loads jQuery and RequireJS from elsewhere for it."""
    output = {**output}
    if "text" in output:
        output["text"] = lines(output["text"])
    if "data" in output:
        data = dict(output["data"])
        if html := data.get("text/html"):
            data = {"text/markdown": raw_html(html)}
        output["data"] = {
            kind: lines(value) if kind.startswith("text/") else value
            for kind, value in data.items()
        }
    return output


def finished(
    cell,  # As the page has it
    number,  # Its place in the page
):
    "A cell with all that the notebook format asks for."
    cell = {"id": f"cell-{number}", **cell, "source": lines(cell["source"])}
    if cell["cell_type"] == "code":
        cell["outputs"] = [stored_output(o) for o in cell.get("outputs", [])]
        cell.setdefault("execution_count", None)
    return cell


def figure_text(
    code,  # The code that draws a figure
    before,  # The Markdown before it, which says what it shows
):
    "The words that stand for a figure where it cannot be seen."
    title = re.search(r"title=([\"'])(.+?)\1", code)
    before = re.sub(r"\$\$?([^$]+)\$\$?", lambda m: plain_math(m[1]), before)
    said = [part for part in before.strip().split("\n\n") if not part.startswith("#")] or [""]
    paragraph = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`]", r"\1", said[-1])
    words = " ".join(([title[2] + "."] if title else []) + paragraph.split())
    return words if len(words) <= 250 else words[:250].rsplit(" ", 1)[0] + " …"


def markdown(
    source,  # Markdown
):
    "A Markdown cell."
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def main():
    "Filter stdin to stdout. The front matter's output-file tells which notebook it is."
    nb, project = json.load(sys.stdin), ROOT
    raw = text(nb["cells"][0]) if nb["cells"] else ""
    page = re.search(r"^output-file:\s*(\S+)\.html", raw, re.M)
    names = {v: k for k, v in page_names(project).items()}
    name = names.get(page[1] if page else "", "index.ipynb")
    json.dump(Page(project, nb, name).filtered(), sys.stdout)


if __name__ == "__main__":
    main()
