"""The tokenised dataset: its columns on disk, and fast access to its rows as examples, lengths and digests.

A row holds `trunk`, the longest token prefix that its conversations have in common within the prompt; `branches`, the
rest of each; and `loss_mask`, 1 where a branch's token is learned. SFT and labelled completions have one branch, pairs
two: chosen, rejected. A list has as many as it has completions, the best rated first, so its rows may differ in their
number. Beside them stands where the row came from and how it was rated, as far as the data say.

`TokenizedDataset` reads the Arrow memory itself, which is mapped from disk. What it keeps of a row is its lengths.
"""

import dataclasses
import enum
import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from notus.data.packing import Example

FEATURES = datasets.Features(
    {
        "trunk": datasets.List(datasets.Value("int32")),
        "branches": datasets.List(datasets.List(datasets.Value("int32"))),
        "loss_mask": datasets.List(datasets.List(datasets.Value("int8"))),
    }
)
# Null where the data do not say. `ratings` has one for each branch. No part of a row's digest, which stands for what is
# computed: log-probs depend on neither ratings nor labels.
PROVENANCE = datasets.Features(
    {
        "source": datasets.Value("string"),
        "ratings": datasets.List(datasets.Value("float32")),
        "label": datasets.Value("bool"),
    }
)
# Which row it was and what became of it; `left_out` counts the completions of a list that it lacks, `digest` is that of
# `row_digest`.
TRACE = datasets.Features(
    {
        "id": datasets.Value("string"),
        "place": datasets.Value("string"),
        "outcome": datasets.Value("int32"),
        "cut": datasets.List(datasets.Value("int32")),
        "left_out": datasets.Value("int32"),
        "digest": datasets.Value("binary"),
    }
)


class Outcome(enum.IntFlag):
    """What became of a row on its way to tokens, as bits of the column `outcome`."""

    PROMPT_CUT = 1
    COMPLETION_CUT = 2
    EMPTY = 4
    CUT_AWAY = 8
    IDENTICAL = 16
    TEMPLATED = 32
    GLUED = 64
    SPECIAL_TOKENS = 128
    TOO_LONG = 256
    HUGE = 512
    UNREADABLE = 1024
    TOO_FEW = 2048
    ALIKE = 4096
    EMPTY_SYSTEM = 8192
    HISTORY_MASKED = 16384
    REVERSED = 32768


FLAGS = {
    Outcome.PROMPT_CUT: "prompt cut",
    Outcome.COMPLETION_CUT: "completion cut",
    Outcome.GLUED: "glued answer",
    Outcome.SPECIAL_TOKENS: "special tokens in text",
}


class RowInfo(NamedTuple):
    """Where a row came from, and what became of it.

    Attributes:
        id: 16 hexadecimal digits, a digest of the row's messages; what `data.exclude` takes.
        place: its file, and the line or row there.
        source: as its data say; None: they do not.
        ratings: of each completion, as its data say; None: they do not, of one or of all.
        label: whether its completion is a good one, as its data say; None: they do not.
        cut: tokens cut from the prompt, then from each completion.
        flags: "plain text" and the names in `FLAGS`.
    """

    id: str
    place: str
    source: str | None
    ratings: tuple[float | None, ...] | None
    label: bool | None
    cut: tuple[int, ...]
    flags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Neighbouring rows as they are stored, every column as one flat array: views of the mapped memory.

    Attributes:
        trunk_ids, trunk_starts: token ids of the trunks, end to end, and where each row's begin: [rows + 1].
        branch_ids, branch_starts: those of the branches, row by row, and where each branch's begin.
        mask: 0 or 1 for each of `branch_ids`.
        row_starts: the number of each row's first branch: [rows + 1].
    """

    trunk_ids: np.ndarray
    trunk_starts: np.ndarray
    branch_ids: np.ndarray
    branch_starts: np.ndarray
    mask: np.ndarray
    row_starts: np.ndarray


class TokenizedDataset:
    """A tokenised dataset (columns as `FEATURES`, and if known as `PROVENANCE` and `TRACE`) as examples.

    Attributes:
        num_branches: K, the most branches of a row. A row with fewer lacks the last ones.
        branch_counts: int64 [n], branches of each row.
        trunk_lengths: int64 [n], tokens of each trunk.
        branch_lengths: int64 [n, K], tokens of each branch, 0 for one that the row lacks.
        lengths: int64 [n], tokens of each example, trunk and branches together.
        loss_tokens: int64 [n, K], tokens of each branch that the loss sees, 0 for one that the row lacks.
    """

    UNKNOWN_SOURCE = "(unknown)"

    def __init__(self, dataset: datasets.Dataset) -> None:
        """Scan the lengths once.

        Raises:
            ValueError: the dataset is empty, or a row has no branch.
        """
        if len(dataset) == 0:
            raise ValueError("the tokenised dataset holds no rows")
        table = dataset.data.table
        stored = table.select(list(FEATURES)).to_batches()
        self._details = table.select([name for name in (*PROVENANCE, *TRACE) if name in table.column_names])
        self._chunks = [_read(batch) for batch in stored]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in stored)])
        # a selection leaves the rows where they are and keeps a list of their places
        selected = dataset._indices
        self._places = np.arange(len(dataset)) if selected is None else selected.column(0).to_numpy().astype(np.int64)
        self._scan()

    def _scan(self) -> None:
        counts = _concatenated([np.diff(chunk.row_starts) for chunk in self._chunks])
        self.branch_counts = counts[self._places]
        if not self.branch_counts.all():
            raise ValueError(f"row {int(self.branch_counts.argmin()) + 1} of the dataset has no completion")
        self.num_branches = int(self.branch_counts.max())
        numbers = np.arange(self.num_branches)
        present = numbers < self.branch_counts[:, None]
        branches = np.where(present, (np.cumsum(counts) - counts)[self._places][:, None] + numbers, 0)
        self.trunk_lengths = _concatenated([np.diff(chunk.trunk_starts) for chunk in self._chunks])[self._places]
        self.branch_lengths = _concatenated([np.diff(chunk.branch_starts) for chunk in self._chunks])[branches]
        self.loss_tokens = _concatenated([_loss_tokens(chunk) for chunk in self._chunks])[branches]
        self.branch_lengths[~present] = self.loss_tokens[~present] = 0
        self.lengths = self.trunk_lengths + self.branch_lengths.sum(axis=1)

    @property
    def longest_sequence(self) -> int:
        """The most tokens of a trunk with one of its branches: how many positions the model needs."""
        return int((self.trunk_lengths + self.branch_lengths.max(axis=1)).max())

    def first_beyond(self, vocabulary: int) -> tuple[int, int] | None:
        """Return the first row with a token id of `vocabulary` or above, and that id; None if there is none."""
        stored = (ids for chunk in self._chunks for ids in (chunk.trunk_ids, chunk.branch_ids))
        if all(ids.max(initial=-1) < vocabulary for ids in stored):
            return None
        for index in range(len(self)):  # a stored row may be left out
            example = self._example(index)
            largest = max(int(ids.max(initial=-1)) for ids in (example.trunk, *example.branches))
            if largest >= vocabulary:
                return index, largest
        return None

    @functools.cached_property
    def sources(self) -> list[str] | None:
        """[n]: what the data call each row's source, `UNKNOWN_SOURCE` where they do not; None: they never do."""
        if "source" not in self._details.column_names:
            return None
        named = self._taken("source").dictionary_encode()
        if named.null_count == len(named):
            return None
        names = [*named.dictionary.to_pylist(), self.UNKNOWN_SOURCE]
        return [names[number] for number in named.indices.fill_null(len(names) - 1).to_pylist()]

    @functools.cached_property
    def ratings(self) -> np.ndarray | None:
        """fp32 [n, K]: how the data rate each completion, NaN where unknown or missing; None: all are unknown."""
        if "ratings" not in self._details.column_names:
            return None
        stored = self._taken("ratings")
        counts = pa.compute.list_value_length(stored).fill_null(0).to_numpy()
        found = np.full((len(self), self.num_branches), np.nan, np.float32)
        values = pa.compute.list_flatten(stored).to_numpy(zero_copy_only=False)
        found[np.arange(self.num_branches) < counts[:, None]] = values
        return None if np.isnan(found).all() else found

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """bool [n]: whether each row's completion is a good one; None: the data do not say that of every row."""
        if "label" not in self._details.column_names:
            return None
        stored = self._taken("label")
        return None if stored.null_count else stored.to_numpy(zero_copy_only=False)

    def _taken(self, name: str) -> pa.Array:
        """[n]: a column beside the tokens, at the rows of this dataset."""
        return self._details.column(name).take(pa.array(self._places)).combine_chunks()

    @property
    def stored_rows(self) -> np.ndarray:
        """int64 [n]: which row of the source each row is; one that a weight repeats is there several times."""
        return self._places

    @functools.cached_property
    def outcomes(self) -> np.ndarray | None:
        """int32 [n]: bits of `Outcome`; None: the rows were not tokenised by this project."""
        if "outcome" not in self._details.column_names:
            return None
        return self._details.column("outcome").to_numpy()[self._places]

    def prompt_digests(self) -> np.ndarray:
        """A digest of every row's trunk, as bytes that compare and sort: [n]."""
        return np.array([self._prompt_digest(int(place)) for place in self._places], dtype="S16")

    def _prompt_digest(self, place: int) -> bytes:
        number, row = self._find(place)
        start, end = self._chunks[number].trunk_starts[row : row + 2].tolist()
        return hashlib.blake2b(self._chunks[number].trunk_ids[start:end].tobytes(), digest_size=16).digest()

    def info(self, index: int) -> RowInfo:
        """Where a row came from, and what became of it; unknown for rows that were not tokenised by this project."""
        place = int(self._places[index])
        found = {name: self._details.column(name)[place].as_py() for name in self._details.column_names}
        outcome = Outcome(found.get("outcome") or 0)
        flags = [] if Outcome.TEMPLATED in outcome or "outcome" not in found else ["plain text"]
        return RowInfo(
            id=found.get("id") or "",
            place=found.get("place") or f"row {place + 1}",
            source=found.get("source"),
            ratings=None if found.get("ratings") is None else tuple(found["ratings"]),
            label=found.get("label"),
            cut=tuple(found.get("cut") or [0] * (1 + int(self.branch_counts[index]))),
            flags=(*flags, *(name for bit, name in FLAGS.items() if bit in outcome)),
        )

    def places(self, indices: Sequence[int], most: int = 5) -> str:
        """Where rows stand in their files, each once, for error messages: at most so many, and how many there are."""
        found = list(dict.fromkeys(self.info(int(index)).place for index in indices[:100]))
        rest = [f"... ({len(indices):,} in all)"] if len(indices) > most else []
        return "; ".join([*found[:most], *rest])

    def _find(self, place: int) -> tuple[int, int]:
        """The chunk that holds a stored row, and the row's number there."""
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return number, int(place - self._starts[number])

    def __len__(self) -> int:
        return len(self._places)

    def __call__(self, indices: np.ndarray) -> list[Example]:
        """The examples at these rows, in this order; their arrays are views of the mapped memory."""
        return [self._example(int(index)) for index in indices]

    def _example(self, index: int) -> Example:
        number, row = self._find(self._places[index])
        chunk = self._chunks[number]
        first, last = chunk.row_starts[row : row + 2].tolist()
        edges = chunk.branch_starts[first : last + 1].tolist()
        start, end = chunk.trunk_starts[row : row + 2].tolist()
        return Example(
            index=index,
            trunk=chunk.trunk_ids[start:end],
            branches=tuple(chunk.branch_ids[a:b] for a, b in itertools.pairwise(edges)),
            loss_masks=tuple(chunk.mask[a:b].astype(bool) for a, b in itertools.pairwise(edges)),
        )

    def separate_lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of these rows if each branch carried its own copy of the trunk."""
        return self.lengths[indices] + (self.branch_counts[indices] - 1) * self.trunk_lengths[indices]

    def digests(self) -> np.ndarray:
        """A content digest of every row (trunk, branches, masks): uint8 [n, 16]; computed once."""
        return self._all_digests

    @functools.cached_property
    def _all_digests(self) -> np.ndarray:
        if "digest" in self._details.column_names:
            return digest_column(self._details.column("digest"))[self._places].view(np.uint8).reshape(-1, 16)
        found = (self._find(int(place)) for place in self._places)
        joined = bytearray().join(_digest(self._chunks[number], row) for number, row in found)
        return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 16)


class Mismatched(TokenizedDataset):
    """Rows that join the prompt of one row with the completion of another; see `mismatched`.

    What stands beside the tokens (source, ratings, label, place) is that of the row that the prompt is from.
    """

    def __init__(self, rows: TokenizedDataset, completion_of: np.ndarray, max_length: int) -> None:
        """Join the trunk of each row i with the branch of row `completion_of[i]`: int64 [n]."""
        self._details, self._chunks, self._starts, self._places = (
            rows._details,
            rows._chunks,
            rows._starts,
            rows._places,
        )
        self._completion_of, self._max_length = completion_of, max_length
        self.num_branches, self.branch_counts = 1, rows.branch_counts
        self.trunk_lengths = rows.trunk_lengths
        whole = rows.branch_lengths[completion_of]
        self.branch_lengths = np.minimum(whole, max_length - self.trunk_lengths[:, None])
        self.lengths = self.trunk_lengths + self.branch_lengths[:, 0]
        self.loss_tokens = rows.loss_tokens[completion_of]
        was_headless = (rows.trunk_lengths == 0)[completion_of]
        is_changed = (self.branch_lengths != whole)[:, 0] | (was_headless != (self.trunk_lengths == 0))
        for index in np.flatnonzero(is_changed):
            (mask,) = self._example(int(index)).loss_masks
            # the first token of a conversation has nothing before it to predict it
            self.loss_tokens[index] = mask.sum() if self.trunk_lengths[index] else mask[1:].sum()

    def _example(self, index: int) -> Example:
        prompt, other = super()._example(index), super()._example(int(self._completion_of[index]))
        end = int(self.branch_lengths[index, 0])
        return Example(index, prompt.trunk, (other.branches[0][:end],), (other.loss_masks[0][:end],))

    @functools.cached_property
    def _all_digests(self) -> np.ndarray:
        joined = bytearray()
        for index in range(len(self)):
            example = self._example(index)
            (ids,), (mask,) = example.branches, example.loss_masks
            joined += row_digest(example.trunk, ids, mask, [len(ids)])
        return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 16)


def mismatched(rows: TokenizedDataset, max_length: int) -> Mismatched:
    """Join each row's prompt with the completion of another prompt, from which KTO estimates its KL term.

    Rows that stand side by side and have the same prompt are a group. Row i has the trunk of row i and a branch of the
    next group, in the order of the dataset and from its end on from its beginning: the first row of a group has that
    of the first, the second that of the second, and so on, over again where the next group has fewer. So the two rows
    of a pair, good and bad, take a good and a bad completion: the KL term sees the same mixture as the loss does.

    KTO (2402.01306) shifts the completions within a batch instead. These rows depend on no batch, so their reference
    log-probs can be cached.

    Args:
        rows: of one completion each.
        max_length: most tokens of a joined row; its completion is cut at the end.

    Raises:
        ValueError: all rows have the same prompt, or a prompt leaves no room for a completion.
    """
    assert rows.num_branches == 1
    if int(rows.trunk_lengths.max()) >= max_length:
        index = int(rows.trunk_lengths.argmax())
        raise ValueError(
            f"{rows.info(index).place}: the prompt of {rows.trunk_lengths[index]} tokens leaves no room for another "
            f"row's completion within {max_length} tokens; raise data.max_length"
        )
    continues = _continues_prompt(rows)
    firsts = np.unique([0, *np.flatnonzero(~continues)])  # of the groups
    if len(firsts) == 1:
        raise ValueError(
            "all rows have the same prompt, so no completion of another prompt can be taken for the loss's KL term; "
            "add rows of other prompts"
        )
    sizes = np.diff(firsts, append=len(rows))
    following = np.roll(np.arange(len(firsts)), -1)
    if continues[0] and len(firsts) > 2:  # past the end stands the same prompt again
        following[-1] = 1
    group = np.repeat(np.arange(len(firsts)), sizes)
    place, next_group = np.arange(len(rows)) - firsts[group], following[group]
    return Mismatched(rows, firsts[next_group] + place % sizes[next_group], max_length)


def _continues_prompt(rows: TokenizedDataset) -> np.ndarray:
    """Whether each row has the prompt of the row before it, the first that of the last: bool [n].

    A completion that is too long cuts its prompt's beginning off, and another of the same prompt does not. So a cut
    prompt is also the same as one that ends in it.
    """
    prompts = rows.prompt_digests()
    found = prompts == np.roll(prompts, 1)
    cut = np.zeros(len(rows), bool) if rows.outcomes is None else rows.outcomes & Outcome.PROMPT_CUT > 0
    for index in np.flatnonzero(~found & (cut | np.roll(cut, 1))):
        own, before = (example.trunk for example in rows(np.array([index, index - 1])))
        found[index] = (cut[index] and _ends_in(before, own)) or (cut[index - 1] and _ends_in(own, before))
    return found


def _ends_in(ids: np.ndarray, end: np.ndarray) -> bool:
    return 0 < len(end) <= len(ids) and np.array_equal(ids[-len(end) :], end)


def digest_column(column: pa.ChunkedArray) -> np.ndarray:
    """A stored column of digests as bytes that compare and sort: [n]. A dropped row's is empty, and reads as zeros."""
    parts = []
    for chunk in column.chunks:
        _, offsets, values = chunk.buffers()
        starts = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        found = np.zeros(len(chunk), "S16")
        known = np.diff(starts) == 16
        content = b"" if values is None else memoryview(values)[starts[0] : starts[-1]]
        found[known] = np.frombuffer(content, "S16")
        parts.append(found)
    return np.concatenate(parts)


def _concatenated(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64)


def _read(batch: pa.RecordBatch) -> _Chunk:
    trunk_ids, trunk_starts = _flat(batch.column("trunk"))
    branch_lists, row_starts = _flat_lists(batch.column("branches"))
    mask_lists, _ = _flat_lists(batch.column("loss_mask"))
    branch_ids, branch_starts = _flat(branch_lists)
    mask, mask_starts = _flat(mask_lists)
    assert np.array_equal(mask_starts, branch_starts)
    return _Chunk(trunk_ids, trunk_starts, branch_ids, branch_starts, mask, row_starts)


def _flat_lists(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The inner array of a list array, and where each row's part of it starts: [n + 1]. Copies nothing."""
    starts = array.offsets.to_numpy()
    first, last = int(starts[0]), int(starts[-1])
    return array.values.slice(first, last - first), starts - first if first else starts


def _flat(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    values, starts = _flat_lists(array)
    return values.to_numpy(zero_copy_only=False), starts  # bits are copied, integers are not


def _loss_tokens(chunk: _Chunk) -> np.ndarray:
    """Learned tokens of every branch of the chunk, as `collate` counts them."""
    total = np.concatenate([[0], np.cumsum(chunk.mask, dtype=np.int64)])
    learned = np.diff(total[chunk.branch_starts])
    # the first token of a conversation has nothing before it to predict it
    headless = np.repeat(np.diff(chunk.trunk_starts) == 0, np.diff(chunk.row_starts))
    headless &= np.diff(chunk.branch_starts) > 0
    learned[headless] -= chunk.mask[chunk.branch_starts[:-1][headless]]
    return learned


def _digest(chunk: _Chunk, row: int) -> bytes:
    first, last = chunk.row_starts[row : row + 2].tolist()
    edges = chunk.branch_starts[first : last + 1]
    trunk, branches = slice(*chunk.trunk_starts[row : row + 2].tolist()), slice(int(edges[0]), int(edges[-1]))
    return row_digest(chunk.trunk_ids[trunk], chunk.branch_ids[branches], chunk.mask[branches], np.diff(edges).tolist())


def row_digest(trunk: np.ndarray, branches: np.ndarray, mask: np.ndarray, lengths: list[int]) -> bytes:
    """BLAKE2b, 16 bytes, of a row's sizes, token ids and masks.

    Args:
        trunk: token ids [t].
        branches: token ids of all branches, end to end [b].
        mask: 0 or 1 for each of them [b].
        lengths: tokens of each branch.
    """
    sizes = [len(lengths), len(trunk), *lengths]
    digest = hashlib.blake2b(np.asarray(sizes, dtype="<i8").tobytes(), digest_size=16)
    digest.update(trunk.astype("<i4").tobytes())
    digest.update(branches.astype("<i4").tobytes())
    digest.update(mask.astype(bool).tobytes())
    return digest.digest()
