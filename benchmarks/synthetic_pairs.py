"""The made pairs: random words, by default prompts of about 125 tokens and completions of about 45. No torch here."""

import json
from pathlib import Path

import numpy as np

VOCABULARY = 8_000  # words in the pairs, whatever the model's size
MEAN_PROMPT, MEAN_COMPLETION = 125, 45
# Standard deviation of the logarithm of the lengths. 300 real pairs (Capybara, Orca, UltraFeedback) have 1.5
# for prompts, 1.1 to 1.3 for completions, and a correlation of 0.45 between them. The narrower spread
# here leaves the peer less padding.
LOG_SPREAD = 0.7
CORRELATION = 0.45
LONGEST_PROMPT, LONGEST_COMPLETION = 512, 256


def make_pairs(
    path: Path,
    count: int,
    seed: int,
    *,
    prompt: int = MEAN_PROMPT,
    completion: int = MEAN_COMPLETION,
    spread: float = LOG_SPREAD,
) -> None:
    """Write `count` pairs of random words as JSONL; lengths are log-normal, or all the same at a `spread` of 0."""
    generator = np.random.default_rng(seed)
    covariance = np.array([[1, 0, 0], [0, 1, CORRELATION], [0, CORRELATION, 1]])
    normal = generator.multivariate_normal(np.zeros(3), covariance, size=count)
    # <s> and </s> are tokens too
    means = np.array([prompt, completion, completion]) - 1
    lengths = np.exp(np.log(means) - spread**2 / 2 + spread * normal)
    longest = np.maximum(3 * means, [LONGEST_PROMPT, LONGEST_COMPLETION, LONGEST_COMPLETION])
    lengths = np.clip(lengths.round().astype(int), 2, longest)
    with path.open("w") as file:
        for words, chosen, rejected in lengths:
            pair = {
                "prompt": _words(generator, words),
                "chosen": " " + _words(generator, chosen),
                "rejected": " " + _words(generator, rejected),
            }
            file.write(json.dumps(pair) + "\n")


def _words(generator: np.random.Generator, count: int) -> str:
    return " ".join(f"w{number}" for number in generator.integers(0, VOCABULARY - 3, size=count))
