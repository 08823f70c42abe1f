"""What each loss of the registry does: all trained from the same start, at two β, on the synthetic data.

    python benchmarks/losses.py --results FILE.json    # --only NAME ...: some of them; --quick: says nothing
    python benchmarks/losses.py --stored FILE.json     # writes the table again, runs nothing

The data are `notus/curation/synthetic.py`'s, whose judge knows the answers; model and recipe are the demo's. For each
seed one model is trained with SFT; from it every loss learns, for equally many optimizer steps, at the same learning
rate, from the same prompts: those whose pair of the mean ratings has two different texts. Losses of pairs get that
pair; losses of lists all four rated answers; losses of labels the pair's two completions as two rows, labelled good
and bad, and twice the rows per step. So every loss goes through the prompts at the same pace, 32 of them a step. The
two rows of a pair are shuffled apart, and may be in different steps.

Measured on held-out prompts, with the same commands for every loss: greedy answers that the judge passes
(`notus generate`), and the log-probs of the right answer and of the task's usual mistake against the start's
(`notus evaluate --beta 1`). Rewards and margins are therefore log-ratios in nats, without β, also of losses that have
no reference: they can be compared.

A finished run leaves its result in the work folder, with digests of what went into it, and is not repeated. Seeds are
the outer loop and `--results` is written after each, so a partial run is a table of fewer seeds.
"""

import argparse
import dataclasses
import json
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common import markdown, write_json
from notus.losses import LOSSES, Loss, loss_components
from ratings_vs_critique_report import over_seeds
from synthetic_runs import DPO, SFT, Size, loss_run, make_data, start_run, write_rows

STEPS = 32
# The demo's, at four times its learning rate: with that one, 32 steps move the log-probs so little (a margin of about
# one nat) that nearly all losses are still straight lines, and train the same model.
RECIPE = {**DPO, "learning_rate": 1e-4}
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Variant:
    """A loss as it is trained: the config's `dpo` section but for β, and the two β, with where they come from."""

    name: str
    dpo: Mapping[str, Any]
    betas: tuple[float, float]
    why: str

    @property
    def rows(self) -> str:
        """Which rows of data it learns from."""
        return next(iter(loss_components(self.dpo["loss_type"]))).rows


# The two β of a loss, by name, and their source. A loss that is not named here gets those of DPO.
DPO_BETAS = ((0.1, 0.5), "2305.18290: 0.1, and 0.5 for TL;DR")
BETAS: dict[str, tuple[tuple[float, float], str]] = {
    "ipo": ((0.1, 0.5), "0.1 is TRL's default; 2310.12036 tries 0.1 to 1"),
    "ipo_sum": ((0.1, 0.5), "as ipo"),
    "sigmoid_norm": ((2.0, 10.0), "2411.15124: 5; the range of SimPO"),
    "nca_pair": ((0.01, 0.1), "2402.05369: 0.01; TRL's default"),
    "bco_pair": ((0.01, 0.1), "2404.04656: 0.01; TRL's default"),
    "sppo_hard": ((0.001, 0.1), "2405.00675: 0.001; TRL's default"),
    "discopop": ((0.05, 0.5), "2406.08414: 0.05"),
    "dpop": ((0.1, 0.3), "TRL's default of DPO; 2402.13228: 0.3"),
    "cal_dpo": ((0.001, 0.1), "2412.14516: 0.001; as sppo_hard"),
    "simpo": ((2.0, 10.0), "2405.14734: 2 to 2.5, and 10"),
    "orpo": ((0.1, 1.0), "2403.07691: λ from 0.1 to 1"),
    "slic": ((0.1, 1.0), "2305.10425 has no β, so 1; as cpo"),
    "lipo_lambda": ((0.05, 0.5), "2402.01878: 0.05"),
    "info_nca": ((0.01, 0.1), "2402.05369: 0.01; as nca_pair"),
    "nca": ((0.01, 0.1), "2402.05369: 0.01; as nca_pair"),
    "bco": ((0.01, 0.1), "2404.04656: 0.01; TRL's default"),
}
# What a loss needs beside its name to be what was published under it.
SETTINGS: dict[str, Mapping[str, Any]] = {
    "exo_pair": {"label_smoothing": 1e-3},  # 2402.00856 sec. 5
    "robust": {"label_smoothing": 0.1},  # without it, it is `sigmoid`
    "cpo": {"nll_weight": 1.0},  # 2401.08417 eq. 6
    "orpo": {"nll_weight": 1.0},  # 2403.07691 eq. 6
    "slic": {"nll_weight": 1.0},  # 2305.10425 eq. 1, whose λ is a choice
}
# Settings of the trainer on top of a loss, and a sum of losses.
NAMED = tuple(
    Variant(name, dpo, *DPO_BETAS)
    for name, dpo in {
        "sigmoid, epsilon = 0.1": {"loss_type": "sigmoid", "label_smoothing": 0.1},
        "sigmoid, NLL": {"loss_type": "sigmoid", "nll_weight": 1.0},
        "sigmoid, JS": {"loss_type": "sigmoid", "options": {"f_divergence": "js_divergence"}},
        "sigmoid, forward KL": {"loss_type": "sigmoid", "options": {"f_divergence": "forward_kl"}},
        "LD-DPO, alpha = 0.5": {"loss_type": "sigmoid", "ld_alpha": 0.5},
        "WPO": {"loss_type": "sigmoid", "wpo": True},
        "MPO": {"loss_type": {"sigmoid": 0.8, "bco_pair": 0.2}, "nll_weight": 1.0},  # 2411.10442 sec. 3
    }.items()
)


def variants(losses: Mapping[str, Loss] = LOSSES) -> list[Variant]:
    """Every loss of the registry, in its order, then the named ones."""
    found = []
    for name in losses:
        betas, why = BETAS.get(name, DPO_BETAS)
        found.append(Variant(name, {"loss_type": name, **SETTINGS.get(name, {})}, betas, why))
    return [*found, *NAMED]


# ---- the command ----

QUICK = Size(sft=64, preferences=200, held_out=16, steps=2)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What each loss does: see the head of this file.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these losses (default: all)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {STEPS}; quick: {QUICK.steps})")
    parser.add_argument("--work", type=Path, default=Path("runs/losses"), help="what runs leave")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few prompts: says nothing")
    parser.add_argument("--results", type=Path, help="write the results to this JSON file, the table to .md")
    parser.add_argument("--stored", type=Path, help="take the results from this file and run nothing")
    return parser.parse_args(arguments)


def chosen_variants(names: Sequence[str] | None) -> list[Variant]:
    """All variants, or those of these names. ValueError for one that does not exist."""
    known = variants()
    for name in names or ():
        if name not in [variant.name for variant in known]:
            raise ValueError(f"--only {name}: there is no such loss; use {', '.join(v.name for v in known)}")
    return [variant for variant in known if names is None or variant.name in names]


def run_seed(size: Size, seed: int, chosen: Sequence[Variant], work: Path) -> dict[str, Any]:
    """The start of a seed, and the runs of all losses from it."""
    data, folder = make_data(size, seed), work / f"seed-{seed}"
    start = start_run(folder / "start", data)
    rows = {kind: write_rows(kind, data, folder) for kind in {variant.rows for variant in chosen}}
    runs = []
    for variant in chosen:
        for beta in variant.betas:
            name = f"{re.sub('[^a-zA-Z0-9_.]+', '-', variant.name)}-beta-{beta:g}"
            print(f"\n== seed {seed}: {name}", file=sys.stderr, flush=True)
            place, recipe = folder / f"{size.steps}-steps" / name, {**RECIPE, "max_steps": size.steps}
            dpo = {"beta": beta, **variant.dpo}
            found = loss_run(place, data, rows[variant.rows], dpo, recipe, folder / "start")
            found.pop("right", None)  # stays in the work folder
            runs.append({"loss": variant.name, "beta": beta, **found})
    return {"seed": seed, "start": {"win_rate": start["win_rate"], "by_task": start["by_task"]}, "runs": runs}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The results after each seed."""
    import torch

    size = QUICK if args.quick else Size(steps=STEPS)
    if args.steps is not None:
        size = dataclasses.replace(size, steps=args.steps)
    chosen = chosen_variants(args.only)
    seeds: list[dict[str, Any]] = []
    for seed in args.seeds:
        seeds.append(run_seed(size, seed, chosen, args.work))
        yield {
            "quick": args.quick,
            "machine": platform.machine(),
            "torch": torch.__version__,
            "size": vars(size),
            "recipes": {"sft": SFT, "dpo": RECIPE},
            "losses": [{**dataclasses.asdict(variant), "rows": variant.rows} for variant in chosen],
            "seeds": seeds,
        }


# ---- the table ----

HEADS = ("loss", "β", "right answers, %", "reward accuracy, %", "margin, nats", "chosen, nats per token")
_MEASURES = (
    ("win_rate", 100, ".1f"),
    ("reward_accuracy", 100, ".1f"),
    ("margin", 1, ".2f"),
    ("chosen_change", 1, "+.2f"),
)


def table(results: dict[str, Any]) -> str:
    """The table in Markdown, under a line that says what ran; a cell has the figures at both β."""
    size, seeds = results["size"], results["seeds"]
    start, half = over_seeds([100 * seed["start"]["win_rate"] for seed in seeds])
    return "\n".join(
        [
            f"Seeds {', '.join(str(seed['seed']) for seed in seeds)}; {size['steps']} steps of "
            f"{results['recipes']['dpo']['batch_size']} prompts, {size['held_out']:,} held-out prompts; mean ± half of "
            f"Student's 95% interval over the seeds. The start answers {_figure(start, half, '.1f')}% right.",
            "",
            markdown(HEADS, [_row(seeds, loss["name"], loss["betas"]) for loss in results["losses"]], "--:"),
        ]
    )


def _row(seeds: Sequence[dict[str, Any]], name: str, betas: Sequence[float]) -> list[str]:
    columns = zip(*(_figures(seeds, name, beta) for beta in betas), strict=True)
    return [
        f"`{name}`" if name in LOSSES else name,
        " / ".join(f"{beta:g}" for beta in betas),
        *map(" / ".join, columns),
    ]


def _figures(seeds: Sequence[dict[str, Any]], name: str, beta: float) -> list[str]:
    """Each measure of a loss at a β over the seeds."""
    runs = [run for seed in seeds for run in seed["runs"] if (run["loss"], run["beta"]) == (name, beta)]
    if any("failed" in run for run in runs):
        return ["not finite"] * len(_MEASURES)
    return [_figure(*over_seeds([scale * run[key] for run in runs]), form) for key, scale, form in _MEASURES]


def _figure(mean: float, half: float | None, form: str) -> str:
    return format(mean, form) + ("" if half is None else f" ± {format(half, form.lstrip('+'))}")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    found = [json.loads(args.stored.read_text())] if args.stored else measure(args)
    for results in found:
        written = table(results)
        if args.results:
            write_json(args.results, results)
            args.results.with_suffix(".md").write_text(written + "\n")
    print(written)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
