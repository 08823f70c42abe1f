"""A CUDA device that does not exist: tensors without storage, and a list of what makes the host wait for the device.

PyTorch computes shapes, dtypes and devices of fake tensors as on a GPU, and raises where an operation mixes devices,
even in a build without CUDA. Without a GPU it cannot differentiate through them: all of it runs without gradients.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from notus.model.kernels import Kernel
from notus.training import optimizers as optim

CUDA = torch.device("cuda", 0)
_COPIES = ("aten._to_copy.default", "aten.copy_.default")
# Their results' sizes depend on values, or they hand a value to Python.
_WAITS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default")


class Waits(TorchDispatchMode):
    """Writes down what makes the host wait.

    Attributes:
        found: reads of values, copies to the host, and copies to the device from memory that is not pinned.
        copies: the number of copies to the device, from whatever memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.copies = 0
        self._pinned: list[Tensor] = []  # kept, so that no other tensor gets the same number

    def pin(self, tensor: Tensor) -> Tensor:
        """Stand in for `Tensor.pin_memory`, which needs a GPU."""
        self._pinned.append(tensor.clone())
        return self._pinned[-1]

    def tolist(self, tensor: FakeTensor) -> list[float]:
        """Stand in for `FakeTensor.tolist`, which reads number by number; on a GPU it is one copy."""
        assert tensor.is_cuda
        assert tensor.dim() == 1
        self.found.append("tolist")
        return [0.0] * len(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if name == "aten._local_scalar_dense.default" and args[0].is_cuda:
            self.found.append(name)
            return 0.0
        result = func(*args, **kwargs)
        if name in _COPIES:
            self._copied(args[-1 if name == "aten.copy_.default" else 0], result, name, kwargs)
        elif (name in _WAITS and args[0].is_cuda) or (name == "aten.index.Tensor" and _has_mask(args[1])):
            self.found.append(name)
        return result

    def _copied(self, source: Tensor, result: Tensor, name: str, options: dict[str, Any]) -> None:
        if source.is_cuda and not result.is_cuda:
            self.found.append(f"{name} to the host, {tuple(source.shape)}")
        elif result.is_cuda and not source.is_cuda:
            self.copies += 1
            pinned = any(source is known for known in self._pinned)
            if not (pinned and options.get("non_blocking")):
                self.found.append(f"{name} to the device, {tuple(source.shape)}")


class _Methods(TorchFunctionMode):
    """Methods of fake CUDA tensors that ask for CUDA's runtime: a build without CUDA calls others that do the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ALIKE and args[0].is_cuda and not torch.backends.cuda.is_built():
            return _ALIKE[func](*args)
        return func(*args, **(kwargs or {}))


def move(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers on the fake device, in place; within `fake_cuda`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _like(buffer)
    return module


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def _indexed(tensor: Tensor, key: Any) -> Tensor:
    """`tensor[key]` for integers, slices, None and an ellipsis."""
    parts = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in parts:
        at, given = parts.index(Ellipsis), sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (tensor.dim() - given)
    dim = 0
    for part in parts:
        if isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif part != slice(None):
            tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        dim += 1
    return tensor


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool and index.is_cuda for index in indices)


_ALIKE = {Tensor.__getitem__: _indexed, Tensor.__invert__: torch.ops.aten.bitwise_not.default}


@contextlib.contextmanager
def fake_cuda() -> Iterator[Waits]:
    """Fake tensors, on whatever device they are asked for, without gradients; yields what the host waited for."""
    waits = Waits()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: waits.pin(tensor)),
        mock.patch.object(FakeTensor, "tolist", lambda tensor: waits.tolist(tensor)),
        # kernels run as their own code, which only a real device could compile
        mock.patch.object(Kernel, "usable", lambda kernel, tensor: tensor.is_cuda and kernel.failure is None),
        mock.patch.object(Kernel, "run", lambda kernel, *args: kernel._function(*args)),
        mock.patch.object(optim, "check_update", return_value=[]),
        waits,
        _Methods(),
    ):
        yield waits
