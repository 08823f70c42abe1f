"""How a checkpoint reaches the disk: whole or not at all, behind the back of the training loop.

The tensors are copied to host memory (pinned, on a GPU), which is all that the loop waits for. A thread per rank then
writes its rank's file into a hidden folder; when all are written, the first rank adds `state.json`, syncs, renames the
folder into place, points `latest` at it, and drops what is old.
"""

import concurrent.futures
import copy
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from notus.runtime.distributed import PATIENCE
from notus.runtime.files import free_space, sync, write_text
from notus.runtime.process import tell
from notus.training.checkpoint import (
    STATE_FILE,
    Progress,
    best_step_of,
    causes,
    checkpoints_in,
    describe,
    named_tensors,
    step_folder,
    step_of,
)
from notus.training.optimizers import PiecewiseOptimizer

LATEST = "latest"
_BLOCK = 16 * 2**20
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


class Checkpoints:
    """Writes a run's checkpoints. All methods but `failed` and `completed` are collective."""

    def __init__(
        self, folder: Path, device: torch.device, *, background: bool, keep: int | None, keep_every: int | None
    ) -> None:
        """Prepare to write to `folder`.

        Args:
            folder: the run's `checkpoints` folder.
            device: where the parameters are.
            background: write while training continues, from a copy in host memory; else wait for the disk.
            keep: how many of the newest to keep; None: all.
            keep_every: besides those, keep the checkpoints of every so many steps.
        """
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._copies: dict[str, Tensor] = {}
        self._pinned = device.type == "cuda"
        self._thread: concurrent.futures.Executor | None = None
        if background:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            # its own group: these messages must not mix with the loop's
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._writing: concurrent.futures.Future[Any] | None = None
        self._path = folder
        self._new: list[Path] = []  # on disk, and not handed out by `completed` yet

    def save(
        self, progress: Progress, parameters: Iterable[tuple[str, nn.Parameter]], optimizer: PiecewiseOptimizer
    ) -> None:
        """Write `folder/step-XXXXXXXX`, after the checkpoint before it is on disk.

        Args:
            progress: written as the first rank has it now.
            parameters: (name, parameter) of the model; frozen ones are left out.
            optimizer: RMSprop or AdamW over the trainable parameters.

        Raises:
            OSError: this checkpoint, or the one before, cannot be written; earlier ones are untouched.
        """
        self.wait()
        self._path = self._folder / step_folder(progress.step)
        names = type(optimizer).__name__, optimizer.state_dtype_name
        commit = _Commit(self._path, copy.deepcopy(progress), *names, self._keep, self._keep_every)
        tensors = named_tensors(parameters, optimizer)  # in the thread, of interest by their shapes and places alone
        local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
        if self._thread is None:
            writer = _Writer(commit, local)
            self._raise_from(lambda: dcp.save(tensors, storage_writer=writer))
            self._new.append(self._path)
            return
        writer = _Writer(commit, self._copy(local))
        self._writing = self._thread.submit(dcp.save, tensors, storage_writer=writer, process_group=self._group)

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, which the next save uses again."""
        for name, tensor in tensors.items():
            if name not in self._copies:
                self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
            self._copies[name].copy_(tensor, non_blocking=True)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return self._copies

    def failed(self) -> bool:
        """Whether the write in the background has failed, as far as this rank knows."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until all is on disk.

        Raises:
            OSError: it cannot be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self._raise_from(writing.result)
            self._new.append(self._path)

    def completed(self) -> list[Path]:
        """Return the checkpoints that are on disk, as far as this rank knows, since the last call; waits for none."""
        if self._writing is not None and self._writing.done() and not self.failed():
            self.wait()
        new, self._new = self._new, []
        return new

    def _raise_from(self, work: Any) -> None:
        try:
            work()
        except dcp.CheckpointException as error:
            problem = f"the checkpoint {self._path} cannot be written ({causes(error)}); {free_space(self._path)}"
            if dist.get_rank() == 0:  # leave what room there is to others
                shutil.rmtree(_partial(self._path), ignore_errors=True)
            earlier = "earlier checkpoints are whole" if checkpoints_in(self._folder) else "there is no earlier one"
            raise OSError(f"{problem}; {earlier}") from error


@dataclasses.dataclass(frozen=True)
class _Commit:
    """What makes written files a checkpoint."""

    path: Path
    progress: Progress
    optimizer: str
    optimizer_dtype: str
    keep: int | None
    keep_every: int | None

    @property
    def partial(self) -> Path:
        """Where the files are written."""
        return _partial(self.path)

    def publish(self, files: dict[str, dict[str, Any]]) -> None:
        """Complete the folder, put it in its place, and drop older ones; for one rank, once all have written."""
        folder = self.path.parent
        described = describe(self.progress, self.optimizer, files, optimizer_dtype=self.optimizer_dtype)
        write_text(self.partial / STATE_FILE, described)
        sync(self.partial)
        _remove(self.path)
        os.rename(self.partial, self.path)
        sync(folder)
        write_text(folder / LATEST, self.path.name + "\n", locked=True)  # for people and their scripts
        sync(folder)
        self._drop_old()

    def _drop_old(self) -> None:
        if self.keep is not None:
            found = checkpoints_in(self.path.parent)
            # A run that resumes from any of those that stay needs what was the best model at its time.
            best = {best_step_of(path) for path in found[: self.keep]} if self.progress.best_step else set()
            for path in found[self.keep :]:
                if step_of(path) not in best and (self.keep_every is None or step_of(path) % self.keep_every):
                    try:
                        _remove(path)
                    except OSError as error:  # NFS, say, while somebody reads it; the next save tries again
                        tell(f"warning: the old checkpoint {path} cannot be removed ({error})")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


class _Writer(HuggingFaceStorageWriter):
    """Streams a rank's tensors into one safetensors file as `HuggingFaceStorageReader` reads them.

    Torch's own writer first makes a second copy of all tensors in memory, and holds Python's lock while it does.
    """

    def __init__(self, commit: _Commit, local: dict[str, Tensor]) -> None:
        """`local`: this rank's part of every tensor, by name."""
        super().__init__(path=str(commit.partial), save_distributed=True)
        self._commit, self._local = commit, local

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Clear away what a killed run left; on one rank.

        All ranks have made their plans, for which torch makes the folder, and none has written: any earlier, a rank
        would make the folder while it is being removed, and fail.
        """
        for leftover in self._commit.path.parent.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=not leftover.name.endswith(".partial"))
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors; the result holds the file's size and digest."""
        results: list[WriteResult] = []
        if plan.items:
            file = f"rank-{plan.storage_data['shard_index'] - 1:05d}.safetensors"
            tensors, offsets = {}, {}
            for item in plan.items:
                name, of_tensor = item.index.fqn, item.tensor_data
                assert of_tensor is not None
                assert of_tensor.chunk.sizes == self._local[name].shape, name
                tensors[name], offsets[name] = self._local[name].detach(), list(of_tensor.chunk.offsets)
            self._commit.partial.mkdir(parents=True, exist_ok=True)
            written = _write_safetensors(self._commit.partial / file, tensors, offsets)
            results = [WriteResult(item.index, written["bytes"], (file, written)) for item in plan.items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """All ranks have written: publish."""
        self._commit.publish(dict(result.storage_data for of_rank in results for result in of_rank))


def _write_safetensors(path: Path, tensors: dict[str, Tensor], offsets: dict[str, list[int]]) -> dict[str, Any]:
    """Write and sync one file; returns its size and sha256. `offsets`: where each tensor lies in the whole one."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": json.dumps(
        {name: {"saved_offsets": offset} for name, offset in offsets.items()})}}  # fmt: skip
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        digest = hashlib.sha256()
        _put(file, digest, memoryview(len(text).to_bytes(8, "little") + text))
        for tensor in tensors.values():
            flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
            _put(file, digest, flat.numpy().data)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _put(file: BinaryIO, digest: Any, content: memoryview) -> None:
    """Block by block; both calls leave Python's lock to the training loop."""
    for start in range(0, len(content), _BLOCK):
        file.write(content[start : start + _BLOCK])
        digest.update(content[start : start + _BLOCK])


def _remove(path: Path) -> None:
    """Take a checkpoint away: first its name, so that what is half gone is never taken for whole."""
    if path.exists():
        gone = path.with_name(f".{path.name}.old")
        os.rename(path, gone)
        shutil.rmtree(gone)
