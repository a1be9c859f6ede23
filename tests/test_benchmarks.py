"""The GPU benchmark's own logic, without a GPU: its plan, resuming, verdict and peers' laws."""

import json
from types import SimpleNamespace

import pytest
import torch

import benchmarks.cuda as bench
from benchmarks.common import write


def test_the_plan_has_every_cell_and_the_goals_first():
    plan = bench.plan(SimpleNamespace(dry=False, quick=False))
    have = {(label, B, V, kind, d) for label, B, V, kind, d in plan}
    assert len(plan) == len(have) == 4 * (2 * 4 * 5 * 2 + 5 * 2)
    for V in (32_000, 128_256, 151_936, 262_144):
        for B in (1, 8, 32, 128, 512):
            for kind in ("peaked", "flat"):
                for d in (torch.float32, torch.bfloat16):
                    assert all((s, B, V, kind, d) in have for s in bench.SETTINGS)
    assert {B for _, B, _, kind, _ in plan if kind == "real"} == set(bench.BATCHES)
    assert all(V == 151_936 for _, _, V, _, _ in plan[:32])  # the goals' cells first


def test_it_goes_on_where_it_stopped(tmp_path):
    path, here = tmp_path / "new" / "cuda.json", dict(date="now", gpu="A", torch="1")
    assert bench.resumed(path, here) == {}
    write(path, {"machine": here | {"date": "before"}, "code": bench.code(), "cells": [1]})
    assert bench.resumed(path, here)["cells"] == [1]
    assert bench.resumed(path, here | {"gpu": "B"}) == {}  # another machine
    write(path, {"machine": here, "code": "old", "cells": [1]})
    assert bench.resumed(path, here) == {}  # other kernels
    path.write_text("{")
    assert bench.resumed(path, here) == {}


def test_the_verdict_names_the_cells_that_miss():
    def cell(B, book, read, peer, V=151_936):
        return {
            "filters": "top-p",
            "B": B,
            "V": V,
            "rows": "flat",
            "dtype": "float32",
            "us": {"book (graph)": book, "read (graph)": read, "flashinfer (graph)": peer},
        }

    said = bench.verdict(
        [
            cell(128, 61, 20, 99),
            cell(128, 60, 20, 50),
            cell(8, 15, 1, 99),
            cell(1, 16, 1, 99),
            cell(32, 99, 1, 200),
        ]
    )
    assert said["over three reads"] == [
        "top-p, flat, B=128, V=151936, float32: 3.0"
    ]  # 61 is, 60 is not
    assert [x.split(", ")[2] for x in said["over 15 us"]] == ["B=1"]
    assert said["FlashInfer is ahead"] == [
        "top-p, flat, B=128, V=151936, float32: 60.0 against 50.0"
    ]


@pytest.mark.parametrize("name", ["book, plain", "book, as on the CPU", "torch sort", "torch topk"])
def test_peers_follow_the_law(name):
    torch.manual_seed(3)
    found = bench.check(name, bench.PEERS[name], "cpu", 20_000)
    assert all(v > 1e-4 for v in found.values() if isinstance(v, float)), found
    assert set(found["tie kept"]) <= {0, 1, 2}


def test_the_cpu_design_at_the_size_where_it_groups():
    """V = 4096 with k = 50 goes through the groups; what it draws is among the 50 best, or in the
    nucleus."""
    torch.manual_seed(4)
    z = 3 * torch.randn(40, 4100)
    for settings in bench.SETTINGS.values():
        ids = bench.two_stage(40, 4100, settings, "cpu")(z)
        kept = bench_kept(z, settings)
        assert kept.gather(1, ids[:, None]).all()


def bench_kept(z, settings):
    from decoding_book.sampler import Sampler, truncate

    return truncate(z, Sampler(**settings)).isfinite()


def test_the_recorded_file_is_whole():
    "If there is one: it names its machine, and every cell has its limit."
    path = bench.ROOT / "benchmarks/cuda.json"
    if not path.is_file():
        pytest.skip("no GPU has been at hand: benchmarks/cuda.json does not exist")
    found = json.loads(path.read_text())
    assert found["machine"]["gpu"] and all("read (plain)" in c["us"] for c in found["cells"])
