"""Notus's claim in small: pairs chosen by mean ratings against pairs chosen by a faulty overall score.

    python benchmarks/ratings_vs_critique.py --results FILE.json --plot FILE.svg
    python benchmarks/ratings_vs_critique.py --stored FILE.json --plot FILE.svg    # draws again, runs nothing

The data are `notus/curation/synthetic.py`'s, whose judge knows the answers; the recipe is the demo's. For each seed
one model is trained with SFT; from it, DPO on the pairs of the mean ratings, and DPO on those of the overall score at
each fault rate: the share of scores of 1 that are stored as 10. The ratings' pairs do not depend on the fault rate
(asserted), so that rule is trained once per seed. Prompts, completions, ratings, seeds and steps are equal.

Prints a table in Markdown; `--results` writes it beside the JSON. A finished run leaves its result in the work folder,
with digests of what went into it, and is not repeated: a launch that was killed resumes with the same command, and
`--seeds 0` in one process beside `--seeds 1` in another fill the same work folder.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import write_json
from notus import demo
from notus.config import Task, config_from_dict
from notus.curation import synthetic
from notus.curation.ultrafeedback import Report, curate
from notus.runtime.files import write_text
from ratings_vs_critique_report import draw, table

Rows = list[dict[str, Any]]
SFT: dict[str, Any] = {**demo.SFT, "save_every": 100}
DPO: dict[str, Any] = demo.DPO
HARD = {f"synthetic_{task.name}" for task in synthetic.TASKS if task.hard}


@dataclasses.dataclass(frozen=True)
class Size:
    """Numbers of prompts, and of DPO's steps. The demo's, but for the held-out prompts and the fixed steps."""

    sft: int = demo.SIZES["sft"]
    preferences: int = demo.SIZES["preferences"]
    held_out: int = 1000
    steps: int = 64


@dataclasses.dataclass(frozen=True)
class Data:
    """What a seed makes. `records` are those that a fault rate of 0 gives: see `records_at`."""

    seed: int
    demonstrations: Rows
    preferences: list[synthetic.Prompt]
    records: Rows
    held_out: list[synthetic.Prompt]


def make_data(size: Size, seed: int) -> Data:
    """The data of a seed; no prompt is in two parts."""
    lists = synthetic.make_prompts([size.sft, size.preferences, size.held_out], seed=seed)
    for_sft, preferences, held_out = lists
    records = synthetic.ultrafeedback_records(preferences, seed=seed, fault_rate=0.0)
    return Data(seed, synthetic.demonstrations(for_sft, seed=seed), preferences, records, held_out)


def records_at(data: Data, fault_rate: float) -> Rows:
    """The same records with this share of the overall scores of 1 stored as 10, and nothing else changed."""
    return synthetic.ultrafeedback_records(data.preferences, seed=data.seed, fault_rate=fault_rate)


def pairs_by_ratings(data: Data) -> tuple[Rows, Report]:
    """The pairs of the mean ratings: the same at every fault rate, as `choices` asserts."""
    return curate(data.records, by="ratings", seed=data.seed, keep_identical=True)


def pairs_by_score(data: Data, fault_rate: float) -> tuple[Rows, Report]:
    """The pairs of the overall score at a fault rate."""
    return curate(records_at(data, fault_rate), by="overall_score", seed=data.seed, keep_identical=True)


def choices(data: Data, fault_rate: float) -> dict[str, Any]:
    """How the two rules choose at a fault rate, and how often they choose what is right."""
    by_ratings, of_ratings = pairs_by_ratings(data)
    records = records_at(data, fault_rate)
    again, _ = curate(records, by="ratings", seed=data.seed, keep_identical=True)
    assert again == by_ratings, "the ratings' pairs depend on the fault rate"
    by_score, of_score = pairs_by_score(data, fault_rate)
    other = {row["instruction"]: row for row in by_score}
    both = [(row, other[row["instruction"]]) for row in by_ratings if row["instruction"] in other]
    return {
        "seed": data.seed,
        "fault_rate": fault_rate,
        "stored_as_10": _share(answer["overall_score"] == 10 for record in records for answer in record["completions"]),
        "both": len(both),
        "chosen_differs": _share(mine["chosen_response"] != its["chosen_response"] for mine, its in both),
        "rejected_differs": _share(mine["rejected_response"] != its["rejected_response"] for mine, its in both),
        "ratings": described(by_ratings, of_ratings),
        "overall_score": described(by_score, of_score),
    }


def described(pairs: Rows, report: Report) -> dict[str, Any]:
    """Counts of a rule's pairs; `kept` are those whose two responses differ, as the trainer drops the others."""
    kept = _differing(pairs)
    return {
        "pairs": len(pairs),
        "dropped": dict(report.dropped),
        "kept": len(kept),
        "kept_hard": _share(row["source"] in HARD for row in kept),
        "chosen_right": _share(_right(row, "chosen_response") for row in pairs),
        "kept_chosen_right": _share(_right(row, "chosen_response") for row in kept),
        "kept_rejected_right": _share(_right(row, "rejected_response") for row in kept),
    }


def _differing(pairs: Rows) -> Rows:
    return [row for row in pairs if row["chosen_response"] != row["rejected_response"]]


def _right(row: dict[str, Any], key: str) -> bool:
    return synthetic.judge(row["instruction"], row[key])


def _share(verdicts: Iterable[bool]) -> float:
    found = list(verdicts)
    return sum(found) / len(found)


def start_run(folder: Path, data: Data) -> dict[str, Any]:
    """The model that both rules start from: SFT on the demonstrations, once per seed."""
    text = _lines(data.demonstrations)

    def make() -> dict[str, Any]:
        demo.make_base(folder / "base", data.seed)
        _train("sft", folder, text, {"model": {"name_or_path": str(folder / "base")}, "training": SFT}, data.seed)
        weights = _digest((folder / "run" / "model" / "model.safetensors").read_bytes())
        return {"seed": data.seed, "start": weights, **_verdicts(folder, data)}

    return _kept(folder, {"data": _digest(text), "prompts": _digest(_prompts(data)), "recipe": SFT}, make)


def dpo_run(
    folder: Path, data: Data, pairs: Rows, start: Path, start_digest: str, steps: int, fault_rate: float | None = None
) -> dict[str, Any]:
    """DPO on `pairs` from the start.

    Raises:
        ValueError: the pairs that the trainer keeps do not last for `steps` without a repetition.
    """
    kept, needed = len(_differing(pairs)), steps * DPO["batch_size"]
    if kept < needed:
        raise ValueError(f"{folder.name}: {kept} pairs do not last for {needed}: take more prompts or fewer steps")
    text, recipe = _lines(pairs), {**DPO, "max_steps": steps}
    tree = {
        "model": {"name_or_path": str(start)},
        "data": {"eval": str(folder / "eval.jsonl")},
        "dpo": {"beta": 0.1, "loss_type": "sigmoid"},
        "training": recipe,
    }

    def make() -> dict[str, Any]:
        (folder / "eval.jsonl").write_text(_lines([_right_against_mistake(prompt) for prompt in data.held_out]))
        _train("dpo", folder, text, tree, data.seed)
        metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        first, last = metrics[0], metrics[-1]
        assert last["step"] == steps
        found = {"seed": data.seed, "fault_rate": fault_rate, "first_loss": first["loss"], "steps": steps}
        rewards = {"reward_accuracy": last["eval_rewards/accuracies"], "reward_margin": last["eval_rewards/margins"]}
        return {**found, **rewards, **_verdicts(folder, data)}

    inputs = {"pairs": _digest(text), "prompts": _digest(_prompts(data)), "start": start_digest, "recipe": recipe}
    return _kept(folder, inputs, make)


def _right_against_mistake(prompt: synthetic.Prompt) -> dict[str, Any]:
    """A held-out pair as the judge would choose it, in the columns of the curated ones."""
    return {
        "source": f"synthetic_{prompt.task.name}",
        "instruction": prompt.instruction,
        "chosen_response": prompt.task.answer(prompt.digits),
        "rejected_response": prompt.task.mistake(prompt.digits),
        "chosen_avg_rating": 5.0,
        "rejected_avg_rating": 1.0,
        "chosen_model": "judge",
    }


def _train(task: Task, folder: Path, text: str, tree: dict[str, dict[str, Any]], seed: int) -> None:
    """Run `train_sft.py`'s or `train_dpo.py`'s path into `folder/run`; ends the process if a signal ended that."""
    import torch

    from notus.training import dpo, sft

    torch.set_num_threads(1)  # as the demo: the matrices are too small to gain from more
    (folder / "train.jsonl").write_text(text)
    data = {"train": str(folder / "train.jsonl"), "max_length": demo.MAX_LENGTH, "cache_dir": str(folder / "cache")}
    tree = {
        **tree,
        "data": {**data, **tree.get("data", {})},
        "training": {**tree["training"], "output_dir": str(folder / "run"), "seed": seed},
    }
    code = {"sft": sft, "dpo": dpo}[task].run(config_from_dict(tree, task, source="the benchmark's settings"))
    if code:
        raise SystemExit(code)


def _verdicts(folder: Path, data: Data) -> dict[str, Any]:
    """Greedy answers to the held-out prompts, and a 1 or 0 for each: whether the judge passes it."""
    from notus.evaluation import generate

    prompts, out = folder / "prompts.jsonl", folder / "answers.jsonl"
    prompts.write_text(_prompts(data))
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    options = ["--overwrite", "--max-new-tokens", "12", "--batch-size", "100"]
    generate.run(parser.parse_args([str(folder / "run"), str(prompts), str(out), *options]))
    answers = [json.loads(line)["completion"].strip() for line in out.read_text(encoding="utf-8").splitlines()]
    right = [synthetic.judge(prompt.instruction, answer) for prompt, answer in zip(data.held_out, answers, strict=True)]
    by_task = {task.name: _share(right[number :: len(synthetic.TASKS)]) for number, task in enumerate(synthetic.TASKS)}
    return {"win_rate": _share(right), "by_task": by_task, "right": "".join("01"[x] for x in right), "answers": answers}


def _prompts(data: Data) -> str:
    return _lines([{"instruction": prompt.instruction} for prompt in data.held_out])


def _lines(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _kept(folder: Path, inputs: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in `folder`, made now if there is none. ValueError if one is there that other inputs gave."""
    path, begun = folder / "result.json", folder / "inputs.json"
    folder.mkdir(parents=True, exist_ok=True)
    if begun.exists() and json.loads(begun.read_text()) != inputs:
        raise ValueError(f"{folder} holds a run of other data or settings: remove it, or name another --work")
    if not path.exists():
        write_text(begun, json.dumps(inputs, indent=1))
        write_text(path, json.dumps(make()))
    return dict(json.loads(path.read_text()))


# ---- the command ----

QUICK = Size(sft=64, preferences=200, held_out=16, steps=2)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ratings against critique: see the head of this file.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fault-rates", nargs="+", type=_rate, default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--steps", type=int, help=f"of DPO (default: {Size.steps}; quick: {QUICK.steps})")
    parser.add_argument("--work", type=Path, default=Path("runs/ratings-vs-critique"), help="what runs leave")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few prompts: says nothing")
    parser.add_argument("--results", type=Path, help="write the results to this JSON file, the table to .md")
    parser.add_argument("--plot", type=Path, help="draw to this SVG file (needs matplotlib)")
    parser.add_argument("--stored", type=Path, help="take the results from this file and run nothing")
    return parser.parse_args(arguments)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to 1")
    return value


def run_seed(size: Size, seed: int, fault_rates: list[float], work: Path) -> dict[str, Any]:
    """All runs of a seed, and how the rules choose at each rate."""
    data, folder = make_data(size, seed), work / f"seed-{seed}"
    start = start_run(folder / "start", data)
    model = folder / "start" / "run" / "model"

    def dpo(name: str, pairs: list[dict[str, Any]], fault_rate: float | None) -> dict[str, Any]:
        print(f"\n== seed {seed}: {name}", file=sys.stderr, flush=True)
        place = folder / f"{size.steps}-steps" / name
        return dpo_run(place, data, pairs, model, start["start"], size.steps, fault_rate)

    ratings = dpo("ratings", pairs_by_ratings(data)[0], None)
    critique = [dpo(f"overall-score-{rate:g}", pairs_by_score(data, rate)[0], rate) for rate in fault_rates]
    return {
        "seed": seed,
        "start": start,
        "ratings": ratings,
        "overall_score": critique,
        "choices": [choices(data, rate) for rate in fault_rates],
        "head_to_head": [head_to_head(ratings, run) for run in critique],
    }


def head_to_head(ratings: dict[str, Any], critique: dict[str, Any]) -> dict[str, Any]:
    """Verdicts on the prompts to which the two models' answers differ; where both are wrong it is a tie."""
    verdicts = zip(ratings["answers"], critique["answers"], ratings["right"], critique["right"], strict=True)
    found = [(mine, its) for my_answer, its_answer, mine, its in verdicts if my_answer != its_answer]
    return {
        "fault_rate": critique["fault_rate"],
        "differ": len(found),
        "ratings_wins": found.count(("1", "0")),
        "critique_wins": found.count(("0", "1")),
        "ties": found.count(("0", "0")),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The results of all seeds."""
    import torch

    size = QUICK if args.quick else Size()
    if args.steps is not None:
        size = dataclasses.replace(size, steps=args.steps)
    seeds = [run_seed(size, seed, args.fault_rates, args.work) for seed in args.seeds]
    for seed in seeds:
        for run in (seed["start"], seed["ratings"], *seed["overall_score"]):
            del run["answers"]  # they stay in the work folder
    return {
        "quick": args.quick,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "size": vars(size),
        "fault_rates": args.fault_rates,
        "recipes": {"sft": SFT, "dpo": DPO},
        "seeds": seeds,
    }


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install -r requirements-bench.txt")
    results = json.loads(args.stored.read_text()) if args.stored else measure(args)
    written = table(results)
    print(written)
    if args.results:
        write_json(args.results, results)
        args.results.with_suffix(".md").write_text(written + "\n")
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
