"""Packed, prefix-shared attention.

Every kernel here computes the same thing: for each segment of a packed row (see `notus.data.packing.Layout`),
causal attention of its queries over its keys, aligned at the last query and the last key, within the sliding
window if the model has one. The model reaches them through transformers' `AttentionInterface` under the name
`IMPLEMENTATION`; transformers has no mask function under that name, so no mask is ever built, and passes our
`layout` keyword down to each layer.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from notus.data.packing import Layout, build_layout

IMPLEMENTATION = "notus_packed"

# (query [N, H, D], key [N_kv, G, D], value [N_kv, G, D], layout, scale, window or None) -> [N, H, D]
Kernel = Callable[[Tensor, Tensor, Tensor, Layout, float, "int | None"], Tensor]


class _GatherKeys(torch.autograd.Function):
    """`x[key_index]`, whose backward adds the copies of a trunk one after the other.

    Each addition touches every row position at most once, so the sum is the same in every run; the backward
    of plain indexing adds them in any order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.key_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout: Layout = ctx.layout
        return add_copies(grad, layout.first_copy, layout.extra_copies), None


def add_copies(grad: Tensor, first_copy: Tensor, extra_copies: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The gradient [N, ...] of a row from that of its gathered copies; see `notus.data.packing.Layout`."""
    total = grad.index_select(0, first_copy)
    for gathered, own in extra_copies:
        total.index_add_(0, own, grad.index_select(0, gathered))
    return total


def varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None
) -> Tensor:
    """FlashAttention-2 on CUDA, through `torch.nn.attention.varlen` (torch 2.11 and later)."""
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if key.shape[1] != query.shape[1] and _TOLD_OF_GROUPS:
        options["enable_gqa"] = True
    starts = (layout.query_starts, layout.key_starts)
    out: Any = varlen_attn(query, key, value, *starts, layout.longest_query, layout.longest_key, **options)
    return out


# torch 2.12 needs an argument for grouped queries; 2.11 has no such argument and needs none
_TOLD_OF_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def sdpa_kernel(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
    """One `scaled_dot_product_attention` per segment; the fast path on CPU, and for fp32 everywhere.

    In fp32, whatever the inputs are: on CPU, its backward pass in bf16 takes up to three times as long.
    """
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    if query.is_cuda:  # of the fp32 kernels there, the memory-efficient one knows no groups, the plain one is no kernel
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    window = None if window is not None and window >= max(layout.key_lengths) else window
    lengths = list(zip(layout.query_lengths, layout.key_lengths, strict=True))
    masked = [(rows, columns) for rows, columns in lengths if rows != columns or window is not None]
    alignment = mask_alignment(query.device)
    masks = _corner_masks(masked, window, query.device, query.dtype, alignment)
    parts = []
    # split, not slices: a slice's backward writes a row-sized gradient of zeros for every segment
    queries = query.transpose(0, 1).unsqueeze(0).split(layout.query_lengths, dim=2)
    keys = key.transpose(0, 1).unsqueeze(0).split(layout.key_lengths, dim=2)
    values = value.transpose(0, 1).unsqueeze(0).split(layout.key_lengths, dim=2)
    for q, k, v, (rows, columns) in zip(queries, keys, values, lengths, strict=True):
        square = rows == columns and window is None
        corner = None if square else _corner(masks[columns % alignment], rows, columns)
        parts.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=corner, is_causal=square, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
            )
        )
    return torch.cat(parts, dim=2).squeeze(0).transpose(0, 1).to(dtype)


def mask_alignment(device: torch.device) -> int:
    """Return of how many numbers a mask's strides, and the place where it begins, have to be multiples.

    CUDA's memory-efficient kernel loads 16 bytes of the mask at a time. `scaled_dot_product_attention` copies a mask
    whose strides are no multiples of 8 into one that has such strides (torch 2.11 to 2.13, `preprocess_mask` in
    aten/src/ATen/native/transformers/attention.cpp). It does not look at the address: a slice that begins between two
    multiples would be read as it stands, which ends in "CUDA error: misaligned address".
    """
    return 8 if device.type == "cuda" else 1


def _corner_masks(
    lengths: list[tuple[int, int]], window: int | None, device: torch.device, dtype: torch.dtype, alignment: int
) -> dict[int, Tensor]:
    """Masks of which every segment's own is a corner, by the segment's number of keys modulo `alignment`.

    A corner begins `width - columns` numbers after the beginning of a row. Of the segments in one of these groups, that
    is always a multiple of `alignment`.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    for rows, columns in lengths:
        groups.setdefault(columns % alignment, []).append((rows, columns))
    masks = {}
    for rest, group in groups.items():
        height, width = (max(sizes) for sizes in zip(*group, strict=True))
        masks[rest] = causal_mask(height, width, window, device, dtype, alignment)
    return masks


def _corner(mask: Tensor, rows: int, columns: int) -> Tensor:
    """The mask of a segment: aligned at the bottom right, it is the corner of a larger one's."""
    height, width = mask.shape
    return mask[height - rows :, width - columns :]


def dense_kernel(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
    """The plain reference, for tests and self-checks: one dense mask over queries and keys, fp32 softmax."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = torch.full((query.shape[0], key.shape[0]), float("-inf"), device=query.device)
    at_query, at_key = 0, 0
    for rows, columns in zip(layout.query_lengths, layout.key_lengths, strict=True):
        block = causal_mask(rows, columns, window, query.device, torch.float32)
        mask[at_query : at_query + rows, at_key : at_key + columns] = block
        at_query, at_key = at_query + rows, at_key + columns
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale + mask
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.float()).to(query.dtype)


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


def kernel_for(device: torch.device, dtype: torch.dtype) -> tuple[str, Kernel]:
    """The name and the function of the kernel used on this kind of device; FlashAttention-2 takes no fp32."""
    flash = device.type == "cuda" and dtype != torch.float32
    return ("varlen", varlen_kernel) if flash else ("sdpa", sdpa_kernel)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    kernel: Kernel | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention function for transformers' `AttentionInterface`.

    Args:
        module: the attention layer that calls.
        query: [1, H, N, D] of one packed row.
        key, value: [1, G, N, D], G key/value heads.
        attention_mask: None; masks follow from `layout`.
        scaling: factor on the scores.
        layout: the row's segments, passed to the model as a keyword.
        dropout: 0; attention dropout is switched off in every policy.
        sliding_window: keys up to this many positions back are seen.
        kernel: overrides the device's kernel (tests).

    Returns:
        ([1, N, H, D], None).

    Raises:
        ValueError: the model's layers do not hand `layout` on.
    """
    if layout is None:
        raise ValueError(
            f"{type(module).__name__} got no layout of the packed row: this model's layers drop the keywords "
            "that they are called with; take a model whose layers pass them on to the attention"
        )
    assert attention_mask is None
    assert dropout == 0.0
    run = kernel or kernel_for(query.device, query.dtype)[1]
    rows = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    keys, values = (_GatherKeys.apply(tensor, layout) for tensor in rows[1:])
    return run(rows[0], keys, values, layout, scaling, sliding_window).unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, packed_attention)


def check_kernel(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
) -> None:
    """Run the device's kernel on a tiny row against the dense reference, both with their gather and backward.

    Raises:
        ValueError: the output or a gradient is off, naming by how much.
    """
    name, kernel = kernel_for(device, dtype)
    layout = build_layout([5, 3], [[4, 6], [2, 7]]).to(device)
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(layout.query_lengths)
    shapes = [(num_tokens, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    window = None if window is None else min(window, 4)
    fast = _outputs(kernel, _GatherKeys.apply, inputs, layout, window)
    plain = _outputs(dense_kernel, _index, [tensor.float() for tensor in inputs], layout, window)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for what, got, expected in zip(("output", "query", "key", "value"), fast, plain, strict=True):
        error = ((got.float() - expected).norm() / expected.norm()).item()
        if not error <= tolerance:
            raise ValueError(
                f"the attention kernel {name!r} ({dtype}, torch {torch.__version__}) is wrong on {device}: "
                f"relative error {error:.2e} in its {what} (at most {tolerance:.0e} expected); "
                "use another torch version"
            )


def _index(x: Tensor, layout: Layout) -> Tensor:
    return x[layout.key_index]


def _outputs(
    kernel: Kernel,
    gather: Callable[[Tensor, Layout], Tensor],
    inputs: list[Tensor],
    layout: Layout,
    window: int | None,
) -> list[Tensor]:
    """[output, query gradient, key gradient, value gradient] of a kernel behind a gather."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs[:3])
    out = kernel(query, gather(key, layout), gather(value, layout), layout, query.shape[-1] ** -0.5, window)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3])]
