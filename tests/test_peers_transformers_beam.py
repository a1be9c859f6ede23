"""Beam search against transformers' own, on its own logits."""

from collections import Counter

import pytest
import torch

from decoding_book.beam import beam_search
from decoding_book.huggingface import HuggingFace
from decoding_book.loop import left_pad
from decoding_book.sampler import Sampler
from decoding_book.smollm import SmolLM2, dequantise, read_gguf, weights_path

transformers = pytest.importorskip("transformers")
V = 40


def tiny(seed):
    """A random model of one layer, neither flat nor certain, and a token it likes, as end mark."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.8)
        model.lm_head.weight.normal_(0, 0.45)
        liked = model(torch.randint(1, V, (8, 8))).logits.softmax(-1).mean((0, 1))
    return model, liked[1:].topk(4).indices[seed % 4].item() + 1


def theirs(model, prompts, eos, width, tokens, penalty, early, **more):
    ids, mask = left_pad(prompts)
    model.generation_config.eos_token_id = eos
    out = model.generate(
        ids,
        attention_mask=mask.long(),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=tokens,
        length_penalty=penalty,
        early_stopping=early,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **more,
    )
    new, rows = out.sequences[:, ids.shape[1] :].tolist(), []
    for r in new:
        rows.append(r[: r.index(eos) + 1] if eos in r else r)
    scores = out.sequences_scores.tolist()
    return [
        list(zip(rows[i : i + width], scores[i : i + width])) for i in range(0, len(rows), width)
    ]


def ours(model, prompts, eos, width, tokens, penalty, early, **more):
    if not isinstance(model, SmolLM2):
        model = HuggingFace(model)
    found = beam_search(
        model,
        prompts,
        width,
        tokens,
        penalty,
        n_best=width,
        stop=[eos, *more.pop("strings", ())],
        ignore_eos=True,
        early_stopping=early,
        dialect="huggingface",
        **more,
    )
    return [[(h.ids.tolist(), h.score) for h in one] for one in found]


def compare(a, b):
    "The same sequences in the same order; sequences cut at the end are as long as asked for."
    for one, other in zip(a, b, strict=True):
        assert [ids for ids, _ in one] == [ids for ids, _ in other]
        assert max(abs(s - t) for (_, s), (_, t) in zip(one, other)) < 1e-3


def test_beams_are_those_of_huggingface(full, record):
    # False and "never" differ in the last four
    seeds, tokens = ((range(504) if full else (0, 1, 2, 15, 32, 40, 49)), 12)
    tally, differ = Counter(), Counter()
    for seed in seeds:
        (model, eos), draw = tiny(seed), torch.Generator().manual_seed(seed)
        sizes = torch.randint(1, 6, (2,), generator=draw).tolist()
        prompts = [torch.randint(1, V, (n,), generator=draw) for n in sizes]
        for width in 2, 4, 8:
            for penalty in (1.0, (0.0, 2.0, -1.0)[seed % 3]):
                modes = {}
                for early in False, True, "never":
                    modes[early] = ours(model, prompts, eos, width, tokens, penalty, early)
                    compare(
                        modes[early], theirs(model, prompts, eos, width, tokens, penalty, early)
                    )
                for row in range(2):
                    tally["compared"] += 1
                    tally["ended"] += any(
                        eos in ids for early in modes for ids, _ in modes[early][row]
                    )
                    one = {early: [ids for ids, _ in modes[early][row]] for early in modes}
                    for a, b in (False, True), (False, "never"), (True, "never"):
                        differ[f"{a} and {b}"] += one[a] != one[b]
    assert tally["ended"] >= tally["compared"] / 2
    assert min(differ.values()) > 0
    record(
        "beam against transformers",
        {
            "models": len(seeds),
            "prompts a call": 2,
            "calls": tally["compared"] * 3 // 2,
            "rows of prompts compared in 3 modes": tally["compared"],
            "with an end mark": tally["ended"],
            "prompts on which two modes differ": dict(differ),
        },
    )


def test_penalties_in_a_beam(full, record):
    "They change logarithms, and nothing is normalised after them: sums are no log-probabilities."
    compared = changed = 0
    for seed in range(200) if full else (0, 1, 2, 3, 15):
        (model, eos), draw = tiny(seed), torch.Generator().manual_seed(seed)
        prompts = [torch.randint(1, V, (4,), generator=draw) for _ in range(2)]
        for theta, n in (1.3, 0), (1.0, 2), (1.7, 3):
            args = model, prompts, eos, (2, 4)[seed % 2], 12, (1.0, 0.0)[seed % 2], False
            penalties = Sampler(repetition_penalty=theta, no_repeat_ngram=n)
            found = ours(*args, process=penalties)
            compare(found, theirs(*args, repetition_penalty=theta, no_repeat_ngram_size=n))
            compared += len(found)
            changed += sum(a != b for a, b in zip(found, ours(*args)))
    assert changed > compared / 2
    record("beam with penalties against transformers", {"rows": compared, "changed": changed})


PROMPTS = [
    "The capital of France is",
    "It was a quiet morning in the city when",
    "Once upon a time",
    "In a shocking finding, scientists discovered",
    "My grandmother always told me that",
    "To make a good soup, you",
    "The night sky over the desert",
    "Water boils at",
]


def test_smollm_has_the_beams_of_huggingface(full, record):
    """SmolLM2 and transformers' Llama with the same weights, a full stop as the end mark."""
    from benchmarks.common import transformers_peer

    ours_model = SmolLM2()
    weights = {name: dequantise(*tensor) for name, tensor in read_gguf(weights_path())[1].items()}
    peer, dot = transformers_peer(weights), ours_model.encode(".")[0]
    texts, tokens = (PROMPTS, 32) if full else (PROMPTS[:2], 12)
    prompts, ended = [torch.tensor(ours_model.encode(t)) for t in texts], 0
    for early in (False, True, "never") if full else (False,):
        found = ours(ours_model, prompts, dot, 4, tokens, 1.0, early)
        compare(found, theirs(peer, prompts, dot, 4, tokens, 1.0, early))
        ended += sum(dot in ids for one in found for ids, _ in one)
    assert ended
    record(
        "beam 4 on SmolLM2 against transformers, '.' ends a text",
        {
            "prompts": len(texts),
            "tokens": tokens,
            "modes": 3 if full else 1,
            "hypotheses that ended": ended,
        },
    )


def unpadded(found, pad):
    "Hypotheses without end marks, with which transformers fills a text behind a stop string."
    return [([id for id in ids if id != pad], score) for ids, score in found]


def test_stop_strings_in_a_beam_end_the_texts_that_transformers_ends(full, peer, model):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model.weights.tokenizer)
    stops, count = ["n t", " of", ", t"], 0
    for text in PROMPTS if full else PROMPTS[1:3]:
        args = [torch.tensor(model.encode(text))], model.eos, 3, 10, 1.0, False
        found = ours(model, *args, strings=stops)
        (want,) = theirs(peer, *args, stop_strings=stops, tokenizer=fast)
        compare(*([unpadded(one, model.eos)] for one in (found[0], want)))
        for ids, _ in found[0]:
            assert not any(s in model.decode(ids[:-1]) for s in stops)
            count += any(s in model.decode(ids) for s in stops)
    assert count
