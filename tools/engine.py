"""What the page `play` runs: llama.cpp for browsers, the model's file, and the page's scripts.

    python tools/engine.py --out _site/play

The engine is the package @wllama/wllama of a pinned version. npm fetches it from the registry that
this machine is set up for; it is kept in build/engine. Without npm or a network the page is there
all the same, and says that it has no engine.
"""

import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, VERSION = "@wllama/wllama", "2.4.0"
SHA512 = "KuVHeTUXcqHF01d85q3nWaRSVLpszULNGjO+nx4cyZ8sBjZvKSMViWNCfcs/1w2bqjyegERJzWsrdQSHSEoSlQ=="
FILES = {  # in the package: beside the page
    "esm/index.min.js": "wllama.js",
    "esm/single-thread/wllama.wasm": "single.wasm",
    "esm/multi-thread/wllama.wasm": "multi.wasm",
    "LICENCE": "wllama-LICENCE",
}
MODEL = "smollm2-q4.gguf"


def fetched(
    folder,  # To work in
):
    "The package's archive, its checksum compared."
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", folder]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)
    archive = next(Path(folder).glob("*.tgz"), None)
    if done.returncode or archive is None:
        raise OSError(f"npm could not fetch {PACKAGE} {VERSION}")
    digest = hashlib.sha512(archive.read_bytes()).digest()
    if base64.b64encode(digest).decode() != SHA512:
        raise OSError(f"{PACKAGE} {VERSION} is not the archive that this book was made with")
    return archive


def engine(
    cache=ROOT / "build/engine",  # Where it is kept
):
    "The folder with the engine's files, fetched if it is not there; None, with a word, without it."
    home = Path(cache) / VERSION
    if home.is_dir():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as work:
        try:
            archive, fresh = fetched(work), Path(work) / "fresh"
            fresh.mkdir()
            with tarfile.open(archive) as tar:
                for inside, name in FILES.items():
                    (fresh / name).write_bytes(tar.extractfile(f"package/{inside}").read())
            fresh.rename(home)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"The page `play` is built without its engine: {error}.", file=sys.stderr)
            return None
    return home


def link(
    path,  # A large file
    place,  # Where it shall be, too
):
    "A second name of the file, or a copy where there can be none."
    try:
        os.link(path, place)
    except OSError:
        shutil.copy2(path, place)


def add(
    out,  # The folder beside the page
    home=None,  # The engine's, from `engine`
):
    "Write the page's scripts, the engine and the model, and what the page must know of them."
    from decoding_book.smollm import weights_path
    from decoding_book.trees import STEP_CSS, STEP_SCRIPT

    out, known = Path(out), None
    out.mkdir(parents=True, exist_ok=True)
    if home is not None:
        for name in FILES.values():
            shutil.copyfile(home / name, out / name)
        weights = weights_path()
        (out / MODEL).unlink(missing_ok=True)
        link(weights, out / MODEL)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
        known = {"model": MODEL, "bytes": weights.stat().st_size, "digest": digest}
    style, script = STEP_CSS[len("<style>") :], STEP_SCRIPT[len("<script>") :]
    stepper = {
        "style": style.removesuffix("</style>"),
        "script": script.removesuffix("</script>"),
    }
    given = json.dumps({"engine": known, "stepper": stepper})
    (out / "engine.js").write_text(
        f"globalThis.knobBoard = Object.assign(globalThis.knobBoard ?? {{}}, {given});\n",
        encoding="utf-8",
    )
    for name in ("beam.js", "play.js", "play.css"):
        shutil.copy2(Path(__file__).with_name(name), out)


def main():
    "Read the command line, fetch, write."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", default=ROOT, help="folder with decoding_book/")
    parser.add_argument("--out", required=True, help="the folder beside the page")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(args.project).resolve()))
    add(args.out, engine())


if __name__ == "__main__":
    main()
