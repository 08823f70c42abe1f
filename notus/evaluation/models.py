"""What MODEL_OR_RUN stands for: a model, an adapter on its base, or a run's result, with its settings.

A run in progress stands for its newest whole checkpoint, which is written out once, into the run's `snapshots/`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from notus.evaluation.unfinished import snapshot
from notus.model.adapter import ADAPTER_CONFIG, read_adapter_settings
from notus.model.load import find_folder, resolve_model_folder
from notus.runtime.distributed import on_main
from notus.training.run_folder import CONFIG_FILE, MODEL


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model's weights are.

    Attributes:
        name: as the user wrote it; of a run in progress with the step, as "runs/dpo (step 100)".
        folder: a model's folder, or an adapter's.
        base: of an adapter, the model that it adapts, as its config names it; None for a full model.
        settings: a run's settings by section; empty for anything but a run.
        run: a run's folder; None for anything but a run.
    """

    name: str
    folder: Path
    base: str | None = None
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    run: Path | None = None

    def choose(self, given: Any, key: str, default: Any) -> Any:
        """What the user gave; else what the run's setting `section.name` says; else `default`."""
        if given is not None:
            return given
        section, name = key.split(".")
        value = self.settings.get(section, {}).get(name)
        return default if value is None else value


def find_source(name: str, *, trust_remote_code: bool = False) -> ModelSource:
    """Find a model, an adapter or a run; for one process, see `find_together`.

    Args:
        name: a folder or a hub id.
        trust_remote_code: run code that comes with the base model, where a checkpoint is written out.

    Raises:
        ValueError: naming the folder, if it is none of them, or a run without a whole checkpoint.
        OSError: the disk refuses the checkpoint's copy.
    """
    folder = find_folder(name)
    if not is_run(folder):
        return _source(name, folder)
    settings, run = read_run_settings(folder), folder
    if (run / MODEL).is_dir():
        return _source(name, run / MODEL, settings, run)
    step, folder = snapshot(run, settings, trust_remote_code=trust_remote_code)
    return _source(f"{name} (step {step})", folder, settings, run)


def find_together(name: str, *, trust_remote_code: bool = False) -> ModelSource:
    """`find_source` within a process group; collective. Every rank gets what rank 0 found, though a run may go on.

    Raises ValueError and OSError as that; also where rank 0 sees a run's checkpoint, and this rank does not.
    """
    source = on_main(lambda: find_source(name, trust_remote_code=trust_remote_code))
    if source.folder.is_dir():
        return source
    if source.run:
        raise ValueError(f"{source.folder}: the first rank sees it, this one does not; use a disk that all share")
    return find_source(name, trust_remote_code=trust_remote_code)  # of the hub: each machine has it in its own cache


def _source(
    name: str, folder: Path, settings: Mapping[str, Mapping[str, Any]] | None = None, run: Path | None = None
) -> ModelSource:
    base = None
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_adapter_settings(folder)["base_model_name_or_path"]
    return ModelSource(name, folder if base else resolve_model_folder(folder), base, settings or {}, run)


def is_run(folder: Path) -> bool:
    """Whether a folder is a training run's."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def read_run_settings(run: Path) -> dict[str, dict[str, Any]]:
    """A run's resolved settings, by section. Raises ValueError, naming the file, if they cannot be read."""
    path = run / CONFIG_FILE
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as YAML ({error}); restore the file") from error
    if not _are_settings(settings):
        raise ValueError(f"{path}: not the settings of a run; restore the file, or name the model's own folder")
    return settings


def _are_settings(tree: Any) -> bool:
    """Whether it has what every run's settings have; other programs write a config.yaml, too."""
    if not isinstance(tree, dict) or not all(isinstance(section, dict) for section in tree.values()):
        return False
    model, data, training, lora = (tree.get(name, {}) for name in ("model", "data", "training", "lora"))
    sources = data.get("train")
    named = isinstance(model.get("name_or_path"), str) and isinstance(sources, list)
    return named and {"precision", "seed"} <= training.keys() and {"chat_template"} <= data.keys() and "rank" in lora
