"""The figures of the preferences suite: as a table for a terminal, and as the report and the model card take them."""

from collections.abc import Iterator, Mapping
from typing import Any

from notus.evaluation.preferences.metrics import BINS, SMALLEST_GROUP
from notus.evaluation.results import Figure, public_name
from notus.evaluation.run_loss import ROW_NAMES

_TAU = "Kendall's τ"
_MEASURES = {
    "rewards": "reward",
    "logps": "log-prob",
    "logps_per_token": "log-prob per token",
    "logps_change": "change from the base",
}
# What the table has of each measure, by the kind of rows: a column's title, and the metric.
_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "pairs": {"chosen": "chosen", "rejected": "rejected", "margin": "margins", "accuracy": "accuracies"},
    "lists": {"best": "chosen", "worst": "rejected", "accuracy": "accuracies", _TAU: "kendall_tau", "top-1": "top_1"},
    "labels": {"good": "good", "bad": "bad", "margin": "margins", "AUC": "auc"},
}
_MOST_SOURCES = 12
# Pairs from which on the table says how well the rewards are calibrated. With fewer, the standard error of a frequency
# can be above 5 points, noise alone makes the expected error large, and a few pairs decide which beta fits best. From
# this number on, all ten groups of the calibration chart hold the ten pairs that a group needs.
_CALIBRATED_FROM = BINS * SMALLEST_GROUP


def figures(result: dict[str, Any]) -> Iterator[Figure]:
    """Yield the headline figures of a result, the most important first."""
    overall, kl, known = result["overall"], result["kl"], result["calibration"]
    what = _MEASURES[result["ranked_by"]]
    shared: dict[str, Any] = {
        "count": overall["count"],
        "dataset": ", ".join(public_name(name) for name in result["pairs"].split(", ")),
        "setup": _setup(result),
    }
    if result["ranking"]:
        yield from _ranking_figures(what, result["ranking"], shared)
    if "auc" in overall:
        yield Figure(f"{what} AUC", "auc", overall["auc"], stderr=overall["auc_stderr"], **shared)
    if overall["accuracy"] is not None:
        of_pairs = "pairwise accuracy" if result["ranking"] else "accuracy"
        yield _share(f"{what} {of_pairs}", "accuracy", overall, shared)
    yield Figure(f"{what} margin", "margin", overall["margin"], stderr=overall["margin_stderr"], **shared)
    if "loss" in result:
        yield Figure("sigmoid loss", "loss", result["loss"], **shared)
    if known:
        yield Figure("expected calibration error", "ece", known["ece"], **shared)
    if kl:
        shared |= {"count": kl["samples"], "setup": f"sampled, at most {kl['max_new_tokens']} tokens"}
        yield Figure(
            "KL to the base", "kl_per_sequence", kl["per_sequence"], stderr=kl["per_sequence_stderr"], **shared
        )


def _ranking_figures(what: str, ranking: dict[str, Any], shared: dict[str, Any]) -> Iterator[Figure]:
    of_prompts = {**shared, "count": ranking["prompts"]}
    tau = ranking["kendall_tau"]
    yield Figure(f"{what} Kendall's τ", "kendall_tau", tau, stderr=ranking["kendall_tau_stderr"], **of_prompts)
    yield _share(f"{what} top-1 accuracy", "top_1", ranking, of_prompts)


def _share(title: str, name: str, found: dict[str, Any], shared: dict[str, Any]) -> Figure:
    """A figure in percent of a share and its standard error."""
    error = found[f"{name}_stderr"]
    return Figure(title, name, 100 * found[name], "%", stderr=None if error is None else 100 * error, **shared)


def _setup(result: dict[str, Any]) -> str:
    """How completions are ranked, in a few words."""
    if not result["base"]:
        return "no base"
    if result["is_relative"]:
        return f"beta {result['beta']:g}, against {public_name(result['base'])}"
    return f"beta {result['beta']:g}, {result['reward'].split('* ')[-1]}"


def table(result: dict[str, Any]) -> str:
    """Return the figures as a table for a terminal."""
    rows, against = result["rows"], "without a base"
    if result["base"]:
        against = f"{'against' if result['is_relative'] else 'beside'} {result['base']}, beta {result['beta']:g}"
    pairs = f" with {result['num_pairs']} pairs of different ratings" if rows == "lists" else ""
    columns = _COLUMNS[rows]
    lines = [
        f"{result['model']} {against}: {result['num_rows']} {ROW_NAMES[rows]}{pairs}, {result['precision']}",
        *_meaning(result),
        f"{'':22}{''.join(f'{title:>12}' for title in columns)}",
    ]
    for name, title in _MEASURES.items():
        if f"{name}/margins" in result:
            values = (result[f"{name}/{metric}"] for metric in columns.values())
            lines.append(f"{title:22}{''.join(f'{value:12.4f}' for value in values)}")
    if "rewards/accuracies" in result and rows == "labels":
        lines.append(f"reward above 0 for good and below 0 for bad ones: {result['rewards/accuracies']:.1%}")
    if "loss" in result:
        lines.append(f"sigmoid loss {result['loss']:.6f}")
    return "\n".join([*lines, *_sentences(result), "", *_breakdowns(result)])


def _meaning(result: dict[str, Any]) -> Iterator[str]:
    """Say what the rewards of losses without a reference are, and what the base is there for."""
    if result["reward"] and not result["is_relative"]:
        yield f"{result['loss_type']} has no reference: its reward is {result['reward']}."
        yield "The base, from which the run started, is there for comparison: see the change from it, in nats."
        yield "With --base MODEL, completions are ranked by the rewards of losses with a reference."


def _sentences(result: dict[str, Any]) -> Iterator[str]:
    better = "chosen" if result["rows"] == "pairs" else "better rated"
    known = result["calibration"]
    if known and sum(part["count"] for part in known["bins"]) >= _CALIBRATED_FROM:
        yield f"calibration: expected error {known['ece']:.4f}, Brier score {known['brier']:.4f}; {_fit(known)}"
    if bias := result["length_bias"]:
        slope, error = bias["slope_per_token"], bias["slope_stderr"]
        spread = "" if error is None else f" ± {error:.2g}"  # of one prompt there is none
        yield (
            f"length: margin {slope:+.4g}{spread} per token that the {better} is longer; correlation "
            f"{bias['pearson']:.2f}, of ranks {bias['spearman']:.2f}"
        )
    if kl := result["kl"]:
        names = ("per_sequence", "per_token", "k3_per_sequence")
        errors = ("" if kl[f"{name}_stderr"] is None else f" ± {kl[f'{name}_stderr']:.4f}" for name in names)
        per_sequence, per_token, k3 = (f"{kl[name]:.4f}{error}" for name, error in zip(names, errors, strict=True))
        yield (
            f"KL to the base: {per_sequence} nats a completion, {per_token} a token (k3: {k3}); {kl['samples']} "
            f"samples, {kl['cut_share']:.0%} of them cut at {kl['max_new_tokens']} tokens"
        )


def _fit(known: dict[str, Any]) -> str:
    """Say which beta fits the pairs best."""
    best = known["best_beta"]
    if best is None:
        return "no finite beta fits best"
    return f"beta {best:.3g} would fit these pairs best" if best else "the rewards do not predict these preferences"


def _breakdowns(result: dict[str, Any]) -> Iterator[str]:
    ranked = _MEASURES[result["ranked_by"]]
    if result["ranking"]:
        yield from _rankings(result, ranked)
        yield ""
    of_labels = result["rows"] == "labels"
    unit, share = ("completions", "AUC") if of_labels else ("pairs", "accuracy")
    yield f"{ranked + ', 95% intervals':32}{unit:>11}  {'margin':>30}  {share:>24}"
    yield _line(f"all {unit}", result["overall"])
    sources = result["by_source"] or []
    for row in sources[:_MOST_SOURCES]:
        yield _line(row["source"], row)
    if len(sources) > _MOST_SOURCES:
        yield f"  ... and {len(sources) - _MOST_SOURCES} more sources, see --output"
    for row in result["by_length"]:
        yield _line(f"{row['low']} to {row['high']} tokens{'' if of_labels else ' together'}", row)
    better = {} if result["rows"] == "pairs" else {"chosen": "better", "rejected": "worse"}
    for row in result["by_longer"] or []:
        longer = better.get(row["longer"], row["longer"])
        yield _line("of equal length" if longer == "neither" else f"{longer} is longer", row)


def _rankings(result: dict[str, Any], ranked: str) -> Iterator[str]:
    """Yield how completions are ordered, of all prompts and by source."""
    ranking = result["ranking"]
    yield f"{ranked + ', 95% intervals':32}{'prompts':>11}  {_TAU:>30}  {'top-1':>24}"
    yield _ranking_line("all prompts", ranking)
    for row in (result["by_source"] or [])[:_MOST_SOURCES]:
        yield _ranking_line(row["source"], row)
    yield f"  top-1 of a random choice: {ranking['top_1_chance']:.1%}"


def _ranking_line(title: str, row: dict[str, Any]) -> str:
    tau, top = _with_interval(row, "kendall_tau", ".4f"), _with_interval(row, "top_1", ".1%")
    return f"  {title[:29]:30}{row['prompts']:11}  {tau:>30}  {top:>24}"


def _line(title: str, row: dict[str, Any]) -> str:
    share = _with_interval(row, "auc", ".4f") if "auc" in row else _with_interval(row, "accuracy", ".1%")
    return f"  {title[:29]:30}{row['count']:11}  {_with_interval(row, 'margin', '.4f'):>30}  {share:>24}"


def _with_interval(row: dict[str, Any], name: str, form: str) -> str:
    """A value with its interval, where there is one; a dash where there is no value."""
    value, interval = row[name], row[f"{name}_interval"]
    if value is None:
        return "-"
    if not interval:  # of one pair there is none
        return format(value, form)
    low, high = interval
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
