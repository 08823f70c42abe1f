"""A folder that appears on disk whole or not at all, written by rank 0 on behalf of every rank."""

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from notus.model.shards import is_rank_zero
from notus.runtime.files import disk_error, sync

_PATIENCE = datetime.timedelta(hours=6)


class NewFolder:
    """A folder that rank 0 writes beside its place, syncs, and renames into place over an earlier one.

    Other ranks write nothing, but hear of a failure, so that none waits for a rank that has given up.
    """

    def __init__(self, folder: str | Path, *, markers: set[str]) -> None:
        """Begin `folder`. What stands there is replaced if it is empty or has a file named in `markers`.

        Raises:
            ValueError: something else stands there.
            OSError: the disk refuses; both on every rank.
        """
        self.folder = Path(folder).absolute()
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._old = self.folder.with_name(f".{self.folder.name}.old")
        self._failure: Exception | None = None
        # the others wait here while rank 0 writes, checks and syncs, for longer than for an exchange between ranks
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if dist.is_initialized() else None
        self.write(lambda _: self._prepare(markers))
        self._share_failure()

    def write(self, action: Callable[[Path], object]) -> None:
        """Call `action` with the folder in the making; on rank 0, and only if nothing failed before."""
        if self._failure is not None or not is_rank_zero():
            return
        try:
            action(self._partial)
        except OSError as error:
            self._failure = disk_error(self.folder, error)
            shutil.rmtree(self._partial, ignore_errors=True)  # room for what else is to be written
        except ValueError as error:
            self._failure = error

    def publish(self, check: Callable[[Path], None] | None = None) -> None:
        """Put the folder into its place, or raise on every rank what failed on one of them and change nothing.

        `check` gets the folder on every rank before, once it is whole, and raises ValueError if it is not good.
        """
        self._share_failure()
        if check is not None:
            try:
                check(self._partial)
            except ValueError as error:
                self._failure = error
            self._share_failure()
        self.write(lambda _: self._rename())
        self._share_failure()

    def _prepare(self, markers: set[str]) -> None:
        if self._old.exists() and not self.folder.exists():
            self._old.rename(self.folder)  # an earlier run ended between the two renames
        present = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        if present and not present & markers:
            raise ValueError(f"{self.folder}: holds files of another kind; name a new or empty folder")
        for leftover in (self._partial, self._old):
            _remove(leftover)
        self._partial.mkdir(parents=True)

    def _rename(self) -> None:
        for path in [*self._partial.rglob("*"), self._partial]:
            sync(path)
        if self.folder.exists():
            self.folder.rename(self._old)
        self._partial.rename(self.folder)
        sync(self.folder.parent)
        _remove(self._old)

    def _share_failure(self) -> None:
        failures = [self._failure]
        if dist.is_initialized():
            failures *= dist.get_world_size()
            dist.all_gather_object(failures, self._failure, group=self._group)
        failure = next((failure for failure in failures if failure is not None), None)
        if failure is not None:
            raise failure


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with the permissions that any new file gets. Raises OSError; see `disk_error`."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, {"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(mode)  # safetensors makes files that nobody but their owner can read


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files, without what transformers notes of where it was loaded from."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")})


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
