"""`notus demo --real`: DPO of a small published chat model on published pairs, on a CPU, with one command.

DIR/dpo/ or DIR/dpo-lora/: the run, with its evaluation and its report. The settings are those of
`configs/smollm2-135m/`; a test holds the two together.
"""

import argparse
import importlib.util
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.__main__ import run_command
from notus.runtime.command_line import called_as

if TYPE_CHECKING:
    from notus.config import Config

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAIRS = ("llamafactory/demo_data", "dpo_en_demo.json")  # a dataset of the hub, and its file
OUTPUT = "runs/smollm2-135m"
# As configs/smollm2-135m/ has them, but for the paths and the seed.
DATA: dict[str, Any] = {"eval_size": 45, "max_length": 640, "too_long": "drop"}
TRAINING: dict[str, Any] = {
    "batch_size": 8,
    "tokens_per_row": 2048,
    "epochs": 1,
    "learning_rate": 5e-6,
    "lr_schedule": "linear",
    "warmup_ratio": 0.1,
    "optimizer": "adamw",
    "precision": "fp32",
    "activation_checkpointing": "none",
    "log_every": 1,
}
TRACKING: dict[str, Any] = {"samples": 4, "sample_tokens": 96}
LORA: dict[str, Any] = {"rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
LORA_LEARNING_RATE = 2e-4

_WIDTH = 100
_PROMPT = 240  # characters of a prompt's end that are shown


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, write the report, print a table with answers, return 0. What is done already is not repeated.

    Raises ValueError where the model or the pairs can't be had, and for a folder that holds another run.
    """
    from notus.training import dpo

    model, pairs = find_inputs(args.model, args.pairs)
    config = settings(model, pairs, Path(args.output), lora=args.lora, seed=args.seed)
    folder = Path(config.training.output_dir)
    _announce(f"DPO of {model} on {pairs}, {'LoRA' if args.lora else 'all weights'}: a few minutes on two cores")
    if code := dpo.run(config):
        sys.exit(code)  # a signal ended the run; the same command resumes it
    evaluation = folder.with_name(f"{folder.name}-evaluation.json")
    if not evaluation.is_file():
        _announce("evaluation on the pairs that were held out")
        run_command("evaluate", folder, "--output", evaluation)
    if importlib.util.find_spec("plotly"):
        _announce("report")
        run_command("report", folder)
    print(summary(folder, evaluation))
    return 0


def find_inputs(model: str | None, pairs: str | None) -> tuple[str, str]:
    """Return what `model.name_or_path` and `data.train` get. Without names, the defaults are downloaded.

    Raises ValueError, in one line with what to pass instead, for what can be neither found nor downloaded.
    """
    from notus.model.load import resolve_model_folder

    try:
        resolve_model_folder(model or MODEL)
    except ValueError as error:
        raise ValueError(f"{error}; without a network give local paths: --model FOLDER --pairs FILE") from error
    return model or MODEL, pairs or _download_pairs()


def _download_pairs() -> str:
    from huggingface_hub import hf_hub_download

    repository, file = PAIRS
    try:
        return hf_hub_download(repository, file, repo_type="dataset")
    except OSError as error:  # the hub's own errors are OSErrors too
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{repository}/{file}: cannot be downloaded ({reason}); give pairs of your own: --pairs FILE"
        ) from error


def settings(model: str, pairs: str, output: Path, *, lora: bool, seed: int) -> "Config":
    """Return the config of the run `output/dpo`, or of `output/dpo-lora`."""
    from notus.config import config_from_dict

    training = {**TRAINING, "seed": seed, "output_dir": str(output / ("dpo-lora" if lora else "dpo"))}
    tree: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": model},
        "data": {**DATA, "train": pairs},
        "training": training,
        "dpo": {"beta": 0.1, "loss_type": "sigmoid"},
        "tracking": TRACKING,
    }
    if lora:
        training["learning_rate"] = LORA_LEARNING_RATE
        tree["lora"] = LORA
    return config_from_dict(tree, "dpo", source="the demo's settings")


def _announce(stage: str) -> None:
    print(f"\n== {stage}", flush=True)


def summary(folder: Path, evaluation: Path) -> str:
    """Return a table of what the run learned, with the answers before and after to the same held-out prompts."""
    result = json.loads(evaluation.read_text(encoding="utf-8"))
    lines = ["", *(f"{title:34}{value}" for title, value in measured(result)), ""]
    report = folder / "report.html"
    where = (
        f"report: {report}" if report.is_file() else f"report: pip install plotly, then {called_as('report')} {folder}"
    )
    return "\n".join([*lines, *_answers(folder), where])


def measured(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield title and figure of what `notus evaluate --output` wrote, with 95% intervals."""
    overall = result["overall"]
    low, high = overall["accuracy_interval"]
    least, most = overall["margin_interval"]
    yield "held-out pairs", f"{overall['count']}"
    yield "held-out loss (before: 0.693)", f"{result['loss']:.3f}"
    yield "reward accuracy (before: 50%)", f"{overall['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%})"
    yield "reward margin (before: 0)", f"{overall['margin']:.3f} (95% interval {least:.3f} to {most:.3f})"
    for side in ("chosen", "rejected"):
        yield f"log-prob change, {side}", f"{result[f'rewards/{side}'] / result['beta']:+.2f} nats"


def _answers(folder: Path) -> Iterator[str]:
    """Yield the prompts that the run completed at its start and at its end, with both answers."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    last = max(row["step"] for row in rows)
    after = {row["index"]: row["completion"] for row in rows if row["step"] == last}
    for row in rows:
        if row["step"] == 0 and row["index"] in after:
            for title, text in (
                ("prompt", row["prompt"].strip()[-_PROMPT:]),
                ("before", row["completion"]),
                ("after", after[row["index"]]),
            ):
                yield textwrap.fill(
                    " ".join(text.split()), _WIDTH, initial_indent=f"{title:8}", subsequent_indent=" " * 8
                )
            yield ""
