"""Which models this project computes exactly, how long their context is, and what it switches off in them."""

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from notus.model.lora import LoRALinear
from notus.model.routers import disable_router_noise

# The policy takes its log-probs from hidden states and head alone, and its attention is plain softmax(QKᵀ).
NEUTRAL: dict[str, tuple[object, ...]] = {
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "lm_head_multiplier": (None, 1),
    "use_bidirectional_attention": (None, False),
    "quantization_config": (None,),
    "output_router_logits": (None, False),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1),
    "moe_num_experts": (None, 0, 1),
}
# Frequencies that follow the longest position in the batch: a sequence packed with others would differ from it alone.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# How configs name the number of positions. transformers' own all answer to the first name.
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
LAYER_TYPES = {"full_attention", "sliding_attention"}
OTHER_INPUTS = ("vision_config", "audio_config", "text_config", "type_vocab_size")


def check_supported(config: PreTrainedConfig) -> None:
    """Raises ValueError, naming the setting, for a model that does something this project does not reproduce.

    Supported are dense, unquantised, decoder-only text models with causal softmax attention in every layer,
    through transformers' attention interface, whose logits are the hidden states times the head.
    """
    obstacle = _obstacle(config)
    if obstacle:
        raise ValueError(
            f"model type {config.model_type!r} is not supported: {obstacle}; "
            "take a dense decoder-only text model such as Mistral, Llama, Qwen2 or Qwen3"
        )


def _obstacle(config: PreTrainedConfig) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if any(getattr(config, name, None) is not None for name in OTHER_INPUTS):
        return "it takes more than text tokens"
    for name, neutral in NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in neutral:
            return f"{name} is {value}"
    rope = _rope_types(getattr(config, "rope_parameters", None) or {})
    if rope & LENGTH_DEPENDENT_ROPE:
        return f"its rope_type {', '.join(sorted(rope))} makes positions depend on the longest sequence of a batch"
    strange = sorted(set(getattr(config, "layer_types", None) or []) - LAYER_TYPES)
    if strange:
        return f"it has layers of type {', '.join(strange)}"
    return _class_obstacle(config)


def _rope_types(parameters: Mapping[str, Any]) -> set[str]:
    """The types in a config's rope parameters, which may be nested by layer type."""
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return {str(part["rope_type"]) for part in [parameters, *nested] if "rope_type" in part}


def context_of(config: PreTrainedConfig) -> int:
    """Return the most tokens of a sequence that a model takes; `sys.maxsize` if its config names no limit.

    Of a model with learned positions there are no others. One with rotary positions computes something for any, but
    has learned nothing of those beyond. A sliding window is no limit. Rotary positions that are stretched by a factor
    (linear, YaRN) reach that much further, unless the config counts that in already.
    """
    named = (getattr(config, name, None) for name in POSITIONS)
    positions = next((value for value in named if isinstance(value, int) and value > 0), None)
    if positions is None:
        return sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("linear", "yarn"):
        return positions
    learned = rope.get("original_max_position_embeddings") or positions
    return max(positions, int(learned * (rope.get("factor") or 1)))


def check_context(config: PreTrainedConfig, longest: int, setting: str, *, model: str = "the model") -> None:
    """Raise ValueError if the longest row, in tokens, is longer than the model's context.

    For the message: `setting` is what bounds the rows, "data.max_length" or "--max-length", and `model` its name.
    """
    context = context_of(config)
    if longest > context:
        raise ValueError(
            f"the longest row has {longest:,} tokens, but the context of {model} ends at {context:,}, and it has "
            f"learned no position beyond: set {setting} to {context} or less, or take a model with a longer context"
        )


def _class_obstacle(config: PreTrainedConfig) -> str | None:
    """What transformers says about the model's class; nothing for a class that comes with the model."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return "it is no causal language model"
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    # Soft-capped attention and attention sinks declare themselves as beyond scaled-dot-product attention.
    if not (model_class._supports_attention_backend and model_class._supports_sdpa):
        return "its attention is not plain softmax attention behind transformers' attention interface"
    return None


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of the base model to 0, in its modules, and switch off routers' noise; leave LoRA's and
    the config alone.

    The reference log-probs hold for the policy at step 0 only if both are computed without dropout.
    """
    disable_router_noise(model)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
