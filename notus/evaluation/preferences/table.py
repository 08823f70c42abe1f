"""The figures of a preference evaluation, for a terminal and in the form that every suite leaves."""

from collections.abc import Iterator
from typing import Any

from notus.evaluation.names import public_name
from notus.evaluation.results import Figure, Result

_MEASURES = {"rewards": "reward", "logps": "log-prob", "logps_per_token": "log-prob per token"}
_MOST_SOURCES = 12

SUITE = "preferences"
DETAILS = ("overall", "by_source", "by_length", "by_longer", "length_bias", "calibration", "kl")


def table(result: dict[str, Any]) -> str:
    """The figures for a terminal."""
    against = f"against {result['base']}, beta {result['beta']:g}" if result["base"] else "without a base"
    lines = [
        f"{result['model']} {against}: {result['num_pairs']} pairs, {result['precision']}",
        f"{'':18}{'chosen':>12}{'rejected':>12}{'margin':>12}{'accuracy':>12}",
    ]
    for name, title in _MEASURES.items():
        if f"{name}/chosen" in result:
            parts = (result[f"{name}/{part}"] for part in ("chosen", "rejected", "margins", "accuracies"))
            lines.append(f"{title:18}{''.join(f'{value:12.4f}' for value in parts)}")
    if "loss" in result:
        lines.append(f"sigmoid loss {result['loss']:.6f}")
    return "\n".join([*lines, *_sentences(result), "", *_breakdowns(result)])


def _sentences(result: dict[str, Any]) -> Iterator[str]:
    if known := result["calibration"]:
        best = known["best_beta"]
        fits = "no finite beta fits best" if best is None else f"beta {best:.3g} would fit these pairs best"
        yield f"calibration: expected error {known['ece']:.4f}, Brier score {known['brier']:.4f}; {fits}"
    if bias := result["length_bias"]:
        slope, error = bias["slope_per_token"], bias["slope_stderr"]
        yield (
            f"length: margin {slope:+.4g} ± {error:.2g} per token that the chosen is longer; correlation "
            f"{bias['pearson']:.2f}, of ranks {bias['spearman']:.2f}"
        )
    if kl := result["kl"]:
        per_sequence, per_token = (_with_error(kl, name, 4) for name in ("per_sequence", "per_token"))
        yield (
            f"KL to the base: {per_sequence} nats a completion, {per_token} a token (k3: "
            f"{_with_error(kl, 'k3_per_sequence', 4)}); {kl['samples']} samples, {kl['cut_share']:.0%} of them cut at "
            f"{kl['max_new_tokens']} tokens"
        )


def _with_error(found: dict[str, Any], name: str, digits: int) -> str:
    error = found[f"{name}_stderr"]
    return f"{found[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _breakdowns(result: dict[str, Any]) -> Iterator[str]:
    ranked = _MEASURES[result["ranked_by"]]
    yield f"{ranked + ', 95% intervals':34}{'pairs':>7}  {'margin':>30}  {'accuracy':>24}"
    yield _line("all pairs", result["overall"])
    sources = result["by_source"] or []
    for row in sources[:_MOST_SOURCES]:
        yield _line(row["source"], row)
    if len(sources) > _MOST_SOURCES:
        yield f"  ... and {len(sources) - _MOST_SOURCES} more sources, see --output"
    for row in result["by_length"]:
        yield _line(f"{row['low']} to {row['high']} tokens together", row)
    for row in result["by_longer"]:
        yield _line("of equal length" if row["longer"] == "neither" else f"{row['longer']} is longer", row)


def _line(title: str, row: dict[str, Any]) -> str:
    margin = f"{row['margin']:.4f}"
    if row["margin_interval"]:  # of one pair there is none
        low, high = row["margin_interval"]
        margin += f" [{low:.4f}, {high:.4f}]"
    low, high = row["accuracy_interval"]
    accuracy = f"{row['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
    return f"  {title[:31]:32}{row['count']:7}  {margin:>30}  {accuracy:>24}"


def as_result(result: dict[str, Any], model: str) -> Result:
    """What a run's folder keeps."""
    settings = {name: value for name, value in result.items() if name not in (*DETAILS, "loss") and "/" not in name}
    return Result(SUITE, model, list(_figures(result)), settings, {name: result[name] for name in DETAILS})


def _figures(result: dict[str, Any]) -> Iterator[Figure]:
    overall, kl, known = result["overall"], result["kl"], result["calibration"]
    what = _MEASURES[result["ranked_by"]]
    shared: dict[str, Any] = {
        "count": overall["count"],
        "dataset": ", ".join(public_name(name) for name in result["pairs"].split(", ")),
        "setup": f"beta {result['beta']:g}, against {public_name(result['base'])}" if result["base"] else "no base",
    }
    error = overall["accuracy_stderr"]
    percent = None if error is None else 100 * error
    yield Figure(f"{what} accuracy", "accuracy", 100 * overall["accuracy"], "%", stderr=percent, **shared)
    yield Figure(f"{what} margin", "margin", overall["margin"], stderr=overall["margin_stderr"], **shared)
    if known:
        yield Figure("sigmoid loss", "loss", result["loss"], **shared)
        yield Figure("expected calibration error", "ece", known["ece"], **shared)
    if kl:
        shared |= {"count": kl["samples"], "setup": f"sampled, at most {kl['max_new_tokens']} tokens"}
        yield Figure(
            "KL to the base", "kl_per_sequence", kl["per_sequence"], stderr=kl["per_sequence_stderr"], **shared
        )
