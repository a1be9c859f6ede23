"""Results are values: pickled, copied deeply or saved by torch they go without their model and show
themselves as before."""

import copy
import io
import pickle
import threading

import pytest
import torch

from decoding_book.beam import beam_search
from decoding_book.distinct import diverse_beam_search, stochastic_beam_search
from decoding_book.entropix import BranchView, EntropixConfig, EntropySampler
from decoding_book.entropy import follow
from decoding_book.exhaustive import best_first_search, exhaustive_search
from decoding_book.greedy import greedy_search
from decoding_book.loop import Generation, KnownTexts, Prediction, generate, stream
from decoding_book.sampler import Sampler
from decoding_book.toy import six_words

WORLD = six_words()
BOOK = six_words()
BOOK.lock = threading.Lock()  # a model that nothing can pickle


def by_torch(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "torch.save": by_torch,
    **{f"pickle {p}": lambda x, p=p: pickle.loads(pickle.dumps(x, protocol=p)) for p in range(6)},
}


class Ids:
    "A model without a tokenizer."

    vocab_size, eos, lock = 6, 5, threading.Lock()

    def __call__(self, ids, mask=None, **options):
        return Prediction(torch.eye(6)[(ids[:, -1] + 1) % 6])


class Bytes:
    """A tokenizer whose tokens are bytes, so that one id may be half a character; start and end of
    a text are cut."""

    vocab_size, eos, lock = 256, 0, threading.Lock()

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace").lstrip(" ")

    def __call__(self, ids, mask=None, **options):
        text = " né 你好 à\0".encode()
        return Prediction(
            torch.stack(
                [
                    torch.eye(256)[text[int(m.sum()) % len(text)]]
                    for m in (torch.ones_like(ids) if mask is None else mask)
                ]
            )
            * 9
        )


def interrupted():
    def stop(prediction, context):
        if len(context.ids[0]) > 3:
            raise KeyboardInterrupt
        return Sampler()(prediction, context)

    return generate(BOOK, ["I", "cold"], stop)


unsure = EntropySampler(
    EntropixConfig(low_ent_thresh=0, high_ent_thresh=0, low_vent_thresh=99, high_vent_thresh=99),
    clarify="I like",
    tokenizer=WORLD,
    attention=False,
)
RESULTS = {
    "generation": lambda: generate(BOOK, "I like"),
    "batch": lambda: generate(BOOK, ["I", "cold coffee", "water"], Sampler(seed=4)),
    "row": lambda: generate(BOOK, ["I", "cold coffee", "water"], Sampler(seed=4))[1],
    "stopped": lambda: generate(BOOK, "I", stop=["d c"]),
    "interrupted": interrupted,
    "nothing": lambda: Generation(BOOK, [torch.tensor([1])], True),
    "ids": lambda: generate(Ids(), [[0, 1], [2]]),
    "bytes": lambda: generate(Bytes(), ["n", "é"], alternatives=2),
    "decisions": lambda: generate(BOOK, ["I", "water"], unsure),
    "greedy": lambda: greedy_search(BOOK, "I", 3),
    "greedy batch": lambda: greedy_search(BOOK, ["I", "cold"], 3),
    "exhaustive": lambda: exhaustive_search(BOOK, "I", 3),
    "exhaustive batch": lambda: exhaustive_search(BOOK, ["I", "water"], 2),
    "best first": lambda: best_first_search(BOOK, "I", 3, n_best=4),
    "beam": lambda: beam_search(BOOK, "", 3, 5, n_best=2),
    "beam batch": lambda: beam_search(BOOK, ["I", "cold"], 2, 3, length_penalty=1),
    "beam as huggingface": lambda: beam_search(BOOK, "", 2, 5, dialect="huggingface", n_best=2),
    "one of a beam": lambda: beam_search(BOOK, "", 3, 5)[0],
    "different texts": lambda: stochastic_beam_search(BOOK, "", 3, 4, seed=1),
    "different texts, batch": lambda: stochastic_beam_search(BOOK, ["I", "cold"], 2, 3, stop="I"),
    "beams in groups": lambda: diverse_beam_search(BOOK, "", 4, 2, 4),
    "branches": lambda: BranchView(generate(BOOK, ["I", "water"], unsure)),
    "step": lambda: list(stream(BOOK, ["I", "cold coffee I"], Sampler(seed=3)))[1],
    "trace": lambda: Sampler(top_k=2).trace(torch.randn(6), words=WORLD.words),
    "track": lambda: follow(BOOK, ["I like", "cold coffee I"], attention=False),
}


def plain(x):
    "All that a result holds, but for its model, as plain data that can be compared."
    if torch.is_tensor(x):
        return x.dtype, str(x.tolist())  # nan equals nan
    if isinstance(x, KnownTexts) or x is BOOK:
        return "model"
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x] + [plain(getattr(x, "__dict__", None))]
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items() if k != "model"}
    own = {n: getattr(x, n) for n in getattr(type(x), "__slots__", ())} | getattr(x, "__dict__", {})
    return (type(x).__name__, plain(own)) if own else repr(x)


def looks(x):
    "Every way in which a result shows itself."
    names = (
        "text",
        "ids",
        "logprobs",
        "reason",
        "prompt_ids",
        "logprob",
        "score",
        "finished",
        "rows",
        "bound",
        "proven",
    )
    return [
        repr(x) if type(x).__repr__ is not object.__repr__ else "",
        getattr(x, "_repr_html_", str)(),
        plain({n: getattr(x, n) for n in names if hasattr(x, n)}),
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_survives_without_its_model(name, way):
    result = RESULTS[name]()
    saved = WAYS[way](result)
    assert type(saved) is type(result) and plain(saved) == plain(result)
    if name not in ("step", "track"):
        assert looks(saved) == looks(result)
    again = WAYS[way](saved)  # and once more, with the model long gone
    assert plain(again) == plain(result) and (
        name in ("step", "track") or looks(again) == looks(result)
    )
    if isinstance(result, list) or name in ("batch", "ids", "bytes", "decisions"):
        assert [looks(row) for row in saved] == [looks(row) for row in result]
    if hasattr(result, "model"):
        assert result.model is not saved.model


def test_a_shallow_copy_keeps_the_model():
    for name in ("generation", "row", "greedy", "beam"):
        result = RESULTS[name]()
        same = copy.copy(result)
        assert same.model is result.model is BOOK and looks(same) == looks(result)


def test_what_was_not_asked_before_is_named():
    saved = pickle.loads(pickle.dumps(generate(BOOK, "I like")))
    with pytest.raises(
        LookupError, match=r"\(1, 2, 3\) was not asked for before the result was saved"
    ):
        saved.model.decode([1, 2, 3])
    assert pickle.loads(pickle.dumps(generate(Ids(), [0]))).model is None


def test_a_long_text_costs_its_length_and_not_its_square():
    texts, model = {}, Bytes()
    for n in (250, 500, 1000):
        notes = KnownTexts(model)
        for k in range(n):
            notes.decode(list(range(97, 123)) * 40 + [98] * k)
        saved = pickle.dumps(notes)
        assert pickle.loads(saved).texts == notes.texts
        texts[n] = len(saved)
    assert texts[1000] < 2.2 * texts[500] < 4.4 * texts[250]


def test_steps_hold_what_they_show_and_no_more():
    "No tensor of a step, or of a row taken from it, is a view of something larger."
    result = generate(
        BOOK, ["I", "cold coffee", "water"] * 20, Sampler(temperature=0.9, top_k=3, top_p=0.9)
    )
    for g in (result, result[7], generate(BOOK, ["I", "water"], unsure)[1]):
        for step in g.steps:
            for part in (step, step.draw):
                for x in vars(part).values():
                    if torch.is_tensor(x):
                        assert x.untyped_storage().nbytes() == x.nbytes
    assert len(pickle.dumps(result[7])) < 40_000
