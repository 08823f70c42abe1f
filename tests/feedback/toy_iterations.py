"""Iterations of toys: a model of random weights, a judge that counts letters, and stages run within this process."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from toys import toy_model, toy_tokenizer

import notus.__main__ as entry
from notus.config import dump_yaml

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
JUDGE = '''
def rate(prompt, completions):
    """More letters e, more stars."""
    return [1 + min(4, completion.count("e")) for completion in completions]


def flat(prompt, completions):
    return [3 for _ in completions]


def shy(prompt, completions):
    """No rating where the prompt says so."""
    return [None if "hello" in prompt else 1 + min(4, c.count("e")) for c in completions]
'''
WORDS = ["fox", "dog", "sea", "poem", "hello", "world", "answer", "question", "brown", "lazy"]


def write_start(folder: Path, seed: int = 0) -> Path:
    """Write a toy chat model."""
    toy_model(seed=seed, scale=2.0).save_pretrained(folder)
    toy_tokenizer(chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int, *, first: int = 0) -> Path:
    """Write different prompts, one a line."""
    lines = [f"{WORDS[n % 10]} {WORDS[n // 10 % 10]} {n}" for n in range(first, first + count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def tree(folder: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """The config of two small rounds below `folder`; changes are written section__key=value, None to remove a key."""
    (folder / "judge.py").write_text(JUDGE)
    config: dict[str, dict[str, Any]] = {
        "iterate": {
            "prompts": str(folder / "prompts.txt"), "eval_prompts": str(folder / "eval.txt"), "rounds": 2,
            "prompts_per_round": 6, "kl_samples": 4,
        },
        "sample": {"n": 3, "max_new_tokens": 8, "batch_size": 32},
        "rate": {"judge_function": f"{folder / 'judge.py'}:rate"},
        "curate": {},
        "model": {"name_or_path": str(folder / "start")},
        "data": {"max_length": 120, "eval_size": 1, "cache_dir": str(folder / "cache")},
        "training": {
            "output_dir": str(folder / "out"), "batch_size": 2, "epochs": 1, "tokens_per_row": 400, "precision": "fp32",
            "learning_rate": 1e-3, "activation_checkpointing": "none", "warmup_ratio": 0.0,
        },
        "dpo": {"beta": 0.1},
        "tracking": {"samples": 0},
    }  # fmt: skip
    for place, value in changes.items():
        section, key = place.split("__")
        config.setdefault(section, {})[key] = value
        if value is None:
            del config[section][key]
    return config


def write_config(path: Path, config: dict[str, dict[str, Any]]) -> str:
    """Write a config and return its path."""
    path.write_text(dump_yaml(config))
    return str(path)


def in_process(words: Sequence[str], spread: bool) -> int:
    """Run a stage's command in this process, as its own process would: errors are printed, exit codes returned."""
    return entry.main(list(words))


class Counting:
    """A runner that notes its commands; `before` may do something ahead of one, by its name."""

    def __init__(self, before: Callable[[Sequence[str]], int | None] = lambda words: None) -> None:
        self.commands: list[list[str]] = []
        self.before = before

    def __call__(self, words: Sequence[str], spread: bool) -> int:
        self.commands.append(list(words))
        code = self.before(words)
        return in_process(words, spread) if code is None else code

    @property
    def names(self) -> list[str]:
        return [words[0] for words in self.commands]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
