"""No run is ever lost: small runs are killed, stopped and broken in every way, and the same command is run again.

    python benchmarks/faults.py [--kills 200] [--terms 50] [--torchrun 5] [--faults] [--stall] [--results FILE.json]

Without any of these parts, all of them run. Prints a table for each part, and ends with exit code 1 if a run was lost,
if anything differs from an undisturbed run, if a process stayed behind, or if a fault was not met as it should be.
benchmarks/README.md says what is done and compared. Linux; the fault table needs root or `unshare -rm`.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fault_ranks
import fault_report
import fault_stall
import fault_table
from fault_kills import Harness, Trial
from fault_runs import make_inputs

PARTS = {"kills": 200, "terms": 50, "torchrun": 5, "faults": True, "stall": True}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="No run is ever lost: see the head of this file.")
    parser.add_argument("--kills", type=int, default=0, help="runs to kill at a random moment")
    parser.add_argument("--terms", type=int, default=0, help="runs to stop by SIGTERM or SIGINT at a random moment")
    parser.add_argument("--torchrun", type=int, default=0, help="runs to kill under torchrun itself")
    parser.add_argument("--faults", action="store_true", help="cause every fault, and show what the user sees")
    parser.add_argument("--stall", action="store_true", help="measure how long a checkpoint stops the training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, the model and the data")
    parser.add_argument("--folder", type=Path, help="where the runs go (default: a temporary folder)")
    parser.add_argument("--results", type=Path, help="write what was found to this JSON file, and the tables beside it")
    args = parser.parse_args()
    if not any(getattr(args, part) for part in PARTS):
        vars(args).update(PARTS)
    return args


def disturb(args: argparse.Namespace, scratch: Path) -> list[Trial]:
    """The kills and the requests to stop."""
    from notus.runtime import process as entry

    harness = Harness(scratch, random.Random(args.seed), getattr(entry, "STOPPED", None))
    kill, stop = (signal.SIGKILL,), (signal.SIGTERM, signal.SIGINT)
    return [
        *_told(harness.trials(args.kills, kill), args.kills),
        *_told(harness.trials(args.terms, stop), args.terms),
        *_told(harness.trials(args.torchrun, kill, torchrun=True), args.torchrun),
    ]


def _told(trials: Iterable[Trial], count: int) -> Iterable[Trial]:
    for number, trial in enumerate(trials, start=1):
        sent = ", ".join(
            f"{name} to {ranks} in {phase} at {moment:.2f} s"
            for name, ranks, phase, moment in zip(trial.by, trial.ranks, trial.phases, trial.moments, strict=True)
        )
        bad = "; ".join([*trial.losses, *(f"half-written: {name}" for name in trial.unwhole)])
        print(f"{number}/{count} {trial.case}: {sent}; {trial.seconds:.1f} s {bad}", file=sys.stderr, flush=True)
        yield trial


def run_parts(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, str], dict[str, list[Any]], list[str]]:
    """The tables, what stands behind them, and what is wrong."""
    sections: dict[str, str] = {}
    found: dict[str, list[Any]] = {}
    wrong: list[str] = []
    if args.kills or args.terms or args.torchrun:
        trials = disturb(args, scratch)
        found["trials"], sections["Runs disturbed at random moments"] = trials, fault_report.trials_table(trials)
        wrong += [f"{t.case}: {'; '.join([*t.losses, *t.unwhole])}, orphans {t.orphans}" for t in trials if not t.whole]
    if args.faults:
        rows = fault_table.cause_all(scratch)
        found["faults"], sections["Faults"] = rows, fault_table.faults_table(rows)
        wrong += [f"{row.fault}: {row.seen}" for row in rows if not row.as_expected]
    if args.stall:
        timings = fault_stall.measure(scratch, args.seed)
        found["stall"], sections["What a checkpoint costs the loop"] = timings, fault_stall.stall_table(timings)
        wrong += fault_stall.stalled(timings)
    return sections, found, wrong


def main() -> None:
    args = parse_arguments()
    if args.faults and os.geteuid():  # the fault table mounts file systems: as root of a namespace of its own
        os.execvp("unshare", ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        scratch = Path(folder)
        fault_ranks.prepare(scratch)
        make_inputs(scratch, args.seed)
        sections, found, wrong = run_parts(args, scratch)
    for title, text in sections.items():
        print(f"## {title}\n\n{text}\n")
    if args.results:
        fault_report.write(args.results, sections, found)
    if wrong:
        sys.exit("\n".join(["not as it should be:", *wrong]))


if __name__ == "__main__":
    main()
