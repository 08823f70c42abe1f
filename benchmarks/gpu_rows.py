"""The rows of the table: which configurations are measured, in which order, and how."""

import dataclasses
import gc
import time
import traceback
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
import torch._dynamo.utils
from transformers import MistralConfig

from gpu_shapes import LONGEST, Scale, fitting, pairs, parameters, rows
from gpu_step import Step, Work, build, model_dimensions, predicted_bytes
from notus.data.packing import Example, collate
from profile_step import profiled

GIB = 2**30
LEAST_STEPS, MOST_STEPS, STEPS_OF_DATA = 2, 8, 4
OUT_OF_TIME, OUT_OF_MEMORY = "not run: out of time", "out of memory"


@dataclasses.dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        task: "dpo" or "sft".
        rank: of LoRA; 0: every parameter is trained.
        variant: "shared", "packed" or "padded", see `gpu_shapes.rows`.
        checkpointing: "none", "selective" or "full".
        compile: each block.
        profile: find the shares of its time, too.
    """

    task: str
    rank: int
    variant: str
    checkpointing: str = "full"
    compile: bool = False
    profile: bool = False

    @property
    def name(self) -> str:
        kind = f"LoRA r={self.rank}" if self.rank else "full"
        compiled = ", compiled" if self.compile else ""
        return f"{self.task.upper()} {kind}, {self.variant}, checkpointing {self.checkpointing}{compiled}"


def plan(rank: int) -> list[Row]:
    """Every row, the most important first; `rank`: of the LoRA rows."""
    best = [Row("dpo", 0, "shared", mode, profile=mode == "full") for mode in ("full", "selective", "none")]
    without = [Row("dpo", 0, variant) for variant in ("packed", "padded")]
    compiled = [Row("dpo", 0, "shared", mode, compile=True) for mode in ("full", "selective", "none")]
    others = []
    for task, size, sharing in (("dpo", rank, "shared"), ("sft", 0, "packed")):
        others += [Row(task, size, sharing), Row(task, size, "padded"), Row(task, size, sharing, compile=True)]
        others += [Row(task, size, sharing, mode) for mode in ("selective", "none")]
    others.insert(1, Row("dpo", rank, "packed"))
    return [*best, *without, *compiled, *others]


class Clock:
    """How much time is left, and whether it suffices for one more row."""

    def __init__(self, minutes: float) -> None:
        self._end, self._longest = time.perf_counter() + 60 * minutes, 0.0

    def left(self) -> float:
        """Seconds."""
        return self._end - time.perf_counter()

    def suffices(self) -> bool:
        """Whether a row that takes no longer than the longest so far would end in time."""
        return self.left() > self._longest

    def took(self, seconds: float) -> None:
        """Learn how long a row takes."""
        self._longest = max(self._longest, seconds)


def guarded(clock: Clock, name: str, device: torch.device, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds, or why it found nothing; memory is free again afterwards."""
    if not clock.suffices():
        return {"name": name, "status": OUT_OF_TIME}
    began = time.perf_counter()
    try:
        found = {"name": name, "status": "measured", **measure()}
    except torch.OutOfMemoryError:
        found = {"name": name, "status": OUT_OF_MEMORY}
    except Exception as error:  # one bad row must not cost the others; the exit code tells of it
        traceback.print_exc()
        found = {"name": name, "status": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    release(device)
    clock.took(time.perf_counter() - began)
    return found


def release(device: torch.device) -> None:
    """Free what a row has left: modules and their hooks refer to each other in circles."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(row: Row, scale: Scale, device: torch.device, seconds: float, memory: int | None) -> dict[str, Any]:
    """Measure a row; on CUDA with rows of half as many tokens as long as memory does not suffice.

    Args:
        row: what.
        scale: how large.
        device: where.
        seconds: that the timed steps may take.
        memory: of the device, in bytes.

    Raises:
        torch.OutOfMemoryError: not even the shortest rows fit.
    """
    shape, config = fitting(scale, memory, lora=row.rank > 0)
    tokens = scale.tokens_per_row[row.checkpointing]
    while True:
        found = _try(row, config, scale, device, seconds, tokens)
        if found is not None:
            return {"shape": shape, "parameters": parameters(config), **dataclasses.asdict(row), **found}
        tokens //= 2
        release(device)
        if tokens < scale.least_tokens_per_row:
            raise torch.OutOfMemoryError("not even the shortest rows fit")


def _try(
    row: Row, config: MistralConfig, scale: Scale, device: torch.device, seconds: float, tokens_per_row: int
) -> dict[str, Any] | None:
    """None if memory does not suffice; what was built is gone by the return."""
    try:
        policy, work = build(config, device, rank=row.rank, checkpointing=row.checkpointing, compile=row.compile)
        step = Step(policy, row.task, config.vocab_size)
        steps = steps_of(row, scale, config.vocab_size)
        longest = LONGEST // scale.divisor
        batches = [rows(row.variant, examples, tokens_per_row, longest) for examples in steps]
        times = timed(lambda number: step(batches[number]), seconds, device, warm_up=2 if row.compile else 1)
        found: dict[str, Any] = {
            "tokens_per_row": tokens_per_row,
            "pairs_per_step": len(steps[0]),
            "rows_per_step": len(batches[0]),
            **rates(times, steps),
            "necessary_flops_per_second": median(work.necessary(steps[number]) / took for number, took in times),
            "done_flops_per_second": median(work.done(batches[number]) / took for number, took in times),
            **peaks(device),
            "predicted_gib": predicted_bytes(work, row.checkpointing, [r for b in batches for r in b]) / GIB,
        }
        if row.profile:
            found["shares"] = profiled(lambda: step(batches[0]))
        return found
    except torch.OutOfMemoryError:
        return None


def steps_of(row: Row, scale: Scale, vocab: int) -> list[list[Example]]:
    """The same few steps' examples for every row of a task."""
    size = scale.pairs_per_step
    examples = pairs(STEPS_OF_DATA * size, scale, vocab, num_branches=2 if row.task == "dpo" else 1)
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def timed(
    step: Callable[[int], object], seconds: float, device: torch.device, warm_up: int = 1
) -> list[tuple[int, float]]:
    """(which of the steps of data, seconds) of some steps after warming up: for `seconds`, but at least two."""
    for number in range(warm_up):
        _seconds(step, number, device)
    times: list[tuple[int, float]] = []
    while len(times) < LEAST_STEPS or (len(times) < MOST_STEPS and sum(took for _, took in times) < seconds):
        number = (warm_up + len(times)) % STEPS_OF_DATA
        times.append((number, _seconds(step, number, device)))
    return times


def _seconds(step: Callable[[int], object], number: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step(number)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def rates(times: Sequence[tuple[int, float]], steps: Sequence[Sequence[Example]]) -> dict[str, Any]:
    """Medians over the timed steps; tokens are those of packed rows with sharing, whatever the variant."""
    tokens = [sum(len(item.trunk) + sum(map(len, item.branches)) for item in step) for step in steps]
    return {
        "steps": len(times),
        "seconds_per_step": median(took for _, took in times),
        "pairs_per_second": median(len(steps[number]) / took for number, took in times),
        "tokens_per_second": median(tokens[number] / took for number, took in times),
    }


def necessary_rate(
    config: MistralConfig, steps: Sequence[Sequence[Example]], times: Sequence[tuple[int, float]]
) -> float:
    """Necessary operations per second of full fine-tuning, whoever does it."""
    work = Work(model_dimensions(config), adapters=0, recomputed=0, attention_again=False)
    return median(work.necessary(steps[number]) / took for number, took in times)


def peaks(device: torch.device) -> dict[str, float]:
    """GiB that were allocated, and reserved by the allocator, at most since the last `release`; empty on CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


def recompiles(scale: Scale, device: torch.device, steps: int = 50) -> dict[str, Any]:
    """How many graphs compiled blocks come to over steps of rows that all differ; of two layers, which are alike."""
    whole = next(iter(scale.shapes.values()))
    config = MistralConfig(**{**whole.to_dict(), "num_hidden_layers": 2})
    policy, _ = build(config, device, rank=0, checkpointing="full", compile=True)
    examples, rng = pairs(4 * steps, scale, config.vocab_size), np.random.default_rng(0)
    torch._dynamo.utils.counters.clear()
    after = []
    for number in range(steps):
        row = examples[4 * number : 4 * number + int(rng.integers(1, 5))]
        policy(collate(row, 2).to(device)).sum().backward()
        policy.zero_grad()
        after.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return {"steps": steps, "graphs": after[-1], "graphs_after_two_steps": after[1], "graphs_by_step": after}
