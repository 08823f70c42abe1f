"""The default model and pairs: 15.6M parameters, prompts of about 125 tokens, completions of about 45.

`python synthetic_setup.py MODEL_FOLDER PAIRS_FILE NUM_PAIRS SEED`: a process of its own, as the parent of
the benchmark imports no torch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 8_000
MEAN_PROMPT, MEAN_COMPLETION = 125, 45
# Standard deviation of the logarithm of the lengths. 300 real pairs (Capybara, Orca, UltraFeedback) have 1.5
# for prompts, 1.1 to 1.3 for completions, and a correlation of 0.45 between them. The narrower spread
# here leaves the peer less padding.
LOG_SPREAD = 0.7
CORRELATION = 0.45
LONGEST_PROMPT, LONGEST_COMPLETION = 512, 256


def make_model(folder: Path, seed: int) -> None:
    """Write a randomly initialised Mistral-architecture model and its tokenizer to `folder`."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per word `w0`, `w1`, ...: the text fixes the token ids, whoever tokenises it."""
    specials = ["<unk>", "<s>", "</s>"]
    words = specials + [f"w{number}" for number in range(VOCABULARY - len(specials))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_pairs(path: Path, count: int, seed: int) -> None:
    """Write `count` pairs of random words with log-normal lengths as JSONL."""
    generator = np.random.default_rng(seed)
    covariance = np.array([[1, 0, 0], [0, 1, CORRELATION], [0, CORRELATION, 1]])
    normal = generator.multivariate_normal(np.zeros(3), covariance, size=count)
    # <s> and </s> are tokens too
    means = np.array([MEAN_PROMPT, MEAN_COMPLETION, MEAN_COMPLETION]) - 1
    lengths = np.exp(np.log(means) - LOG_SPREAD**2 / 2 + LOG_SPREAD * normal)
    longest = [LONGEST_PROMPT, LONGEST_COMPLETION, LONGEST_COMPLETION]
    lengths = np.clip(lengths.round().astype(int), 2, longest)
    with path.open("w") as file:
        for prompt, chosen, rejected in lengths:
            pair = {
                "prompt": _words(generator, prompt),
                "chosen": " " + _words(generator, chosen),
                "rejected": " " + _words(generator, rejected),
            }
            file.write(json.dumps(pair) + "\n")


def _words(generator: np.random.Generator, count: int) -> str:
    return " ".join(f"w{number}" for number in generator.integers(0, VOCABULARY - 3, size=count))


def main() -> None:
    folder, pairs, count, seed = sys.argv[1:]
    make_model(Path(folder), int(seed))
    make_pairs(Path(pairs), int(count), int(seed))


if __name__ == "__main__":
    main()
