"""Activation checkpointing as a dial: what a block keeps of its forward pass, and what its backward computes again.

none: all that the backward pass reads is kept, nothing is computed again.
selective: the attention's output is kept, and every second matrix product's, from the first; the rest is computed
again.
full: the block's input is kept, the block is computed again, up to the last value that the backward pass reads: not its
last product.

Matrix products are counted in the order of the forward pass (of q, k, v, o, gate, up, down: q, v, gate and down are
kept). The two products of a LoRA adapter are computed again and not counted: that costs rank / width of the layer's
own product, while their output would take as much memory.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from notus.model.lora import lora_layers

MODES = ("none", "selective", "full")
PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})
# By name, since not every build has all of them. All that compute attention with a backward pass of its own.
ATTENTION = frozenset(
    {
        "torch_attn::_varlen_attn",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "notus::packed_attention",
    }
)


def checkpointed(block: nn.Module, mode: str) -> Callable[..., Any]:
    """The forward of `block` with its activations kept as `mode` says."""
    assert mode in MODES, mode
    if mode == "none":
        return block.forward
    layers = lora_layers(block).values()
    options: dict[str, Any] = {
        "use_reentrant": False,
        # Adapters alone draw random numbers; to keep a generator's state costs a copy, on a GPU a host sync.
        "preserve_rng_state": any(layer.dropout > 0 for layer in layers),
    }
    if mode == "selective":
        rank = max((layer.rank for layer in layers), default=0)
        options["context_fn"] = functools.partial(selective_contexts, str(rank))
    return functools.partial(checkpoint, block.forward, **options)


def selective_contexts(adapter_rank: str) -> Any:
    """The contexts of one block's forward pass and of its recomputation.

    Args:
        adapter_rank: products with a matrix of at most this rank are an adapter's; 0: there are none. Digits, since the
            compiler would take a number for a symbol.
    """
    counts: collections.Counter[bool] = collections.Counter()

    def policy(context: Any, op: Any, *args: Any, **_: Any) -> CheckpointPolicy:
        if op in PRODUCTS:
            if min(args[-1].shape) > int(adapter_rank):
                # torch 2.11 asks again in the recomputation
                counts[context.is_recompute] += 1
                if counts[context.is_recompute] % 2:
                    return CheckpointPolicy.MUST_SAVE
        elif getattr(op, "name", str)().partition(".")[0] in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
