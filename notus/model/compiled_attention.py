"""Packed attention for compiled blocks, which must not compile again for a row of other segments.

A row's segments are Python lists, as are the trunks' copies by their number: the compiler would unroll over them and
guard on them. So it gets one of two things:

- On CUDA in bf16, the operators themselves: the gather of the keys (`notus::gather_keys`) and torch's varlen attention,
  which take the segments as tensors and have registered backward passes. The longest segment is a symbol.
- Elsewhere, one operator around everything, `notus::packed_attention`. An operator cannot hand its autograd graph on,
  so its backward pass computes the attention's forward once more, in every mode of checkpointing.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface

from notus.data.packing import Layout, build_layout
from notus.model import attention
from notus.model.attention import add_copies, check_call, handed_layout, packed_attention
from notus.model.attention_variants import FLASH_HEAD_DIM
from notus.model.kernels import Gather, relative_error
from notus.runtime import switches
from notus.runtime.process import first_line

HIDDEN, GRAPH = "notus_packed_hidden", "notus_packed_graph"
# What dispatch looks for outside any operator; within one it leaves autograd out.
_NOBODY = torch.nn.Module()  # an operator knows no calling module
_ABOVE_AUTOGRAD = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


@torch.library.custom_op("notus::packed_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: list[Tensor],
    lengths: list[Tensor],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return _packed(query, key, value, index, lengths, scale, window, softcap, sinks)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("notus::packed_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: list[Tensor],
    lengths: list[Tensor],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> list[Tensor]:
    """The gradients of query, key and value, and of the sinks if there are some."""
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value, sinks) if tensor is not None]
    with torch._C._ForceDispatchKeyGuard(*_ABOVE_AUTOGRAD), torch.enable_grad():
        given = inputs[3] if len(inputs) > 3 else None
        out = _packed(inputs[0], inputs[1], inputs[2], index, lengths, scale, window, softcap, given)
        found = torch.autograd.grad(out, inputs, grad)
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in found]


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    new = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    return [new(each) for each in (query, key, value, rest[-1]) if each is not None]


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: list[Tensor],
    lengths: list[Tensor],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    key_index, first_copy, copies, query_starts, key_starts = index
    of_segments, copy_starts = lengths
    query_lengths, key_lengths = of_segments.view(2, -1).tolist()
    layout = Layout(
        key_index, first_copy, copies, copy_starts.diff().tolist(), copy_starts, query_starts, key_starts,
        query_lengths, key_lengths, of_segments, max(query_lengths), max(key_lengths),
    )  # fmt: skip
    options: dict[str, Any] = {"scaling": scale, "sliding_window": window, "softcap": softcap, "s_aux": sinks}
    out, _ = packed_attention(_NOBODY, query, key, value, None, layout=layout, **options)
    return out.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, index, lengths, ctx.scale, ctx.window, ctx.softcap, sinks = inputs
    ctx.save_for_backward(query, key, value, sinks, *lengths, *index)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value, sinks, of_segments, copy_starts, *index = ctx.saved_tensors
    rest = (index, [of_segments, copy_starts], ctx.scale, ctx.window, ctx.softcap, sinks)
    of_query, of_key, of_value, *of_sinks = _attention_backward(grad, query, key, value, *rest)
    none = ([None] * len(index), [None, None], None, None, None)
    return of_query, of_key, of_value, *none, of_sinks[0] if of_sinks else None


_attention.register_autograd(_differentiate, setup_context=_keep)


# ---- the gather of the keys, as an operator ----


@torch.library.custom_op("notus::gather_keys", mutates_args=())
def _gather(x: Tensor, key_index: Tensor, first_copy: Tensor, copies: Tensor, copy_starts: Tensor) -> Tensor:
    return x.index_select(0, key_index)


@_gather.register_fake
def _(x: Tensor, key_index: Tensor, *_: object) -> Tensor:
    return x.new_empty(key_index.shape[0], *x.shape[1:])


@torch.library.custom_op("notus::gather_keys_backward", mutates_args=())
def _gather_backward(grad: Tensor, first_copy: Tensor, copies: Tensor, copy_starts: Tensor) -> Tensor:
    lengths = copy_starts.diff().tolist()
    return add_copies(grad, first_copy, zip(copies[0].split(lengths), copies[1].split(lengths), strict=True))


@_gather_backward.register_fake
def _(grad: Tensor, first_copy: Tensor, *_: object) -> Tensor:
    return grad.new_empty(first_copy.shape[0], *grad.shape[1:])


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, first_copy, copies, copy_starts = inputs
    ctx.save_for_backward(first_copy, copies, copy_starts)


def _scatter(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _gather_backward(grad, *ctx.saved_tensors), None, None, None, None


_gather.register_autograd(_scatter, setup_context=_keep_places)


# ---- what the blocks call ----


def hidden_attention(
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
    **options: Any,  # what a model hands on, checked one by one
) -> tuple[Tensor, None]:
    """Attention function for transformers' `AttentionInterface`: `packed_attention` behind one operator."""
    layout = handed_layout() if layout is None else layout
    check_call(module, layout, attention_mask, options)
    assert layout is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    index = [layout.key_index, layout.first_copy, layout.copies, layout.query_starts, layout.key_starts]
    lengths = [layout.lengths, layout.copy_starts]
    return _attention(query, key, value, index, lengths, scale, sliding_window, softcap, s_aux), None


def graph_attention(
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
    **options: Any,  # what a model hands on, checked one by one
) -> tuple[Tensor, None]:
    """The same with the operators in the graph: the gather, and torch's varlen attention.

    Heads that it does not take, soft caps and sinks go the way of `hidden_attention`.
    """
    if softcap is not None or s_aux is not None or query.shape[-1] > FLASH_HEAD_DIM:
        return hidden_attention(
            module, query, key, value, attention_mask,
            scaling=scaling, layout=layout, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux, **options,
        )  # fmt: skip
    layout = handed_layout() if layout is None else layout
    check_call(module, layout, attention_mask, options)
    assert layout is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    index = (layout.key_index, layout.first_copy, layout.copies, layout.copy_starts)
    rows = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    keys, values = (_gather(row, *index) for row in rows[1:])
    return attention.varlen_kernel(rows[0], keys, values, layout, scale, sliding_window).unsqueeze(0), None


AttentionInterface.register(HIDDEN, hidden_attention)
AttentionInterface.register(GRAPH, graph_attention)

_failure: str | None = None  # why the compiler does not get to see the kernel


def compiled_implementation(device: torch.device, dtype: torch.dtype) -> str:
    """Return which of the two, as the name of an attention implementation, compiled blocks use on a device."""
    flash = attention.kernel_for(device, dtype)[0] == "varlen"
    return GRAPH if flash and _failure is None and switches.enabled("graph_attention") else HIDDEN


def check_graph_attention(
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
    gather: Gather,
) -> list[str]:
    """Compile attention, forward and backward, on a small row and compare it with the dense reference; on CUDA alone.

    If that fails on any rank, compiled blocks get the operator that hides the kernel. Collective on CUDA.

    Returns:
        What is wrong, one line or none.
    """
    global _failure
    hidden = softcap is not None or sinks or head_dim > FLASH_HEAD_DIM  # see `graph_attention`
    if hidden or compiled_implementation(device, dtype) == HIDDEN:
        return []
    layout = build_layout([50, 30], [[40, 60], [20, 70]]).to(device)
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, value_dim or head_dim))
    shapes = [(1, heads, sum(layout.query_lengths), dim) for heads, dim in sizes]
    leaves = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
    if isinstance(leaves[0], FakeTensor):
        return []
    compiled = torch.compile(graph_attention, dynamic=True)
    found: str | None = None
    try:
        error = relative_error(_outputs(compiled, leaves, layout, window), _dense(leaves, layout, window))
        found = None if error <= 3e-2 else f"its relative error is {error:.1e}, more than 3e-02"
    except Exception as problem:  # compilers raise errors of every kind
        found = f"it cannot be compiled here ({first_line(problem)})"
    failures = [each["attention"] for each in gather({"attention": found} if found else {}) if each]
    _failure = failures[0] if failures else None
    return [f"compiled blocks do not see the attention kernel: {_failure}"] if _failure else []


def _outputs(attend: Any, leaves: list[Tensor], layout: Layout, window: int | None, **options: Any) -> tuple[Any, ...]:
    """(output, gradients of query, key and value)."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    scale = leaves[0].shape[-1] ** -0.5
    out, _ = attend(_NOBODY, *leaves, None, scaling=scale, layout=layout, sliding_window=window, **options)
    upstream = torch.linspace(-1, 1, out.shape[-1], device=out.device, dtype=out.dtype).expand_as(out)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def _dense(leaves: list[Tensor], layout: Layout, window: int | None) -> tuple[Any, ...]:
    exact = [leaf.float() for leaf in leaves]
    return _outputs(packed_attention, exact, layout, window, kernel=attention.dense_kernel)
