"""LoRA (Hu et al. 2021, arXiv 2106.09685): inject, initialise, switch off, merge.

A layer's frozen weight keeps its name; `lora_A` and `lora_B` stand beside it.
"""

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from notus.model.sharded_tensors import fill_rows
from notus.model.structure import matches, text_config, text_parameters

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """The rank r and α of a layer's adapter, and whether it is scaled by α/√r in place of α/r."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """What BA is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Linear):
    """y = x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ, with W [out, in] and b frozen, A [r, in] and B [out, r] trained.

    s is α/r, or α/√r for rank-stabilised LoRA (arXiv 2312.03732). A and B are fp32, whatever the dtype of W;
    the forward needs input, W, A and B in one dtype, as FSDP2's `param_dtype` brings them.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float, rslora: bool) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = self.settings.scaling
        self.adapter_on = True
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device=device, dtype=torch.float32))
        self.train(base.training)

    @property
    def settings(self) -> LayerSettings:
        """Rank and scaling."""
        return LayerSettings(self.rank, self.alpha, self.rslora)

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
    modules_to_save: Sequence[str] = (),
    idle: Set[str] = frozenset(),
) -> None:
    """Freeze `model` and put a LoRA layer in the place of each linear layer named by `target_modules`.

    A name is the last component of a module's name ("q_proj"); "all-linear" means every linear layer but the output
    head and gates of one number. Experts that are stacked in one parameter are no linear layers, and what reads no text
    takes no adapter. Neither does a layer that `idle` stands for (see `PathChoice`). A and B have no values before
    `init_lora`. The modules of `modules_to_save` are trained in full: each of them is a module's name, or its last
    components. A tied tensor is trained, and saved, as both of its modules.

    Raises:
        ValueError: a target matches no linear layer, or only idle ones; it is the output head, whose weight the
            log-probs read without calling the layer; it cannot hold the rank; or it is trained in full as well. A name
            in `modules_to_save` matches no module with parameters, or only those that no text goes through.
    """
    targets = _targets(model, target_modules, idle)
    whole = _modules_to_save(model, modules_to_save, targets)
    model.requires_grad_(False)
    for module in whole.values():
        module.requires_grad_(True)
    for name, linear in targets.items():
        most = min(linear.in_features, linear.out_features)
        if rank > most:
            raise ValueError(f"lora.rank {rank} is above what {name} can hold, {most}: lower it")
    inject_layers(model, dict.fromkeys(targets, LayerSettings(rank, alpha, rslora)), dropout=dropout)


def inject_layers(model: nn.Module, layers: Mapping[str, LayerSettings], *, dropout: float = 0.0) -> None:
    """Put a LoRA layer in the place of each of these linear layers, named in full; all else stays as it is."""
    for name, settings in layers.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        layer = LoRALinear(linear, rank=settings.rank, alpha=settings.alpha, dropout=dropout, rslora=settings.rslora)
        _replace(model, name, layer)


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter that is trained in full beside the LoRA layers; a tied one under each of its names."""
    adapters = {id(part) for layer in lora_layers(model).values() for part in (layer.lora_A, layer.lora_B)}
    named = model.named_parameters(remove_duplicate=False)
    return {name: each for name, each in named if each.requires_grad and id(each) not in adapters}


def _modules_to_save(model: PreTrainedModel, names: Sequence[str], targets: Collection[str]) -> dict[str, nn.Module]:
    """Full name -> module, of each module with parameters that one of the names stands for."""
    of_text = text_parameters(model)
    modules = {name: module for name, module in model.named_modules() if next(module.parameters(), None) is not None}
    of_others = {
        name
        for name, module in modules.items()
        if name and not all(f"{name}.{key}" in of_text for key, _ in module.named_parameters())
    }
    found: dict[str, nn.Module] = {}
    for wanted in names:
        fitting = {name for name in modules if name == wanted or name.endswith(f".{wanted}")}
        if not fitting - of_others:
            small = {name for name in modules.keys() - of_others - set(targets) if _holds_parameters(modules[name])}
            raise ValueError(_unfit(wanted, fitting, {_last(name) for name in small}))
        found |= {name: module for name, module in modules.items() if name in fitting - of_others}
    for name, module in found.items():
        _check_saved(name, module, targets)
    return found


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _unfit(wanted: str, fitting: Collection[str], available: Set[str]) -> str:
    """Say why a name stands for no module that can be trained in full."""
    if fitting:
        return (
            f"lora.modules_to_save: no text goes through {min(fitting)}, or through a part of it, so training that has "
            "no effect: leave it out"
        )
    choice = ", ".join(_nearest(wanted, available))
    return f"lora.modules_to_save: no module is named {wanted!r}; take one of: {choice}"


def _check_saved(name: str, module: nn.Module, targets: Collection[str]) -> None:
    """Raise ValueError if a module cannot be trained and saved in full."""
    for target in targets:
        if f"{target}.".startswith(f"{name}."):
            also = "a LoRA target" if target == name else f"holds a LoRA target ({target})"
            raise ValueError(
                f"lora.modules_to_save: {name} is trained in full and {also}, both: take it out of one of the two"
            )
    unsaved = [buffer for buffer in module.state_dict() if buffer not in dict(module.named_parameters())]
    tied = {key for key, _ in module.named_parameters(remove_duplicate=False)}
    if set(unsaved) - tied:
        raise ValueError(f"lora.modules_to_save: {name} holds more than parameters ({unsaved[0]}): leave it out")


def _targets(model: PreTrainedModel, names: Sequence[str] | str, idle: Set[str]) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    of_text = text_parameters(model)
    # a subclass may compute more than a product, as the router of Llama 4 does
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and f"{name}.weight" in of_text
    }
    body = {name: each for name, each in linears.items() if each is not head and not matches(name, idle)}
    if text_config(model.config).model_type in _MAMBA:
        body = {name: each for name, each in body.items() if _last(name) != "out_proj"}
    if not body:
        raise ValueError(f"LoRA: {type(model).__name__} has no linear layers beside its head: set lora.rank to 0")
    wanted = {names} if isinstance(names, str) else set(names)
    if wanted == {ALL_LINEAR}:  # but for gates of one number, which hold no adapter
        body = {name: each for name, each in body.items() if min(each.in_features, each.out_features) > 1}
        _check_experts(model, body, body)
        return body
    available = {_last(name) for name in body}
    for name in sorted(wanted - available):
        raise ValueError(_mismatch(name, {_last(other): each is head for other, each in linears.items()}, available))
    found = {name: module for name, module in body.items() if _last(name) in wanted}
    _check_experts(model, found, body)
    return found


def _mismatch(wanted: str, linears: Mapping[str, bool], available: Set[str]) -> str:
    """Say why a target name matches no layer that an adapter acts in. `linears`: name -> whether it is the head."""
    if linears.get(wanted):
        return f"LoRA target {wanted!r} is the output head, which takes no adapter: leave it out"
    if wanted in linears:
        return (
            f"LoRA target {wanted!r}: an adapter would have no effect there, because the model does not call the "
            "layer, or no gradient goes through it, or PEFT would not load it: leave it out"
        )
    choice = ", ".join([*_nearest(wanted, available), ALL_LINEAR])
    return f"LoRA target {wanted!r} matches no linear layer; take one of: {choice}"


def _nearest(wanted: str, available: Set[str]) -> list[str]:
    """Return the names that are most like the wanted one; all of them if none is."""
    return difflib.get_close_matches(wanted, sorted(available), n=2, cutoff=0.5) or sorted(available)


# Of these, PEFT loads no adapter on `out_proj`: their kernels read its weight without calling the layer
# (`_check_lora_target_modules_mamba` in peft/tuners/tuners_utils.py).
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}

# What PEFT, with transformers 5, takes for parts of routed experts, whatever comes before in a layer's name
# (peft/utils/transformers_weight_conversion.py).
OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def _check_experts(model: nn.Module, targets: Mapping[str, nn.Linear], body: Mapping[str, nn.Linear]) -> None:
    """Raise ValueError if PEFT would load an adapter of these layers onto others: those of fused experts."""
    fused = any(parameter.dim() == 3 and "experts" in name.split(".") for name, parameter in model.named_parameters())
    misread = sorted({_last(name) for name in targets} & OF_EXPERTS)
    if not (fused and misread):
        return
    others = {_last(name) for name, linear in body.items() if min(linear.in_features, linear.out_features) > 1}
    raise ValueError(
        f"LoRA: PEFT takes {', '.join(misread)} of {type(model).__name__} for parts of its routed experts, so an "
        f"adapter would load as another one: set lora.target_modules=[{', '.join(sorted(others - OF_EXPERTS))}]"
    )


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
