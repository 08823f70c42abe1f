"""From the results of `ratings_vs_critique.py`, measured or stored, to its intervals, its tables and its plot.

Three intervals, all of 95%. A run's win rate: Wilson's score interval over the prompts. A seed's difference of the two
rules: Wald's for paired shares over the prompts, as both models answer the same ones. The difference over seeds:
Student's t over the seeds' differences, as a seed is what repeats (data, start and training are its own).
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import markdown
from notus.evaluation.intervals import normal, student, wilson

RULES = {"ratings": ("mean ratings", "#0072b2"), "overall_score": ("overall score", "#d55e00")}


def paired(first: str, second: str) -> tuple[float, float]:
    """The difference of two shares of 1s over the same prompts, first less second, and half of its interval."""
    count = len(first)
    won = sum(pair == ("1", "0") for pair in zip(first, second, strict=True))
    lost = sum(pair == ("0", "1") for pair in zip(first, second, strict=True))
    variance = (won + lost - (won - lost) ** 2 / count) / count**2
    return (won - lost) / count, normal() * math.sqrt(variance)


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half of Student's interval; None for a single seed."""
    if len(values) == 1:
        return values[0], None
    return statistics.mean(values), student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def differences(results: dict[str, Any], number: int) -> list[float]:
    """Per seed, the win rate of the ratings less that of the overall score at the fault rate of this number."""
    return [seed["ratings"]["win_rate"] - seed["overall_score"][number]["win_rate"] for seed in results["seeds"]]


def table(results: dict[str, Any]) -> str:
    """The tables in Markdown, under a line that says what ran."""
    size, seeds = results["size"], results["seeds"]
    start = statistics.mean(seed["start"]["win_rate"] for seed in seeds)
    numbers = range(len(results["fault_rates"]))
    return "\n".join(
        [
            f"Seeds {', '.join(str(seed['seed']) for seed in seeds)}; {size['preferences']:,} rated prompts, "
            f"{size['steps']} steps of {results['recipes']['dpo']['batch_size']} pairs, {size['held_out']:,} held-out "
            f"prompts; win rate: share of right answers; the start's is {start:.1%} on average.",
            "",
            "How the rules choose (means over seeds; a prompt has no pair where its scores tie or fewer than two of "
            "its answers have one; of the pairs, those whose two texts differ are trained on, and hard and right are "
            "shares of these; differs: of the prompts where both rules give a pair)",
            "",
            markdown(_CHOICE_HEADS, [_choice_cells(results, number) for number in numbers], "--:"),
            "",
            "What the models learn (means over seeds; difference: with Student's 95% interval over the seeds; "
            "head-to-head: prompts of all seeds to which the two models answer differently)",
            "",
            markdown(RATE_HEADS, [_rate_cells(results, number) for number in numbers], "--:"),
            "",
            "Every run (win rate with Wilson's 95% interval, difference with the paired one over prompts; reward "
            "accuracy: right answer over usual mistake, held-out prompts)",
            "",
            markdown(_RUN_HEADS, [row for seed in seeds for row in _run_rows(seed)], "--:"),
        ]
    )


_CHOICE_HEADS = (
    "1s stored as 10", "of all answers", "pairs: ratings / score", "trained on: ratings / score",
    "of these hard: ratings / score", "chosen differs", "rejected differs",
    "chosen right: ratings / score", "rejected right: ratings / score",
)  # fmt: skip
RATE_HEADS = (
    "1s stored as 10", "win rate: ratings", "win rate: score", "difference", "per seed", "answers differ",
    "ratings' model wins / ties / loses", "its win rate, ties half",
)  # fmt: skip
_RUN_HEADS = ("seed", "run", "win rate", "ratings less this", "repeat", "largest", "count", "sort", "reward accuracy")


def _choice_cells(results: dict[str, Any], number: int) -> list[str]:
    found = [seed["choices"][number] for seed in results["seeds"]]

    def both(form: str, value: Any) -> str:
        return " / ".join(format(statistics.mean(value(choice[rule]) for choice in found), form) for rule in RULES)

    return [
        f"{results['fault_rates'][number]:.0%}",
        f"{statistics.mean(choice['stored_as_10'] for choice in found):.1%}",
        both(",.0f", lambda rule: rule["pairs"]),
        both(",.0f", lambda rule: rule["kept"]),
        both(".1%", lambda rule: rule["kept_hard"]),
        f"{statistics.mean(choice['chosen_differs'] for choice in found):.1%}",
        f"{statistics.mean(choice['rejected_differs'] for choice in found):.1%}",
        both(".1%", lambda rule: rule["kept_chosen_right"]),
        both(".1%", lambda rule: rule["kept_rejected_right"]),
    ]


def _rate_cells(results: dict[str, Any], number: int) -> list[str]:
    seeds, gaps = results["seeds"], differences(results, number)
    duels = [seed["head_to_head"][number] for seed in seeds]
    won, tied, lost = (sum(duel[key] for duel in duels) for key in ("ratings_wins", "ties", "critique_wins"))
    differ = won + tied + lost
    return [
        f"{results['fault_rates'][number]:.0%}",
        f"{statistics.mean(seed['ratings']['win_rate'] for seed in seeds):.1%}",
        f"{statistics.mean(seed['overall_score'][number]['win_rate'] for seed in seeds):.1%}",
        _signed(*over_seeds(gaps)),
        ", ".join(f"{100 * gap:+.1f}" for gap in gaps),
        f"{differ / sum(len(seed['ratings']['right']) for seed in seeds):.1%}",
        f"{won} / {tied} / {lost}",
        f"{(won + tied / 2) / differ:.1%}" if differ else "-",
    ]


LIST_HEADS = (
    "setting", "trained on", "steps", "tokens", "right answers", "minus the pair's", "per seed",
    "minus the pair's, equal tokens", "reward accuracy", "margin, nats", "chosen, nats per token",
)  # fmt: skip
PAIRS, MORE_PAIRS = "pairs", "pairs, equal tokens"


def list_table(results: dict[str, Any]) -> str:
    """The table of pairs against lists in Markdown, under a line that says what ran."""
    size, seeds = results["size"], results["seeds"]
    places = [(run["of"], run["name"]) for run in seeds[0]["runs"]]
    right = {
        critic: statistics.mean(seed["chosen_right"][critic] for seed in seeds) for critic in ("clean", "careless")
    }
    start = statistics.mean(seed["start"] for seed in seeds)
    return "\n".join(
        [
            f"Seeds {', '.join(str(seed['seed']) for seed in seeds)}; {size['preferences']:,} rated prompts, "
            f"{results['recipes']['dpo']['batch_size']} in a step, {size['held_out']:,} held-out prompts; means over "
            f"seeds, differences in points with Student's 95% interval; the start answers {start:.1%} right. Of the "
            f"pairs, {right['clean']:.1%} have a right answer as the chosen one, with a careless critic "
            f"{right['careless']:.1%}.",
            "",
            markdown(LIST_HEADS, [_list_cells(seeds, *place) for place in places], "--:"),
        ]
    )


def _list_cells(seeds: Sequence[dict[str, Any]], equal: str, name: str) -> list[str]:
    def of(wanted: str) -> list[dict[str, Any]]:
        return [run for seed in seeds for run in seed["runs"] if (run["of"], run["name"]) == (equal, wanted)]

    def mean(key: str) -> float:
        return statistics.mean(run[key] for run in found)

    def less(others: list[dict[str, Any]]) -> list[float]:
        return [run["win_rate"] - other["win_rate"] for run, other in zip(found, others, strict=True)]

    found, more = of(name), of(MORE_PAIRS)
    gaps = [] if name == PAIRS else less(of(PAIRS))
    return [
        equal,
        name,
        f"{mean('steps'):.0f}",
        f"{mean('tokens'):,.0f}",
        f"{mean('win_rate'):.1%}",
        _signed(*over_seeds(gaps)) if gaps else "",
        ", ".join(f"{100 * gap:+.1f}" for gap in gaps),
        _signed(*over_seeds(less(more))) if more and name not in (PAIRS, MORE_PAIRS) else "",
        f"{mean('reward_accuracy'):.1%}",
        f"{mean('margin'):.2f}",
        f"{mean('chosen_change'):+.3f}",
    ]


def _signed(difference: float, half: float | None) -> str:
    """In points of a hundred."""
    return f"{100 * difference:+.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def _run_rows(seed: dict[str, Any]) -> list[list[str]]:
    runs = {"start": seed["start"], "ratings": seed["ratings"]}
    runs |= {f"overall score, {run['fault_rate']:.0%}": run for run in seed["overall_score"]}
    rows = []
    for name, run in runs.items():
        right = run["right"]
        low, high = wilson(right.count("1"), len(right))
        rows.append(
            [
                str(seed["seed"]),
                name,
                f"{run['win_rate']:.1%} [{low:.1%}, {high:.1%}]",
                _signed(*paired(seed["ratings"]["right"], right)) if name != "ratings" else "",
                *(f"{rate:.1%}" for rate in run["by_task"].values()),
                f"{run['reward_accuracy']:.1%}" if name != "start" else "",
            ]
        )
    return rows


def draw(results: dict[str, Any], path: Path) -> None:
    """An SVG file: the win rates by fault rate, and the difference of the rules.

    The same results give the same file, byte for byte, with the same matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # text stays text, and the ids in the file follow from a fixed salt
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "notus", "font.size": 10}):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        rates, gaps = figure.subplots(1, 2)
        _draw_rates(rates, results)
        _draw_gaps(gaps, results)
        for panel in (rates, gaps):
            panel.set_xlabel("scores of 1 stored as 10")
            panel.xaxis.set_major_formatter("{x:.0f}%")
            panel.set_xticks([100 * rate for rate in results["fault_rates"]])
            panel.grid(axis="y", color="#dddddd", linewidth=0.6)
            for edge in ("top", "right"):
                panel.spines[edge].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_rates(panel: Any, results: dict[str, Any]) -> None:
    """A line of means per rule, a dot per seed; the start's mean dashed."""
    places = [100 * rate for rate in results["fault_rates"]]
    for rule, (name, colour) in RULES.items():
        runs = [[seed[rule]] * len(places) if rule == "ratings" else seed[rule] for seed in results["seeds"]]
        rows = [[100 * run["win_rate"] for run in of_seed] for of_seed in runs]
        panel.plot(places, [statistics.mean(values) for values in zip(*rows, strict=True)], color=colour, label=name)
        for row in rows:
            panel.plot(places, row, linestyle="none", marker="o", markersize=4, alpha=0.6, color=colour)
    start = statistics.mean(seed["start"]["win_rate"] for seed in results["seeds"])
    panel.axhline(100 * start, color="grey", linewidth=0.8, linestyle="--", label="before DPO")
    panel.set_title("right answers to held-out prompts, %", fontsize=10)
    panel.set_ylim(0, 102)
    panel.legend(frameon=False, loc="lower left")


def _draw_gaps(panel: Any, results: dict[str, Any]) -> None:
    """The mean difference with its interval over the seeds, a dot per seed."""
    for number, rate in enumerate(results["fault_rates"]):
        found = [100 * gap for gap in differences(results, number)]
        mean, half = over_seeds(found)
        names = ["mean, 95% interval", "a seed"] if number == 0 else [None, None]
        panel.errorbar(100 * rate, mean, yerr=half, color="black", marker="_", capsize=4, linewidth=1.2, label=names[0])
        places = [100 * rate + 4] * len(found)
        panel.plot(places, found, linestyle="none", marker="o", markersize=4, color="grey", label=names[1])
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set_title("ratings less overall score, points", fontsize=10)
    panel.legend(frameon=False, loc="upper left")
