"""LoRA (Hu et al. 2021, arXiv 2106.09685): inject, initialise, switch off, merge.

A layer's frozen weight keeps its name; `lora_A` and `lora_B` stand beside it.
"""

import difflib
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from notus.model.sharded_tensors import fill_rows

ALL_LINEAR = "all-linear"


class LoRALinear(nn.Linear):
    """y = x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ, with W [out, in] and b frozen, A [r, in] and B [out, r] trained.

    s is α/r, or α/√r for rank-stabilised LoRA (arXiv 2312.03732). A and B are fp32, whatever the dtype of W;
    the forward needs input, W, A and B in one dtype, as FSDP2's `param_dtype` brings them.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float, rslora: bool) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.adapter_on = True
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device=device, dtype=torch.float32))
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        output = super().forward(input)
        if not self.adapter_on:
            return output
        dropped = F.dropout(input, self.dropout, self.training)
        return output + self.scaling * F.linear(F.linear(dropped, self.lora_A), self.lora_B)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Module name -> LoRA layer, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def inject_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str] | str,
    rslora: bool = False,
) -> None:
    """Freeze `model` and put a LoRA layer in the place of each linear layer named by `target_modules`.

    A name is the last component of a module's name ("q_proj"); "all-linear" means every linear layer but the output
    head and gates of one number. Experts that are stacked in one parameter are no linear layers. A and B have no values
    before `init_lora`. Raises ValueError for a name that matches no linear layer, for a rank that a layer cannot hold,
    and for the output head, whose weight the log-probs read without calling the layer.
    """
    model.requires_grad_(False)
    for name, linear in _targets(model, target_modules).items():
        most = min(linear.in_features, linear.out_features)
        if rank > most:
            raise ValueError(f"lora.rank {rank} is above what {name} can hold, {most}: lower it")
        layer = LoRALinear(linear, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        _replace(model, name, layer)


def _targets(model: PreTrainedModel, names: Sequence[str] | str) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    # a router that is a linear layer gives more than its product
    own = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears = {name: module for name, module in own.items() if type(module).forward is nn.Linear.forward}
    body = {name: module for name, module in linears.items() if module is not head}
    wanted = {names} if isinstance(names, str) else set(names)
    if wanted == {ALL_LINEAR}:  # but for gates of one number, which hold no adapter
        return {name: module for name, module in body.items() if min(module.in_features, module.out_features) > 1}
    available = sorted({_last(name) for name in body})
    for name in sorted(wanted - set(available)):
        if any(_last(other) == name for other in linears):
            raise ValueError(f"LoRA target {name!r} is the output head, which takes no adapter: leave it out")
        near = difflib.get_close_matches(name, available, n=2, cutoff=0.5) or available
        choice = ", ".join([*near, ALL_LINEAR])
        raise ValueError(f"LoRA target {name!r} matches no linear layer; take one of: {choice}")
    return {name: module for name, module in body.items() if _last(name) in wanted}


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn every frozen parameter to `dtype`, in place: tied ones stay tied. Works on the meta device."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def init_lora(model: nn.Module, seed: int) -> None:
    """Fill A with Kaiming-uniform(√5) values and B with zeros, so that the model starts as its base.

    Each A comes from its own generator, seeded by `seed` and its name in `model`, and each rank keeps its own
    rows of it: the full tensors are the same whatever the number of ranks.
    """
    for name, layer in lora_layers(model).items():
        digest = hashlib.sha256(f"{seed}:{name}.lora_A".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        full = torch.empty(layer.lora_A.shape)
        nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        fill_rows(layer.lora_A, full)
        with torch.no_grad():
            layer.lora_B.zero_()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the context every LoRA layer computes its frozen base alone."""
    before = {layer: layer.adapter_on for layer in lora_layers(model).values()}
    try:
        for layer in before:
            layer.adapter_on = False
        yield
    finally:
        for layer, was_on in before.items():
            layer.adapter_on = was_on


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """W += s·BA, summed in fp32 and rounded once to W's dtype; each layer becomes a plain nn.Linear again.

    For unsharded models. All parameters stay frozen.
    """
    for name, layer in lora_layers(model).items():
        merged = layer.weight.float() + layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())
        layer.weight.copy_(merged)
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        _replace(model, name, linear.train(layer.training))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
