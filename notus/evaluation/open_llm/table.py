"""lm-eval's results as figures, and as one Markdown table beside the published ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from notus.evaluation.open_llm.benchmarks import BY_TASK, NOTES
from notus.evaluation.results import Figure

PEERS = ZEPHYR, NOTUS = "Zephyr-7B-beta", "Notus 7B v1"
# Shares of 1, which people read in %.
_SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "brier_acc", "contains", "em", "exact_match", "f1"})
_IN_PERCENT = ("squadv2", "scrolls_")  # how tasks begin whose `em` and `f1` lm-eval gives in % already


def figures(results: dict[str, Any], names: Sequence[str], *, limit: int | None = None) -> list[Figure]:
    """The figures of tasks and groups: of the leaderboard's seven its own measure, of others all that they have.

    Args:
        results: as lm-eval's `simple_evaluate` returns them.
        names: which, in order.
        limit: of a trial, how many examples of each task were taken; None: all.
    """
    found = []
    for name in names:
        own = _own_figures(results, name)
        if limit is not None:
            own = [dataclasses.replace(figure, setup=f"{figure.setup}, the first {limit} examples") for figure in own]
        # a group without a measure of its own stands for its members
        found += own or figures(results, [task for task in _tasks_of(results, name) if task != name], limit=limit)
    return found


def _own_figures(results: dict[str, Any], name: str) -> list[Figure]:
    values = {**results["results"], **results.get("groups", {})}.get(name, {})
    found = []
    for key in values:
        metric, _, reading = key.partition(",")
        if not reading or metric.endswith("_stderr") or not isinstance(values[key], int | float):
            continue
        if name not in BY_TASK or (metric, reading) == (BY_TASK[name].metric, BY_TASK[name].filter):
            found.append(_figure(results, name, metric, reading, values))
    return found


def _figure(results: dict[str, Any], name: str, metric: str, reading: str, values: dict[str, Any]) -> Figure:
    scale, unit = _scale(name, metric, values[f"{metric},{reading}"])
    stderr = values.get(f"{metric}_stderr,{reading}")
    first = _tasks_of(results, name)[0]
    benchmark = BY_TASK.get(name)
    shown = metric if reading == "none" else f"{metric} ({reading})"
    return Figure(
        name=benchmark.title if benchmark else name,
        metric=shown,
        value=scale * values[f"{metric},{reading}"],
        unit=unit,
        stderr=scale * stderr if isinstance(stderr, int | float) else None,
        count=sum(results["n-samples"][task]["effective"] for task in _tasks_of(results, name)),
        setup=f"{results['n-shot'][first]}-shot",
        dataset=benchmark.dataset if benchmark else results["configs"][first].get("dataset_path"),
        reference={ZEPHYR: benchmark.zephyr, NOTUS: benchmark.notus} if benchmark else {},
    )


def _scale(name: str, metric: str, value: float) -> tuple[float, str]:
    """What to multiply a measure by, and the unit that it has then."""
    if metric not in _SHARES:
        return 1.0, ""
    if name.startswith(_IN_PERCENT) and metric in ("em", "f1"):
        return 1.0, "%"
    # more than 1 is no share, whatever a task of the user's calls it
    return (1.0, "") if value > 1 else (100.0, "%")


def _tasks_of(results: dict[str, Any], name: str) -> list[str]:
    """The tasks of a group, down to the last, or the task itself."""
    members = [member for member in results.get("group_subtasks", {}).get(name, []) if member != name]
    return [task for member in members for task in _tasks_of(results, member)] if members else [name]


def markdown(model: str, found: Sequence[Figure], remarks: Sequence[str]) -> str:
    """One table, and what a reader has to know below it."""
    model = model.replace("|", "\\|")
    lines = [
        f"| benchmark | measure | examples | {model} | {ZEPHYR} | {NOTUS} |",
        "|---|---|---:|---:|---:|---:|",
        *(_line(figure) for figure in found),
        "",
    ]
    lines += [f"\\* {NOTES[figure.name]}." for figure in found if figure.name in NOTES]
    if any(figure.reference for figure in found):
        lines.append(
            f"{ZEPHYR} and {NOTUS}: figures of the Open LLM Leaderboard, by the lm-evaluation-harness of its time; "
            "later versions may score a task differently."
        )
    return "\n".join([*lines, *remarks]).rstrip() + "\n"


def _line(figure: Figure) -> str:
    star = "\\*" if figure.name in NOTES else ""
    value = f"{figure.value:.2f}" if abs(figure.value) < 1e6 else f"{figure.value:.3g}"
    value += f" {figure.unit}".rstrip()
    error = f" ± {figure.stderr:.2f}" if figure.stderr is not None else ""
    published = " | ".join(f"{figure.reference[peer]:.2f}" if peer in figure.reference else "-" for peer in PEERS)
    measure = f"{figure.metric}, {figure.setup}"
    return f"| {figure.name}{star} | {measure} | {figure.count} | {value}{error} | {published} |"
