"""What stands in a run's folder before the run begins there: files of others are neither replaced nor moved.

A run replaces files by their names, so each name that it writes must be free, or hold what a run wrote. A folder with a
run's own `config.yaml` was checked when that was written.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from notus.config import DPO_SECTIONS, SECTIONS, Config, dump_yaml
from notus.data.sources import is_hub_id, parts
from notus.runtime.files import check_regular
from notus.training.run_data import DATA_FILE
from notus.training.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    INPUTS,
    INPUTS_DIGESTS,
    MODEL,
    TENSORBOARD,
    WRITTEN,
    check_room_for_model,
    is_finished,
    resume_of,
)
from notus.training.tracking import ENVIRONMENT_FILE, INITIAL_FILE, METRICS_FILE, SAMPLES_FILE

_MOST_BYTES = 2**28  # of a file of a run's that is one JSON object; no run writes a larger one
_MODEL_CONFIGS = ("config.json", "adapter_config.json")


def check_folder(config: Config, *, written: Collection[Path] = ()) -> None:
    """Make sure that the run of `config` replaces and moves nothing but a run's files. For rank 0; writes nothing.

    Args:
        config: the run's.
        written: where in the run's `inputs` rows or a model of a program's memory will be written.

    Raises:
        ValueError: naming the file or folder that is in the way, or the key of an input that lies there.
    """
    folder, anew = Path(config.training.output_dir), resume_of(config) == "never"
    saved = any((folder / CHECKPOINTS).glob("*step-*"))
    trained = saved or _has_trained(folder / METRICS_FILE)
    if anew or not trained:  # what a run has trained with lies well where it is
        _check_inputs(config, folder)
    if anew:
        _check_found(config, written)
    if not folder.is_dir():
        return  # whoever makes it says what is wrong
    known = trained or is_own_config(folder / CONFIG_FILE)
    if not known:
        _check_new(config, folder)
    if not saved and not (known and is_finished(folder)):
        _check_files(folder)
    if written and not (folder / INPUTS / INPUTS_DIGESTS).is_file():
        _check_empty(folder / INPUTS, folder)


def _check_new(config: Config, folder: Path) -> None:
    """Raise ValueError for what keeps a first run out of a folder."""
    path = folder / CONFIG_FILE
    if not _is_free(path):
        raise ValueError(
            f"{path} was not written by a run, and a run with training.output_dir={folder} would replace it: choose "
            "another training.output_dir, or give that file another name"
        )
    if found := next((name for name in _MODEL_CONFIGS if (folder / name).is_file()), None):
        raise ValueError(
            f"training.output_dir={folder} holds a model ({found}), which would be mistaken for the run's own: choose "
            "another training.output_dir"
        )
    check_room_for_model(folder / MODEL)
    _check_empty(folder / CHECKPOINTS, folder)
    if config.tracking.tensorboard:
        _check_empty(folder / TENSORBOARD, folder)


def _check_empty(path: Path, folder: Path) -> None:
    """Raise ValueError if there is anything in `path`, which is to be a folder of the run, but for hidden files."""
    if any(not each.name.startswith(".") for each in _entries(path)):
        raise ValueError(_in_the_way(path, folder))


def _entries(path: Path) -> list[Path]:
    """What a folder holds; a file in its place stands for itself."""
    if path.is_dir():
        return list(path.iterdir())
    return [path] if os.path.lexists(path) else []


def _in_the_way(path: Path, folder: Path) -> str:
    return (
        f"{path} was not written by a run, and a run with training.output_dir={folder} writes its own there: choose "
        "another training.output_dir, or move it away"
    )


# ---- inputs ----


def _check_inputs(config: Config, folder: Path) -> None:
    """Raise ValueError for an input that lies where the run writes, by its name or by a link.

    `inputs` is no such place: what lies there is data, which `training.resume=never` leaves there if the run reads it.
    """
    own = [name for name in WRITTEN if name != INPUTS]
    for key, name in named_inputs(config):
        if not name.exists():
            continue
        if name.is_dir() and name.resolve() == folder.resolve():
            raise ValueError(
                f"{key}={name} is also training.output_dir, and the run's files would mix with its own: choose another "
                "training.output_dir"
            )
        for each in own:
            if _is_within(name, folder / each):
                raise ValueError(
                    f"{key}={name} lies where a run with training.output_dir={folder} writes ({each}): choose another "
                    "training.output_dir, or move the input"
                )


def _check_found(config: Config, written: Collection[Path]) -> None:
    """Raise ValueError for a path that leads nowhere, before an earlier run is moved for the sake of this one.

    If `written` makes an earlier run's `inputs` move, a path into these will lead nowhere either. Names that may be ids
    of the hub are left to the hub.
    """
    moved = bool(written) and (Path(config.training.output_dir) / INPUTS / INPUTS_DIGESTS).is_file()
    for key, name in named_inputs(config):
        if name in written:
            continue
        is_path = key in ("data.exclude", "data.chat_template") or not is_hub_id(str(name))
        if is_path and not name.exists():
            raise ValueError(f"{key}={name}: there is no such file or folder; check the path")
        if moved and _is_own_input(config, name):
            raise ValueError(
                f"{key}={name} belongs to the earlier run, whose inputs training.resume=never moves: pass it as well, "
                "or choose another training.output_dir"
            )


def reads_own_inputs(config: Config) -> bool:
    """Whether the config names rows or a model in the `inputs` of the run's folder."""
    return any(_is_own_input(config, name) for _, name in named_inputs(config))


def _is_own_input(config: Config, name: Path) -> bool:
    return _is_within(name, Path(config.training.output_dir) / INPUTS)


def named_inputs(config: Config) -> Iterator[tuple[str, Path]]:
    """Yield the keys that name what a run reads, with the paths; some may be ids of the hub."""
    data, model = config.data, config.model
    for key, source in (("data.train", data.train), ("data.eval", data.eval)):
        for part in parts(source) if source else ():
            yield key, Path(part.path)
    others = {
        "data.exclude": data.exclude,
        "data.chat_template": None if data.chat_template == "zephyr" else data.chat_template,
        "model.name_or_path": model.name_or_path,
        "model.adapter": model.adapter,
        "reference.model": config.reference.model,
    }
    for key, value in others.items():
        if value is not None:
            yield key, Path(value).expanduser()


def _is_within(path: Path, place: Path) -> bool:
    """Whether `path` is `place` or lies in it, as it is named or behind links."""
    # `Path.resolve` would raise an error for links that lead in a circle
    return any(Path(find(path)).is_relative_to(find(place)) for find in (os.path.abspath, os.path.realpath))


# ---- what a run writes ----


def is_own_config(path: Path) -> bool:
    """Whether `path` is a `config.yaml` as a run writes it: all sections, and no comment that could be lost."""
    try:
        text = check_regular(path).read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    needed = set(SECTIONS) - set(DPO_SECTIONS)
    if not isinstance(tree, dict) or not needed <= set(tree):
        return False
    training = tree["training"]
    whole = isinstance(training, dict) and {"output_dir", "resume", "seed", "log_every"} <= set(training)
    return whole and ("#" not in text or dump_yaml(tree) == text)


def _check_files(folder: Path) -> None:
    """Raise ValueError for a file under a run's name that no run wrote."""
    for name, is_own in _OWN.items():
        path = folder / name
        if not _is_free(path) and not is_own(path):
            raise ValueError(_in_the_way(path, folder))


def _is_free(path: Path) -> bool:
    """Whether nothing is lost if `path` is replaced: it is not there, or an empty file."""
    return not os.path.lexists(path) or (path.is_file() and path.stat().st_size == 0)


def _object_with(*keys: str) -> Callable[[Path], bool]:
    """A check that a file is one JSON object with these keys."""

    def check(path: Path) -> bool:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(1) == b"{" and _has_keys(b"{" + file.read(), keys)

    return check


def _lines_with(*keys: str) -> Callable[[Path], bool]:
    """A check that a file's first line is a JSON object with these keys, or the part of one that a kill left."""

    def check(path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            first = file.readline(_MOST_BYTES)
        return _has_keys(first, keys) or (not first.endswith(b"\n") and first.startswith(b'{"step": '))

    return check


def _has_keys(text: bytes, keys: tuple[str, ...]) -> bool:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and set(keys) <= set(found)


def _is_initial(path: Path) -> bool:
    return _object_with("step")(path) and all(
        name == "step" or name.startswith("eval_") for name in json.loads(path.read_bytes())
    )


_has_trained = _lines_with("step", "learning_rate", "num_tokens")
_OWN: dict[str, Callable[[Path], bool]] = {
    DATA_FILE: _object_with("train", "eval"),
    ENVIRONMENT_FILE: _object_with("launches", "versions"),
    INITIAL_FILE: _is_initial,
    METRICS_FILE: _has_trained,
    SAMPLES_FILE: _lines_with("step", "prompt", "completion"),
}
