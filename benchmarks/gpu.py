"""One command to check a GPU: is what it computes right, how fast is it, and where does the time go.

    python benchmarks/gpu.py [--minutes 8] [--output FILE.json] [--rows PATTERN ...] [--without NAME,...]
    python benchmarks/gpu.py --cpu        # the same code on a toy model, in a minute or two

Needs torch, transformers, safetensors, numpy and this project alone. TRL is measured too where it is installed.
Exits with code 1 if a comparison is out of tolerance, or if a row failed for another reason than memory or time.
benchmarks/README.md says what is measured and how.

This process only supervises. It imports no torch and holds no GPU memory, so no CUDA error can take it down. One worker
process compares, another one measures; both write each result into the output file at once. If a worker dies or hangs,
what it was doing counts as failed, and a new worker goes on with the rest.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_report
from notus.runtime.switches import OPTIMISATIONS, disabled_names

STAGES = ("parity", "rows")
WORKER = (sys.executable, __file__)
# Seconds. A worker that writes nothing for so long hangs: starting, one comparison, one row with its compilation.
SILENCE = {"parity": 120.0, "rows": 300.0}
# Comparisons may take this share of the time, but not less than so many seconds.
PARITY_SHARE, LEAST_PARITY_SECONDS = 0.3, 120.0
# After the end, a row may take this long to finish.
GRACE = 40.0
ENVIRONMENT = {
    # Rows of different lengths would leave holes that nothing fits into.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # A new worker finds what an earlier one compiled.
    "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"notus-inductor-{os.getuid()}"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Supervise, or work for a supervisor. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(words)
    try:
        options.without = tuple(sorted({*options.without, *disabled_names()}))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return gpu_report.USAGE
    if options.worker is not None:
        from gpu_worker import work

        return work(options)
    output = options.output or Path(tempfile.mkdtemp(prefix="notus-gpu-")) / "report.json"
    return supervise(words, options, output)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="when to stop beginning further rows")
    parser.add_argument("--output", type=Path, help="JSON file, written again after each result")
    parser.add_argument("--cpu", action="store_true", help="a toy model on the CPU, as without a GPU")
    parser.add_argument("--only", choices=STAGES, help="the comparisons alone, or the rows alone")
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="PATTERN", help="rows whose name is, contains or matches (*, ?) this"
    )
    parser.add_argument(
        "--without", type=_names, default=(), metavar="NAME,...", help="optimisations to switch off in every row"
    )
    parser.add_argument("--worker", type=float, metavar="END", help=argparse.SUPPRESS)  # seconds since the epoch
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.only == "parity" and options.rows and options.worker is None:
        parser.error("--rows has no effect with --only parity: remove one of them")
    return options


def _names(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    if unknown := sorted(set(names) - OPTIMISATIONS.keys()):
        raise argparse.ArgumentTypeError(f"no optimisation is called {unknown[0]!r}; names: {', '.join(OPTIMISATIONS)}")
    return names


# ---- the supervisor ----


def supervise(words: Sequence[str], options: argparse.Namespace, output: Path) -> int:
    """Run the stages and print what was found, even if a signal ends it early. Returns the exit code."""
    began = time.time()
    end = began + 60 * options.minutes
    previous = output.with_suffix(".previous.json")
    if output.exists():
        output.replace(previous)
    gpu_report.write({**gpu_report.EMPTY, "command": list(words), "without": list(options.without)}, output)
    with contextlib.suppress(_Ended), _signals():
        for stage in STAGES if options.only is None else (options.only,):
            limit = max(LEAST_PARITY_SECONDS, PARITY_SHARE * 60 * options.minutes)
            until = began + limit if stage == "parity" and not options.cpu else end
            command = [*WORKER, *words, "--output", str(output), "--only", stage, "--began", str(began)]
            if _run_stage([*command, "--worker", str(until)], stage, until, output, options.cpu) == gpu_report.USAGE:
                output.unlink()
                if previous.exists():
                    previous.replace(output)
                return gpu_report.USAGE
    report = gpu_report.read(output)
    print(f"{gpu_report.markdown(report)}\n\nEverything measured: {output}", flush=True)
    for failure in gpu_report.failures(report):
        print(f"failed: {failure}", file=sys.stderr)
    return int(bool(gpu_report.failures(report)))


class _Ended(Exception):
    """A signal asked for the end."""


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT raise `_Ended`, so that what was found is printed."""

    def end(number: int, _: Any) -> None:
        raise _Ended(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_stage(command: Sequence[str], stage: str, until: float, output: Path, cpu: bool) -> int:
    """Start workers until one is done. Returns 0, or the exit code of a worker that got no further."""
    while True:
        begun = len(gpu_report.read(output)["begun"])
        code, reason = _run_worker(command, stage, until, output, cpu)
        if code in (0, gpu_report.USAGE):
            return code
        report, out_of_time = gpu_report.read(output), time.time() > until
        stuck = len(report["begun"]) == begun and not out_of_time
        gpu_report.add_death(report, f"{stage}: {reason}", out_of_time=out_of_time, stuck=stuck)
        gpu_report.write(report, output)
        print(f"{stage}: {reason}", file=sys.stderr, flush=True)
        if stuck or out_of_time:
            return code


def _run_worker(command: Sequence[str], stage: str, until: float, output: Path, cpu: bool) -> tuple[int, str]:
    """(exit code, what to say of it) of one worker; it is killed if it hangs, and when the time is over."""
    environment = {**ENVIRONMENT, **os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})}
    os.utime(output)
    # The worker sees the end of its input when this process ends, and ends too.
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    reason = ""
    try:
        while worker.poll() is None and not reason:
            time.sleep(0.1)
            silent = time.time() - output.stat().st_mtime
            if silent > SILENCE[stage]:
                reason = f"the process was stopped: it did nothing for {silent:.0f} s"
            elif time.time() > until + GRACE:
                reason = "the process was stopped: the time is over"
    finally:
        worker.kill()
        code = worker.wait()
    return code, reason or f"the process ended with exit code {code}"


if __name__ == "__main__":
    raise SystemExit(main())
