"""What the metrics of training show: which charts there are, and what each says of itself."""

import dataclasses
from collections.abc import Sequence

from notus.evaluation.report.panels import Panel
from notus.evaluation.report.reading import Curve, RunRecord


@dataclasses.dataclass(frozen=True)
class Line:
    """A metric in a chart, its held-out fellow being eval_ and the same name."""

    metric: str
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of `lines`; with several runs, each line has a chart of its own.

    Attributes:
        task: the only task that has it; None: any.
        per_beta: values are divided by the run's β.
        unit: of the values, as `number` has it.
        noisy: whether a moving mean helps to see the course.
        from_zero: whether the y axis begins at 0.
    """

    name: str
    title: str
    note: str
    lines: Sequence[Line]
    task: str | None = None
    per_beta: bool = False
    unit: str = ""
    noisy: bool = True
    from_zero: bool = False


def _answers(group: str) -> tuple[Line, ...]:
    return tuple(Line(f"{group}/{name}", name) for name in ("chosen", "rejected"))


CHARTS = (
    Chart("loss-sft", "SFT loss", "Negative log-likelihood per completion token, in nats. Lower is better.",
          [Line("loss")], task="sft"),
    Chart("loss-dpo", "DPO loss", "Mean over pairs. The sigmoid loss starts at ln 2 = 0.693, where the policy still "
          "is the reference.", [Line("loss")], task="dpo"),
    Chart("accuracy", "Reward accuracy", "Share of pairs whose chosen answer has the higher reward. 50% is chance.",
          [Line("rewards/accuracies")], unit="share"),
    Chart("margins", "Reward margin", "Reward of the chosen minus that of the rejected answer, mean over pairs.",
          [Line("rewards/margins")]),
    Chart("logps", "Log-probability of the answers", "Sum over the answer's tokens under the policy, in nats, mean "
          "over pairs.", _answers("logps")),
    Chart("drift", "Drift from the reference", "Mean log-ratio of policy to reference on the data's own answers, in "
          "nats (reward / β). Off-policy: a drift, not a KL divergence.", _answers("rewards"), task="dpo",
          per_beta=True),
    Chart("nll", "NLL of the chosen answers", "Per token, in nats; the extra term of the loss.", [Line("nll_loss")]),
    Chart("learning-rate", "Learning rate", "As the schedule set it at each step.", [Line("learning_rate")],
          noisy=False),
    Chart("grad-norm", "Gradient norm", "Global norm before clipping.", [Line("grad_norm")], from_zero=True),
    Chart("pairs-per-second", "Throughput, pairs", "Pairs per second of the whole job, without evaluations.",
          [Line("pairs_per_second")], from_zero=True),
    Chart("examples-per-second", "Throughput, examples", "Examples per second of the whole job, without evaluations.",
          [Line("examples_per_second")], from_zero=True),
    Chart("tokens-per-second", "Throughput, tokens", "Tokens per second of the whole job.",
          [Line("system/tokens_per_second")], from_zero=True),
    Chart("mfu", "Model FLOPs utilisation", "Share of the GPUs' peak that the necessary arithmetic takes.",
          [Line("system/mfu")], unit="share", from_zero=True),
    Chart("memory", "Peak memory", "In GiB, of one process.",
          [Line("system/gpu_memory_gib", "GPU"), Line("system/host_memory_gib", "host")], noisy=False,
          from_zero=True),
)  # fmt: skip


def training_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """The charts for which any of the runs has values."""
    panels = []
    for chart in CHARTS:
        lines = [line for line in chart.lines if any(_curves(run, chart, line) for run in runs)]
        if len(runs) > 1:
            panels += [_overlay(chart, line, runs, many=len(lines) > 1) for line in lines]
        elif lines:
            panels.append(_single(chart, lines, runs[0]))
    return panels


def _single(chart: Chart, lines: Sequence[Line], run: RunRecord) -> Panel:
    """One run: colours tell lines apart, or training from held-out where there is one line alone."""
    panel = _panel(chart, chart.name, chart.title, [run])
    for index, line in enumerate(lines):
        for curve, held_out in _curves(run, chart, line):
            words = [line.name, "held-out" if held_out else "train"]
            colour = index if len(lines) > 1 else int(held_out)
            name = ", ".join(word for word in words if word)
            panel.add_line(curve, name, colour=colour, held_out=held_out, marked=len(lines) > 1, noisy=chart.noisy)
    return panel


def _overlay(chart: Chart, line: Line, runs: Sequence[RunRecord], *, many: bool) -> Panel:
    """Several runs: colours tell them apart, dashes training from held-out."""
    title = f"{chart.title}: {line.name}" if many else chart.title
    shown = [run for run in runs if _curves(run, chart, line)]
    panel = _panel(chart, f"{chart.name}-{line.name}" if many else chart.name, title, shown)
    for colour, run in enumerate(runs):
        for curve, held_out in _curves(run, chart, line):
            name = f"{run.label}, {'held-out' if held_out else 'train'}"
            panel.add_line(curve, name, colour=colour, held_out=held_out, marked=True, noisy=chart.noisy)
    return panel


def _panel(chart: Chart, name: str, title: str, runs: Sequence[RunRecord]) -> Panel:
    panel = Panel(name, title, chart.note, chart.unit)
    last = max(run.step for run in runs)
    panel.set_axes(x="step", last=last, rangemode="tozero" if chart.from_zero else "normal")
    return panel


def _curves(run: RunRecord, chart: Chart, line: Line) -> list[tuple[Curve, bool]]:
    """The line's curves, and whether each is of held-out rows."""
    if chart.task not in (None, run.task):
        return []
    scale = 1.0 / run.settings["dpo"]["beta"] if chart.per_beta else 1.0
    found = [(run.curves.get(line.metric), False), (run.curves.get(f"eval_{line.metric}"), True)]
    return [(Curve(curve.steps, scale * curve.values), held) for curve, held in found if curve is not None]
