"""Model sizes by numbers of GPUs, by the estimator: does a DPO step fit, and how fast is it.

    python benchmarks/projections.py [--gpu h100] [--cards] [--output FILE]

Nothing is measured here. Full fine-tuning, RMSprop, UltraFeedback-like lengths, 64 pairs per step, or 8 per GPU if that
is more; the fastest row size and checkpointing that fit; 45% of the peak, recomputation included; collectives at 75%
of the links' data sheet, hidden behind computation as far as it lasts; latencies not counted. With --cards: the 7B
model of the Notus recipe alone, on some cards, in each checkpointing mode.
"""

import argparse
import dataclasses
from pathlib import Path

from common import GIB, markdown
from notus.estimate.plan import Plan, Setting, fastest, make_plan
from notus.estimate.sizes import TYPICAL, draw, find_config, sizes
from notus.model.flops import PER_NODE, find_gpu
from notus.training.memory_estimate import CHECKPOINTING, RUNTIME_MARGIN

MODELS = ("Qwen/Qwen2.5-1.5B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-32B", "meta-llama/Llama-3.1-70B")
COUNTS = (1, 8, 32, 128, 512)
HEADS = ("model", "GPUs", "sharding", "tokens per row", "checkpointing", "GiB a GPU", "pairs/s", "per GPU", "MFU",
         "bound by")  # fmt: skip
RECIPE = "alignment-handbook/zephyr-7b-sft-full"
CARDS = (("h100", 1, "fp32"), ("h100", 1, "bf16"), ("h200", 1, "fp32"), ("a100-40gb", 8, "fp32"))
ROWS = (2048, 4096, 8192)
UTILISATION = 0.45


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
        utilisation=UTILISATION,
    )


def plan_of(setting: Setting, mode: str, tokens: int) -> Plan:
    """The same run in another checkpointing mode, with rows of other lengths."""
    return make_plan(dataclasses.replace(setting, checkpointing=mode, tokens_per_row=tokens))


def need(plan: Plan) -> float:
    """GiB a GPU, the runtime's margin included."""
    return (plan.footprint.total + RUNTIME_MARGIN) / GIB


def rate(plan: Plan) -> float:
    """Pairs per second."""
    return plan.setting.batch_size / plan.seconds


def cells(name: str, gpu_name: str, gpus: int, hybrid: bool) -> list[object]:
    """A row of the table."""
    plan = fastest(setting_of(name, gpu_name, gpus, hybrid=hybrid))
    start = [name, gpus, "hybrid" if hybrid else "full"]
    if plan is None:
        return [*start, "does not fit", *[""] * 6]
    bound = "computation" if plan.compute >= plan.communication else "communication"
    memory = f"{plan.footprint.total / GIB:.1f}"
    rates = (f"{rate(plan):.1f}", f"{rate(plan) / gpus:.2f}", f"{plan.mfu:.0%}")
    return [*start, plan.setting.tokens_per_row, plan.setting.checkpointing, memory, *rates, bound]


def cards() -> str:
    """Of some cards, a mode's memory and rate with the row size that is fastest, the smallest of equals."""
    rows = []
    for gpu_name, gpus, dtype in CARDS:
        setting = dataclasses.replace(setting_of(RECIPE, gpu_name, gpus), optimizer_dtype=dtype)
        modes = [_card([plan_of(setting, mode, tokens) for tokens in ROWS]) for mode in CHECKPOINTING]
        rows.append([f"{gpus} x {gpu_name}", dtype, *modes])
    return markdown(["GPU", "optimizer states", *CHECKPOINTING], rows)


def _card(plans: list[Plan]) -> str:
    fitting = [plan for plan in plans if plan.spare >= 0]
    if not fitting:
        return f"{need(plans[0]):.1f} GiB, does not fit"
    best = min(fitting, key=lambda plan: round(plan.seconds, 3))
    return f"{need(best):.1f} GiB, {rate(best):.1f} pairs/s (rows of {best.setting.tokens_per_row})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--cards", action="store_true", help="the 7B recipe on some cards, in place of all sizes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.cards:
        shown = cards()
    else:
        sharding = [(count, hybrid) for count in COUNTS for hybrid in ((False, True) if count > PER_NODE else (False,))]
        rows = [cells(name, args.gpu, count, hybrid) for name in MODELS for count, hybrid in sharding]
        shown = f"{args.gpu}, by the estimator; not run.\n\n{markdown(HEADS, rows)}"
    print(shown)
    if args.output:
        args.output.write_text(shown + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
