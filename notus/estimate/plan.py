"""A run on given GPUs: whether it fits, how long a step takes, and which dials would be faster."""

import dataclasses
import functools
from collections.abc import Iterator

from notus.estimate.lengths import Lengths
from notus.estimate.timing import Arithmetic, Steps, arithmetic, communication, pack
from notus.model.flops import Dimensions
from notus.model.gpus import GPU, PER_NODE
from notus.model.size import ModelSize
from notus.training.memory_estimate import (
    CHECKPOINTING,
    RUNTIME_MARGIN,
    Footprint,
    Job,
    fastest_checkpointing,
    footprint,
)


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a setting comes to.

    Attributes:
        setting: with "auto" resolved.
        footprint: bytes at the worst moment.
        steps: rows of a step.
        arithmetic: operations per example.
        compute, communication: seconds of a step, side by side.
        scoring: seconds per example of a pass without gradients, the reference's or an evaluation's.
    """

    setting: Setting
    footprint: Footprint
    steps: Steps
    arithmetic: Arithmetic
    compute: float
    communication: float
    scoring: float

    @property
    def spare(self) -> int:
        """Bytes left of the GPU; negative: what is missing."""
        return self.setting.gpu.capacity - RUNTIME_MARGIN - self.footprint.total

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(self.compute, self.communication)

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
    """Raises ValueError if an example is longer than a row."""
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
    # in scoring, rows are full: as many tokens as fit, whatever the batch size
    rows_per_example = setting.lengths.totals.mean() / setting.tokens_per_row / setting.gpus
    scoring = max(
        work.forward / (_peak(setting) * setting.utilisation * setting.gpus),
        rows_per_example * exchange(backward=False),
    )
    compute = setting.batch_size * work.hardware / speed
    return Plan(
        setting, footprint(setting.size, job_of(setting)), steps, work, compute, steps.rows * exchange(), float(scoring)
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
