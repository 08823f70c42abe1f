"""Settings that contradict each other, or that others leave without effect.

Works on the plain values of a resolved config, {section: {key: value}} and "task".
"""

from collections.abc import Iterator, Mapping
from typing import Any

from notus.schema import Refused

# As in `notus.losses`, which imports torch; a test holds them equal.
SMOOTHED_LOSSES = ("sigmoid", "robust", "exo_pair")

Section = Mapping[str, Any]


def conflicts(config: Mapping[str, Any], unset: Mapping[str, Section]) -> Iterator[Refused]:
    """What contradicts, or would be ignored because of, other keys; `unset`: the sections that may be left out."""
    sft, lora = config["task"] == "sft", config["lora"]
    if lora["rank"] == 0:
        yield from _without_effect("lora", lora, unset, "while lora.rank is 0: set lora.rank, or remove it")
    yield from _tracking_conflicts(config["tracking"], unset)
    if sft:
        for section in ("dpo", "reference"):
            yield from _without_effect(section, config[section], unset, "in SFT: remove it, or run train_dpo.py")
    yield from _checkpoint_conflicts(config["training"])
    yield from _data_conflicts(config["data"], config["training"], sft=sft)
    yield from _loss_conflicts(config["dpo"])


def _without_effect(
    name: str, section: Section, unset: Mapping[str, Section], why: str, besides: tuple[str, ...] = ()
) -> Iterator[Refused]:
    """The keys of a section that were moved away from their defaults."""
    for key, value in section.items():
        if key not in besides and value != unset[name][key]:
            yield Refused(f"{name}.{key}", f"has no effect {why}")


def _tracking_conflicts(tracking: Section, unset: Mapping[str, Section]) -> Iterator[Refused]:
    for key, of_it in (("wandb", ("project", "run_name")), ("samples", ("sample_tokens",))):
        if not tracking[key]:
            why = f"while tracking.{key} is {str(tracking[key]).lower()}: set that, or remove it"
            others = tuple(other for other in tracking if other not in of_it)
            yield from _without_effect("tracking", tracking, unset, why, besides=others)


def _checkpoint_conflicts(training: Section) -> Iterator[Refused]:
    every, saved = training["keep_every"], training["save_every"]
    if every is None:
        return
    if training["keep_checkpoints"] is None:
        yield Refused(
            "training.keep_every", "has no effect while training.keep_checkpoints is null: keep one of the two"
        )
    if saved is None or every % saved:
        yield Refused("training.keep_every", f"({every}) must be a multiple of training.save_every ({saved})")


def _data_conflicts(data: Section, training: Section, *, sft: bool) -> Iterator[Refused]:
    prompt, template = data["max_prompt_length"], data["chat_template"]
    if sft and prompt is not None:
        yield Refused("data.max_prompt_length", "has no effect in SFT, which cuts long rows at their end: remove it")
    if prompt is not None and prompt >= data["max_length"]:
        yield Refused(
            "data.max_prompt_length",
            f"({prompt}) must be below data.max_length ({data['max_length']}), or nothing is left of the completions",
        )
    if data["eval"] is not None and data["eval_size"] > 0:
        yield Refused("data.eval_size", "has no effect beside data.eval: keep one of the two")
    if data["eval"] is None and data["eval_size"] == 0 and training["eval_every"] is not None:
        yield Refused(
            "training.eval_every",
            "has no effect without evaluation data: set data.eval or data.eval_size, or remove it (null)",
        )
    if template not in (None, "zephyr") and not str(template).endswith(".jinja"):
        yield Refused("data.chat_template", f"must be 'zephyr', a .jinja file or null, not {template!r}")


def _loss_conflicts(dpo: Section) -> Iterator[Refused]:
    loss, smoothing = dpo["loss_type"], dpo["label_smoothing"]
    if smoothing > 0 and loss not in SMOOTHED_LOSSES:
        yield Refused(
            "dpo.label_smoothing",
            f"has no effect with dpo.loss_type {loss!r}: use one of {', '.join(SMOOTHED_LOSSES)}",
        )
    if smoothing == 0 and loss == "exo_pair":
        yield Refused("dpo.label_smoothing", "must be above 0 with dpo.loss_type 'exo_pair': set it, say to 1e-3")
    if smoothing == 0.5 and loss == "robust":
        yield Refused("dpo.label_smoothing", "must be below 0.5 with dpo.loss_type 'robust'")
