"""The header of a model card: what the hub reads of it, as `huggingface_hub` writes it."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from notus.evaluation.names import hub_id, public_name
from notus.evaluation.release.facts import Facts, Variant
from notus.evaluation.results import Figure, Result

# Settings of the suites that score a file, whose model is what the file says.
JUDGED_FILES = ("annotations", "judgments", "answers")
_STEP = re.compile(r"\(step (\d+)\)$")


def card_metadata(
    facts: Facts,
    variant: Variant,
    *,
    name: str,
    base_model: str | None,
    licence: Mapping[str, str],
    languages: list[str],
) -> ModelCardData:
    """The header's data; `base_model` is a hub id, or None where the base has none."""
    adapter = variant == "adapter"
    results = list(evaluation_results(facts))
    relation = {"base_model_relation": "adapter" if adapter else "finetune"} if base_model else {}
    optional: dict[str, Any] = {**licence, **relation}
    return ModelCardData(
        base_model=base_model,
        datasets=hub_datasets(facts) or None,
        eval_results=results or None,
        language=languages or None,
        library_name="peft" if adapter else "transformers",
        model_name=name if results else None,
        pipeline_tag="text-generation",
        tags=_tags(facts),
        **optional,
    )


def hub_datasets(facts: Facts) -> list[str]:
    """The hub ids of what was trained on, each once; local files have none."""
    found = (hub_id(source["path"]) for source in facts.settings["data"]["train"])
    return list(dict.fromkeys(name for name in found if name))


def other_model(result: Result, facts: Facts) -> str | None:
    """What a result is of, if not of the card's model: an earlier step of the run, or what a judged file names."""
    match = _STEP.search(result.model)
    last = facts.step if facts.step is not None else max((line["step"] for line in facts.metrics), default=None)
    if match is not None and int(match[1]) != last:
        return f"the model after step {match[1]}"
    named = _STEP.sub("", result.model).rstrip()
    if any(result.settings.get(name) for name in JUDGED_FILES) and Path(named).name != facts.folder.resolve().name:
        return f"`{public_name(named)}`, as its file has it"
    return None


def evaluation_results(facts: Facts) -> Iterator[EvalResult]:
    """The figures for `model-index`.

    The hub groups them by dataset and keeps one name for each group: a figure under another name than its group's
    bears that in its metric's name.
    """
    names: dict[str, str] = {}
    for result in facts.results:
        for figure in () if other_model(result, facts) else result.figures:
            if not math.isfinite(figure.value):
                continue
            kind, label = _dataset_type(figure), figure_label(figure)
            group = names.setdefault(kind, label)
            yield EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=kind,
                dataset_name=group,
                metric_type=re.sub(r"\W+", "_", figure.metric.lower()).strip("_"),
                metric_name=figure.metric if group == label else f"{label}: {figure.metric}",
                metric_value=float(f"{figure.value:.6g}"),  # more digits than six say nothing of the model
            )


def figure_label(figure: Figure) -> str:
    """A benchmark with its set-up, as "HellaSwag (10-shot)"."""
    return " ".join((f"{figure.name} ({figure.setup})" if figure.setup else figure.name).split())


def _dataset_type(figure: Figure) -> str:
    """The hub id of the data; for a local file or a bare name, a word of the same form."""
    name = figure.dataset or figure.name
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and hub_id(name):
        return name
    return re.sub(r"[^\w.-]+", "-", name.rstrip("/").rpartition("/")[2].lower()).strip("-.") or "unknown"


def _tags(facts: Facts) -> list[str]:
    lora = ["lora"] if facts.settings["lora"]["rank"] else []
    return ["notus", *(["dpo", "alignment", "preference-optimization"] if facts.task == "dpo" else ["sft"]), *lora]
