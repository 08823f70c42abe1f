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
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MistralConfig

from common import GIB, markdown
from estimator import CPU, ROWS, SHAPES, Case, fake_world, packed_row, run_row, size_of
from notus.estimate.plan import Setting, job_of, moved_bytes
from notus.model.flops import GPU, LINK_EFFICIENCY
from notus.model.size import ModelSize
from notus.model.verify import PathChoice
from notus.training.memory_estimate import CHECKPOINTING, RUNTIME_MARGIN, footprint
from notus.training.parallelize import build_policy
from projections import RECIPE, UTILISATION, need, plan_of, rate, setting_of
from projections import ROWS as TOKENS

RANKS = 8
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
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.found.append(Event(kind, max(sizes), backward))
        elif name == "aten::mm":
            self.found.append(Event("product", 0, backward))
        return func(*args, **(kwargs or {}))


def count(shape: str, checkpointing: str = "none", rows: int = 1) -> list[Event]:
    """What rank 0 issues for `rows` rows, forward and backward."""
    with fake_world(RANKS):
        policy = build_policy(
            Path("."), MistralConfig(**SHAPES[shape]), device=CPU, precision="bf16",
            activation_checkpointing=checkpointing, path=PathChoice("packed"),
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
        sent = f"{kind} {size / 1e6:.1f} MB" + f" x{times}" * (times > 1)
        parts.append(f"{times} products" if kind == "product" else sent)
    return ", ".join(parts)


def counted(shape: str) -> list[str]:
    """The count beside the estimate."""
    size, lines = size_of(MistralConfig(**SHAPES[shape]), Case(0, "none", "rmsprop")), []
    for rows in (1, 2):
        events = count(shape, rows=rows)
        gathers, reduces = ([event.size for event in events if event.kind == kind] for kind in ("gather", "reduce"))
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


def link_rate(gpu: GPU) -> float:
    """Bytes per second of whole tensors that a rank gathers or reduces."""
    return gpu.link * 1e9 * LINK_EFFICIENCY * RANKS / (RANKS - 1)


def block_times(size: ModelSize, gpu: GPU) -> list[str]:
    """Estimated milliseconds of a block: its computation, beside what the links do meanwhile."""
    flops, link = gpu.rate("bf16") * 1e12 * UTILISATION, link_rate(gpu)
    weights = sum(linear.weights for linear in size.linears)
    gather, reduce = 2e3 * size.block / link, 4e3 * size.block / link
    rows = []
    for tokens in TOKENS:
        forward = 2e3 * weights * tokens / flops
        rows.append((tokens, *(f"{each:.1f}" for each in (forward, gather, 2 * forward, gather + reduce))))
    fewest = max(gather, (gather + reduce) / 2) * flops / (2e3 * weights)
    ends = (2 + 4) * (size.root + size.block) / link
    return [
        markdown(("tokens a row", "forward", "gathering", "backward", "gathering + reduction"), rows),
        "",
        f"Both are hidden from {fewest:.0f} tokens a row on ({UTILISATION:.0%} of the peak).",
        f"At a row's ends, not hidden: {1e3 * ends:.1f} ms (first gatherings, last reductions).",
    ]


def memory(setting: Setting) -> str:
    """Estimated GiB of each checkpointing mode, the runtime's margin included, and pairs per second where it fits."""
    rows = []
    for tokens in TOKENS:
        plans = [plan_of(setting, mode, tokens) for mode in CHECKPOINTING]
        fits = [f"({rate(plan):.1f})" if plan.spare >= 0 else "does not fit" for plan in plans]
        cells = [f"{need(plan):.1f} {text}" for plan, text in zip(plans, fits, strict=True)]
        rows.append([f"{tokens} tokens a row", *cells])
    return markdown([f"GiB a GPU, of {setting.gpu.capacity / GIB:.1f} (pairs/s)", *CHECKPOINTING], rows)


def unsharded(setting: Setting) -> str:
    """What it would take to reduce once a step rather than once a row."""
    total, trained = footprint(setting.size, job_of(setting)).total + RUNTIME_MARGIN, 4 * setting.size.trained
    more = trained - trained // setting.gpus
    return (
        f"Gradients whole on every rank until the last row: {trained / GIB:.1f} GiB in place of "
        f"{trained / setting.gpus / GIB:.1f}, {(total + more) / GIB:.1f} GiB a GPU in all (none, 2048 tokens a row)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="a100-40gb")
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    setting = dataclasses.replace(setting_of(RECIPE, args.gpu, RANKS), checkpointing="none")
    lines = [
        *counted(args.shape), "", f"Estimated, milliseconds of a block, 7B, {RANKS} x {args.gpu}:", "",
        *block_times(setting.size, setting.gpu), "", memory(setting), "", unsharded(setting),
    ]  # fmt: skip
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
