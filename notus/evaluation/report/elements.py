"""Parts of the page that are text: tables, bars, headline figures."""

import dataclasses
from collections.abc import Sequence

Cell = str | tuple[str, str]  # the second text is set small, below the first


@dataclasses.dataclass(frozen=True)
class Table:
    """`rows` of cells under `columns`; the first cell of a row names it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Bars:
    """Values drawn as bars: `rows` of name, value in words, and length (0 to 1), in the colour of that number."""

    caption: str
    rows: Sequence[tuple[str, str, float]]
    colour: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Tile:
    """A headline figure: per run its place among the runs, the figure, and what it is."""

    title: str
    entries: Sequence[tuple[int, str, str]]
