"""Fused functions against transformers' own modules, and against values worked out by hand."""

import copy

import pytest
import torch
import transformers
from torch import nn
from toys import toy_config, toy_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from notus.model import fused
from notus.model.fused import ATTENTIONS, BLOCKS, MLPS, NORMS, _AddNorm, _RMSNorm, _Rotary, _SwiGLU, fuse
from notus.runtime import switches


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_norm_is_transformers_own_with_gradients(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(24, eps=1e-5).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 7, 24, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 7, 24, dtype=dtype)
    expected, found = norm(x), _RMSNorm.apply(x, norm.weight, 1e-5)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(expected, (x, norm.weight), upstream)
    for got, grad in zip(torch.autograd.grad(found, (x, norm.weight), upstream), wanted, strict=True):
        assert (got - grad).norm() <= tolerance * grad.norm()


def test_rotary_is_transformers_own_with_gradients() -> None:
    torch.manual_seed(0)
    angles = torch.rand(1, 5, 4).repeat(1, 1, 2) * 6
    cos, sin = angles.cos(), angles.sin()
    x, upstream = torch.randn(1, 5, 3, 8, requires_grad=True), torch.randn(1, 5, 3, 8)
    expected = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]
    found = _Rotary.apply(x, cos.unsqueeze(-2), sin.unsqueeze(-2))
    torch.testing.assert_close(found, expected)
    wanted, got = (torch.autograd.grad(out, x, upstream)[0] for out in (expected, found))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2", "qwen3"])
def test_every_module_of_the_known_families_is_fused(kind: str) -> None:
    model = toy_model(kind)
    names = [name for name, _ in model.named_parameters()]
    fuse(model)
    known = [module for module in model.modules() if type(module).__name__ in NORMS | ATTENTIONS | MLPS | BLOCKS]
    # two layers, each with an attention, an MLP and two norms; the last norm
    assert len(known) == 11 + 4 * (kind == "qwen3")
    assert all("forward" in vars(module) for module in known)
    assert [name for name, _ in model.named_parameters()] == names


def test_other_modules_keep_their_forward() -> None:
    class LlamaRMSNorm(nn.Module):  # a name does not make it transformers' own
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = toy_model()
    model.model.norm = LlamaRMSNorm()
    model.model.layers[0].mlp.act_fn = nn.GELU()
    fuse(model)
    assert "forward" not in vars(model.model.norm)
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_modules_of_the_same_name_in_another_family_keep_their_forward() -> None:
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    assert modeling_qwen2_vl.Qwen2MLP.__name__ in MLPS
    assert not fused.is_known(modeling_qwen2_vl.Qwen2MLP(toy_config("qwen2")), MLPS)


@pytest.mark.parametrize("kind", ["GraniteConfig", "Gemma2Config", "CohereConfig", "MixtralConfig", "Qwen3MoeConfig"])
def test_no_block_is_fused_whose_own_forward_does_something_else(kind: str) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, kind)(**shape, num_key_value_heads=2, vocab_size=9, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    fuse(model)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []


def test_switched_off_blocks_and_mlps_keep_their_forward() -> None:
    model = toy_model()
    with switches.disabled("fused_elementwise"):
        fuse(model)
    left = [module for module in model.modules() if type(module).__name__ in MLPS | BLOCKS]
    assert len(left) == 4
    assert all("forward" not in vars(module) for module in left)


def test_a_frozen_input_and_a_frozen_weight_get_no_gradient() -> None:
    x, weight = torch.randn(3, 4), torch.ones(4, requires_grad=True)
    _RMSNorm.apply(x, weight, 1e-6).sum().backward()
    expected = copy.copy(weight.grad)
    x.requires_grad_()
    weight.grad = None
    _RMSNorm.apply(x, weight, 1e-6).sum().backward()
    torch.testing.assert_close(weight.grad, expected)
    _RMSNorm.apply(x, weight.detach(), 1e-6).sum().backward()
    assert x.grad is not None


TOLERANCES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)]


def _close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert (got.float() - wanted.float()).norm() <= tolerance * wanted.float().norm()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_swiglu_is_transformers_own_with_gradients(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    gate, up, upstream = (torch.randn(1, 7, 24, dtype=dtype).requires_grad_() for _ in range(3))
    expected, found = nn.SiLU()(gate) * up, _SwiGLU.apply(gate, up)
    wanted = torch.autograd.grad(expected, (gate, up), upstream.detach())
    got = torch.autograd.grad(found, (gate, up), upstream.detach())
    assert torch.equal(found, expected)
    _close(got, wanted, tolerance)
    with torch.no_grad():  # the kernels' own code
        _close((fused._swiglu(gate, up), *fused._swiglu_backward(upstream, gate, up)), (expected, *wanted), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_residual_and_norm_are_transformers_own_with_gradients(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(24, eps=1e-5).to(dtype)
    nn.init.normal_(norm.weight)
    residual, x, *upstream = (torch.randn(1, 7, 24, dtype=dtype).requires_grad_() for _ in range(4))
    leaves = (residual, x, norm.weight)
    total = residual + x
    expected, found = (total, norm(total)), _AddNorm.apply(residual, x, norm.weight, 1e-5)
    upstream = [each.detach() for each in upstream]
    wanted, got = (torch.autograd.grad(outputs, leaves, upstream) for outputs in (expected, found))
    _close((*found, *got), (*expected, *wanted), tolerance)
    with torch.no_grad():
        total, normed, scale = fused._add_norm(residual, x, norm.weight, 1e-5)
        grad, grad_weight = fused._add_norm_backward(*upstream, total, norm.weight, scale, True)
    _close((total, normed, grad, grad, grad_weight), (*expected, *wanted), tolerance)


def test_a_frozen_norm_and_a_frozen_residual_get_no_gradient() -> None:
    residual, x, weight = torch.randn(1, 3, 4), torch.randn(1, 3, 4, requires_grad=True), torch.ones(4)
    total, normed = _AddNorm.apply(residual, x, weight, 1e-6)
    (total.sum() + normed.square().sum()).backward()
    assert x.grad is not None
    assert residual.grad is None
    assert weight.grad is None


def test_the_kernels_turn_is_rotary() -> None:
    torch.manual_seed(0)
    angles = torch.rand(1, 5, 1, 4).repeat(1, 1, 1, 2) * 6
    x = torch.randn(1, 5, 3, 8)
    for back in (False, True):
        args = (x, angles.cos(), angles.sin(), back)
        torch.testing.assert_close(fused._turn(*args), fused._plain_turn(*args))
