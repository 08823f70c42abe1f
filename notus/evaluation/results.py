"""What evaluations leave on disk: `RUN/evaluations/SUITE/result.json`, and records that grow while a suite works.

Every suite writes its result in the one form that the report and the model card read.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from notus.runtime.files import check_regular, disk_error, lock, write_text

T = TypeVar("T")

EVALUATIONS = "evaluations"
RESULT = "result.json"
LOCK = ".lock"

_locks: dict[Path, IO[str]] = {}  # open files that hold this process's locks, by their folder
_appending = threading.Lock()  # file locks exclude other processes only


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of an evaluation, with what a model card's metadata needs to say of it."""

    name: str  # what people call the benchmark, as "AI2 Reasoning Challenge" or "reward accuracy"
    metric: str  # the measure's name, as "acc_norm"
    value: float  # the figure, in `unit`
    unit: str = ""  # "%" (0 to 100), or "" for a plain number
    stderr: float | None = None  # its standard error, in `unit`; None: not known
    count: int | None = None  # how many examples it stands on; None: not known
    setup: str = ""  # how it was measured, in a few words, as "25-shot"
    dataset: str | None = None  # a hub id or a file's name; None: as `name`
    # the figures of published models by their name, in `unit`.
    reference: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """An evaluation of one model by one suite."""

    suite: str  # its name on the command line
    model: str  # the model as the user named it; of an unfinished run with the step, as "runs/dpo (step 100)"
    figures: Sequence[Figure]  # the headline figures, the most important first
    settings: Mapping[str, Any]  # how it was computed: flat, JSON values
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # whatever else the suite reports; JSON
    # ISO date of the evaluation.
    date: str = dataclasses.field(default_factory=lambda: datetime.date.today().isoformat())


def write_result(folder: Path, result: Result) -> Path:
    """Write `folder/result.json` atomically and return its path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULT, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return folder / RESULT


def read_result(path: Path) -> Result:
    """Read what `write_result` wrote. Raises ValueError, naming the file, for anything else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Result(**{**tree, "figures": [Figure(**figure) for figure in tree["figures"]]})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: not the result of an evaluation ({error}); evaluate again, or remove it") from error


def read_results(run: Path) -> list[Result]:
    """Read the results in a run's folder, by suite. Raises ValueError as `read_result`."""
    return [read_result(path) for path in sorted((run / EVALUATIONS).glob(f"*/{RESULT}"))]


def model_name(model: str) -> str:
    """Return what others call a model: a folder's last part, or the hub id."""
    return Path(model).resolve().name if Path(model).exists() else model


def hub_id(name: str) -> str | None:
    """Return a model's or dataset's name if it is one of the hub and no file or folder here; else None."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from notus.data.sources import SUFFIXES

    if Path(name).expanduser().exists() or name.endswith(SUFFIXES):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def is_run(folder: Path) -> bool:
    """Return whether a folder is a training run's."""
    from notus.training.run_folder import CONFIG_FILE

    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def public_name(name: str) -> str:
    """Return a name without local folders: the hub id, or a path's last part; for a run's model, the run's name."""
    from notus.training.run_folder import MODEL

    if hub_id(name):
        return name
    path = Path(name).expanduser()
    return path.parent.name if path.name == MODEL and is_run(path.parent) else path.name


def result_folder(given: str | None, run: Path | None, model: str, suite: str) -> Path:
    """Return where a suite's results go: the folder that the user gave, the run's own, or one named for the model."""
    if given is not None:
        return Path(given)
    if run is not None:
        return run / EVALUATIONS / suite
    name = model.strip("/").replace("/", "__")
    if not name.strip("."):  # "." or "..", which a file of annotations may call its model, are no folder's name
        name = Path(model).resolve().name or "unnamed"
    return Path(EVALUATIONS) / name / suite


# What a file's name may end with. The suffix .json is also used for JSON Lines, and read as such.
FORMS = {
    "JSON Lines": (".jsonl", ".ndjson", ".json"),
    "JSON": (".json",),
    "HTML": (".html", ".htm"),
    "Markdown": (".md", ".markdown"),
}


def check_output(path: Path, *, form: str, not_over: str, remedy: str = "choose another place") -> None:
    """Make the parent folder of a result's file, before the work that fills it.

    Raises ValueError if the result would replace a folder, a device (for root, /dev/null itself would become a file) or
    the input `not_over`, or if the name says something else than the result's `form`, one of FORMS; OSError if nothing
    can be written there.
    """
    if path.is_dir():
        raise ValueError(f"{path}: there is a folder of that name; choose another")
    device = path.absolute().parent == Path("/dev")  # which has links to files, too
    if device or (path.exists() and not path.is_file()):
        raise ValueError(f"{path}: no ordinary file, which a result could replace; choose another name")
    if path.exists() and Path(not_over).exists() and path.samefile(not_over):
        raise ValueError(f"{path}: the result would replace the input; choose another name")
    if path.suffix.lower() not in FORMS[form]:
        suffixes = " or ".join(filter(None, [", ".join(FORMS[form][:-1]), FORMS[form][-1]]))
        raise ValueError(f"{path}: the result is {form}; choose a name that ends with {suffixes}")
    check_folder(path.parent, remedy=remedy)


def check_folder(folder: Path, *, remedy: str = "name another with --output") -> None:
    """Make a folder for results, before the work that fills it. Raises OSError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder}: no results can be written there ({error.strerror}); {remedy}") from error


def hold_folder(folder: Path) -> None:
    """Call `check_folder`, and lock the folder until this process ends.

    A second evaluation there would request and pay for the same work again. A file system without locks is used
    without one. Raises ValueError if another process holds the lock, OSError as `check_folder`.
    """
    check_folder(folder)
    place = folder.resolve()
    if place in _locks:  # opening and closing the file again would release the lock
        return
    file = check_regular(folder / LOCK).open("a")
    try:
        lock(file)
    except BlockingIOError as error:
        file.close()
        raise ValueError(
            f"{folder}: another evaluation is writing there; wait for its end, or name another with --output"
        ) from error
    except OSError:
        pass
    _locks[place] = file


def append_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines to a file and wait until they are on disk. Raises OSError, see `disk_error`."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _appending, check_regular(path).open("a+b") as file:
            with contextlib.suppress(OSError):  # on a file system without locks, one process writes at a time
                lock(file, wait=True)  # a line that another process is writing at this moment is not cut off
            _drop_partial_line(file.fileno())
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(path, error) from error


def _drop_partial_line(descriptor: int) -> None:
    """Cut a file off after its last newline: an append would else join a line that a killed process left."""
    end = os.fstat(descriptor).st_size
    block = 2**16
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        start = max(0, end - block)
        end = start + os.pread(descriptor, end - start, start).rfind(b"\n") + 1
    os.ftruncate(descriptor, end)


def read_records(
    path: Path,
    wrong: str = "not a record of finished work; remove the line, or the file",
    is_valid: Callable[[dict[str, Any]], bool] = lambda record: True,
) -> list[dict[str, Any]]:
    """Read the JSON objects of a file's complete lines; nothing if there is no file.

    A last line that was cut off, or is still being written, is left out. Raises ValueError, naming file and line and
    saying what is `wrong`, for any other line that is no JSON object or not `is_valid`.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not is_valid(record):
            raise ValueError(f"{path}, line {number}: {wrong}")
        records.append(record)
    return records


class KeptRecords:
    """Finished work by its key, in one JSONL file per rank of a folder that all ranks see.

    The same command, on any number of ranks, resumes where it stopped. Work on other keys may share the folder.
    """

    what: str  # a record, for error messages

    def __init__(self, folder: Path, identity: str) -> None:
        """`folder` is made if need be; `identity` says which weights these are, as `decoding.model_digest` does."""
        self.folder, self.identity = folder, identity

    def is_valid(self, record: dict[str, Any]) -> bool:
        """Return whether a record holds what `add` writes; a string under `key` is checked already."""
        raise NotImplementedError

    def find(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the records of `keys` that exist; collective within a process group.

        Raises ValueError, naming the file, if one in the folder holds anything else; or if the ranks, each of which
        makes its own keys, have different ones.
        """
        import torch.distributed as dist

        from notus.runtime.distributed import gather_objects, on_main

        if not dist.is_initialized():
            return self._read(set(keys))
        if len(set(gather_objects(hashlib.sha256("".join(keys).encode()).hexdigest()))) > 1:
            raise ValueError(
                "the ranks have different prompts or weights: their data or files differ, or a task draws its examples "
                "at random without a seed; run in one process"
            )
        return on_main(lambda: self._read(set(keys)))

    def _read(self, keys: Collection[str]) -> dict[str, dict[str, Any]]:
        def is_valid(record: dict[str, Any]) -> bool:
            return isinstance(record.get("key"), str) and self.is_valid(record)

        paths = sorted(self.folder.glob("rank-*.jsonl"))
        records = [read_records(path, f"not a kept {self.what}; remove the file", is_valid) for path in paths]
        return {record["key"]: record for of_rank in records for record in of_rank if record["key"] in keys}

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append this rank's records, each with its `key`. Raises OSError."""
        import torch.distributed as dist

        rank = dist.get_rank() if dist.is_initialized() else 0
        append_records(self.folder / f"rank-{rank}.jsonl", records)


def parse_files(files: str, folders: Sequence[Path], parse: Callable[[], T]) -> T:
    """Return what `parse` makes of `files`, which lie in each of `folders`.

    Raises ValueError, naming them, if `parse` fails: a file is damaged, or another version of Notus wrote it.
    """
    try:
        return parse()
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        where = ", ".join(str(folder / files) for folder in folders)
        raise ValueError(
            f"{where}: not as this version writes it ({type(error).__name__}: {error}); restore it, or move it away"
        ) from error
