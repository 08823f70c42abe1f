"""Write the tables of docs/coming-from-trl.md from notus/foreign_keys.py: `python docs/make_coming_from_trl.py`.

The tables stand between markers `<!-- NAME -->` and `<!-- end of NAME -->`, one for each of `foreign_keys.TABLES`.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from notus.foreign_keys import TABLES, Counterpart

PAGE = Path(__file__).with_name("coming-from-trl.md")
SECTIONS = "model|data|training|dpo|reference|lora|tracking"
HERE = {"none needed": "not needed", "missing": "not available"}


def render(page: str) -> str:
    """Return the page with its tables made anew. Raise ValueError if it lacks the markers of one."""
    for name, settings in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, *rest = page.split(start)
        if len(rest) != 1 or rest[0].count(end) != 1:
            raise ValueError(f"the page must have one {start.strip()} with its end")
        page = before + start + _table(settings) + end + rest[0].split(end)[1]
    return page


def _table(settings: Mapping[str, Counterpart]) -> str:
    """Return one row for all settings with the same counterpart: first those with a key here, last those without."""
    rows: dict[Counterpart, list[str]] = {}
    for name, counterpart in settings.items():
        rows.setdefault(counterpart, []).append(f"`{name}`")
    kinds = ["set", *HERE]
    lines = ["| setting | here | |", "|---|---|---|"]
    for counterpart, names in sorted(rows.items(), key=lambda item: kinds.index(item[0].kind)):
        here = ", ".join(f"`{key}`" for key in counterpart.keys) or HERE[counterpart.kind]
        lines.append(f"| {', '.join(names)} | {here} | {_marked(counterpart.note)} |")
    return "\n".join(lines) + "\n"


def _marked(note: str) -> str:
    """Return a note with our keys marked as code, where they are not."""
    parts = re.split(r"(`[^`]*`)", note)
    key = rf"(?<![/\w])((?:{SECTIONS})\.[a-z][\w.]*\w(?:=[\w-]+)?)"
    return "".join(part if part.startswith("`") else re.sub(key, r"`\1`", part) for part in parts)


def main() -> None:
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
