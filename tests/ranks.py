"""Run a test's worker function in several processes joined by gloo."""

import contextlib
import multiprocessing
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from notus.runtime.process import leave

# Ranks are forked from a server that has imported these, which takes longer than most of what they do.
IMPORTED = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "transformers.modeling_utils", "datasets")


def run_ranks(worker: Callable[..., None], world_size: int, folder: Path, *args: object) -> None:
    """Call `worker(*args)`, a module's function, on every rank; raises if any rank does."""
    store = folder / f"store-{uuid.uuid4().hex}"
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    given = (worker, world_size, store, dict(os.environ), args)
    mp.start_processes(_enter, given, nprocs=world_size, start_method="forkserver")


def _enter(
    rank: int,
    worker: Callable[..., None],
    world_size: int,
    store: Path,
    environment: dict[str, str],
    args: tuple[object, ...],
) -> None:
    os.environ.clear()  # it is the server's, of when that was started
    os.environ.update(environment)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        worker(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    leave(0)


@contextlib.contextmanager
def launched(port: int, *, per_node: int | None = None) -> Iterator[int]:
    """Within `run_ranks`: a rank as torchrun starts it, described by its environment; yields its number.

    The worker's own process group ends here. Each launch needs a port of its own; `per_node`: ranks of a node.
    """
    if dist.is_initialized():
        launch = {"RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size(), "MASTER_ADDR": "127.0.0.1"}
        dist.barrier()  # a rank that leaves early breaks the connections of those that still join
        dist.destroy_process_group()
        os.environ.update({name: str(value) for name, value in launch.items()})
    os.environ.update(MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(per_node or os.environ["WORLD_SIZE"]))
    yield int(os.environ["RANK"])


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
