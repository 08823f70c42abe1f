"""From the results of `vs_trl_sweep.py`, measured or stored, to its table and its plot."""

from pathlib import Path
from typing import Any


def table(results: dict[str, Any]) -> str:
    """A Markdown table with a row per point, under a line that says what ran."""
    points, settings = results["points"], results["settings"]
    first, *others = points[0]["sides"]
    speeds = [f"{side}, pairs/s" for side in (first, *others)]
    ratios = [f"{first} / {other}" for other in others]
    heads = ["prompt", "completion", "pairs", *speeds, *ratios, "steady", "peak memory", "losses within"]
    lines = [
        f"{settings['size']} parameters, {settings['precision']}, epochs: {settings['epochs']}, "
        f"{settings['batch_size']} pairs per step, "
        f"spread of the lengths: {settings['spread']}; {results['machine']}",
        *(f"{side}: not run ({why})" for side, why in results["not_run"].items()),
        "",
        f"| {' | '.join(heads)} |",
        f"|{'--:|' * len(heads)}",
        *(f"| {' | '.join(_cells(point))} |" for point in points),
    ]
    if others:
        lines += [
            "",
            f"steady: the ratios to {', '.join(others)} of the steps after the first alone, without a reference pass "
            f"ahead of training; peak memory: {first}'s above imports over theirs; losses within: the largest "
            "difference at a step, of how far they moved.",
        ]
    return "\n".join(lines)


def _cells(point: dict[str, Any]) -> list[str]:
    mine, *others = point["sides"].values()
    return [
        *(str(point[name]) for name in ("prompt", "completion", "num_pairs")),
        *(f"{side['pairs_per_second']:.2f}" for side in (mine, *others)),
        *(f"{ratio(mine, other):.1f}x" for other in others),
        ", ".join(f"{ratio(mine, other, 'steady_pairs_per_second'):.1f}x" for other in others),
        ", ".join(f"{mine['above_imports_mib'] / other['above_imports_mib']:.2f}x" for other in others),
        f"{max((other['loss_difference'] for other in others), default=0.0):.1e} of {_moved(mine):.1e}",
    ]


def _moved(side: dict[str, Any]) -> float:
    """How far the losses moved: they start at ln 2 on any side, so agreement says the more, the further they went."""
    return max(max(losses) - min(losses) for losses in side["losses"])


def ratio(mine: dict[str, Any], other: dict[str, Any], what: str = "pairs_per_second") -> float:
    """Pairs per second of one side over those of another; by default everything is counted."""
    return mine[what] / other[what]


def draw(results: dict[str, Any], path: Path) -> None:
    """An SVG file with a panel per length: how many times faster the first side is than each other one, by ratio.

    The same results give the same file, byte for byte, with the same matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lengths = list(dict.fromkeys(point["length"] for point in results["points"]))
    # text stays text, and the ids in the file follow from a fixed salt
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "notus", "font.size": 10}):
        figure = Figure(figsize=(4 * len(lengths), 3.2), layout="constrained")
        panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
        for panel, length in zip(panels, lengths, strict=True):
            _draw_panel(panel, [point for point in results["points"] if point["length"] == length])
            panel.set_title(f"prompt + completion: {length} tokens", fontsize=10)
        first = next(iter(results["points"][0]["sides"]))
        panels[0].set_ylabel(f"pairs/s, {first} over the other")
        panels[0].set_ylim(0, 1.15 * panels[0].get_ylim()[1])  # of all panels; room for the values
        panels[0].legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_panel(panel: Any, points: list[dict[str, Any]]) -> None:
    """A line per other side; the value stands at each point."""
    first, *others = points[0]["sides"]
    names = [point["ratio"] for point in points]
    for other in others:
        values = [ratio(point["sides"][first], point["sides"][other]) for point in points]
        panel.plot(names, values, marker="o", label=other)
        for name, value in zip(names, values, strict=True):
            panel.annotate(f"{value:.1f}", (name, value), (0, 5), textcoords="offset points", ha="center", fontsize=8)
    panel.axhline(1, color="grey", linewidth=0.8)
    panel.margins(x=0.1)
    panel.set_xlabel("prompt : completion")
    for edge in ("top", "right"):
        panel.spines[edge].set_visible(False)
