"""Where the parts of a transformers causal LM are: its text decoder, the decoder's blocks, and their configuration."""

from collections.abc import Set
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the part that reads and writes text: `config` itself, or one inside it."""
    found: PreTrainedConfig = config.get_text_config(decoder=True)
    return found


def pattern_of(name: str) -> str:
    """Return a module's name with a star for each number, so that it stands for that module of every block."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def matches(name: str, patterns: Set[str]) -> bool:
    """Return whether a module is one of those that names and patterns stand for."""
    return name in patterns or pattern_of(name) in patterns


def decoder_of(causal_lm: PreTrainedModel) -> nn.Module:
    """Return the module that turns token ids into final hidden states, without the head."""
    decoder: Any = causal_lm.get_decoder()
    if decoder is causal_lm or isinstance(decoder, nn.Linear):
        # ModernBERT calls its head `decoder`, and Llama 4's text model does not say which part it is
        decoder = next((part for part in causal_lm.children() if isinstance(part, PreTrainedModel)), decoder)
    return decoder


def blocks_of(causal_lm: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder's blocks, in order: of its lists of modules, the one that holds the most parameters.

    Families name it `layers`, `h` or `blocks`.

    Raises:
        ValueError: there is no list of modules.
    """
    lists = [module for module in decoder_of(causal_lm).modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(causal_lm).__name__}: its decoder has no list of blocks; take another model")
    # max returns the first of equals: an outer list comes before the lists inside its modules
    return max(lists, key=lambda each: sum(parameter.numel() for parameter in each.parameters()))


def own_code(causal_lm: PreTrainedModel) -> str:
    """Return "-own-code" for a model whose class comes with its weights; else nothing.

    The same folder can be computed by that class or by transformers' own, as `trust_remote_code` says.
    """
    modules = {each.__module__ for each in type(causal_lm).__mro__}
    return "-own-code" if any(name.startswith("transformers_modules") for name in modules) else ""


def text_parameters(causal_lm: PreTrainedModel) -> set[str]:
    """Return the names of the parameters that text alone goes through: embedding, decoder and head.

    All names of a model whose configuration is one of text alone. A tied parameter counts under each of its names.
    """
    named = list(causal_lm.named_parameters(remove_duplicate=False))
    if text_config(causal_lm.config) is causal_lm.config:
        return {name for name, _ in named}
    parts: list[nn.Module] = [
        decoder_of(causal_lm), causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    ]  # fmt: skip
    of_text = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name for name, parameter in named if id(parameter) in of_text}
