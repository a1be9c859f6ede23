"""A device like Apple's MPS, only pretended: it has no float64, and its tensors do not mix with
those of the CPU.

It goes by the name of "meta", because a torch without MPS refuses the name "mps" before anything
can be pretended. Inside `with PretendMPS():` a tensor made on "meta", or from one, says that it is
there; its values lie in an ordinary tensor. An operation that would make a float64 tensor on the
device raises as torch does there.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from decoding_book import checks

NAME = "meta"


class OnMPS(torch.Tensor):
    "A tensor that says it is on MPS."

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = torch.device(NAME)

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype "
                "as the MPS framework doesn't support float64"
            )
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

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a pretended device, outside of it")

    def __getitem__(self, at):  # torch would make the indices on "meta", without their values
        def known(i):
            return torch.tensor(i) if isinstance(i, list) else i

        return super().__getitem__(tuple(map(known, at)) if isinstance(at, tuple) else known(at))

    def new_tensor(self, data, dtype=None, **options):
        return torch.tensor(data, dtype=dtype or self.dtype).to(NAME)

    def tolist(self):
        return self.inner.tolist()

    def numpy(self):
        raise TypeError("can't convert the device's type tensor to numpy")

    def __repr__(self):
        return f"OnMPS({self.inner})"


def in_two_steps(make):
    "Make a tensor on the CPU, then send it."

    def made(*args, device=None, **kwargs):
        x = make(*args, **kwargs)
        return x if device is None else x.to(device)

    return made


def bare(x):
    return x.inner if isinstance(x, OnMPS) else x


class PretendMPS(TorchDispatchMode):
    "All torch operations inside go to the CPU; what MPS refuses is refused."

    def __enter__(self):
        checks.NO_FLOAT64.add(NAME)
        self.makers = torch.tensor, torch.as_tensor  # on "meta" they would forget the values
        torch.tensor, torch.as_tensor = map(in_two_steps, self.makers)
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor, torch.as_tensor = self.makers
        checks.NO_FLOAT64.discard(NAME)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.name()
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here, device = any(isinstance(x, OnMPS) for x in tensors), kwargs.get("device")
        there = here if device is None else torch.device(device).type == NAME
        if name.startswith("aten::_to_copy") and here and kwargs.get("dtype") == torch.float64:
            raise TypeError("a conversion to float64 on its way from MPS")
        index = name.startswith(("aten::index", "aten::_index"))
        if here and not name.startswith(("aten::copy_", "aten::_to_copy")) and not index:
            for x in tensors:  # one number may stand beside the device's tensors
                if not isinstance(x, OnMPS) and x.ndim:
                    raise RuntimeError(f"{name}: tensors on the device and on cpu")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        if name.removesuffix(".default").endswith("_") and isinstance(args[0], OnMPS):
            return args[0]
        if index:
            there = isinstance(args[0], OnMPS)
        return (
            tree_map(lambda x: OnMPS(x) if isinstance(x, torch.Tensor) else x, out)
            if there
            else out
        )
