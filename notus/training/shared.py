"""A run's folder must be one and the same for all ranks, on whichever machine they are."""

import os
import socket
import time
import uuid
from pathlib import Path

from notus.runtime.distributed import gather_objects, on_main, rank

# A network file system may show a new file late.
PATIENCE = 10.0


def check_shared(folder: Path) -> None:
    """Make sure that every rank sees, and may write, what rank 0 writes to `folder`; collective.

    Raises:
        ValueError: naming the ranks that do not, their hosts and the folder as they know it.
    """
    name = on_main(lambda: _leave_token(folder))
    problem = None if rank() == 0 else _problem(folder, name)
    told = [f"rank {number} on {found}" for number, found in enumerate(gather_objects(problem)) if found]
    on_main(lambda: _clear(folder, name))
    if told:
        raise ValueError(f"{'; '.join(told)}: training.output_dir must lie on a disk that all machines share")


def _leave_token(folder: Path) -> str:
    _clear(folder, ".shared-")  # what a killed launch left; this one holds the folder's lock
    name = f".shared-{uuid.uuid4().hex}"
    (folder / name).touch()
    return name


def _problem(folder: Path, name: str) -> str | None:
    """What keeps this rank from sharing the folder; it leaves a file of its own there to see whether it may."""
    where = f"{socket.gethostname()}, whose folder is {folder.absolute()}"
    deadline = time.monotonic() + PATIENCE
    while not (folder / name).exists():
        if time.monotonic() > deadline:
            return f"{where}, does not see what rank 0 writes there"
        time.sleep(0.1)
    try:
        (folder / f"{name}-{rank()}").touch()
    except OSError as error:
        return f"{where}, cannot write there ({os.strerror(error.errno or 0)})"
    return None


def _clear(folder: Path, name: str) -> None:
    for path in folder.glob(f"{name}*"):
        path.unlink()
