"""`training.activation_checkpointing: auto`: the fastest mode whose memory is estimated to fit the smallest device."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from notus.data.dataset import Rows
from notus.model.size import model_size
from notus.runtime.distributed import gather_objects, ranks_per_node, say, world_size
from notus.training.memory_estimate import RUNTIME_MARGIN, Job, fastest_checkpointing, footprint

GIB = 2**30


def checkpointing_of(
    mode: str, rows: Rows, device: torch.device, *, hybrid: bool, tokens_per_row: int, **job: Any
) -> str | Callable[[PreTrainedModel], str]:
    """The mode of activation checkpointing, or for "auto" what chooses it once the model is known; collective.

    Args:
        mode: of the config.
        rows: the training data.
        device: this rank's.
        hybrid: whether each node holds all of the model.
        tokens_per_row: the most tokens of a packed row.
        job: further fields of `Job`.
    """
    if mode != "auto":
        return mode
    chosen = Job(
        shard_size=ranks_per_node() if hybrid else world_size(),
        tokens_per_row=tokens_per_row,
        scored_per_row=math.ceil(tokens_per_row * rows.loss_tokens.sum() / rows.lengths.sum()),
        key_ratio=float(rows.separate_lengths(np.arange(len(rows))).sum() / rows.lengths.sum()),
        **job,
    )
    return functools.partial(choose_checkpointing, job=chosen, device=device)


def choose_checkpointing(causal_lm: PreTrainedModel, job: Job, device: torch.device) -> str:
    """The mode for `notus.training.activation_checkpointing`, the same on all ranks; collective. Says which, and why.

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
