"""What a checkpoint is, how it is checked, and how it is read; `checkpoint_writer.py` writes it.

`checkpoints/step-00000100/` holds one safetensors file per rank that had something to write, through
torch.distributed.checkpoint, and `state.json`: the run's progress, and the size and digest of every file. Any number of
ranks can read what any other number wrote. Only trainable parameters are kept; with LoRA, the adapters.
"""

import dataclasses
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from notus.runtime.distributed import gather_objects, on_main, rank, say, world_size
from notus.runtime.files import DiskError
from notus.training.optimizers import PiecewiseOptimizer

STATE_FILE = "state.json"
DAMAGED = "damaged-"  # before the name of a checkpoint that could not be read
_FORMAT = 5
_FORMAT_0_1, _FORMAT_0_3 = 2, 3  # of earlier versions, whose DPO runs kept more metric sums
_FORMAT_0_5 = 4  # without the best evaluation and the run's length
_STEP_FOLDER = re.compile(r"step-(\d{8})")


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was written."""


@dataclasses.dataclass
class Progress:
    """How far a run has come. Random numbers need no state: every step draws from its own seed.

    Attributes:
        step: optimizer steps completed.
        num_tokens: tokens processed by all ranks.
        logged: the step of the last line of metrics.
        recorded: whether the metrics that are due at `step` are logged; not if its evaluation was interrupted.
        grad_norm, learning_rate: of the last step.
        window_sums: metric sums since the last line of metrics, by rank.
        window_steps, window_seconds: how many steps these are, and their seconds.
        identity: digests of what the run learns from and starts from, by the config key that names it; the names of
            the reference caches, and the digests of their log-probs.
        trackers: ids of the run at its trackers, by their names.
        task: what the task has learned beside the weights, by its own names.
        total_steps: of the run as it was when this was written; 0: not known. `training.extend` raises it.
        best_step, best_value: the evaluation with the best `training.best_metric` so far; 0 and None: there is none.
        evaluations_since_best: how many evaluations since then were not better.
    """

    step: int = 0
    num_tokens: int = 0
    logged: int = 0
    recorded: bool = True
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    window_sums: list[list[float]] = dataclasses.field(default_factory=list)
    window_steps: int = 0
    window_seconds: float = 0.0
    identity: dict[str, str] = dataclasses.field(default_factory=dict)
    trackers: dict[str, str] = dataclasses.field(default_factory=dict)
    task: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    total_steps: int = 0
    best_step: int = 0
    best_value: float | None = None
    evaluations_since_best: int = 0


def load_checkpoint(
    path: Path, parameters: Iterable[tuple[str, nn.Parameter]], optimizer: PiecewiseOptimizer | None
) -> Progress:
    """Fill parameters and optimizer from a checkpoint, whatever the number of ranks that wrote it; collective.

    Without an optimizer, its states are not read.

    Raises:
        DamagedCheckpointError: a file is missing, or not as it was written; nothing was filled.
        OSError: a file cannot be read.
        ValueError: the folder is no checkpoint, or one of another model or optimizer.
    """
    written = on_main(lambda: _read_state(path))
    _check_files(path, written["files"])
    if optimizer is not None and written["optimizer"] != type(optimizer).__name__:
        raise ValueError(f"{path} was written with {written['optimizer']}, not {type(optimizer).__name__}")
    if optimizer is not None:
        _check_dtype(path, written.get("optimizer_dtype"), optimizer.state_dtype_name)
    tensors = named_tensors(parameters, optimizer)
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(path=str(path)))
    except dcp.CheckpointException as error:
        raise ValueError(f"cannot read the checkpoint {path} into this model: {causes(error)}") from error
    progress = Progress(**written["progress"])
    if optimizer is not None:
        for state in optimizer.state.values():
            state["step"].fill_(float(progress.step))
    return progress


def check_whole(path: Path) -> None:
    """Read every file of a checkpoint and fill nothing; collective.

    Raises:
        DamagedCheckpointError: a file is missing, or not as it was written.
        OSError: a file cannot be read.
        ValueError: another version wrote it.
    """
    _check_files(path, on_main(lambda: _read_state(path))["files"])


def _check_dtype(path: Path, written: str | None, now: str) -> None:
    """Raise ValueError if the states are in another dtype; before version 0.3 it was not written down."""
    if written not in (None, now):
        raise ValueError(
            f"{path} was written with training.optimizer_dtype={written}, not {now}: set it back to resume, or start "
            "over with training.resume=never"
        )


def read_identity(path: Path) -> dict[str, str]:
    """`Progress.identity` of a checkpoint, or nothing if it is damaged; for one rank."""
    try:
        return dict(_read_state(path)["progress"]["identity"])
    except DamagedCheckpointError:
        return {}


def best_step_of(path: Path) -> int:
    """`Progress.best_step` of a checkpoint, 0 if there is none or it is damaged; for one rank."""
    try:
        return int(_read_state(path)["progress"].get("best_step", 0))
    except ValueError:  # damaged, or of another version
        return 0


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, reverse=True)


def step_folder(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def named_tensors(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: PiecewiseOptimizer | None
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name; makes the optimizer's state if no step has made it yet."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        tensors[f"model.{name}"] = parameter.detach()
        if optimizer is None:
            continue
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = optimizer.new_state(parameter)
        state = optimizer.state[parameter]
        tensors.update({f"optimizer.{key}.{name}": value for key, value in state.items() if key != "step"})
    return tensors


def describe(
    progress: Progress, optimizer: str, files: dict[str, dict[str, Any]], *, optimizer_dtype: str | None = None
) -> str:
    """The text of `state.json`; `files`: size and sha256 of each, by name; `optimizer_dtype`: None if not known."""
    state = {
        "format": _FORMAT,
        "optimizer": optimizer,
        "optimizer_dtype": optimizer_dtype,
        "progress": dataclasses.asdict(progress),
        "files": files,
    }
    return json.dumps({**state, "digest": _digest_of(state)}, indent=1)


def causes(error: dcp.CheckpointException) -> str:
    """What went wrong on which ranks, each cause once."""
    return "; ".join(sorted({_cause(cause) for cause, _ in error.failures.values()}))


def _cause(error: BaseException) -> str:
    return error.reason if isinstance(error, DiskError) else f"{type(error).__name__}: {error}"


def _digest_of(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    file = path / STATE_FILE
    if not file.is_file():
        raise DamagedCheckpointError(f"{path} is not a checkpoint, or not a whole one: it has no {STATE_FILE}")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        whole = state.pop("digest") == _digest_of(state)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{file} is damaged ({type(error).__name__}: {error})") from error
    if not whole:
        raise DamagedCheckpointError(f"{file} is damaged: its content does not match its digest")
    _check_keys(file, state)
    if state["format"] in (_FORMAT_0_1, _FORMAT_0_3):
        sums = state["progress"]["window_sums"]
        state["progress"]["window_sums"] = [_current_sums(each, state["format"]) for each in sums]
    elif state["format"] not in (_FORMAT_0_5, _FORMAT):
        raise ValueError(
            f"{path} has format {state['format']}, this version reads {_FORMAT}: finish the run with the version that "
            "began it, or set training.resume=never to start over"
        )
    return state


# Beside these, fields of `Progress` have been added since version 0.1; a checkpoint without them has their defaults.
_ALWAYS = {
    "step", "num_tokens", "logged", "recorded", "grad_norm", "learning_rate", "window_sums", "window_steps",
    "window_seconds", "identity", "trackers",
}  # fmt: skip


def _check_keys(file: Path, state: dict[str, Any]) -> None:
    """Raise ValueError if a whole `state.json` has other keys than this version writes.

    That is no reason to fall back to an older checkpoint: the digest shows that some version wrote exactly this, and a
    key that is passed over could change what the run computes.
    """
    always, known = {"format", "optimizer", "progress", "files"}, {field.name for field in dataclasses.fields(Progress)}
    progress = state.get("progress")
    within = set(progress) if isinstance(progress, dict) else set()
    missing = (always - set(state)) | {f"progress.{name}" for name in _ALWAYS - within}
    unknown = (set(state) - always - {"optimizer_dtype"}) | {f"progress.{name}" for name in within - known}
    if state.get("format") not in (_FORMAT_0_1, _FORMAT_0_3, _FORMAT_0_5, _FORMAT):
        missing, unknown = missing & {"format"}, set()  # that it has another format says more
    found = [f"{what} {', '.join(sorted(keys))}" for what, keys in (("lacks", missing), ("has", unknown)) if keys]
    if found:
        raise ValueError(
            f"{file} {' and '.join(found)}: another version wrote it, or it was edited. Resume with the version that "
            "began the run, move this checkpoint away to resume from the one before, or set training.resume=never to "
            "start over"
        )


def _current_sums(sums: list[float], written: int) -> list[float]:
    """A rank's metric sums of an older format without those of DPO that are gone. SFT had three: nothing to drop."""
    if len(sums) < 10:
        return sums
    if written == _FORMAT_0_1:
        sums = sums[:9] + sums[10:]
    return sums[:5] + sums[6:]  # the margin is the difference of two others


def _check_files(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Read every file again; each rank takes a share. What cannot be read now is not thereby damaged: OSError."""
    # as the reader takes every file of the folder, there must be no other
    present = on_main(lambda: {file.name for file in path.glob("*.safetensors")})
    if present != set(files):
        raise DamagedCheckpointError(f"{path} holds {sorted(present)}, not {sorted(files)} as when it was written")
    found: list[str | OSError] = []
    for name in sorted(files)[rank() :: world_size()]:
        try:
            found += _problems(path / name, files[name])
        except OSError as error:
            found.append(OSError(f"{path / name} cannot be read ({error.strerror or error}); nothing was changed"))
    problems = [problem for part in gather_objects(found) for problem in part]
    for problem in problems:
        if isinstance(problem, OSError):
            raise problem
    if problems:
        raise DamagedCheckpointError("; ".join(str(problem) for problem in problems[:3]))


def _problems(path: Path, expected: dict[str, Any]) -> list[str]:
    size = path.stat().st_size
    if size != expected["bytes"]:
        return [f"{path} has {size} bytes, not {expected['bytes']}"]
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
    return [] if digest.hexdigest() == expected["sha256"] else [f"{path} does not match its digest"]


CONTENT = " (content)"  # ends the name in `Progress.identity` of the digest of a reference cache's log-probs


def recorded_content(checkpoints: Sequence[Path], name: str, cache: str) -> str | None:
    """The digest of the log-probs that a run learned from so far; collective.

    Args:
        checkpoints: of the run, the newest first.
        name: of the cache in `Progress.identity`.
        cache: the cache's own name, which stands for all that decides its log-probs.

    Returns:
        None if there is no whole checkpoint, it was made with another cache, or by a version that did not record it.
    """

    def find() -> str | None:
        identity = next((found for path in checkpoints if (found := read_identity(path))), {})
        return identity.get(name + CONTENT) if identity.get(name) == cache else None

    return on_main(find)


# Contents that a run cannot change when it is resumed.
_BOUND = {
    "data.train", "data.train (ratings)", "data.train (labels)", "data.eval", "data.eval (ratings)",
    "data.eval (labels)", "model.adapter", "model.name_or_path", "reference.model",
}  # fmt: skip


def check_contents(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Compare the digests in the checkpoint `path` with those of this launch.

    Ratings and labels that the checkpoint does not name were not learned from so far, so they may be any. The content
    of a reference cache is compared where the cache is read; see `recorded_content`.

    Raises:
        ValueError: the data or the starting model are others.
    """
    changed = [key for key in now if before.get(key) != now[key]]
    changed += ["reference.model"] * ("reference.model" in before and "reference.model" not in now)
    for key in changed:
        if key.endswith(CONTENT) or (key.endswith(("(ratings)", "(labels)")) and key not in before):
            continue
        if key in _BOUND:
            raise ValueError(
                f"{path} was made from other contents of {key}: restore them to resume, or start over with "
                "training.resume=never"
            )
        say(
            f"warning: {key} is not that of {path}: another device, another version, or other optimisations "
            "(NOTUS_DISABLE) computed it"
        )


def check_newest(checkpoints: Sequence[Path], now: Mapping[str, str]) -> None:
    """Check the newest checkpoint before doing any work that depends on it. All ranks must call this."""
    for path in checkpoints[:1]:
        before = on_main(functools.partial(read_identity, path))
        if before:
            check_contents(path, before, now)


def load_newest(
    checkpoints: Sequence[Path],
    own: Path,
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: PiecewiseOptimizer,
) -> tuple[Path, Progress]:
    """Load the first checkpoint that is whole; damaged ones are renamed, with a warning. Collective.

    Args:
        checkpoints: the newest first.
        own: the run's `checkpoints` folder. A checkpoint elsewhere is another run's, with another config perhaps: its
            history and its metric sums are not taken over, and it is an error if it is damaged.
        parameters, optimizer: filled; see `load_checkpoint`.

    Raises:
        ValueError: none is whole.
    """
    named = list(parameters)
    for path in checkpoints:
        is_own = path.parent.resolve() == own.resolve()
        try:
            progress = load_checkpoint(path, named, optimizer)
        except DamagedCheckpointError as error:
            if not is_own:
                raise
            aside = on_main(functools.partial(rename_damaged, path))
            say(f"warning: {error}; this checkpoint is now {aside.name}")
            continue
        if not is_own:
            progress.logged, progress.trackers, progress.recorded = 0, {}, True
            # another loss would read these sums as other quantities
            progress.window_sums, progress.window_steps, progress.window_seconds = [], 0, 0.0
            progress.best_step, progress.best_value, progress.evaluations_since_best = 0, None, 0
        return path, progress
    raise ValueError(f"{own}: no checkpoint is whole (see above); set training.resume=never to start over")


def rename_damaged(path: Path) -> Path:
    """Give a damaged checkpoint a name that is no checkpoint's; returns it. Nothing is deleted but an earlier such."""
    aside = path.with_name(f"{DAMAGED}{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return path.rename(aside)
