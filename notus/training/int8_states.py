"""Optimizer states in 8 bits: a code per number and a scale per block, by torchao's dynamic map (arXiv 2110.02861).

A state is kept as two tensors: `codes`, uint8 of the parameter's shape, and `scales`, fp32 of shape [rows, blocks of a
row]. A block is up to 256 numbers of one row, a row what stands at one place of the first dimension. FSDP shards that
dimension, so a block never spans two ranks: any number of ranks has the same blocks, and a checkpoint of one number is
read by another as it is. Where a row is a multiple of 256 numbers, the blocks are torchao's.

Three things differ from `torchao.optim.AdamW8bit`, whose averages would stall or blow up an update:

- Numbers are rounded up or down at random, with the probability that keeps the expectation. Rounded to the nearest
  code, an average of squares whose gradients become smaller keeps its value: at β₂ 0.999 it is to change by 0.1% a
  step, and codes are 0.7% to 70% apart.
- A square that is not 0 never becomes 0. The next update would divide by ε alone.
- A scale may be as small as fp32 has numbers. The squares of a 7B model's gradients are often below 1e-12, where
  torchao's scales end.
"""

import functools

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BLOCK = 256
SMALLEST = 4096  # numbers of the smallest parameter whose states are quantized, as in torchao
_NARROWEST = 8  # numbers of its rows: with fewer, the scales take as much as is saved


def check_torchao() -> None:
    """Raise ValueError if torchao is not installed."""
    try:
        import torchao.optim.quant_utils  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'training.optimizer_dtype=int8 needs torchao ({error}): run `pip install "notus-dpo[int8]"`, '
            "or set training.optimizer_dtype=bf16"
        ) from error


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter's states are kept in 8 bits; by its whole shape, so the same on every rank."""
    if parameter.dim() < 2 or parameter.numel() < SMALLEST:
        return False
    return parameter.numel() // parameter.shape[0] >= _NARROWEST


def new_state(parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a state of zeros, sharded as the parameter is."""
    codes = torch.zeros_like(parameter.detach(), dtype=torch.uint8)
    blocks = -(-(parameter.numel() // parameter.shape[0]) // BLOCK)
    if not isinstance(parameter, DTensor):
        return codes, torch.zeros(len(parameter), blocks, device=parameter.device)
    local = parameter.to_local()
    scales = DTensor.from_local(
        torch.zeros(local.shape[0], blocks, device=local.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size((parameter.shape[0], blocks)),
        stride=(blocks, 1),
    )
    return codes, scales.to(parameter.device)  # with offload it is to be on the host, not on the mesh's device


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The numbers, fp32 [r, c], from their codes, uint8 [r, c], and scales, [r, blocks]."""
    values = _map(signed, codes.device)[codes.int()]
    whole = codes.shape[1] // BLOCK
    blocks = values[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)) if whole else values[:, :0, None]
    blocks.mul_(scales[:, :whole, None])
    if codes.shape[1] % BLOCK:
        values[:, whole * BLOCK :].mul_(scales[:, whole:])
    return values


def quantize(
    values: Tensor, codes: Tensor, scales: Tensor, *, signed: bool, noise: torch.Generator | None = None
) -> None:
    """Write the codes, uint8 [r, c], and scales, [r, blocks], of numbers, fp32 [r, c], which may be overwritten."""
    whole = values.shape[1] // BLOCK * BLOCK
    for part in (slice(0, whole), slice(whole, values.shape[1])):
        if part.start == part.stop:
            continue
        first, last = part.start // BLOCK, -(-part.stop // BLOCK)
        blocks = values[:, part].unflatten(1, (last - first, -1)).contiguous()
        scale = blocks.abs().amax(-1)
        scales[:, first:last].copy_(scale)
        blocks.div_(scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None])
        codes[:, part].copy_(_round(blocks, _map(signed, values.device), signed, noise).flatten(1))


def _round(values: Tensor, places: Tensor, signed: bool, noise: torch.Generator | None) -> Tensor:
    """Codes, int32, of numbers within [-1, 1], rounded at random to one of the two nearest of `places`."""
    low = torch.bucketize(values, places, right=True, out_int32=True).sub_(1).clamp_(0, len(places) - 2)
    steps = torch.diff(places)
    share = (values - places[low]).div_(steps[low])
    drawn = torch.rand(values.shape, generator=noise, device=values.device)
    low += drawn < share
    return low if signed else torch.maximum(low, (values > 0).int())


@functools.lru_cache(maxsize=8)
def _map(signed: bool, device: torch.device) -> Tensor:
    """fp32 [256], ascending: what each code stands for, as a share of its block's largest number."""
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed=signed), dtype=torch.float32, device=device)
