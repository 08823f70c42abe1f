"""Work kept as it is done: files of JSON lines that grow, and outlive a process killed at any moment."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from notus.runtime.distributed import gather_objects, on_main
from notus.runtime.files import disk_error


def read_kept(path: Path) -> list[dict[str, Any]]:
    """The records of a file, in order; none if there is no file. A last line that was cut off is left out.

    Raises ValueError, naming file and line, for any other line that is no JSON object.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last newline was cut off, or is empty
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not a record of kept work; remove the line, or the file")
        records.append(record)
    return records


def keep(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append `records` to a file, and see them on disk. Raises OSError, see `disk_error`."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            with contextlib.suppress(OSError):  # on a file system without locks, one process writes at a time
                fcntl.flock(file, fcntl.LOCK_EX)  # what another is appending at this moment is no torn line
            _drop_torn_line(file.fileno())
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(path, error) from error


def _drop_torn_line(descriptor: int) -> None:
    """Cut a file off after its last newline: an append would else join a line that a killed process left."""
    end = os.fstat(descriptor).st_size
    block = 2**16
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        start = max(0, end - block)
        end = start + os.pread(descriptor, end - start, start).rfind(b"\n") + 1
    os.ftruncate(descriptor, end)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that are completed together.

    Attributes:
        indices: which prompts of the call these are.
        prompts: their token ids.
        room: for each, the most tokens that it may get.
        seed: of the batch's draws; None: greedy.
    """

    indices: list[int]
    prompts: list[list[int]]
    room: list[int]
    seed: int | None


class KeptTokens:
    """Completions, as token ids, in one file per rank of a folder that all ranks see."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self._keys: list[list[str]] = []

    def find(self, batches: list[Batch], settings: dict[str, Any]) -> dict[int, list[list[int]]]:
        """The batches that are complete already, by number. A collective, before the first `add`.

        Raises ValueError, naming the file, if one in the folder is no file of kept completions; or if the ranks have
        different prompts or models, whose completions would be mixed up.
        """
        self._keys = [self._keys_of(batch, settings) for batch in batches]
        if dist.is_initialized() and len(set(gather_objects(_digest(self._keys)))) > 1:
            raise ValueError(
                "the ranks have different prompts or weights: their data or files differ, or a task draws its examples "
                "at random without a seed; run in one process"
            )
        wanted = {key for keys in self._keys for key in keys}
        found = on_main(lambda: self._read(wanted)) if dist.is_initialized() else self._read(wanted)
        return {
            number: [found[key] for key in keys] for number, keys in enumerate(self._keys) if found.keys() >= set(keys)
        }

    def add(self, number: int, new: list[list[int]]) -> None:
        """Keep the batch of that number. Raises OSError."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        records = ({"key": key, "ids": ids} for key, ids in zip(self._keys[number], new, strict=True))
        keep(self.folder / f"rank-{rank}.jsonl", records)

    def _read(self, wanted: set[str]) -> dict[str, list[int]]:
        found = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for number, record in enumerate(read_kept(path), start=1):
                if not _is_completion(record):
                    raise ValueError(f"{path}, line {number}: not a kept completion; remove the file")
                if record["key"] in wanted:
                    found[record["key"]] = record["ids"]
        return found

    def _keys_of(self, batch: Batch, settings: dict[str, Any]) -> list[str]:
        """A digest per prompt of all that decides its completion; where it is drawn, so do its neighbours."""
        drawn = None if batch.seed is None else [batch.seed, batch.prompts, batch.room]
        of_batch = _digest([self.identity, settings, drawn])
        rows = enumerate(zip(batch.prompts, batch.room, strict=True))
        return [_digest([of_batch, prompt, room, row if drawn else None]) for row, (prompt, room) in rows]


def _is_completion(record: dict[str, Any]) -> bool:
    key, ids = record.get("key"), record.get("ids")
    return isinstance(key, str) and isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
