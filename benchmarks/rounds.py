"""Rounds of on-policy DPO against one round of off-policy DPO, at the same number of judge calls.

    python benchmarks/rounds.py --results FILE.json     # the table goes to FILE.md, what runs leave to --work
    python benchmarks/rounds.py --stored FILE.json      # the table again, runs nothing

The data are `notus/curation/synthetic.py`'s, the judge is its `rate`; start and recipe are the demo's. For each seed
one model is trained with SFT. From it:

    on-policy, last     three rounds; each samples the current model on a third of the prompts, and trains it against
                        the model of the round before
    on-policy, first    the same, against the start
    off-policy, own     one round on the start's own samples to all prompts
    off-policy, others  one round on the answers of the four imaginary models to all prompts

Every arm has the same prompts, as many completions of each, the same judge, as many judge calls, as many steps of as
many pairs, and the same choice of learning rates. A round's warmup and decay span its own steps, so the learning rates
of all steps add up to the same. Stages are the commands `sample`, `rate`, `curate` and `dpo`, in this process.

The learning rate is chosen for each arm by the right answers on prompts of a seed of its own (`--tune-seed`), which
takes no part in the comparison. What is compared is the share of right greedy answers to held-out prompts. A finished
run leaves its result in the work folder, and is not repeated.
"""

import argparse
import dataclasses
import json
import math
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import synthetic_runs
from common import markdown, write_json
from notus.__main__ import run_command
from notus.curation import synthetic
from notus.feedback.records import summary_file
from notus.runtime.files import write_text
from ratings_vs_critique_report import over_seeds, paired
from synthetic_runs import DPO, Data, Rows, Size, digest, json_lines, kept_run, make_data, prompt_lines, start_run

JUDGE = "notus.curation.synthetic:rate"
SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to spend the judge calls.

    Attributes:
        rounds: how many.
        others: whether the imaginary models answer, in place of the model itself.
        reference: what a round's DPO compares with, "last" or "first"; of one round they are the same.
    """

    rounds: int
    others: bool = False
    reference: str = "last"


ON, OFF = "on-policy, last", "off-policy, own"
ARMS = {
    ON: Arm(3),
    "on-policy, first": Arm(3, reference="first"),
    OFF: Arm(1),
    "off-policy, others": Arm(1, others=True),
}
QUICK = Size(sft=64, preferences=24, held_out=16, steps=3)


def run_arm(folder: Path, data: Data, start: Path, arm: Arm, learning_rate: float) -> dict[str, Any]:
    """Run an arm's rounds from the start. Return what its last model answers, and what each round took."""
    about = {"arm": vars(arm), "learning_rate": learning_rate, "recipe": DPO, "size": vars(data.size)}
    inputs = {**about, "prompts": digest(prompt_lines(data)), "start": digest((start / "result.json").read_bytes())}

    def make() -> dict[str, Any]:
        model, rounds = start / "run" / "model", []
        for number in range(arm.rounds):
            place = folder / f"round-{number + 1}"
            place.mkdir(exist_ok=True)
            count = data.size.preferences // arm.rounds
            prompts = data.preferences[number * count : (number + 1) * count]
            shared = start if number == 0 else place  # every arm and learning rate has the same first samples
            rated = _rated(shared / f"rated-{count}{'-others' * arm.others}", data, prompts, model, number, arm.others)
            pairs = _curated(place, rated["records"])
            reference = start / "run" / "model" if arm.reference == "first" else None
            steps = data.size.steps // arm.rounds
            _train(place, data, model, reference, learning_rate=learning_rate, pairs=pairs, steps=steps)
            model = place / "run" / "model"
            found = synthetic_runs.verdicts(place, data)
            rounds.append({"pairs": pairs, "win_rate": found["win_rate"], "judge_calls": rated["judge_calls"]})
        return {"learning_rate": learning_rate, "rounds": rounds, **found}

    return kept_run(folder, inputs, make)


def _rated(
    place: Path, data: Data, prompts: list[synthetic.Prompt], model: Path, number: int, others: bool
) -> dict[str, Any]:
    """Sample and rate completions of `prompts`; once per folder. Return the records' path and the judge's calls."""
    records, rated = place / "records.jsonl", place / "rated.jsonl"
    place.mkdir(parents=True, exist_ok=True)
    if others:
        write_text(records, json_lines(_unrated(data)))
    else:
        write_text(place / "prompts.jsonl", json_lines([{"instruction": prompt.instruction} for prompt in prompts]))
        settings = ["--n", SAMPLES, "--temperature", 1, "--max-new-tokens", 12, "--batch-size", 256]
        seed = ["--seed", 1000 * data.seed + number, "--precision", "fp32"]
        run_command("sample", place / "prompts.jsonl", records, "--models", model, *settings, *seed)
    run_command("rate", records, rated, "--judge-function", JUDGE, "--again-share", 0, "--seed", data.seed)
    summary = json.loads(summary_file(rated).read_text(encoding="utf-8"))
    assert summary["rated"] == SAMPLES * len(prompts)
    return {"records": rated, "judge_calls": summary["prompts"]}  # a call rates all completions of a prompt


def _unrated(data: Data) -> Rows:
    """The imaginary models' answers, as `notus sample` would write them."""
    return [
        {
            **{key: record[key] for key in ("source", "instruction", "models")},
            "completions": [{key: each[key] for key in ("model", "response")} for each in record["completions"]],
        }
        for record in data.records
    ]


def _curated(place: Path, records: Path) -> int:
    """Write the pairs of rated records. Return how many there are."""
    pairs = place / "pairs.jsonl"
    run_command("curate", records, pairs)
    return len(pairs.read_text(encoding="utf-8").splitlines())


def _train(
    place: Path, data: Data, model: Path, reference: Path | None, *, learning_rate: float, pairs: int, steps: int
) -> None:
    """Train with DPO for `steps` steps, through the pairs again if there are too few for that."""
    per_epoch = math.ceil(pairs / DPO["batch_size"])
    recipe = {**DPO, "learning_rate": learning_rate, "max_steps": steps, "epochs": math.ceil(steps / per_epoch)}
    tree: dict[str, dict[str, Any]] = {"model": {"name_or_path": str(model)}, "training": recipe}
    tree["tracking"] = {"samples": 0}
    tree["dpo"] = {"beta": 0.1, "loss_type": "sigmoid"}
    if reference is not None:
        tree["reference"] = {"model": str(reference)}
    synthetic_runs.train("dpo", place, place / "pairs.jsonl", tree, data.seed)


def run_seed(size: Size, seed: int, rates: dict[str, list[float]], work: Path) -> dict[str, Any]:
    """Run all arms of a seed, each at its learning rates; return them by name and learning rate."""
    data, folder = make_data(size, seed), work / f"seed-{seed}"
    start = start_run(folder / "start", data)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, learning_rates in rates.items():
        for rate in learning_rates:
            print(f"\n== seed {seed}: {name}, learning rate {rate:g}", file=sys.stderr, flush=True)
            place = folder / name.replace(", ", "-") / f"{rate:g}"
            run = run_arm(place, data, folder / "start", ARMS[name], rate)
            found.setdefault(name, []).append({key: value for key, value in run.items() if key != "answers"})
    del start["answers"]  # they stay in the work folder
    return {"seed": seed, "start": start, "arms": found}


def best_rates(tuned: dict[str, Any]) -> dict[str, list[float]]:
    """Return for each arm the learning rate with the most right answers; of equal ones the lowest."""
    return {
        name: [max(runs, key=lambda run: (run["win_rate"], -run["learning_rate"]))["learning_rate"]]
        for name, runs in tuned["arms"].items()
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tune on one seed, compare on the others."""
    import torch

    size = QUICK if args.quick else Size(steps=60)
    tuned = run_seed(size, args.tune_seed, dict.fromkeys(args.arms, args.learning_rates), args.work)
    rates = best_rates(tuned)
    return {
        "quick": args.quick,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "size": vars(size),
        "samples": SAMPLES,
        "recipe": DPO,
        "tuned": tuned,
        "seeds": [run_seed(size, seed, rates, args.work) for seed in args.seeds],
    }


# ---- the table ----


def table(results: dict[str, Any]) -> str:
    """Return the tables in Markdown, under a line that says what ran."""
    size, seeds = results["size"], results["seeds"]
    start = statistics.mean(seed["start"]["win_rate"] for seed in seeds)
    names = list(seeds[0]["arms"])
    lines = [
        f"Seeds {', '.join(str(seed['seed']) for seed in seeds)}; {size['preferences']:,} prompts, "
        f"{results['samples']} completions each, {size['steps']} steps of {results['recipe']['batch_size']} pairs in "
        f"all; {size['held_out']:,} held-out prompts. Right answers of the start: {start:.1%} on average.",
        "",
        markdown(
            ["arm", "learning rate", "judge calls", "pairs", "after each round", "right answers", f"less {OFF}"],
            [_cells(name, seeds) for name in names],
            "--:",
        ),
        "",
        "Means over seeds with Student's 95% interval; the last column is of the seeds' differences.",
        "",
        f"The learning rates, chosen on seed {results['tuned']['seed']}, which is none of the above:",
        "",
        markdown(["arm", "learning rate", "right answers"], _tuning_cells(results["tuned"]), "--:"),
    ]
    if {ON, OFF} <= set(names):
        lines += ["", verdict(seeds)]
    return "\n".join(lines)


def _cells(name: str, seeds: list[dict[str, Any]]) -> list[str]:
    runs = [seed["arms"][name][0] for seed in seeds]
    rounds = list(zip(*(run["rounds"] for run in runs), strict=True))
    shares = [statistics.mean(each["win_rate"] for each in number) for number in rounds]
    pairs = [round(statistics.mean(each["pairs"] for each in number)) for number in rounds]
    calls = {sum(each["judge_calls"] for each in run["rounds"]) for run in runs}
    against = [] if name == OFF or OFF not in seeds[0]["arms"] else differences(seeds, name, OFF)
    return [
        name,
        f"{runs[0]['learning_rate']:g}",
        " or ".join(f"{count:,}" for count in sorted(calls)),
        " + ".join(f"{count:,}" for count in pairs),
        ", ".join(f"{share:.1%}" for share in shares),
        _interval([run["win_rate"] for run in runs], "{:.1%}"),
        _interval(against, "{:+.1%}") if against else "",
    ]


def _interval(values: list[float], form: str) -> str:
    mean, half = over_seeds(values)
    return form.format(mean) + ("" if half is None else f" ± {half:.1%}")


def _tuning_cells(tuned: dict[str, Any]) -> list[list[str]]:
    return [
        [name, f"{run['learning_rate']:g}", f"{run['win_rate']:.1%}"]
        for name, runs in tuned["arms"].items()
        for run in runs
    ]


def differences(seeds: list[dict[str, Any]], first: str, second: str) -> list[float]:
    """Return each seed's share of right answers of the first arm less that of the second, on the same prompts."""
    return [paired(seed["arms"][first][0]["right"], seed["arms"][second][0]["right"])[0] for seed in seeds]


def verdict(seeds: list[dict[str, Any]]) -> str:
    """Say whether on-policy rounds beat one off-policy round: only if the interval of the difference is above 0."""
    mean, half = over_seeds(differences(seeds, ON, OFF))
    if half is None:
        return "One seed has no interval, so nothing is said about which is better."
    if mean > half:
        return "Three on-policy rounds beat one off-policy round at the same number of judge calls."
    return "Three on-policy rounds do not beat one off-policy round at the same number of judge calls."


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="On-policy rounds against off-policy: see the head of this file.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tune-seed", type=int, default=100)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[2.5e-5, 5e-5, 1e-4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--work", type=Path, default=Path("runs/rounds"), help="what runs leave")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few prompts: says nothing")
    parser.add_argument("--results", type=Path, help="write the results to this JSON file, the table to .md")
    parser.add_argument("--stored", type=Path, help="take the results from this file and run nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, or read what was measured; print the table and write both."""
    args = parse_arguments(arguments)
    if args.tune_seed in args.seeds:
        raise ValueError(f"--tune-seed {args.tune_seed} is one of --seeds: tune on a seed that is not compared")
    results = json.loads(args.stored.read_text()) if args.stored else measure(args)
    written = table(results)
    print(written)
    if args.results:
        write_json(args.results, results)
        args.results.with_suffix(".md").write_text(written + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
