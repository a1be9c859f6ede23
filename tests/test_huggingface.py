"""The adapter for models of transformers, against the models it wraps and against our own."""

import gc
from functools import partial

import pytest
import torch
from helpers.architectures import ARCHITECTURES, EOS, QUICK, WINDOW, own
from helpers.architectures import tiny as tiny_model

from decoding_book.beam import beam_search
from decoding_book.entropix import EntropixConfig, EntropySampler, calibrate
from decoding_book.exhaustive import best_first_search
from decoding_book.greedy import greedy_search
from decoding_book.huggingface import (
    HuggingFace,
    InsideGenerate,
    KeyedLogitsProcessor,
    RequestLogitsProcessor,
    SamplerLogitsProcessor,
    text_functions,
)
from decoding_book.loop import Draw, PromptCache, generate, greedy, left_pad, score, stream
from decoding_book.penalties import spellings
from decoding_book.sampler import Sampler

TOLERANCE = 2e-4
PROMPTS = ["The capital of France is", "Once upon a time"]


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


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mistral"])
def test_a_prompt_that_was_read_serves_later_calls(name):
    adapter = HuggingFace(tiny_model(name))
    start = torch.arange(2, 2 + WINDOW + 3)
    kept = PromptCache(adapter, start)
    rows = [torch.cat([start, torch.tensor(more)]) for more in ([5, 6, 7], [9])]
    if name == "Mistral":  # its window is shorter than what was read
        short = PromptCache(adapter, start[: WINDOW - 4])  # its end comes in the middle
        pair = [start[: WINDOW - 2], torch.cat([start[: WINDOW - 4], torch.tensor([3])])]
        for cache, texts in ((kept, rows), (short, pair)):
            with pytest.raises(ValueError, match=f"cache: rows of unequal .* {WINDOW} pos") as e:
                generate(adapter, texts, max_new_tokens=8, cache=cache)
            assert not e.value.generation.steps
        again = generate(adapter, pair, max_new_tokens=2, cache=short).ids
        assert lists(again) == lists(generate(adapter, pair, max_new_tokens=2).ids)
        rows = [row[: WINDOW + 4] for row in rows]
    for choose in (greedy, SEEDED):
        plain = generate(adapter, rows, choose, 8).ids
        for _ in range(2):
            assert lists(generate(adapter, rows, choose, 8, cache=kept).ids) == lists(plain)
    assert kept.memory.length == len(start)
    part = [torch.cat([start[:4], torch.tensor([3])]), start[:6]]
    if name == "Mistral":
        said = f"cache: PromptCache.* shares 4 ids with .*length: 4 of {len(start)} positions, but "
        for search in (generate, greedy_search, partial(beam_search, width=2)):
            with pytest.raises(ValueError, match=said):
                search(adapter, part, max_new_tokens=4, cache=kept)
        return
    again = generate(adapter, part, max_new_tokens=4, cache=kept).ids
    assert lists(again) == lists(generate(adapter, part, max_new_tokens=4).ids)
    with pytest.raises(ValueError, match="length: 99 is above .*, what is filled"):
        kept.memory.crop(99)


def test_the_adapter_refuses(tiny):
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


def test_texts_without_special_tokens():
    assert HuggingFace(llama(), words()).decode([2, 1, 3]) == "a </s> b"
    assert HuggingFace(llama(), words(), skip_special=True).decode([2, 1, 3]) == "a b"
    with pytest.raises(ValueError, match="skip_special: 'no' is not one of False, True"):
        HuggingFace(llama(), words(), skip_special="no")


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


def masked(kind, **more):
    import transformers

    small = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    config = transformers.BertConfig(num_attention_heads=2, **small, **more)
    return getattr(transformers, kind)(config)


def test_models_that_fill_gaps_are_refused():
    from transformers import XLNetConfig, XLNetLMHeadModel

    xlnet = XLNetLMHeadModel(
        XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=16)
    )
    for peer in (masked("BertForMaskedLM"), masked("BertLMHeadModel"), xlnet):
        with pytest.raises(ValueError, match=f"model: {type(peer).__name__} fills gaps"):
            HuggingFace(peer)
    causal = HuggingFace(masked("BertLMHeadModel", is_decoder=True))
    assert len(generate(causal, [3, 4], max_new_tokens=3, ignore_eos=True).ids) == 3


def test_what_is_no_model_is_refused_by_name(tiny):
    from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

    with pytest.raises(
        TypeError, match=r"model: 'gpt2' is a name: transformers.AutoModel.*\('gpt2'\)"
    ):
        HuggingFace("gpt2")
    for wrong in (None, 3, [], GPT2LMHeadModel, GPT2Config(), words(), tiny, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="(?s)model: .* is no model of transformers, such as"):
            HuggingFace(wrong)
    ids = torch.tensor([[1, 2], [3, 4]])
    filled = tiny.new_cache(2, 8)
    tiny(ids, cache=filled)
    right = torch.tensor([[True, True], [True, False]])
    for adapter in (tiny, HuggingFace(cacheless("Mamba"))):
        for args, kind, said in (
            (([[1, 2]],), TypeError, "ids: list is no tensor"),
            ((ids.numpy(),), TypeError, "ids: ndarray is no tensor"),
            ((ids[0],), ValueError, r"ids: shape \(2,\)"),
            ((ids.float(),), ValueError, "ids: shape .* of torch.float32"),
            ((ids * 10,), ValueError, "ids: 40 is outside the vocabulary 0..39"),
            ((-ids,), ValueError, "ids: -4 is outside"),
            ((ids, right), ValueError, "mask, row 1: padded behind its text"),
            ((ids, right[:, :1]), ValueError, r"mask: shape \(2, 1\)"),
            ((ids, right.long()), ValueError, "mask: .* of torch.int64"),
            ((ids, right.tolist()), TypeError, "mask: list is no tensor"),
            ((ids, None, DynamicCache()), TypeError, "cache: DynamicCache is not"),
            ((ids, None, tiny.new_cache(1, 8)), ValueError, "cache: room for 1, ids have 2 rows"),
            ((ids[:1], None, filled), ValueError, "cache: 2 rows, ids have 1 rows"),
        ):
            for last in (True, False):
                with pytest.raises(kind, match=said):
                    adapter(*args, last_only=last)
    assert filled.length == 2


@pytest.mark.parametrize("start", [3, "a", [1.5], [True], [[1]], [99], [-1], {2}])
def test_a_start_that_is_none_is_refused_by_name(start):
    with pytest.raises((TypeError, ValueError), match="start_ids: "):
        HuggingFace(llama(), words(), start_ids=start)


def state_keeper(name, **more):
    "A tiny model that keeps a state in some layers."
    import transformers

    sizes = dict(hidden_size=16, num_attention_heads=4, head_dim=4, vocab_size=40, eos_token_id=1)
    kinds = dict(
        MiniMax=dict(num_local_experts=3, intermediate_size=16, num_key_value_heads=2),
        RecurrentGemma=dict(num_hidden_layers=3, num_key_value_heads=1, lru_width=16),
        Qwen3Next=dict(
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            num_key_value_heads=2,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=4,
            linear_value_head_dim=4,
        ),
    )
    config = getattr(transformers, f"{name}Config")(**sizes | kinds[name] | more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.ndim == 2:
            p.data.normal_(0, 0.4)
    return HuggingFace(model)


def both_ways(kinds):
    return dict(layer_types=kinds * 2, num_hidden_layers=4)


FULL, LINEAR = "full_attention", "linear_attention"
KEEPERS = {
    "RecurrentGemma": ("RecurrentGemma", {}),
    "MiniMax": ("MiniMax", both_ways([FULL, LINEAR])),
    "Qwen3-Next": ("Qwen3Next", both_ways([LINEAR, FULL])),
}


@pytest.mark.parametrize("name", KEEPERS)
def test_a_state_is_padded_reordered_and_left_by_rows_that_end(name):
    "Loop and beam over unequal rows, some of which end early, beside each row read anew."
    kind, more = KEEPERS[name]
    adapter = state_keeper(kind, **more)
    assert hasattr(adapter, "new_cache") == (name != "RecurrentGemma")

    def logprobs(prompt, ids):  # with the whole text for each token
        texts = [torch.cat([prompt, ids[:n]])[None] for n in range(len(ids))]
        laws = [adapter(text).logits[0].log_softmax(-1) for text in texts]
        return torch.stack([law[id] for law, id in zip(laws, ids)])

    drawn = generate(adapter, UNEQUAL, Sampler(seed=1), 12, stop=list(range(8)))
    assert len({len(ids) for ids in drawn.ids}) > 1
    for prompt, ids, said in zip(UNEQUAL, drawn.ids, drawn.logprobs):
        torch.testing.assert_close(said, logprobs(prompt, ids), atol=1e-4, rtol=0)
    for prompt, found in zip(UNEQUAL, beam_search(adapter, UNEQUAL, 4, 8, n_best=4)):
        for best in found:
            want = logprobs(prompt, best.ids).double()
            torch.testing.assert_close(best.logprobs, want, atol=1e-4, rtol=0)


def test_recurrent_gemma_says_what_its_own_generate_says():
    adapter = state_keeper("RecurrentGemma")
    for prompt in UNEQUAL:
        ours = generate(adapter, prompt, max_new_tokens=12).ids.tolist()
        mask = torch.ones(1, len(prompt))
        assert [ours] == own(adapter.model, prompt[None], mask, do_sample=False, max_new_tokens=12)


def test_a_cache_that_counts_wrong_is_refused_before_a_token():
    "MiniMax's, if its first layer keeps a state; rows of equal length are right."
    adapter = state_keeper("MiniMax", **both_ways([LINEAR, FULL]))
    for search in (generate, partial(beam_search, width=2)):
        with pytest.raises(ValueError, match="mask: rows of unequal length, and the cache of Mini"):
            search(adapter, UNEQUAL, max_new_tokens=4)
    rows = torch.tensor([[3, 4, 5], [6, 7, 8]])
    both = generate(adapter, rows, max_new_tokens=8, ignore_eos=True).ids
    for row, ids in zip(rows, both):
        assert generate(adapter, row, max_new_tokens=8, ignore_eos=True).ids.equal(ids)
    with pytest.raises(ValueError, match="cache: .* shares 2 ids .*MiniMaxCache does not support"):
        kept = PromptCache(adapter, [3, 4, 5])
        generate(adapter, [3, 4, 9], max_new_tokens=2, cache=kept)


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
    assert g.text == " world there!" and g.plain_data()["tokens"] == [" world", " there", "!"]
    assert [s.text[0] for s in stream(adapter, [3], say, max_new_tokens=3)] == [
        " world",
        " there",
        "!",
    ]
    stopped = generate(adapter, [3], say, max_new_tokens=3, stop=" world")
    assert (stopped.text, stopped.reason, len(stopped.ids)) == ("", "stop", 1)


# ---- around transformers: each architecture beside its own `generate`

UNEQUAL = [torch.tensor(p) for p in ([3, 9, 4], [7], [5, 9, 2, 6, 5, 3, 8])]
IDS, MASK = left_pad(UNEQUAL)
SEEDED = Sampler(temperature=0.9, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.1, seed=3)


def lists(rows):
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_says_what_its_own_generate_says(name, full, record):
    "Greedily, by four beams, and with the seeded token given to `generate`; padded rows."
    if not full and name not in QUICK:
        pytest.skip("quick counts: with --full")
    n, seeds, compared, ended = (64 if full else 16), range(3 if full else 1), 0, 0
    for seed in seeds:
        model = tiny_model(name, seed)
        adapter, options = HuggingFace(model), dict(max_new_tokens=n)
        assert hasattr(adapter, "new_cache") == (name != "Mamba") and adapter.eos == EOS
        ours = lists(generate(adapter, UNEQUAL, max_new_tokens=n).ids)
        assert ours == own(model, IDS, MASK, do_sample=False, **options)
        best = beam_search(adapter, UNEQUAL, 4, n, 1.0, dialect="huggingface")
        beams = lists(found[0].ids for found in best)
        assert beams == own(model, IDS, MASK, do_sample=False, num_beams=4, **options)
        drawn = lists(generate(adapter, UNEQUAL, SEEDED, n).ids)
        for do_sample in (True, False):
            keyed = KeyedLogitsProcessor(SEEDED, MASK)
            options["logits_processor"] = [keyed]
            assert drawn == own(model, IDS, MASK, do_sample=do_sample, **options)
        compared += sum(map(len, ours + beams + drawn))
        ended += sum(EOS in row for row in ours + beams + drawn)
        assert len({*sum(drawn, [])}) > 4
    record(
        f"transformers, {name}: greedy, beam 4 and seeded tokens equal to its own generate",
        {"models": len(seeds), "at most": n, "tokens": compared, "rows that ended": ended},
    )


def test_the_views_show_what_such_a_model_says():
    from html import escape

    from decoding_book.entropix import BranchView
    from decoding_book.trees import stepper_html

    adapter = HuggingFace(llama(), words("<s>"))
    said = generate(adapter, ["a b", "c"], EntropySampler(), 4)
    beams = beam_search(adapter, "a b", 2, 4)
    for page in said._repr_html_(), BranchView(said)._repr_html_(), stepper_html(said[0]):
        assert all(escape(word) in page for word in said[0].text.split())
    for page in beams._repr_html_(), stepper_html(beams):
        assert all(escape(word) in page for word in beams[0].text.split())


# ---- raw scores


def expected(model, ids, mask):
    "The weights of the last position that eager attention returns, (B, L, H, N)."
    places = (mask.cumsum(1) - 1).clamp(min=0)
    where = {} if "Bloom" in type(model).__name__ else {"position_ids": places}
    with torch.no_grad():
        out = model(ids, attention_mask=mask.long(), output_attentions=True, **where)
    return torch.stack(out.attentions, 1)[:, :, :, -1]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "Mamba"])
def test_raw_scores_are_what_softmax_makes_attention_of(name, full):
    if not full and name not in QUICK:
        pytest.skip("quick counts: with --full")
    want, found = expected(tiny_model(name, attention="eager"), IDS, MASK), []
    for way in ("eager", "sdpa") if name not in ("Gemma 2", "BLOOM") else ("eager",):
        adapter = HuggingFace(tiny_model(name, attention=way))
        cache = adapter.new_cache(3, 7)
        assert adapter(IDS[:, :-1], MASK[:, :-1], cache=cache).attention is None
        for p in (
            adapter(IDS[:, -1:], cache=cache, attention=True),
            adapter(IDS, MASK, None, True, True),
        ):
            assert p.key_mask.equal(MASK) and p.attention.shape == (3, 2, 4, 7)
            assert (p.attention.masked_select(~MASK[:, None, None]) == 0).all()
            law = p.attention.masked_fill(~MASK[:, None, None], -torch.inf).softmax(-1)
            torch.testing.assert_close(law, want, atol=1e-5, rtol=0)
            found.append(p.attention)
    for scores in found[1:]:
        torch.testing.assert_close(scores, found[0], atol=1e-4, rtol=1e-4)


def test_scores_that_cannot_be_had_are_refused_by_name():
    long = torch.full((1, WINDOW + 1), 5)
    for way in ("eager", "sdpa"):
        mistral = HuggingFace(tiny_model("Mistral", attention=way))
        assert mistral(long[:, 1:], attention=True).attention.shape == (1, 2, 4, WINDOW)
        with pytest.raises(
            ValueError, match=f"attention: layer 0 of Mistral.* not look at all {WINDOW + 1}"
        ):
            mistral(long, attention=True)
        cache = mistral.new_cache(1, 20)
        mistral(long[:, 1:], cache=cache)
        with pytest.raises(ValueError, match="attention: layer 0 of Mistral"):
            mistral(long[:, :1], cache=cache, attention=True)
    with pytest.raises(ValueError, match="attention: MambaForCausalLM shows raw scores in 0 of"):
        HuggingFace(tiny_model("Mamba"))(IDS, MASK, attention=True)


# ---- inside transformers


def stepwise(model, processor, n=12, **options):
    "The scores of each step (n, B, V) and all ids, drawn by `generate`."
    torch.manual_seed(0)
    out = model.generate(
        IDS,
        attention_mask=MASK.long(),
        max_new_tokens=n,
        do_sample=True,
        logits_processor=[processor],
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        **options,
    )
    return torch.stack(out.scores), out.sequences


def test_the_law_inside_generate_is_the_sampler_s():
    "With penalties that count the prompt or do not, and padding that looks like a word."
    model = tiny_model("Llama")
    adapter = HuggingFace(model)
    for pad in (0, 7):
        ids = IDS.masked_fill(~MASK, pad)
        sampler = Sampler(
            temperature=[0.7, 1, 1.3],
            top_k=9,
            repetition_penalty=1.5,
            presence_penalty=0.3,
            no_repeat_ngram=3,
        )
        processor = SamplerLogitsProcessor(sampler, MASK.long())
        for _ in range(2):  # the processor may be used again
            scores, said = stepwise(model, processor, top_k=0)
            for step, z in enumerate(scores):
                known = said[:, : IDS.shape[1] + step]
                real = torch.cat([MASK, MASK.new_ones(3, step)], 1)
                law = sampler.distribution(
                    adapter(known, real).logits, known.where(real, pad), real, MASK.sum(1)
                )
                torch.testing.assert_close(z.softmax(-1), law, atol=1e-5, rtol=0)
                assert (z.isfinite().sum(1) <= 9).all()
        context = processor.context(ids)
        assert context.lengths.tolist() == context.prompt_lengths.tolist() == [3, 1, 7]


def test_what_generate_does_before_and_after_a_processor():
    "Its cut to 50 tokens comes after ours unless it is put off, its penalties come before."
    model, seen = tiny_model("Llama", vocab_size=80), []
    for more, kept in (({}, 50), ({"top_k": 0}, 80)):
        scores, _ = stepwise(model, SamplerLogitsProcessor(Sampler(), MASK), 2, **more)
        assert (scores.isfinite().sum(-1) == kept).all()

    def note(prediction, context):
        seen.append(prediction.logits)
        return greedy(prediction)

    stepwise(model, KeyedLogitsProcessor(note, MASK), 1, repetition_penalty=2.0)
    change = (seen[0] - HuggingFace(model)(IDS, MASK).logits).abs()
    changed = (change > 1e-3).nonzero().tolist()
    assert changed and all(id in IDS[row] for row, id in changed)


def test_several_answers_to_a_prompt_are_rows_of_their_own():
    model = tiny_model("Llama")
    twice = [p for p in UNEQUAL for _ in range(2)]
    ours = lists(generate(HuggingFace(model), twice, SEEDED, 12).ids)
    keyed = [KeyedLogitsProcessor(SEEDED, MASK)]
    assert ours == own(
        model,
        IDS,
        MASK,
        do_sample=True,
        num_return_sequences=2,
        max_new_tokens=12,
        logits_processor=keyed,
    )


class Said:
    "A clarifying text of three ids."

    def encode(self, text):
        return [11, 12, 13]


def policies(adapter):
    "Policies of which every branch decides, and one that asks a text of several ids each time."
    unsure = dict(low_ent_thresh=0, high_ent_thresh=0, low_vent_thresh=1e3, high_vent_thresh=1e4)
    yield EntropySampler(calibrate(adapter, [list(range(2, 40))]), seed=2)
    yield EntropySampler(EntropixConfig(**unsure), clarify="?", tokenizer=Said(), rows=[9, 2, 4])


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma"])
def test_the_entropy_policy_chooses_inside_generate(name, full):
    model, n = tiny_model(name), 66 if full else 18  # in the middle of what the second says
    adapter = HuggingFace(model)
    for policy in policies(adapter):
        ours = generate(adapter, UNEQUAL, policy, n)
        assert len({b for s in ours.steps for b in s.draw.branch.tolist()}) > 2 or policy.clarify
        keyed = KeyedLogitsProcessor(policy, MASK, adapter if policy.clarify else model)
        for _ in range(2):  # what was remembered of the rows is forgotten
            assert lists(ours.ids) == own(
                model, IDS, MASK, do_sample=True, max_new_tokens=n, logits_processor=[keyed]
            )
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    del keyed
    gc.collect()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_call_that_fails_leaves_nothing_behind():
    model = tiny_model("Llama")
    keyed = KeyedLogitsProcessor(next(policies(HuggingFace(model))), MASK, model)
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    assert torch.overrides._get_current_function_mode_stack() == []
    assert own(model, IDS, MASK, do_sample=True, max_new_tokens=2, logits_processor=[keyed])


Z = torch.ones(3, 9)


def test_processors_refuse_by_name():
    model, policy = tiny_model("Llama"), EntropySampler()
    right = torch.tensor([[1, 1, 1], [1, 1, 0]])
    for what, said in (
        (lambda: KeyedLogitsProcessor(3, MASK), "choose: 3 is not callable"),
        (lambda: SamplerLogitsProcessor(greedy, MASK), "sampler: <function greedy .* has no law"),
        (lambda: KeyedLogitsProcessor(policy, MASK), "model: None, but choose reads"),
        (lambda: InsideGenerate(None), "attention_mask: "),
        (lambda: InsideGenerate([1, 1]), r"attention_mask: shape \(2,\), expected \(B, T\)"),
        (lambda: InsideGenerate(right), "attention_mask, row 1: padded on the right"),
        (
            lambda: InsideGenerate(MASK).context(IDS[:, 1:]),
            r"attention_mask: shape \(3, 7\) does not begin input_ids \(3, 6\)",
        ),
        (lambda: InsideGenerate(MASK).context(IDS[:2]), "does not begin input_ids"),
        (
            lambda: KeyedLogitsProcessor(lambda p, c: Draw(c.row[:1]), MASK)(IDS, torch.ones(3, 9)),
            r"choose: returned ids \[0\] for 3 rows",
        ),
        (lambda: InsideGenerate(MASK.float() / 2), "attention_mask: 0.5 is neither 0 nor 1"),
        (lambda: InsideGenerate([[0, 2]]), "attention_mask: 2 is neither 0 nor 1"),
        (lambda: KeyedLogitsProcessor(policy, MASK, "x"), "model: 'x' is a name"),
        (lambda: KeyedLogitsProcessor(greedy, MASK, 3), "model: 3 is no model"),
        (lambda: KeyedLogitsProcessor(greedy, MASK)(lists(IDS), Z), "input_ids: list of shape"),
        (lambda: KeyedLogitsProcessor(greedy, MASK)(IDS.float(), Z), "input_ids: Tensor of"),
        (
            lambda: SamplerLogitsProcessor(SEEDED, MASK)(IDS[0], Z),
            r"input_ids: Tensor of shape \(7,\)",
        ),
        (lambda: KeyedLogitsProcessor(greedy, MASK)(IDS, Z[:2]), r"scores: shape \(2, 9\), exp"),
        (lambda: KeyedLogitsProcessor(greedy, MASK)(IDS, Z[0]), r"scores: shape \(9,\), exp"),
        (lambda: SamplerLogitsProcessor(SEEDED, MASK)(IDS, Z.tolist()), "scores: list is no"),
        (lambda: RequestLogitsProcessor(SEEDED, law="no"), "law: 'no' is not one of"),
        (lambda: RequestLogitsProcessor(greedy)([2], [], Z), "logits: Tensor of shape"),
        (lambda: RequestLogitsProcessor(greedy)([2], [], Z[0].long()), "logits: Tensor of shape"),
        (lambda: RequestLogitsProcessor(greedy)([2], [], Z[0].numpy()), "logits: ndarray of shape"),
        (lambda: RequestLogitsProcessor(greedy)([2], [], [1.0, 2.0]), "logits: list of shape"),
        (lambda: RequestLogitsProcessor(None), "choose: None is not callable"),
        (lambda: RequestLogitsProcessor(policy), "choose: it reads attention"),
        (lambda: RequestLogitsProcessor(greedy, law=True), "choose: <function greedy .* no law"),
        (lambda: RequestLogitsProcessor(greedy, -1), "row: -1 is below 0"),
        (lambda: RequestLogitsProcessor(greedy)(None, [], torch.ones(4)), "prompt_token_ids: None"),
        (lambda: RequestLogitsProcessor(greedy)([2], [4], torch.ones(4)), "output_token_ids: id 4"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            what()
    assert not model._forward_hooks


# ---- inside vLLM, or what stands in for it


def test_requests_in_an_engine_say_what_the_loop_says():
    from types import SimpleNamespace

    from helpers.vllm_stand_in import AdapterLogitsProcessor, engine

    class Book(AdapterLogitsProcessor):
        def is_argmax_invariant(self):
            return False

        def new_req_logits_processor(self, params):
            own = (params.extra_args or {}).get("book")
            return own and RequestLogitsProcessor(*own)

    adapter = HuggingFace(tiny_model("Llama"))
    prompts = [*lists(UNEQUAL), [8, 8], [2, 3, 4, 5]]
    policy = EntropySampler(
        calibrate(adapter, [list(range(2, 40))], attention=False), attention=False
    )
    for choose in (SEEDED, policy, greedy):
        ours = generate(adapter, prompts, choose, 20, ignore_eos=True)
        asked = [SimpleNamespace(extra_args={"book": (choose, i)}) for i in range(len(prompts))]
        asked[-1].extra_args = None  # left alone
        said = engine(adapter, Book(), list(zip(prompts, asked)), 20)
        assert said[:-1] == lists(ours.ids)[:-1]
        plain = generate(adapter, prompts[-1], max_new_tokens=20, ignore_eos=True)
        assert said[-1] == plain.ids.tolist()


def test_a_request_gets_the_law():
    z = torch.randn(9, generator=torch.Generator().manual_seed(4))
    law = RequestLogitsProcessor(SEEDED, law=True)([1, 2, 2], [5, 5], z)
    told = torch.tensor([[1, 2, 2, 5, 5]]), None, 3
    torch.testing.assert_close(law.softmax(-1), SEEDED.distribution(z[None], *told)[0])


# ---- chat


CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im|>' + m['role'] + ' ' + m['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im|>assistant ' }}{% endif %}"
)


def test_chat_is_the_tokenizer_s_template_and_what_is_typed_stays_text():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        chat_template=CHATML,
        additional_special_tokens=["<|im|>", "<|end|>"],
    )
    adapter = HuggingFace(llama(vocab_size=len(fast)), fast, start_ids=[fast.bos_token_id])
    user, answer = (
        dict(role="user", content="Hi <b>"),
        dict(role="assistant", content="It is"),
    )
    for talk, goes_on in (([user], False), ([user, answer, user], False), ([user, answer], True)):
        prompt = adapter.chat(talk, goes_on)
        how = dict(add_generation_prompt=not goes_on, continue_final_message=goes_on)
        assert prompt == fast.apply_chat_template(talk, tokenize=False, **how)
        want = fast.apply_chat_template(talk, tokenize=True, return_dict=False, **how)
        assert adapter.encode(prompt) == want and want[0] == fast.bos_token_id
        assert generate(adapter, prompt, max_new_tokens=1).prompt_ids.tolist() == want
    typed = adapter.chat([dict(role="user", content="a<|end|><s>b")])
    assert str(typed) == "<s><|im|>user a<|end|><s>b<|end|><|im|>assistant "
    marks = [i for i in adapter.encode(typed) if i >= 256]
    assert fast.convert_ids_to_tokens(marks) == ["<s>", "<|im|>", "<|end|>", "<|im|>"]
    assert adapter.decode(typed.ids) == str(typed)
    with pytest.raises(ValueError, match="messages: 'Hi' is not a dict"):
        adapter.chat(["Hi"])
    assert not hasattr(HuggingFace(llama(), words()), "chat")


def other(name):
    "A tiny model that keeps a state, or counts columns."
    import transformers

    small = dict(vocab_size=64, hidden_size=32, num_attention_heads=4)
    kinds = dict(
        Lfm2=dict(
            num_hidden_layers=2,
            num_key_value_heads=2,
            intermediate_size=48,
            layer_types=["conv", "full_attention"],
        ),
        GPTNeo=dict(
            num_layers=2, attention_types=[[["global", "local"], 1]], window_size=6, num_heads=4
        ),
        Mpt=dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**small | kinds[name])
    return HuggingFace(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("name", ["Lfm2", "GPTNeo", "Mpt"])
def test_a_past_that_would_count_padding_is_refused_before_a_token(name):
    model, kept = other(name), list(range(10, 19))
    rows = [kept + [5, 6, 7], kept + [8]]
    with pytest.raises(ValueError, match="ids: |cache: rows of unequal length") as refused:
        generate(model, rows, max_new_tokens=4, cache=PromptCache(model, kept))
    assert not refused.value.generation.steps
    alone = generate(model, rows[1], max_new_tokens=4, ignore_eos=True)
    again = generate(
        model, rows[1], max_new_tokens=4, ignore_eos=True, cache=PromptCache(model, kept)
    )
    assert again.ids.equal(alone.ids)


def test_a_state_goes_on_one_position_at_a_time():
    ids = list(range(3, 23))
    with pytest.raises(ValueError, match="ids: 8 positions after a filled cache"):
        score(other("Lfm2"), ids, chunk=8)
    steps, whole = (score(other("Lfm2"), ids, chunk=n)[:, 1:] for n in (1, 256))
    torch.testing.assert_close(steps, whole)


def test_without_its_cache_such_a_model_is_searched_best_first():
    model = other("Lfm2")
    with pytest.raises(ValueError, match="after `del model.new_cache` it reads whole texts"):
        best_first_search(model, [[5, 6, 7]], 3)
    del model.new_cache
    best = best_first_search(model, [5, 6, 7], 2, n_best=2, batch=3, ignore_eos=True)
    assert best[0].logprob == pytest.approx(
        score(model, torch.tensor([5, 6, 7, *best[0].ids]))[0, 3:].sum().item(), abs=1e-4
    )


@pytest.mark.parametrize("skip", [False, True])
def test_an_unknown_word_has_no_spelling(skip):
    "Its id is that of all words that the tokenizer does not know."
    adapter = HuggingFace(llama(), words(), skip_special=skip)
    assert spellings(adapter, "b") == {(3,): " b"}
    assert spellings(adapter, "b c") == {(3, 4): " b c"}
    for unknown in ("tea", "b tea", "!"):
        with pytest.raises(ValueError, match=f"words: {unknown!r} is no text of this model's"):
            spellings(adapter, ["b", unknown])


def test_text_that_spells_a_control_token_can_be_text():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "a", "<", "/", "s", ">", "</s>", "b"]
    bare = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    own = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", unk_token="<unk>")
    encode, _ = text_functions(own, [], 8)
    assert encode("a</s>b") == [1, 6, 7] and encode("a</s>b", control=False) == [1, 2, 3, 4, 5, 7]
