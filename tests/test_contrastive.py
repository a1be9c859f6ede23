"""Two rows, one text: the arithmetic against its definition and transformers', models of two and
models with a prompt in every part of the seam, exact laws, hostile input."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.rows import kept, rows

from decoding_book.beam import beam_search
from decoding_book.contrastive import Contrasted, PairedCache, Prompted, contrast, guide, guided
from decoding_book.exhaustive import exhaustive_search
from decoding_book.loop import PromptCache, generate, score
from decoding_book.noise import chi_square
from decoding_book.sampler import Sampler
from decoding_book.smollm import SmolLM2
from decoding_book.speculative import ModelDrafter, speculate
from decoding_book.temperature import temperature
from decoding_book.topp import min_p
from decoding_book.toy import TableModel, sequence_law, six_words
from decoding_book.transformer import GPT, GPTConfig

INF = math.inf
WORLD = six_words(None)
FIRST = WORLD(torch.zeros(1, 0, dtype=torch.long)).logits[0].softmax(-1)
FLAT = TableModel(FIRST, FIRST.expand(6, 6), WORLD.words)
TWO = Contrasted(WORLD, FLAT, partial(guide, guidance=2.0))


@pytest.fixture(scope="module")
def gpt():
    "A small model with a cache and no training."
    torch.manual_seed(3)
    return GPT(GPTConfig("abcdefgh ", context=40, width=16)).eval()


@pytest.fixture(scope="module")
def smol():
    return SmolLM2(weights="q4")


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_guidance_is_its_definition_in_every_row(dtype):
    z, w = rows(300, 20, 1).to(dtype), rows(300, 20, 2).to(dtype)
    g = torch.linspace(0, 4, 300).tolist()
    out, low = guide(z, w, g), 1e-9 if dtype == torch.float64 else 1e-4
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    p, q = z.double().softmax(-1), w.double().softmax(-1)
    for i in range(0, 300, 7):
        want = p[i] ** g[i] / q[i] ** (g[i] - 1)
        assert (out[i].double().softmax(-1) - want / want.sum()).abs().max() < low
        assert torch.equal(out[i], guide(z[i], w[i], g[i]))
    assert torch.equal(guide(z, w, 1), (z if dtype == torch.float64 else z.float()).log_softmax(-1))


def test_contrast_is_the_difference_among_what_min_p_keeps():
    z, w = rows(300, 20, 1), rows(300, 20, 2)
    for alpha in (0.0, 0.1, 1.0, torch.linspace(0, 1, 300)):
        out = contrast(z, w, alpha)
        assert torch.equal(kept(out), kept(min_p(z, alpha)))
        want = z.log_softmax(-1) - w.log_softmax(-1)
        assert torch.equal(out[kept(out)], want[kept(out)])
    both = guide(z, w, 2.5, plausible=0.2)
    assert torch.equal(kept(both), kept(min_p(z, 0.2)))
    assert torch.equal(both[kept(both)], guide(z, w, 2.5)[kept(both)])


def test_an_amateur_at_another_temperature_is_a_temperature():
    z = rows(100, 30, 4)
    for T, g in ((4.0, 2.0), (2.0, 1.5), (0.5, 0.7)):
        found = guide(z, temperature(z, T), g).softmax(-1)
        assert torch.allclose(found, (z * (g - (g - 1) / T)).softmax(-1), atol=1e-12)


@pytest.mark.parametrize("guidance", [0.5, 1.0, 1.5, 3.0])
def test_transformers_does_the_same_arithmetic_on_thousands_of_rows(guidance):
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Theirs

    z, w = rows(4000, 50, 1, torch.float32), rows(4000, 50, 2, torch.float32)

    class Out(SimpleNamespace):
        def get(self, name, default):
            return default

    process = Theirs(guidance, lambda ids, **options: Out(logits=w[:, None]))
    assert torch.equal(process(torch.zeros(4000, 3, dtype=torch.long), z), guide(z, w, guidance))


def test_what_is_removed_stays_removed():
    z, w = torch.tensor([1.0, -INF, 2.0, -INF]), torch.tensor([0.5, 1.0, -INF, -INF])
    assert torch.equal(guide(z, w, 1.0), z.log_softmax(-1))
    assert torch.equal(guide(z, w, 0.0), w.log_softmax(-1).where(kept(min_p(z, 0)), -INF))
    assert kept(guide(z, w, 0.5)).tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="other, row 0: token 2 is removed here"):
        guide(z, w, 1.5)
    with pytest.raises(ValueError, match="other, row 1: token 2 is removed"):
        contrast(torch.stack([w, z]), torch.stack([w, w]))
    z = torch.tensor([1.0, 5.0, -3.0])
    w = torch.tensor([1.0, 1.0, -INF])  # not plausible to the expert: its ratio does not count
    assert kept(contrast(z, w, 0.01)).tolist() == [True, True, False]
    assert kept(guide(z, w, 2.0, plausible=0.01)).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda z: guide(z, z[:, :5]), r"other: shape \(2, 5\), expected \(2, 6\)"),
        (lambda z: guide(z, z, -1), "guidance: -1 is outside"),
        (lambda z: guide(z, z, [1, math.nan]), "guidance, row 1: nan is outside"),
        (lambda z: guide(z, z, [1, 2, 3]), r"guidance: shape \(3,\)"),
        (lambda z: guide(z, z, plausible=2), "m.* 2 is outside"),
        (lambda z: contrast(z, z * math.nan), "logits: row 0 has NaN"),
        (lambda z: contrast([1, 2], z), "is not a float type"),
        (lambda z: Contrasted(WORLD, TableModel([0.5] * 2, [[0.5] * 2] * 2)), "amateur: a vocabu"),
        (lambda z: Prompted(WORLD, [[1], [2]]), "prompt: 2 prompts, expected one"),
        (lambda z: Prompted(WORLD, "tea"), "'tea' is not one of"),
        (lambda z: Prompted(WORLD, [1] * 5), "prompt: 5 tokens leave no room in a context of 5"),
        (lambda z: guided(WORLD, "I", "like", -2), "guidance: -2 is outside"),
        (lambda z: guided(WORLD, "I", "like", plausible=3), "plausible: 3 is outside"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call(rows(2, 6, 1))


# ---------------------------------------------------------------- a model of two


def test_every_row_of_a_model_of_two_is_the_combination():
    ids = torch.tensor([[0, 1, 2], [5, 4, 3]])
    for last_only in (True, False):
        e, a = (m(ids, last_only=last_only).logits for m in (WORLD, FLAT))
        found = TWO(ids, last_only=last_only).logits
        assert torch.equal(found, guide(e, a, 2.0)) and found.ndim == 3 - last_only
    assert TWO.words == WORLD.words and TWO.encode("I like") == [2, 3] and TWO.context == 5


def test_its_texts_follow_its_exact_law(full):
    law = sequence_law(TWO, 2)
    n = 20_000 if full else 1500
    made = generate(TWO, [""] * n, Sampler(seed=4), 2, alternatives=0)
    counts = (torch.stack(made.ids) @ torch.tensor([6, 1])).bincount(minlength=36)
    assert chi_square(counts, [law[a, b] for a in range(6) for b in range(6)]) > 1e-4


def test_searches_prove_and_find_its_best_text():
    best = max(sequence_law(TWO, 3).items(), key=lambda item: item[1])
    proven = exhaustive_search(TWO, "", 3)[0]
    assert tuple(proven.ids) == best[0] and math.isclose(math.exp(proven.logprob), best[1])
    assert list(beam_search(TWO, "", 36, 3)[0].ids) == list(proven.ids)


def test_step_by_step_is_not_the_whole_text():
    e, a = sequence_law(WORLD, 3), sequence_law(FLAT, 3)
    whole = {ids: e[ids] ** 2 / a[ids] for ids in e}
    total, law = sum(whole.values()), sequence_law(TWO, 3)
    assert 0.2 < sum(abs(law[i] - whole[i] / total) for i in e) / 2 < 0.23
    one = sequence_law(TWO, 1)  # of one step they are the same
    ratio = {i: sequence_law(WORLD, 1)[i] ** 2 / sequence_law(FLAT, 1)[i] for i in one}
    assert all(math.isclose(one[i], ratio[i] / sum(ratio.values())) for i in one)


def test_without_a_cache_of_both_there_is_none(gpt):
    assert not hasattr(TWO, "new_cache") and hasattr(Contrasted(gpt, gpt), "new_cache")
    V = gpt.vocab_size
    table = TableModel([1 / V] * V, [[1 / V] * V] * V)
    mixed = Contrasted(gpt, table, partial(guide, guidance=1.5))
    assert not hasattr(mixed, "new_cache") and mixed.context == 40
    assert mixed.start_ids is None  # the two begin differently
    assert len(generate(mixed, "a", max_new_tokens=5, ignore_eos=True).ids) == 5


# ---------------------------------------------------------------- a model with a prompt


def both(gpt):
    "Two prompts before one model."
    return guided(gpt, "abc", "defgh", 2.0)


def test_a_prompt_is_what_stands_before_every_text(gpt):
    for model, prompt in ((WORLD, "I like"), (gpt, "abca"), (gpt, "")):
        told = Prompted(model, prompt)
        new = [1, 2]
        before = told.prompt.tolist()
        for last_only in (True, False):
            want = model(torch.tensor([before + new]), last_only=last_only).logits
            want = want if last_only else want[:, len(before) :]
            found = told(torch.tensor([new]), last_only=last_only).logits
            assert torch.allclose(found, want, atol=1e-6)
        empty = told(torch.zeros(1, 0, dtype=torch.long)).logits
        assert torch.allclose(empty, model(torch.tensor([before])).logits, atol=1e-6)
        room = {WORLD: 5, gpt: 40}[model]
        assert told.context == room - len(before)


def test_padding_goes_before_the_prompt(gpt):
    texts = [[], [3], [4, 5, 6]]
    ids = torch.tensor([[0, 0, 0], [0, 0, 3], [4, 5, 6]])
    mask = torch.tensor([[False] * 3, [False, False, True], [True] * 3])
    for told in (Prompted(gpt, "abc"), Prompted(WORLD, "I")):
        ids = ids.clamp(max=5)
        for cache in (None, told.new_cache(3, 3) if told.model is gpt else None):
            found = told(ids, mask, cache).logits
            for i, text in enumerate(texts):
                alone = told(torch.tensor([text], dtype=torch.long).clamp(max=5)).logits[0]
                assert torch.allclose(found[i], alone, atol=1e-5)


def test_scores_with_a_prompt_are_those_behind_it(gpt):
    texts = ["de", "h", "fgabc"]
    ids = [gpt.encode(t)[1:] for t in texts]
    whole = score(gpt, [gpt.encode("abc") + i for i in ids])
    found = score(Prompted(gpt, "abc"), ids)
    for i, row in enumerate(ids):
        n = len(gpt.encode("abc"))
        assert torch.allclose(found[i, : len(row)], whole[i, n : n + len(row)], atol=1e-5)
    with pytest.raises(ValueError, match="give a larger `chunk`"):
        score(Prompted(gpt, "abc"), ids, chunk=2)
    assert torch.allclose(score(Prompted(gpt, "abc"), ids[2], chunk=2)[0], found[2], atol=1e-5)


def test_rows_are_the_same_alone_and_in_a_batch(gpt):
    prompts = [[], [3], [4, 5, 6]]
    for choose in (Sampler(temperature=0), Sampler(0.8, seed=3, rows=7)):
        together = generate(both(gpt), prompts, choose, 12, ignore_eos=True).ids
        for prompt, ids in zip(prompts, together):
            alone = generate(both(gpt), prompt, choose, 12, ignore_eos=True).ids
            assert torch.equal(alone, ids)


def test_caches_change_nothing(gpt):
    model, slow = both(gpt), both(gpt)
    del slow.new_cache
    for run in (
        lambda m: generate(m, [[3], [4, 5]], Sampler(seed=1), 15).ids,
        lambda m: [h.ids for h in beam_search(m, [3], 4, 8, n_best=4)],
        lambda m: [h.ids for h in beam_search(m, "", 3, 6, n_best=3)],
    ):
        for a, b in zip(run(model), run(slow)):
            assert list(a) == list(b)


def test_a_kept_prompt_is_left_as_it_is(gpt):
    model = both(gpt)
    kept_prompt = PromptCache(model, [3, 4, 5])
    assert isinstance(kept_prompt.memory, PairedCache) and kept_prompt.memory.length == 3
    for prompt in ([3, 4, 5, 6], [3, 4, 5], [3, 7]):
        plain = generate(model, prompt, Sampler(seed=2), 8).ids
        for _ in range(2):
            found = generate(model, prompt, Sampler(seed=2), 8, cache=kept_prompt).ids
            assert torch.equal(found, plain)


def test_guided_by_nothing_is_the_model_behind_its_prompt(gpt):
    want = generate(gpt, "abc", Sampler(temperature=0), 10, ignore_eos=True).ids
    for guidance, away in ((1.0, "defgh"), (3.0, "abc")):
        found = generate(
            guided(gpt, "abc", away, guidance), "", Sampler(temperature=0), 10, ignore_eos=True
        )
        assert torch.equal(found.ids, want)
    told = guided(gpt, "abc").amateur.prompt
    assert told.tolist() == gpt.encode("abc")[-1:]  # as transformers


def test_the_real_model_is_led_away_as_by_hand(smol):
    prompt, away = "A cheerful letter:", "A letter:"
    model = guided(smol, prompt, away, 1.5)
    made = generate(model, "", max_new_tokens=8)
    ids = []
    for _ in range(8):
        e, a = (
            smol(torch.tensor([smol.encode(text) + ids])).logits[0].log_softmax(-1)
            for text in (prompt, away)
        )
        ids.append((a + 1.5 * (e - a)).argmax().item())
    assert made.ids.tolist() == ids and made.text == smol.decode(ids)


def test_transformers_writes_the_same_guided_texts(full, request):
    if not full:
        pytest.skip("loads the model twice: run with --full")
    from decoding_book.huggingface import HuggingFace

    peer, coder = request.getfixturevalue("peer"), SmolLM2(weights="q4")
    ours = HuggingFace(peer)
    for text in ("The old sailor told us", "Two onions and", "In the year 1900"):
        ids = coder.encode(text)
        for away, guidance in ((None, 1.5), (coder.encode("The sea"), 2.0)):
            options = {} if away is None else {"negative_prompt_ids": torch.tensor([away])}
            theirs = peer.generate(
                torch.tensor([ids]),
                max_new_tokens=20,
                do_sample=False,
                guidance_scale=guidance,
                **options,
            )
            made = generate(guided(ours, ids, away, guidance), [], max_new_tokens=20)
            assert made.ids.tolist() == theirs[0, len(ids) :].tolist()


def test_drafts_behind_a_prompt(gpt):
    choose = Sampler(seed=3, temperature=0.7)
    for model in (guided(gpt, "abc", "defgh", 2.0), Prompted(gpt, "abc")):
        for drafter in (None, ModelDrafter(gpt), ModelDrafter(model)):
            found = speculate(model, ["", "ab"], choose, 6, drafter=drafter)
            plain = generate(model, ["", "ab"], choose, 6)
            assert all(a.equal(b) for a, b in zip(found.ids, plain.ids))
        drafted = speculate(gpt, "ab", choose, 6, drafter=ModelDrafter(model))
        assert drafted.ids.equal(generate(gpt, "ab", choose, 6).ids)
    with pytest.raises(ValueError, match="length: 8 is above 5"):
        cache = Prompted(gpt, "abc").new_cache(1, 9)
        Prompted(gpt, "abc")(torch.tensor([[1]]), cache=cache)
        cache.crop(4)


def test_what_combines_is_called():
    with pytest.raises(TypeError, match="combine: 5 is not callable"):
        Contrasted(WORLD, FLAT, 5)
