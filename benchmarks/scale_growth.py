"""How time and memory of a DPO step grow: `python benchmarks/scale_growth.py [pairs length vocabulary model ranks]`.

One quantity at a time is doubled or more; the others stay at those of the base point. Every point is a process of its
own, or two joined by gloo, with one thread each. The pairs are random tokens, all of one length; the step is that of
step.py, in fp32. Memory is the largest resident set during the steps, less what the imports alone take; with two ranks,
that of the larger one.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import PeakMemory, markdown, write_json

STEPS = 4  # the first one warms up
TOKENS_PER_ROW = 768


@dataclasses.dataclass(frozen=True)
class Point:
    """What a step is like.

    Attributes:
        pairs: of a step.
        length: tokens of a pair's prompt, and of each of its completions.
        vocabulary: of the model.
        width: of the model; its layers grow with it.
        ranks: processes.
    """

    pairs: int = 8
    length: int = 64
    vocabulary: int = 2000
    width: int = 256
    ranks: int = 1


AXES = {
    "pairs": [Point(pairs=count) for count in (8, 16, 32)],
    "length": [Point(length=count) for count in (64, 128, 256)],
    "vocabulary": [Point(vocabulary=count) for count in (2_000, 8_000, 32_000)],
    "model": [Point(width=count) for count in (128, 256, 512)],
    "ranks": [Point(pairs=16, ranks=count) for count in (1, 2)],
}


@dataclasses.dataclass
class Growth:
    """What a rank measured: parameters of the model, seconds of the median step, MiB, and necessary operations."""

    parameters: int
    seconds: float
    peak_mib: float
    flops: float


def measure(point: Point) -> Growth:
    """Train a few steps at a point; a rank's part."""
    import numpy as np
    import torch
    from transformers import MistralConfig

    from notus.runtime.distributed import process_group, rank
    from step import Step, build, random_example, rows

    config = MistralConfig(
        vocab_size=point.vocabulary, hidden_size=point.width, intermediate_size=3 * point.width, head_dim=32,
        num_hidden_layers=max(1, point.width // 64), num_attention_heads=point.width // 32,
        num_key_value_heads=point.width // 64, max_position_embeddings=4096, sliding_window=None,
    )  # fmt: skip
    torch.set_num_threads(1)
    generator, seconds = np.random.default_rng(0), []
    with process_group() as device:
        memory = PeakMemory()
        policy, work = build(config, device, precision="fp32")
        step = Step(policy, "dpo", point.vocabulary)
        for _ in range(STEPS):
            examples = [random_example(generator, point.vocabulary, *[point.length] * 3) for _ in range(point.pairs)]
            began = time.perf_counter()
            step(rows("shared", examples, TOKENS_PER_ROW, 0, rank(), point.ranks))
            seconds.append(time.perf_counter() - began)
        parameters = sum(parameter.numel() for parameter in policy.parameters())
        peak = memory.peak_mib() - memory.baseline_mib
        return Growth(parameters, statistics.median(seconds[1:]), peak, work.necessary(examples))


def run_point(point: Point) -> Growth:
    """Measure a point in processes of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.ranks}"]
    command = [*launcher, __file__, "--point", json.dumps(dataclasses.asdict(point))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    ranks = [Growth(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    return dataclasses.replace(ranks[0], peak_mib=max(each.peak_mib for each in ranks))


def table(results: dict[str, list[tuple[Point, Growth]]]) -> str:
    """The results as Markdown."""
    heads = (
        "grows",
        "pairs",
        "tokens of a pair",
        "vocabulary",
        "parameters",
        "ranks",
        "ms per step",
        "peak MiB",
        "GFLOP/s",
    )
    return markdown(
        heads,
        [
            (
                axis, point.pairs, 3 * point.length, f"{point.vocabulary:,}", f"{found.parameters / 1e6:.1f}M",
                point.ranks, f"{1e3 * found.seconds:,.0f}", f"{found.peak_mib:,.0f}",
                f"{found.flops / found.seconds / 1e9:.1f}",
            )
            for axis, points in results.items()
            for point, found in points
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("axes", nargs="*", default=list(AXES), help=f"some of {', '.join(AXES)}")
    parser.add_argument("--results", type=Path, help="write what was measured to this JSON file")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(dataclasses.asdict(measure(Point(**args.point)))), flush=True)
        return
    results = {axis: [(point, run_point(point)) for point in AXES[axis]] for axis in args.axes}
    print(table(results))
    if args.results:
        found = [(axis, *pair) for axis, points in results.items() for pair in points]
        write_json(args.results, [{"axis": axis, **vars(point), **vars(growth)} for axis, point, growth in found])


if __name__ == "__main__":
    main()
