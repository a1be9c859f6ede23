"""The cuts beside llama.cpp's own low-level samplers: the same rows, the same candidates. Runs
where the package llama_cpp can be imported."""

import ctypes
import math

import numpy as np
import pytest
import torch

from decoding_book.cuts import entropy_temperature, max_surprisal, top_n_sigma, typical_p, xtc
from decoding_book.penalties import dry
from decoding_book.sampler import Sampler, truncate
from decoding_book.temperature import temperature

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
V = 50


def rows(n, seed):
    "Rows in float32, from nearly flat to nearly sure, without equals."
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, V)) * rng.uniform(0.05, 4, (n, 1))
    return torch.tensor(z, dtype=torch.float32)


class Chain:
    "Some of llama.cpp's samplers one after the other, on one row."

    def __init__(self, *samplers):
        self.samplers = samplers

    def __call__(self, z):
        "Logits (V,) after them; -inf where a candidate is gone."
        data = (llama_cpp.llama_token_data * len(z))()
        for i, x in enumerate(z.tolist()):
            data[i].id, data[i].logit, data[i].p = i, x, 0.0
        found = llama_cpp.llama_token_data_array(data, len(z), -1, False)
        for sampler in self.samplers:
            llama_cpp.llama_sampler_apply(sampler, ctypes.byref(found))
        left = torch.full((len(z),), -math.inf)
        for i in range(found.size):
            left[found.data[i].id] = found.data[i].logit
        self.selected = found.data[found.selected].id if found.selected >= 0 else None
        return left

    def __del__(self):
        for sampler in self.samplers:
            llama_cpp.llama_sampler_free(sampler)


def make(name, *args):
    return getattr(llama_cpp, f"llama_sampler_init_{name}")(*args)


def near_the_line(z, ours, theirs):
    "How many tokens differ; more than one is no rounding of a sum."
    return (ours.isfinite() != theirs.isfinite()).sum().item()


@pytest.mark.parametrize(
    "name,cut,low,high",
    [
        ("top_n_sigma", top_n_sigma, 0.1, 4.0),
        ("typical", typical_p, 0.05, 0.98),
        ("xtc", xtc, 0.01, 0.5),
    ],
)
def test_the_same_candidates_stay(name, cut, low, high, full, record):
    n, rng, differing = 5000 if full else 500, np.random.default_rng(1), 0
    for z in rows(n, 2):
        x = float(np.float32(rng.uniform(low, high)))
        args = {"top_n_sigma": (x,), "typical": (x, 1), "xtc": (1.0, x, 1, 7)}[name]
        theirs, ours = Chain(make(name, *args))(z), cut(z, x)
        differ = near_the_line(z, ours, theirs)
        assert differ <= 1, (x, z.tolist())
        differing += differ
    assert differing <= n / 200  # their sums are of float32
    record(f"cuts: {name} against llama.cpp", dict(rows=n, rounding=differing))


def test_dynamic_temperature_is_that_of_llama_cpp(full):
    rng = np.random.default_rng(3)
    for z in rows(5000 if full else 500, 4):
        T, spread, exponent = (
            float(np.float32(rng.uniform(*x))) for x in ((0.3, 2), (0, 2), (0, 3))
        )
        theirs = Chain(make("temp_ext", T, spread, exponent))(z)
        ours = temperature(z, entropy_temperature(z, T, spread, exponent))
        torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=1e-4, rtol=0)


SETTINGS = {
    "top_n_sigma": (0.5, 4), "top_k": (1, V), "typical_p": (0.3, 1), "top_p": (0.3, 1),
    "min_p": (0, 0.2), "xtc_threshold": (0.02, 0.5), "temperature": (0.3, 2),
}  # fmt: skip


def both_chains(z, x):
    "What their chain leaves of a row, and ours, for some of the settings."
    makers = {
        "top_n_sigma": lambda v: make("top_n_sigma", v),
        "top_k": lambda v: make("top_k", int(v)),
        "typical_p": lambda v: make("typical", v, 1),
        "top_p": lambda v: make("top_p", v, 1),
        "min_p": lambda v: make("min_p", v, 1),
        "xtc_threshold": lambda v: make("xtc", 1.0, v, 1, 7),
        "temperature": lambda v: make("temp", v),
    }
    own = x | ({"top_k": int(x["top_k"])} if "top_k" in x else {})
    ours = Sampler.dialect("llama.cpp", **own, xtc_probability=float("xtc_threshold" in x))
    return Chain(*(makers[n](v) for n, v in x.items()))(z), truncate(z, ours)


@pytest.mark.parametrize("without", ["typical_p", "top_n_sigma"])
def test_the_default_chain(without, full, record):
    "Top-nσ, top-k, typical, top-p, min-p, XTC, temperature: the order of the dialect."
    n, rng, differing = 5000 if full else 300, np.random.default_rng(5), 0
    for z in rows(n, 6):
        x = {s: float(np.float32(rng.uniform(*span))) for s, span in SETTINGS.items()}
        theirs, ours = both_chains(z, {s: v for s, v in x.items() if s != without})
        if near_the_line(z, ours, theirs):
            differing += 1
            continue
        torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=1e-5, rtol=0)
    assert differing <= n / 50
    record(f"cuts: llama.cpp's chain without {without}", dict(rows=n, rounding=differing))


def test_typical_behind_top_n_sigma_meets_what_is_not_a_number():
    """Top-nσ leaves its removed candidates in the list, with probability 0. 0 log 0 is NaN in their
    entropy, so typical ranks by NaN and keeps another set than its definition."""
    rng, differing = np.random.default_rng(5), 0
    for z in rows(200, 6):
        x = {s: float(np.float32(rng.uniform(*SETTINGS[s]))) for s in ("top_n_sigma", "typical_p")}
        theirs, ours = both_chains(z, x)
        differing += near_the_line(z, ours, theirs) > 0
    assert differing > 100


def test_mirostat_moves_its_limit_alike(full):
    "Their token, our limit: their next candidates show where their limit went."
    rng = np.random.default_rng(7)
    for trial in range(100 if full else 10):
        target, rate = (float(np.float32(rng.uniform(*x))) for x in ((0.5, 4), (0.05, 0.5)))
        chain, limit = Chain(make("mirostat_v2", trial, target, rate)), 2 * target
        for z in rows(20, 8 + trial):
            theirs, ours = chain(z), max_surprisal(z, limit)
            assert near_the_line(z, ours, theirs) == 0
            q = ours.double().softmax(-1)[chain.selected].item()
            limit -= rate * (-math.log2(q) - target)


class Vocabulary:
    "The smallest that DRY can be made with: SmolLM2's own file, its tokenizer only."

    def __init__(self):
        from decoding_book.smollm import weights_path

        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(weights_path()).encode(), params)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)


def test_dry_is_that_of_llama_cpp(full, record):
    "Without breakers, and with one that is a token: the full stop."
    words, rng, n = Vocabulary(), np.random.default_rng(9), 2000 if full else 150
    stop = [i for i in range(V) if llama_cpp.llama_vocab_get_text(words.vocab, i) == b"."]
    for trial in range(n):
        text = rng.integers(0, rng.integers(2, 5), rng.integers(1, 40))
        text = np.where(rng.random(len(text)) < 0.1, stop[0] if stop else 40, text)
        m, b, a = (float(np.float32(rng.uniform(*x))) for x in ((0.1, 2), (1, 2.5), (0, 4)))
        breakers = [b"."] if stop and trial % 2 else []
        strings = (ctypes.c_char_p * len(breakers))(*breakers)
        args = (words.vocab, m, b, int(a), 8192, strings, len(breakers))
        chain = Chain(make("dry", *args))
        for token in text.tolist():
            llama_cpp.llama_sampler_accept(chain.samplers[0], token)
        z = rows(1, trial)[0]
        ours = dry(z, torch.tensor(text), m, b, int(a), stop if breakers else ())
        torch.testing.assert_close(ours, chain(z), atol=1e-3, rtol=1e-4)
    record("cuts: DRY against llama.cpp", dict(texts=n))
