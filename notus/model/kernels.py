"""Pure functions of tensors that are one kernel each on CUDA, made by `torch.compile`; no hand-written Triton.

The dimension that differs from row to row is a symbol for the compiler, the others are constants, so that a kernel is
compiled once for each kind of argument. Each has a plain twin. `check` compares the two at the start of a run on CUDA;
a kernel that cannot be compiled or is wrong is not used, and says so: that costs speed and not the run.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from notus.runtime import switches
from notus.runtime.process import first_line, tell

# Given this rank's failures by kernel, hands back every rank's.
Gather = Callable[[dict[str, str]], list[dict[str, str]]]


class Kernel:
    """A pure function that is compiled for CUDA, and its plain twin.

    Attributes:
        name: of the function.
        failure: why the plain twin is used in its place; None: it is not.
    """

    def __init__(
        self, function: Callable[..., Any], *, plain: Callable[..., Any] | None, switch: str, varying: int
    ) -> None:
        """Compile nothing yet.

        Args:
            function: takes tensors and constants.
            plain: computes the same without the compiler, and is called where the kernel cannot be; None: `function`
                writes to its arguments, and whoever calls the kernel asks `usable` first.
            switch: the optimisation of `notus.runtime.switches` that it belongs to.
            varying: the dimension of its tensors that differs from call to call.
        """
        self.name = function.__name__.strip("_")
        self.failure: str | None = None
        self.plain = plain
        self._function, self._switch, self._varying = function, switch, varying

    def usable(self, tensor: Tensor) -> bool:
        """Return whether the kernel is used for arguments such as `tensor`."""
        real = tensor.is_cuda and not isinstance(tensor, FakeTensor)
        return real and self.failure is None and switches.enabled(self._switch)

    def __call__(self, *args: Any) -> Any:
        """Run the kernel where it is usable for the first argument, else its plain twin."""
        if self.plain is None:
            return self.run(*args)
        if self.usable(args[0]):
            try:
                return self.run(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a new kind of argument is compiled anew, and compilers raise anything
                self.failure = f"it failed ({first_line(error)})"
                tell(f"warning: {failures([self])[0]}")
        return self.plain(*args)

    def run(self, *args: Any) -> Any:
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

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self._function)


def check(
    kernels: Sequence[Kernel], errors: Callable[[Kernel], tuple[float, float]], gather: Gather | None = None
) -> list[str]:
    """Try each kernel once. What raises or is wrong on any rank is used by none.

    Args:
        kernels: which.
        errors: runs one and returns its relative error beside the plain twin, and the most that is let pass.
        gather: of the ranks; None: there is one.

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
    mine = {kernel.name: kernel.failure for kernel in kernels if kernel.failure}
    for theirs in [mine] if gather is None else gather(mine):
        for kernel in kernels:
            kernel.failure = kernel.failure or theirs.get(kernel.name)
    return failures(kernels)


def failures(kernels: Iterable[Kernel]) -> list[str]:
    """Return why kernels are not used, a line for each of these that failed in this process."""
    return [f"kernel {kernel.name} is not used: {kernel.failure}" for kernel in kernels if kernel.failure]


def relative_error(found: Any, wanted: Any) -> float:
    """The largest relative error among a kernel's outputs, one tensor or several; NaN if one is NaN."""
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    errors = [(got.float() - one.float()).norm() / one.float().norm() for got, one in pairs if one is not None]
    return torch.stack(errors).max().item()
