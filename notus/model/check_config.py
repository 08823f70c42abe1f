"""Whether a model can be built from its `config.json`: one line for what is wrong, before any data is read.

transformers raises errors of every kind for a configuration that makes no sense, some of them only while it computes,
and tries hard to build what no machine can hold. Here known keys are looked at first, then the model is built on the
meta device, which costs no memory, and compared with the shapes of its weights.
"""

import contextlib
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from notus.model.load import INDEX, WEIGHTS, open_safetensors, read_json, weight_files
from notus.model.structure import text_config

CONFIG = "config.json"

# Sizes of which a model has at least one, under the names that families give them.
_SIZES = re.compile(
    r"vocab_size|hidden_size|n_embd|d_model|(num_)?(attention_|key_value_|kv_)?heads|n_heads?"
    r"|num_(hidden_)?layers|n_layers?|head_dim|max_position_embeddings|n_positions|max_seq_len"
)
# Integers that are no sizes.
_FREE = re.compile(r"chunk_size_feed_forward|.*(theta|base|token|seed|version|_id|_ids|_index|label).*")
_LARGEST, _MOST_BLOCKS, _LARGEST_BUFFER = 2**31, 10_000, 2**30
_BLOCKS = re.compile(r"num_(hidden_)?layers|n_layers?|depth|num_blocks|.*_period|.*_cycles")
_ACTIVATIONS = re.compile(
    r"hidden_act(ivation)?|activation_function|mlp_hidden_act|hidden_mamba_act|mamba_hidden_act|afn"
)
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "local_attention")
_BLOCK = re.compile(r"[^\d]*?\.\d+\.")  # such as model.layers.0.
# What the parts of a shape error depend on.
_GEOMETRY = re.compile(r"hidden_size|n_embd|d_model|.*heads?|.*head_dim|.*_rank|.*groups?|.*experts.*|.*topk?|top_k.*")
# Words of torch for what configurations call otherwise.
_ALSO_CALLED = {"padding_idx": "pad_token_id", "dropout probability": "attention_dropout"}


def check_values(folder: Path) -> None:
    """Look at what `config.json` says, before transformers does.

    Raises:
        ValueError: it is not a JSON object, or a value in it cannot be: naming file, key, value and what to do.
    """
    path = folder / CONFIG
    settings = read_json(path)
    _check_type(path, settings)
    for prefix, part in _parts(settings):
        for key, value in part.items():
            problem = None if _is_unused(key, part) else _problem(key, value)
            if problem:
                raise ValueError(f"{path}: {prefix}{key} is {_shown(value)}, {problem}")
        _check_heads(path, prefix, part)


def check_names(config: PreTrainedConfig, folder: Path) -> None:
    """Raise ValueError for an activation or a kind of rotary positions that transformers does not know.

    Of a multimodal model, the part that reads text is looked at; others have kinds of their own.
    """
    text = text_config(config)
    whole = "" if text is config else "text_config."
    for prefix, part in _parts(text.to_dict(), whole):
        for key, value in part.items():
            if _ACTIVATIONS.fullmatch(key) and isinstance(value, str) and value not in ACT2FN:
                raise _unknown(folder, prefix + key, value, ACT2FN.keys())
            if key == "rope_type" and value not in {"default", "mrope", *ROPE_INIT_FUNCTIONS}:
                raise _unknown(folder, prefix + key, value, ["default", *ROPE_INIT_FUNCTIONS])


def check_shapes(config: PreTrainedConfig, causal_lm: PreTrainedModel, folder: Path) -> None:
    """Compare a model on the meta device with the shapes of the weights of its folder, where it has weights.

    Tensors that are stored under other names than the model's are left to `load_weights`.

    Raises:
        ValueError: a shape differs: naming the configuration's key that is most likely wrong.
    """
    for name, buffer in causal_lm.named_buffers():
        if buffer.numel() > _LARGEST_BUFFER:
            raise ValueError(
                f"{folder / CONFIG}: {name} would have shape {list(buffer.shape)}, more than any model has; check "
                "max_position_embeddings and the like"
            )
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return
    wanted = {name: list(tensor.shape) for name, tensor in causal_lm.named_parameters(remove_duplicate=False)}
    present = set()
    for path in weight_files(folder):
        handle = open_safetensors(path)
        for name in handle.keys():  # noqa: SIM118  # no dict
            present.add(name)
            found = list(handle.get_slice(name).get_shape())
            if name in wanted and wanted[name] != found:
                raise ValueError(_misfit(config, folder, path, name, found, wanted[name]))
    blocks = {match.group() for match in map(_BLOCK.match, present) if match}
    lists = {block.rsplit(".", 2)[0] for block in blocks}
    for name in wanted:  # a block beyond those of the weights
        match = _BLOCK.match(name)
        if match and match.group() not in blocks and match.group().rsplit(".", 2)[0] in lists:
            layers = text_config(config).num_hidden_layers
            raise ValueError(
                f"{folder / CONFIG}: num_hidden_layers is {layers}, but the weights lack {name}; take both files from "
                "the same model"
            )


@contextlib.contextmanager
def explained(where: object, settings: Mapping[str, Any], doing: str) -> Iterator[None]:
    """Turn what transformers raises within into one line.

    Args:
        where: the configuration's file, or what else the line begins with.
        settings: the configuration.
        doing: what fails, such as "no model can be built from it".

    Raises:
        ValueError: naming the keys that the failure is likely about.
    """
    try:
        yield
    except Exception as error:  # of every kind; see the head of this file
        keys = _suspects(settings, error)
        hint = f"check {', '.join(keys)}" if keys else "compare it with the config.json of the model's source"
        raise ValueError(f"{where}: {doing} ({reason_of(error)}); {hint}") from error


def reason_of(error: BaseException) -> str:
    """What an error says, in one line of bounded length: errors of a configuration's checks say it in their second."""
    words = " ".join(str(error).split()) or type(error).__name__
    words = re.sub(r"^(Class v|V)alidation error for (field|validator) '\w+': (\w+Error: )?", "", words)
    if isinstance(error, KeyError | AssertionError | AttributeError):
        words = f"{type(error).__name__}: {words}"
    return words if len(words) <= 200 else f"{words[:197]}..."


def _parts(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configuration and those inside it, with what leads to them: `text_config.` and the like."""
    yield prefix, settings
    for key, value in settings.items():
        if isinstance(value, Mapping) and key not in ("id2label", "label2id"):
            yield from _parts(value, f"{prefix}{key}.")


def _is_unused(key: str, part: Mapping[str, Any]) -> bool:
    """Whether a window's size stands there although the model has none: Qwen2-MoE writes 0 then."""
    return key in _WINDOWS and part.get(f"use_{key}") is False


def _problem(key: str, value: object) -> str | None:
    """What is wrong with a value by itself, and what to do."""
    if key in ("torch_dtype", "dtype") and value not in (None, "auto"):
        known = isinstance(value, str) and isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
        return None if known else "no dtype of torch: write float32, bfloat16 or float16"
    if not _is_size(key, value):
        return None
    assert isinstance(value, int)
    if abs(value) > _LARGEST or (_BLOCKS.fullmatch(key) and value > _MOST_BLOCKS):
        return "more than any model has: write what the weights were trained with"
    if _SIZES.fullmatch(key) and value < 1:
        return "but must be at least 1: write what the weights were trained with"
    if key in _WINDOWS and value < 1:
        return "but a window has at least 1 token: write null for attention without one"
    return None


def _check_type(path: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("model_type")
    if "auto_map" in settings or (isinstance(kind, str) and kind in CONFIG_MAPPING):
        return
    if not isinstance(kind, str):
        raise ValueError(f"{path}: model_type is {_shown(kind)}: write the name of its architecture, such as 'llama'")
    close = difflib.get_close_matches(kind, list(CONFIG_MAPPING), 1)
    meant = f"did you mean {close[0]!r}?" if close else "a newer version may"
    raise ValueError(
        f"{path}: model_type is {_shown(kind)}, which transformers {transformers_version} does not know: {meant}"
    )


def _is_size(key: str, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and not _FREE.fullmatch(key)


def _check_heads(path: Path, prefix: str, part: Mapping[str, Any]) -> None:
    heads, groups = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ValueError(
            f"{path}: {prefix}num_key_value_heads is {groups}, which does not divide num_attention_heads, {heads}: "
            "write what the weights were trained with"
        )


def _misfit(config: PreTrainedConfig, folder: Path, path: Path, name: str, found: list[int], wanted: list[int]) -> str:
    """Say which key makes a tensor another size than it has in the file."""
    sizes = [(want, have) for want, have in zip(wanted, found, strict=False) if want != have]
    named = {
        f"{prefix}{key} is {want}, where the weights have {have}"
        for want, have in sizes
        for prefix, part in _parts(config.to_dict())
        for key, value in part.items()
        if value == want and _is_size(key, value)
    }
    text = text_config(config).to_dict()
    shaping = [f"{key} {value}" for key, value in text.items() if _GEOMETRY.fullmatch(key) and _is_size(key, value)]
    keys = named.pop() if len(named) == 1 else f"its sizes ({', '.join(shaping)}) are not those of the weights"
    return (
        f"{folder / CONFIG}: {keys}: {name} in {path.name} has shape {found}, the model needs {wanted}; "
        "take both files from the same model"
    )


def _suspects(settings: Mapping[str, Any], error: BaseException) -> list[str]:
    """Keys that an error names or quotes, else sizes below 1, else those that make the shapes; with their values."""
    words = str(error)
    for word, key in _ALSO_CALLED.items():
        words = re.sub(word, key, words, flags=re.IGNORECASE)
    named, small, shaping = [], [], []
    for prefix, part in _parts(settings):
        for key, value in part.items():
            if isinstance(value, Mapping):
                continue
            shown = f"{prefix}{key} ({_shown(value)})"
            if re.search(rf"\b{re.escape(key)}\b", words) or (
                isinstance(value, str) and value and repr(value) in words
            ):
                named.append(shown)
            elif _is_size(key, value) and value < 1:
                small.append(shown)
            elif _GEOMETRY.fullmatch(key) and isinstance(value, int | None):
                shaping.append(shown)
    return (named or small or shaping)[:8]


def _unknown(folder: Path, key: str, value: object, known: Any) -> ValueError:
    close = difflib.get_close_matches(str(value), list(known), 1)
    meant = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(known)[:8])} and others"
    return ValueError(f"{folder / CONFIG}: {key} is {_shown(value)}, which transformers does not know: {meant}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
