"""Packed attention with a soft cap or with sinks.

With scores s, each query's weights are

    p_j = exp(f(s_j)) / (exp(a_h) + sum_i exp(f(s_i))),    f(s) = c tanh(s / c)

where c is the soft cap (Gemma 2, 2408.00118, section 2) and a_h the sink of head h, a logit that takes weight and gives
no value (gpt-oss; Xiao et al., 2309.17453). Without a soft cap f(s) = s, without sinks there is no exp(a_h).

- `plain_kernel` computes both, segment by segment in fp32, with a backward pass that keeps no scores.
- `sink_kernel` is FlashAttention-2 (CUDA). Its backward pass computes p from the log-sum-exp that it is given, and
  sum_j p_j dp_j from the output that it is given. With the sink in both, that is this attention's exact gradient.
- `flex_kernel` is torch's flex attention, compiled (CUDA). It has soft caps; sinks are put in by its log-sum-exp.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import AuxRequest as FlexAux
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.nn.functional import pad
from torch.utils._python_dispatch import _disable_current_modes

from notus.data.packing import Layout

# Why a kernel is not used in this process, by its name in `attention.kernel_for`.
failures: dict[str, str | None] = {"flex": None, "varlen-sinks": None}


def causal_mask(
    num_queries: int,
    num_keys: int,
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
    alignment: int = 1,
) -> Tensor:
    """Additive mask [num_queries, num_keys]: 0 where a query may look, else -inf; aligned bottom right.

    Its rows begin at multiples of `alignment` numbers.
    """
    ahead = torch.arange(num_keys, device=device) - (
        torch.arange(num_queries, device=device)[:, None] + num_keys - num_queries
    )
    hidden = ahead > 0
    if window is not None:
        hidden |= ahead <= -window
    padded = num_keys + -num_keys % alignment
    mask = torch.zeros(num_queries, padded, dtype=dtype, device=device)
    return mask[:, :num_keys].masked_fill_(hidden, float("-inf"))


# ---- plain: segment by segment, in fp32 ----


def plain_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Any variant on any device: [N, H, D_v] from [N, H, D], [N_kv, G, D] and [N_kv, G, D_v]; see the module."""
    out: Tensor = _plain(query, key, value, sinks, layout.lengths, scale, window, softcap)[0]
    return out


@torch.library.custom_op("notus::plain_attention", mutates_args=())
def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(output [N, H, D_v], logarithm of the weights' denominator, fp32 [N, H])."""
    outputs, totals = [], []
    for q, k, v in _segments(lengths, query, key, value):
        scores, _ = _scores(q, k, scale, window, softcap)
        total = scores.logsumexp(-1)  # [G, R, rows]
        if sinks is not None:
            total = torch.logaddexp(total, sinks.float().view(total.shape[0], -1, 1))
        weights = scores.sub_(total.unsqueeze(-1)).exp_()
        outputs.append(torch.einsum("grqk,kgd->qgrd", weights, v).flatten(1, 2))
        totals.append(total.flatten(0, 1).t())
    return torch.cat(outputs).to(query.dtype), torch.cat(totals)


def _segments(lengths: Tensor, query: Tensor, key: Tensor, value: Tensor, *rows: Tensor) -> Any:
    """For each segment: query [rows, G, R, D], key and value, and its part of `rows`, all in fp32."""
    query_lengths, key_lengths = lengths.view(2, -1).tolist()
    groups = key.shape[1]
    parts = (each.split(query_lengths) for each in (query, *rows))
    queries, *others = ([part.float() for part in each] for each in parts)
    keys, values = ([part.float() for part in each.split(key_lengths)] for each in (key, value))
    queries = [part.unflatten(1, (groups, -1)) for part in queries]
    return zip(queries, keys, values, *others, strict=True)


def _scores(
    query: Tensor, key: Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """(masked scores [G, R, rows, columns], tanh(s / c) if there is a soft cap)."""
    scores = torch.einsum("qgrd,kgd->grqk", query, key).mul_(scale)
    capped = None
    if softcap is not None:
        capped = scores.div_(softcap).tanh_()
        scores = capped * softcap
    mask = causal_mask(query.shape[0], key.shape[0], window, query.device, torch.float32)
    return scores.add_(mask), capped


@_plain.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows, heads, _dim = query.shape
    return query.new_empty(rows, heads, value.shape[-1]), query.new_empty(rows, heads, dtype=torch.float32)


@torch.library.custom_op("notus::plain_attention_backward", mutates_args=())
def _plain_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    total: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value: dv = pᵀ do, ds = p (do vᵀ - do·o) f'(s)."""
    inner = (grad.float() * out.float()).sum(-1)
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for q, k, v, upstream, means, totals in _segments(lengths, query, key, value, grad, inner, total):
        upstream, means, totals = (each.unflatten(1, q.shape[1:3]) for each in (upstream, means, totals))
        scores, capped = _scores(q, k, scale, window, softcap)
        weights = scores.sub_(totals.permute(1, 2, 0).unsqueeze(-1)).exp_()
        grads[2].append(torch.einsum("grqk,qgrd->kgd", weights, upstream))
        slopes = torch.einsum("qgrd,kgd->grqk", upstream, v).sub_(means.permute(1, 2, 0).unsqueeze(-1)).mul_(weights)
        if capped is not None:
            slopes.mul_(capped.square_().neg_().add_(1))  # f'(s) = 1 - tanh²(s / c)
        slopes.mul_(scale)
        grads[0].append(torch.einsum("grqk,kgd->qgrd", slopes, k).flatten(1, 2))
        grads[1].append(torch.einsum("grqk,qgrd->kgd", slopes, q))
    of_query, of_key, of_value = (
        torch.cat(parts).to(of.dtype) for parts, of in zip(grads, (query, key, value), strict=True)
    )
    return of_query, of_key, of_value


@_plain_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_plain(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, lengths, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(query, key, value, sinks, lengths, *output)


def _differentiate_plain(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    query, key, value, sinks, lengths, out, total = ctx.saved_tensors
    grads = _plain_backward(grad, query, key, value, sinks, out, total, lengths, ctx.scale, ctx.window, ctx.softcap)
    of_sinks = None if sinks is None else sink_gradient(sinks, grad, out, total)
    return *grads, of_sinks, None, None, None, None


_plain.register_autograd(_differentiate_plain, setup_context=_keep_plain)


def sink_gradient(sinks: Tensor, grad: Tensor, out: Tensor, total: Tensor) -> Tensor:
    """[H], from the outputs [N, H, D] and the logarithms of their weights' denominators [N, H].

    A sink takes the share exp(a - total) from all weights of its query: da = -sum over queries of that times do·o.
    """
    share = (sinks.float() - total).exp()
    return -(share * (grad.float() * out.float()).sum(-1)).sum(0).to(sinks.dtype)


# ---- sinks by FlashAttention-2 ----

# torch 2.12 needs an argument for grouped queries; 2.11 has no such argument and needs none
TOLD_OF_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def flash_options(query: Tensor, key: Tensor, scale: float, window: int | None) -> dict[str, Any]:
    """Keywords of `varlen_attn`."""
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if key.shape[1] != query.shape[1] and TOLD_OF_GROUPS:
        options["enable_gqa"] = True
    return options


FLASH_HEAD_DIM = 256  # FlashAttention-2 has no larger heads


def flash_padded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with heads as FlashAttention-2 takes them: all of one size, a multiple of 8. Zeros change no score."""
    size = max(query.shape[-1], value.shape[-1])
    size += -size % 8
    query, key, value = (pad(each, (0, size - each.shape[-1])) for each in (query, key, value))
    return query, key, value


def sink_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """FlashAttention-2 with sinks [H], see the module."""
    assert softcap is None
    assert sinks is not None
    size = value.shape[-1]
    query, key, value = flash_padded(query, key, value)
    starts = (layout.query_starts, layout.key_starts, layout.longest_query, layout.longest_key)
    out: Tensor = _flash(query, key, value, sinks, *starts, scale, window)[0]
    return out[..., :size]


@torch.library.custom_op("notus::sink_attention", mutates_args=())
def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(output [N, H, D], logarithm of the weights' denominator, fp32 [N, H])."""
    options = flash_options(query, key, scale, window)
    starts = (query_starts, key_starts, longest_query, longest_key)
    found: Any = varlen_attn(query, key, value, *starts, return_aux=AuxRequest(lse=True), **options)
    out, without = found[0], found[1].t()
    total = torch.logaddexp(without, sinks.float())
    return (out * (without - total).exp().unsqueeze(-1)).to(query.dtype), total


@_flash.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("notus::sink_attention_backward", mutates_args=())
def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    starts = (query_starts, key_starts, longest_query, longest_key)
    side = [-1 if window is None else window - 1, 0]
    return _flash_gradients(
        grad.contiguous(),
        query,
        key,
        value,
        out,
        total.t().contiguous(),
        *starts,
        window is None,
        no_dropout,
        scale,
        side,
    )


def _flash_gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = torch.ops.torch_attn._varlen_attn_backward(*args)
    return of_query, of_key, of_value


@_flash_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_flash(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, query_starts, key_starts, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, sinks, query_starts, key_starts, *output)


def _differentiate_flash(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    query, key, value, sinks, query_starts, key_starts, out, total = ctx.saved_tensors
    grads = _flash_backward(grad, query, key, value, out, total, query_starts, key_starts, *ctx.rest)
    return *grads, sink_gradient(sinks, grad, out, total), None, None, None, None, None, None


_flash.register_autograd(_differentiate_flash, setup_context=_keep_flash)


# ---- flex attention ----

BLOCK = 128  # queries and keys that flex attention masks at a time


def flex_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """torch's flex attention, compiled once for rows of every length; not compiled on fake tensors."""
    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):  # it takes powers of 2
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    rows = [each.transpose(0, 1).unsqueeze(0) for each in (query, key, value)]
    for each in rows:
        maybe_mark_dynamic(each, 2)
    real = query.is_cuda and not isinstance(query, FakeTensor)
    # The compiler does nothing under a dispatch mode, and activation checkpointing is one.
    modes = real and torch._C._len_torch_dispatch_stack()
    with _disable_current_modes() if modes else contextlib.nullcontext(), torch._dynamo.config.patch(_AS_CONSTANTS):
        out, total = _flex(real)(*rows, block_mask(layout, window), _places(layout), scale, window, softcap)
        if sinks is not None:
            out = (out * torch.sigmoid(total - sinks.float()[:, None]).unsqueeze(-1)).to(query.dtype)
    return out.squeeze(0).transpose(0, 1)


# Scale, soft cap and window are constants of the kernel; the compiler would make symbols of numbers that change.
_AS_CONSTANTS = {"specialize_float": True, "automatic_dynamic_shapes": False, "recompile_limit": 64}


@functools.cache
def _flex(compiled: bool) -> Any:
    return torch.compile(_flex_attention) if compiled else _flex_attention


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: dict[str, Any],
    places: tuple[Tensor, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(output [1, H, N, D_v], log-sum-exp of the scores [1, H, N])."""
    mask = BlockMask(
        **blocks,
        seq_lengths=(query.shape[2], key.shape[2]),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_seen(places, window),
    )
    found: Any = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=mask,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
        return_aux=FlexAux(lse=True),
    )
    return found[0], found[1].lse


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def block_mask(layout: Layout, window: int | None) -> dict[str, Tensor]:
    """What flex attention may skip and must mask of a row, as `BlockMask` has it; made once for a row and a window.

    Its blocks are found on the host from the segments' lengths, a few numbers for each block of queries.
    """
    made: dict[int | None, dict[str, Tensor]] = vars(layout).setdefault("_block_masks", {})
    if window not in made:
        device = layout.query_starts.device
        partial, full = _blocks(layout, window)
        made[window] = {
            name + part: found
            for name, blocks in (("kv", partial), ("full_kv", full), ("q", partial.t()), ("full_q", full.t()))
            for part, found in zip(("_num_blocks", "_indices"), _ordered(blocks, device), strict=True)
        }
    return made[window]


def _ordered(blocks: Tensor, device: torch.device) -> list[Tensor]:
    """How many blocks are set in each row, and which, those first: int32 [1, 1, Q] and [1, 1, Q, K].

    Flex attention takes each row's numbers to lie side by side: of a transposed table its backward pass would read
    others, without an error.
    """
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    parts = (part[None, None].int().contiguous() for part in (blocks.sum(-1), order))
    found = [part.to(device, non_blocking=True) for part in parts]
    for part in found:
        for dim in range(2, part.dim()):
            maybe_mark_dynamic(part, dim)
    return found


def _blocks(layout: Layout, window: int | None) -> tuple[Tensor, Tensor]:
    """(blocks that hold a seen and a hidden key, blocks without a hidden one): bool [blocks of queries, of keys]."""
    queries, keys = sum(layout.query_lengths), sum(layout.key_lengths)
    some = torch.zeros(-(-queries // BLOCK), -(-keys // BLOCK), dtype=torch.bool)
    full = some.clone()
    query_start = key_start = 0
    for rows, columns in zip(layout.query_lengths, layout.key_lengths, strict=True):
        shift = key_start + columns - rows - query_start  # from a query to its own key
        stop = query_start + rows
        for block in range(query_start // BLOCK, -(-stop // BLOCK) if rows else 0):
            first, last = max(block * BLOCK, query_start) + shift, min((block + 1) * BLOCK, stop) - 1 + shift
            nearest = key_start if window is None else max(key_start, first - window + 1)
            some[block, nearest // BLOCK : last // BLOCK + 1] = True
            # all the block's queries, from the first to the last, see these keys
            whole = block * BLOCK >= query_start and (block + 1) * BLOCK <= stop
            seen = key_start if window is None else max(key_start, last - window + 1)
            if whole and first + 1 > seen:
                full[block, -(-seen // BLOCK) : (first + 1) // BLOCK] = True
        query_start, key_start = stop, key_start + columns
    return some & ~full, full


def _places(layout: Layout) -> tuple[Tensor, ...]:
    """(segment, position) of each query, then of each gathered key: int32, on the layout's device; made once."""
    made: tuple[Tensor, ...] | None = vars(layout).get("_places")
    if made is None:
        made = vars(layout)["_places"] = _find_places(layout)
        for each in made:
            maybe_mark_dynamic(each, 0)
    return made


def _find_places(layout: Layout) -> tuple[Tensor, ...]:
    query_starts, key_starts = layout.query_starts, layout.key_starts
    device = query_starts.device
    query_place = torch.arange(sum(layout.query_lengths), device=device, dtype=torch.int32)
    key_place = torch.arange(sum(layout.key_lengths), device=device, dtype=torch.int32)
    of_query = torch.searchsorted(query_starts, query_place, right=True, out_int32=True) - 1
    of_key = torch.searchsorted(key_starts, key_place, right=True, out_int32=True) - 1
    shift = key_starts[1:] - query_starts[1:]  # aligned at the last of both
    query_place = query_place + shift.index_select(0, of_query)
    return of_query, query_place.int(), of_key, key_place


def _seen(places: tuple[Tensor, ...], window: int | None) -> Any:
    """The mask as a function of places, for the compiler. Places are those of keys in the gather."""
    of_query, query_place, of_key, key_place = places

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (of_query[query] == of_key[key]) & (key_place[key] <= query_place[query])

    if window is None:
        return causal
    nearest: int = window

    def windowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return causal(batch, head, query, key) & (key_place[key] > query_place[query] - nearest)

    return windowed
