"""The small work of a decoder's block in fewer passes over memory, with less kept for the backward pass.

Transformers writes root-mean-square norms and rotary embeddings as chains of elementwise operations: each reads and
writes the whole row, and autograd keeps many of them. Here each is one function with a backward pass of its own.
The blocks' own code stays the reference: `tests/model/test_fused.py` and `test_policy.py` hold the two
equal, gradients included.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from notus.model.attention import packed_attention

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
NORMS = frozenset(f"{family}RMSNorm" for family in _FAMILIES)
ATTENTIONS = frozenset(f"{family}Attention" for family in _FAMILIES)


def fuse(causal_lm: PreTrainedModel) -> None:
    """Replace, in place, the forward of every norm and attention layer that is known here; others keep their own."""
    for module in causal_lm.modules():
        if is_known(module, NORMS):
            module.forward = functools.partial(_norm_forward, module)
        elif is_known(module, ATTENTIONS):
            module.forward = functools.partial(_attention_forward, module)


def is_known(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether a module is transformers' own of one of these names, `NORMS` or `ATTENTIONS`."""
    kind = type(module)
    return kind.__module__.startswith("transformers.models.") and kind.__name__ in names


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x²) + ε), Zhang and Sennrich (1910.07467), eq. 4; normalised in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = x.float()
        scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        product = grad.float() * normed
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # d/dx = scale * (g w - normed * mean(g w normed))
            mean = (product @ weight.float()).unsqueeze_(-1).div_(x.shape[-1])
            grad_x = (grad * weight).float().addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


class _Rotary(torch.autograd.Function):
    """Rotary position embedding of [..., N, H, D]: the halves of each head are turned by their position's angles.

    Su et al. (2104.09864), eq. 34, with the two halves in place of neighbouring pairs, as transformers has it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Both halves of `cos` and of `sin` [..., N, 1, D] are equal, so turning back is turning by the negative angle."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


def _norm_forward(norm: Any, hidden_states: Tensor) -> Tensor:
    weight, epsilon = norm.weight, norm.variance_epsilon
    if hidden_states.is_cuda:  # one kernel there
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, epsilon)
    return _RMSNorm.apply(hidden_states, weight, epsilon)


def _attention_forward(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: object = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the layer's own forward computes, heads kept behind tokens: no row is ever laid out anew."""
    assert past_key_values is None
    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    query, key, value = (
        projection(hidden_states).view(shape) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (angles.unsqueeze(-2) for angles in position_embeddings)
    query, key = (_Rotary.apply(heads, cos, sin) for heads in (query, key))
    out, _ = packed_attention(
        attention,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        scaling=attention.scaling,
        sliding_window=_window(attention),
        **kwargs,
    )
    return attention.o_proj(out.flatten(2)), None


def _window(attention: Any) -> int | None:
    """Mistral's layers take the configuration's window, Qwen's have one each, Llama's none, whatever is configured."""
    holder = attention.config if type(attention).__name__ == "MistralAttention" else attention
    return getattr(holder, "sliding_window", None)
