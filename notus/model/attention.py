"""Packed, prefix-shared attention.

Every kernel here computes the same thing: for each segment of a packed row (see `notus.data.packing.Layout`),
causal attention of its queries over its keys, aligned at the last query and the last key, within the sliding
window if the model has one. The model reaches them through transformers' `AttentionInterface` under the name
`IMPLEMENTATION`; transformers has no mask function under that name, so no mask is ever built, and passes our
`layout` keyword down to each layer.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from notus.data.packing import Layout, build_layout
from notus.model import attention_variants as variants
from notus.model.attention_variants import causal_mask
from notus.model.kernels import Gather
from notus.model.structure import text_config
from notus.runtime import switches
from notus.runtime.process import first_line

IMPLEMENTATION = "notus_packed"

# (query [N, H, D], key [N_kv, G, D], value [N_kv, G, D_v], layout, scale, window or None) -> [N, H, D_v].
# Those of `attention_variants`, and the dense one, take softcap= and sinks= too.
Kernel = Callable[..., Tensor]


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
    size = value.shape[-1]
    if query.shape[-1] > variants.FLASH_HEAD_DIM:
        return sdpa_kernel(query, key, value, layout, scale, window)
    padded = size != query.shape[-1] or size % 8 != 0
    if padded:
        query, key, value = variants.flash_padded(query, key, value)
    starts = (layout.query_starts, layout.key_starts)
    options = variants.flash_options(query, key, scale, window)
    out: Any = varlen_attn(query, key, value, *starts, layout.longest_query, layout.longest_key, **options)
    return out[..., :size] if padded else out


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


def dense_kernel(
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
    """The plain reference, for tests and self-checks: one dense mask over queries and keys, fp32 softmax."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = torch.full((query.shape[0], key.shape[0]), float("-inf"), device=query.device)
    at_query, at_key = 0, 0
    for rows, columns in zip(layout.query_lengths, layout.key_lengths, strict=True):
        block = causal_mask(rows, columns, window, query.device, torch.float32)
        mask[at_query : at_query + rows, at_key : at_key + columns] = block
        at_query, at_key = at_query + rows, at_key + columns
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)


def kernel_for(
    device: torch.device, dtype: torch.dtype, *, softcap: bool = False, sinks: bool = False
) -> tuple[str, Kernel]:
    """The name and the function of the kernel used on this kind of device; FlashAttention-2 takes no fp32.

    Args:
        device, dtype: of the computation.
        softcap, sinks: whether the attention has them, see `attention_variants`.
    """
    flash = device.type == "cuda" and dtype != torch.float32
    if not (softcap or sinks):
        return ("varlen", varlen_kernel) if flash else ("sdpa", sdpa_kernel)
    name = "flex" if softcap else "varlen-sinks"
    if flash and variants.failures[name] is None and switches.enabled("attention_variants"):
        return name, variants.flex_kernel if softcap else variants.sink_kernel
    return "plain", variants.plain_kernel


# ---- what the model calls ----

# Keywords that change nothing here, whatever their value: positions are in query and key by now, and the others
# choose what else a model returns or keeps.
_WITHOUT_EFFECT = frozenset({
    "position_ids", "cache_position", "position_embeddings", "output_hidden_states", "output_router_logits",
    "return_dict", "logits_to_keep", "deterministic",
})  # fmt: skip
# Keywords of which one value, beside None, changes nothing.
_NEUTRAL: dict[str, object] = {
    "use_cache": False,  # no keys of an earlier call
    "output_attentions": False,  # no weights are handed back
    "is_causal": True,  # all packed attention is
    "dropout": 0.0,
}


def check_call(module: torch.nn.Module, layout: object, attention_mask: object, options: dict[str, Any]) -> None:
    """Raise ValueError for a call of packed attention that asks for what it does not compute.

    Args:
        module: the attention layer that calls.
        layout: None: the model's layers drop keywords.
        attention_mask: anything but None: a mask that the model built by itself, for rows of another shape.
        options: the keywords beside those of `packed_attention`.
    """
    name = type(module).__name__
    if layout is None:
        raise ValueError(
            f"{name} got no layout of the packed row: this model's layers drop the keywords "
            "that they are called with; take a model whose layers pass them on to the attention"
        )
    if attention_mask is not None:
        raise ValueError(
            f"{name} built an attention mask by itself, which does not hold for packed rows; set model.path: plain"
        )
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{name} is not causal, and packed attention is; set model.path: plain")
    for keyword, value in options.items():
        if value is None or keyword in _WITHOUT_EFFECT or (keyword in _NEUTRAL and value == _NEUTRAL[keyword]):
            continue
        shown = f"={value}" if isinstance(value, bool | int | float | str) else ""
        raise ValueError(
            f"{name} calls its attention with {keyword}{shown}, which packed attention does not know; "
            "set model.path: plain"
        )


# transformers' blocks that take keywords and hand none on to their attention.
_DROP_KEYWORDS = frozenset({"StableLmDecoderLayer", "NemotronDecoderLayer"})
_handed: Layout | None = None  # the layout of the block that runs, if it is one of these


def hand_layout_on(block: torch.nn.Module) -> None:
    """Give a row's layout to the attention of a block that drops it, by another `forward`; other blocks stay."""
    kind = type(block)
    if kind.__module__.startswith("transformers.models.") and kind.__name__ in _DROP_KEYWORDS:
        block.forward = functools.partial(_forward_with_layout, block)


def _forward_with_layout(block: Any, *args: Any, layout: Layout, **options: Any) -> Any:
    global _handed
    _handed = layout
    try:
        return type(block).forward(block, *args, **options)
    finally:
        _handed = None


def handed_layout() -> Layout | None:
    """Return the layout for a call that has none, see `hand_layout_on`."""
    return _handed


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What kind of attention a layer has.

    Attributes:
        num_heads, num_kv_heads: H and G.
        head_dim, value_dim: of queries and keys, and of values.
        window: keys up to this many positions back are seen.
        softcap: c, see `attention_variants`.
        sinks: whether each head has one.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


class Calls(dict[torch.nn.Module, Sizes]):
    """The modules that called packed attention, in order, and with what sizes."""


_recorded: Calls | None = None


@contextlib.contextmanager
def recorded_calls() -> Iterator[Calls]:
    """Record which modules call packed attention within the context; blocks that are compiled do not show."""
    global _recorded
    before, _recorded = _recorded, Calls()
    try:
        yield _recorded
    finally:
        _recorded = before


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    kernel: Kernel | None = None,
    **options: Any,  # what a model hands on, checked one by one
) -> tuple[Tensor, None]:
    """Attention function for transformers' `AttentionInterface`.

    Args:
        module: the attention layer that calls.
        query: [1, H, N, D] of one packed row.
        key: [1, G, N, D], G key/value heads.
        value: [1, G, N, D_v].
        attention_mask: None; masks follow from `layout`.
        scaling: factor on the scores; None: 1 / sqrt(D).
        layout: the row's segments, passed to the model as a keyword.
        sliding_window: keys up to this many positions back are seen.
        softcap, s_aux: of the scores, and [H] sinks: see `attention_variants`.
        kernel: overrides the device's kernel (tests).
        options: other keywords that change nothing, see `check_call`.

    Returns:
        ([1, N, H, D_v], None).

    Raises:
        ValueError: the layer asks for what packed attention does not compute.
    """
    layout = _handed if layout is None else layout
    check_call(module, layout, attention_mask, options)
    assert layout is not None
    if _recorded is not None:
        _recorded[module] = _sizes(query, key, value, sliding_window, softcap, s_aux)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    keys, values = (_GatherKeys.apply(tensor, layout) for tensor in rows[1:])
    if softcap is None and s_aux is None:
        run = kernel or kernel_for(query.device, query.dtype)[1]
        return run(rows[0], keys, values, layout, scale, sliding_window).unsqueeze(0), None
    run = kernel or kernel_for(query.device, query.dtype, softcap=softcap is not None, sinks=s_aux is not None)[1]
    out = run(rows[0], keys, values, layout, scale, sliding_window, softcap=softcap, sinks=s_aux)
    return out.unsqueeze(0), None


def _sizes(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Sizes:
    heads = (query.shape[1], key.shape[1], query.shape[-1], value.shape[-1])
    return Sizes(*heads, window=window, softcap=softcap, sinks=sinks is not None)


AttentionInterface.register(IMPLEMENTATION, packed_attention)


def attention_sizes(causal_lm: PreTrainedModel) -> list[Sizes]:
    """Return what kinds of attention a model has, from its configuration and its modules: one for each size of heads.

    Where some layers have a window, a soft cap or sinks and others do not, they are given as if all had.
    """
    config = text_config(causal_lm.config)
    sinks = any("sinks" in module._parameters for module in causal_lm.modules())
    # a config whose layers differ (Gemma 4) refuses to say what all of them have
    layers: Any = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return list(dict.fromkeys(_configured(layer, sinks) for layer in layers))


def kernel_name(causal_lm: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """Name the kernels that compute a model's attention: what rounds otherwise has another name."""
    return "-".join(dict.fromkeys(_kernel_of(sizes, device, dtype)[0] for sizes in attention_sizes(causal_lm)))


def _configured(config: PreTrainedConfig, sinks: bool) -> Sizes:
    heads = config.num_attention_heads
    head_dim = query_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "qk_nope_head_dim", None) is not None:  # multi-head latent attention: keys are made per head
        query_dim, groups = config.qk_nope_head_dim + config.qk_rope_head_dim, heads
    return Sizes(
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=query_dim,
        value_dim=getattr(config, "v_head_dim", None) or head_dim,
        window=getattr(config, "sliding_window", None),
        softcap=getattr(config, "attn_logit_softcapping", None),
        sinks=sinks,
    )


def check_kernel(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    value_dim: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    gather: Gather | None = None,
) -> list[str]:
    """Run the device's kernel on tiny rows against the dense reference, both with their gather and backward.

    A kernel for soft caps or sinks that fails on any rank is used by none: the plain one is, after the same check.

    Args:
        device, dtype: of the computation.
        num_heads, num_kv_heads, head_dim, window, value_dim, softcap, sinks: see `Sizes`; `value_dim` None: as
            `head_dim`.
        gather: of the ranks, see `kernels.check`; None: there is one.

    Returns:
        What is wrong, a line for each kernel that is not used.

    Raises:
        ValueError: the output or a gradient is off, naming by how much.
    """
    sizes = Sizes(num_heads, num_kv_heads, head_dim, value_dim or head_dim, window, softcap, sinks)
    name = _kernel_of(sizes, device, dtype)[0]
    problems: list[str] = []
    if name in variants.failures:
        try:
            found = _fault(sizes, device, dtype)
        except Exception as problem:  # compilers raise errors of every kind
            found = f"it cannot be compiled here ({first_line(problem)})"
        mine = {name: found} if found else {}
        reasons = [each[name] for each in ([mine] if gather is None else gather(mine)) if name in each]
        variants.failures[name] = reasons[0] if reasons else None
        problems = [f"attention kernel {name} is not used, and attention is slower: {each}" for each in reasons[:1]]
        if not problems:
            return []
        name = _kernel_of(sizes, device, dtype)[0]
    fault = _fault(sizes, device, dtype)
    if fault:
        raise ValueError(
            f"the attention kernel {name!r} ({dtype}, torch {torch.__version__}) is wrong on {device}: "
            f"{fault}; use another torch version"
        )
    return problems


def _kernel_of(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[str, Kernel]:
    if sizes.softcap is None and not sizes.sinks:
        return kernel_for(device, dtype)
    return kernel_for(device, dtype, softcap=sizes.softcap is not None, sinks=sizes.sinks)


# Two rows: what is compiled for one must serve the other. The second has more than one block of flex attention.
_TRIED = (([5, 3], [[4, 6], [2, 7]]), ([150, 3], [[40, 60], [20, 7]]))


def _fault(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> str | None:
    """Where the device's kernel is off, and by how much."""
    kernel = _kernel_of(sizes, device, dtype)[1]
    generator = torch.Generator().manual_seed(0)
    window = None if sizes.window is None else min(sizes.window, 4)
    wide, dim = (sizes.num_heads, sizes.num_kv_heads), sizes.head_dim
    several = kernel in (variants.flex_kernel, variants.sink_kernel)
    for trunks, branches in _TRIED if several else _TRIED[:1]:
        layout = build_layout(trunks, branches).to(device)
        rows = sum(layout.query_lengths)
        shapes: list[tuple[int, ...]] = [(rows, wide[0], dim), (rows, wide[1], dim), (rows, wide[1], sizes.value_dim)]
        shapes += [(wide[0],)] if sizes.sinks else []
        *leaves, upstream = (
            torch.randn(shape, generator=generator).to(device, dtype)
            for shape in [*shapes, (rows, wide[0], sizes.value_dim)]
        )
        fast = _outputs(kernel, _GatherKeys.apply, leaves, upstream, layout, window, sizes.softcap)
        exact = [leaf.float() for leaf in leaves]
        plain = _outputs(dense_kernel, _index, exact, upstream.float(), layout, window, sizes.softcap)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        for what, got, expected in zip(("output", "query", "key", "value", "sinks"), fast, plain, strict=False):
            error = ((got.float() - expected).norm() / expected.norm()).item()
            if not error <= tolerance:
                return f"relative error {error:.2e} in its {what} (at most {tolerance:.0e} expected)"
    return None


def _index(x: Tensor, layout: Layout) -> Tensor:
    return x[layout.key_index]


def _outputs(
    kernel: Kernel,
    gather: Callable[[Tensor, Layout], Tensor],
    leaves: list[Tensor],
    upstream: Tensor,
    layout: Layout,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    """[output, gradients of query, key, value and of sinks, if there are some] of a kernel behind a gather."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    query, key, value, *sinks = leaves
    options: dict[str, Any] = {}
    if softcap is not None or sinks:
        options = {"softcap": softcap, "sinks": sinks[0] if sinks else None}
    out = kernel(query, gather(key, layout), gather(value, layout), layout, query.shape[-1] ** -0.5, window, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
