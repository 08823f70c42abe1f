"""What is written once per launch: a summary of the data, and where and how long the run trained.

`data.json` and `environment.json` are for whoever reads about the run later; training itself reads neither.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from notus.data.dataset import Rows
from notus.data.tokenize import DropReport
from notus.runtime.distributed import gather_objects, world_size
from notus.runtime.files import write_text
from notus.runtime.process import tell
from notus.runtime.switches import disabled_names
from notus.training.tracking import Sink

DATA_FILE = "data.json"
ENVIRONMENT_FILE = "environment.json"
BUCKETS = 24
NAMED_SOURCES = 100
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


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


def hardware(device: torch.device) -> str:
    """The job's devices, such as "8 x NVIDIA A100-SXM4-40GB" or "CPU, 16 cores"; collective."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    found = Counter(gather_objects(name))
    if device.type != "cuda":
        return ", ".join(found)
    return ", ".join(f"{count} x {each}" for each, count in found.items())


class EnvironmentFile(Sink):
    """`environment.json`: hardware, versions, and each launch: its seconds, and what `NOTUS_DISABLE` switched off."""

    remedy = f"{ENVIRONMENT_FILE} is not kept from here on"

    def __init__(self, path: Path, *, step: int, hardware: str) -> None:
        """Begin a launch that goes on from `step`; at 0, earlier launches left nothing and are forgotten."""
        self._path, self._began = path, time.monotonic()
        self._earlier = _launches(path) if step else []
        self._launch: dict[str, Any] = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "from_step": step,
            "disabled": sorted(disabled_names()),
            "seconds": 0.0,
            "to_step": step,
        }
        versions = {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        }
        self._facts = {"hardware": hardware, "world_size": world_size(), "versions": versions}
        self._write()

    def sync(self, step: int) -> None:
        self._launch["to_step"] = step
        self._write()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        self._launch["seconds"] = time.monotonic() - self._began
        launches = [*self._earlier, self._launch]
        total = sum(launch["seconds"] for launch in launches)
        write_text(self._path, json.dumps({**self._facts, "launches": launches, "seconds": total}, indent=1) + "\n")


def _launches(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        launches = list(json.loads(path.read_text(encoding="utf-8"))["launches"])
        sum(launch["seconds"] for launch in launches)
    except (ValueError, KeyError, TypeError):
        tell(f"warning: {path} is damaged: it forgets the earlier launches")
        return []
    return launches
