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
from notus.model.structure import blocks_of, text_config

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
        copies: how often it runs for each token: a mixture's product runs once for each expert that a token is sent to.
        experts: how many experts there are (0: it is no mixture's product).
    """

    name: str
    inputs: int
    outputs: int
    source: str
    rank: int = 0
    copies: int = 1
    experts: int = 0

    @property
    def weights(self) -> int:
        """Those that a token meets, of the base, without its bias."""
        return self.copies * self.inputs * self.outputs

    @property
    def reads(self) -> int:
        """Numbers per token that it reads, all copies together."""
        return self.copies * self.inputs

    @property
    def gives(self) -> int:
        """Numbers per token that it gives, all copies together."""
        return self.copies * self.outputs


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm of a block: its width, all heads together, and the bytes per token that it keeps in either precision."""

    width: int
    bf16: float
    fp32: float


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """The sizes of a decoder. Where blocks differ, those of the block with the most parameters stand for each.

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
        stack, stack_trained: parameters of all blocks, and those that are trained; None: all are like `block`.
        stacked: parameters of all blocks that are experts stacked in one tensor, of which a rank holds whole experts.
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
    stack: int | None = None
    stack_trained: int | None = None
    stacked: int = 0

    @property
    def _last(self) -> int | None:
        """The place of the MLP's last product; None: the block's MLP is a mixture alone."""
        fitting = [
            place
            for place, linear in enumerate(self.linears)
            if linear.outputs == self.hidden and not linear.experts and linear.source != ATTENTION
        ]
        return fitting[-1] if fitting else None

    @property
    def inner(self) -> int:
        """Width of the MLP that every token runs through, whose last product is the block's last; 0: there is none."""
        return 0 if self._last is None else self.linears[self._last].inputs

    @property
    def factors(self) -> "tuple[Linear, ...]":
        """The MLP's products before the last: two of its width, or one of twice its width, if it is gated."""
        if self._last is None or self._last == 0:
            return ()
        fitting, place = (self.inner, 2 * self.inner), self._last
        before = [
            each for each in self.linears[max(0, place - 2) : place] if each.source == self.linears[place - 1].source
        ]
        return tuple(linear for linear in before if linear.outputs in fitting)

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two factors."""
        return bool(self.inner) and sum(linear.outputs for linear in self.factors) == 2 * self.inner

    @property
    def experts(self) -> "tuple[Linear, ...]":
        """The products of a mixture of experts: the one before the activation function, and the last."""
        return tuple(linear for linear in self.linears if linear.experts)

    def unevenly(self, ranks: int) -> int:
        """Parameters that a rank holds beyond its even share of the experts, if their number does not divide."""
        if not self.experts or not self.stacked:
            return 0
        count = self.experts[0].experts
        return self.stacked * math.ceil(count / ranks) // count - self.stacked // ranks

    @property
    def parameters(self) -> int:
        """All of them, adapters included."""
        return (self.layers * self.block if self.stack is None else self.stack) + self.root

    @property
    def trained(self) -> int:
        """Those that the optimizer updates."""
        stack = self.layers * self.block_trained if self.stack_trained is None else self.stack_trained
        return stack + self.root_trained

    def block_bytes(self, width: int) -> int:
        """Of a block's parameters, with `width` bytes for each that is not in 4 bits."""
        return width * (self.block - self.quantized) + self.quantized_bytes


class UnknownSizeError(ValueError):
    """A model has blocks whose activations are not known; the message says which."""


def model_size(causal_lm: "PreTrainedModel", *, layers: int | None = None) -> ModelSize:
    """Of a transformers causal LM, on whatever device, with its adapters and before or after it is sharded.

    Args:
        causal_lm: the model.
        layers: how many blocks to count, if not those that it has: a model of one block stands for a deep one.

    Raises:
        UnknownSizeError: a block does something else than attend and run an MLP or experts.
    """
    try:
        return _model_size(causal_lm, layers)
    except (StopIteration, KeyError, AttributeError, IndexError, AssertionError, ZeroDivisionError) as error:
        raise UnknownSizeError(f"{type(causal_lm).__name__} has blocks of a kind that is not known") from error


def _model_size(causal_lm: "PreTrainedModel", layers: int | None) -> ModelSize:
    from torch import nn

    config, blocks = text_config(causal_lm.config), blocks_of(causal_lm)
    _check_blocks(causal_lm, blocks)
    block = max(blocks, key=lambda each: _counts(each)[0])
    modules = {name: module for name, module in block.named_modules() if not isinstance(module, nn.Identity)}
    linears = _linears(modules)
    widths = _attention_widths(modules, linears)
    counts, whole, stack = (_counts(each) for each in (block, causal_lm, blocks))
    packed = quantized_layers(block).values()
    in_4_bits = [layer.in_features * layer.out_features for layer in packed]
    unpacked = sum(
        layer.in_features * layer.out_features - layer.weight.numel() for layer in quantized_layers(blocks).values()
    )
    return ModelSize(
        layers=layers or len(blocks),
        hidden=config.hidden_size,
        **widths,
        heads=config.num_attention_heads,
        vocabulary=causal_lm.get_output_embeddings().weight.shape[0],
        linears=_with_experts(tuple(linears.values()), block, config),
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
        stack=None if layers else stack[0] + unpacked,
        stack_trained=None if layers else stack[1],
        stacked=sum(each.numel() for each in blocks.parameters() if each.dim() == 3),
    )


def _check_blocks(causal_lm: "PreTrainedModel", blocks: "nn.ModuleList") -> None:
    """Raise UnknownSizeError for a block without attention, or with a convolution or a recurrence."""
    from torch import nn

    for block in blocks:
        kinds = {type(module).__name__ for module in block.modules()}
        strange = sorted(kind for kind in kinds if _RECURRENT.search(kind))
        strange += sorted(type(module).__name__ for module in block.modules() if isinstance(module, nn.Conv1d))
        if strange or not attention_widths(block):
            raise UnknownSizeError(
                f"{type(causal_lm).__name__} has blocks with {strange[0] if strange else 'no attention'}, whose "
                "activations are not known"
            )


def _with_experts(linears: tuple[Linear, ...], block: "nn.Module", config: Any) -> tuple[Linear, ...]:
    """Put a mixture's router and products behind the attention's."""
    found = [(name, module, count) for name, module in block.named_modules() if (count := expert_count(name, module))]
    if not found:
        return linears
    ((name, module, count),) = found[:1]
    copies, hidden = _top_k(name, block, config), config.hidden_size
    if copies is None:
        raise UnknownSizeError(f"{name}: how many experts a token is sent to is not known")
    stacked = [each for _, each in module.named_parameters() if each.dim() == 3 and each.shape[0] == count]
    # [experts, out, in] or its transpose: of either, one is the width of the hidden states
    sizes = [each.shape[1] if each.shape[2] == hidden else each.shape[2] for each in stacked]
    inner = sizes[-1]
    given = sum(sizes[:-1])
    products = (
        Linear("router", hidden, count, f"input of {name}"),
        Linear("experts.gate_up_proj", hidden, given, f"{name}, selected", copies=copies, experts=count),
        Linear("experts.down_proj", inner, hidden, f"{name}, {inner}", copies=copies, experts=count),
    )
    place = next(number for number, linear in enumerate(linears) if linear.source == ATTENTION) + 1
    router = products[1:] if any(linear.outputs == count for linear in linears[place:]) else products
    return (*linears[:place], *router, *linears[place:])


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


# Names of how many experts a token is sent to.
_TOP_K = (
    "top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "experts_per_token",
    "num_selected_experts", "expert_used_count", "top_k_experts",
)  # fmt: skip
# Attention without a softmax over all tokens before: a recurrence.
_RECURRENT = re.compile(r"linear_?att|lightning|delta|recurrent|retention|rwkv|mamba", re.IGNORECASE)


def is_matrix(name: str, parameter: "nn.Parameter") -> bool:
    """Whether tokens are multiplied with a parameter: not with biases, adapters, or a recurrence's decay."""
    if parameter.dim() < 2 or name.startswith("lora_"):
        return False
    return not (name.endswith("bias") or name == "A_log")


def active_shares(decoder: "nn.Module", config: Any) -> dict[str, float]:
    """Return the share of the tokens that each expert's weights see, by the parameter's name.

    Args:
        decoder: a text decoder.
        config: its configuration.
    """
    found: dict[str, float] = {}
    for name, module in decoder.named_modules(remove_duplicate=False):
        count = expert_count(name, module)
        if count:
            taken = _top_k(name, decoder, config)
            share = 1.0 if taken is None else taken / count  # what a step costs is no reason to end a run
            found |= {f"{name}.{inner}": share for inner, _ in module.named_parameters(remove_duplicate=False)}
    return found


def expert_count(name: str, module: "nn.Module") -> int:
    """How many experts a module holds, stacked in its own parameters or as a list of modules; 0: it holds none."""
    from torch import nn

    if isinstance(module, nn.ModuleList):
        return len(module) if name.rpartition(".")[2] == "experts" and len(module) > 1 else 0
    own = [parameter for _, parameter in module.named_parameters(recurse=False)]
    count = getattr(module, "num_experts", None) or (own[0].shape[0] if own else 0)
    if isinstance(module, nn.Conv1d) or _RECURRENT.search(type(module).__name__):
        return 0
    if any(each.dim() == 3 and each.shape[0] == count > 1 for each in own):
        return int(count)
    if own and own[0].dim() == 2 and "expert" in type(module).__name__.lower():  # stacked in the first dimension
        return int(getattr(module, "moe_num_experts", 0))
    return 0


def _top_k(name: str, decoder: "nn.Module", config: Any) -> int | None:
    """How many experts of the module `name` a token is sent to: by the modules around it, else by the config.

    None: neither says so.
    """
    parent, _, _ = name.rpartition(".")
    places: list[Any] = [*decoder.get_submodule(parent).modules(), config] if parent else [config]
    places += filter(None, [getattr(config, "ffn_config", None)])  # DBRX has its experts' settings in there
    for place in places:
        for key in _TOP_K:
            value = getattr(place, key, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def attention_widths(decoder: "nn.Module") -> list[int]:
    """Return, for each module in which every token attends to all before it, the width of its queries, heads together.

    Queries are as wide as values but in multi-head latent attention, of which it is the mean of both. One that attends
    twice (differential attention) counts double.
    """
    found = (_attention_width(module) for module in decoder.modules())
    return [width for width in found if width]


def _attention_width(module: "nn.Module") -> int:
    kind, children = type(module).__name__, dict(module.named_children())
    if not re.search(r"attention|attn|MLA$", kind, re.IGNORECASE) or _RECURRENT.search(kind):
        return 0
    weights = [getattr(children.get(name), "weight", None) for name in _OUTPUTS]
    output = next((weight for weight in weights if weight is not None and weight.dim() == 2), None)
    if output is None:  # a wrapper around an attention, or one whose products are experts
        inside = any(_attention_width(child) for child in module.children())
        return 0 if inside else int(getattr(module, "num_heads", 0) * getattr(module, "head_dim", 0))
    inputs = output.shape[0 if any(type(child).__name__ == "Conv1D" for child in children.values()) else 1]
    latent = getattr(module, "qk_head_dim", None)
    query = latent * module.num_heads if latent and hasattr(module, "kv_lora_rank") else inputs
    return int((2 if hasattr(module, "lambda_q1") else 1) * (query + inputs) // 2)


def _counts(module: "nn.Module") -> tuple[int, int]:
    """Parameters, all and trained; a tied one once."""
    found = list(module.parameters())
    return sum(each.numel() for each in found), sum(each.numel() for each in found if each.requires_grad)
