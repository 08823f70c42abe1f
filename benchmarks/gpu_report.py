"""What was found, as markdown."""

from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """Every table of a report, in the order in which it was found."""
    parts = [_head(report["hardware"]), _parity(report["parity"]), _measured(report), _rows(report), _shares(report)]
    return "\n\n".join(part for part in parts if part)


def _head(hardware: dict[str, Any]) -> str:
    memory = f", {hardware['memory_gib']:.0f} GiB" if "memory_gib" in hardware else ""
    driver = f", driver {hardware['driver']}" if hardware.get("driver") else ""
    versions = ", ".join(f"{name} {version}" for name, version in hardware["versions"].items() if version)
    return (
        f"{hardware['device']}{memory}{driver}; Python {hardware['python']}, {versions}; "
        f"commit {hardware['commit']}; {hardware['date']}"
    )


def _parity(parity: dict[str, Any]) -> str:
    failed = [check for check in parity["checks"] if not check["passed"]]
    line = f"Parity: {len(parity['checks']) - len(failed)} of {len(parity['checks'])} comparisons within tolerance."
    listed = [f"- FAILED: {check['name']}: {check['error']:.2e}, at most {check['tolerance']:.2e}" for check in failed]
    return "\n".join([line, *listed])


def _measured(report: dict[str, Any]) -> str:
    lines = []
    if report.get("matmul_flops_per_second"):
        rate = report["matmul_flops_per_second"]
        share = f", {rate / report['peak']:.0%} of the peak" if report["peak"] else ""
        lines.append(f"Matrix products at the model's shapes: {rate / 1e12:.3g} TFLOP/s{share}.")
        lines.append(f"Copy: {report['bytes_per_second'] / 1e9:.3g} GB/s read and written.")
    for row in report["rows"]:
        if "graphs" in row:
            early = row["graphs_after_two_steps"]
            lines.append(
                f"Compiled graphs: {row['graphs']} after {row['steps']} steps of unlike rows, {early} after two."
            )
    return "\n".join(lines)


def _rows(report: dict[str, Any]) -> str:
    lines = [
        "| configuration | pairs/s | tokens/s | s/step | MFU | hardware use | peak GiB | reserved | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(row) for row in report["rows"] if "graphs" not in row]
    shapes = sorted({row["shape"] for row in report["rows"] if "shape" in row})
    basis = "the data sheet's peak" if report["peak"] else "the rate of matrix products measured here"
    note = (
        f"Model: {'; '.join(shapes)}. MFU: necessary operations (shared tokens once, no padding, no recomputation) "
        f"over {basis}; hardware use: with padding, copies and recomputation. Tokens: of pairs with shared trunks."
    )
    return "\n".join([*lines, "", note])


def _row(row: dict[str, Any]) -> str:
    if row["status"] != "measured":
        return f"| {row['name']} | {row['status']} | | | | | | | |"
    cells = [
        row["name"], f"{row['pairs_per_second']:.2f}", f"{row['tokens_per_second']:,.0f}",
        f"{row['seconds_per_step']:.3f}", _percent(row.get("mfu")), _percent(row.get("hardware_utilisation")),
        _number(row.get("peak_allocated_gib")), _number(row.get("peak_reserved_gib")),
        _number(row.get("predicted_gib")),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _shares(report: dict[str, Any]) -> str:
    found = [row for row in report["rows"] if "shares" in row]
    if not found:
        return ""
    kinds = list(found[0]["shares"])
    lines = [f"| share of the step | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for row in found:
        cells = [f"{row['shares'][kind]:.1%}" for kind in kinds]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)
