"""Parts of the page that are text: tables, bars, headline figures."""

import dataclasses
from collections.abc import Mapping, Sequence

Cell = str | tuple[str, str]  # the second text is set small, below the first


@dataclasses.dataclass(frozen=True)
class Table:
    """`rows` of cells under `columns`; the first cell of a row names it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A value drawn as a bar of that `length` (0 to 1), for the run at that place."""

    run: int
    value: Cell
    length: float


@dataclasses.dataclass(frozen=True)
class Bars:
    """Named values, each with a bar for every run that has it."""

    caption: str
    note: str
    rows: Mapping[str, Sequence[Bar]]


@dataclasses.dataclass(frozen=True)
class Tile:
    """A headline figure: per run its place among the runs, the figure, and what it is."""

    title: str
    entries: Sequence[tuple[int, str, str]]
