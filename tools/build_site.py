"""Build the site from a project's notebooks as they stand, with Quarto if it is installed, else in
pure Python.

    python tools/build_site.py --project build/book --out _site

Both renderers get the same staged folder: the filtered notebooks under their page names, and
`_quarto.yml` with its paths changed to match. Afterwards the pages are made to need no network:
KaTeX comes from tools/vendor/.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from nbfilter import Page, lines, page_names, text  # noqa: E402
from pages import LIVE, PLACE, improve  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
KATEX = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[^/\"']+/dist/?")
REMOTE_IMPORT = re.compile(r"@import\s*(?:url\(['\"]?https?:[^)]*\)|(['\"])https?:.*?\1)[^;]*;")
# Where a page loads something from another host: a tag, a script that adds a tag, a style sheet.
ELSEWHERE = re.compile(
    r"""<(?:script|img|source|iframe|video|audio)\b[^>]*?\ssrc=["']((?:https?:)?//[^"']+)"""
    r"""|<link\b(?=[^>]*stylesheet)[^>]*?\shref=["']((?:https?:)?//[^"']+)"""
    r"""|\.(?:src|href)\s*=\s*["']((?:https?:)?//[^"']+)"""
    r"""|@import\s*["']((?:https?:)?//[^"']+)|url\(\s*["']?((?:https?:)?//[^"')]+)"""
)
# Pages opened as files may not fetch: then the search index comes from a script.
SEARCH = """<script>
if (location.protocol === "file:") {
  const ask = window.fetch;
  window.fetch = (url, options) => !String(url).endsWith("search.json") ? ask(url, options)
    : new Promise((done, fail) => {
        const script = document.createElement("script");
        script.src = String(url) + ".js";
        script.onload = () => done(new Response(JSON.stringify(window.searchIndex)));
        script.onerror = fail;
        document.head.append(script);
      });
}
</script>
"""


def flat_paths(
    value,  # Any part of the configuration
    pages,  # Notebook name -> page name
):
    """The configuration with `nbs/01_loop.ipynb` changed to `loop.ipynb`, and left out where it is
    missing."""
    if isinstance(value, dict):
        return {k: flat_paths(v, pages) for k, v in value.items()}
    if isinstance(value, list):
        kept = [flat_paths(v, pages) for v in value]
        return [v for v in kept if v is not None and v != {} and not empty_section(v)]
    if isinstance(value, str) and value.startswith("nbs/"):
        name = value.removeprefix("nbs/")
        if name.endswith(".ipynb") and "*" not in name and name not in pages:
            print(f"_quarto.yml names {value}, which does not exist", file=sys.stderr)
            return None
        return f"{pages[name]}.ipynb" if name in pages else name
    return value


def empty_section(
    value,  # An entry of the navigation
):
    "Whether it is a section without pages."
    return isinstance(value, dict) and "section" in value and not value.get("contents")


def stage(
    project,  # The folder with nbs/ and the package
    dest,  # A folder to make anew
    quarto,  # Whether Quarto will render it
):
    "Write the filtered notebooks and the configuration, all in one flat folder."
    shutil.rmtree(dest, ignore_errors=True)
    dest.mkdir(parents=True)
    pages = page_names(project)
    for name, page in pages.items():
        nb = json.loads((project / "nbs" / name).read_text(encoding="utf-8"))
        nb = Page(project, nb, name).filtered()
        if not quarto:  # the name of the file already says it
            front = nb["cells"][0]
            front["source"] = lines(re.sub(r"output-file: .*\n", "", text(front)))
        (dest / f"{page}.ipynb").write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")
    for extra in [p for p in (project / "nbs").iterdir() if p.suffix in {".png", ".svg", ".css"}]:
        shutil.copy2(extra, dest / extra.name)
    config = yaml.safe_load((project / "_quarto.yml").read_text(encoding="utf-8"))
    config = flat_paths(config, pages)
    config.pop("ipynb-filters", None)
    html = config["format"]["html"]
    css = project / html["css"]
    shutil.copy2(css, dest / css.name)
    html["css"] = css.name
    if not quarto:
        html.pop("html-math-method", None)
        config.pop("execute", None)
    (dest / "_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def loaded_from_elsewhere(
    content,  # A page or a style sheet
):
    "The addresses on other hosts from which it would load something."
    return [next(filter(None, match)) for match in ELSEWHERE.findall(content)]


def add_players(
    site,  # The rendered site
    project,  # The folder with the package, whose build/board keeps the rows
):
    "The knob board's scripts and rows, and the engine of `play`, if a page has a place for them."
    pages = [p.read_text(encoding="utf-8") for p in site.rglob("*.html")]
    env = dict(os.environ, PYTHONPATH=str(project))
    for name, places in {"board": (PLACE, LIVE), "play": (LIVE,)}.items():
        if not any(place in page for page in pages for place in places):
            continue
        script = ROOT / "tools" / {"board": "board.py", "play": "engine.py"}[name]
        command = [sys.executable, script, "--project", project, "--out", site / name]
        if subprocess.run(command, env=env).returncode:
            sys.exit(f"{script.name} could not make what a page needs")


def finish(
    site,  # The rendered site
    project=ROOT,  # The folder with the package
):
    "Make the site need nothing from the network, and its search work from a file."
    katex, outside = False, []
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        content = old = path.read_text(encoding="utf-8")
        up = "../" * (len(path.relative_to(site).parts) - 1)
        content = KATEX.sub(f"{up}site_libs/katex/", content)
        content = REMOTE_IMPORT.sub("", content)
        katex |= content != old and path.suffix == ".html"
        if path.suffix == ".html":
            content = content.replace("</title>", "</title>\n" + SEARCH, 1)
        if content != old:
            path.write_text(content, encoding="utf-8")
        outside += [f"{path.name} loads {url}" for url in loaded_from_elsewhere(content)]
    if outside:
        sys.exit("the site would need the network: " + "; ".join(outside))
    if katex:
        shutil.copytree(ROOT / "tools/vendor/katex", site / "site_libs/katex", dirs_exist_ok=True)
    shutil.copy2(ROOT / "tools/book.js", site)
    add_players(site, project)
    improve(site)
    index = site / "search.json"
    if index.is_file():
        found = index.read_text(encoding="utf-8")
        index.with_name("search.json.js").write_text(
            f"window.searchIndex = {found};\n", encoding="utf-8"
        )


def build(
    project,  # The folder with nbs/, the package and _quarto.yml
    out,  # Where the site goes; what was there is replaced
    work=None,  # A folder for the staged files (default: `site` in the project's parent)
    quiet=False,  # Say nothing but warnings
):
    "Build the site and return its folder."
    project, out = Path(project).resolve(), Path(out).resolve()
    work = Path(work or project.parent / f"{project.name}-site").resolve()
    quarto = shutil.which("quarto")
    stage(project, work, bool(quarto))
    command = (
        [quarto, "render", str(work)]
        if quarto
        else [sys.executable, "-m", "smalldocs.cli", "render", "--quiet", str(work)]
    )
    env = dict(os.environ, QUARTO_PYTHON=sys.executable)
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    notes = done.stderr.strip()
    if done.returncode or (notes and not quiet and not quarto):
        print(notes or done.stdout, file=sys.stderr)
    if done.returncode:
        sys.exit(f"the site was not built: {Path(command[0]).name} ended with {done.returncode}")
    finish(work / "_site", project)
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(work / "_site", out)
    return out


def main():
    "Read the command line, build, say where to look."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", default=ROOT, help="folder with nbs/ and _quarto.yml")
    parser.add_argument("--out", default=ROOT / "_site", help="where the site goes")
    parser.add_argument("--work", help="folder for staged files (default: in build/)")
    args = parser.parse_args()
    project = Path(args.project).resolve()
    work = args.work or ROOT / "build" / "site"
    out = build(project, args.out, work)
    pages = len(list(out.glob("*.html")))
    name = "Quarto" if shutil.which("quarto") else "smalldocs"
    print(f"Built {pages} pages with {name}. Open {out / 'index.html'}")


if __name__ == "__main__":
    main()
