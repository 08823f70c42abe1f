"""What the ranks send in a row, beside what they compute: counted on fake ranks, and by the data sheets.

    python benchmarks/communication.py [--gpu a100-40gb] [--output FILE]

Counted: the collectives of one row of a small model on 8 fake ranks, in their order among the blocks' products, beside
the bytes that `notus.estimate.plan.communication` takes. Estimated: of the Notus recipe, a block's computation
beside its gathering and its reduction, and the memory of each checkpointing mode. Needs no GPU and no weights; nothing
is sent or timed.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MistralConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, installed or not

from estimator import ROWS, SHAPES, size_of
from fake_step import CPU, fake_world, packed_row, run_row
from notus.estimate.inputs import TYPICAL, draw, find_config, sizes
from notus.estimate.plan import Setting, job_of, make_plan, moved_bytes
from notus.model.flops import LINK_EFFICIENCY, find_gpu
from notus.model.size import ModelSize
from notus.training.memory_estimate import CHECKPOINTING, RUNTIME_MARGIN, footprint
from notus.training.parallelize import build_policy

RANKS = 8
UTILISATION = 0.45
TOKENS = (2048, 4096, 8192)
KINDS = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce", "allreduce_": "all-reduce"}


@dataclasses.dataclass(frozen=True)
class Event:
    """What a rank issues: "gather", "reduce", "all-reduce" or "product", and the bytes of its whole tensor."""

    kind: str
    size: int
    backward: bool


class _Events(TorchDispatchMode):
    """Note collectives and matrix products in the order in which the host issues them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Event] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        kind = KINDS.get(name.removeprefix("c10d::")) if name.startswith("c10d::") else None
        backward = torch._C._current_graph_task_id() != -1
        if kind is not None:
            self.found.append(Event(kind, max(each.nbytes for each in tree_leaves(args) if _tensor(each)), backward))
        elif name == "aten::mm":
            self.found.append(Event("product", 0, backward))
        return func(*args, **(kwargs or {}))


def _tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def count(shape: str, checkpointing: str = "none", rows: int = 1) -> list[Event]:
    """What rank 0 issues for `rows` rows, forward and backward."""
    with fake_world(RANKS):
        policy = build_policy(
            Path("."), MistralConfig(**SHAPES[shape]), device=CPU, precision="bf16",
            activation_checkpointing=checkpointing,
        )  # fmt: skip
        batch = packed_row(*ROWS[shape])
        with _Events() as events:
            for _ in range(rows):
                run_row(policy, batch)
    return events.found


def order(events: list[Event]) -> str:
    """The events on a line, products summed up: where a gathering stands ahead of products, it can hide behind them."""
    parts = []
    for (kind, size, _), group in itertools.groupby(events, key=dataclasses.astuple):
        times = len(list(group))
        told = f"{kind} {size / 1e6:.1f} MB" + f" x{times}" * (times > 1)
        parts.append(f"{times} products" if kind == "product" else told)
    return ", ".join(parts)


def counted(shape: str) -> list[str]:
    """The count beside the estimate."""
    size, lines = size_of(MistralConfig(**SHAPES[shape]), 0), []
    for rows in (1, 2):
        events = count(shape, rows=rows)
        gathers = [event.size for event in events if event.kind == "gather"]
        reduces = [event.size for event in events if event.kind == "reduce"]
        gathered, reduced = moved_bytes(size, precision="bf16", backward=True)
        lines.append(
            f"counted, {rows} row{'s' * (rows > 1)}, {size.layers} blocks, {RANKS} ranks: {len(gathers)} gatherings of "
            f"{sum(gathers) / 1e6:.1f} MB in all (estimate {rows * gathered / 1e6:.1f}), {len(reduces)} reductions of "
            f"{sum(reduces) / 1e6:.1f} MB ({rows * reduced / 1e6:.1f})"
        )
    events = count(shape)
    for name, backward in (("forward", False), ("backward", True)):
        lines.append(f"  {name}: {order([event for event in events if event.backward == backward])}")
    return lines


def block_times(size: ModelSize, gpu_name: str) -> list[str]:
    """Estimated milliseconds of a block: its computation, beside what the links do meanwhile."""
    gpu = find_gpu(gpu_name)
    rate, link = gpu.rate("bf16") * 1e12 * UTILISATION, gpu.link * 1e9 * LINK_EFFICIENCY * RANKS / (RANKS - 1)
    weights = sum(linear.weights for linear in size.linears)
    gather, reduce = 2e3 * size.block / link, 4e3 * size.block / link
    lines = ["| tokens a row | forward | gathering | backward | gathering + reduction |", "|---|---|---|---|---|"]
    for tokens in TOKENS:
        forward = 2e3 * weights * tokens / rate
        lines.append(f"| {tokens} | {forward:.1f} | {gather:.1f} | {2 * forward:.1f} | {gather + reduce:.1f} |")
    fewest = max(gather, (gather + reduce) / 2) * rate / (2e3 * weights)
    return [*lines, "", f"Both are hidden from {fewest:.0f} tokens a row on ({UTILISATION:.0%} of the peak)."]


def recipe(gpu_name: str) -> tuple[ModelSize, Setting]:
    """The Notus recipe's full DPO on one node."""
    size, dimensions = sizes(find_config("alignment-handbook/zephyr-7b-sft-full")[0])
    setting = Setting(
        size=size, dimensions=dimensions, gpu=find_gpu(gpu_name), gpus=RANKS,
        lengths=draw(TYPICAL, max_length=1024, max_prompt_length=512), batch_size=64, tokens_per_row=2048,
        checkpointing="none", precision="bf16", optimizer="rmsprop", optimizer_dtype="fp32", hybrid=False,
        cpu_offload=False, utilisation=UTILISATION,
    )  # fmt: skip
    return size, setting


def memory(setting: Setting) -> list[str]:
    """Estimated GiB of each checkpointing mode, the runtime's margin included, and the time of a step."""
    lines = [
        f"| GiB a GPU, of {setting.gpu.capacity / 2**30:.1f} (pairs/s) | " + " | ".join(CHECKPOINTING) + " |",
        "|---" * (len(CHECKPOINTING) + 1) + "|",
    ]
    for tokens in TOKENS:
        cells = []
        for mode in CHECKPOINTING:
            plan = make_plan(dataclasses.replace(setting, tokens_per_row=tokens, checkpointing=mode))
            need = (plan.footprint.total + RUNTIME_MARGIN) / 2**30
            rate = f"({setting.batch_size / plan.seconds:.1f})" if plan.spare >= 0 else "does not fit"
            cells.append(f"{need:.1f} {rate}")
        lines.append(f"| {tokens} tokens a row | " + " | ".join(cells) + " |")
    return lines


def exposed(size: ModelSize, gpu_name: str) -> str:
    """What no computation hides: a row's first gatherings, of root and block, and its last reductions."""
    link = find_gpu(gpu_name).link * 1e9 * LINK_EFFICIENCY * RANKS / (RANKS - 1)
    ends = (2 + 4) * (size.root + size.block) / link
    return f"At a row's ends, not hidden: {1e3 * ends:.1f} ms (first gatherings, last reductions)."


def unsharded(setting: Setting) -> str:
    """What it would take to reduce once a step rather than once a row."""
    need, trained = footprint(setting.size, job_of(setting)).total + RUNTIME_MARGIN, 4 * setting.size.trained
    more = trained - trained // setting.gpus
    return (
        f"Gradients whole on every rank until the last row: {trained / 2**30:.1f} GiB in place of "
        f"{trained / setting.gpus / 2**30:.1f}, {(need + more) / 2**30:.1f} GiB a GPU in all (none, 2048 tokens a row)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="a100-40gb")
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    size, setting = recipe(args.gpu)
    lines = [
        *counted(args.shape), "", f"Estimated, milliseconds of a block, 7B, {RANKS} x {args.gpu}:", "",
        *block_times(size, args.gpu), exposed(size, args.gpu), "", *memory(setting), "", unsharded(setting),
    ]  # fmt: skip
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
