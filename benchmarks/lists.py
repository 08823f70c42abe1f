"""What a list of rated answers costs beside pairs: a prompt as one pair, as all pairs of its answers, as one list.

    python benchmarks/lists.py [--size 15m] [--prompts 4] [--repeats 5] [--output FILE]

Measured: a made model on the CPU, one thread, fp32. Lengths are UltraFeedback's (`notus.estimate.sizes.TYPICAL_LIST`).
The three ways take turns in one process, and each round begins with another. What counts is the processor time of the
process, which other work on the machine does not enter; tables have the median of the rounds, and ratios are those of
the same round. Timed are the reference pass and, apart from it, forward pass, loss and backward pass of a step's packed
rows. The optimizer's update is left out, since it is the same whatever a step holds.

Estimated: a 7B model trained in full on 8 GPUs by `notus.estimate`, at its assumed share of the peak.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import MistralForCausalLM

import common
import step
from notus.data.packing import Batch, Example, collate
from notus.estimate.plan import Plan, Setting, make_plan
from notus.estimate.sizes import TYPICAL_LIST, Lengths, draw, find_config, sizes
from notus.losses import find_loss, list_loss, pair_loss
from notus.model.attention import IMPLEMENTATION
from notus.model.flops import find_gpu
from notus.model.fused import fuse
from notus.model.policy import Policy

COMPLETIONS = len(TYPICAL_LIST) - 1
PAIRS = tuple(itertools.combinations(range(COMPLETIONS), 2))
MAX_LENGTH, MAX_PROMPT_LENGTH = 2048, 1024
# name: the completions that each row of a prompt has, best first
WAYS: dict[str, tuple[tuple[int, ...], ...]] = {
    "one pair, best and worst": ((0, COMPLETIONS - 1),),
    f"all {len(PAIRS)} pairs": PAIRS,
    f"one list of {COMPLETIONS}": (tuple(range(COMPLETIONS)),),
}
ONE_PAIR = next(iter(WAYS))
ESTIMATED_PROMPTS = 64  # of a step
GPUS = ("a100-40gb", "h100")


# ---- rows ----


def as_rows(prompts: Sequence[Example], way: str) -> list[Example]:
    """The rows that prompts with all their completions become."""
    return [
        dataclasses.replace(
            prompt,
            branches=tuple(prompt.branches[place] for place in places),
            loss_masks=tuple(prompt.loss_masks[place] for place in places),
        )
        for prompt in prompts
        for places in WAYS[way]
    ]


def made_prompts(count: int, vocabulary: int, means: Sequence[float], *, max_length: int, seed: int) -> list[Example]:
    """Random tokens of log-normal lengths, scaled to have these means: the trunk's, then each completion's."""
    generator = np.random.default_rng(seed)
    drawn = draw(tuple(means), max_length=max_length, max_prompt_length=max_length // 2, seed=seed)
    lengths = np.column_stack([drawn.trunks, drawn.branches])[:count]
    lengths = (lengths * means / lengths.mean(axis=0)).round().astype(int).clip(1, max_length // 2)
    return [step.random_example(generator, vocabulary, *each) for each in lengths.tolist()]


def packed_rows(prompts: Sequence[Example], way: str, tokens_per_row: int) -> list[Batch]:
    """The packed rows of a step of these prompts on one rank."""
    rows = step.rows("shared", as_rows(prompts, way), tokens_per_row, longest=0)
    return [collate(row, len(WAYS[way][0])) for row in rows]


# ---- measured ----


@dataclasses.dataclass(frozen=True)
class Round:
    """Seconds of processor time of one way in one round: of the reference pass, and of a step."""

    reference: float
    training: float


def made_policy(size: str, **overrides: object) -> Policy:
    """A randomly initialised policy with packed attention and fused blocks."""
    torch.manual_seed(0)
    causal_lm = MistralForCausalLM._from_config(
        common.model_config(size, **overrides), attn_implementation=IMPLEMENTATION
    )
    fuse(causal_lm)
    return Policy(causal_lm)


@torch.no_grad()
def reference_pass(policy: Policy, rows: Sequence[Batch]) -> list[torch.Tensor]:
    """The log-probs [E, K] of every row."""
    return [policy(row) for row in rows]


def train(policy: Policy, rows: Sequence[Batch], reference: Sequence[torch.Tensor]) -> float:
    """Forward and backward pass of every row: the sigmoid loss of pairs, Plackett-Luce of lists. The mean loss."""
    policy.zero_grad()
    count, total = sum(len(row.weights) for row in rows), 0.0
    for row, wanted in zip(rows, reference, strict=True):
        logps = policy(row)
        if logps.shape[1] == 2:
            losses, _ = pair_loss(find_loss("sigmoid"), logps, wanted, beta=0.1)
        else:
            losses, _ = list_loss(find_loss("plackett_luce"), logps, wanted, beta=0.1)
        loss = losses.sum() / count
        loss.backward()
        total += loss.item()
    return total


def measure(
    policy: Policy, rows: Mapping[str, Sequence[Batch]], repeats: int, clock: Callable[[], float] = time.process_time
) -> list[dict[str, Round]]:
    """Rounds, each of which times every way; another begins each time. One round before them is not counted."""
    rounds = []
    for number in range(repeats + 1):
        names = list(rows)
        turn = number % len(names)
        found = {}
        for name in [*names[turn:], *names[:turn]]:
            start = clock()
            reference = reference_pass(policy, rows[name])
            middle = clock()
            train(policy, rows[name], reference)
            found[name] = Round(middle - start, clock() - middle)
        rounds.append(found)
    return rounds[1:]


def measured_table(prompts: Sequence[Example], rounds: Sequence[Mapping[str, Round]]) -> str:
    """Tokens and processor time of a prompt."""
    lines = []
    for way in WAYS:
        tokens = sum(map(step.num_tokens, as_rows(prompts, way))) / len(prompts)
        scored = sum(len(branch) for row in as_rows(prompts, way) for branch in row.branches) / len(prompts)
        times = [statistics.median(found[way].training for found in rounds)]
        times.append(statistics.median(found[way].reference for found in rounds))
        ratios = sorted(found[way].training / found[ONE_PAIR].training for found in rounds)
        shown = ["1"] if way == ONE_PAIR else [f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"]
        lines.append(
            [way, round(tokens), round(scored), *(f"{1000 * each / len(prompts):.0f}" for each in times), *shown]
        )
    heads = ["a prompt as", "tokens", "of them scored", "step, ms", "reference pass, ms", "step, times one pair"]
    return common.markdown(heads, lines)


# ---- estimated ----


def lengths_of(lengths: Lengths, way: str) -> Lengths:
    """The rows of drawn prompts with all their completions."""
    trunks = np.repeat(lengths.trunks, len(WAYS[way]))
    branches = np.stack([lengths.branches[:, list(places)] for places in WAYS[way]], axis=1)
    return Lengths(trunks, branches.reshape(len(trunks), -1), lengths.source)


def plan_of(way: str, gpu: str) -> Plan:
    """The estimate for a step of `ESTIMATED_PROMPTS` prompts, Mistral 7B in full, bf16, RMSprop, 8 GPUs."""
    size, dimensions = sizes(find_config("mistral-7b-v0.1")[0])
    drawn = draw(TYPICAL_LIST, max_length=MAX_LENGTH, max_prompt_length=MAX_PROMPT_LENGTH)
    setting = Setting(
        size=size,
        dimensions=dimensions,
        gpu=find_gpu(gpu),
        gpus=8,
        lengths=lengths_of(drawn, way),
        batch_size=ESTIMATED_PROMPTS * len(WAYS[way]),
        tokens_per_row=8192,
        checkpointing="auto",
        precision="bf16",
        optimizer="rmsprop",
        optimizer_dtype="fp32",
        hybrid=False,
        cpu_offload=False,
        utilisation=0.45,
    )
    return make_plan(setting)


def estimated_table() -> str:
    """Operations, and milliseconds of a prompt on each of `GPUS`, with the checkpointing mode that fits."""
    plans = {way: [plan_of(way, gpu) for gpu in GPUS] for way in WAYS}
    lines = []
    for way, found in plans.items():
        rows = len(WAYS[way])
        times = [
            f"{1000 * plan.seconds / ESTIMATED_PROMPTS:.1f} + {1000 * plan.scoring * rows:.1f} "
            f"({plan.setting.checkpointing})"
            for plan in found
        ]
        ratios = [plan.seconds / first.seconds for plan, first in zip(found, plans[ONE_PAIR], strict=True)]
        work = found[0].arithmetic.necessary * rows / 1e12
        lines.append([way, f"{work:.1f}", *times, "1" if way == ONE_PAIR else " / ".join(f"{x:.2f}" for x in ratios)])
    names = [f"8 x {gpu}, ms: step + reference pass" for gpu in GPUS]
    return common.markdown(["a prompt as", "necessary operations, 10^12", *names, "step, times one pair"], lines)


def report(policy: Policy, prompts: Sequence[Example], repeats: int, tokens_per_row: int) -> str:
    """Both tables."""
    tokens_per_row = max(tokens_per_row, *map(step.num_tokens, prompts))
    rows = {way: packed_rows(prompts, way, tokens_per_row) for way in WAYS}
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    return "\n".join(
        [
            f"Measured: {parameters / 1e6:.1f}M parameters, {len(prompts)} prompts, {repeats} rounds, processor time, "
            f"{common.describe_machine()}",
            "",
            measured_table(prompts, measure(policy, rows, repeats)),
            "",
            f"Estimated: Mistral 7B, full, bf16, {ESTIMATED_PROMPTS} prompts a step, 45% of the peak assumed",
            "",
            estimated_table(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(common.SIZES), default="15m", help="of the made model (default: 15m)")
    parser.add_argument("--prompts", type=int, default=4, help="of a step (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--tokens-per-row", type=int, default=4096)
    parser.add_argument("--output", type=Path, help="where to write the tables, too")
    args = parser.parse_args()
    torch.set_num_threads(1)  # processor time is that of one thread's work
    policy = made_policy(args.size)
    vocabulary = common.SIZES[args.size]["vocab_size"]
    prompts = made_prompts(args.prompts, vocabulary, TYPICAL_LIST, max_length=MAX_LENGTH, seed=0)
    text = report(policy, prompts, args.repeats, args.tokens_per_row)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
