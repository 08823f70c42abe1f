"""Parameters, plain or sharded over ranks: which rows are here, how to fill them, how to gather them."""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class Rows(Protocol):
    """What takes rows of a full tensor otherwise than by copying them."""

    def fill(self, source: Any) -> None:
        """Take this rank's rows of `source`, as `fill_rows` has it."""


def is_rank_zero() -> bool:
    """True on rank 0, and where there is no process group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """Rows [start, stop) of the full tensor that this rank holds; all, if it is plain or replicated.

    Sharding on dim 0 cuts as torch.chunk does: pieces of ceil(rows / ranks), the last ones short or empty.
    """
    start, stop = 0, tensor.shape[0]
    if not isinstance(tensor, DTensor):
        return start, stop
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        assert placement.is_shard(0), f"parameters are sharded on dim 0 or replicated, not {placement}"
        piece = -(-(stop - start) // tensor.device_mesh.size(mesh_dim))
        begin = start + piece * tensor.device_mesh.get_local_rank(mesh_dim)
        start, stop = min(begin, stop), min(begin + piece, stop)
    assert stop - start == tensor.to_local().shape[0]
    return start, stop


@torch.no_grad()
def fill_rows(target: Tensor | Rows, source: Any) -> None:
    """Copy into `target` its own rows of `source`, reading no other row; values are cast to its dtype.

    `source` is a full tensor or a safetensors slice, of the full shape of `target`.
    """
    if not isinstance(target, Tensor):
        target.fill(source)
        return
    if target.dim() == 0:
        target.copy_(source[...])
        return
    start, stop = local_rows(target)
    if stop > start:
        local(target).copy_(source[start:stop])


def local(tensor: Tensor) -> Tensor:
    """This rank's own rows of a tensor, as a plain one that shares their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Full tensors on the CPU of rank 0, floating point cast to `dtype`; {} on other ranks. A collective."""
    gathered = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)  # before gathering: half the traffic for bf16
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_rank_zero():
            gathered[name] = full.detach().cpu().contiguous()
    return gathered
