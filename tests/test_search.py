"""Search against the oracle's cases: exhaustive, best-first, greedy and beam."""

from pathlib import Path

import numpy as np
import pytest
import torch

from decoding_book.beam import beam_search
from decoding_book.exhaustive import best_first_search, exhaustive_search
from decoding_book.toy import TableModel

DATA = np.load(Path(__file__).parent / "oracle" / "open.npz", allow_pickle=False)
CASES = sorted({k[:7] for k in DATA.files if k.startswith("sea_")})


class Counted:
    """A model that counts calls and rows."""
    def __init__(self, model):
        self.model, self.calls, self.rows = model, 0, 0
        for name in ("vocab_size", "eos", "start_ids", "context", "encode", "decode"):
            if hasattr(model, name): setattr(self, name, getattr(model, name))

    def __call__(self, ids, **options):
        self.calls, self.rows = self.calls + 1, self.rows + len(ids)
        return self.model(ids, **options)


def case(name):
    get = lambda field: DATA[f"{name}_{field}"]
    eos = int(get("eos")) if get("eos") >= 0 else None
    if f"{name}_init" in DATA: model = TableModel(get("init"), get("trans"), eos=eos)
    else: model = TableModel.from_tree([get(f"cond{t}") for t in range(int(get("T")))], eos=eos)
    return Counted(model), int(get("T")), get


def padded(hypothesis, T): return hypothesis.ids.tolist() + [-1] * (T - len(hypothesis))


def test_all_cases_are_there(): assert len(CASES) == 24


@pytest.mark.parametrize("name", CASES)
def test_oracle_best(name):
    model, T, get = case(name)
    exhaustive = exhaustive_search(model, "", T)
    assert model.calls <= T and model.rows == exhaustive.rows
    for found in exhaustive, best_first_search(model, "", T), best_first_search(model, "", T, n_best=10, batch=7, chunk=2):
        assert padded(found[0], T) == get("best_seq").tolist()
        assert abs(found[0].logprob - get("best_logp")) < 1e-9 and found.proven


@pytest.mark.parametrize("name", CASES)
def test_oracle_beam(name):
    _, T, get = case(name)
    for i, k in enumerate(get("ks").tolist()):
        model = case(name)[0]
        found = beam_search(model, "", k, T)
        assert padded(found[0], T) == get("beam_seq")[i].tolist()
        assert abs(found[0].logprob - get("beam_logp")[i]) < 1e-9
        assert model.rows == found.rows == get("beam_calls")[i]


@pytest.mark.parametrize("name", CASES)
def test_oracle_whole_beam(name):
    model, T, get = case(name)
    found = beam_search(model, "", 3, T, n_best=3)
    assert [padded(h, T) for h in found] == get("beam3_seqs").tolist()
    assert np.abs([h.logprob for h in found] - get("beam3_logps")).max() < 1e-9
