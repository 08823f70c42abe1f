"""A run's folder: who may use it, where to resume, and when it is finished.

OUTPUT_DIR/config.yaml  metrics.jsonl  checkpoints/step-00000100/  reference/  model/
           data.json  environment.json  samples.jsonl  initial_evaluation.json

`own_files.py` keeps it from replacing files of others.
"""

import dataclasses
import datetime
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import IO, Any

import yaml

from notus.config import Config, load_config, save_config
from notus.runtime.distributed import gather_objects, on_main, rank
from notus.runtime.files import check_regular, lock, replacing, sync
from notus.runtime.process import first_line, tell
from notus.training.checkpoint import DAMAGED, checkpoints_in
from notus.training.data_files import check_unchanged
from notus.training.run_data import DATA_FILE
from notus.training.tracking import ENVIRONMENT_FILE, INITIAL_FILE, METRICS_FILE, SAMPLES_FILE

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
MODEL = "model"
REFERENCE = "reference"
INPUTS = "inputs"  # rows and a model of a program's memory; see `inputs.py`
INPUTS_DIGESTS = "inputs.json"  # in it, as long as something of a run's is
LOCK = ".lock"
EVALUATIONS = "evaluations"  # where `notus.evaluation.results` writes, which imports no torch
EXTENDING = ".extending"  # stands while `model` is that of the run before it was extended
REPORT = "report.html"  # of `notus report`
TENSORBOARD = "tensorboard"
WANDB = "wandb"
# All that a run and the commands on it write into its folder, beside what the next run may go on with: the reference
# cache and the lock. `training.resume=never` moves it in this order: what says more of a run goes earlier, and the
# config goes last, so that what an interruption leaves is no finished run, and still knows its config.
WRITTEN = (
    MODEL, METRICS_FILE, CHECKPOINTS, DATA_FILE, ENVIRONMENT_FILE, EVALUATIONS, EXTENDING, INITIAL_FILE, INPUTS, REPORT,
    SAMPLES_FILE, TENSORBOARD, WANDB, CONFIG_FILE,
)  # fmt: skip
_MODEL_FILES = ("config.json", "adapter_config.json")
# What may differ when a run is resumed: how and where it computes, not what.
FREE_KEYS = frozenset(
    {
        "data.num_workers", "data.cache_dir", "reference.cache_dir", "training.output_dir", "training.resume",
        "training.tokens_per_row", "training.activation_checkpointing", "training.compile", "training.cpu_offload",
        "training.deterministic", "training.sharding", "training.eval_at_start", "training.extend",
        "training.timeout_minutes", "training.log_every", "training.eval_every", "training.save_every",
        "training.keep_checkpoints", "training.keep_every", "training.async_checkpoints", "training.max_hours",
        "tracking.wandb", "tracking.tensorboard", "tracking.project", "tracking.run_name",
        "tracking.samples", "tracking.sample_tokens",
    }
)  # fmt: skip


# What `training.extend` may raise.
LENGTH_KEYS = ("training.max_steps", "training.epochs")


@dataclasses.dataclass(frozen=True)
class Opening:
    """What `open_folder` found.

    Attributes:
        finished: whether the run is finished.
        checkpoints: to resume from, the newest first.
        extended: whether this launch makes the run longer than it was so far.
    """

    finished: bool
    checkpoints: list[Path]
    extended: bool = False


def open_folder(config: Config, *, keep_inputs: bool = False) -> Opening:
    """Claim the run's folder for `config` and say where to start; for rank 0.

    Args:
        config: the run's.
        keep_inputs: `training.resume=never` leaves `inputs` where it is, because this run reads what lies there.

    Raises:
        ValueError: the folder belongs to a run with another config or cannot be written, or the checkpoint named in
            `training.resume` does not exist or is not the newest of this run; or the run is finished, and its data
            have changed since.
    """
    folder, extended = Path(config.training.output_dir), False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        resume = resume_of(config)
        if resume == "never":
            _set_aside(folder, config, keep_inputs)
        elif (folder / CONFIG_FILE).exists() and has_begun(folder):
            extended = _check_same_run(folder / CONFIG_FILE, config)
            if is_finished(folder) and not extended:
                check_unchanged(config, folder)
                return Opening(finished=True, checkpoints=[])
        else:
            _check_begin(folder, config)
        checkpoints = _checkpoints(folder, resume)
        if not checkpoints:  # the run starts at step 0, perhaps with other data than a launch that failed
            (folder / INITIAL_FILE).unlink(missing_ok=True)
        if extended and has_model(folder):
            _begin_extension(folder, checkpoints)
        if not (folder / EXTENDING).exists():
            check_room_for_model(folder / MODEL)
        with replacing(folder / CONFIG_FILE, locked=True) as temporary:
            save_config(_as_resumed(config), temporary)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return Opening(finished=False, checkpoints=checkpoints, extended=extended)


def _as_resumed(config: Config) -> Config:
    """The config that resumes the run: `training.resume=never` would start over with each command that reads it."""
    if config.training.resume != "never":
        return config
    return dataclasses.replace(config, training=dataclasses.replace(config.training, resume="auto"))


def _check_begin(folder: Path, config: Config) -> None:
    """Raise ValueError if a run that begins is to be extended."""
    if config.training.extend:
        raise ValueError(
            f"training.extend: {folder} holds no run that could be extended; check the folder, or set "
            "training.extend=false"
        )


def _begin_extension(folder: Path, checkpoints: list[Path]) -> None:
    """Mark a finished run as unfinished. Its model stays until the extended run replaces it."""
    if not checkpoints:
        raise ValueError(
            f"training.extend: {folder / CHECKPOINTS} has no checkpoint to continue from: restore the last"
        )
    (folder / EXTENDING).touch()
    sync(folder)


def end_extension(folder: Path) -> None:
    """Note that `model` is that of the whole run; for rank 0.

    The evaluations of earlier models are moved into a dated folder: they would be taken for those of this one.
    """
    if not (folder / EXTENDING).exists():
        return
    if (folder / EVALUATIONS).exists():
        aside = _dated(folder)
        (folder / EVALUATIONS).rename(aside / EVALUATIONS)
        tell(f"the evaluations of the model before the extension are now in {aside}")
    (folder / EXTENDING).unlink()


def holds_finished(config: Config) -> bool:
    """Whether the folder holds this run with its final model. Changes nothing.

    Raises:
        ValueError: the folder holds a run with another config.
    """
    folder = Path(config.training.output_dir)
    if not (folder / CONFIG_FILE).exists() or not has_begun(folder):
        return False
    dated = dataclasses.replace(config.data, template_date=template_date(config))
    extended = _check_same_run(folder / CONFIG_FILE, dataclasses.replace(config, data=dated))
    return is_finished(folder) and not extended


def resume_of(config: Config) -> str:
    """Return `training.resume`; torchrun's restart of a launch that began anew is to resume it."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return "auto" if restarted and config.training.resume == "never" else config.training.resume


def template_date(config: Config) -> str:
    """The date that chat templates take for today: as configured, as recorded in the folder, else today; for rank 0.

    Frozen, since a run resumed on another day must see the same tokens, even if only its reference was computed.
    """
    if config.data.template_date is not None:
        return config.data.template_date
    folder, resume = Path(config.training.output_dir), resume_of(config)
    places = [folder] if resume != "never" else []
    if resume not in ("auto", "never"):
        places.append(Path(resume).parent.parent)
    for place in places:
        if found := _recorded_date(place / CONFIG_FILE):
            return found
    return datetime.date.today().isoformat()


def _recorded_date(path: Path) -> str | None:
    try:
        found = yaml.safe_load(check_regular(path).read_text(encoding="utf-8"))["data"]["template_date"]
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError):  # what is wrong with it is reported elsewhere
        return None
    return found if isinstance(found, str) else None


def hold_folder(config: Config) -> IO[str]:
    """Lock the run's folder against a second launch, for rank 0; returns the open file that holds the lock.

    The lock goes with the process, however that ends. A file system without locks is used without one.

    Raises:
        ValueError: another launch holds it, or the folder cannot be made.
    """
    folder = Path(config.training.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = check_regular(folder / LOCK).open("a")
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        lock(file)
    except BlockingIOError as error:
        file.close()
        raise ValueError(
            f"training.output_dir={folder} is in use by another launch: wait for its end, or choose another folder"
        ) from error
    except OSError as error:
        tell(f"note: {folder} cannot be locked ({error.strerror}); do not start a second run in it")
    return file


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"training.output_dir={folder} cannot be written ({error}): choose another folder")


def is_finished(folder: Path) -> bool:
    """Whether a run wrote its final model here, and is not being extended."""
    return has_model(folder) and not is_extending(folder)


def is_extending(folder: Path) -> bool:
    """Whether a model here is that of the run before it was extended."""
    return (folder / EXTENDING).exists()


def has_model(folder: Path) -> bool:
    """Whether a run wrote a final model here; one that is extended keeps it until it has a newer one."""
    return any((folder / MODEL / name).is_file() for name in _MODEL_FILES)


def has_begun(folder: Path) -> bool:
    """Whether a run got as far as training here; one that failed before leaves a config that binds nobody."""
    metrics = folder / METRICS_FILE
    logged = metrics.exists() and metrics.stat().st_size > 0
    return logged or any((folder / name).exists() for name in (CHECKPOINTS, MODEL))


def _checkpoints(folder: Path, resume: str) -> list[Path]:
    own = checkpoints_in(folder / CHECKPOINTS)
    damaged = sorted((folder / CHECKPOINTS).glob(f"{DAMAGED}*"))
    if damaged and not own and resume == "auto":
        raise ValueError(
            f"{folder / CHECKPOINTS}: no checkpoint is whole ({damaged[-1].name} is the newest); restore one under its "
            "old name, or set training.resume=never to start over"
        )
    if resume in ("auto", "never"):
        return own
    path = Path(resume)
    if not path.is_dir():
        raise ValueError(f"training.resume={resume}: no such checkpoint folder; give one, or 'auto' or 'never'")
    if own and path.parent.resolve() == own[0].parent.resolve() and path.name != own[0].name:
        raise ValueError(
            f"training.resume={resume}: this run has a newer checkpoint, {own[0].name}; move newer ones away to go back"
        )
    return own or [path]  # the run's own progress goes before that of its origin, so the same command resumes it


def _set_aside(folder: Path, config: Config, keep_inputs: bool) -> None:
    """Move an earlier run in this folder into a dated folder within it; nothing is deleted, and nothing else moved.

    If that is interrupted, what is left is no finished run, and still knows its config until the end.
    """
    present = [name for name in WRITTEN if os.path.lexists(folder / name)]
    if not {CONFIG_FILE, METRICS_FILE, CHECKPOINTS, MODEL} & set(present):
        return
    foreign = _not_of_run(folder) | ({INPUTS} if keep_inputs else set())
    if config.tracking.tensorboard:  # it would drop the events that are there
        foreign.discard(TENSORBOARD)
    aside = _dated(folder)
    for name in present:
        if name not in foreign:
            (folder / name).rename(aside / name)
    tell(f"training.resume=never: the earlier run is now in {aside}")


def _not_of_run(folder: Path) -> set[str]:
    """Those of the names in `WRITTEN` under which others may keep things, where the run in `folder` wrote none."""
    try:
        tracking = yaml.safe_load(check_regular(folder / CONFIG_FILE).read_text(encoding="utf-8"))["tracking"]
        found = {name for name in (TENSORBOARD, WANDB) if not tracking[name]}
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError):  # what is wrong with it is reported elsewhere
        found = set()
    if not (folder / INPUTS / INPUTS_DIGESTS).exists():
        found.add(INPUTS)
    if (folder / REPORT).is_file():
        with (folder / REPORT).open("rb") as file:
            found |= set() if b'content="notus report"' in file.read(1000) else {REPORT}
    return found


def _dated(folder: Path) -> Path:
    """Make a folder within a run's for what was there before."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    found = folder / f"previous-{now}"
    found.mkdir()
    return found


def check_room_for_model(path: Path) -> None:
    """Raise ValueError if something else stands where the model goes: the end of the run would be too late."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"{path} holds something else than the model that a run wrote, and the run's model will be written there: "
            "move it away, or choose another training.output_dir"
        )


def _check_same_run(path: Path, config: Config) -> bool:
    """Compare the config in `path` with this launch's; return whether `training.extend` makes the run longer.

    Raises:
        ValueError: they are not those of one run.
    """
    try:
        content = dict(yaml.safe_load(check_regular(path).read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({first_line(error)}): remove it to resume with this launch's config"
        ) from error
    task = "dpo" if "dpo" in content else "sft"  # SFT's has no such section
    if task != config.task:
        raise ValueError(f"{path.parent} holds a run of train_{task}.py: choose another training.output_dir")
    before, now = _flat(load_config(path, config.task)), _flat(config)
    before = {key: _moved(value, path.parent) for key, value in before.items()}
    if before["data.template_date"] is None:  # a run from before it was recorded
        before["data.template_date"] = now["data.template_date"]
    exclude = "training.weight_decay_exclude"
    if not before["training.weight_decay"]:
        before[exclude] = now[exclude]
    elif "weight_decay_exclude" not in content["training"]:  # a run from before the key: all parameters decayed
        before[exclude] = []
    changed = [key for key in now if key not in FREE_KEYS and before[key] != now[key]]
    if not changed:
        return False
    changes = ", ".join(f"{key} (was {json.dumps(before[key])}, is {json.dumps(now[key])})" for key in changed)
    if set(changed) - set(LENGTH_KEYS):
        raise ValueError(
            f"{path.parent} holds a run with another config: {changes}. Choose another training.output_dir, restore "
            "the config to resume, or set training.resume=never to start over"
        )
    # max_steps of null is no limit
    if any(before[key] is None or (now[key] is not None and now[key] < before[key]) for key in changed):
        raise ValueError(
            f"{path.parent} holds a run that is to be longer: {changes}. A run can be made longer, but not shorter: "
            "restore the config, or choose another training.output_dir"
        )
    if not config.training.extend:
        raise ValueError(
            f"{path.parent} holds a shorter run: {changes}. Set training.extend=true to continue it to its new end, or "
            "restore the config"
        )
    return True


def own_input(name: str, folder: Path) -> str:
    """Return where a file or folder of the run's `inputs` is, if the run was moved; return other names as they are.

    Its path in the config is absolute, because the program that wrote it may be called from anywhere.
    """
    here = folder.absolute() / INPUTS / Path(name).name
    return str(here) if os.path.isabs(name) and Path(name).parent.name == INPUTS and here.exists() else name


def _moved(value: Any, folder: Path) -> Any:
    """`own_input` of every string in a config's value."""
    if isinstance(value, list):
        return [_moved(each, folder) for each in value]
    if isinstance(value, dict):
        return {key: _moved(each, folder) for key, each in value.items()}
    return own_input(value, folder) if isinstance(value, str) else value


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{key.rstrip('_')}": value  # the name of a field may end so that it is no word of Python's
        for section, values in dataclasses.asdict(config).items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


# A network file system may show a new file late.
PATIENCE = 10.0


def check_shared(folder: Path) -> None:
    """Make sure that every rank sees, and may write, what rank 0 writes to `folder`; collective.

    Raises:
        ValueError: naming the ranks that do not, their hosts and the folder as they know it.
    """
    name = on_main(lambda: _leave_token(folder))
    problem = None if rank() == 0 else _problem(folder, name)
    problems = [f"rank {number} on {found}" for number, found in enumerate(gather_objects(problem)) if found]
    on_main(lambda: _clear(folder, name))
    if problems:
        raise ValueError(f"{'; '.join(problems)}: training.output_dir must lie on a disk that all machines share")


def _leave_token(folder: Path) -> str:
    _clear(folder, ".shared-")  # what a killed launch left; this one holds the folder's lock
    name = f".shared-{uuid.uuid4().hex}"
    (folder / name).touch()
    return name


def _problem(folder: Path, name: str) -> str | None:
    """What keeps this rank from sharing the folder; it leaves a file of its own there to see whether it may."""
    where = f"{socket.gethostname()}, whose folder is {folder.absolute()}"
    deadline = time.monotonic() + PATIENCE
    while not (folder / name).exists():
        if time.monotonic() > deadline:
            return f"{where}, does not see what rank 0 writes there"
        time.sleep(0.1)
    try:
        (folder / f"{name}-{rank()}").touch()
    except OSError as error:
        return f"{where}, cannot write there ({os.strerror(error.errno or 0)})"
    return None


def _clear(folder: Path, name: str) -> None:
    for path in folder.glob(f"{name}*"):
        path.unlink()
