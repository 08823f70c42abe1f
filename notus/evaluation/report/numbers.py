"""Numbers and paths as a reader likes them."""

import math
from pathlib import PurePath


def number(value: float, unit: str = "") -> str:
    """Four figures, thousands set apart; `unit` "%" takes a percentage, "share" a share of 1. A dash for no number."""
    if not math.isfinite(value):
        return "–"
    return _plain(value, unit).replace("-", "−", 1) if value < 0 else _plain(value, unit)


def _plain(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.1f}%"
    if unit == "%":
        return f"{value:.2f}%"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """In the two greatest units: "1 h 52 min"."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if round(seconds) < 3600:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return "{:,} h {} min".format(*divmod(round(seconds / 60), 60))


def short_path(path: str) -> str:
    """The end of a long path on this machine; anything else as it is."""
    parts = PurePath(path).parts
    return "…/" + "/".join(parts[-2:]) if path.startswith("/") and len(parts) > 3 else path
