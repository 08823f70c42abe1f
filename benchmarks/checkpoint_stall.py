"""How long a checkpoint keeps the training waiting: `python benchmarks/checkpoint_stall.py [--results FILE.md]`.

One rank, a model of 111M parameters, steps of a realistic length. The same steps are taken with checkpoints and
without, each run a process of its own. Exit code 1: a save stops the loop for more than 2% of a step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common import MIB, ROOT, VOCABULARY, make_model, markdown

STEPS, SAVE_EVERY, PAIRS = 5, 2, 8
PROMPT, COMPLETION = (30, 230), (150, 400)  # as UltraFeedback's: most prompts are short
KINDS = {"background": SAVE_EVERY, "none": 10 * STEPS}  # training.save_every
SHAPE = {"vocab_size": VOCABULARY, "num_hidden_layers": 14, "num_key_value_heads": 12}
MOST = 0.02  # of a step


def make_inputs(folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Write model and pairs; return the config."""
    make_model(folder / "model", seed, "100m", **SHAPE)
    generator = np.random.default_rng(seed)
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(PAIRS * STEPS):
            counts = [int(generator.integers(*bounds)) for bounds in (PROMPT, COMPLETION, COMPLETION)]
            texts = [" ".join(f"w{word}" for word in generator.integers(0, VOCABULARY - 3, size=n)) for n in counts]
            file.write(json.dumps({"prompt": texts[0], "chosen": f" {texts[1]}", "rejected": f" {texts[2]}"}) + "\n")
    return {
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": 1024, "cache_dir": str(folder / "rows")},
        "reference": {"cache_dir": str(folder / "reference")},
        "training": {"batch_size": PAIRS, "epochs": 1, "precision": "fp32", "tokens_per_row": 2048,
                     "activation_checkpointing": "none"},
        "tracking": {"samples": 0},
    }  # fmt: skip


def run_one(config: Path) -> dict[str, Any]:
    """Train with the loop's methods timed: seconds of each step, of each save, and the steps beside a write."""
    from notus.config import load_config
    from notus.training.dpo import run
    from notus.training.trainer import Trainer

    found: dict[str, Any] = {"steps": [], "saves": [], "writing": []}
    step, save = Trainer._step, Trainer._save

    def timed_step(trainer: Any, *arguments: Any) -> Any:
        found["parameters"] = sum(parameter.numel() for parameter in trainer.policy.parameters())
        writing = trainer.checkpoints._writing
        if writing is not None and not writing.done():
            found["writing"].append(len(found["steps"]))
        began = time.perf_counter()
        result = step(trainer, *arguments)
        found["steps"].append(time.perf_counter() - began)
        return result

    def timed_save(trainer: Any) -> None:
        began = time.perf_counter()
        save(trainer)
        if trainer.progress.step < STEPS:  # the last one ends the run
            found["saves"].append(time.perf_counter() - began)

    Trainer._step, Trainer._save = timed_step, timed_save  # type: ignore[method-assign]
    loaded = load_config([str(config)], "dpo")
    run(loaded)
    newest = max((Path(loaded.training.output_dir) / "checkpoints").glob("step-*"))
    return {**found, "mib": sum(file.stat().st_size for file in newest.iterdir()) / MIB}


def table(found: dict[str, dict[str, Any]], plain: float) -> str:
    """Seconds per save and per step, and shares of `plain`, the seconds of a step without checkpoints."""
    first, rows = found["background"], []
    for kind, run in found.items():
        saves, shares = run["saves"], ["", "", ""]
        if saves:
            mean = statistics.mean(saves)
            shares = [f"{mean:.3f} ({min(saves):.3f} to {max(saves):.3f})", f"{mean / plain:.2%}",
                      f"{mean / plain / SAVE_EVERY:.2%}"]  # fmt: skip
        during = [seconds for number, seconds in enumerate(run["steps"]) if number in run["writing"]]
        others = [seconds for number, seconds in enumerate(run["steps"]) if number not in run["writing"] and number]
        rows.append([kind, *shares, *(f"{statistics.median(x):.2f}" if x else "" for x in (during, others))])
    heads = ("checkpoints", "loop stands still per save, s", "share of a step", "share of the time between saves",
             "step while one is written, s", "other steps, s")  # fmt: skip
    return (
        f"{first['parameters'] / 1e6:.0f}M parameters, fp32, RMSprop, 1 rank, {PAIRS} pairs per step (prompts of "
        f"{PROMPT[0]} to {PROMPT[1]} tokens, completions of {COMPLETION[0]} to {COMPLETION[1]}), a checkpoint of "
        f"{first['mib']:.0f} MiB every {SAVE_EVERY} steps, a step without any {plain:.1f} s\n\n{markdown(heads, rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tree = make_inputs(folder, args.seed)
        for kind, save_every in KINDS.items():
            tree["training"] |= {"output_dir": str(folder / kind), "save_every": save_every}
            (folder / f"{kind}.yaml").write_text(yaml.safe_dump(tree))
            command = [sys.executable, __file__, "--one", str(folder / f"{kind}.yaml")]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
    plain = statistics.median(found["none"]["steps"][1:])
    shown = table(found, plain)
    print(shown)
    if args.results:
        args.results.write_text(shown + "\n")
    if statistics.mean(found["background"]["saves"]) > MOST * plain:
        sys.exit(f"a save stops the loop for more than {MOST:.0%} of a step")


if __name__ == "__main__":
    main()
