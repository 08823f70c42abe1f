"""How the report and the model card write numbers, changes, settings, durations and paths."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

NONE = "–"  # in place of a value that is not known
DIGITS = 3  # significant ones of a measured value


def number(value: float, unit: str = "") -> str:
    """Write a measured value with three significant digits, a percentage with one decimal; a dash if not finite.

    Args:
        value: the value. An integer is a count, which has all of its digits; so has a value from 1000 on.
        unit: "%" for a percentage, "share" for a share of 1, which is written as one, or "".
    """
    if not math.isfinite(value):
        return NONE
    if isinstance(value, int) and not unit:
        return _signed(value, f"{abs(value):,}")
    return _signed(value, _positive(abs(value), unit))


def with_error(value: float, stderr: float | None, unit: str = "") -> str:
    """Write a value with its standard error, both to the same decimal; without one (None, or 0) the value alone."""
    if not stderr or not math.isfinite(stderr) or not math.isfinite(value):
        return number(value, unit)
    if unit in ("%", "share") or abs(value) >= 1000:
        return f"{number(value, unit)} ± {number(stderr, unit)}"
    decimals = max(0, 1 - math.floor(math.log10(stderr)))  # two significant digits of the error
    return f"{_signed(value, f'{abs(value):.{decimals}f}')} ± {stderr:.{decimals}f}"


def change(value: float, before: float, unit: str = "") -> str:
    """Write the difference of two values with its sign: "+0.284", of percentages and shares "−3.1 points"."""
    difference = value - before
    if unit in ("%", "share"):
        points = f"{abs(difference) * (100 if unit == 'share' else 1):.1f}"
        return f"{_sign(difference if float(points) else 0.0)}{points} points"
    return _sign(difference) + _positive(abs(difference), "")


def _sign(value: float) -> str:
    return "+" if value > 0 else "−" if value < 0 else "±"


def _signed(value: float, digits: str) -> str:
    """Return the digits with a minus where the value is negative and the digits are not all 0."""
    return ("−" if value < 0 and re.search("[1-9]", digits) else "") + digits


def _positive(value: float, unit: str) -> str:
    if unit in ("%", "share"):
        return f"{value * (100 if unit == 'share' else 1):.1f}%"
    rounded = float(f"{value:.{DIGITS}g}")
    if rounded >= 1000:
        return f"{value:,.0f}"
    if rounded == 0:
        return "0"
    exponent = math.floor(math.log10(rounded))
    if exponent < -3:
        return setting(rounded)
    return f"{rounded:.{max(0, DIGITS - 1 - exponent)}f}"


def setting(value: Any) -> str:
    """Write a setting's value as a user would: `5e-7`, `true`, `null`, `q_proj, v_proj`, a source by its path."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{value:.10g}")
    if isinstance(value, Mapping):
        if set(value) == {"path", "split", "weight"}:
            return _source(value)
        return ", ".join(f"{name}: {setting(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "none"
    return short_path(str(value))


def _source(source: Mapping[str, Any]) -> str:
    """Write a source of rows: its path, and its split and weight if they are not the defaults."""
    split = "" if source["split"] == "train" else f", split {source['split']}"
    weight = "" if source["weight"] == 1 else f", weight {setting(source['weight'])}"
    return f"{short_path(str(source['path']))}{split}{weight}"


def duration(seconds: float) -> str:
    """Write a duration in its two greatest units, as "1 h 52 min"."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if round(seconds) < 3600:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return "{:,} h {} min".format(*divmod(round(seconds / 60), 60))


def short_path(path: str) -> str:
    """Return the end of a long path on this machine; anything else as it is."""
    parts = PurePath(path).parts
    return "…/" + "/".join(parts[-2:]) if path.startswith("/") and len(parts) > 3 else path
