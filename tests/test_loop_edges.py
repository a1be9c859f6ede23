"""Corners of the loop that only a broken copy of it (tools/mutate.py) showed to be untested."""
import torch

from decoding_book.loop import Prediction, generate

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
    shift = 0.0                                     # added to all logits: changes no probability

    def new_cache(self, rows, length):
        return Cache(rows)

    def __call__(self, ids, mask=None, cache=None, last_only=True, attention=False):
        cache.ids = torch.cat([cache.ids, ids], 1)
        cache.length = cache.ids.shape[1]
        steps = cache.ids[:, 0] + cache.length      # depends on the first word: a wrong row shows
        logits = torch.zeros(len(ids), self.vocab_size).scatter(1, steps.clamp(max=4)[:, None], 3.0)
        return Prediction(logits + self.shift)

    def encode(self, text):
        return [WORDS.index(w) for w in text]

    def decode(self, ids):
        return "".join(WORDS[i] for i in ids)


def test_the_cache_keeps_the_rows_that_go_on():
    model = Counter()
    prompts = [[3], [0], [2]]                       # the first ends first, the last but one goes on
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
