"""The estimate as lines of text."""

from notus.estimate.plan import Plan, Setting, fastest, job_of
from notus.training.memory_estimate import BYTES, OPTIMIZER_STATES, RUNTIME_MARGIN, STATE_BYTES, scoring_bytes

NAMES = {
    "weights": "weights (this GPU's share; trained ones in fp32)",
    "gradients": "gradients (its share, fp32)",
    "optimizer_state": "optimizer state (its share)",
    "optimizer_temporaries": "optimizer temporaries",
    "gathered": "gathered blocks and head",
    "whole_gradients": "whole gradients and reduce-scatter buffers",
    "activations": "activations kept",
    "working": "activations of the block in work",
    "head": "head: logits of a chunk, its gradient in fp32",
    "batch": "batch",
}
OFFLOADED = "time: not estimated with training.cpu_offload (the host's link and optimizer are not modelled)"


def gib(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.2f}"


def memory(plan: Plan) -> list[str]:
    """The table of bytes and the verdict."""
    found, setting = plan.footprint, plan.setting
    lines = [f"Memory of one GPU, GiB, where it peaks ({found.moment})"]
    lines += [f"  {NAMES[name]:<50} {gib(count):>8}" for name, count in found.parts.items() if count]
    lines.append(f"  {'tensors':<50} {gib(found.total):>8}")
    lines.append(f"  {'margin: CUDA context, NCCL, fragmentation (assumed)':<50} {gib(RUNTIME_MARGIN):>7}")
    lines.append(f"  {'in all':<50} {gib(found.total + RUNTIME_MARGIN):>8}")
    if setting.cpu_offload:
        lines.append(f"  host memory for what is offloaded, all GPUs of a replica together: {gib(_host(setting))} GiB")
    return [*lines, verdict(plan)]


def _host(setting: Setting) -> int:
    """Bytes of weights (frozen ones in the computation's dtype), gradients and optimizer state."""
    states = OPTIMIZER_STATES[setting.optimizer] * STATE_BYTES[setting.optimizer_dtype]
    frozen = setting.size.parameters - setting.size.trained
    return round((4 + 4 + states) * setting.size.trained) + BYTES[setting.precision] * frozen


def verdict(plan: Plan) -> str:
    """One sentence: does it fit, or what would."""
    dials = f"tokens_per_row {plan.setting.tokens_per_row}, activation_checkpointing {plan.setting.checkpointing}"
    if plan.spare >= 0:
        return f"Fits {gib(plan.setting.gpu.capacity)} GiB with {gib(plan.spare)} GiB to spare ({dials})."
    return (
        f"Does NOT fit {gib(plan.setting.gpu.capacity)} GiB: {gib(-plan.spare)} GiB too much ({dials}). {_remedy(plan)}"
    )


def _remedy(plan: Plan) -> str:
    best = fastest(plan.setting)
    if best is not None:
        return (
            f"Set training.tokens_per_row={best.setting.tokens_per_row} "
            f"training.activation_checkpointing={best.setting.checkpointing} ({gib(best.spare)} GiB to spare)."
        )
    size, remedies = plan.setting.size, ["take more GPUs or larger ones"]
    if size.block_trained == size.block:
        remedies.append("set lora.rank")
    elif not size.quantized:
        remedies.append("set model.quantization=nf4")
    if not plan.setting.cpu_offload:
        remedies.append("as a last resort set training.cpu_offload=true")
    return f"No row size or checkpointing helps: {', or '.join(remedies)}."


def advice(plan: Plan) -> list[str]:
    """A faster setting of the dials, if there is one worth the change."""
    best = fastest(plan.setting)
    if plan.spare < 0 or best is None or best.seconds > 0.97 * plan.seconds:
        return []
    return [
        f"Faster: training.tokens_per_row={best.setting.tokens_per_row} training.activation_checkpointing="
        f"{best.setting.checkpointing}: {plan.seconds / best.seconds:.2f} times, {gib(best.spare)} GiB to spare."
    ]


def step(plan: Plan, unit: str) -> list[str]:
    """What one optimizer step does and takes."""
    setting, work = plan.setting, plan.arithmetic
    examples, rate = setting.batch_size, setting.gpu.rate(setting.precision)
    bound = "computation" if plan.compute >= plan.communication else "COMMUNICATION, which computation cannot hide"
    return [
        f"Step of {examples} {unit}" + ("" if plan.spare >= 0 else ", and the run, if the memory sufficed"),
        f"  rows per GPU {plan.steps.rows:.1f} (fullest {plan.steps.fullest} tokens), heaviest GPU "
        f"{plan.steps.imbalance - 1:.1%} above the mean",
        f"  necessary operations {examples * work.necessary:.3g}, with recomputation {examples * work.hardware:.3g}",
        f"  computation {_seconds(plan.compute)} s at {setting.utilisation:.0%} of {rate:g} TFLOP/s "
        "(an assumption; a step of 7B on one H200 reached 53%)",
        f"  communication {_seconds(plan.communication)} s beside it; the step is bound by {bound}",
        *_mismatched(plan),
        f"  {_seconds(plan.seconds)} s, {examples / plan.seconds:.2f} {unit}/s, "
        f"MFU on necessary operations {plan.mfu:.0%}",
    ]


def _mismatched(plan: Plan) -> list[str]:
    """What comes before the step's rows, where the loss needs it."""
    if not plan.mismatched:
        return []
    return [
        f"  mismatched completions {_seconds(plan.mismatched)} s before it, without gradients (the reference pass and "
        "evaluations have such a pass, too)"
    ]


def _seconds(value: float) -> str:
    """Two decimals; of short times two digits."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def run_time(
    plan: Plan, *, steps: int, reference: float, evaluations: int, held_out: int | None, price: float | None
) -> list[str]:
    """Hours and cost. `reference`: seconds of its pass; `evaluations` of `held_out` rows each, None: unknown."""
    parts = {
        "reference pass": reference,
        "training": steps * plan.seconds,
        "evaluation": evaluations * (held_out or 0) * plan.scoring,
    }
    lines = [f"Run of {steps} steps"]
    lines += [f"  {name:<16} {seconds / 3600:>8.2f} h" for name, seconds in parts.items() if seconds]
    if held_out is None:
        lines.append("  evaluation on data.eval: not counted")
    hours = sum(parts.values()) / 3600
    lines.append(f"  {'in all':<16} {hours:>8.2f} h, {hours * plan.setting.gpus:.1f} GPU-hours")
    if price is not None:
        lines.append(f"  {'cost':<16} {hours * plan.setting.gpus * price:>8.2f} USD at {price:g} USD per GPU-hour")
    return lines


def reference(scoring: Plan, plan: Plan, model: str) -> list[str]:
    """What was assumed of `reference.model`, and its memory if training needs less."""
    size = scoring.setting.size
    lines = [f"Reference: {_many(size.parameters)} parameters, {size.layers} blocks ({model})"]
    needed = scoring_bytes(size, job_of(scoring.setting)) + RUNTIME_MARGIN
    if plan.setting.cpu_offload or needed <= plan.footprint.total + RUNTIME_MARGIN:
        return lines
    capacity = plan.setting.gpu.capacity
    fits = "" if needed <= capacity else f", which does NOT fit {gib(capacity)} GiB: take more GPUs or larger ones"
    return [*lines, f"  its pass, before training, needs at most {gib(needed)} GiB per GPU{fits}"]


def _many(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.3g} million"


def head(setting: Setting, model: str, gpu_name: str) -> list[str]:
    """What was assumed of model, GPUs and data."""
    size = setting.size
    return [
        f"Model: {_many(size.parameters)} parameters, {_many(size.trained)} trained, {size.layers} blocks ({model})",
        f"GPUs: {setting.gpus} x {gpu_name}; GB/s: {setting.gpu.link:g} in a node, {setting.gpu.network:g} between",
        f"Lengths: {setting.lengths.source}",
    ]
