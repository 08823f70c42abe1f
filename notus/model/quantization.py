"""NF4: frozen weights of the blocks' linear layers in 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

A weight is quantised row by row. Each block of 64 values of a row is divided by a scale, its largest magnitude, and
each quotient is replaced by the nearest of 16 levels. The scales of a row are kept in 8 bits between their smallest and
their largest (the paper's "double quantization", with a row in place of 256 blocks). Nothing of a row depends on other
rows, and nothing on the order of a sum, so a shard's values are the same whatever the number of ranks.

A packed row holds, in this order, each part from a multiple of 16 bytes on: the codes, two a byte, the first in the
high half; a byte for each scale; the smallest scale and the step between neighbouring ones, fp32. The parameter that
stores packed rows is called `weight`, like the one that it replaces, and has the dtype of the computation, though its
elements are only bytes: FSDP2 casts what it gathers to that dtype (torch 2.11 integers as well) and flattens what is
gathered together into one buffer, so that bytes in any other dtype would not arrive as they are.

torchao's NF4Tensor computes the same, but for the mean of a whole tensor's scales, which a rank with a part of it does
not know. FSDP2 shards it only if the rows divide evenly, and to dequantise it takes 8 bytes an element on the way.
`tests/model/test_quantization.py` holds the two against each other.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from notus.model import kernels
from notus.model.kernels import Kernel
from notus.model.lora import LoRALinear
from notus.model.sharded_tensors import local_rows
from notus.model.structure import blocks_of, matches

BLOCK = 64
# Appendix E of the paper: quantiles of the normal distribution, with an exact zero.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_ALIGNMENT = 16  # bytes: what compiled kernels expect of the start of a tensor
_CHUNK = 2**23  # weights that are quantised, or dequantised without the kernel, at a time: some 100 MiB
# Linear layers whose outputs choose experts: an error there sends a token elsewhere.
_ROUTERS = re.compile(r"(.*_)?(gate|router|classifier)")


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """Where things are in a packed row of `inputs` weights, in bytes."""

    inputs: int

    @property
    def blocks(self) -> int:
        """Blocks of a row, the last one filled up with zeros."""
        return math.ceil(self.inputs / BLOCK)

    @property
    def scales(self) -> int:
        """Where the scales begin, and the codes end."""
        return self.blocks * BLOCK // 2

    @property
    def span(self) -> int:
        """Where the smallest scale and the step are."""
        return self.scales + _aligned(self.blocks)

    @property
    def size(self) -> int:
        """Of the row."""
        return self.span + _aligned(8)


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


# ---- rows of weights to packed rows, and back ----


@torch.no_grad()
def quantize_rows(rows: Tensor) -> Tensor:
    """[R, in] of any floating dtype -> uint8 [R, `PackedRow(in).size`].

    Raises:
        ValueError: a weight is infinite or not a number.
    """
    packed = PackedRow(rows.shape[1])
    exact = F.pad(rows.float(), (0, packed.blocks * BLOCK - packed.inputs)).unflatten(1, (-1, BLOCK))
    largest = exact.abs().amax(dim=2)
    low, high = largest.aminmax(dim=1, keepdim=True)
    if not torch.isfinite(high).all():
        raise ValueError("some of its weights are infinite or not a number")
    step = (high - low) / torch.full_like(high, 255)  # CUDA divides by a number with its rounded reciprocal
    steps = ((largest - low) / step.clamp(min=torch.finfo(step.dtype).tiny)).round().clamp_(0, 255)
    scales = low + steps * step  # as they will be read: the nearest level is the nearest with that scale
    exact /= torch.where(scales > 0, scales, 1).unsqueeze(2)
    codes = torch.bucketize(exact, _midpoints(rows.device), out_int32=True).flatten(1)
    out = torch.zeros(len(rows), packed.size, dtype=torch.uint8, device=rows.device)
    out[:, : packed.scales] = codes[:, ::2] << 4 | codes[:, 1::2]
    out[:, packed.scales : packed.scales + packed.blocks] = steps
    out[:, packed.span : packed.span + 8] = torch.cat([low, step], dim=1).view(torch.uint8)
    return out


def dequantize_rows(weight: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """Packed rows [R, ...], whatever the dtype of the elements that hold their bytes -> [R, inputs] in `dtype`."""
    stored, packed = weight.view(torch.uint8), PackedRow(inputs)
    out = DEQUANTIZE(
        stored[:, : packed.scales],
        stored[:, packed.scales : packed.scales + packed.blocks],
        stored[:, packed.span : packed.span + 8].view(torch.float32),
        _levels(weight.device),
        dtype,
    )
    whole: Tensor = out[:, :inputs]
    return whole


@functools.lru_cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


def _midpoints(device: torch.device) -> Tensor:
    exact = torch.tensor(LEVELS, dtype=torch.float64)
    return ((exact[1:] + exact[:-1]) / 2).float().to(device)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows that hold at most `_CHUNK` elements, or one row."""
    size = max(1, _CHUNK // width)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _plain_dequantize(codes: Tensor, scales: Tensor, span: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """codes uint8 [R, in/2], scales uint8 [R, in/64], span fp32 [R, 2], levels fp32 [16] -> [R, in].

    Each byte of codes is the index of a pair of levels.
    """
    out = torch.empty(len(codes), 2 * codes.shape[1], dtype=dtype, device=codes.device)
    pairs = torch.cartesian_prod(levels, levels)
    for rows in _chunks(*out.shape):
        scale = span[rows, :1] + scales[rows].float() * span[rows, 1:]
        values = F.embedding(codes[rows].int(), pairs).view(len(scale), -1, BLOCK)
        out[rows] = values.mul_(scale.unsqueeze(2)).flatten(1)
    return out


def _dequantize(codes: Tensor, scales: Tensor, span: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """`_plain_dequantize` as one kernel."""
    scale = span[:, :1] + scales.float() * span[:, 1:]
    values = levels[torch.stack([codes >> 4, codes & 15], dim=2).int()]
    return (values.view(len(codes), -1, BLOCK) * scale.unsqueeze(2)).to(dtype).flatten(1)


DEQUANTIZE = Kernel(_dequantize, plain=_plain_dequantize, switch="fused_elementwise", varying=0)
_TOLERANCE = 1e-2  # of a bf16 result, which may be rounded to a neighbour


def check_dequantize(device: torch.device, dtype: torch.dtype, gather: kernels.Gather | None = None) -> list[str]:
    """Compile the kernel and compare it with its plain twin; on CUDA alone. Collective there.

    Returns:
        What is wrong, one line or none: the kernel is then not used.
    """
    if not DEQUANTIZE.usable(torch.empty(0, device=device)) and DEQUANTIZE.failure is None:
        return []

    def error(kernel: Kernel) -> tuple[float, float]:
        weights = torch.randn(192, 4096, generator=torch.Generator(device).manual_seed(0), device=device)
        stored, packed = quantize_rows(weights), PackedRow(4096)
        parts = stored[:, : packed.scales], stored[:, packed.scales : packed.scales + packed.blocks]
        given = (*parts, stored[:, packed.span : packed.span + 8].view(torch.float32), _levels(device), dtype)
        return kernels.relative_error(kernel.run(*given), _plain_dequantize(*given)), _TOLERANCE

    return kernels.check([DEQUANTIZE], error, gather)


# ---- linear layers on packed rows ----


@torch.library.custom_op("notus::quantized_linear", mutates_args=())
def quantized_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with packed rows [out, ...], which have the input's dtype: [..., in] -> [..., out].

    One operator, so that neither autograd nor the compiler keeps the dequantised weight for the backward pass: that
    dequantises again.
    """
    return F.linear(input, dequantize_rows(weight, input.shape[-1], weight.dtype), bias)


@quantized_linear.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.custom_op("notus::quantized_linear_backward", mutates_args=())
def _quantized_linear_backward(grad: Tensor, weight: Tensor, inputs: int) -> Tensor:
    return grad @ dequantize_rows(weight, inputs, weight.dtype)


@_quantized_linear_backward.register_fake
def _(grad: Tensor, weight: Tensor, inputs: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], inputs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _ = inputs
    ctx.inputs = input.shape[-1]
    ctx.save_for_backward(weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (weight,) = ctx.saved_tensors
    return _quantized_linear_backward(grad, weight, ctx.inputs), None, None


quantized_linear.register_autograd(_differentiate, setup_context=_keep)


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ + b with W [out, in] in 4 bits: `weight` holds its packed rows, [out, bytes / itemsize], frozen as b is.

    `quantize` makes a layer of an `nn.Linear` in its place. It has no values before they are loaded.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return quantized_linear(input, self.weight, self.bias)

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """W [out, in], of an unsharded layer."""
        return dequantize_rows(self.weight, self.in_features, self.weight.dtype)


class QuantizedLoRALinear(LoRALinear, QuantizedLinear):
    """`LoRALinear` whose W is in 4 bits: its `super().forward` is that of `QuantizedLinear`."""


_QUANTIZED: Mapping[type[nn.Linear], type[QuantizedLinear]] = {
    nn.Linear: QuantizedLinear,
    LoRALinear: QuantizedLoRALinear,
}


def quantize(
    causal_lm: PreTrainedModel, dtype: torch.dtype, *, keep: Sequence[str] = (), idle: Set[str] = frozenset()
) -> None:
    """Let the frozen linear layers of the blocks store their weights in 4 bits; on the meta device, before sharding.

    Embeddings, head, norms and biases stay as they are, and so do routers, mixtures' experts that are one tensor of
    three dimensions, layers that are trained, and layers of other classes than `nn.Linear`.

    Args:
        causal_lm: the model, with its adapters.
        dtype: of the computation.
        keep: names of modules that stay as they are, with all that is in them: those that are trained in full, also
            where the model is only to score, so that it scores the same.
        idle: layers (see `PathChoice`) that stay as they are, since the model may read their weights without calling
            them.

    Raises:
        ValueError: there is no such layer.
    """
    found = list(_quantizable(causal_lm, set(keep), idle))
    if not found:
        raise ValueError(
            f"model.quantization: {type(causal_lm).__name__} has no frozen nn.Linear in its blocks, and nothing else "
            "is quantised: remove model.quantization"
        )
    for layer in found:
        width = PackedRow(layer.in_features).size // dtype.itemsize
        stored = torch.empty(layer.out_features, width, dtype=dtype, device=layer.weight.device)
        layer.weight = nn.Parameter(stored, requires_grad=False)
        layer.__class__ = _QUANTIZED[type(layer)]


def _quantizable(causal_lm: PreTrainedModel, keep: Set[str], idle: Set[str]) -> Iterator[nn.Linear]:
    modules = list(causal_lm.modules())
    owners = [id(parameter) for module in modules for parameter in module.parameters(recurse=False)]
    head = causal_lm.get_output_embeddings()
    unused = {module for name, module in causal_lm.named_modules() if matches(name, idle)}
    for name, module in blocks_of(causal_lm).named_modules():
        path = name.split(".")
        if (
            type(module) not in _QUANTIZED
            or module is head
            or module in unused
            or _ROUTERS.fullmatch(path[-1])
            or not keep.isdisjoint(path)
        ):
            continue
        assert isinstance(module, nn.Linear)
        trained = module.weight.requires_grad or (module.bias is not None and module.bias.requires_grad)
        if not trained and owners.count(id(module.weight)) == 1:
            yield module


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Module name -> layer in 4 bits, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def describe(model: nn.Module) -> str:
    """Return a name of how the model's weights are quantised, for what depends on it; "" if they are not.

    It has a digest of which layers are.
    """
    layers = quantized_layers(model)
    if not layers:
        return ""
    digest = hashlib.sha256("\n".join(layers).encode()).hexdigest()[:8]
    return f"-nf4-{digest}" + ("-plain" if DEQUANTIZE.failure else "")


def summary(model: nn.Module) -> str:
    """Return a line for the log: how many weights are in 4 bits."""
    layers = quantized_layers(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(layer.weight.numel() * layer.weight.itemsize for layer in layers)
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(layer.weight.numel() for layer in layers)
    return (
        f"model.quantization: {weights / 1e6:,.1f} of {(weights + others) / 1e6:,.1f} million weights in "
        f"{8 * stored / weights:.2f} bits, {stored / 2**30:.2f} GiB"
    )


# ---- loading ----


class RowsToQuantize:
    """Stands for a quantised layer's weight where weights are loaded: of its full shape, filled with rows of W."""

    def __init__(self, layer: QuantizedLinear, name: str) -> None:
        self.shape = torch.Size([layer.out_features, layer.in_features])
        self._weight, self._name = layer.weight, name

    @torch.no_grad()
    def fill(self, source: Any) -> None:
        """Quantise this rank's rows of `source`, a full tensor or a safetensors slice, some at a time; read no other.

        Raises:
            ValueError: a weight is not finite.
        """
        start, _ = local_rows(self._weight)
        local = self._weight.to_local() if isinstance(self._weight, DTensor) else self._weight
        for rows in _chunks(len(local), self.shape[1]):
            values = source[start + rows.start : start + rows.stop]
            try:
                packed = quantize_rows(values.to(local.device))
            except ValueError as error:
                raise ValueError(f"model.quantization: {self._name} cannot be quantised: {error}") from error
            local[rows].view(torch.uint8).copy_(packed)


def rows_to_quantize(model: nn.Module) -> dict[int, RowsToQuantize]:
    """By the id of the parameter that they stand for."""
    layers = quantized_layers(model)
    return {id(layer.weight): RowsToQuantize(layer, f"{name}.weight") for name, layer in layers.items()}
