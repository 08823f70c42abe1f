"""How every entry ends: a user's mistake is one line from one rank, and exit code 1. Needs no torch until then."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta


def run_entry(work: Callable[[], int | None]) -> int:
    """Run an entry's body and return the process's exit code.

    Under torchrun every rank may meet the same mistake, or one rank alone; the first to meet it tells, and torchrun
    ends the rest.
    """
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        if _first_to_fail():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def _first_to_fail() -> bool:
    if "RANK" not in os.environ:
        return True
    from torch.distributed import TCPStore

    # torchrun's own store, which outlives the process group
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return store.add(f"notus/failures/{attempt}", 1) == 1
