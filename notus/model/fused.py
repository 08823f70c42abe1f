"""The small work of a decoder's block in fewer passes over memory, with less kept for the backward pass.

Transformers writes root-mean-square norms, rotary embeddings, gated MLPs and residual sums as chains of elementwise
operations: each reads and writes the whole row, and autograd keeps many of them. Here each is one function with a
backward pass of its own; on CUDA each pass is one kernel (`notus.model.kernels`). The blocks' own code stays the
reference: `tests/model/test_fused.py` and `test_policy.py` hold the two equal, gradients included.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from notus.model import kernels
from notus.model.attention import packed_attention
from notus.model.kernels import Kernel
from notus.runtime import switches

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
NORMS = frozenset(f"{family}RMSNorm" for family in _FAMILIES)
ATTENTIONS = frozenset(f"{family}Attention" for family in _FAMILIES)
MLPS = frozenset(f"{family}MLP" for family in _FAMILIES)
BLOCKS = frozenset(f"{family}DecoderLayer" for family in _FAMILIES)


def fuse(causal_lm: PreTrainedModel) -> None:
    """Replace, in place, the forward of every module that is known here; others keep their own."""
    for module in causal_lm.modules():
        if is_known(module, NORMS):
            module.forward = functools.partial(_norm_forward, module)
        elif is_known(module, ATTENTIONS):
            module.forward = functools.partial(_attention_forward, module)
        elif keeps_factors(module):
            module.forward = functools.partial(_mlp_forward, module)
        elif switches.enabled("fused_elementwise") and is_known(module, BLOCKS):
            module.forward = functools.partial(_block_forward, module)


def is_known(module: nn.Module, names: frozenset[str]) -> bool:
    """Return whether a module is transformers' own of one of these names, such as `NORMS`.

    Of the family that its name says: others have modules of the same name that may compute something else.
    """
    kind = type(module)
    _, _, rest = kind.__module__.partition("transformers.models.")
    family = rest.partition(".")[0]
    return (
        kind.__name__ in names
        and kind.__module__ == f"transformers.models.{family}.modeling_{family}"
        and (kind.__name__.lower().startswith(family))
    )


def keeps_factors(module: Any) -> bool:
    """Return whether a module is an MLP that `fuse` makes keep its two factors alone, see `_SwiGLU`."""
    known = is_known(module, MLPS) and isinstance(module.act_fn, (nn.SiLU, SiLUActivation))
    return known and switches.enabled("fused_elementwise")


# ---- norms ----


def _inverse_rms(exact: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean(x²) + ε) over the last dimension, which stays with size 1."""
    norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    return norm.square_().div_(exact.shape[-1]).add_(epsilon).rsqrt_()


def _norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight * x * scale, where scale is `_inverse_rms` of x: of x in fp32, and of the weight."""
    normed = x.float() * scale
    product = grad.float() * normed
    grad_x = grad_weight = None
    if of_weight:
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
    if of_x:
        # d/dx = scale * (g w - normed * mean(g w normed))
        mean = (product @ weight.float()).unsqueeze_(-1).div_(x.shape[-1])
        grad_x = (grad * weight).float().addcmul_(normed, mean, value=-1).mul_(scale)
    return grad_x, grad_weight


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x²) + ε), Zhang and Sennrich (1910.07467), eq. 4; normalised in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = x.float()
        scale = _inverse_rms(exact, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        grad_x, grad_weight = _norm_gradients(grad, x, weight, scale, of_x=of_x, of_weight=of_weight)
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, None


class _AddNorm(torch.autograd.Function):
    """(h, norm(h)) of h = residual + x, with the norm of `_RMSNorm`."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        total, normed, scale = ADD_NORM(residual, x, weight, epsilon)
        ctx.save_for_backward(total, weight, scale)
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        of_residual, of_x, of_weight, _ = ctx.needs_input_grad
        grad_sum, grad_weight = ADD_NORM_BACKWARD(grad_total, grad, total, weight, scale, of_weight)
        return grad_sum if of_residual else None, grad_sum if of_x else None, grad_weight, None


def _plain_add_norm(residual: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """(h, norm(h), the norm's scale)."""
    total = residual + x
    exact = total.float()
    scale = _inverse_rms(exact, epsilon)
    return total, (exact * scale).to(x.dtype).mul_(weight), scale


def _add_norm(residual: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_plain_add_norm` as one kernel."""
    total = (residual.float() + x.float()).to(x.dtype)
    exact = total.float()
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return total, (exact * scale * weight.float()).to(x.dtype), scale


def _plain_add_norm_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, weight: Tensor, scale: Tensor, of_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of h's two summands, which are equal, and of the weight."""
    exact, grad_weight = _norm_gradients(grad, total, weight, scale, of_x=True, of_weight=of_weight)
    assert exact is not None
    return exact.add_(grad_total).to(total.dtype), grad_weight


def _add_norm_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, weight: Tensor, scale: Tensor, of_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """`_plain_add_norm_backward` as one kernel, and one more for the weight's gradient."""
    normed = total.float() * scale
    exact = grad.float()
    scaled = exact * weight.float()
    grad_x = scale * (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) + grad_total.float()
    grad_weight = (exact * normed).flatten(0, -2).sum(0).to(weight.dtype) if of_weight else None
    return grad_x.to(total.dtype), grad_weight


# ---- rotary embeddings ----


class _Rotary(torch.autograd.Function):
    """Rotary position embedding of [..., N, H, D]: the halves of each head are turned by their position's angles.

    Su et al. (2104.09864), eq. 34, with the two halves in place of neighbouring pairs, as transformers has it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out: Tensor = TURN(x, cos, sin, False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return TURN(grad, cos, sin, True), None, None


def _plain_turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Both halves of `cos` and of `sin` [..., N, 1, D] are equal, so turning back is turning by the negative angle."""
    half, sign = x.shape[-1] // 2, -1.0 if back else 1.0
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


def _turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """`_plain_turn` as one kernel."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([second, -first] if back else [-second, first], dim=-1)
    return (x.float() * cos.float() + turned * sin.float()).to(x.dtype)


# ---- the gated MLP ----


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, Shazeer (2002.05202), eq. 6 without its products; only the two factors are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out: Tensor = SWIGLU(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        grads: tuple[Tensor, Tensor] = SWIGLU_BACKWARD(grad, *ctx.saved_tensors)
        return grads


def _plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate).mul_(up)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`_plain_swiglu` as one kernel."""
    exact = gate.float()
    return (exact * torch.sigmoid(exact) * up.float()).to(gate.dtype)


def _plain_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both factors."""
    grad_gate = grad * up
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return grad_gate, silu(gate).mul_(grad)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`_plain_swiglu_backward` as one kernel."""
    exact, upstream = gate.float(), grad.float()
    share = torch.sigmoid(exact)
    grad_gate = upstream * up.float() * share * (1 + exact * (1 - share))
    return grad_gate.to(gate.dtype), (upstream * exact * share).to(up.dtype)


# ---- the modules' forward ----


def _block_forward(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: object = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """What the decoder layer's own forward computes, with the first residual sum and the second norm as one."""
    attended, _ = block.self_attn(
        hidden_states=block.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_embeddings=position_embeddings,
        past_key_values=past_key_values,
        **kwargs,
    )
    norm = block.post_attention_layernorm
    total, normed = _AddNorm.apply(hidden_states, attended, norm.weight, norm.variance_epsilon)
    out: Tensor = total + block.mlp(normed)
    return out


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    out: Tensor = mlp.down_proj(_SwiGLU.apply(mlp.gate_proj(x), mlp.up_proj(x)))
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


# ---- the kernels, and their check ----

_kernel = functools.partial(Kernel, switch="fused_elementwise", varying=1)  # of [1, N, ...]
ADD_NORM = _kernel(_add_norm, plain=_plain_add_norm)
ADD_NORM_BACKWARD = _kernel(_add_norm_backward, plain=_plain_add_norm_backward)
SWIGLU = _kernel(_swiglu, plain=_plain_swiglu)
SWIGLU_BACKWARD = _kernel(_swiglu_backward, plain=_plain_swiglu_backward)
TURN = _kernel(_turn, plain=_plain_turn)
KERNELS = (ADD_NORM, ADD_NORM_BACKWARD, SWIGLU, SWIGLU_BACKWARD, TURN)
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# The compiler picks block sizes and splits sums for the row that it sees first: one as long as real ones.
_ROWS = {"cuda": 4096, "cpu": 24}


def check_fused(
    causal_lm: PreTrainedModel, device: torch.device, dtype: torch.dtype, gather: kernels.Gather | None = None
) -> list[str]:
    """Compile the kernels for a model's sizes and compare each with its plain twin; on CUDA alone.

    Args:
        causal_lm: the model.
        device, dtype: of the computation.
        gather: of the ranks, see `kernels.check`.

    Returns:
        What is wrong, a line for each kernel that is therefore not used.
    """
    config = causal_lm.config
    known = any(is_known(module, BLOCKS) for module in causal_lm.modules())
    if device.type != "cuda" or not known or not switches.enabled("fused_elementwise"):
        return []
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    inputs = _Inputs(
        config.hidden_size, config.intermediate_size, (heads, config.num_key_value_heads), head_dim, device, dtype
    )
    return kernels.check(KERNELS, lambda kernel: (inputs.error(kernel), _TOLERANCE[dtype]), gather)


def fused_checks(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Compare each kernel with its plain twin, on CUDA alone: (name, relative error, the most that is let pass)."""
    inputs = _Inputs(64, 176, (4, 2), 16, device, dtype)
    for kernel in KERNELS:
        if kernel.failure is not None or kernel.usable(torch.empty(0, device=device)):
            yield kernel.name, inputs.error(kernel), _TOLERANCE[dtype]


def rounding(device: torch.device) -> str:
    """Name the code that computes the blocks' small work on a device: what rounds otherwise has another name."""
    if device.type != "cuda" or not switches.enabled("fused_elementwise"):
        return ""
    without = [kernel.name for kernel in KERNELS if kernel.failure]
    return "-".join(["-fused", *(["without", *without] if without else [])])


class _Inputs:
    """Random arguments of every kernel, of each kind that a model has."""

    def __init__(
        self, hidden: int, inner: int, heads: tuple[int, int], head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        generator, rows = torch.Generator(device).manual_seed(0), _ROWS[device.type]

        def new(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        gate, up, grad = (new(1, rows, inner) for _ in range(3))
        residual, x, other = (new(1, rows, hidden) for _ in range(3))
        weight = new(hidden)
        _, _, scale = _plain_add_norm(residual, x, weight, 1e-5)
        angles = new(1, rows, 1, head_dim // 2).repeat(1, 1, 1, 2)
        turns = [(new(1, rows, count, head_dim), angles.cos(), angles.sin()) for count in heads]
        self._cases: dict[Kernel, list[tuple[Any, ...]]] = {
            SWIGLU: [(gate, up)],
            SWIGLU_BACKWARD: [(grad, gate, up)],
            ADD_NORM: [(residual, x, weight, 1e-5)],
            ADD_NORM_BACKWARD: [(other, x, residual, weight, scale, of_weight) for of_weight in (True, False)],
            TURN: [(*turn, back) for turn in turns for back in (False, True)],
        }

    def error(self, kernel: Kernel) -> float:
        """The largest relative error of a kernel beside its plain twin."""
        assert kernel.plain is not None
        cases = self._cases[kernel]
        errors = [kernels.relative_error(kernel.run(*case), kernel.plain(*case)) for case in cases]
        return torch.tensor(errors).max().item()  # NaN if there is one
