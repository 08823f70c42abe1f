"""The floating-point operations that a packed, prefix-shared step cannot do without; a multiply and an add are two.

For an example of trunk T and branches B_k, of whose tokens S are scored:

    forward = 2 * body * (T + sum B_k)  +  2 * head * S  +  4 * layers * width * A
    A       = T (T + 1) / 2  +  sum over k of (B_k T + B_k (B_k + 1) / 2)

where `body` and `head` are the weights of the linear layers and A counts the query-key pairs that the causal mask lets
through. A backward pass is twice a forward pass where every weight is trained. A shared trunk counts once, padding and
recomputation not at all: the definition of necessary arithmetic, of which "model FLOPs utilisation" is the share.
"""

import dataclasses
import difflib
import itertools
import re
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from notus.model.quantization import QuantizedLinear
from notus.model.size import active_shares, attention_widths, is_matrix
from notus.model.structure import decoder_of, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """What the arithmetic of a decoder follows from.

    Attributes:
        layers: number of attentions, of each token to all before it.
        attention_width: query heads times their dimension, the mean over them; where queries and values differ
            in it, the mean of both.
        body_weights: what a token is multiplied with besides the head: of a mixture of experts, the share of the
            experts' weights that is active.
        head_weights: weights of the output head.
    """

    layers: int
    attention_width: int
    body_weights: int
    head_weights: int


def dimensions(causal_lm: "PreTrainedModel") -> Dimensions:
    """Of any transformers causal LM, sharded or not, on whatever device; of a multimodal one, its text part.

    Every parameter with two dimensions or more is a matrix that tokens are multiplied with, but for embeddings: those
    of linear layers and convolutions, routers, and experts, which are one parameter of three dimensions. One that
    several blocks share counts for each. What state-space models and linear attention compute in their recurrence,
    which is small beside the projections, is left out.
    """
    decoder, head = decoder_of(causal_lm), causal_lm.get_output_embeddings()
    shares, weights = active_shares(decoder, text_config(causal_lm.config)), 0.0
    for prefix, module in decoder.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding) or module is head:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if is_matrix(name, parameter):
                in_4_bits = name == "weight" and isinstance(module, QuantizedLinear)
                count = module.in_features * module.out_features if in_4_bits else parameter.numel()
                weights += count * shares.get(f"{prefix}.{name}", 1.0)
    widths = attention_widths(decoder)
    return Dimensions(
        layers=len(widths),
        attention_width=round(sum(widths) / len(widths)) if widths else 0,
        body_weights=round(weights),
        head_weights=0 if head is None else head.weight.numel(),
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


# Of what a data sheet promises of a link, the share that a large collective is taken to reach: an assumption.
LINK_EFFICIENCY = 0.75
PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class GPU:
    """What is to be known of a GPU.

    Attributes:
        memory: MiB that the driver reports.
        teraflops: dense bf16 matrix products, 10^12 operations per second.
        teraflops_fp32: the same in fp32, not by way of tf32, which torch does not use by default.
        link: GB/s between the GPUs of a node, one direction (NVLink, else PCIe).
        network: GB/s per GPU between nodes; clouds differ: an assumption.
        bandwidth: GB/s of its memory, by the data sheet.
    """

    memory: int
    teraflops: float
    teraflops_fp32: float
    link: float
    network: float
    bandwidth: float

    @property
    def capacity(self) -> int:
        """Bytes."""
        return self.memory * 2**20

    def rate(self, precision: str) -> float:
        """10^12 operations per second in "bf16" or "fp32"."""
        return self.teraflops if precision == "bf16" else self.teraflops_fp32


GPUS = {
    "a100-40gb": GPU(40536, 312, 19.5, 300, 25, 1555),
    "a100-80gb": GPU(81920, 312, 19.5, 300, 25, 2039),
    "a800": GPU(81920, 312, 19.5, 200, 25, 2039),
    "h100": GPU(81559, 989, 67, 450, 50, 3350),
    "h100-pcie": GPU(81559, 756, 51, 32, 25, 2000),
    "h100-nvl": GPU(95830, 835, 60, 300, 25, 3900),
    "h200": GPU(143771, 989, 67, 450, 50, 4800),
    "h200-nvl": GPU(143771, 835, 60, 450, 25, 4800),
    "gh200": GPU(97871, 989, 67, 450, 50, 4000),
    "h20": GPU(97871, 148, 44, 450, 50, 4000),
    "b200": GPU(183359, 2250, 80, 900, 50, 8000),
    "l40s": GPU(46068, 362, 91.6, 32, 12.5, 864),
    "l40": GPU(46068, 181, 90.5, 32, 12.5, 864),
    "a10g": GPU(23028, 70, 31.5, 32, 12.5, 600),
    "a10": GPU(23028, 125, 31.2, 32, 12.5, 600),
    "a30": GPU(24576, 165, 10.3, 32, 12.5, 933),
    "a40": GPU(46068, 150, 37.4, 32, 12.5, 696),
    "l4": GPU(23034, 121, 30.3, 32, 12.5, 300),
    "a6000": GPU(49140, 155, 38.7, 32, 12.5, 768),
    "rtx6000-ada": GPU(49140, 364, 91.1, 32, 12.5, 960),
    "rtx3090": GPU(24576, 71, 35.6, 32, 12.5, 936),
    "rtx4090": GPU(24564, 165, 82.6, 32, 12.5, 1008),
    "rtx5090": GPU(32607, 209, 104.8, 64, 12.5, 1792),
}

# Words of a driver's name that make a known GPU another one: "RTX 3090 Ti", "RTX 4090 D", a slice of an A100.
_OTHERS = frozenset({"laptop", "max", "mig", "ti", "super", "d"})


def find_gpu(name: str) -> GPU:
    """Raises ValueError, naming the nearest one, for a GPU that is not known."""
    key = name.lower().replace(" ", "").replace("_", "-").replace("rtx-", "rtx")
    if key not in GPUS:
        near = [known for known in GPUS if known.startswith(key)] or difflib.get_close_matches(key, GPUS, n=1)
        hint = f"did you mean {' or '.join(near)}?" if near else f"take one of {', '.join(GPUS)}"
        raise ValueError(f"--gpu {name}: not a GPU that the estimate knows; {hint}")
    return GPUS[key]


def gpu_of_driver(name: str) -> GPU | None:
    """The GPU that a driver calls `name`, such as "NVIDIA A100-SXM4-40GB"; None if it is not known.

    All words of a key are words of the name; a size and "GB", or "RTX" and a number, may stand apart.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    if _OTHERS.intersection(words):
        return None
    known = {*words, *(first + second for first, second in itertools.pairwise(words) if first == "rtx")}
    known |= {number + "gb" for number, unit in itertools.pairwise(words) if unit == "gb"}
    fitting = [key for key in GPUS if known.issuperset(key.split("-"))]
    return GPUS[max(fitting, key=len)] if fitting else None
