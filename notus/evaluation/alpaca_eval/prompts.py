"""AlpacaEval's instructions and the baselines' outputs, from files or from its data set on the hub.

The hub's data set has a loading script, which `datasets` no longer runs, so its JSON files are fetched as they are.
"""

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from notus.data.sources import read_file
from notus.runtime.process import first_line

HUB_ID = "tatsu-lab/alpaca_eval"
# The baselines' outputs by the baselines' names; each file holds the same 805 instructions.
BASELINES = {"text_davinci_003": "alpaca_eval.json", "gpt4_1106_preview": "alpaca_eval_gpt4_baseline.json"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One to answer: where it stands, for errors; its text; and the data set that it comes from."""

    place: str
    text: str
    dataset: str


def hub_instructions() -> list[Instruction]:
    """AlpacaEval's own, 805 in all. Raises ValueError if they cannot be fetched."""
    path = hub_file(BASELINES["text_davinci_003"])
    return [Instruction(place, _text(row, "instruction", place), row["dataset"]) for place, row in _rows(path)]


def read_instructions(path: Path) -> list[Instruction]:
    """Read a .json list or .jsonl file of {instruction, dataset?}; without a data set the file's name is given.

    Raises ValueError, naming file and entry, for what is no instruction, one that is there twice, or an empty file.
    """
    instructions: list[Instruction] = []
    seen: dict[str, str] = {}
    for place, row in _rows(path):
        text = _text(row, "instruction", place)
        if text in seen:
            raise ValueError(f"{place}: the instruction of {seen[text]} again; remove one of them")
        seen[text] = place
        instructions.append(Instruction(place, text, str(row.get("dataset") or path.stem)))
    return instructions


def hub_file(name: str) -> Path:
    """A file of AlpacaEval's data set on the hub, downloaded if need be. Raises ValueError if it cannot be had."""
    try:
        return Path(hf_hub_download(HUB_ID, name, repo_type="dataset"))
    except Exception as error:  # the hub client raises of many kinds
        raise ValueError(
            f"{HUB_ID}: cannot fetch {name} from the hub ({first_line(error)}); give files of your own: "
            "--prompts FILE, and --reference-outputs FILE for a judge"
        ) from error


def read_outputs(path: Path) -> list[dict[str, Any]]:
    """Read a baseline's outputs: a .json list or .jsonl file of {instruction, output, generator}.

    Raises ValueError, naming file and entry, for one without an instruction or an output, or an empty file.
    """
    outputs = []
    for place, row in _rows(path):
        _text(row, "instruction", place)
        _text(row, "output", place, empty=True)
        outputs.append({**row, "generator": str(row.get("generator") or path.stem)})
    return outputs


def match_outputs(outputs: list[dict[str, Any]], instructions: list[Instruction], name: str) -> list[dict[str, Any]]:
    """The baseline's outputs in the order of the instructions. Raises ValueError if it lacks one."""
    by_text = {output["instruction"]: output for output in outputs}
    for instruction in instructions:
        if instruction.text not in by_text:
            raise ValueError(
                f"{name}: holds no output for the instruction of {instruction.place}; give the baseline's "
                "outputs for the same instructions with --reference-outputs FILE"
            )
    return [by_text[instruction.text] for instruction in instructions]


def _rows(path: Path) -> list[tuple[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; check the path")
    rows = list(read_file(path))
    if not rows:
        raise ValueError(f"{path}: the file is empty; give at least one instruction")
    return rows


def _text(row: Any, key: str, place: str, *, empty: bool = False) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {type(row).__name__}, not an object; give objects with the key {key!r}")
    text = row.get(key)
    if not isinstance(text, str) or not (empty or text.strip()):
        raise ValueError(f"{place}: no text under the key {key!r}")
    return text
