"""The output head of a transformers causal LM: from final hidden states to logits, as the model's own forward does it.

Families scale the logits, cap them, or do neither; each names it otherwise, and under one name some multiply and some
divide. The rules below were read off the forward of every causal LM in transformers 5.17 to 5.23; the check at load
holds a policy against the model's own forward.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from notus.model.structure import decoder_of, text_config


@dataclasses.dataclass(frozen=True)
class Head:
    """logits = softcap(scale * (hidden @ W.T + bias)), with softcap(x) = c tanh(x / c), or x where there is none.

    Attributes:
        linear: W [V, D] and maybe a bias [V].
        scale: factor on the logits.
        softcap: c.
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden states [..., D], in their dtype."""
        logits = hidden @ self.linear.weight.t()
        if self.linear.bias is not None:
            logits = logits + self.linear.bias
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def _number(config: PreTrainedConfig, name: str) -> float | None:
    value: float | None = getattr(config, name, None)
    return value


def _multiplied(value: float) -> float:
    return value


def _divided(value: float) -> float:
    return 1 / value


# Settings of a text config that scale logits: which families' forward reads one (a prefix of the model type), and how.
_SCALES: dict[str, dict[str, Callable[[float], float]]] = {
    "logits_scaling": {"granite": _divided, "minicpm3": _divided, "hyperclovax": _multiplied},
    "logit_scale": {"cohere": _multiplied, "aya": _multiplied},
    "lm_head_multiplier": {"falcon_h1": _multiplied},
    "output_multiplier": {"muse_": _multiplied},
    "logits_mup_width_multiplier": {"inkling": _divided},
}
# The same settings, where the forward of a family reads none. MPT's code outside transformers knows one.
_UNREAD: dict[str, tuple[str, ...]] = {"logit_scale": ("mpt",)}
# Settings that cap logits, in every family that has one. 0 is none, except that Gemma's forward would divide by it.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# What no family's packed head does, by setting.
_STRANGE = {"unpadded_vocab_size": "it cuts its vocabulary", "num_codebooks": "it has several heads"}


def head_of(causal_lm: PreTrainedModel) -> Head:
    """Return a model's head.

    Raises:
        ValueError: it is no matrix product from the decoder's hidden states, or what it does to its logits is unknown.
    """
    config = text_config(causal_lm.config)
    linear = _linear(causal_lm)
    for name, what in _STRANGE.items():
        if _number(config, name) is not None:
            raise _unknown(causal_lm, f"{what} ({name})")
    scale = 1.0
    for name in _SCALES:
        scale *= _scale(causal_lm, config, name)
    caps = [cap for name in _SOFTCAPS if (cap := _number(config, name)) is not None]
    if len(caps) > 1 or any(not cap > 0 for cap in caps):
        raise _unknown(causal_lm, f"it caps its logits at {caps}")
    if linear.bias is not None and config.model_type == "minicpm3":  # it scales before the head, not after
        raise _unknown(causal_lm, "it scales hidden states before a head with a bias")
    return Head(linear, scale, caps[0] if caps else None)


def _scale(causal_lm: PreTrainedModel, config: PreTrainedConfig, name: str) -> float:
    value = _number(config, name)
    kind = config.model_type
    if value is None or kind.startswith(_UNREAD.get(name, ())):
        return 1.0
    rules = [rule for prefix, rule in _SCALES[name].items() if kind.startswith(prefix)]
    if rules:
        return rules[0](float(value))
    if value == 1:
        return 1.0
    raise _unknown(causal_lm, f"its {name} is {value}, and whether it multiplies or divides is unknown")


def _linear(causal_lm: PreTrainedModel) -> nn.Linear:
    """The head's matrix; it is the only child with parameters beside the one that holds the decoder."""
    found: Any = causal_lm.get_output_embeddings()
    if not isinstance(found, nn.Linear):
        raise _unknown(causal_lm, f"it is {'missing' if found is None else f'a {type(found).__name__}'}")
    decoder = decoder_of(causal_lm)
    for name, child in causal_lm.named_children():
        holds = child is found or any(module is decoder for module in child.modules())
        if not holds and next(child.parameters(), None) is not None:
            raise _unknown(causal_lm, f"{name} may stand between it and the decoder")
    if not any(child is found for child in causal_lm.children()):
        raise _unknown(causal_lm, "it is part of a larger module")
    return found


def _unknown(causal_lm: PreTrainedModel, what: str) -> ValueError:
    name = type(causal_lm).__name__
    return ValueError(f"{name}: its output head is not understood: {what}; set model.path: plain")
