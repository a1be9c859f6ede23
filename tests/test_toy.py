"The toy world: tables, padded batches, and exact laws over texts."

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from decoding_book.loop import Draw, as_prompts, generate, left_pad, score
from decoding_book.toy import TableModel, sequence_law, six_words

WORLD = six_words()


def brute_force(model, T):
    "P(text) by plain multiplication, one text at a time."
    out = {}
    for ids in itertools.product(range(model.vocab_size), repeat=T):
        if model.eos in ids:
            ids = ids[: ids.index(model.eos) + 1]
        if ids in out:
            continue
        p = 1.0
        for t, i in enumerate(ids):
            p *= model(torch.tensor([ids[:t]], dtype=torch.long)).logits[0].exp()[i].item()
        if p:
            out[ids] = p
    return out


@pytest.mark.parametrize("eos", [None, 2])
def test_sequence_law_equals_brute_force(eos):
    rows = torch.tensor(
        [[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.1, 0.0, 0.9], [1 / 3, 1 / 3, 1 / 3]],
        dtype=torch.float64,
    )
    model = TableModel(rows[0], rows[1:], eos=eos)
    law, truth = sequence_law(model, 4), brute_force(model, 4)
    assert law.keys() == truth.keys()
    assert all(math.isclose(law[k], truth[k], abs_tol=1e-14) for k in truth)
    assert math.isclose(sum(law.values()), 1)


def test_the_numbers_of_the_sources():
    law = sequence_law(WORLD, 5)
    assert law[tuple(WORLD.encode("I like cold coffee stop"))] == pytest.approx(
        0.01378125, abs=1e-12
    )
    assert law[tuple(WORLD.encode("cold coffee I like stop"))] == pytest.approx(0.03575, abs=1e-12)
    assert max(law, key=law.get) == tuple(WORLD.encode("cold coffee I like stop"))
    assert len(law) == 3906 and len(sequence_law(six_words(eos=None), 5)) == 6**5


def test_law_after_a_prompt_and_of_another_decoder():
    law = sequence_law(WORLD, 1, prompt="cold coffee")
    assert law[(2,)] == pytest.approx(0.65)
    half = sequence_law(WORLD, 1, lambda z: (z / 0.5).softmax(-1))
    assert half[(2,)] == pytest.approx(0.25 / (0.25 + 0.0625 + 0.01 + 0.0064 + 0.0025 + 0.0004))


def test_draws_follow_the_law(full):
    rng = torch.Generator().manual_seed(1)

    def choose(p, c):
        return Draw(torch.multinomial(p.logits.softmax(-1), 1, generator=rng)[:, 0])

    n, law = 50_000 if full else 10_000, sequence_law(WORLD, 3)
    drawn = generate(WORLD, [""] * n, choose, max_new_tokens=3, alternatives=0)
    counts = dict.fromkeys(law, 0)
    for ids in drawn.ids:
        counts[tuple(ids.tolist())] += 1
    seen, expected = np.array(list(counts.values())), n * np.array(list(law.values()))
    keep = expected > 5
    stat = ((seen - expected)[keep] ** 2 / expected[keep]).sum()
    assert chi2.sf(stat, keep.sum() - 1) > 1e-4


def test_padded_rows_equal_rows_alone_in_both_forms():
    markov = TableModel([0.2, 0.8], [[0.5, 0.5], [0.1, 0.9]])
    for model, texts in (
        (WORLD, ["", "I", "I like cold coffee", "cold coffee"]),
        (markov, ["", "0 1 1", "1"]),
    ):
        ids, mask = left_pad(as_prompts(model, texts)[0])
        whole = model(ids, mask, last_only=False).logits
        for i, t in enumerate(texts):
            alone = model(torch.tensor([model.encode(t)], dtype=torch.long))
            assert torch.equal(whole[i, -1], alone.logits[0])


def test_zero_probability_is_minus_infinity_and_score_says_so():
    model = TableModel([1.0, 0.0], [[0.5, 0.5], [0.0, 1.0]])
    assert score(model, [1]).item() == -math.inf and score(model, [0, 1]).exp().tolist() == [
        [1.0, 0.5]
    ]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TableModel([0.5, 0.6], np.eye(2)), "initial: row .* sums to 1.1"),
        (lambda: TableModel([1.0, 0.0], [[1.0, 0.0], [0.3, 0.3]]), "transitions: row 1 "),
        (lambda: TableModel([1.5, -0.5], np.eye(2)), "initial"),
        (lambda: TableModel([float("nan"), 1.0], np.eye(2)), "initial"),
        (
            lambda: TableModel([0.5, 0.5], np.eye(3)),
            r"transitions: shape \(3, 3\), expected \(2, 2\)",
        ),
        (
            lambda: TableModel.from_tree([[0.5, 0.5], [[1.0, 0.0]]]),
            r"conditionals\[1\]: shape \(1, 2\)",
        ),
        (lambda: TableModel([0.5, 0.5], np.eye(2), words=["a"]), "words"),
        (lambda: TableModel([0.5, 0.5], np.eye(2), words=["a", "a"]), "words"),
        (lambda: TableModel([0.5, 0.5], np.eye(2), eos=2), "eos: 2"),
        (lambda: WORLD.encode("I like tea"), "'tea'"),
        (lambda: WORLD(torch.zeros(1, 5, dtype=torch.long)), "longest text has 5"),
    ],
)
def test_bad_tables_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("mask", [[[True, True, False]], [[True, False, True]], [[True]]])
def test_padding_is_on_the_left(mask):
    with pytest.raises(ValueError, match="pad ids on the left"):
        WORLD(torch.tensor([[2, 3, 0]]), torch.tensor(mask))


@pytest.mark.parametrize("bad", [[[-1]], [[6]]])
def test_ids_outside_the_vocabulary(bad):
    with pytest.raises(ValueError, match="vocabulary 0..5"):
        WORLD(torch.tensor(bad))


def test_a_law_must_be_a_distribution_and_a_prompt_of_ids():
    for law in (lambda z: z, torch.ones_like, lambda z: z * torch.nan):
        with pytest.raises(ValueError, match="law: returned a row"):
            sequence_law(WORLD, 2, law)
    with pytest.raises(ValueError, match="id -1"):
        sequence_law(WORLD, 1, prompt=[-1])


@pytest.mark.parametrize("eos", [True, 1.0, "0 1", "", "x", torch.tensor(1)])
def test_a_bad_end_mark_is_named(eos):
    with pytest.raises(ValueError, match="eos"):
        TableModel([0.5, 0.5], np.eye(2), eos=eos)


# ---- the law of a world, and its loop


def test_a_law_ends_where_the_loop_ends():
    assert set(sequence_law(WORLD, 9)) == set(sequence_law(WORLD, 5)) and sequence_law(
        WORLD, 0
    ) == {(): 1.0}
    assert generate(WORLD, "", max_new_tokens=9, ignore_eos=True).reason == "context"
    world = six_words()
    world.end_ids = [2]
    law = sequence_law(world, 3)
    assert (2,) in law and not any(2 in ids[:-1] for ids in law)
