"""Notus beside TRL: the same model, pairs, batches and order, each run in a process of its own.

    pip install -r requirements.txt -r requirements-bench.txt
    python benchmarks/vs_trl.py [--model FOLDER --pairs FILE] [--repeats 3] [--results FILE.json]
    python benchmarks/vs_trl.py --sides notus --size 100m --num-pairs 32 --epochs 1
    python benchmarks/vs_trl.py --sides notus --against REVISION      # old Notus and new
    python benchmarks/vs_trl.py --ratios 1:4 1:1 4:1 --length 256     # pairs of several shapes

Prints pairs per second, memory, and how many times faster Notus is than each other side, with the range over the
rounds. The first ratio is that to the fastest TRL, whose options a short search finds. Ends with exit code 1 if the
sides saw other tokens, or if their losses differ by more than the tolerance. benchmarks/README.md says what is counted
and how.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trl_search
from common import LOG_SPREAD, MEAN_COMPLETION, MEAN_PROMPT, Job, Outcome, make_pairs, write_json
from trl_search import Options, RunFailed, Search, TimedOut, Work
from vs_trl_report import Comparison, Machine, Measured, check_losses, check_tokens, table

HERE = Path(__file__).resolve().parent
# In the order in which the table has them. `trl` is TRL as it comes; its loss is always fused with the head (log-probs
# in tiles, no logits). `trl-fastest` has the options that a search finds (trl_search.py). `trl-best` has one pair at a
# time, which leaves the least padding; `trl-liger` has Liger's fused layers.
PRECOMPUTED = trl_search.BASE
OPTIONS: dict[str, Options] = {
    "notus": {"tokens_per_row": 4096},  # the default of `training.tokens_per_row`
    "trl-fastest": {},
    "notus-old": {"tokens_per_row": 4096},
    "trl": {},
    "trl-precomputed": PRECOMPUTED,
    "trl-best": {**PRECOMPUTED, "per_device_train_batch_size": 1, "precompute_ref_batch_size": 1},
    "trl-liger": {**PRECOMPUTED, **trl_search.LIGER},
}
# The largest difference of two losses at the same step. In bf16 each side rounds its log-probs in its own way, and
# beta times that is in the loss; 1.2e-3 was seen over six steps of the made pairs.
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}


def missing(side: str) -> str | None:
    """Return why a side cannot run here; torch stays out of this process, so CUDA is known by its device file."""
    if side.startswith("trl") and importlib.util.find_spec("trl") is None:
        return "trl is not installed"
    if side == "trl-liger":
        if not Path("/dev/nvidiactl").exists():
            return "Liger's kernels need CUDA"
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
    return None


def parse_arguments() -> argparse.Namespace:
    sides = [side for side in OPTIONS if side != "notus-old"]
    parser = argparse.ArgumentParser(description="Notus beside TRL: see the head of this file.")
    parser.add_argument("--model", type=Path, help="model folder (default: made here)")
    parser.add_argument("--size", choices=["15m", "100m", "1b"], default="15m", help="of the made model")
    parser.add_argument("--pairs", type=Path, help="JSONL with strings: prompt, chosen, rejected (default: made here)")
    parser.add_argument("--num-pairs", type=int, default=128, help="to make, or to take from --pairs")
    parser.add_argument("--ratios", nargs="+", metavar="P:C", help="made pairs of these ratios of prompt to completion")
    parser.add_argument("--length", type=int, default=256, help="with --ratios: mean of a prompt and a completion")
    parser.add_argument("--spread", type=float, default=LOG_SPREAD, help="of the logarithm of made lengths")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3], help="one run per side and number")
    parser.add_argument("--learning-rate", type=float, default=5e-7)
    parser.add_argument("--max-length", type=int, default=1024, help="a pair longer than this is an error")
    parser.add_argument("--precision", choices=list(TOLERANCE), default="fp32")
    parser.add_argument("--tolerance", type=float, help="largest difference of two losses (fp32: 1e-3, bf16: 1e-2)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds; in each, another side begins")
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides)
    parser.add_argument("--against", help="also run the Notus of this checkout or git revision, as `notus-old`")
    parser.add_argument("--probe-steps", type=int, default=1, help="steps that a probe of trl-fastest measures")
    parser.add_argument("--seed", type=int, default=0, help="of the made model and pairs")
    parser.add_argument("--results", type=Path, help="write everything measured to this JSON file")
    args = parser.parse_args()
    if min(args.repeats, args.probe_steps, args.batch_size) < 1:
        parser.error("--repeats, --probe-steps and --batch-size are 1 or more")
    if args.num_pairs % args.batch_size:
        parser.error(f"--num-pairs {args.num_pairs} is no multiple of --batch-size {args.batch_size}")
    if args.pairs and not args.model:
        parser.error("--pairs needs --model: the made model knows made words alone")
    if args.pairs and args.ratios:
        parser.error("--ratios has no effect with --pairs: remove one of them")
    wanted = {*args.sides, *(["notus-old"] if args.against else [])}
    args.sides = [side for side in OPTIONS if side in wanted]
    args.tolerance = args.tolerance or TOLERANCE[args.precision]
    return args


# ---- running ----


@dataclass(frozen=True)
class Bench:
    """Where the processes run, and with what; `old` is the checkout of `--against`."""

    args: argparse.Namespace
    scratch: Path
    model: Path
    pairs: Path
    old: Path | None = None

    def options(self, side: str, epochs: int) -> Options | None:
        """Return what is particular to a side; None if the search for the fastest TRL found nothing that works."""
        return self.search.fastest(epochs) if side == "trl-fastest" else OPTIONS[side]

    def run(self, side: str, epochs: int, options: Options) -> Measured:
        """Run one side once; `notus-old` runs its own checkout's script."""
        source = self.old if side == "notus-old" and self.old else HERE.parent
        script = "notus_side.py" if side.startswith("notus") else "trl_side.py"
        outcome = self._run(source / "benchmarks" / script, self.pairs, epochs, options)
        print(f"{side}, epochs: {epochs}, seconds: {outcome.seconds:.1f}", file=sys.stderr)
        return Measured(side, epochs, outcome, options)

    @functools.cached_property
    def search(self) -> Search:
        """The search for the fastest TRL, on the first of the pairs."""
        work = Work(self.args.num_pairs, self.args.batch_size, self.args.probe_steps)
        pairs = self.scratch / "probe.jsonl"
        pairs.write_text("".join(self.pairs.read_text().splitlines(keepends=True)[: work.probe_pairs]))

        def run(options: Options, limit: float | None) -> Outcome:
            return self._run(HERE / "trl_side.py", pairs, work.probe_epochs, options, limit)

        return Search(run, work, trl_search.changes_here(liger=missing("trl-liger") is None))

    def _run(self, script: Path, pairs: Path, epochs: int, options: Options, limit: float | None = None) -> Outcome:
        folder, args = Path(tempfile.mkdtemp(dir=self.scratch)), self.args
        job = Job(
            model=str(self.model),
            pairs=str(pairs),
            scratch=str(folder / "run"),
            batch_size=args.batch_size,
            epochs=epochs,
            precision=args.precision,
            learning_rate=args.learning_rate,
            max_length=args.max_length,
            options=options,
        )
        job.write(folder / "job.json")
        call(folder, script, folder / "job.json", folder / "outcome.json", limit=limit)
        return Outcome.read(folder / "outcome.json")

    def machine(self, tokens: list[list[int]]) -> Machine:
        """Measure the matmul rate now, with as many tokens as a step has."""
        steps = self.args.num_pairs / self.args.batch_size
        shared, scored = (round(sum(sum(row[start:3]) for row in tokens) / steps) for start in (0, 1))
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        output = folder / "machine.json"
        call(folder, HERE / "matmul_rate.py", self.model, shared, scored, self.args.precision, output)
        return Machine.read(output)


def call(folder: Path, script: Path, *arguments: object, limit: float | None = None) -> None:
    """Run a script to its end; output and caches go to `folder`, so it finds nothing of earlier runs.

    Raises:
        RunFailed: the script failed.
        TimedOut: it took longer than `limit` seconds, and was killed with all that it had started.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "PYTHONPATH": os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    log = folder / "log.txt"
    command = [sys.executable, str(script), *map(str, arguments)]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        reason = f"stopped after {limit:.0f} s"
        raise TimedOut(f"{script.name}: {reason}", reason) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code:
        text = log.read_text(errors="replace").strip()
        reason = text.splitlines()[-1][:150] if code > 0 and text else f"killed by signal {-code}"
        raise RunFailed(f"{script.name} ended with exit code {code}:\n{text[-4000:]}", reason)


def benches(args: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Bench]]:
    """Make or read the model and the pairs; yield a bench for each ratio, after a line that names it."""
    model, old, pairs = args.model or scratch / "model", old_checkout(args.against, scratch), scratch / "pairs.jsonl"
    if args.model is None:
        call(scratch, HERE / "common.py", model, args.seed, args.size)
    if args.pairs:
        lines = args.pairs.read_text(encoding="utf-8").splitlines(keepends=True)[: args.num_pairs]
        if len(lines) < args.num_pairs:
            sys.exit(f"--pairs {args.pairs} has {len(lines)} pairs: lower --num-pairs {args.num_pairs}")
        pairs.write_text("".join(lines), encoding="utf-8")
        yield "", Bench(args, scratch, model, pairs, old)
        return
    for ratio in args.ratios or [None]:
        prompt, completion = split(ratio, args.length) if ratio else (MEAN_PROMPT, MEAN_COMPLETION)
        make_pairs(pairs, args.num_pairs, args.seed, prompt=prompt, completion=completion, spread=args.spread)
        name = f"prompts of {prompt} tokens, completions of {completion}"
        yield name if ratio else "", Bench(args, Path(tempfile.mkdtemp(dir=scratch)), model, pairs, old)


def split(ratio: str, length: int) -> tuple[int, int]:
    """Tokens of a prompt and of a completion: `split("4:1", 1000) == (800, 200)`."""
    prompt, completion = map(int, ratio.split(":"))
    scored = round(length * completion / (prompt + completion))
    return length - scored, scored


def old_checkout(against: str | None, scratch: Path) -> Path | None:
    """Return the checkout that `--against` names: a folder, or a git revision, which is unpacked into `scratch`."""
    if against is None:
        return None
    folder = Path(against).resolve()
    if not folder.is_dir():
        folder = scratch / "old"
        folder.mkdir()
        archive = subprocess.run(["git", "archive", against], cwd=HERE.parent, capture_output=True, check=False)
        if archive.returncode:
            sys.exit(f"--against {against}: neither a folder nor a git revision ({archive.stderr.decode().strip()})")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    if not (folder / "benchmarks" / "notus_side.py").is_file():
        sys.exit(f"--against {against}: has no benchmarks/notus_side.py")
    return folder


def compare(bench: Bench) -> Comparison:
    """Run every side for every number of epochs, round by round; in each round another side begins."""
    args = bench.args
    not_run = {side: why for side in args.sides if (why := missing(side))}
    sides = [side for side in args.sides if side not in not_run]
    options = {(side, epochs): bench.options(side, epochs) for side in sides for epochs in args.epochs}
    found = trl_search.tried(bench.search, args.epochs) if "trl-fastest" in sides else []
    if None in options.values():
        sides, not_run["trl-fastest"] = [side for side in sides if side != "trl-fastest"], "no configuration works"
    if not sides:
        sys.exit(f"nothing can run here: {not_run}")
    runs: list[Measured] = []
    machines: list[Machine] = []
    for turn in range(args.repeats):
        for epochs in args.epochs:
            runs += [bench.run(side, epochs, options[side, epochs] or {}) for side in rotated(sides, turn)]
            machines.append(bench.machine(runs[0].outcome.tokens))
    return Comparison(runs, machines, args.num_pairs, args.batch_size, not_run, found)


def rotated(sides: list[str], turn: int) -> list[str]:
    """Return the order of a round, so that no side always goes first: `rotated(["a", "b"], 1) == ["b", "a"]`."""
    start = turn % len(sides)
    return sides[start:] + sides[:start]


def kept(name: str, comparison: Comparison, shown: str) -> dict[str, Any]:
    """What the results keep: the table and every outcome, without token digests, which only the check needs."""
    found = {"name": name, "table": shown.splitlines(), **dataclasses.asdict(comparison)}
    for run in found["runs"]:
        del run["outcome"]["tokens"]
    return found


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run at hand ends too
    results, faults = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name, bench in benches(args, Path(scratch)):
            comparison = compare(bench)
            shown = table(comparison, args.precision)
            if comparison.tried:
                shown = f"{trl_search.table(comparison.tried, args.epochs)}\n\n{shown}"
            print(f"{name}\n{shown}\n" if name else shown, flush=True)
            results.append(kept(name, comparison, shown))
            faults += check_tokens(comparison, args.max_length) + check_losses(comparison, args.tolerance)
    if args.results:
        settings = {name: value for name, value in vars(args).items() if name != "results"}
        found = {"shapes": results} if args.ratios else results[0]
        write_json(args.results, {"settings": settings, **found})
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
