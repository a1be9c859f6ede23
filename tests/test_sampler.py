"""The sampler: oracle, transformers, chi-square of draws and of whole texts, properties, dialects,
hostile input."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import llama_filters
from helpers.laws import chi_square
from helpers.worlds import Deep
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoding_book.beam import beam_search
from decoding_book.cuts import entropy_temperature, tail_free, top_n_sigma, typical_p, xtc_coin
from decoding_book.loop import Context, Prediction, generate, greedy, stream
from decoding_book.noise import Key, gumbel_max, inverse_cdf
from decoding_book.sampler import (
    BACKENDS,
    CUTS,
    DIALECTS,
    OFF,
    ORDER,
    Mirostat,
    Sampler,
    draw,
    find_backend,
    missing,
    penalize,
    stages,
    truncate,
)
from decoding_book.temperature import temperature
from decoding_book.topk import top_k
from decoding_book.topp import min_p
from decoding_book.toy import TableModel, sequence_law, six_words

INF = float("inf")
DATA = np.load(Path(__file__).parent / "oracle/cases.npz", allow_pickle=False)


# ---------------------------------------------------------------- oracle


def case(i, dtype=torch.float64):
    "Logits and the parameters of a filt case."
    V = DATA["filt_V"][i]
    T, k, p, m = (DATA[f"filt_{n}"][i].item() for n in ("T", "top_k", "top_p", "min_p"))
    return (
        torch.tensor(DATA["filt_logits"][i, :V]).to(dtype),
        dict(temperature=T, top_k=k, top_p=p),
        m,
    )


@pytest.mark.parametrize("dtype,atol", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", ["T", "joint", "joint_minp", "joint_004"])
def test_the_law_is_that_of_the_oracle(name, dtype, atol):
    for i in range(70):
        z, params, m = case(i, dtype)
        if name == "T":
            params = dict(temperature=params["temperature"])
        if name == "joint_minp":
            params["min_p"] = m
        if name == "joint_004":
            params["boundary"] = "exclude"
        sampler, V = Sampler(**params), len(z)
        q = sampler.distribution(z)
        np.testing.assert_allclose(
            q, DATA[f"filt_p_{name}"][i, :V], atol=atol, rtol=0, err_msg=f"case {i}"
        )
        if name != "T" and (dtype == torch.float64 or DATA["filt_kind"][i] != 5):
            assert (
                truncate(z, sampler).isfinite().tolist()
                == DATA[f"filt_keep_{name}"][i, :V].tolist()
            ), i


def test_oracle_as_one_padded_batch_with_parameters_by_row():
    z = torch.tensor(DATA["filt_logits"]).nan_to_num(nan=-INF, neginf=-INF)
    sampler = Sampler(
        temperature=DATA["filt_T"],
        top_k=DATA["filt_top_k"],
        top_p=DATA["filt_top_p"],
        min_p=DATA["filt_min_p"],
    )
    np.testing.assert_allclose(
        sampler.distribution(z), DATA["filt_p_joint_minp"], atol=1e-9, rtol=0
    )
    assert truncate(z, sampler).isfinite().tolist() == DATA["filt_keep_joint_minp"].tolist()


def test_the_tokens_are_those_of_the_oracle():
    for i in range(70):
        z, params, _ = case(i)
        q = Sampler(**params).distribution(z)
        assert inverse_cdf(q, DATA["filt_u"][i].item()) == DATA["filt_token"][i]


# ---------------------------------------------------------------- transformers


def theirs(z, ids, T=1.0, k=0, p=1.0, m=0.0, theta=1.0, n=0):
    "transformers' processors in its own order, on logits (1, V)."
    from transformers.generation import logits_process as hf

    chain = [
        (theta != 1, hf.RepetitionPenaltyLogitsProcessor, theta),
        (n, hf.NoRepeatNGramLogitsProcessor, n),
        (T != 1, hf.TemperatureLogitsWarper, T),
        (k, hf.TopKLogitsWarper, k),
        (p < 1, hf.TopPLogitsWarper, p),
        (m, hf.MinPLogitsWarper, m),
    ]
    for on, make, value in chain:
        if on:
            z = make(value)(ids, z)
    return z


def random_case(rng, i, ties):
    V = int(rng.integers(2, 120))
    z = (
        rng.integers(-4, 4, (1, V)).astype(float)
        if ties
        else rng.normal(size=(1, V)) * rng.uniform(0.3, 6)
    )
    on = rng.random(6) < 0.6
    if i < 6:
        on = np.arange(6) == i  # each one alone, too
    values = dict(
        T=float(rng.uniform(0.2, 3)),
        k=int(rng.integers(1, V + 9)),
        p=float(rng.uniform(0.02, 0.999)),
        m=float(rng.uniform(0.001, 0.9)),
        theta=float(rng.uniform(0.5, 2)),
        n=int(rng.integers(1, 4)),
    )
    values = {name: v for (name, v), use in zip(values.items(), on) if use}
    return torch.tensor(z), torch.tensor(rng.integers(0, V, (1, int(rng.integers(0, 12))))), values


def ours(values, **more):
    names = dict(
        T="temperature",
        k="top_k",
        p="top_p",
        m="min_p",
        theta="repetition_penalty",
        n="no_repeat_ngram",
    )
    return {names[n]: v for n, v in values.items()} | more


def test_the_law_is_that_of_transformers(full, record):
    rng, n, tied, sizes = np.random.default_rng(0), 20_000 if full else 600, 0, Counter()
    for i in range(n):
        ties = i % 4 == 3
        z, ids, values = random_case(rng, i, ties)
        expected = theirs(z, ids, **values)
        if not expected.isfinite().any():
            continue  # every token banned: an error here
        book, hf = Sampler(**ours(values)), Sampler.dialect("huggingface", **ours(values))
        for sampler in [hf] if ties else [hf, book]:
            out = truncate(penalize(z, sampler, ids), sampler)
            assert out.isfinite().equal(expected.isfinite()), (i, values)
            torch.testing.assert_close(
                sampler.distribution(z, ids), expected.softmax(-1), atol=1e-6, rtol=0
            )
        if ties:
            tied += not truncate(penalize(z, book, ids), book).isfinite().equal(expected.isfinite())
        sizes[min(expected.isfinite().sum().item(), 3)] += 1
    assert (
        tied > n / 40 and min(sizes[1], sizes[2], sizes[3]) > n / 40
    )  # the cases are not all trivial
    record(
        "sampler_vs_transformers", {"rows": n, "tied rows cut differently by the exact rule": tied}
    )


def test_min_p_comes_after_top_p():
    "The filters commute on most rows; here they do not, so an exchange would show."
    z = torch.tensor([0.4, 0.3, 0.14, 0.13, 0.03], dtype=torch.float64).log()
    q = Sampler(top_p=0.8, min_p=0.33).distribution(z)
    assert (q > 0).tolist() == [True, True, True, False, False]
    assert (
        truncate(z, Sampler(top_p=0.8, min_p=0.33))
        .isfinite()
        .equal(theirs(z[None], None, p=0.8, m=0.33)[0].isfinite())
    )
    swapped = Sampler(top_p=0.8, min_p=0.33, order=("temperature", "top_k", "min_p", "top_p"))
    assert (swapped.distribution(z) > 0).tolist() == [True, True, False, False, False]


# ---------------------------------------------------------------- the law of the draws

CHAIN = dict(temperature=1.3, top_k=9, top_p=0.95, min_p=0.03)
LAWS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "top_k": dict(top_k=5),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.1),
    "repetition": dict(repetition_penalty=1.7),
    "frequency": dict(frequency_penalty=0.6),
    "presence": dict(presence_penalty=0.9),
    "ngram": dict(no_repeat_ngram=2),
    "bias": dict(logit_bias={0: -2.0, 3: -INF}),
    "typical": dict(typical_p=0.7),
    "epsilon": dict(epsilon_cutoff=0.05),
    "eta": dict(eta_cutoff=0.02),
    "sigma": dict(top_n_sigma=2.0),
    "tail": dict(tail_free=0.9),
    "xtc": dict(xtc_probability=0.4, xtc_threshold=0.08),
    "dynamic": dict(temperature=0.9, dynatemp_range=0.6, dynatemp_exponent=1.5),
    "dry": dict(dry_multiplier=0.8, dry_allowed_length=1),
    "llama.cpp": dict(temperature=1.4, xtc_probability=0.6, top_n_sigma=2.0)
    | DIALECTS["llama.cpp"],
    "chain": CHAIN | dict(repetition_penalty=1.3, frequency_penalty=0.2),
    "sglang": CHAIN | DIALECTS["sglang"],
}


@pytest.mark.parametrize("name", LAWS)
def test_chi_square_of_the_draws_fits_their_law(name, full, record):
    total, batch = 1_000_000 if full or name == "chain" else 100_000, 50_000
    z = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 1.5
    ids = torch.tensor([1, 4, 7, 4, 1])
    sampler = Sampler(**LAWS[name], seed=11)
    q, counts = sampler.distribution(z.double(), ids), torch.zeros(12)
    assert (q > 0).sum() > 1  # else there is nothing to test
    wide = penalize(z, sampler, ids).expand(batch, -1)
    for position in range(total // batch):
        out = draw(wide, sampler, Key(11, torch.arange(batch), position))
        counts += out.ids.bincount(minlength=12)
        assert out.kept.eq((q > 0).sum()).all()
        torch.testing.assert_close(out.logprob.double(), q[out.ids].log(), atol=1e-5, rtol=0)
    assert counts[q == 0].sum() == 0
    p = chi_square(counts, q, total)
    record(f"chi2_{name}", {"draws": total, "p": p})
    assert p > 1e-4


@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=0.8, top_k=4, top_p=0.9, min_p=0.05),
        dict(temperature=1.5),
        dict(top_p=0.7, seed=3),
    ],
)
def test_texts_of_the_loop_follow_their_sequence_law(params, full, record):
    "Whole texts of three steps, drawn by the loop, against their exact law."
    world, n, batch = six_words(), 200_000 if full else 8000, 8000
    sampler = Sampler(**params)
    law, counts = sequence_law(world, 3, law=sampler.distribution), Counter()
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    for start in range(0, n, batch):
        chooser = Sampler(**params, rows=torch.arange(start, start + batch))
        out = generate(world, [""] * batch, chooser, max_new_tokens=3, alternatives=0)
        texts = [[] for _ in range(batch)]
        for s in out.steps:
            for r, i in zip(s.row.tolist(), s.ids.tolist()):
                texts[r].append(i)
        counts.update(map(tuple, texts))
    assert set(counts) <= set(law)
    p = chi_square([counts[t] for t in law], list(law.values()), n)
    record(f"chi2_texts_{'_'.join(params)}", {"texts": n, "p": p})
    assert p > 1e-4


def test_penalised_texts_follow_their_law():
    "A penalty looks at the text, so its law is a product over histories: by hand, three steps."
    world, n = six_words(eos=None), 8000
    params = dict(repetition_penalty=1.5, no_repeat_ngram=1, top_p=0.9)
    sampler, law = Sampler(**params), {(): 1.0}
    for _ in range(3):
        law = {
            t + (v,): w * q
            for t, w in law.items()
            for v, q in enumerate(
                sampler.distribution(
                    world(torch.tensor([t]).long()).logits, torch.tensor([t]).long()
                )[0].tolist()
            )
            if q
        }
    out = generate(world, [""] * n, sampler, max_new_tokens=3, alternatives=0)
    counts = Counter(zip(*(s.ids.tolist() for s in out.steps)))
    assert set(counts) <= set(law) and all(len(set(t)) == 3 for t in counts)
    assert chi_square([counts[t] for t in law], list(law.values()), n) > 1e-4


# ---------------------------------------------------------------- properties

FULL = Sampler(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02)


def logits(*shape, seed=0, scale=3):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("V", [7, 1000, 50_257])
def test_a_row_alone_equals_the_row_in_any_batch(V):
    "Bit for bit: ids, log-probabilities and counts, wherever the row stands."
    z, row = logits(12, V, seed=V), torch.arange(100, 112)
    params = dict(
        temperature=torch.linspace(0.5, 1.5, 12),
        top_k=torch.arange(3, 15),
        top_p=torch.linspace(0.5, 1, 12),
        min_p=torch.linspace(0, 0.1, 12),
    )
    seeds, position = torch.arange(12) * 7, torch.arange(12) + 3
    all_at_once = draw(z, Sampler(**params), Key(seeds, row, position))
    for subset in ([3], [11], [5, 2], [0, 3, 9, 1, 11], list(range(11, -1, -1)), [4, 4, 4]):
        s = torch.tensor(subset)
        part = draw(
            z[s],
            Sampler(**{n: v[s] for n, v in params.items()}),
            Key(seeds[s], row[s], position[s]),
        )
        assert part.ids.equal(all_at_once.ids[s]) and part.kept.equal(all_at_once.kept[s])
        assert part.logprob.equal(all_at_once.logprob[s])


def test_a_text_alone_equals_the_text_in_a_batch():
    """Through the loop on a toy world: prompts of unequal length, own rows and seeds, rows that end
    early."""
    world, prompts = six_words(), ["I", "", "cold coffee", "I like", "water"]
    params = dict(
        temperature=[0.5, 1.0, 2.0, 1.0, 1.5],
        top_p=[0.9, 0.8, 1.0, 0.7, 0.95],
        repetition_penalty=[1.0, 1.2, 1.0, 1.5, 1.0],
    )
    numbers, seeds = [40, 41, 42, 43, 44], [1, 2, 2**64 - 1, 4, 5]
    batch = generate(world, prompts, Sampler(**params, rows=numbers, seed=seeds), max_new_tokens=5)
    for i, prompt in enumerate(prompts):
        own = {n: v[i] for n, v in params.items()}
        alone = generate(
            world, prompt, Sampler(**own, rows=[numbers[i]], seed=seeds[i]), max_new_tokens=5
        )
        assert alone.ids.equal(batch.ids[i]), i
        lone = generate(
            world, prompt, Sampler(**own, rows=numbers[i], seed=seeds[i]), max_new_tokens=5
        )
        assert lone.ids.equal(alone.ids)
    backwards = generate(
        world,
        prompts[::-1],
        Sampler(**{n: v[::-1] for n, v in params.items()}, rows=numbers[::-1], seed=seeds[::-1]),
        max_new_tokens=5,
    )
    assert all(a.equal(b) for a, b in zip(batch.ids, backwards.ids[::-1]))


def test_equal_prompts_differ_and_seeds_replay():
    world = six_words()
    one, again, other = (
        generate(world, [""] * 30, Sampler(seed=s), max_new_tokens=5) for s in (7, 7, 8)
    )
    assert [i.tolist() for i in one.ids] == [i.tolist() for i in again.ids]
    assert [i.tolist() for i in one.ids] != [i.tolist() for i in other.ids]
    assert len({tuple(i.tolist()) for i in one.ids}) > 10


def test_penalties_in_the_loop_see_their_own_row_and_no_padding():
    world, prompts = six_words(eos=None), ["I", "cold coffee", ""]
    sampler = Sampler(no_repeat_ngram=1, temperature=1.2)
    for out, prompt in zip(generate(world, prompts, sampler, max_new_tokens=3).ids, prompts):
        said = world.encode(prompt) + out.tolist()
        assert len(set(said)) == len(said)
    seen = Sampler(
        frequency_penalty=1e6, temperature=0
    )  # counts what was generated, not the prompt
    ids = torch.tensor([[0, 0, 2], [1, 1, 3]])
    context = Context(
        ids, torch.tensor([[False, True, True], [True] * 3]), torch.tensor([1, 3]), torch.arange(2)
    )
    z = torch.tensor([[9.0, 0, 8, 7], [0, 9.0, 0, 8]])
    assert seen(Prediction(z), context).ids.tolist() == [0, 1]
    assert seen(
        Prediction(z + torch.tensor([[0.0, 0, 5, 0], [0, 0, 0, 0]])), context
    ).ids.tolist() == [0, 1]


def test_minimum_length_in_the_loop():
    world = six_words()
    out = generate(
        world, ["I", "cold coffee"] * 20, Sampler(min_new_tokens=3, eos=world.eos), max_new_tokens=3
    )
    assert all(world.eos not in ids.tolist() for ids in out.ids)
    out = generate(
        world, [""] * 200, Sampler(min_new_tokens=[2, 0] * 100, eos=[world.eos]), max_new_tokens=2
    )
    ends = [world.eos in ids.tolist() for ids in out.ids]
    assert not any(ends[::2]) and any(ends[1::2])


def test_limits_agree_with_greedy():
    z, key = logits(200, 50), Key(1, None, 3)
    z[::3] = z[::3].round()  # with ties
    first = greedy(Prediction(z)).ids
    for params in (
        dict(top_k=1),
        dict(temperature=0),
        dict(temperature=0.0, top_p=0.3),
        dict(top_p=1e-12),
        dict(temperature=1e-30),
        dict(temperature=1e-300, top_k=7),
    ):
        out = draw(z, Sampler(**params), key)
        if "temperature" in params and params["temperature"]:
            assert z.gather(1, out.ids[:, None]).equal(
                z.gather(1, first[:, None])
            )  # ties stay drawn at T > 0
        else:
            assert out.ids.equal(first), params
    tied = z[1::3]
    assert draw(tied, Sampler(temperature=1e-30), key).ids.equal(greedy(Prediction(tied)).ids)


def test_off_changes_nothing():
    z = logits(5, 40)
    base = Sampler().distribution(z)
    assert base.equal(z.double().softmax(-1).float())
    for params in (
        dict(top_k=40),
        dict(top_k=10**30),
        dict(top_k=None),
        dict(top_k=0),
        dict(top_p=1),
        dict(min_p=0),
        dict(temperature=1),
        dict(top_k=[None, 0, 40, 41, 99], top_p=[1.0] * 5, min_p=[0] * 5),
    ):
        assert Sampler(**params).distribution(z).equal(base), params


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(30,), (6, 30), (2, 3, 30)])
def test_shapes_dtypes_and_input_left_alone(dtype, shape):
    z = logits(*shape).to(dtype)
    ids = torch.randint(0, 30, (*shape[:-1], 4), generator=torch.Generator().manual_seed(1))
    before, sampler = (
        z.clone(),
        Sampler(
            temperature=0.8,
            top_k=12,
            top_p=0.9,
            min_p=0.02,
            repetition_penalty=1.3,
            presence_penalty=0.1,
            no_repeat_ngram=2,
            logit_bias={1: 2.0},
        ),
    )
    q = sampler.distribution(z, ids)
    assert z.equal(before) and q.shape == z.shape
    assert q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row, own, out in zip(z.reshape(-1, 30), ids.reshape(-1, 4), q.reshape(-1, 30)):
        assert sampler.distribution(row, own).equal(out)
    torch.testing.assert_close(q.sum(-1), torch.ones_like(q[..., 0]))
    assert sampler.distribution(z.mT.contiguous().mT if z.ndim > 1 else z, ids).equal(q)
    assert sampler.distribution(torch.stack([z, z * 0], -1)[..., 0], ids).equal(q)


def test_permuting_the_vocabulary_permutes_the_law():
    z, perm = logits(20, 30), torch.randperm(30, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        FULL.distribution(z[:, perm].double()), FULL.distribution(z.double())[:, perm]
    )


def test_stages_only_remove():
    z = logits(50, 30)
    z[:, 5] = -INF
    alive = z.isfinite()
    for _name, after in stages(z, FULL):
        assert (after.isfinite() <= alive).all() and after.isfinite().any(-1).all()
        alive = after.isfinite()


def test_counterfactual_noise_lets_a_survivor_win_again():
    """The same key at another setting: the same noise, so a token that survives and won before wins
    again."""
    z, key = logits(500, 40), Key(3, None, 0)
    free, cut = draw(z, Sampler(), key), draw(z, Sampler(top_p=0.9), key)
    kept = truncate(z, Sampler(top_p=0.9)).gather(1, free.ids[:, None])[:, 0].isfinite()
    assert cut.ids[kept].equal(free.ids[kept]) and 0 < (~kept).sum() < 200


# ---------------------------------------------------------------- dialects


def by_hand(z, order, joint, exceed, tie_all, T, k, p, m):
    "One row with NumPy, following a system's own loop; returns the kept set."
    z = z.astype(float)
    z = z / (T if order[0] == "T" else 1)
    alive, whole = np.isfinite(z), z.copy()
    rank = np.lexsort((np.arange(len(z)), -z))

    def soft(a, keep):
        return np.where(keep, np.exp(a - a[keep].max()), 0) / np.exp(a[keep] - a[keep].max()).sum()

    for stage in order:
        if stage == "k" and k:
            kth = sorted(z[alive])[::-1][min(k, alive.sum()) - 1]
            ranked = [i for i in rank if alive[i]]
            alive = alive & (z >= kth) if tie_all else np.isin(np.arange(len(z)), ranked[:k])
        elif stage == "p" and p < 1:
            q, total, keep = (
                soft(whole if joint else z, np.isfinite(z) if joint else alive),
                0.0,
                [],
            )
            for i in rank:
                if not (total <= p if exceed else total < p):
                    break
                keep.append(i)
                total += q[i]
            alive = alive & np.isin(np.arange(len(z)), keep)
        elif stage == "m":
            alive = alive & (z >= z[alive].max() + math.log(m)) if m else alive
    return alive


SYSTEMS = {
    "book": ("Tkpm", False, False, False),
    "huggingface": ("Tkpm", False, False, True),
    "vllm": ("Tmkp", False, False, True),
    "sglang": ("Tkpm", True, True, False),
    "llama.cpp": ("kpmT", False, False, False),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_dialects_keep_what_their_systems_keep(system, full, record):
    rng, differs, seen = np.random.default_rng(4), 0, Counter()
    for i in range(4000 if full else 400):
        V = int(rng.integers(2, 30))
        z = rng.integers(-3, 4, V).astype(float) if i % 3 == 0 else rng.normal(size=V) * 2
        T, k, p, m = (
            rng.uniform(0.3, 2),
            int(rng.integers(0, V + 2)),
            rng.uniform(0.05, 0.99),
            rng.uniform(0, 0.5) * (i % 2),
        )
        values = dict(temperature=T, top_k=k, top_p=p, min_p=m)
        keep = truncate(torch.tensor(z), Sampler.dialect(system, **values)).isfinite().numpy()
        expected = by_hand(z, *SYSTEMS[system], T, k, p, m)
        if SYSTEMS[system][
            3
        ]:  # which of the equal tokens at top-p's edge stays is up to torch.sort
            assert sorted(z[keep]) == sorted(z[expected]), (i, values)
        else:
            assert keep.tolist() == expected.tolist(), (i, values)
        seen["equal ids" if keep.tolist() == expected.tolist() else "equal up to equals"] += 1
        differs += (keep != truncate(torch.tensor(z), Sampler(**values)).isfinite().numpy()).any()
    assert (differs > 10) == (system != "book")
    if not SYSTEMS[system][3]:
        record(f"dialect_{system}", {"rows": sum(seen.values()), **seen})  # the others: below


def vllm(z, k, p, m=None):
    "vLLM's PyTorch path: one ascending sort, masked from the low end, and put back."
    if m is not None:
        q = z.softmax(-1)
        z = z.masked_fill(q < m[:, None] * q.amax(-1, keepdim=True), -INF)
    ranked, ids = z.sort(dim=-1)
    if k is not None:
        ranked = ranked.masked_fill(ranked < ranked.gather(1, (z.shape[1] - k)[:, None]), -INF)
    if p is not None:
        low = ranked.softmax(-1).cumsum(-1) <= 1 - p[:, None]
        low[:, -1] = False
        ranked = ranked.masked_fill(low, -INF)
    return z.scatter(-1, ids, ranked).isfinite()


def arranged(rng, n, V, how):
    "Rows (n, V) of seven different logits at most, in some order."
    z = torch.randint(-3, 4, (n, V), generator=rng).double()
    if how == "ascending":
        return z.sort(-1).values
    if how == "descending":
        return z.sort(-1, descending=True).values
    if how == "blocks":
        return z[:, : -(-V // 4)].repeat_interleave(4, 1)[:, :V]
    return z


def at_the_line(z, keep, k, p, m):
    "Whether a sum of one row comes within rounding of p, or a logit of min-p's line."
    if m is not None and ((z - z.max() - m.log()).abs() < 1e-5).any():
        return True
    z = z if m is None else z.masked_fill(z - z.max() < m.log(), -INF)
    if k is not None:
        z = z.masked_fill(z < z.sort(descending=True).values[k - 1], -INF)
    return (
        p is not None
        and ((z.sort(descending=True).values.softmax(-1).cumsum(-1) - p).abs() < 1e-5).any().item()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vllm_sorts_once(dtype, full, record):
    "Token by token, equals included; what differs lies at the line, by rounding."
    rng, seen, n = torch.Generator().manual_seed(7), Counter(), 2000 if full else 100
    for V in (5, 16, 17, 40, 150, 1000):  # torch's sort is stable up to 16
        for how in ("shuffled", "ascending", "descending", "blocks"):
            for filters in ("kp", "k", "p", "mkp", "pl"):  # l: p is a sum of the row, rounded
                z = arranged(rng, n, V, how).to(dtype)
                k, p, m = (torch.rand(n, generator=rng, dtype=torch.float64) for _ in range(3))
                k = (1 + k * V).long() if "k" in filters else None
                p = (0.05 + 0.9 * p).to(dtype) if "p" in filters else None
                if "l" in filters:
                    mass = z.double().sort(descending=True).values.softmax(-1).cumsum(-1)
                    p = (
                        mass.gather(1, torch.randint(0, V, (n, 1), generator=rng))[:, 0]
                        .to(dtype)
                        .clamp(max=0.99)
                    )
                m = (0.2 * m).to(dtype) if "m" in filters else None
                own = dict(top_k=k, top_p=1.0 if p is None else p, min_p=0.0 if m is None else m)
                mine = truncate(z, Sampler.dialect("vllm", **own)).isfinite()
                expected = vllm(z, k, p, m)
                for i in range(n):
                    if mine[i].equal(expected[i]):
                        kind = "equal ids"
                    elif z[i][mine[i]].sort().values.equal(z[i][expected[i]].sort().values):
                        kind = "equal up to equals"
                    else:
                        kind = "rounding"
                        row = [None if x is None else x[i] for x in (k, p, m)]
                        assert at_the_line(z[i].double(), mine[i], *row), (V, how, filters, i)
                    seen["on the line" if "l" in filters else "elsewhere", kind] += 1
    rows = sum(seen.values())
    record(
        f"dialect_vllm_{dtype}".replace("torch.", ""),
        {"rows": rows} | {", ".join(k): v for k, v in seen.items()},
    )
    assert rows >= 4800 and not any(kind == "equal up to equals" for _, kind in seen)
    assert seen["elsewhere", "rounding"] < rows / 500 and seen["on the line", "rounding"] > 0


def llama_penalties(z, text, last, repeat, frequency, presence):
    """llama.cpp's rule for one row, token by token: divided or multiplied, then less the sum of
    both."""
    window, out = text[-last:], list(z)
    for v, x in enumerate(z):
        n = window.count(v)
        if n:
            out[v] = (x * repeat if x <= 0 else x / repeat) - (n * frequency + presence)
    return out


def some_texts(rng, B, V, N):
    "Logits (B, V), ids (B, N) with left padding, the mask, and lengths of the prompts."
    real = torch.tensor(rng.integers(0, N + 1, B))
    mask = torch.arange(N) >= N - real[:, None]
    prompts = torch.tensor([int(rng.integers(0, n + 1)) for n in real.tolist()])
    return (
        torch.tensor(rng.normal(size=(B, V))),
        torch.tensor(rng.integers(0, V, (B, N))),
        mask,
        prompts,
    )


def test_penalties_of_llama_cpp():
    "A window of 64 tokens, the prompt counted; one window for all rows, or one a row."
    rng = np.random.default_rng(12)
    for i in range(60):
        B, V = int(rng.integers(1, 5)), int(rng.integers(2, 30))
        z, ids, mask, prompts = some_texts(rng, B, V, int(rng.integers(0, 200)))
        own = [torch.tensor(rng.uniform(low, 2, B)) for low in (0.5, -1, -1)]
        names = "repetition_penalty", "frequency_penalty", "presence_penalty"
        windows = [64] * B if i % 2 else rng.integers(1, 100, B).tolist()
        more = {} if i % 2 else dict(penalty_window=windows)
        sampler = Sampler.dialect("llama.cpp", **dict(zip(names, own)), **more)
        out = penalize(z, sampler, ids, mask, prompts)
        expected = [
            llama_penalties(
                z[b].tolist(), ids[b][mask[b]].tolist(), windows[b], *(x[b].item() for x in own)
            )
            for b in range(B)
        ]
        torch.testing.assert_close(
            out, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
        )
        assert sampler.distribution(z, ids, mask, prompts).equal(truncate(out, sampler).softmax(-1))


@pytest.mark.parametrize(
    "system,repeats,counts",
    [
        ("book", [0, 1, 2, 3], [2, 3]),
        ("huggingface", [0, 1, 2, 3], [2, 3]),
        ("vllm", [0, 1, 2, 3], [2, 3]),
        ("sglang", [2, 3], [2, 3]),
        ("llama.cpp", [0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)
def test_which_tokens_are_counted(system, repeats, counts):
    "The text 0 1 | 2 3, with the prompt before the line."
    z = torch.ones(6)
    for name, value, seen in (
        ("repetition_penalty", 2.0, repeats),
        ("frequency_penalty", 0.5, counts),
        ("presence_penalty", 0.5, counts),
    ):
        out = penalize(z, Sampler.dialect(system, **{name: value}), [0, 1, 2, 3], prompt_lengths=2)
        assert (out != z).nonzero()[:, 0].tolist() == seen, name
        out = penalize(
            z,
            Sampler.dialect(system, penalty_window=3, **{name: value}),
            [0, 1, 2, 3],
            prompt_lengths=2,
        )
        assert (out != z).nonzero()[:, 0].tolist() == [v for v in seen if v], name


def test_the_window_leaves_other_rules_alone():
    z, text = torch.zeros(5), [0, 1, 2, 3]
    for params in (
        dict(no_repeat_ngram=1),
        dict(min_new_tokens=4, eos=4),
        dict(logit_bias={0: 1.0}),
    ):
        assert penalize(z, Sampler(**params, penalty_window=1), text).equal(
            penalize(z, Sampler(**params), text)
        )


def test_the_window_in_the_loop_and_in_the_trace():
    """A penalty that forbids what it sees: a word may come back when it has left the window, in
    each row by itself."""
    chance, windows = torch.rand(7, 6, generator=torch.Generator().manual_seed(3)) + 0.01, [1, 2, 4]
    chance = chance / chance.sum(-1, keepdim=True)
    world = TableModel(chance[6], chance[:6])
    sampler = Sampler(
        frequency_penalty=1e6, temperature=0, penalty_window=windows, count_prompt="all"
    )
    out = generate(
        world,
        [torch.tensor(ids) for ids in ([2], [0, 1], [2, 3, 3, 1, 0])],
        sampler,
        max_new_tokens=12,
    )
    for row, (said, window) in enumerate(zip(out.prompt_ids, windows)):
        text = said.tolist()
        for id in out.ids[row].tolist():
            z = world(torch.tensor([text])).logits[0].double()
            for v in range(6):
                z[v] -= 1e6 * text[-window:].count(v)
            assert id == z.argmax()
            text.append(id)
        assert len(text) == len(said) + 12
    z, mine = (
        torch.randn(6, generator=torch.Generator().manual_seed(0)),
        Sampler.dialect("llama.cpp", frequency_penalty=0.7, penalty_window=2),
    )
    trace = mine.trace(z, [0, 1, 1, 2], prompt_lengths=3)
    assert trace.stages[-1].probabilities.equal(
        mine.distribution(z, [0, 1, 1, 2], prompt_lengths=3)
    )


def test_llama_cpp_at_zero_takes_one_of_the_equals():
    """Its partial sort leaves equal maxima in any order; the dialect takes one of them, the lower
    id."""
    z = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    for k in (None, 1, 2, 3, 5):
        q = Sampler.dialect("llama.cpp", temperature=0, top_k=k).distribution(z)
        assert q.argmax(-1).tolist() == [1, 0] and (q.max(-1).values == 1).all()


def test_dialects_by_name():
    assert set(DIALECTS) == set(SYSTEMS)
    with pytest.raises(ValueError, match="system: 'openai' is not one of"):
        Sampler.dialect("openai")


# ---------------------------------------------------------------- the seam


def test_backends_that_are_not_there_are_refused():
    z, key = logits(4, 9), Key(0)
    assert draw(z, FULL, key).ids.equal(draw(z, FULL, key, backend="plain").ids)
    with pytest.raises(ValueError, match="backend: 'magic' is not one of 'plain', 'fused', 'cuda'"):
        draw(z, FULL, key, backend="magic")
    with pytest.raises(TypeError, match="backend: 3"):
        draw(z, FULL, key, backend=3)
    BACKENDS["absent"] = "decoding_book.absent:draw"
    try:
        with pytest.raises(ValueError, match="backend: 'absent' is not there"):
            draw(z, FULL, key, backend="absent")
    finally:
        del BACKENDS["absent"]


def test_draw_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"logits: shape \(9,\)"):
        draw(logits(9), FULL, Key(0))
    with pytest.raises(ValueError, match=r"key: row of shape \(3,\), expected \(\) or \(4,\)"):
        draw(logits(4, 9), FULL, Key(0, torch.arange(3)))
    with pytest.raises(ValueError, match=r"key: seed of shape \(2,\)"):
        draw(logits(4, 9), FULL, Key([1, 2]))


def test_an_empty_batch_gives_no_token():
    out = draw(torch.zeros(0, 5), FULL, Key(0, torch.zeros(0, dtype=torch.long)))
    assert out.ids.shape == (0,) and FULL.distribution(torch.zeros(0, 5)).shape == (0, 5)


@pytest.mark.parametrize(
    "name, bad", [("rows", -1), ("rows", [1, 2**32]), ("seed", -1), ("seed", 2**64), ("rows", "a")]
)
def test_a_sampler_names_the_part_of_its_key(name, bad):
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        Sampler(**{name: bad})


def test_a_sampler_for_no_rows():
    assert len(Sampler(top_k=[1, 2, 3]).at(torch.tensor([], dtype=torch.long)).top_k) == 0


# ---------------------------------------------------------------- the trace


def test_a_trace_names_what_had_no_probability_left():
    assert Sampler(top_k=1).trace(torch.tensor([0.0, -200.0, -INF])).stages[1].removed == [1]


def test_a_trace_tells_what_each_stage_removed():
    z = torch.tensor([0.4, 0.3, 0.14, 0.13, 0.03], dtype=torch.float64).log()
    trace = Sampler(temperature=2.0, top_k=4, top_p=0.8, min_p=0.6, repetition_penalty=1.5).trace(
        z, [0], list("abcde")
    )
    assert [s.name for s in trace.stages] == [
        "logits",
        "penalties",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
    ]
    assert trace.stages[3].removed == [4]
    for before, s in zip(trace.stages, trace.stages[1:]):
        q, old = s.probabilities, before.probabilities
        assert s.bits_before == before.bits
        assert s.bits == pytest.approx(-sum(x * math.log2(x) for x in q.tolist() if x), abs=1e-12)
        assert s.mass == pytest.approx(1 - old[s.removed].sum().item(), abs=1e-12)
        if s.name in ("top_k", "top_p", "min_p"):
            torch.testing.assert_close(
                q, old.index_fill(0, torch.tensor(s.removed).long(), 0) / s.mass
            )
    assert len(repr(trace).splitlines()) == 6
    html = trace._repr_html_()
    assert html.count("<tr>") == 7 and "repetition" not in html and ">e<" in html
    assert "&lt;b&gt;" in Sampler(top_k=1).trace(z, words=["x", "<b>", "", "", ""])._repr_html_()
    with pytest.raises(ValueError, match=r"logits: shape \(1, 5\)"):
        FULL.trace(z[None])
    with pytest.raises(ValueError, match="words: 3 names for 5 tokens"):
        FULL.trace(z, words=["a", "b", "c"])
    import matplotlib

    matplotlib.use("Agg")
    assert len(trace.figure().axes) == 6
    matplotlib.pyplot.close("all")


# ---------------------------------------------------------------- hostile input


def scaled(z, T):
    "Logits over T, rounded to float32: what is equal then, ranks by id."
    if T == 0:
        return [x if i == z.index(max(z)) else -INF for i, x in enumerate(z)]
    top, limit = max(z), float(np.finfo(np.float32).max)
    T = min(max(float(T), 2.0**-126), limit)  # float32's range, as `temperature` says
    shift = top if T < 1 and abs(top) >= T * limit else 0.0  # the best is too large: it becomes 0

    def low(x):
        return max(x / T, -limit) if T >= 1 or -x < T * limit else -limit

    return [float(np.float32(low(x - shift))) if x > -INF else -INF for x in z]


def reference(z, T, k, p, m):
    """Probabilities of one row by a plain loop in float64, and whether a threshold is too near to
    call."""
    z, near, w = scaled(z, T), False, np.zeros(len(z))
    rank = sorted((i for i in range(len(z)) if z[i] > -INF), key=lambda i: (-z[i], i))

    def gap(i):
        return z[i] - z[rank[0]]

    def weight(i):
        return math.exp(max(gap(i), -1e4))

    if k:
        rank = rank[: int(k)]
    if p < 1:
        total, before, keep = sum(map(weight, rank)), 0.0, []
        for i in rank:
            near |= abs(before / total - p) < 1e-5
            if before / total >= p:
                break
            keep.append(i)
            before += weight(i)
        rank = keep
    if m:
        near |= any(abs(gap(i) - math.log(m)) < 1e-4 for i in rank if i != rank[0])
        rank = [i for i in rank if gap(i) >= math.log(m)]
    for i in rank:
        w[i] = weight(i)
    return w / w.sum(), near


NUMBERS = [
    0,
    1,
    0.5,
    1.0,
    2,
    3,
    -1,
    -0.5,
    1e-30,
    1e-300,
    1e30,
    1e300,
    0.999,
    1.0001,
    INF,
    -INF,
    float("nan"),
    10**30,
    True,
    None,
    "1",
    [],
    {},
    object(),
    [0.5, 0.5],
    torch.tensor(0.7),
    torch.tensor([0.5, 0.5, 1.0]),
    torch.tensor([2, 1, 3]),
    torch.tensor([0.5, float("nan"), 1.0]),
    [1, None, 2],
    np.float32(0.5),
    np.int64(2),
    torch.tensor([0.5, 0.5]),
    torch.tensor([[0.5], [0.5], [0.5]]),
    1j,
    b"x",
]
LOGITS = [
    0.0,
    1.0,
    -2.0,
    5.0,
    3.5,
    88.0,
    -700.0,
    1e4,
    -1e30,
    3e38,
    -3e38,
    1e-40,
    -INF,
    -INF,
    INF,
    float("nan"),
]


def numbers_in(value, rows):
    "The values of a parameter, one for each row, or None if it is no parameter for so many rows."
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return value if rows is not None and len(value) == rows else None
    return [value] * (rows or 1)


def fits(name, v):
    "Is `v` allowed for the parameter?"
    if name == "top_k" and v is None:
        return True
    if isinstance(v, bool) or not isinstance(v, (int, float, np.floating, np.integer)):
        return False
    if not math.isfinite(v):
        return False
    return {
        "temperature": v >= 0,
        "top_k": v >= 0 and v == int(v),
        "top_p": 0 < v <= 1,
        "min_p": 0 <= v <= 1,
    }[name]


def hostile(z, values):
    "One call: a right result, or an error that names an argument; returns which."
    rows = z.shape[0] if z.ndim == 2 else None
    per = {n: numbers_in(v, rows) for n, v in values.items()}
    bad_params = [n for n, v in per.items() if v is None or not all(fits(n, x) for x in v)]
    rows_ok = (
        z.is_floating_point()
        and z.ndim
        and z.shape[-1]
        and not (z.isnan() | (z == INF)).any()
        and z.isfinite().any(-1).all()
    )
    try:
        q = Sampler(**values).distribution(z)
    except (ValueError, TypeError) as e:
        assert bad_params or not rows_ok, f"refused for nothing: {e}"
        assert any(n in str(e) for n in bad_params) or (not rows_ok and "logits" in str(e)), str(e)
        return "refused"
    assert rows_ok and not bad_params, f"accepted {values}"
    assert q.shape == z.shape and q.isfinite().all()
    for i, (row, got) in enumerate(
        zip(z.reshape(-1, z.shape[-1]).tolist(), q.reshape(-1, z.shape[-1]).tolist())
    ):
        T, k, p, m = (per[n][i] for n in ORDER)
        expected, near = reference(row, T, k, p, m)
        if not near:
            np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=f"{row} {values}")
    return "computed"


def test_hostile_parameters_give_a_law_or_an_error(full, record):
    rng, n, seen = np.random.default_rng(9), 100_000 if full else 3000, Counter()
    torch.set_num_threads(1)
    usual = {
        "temperature": [0.5, 1.0, 0, 2.0],
        "top_k": [None, 2, 3],
        "top_p": [0.3, 0.9, 1.0],
        "min_p": [0, 0.1, 0.5],
    }
    wild, where = rng.integers(0, len(NUMBERS), (n, 4)), rng.random((n, 4)) < 0.25
    tame = rng.integers(0, 3, (n, 4))
    shapes, scores, risky = (
        rng.integers(0, 5, n),
        rng.integers(0, 1 << 30, (n, 24)),
        rng.random(n) < 0.3,
    )
    for i in range(n):
        values = {
            name: NUMBERS[wild[i, j]] if where[i, j] else usual[name][tame[i, j]]
            for j, name in enumerate(ORDER)
        }
        shape = [(3, 8), (8,), (3, 5), (1, 1), (3, 2)][shapes[i]]
        pool = LOGITS if risky[i] else LOGITS[:-2]
        flat = [pool[s % len(pool)] for s in scores[i, : math.prod(shape)]]
        seen[hostile(torch.tensor(flat).reshape(shape), values)] += 1
    record("hostile_calls", dict(seen))
    assert min(seen.values()) > n / 20 and sum(seen.values()) == n


anything = st.one_of(
    st.sampled_from(NUMBERS),
    st.floats(),
    st.integers(),
    st.floats(0, 1),
    st.lists(st.floats(0, 2), max_size=4),
)


def test_hostile_rows_give_a_law_or_an_error(full):
    @settings(
        max_examples=2000 if full else 200, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        st.lists(st.one_of(st.sampled_from(LOGITS), st.floats(width=32)), min_size=1, max_size=6),
        st.integers(1, 3),
        st.fixed_dictionaries({}, optional={name: anything for name in ORDER}),
    )
    def check(row, rows, values):
        defaults = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0}
        hostile(torch.tensor([row] * rows, dtype=torch.float32), defaults | values)

    check()


def test_hostile_penalties_give_a_law_or_an_error(full):
    "Penalties, bias, history and keys: never anything but a distribution, a Value- or a TypeError."
    rng, seen = np.random.default_rng(10), Counter()
    histories = [
        None,
        [],
        [[], []],
        [[0, 1], [2, 2]],
        [[0, 5], [1, 1]],
        [[-1], [0]],
        [0, 1],
        [[0.5], [1.0]],
        "ab",
        torch.tensor([[1, 2, 1], [0, 0, 0]]),
        torch.ones(2, 2),
        torch.ones(2, 2, dtype=torch.bool),
        3,
    ]
    biases = [
        None,
        {},
        {1: 1.0},
        {1: -INF},
        {9: 1.0},
        {1: INF},
        {"a": 1},
        [0.0, 1.0, 2.0],
        [1.0] * 5,
        [-INF] * 5,
        3,
        "x",
        {1: float("nan")},
        {i: -INF for i in range(5)},
        torch.zeros(2, 5),
        torch.zeros(3, 5),
        {0: 3e38},
    ]
    seeds, eoss = (
        [0, 1, 2**64 - 1, 2**64, -1, 0.5, None, [1, 2], "s", True],
        [None, 0, 4, 5, -1, [1], [], "e", [0, 1, 2, 3, 4]],
    )
    names = [
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "no_repeat_ngram",
        "min_new_tokens",
    ]

    def pick(options):
        return options[rng.integers(len(options))]

    for _i in range(20_000 if full else 1500):
        values = {n: pick(NUMBERS) for n in names if rng.random() < 0.25}
        values |= dict(logit_bias=pick(biases)) if rng.random() < 0.3 else {}
        values |= dict(seed=pick(seeds)) if rng.random() < 0.2 else {}
        values |= dict(eos=pick(eoss)) if "min_new_tokens" in values and rng.random() < 0.9 else {}
        z = torch.tensor(rng.normal(size=(2, 5)) * pick([1, 1, 1e38]), dtype=torch.float32)
        z[:, 3] = pick([0.0, -INF, -INF, INF, float("nan")]) if rng.random() < 0.3 else 0.0
        ids = pick(histories) if rng.random() < 0.8 else None
        before = z.clone()
        try:
            q = Sampler(**values).distribution(z, ids)
        except (ValueError, TypeError) as e:
            known = [*values, "ids", "logits", "logit_bias", "eos", "seed"]
            assert any(n in str(e) for n in known), f"{e!r} names no argument of {values}"
            seen["refused"] += 1
        else:
            torch.testing.assert_close(q.sum(-1), torch.ones(2))
            seen["computed"] += 1
        assert z.equal(before) or z.isnan().any()
    assert min(seen.values()) > sum(seen.values()) / 10


@pytest.mark.parametrize(
    "params,error,text",
    [
        (dict(temperature=-1), ValueError, r"temperature: -1 is outside \[0, inf\)"),
        (dict(temperature=float("nan")), ValueError, "temperature: nan"),
        (dict(temperature=[1.0, -2.0]), ValueError, "temperature, row 1: -2.0"),
        (dict(top_k=-1), ValueError, "top_k: -1"),
        (dict(top_k=1.5), ValueError, "top_k: 1.5 is not an integer"),
        (dict(top_k="5"), TypeError, "top_k: '5'"),
        (dict(top_p=0), ValueError, r"top_p: 0 is outside \(0, 1\]"),
        (dict(top_p=torch.tensor([0.5, 1.5])), ValueError, "top_p, row 1: 1.5"),
        (dict(min_p=2), ValueError, "min_p: 2"),
        (dict(min_new_tokens=3), ValueError, "eos: None, but min_new_tokens=3 needs an end mark"),
        (dict(eos=-1), ValueError, "eos: id -1"),
        (dict(seed=-1), ValueError, "seed: -1"),
        (dict(seed=0.5), TypeError, "seed: 0.5"),
        (dict(rows=["a"]), TypeError, "row"),
        (dict(logit_bias={0: INF}), ValueError, "logit_bias: id 0: inf"),
        (dict(order=("temperature", "top_k", "top_p")), ValueError, "order: "),
        (dict(order="T"), ValueError, "order: 'T'"),
        (dict(order=(*ORDER, "xtc")), ValueError, "order: "),
        (dict(order=(*ORDER, "tail_free", "tail_free")), ValueError, "order: "),
        (dict(typical_p=0), ValueError, r"typical_p: 0 is outside \(0, 1\]"),
        (dict(epsilon_cutoff=[0.1, 2]), ValueError, "epsilon_cutoff, row 1: 2"),
        (dict(eta_cutoff=-1), ValueError, "eta_cutoff: -1"),
        (dict(top_n_sigma=-1), ValueError, "top_n_sigma: -1"),
        (dict(tail_free=1.1), ValueError, "tail_free: 1.1"),
        (dict(xtc_probability=1.1), ValueError, "xtc_probability: 1.1"),
        (dict(xtc_threshold=0), ValueError, "xtc_threshold: 0"),
        (dict(dynatemp_range=-0.1), ValueError, "dynatemp_range: -0.1"),
        (dict(dynatemp_exponent="1"), TypeError, "dynatemp_exponent: '1'"),
        (dict(dry_multiplier=-1), ValueError, "dry_multiplier: -1"),
        (dict(dry_base=0.5), ValueError, "dry_base: 0.5"),
        (dict(dry_allowed_length=1.5), ValueError, "dry_allowed_length: 1.5"),
        (dict(dry_window=0), ValueError, "dry_window: 0"),
        (dict(dry_breakers=5), TypeError, r"breakers \(dry_breakers\): 5"),
        (dict(dry_breakers=[-1]), ValueError, r"breakers \(dry_breakers\): id -1"),
        (dict(ties="some"), ValueError, "ties: 'some'"),
        (dict(boundary=1), ValueError, "boundary: 1"),
        (dict(penalty_window=0), ValueError, r"penalty_window: 0 is outside \[1, inf\)"),
        (dict(penalty_window=[3, 1.5]), ValueError, "penalty_window, row 1: 1.5 is not an integer"),
        (dict(count_prompt="some"), ValueError, "count_prompt: 'some'"),
        (dict(count_prompt=True), ValueError, "count_prompt: True"),
        (dict(joint="yes"), ValueError, "joint: 'yes'"),
        (dict(backend="gpu"), ValueError, "backend: 'gpu'"),
    ],
)
def test_refused_at_construction(params, error, text):
    with pytest.raises(error, match=text):
        Sampler(**params)


def test_refused_when_the_batch_is_known():
    world = six_words()
    with pytest.raises(ValueError, match=r"\(top_p\): shape \(2,\), expected \(\) or \(3,\)"):
        Sampler(top_p=[0.5, 0.6]).distribution(logits(3, 6))
    for n in (2, 4):
        for params in (
            dict(temperature=torch.ones(n)),
            dict(seed=list(range(n))),
            dict(rows=torch.arange(n)),
            dict(logit_bias=torch.zeros(n, 6)),
            dict(top_k=[None] * n),
            dict(penalty_window=[None] * n),
        ):
            with pytest.raises(ValueError, match=rf"{next(iter(params))}: {n} values for 3 rows"):
                generate(world, [""] * 3, Sampler(**params))
            with pytest.raises(ValueError, match=rf"{next(iter(params))}: {n} values for 3 rows"):
                beam_search(world, [""] * 3, 2, 2, process=Sampler(**params))
    with pytest.raises(ValueError, match="logit_bias: id 6 is outside"):
        generate(world, "", Sampler(logit_bias={6: 1.0}))


def test_a_sampler_in_a_beam_is_its_law():
    "Penalties and filters, one a row: width 1 takes the law's best token and adds its logarithm."
    sampler = Sampler(repetition_penalty=[1.5, 3.0], temperature=0.7, top_k=3, no_repeat_ngram=2)
    found = beam_search(Deep(), [[1, 2], [3, 3]], 1, 5, process=sampler, ignore_eos=True)
    for row, (best,) in enumerate(found):
        ids = best.prompt_ids.tolist()
        for token, logprob in zip(best.ids.tolist(), best.logprobs.tolist()):
            logits = Deep()(torch.tensor([ids])).logits
            law = sampler.at(torch.tensor([row])).distribution(logits, torch.tensor([ids]))[0]
            assert law.argmax() == token and abs(law[token].log().item() - logprob) < 1e-9
            ids.append(token)


# ---------------------------------------------------------------- the cuts beyond top-p

MORE = {  # one setting of each that acts on the rows below
    "typical_p": 0.6, "epsilon_cutoff": 0.04, "eta_cutoff": 0.3, "top_n_sigma": 1.1,
    "tail_free": 0.9, "xtc_probability": 1.0, "dynatemp_range": 0.8, "dry_multiplier": 2.0,
}  # fmt: skip


def test_off_the_cuts_cost_nothing():
    "The same form of the draw, the same stages, the same bits; and the same object in the loop."
    z, off = (
        logits(6, 50),
        dict.fromkeys(("typical_p", "tail_free"), 1)
        | dict(
            epsilon_cutoff=0, eta_cutoff=0.0, top_n_sigma=0, xtc_probability=0, dynatemp_range=0
        ),
    )
    for params in (dict(temperature=0.8, top_p=0.9), {}, dict(top_k=5)):
        a, b = Sampler(**params), Sampler(**params, **off, dry_multiplier=0, xtc_threshold=0.3)
        assert find_backend(params=a) is find_backend(params=b)
        assert [n for n, _ in stages(z, a)] == [n for n, _ in stages(z, b)] == list(params)
        assert a.distribution(z).equal(b.distribution(z))
        assert vars(draw(z, a, Key(2))).keys() == vars(draw(z, b, Key(2))).keys()
        for x, y in zip(vars(draw(z, a, Key(2))).values(), vars(draw(z, b, Key(2))).values()):
            assert x is y is None or x.equal(y)
        assert b.at(torch.arange(3)) is b


@pytest.mark.parametrize("name", MORE)
def test_a_cut_that_is_on_goes_to_the_plain_chain(name):
    z, ids = logits(6, 50), torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]]).expand(6, -1)
    on = Sampler(0.9, top_p=0.99, **{name: MORE[name]})
    assert not on.distribution(z, ids).equal(Sampler(0.9, top_p=0.99).distribution(z, ids))
    if name == "dry_multiplier":  # a penalty: any form may draw
        return
    assert find_backend(params=on).__name__ == "draw_plain"
    assert find_backend(params=Sampler(**{name: [MORE[name]] * 6})).__name__ == "draw_plain"
    if not missing("fused"):
        with pytest.raises(ValueError, match="backend: 'fused' knows"):
            draw(z, on, Key(1), "fused")


@pytest.mark.parametrize("name", MORE)
def test_cuts_by_row(name):
    "A row that has its cut off is as without it, the others as alone, in the loop as well."
    z, ids = logits(4, 30), torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]]).expand(4, -1)
    off = OFF[name]
    both = Sampler(0.9, **{name: [off, MORE[name], off, MORE[name]]}, seed=3)
    plain, on = Sampler(0.9, seed=3), Sampler(0.9, **{name: MORE[name]}, seed=3)
    law = both.distribution(z, ids)
    for i, alone in enumerate((plain, on, plain, on)):
        torch.testing.assert_close(law[i], alone.distribution(z[i], ids[i]), atol=1e-6, rtol=0)
    world = six_words(eos=None)
    texts = generate(world, ["I", "I like", "", "cold"], both, max_new_tokens=9).ids
    for i, (prompt, alone) in enumerate(zip(["I", "I like", "", "cold"], (plain, on, plain, on))):
        own = {f: getattr(alone, f) for f in alone.__dataclass_fields__} | dict(rows=i)
        assert generate(world, prompt, Sampler(**own), max_new_tokens=9).ids.equal(texts[i])


def test_unnamed_cuts_come_last_and_named_ones_in_their_place():
    z = logits(30, 40)
    params = dict(temperature=1.5, min_p=0.05, typical_p=0.7, top_n_sigma=1.5, tail_free=0.95)
    first = Sampler(**params, order=("top_n_sigma", *ORDER))
    assert [n for n, _ in stages(z, Sampler(**params))] == list(params)
    assert [n for n, _ in stages(z, first)] == [
        "top_n_sigma", "temperature", "min_p", "typical_p", "tail_free",
    ]  # fmt: skip
    by_hand = tail_free(typical_p(min_p(temperature(top_n_sigma(z, 1.5), 1.5), 0.05), 0.7), 0.95)
    assert truncate(z, first).equal(by_hand)
    assert not truncate(z, Sampler(**params)).equal(by_hand)
    llama = DIALECTS["llama.cpp"]["order"]
    assert set(llama) == {*ORDER, *CUTS} - {"epsilon_cutoff", "eta_cutoff"}


def test_the_law_of_xtc_is_the_mixture_of_its_two_sides():
    "Wherever it stands in the order: each side goes through the whole chain."
    z = logits(20, 30, scale=1)
    for order in (ORDER, DIALECTS["llama.cpp"]["order"], ("xtc_probability", *ORDER)):
        cut = dict(temperature=2.0, top_p=0.8, xtc_threshold=0.05, order=order)
        p = torch.linspace(0, 1, 20)
        always, never = Sampler(**cut, xtc_probability=1.0), Sampler(**cut)
        law = p[:, None] * always.distribution(z) + (1 - p[:, None]) * never.distribution(z)
        found = Sampler(**cut, xtc_probability=p)
        torch.testing.assert_close(found.distribution(z), law, atol=1e-6, rtol=0)
        out = draw(z, found, Key(4))
        assert out.kept.equal((law > 0).sum(-1))
        want = law.gather(1, out.ids[:, None])[:, 0].log()
        torch.testing.assert_close(out.logprob, want, atol=1e-5, rtol=0)
        coin = xtc_coin(Key(4), p, z)
        for side, sampler in ((True, always), (False, never)):
            assert out.ids[coin == side].equal(draw(z, sampler, Key(4)).ids[coin == side])
    assert Sampler(xtc_probability=0.5).process(z[:1], context([[1]])).isfinite().all()


def test_a_trace_shows_the_cuts():
    z = torch.tensor([0.5, 0.25, 0.09, 0.06, 0.04, 0.03, 0.02, 0.01]).log()
    sampler = Sampler(typical_p=0.95, xtc_probability=0.5, xtc_threshold=0.2)
    yes, no = sampler.trace(z), sampler.trace(z, coin=False)
    assert [s.name for s in yes.stages] == ["logits", "typical_p", "xtc_probability"]
    assert [s.removed for s in yes.stages] == [[], [6, 7], [0]] and no.stages[-1].removed == []
    assert "xtc_probability" in repr(yes) and yes.stages[-1].setting == 0.5


def test_dynamic_temperature_is_a_stage():
    z = logits(9, 20)
    sampler = Sampler(0.9, top_k=6, dynatemp_range=[0.5] * 8 + [0], dynatemp_exponent=2.0)
    T = entropy_temperature(z, 0.9, [0.5] * 8 + [0], 2.0)
    assert sampler.distribution(z).equal(Sampler(T, top_k=6).distribution(z)) and T[8] == 0.9
    last = Sampler.dialect("llama.cpp", temperature=0.9, top_k=6, dynatemp_range=0.5)
    T = entropy_temperature(top_k(z, 6), 0.9, 0.5)
    assert last.distribution(z).equal(Sampler(T, top_k=6).distribution(z))


def test_dry_in_the_loop_sees_the_prompt_and_its_window():
    z, text = torch.zeros(6), torch.tensor([1, 2, 3, 1, 2])
    rule = dict(dry_multiplier=0.5, dry_base=2.0)
    assert penalize(z, Sampler(**rule), text).tolist() == [0, 0, 0, -0.5, 0, 0]
    for more in (dict(dry_window=4), dict(dry_allowed_length=3), dict(dry_breakers=[2])):
        assert penalize(z, Sampler(**rule, **more), text).tolist() == [0] * 6
    assert penalize(z, Sampler(**rule, dry_window=5, dry_breakers=(4,)), text)[3] == -0.5
    two = Sampler(**rule, dry_window=[None, 4])
    assert penalize(z.expand(2, -1), two, text.expand(2, -1))[:, 3].tolist() == [-0.5, 0]


# ---------------------------------------------------------------- mirostat


def seeded(n):
    return torch.Generator().manual_seed(n)


def context(ids, row=None):
    ids = torch.tensor(ids)
    row = torch.arange(len(ids)) if row is None else row
    return Context(ids, torch.ones_like(ids).bool(), torch.full((len(ids),), ids.shape[1]), row)


@pytest.mark.parametrize("renormalised", [False, True])
def test_mirostat_is_its_definition(renormalised):
    "Token for token and limit for limit, with logarithms of Python, on rows that come and go."
    model, n = TableModel([1 / 9] * 9, (2 * torch.randn(9, 9, generator=seeded(1))).softmax(-1)), 30
    choose = Mirostat(1.2, 0.3, Sampler(0.9, seed=5, rows=2), renormalised)
    limit, text = 2.4, [1, 2]
    for step in stream(model, [1, 2], choose, n, ignore_eos=True):
        z = temperature(model(torch.tensor([text])).logits[0], 0.9)
        q = llama_filters.shares(z.tolist())
        left = llama_filters.mirostat(z.tolist(), limit)
        only = z.where(torch.isin(torch.arange(len(z)), torch.tensor(sorted(left))), -INF)
        assert step.ids.item() == gumbel_max(only[None], Key(5, 2, len(text))).item()
        assert step.draw.kept.item() == len(left)
        share = math.fsum(q[i] for i in left)
        token = step.ids.item()
        assert step.draw.logprob.item() == pytest.approx(math.log(q[token] / share), abs=1e-5)
        limit -= 0.3 * (-math.log2(q[token] / (share if renormalised else 1)) - 1.2)
        text.append(token)


def test_mirostat_by_row_and_in_a_batch():
    world, prompts = six_words(eos=None), ["I", "", "cold coffee"]
    own = [(0.5, 0.1), (2.0, 0.3), (1.2, 0.0)]
    batch = Mirostat([t for t, _ in own], [r for _, r in own], Sampler(seed=1, rows=[5, 6, 7]))
    texts = generate(world, prompts, batch, max_new_tokens=12).ids
    for i, (t, r) in enumerate(own):
        alone = Mirostat(t, r, Sampler(seed=1, rows=5 + i))
        assert generate(world, prompts[i], alone, max_new_tokens=12).ids.equal(texts[i])


def test_mirostat_holds_its_target(full):
    "Where the world has enough surprise to give, the mean comes near the target."
    table = (3 * torch.randn(40, 40, generator=seeded(3))).softmax(-1)
    model, n = TableModel([1 / 40] * 40, table), 1000 if full else 120
    for target in (1.1, 1.6):
        out = generate(model, [[0]] * 8, Mirostat(target, 0.2), max_new_tokens=n)
        bits = -torch.stack(out.logprobs) / math.log(2)
        assert abs(bits.mean().item() - target) < 0.1


@pytest.mark.parametrize(
    "params,error,text",
    [
        (dict(target=-1), ValueError, "target: -1"),
        (dict(target=[1, "x"]), TypeError, "target, row 1: 'x'"),
        (dict(rate=float("nan")), ValueError, "rate: nan"),
        (dict(sampler=greedy), TypeError, "sampler: "),
        (dict(sampler=5), TypeError, "sampler: 5"),
    ],
)
def test_mirostat_refuses_bad_parameters_by_name(params, error, text):
    with pytest.raises(error, match=text):
        Mirostat(**params)
    with pytest.raises(ValueError, match="target: 2 values for 3 rows"):
        generate(six_words(), [""] * 3, Mirostat([1.0, 2.0]))


def test_mirostat_is_told_what_follows_by_yes_or_no():
    with pytest.raises(ValueError, match="renormalised: 'no' is not one of False, True"):
        Mirostat(renormalised="no")
