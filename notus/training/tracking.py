"""What a run tells while it trains: progress on the terminal, `metrics.jsonl`, Weights & Biases, TensorBoard."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class MetricsFile:
    """One JSON object per line, each with `step`."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Open `path` for appending; lines after `resume_step` are from steps that will be taken again, and go."""
        kept = _lines_until(path, resume_step) if path.exists() else []
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Whole lines up to and including `step`; a line that a crash cut short ends the file."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] > step:
            break
        kept.append(line)
    return kept


class WandbSink:
    """A Weights & Biases run; offline unless a key is set."""

    def __init__(self, *, project: str, name: str | None, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        try:
            self._run = wandb.init(project=project, name=name, dir=folder, config=dict(config), mode=mode)  # type: ignore[arg-type]
        except wandb.errors.Error as error:
            raise ValueError(
                f"tracking.wandb: Weights & Biases refuses the run ({error}); WANDB_MODE=offline works"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """Event files under `OUTPUT_DIR/tensorboard`."""

    def __init__(self, folder: Path) -> None:
        """Open a writer.

        Raises:
            ValueError: the tensorboard package is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tracking.tensorboard=true needs the tensorboard package: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class ProgressBar:
    """A bar where there is a terminal, a line every few seconds where there is none."""

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
        print(f"step {step}/{self._total}  {told}  left {_clock(left)}", flush=True)

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

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of `step` (optimizer steps completed)."""
        for sink in self._sinks:
            sink.log(step, metrics)

    def state(self) -> dict[str, str]:
        """What a checkpoint keeps, so that the run goes on at its trackers."""
        return {}

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()
