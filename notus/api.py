"""The Python API: `notus.train`, `notus.score`, and what they return. All of it can be imported from `notus`.

import notus

result = notus.train(
    {
        "model": {"name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        "training": {"output_dir": "runs/mine", "learning_rate": 5e-6},
        "lora": {"rank": 16},
    },
    train=[{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}],
)
result.metrics[-1]["rewards/accuracies"]
model, tokenizer = result.load_model()
"""

import contextlib
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import transformers.utils.logging
from torch.fx.experimental import _config as symbols
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notus.config import SECTIONS, Config, Task, config_from_dict, load_config, read_yaml
from notus.data.dataset import TokenizedDataset
from notus.data.drop_report import DropReport
from notus.evaluation.preferences.scores import Scoring
from notus.evaluation.read_run import initial_evaluation
from notus.evaluation.resolve_model import ChatSettings, ModelSource
from notus.evaluation.score import Lengths, Scored, Scores, read_model, score_rows, tokenize, tokenizer_for
from notus.model.export import load_causal_lm
from notus.runtime import switches
from notus.runtime.distributed import process_group
from notus.runtime.process import tell
from notus.training import dpo, sft
from notus.training.callbacks import Callback, Caller
from notus.training.checkpoint import checkpoints_in
from notus.training.inputs import Inputs
from notus.training.parallelize import COMPUTE_DTYPES
from notus.training.run_folder import CHECKPOINTS, CONFIG_FILE, MODEL, is_finished
from notus.training.tracking import METRICS_FILE

if TYPE_CHECKING:
    import datasets

Rows = "datasets.Dataset | Sequence[Mapping[str, Any]]"

__all__ = ["Callback", "Result", "Scores", "load_result", "score", "train"]


@dataclasses.dataclass(frozen=True)
class Result:
    """A run, as it is on disk.

    Attributes:
        output_dir: the run's folder.
        config: its resolved config.
        finished: False if it was stopped early; the same call of `train` resumes it.
        metrics: the lines of `metrics.jsonl`: `step`, `loss`, `rewards/accuracies` and so on. Evaluations are among
            them, as keys that start with `eval_`.
        evaluations: those on held-out rows: `step` and the keys that start with `eval_`. Step 0 is before training.
        model_path: the final model or adapter, in Hugging Face layout; None while the run is not finished.
        checkpoint: the newest checkpoint; None if there is none.
    """

    output_dir: Path
    config: Config
    finished: bool
    metrics: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    model_path: Path | None
    checkpoint: Path | None

    def load_model(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the trained model, with a LoRA adapter merged into it, and its tokenizer.

        Args:
            dtype: of the weights; None: that of `training.precision`.
            device: where to put it.

        Raises:
            ValueError: the run is not finished.
        """
        if self.model_path is None:
            raise ValueError(
                f"{self.output_dir}: this run is not finished, so it has no model yet; resume it, or export its newest "
                "checkpoint with `notus export`"
            )
        with _process_unchanged():
            return load_causal_lm(
                self.model_path,
                dtype=dtype or COMPUTE_DTYPES[self.config.training.precision],
                device=device,
                trust_remote_code=self.config.model.trust_remote_code,
            )


def train(
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
    *,
    task: Task | None = None,
    train: "datasets.Dataset | Sequence[Mapping[str, Any]] | None" = None,
    eval: "datasets.Dataset | Sequence[Mapping[str, Any]] | None" = None,
    model: PreTrainedModel | str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Callback] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Result:
    """Train a model, as `notus dpo` and `notus sft` do, and return the run.

    A second call with the same arguments resumes the run, or returns it at once if it is finished. Under torchrun, all
    ranks call it with the same arguments; rank 0 writes.

    Ctrl-C during training saves a checkpoint after the current step and then raises KeyboardInterrupt; a second one
    raises it at once. In a thread that is not the main one, signals are left alone.

    Args:
        config: a nested mapping `{section: {key: value}}`, the path of a YAML file, or a `Config`. docs/config.md has
            the keys.
        task: "dpo" or "sft"; None: that of a `Config`, else "dpo".
        train: training rows, as a list of mappings or a `datasets.Dataset`, in any form that docs/data.md describes.
            They are written to `OUTPUT_DIR/inputs`, and replace those that `data.train` names. None: that names them.
        eval: the same for evaluation. They replace `data.eval`, and `data.eval_size` training rows.
        model: a folder, a hub id or a loaded transformers model, which replaces that of `model.name_or_path`; None:
            that names it. A loaded model is copied to `OUTPUT_DIR/inputs/model` and left as it is; a folder or hub id
            needs no copy.
        tokenizer: of a loaded model; None: the one of the folder or hub id that the model was loaded from.
        callbacks: objects of classes derived from `Callback`.
        overrides: values that replace those of the config, by key: `{"dpo.beta": 0.2}`.

    Raises:
        ValueError: a mistake in the arguments, the config, the data or the model, in one line that says what to
            change; also a loss that is not finite.
        OSError: a file cannot be written.
        RuntimeError: under torchrun, other ranks are lost.
    """
    tree, source, task = _read(config, task)
    _override(tree, overrides or {})
    inputs = Inputs(_output_dir(tree, source))
    _check_given_once(overrides or {}, {"train": train, "eval": eval, "model": model})
    rows = {name: given for name, given in (("train", train), ("eval", eval)) if given is not None}
    paths = {name: str(inputs.add_rows(name, given)) for name, given in rows.items()}
    replaced = _replace(tree, "data", paths)
    if eval is not None:
        replaced += _replace(tree, "data", {"eval_size": 0})
    if "train" not in (tree.get("data") or {}):
        raise ValueError(f"{source}: there is no training data: pass train=, or set data.train")
    replaced += _name_model(tree, model, tokenizer, inputs)
    resolved = config_from_dict(tree, task, source=source)
    if replaced and os.environ.get("RANK", "0") == "0":
        tell(f"{source}: the arguments of train replace {', '.join(replaced)}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ValueError(f"callbacks: {callback!r} is no notus.Callback; derive its class from that")
    run = dpo.run if task == "dpo" else sft.run
    with _process_unchanged(), inputs.naming_rows():
        switches.disabled_names()  # a mistyped name fails before any work
        run(resolved, Caller(tuple(callbacks), inputs, owns_process=False))
    return load_result(resolved.training.output_dir)


def load_result(folder: str | os.PathLike[str]) -> Result:
    """Read a run from its folder, whether it is finished or not.

    Raises:
        ValueError: there is no run in the folder, or it cannot be read.
    """
    run = Path(folder).expanduser()
    path = run / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{run}: there is no {CONFIG_FILE}, so this is no run's folder")
    tree = read_yaml(path)
    task: Task = "dpo" if isinstance(tree, dict) and "dpo" in tree else "sft"
    finished = is_finished(run)
    checkpoints = checkpoints_in(run / CHECKPOINTS)
    metrics = _read_lines(run / METRICS_FILE)
    return Result(
        output_dir=run,
        config=load_config(path, task),
        finished=finished,
        metrics=metrics,
        evaluations=_evaluations([*initial_evaluation(run), *metrics]),
        model_path=run / MODEL if finished else None,
        checkpoint=checkpoints[0] if checkpoints else None,
    )


def _evaluations(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    found = [
        {name: value for name, value in line.items() if name == "step" or name.startswith("eval_")} for line in metrics
    ]
    return [line for line in found if len(line) > 1]


def _read_lines(path: Path) -> list[dict[str, float]]:
    """The whole lines of a JSON Lines file; one that is being written is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith(b"\n")]
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as metrics ({error}); restore the file") from error


def score(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: "datasets.Dataset | Sequence[Any] | str | os.PathLike[str]",
    *,
    reference: PreTrainedModel | str | os.PathLike[str] | None = None,
    beta: float = 0.1,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    chat_template: str | None = None,
    columns: Mapping[str, str] | None = None,
    tokens_per_row: int = 4096,
    precision: Literal["bf16", "fp32"] | None = None,
    trust_remote_code: bool = False,
) -> Scores:
    """Compute the log-probs of completions, and with a reference their DPO rewards.

        scores = notus.score(model, tokenizer, pairs, reference="HuggingFaceTB/SmolLM2-135M-Instruct")
        scores.logps, scores.tokens, scores.margins

    The packed path is used where a check shows that it computes what the model's own forward pass does. Elsewhere the
    model's own forward pass is used. A loaded model stays on its device and is not changed. Under torchrun, all ranks
    call this with the same arguments and share the rows.

    Args:
        model: a loaded transformers model (also one with PEFT adapters), or the folder or hub id of a model, an adapter
            or a run.
        tokenizer: of the model; None: that of its folder or hub id, or of those that a loaded model is from.
        pairs: rows in any form that training takes: pairs, lists, labelled answers or demonstrations, as a list of
            mappings, a `datasets.Dataset` or a file; or a list of tuples (prompt, completion). The first row decides
            which of them.
        reference: what the rewards are relative to, given as the model is.
        beta: scale of the rewards.
        max_length: most tokens of prompt and completion; longer rows are cut as in training. None: nothing is cut, and
            a row that is longer than the model's context is an error.
        max_prompt_length: prompt tokens to keep of a row that is too long; None: half of `max_length`.
        chat_template: "zephyr" or a `.jinja` file; None: that of the run or the tokenizer.
        columns: what the rows call their columns, `{their name: ours}`.
        tokens_per_row: most tokens of a packed row. It bounds the memory.
        precision: "bf16" or "fp32", of models that are loaded here; a loaded model computes in its own dtype. None:
            that of the run, else bf16 on a GPU and fp32 on a CPU.
        trust_remote_code: run Python code that comes with a model.

    Raises:
        ValueError: a mistake in the arguments, the rows or the models, in one line that says what to change.
    """
    if tokens_per_row < 1 or beta <= 0:
        raise ValueError(f"tokens_per_row and beta must be above 0, not {tokens_per_row} and {beta}")
    given = {"model": model} if reference is None else {"model": model, "reference": reference}
    with _process_unchanged(), process_group() as home:
        models = {name: read_model(each, name, device=home, trust=trust_remote_code) for name, each in given.items()}
        policy, _ = models["model"]
        tokenizer = tokenizer_for(policy, tokenizer, trust_remote_code)
        chat, lengths = _chat_of(policy, chat_template), Lengths(max_length, max_prompt_length)
        rows, report = tokenize(pairs, tokenizer, chat, lengths, columns or {})
        found = {}
        for name, (each, device) in models.items():
            computed = precision or _precision(each, device)
            scoring = Scoring(rows, tokenizer, computed, device, tokens_per_row, trust_remote_code)
            found[name] = score_rows(each, name, scoring)
    return _scores(found["model"], found.get("reference"), rows, report, beta)


def _chat_of(model: torch.nn.Module | ModelSource, chat_template: str | None) -> ChatSettings:
    """How conversations become strings: as the model's run had it, with the caller's template."""
    chat = ChatSettings.of_run(model.settings) if isinstance(model, ModelSource) else ChatSettings()
    return chat if chat_template is None else dataclasses.replace(chat, chat_template=chat_template)


def _scores(model: Scored, reference: Scored | None, rows: TokenizedDataset, report: DropReport, beta: float) -> Scores:
    return Scores(
        logps=model.logps,
        tokens=torch.from_numpy(rows.loss_tokens),
        rows=torch.from_numpy(rows.stored_rows),
        report=report,
        reference_logps=None if reference is None else reference.logps,
        beta=beta,
        path=model.path,
        path_reason=model.reason,
    )


def _precision(model: torch.nn.Module | ModelSource, device: torch.device) -> str:
    default = "bf16" if device.type == "cuda" else "fp32"
    return model.choose(None, "training.precision", default) if isinstance(model, ModelSource) else default


# ---- arguments -> config ----


def _read(
    config: Config | Mapping[str, Any] | str | os.PathLike[str], task: Task | None
) -> tuple[dict[str, Any], str, Task]:
    """The config as a nested mapping of its own, what errors call it, and the task."""
    if task not in (None, "dpo", "sft"):
        raise ValueError(f"task: must be 'dpo' or 'sft', not {task!r}")
    if isinstance(config, Config):
        if task not in (None, config.task):
            raise ValueError(f"task: is {task!r}, and the config is one for {config.task!r}")
        used = [name for name in SECTIONS if config.task == "dpo" or name not in ("dpo", "reference")]
        found = {name: dataclasses.asdict(getattr(config, name)) for name in used}
        return (
            {name: {key.rstrip("_"): value for key, value in keys.items()} for name, keys in found.items()},
            "config",
            config.task,
        )
    source, tree = "config", config
    if isinstance(config, str | os.PathLike):
        source = os.path.expanduser(os.fspath(config))
        tree = read_yaml(Path(source))
    if not isinstance(tree, Mapping) or not all(isinstance(keys, Mapping | None) for keys in tree.values()):
        raise ValueError(f"{source}: must map the sections {', '.join(SECTIONS)} to mappings of keys to values")
    return {name: _plain(keys or {}) for name, keys in tree.items()}, source, task or "dpo"


def _plain(value: Any) -> Any:
    """A value as YAML has it: paths as strings, tuples as lists, NumPy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):  # of a grid, say: np.logspace
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _override(tree: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    for name, value in overrides.items():
        section, _, key = str(name).partition(".")
        if section not in SECTIONS or not key:
            raise ValueError(f"overrides: {name!r} is no key of the form 'section.key', such as 'dpo.beta'")
        place = tree.setdefault(section, {})
        key, _, entry = key.partition(".")
        place[key] = {**(place.get(key) or {}), entry: _plain(value)} if entry else _plain(value)


def _output_dir(tree: Mapping[str, Any], source: str) -> Path:
    found = tree.get("training", {}).get("output_dir")
    if not isinstance(found, str) or not found:
        raise ValueError(f"{source}: training.output_dir is required: the folder of the run")
    return Path(found).expanduser()


# What an argument of `train` stands for.
_KEYS = {"train": ("data.train",), "eval": ("data.eval", "data.eval_size"), "model": ("model.name_or_path",)}


def _check_given_once(overrides: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if one call gives the same thing twice: it does not say which of them is meant."""
    for name, value in arguments.items():
        for key in _KEYS[name]:
            if value is not None and key in overrides:
                raise ValueError(f"overrides: has {key!r}, which the argument {name}= stands for: pass one of them")


def _replace(tree: dict[str, Any], section: str, values: Mapping[str, Any]) -> list[str]:
    """Set keys of a section in `tree`. Returns those that had another value, as "section.key"."""
    held = tree.get(section, {})
    tree[section] = {**held, **values}
    return [f"{section}.{key}" for key, value in values.items() if held.get(key, value) not in (None, value)]


def _name_model(
    tree: dict[str, Any],
    model: PreTrainedModel | str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    inputs: Inputs,
) -> list[str]:
    """Let `model.name_or_path` name the model that was passed; returns the key if it named another one."""
    if model is None or isinstance(model, str | os.PathLike):
        if tokenizer is not None:
            raise ValueError(
                "tokenizer: has no effect unless model= is a loaded model; a folder or hub id comes with its own"
            )
        if model is None:
            return []
        return _replace(tree, "model", {"name_or_path": os.fspath(model)})
    return _replace(tree, "model", {"name_or_path": str(inputs.add_model(model, tokenizer))})


# ---- the process ----


@contextlib.contextmanager
def _usual_modes() -> Iterator[None]:
    """Compute as in a process of its own, whatever modes the caller is in: `no_grad`, autocast, another default dtype.

    Under autocast, say, a run with training.precision=fp32 would else compute in bf16.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        yield


@contextlib.contextmanager
def _process_unchanged() -> Iterator[None]:
    """Leave the process as it was: random numbers, the current GPU, settings of libraries, hooks, memory.

    Raises ValueError if it has a process group already.
    """
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is initialized in this process already, and a run starts a process group of its own: "
            "call torch.distributed.destroy_process_group() first, or run in a process of its own"
        )
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.current_device() if on_gpu else None
    bars, duck_shape = transformers.utils.logging.is_progress_bar_enabled(), symbols.use_duck_shape
    hook = sys.excepthook  # each process group puts one before it that writes "[rank0]: " and holds the group
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []), _usual_modes():
            yield
    finally:
        symbols.use_duck_shape, sys.excepthook = duck_shape, hook
        if bars:
            transformers.utils.logging.enable_progress_bar()
        if device is not None:
            torch.cuda.set_device(device)
        gc.collect()  # FSDP's state and its modules refer to each other
        if on_gpu:
            torch.cuda.empty_cache()
