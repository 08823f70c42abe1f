"""Notus's claim in small: pairs chosen by mean ratings against pairs chosen by a faulty overall score.

    python benchmarks/ratings_vs_critique.py --results FILE.json --plot FILE.svg
    python benchmarks/ratings_vs_critique.py --stored FILE.json --plot FILE.svg    # draws again, runs nothing
    python benchmarks/ratings_vs_critique.py --lists --results FILE.json           # and pairs against lists

The data are `notus/curation/synthetic.py`'s, whose judge knows the answers; the recipe is the demo's. For each seed
one model is trained with SFT; from it, DPO on the pairs of the mean ratings, and DPO on those of the overall score at
each fault rate: the share of scores of 1 that are stored as 10. The ratings' pairs do not depend on the fault rate
(asserted), so that rule is trained once per seed. Prompts, completions, ratings, seeds and steps are equal.

With `--lists`: what the whole list of rated answers adds to the pair. From the same start and for the same prompts, DPO
on the pair of the mean ratings, against losses of lists on all four answers with their ratings. A list has more tokens
than a pair, so the pair is trained twice: for as many steps as the list, and for as many as give as many tokens. The
same again with a careless critic, who rates a share of the answers at random. And an epoch of each on the same few
records, of which a pair can use fewer: where its two answers are one text, it is dropped.

Prints a table in Markdown; `--results` writes it beside the JSON. A finished run leaves its result in the work folder,
with digests of what went into it, and is not repeated: a launch that was killed resumes with the same command, and
`--seeds 0` in one process beside `--seeds 1` in another fill the same work folder.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import platform
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import synthetic_runs
from common import write_json
from notus.curation import synthetic
from notus.curation.ultrafeedback import Report, curate
from ratings_vs_critique_report import MORE_PAIRS, PAIRS, draw, list_table, table
from synthetic_runs import (
    DPO,
    SFT,
    Data,
    Rows,
    Size,
    TrainingRows,
    check_enough,
    differing,
    digest,
    json_lines,
    kept_run,
    loss_run,
    make_data,
    pairs_by_ratings,
    prompt_lines,
    right_against_mistake,
    share,
    start_run,
    write_rows,
)

HARD = {f"synthetic_{task.name}" for task in synthetic.TASKS if task.hard}


def records_at(data: Data, fault_rate: float) -> Rows:
    """The same records with this share of the overall scores of 1 stored as 10, and nothing else changed."""
    return synthetic.ultrafeedback_records(data.preferences, seed=data.seed, fault_rate=fault_rate)


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
        "stored_as_10": share(answer["overall_score"] == 10 for record in records for answer in record["completions"]),
        "both": len(both),
        "chosen_differs": share(mine["chosen_response"] != its["chosen_response"] for mine, its in both),
        "rejected_differs": share(mine["rejected_response"] != its["rejected_response"] for mine, its in both),
        "ratings": described(by_ratings, of_ratings),
        "overall_score": described(by_score, of_score),
    }


def described(pairs: Rows, report: Report) -> dict[str, Any]:
    """Counts of a rule's pairs; `kept` are those whose two responses differ, as the trainer drops the others."""
    kept = differing(pairs)
    return {
        "pairs": len(pairs),
        "dropped": dict(report.dropped),
        "kept": len(kept),
        "kept_hard": share(row["source"] in HARD for row in kept),
        "chosen_right": share(_right(row, "chosen_response") for row in pairs),
        "kept_chosen_right": share(_right(row, "chosen_response") for row in kept),
        "kept_rejected_right": share(_right(row, "rejected_response") for row in kept),
    }


def _right(row: dict[str, Any], key: str) -> bool:
    return synthetic.judge(row["instruction"], row[key])


def dpo_run(
    folder: Path, data: Data, pairs: Rows, start: Path, start_digest: str, steps: int, fault_rate: float | None = None
) -> dict[str, Any]:
    """DPO on `pairs` from the start.

    Raises:
        ValueError: the pairs that the trainer keeps do not last for `steps` without a repetition.
    """
    check_enough(folder.name, len(differing(pairs)), steps, DPO["batch_size"])
    text, recipe = json_lines(pairs), {**DPO, "max_steps": steps}
    tree = {
        "model": {"name_or_path": str(start)},
        "data": {"eval": str(folder / "eval.jsonl")},
        "dpo": {"beta": 0.1, "loss_type": "sigmoid"},
        "training": recipe,
    }

    def make() -> dict[str, Any]:
        (folder / "eval.jsonl").write_text(json_lines([right_against_mistake(prompt) for prompt in data.held_out]))
        (folder / "train.jsonl").write_text(text)
        synthetic_runs.train("dpo", folder, folder / "train.jsonl", tree, data.seed)
        metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        first, last = metrics[0], metrics[-1]
        assert last["step"] == steps
        found = {"seed": data.seed, "fault_rate": fault_rate, "first_loss": first["loss"], "steps": steps}
        rewards = {"reward_accuracy": last["eval_rewards/accuracies"], "reward_margin": last["eval_rewards/margins"]}
        return {**found, **rewards, **synthetic_runs.verdicts(folder, data)}

    inputs = {"pairs": digest(text), "prompts": digest(prompt_lines(data)), "start": start_digest, "recipe": recipe}
    return kept_run(folder, inputs, make)


# ---- the command ----

QUICK = Size(sft=64, preferences=280, held_out=16, steps=2)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ratings against critique: see the head of this file.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fault-rates", nargs="+", type=_rate, default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--steps", type=int, help=f"of DPO (default: {Size.steps}; quick: {QUICK.steps})")
    parser.add_argument("--lists", action="store_true", help="pairs against lists, and no fault rates")
    parser.add_argument("--work", type=Path, default=Path("runs/ratings-vs-critique"), help="what runs leave")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few prompts: says nothing")
    parser.add_argument("--results", type=Path, help="write the results to this JSON file, the table to .md")
    parser.add_argument("--plot", type=Path, help="draw to this SVG file (needs matplotlib)")
    parser.add_argument("--stored", type=Path, help="take the results from this file and run nothing")
    return parser.parse_args(arguments)


# Losses of lists; the pair has `sigmoid`, of which both are generalisations.
LIST_LOSSES = ("plackett_luce", "all_pairs")
LIST_STEPS = (16, 32)
CARELESS = 0.7


def lists_seed(size: Size, seed: int, lengths: Sequence[int], work: Path) -> dict[str, Any]:
    """All runs of a seed of pairs against lists: of the same prompts, with a careless critic, of the same records."""
    data, folder = make_data(size, seed), work / f"seed-{seed}"
    start = start_run(folder / "start", data)
    careless = dataclasses.replace(data, records=carelessly_rated(data.records, seed))
    runs = [run for steps in lengths for run in _of_equal_prompts(folder, folder, data, steps, f"{steps} steps")]
    for steps in lengths:
        runs += _of_equal_prompts(folder, folder / "careless", careless, steps, f"{steps} steps, careless critic")
    runs += _of_equal_records(folder, data, size.preferences // 2)
    chosen_right = {
        name: share(_right(row, "chosen_response") for row in differing(pairs_by_ratings(rated)[0]))
        for name, rated in (("clean", data), ("careless", careless))
    }
    return {"seed": seed, "start": start["win_rate"], "chosen_right": chosen_right, "runs": runs}


def carelessly_rated(records: Rows, seed: int) -> Rows:
    """The records with all ratings of a share of the answers, `CARELESS`, drawn anew from 1 to 5."""
    rng, found = random.Random(f"careless {seed}"), copy.deepcopy(records)
    for record in found:
        for answer in record["completions"]:
            if rng.random() < CARELESS:
                for annotation in answer["annotations"].values():
                    annotation["Rating"] = str(rng.randint(1, 5))
    return found


def _of_equal_prompts(folder: Path, place: Path, data: Data, steps: int, equal: str) -> list[dict[str, Any]]:
    """The pair and the list in as many steps of the same prompts, and the pair in as many tokens as the list."""
    place.mkdir(exist_ok=True)
    rows = {kind: write_rows(kind, data, place) for kind in ("pairs", "lists")}

    def run(kind: str, loss: str, count: int) -> dict[str, Any]:
        return _list_run(place / f"{count}-steps" / loss, data, rows[kind], loss, count, folder)

    lists, pair = {loss: run("lists", loss, steps) for loss in LIST_LOSSES}, run("pairs", "sigmoid", steps)
    longer = round(steps * lists[LIST_LOSSES[0]]["tokens"] / pair["tokens"])
    found = {PAIRS: pair, MORE_PAIRS: run("pairs", "sigmoid", longer), **lists}
    return [{"of": equal, "name": name, **each} for name, each in found.items()]


def _of_equal_records(folder: Path, data: Data, count: int) -> list[dict[str, Any]]:
    """An epoch of the pairs of so many records, and of their lists: more, as both answers of a pair may be the same."""
    few, place = dataclasses.replace(data, records=data.records[:count]), folder / f"{count}-records"
    place.mkdir(exist_ok=True)
    pairs, lists = write_rows("pairs", few, place), write_rows("all lists", few, place)
    found = {}
    for name, loss, rows in ((PAIRS, "sigmoid", pairs), *((loss, loss, lists) for loss in LIST_LOSSES)):
        found[name] = _list_run(place / loss, data, rows, loss, rows.count // rows.per_step, folder)
    return [{"of": f"{count:,} records", "name": name, **run} for name, run in found.items()]


def _list_run(place: Path, data: Data, rows: TrainingRows, loss: str, steps: int, folder: Path) -> dict[str, Any]:
    print(f"\n== seed {data.seed}: {loss}, {steps} steps of {rows.path.stem}", file=sys.stderr, flush=True)
    dpo, recipe = {"beta": 0.1, "loss_type": loss}, {**DPO, "max_steps": steps}
    found = loss_run(place, data, rows, dpo, recipe, folder / "start")
    if "failed" in found:
        raise ValueError(f"seed {data.seed}, {loss}: {found['failed']}")
    del found["right"]  # stays in the work folder
    return {"steps": steps, **found}


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
    about = {"quick": args.quick, "machine": platform.machine(), "torch": torch.__version__}
    about |= {"size": vars(size), "recipes": {"sft": SFT, "dpo": DPO}}
    if args.lists:
        lengths = LIST_STEPS if args.steps is None and not args.quick else (size.steps,)
        return {**about, "seeds": [lists_seed(size, seed, lengths, args.work) for seed in args.seeds]}
    seeds = [run_seed(size, seed, args.fault_rates, args.work) for seed in args.seeds]
    for seed in seeds:
        for run in (seed["start"], seed["ratings"], *seed["overall_score"]):
            del run["answers"]  # they stay in the work folder
    return {**about, "fault_rates": args.fault_rates, "seeds": seeds}


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.plot and args.lists:
        raise ValueError("--plot has no effect with --lists: leave it out")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install -r requirements-bench.txt")
    results = json.loads(args.stored.read_text()) if args.stored else measure(args)
    written = list_table(results) if args.lists else table(results)
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
