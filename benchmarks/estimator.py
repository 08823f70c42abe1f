"""The estimator beside PyTorch's own trackers, on the real step with fake tensors: bytes and operations.

    python benchmarks/estimator.py [--shape 7b] [--world-size 1] [--output FILE]

Needs no GPU and no weights; a 7B shape takes minutes, for the trackers look at every operation.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, installed or not

from fake_step import TARGETS, Tracked, tracked_step
from notus.estimate.inputs import Lengths
from notus.estimate.plan import arithmetic
from notus.model.flops import dimensions, visible_pairs
from notus.model.lora import inject_lora
from notus.model.size import ModelSize, model_size
from notus.training.memory_estimate import CHECKPOINTING, Footprint, Job, moments

SHAPES = {
    "mid": {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4,
            "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "sliding_window": None},
    "7b": {"sliding_window": None},
}  # fmt: skip
ROWS = {"mid": (176, [300, 280], 5), "7b": (176, [300, 280], 10)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of run: "full" or a LoRA of a rank, and the dials."""

    rank: int
    checkpointing: str
    optimizer: str
    optimizer_dtype: str = "fp32"

    def __str__(self) -> str:
        return f"{f'LoRA {self.rank}' if self.rank else 'full':<8} {self.checkpointing:<9} {self.optimizer:<7}"


def cases(rank: int = 16) -> list[Case]:
    """Full and LoRA, each checkpointing mode, each optimizer."""
    return [Case(*each) for each in itertools.product((0, rank), CHECKPOINTING, ("rmsprop", "adamw"))]


def size_of(config: PreTrainedConfig, rank: int) -> ModelSize:
    """The sizes of a model with adapters as the tracked one has them."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if rank:
        inject_lora(causal_lm, rank=rank, alpha=16.0, dropout=0.0, target_modules=TARGETS)
    return model_size(causal_lm)


def job_of(case: Case, row: tuple[int, list[int], int], world_size: int = 8, **options: object) -> Job:
    """The estimator's view of a tracked step."""
    trunk, branches, examples = row
    tokens = examples * (trunk + sum(branches))
    return Job(
        shard_size=world_size,
        tokens_per_row=tokens,
        scored_per_row=examples * sum(branches),
        optimizer=case.optimizer,
        optimizer_dtype=case.optimizer_dtype,
        activation_checkpointing=case.checkpointing,
        key_ratio=examples * (len(branches) * trunk + sum(branches)) / tokens,
        **options,
    )


def compare(
    case: Case, config: PreTrainedConfig, row: tuple[int, list[int], int], *, world_size: int = 8
) -> tuple[Footprint, Footprint, Tracked]:
    """(estimate of the rows, of the update, what the trackers saw)."""
    seen = tracked_step(
        config,
        world_size=world_size,
        row=row,
        optimizer=case.optimizer,
        optimizer_dtype=case.optimizer_dtype,
        lora_rank=case.rank,
        activation_checkpointing=case.checkpointing,
    )
    *rows, update = moments(size_of(config, case.rank), job_of(case, row, world_size))
    return max(rows, key=lambda moment: moment.total), update, seen


def flops_ratio(case: Case, config: PreTrainedConfig, row: tuple[int, list[int], int], seen: int) -> float:
    """Estimated operations of a row's matrix products, recomputation included, attention left out, over those that
    `FlopCounterMode` counted."""
    trunk, branches, examples = row
    lengths = Lengths(np.array([trunk]), np.array([branches]), "one")
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    size = dimensions(causal_lm)
    work = arithmetic(size_of(config, case.rank), size, lengths, case.checkpointing)
    pairs = visible_pairs(lengths.trunks, lengths.branches).item()
    passes = 4 if case.checkpointing == "full" else 3  # a backward pass is two
    attention = passes * 4 * size.layers * size.attention_width * pairs
    return examples * (work.hardware - attention) / seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--world-size", type=int, default=8, help="fake ranks (default: 8)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config, row = MistralConfig(**SHAPES[args.shape]), ROWS[args.shape]
    titles = f"{'case':<26} {'estimate':>10} {'tracker':>10} {'ratio':>6}"
    lines = [f"{titles}   update: estimate, tracker   operations   peak at (MiB, ratios)"]
    for case in cases(64 if args.shape == "7b" else 16):
        rows, update, seen = compare(case, config, row, world_size=args.world_size)
        whole, flops = max(rows.total, update.total), flops_ratio(case, config, row, seen.flops)
        lines.append(
            f"{case} {whole / 2**20:>10.1f} {seen.peak / 2**20:>10.1f} {whole / seen.peak:>6.3f}   "
            f"{update.total / 2**20:>10.1f} {seen.optimizer_peak / 2**20:>10.1f} {flops:>12.3f}   {rows.moment}"
        )
        print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
