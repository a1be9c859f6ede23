"""Search: the oracle's cases, brute force over random worlds, ties, caches, batches and refusals."""
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from decoding_book.beam import beam_search, row_best
from decoding_book.exhaustive import (Hypotheses, best_first_search, exhaustive_search, n_largest,
                                      search_cost)
from decoding_book.greedy import greedy_search, repeated_ngrams
from decoding_book.loop import Prediction, generate, score
from decoding_book.toy import TableModel, sequence_law, six_words
from decoding_book.trees import bands, beam_html, branches, tree_html

DATA = np.load(Path(__file__).parent / "oracle" / "open.npz", allow_pickle=False)
CASES = sorted({k[:7] for k in DATA.files if k.startswith("sea_")})


class Counted:
    """A model that counts calls and rows."""
    def __init__(self, model):
        self.model, self.calls, self.rows = model, 0, 0
        for name in ("vocab_size", "eos", "start_ids", "context", "encode", "decode"):
            if hasattr(model, name): setattr(self, name, getattr(model, name))

    def __call__(self, ids, **options):
        self.calls, self.rows = self.calls + 1, self.rows + len(ids)
        return self.model(ids, **options)


def case(name):
    get = lambda field: DATA[f"{name}_{field}"]
    eos = int(get("eos")) if get("eos") >= 0 else None
    if f"{name}_init" in DATA: model = TableModel(get("init"), get("trans"), eos=eos)
    else: model = TableModel.from_tree([get(f"cond{t}") for t in range(int(get("T")))], eos=eos)
    return Counted(model), int(get("T")), get


def padded(hypothesis, T): return hypothesis.ids.tolist() + [-1] * (T - len(hypothesis))


def test_all_cases_are_there(): assert len(CASES) == 24


@pytest.mark.parametrize("name", CASES)
def test_oracle_best(name):
    model, T, get = case(name)
    exhaustive = exhaustive_search(model, "", T)
    assert model.calls <= T and model.rows == exhaustive.rows
    for found in exhaustive, best_first_search(model, "", T), best_first_search(model, "", T, n_best=10, batch=7, chunk=2):
        assert padded(found[0], T) == get("best_seq").tolist()
        assert abs(found[0].logprob - get("best_logp")) < 1e-9 and found.proven


@pytest.mark.parametrize("name", CASES)
def test_oracle_greedy(name):
    model, T, get = case(name)
    found = greedy_search(model, "", T)
    assert padded(found, T) == get("greedy_seq").tolist()
    assert abs(found.logprob - get("greedy_logp")) < 1e-9 and found.logprob == found.score
    assert model.rows == len(found) and found.finished == (found.ids[-1].item() == model.eos)


@pytest.mark.parametrize("name", CASES)
def test_oracle_beam(name):
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
        z = torch.randn((V,) * (t + 1), generator=g, dtype=torch.float64) * (.5, 1.5, 3.)[seed % 3]
        if seed % 5 == 0: z[torch.rand(z.shape, generator=g) < .2] = -torch.inf
        z[..., -1] = z[..., -1].clamp(min=-5)           # one word is always possible
        tree.append(z.softmax(-1))
    return tree, V, T, V - 1 if seed % 2 else 0


def brute_force(tree, V, T, eos):
    """Every complete text, best first, by recursion over plain numbers."""
    found = []
    def visit(ids, p):
        if ids and (ids[-1] == eos or len(ids) == T):
            return found.append((-p, ids))
        for w, q in enumerate(tree[len(ids)][ids].tolist()):
            if q > 0: visit(ids + (w,), p + math.log(q))
    visit((), 0.)
    return sorted(found)


def test_brute_force(full, record):
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
            assert [tuple(h.ids.tolist()) for h in found] == [ids for _, ids in truth[:len(found)]]
            assert max(abs(h.logprob + p) for h, (p, _) in zip(found, truth)) < 1e-9
        assert len(every) == len(first) == min(12, len(truth))
        assert one.rows <= T * math.exp(truth[0][0]) + 1e-9     # T / probability of the best
        assert [h.finished for h in every] == [ids[-1] == eos for _, ids in truth[:12]]
        for k in widths:
            found = beam_search(model, "", k, T)
            assert found[0].ids.equal(beam_search(model, "", k, T, early_stopping=False)[0].ids)
            if k == 1: assert found[0].ids.equal(greedy_search(model, "", T).ids)
            regrets[k].append(-truth[0][0] - found[0].logprob)
            missed[k] += regrets[k][-1] > 1e-9
        whole = beam_search(model, "", V ** (T - 1), T)
        assert tuple(whole[0].ids.tolist()) == truth[0][1]
    assert min(map(min, regrets.values())) > -1e-9
    assert sum(regrets[1]) > sum(regrets[2]) > sum(regrets[4])
    record("regret over random worlds with end marks", {
        "worlds": worlds, "missed by width": missed,
        "mean regret in nats": {k: round(sum(r) / worlds, 5) for k, r in regrets.items()},
        "largest regret in nats": {k: round(max(r), 3) for k, r in regrets.items()}})


@pytest.mark.parametrize("mode", [None, "never", False, True])
@pytest.mark.parametrize("penalty", [0., .7, 1., 2., -.5])
def test_length_penalty_and_stopping(mode, penalty):
    for seed in range(12):
        tree, V, T, eos = world(seed)
        model = TableModel.from_tree(tree, eos=eos)
        ranked = sorted((p / len(ids) ** penalty, ids) for p, ids in brute_force(tree, V, T, eos))
        found = beam_search(model, "", V ** (T - 1), T, penalty, n_best=2, early_stopping=mode)
        assert all(abs(h.score - h.logprob / len(h) ** penalty) < 1e-12 for h in found)
        if mode is not True:
            assert [tuple(h.ids.tolist()) for h in found] == [ids for _, ids in ranked[:len(found)]]
        narrow = [beam_search(model, "", 3, T, penalty, n_best=2, early_stopping=m) for m in ("never", False, True)]
        a, b = ([(h.ids.tolist(), h.score) for h in one] for one in narrow[:2])
        assert a == b and narrow[2].rows <= narrow[1].rows <= narrow[0].rows


# Ties

def test_ties_go_to_smaller_ids():
    V, T = 3, 3
    flat = TableModel.from_tree([torch.full((V,) * (t + 1), 1 / V) for t in range(T)])
    first = [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1]]
    for found in (exhaustive_search(flat, "", T, n_best=5), best_first_search(flat, "", T, n_best=5, chunk=1),
                  best_first_search(flat, "", T, n_best=5, batch=4), beam_search(flat, "", 5, T, n_best=5)):
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
                got = sorted(i for i, lp in zip(at[r].tolist(), logp[r].tolist()) if lp > -torch.inf)
                assert got == sorted(real)
        assert n_largest(z[0], 7).tolist() == orders[0][:7]


# Caches and batches

class Remembered:
    """A table behind the cache contract: ids and masks are kept, positions and rows are checked."""
    def __init__(self, rows, length): self.capacity, self.ids, self.mask = (rows, length), None, None

    @property
    def length(self): return 0 if self.ids is None else self.ids.shape[1]

    def reorder(self, rows):
        assert len(rows) <= self.capacity[0]
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    keep = reorder


class Cached(Counted):
    def __init__(self, model): super().__init__(model); self.fed, self.caches = [], []

    def new_cache(self, rows, length):
        self.caches.append(Remembered(rows, length))
        return self.caches[-1]

    def __call__(self, ids, mask=None, cache=None, **options):
        self.fed.append(tuple(ids.shape))
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        if cache is not None:
            if cache.length: ids, mask = torch.cat([cache.ids, ids], 1), torch.cat([cache.mask, mask], 1)
            cache.ids, cache.mask = ids, mask
            assert ids.shape[0] <= cache.capacity[0] and ids.shape[1] <= cache.capacity[1]
        self.rows += len(ids)
        logits = []
        for row, real in zip(ids, mask): logits.append(self.model(row[real][None], **options).logits)
        return Prediction(torch.cat(logits), cache)


def markov(V=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(V + 1, V, generator=g, dtype=torch.float64) * 1.5
    return TableModel(z[0].softmax(-1), z[1:].softmax(-1), eos=V - 1)


class Deep:
    """Logits that depend on every id and its place."""
    vocab_size, eos, start_ids = 6, 5, []
    table = torch.randn(97, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1.5

    places = torch.tensor([0, 3, 7, 13, 29, 31, 41, 53, 61, 71, 83, 89, 11, 17])

    def __call__(self, ids, mask=None, **options):
        mask = torch.ones_like(ids) if mask is None else mask.long()
        places = self.places[mask.cumsum(1)] * mask
        return Prediction(self.table[((ids + 1) * places).sum(1) % 97])


@pytest.mark.parametrize("dialect, width", [(None, 1), (None, 2), (None, 5), ("huggingface", 3)])
def test_beam_with_a_cache(dialect, width):
    prompts = [[1, 2, 3], [4], [0, 0, 2, 1, 3]]
    plain, cached = Deep(), Cached(Deep())
    options = dict(n_best=width, length_penalty=.5, dialect=dialect)
    a, b = (beam_search(m, prompts, width, 7, **options) for m in (plain, cached))
    for one, other, prompt in zip(a, b, prompts):
        alone = beam_search(plain, prompt, width, 7, **options)
        expected = [(h.ids.tolist(), h.score) for h in one]
        assert expected == [(h.ids.tolist(), h.score) for h in other] == [(h.ids.tolist(), h.score) for h in alone]
        assert one.rows == other.rows == alone.rows
    assert cached.fed[0] == (3, 5)                          # the prompts once, one row each
    assert all(shape[1] == 1 for shape in cached.fed[1:])   # then only the newest ids
    assert len(cached.caches) == 1 and cached.caches[0].capacity == (3 * width, 5 + 7)
    assert cached.rows == sum(h.rows for h in b)


def test_best_first_with_a_cache():
    for prompt in ([2], [1, 2, 3], [0, 3, 3, 1]):
        plain, cached = Deep(), Cached(Deep())
        a, b = (best_first_search(m, prompt, 5, n_best=6, batch=3) for m in (plain, cached))
        assert [(h.ids.tolist(), h.logprob) for h in a] == [(h.ids.tolist(), h.logprob) for h in b]
        if len(prompt) > 1: assert cached.fed[0] == (1, len(prompt) - 1)
        assert max(T for _, T in cached.fed[1:]) <= 5


def test_scores_are_the_models_own():
    model = markov()
    for found in (beam_search(model, [1, 2], 4, 6, n_best=4), exhaustive_search(model, [1, 2], 4),
                  best_first_search(model, [1, 2], 4, n_best=3)):
        for h in found:
            whole = score(model, [1, 2] + h.ids.tolist())[0, 2:]
            assert torch.allclose(whole, h.logprobs, atol=1e-12) and abs(whole.sum() - h.logprob) < 1e-12


class Shifted(Counted):
    """The same distributions from logits that are not log-probabilities."""
    def __call__(self, ids, **options):
        p = super().__call__(ids, **options)
        return Prediction(p.logits + 3. + ids.sum(-1, keepdim=True))


def test_logits_need_not_be_normalised():
    plain, shifted = markov(), Shifted(markov())
    for search in (lambda m: beam_search(m, [1], 3, 5, n_best=3), lambda m: exhaustive_search(m, [1], 4),
                   lambda m: best_first_search(m, [1], 4, n_best=5), lambda m: [greedy_search(m, [1], 5)]):
        for h, g in zip(search(plain), search(shifted), strict=True):
            assert h.ids.equal(g.ids) and abs(h.logprob - g.logprob) < 1e-9


def test_greedy_batches():
    prompts = [[1, 2, 3], [4], [0, 0, 2, 1, 3]]
    for one, prompt in zip(greedy_search(markov(), prompts, 6), prompts, strict=True):
        alone = greedy_search(markov(), prompt, 6)
        assert one.ids.equal(alone.ids) and one.logprob == alone.logprob and one.prompt_ids.tolist() == prompt
    assert greedy_search(markov(), [1], 6, stop=[0, 1, 2, 3, 4]).finished
    ended = next(p for p in range(5) if greedy_search(markov(), [p], 6).finished)
    assert len(greedy_search(markov(), [ended], 6, ignore_eos=True)) == 6
    with pytest.raises(ValueError, match="a search compares ids"): greedy_search(six_words(), "", 5, stop="I")


def test_end_marks_of_the_call():
    model = markov()
    for search in (lambda **o: beam_search(model, [1], 4, 5, n_best=4, **o),
                   lambda **o: exhaustive_search(model, [1], 5, **o), lambda **o: best_first_search(model, [1], 5, n_best=4, **o)):
        for h in search(stop=2):
            ends = [i for i, id in enumerate(h.ids.tolist()) if id in (2, 5)]
            assert ends in ([], [len(h) - 1]) and h.finished == bool(ends)
        for h in search(stop=2, ignore_eos=True):
            assert [i for i, id in enumerate(h.ids.tolist()) if id == 2] in ([], [len(h) - 1])
        assert not any(h.finished for h in search(ignore_eos=True))


def test_context_limits_the_length():
    deep = six_words(eos=None)
    for found in exhaustive_search(deep, "I like", 64), beam_search(deep, "I like", 2, 64), best_first_search(deep, "I like", 64):
        assert len(found[0]) == 3 and not found[0].finished


# Refusals

class Numbers:
    """A large vocabulary that must never be asked."""
    vocab_size, eos, start_ids = 49152, 2, []
    def __call__(self, ids, **options): raise AssertionError("asked")


def test_refused():
    w = six_words()
    refusals = [
        (lambda: exhaustive_search(Numbers(), [], 3), "49152^3 = 118,747,255,799,808 texts"),
        (lambda: exhaustive_search(w, "", 5, limit=7775), "best_first_search"),
        (lambda: exhaustive_search(w, "", 0), "max_new_tokens: 0"),
        (lambda: exhaustive_search(w, "", 5, n_best=0), "n_best: 0"),
        (lambda: exhaustive_search(w, "I like cold coffee stop", 5), "no room in a context of 5"),
        (lambda: best_first_search(w, "", 5, max_rows=0), "max_rows: 0"),
        (lambda: best_first_search(w, "", 5, stop="I"), "a search compares ids"),
        (lambda: best_first_search(w, "", 5, stop=9), "outside the vocabulary"),
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
        with pytest.raises(ValueError) as error: call()
        assert text in str(error.value), error.value


@pytest.mark.parametrize("bad, text", [(-math.inf, "no finite logit"), (math.nan, "NaN"), (math.inf, "+inf")])
def test_a_row_that_is_no_distribution_is_refused(bad, text):
    class Broken(Counted):
        def __call__(self, ids, **options):
            p = super().__call__(ids, **options)
            if ids.shape[1] == 2: p.logits = p.logits.clone().fill_(bad)
            return p
    for search in (lambda m: exhaustive_search(m, "", 5), lambda m: best_first_search(m, "", 5, n_best=500),
                   lambda m: beam_search(m, "", 3, 5)):
        with pytest.raises(ValueError, match="logits: row 0") as error: search(Broken(six_words()))
        assert text in str(error.value)


def test_giving_up_says_so():
    truth = exhaustive_search(six_words(), "", 5)[0].logprob
    for rows in (1, 5, 10):
        found = best_first_search(six_words(), "", 5, max_rows=rows)
        assert not found.proven and found.rows <= rows and found.bound >= truth - 1e-12
        assert "not proven" in repr(found)
    assert best_first_search(six_words(), "", 5).proven


def test_the_cost_is_said_before_the_work(capsys):
    assert search_cost(6, 5)[:2] == (7776, 1555)
    exhaustive_search(six_words(), "", 5, progress=True)
    assert "6^5 = 7,776 texts" in capsys.readouterr().err


# Views

def test_hypotheses_show_themselves():
    for found in (beam_search(six_words(), "", 2, 5, n_best=2), exhaustive_search(six_words(), "", 5),
                  beam_search(six_words(), "", 2, 5, length_penalty=1., dialect="huggingface"),
                  beam_search(six_words(), ["I", "cold"], 2, 3)):
        html = found._repr_html_()
        assert "coffee" in html and "<script" not in html
    assert "0.0358" in repr(exhaustive_search(six_words(), "", 5)[0])
    assert beam_search(six_words(), "", 2, 5)._repr_html_().count("<svg") == 1
    assert beam_search(six_words(), "", 2, 5)[0]._repr_html_().count("db-t") > 4
    assert Hypotheses([])._repr_html_() and len(repr(Hypotheses([])))


def drawing(html): return ElementTree.fromstring(re.search(r"<svg.*</svg>", html, re.S)[0])

SVG = "{http://www.w3.org/2000/svg}"


def test_tree_bands_fit():
    w = six_words()
    law = {tuple(w.words[i] for i in ids): p for ids, p in sequence_law(w, 5).items()}
    mass, after = branches(law)
    assert abs(mass[()] - 1) < 1e-9 and abs(mass[("cold",)] - .25) < 1e-9
    assert after[()][:2] == [("I",), ("cold",)]             # the most probable on top
    for least in (0., .002, .05):
        found = bands(law, least)
        for level in range(1, 6):
            spans = sorted((top, h) for _, n, top, h, _ in found if n == level)
            assert all(a + h <= b + 1e-9 for (a, h), (b, _) in zip(spans, spans[1:]))
        assert sum(n for prefix, *_, n in found if prefix is None or prefix in law) == len(law)
        assert all(h >= least for prefix, _, _, h, _ in found if prefix is not None)
    assert [round(b[3], 9) for b in bands({("a",): .5, ("b",): .3, ("c",): .2}, .4)] == [.5, .5]


def test_tree_labels_are_inside_their_bands():
    w = six_words()
    law = {tuple(w.words[i] for i in ids): p for ids, p in sequence_law(w, 5).items()}
    best, greedy = "cold coffee I like stop".split(), "I like cold coffee stop".split()
    svg = drawing(tree_html(law, {"best": best, "greedy": greedy}))
    rects = [[float(r.get(k)) for k in ("x", "y", "width", "height")] for r in svg.iter(f"{SVG}rect") if r.get("class") is None]
    right = max(x + width for x, _, width, _ in rects)
    for text in svg.iter(f"{SVG}text"):
        x, y = float(text.get("x")), float(text.get("y"))
        if x > right: continue                              # the names of the paths
        size = 9.5 if text.get("class") else 11
        inside = [r for r in rects if r[0] < x < r[0] + r[2] and r[1] - 1.5 <= y - .75 * size and y <= r[1] + r[3] + .5]
        assert len(inside) == 1, "".join(text.itertext())
        assert x + .62 * size * len("".join(text.itertext())) <= inside[0][0] + inside[0][2] + 2
    assert len([r for r in svg.iter(f"{SVG}rect") if r.get("class") == "p"]) == 10
    titles = ["".join(t.itertext()) for t in svg.iter(f"{SVG}title")]
    assert any(t.startswith("cold coffee I like stop: 3.6 %") for t in titles)
    assert {"best", "greedy"} <= {"".join(t.itertext()) for t in svg.iter(f"{SVG}text")}


def test_names_of_equal_paths_stand_apart():
    text = ("a", "b")
    svg = drawing(tree_html({text: 1.}, {"greedy": text, "beam": text, "best": text}, tall=60))
    names = [float(t.get("y")) for t in svg.iter(f"{SVG}text") if "".join(t.itertext()) in ("greedy", "beam", "best")]
    assert len(names) == 3 and all(b - a >= 14 for a, b in zip(sorted(names), sorted(names)[1:]))


def test_paths_outside_the_tree_are_refused():
    with pytest.raises(ValueError, match=r"paths: 'best' is \('b',\)"): tree_html({("a",): 1.}, {"best": ("b",)})
    for bad in ({("a",): 1.1}, {("a",): -.5, ("b",): 1.}, {}):
        with pytest.raises(ValueError, match="probabilities sum to"): branches(bad)


def test_repeated_ngrams():
    assert repeated_ngrams([1, 2, 3, 4, 5, 6, 7]) == 0 and repeated_ngrams([1, 2, 3]) == 0
    assert repeated_ngrams(torch.tensor([1, 2] * 4), 2) == 1 - 2 / 7          # (1,2) and (2,1) out of seven
    assert repeated_ngrams([1, 1], 1) == .5 and repeated_ngrams([3, 1, 2, 3, 4, 1, 2, 3], 3) == 1 - 5 / 6
    with pytest.raises(ValueError, match="n: 0 is below 1"): repeated_ngrams([1, 2], 0)


def test_beam_boxes_do_not_overlap():
    found = beam_search(six_words(), "", 3, 5)
    svg = drawing(found._beam_html())
    boxes = [(float(r.get("x")), float(r.get("y"))) for r in svg.iter(f"{SVG}rect") if r.get("rx")]
    assert len(boxes) == len(set(boxes)) == sum(len(kept) + len(cut) for kept, cut in found.steps)
    for x, y in boxes: assert not [1 for u, v in boxes if (u, v) != (x, y) and abs(u - x) < 54 and abs(v - y) < 28]
    wins = [r for r in svg.iter(f"{SVG}rect") if r.get("class") == "win"]
    assert len(wins) == 5 and "win" in found._beam_html()
    with pytest.raises(ValueError, match="empty"): beam_html([])
