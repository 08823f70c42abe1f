"""Where a training step's time goes, by kind of work, from torch's profiler; on CPU and on CUDA.

    python benchmarks/profile_step.py [--size 15m|100m] [--precision fp32|bf16]    # a DPO step on this CPU

    from profile_step import profiled
    print(profiled(step, steps=2))    # {"matmul": 0.61, "attention": 0.12, ..., "host": 0.03}

The command takes a made model and pairs of the made lengths, as vs_trl.py does: two steps to warm up, then two under
the profiler.

On CPU a kind's time is the time of its operations themselves. On CUDA it is the time of the kernels that they launch,
and what is left of the wall clock is the device's idle time, for which the host (or the data) is to blame. While
several of the device's events run, the time counts once, for the one that began last: streams overlap, and a copy that
the host waits for may last as long as all that the device still has to do. So the shares sum to 1.
"""

import argparse
import heapq
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
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
# The name of a kernel that the compiler made lists what went into it, copies and attention among them.
GENERATED = re.compile(r"^(triton|cpp)_(?!tem|mm)")
# Host events that launch or wait, and the profiler's own: their ids are numbered apart from those of operations, so
# torch's profiler may show them other operations' kernels.
CALLS = re.compile(
    r"^cu(da)?[A-Z]|^Command Buffer Full|Buffer Request|^Buffer Flush|^Instrumentation$|^Resource$|Loading$"
)
WAITS = re.compile(
    r"^(Stream|Event|Context|Device) Sync|^Stream Wait Event"
)  # no work, though on the device's timeline
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
        Kind -> share; they sum to 1.
    """
    events = list(events)
    host = [event for event in events if event.device_type == DeviceType.CPU]
    on_device = [event for event in events if _is_work(event)]
    if on_device:
        found = _by_kind([(*_span(event), _kind_on_device(chain)) for event, chain in _owned(host, on_device)])
    else:
        found = defaultdict(float)
        for event in host:
            found[_kind(_chain(event))] += event.self_cpu_time_total
    wall = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    found["host"] = max(0.0, wall - sum(took for kind, took in found.items() if kind != "host"))
    return {kind: found[kind] / wall for kind in KINDS}


def longest(events: Iterable[Any], count: int = 12) -> list[tuple[str, str, float]]:
    """(kind, name, seconds) of the device's longest events, the longest first: what stands behind a share."""
    events = list(events)
    host = [event for event in events if event.device_type == DeviceType.CPU]
    owned = _owned(host, [event for event in events if _is_work(event)])
    found = [(_kind_on_device(chain), event.name[:80], event.time_range.elapsed_us() / 1e6) for event, chain in owned]
    return sorted(found, key=lambda each: -each[2])[:count]


def table(found: dict[str, float]) -> str:
    """A markdown table of shares, the largest first."""
    rows = sorted(found.items(), key=lambda item: -item[1])
    return markdown(("kind", "share of the step"), [(kind, f"{share:.1%}") for kind, share in rows])


def _is_work(event: Any) -> bool:
    on_device = event.device_type == DeviceType.CUDA and not event.is_user_annotation
    return on_device and not WAITS.search(event.name)


def _span(event: Any) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end


def _owned(host: list[Any], on_device: list[Any]) -> list[tuple[Any, list[str]]]:
    """Each event of the device once, with the names of what launched it, from the inside out, its own first.

    An operation lists its kernels by name and duration alone. What it lists and the device has not, or has no more, is
    a range's shadow on the device or another operation's kernel.
    """
    unclaimed: dict[tuple[str, float], list[Any]] = defaultdict(list)
    for event in sorted(on_device, key=_span, reverse=True):
        unclaimed[event.name, round(event.time_range.elapsed_us(), 3)].append(event)
    found = []
    for event in sorted(host, key=_span):
        for kernel in () if CALLS.search(event.name) else event.kernels:
            if same := unclaimed.get((kernel.name, round(kernel.duration, 3))):
                found.append((same.pop(), [kernel.name, *_chain(event)]))
    return [*found, *((event, [event.name]) for same in unclaimed.values() for event in same)]


def _by_kind(spans: list[tuple[float, float, str]]) -> dict[str, float]:
    """Microseconds of each kind, from (start, end, kind); while several run, of the one that began last."""
    found: dict[str, float] = defaultdict(float)
    waiting, running = sorted(spans, reverse=True), list[tuple[float, float, str]]()
    edges = sorted({edge for start, end, _ in spans for edge in (start, end)})
    for left, right in itertools.pairwise(edges):
        while waiting and waiting[-1][0] <= left:
            start, end, kind = waiting.pop()
            heapq.heappush(running, (-start, end, kind))
        while running and running[0][1] <= left:
            heapq.heappop(running)
        if running:
            found[running[0][2]] += right - left
    return found


def _chain(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _kind(chain: list[str]) -> str:
    spoken = [name for name in chain if not GENERATED.search(name)]
    for kind, pattern in RANGES.items():
        if any(re.search(pattern, name) for name in spoken):
            return kind
    for name in chain:
        if GENERATED.search(name):
            return "elementwise"
        for kind, pattern in OPERATIONS.items():
            if re.search(pattern, name):
                return kind
    return "host"


def _kind_on_device(chain: list[str]) -> str:
    """A kernel of which no name says more is elementwise: it is work, and not the device's idle time."""
    kind = _kind(chain)
    return "elementwise" if kind == "host" else kind


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
