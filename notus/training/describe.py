"""What is written once per launch: a summary of the data, and where and how long the run trained.

`data.json` and `environment.json` are for whoever reads about the run later; training itself reads neither.
"""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from notus.data.dataset import Rows
from notus.data.tokenize import DropReport

DATA_FILE = "data.json"
BUCKETS = 24
NAMED_SOURCES = 100


def data_summary(rows: Rows, report: DropReport | None) -> dict[str, Any]:
    """How many rows there are, what reading them dropped and cut, and histograms of their lengths in tokens."""
    count = rows.num_branches
    named = {1: ["completion"], 2: ["chosen", "rejected"]}
    names = named.get(count) or [f"completion_{number}" for number in range(1, count + 1)]
    lengths = {"prompt": rows.trunk_lengths, **dict(zip(names, rows.branch_lengths.T, strict=True))}
    return {
        "rows": len(rows),
        "report": {} if report is None else {**dataclasses.asdict(report), "kept": report.kept},
        "lengths": {name: length_histogram(values) for name, values in lengths.items()},
        "ratings": None if rows.ratings is None else _rating_histograms(rows.ratings),
        "sources": None if rows.sources is None else _count(rows.sources),
    }


def _count(sources: list[str]) -> dict[str, int]:
    """Rows by source, the largest first; what is beyond `NAMED_SOURCES` is counted together."""
    counted = Counter(sources).most_common()
    rest = sum(count for _, count in counted[NAMED_SOURCES:])
    return dict(counted[:NAMED_SOURCES]) | ({"(others)": rest} if rest else {})


def _rating_histograms(ratings: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Of the known ratings [n, 2] of chosen and rejected, over the same buckets; the last one holds its upper edge."""
    edges = np.histogram_bin_edges(ratings[~np.isnan(ratings)], BUCKETS)
    found = {}
    for name, column in zip(("chosen", "rejected"), ratings.T, strict=True):
        counts = np.histogram(column[~np.isnan(column)], edges)[0]
        found[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return found


def length_histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Counts in at most `BUCKETS` buckets of whole, equal width: bucket i holds edges[i] <= length < edges[i + 1]."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    width = -(-(high - low) // BUCKETS)
    edges = np.arange(low, high + width, width)
    counts = np.bincount((lengths - low) // width, minlength=len(edges) - 1)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
