"""The floating-point operations that a packed, prefix-shared step cannot do without; a multiply and an add are two.

For an example of trunk T and branches B_k, of whose tokens S are scored:

    forward = 2 * body * (T + sum B_k)  +  2 * head * S  +  4 * layers * width * A
    A       = T (T + 1) / 2  +  sum over k of (B_k T + B_k (B_k + 1) / 2)

where `body` and `head` are the weights of the linear layers and A counts the query-key pairs that the causal mask lets
through. A backward pass is twice a forward pass where every weight is trained. A shared trunk counts once, padding and
recomputation not at all: the definition of necessary arithmetic, of which "model FLOPs utilisation" is the share.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from notus.model.size import model_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """What the arithmetic of a decoder follows from.

    Attributes:
        layers: number of blocks.
        attention_width: query heads times their dimension; where queries and values differ in it, the mean.
        body_weights: weights of all linear layers but the head.
        head_weights: weights of the output head.
    """

    layers: int
    attention_width: int
    body_weights: int
    head_weights: int


def dimensions(causal_lm: "PreTrainedModel") -> Dimensions:
    """Of a transformers causal LM, which may be on the meta device, before it is sharded."""
    from torch import nn

    head, size = causal_lm.get_output_embeddings(), model_size(causal_lm)
    linears = (module for module in causal_lm.modules() if isinstance(module, nn.Linear) and module is not head)
    return Dimensions(
        layers=size.layers,
        attention_width=size.attentions * (size.query_width + size.attended) // 2,
        body_weights=sum(linear.weight.numel() for linear in linears),
        head_weights=head.weight.numel(),
    )


def visible_pairs(trunks: np.ndarray, branches: np.ndarray) -> np.ndarray:
    """Query-key pairs that the causal mask lets through, for each example.

    Args:
        trunks: [n] tokens of each trunk.
        branches: [n, K] tokens of each branch.

    Returns:
        int64 [n].
    """
    trunks, branches = np.asarray(trunks, dtype=np.int64), np.asarray(branches, dtype=np.int64)
    return trunks * (trunks + 1) // 2 + (branches * trunks[:, None] + branches * (branches + 1) // 2).sum(axis=1)


def forward_flops(size: Dimensions, trunks: np.ndarray, branches: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Necessary operations of one forward pass, for each example.

    Args:
        size: of the model.
        trunks: [n] tokens of each trunk.
        branches: [n, K] tokens of each branch.
        scored: [n] completion tokens whose log-prob is taken, all branches together.

    Returns:
        int64 [n].
    """
    tokens = np.asarray(trunks, dtype=np.int64) + np.asarray(branches, dtype=np.int64).sum(axis=1)
    linear = 2 * size.body_weights * tokens + 2 * size.head_weights * np.asarray(scored, dtype=np.int64)
    return linear + 4 * size.layers * size.attention_width * visible_pairs(trunks, branches)


def training_flops(
    size: Dimensions,
    trunks: np.ndarray,
    branches: np.ndarray,
    scored: np.ndarray,
    *,
    adapter_weights: int | None = None,
) -> np.ndarray:
    """Necessary operations of a forward and a backward pass, for each example; arguments as `forward_flops` has them.

    Args:
        adapter_weights: how many weights are trained beside frozen ones, which need no gradient of their own; None:
            every weight is trained.

    Returns:
        int64 [n].
    """
    forward = forward_flops(size, trunks, branches, scored)
    if adapter_weights is None:
        return 3 * forward
    linear = forward_flops(dataclasses.replace(size, layers=0), trunks, branches, scored)
    tokens = np.asarray(trunks, dtype=np.int64) + np.asarray(branches, dtype=np.int64).sum(axis=1)
    return 3 * forward - linear + 6 * adapter_weights * tokens
