"""The adapter for models of transformers, against the models it wraps and against our own."""

import pytest
import torch

from decoding_book.huggingface import HuggingFace
from decoding_book.loop import Draw, generate, left_pad, stream

TOLERANCE = 2e-4
PROMPTS = ["The capital of France is", "Once upon a time"]


@pytest.mark.parametrize("name", ["HuggingFace", "HuggingFaceCache"])
def test_the_old_address_still_works_and_warns(name):
    import decoding_book.huggingface as new
    import decoding_book.smollm as old

    with pytest.warns(DeprecationWarning, match=f"{name} is in decoding_book.huggingface"):
        assert getattr(old, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = old.Nothing


def test_the_adapter_decodes_the_same_text(model, peer):
    class Words:  # what the adapter needs of a tokenizer
        def encode(self, text, add_special_tokens):
            return model.encode(text)

        def decode(self, ids, clean_up_tokenization_spaces):
            return model.decode(ids)

    adapter = HuggingFace(peer, Words())
    assert (adapter.vocab_size, adapter.context, adapter.eos) == (49152, 8192, None)
    ours = generate(model, PROMPTS, max_new_tokens=8, ignore_eos=True)
    theirs = generate(adapter, PROMPTS, max_new_tokens=8)
    assert theirs.text == ours.text and all(map(torch.equal, theirs.ids, ours.ids))
    ids = torch.tensor([model.encode(PROMPTS[0])])
    torch.testing.assert_close(
        adapter(ids, last_only=False).logits,
        model(ids, last_only=False).logits,
        atol=TOLERANCE,
        rtol=0,
    )


@pytest.fixture(scope="module")
def tiny():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return HuggingFace(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, eos_token_id=[3, 4]
            )
        )
    )


def test_the_adapters_cache(tiny):
    assert tiny.eos == 3 and tiny.context == 16 and not hasattr(tiny, "encode")
    ids, mask = left_pad([torch.tensor([1, 2, 5]), torch.tensor([7])])
    cache = tiny.new_cache(3, 12)
    cache.reorder([0])  # nothing to reorder yet
    assert cache.length == 0
    tiny(ids, mask, cache=cache)
    cache.reorder([1, 0, 0])
    new = torch.tensor([[8], [9], [10]])
    logits = tiny(new, cache=cache).logits
    for i, row in enumerate(([7, 8], [1, 2, 5, 9], [1, 2, 5, 10])):
        torch.testing.assert_close(
            logits[i], tiny(torch.tensor([row])).logits[0], atol=1e-5, rtol=0
        )
    cache.keep([2])
    assert cache.length == 4
    torch.testing.assert_close(
        tiny(torch.tensor([[11]]), cache=cache).logits,
        tiny(torch.tensor([[1, 2, 5, 10, 11]])).logits,
        atol=1e-5,
        rtol=0,
    )


def test_the_adapter_refuses(tiny):
    with pytest.raises(ValueError, match="attention: transformers"):
        tiny(torch.tensor([[1]]), attention=True)
    with pytest.raises(ValueError, match="17 positions are more than the context's 16"):
        tiny(torch.ones(1, 17, dtype=torch.long))
    cache = tiny.new_cache(1, 3)
    with pytest.raises(ValueError, match="4 positions are more than the cache's 3"):
        tiny(torch.ones(1, 4, dtype=torch.long), cache=cache)
    tiny(torch.ones(1, 2, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="rows: "):
        cache.reorder([1])


def words(before="", after=""):
    "A tokenizer of six words, with marks before and after a text as a template says."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<s>", "</s>", "a", "b", "c", "?"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(m, vocab[m]) for m in (before, after) if m]
    if marks:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=marks
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def llama_config(**more):
    from transformers import LlamaConfig

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlamaConfig(**dict(vocab_size=6) | sizes | more)


def llama(**more):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**more))


@pytest.mark.parametrize(
    "before, after, start",
    [("<s>", "", [0]), ("<s>", "</s>", [0]), ("", "</s>", None), ("", "", None)],
)
def test_a_text_starts_as_the_tokenizer_starts_it_and_goes_on(before, after, start):
    adapter = HuggingFace(llama(), words(before, after))
    assert adapter.start_ids == start and adapter.encode("a b") == (start or []) + [2, 3]
    assert generate(adapter, "a b", max_new_tokens=1).prompt_ids.tolist() == adapter.encode("a b")
    if start is None:
        with pytest.raises(
            ValueError, match="prompt: '' is empty, and this model defines no start"
        ):
            generate(adapter, "")
    else:
        for empty in ("", []):
            assert generate(adapter, empty, max_new_tokens=1).prompt_ids.tolist() == [0]


def test_a_start_may_be_given():
    assert HuggingFace(llama(), words(), start_ids=[0]).encode("a") == [0, 2]
    without = HuggingFace(llama(), start_ids=[0])
    assert generate(without, [], max_new_tokens=1).prompt_ids.tolist() == [0]


def test_a_clarifying_text_in_the_middle_has_no_start_mark():
    from decoding_book.entropix import clarifying_ids

    assert clarifying_ids("b c", HuggingFace(llama(), words("<s>"))) == (3, 4)


def cacheless(name):
    import transformers

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    if name == "Rwkv":
        sizes |= dict(attention_hidden_size=16, context_length=64)
    else:
        sizes |= dict(state_size=4)
    model = getattr(transformers, name + "ForCausalLM")(
        getattr(transformers, name + "Config")(**sizes)
    )
    for p in model.parameters():  # far apart, so that rounding decides nothing
        if p.ndim == 2:
            p.data = torch.randn_like(p) * 0.6
    return model.eval()


@pytest.mark.parametrize("name", ["Mamba", "Rwkv"])
def test_a_model_without_keys_and_values_runs_without_a_cache(name):
    from decoding_book.beam import beam_search

    peer = cacheless(name)
    adapter = HuggingFace(peer)
    assert not hasattr(adapter, "new_cache")
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]
    together = generate(adapter, prompts, max_new_tokens=10, ignore_eos=True)
    for prompt, ids in zip(prompts, together.ids):
        theirs = list(prompt)
        with torch.no_grad():
            for _ in range(10):
                theirs.append(
                    peer(torch.tensor([theirs]), use_cache=False).logits[0, -1].argmax().item()
                )
        assert ids.tolist() == theirs[len(prompt) :]
    ids, mask = left_pad([torch.tensor(p) for p in prompts])
    logits = adapter(ids, mask, last_only=False).logits
    for row, prompt in zip(logits, prompts):
        torch.testing.assert_close(
            row[-len(prompt) :], adapter(torch.tensor([prompt]), last_only=False).logits[0]
        )
    assert (
        beam_search(adapter, [3, 1, 4], 3, 4)[0].logprob
        >= generate(adapter, [3, 1, 4], max_new_tokens=4).logprobs.sum().item() - 1e-5
    )


def test_models_that_do_not_continue_a_text_are_refused():
    from transformers import LlamaModel, T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(
        ValueError, match="model: T5ForConditionalGeneration reads one text and writes another"
    ):
        HuggingFace(t5)
    bare = LlamaModel(llama_config())
    with pytest.raises(ValueError, match="model: LlamaModel gives no logits"):
        HuggingFace(bare)


def test_decode_takes_the_ids_of_one_text(model):
    from decoding_book.toy import six_words
    from decoding_book.transformer import GPT, GPTConfig

    models = [
        model,
        six_words(),
        GPT(GPTConfig(chars="abcd", width=8, heads=1, layers=1)),
        HuggingFace(llama(), words()),
    ]
    for m in models:
        whole = m.decode([2, 3])
        for ids in (
            (2, 3),
            torch.tensor([2, 3]),
            torch.tensor([2, 3]).numpy(),
            list(torch.tensor([2, 3])),
            range(2, 4),
        ):
            assert m.decode(ids) == whole
        assert m.decode([]) == ""
        batch = generate(m, [[2, 3], [3]], max_new_tokens=2, ignore_eos=True).ids
        for bad in (
            batch,
            torch.stack(batch),
            [[2, 3], [2]],
            [[2, 3]],
            2,
            torch.tensor(2),
            [2.0],
            torch.tensor([2.0]),
            [True],
            "a",
            None,
        ):
            with pytest.raises(
                TypeError, match="(?s)ids: .* is not a sequence of integer ids of one text"
            ):
                m.decode(bad)
        for bad in ([m.vocab_size], [-1]):
            with pytest.raises(
                ValueError, match=rf"ids: id {bad[0]} at index 0 is outside the vocabulary"
            ):
                m.decode(bad)


def test_a_sentencepiece_tokenizer_keeps_the_first_space():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocab = ["<unk>", "<s>", "</s>", "▁Hello", "▁world", "▁there", "!"]
    t = Tokenizer(models.BPE({v: i for i, v in enumerate(vocab)}, [], unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    peer = llama(vocab_size=7)
    adapter = HuggingFace(peer, PreTrainedTokenizerFast(tokenizer_object=t))

    def say(p, c):
        return Draw((4 + c.lengths - c.prompt_lengths))

    g = generate(adapter, [3], say, max_new_tokens=3)
    assert g.text == " world there!" and g._view()["tokens"] == [" world", " there", "!"]
    assert [s.text[0] for s in stream(adapter, [3], say, max_new_tokens=3)] == [
        " world",
        " there",
        "!",
    ]
    stopped = generate(adapter, [3], say, max_new_tokens=3, stop=" world")
    assert (stopped.text, stopped.reason, len(stopped.ids)) == ("", "stop", 1)
