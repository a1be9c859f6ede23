"Checkpoints and kept weights: damaged, of another training, unfinished; and what trains anew."

import json
import linecache
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from helpers.training import CONFIG, RECIPE, TEXTS, load, same, trainer

from decoding_book import transformer as T
from decoding_book.loop import generate
from decoding_book.transformer import GPT, Trainer


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    t = trainer(path).run()
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for n in (0, 1, 7, 8, 100, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=rf"{path} is damaged"):
            trainer(path).run()
    for n in (header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 4]) + whole[n + 1 :])
        with pytest.raises(ValueError, match="its numbers have changed"):
            T.load_checkpoint(path)
    for foreign in (b"x" * 500, json.dumps({"a": 1}).encode(), whole + b"more"):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match="is damaged, or no checkpoint"):
            T.load_checkpoint(path)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no checkpoint of this book"):
        T.load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        T.load_checkpoint(tmp_path / "nothing.safetensors")
    path.write_bytes(whole)
    assert same(trainer(path).run(), t)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    trainer(path).run()
    with pytest.raises(ValueError, match="is of another training.*'peak': 0.01.*'peak': 0.5"):
        trainer(path, replace(RECIPE, peak=0.5)).run()


def test_trained_once_then_loaded(tmp_path):
    first, second = load(tmp_path), load(tmp_path)
    assert first.history.fresh and not second.history.fresh
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))
    assert (
        torch.equal(first.history.losses, second.history.losses) and len(first.history.losses) == 9
    )
    assert first.history.losses.tolist() == trainer().run().losses
    assert (
        second.history.held_out
        == first.history.held_out
        == pytest.approx(second.history.looks[-1, 1].item())
    )
    assert [p.suffix for p in sorted(tmp_path.iterdir())] == [
        ".lock",
        ".safetensors",
    ] and not second.training
    assert generate(second, "a").ids.tolist() == generate(first, "a").ids.tolist()


def test_whatever_matters_trains_anew(tmp_path, monkeypatch):
    load(tmp_path)
    for change in (
        {"recipe": replace(RECIPE, clip=0.5)},
        {"texts": (TEXTS[1:], TEXTS[:8])},
        {"texts": (TEXTS, TEXTS[:7])},
        {"config": replace(CONFIG, context=11)},
    ):
        assert load(tmp_path, **change).history.fresh
        assert not load(tmp_path, **change).history.fresh

    def learning_rate(step, steps, peak, warmup):
        return peak

    learning_rate.__module__ = T.__name__
    with monkeypatch.context() as m:
        m.setattr(T, "learning_rate", learning_rate)
        changed = load(tmp_path)
    assert changed.history.fresh and not load(tmp_path).history.fresh


def test_fingerprint_sees_every_part(monkeypatch):
    "A changed line in any function or class that training uses changes the name of the weights."
    whole = T.fingerprint(Trainer, GPT, T.initialise)
    parts = [
        (T, n)
        for n in (
            "visible",
            "scaled_scores",
            "sinusoids",
            "text_loss",
            "held_out_loss",
            "batch",
            "clip_gradient",
            "learning_rate",
            "places",
        )
    ]
    parts += [
        (T.SelfAttention, "forward"),
        (T.FeedForward, "forward"),
        (T.Block, "forward"),
        (GPT, "forward"),
        (GPT, "__init__"),
        (GPT, "embed"),
        (GPT, "encode"),
        (T.Adam, "update"),
        (T.KVCache, "put"),
        (T.KVCache, "extend"),
        (Trainer, "advance"),
        (Trainer, "run"),
        (GPT, "device"),
    ]
    for owner, name in parts:
        if isinstance(owner, type):  # the part of the class that has it
            owner = next(c for c in owner.__mro__ if name in vars(c))

        def other(*args):
            return "something else"

        other.__module__ = T.__name__
        with monkeypatch.context() as m:
            m.setattr(owner, name, property(other) if name == "device" else other)
            assert T.fingerprint(Trainer, GPT, T.initialise) != whole, name
    with monkeypatch.context() as m:
        m.setattr(next(c for c in GPT.__mro__ if "eos" in vars(c)), "eos", 2)
        assert T.fingerprint(Trainer, GPT, T.initialise) != whole
    for name in ("save_checkpoint", "load_checkpoint"):  # how they are kept changes no weight
        with monkeypatch.context() as m:
            m.setattr(T, name, lambda *_: None)
            assert T.fingerprint(Trainer, GPT, T.initialise) == whole, name


def test_the_notebook_names_its_weights_as_the_module_does(tmp_path):
    "So that `load_gpt` in a later chapter finds what the chapter trained."
    nb = nbformat.read(Path(__file__).parent.parent / "nbs/03_transformer.ipynb", as_version=4)
    space = {"__name__": "chapter"}
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and cell.source.startswith("#| export"):
            name = f"<cell {i}>"
            linecache.cache[name] = (len(cell.source), None, cell.source.splitlines(True), name)
            exec(compile(cell.source, name, "exec"), space)
    mine = space["fingerprint"](space["Trainer"], space["GPT"], space["initialise"])
    assert mine == T.fingerprint(Trainer, GPT, T.initialise)


def test_an_unfinished_training_goes_on(tmp_path, monkeypatch):
    straight = load(tmp_path / "other")
    advance, steps = Trainer.advance, []

    def cut(self):
        if self.step == 7:
            raise KeyboardInterrupt
        advance(self)

    with monkeypatch.context() as m:
        m.setattr(T, "fingerprint", lambda *_: "the same")
        m.setattr(Trainer, "advance", cut)
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path)
        assert len(list(tmp_path.glob("*.unfinished.safetensors"))) == 1
        m.setattr(Trainer, "advance", lambda self: (steps.append(self.step), advance(self)))
        resumed = load(tmp_path)
    assert steps == [6, 7, 8] and not list(tmp_path.glob("*.unfinished*"))
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), straight.parameters()))


def test_damaged_weights_are_set_aside_and_made_again(tmp_path):
    first = load(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=rf"{path} is damaged.*trained again"):
        again = load(tmp_path)
    assert again.history.fresh and path.with_suffix(".damaged").exists()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not load(tmp_path).history.fresh


def test_the_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DECODING_BOOK_CACHE", str(tmp_path / "here"))
    load(None)
    assert list((tmp_path / "here").glob("gpt-*.safetensors"))
    monkeypatch.delenv("DECODING_BOOK_CACHE")
    assert T.cache_folder() == Path.home() / ".cache" / "decoding_book"


def test_without_safetensors_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'decoding_book[model]'")):
        load(tmp_path)
