"""Beam search, alone and beside the exact ones: the oracle's cases, brute force over random worlds,
ties, caches."""

import math
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
from helpers.worlds import CASES, Cached, Counted, Deep, case, markov, padded

from decoding_book.beam import beam_search, row_best
from decoding_book.entropix import EntropySampler
from decoding_book.exhaustive import (
    Hypotheses,
    best_first_search,
    exhaustive_search,
    n_largest,
)
from decoding_book.greedy import greedy_search
from decoding_book.loop import Prediction, PromptCache, generate, greedy, score
from decoding_book.sampler import Sampler
from decoding_book.toy import TableModel, six_words
from decoding_book.transformer import GPT, GPTConfig


@pytest.mark.parametrize("name", CASES)
def test_beams_are_those_of_the_oracle(name):
    _, T, get = case(name)
    for i, k in enumerate(get("ks").tolist()):
        model = case(name)[0]
        found = beam_search(model, "", k, T)
        assert padded(found[0], T) == get("beam_seq")[i].tolist()
        assert abs(found[0].logprob - get("beam_logp")[i]) < 1e-9
        assert model.rows == found.rows == get("beam_calls")[i]


@pytest.mark.parametrize("name", CASES)
def test_oracle_whole_beam(name):
    model, T, get = case(name)
    found = beam_search(model, "", 3, T, n_best=3)
    assert [padded(h, T) for h in found] == get("beam3_seqs").tolist()
    assert np.abs([h.logprob for h in found] - get("beam3_logps")).max() < 1e-9


# Brute force


def world(seed):
    """A random tree with an end mark, some of its words impossible; sharper or flatter by seed."""
    g = torch.Generator().manual_seed(seed)
    V, T = (3, 4, 2, 3)[seed % 4], (4, 3, 6, 5)[seed % 4]
    tree = []
    for t in range(T):
        z = (
            torch.randn((V,) * (t + 1), generator=g, dtype=torch.float64)
            * (0.5, 1.5, 3.0)[seed % 3]
        )
        if seed % 5 == 0:
            z[torch.rand(z.shape, generator=g) < 0.2] = -torch.inf
        z[..., -1] = z[..., -1].clamp(min=-5)  # one word is always possible
        tree.append(z.softmax(-1))
    return tree, V, T, V - 1 if seed % 2 else 0


def brute_force(tree, V, T, eos):
    """Every complete text, best first, by recursion over plain numbers."""
    found = []

    def visit(ids, p):
        if ids and (ids[-1] == eos or len(ids) == T):
            return found.append((-p, ids))
        for w, q in enumerate(tree[len(ids)][ids].tolist()):
            if q > 0:
                visit(ids + (w,), p + math.log(q))

    visit((), 0.0)
    return sorted(found)


def test_searches_find_what_brute_force_finds(full, record):
    worlds, widths = (2400 if full else 100), (1, 2, 3, 4, 8)
    regrets, missed = {k: [] for k in widths}, dict.fromkeys(widths, 0)
    for seed in range(worlds):
        tree, V, T, eos = world(seed)
        truth = brute_force(tree, V, T, eos)
        model = TableModel.from_tree(tree, eos=eos)
        every = exhaustive_search(model, "", T, n_best=12)
        first = best_first_search(model, "", T, n_best=12, batch=1 + seed % 3, chunk=1 + seed % 4)
        one = best_first_search(model, "", T)
        for found in every, first, one:
            assert found.proven
            assert [tuple(h.ids.tolist()) for h in found] == [ids for _, ids in truth[: len(found)]]
            assert max(abs(h.logprob + p) for h, (p, _) in zip(found, truth)) < 1e-9
        assert len(every) == len(first) == min(12, len(truth))
        assert one.rows <= T * math.exp(truth[0][0]) + 1e-9  # T / probability of the best
        assert [h.finished for h in every] == [ids[-1] == eos for _, ids in truth[:12]]
        for k in widths:
            found = beam_search(model, "", k, T)
            assert found[0].ids.equal(beam_search(model, "", k, T, early_stopping=False)[0].ids)
            if k == 1:
                assert found[0].ids.equal(greedy_search(model, "", T).ids)
            regrets[k].append(-truth[0][0] - found[0].logprob)
            missed[k] += regrets[k][-1] > 1e-9
        whole = beam_search(model, "", V ** (T - 1), T)
        assert tuple(whole[0].ids.tolist()) == truth[0][1]
    assert min(map(min, regrets.values())) > -1e-9
    assert sum(regrets[1]) > sum(regrets[2]) > sum(regrets[4])
    record(
        "regret over random worlds with end marks",
        {
            "worlds": worlds,
            "missed by width": missed,
            "mean regret in nats": {k: round(sum(r) / worlds, 5) for k, r in regrets.items()},
            "largest regret in nats": {k: round(max(r), 3) for k, r in regrets.items()},
        },
    )


@pytest.mark.parametrize("mode", [None, "never", False, True])
@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0, -0.5])
def test_length_penalty_and_stopping(mode, penalty):
    for seed in range(12):
        tree, V, T, eos = world(seed)
        model = TableModel.from_tree(tree, eos=eos)
        ranked = sorted((p / len(ids) ** penalty, ids) for p, ids in brute_force(tree, V, T, eos))
        found = beam_search(model, "", V ** (T - 1), T, penalty, n_best=2, early_stopping=mode)
        assert all(abs(h.score - h.logprob / len(h) ** penalty) < 1e-12 for h in found)
        if mode is not True:
            assert [tuple(h.ids.tolist()) for h in found] == [
                ids for _, ids in ranked[: len(found)]
            ]
        narrow = [
            beam_search(model, "", 3, T, penalty, n_best=2, early_stopping=m)
            for m in ("never", False, True)
        ]
        a, b = ([(h.ids.tolist(), h.score) for h in one] for one in narrow[:2])
        assert a == b and narrow[2].rows <= narrow[1].rows <= narrow[0].rows


# Ties


def test_ties_go_to_smaller_ids():
    V, T = 3, 3
    flat = TableModel.from_tree([torch.full((V,) * (t + 1), 1 / V) for t in range(T)])
    first = [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1]]
    for found in (
        exhaustive_search(flat, "", T, n_best=5),
        best_first_search(flat, "", T, n_best=5, chunk=1),
        best_first_search(flat, "", T, n_best=5, batch=4),
        beam_search(flat, "", 5, T, n_best=5),
    ):
        assert [h.ids.tolist() for h in found] == first


def test_cut_ties_of_topk():
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        z = torch.randint(0, 4, (3, 300), generator=g).double()
        z[0, :250] = -torch.inf
        totals = torch.randint(-3, 1, (3,), generator=g).double()
        orders = [sorted(range(300), key=lambda i: (-row[i], i)) for row in z.tolist()]
        for n in (1, 2, 7, 299, 300, 400):
            at, logp, sums = row_best(z, totals, n)
            for r, (row, order) in enumerate(zip(z.tolist(), orders)):
                real = [i for i in order[:n] if row[i] > -torch.inf]
                got = sorted(
                    i for i, lp in zip(at[r].tolist(), logp[r].tolist()) if lp > -torch.inf
                )
                assert got == sorted(real)
        assert n_largest(z[0], 7).tolist() == orders[0][:7]


@pytest.mark.parametrize("dialect, width", [(None, 1), (None, 2), (None, 5), ("huggingface", 3)])
def test_beam_with_a_cache(dialect, width):
    prompts = [[1, 2, 3], [4], [0, 0, 2, 1, 3]]
    plain, cached = Deep(), Cached(Deep())
    options = dict(n_best=width, length_penalty=0.5, dialect=dialect)
    a, b = (beam_search(m, prompts, width, 7, **options) for m in (plain, cached))
    for one, other, prompt in zip(a, b, prompts):
        alone = beam_search(plain, prompt, width, 7, **options)
        expected = [(h.ids.tolist(), h.score) for h in one]
        assert (
            expected
            == [(h.ids.tolist(), h.score) for h in other]
            == [(h.ids.tolist(), h.score) for h in alone]
        )
        assert one.rows == other.rows == alone.rows
    assert cached.fed[0] == (3, 5)  # the prompts once, one row each
    assert all(shape[1] == 1 for shape in cached.fed[1:])  # then only the newest ids
    assert len(cached.caches) == 1 and cached.caches[0].capacity == (3 * width, 5 + 7)
    assert cached.rows == sum(h.rows for h in b)


def test_scores_are_the_models_own():
    model = markov()
    for found in (
        beam_search(model, [1, 2], 4, 6, n_best=4),
        exhaustive_search(model, [1, 2], 4),
        best_first_search(model, [1, 2], 4, n_best=3),
    ):
        for h in found:
            whole = score(model, [1, 2] + h.ids.tolist())[0, 2:]
            assert (
                torch.allclose(whole, h.logprobs, atol=1e-12)
                and abs(whole.sum() - h.logprob) < 1e-12
            )


class Shifted(Counted):
    """The same distributions from logits that are not log-probabilities."""

    def __call__(self, ids, **options):
        p = super().__call__(ids, **options)
        return Prediction(p.logits + 3.0 + ids.sum(-1, keepdim=True))


def test_logits_need_not_be_normalised():
    plain, shifted = markov(), Shifted(markov())
    for search in (
        lambda m: beam_search(m, [1], 3, 5, n_best=3),
        lambda m: exhaustive_search(m, [1], 4),
        lambda m: best_first_search(m, [1], 4, n_best=5),
        lambda m: [greedy_search(m, [1], 5)],
    ):
        for h, g in zip(search(plain), search(shifted), strict=True):
            assert h.ids.equal(g.ids) and abs(h.logprob - g.logprob) < 1e-9


def test_end_marks_of_the_call():
    model = markov()
    for search in (
        lambda **o: beam_search(model, [1], 4, 5, n_best=4, **o),
        lambda **o: exhaustive_search(model, [1], 5, **o),
        lambda **o: best_first_search(model, [1], 5, n_best=4, **o),
    ):
        for h in search(stop=2):
            ends = [i for i, id in enumerate(h.ids.tolist()) if id in (2, 5)]
            assert ends in ([], [len(h) - 1]) and h.finished == bool(ends)
        for h in search(stop=2, ignore_eos=True):
            assert [i for i, id in enumerate(h.ids.tolist()) if id == 2] in ([], [len(h) - 1])
        assert not any(h.finished for h in search(ignore_eos=True))


def test_context_limits_the_length():
    deep = six_words(eos=None)
    for found in (
        exhaustive_search(deep, "I like", 64),
        beam_search(deep, "I like", 2, 64),
        best_first_search(deep, "I like", 64),
    ):
        assert len(found[0]) == 3 and not found[0].finished


@pytest.mark.parametrize(
    "bad, text", [(-math.inf, "no finite logit"), (math.nan, "NaN"), (math.inf, "+inf")]
)
def test_a_row_that_is_no_distribution_is_refused(bad, text):
    class Broken(Counted):
        def __call__(self, ids, **options):
            p = super().__call__(ids, **options)
            if ids.shape[1] == 2:
                p.logits = p.logits.clone().fill_(bad)
            return p

    for search in (
        lambda m: exhaustive_search(m, "", 5),
        lambda m: best_first_search(m, "", 5, n_best=500),
        lambda m: beam_search(m, "", 3, 5),
    ):
        with pytest.raises(ValueError, match="logits: row 0") as error:
            search(Broken(six_words()))
        assert text in str(error.value)


# Views


def test_hypotheses_show_themselves():
    for found in (
        beam_search(six_words(), "", 2, 5, n_best=2),
        exhaustive_search(six_words(), "", 5),
        beam_search(six_words(), "", 2, 5, length_penalty=1.0, dialect="huggingface"),
        beam_search(six_words(), ["I", "cold"], 2, 3),
    ):
        html = found._repr_html_()
        assert "coffee" in html and "<script" not in html
    assert "0.0358" in repr(exhaustive_search(six_words(), "", 5)[0])
    assert beam_search(six_words(), "", 2, 5)._repr_html_().count("<svg") == 1
    assert beam_search(six_words(), "", 2, 5)[0]._repr_html_().count("db-t") > 4
    assert Hypotheses([])._repr_html_() and len(repr(Hypotheses([])))


NAN, WORLD = math.nan, six_words()


# ---- what a search says of itself


def test_a_beam_claims_no_proof():
    found = beam_search(WORLD, "I", 1, 3)
    assert not found.proven and found.bound == math.inf and repr(found).endswith("not proven")
    assert found[0].logprob < exhaustive_search(WORLD, "I", 3, 1)[0].logprob


def test_length_penalty_is_any_real_number_that_fits():
    "NumPy's numbers are numbers; a power that no float holds is refused."
    first, second = (beam_search(WORLD, "", 2, 5, length_penalty=a) for a in (np.float32(0.5), 0.5))
    assert repr(first) == repr(second)
    assert math.isfinite(beam_search(WORLD, "", 2, 5, length_penalty=-64)[0].score)
    for bad in (64.5, -400.0, 10**400, True, "1", None, NAN):
        kind = ValueError if type(bad) in (float, int) else TypeError
        with pytest.raises(kind, match="^length_penalty: .* is (outside|not a number)"):
            beam_search(WORLD, "", 2, 5, length_penalty=bad)


def test_what_is_refused_names_its_argument():
    w = six_words()
    refusals = [
        (lambda: beam_search(w, "", 0, 5), "width: 0 is below 1"),
        (lambda: beam_search(w, "", -1, 5), "width: -1"),
        (lambda: beam_search(w, "", 2.0, 5), "width: 2.0 is not an integer"),
        (lambda: beam_search(w, "", True, 5), "width: True is not an integer"),
        (lambda: beam_search(w, "", 2, 5, n_best=3), "n_best: 3 is above 2, the width"),
        (lambda: beam_search(w, "", 2, 5, length_penalty=math.inf), "length_penalty: inf"),
        (lambda: beam_search(w, "", 2, 5, early_stopping="soon"), "early_stopping: 'soon'"),
        (lambda: beam_search(w, "", 2, 5, dialect="other"), "dialect: 'other'"),
        (lambda: beam_search(w, "", 4, 5, dialect="huggingface"), "width: 4 needs 8 candidates"),
    ]
    for call, text in refusals:
        with pytest.raises(ValueError) as error:
            call()
        assert text in str(error.value), error.value


# ---- Laws that are changed on the way, stop strings, kept prompts


class Changed(Deep):
    "`Deep` with a law that is changed inside the model."

    def __call__(self, ids, mask=None, **options):
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        return Prediction(changed(super().__call__(ids, mask).logits, ids, real))


def changed(logits, ids, mask):
    said = [row[real] for row, real in zip(ids, mask)]
    return torch.stack(
        [z.index_add(0, r, -0.8 * torch.ones(len(r)).double()) for z, r in zip(logits, said)]
    )


@pytest.mark.parametrize("width", [1, 2, 5, 36])
def test_a_process_gives_the_beam_of_the_law_that_it_makes(width):
    prompts, calls = [[], [1], [2, 0, 3], [4, 4]], []

    def process(logits, context):
        calls.append(context)
        assert len(context.row) == len(logits) == len(context.ids)
        for row, given, ids, mask in zip(
            context.row.tolist(), context.prompt_lengths, context.ids, context.mask
        ):
            assert given == len(prompts[row])
            assert ids[mask][:given].tolist() == prompts[row]
        return changed(logits, context.ids, context.mask)

    got = beam_search(Deep(), prompts, width, 3, n_best=width, process=process)
    want = beam_search(Changed(), prompts, width, 3, n_best=width)
    assert repr(got) == repr(want) != repr(beam_search(Deep(), prompts, width, 3, n_best=width))
    assert len(calls) == 3


def test_bad_processes_are_refused():
    with pytest.raises(TypeError, match="process: 2 is not callable"):
        beam_search(Deep(), [1], 2, 3, process=2)
    for bad in (lambda z, context: None, lambda z, context: z[:, :2]):
        with pytest.raises(ValueError, match=r"process: returned .*, expected \(1, 6\) logits"):
            beam_search(Deep(), [1], 2, 3, process=bad)
    for bad, what in (
        (lambda z, context: z > 0, "(1, 6) of torch.bool"),
        (lambda z, context: z.long(), "(1, 6) of torch.int64"),
        (lambda z, context: z + 0j, "(1, 6) of torch.complex128"),
        (lambda z, context: z.numpy(), "ndarray"),
        (lambda z, context: z.tolist(), "list"),
        (lambda z, context: z[0], "(6,) of torch.float64"),
        (lambda z, context: z[:, None], "(1, 1, 6) of torch.float64"),
        (lambda z, context: greedy(Prediction(z)), "Draw"),
    ):
        for dialect in (None, "huggingface"):
            said = re.escape(f"process: returned {what}, expected (1, 6) logits of a float type")
            with pytest.raises(ValueError, match=said):
                beam_search(Deep(), [1], 2, 3, process=bad, dialect=dialect)


@pytest.mark.parametrize(
    "chooser, said",
    [
        (greedy, "greedy asks logits for `logits`: a chooser does so"),
        (Sampler().__call__, "Sampler.__call__ asks logits for `logits`"),
        (EntropySampler(), "EntropySampler chooses tokens; a beam needs logits"),
        (EntropySampler(attention=False), "EntropySampler chooses tokens"),
        (Sampler, "Sampler is a class: make one of it"),
        (EntropySampler, "EntropySampler is a class"),
    ],
)
def test_a_chooser_is_no_process(chooser, said):
    for dialect in (None, "huggingface"):
        with pytest.raises(TypeError, match=f"process: {said}"):
            beam_search(Deep(), [1], 2, 3, process=chooser, dialect=dialect)


def test_an_error_inside_a_process_is_its_own():
    with pytest.raises(AttributeError, match="'int' object has no attribute 'logits'"):
        beam_search(Deep(), [1], 2, 3, process=lambda z, context: (3).logits)


def test_a_stop_string_ends_a_text_as_its_own_token_would():
    world = six_words()
    for stop in ("coffee", "water"):
        args = ["", "I"], 3, 5
        by_text = beam_search(world, *args, n_best=3, stop=stop)
        by_id = beam_search(world, *args, n_best=3, stop=world.encode(stop))
        for one, other in zip(by_text, by_id, strict=True):
            assert [(h.ids.tolist(), h.score, h.finished) for h in one] == [
                (h.ids.tolist(), h.score, h.finished) for h in other
            ]
            assert [h.text.rstrip() for h in one] == [h.text for h in other]
    for n in range(1, 6):  # one that is spread over two words
        best = beam_search(world, "", 1, n, stop="d c")[0]
        loop = generate(world, "", max_new_tokens=n, stop="d c")
        assert (best.text, best.ids.tolist()) == (loop.text, loop.ids.tolist())
        assert best.finished == (loop.reason in ("stop", "eos"))
        again = pickle.loads(pickle.dumps(best))
        assert (again.text, repr(again)) == (best.text, repr(best))


def test_other_searches_refuse_stop_strings():
    for search in (exhaustive_search, best_first_search, greedy_search):
        with pytest.raises(ValueError, match="stop: 'I' is text; such a search compares ids"):
            search(six_words(), "", 3, stop="I")


def test_a_kept_prompt_changes_no_beam():
    gpt = GPT(GPTConfig("abcdef", context=24, width=16, heads=2)).requires_grad_(False)
    first = torch.randint(2, 8, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    kept = PromptCache(gpt, first)
    for prompts in ([first], [first + [3], first[:6] + [2, 2], first + [4, 5, 6]]):
        got = beam_search(gpt, prompts, 3, 6, n_best=3, cache=kept)
        want = beam_search(gpt, prompts, 3, 6, n_best=3)
        for one, other in zip(got, want, strict=True):
            assert [h.ids.tolist() for h in one] == [h.ids.tolist() for h in other]
            assert max(abs(a.logprob - b.logprob) for a, b in zip(one, other)) < 1e-4
        for got, want in zip(
            greedy_search(gpt, prompts, 6, cache=kept), greedy_search(gpt, prompts, 6), strict=True
        ):
            assert got.ids.equal(want.ids) and abs(got.logprob - want.logprob) < 1e-4
        for batch in (1, 3):
            both = [
                best_first_search(gpt, prompts, 4, n_best=3, batch=batch, cache=held)
                for held in (kept, None)
            ]
            for one, other in zip(*both, strict=True):
                assert [h.ids.tolist() for h in one] == [h.ids.tolist() for h in other]
    read = []
    with gpt.register_forward_pre_hook(lambda model, args: read.append(args[0].shape[1])):
        greedy_search(gpt, first + [3, 4], 2, ignore_eos=True, cache=kept)
    assert read == [2, 1]
    for search in (greedy_search, best_first_search, partial(beam_search, width=2)):
        with pytest.raises(TypeError, match="cache: 7 is not a PromptCache"):
            search(gpt, first, max_new_tokens=3, cache=7)
