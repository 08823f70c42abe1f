"""The real training step on fake tensors: what PyTorch's own trackers say of its memory and arithmetic.

A process group of any size that sends nothing, tensors without storage, the policy as `build_policy` builds and shards
it, two packed rows forward and backward, the clipped optimizer step: `FSDPMemTracker` follows every allocation of rank
0 and `FlopCounterMode` counts every matrix product. Two things are put in place of what only a GPU has: what
FlashAttention-2 allocates in its backward pass, and the size of the optimizer's pieces.
"""

import contextlib
import dataclasses
import gc
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from notus.config import LoraConfig
from notus.data.packing import Batch, Example, collate
from notus.losses import dpo_loss
from notus.model import attention
from notus.model import load as weights
from notus.training import optimizers, parallelize
from notus.training.optimizers import build_optimizer, clip_gradients, local_gradients
from notus.training.parallelize import build_policy, expect_last_row, hand_over_gradients

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Tracked:
    """What the trackers saw on one rank.

    Attributes:
        backward_peak, backward_parts: bytes at the worst moment of the rows, in all and by the tracker's kinds.
        optimizer_peak, optimizer_parts: the same of the optimizer's step.
        flops: matrix products of one row forward and backward, attention left out; a multiply and an add are two.
    """

    backward_peak: int
    backward_parts: dict[str, int]
    optimizer_peak: int
    optimizer_parts: dict[str, int]
    flops: int

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of the step."""
        return max(self.backward_peak, self.optimizer_peak)


class _LikeAGPU(TorchDispatchMode):
    """Allocates what FlashAttention-2's backward pass needs besides its results, which its fake kernel leaves out.

    And frees what the trackers keep alive: their hooks catch the exception with which checkpointing ends a block's
    recomputation early, whose frames then hold tensors in a cycle. Without their hooks there is no such cycle.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and torch._C._current_graph_task_id() != -1:
            gc.collect()
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


def _counted(self: optimizers.PiecewiseOptimizer, parameter: torch.nn.Parameter) -> dict[str, Any]:
    zeros = {name: torch.zeros_like(parameter.detach(), dtype=self.state_dtype) for name in self.moments}
    return {"step": _Count(0.0), **zeros}


def _round_at_random(values: torch.Tensor, _: object) -> torch.Tensor:
    bits = torch.empty_like(values, dtype=torch.int32)
    return bits.view(torch.float32).bfloat16()


@contextlib.contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """A process group whose other ranks do not exist, fake tensors, and the GPU's kernels' memory."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    ranks = init_device_mesh("cpu", (world_size,))  # of real tensors: it reads its own ranks
    nothing = mock.DEFAULT
    try:
        with (
            mock.patch.multiple(parallelize, load_weights=nothing, init_lora=nothing, check_attention=nothing),
            mock.patch.object(weights, "_rebuild_buffers"),  # it looks at values
            mock.patch.object(parallelize, "mesh", return_value=ranks),
            mock.patch.object(attention, "kernel_for", return_value=("varlen", attention.varlen_kernel)),
            mock.patch.dict(optimizers.CHUNK, cpu=optimizers.CHUNK["cuda"]),
            mock.patch.object(optimizers.PiecewiseOptimizer, "new_state", _counted),
            mock.patch.object(optimizers.PiecewiseOptimizer, "_noise"),
            mock.patch.object(optimizers, "round_at_random", _round_at_random),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield
    finally:
        dist.destroy_process_group()


def packed_row(trunk: int, branches: list[int], examples: int) -> Batch:
    """A row of equal examples whose branches are learned to the last token."""
    one = Example(
        0,
        np.ones(trunk, dtype=np.int64),
        tuple(np.ones(length, dtype=np.int64) for length in branches),
        tuple(np.ones(length, dtype=bool) for length in branches),
    )
    return collate([one] * examples, len(branches))


def tracked_step(
    config: PreTrainedConfig,
    *,
    world_size: int = 8,
    row: tuple[int, list[int], int],
    precision: str = "bf16",
    optimizer: str = "rmsprop",
    optimizer_dtype: str = "fp32",
    lora_rank: int = 0,
    rows: int = 2,
    **options: Any,
) -> Tracked:
    """Two optimizer steps of `rows` rows (trunk, branches, examples), the state of the first kept for the second."""
    with fake_world(world_size):
        adapter = LoraConfig(rank=lora_rank, target_modules=TARGETS) if lora_rank else None
        policy = build_policy(Path("."), config, device=CPU, precision=precision, lora=adapter, **options)
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        stepper = build_optimizer(
            trainable, name=optimizer, learning_rate=1e-6, weight_decay=0.0, state_dtype=optimizer_dtype
        )
        tracker = FSDPMemTracker(policy, stepper)
        batch = packed_row(*row)
        found: list[tuple[int, dict[str, int]]] = []
        counter = FlopCounterMode(display=False)
        gc.freeze()  # for quick collections
        with tracker, _LikeAGPU():
            for step in range(2):
                found = []
                count = rows if step else 1
                for number in range(count):
                    tracker.reset_mod_stats()
                    if world_size == 1:
                        expect_last_row(policy, number == count - 1)
                    # it takes operations apart, which changes their memory: not where memory is looked at
                    with counter if step == 0 else contextlib.nullcontext():
                        run_row(policy, batch)
                if world_size == 1:
                    hand_over_gradients(policy)
                found.append(_peak(tracker))
                # as on a GPU, where clipping needs no tensors of its own
                clip_gradients(local_gradients(trainable), torch.ones(()), 1.0)
                stepper.step()
                found.append(_peak(tracker))
                stepper.zero_grad(set_to_none=True)
    (rows_peak, rows_parts), (update_peak, update_parts) = found
    # of attention, the counter takes every pair of a query and a key for visible
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "varlen" not in str(op))
    return Tracked(rows_peak, rows_parts, update_peak, update_parts, products)


def _peak(tracker: FSDPMemTracker) -> tuple[int, dict[str, int]]:
    """Bytes at the worst moment since the last call, in all and by kind."""
    parts = dict(tracker.get_tracker_snapshot("peak")[CPU])
    tracker._peak_mem[CPU] = 0
    return parts.pop("Total"), parts


def run_row(policy: Any, batch: Batch) -> None:
    """Forward and backward pass of a row."""
    logps = policy(batch)
    if logps.shape[1] == 1:
        logps.sum().backward()
        return
    reference = torch.zeros(len(logps))
    losses, _, _ = dpo_loss(logps[:, 0], logps[:, 1], reference, reference)
    losses.sum().backward()
