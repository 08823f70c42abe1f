"""Notus beside TRL: the same model, pairs, batches and order, each run in a process of its own.

    pip install -r requirements.txt -r requirements-bench.txt
    python benchmarks/vs_trl.py [--model FOLDER --pairs FILE.jsonl] [--results FILE.json]
    python benchmarks/vs_trl.py --sides notus --size 100m --num-pairs 32 --epochs 1

Prints pairs per second (the reference pass counted), those of the steps after the first alone ("steady"), peak
memory, the ratios, and how much of the machine's own matmul rate the necessary arithmetic came to. Ends with
exit code 1 if the sides saw other tokens, or if their losses differ by more than the tolerance.
benchmarks/README.md says what is counted and how.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, installed or not

from job import Job, Machine, Outcome
from report import Comparison, Measured, check_losses, check_tokens, table
from synthetic_pairs import make_pairs

HERE = Path(__file__).resolve().parent
# `trl` is TRL as it comes; its loss is always fused with the head (log-probs in tiles, no logits). `trl-best` has each
# option that makes it faster on such pairs without changing what is learned or in which order: one pair at a time
# leaves the least padding. `trl-liger` has Liger's fused layers as well. Short rows save Notus memory and cost nothing.
PRECOMPUTED: dict[str, object] = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
OPTIONS: dict[str, dict[str, object]] = {
    "notus": {},
    "trl": {},
    "trl-precomputed": PRECOMPUTED,
    "trl-best": {**PRECOMPUTED, "per_device_train_batch_size": 1, "precompute_ref_batch_size": 1},
    "trl-liger": {**PRECOMPUTED, "use_liger_kernel": True},
}
# The largest difference of two losses at the same step. In bf16 each side rounds its log-probs in its own way, and
# beta times that is in the loss; 1.2e-3 was seen over six steps of the made pairs.
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}


def missing(side: str) -> str | None:
    """Why a side cannot run here; torch stays out of this process, so CUDA is known by its device file."""
    if side == "trl-liger":
        if not Path("/dev/nvidiactl").exists():
            return "Liger's kernels need CUDA"
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
    return None


def parser_of_both(description: str) -> argparse.ArgumentParser:
    """What `vs_trl.py` and `vs_trl_sweep.py` both take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--precision", choices=list(TOLERANCE), default="fp32")
    parser.add_argument("--size", choices=["15m", "100m", "1b"], default="15m", help="of the made model")
    parser.add_argument("--tolerance", type=float, help="largest difference of two losses (fp32: 1e-3, bf16: 1e-2)")
    parser.add_argument("--repeats", type=int, default=1, help="how often everything runs, in turns")
    parser.add_argument("--sides", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--seed", type=int, default=0, help="of the made model and pairs")
    parser.add_argument("--results", type=Path, help="write everything measured to this JSON file")
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = parser_of_both("Notus beside TRL: see the head of this file.")
    parser.add_argument("--model", type=Path, help="model folder (default: made here, 15.6M parameters)")
    parser.add_argument("--pairs", type=Path, help="JSONL of prompt, chosen, rejected as strings (default: made here)")
    parser.add_argument("--num-pairs", type=int, default=128, help="to make, or to take from --pairs")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3], help="one run per side and number")
    parser.add_argument("--learning-rate", type=float, default=5e-7)
    parser.add_argument("--max-length", type=int, default=1024, help="a pair longer than this is an error")
    args = parser.parse_args()
    if args.num_pairs % args.batch_size:
        parser.error(f"--num-pairs {args.num_pairs} is no multiple of --batch-size {args.batch_size}")
    args.tolerance = args.tolerance or TOLERANCE[args.precision]
    return args


@dataclass(frozen=True)
class Bench:
    """Where the processes run, and with what."""

    args: argparse.Namespace
    scratch: Path
    model: Path
    pairs: Path
    tokens_per_row: int = 1280

    def run(self, side: str, epochs: int) -> Outcome:
        """One run of one side."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        args = self.args
        job = Job(
            model=str(self.model),
            pairs=str(self.pairs),
            scratch=str(folder / "run"),
            batch_size=args.batch_size,
            epochs=epochs,
            precision=args.precision,
            learning_rate=args.learning_rate,
            max_length=args.max_length,
            options={"tokens_per_row": self.tokens_per_row} if side == "notus" else OPTIONS[side],
        )
        job.write(folder / "job.json")
        script = "notus_side.py" if side == "notus" else "trl_side.py"
        call(folder, script, folder / "job.json", folder / "outcome.json")
        return Outcome.read(folder / "outcome.json")

    def machine(self, tokens: list[list[int]]) -> Machine:
        """The matmul rate now, with as many tokens as a step has."""
        steps = self.args.num_pairs / self.args.batch_size
        shared, scored = (round(sum(sum(row[start:3]) for row in tokens) / steps) for start in (0, 1))
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        output = folder / "machine.json"
        call(folder, "matmul_rate.py", self.model, shared, scored, self.args.precision, output)
        return Machine.read(output)


def call(folder: Path, script: str, *arguments: object) -> None:
    """Run a script to its end; output and caches go to `folder`, so it finds nothing of earlier runs."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    log = folder / "log.txt"
    with log.open("w") as file:
        command = [sys.executable, str(HERE / script), *map(str, arguments)]
        process = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if code := process.returncode:
        sys.exit(f"{script} ended with exit code {code}:\n{log.read_text()[-4000:]}")


def prepare(args: argparse.Namespace, scratch: Path) -> Bench:
    """The model and the first `num_pairs` pairs."""
    model, pairs = scratch / "model", scratch / "made.jsonl"
    if args.model is None or args.pairs is None:
        call(scratch, "synthetic_setup.py", model, args.seed, args.size)
        make_pairs(pairs, args.num_pairs, args.seed)
    lines = (args.pairs or pairs).read_text().splitlines()[: args.num_pairs]
    if len(lines) < args.num_pairs:
        sys.exit(f"{args.pairs} has {len(lines)} pairs: lower --num-pairs {args.num_pairs}")
    (scratch / "pairs.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return Bench(args, scratch, args.model or model, scratch / "pairs.jsonl")


def able(sides: list[str]) -> tuple[list[str], dict[str, str]]:
    """The sides that can run here, and why the others cannot."""
    not_run = {side: why for side in sides if (why := missing(side))}
    if len(not_run) == len(sides):
        sys.exit(f"nothing can run here: {not_run}")
    return [side for side in sides if side not in not_run], not_run


def run_sides(bench: Bench, sides: list[str], epochs: int) -> list[Measured]:
    """Each side once."""
    runs = []
    for side in sides:
        outcome = bench.run(side, epochs)
        print(f"{side}, epochs: {epochs}, seconds: {outcome.seconds:.1f}", file=sys.stderr)
        runs.append(Measured(side, epochs, outcome))
    return runs


def compare(bench: Bench) -> Comparison:
    """Run every side for every number of epochs, the sides taking turns."""
    sides, not_run = able(bench.args.sides)
    runs: list[Measured] = []
    machines: list[Machine] = []
    for _ in range(bench.args.repeats):
        for epochs in bench.args.epochs:
            runs += run_sides(bench, sides, epochs)
            machines.append(bench.machine(runs[0].outcome.tokens))
    return Comparison(runs, machines, bench.args.num_pairs, bench.args.batch_size, not_run)


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """What a result follows from: not where it is written."""
    return {name: value for name, value in vars(args).items() if name not in ("results", "plot", "stored")}


def write_results(path: Path, args: argparse.Namespace, comparison: Comparison, shown: str) -> None:
    """The table, the settings and every outcome; token digests, which only the check needs, are left out."""
    results = {"table": shown.splitlines(), "settings": settings_of(args), **dataclasses.asdict(comparison)}
    for run in results["runs"]:
        del run["outcome"]["tokens"]
    path.write_text(json.dumps(results, indent=1, default=str) + "\n")


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        comparison = compare(prepare(args, Path(scratch)))
    shown = table(comparison, args.precision)
    print(shown)
    if args.results:
        write_results(args.results, args, comparison, shown)
    faults = check_tokens(comparison, args.max_length) + check_losses(comparison, args.tolerance)
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
