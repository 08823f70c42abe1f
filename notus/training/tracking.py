"""What a run tells while it trains: progress on the terminal, `metrics.jsonl`, Weights & Biases, TensorBoard.

`metrics.jsonl` is the run's own record: where it cannot be written, the run ends. Weights & Biases and TensorBoard are
courtesies: where they fail, they are switched off with a warning, and training goes on.
"""

import contextlib
import functools
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from notus.data.disk import disk_error
from notus.entry import first_line, tell

METRICS_FILE = "metrics.jsonl"

# Seconds in which Weights & Biases must answer at the start, and have the last metrics at the end. Its own waits are
# 90 s and for ever; what it does not get in time stays in files beside the run.
WANDB_INIT_TIMEOUT = 30.0
WANDB_FINISH_TIMEOUT = 60.0


class Sink(Protocol):
    """Where lines of metrics go.

    Attributes:
        remedy: what the user is told where it fails and is switched off; None: its failure ends the run.
    """

    @property
    def remedy(self) -> str | None: ...
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class MetricsFile:
    """One JSON object per line, each with `step`."""

    remedy = None

    def __init__(self, path: Path, *, resume_step: int, last_logged: int = 0) -> None:
        """Open `path` for appending; lines after `resume_step` are from steps that will be taken again, and go.

        Warns if the line of the step `last_logged` is not there.

        Raises:
            ValueError: the file holds something else than metrics.
            OSError: the disk refuses; so do `log` and `sync`.
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

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, **metrics}).encode() + b"\n"
        try:
            while line:  # a disk that fills up takes a part first, and says why on the next attempt
                line = line[self._file.write(line) :]
        except OSError as error:
            raise disk_error(self._path, error) from error

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(self._path, error) from error

    def close(self) -> None:
        self._file.close()


def _lines_until(path: Path, step: int) -> list[bytes]:
    """Whole lines up to and including `step`; a last line that a crash cut short is left out."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        found = _step_of(line)
        if found is None and number < len(lines):
            raise ValueError(f"{path}, line {number}: not a line of metrics; restore the file, or move it away")
        if found is None or found > step:
            break
        kept.append(line)
    return kept


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics; None for anything else, and for a line without its end."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) and line.endswith(b"\n") else None
    return step if isinstance(step, int) else None


class WandbSink:
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
    def remedy(self) -> str:
        folder = self._run.settings.sync_dir
        return f"what it has got is in {folder}, and `wandb sync {folder}` uploads it"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """Event files under `OUTPUT_DIR/tensorboard`."""

    remedy = f"{METRICS_FILE} has every line"

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Open a writer; events after `resume_step` are from steps that will be taken again, and are hidden.

        Raises:
            ValueError: the tensorboard package is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tracking.tensorboard=true needs the tensorboard package: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # its thread writes: only then is it known whether the disk took them

    def close(self) -> None:
        self._writer.close()


class ProgressBar:
    """A bar where there is a terminal, a line every few seconds where there is none."""

    remedy = f"{METRICS_FILE} has every line"

    def __init__(
        self, *, total_steps: int, start_step: int, shown: Mapping[str, str], seconds_between: float = 5.0
    ) -> None:
        """`shown` maps a label to the metric that stands behind it."""
        self._shown = shown
        self._total, self._start, self._began = total_steps, start_step, time.monotonic()
        self._between, self._last = seconds_between, float("-inf")
        interactive = sys.stderr.isatty()
        self._bar = (
            tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True) if interactive else None
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        figures = {label: f"{metrics[key]:.4g}" for label, key in self._shown.items() if key in metrics}
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        evaluated = any(key.startswith("eval_") for key in metrics)
        if now - self._last < self._between and step != self._total and not evaluated:
            return
        self._last = now
        left = (now - self._began) / max(1, step - self._start) * (self._total - step)
        figures.update({key: f"{value:.4g}" for key, value in metrics.items() if key.startswith("eval_")})
        told = "  ".join(f"{label} {value}" for label, value in figures.items())
        tell(f"step {step}/{self._total}  {told}  left {_clock(left)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


class Tracker:
    """Hands each line of metrics to every sink. Rank 0 has the sinks; the others have none."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks
        self._off: list[Sink] = []
        runs = [sink.run_id for sink in sinks if isinstance(sink, WandbSink)]
        self._state = {"wandb": runs[0]} if runs else {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of `step` (optimizer steps completed)."""
        for sink in list(self._sinks):
            self._attempt(sink, lambda sink=sink: sink.log(step, metrics))  # type: ignore[misc]

    def state(self) -> dict[str, str]:
        """What a checkpoint keeps, so that a resumed run goes on in the same place: the W&B run's id."""
        return dict(self._state)

    def sync(self) -> None:
        """Wait until `metrics.jsonl` is on disk as far as it goes."""
        for sink in self._sinks:
            if isinstance(sink, MetricsFile):
                sink.sync()

    def _attempt(self, sink: Sink, work: Callable[[], None]) -> None:
        """A failure is the run's end, or with a `remedy` the sink's: training matters more than its trackers."""
        try:
            work()
        except Exception as error:
            if sink.remedy is None:
                raise
            self._sinks.remove(sink)
            self._off.append(sink)
            name = type(sink).__name__.removesuffix("Sink")
            tell(f"warning: {name} fails ({first_line(error)}) and is off for the rest; {sink.remedy}")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._off:  # their processes and files; that they fail was told
            with contextlib.suppress(Exception):
                sink.close()
        for sink in list(self._sinks):
            self._attempt(sink, sink.close)
