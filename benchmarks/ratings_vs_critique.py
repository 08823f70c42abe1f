"""Notus's claim in small: pairs chosen by mean ratings against pairs chosen by a faulty overall score.

    python benchmarks/ratings_vs_critique.py --results FILE.json --plot FILE.svg
    python benchmarks/ratings_vs_critique.py --stored FILE.json --plot FILE.svg    # draws again, runs nothing

The data are `notus/curation/synthetic.py`'s, whose judge knows the answers; the recipe is the demo's. For each seed
one model is trained with SFT; from it, DPO on the pairs of the mean ratings, and DPO on those of the overall score at
each fault rate: the share of scores of 1 that are stored as 10. The ratings' pairs do not depend on the fault rate
(asserted), so that rule is trained once per seed. Prompts, completions, ratings, seeds and steps are equal.

Prints a table in Markdown; `--results` writes it beside the JSON. A launch that was killed goes on with the same
command, and `--seeds 0` in one process beside `--seeds 1` in another fill the same work folder.
"""

import argparse
import dataclasses
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, installed or not

from critique_report import draw, table
from critique_runs import DPO, SFT, Size, choices, dpo_run, make_data, pairs_by_ratings, pairs_by_score, start_run

QUICK = Size(sft=64, preferences=200, held_out=16, steps=2)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ratings against critique: see the head of this file.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fault-rates", nargs="+", type=_share, default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--steps", type=int, help=f"of DPO (default: {Size.steps}; quick: {QUICK.steps})")
    parser.add_argument("--work", type=Path, default=Path("runs/ratings-vs-critique"), help="what runs leave")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few prompts: says nothing")
    parser.add_argument("--results", type=Path, help="write the results to this JSON file, the table to .md")
    parser.add_argument("--plot", type=Path, help="draw to this SVG file (needs matplotlib)")
    parser.add_argument("--stored", type=Path, help="take the results from this file and run nothing")
    return parser.parse_args(arguments)


def _share(text: str) -> float:
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
        return dpo_run(
            folder / f"{size.steps}-steps" / name, data, pairs, model, start["start"], size.steps, fault_rate=fault_rate
        )

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
        args.results.write_text(json.dumps(results, indent=1) + "\n")
        args.results.with_suffix(".md").write_text(written + "\n")
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
