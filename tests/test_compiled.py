"""Compiled loops: the bits of the chapters' own arithmetic, and where the machine code is kept."""

import shutil
from pathlib import Path

import numpy as np
from helpers.new_process import run_python

from decoding_book import compiled, noise, topp
from decoding_book.noise import Key

INF = float("inf")


def test_functions_of_one_number_bit_for_bit(full):
    "Nothing is fused, reordered or taken from a library: Python's bits, NumPy's, the machine's."
    rng, n = np.random.default_rng(0), 200_000 if full else 20_000
    x = np.concatenate([rng.random(n), 10.0 ** rng.uniform(-320, 308, n)])
    d = -np.concatenate([10.0 ** rng.uniform(-9, 2.8, n), [0.0, 1e-300, 699.9]])
    bits = np.concatenate([rng.integers(0, 2**32, n), [0, 1, 2**32 - 1]])
    pairs = [
        (compiled.exact_log, noise.exact_log, x[x > 0]),
        (compiled.exact_exp, topp.exact_exp, d[d > -700]),
        (compiled.gumbel_of, noise.gumbel_of, bits),
        (compiled.mix, noise.mix, bits),
    ]
    for ours, plain, values in pairs:
        assert np.array_equal([ours(v) for v in values], plain(values)), plain
        if ours is not compiled.mix:  # whose products wrap in machine code
            assert [ours.py_func(v) for v in values[:500]] == plain(values[:500]).tolist()
    assert compiled.exact_exp(-INF) < 1e-300
    words = np.array(Key(2**64 - 1, 7, 8, 9).words(), np.uint32)
    assert compiled.key_state(words) == noise.key_state([int(w) for w in words])


def test_a_caller_that_may_reorder_sums_does_not_change_them_here(tmp_path):
    """numba compiles a function on the way to its caller, and would take over the caller's leave to
    add in any order, keep it on disk, and use it for the draw."""
    code = (
        "import numpy as np, torch; from decoding_book import compiled, four_bits, topp;"
        "x = np.ones(32, np.float32); four_bits.silu_times(x, x, x.copy());"
        "d = -10.0 ** np.random.default_rng(0).uniform(-9, 2.8, 3000);"
        "print([compiled.exact_exp(v) for v in d] == topp.exact_exp(d).tolist())"
    )
    out, err = run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).communicate()
    assert out.strip() == "True", err


SMALL = "import numpy as np; from decoding_book import compiled; print(compiled.mix(np.uint32(5)))"


def test_where_nothing_can_be_written(tmp_path):
    "An installation that cannot be written to, and a user without a cache folder."
    installed = tmp_path / "decoding_book"
    shutil.copytree(
        Path(compiled.__file__).parent, installed, ignore=shutil.ignore_patterns("__pycache__")
    )
    folder = installed / "__pycache__"
    folder.write_text("a file where the folder should be")
    nowhere = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder), "NUMBA_CACHE_DIR": ""}
    out, err = run_python(SMALL, tmp_path, **nowhere).communicate()
    assert out.split() == [str(noise.mix(5))], err
    kept, more = tmp_path / "kept", {"XDG_CACHE_HOME": str(tmp_path / "kept")}
    out, err = run_python(SMALL, tmp_path, **nowhere | more).communicate()
    assert out.split() == [str(noise.mix(5))] and list(kept.rglob("*.nbc")), err


def test_two_processes_compile_at_once(tmp_path, full):
    "Both get their result, and what they keep serves a third."
    draw_one = (
        "import torch; from decoding_book import fused; print(fused.fused_sample([[0.0, 1]]))"
    )
    code = SMALL + "; " + draw_one if full else SMALL
    where = {"NUMBA_CACHE_DIR": str(tmp_path)}
    both = [run_python(code, **where) for _ in range(2)]
    results = [p.communicate() for p in both]
    results.append(run_python(code, **where).communicate())
    assert len({out for out, _ in results}) == 1 and results[0][0], results
    assert all("rror" not in err for _, err in results) and "compiling" not in results[2][1]
