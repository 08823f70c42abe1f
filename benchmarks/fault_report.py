"""From what the parts of `faults.py` found to Markdown tables and to the files that keep them."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fault_kills import PHASES, Trial


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def trials_table(trials: Sequence[Trial]) -> str:
    """A row per kind of run, signal and launcher; below, where the signals fell and how the other ranks ended."""
    kinds = list(dict.fromkeys(_kind(trial) for trial in trials))
    rows = [_row(" ".join(kind), [t for t in trials if _kind(t) == kind]) for kind in kinds]
    rows.append(_row("all", trials))
    heading = ("run", "runs", "signals", "completed", "bitwise equal", "half-written taken for whole", "orphans",
               "most steps again", "seconds each")  # fmt: skip
    fell = Counter(phase for trial in trials for phase in trial.phases)
    ends = Counter(end for trial in trials for end in trial.others)
    return "\n".join(
        [
            table(heading, rows),
            "",
            "signals fell in: " + ", ".join(f"{phase} {fell[phase]}" for phase in PHASES),
            "the other rank ended: " + ", ".join(f"{end} {count}" for end, count in ends.most_common()),
        ]
    )


def _kind(trial: Trial) -> tuple[str, ...]:
    signals = "SIGKILL" if "SIGKILL" in trial.by else "SIGTERM, SIGINT"
    return (f"{trial.case}, {signals}", *(["(torchrun)"] if trial.torchrun else []))


def _row(name: str, trials: Sequence[Trial]) -> list[object]:
    count = len(trials)
    return [
        name,
        count,
        sum(len(trial.by) for trial in trials),
        f"{sum(trial.completed for trial in trials)} of {count}",
        f"{sum(trial.equal for trial in trials)} of {count}",
        sum(len(trial.unwhole) for trial in trials),
        sum(trial.orphans for trial in trials),
        max(trial.again for trial in trials),
        f"{sum(trial.seconds for trial in trials) / count:.1f}",
    ]


def circumstances() -> dict[str, str]:
    """Command, date, hardware and versions."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next(line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    names = ("torch", "transformers", "datasets", "safetensors", "numpy")
    return {
        "command": " ".join(["python", "benchmarks/faults.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{len(os.sched_getaffinity(0))} CPU cores ({cpu}), {int(memory) / 2**20:.0f} GiB memory",
        "versions": f"Python {platform.python_version()}, Linux {platform.release()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def write(path: Path, sections: dict[str, str], found: dict[str, list[Any]]) -> None:
    """`path` gets everything as JSON, and the file beside it, with the suffix .md, the tables."""
    about = circumstances()
    kept = {name: [dataclasses.asdict(item) for item in items] for name, items in found.items()}
    path.write_text(json.dumps({**about, **kept}, indent=1) + "\n")
    lines = [f"# {path.stem}", "", *(f"- {name}: {value}" for name, value in about.items())]
    for title, text in sections.items():
        lines += ["", f"## {title}", "", text]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
