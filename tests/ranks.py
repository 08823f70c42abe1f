"""Run a test's worker function in several processes joined by gloo."""

import contextlib
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from notus.entry import leave


def run_ranks(worker: Callable[..., None], world_size: int, folder: Path, *args: object) -> None:
    """Call `worker(*args)`, a module's function, on every rank; raises if any rank does."""
    store = folder / f"store-{uuid.uuid4().hex}"
    mp.spawn(_enter, (worker, world_size, store, args), nprocs=world_size)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_under_torchrun(work: Callable[[], None], port: int, *, per_node: int) -> None:
    """Call `work`, which joins a process group of its own, within a worker; nodes have `per_node` ranks each."""
    rank, size = dist.get_rank(), dist.get_world_size()
    outer = dist.distributed_c10d._get_default_store().clone()
    dist.destroy_process_group()
    launched = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": per_node, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()}, MASTER_ADDR="127.0.0.1")
    work()
    for name in launched:
        del os.environ[name]
    dist.init_process_group("gloo", store=dist.PrefixStore(str(port), outer), rank=rank, world_size=size)


def _enter(rank: int, worker: Callable[..., None], world_size: int, store: Path, args: tuple[object, ...]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        worker(*args)
    finally:
        dist.destroy_process_group()
    leave(0)


@contextlib.contextmanager
def launched(port: int, folder: Path) -> Iterator[int]:
    """Within `run_ranks`: a rank as torchrun starts it, described by its environment; yields its number."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        yield rank
    finally:
        store = dist.FileStore(str(folder / f"end-{port}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
