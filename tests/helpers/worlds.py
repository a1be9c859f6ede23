"""Worlds to search that several tests share: the oracle's, and models that count, remember or ask
for every id."""

from pathlib import Path

import numpy as np
import torch

from decoding_book.loop import Prediction
from decoding_book.toy import TableModel

DATA = np.load(Path(__file__).parents[1] / "oracle/cases.npz", allow_pickle=False)


CASES = sorted({k[:7] for k in DATA.files if k.startswith("sea_")})


class Counted:
    """A model that counts calls and rows."""

    def __init__(self, model):
        self.model, self.calls, self.rows = model, 0, 0
        for name in ("vocab_size", "eos", "start_ids", "context", "encode", "decode"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    def __call__(self, ids, **options):
        self.calls, self.rows = self.calls + 1, self.rows + len(ids)
        return self.model(ids, **options)


def case(name):
    def get(field):
        return DATA[f"{name}_{field}"]

    eos = int(get("eos")) if get("eos") >= 0 else None
    if f"{name}_init" in DATA:
        model = TableModel(get("init"), get("trans"), eos=eos)
    else:
        model = TableModel.from_tree([get(f"cond{t}") for t in range(int(get("T")))], eos=eos)
    return Counted(model), int(get("T")), get


def padded(hypothesis, T):
    return hypothesis.ids.tolist() + [-1] * (T - len(hypothesis))


# Caches and batches


class Remembered:
    """A table behind the cache contract: ids and masks are kept, positions and rows are checked."""

    def __init__(self, rows, length):
        self.capacity, self.ids, self.mask = (rows, length), None, None

    @property
    def length(self):
        return 0 if self.ids is None else self.ids.shape[1]

    def reorder(self, rows):
        assert len(rows) <= self.capacity[0]
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    keep = reorder


class Cached(Counted):
    def __init__(self, model):
        super().__init__(model)
        self.fed, self.caches = [], []

    def new_cache(self, rows, length):
        self.caches.append(Remembered(rows, length))
        return self.caches[-1]

    def __call__(self, ids, mask=None, cache=None, **options):
        self.fed.append(tuple(ids.shape))
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        if cache is not None:
            if cache.length:
                ids, mask = torch.cat([cache.ids, ids], 1), torch.cat([cache.mask, mask], 1)
            cache.ids, cache.mask = ids, mask
            assert ids.shape[0] <= cache.capacity[0] and ids.shape[1] <= cache.capacity[1]
        self.rows += len(ids)
        logits = []
        for row, real in zip(ids, mask):
            logits.append(self.model(row[real][None], **options).logits)
        return Prediction(torch.cat(logits), cache)


def markov(V=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(V + 1, V, generator=g, dtype=torch.float64) * 1.5
    return TableModel(z[0].softmax(-1), z[1:].softmax(-1), eos=V - 1)


class Deep:
    """Logits that depend on every id and its place."""

    vocab_size, eos, start_ids = 6, 5, []
    table = (
        torch.randn(97, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1.5
    )

    places = torch.tensor([0, 3, 7, 13, 29, 31, 41, 53, 61, 71, 83, 89, 11, 17])

    def __call__(self, ids, mask=None, **options):
        mask = torch.ones_like(ids) if mask is None else mask.long()
        places = self.places[mask.cumsum(1)] * mask
        return Prediction(self.table[((ids + 1) * places).sum(1) % 97])
