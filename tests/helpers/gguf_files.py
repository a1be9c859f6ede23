"Files of weights and packed weights, made by the package gguf."

import pytest
import torch

gguf = pytest.importorskip("gguf")


def add(writer, name, value):
    "An entry, by the writer of the package gguf."
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](name, value)


def write(path, meta, tensors, align=None):
    "A file written by the package gguf; `tensors` holds float tensors, or (array, type)."
    writer = gguf.GGUFWriter(path, meta["general.architecture"])
    if align:
        writer.add_custom_alignment(align)
    for name, value in meta.items():
        if name != "general.architecture":
            add(writer, name, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            writer.add_tensor(name, tensor.numpy())
        else:
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    return path


def packed(shape, kind, seed=0):
    """Random weights in a type, as the package packs them, or random blocks where it cannot; and
    what it unpacks."""
    rng = torch.Generator().manual_seed(seed)
    try:
        data = gguf.quantize(torch.randn(shape, generator=rng).numpy(), kind)
    except NotImplementedError:
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        data = (
            torch.randint(0, 120, (*shape[:-1], shape[-1] // weights * size), generator=rng)
            .to(torch.uint8)
            .numpy()
        )
    return data, torch.tensor(gguf.dequantize(data, kind))
