"""What an export notes of itself, so that a later --push can go on with it instead of exporting again."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from notus.evaluation.files import replacing

MARK = ".notus-export.json"  # hidden, so that it is not uploaded
CARD = "README.md"
_SIGNED = "written by notus card; sha256 of what stands above: "


@dataclasses.dataclass(frozen=True)
class Mark:
    """What was exported, and the card as it was written.

    Attributes:
        run: the digest of the run's config.
        step: of the checkpoint, or None for a finished run's model.
        options: all that decides the files besides the card.
        card: the digest of the card; `write_card` fills it in.
    """

    run: str
    step: int | None
    options: dict[str, Any]
    card: str = ""


def write_card(folder: Path, text: str, mark: Mark) -> None:
    """Put a card there, and note it. Raises OSError."""
    with replacing(folder / CARD) as file:
        file.write(text)
    with replacing(folder / MARK) as file:
        file.write(json.dumps({**dataclasses.asdict(mark), "card": _digest(text)}, indent=2) + "\n")


def card_was_edited(folder: Path, mark: Mark) -> bool:
    """Whether the card there is another than the one that was written."""
    card = folder / CARD
    return card.is_file() and _digest(card.read_text(encoding="utf-8")) != mark.card


def signed(text: str) -> str:
    """A card with a last line, which no page shows, by which `is_untouched` knows it."""
    return f"{text}\n<!-- {_SIGNED}{_digest(text)} -->\n"


def is_untouched(path: Path) -> bool:
    """Whether a file is a card as `signed` made it."""
    text, found, digest = path.read_text(encoding="utf-8", errors="replace").rpartition(f"\n<!-- {_SIGNED}")
    return bool(found) and digest == f"{_digest(text)} -->\n"


def read_mark(folder: Path) -> Mark | None:
    """What an export noted; None where the folder is not one. Raises ValueError for a damaged note."""
    path = folder / MARK
    if not path.is_file():
        return None
    try:
        return Mark(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not what an export notes ({error}); remove {folder}, and export again") from error


def check_same(folder: Path, found: Mark, wanted: Mark) -> None:
    """Raise ValueError, naming what differs, if the folder is an export of something else than is wanted."""
    theirs, ours = ({"run": mark.run, "step": mark.step, **mark.options} for mark in (found, wanted))
    name = next((name for name in ours if ours[name] != theirs.get(name)), None)
    if name is not None:
        told = "another run" if name == "run" else f"{name} {theirs.get(name)}, not {ours[name]}"
        raise ValueError(f"{folder}: holds an export of {told}; name a new folder, or give the options that made it")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
