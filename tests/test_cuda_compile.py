"""Every CUDA kernel compiles for three generations of GPUs, on a machine without one."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install triton==3.7.1"
)

# What runs in a process of its own: in this one the kernels may be interpreted.
SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import decoding_book.kernels as C

POINTERS = dict(numbers="*fp64", names="*i64", parts="*fp64", peaks="*fp32", picks="*i32",
                list_y="*fp32",
                list_id="*i32", out="*i64", facts="*fp32")

def build(kernel, arch, dtype, fusion=False, **constants):
    fn = getattr(C, kernel)
    constants = {n: v for n, v in constants.items() if n in fn.arg_names}
    types = POINTERS | dict(logits="*" + dtype, across="i64", scale="fp32")
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in fn.arg_names}
    fixed = {(fn.arg_names.index(n),): v for n, v in constants.items()}
    source = ASTSource(fn=fn, signature=signature, constexprs=fixed)
    options = dict(num_warps=8, enable_fp_fusion=fusion)
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = done.asm["ptx"]
    assert len(done.asm["cubin"]) > 1000 and f"sm_{arch}" in ptx
    return dict(kernel=kernel, arch=arch, dtype=dtype, shared=done.metadata.shared,
                approximate=ptx.count("lg2.approx"), fused=ptx.count("fma.rn"),
                rough=ptx.count("div.full") + ptx.count("div.approx"), **constants)

print(json.dumps([build(**row) for row in json.loads(sys.argv[1])]))
"""
SIZES = dict(SLOTS=1024, BLOCK=2048, CHUNK=128, WIDE=512, PIVOTS=16)  # the defaults at V = 151 936
VARIANTS = [
    ("draw_kernel", 0),
    ("draw_kernel", 1),
    ("draw_kernel", 2),
    ("scan_kernel", 2),
    ("weigh_kernel", 2),
    ("finish_kernel", 0),
    ("finish_kernel", 1),
    ("finish_kernel", 2),
]
DTYPES = ["fp32", "bf16", "fp16"]
ARCHS = [80, 90, 100]


def compiled(rows):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(rows)],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_every_variant_compiles_for_its_target(full, record):
    """Each kernel for a target of its own, in types that take turns: `--full` takes all of
    everything. And what a launch folds into the code when an argument is 1: one row, one token; or
    a stride between tokens."""
    turns = {"scan_kernel": 80, "weigh_kernel": 80, "draw_kernel": 90, "finish_kernel": 100}
    rows = []
    for a, arch in enumerate(ARCHS):
        for i, (kernel, task) in enumerate(VARIANTS):
            if not full and (task < 2 or turns[kernel] != arch):
                continue
            slices = 1 if kernel == "draw_kernel" else 16
            rows += [
                dict(SIZES, kernel=kernel, arch=arch, dtype=d, TASK=task, SLICES=slices, step=1)
                for d in (DTYPES if full else [DTYPES[i % 3]])
            ]
        small = dict(
            SIZES, SLOTS=16, BLOCK=16, CHUNK=16, WIDE=16, kernel="draw_kernel", arch=arch, TASK=2
        )
        if a == 0 or full:
            rows.append(dict(small, dtype="bf16", B=1, V=1, across=1, step=1))
        if full:
            rows.append(dict(small, dtype="fp32"))
    built = compiled(rows)
    assert len(built) == len(rows)
    assert all(b["fused"] == b["rough"] == b["approximate"] == 0 for b in built), built
    assert all(b["shared"] < 48 * 1024 for b in built)
    tried = {(b["kernel"], b.get("TASK", 2)) for b in built}
    assert tried == {(kernel, task) for kernel, task in VARIANTS if full or task == 2}
    assert {b["dtype"] for b in built} == set(DTYPES)
    for arch in ARCHS:
        mine = [b for b in built if b["arch"] == arch]
        assert len(mine) >= 3 * len(VARIANTS) if full else mine
        record(
            f"cuda_compiled_sm_{arch}",
            {"variants": len(mine), "shared bytes": max(b["shared"] for b in mine)},
        )


@needs_triton
def test_fusion_is_what_would_change_the_token():
    """Left to itself the compiler fuses; `launch` says that it must not. So the count above can be
    another than 0."""
    row = dict(SIZES, kernel="weigh_kernel", arch=90, dtype="fp32", TASK=2, SLICES=16, step=1)
    assert compiled([row | dict(fusion=True)])[0]["fused"] > 20


# The kernels of the chapter itself, with the types it gives them. `look` and `on_list` take a
# function as an argument; `LISTS` are those that are handed to `on_list`.
F32, I32, I64, F64 = "*fp32", "*i32", "*i64", "*fp64"
LISTS = [
    "fetched",
    "counted",
    "weighed",
    "shared",
    "shared_mass",
    "last_one",
    "belonging",
    "won",
    "before",
    "surviving",
    "chosen_chunks",
    "collected",
    "listed",
    "chose",
    "near",
    "again",
    "ran_off",
    "read",
    "answered",
    "finished",
]
ROOM = dict(names=I64, peaks=F32, picks=I32, list_y=F32, list_id=I32)
SEVEN = dict(z=F32, t=F32, top=F32, scale="fp32", x=F64, out=F64, **ROOM)
SHOWN = [
    ("look", dict(x=F64, out=F64), dict(F="log_exactly", N=8)),
    ("look", dict(x=I64, out=I64), dict(F="stir32", N=4)),
    ("look", dict(x=I64, out=F32), dict(F="noise32", N=8)),
    ("show_places", dict(targets=F64, out=F64), {}),
    ("look", dict(x=F64, out=F64), dict(F="exp_exactly", N=8)),
    ("look", dict(x=F32, out=I32), dict(F="rank_key", N=8)),
    ("show_scan", dict(z=F32, peaks=F32, part=F64), dict(BLOCK=8, CHUNK=4)),
    ("first_max", dict(z=F32, out=I64), dict(BLOCK=256)),
    ("show_below", dict(z=F32, out=F32), dict(N=4)),
    ("largest", dict(z=F32, out=F32), dict(BLOCK=256)),
    ("first_look", dict(z=F32, peaks=F32), dict(BLOCK=256, CHUNK=4)),
    ("log_sum", dict(z=F32, out=F32), dict(BLOCK=256)),
    ("show_moments", dict(z=F32, out=F64), dict(BLOCK=256)),
    ("show_scaled", dict(z=F32, t=F32, out=F32), dict(N=8192)),
    ("show_weights", dict(z=F32, tops=F32, scale="fp32", out=F64), dict(BLOCK=512)),
    ("show_noise", dict(names=I64, out=F32), dict(BLOCK=4096)),
    ("show_race", dict(z=F32, names=I64, out=I64), dict(BLOCK=64)),
    ("show_peaks", dict(z=F32, peaks=F32, bad=F32), dict(CHUNK=4, ROWS=2)),
    (
        "show_cut",
        dict(z=F32, tops=F32, scale="fp32", targets=F64, values=F32, ids=I32),
        dict(MASS=True, WIDE=512),
    ),
    (
        "show_pick",
        dict(z=F32, tops=F32, scale="fp32", totals=F64, ks=I64, ps=F64, names=I64, out=I64),
        dict(TASK=2),
    ),
    ("show_key", dict(names=I64, out=I64), {}),
    ("show_bits", dict(names=I64, out=I64), dict(N=4)),
    ("show_as_list", dict(z=F32, t=F32, part=F64, out=F32), {}),
    ("show_merge", dict(part=F64, out=F64), dict(SLICES=2)),
    ("show_slices", dict(out=I64), dict(BLOCK=4, SLICES=2)),
    ("show_tile", dict(z=F32, out=F32, bad=I32), dict(N=8)),
    ("show_nothing", dict(part=F64), {}),
    *(("on_list", SEVEN, dict(F=name)) for name in LISTS),
]
CHAPTER = """
import json, sys
import chapter, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for name, types, constants in json.loads(sys.argv[1]):
    fn = getattr(chapter, name)
    if "F" in constants: constants["F"] = getattr(chapter, constants["F"])
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in fn.arg_names}
    fixed = {(fn.arg_names.index(n),): v for n, v in constants.items()}
    source = ASTSource(fn=fn, signature=signature, constexprs=fixed)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(done.asm["cubin"]) > 1000
    print(name)
"""


@needs_triton
def test_the_kernels_that_the_chapter_shows(tmp_path, full):
    """Those that only the page uses: four of them, and with `--full` all. None is left out of the
    table."""
    cells = [
        "".join(c["source"])
        for c in json.loads((ROOT / "nbs/18_kernels.ipynb").read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    kernels = [re.split(r"\n(?!@|def |    |\n)", s)[0] for s in cells if s.startswith("@jit")]
    names = {
        line.split("(")[0][4:]
        for s in kernels
        for line in s.splitlines()
        if line.startswith("def ")
    }
    assert names == {name for name, *_ in SHOWN} | {"stir32", "noise32", "question", *LISTS}
    text = (
        "import triton, triton.language as tl\nfrom decoding_book import kernels\n"
        "globals().update({n: v for n, v in vars(kernels).items() if not n.startswith('__')})\n\n\n"
        + "\n\n\n".join(kernels)
    )
    (tmp_path / "chapter.py").write_text(text)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT), env.get("PYTHONPATH", "")])
    rows = SHOWN if full else SHOWN[:4]
    done = subprocess.run(
        [sys.executable, "-c", CHAPTER, json.dumps(rows)],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    assert done.stdout.split() == [name for name, *_ in rows], done.stderr[-3000:]
