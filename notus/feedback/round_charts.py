"""The charts of the report across rounds: which there are, and from which figures of a round each is drawn."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from notus.evaluation.intervals import normal
from notus.evaluation.report.charts import Panel
from notus.feedback.rounds import Round


@dataclasses.dataclass(frozen=True)
class RoundChart:
    """A chart over rounds.

    Attributes:
        name: its id in the page.
        title, note: what it shows, and how to read it. `{score}` stands for what the judge gives: rating or reward.
        lines: the name of each line by the figure that it shows; see `figure_of`.
        start: by figure, the one that has its value at round 0, which is the starting model.
        interval: by figure, the one that has its 95% interval.
        stderr: by figure, the one that has its standard error.
        unit: of the values, as in `notus.evaluation.formatting.number`.
        level: a value to draw a dotted line at.
        from_zero: whether the y axis begins at 0.
    """

    name: str
    title: str
    note: str
    lines: Mapping[str, str]
    start: Mapping[str, str] = dataclasses.field(default_factory=dict)
    interval: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stderr: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unit: str = ""
    level: float | None = None
    from_zero: bool = False


CHARTS = (
    RoundChart("win-rate", "Win rate against the start", "Share of evaluation prompts on which the judge gives the "
               "round's answer a higher {score} than the start's; a tie counts half. With 95% intervals. Above the "
               "dotted line the round is better.",
               {"comparison.win_rate": "win rate"}, interval={"comparison.win_rate": "comparison.interval"},
               unit="share", level=0.5),
    RoundChart("score", "Mean {score} of the answers", "Over the evaluation prompts. The judge sees both answers to a "
               "prompt together, so it judges the start's anew in every round.",
               {"comparison.rating": "this round", "comparison.start_rating": "the start"}),
    RoundChart("score-sampled", "Mean {score} of the sampled completions", "Of the prompts that the round learned "
               "from; the policy is the model that the round started from. The prompts of two rounds differ.",
               {"rated.mean": "policy", "rated.mean_of_all": "all models"}),
    RoundChart("kl", "KL to the start", "In nats per completion, from samples of the round's model, with 95% "
               "intervals.", {"evaluation.kl": "KL"}, stderr={"evaluation.kl": "evaluation.kl_stderr"}, from_zero=True),
    RoundChart("length", "Length", "Mean number of tokens: of the greedy answers to the evaluation prompts, and of the "
               "completions that the policy sampled to learn from.",
               {"answers.tokens": "answers", "sampling.policy.tokens": "sampled"},
               start={"answers.tokens": "start.tokens"}, from_zero=True),
    RoundChart("faults", "Empty and cut", "Share of these texts that are empty, or were cut at their most tokens. A "
               "model that writes longer and longer shows here first.",
               {"answers.empty": "answers, empty", "answers.cut": "answers, cut",
                "sampling.policy.empty": "sampled, empty", "sampling.policy.cut": "sampled, cut"},
               start={"answers.empty": "start.empty", "answers.cut": "start.cut"}, unit="share", from_zero=True),
    RoundChart("distinct", "Distinct n-grams", "Different n-grams among all n-grams of the answers to the evaluation "
               "prompts. Lower is more alike.",
               {f"answers.diversity.distinct.{i}": f"distinct-{i + 1}" for i in range(4)},
               start={f"answers.diversity.distinct.{i}": f"start.diversity.distinct.{i}" for i in range(4)},
               unit="share"),
    RoundChart("similarity", "Self-similarity", "How much two sampled completions of one prompt have in common (shared "
               "pairs of words), and the share that repeats an earlier one to the letter. Pairs need "
               "completions that differ.",
               {"sampling.policy.diversity.self_similarity": "in common",
                "sampling.policy.diversity.duplicates": "repeated"}, unit="share"),
    RoundChart("pairs", "Preference pairs", "Rows that the round learned from, with those of earlier rounds. Prompts "
               "whose completions tie make none.",
               {"pairs.rows": "pairs", "pairs.old": "of earlier rounds", "sampling.prompts": "prompts"},
               from_zero=True),
    RoundChart("margin", "Margin of the pairs", "Mean {score} of the chosen minus that of the rejected completion.",
               {"pairs.margin": "margin"}),
    RoundChart("accuracy", "Held-out reward accuracy", "Share of held-out pairs whose chosen answer has the higher "
               "reward under the round's model, against the start's. 50% is chance.",
               {"evaluation.held_out_accuracy": "accuracy"},
               interval={"evaluation.held_out_accuracy": "evaluation.accuracy_interval"}, unit="share", level=0.5),
    RoundChart("agreement", "The judge's agreement with itself", "Of prompts that it judged twice, in two orders: "
               "prompts with the same best completion, completions with the same rating, and with one at most 1 "
               "apart.",
               {"judging.again.same_best": "same best", "judging.again.exact": "same rating",
                "judging.again.within_one": "within 1"}, unit="share"),
    RoundChart("position", "The judge's position bias", "How often the best completion stood at each place of the "
               "order that the judge saw, over how often by chance. Without a bias it is 1 at every place.",
               {f"judging.position.best.{i}": f"place {i + 1}" for i in range(16)}, level=1.0,
               from_zero=True),
    RoundChart("judge-tokens", "The judge's tokens", "That it read and wrote in the round.",
               {"judge_tokens": "tokens"}, from_zero=True),
    RoundChart("judge-cost", "The judge's cost", "In US dollars, by the prices given.", {"judge_cost": "cost"},
               from_zero=True),
)  # fmt: skip


def round_panels(rounds: Mapping[int, Round], score: str) -> list[Panel]:
    """Return the charts for which any round has a value.

    Args:
        rounds: by number, from 1.
        score: what the judge gives, "rating" or "reward".
    """
    several = any(one.sampling is not None and len(one.sampling.models) > 1 for one in rounds.values())
    panels = []
    for chart in CHARTS:
        lines = dict(chart.lines)
        if not several:
            lines.pop("rated.mean_of_all", None)  # it would be the policy's again
        if not any(one.pairs is not None and one.pairs.old for one in rounds.values()):
            lines.pop("pairs.old", None)
        found = {figure: values for figure in lines if (values := _values(chart, figure, rounds))}
        if any(any(values.values()) for values in found.values()):  # charts of nothing but 0 say nothing
            panels.append(_panel(chart, {lines[figure]: figure for figure in found}, found, rounds, score))
    return panels


def _values(chart: RoundChart, figure: str, rounds: Mapping[int, Round]) -> dict[int, float]:
    """Return a line's points by round, that of the start first."""
    values = {number: figure_of(one, figure) for number, one in rounds.items()}
    if figure in chart.start:
        starts = (figure_of(one, chart.start[figure]) for one in rounds.values())
        values = {0: next((value for value in starts if value is not None), None), **values}
    return {number: value for number, value in values.items() if value is not None}


def _panel(
    chart: RoundChart,
    lines: Mapping[str, str],
    found: Mapping[str, Mapping[int, float]],
    rounds: Mapping[int, Round],
    score: str,
) -> Panel:
    panel = Panel(chart.name, chart.title.format(score=score), chart.note.format(score=score), chart.unit)
    for colour, (name, figure) in enumerate(lines.items()):
        intervals = _intervals(chart, figure, found[figure], rounds)
        panel.add_rounds(found[figure], name, colour=colour, intervals=intervals)
    last = max(rounds)
    first = 0 if any(0 in values for values in found.values()) else 1
    span = [first - 0.4, last + 0.4]
    if chart.level is not None:
        panel.figure.add_scatter(
            x=span, y=[chart.level] * 2, mode="lines", line={"width": 1.5, "dash": "dot"}, hoverinfo="skip",
            meta={"colour": None},
        )  # fmt: skip
    x_axis = {"title": {"text": "round"}, "range": span, "tickformat": "d", "dtick": math.ceil(last / 10)}
    panel.set_axes(x_axis, {"rangemode": "tozero" if chart.from_zero else "normal"})
    return panel


def _intervals(
    chart: RoundChart, figure: str, values: Mapping[int, float], rounds: Mapping[int, Round]
) -> dict[int, tuple[float, float]]:
    """Return the 95% intervals of a line's points, where they are known."""
    if figure in chart.interval:
        ends = {n: at_path(rounds[n], chart.interval[figure]) for n in values if n}
        return {number: (both[0], both[1]) for number, both in ends.items() if both is not None}
    if figure in chart.stderr:
        errors = {n: figure_of(rounds[n], chart.stderr[figure]) for n in values if n}
        reach = {number: normal() * error for number, error in errors.items() if error is not None}
        return {number: (values[number] - half, values[number] + half) for number, half in reach.items()}
    return {}


def figure_of(one: Round, path: str) -> float | None:
    """Return a figure of a round by its path, as "answers.diversity.distinct.1"; None where a part is not there."""
    value = at_path(one, path)
    assert value is None or isinstance(value, int | float)
    return value


def at_path(one: Round, path: str) -> Any:
    """Return any part of a round by its path; None where a part of the path is not there."""
    value: Any = one
    for name in path.split("."):
        if value is None:
            return None
        if isinstance(value, Sequence):
            value = value[int(name)] if int(name) < len(value) else None
        else:
            value = getattr(value, name)
    return value
