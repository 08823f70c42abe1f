"""How time and memory of a DPO step grow: `python benchmarks/scale_growth.py [pairs length vocabulary model ranks]`.

One quantity at a time is doubled or more; the others stay at those of the base point. Every point is a process of its
own, or two joined by gloo, with one thread each. The pairs are random tokens, all of one length; the policy is dealt,
packed and trained by the trainer's own parts, and its reference log-probs are made up. Memory is the largest resident
set during the steps, less what the imports alone take; with two ranks, that of the larger one.
"""

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from notus.data.dataset import Rows

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4  # the first one warms up


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
class Step:
    """What a rank measured: parameters of the model, seconds of the median step, MiB, and necessary operations."""

    parameters: int
    seconds: float
    peak_mib: float
    flops: float


def measure(point: Point, folder: Path) -> Step:
    """Train a few steps at a point; a rank's part."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import AutoConfig

    from memory import PeakMemory
    from notus.data.schedule import StepPlan
    from notus.runtime.distributed import process_group
    from notus.training.dataloader import Dataloader, row_costs
    from notus.training.optimizers import build_optimizer, clip_gradients, gradient_norm, local_gradients
    from notus.training.parallelize import build_policy

    torch.set_num_threads(1)
    with process_group() as device:
        rows = _rows(point)
        memory = PeakMemory()
        policy = build_policy(folder, AutoConfig.from_pretrained(folder), device=device, precision="fp32")
        optimizer = build_optimizer(policy.parameters(), name="rmsprop", learning_rate=1e-6, weight_decay=0.0)
        plan, costs = StepPlan(len(rows), point.pairs), row_costs(policy, rows)
        seconds = []
        with Dataloader(rows, costs, plan, range(STEPS), tokens_per_row=3 * 4 * 64, device=device) as feed:
            for _ in range(STEPS):
                began = time.perf_counter()
                for batch, _ in feed.step():
                    _loss(policy(batch), point.pairs).backward()
                gradients = local_gradients(policy.parameters())
                clip_gradients(gradients, gradient_norm(gradients, torch.zeros(0))[0], 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                seconds.append(time.perf_counter() - began)
        parameters = sum(parameter.numel() for parameter in policy.parameters())
        flops = 3 * float(costs[: point.pairs].sum())
        return Step(parameters, statistics.median(seconds[1:]), memory.peak_mib() - memory.baseline_mib, flops)


def _loss(logps: "Tensor", pairs: int) -> "Tensor":
    """The step's share of the sigmoid loss; the reference is the policy itself, so it is ln 2 throughout."""
    from notus.losses import dpo_loss

    chosen, rejected = logps.unbind(1)
    losses, _, _ = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach())
    return losses.sum() / pairs


def _rows(point: Point) -> "Rows":
    import datasets

    from notus.data.dataset import FEATURES, Rows

    count, length = point.pairs * STEPS, point.length
    ids = np.random.default_rng(0).integers(3, point.vocabulary, size=(count, 3, length))
    columns = {"trunk": ids[:, 0], "branches": ids[:, 1:], "loss_mask": np.ones((count, 2, length), dtype=int)}
    lists = {name: column.tolist() for name, column in columns.items()}
    return Rows(datasets.Dataset.from_dict(lists, features=FEATURES))


def make_model(point: Point, folder: Path) -> None:
    """Write a randomly initialised Mistral of the point's width and vocabulary to `folder`."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=point.vocabulary,
        hidden_size=point.width,
        intermediate_size=3 * point.width,
        num_hidden_layers=max(1, point.width // 64),
        num_attention_heads=point.width // 32,
        num_key_value_heads=point.width // 64,
        head_dim=32,
        max_position_embeddings=4096,
        sliding_window=None,
        tie_word_embeddings=False,
    )
    MistralForCausalLM(config).save_pretrained(folder)


def run_point(point: Point, folder: Path) -> Step:
    """Measure a point in processes of its own."""
    described = json.dumps(dataclasses.asdict(point))
    command = [sys.executable, __file__, "--point", described, "--folder", str(folder)]
    subprocess.run([*command, "--make"], check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(point.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(point.ranks)
    ]
    told = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{point}: a rank failed")
    steps = [Step(**json.loads(text.splitlines()[-1])) for text in told]
    return dataclasses.replace(steps[0], peak_mib=max(step.peak_mib for step in steps))


def table(results: dict[str, list[tuple[Point, Step]]]) -> str:
    """The results as Markdown."""
    lines = [
        "| grows | pairs | tokens of a pair | vocabulary | parameters | ranks | ms per step | peak MiB | GFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for axis, points in results.items():
        for point, step in points:
            cells = [
                axis, str(point.pairs), str(3 * point.length), f"{point.vocabulary:,}",
                f"{step.parameters / 1e6:.1f}M", str(point.ranks), f"{1e3 * step.seconds:,.0f}",
                f"{step.peak_mib:,.0f}", f"{step.flops / step.seconds / 1e9:.1f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("axes", nargs="*", default=list(AXES), help=f"some of {', '.join(AXES)}")
    parser.add_argument("--results", type=Path, help="write what was measured to this JSON file")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_model(Point(**args.point), args.folder)
    elif args.point:
        print(json.dumps(dataclasses.asdict(measure(Point(**args.point), args.folder))))
    else:
        results: dict[str, list[tuple[Point, Step]]] = {}
        for axis in args.axes:
            with tempfile.TemporaryDirectory() as folder:
                results[axis] = [(point, run_point(point, Path(folder))) for point in AXES[axis]]
        print(table(results))
        if args.results:
            found = [
                {"axis": axis, **dataclasses.asdict(point), **dataclasses.asdict(step)}
                for axis, points in results.items()
                for point, step in points
            ]
            args.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
