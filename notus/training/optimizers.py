"""RMSprop and AdamW, as torch has them, in pieces: small temporaries, and averages in fp32, bf16 or, for AdamW, int8.

torch.optim computes a list operation for all parameters before the next one: temporaries as large as the parameters.
Here the update goes piece by piece over each rank's own shards. The bytes that it takes beside the states, with C the
piece (`CHUNK` numbers of 4 bytes: 64 MiB on a GPU, 1 MiB on a CPU, where a piece stays in the cache):

| | fp32 states | bf16 states |
|---|---|---|
| RMSprop | C (the denominators) | 2.5 C (the average in fp32, random bits, and what they round) |
| AdamW, fused | 0 | 3 C (both averages in fp32, random bits of one; half a C more if one tensor fills a piece) |

AdamW's states in int8 take 2.5 C (pieces of a quarter of C: both averages in fp32, and what they round to codes). And C
more for RMSprop with weight decay, and C more if gradients are clipped, for the scaled gradients.

On a GPU with fp32 states, one kernel updates a parameter in one pass, clipping included, and needs none of these. They
are needed on a CPU, for bf16 states, with offload, and where the kernel is not used (`check_update`).

In bf16, with its 8 bits, an average that is to change by less than 1/512 stays where it is if it is rounded to the
nearest number: at α 0.99 or β₂ 0.999 it would stall. It is rounded up or down at random instead, up with the
probability that keeps the expectation. The random numbers depend on the step and the shard alone, so that a resumed run
continues to the bit, and replicas of a shard stay equal. States in int8 are rounded likewise, see `int8_states`.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from notus.model import kernels
from notus.model.kernels import Kernel
from notus.runtime import switches
from notus.runtime.distributed import gather_objects, say
from notus.training import int8_states

CHUNK = {"cpu": 2**18, "cuda": 2**24}
_LINE = 1024
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
SCALE = ".scale"  # after the name of a state in int8: its blocks' scales

Piece = tuple[Tensor, Tensor, list[Tensor]]  # parameter, gradient, its averages: flat views
RowPiece = tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]  # the same of rows, averages as codes and scales


class PiecewiseOptimizer(torch.optim.Optimizer):
    """Walks over the pieces of all parameters; the update of one is the subclass's."""

    moments: tuple[str, ...]
    state_dtype: torch.dtype
    kernel: ClassVar[Kernel | None] = None  # updates a parameter in one pass; None: there is none

    @property
    def state_dtype_name(self) -> str:
        """ "fp32", "bf16" or "int8"."""
        return next(name for name, dtype in STATE_DTYPES.items() if dtype == self.state_dtype)

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What a parameter's state is before the first step."""
        state = {"step": torch.tensor(0.0)}
        for name in self.moments:
            if self.in_int8(parameter):
                state[name], state[name + SCALE] = int8_states.new_state(parameter)
            else:
                dtype = torch.float32 if self.state_dtype == torch.uint8 else self.state_dtype
                state[name] = torch.zeros_like(parameter.detach(), dtype=dtype)
        return state

    def in_int8(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter's averages are codes and scales."""
        return self.state_dtype == torch.uint8 and int8_states.is_quantized(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None, *, scale: Tensor | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: None, as torch's signature has it.
            scale: fp32 scalar that the gradients are multiplied with first; None: 1. They are left as they are.
        """
        assert closure is None
        for number, group in enumerate(self.param_groups):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = self.new_state(parameter)
                self.state[parameter]["step"] += 1
            plain = [parameter for parameter in parameters if not self.in_int8(parameter)]
            if plain and self.state_dtype == torch.float32 and self.kernel and self.kernel.usable(_local(plain[0])):
                self._in_one_pass(plain, group, scale)
            elif plain:
                self._in_pieces(plain, group, scale, self._noise(plain[0], number))
            if blocks := [each for each in parameters if self.in_int8(each)]:
                self._in_blocks(blocks, group, scale, self._noise(blocks[0], number))

    def _in_pieces(
        self, parameters: list[nn.Parameter], group: Any, scale: Tensor | None, noise: torch.Generator
    ) -> None:
        """Update parameters whose averages are numbers, in fp32 or bf16."""
        for chunk in self._chunks(parameters):
            values, gradients, averages = (list(column) for column in zip(*chunk, strict=True))
            if scale is not None:
                gradients = list(torch._foreach_mul(gradients, scale.to(gradients[0].device)))
            columns = [list(column) for column in zip(*averages, strict=True)]
            exact = columns
            if self.state_dtype == torch.bfloat16:
                exact = [[average.float() for average in column] for column in columns]
            self.update(values, gradients, exact, group, self.state[parameters[0]]["step"])
            if exact is not columns:
                for column, rounded in zip(exact, columns, strict=True):
                    for average, place in zip(column, rounded, strict=True):
                        place.copy_(round_at_random(average, noise))
                del average, column  # or the last of them would stay through the next piece

    def _in_blocks(
        self, parameters: list[nn.Parameter], group: Any, scale: Tensor | None, noise: torch.Generator
    ) -> None:
        """Update parameters whose averages are codes and scales. The first is that of the gradients, with a sign."""
        for parameter in parameters:
            for value, gradient, stored in self._row_pieces(parameter):
                if scale is not None:
                    gradient = gradient * scale.to(gradient.device)
                signs = [name == "exp_avg" for name in self.moments]
                averages = [
                    int8_states.dequantize(codes, scales, signed=signed)
                    for (codes, scales), signed in zip(stored, signs, strict=True)
                ]
                exact = [[average] for average in averages]
                self.update([value], [gradient], exact, group, self.state[parameter]["step"])
                for average, (codes, scales), signed in zip(averages, stored, signs, strict=True):
                    int8_states.quantize(average, codes, scales, signed=signed, noise=noise)
                del average, averages, exact  # or they would stay through the next piece

    def _row_pieces(self, parameter: nn.Parameter) -> Iterator[RowPiece]:
        """Whole rows of at most a quarter of CHUNK numbers together, or parts of a longer row, of whole blocks."""
        state = self.state[parameter]
        assert parameter.grad is not None
        names = [name + end for name in self.moments for end in ("", SCALE)]
        tensors = [_local(each) for each in (parameter, parameter.grad, *(state[name] for name in names))]
        if tensors[0].numel() == 0:
            return
        value, gradient, *stored = (each.view(len(each), -1) for each in tensors)
        limit = max(CHUNK[value.device.type] // 4, int8_states.BLOCK)
        rows, columns = max(1, limit // value.shape[1]), limit // int8_states.BLOCK * int8_states.BLOCK
        for row in range(0, len(value), rows):
            for column in range(0, value.shape[1], columns):
                place = (slice(row, row + rows), slice(column, column + columns))
                blocks = slice(column // int8_states.BLOCK, (column + columns) // int8_states.BLOCK)
                codes, scales = stored[::2], stored[1::2]
                yield (
                    value[place],
                    gradient[place],
                    [(each[place], other[place[0], blocks]) for each, other in zip(codes, scales, strict=True)],
                )

    def update(
        self, values: list[Tensor], gradients: list[Tensor], averages: list[list[Tensor]], group: Any, step: Tensor
    ) -> None:
        """Update fp32 values and averages in place; `step`: counted from 1."""
        raise NotImplementedError

    def _in_one_pass(self, parameters: list[nn.Parameter], group: Any, scale: Tensor | None) -> None:
        """Update by the kernel. Numbers that change are tensors, so that it is compiled once."""
        device = _local(parameters[0]).device
        numbers = [torch.full((), value, device=device) for value in self.numbers(group, self.state[parameters[0]])]
        factor = torch.ones((), device=device) if scale is None else scale
        assert self.kernel is not None
        for parameter in parameters:
            if _local(parameter).numel() == 0:
                continue
            self.kernel(*map(_lines, self._flat(parameter)), factor, *numbers, *self.constants(group))

    def numbers(self, group: Any, state: dict[str, Tensor]) -> list[float]:
        """What changes from step to step or from group to group, for the kernel."""
        return [group["lr"], group["weight_decay"]]

    def constants(self, group: Any) -> list[float]:
        """What stays, for the kernel."""
        raise NotImplementedError

    def _flat(self, parameter: nn.Parameter) -> list[Tensor]:
        """This rank's part of a parameter, of its gradient and of its averages, in one dimension each."""
        state = self.state[parameter]
        assert parameter.grad is not None
        return [_local(each).view(-1) for each in (parameter, parameter.grad, *(state[name] for name in self.moments))]

    def _chunks(self, parameters: list[nn.Parameter]) -> Iterator[list[Piece]]:
        """Pieces of at most CHUNK numbers together."""
        chunk: list[Piece] = []
        room = limit = CHUNK[_local(parameters[0]).device.type]
        for parameter in parameters:
            flat = self._flat(parameter)
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

    def _noise(self, parameter: nn.Parameter, group: int) -> torch.Generator:
        """The random bits of a group's update, others than those of the groups before it."""
        shard = 0
        if isinstance(parameter, DTensor):
            dims = [dim for dim, kind in enumerate(parameter.placements) if kind.is_shard()]
            shard = sum(parameter.device_mesh.get_local_rank(dim) for dim in dims)
        step = int(self.state[parameter]["step"].item())
        return torch.Generator(_local(parameter).device).manual_seed((step << 20) + (group << 18) + shard)


def _rmsprop(
    value: Tensor,
    gradient: Tensor,
    square: Tensor,
    scale: Tensor,
    rate: Tensor,
    decay: Tensor,
    alpha: float,
    epsilon: float,
) -> None:
    """`RMSprop.update` in one pass."""
    scaled = gradient * scale + decay * value
    square.mul_(alpha).add_((1 - alpha) * scaled * scaled)
    value.sub_(rate * scaled / (square.sqrt() + epsilon))


class RMSprop(PiecewiseOptimizer, torch.optim.RMSprop):
    """torch.optim.RMSprop without momentum, to the bit, if its state is in fp32."""

    moments = ("square_avg",)
    kernel = Kernel(_rmsprop, plain=None, switch="fused_optimizer", varying=0)

    def __init__(self, parameters: Any, *, state_dtype: str = "fp32", **options: Any) -> None:
        super().__init__(parameters, **options)
        assert state_dtype != "int8"  # the config refuses it
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

    def constants(self, group: Any) -> list[float]:
        """α and ε."""
        return [group["alpha"], group["eps"]]


def _adamw(
    value: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    scale: Tensor,
    rate: Tensor,
    decay: Tensor,
    correction1: Tensor,
    correction2: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """`AdamW.update` in one pass; the corrections are 1 - β₁ᵗ and √(1 - β₂ᵗ)."""
    scaled = gradient * scale
    mean.mul_(beta1).add_((1 - beta1) * scaled)
    square.mul_(beta2).add_((1 - beta2) * scaled * scaled)
    value.sub_(rate * decay * value)
    value.sub_(rate / correction1 * mean / (square.sqrt() / correction2 + epsilon))


class AdamW(PiecewiseOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW by its fused kernel."""

    moments = ("exp_avg", "exp_avg_sq")
    kernel = Kernel(_adamw, plain=None, switch="fused_optimizer", varying=0)

    def __init__(self, parameters: Any, *, state_dtype: str = "fp32", **options: Any) -> None:
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

    def numbers(self, group: Any, state: dict[str, Tensor]) -> list[float]:
        """The learning rate, the weight decay and the bias corrections."""
        step, (beta1, beta2) = int(state["step"].item()), group["betas"]
        return [group["lr"], group["weight_decay"], 1 - beta1**step, math.sqrt(1 - beta2**step)]

    def constants(self, group: Any) -> list[float]:
        """β₁, β₂ and ε."""
        return [*group["betas"], group["eps"]]


def check_update(optimizer: PiecewiseOptimizer, gather: kernels.Gather) -> list[str]:
    """Compile the optimizer's kernel and compare it with its plain twin; on CUDA alone, where it is collective.

    Args:
        optimizer: with its parameters where they stay.
        gather: of the ranks, see `kernels.check`.

    Returns:
        What is wrong, one line or none; the plain twin is then used.
    """
    group = optimizer.param_groups[0]
    device = _local(group["params"][0]).device if group["params"] else torch.device("cpu")
    kernel = optimizer.kernel
    if optimizer.state_dtype != torch.float32 or not kernel or not kernel.usable(torch.empty(0, device=device)):
        return []
    settings = {name: value for name, value in group.items() if name in ("lr", "alpha", "betas", "eps", "weight_decay")}
    kind = type(optimizer)
    return kernels.check([kernel], lambda _: (_update_error(kind, settings, device), 1e-5), gather)


def _update_error(kind: type[PiecewiseOptimizer], settings: dict[str, Any], device: torch.device) -> float:
    """The relative error of a parameter's change after two clipped steps by the kernel."""
    changes = []
    for disabled in ((), ("fused_optimizer",)):
        generator = torch.Generator(device).manual_seed(0)
        # one in lines and one that is not, as large as real ones: the compiler picks block sizes for what it sees first
        sizes = [4 * size if device.type == "cuda" else size // 2**10 for size in (2**22, 2**20 + 37 * 2**10)]
        sizes[1] += 1
        parameters = [nn.Parameter(torch.randn(size, generator=generator, device=device)) for size in sizes]
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = kind(parameters, **{**settings, "lr": 1e-2})
        with switches.disabled(*disabled):
            for _ in range(2):
                for parameter in parameters:
                    parameter.grad = torch.randn(len(parameter), generator=generator, device=device)
                optimizer.step(scale=torch.full((), 0.5, device=device))
        changes.append(torch.cat([now.detach() - was for now, was in zip(parameters, before, strict=True)]))
    return kernels.relative_error(*changes)


def round_at_random(values: Tensor, noise: torch.Generator) -> Tensor:
    """fp32 -> bf16, up or down so that the expectation is the value; finite values.

    bf16 is the upper half of fp32: a random lower half is added, and the lower half is cut off.
    """
    bits = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=noise)
    bits += values.view(torch.int32)
    bits &= -(2**16)
    return bits.view(torch.float32).bfloat16()


def _local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _lines(flat: Tensor) -> Tensor:
    """Rows of a fixed length, where they divide the tensor: the compiler then knows that its loads are aligned."""
    return flat.view(-1, _LINE) if flat.numel() % _LINE == 0 else flat


def learning_rate_factor(
    step: int, *, total_steps: int, warmup_steps: int, schedule: str, floor: float = 0.0, decay_steps: int = 0
) -> float:
    """Return the share of the peak learning rate at a step. It depends on the step alone; there is no state.

    Warm-up rises linearly from 0 at step 0 to 1 at step `warmup_steps`. Then `linear` falls to `floor` at
    `total_steps`, `cosine` follows half a cosine to `floor` there, `constant` stays at 1, and `wsd` (arXiv 2404.06395)
    stays at 1 until the last `decay_steps`, in which it falls linearly to `floor`. The same as transformers'
    schedules, but its `wsd` warms up from the floor, and its `linear` has none.

    Args:
        step: optimizer steps taken so far.
        total_steps, warmup_steps: in optimizer steps.
        schedule: "linear", "cosine", "constant" or "wsd".
        floor: where the decay ends, as a share of the peak.
        decay_steps: of `wsd`; where they and the warm-up are more than all steps, the warm-up comes first.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    start = max(warmup_steps, total_steps - decay_steps) if schedule == "wsd" else warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return floor + (1.0 - floor) * left


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    name: str,
    learning_rate: float,
    weight_decay: float,
    undecayed: Iterable[nn.Parameter] = (),
    state_dtype: str = "fp32",
) -> PiecewiseOptimizer:
    """RMSprop (α 0.99) or AdamW (β 0.9, 0.999), ε 1e-8, over the trainable parameters; see `optimizers`.

    Args:
        parameters: of the model; frozen ones are left out.
        name: "rmsprop" or "adamw".
        learning_rate: that of the first step, unless `set_learning_rate` changes it.
        weight_decay: of all but `undecayed`, which have none.
        undecayed: see `without_decay`.
        state_dtype: "fp32", "bf16" or "int8".
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    free = {id(parameter) for parameter in undecayed} if weight_decay else set()
    decayed, rest = ([each for each in trainable if (id(each) in free) == wanted] for wanted in (False, True))
    groups: list[dict[str, Any]] = [{"params": decayed}] if decayed or not rest else []
    groups += [{"params": rest, "weight_decay": 0.0}] if rest else []
    kind = RMSprop if name == "rmsprop" else AdamW
    optimizer = kind(groups, state_dtype=state_dtype, lr=learning_rate, weight_decay=weight_decay)
    for problem in check_update(optimizer, gather_objects):
        say(f"warning: {problem}")
    return optimizer


# What transformers' Trainer takes for a normalisation layer by its name; it also takes each `nn.LayerNorm` for one.
_NORM = re.compile(r"layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def without_decay(model: nn.Module, words: Iterable[str]) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that get no weight decay, by the word that excludes them.

    A word excludes the parameters whose name contains it, in any case. "norm" excludes normalisation layers instead, so
    that a name such as `normalizer` is not meant. With "bias" and "norm", these are the parameters that transformers'
    Trainer leaves out (5.17 to 5.23, `get_decay_parameter_names`). A tied parameter goes by its first name, as there.
    """
    layer_norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters()
    }
    found: dict[str, list[nn.Parameter]] = {word: [] for word in words}
    for name, parameter in model.named_parameters():
        for word, parameters in found.items():
            is_norm = word == "norm" and (_NORM.search(name.lower()) or id(parameter) in layer_norms)
            if is_norm or (word != "norm" and word.lower() in name.lower()):
                parameters.append(parameter)
    return found


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use `learning_rate` for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
