"""Which prompts each round of `notus iterate` trains on: none twice, and none that the rounds are compared on."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from notus.evaluation.prompts import Prompt, read_prompts
from notus.runtime.files import write_text


@dataclasses.dataclass(frozen=True)
class Pool:
    """The prompts that rounds may draw from.

    Attributes:
        path: their file.
        prompts: by a digest of what the model sees, in the file's order; each text once.
        repeated: rows of the file that repeat an earlier prompt.
        held_out: different prompts of the file that are evaluation prompts, and so are not among these.
    """

    path: Path
    prompts: Mapping[str, Prompt]
    repeated: int
    held_out: int

    def check(self, rounds: int, per_round: int, used: int = 0) -> None:
        """Raise ValueError, with the numbers and what to change, unless so many rounds more can be drawn.

        `used`: prompts that earlier rounds took.
        """
        left = len(self.prompts) - used
        if left >= rounds * per_round and per_round:
            return
        reasons = [
            f"{count} {what}"
            for count, what in (
                (self.repeated, "repeated"),
                (self.held_out, "also in iterate.eval_prompts"),
                (used, "used by earlier rounds"),
            )
            if count
        ]
        without = f" (without those {', '.join(reasons)})" if reasons else ""
        raise ValueError(
            f"iterate.prompts={self.path}: {left} prompts{without} are too few for {rounds} rounds of "
            f"{max(per_round, 1)}: add prompts, or set iterate.prompts_per_round={max(1, left // rounds)} or fewer "
            "iterate.rounds"
        )

    def draw(self, number: int, count: int, used: Iterable[str], seed: int) -> list[Prompt]:
        """Return the prompts of a round: `count` of those that no earlier round `used`, in a random order."""
        taken = set(used)
        left = [prompt for key, prompt in self.prompts.items() if key not in taken]
        return random.Random(f"round {number} of {seed}").sample(left, count)


def read_pool(path: Path, eval_prompts: Path | None) -> Pool:
    """Read the prompts to train on, without those to evaluate on. Raises ValueError, naming file and line."""
    rows = read_prompts(path, strings_are_turns=True)
    held_out = keys_of(eval_prompts) if eval_prompts is not None else set()
    different = {prompt_key(prompt): prompt for prompt in reversed(rows)}  # the first of equal ones stays
    kept = {key: prompt for key, prompt in reversed(different.items()) if key not in held_out}
    return Pool(path, kept, repeated=len(rows) - len(different), held_out=len(different) - len(kept))


def keys_of(path: Path) -> set[str]:
    """Return the digests of a file's prompts. Raises ValueError, naming file and line."""
    return {prompt_key(prompt) for prompt in read_prompts(path, strings_are_turns=True)}


def prompt_key(prompt: Prompt) -> str:
    """Return a digest of what a model sees of a prompt; template settings do not make it another one."""
    seen = json.dumps([prompt.turns, prompt.tools], sort_keys=True, default=str)
    return hashlib.sha256(seen.encode()).hexdigest()


def write_prompts(path: Path, prompts: Sequence[Prompt], source: Path, template_kwargs: Mapping[str, Any]) -> None:
    """Write prompts as JSON lines, each with its source and the template settings that training will use.

    Args:
        path: the file to write; its folder is made.
        prompts: the prompts.
        source: the file that they come from, whose name stands for prompts without a source of their own.
        template_kwargs: `data.chat_template_kwargs`; those of a row itself win, as in training.
    """
    lines = [_line(prompt, source, template_kwargs) for prompt in prompts]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in lines))


def _line(prompt: Prompt, source: Path, template_kwargs: Mapping[str, Any]) -> str:
    row = {"source": source.name, **prompt.row}
    if merged := {**template_kwargs, **prompt.template_kwargs}:
        row["chat_template_kwargs"] = merged
    try:
        return json.dumps(row, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"{prompt.place}: cannot be written as JSON ({error}): convert the file to JSON") from error
