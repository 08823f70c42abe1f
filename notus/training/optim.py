"""Optimizers, schedules as pure functions of the step, and gradient clipping over shards."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from notus.runtime import switches
from notus.runtime.distributed import gather_objects, say, sum_across_ranks
from notus.training.optimizers import AdamW, InPieces, RMSprop, check_update


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """The share of the peak learning rate at a step.

    Warm-up rises linearly from 0 at step 0 to 1 at step `warmup_steps`; then `linear` falls to 0 at `total_steps`,
    `cosine` follows half a cosine to 0 there, and `constant` stays at 1. The same as transformers' schedules.

    Args:
        step: optimizer steps taken so far.
        total_steps, warmup_steps: in optimizer steps.
        schedule: "linear", "cosine" or "constant".
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    assert schedule == "constant", schedule
    return 1.0


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    name: str,
    learning_rate: float,
    weight_decay: float,
    state_dtype: str = "fp32",
) -> InPieces:
    """RMSprop (α 0.99) or AdamW (β 0.9, 0.999), ε 1e-8, over the trainable parameters; see `optimizers`."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    kind = RMSprop if name == "rmsprop" else AdamW
    optimizer = kind(trainable, state_dtype=state_dtype, lr=learning_rate, weight_decay=weight_decay)
    for problem in check_update(optimizer, gather_objects):
        say(f"warning: {problem}")
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use `learning_rate` for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's part of every gradient."""
    found = []
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            found.append(grad.to_local() if isinstance(grad, DTensor) else grad)
    return found


def is_first_replica(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether no rank of a lower number holds the same shards as this one, as hybrid sharding has it."""
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            return all(mesh.get_local_rank(dim) == 0 for dim, kind in enumerate(placements) if kind.is_replicate())
    return True


def gradient_norm(gradients: list[Tensor], flags: Tensor, *, first_replica: bool = True) -> Tensor:
    """The 2-norm of the whole gradient, from disjoint shards, and the ranks' flags; one reduction over all ranks.

    Args:
        gradients: this rank's shards.
        flags: [F], what this rank has to tell the others, on the device.
        first_replica: False where another rank counts the same shards.

    Returns:
        fp32 [1 + F], the same on every rank: the norm, then each flag's sum.
    """
    # small tensors leave some ranks without a shard
    counted = [gradient for gradient in gradients if gradient.numel()] if first_replica else []
    norms = [norm.float() for norm in torch._foreach_norm(counted)] if counted else []
    device = counted[0].device if counted else flags.device  # with offload, gradients are on the host
    squares = torch.stack([*norms, torch.zeros((), device=device)]).square().sum().to(flags.device)
    sums = sum_across_ranks(torch.cat([squares[None], flags.float()]))
    return torch.cat([sums[:1].sqrt(), sums[1:]])


def clipped_update(optimizer: InPieces, gradients: list[Tensor], norm: Tensor, max_norm: float | None) -> None:
    """Take an optimizer step with the gradients scaled so that their norm is at most `max_norm`; without a host sync.

    Args:
        optimizer: of the parameters whose gradients these are.
        gradients: this rank's shards; what they hold afterwards is not defined.
        norm: fp32 scalar on the device, of the whole gradient.
        max_norm: None: they are not scaled.
    """
    if max_norm is None:
        optimizer.step()
    elif switches.enabled("fused_optimizer"):
        optimizer.step(scale=clipping_factor(norm, max_norm))
    else:
        clip_gradients(gradients, norm, max_norm)
        optimizer.step()


def clipping_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are to be multiplied with so that it is at most `max_norm`; at most 1."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clip_gradients(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients in place so that their norm is at most `max_norm`; without a host sync."""
    torch._foreach_mul_(gradients, clipping_factor(norm, max_norm).to(gradients[0].device))
