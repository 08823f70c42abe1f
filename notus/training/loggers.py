"""Weights & Biases and TensorBoard: metrics in groups, what stands before the first step, and samples."""

import contextlib
import dataclasses
import functools
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
