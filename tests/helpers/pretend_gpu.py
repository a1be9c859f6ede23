"""A GPU that is only pretended: what tensors say, what may not be mixed, where one would wait.

Inside `with PretendGPU() as gpu:` a tensor made on "cuda" says `is_cuda`, and its values lie in an
ordinary tensor. Every torch operation passes through here. One whose result or shape depends on
values that only the GPU knows, a copy from the GPU, or a copy to it from memory that is not pinned,
would make the processor wait: it raises `Waits`, or is counted with `count=True`. So the code
between a model's logits and its token can be run, with true values, on a machine that has no GPU.
"""

import traceback
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# whose result is a Python value or has a shape that depends on values, where torch's own tags do
# not say so
LOOKS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::repeat_interleave.Tensor",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}


class Waits(RuntimeError):
    "The processor would wait for the GPU here."


class OnGPU(torch.Tensor):
    "A tensor that says it is on a GPU."

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            storage_offset=inner.storage_offset(),
            device="meta",
        )
        self.inner = inner
        return self

    is_cuda = True
    device = torch.device("cuda:0")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a pretended GPU, outside of it")

    def __getitem__(self, at):  # torch would make the indices on "meta", without their values
        def known(i):
            return torch.tensor(i) if isinstance(i, list) else i

        return super().__getitem__(tuple(map(known, at)) if isinstance(at, tuple) else known(at))

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        return self.cpu().numpy()

    def __repr__(self):
        return f"OnGPU({self.inner})"


def bare(x):
    return x.inner if isinstance(x, OnGPU) else x


def caller():
    "The innermost line of the package that is at work."
    for f in reversed(traceback.extract_stack()):
        if "decoding_book" in f.filename:
            return f"{f.filename.rsplit('/', 1)[-1]}, {f.name}: {f.line}"
    return "outside of the package"


class PretendGPU(TorchDispatchMode):
    "All torch operations inside go to the CPU, and are watched."

    def __init__(self, count=False):
        super().__init__()
        self.count, self.waits, self.seen = count, Counter(), Counter()

    def __enter__(self):
        self.lazy, torch.cuda._lazy_init = torch.cuda._lazy_init, lambda: None
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(..., device="cuda:0") becomes a copy, seen here
        return super().__enter__()

    def __exit__(self, *error):
        torch.cuda._lazy_init = self.lazy
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def wait(self, why):
        if not self.count:
            raise Waits(f"{why} at {caller()}")
        self.waits[caller()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.name().removesuffix(".default")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = any(isinstance(x, OnGPU) for x in tensors)
        device = kwargs.get("device")
        to_gpu = here if device is None else torch.device(device).type == "cuda"
        self.seen[name] += here
        copy = name in ("aten::_to_copy", "aten::copy_")
        if here and (
            name in LOOKS
            or {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        ):
            if name != "aten::index.Tensor":
                self.wait(f"{name} looks at values")
        if here and name in (
            "aten::index.Tensor",
            "aten::index_put_",
            "aten::index_put",
            "aten::_index_put_impl_",
        ):
            own = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in own):
                self.wait("a mask counts its values")
            if not all(isinstance(i, OnGPU) for i in own):
                self.wait("indices are sent to the GPU")
            tensors = [x for x in tensors if all(x is not i for i in own)]
        if copy:
            to_gpu = self.copies(name, args, kwargs, to_gpu)
        elif (
            here
        ):  # one number may stand beside the GPU's tensors; other tensors of the CPU may not
            for x in tensors:
                if not isinstance(x, OnGPU) and x.ndim:
                    raise RuntimeError(f"{name}: tensors on cuda and on cpu at {caller()}")
        if name == "aten::is_pinned":
            return getattr(args[0], "pinned", False)
        if name == "aten::_pin_memory":
            out = args[0].clone()
            out.pinned = True
            return out
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        out = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        if name.endswith("_") and isinstance(args[0], OnGPU):
            return args[0]  # in place: the same tensor
        if not to_gpu:
            return out
        return tree_map(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) else x, out)

    def copies(self, name, args, kwargs, to_gpu):
        "A copy between the two: which way it goes, and whether anybody waits for it."
        target, source = (args[0], args[1]) if name == "aten::copy_" else (None, args[0])
        there = isinstance(target, OnGPU) if target is not None else to_gpu
        if isinstance(source, OnGPU) and not there:
            self.wait("a copy from the GPU")
        free = kwargs.get("non_blocking", len(args) > 2 and args[2]) and getattr(
            source, "pinned", False
        )
        if not isinstance(source, OnGPU) and there and not free:
            self.wait("a copy to the GPU that is not pinned")
        return there
