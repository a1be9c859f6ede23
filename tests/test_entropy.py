"""Entropy and the measures of attention: oracle, limits, padding, rows alone and in batches, and on
a real model's scores."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_book import entropy as module
from decoding_book.entropy import (
    Measures,
    attention_measures,
    entropy,
    follow,
    measure,
    measures,
    varentropy,
)
from decoding_book.loop import Prediction, generate, score
from decoding_book.sampler import Sampler
from decoding_book.toy import six_words
from decoding_book.transformer import GPT, GPTConfig

INF, NAN = float("inf"), float("nan")
DATA = np.load(Path(__file__).parent / "oracle/cases.npz", allow_pickle=False)


def case(name):
    "The arrays of one attention case, as tensors."
    found = {
        k[len(name) + 1 :]: torch.as_tensor(DATA[k]) for k in DATA.files if k.startswith(name + "_")
    }
    assert found, name
    return found


def close(a, b, atol=1e-9):
    a, b = (
        x.double() if torch.is_tensor(x) else torch.tensor(np.asarray(x, dtype=float))
        for x in (a, b)
    )
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---------------------------------------------------------------- oracle


def test_entropy_and_varentropy_are_those_of_the_oracle():
    for i in range(24):
        z = torch.tensor(DATA["unc_logits"][i, : DATA["unc_V"][i]])
        close(torch.stack(measures(z)), (DATA["unc_entropy"][i], DATA["unc_varentropy"][i]))
        close(entropy(z), DATA["unc_entropy"][i])
        close(varentropy(z), DATA["unc_varentropy"][i])


def test_oracle_entropy_as_one_padded_batch():
    z = torch.tensor(DATA["unc_logits"]).nan_to_num(nan=-INF, neginf=-INF)
    close(entropy(z), DATA["unc_entropy"])
    close(varentropy(z), DATA["unc_varentropy"])
    close(entropy(z.float()), DATA["unc_entropy"], 2e-5)
    close(varentropy(z.float()), DATA["unc_varentropy"], 2e-3)


@pytest.mark.parametrize("i", range(12))
def test_oracle_whole_attention(i):
    "All queries at once, (L, query, H, key); the oracle averages over every entry."
    c = case(f"attA_{i:03d}")
    scores, mask = c["scores"].transpose(1, 2), c["mask"]  # (L, Q, H, N), (Q, N)
    found = attention_measures(scores, mask.expand(len(scores), -1, -1))
    bits = entropy(scores.masked_fill(~mask[:, None], -INF))  # (L, Q, H): a head is a row
    close(bits.transpose(1, 2), c["entropy"])
    close(found.entropy.mean(), c["entropy_mean"])
    close(found.entropy.mean(1), c["entropy_layer"])
    close(found.varentropy.mean(), c["varent_heads"])
    close(bits.var(1, correction=0).mean(), c["varent_queries"])
    keys, N = mask.sum(-1).double(), mask.shape[-1]
    close((found.disagreement * keys / N).mean(), c["disagreement"])
    close(found.agreement.mean(), c["agreement"])
    close(found.agreement.mean(1), c["agreement_layer"])
    weighted = found.interaction * keys
    close(weighted.sum() / keys.sum() / len(scores), c["interaction"])
    close(weighted.sum(1) / keys.sum(), c["interaction_layer"])
    close(weighted.sum() / (len(scores) * N), c["interaction_text"])


@pytest.mark.parametrize("i", range(10))
def test_oracle_newest_query_with_padding(i):
    c = case(f"attB_{i:03d}")
    found = attention_measures(c["scores"], c["key_mask"])
    for name, key in dict(
        entropy="entropy", varentropy="varent", agreement="agreement", interaction="interaction"
    ).items():
        close(vars(found)[name], c[key])
    close(found.disagreement * c["key_mask"].double().mean(-1), c["disagreement"])
    shown = measure(
        Prediction(torch.zeros(len(c["scores"]), 5), None, c["scores"][:, None], c["key_mask"])
    )
    close(shown.agreement, c["agreement"])
    close(shown.attention_entropy, c["entropy"])
    close(shown.attention_varentropy, c["varent"])


@pytest.mark.parametrize("i", range(8))
def test_oracle_first_published_metrics(i):
    c = case(f"attC_{i:03d}")  # (B, H, Q, K)
    found = attention_measures(c["scores"].transpose(1, 2))
    bits = entropy(c["scores"].transpose(1, 2))  # (B, Q, H): a head is a row
    close(found.entropy.mean(), c["attn_entropy"])
    close(bits.transpose(1, 2).var(-1, correction=0).mean(), c["attn_varentropy_q"])
    close(found.varentropy.mean(), c["attn_varentropy_h"])
    close(found.disagreement.mean(), c["agreement"])
    close(found.interaction.mean(-1), c["interaction"])
    if c["scores"].shape[2] == 1:
        assert c["attn_varentropy_q"] == 0


# ---------------------------------------------------------------- logits


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(st.floats(-50, 50), st.just(-INF)), min_size=1, max_size=40))
def test_bounds_and_no_nan(z):
    if all(x == -INF for x in z):
        z[0] = 0.0
    z = torch.tensor(z, dtype=torch.float64)
    H, V = measures(z)
    n = z.isfinite().sum().item()
    assert -1e-12 <= H <= math.log2(n) + 1e-9 and V >= 0 and V.isfinite()
    if n == 1:
        assert H == 0 and V == 0
    shifted = measures(z + 7.5)
    close(torch.stack(shifted), torch.stack((H, V)), 1e-8)
    q = z.softmax(-1).numpy()
    q = q[q > 0]
    h = -(q * np.log2(q)).sum()
    close(torch.stack((H, V)), (h, (q * (-np.log2(q) - h) ** 2).sum()), 1e-8)


def test_shapes_and_dtypes():
    for shape in ((5,), (3, 5), (2, 3, 5)):
        for dtype, out in (
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
        ):
            H, V = measures(torch.randn(*shape).to(dtype))
            assert H.shape == V.shape == shape[:-1] and H.dtype == V.dtype == out


def test_a_row_alone_equals_the_row_in_a_batch(full, record):
    n = 2000 if full else 200
    z = 4 * torch.randn(n, 300, generator=torch.Generator().manual_seed(0))
    z[torch.rand(z.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = -INF
    together = torch.stack(measures(z))
    alone = torch.stack([torch.stack(measures(x)) for x in z], 1)
    worst = (together - alone).abs().max().item()
    record("entropy_rows", {"rows": n, "largest difference": worst})
    assert worst < 1e-5


def test_a_large_vocabulary():
    z = torch.zeros(3, 151_936)
    z[1, 0], z[2] = 12.0, torch.randn(151_936, generator=torch.Generator().manual_seed(0)) * 3
    exact = measures(z.double())
    close(measures(z)[0], exact[0], 1e-4)
    close(measures(z)[1], exact[1], 1e-3)
    assert exact[1][0].abs() < 1e-20


@pytest.mark.parametrize(
    "z,message",
    [
        ([[1.0, 2.0], [NAN, 1.0]], "row 1 has NaN"),
        ([[1.0, INF]], r"\+inf"),
        ([-INF, -INF], "no finite logit"),
    ],
)
def test_bad_logits_are_refused(z, message):
    with pytest.raises(ValueError, match=message):
        measures(torch.tensor(z))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="logits"):
        entropy(torch.tensor([1, 2]))


def test_the_kernels_are_found_by_name(monkeypatch):
    "On CUDA the measures come from decoding_book.cuda, if it has them."
    import sys
    from types import SimpleNamespace

    class OnCuda(torch.Tensor):
        is_cuda = True

    z = torch.zeros(2, 4).as_subclass(OnCuda)
    monkeypatch.setitem(
        sys.modules, "decoding_book.cuda", SimpleNamespace(measures=lambda z: ("H", "V"))
    )
    assert measures(z) == ("H", "V")
    monkeypatch.setitem(sys.modules, "decoding_book.cuda", SimpleNamespace())
    close(torch.as_tensor(measures(z)[0]), [2.0, 2.0], 1e-6)  # not there: plain torch


# ---------------------------------------------------------------- attention


def scores_and_mask(seed, B=4, H=3, N=12):
    rng = torch.Generator().manual_seed(seed)
    # padded on the left, one key at least
    real = torch.arange(N) >= torch.randint(0, N, (B, 1), generator=rng)
    return 3 * torch.randn(B, H, N, generator=rng, dtype=torch.float64), real


def test_padding_is_never_seen(full):
    for seed in range(200 if full else 40):
        scores, real = scores_and_mask(seed)
        found = attention_measures(scores, real)
        for junk in (0.0, -1e9, 1e30, INF, -INF, NAN):
            other = attention_measures(scores.masked_fill(~real[:, None], junk), real)
            for name, x in vars(found).items():
                close(vars(other)[name], x, 1e-12)
        for i, r in enumerate(real):  # without the padding at all
            alone = attention_measures(scores[i][:, r])
            for name, x in vars(found).items():
                close(vars(alone)[name], x[i], 1e-12)


def test_one_key_and_no_key():
    one = attention_measures(torch.tensor([[[2.0], [-4.0]]]))
    assert [x.item() for x in vars(one).values()] == [0, 0, 1, 0, 3]
    none = attention_measures(torch.randn(1, 2, 3), torch.zeros(1, 3, dtype=torch.bool))
    assert all(x.isfinite().all() for x in vars(none).values()) and none.entropy.item() == 0


def test_a_mask_that_hides_nothing_changes_nothing():
    scores, _ = scores_and_mask(0)
    whole = attention_measures(scores, torch.ones(4, 12, dtype=torch.bool))
    for name, x in vars(attention_measures(scores)).items():
        assert vars(whole)[name].equal(x)


def test_the_arguments_stay_as_they_were():
    scores, real = scores_and_mask(1)
    z, same = scores[:, 0].clone(), scores.clone()
    attention_measures(scores, real), attention_measures(scores), measures(z)
    assert scores.equal(same) and z.equal(same[:, 0])


def test_agreement_is_one_minus_total_variation():
    for seed in range(20):
        scores, real = scores_and_mask(seed)
        found = attention_measures(scores, real)
        p = scores.masked_fill(~real[:, None], -INF).softmax(-1)
        tv = 0.5 * (p - p.mean(1, keepdim=True)).abs().sum(-1).mean(1)
        close(found.agreement, 1 - tv)
        assert ((found.agreement >= 1 / 3 - 1e-12) & (found.agreement <= 1 + 1e-12)).all()
    same = scores[:, :1].expand(-1, 5, -1)
    close(attention_measures(same, real).agreement, torch.ones(4))
    close(attention_measures(same, real).disagreement, torch.zeros(4))


def test_the_published_agreement_is_bounded_by_the_context():
    "2 (1 - 1/h) / N, reached by heads that share no key."
    for h, N in ((2, 10), (9, 100), (9, 5000)):
        found = attention_measures(1e5 * torch.eye(h, N).double())
        close(found.disagreement, 2 * (1 - 1 / h) / N)
        close(found.agreement, 1 / h)


def test_measure_averages_over_layers_or_picks_some():
    scores = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    p = Prediction(torch.randn(2, 9), None, scores, torch.ones(2, 6, dtype=torch.bool))
    by_layer = attention_measures(scores)
    close(measure(p).agreement, by_layer.agreement.mean(1))
    close(measure(p, layers=[3]).interaction, by_layer.interaction[:, 3])
    close(measure(p, layers=[0, 2]).attention_entropy, by_layer.entropy[:, [0, 2]].mean(1))
    close(measure(p, layers=slice(1, 3)).attention_varentropy, by_layer.varentropy[:, 1:3].mean(1))
    bare = measure(Prediction(p.logits))
    assert bare.agreement is None and bare.attention_entropy is None and bare.entropy.shape == (2,)


# ---------------------------------------------------------------- along a text


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig(" abcdeg", context=40, width=16, layers=2, heads=2)).requires_grad_(False)


TEXTS = ["a bad cab", "bead", "egg bag a bead", "ab"]


def test_follow_measures_each_token_of_each_text(tiny):
    track = follow(tiny, TEXTS)
    rows = [tiny.encode(t) for t in TEXTS]
    assert track.ids.tolist() == sum((r[1:] for r in rows), [])
    assert track.row.tolist() == sum(([i] * (len(r) - 1) for i, r in enumerate(rows)), [])
    known = score(tiny, rows)
    close(track.logprobs, torch.cat([known[i, 1 : len(r)] for i, r in enumerate(rows)]), 1e-5)
    at = 0
    for r in rows:  # every position alone, without cache or padding
        for n in range(1, len(r)):
            single = measure(tiny(torch.tensor([r[:n]]), attention=True))
            for name, x in vars(single).items():
                close(vars(track.measures)[name][at], x[0], 2e-5)
            at += 1
    assert at == len(track.ids)


def test_follow_without_attention_and_on_a_model_that_has_none(tiny):
    assert follow(tiny, "a bad cab", attention=False).measures.agreement is None
    world = six_words()
    track = follow(world, [[2, 3, 0], [2, 3]])
    assert track.measures.agreement is None and track.ids.tolist() == [3, 0, 3]
    law = torch.tensor([world(torch.tensor([[2]])).logits.softmax(-1)[0, 3].log()])
    close(track.logprobs[:1], law, 1e-6)


def test_follow_refuses_a_text_of_one_token(tiny):
    with pytest.raises(ValueError, match="texts, row 1: 1 tokens"):
        follow(tiny, [[1, 2, 3], [4]])


def test_a_model_pays_what_it_expects_on_its_own_text(full, record):
    "Surprisal of drawn tokens has the entropy for its mean and the varentropy for its variance."
    world, n = six_words(), 40_000 if full else 6000
    out = generate(
        world, [""] * n, Sampler(seed=3), max_new_tokens=3, ignore_eos=True, alternatives=0
    )
    before = world(torch.zeros(1, 0, dtype=torch.long)).logits
    paid = -out.steps[0].logprobs.double() / math.log(2)
    H, V = (x.item() for x in measures(before.double()))
    z = (paid.mean().item() - H) / math.sqrt(V / n)
    record("surprisal_of_own_text", {"texts": n, "z": z})
    assert abs(z) < 4
    assert paid.var().item() == pytest.approx(V, rel=0.1)


def test_smollm_alone_and_padded():
    from decoding_book.loop import left_pad
    from decoding_book.smollm import SmolLM2

    model = SmolLM2()
    texts = [
        "The capital of France is",
        "To be",
        "It was a quiet morning in the city when the rain",
    ]
    rows = [torch.tensor(model.encode(t)) for t in texts]
    ids, mask = left_pad(rows)
    together = measure(model(ids, mask, attention=True))
    for i, r in enumerate(rows):
        alone = measure(model(r[None], attention=True))
        for name, x in vars(alone).items():
            close(vars(together)[name][i], x[0], 1e-3)
    one = measure(model(rows[0][:1][None], attention=True))
    assert one.attention_entropy == 0 and one.agreement == 1 and one.disagreement == 0


def test_the_public_names():
    assert {"entropy", "varentropy", "attention_measures", "measure", "follow", "Measures"} <= set(
        module.__all__
    )
    assert list(vars(Measures(0, 0))) == [
        "entropy",
        "varentropy",
        "attention_entropy",
        "attention_varentropy",
        "agreement",
        "disagreement",
        "interaction",
    ]
