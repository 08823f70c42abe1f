"""How tokenised rows are stored: the columns of the Arrow files, and tables of them."""

from collections.abc import Sequence
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from notus.data.chat import Encoded
from notus.data.formats import Provenance

FEATURES = datasets.Features(
    {
        "trunk": datasets.List(datasets.Value("int32")),
        "branches": datasets.List(datasets.List(datasets.Value("int32"))),
        "loss_mask": datasets.List(datasets.List(datasets.Value("int8"))),
    }
)
# Null where the data do not say; no part of a row's digest, which stands for what is computed.
PROVENANCE = datasets.Features(
    {
        "source": datasets.Value("string"),
        "chosen_rating": datasets.Value("float32"),
        "rejected_rating": datasets.Value("float32"),
    }
)


class TokenisedRow(NamedTuple):
    """A row to store: its conversations (none: dropped), the tokens they share, what befell it, its provenance."""

    encoded: Sequence[Encoded]
    shared: int
    outcome: int
    provenance: Provenance


def table(rows: Sequence[TokenisedRow]) -> pa.Table:
    """The rows as `FEATURES`, `PROVENANCE` and `outcome`, int8."""
    trunks = [row.encoded[0].ids[: row.shared] if row.encoded else np.empty(0, np.int32) for row in rows]
    branches = [Encoded(item.ids[row.shared :], item.mask[row.shared :]) for row in rows for item in row.encoded]
    per_row = _offsets([len(row.encoded) for row in rows])
    ids, masks = _lists([item.ids for item in branches]), _lists([item.mask for item in branches])
    columns = {
        "trunk": _lists(trunks),
        "branches": pa.ListArray.from_arrays(per_row, ids),
        "loss_mask": pa.ListArray.from_arrays(per_row, masks),
        "outcome": pa.array([row.outcome for row in rows], pa.int8()),
    }
    for name, field in zip(Provenance._fields, PROVENANCE.arrow_schema, strict=True):
        columns[name] = pa.array([getattr(row.provenance, name) for row in rows], field.type)
    return pa.table(columns)


def _lists(items: Sequence[np.ndarray]) -> pa.ListArray:
    values = np.concatenate(items) if items else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(_offsets([len(item) for item in items]), pa.array(values))


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
