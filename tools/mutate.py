"""Break named lines of the package one at a time: each break must turn a test red.

    python tools/mutate.py                all of them
    python tools/mutate.py loop smollm    those of two modules
    python tools/mutate.py --list         what there is

The breaks stand in tests/breaks/<module>.toml: why it matters, a piece of the module's text that
occurs exactly once, what takes its place, and the tests that should notice (pytest arguments). The
package is copied to a folder under build/ and broken there; the tests run against the copy.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

try:
    import tomllib
except ImportError:  # before Python 3.11
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = (
    900  # seconds; a break that makes its tests hang is noticed, as by a person at a terminal
)
COPIES = ROOT / "build" / f"mutate-{os.getpid()}"  # two runs do not meet


def read_breaks():
    "All breaks of tests/breaks/, each with its `module`, `why`, `old`, `new` and `tests`."
    for path in sorted((ROOT / "tests/breaks").glob("*.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        for row in table["break"]:
            yield {"module": path.stem, "tests": table["tests"]} | row


def copy():
    "This worker's own folder."
    return COPIES / str(os.getpid())


def run(
    *args,  # What comes after `python`
):
    "Run Python in the copy's folder, so that the copy is what it imports."
    path = os.pathsep.join(filter(None, [str(copy()), os.environ.get("PYTHONPATH", "")]))
    env = dict(os.environ, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run(
        [sys.executable, *args],
        cwd=copy(),
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def run_tests(
    tests,  # Arguments for pytest, in one string; paths start with tests/
):
    "Whether the tests pass against the copy."
    args = [str(ROOT / a) if a.startswith("tests/") else a for a in shlex.split(tests)]
    done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *args)
    if done.returncode not in (0, 1, 2):  # 2: a test, or the import of the module, broke off
        sys.exit(f"pytest could not run {tests}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


# What numba compiles into the code that it keeps
IN_LOOPS = {"noise", "topp", "compiled", "fused", "four_bits"}


def fresh_copy(
    module=None,  # The one to be broken
):
    "The package as it is, copied, with its compiled loops where the break cannot reach them."
    shutil.rmtree(copy(), ignore_errors=True)
    skip = "__pycache__" if module in IN_LOOPS else "*.pyc"
    shutil.copytree(
        ROOT / "decoding_book",
        copy() / "decoding_book",
        ignore=shutil.ignore_patterns(skip),
    )


def check_origin():
    "The tests must import the copy, or every mutation would survive for the wrong reason."
    origin = run("-c", "import decoding_book; print(decoding_book.__file__)").stdout.strip()
    if not origin.startswith(str(copy())):
        sys.exit(f"the tests would import {origin}, not the copy in {copy()}")


def broken(
    row,  # A break
):
    "Write the broken module into the copy."
    path = copy() / "decoding_book" / f"{row['module']}.py"
    text = path.read_text(encoding="utf-8")
    if text.count(row["old"]) != 1:
        sys.exit(f"{path.name} holds {text.count(row['old'])} times, not once: {row['old']!r}")
    path.write_text(text.replace(row["old"], row["new"]), encoding="utf-8")


def clean(
    tests,  # Arguments for pytest
):
    "Whether the tests pass while nothing is broken."
    fresh_copy()
    check_origin()
    return run_tests(tests)


def attempt(
    row,  # A break
):
    "Whether a break survives its tests, and the seconds it took to know."
    start = time.perf_counter()
    fresh_copy(row["module"])
    broken(row)
    try:
        survived = run_tests(row["tests"])
    except subprocess.TimeoutExpired:
        survived = False
    return survived, time.perf_counter() - start


def find_survivors(
    rows,  # Breaks
    pool,  # Where they are tried
):
    "Try every break, say what came of it, and return the survivors in words."
    suites, survivors = sorted({r["tests"] for r in rows}), []
    for tests, passed in zip(suites, pool.map(clean, suites)):
        if not passed:
            sys.exit(f"{tests} fails before anything is broken")
    for row, (survived, seconds) in zip(rows, pool.map(attempt, rows)):
        if survived:
            survivors.append("{module}: {why} ({tests})".format(**row))
        verdict = "SURVIVED" if survived else "noticed"
        print(f"  {verdict:8} {row['module']:12} {row['why']} ({seconds:.0f} s)", flush=True)
    return survivors


def main():
    "Run the rows that were asked for, and name the survivors."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="modules whose rows to run (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="how many breaks to try at a time")
    parser.add_argument("--record", metavar="FILE", help="add the counts to this file of results")
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    args = parser.parse_args()
    rows = [r for r in read_breaks() if not args.modules or r["module"] in args.modules]
    if args.list:
        for row in rows:
            print("{module:12} {why:50} {tests}".format(**row))
        return
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.jobs) as pool:
        survivors = find_survivors(rows, pool)
    print(f"{len(rows) - len(survivors)} of {len(rows)} breaks were noticed")
    if args.record:
        path = Path(args.record)
        results = json.loads(path.read_text(encoding="utf-8"))
        results["mutations"] = {"tried": len(rows), "noticed": len(rows) - len(survivors)}
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if survivors:
        sys.exit("no test noticed:\n  " + "\n  ".join(survivors))


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(COPIES, ignore_errors=True)
