"Files of weights beside the package gguf: read, written and unpacked alike."

import sys

import pytest
import torch
from helpers.gguf_files import packed, write

import decoding_book.gguf_file as gguf_file
from decoding_book.gguf_file import TYPES, dequantise, read_gguf
from decoding_book.smollm import weights_path

gguf = pytest.importorskip("gguf")
OURS = sorted(gguf_file.BLOCKS)


def test_the_file_is_read_as_the_package_gguf_reads_it(reference):
    weights, fields = reference
    meta, tensors = read_gguf(weights_path())
    assert meta == {k: v for k, v in fields.items() if not k.startswith("GGUF.")}
    assert tensors.keys() == weights.keys()
    for name, tensor in tensors.items():
        assert torch.equal(dequantise(*tensor), weights[name]), name


# Alignment


@pytest.mark.parametrize("align", [8, 16, 32, 64, 128, 256, 4096])
def test_any_alignment_is_read_as_the_package_reads_it(tmp_path, align):
    for length in range(0, 70, 7):
        tensors = {
            name: torch.randn(n, generator=torch.Generator().manual_seed(n))
            for name, n in (("a", 5), ("b", 3))
        }
        path = write(
            tmp_path / f"{length}.gguf",
            {"general.architecture": "x", "x.pad": "y" * length},
            tensors,
            align,
        )
        found = read_gguf(path)[1]
        for theirs in gguf.GGUFReader(path).tensors:
            ours = dequantise(*found[theirs.name])
            assert ours.equal(torch.tensor(theirs.data)) and ours.equal(tensors[theirs.name])


# Types


def test_types_have_the_names_that_the_package_gives_them():
    assert {t.value: t.name for t in gguf.GGMLQuantizationType} == {
        k: n for k, n in TYPES.items() if n != "."
    }
    assert all(tuple(gguf.GGML_QUANT_SIZES[kind]) == gguf_file.BLOCKS[kind] for kind in OURS)
    assert {TYPES[kind] for kind in OURS} == {
        "F32",
        "F16",
        "BF16",
        "Q8_0",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
    }


@pytest.mark.parametrize("kind", OURS, ids=TYPES.get)
def test_our_types_are_unpacked_without_the_package_and_as_it_does(kind, monkeypatch):
    data, want = packed((48, 96), gguf.GGMLQuantizationType(kind))
    monkeypatch.setitem(sys.modules, "gguf", None)
    raw = torch.tensor(data).view(torch.uint8).flatten()
    assert dequantise(raw, kind, (48, 96)).equal(want)
    shifted = torch.cat([raw[:1], raw])[1:]  # begins at an odd byte
    assert dequantise(shifted, kind, (48, 96)).equal(want)


@pytest.mark.parametrize("kind", OURS, ids=TYPES.get)
def test_any_bits_are_unpacked_as_the_package_does(kind):
    rng = torch.Generator().manual_seed(kind)
    data = torch.randint(
        0,
        256,
        (64, 3 * gguf_file.BLOCKS[kind][1] * (32 if kind in gguf_file.FLOATS else 1)),
        generator=rng,
    ).to(torch.uint8)
    want = torch.tensor(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType(kind)))
    torch.testing.assert_close(
        dequantise(data.flatten(), kind, (64, 96)), want, rtol=0, atol=0, equal_nan=True
    )
