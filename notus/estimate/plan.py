"""Whether a job fits given GPUs, how long a step takes, and which settings would be faster.

A step takes its arithmetic at an assumed utilisation, or communication over the slowest link, if that is more.

Within a row, gathering and reduction run beside the computation; a step takes as long as the longer of the two. Not
counted: latencies, loading, the optimizer's update, checkpoints, rows that wait for other ranks beyond their tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np

from notus.data.batching import balance
from notus.data.packing import check_fits
from notus.estimate.sizes import Lengths
from notus.model.flops import GPU, LINK_EFFICIENCY, PER_NODE, Dimensions, forward_flops, visible_pairs
from notus.model.size import ModelSize
from notus.training.memory_estimate import (
    BYTES,
    CHECKPOINTING,
    RUNTIME_MARGIN,
    Footprint,
    Job,
    fastest_checkpointing,
    footprint,
)

STEPS = 16
SMALL_STEP = 512


@dataclasses.dataclass(frozen=True)
class Steps:
    """A mean step, from packing some.

    Attributes:
        rows: packed rows of each rank.
        fullest: tokens of the fullest row seen.
        imbalance: tokens of the heaviest rank over the mean rank's.
    """

    rows: float
    fullest: int
    imbalance: float


def pack(lengths: Lengths, *, batch_size: int, world_size: int, tokens_per_row: int) -> Steps:
    """Deal some steps as training does. Raises ValueError for an example longer than a row."""
    totals = lengths.totals
    check_fits(int(totals.max()), tokens_per_row)
    generator = np.random.default_rng(0)
    rows, imbalance, fullest = [], [], 0
    for _ in range(STEPS if batch_size <= SMALL_STEP else 2):
        chosen = generator.integers(0, len(totals), batch_size)
        tokens = totals[chosen].tolist()
        ranks = balance(tokens, tokens, world_size, tokens_per_row)
        loads = [sum(int(totals[chosen[item]]) for row in rank for item in row) for rank in ranks]
        rows.append(len(ranks[0]))
        imbalance.append(max(loads) * world_size / sum(loads))
        fullest = max(fullest, *(int(totals[chosen[row]].sum()) for rank in ranks for row in rank if row))
    return Steps(float(np.mean(rows)), fullest, float(np.mean(imbalance)))


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Operations per example: a multiply and an add are two.

    Attributes:
        forward: a forward pass (the reference's, or an evaluation's).
        necessary: forward and backward pass, shared trunks once, nothing computed again.
        hardware: the same with what activation checkpointing and the head's chunks compute again.
    """

    forward: float
    necessary: float
    hardware: float


def arithmetic(size: ModelSize, dimensions: Dimensions, lengths: Lengths, checkpointing: str) -> Arithmetic:
    """Means over examples. A frozen weight has no gradient; adapters are counted with their two passes.

    Where LoRA trains modules in full, those of blocks count as adapters, and the head's gradient as one more product.
    """
    scored = lengths.branches.sum(axis=1)
    forward = forward_flops(dimensions, lengths.trunks, lengths.branches, scored).mean()
    pairs = visible_pairs(lengths.trunks, lengths.branches).mean()
    attention = 4 * dimensions.layers * dimensions.attention_width * pairs
    linear, head = forward - attention, 2 * dimensions.head_weights * scored.mean()
    full = size.trained == size.parameters
    adapters = 0.0 if full else 2 * (size.trained - size.root_trained) * lengths.totals.mean()
    head_gradient = head if size.root_trained >= size.vocabulary * size.hidden else 0.0
    necessary = 3 * forward if full else 2 * linear + 3 * attention + 3 * adapters + head_gradient
    products = (linear - head) * _recomputed_share(size, checkpointing)
    again = products + (0.0 if checkpointing == "none" else adapters) + (attention if checkpointing == "full" else 0.0)
    return Arithmetic(float(forward), float(necessary), float(necessary + again + head))


def _recomputed_share(size: ModelSize, checkpointing: str) -> float:
    """Of a block's products, the share that its backward pass computes again: not the last one, unless it is read."""
    again = {"selective": size.linears[1::2], "full": size.linears}.get(checkpointing, ())
    counted = sum(linear.weights for linear in again if linear is not size.linears[-1] or size.reads_last)
    return counted / sum(linear.weights for linear in size.linears)


def communication(
    size: ModelSize, gpu: GPU, *, world_size: int, hybrid: bool, precision: str, backward: bool = True
) -> float:
    """Seconds that the collectives of one row take.

    A collective of n ranks moves (n - 1) / n of its bytes over the slowest link. Between nodes each GPU has an adapter
    of its own, and as many of them carry a collective as a node has GPUs.
    """
    shard = min(world_size, PER_NODE) if hybrid else world_size
    if shard == 1 and world_size == 1:
        return 0.0
    speed = gpu.link if shard <= PER_NODE else min(gpu.link, PER_NODE * gpu.network)
    gathered, reduced = moved_bytes(size, precision=precision, backward=backward)
    seconds = (gathered + reduced) * (shard - 1) / shard / (speed * 1e9 * LINK_EFFICIENCY)
    if hybrid and backward:
        nodes = math.ceil(world_size / PER_NODE)
        replicated = 2 * reduced / shard * (nodes - 1) / nodes
        seconds += replicated / (gpu.network * 1e9 * LINK_EFFICIENCY)
    return seconds


def moved_bytes(size: ModelSize, *, precision: str, backward: bool) -> tuple[int, int]:
    """Whole tensors of one row: what is gathered, blocks again for the backward pass, and the reduced gradients."""
    wide = BYTES[precision]
    gathered = size.layers * size.block_bytes(wide) * (1 + backward) + wide * size.root
    return gathered, 4 * size.trained * backward


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that an estimate follows from.

    Attributes:
        size, dimensions: of the model.
        gpu, gpus: which, and how many.
        lengths: of the examples.
        batch_size: examples per optimizer step.
        tokens_per_row, checkpointing: the dials of memory and speed; checkpointing may be "auto".
        precision, optimizer, optimizer_dtype, hybrid, cpu_offload: as in the config.
        utilisation: share of the GPU's peak at which it computes, recomputation included.
        mismatched: completions beside those that are learned, which every step scores without gradients; None: none.
    """

    size: ModelSize
    dimensions: Dimensions
    gpu: GPU
    gpus: int
    lengths: Lengths
    batch_size: int
    tokens_per_row: int
    checkpointing: str
    precision: str
    optimizer: str
    optimizer_dtype: str
    hybrid: bool
    cpu_offload: bool
    utilisation: float
    mismatched: Lengths | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a setting comes to.

    Attributes:
        setting: with "auto" resolved.
        footprint: bytes at the worst moment.
        steps: rows of a step.
        arithmetic: operations per example.
        compute, communication: seconds of a step, side by side.
        scoring: seconds per example of a pass without gradients, the reference's or an evaluation's; with the pass over
            its mismatched completion, where the loss needs that.
        mismatched: seconds of a step's pass over mismatched completions, before the rows.
    """

    setting: Setting
    footprint: Footprint
    steps: Steps
    arithmetic: Arithmetic
    compute: float
    communication: float
    scoring: float
    mismatched: float

    @property
    def spare(self) -> int:
        """Bytes left of the GPU; negative: what is missing."""
        return self.setting.gpu.capacity - RUNTIME_MARGIN - self.footprint.total

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(self.compute, self.communication) + self.mismatched

    @property
    def mfu(self) -> float:
        """Share of the peak that necessary operations reach."""
        setting = self.setting
        rate = self.arithmetic.necessary * setting.batch_size / self.seconds / setting.gpus
        return rate / (_peak(setting))


def _peak(setting: Setting) -> float:
    """Operations per second of one GPU."""
    return setting.gpu.rate(setting.precision) * 1e12


def make_plan(setting: Setting) -> Plan:
    """Raises ValueError if an example, or a mismatched one, is longer than a row."""
    setting = _resolve(setting)
    work = arithmetic(setting.size, setting.dimensions, setting.lengths, setting.checkpointing)
    steps = pack(
        setting.lengths,
        batch_size=setting.batch_size,
        world_size=setting.gpus,
        tokens_per_row=setting.tokens_per_row,
    )
    speed = _peak(setting) * setting.utilisation * setting.gpus / steps.imbalance
    exchange = functools.partial(
        communication,
        setting.size,
        setting.gpu,
        world_size=setting.gpus,
        hybrid=setting.hybrid,
        precision=setting.precision,
    )

    def scoring(lengths: Lengths) -> float:
        """Seconds per example; rows are full, as many tokens as fit, whatever the batch size."""
        forward = arithmetic(setting.size, setting.dimensions, lengths, setting.checkpointing).forward
        rows_per_example = lengths.totals.mean() / setting.tokens_per_row / setting.gpus
        computing = forward / (_peak(setting) * setting.utilisation * setting.gpus)
        return float(max(computing, rows_per_example * exchange(backward=False)))

    mismatched = 0.0
    if setting.mismatched is not None:
        check_fits(int(setting.mismatched.totals.max()), setting.tokens_per_row)
        mismatched = scoring(setting.mismatched)
    return Plan(
        setting,
        footprint(setting.size, job_of(setting)),
        steps,
        work,
        compute=setting.batch_size * work.hardware / speed,
        communication=steps.rows * exchange(),
        scoring=scoring(setting.lengths) + mismatched,
        mismatched=setting.batch_size * mismatched,
    )


def job_of(setting: Setting) -> Job:
    """What the bytes of one rank follow from: a row as full as may be."""
    scored = float(setting.lengths.branches.sum() / setting.lengths.totals.sum())
    return Job(
        shard_size=min(setting.gpus, PER_NODE) if setting.hybrid else setting.gpus,
        tokens_per_row=setting.tokens_per_row,
        scored_per_row=round(setting.tokens_per_row * scored),
        precision=setting.precision,
        optimizer=setting.optimizer,
        optimizer_dtype=setting.optimizer_dtype,
        activation_checkpointing=setting.checkpointing,
        key_ratio=setting.lengths.key_ratio,
        cpu_offload=setting.cpu_offload,
    )


def _resolve(setting: Setting) -> Setting:
    """ "auto" as the trainer resolves it: the first that fits."""
    if setting.checkpointing != "auto":
        return setting
    mode = fastest_checkpointing(setting.gpu.capacity, setting.size, job_of(setting))
    return dataclasses.replace(setting, checkpointing=mode)


def fastest(setting: Setting) -> Plan | None:
    """The fastest that fits, over checkpointing modes and row sizes; None if none fits."""
    plans = (make_plan(one) for one in _neighbours(setting))
    return min((plan for plan in plans if plan.spare >= 0), key=lambda plan: plan.seconds, default=None)


def _neighbours(setting: Setting) -> Iterator[Setting]:
    longest = int(setting.lengths.totals.max())
    for tokens in (2048, 4096, 8192, 16384):
        for name in CHECKPOINTING if tokens >= longest else ():
            yield dataclasses.replace(setting, tokens_per_row=tokens, checkpointing=name)
