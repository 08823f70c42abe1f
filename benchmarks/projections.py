"""Model sizes by numbers of GPUs, by the estimator: does a DPO step fit, and how fast is it.

    python benchmarks/projections.py [--gpu h100] [--cards] [--output FILE]

Nothing is measured here. Full fine-tuning, RMSprop, UltraFeedback-like lengths, 64 pairs per step, or 8 per GPU if that
is more; the fastest row size and checkpointing that fit; 45% of the peak, recomputation included; collectives at 75%
of the links' data sheet, hidden behind computation as far as it lasts; latencies not counted. With --cards: the 7B
model of the Notus recipe alone, on some cards, in each checkpointing mode.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, installed or not

from notus.estimate.inputs import TYPICAL, draw, find_config, sizes
from notus.estimate.plan import Plan, Setting, fastest, make_plan
from notus.model.flops import PER_NODE, find_gpu
from notus.training.memory_estimate import CHECKPOINTING, RUNTIME_MARGIN

MODELS = ("Qwen/Qwen2.5-1.5B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-32B", "meta-llama/Llama-3.1-70B")
COUNTS = (1, 8, 32, 128, 512)
HEADER = "| model | GPUs | sharding | tokens per row | checkpointing | GiB a GPU | pairs/s | per GPU | MFU | bound by |"
RECIPE = "alignment-handbook/zephyr-7b-sft-full"
CARDS = (("h100", 1, "fp32"), ("h100", 1, "bf16"), ("h200", 1, "fp32"), ("a100-40gb", 8, "fp32"))
ROWS = (2048, 4096, 8192)


def setting_of(name: str, gpu_name: str, gpus: int, *, hybrid: bool = False) -> Setting:
    """A full DPO run."""
    size, dimensions = sizes(find_config(name)[0])
    return Setting(
        size=size,
        dimensions=dimensions,
        gpu=find_gpu(gpu_name),
        gpus=gpus,
        lengths=draw(TYPICAL, max_length=1024, max_prompt_length=512),
        batch_size=max(64, 8 * gpus),
        tokens_per_row=2048,
        checkpointing="full",
        precision="bf16",
        optimizer="rmsprop",
        optimizer_dtype="fp32",
        hybrid=hybrid,
        cpu_offload=False,
        utilisation=0.45,
    )


def line(name: str, gpu_name: str, gpus: int, hybrid: bool) -> str:
    """A row of the table."""
    setting = setting_of(name, gpu_name, gpus, hybrid=hybrid)
    plan, start = fastest(setting), f"| {name} | {gpus} | {'hybrid' if hybrid else 'full'} |"
    if plan is None:
        return f"{start} does not fit | | | | | | |"
    rate = setting.batch_size / plan.seconds
    bound = "computation" if plan.compute >= plan.communication else "communication"
    return (
        f"{start} {plan.setting.tokens_per_row} | {plan.setting.checkpointing} | {plan.footprint.total / 2**30:.1f} | "
        f"{rate:.1f} | {rate / gpus:.2f} | {plan.mfu:.0%} | {bound} |"
    )


def cards() -> Iterator[str]:
    """Of some cards, a mode's memory and rate with the row size that is fastest, the smallest of equals."""
    yield "| GPU | optimizer states | " + " | ".join(CHECKPOINTING) + " |"
    yield "|" + "---|" * (2 + len(CHECKPOINTING))
    for gpu_name, gpus, dtype in CARDS:
        setting = dataclasses.replace(setting_of(RECIPE, gpu_name, gpus), optimizer_dtype=dtype)
        cells = (_cell([_plan(setting, mode, tokens) for tokens in ROWS]) for mode in CHECKPOINTING)
        yield f"| {gpus} x {gpu_name} | {dtype} | " + " | ".join(cells) + " |"


def _plan(setting: Setting, mode: str, tokens: int) -> Plan:
    return make_plan(dataclasses.replace(setting, checkpointing=mode, tokens_per_row=tokens))


def _cell(plans: list[Plan]) -> str:
    fitting = [plan for plan in plans if plan.spare >= 0]
    need = [(plan.footprint.total + RUNTIME_MARGIN) / 2**30 for plan in plans]
    if not fitting:
        return f"{need[0]:.1f} GiB, does not fit"
    best = min(fitting, key=lambda plan: round(plan.seconds, 3))
    rate = best.setting.batch_size / best.seconds
    return f"{need[plans.index(best)]:.1f} GiB, {rate:.1f} pairs/s (rows of {best.setting.tokens_per_row})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--cards", action="store_true", help="the 7B recipe on some cards, in place of all sizes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.cards:
        print("\n".join(cards()))
        return
    lines = [f"{args.gpu}, by the estimator; not run.", "", HEADER, "|" + "---|" * 10]
    for name in MODELS:
        for gpus in COUNTS:
            for hybrid in (False, True) if gpus > PER_NODE else (False,):
                lines.append(line(name, args.gpu, gpus, hybrid))
                print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
