"""Penalties: the CTRL rule, counts, n-grams, bias and minimum length, each against a plain loop and
transformers."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import llama_filters
from helpers.rows import history

from decoding_book.loop import generate
from decoding_book.penalties import (
    DRY_BREAKERS,
    bias_vector,
    check_history,
    dry,
    frequency_penalty,
    logit_bias,
    longest_repeats,
    min_length,
    no_repeat_ngram,
    presence_penalty,
    repeat_lengths,
    repetition_penalty,
    sequence_bias,
    spellings,
    token_counts,
    tokens_with,
)
from decoding_book.sampler import Sampler
from decoding_book.toy import six_words

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype,atol", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_repetition_penalty_is_that_of_the_oracle(dtype, atol):
    d = np.load(Path(__file__).parent / "oracle/cases.npz", allow_pickle=False)
    for z, seen, theta, out in zip(d["rep_logits"], d["rep_seen"], d["rep_theta"], d["rep_out"]):
        mine = repetition_penalty(torch.tensor(z).to(dtype), seen.nonzero()[0], float(theta))
        np.testing.assert_allclose(mine, out, atol=atol, rtol=0)
    seen = [row.nonzero()[0] for row in d["rep_seen"]]  # all rows at once, padded and masked
    N = max(map(len, seen))
    ids = torch.tensor([[0] * (N - len(s)) + s.tolist() for s in seen])
    mask = torch.tensor([[False] * (N - len(s)) + [True] * len(s) for s in seen])
    mine = repetition_penalty(
        torch.tensor(d["rep_logits"]).to(dtype), ids, torch.tensor(d["rep_theta"]), mask
    )
    np.testing.assert_allclose(mine, d["rep_out"], atol=atol, rtol=0)


def test_against_plain_loops():
    rng = np.random.default_rng(0)
    for _ in range(60):
        B, V, N = rng.integers(1, 5), rng.integers(2, 9), rng.integers(0, 12)
        z, ids, mask = history(rng, B, V, N)
        theta, alpha, beta = (torch.tensor(rng.uniform(low, 2, B)) for low in (0.5, -2, -2))
        rep, freq = repetition_penalty(z, ids, theta, mask), frequency_penalty(z, ids, alpha, mask)
        pres, counts = presence_penalty(z, ids, beta, mask), token_counts(ids, z, mask)
        for b in range(B):
            said = ids[b][mask[b]].tolist()
            for v in range(V):
                x, n = z[b, v].item(), said.count(v)
                assert counts[b, v] == n
                t = theta[b].item() if n else 1
                assert rep[b, v].item() == pytest.approx(x / t if x > 0 else x * t, abs=1e-12)
                assert freq[b, v].item() == pytest.approx(x - alpha[b].item() * n, abs=1e-12)
                assert pres[b, v].item() == pytest.approx(x - beta[b].item() * (n > 0), abs=1e-12)


def banned_by_hand(said, n, V):
    "Tokens v for which the last n-1 words and v occur in the text."
    grams = {tuple(said[i : i + n]) for i in range(len(said) - n + 1)}
    return {
        v
        for v in range(V)
        if len(said) >= n - 1 and tuple(said[len(said) - n + 1 :]) + (v,) in grams
    }


def test_ngrams_against_a_plain_loop():
    rng, refused = np.random.default_rng(1), 0
    for _ in range(300):
        B, V, N = rng.integers(1, 5), rng.integers(2, 4), rng.integers(0, 14)
        z, ids, mask = history(rng, B, V, N)
        n = rng.integers(0, 5, B)
        sets = [
            banned_by_hand(ids[b][mask[b]].tolist(), n[b], V) if n[b] else set() for b in range(B)
        ]
        if any(len(s) == V for s in sets):
            row = next(b for b, s in enumerate(sets) if len(s) == V)
            with pytest.raises(
                ValueError, match=rf"n \(no_repeat_ngram\), row {row}: {n[row]} leaves no token"
            ):
                no_repeat_ngram(z, ids, n, mask)
            refused += 1
            continue
        out = no_repeat_ngram(z, ids, n, mask)
        for b in range(B):
            assert {v for v in range(V) if out[b, v] == -INF} == sets[b]
            assert out[b][out[b].isfinite()].equal(z[b][out[b].isfinite()])
    assert 5 < refused < 200


def test_minus_infinity_stays():
    z = torch.tensor([1.0, -INF, -2.0, 0.0])
    for out in (
        repetition_penalty(z, [1, 0], 0.5),
        frequency_penalty(z, [1, 1], -9.0),
        presence_penalty(z, [1], -9.0),
        no_repeat_ngram(z, [2], 1),
        logit_bias(z, {1: 5.0}),
        min_length(z, 0, 1, 2),
    ):
        assert out[1] == -INF and not out.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_shapes_dtypes_and_input_left_alone(dtype, lead):
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(*lead, 7, generator=rng).to(dtype)
    ids = torch.randint(0, 7, (*lead, 5), generator=rng)
    before = z.clone(), ids.clone()
    for f in (
        lambda z, i: repetition_penalty(z, i, 1.3),
        lambda z, i: frequency_penalty(z, i, 0.5),
        lambda z, i: presence_penalty(z, i, 0.5),
        lambda z, i: no_repeat_ngram(z, i, 2),
        lambda z, i: logit_bias(z, {2: 1.0}),
        lambda z, i: min_length(z, 1, 3, [0, 6]),
    ):
        out = f(z, ids)
        assert out.shape == z.shape and out.dtype == (
            torch.float64 if dtype == torch.float64 else torch.float32
        )
        for o, a, b in zip(out.reshape(-1, 7), z.reshape(-1, 7), ids.reshape(-1, 5)):
            assert f(a, b).equal(o)
    assert z.equal(before[0]) and ids.equal(before[1])


def test_off_changes_nothing():
    z, ids = (
        torch.randn(3, 5, generator=torch.Generator().manual_seed(1)),
        torch.tensor([[1, 2], [0, 0], [4, 1]]),
    )
    for out in (
        repetition_penalty(z, ids, 1),
        frequency_penalty(z, ids, 0),
        presence_penalty(z, ids, 0),
        no_repeat_ngram(z, ids, 0),
        logit_bias(z, {}),
        min_length(z, 0, 0, 1),
        repetition_penalty(z, ids[:, :0], 2.0),
        frequency_penalty(z, ids, 3.0, ids < 0),
    ):
        assert out.equal(z)


def test_bias_forms_agree():
    z = torch.zeros(2, 4)
    assert logit_bias(z, {1: 2, 3: -INF}).equal(logit_bias(z, [0.0, 2.0, 0.0, -INF]))
    assert (
        logit_bias(z, torch.tensor([[0.0, 2.0, 0.0, -INF]] * 2)).tolist() == [[0, 2, 0, -INF]] * 2
    )
    assert bias_vector({2: 1.5}, 4).tolist() == [0, 0, 1.5, 0]


Z, IDS = torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    "call,error,text",
    [
        (
            lambda: repetition_penalty(Z, IDS, 0),
            ValueError,
            r"theta \(repetition_penalty\): 0 is outside \(0, inf\)",
        ),
        (
            lambda: repetition_penalty(Z, IDS, [1.0, -1.0]),
            ValueError,
            r"theta \(repetition_penalty\), row 1: -1.0",
        ),
        (
            lambda: repetition_penalty(Z, [[0, 1], [2, 4]], 1.0),
            ValueError,
            r"ids: row 1: 4 is outside the vocabulary 0..3",
        ),
        (
            lambda: repetition_penalty(Z, [[0, 1], [-1, 0]], 1.0),
            ValueError,
            r"ids: row 1: -1 is outside",
        ),
        (
            lambda: repetition_penalty(Z, [0, 1], 1.0),
            ValueError,
            r"ids: shape \(2,\), expected \(2, 'N'\)",
        ),
        (lambda: repetition_penalty(Z, [[0], [1, 2]], 1.0), TypeError, "ids: "),
        (lambda: repetition_penalty(Z, [[0.5], [1.0]], 1.0), TypeError, "ids: torch.float32"),
        (lambda: repetition_penalty(Z, IDS, 1.0, [[1, 0], [0, 1]]), TypeError, "mask: torch.int64"),
        (
            lambda: repetition_penalty(Z, IDS, 1.0, torch.ones(2, 3, dtype=torch.bool)),
            ValueError,
            r"mask: shape \(2, 3\)",
        ),
        (
            lambda: repetition_penalty(Z + 3e38, IDS, 0.5),
            ValueError,
            r"theta \(repetition_penalty\), row 0: 0.5 takes",
        ),
        (
            lambda: repetition_penalty(Z + 1, IDS, 1e-60),
            ValueError,
            r"theta \(repetition_penalty\), row 0: 1e-60 takes",
        ),
        (
            lambda: frequency_penalty(Z, IDS, float("nan")),
            ValueError,
            r"alpha \(frequency_penalty\): nan",
        ),
        (
            lambda: frequency_penalty(Z, IDS, [0.0, 1e300]),
            ValueError,
            r"alpha \(frequency_penalty\), row 1: 1e\+300 takes",
        ),
        (lambda: presence_penalty(Z, IDS, INF), ValueError, r"beta \(presence_penalty\): inf"),
        (lambda: presence_penalty(Z, IDS, "1"), TypeError, r"beta \(presence_penalty\): '1'"),
        (
            lambda: no_repeat_ngram(Z, IDS, 1.5),
            ValueError,
            r"n \(no_repeat_ngram\): 1.5 is not an integer",
        ),
        (lambda: no_repeat_ngram(Z, IDS, -1), ValueError, r"n \(no_repeat_ngram\): -1 is outside"),
        (
            lambda: logit_bias(Z, {4: 1.0}),
            ValueError,
            r"logit_bias: id 4 is outside the vocabulary 0..3",
        ),
        (lambda: logit_bias(Z, {10**40: 1.0}), ValueError, "logit_bias: id 10000"),
        (lambda: logit_bias(Z, {1: 10**400}), ValueError, "logit_bias: id 1: 1000"),
        (lambda: repetition_penalty(Z, [[10**40], [0]], 1.0), TypeError, "ids: "),
        (lambda: logit_bias(Z, {-1: 1.0}), ValueError, "logit_bias: id -1"),
        (lambda: logit_bias(Z, {"a": 1.0}), TypeError, "logit_bias: 'a' is no id"),
        (lambda: logit_bias(Z, {1: "x"}), TypeError, "logit_bias: id 1: 'x'"),
        (lambda: logit_bias(Z, {1: INF}), ValueError, "logit_bias: id 1: inf"),
        (lambda: logit_bias(Z, {1: float("nan")}), ValueError, "logit_bias: id 1: nan"),
        (lambda: logit_bias(Z, [1.0, 2.0]), ValueError, r"logit_bias: shape \(2,\)"),
        (
            lambda: logit_bias(Z, [-INF] * 4),
            ValueError,
            r"logit_bias, row 0: id 0: -inf, id 1: -inf, id 2: -inf and 1 more leave no token",
        ),
        (
            lambda: logit_bias(Z + 3e38, {1: 3e38}),
            ValueError,
            r"logit_bias, row 0: id 1: 3e\+38 takes a logit out of the range",
        ),
        (lambda: min_length(Z, 0, 1, 4), ValueError, "eos: id 4 is outside"),
        (
            lambda: min_length(Z, 0, 1, [0, 1, 2, 3]),
            ValueError,
            r"least \(min_new_tokens\), row 0: 1 leaves no token",
        ),
        (lambda: min_length(Z, 0, -1, 1), ValueError, r"least \(min_new_tokens\): -1"),
        (lambda: min_length(Z, 0, 1, None), TypeError, "eos: None"),
    ],
)
def test_a_bad_argument_is_refused_by_its_name(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_penalties_leave_removed_tokens_alone():
    "A number that overflows on a token which is not there is no reason for NaN or an error."
    z = torch.tensor([-INF, 1.0])
    for f in (frequency_penalty, presence_penalty):
        assert f(z, [0], -1e39).tolist() == [-INF, 1.0]
    assert logit_bias(z, {0: 1e39}).tolist() == [-INF, 1.0]
    assert Sampler(frequency_penalty=-1e39).distribution(z, [0]).tolist() == [0.0, 1.0]


def test_a_bias_is_any_real_number():
    for value in (10**30, Fraction(1, 2), 2**63, np.float32(2)):
        assert logit_bias(torch.tensor([0.0, 1.0]), {1: value})[1].item() == pytest.approx(
            float(value) + 1
        )
    for value in (10**400, -(10**400), INF, NAN):
        with pytest.raises(ValueError, match="logit_bias: id 1: .* is neither finite nor -inf"):
            bias_vector({1: value})


# Biases of sequences, and how words are spelt


def test_a_sequence_is_banned_where_all_but_its_last_token_stand():
    "Beside a loop over rows and sequences: padding, short texts, several at once, finite biases."
    rng = np.random.default_rng(0)
    for _ in range(100):
        V, N = int(rng.integers(3, 6)), int(rng.integers(0, 8))
        z, ids, mask = history(rng, 4, V, N)
        bias = {}
        for _ in range(int(rng.integers(1, 6))):
            sequence = tuple(rng.integers(0, V, int(rng.integers(1, 4))).tolist())
            bias[sequence] = -INF if rng.random() < 0.3 and sequence[-1] else float(rng.normal())
        want = z.clone()
        for row, text, real in zip(want, ids, mask):
            said = text[real].tolist()
            for (*before, last), value in bias.items():
                if said[len(said) - len(before) :] == before:
                    row[last] += value
        got = sequence_bias(z, ids, bias, mask)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        assert sequence_bias(z.double(), ids, bias, mask).dtype == torch.float64


def test_a_banned_sequence_is_never_said_though_its_beginning_is():
    world = six_words(eos=None)
    sampler = Sampler(sequence_bias={(2, 3): -INF, (0, 1, 2): -INF, (4,): -INF}, seed=1)
    texts = generate(world, [""] * 2000, sampler, max_new_tokens=5, alternatives=0).ids
    free = generate(world, [""] * 2000, Sampler(seed=1), max_new_tokens=5, alternatives=0).ids

    def runs(texts):
        return {tuple(t[i : i + n]) for t in texts for n in (1, 2, 3) for i in range(6 - n)}

    said, could = (runs([t.tolist() for t in those]) for those in (texts, free))
    banned = {(2, 3), (0, 1, 2), (4,)}
    assert banned <= could and not banned & said
    assert {(2,), (3,), (0, 1), (1, 2)} <= said


def test_a_finite_bias_bans_nothing():
    "One that is out of the logits' range is refused where it acts, and only there."
    z, text = torch.zeros(1, 5), torch.tensor([[0, 1]])
    far = {(1, 2): -1e300}
    assert sequence_bias(z.double(), text, far)[0].tolist() == [0, 0, -1e300, 0, 0]
    assert sequence_bias(z, text[:, :1], far).equal(z)
    assert sequence_bias(z, text, {(1, 2): -1e300, (2,): -INF}).isinf().sum() == 1
    with pytest.raises(ValueError, match=r"sequence_bias, row 0: \(1, 2\): -1e\+300 takes"):
        sequence_bias(z, text, far)
    with pytest.raises(ValueError, match=r"sequence_bias, row 0: \(1, 2\): -1e\+300 takes"):
        sequence_bias(z[0], text[0], far)


def test_words_have_spellings(model):
    found = spellings(model, ["tea", "Iced tea"])
    forms = ["tea", " tea", "Tea", " Tea", "Iced tea", " Iced tea", "iced tea", " iced tea"]
    assert sorted(found.values()) == sorted(forms)
    assert all(model.decode(ids) == text for ids, text in found.items())
    assert spellings(model, "tea") == {k: t for k, t in found.items() if len(t) < 5}
    assert spellings(six_words(), ["I"]) == {(2,): " I"}  # a tokenizer of words knows no space
    for bad in ("", " ", [""], [3]):
        with pytest.raises(ValueError, match="is no word"):
            spellings(model, bad)
    with pytest.raises(TypeError, match="words: 'tea' are text, and the model has no tokenizer"):
        spellings(object(), "tea")
    for bad in (None, 5, 1.5):
        with pytest.raises(TypeError, match=f"words: {bad} is no text or list of it"):
            spellings(model, bad)
    with pytest.raises(ValueError, match="words: 98 is no word"):
        spellings(model, b"b")
    for bad in ("tea", ["I", "tea"]):  # a word that the model cannot say would be banned in vain
        with pytest.raises(ValueError, match="words: 'tea' is no text of this model"):
            spellings(six_words(), bad)


@pytest.mark.parametrize(
    "bias, error, what",
    [
        ([(1, 2)], TypeError, "sequence_bias: .* is no dictionary"),
        ({3: 1.0}, TypeError, "sequence_bias: 3 is no tuple of ids"),
        ({(): 1.0}, TypeError, r"sequence_bias: \(\) is no tuple of ids"),
        (
            {(1, 9): 1.0},
            ValueError,
            r"sequence_bias: \(1, 9\): id 9 is outside the vocabulary 0",
        ),
        ({(1, -1): 1.0}, ValueError, r"sequence_bias: \(1, -1\): id -1 is outside"),
        ({(1, 2.0): 1.0}, TypeError, r"sequence_bias: \(1, 2.0\): 2.0 is no id"),
        ({(1, 2): float("nan")}, ValueError, r"sequence_bias: \(1, 2\): nan is neither finite"),
        ({(1, 2): INF}, ValueError, r"sequence_bias: \(1, 2\): inf is neither finite"),
        ({(1, 2): "3"}, TypeError, r"sequence_bias: \(1, 2\): '3' is not a number"),
        (
            {(i,): -INF for i in range(5)} | {(1, 2): -INF},
            ValueError,
            r"sequence_bias, row 0: \(0,\): -inf, .*\(2,\): -inf and 2 more leave no token",
        ),
        (
            {(2,): -1.0, (0, 1): -1e300, (1, 1): -1e300},
            ValueError,
            r"sequence_bias, row 0: \(0, 1\): -1e\+300 takes a logit out of the range of",
        ),
        ({(0, 0, 1): 1e300, (3,): 1e39}, ValueError, r"row 0: \(3,\): 1e\+39 takes a logit out"),
        ({(1,): -3e38, (0, 1): -2e38}, ValueError, r"\(1,\): -3e\+38, \(0, 1\): -2e\+38 takes"),
    ],
)
def test_bad_sequences_are_refused(bias, error, what):
    with pytest.raises(error, match=what):
        sequence_bias(torch.zeros(2, 5), torch.zeros(2, 1).long(), bias)


# Do not repeat yourself


def repetitive(rng, B, N, V):
    "Texts over few tokens, so that long repetitions happen, left-padded."
    ids = torch.tensor(rng.integers(0, V, (B, N)))
    for row in ids:
        a, n = rng.integers(0, max(N, 1)), rng.integers(0, N // 2 + 1)
        row[N - n :] = row[a : a + n].clone() if a + n <= N - n else row[N - n :]
    real = torch.tensor(rng.integers(0, N + 1, B))
    return ids, torch.arange(N) >= N - real[:, None]


def test_dry_is_its_definition(full, record):
    "Beside a plain loop: padding, breakers, windows, parameters by row."
    rng, longest = np.random.default_rng(1), 0
    for _ in range(2000 if full else 150):
        V, N = int(rng.integers(2, 6)), int(rng.integers(0, 25))
        ids, mask = repetitive(rng, 4, N, V)
        z = torch.tensor(rng.normal(size=(4, V)))
        m, b, a = rng.uniform(0, 2, 4), rng.uniform(1, 3, 4), rng.integers(0, 5, 4)
        stops = rng.choice(V, int(rng.integers(0, 2)), replace=False).tolist()
        found = dry(z, ids, m, b, a, stops, mask)
        for i in range(4):
            text = ids[i][mask[i]].tolist()
            want = llama_filters.dry(z[i].tolist(), text, m[i], b[i], int(a[i]), stops)
            torch.testing.assert_close(found[i], torch.tensor(want, dtype=torch.float64))
            assert found[i].equal(dry(z[i], text, m[i], b[i], int(a[i]), stops))
        longest = max(longest, longest_repeats(z, *check_history(ids, z, mask), stops).max().item())
    assert longest > 5
    record("penalties: longest repetition met by DRY", longest)


def test_dry_takes_no_end_for_a_repetition_of_itself():
    text = torch.tensor([1, 2, 1, 2])
    assert repeat_lengths(text, text > 0, text < 0).tolist() == [0, 2, 0, 0]


def test_dry_has_a_largest_price():
    "The penalty stays a float32 number, and the logit one of its type: nothing is banned."
    text, z = [1, 2] * 400, torch.zeros(3)
    for base, price in ((1.0, 0.5), (1.0000005, 0.5), (2.0, 0.5 * 2.0**127)):
        paid = -dry(z, text, 0.5, base)[1].item()
        assert paid == pytest.approx(price, rel=1e-3)
    for dtype in (torch.float32, torch.float64):
        out = dry(z.to(dtype) - 1, text, 1e39, 2.0)
        assert out.isfinite().all() and out.dtype == dtype and out[0] == -1


def test_dry_leaves_short_texts_and_removed_tokens_alone():
    z = torch.tensor([0.0, -INF, 1.0])
    for text in ([], [0], [0, 1], [2, 1, 0]):
        assert dry(z, text, 1.0).equal(z)
    assert dry(z, [0, 1, 0, 1, 0], 1.0)[1] == -INF
    assert dry(z, [0, 1, 0, 1, 0], 0.0).equal(z)


@pytest.mark.parametrize(
    "options,error,text",
    [
        (dict(multiplier=-1), ValueError, r"multiplier \(dry_multiplier\): -1"),
        (dict(base=0.9), ValueError, r"base \(dry_base\): 0.9"),
        (dict(allowed=[1, 2.5]), ValueError, r"allowed \(dry_allowed_length\), row 1: 2.5"),
        (dict(breakers=7), TypeError, r"breakers \(dry_breakers\): 7 is no list"),
        (dict(breakers=[4]), ValueError, r"breakers \(dry_breakers\): id 4 is outside"),
        (dict(breakers=["."]), TypeError, r"breakers \(dry_breakers\): '.'"),
        (dict(ids=[[9, 0], [0, 1]]), ValueError, "ids: row 0: 9 is outside"),
    ],
)
def test_dry_refuses_bad_options_by_their_names(options, error, text):
    given = dict(ids=[[0, 1], [1, 0]], multiplier=1.0) | options
    with pytest.raises(error, match=text):
        dry(torch.zeros(2, 4), **given)


def test_breakers_are_the_tokens_that_hold_a_text(model):
    found = tokens_with(model)
    assert all(any(t in model.decode([id]) for t in DRY_BREAKERS) for id in found)
    assert (
        set(model.encode("\n")) | set(model.encode(":")) <= set(found) and 100 < len(found) < 5000
    )
    for bad in ("", ["a", 5]):
        with pytest.raises(ValueError, match="texts: "):
            tokens_with(model, bad)
