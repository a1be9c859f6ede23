"A decoder so small that a test can train it, and its training."

from dataclasses import replace

import torch

from decoding_book import transformer as T
from decoding_book.transformer import GPT, GPTConfig, Recipe, Trainer

CHARS = "\n abcde"
CONFIG = GPTConfig(CHARS, context=12, width=16, layers=2, heads=2)
TEXTS = [
    "abba",
    "bad cab",
    "a bee",
    "dead\nbeef".replace("f", "d"),
    "cede",
    "add a bed",
    "dab",
    "ebb",
] * 3
RECIPE = Recipe(steps=9, batch=4, peak=1e-2, warmup=3, every=3)


def small(seed=0, **sizes):
    return T.initialise(GPT(replace(CONFIG, **sizes)), seed).requires_grad_(False)


def trainer(path=None, recipe=RECIPE, dtype=torch.float32):
    model = small().to(dtype).requires_grad_()
    return Trainer(model, T.pack(model, TEXTS), T.pack(model, TEXTS[:8]), recipe, path)


def same(a, b):
    a, b = a.state(), b.state()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


SPLIT = (TEXTS, TEXTS[:8])


def load(folder, recipe=RECIPE, texts=SPLIT, config=CONFIG):
    return T.load_gpt(recipe, texts, config, folder)
