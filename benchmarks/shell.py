"""Seconds from the start of the command to what a person waits for: the first token in a terminal,
the help, the sentence about a slip.

    python -m benchmarks.shell              five starts of each
    python -m benchmarks.shell --quick      two of each, nothing recorded

Each start is a process of its own with a pseudo-terminal. The file cache of the machine is warm,
the compiled loops are on disk. `seconds` is the median of the starts, `worst` the largest.
"""

import os
import pty
import statistics
import subprocess
import sys
import time

from benchmarks.common import PROMPT, arguments, load, save

CALLS = {  # words -> the text whose end is waited for, or None: the end of all
    "--weights q4": PROMPT,
    "--weights float32": PROMPT,
    "--help": None,
    "--top_p .9": None,
    "--top-p 1.5": None,
}


def start(
    words,  # Of the call
    **options,  # Of `Popen`
):
    "The command in a terminal of its own: the process, and where to read what it shows."
    mine, its = pty.openpty()
    command = [sys.executable, "-m", "decoding_book", *words]
    ends = {"stdin": its, "stdout": its, "stderr": its} | options
    process = subprocess.Popen(command, **ends)
    os.close(its)
    return process, mine


def shown(
    mine,  # From `start`
):
    "What appears on the terminal, piece by piece, until the command ends."
    while True:
        try:
            piece = os.read(mine, 4096)
        except OSError:  # nobody holds the other end any more
            piece = b""
        if not piece:
            os.close(mine)
            return
        yield piece.replace(b"\r\n", b"\n").decode("utf-8", "replace")


def wait(
    words,  # Of the call
    prompt,  # Shown before the first token; None: wait for the end
):
    "Seconds until the first token, or until the end."
    begin, seen, first = time.perf_counter(), "", None
    process, mine = start([prompt or "hello", *words, "--max-new-tokens", "4", "--no-color"])
    for piece in shown(mine):
        seen += piece
        if first is None and prompt and len(seen) > len(prompt):
            first = time.perf_counter() - begin
    process.wait()
    assert not prompt or seen.startswith(prompt), seen
    return first if prompt else time.perf_counter() - begin


def main():
    args = arguments(__doc__, "shell.json", {"starts": 5}, {"starts": 2})
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    rows = []
    for words, prompt in CALLS.items():
        wait(words.split(), prompt)  # what is read is in the file cache then
        times = [wait(words.split(), prompt) for _ in range(args.starts)]
        middle, worst = statistics.median(times), max(times)
        rows.append({"words": words, "seconds": round(middle, 2), "worst": round(worst, 2)})
        print(rows[-1], f"load {load()}", flush=True)
    if not args.quick:
        save(args.out, rows=rows)


if __name__ == "__main__":
    main()
