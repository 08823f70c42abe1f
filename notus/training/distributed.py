"""The process group, who speaks, and the few collectives that training needs.

One code path: plain `python` is a world of one rank.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")

# Long enough for rank 0 to tokenise a large dataset while the others wait.
TIMEOUT = datetime.timedelta(hours=2)


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the process group that torchrun describes, or a group of one; yields this rank's device."""
    device = _pick_device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _pick_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def rank() -> int:
    """This process's number among all."""
    return dist.get_rank()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size()


def is_main() -> bool:
    """Whether this rank speaks and writes for all."""
    return dist.get_rank() == 0


def mesh(device: torch.device) -> DeviceMesh:
    """All ranks in one dimension."""
    return init_device_mesh(device.type, (world_size(),))


def sum_across_ranks(tensor: Tensor) -> Tensor:
    """Add `tensor` up over all ranks, in place; every rank gets the sum."""
    dist.all_reduce(tensor)
    return tensor


def gather_objects(value: T) -> list[T]:
    """Every rank's `value`, by rank. For the rare path: small Python objects."""
    found: list[T | None] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def say(text: object) -> None:
    """Print on rank 0 alone."""
    if is_main():
        print(text, flush=True)


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and hand its result, or its ValueError, to every rank."""
    outcome: list[object] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def main_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0, which fills a cache on disk, then on the others, which find it there."""
    result: list[T] = []
    on_main(lambda: result.append(work()))
    return result[0] if is_main() else work()
