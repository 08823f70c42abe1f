"""Texts to score -> packed rows in which what texts have in common is computed once.

Texts are sorted as sequences of tokens, so those with a long common beginning stand together: the four options of a
question, and the questions of a task whose examples are always the same. Neighbours become a group, one trunk and a
branch each, where that saves tokens. Rows follow from the texts alone, so that their number of ranks changes
nothing, not even by rounding.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from notus.data.packing import Batch, build_layout

# A trunk's keys are gathered once for each branch: at most so many times the tokens of a row, to bound the memory.
_KEYS_PER_TOKEN = 8


@dataclasses.dataclass(frozen=True)
class Text:
    """A sequence of tokens of which the last `scored` are scored.

    Attributes:
        ids: int32 [T].
        scored: how many, 1 to T - 1.
    """

    ids: np.ndarray
    scored: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Texts that share a trunk.

    Attributes:
        trunk: tokens that all inputs begin with; 0 for a lone input.
        inputs: what the model reads, each longer than the trunk, none the beginning of another.
        wanted: per input, which texts are scored from it.
    """

    trunk: int
    inputs: list[np.ndarray]
    wanted: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens of the group in a row."""
        return self.trunk + sum(len(ids) - self.trunk for ids in self.inputs)


Row = list[Group]


def plan_rows(texts: Sequence[Text], tokens_per_row: int) -> list[Row]:
    """Rows of at most `tokens_per_row` tokens, the longest groups first: memory runs out at once or not at all."""
    rows: list[Row] = []
    left = 0
    for group in sorted(_groups(texts, tokens_per_row), key=lambda group: -group.tokens):
        if group.tokens > left:
            rows.append([])
            left = tokens_per_row
        rows[-1].append(group)
        left -= group.tokens
    return rows


def texts_of(row: Row) -> list[int]:
    """Which texts a row scores, in the order of its batch."""
    return [text for group in row for wanted in group.wanted for text in wanted]


def share(costs: Sequence[float], rank: int, world_size: int) -> list[int]:
    """Which rows this rank computes, in order: the dearest first, each to the rank with the least so far."""
    heap = [(0.0, number) for number in range(world_size)]
    mine = []
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        paid, taker = heap[0]
        heapq.heapreplace(heap, (paid + costs[row], taker))
        if taker == rank:
            mine.append(row)
    return mine


def _inputs(texts: Sequence[Text]) -> list[tuple[np.ndarray, list[int]]]:
    """Different inputs in sorted order, and the texts scored from each.

    The last token of a text is never read. An input that another begins with is read there.
    """
    as_bytes = [text.ids[:-1].astype(">i4").tobytes() for text in texts]  # sort as the ids do
    found: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(texts)), key=lambda index: as_bytes[index]):
        if found and as_bytes[index].startswith(as_bytes[found[-1][0]]):
            found[-1] = (index, [*found[-1][1], index])
        else:
            found.append((index, [index]))
    return [(texts[longest].ids[:-1], wanted) for longest, wanted in found]


@dataclasses.dataclass(frozen=True)
class _Span:
    """Neighbours in sorted order, from `start` to before `stop`: `keys` tokens in all, `trunk` of each in common."""

    start: int
    stop: int
    trunk: int
    keys: int

    @property
    def tokens(self) -> int:
        return self.keys - (self.stop - self.start - 1) * self.trunk


def _groups(texts: Sequence[Text], tokens_per_row: int) -> list[Group]:
    """Join neighbours where that saves tokens and there is room; those with the most in common first."""
    inputs = _inputs(texts)
    alone = [_Span(number, number + 1, 0, len(ids)) for number, (ids, _) in enumerate(inputs)]
    begins, ends = {span.start: span for span in alone}, {span.stop: span for span in alone}
    common = [0, *(_common(first, second) for (first, _), (second, _) in itertools.pairwise(inputs))]
    for place in sorted(range(1, len(inputs)), key=lambda place: -common[place]):
        left, right = ends[place], begins[place]
        joined = _Span(left.start, right.stop, common[place], left.keys + right.keys)
        saves = joined.tokens < left.tokens + right.tokens
        if saves and joined.tokens <= tokens_per_row and joined.keys <= _KEYS_PER_TOKEN * tokens_per_row:
            del begins[place], ends[place]
            begins[joined.start] = ends[joined.stop] = joined
    return [
        Group(span.trunk, *map(list, zip(*inputs[span.start : span.stop], strict=True))) for span in begins.values()
    ]


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


def collate_texts(row: Row, texts: Sequence[Text]) -> Batch:
    """The row as a batch: an example of one branch per text, in the order of `texts_of`."""
    tokens, positions, sources, targets, lengths = [], [], [], [], []
    offset = 0
    for group in row:
        tokens.append(group.inputs[0][: group.trunk])
        positions.append(np.arange(group.trunk))
        start = offset + group.trunk
        for ids, wanted in zip(group.inputs, group.wanted, strict=True):
            tokens.append(ids[group.trunk :])
            positions.append(np.arange(group.trunk, len(ids)))
            for text in (texts[index] for index in wanted):
                before = np.arange(len(text.ids) - 1 - text.scored, len(text.ids) - 1)
                sources.append(np.where(before < group.trunk, offset, start - group.trunk) + before)
                targets.append(text.ids[-text.scored :])
                lengths.append(text.scored)
            start += len(ids) - group.trunk
        offset = start
    return Batch(
        input_ids=_join(tokens),
        position_ids=_join(positions),
        layout=build_layout(
            [group.trunk for group in row], [[len(ids) - group.trunk for ids in group.inputs] for group in row]
        ),
        sources=_join(sources),
        targets=_join(targets),
        lengths=torch.tensor(lengths)[:, None],
        weights=torch.ones(len(lengths)),
        indices=torch.tensor(texts_of(row)),
    )


def _join(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
