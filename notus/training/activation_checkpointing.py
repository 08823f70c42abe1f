"""Activation checkpointing as a dial: what a block keeps of its forward pass, and what its backward computes again.

none: keep all that the backward pass reads; compute nothing again.
products: keep the output of the attention and of every matrix product; compute elementwise work again.
selective: keep the output of the attention and of every second matrix product, from the first; compute the rest again.
full: keep the block's input; compute the block again, up to the last value that the backward pass reads.

Matrix products are counted in the order of the forward pass (of q, k, v, o, gate, up, down, selective keeps q, v and
gate). The last product of a block is neither kept nor computed again where nothing reads its value, as in blocks that
end by adding it to the residual. The two products of a LoRA adapter are computed again and not counted: that costs rank
/ width of the layer's own product, while their output would take as much memory. With LoRA, a product with a matrix of
at most its rank is taken for an adapter's.

A mixture of experts has two products for all experts together (grouped, or a product with a vector for each token's
copy), after its router's. Its order of tokens is found again, from the same numbers.

`torch.utils.checkpoint` recomputes; which values it finds kept is decided by two dispatch modes of our own. Torch's own
selective checkpointing keeps an output as it is in memory, so that an in-place operation on it (`clamp_` after a
projection, as OLMo has with `clip_qkv`) changes the kept value as well, without an error, and the recomputation applies
the operation twice. Here a kept value is copied before it is overwritten. Compiled blocks use torch's contexts: the
compiler makes every operation out-of-place first.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from notus.model.lora import lora_layers
from notus.model.quantization import quantized_layers

MODES = ("none", "products", "selective", "full")  # the faster ones first
PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})
# Of a mixture's experts, by name: not every build has all of them. The second argument holds the weights.
EXPERT_PRODUCTS = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
# By name, since not every build has all of them. All that compute attention with a backward pass of its own.
ATTENTION = frozenset(
    {
        "torch_attn::_varlen_attn",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "notus::packed_attention",
        "notus::plain_attention",
        "notus::sink_attention",
    }
)
# Operations whose backward pass reads none of their inputs: after its last product, a block may have these alone.
_LINEAR_IN_INPUTS = (
    "aten::add", "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::detach", "aten::t",
    "prim::device",  # no operation at all: fake tensors are asked for their device
)  # fmt: skip


def checkpointed(block: nn.Module, mode: str, *, compiled: bool = False) -> Callable[..., Any]:
    """Return the forward of `block` with its activations kept as `mode` says.

    Args:
        block: a decoder layer.
        mode: one of `MODES`.
        compiled: whether the returned function is given to `torch.compile`.
    """
    assert mode in MODES, mode
    if mode == "none":
        return block.forward
    layers = lora_layers(block).values()
    options: dict[str, Any] = {
        "use_reentrant": False,
        # Adapters alone draw random numbers; to keep a generator's state costs a copy, on a GPU a host sync.
        "preserve_rng_state": any(layer.dropout > 0 for layer in layers),
    }
    if mode != "full" or (quantized_layers(block) and not compiled):  # see `_Reuse`
        rank = max((layer.rank for layer in layers), default=0)
        # As digits, since the compiler would take a number for a symbol.
        options["context_fn"] = functools.partial(_compiled_contexts if compiled else _contexts, mode, str(rank))
    forward = block.forward if compiled else _InputKept(block.forward)
    return functools.partial(checkpoint, forward, **options)


class _InputKept:
    """A block's forward that never changes its inputs, which the recomputation starts from.

    The first call with gradients works on copies to see whether the block writes to them; later calls copy only if it
    does.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._writes: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._writes is False or not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        copies = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = [copy._version for copy in copies]
        out = self._forward(*args, **kwargs)
        self._writes = [copy._version for copy in copies] != before
        return out


# ---- which values are kept ----


def _what(op: Any, args: tuple[Any, ...], adapter_rank: str) -> str | None:
    """ "product" or "attention" for an operation whose output may be kept, else None."""
    if op is torch.ops.notus.quantized_linear.default:  # the product is within
        return "product"
    name = getattr(op, "name", str)().partition(".")[0]
    if op in PRODUCTS or name in EXPERT_PRODUCTS or (name == "aten::bmm" and args[1].shape[-1] == 1):
        factor = args[0] if name == "aten::bmm" else args[1] if name in EXPERT_PRODUCTS else args[-1]
        # a product with a matrix of at most this rank is an adapter's; 0: there are none
        return "product" if min(factor.shape[-2:]) > int(adapter_rank) else None
    return "attention" if name in ATTENTION else None


def _keeps(mode: str, what: str, number: int) -> bool:
    """Whether the product of this number, counted from 1, or an attention, is kept."""
    return mode != "full" and (what == "attention" or mode == "products" or number % 2 == 1)


class _Kept:
    """The values that a block's forward pass keeps, by their place among all that might be kept."""

    def __init__(self, mode: str, adapter_rank: str) -> None:
        self.mode, self.adapter_rank = mode, adapter_rank
        self.values: dict[int, Any] = {}
        self.unread: int | None = None  # the place of the block's last product, if no backward pass reads its value


class _Keep(TorchDispatchMode):
    """Keeps values during the forward pass."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept
        self._place = self._products = 0
        self._unread: int | None = None  # the place of the newest product, while no backward pass needs its value

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op._schema.is_mutable:
            self._copy_overwritten(op, args, kwargs)
        out = op(*args, **kwargs)
        what = _what(op, args, self._kept.adapter_rank)
        if what is None:
            if self._unread is not None and not _passes_on(op, args):
                self._unread = None
            return out
        self._products += what == "product"
        if _keeps(self._kept.mode, what, self._products):
            self._kept.values[self._place] = tree_map_only(Tensor, Tensor.detach, out)
        self._unread = self._place if what == "product" else None
        self._place += 1
        return out

    def _copy_overwritten(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the kept values that `op` is about to overwrite; of an unread product, let go of the value instead."""
        storages = {tensor.untyped_storage()._cdata for tensor in _written(op, args, kwargs)}
        for place, value in list(self._kept.values.items()):
            if not any(
                isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in storages for leaf in tree_leaves(value)
            ):
                continue
            if place == self._unread and _passes_on(op, args):
                del self._kept.values[place]
            else:
                self._kept.values[place] = tree_map_only(Tensor, Tensor.clone, value)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._kept.unread = self._unread
        if self._unread is not None:
            self._kept.values.pop(self._unread, None)


class _Reuse(TorchDispatchMode):
    """Hands out the kept values during the recomputation, each once; computes what was not kept.

    The recomputation ends as soon as autograd has all that it keeps. A plain product hands over what it keeps before it
    computes, one with weights in 4 bits afterwards, as every operator that is written in Python: if nobody reads the
    last one's value, it is not computed.
    """

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept
        self._place = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if _what(op, args, self._kept.adapter_rank) is None:
            return op(*args, **(kwargs or {}))
        place, self._place = self._place, self._place + 1
        if place == self._kept.unread and op is torch.ops.notus.quantized_linear.default:
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[0])
        return self._kept.values.pop(place) if place in self._kept.values else op(*args, **(kwargs or {}))


def _contexts(mode: str, adapter_rank: str) -> tuple[_Keep, _Reuse]:
    """The contexts of one block's forward pass and of its recomputation."""
    kept = _Kept(mode, adapter_rank)
    return _Keep(kept), _Reuse(kept)


def _passes_on(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether the backward pass of `op` needs no value of its inputs."""
    name = op.name().partition(".")[0].rstrip("_")
    if name == "aten::mul":  # with a number
        return not isinstance(args[1], Tensor) or args[1].dim() == 0
    return name in _LINEAR_IN_INPUTS


@functools.lru_cache(maxsize=1024)
def _written_places(op: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(op._schema.arguments)
    return tuple((place, each.name) for place, each in arguments if each.alias_info and each.alias_info.is_write)


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that `op` writes to."""
    found = [args[place] if place < len(args) else kwargs.get(name) for place, name in _written_places(op)]
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _compiled_contexts(mode: str, adapter_rank: str) -> Any:
    """The same choice for blocks that are compiled, for which torch's own contexts mark the graph."""
    counts: collections.Counter[bool] = collections.Counter()

    def policy(context: Any, op: Any, *args: Any, **_: Any) -> CheckpointPolicy:
        what = _what(op, args, adapter_rank)
        if what == "product":
            counts[context.is_recompute] += 1  # torch 2.11 asks again in the recomputation
        keep = what is not None and _keeps(mode, what, counts[context.is_recompute])
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
