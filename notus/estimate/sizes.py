"""What an estimate is made from: the sizes of a model, and the lengths of its examples."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, PreTrainedConfig

from notus.model.flops import Dimensions, dimensions
from notus.model.lora import inject_lora
from notus.model.make import make_model
from notus.model.quantization import quantize
from notus.model.size import ModelSize, UnknownSizeError, model_size
from notus.model.supported import check_supported, disable_dropout
from notus.runtime.process import first_line

if TYPE_CHECKING:  # `datasets` is not needed to estimate from statistics
    from notus.data.dataset import TokenizedDataset


def _config(
    kind: str, layers: int, hidden: int, inner: int, heads: int, groups: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


_MISTRAL = _config("mistral", 32, 4096, 14336, 32, 8, 32000, sliding_window=4096)
_MISTRAL_V3 = _config("mistral", 32, 4096, 14336, 32, 8, 32768, sliding_window=None)
_LLAMA2_7B = _config("llama", 32, 4096, 11008, 32, 32, 32000)
_LLAMA2_13B = _config("llama", 40, 5120, 13824, 40, 40, 32000)
_LLAMA2_70B = _config("llama", 80, 8192, 28672, 64, 8, 32000)
_LLAMA3_1B = _config("llama", 16, 2048, 8192, 32, 8, 128256, head_dim=64, tie_word_embeddings=True)
_LLAMA3_3B = _config("llama", 28, 3072, 8192, 24, 8, 128256, head_dim=128, tie_word_embeddings=True)
_LLAMA3_8B = _config("llama", 32, 4096, 14336, 32, 8, 128256)
_LLAMA3_70B = _config("llama", 80, 8192, 28672, 64, 8, 128256)
_QWEN_05B = _config("qwen2", 24, 896, 4864, 14, 2, 151936, tie_word_embeddings=True)
_QWEN_15B = _config("qwen2", 28, 1536, 8960, 12, 2, 151936, tie_word_embeddings=True)
_QWEN_3B = _config("qwen2", 36, 2048, 11008, 16, 2, 151936, tie_word_embeddings=True)
_QWEN_7B = _config("qwen2", 28, 3584, 18944, 28, 4, 152064)
_QWEN_14B = _config("qwen2", 48, 5120, 13824, 40, 8, 152064)
_QWEN_32B = _config("qwen2", 64, 5120, 27648, 40, 8, 152064)
_QWEN_72B = _config("qwen2", 80, 8192, 29568, 64, 8, 152064)
_QWEN3_4B = _config("qwen3", 36, 2560, 9728, 32, 8, 151936, head_dim=128, tie_word_embeddings=True)
_QWEN3_8B = _config("qwen3", 36, 4096, 12288, 32, 8, 151936, head_dim=128)

# Hub ids without owner, lower case; fine-tuned models have the sizes of what they were tuned from.
KNOWN = {
    "zephyr-7b-sft-full": _MISTRAL, "zephyr-7b-beta": _MISTRAL, "notus-7b-v1": _MISTRAL, "mistral-7b-v0.1": _MISTRAL,
    "mistral-7b-v0.3": _MISTRAL_V3, "mistral-7b-instruct-v0.3": _MISTRAL_V3,
    "llama-2-7b-hf": _LLAMA2_7B, "llama-2-13b-hf": _LLAMA2_13B, "llama-2-70b-hf": _LLAMA2_70B,
    "llama-3.2-1b": _LLAMA3_1B, "llama-3.2-1b-instruct": _LLAMA3_1B,
    "llama-3.2-3b": _LLAMA3_3B, "llama-3.2-3b-instruct": _LLAMA3_3B,
    "meta-llama-3-8b": _LLAMA3_8B, "meta-llama-3-8b-instruct": _LLAMA3_8B,
    "llama-3.1-8b": _LLAMA3_8B, "llama-3.1-8b-instruct": _LLAMA3_8B,
    "meta-llama-3-70b": _LLAMA3_70B, "meta-llama-3-70b-instruct": _LLAMA3_70B,
    "llama-3.1-70b": _LLAMA3_70B, "llama-3.1-70b-instruct": _LLAMA3_70B, "llama-3.3-70b-instruct": _LLAMA3_70B,
    "qwen2.5-0.5b": _QWEN_05B, "qwen2.5-0.5b-instruct": _QWEN_05B,
    "qwen2.5-1.5b": _QWEN_15B, "qwen2.5-1.5b-instruct": _QWEN_15B,
    "qwen2.5-3b": _QWEN_3B, "qwen2.5-3b-instruct": _QWEN_3B,
    "qwen2.5-7b": _QWEN_7B, "qwen2.5-7b-instruct": _QWEN_7B,
    "qwen2.5-14b": _QWEN_14B, "qwen2.5-14b-instruct": _QWEN_14B,
    "qwen2.5-32b": _QWEN_32B, "qwen2.5-32b-instruct": _QWEN_32B,
    "qwen2.5-72b": _QWEN_72B, "qwen2.5-72b-instruct": _QWEN_72B,
    "qwen3-4b": _QWEN3_4B, "qwen3-4b-base": _QWEN3_4B, "qwen3-8b": _QWEN3_8B, "qwen3-8b-base": _QWEN3_8B,
}  # fmt: skip


def find_config(name_or_path: str) -> tuple[PreTrainedConfig, str]:
    """A model's configuration and where it was found; never from the network.

    Raises:
        ValueError: it is nowhere, or the model is not supported.
    """
    path = _file(name_or_path)
    if path is not None:
        try:
            settings, source = json.loads(path.read_text(encoding="utf-8")), str(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not readable as JSON ({first_line(error)})") from error
    else:
        settings, source = KNOWN.get(name_or_path.rpartition("/")[2].lower()), "the table of known models"
    if settings is None:
        raise ValueError(
            f"{name_or_path}: no such folder, not in the hub's cache, and not a model that the estimate knows; "
            "give its config.json with --model-config"
        )
    try:
        config = AutoConfig.for_model(**settings)
    except Exception as error:  # transformers raises errors of every kind for what it does not understand
        raise ValueError(f"{source}: not the configuration of a model ({first_line(error)})") from error
    check_supported(config)
    return config, source


def _file(name_or_path: str) -> Path | None:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        return path
    try:
        cached = try_to_load_from_cache(name_or_path, "config.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def sizes(
    config: PreTrainedConfig,
    *,
    lora_rank: int = 0,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | str = (),
    quantization: str | None = None,
    modules_to_save: Sequence[str] = (),
    frozen: bool = False,
) -> tuple[ModelSize, Dimensions]:
    """What memory and arithmetic follow from, of a model on the meta device; `frozen`: none of it is trained.

    Raises:
        ValueError: as `inject_lora` and `quantize`, or the memory of such a model cannot be estimated.
    """
    with torch.device("meta"):
        causal_lm = make_model(config, trust_remote_code=False, attn_implementation=None, dtype=torch.float32)
    disable_dropout(causal_lm)
    if frozen:
        causal_lm.requires_grad_(False)
    arithmetic = dimensions(causal_lm)
    if lora_rank:
        inject_lora(
            causal_lm,
            rank=lora_rank,
            alpha=1.0,
            dropout=lora_dropout,
            target_modules=target_modules,
            modules_to_save=modules_to_save,
        )
    if quantization is not None:
        quantize(causal_lm, torch.bfloat16, keep=modules_to_save)
    try:
        return model_size(causal_lm), arithmetic
    except UnknownSizeError as error:
        raise ValueError(
            f"{error}, so memory cannot be estimated: try a run of training.max_steps=1, first with "
            "training.activation_checkpointing=full"
        ) from error


# UltraFeedback through Zephyr's template: means of trunk, chosen and rejected; the spread of their logarithms is an
# assumption. SFT sees the trunk and the chosen branch, labels one of the two; a list has all four completions.
TYPICAL = (176.0, 300.0, 280.0)
TYPICAL_LIST = (176.0, 290.0, 290.0, 290.0, 290.0)
SPREAD = 0.8
SAMPLE = 4096


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Examples of a data set, or a sample of them.

    Attributes:
        trunks: int64 [n], tokens.
        branches: int64 [n, K], tokens, all of them scored; 0 for a completion that an example lacks.
        source: where they come from, for the report.
    """

    trunks: np.ndarray
    branches: np.ndarray
    source: str

    @property
    def totals(self) -> np.ndarray:
        """int64 [n], tokens of each example, the trunk once."""
        return self.trunks + self.branches.sum(axis=1)

    @property
    def key_ratio(self) -> float:
        """Keys that attention gathers, over tokens."""
        present = (self.branches > 0).sum(axis=1)
        return float((present * self.trunks + self.branches.sum(axis=1)).sum() / self.totals.sum())


def typical(rows: str) -> tuple[float, ...]:
    """Means of trunk and branches where the data's are not known, of "dpo", "sft", "lists" or "labels"."""
    if rows == "labels":
        return TYPICAL_LIST[:2]
    return TYPICAL_LIST if rows == "lists" else TYPICAL[: 3 if rows == "dpo" else 2]


def parse_means(text: str, rows: str) -> tuple[float, ...]:
    """ "176,300,280": means of trunk and branches, of lists as many branches as are wanted, but two at least.

    Raises ValueError for anything else.
    """
    try:
        means = tuple(float(part) for part in text.split(","))
    except ValueError:
        means = ()
    wanted = len(typical(rows))
    right = len(means) >= 3 if rows == "lists" else len(means) == wanted
    if not right or not all(0 < mean < 1e6 for mean in means):
        count = "3 or more" if rows == "lists" else wanted
        raise ValueError(
            f"--lengths {text}: give {count} mean numbers of tokens, of the trunk and of each branch, as in "
            f"{','.join(f'{mean:g}' for mean in typical(rows))}"
        )
    return means


def mismatched_lengths(lengths: Lengths, max_length: int) -> Lengths:
    """Examples of the same trunks with the next example's only branch, cut as `notus.data.dataset.mismatched` cuts."""
    others = np.minimum(np.roll(lengths.branches, -1, axis=0), max_length - lengths.trunks[:, None])
    return dataclasses.replace(lengths, branches=others)


def draw(means: tuple[float, ...], *, max_length: int, max_prompt_length: int, seed: int = 0) -> Lengths:
    """Log-normal lengths, cut as the data would be, of these means after the cut: the trunk's, then each branch's."""
    normal = np.random.default_rng(seed).standard_normal((SAMPLE, len(means)))
    scale = np.asarray(means)
    for _ in range(8):  # cutting shortens: start from longer ones
        drawn = np.exp(np.log(scale) + SPREAD * normal).round().astype(np.int64).clip(1)
        trunks = drawn[:, 0].clip(max=max_prompt_length)
        branches = np.minimum(drawn[:, 1:], max_length - trunks[:, None])
        scale = scale * means / np.array([trunks.mean(), *branches.mean(axis=0)])
    shown = ", ".join(f"{mean:.0f}" for mean in (trunks.mean(), *branches.mean(axis=0)))
    return Lengths(
        trunks,
        branches,
        f"drawn: log-normal, mean tokens {shown} (trunk, branches), spread {SPREAD}, cut at {max_length}",
    )


def tokenised(rows: "TokenizedDataset") -> Lengths:
    """The true lengths."""
    return Lengths(rows.trunk_lengths, rows.branch_lengths, f"{len(rows)} examples of the data, tokenised")
