"""What the parent and the measured processes say to each other: a job file in, an outcome file out."""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from notus.model.flops import Dimensions

BETA = 0.1
WARMUP_RATIO = 0.1
MAX_GRAD_NORM = 1.0


class Stored:
    """Reads and writes a dataclass as JSON."""

    @classmethod
    def read(cls, path: str | Path) -> Self:
        return cls(**json.loads(Path(path).read_text()))

    def write(self, path: str | Path) -> None:
        assert dataclasses.is_dataclass(self)
        Path(path).write_text(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Job(Stored):
    """One run of one side: RMSprop, linear schedule, no dropout, examples in the order of the file.

    Attributes:
        model: folder of a Hugging Face causal LM with its tokenizer.
        pairs: JSONL file with the strings `prompt`, `chosen` and `rejected`.
        scratch: an empty folder for whatever the run writes.
        precision: `fp32` or `bf16` (fp32 weights, bf16 arithmetic).
        max_length: no pair is longer than this, so that nothing is truncated.
        options: what is particular to this side.
    """

    model: str
    pairs: str
    scratch: str
    batch_size: int
    epochs: int
    precision: str
    learning_rate: float
    max_length: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome(Stored):
    """What one run of one side measured.

    Attributes:
        seconds: reference pass and training; without imports, loading and tokenisation.
        reference_seconds: of these, a reference pass ahead of training (0 where it runs inside the steps).
        total_seconds: from after the imports to the last step's end: loading and tokenisation too; no export.
        losses: one per optimizer step.
        step_seconds: one per optimizer step; where the reference pass runs inside the steps, it is in them.
        baseline_mib: memory in use after the imports (on CUDA: 0).
        peak_mib: the most memory in use from then on: resident set, or allocated CUDA memory.
        machine: device, threads and version of torch.
        tokens: per pair, in the order of the file, what `describe_tokens` says.
    """

    seconds: float
    reference_seconds: float
    total_seconds: float
    losses: list[float]
    step_seconds: list[float]
    baseline_mib: float
    peak_mib: float
    machine: str
    tokens: list[list[Any]]


@dataclass(frozen=True)
class Machine(Stored):
    """The model's sizes and the machine's rate at them.

    Attributes:
        flops_per_second: of the matrix products of a training step.
        size: what the arithmetic follows from.
        parameters: of the whole model.
        description: device, threads and version of torch.
    """

    flops_per_second: float
    size: Dimensions
    parameters: int
    description: str

    @classmethod
    def read(cls, path: str | Path) -> Self:
        stored = json.loads(Path(path).read_text())
        return cls(**{**stored, "size": Dimensions(**stored["size"])})


def describe_tokens(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> list[Any]:
    """A pair's token counts and the digest of its ids: `[prompt, chosen, rejected, digest]`."""
    counts = [len(prompt), len(chosen), len(rejected)]
    ids = [*prompt, *chosen, *rejected]
    packed = struct.pack(f"<{len(ids) + 3}q", *counts, *ids)
    return [*counts, hashlib.blake2b(packed, digest_size=8).hexdigest()]
