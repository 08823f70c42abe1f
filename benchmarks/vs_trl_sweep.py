"""Notus beside TRL over prompt-to-completion ratios and lengths; what is measured and checked is that of vs_trl.py.

    python benchmarks/vs_trl_sweep.py --results FILE.json --plot docs/vs-trl-cpu.svg
    python benchmarks/vs_trl_sweep.py --stored FILE.json --plot docs/vs-trl-cpu.svg    # draws again, runs nothing

A length is that of a prompt and one completion. All pairs of a point have the same lengths, so neither side pads;
with `--spread 0.7` they are log-normal around them, as those of vs_trl.py.
Prints a table in Markdown. Ends with exit code 1 if the sides saw other tokens or if their losses differ.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import make_pairs, write_json
from vs_trl import HERE, Bench, call, compare, old_checkout, parse, parser_of_both, settings_of
from vs_trl_report import Comparison, check_losses, check_tokens, loss_distance

LONGEST = 2048  # where the made models' positions end


def parse_arguments() -> argparse.Namespace:
    parser = parser_of_both("Notus beside TRL over ratios and lengths: see the head of this file.")
    parser.set_defaults(sides=["notus", "trl", "trl-precomputed", "trl-liger"])
    parser.add_argument("--ratios", nargs="+", default=["1:4", "1:1", "4:1", "16:1"], help="prompt:completion")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024], help="prompt and one completion")
    parser.add_argument("--spread", type=float, default=0.0, help="of the logarithm of a point's lengths")
    parser.add_argument("--tokens", type=int, default=4096, help="of a point's pairs, prompts counted twice")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs per optimizer step")
    parser.add_argument("--epochs", type=int, default=3, help="three or more: the warm-up's first step changes nothing")
    # ten times that of vs_trl.py, so that the losses of so few steps move
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--plot", type=Path, help="draw the speed-ups to this SVG file (needs matplotlib)")
    parser.add_argument("--stored", type=Path, help="take the results from this file and run nothing")
    return parse(parser)


def split(ratio: str, length: int) -> tuple[int, int]:
    """Tokens of a prompt and of a completion: `split("4:1", 1000) == (800, 200)`."""
    prompt, completion = map(int, ratio.split(":"))
    scored = round(length * completion / (prompt + completion))
    return length - scored, scored


def point_pairs(tokens: int, length: int, batch_size: int) -> int:
    """Whole steps with about `tokens` tokens in all, one at least."""
    return batch_size * max(1, round(tokens / (2 * length * batch_size)))


def run_point(args: argparse.Namespace, folder: Path, model: Path, ratio: str, length: int) -> Comparison:
    """Run every side that can run here, on pairs of one shape."""
    prompt, completion = split(ratio, length)
    num_pairs = point_pairs(args.tokens, length, args.batch_size)
    pairs = folder / "pairs.jsonl"
    make_pairs(pairs, num_pairs, args.seed, prompt=prompt, completion=completion, spread=args.spread)
    point = {"max_length": LONGEST, "num_pairs": num_pairs, "epochs": [args.epochs]}
    tokens_per_row = max(Bench.tokens_per_row, longest_pair(pairs))
    settings = argparse.Namespace(**{**vars(args), **point})
    return compare(Bench(settings, folder, model, pairs, tokens_per_row, args.old), with_rate=False)


def longest_pair(pairs: Path) -> int:
    """Tokens of the longest made pair, its prompt once: a row of Notus holds a pair whole.

    Ends the process if the model has not as many positions.
    """
    lengths = [[len(text.split()) + 1 for text in json.loads(line).values()] for line in pairs.read_text().splitlines()]
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths)
    if longest > LONGEST:
        sys.exit(f"a made pair has {longest} tokens, the model {LONGEST} positions: lower --lengths or --spread")
    return max(map(sum, lengths))


def summary(comparison: Comparison, ratio: str, length: int) -> dict[str, Any]:
    """What is kept of a point."""
    prompt, completion = split(ratio, length)
    return {
        "ratio": ratio,
        "length": length,
        "prompt": prompt,
        "completion": completion,
        "num_pairs": comparison.num_pairs,
        "sides": {side: side_summary(comparison, side) for side in comparison.sides},
    }


def side_summary(comparison: Comparison, side: str) -> dict[str, Any]:
    """What is kept of a side at a point; "steady" is without the first step and a reference pass ahead of training."""
    epochs, outcomes = comparison.epochs[0], comparison.outcomes(side)
    peak, above_imports = comparison.peak(side)
    return {
        "options": comparison.options(side, epochs),
        "pairs_per_second": comparison.speed(side, epochs),
        "steady_pairs_per_second": comparison.steady(side, epochs),
        "peak_mib": peak,
        "above_imports_mib": above_imports,
        "loss_difference": loss_distance(comparison, comparison.sides[0], side, epochs),
        "seconds": [outcome.seconds for outcome in outcomes],
        "step_seconds": [outcome.step_seconds for outcome in outcomes],
        "losses": [outcome.losses for outcome in outcomes],
    }


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The results of all points, and what is wrong with them."""
    points, faults = [], []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        call(Path(scratch), HERE / "common.py", model, args.seed, args.size)
        args.old = old_checkout(args.against, Path(scratch))
        for length in args.lengths:
            for ratio in args.ratios:
                print(f"prompt:completion {ratio}, length {length}", file=sys.stderr)
                comparison = run_point(args, Path(tempfile.mkdtemp(dir=scratch)), model, ratio, length)
                points.append(summary(comparison, ratio, length))
                wrong = check_tokens(comparison, LONGEST) + check_losses(comparison, args.tolerance)
                faults += [f"{ratio}, length {length}: {fault}" for fault in wrong]
    results = {
        "machine": comparison.runs[0].outcome.machine,
        "not_run": comparison.not_run,
        "settings": settings_of(args),
        "points": points,
    }
    return results, faults


# ---- from the results, measured or stored, to the table and the plot ----


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


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run at hand ends too
    results, faults = (json.loads(args.stored.read_text()), []) if args.stored else measure(args)
    print(table(results))
    if args.results:
        write_json(args.results, results)
    if args.plot:
        draw(results, args.plot)
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
