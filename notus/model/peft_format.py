"""A PEFT adapter's names and config, and how it is loaded into LoRA layers."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from notus.model.load import check_shape, open_safetensors, read_json
from notus.model.lora import lora_layers
from notus.model.sharded_tensors import fill_rows

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Settings of a PEFT adapter that must be absent or empty, for these LoRA layers to compute the same.
BEYOND_LORA = (
    "alpha_pattern",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
)


def load_adapter(causal_lm: PreTrainedModel, folder: str | Path) -> None:
    """Fill the LoRA layers of `causal_lm` from a PEFT adapter folder; each rank reads its own rows.

    Raises ValueError, naming folder and key, if the adapter's scaling, targets or shapes are not the layers'.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    theirs, ours = read_adapter_settings(folder), adapter_settings(causal_lm, "")
    for name in ("r", "lora_alpha", "use_rslora", "target_modules"):
        if theirs[name] != ours[name]:
            raise ValueError(f"{folder}: {name} is {theirs[name]} in the adapter, {ours[name]} in the model")
    targets = adapter_tensors(causal_lm)
    with open_safetensors(path) as handle:
        differing = sorted(set(handle.keys()) ^ set(targets))
        if differing:
            raise ValueError(f"{path}: not both it and the model have {differing[0]}; is its base another?")
        for key, target in targets.items():
            check_shape((path, handle), key, target)
        for key, target in targets.items():
            fill_rows(target, handle.get_slice(key))


def read_adapter_settings(folder: str | Path) -> dict[str, Any]:
    """Read a PEFT adapter's config, with lora_dropout and use_rslora always there and target_modules sorted.

    Raises ValueError, naming file and setting, if it is not a plain LoRA adapter.
    """
    path = Path(folder) / ADAPTER_CONFIG
    settings = {"lora_dropout": 0.0, "use_rslora": False, **read_json(path)}
    beyond = [name for name in BEYOND_LORA if settings.get(name)]
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none" or beyond:
        what = ", ".join(beyond) or "peft_type or bias"
        raise ValueError(f"{path}: only plain LoRA adapters are supported; this one sets {what}")
    for name in ("r", "lora_alpha", "target_modules", "base_model_name_or_path"):
        if settings.get(name) is None:
            raise ValueError(f"{path}: {name} is missing")
    if not isinstance(settings["target_modules"], list):
        raise ValueError(f"{path}: target_modules is a pattern; put the list of names in its place")
    return {**settings, "target_modules": sorted(settings["target_modules"])}


def adapter_tensors(causal_lm: PreTrainedModel) -> dict[str, Tensor]:
    """Return PEFT's name -> A or B."""
    return {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part)
        for name, layer in lora_layers(causal_lm).items()
        for part in ("lora_A", "lora_B")
    }


def adapter_settings(causal_lm: PreTrainedModel, base: str) -> dict[str, Any]:
    """Return the config that PEFT reads: the layers' scaling and targets, and the name of their base."""
    layers = lora_layers(causal_lm)
    layer = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": layer.rank,
        "lora_alpha": int(layer.alpha) if layer.alpha == int(layer.alpha) else layer.alpha,
        "lora_dropout": layer.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "use_rslora": layer.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
