"""Where a training step's time goes, by kind of work, from torch's profiler; on CPU and on CUDA.

    python benchmarks/profile_step.py [--size 15m|100m] [--precision fp32|bf16]    # a DPO step on this CPU

    from profile_step import profiled
    print(profiled(step, steps=2))    # {"matmul": 0.61, "attention": 0.12, ..., "host": 0.03}

The command takes a made model and pairs of the made lengths, as vs_trl.py does: two steps to warm up, then two under
the profiler.

On CPU a kind's time is the time of its operations themselves. On CUDA it is the time of the kernels that they launch,
and what is left of the wall clock is the device's idle time, for which the host (or the data) is to blame.
"""

import argparse
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from common import SIZES, made_lengths, markdown, model_config

# A range around the operation decides first, whatever the operation is. torch names optimizer steps itself.
RANGES = {
    "optimizer": r"^Optimizer\.|^clip$",
    "head": r"LinearLogprobs|^head$",
    "communication": r"^FSDP::|c10d::|^nccl:|^gloo:|^ncclDevKernel|^ncclKernel",
    "gather": r"_GatherKeys",
    "attention": r"scaled_dot_product|flash|fmha|efficient_attention|varlen_attn",
}
# Then the operation or kernel, the innermost that says what it is.
OPERATIONS = {
    "matmul": r"^aten::(mm|addmm_?|bmm|baddbmm_?|_addmm_activation|mkldnn_linear|_grouped_mm)$"
    r"|mkldnn::|gemm|gemv|cutlass|xmma|nvjet|cublas|splitK|^(triton|cpp)_(tem|mm)",
    "copies": r"^aten::(copy_|_to_copy|clone|contiguous|cat|index_select|index_add_|index|index_put_?|fill_|zero_|split"
    r"_with_sizes_copy|select_backward|slice_backward|constant_pad_nd|embedding)$|^Memcpy|^Memset|[Cc]opy|CatArray",
    "host": r"^aten::(empty\w*|(_unsafe_)?view\w*|_?reshape\w*|transpose|t|slice|split\w*|as_strided|expand|select"
    r"|(un)?squeeze|detach_?|alias|permute|narrow|unbind|resize_|item|_local_scalar_dense|is_\w+|result_type|lift_fresh|to|chunk)$",
    # the rest: norms, rotary positions, activations, sums; and the fused kernels of a compiled block
    "elementwise": r"^aten::|^(triton|cpp)_|CompiledF|Torch-Compiled|at::native|vectorized|reduce|elementwise",
}
KINDS = ("matmul", "attention", "head", "gather", "optimizer", "communication", "elementwise", "copies", "host")


def profiled(step: Callable[[], object], steps: int = 1) -> dict[str, float]:
    """The shares of `steps` calls of `step`; call it before to warm up."""
    return shares(record(step, steps))


def record(step: Callable[[], object], steps: int = 1) -> Any:
    """The profiler's events of `steps` calls of `step`."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    return profiler.events()


def shares(events: Iterable[Any]) -> dict[str, float]:
    """The share of the wall clock of each of `KINDS`; on CUDA, "host" is the time in which the device stands idle.

    Args:
        events: of a `torch.profiler.profile` that has ended, `profiler.events()`.

    Returns:
        Kind -> share; they sum to 1, or to more where kernels overlap.
    """
    events = list(events)
    on_device = [event for event in events if _is_kernel(event)]
    host = [event for event in events if event.device_type == DeviceType.CPU]
    wall = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    found: dict[str, float] = defaultdict(float)
    for chain, duration in _kernels(host, on_device) if on_device else _operations(host):
        found[_kind(chain)] += duration
    busy = _union(on_device) if on_device else sum(found.values()) - found["host"]
    found["host"] = max(0.0, wall - busy)
    return {kind: found[kind] / wall for kind in KINDS}


def table(found: dict[str, float]) -> str:
    """A markdown table of shares, the largest first."""
    rows = sorted(found.items(), key=lambda item: -item[1])
    return markdown(("kind", "share of the step"), [(kind, f"{share:.1%}") for kind, share in rows])


def _is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def _operations(host: list[Any]) -> Iterator[tuple[list[str], float]]:
    """(names from the inside out, microseconds of its own) of each operation."""
    for event in host:
        yield _chain(event), event.self_cpu_time_total


def _kernels(host: list[Any], on_device: list[Any]) -> Iterator[tuple[list[str], float]]:
    """(names from the inside out, microseconds) of each kernel; one that no operation owns up to has its own alone."""
    unclaimed: dict[str, float] = defaultdict(float)
    for event in on_device:
        unclaimed[event.name] += event.time_range.elapsed_us()
    for event in host:
        for kernel in event.kernels:
            if kernel.name in unclaimed:  # else a range's shadow on the device
                unclaimed[kernel.name] -= kernel.duration
                yield [kernel.name, *_chain(event)], kernel.duration
    for name, duration in unclaimed.items():
        yield [name], max(0.0, duration)


def _chain(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _kind(chain: list[str]) -> str:
    for kind, pattern in RANGES.items():
        if any(re.search(pattern, name) for name in chain):
            return kind
    for name in chain:
        for kind, pattern in OPERATIONS.items():
            if re.search(pattern, name):
                return kind
    return "host"


def _union(events: list[Any]) -> float:
    """Microseconds in which at least one of the events runs."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# ---- the command ----

WARM_UP, STEPS, PAIRS_PER_STEP, TOKENS_PER_ROW = 2, 2, 16, 1280


def measure(size: str, precision: str) -> dict[str, float]:
    """Shares of a step's time on this CPU."""
    from notus.runtime.distributed import process_group
    from step import Step, build, random_example, rows

    generator, config = np.random.default_rng(0), model_config(size)
    lengths = 1 + made_lengths(generator, (WARM_UP + STEPS) * PAIRS_PER_STEP)
    examples = [random_example(generator, config.vocab_size, *each) for each in lengths]
    with process_group() as device:
        step = Step(build(config, device, precision=precision)[0], "dpo", config.vocab_size)
        numbers = itertools.count()

        def take() -> None:
            start = next(numbers) * PAIRS_PER_STEP
            step(rows("shared", examples[start : start + PAIRS_PER_STEP], TOKENS_PER_ROW, TOKENS_PER_ROW))

        for _ in range(WARM_UP):
            take()
        return profiled(take, STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a DPO step goes: see the head of this file.")
    parser.add_argument("--size", choices=list(SIZES), default="15m")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    print(table(measure(args.size, args.precision)))


if __name__ == "__main__":
    main()
