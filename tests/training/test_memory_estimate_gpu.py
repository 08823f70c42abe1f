"""The footprint beside what a CUDA device's allocator saw of a step. Needs a GPU."""

import gc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import MistralConfig

from notus.config import LoraConfig
from notus.data.packing import Example, collate
from notus.model.quantization import quantized_layers
from notus.model.size import model_size
from notus.training import parallelize
from notus.training.memory_estimate import CHECKPOINTING, Job, footprint
from notus.training.optimizers import build_optimizer
from notus.training.parallelize import build_policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
TRUNK, BRANCHES, EXAMPLES = 176, [300, 280], 5


@pytest.fixture
def alone():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def left():
    """Bytes that stay allocated before a case. A policy's parts refer to each other in circles: the last is freed here.

    What a failed case's traceback holds cannot be freed.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize(("cpu_offload", "quantization"), [(False, None), (True, None), (False, "nf4"), (True, "nf4")])
def test_a_steps_peak_on_the_device(alone, left, mode, cpu_offload, quantization):
    config = MistralConfig(
        vocab_size=16000, hidden_size=1024, intermediate_size=3584, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, sliding_window=None,
    )  # fmt: skip
    sizes = []
    adapter = LoraConfig(rank=16, target_modules="all-linear", dropout=0.0) if quantization else None
    with mock.patch.object(parallelize, "load_weights"):  # whatever the memory held
        policy = build_policy(
            Path("."), config, device=CUDA, precision="bf16", cpu_offload=cpu_offload, lora=adapter,
            quantization=quantization,
            activation_checkpointing=lambda causal_lm: sizes.append(model_size(causal_lm)) or mode,
        )  # fmt: skip
    packed = {id(layer.weight) for layer in quantized_layers(policy).values()}
    for parameter in policy.parameters():
        local = parameter.to_local() if isinstance(parameter.data, DTensor) else parameter.data
        if id(parameter) in packed:
            local.view(torch.uint8).zero_()  # a scale of zero: whatever the codes, weights of zero
        else:
            torch.nn.init.normal_(local, std=0.02)
    optimizer = build_optimizer(policy.parameters(), name="rmsprop", learning_rate=1e-6, weight_decay=0.0)
    ones = [np.ones(length, dtype=np.int64) for length in (TRUNK, *BRANCHES)]
    example = Example(0, ones[0], tuple(ones[1:]), tuple(part.astype(bool) for part in ones[1:]))
    batch = collate([example] * EXAMPLES, len(BRANCHES)).to(CUDA)
    for _ in range(2):  # the second with the first's states
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            policy(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = EXAMPLES * (TRUNK + sum(BRANCHES))
    job = Job(
        shard_size=1,
        tokens_per_row=tokens,
        scored_per_row=EXAMPLES * sum(BRANCHES),
        activation_checkpointing=mode,
        key_ratio=EXAMPLES * (len(BRANCHES) * TRUNK + sum(BRANCHES)) / tokens,
        cpu_offload=cpu_offload,
    )
    peak = torch.cuda.max_memory_allocated() - left
    assert footprint(sizes[0], job).total == pytest.approx(peak, rel=0.15)
