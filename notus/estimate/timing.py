"""How long a step takes: arithmetic at an assumed utilisation, or communication over the slowest link, if that is more.

Within a row, gathering and reduction run beside the computation; a step takes as long as the longer of the two. Not
counted: latencies, loading, the optimizer's update, checkpoints, rows that wait for other ranks beyond their tokens.
"""

import dataclasses
import math

import numpy as np

from notus.data.packing import check_fits
from notus.data.schedule import deal
from notus.estimate.lengths import Lengths
from notus.model.flops import Dimensions, forward_flops, visible_pairs
from notus.model.gpus import GPU, LINK_EFFICIENCY, PER_NODE
from notus.model.size import ModelSize
from notus.training.memory_estimate import BYTES

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
        ranks = deal(tokens, tokens, world_size, tokens_per_row)
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
    """Means over examples. A frozen weight has no gradient; adapters are counted with their two passes."""
    scored = lengths.branches.sum(axis=1)
    forward = forward_flops(dimensions, lengths.trunks, lengths.branches, scored).mean()
    pairs = visible_pairs(lengths.trunks, lengths.branches).mean()
    attention = 4 * dimensions.layers * dimensions.attention_width * pairs
    linear, head = forward - attention, 2 * dimensions.head_weights * scored.mean()
    full = size.trained == size.parameters
    adapters = 0.0 if full else 2 * size.trained * lengths.totals.mean()
    necessary = 3 * forward if full else 2 * linear + 3 * attention + 3 * adapters
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
    gathered = BYTES[precision] * (size.layers * size.block * (1 + backward) + size.root)
    return gathered, 4 * size.trained * backward
