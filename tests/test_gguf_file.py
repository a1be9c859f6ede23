"""Files of weights: read as the package gguf reads them, refused by name where that is not
possible."""

import copy
import dataclasses
import importlib.metadata
import os
import pickle
import random
import struct
import sys

import pytest
import torch
from helpers.gguf_files import packed, write

import decoding_book.gguf_file as gguf_file
import decoding_book.smollm as smollm
from decoding_book.gguf_file import Cursor, NotRead, dequantise, parse_gguf, read_gguf
from decoding_book.smollm import Config, SmolLM2, read_config, weights_path

gguf = pytest.importorskip("gguf")
IDS = torch.tensor([[504, 357, 282]])
V = 1024
SIZES = Config(2, 64, 4, 2, 16, 128, V, 8192, 1e-5, 1e5)
OURS = sorted(gguf_file.BLOCKS)
OTHERS = [t for t in gguf.GGMLQuantizationType if t not in OURS]


@pytest.fixture(scope="module")
def plain():
    "The entries of the real file, with the sizes of a small model and its first tokens."
    meta, _ = read_gguf(weights_path())
    words = meta["tokenizer.ggml.tokens"][:V]
    merges = [m for m in meta["tokenizer.ggml.merges"] if m.replace(" ", "") in words]
    meta |= {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": meta["tokenizer.ggml.token_type"][:V],
        "tokenizer.ggml.merges": merges,
        "llama.vocab_size": V,
    }
    sizes = dict(block_count=2, embedding_length=64, feed_forward_length=128)
    heads = {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 16}
    return meta | {f"llama.{name}": value for name, value in (sizes | heads).items()}


def weights(seed=0, sizes=SIZES):
    rng = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=rng) * 0.2
        for name, shape in sizes.shapes().items()
    }


def by_hand(align, pad, kind=4, version=3, axes=(3,)):
    "The bytes of a file with one tensor of 1, 2, 3, whatever its alignment is called."

    def text(s):
        return struct.pack("<Q", len(s)) + s.encode()

    value = {4: lambda: struct.pack("<I", align), 6: lambda: struct.pack("<f", align)}[kind]()
    header = (
        b"GGUF"
        + struct.pack("<IQQ", version, 1, 2)
        + text("general.alignment")
        + struct.pack("<I", kind)
        + value
        + text("x.pad")
        + struct.pack("<I", 8)
        + text("y" * pad)
        + text("w")
        + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, 0, 0)
    )
    return bytearray(header + bytes(-len(header) % int(align or 1)) + struct.pack("<3f", 1, 2, 3))


def test_any_power_of_two_and_nothing_else():
    for align in [2**n for n in range(13)]:
        for pad in range(40):
            assert dequantise(*parse_gguf(by_hand(align, pad))[1]["w"]).tolist() == [1, 2, 3]
    for align, kind in [(0, 4), (3, 4), (24, 4), (48, 4), (32.0, 6)]:
        with pytest.raises(
            ValueError, match=f"general.alignment is {align}, expected a power of two"
        ):
            parse_gguf(by_hand(align, 0, kind))


def test_the_logits_do_not_depend_on_the_alignment(tmp_path, plain):
    want = SmolLM2(path=write(tmp_path / "32.gguf", plain, weights()))(IDS).logits
    for align in (8, 128):
        assert SmolLM2(path=write(tmp_path / f"{align}.gguf", plain, weights(), align))(
            IDS
        ).logits.equal(want)


def test_other_types_are_left_to_the_package(tmp_path, monkeypatch):
    read = 0
    for kind in OTHERS:
        path = tmp_path / f"{kind.name}.gguf"
        try:
            data, want = packed((4, 512), kind)
        except NotImplementedError:  # it has a name and cannot be unpacked
            raw = torch.zeros(4096, dtype=torch.uint8)
            with pytest.raises(
                NotRead, match=f"type {kind.name}: the package gguf cannot unpack it"
            ):
                dequantise(raw, kind.value, (1, 256))
            continue
        write(path, {"general.architecture": "x"}, {"w": (data, kind)})
        found = read_gguf(path)[1]["w"]
        assert found[1] == kind.value
        torch.testing.assert_close(dequantise(*found), want, rtol=0, atol=0, equal_nan=True)
        read += 1
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "gguf", None)
            with pytest.raises(
                NotRead,
                match=rf"{kind.name}\.gguf: tensor w: type {kind.name} is left to the package "
                "gguf. Run: pip install gguf",
            ) as error:
                read_gguf(path)
            assert "damaged" not in str(error.value)
    assert read > 10


def test_unknown_types_versions_and_rows_are_named_and_not_called_damage(tmp_path, plain):
    path = tmp_path / "x.gguf"
    data = by_hand(32, 0)
    at = data.index(struct.pack("<IQIQ", 1, 3, 0, 0)) + 12
    data[at : at + 4] = struct.pack("<I", 77)
    for raw, message in [
        (data, "tensor w: type number 77 is unknown"),
        (by_hand(32, 0, version=1), "version 1, expected"),
        (by_hand(32, 0, version=3 << 24), r"expected 2 or 3 \(little-endian\)"),
    ]:
        path.write_bytes(raw)
        with pytest.raises(NotRead, match=rf"x\.gguf: .*{message}"):
            read_gguf(path)
    data[at : at + 4] = struct.pack("<I", 12)
    path.write_bytes(data)
    with pytest.raises(
        NotRead, match="type Q4_K has blocks of 256 weights, which do not fill rows of 3"
    ):
        read_gguf(path)
    tensors = weights()
    tensors["blk.0.attn_q.weight"] = (
        packed((64, 64), gguf.GGMLQuantizationType.Q5_0)[0],
        gguf.GGMLQuantizationType.Q5_0,
    )
    assert SmolLM2(path=write(path, plain, tensors))(IDS).logits.isfinite().all()


def test_any_damage_is_a_value_error(tmp_path, full):
    rng, path, whole = random.Random(0), tmp_path / "x.gguf", bytes(by_hand(32, 5))
    for _ in range(20_000 if full else 2000):
        raw = bytearray(whole[: rng.randrange(len(whole) + 1)] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(4)):
            if len(raw) > 4:
                raw[rng.randrange(4, len(raw))] = rng.choice([0, 1, 8, 9, 127, 255])
        path.write_bytes(raw)
        try:
            tensors = read_gguf(path)[1]
        except ValueError as error:
            assert "x.gguf" in str(error)
        else:
            assert all(isinstance(t, torch.Tensor) for t, _, _ in tensors.values())


def test_a_length_beyond_the_end_is_refused_where_it_stands():
    cursor = Cursor(b"abc")
    with pytest.raises(ValueError, match="4 bytes should follow byte 0, there are 3"):
        cursor.take(4)
    assert bytes(cursor.take(3)) == b"abc"
    with pytest.raises(ValueError, match="bytes should follow byte 8, there are 2"):
        Cursor(struct.pack("<Q", 2**60) + b"ab").text()


# Zeros


def test_zeros_that_mean_something(plain, tmp_path):
    for name in ("eos", "bos", "padding", "unknown", "eot"):
        path = write(
            tmp_path / f"{name}.gguf", plain | {f"tokenizer.ggml.{name}_token_id": 0}, weights()
        )
        model = SmolLM2(path=path)
        assert model.eos == (0 if name == "eos" else 2)
        assert set(model.end_ids) == {"eos": {0}, "eot": {0, 2}}.get(name, {2})
    path = write(
        tmp_path / "eps.gguf", plain | {"llama.attention.layer_norm_rms_epsilon": 0.0}, weights()
    )
    assert SmolLM2(path=path)(IDS).logits.isfinite().all()
    empty = parse_gguf(by_hand(32, 0, axes=(0, 3)))[1]["w"]
    assert dequantise(*empty).shape == (3, 0)


@pytest.mark.parametrize(
    "name, value",
    [
        ("tokenizer.ggml.eos_token_id", V),
        ("tokenizer.ggml.eot_token_id", V),
        ("tokenizer.ggml.eos_token_id", -1),
        ("llama.block_count", 0),
        ("llama.context_length", 0),
        ("llama.attention.head_count_kv", 0),
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.freq_base", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", -1.0),
        ("llama.vocab_size", V - 1),
        ("llama.attention.head_count", [4, 4]),
        ("llama.feed_forward_length", 128.0),
        ("llama.attention.head_count_kv", 3),
    ],
)
def test_numbers_that_mean_nothing_are_refused(plain, name, value):
    tensors = {n: (None, 0, tuple(w.shape)) for n, w in weights().items()}
    read_config("x", plain, tensors)
    with pytest.raises(ValueError, match="^x: .*"):
        read_config("x", plain | {name: value}, tensors)


# Metadata


def keys():
    "All names that the package gguf knows of a file of architecture llama."

    def walk(space):
        for value in vars(space).values():
            if isinstance(value, str) and "." in value:
                yield value
            elif isinstance(value, type):
                yield from walk(value)

    names = {k.format(arch="llama", id=0, name="tool", dense="dense_2") for k in walk(gguf.Keys)}
    return sorted(
        k for k in names if k.startswith(("llama.", "general.", "tokenizer.", "split.", "adapter."))
    )


def test_each_entry_that_the_format_knows_is_used_applied_skipped_or_refused_by_its_name(plain):
    tensors = {n: (None, 0, tuple(w.shape)) for n, w in weights().items()}
    refused = []
    for name in keys():
        if name in smollm.USED or name in (
            "tokenizer.ggml.pre",
            "general.architecture",
            "general.alignment",
        ):
            continue
        try:
            read_config("x", plain | {name: 77}, tensors)
        except NotRead as error:
            assert str(error).startswith(f"x: {name} is 77"), name
            refused.append(name)
    for part in (
        "rope.scaling.",
        "softcapping",
        "sliding_window",
        "expert_count",
        "_scale",
        "clamp_kqv",
        "alibi",
        "causal",
        "key_length",
        "parallel_residual",
        "add_bos_token",
        "split.count",
        "adapter.type",
        "general.type",
    ):
        assert any(part in name for name in refused), part
    assert all(
        name.startswith(("llama.", "tokenizer.", "split.", "adapter."))
        or name in ("general.type", "general.quantization_version")
        for name in refused
    )
    assert not [
        name for name in keys() if name.startswith("llama.") and name not in refused + smollm.USED
    ]


def test_an_entry_nobody_has_heard_of_is_refused_in_the_format_s_own_families_only(plain):
    tensors = {n: (None, 0, tuple(w.shape)) for n, w in weights().items()}
    for family in ("llama", "general", "tokenizer"):
        with pytest.raises(
            NotRead, match=f"x: {family}.brand_new is 1, which may change the result"
        ):
            read_config("x", plain | {f"{family}.brand_new": 1}, tensors)
    same = read_config(
        "x",
        plain
        | {
            "someone.note": 1,
            "llama.expert_count": 0,
            "llama.rope.scaling.type": "none",
            "llama.attention.key_length": 16,
        },
        tensors,
    )
    assert same == read_config("x", plain, tensors)
    with pytest.raises(ValueError, match="x does not state llama.rope.freq_base"):
        read_config("x", {k: v for k, v in plain.items() if k != "llama.rope.freq_base"}, tensors)


# What is remembered, and what is shared


def test_a_replaced_file_is_read_again(tmp_path, plain):
    path, models = tmp_path / "x.gguf", []
    old = write(path, plain, weights(0)).stat()
    models.append(SmolLM2(path=path)(IDS).logits)
    write(path, plain, weights(1))  # written over, in place
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert path.stat().st_size == old.st_size and path.stat().st_ino == old.st_ino
    models.append(SmolLM2(path=path)(IDS).logits)
    write(tmp_path / "y.gguf", plain, weights(2)).replace(path)  # another file under the same name
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    models.append(SmolLM2(path=path)(IDS).logits)
    for seed, logits in enumerate(models):
        fresh = SmolLM2(path=write(tmp_path / f"{seed}.gguf", plain, weights(seed)))
        assert fresh(IDS).logits.equal(logits)
    misses = smollm.load.cache_info().misses
    assert SmolLM2(path=tmp_path / "2.gguf")(IDS).logits.equal(models[2])
    assert smollm.load.cache_info().misses == misses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_done_to_one_model_stays_in_it(tmp_path, plain, dtype):
    path = write(tmp_path / "x.gguf", plain, weights())
    want = SmolLM2(dtype, path=path)(IDS).logits

    def tensors(part):
        return [x for x in vars(part).values() if torch.is_tensor(x)]

    ruined = SmolLM2(dtype, path=path)
    w = ruined.weights
    assert ruined(IDS).logits.equal(want)
    found = tensors(w) + [t for layer in w.layers for t in tensors(layer)]
    blocks = [x for layer in w.layers for x in vars(layer).values() if isinstance(x, smollm.Blocks)]
    assert len(found) + len(blocks) + isinstance(w.head, smollm.Blocks) == 4 + 2 * 6
    for t in found:
        t.zero_()
    assert (ruined(IDS).logits == 0).all()
    w.meta.clear(), w.layers.clear(), w.tokenizer.add_tokens(["a new one"])
    other = SmolLM2(dtype, path=path)
    assert other(IDS).logits.equal(want) and other.encode("a new one") != [V]
    other.weights.layers[0].qkv = smollm.lay(torch.zeros(128, 64, dtype=dtype))
    assert not other(IDS).logits.equal(want)
    assert SmolLM2(dtype, path=path)(IDS).logits.equal(want)


@pytest.mark.parametrize("hidden", [96, 128, 160])
@pytest.mark.parametrize("form", ["q4", "float32", "bfloat16"])
def test_tiles_that_are_not_full_leave_the_logits_as_they_are(tmp_path, plain, form, hidden):
    "At once and by steps, of a model whose sizes are no multiples of a tile's 96 outputs."
    pytest.importorskip("numba")
    made, tensors = weights(sizes=dataclasses.replace(SIZES, hidden=hidden)), {}
    for name, w in made.items():
        kind = gguf.GGMLQuantizationType["Q8_0" if "embd" in name else "Q4_1"]
        tensors[name] = w.bfloat16().float()  # which every form of floats holds as it is
        if form == "q4" and "norm" not in name:
            tensors[name] = gguf.quantize(w.numpy(), kind), kind
    meta = plain | {"llama.feed_forward_length": hidden}
    path = write(tmp_path / "x.gguf", meta, tensors)
    want = SmolLM2(path=path)(IDS, last_only=False).logits[0]
    model = SmolLM2(path=path, weights=form)
    cache = model.new_cache(1, IDS.shape[1])
    stepwise = torch.cat([model(i.view(1, 1), cache=cache).logits for i in IDS[0]])
    for got in (model(IDS, last_only=False).logits[0], stepwise):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


def test_loops_need_whole_blocks_of_inputs(tmp_path, plain):
    "And say so; the plain form takes any sizes."
    pytest.importorskip("numba")
    meta = plain | {"llama.feed_forward_length": 40}
    made = weights(sizes=dataclasses.replace(SIZES, hidden=40))
    path = write(tmp_path / "x.gguf", meta, made)
    with pytest.raises(ValueError, match="weights: 'float32' needs multiples of 32 .* has 40"):
        SmolLM2(path=path, weights="float32")
    assert SmolLM2(path=path)(IDS).logits.isfinite().all()


def test_models_that_nobody_writes_to_share_their_memory(tmp_path, plain):
    path = write(tmp_path / "x.gguf", plain, weights())
    models = [SmolLM2(path=path) for _ in range(3)]
    for model in models:
        model(IDS), model(IDS[:, :1])
    # running copied nothing
    assert all(torch._C._is_cow_tensor(m.weights.embedding) for m in models)
    models[0].weights.embedding[5] = 0
    assert not torch._C._is_cow_tensor(models[0].weights.embedding)
    assert (
        torch._C._is_cow_tensor(models[1].weights.embedding)
        and (models[1].weights.embedding[5] != 0).any()
    )
    blocks = models[0].weights.layers[0].qkv
    assert isinstance(blocks, torch.Tensor) or not hasattr(blocks, "zero_")


def test_the_real_file_is_read_without_optional_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    meta, tensors = read_gguf(weights_path())
    read_config(weights_path(), meta, tensors)
    assert importlib.metadata.version("gguf") and {kind for _, kind, _ in tensors.values()} == {
        0,
        3,
        8,
    }


def test_a_name_that_is_there_twice_is_refused_by_it(tmp_path):
    def text(s):
        return struct.pack("<Q", len(s)) + s.encode()

    entry = text("x.a") + struct.pack("<If", 6, 1)
    tensor = text("w") + struct.pack("<IQIQ", 1, 3, 0, 0)
    twice = [([entry] * 2, [tensor], "entry x.a"), ([entry], [tensor] * 2, "tensor w")]
    for entries, tensors, name in twice:
        head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
        head += b"".join(entries + tensors)
        path = tmp_path / "x.gguf"
        path.write_bytes(head + bytes(-len(head) % 32) + struct.pack("<3f", 1, 2, 3))
        with pytest.raises(NotRead, match=f"{name} is there twice"):
            read_gguf(path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("eos_token_id", 2.5),
        ("eos_token_id", "2"),
        ("eos_token_id", True),
        ("eot_token_id", [2]),
        ("tokens", 5),
        ("merges", 5),
        ("token_type", 7),
        ("token_type", [4] * V),
        ("token_type", [1] * (V - 1) + [6]),
    ],
)
def test_tokens_that_would_be_misread_are_refused(plain, name, value):
    tensors = {n: (None, 0, tuple(w.shape)) for n, w in weights().items()}
    with pytest.raises(ValueError, match=f"^x: tokenizer.ggml.{name}"):
        read_config("x", plain | {f"tokenizer.ggml.{name}": value}, tensors)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_is_a_model_of_its_own(tmp_path, plain, way):
    model = SmolLM2(path=write(tmp_path / "x.gguf", plain, weights()))
    want, other = model(IDS).logits, way(model)
    assert other(IDS).logits.equal(want)
    other.weights.norm.zero_()
    assert model(IDS).logits.equal(want)


def test_a_chat_without_control_tokens(tmp_path, plain):
    path = write(tmp_path / "x.gguf", plain | {"tokenizer.ggml.token_type": [1] * V}, weights())
    assert "x" in SmolLM2(path=path).chat([{"role": "user", "content": "x"}])
