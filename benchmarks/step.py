"""A training step on a randomly initialised policy: its rows, the policy, the step itself, and its arithmetic."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

import common  # noqa: F401  (the project's path)
from notus.data.batching import balance
from notus.data.packing import Batch, Example, collate
from notus.estimate.plan import Arithmetic, arithmetic
from notus.estimate.sizes import Lengths
from notus.losses import dpo_loss, nll_loss
from notus.model.attention import IMPLEMENTATION
from notus.model.flops import Dimensions, dimensions
from notus.model.load import materialise
from notus.model.lora import cast_frozen, init_lora, inject_lora
from notus.model.policy import Policy
from notus.model.quantization import RowsToQuantize, quantized_layers
from notus.model.size import ModelSize, model_size
from notus.model.supported import disable_dropout
from notus.runtime.distributed import mesh, world_size
from notus.training.dataloader import Prefetch
from notus.training.gradient_clipping import clipped_update, gradient_norm, local_gradients
from notus.training.memory_estimate import Job, footprint
from notus.training.optimizers import build_optimizer
from notus.training.parallelize import (
    COMPUTE_DTYPES,
    expect_last_row,
    fuse_or_check_graph,
    hand_over_gradients,
    parallelize,
    quantize_or_warn,
)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


# ---- examples, and how they become rows ----


def random_example(
    generator: np.random.Generator, vocabulary: int, trunk: int, *branches: int, number: int = 0
) -> Example:
    """Random tokens of these lengths; every token of a branch is learned."""
    tokens = [generator.integers(0, vocabulary, length) for length in (trunk, *branches)]
    masks = tuple(np.ones(length, dtype=bool) for length in branches)
    return Example(number, tokens[0], tuple(tokens[1:]), masks)


def rows(
    variant: str, examples: Sequence[Example], tokens_per_row: int, longest: int, rank: int = 0, ranks: int = 1
) -> list[list[Example]]:
    """A step's rows.

    Args:
        variant: "shared": packed, a trunk once; "packed": a trunk before each of its branches; "padded": sequences
            apart, each as long as the longest of its micro-batch, in the order of the data.
        examples: of the step.
        tokens_per_row: the most tokens of a row.
        longest: sequence there may be, which says how many fit into a padded micro-batch.
        rank: whose rows; of `ranks` (packed rows alone).
    """
    if variant == "padded":
        size = max(1, tokens_per_row // (len(examples[0].branches) * longest))
        batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        return [[_apart(item, _longest(batch)) for item in batch] for batch in batches]
    whole = list(examples) if variant == "shared" else [_apart(item, 0) for item in examples]
    lengths = list(map(num_tokens, whole))
    return [[whole[position] for position in row] for row in balance(lengths, lengths, ranks, tokens_per_row)[rank]]


def num_tokens(example: Example) -> int:
    """Tokens of an example as it stands in a row."""
    return len(example.trunk) + sum(len(branch) for branch in example.branches)


def _longest(examples: Sequence[Example]) -> int:
    return max(len(item.trunk) + len(branch) for item in examples for branch in item.branches)


def _apart(example: Example, length: int) -> Example:
    """The trunk copied into every branch, and further tokens that carry no loss up to `length`."""
    trunk, branches, masks = example.trunk, [], []
    for branch, mask in zip(example.branches, example.loss_masks, strict=True):
        padding = max(0, length - len(trunk) - len(branch))
        branches.append(np.concatenate([trunk, branch, np.zeros(padding, dtype=np.int64)]))
        masks.append(np.pad(mask, (len(trunk), padding)))
    return Example(example.index, trunk[:0], tuple(branches), tuple(masks))


# ---- its arithmetic ----


@dataclasses.dataclass(frozen=True)
class Work:
    """The operations of a model's steps, as `notus.estimate` counts them.

    Attributes:
        dimensions: of the model without adapters.
        size: what its memory and its recomputation follow from, adapters included.
        checkpointing: a mode of `notus.training.activation_checkpointing`.
    """

    dimensions: Dimensions
    size: ModelSize
    checkpointing: str

    def necessary(self, examples: Sequence[Example]) -> float:
        """Operations of one step on these examples, each trunk once, nothing computed twice, nothing padded."""
        lengths = [(len(item.trunk), *map(len, item.branches)) for item in examples]
        return self._arithmetic(lengths).necessary * len(lengths)

    def done(self, rows: Sequence[Sequence[Example]]) -> float:
        """Operations of one step as the rows have it: with copies, padding and recomputation.

        The head's logits are computed again as well, but for one chunk of a row, which is left out of account.
        """
        lengths = [each for row in rows for item in row for each in _as_computed(item)]
        return self._arithmetic(lengths).hardware * len(lengths)

    def _arithmetic(self, lengths: Sequence[Sequence[int]]) -> Arithmetic:
        trunks, branches = np.split(np.array(lengths), [1], axis=1)
        return arithmetic(self.size, self.dimensions, Lengths(trunks[:, 0], branches, "a step's"), self.checkpointing)


def _as_computed(item: Example) -> list[tuple[int, ...]]:
    """Tokens of the trunk, and of each branch; branches that stand apart are examples of one scored branch each."""
    if len(item.trunk):
        return [(len(item.trunk), *map(len, item.branches))]
    scored = [int(mask.sum()) for mask in item.loss_masks]
    return [(len(branch) - count, count) for branch, count in zip(item.branches, scored, strict=True)]


def work_of(config: PreTrainedConfig, checkpointing: str) -> Work:
    """Of full fine-tuning of a model of this shape."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config)
    return Work(dimensions(causal_lm), model_size(causal_lm), checkpointing)


def predicted_bytes(
    work: Work,
    rows: Sequence[Sequence[Example]],
    precision: str = "bf16",
    optimizer: tuple[str, str] = ("rmsprop", "fp32"),
) -> int:
    """What `notus.training.memory_estimate` says of the fullest of these rows, without the runtime's margin."""
    fullest = max(rows, key=_tokens)
    keys = sum(len(item.trunk) * len(item.branches) + sum(map(len, item.branches)) for item in fullest)
    job = Job(
        shard_size=1,
        tokens_per_row=_tokens(fullest),
        scored_per_row=sum(int(mask.sum()) for item in fullest for mask in item.loss_masks),
        precision=precision,
        optimizer=optimizer[0],
        optimizer_dtype=optimizer[1],
        activation_checkpointing=work.checkpointing,
        key_ratio=keys / _tokens(fullest),
    )
    return footprint(work.size, job).total


def _tokens(examples: Sequence[Example]) -> int:
    return sum(map(num_tokens, examples))


# ---- the policy ----


def build(
    config: PreTrainedConfig,
    device: torch.device,
    *,
    rank: int = 0,
    checkpointing: str = "none",
    compile: bool = False,
    precision: str = "bf16",
    quantization: str | None = None,
) -> tuple[Policy, Work]:
    """As `notus.training.parallelize.build_policy` has it, with random weights in the place of a folder's.

    Args:
        config: the model's shape.
        device: where it is to live.
        rank: of the LoRA adapters; 0: every parameter is trained.
        checkpointing: a mode of `notus.training.activation_checkpointing`.
        compile: each block.
        precision: "bf16" or "fp32".
        quantization: of the frozen base: "nf4" or None.
    """
    dtype = COMPUTE_DTYPES[precision]
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION, dtype=torch.float32)
    disable_dropout(causal_lm)
    fuse_or_check_graph(causal_lm, device, dtype, compile=compile)
    size = dimensions(causal_lm)
    if rank:
        inject_lora(causal_lm, rank=rank, alpha=rank, dropout=0.0, target_modules=LORA_TARGETS)
    cast_frozen(causal_lm, dtype)
    if quantization is not None:
        quantize_or_warn(causal_lm, device, dtype)
    policy = Policy(causal_lm)
    work = Work(size, model_size(causal_lm), checkpointing)
    parallelize(policy, mesh(device), precision=precision, activation_checkpointing=checkpointing, compile=compile)
    materialise(policy, device)
    _randomise(policy)
    if rank:
        init_lora(causal_lm, seed=0)
    return policy.train(), work


@torch.no_grad()
def _randomise(policy: Policy) -> None:
    """Matrices from a normal distribution, vectors (the norms' weights) 1; what is in 4 bits layer by layer."""
    torch.manual_seed(0)
    layers = {id(layer.weight): layer for layer in quantized_layers(policy).values()}
    for name, parameter in policy.named_parameters():
        if id(parameter) in layers:
            layer = layers[id(parameter)]
            values = parameter.new_empty(layer.out_features, layer.in_features)
            RowsToQuantize(layer, name).fill(values.normal_(0.0, 0.02))
        elif parameter.dim() == 1:
            parameter.to_local().fill_(1.0)
        else:
            parameter.to_local().normal_(0.0, 0.02)


# ---- the step ----


class Step:
    """What `notus.training.trainer` does in a step, without its books: rows, losses, norm, clipping, update."""

    def __init__(self, policy: Policy, task: str, vocab: int, optimizer: tuple[str, str] = ("rmsprop", "fp32")) -> None:
        """`task`: "dpo" or "sft"; `vocab`: size of the vocabulary; `optimizer`: its name and its states' dtype."""
        self.policy, self._task, self._log_vocab = policy, task, float(np.log(vocab))
        self._trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self._device, self._whole = self._trainable[0].device, world_size() == 1
        self._optimizer = build_optimizer(
            self._trainable, name=optimizer[0], state_dtype=optimizer[1], learning_rate=5e-7, weight_decay=0.0
        )

    def __call__(self, rows: Sequence[Sequence[Example]]) -> float:
        """One optimizer step on these rows; the norm of its gradient, for which the host waits.

        Raises:
            ValueError: a loss or the norm is not finite.
        """
        examples = [item for row in rows for item in row]
        tokens = sum(int(mask.sum()) for item in examples for mask in item.loss_masks)
        bad = torch.zeros((), device=self._device)
        with Prefetch(self._batches(rows)) as batches:
            for number, batch in enumerate(batches):
                if self._whole:
                    expect_last_row(self.policy, number == len(rows) - 1)
                batch = batch.to(self._device)
                logps = self.policy(batch)
                loss = nll_loss(logps[:, 0], tokens).sum() if self._task == "sft" else self._dpo(logps, batch, examples)
                loss.backward()
                bad += ~torch.isfinite(loss.detach())
        if self._whole:
            hand_over_gradients(self.policy)
        gradients = local_gradients(self._trainable)
        with torch.profiler.record_function("clip"):
            sums = gradient_norm(gradients, bad[None])
            norm, losses_bad = sums.tolist()
            if losses_bad or not math.isfinite(norm):
                raise ValueError(f"{losses_bad:.0f} rows with a loss that is not finite, gradient norm {norm}")
        clipped_update(self._optimizer, gradients, sums[0], 1.0)
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _batches(self, rows: Sequence[Sequence[Example]]) -> Iterator[Batch]:
        for row in rows:
            batch = collate(row, len(row[0].branches))
            yield batch.pin() if self._device.type == "cuda" else batch

    def _dpo(self, logps: Tensor, batch: Batch, examples: Sequence[Example]) -> Tensor:
        reference = -self._log_vocab * batch.lengths  # that of a model that knows nothing, as the policy does
        losses, _, _ = dpo_loss(logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1])
        return losses.sum() / len(examples)
