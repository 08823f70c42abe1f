"""The bytes that one rank of a training step needs, by pure arithmetic, before anything is allocated.

A step's memory has few moments at which it may peak: the head's forward and backward pass, a block's backward pass, the
hand-over of a block's or the root's gradients, the optimizer's update. `moments` adds up what is alive at each; the
footprint is the largest. What is counted is what PyTorch's own memory tracker sees in the same step on fake tensors
(benchmarks/estimator.py holds the two side by side); the CUDA context, NCCL's buffers and the allocator's gaps are not,
see `RUNTIME_MARGIN`.

Blocks are taken to be all alike. Compiled blocks are counted as if they were not compiled: they should keep less, which
was not measured.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from notus.model.logprobs import CHUNK_TOKENS
from notus.model.size import ATTENTION, Linear, ModelSize, UnknownSizeError, model_size
from notus.runtime.distributed import gather_objects, ranks_per_node, say, world_size
from notus.runtime.switches import enabled
from notus.training.activation_checkpointing import MODES
from notus.training.int8_states import BLOCK
from notus.training.optimizers import CHUNK

if TYPE_CHECKING:
    from notus.config import TrainingConfig
    from notus.data.dataset import TokenizedDataset

CHECKPOINTING = MODES  # the faster ones first
OPTIMIZER_STATES = {"rmsprop": 1, "adamw": 2}
BYTES = {"bf16": 2, "fp32": 4}
STATE_BYTES = {**BYTES, "int8": 1 + 4 / BLOCK}  # a code, and its share of a block's scale
PIECE = 4 * CHUNK["cuda"]  # bytes of an update's piece, and how many of them it takes: see `notus.training.optimizers`
PIECES = {
    ("rmsprop", "fp32"): 1,
    ("rmsprop", "bf16"): 2.5,
    ("adamw", "fp32"): 0,
    ("adamw", "bf16"): 3,
    ("adamw", "int8"): 2.5,
}
# An assumption, not measured: context and kernels 0.6 GiB, NCCL 0.9 GiB, 1.5 GiB for the allocator's gaps.
RUNTIME_MARGIN = 3 * 2**30
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes on one rank's device at a moment of a step.

    Attributes:
        moment: where in the step.
        weights: this rank's share of the parameters: fp32 masters, frozen ones in the computation's dtype or in 4 bits.
        gradients: its share of the gradients, fp32, as they add up over rows.
        optimizer_state: its share of the averages.
        optimizer_temporaries: what the update of one piece computes.
        gathered: whole blocks and the root, in the computation's dtype, with the buffer of the next block's gathering.
        whole_gradients: gradients of whole blocks, and the buffers of their reduction in fp32.
        activations: what the forward pass keeps for the backward pass.
        working: activations of the block in work, computed again, its intermediate gradients, and a layer's dequantised
            weight.
        head: logits of a chunk of tokens, and the head's gradient in fp32.
        batch: token ids, positions, indices.
    """

    moment: str
    weights: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    optimizer_temporaries: int = 0
    gathered: int = 0
    whole_gradients: int = 0
    activations: int = 0
    working: int = 0
    head: int = 0
    batch: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "moment"}

    @property
    def total(self) -> int:
        """All parts together, without the runtime's margin."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Job:
    """What a rank's memory follows from, besides the model.

    Attributes:
        shard_size: ranks over which the model is spread: all of them, or those of a node with hybrid sharding.
        tokens_per_row: tokens of a packed row.
        scored_per_row: those of them whose log-prob is taken.
        precision: "bf16" or "fp32", of the computation.
        optimizer, optimizer_dtype: as in the config.
        activation_checkpointing: one of `CHECKPOINTING`.
        key_ratio: gathered keys over tokens: how often a trunk's keys are copied for its branches.
        cpu_offload: weights, gradients and optimizer are in the host's memory.
        handover: a rank alone takes its gradients from FSDP as they are, without the buffers of a reduction.
    """

    shard_size: int
    tokens_per_row: int
    scored_per_row: int
    precision: str = "bf16"
    optimizer: str = "rmsprop"
    optimizer_dtype: str = "fp32"
    activation_checkpointing: str = "full"
    key_ratio: float = 1.2
    cpu_offload: bool = False
    handover: bool = dataclasses.field(default_factory=lambda: enabled("gradient_handover"))

    @property
    def alone(self) -> bool:
        """Whether this rank holds the whole model on its device."""
        return self.shard_size == 1 and not self.cpu_offload


def footprint(size: ModelSize, job: Job) -> Footprint:
    """What a rank needs at the worst moment of a step."""
    return max(moments(size, job), key=lambda moment: moment.total)


def fastest_checkpointing(capacity: int, size: ModelSize, job: Job) -> str:
    """The first of `CHECKPOINTING` with which a step fits a device of `capacity` bytes, "full" if none does.

    `job.activation_checkpointing` is not looked at.
    """
    for name in CHECKPOINTING[:-1]:
        needed = footprint(size, dataclasses.replace(job, activation_checkpointing=name)).total
        if needed + RUNTIME_MARGIN <= capacity:
            return name
    return CHECKPOINTING[-1]


def moments(size: ModelSize, job: Job) -> list[Footprint]:
    """What is alive at each moment of a step at which memory may peak."""
    held = 0 if job.cpu_offload else 1
    share, wide = job.shard_size, BYTES[job.precision]
    trained, frozen = size.trained // share, (size.parameters - size.trained) // share
    if size.block_trained == size.block:
        trained += size.unevenly(share)
    else:
        frozen += size.unevenly(share)
    in_4_bits = size.layers * (wide * size.quantized - size.quantized_bytes) // share  # what these save
    weights = held * (4 * trained + wide * frozen - in_4_bits)
    gradients = held * 4 * trained
    state = round(held * OPTIMIZER_STATES[job.optimizer] * STATE_BYTES[job.optimizer_dtype] * trained)
    pieces = PIECES[job.optimizer, job.optimizer_dtype]
    always = {"weights": weights, "optimizer_state": state}
    in_rows = {**always, "gradients": gradients, "batch": _batch(job)}
    block, root = size.block_bytes(wide), wide * size.root
    if job.alone:  # cast copies of the rank's own weights stay; those in 4 bits need none
        gathered = size.layers * (block - size.quantized_bytes) + root
        while_block = while_head = while_reduced = gathered
    else:
        while_block, while_head, while_reduced = root + 2 * block, root + block, root + block
    # fp32 buffers of a reduction; without one, gradients are added to those of earlier rows as they are
    buffer = 0 if job.alone and job.handover else 4
    block_grads, reduced = wide * size.block_trained, buffer * size.block_trained
    head_grad = wide * size.vocabulary * size.hidden if size.root_trained else 0
    kept = kept_per_block(size, job)
    tables = 2 * wide * job.tokens_per_row * (size.query_width // size.heads)  # rotary
    stack = size.layers * kept + tables
    working = _working(size, job)
    return [
        Footprint("head", **in_rows, gathered=while_head, activations=stack + _final(size, job), head=_head(size, job)),
        Footprint(
            "backward of the final norm", **in_rows, gathered=while_block, activations=stack + _final_norm(size, job),
            working=_norm_gradients(size, job), whole_gradients=head_grad,
        ),
        Footprint(
            "backward of the last block", **in_rows, gathered=while_block, activations=stack, working=working,
            whole_gradients=head_grad,
        ),
        Footprint(
            "backward of the block before", **in_rows, gathered=while_block, activations=stack - kept,
            working=working, whole_gradients=head_grad + reduced,
        ),
        Footprint(
            "hand-over of the last block's gradients", **in_rows, gathered=while_reduced, activations=stack - kept,
            whole_gradients=head_grad + block_grads + reduced + reduced // share,
        ),
        Footprint(
            "hand-over of the root's gradients", **in_rows,
            whole_gradients=(wide + buffer) * size.root_trained + buffer * size.root_trained // share,
        ),
        Footprint(
            "optimizer", **always, gradients=gradients,
            optimizer_temporaries=round(held * pieces * min(PIECE, 4 * trained)),
        ),
    ]  # fmt: skip


def scoring_bytes(size: ModelSize, job: Job) -> int:
    """At most what a rank needs for a pass of a frozen model: its share of the weights in the computation's dtype or in
    4 bits, gathered blocks and root, a block's activations, and the logits of a chunk of tokens. Not measured."""
    wide = BYTES[job.precision]
    whole = wide * size.parameters - size.layers * (wide * size.quantized - size.quantized_bytes)
    gathered = wide * size.root + 2 * size.block_bytes(wide)
    chunk = min(CHUNK_TOKENS, job.scored_per_row) * size.vocabulary * (4 + wide)
    states = 2 * wide * job.tokens_per_row * size.hidden
    working = activations_per_block(size, job) + wide * size.dequantized
    return whole // job.shard_size + gathered + states + max(chunk, working) + _batch(job)


def kept_per_block(size: ModelSize, job: Job) -> int:
    """Bytes that a block's forward pass leaves for its backward pass."""
    if job.activation_checkpointing == "none":
        return activations_per_block(size, job)
    wide = BYTES[job.precision]
    kept = wide * (size.hidden + sum(linear.gives for linear in _kept_products(size, job)))
    if job.activation_checkpointing != "full":
        kept += _attended(size, wide)
    return job.tokens_per_row * kept


def _kept_products(size: ModelSize, job: Job) -> tuple[Linear, ...]:
    """The layers whose output checkpointing keeps, see `notus.training.activation_checkpointing`."""
    rank = max((linear.rank for linear in size.linears), default=0)
    counted = [linear for linear in size.linears if min(linear.inputs, linear.outputs) > rank]  # a router may be small
    each = {"products": counted, "selective": counted[::2]}.get(job.activation_checkpointing, ())
    return tuple(linear for linear in each if linear is not size.linears[-1] or size.reads_last)


def _attended(size: ModelSize, wide: int) -> int:
    """Bytes per token of the attention's outputs and their normalisers."""
    return size.attentions * (wide * size.attended + 4 * size.heads)


def activations_per_block(size: ModelSize, job: Job) -> int:
    """Bytes that autograd saves of a block's forward pass: what each operation's backward pass reads.

    A norm keeps what was found of it; a linear layer its input if its weight is trained, or its adapter reads it;
    attention its queries, gathered keys and values, output and normalisers; the gated MLP both factors and, where it
    is not fused, what the activation function gave.
    """
    wide, trained = BYTES[job.precision], size.block_trained == size.block
    norms = sum(getattr(norm, job.precision) for norm in size.norms)
    gathered = wide * (size.key_width + size.value_width) * job.key_ratio
    attention = wide * size.query_width + size.attentions * gathered + _attended(size, wide)
    # the product, down's input, is among the linear inputs
    mlp = wide * size.inner * ((2 if size.keeps_factors else 3) if size.gated else 1)
    experts = _expert_activations(size, wide)
    return math.ceil(job.tokens_per_row * (norms + attention + mlp + experts + _linear_inputs(size, wide, trained)))


def _expert_activations(size: ModelSize, wide: int) -> float:
    """Bytes per token that a mixture keeps besides the inputs of its products: what the activation function reads and
    gives, what is weighted by the router, and the order of the tokens, int64."""
    if not size.experts:
        return 0.0
    first, last = size.experts
    gated = first.outputs == 2 * last.inputs
    router = 4 * last.experts + (wide + 3 * 8) * last.copies
    return wide * (first.gives + gated * last.reads + last.gives) + router


def _linear_inputs(size: ModelSize, wide: int, trained: bool) -> int:
    """Bytes per token of what linear layers and adapters keep, an input that several read once; the attention's output
    is kept by the attention."""
    total, seen = 0, {ATTENTION}
    for linear in size.linears:
        if (trained or (linear.rank and not size.dropout)) and linear.source not in seen:
            total += wide * linear.reads
            seen.add(linear.source)
        if linear.rank:
            total += wide * linear.rank + (size.dropout and (wide + 1) * linear.inputs)
    return total


def _final(size: ModelSize, job: Job) -> int:
    """The final norm, and the hidden states of scored positions."""
    return _final_norm(size, job) + job.scored_per_row * (BYTES[job.precision] * size.hidden + 16)


def _final_norm(size: ModelSize, job: Job) -> int:
    return math.ceil(job.tokens_per_row * getattr(size.norms[0], job.precision))


def _norm_gradients(size: ModelSize, job: Job) -> int:
    """What the backward pass of a norm has at once: five fp32 tensors if it is a chain of operations, else few."""
    chain = size.norms[0].bf16 >= 4 * size.hidden
    return 5 * 4 * job.tokens_per_row * size.hidden if chain else 0


def _working(size: ModelSize, job: Job) -> int:
    """A block's intermediate gradients, and its activations if they are computed again."""
    wide = BYTES[job.precision]
    tokens, inner = job.tokens_per_row, size.inner
    # gradients of the factors and of their product, which takes the place of the product where that was kept
    gradients = 1 + size.gated + 2 * size.squares + (size.block_trained != size.block)
    extra = tokens * wide * (gradients * inner + size.hidden) + (wide * size.hidden * inner if size.root_trained else 0)
    extra += wide * size.dequantized
    if size.experts:
        extra = max(extra, _expert_gradients(size, job))
    if job.activation_checkpointing == "none":
        return extra
    again = activations_per_block(size, job)
    if job.activation_checkpointing != "full":
        again -= tokens * (_attended(size, wide) + wide * _taken_over(size, job))
    return again + extra


def _expert_gradients(size: ModelSize, job: Job) -> int:
    """What the backward pass of a mixture has at once, of each token's copies and of the experts' last weights.

    Gradients of the last product's input, and either of its output or of what goes into the activation function.
    """
    first, last = size.experts
    rows = job.tokens_per_row * (size.hidden + last.reads + max(last.gives, first.gives))
    weights = last.experts * last.inputs * last.outputs if size.block_trained == size.block else 0
    return BYTES[job.precision] * (rows + weights)


def _taken_over(size: ModelSize, job: Job) -> int:
    """Elements per token of kept products that a block in work reads as they are, or has let go of again.

    The attention reads what norms and rotary embeddings made of its products, so that these are gone when the MLP's
    backward pass begins; the MLP's factors are read themselves, unless an adapter adds to them.
    """
    kept = _kept_products(size, job)
    return sum(linear.gives for linear in kept if linear not in size.factors or not linear.rank)


def _head(size: ModelSize, job: Job) -> int:
    """The backward pass of the log-probs: a chunk's probabilities in fp32 and their gradient in the computation's
    dtype, and the head's gradient in fp32, beside what is added to it."""
    wide, chunk = BYTES[job.precision], min(CHUNK_TOKENS, job.scored_per_row)
    logits = chunk * size.vocabulary * (4 + wide)
    weights = size.vocabulary * size.hidden if size.root_trained else 0
    return 4 * weights + logits + wide * weights + wide * job.scored_per_row * size.hidden


def _batch(job: Job) -> int:
    """Ids, positions, sources and targets; which keys are gathered, where each token stands first among them, and two
    numbers for each further copy; int64."""
    return round(8 * (job.tokens_per_row * (1 + 3 * job.key_ratio) + 2 * job.scored_per_row))


def checkpointing_of(
    training: "TrainingConfig", rows: "TokenizedDataset", device: torch.device
) -> str | Callable[[PreTrainedModel], str]:
    """Return the mode of activation checkpointing, or for "auto" what chooses it once the model is known; collective.

    Args:
        training: the run's settings.
        rows: the training data.
        device: this rank's.
    """
    if training.activation_checkpointing != "auto":
        return training.activation_checkpointing
    tokens = rows.lengths.sum()
    job = Job(
        shard_size=ranks_per_node() if training.sharding == "hybrid" else world_size(),
        tokens_per_row=training.tokens_per_row,
        scored_per_row=math.ceil(training.tokens_per_row * rows.loss_tokens.sum() / tokens),
        precision=training.precision,
        optimizer=training.optimizer,
        optimizer_dtype=training.optimizer_dtype,
        key_ratio=float(rows.separate_lengths(np.arange(len(rows))).sum() / tokens),
        cpu_offload=training.cpu_offload,
    )
    return functools.partial(choose_checkpointing, job=job, device=device)


def choose_checkpointing(causal_lm: PreTrainedModel, job: Job, device: torch.device) -> str:
    """Choose the fastest mode that is estimated to fit the smallest device, the same on all ranks, and report it.

    If nothing fits, that is "full" with a warning, since the estimate may be off. Collective.

    Args:
        causal_lm: with its adapters, before it is sharded.
        job: what else the memory follows from; its own mode is not looked at.
        device: this rank's.
    """
    capacity = min(gather_objects(capacity_of(device)))
    try:
        size = model_size(causal_lm)
    except UnknownSizeError as error:
        say(
            f"warning: training.activation_checkpointing=auto: {CHECKPOINTING[-1]}, since memory cannot be estimated "
            f"({error}); set training.activation_checkpointing to selective, products or none if it fits"
        )
        return CHECKPOINTING[-1]
    mode = fastest_checkpointing(capacity, size, job)
    need = footprint(size, dataclasses.replace(job, activation_checkpointing=mode)).total + RUNTIME_MARGIN
    fits = need <= capacity
    say(
        f"{'' if fits else 'warning: '}training.activation_checkpointing=auto: {mode}, estimated to need "
        f"{need / GIB:.1f} GiB per rank of {capacity / GIB:.1f} GiB"
        + ("" if fits else "; this may not fit: lower training.tokens_per_row, or take more ranks")
    )
    return mode


def capacity_of(device: torch.device) -> int:
    """Bytes that are free for this rank: on its GPU, or its share of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _available() // int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def _available() -> int:
    """Bytes of host memory that could be had without swapping; where the system does not say, all there are."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
