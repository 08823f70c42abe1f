"""What MODEL_OR_RUN may be: a model, an adapter on its base, or a training run with its settings.

An unfinished run stands for its newest whole checkpoint, which is exported into the run's `snapshots/`. The run may be
training at that moment. It is not disturbed: checkpoints appear whole and are only read here.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notus.data.chat import ChatEncoder, check_vocabulary
from notus.evaluation.results import check_folder, is_run
from notus.model.export import export_adapter, export_model, load_causal_lm, load_tokenizer
from notus.model.load import find_folder, read_json, resolve_model_folder
from notus.model.lora import inject_lora, lora_layers, merge_lora
from notus.model.new_tokens import add_tokens, grow, vocabulary_rows
from notus.model.peft_format import (
    ADAPTER_CONFIG,
    Adapter,
    merge_adapter,
    read_adapter,
    read_adapter_settings,
    without_layers,
)
from notus.model.policy import Policy
from notus.model.structure import text_config
from notus.model.usage import learned_plain_text, set_trained_templates
from notus.model.verify import PathChoice, choose_path
from notus.runtime.distributed import on_main, process_group
from notus.runtime.files import is_locked, lock
from notus.training.checkpoint import STATE_FILE, DamagedCheckpointError, checkpoints_in, load_checkpoint, step_of
from notus.training.model_folders import ModelFolders, local_names, resolve_model
from notus.training.parallelize import COMPUTE_DTYPES
from notus.training.run_data import DATA_FILE
from notus.training.run_folder import CHECKPOINTS, CONFIG_FILE, MODEL, is_extending, own_input

Settings = Mapping[str, Mapping[str, Any]]

SNAPSHOTS = "snapshots"
DEFAULT_SHARD = 5 * 10**9
_SOURCE = "checkpoint.json"  # in a snapshot: the `state.json` of the checkpoint that it was exported from
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
# Runs `_main` in a process that ends with its parent, whose id is the first argument, even while it imports torch.
# Ctrl-C is for the parent to report.
_START = """
import os, signal, sys
from notus.runtime.process import follow_parent, leave

follow_parent(signal.SIGKILL)
signal.signal(signal.SIGINT, signal.SIG_IGN)
if os.getppid() == int(sys.argv[1]):  # else it is gone already
    from notus.evaluation.resolve_model import _main

    leave(_main(*sys.argv[2:]))
"""

_reading: dict[Path, IO[str]] = {}  # by snapshot: the file that this process keeps locked until it ends


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """How conversations become tokens; each is as `ChatEncoder` takes it, by the name that it has in `data`."""

    chat_template: str | None = None
    add_empty_system: bool = False
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    template_date: str | None = None
    mask_history: bool = False
    split_special_tokens: bool = False

    @classmethod
    def of_run(cls, settings: Settings) -> "ChatSettings":
        """Return those of a run; a run of an earlier version lacks some, which then have no effect."""
        data = settings.get("data", {})
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: data[name] for name in names if data.get(name) is not None})

    def described(self) -> dict[str, Any]:
        """Return what the settings of a result say of prompts; what a run of old did not know, only where it is set."""
        found = {"chat_template": self.chat_template, "add_empty_system": self.add_empty_system}
        more = {
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "template_date": self.template_date,
            "split_special_tokens": self.split_special_tokens,
        }
        return found | {name: value for name, value in more.items() if value}

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
        """Return what tokenises with these settings. Raises ValueError as `ChatEncoder` does."""
        return ChatEncoder(
            tokenizer,
            chat_template=self.chat_template,
            add_empty_system=self.add_empty_system,
            chat_template_kwargs=self.chat_template_kwargs,
            template_date=self.template_date,
            mask_history=self.mask_history,
            split_special_tokens=self.split_special_tokens,
        )


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How a model is computed and prompted: as the user says, else as its run was."""

    precision: str
    chat: ChatSettings
    plain_text: bool  # string prompts are continued as they are, also where there is a chat template
    trust_remote_code: bool

    def strings_are_turns(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether a string prompt is the user's turn: there is a chat template, and the model learned with one."""
        return not self.plain_text and bool(self.chat.chat_template or tokenizer.chat_template)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return COMPUTE_DTYPES[self.precision]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model's weights are."""

    name: str  # as the user wrote it; of an unfinished run with the step, as "runs/dpo (step 100)"
    folder: Path  # a model's folder, or an adapter's
    base: str | None = None  # of an adapter, the model that it adapts, as its config names it; None for a full model
    # a run's settings by section; empty for anything but a run.
    settings: Settings = dataclasses.field(default_factory=dict)
    run: Path | None = None  # a run's folder; None for anything but a run
    plain_text: bool = False  # it learned plain text only, no conversation
    rows: int = 0  # rows that its vocabulary gets at least, for tokens that a run adds to it

    def choose(self, given: Any, key: str, default: Any) -> Any:
        """Return what the user gave; else what the run's setting `section.name` says; else `default`."""
        if given is not None:
            return given
        section, name = key.split(".")
        value = self.settings.get(section, {}).get(name)
        return default if value is None else value

    def options(self, args: argparse.Namespace) -> ModelOptions:
        """Return the options of `add_model_arguments`, and of `add_answer_arguments` where a command has them.

        Whoever names a template wants prompts to be rendered with it, whatever the model learned.
        """
        named = {"chat_template": args.chat_template, "add_empty_system": args.add_empty_system}
        given = {name: value for name, value in named.items() if value is not None}
        raw = getattr(args, "raw", None)
        return ModelOptions(
            precision=self.choose(args.precision, "training.precision", "bf16"),
            chat=dataclasses.replace(ChatSettings.of_run(self.settings), **given),
            plain_text=self.plain_text and args.chat_template is None if raw is None else raw,
            trust_remote_code=args.trust_remote_code,
        )

    def load(self, options: ModelOptions, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the whole model and its tokenizer. Raises ValueError if that fails, or if they do not fit together."""
        causal_lm, tokenizer = load_causal_lm(
            self.folder, dtype=options.dtype, device=device, trust_remote_code=options.trust_remote_code
        )
        check_vocabulary(tokenizer, text_config(causal_lm.config).vocab_size)
        return causal_lm, tokenizer


def find_source(name: str, *, trust_remote_code: bool = False) -> ModelSource:
    """Find the model, adapter or run of a folder or hub id; for one process, see `find_together`.

    `trust_remote_code`: run code that comes with the base model, where a checkpoint is exported. Raises ValueError,
    naming the folder, if it is none of them, or a run without a whole checkpoint; OSError if the export cannot be
    written.
    """
    folder = find_folder(name)
    if not is_run(folder):
        return _source(name, folder)
    settings, run = with_paths(read_run_settings(folder), folder), folder
    if (run / MODEL).is_dir() and not is_extending(run):
        return _source(name, run / MODEL, settings, run)
    out = export_newest(run, trust_remote_code=trust_remote_code)
    return _source(f"{name} (step {step_of(out)})", out, settings, run)


def find_together(name: str, *, trust_remote_code: bool = False) -> ModelSource:
    """Call `find_source` on rank 0 and return what it found to every rank; collective.

    Raises ValueError and OSError as that; also where rank 0 sees an exported checkpoint, and this rank does not.
    """
    source = on_main(lambda: find_source(name, trust_remote_code=trust_remote_code))
    if source.folder.is_dir():
        return source
    if source.run:
        raise ValueError(f"{source.folder}: the first rank sees it, this one does not; use a disk that all share")
    return find_source(name, trust_remote_code=trust_remote_code)  # of the hub: each machine has it in its own cache


def find_base(model: ModelSource, given: str | None = None, *, trust_remote_code: bool = False) -> ModelSource | None:
    """Find what a model's rewards are relative to; collective. None if nothing says what that is.

    It is what the user gave. Else of a DPO run its reference: `reference.model`, or the model that it started from,
    with the adapter that it started from; and rows for its new tokens. Else of an adapter its base. Raises ValueError
    and OSError as `find_together`.
    """
    settings = model.settings if "dpo" in model.settings else {}
    start = settings.get("model", {})
    if given is None and start:
        other = settings.get("reference", {}).get("model")  # a run of an earlier version has no such key
        if other:
            names = local_names(other, key="reference.model")
        else:
            names = local_names(start["name_or_path"], start.get("adapter"))
        new = settings["data"].get("new_tokens") or []
        if names.adapter is not None or new or other:
            found = find_together(names.adapter or names.base, trust_remote_code=trust_remote_code)
            return dataclasses.replace(found, rows=_rows_of(new, model.folder, trust_remote_code))
    named = given or model.base or start.get("name_or_path")
    return find_together(named, trust_remote_code=trust_remote_code) if named else None


def switches_to(model: ModelSource, base: ModelSource | None) -> bool:
    """Whether `model` is an adapter that becomes `base` when its LoRA layers are switched off."""
    if base is None or model.base != base.name or base.base is not None or base.rows:
        return False
    return not read_adapter(model.folder).saved


def _rows_of(new_tokens: Sequence[str], folder: Path, trust_remote_code: bool) -> int:
    """Rows that the tokens of a trained model's tokenizer need."""
    if not new_tokens:
        return 0
    known = load_tokenizer(folder, trust_remote_code).get_vocab()
    return 1 + max(known[token] for token in new_tokens)


def _source(name: str, folder: Path, settings: Settings | None = None, run: Path | None = None) -> ModelSource:
    base = None
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_adapter_settings(folder)["base_model_name_or_path"]
        base = _path_of(base, settings, run) if settings and run else base
    found = folder if base else resolve_model_folder(folder)
    trained = run or (folder.parent if folder.name == MODEL and is_run(folder.parent) else None)
    plain_text = learned_plain_text(found) or (trained is not None and run_learned_plain_text(trained))
    return ModelSource(name, found, base, settings or {}, run, plain_text)


def run_learned_plain_text(run: Path) -> bool:
    """Whether a run's training rows were all plain text. Raises ValueError, naming the file, if `data.json` is damaged.

    False for a run that has no such file yet.
    """
    path = run / DATA_FILE
    if not path.is_file():
        return False
    try:
        return rows_are_plain_text(read_json(path))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a report of a run's data ({error!r}); restore the file, or remove it") from error


def rows_are_plain_text(data: Mapping[str, Any]) -> bool:
    """Whether `data.json` says that no training row was a conversation; an early version did not count them."""
    return bool(data["train"]["report"].get("templated") == 0)


def read_run_settings(run: Path) -> dict[str, dict[str, Any]]:
    """Read a run's resolved settings, by section. Raises ValueError, naming the file, if they cannot be read."""
    path = run / CONFIG_FILE
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as YAML ({' '.join(str(error).split())}); restore the file") from error
    if not _are_settings(settings):
        raise ValueError(f"{path}: not the settings of a run; restore the file, or name the model's own folder")
    return settings


def with_paths(settings: Settings, run: Path) -> Settings:
    """Return a run's settings with the files that they name, wherever the command runs from.

    The run's relative paths start from the folder in which it was trained. `training.output_dir`, if it is relative,
    and the run's place say which that is. Otherwise a path that is not there from the working folder is looked for in
    the folders above the run. A name that is found nowhere stays as it is: it may be a hub id.
    """
    data, model = dict(settings["data"]), dict(settings["model"])
    for key in ("train", "eval"):
        if data.get(key):
            data[key] = [{**part, "path": _path_of(str(part["path"]), settings, run)} for part in data[key]]
    if str(data.get("chat_template")).endswith(".jinja"):  # else it is a name, or the template itself
        data["chat_template"] = _path_of(data["chat_template"], settings, run)
    reference = dict(settings.get("reference", {}))  # SFT has no such section
    named = ((data, "exclude"), (data, "cache_dir"), (model, "name_or_path"), (model, "adapter"), (reference, "model"))
    for section, key in named:
        if section.get(key):
            section[key] = _path_of(section[key], settings, run)
    return {**settings, "data": data, "model": model, **({"reference": reference} if reference else {})}


def _path_of(name: str, settings: Settings, run: Path) -> str:
    """A path of a run's settings, or of its adapter, as it is from the working folder; other names as they are."""
    if os.path.isabs(name) or name.startswith("~"):
        return own_input(name, run)
    trained_in = _folder_of_training(settings, run)
    if trained_in is None and Path(name).exists():
        return name
    places = list(run.resolve().parents) if trained_in is None else [trained_in]
    found = next((place / name for place in places if (place / name).exists()), None)
    return name if found is None or found == Path.cwd() / name else str(found)


def _folder_of_training(settings: Settings, run: Path) -> Path | None:
    """The folder that the run's relative paths start from; None if its settings do not say."""
    output, place = Path(settings["training"].get("output_dir") or "/").parts, run.resolve().parts
    above = len(place) - len(output)  # "." has no parts
    if output[:1] == ("/",) or ".." in output or place[above:] != output:
        return None
    return Path(*place[:above])


def _are_settings(tree: Any) -> bool:
    """Whether it has what every run's settings have; other programs write a config.yaml, too."""
    if not isinstance(tree, dict) or not all(isinstance(section, dict) for section in tree.values()):
        return False
    model, data, training, lora = (tree.get(name, {}) for name in ("model", "data", "training", "lora"))
    sources = data.get("train")
    named = isinstance(model.get("name_or_path"), str) and isinstance(sources, list)
    return named and {"precision", "seed"} <= training.keys() and {"chat_template"} <= data.keys() and "rank" in lora


def newest_checkpoint(run: Path) -> Path:
    """Return an unfinished run's newest checkpoint, which may be damaged. Raises ValueError if there is none."""
    checkpoints = checkpoints_in(run / CHECKPOINTS)
    if not checkpoints:
        raise ValueError(f"{run}: the run has not finished and has no checkpoint yet; train it first")
    return checkpoints[0]


def export_newest(run: Path, *, trust_remote_code: bool = False) -> Path:
    """Export the newest whole checkpoint of an unfinished run to `RUN/snapshots/step-00000100`; return that folder.

    An earlier export of the same checkpoint is used again. Of several evaluations one exports, and the others wait for
    it. The folder stays at least until this process has ended.

    Raises:
        ValueError: the run has no whole checkpoint, or its model cannot be made.
        OSError: nothing can be written there.
    """
    with _locked(run / SNAPSHOTS) as locked:
        newest = newest_checkpoint(run)
        out = run / SNAPSHOTS / newest.name
        if not _is_of(out, newest / STATE_FILE):
            out = _export(run, trust_remote_code, clean=locked)
        with contextlib.suppress(OSError):  # no locks, or somebody else's folder
            _keep(out)
    return out


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a run's snapshots for the block; yield False where that is impossible: no locks, or nothing can be written.

    Another evaluation may hold the lock for as long as an export takes.
    """
    with contextlib.ExitStack() as stack:
        locked = False
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            lock(stack.enter_context((folder / ".lock").open("a")), wait=True)
            locked = True
        yield locked


def _export(run: Path, trust_remote_code: bool, *, clean: bool) -> Path:
    """Export the newest whole checkpoint. `clean`: the snapshots are locked, so what nobody needs can be removed."""
    folder = run / SNAPSHOTS
    check_folder(folder, remedy="make it writable, or write the model elsewhere with `notus export`")
    if clean:
        for killed in folder.glob(".export-*"):  # whoever writes one holds the lock
            _remove(killed)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        made = _export_apart(run, Path(temporary), trust_remote_code)
        out = folder / made.name
        _publish(made, out)
    if clean:
        for old in checkpoints_in(folder):
            if step_of(old) < step_of(out) and not _is_read(old):
                _remove(old)
    return out


def _keep(out: Path) -> None:
    """Lock a new file in a snapshot until this process ends. Raises OSError if that is impossible."""
    file = (out / f".read-by-{uuid.uuid4().hex}").open("a")
    lock(file)
    _reading[out.resolve()] = file


def _is_read(snapshot: Path) -> bool:
    if snapshot.resolve() in _reading:  # `is_locked` would release this process's own lock
        return True
    return any(is_locked(file) for file in snapshot.glob(".read-by-*"))


def _remove(folder: Path) -> None:
    """Remove what is as large as the model; print a warning if that fails."""
    try:
        (folder / _SOURCE).unlink(missing_ok=True)  # what is half removed is a snapshot of nothing
        shutil.rmtree(folder)
    except OSError as error:
        print(f"warning: {folder}: cannot be removed ({error.strerror}); it is not needed any more", flush=True)


def _publish(made: Path, out: Path) -> None:
    try:
        made.rename(out)
    except OSError:
        if _is_of(out, made / _SOURCE):
            return  # another evaluation was faster, and may be reading it
        shutil.rmtree(out, ignore_errors=True)  # of an earlier run in this folder
        made.rename(out)


def _is_of(out: Path, state: Path) -> bool:
    """Whether a snapshot is of this checkpoint, not of one that an earlier run in this folder made at the same step."""
    try:
        return (out / _SOURCE).read_bytes() == state.read_bytes()  # it has the digests of all other files
    except OSError:
        return False


def _export_apart(run: Path, folder: Path, trust_remote_code: bool) -> Path:
    """Run `_main` as a process of one rank, on the CPU: this one may be one of several ranks, or fill a GPU.

    Raises ValueError: with the message of a ValueError or OSError there; else, after the traceback, with how it ended.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    arguments = [str(os.getpid()), str(run), str(folder), str(trust_remote_code)]
    command = [sys.executable, "-P", "-c", _START, *arguments]  # -P: no code from the working folder
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        number = -done.returncode
        ended = f"signal {number} ({signal.strsignal(number)})" if number > 0 else f"code {done.returncode}"
        raise ValueError(done.stdout.strip() or f"{run}: exporting its newest checkpoint ended with {ended}")
    return next(folder.glob("step-*"))


def _main(run_folder: str, folder: str, trust_remote_code: str) -> int:
    """Export the newest whole checkpoint into `folder`; only the message of a failure goes to the standard output."""
    run = Path(run_folder)
    try:
        with contextlib.redirect_stdout(sys.stderr), process_group():
            settings, trust = with_paths(read_run_settings(run), run), trust_remote_code == "True"
            causal_lm, tokenizer, checkpoint = load_unfinished(run, settings, trust_remote_code=trust)
            out, dtype = Path(folder) / checkpoint.name, COMPUTE_DTYPES[settings["training"]["precision"]]
            write_model(
                causal_lm,
                tokenizer,
                out,
                base=starting_folders(settings).name,
                dtype=dtype,
                plain_text=run_learned_plain_text(run),
                below=adapter_below(settings),
            )
            with contextlib.suppress(FileNotFoundError):  # the run has removed the checkpoint meanwhile
                shutil.copyfile(checkpoint / STATE_FILE, out / _SOURCE)
    except (ValueError, OSError) as error:
        print(error)
        return 1
    return 0


def load_unfinished(
    run: Path, settings: Settings, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Load the base model with the weights, or the adapter, of the newest whole checkpoint; and return that checkpoint.

    All is on the CPU, in fp32. In a process group of one. Raises ValueError if there is no whole checkpoint.
    """
    newest_checkpoint(run)
    folders, lora = starting_folders(settings), settings["lora"]
    causal_lm, _ = load_causal_lm(folders.base, dtype=torch.float32, device="cpu", trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folders.tokenizer, trust_remote_code)
    ids = add_tokens(tokenizer, settings["data"].get("new_tokens") or [])
    held = None if folders.adapter is None else read_adapter(folders.adapter)
    old = vocabulary_rows(causal_lm)
    rows = max([old, 0 if held is None else held.vocabulary, *(number + 1 for number in ids)])
    grow(causal_lm, rows)
    if held is not None and not lora.get("continue"):  # else the checkpoint has all of it
        merge_adapter(causal_lm, held, new_rows=rows - old)
    if lora["rank"]:
        idle = _path_of_run(causal_lm, settings, trust_remote_code).idle
        inject_lora(
            causal_lm,
            rank=lora["rank"],
            alpha=lora["alpha"],
            dropout=lora["dropout"],
            target_modules=lora["target_modules"],
            rslora=lora["rslora"],
            modules_to_save=lora.get("modules_to_save") or [],
            idle=without_layers(idle, held if lora.get("continue") else None),
        )
    data = read_json(run / DATA_FILE) if (run / DATA_FILE).is_file() else None
    if learned_chat(settings, data):  # at the end of a run, the run does the same
        set_trained_templates(tokenizer, ChatSettings.of_run(settings).encoder(tokenizer))
    return causal_lm, tokenizer, _fill(causal_lm, run / CHECKPOINTS)


def _path_of_run(causal_lm: PreTrainedModel, settings: Settings, trust_remote_code: bool) -> PathChoice:
    """Return how a run computes its model, as `choose_path` found it for the run."""
    return choose_path(
        causal_lm.config,
        wanted=settings["model"].get("path", "auto"),
        longest=settings["data"]["max_length"],
        trust_remote_code=trust_remote_code,
    )


def starting_folders(settings: Settings) -> ModelFolders:
    """Return the folders of the model that a run started from. Raises ValueError as `resolve_model`."""
    return resolve_model(settings["model"]["name_or_path"], settings["model"].get("adapter"))


def adapter_below(settings: Settings) -> Adapter | None:
    """Return the adapter on which a run trained another one: it is exported together with that. None: there is none."""
    folder = starting_folders(settings).adapter
    return None if folder is None or settings["lora"].get("continue") else read_adapter(folder)


def learned_chat(settings: Settings, data: Mapping[str, Any] | None) -> bool:
    """Whether a chat template certainly rendered rows: `data.json` counted them, or else the config names one."""
    report = data["train"]["report"] if data else {}
    if "templated" in report:
        return bool(report["templated"])
    return settings["data"]["chat_template"] is not None


def _fill(causal_lm: PreTrainedModel, folder: Path) -> Path:
    policy = Policy(causal_lm)  # checkpoints have its names
    damaged: set[Path] = set()
    while True:
        remaining = [path for path in checkpoints_in(folder) if path not in damaged]
        if not remaining:
            raise ValueError(f"{folder}: no checkpoint is whole; nothing to export")
        try:
            load_checkpoint(remaining[0], policy.named_parameters(), optimizer=None)
            return remaining[0]
        except (ValueError, OSError) as error:
            if not remaining[0].exists():
                continue  # the run has a newer one, and has removed this one meanwhile
            if not isinstance(error, DamagedCheckpointError):
                raise
            print(f"warning: {error}", flush=True)
            damaged.add(remaining[0])


def write_model(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    base: str,
    dtype: torch.dtype,
    merge: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD,
    plain_text: bool = False,
    below: Adapter | None = None,
) -> None:
    """Write LoRA layers as PEFT's adapter of `base`, unless they are to be merged; anything else as a whole model.

    `plain_text` and `below` are as in `export_model` and `export_adapter`.
    """
    if lora_layers(causal_lm) and not merge:
        export_adapter(
            causal_lm,
            out,
            base_model_name_or_path=base,
            tokenizer=tokenizer,
            plain_text=plain_text,
            below=below,
        )
        return
    merge_lora(causal_lm)
    export_model(
        causal_lm,
        out,
        hf_config=causal_lm.config,
        tokenizer=tokenizer,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        plain_text=plain_text,
    )
