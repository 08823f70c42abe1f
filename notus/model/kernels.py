"""Pure functions of tensors that are one kernel each on CUDA, made by `torch.compile`; no hand-written Triton.

A kernel is compiled once: the dimension that differs from row to row is a symbol, the others are constants. Each has a
plain twin beside it, and `check` holds the two together at the start of a run on CUDA, so that a compiler that is
missing or wrong costs speed and not the run.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from notus import switches
from notus.entry import first_line

_KERNELS: list["Kernel"] = []


class Kernel:
    """A pure function that is compiled for CUDA.

    Attributes:
        name: of the function.
        failure: why the plain twin is used in its place; None: it is not.
    """

    def __init__(self, function: Callable[..., Any], *, switch: str, varying: int) -> None:
        """Compile nothing yet.

        Args:
            function: takes tensors and constants, returns one tensor or several, or writes to its arguments.
            switch: the optimisation of `notus.switches` that it belongs to.
            varying: the dimension of its tensors that differs from call to call.
        """
        self.name = function.__name__.strip("_")
        self.failure: str | None = None
        self._function, self._switch, self._varying = function, switch, varying
        _KERNELS.append(self)

    def usable(self, tensor: Tensor) -> bool:
        """Return whether to call this in place of the plain twin, for arguments such as `tensor`."""
        real = tensor.is_cuda and not isinstance(tensor, FakeTensor)
        return real and self.failure is None and switches.enabled(self._switch)

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self._function)

    def __call__(self, *args: Any) -> Any:
        """Run the compiled function, outside autograd and all dispatch modes."""
        # Whether a gradient is wanted would be one more reason to compile again.
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        for arg in args:
            if isinstance(arg, Tensor) and arg.dim() > self._varying:
                maybe_mark_dynamic(arg, self._varying)
        # The compiler does nothing under a dispatch mode, and activation checkpointing is one.
        modes = torch._C._len_torch_dispatch_stack()
        with torch.no_grad(), _disable_current_modes() if modes else contextlib.nullcontext():
            return self._compiled(*args)


def check(kernels: Sequence[Kernel], errors: Callable[[Kernel], tuple[float, float]]) -> list[str]:
    """Try each kernel once; one that raises or is wrong is not used again in this process.

    Args:
        kernels: which.
        errors: runs one and returns its relative error beside the plain twin, and the most that is let pass.

    Returns:
        What is wrong, a line for each kernel that is not used.
    """
    for kernel in kernels:
        try:
            error, most = errors(kernel)
        except Exception as problem:  # compilers raise errors of every kind
            kernel.failure = f"it cannot be compiled here ({first_line(problem)})"
        else:
            kernel.failure = None if error <= most else f"its relative error is {error:.1e}, more than {most:.0e}"
    return failures(kernels)


def failures(kernels: Sequence[Kernel] = _KERNELS) -> list[str]:
    """Return why kernels are not used, a line for each of those that failed a check in this process."""
    return [f"kernel {kernel.name} is not used: {kernel.failure}" for kernel in kernels if kernel.failure]
