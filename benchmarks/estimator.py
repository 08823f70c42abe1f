"""The estimator beside PyTorch's own trackers, on the real step with fake tensors: bytes and operations.

    python benchmarks/estimator.py [--shape 7b] [--world-size 1] [--output FILE]

Needs no GPU and no weights; a 7B shape takes minutes, for the trackers look at every operation. A process group of any
size sends nothing, tensors have no storage, and the policy is built and sharded by `build_policy`: two packed rows
forward and backward, then the clipped optimizer step. `FSDPMemTracker` follows every allocation of rank 0, and
`FlopCounterMode` counts every matrix product. Two things are put in place of what only a GPU has: what FlashAttention-2
allocates in its backward pass, and the size of the optimizer's pieces.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import varlen
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedConfig

import common  # noqa: F401  (the project's path)
from notus.config import LoraConfig
from notus.data.packing import Batch, Example, collate
from notus.estimate.plan import arithmetic
from notus.estimate.sizes import Lengths
from notus.losses import dpo_loss
from notus.model import attention
from notus.model import load as weights
from notus.model.flops import dimensions, visible_pairs
from notus.model.lora import inject_lora
from notus.model.quantization import quantize
from notus.model.size import ModelSize, model_size
from notus.model.verify import PathChoice
from notus.training import int8_states, optimizers, parallelize
from notus.training.gradient_clipping import clip_gradients, local_gradients
from notus.training.memory_estimate import CHECKPOINTING, Footprint, Job, moments
from notus.training.optimizers import build_optimizer
from notus.training.parallelize import build_policy, expect_last_row, hand_over_gradients

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
CPU = torch.device("cpu")
SHAPES = {
    "mid": {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4,
            "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "sliding_window": None},
    "7b": {"sliding_window": None},
}  # fmt: skip
Row = tuple[int, list[int], int]  # tokens of the trunk, of each branch; how many such examples
ROWS: dict[str, Row] = {"mid": (176, [300, 280], 5), "7b": (176, [300, 280], 10)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of run: LoRA of a rank (0: full), the dials, and whether the base is in 4 bits."""

    rank: int
    checkpointing: str
    optimizer: str
    optimizer_dtype: str = "fp32"
    quantization: str | None = None

    def __str__(self) -> str:
        kind = f"{'Q' if self.quantization else ''}LoRA {self.rank}" if self.rank else "full"
        return f"{kind:<8} {self.checkpointing:<9} {self.optimizer:<7}"


# ---- what the trackers see ----


@dataclasses.dataclass(frozen=True)
class Tracked:
    """What the trackers saw on one rank.

    Attributes:
        backward_peak: bytes at the worst moment of the rows.
        optimizer_peak: the same of the optimizer's step.
        flops: matrix products of one row forward and backward, attention left out; a multiply and an add are two.
    """

    backward_peak: int
    optimizer_peak: int
    flops: int

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of the step."""
        return max(self.backward_peak, self.optimizer_peak)


class _LikeAGPU(TorchDispatchMode):
    """Allocates what operators need besides their results, which their fake kernels leave out.

    That is the workspace of FlashAttention-2's backward pass, and the dequantised weight of a layer in 4 bits. It also
    frees what the trackers keep alive: their hooks catch the exception with which checkpointing ends a block's
    recomputation early, whose frames then hold tensors in a cycle. Without their hooks there is no such cycle.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and torch._C._current_graph_task_id() != -1:
            gc.collect()
        if func.namespace == "notus" and "quantized_linear" in func.name():
            given, weight, *rest = args
            inputs = rest[0] if "backward" in func.name() else given.shape[-1]
            dequantized = given.new_empty(weight.shape[0], inputs)  # noqa: F841  (alive while the operator runs)
            return func(*args, **(kwargs or {}))
        if func is not varlen._varlen_attn_backward._opoverload:
            return func(*args, **(kwargs or {}))
        _, query, key, *_ = args
        (tokens, heads, width), segments = query.shape, len(args[6]) - 1
        padded = tokens + 128 * segments
        workspace = [
            query.new_empty(padded, heads, width, dtype=torch.float32),
            query.new_empty(heads, padded, dtype=torch.float32),
        ]
        if heads != key.shape[1]:  # a gradient for each query head, summed over its group at the end
            workspace += [query.new_empty(len(key), heads, width) for _ in range(2)]
        return func(*args, **(kwargs or {}))


class _Count(float):
    """A step count that can be read, unlike a fake tensor's."""

    def __add__(self, other: float) -> "_Count":
        return _Count(float(self) + other)

    def item(self) -> float:
        return float(self)


_new_state = optimizers.PiecewiseOptimizer.new_state


def _counted(self: optimizers.PiecewiseOptimizer, parameter: torch.nn.Parameter) -> dict[str, Any]:
    return {**_new_state(self, parameter), "step": _Count(0.0)}


def _round_at_random(values: torch.Tensor, _: object) -> torch.Tensor:
    return torch.empty_like(values, dtype=torch.int32).view(torch.float32).bfloat16()


@contextlib.contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """A process group whose other ranks do not exist, fake tensors, and the GPU's kernels' memory."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    ranks = init_device_mesh("cpu", (world_size,))  # of real tensors: it reads its own ranks
    nothing = mock.DEFAULT
    try:
        with (
            mock.patch.multiple(parallelize, load_weights=nothing, init_lora=nothing, check_attention=nothing),
            mock.patch.object(weights, "rebuild_buffers"),  # it looks at values
            mock.patch.object(parallelize, "mesh", return_value=ranks),
            mock.patch.object(attention, "kernel_for", return_value=("varlen", attention.varlen_kernel)),
            mock.patch.dict(optimizers.CHUNK, cpu=optimizers.CHUNK["cuda"]),
            mock.patch.object(optimizers.PiecewiseOptimizer, "new_state", _counted),
            mock.patch.object(optimizers.PiecewiseOptimizer, "_noise", return_value=None),
            mock.patch.object(int8_states, "_map", lambda signed, device: torch.empty(256, device=device)),
            mock.patch.object(optimizers, "round_at_random", _round_at_random),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield
    finally:
        dist.destroy_process_group()


def packed_row(trunk: int, branches: list[int], examples: int) -> Batch:
    """A row of equal examples whose branches are learned to the last token."""
    ids, masks = ([np.ones(n, dtype=kind) for n in branches] for kind in (np.int64, bool))
    one = Example(0, np.ones(trunk, dtype=np.int64), tuple(ids), tuple(masks))
    return collate([one] * examples, len(branches))


def run_row(policy: Any, batch: Batch) -> None:
    """Forward and backward pass of a row."""
    logps = policy(batch)
    if logps.shape[1] != 2:  # of labels, and of lists, whose losses look at values
        logps.sum().backward()
        return
    reference = torch.zeros(len(logps))
    losses, _, _ = dpo_loss(logps[:, 0], logps[:, 1], reference, reference)
    losses.sum().backward()


def tracked_step(config: PreTrainedConfig, case: Case, row: Row, world_size: int = 8) -> Tracked:
    """Two optimizer steps, of one row and of two; the state that the first makes is kept for the second."""
    with fake_world(world_size):
        adapter = LoraConfig(rank=case.rank, target_modules=list(TARGETS)) if case.rank else None
        policy = build_policy(
            Path("."),
            config,
            device=CPU,
            precision="bf16",
            lora=adapter,
            activation_checkpointing=case.checkpointing,
            path=PathChoice("packed"),
            quantization=case.quantization,
        )
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        stepper = build_optimizer(
            trainable, name=case.optimizer, learning_rate=1e-6, weight_decay=0.0, state_dtype=case.optimizer_dtype
        )
        tracker, counter = FSDPMemTracker(policy, stepper), FlopCounterMode(display=False)
        batch = packed_row(*row)
        gc.freeze()  # for quick collections
        with tracker, _LikeAGPU():
            for rows in (1, 2):
                for number in range(rows):
                    tracker.reset_mod_stats()
                    if world_size == 1:
                        expect_last_row(policy, number == rows - 1)
                    # it takes operations apart, which changes their memory: not where memory is looked at
                    with counter if rows == 1 else contextlib.nullcontext():
                        run_row(policy, batch)
                if world_size == 1:
                    hand_over_gradients(policy)
                gc.collect()
                backward_peak = _peak(tracker)
                # as on a GPU, where clipping needs no tensors of its own
                clip_gradients(local_gradients(trainable), torch.ones(()), 1.0)
                stepper.step()
                optimizer_peak = _peak(tracker)
                stepper.zero_grad(set_to_none=True)
    # of attention, the counter takes every pair of a query and a key for visible
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "varlen" not in str(op))
    return Tracked(backward_peak, optimizer_peak, products)


def _peak(tracker: FSDPMemTracker) -> int:
    """Bytes at the worst moment since the last call."""
    peak: int = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    tracker._peak_mem[CPU] = 0
    return peak


# ---- what the estimator says ----


@register_flop_formula(torch.ops.notus.quantized_linear)
def _forward_flops(given: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of shapes: a multiply and an add for each weight and token."""
    return 2 * math.prod(given) * weight[0]


@register_flop_formula(torch.ops.notus.quantized_linear_backward)
def _backward_flops(grad: Any, weight: Any, inputs: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad) * inputs


def size_of(config: PreTrainedConfig, case: Case) -> ModelSize:
    """The sizes of a model with adapters as the tracked one has them."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if case.rank:
        inject_lora(causal_lm, rank=case.rank, alpha=16.0, dropout=0.0, target_modules=list(TARGETS))
    if case.quantization:
        quantize(causal_lm, torch.bfloat16)
    return model_size(causal_lm)


def job_of(case: Case, row: Row, world_size: int = 8) -> Job:
    """The estimator's view of a tracked step."""
    trunk, branches, examples = row
    tokens = examples * (trunk + sum(branches))
    return Job(
        shard_size=world_size,
        tokens_per_row=tokens,
        scored_per_row=examples * sum(branches),
        optimizer=case.optimizer,
        optimizer_dtype=case.optimizer_dtype,
        activation_checkpointing=case.checkpointing,
        key_ratio=examples * (len(branches) * trunk + sum(branches)) / tokens,
    )


def compare(
    case: Case, config: PreTrainedConfig, row: Row, *, world_size: int = 8
) -> tuple[Footprint, Footprint, Tracked]:
    """(estimate of the rows, of the update, what the trackers saw)."""
    *rows, update = moments(size_of(config, case), job_of(case, row, world_size))
    return max(rows, key=lambda moment: moment.total), update, tracked_step(config, case, row, world_size)


def flops_ratio(case: Case, config: PreTrainedConfig, row: Row, seen: int) -> float:
    """Estimated operations of a row's matrix products, recomputation included, attention left out, over those that
    `FlopCounterMode` counted."""
    trunk, branches, examples = row
    lengths = Lengths(np.array([trunk]), np.array([branches]), "one")
    with torch.device("meta"):
        size = dimensions(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    work = arithmetic(size_of(config, case), size, lengths, case.checkpointing)
    pairs = visible_pairs(lengths.trunks, lengths.branches).item()
    passes = 4 if case.checkpointing == "full" else 3  # a backward pass is two
    attention = passes * 4 * size.layers * size.attention_width * pairs
    return examples * (work.hardware - attention) / seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--world-size", type=int, default=8, help="fake ranks (default: 8)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config, row, rank = MistralConfig(**SHAPES[args.shape]), ROWS[args.shape], 64 if args.shape == "7b" else 16
    titles = f"{'case':<26} {'estimate':>10} {'tracker':>10} {'ratio':>6}"
    lines = [f"{titles}   update: estimate, tracker   operations   peak at (MiB, ratios)"]
    cases = list(itertools.starmap(Case, itertools.product((0, rank), CHECKPOINTING, ("rmsprop", "adamw"))))
    cases += [Case(rank, mode, "adamw", quantization="nf4") for mode in CHECKPOINTING]
    for case in cases:
        rows, update, seen = compare(case, config, row, world_size=args.world_size)
        whole, flops = max(rows.total, update.total), flops_ratio(case, config, row, seen.flops)
        lines.append(
            f"{case} {whole / 2**20:>10.1f} {seen.peak / 2**20:>10.1f} {whole / seen.peak:>6.3f}   "
            f"{update.total / 2**20:>10.1f} {seen.optimizer_peak / 2**20:>10.1f} {flops:>12.3f}   {rows.moment}"
        )
        print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
