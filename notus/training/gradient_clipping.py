"""The norm of a gradient that is spread over ranks, and an update with the gradient clipped to a norm."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from notus.runtime import switches
from notus.runtime.distributed import sum_across_ranks
from notus.training.optimizers import PiecewiseOptimizer


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
        flags: [F], what this rank reports to the others, on the device.
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


def clipped_update(
    optimizer: PiecewiseOptimizer, gradients: list[Tensor], norm: Tensor, max_norm: float | None
) -> None:
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
