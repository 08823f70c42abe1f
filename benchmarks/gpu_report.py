"""The report of `gpu.py`: a JSON file that is whole at any moment, and what it says as markdown. Imports no torch."""

import json
import math
from pathlib import Path
from typing import Any

from common import markdown as table
from notus.runtime.files import write_text

Report = dict[str, Any]

USAGE = 2  # exit code of a worker that does not understand its arguments
OUT_OF_TIME, OUT_OF_MEMORY = "not run: out of time", "out of memory"
EMPTY: Report = {
    "command": [],
    "without": [],  # optimisations that are off in every row
    "hardware": None,  # what the first worker says of it
    "planned": {},  # by stage, the names of all tasks
    "begun": [],  # names of tasks; no worker begins one again
    "running": None,  # section and name of the task in progress
    "problems": [],  # what went wrong apart from any task's own result
    "parity": [],
    "rates": [],
    "rows": [],
}
# The share of a step that each change was expected to save, from an analysis of the code before anything was measured.
PREDICTED = {
    "checkpointing products, against selective": "8%",
    "fused_elementwise": "4%",
    "graph_attention": "2 to 4%",
    "fused_optimizer": "2%",
    "gradient_handover": "1%",
    "fp32_addmm": "0.2%",
    "all of these optimisations": "",
}
HEADS = ("configuration", "pairs/s", "tokens/s", "s/step", "MFU", "hardware use", "peak GiB", "reserved", "predicted")
CONFIGURATION = ("task", "rank", "variant", "checkpointing", "compile", "quantization")


# ---- the file ----


def read(path: Path) -> Report:
    """Return the report that `write` wrote."""
    report: Report = json.loads(path.read_text())
    return report


def write(report: Report, path: Path) -> None:
    """Replace the file by this report in one step. JSON knows neither NaN nor infinity: null stands for both."""
    write_text(path, json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_death(report: Report, reason: str, *, out_of_time: bool, stuck: bool) -> None:
    """Record that a worker died, as the result of the task that it was doing.

    Args:
        report: is changed.
        reason: in words.
        out_of_time: it was stopped for that.
        stuck: it did not get as far as a first task.
    """
    running, report["running"] = report["running"], None
    if running:
        status = OUT_OF_TIME if out_of_time else f"failed: {reason}"
        report[running["section"]].append({"name": running["name"], "status": status})
    elif stuck:
        report["problems"].append(reason)


def in_words(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


# ---- what it says ----


def basis(report: Report) -> float | None:
    """FLOP/s that MFU is a share of: the data sheet's, or else the measured rate of matrix products."""
    peak = (report["hardware"] or {}).get("peak_bf16_flops_per_second")
    return peak or _rate(report, "flops_per_second")


def _rate(report: Report, key: str) -> float | None:
    return next((found[key] for found in report["rates"] if found.get(key)), None)


def failures(report: Report) -> list[str]:
    """Whatever makes the exit code 1."""
    missing = _not_run(report, "parity")
    found = [*failed_checks(report), *report["problems"]]
    found += [f"{found['name']}: {found['status']}" for found in _results(report) if found["status"].startswith("fail")]
    return [*found, *([f"{len(missing)} comparisons were not run, from {missing[0]!r} on"] if missing else [])]


def failed_checks(report: Report) -> list[str]:
    """What each comparison that did not pass found."""
    return [_failure(check) for check in report["parity"] if not check.get("passed")]


def _failure(check: dict[str, Any]) -> str:
    if check["status"] != "measured":
        return f"{check['name']}: {check['status']}"
    error = "not a number" if check["error"] is None else f"{check['error']:.2e}"
    return f"{check['name']}: {error}, at most {check['tolerance']:.2e}"


def _results(report: Report) -> list[dict[str, Any]]:
    return [*report["rates"], *report["rows"]]


def _not_run(report: Report, stage: str) -> list[str]:
    return [name for name in report["planned"].get(stage, []) if name not in report["begun"]]


def line(found: dict[str, Any]) -> str:
    """One result in a line, for whoever watches."""
    if found["status"] != "measured":
        return f"{found['name']}: {found['status']}"
    parts = {
        "pairs_per_second": "{:.2f} pairs/s", "mfu": "MFU {:.1%}", "peak_allocated_gib": "peak {:.1f} GiB",
        "predicted_gib": "predicted {:.3g} GiB", "flops_per_second": "{:.3g} FLOP/s", "bytes_per_second": "{:.3g} B/s",
        "graphs": "{} graphs", "took": "took {:.0f} s",
    }  # fmt: skip
    told = [form.format(found[key]) for key, form in parts.items() if found.get(key) is not None]
    return f"{found['name']}: {', '.join(told)}"


# ---- markdown ----


def markdown(report: Report) -> str:
    """Every table of a report."""
    parts = [_head(report), _parity(report), _measured(report), _rows(report), _changes(report), _shares(report)]
    return "\n\n".join(part for part in parts if part)


def _head(report: Report) -> str:
    hardware = report["hardware"]
    lines = [f"- PROBLEM: {problem}" for problem in report["problems"]]
    if report["without"]:
        lines.append(f"Switched off in every row: {', '.join(report['without'])}.")
    if hardware is None:
        return "\n".join(["No worker came as far as to say what the hardware is.", *lines])
    memory = f", {hardware['memory_gib']:.0f} GiB" if "memory_gib" in hardware else ""
    driver = f", driver {hardware['driver']}" if hardware.get("driver") else ""
    versions = ", ".join(f"{name} {version}" for name, version in hardware["versions"].items() if version)
    first = (
        f"{hardware['device']}{memory}{driver}; Python {hardware['python']}, {versions}; "
        f"commit {hardware['commit']}; {hardware['date']}"
    )
    return "\n".join([first, *lines])


def _parity(report: Report) -> str:
    checks, missing = report["parity"], _not_run(report, "parity")
    if not checks and not missing:
        return ""
    failed = failed_checks(report)
    text = f"Parity: {len(checks) - len(failed)} of {len(checks)} comparisons within tolerance."
    text += f" NOT RUN: {len(missing)} more." if missing else ""
    return "\n".join([text, *(f"- FAILED: {failure}" for failure in failed)])


def _measured(report: Report) -> str:
    lines = [f"- {line(found)}" for found in report["rates"] if found["status"] != "measured"]
    products, copied = _rate(report, "flops_per_second"), _rate(report, "bytes_per_second")
    if products:
        peak = (report["hardware"] or {}).get("peak_bf16_flops_per_second")
        share = f", {products / peak:.0%} of the peak" if peak else ""
        lines.append(f"Matrix products at the model's shapes: {products / 1e12:.3g} TFLOP/s{share}.")
    if copied:
        lines.append(f"Copy: {copied / 1e9:.3g} GB/s read and written.")
    for row in report["rows"]:
        if "graphs" in row:
            early = row["graphs_after_two_steps"]
            lines.append(
                f"Graphs that {row['steps']} steps of unlike rows had to compile: {row['graphs']}, {early} of them in "
                "the first two steps; an earlier row's are used again."
            )
        lines += [f"- {row['name']}: {note}" for note in row.get("notes", [])]
    return "\n".join(lines)


def _rows(report: Report) -> str:
    rates = [found["name"] for found in report["rates"]]
    cells = [_cells(row) for row in report["rows"] if "graphs" not in row]
    cells += [_cells({"name": name, "status": OUT_OF_TIME}) for name in _not_run(report, "rows") if name not in rates]
    if not cells:
        return ""
    shapes = sorted({row["shape"] for row in report["rows"] if "shape" in row})
    sheet = (report["hardware"] or {}).get("peak_bf16_flops_per_second")
    over = "the data sheet's peak" if sheet else "the rate of matrix products measured here"
    return f"{table(HEADS, cells)}\n\n" + (
        f"Model: {'; '.join(shapes)}. MFU: necessary operations (shared tokens once, no padding, no recomputation) "
        f"over {over}; hardware use: with padding, copies and recomputation. Tokens: of pairs with shared trunks."
    )


def _cells(row: dict[str, Any]) -> list[str]:
    if row["status"] != "measured":
        return [row["name"], row["status"], *[""] * 7]
    rates = [f"{row['pairs_per_second']:.2f}", f"{row['tokens_per_second']:,.0f}", f"{row['seconds_per_step']:.3f}"]
    shares = [_or_empty(row.get(key), ".1%") for key in ("mfu", "hardware_utilisation")]
    memory = [_or_empty(row.get(key), ".3g") for key in ("peak_allocated_gib", "peak_reserved_gib", "predicted_gib")]
    return [row["name"], *rates, *shares, *memory]


def _or_empty(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# ---- what each change saves ----


def _changes(report: Report) -> str:
    if not report["rows"]:
        return ""
    rows = [(change, predicted, _saving(report, change)) for change, predicted in PREDICTED.items()]
    note = (
        "Measured: 1 - (seconds with the change) / (seconds without it), over the steps that both timed; "
        "once for each time that the row with all changes was measured."
    )
    return f"{table(('change', 'predicted share of a step', 'measured'), rows)}\n\n{note}"


def _saving(report: Report, change: str) -> str:
    """In words, over all pairs of rows that differ in this change alone."""
    rows = [row for row in report["rows"] if "times" in row and "without" in row]
    saved = []
    for slow in rows:
        for fast in rows:
            if _is_change(change, slow, fast) and (share := _share(slow, fast)) is not None:
                unlike = slow["tokens_per_row"] != fast["tokens_per_row"]
                rows_of = f" (rows of {fast['tokens_per_row']} against {slow['tokens_per_row']} tokens)" * unlike
                saved.append(f"{share:.1%}{rows_of}")
    return "; ".join(saved) or "not run"


def _is_change(change: str, slow: dict[str, Any], fast: dict[str, Any]) -> bool:
    alike = [key for key in CONFIGURATION if slow.get(key) == fast.get(key)]
    if change.startswith("checkpointing"):
        modes = (fast["checkpointing"], slow["checkpointing"], fast["compile"], fast["without"])
        return len(alike) == len(CONFIGURATION) - 1 and modes == ("products", "selective", False, [])
    off = slow["without"] if change in slow["without"] or change.startswith("all") else None
    only = bool(off) and (len(off) > 1) == change.startswith("all")
    return only and not fast["without"] and len(alike) == len(CONFIGURATION)


def _share(slow: dict[str, Any], fast: dict[str, Any]) -> float | None:
    """What is saved of the slow row's time, over the steps of data that both timed, each at its fastest."""
    one, other = (_fastest(row["times"]) for row in (slow, fast))
    common = one.keys() & other.keys()
    return 1 - sum(other[step] for step in common) / sum(one[step] for step in common) if common else None


def _fastest(times: list[list[float]]) -> dict[float, float]:
    found: dict[float, float] = {}
    for step, seconds in times:
        found[step] = min(seconds, found.get(step, math.inf))
    return found


def _shares(report: Report) -> str:
    found = [row for row in report["rows"] if "shares" in row]
    if not found:
        return ""
    kinds = list(found[0]["shares"])
    rows = [[row["name"], *(f"{row['shares'][kind]:.1%}" for kind in kinds)] for row in found]
    return table(["share of the step", *kinds], rows)
