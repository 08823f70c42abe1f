"""One command to check a GPU: is what it computes right, how fast is it, and where does the time go.

    python benchmarks/gpu.py [--minutes 8] [--output FILE.json]
    python benchmarks/gpu.py --cpu        # the same code on a toy model, in a minute or two

Needs torch, transformers, safetensors, numpy and this project alone; TRL is measured beside it where it is installed.
Ends with exit code 1 if a comparison is out of tolerance, or if a row failed for another reason than memory or time.
benchmarks/README.md says what is measured and how.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch: rows of different lengths would leave holes that nothing fits into.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import MistralConfig

import gpu_device
from gpu_parity import parity
from gpu_peers import measure_peer, trl_is_here
from gpu_report import markdown
from gpu_rows import Clock, guarded, measure, plan, recompiles, release
from gpu_shapes import CPU, GPU, Scale, fitting
from notus.training.distributed import process_group

# Steps of a row may take this share of the time that there is for everything.
SHARE_PER_ROW = 1 / 60
# The peers come after the rows that they are held against.
PEERS_AFTER = 5
PEERS = {
    "transformers": "transformers' own forward in a plain loop, padded, checkpointing full",
    "trl": "TRL, reference given, padded, checkpointing full",
}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = _parse(arguments)
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    clock = Clock(options.minutes)
    with process_group() as device:
        seconds = 60 * options.minutes * SHARE_PER_ROW if device.type == "cuda" else 0.0
        found = check(device, clock, seconds, options.output)
    print(markdown(found), flush=True)
    failed = [row["name"] for row in found["rows"] if row["status"].startswith("failed")]
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return int(bool(failed) or not found["parity"]["passed"])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="when to stop beginning further rows")
    parser.add_argument("--output", type=Path, help="JSON file, written again after each row")
    parser.add_argument("--cpu", action="store_true", help="a toy model on the CPU, as without a GPU")
    return parser.parse_args(arguments)


def check(device: torch.device, clock: Clock, seconds: float, output: Path | None) -> dict[str, Any]:
    """Everything, in order of importance; what has been found so far is in `output` at any time.

    Args:
        device: where.
        clock: how much time there is.
        seconds: that the timed steps of a row may take.
        output: JSON file.
    """
    cuda = device.type == "cuda"
    scale = GPU if cuda else CPU
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else None
    report: dict[str, Any] = {"hardware": gpu_device.describe(device), "rows": []}
    report["parity"] = _parity(device)
    report |= _rates(fitting(scale, memory, lora=False)[1], scale, device)
    _write(report, output)
    basis = report["peak"] or report["matmul_flops_per_second"]
    for name, measurement in _plan(scale, device, seconds, memory):
        print(name, file=sys.stderr, flush=True)
        found = guarded(clock, name, device, measurement)
        for rate, share in (("necessary", "mfu"), ("done", "hardware_utilisation")):
            if f"{rate}_flops_per_second" in found:
                found[share] = found[f"{rate}_flops_per_second"] / basis
        report["rows"].append(found)
        _write(report, output)
    return report


def _parity(device: torch.device) -> dict[str, Any]:
    checks = parity(device)
    release(device)
    return {
        "passed": all(check.passed for check in checks),
        "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in checks],
    }


def _rates(config: MistralConfig, scale: Scale, device: torch.device) -> dict[str, float | None]:
    found = {
        "peak": gpu_device.peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
        "matmul_flops_per_second": gpu_device.matmul_rate(config, scale.tokens_per_row["full"], device),
        "bytes_per_second": gpu_device.bandwidth(device),
    }
    release(device)
    return found


def _plan(
    scale: Scale, device: torch.device, seconds: float, memory: int | None
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and measurement of each row, the most important first. Compiling a toy on a CPU would take a minute."""
    compiles = device.type == "cuda"
    planned = [row for row in plan(rank=64 if compiles else 8) if compiles or not row.compile]
    peers = ["transformers", *(["trl"] if trl_is_here() else [])]
    for place, row in enumerate(planned):
        if place == PEERS_AFTER:
            for peer in peers:
                name = f"DPO full, {PEERS[peer]}"
                yield name, functools.partial(measure_peer, peer, scale, device, seconds, memory)
            if compiles:
                yield "recompiles", functools.partial(recompiles, scale, device)
        yield row.name, functools.partial(measure, row, scale, device, seconds, memory)


def _write(report: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
