"Temperature: its limits, extremes and rows that differ. With top-k: test_topk.py."

import numpy as np
import pytest
import torch
from helpers.rows import exact_softmax, kept, rows, tied

from decoding_book.temperature import temperature
from decoding_book.topk import top_k

INF = float("inf")


def test_properties_of_temperature():
    z = rows(500, 12, 5)
    z[:, 4] = -INF
    T = torch.linspace(0, 3, 500, dtype=torch.float64)
    out, perm = temperature(z, T), torch.randperm(12)
    assert torch.equal(out[1:], z[1:] / T[1:, None])
    assert torch.equal(temperature(z, 1), z) and (kept(out)[1:] == kept(z)[1:]).all()
    assert torch.equal(temperature(z[:, perm], T), out[:, perm])
    assert [temperature(z[i], T[i]).tolist() for i in range(500)] == out.tolist()
    assert (
        torch.equal(temperature(z, 0).argmax(-1), z.argmax(-1))
        and (kept(temperature(z, 0)).sum(-1) == 1).all()
    )
    assert torch.equal(temperature(z, 0).amax(-1), z.amax(-1))
    p = temperature(z.float(), 1e-4).softmax(-1)
    assert torch.equal((p > 0.5).int().argmax(-1), z.argmax(-1))
    assert torch.equal(top_k(temperature(z, 0), 3), temperature(z, 0))
    ties = tied(300, 9, 6)
    assert torch.equal(temperature(ties, 0), top_k(ties, 1))  # the first maximum, both


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-5), (torch.float64, 1e-9)])
def test_no_temperature_overflows(dtype, atol):
    big = torch.finfo(dtype).max
    cases = [
        [1e30, 5e29, -1e30, -INF],
        [0.0, -1.0, -2.0, 1.0],
        [big, big, -big, 0.0],
        [-big, -big, -INF, -big],
        [1e-30, 0.0, -1e-30, 2e-30],
        [3e38, -3e38, 2.9e38, 3e38],
        [88.0, 87.0, 0.0, -500.0],
    ]
    for z in cases:
        z = torch.tensor(z, dtype=dtype)
        for T in (1e-30, 1e-300, 5e-324, 1e-10, 0.3, 1.0, 7.0, 1e10, 1e38, 1e300):
            out = temperature(z, T)
            assert not out.isnan().any() and (out < INF).all() and torch.equal(kept(out), kept(z))
            low = max(T, torch.finfo(dtype).smallest_normal)  # as the chapter states
            high = min(low, torch.finfo(dtype).max)
            expected = exact_softmax(z.tolist(), high)
            assert np.abs(out.softmax(-1).numpy() - expected).max() < atol, (z, T)


def test_a_row_that_overflows_leaves_its_neighbours_alone():
    z = torch.tensor([[1.0, 2.0], [1e30, 0.0], [3.0, 1.0]])
    out = temperature(z, [0.5, 1e-30, 2.0])
    assert torch.equal(out[0], z[0] / 0.5) and torch.equal(out[2], z[2] / 2) and out[1, 0] == 0
