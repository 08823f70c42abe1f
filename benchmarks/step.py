"""A training step on a randomly initialised policy: its rows, the policy, the step itself, and its arithmetic."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig

import common  # noqa: F401  (the project's path)
from notus.data.packing import Batch, Example, collate
from notus.data.prefetch import Prefetch
from notus.data.schedule import deal
from notus.losses import dpo_loss, nll_loss
from notus.model.attention import IMPLEMENTATION
from notus.model.flops import Dimensions, dimensions, forward_flops
from notus.model.load import materialise
from notus.model.lora import LoRALinear, cast_frozen, init_lora, inject_lora
from notus.model.policy import Policy
from notus.model.size import ModelSize, model_size
from notus.model.supported import disable_dropout
from notus.runtime.distributed import mesh
from notus.training.build import fuse_or_check_graph
from notus.training.memory_estimate import Job, footprint
from notus.training.optim import build_optimizer, clipped_update, gradient_norm, local_gradients
from notus.training.parallelize import COMPUTE_DTYPES, expect_last_row, hand_over_gradients, parallelize

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
    return [[whole[position] for position in row] for row in deal(lengths, lengths, ranks, tokens_per_row)[rank]]


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
    """The arithmetic of a model's linear layers and attention, in weights per token.

    Attributes:
        size: of the model without adapters.
        adapters: weights of all LoRA matrices.
        recomputed: weights of the products that the backward pass computes again.
        attention_again: whether it computes attention again.
        memory: what its footprint follows from, adapters included.
    """

    size: Dimensions
    adapters: int
    recomputed: int
    attention_again: bool
    memory: ModelSize | None = None

    def necessary(self, examples: Sequence[Example]) -> int:
        """Operations of one step on these examples, each trunk once, nothing computed twice, nothing padded."""
        linear, attention, adapters = self._forward(examples)
        return (2 if self.adapters else 3) * linear + 3 * (attention + adapters)

    def done(self, rows: Sequence[Sequence[Example]]) -> int:
        """Operations of one step as the rows have it: with copies, padding and recomputation.

        The head's logits are computed again as well, but for one chunk of a row, which is left out of account.
        """
        examples = [item for row in rows for item in row]
        linear, attention, adapters = self._forward(examples)
        tokens, scored = _tokens(examples), sum(int(mask.sum()) for item in examples for mask in item.loss_masks)
        again = 2 * self.recomputed * tokens + 2 * self.size.head_weights * scored + self.attention_again * attention
        return (2 if self.adapters else 3) * linear + 3 * (attention + adapters) + again

    def _forward(self, examples: Sequence[Example]) -> tuple[int, int, int]:
        trunks = np.array([len(item.trunk) for item in examples])
        branches = np.array([[len(branch) for branch in item.branches] for item in examples])
        scored = np.array([sum(int(mask.sum()) for mask in item.loss_masks) for item in examples])
        linear = int(forward_flops(dataclasses.replace(self.size, layers=0), trunks, branches, scored).sum())
        attention = int(forward_flops(self.size, trunks, branches, scored).sum()) - linear
        return linear, attention, 2 * self.adapters * _tokens(examples)


def _tokens(examples: Sequence[Example]) -> int:
    return sum(map(num_tokens, examples))


def model_dimensions(config: MistralConfig) -> Dimensions:
    """Of a model of this shape."""
    with torch.device("meta"):
        return dimensions(AutoModelForCausalLM.from_config(config))


def work(policy: Policy, size: Dimensions, checkpointing: str) -> Work:
    """What a step of `policy` comes to; its blocks compute `checkpointing` again."""
    again = sum(_again(_products(block), checkpointing) for block in policy.blocks)
    adapters = sum(p.numel() for m in policy.modules() if isinstance(m, LoRALinear) for p in (m.lora_A, m.lora_B))
    return Work(size, adapters, again, checkpointing == "full", model_size(policy.causal_lm))


def _products(block: torch.nn.Module) -> list[tuple[int, bool]]:
    """(weights, whether they are an adapter's) of a block's matrix products, in the order of its forward pass."""
    found = []
    for module in block.modules():
        if isinstance(module, torch.nn.Linear):
            found.append((module.weight.numel(), False))
        if isinstance(module, LoRALinear):
            found += [(module.lora_A.numel(), True), (module.lora_B.numel(), True)]
    return found


def _again(products: list[tuple[int, bool]], checkpointing: str) -> int:
    """Weights of those that are computed again: nobody needs the last one's output, and torch stops before it."""
    if checkpointing == "none":
        return 0
    base = [weights for weights, adapter in products if not adapter]
    kept = {"products": sum(base), "selective": sum(base[::2]), "full": products[-1][0]}[checkpointing]
    return sum(weights for weights, _ in products) - kept


def predicted_bytes(work: Work, checkpointing: str, rows: Sequence[Sequence[Example]], precision: str = "bf16") -> int:
    """What `notus.training.memory_estimate` says of the fullest of these rows, without the runtime's margin."""
    fullest = max(rows, key=_tokens)
    keys = sum(len(item.trunk) * len(item.branches) + sum(map(len, item.branches)) for item in fullest)
    job = Job(
        shard_size=1,
        tokens_per_row=_tokens(fullest),
        scored_per_row=sum(int(mask.sum()) for item in fullest for mask in item.loss_masks),
        precision=precision,
        activation_checkpointing=checkpointing,
        key_ratio=keys / _tokens(fullest),
    )
    assert work.memory is not None
    return footprint(work.memory, job).total


# ---- the policy ----


def build(
    config: MistralConfig,
    device: torch.device,
    *,
    rank: int = 0,
    checkpointing: str = "none",
    compile: bool = False,
    precision: str = "bf16",
) -> tuple[Policy, Work]:
    """As `notus.training.build.build_policy` has it, with random weights in the place of a folder's.

    Args:
        config: the model's shape.
        device: where it is to live.
        rank: of the LoRA adapters; 0: every parameter is trained.
        checkpointing: a mode of `notus.training.activation_checkpointing`.
        compile: each block.
        precision: "bf16" or "fp32".
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
    policy = Policy(causal_lm)
    arithmetic = work(policy, size, checkpointing)
    parallelize(policy, mesh(device), precision=precision, activation_checkpointing=checkpointing, compile=compile)
    materialise(policy, device)
    _randomise(policy)
    if rank:
        init_lora(causal_lm, seed=0)
    return policy.train(), arithmetic


@torch.no_grad()
def _randomise(policy: Policy) -> None:
    """Matrices from a normal distribution, vectors (the norms' weights) 1."""
    torch.manual_seed(0)
    for parameter in policy.parameters():
        local = parameter.to_local()
        if parameter.dim() == 1:
            local.fill_(1.0)
        else:
            local.normal_(0.0, 0.02)


# ---- the step ----


class Step:
    """What `notus.training.trainer` does in a step, without its books: rows, losses, norm, clipping, update."""

    def __init__(self, policy: Policy, task: str, vocab: int) -> None:
        """`task`: "dpo" or "sft"; `vocab`: size of the vocabulary."""
        self.policy, self._task, self._log_vocab = policy, task, float(np.log(vocab))
        self._trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self._device = self._trainable[0].device
        self._optimizer = build_optimizer(self._trainable, name="rmsprop", learning_rate=5e-7, weight_decay=0.0)

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
                expect_last_row(self.policy, number == len(rows) - 1)
                batch = batch.to(self._device)
                logps = self.policy(batch)
                loss = nll_loss(logps[:, 0], tokens).sum() if self._task == "sft" else self._dpo(logps, batch, examples)
                loss.backward()
                bad += ~torch.isfinite(loss.detach())
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
