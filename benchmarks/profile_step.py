"""Where a training step's time goes, by kind of work, from torch's profiler; on CPU and on CUDA.

    from profile_step import profiled
    print(profiled(step, steps=2))    # {"matmul": 0.61, "attention": 0.12, ..., "host": 0.03}

On CPU a kind's time is the time of its operations themselves. On CUDA it is the time of the kernels that they launch,
and what is left of the wall clock is the device's idle time, for which the host (or the data) is to blame.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

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
    lines = [f"| {kind} | {share:.1%} |" for kind, share in sorted(found.items(), key=lambda item: -item[1])]
    return "\n".join(["| kind | share of the step |", "|---|---|", *lines])


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
