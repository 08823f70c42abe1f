"""Log-probabilities of target tokens, without ever holding the logits of more than one chunk of tokens."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from notus.runtime import switches

CHUNK_TOKENS = 1024


def full_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The plain reference of `linear_logprobs`: all logits at once, in fp32."""
    logits = (hidden @ weight.t()).float()
    if bias is not None:
        logits = logits + bias.float()
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


class _LinearLogprobs(torch.autograd.Function):
    """Log-probs [N], and log collision probabilities [N] if `statistics`, else None."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, statistics: bool
    ) -> tuple[Tensor, Tensor | None]:
        logps, probs = [], None
        collisions: list[Tensor] = []
        for rows, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            del probs  # before the next are computed
            logp, probs, _ = _chunk_logprobs(rows, weight, ids[:, None])
            logps.append(logp)
            if statistics:
                collisions.append(log_collision(probs))
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk = chunk
        # The backward pass starts from these: one chunk less to compute again, and no more memory than at this moment.
        ctx.last_probs = probs if any(ctx.needs_input_grad[:2]) else None
        return torch.cat(logps).squeeze(-1), _without_gradient(ctx, collisions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        parts: list[Tensor] = []
        grad_weight: Tensor | None = None
        chunk: int = ctx.chunk
        kept, ctx.last_probs = ctx.last_probs, None
        split = (reversed(tensor.split(chunk)) for tensor in (hidden, targets, grad))
        for rows, ids, upstream in zip(*split, strict=True):
            # d logp[target] / d logits = onehot(target) - softmax
            probs, kept = kept if kept is not None else _softmax(rows @ weight.t()), None
            grad_logits = probs.mul_(-upstream[:, None])
            grad_logits.scatter_add_(-1, ids[:, None], upstream[:, None])
            grad_logits = grad_logits.to(weight.dtype)
            del probs  # with another dtype, what follows needs them no more
            if need_hidden:
                parts.append(grad_logits @ weight)
            if need_weight:
                grad_weight = _add_product(grad_weight, grad_logits.t(), rows)
            del grad_logits
        grad_hidden = torch.cat(parts[::-1]) if need_hidden else None
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


class _HeadLogprobs(torch.autograd.Function):
    """`_LinearLogprobs` of softcap(scale * (hidden @ weight.T + bias)), all that follows the product in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
        statistics: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logps: list[Tensor] = []
        collisions: list[Tensor] = []
        for rows, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logp, probs, _ = _gathered(_head_logits(rows, weight, bias, scale, softcap), ids)
            logps.append(logp)
            if statistics:
                collisions.append(log_collision(probs))
            del probs  # before the next are computed
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.scale, ctx.softcap, ctx.chunk = scale, softcap, chunk
        return torch.cat(logps), _without_gradient(ctx, collisions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        parts: list[Tensor] = []
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros(weight.shape[:1], device=weight.device) if need_bias else None
        for rows, ids, upstream in zip(*(each.split(ctx.chunk) for each in (hidden, targets, grad)), strict=True):
            logits = _head_logits(rows, weight, bias, ctx.scale, ctx.softcap)
            slope = ctx.scale if ctx.softcap is None else _cap_slope(logits, ctx.softcap).mul_(ctx.scale)
            # d logp[target] / d logits = onehot(target) - softmax
            exact = torch.softmax(logits, -1, out=logits).mul_(-upstream[:, None])
            exact.scatter_add_(-1, ids[:, None], upstream[:, None])
            exact.mul_(slope)
            if grad_bias is not None:
                grad_bias.add_(exact.sum(0))
            grad_logits = exact.to(weight.dtype)
            del logits, slope, exact
            if need_hidden:
                parts.append(grad_logits @ weight)
            if need_weight:
                grad_weight = _add_product(grad_weight, grad_logits.t(), rows)
            del grad_logits
        return (
            torch.cat(parts) if need_hidden else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None, None, None, None, None,
        )  # fmt: skip


def _head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """fp32 [N, V], in memory of their own."""
    logits = (hidden @ weight.t()).float()
    if bias is not None:
        logits.add_(bias)
    if softcap is not None:
        return logits.mul_(scale / softcap).tanh_().mul_(softcap)
    return logits.mul_(scale)


def _cap_slope(logits: Tensor, softcap: float) -> Tensor:
    """d capped / d logits = 1 - tanh², of capped logits."""
    return (logits / softcap).square_().neg_().add_(1)


def _gathered(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax of fp32 logits [N, V], which are used up, at `ids` [N]; their softmax; which ids are the argmax."""
    top, where = logits.max(-1, keepdim=True)
    above = logits.gather(-1, ids[:, None]) - top
    probs = torch.softmax(logits, -1, out=logits)
    return (above + probs.gather(-1, where).log_()).squeeze(-1), probs, where.squeeze(-1) == ids


def _chunk_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax of a chunk's logits at `ids` [N, 1], fp32 [N, 1]; their softmax, fp32 [N, V]; their argmax [N, 1].

    log p[id] = logit[id] - top + log p[top], where p[top] is at least 1 / V: exact, and one pass over the logits where
    logsumexp makes several.
    """
    logits = hidden @ weight.t()
    top, where = logits.max(-1, keepdim=True)
    above = logits.gather(-1, ids).float() - top.float()
    probs = _softmax(logits)
    return above + probs.gather(-1, where).log_(), probs, where


def _softmax(logits: Tensor) -> Tensor:
    """fp32, over the last dimension; `logits` are used up."""
    if logits.is_cuda:  # casts as it goes
        return logits.softmax(-1, dtype=torch.float32)
    exact = logits.float()
    return torch.softmax(exact, -1, out=exact)


def log_collision(probs: Tensor) -> Tensor:
    """log of the sum over v of p(v)², of fp32 probabilities [N, V]: fp32 [N], in nats.

    How likely two draws are the same token. A norm reads the probabilities once and keeps no squares. The sum is at
    least 1 / V, so nothing underflows.
    """
    return torch.linalg.vector_norm(probs, dim=-1).log_().mul_(2)


def _without_gradient(ctx: Any, parts: list[Tensor]) -> Tensor | None:
    """Join an output that no gradient flows through; None if there are no parts."""
    if not parts:
        return None
    whole = torch.cat(parts)
    ctx.mark_non_differentiable(whole)
    return whole


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, accumulated in fp32 and in place."""
    if left.dtype == torch.float32:
        return left @ right if total is None else total.addmm_(left, right)
    real = not isinstance(left, FakeTensor)
    if real and switches.enabled("fp32_addmm") and _adds_to_fp32(left.device, left.dtype):
        if total is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    return (left @ right).float() if total is None else total.add_(left @ right)


@functools.cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a product of this dtype can be added to an fp32 tensor as it is computed; tried once a process."""
    if device.type != "cuda":
        return False
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        total = torch.mm(ones, ones, out_dtype=torch.float32)
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # a build without it
        return False
    return bool((total == 32).all())


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """log softmax(f(scale * (hidden @ weight.T + bias))) at the targets, f(x) = softcap * tanh(x / softcap) or x.

    Logits are computed chunk by chunk in the inputs' dtype, normalised in fp32 (scaled and capped too), and computed
    again in the backward pass; the weight's gradient is accumulated in fp32, and skipped when the weight is frozen.
    Without bias, scale and soft cap, the last chunk is not computed again.

    Args:
        hidden: [N, D] final hidden states.
        weight: [V, D] of the output head, same dtype.
        targets: [N] int64 token ids.
        bias: [V] of the output head.
        scale: factor on the logits.
        softcap: bound of the logits.
        chunk_tokens: rows whose logits are held at a time.

    Returns:
        fp32 [N], nats.
    """
    return _logprobs(hidden, weight, targets, bias, scale, softcap, chunk_tokens, statistics=False)[0]


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs`, and from the same logits the log of the probability that two draws are the same token.

    log of the sum over v of p(v)² = logsumexp(2 logits) - 2 logsumexp(logits): the expectation of p under p itself, by
    which WPO normalises log-probs (arXiv 2406.11827, section 3.3).

    Args:
        hidden, weight, targets, bias, scale, softcap, chunk_tokens: as `linear_logprobs` has them.

    Returns:
        fp32 [N] with gradients, and fp32 [N] without, both in nats.
    """
    logps, collisions = _logprobs(hidden, weight, targets, bias, scale, softcap, chunk_tokens, statistics=True)
    assert collisions is not None
    return logps, collisions


def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    chunk: int,
    *,
    statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    found: tuple[Tensor, Tensor | None]
    if _is_plain(bias, scale, softcap):
        found = _LinearLogprobs.apply(hidden, weight, targets, chunk, statistics)
    else:
        found = _HeadLogprobs.apply(hidden, weight, bias, targets, scale, softcap, chunk, statistics)
    return found


def _is_plain(bias: Tensor | None, scale: float, softcap: float | None) -> bool:
    return bias is None and scale == 1.0 and softcap is None


@torch.no_grad()
def linear_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs` with no backward pass, and from the same logits whether each target is the likeliest token.

    Args:
        hidden, weight, targets, bias, scale, softcap, chunk_tokens: as `linear_logprobs` has them.

    Returns:
        fp32 [N], nats; and bool [N].
    """
    logps, greedy = [], []
    for rows, ids in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        if _is_plain(bias, scale, softcap):
            logp, _, likeliest = _chunk_logprobs(rows, weight, ids[:, None])
            logps.append(logp.squeeze(-1))
            greedy.append(likeliest.squeeze(-1) == ids)
        else:
            logp, _, likeliest = _gathered(_head_logits(rows, weight, bias, scale, softcap), ids)
            logps.append(logp)
            greedy.append(likeliest)
    return torch.cat(logps), torch.cat(greedy)
