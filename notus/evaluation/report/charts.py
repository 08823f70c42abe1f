"""The charts of the report: which there are, and how each is drawn, explained, and said in words."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from notus.evaluation.formatting import number
from notus.evaluation.read_run import Curve, Run

MAX_POINTS = 1_500  # of a curve in the page
COMPONENT = "loss/"  # begins the metric of each loss of a sum
SMOOTHED_FROM = 12  # points; a shorter curve shows its course by itself
SMOOTHED_SHARE = 0.05  # of the points, on either side together
# By a line's colour, which the style sheet has as --c0 and so on: a second sign, for readers who do not see colours.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")


@dataclasses.dataclass(frozen=True)
class Chart:
    """What a chart of training shows; with several runs, each of its lines has a chart of its own."""

    name: str
    title: str
    note: str
    # the name of each line by its metric; `eval_` and the metric is the same on held-out rows.
    lines: Mapping[str, str]
    rows: tuple[str, ...] | None = None  # the rows of data (see `Run.rows`) whose runs have the chart; None: any
    per_beta: bool = False  # divide the values by the run's β, which must be that of a loss with a reference
    unit: str = ""  # of the values, as in `number`
    noisy: bool = True  # draw a moving mean as well
    from_zero: bool = False  # the y axis begins at 0


PREFERENCES = ("pairs", "lists", "labels")
# Of the better and the worse answers: what ends a chart's name, the rows of data, and the names of the two lines.
SIDES = (("", "pairs", "chosen", "rejected"), ("-lists", "lists", "best rated", "worst rated"),
         ("-labels", "labels", "good", "bad"))  # fmt: skip
CHARTS = (
    Chart("loss-sft", "SFT loss", "Negative log-likelihood per completion token, in nats. Lower is better.",
          {"loss": ""}, rows=("sft",)),
    Chart("loss-dpo", "Preference loss", "Mean over pairs.", {"loss": ""}, rows=("pairs",)),
    Chart("loss-lists", "Loss of lists", "Mean over lists.", {"loss": ""}, rows=("lists",)),
    Chart("loss-labels", "Loss of labelled answers", "Mean over answers with a label.", {"loss": ""},
          rows=("labels",)),
    Chart("accuracy", "Reward accuracy", "Share of pairs whose chosen answer has the higher reward. 50% is chance.",
          {"rewards/accuracies": ""}, unit="share", rows=("pairs",)),
    Chart("tau", "Kendall's τ", "How far rewards order the answers of a prompt as their ratings do, mean over prompts. "
          "1: alike, 0: no relation, −1: reversed.", {"rewards/kendall_tau": ""}),
    Chart("top-1", "Top-1 accuracy", "Share of prompts whose answer of the highest reward is a best rated one.",
          {"rewards/top_1": ""}, unit="share"),
    Chart("accuracy-lists", "Pairwise accuracy", "Share of pairs of one prompt's answers with different ratings whose "
          "better one has the higher reward. 50% is chance.", {"rewards/accuracies": ""}, unit="share",
          rows=("lists",)),
    Chart("accuracy-labels", "Reward accuracy", "Share of good answers whose reward is above what the loss subtracts, "
          "and of bad ones below it.", {"rewards/accuracies": ""}, unit="share", rows=("labels",)),
    Chart("margins", "Reward margin", "Reward of the chosen minus that of the rejected answer, mean over pairs.",
          {"rewards/margins": ""}, rows=("pairs",)),
    Chart("margins-lists", "Reward margin", "Reward of the best rated minus that of the worst rated answer, mean over "
          "lists.", {"rewards/margins": ""}, rows=("lists",)),
    Chart("margins-labels", "Reward margin", "Mean reward of good answers minus that of bad ones.",
          {"rewards/margins": ""}, rows=("labels",)),
    *(Chart(f"logps{end}", "Log-probability of the answers", "Sum over the answer's tokens under the policy, in nats, "
            f"mean over {'answers' if rows == 'labels' else rows}.",
            {"logps/chosen": better, "logps/rejected": worse}, rows=(rows,))
      for end, rows, better, worse in SIDES),
    *(Chart(f"drift{end}", "Drift from the reference", "Mean log-ratio of policy to reference on the data's own "
            "answers, in nats (reward / β). Off-policy: a drift, not a KL divergence.",
            {"rewards/chosen": better, "rewards/rejected": worse}, rows=(rows,), per_beta=True)
      for end, rows, better, worse in SIDES),
    Chart("kl", "KL term", "What KTO's loss subtracts: the mean log-ratio of mismatched answers, in nats, at least 0.",
          {"kl": ""}),
    Chart("shift", "Shift of the rewards", "What BCO's loss subtracts: a running mean of rewards.",
          {"rewards/shift": ""}),
    Chart("nll", "NLL of the chosen answers", "Per token, in nats; the extra term of the loss, before its weight.",
          {"nll_loss": ""}),
    Chart("learning-rate", "Learning rate", "As the schedule set it at each step.", {"learning_rate": ""},
          noisy=False),
    Chart("grad-norm", "Gradient norm", "Global norm before clipping.", {"grad_norm": ""}, from_zero=True),
    Chart("pairs-per-second", "Throughput, pairs", "Pairs per second of the whole job, without evaluations.",
          {"pairs_per_second": ""}, from_zero=True, rows=("pairs",)),
    Chart("lists-per-second", "Throughput, lists", "Lists per second of the whole job, without evaluations.",
          {"pairs_per_second": ""}, from_zero=True, rows=("lists",)),
    Chart("labels-per-second", "Throughput, answers", "Labelled answers per second of the whole job, without "
          "evaluations.", {"pairs_per_second": ""}, from_zero=True, rows=("labels",)),
    Chart("examples-per-second", "Throughput, examples", "Examples per second of the whole job, without evaluations.",
          {"examples_per_second": ""}, from_zero=True),
    Chart("tokens-per-second", "Throughput, tokens", "Tokens per second of the whole job.",
          {"system/tokens_per_second": ""}, from_zero=True),
    Chart("mfu", "Model FLOPs utilisation", "Share of the GPUs' peak that the necessary arithmetic takes.",
          {"system/mfu": ""}, unit="share", from_zero=True),
    Chart("memory", "Peak memory", "In GiB, of one process.",
          {"system/gpu_memory_gib": "GPU", "system/host_memory_gib": "host"}, noisy=False, from_zero=True),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Key:
    """An entry of the legend: its name, look, the places of its traces in the figure, and its last value."""

    name: str
    colour: int
    dash: str
    symbol: str
    traces: Sequence[int]
    value: str = ""


@dataclasses.dataclass
class Panel:
    """A chart with its words."""

    name: str  # its id in the page
    # title, note: what it shows, and how to read it.
    title: str
    note: str
    unit: str = ""  # of the values, as in `number`
    # traces and layout; each trace has the number of its colour in `meta`, and the page chooses the colour.
    figure: go.Figure = dataclasses.field(default_factory=go.Figure)
    keys: list[Key] = dataclasses.field(default_factory=list)  # the legend
    spoken: list[str] = dataclasses.field(default_factory=list)  # for screen readers, what each line does

    @property
    def label(self) -> str:
        """The chart in words."""
        return f"{self.title}. " + " ".join(self.spoken)

    def as_json(self) -> dict[str, Any]:
        """Return the figure for the page's script."""
        figure: dict[str, Any] = json.loads(self.figure.to_json())
        figure["layout"].pop("template", None)
        return figure

    def set_axes(self, x: Mapping[str, Any], y: Mapping[str, Any]) -> None:
        """Set plotly's x and y axes; y is written in the panel's unit."""
        shares = {"tickformat": ".0%", "hoverformat": ".1%"} if self.unit == "share" else {"exponentformat": "e"}
        self.figure.update_layout(xaxis=dict(x), yaxis={**shares, **y})

    def add_line(self, curve: Curve, name: str, *, colour: int, held_out: bool, marked: bool, noisy: bool) -> None:
        """Draw a metric over steps: thin, with its moving mean bold where the curve is long and noisy."""
        symbol, dash = _symbol(colour), "dash" if held_out else "solid"
        calm = smooth(curve) if noisy and not held_out else None
        shows = held_out or marked or len(curve.steps) == 1
        mode = "lines+markers" if shows else "lines"
        marker = {"size": 8, "symbol": symbol, "maxdisplayed": 25 if held_out else 7}
        x, y = _decimated(curve)
        if calm is None:
            drawn = [go.Scatter(x=x, y=y, opacity=1.0, mode=mode, line={"width": 2.5, "dash": dash}, marker=marker)]
        else:
            thin = go.Scatter(x=x, y=y, opacity=0.35, mode="lines", line={"width": 1, "dash": dash}, marker=marker)
            x, y = _decimated(calm)
            drawn = [thin, go.Scatter(x=x, y=y, hoverinfo="skip", mode=mode, line={"width": 2.5}, marker=marker)]
        places = [self._add(trace, name, colour) for trace in drawn]
        last = (curve if calm is None else calm).known.values[-1]  # where the bold line ends
        self.keys.append(Key(name, colour, dash, symbol if shows else "", places, number(last, self.unit)))
        self.spoken.append(_course(name, curve, self.unit))

    def add_outline(self, edges: Sequence[float], counts: Sequence[int], name: str, *, colour: int) -> None:
        """Draw a histogram's outline, as shares of all rows: `edges` [n + 1], `counts` [n]."""
        dash = ("solid", "dash", "dot", "dashdot")[colour % 4]
        shares = [count / sum(counts) for count in counts]
        spans = [f"{number(low)} to {number(high)}" for low, high in itertools.pairwise(edges)]
        trace = go.Scatter(
            x=list(edges), y=[*shares, shares[-1]], text=[*spans, spans[-1]], hovertemplate="%{text}: %{y:.1%}",
            mode="lines", fill="tozeroy", line={"width": 2, "dash": dash, "shape": "hv"},
        )  # fmt: skip
        self.keys.append(Key(name, colour, dash, "", [self._add(trace, name, colour)]))
        top = int(np.argmax(shares))
        self.spoken.append(f"{name}: most rows, {shares[top]:.0%}, are at {spans[top]}.")

    def add_bins(self, bins: Sequence[Mapping[str, Any]], name: str, *, colour: int) -> None:
        """Draw how often the model is right by its confidence, with intervals."""
        x, y = np.array([b["confidence"] for b in bins]), np.array([b["frequency"] for b in bins])
        low, high = np.array([b["interval"] for b in bins]).T
        symbol = _symbol(colour)
        counts = [f"{b['count']:,} pairs" if "count" in b else "" for b in bins]
        trace = go.Scatter(
            x=x, y=y, mode="lines+markers", line={"width": 2}, marker={"size": 9, "symbol": symbol}, text=counts,
            hovertemplate="%{y:.1%} right at a confidence of %{x:.1%}, %{text}",
            error_y={"type": "data", "symmetric": False, "array": high - y, "arrayminus": y - low, "thickness": 1},
        )  # fmt: skip
        self.keys.append(Key(name, colour, "solid", symbol, [self._add(trace, name, colour)]))
        pairs = ", ".join(f"{number(b, self.unit)} at {number(a, self.unit)}" for a, b in zip(x, y, strict=True))
        self.spoken.append(f"{name}: {pairs}.")

    def add_rounds(
        self,
        values: Mapping[int, float],
        name: str,
        *,
        colour: int,
        intervals: Mapping[int, tuple[float, float]] | None = None,
    ) -> None:
        """Draw a value of each round (0: before the first), with 95% intervals where they are known."""
        x, y, intervals = list(values), list(values.values()), intervals or {}
        reach = [intervals.get(at, (value, value)) for at, value in values.items()]
        dash = ("solid", "dash", "dot", "dashdot")[colour % 4]
        trace = go.Scatter(
            x=x, y=y, mode="lines+markers", line={"width": 2.5, "dash": dash},
            marker={"size": 9, "symbol": _symbol(colour)},
        )  # fmt: skip
        if intervals:
            above = [high - value for (_, high), value in zip(reach, y, strict=True)]
            below = [value - low for (low, _), value in zip(reach, y, strict=True)]
            ends = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}
            trace.update(error_y=ends)
        place = self._add(trace, name, colour)
        self.keys.append(Key(name, colour, dash, _symbol(colour), [place], number(y[-1], self.unit)))
        course = [
            f"{number(value, self.unit)} {f'in round {at}' if at else 'at the start'}" for at, value in values.items()
        ]
        self.spoken.append(f"{name}: {', '.join(course)}.")

    def _add(self, trace: go.Scatter, name: str, colour: int) -> int:
        """Add a trace and return its place in the figure."""
        self.figure.add_trace(trace.update(name=escape(name), meta={"colour": colour}))
        return len(self.figure.data) - 1


def training_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return the charts for which any of the runs has values."""
    panels = []
    for chart in _charts_of(runs):
        lines = {m: name for m, name in chart.lines.items() if any(_curves(run, chart, m) for run in runs)}
        if len(runs) == 1 and lines:
            panels.append(_training_panel(chart, lines, runs))
        elif len(runs) > 1:
            panels += [_training_panel(chart, {m: name}, runs, name * (len(lines) > 1)) for m, name in lines.items()]
    return panels


def _charts_of(runs: Sequence[Run]) -> list[Chart]:
    """The charts, with that of the components behind the losses, and what is said of the runs' own losses."""
    components = dict.fromkeys(name for run in runs for name in run.curves if name.startswith(COMPONENT))
    parts = Chart(
        "components", "Components of the loss", "Each loss of the sum, before its weight.",
        {name: name.removeprefix(COMPONENT) for name in components}, rows=PREFERENCES,
    )  # fmt: skip
    sigmoid = any(run.loss is not None and run.loss.names == ["sigmoid"] and not run.loss.is_sum for run in runs)
    charts = []
    for chart in CHARTS:
        if chart.name == "loss-dpo" and sigmoid:
            note = f"{chart.note} The sigmoid loss starts at ln 2 = 0.693, where the policy still is the reference."
            chart = dataclasses.replace(chart, note=note)
        charts.append(chart)
        if chart.name == "loss-labels":
            charts.append(parts)
    return charts


def _training_panel(chart: Chart, lines: Mapping[str, str], runs: Sequence[Run], part: str = "") -> Panel:
    """Colours tell runs apart, or the lines of one run, or training from held-out of a single line."""
    name, title = (f"{chart.name}-{part}", f"{chart.title}: {part}") if part else (chart.name, chart.title)
    panel = Panel(name, title, chart.note, chart.unit)
    last = 0
    for place, run in enumerate(runs):
        for index, (metric, line) in enumerate(lines.items()):
            for curve, held_out in _curves(run, chart, metric):
                last = max(last, run.step)
                colour = place if len(runs) > 1 else index if len(lines) > 1 else int(held_out)
                words = [run.label if len(runs) > 1 else line, "held-out" if held_out else "train"]
                marked = len(runs) > 1 or len(lines) > 1
                label = ", ".join(filter(None, words))
                panel.add_line(curve, label, colour=colour, held_out=held_out, marked=marked, noisy=chart.noisy)
    x_axis = {"title": {"text": "step"}, "range": [-0.02 * last, 1.03 * last]}
    ticks = {"tickformat": "~e"} if chart.name == "learning-rate" else {}
    panel.set_axes(x_axis, {"rangemode": "tozero" if chart.from_zero else "normal", **ticks})
    return panel


def _curves(run: Run, chart: Chart, metric: str) -> list[tuple[Curve, bool]]:
    """Return the metric's curves, and whether each is of held-out rows."""
    if chart.rows is not None and run.rows not in chart.rows:
        return []
    scale = 1.0
    if chart.per_beta:
        if run.loss is None or not run.loss.reference:
            return []
        scale = 1.0 / run.loss.beta
    found = [(run.curves.get(metric), False), (run.curves.get(f"eval_{metric}"), True)]
    return [(Curve(curve.steps, scale * curve.values), held_out) for curve, held_out in found if curve is not None]


def data_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return histograms of lengths and ratings of the training rows."""
    of_lists = " Of a list, completion_1 is the best rated." if any(run.rows == "lists" for run in runs) else ""
    lengths, ratings = "Training rows by their number of tokens.", "Training rows by the rating of their answers."
    return [
        *_histograms(runs, "lengths", "Lengths", lengths + of_lists, "tokens"),
        *_histograms(runs, "ratings", "Ratings", ratings + of_lists, "rating"),
    ]


def _histograms(runs: Sequence[Run], group: str, title: str, note: str, axis: str) -> list[Panel]:
    """Return a single chart of all parts (prompt, chosen, …) for one run; for several, a chart for each part.

    Runs with the same data count as one, and equal histograms of a chart are drawn once.
    """
    read = [(run.data.get("train") or {}).get(group) or {} for run in runs]
    found = [{part: h for part, h in histograms.items() if any(h["counts"])} for histograms in read]
    parts = list(dict.fromkeys(part for histograms in found for part in histograms))
    single = all(histograms == found[0] for histograms in found)
    panels = []
    for shown in [parts] if single and parts else [[part] for part in parts]:
        name, heading = (group, title) if single else (f"{group}-{shown[0]}", f"{title}: {shown[0]}")
        panel = Panel(name, heading, note, "share")
        panel.set_axes({"title": {"text": axis}}, {"rangemode": "tozero", "title": {"text": "share of rows"}})
        if single:
            lines = [(part, index, found[0][part]) for index, part in enumerate(shown)]
        else:
            lines = [(run.label, i, found[i][shown[0]]) for i, run in enumerate(runs) if shown[0] in found[i]]
        for label, colour, histogram in _merged(lines):
            panel.add_outline(histogram["edges"], histogram["counts"], label, colour=colour)
        panels.append(panel)
    return panels


def _merged(lines: Sequence[tuple[str, int, Mapping[str, Any]]]) -> list[tuple[str, int, Mapping[str, Any]]]:
    """Return lines (name, colour, histogram) with equal histograms as one, in the first one's colour."""
    groups: list[list[tuple[str, int, Mapping[str, Any]]]] = []
    for line in lines:
        same = next((group for group in groups if group[0][2] == line[2]), None)
        if same is None:
            groups.append([line])
        else:
            same.append(line)
    return [(in_words([name for name, *_ in group]), group[0][1], group[0][2]) for group in groups]


def in_words(names: Sequence[str]) -> str:
    """Return names as "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def calibration_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return a chart of confidence against frequency, with a line for each run; none if no run has it."""
    note = (
        "How sure the model is of the answer that it prefers, σ(margin), against how often that answer is the better "
        "one, with 95% intervals. Above the dotted line, the model is right more often than it is sure."
    )
    panel = Panel("calibration", "Calibration", note, "share")
    shown, counts = [0.5], []
    for colour, run in enumerate(runs):
        known = run.preference_details("calibration") or {}
        if bins := known.get("quantiles") or known.get("bins"):
            panel.add_bins(bins, run.label if len(runs) > 1 else "held-out pairs", colour=colour)
            shown += [entry["confidence"] for entry in bins]
            counts += [entry["count"] for entry in bins if "count" in entry]
    if not panel.keys:
        return []
    if counts:
        least, most = f"{min(counts):,}", f"{max(counts):,}"
        panel.note += f" Each point stands for {least if least == most else f'{least} to {most}'} pairs."
    low, high = 0.5, max(max(shown), 0.52)
    panel.figure.add_scatter(
        x=[low, high], y=[low, high], mode="lines", line={"width": 1.5, "dash": "dot"}, hoverinfo="skip",
        meta={"colour": None},
    )  # fmt: skip
    edge = 0.04 * (high - low)
    ends = [bound for trace in panel.figure.data[:-1] for bound in _reach(trace)]
    y_range = [max(-0.03, min(0.5, *ends) - 0.03), min(1.03, max(high, *ends) + 0.03)]
    x_axis = {"title": {"text": "confidence"}, "tickformat": ".0%" if high - low > 0.08 else ".1%"}
    panel.set_axes(
        {**x_axis, "range": [low - edge, high + edge]}, {"range": y_range, "title": {"text": "how often right"}}
    )
    panel.figure.update_layout(hovermode="closest")
    return [panel]


def _reach(trace: go.Scatter) -> list[float]:
    """The ends of a line's intervals."""
    y = np.asarray(trace.y, dtype=float)
    return [*(y - np.asarray(trace.error_y.arrayminus)).tolist(), *(y + np.asarray(trace.error_y.array)).tolist()]


def decimate(curve: Curve, limit: int = MAX_POINTS) -> Curve:
    """Return at most `limit` (4 or more) of a curve's points: the first, the last, and each stretch's extremes.

    Stretches without a finite value keep a gap of one point.
    """
    count = len(curve.steps)
    if count <= limit:
        return curve
    bounds = np.linspace(1, count - 1, (limit - 2) // 2 + 1).astype(int)
    kept = {0, count - 1}
    for start, end in itertools.pairwise(bounds):
        values = curve.values[start:end]
        if np.isnan(values).all():
            kept.add(int(start))
        else:
            kept |= {int(start + np.nanargmin(values)), int(start + np.nanargmax(values))}
    order = sorted(kept)
    return Curve(curve.steps[order], curve.values[order])


def _decimated(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    few = decimate(curve)
    return few.steps.astype(np.int32), few.values.astype(np.float32)  # half the size in the page


def smooth(curve: Curve) -> Curve | None:
    """Return the centred moving mean over `SMOOTHED_SHARE` of the points; None for a short curve."""
    count = len(curve.steps)
    if count < SMOOTHED_FROM:
        return None
    half = max(1, round(count * SMOOTHED_SHARE / 2))
    known = np.isfinite(curve.values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, curve.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(count)
    reach = np.minimum(half, at)  # narrower at the start, where a run moves fastest and ln 2 should be seen
    low, high = at - reach, np.minimum(at + reach, count - 1) + 1
    seen = counts[high] - counts[low]
    values = np.divide(sums[high] - sums[low], seen, out=np.full(count, np.nan), where=seen > 0)
    return Curve(curve.steps, values)


def _symbol(colour: int) -> str:
    """Return a line's symbol; it shifts by one when the colours are used up, so that no two lines share both."""
    return SYMBOLS[(colour + colour // len(SYMBOLS)) % len(SYMBOLS)]


def _course(name: str, curve: Curve, unit: str) -> str:
    steps, values = curve.known.steps, [number(value, unit) for value in curve.known.values[[0, -1]]]
    if len(steps) == 1:
        return f"{name}: {values[0]} at step {steps[0]}."
    return f"{name}: from {values[0]} at step {steps[0]} to {values[1]} at step {steps[-1]}."
