"""Log-likelihoods of texts, in packed rows in which what texts have in common is computed once.

Texts are sorted as sequences of tokens, so those with a long common beginning stand together: the four options of a
question, and the questions of a task whose examples are always the same. Neighbours become a group, one trunk and a
branch each, where that saves tokens. Rows follow from the texts alone, so that the number of ranks changes nothing, not
even by rounding. Each row is kept as soon as it is done.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from notus.data.batching import balance
from notus.data.packing import Batch, build_layout
from notus.evaluation.results import KeptRecords
from notus.model.flops import Dimensions, dimensions, forward_flops
from notus.model.policy import Policy
from notus.runtime.distributed import gather_objects, is_main, rank, say, world_size

DEFAULT_TOKENS_PER_ROW = 4096

# A trunk's keys are gathered once for each branch: at most so many times the tokens of a row, to bound the memory.
_KEYS_PER_TOKEN = 8


@dataclasses.dataclass(frozen=True)
class Text:
    """A sequence of tokens of which the last `scored` are scored."""

    ids: np.ndarray  # int32 [T]
    scored: int  # how many, 1 to T - 1


@dataclasses.dataclass(frozen=True)
class Group:
    """Texts that share a trunk."""

    trunk: int  # tokens that all inputs begin with; 0 for a lone input
    inputs: list[np.ndarray]  # what the model reads, each longer than the trunk, none the beginning of another
    wanted: list[list[int]]  # per input, which texts are scored from it

    @property
    def tokens(self) -> int:
        """Tokens of the group in a row."""
        return self.trunk + sum(len(ids) - self.trunk for ids in self.inputs)


Row = list[Group]
Score = tuple[float, bool]  # log-prob of the scored tokens in nats; whether each is the likeliest


def plan_rows(texts: Sequence[Text], tokens_per_row: int) -> list[Row]:
    """Return rows of at most `tokens_per_row` tokens, longest groups first: memory runs out at once or not at all."""
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
    """Return which texts a row scores, in the order of its batch."""
    return [text for group in row for wanted in group.wanted for text in wanted]


def share(rows: Sequence[Row], size: Dimensions, rank: int, world_size: int) -> list[Row]:
    """Return the rows that a rank computes: the costliest first, each to the rank with the least to do so far."""
    if not rows:
        return []
    costs = [float(sum(_cost(group, size) for group in row)) for row in rows]
    (mine,) = balance([1] * len(rows), costs, world_size, tokens_per_row=len(rows))[rank]  # a bin of rows for each rank
    return [rows[number] for number in mine]


def _cost(group: Group, size: Dimensions) -> int:
    branches = np.array([[len(ids) - group.trunk for ids in group.inputs]])
    # the head computes little, and nearly the same for every group
    return int(forward_flops(size, np.array([group.trunk]), branches, np.zeros(1))[0])


def _inputs(texts: Sequence[Text]) -> list[tuple[np.ndarray, list[int]]]:
    """Return different inputs in sorted order, and the texts scored from each.

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
    """Return how many tokens two sequences begin with in common."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


def collate_texts(row: Row, texts: Sequence[Text]) -> Batch:
    """Return the row as a batch: an example of one branch per text, in the order of `texts_of`."""
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
        present=torch.ones(len(lengths), 1, dtype=torch.bool),
        weights=torch.ones(len(lengths)),
        indices=torch.tensor(texts_of(row)),
    )


def _join(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


class KeptScores(KeptRecords):
    """Scores by the digest of their text."""

    what = "log-likelihood"

    def is_valid(self, record: dict[str, Any]) -> bool:
        """Return whether a record holds a score."""
        return [type(record.get(name)) for name in ("logp", "greedy")] == [float, bool]

    def key(self, text: Text) -> str:
        """Return a digest of the text and the model."""
        head = f"{self.identity}{text.scored} {len(text.ids)} ".encode()
        return hashlib.sha256(head + text.ids.tobytes()).hexdigest()


def score_texts(policy: Policy, texts: Sequence[Text], *, tokens_per_row: int | None, kept: KeptScores) -> list[Score]:
    """Return the scores of texts, and compute those that are not kept yet; collective.

    Rows are planned from all texts, kept or not: what a resumed pass computes is what an undisturbed one would have.
    `policy` is whole on every rank, `texts` are the same on every rank, repeats allowed. A row has at most
    `tokens_per_row` tokens; None: 4096, or the longest text's. Raises ValueError if a text is longer, or its score is
    not finite.
    """
    keys = [kept.key(text) for text in texts]
    unique = dict(zip(keys, texts, strict=True))
    names, different = list(unique), list(unique.values())
    rows = plan_rows(different, _room(different, tokens_per_row))
    done: dict[str, Score] = {key: (found["logp"], found["greedy"]) for key, found in kept.find(keys).items()}
    open_rows = [row for row in rows if any(names[text] not in done for text in texts_of(row))]
    read = sum(len(text.ids) - 1 for text in different)
    computed = sum(group.tokens for row in rows for group in row)
    say(
        f"{len(texts)} log-likelihoods of {len(different)} texts: {read} tokens, {computed} with shared prefixes "
        f"computed once, in {len(rows)} rows; {len(done)} texts are done already"
    )
    new: dict[str, Score] = {}
    mine = share(open_rows, dimensions(policy.causal_lm), rank(), world_size())
    for row in tqdm(mine, disable=None if is_main() else True):
        scores = {names[text]: score for text, score in _score_row(policy, row, different).items()}
        kept.add({"key": key, "logp": logp, "greedy": greedy} for key, (logp, greedy) in scores.items())
        new.update(scores)
    for part in gather_objects(new):
        done.update(part)
    return [done[key] for key in keys]


def _score_row(policy: Policy, row: Row, texts: Sequence[Text]) -> dict[int, Score]:
    batch = collate_texts(row, texts)
    logps, greedy = policy.token_scores(batch.to(policy.causal_lm.device))
    lengths = batch.lengths.flatten()
    sums = torch.segment_reduce(logps.cpu(), "sum", lengths=lengths)
    all_greedy = torch.segment_reduce(greedy.float().cpu(), "min", lengths=lengths)
    if not torch.isfinite(sums).all():
        instead = "" if policy.causal_lm.dtype == torch.float32 else ", or use --precision fp32"
        raise ValueError(f"log-likelihoods are not finite; check the weights{instead}")
    columns = zip(batch.indices.tolist(), sums.tolist(), all_greedy.tolist(), strict=True)
    return {text: (logp, bool(hit)) for text, logp, hit in columns}


def _room(texts: Sequence[Text], given: int | None) -> int:
    longest = max((len(text.ids) - 1 for text in texts), default=0)
    if given is not None and given < longest:
        raise ValueError(
            f"--tokens-per-row {given} is less than the longest text ({longest} tokens): raise it, "
            "or lower --max-length"
        )
    return given or max(DEFAULT_TOKENS_PER_ROW, longest)
