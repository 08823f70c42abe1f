"""A chart of the report: traces, the key that stands above it, and the same in words."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from notus.evaluation.report.curves import decimate, smooth
from notus.evaluation.report.numbers import number
from notus.evaluation.report.reading import Curve

# By a line's colour, which the page's style sheet has as --c0 and so on: a second sign, for those who do not see it.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
HELD_OUT_DASH = "dash"


@dataclasses.dataclass(frozen=True)
class Key:
    """An entry of the legend: its text, look, the places of its traces in the figure, and its last value."""

    name: str
    colour: int
    dash: str
    symbol: str
    traces: Sequence[int]
    value: str = ""


@dataclasses.dataclass
class Panel:
    """A chart with its words.

    Attributes:
        name: its id in the page.
        title, note: what it shows, and how to read it; `unit` as `number` has it.
        figure: traces and layout; colours are by number, in each trace's meta, and the page's to choose.
        keys: the legend.
        spoken: for screen readers, what each line does.
    """

    name: str
    title: str
    note: str
    unit: str = ""
    figure: go.Figure = dataclasses.field(default_factory=go.Figure)
    keys: list[Key] = dataclasses.field(default_factory=list)
    spoken: list[str] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        """The chart in words."""
        return f"{self.title}. " + " ".join(self.spoken)

    def as_json(self) -> dict[str, Any]:
        """The figure for the page's script."""
        figure: dict[str, Any] = json.loads(self.figure.to_json())
        figure["layout"].pop("template", None)
        return figure

    def set_axes(self, *, x: str, last: int | None = None, **y_axis: Any) -> None:
        """Name the x axis and, for steps, where it ends; and say how the y axis is written."""
        shares = {"tickformat": ".0%", "hoverformat": ".1%"} if self.unit == "share" else {"exponentformat": "e"}
        ends = {} if last is None else {"range": [0, 1.03 * last]}
        self.figure.update_layout(xaxis={"title": {"text": x}, **ends}, yaxis={**shares, **y_axis})

    def add_line(
        self, curve: Curve, name: str, *, colour: int, held_out: bool = False, marked: bool = False, noisy: bool = True
    ) -> None:
        """A metric over steps: thin as it is, with its moving mean bold where it is long and noisy."""
        symbol = _symbol(colour)
        dash, first = HELD_OUT_DASH if held_out else "solid", len(self.figure.data)
        calm = smooth(curve) if noisy and not held_out else None
        shows = held_out or marked or len(curve.steps) == 1
        marker = {"size": 8, "symbol": symbol, "maxdisplayed": 25 if held_out else 7}
        modes = {True: "lines+markers", False: "lines"}
        self._trace(
            decimate(curve), name, colour=colour, opacity=0.35 if calm else 1.0,
            mode=modes[shows and calm is None], line={"width": 1 if calm else 2.5, "dash": dash}, marker=marker,
        )  # fmt: skip
        if calm is not None:
            self._trace(
                decimate(calm), name, colour=colour, hoverinfo="skip", mode=modes[shows], line={"width": 2.5},
                marker=marker,
            )  # fmt: skip
        last = (curve if calm is None else calm).known.values[-1]  # as the bold line ends
        traces, value = range(first, len(self.figure.data)), number(last, self.unit)
        self.keys.append(Key(name, colour, dash, symbol if shows else "", traces, value))
        self.spoken.append(_course(name, curve, self.unit))

    def _trace(self, curve: Curve, name: str, *, colour: int, **look: Any) -> None:
        self.figure.add_scatter(
            x=curve.steps.astype(np.int32), y=curve.values.astype(np.float32), name=escape(name),
            meta={"colour": colour}, **look,
        )  # fmt: skip

    def add_outline(self, edges: Sequence[float], shares: Sequence[float], name: str, *, colour: int) -> None:
        """A histogram's outline: `edges` [n + 1], `shares` [n] of all rows."""
        dash = ("solid", "dash", "dot", "dashdot")[colour % 4]
        spans = [f"{number(low)} to {number(high)}" for low, high in itertools.pairwise(edges)]
        self.keys.append(Key(name, colour, dash, "", [len(self.figure.data)]))
        self.figure.add_scatter(
            x=list(edges), y=[*shares, shares[-1]], name=escape(name), text=[*spans, spans[-1]],
            hovertemplate="%{text}: %{y:.1%}", mode="lines", fill="tozeroy", meta={"colour": colour},
            line={"width": 2, "dash": dash, "shape": "hv"},
        )  # fmt: skip
        top = int(np.argmax(shares))
        self.spoken.append(f"{name}: most rows, {shares[top]:.0%}, are at {spans[top]}.")

    def add_points(
        self, x: Sequence[float], y: Sequence[float], name: str, *, colour: int, intervals: Sequence[Sequence[float]]
    ) -> None:
        """Points joined by a line, each with the low and the high end of its interval."""
        symbol = _symbol(colour)
        self.keys.append(Key(name, colour, "solid", symbol, [len(self.figure.data)]))
        above = [high - value for value, (_, high) in zip(y, intervals, strict=True)]
        below = [value - low for value, (low, _) in zip(y, intervals, strict=True)]
        self.figure.add_scatter(
            x=list(x), y=list(y), name=escape(name), mode="lines+markers", meta={"colour": colour},
            line={"width": 2}, marker={"size": 9, "symbol": symbol},
            error_y={"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1},
        )  # fmt: skip
        told = ", ".join(f"{number(b, self.unit)} at {number(a, self.unit)}" for a, b in zip(x, y, strict=True))
        self.spoken.append(f"{name}: {told}.")

    def add_diagonal(self, low: float, high: float) -> None:
        """A quiet line along which y is x."""
        self.figure.add_scatter(
            x=[low, high], y=[low, high], mode="lines", line={"width": 1.5, "dash": "dot"}, hoverinfo="skip",
            meta={"colour": None},
        )  # fmt: skip


def _symbol(colour: int) -> str:
    """Moves on by one each time the colours are used up, so that no two of many lines share both."""
    return SYMBOLS[(colour + colour // len(SYMBOLS)) % len(SYMBOLS)]


def _course(name: str, curve: Curve, unit: str) -> str:
    steps, values = curve.known.steps, [number(value, unit) for value in curve.known.values[[0, -1]]]
    if len(steps) == 1:
        return f"{name}: {values[0]} at step {steps[0]}."
    return f"{name}: from {values[0]} at step {steps[0]} to {values[1]} at step {steps[-1]}."
