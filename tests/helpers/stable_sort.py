"""Torch's sort promises no order for equals, and two dialects cut by it. These tests fix it: equals
stay as they stood."""

import torch

ARGSORT = torch.Tensor.argsort


def stable_argsort(z, dim=-1, descending=False, stable=False):
    "`Tensor.argsort`, always stable."
    return ARGSORT(z, dim=dim, descending=descending, stable=True)
