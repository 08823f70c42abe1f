"""What each mode computes again, worked out by hand for a toy block.

Weights of a block's products, width 32, 4 heads and 2 key heads of 8, inner 48:
q 32·32 = 1024, k and v 32·16 = 512 each, o 1024, gate, up and down 32·48 = 1536 each.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from toys import toy_examples, toy_model

from notus.data.packing import Batch, collate
from notus.model.attention import IMPLEMENTATION
from notus.model.fused import fuse
from notus.model.lora import init_lora, inject_lora
from notus.model.policy import Policy
from notus.training import activation_checkpointing as checkpointing
from notus.training.activation_checkpointing import MODES, checkpointed

LAYERS = 2
# The last product of a block, down, is not computed again even by "full": nothing reads its value.
AGAIN = {"none": 0, "products": 0, "selective": 512 + 1024 + 1536, "full": 1024 + 512 + 512 + 1024 + 1536 + 1536}
# With adapters of rank 2 on q, of 2·(32 + 32) weights, both of whose products are always computed again.
ADAPTER = {"none": 0, "products": 128, "selective": 128, "full": 128}


class _Attention(TorchDispatchMode):
    """Counts attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in func.name():
            self.calls["backward" if "backward" in func.name() else "forward"] += 1
        return func(*args, **(kwargs or {}))


def _batch() -> Batch:
    return collate(toy_examples((5, (4, 6)), (3, (7, 2))), 2)


def _policy(mode: str, *, rank: int = 0, dropout: float = 0.0) -> Policy:
    model = toy_model(num_hidden_layers=LAYERS)
    model.config._attn_implementation = IMPLEMENTATION
    fuse(model)
    if rank:
        inject_lora(model, rank=rank, alpha=4, dropout=dropout, target_modules=["q_proj"])
        init_lora(model, 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.fill_(0.1)
    policy = Policy(model).train()
    for block in policy.blocks:
        block.forward = checkpointed(block, mode)
    return policy


def _gradients(policy: Policy) -> list[torch.Tensor]:
    torch.manual_seed(7)
    policy(_batch()).sum().backward()
    return [parameter.grad for parameter in policy.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("rank", [0, 2])
def test_the_operations_computed_again(rank: int) -> None:
    batch, found, calls = _batch(), {}, {}
    for mode in MODES:
        policy = _policy(mode, rank=rank)
        loss = policy(batch).sum()
        with FlopCounterMode(display=False) as operations, _Attention() as attention:
            loss.backward()
        found[mode], calls[mode] = operations.get_total_flops(), attention.calls
    tokens = len(batch.input_ids)
    for mode in MODES:
        again = AGAIN[mode] + (ADAPTER[mode] if rank else 0)
        assert found[mode] - found["none"] == LAYERS * 2 * tokens * again, mode
    segments = LAYERS * len(batch.layout.query_lengths)
    assert calls["none"] == calls["products"] == calls["selective"] == {"backward": segments}
    assert calls["full"] == {"forward": segments, "backward": segments}


@pytest.mark.parametrize(("rank", "dropout"), [(0, 0.0), (2, 0.5)])
def test_gradients_are_equal_to_the_bit(rank: int, dropout: float) -> None:
    expected = _gradients(_policy("none", rank=rank, dropout=dropout))
    for mode in MODES[1:]:
        for found, wanted in zip(_gradients(_policy(mode, rank=rank, dropout=dropout)), expected, strict=True):
            assert torch.equal(found, wanted), mode


class _InPlace(nn.Module):
    """A block that overwrites products in each way there is, its own input among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(8, 8, bias=number % 2 == 0) for number in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        residual = hidden.mul_(1.5)  # the input itself
        projected = self.first(hidden).clamp_(min=-0.2, max=0.2)  # as OLMo's clip_qkv
        second = self.second(projected)
        second[..., :4].sigmoid_()  # a view of a product
        gated = self.third(second)
        gated.mul_(gated.detach().cos())
        out = self.last(gated.tanh())
        out += residual  # the last product
        return out


def _in_place_gradients(mode: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    blocks = [_InPlace() for _ in range(2)]
    runs = [checkpointed(block, mode) for block in blocks]
    with torch.no_grad():  # as the reference pass does, which comes first
        runs[0](torch.randn(1, 6, 8))
    for seed in (1, 2):  # the second call is without the copies that the first one makes
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(1, 6, 8, generator=generator).requires_grad_() * 1.0
        for run in runs:
            hidden = run(hidden)
        hidden.square().sum().backward()
    return [parameter.grad for block in blocks for parameter in block.parameters()]


def test_in_place_operations_change_no_gradient() -> None:
    expected = _in_place_gradients("none")
    for mode in MODES[1:]:
        for found, wanted in zip(_in_place_gradients(mode), expected, strict=True):
            assert torch.equal(found, wanted), mode


def test_the_last_product_is_not_kept_where_only_the_residual_follows() -> None:
    policy, batch = _policy("products"), _batch()
    hidden = torch.randn(1, len(batch.input_ids), 32)
    keep, _ = checkpointing._contexts("products", "0")
    block = policy.blocks[0]
    positions = policy.causal_lm.get_decoder().rotary_emb(hidden, batch.position_ids[None])
    with keep:
        type(block).forward(block, hidden, layout=batch.layout, position_embeddings=positions)
    shapes = [value.shape[-1] for value in keep._kept.values.values() if isinstance(value, torch.Tensor)]
    assert shapes == [32, 16, 16, 32, 48, 48]  # q, k, v, o, gate, up; not down
