"""The notebooks as the site gets them, held without Quarto: their form, what pandoc reads in them,
where names lead, the cell for Colab, and that nothing asks for another host."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import venv
from collections import Counter
from pathlib import Path

import nbformat
import pypandoc
import pytest
from build_site import finish, loaded_from_elsewhere, stage
from nbfilter import (
    Page,
    figure_text,
    install_cell,
    lines,
    name_index,
    page_names,
    reading_time,
    reading_times,
    settings,
    split_directives,
    text,
)
from pages import folded, glossary_of

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
WIDGETS = {"text/html", "application/javascript", "application/vnd.jupyter.widget-view+json"}
# Quarto 1.9's page, where it loads from a CDN: the script for KaTeX, and a theme's fonts.
QUARTO_PAGE = """<html><head><title>x</title><link rel="stylesheet" href="site_libs/b.css"><script>
      link.rel = "stylesheet";
      link.href = "https://cdn.jsdelivr.net/npm/katex@0.13.11/dist/katex.min.css";
      script.src = "https://cdn.jsdelivr.net/npm/katex@0.13.11/dist/katex.min.js";
</script></head><body><a href="https://example.org/read">a link is no load</a></body></html>"""
QUARTO_STYLE = (
    '@import"https://fonts.googleapis.com/css2?family=Lato:ital,wght@0,400;0,700;1,400'
    '&display=swap";'
    "body{color:#222}"
)
QUARTO_WIDGETS = (
    '<script src="https://cdn.jsdelivr.net/npm/requirejs@2.3.6/require.min.js" '
    'integrity="x"></script>'
    '<script src="https://cdn.jsdelivr.net/npm/jquery@3.5.1/dist/jquery.min.js"></script>'
)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def filtered():
    "Notebook -> what the filter makes of it."
    return {path: Page(ROOT, read(path), path.name).filtered() for path in NOTEBOOKS}


def joined(nb):
    "One Markdown text of a notebook, put together from lines as Quarto does it."
    parts = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        options = [line for line in source.split("\n") if line.startswith("#|")]
        code = "\n".join(line for line in source.split("\n") if line not in options)
        parts.append(f"::: {{.cell}}\n\n```` {{.python .cell-code}}\n{code}\n````\n")
        for output in cell["outputs"]:
            shown = "".join(output.get("data", {}).get("text/markdown", []))
            parts += [f"::: {{.cell-output}}\n{shown}\n:::\n"] if shown else []
        parts.append(":::\n")
    return "\n\n".join(parts)


def nodes(value):
    "Every element of a pandoc document."
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from nodes(part)


class Document:
    "What pandoc reads in a page."

    def __init__(self, markdown):
        every = list(
            nodes(json.loads(pypandoc.convert_text(markdown, "json", format="markdown"))["blocks"])
        )
        kind = {
            k: [n["c"] for n in every if n.get("t") == k]
            for k in ("Header", "Div", "CodeBlock", "Str", "Link", "RawBlock", "Span")
        }
        self.headings = [(level, attributes[0]) for level, attributes, _ in kind["Header"]]
        self.divs = Counter(name for attributes, _ in kind["Div"] for name in attributes[1])
        self.code = [
            words for attributes, words in kind["CodeBlock"] if "cell-code" in attributes[1]
        ]
        self.words, self.links = kind["Str"], [target[0] for _, _, target in kind["Link"]]
        raw = "\n".join(words for _, words in kind["RawBlock"])
        self.ids = {a[0] for k in ("Div", "Span") for a, _ in kind[k]} | {
            i for _, i in self.headings
        }
        self.ids |= set(re.findall(r'\bid="([^"]+)"', raw))


@pytest.fixture(scope="module")
def documents(filtered):
    return {path: Document(joined(nb)) for path, nb in filtered.items()}


def prose(path):
    "The Markdown of a notebook as it is written, without its code blocks and its title."
    source = "\n\n".join(text(c) for c in read(path)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"^(`{3,}|~{3,}).*?^\1", "", source, flags=re.M | re.S)


# ---- form


def test_filtered_notebooks_are_valid(filtered):
    for path, nb in filtered.items():
        ids = {cell.get("id") for cell in nb["cells"]}
        assert None not in ids and len(ids) == len(nb["cells"]), path.name
        nbformat.validate(nb, relax_add_props=False)


def test_text_is_stored_as_lines(filtered):
    "Quarto joins what it finds: a source that is one string loses its line breaks."
    for path, nb in filtered.items():
        for n, cell in enumerate(nb["cells"]):
            texts = [cell["source"]] + [
                t
                for o in cell.get("outputs", [])
                for t in [
                    o.get("text", []),
                    *(v for k, v in o.get("data", {}).items() if k.startswith("text/")),
                ]
            ]
            for words in texts:
                assert isinstance(words, list), f"{path.name}, cell {n}"
                assert all("\n" not in line[:-1] for line in words), f"{path.name}, cell {n}"
                assert all(line.endswith("\n") for line in words[:-1]), f"{path.name}, cell {n}"


def test_both_forms_of_a_source_are_read():
    path = ROOT / "nbs/10_topk.ipynb"
    nb = read(path)
    for form in ("".join, lambda source: lines("".join(source))):
        for cell in nb["cells"]:
            cell["source"] = form(cell["source"])
        done = subprocess.run(
            [sys.executable, ROOT / "tools/nbfilter.py"],
            input=json.dumps(nb),
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == Page(ROOT, read(path), path.name).filtered()


@pytest.mark.parametrize("quarto", [True, False])
def test_staged_notebooks_keep_the_lines_of_their_front_matter(tmp_path, quarto):
    stage(ROOT, tmp_path / "stage", quarto)
    for name in page_names(ROOT).values():
        nb = read(tmp_path / f"stage/{name}.ipynb")
        front = nb["cells"][0]["source"]
        assert front[0] == "---\n" and front[-1] == "---"
        assert (f"output-file: {name}.html\n" in front) == quarto


# ---- what pandoc reads


def test_no_fence_of_a_div_is_left_as_text(documents):
    for path, page in documents.items():
        assert not [w for w in page.words if ":::" in w], path.name


def test_headings_are_headings(documents):
    for path, page in documents.items():
        written = re.findall(r"^(##+) +\S", prose(path), re.M)
        assert [level for level, _ in page.headings] == [len(w) for w in written], path.name


def test_divs_are_divs(documents):
    for path, page in documents.items():
        written = Counter(re.findall(r"^:{3,} *\{\.([\w-]+)", prose(path), re.M))
        assert written <= page.divs, path.name
        assert page.divs["run-line"] == 1


def test_every_shown_cell_is_a_code_block_with_its_lines(documents):
    for path, page in documents.items():
        shown = "\n".join(page.code)
        for cell in read(path)["cells"]:
            directives, code = split_directives(text(cell))
            code = "\n".join(line for line in code.split("\n") if not line.startswith("#|"))
            if cell["cell_type"] == "code" and "hide" not in directives:
                assert code.strip() in shown, f"{path.name}: {code}"


def test_links_to_places_of_the_book_find_their_anchor(documents):
    names = page_names(ROOT)
    ids = {f"{names[path.name]}.html": page.ids for path, page in documents.items()}
    for path, page in documents.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            target = target or f"{names[path.name]}.html"
            if "/" in target or not target.endswith(".html"):
                continue
            assert target in ids, f"{path.name}: {link}"
            if target in ("board.html", "play.html") and "=" in anchor:
                continue  # settings
            assert not anchor or anchor in ids[target], f"{path.name}: {link}"


# ---- nothing from elsewhere


def test_no_output_makes_quarto_load_widgets(filtered):
    "Quarto takes each output of these types for a widget, and loads jQuery and RequireJS for it."
    for path, nb in filtered.items():
        kinds = {
            kind
            for cell in nb["cells"]
            for o in cell.get("outputs", [])
            for kind in o.get("data", {})
        }
        assert not kinds & WIDGETS, path.name


def test_html_outputs_arrive_as_they_were(filtered):
    seen = 0
    for path in NOTEBOOKS:
        html = [
            "".join(o["data"]["text/html"]).strip("\n")
            for c in read(path)["cells"]
            if not "".join(c["source"]).startswith("#| hide")
            for o in c.get("outputs", [])
            if "text/html" in o.get("data", {})
        ]
        shown = "\n".join(
            "".join(o["data"].get("text/markdown", []))
            for c in filtered[path]["cells"]
            for o in c.get("outputs", [])
            if "data" in o
        )
        hidden = [h for h in html if h not in shown]
        assert not hidden, path.name
        seen += len(html)
    assert seen > 20


def test_pages_of_quarto_s_shape_are_made_to_need_no_network(tmp_path):
    (tmp_path / "page.html").write_text(QUARTO_PAGE, encoding="utf-8")
    (tmp_path / "style.css").write_text(QUARTO_STYLE, encoding="utf-8")
    assert (
        len(loaded_from_elsewhere(QUARTO_PAGE)) == 2
        and len(loaded_from_elsewhere(QUARTO_STYLE)) == 1
    )
    finish(tmp_path)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'script.src = "site_libs/katex/katex.min.js"' in page
    assert (tmp_path / "site_libs/katex/katex.min.js").is_file()
    assert (tmp_path / "style.css").read_text(encoding="utf-8") == "body{color:#222}"


def test_a_page_that_would_need_the_network_is_refused(tmp_path):
    (tmp_path / "page.html").write_text(
        QUARTO_PAGE.replace("<head>", "<head>" + QUARTO_WIDGETS), encoding="utf-8"
    )
    with pytest.raises(SystemExit, match="page.html loads https://cdn.jsdelivr.net/npm/requirejs"):
        finish(tmp_path)


# ---- links of names


def link_of(words, code="", name="01_loop.ipynb"):
    "The Markdown that the filter makes of `words`, in a notebook that has a cell of `code`."
    cells = [
        dict(cell_type="code", source=s, outputs=[]) for s in ("#| default_exp " + name[3:-6], code)
    ]
    return Page(ROOT, dict(cells=cells), name).linked(words)


def test_only_names_that_a_module_exports_are_linked():
    index = name_index(ROOT)
    assert index["Sampler"] == {"decoding_book.sampler": "sampler.html#sampler"}
    assert "Sampler.distribution" in index and "decoding_book.topk.top_k" in index
    for name in index:
        bare = re.sub(r"^decoding_book\.\w+\.", "", name).partition(".")[0]
        assert not bare.startswith("_"), name


def test_names_lead_to_the_export_and_locals_nowhere():
    assert link_of("`top_k`") == "[`top_k`](topk.html#top_k)"
    assert link_of("`top_k`", "top_k = 3") == "`top_k`"
    assert link_of("`top_k`", "def cut(logits, top_k): return logits") == "`top_k`"
    assert link_of("`top_k()`", "top_k = 3") == "[`top_k()`](topk.html#top_k)"
    assert link_of("`top_k`", "top_k = 3", "10_topk.ipynb") == "[`top_k`](#top_k)"


def test_a_plain_word_is_a_link_only_where_the_export_can_be_meant():
    assert link_of("`choose`") == "`choose`" and link_of("`share`") == "`share`"
    assert link_of("`check_rules`") == "[`check_rules`](beam.html#check_rules)"
    assert link_of("`generate`", name="14_sampler.ipynb") == "[`generate`](loop.html#generate)"
    own = link_of("`level`", "from decoding_book.show import level")
    assert own == "[`level`](show.html#level)" and link_of("`level`") == "`level`"


def test_no_chapter_but_the_kernels_own_links_a_plain_word_to_the_kernels(filtered):
    for path, nb in filtered.items():
        markdown = "\n".join(text(c) for c in nb["cells"] if c["cell_type"] == "markdown")
        assert not re.search(r"\[`[a-z]+`\]\(cuda\.html#", markdown), path.name


# ---- the cell for Colab


def imports_of_chapters():
    "Every package that a chapter's cells import, whatever Python has itself left out."
    for path in NOTEBOOKS:
        for cell in read(path)["cells"]:
            if cell["cell_type"] != "code":
                continue
            for node in ast.walk(ast.parse(text(cell))):
                names = []
                if isinstance(node, ast.Import):
                    names = [a.name for a in node.names]
                if isinstance(node, ast.ImportFrom):
                    names = [node.module]
                yield from (name.split(".")[0] for name in names)


def test_the_cell_for_colab_installs_what_the_chapters_import():
    cfg = settings(ROOT)
    cell, make = install_cell(cfg), (ROOT / "Makefile").read_text(encoding="utf-8")
    assert (
        f"git clone -q --depth 1 {cfg['git_url']}\n" in cell and f"%cd {cfg['repo']}/nbs\n" in cell
    )
    assert cell.endswith(re.search(r"^FILES := (.+)$", make, re.M)[1])
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    asked = [word for line in cell.splitlines() for word in shlex.split(line) if "==" in word]
    assert len(asked) >= 4 and set(asked) <= set(pins)
    extras = cfg["model_requirements"], cfg["fast_requirements"]
    wanted = " ".join([cell, cfg["requirements"], *extras])
    # Colab's own, and what numba brings
    also = {"IPython", "nbformat", "decoding_book", "llvmlite"}
    also |= {"ray", "pyarrow", "llguidance"}  # of the extras `scale` and `grammar`, where asked for
    present = {*re.findall(r"[A-Za-z][\w-]*", wanted), *also}
    assert {n for n in imports_of_chapters() if n not in sys.stdlib_module_names} <= present


def test_every_chapter_shows_the_cell_for_colab(filtered):
    for path, nb in filtered.items():
        run_line = text(nb["cells"][1])
        has_code = any(c["cell_type"] == "code" for c in nb["cells"]) and path.name != "index.ipynb"
        assert ("%cd decoding-book/nbs\n" in run_line) == has_code, path.name


def test_the_cell_for_colab_works_in_an_empty_folder(full, tmp_path):
    """Every chapter runs after it, in an environment that has what Colab has: torch, matplotlib and
    Jupyter."""
    if not full:
        pytest.skip("takes minutes: run with --full")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "-c",
            ROOT / "constraints.txt",
            "torch",
            "matplotlib",
            "ipykernel",
            "nbclient",
        ],
        env=env,
        check=True,
    )
    cell = install_cell(settings(ROOT)).replace(
        settings(ROOT)["git_url"], f"file://{ROOT} decoding-book"
    )
    look = (
        "from pathlib import Path; import decoding_book; from decoding_book import smollm\n"
        "assert 'site-packages' in decoding_book.__file__ and Path('../benchmarks').is_dir()\n"
        "assert smollm.weights_path().is_file()\n"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "cell.ipy").write_text(f"{cell}\n{look}print('ready')", encoding="utf-8")
    run = dict(env=env, capture_output=True, text=True)
    done = subprocess.run([python, "-m", "IPython", tmp_path / "cell.ipy"], cwd=empty, **run)
    assert done.stdout.strip().endswith("ready"), done.stdout + done.stderr
    done = subprocess.run(
        [python, "tools/execute.py", "--jobs", "2"], cwd=empty / "decoding-book", **run
    )
    assert done.returncode == 0, done.stderr


# ---- how long a page takes, and its mark


def notebook(*cells):
    "A notebook of (kind, source)."
    kinds = {"md": "markdown", "py": "code"}
    return dict(
        cells=[dict(cell_type=kinds[k], metadata={}, source=s, outputs=[]) for k, s in cells]
    )


IDEA = [("md", "# Title\n\n> under it"), ("py", "import re"), ("md", "word " * 997)]
SOLUTION = [
    ("md", "::: {.callout-tip collapse='true'}\n## Solution"),
    ("py", "x = 0\n" * 500),
    ("md", ":::"),
]
SHIPPED = [
    ("md", "## As it is shipped\n\nFor users."),
    ("md", "### What `top_k` refuses\n\n### Rows"),
    ("py", "#| hide\n" + "x = 0\n" * 500),
    ("py", "#| export\n" + "x = 0\n" * 48),
    ("md", "## References\n\n" + "word " * 5000),
]


def test_a_page_says_how_long_it_takes():
    assert reading_time(notebook(*IDEA)["cells"]) == (5, None)  # 1000 words
    assert reading_time(notebook(*IDEA, *SOLUTION, *SHIPPED)["cells"]) == (5, 4)  # 48 lines
    folded = ("py", "#| code-fold: true\n" + "x = 0\n" * 48)
    assert reading_time(notebook(*IDEA, folded)["cells"]) == (5, None)
    said = {
        text(Page(ROOT, notebook(*cells), "10_topk.ipynb").filtered()["cells"][1]).split("\n")[1]
        for cells in (IDEA, [*IDEA, *SOLUTION, *SHIPPED])
    }
    assert said == {
        "About 5 minutes to read.",
        "About 5 minutes to [As it is shipped](#as-it-is-shipped), 4 more for all.",
    }


def test_the_mark_says_what_follows():
    nb = Page(ROOT, notebook(*IDEA, *SHIPPED), "10_topk.ipynb").filtered()
    page = Document(joined(nb))
    assert page.divs["shipped-note"] == 1 and (2, "as-it-is-shipped") in page.headings
    note = joined(nb).split("::: {.shipped-note}\n")[1].split("\n:::")[0]
    assert note == "What top_k refuses · Rows: about 4 minutes."
    alone = Page(ROOT, notebook(*IDEA, SHIPPED[0]), "10_topk.ipynb").filtered()
    assert "\nAbout 1 minute.\n:::\n" in joined(alone)


def of_index(source):
    nb = notebook(("md", "# Title"), ("md", source))
    return text(Page(ROOT, nb, "index.ipynb").filtered()["cells"][-1])


def test_a_page_can_say_the_minutes_of_others():
    times = reading_times(ROOT)
    said = of_index('[Top-k](topk.html) <span data-minutes="topk topp" data-say="({})"></span>')
    assert said == f"[Top-k](topk.html) ({times['topk'][0] + times['topp'][0]} minutes)"


# ---- what tools/pages.py looks for, as pandoc writes it (and Quarto, which is built on it)


def html(nb):
    options = dict(format="markdown", extra_args=["--section-divs"])
    return pypandoc.convert_text(joined(nb), "html5", **options)


def test_pandoc_s_mark_is_found():
    page = html(Page(ROOT, notebook(*IDEA, *SHIPPED), "10_topk.ipynb").filtered())
    new = folded(page)
    part = new.partition('id="below-the-mark">')[2].partition("shipped.look()")[0]
    assert "What <code>top_k</code> refuses" in part.partition("</script>")[2]
    assert "References" not in part and "4 minutes" not in part


def test_pandoc_s_glossary_is_read(filtered):
    words = glossary_of(html(filtered[ROOT / "nbs/C_glossary.ipynb"]))
    assert words["nucleus"][::2] == ("nucleus", "topp.html")
    assert len({place for place, _, _ in words.values()}) >= 40


def test_words_for_a_figure_are_prose():
    "No heading, no TeX: a screen reader reads them aloud."
    assert figure_text("", "A mask is $-\\infty$.\n\n## The code") == "A mask is -∞."
    said = figure_text('ax.set(title="waves")', "x\n\n$$\\sin\\big(t\\big)$$")
    assert said.startswith("waves. sin") and "\\" not in said
