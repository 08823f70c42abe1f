"""The settings of a run: one dataclass per section, a description below each field.

They are filled from a YAML file and `--section.key=value` overrides. A key that does not exist, a value of
the wrong type or out of range, and a setting that other settings would leave without effect are errors.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from notus.conflicts import conflicts
from notus.schema import Bounds, OneOrMore, Refused, build_sections, dump_yaml, read_arguments

Task = Literal["dpo", "sft"]

# The names in `notus.losses`, written out here because this module imports no torch; a test holds them equal.
LossType = Literal[
    "sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop",
]  # fmt: skip

Count = Annotated[int, Bounds(1)]
Index = Annotated[int, Bounds(0)]
Positive = Annotated[float, Bounds(0, open_low=True)]
NonNegative = Annotated[float, Bounds(0)]


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One source of rows. `DataConfig` holds it as a plain mapping, with every key set."""

    path: str
    """A file (JSONL, JSON, Parquet) or a hub id. Required; in YAML, a bare text is a source's path."""
    split: str = "train"
    """The split to take, of a hub dataset."""
    weight: Positive = 1.0
    """Share of the source's rows that are used; above 1, rows repeat."""


Sources = Annotated[list[dict[str, Any]], OneOrMore(DataSource, "path")]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that a run starts from."""

    name_or_path: str
    """A local folder in Hugging Face layout, or a hub id. Required."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for authors you trust."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model learns from, and how it becomes tokens."""

    train: Sources
    """A file (JSONL, JSON, Parquet), a hub id, or a list of `{path, split, weight}`. Required."""
    eval: Sources | None = None
    """The same, for evaluation; null: no evaluation, unless `eval_size` holds rows out of `train`."""
    eval_size: Index = 0
    """Rows held out of `train` for evaluation, drawn with `training.seed`."""
    max_length: Count = 1024
    """Longest prompt + completion, in tokens; what goes beyond is cut."""
    max_prompt_length: Count | None = None
    """DPO: last prompt tokens kept if a pair is too long; null: 512, at most half of `max_length`."""
    shuffle: bool = True
    """Draw each epoch's order anew from `training.seed`; false: the order of the data."""
    chat_template: str | None = None
    """"zephyr", or a `.jinja` file; null: the tokenizer's own, and Zephyr's for tokenizers without one."""
    add_empty_system: bool = False
    """Put an empty system turn before conversations that have none, as Notus 7B v1 did."""
    num_workers: Count = 1
    """Processes that tokenise; 1: in this process."""
    cache_dir: str | None = None
    """Where tokenised rows are kept between runs; null: the cache folder of `datasets`."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the model learns, and what the run leaves behind."""

    output_dir: str
    """The run's folder: resolved config, metrics, checkpoints, final model. Required."""
    batch_size: Count = 64
    """Examples (DPO: pairs) per optimizer step over the whole job, whatever the number of GPUs."""
    tokens_per_row: Count = 4096
    """Tokens of one packed row, one forward pass per GPU. Sets memory and speed, not the result."""
    epochs: Count = 3
    """Passes over the training data."""
    max_steps: Count | None = None
    """End after this many optimizer steps if the epochs have not ended before; null: the epochs decide."""
    learning_rate: Positive = 5e-7
    """Peak learning rate."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """The course of the learning rate after warm-up: down to zero, or constant."""
    warmup_ratio: Annotated[float, Bounds(0, 1)] = 0.1
    """Share of all steps in which the learning rate climbs linearly from zero."""
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    """RMSprop keeps one state per parameter, AdamW two."""
    optimizer_dtype: Literal["fp32", "bf16"] = "fp32"
    """How those states are kept; bf16 takes half the memory, rounded at random so that averages still move."""
    weight_decay: NonNegative = 0.0
    """Weight decay, as torch's optimizer of that name applies it."""
    max_grad_norm: NonNegative | None = 1.0
    """Gradients are scaled down to this global norm; null or 0: measured and left as they are."""
    seed: Index = 42
    """Seed of the order of the data, dropout, LoRA's start and the held-out rows."""
    deterministic: bool = False
    """Use algorithms that repeat bit for bit on the same machine with as many ranks; an error where there is none.
    On a GPU, a resumed run ends bitwise as an undisturbed one only with this: the attention's backward pass otherwise
    adds gradients in any order. On a CPU it is not needed. What it costs on a GPU: not run."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the forward and backward pass; master weights, sums and losses are fp32 either way."""
    activation_checkpointing: Literal["none", "products", "selective", "full", "auto"] = "full"
    """What a block keeps of its forward pass; its backward pass computes the rest again, bit for bit. "none": keep
    everything, which is fastest and takes most memory. "products": keep the outputs of matrix products and attention.
    "selective": keep those of every second product and of attention. "full": keep the block's input alone. "auto": the
    first of these, in this order, whose memory is estimated to fit."""
    compile: bool = False
    """Compile each block with torch.compile."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer states in host memory: slow, and only for GPUs. Not run."""
    sharding: Literal["full", "hybrid"] = "full"
    """"full": each rank holds a share of the model; "hybrid": each node holds all of it, spread over its ranks."""
    timeout_minutes: Positive = 30.0
    """How long a rank waits for the others before it takes them for stuck, but for rank 0's work before training."""
    log_every: Count = 1
    """Steps between lines of `metrics.jsonl`."""
    eval_every: Count | None = None
    """Steps between evaluations; null: at the end only."""
    save_every: Count | None = None
    """Steps between checkpoints; null: at the end of each epoch."""
    keep_checkpoints: Count | None = 2
    """Newest checkpoints kept; null: all. With two, a run goes on even if the newest is damaged."""
    keep_every: Count | None = None
    """Besides the newest, keep the checkpoints of every so many steps, a multiple of `save_every`."""
    async_checkpoints: bool = True
    """Write checkpoints while training goes on, from a copy in host memory; false: wait, without the copy."""
    max_hours: Positive | None = None
    """End with a checkpoint at the first step after so many hours of one launch; the same command resumes."""
    resume: str = "auto"
    """"auto": go on from the newest checkpoint in `output_dir`; "never": anew; or a checkpoint's folder."""


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """The preference loss; `notus.losses` has the equations."""

    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    loss_type: LossType = "sigmoid"
    """Name of the loss."""
    label_smoothing: Annotated[float, Bounds(0, 0.5)] = 0.0
    """Assumed share of swapped labels: for sigmoid, for robust (below 0.5) and for exo_pair (above 0)."""
    nll_weight: NonNegative = 0.0
    """Weight of the chosen completions' negative log-likelihood, a mean over the step's chosen tokens."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The reference model's log-probs, computed once and kept."""

    cache_dir: str | None = None
    """A folder that several runs may share; null: `reference` in the run's folder."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters in place of full fine-tuning."""

    rank: Index = 0
    """Rank of the adapters; 0: full fine-tuning."""
    alpha: Positive = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Bounds(0, 1, open_high=True)] = 0.0
    """Dropout on the adapters' input."""
    target_modules: list[str] | Literal["all-linear"] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    """Names of the linear layers that get adapters, or "all-linear": all but the language-model head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What a run tells besides `metrics.jsonl`, and where."""

    wandb: bool = False
    """Log to Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard events to `tensorboard` in the run's folder."""
    project: str = "notus"
    """Weights & Biases project."""
    run_name: str | None = None
    """Weights & Biases run name; null: the name of the run's folder."""
    samples: Index = 4
    """Prompts that the model continues (greedily) at step 0, at each evaluation and at the end: the first ones of the
    evaluation data, else of the training data; 0: none."""
    sample_tokens: Count = 48
    """Most tokens of such a continuation. For each, sharded ranks gather the whole model once."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `task` comes from the entry, not from the file."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    dpo: DPOConfig = DPOConfig()
    reference: ReferenceConfig = ReferenceConfig()
    lora: LoraConfig = field(default_factory=LoraConfig)
    tracking: TrackingConfig = TrackingConfig()
    task: Task = "dpo"


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
OPTIONAL_SECTIONS = (*DPO_SECTIONS, "lora", "tracking")


def load_config(arguments: str | Path | Sequence[str], task: Task) -> Config:
    """The config of `CONFIG.yaml [--section.key=value ...]`: a path alone, or a command line's arguments.

    Later overrides win over earlier ones, and all over the file. Raises ValueError, naming the file or
    "command line", the key and the remedy, for anything that is not a valid configuration of a `task` run.
    """
    words = [str(arguments)] if isinstance(arguments, str | Path) else list(arguments)
    tree, source, origins = read_arguments(words, SECTIONS)
    return config_from_dict(tree, task, source=source, origins=origins)


def config_from_dict(
    tree: dict[str, Any], task: Task, *, source: str = "config", origins: dict[str, str] | None = None
) -> Config:
    """The config of a nested mapping `{section: {key: value}}`. Raises ValueError as `load_config` does.

    Errors name `source`, or what `origins` has for the "section.key" that is wrong.
    """
    try:
        config = _resolve(Config(**build_sections(tree, SECTIONS), task=task))
        unset = {name: dataclasses.asdict(SECTIONS[name]()) for name in OPTIONAL_SECTIONS}
        conflict = next(conflicts(dataclasses.asdict(config), unset), None)
        if conflict is not None:
            raise conflict
    except Refused as refusal:
        hint = " (once true: full, false: none)" if refusal.key == "training.activation_checkpointing" else ""
        raise ValueError(f"{(origins or {}).get(refusal.key, source)}: {refusal.key} {refusal}{hint}") from None
    return config


def to_yaml(config: Config) -> str:
    """The config as YAML that loads to an equal one; sections that its task has no use for are left out."""
    unused = DPO_SECTIONS if config.task == "sft" else ()
    return dump_yaml({name: dataclasses.asdict(getattr(config, name)) for name in SECTIONS if name not in unused})


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
