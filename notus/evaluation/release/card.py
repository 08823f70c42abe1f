"""A model card from a run: the facts put into words, and into the template `card.md.jinja`."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import jinja2
from huggingface_hub import ModelCard

from notus.evaluation.files import told
from notus.evaluation.names import hub_id, public_name
from notus.evaluation.release.citations import citations
from notus.evaluation.release.facts import Facts, Variant, base_file, base_licence
from notus.evaluation.release.metadata import card_metadata, evaluation_results, figure_label, other_model
from notus.evaluation.results import EVALUATIONS, RESULT, Figure, Result
from notus.evaluation.unfinished import learned_chat
from notus.model.load import read_json
from notus.training.inputs import DATA_FILE
from notus.training.loggers import ENVIRONMENT_FILE, METRICS_FILE
from notus.training.run_folder import CONFIG_FILE

T = TypeVar("T")

_TEMPLATE = "card.md.jinja"
_RESULTS = f"{EVALUATIONS}/*/{RESULT}"
_NOT_KNOWN = "–"
_LAST = 10  # logged steps
# What of `metrics.jsonl` a reader wants to see: the key, and its name.
_COURSE = {
    "loss": "training loss",
    "rewards/accuracies": "reward accuracy, training",
    "rewards/margins": "reward margin, training",
    "eval_loss": "loss, held-out",
    "eval_rewards/accuracies": "reward accuracy, held-out",
    "eval_rewards/margins": "reward margin, held-out",
    "eval_rewards/chosen": "reward of chosen, held-out",
    "eval_rewards/rejected": "reward of rejected, held-out",
}


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a user says of the model besides what its run knows.

    Attributes:
        name: the title, where there is no `repo_id`.
        repo_id: where on the hub it will be; None: the card's example loads the folder `name`.
        base_model: the base model's public id; None: what the run's config names, if that is one.
        licence: None: the base model's, if its own card says.
        languages: codes such as "en".
    """

    name: str
    repo_id: str | None = None
    base_model: str | None = None
    licence: str | None = None
    languages: Sequence[str] = ()


def model_card(facts: Facts, variant: Variant, choices: Choices, *, chat: bool) -> str:
    """The card's text; `chat`: the tokenizer has a chat template.

    Raises ValueError as `base_licence` does, and, naming the file, where one of the run's holds something else.
    """
    licence = {"license": choices.licence} if choices.licence else base_licence(facts.base)
    base_model = choices.base_model or hub_id(facts.base)
    name = " ".join((choices.repo_id or choices.name).rpartition("/")[2].split())
    noted = _noted(facts)  # what is wrong after this is the settings'

    def render() -> str:
        header = card_metadata(
            facts, variant, name=name, base_model=base_model, licence=licence, languages=list(choices.languages)
        )
        return _template().render(
            metadata=header.to_yaml(),
            identifier=json.dumps(choices.repo_id or choices.name, ensure_ascii=False),  # as Python writes it, too
            step=facts.step,
            adapter=variant == "adapter",
            name=one_line(name),
            summary=_summary(facts, variant, one_line(name), base_model),
            licence=licence,
            licence_inherited=not choices.licence,
            chat=chat,
            **noted,
            **_settings(facts),
        )

    text = told(CONFIG_FILE, [facts.folder], render)
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a character alone in the data is no text for a file
    ModelCard(text)  # raises ValueError for a header that the hub's client could not read
    return text


def _noted(facts: Facts) -> dict[str, Any]:
    """What the template needs of the files that the run, and its evaluations, wrote. Raises ValueError, see `told`."""

    def of(files: str, make: Callable[[], T]) -> T:
        return told(files, [facts.folder], make)

    of(_RESULTS, lambda: list(evaluation_results(facts)))  # which the header will have
    return {
        "counts": of(DATA_FILE, lambda: list(_counts(facts))),
        "machine": of(ENVIRONMENT_FILE, lambda: list(_machine(facts))),
        "course": of(METRICS_FILE, lambda: list(_course(facts))),
        "results": of(_RESULTS, lambda: [_table(result, facts) for result in facts.results]),
    }


def _settings(facts: Facts) -> dict[str, Any]:
    """What the template needs of the run's settings."""
    data = facts.settings["data"]
    return {
        "dpo": facts.task == "dpo",
        "empty_system": data["add_empty_system"],
        "datasets": list(_datasets(facts)),
        "eval_size": data["eval_size"],
        "seed": facts.settings["training"]["seed"],
        "hyperparameters": list(_hyperparameters(facts)),
        "citations": citations(facts),
    }


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has a chat template."""
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        config.is_file() and bool(read_json(config).get("chat_template"))
    )


def base_has_chat_template(facts: Facts) -> bool:
    """The same, before there is a folder: by what the run learned, and the base model's files on this machine."""
    found = base_file(facts.base, "tokenizer_config.json")
    learned = told(DATA_FILE, [facts.folder], lambda: learned_chat(facts.settings, facts.data))
    return learned or (found is not None and has_chat_template(found.parent))


def one_line(value: Any) -> str:
    """A name, which may hold anything, as text within a line of Markdown: it starts no block, and no HTML tag."""
    return " ".join(str(value).split()).replace("<", "&lt;")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = lambda value: one_line(value).replace("|", "\\|")
    return environment.from_string(resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))


def _summary(facts: Facts, variant: Variant, name: str, base_model: str | None) -> str:
    local = f"`{_code(public_name(facts.base))}`"
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else local
    how = {
        "full": f"{name} is {base}, all of its weights trained",
        "adapter": f"{name} is a LoRA adapter for {base}, trained",
        "merged": f"{name} is {base} with a LoRA adapter merged into its weights, which was trained",
    }[variant]
    sources = dict.fromkeys(public_name(source["path"]) for source in facts.settings["data"]["train"])
    what = "Direct Preference Optimization (DPO)" if facts.task == "dpo" else "supervised fine-tuning (SFT)"
    return f"{how} by {what} on {', '.join(f'`{_code(source)}`' for source in sources)}."


def _code(name: str) -> str:
    """A name between backticks, which cannot hold one."""
    return " ".join(name.split()).replace("`", "'")


def _datasets(facts: Facts) -> Iterator[dict[str, Any]]:
    for purpose, key in (("training", "train"), ("evaluation", "eval")):
        for source in facts.settings["data"][key] or ():
            yield {**source, "name": public_name(source["path"]), "purpose": purpose}


def _counts(facts: Facts) -> Iterator[str]:
    """Rows, where they come from, and the drop report, of each part of the data."""
    for purpose, key in (("training", "train"), ("evaluation", "eval")):
        noted = (facts.data or {}).get(key)
        if not noted:
            continue
        yield f"{purpose}: {noted['rows']:,} rows"
        if noted.get("sources"):
            yield f"{purpose}, rows by source: {_listed(noted['sources'])}"
        report = noted.get("report")
        if report:
            dropped = _listed(report["dropped"]) or "none"
            cut = f"{report['prompts_cut']:,} prompts, {report['completions_cut']:,} rows' completions"
            yield f"{purpose}: {report['read']:,} rows read; dropped: {dropped}; cut to length: {cut}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{one_line(name)} {number:,}" for name, number in counts.items())


def _hyperparameters(facts: Facts) -> Iterator[tuple[str, Any]]:
    """The resolved settings that decide what the model learns, with those that are off left out."""
    data, training, lora = (facts.settings[section] for section in ("data", "training", "lora"))
    if facts.task == "dpo":
        yield from _preference_settings(facts.settings["dpo"])
    if lora["rank"]:
        scale = "rank-stabilised LoRA" if lora["rslora"] else "LoRA"
        modules = lora["target_modules"]
        yield scale, f"rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}"
        yield "LoRA on", modules if isinstance(modules, str) else ", ".join(modules)
    yield ("pairs" if facts.task == "dpo" else "examples") + " per step", training["batch_size"]
    yield "epochs", training["epochs"]
    if training["max_steps"]:
        yield "most steps", training["max_steps"]
    yield "learning rate", f"{training['learning_rate']:g}"
    yield "schedule", f"{training['lr_schedule']}, warm-up over {100 * training['warmup_ratio']:.4g} % of the steps"
    yield "optimizer", f"{training['optimizer']}, states in {training['optimizer_dtype']}"
    if training["weight_decay"]:
        yield "weight decay", f"{training['weight_decay']:g}"
    if training["max_grad_norm"]:
        yield "gradient norm, at most", f"{training['max_grad_norm']:g}"
    yield "precision", f"{training['precision']}, master weights and sums in fp32"
    yield "tokens of prompt and completion, at most", data["max_length"]
    if data["max_prompt_length"]:
        yield "tokens of a prompt that is too long", f"the last {data['max_prompt_length']}"
    if data["chat_template"]:
        yield "chat template", public_name(data["chat_template"])
    if data["add_empty_system"]:
        yield "system turn", "an empty one in conversations without"
    if not data["shuffle"]:
        yield "order of the data", "as it is, in every epoch"
    yield "seed", training["seed"]


def _preference_settings(dpo: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "loss", dpo["loss_type"]
    yield "beta", f"{dpo['beta']:g}"
    if dpo["label_smoothing"]:
        yield "label smoothing", f"{dpo['label_smoothing']:g}"
    if dpo["nll_weight"]:
        yield "weight of the chosen completions' negative log-likelihood", f"{dpo['nll_weight']:g}"


def _machine(facts: Facts) -> Iterator[tuple[str, str]]:
    noted = facts.environment or {}
    if noted.get("hardware"):
        yield "hardware", f"{noted['hardware']} (processes: {noted['world_size']})"
    if noted.get("seconds"):
        yield "time", _duration(float(noted["seconds"]))
    if noted.get("versions"):
        yield "software", ", ".join(f"{name} {version}" for name, version in noted["versions"].items())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _course(facts: Facts) -> Iterator[dict[str, str]]:
    for key, name in _COURSE.items():
        lines = [line for line in facts.metrics if key in line and math.isfinite(line[key])]
        if not lines:
            continue
        first, last = (f"{line[key]:.4g} (step {line['step']})" for line in (lines[0], lines[-1]))
        if not key.startswith("eval_") and len(lines) > 2 * _LAST:  # of single steps, the last of them often small
            mean = fmean(line[key] for line in lines[-_LAST:])
            last = f"{mean:.4g} (mean of the last {_LAST}, to step {lines[-1]['step']})"
        yield {"name": name, "first": first, "last": last}


def _table(result: Result, facts: Facts) -> dict[str, Any]:
    peers = list(dict.fromkeys(peer for figure in result.figures for peer in figure.reference))
    return {
        "suite": result.suite,
        "date": result.date,
        "other": other_model(result, facts),
        "peers": peers,
        "rows": [_row(figure, peers) for figure in result.figures],
    }


def _row(figure: Figure, peers: Sequence[str]) -> dict[str, Any]:
    return {
        "label": figure_label(figure),
        "metric": figure.metric,
        "value": _number(figure.value, figure.unit),
        "stderr": _number(figure.stderr, figure.unit),
        "count": _NOT_KNOWN if figure.count is None else f"{figure.count:,}",
        "peers": [_number(figure.reference.get(peer), figure.unit) for peer in peers],
    }


def _number(value: float | None, unit: str) -> str:
    if value is None or not math.isfinite(value):
        return _NOT_KNOWN
    return f"{value:.2f} %" if unit == "%" else f"{value:.4g}{unit and ' ' + unit}"
