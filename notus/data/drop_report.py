"""What became of the rows on their way to tokens, counted."""

import collections
import dataclasses
import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from notus.data.dataset import Outcome
from notus.data.formats import UNUSED
from notus.data.messages import listed

NAMED_ROWS = 3  # of the rows that cannot be read
HEAVY_TRUNCATION = 0.05  # of the tokens

DROPPED = {
    Outcome.UNREADABLE: "cannot be read",
    Outcome.EMPTY: "empty completion",
    Outcome.CUT_AWAY: "completion cut away by max_length",
    Outcome.IDENTICAL: "chosen and rejected identical",
    Outcome.TOO_LONG: "longer than max_length",
    Outcome.HUGE: "too long to be tokenised",
    Outcome.TOO_FEW: "fewer than two rated completions",
    Outcome.ALIKE: "all completions identical",
}
EXCLUDED = "excluded by data.exclude"
_ANY_DROP = functools.reduce(lambda bits, bit: bits | int(bit), DROPPED, 0)


@dataclasses.dataclass(frozen=True)
class DropReport:
    """How many rows were read, dropped for which reason, and cut; `str()` is the text to print.

    Attributes:
        read: rows read, before weights and the split.
        dropped: rows per reason, reasons that occurred only.
        prompts_cut, completions_cut: kept rows that lost tokens of the prompt, or of a completion.
        templated: kept rows that a chat template rendered; the others are plain text.
        cut_share: tokens that were cut, of all in the kept rows.
        glued: kept plain-text rows whose answer begins with a letter right behind a letter of the prompt.
        special_tokens: kept rows with special tokens in what a message says.
        left_out: completions that kept lists lack, because they have no rating or no text.
        duplicates: kept rows that repeat an earlier one.
        held: training rows left out because they are copies of evaluation rows.
        excluded: the ids of `data.exclude` that stand in the data.
        unreadable: the first rows that could not be read, and why.
        unknown_columns: what no one reads, by name.
        missing_columns: those that `data.columns` maps, but no row has.
        reversed: kept rows of pairs whose chosen answer is rated below the rejected one.
        empty_systems: kept rows that `data.add_empty_system` gave a turn.
        masked: kept rows with answers that only `data.mask_history` leaves out.
    """

    read: int = 0
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prompts_cut: int = 0
    completions_cut: int = 0
    templated: int = 0
    cut_share: float = 0.0
    glued: int = 0
    special_tokens: int = 0
    left_out: int = 0
    duplicates: int = 0
    held: int = 0
    excluded: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    unknown_columns: tuple[str, ...] = ()
    missing_columns: tuple[str, ...] = ()
    reversed: int = 0
    empty_systems: int = 0
    masked: int = 0

    @property
    def kept(self) -> int:
        """Rows that are left."""
        return self.read - sum(self.dropped.values())

    def __str__(self) -> str:
        return "\n  ".join(
            [f"rows: {self.read} read, {self.kept} kept, {self.read - self.kept} dropped", *self._lines()]
        )

    def _lines(self) -> Iterator[str]:
        yield from (f"dropped {count}: {reason}" for reason, count in self.dropped.items())
        yield from (f"cannot be read: {place}" for place in self.unreadable)
        share = f" ({self.cut_share:.1%} of the tokens)" if self.cut_share else ""
        if self.prompts_cut or self.completions_cut:
            yield f"cut to length: {self.prompts_cut} prompts, {self.completions_cut} rows' completions{share}"
        if self.cut_share > HEAVY_TRUNCATION:
            keys = "data.max_length" + (" or data.max_prompt_length" if self.prompts_cut else "")
            yield f"warning: {self.cut_share:.0%} of the tokens are cut away; raise {keys}, or set data.too_long=drop"
        if self.glued:
            yield (
                f"warning: {self.glued} answers begin with a letter or digit right behind one of the prompt, as in "
                "'ovenTo cook'; plain text is joined as it is, so begin answers with a space or end prompts with one"
            )
        if self.special_tokens:
            yield (
                f"special tokens in the text of {self.special_tokens} rows: control tokens, or plain text with "
                "data.split_special_tokens=true"
            )
        if self.reversed:
            yield self._reversed_line()
        if self.left_out:
            yield f"left out of the lists: {self.left_out} completions without a rating or without text"
        if self.duplicates:
            yield f"duplicates: {self.duplicates} rows repeat an earlier one"
        if self.held:
            yield f"left out of training: {self.held} rows that are copies of evaluation rows"
        if self.unknown_columns:
            yield f"not read: {listed(self.unknown_columns)}"
        if self.missing_columns:
            yield f"named in data.columns, but in no row: {listed(self.missing_columns)}"

    def _reversed_line(self) -> str:
        """What to say of ratings that contradict pairs: single ones are noise, most of them are a mistake."""
        line = f"rated the wrong way round: {self.reversed} rows, whose chosen answer is rated below the rejected one"
        if self.reversed <= self.kept / 2:
            return line
        return f"warning: {line}; check which answer, or which rating, is which"


class Tally:
    """What became of the rows of one source, counted column by column.

    Attributes:
        outcomes: of every row, bits of `Outcome`.
        kept: whether each row is left.
        excluded: rows that only `exclude` drops.
        ids: those of `exclude` that stand in the source.
        unreadable: the first rows that could not be read, and why.
        unknown: columns that nothing reads.
        mapped: columns that `data.columns` maps.
        left_out: completions that the lists that are left lack.
        tokens, cut: of the rows that are left, with every completion's own copy of the prompt.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        exclude: Collection[str],
        unread: Sequence[str] = (),
        columns: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Count `rows`, as `tokenize` stores them with their notes.

        `unread` are columns that were not opened, `columns` is `data.columns`.
        """
        table = rows.data.table
        self.outcomes = table.column("outcome").to_numpy()
        readable = self.outcomes & _ANY_DROP == 0
        chosen = pa.compute.is_in(table.column("id"), value_set=pa.array(list(exclude), pa.string())).to_numpy()
        self.kept, self.excluded = readable & ~chosen, int((readable & chosen).sum())
        self.ids = set(table.column("id").filter(pa.array(chosen)).to_pylist())
        bad = np.flatnonzero(self.outcomes & Outcome.UNREADABLE)[:NAMED_ROWS]
        self.unreadable = [
            f"{table.column('place')[int(at)].as_py()}: {table.column('note')[int(at)].as_py()}" for at in bad
        ]
        noted = table.column("note").filter(pa.array(self.outcomes & Outcome.UNREADABLE == 0)).unique().to_pylist()
        notes = [json.loads(note) for note in noted if note]
        self.unknown = [name for name in unread if columns.get(name) != UNUSED]
        self.unknown += [name for names, _ in notes for name in names]
        self.mapped = columns.keys() & {*unread, *(name for _, names in notes for name in names)}
        self.left_out = int(table.column("left_out").to_numpy()[self.kept].sum())
        self.cut, self.tokens = self._lengths(table)

    def _lengths(self, table: pa.Table) -> tuple[int, int]:
        """Tokens cut, and all tokens, of the rows that are left. Reads lengths alone: the tokens stay on the disk."""
        counts = _list_lengths(table.column("branches"))
        lengths = _list_lengths(pa.compute.list_flatten(table.column("branches")))
        tokens = int(lengths[np.repeat(self.kept, counts)].sum())
        tokens += int((_list_lengths(table.column("trunk")) * counts)[self.kept].sum())
        # [prompt, completions...] of each row that is left; a prompt is cut in each completion's copy of it
        cut = table.column("cut").filter(pa.array(self.kept))
        values, widths = pa.compute.list_flatten(cut).to_numpy().astype(np.int64), _list_lengths(cut)
        prompts = values[np.cumsum(widths) - widths]
        lost = int(values.sum() + (prompts * (widths - 2)).sum())
        return lost, tokens + lost


def _list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pa.compute.list_value_length(column).to_numpy().astype(np.int64)


def report_of(tallies: Sequence[Tally], columns: Collection[str] = ()) -> DropReport:
    """Count the outcomes of all rows read; `columns` are the names that `data.columns` maps."""
    outcomes = np.concatenate([tally.outcomes for tally in tallies])
    kept = outcomes[np.concatenate([tally.kept for tally in tallies])]
    dropped = {reason: int((outcomes & bit > 0).sum()) for bit, reason in DROPPED.items()}
    dropped[EXCLUDED] = sum(tally.excluded for tally in tallies)
    tokens = sum(tally.tokens for tally in tallies)
    unreadable = [place for tally in tallies for place in tally.unreadable]
    unknown = collections.Counter(name for tally in tallies for name in tally.unknown)
    return DropReport(
        read=len(outcomes),
        dropped={reason: count for reason, count in dropped.items() if count},
        prompts_cut=int((kept & Outcome.PROMPT_CUT > 0).sum()),
        completions_cut=int((kept & Outcome.COMPLETION_CUT > 0).sum()),
        templated=int((kept & Outcome.TEMPLATED > 0).sum()),
        cut_share=sum(tally.cut for tally in tallies) / tokens if tokens else 0.0,
        glued=int((kept & Outcome.GLUED > 0).sum()),
        special_tokens=int((kept & Outcome.SPECIAL_TOKENS > 0).sum()),
        left_out=sum(tally.left_out for tally in tallies),
        excluded=tuple(sorted(set().union(*(tally.ids for tally in tallies)))),
        unreadable=tuple(unreadable[:NAMED_ROWS]),
        unknown_columns=tuple(unknown),
        missing_columns=tuple(name for name in columns if not any(name in tally.mapped for tally in tallies)),
        reversed=int((kept & Outcome.REVERSED > 0).sum()),
        empty_systems=int((kept & Outcome.EMPTY_SYSTEM > 0).sum()),
        masked=int((kept & Outcome.HISTORY_MASKED > 0).sum()),
    )
