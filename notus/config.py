"""The settings of a run: one dataclass per section, a description below each field.

They are filled from a YAML file and `--section.key=value` overrides. A key that does not exist, a value of the wrong
type or out of range, and a setting that other settings leave without effect are errors.

The order here: the sections, the whole config, loading and saving, checks across keys, typed values, YAML.
"""

import dataclasses
import datetime
import difflib
import itertools
import json
import keyword
import os
import re
import reprlib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from notus import foreign_keys

if TYPE_CHECKING:
    from notus.losses import Loss

T = TypeVar("T")
Task = Literal["dpo", "sft"]
Rows = Literal["dpo", "sft", "lists", "labels"]

# Values are taken as they are: "1" is no number, 1 is not true. An integer may stand for a float.
EXACT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
String = Annotated[str, MinLen(1), "string"]
FilePath = Annotated[String, AfterValidator(os.path.expanduser)]  # or a hub id, which begins with no ~
Strings = Annotated[list[String], MinLen(1), "list of strings"]
NoneOrMore = Annotated[list[String], "list of strings"]
Count = Annotated[int, Ge(1), Lt(2**63)]
Index = Annotated[int, Ge(0), Lt(2**63)]
Held = Annotated[Index | Annotated[float, Gt(0), Lt(1)], "integer >= 0 or number > 0 and < 1"]
Share = Annotated[float, Ge(0), Le(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Names = Annotated[dict[String, String], "mapping of strings to strings"]
Arguments = Annotated[dict[String, Any], "mapping of strings to values"]
LossType = Annotated[String | dict[String, Positive], "string or mapping of strings to numbers > 0"]
Options = Annotated[dict[String, float | String], "mapping of strings to numbers or strings"]


def _as_day(value: Any) -> str:
    """Return a date as YYYY-MM-DD; YAML reads one without quotes as a date of its own."""
    return value.isoformat() if type(value) is datetime.date else datetime.date.fromisoformat(str(value)).isoformat()


Day = Annotated[str, BeforeValidator(_as_day), "date (YYYY-MM-DD)"]


@dataclass(frozen=True, kw_only=True, config=EXACT)
class DataSource:
    """One source of rows. `DataConfig` holds it as a plain mapping with every key set."""

    path: FilePath
    """A file (JSON, JSON Lines, Parquet, CSV), a folder or a hub id. In YAML, a string alone stands for `{path:
    ...}`."""
    split: String = "train"
    """The split of a hub dataset to read."""
    weight: Positive = 1.0
    """Share of the source's rows to use. Above 1, rows repeat."""


def _as_sources(value: Any) -> list[dict[str, Any]]:
    """Return a list of mappings with every key set, from one source or a list; a string is the path of a source."""
    sources = value if isinstance(value, list) else [value]
    return [
        dataclasses.asdict(_fill(DataSource, source if isinstance(source, dict) else {"path": source}))
        for source in sources
    ]


Sources = Annotated[
    list[dict[str, Any]], BeforeValidator(_as_sources), MinLen(1), "path or list of {path, split, weight}"
]


@dataclass(frozen=True, kw_only=True, config=EXACT)
class ModelConfig:
    """The model that a run starts from."""

    name_or_path: FilePath
    """The model: a folder in Hugging Face layout, a hub id, an adapter, or the folder of an earlier run."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. Turn it on only for authors you trust."""
    path: Literal["auto", "packed", "plain"] = "auto"
    """How log-probs are computed. "packed": a prompt is shared by its completions, and nothing is padded. "plain": the
    model's own forward pass on each completion; slower, and for every model. "auto": packed if a check at the start
    finds it equal to the model's own forward pass, otherwise plain. The log says which, and why."""
    adapter: FilePath | None = None
    """A LoRA adapter to start from, made by this project or by PEFT. It is merged into the model first, unless
    `lora.continue` trains it further. It is part of the reference, too."""
    quantization: Literal["nf4"] | None = None
    """"nf4" keeps the frozen weights of the blocks' linear layers in 4 bits (QLoRA, arXiv 2305.14314). It needs LoRA.
    null: no quantization."""


@dataclass(frozen=True, kw_only=True, config=EXACT)
class DataConfig:
    """The data, and how it becomes tokens."""

    train: Sources
    """The training data: a file (JSON, JSON Lines, Parquet, CSV), a folder, a hub id, or a list of `{path, split,
    weight}`."""
    eval: Sources | None = None
    """The evaluation data, given in the same ways. null: no evaluation, unless `eval_size` holds out training rows."""
    eval_size: Held = 0
    """How many training rows to hold out for evaluation: an integer, or a fraction such as 0.05. They are drawn with
    `training.seed`. A fraction is one of the different training rows. It is rounded up, and leaves at least one row to
    train on."""
    max_length: Count = 1024
    """Longest prompt and completion together, in tokens. SFT cuts longer rows at their end. DPO cuts the prompt first,
    to `max_prompt_length`. If that is not enough, it cuts completions to `max_length` - `max_prompt_length`, as the
    original DPO code did, even if the prompt is shorter than that."""
    max_prompt_length: Count | None = None
    """DPO: how many tokens to keep of the prompt's end if a pair is too long. null: 512, but at most half of
    `max_length`."""
    shuffle: bool = True
    """Shuffle the rows for each epoch, seeded by `training.seed`. false: keep the order of the data."""
    columns: Names = field(default_factory=dict)
    """Rename the columns of the data to those of docs/data.md: `{their name: our name}`. Our name `unused` leaves a
    column out."""
    too_long: Literal["cut", "drop"] = "cut"
    """What to do with a row that is longer than `max_length`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be read. "error" stops the run. "skip" leaves the row out and counts it."""
    exclude: FilePath | None = None
    """A file of row ids to leave out, one per line. `notus data --html` exports such files."""
    chat_template: FilePath | None = None
    """The chat template: "zephyr", or a `.jinja` file. null: the tokenizer's own, or Zephyr's if it has none."""
    chat_template_kwargs: Arguments = field(default_factory=dict)
    """Arguments for the chat template, for example `{enable_thinking: false}`. A row's own arguments win."""
    template_date: Day | None = None
    """The date (YYYY-MM-DD) that a chat template uses for today. null: the day the run started, which is recorded."""
    add_empty_system: bool = False
    """Add an empty system turn to conversations that have none, as Notus 7B v1 did."""
    mask_history: bool = False
    """Learn only the last assistant turn of a conversation."""
    split_special_tokens: bool = False
    """Read special tokens in a message's text as plain text, so that no message can write control tokens."""
    new_tokens: NoneOrMore = field(default_factory=list)
    """Special tokens to add to the tokenizer. If the embedding and the head have no rows for them, new rows are added,
    which start as the mean of the others. With LoRA, name the embedding and the head in `lora.modules_to_save`."""
    num_workers: Count = 1
    """How many processes tokenize the data. 1: only this one."""
    cache_dir: FilePath | None = None
    """Folder for tokenized rows, which are kept between runs. null: the cache folder of `datasets`."""


@dataclass(frozen=True, kw_only=True, config=EXACT)
class TrainingConfig:
    """How the model is trained, and what the run saves."""

    output_dir: FilePath
    """The run's folder: resolved config, metrics, checkpoints and the final model."""
    batch_size: Count = 64
    """Examples per optimizer step, over all GPUs together. An example of DPO is a pair, a list or a labelled answer."""
    tokens_per_row: Count = 4096
    """Tokens in one packed row. Each GPU computes one row per forward pass. This affects memory and speed, not the
    result."""
    epochs: Count = 3
    """Passes over the training data."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps, even if the epochs are not over. null: run all epochs."""
    learning_rate: Positive = 5e-7
    """Peak learning rate."""
    lr_schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """The learning rate after warm-up. "linear" and "cosine" decay until the last step, "constant" stays at the peak,
    "wsd" (warm-up, stable, decay) stays at the peak and decays linearly over the last `decay_ratio` of the steps."""
    min_lr_ratio: Share = 0.0
    """Where linear, cosine and wsd end, as a share of the peak. 0: at zero."""
    warmup_ratio: Share = 0.1
    """Share of all steps in which the learning rate rises linearly from zero, rounded up to whole steps."""
    warmup_steps: Index | None = None
    """Warm-up as a number of steps, in place of `warmup_ratio`. null: use `warmup_ratio`."""
    decay_ratio: Annotated[float, Gt(0), Le(1)] = 0.1
    """For wsd: share of all steps, the last ones, in which the learning rate decays, rounded up to whole steps."""
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    """The optimizer: RMSprop, which keeps one state per parameter, or AdamW, which keeps two."""
    optimizer_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """Dtype of the optimizer's states. bf16 takes half the memory of fp32; it rounds at random, so that small changes
    are not lost. int8 takes a quarter: it keeps AdamW's states in blocks with a scale each (arXiv 2110.02861), and
    needs torchao."""
    router_aux_loss_coef: NonNegative = 0.0
    """Weight of the load-balancing loss of mixture-of-experts routers, averaged over the step's examples. 0: none."""
    weight_decay: NonNegative = 0.0
    """Weight decay, applied as torch's optimizer of that name does."""
    weight_decay_exclude: NoneOrMore = field(default_factory=lambda: ["bias", "norm"])
    """Parameters without weight decay: those whose name contains one of these words, and for "norm" all normalisation
    layers. The default excludes what transformers' Trainer excludes. []: decay all parameters."""
    max_grad_norm: NonNegative | None = 1.0
    """Clip gradients to this global norm. null or 0: log the norm, clip nothing."""
    seed: Index = 42
    """Seed of shuffling, of LoRA's dropout and initial weights, and of the held-out rows."""
    deterministic: bool = False
    """Use deterministic algorithms, so that a run repeats bit for bit on the same machine with the same number of
    ranks. Operations without such an algorithm raise an error. On a GPU, a resumed run equals an uninterrupted one bit
    for bit only with this, because otherwise the attention's backward pass adds gradients in any order. A CPU does not
    need it. Its cost on a GPU: not run."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Dtype of the forward and backward pass. Master weights, sums and losses are always fp32."""
    activation_checkpointing: Literal["none", "products", "selective", "full", "auto"] = "full"
    """Which activations a block keeps for the backward pass, which recomputes the others bit for bit. "none": keep
    everything, which is fastest and takes most memory. "products": keep the outputs of matrix products and attention.
    "selective": keep those of every second product and of attention. "full": keep only the block's input. "auto": the
    first of these, in this order, that is estimated to fit into memory."""
    compile: bool = False
    """Compile each block with torch.compile."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer states in host memory. This is slow, and for GPUs only. A toy run on a GPU
    gave the same result with and without it. Its speed: not run."""
    sharding: Literal["full", "hybrid"] = "full"
    """How GPUs share the model. "full": each rank holds a part of it. "hybrid": each node holds all of it, divided
    among its ranks."""
    timeout_minutes: Annotated[float, Gt(0), Le(525_600)] = 30.0
    """How long a rank waits for the others before it fails. Rank 0's work before training has no limit."""
    log_every: Count = 1
    """Steps between lines of `metrics.jsonl`. Its `pairs_per_second` counts rows of any kind: pairs, lists, labelled
    answers."""
    eval_every: Count | None = None
    """Steps between evaluations. null: at the end only."""
    eval_at_start: bool = True
    """Also evaluate before the first step, if there is evaluation data: `initial_evaluation.json` in the run's folder.
    With a reference model this needs no forward pass, because the policy is still the reference."""
    best_metric: String | None = None
    """An evaluation metric such as `eval_loss`: the model with its best value becomes the final one. The name says
    whether higher or lower is better. null: the last model is the final one."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations in a row without a new best `best_metric`. null: do not stop early."""
    save_every: Count | None = None
    """Steps between checkpoints. null: at the end of each epoch."""
    keep_checkpoints: Count | None = 2
    """How many of the newest checkpoints to keep. null: all. With two, a run can resume even if the newest is
    damaged."""
    keep_every: Count | None = None
    """Also keep the checkpoint of every so many steps, a multiple of `save_every`."""
    async_checkpoints: bool = True
    """Write checkpoints in the background, from a copy in host memory. false: wait for them, and make no copy."""
    max_hours: Positive | None = None
    """Stop with a checkpoint at the first step after this many hours of one launch. The same command resumes."""
    extend: bool = False
    """Continue a begun or finished run to a raised `max_steps` or `epochs`. Without it, raising them is an error."""
    resume: FilePath = "auto"
    """What to resume from. "auto": the newest checkpoint in `output_dir`. "never": nothing; start over. Otherwise the
    folder of a checkpoint."""


@dataclass(frozen=True, kw_only=True, config=EXACT)
class DPOConfig:
    """The preference loss. `notus.losses` has the equations."""

    beta: Positive = 0.1
    """How strongly the policy is kept near the reference. For a loss without a reference: the scale of its rewards."""
    loss_type: LossType = "sigmoid"
    """The name of the loss, or `{name: weight}` for a weighted sum. docs/losses.md lists all losses, and says which of
    them learn from pairs, from lists of rated answers, or from single answers with a label."""
    label_smoothing: Annotated[float, Ge(0), Le(0.5)] = 0.0
    """Assumed share of swapped labels, for the losses that have this option. In a sum, it applies to those that do."""
    options: Options = field(default_factory=dict)
    """Further options of the loss: `{name: value}`. docs/losses.md lists them. In a sum, each loss gets the options
    that it takes. On the command line also `--dpo.options.NAME=VALUE`."""
    nll_weight: NonNegative = 0.0
    """Weight of an added term: the negative log-likelihood of the chosen completions, or of a list's best rated
    ones."""
    nll_mean: Literal["tokens", "completions"] = "tokens"
    """How that term is averaged: over the step's chosen tokens, or first over each completion and then over the step's
    completions, as in Iterative RPO (arXiv 2404.19733)."""
    ld_alpha: Annotated[float, Ge(0), Lt(1)] | None = None
    """LD-DPO (arXiv 2409.06411): the weight of tokens beyond the length of the pair's shorter completion. null: all
    tokens count alike."""
    wpo: bool = False
    """WPO (arXiv 2406.11827): weight each pair by how likely the policy itself is to write its completions."""


@dataclass(frozen=True, kw_only=True, config=EXACT)
class ReferenceConfig:
    """The reference model's log-probs, which are computed once and cached. Losses without a reference need none."""

    model: FilePath | None = None
    """The reference: a model, an adapter, a run or a hub id, as in `model.name_or_path`, with the same tokenizer as the
    policy. It is scored and freed before the policy is loaded. null: the model that the run starts from."""
    cache_dir: FilePath | None = None
    """Folder of the cache, which several runs may share. null: `reference` in the run's folder."""


@dataclass(frozen=True, kw_only=True, config=EXACT)
class LoraConfig:
    """Low-rank adapters, trained in place of all weights."""

    rank: Index = 0
    """Rank of the adapters. 0: full fine-tuning."""
    alpha: Positive = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout on the adapters' input."""
    target_modules: Strings | Literal["all-linear"] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    """Names of the linear layers that get adapters, or "all-linear". The latter leaves out the language-model head, and
    layers where an adapter would have no effect or PEFT would not load it."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""
    modules_to_save: NoneOrMore = field(default_factory=list)
    """Names of modules to train in full beside the adapters, such as `embed_tokens` and `lm_head`. They are saved with
    the adapters."""
    continue_: bool = False
    """Train an existing adapter further: that of `model.adapter`, or of a run in `model.name_or_path`. Its rank, alpha
    and targets must be these. The reference is the model with that adapter."""


@dataclass(frozen=True, kw_only=True, config=EXACT)
class TrackingConfig:
    """What a run logs besides `metrics.jsonl`."""

    wandb: bool = False
    """Log to Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard events to `tensorboard` in the run's folder."""
    project: String = "notus"
    """Weights & Biases project."""
    run_name: String | None = None
    """Weights & Biases run name. null: the name of the run's folder."""
    samples: Index = 4
    """How many prompts the model completes greedily at step 0, at each evaluation and at the end. They are the first of
    the evaluation data, or else of the training data. 0: none."""
    sample_tokens: Count = 48
    """Longest such completion, in tokens. Sharded ranks gather the whole model once for each token."""


@dataclass(frozen=True, kw_only=True, config=EXACT)
class Config:
    """A whole run. `task` comes from the entry, not from the file."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    dpo: DPOConfig = field(default_factory=DPOConfig)
    reference: ReferenceConfig = ReferenceConfig()
    lora: LoraConfig = field(default_factory=LoraConfig)
    tracking: TrackingConfig = TrackingConfig()
    task: Task = "dpo"

    @property
    def rows(self) -> Rows:
        """Which rows of data the run learns from; see `notus.data.formats.Task`."""
        if self.task == "sft":
            return "sft"
        from notus.losses import loss_components  # imports torch

        kind = next(iter(loss_components(self.dpo.loss_type))).rows
        return "dpo" if kind == "pairs" else kind


SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "dpo": DPOConfig,
    "reference": ReferenceConfig,
    "lora": LoraConfig,
    "tracking": TrackingConfig,
}
DPO_SECTIONS = ("dpo", "reference")


# ---- loading and saving ----


def load_config(arguments: str | Path | Sequence[str], task: Task) -> Config:
    """Return the config of `CONFIG.yaml [--section.key=value ...]`: a path alone, or a command line's arguments.

    Later overrides win over earlier ones, and all over the file. Raises ValueError, naming the file or
    "command line", the key and the remedy, for anything that is not a valid configuration of a `task` run.
    """
    words = [str(arguments)] if isinstance(arguments, str | Path) else list(arguments)
    tree, source, origins = read_arguments(words, task)
    return config_from_dict(tree, task, source=source, origins=origins)


def config_from_dict(
    tree: dict[str, Any], task: Task, *, source: str = "config", origins: dict[str, str] | None = None
) -> Config:
    """Return the config of a nested mapping `{section: {key: value}}`. Raises ValueError as `load_config` does.

    Errors name `source`, or what `origins` has for the "section.key" that is wrong.
    """
    try:
        config = _resolve(Config(**fill_sections(tree, SECTIONS), task=task))
        for conflict in _conflicts(config):
            raise conflict
    except Invalid as error:
        raise ValueError(f"{(origins or {}).get(error.key, source)}: {error}") from None
    return config


def to_yaml(config: Config) -> str:
    """Return the config as YAML that loads to an equal one, without the sections that its task does not use."""
    unused = DPO_SECTIONS if config.task == "sft" else ()
    return dump_yaml({name: section_keys(getattr(config, name)) for name in SECTIONS if name not in unused})


def section_keys(section: Any) -> dict[str, Any]:
    """Return a section as it stands in YAML: a field that would be a word of Python's ends with an underscore."""
    return {key.rstrip("_"): value for key, value in dataclasses.asdict(section).items()}


def save_config(config: Config, path: str | Path) -> None:
    """Write `to_yaml(config)` to the file `path`."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def _resolve(config: Config) -> Config:
    """Fill in what depends on other keys, so that the saved config says what the run does."""
    data, training = config.data, config.training
    if config.task == "dpo" and data.max_prompt_length is None:
        data = dataclasses.replace(data, max_prompt_length=max(1, min(512, data.max_length // 2)))
    if training.max_grad_norm == 0:
        training = dataclasses.replace(training, max_grad_norm=None)
    return dataclasses.replace(config, data=data, training=training)


# ---- checks across keys ----


class Invalid(ValueError):
    """The value of `key` is wrong; the message starts with the key."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key} {reason}")
        self.key = key


def _conflicts(config: Config) -> Iterator[Invalid]:
    """Yield what contradicts other keys of a resolved config, or would be ignored because of them."""
    if config.lora.rank == 0:
        yield from _without_effect("lora", config.lora, "while lora.rank is 0: set lora.rank, or")
    yield from _model_conflicts(config)
    tracking = config.tracking
    if not tracking.wandb:
        why = "while tracking.wandb is false: set that, or"
        yield from _without_effect("tracking", tracking, why, keys=("project", "run_name"))
    if not tracking.samples:
        why = "while tracking.samples is 0: set that, or"
        yield from _without_effect("tracking", tracking, why, keys=("sample_tokens",))
    if config.task == "sft":
        for name, section in (("dpo", config.dpo), ("reference", config.reference)):
            yield from _without_effect(name, section, "in SFT: run the command dpo, or set")
    yield from _checkpoint_conflicts(config.training)
    yield from _schedule_conflicts(config.training)
    yield from _evaluation_conflicts(config)
    yield from _data_conflicts(config)
    if config.task == "dpo":
        yield from _loss_conflicts(config)


def _without_effect(name: str, section: Any, why: str, keys: tuple[str, ...] | None = None) -> Iterator[Invalid]:
    """Yield the first key of an optional section, or of those in `keys`, that was moved away from its default."""
    yield from _moved(name, section, dataclasses.asdict(type(section)()), why, keys)


def _moved(
    name: str, section: Any, defaults: Mapping[str, Any], why: str, keys: tuple[str, ...] | None
) -> Iterator[Invalid]:
    """Yield the first key without effect. Its message ends with the values that turn all of them off.

    A key may stand in a file that the user does not want to change, and the command line can set a key but not remove
    one.
    """
    moved = {
        f"{name}.{key.rstrip('_')}": default
        for key, default in defaults.items()
        if (keys is None or key in keys) and getattr(section, key) != default
    }
    if moved:
        off = " ".join(f"{key}={_short_yaml(default)}" for key, default in moved.items())
        yield Invalid(next(iter(moved)), f"has no effect {why} {off}")


def _short_yaml(value: Any) -> str:
    """Return a value as it can be written in YAML and, without quotes, on a command line."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def _model_conflicts(config: Config) -> Iterator[Invalid]:
    model, training = config.model, config.training
    if model.quantization and config.lora.rank == 0:
        yield Invalid("model.quantization", "needs adapters, since quantized weights are not trained: set lora.rank")
    if model.path == "plain" and training.compile:
        yield Invalid("training.compile", "has no effect with model.path 'plain': set training.compile=false")
    if training.router_aux_loss_coef and training.compile:
        yield Invalid("training.router_aux_loss_coef", "reads routers between operations: set training.compile=false")
    if training.optimizer_dtype == "int8" and training.optimizer != "adamw":
        yield Invalid("training.optimizer_dtype", "'int8' is for AdamW: set training.optimizer=adamw, or take bf16")


def _checkpoint_conflicts(training: TrainingConfig) -> Iterator[Invalid]:
    every, saved = training.keep_every, training.save_every
    if every is None:
        return
    if training.keep_checkpoints is None:
        reason = "has no effect while training.keep_checkpoints is null: set that, or training.keep_every=null"
        yield Invalid("training.keep_every", reason)
    if saved is None or every % saved:
        yield Invalid("training.keep_every", f"({every}) must be a multiple of training.save_every ({saved})")


def _schedule_conflicts(training: TrainingConfig) -> Iterator[Invalid]:
    """Yield what the learning rate's schedule or the optimizer would ignore."""
    schedule = training.lr_schedule
    if schedule == "constant" and training.min_lr_ratio:
        why = "with training.lr_schedule 'constant': set another one, or"
        yield from _changed(training, ("min_lr_ratio",), why)
    if schedule != "wsd":
        why = f"with training.lr_schedule {schedule!r}: set that to wsd, or"
        yield from _changed(training, ("decay_ratio",), why)
    if training.warmup_steps is not None:
        why = "beside training.warmup_steps: set training.warmup_steps=null, or"
        yield from _changed(training, ("warmup_ratio",), why)
    elif schedule == "wsd" and training.warmup_ratio + training.decay_ratio > 1:
        reason = f"({training.decay_ratio:g}) and training.warmup_ratio ({training.warmup_ratio:g}) are more than all"
        yield Invalid("training.decay_ratio", f"{reason} steps: lower one of them")
    if not training.weight_decay:
        why = "while training.weight_decay is 0: set that, or"
        yield from _changed(training, ("weight_decay_exclude",), why)
    if training.extend and training.resume == "never":
        why = "with training.resume=never, which starts over: set training.resume=auto, or"
        yield from _changed(training, ("extend",), why)


def _changed(training: TrainingConfig, keys: tuple[str, ...], why: str) -> Iterator[Invalid]:
    """`_without_effect` for the section whose keys do not all have defaults."""
    yield from _moved("training", training, dataclasses.asdict(TrainingConfig(output_dir="-")), why, keys)


def _evaluation_conflicts(config: Config) -> Iterator[Invalid]:
    """Yield what needs evaluations where there are none."""
    data, training = config.data, config.training
    if data.eval is None and not data.eval_size:
        why = "without evaluation data: set data.eval or data.eval_size, or"
        yield from _changed(training, ("eval_every", "eval_at_start", "best_metric", "early_stopping_patience"), why)
    if training.best_metric is not None and training.eval_every is None:
        reason = (
            "needs evaluations while the model learns, to choose from: set training.eval_every, or "
            "training.best_metric=null"
        )
        yield Invalid("training.best_metric", reason)
    if training.early_stopping_patience is not None and training.best_metric is None:
        reason = (
            "needs a metric to improve: set training.best_metric, for example to eval_loss, or "
            "training.early_stopping_patience=null"
        )
        yield Invalid("training.early_stopping_patience", reason)


def _data_conflicts(config: Config) -> Iterator[Invalid]:
    data, prompt = config.data, config.data.max_prompt_length
    if config.task == "sft" and prompt is not None:
        reason = "has no effect in SFT, which cuts long rows at their end: set data.max_prompt_length=null"
        yield Invalid("data.max_prompt_length", reason)
    if prompt is not None and prompt >= data.max_length:
        reason = f"({prompt}) must be below data.max_length ({data.max_length}), or nothing is left of the completions"
        yield Invalid("data.max_prompt_length", reason)
    if data.eval is not None and data.eval_size > 0:
        yield Invalid("data.eval_size", "has no effect beside data.eval: set data.eval=null or data.eval_size=0")
    if data.chat_template not in (None, "zephyr") and not str(data.chat_template).endswith(".jinja"):
        instead = _other_value("data.chat_template", data.chat_template)
        reason = f"must be 'zephyr', a .jinja file or null, not {data.chat_template!r}{instead}"
        yield Invalid("data.chat_template", reason)


def _loss_conflicts(config: Config) -> Iterator[Invalid]:
    """Hold the loss and its options against the registry of losses."""
    from notus.losses import LOSSES, loss_components  # imports torch

    dpo = config.dpo
    for name in _components(dpo):
        if name not in LOSSES:
            yield Invalid("dpo.loss_type", f"{name!r} does not exist{_other_value('dpo.loss_type', name, LOSSES)}")
            return
    try:
        losses = list(loss_components(dpo.loss_type))
    except ValueError as error:
        yield Invalid("dpo.loss_type", f"is not possible: {error}")
        return
    if "label_smoothing" in dpo.options:
        yield Invalid("dpo.options", "holds label_smoothing, which has a key of its own: set dpo.label_smoothing")
        return
    yield from _option_conflicts(dpo, losses)
    yield from _term_conflicts(dpo, losses)
    if any(loss.shift == "kl" for loss in losses) and config.training.batch_size < 2:
        reason = f"must be at least 2 with dpo.loss_type {_named(losses)}, whose KL term is a mean over the step"
        yield Invalid("training.batch_size", reason)
    if not any(loss.reference for loss in losses):
        why = f"with dpo.loss_type {_named(losses)}, which has no reference: set"
        yield from _without_effect("reference", config.reference, why)


def _components(dpo: DPOConfig) -> list[str]:
    return [dpo.loss_type] if isinstance(dpo.loss_type, str) else list(dpo.loss_type)


def loss_name(dpo: DPOConfig) -> str:
    """Return `dpo.loss_type` as messages have it: the name in quotes, or those of a sum."""
    return ", ".join(map(repr, _components(dpo)))


def _named(losses: Iterable["Loss"]) -> str:
    return ", ".join(repr(loss.name) for loss in losses)


def _option_conflicts(dpo: DPOConfig, losses: Sequence["Loss"]) -> Iterator[Invalid]:
    """Yield options that none of the losses takes, and values that one of them cannot have."""
    from notus.losses import LOSSES

    given = given_options(dpo)
    for name in given:
        if not any(loss.option(name) for loss in losses):
            if takers := [loss.name for loss in LOSSES.values() if loss.option(name)]:
                off = "dpo.label_smoothing=0" if name == "label_smoothing" else "dpo.options={}"
                remedy = f": use one of {', '.join(takers)}, or set {off}"
            elif foreign := foreign_keys.find(name):
                remedy = f"; {foreign.advice()}"
            else:
                remedy = nearest(name, sorted({option.name for loss in LOSSES.values() for option in loss.options}))
            yield Invalid(_option_key(name), f"has no effect with dpo.loss_type {_named(losses)}{remedy}")
    for loss in losses:
        for option in loss.options:
            value = given.get(option.name, option.default)
            if not option.allows(value):
                reason = f"must be {option.limits} with dpo.loss_type {loss.name!r}, not {value!r}"
                yield Invalid(_option_key(option.name), reason)
            if option.name in given and option.only_with and not _has(losses, given, *option.only_with):
                other, needed = option.only_with
                yield Invalid(_option_key(option.name), f"has no effect unless {_option_key(other)} is {needed}")


def _has(losses: Iterable["Loss"], given: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether an option that one of the losses takes has this value."""
    options = [option for loss in losses if (option := loss.option(name)) is not None]
    return any(given.get(name, option.default) == value for option in options)


def _term_conflicts(dpo: DPOConfig, losses: Sequence["Loss"]) -> Iterator[Invalid]:
    """Yield what is added to a loss, or changes how tokens or pairs count, where that has no meaning."""
    rows, named = losses[0].rows, _named(losses)
    if dpo.nll_mean != "tokens" and not dpo.nll_weight:
        yield Invalid("dpo.nll_mean", "has no effect while dpo.nll_weight is 0: set that, or dpo.nll_mean=tokens")
    if dpo.nll_weight and rows == "labels":
        reason = f"is of pairs and lists, and dpo.loss_type {named} learns from labels: set dpo.nll_weight=0"
        yield Invalid("dpo.nll_weight", reason)
    for key, given, off in (("ld_alpha", dpo.ld_alpha is not None, "null"), ("wpo", dpo.wpo, "false")):
        if given and rows != "pairs":
            reason = f"is of pairs, and dpo.loss_type {named} learns from {rows}: set dpo.{key}={off}"
            yield Invalid(f"dpo.{key}", reason)
    per_token = [loss for loss in losses if loss.per_token]
    if dpo.ld_alpha is not None and per_token:
        named = _named(per_token)
        reason = f"has no meaning with dpo.loss_type {named}, which averages over tokens: set dpo.ld_alpha=null"
        yield Invalid("dpo.ld_alpha", reason)


def given_options(dpo: DPOConfig) -> dict[str, float | str]:
    """Return the options of losses that are set, label smoothing among them."""
    smoothing = {"label_smoothing": dpo.label_smoothing} if dpo.label_smoothing else {}
    return {**dpo.options, **smoothing}


def options_of(dpo: DPOConfig, loss: "Loss") -> dict[str, float | str]:
    """Return those of the options that a loss takes: of a sum, each loss has its own."""
    return {name: value for name, value in given_options(dpo).items() if loss.option(name)}


def _is_option(name: str) -> bool:
    from notus.losses import LOSSES  # imports torch

    return any(loss.option(name) for loss in LOSSES.values())


def _option_key(name: str) -> str:
    return "dpo.label_smoothing" if name == "label_smoothing" else f"dpo.options.{name}"


# ---- typed values ----


def fill_sections(tree: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return {name: dataclass} for all `sections`, which are dataclasses by their names in YAML.

    Raises `Invalid` for the first key of `tree` that is wrong.
    """
    check_keys(tree, sections)
    return {name: _fill(cls, tree.get(name) or {}, f"{name}.") for name, cls in sections.items()}


def check_keys(tree: Mapping[str, Any], sections: Mapping[str, Any]) -> None:
    """Raise `Invalid` for a section that does not exist, and for a key that is another section's or trainer's."""
    for name, keys in tree.items():
        if name not in sections:
            raise Invalid(str(name), _no_section(str(name), sections))
        for key in keys or {}:
            homes = [home for home, cls in sections.items() if key in _hints(cls) and key not in sections]
            if homes and name not in homes:
                raise Invalid(f"{name}.{key}", f"does not exist; did you mean '{homes[0]}.{key}'?")
            if name == "dpo" and not homes and _is_option(key):
                raise Invalid(f"dpo.{key}", f"does not exist; did you mean 'dpo.options.{key}'?")
            if not homes and (other := foreign_keys.find(str(key))):
                raise Invalid(f"{name}.{key}", f"does not exist; {other.advice()}")


def _no_section(name: str, sections: Mapping[str, Any]) -> str:
    """Return what is wrong with a name that stands where a section should, and what to do."""
    if other := foreign_keys.find(name):
        return f"is not a section; {other.advice()}"
    if homes := [home for home, cls in sections.items() if name in _hints(cls)]:
        return f"is not a section; set {homes[0]}.{name}"
    if name == "iterate":  # the first section of the files that docs/rounds.md describes
        return "is a section of rounds: run the command iterate with this file"
    return f"is not a section{nearest(name, sections)}"


def _fill(cls: type[T], values: Mapping[Any, Any], prefix: str = "") -> T:
    """Return the dataclass `cls` with these values; raise `Invalid` for the first wrong one."""
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            raise Invalid(f"{prefix}{key}", f"does not exist{nearest(str(key), hints)}")
    try:
        return cls(**{key + "_" * keyword.iskeyword(key): value for key, value in values.items()})
    except ValidationError as error:
        raise _invalid(error, hints, values, prefix) from None


def _hints(cls: type) -> dict[str, Any]:
    """Return the type of each key of a section, by its name in YAML."""
    return {name.rstrip("_"): hint for name, hint in get_type_hints(cls, include_extras=True).items()}


def _invalid(error: ValidationError, hints: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> Invalid:
    """Say in a line what pydantic found first."""
    first = error.errors()[0]
    key = str(first["loc"][0]).rstrip("_")
    if first["type"] == "missing":
        return Invalid(f"{prefix}{key}", "is required")
    reason = f", not {_SHORT.repr(values[key])}"
    if first["type"] == "less_than" and first["ctx"]["lt"] == 2**63:
        reason += ", which takes more than 64 bits"
    choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
    reason += _other_value(f"{prefix}{key}", values[key], choices)
    if source_error := first.get("ctx", {}).get("error"):
        reason = f": {source_error}"
    return Invalid(f"{prefix}{key}", f"must be {_with_article(describe(hints[key]))}{reason}")


def describe(hint: Any) -> str:
    """Return the type `hint` in words: string, integer, number, boolean, list of strings, and so on."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in parts)
    if origin is Literal:
        return " or ".join(filter(None, [", ".join(map(repr, parts[:-1])), repr(parts[-1])]))
    if origin is Annotated:
        words = [part for part in parts if isinstance(part, str)]
        limits = [_limit(part) for part in parts[1:] if part != Lt(2**63)]
        return words[0] if words else f"{describe(parts[0])} {' and '.join(limits)}"
    return {bool: "boolean", int: "integer", float: "number"}.get(hint, "null")


def _with_article(words: str) -> str:
    """Return the words of a type as they follow "must be"."""
    if words.startswith("boolean"):
        return words.replace("boolean", "true or false", 1)
    if words in ("string", "string or null"):
        words = words.replace("string", "string (in quotes if it reads as something else)")
    article = "" if words.startswith("'") else "an " if words[0] in "aeiou" else "a "
    return article + words


def _limit(bound: Ge | Gt | Le | Lt) -> str:
    match bound:
        case Ge(low):
            return f">= {low}"
        case Gt(low):
            return f"> {low}"
        case Le(high):
            return f"<= {high}"
        case Lt(high):
            return f"< {high}"


def _other_value(key: str, value: Any, valid: Iterable[str] = ()) -> str:
    """Return how a message about a wrong value ends: what to set, if another trainer has it, else the nearest."""
    if (advice := foreign_keys.find_value(key, value)) is not None:
        return f": {advice}"
    return nearest(_SHORT.repr(value).strip("'"), valid) if valid else ""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return how a message about an unknown `name` ends: the most similar valid one, or all if none is similar."""
    names = list(valid)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else f"; valid: {', '.join(names)}"


# ---- YAML and the command line ----


class _Loader(yaml.SafeLoader):
    """YAML as people mean it.

    1e-6 is a number, which YAML 1.1 reads as a string. 2026-01-31, 1:30 and 010 are strings, which it reads as a date,
    as 90 and as 8; so are numbers of hundreds of digits. A key given twice is an error, and so are values that are
    nested deeper than `_MAX_DEPTH`, or that aliases let grow beyond `_MAX_VALUES`.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _MAX_DEPTH and parent is not None:
            problem = f"nested more than {_MAX_DEPTH} deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=parent.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        _measure(node, 1, {})
        return super().construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # of `!!int abc` or `!!bool abc`
            problem = f"{_SHORT.repr(node.value)} is no {node.tag.rsplit(':', 1)[-1]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"{_SHORT.repr(key.value)} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _measure(node: yaml.Node, depth: int, known: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
    """Return how many values a node stands for and how deep they are nested, with every alias written out."""
    if node not in known and not isinstance(node, yaml.ScalarNode):
        pairs = [pair if isinstance(pair, tuple) else (pair,) for pair in node.value]
        found = [_measure(part, depth + 1, known) for pair in pairs if depth <= _MAX_DEPTH for part in pair]
        known[node] = 1 + sum(size for size, _ in found), 1 + max((below for _, below in found), default=0)
    size, height = known.get(node, (1, 1))
    if size > _MAX_VALUES or depth + height > _MAX_DEPTH + 1:
        what = f"over {_MAX_VALUES} values" if size > _MAX_VALUES else f"values nested more than {_MAX_DEPTH} deep"
        raise yaml.MarkedYAMLError(problem=f"its aliases stand for {what}", problem_mark=node.start_mark)
    return size, height


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a string such as "1e-6" gets quotes."""


_MAX_DEPTH, _MAX_VALUES = 50, 100_000
_SHORT = reprlib.Repr()  # of a value, for a message of one line
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_INT = r"[-+]?(?:0|[1-9](?:_?\d){0,299}|0x[0-9a-fA-F]{1,250}|0b[01]{1,900})$"
_FLOAT = r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$"
_FLOAT += r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
_REPLACED = [f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")]

_Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):  # the dumper also quotes what other readers would not take for a string
    _class.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_INT), list("-+0123456789"))


def dump_yaml(tree: Any) -> str:
    """Return YAML that reads back to the same value, with the keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file. Raise ValueError if it cannot be read or is not valid."""
    # a shell's <(command) has a writer; any other FIFO would keep the process waiting for ever
    if path.exists() and not path.is_file() and not path.is_dir() and path.parts[1:2] not in (("dev",), ("proc",)):
        raise ValueError(f"{path}: cannot read the config file: it is not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot read the config file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text, so not a config file") from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{source}: {line}not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = f"line {text.count(chr(10), 0, error.position) + 1}: "
        raise ValueError(f"{source}: {line}not valid YAML: character {error.character:#x} is not allowed") from error


def read_arguments(
    words: Sequence[str], task: Task, sections: Mapping[str, Any] = SECTIONS
) -> tuple[dict[str, Any], str, dict[str, str]]:
    """`CONFIG.yaml [--section.key=value ...]` -> (nested mapping, file name, origins of the overrides).

    `sections` are those that the file may have. Raises ValueError for what cannot be read.
    """
    check_spaces(words, sections)
    paths = [word for word in words if not word.startswith("-")]
    if len(paths) != 1:
        got = " ".join(words) or "nothing"
        raise ValueError(f"command line: expected CONFIG.yaml [--section.key=value ...], but got {got}")
    source = os.path.expanduser(paths[0])
    tree = read_yaml(Path(source))
    _check_sections(tree, source, task, sections)
    origins = {}
    for word in words:
        if word.startswith("-"):
            section, keys, value = _parse_override(word, sections)
            held = tree.get(section) or {}
            if len(keys) == 2:
                value = {**_mapping(held.get(keys[0]), f"{section}.{keys[0]}"), keys[1]: value}
            tree[section] = {**held, keys[0]: value}
            origins[".".join([section, *keys])] = origins[f"{section}.{keys[0]}"] = "command line"
    return tree, source, origins


_NAMED = 4  # how many keys of a file without sections a message translates


def _check_sections(tree: Any, source: str, task: Task, sections: Mapping[str, Any]) -> None:
    """Raise ValueError for a file that is not made of sections, or is made for the other task."""
    if isinstance(tree, dict):
        stray = {str(name): where for name in tree if name not in sections and (where := _home(str(name), sections))}
        if stray:
            known = sorted(stray.items(), key=lambda item: "." not in item[1])  # those that have a key here go first
            shown = ", ".join(f"{name} -> {where}" for name, where in known[:_NAMED])
            more = f", and {len(stray) - _NAMED} more" if len(stray) > _NAMED else ""
            raise ValueError(f"{source}: write the keys in sections: {shown}{more}; see docs/coming-from-trl.md")
    if not isinstance(tree, dict) or not all(isinstance(keys, dict | None) for keys in tree.values()):
        raise ValueError(f"{source}: expected the sections {', '.join(sections)}, with lines `key: value` below them")
    for name in DPO_SECTIONS:
        if task == "sft" and tree.get(name):
            raise ValueError(
                f"{source}: has a section `{name}`, which is of DPO: train with the command dpo, or remove it for SFT"
            )


def _mapping(value: Any, key: str) -> dict[str, Any]:
    """Return what a key holds so far as a mapping, to which an override adds an entry."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"command line: {key} is {_SHORT.repr(value)}, which has no entries: set {key}=VALUE")
    return value or {}


def _home(name: str, sections: Mapping[str, Any]) -> str:
    """Return where a key without its section, or another trainer's, is set: "section.key", why nowhere, or ""."""
    if (other := foreign_keys.find(name)) is not None:
        return " and ".join(other.keys) or "(none needed)" * (other.kind == "none needed") or "(not available)"
    if name in sections:  # which has a key of that name, too: `reference.model`
        return ""
    return next((f"{home}.{name}" for home, cls in sections.items() if name in _hints(cls)), "")


def check_spaces(words: Sequence[str], sections: Mapping[str, Any] = SECTIONS) -> None:
    """Reject `--section.key value`: the value would be taken for a second config file. Reject keys without section."""
    for word in words:
        if (flat := re.match(r"--([\w-]+)(?:=|$)", word)) and _home(flat[1].replace("-", "_"), sections):
            name = flat[1].replace("-", "_")
            raise ValueError(f"command line: --{flat[1]} has no section; {_advice(name, sections)}")
    for key, value in itertools.pairwise(words):
        if re.fullmatch(r"--\w+\.\w+", key) and not value.startswith("-"):
            raise ValueError(f"command line: '{key} {value}' needs a = between: {key}={value}")


def _advice(name: str, sections: Mapping[str, Any]) -> str:
    other = foreign_keys.find(name)
    return other.advice() if other else f"set {_home(name, sections)}"


def _parse_override(word: str, sections: Mapping[str, Any]) -> tuple[str, list[str], Any]:
    """`--section.key=value` -> (section, [key], value), the value read as YAML. `--section.key.name=value`: one entry
    of a mapping."""
    match = re.fullmatch(r"--(\w+)\.(\w+(?:\.\w+)?)=(.+)", word, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"command line: {word!r} is not of the form --section.key=value (write null for no value)")
    section, key, text = match.groups()
    if section not in sections:
        known = foreign_keys.find(key) or foreign_keys.find(section)
        remedy = f"; {known.advice()}" if known else nearest(section, sections)
        raise ValueError(f"command line: section {section!r} does not exist{remedy}")
    value = _parse_yaml(text, f"command line: --{section}.{key}")
    return section, key.split("."), _split_at_commas(section, key, value, sections)


def _split_at_commas(section: str, key: str, value: Any, sections: Mapping[str, Any]) -> Any:
    """Return `a,b` as [a, b] for a key whose value is a list of strings; any other value as it is."""
    hint = _hints(sections[section]).get(key)
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    is_list = any(get_origin(part) is Annotated and get_args(part)[0] == list[String] for part in choices)
    words = [word for part in choices if get_origin(part) is Literal for word in get_args(part)]
    if not is_list or not isinstance(value, str) or value in words:
        return value
    if foreign_keys.find_value(f"{section}.{key}", value) is not None:
        return value  # the check of the values says what to set instead
    return [part.strip() for part in value.split(",")]
