"""The sizes of a decoder that its memory follows from, taken from the modules themselves.

A configuration's names mean different things in different families (the head dimension of multi-head latent attention
is that of its rotary part alone), while a product's inputs and outputs are what they are.
"""

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

from notus.model.fused import NORMS, is_known, keeps_factors
from notus.model.quantization import quantized_layers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ATTENTION = "attention"  # the source of the product that reads the attention's output
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "o")  # names of that product
_EACH_HEAD = {"q_norm": 0, "q_layernorm": 0, "k_norm": 1, "k_layernorm": 1, "groupnorm": 0}  # of queries or of keys
# Norms between the attention's output and the product that reads it, and norms behind a block's last product.
_BEFORE_OUTPUT = re.compile(r"groupnorm|attn_sub_norm")
_BEHIND_LAST = re.compile(r"post_(feedforward|mlp)_(layer)?norm|post_norm2")


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    Attributes:
        name: of the module, without its parents.
        inputs, outputs: sizes.
        source: what it reads; layers of the same source keep one input together.
        rank: of its adapter (0: none).
    """

    name: str
    inputs: int
    outputs: int
    source: str
    rank: int = 0

    @property
    def weights(self) -> int:
        """Of the base, without its bias."""
        return self.inputs * self.outputs


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm of a block: its width, all heads together, and the bytes per token that it keeps in either precision."""

    width: int
    bf16: float
    fp32: float


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """The sizes of a decoder, blocks alike.

    Attributes:
        layers: number of blocks.
        hidden: width of the residual stream.
        query_width, key_width, value_width: of what the attention is given, all heads together.
        attended: width of the attention's output.
        heads: query heads.
        vocabulary: rows of the head.
        linears: of a block, in the order of its forward pass.
        norms: of a block; the first is like the final one.
        block, block_trained: parameters of a block, adapters included, and those of them that are trained.
        root, root_trained: parameters outside the blocks (embedding, final norm, head; a tied one once).
        dropout: the adapters drop some of their input.
        attentions: how often a block attends with the same queries and keys (two times: differential attention).
        squares: the MLP's activation function is a square, whose gradient is taken in three steps.
        reads_last: something other than the residual's sum reads the block's last product, such as a norm.
        keeps_factors: a gated MLP keeps its two factors alone, and not what the activation function gave.
        quantized: those parameters of a block that are stored in 4 bits.
        quantized_bytes: what they take.
        dequantized: the most of them that one layer has, and dequantises to compute.
    """

    layers: int
    hidden: int
    query_width: int
    key_width: int
    value_width: int
    attended: int
    heads: int
    vocabulary: int
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    block: int
    block_trained: int
    root: int
    root_trained: int
    dropout: bool = False
    attentions: int = 1
    squares: bool = False
    reads_last: bool = False
    keeps_factors: bool = False
    quantized: int = 0
    quantized_bytes: int = 0
    dequantized: int = 0

    @property
    def inner(self) -> int:
        """Width of the MLP, whose last product is the block's last."""
        return self.linears[-1].inputs

    @property
    def factors(self) -> "tuple[Linear, ...]":
        """The MLP's products before the last: two of its width, or one of twice its width, if it is gated."""
        fitting = (self.inner, 2 * self.inner)
        before = [linear for linear in self.linears[-3:-1] if linear.source == self.linears[-2].source]
        return tuple(linear for linear in before if linear.outputs in fitting)

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two factors."""
        return sum(linear.outputs for linear in self.factors) == 2 * self.inner

    @property
    def parameters(self) -> int:
        """All of them, adapters included."""
        return self.layers * self.block + self.root

    @property
    def trained(self) -> int:
        """Those that the optimizer updates."""
        return self.layers * self.block_trained + self.root_trained

    def block_bytes(self, width: int) -> int:
        """Of a block's parameters, with `width` bytes for each that is not in 4 bits."""
        return width * (self.block - self.quantized) + self.quantized_bytes


def model_size(causal_lm: "PreTrainedModel", *, layers: int | None = None) -> ModelSize:
    """Of a transformers causal LM, on whatever device, with its adapters and before or after it is sharded.

    Args:
        causal_lm: the model.
        layers: how many blocks to count, if not those that it has: a model of one block stands for a deep one.
    """
    from torch import nn

    config, block = causal_lm.config, causal_lm.get_decoder().layers[0]
    modules = {name: module for name, module in block.named_modules() if not isinstance(module, nn.Identity)}
    linears = _linears(modules)
    widths = _attention_widths(modules, linears)
    counts, whole, stack = (_counts(each) for each in (block, causal_lm, causal_lm.get_decoder().layers))
    packed = quantized_layers(block).values()
    in_4_bits = [layer.in_features * layer.out_features for layer in packed]
    return ModelSize(
        layers=layers or config.num_hidden_layers,
        hidden=config.hidden_size,
        **widths,
        heads=config.num_attention_heads,
        vocabulary=causal_lm.get_output_embeddings().weight.shape[0],
        linears=tuple(linears.values()),
        norms=_norms(modules, widths, config.hidden_size),
        block=counts[0] + sum(in_4_bits) - sum(layer.weight.numel() for layer in packed),
        block_trained=counts[1],
        root=whole[0] - stack[0],
        root_trained=whole[1] - stack[1],
        dropout=any(getattr(modules[name], "dropout", 0.0) > 0 for name in linears),
        attentions=2 if any(hasattr(module, "lambda_q1") for module in modules.values()) else 1,
        squares=any("Squared" in type(module).__name__ for module in modules.values()),
        reads_last=any(_BEHIND_LAST.search(name) for name in modules),
        keeps_factors=any(keeps_factors(module) for module in modules.values()),
        quantized=sum(in_4_bits),
        quantized_bytes=sum(layer.weight.numel() * layer.weight.itemsize for layer in packed),
        dequantized=max(in_4_bits, default=0),
    )


def _linears(modules: "dict[str, nn.Module]") -> dict[str, Linear]:
    """Of a block, by the module's name, in the order of its forward pass."""
    from torch import nn

    found = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    outputs = {name for name in found if _reads_attention(name, modules)}
    normed = any(_BEFORE_OUTPUT.search(name) for name in modules)
    parents = [_parent(name) for name in found]
    # some families declare the attention's last product first
    order = sorted(found, key=lambda name: (parents.index(_parent(name)), name in outputs))
    return {
        name: Linear(
            name.rpartition(".")[2],
            found[name].in_features,
            found[name].out_features,
            ATTENTION if name in outputs and not normed else _source(name, found[name], name in outputs),
            getattr(found[name], "rank", 0),
        )
        for name in order
    }


def _parent(name: str) -> str:
    """The module that runs a linear layer; one that wraps the layer alone is passed over."""
    return name.removesuffix(".linear").rpartition(".")[0]


def _reads_attention(name: str, modules: "dict[str, nn.Module]") -> bool:
    """Whether a linear layer reads the attention's output."""
    inside = "attention" in type(modules[_parent(name)]).__name__.lower()
    return inside and name.removesuffix(".linear").rpartition(".")[2] in _OUTPUTS


def _source(name: str, linear: Any, last: bool) -> str:
    """What a layer reads: the input of its parent, with all others of this width, or a value of its own."""
    own = last or "_b_" in name.rpartition(".")[2]  # multi-head latent attention: behind its `_a_`
    return f"input of {name}" if own else f"{_parent(name)}, {linear.in_features}"


def _attention_widths(modules: "dict[str, nn.Module]", linears: dict[str, Linear]) -> dict[str, int]:
    """What the attention is given and gives, from the products before and after it."""
    by_name = {name.removesuffix(".linear").rpartition(".")[2]: linear for name, linear in linears.items()}
    after = next(linear for name, linear in linears.items() if _reads_attention(name, modules))
    attended, query = after.inputs, by_name.get("q_b_proj") or by_name.get("q_proj")
    if query is None:  # one product for queries, keys and values
        fused = next(iter(linears.values())).outputs
        widths = (attended, (fused - attended) // 2, (fused - attended) // 2)
    elif "kv_b_proj" in by_name:  # each head has keys of its own, a part of which comes from one rotary key
        widths = (query.outputs, query.outputs, attended)
    else:
        widths = (query.outputs, by_name["k_proj"].outputs, by_name["v_proj"].outputs)
    return dict(zip(("query_width", "key_width", "value_width"), widths, strict=True), attended=attended)


def _norms(modules: "dict[str, nn.Module]", widths: dict[str, int], hidden: int) -> tuple[Norm, ...]:
    """A block's norms, those of the residual stream first."""
    import torch

    both, found = (widths["query_width"], widths["key_width"]), []
    for name, module in modules.items():
        own = name.rpartition(".")[2]
        if "norm" not in own or any(module.children()):
            continue
        width = _width(module, hidden)
        whole = both[_EACH_HEAD[own]] if own in _EACH_HEAD else width
        one = min(width, whole)
        kept = [whole // one * _kept_per_token(module, one, dtype) for dtype in (torch.bfloat16, torch.float32)]
        found.append((width != hidden or own in _EACH_HEAD, Norm(whole, *kept)))
    return tuple(norm for _, norm in sorted(found, key=lambda each: each[0]))


def _width(norm: Any, hidden: int) -> int:
    """Elements that a norm treats together; one without weight need not say."""
    if getattr(norm, "weight", None) is not None:
        return int(norm.weight.numel())
    return math.prod(getattr(norm, "normalized_shape", (hidden,)))


def _kept_per_token(norm: "nn.Module", width: int, dtype: "torch.dtype") -> float:
    """Bytes that autograd keeps of a norm of one token, or head, of this width, in this dtype: found on "meta"."""
    import torch

    if is_known(norm, NORMS):  # its input and the scale, see `notus.model.fused`
        return width * dtype.itemsize + 4
    tokens, found = 64, {}

    def note(tensor: "Tensor") -> "Tensor":
        if tensor.shape[:1] == (tokens,):
            found[tensor.untyped_storage()._cdata] = tensor.numel() * tensor.element_size()
        return tensor

    weights = {
        name: torch.empty(each.shape, dtype=dtype, device="meta").requires_grad_(each.requires_grad)
        for name, each in norm.named_parameters()
    }
    given = torch.empty(tokens, width, dtype=dtype, device="meta").requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, note):
        out = torch.func.functional_call(norm, weights, (given,))
    assert out.shape == given.shape
    return sum(found.values()) / tokens


def _counts(module: "nn.Module") -> tuple[int, int]:
    """Parameters, all and trained; a tied one once."""
    found = list(module.parameters())
    return sum(each.numel() for each in found), sum(each.numel() for each in found if each.requires_grad)
