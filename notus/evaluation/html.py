"""What the project's HTML pages share: one file without links outside, in which only our own scripts may run."""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from notus.evaluation.results import check_output

PALETTE = Path(__file__).with_name("palette.css")  # the colours, light and dark, and what every page begins with


def environment(*folders: Path) -> Environment:
    """Templates of these folders, in which every string is escaped; of two with one name, the earlier folder's."""
    loader = FileSystemLoader(folders)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["breaks"] = breaks
    return made


def breaks(text: str) -> Markup:
    """Return a name as HTML that may break after its / and _, rather than anywhere in a word."""
    return Markup(re.sub(r"([/_])(?=\w)", r"\1<wbr>", str(escape(text))))


def script(text: str) -> Markup:
    """Return a script for the page, where a carriage return would be read as a newline and change its digest."""
    assert "</script" not in text.lower()
    return Markup(text.replace("\r\n", "\n").replace("\r", "\n"))


def style(path: Path) -> Markup:
    """Return a style sheet after the palette."""
    return Markup(PALETTE.read_text(encoding="utf-8") + path.read_text(encoding="utf-8"))


def security_policy(scripts: Sequence[str]) -> str:
    """Allow these scripts and nothing else: what the data contains stays text, and nothing is loaded."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    closed = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{closed}; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def check_page(path: Path, *, kind: str, generator: str, not_over: str, remedy: str) -> None:
    """Make the folder of a page, before the work that fills it.

    Raises ValueError if the page would replace anything but an earlier one of its `kind`, which has the meta tag
    `generator`, and OSError if nothing can be written there.
    """
    check_output(path, form="HTML", not_over=not_over, remedy=remedy)
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        if generator not in file.read(1000):
            raise ValueError(f"{path}: there is a file of that name that is no {kind}; choose another")
