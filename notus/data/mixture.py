"""Tokenised sources -> training and evaluation rows: weights, held-out rows, copies.

Rows are compared by what is learned from them: two rows of the same tokens and masks are copies. Evaluation rows are
chosen first, and no copy of one is trained on; only then rows are repeated by their weights.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import datasets
import numpy as np

from notus.data.dataset import digest_column

MOST_ROWS = 10**9


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of one source, and how many of them to take.

    Attributes:
        name: what the user calls the source.
        rows: as `tokenize` makes them.
        weight: 0.5: half of the rows, drawn; 2: each twice.
    """

    name: str
    rows: datasets.Dataset
    weight: float = 1.0


def mixed(shares: Sequence[Share], seed: int) -> datasets.Dataset:
    """Take of each share what its weight says, in the order of the shares.

    A row is taken as often as fits into the weight in whole; which rows once more is drawn with `seed`.

    Raises:
        ValueError: a weight takes no row at all, or makes over a billion.
    """
    return datasets.concatenate_datasets([_weighted(share, seed) for share in shares])


def rows_to_hold(size: float, available: int) -> int:
    """How many of `available` rows `data.eval_size` holds out.

    A fraction is rounded up, as `datasets` and scikit-learn do, but exactly, as it is written: 0.07 of 100 rows are 7
    (in binary, the product is a little more). It leaves at least one row to train on.

    Args:
        size: a number of rows (an integer), or a fraction (a float) above 0 and below 1.
        available: different rows.
    """
    if isinstance(size, int):
        return size
    return max(1, min(available - 1, math.ceil(Fraction(repr(size)) * available)))


def hold_out(shares: Sequence[Share], size: float, seed: int) -> tuple[list[Share], datasets.Dataset, int]:
    """Choose evaluation rows, before any row is repeated.

    Without weights or copies, the rows are those of `datasets`' own `train_test_split(test_size=size, seed=seed)`, as
    Notus' split was made. Of copies, the first can be drawn.

    Args:
        shares: the sources; of those with a weight below 1 what it takes is drawn first.
        size: how many rows to hold out, or which fraction of the different ones; see `rows_to_hold`.
        seed: of all draws.

    Returns:
        What is left of the shares, without any copy of a held-out row; the held-out rows, in the order of the shares;
        and how many copies were left out.

    Raises:
        ValueError: `size` leaves either side empty.
    """
    drawn = [
        dataclasses.replace(share, rows=_weighted(share, seed), weight=1.0) if share.weight < 1 else share
        for share in shares
    ]
    rows = datasets.concatenate_datasets([share.rows for share in drawn])
    distinct = np.sort(np.unique(digests_of(rows), return_index=True)[1])
    count = rows_to_hold(size, len(distinct))
    if len(distinct) == 1:
        raise ValueError("cannot hold out the only row for evaluation: give more rows, or set data.eval_size=0")
    if not 0 < count < len(distinct):
        raise ValueError(
            f"cannot hold {count} of {len(distinct)} different rows out for evaluation; choose 1 to {len(distinct) - 1}"
        )
    chosen = np.sort(distinct[np.random.default_rng(seed).permutation(len(distinct))[:count]])
    held = rows.select(chosen)
    left, taken = without(drawn, held)
    return left, held, taken - count


def without(shares: Sequence[Share], held: datasets.Dataset) -> tuple[list[Share], int]:
    """The shares without any row that is a copy of one in `held`, and how many rows were left out.

    Raises:
        ValueError: no row is left of them all.
    """
    known, left, count = digests_of(held), [], 0
    for share in shares:
        is_held = np.isin(digests_of(share.rows), known)
        count += int(is_held.sum())
        rows = share.rows.select(np.flatnonzero(~is_held)) if is_held.any() else share.rows
        if len(rows):
            left.append(dataclasses.replace(share, rows=rows))
    if not left:
        raise ValueError("every training row is an evaluation row as well, so none is left to learn from")
    return left, count


def rows_taken(share: Share) -> int:
    """How many rows are taken of a share."""
    return len(share.rows) if share.weight == 1 else round(share.weight * len(share.rows))


def copies(shares: Sequence[Share]) -> int:
    """How many rows repeat an earlier one, before weights."""
    digests = np.concatenate([digests_of(share.rows) for share in shares])
    return len(digests) - len(np.unique(digests))


def digests_of(rows: datasets.Dataset) -> np.ndarray:
    """The digest of every row's content (see `dataset.row_digest`), as bytes that compare and sort: [n]."""
    stored = digest_column(rows.data.column("digest"))
    return stored if rows._indices is None else stored[rows._indices.column(0).to_numpy()]


def _weighted(share: Share, seed: int) -> datasets.Dataset:
    if share.weight == 1:
        return share.rows
    count = rows_taken(share)
    if count == 0:
        raise ValueError(f"{share.name}: weight {share.weight} of {len(share.rows)} rows is none; raise the weight")
    if count > MOST_ROWS:
        raise ValueError(f"{share.name}: weight {share.weight} makes {count:,} rows of {len(share.rows):,}; lower it")
    repeats, rest = divmod(count, len(share.rows))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(share.rows))[:rest])
    return share.rows.select(np.concatenate([*[np.arange(len(share.rows))] * repeats, drawn]))
