"""The process group, who speaks, and the few collectives that training needs.

One code path: plain `python` is a world of one rank.
"""

import contextlib
import datetime
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from notus.runtime.heartbeat import heartbeat
from notus.runtime.process import LostPeers, first_line, tell

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)
# Long enough for rank 0 to tokenise a large dataset while the others wait.
PATIENCE = datetime.timedelta(hours=6)

_patient: dist.ProcessGroup | None = None  # all ranks over gloo, for waits of up to PATIENCE; None: the default group
_timeout = TIMEOUT
# The launcher's store by its address, with this process's number and how many there are; it outlives a process group.
_stores: dict[tuple[str | None, ...], tuple[dist.Store, int, int]] = {}
_joined = itertools.count(1)  # process groups of this process; all ranks join the same ones


@contextlib.contextmanager
def process_group(timeout: datetime.timedelta = TIMEOUT) -> Iterator[torch.device]:
    """Join the process group that torchrun describes, or a group of one; yields this rank's device.

    Args:
        timeout: how long a rank waits for the others in a collective, but for rank 0's work in `on_main`.

    Raises:
        LostPeers: a collective failed because other ranks are gone or stuck.
    """
    global _patient, _timeout
    device = pick_device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        store, number, size = _launchers_store(timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=number, world_size=size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with heartbeat():
            _patient, _timeout = dist.new_group(backend="gloo", timeout=PATIENCE), timeout
            yield device
    finally:
        _patient, _timeout = None, TIMEOUT
        dist.destroy_process_group()


def _launchers_store(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """The store that the launcher describes, this process's number and how many there are.

    On one node torchrun keeps a store over its restarts, in which the addresses of processes that are gone would lead
    ranks astray: each attempt has keys of its own. So has each process group of a program that joins several. Several
    nodes count attempts each for itself.
    """
    address = tuple(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    try:
        if address not in _stores:
            _stores[address] = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = first_line(error)
        raise LostPeers(f"no store of the launcher at {where} ({reason})", int(os.environ["RANK"])) from error
    store, number, size = _stores[address]
    store.set_timeout(timeout)
    store = dist.PrefixStore(f"group-{next(_joined)}", store)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store, number, size


def pick_device() -> torch.device:
    """Return this rank's device, and make it the current one."""
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


def mesh(device: torch.device, sharding: str = "full") -> DeviceMesh:
    """How the ranks share a model; collective.

    Args:
        device: this rank's.
        sharding: "full": all ranks in one dimension, over which parameters are sharded. "hybrid": nodes by ranks of a
            node; parameters are replicated over the first dimension and sharded over the second.
    """
    if sharding == "full":
        return init_device_mesh(device.type, (world_size(),))
    assert sharding == "hybrid", sharding
    ranks = torch.arange(world_size()).view(-1, ranks_per_node())  # torchrun numbers a node's ranks in a row
    groups = [dist.new_subgroups_by_enumeration(lines.tolist(), timeout=_timeout)[0] for lines in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))


def ranks_per_node() -> int:
    """How many ranks each of several nodes has, as torchrun says; collective.

    Raises:
        ValueError: there is one node only, or the nodes have unequal numbers of ranks.
    """
    found = gather_objects(int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
    if len(set(found)) > 1 or world_size() % found[0]:
        raise ValueError(
            f"training.sharding=hybrid needs the same number of ranks on every node, not {sorted(set(found))} of "
            f"{world_size()} in all: give torchrun the same --nproc-per-node everywhere, or set training.sharding=full"
        )
    if found[0] == world_size():
        raise ValueError("training.sharding=hybrid has no effect on one node: set training.sharding=full")
    return found[0]


def sum_across_ranks(tensor: Tensor) -> Tensor:
    """Add `tensor` up over all ranks, in place; every rank gets the sum."""
    dist.all_reduce(tensor)
    return tensor


def gather_objects(value: T, *, patient: bool = False) -> list[T]:
    """Every rank's `value`, by rank. For the rare path: small Python objects.

    `patient`: wait up to PATIENCE, as where each rank has worked for hours on its share.
    """
    found: list[T | None] = [None] * world_size()
    dist.all_gather_object(found, value, group=_patient if patient else None)
    return found  # type: ignore[return-value]


def say(text: object) -> None:
    """Print on rank 0 alone."""
    if is_main():
        tell(text)


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and hand its result, or its ValueError, to every rank."""
    outcome: list[object] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=_patient)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def main_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0, which fills a cache on disk, then on the others, which find it there."""
    result: list[T] = []
    on_main(lambda: result.append(work()))
    if not is_main():
        result.append(work())
    dist.barrier(group=_patient)  # a machine that does not see the cache needs as long as rank 0
    return result[0]
