"""The model of a run that has not finished: its newest whole checkpoint, as an ordinary model's or adapter's folder.

The run may be writing at that moment. It is not disturbed: checkpoints appear whole, are only read here, and what is
written goes into a folder that the run does not know.
"""

import contextlib
import fcntl
import functools
import hashlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.data.chat import resolve_template
from notus.model.export import export_adapter, export_model, load_causal_lm
from notus.model.load import read_json
from notus.model.lora import inject_lora, lora_layers, merge_lora
from notus.model.policy import Policy
from notus.runtime.distributed import process_group
from notus.runtime.files import write_text
from notus.runtime.process import follow_parent
from notus.training.checkpoint import STATE_FILE, DamagedCheckpointError, checkpoints_in, load_checkpoint, step_of
from notus.training.inputs import DATA_FILE
from notus.training.parallelize import COMPUTE_DTYPES
from notus.training.run_folder import CHECKPOINTS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SNAPSHOTS = "snapshots"
DEFAULT_SHARD = 5 * 10**9
_LOCK = ".lock"
_MADE_OF = "checkpoint.sha256"
_READ_BY = ".read-by"  # locked by the processes that read the snapshot
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")

Settings = dict[str, dict[str, Any]]

_read_here: list[Any] = []  # the files that hold this process's locks, until it ends


def snapshot(run: Path, settings: Settings, *, trust_remote_code: bool = False) -> tuple[int, Path]:
    """The step of the newest whole checkpoint, and a folder with its model, written if it is not there yet.

    It is written by a process of its own, on the CPU: the caller may be one of several ranks, or fill a GPU. A second
    caller waits for the first. Of several ranks one alone calls this. The folder stays at least until the caller's
    process has ended; whoever writes a newer one then removes it.

    Raises:
        ValueError: the run has no whole checkpoint, or its model cannot be made.
        OSError: the disk refuses.
    """
    folder = run / SNAPSHOTS
    if not checkpoints_in(run / CHECKPOINTS):
        raise _no_checkpoint(run)
    with _writing(folder):
        newest = next(iter(checkpoints_in(run / CHECKPOINTS)), run)
        out = folder / newest.name
        if not _stands_for(out, newest):
            _remove_leftovers(folder)
            out = _write_apart(run, settings, folder, trust_remote_code)
            _remove_unread(folder, out)
        with contextlib.suppress(OSError):  # without locks nothing is removed either
            _read_here.append(_lock(out, fcntl.LOCK_SH))
    return step_of(out), out


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Alone among all evaluations; but on a file system without locks. Raises OSError, saying what to do."""
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder / _LOCK).open("a")
    except OSError as error:
        told = f"{folder}: the newest checkpoint's model cannot be written there ({error.strerror})"
        raise OSError(f"{told}; make it writable, or write the model elsewhere with `notus export`") from error
    with lock:
        with contextlib.suppress(OSError):
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path) -> None:
    """What was killed while it wrote or removed a snapshot left this, as large as the model."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _lock(out: Path, kind: int) -> Any:
    """An open file that holds a lock on a snapshot until it is closed. Raises BlockingIOError as `flock`."""
    file = (out / _READ_BY).open("a")
    try:
        fcntl.flock(file, kind)
    except OSError:
        file.close()
        raise
    return file


def _remove_unread(folder: Path, newest: Path) -> None:
    """Remove older snapshots, each as large as the model, but for those that an evaluation still reads."""
    for old in checkpoints_in(folder):
        if step_of(old) >= step_of(newest):
            continue
        try:
            with _lock(old, fcntl.LOCK_EX | fcntl.LOCK_NB):
                gone = old.rename(old.with_name(f".{old.name}.removed"))  # what is half removed stands for nothing
                shutil.rmtree(gone)
        except BlockingIOError:
            continue
        except OSError as error:
            print(f"warning: {old}: cannot be removed ({error.strerror}); it is not needed any more", flush=True)


def _no_checkpoint(run: Path) -> ValueError:
    return ValueError(f"{run}: the run has not finished and has no checkpoint yet; train it first")


def _stands_for(out: Path, checkpoint: Path) -> bool:
    """Whether a snapshot is of this checkpoint, not of one that an earlier run in this folder made at the same step."""
    made_of = out / _MADE_OF  # written last
    return made_of.is_file() and made_of.read_text(encoding="utf-8") == _digest(checkpoint)


def _digest(checkpoint: Path) -> str:
    """Of its `state.json`, which has the digests of the other files; "" if it is not there."""
    file = checkpoint / STATE_FILE
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _write_apart(run: Path, settings: Settings, folder: Path, trust_remote_code: bool) -> Path:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_write_snapshot, args=(theirs, run, settings, folder, trust_remote_code))
    process.start()
    theirs.close()
    try:
        outcome = mine.recv()
    except EOFError:
        process.join()
        raise OSError(f"{run}: the process that wrote its newest checkpoint out ended ({process.exitcode})") from None
    except BaseException:  # Ctrl-C, say: Python would wait for the process at its own end
        process.kill()
        raise
    process.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _write_snapshot(outcome: Any, run: Path, settings: Settings, folder: Path, trust_remote_code: bool) -> None:
    follow_parent(signal.SIGKILL)  # with the caller goes its lock: another would write at the same place
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the caller's end tells
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        return  # it was gone already
    for name in _LAUNCH:
        os.environ.pop(name, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with process_group():
            causal_lm, tokenizer, checkpoint = load_unfinished(run, settings, trust_remote_code=trust_remote_code)
            out, digest = folder / checkpoint.name, _digest(checkpoint)
            if not _stands_for(out, checkpoint):  # others may be reading it, if newer checkpoints are damaged
                dtype = COMPUTE_DTYPES[settings["training"]["precision"]]
                write_model(causal_lm, tokenizer, out, base=settings["model"]["name_or_path"], dtype=dtype)
                write_text(out / _MADE_OF, digest)
        outcome.send(out)
    except (ValueError, OSError) as error:
        outcome.send(error)


def load_unfinished(
    run: Path, settings: Settings, *, trust_remote_code: bool = False
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", Path]:
    """The base model with the weights, or the adapter, of the newest checkpoint that is whole; and that checkpoint.

    All is on the CPU, in fp32. In a process group of one. Raises ValueError if there is no whole checkpoint.
    """
    import torch

    if not checkpoints_in(run / CHECKPOINTS):
        raise _no_checkpoint(run)
    load = functools.partial(load_causal_lm, dtype=torch.float32, device="cpu", trust_remote_code=trust_remote_code)
    causal_lm, tokenizer = load(settings["model"]["name_or_path"])
    if settings["lora"]["rank"]:
        inject_lora(causal_lm, **settings["lora"])
    data = read_json(run / DATA_FILE) if (run / DATA_FILE).is_file() else None
    if learned_chat(settings, data):  # at the end of a run, the run does the same
        tokenizer.chat_template = resolve_template(tokenizer, settings["data"]["chat_template"])
    return causal_lm, tokenizer, _fill(causal_lm, run / CHECKPOINTS)


def learned_chat(settings: Mapping[str, Mapping[str, Any]], data: Mapping[str, Any] | None) -> bool:
    """Whether a chat template certainly rendered rows: the config names one, or `data.json` counted such rows."""
    report = data["train"]["report"] if data else {}
    return settings["data"]["chat_template"] is not None or report.get("templated", 0) > 0


def _fill(causal_lm: "PreTrainedModel", folder: Path) -> Path:
    policy = Policy(causal_lm)  # checkpoints have its names
    damaged: set[Path] = set()
    while True:
        left = [path for path in checkpoints_in(folder) if path not in damaged]
        if not left:
            raise ValueError(f"{folder}: no checkpoint is whole; nothing to export")
        try:
            load_checkpoint(left[0], policy.named_parameters(), optimizer=None)
            return left[0]
        except (ValueError, OSError) as error:
            if not left[0].exists():
                continue  # the run has a newer one, and has removed this one meanwhile
            if not isinstance(error, DamagedCheckpointError):
                raise
            print(f"warning: {error}", flush=True)
            damaged.add(left[0])


def write_model(
    causal_lm: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    *,
    base: str,
    dtype: "torch.dtype",
    merge: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD,
) -> None:
    """Write LoRA layers as PEFT's adapter of `base`, unless they are to be merged; anything else as a whole model."""
    if lora_layers(causal_lm) and not merge:
        export_adapter(causal_lm, out, base_model_name_or_path=base, tokenizer=tokenizer)
        return
    merge_lora(causal_lm)
    export_model(
        causal_lm,
        out,
        hf_config=causal_lm.config,
        tokenizer=tokenizer,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
