"""Training and evaluation rows of a run, with what became of the data on the way."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from notus.data.chat import resolve_template
from notus.data.dataset import TokenizedDataset
from notus.data.tokenize import DropReport, load_pairs, load_sft, split_holdout
from notus.runtime import distributed

DATA_FILE = "data.json"
BUCKETS = 24
NAMED_SOURCES = 100


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run learns from and is evaluated on.

    Attributes:
        train: the training rows.
        eval: the evaluation rows, if there are any.
        reports: what reading "train" and "eval" dropped and cut; rows held out of "train" were read with it.
    """

    train: TokenizedDataset
    eval: TokenizedDataset | None
    reports: dict[str, DropReport]

    def summary(self) -> dict[str, Any]:
        """The content of `data.json`."""
        sides = {"train": self.train, "eval": self.eval}
        return {
            name: None if rows is None else data_summary(rows, self.reports.get(name)) for name, rows in sides.items()
        }


def load_inputs(
    sources: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int | None,
    eval_size: int,
    chat_template: str | None,
    add_empty_system: bool,
    num_workers: int,
    cache_dir: str | None,
    seed: int,
) -> Inputs:
    """Read and tokenise what a run learns from. All ranks must call this; rank 0 fills the cache.

    If a chat template rendered the rows, `tokenizer` is given that template, so that it is exported with the model.

    Args:
        sources: what is read as "train" and, if it is there, as "eval"; see `load_pairs`.
        tokenizer: a fast tokenizer.
        max_prompt_length: of pairs; None reads demonstrations.
        eval_size: rows to hold out of the training data, if "eval" is not there.
        seed: of all draws.
        max_length, chat_template, add_empty_system, num_workers, cache_dir: see `load_pairs`.
    """
    load = load_sft if max_prompt_length is None else functools.partial(load_pairs, max_prompt_length=max_prompt_length)
    reports = {}

    def read(name: str) -> datasets.Dataset:
        try:
            dataset, report = distributed.main_first(
                lambda: load(
                    sources[name],
                    tokenizer,
                    max_length=max_length,
                    chat_template=chat_template,
                    add_empty_system=add_empty_system,
                    num_workers=num_workers,
                    cache_dir=cache_dir,
                    seed=seed,
                )
            )
        except OSError as error:
            raise ValueError(f"data.{name} cannot be read, or data.cache_dir not be written ({error})") from error
        distributed.say(f"{name} {report}")
        if report.templated:
            tokenizer.chat_template = resolve_template(tokenizer, chat_template)
        reports[name] = report
        return dataset

    train, held_out = read("train"), None
    if "eval" in sources:
        held_out = read("eval")
    elif eval_size:
        train, held_out = split_holdout(train, eval_size, seed)
    return Inputs(TokenizedDataset(train), None if held_out is None else TokenizedDataset(held_out), reports)


def data_summary(rows: TokenizedDataset, report: DropReport | None) -> dict[str, Any]:
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
