"""A real model on real pairs: Notus with all weights and with LoRA, and TRL with its fastest settings.

    pip install -r requirements.txt -r requirements-bench.txt
    python benchmarks/real_model.py --model FOLDER --pairs FILE --output DIR [--trl-python PYTHON] [--sides SIDE ...]

The runs are those of configs/smollm2-135m/, one after the other, each in a process of its own. TRL trains all weights
on the same pairs in the same order, with the same optimizer, learning rates and precision. It gets the pairs as text
that the chat template has rendered, so that both sides have the same tokens. This is checked. `notus evaluate` measures
every model on the held-out pairs, and `notus generate` lets each model answer the same prompts. A side whose outcome is
in DIR is not run again. docs/real-model.md shows the result.

--trl-python: the Python of an environment with TRL (default: this one). --search tries TRL's kinds of attention on the
first two steps and takes the faster one. Without it, TRL has its default. --trl-steps ends TRL after that many steps of
the same run, for its seconds and losses alone: the model is then not evaluated.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import GIB, MIB, ROOT, Job, describe_tokens, markdown, write_json

HERE = Path(__file__).resolve().parent
CONFIGS = ROOT / "configs" / "smollm2-135m"
SIDES = {"dpo": "Notus, all weights", "dpo-lora": "Notus, LoRA", "trl": "TRL, all weights"}
# The fastest that vs_trl.py's search found on two cores, but for the attention, where it is close: see `CANDIDATES`.
TRL: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "precompute_ref_log_probs": True,
    "gradient_checkpointing": False,
}
CANDIDATES: tuple[dict[str, Any], ...] = (
    {},
    {"model_init_kwargs": {"attn_implementation": "eager"}},
)
ANSWER_TOKENS = 96
PROMPTS = 6
LONGEST_PROMPT = 300  # characters of a prompt that is answered, all turns together


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A real model on real pairs: see the head of this file.")
    parser.add_argument("--model", required=True, help="a folder in Hugging Face layout")
    parser.add_argument("--pairs", required=True, type=Path, help="a JSON file of preference pairs")
    parser.add_argument("--output", required=True, type=Path, help="a folder for the runs and what was measured")
    parser.add_argument("--trl-python", default=sys.executable, help="Python of an environment that has TRL")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--results", type=Path, help="write what was measured to this JSON file")
    parser.add_argument("--search", action="store_true", help="try TRL's options first, and take the fastest")
    parser.add_argument("--trl-steps", type=int, help="end TRL after that many steps")
    return parser.parse_args()


def overrides(args: argparse.Namespace, side: str) -> list[str]:
    """Return the command-line values by which a config becomes this benchmark's run."""
    return [
        f"--model.name_or_path={args.model}",
        f"--data.train={args.pairs}",
        f"--training.output_dir={args.output / side}",
    ]


# ---- the pairs as TRL gets them ----


def write_pairs(args: argparse.Namespace) -> tuple[Any, list[list[Any]]]:
    """Write `train.jsonl` in the order of the steps, `eval.jsonl`, and `held-out.json` as the source has them.

    Returns the config and what `describe_tokens` says of the training rows, in the order of the steps.
    """
    import numpy as np

    from notus.config import load_config
    from notus.data.batching import StepPlan
    from notus.model.export import load_tokenizer
    from notus.runtime.distributed import process_group
    from notus.training.run_data import load_inputs

    config = load_config([str(CONFIGS / "dpo.yaml"), *overrides(args, "dpo")], "dpo")
    assert config.training.epochs == 1, "the file has the order of one epoch"
    tokenizer = load_tokenizer(Path(args.model), trust_remote_code=False)
    with process_group():
        inputs = load_inputs(config.data, tokenizer, task="dpo", seed=config.training.seed)
    assert inputs.eval is not None
    plan = StepPlan(len(inputs.train), config.training.batch_size, seed=config.training.seed)
    order = np.concatenate([plan.indices(step) for step in range(plan.steps_per_epoch)])
    tokens = []
    for name, rows, indices in (("train", inputs.train, order), ("eval", inputs.eval, np.arange(len(inputs.eval)))):
        lines = []
        for example in rows(indices):
            parts = [example.trunk.tolist(), *(branch.tolist() for branch in example.branches)]
            names = ("prompt", "chosen", "rejected")
            lines.append(json.dumps(dict(zip(names, map(tokenizer.decode, parts), strict=True))))
            if name == "train":
                tokens.append(describe_tokens(*parts))
        (args.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = json.loads(args.pairs.read_text(encoding="utf-8"))
    places = [row_number(inputs.eval.info(index).place) - 1 for index in range(len(inputs.eval))]
    write_json(args.output / "held-out.json", [source[place] for place in places])
    return config, tokens


def row_number(place: str) -> int:
    """Return the number in a place such as `FILE, row 7 (line 2)`."""
    found = re.search(r", row (\d+)( \(line \d+\))?$", place)
    assert found, place
    return int(found[1])


# ---- the runs ----


def call(*command: object) -> None:
    """Run a command of this project to its end; exit if it fails."""
    print("$", *command, file=sys.stderr, flush=True)
    if code := subprocess.run([str(word) for word in command], cwd=ROOT, check=False).returncode:
        sys.exit(code)


def train_notus(args: argparse.Namespace, side: str) -> None:
    job, outcome = args.output / f"{side}-job.json", args.output / f"{side}.json"
    write_json(job, {"config": str(CONFIGS / f"{side}.yaml"), "overrides": overrides(args, side)})
    call(sys.executable, HERE / "real_model_side.py", "notus", job, outcome)


def train_trl(args: argparse.Namespace) -> None:
    config, tokens = write_pairs(args)
    options = {**TRL, **(fastest(args, config) if args.search else {})}
    train = args.output / "train.jsonl"
    if args.trl_steps is not None:  # fewer pairs, but the schedule of the whole run
        options |= {"max_steps": len(tokens) // config.training.batch_size, "last_step": args.trl_steps}
        tokens = tokens[: args.trl_steps * config.training.batch_size]
        lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
        train = args.output / "train-first-steps.jsonl"
        train.write_text("".join(lines[: len(tokens)]), encoding="utf-8")
    outcome = run_trl(args, config, "trl", options, train)
    if outcome["tokens"] != tokens:
        sys.exit("TRL and Notus saw other tokens")


def fastest(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Return the candidate whose second step, of the first two, took the least time for its pairs."""
    steps = (args.output / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    few, seconds = args.output / "probe.jsonl", []
    few.write_text("".join(steps[: 2 * config.training.batch_size]), encoding="utf-8")
    for number, candidate in enumerate(CANDIDATES):
        found = run_trl(args, config, f"probe-{number}", {**TRL, **candidate}, few)
        seconds.append(found["step_seconds"][1])
        print(f"{candidate or TRL}: {seconds[-1]:.1f} s a step", file=sys.stderr, flush=True)
    return CANDIDATES[seconds.index(min(seconds))]


def run_trl(args: argparse.Namespace, config: Any, name: str, options: dict[str, Any], train: Path) -> dict[str, Any]:
    """Train with TRL in `output/name`, and return the outcome."""
    training, pairs = config.training, options["per_device_train_batch_size"]
    job = Job(
        model=args.model,
        pairs=str(train),
        scratch=str(args.output / name),
        batch_size=training.batch_size,
        epochs=training.epochs,
        precision=training.precision,
        learning_rate=training.learning_rate,
        max_length=config.data.max_length,
        options={
            **options,
            "optim": "adamw_torch",
            "precompute_ref_batch_size": pairs,
        },
    )
    job.write(args.output / f"{name}-job.json")
    outcome = args.output / f"{name}.json"
    call(args.trl_python, HERE / "real_model_side.py", "trl", args.output / f"{name}-job.json", outcome)
    return dict(json.loads(outcome.read_text()))


# ---- what they learned ----


def measure(args: argparse.Namespace, side: str) -> None:
    """Evaluate on the held-out pairs and answer the prompts, unless both are there."""
    model = args.output / side / "model" if side == "trl" else args.output / side
    evaluation = args.output / f"{side}-evaluation.json"
    if not evaluation.is_file():
        held_out = args.output / "held-out.json"
        of_trl = ["--base", args.model, "--pairs", held_out, "--max-length", "640", "--precision", "fp32"]
        call(
            *(sys.executable, "-m", "notus", "evaluate", model, "--output", evaluation),
            *(of_trl if side == "trl" else []),
        )
    answer(args, side, model)


def answer(args: argparse.Namespace, name: str, model: object) -> None:
    """Let a model answer the first short prompts of the held-out pairs, greedily."""
    prompts, answers = args.output / "prompts.json", args.output / f"{name}-answers.jsonl"
    if not prompts.is_file():
        rows = json.loads((args.output / "held-out.json").read_text(encoding="utf-8"))
        turns = [row["conversations"] for row in rows]
        short = [each for each in turns if sum(len(turn["value"]) for turn in each) <= LONGEST_PROMPT]
        write_json(prompts, [{"conversations": each} for each in short[:PROMPTS]])
    if not answers.is_file():
        call(
            *(sys.executable, "-m", "notus", "generate", model, prompts, answers),
            *("--max-new-tokens", ANSWER_TOKENS, "--precision", "fp32"),
        )


def table(args: argparse.Namespace) -> str:
    """Return the table of docs/real-model.md, of the sides that have run."""
    from notus.real_demo import measured

    columns = {}
    for side in SIDES:
        if (args.output / f"{side}-evaluation.json").is_file():
            outcome = json.loads((args.output / f"{side}.json").read_text())
            result = json.loads((args.output / f"{side}-evaluation.json").read_text())
            columns[side] = dict([*_costs(outcome), *measured(result)])
    first = next(iter(columns.values()))
    rows = [[title, *(column[title] for column in columns.values())] for title in first]
    return markdown(["", *(SIDES[side] for side in columns)], rows)


def results(args: argparse.Namespace) -> dict[str, Any]:
    """Return what each side that has run measured, without rows and answers."""
    found = {}
    for side in SIDES:
        if (args.output / f"{side}.json").is_file():
            outcome = json.loads((args.output / f"{side}.json").read_text())
            outcome.pop("tokens", None)
            found[side] = outcome
            evaluation = args.output / f"{side}-evaluation.json"
            if evaluation.is_file():
                result = json.loads(evaluation.read_text())
                names = ("num_rows", "precision", "beta", "loss", "overall", "rewards/chosen", "rewards/rejected")
                outcome["held_out"] = {name: result[name] for name in names}
    return found


def _costs(outcome: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "seconds: reference pass", f"{outcome['reference_seconds']:.0f}"
    yield "seconds: training", f"{outcome['training_seconds']:.0f}"
    yield "seconds: whole run, with loading, evaluation and saving", f"{outcome['total_seconds']:.0f}"
    yield "peak memory", f"{outcome['peak_mib'] * MIB / GIB:.1f} GiB"


def compare(args: argparse.Namespace) -> str:
    """Return loss and seconds of the steps that both sides made, and the largest difference of a step's loss."""
    notus, trl = (json.loads((args.output / f"{side}.json").read_text()) for side in ("dpo", "trl"))
    steps = range(len(trl["losses"]))
    lines = [f"step {step + 1:3}: {notus['losses'][step]:.5f} {trl['losses'][step]:.5f}" for step in steps]
    largest = max(abs(notus["losses"][step] - trl["losses"][step]) for step in steps)
    seconds = [sum(outcome["step_seconds"][step] for step in steps) for outcome in (notus, trl)]
    return "\n".join(
        [
            *lines,
            f"largest difference of a step's loss: {largest:.2g}",
            f"seconds of these steps: Notus {seconds[0]:.1f}, TRL {seconds[1]:.1f}",
        ]
    )


def main() -> None:
    args = parse_arguments()
    args.output, args.pairs = args.output.resolve(), args.pairs.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "held-out.json").is_file():
        write_pairs(args)
    answer(args, "before", args.model)
    for side in args.sides:
        if not (args.output / f"{side}.json").is_file():
            train_trl(args) if side == "trl" else train_notus(args, side)
        if side != "trl" or args.trl_steps is None:
            measure(args, side)
    print(table(args))
    if args.results:
        write_json(args.results, results(args))
    if all((args.output / f"{side}.json").is_file() for side in ("dpo", "trl")):
        print(compare(args))


if __name__ == "__main__":
    main()
