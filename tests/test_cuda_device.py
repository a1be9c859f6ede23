"""From logits on a GPU to tokens without waiting for it: run on a pretended GPU, with true values
and the interpreted kernels."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.pretend_gpu import OnGPU, PretendGPU, Waits, bare
from test_cuda import GPU, HAVE  # the kernels are interpreted, and fast, from here on

import decoding_book.cuda as C
from decoding_book.entropix import EntropixConfig, EntropySampler, PublishedConfig
from decoding_book.loop import Context, Prediction, generate
from decoding_book.noise import Key
from decoding_book.sampler import Sampler, draw
from decoding_book.transformer import GPT, GPTConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(not HAVE, reason="Triton is not installed: pip install triton==3.7.1"),
    pytest.mark.skipif(GPU, reason="there is a GPU here: test_cuda.py runs on it"),
]
INF, NAN, DEV = math.inf, math.nan, "cuda:0"


class OnPretended:
    "A kernel that takes tensors of the pretended GPU, and no others."

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def start(*args, **constants):
            for x in args:
                assert not isinstance(x, torch.Tensor) or isinstance(x, OnGPU), (
                    "a tensor of the CPU"
                )
            with torch.utils._python_dispatch._disable_current_modes():
                self.kernel[grid](*map(bare, args), **constants)

        return start


@pytest.fixture
def gpu(monkeypatch):
    for name in ("draw_kernel", "scan_kernel", "weigh_kernel", "finish_kernel"):
        monkeypatch.setattr(C, name, OnPretended(getattr(C, name)))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: SimpleNamespace(multi_processor_count=132)
    )
    return PretendGPU()


def rows(B=5, V=60, seed=0):
    return 3 * torch.randn(B, V, generator=torch.Generator().manual_seed(seed))


def place(B, wrap=OnGPU):
    "A `Context` of `B` rows in the middle of a text, on the pretended GPU."
    ids = torch.randint(0, 60, (B, 7), generator=torch.Generator().manual_seed(1))
    return Context(
        *map(
            wrap,
            (ids, torch.ones_like(ids, dtype=torch.bool), torch.full((B,), 4), torch.arange(B)),
        )
    )


SETTINGS = [dict(temperature=0, top_k=None), dict(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01)]


# ---------------------------------------------------------------- the pretended GPU itself

LOOKS = {
    "item": lambda t: t[0].item(),
    "bool": lambda t: bool(t.any()),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "numpy": lambda t: t.numpy(),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "list": lambda t: t[[0, 2]],
    "unique": lambda t: t.unique(),
    "equal": lambda t: t.equal(t),
    "to": lambda t: t.to("cpu"),
    "masked_select": lambda t: t.masked_select(t > 0),
    "float": lambda t: float(t[1]),
    "sent": lambda t: torch.tensor([1.0, 2.0], device=DEV),
    "moved": lambda t: torch.ones(3).to(DEV),
    "number": lambda t: torch.as_tensor(3.0, device=DEV),
    "counts": lambda t: torch.repeat_interleave(t.long()),
    "hasty": lambda t: torch.ones(3).to(DEV, non_blocking=True),
}


@pytest.mark.parametrize("look", LOOKS)
def test_the_pretended_gpu_notices(look, gpu):
    with gpu:
        t = torch.ones(3, device=DEV)
        assert t.is_cuda and t.device.type == "cuda"
        with pytest.raises(Waits):
            LOOKS[look](t)


def test_what_needs_no_waiting(gpu):
    with gpu:
        t = torch.arange(6.0, device=DEV).reshape(2, 3)
        assert bare(torch.where(t > 2, 0.0, t)[torch.arange(1, device=DEV)]).tolist() == [[0, 1, 2]]
        sent = torch.tensor([1.0, 2.0]).pin_memory().to(DEV, non_blocking=True)
        assert sent.is_cuda and bare(t.sum(1) + 1).tolist() == [4, 13]
        with pytest.raises(RuntimeError, match="on cuda and on cpu"):
            t + torch.ones(3)


# ---------------------------------------------------------------- no waiting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw_waits_for_nothing(gpu, dtype):
    """Numbers, lists and tensors on either side; every part of the key; logits as they come, not
    cast."""
    z = rows().to(dtype)
    own = dict(
        temperature=[0.5, 0.0, 1.0, 2.0, 0.9],
        top_k=[None, 7, 0, 3, 60],
        top_p=[0.9, 1.0, 0.5, 0.8, 0.99],
        min_p=[0.0, 0.1, 0.0, 0.02, 0.0],
    )
    keys = [
        Key(3),
        Key(2**64 - 1, 7, 5, 1),
        Key([1, 2, 3, 4, 2**63 + 9], torch.arange(5), [3, 1, 4, 1, 5]),
    ]
    asked = [*zip(SETTINGS, keys), (own, keys[2])]
    plain = [draw(z, Sampler(**s), k, "plain") for s, k in asked]
    with gpu:
        on = OnGPU(z)
        found = [draw(on, Sampler(**s), k) for s, k in asked]
    assert not gpu.seen["aten::_to_copy"] or dtype == torch.float32 or not gpu.seen["aten::copy_"]
    for a, b in zip(found, plain):
        assert isinstance(a.ids, OnGPU) and bare(a.ids).equal(b.ids) and bare(a.kept).equal(b.kept)


def test_parameters_and_keys_that_are_on_the_gpu(gpu):
    z, T, p = (
        rows(),
        torch.tensor([0.0, 0.5, 1.0, 2.0, 0.9]),
        torch.tensor([0.9, 0.5, 1.0, 0.1, 0.99]).double(),
    )
    k, row, seed = (
        torch.tensor([0, 7, 1, 60, 2]),
        torch.tensor([9, 8, 7, 6, 5]),
        torch.tensor([-1, 5, 6, 7, 2**40]),
    )
    plain = draw(
        z,
        Sampler(temperature=T, top_p=p, top_k=k),
        Key([2**64 - 1, 5, 6, 7, 2**40], row, torch.tensor(3)),
        "plain",
    )
    with gpu:
        sampler = Sampler(temperature=OnGPU(T), top_p=OnGPU(p), top_k=OnGPU(k))
        found = draw(OnGPU(z), sampler, Key(OnGPU(seed), OnGPU(row), OnGPU(torch.tensor(3))))
        with pytest.raises(ValueError, match=r"temperature: shape \(5,\), expected \(\) or \(3,\)"):
            draw(OnGPU(z[:3]), sampler, Key())
        with pytest.raises(ValueError, match=r"key: row of shape \(5,\)"):
            draw(OnGPU(z[:3]), Sampler(), Key(0, OnGPU(row)))
    assert bare(found.ids).equal(plain.ids) and bare(found.kept).equal(plain.kept)


def test_a_sampler_in_the_loop_waits_for_nothing(gpu):
    z, T = rows(), torch.tensor([0.0, 0.5, 1.0, 2.0, 0.9])
    seeds = [2**63 + 1, 2, 3, 4, 5]
    samplers = [
        dict(),
        dict(temperature=0.8, top_p=0.9, seed=5),
        dict(temperature=T.tolist(), seed=seeds, rows=[4, 3, 2, 1, 0]),
        dict(temperature=T, top_k=torch.tensor([3, 0, 5, 9, 60]), seed=seeds),
    ]
    for params in samplers:
        there = {n: OnGPU(v) if torch.is_tensor(v) else v for n, v in params.items()}
        with gpu:
            found = Sampler(**there)(Prediction(OnGPU(z)), place(5))
            cut = place(5)
            cut = Context(
                cut.ids[2:], cut.mask[2:], cut.prompt_lengths[2:], cut.row[2:]
            )  # two rows have ended
            later = Sampler(**there)(Prediction(OnGPU(z)[2:]), cut)
        numbers = torch.arange(5) if "rows" not in params else torch.tensor(params["rows"])
        key = Key(params.get("seed", 0), numbers, torch.full((5,), 7))
        plain = draw(z, Sampler(**{n: v for n, v in params.items() if n != "rows"}), key, "plain")
        assert bare(found.ids).equal(plain.ids) and bare(later.ids).equal(plain.ids[2:])
    with gpu, pytest.raises(ValueError, match="temperature: 2 values for 5 rows"):
        Sampler(temperature=[1.0, 2.0])(Prediction(OnGPU(z)), place(5))


class TwoIds:
    vocab_size = 60

    def encode(text):
        return [7, 9]


@pytest.mark.parametrize(
    "config",
    [EntropixConfig(), PublishedConfig(), EntropixConfig(low_ent_thresh=0, high_ent_thresh=99)],
)
@pytest.mark.parametrize("clarify", [None, 7, "two ids"])
def test_the_policy_waits_for_nothing(gpu, config, clarify):
    "Measures, decision and draw for a batch: the tokens and branches are those of the CPU."
    z = torch.cat([rows(1, seed=3), rows(2) * 0.1])
    scores, mask = (
        torch.randn(3, 2, 3, 7, generator=torch.Generator().manual_seed(3)),
        torch.ones(3, 7, dtype=torch.bool),
    )
    for attention, layers in ((False, None), (True, None), (True, [1])):
        one, other = (
            EntropySampler(
                config,
                seed=3,
                attention=attention,
                layers=layers,
                clarify=clarify,
                tokenizer=TwoIds,
            )
            for _ in "ab"
        )
        plain = one(Prediction(z, attention=scores, key_mask=mask), place(3, bare))
        with gpu:
            found = other(
                Prediction(OnGPU(z), attention=OnGPU(scores), key_mask=OnGPU(mask)), place(3)
            )
        assert bare(found.ids).equal(plain.ids) and bare(found.branch).equal(plain.branch)


# ---------------------------------------------------------------- the whole loop


def put_on(model):
    "A module's tensors, on the pretended GPU."
    for part in model.modules():
        for table in (part._parameters, part._buffers):
            table.update({n: OnGPU(p.detach()) for n, p in table.items()})
    return model


CHECKS = ("loop.py, _own_law", "loop.py, _most_probable", "loop.py, _chosen_ids")  # one in each


@pytest.mark.parametrize(
    "choose", [Sampler(1.5, seed=2), EntropySampler(seed=2)], ids=["sampler", "policy"]
)
def test_the_loop_on_a_gpu(gpu, choose, record):
    """Model, cache, chooser: the CPU's texts, though rows end early. The loop waits, the chooser
    does not."""
    prompts = ["abc", "d"]
    model = GPT(GPTConfig("abcdefghij", width=16, layers=2, heads=2, context=32)).eval()
    for i, p in enumerate(model.parameters()):
        p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(i))
    free = [i.tolist() for i in generate(model, prompts, choose, 5).ids]
    print(free)
    stop = next(i for i in free[0] if i not in free[1])  # the first row ends there
    plain = generate(model, prompts, choose, 5, stop=stop)
    gpu.count = True
    with gpu:
        found = generate(put_on(model), prompts, choose, 5, stop=stop)
    with gpu:
        assert [i.tolist() for i in found.ids] == [
            i.tolist() for i in plain.ids
        ] and found.text == plain.text
    assert len({len(i) for i in plain.ids}) > 1
    for line in gpu.waits:
        assert line.startswith(("loop.py", "transformer.py", "outside")), line
    each = [n for line, n in gpu.waits.items() if line.startswith(CHECKS)]
    assert each == [len(plain.steps)] * 3, gpu.waits  # its three checks
    loop = ("loop.py, _stream", "loop.py, _ask", "loop.py, _longer", "loop.py, _choose", *CHECKS)
    often = {
        line: n for line, n in gpu.waits.items() if line.startswith(loop) and n >= len(plain.steps)
    }
    assert sum(often.values()) <= 7 * len(plain.steps), often
    record(
        "cuda_waits_of_the_loop",
        {line: n for line, n in gpu.waits.items() if n >= len(plain.steps)},
    )


# ---------------------------------------------------------------- what cannot be looked at
# becomes -1


def ids(found):
    return bare(found.ids).tolist()


@pytest.mark.parametrize(
    "bad",
    [
        dict(top_k=-1),
        dict(top_k=2.5),
        dict(top_k=NAN),
        dict(top_k=-(2**60)),
        dict(top_p=0.0),
        dict(top_p=-0.1),
        dict(top_p=NAN),
        dict(top_p=1.01),
        dict(temperature=-1.0),
        dict(temperature=NAN),
        dict(temperature=INF),
        dict(min_p=1.5),
        dict(min_p=-0.1),
        dict(min_p=NAN),
    ],
)
def test_an_impossible_parameter_on_the_gpu_spoils_its_row_only(gpu, bad):
    ((name, value),) = bad.items()
    z, usual = rows(3), dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
    good = draw(z, Sampler(**usual), Key(1), "plain").ids.tolist()
    column = torch.full(
        (3,), usual[name], dtype=torch.double if isinstance(value, float) else torch.long
    )
    column[1] = value
    with gpu:
        found = draw(OnGPU(z), Sampler(**usual | {name: OnGPU(column)}), Key(1))
        alone = draw(OnGPU(z), Sampler(**{name: OnGPU(column)}), Key(1))
        sliced = C.launch(
            OnGPU(z), C.ask(3, DEV, **usual | {name: OnGPU(column)}, key=Key(1)), slices=2, block=32
        )
    assert ids(found) == ids(sliced) == [good[0], -1, good[2]]
    assert ids(alone)[1] == -1 and min(ids(alone)[::2]) >= 0
    assert bare(found.kept)[1] == 0 and bare(found.logprob)[1].isnan()


def test_bad_rows_pass_through_draw(gpu):
    "Nothing finite, NaN, +inf: -1, and an error where the check was asked for."
    z = rows(6)
    good = draw(z, Sampler(top_p=0.9), Key(1), "plain").ids.tolist()
    z[1], z[3, 59], z[4, 0] = -INF, NAN, INF
    with gpu:
        assert ids(draw(OnGPU(z), Sampler(top_p=0.9), Key(1))) == [
            good[0],
            -1,
            good[2],
            -1,
            -1,
            good[5],
        ]
        with pytest.raises(Waits):
            draw(OnGPU(z), Sampler(), Key(1), check=True)
        with pytest.raises(Waits):
            draw(OnGPU(z), Sampler(), Key(1), "plain")
    with PretendGPU(count=True), pytest.raises(ValueError, match="row 1 has no finite logit"):
        draw(OnGPU(z), Sampler(), Key(1), check=True)
