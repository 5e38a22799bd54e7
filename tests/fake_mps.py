"""A pretended Apple GPU, where there is none: tensors that say they are on `mps`, and hold their values on the CPU.

As on the real one, they refuse float64, operations with tensors on the CPU (but single numbers, indices and copies),
and to become numpy arrays.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MPS, CPU = torch.device("mps"), torch.device("cpu")
OF_MODULES = (torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type)  # not operations, but nn.Module's
MIXING = (Tensor.__getitem__, Tensor.__setitem__, Tensor.copy_, torch._foreach_copy_)


class FakeMps(Tensor):
    """A CPU tensor that says it is on an Apple GPU."""

    device = property(lambda self: MPS)  # type: ignore[assignment]
    is_mps, is_cpu = True, False  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = pretended(self.detach().clone()).requires_grad_(self.requires_grad)
        copy._is_param = isinstance(self, nn.Parameter)  # type: ignore[attr-defined]
        return memo.setdefault(id(self), copy)


def pretended(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return tensor if isinstance(tensor, FakeMps) else tensor.as_subclass(FakeMps)


def names_device(leaf: Any) -> bool:
    return isinstance(leaf, (torch.device, str)) and str(leaf) in ("mps", "cpu")


class Pretence(TorchFunctionMode):
    """Sees each call of torch: the device that it names, its arguments and its results."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OF_MODULES:
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [isinstance(tensor, FakeMps) for tensor in inputs]
        wanted = next((torch.device(leaf) for leaf in tree_leaves((args, kwargs)) if names_device(leaf)),
                      CPU if func is Tensor.cpu else None)
        if any(ours) and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        if any(ours) and wanted is None and func not in MIXING and any(
                tensor.ndim > 0 for tensor, own in zip(inputs, ours) if not own):
            raise RuntimeError(f"{func.__name__}: Expected all tensors to be on the same device, mps:0 and cpu")
        args, kwargs = tree_map(lambda leaf: CPU if names_device(leaf) else leaf, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if wanted == MPS or wanted is None and any(ours):
            return tree_map(lambda leaf: pretended(leaf) if isinstance(leaf, Tensor) else leaf, result)
        if wanted == CPU and isinstance(result, FakeMps):
            return result.as_subclass(Tensor)
        return result


class CpuGenerator(torch.Generator):
    def __new__(cls, device: Any = CPU) -> "CpuGenerator":
        return super().__new__(cls, CPU)


@contextlib.contextmanager
def pretended_mps() -> Iterator[None]:
    """Within the block the device `mps` can be used."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # else a parameter stays of its class
    try:
        with (mock.patch.object(torch, "Generator", CpuGenerator), Pretence()):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
