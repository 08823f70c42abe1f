"""RMSprop and AdamW, as torch has them, in pieces: small temporaries, and averages in fp32 or bf16.

torch.optim computes a list operation for all parameters before the next one: temporaries as large as the parameters.
Here the update goes piece by piece over each rank's own shards. The bytes that it takes beside the states, with C the
piece (`CHUNK` numbers of 4 bytes: 64 MiB on a GPU, 1 MiB on a CPU, where a piece stays in the cache):

| | fp32 states | bf16 states |
|---|---|---|
| RMSprop | C (the denominators) | 2.5 C (the average in fp32, random bits, and what they round) |
| AdamW, fused | 0 | 3 C (both averages in fp32, random bits of one; half a C more if one tensor fills a piece) |

and C more for RMSprop with weight decay.

In bf16, with its 8 bits, an average that is to change by less than 1/512 stays where it is if it is rounded to the
nearest number: at α 0.99 or β₂ 0.999 it would stall. It is rounded up or down at random instead, up with the
probability that keeps the expectation. The random numbers depend on the step and the shard alone, so that a resumed run
goes on to the bit, and replicas of a shard stay equal.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

CHUNK = {"cpu": 2**18, "cuda": 2**24}
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Piece = tuple[Tensor, Tensor, list[Tensor]]  # parameter, gradient, its averages: flat views


class InPieces(torch.optim.Optimizer):
    """Walks over the pieces of all parameters; the update of one is the subclass's."""

    moments: tuple[str, ...]
    state_dtype: torch.dtype

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What a parameter's state is before the first step."""
        zeros = {name: torch.zeros_like(parameter.detach(), dtype=self.state_dtype) for name in self.moments}
        return {"step": torch.tensor(0.0), **zeros}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = self.new_state(parameter)
                self.state[parameter]["step"] += 1
            if not parameters:
                continue
            noise = self._noise(parameters[0])
            for chunk in self._chunks(parameters):
                values, gradients, averages = (list(column) for column in zip(*chunk, strict=True))
                columns = [list(column) for column in zip(*averages, strict=True)]
                exact = columns
                if self.state_dtype != torch.float32:
                    exact = [[average.float() for average in column] for column in columns]
                self.update(values, gradients, exact, group, self.state[parameters[0]]["step"])
                if exact is not columns:
                    for column, rounded in zip(exact, columns, strict=True):
                        for average, place in zip(column, rounded, strict=True):
                            place.copy_(round_at_random(average, noise))
                    del average, column  # or the last of them would stay through the next piece

    def update(
        self, values: list[Tensor], gradients: list[Tensor], averages: list[list[Tensor]], group: Any, step: Tensor
    ) -> None:
        """Update fp32 values and averages in place; `step`: counted from 1."""
        raise NotImplementedError

    def _chunks(self, parameters: list[nn.Parameter]) -> Iterator[list[Piece]]:
        """Pieces of at most CHUNK numbers together."""
        chunk: list[Piece] = []
        room = limit = CHUNK[_local(parameters[0]).device.type]
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            flat = [_local(each).view(-1) for each in (parameter, parameter.grad, *(state[n] for n in self.moments))]
            start, size = 0, flat[0].numel()
            while start < size:
                value, gradient, *averages = (each[start : start + room] for each in flat)
                chunk.append((value, gradient, averages))
                start, room = start + value.numel(), room - value.numel()
                if room == 0:
                    yield chunk
                    chunk, room = [], limit
        if chunk:
            yield chunk

    def _noise(self, parameter: nn.Parameter) -> torch.Generator:
        shard = 0
        if isinstance(parameter, DTensor):
            dims = [dim for dim, kind in enumerate(parameter.placements) if kind.is_shard()]
            shard = sum(parameter.device_mesh.get_local_rank(dim) for dim in dims)
        step = int(self.state[parameter]["step"].item())
        return torch.Generator(_local(parameter).device).manual_seed((step << 20) + shard)


class RMSprop(InPieces, torch.optim.RMSprop):
    """torch.optim.RMSprop without momentum, to the bit, if its state is in fp32."""

    moments = ("square_avg",)

    def __init__(self, parameters: list[nn.Parameter], *, state_dtype: str = "fp32", **options: Any) -> None:
        super().__init__(parameters, **options)
        self.state_dtype = STATE_DTYPES[state_dtype]

    def update(
        self, values: list[Tensor], gradients: list[Tensor], averages: list[list[Tensor]], group: Any, step: Tensor
    ) -> None:
        """v ← α v + (1 − α) g²; w ← w − lr · g / (√v + ε)."""
        (squares,) = averages
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, values, alpha=group["weight_decay"]))
        torch._foreach_mul_(squares, group["alpha"])
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - group["alpha"])
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(values, gradients, denominators, value=-group["lr"])


class AdamW(InPieces, torch.optim.AdamW):
    """torch.optim.AdamW by its fused kernel."""

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, parameters: list[nn.Parameter], *, state_dtype: str = "fp32", **options: Any) -> None:
        super().__init__(parameters, **options)
        self.state_dtype = STATE_DTYPES[state_dtype]

    def update(
        self, values: list[Tensor], gradients: list[Tensor], averages: list[list[Tensor]], group: Any, step: Tensor
    ) -> None:
        """arXiv 1711.05101, algorithm 2, with a bias correction."""
        means, squares = averages
        beta1, beta2 = group["betas"]
        before = step.item() - 1  # the kernel counts on, each piece for itself
        adamw(
            values,
            gradients,
            means,
            squares,
            [],
            list(torch.full((len(values),), before, device=values[0].device).unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def round_at_random(values: Tensor, noise: torch.Generator) -> Tensor:
    """fp32 -> bf16, up or down so that the expectation is the value; finite values.

    bf16 is the upper half of fp32: a random lower half is added, and what is left of it cut off.
    """
    bits = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=noise)
    bits += values.view(torch.int32)
    bits &= -(2**16)
    return bits.view(torch.float32).bfloat16()


def _local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
