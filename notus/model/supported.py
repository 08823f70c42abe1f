"""What no path can train, how long a model's context is, and what is switched off in it."""

import re
import sys

from torch import nn
from transformers import PreTrainedConfig

from notus.model.lora import LoRALinear
from notus.model.routers import disable_router_noise
from notus.model.structure import text_config

# How configs name the number of positions. transformers' own all answer to the first name.
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")


def check_supported(config: PreTrainedConfig) -> None:
    """Raise ValueError, naming the setting, for a model that no path can train.

    Which class it has is found in `notus.model.make`, and whether it is computed packed or plain by trial, in
    `notus.model.verify`.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(config, "it is an encoder-decoder", "take a decoder-only model")
    if getattr(text_config(config), "quantization_config", None) or getattr(config, "quantization_config", None):
        raise _unsupported(
            config, "its weights are quantized (quantization_config)", "take the original weights, or dequantize them"
        )


def _unsupported(config: PreTrainedConfig, reason: str, remedy: str) -> ValueError:
    return ValueError(f"model type {config.model_type!r} is not supported: {reason}; {remedy}")


def context_of(config: PreTrainedConfig) -> int:
    """Return the most tokens of a sequence that a model takes; `sys.maxsize` if its config names no limit.

    Of a model with learned positions there are no others. One with rotary positions computes something for any, but
    has learned nothing of those beyond. A sliding window is no limit. Rotary positions that are stretched by a factor
    (linear, YaRN) reach that much further, unless the config counts that in already.
    """
    config = text_config(config)
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


# Attributes that hold a rate of dropout, by which a forward pass is random in training. A router's jitter is none: to
# Phi-3.5-MoE it also says how close in score two experts must be to share a token.
_RANDOM = re.compile(r"dropout|pdrop|layerdrop|drop_path")


def disable_dropout(model: nn.Module) -> None:
    """Set every rate of dropout of the base model to 0, in its modules; leave LoRA's and the config alone.

    The reference log-probs hold for the policy at step 0 only if both are computed without dropout.
    """
    disable_router_noise(model)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if _RANDOM.search(name) and isinstance(value, float):
                setattr(module, name, 0.0)
