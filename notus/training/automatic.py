"""`training.activation_checkpointing: auto`: the fastest mode whose memory is estimated to fit the smallest device."""

import dataclasses
import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from notus.model.size import model_size
from notus.training.distributed import gather_objects, say, world_size
from notus.training.footprint import RUNTIME_MARGIN, Job, fastest_checkpointing, footprint

GIB = 2**30


def choose_checkpointing(causal_lm: PreTrainedModel, job: Job, device: torch.device) -> str:
    """The mode for `notus.training.checkpointing`, the same on all ranks; collective. Says which, and why.

    "full" if nothing fits, with a warning alone: the estimate may be off.

    Args:
        causal_lm: with its adapters, before it is sharded.
        job: what else the memory follows from; its own mode is not looked at.
        device: this rank's.
    """
    capacity, size = min(gather_objects(capacity_of(device))), model_size(causal_lm)
    mode = fastest_checkpointing(capacity, size, job)
    need = footprint(size, dataclasses.replace(job, activation_checkpointing=mode)).total + RUNTIME_MARGIN
    fits = need <= capacity
    say(
        f"{'' if fits else 'warning: '}training.activation_checkpointing=auto: {mode}, estimated to need "
        f"{need / GIB:.1f} GiB per rank of {capacity / GIB:.1f} GiB"
        + ("" if fits else "; this may not fit: lower training.tokens_per_row, or take more ranks")
    )
    return mode


def capacity_of(device: torch.device) -> int:
    """Bytes that are free for this rank: on its GPU, or its share of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _available() // int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def _available() -> int:
    """Bytes of host memory that could be had without swapping; where the system does not say, all there are."""
    told = Path("/proc/meminfo")
    lines = told.read_text(encoding="ascii").splitlines() if told.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
