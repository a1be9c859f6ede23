"""The adapter for models of transformers, against the models it wraps and against our own."""
import pytest
import torch
from benchmarks.common import reference_weights, transformers_peer

from decoding_book.huggingface import HuggingFace
from decoding_book.loop import generate, left_pad
from decoding_book.smollm import SmolLM2, weights_path

TOLERANCE = 2e-4
PROMPTS = ["The capital of France is", "Once upon a time"]


@pytest.fixture(scope="module")
def model():
    return SmolLM2()


@pytest.fixture(scope="module")
def peer():
    return transformers_peer(reference_weights(weights_path())[0])


@pytest.mark.parametrize("name", ["HuggingFace", "HuggingFaceCache"])
def test_the_old_address_still_works_and_warns(name):
    import decoding_book.huggingface as new
    import decoding_book.smollm as old
    with pytest.warns(DeprecationWarning, match=f"{name} is in decoding_book.huggingface"):
        assert getattr(old, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        old.Nothing


def test_the_adapter_decodes_the_same_text(model, peer):
    class Words:                                              # what the adapter needs of a tokenizer
        def encode(self, text, add_special_tokens): return model.encode(text)
        def decode(self, ids, clean_up_tokenization_spaces): return model.decode(ids)
    adapter = HuggingFace(peer, Words())
    assert (adapter.vocab_size, adapter.context, adapter.eos) == (49152, 8192, None)
    ours = generate(model, PROMPTS, max_new_tokens=8, ignore_eos=True)
    theirs = generate(adapter, PROMPTS, max_new_tokens=8)
    assert theirs.text == ours.text and all(map(torch.equal, theirs.ids, ours.ids))
    ids = torch.tensor([model.encode(PROMPTS[0])])
    torch.testing.assert_close(adapter(ids, last_only=False).logits, model(ids, last_only=False).logits,
                               atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def tiny():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return HuggingFace(GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                                                  eos_token_id=[3, 4])))


def test_the_adapters_cache(tiny):
    assert tiny.eos == 3 and tiny.context == 16 and not hasattr(tiny, "encode")
    ids, mask = left_pad([torch.tensor([1, 2, 5]), torch.tensor([7])])
    cache = tiny.new_cache(3, 12)
    cache.reorder([0])                                        # nothing to reorder yet
    assert cache.length == 0
    tiny(ids, mask, cache=cache)
    cache.reorder([1, 0, 0])
    new = torch.tensor([[8], [9], [10]])
    logits = tiny(new, cache=cache).logits
    for i, row in enumerate(([7, 8], [1, 2, 5, 9], [1, 2, 5, 10])):
        torch.testing.assert_close(logits[i], tiny(torch.tensor([row])).logits[0], atol=1e-5, rtol=0)
    cache.keep([2])
    assert cache.length == 4
    torch.testing.assert_close(tiny(torch.tensor([[11]]), cache=cache).logits,
                               tiny(torch.tensor([[1, 2, 5, 10, 11]])).logits, atol=1e-5, rtol=0)


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
