"""Checkpoints: safetensors shards through torch.distributed.checkpoint, and one JSON file for the rest.

A checkpoint is `checkpoints/step-00000100/`: it is written beside under a hidden name and renamed when whole. Any
number of ranks can read what any other number wrote. Only trainable parameters are kept; with LoRA, the adapters.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from notus.model.publish import sync
from notus.training.distributed import on_main

_STATE_FILE = "state.json"
_FORMAT = 1
_STEP_FOLDER = re.compile(r"step-(\d{8})")
_MOMENTS = {torch.optim.RMSprop: ("square_avg",), torch.optim.AdamW: ("exp_avg", "exp_avg_sq")}


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps completed.
        num_tokens: tokens processed by all ranks.
        window_sums: metric sums since the last line of metrics, over all ranks.
        window_seconds: seconds of those steps.
        identity: digests of what the run learns from and starts from, by the config key that names it.
    """

    step: int = 0
    num_tokens: int = 0
    window_sums: list[float] = dataclasses.field(default_factory=list)
    window_seconds: float = 0.0
    identity: dict[str, str] = dataclasses.field(default_factory=dict)


def save_checkpoint(
    folder: Path, progress: Progress, parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer,
    *, keep: int | None,
) -> Path:  # fmt: skip
    """Write `folder/step-XXXXXXXX` and drop the oldest beyond `keep`; collective.

    Args:
        folder: the run's `checkpoints` folder.
        progress: written as it is.
        parameters: (name, parameter) of the model; frozen ones are left out.
        optimizer: RMSprop or AdamW over the trainable parameters.
        keep: how many of the newest to keep; None: all.

    Raises:
        OSError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    final = folder / f"step-{progress.step:08d}"
    temporary = folder / f".{final.name}.partial"
    on_main(lambda: _prepare(temporary))
    writer = HuggingFaceStorageWriter(path=str(temporary), save_distributed=True)
    try:
        dcp.save(_tensors(parameters, optimizer), storage_writer=writer)
    except dcp.CheckpointException as error:
        raise OSError(
            f"cannot write the checkpoint {final}: {_causes(error)}; earlier checkpoints are whole"
        ) from error
    on_main(lambda: _publish(temporary, final, progress, type(optimizer).__name__))
    on_main(lambda: _drop_old(folder, keep))
    return final


def load_checkpoint(
    path: Path, parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> Progress:
    """Fill parameters and optimizer from a checkpoint, whatever the number of ranks that wrote it; collective.

    Raises:
        ValueError: the folder is not a whole checkpoint of this model and optimizer.
    """
    written_with, progress = on_main(lambda: _read_state(path))
    if written_with != type(optimizer).__name__:
        raise ValueError(f"{path} was written with {written_with}, not {type(optimizer).__name__}")
    tensors = _tensors(parameters, optimizer)
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(path=str(path)))
    except dcp.CheckpointException as error:
        raise ValueError(
            f"cannot read the checkpoint {path}: {_causes(error)}; if it is this run's own, remove it to go on from "
            "the one before"
        ) from error
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["step"].fill_(float(progress.step))
    return progress


def latest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step, if there is any."""
    found = _whole(folder)
    return found[-1] if found else None


def _whole(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and path.is_dir())


def _tensors(parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name; makes the optimizer's state if no step has made it yet."""
    moments = _MOMENTS[type(optimizer)]
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state.update({moment: torch.zeros_like(parameter.detach()) for moment in moments})
        tensors[f"model.{name}"] = parameter.detach()
        tensors.update({f"optimizer.{moment}.{name}": state[moment] for moment in moments})
    return tensors


def _causes(error: dcp.CheckpointException) -> str:
    return "; ".join(sorted({f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}))


def _prepare(temporary: Path) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def _publish(temporary: Path, final: Path, progress: Progress, optimizer: str) -> None:
    state = {"format": _FORMAT, "optimizer": optimizer, "progress": dataclasses.asdict(progress)}
    (temporary / _STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync(final.parent)


def _drop_old(folder: Path, keep: int | None) -> None:
    if keep is not None:
        for path in _whole(folder)[:-keep]:
            shutil.rmtree(path)


def _read_state(path: Path) -> tuple[str, Progress]:
    """The name of the optimizer, and the progress."""
    file = path / _STATE_FILE
    if not file.is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no {_STATE_FILE}")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if state["format"] != _FORMAT:
            raise ValueError(f"format {state['format']}, not {_FORMAT}")
        return state["optimizer"], Progress(**state["progress"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}): remove {path} to go on from the checkpoint before"
        ) from error
