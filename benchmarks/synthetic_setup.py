"""The made models: `python synthetic_setup.py MODEL_FOLDER SEED SIZE`, a process of its own, as the parent of the
benchmark imports no torch.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from synthetic_pairs import VOCABULARY

# 15.6M, 100.1M and 1.1B parameters (the last is for a GPU)
SIZES: dict[str, dict[str, Any]] = {
    "15m": {
        "vocab_size": 8_000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "100m": {
        "vocab_size": 16_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "1b": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}


def make_model(folder: Path, seed: int, size: str = "15m") -> None:
    """Write a randomly initialised Mistral-architecture model and its tokenizer to `folder`."""
    torch.manual_seed(seed)
    MistralForCausalLM(model_config(size)).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def model_config(size: str) -> MistralConfig:
    return MistralConfig(
        **SIZES[size],
        head_dim=64,
        max_position_embeddings=2048,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per word `w0`, `w1`, ...: the text fixes the token ids, whoever tokenises it."""
    specials = ["<unk>", "<s>", "</s>"]
    words = specials + [f"w{number}" for number in range(VOCABULARY - len(specials))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    folder, seed, size = sys.argv[1:]
    make_model(Path(folder), int(seed), size)
