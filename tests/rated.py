"""Rated data for the tests of training: pairs with ratings, lists, labelled completions."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs import words


def _write(path: Path, count: int, row: Callable[[random.Random], dict[str, Any]], seed: int) -> Path:
    generator = random.Random(seed)
    path.write_text("".join(json.dumps(row(generator)) + "\n" for _ in range(count)))
    return path


def _completion(generator: random.Random) -> str:
    return " " + words(generator, 1, 7)


def write_rated_pairs(path: Path, count: int, *, seed: int = 0, shift: float = 0.0) -> Path:
    """JSONL pairs with ratings from 1 to 5; `shift` is added to those of the chosen."""

    def row(generator: random.Random) -> dict[str, Any]:
        return {
            "prompt": words(generator, 1, 9),
            "chosen": _completion(generator),
            "rejected": _completion(generator),
            "chosen-rating": generator.randint(3, 5) + shift,
            "rejected-rating": generator.randint(1, 2),
        }

    return _write(path, count, row, seed)


def write_lists(path: Path, count: int, *, seed: int = 0, most: int = 4, shift: float = 0.0) -> Path:
    """JSONL lists of 2 to `most` completions with ratings from 1 to 5, of which some are equal; `shift` is added."""

    def row(generator: random.Random) -> dict[str, Any]:
        size = generator.randint(2, most)
        return {
            "prompt": words(generator, 1, 9),
            "completions": [_completion(generator) for _ in range(size)],
            "ratings": [generator.randint(1, 5) + shift for _ in range(size)],
        }

    return _write(path, count, row, seed)


def write_labels(path: Path, count: int, *, seed: int = 0, good: float = 0.5, swap: bool = False) -> Path:
    """JSONL completions with labels, of which the share `good` is good; `swap` swaps the labels."""

    def row(generator: random.Random) -> dict[str, Any]:
        prompt, completion = words(generator, 1, 9), _completion(generator)
        return {"prompt": prompt, "completion": completion, "label": (generator.random() < good) != swap}

    return _write(path, count, row, seed)
