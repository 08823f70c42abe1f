"""Optimizers, schedules as pure functions of the step, and gradient clipping over shards."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from notus.training.distributed import sum_across_ranks


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
    parameters: Iterable[nn.Parameter], *, name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """RMSprop (α 0.99) or AdamW (β 0.9, 0.999), ε 1e-8, over the trainable parameters."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if name == "rmsprop":
        return torch.optim.RMSprop(trainable, lr=learning_rate, weight_decay=weight_decay)
    assert name == "adamw", name
    return torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay)


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


def gradient_norm(gradients: list[Tensor], loss_is_bad: Tensor, *, first_replica: bool = True) -> Tensor:
    """The 2-norm of the whole gradient, from disjoint shards; one reduction over all ranks.

    Args:
        gradients: this rank's shards.
        first_replica: False where another rank counts the same shards.
        loss_is_bad: scalar, non-zero where this rank saw a loss that is not finite; it makes the norm NaN everywhere.

    Returns:
        fp32 scalar on the gradients' device, the same on every rank.
    """
    counted = [gradient for gradient in gradients if gradient.numel()] if first_replica else []
    norms = torch._foreach_norm(counted) if counted else []
    total = torch.stack([norm.float() for norm in norms]).square().sum() if norms else torch.zeros_like(loss_is_bad)
    pair = sum_across_ranks(torch.stack([total, loss_is_bad.float()]))
    return torch.where(pair[1] > 0, torch.nan, pair[0].sqrt())


def clip_gradients(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients in place so that their norm is at most `max_norm`; without a host sync."""
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
