"""Where a run's metrics and samples go: its own files, the terminal, Weights & Biases, TensorBoard.

`metrics.jsonl` is the run's own record: if it cannot be written, the run ends. Every other logger is a courtesy: if it
fails, it is switched off with a warning, and training continues.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import inspect
import json
import os
import platform
import secrets
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from notus.config import Config, to_yaml
from notus.runtime.distributed import gather_objects, world_size
from notus.runtime.files import check_regular, disk_error, replacing, write_text
from notus.runtime.process import first_line, tell
from notus.runtime.switches import disabled_names
from notus.training.checkpoint import Progress
from notus.training.run_data import DATA_FILE
from notus.training.sampling import Sample

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
INITIAL_FILE = "initial_evaluation.json"
ENVIRONMENT_FILE = "environment.json"
# What the terminal shows of a step, and of an evaluation, in this order: a label for each metric that there is.
SHOWN = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "tau": "rewards/kendall_tau",
    "kl": "kl",
    "pairs/s": "pairs_per_second",
    "examples/s": "examples_per_second",
}
SHOWN_OF_EVALUATION = {
    "loss": "loss",
    "tau": "rewards/kendall_tau",
    "top-1": "rewards/top_1",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "kl": "kl",
    "chosen reward": "rewards/chosen",
    "rejected reward": "rewards/rejected",
}
_MOST_SHOWN = 6  # of an evaluation; metrics.jsonl has all
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


class Logger:
    """One place that metrics and samples go to; a subclass takes what it has a use for.

    Attributes:
        remedy: what the warning says if the logger fails and is switched off; None: its failure ends the run.
    """

    remedy: str | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a line of metrics."""

    def log_initial(self, metrics: Mapping[str, float]) -> None:
        """Take the evaluation before the first step. It is no line of metrics, for there was no step."""

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Take what the model generates after `step` steps."""

    def saved(self, step: int, path: Path) -> None:
        """Take note that the checkpoint of `step` is on disk, in the folder `path`."""

    def sync(self, step: int) -> None:
        """Put everything on disk, before the checkpoint of `step`."""

    def state(self) -> dict[str, str]:
        """Return what a resumed run needs to continue in the same place."""
        return {}

    def close(self) -> None:
        """Finish."""


class StepLines:
    """One JSON object per line, each with `step`, in the order of the steps."""

    def __init__(self, path: Path, *, resume_step: int, last_logged: int = 0) -> None:
        """Open `path` for appending; lines after `resume_step` are from steps that will be taken again, and go.

        Warns if the line of the step `last_logged` is not there.

        Raises:
            ValueError: the file holds something else than such lines.
            OSError: the file cannot be written; `append` and `sync` raise it, too.
        """
        self._path = path
        kept = _lines_until(path, resume_step) if path.exists() else []
        if last_logged and not (kept and _step_of(kept[-1]) == last_logged):
            tell(f"warning: {path} has lost lines: step {last_logged} was logged, and is not there")
        with replacing(path, locked=True) as temporary:
            temporary.write_bytes(b"".join(kept))
        try:
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
    lines = check_regular(path).read_bytes().splitlines(keepends=True)
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


class MetricsFile(Logger):
    """One JSON object per line of metrics."""

    def __init__(self, path: Path, *, resume_step: int, last_logged: int = 0) -> None:
        """See `StepLines`."""
        self._lines = StepLines(path, resume_step=resume_step, last_logged=last_logged)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._lines.append([{"step": step, **metrics}])

    def sync(self, step: int) -> None:
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


class InitialFile(Logger):
    """`initial_evaluation.json`: the evaluation before the first step."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log_initial(self, metrics: Mapping[str, float]) -> None:
        write_text(self._path, json.dumps({"step": 0, **metrics}) + "\n", locked=True)


class SamplesFile(Logger):
    """One JSON object per sample."""

    remedy = "samples are not kept from here on"

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """See `StepLines`."""
        self._lines = StepLines(path, resume_step=resume_step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._lines.append({"step": step, **dataclasses.asdict(sample)} for sample in samples)

    def sync(self, step: int) -> None:
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


class Eta:
    """Estimates how long the rest of a run takes, from the intervals between its lines of metrics.

    A plain mean since the launch would be wrong in three ways. The first interval holds compilation, warm-up and the
    evaluation before the first step, so it is dropped as soon as there is another one. Steps and evaluations are timed
    apart, because an evaluation may take as long as a hundred steps, and the rest of the run may hold more or fewer of
    them than the part that is done. Only the latest intervals of this launch count, so that the estimate is right after
    a resume on another machine, and follows a machine that becomes slower.
    """

    def __init__(self, *, total_steps: int, step: int, eval_every: int | None, now: float) -> None:
        """Begin after `step`, at the time `now` in seconds; `eval_every`: None if only the last step is evaluated."""
        self._total, self._every = total_steps, eval_every
        self._step, self._time, self._count = step, now, 0
        # (steps, seconds) of intervals without and with an evaluation
        self._plain: deque[tuple[int, float]] = deque(maxlen=50)
        self._evaluated: deque[tuple[int, float]] = deque(maxlen=5)

    def update(self, step: int, now: float, *, evaluated: bool) -> float | None:
        """Take the line of `step`, written at `now`; returns the seconds to the end, None before it can be known."""
        if self._count == 1:
            self._plain.clear()
            self._evaluated.clear()
        (self._evaluated if evaluated else self._plain).append((step - self._step, now - self._time))
        self._step, self._time, self._count = step, now, self._count + 1
        steps, seconds = (sum(column) for column in zip(*(self._plain or self._evaluated), strict=True))
        if not steps:
            return None
        per_step = seconds / steps
        # with nothing but evaluations so far, a step's time has its share of them
        extra = [max(0.0, took - count * per_step) for count, took in self._evaluated] if self._plain else []
        per_evaluation = sum(extra) / len(extra) if extra else 0.0
        return (self._total - step) * per_step + self._evaluations_after(step) * per_evaluation

    def _evaluations_after(self, step: int) -> int:
        """How many steps after `step` are evaluated: every so many, and the last."""
        if step >= self._total:
            return 0
        if self._every is None:
            return 1
        return self._total // self._every - step // self._every + bool(self._total % self._every)


class ProgressBar(Logger):
    """A bar where there is a terminal, a line every few seconds where there is none; a line for each evaluation."""

    remedy = f"{METRICS_FILE} has every line"

    def __init__(
        self, *, total_steps: int, start_step: int, eval_every: int | None = None, seconds_between: float = 5.0
    ) -> None:
        self._total = total_steps
        self._eta = Eta(total_steps=total_steps, step=start_step, eval_every=eval_every, now=time.monotonic())
        self._between, self._last = seconds_between, float("-inf")
        # tqdm's own estimate is a mean since the launch
        layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"
        interactive = sys.stderr.isatty()
        self._bar = (
            tqdm(total=total_steps, initial=start_step, dynamic_ncols=True, bar_format=layout) if interactive else None
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        left = self._eta.update(step, now, evaluated=any(key.startswith("eval_") for key in metrics))
        shown = _figures(SHOWN, metrics)
        if left is not None and step < self._total:
            shown += f"  ETA {_clock(left)}"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._last >= self._between or step == self._total:
            self._last = now
            tell(f"step {step}/{self._total}  {shown}")
        self._show_evaluation(step, metrics)

    def _show_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print a line of what was measured on held-out rows, if anything was: above the bar if there is one."""
        held_out = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
        if not held_out:
            return
        line = f"evaluation at step {step}: {_figures(SHOWN_OF_EVALUATION, held_out, most=_MOST_SHOWN)}"
        if self._bar is None:
            tell(line)
        else:
            with self._bar.external_write_mode():
                tell(line)

    def log_initial(self, metrics: Mapping[str, float]) -> None:
        self._show_evaluation(0, metrics)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _figures(labels: Mapping[str, str], metrics: Mapping[str, float], most: int | None = None) -> str:
    """The metrics that `labels` names, in that order, at most so many."""
    found = [f"{label} {metrics[key]:.4g}" for label, key in labels.items() if key in metrics]
    return "  ".join(found[:most])


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def hardware(device: torch.device) -> str:
    """The job's devices, such as "8 x NVIDIA A100-SXM4-40GB" or "CPU, 16 cores"; collective."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    found = Counter(gather_objects(name))
    if device.type != "cuda":
        return ", ".join(found)
    return ", ".join(f"{count} x {each}" for each, count in found.items())


class EnvironmentFile(Logger):
    """`environment.json`: hardware, versions, and each launch: its seconds, and what `NOTUS_DISABLE` switched off."""

    remedy = f"{ENVIRONMENT_FILE} is not kept from here on"

    def __init__(self, path: Path, *, step: int, hardware: str) -> None:
        """Begin a launch that continues after `step`; at 0, earlier launches left nothing and are forgotten."""
        self._path, self._began = path, time.monotonic()
        self._earlier = _launches(path) if step else []
        self._launch: dict[str, Any] = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            "from_step": step,
            "disabled": sorted(disabled_names()),
            "seconds": 0.0,
            "to_step": step,
        }
        versions = {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        }
        self._facts = {"hardware": hardware, "world_size": world_size(), "versions": versions}
        self._write()

    def sync(self, step: int) -> None:
        self._launch["to_step"] = step
        self._write()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        self._launch["seconds"] = time.monotonic() - self._began
        launches = [*self._earlier, self._launch]
        total = sum(launch["seconds"] for launch in launches)
        write_text(
            self._path,
            json.dumps({**self._facts, "launches": launches, "seconds": total}, indent=1) + "\n",
            locked=True,
        )


def _launches(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        launches = list(json.loads(check_regular(path).read_text(encoding="utf-8"))["launches"])
        sum(launch["seconds"] for launch in launches)
    except (OSError, ValueError, KeyError, TypeError):
        tell(f"warning: {path} is damaged: the earlier launches are not listed")
        return []
    return launches


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


def _has_wandb_key() -> bool:
    """Whether a key of Weights & Biases, or a token, is set or stored; asks neither the user nor the server."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    if "prompt" in inspect.signature(wandb.login).parameters:  # since 0.31, where `wandb.api` warns that it will go
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)


class WandbLogger(Logger):
    """A Weights & Biases run; offline unless a key is set and the server answers.

    Attributes:
        run_id: by which a later process resumes the same run.
    """

    def __init__(
        self, *, project: str, name: str | None, folder: Path, config: Mapping[str, Any], run_id: str | None = None
    ) -> None:
        """Start a run, or resume `run_id`; where the server cannot be reached, offline, with a warning.

        Raises:
            ValueError: Weights & Biases rejects the settings or the key.
        """
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
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
                    f"tracking.wandb: Weights & Biases rejects the run ({first_line(error)}); WANDB_MODE=offline or "
                    "tracking.wandb=false trains without it"
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

    def log_initial(self, metrics: Mapping[str, float]) -> None:
        self.log(0, metrics)

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


class TensorBoardLogger(Logger):
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
        earlier = list((folder / "tensorboard").glob("events.out.tfevents.*"))
        for path in earlier:
            _forget_after(path, resume_step)
        _wait_for_later_name(earlier)
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        for title, text in texts.items():
            self._writer.add_text(title, _verbatim(text), resume_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in grouped(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # its thread writes: only then is it known whether the disk took them

    def log_initial(self, metrics: Mapping[str, float]) -> None:
        self.log(0, metrics)

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


def _wait_for_later_name(earlier: Sequence[Path]) -> None:
    """Wait until a new file of events comes last by name, the order in which TensorBoard reads them.

    Names have the second of their beginning, then the host, the process and a counter, of which 10 comes before 9.
    """
    seconds = {path.name.split(".")[3] for path in earlier}
    while f"{int(time.time()):010d}" in seconds:
        time.sleep(0.01)


def _forget_after(path: Path, step: int) -> None:
    """Drop later steps from a file of events. TensorBoard's own purge would keep texts and only hide scalars."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    events = [(raw, Event.FromString(raw)) for raw in RawEventFileLoader(str(path)).Load()]
    with replacing(path, locked=True) as temporary, temporary.open("wb") as file:
        records = RecordWriter(file)
        for raw, event in events:
            if event.step <= step or event.HasField("file_version"):
                records.write(raw)


def _verbatim(text: str) -> str:
    """Markdown that shows a string as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class Tracker:
    """Hands what a run reports to every logger. Rank 0 has the loggers; the others have none."""

    def __init__(self, loggers: list[Logger]) -> None:
        self._loggers = loggers
        self._failed: list[Logger] = []
        self._state = {name: value for logger in loggers for name, value in logger.state().items()}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of `step` (optimizer steps completed)."""
        self._each(lambda logger: logger.log(step, metrics))

    def log_initial(self, metrics: Mapping[str, float]) -> None:
        """Record the evaluation before the first step."""
        self._each(lambda logger: logger.log_initial(metrics))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record what the model generates after `step` steps."""
        if samples:
            self._each(lambda logger: logger.log_samples(step, samples))

    def saved(self, step: int, path: Path) -> None:
        """Report that the checkpoint of `step` is on disk."""
        self._each(lambda logger: logger.saved(step, path))

    def state(self) -> dict[str, str]:
        """Return what a checkpoint keeps, so that a resumed run continues in the same place: the W&B run's id."""
        return dict(self._state)

    def sync(self, step: int) -> None:
        """Wait until everything that was logged up to `step` is on disk."""
        self._each(lambda logger: logger.sync(step))

    def _each(self, work: Callable[[Logger], None]) -> None:
        """A failure ends the run, or, if the logger has a `remedy`, only switches that logger off."""
        for logger in list(self._loggers):
            try:
                work(logger)
            except Exception as error:
                if logger.remedy is None:
                    raise
                self._loggers.remove(logger)
                self._failed.append(logger)
                name = type(logger).__name__.removesuffix("Logger")
                tell(f"warning: {name} fails ({first_line(error)}) and is off for the rest; {logger.remedy}")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for logger in self._failed:  # they still hold processes and files; that they failed was reported
            with contextlib.suppress(Exception):
                logger.close()
        self._each(lambda logger: logger.close())


def open_tracker(
    folder: Path,
    config: Config,
    progress: Progress,
    *,
    total_steps: int,
    hardware: str,
    data: Mapping[str, Any],
    files: Mapping[str, Any] | None = None,
    more: Sequence[Logger] = (),
) -> Tracker:
    """Open every logger that the config asks for, continuing after `progress`; writes `data.json`. For rank 0.

    Args:
        folder: the run's.
        config: the run's settings.
        progress: what the run resumes from.
        total_steps: of the whole run.
        hardware: the job's devices.
        data: the content of `data.json`.
        files: what stands there beside it, and is sent nowhere: the stamps of the files that the rows are from.
        more: further loggers, which get everything last.

    Raises:
        ValueError: a file is damaged, or a service rejects the run.
        OSError: a file cannot be written.
    """
    tracking, step = config.tracking, progress.step
    recorded = step if progress.recorded else step - 1
    kept = recorded if step else -1  # at step 0 the model is sampled, once
    loggers: list[Logger] = [
        MetricsFile(folder / METRICS_FILE, resume_step=kept, last_logged=progress.logged),
        InitialFile(folder / INITIAL_FILE),
        ProgressBar(total_steps=total_steps, start_step=step, eval_every=config.training.eval_every),
        EnvironmentFile(folder / ENVIRONMENT_FILE, step=step, hardware=hardware),
    ]
    if tracking.samples or (folder / SAMPLES_FILE).exists():
        loggers.append(SamplesFile(folder / SAMPLES_FILE, resume_step=kept))
    write_text(folder / DATA_FILE, json.dumps({**data, **({"files": files} if files else {})}) + "\n", locked=True)
    if tracking.wandb:
        loggers.append(
            WandbLogger(
                project=tracking.project,
                name=tracking.run_name or folder.name,
                folder=folder,
                config={**dataclasses.asdict(config), "data_summary": data},
                run_id=progress.trackers.get("wandb"),
            )
        )
    if tracking.tensorboard:
        texts = {"config": to_yaml(config), "data": json.dumps(data, indent=1)}
        loggers.append(TensorBoardLogger(folder, resume_step=kept, texts=texts))
    return Tracker([*loggers, *more])
