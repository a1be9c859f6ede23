"Filters and SmolLM2 beside the transformers library: the same rows, the same results."

import numpy as np
import torch
from helpers.rows import history, kept, rows, tied
from helpers.texts import AWKWARD, CONTROLS, PROMPTS, TOLERANCE, forced, ids_of

from decoding_book.cuts import epsilon_cutoff, eta_cutoff, typical_p
from decoding_book.entropix import EntropySampler
from decoding_book.huggingface import HuggingFace, KeyedLogitsProcessor
from decoding_book.loop import generate, left_pad
from decoding_book.penalties import (
    logit_bias,
    min_length,
    no_repeat_ngram,
    repetition_penalty,
    sequence_bias,
)
from decoding_book.sampler import Sampler, truncate
from decoding_book.temperature import temperature
from decoding_book.topk import top_k

INF = float("inf")


# ---- transformers


def test_temperature_and_top_k_agree_with_transformers(full, record):
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper

    n, V = (20_000 if full else 10_000), 40
    z = rows(n, V, 1, torch.float32)
    rng, worst = np.random.default_rng(0), 0.0
    for part in z.split(200):
        T, k = float(rng.uniform(0.1, 4)), int(rng.integers(1, V + 5))
        theirs = TopKLogitsWarper(k)(None, TemperatureLogitsWarper(T)(None, part.clone()))
        ours = top_k(temperature(part, T), k)
        assert torch.equal(kept(ours), kept(theirs))
        worst = max(worst, (ours.softmax(-1) - theirs.softmax(-1)).abs().max().item())
    record("temperature_topk_transformers", dict(rows=n, worst=worst))
    assert worst < 1e-6
    z = tied(500, 12)  # theirs keeps all that tie with the k-th
    for k in range(1, 13):
        theirs = TopKLogitsWarper(k)(None, z.clone())
        ours = top_k(z, k)
        assert not (kept(ours) & ~kept(theirs)).any()
        edge = ours.masked_fill(~kept(ours), INF).amin(-1, True)
        assert (
            z[kept(theirs) & ~kept(ours)] == edge.expand_as(z)[kept(theirs) & ~kept(ours)]
        ).all()


def test_epsilon_eta_and_typical_agree_with_transformers(full, record):
    from transformers.generation import logits_process as hf

    n, differing, rng = (20_000 if full else 6000), 0, np.random.default_rng(2)
    pairs = (
        (epsilon_cutoff, hf.EpsilonLogitsWarper, lambda: 10 ** rng.uniform(-4, -0.2)),
        (eta_cutoff, hf.EtaLogitsWarper, lambda: 10 ** rng.uniform(-4, -0.2)),
        (typical_p, hf.TypicalLogitsWarper, lambda: rng.uniform(0.02, 0.99)),
    )
    z = rows(n, 40, 3) * torch.linspace(0.1, 1.5, n, dtype=torch.float64)[:, None]
    z[::3] = z[::3].masked_fill(rows(len(z[::3]), 40, 4) > 3, -INF)
    for part in z.split(100):
        for ours, theirs, setting in pairs:
            x = float(setting())
            # their eta is a float32 number, whatever the logits are
            x = x if ours is typical_p else float(np.float32(x))
            differing += (kept(ours(part, x)) != kept(theirs(x)(None, part))).any(-1).sum().item()
    record("cuts against transformers", dict(rows=n, differing=differing))
    assert differing == 0
    tie = tied(2000, 12)  # theirs keeps all that are as far from the entropy
    for p in (0.1, 0.3, 0.7, 0.93):
        theirs = kept(hf.TypicalLogitsWarper(p)(None, tie.double()))
        both = kept(typical_p(tie.double(), p, ties="all"))
        assert (theirs != both).any(-1).sum() <= 20  # sums at the line
        assert not (kept(typical_p(tie.double(), p)) & ~both).any()


def test_the_whole_chain_with_all_cuts_agrees_with_transformers():
    "Temperature, top-k, top-p, min-p, typical, ε, η: transformers' own order."
    from transformers.generation import logits_process as hf

    rng, differing, z = np.random.default_rng(5), 0, rows(2000, 40, 6)
    for part in z.split(20):
        T, k, p, m, typ, e, eta = (
            rng.uniform(0.5, 2), int(rng.integers(2, 40)), rng.uniform(0.5, 1),
            rng.uniform(0, 0.1), rng.uniform(0.2, 0.99), *10 ** rng.uniform(-4, -1, 2),
        )  # fmt: skip
        theirs = part
        for stage in (
            hf.TemperatureLogitsWarper(T), hf.TopKLogitsWarper(k), hf.TopPLogitsWarper(p),
            hf.MinPLogitsWarper(m), hf.TypicalLogitsWarper(typ), hf.EpsilonLogitsWarper(e),
            hf.EtaLogitsWarper(eta),
        ):  # fmt: skip
            theirs = stage(None, theirs)
        ours = Sampler.dialect(
            "huggingface", temperature=T, top_k=k, top_p=p, min_p=m, typical_p=typ,
            epsilon_cutoff=e, eta_cutoff=eta,
        )  # fmt: skip
        differing += (kept(truncate(part, ours)) != kept(theirs)).any(-1).sum().item()
    assert differing == 0


def test_chat_equals_transformers(model):
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=model.weights.tokenizer, chat_template=model.template
    )
    user, answer = (
        {"role": "user", "content": 'Hi <b> & "you"\n\n'},
        {"role": "assistant", "content": "Yes?"},
    )
    for messages in (
        [user],
        [{"role": "system", "content": "Be brief."}, user],
        [user, answer, user],
    ):
        want = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert model.chat(messages) == want
    assert model.chat([user]).endswith("<|im_start|>assistant\n")


# The logits


def test_logits_agree_with_transformers(model, peer, record):
    worst = 0.0
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = ids_of(model, prompt)
            ours, theirs = model(ids, last_only=False).logits, peer(ids).logits
            worst = max(worst, (ours - theirs).abs().max().item())
            assert torch.equal(ours.argmax(-1), theirs.argmax(-1)), prompt
    assert len(PROMPTS) >= 20 and worst <= TOLERANCE
    record(
        "smollm: largest logit difference to transformers, float32",
        {"prompts": len(PROMPTS), "difference": worst},
    )


def test_greedy_tokens_equal_transformers(peer, batch, full, record):
    for n, (prompt, prompt_ids, ids) in enumerate(zip(PROMPTS, batch.prompt_ids, batch.ids)):
        best = forced(peer, prompt_ids, ids).argmax(-1)
        assert len(ids) == (64 if full else 24) and torch.equal(ids, best), prompt
        if full or n == 0:  # and what its own `generate` says
            out = peer.generate(
                prompt_ids[None],
                attention_mask=torch.ones(1, len(prompt_ids)),
                max_new_tokens=len(ids),
                do_sample=False,
            )
            assert torch.equal(out[0, len(prompt_ids) :], ids), prompt
    record("smollm: prompts with greedy tokens equal to transformers", len(batch))


# Attention


def test_raw_scores_give_transformers_attention(model, peer):
    rows = [ids_of(model, p)[0] for p in PROMPTS[:3]]
    ids, mask = left_pad(rows)
    cache = model.new_cache(3, ids.shape[1])
    model(ids[:, :-1], mask[:, :-1], cache=cache)
    cached = model(ids[:, -1:], cache=cache, attention=True)
    whole = model(ids, mask, attention=True)
    peer.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            out = peer(
                ids,
                attention_mask=mask.long(),
                output_attentions=True,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            )
    finally:
        peer.set_attn_implementation("sdpa")
    want = torch.stack([a[:, :, -1] for a in out.attentions], 1)
    for prediction in (whole, cached):
        assert prediction.attention.shape == (3, 30, 9, ids.shape[1])
        assert torch.equal(prediction.key_mask, mask)
        real = prediction.attention.masked_fill(~mask[:, None, None], -torch.inf)
        torch.testing.assert_close(real.softmax(-1), want, atol=2e-5, rtol=0)
    torch.testing.assert_close(
        cached.attention.masked_fill(~mask[:, None, None], 0),
        whole.attention.masked_fill(~mask[:, None, None], 0),
        atol=1e-3,
        rtol=1e-4,
    )


def test_text_that_spells_control_tokens_is_what_transformers_makes_of_it(model):
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast(
        tokenizer_object=model.weights.tokenizer, chat_template=model.template
    )
    for text in [*AWKWARD, *CONTROLS]:
        assert model.encode(text, control=False) == peer.encode(text, split_special_tokens=True)
        assert model.encode(text) == peer.encode(text)
    talks = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}],
        [{"role": "user", "content": "A colour?"}, {"role": "assistant", "content": "It is "}],
    ]
    for talk in talks:
        ours = model.chat(talk)
        assert ours == peer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert model.encode(ours) == model.encode(str(ours)) == peer.encode(ours)
        assert model.chat(talk, continue_last=True) == peer.apply_chat_template(
            talk, tokenize=False, continue_final_message=True
        )


def test_penalties_agree_with_transformers():
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(2)
    for _ in range(200):
        V, N = int(rng.integers(3, 30)), int(rng.integers(2, 20))
        z, ids, _ = history(rng, 3, V, N)
        theta, n = float(rng.uniform(0.5, 2)), int(rng.integers(1, 4))
        bias = {int(i): float(rng.normal()) for i in rng.choice(V, 2, replace=False)}
        assert repetition_penalty(z, ids, theta).equal(
            hf.RepetitionPenaltyLogitsProcessor(theta)(ids, z)
        )
        theirs = hf.NoRepeatNGramLogitsProcessor(n)(ids, z)
        if theirs.isfinite().any(-1).all():
            assert no_repeat_ngram(z, ids, n).equal(theirs)
        theirs = hf.SequenceBiasLogitsProcessor([[[i], v] for i, v in bias.items()])(ids, z)
        torch.testing.assert_close(logit_bias(z, bias), theirs, atol=1e-6, rtol=0)
        given, least, eos = (
            int(rng.integers(0, N + 1)),
            int(rng.integers(0, 9)),
            int(rng.integers(V)),
        )
        theirs = hf.MinNewTokensLengthLogitsProcessor(given, least, eos)(ids, z)
        assert min_length(z, N - given, least, eos).equal(theirs)


def test_banned_sequences_agree_with_transformers():
    from transformers.generation import logits_process as hf

    rng, banned = np.random.default_rng(5), 0
    for _ in range(200):
        V, N = int(rng.integers(4, 9)), int(rng.integers(1, 9))
        z, ids, _ = history(rng, 3, V, N)
        words = {tuple(rng.integers(1, V, int(rng.integers(1, 4))).tolist()) for _ in range(4)}
        theirs = hf.NoBadWordsLogitsProcessor([list(w) for w in words], eos_token_id=0)(ids, z)
        ours = sequence_bias(z, ids, dict.fromkeys(words, -INF))
        assert ours.equal(theirs)
        banned += sum(len(w) > 1 and not theirs[:, w[-1]].isfinite().all() for w in words)
        bias = {w: float(rng.normal()) for w in words}
        theirs = hf.SequenceBiasLogitsProcessor([[list(w), b] for w, b in bias.items()])(ids, z)
        torch.testing.assert_close(sequence_bias(z, ids, bias), theirs, atol=1e-6, rtol=0)
    assert banned > 100


# The book inside transformers' own `generate`


def test_smollm2_in_transformers_says_the_tokens_of_the_book_s_loop(model, peer, full, record):
    "A seeded sampler and the entropy policy, unequal rows: by `generate`, the adapter and SmolLM2."
    n, rows = (64 if full else 8), PROMPTS[:4] if full else PROMPTS[:2]
    adapter, ids = HuggingFace(peer), [ids_of(model, text)[0] for text in rows]
    padded, mask = left_pad(ids)
    sampler = Sampler(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=3)
    policy, given = EntropySampler(seed=3), dict(attention_mask=mask.long(), max_new_tokens=n)
    for choose in sampler, policy:
        ours = generate(model, ids, choose, n, ignore_eos=True)
        there = generate(adapter, ids, choose, n, ignore_eos=True)
        keyed = KeyedLogitsProcessor(choose, mask, peer)
        out = peer.generate(padded, do_sample=True, logits_processor=[keyed], **given)
        assert list(map(len, there.ids)) == [n] * len(ids)
        for row, a, b in zip(out[:, padded.shape[1] :], there.ids, ours.ids):
            assert torch.equal(row, a) and torch.equal(a, b)
    record("smollm: rows of seeded tokens equal in transformers' generate", [len(ids), n])


def test_smollm2_s_raw_scores_in_transformers_are_its_own(model, peer):
    ids, mask = left_pad([ids_of(model, text)[0] for text in PROMPTS[:3]])
    ours = model(ids, mask, attention=True).attention
    theirs = HuggingFace(peer)(ids, mask, attention=True).attention
    torch.testing.assert_close(
        theirs, ours.masked_fill(~mask[:, None, None], 0), atol=1e-3, rtol=1e-4
    )
