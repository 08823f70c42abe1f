"""Which transformers class a configuration is for, and a model of it; what of a multimodal model reads and writes text.

A checkpoint with vision or audio parts is built whole, by its own class, so that an export holds all of it.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import meta_device_safe_creation_ops

from notus.model.check_config import explained
from notus.model.load import read_json
from notus.model.structure import decoder_of, text_config


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return a model folder's configuration, without the attention implementation that it may ask for.

    Raises:
        ValueError: `config.json` is damaged or of no model that transformers knows; naming the file.
    """
    path = folder / "config.json"
    settings = read_json(path)
    if settings.get("auto_map") and not trust_remote_code and settings.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{path}: the model comes with code of its own (auto_map), and transformers has none for it: set "
            "model.trust_remote_code=true if you trust its author"
        )
    with explained(path, settings, "not the configuration of a model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    forget_attention(config)
    return config


def forget_attention(config: PreTrainedConfig) -> None:
    """Remove the attention implementation from a configuration and those inside it: the machine decides, not a file."""
    config._attn_implementation = None


def auto_class_of(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """Return the Auto class that builds the whole model of a configuration, for training or evaluation on text.

    `AutoModelForCausalLM` also knows some multimodal configurations, for their language part alone (Llama 4, Qwen
    3.5). There, the class that `architectures` names decides, or else the one that holds every weight.

    Raises:
        ValueError: transformers has neither a causal nor an image-text-to-text model of this configuration.
    """
    causal, multimodal = (
        each._model_mapping.get(type(config), None) for each in (AutoModelForCausalLM, AutoModelForImageTextToText)
    )
    for each in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if trust_remote_code and each.__name__ in (getattr(config, "auto_map", None) or {}):
            return each
    if causal is None and multimodal is None:
        raise ValueError(
            f"transformers has no causal language model of type {config.model_type!r}; take another model, or set "
            "model.trust_remote_code to true if it comes with code of its own"
        )
    if causal is None:
        return AutoModelForImageTextToText
    if multimodal is None or text_config(config) is config or _is_named(causal, config):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _is_named(model_classes: Any, config: PreTrainedConfig) -> bool:
    """Whether `architectures` names one of the model classes that an Auto class has for a configuration."""
    classes = model_classes if isinstance(model_classes, (list, tuple)) else [model_classes]
    return bool({each.__name__ for each in classes} & set(config.architectures or []))


def make_model(
    config: PreTrainedConfig, *, trust_remote_code: bool, attn_implementation: str | None, dtype: torch.dtype
) -> PreTrainedModel:
    """Build an untrained model on the current device, such as `with torch.device("meta")`.

    Args:
        config: the model's configuration; it is not changed.
        trust_remote_code: run code that comes with the model.
        attn_implementation: a name in transformers' AttentionInterface; None: transformers' default for the model.
        dtype: of its parameters.

    Raises:
        ValueError: there is no such model, or it has no text decoder with a head.
    """
    config = copy.deepcopy(config)
    auto_class = auto_class_of(config, trust_remote_code=trust_remote_code)
    with meta_device_safe_creation_ops():  # code that reads a value of what it makes while it is built
        causal_lm: PreTrainedModel = auto_class.from_config(
            config, attn_implementation=attn_implementation, dtype=dtype, trust_remote_code=trust_remote_code
        )
    if auto_class is AutoModelForImageTextToText:
        _check_reads_text(causal_lm)
    return causal_lm


def _check_reads_text(causal_lm: PreTrainedModel) -> None:
    """Raises ValueError unless a multimodal model predicts the next token of text, by a decoder and a head."""
    kind = type(causal_lm).__name__
    text = text_config(causal_lm.config)
    encoder_decoder = text.is_encoder_decoder or causal_lm.config.is_encoder_decoder
    if encoder_decoder or causal_lm.get_output_embeddings() is None or decoder_of(causal_lm) in (None, causal_lm):
        raise ValueError(f"{kind} has no text decoder with a head, so it cannot be trained on text; take another model")
