"The loop: prompts, stop rules, batches, streaming, scores, interrupts and bad input."

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from decoding_book.loop import (
    Draw,
    Generation,
    LanguageModel,
    Prediction,
    PromptCache,
    generate,
    greedy,
    new_text,
    score,
    stream,
    token_texts,
    windows,
)
from decoding_book.toy import TableModel, six_words
from decoding_book.transformer import GPT, GPTConfig

WORLD = six_words()


def random_world(V, seed, eos=None):
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(V + 1, V, generator=g, dtype=torch.float64) ** 3
    rows /= rows.sum(1, keepdim=True)
    return TableModel(rows[0], rows[1:], eos=eos)


class Cached:
    """A Markov model that insists on its cache: it fails unless it is fed each position exactly
    once."""

    def __init__(self, table):
        self.table, self.vocab_size, self.eos, self.calls = table, len(table), 0, []
        self.context = 64

    def new_cache(self, rows, length):
        cache = SimpleNamespace(ids=torch.zeros(rows, 0, dtype=torch.long), room=length, length=0)

        def keep(rows):
            cache.ids = cache.ids[rows]

        cache.keep = keep
        return cache

    def __call__(self, ids, mask=None, cache=None, last_only=True, attention=False):
        self.calls.append(tuple(ids.shape))
        if cache is not None:
            cache.ids = torch.cat([cache.ids, ids], 1)
            cache.length = cache.ids.shape[1]
            assert cache.length <= cache.room
        logits = self.table[ids]
        return Prediction(logits[:, -1] if last_only else logits, cache)


def cached(V=7, seed=0):
    return Cached(torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))


def test_every_form_of_prompt_gives_the_same_text():
    ids = WORLD.encode("I like")
    texts = [
        generate(WORLD, p).text
        for p in (
            "I like",
            ids,
            tuple(ids),
            torch.tensor(ids),
            np.array(ids),
            torch.tensor(ids, dtype=torch.int32),
        )
    ]
    assert texts == [" cold coffee"] * 6
    for batch in (["I like"], [ids], torch.tensor([ids]), np.array([ids]), [torch.tensor(ids)]):
        assert generate(WORLD, batch).text == [" cold coffee"]


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_batch_equal_rows_alone(seed):
    rng = random.Random(seed)
    model = random_world(6, seed, eos=rng.choice([None, 0, 5]))
    prompts = [
        [rng.randrange(6) for _ in range(rng.randrange(0, 6))] for _ in range(rng.randrange(1, 9))
    ]
    batch = generate(model, prompts, max_new_tokens=9)
    for row, prompt in zip(batch, prompts):
        alone = generate(model, prompt, max_new_tokens=9)
        assert alone.ids.tolist() == row.ids.tolist() and alone.reason == row.reason
        assert torch.equal(alone.logprobs, row.logprobs) and alone.text == row.text


def test_a_row_that_ended_leaves_the_models_batch():
    model = cached()
    model.table[1], model.table[2] = (
        torch.tensor([9.0] + [0.0] * 6),
        torch.tensor([0.0, 0, 0, 9, 0, 0, 0]),
    )
    model.table[3] = torch.tensor([0.0, 0, 9, 0, 0, 0, 0])
    out = generate(model, [[1], [2], [2, 2]], max_new_tokens=3)
    assert out.reason == ["eos", "length", "length"]
    assert model.calls == [(3, 2), (2, 1), (2, 1)]  # the whole prompt, then only the newest ids


def test_a_cache_changes_nothing(monkeypatch):
    model = cached()
    plain = cached()
    monkeypatch.delattr(Cached, "new_cache")
    without = generate(plain, [[1], [2, 3, 4]], max_new_tokens=12)
    monkeypatch.undo()
    with_ = generate(model, [[1], [2, 3, 4]], max_new_tokens=12)
    assert [a.tolist() for a in with_.ids] == [a.tolist() for a in without.ids]


def test_a_kept_prompt_is_refused_by_name():
    model = cached()
    for bad in (WORLD, model):  # no cache; a cache that cannot be shared
        with pytest.raises(ValueError, match="has no cache with `copy`, so nothing can be kept"):
            PromptCache(bad, [1, 2])
    with pytest.raises(ValueError, match="prompt: 2 rows, a cache keeps one"):
        PromptCache(model, [[1], [2]])
    for call in (generate, stream):
        with pytest.raises(TypeError, match="cache: 7 is not a PromptCache"):
            call(model, [1], cache=7)


def test_end_mark_is_kept_in_ids_and_not_in_text():
    out = generate(WORLD, "")
    assert (
        out.ids.tolist() == WORLD.encode("I like cold coffee stop")
        and out.text == "I like cold coffee"
    )
    assert out.reason == "eos"
    on = generate(WORLD, "", ignore_eos=True)
    assert on.reason == "length" or on.reason == "context"


def test_stop_ids_and_limits():
    assert generate(WORLD, "", stop=WORLD.encode("cold")).text == "I like"
    assert generate(WORLD, "", stop=WORLD.encode("cold")).reason == "stop"
    short = generate(WORLD, "", max_new_tokens=2)
    assert (short.text, short.reason) == ("I like", "length")
    assert generate(six_words(eos=None), "").reason == "context"


class Letters:
    "Spells a fixed text in chunks; decode works on bytes, so a chunk may hold part of a character."

    eos = None

    def __init__(self, chunks):
        self.chunks, self.vocab_size = chunks, len(chunks) + 1

    def __call__(self, ids, mask=None, cache=None, last_only=True, attention=False):
        nxt = (ids[:, -1] + 1).clamp(max=len(self.chunks))
        return Prediction(torch.nn.functional.one_hot(nxt, self.vocab_size).float())

    def encode(self, text):
        return [0]

    def decode(self, ids):
        return b"".join(self.chunks[i - 1] for i in map(int, ids) if i).decode(errors="replace")


@pytest.mark.parametrize("seed", range(60))
def test_streamed_pieces_are_the_text_and_nothing_is_taken_back(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice(["ab", "é", "\U0001f600", "a", "ba ", "½"]) for _ in range(8))
    data, chunks = text.encode(), []
    while data:
        n = rng.randrange(1, 4)
        chunks.append(data[:n])
        data = data[n:]
    a = rng.randrange(len(text))
    b = rng.randrange(a + 1, len(text) + 1)
    stop = rng.choice([None, text[a:b], ["zz", text[a:b]]])
    model = Letters(chunks)
    seen, steps = "", list(stream(model, [0], max_new_tokens=len(chunks), stop=stop))
    for step in steps:
        seen += step.text[0]
        assert text.startswith(seen)
    assert seen == (text if stop is None else text[: text.find(text[a:b])])
    assert steps[-1].ended == (["length"] if stop is None else ["stop"])


def test_half_a_character_at_a_cut_is_held_and_at_an_end_mark_is_text():
    model = Letters(["a".encode(), "é".encode()[:1]])
    assert generate(model, [0], max_new_tokens=2).text == "a"
    model = Letters(["a".encode(), "é".encode()[:1], b""])
    model.eos = 3
    assert generate(model, [0], max_new_tokens=3).text == "a\ufffd"


class Bytes(Letters):
    "Letters that can be given as text: one token a chunk of bytes, found among the chunks."

    def encode(self, text):
        found, data = [], text.encode()
        while data:
            id = next((i for i, c in enumerate(self.chunks, 1) if data.startswith(c)), None)
            if id is None:
                raise ValueError(f"text: {text!r}")
            found.append(id)
            data = data[len(self.chunks[id - 1]) :]
        return found


@pytest.mark.parametrize("seed", range(60))
def test_prompt_and_new_text_are_the_whole_wherever_the_text_is_cut(seed):
    rng = random.Random(seed)
    text = (
        "".join(rng.choice(["é", "\U0001f336", "a", " ", "\ufffd", "龘"]) for _ in range(6)) + "z"
    )
    data, chunks = text.encode(), []
    while data:
        n = rng.randrange(1, 4)
        chunks.append(data[:n])
        data = data[n:]
    for model in (Letters(chunks), Bytes(chunks)):
        for at in range(1, len(chunks) + 1):
            for again in range(at, len(chunks) + 1):
                # three calls: each is given what those before it left, and is cut in its turn
                parts, begin = [], 0
                for end in {at: None, again: None, len(chunks): None}:
                    if end == begin:
                        continue
                    g = generate(model, list(range(begin + 1)), max_new_tokens=end - begin)
                    assert "".join(s.text[0] for s in g.steps) == g.text
                    prompt, pieces = token_texts(model.decode, g.prompt_ids, g.ids)
                    assert prompt + "".join(pieces) == model.decode(range(end + 1))
                    parts.append(g.text)
                    begin = end
                assert "".join(parts) == text


def test_a_replacement_sign_that_was_meant_is_text_at_once():
    model = Bytes([b"a", "\ufffd".encode(), b"b"])
    assert generate(model, [0], max_new_tokens=2).text == "a\ufffd"
    assert generate(model, [0, 1, 2], max_new_tokens=1).text == "b"  # it is the prompt's, not ours
    spelled = Bytes([bytes([b]) for b in "a\ufffd!".encode()])  # in three tokens
    assert generate(spelled, [0], max_new_tokens=4).text == "a\ufffd"
    assert [s.text for s in stream(spelled, [0], max_new_tokens=4)] == [
        ["a"],
        [""],
        [""],
        ["\ufffd"],
    ]


@pytest.mark.parametrize("cls", [Letters, Bytes])
def test_a_stop_at_the_replacement_sign_waits_for_whole_characters(cls):
    pepper = "\U0001f336".encode()
    for cut in (1, 2, 3):
        g = generate(cls([pepper[:cut], pepper[cut:], b"a"]), [0], max_new_tokens=3, stop="\ufffd")
        assert (g.text, g.reason) == ("\U0001f336a", "length")
        broken = generate(cls([b"a", pepper[:cut], b"b"]), [0], max_new_tokens=3, stop="\ufffd")
        assert (broken.text, broken.reason) == ("a", "stop")  # no character will come of it
    g = generate(cls([b"a", "\ufffd".encode(), b"b"]), [0], max_new_tokens=3, stop="\ufffd")
    assert (g.text, g.reason, len(g.ids)) == ("a", "stop", 2 if cls is Bytes else 3)


def test_a_hypothesis_has_the_text_after_its_prompt():
    from decoding_book.exhaustive import Hypothesis

    model = Letters([b"x", "é".encode()[:1], "é".encode()[1:], b"y", b""])

    def text(prompt, ids, finished):
        return Hypothesis(
            torch.tensor(ids),
            torch.zeros(len(ids)),
            0.0,
            0.0,
            finished,
            torch.tensor(prompt),
            model,
        ).text

    assert text([0, 1, 2], [3, 4], False) == "éy" and text([0, 1], [2], False) == ""
    assert text([0, 1], [2, 5], True) == "\ufffd"  # nothing will follow the end mark
    assert new_text(model.decode, [0, 1, 2], [3, 4]) == "éy"


def test_rows_of_a_batch_have_the_text_after_their_own_prompt():
    model = Letters([b"x", "é".encode()[:1], "é".encode()[1:], b"y"])
    g = generate(model, [[0, 1], [0, 1, 2], [0]], max_new_tokens=2)
    assert g.text == ["é", "éy", "x"]
    assert [r.plain_data()["prompt"] for r in g] == ["x", "x", ""]


def test_an_interrupted_row_has_the_text_after_its_prompt():
    def impatient(prediction, context):
        if (context.lengths - context.prompt_lengths)[0] == 2:
            raise KeyboardInterrupt
        return greedy(prediction)

    model = Letters([b"x", "é".encode()[:1], "é".encode()[1:], b"yz", b"z"])
    assert generate(model, [0, 1, 2], impatient, stop="yzz").text == "éyz"
    assert generate(model, [0], impatient).text == "x"  # half a character is held
    assert generate(WORLD, "I like", impatient).text == " cold coffee"


def test_logprobs_and_alternatives_are_the_models_own():
    step = next(iter(stream(WORLD, "", alternatives=3)))
    assert step.top_ids.tolist() == [WORLD.encode("I cold coffee")]
    assert torch.allclose(
        step.top_logprobs.exp(), torch.tensor([[0.5, 0.25, 0.1]], dtype=torch.float64)
    )

    def second(p, c):
        return Draw(p.logits.topk(2).indices[:, 1])

    assert generate(WORLD, "", second).logprobs[0].exp().item() == pytest.approx(0.25)


def test_score_equals_the_loop_and_marks_what_has_no_probability():
    g = generate(WORLD, ["", "cold coffee"])
    whole = [torch.cat([p, i]) for p, i in zip(g.prompt_ids, g.ids)]
    s = score(WORLD, whole)
    assert s.shape == (2, 5) and not s.isnan().any()
    assert torch.allclose(s[0], g.logprobs[0].double()) and torch.allclose(
        s[1, 2:], g.logprobs[1].double()
    )
    s = score(WORLD, ["I", "I like cold"])
    assert s[0].isnan().tolist() == [False, True, True]
    assert score(cached(), [[1, 2, 3], [4]]).isnan().tolist() == [
        [True, False, False],
        [True, True, True],
    ]


def test_score_in_chunks_equals_score_at_once():
    model, ids = cached(), [[1, 2, 3, 4, 5, 6, 1, 2, 3], [3, 2, 1]]
    assert torch.allclose(score(model, ids, chunk=2), score(model, ids), equal_nan=True)
    assert max(c[1] for c in model.calls[:4]) == 2


def test_interrupt_keeps_what_there_is():
    def stops(prediction, context):
        if context.lengths[0] == 3:
            raise KeyboardInterrupt
        return greedy(prediction)

    g = generate(WORLD, ["", "I"], stops)
    assert g.text == ["I like cold", " like cold coffee"] and g.reason == ["interrupted"] * 2
    assert isinstance(g, Generation) and "interrupted" in repr(g)


def test_a_broken_model_is_named_and_the_text_survives():
    for value, word in ((float("nan"), "NaN"), (float("inf"), r"\+inf")):

        class Broken(TableModel):
            def _after(self, prefix):
                z = super()._after(prefix).clone()
                if prefix.shape[1] == 2:
                    z[-1, 3] = value
                return z

        model = Broken(torch.ones(4).double() / 4, torch.full((4, 4), 0.25).double())
        with pytest.raises(ValueError, match=f"logits: row 1 at position 2 has {word}") as e:
            generate(model, [[0], [0]])
        assert [i.tolist() for i in e.value.generation.ids] == [[0], [0]]
    dead = type(
        "Dead",
        (),
        dict(
            vocab_size=2,
            eos=None,
            __call__=lambda s, ids, **k: Prediction(torch.full((len(ids), 2), -torch.inf)),
        ),
    )()
    with pytest.raises(ValueError, match="no finite logit"):
        generate(dead, [0])


def test_a_model_or_chooser_of_the_wrong_shape_is_named():
    wrong = type(
        "Wrong",
        (),
        dict(vocab_size=9, eos=None, __call__=lambda s, ids, **k: Prediction(torch.zeros(2, 5))),
    )()
    with pytest.raises(
        ValueError, match=r"model: returned logits of shape \(2, 5\), expected \(1, 9\)"
    ):
        generate(wrong, [0])
    with pytest.raises(ValueError, match=r"choose: returned ids \[6\]"):
        generate(WORLD, "", lambda p, c: Draw(torch.tensor([6])))


BAD = [
    (dict(prompt=[]), ValueError, "prompt: .* is empty"),
    (dict(prompt=[[1], []]), ValueError, "prompt, row 1: .* is empty"),
    (dict(prompt=[1, 7]), ValueError, "id 7 at index 1 is outside the vocabulary 0..6"),
    (dict(prompt=[-1]), ValueError, "id -1 at index 0"),
    (dict(prompt=torch.tensor([[1, 2], [9, 1]])), ValueError, "row 1: id 9 at index 0"),
    (dict(prompt=[0.5]), TypeError, "integer ids"),
    (dict(prompt=torch.tensor([True])), TypeError, "integer ids"),
    (dict(prompt=[[1], 2]), TypeError, "row 1: 2 is not a sequence of integer ids"),
    (dict(prompt=None), TypeError, "prompt: None"),
    (dict(prompt=3), TypeError, "prompt: 3"),
    (dict(prompt={"a": 1}), TypeError, "prompt"),
    (dict(prompt=torch.zeros(0, 3, dtype=torch.long)), ValueError, "holds no row"),
    (dict(prompt="text"), TypeError, "no tokenizer"),
    (dict(prompt=[1] * 64), ValueError, "64 tokens leave no room in a context of 64"),
    (dict(max_new_tokens=0), ValueError, "max_new_tokens: 0"),
    (dict(max_new_tokens=-3), ValueError, "max_new_tokens: -3"),
    (dict(max_new_tokens=1.5), TypeError, "max_new_tokens: 1.5"),
    (dict(max_new_tokens=True), TypeError, "max_new_tokens: True"),
    (dict(alternatives=-1), ValueError, "alternatives: -1"),
    (dict(stop=""), ValueError, "stop: ''"),
    (dict(stop=[3, ""]), ValueError, "stop: ''"),
    (dict(stop="x"), TypeError, "stop: 'x' is text, and the model has no tokenizer"),
    (dict(stop=7), ValueError, "stop: id 7"),
    (dict(stop=1.5), TypeError, "stop: 1.5"),
]


@pytest.mark.parametrize("args, error, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named_before_the_model_runs(args, error, message):
    model = cached()
    with pytest.raises(error, match=message):
        stream(model, **dict(prompt=[1]) | args)
    assert not model.calls


def test_protocol_and_row_numbers():
    assert isinstance(WORLD, LanguageModel)
    seen = []

    def watch(prediction, context):
        seen.append(
            (context.row.tolist(), context.lengths.tolist(), context.prompt_lengths.tolist())
        )
        return greedy(prediction)

    generate(WORLD, ["cold coffee I like", "I"], watch)
    assert seen[0] == ([0, 1], [4, 1], [4, 1]) and seen[-1][0] == [1]  # the first row ended before


def test_a_chooser_that_writes_into_the_logits_spoils_nothing():
    def ban_i(prediction, context):
        prediction.logits[:, 2] = -torch.inf
        return greedy(prediction)

    world = six_words()
    banned = generate(world, ["", ""], ban_i, max_new_tokens=1)
    assert banned.text == ["cold", "cold"] and banned[0].logprobs.exp().item() == pytest.approx(
        0.25
    )
    assert banned.steps[0].top_ids[0, 0].item() == 2  # the model's own favourite
    assert generate(world, "").text == "I like cold coffee"  # and the world is as it was


def test_a_choosers_buffer_may_be_used_again():
    buffer = torch.zeros(1, dtype=torch.long)

    def choose(prediction, context):
        buffer[:] = prediction.logits.argmax(-1)
        return Draw(buffer)

    prompt = torch.tensor(WORLD.encode("I"))
    g = generate(WORLD, prompt, choose)
    prompt[:] = 0
    assert g.ids.tolist() == WORLD.encode("like cold coffee stop") and g.prompt_ids.tolist() == [2]


def test_alternatives_keep_the_tie_rule():
    flat = TableModel([0.02] * 50, torch.full((50, 50), 0.02))
    assert generate(flat, "", max_new_tokens=1).steps[0].top_ids.tolist() == [[0, 1, 2, 3, 4]]


def test_text_held_back_is_there_after_an_interrupt_and_an_error():
    for error in (KeyboardInterrupt, RuntimeError):

        def stops(prediction, context):
            if context.ids.shape[1] == 3:
                raise error
            return greedy(prediction)

        try:
            g = generate(WORLD, "", stops, stop="cold water")
        except RuntimeError as e:
            g = e.generation
        assert g.text == "I like cold" and len(g.ids) == 3


@pytest.mark.parametrize("lift", [1e4, 1e6])
def test_log_probabilities_keep_their_digits_at_any_level(lift):
    model, raised = cached(), cached()
    raised.table = model.table.round(decimals=0) + lift
    model.table = raised.table - lift
    for a, b in (
        (generate(model, [1]).logprobs, generate(raised, [1]).logprobs),
        (score(model, [1, 2, 3]), score(raised, [1, 2, 3])),
    ):
        assert torch.allclose(a, b, atol=1e-6, equal_nan=True)


def test_short_scores_shapes_and_bad_chunks():
    assert score(WORLD, "").shape == (1, 0) and score(cached(), [[1], [2]]).isnan().all()
    wrong = type(
        "Wrong",
        (),
        dict(
            vocab_size=9,
            eos=None,
            __call__=lambda s, ids, **k: Prediction(torch.zeros(*ids.shape, 5)),
        ),
    )()
    with pytest.raises(ValueError, match="model: returned logits of shape"):
        score(wrong, [1, 2, 3])
    with pytest.raises(ValueError, match="chunk: 0"):
        score(cached(), [1, 2], chunk=0)


def test_what_is_no_draw_is_named():
    for bad in (
        None,
        torch.tensor([1]),
        Draw([1]),
        Draw(torch.tensor([1.0])),
        Draw(torch.tensor([True])),
    ):
        with pytest.raises(TypeError, match="choose: returned"):
            generate(WORLD, "", lambda p, c: bad)
    with pytest.raises(TypeError, match="choose: None"):
        generate(WORLD, "", None)


def test_more_end_marks_and_awkward_arrays():
    model = cached()
    model.end_ids = [int(model.table[1].argmax())]
    assert len(generate(model, [1]).ids) == 1
    assert generate(WORLD, np.array([3, 2])[::-1]).text == generate(WORLD, "I like").text
    for bad in (np.int64(3), np.array(3), torch.tensor(3), np.array([1 + 5j])):
        with pytest.raises(TypeError, match="prompt"):
            generate(WORLD, bad)


def test_rows_and_slices():
    g = generate(WORLD, ["", "I", "cold"])
    assert [r.text for r in g[1:]] == g.text[1:] and g[-1].text == g.text[2] and g == g
    assert g[0].logprobs.dtype == torch.float64


def test_a_character_over_several_tokens_is_shown():
    bird = "\U0001f99c"
    model = Letters([bird.encode()[:2], bird.encode()[2:], b" a"])
    assert "".join(token_texts(model.decode, [], [1, 2, 3])[1]).endswith(f"{bird} a")


WORDS = ["a", "b", "c", "d", "stop"]


class Cache:
    "Remembers all ids, and which rows are left."

    def __init__(self, rows):
        self.ids, self.length = torch.zeros(rows, 0, dtype=torch.long), 0

    def keep(self, rows):
        self.ids = self.ids[rows]


class Counter:
    "Each row counts up from its own first word, told apart by what its cache remembers."

    vocab_size, eos = len(WORDS), 4
    shift = 0.0  # added to all logits: changes no probability

    def new_cache(self, rows, length):
        return Cache(rows)

    def __call__(self, ids, mask=None, cache=None, last_only=True, attention=False):
        cache.ids = torch.cat([cache.ids, ids], 1)
        cache.length = cache.ids.shape[1]
        steps = cache.ids[:, 0] + cache.length  # depends on the first word: a wrong row shows
        logits = torch.zeros(len(ids), self.vocab_size).scatter(1, steps.clamp(max=4)[:, None], 3.0)
        return Prediction(logits + self.shift)

    def encode(self, text):
        return [WORDS.index(w) for w in text]

    def decode(self, ids):
        return "".join(WORDS[i] for i in ids)


def test_the_cache_keeps_the_rows_that_go_on():
    model = Counter()
    prompts = [[3], [0], [2]]  # the first ends first, the last but one goes on
    together = generate(model, prompts, max_new_tokens=6)
    for ids, prompt in zip(together.ids, prompts):
        assert ids.tolist() == generate(model, prompt, max_new_tokens=6).ids.tolist()
    assert [len(ids) for ids in together.ids] == [1, 4, 2]


def test_log_probabilities_do_not_depend_on_the_level_of_the_logits():
    plain, lifted = Counter(), Counter()
    lifted.shift = 7.0
    a, b = (generate(m, [0], max_new_tokens=3) for m in (plain, lifted))
    expected = torch.tensor([3.0, 0, 0, 0, 0]).log_softmax(-1)[0].expand(3)
    torch.testing.assert_close(torch.as_tensor(a.logprobs), expected)
    torch.testing.assert_close(torch.as_tensor(b.logprobs), expected)
    torch.testing.assert_close(a.steps[0].top_logprobs, b.steps[0].top_logprobs)


class Chunky(Counter):
    "A token may hold several letters, so several stop strings may arrive at once."

    def decode(self, ids):
        return "".join({1: "xyz", 2: "uvw"}.get(i, WORDS[i]) for i in ids)


def test_text_is_cut_at_the_first_of_several_stop_strings_in_one_token():
    for stop in (["y", "z"], ["z", "y"]):
        out = generate(Chunky(), [0], max_new_tokens=3, stop=stop)
        assert (out.text, out.reason) == ("x", "stop")


# What stays of a stop string; a limit of time


@pytest.mark.parametrize("seed", range(8))
def test_a_stop_string_that_is_kept_ends_the_text_in_one_piece_and_in_many(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("aab€🙂") for _ in range(12))
    letters = Letters([letter.encode() for letter in text])
    halves = Letters([bytes([b]) for b in text.encode()])
    for _ in range(10):
        a, b = sorted(rng.sample(range(len(text) + 1), 2))
        stops = rng.choice([[text[a:b], "zz"], [text[a:b], text[a]]])
        at, n = min((text.find(s), len(s)) for s in stops if s in text)
        for model in (letters, halves):
            out = generate(model, "", stop=stops, include_stop=True)
            cut = generate(model, "", stop=stops)
            assert (out.reason, out.text) == ("stop", text[: at + n])
            assert (cut.reason, cut.text) == ("stop", text[:at])
            assert "".join(step.text[0] for step in out.steps) == out.text


def test_time_ends_all_rows_with_the_step_that_is_late(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("decoding_book.loop.monotonic", lambda: next(clock))
    steps = list(stream(WORLD, ["", "I"], max_time=3, ignore_eos=True))
    assert [s.ended for s in steps] == [[None, None], [None, None], ["time", "time"]]
    assert steps[-1].text == [" cold", " coffee"]
    for n in (1, 2):  # the limit of length is named if both are reached, and an end mark before it
        out = list(stream(WORLD, "", max_time=0, max_new_tokens=n))[-1]
        assert out.ended == ["length" if n == 1 else "time"]
    monkeypatch.undo()
    assert generate(WORLD, ["", "I"], max_time=0).reason == ["time", "time"]


@pytest.mark.parametrize(
    "bad, error, what",
    [
        (dict(max_time=-1), ValueError, "max_time: -1 is outside"),
        (dict(max_time=float("nan")), ValueError, "max_time: nan is outside"),
        (dict(max_time="2"), TypeError, "max_time: '2' is not a number"),
        (dict(include_stop="yes"), ValueError, "include_stop: 'yes' is not one of False, True"),
    ],
)
def test_limits_that_are_none_are_refused(bad, error, what):
    for call in (generate, stream):
        with pytest.raises(error, match=what):
            call(WORLD, "I", **bad)


# Long texts by windows


class Narrow:
    "Looks at the last three ids, and refuses more than its context."

    vocab_size, eos, context = 9, None, 8
    table = torch.randn(97, 9, generator=torch.Generator().manual_seed(1))

    def __call__(self, ids, mask=None, cache=None, last_only=True, attention=False):
        assert ids.shape[1] <= self.context
        past = torch.nn.functional.pad(ids + 1, (2, 0)).unfold(1, 3, 1)
        logits = self.table[(past * torch.tensor([13, 5, 1])).sum(-1) % 97]
        return Prediction(logits[:, -1] if last_only else logits)


class Wide(Narrow):
    context = 100


@pytest.mark.parametrize("stride", range(1, 8))
def test_windows_score_each_token_once_with_at_least_so_many_before_it(stride):
    rng = random.Random(stride)
    for length in range(1, 30):
        spans = list(windows(length, 8, stride))
        own = [i for a, b, c in spans for i in range(c, b)]
        assert own == list(range(length))
        assert all(b - a <= 8 and (c - a >= 8 - stride or a == 0) for a, b, c in spans)
        assert all(c < b for a, b, c in spans)  # no window for nothing
    rows = [[rng.randrange(9) for _ in range(n)] for n in (25, 3, 8, 9)]
    got, alone = score(Narrow(), rows, stride=stride), [score(Wide(), row)[0] for row in rows]
    want = torch.nn.utils.rnn.pad_sequence(alone, True, torch.nan)
    assert torch.equal(got.isnan(), want.isnan())
    if stride <= 5:  # then the three ids before it are in its window
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
    single = [score(Narrow(), row, stride=stride)[0] for row in rows]
    for row, one in zip(got, single):
        assert torch.equal(row[: len(one)].nan_to_num(), one.nan_to_num())


def test_windows_follow_the_definition_with_a_real_context():
    rng = torch.Generator().manual_seed(0)
    gpt = GPT(GPTConfig("abcdef", context=12, width=16, heads=2)).requires_grad_(False)
    text = torch.randint(2, 8, (30,), generator=rng)
    got = score(gpt, text, stride=5)[0]
    for t in range(1, 30):
        a = 0 if t < 12 else -(-(t - 11) // 5) * 5
        want = gpt(text[None, a:t]).logits.log_softmax(-1)[0, text[t]]
        torch.testing.assert_close(got[t], want, atol=1e-5, rtol=1e-5)


class NoEnd(Narrow):
    context = None


def test_strides_that_make_no_sense_are_refused():
    for bad, what in ((8, "stride: 8 is above 7, the context less one"), (0, "stride: 0 is below")):
        with pytest.raises(ValueError, match=what):
            score(Narrow(), [1] * 20, stride=bad)
    with pytest.raises(ValueError, match="row 1: 10 tokens are too many .* 8: give a `stride`"):
        score(Narrow(), [[1] * 9, [1] * 10])
    with pytest.raises(ValueError, match="stride: 3, but this model's context has no end"):
        score(NoEnd(), [1] * 20, stride=3)
