"""The five-branch policy: decisions against the oracle, exact laws, rows alone and together, the
clarifying token, hostile settings."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import laws
from helpers.pretend_gpu import OnGPU, PretendGPU, Waits, bare
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_book import entropix as module
from decoding_book.entropix import (
    ACTIONS,
    BRANCHES,
    BranchView,
    Decision,
    EntropixConfig,
    EntropySampler,
    PublishedConfig,
    best_of,
    calibrate,
    draw_decided,
    just_asked,
)
from decoding_book.entropy import Measures, measure
from decoding_book.loop import Context, Prediction, generate
from decoding_book.noise import Key, gumbel_max
from decoding_book.sampler import Sampler, draw
from decoding_book.toy import six_words
from decoding_book.transformer import GPT, GPTConfig

INF, NAN = float("inf"), float("nan")
DATA = np.load(Path(__file__).parent / "oracle/cases.npz", allow_pickle=False)
FIELDS = [str(n) for n in DATA["dec_config_fields"]]
USUAL = EntropixConfig().typical


def published(i):
    "The configuration of an oracle case."
    whole = {"top_k", "n_adaptive_samples"}
    return PublishedConfig(
        **{n: int(v) if n in whole else float(v) for n, v in zip(FIELDS, DATA["dec_config"][i])}
    )


def measures_of(rows):
    "`Measures` from rows of the oracle's six numbers, its agreement being the published one."
    e, v, ae, av, d, s = torch.tensor(np.atleast_2d(rows)).double().unbind(1)
    return Measures(e, v, ae, av, 1 - d, d, s)


def one(**values):
    "Measures of one row, usual where nothing is given."
    usual = dict(zip(vars(Measures(0, 0)), (*USUAL[:5], 0.01, USUAL[5])))
    return Measures(**{n: torch.tensor([float(x)]).double() for n, x in (usual | values).items()})


NO, YES = torch.tensor([False]), torch.tensor([True])


def context(n, given=1, ids=None):
    "A context for rows of logits that come from nowhere."
    ids = torch.zeros(n, given, dtype=torch.long) if ids is None else ids
    return Context(
        ids, torch.ones_like(ids, dtype=torch.bool), torch.full((n,), given), torch.arange(n)
    )


# ---------------------------------------------------------------- as published


def test_oracle_decisions_are_made_again():
    for i in range(40):
        d = EntropySampler(published(i)).decide(
            measures_of(DATA["dec_metrics"][i]), torch.tensor([bool(DATA["dec_asked"][i])])
        )
        assert (d.branch.item(), d.action.item()) == (
            DATA["dec_branch"][i],
            DATA["dec_action"][i],
        ), i
        got = [x.item() for x in (d.temperature, d.top_p, d.top_k, d.min_p)]
        np.testing.assert_allclose(got, DATA["dec_params"][i], atol=1e-9, rtol=0, err_msg=str(i))
    assert set(DATA["dec_branch"].tolist()) == {0, 1, 2, 3, 4}


def test_oracle_decisions_as_one_batch():
    even = [i for i in range(40) if i % 2 == 0]  # they share the default configuration
    assert all(published(i) == PublishedConfig() for i in even)
    d = EntropySampler(PublishedConfig()).decide(
        measures_of(DATA["dec_metrics"][even]), torch.tensor(DATA["dec_asked"][even]).bool()
    )
    assert (
        d.branch.tolist() == DATA["dec_branch"][even].tolist()
        and d.action.tolist() == DATA["dec_action"][even].tolist()
    )
    got = torch.stack([d.temperature, d.top_p, d.top_k.double(), d.min_p], 1)
    np.testing.assert_allclose(got, DATA["dec_params"][even], atol=1e-9, rtol=0)


def test_the_published_fields_are_those_of_the_oracle():
    assert [f.name for f in dataclasses.fields(PublishedConfig)] == FIELDS
    assert not {n for n in FIELDS if n.startswith("ada_score") or n.startswith("med")} & set(
        vars(EntropixConfig())
    )


def test_the_confidence_is_the_same_for_every_draw():
    "The oracle's constant part, from the fields; it cannot choose among draws."
    for i in range(40):
        if DATA["dec_branch"][i] != 4:
            continue
        c, (e, v, ae, av, d, s) = published(i), DATA["dec_metrics"][i]
        sum_ = (
            (1 - e) * c.ada_score_logits_ent
            + (1 - ae) * c.ada_score_attn_ent
            + (1 - v) * c.ada_score_logits_vent
            + (1 - av) * c.ada_score_attn_vent
            + d * c.ada_score_agree
            + s * c.ada_score_int
        )
        assert sum_ == pytest.approx(DATA["dec_confidence"][i], abs=1e-9)
        less = dataclasses.replace(c, **{f: 0.0 for f in FIELDS if f.startswith("ada_score")})
        a, b = (EntropySampler(x).decide(measures_of(DATA["dec_metrics"][i])) for x in (c, less))
        for x, y in zip(vars(a).values(), vars(b).values()):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_the_middle_threshold_is_dead_as_published():
    m = measures_of(np.random.default_rng(0).uniform(0, 9, (20_000, 6)))
    branches = [
        PublishedConfig(med_ent_thresh=x).decide(m, torch.zeros(20_000).bool()).branch
        for x in (0.1, 1.0, 3.0, 5.0)
    ]
    assert all(b.equal(branches[0]) for b in branches) and branches[0].unique().tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


# ---------------------------------------------------------------- repaired


def by_hand(c, e, v, ae, av, agree, s, asked):
    "The repaired policy for one row in plain Python."
    share = [x / (x + t) for x, t in zip((e, v, ae, av, agree, s), c.typical)]
    E, V, AE, AV, _, S = share
    low, high, calm, wild = (
        e < c.low_ent_thresh,
        e > c.high_ent_thresh,
        v < c.low_vent_thresh,
        v > c.high_vent_thresh,
    )
    rules = (low and calm, high and calm, low and wild, high and wild, True)
    branch = rules.index(True)
    if branch == 0 or branch == 1 and not asked:
        return branch, branch, NAN, NAN, -1, NAN
    T, p, k, m = c.temp, c.top_p, c.top_k, c.min_p
    if branch == 1:
        T *= c.helv_attn_ent_offset + c.helv_attn_ent_coef * AE
    if branch == 2:
        T *= c.lehv_interaction_strength_offset + c.lehv_interaction_strength_coef * S
        k = round(k * (1 + 0.5 * (1 - agree)))
    if branch == 3:
        T *= c.hehv_attn_vent_offset + c.hehv_attn_vent_coef * AV
        p = max(0.5, p - c.hehv_attn_ent_coef * AE)
    if branch == 4:
        T *= (
            1 + c.ada_temp_logits * (E + V) + c.ada_temp_attn * (AE + AV) - c.ada_temp_agree * agree
        )
        p, k = (
            min(1, p * (1 + c.ada_top_p * AV)),
            round(k * (1 + c.ada_top_k_int * S - c.ada_top_k_agree * agree)),
        )
        m = min(1, max(0, m * (1 - c.ada_min_p * (E + V))))
    return branch, 3 if branch == 4 else 2, min(max(T, 0), c.max_temp), p, max(1, k), m


def test_repaired_decisions_by_hand(full):
    rng, n, seen = np.random.default_rng(1), 5000 if full else 600, set()
    rows = rng.uniform(0, 1, (n, 6)) * [11, 30, 5, 2, 1, 8]
    rows[:, 4] = 1 - rows[:, 4]
    asked = rng.random(n) < 0.5
    for c in (
        EntropixConfig(),
        EntropixConfig(temp=1.3, top_k=5, max_temp=1.2, low_ent_thresh=5.0, ada_min_p=2.0),
    ):
        d = c.decide(measures_of(rows), torch.tensor(asked))
        got = torch.stack([x.double() for x in vars(d).values()], 1).numpy()
        for i, (e, v, ae, av, dis, s) in enumerate(rows):
            want = by_hand(c, e, v, ae, av, 1 - dis, s, asked[i])
            np.testing.assert_allclose(got[i], want, atol=1e-9, err_msg=str((i, rows[i])))
            seen.add(want[:2])
    assert seen == {(0, 0), (1, 1), (1, 2), (2, 2), (3, 2), (4, 3)}


@settings(deadline=None, max_examples=150)
@given(st.lists(st.floats(0, 1e4), min_size=6, max_size=6))
def test_repaired_parameters_are_always_usable(row):
    row[4] = min(row[4], 1.0)
    d = EntropixConfig().decide(measures_of(row), YES)
    if d.action < 2:
        return
    assert (
        0 <= d.temperature <= EntropixConfig().max_temp
        and 0 < d.top_p <= 1
        and d.top_k >= 1
        and 0 <= d.min_p <= 1
    )
    Sampler(temperature=d.temperature, top_p=d.top_p, top_k=d.top_k, min_p=d.min_p)


def test_agreement_has_its_right_sign():
    wide, narrow = (
        EntropixConfig().decide(one(entropy=3, varentropy=20, agreement=a), NO).top_k
        for a in (0.0, 1.0)
    )
    assert wide == 40 and narrow == 27
    hot, cool = (EntropixConfig().decide(one(agreement=a), NO).temperature for a in (0.0, 1.0))
    assert hot > cool


@pytest.mark.parametrize(
    "name,row", [("LELV", (1, 1)), ("HELV", (9, 1)), ("LEHV", (1, 20)), ("HEHV", (9, 20))]
)
def test_a_branch_can_be_off(name, row):
    m = one(entropy=row[0], varentropy=row[1])
    assert BRANCHES[EntropixConfig().decide(m, YES).branch] == name
    assert BRANCHES[EntropixConfig(off=(name,)).decide(m, YES).branch] == "adaptive"
    others = tuple(set(BRANCHES) - {name})
    assert BRANCHES[EntropixConfig(off=others).decide(m, YES).branch] == name


def test_adaptive_off_is_a_plain_draw():
    d = EntropixConfig(off=("adaptive",)).decide(one(), NO)
    c = EntropixConfig()
    assert (BRANCHES[d.branch], ACTIONS[d.action]) == ("adaptive", "draw")
    assert (d.temperature, d.top_p, d.top_k, d.min_p) == (c.temp, c.top_p, c.top_k, c.min_p)


def test_without_attention_the_usual_values_stand_in():
    bare = Measures(torch.tensor([4.0, 1.0, 9.0]), torch.tensor([11.0, 20.0, 20.0]))
    usual = measures_of(
        [[e, v, *USUAL[2:4], 1 - USUAL[4], USUAL[5]] for e, v in ((4, 11), (1, 20), (9, 20))]
    )
    a, b = (EntropixConfig().decide(m, torch.zeros(3).bool()) for m in (bare, usual))
    for x, y in zip(vars(a).values(), vars(b).values()):
        torch.testing.assert_close(x, y, equal_nan=True)


# ---------------------------------------------------------------- the draw


def test_best_of_by_counting():
    q = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1], dtype=torch.float64)
    for n in (1, 2, 5):
        law = torch.zeros(5, dtype=torch.float64)
        for draws in torch.cartesian_prod(*[torch.arange(5)] * n).reshape(-1, n):
            best = min(draws.tolist(), key=lambda i: (-q[i], i))
            law[best] += q[draws].prod()
        torch.testing.assert_close(best_of(q, n), law, atol=1e-12, rtol=0)
    torch.testing.assert_close(best_of(torch.stack([q, q.flip(0)]), 3)[1], best_of(q.flip(0), 3))
    assert best_of(torch.tensor([0.0, 1.0, 0.0]), 4).tolist() == [0, 1, 0]


TOY = dict(low_ent_thresh=0.8, high_ent_thresh=2.3, low_vent_thresh=0.8, high_vent_thresh=1.7)
FIVE = (
    torch.tensor(
        [
            [0.993] + [0.001] * 7,
            [0.125] * 8,
            [0.90] + [0.10 / 7] * 7,
            [0.50] + [0.50 / 7] * 7,
            [0.45, 0.3, 0.2, 0.01, 0.01, 0.01, 0.01, 0.01],
        ]
    )
    .double()
    .log()
)


def chi_square(counts, q):
    "p-value of counts; what is impossible must not have come."
    counts = np.asarray(counts, float)
    n = counts.sum()
    assert counts[np.asarray(q, float) * n < 1e-9].sum() == 0
    return laws.chi_square(counts, q, n)


@pytest.mark.parametrize(
    "config",
    [
        EntropixConfig(**TOY),
        EntropixConfig(**TOY, n_adaptive_samples=5, temp=1.5, top_k=7),
        PublishedConfig(**TOY | dict(med_ent_thresh=1.0)),
        EntropixConfig(**TOY, off=("adaptive",)),
    ],
)
@pytest.mark.parametrize("clarify", [None, 7])
def test_draws_follow_their_exact_law(config, clarify, full, record):
    n = 200_000 if full else 10_000
    chooser = EntropySampler(config, seed=5, clarify=clarify, attention=False)
    decision = chooser.decide(measure(Prediction(FIVE)), torch.full((5,), clarify is None))
    assert decision.branch.tolist() == [0, 1, 2, 3, 4]
    law, counts, at_once = chooser.law(FIVE, decision), torch.zeros(5, 8), 10_000
    torch.testing.assert_close(law.sum(1), torch.ones(5).double())
    for start in range(0, n, at_once):
        c = context(5 * at_once, given=1 + start // at_once)
        out = chooser(Prediction(FIVE.repeat(at_once, 1)), c)
        for i in range(5):
            counts[i] += out.ids[i::5].bincount(minlength=8)
    p = [chi_square(counts[i], law[i]) for i in range(5)]
    record(
        f"chi2_policy_{type(config).__name__}_{config.n_adaptive_samples}_{clarify}",
        {"draws": n, "p": p},
    )
    assert min(p) > 1e-5


def test_the_branches_use_the_book_s_own_draw():
    """LELV is argmax; a branch that draws once gives the token of `draw` with the same key; the
    fifth the best of its numbered draws."""
    chooser = EntropySampler(EntropixConfig(**TOY), seed=9, attention=False)
    c = context(5, given=4)
    out = chooser(Prediction(FIVE), c)
    d, key = out.decision, Key(9, torch.arange(5), c.lengths)
    assert out.ids[0] == FIVE[0].argmax()
    sampler = Sampler(
        temperature=d.temperature.nan_to_num(1),
        top_p=d.top_p.nan_to_num(1),
        top_k=d.top_k.clamp(min=0),
        min_p=d.min_p.nan_to_num(0),
    )
    plain = draw(FIVE, sampler, key)
    assert out.ids[1:4].equal(plain.ids[1:4]) and out.kept[2:4].equal(plain.kept[2:4])
    many = [
        draw(FIVE, sampler, Key(9, torch.arange(5), c.lengths, j)).ids[4].item() for j in range(2)
    ]
    assert out.ids[4] == max(many, key=lambda i: FIVE[4, i])


def test_one_adaptive_sample_is_the_plain_draw():
    c = EntropixConfig(
        **TOY,
        n_adaptive_samples=1,
        off=("LELV", "HELV", "LEHV", "HEHV", "adaptive"),
        top_p=1.0,
        min_p=0.0,
        top_k=8,
        temp=1.0,
    )
    out = EntropySampler(c, seed=3, attention=False)(Prediction(FIVE), context(5, given=2))
    assert out.ids.equal(gumbel_max(FIVE, Key(3, torch.arange(5), 2)))


@pytest.mark.parametrize("config", [EntropixConfig(), PublishedConfig()])
def test_no_nan_anywhere(config):
    z = torch.full((4, 9), -INF)
    z[0, 3], z[1, :2], z[2], z[3, 2:5] = (
        1.0,
        torch.tensor([1.0, 2.0]),
        0.0,
        torch.tensor([50.0, -50.0, 0.0]),
    )
    scores, mask = torch.randn(4, 2, 3, 6), torch.arange(6) >= torch.tensor([[5], [0], [3], [2]])
    scores = scores.masked_fill(~mask[:, None, None], NAN)  # padding may hold anything
    out = EntropySampler(config)(Prediction(z, None, scores, mask), context(4))
    assert (
        out.ids[0] == 3 and out.ids[1] in (0, 1) and z.gather(1, out.ids[:, None]).isfinite().all()
    )
    for x in (*vars(out.measures).values(), out.entropy, out.varentropy):
        assert x.isfinite().all()
    assert (out.decision.temperature.isnan() == (out.decision.action < 2)).all()


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU without the kernels: what would make the processor wait raises. What was sent
    there is forgotten afterwards."""
    monkeypatch.setitem(sys.modules, "decoding_book.cuda", SimpleNamespace())
    caches = module.published_rules, module.repaired_rules, module.typical_of
    for c in caches:
        c.cache_clear()
    yield PretendGPU()
    for c in caches:
        c.cache_clear()


def first_of_each(logits, params, key, backend=None):
    "In place of the draw: the best token of noise that the key names; a row of NaN gets -1."
    ids = (
        logits.float() / params.temperature[:, None].float().clamp(min=0.1)
        + 3
        * torch.sin(
            key.draw[:, None] * 7.0
            + key.position[:, None]
            + torch.arange(logits.shape[1], device=logits.device)
        )
    ).argmax(1)
    ids = ids.masked_fill(logits.amax(1).isnan(), -1)
    return module.Draw(ids, None, torch.ones_like(ids))


@pytest.mark.parametrize(
    "config",
    [
        EntropixConfig(),
        EntropixConfig(**TOY),
        PublishedConfig(),
        EntropixConfig(off=("LELV", "adaptive")),
    ],
)
@pytest.mark.parametrize(
    "clarify,tokenizer",
    [(None, None), (3, None), ("why now", type("T", (), dict(encode=lambda self, s: [3, 1, 4]))())],
)
@pytest.mark.parametrize("attention", [True, False])
def test_the_decision_waits_for_nothing(gpu, monkeypatch, config, clarify, tokenizer, attention):
    """Measures, decision, numbered draws and the clarifying text: no look at a value on the GPU;
    ids and branches are the CPU's."""
    monkeypatch.setattr(module, "draw", first_of_each)
    scores, mask = (
        torch.randn(5, 2, 3, 6, generator=torch.Generator().manual_seed(0)),
        torch.arange(6) >= torch.tensor([[5], [0], [3], [2], [0]]),
    )
    prediction, found = (FIVE.float(), None, scores, mask), {}
    for wrap in (bare, OnGPU):
        chooser, found[wrap] = (
            EntropySampler(config, 7, clarify, tokenizer, attention, rows=[4, 0, 9, 1, 2]),
            [],
        )
        with gpu:
            for given in (1, 2, 3, 4):  # a clarifying text goes on over several steps
                c = context(5, ids=torch.tensor([[0, 3, 1, 4][:given]] * 5))
                c = Context(*map(wrap, (c.ids, c.mask, torch.ones(5, dtype=torch.long), c.row)))
                out = chooser(
                    Prediction(*(wrap(x) if torch.is_tensor(x) else x for x in prediction)), c
                )
                assert isinstance(out.ids, OnGPU) == (wrap is OnGPU)
                found[wrap].append((out.ids, out.branch, out.decision.action, out.decision.top_k))
    for a, b in zip(*found.values()):
        for x, y in zip(a, b):
            assert bare(x).equal(bare(y))


def test_a_bad_row_on_a_gpu_gets_no_token(gpu, monkeypatch):
    "A row of NaN passes unseen on a GPU and its id is -1; the others are as ever."
    monkeypatch.setattr(module, "draw", first_of_each)
    z = FIVE.float()
    z[4] = NAN
    decision = module.Decision(
        torch.full((5,), 4),
        torch.full((5,), 3),
        *torch.ones(2, 5),
        torch.full((5,), 9),
        torch.zeros(5),
    )
    on = module.Decision(*map(OnGPU, vars(decision).values()))
    with gpu:
        ids = module.draw_decided(
            OnGPU(z), on, Key(1, OnGPU(torch.arange(5)), OnGPU(torch.full((5,), 3))), 3
        )[0]
    good = module.draw_decided(
        FIVE.float(), decision, Key(1, torch.arange(5), torch.full((5,), 3)), 3
    )[0]
    assert bare(ids).tolist() == [*good[:4].tolist(), -1]


def test_the_pretended_gpu_would_notice(gpu):
    with gpu, pytest.raises(Waits):
        measure(Prediction(OnGPU(FIVE.float()))).entropy[0].item()


# ---------------------------------------------------------------- in the loop


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = GPT(GPTConfig(" abcdeg", context=60, width=16, layers=2, heads=2)).requires_grad_(False)
    model.head.weight *= 6  # an untrained one is too even
    return model.double()


TEXTS = ["a bad cab", "bead", "egg bag a bead", "ab"]


@pytest.fixture(scope="module")
def fitting(tiny):
    "Thresholds that fit the tiny model."
    own = calibrate(tiny, TEXTS)
    return {
        n: getattr(own, n)
        for n in ("low_ent_thresh", "high_ent_thresh", "low_vent_thresh", "high_vent_thresh")
    }


@pytest.mark.parametrize("cls", [EntropixConfig, PublishedConfig])
def test_rows_alone_and_in_a_batch(tiny, fitting, cls):
    """Every row, with its own number, writes the same text in any batch, and rows are in different
    branches at once."""
    config = (
        cls(**fitting)
        if cls is EntropixConfig
        else cls(**fitting, med_ent_thresh=fitting["high_ent_thresh"])
    )
    chooser = EntropySampler(config, seed=4, clarify=5, rows=[7, 3, 9, 1])
    batch = generate(tiny, TEXTS, chooser, max_new_tokens=30)
    together = {tuple(s.draw.branch.tolist()) for s in batch.steps}
    assert any(len(set(b)) > 1 for b in together) and len(set(sum(map(list, together), []))) >= 4
    for i, text in enumerate(TEXTS):
        own = dataclasses.replace(chooser, rows=[chooser.rows[i]])
        alone = generate(tiny, text, own, max_new_tokens=30)
        assert alone.ids.equal(batch.ids[i]), i
        for a, b in zip(alone.steps, [s for s in batch.steps if i in s.row.tolist()]):
            j = b.row.tolist().index(i)
            assert a.draw.branch[0] == b.draw.branch[j]
            torch.testing.assert_close(
                a.draw.decision.temperature[0],
                b.draw.decision.temperature[j],
                equal_nan=True,
                atol=1e-8,
                rtol=0,
            )
    order = [2, 0, 3, 1]
    mixed = generate(
        tiny,
        [TEXTS[i] for i in order],
        dataclasses.replace(chooser, rows=[chooser.rows[i] for i in order]),
        max_new_tokens=30,
    )
    for j, i in enumerate(order):
        assert mixed.ids[j].equal(batch.ids[i])


def test_a_seed_can_differ_by_row(tiny, fitting):
    out = generate(
        tiny,
        ["bead"] * 3,
        EntropySampler(EntropixConfig(**fitting), seed=[1, 1, 2], rows=[0, 0, 0]),
        max_new_tokens=30,
    )
    a, b, c = (x.tolist() for x in out.ids)
    assert a == b != c


def test_a_model_without_attention():
    world = six_words()
    with pytest.raises(
        ValueError, match=r"attention: this model gives none; EntropySampler\(attention=False\)"
    ):
        generate(world, "I", EntropySampler())
    out = generate(
        world,
        ["I", "cold"],
        EntropySampler(EntropixConfig(**TOY), attention=False),
        max_new_tokens=4,
    )
    assert all(s.draw.measures.agreement is None for s in out.steps)


def test_attention_off_ignores_what_the_model_gives(fitting):
    asked = EntropySampler(EntropixConfig(**fitting), attention=False)
    assert not asked.attention and EntropySampler().attention
    scores, mask = torch.randn(5, 2, 3, 4), torch.ones(5, 4, dtype=torch.bool)
    a, b = (asked(p, context(5)) for p in (Prediction(FIVE), Prediction(FIVE, None, scores, mask)))
    assert a.ids.equal(b.ids)
    for x, y in zip(vars(a.decision).values(), vars(b.decision).values()):
        torch.testing.assert_close(x, y, equal_nan=True)


def test_calibrate_takes_thirds_of_what_it_measured(tiny):
    own = calibrate(tiny, TEXTS)
    again = calibrate(tiny, TEXTS)
    assert own == again and own.temp == EntropixConfig().temp
    from decoding_book.entropy import follow

    m = follow(tiny, TEXTS).measures
    for name, x in (("ent", m.entropy), ("vent", m.varentropy)):
        low, high = getattr(own, f"low_{name}_thresh"), getattr(own, f"high_{name}_thresh")
        third = torch.tensor([1 / 3, 2 / 3]).double()
        np.testing.assert_allclose([low, high], x.double().quantile(third), atol=1e-4)
    for x, t in zip(
        (
            m.entropy,
            m.varentropy,
            m.attention_entropy,
            m.attention_varentropy,
            m.agreement,
            m.interaction,
        ),
        own.typical,
    ):
        assert x.median().item() == pytest.approx(t, abs=1e-4)
    bare = calibrate(six_words(), [[2, 3, 0], [2, 3, 1]], attention=False)
    assert (
        bare.typical[2:] == EntropixConfig().typical[2:]
        and bare.low_ent_thresh <= bare.high_ent_thresh
    )


# ---------------------------------------------------------------- the clarifying token

# every row is HELV
ASK = dict(low_ent_thresh=0.0, high_ent_thresh=0.0, low_vent_thresh=1e9, high_vent_thresh=1e9)


def test_the_clarifying_token_is_never_said_twice_in_a_row(tiny):
    out = generate(
        tiny,
        TEXTS,
        EntropySampler(EntropixConfig(**ASK), clarify=6),
        max_new_tokens=20,
        ignore_eos=True,
    )
    for ids in out.ids:
        assert ids[0] == 6 and (ids == 6).sum() >= 5  # again, later: it is "just asked", not "ever"
    actions = [s.draw.decision.action.tolist() for s in out.steps]
    assert actions[0] == [1] * 4 and actions[1] == [2] * 4


def test_what_the_prompt_says_does_not_count(tiny):
    "A prompt that ends on the clarifying token has not asked."
    ids = torch.tensor([[0, 2, 6], [0, 6, 6]])
    c = Context(ids, torch.ones_like(ids).bool(), torch.tensor([3, 2]), torch.arange(2))
    assert just_asked((6,), c).tolist() == [False, True]
    assert just_asked((6, 6), c).tolist() == [False, False]
    assert just_asked((), c).tolist() == [True, True]
    assert just_asked((6,) * 5, c).tolist() == [False, False]


def test_without_a_clarifying_token_helv_draws():
    d = EntropySampler(EntropixConfig(**ASK), attention=False)(
        Prediction(FIVE), context(5)
    ).decision
    assert d.branch.tolist() == [1] * 5 and d.action.tolist() == [2] * 5


def test_a_clarifying_text_of_several_tokens(tiny):
    word = tiny.encode("bad")[1:]  # without the start mark
    tokenizer = type("T", (), dict(vocab_size=tiny.vocab_size, encode=lambda self, s: word))()
    chooser = EntropySampler(EntropixConfig(**ASK), clarify="bad", tokenizer=tokenizer, seed=2)
    for prompts in (TEXTS, TEXTS[:2], "ab"):  # one chooser, one call after the other
        out = generate(tiny, prompts, chooser, max_new_tokens=14, ignore_eos=True)
        for ids in out.ids if isinstance(prompts, list) else [out.ids]:
            # said, one drawn, said again
            assert ids[:3].tolist() == word and ids[4:7].tolist() == word
    steps = generate(tiny, "ab", chooser, max_new_tokens=4, ignore_eos=True).steps
    assert [s.draw.branch.item() for s in steps] == [1, 1, 1, 1]
    assert [s.draw.decision.action.item() for s in steps] == [1, 1, 1, 2]


# ---------------------------------------------------------------- hostile settings


@pytest.mark.parametrize("cls", [EntropixConfig, PublishedConfig])
@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(temp=-0.1), ValueError, "temp: -0.1"),
        (dict(temp=NAN), ValueError, "temp: nan"),
        (dict(temp=INF), ValueError, "temp: inf"),
        (dict(temp="1"), TypeError, "temp: '1'"),
        (dict(top_p=0.0), ValueError, "top_p: 0.0"),
        (dict(top_p=1.1), ValueError, "top_p: 1.1"),
        (dict(top_k=0), ValueError, "top_k: 0"),
        (dict(top_k=2.5), TypeError, "top_k: 2.5"),
        (dict(min_p=-0.1), ValueError, "min_p: -0.1"),
        (dict(min_p=1.5), ValueError, "min_p: 1.5"),
        (dict(n_adaptive_samples=0), ValueError, "n_adaptive_samples: 0"),
        (dict(n_adaptive_samples=True), TypeError, "n_adaptive_samples: True"),
        (dict(low_ent_thresh=99.0), ValueError, "low_ent_thresh: 99.0 is above"),
        (dict(low_vent_thresh=99.0), ValueError, "low_vent_thresh: 99.0 is above high_vent_thresh"),
        (dict(low_ent_thresh=-1.0), ValueError, "low_ent_thresh: -1.0"),
        (dict(ada_temp_logits=NAN), ValueError, "ada_temp_logits: nan"),
        (dict(helv_attn_ent_coef=None), TypeError, "helv_attn_ent_coef: None"),
    ],
)
def test_settings_are_refused_by_name(cls, change, error, message):
    with pytest.raises(error, match=message):
        cls(**change)


def test_more_settings_are_refused():
    with pytest.raises(ValueError, match="med_ent_thresh: 6.0 is above high_ent_thresh"):
        PublishedConfig(med_ent_thresh=6.0)
    with pytest.raises(ValueError, match="off: 'LELW' is not one of"):
        EntropixConfig(off=("LELW",))
    with pytest.raises(ValueError, match="off: 'L' is not one of"):
        EntropixConfig(off="LELV")
    with pytest.raises(ValueError, match="max_temp: -1"):
        EntropixConfig(max_temp=-1)
    for bad in ((1.0, 2.0), (1.0, 2.0, 3.0, 4.0, 5.0, -6.0), "abcdef", (1.0,) * 5 + (NAN,)):
        with pytest.raises((ValueError, TypeError), match="typical"):
            EntropixConfig(typical=bad)
    # as they come from a file
    assert EntropixConfig(typical=list(USUAL), off=["LELV"]) == EntropixConfig(off=("LELV",))
    assert EntropixConfig(off=["LELV"]).decide(one(entropy=0.1, varentropy=0.1), NO).branch == 4


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(config={}), TypeError, "config: {}"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(rows=[1.5]), TypeError, "row"),
        (dict(backend="abacus"), ValueError, "backend: 'abacus'"),
        (dict(clarify=-1), ValueError, "clarify: id -1"),
        (dict(clarify=True), TypeError, "clarify: True"),
        (dict(clarify=1.5), TypeError, "clarify: 1.5"),
        (dict(clarify="?"), TypeError, "clarify: '\\?' is text"),
    ],
)
def test_samplers_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        EntropySampler(**change)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", ["seed", "rows"])
def test_keys_for_another_number_of_rows_are_refused(tiny, name, n):
    policy = EntropySampler(attention=False, **{name: list(range(n))})
    with pytest.raises(ValueError, match=f"{name}: {n} values for 3 rows"):
        generate(tiny, [[1], [2], [3]], policy, 4)


def test_a_clarifying_token_outside_the_vocabulary(tiny):
    with pytest.raises(ValueError, match="clarify: id 8 is outside the vocabulary 0..7"):
        EntropySampler(clarify=8, attention=False)(Prediction(FIVE), context(5))
    with pytest.raises(ValueError, match="clarify: id 99 is outside"):
        EntropySampler(clarify=99, tokenizer=tiny)
    empty = type("T", (), dict(encode=lambda self, s: []))()
    with pytest.raises(ValueError, match="clarify: '' is no token"):
        EntropySampler(clarify="", tokenizer=empty)


def test_bad_logits_are_refused():
    with pytest.raises(ValueError, match="row 1 has NaN"):
        EntropySampler(attention=False)(
            Prediction(torch.tensor([[1.0, 2.0], [NAN, 1.0]])), context(2)
        )


# ---------------------------------------------------------------- the view, the real model


def test_the_view_shades_each_token_by_its_branch(tiny, fitting):
    out = generate(
        tiny, TEXTS, EntropySampler(EntropixConfig(**fitting), clarify=5), max_new_tokens=12
    )
    view, html = BranchView(out), BranchView(out)._repr_html_()
    n = sum(len(x) for x in out.ids)
    assert sum(html.count(f'class="db-t db-e{i}"') for i in range(5)) == n
    assert html.count(" bits²") >= n and "agreement" in html and "bits per token" not in html
    assert repr(view).count("\n") == 3 and all(name in repr(view) for name in BRANCHES)
    single = BranchView(out[1])._repr_html_()  # a row cut out keeps branch, entropy, varentropy
    assert single.count('class="db-t db-e') == len(out.ids[1]) and "bits²" in single
    with pytest.raises(ValueError, match="branch"):
        BranchView(generate(tiny, "ab", max_new_tokens=2))


def test_five_branches_on_the_real_model(record):
    from decoding_book.smollm import SmolLM2

    model = SmolLM2()
    prompts = [
        "The capital of France is",
        "My favourite colour is",
        "It was a quiet morning in the city when",
        "Dear Sir or Madam,",
    ]
    chooser = EntropySampler(clarify="...", tokenizer=model)
    out = generate(model, prompts, chooser, max_new_tokens=30, ignore_eos=True)
    counts = (
        torch.stack([s.draw.branch for s in out.steps]).flatten().bincount(minlength=5).tolist()
    )
    assert min(counts) > 0
    assert any(len(set(s.draw.branch.tolist())) > 1 for s in out.steps)
    record("policy_branches", dict(zip(BRANCHES, counts)))


def test_the_public_names():
    assert {
        "EntropixConfig",
        "PublishedConfig",
        "EntropySampler",
        "Decision",
        "calibrate",
        "BranchView",
    } <= set(module.__all__)
    assert list(vars(EntropySampler(EntropixConfig(), 0)))[:2] == ["config", "seed"]


# ---- a key is a key


def test_a_key_without_rows_names_them_by_place():
    z = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(3).double()
    decision = Decision(
        torch.full((3,), 4), torch.full((3,), 3), ones, ones, 0 * ones.long(), 0 * ones
    )  # all draw n times
    for key in Key(5), Key(torch.tensor(5)):
        ids, kept = draw_decided(z, decision, key, 3)
        same, _ = draw_decided(z, decision, Key(5, row=[0, 1, 2]), 3)
        assert ids.equal(same) and len(kept) == 3
