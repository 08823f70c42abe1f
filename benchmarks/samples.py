"""Measure what samples while training cost a short run: `python benchmarks/samples.py [--section.key=value ...]`.

Train the made model of 15.6M parameters on 8 pairs, once with `tracking.samples` at 0 and once at its default, and
print the seconds of both. The samples are taken twice, before the first step and after the last. On a machine that does
other work, set OMP_NUM_THREADS=1 and look at the CPU seconds.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from common import describe_machine, make_model, make_pairs
from notus.config import load_config
from notus.training import dpo


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", seed=0)
        make_pairs(folder / "pairs.jsonl", 8, seed=0)
        _seconds(folder, "warm", sys.argv[1:])  # tokenises, and starts the threads
        found = {what: _seconds(folder, what, sys.argv[1:]) for what in ("without", "with")}
    found["samples"] = (found["with"][0] - found["without"][0], found["with"][1] - found["without"][1])
    rounded = {name: {"wall": round(wall, 2), "cpu": round(cpu, 2)} for name, (wall, cpu) in found.items()}
    print(json.dumps({"seconds": rounded, "machine": describe_machine()}))


def _seconds(folder: Path, what: str, overrides: list[str]) -> tuple[float, float]:
    """Return the wall-clock and the CPU seconds of one run."""
    tree = {
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": str(folder / "pairs.jsonl"), "cache_dir": str(folder / "cache")},
        "training": {"output_dir": str(folder / what), "batch_size": 8, "epochs": 1, "warmup_ratio": 0.0},
        "tracking": {} if what == "with" else {"samples": 0},
    }
    path = folder / f"{what}.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    config = load_config([str(path), *overrides], "dpo")
    began = (time.perf_counter(), time.process_time())
    assert dpo.run(config) == 0
    return time.perf_counter() - began[0], time.process_time() - began[1]


if __name__ == "__main__":
    main()
