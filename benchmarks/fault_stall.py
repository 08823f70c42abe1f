"""How long a checkpoint keeps the training waiting: one rank, a model of 100M parameters, steps of a realistic length.

The same steps are taken with checkpoints and without; the loop's own methods are timed.
`python benchmarks/fault_stall.py OUTCOME.json KIND CONFIG.yaml` is one such run.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fault_ranks import ROOT
from fault_report import table

STEPS, SAVE_EVERY, PAIRS = 5, 2, 8
# As UltraFeedback's: most prompts are short, completions have about 300 tokens.
PROMPT, COMPLETION = (30, 230), (150, 400)
KINDS = {
    "background": (f"--training.save_every={SAVE_EVERY}",),
    "none": (f"--training.save_every={10 * STEPS}",),
}


@dataclasses.dataclass
class Timing:
    """One run.

    Attributes:
        kind: which of `KINDS`.
        parameters: of the model.
        checkpoint_mib: of one checkpoint.
        steps: seconds of each step, saves apart.
        saves: seconds for which the loop stood still, by the number of steps taken before.
        writing: numbers of the steps during which a checkpoint was being written.
    """

    kind: str
    parameters: int
    checkpoint_mib: float
    steps: list[float]
    saves: dict[int, float]
    writing: list[int]


def measure(scratch: Path, seed: int) -> list[Timing]:
    """One run of each kind, each a process of its own."""
    config = _make_inputs(scratch, seed)
    timings = []
    for kind in KINDS:
        outcome = scratch / f"stall-{kind}.json"
        command = [sys.executable, str(Path(__file__)), str(outcome), kind, str(config)]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # all cores
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the {kind} run ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found = json.loads(outcome.read_text())
        timings.append(Timing(**{**found, "saves": {int(step): s for step, s in found["saves"].items()}}))
        print(f"stall, {kind}: steps of {statistics.median(timings[-1].steps):.1f} s", file=sys.stderr, flush=True)
    return timings


def stall_table(timings: list[Timing]) -> str:
    """Seconds per save and per step, and shares of a step's time."""
    plain = statistics.median(next(t.steps for t in timings if t.kind == "none")[1:])
    heading = ("checkpoints", "loop stands still per save, s", "share of a step", "share of the time between saves",
               "step while one is written, s", "other steps, s")  # fmt: skip
    first = timings[0]
    rows = [[t.kind, *_shares(t, plain), *_steps(t)] for t in timings]
    about = (
        f"{first.parameters / 1e6:.0f}M parameters, fp32, RMSprop, 1 rank, {PAIRS} pairs per step (prompts of "
        f"{PROMPT[0]} to {PROMPT[1]} tokens, completions of {COMPLETION[0]} to {COMPLETION[1]}), a checkpoint of "
        f"{first.checkpoint_mib:.0f} MiB every {SAVE_EVERY} steps, a step without any {plain:.1f} s"
    )
    return f"{about}\n\n{table(heading, rows)}"


def _shares(timing: Timing, step: float) -> list[str]:
    saves = [seconds for number, seconds in timing.saves.items() if number < STEPS]  # the last one ends the run
    if not saves:
        return ["", "", ""]
    mean = statistics.mean(saves)
    return [f"{mean:.3f} ({min(saves):.3f} to {max(saves):.3f})", f"{mean / step:.2%}",
            f"{mean / step / SAVE_EVERY:.2%}"]  # fmt: skip


def _steps(timing: Timing) -> list[str]:
    during = [s for number, s in enumerate(timing.steps) if number in timing.writing]
    others = [s for number, s in enumerate(timing.steps) if number not in timing.writing and number]
    return [f"{statistics.median(values):.2f}" if values else "" for values in (during, others)]


def stalled(timings: list[Timing], most: float = 0.02) -> list[str]:
    """What is wrong: the background path keeps the loop waiting for more than a share of a step."""
    plain = statistics.median(next(t.steps for t in timings if t.kind == "none")[1:])
    background = next(t for t in timings if t.kind == "background")
    mean = statistics.mean(s for number, s in background.saves.items() if number < STEPS)
    return (
        [f"a save stops the loop for {mean / plain:.1%} of a step, not under {most:.0%}"] if mean > most * plain else []
    )


def _make_inputs(scratch: Path, seed: int) -> Path:
    import numpy as np
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    import synthetic_setup

    folder = scratch / "stall-model"
    torch.manual_seed(seed)
    MistralForCausalLM(
        MistralConfig(
            vocab_size=synthetic_setup.VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=14,
            num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=2048, sliding_window=None,
        )
    ).save_pretrained(folder)  # fmt: skip
    synthetic_setup._tokenizer().save_pretrained(folder)
    generator = np.random.default_rng(seed)
    bounds = {"prompt": PROMPT, "chosen": COMPLETION, "rejected": COMPLETION}
    with (scratch / "stall.jsonl").open("w") as file:
        for _ in range(PAIRS * STEPS):
            row = {
                key: " " + synthetic_setup._words(generator, int(generator.integers(*b))) for key, b in bounds.items()
            }
            file.write(json.dumps(row) + "\n")
    tree = {
        "model": {"name_or_path": str(folder)},
        "data": {"train": str(scratch / "stall.jsonl"), "max_length": 1024, "cache_dir": str(scratch / "stall-rows")},
        "reference": {"cache_dir": str(scratch / "stall-reference")},
        "training": {"output_dir": str(scratch / "stall-run"), "batch_size": PAIRS, "epochs": 1, "precision": "fp32",
                     "tokens_per_row": 2048, "activation_checkpointing": "none"},
        "tracking": {"samples": 0},
    }  # fmt: skip
    config = scratch / "stall.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def run_one(outcome: Path, kind: str, config: Path) -> None:
    """In a process of its own: train with the loop's methods timed."""
    sys.path.insert(0, str(ROOT))
    from notus.config import load_config
    from notus.training.dpo import run
    from notus.training.trainer import Trainer

    timing = Timing(kind, 0, 0.0, [], {}, [])
    step, save = Trainer._step, Trainer._save

    def timed_step(trainer: Any) -> Any:
        timing.parameters = sum(parameter.numel() for parameter in trainer.policy.parameters())
        before = _written(trainer)
        seconds, result = _timed(lambda: step(trainer))
        if not before:
            timing.writing.append(len(timing.steps))
        timing.steps.append(seconds)
        return result

    def timed_save(trainer: Any) -> None:
        timing.saves[trainer.progress.step], _ = _timed(lambda: save(trainer))

    Trainer._step, Trainer._save = timed_step, timed_save  # type: ignore[method-assign]
    folder = outcome.with_suffix(".run")
    run(load_config([str(config), f"--training.output_dir={folder}", *KINDS[kind]], "dpo"))
    newest = max((folder / "checkpoints").glob("step-*"))
    timing.checkpoint_mib = sum(file.stat().st_size for file in newest.iterdir()) / 2**20
    outcome.write_text(json.dumps(dataclasses.asdict(timing)))


def _written(trainer: Any) -> bool:
    """Whether nothing is being written in the background."""
    writing = trainer.checkpoints._writing
    return writing is None or writing.done()


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    run_one(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
