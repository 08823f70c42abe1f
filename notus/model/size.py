"""The sizes of a decoder that its memory follows from, taken from the model itself."""

import dataclasses
from typing import TYPE_CHECKING

from notus.model.fused import NORMS, is_known

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer of a block: its name, sizes, and the rank of its adapter (0: none)."""

    name: str
    inputs: int
    outputs: int
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """The sizes of a decoder, blocks alike.

    Attributes:
        layers: number of blocks.
        hidden: width of the residual stream.
        query_width, key_width: attention heads times their dimension, of queries and of keys.
        heads: query heads.
        vocabulary: rows of the head.
        linears: of a block, in the order of its forward pass.
        norms: widths of a block's norms.
        fused: they keep their input alone, see `notus.model.fused`.
        block, block_trained: parameters of a block, adapters included, and those of them that are trained.
        root, root_trained: parameters outside the blocks (embedding, final norm, head; a tied one once).
        dropout: the adapters drop some of their input.
    """

    layers: int
    hidden: int
    query_width: int
    key_width: int
    heads: int
    vocabulary: int
    linears: tuple[Linear, ...]
    norms: tuple[int, ...]
    block: int
    block_trained: int
    root: int
    root_trained: int
    dropout: bool = False
    fused: bool = True

    @property
    def inner(self) -> int:
        """Width of the MLP, whose last product is the block's last."""
        return self.linears[-1].inputs

    @property
    def factors(self) -> int:
        """Outputs of the products before the last: twice the MLP's width if it is gated, in one product or two."""
        fitting = (self.inner, 2 * self.inner)
        before = [linear for linear in self.linears[-3:-1] if linear.name != "o_proj"]
        return sum(linear.outputs for linear in before if linear.outputs in fitting)

    @property
    def parameters(self) -> int:
        """All of them, adapters included."""
        return self.layers * self.block + self.root

    @property
    def trained(self) -> int:
        """Those that the optimizer updates."""
        return self.layers * self.block_trained + self.root_trained


def model_size(causal_lm: "PreTrainedModel", *, layers: int | None = None) -> ModelSize:
    """Of a transformers causal LM, on whatever device, with its adapters and before it is sharded.

    Args:
        causal_lm: the model.
        layers: how many blocks to count, if not those that it has: a model of one block stands for a deep one.
    """
    config, block = causal_lm.config, causal_lm.get_decoder().layers[0]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    counts = _counts(block)
    whole, stack = _counts(causal_lm), _counts(causal_lm.get_decoder().layers)
    modules = dict(block.named_modules())
    linears = {name: modules[name] for name in _in_forward_order(modules)}
    norms = {name: module for name, module in modules.items() if "norm" in name}
    return ModelSize(
        layers=layers or config.num_hidden_layers,
        hidden=config.hidden_size,
        query_width=heads * head_dim,
        key_width=groups * head_dim,
        heads=heads,
        vocabulary=causal_lm.get_output_embeddings().weight.shape[0],
        linears=tuple(
            Linear(name.rpartition(".")[2], module.in_features, module.out_features, getattr(module, "rank", 0))
            for name, module in linears.items()
        ),
        norms=tuple(
            {"q_norm": heads, "k_norm": groups}.get(name.rpartition(".")[2], 1) * head_dim
            if module.weight.numel() == head_dim  # each head by itself
            else module.weight.numel()
            for name, module in norms.items()
        ),
        block=counts[0],
        block_trained=counts[1],
        root=whole[0] - stack[0],
        root_trained=whole[1] - stack[1],
        dropout=any(getattr(module, "dropout", 0.0) > 0 for module in linears.values()),
        fused=all(is_known(module, NORMS) for module in norms.values()),
    )


def _in_forward_order(modules: "dict[str, nn.Module]") -> list[str]:
    """Names of a block's linear layers; some families declare the attention's last product first."""
    from torch import nn

    names = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    parents = [name.rpartition(".")[0] for name in names]
    return sorted(names, key=lambda name: (parents.index(name.rpartition(".")[0]), name.endswith("o_proj")))


def _counts(module: "nn.Module") -> tuple[int, int]:
    """Parameters, all and trained; a tied one once."""
    found = list(module.parameters())
    return sum(each.numel() for each in found), sum(each.numel() for each in found if each.requires_grad)
