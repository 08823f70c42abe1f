"""Runs that repeat bit for bit, on the same machine with the same number of ranks.

On a CPU they do so in any case. On a GPU the attention's backward passes do not, unless they are asked to: both
FlashAttention (bf16) and the memory-efficient kernel (fp32) then add gradients with atomic operations, in any order.
Both obey `torch.use_deterministic_algorithms(True)`, and both ignore it with `warn_only=True`, where they warn once
(`_flash_attention_backward` and `_efficient_attention_backward` in
aten/src/ATen/native/transformers/cuda/attention_backward.cu). `torch.nn.attention.varlen.varlen_attn` differentiates
through the first of them and has no switch of its own, in torch 2.11 as in 2.13.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.deterministic

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Make operations repeat bit for bit within, and raise RuntimeError for one that cannot; enter before CUDA starts.

    cuBLAS reads how much workspace its kernels may take, which decides their order of summation, when it starts.
    By default PyTorch would also fill every new tensor with NaN before its first use. We never read uninitialised
    memory, so that would only be an extra pass over it, and is switched off. Nothing is changed if not `wanted`, and
    all is as before afterwards.
    """
    if not wanted:
        yield
        return
    workspace = os.environ.get(_WORKSPACE)
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic  # a module with a property, of which mypy does not know
    fill = memory.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.flags(deterministic=True, benchmark=False)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        with cudnn:
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        if workspace is None:
            del os.environ[_WORKSPACE]
