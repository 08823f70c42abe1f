"""Weights & Biases and TensorBoard: metrics in groups, what stands before the first step, and samples."""

import contextlib
import dataclasses
import functools
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from notus.runtime.files import disk_error
from notus.runtime.process import first_line, tell
from notus.training.sampling import Sample
from notus.training.tracking import METRICS_FILE, SAMPLES_FILE, Sink

# Seconds in which Weights & Biases must answer at the start, and have the last metrics at the end. Its own waits are
# 90 s and for ever; what it does not get in time stays in files beside the run.
WANDB_INIT_TIMEOUT = 30.0
WANDB_FINISH_TIMEOUT = 60.0


def grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics as dashboards show them: under `train/`, `eval/` and `system/`."""
    return {_grouped(name): value for name, value in metrics.items()}


def _grouped(name: str) -> str:
    if name.startswith("system/"):
        return name
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


class WandbSink(Sink):
    """A Weights & Biases run; offline unless a key is set and the server answers.

    Attributes:
        run_id: by which a later process goes on with the same run.
    """

    def __init__(
        self, *, project: str, name: str | None, folder: Path, config: Mapping[str, Any], run_id: str | None = None
    ) -> None:
        """Start a run, or go on with `run_id`; where the server cannot be reached, offline, with a warning.

        Raises:
            ValueError: the settings or the key are refused.
        """
        import wandb

        has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        self._folder = folder
        self.run_id = run_id or secrets.token_hex(4)
        begin: Callable[..., Any] = functools.partial(
            wandb.init, project=project, name=name, dir=folder, config=dict(config), id=self.run_id,
            settings=wandb.Settings(
                init_timeout=WANDB_INIT_TIMEOUT, finish_timeout=WANDB_FINISH_TIMEOUT, finish_timeout_raises=True
            ),
        )  # fmt: skip
        try:
            # Offline there is nothing to look up: what is there of the run is added to when the files are uploaded.
            self._run = begin(mode=mode, resume="allow" if run_id and mode == "online" else None)
        except Exception as error:  # of many kinds: time-outs, what a proxy answers in its place, a service that dies
            if mode != "online" or isinstance(error, (wandb.errors.UsageError, wandb.errors.AuthenticationError)):
                raise ValueError(
                    f"tracking.wandb: Weights & Biases refuses the run ({first_line(error)}); WANDB_MODE=offline or "
                    "tracking.wandb=false goes on without it"
                ) from error
            tell(f"warning: Weights & Biases is out of reach ({first_line(error)}): the run is kept offline")
            wandb.teardown()  # or the id would count as taken
            self._run = begin(mode="offline")

    @property
    def remedy(self) -> str:  # type: ignore[override]
        folder = self._run.settings.sync_dir
        return f"what it has got is in {folder}, and `wandb sync {folder}` uploads it"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(grouped(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        import wandb

        rows = [[step, *dataclasses.astuple(sample)] for sample in samples]
        table = wandb.Table(columns=["step", *(field.name for field in dataclasses.fields(Sample))], data=rows)
        with self._staged():
            self._run.log({"samples": table}, step=step)

    @contextlib.contextmanager
    def _staged(self) -> Iterator[None]:
        """Keep a copy of each table, which goes to the server, with the run: the home folder may be another's then."""
        kept = os.environ.get("WANDB_DATA_DIR")
        os.environ["WANDB_DATA_DIR"] = kept or str(self._folder.absolute() / "wandb")
        try:
            yield
        finally:
            del os.environ["WANDB_DATA_DIR"]
            if kept is not None:
                os.environ["WANDB_DATA_DIR"] = kept

    def state(self) -> dict[str, str]:
        return {"wandb": self.run_id}

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink(Sink):
    """Event files under `OUTPUT_DIR/tensorboard`."""

    remedy = f"{METRICS_FILE} and {SAMPLES_FILE} have everything"

    def __init__(self, folder: Path, *, resume_step: int, texts: Mapping[str, str]) -> None:
        """Open a writer; events after `resume_step` are from steps that will be taken again, and go.

        Args:
            folder: the run's.
            resume_step: -1 for a run that begins.
            texts: what is shown from then on, verbatim, by title.

        Raises:
            ValueError: the tensorboard package is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tracking.tensorboard=true needs the tensorboard package: pip install tensorboard"
            ) from error
        for path in (folder / "tensorboard").glob("events.out.tfevents.*"):
            _forget_after(path, resume_step)
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        for title, text in texts.items():
            self._writer.add_text(title, _verbatim(text), resume_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in grouped(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # its thread writes: only then is it known whether the disk took them

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        parts = [
            f"**{sample.index}: {name}**\n\n{_verbatim(text)}"
            for sample in samples
            for name, text in (("prompt", sample.prompt), ("completion", sample.completion))
        ]
        self._writer.add_text("samples", "\n\n".join(parts), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop later steps from a file of events. TensorBoard's own purge would leave texts and hide scalars alone."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    events = [(raw, Event.FromString(raw)) for raw in RawEventFileLoader(str(path)).Load()]
    partial = path.with_name(".partial")
    with partial.open("wb") as file:
        records = RecordWriter(file)
        for raw, event in events:
            if event.step <= step or event.HasField("file_version"):
                records.write(raw)
    os.replace(partial, path)


def _verbatim(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


# DOC notus/training/loggers.py: """A file of JSON lines, each of a step, that a resumed run goes on with."""


class StepLines:
    """One JSON object per line, each with `step`, in the order of the steps."""

    def __init__(self, path: Path, *, resume_step: int, last_logged: int = 0) -> None:
        """Open `path` for appending; lines after `resume_step` are from steps that will be taken again, and go.

        Warns if the line of the step `last_logged` is not there.

        Raises:
            ValueError: the file holds something else than such lines.
            OSError: the disk refuses; so do `append` and `sync`.
        """
        self._path = path
        kept = _lines_until(path, resume_step) if path.exists() else []
        if last_logged and not (kept and _step_of(kept[-1]) == last_logged):
            tell(f"warning: {path} has lost lines: step {last_logged} was logged, and is not there")
        temporary = path.with_suffix(".partial")
        try:
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise disk_error(path, error) from error

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write one line per record."""
        text = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        try:
            while text:  # a disk that fills up takes a part first, and says why on the next attempt
                text = text[self._file.write(text) :]
        except OSError as error:
            raise disk_error(self._path, error) from error

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(self._path, error) from error

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


def _lines_until(path: Path, step: int) -> list[bytes]:
    """Whole lines up to and including `step`; a last line that a crash cut short is left out."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        found = _step_of(line)
        if found is None and number < len(lines):
            raise ValueError(f"{path}, line {number}: not a line of {path.stem}; restore the file, or move it away")
        if found is None or found > step:
            break
        kept.append(line)
    return kept


def _step_of(line: bytes) -> int | None:
    """The step of a line; None for anything else, and for a line without its end."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) and line.endswith(b"\n") else None
    return step if isinstance(step, int) else None
