"""What a run's folder says about its model, and what of that others may read: no path of this machine."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import try_to_load_from_cache

from notus.evaluation.names import hub_id
from notus.evaluation.results import Result, read_results
from notus.training.checkpoint import checkpoints_in, step_of
from notus.training.inputs import DATA_FILE
from notus.training.loggers import ENVIRONMENT_FILE, METRICS_FILE
from notus.training.run_folder import CHECKPOINTS, CONFIG_FILE, MODEL

Variant = Literal["full", "adapter", "merged"]
Settings = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Facts:
    """A run, as far as its folder tells.

    Attributes:
        folder: the run's.
        settings: its resolved config, by section.
        step: of an unfinished run, the step of the checkpoint that stands for it; None: it is finished.
        metrics: the lines of `metrics.jsonl`, up to that step.
        data, environment: what the run noted of its data and machine; None where it noted nothing.
        results: its evaluations, by suite.
    """

    folder: Path
    settings: Settings
    step: int | None
    metrics: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any] | None
    environment: Mapping[str, Any] | None
    results: Sequence[Result]

    @property
    def task(self) -> Literal["dpo", "sft"]:
        """What was trained; only DPO's config has a section of that name."""
        return "dpo" if "dpo" in self.settings else "sft"

    @property
    def base(self) -> str:
        """The model that the run started from, as its config names it."""
        return str(self.settings["model"]["name_or_path"])

    def at(self, step: int | None) -> "Facts":
        """The same of the model after `step`; None: of the finished one."""
        metrics = [line for line in self.metrics if step is None or line["step"] <= step]
        return dataclasses.replace(self, step=step, metrics=metrics)


def read_facts(run: Path, settings: Settings) -> Facts:
    """Read a run's folder, as if it were finished. Raises ValueError, naming the file, for one that is damaged."""
    return Facts(
        folder=run,
        settings=settings,
        step=None,
        metrics=_read_metrics(run / METRICS_FILE),
        data=_read_noted(run / DATA_FILE),
        environment=_read_noted(run / ENVIRONMENT_FILE),
        results=read_results(run),
    )


def variant_of(*, lora: bool, merge: bool) -> Variant:
    """Which of the three a run's export is."""
    return ("merged" if merge else "adapter") if lora else "full"


def standing_step(run: Path) -> int | None:
    """None for a finished run; else the step of its newest checkpoint. Raises ValueError where there is none."""
    if (run / MODEL).is_dir():
        return None
    checkpoints = checkpoints_in(run / CHECKPOINTS)
    if not checkpoints:
        raise ValueError(f"{run}: the run has not finished and has no checkpoint yet; train it first")
    return step_of(checkpoints[0])


def run_digest(run: Path) -> str:
    """By which a run is known again: of its config, and when it first began; who trains anew makes another model."""
    launches = (_read_noted(run / ENVIRONMENT_FILE) or {}).get("launches") or [{}]
    began = str(launches[0].get("started", ""))
    return hashlib.sha256((run / CONFIG_FILE).read_bytes() + began.encode()).hexdigest()


def base_file(base: str, name: str) -> Path | None:
    """A file of the base model, if it is on this machine; nothing is downloaded."""
    if hub_id(base) is None:
        path = Path(base).expanduser() / name
        return path if path.is_file() else None
    cached = try_to_load_from_cache(base, name)
    return Path(cached) if isinstance(cached, str) else None


def base_licence(base: str) -> dict[str, str]:
    """`license`, and `license_name` and `license_link` if it has them, as the base model's own card states.

    Empty where there is no card, or none in it. Raises ValueError, naming the card, if it cannot be read.
    """
    path = base_file(base, "README.md")
    if path is None:
        return {}
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        stated = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: its metadata is no YAML; correct it, or state the licence with --license") from error
    if not isinstance(stated, dict) or not isinstance(stated.get("license"), str):
        return {}
    return {
        key: " ".join(str(stated[key]).split())
        for key in ("license", "license_name", "license_link")
        if stated.get(key)
    }


def private_paths(run: Path, settings: Settings) -> list[str]:
    """Places on this machine that a run names, and the user's home: what no published file may hold."""
    sources = [*settings["data"]["train"], *(settings["data"]["eval"] or [])]
    names = [str(run), settings["model"]["name_or_path"], *(source["path"] for source in sources)]
    paths = [Path(name).expanduser() for name in [*names, *_other_files(settings)] if hub_id(name) is None]
    found = {str(place) for path in paths for place in (path.absolute(), path.resolve())}  # as written, and its target
    return sorted(path for path in {*found, str(Path.home())} if path != "/")


def _other_files(settings: Settings) -> list[str]:
    """Folders and files that a run's settings name besides model and data."""
    keys = (("data", "cache_dir"), ("training", "output_dir"), ("reference", "cache_dir"))
    template = settings["data"].get("chat_template")
    given = [settings.get(section, {}).get(key) for section, key in keys]
    return [str(name) for name in [*given, template if str(template).endswith(".jinja") else None] if name]


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines; a run that goes on may be writing the last one."""
    if not path.is_file():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            record = dict(json.loads(line))
            lines.append({**record, "step": int(record["step"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a line of metrics; restore the file") from error
    return lines


def _read_noted(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not what a run notes there ({error}); restore the file, or remove it") from error
