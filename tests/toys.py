"""Tiny models and tokenizers, made in process, for the tests."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from notus.data.packing import Example

TEXT = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France?",
    "<|user|> <|assistant|> <|system|> Write a poem about the sea, please! Yes, no, 12 + 30 = 42.",
    "user assistant system hello world héllo wörld 你好 🙂 chosen rejected prompt answer question",
]


def assets_dir() -> Path | None:
    """The folder of optional real test data (NOTUS_ASSETS, or ../shared/assets beside the checkout), if present."""
    default = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("NOTUS_ASSETS", default))
    return folder if folder.is_dir() else None


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, as a share of the expected norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Sequence[int] = (1, 7, 30, 55, 4, 99)) -> torch.Tensor:
    """The logits of one conversation."""
    return model(torch.tensor([list(ids)])).logits


def toy_example(
    rng: np.random.Generator, index: int, trunk: int, branches: Sequence[int], masks: Sequence[Any] | None = None
) -> Example:
    """Random tokens of these lengths; without masks every token of a branch is learned."""
    masks = masks or [[1] * length for length in branches]
    return Example(
        index,
        rng.integers(3, 400, trunk),
        tuple(rng.integers(3, 400, length) for length in branches),
        tuple(np.array(mask, dtype=bool) for mask in masks),
    )


def toy_examples(*lengths: tuple[int, Sequence[int]]) -> list[Example]:
    """Examples with a trunk and branches of these lengths."""
    rng = np.random.default_rng(0)
    return [toy_example(rng, index, *each) for index, each in enumerate(lengths)]


def toy_tokenizer(
    *, bos: bool = True, chat_template: str | None = None, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `bos` decides whether its post-processor puts `<s>` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", bos_token="<s>" if bos else None
    )
    fast.chat_template = chat_template
    return fast


def toy_config(kind: str = "mistral", **overrides: object) -> transformers.PreTrainedConfig:
    """A two-layer config of one of the kinds below, with grouped-query attention."""
    classes = {
        "mistral": transformers.MistralConfig,
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma": transformers.GemmaConfig,
        "phi3": transformers.Phi3Config,
        "opt": transformers.OPTConfig,
    }
    settings: dict[str, object] = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if kind == "mistral":
        settings["sliding_window"] = None
    return classes[kind](**{**settings, **overrides})


def toy_model(kind: str = "mistral", *, seed: int = 0, scale: float = 4.0, **overrides: object) -> torch.nn.Module:
    """A randomly initialised causal LM, its matrices scaled up so that its predictions are far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(toy_config(kind, **overrides), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.eval()


class Root(torch.nn.Module):
    """A wrapper with the prefix that FSDP's root gives, as the policy is."""

    def __init__(self, causal_lm: torch.nn.Module) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.causal_lm(ids).logits


# Parameters of 401, 49 and 33 rows divide by no number of ranks.
UNEVEN = {"vocab_size": 401, "intermediate_size": 49, "hidden_size": 33, "tie_word_embeddings": True}


def toy_model_folder(
    folder: Path, kind: str = "mistral", *, bos: bool = True, seed: int = 0, **overrides: object
) -> Path:
    """Write a toy model and its tokenizer to `folder` in Hugging Face layout."""
    toy_model(kind, seed=seed, **overrides).save_pretrained(folder)
    toy_tokenizer(bos=bos).save_pretrained(folder)
    return folder
