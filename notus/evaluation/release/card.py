"""`python -m notus card`: a run's model card, its metadata as the hub reads it, its text from `card.md.jinja`."""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, try_to_load_from_cache

from notus.evaluation.formatting import NONE, duration, number, setting
from notus.evaluation.results import Figure, Result, check_output, hub_id, parse_files, public_name
from notus.runtime.files import write_text

if TYPE_CHECKING:
    from notus.evaluation.read_run import Run
    from notus.evaluation.run_loss import RunLoss

T = TypeVar("T")
Variant = Literal["full", "adapter", "merged"]

CARD = "README.md"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_PAPERS = Path(__file__).with_name("papers.bib")
_SIGNED = "written by notus card; sha256 of what stands above: "
_LAST = 10  # logged steps
_STEP = re.compile(r"\(step (\d+)\)$")
# Settings of the suites that score a file; the file says which model it is of.
_SCORED_FILES = ("annotations", "judgments", "answers")
# The metrics that the card shows, and their names.
_COURSE = {
    "loss": "loss",
    "rewards/kendall_tau": "Kendall's τ of rewards and ratings",
    "rewards/top_1": "top-1 accuracy of rewards",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
}
_SHARES = ("rewards/top_1", "rewards/accuracies")  # written in percent
# What settings of the loss are called, where their own name does not say it.
_SETTINGS = {
    "NLL weight": "weight of the chosen completions' negative log-likelihood",
    "WPO": "pairs weighted by how likely the policy is to write them (WPO)",
}
# The better and the worse completions, by the rows of data.
_SIDES = {"pairs": ("chosen", "rejected"), "lists": ("best rated", "worst rated"), "labels": ("good", "bad")}


@dataclasses.dataclass(frozen=True)
class Release:
    """A run's model as it is published, and what the user says of it."""

    run: "Run"  # the run that trained it
    variant: Variant  # all weights, the adapter alone, or the adapter merged into its base
    name: str  # the title, if there is no `repo_id`
    step: int | None = None  # of an unfinished run, the step of the exported checkpoint; None: the run is finished
    repo_id: str | None = None  # where on the hub the model will be; None: only on this machine
    location: str | None = None  # the model's folder as seen from the card's; None: not there yet, an export makes it
    base_model: str | None = None  # the base model's public id; None: what the run's config names, if that is one
    licence: str | None = None  # None: the base model's, if its own card says
    languages: Sequence[str] = ()  # codes such as "en"

    @property
    def title(self) -> str:
        """The model's name without its owner."""
        return _one_space((self.repo_id or self.name).rpartition("/")[2])

    @property
    def identifier(self) -> str:
        """What a reader of the card loads: the hub id, else the model's folder."""
        return self.repo_id or self.location or self.name

    @property
    def public_base(self) -> str | None:
        """The base model's hub id; None where it has none."""
        return self.base_model or hub_id(self.run.base)

    @property
    def model_step(self) -> int:
        """The step after which the model was trained no more."""
        return self.run.exported_step if self.step is None else self.step

    @property
    def metrics(self) -> list[Mapping[str, Any]]:
        """The run's metrics, up to the exported step."""
        return [line for line in self.run.metrics if self.step is None or line["step"] <= self.step]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "run_folder", type=os.path.expanduser, metavar="RUN", help="a run's folder (training.output_dir)"
    )
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="FILE",
        help=f"a new file, or - for the terminal (default: {CARD} in the run's folder)",
    )
    parser.add_argument("--merge", action="store_true", help="of a LoRA run: the card of the merged model")
    parser.add_argument("--repo-id", type=repo_id, metavar="REPO_ID", help="where on the hub the model will be")
    add_card_arguments(parser)


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """What a card says and no run knows."""
    parser.add_argument(
        "--base-model", type=repo_id, metavar="REPO_ID", help="the base model's hub id, where it was a local folder"
    )
    parser.add_argument(
        "--license",
        type=_matching(r"[a-z0-9][a-z0-9.+-]*", "licence id of the hub's, such as apache-2.0 or mit"),
        metavar="ID",
        help="as the hub names it, say apache-2.0 (default: the base model's)",
    )
    parser.add_argument(
        "--language",
        type=_matching(r"[a-z]{2,3}|code|multilingual", "language code of two or three letters, such as en"),
        metavar="CODE",
        nargs="+",
        help="languages, say: en de",
    )


def release_of(
    args: argparse.Namespace, run: "Run", *, name: str, repo_id: str | None, location: str | None = "."
) -> Release:
    """Return the finished run's model as the command line describes it; by default it lies where its card does.

    Raises ValueError for a merge without LoRA.
    """
    variant: Variant = "full"
    if run.settings["lora"]["rank"]:
        variant = "merged" if args.merge else "adapter"
    elif args.merge:
        raise ValueError(f"{run.folder}: a full fine-tuning run has nothing to merge; leave --merge out")
    languages = tuple(args.language or ())
    return Release(
        run, variant, name, None, repo_id, location, base_model=args.base_model, licence=args.license,
        languages=languages,
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the card, return 0. Raises ValueError or OSError with a message for the user."""
    from notus.evaluation.read_run import read_run
    from notus.training.run_folder import MODEL

    folder = Path(args.run_folder)
    release = release_of(args, read_run(folder), name=folder.resolve().name, repo_id=args.repo_id, location=None)
    release = dataclasses.replace(release, step=exported_step(folder))
    if release.step is None:
        chat, generation = has_chat_template(folder / MODEL), has_generation_config(folder / MODEL)
        if release.variant != "merged":
            release = dataclasses.replace(release, location=_seen_from_card(folder / MODEL, args.output))
    else:
        chat, generation = will_have_chat_template(release.run), True
    text = model_card(release, chat=chat, generation=generation)
    if args.output == "-":
        sys.stdout.write(text)
        return 0
    output = Path(args.output) if args.output else folder / CARD
    check_output(output, form="Markdown", not_over=str(folder))
    if output.exists() and not is_untouched(output):
        raise ValueError(
            f"{output}: this file was edited after `notus card` wrote it, or is not a model card; remove it, or choose "
            "another file with --output"
        )
    write_text(output, signed(text))
    print(f"Wrote the model card to {output}")
    return 0


def _seen_from_card(model: Path, output: str | None) -> str:
    """Return the path of a run's model from the folder of its card; elsewhere "RUN/model", without what is above."""
    run = model.parent.resolve()
    if output in (None, "-"):
        return model.name
    path = os.path.relpath(run / model.name, Path(str(output)).resolve().parent)
    return f"{run.name}/{model.name}" if path.startswith(os.pardir) else Path(path).as_posix()


def repo_id(text: str) -> str:
    """A name that the hub can have, for argparse."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of the hub's form, USER/NAME") from error
    return text


def _matching(pattern: str, wanted: str) -> Callable[[str], str]:
    """Return a type for argparse: a string that matches a pattern."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is no {wanted}")
        return text

    return check


def exported_step(run: Path) -> int | None:
    """Return None for a finished run, else its newest checkpoint's step. Raises ValueError if there is none."""
    from notus.evaluation.resolve_model import newest_checkpoint
    from notus.training.checkpoint import step_of
    from notus.training.run_folder import MODEL, is_extending

    return None if (run / MODEL).is_dir() and not is_extending(run) else step_of(newest_checkpoint(run))


def model_card(release: Release, *, chat: bool, generation: bool = True) -> str:
    """Return the card; `chat`: the tokenizer has a chat template. `generation`: there is a generation config.

    Raises ValueError, naming the file, if one of the run's files or the base model's card is not as it should be.
    """
    from notus.evaluation.read_run import RESULT_FILES
    from notus.training.run_data import DATA_FILE
    from notus.training.run_folder import CONFIG_FILE
    from notus.training.tracking import ENVIRONMENT_FILE, METRICS_FILE

    run = release.run
    rows = parse_files(CONFIG_FILE, [run.folder], lambda: run.rows)
    licence = {"license": release.licence} if release.licence else _base_licence(run.base)

    def of(files: str, make: Callable[[], T]) -> T:
        return parse_files(files, [run.folder], make)

    evaluations = of(RESULT_FILES, lambda: list(_evaluation_results(release)))
    noted = {
        "counts": of(DATA_FILE, lambda: list(_counts(run.data, of(CONFIG_FILE, lambda: run.unit)))),
        "machine": of(ENVIRONMENT_FILE, lambda: list(_machine(run.environment))),
        "course": of(METRICS_FILE, lambda: list(_course(release.metrics, rows, release.model_step))),
        "results": of(RESULT_FILES, lambda: [_table(result, release) for result in run.results]),
    }

    def render() -> str:
        sources = [Path(source["path"]).name for source in run.settings["data"]["train"]]
        other = run.reference if run.reference != run.base else None
        try:
            return _template().render(
                {**run.settings, **noted},
                metadata=_metadata(release, licence, evaluations).to_yaml(),
                identifier=json.dumps(release.identifier, ensure_ascii=False),  # also as Python writes it
                name=_one_line(release.title),
                held_out=_held_out(run.settings["data"].get("eval_size")),
                last_tokens=0 if chat else _last_tokens(release),
                summary=_summary(release),
                release=release,
                licence=licence,
                unit=run.unit,
                loss=None if run.loss is None else _loss(run.loss, other),
                citations=[] if run.loss is None else citations(run.loss.papers),
                chat=chat,
                generation=generation,
                ultrafeedback="ultrafeedback" in " ".join(sources).lower(),
            )
        except jinja2.UndefinedError as error:
            raise LookupError(str(error)) from error

    text = of(CONFIG_FILE, render)
    text = text.encode("utf-8", "replace").decode("utf-8")  # UTF-8 cannot hold half of a surrogate pair
    ModelCard(text)  # raises ValueError for a header that the hub's client could not read
    return text


def _loss(loss: "RunLoss", reference: str | None) -> dict[str, str]:
    """The loss's rows of the table of settings; `reference`: the reference model, if it is not the base model."""
    values = {"beta": loss.beta, **loss.options, **loss.additions}
    named = {_SETTINGS.get(name, name.replace("_", " ")): value for name, value in values.items()}
    other = {} if reference is None else {"reference model": public_name(reference)}
    model = other if loss.reference else {"reference model": "none"}
    words = {name: setting(value) for name, value in named.items()}
    return {"loss": loss.name, **model, **words}


def citations(papers: Sequence[str]) -> list[str]:
    """Return the BibTeX entries of papers, given by their arXiv ids; of one that is not known, its id alone."""
    entries = _PAPERS.read_text(encoding="utf-8").strip().split("\n\n")
    known = {entry.rpartition("arxiv.org/abs/")[2].partition("}")[0]: entry for entry in entries}
    return [
        known.get(paper) or f"@misc{{arxiv{paper},\n  url = {{https://arxiv.org/abs/{paper}}}\n}}" for paper in papers
    ]


def signed(text: str) -> str:
    """Return a card with a last line, invisible on the page, by which `is_untouched` recognises it."""
    return f"{text}\n<!-- {_SIGNED}{digest(text)} -->\n"


def is_untouched(path: Path) -> bool:
    """Return whether a file is a card as `signed` made it."""
    text, found, end = path.read_text(encoding="utf-8", errors="replace").rpartition(f"\n<!-- {_SIGNED}")
    return bool(found) and end == f"{digest(text)} -->\n"


def digest(text: str) -> str:
    """Return the SHA-256 of a string."""
    return hashlib.sha256(text.encode()).hexdigest()


def has_chat_template(folder: Path) -> bool:
    """Return whether the tokenizer in a folder has a chat template, and the model learned with one."""
    from notus.model.load import read_json
    from notus.model.usage import learned_plain_text

    config = folder / "tokenizer_config.json"
    found = (folder / "chat_template.jinja").is_file() or (
        config.is_file() and bool(read_json(config).get("chat_template"))
    )
    return found and not learned_plain_text(folder)


def has_generation_config(folder: Path) -> bool:
    """Return whether a folder says how to generate; adapters of early versions do not."""
    return (folder / "generation_config.json").is_file()


def will_have_chat_template(run: "Run") -> bool:
    """Predict the same before a folder exists: by what the run learned, and the base model's files here."""
    from notus.evaluation.resolve_model import learned_chat, rows_are_plain_text
    from notus.training.run_data import DATA_FILE

    def learned(what: Callable[[], bool]) -> bool:
        return parse_files(DATA_FILE, [run.folder], what)

    if run.data and learned(lambda: rows_are_plain_text(run.data)):
        return False
    found = _base_file(run.base, "tokenizer_config.json")
    return learned(lambda: learned_chat(run.settings, run.data)) or (
        found is not None and has_chat_template(found.parent)
    )


def _base_file(base: str, name: str) -> Path | None:
    """Return a file of the base model, if it is on this machine; nothing is downloaded."""
    if hub_id(base) is None:
        path = Path(base).expanduser() / name
        return path if path.is_file() else None
    cached = try_to_load_from_cache(base, name)
    return Path(cached) if isinstance(cached, str) else None


def _base_licence(base: str) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` as far as the base model's own card states them.

    Raises ValueError, naming the card, if it cannot be read.
    """
    path = _base_file(base, "README.md")
    try:
        stated = (metadata_load(path) if path else None) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: its metadata is no YAML; correct it, or state the licence with --license") from error
    if not isinstance(stated.get("license"), str):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: _one_space(stated[key]) for key in keys if stated.get(key)}


def _metadata(release: Release, licence: Mapping[str, str], results: list[EvalResult]) -> ModelCardData:
    run, adapter, base = release.run, release.variant == "adapter", release.public_base
    datasets = dict.fromkeys(filter(None, (hub_id(source["path"]) for source in run.settings["data"]["train"])))
    tags = ["sft"] if run.loss is None else [*_methods(run.loss), "alignment", "preference-optimization"]
    relation = {"base_model_relation": "adapter" if adapter else "finetune"} if base else {}
    optional: dict[str, Any] = {**licence, **relation}
    return ModelCardData(
        base_model=base,
        datasets=list(datasets) or None,
        eval_results=results or None,
        language=list(release.languages) or None,
        library_name="peft" if adapter else "transformers",
        model_name=release.title if results else None,
        pipeline_tag="text-generation",
        tags=["notus", *tags, *(["lora"] if run.settings["lora"]["rank"] else [])],
        **optional,
    )


def _methods(loss: "RunLoss") -> list[str]:
    """What the hub calls the method: "dpo" for losses of pairs with a reference, else the names of the losses."""
    return ["dpo"] if _is_dpo(loss) else [name.replace("_", "-") for name in loss.names]


def _is_dpo(loss: "RunLoss") -> bool:
    return loss.rows == "pairs" and loss.reference


def _evaluation_results(release: Release) -> Iterator[EvalResult]:
    """Yield the figures for `model-index`.

    The hub groups them by dataset and keeps one name for each group. A figure with another name than its group has
    that name in its metric's name.
    """
    names: dict[str, str] = {}
    for result in release.run.results:
        for figure in () if _other_model(result, release) else result.figures:
            if not math.isfinite(figure.value):
                continue
            kind, label = _dataset_type(figure), _figure_label(figure)
            group = names.setdefault(kind, label)
            yield EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=kind,
                dataset_name=group,
                metric_type=re.sub(r"\W+", "_", figure.metric.lower()).strip("_"),
                metric_name=figure.metric if group == label else f"{label}: {figure.metric}",
                metric_value=float(f"{figure.value:.6g}"),  # more digits say nothing about the model
            )


def _other_model(result: Result, release: Release) -> str | None:
    """Return what a result is of, if not of the card's model: another step of the run, or what a scored file names."""
    match = _STEP.search(result.model)
    if match is not None and int(match[1]) != release.model_step:
        return f"the model after step {match[1]}"
    named = _STEP.sub("", result.model).rstrip()
    scored = any(result.settings.get(name) for name in _SCORED_FILES)
    if scored and Path(named).name != release.run.folder.resolve().name:
        return f"`{public_name(named)}`, as its file has it"
    return None


def _figure_label(figure: Figure) -> str:
    """Return a benchmark with its set-up, as "HellaSwag (10-shot)"."""
    return _one_space(f"{figure.name} ({figure.setup})" if figure.setup else figure.name)


def _dataset_type(figure: Figure) -> str:
    """Return the hub id of the data; for a local file or a bare name, a word of the same form."""
    name = figure.dataset or figure.name
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and hub_id(name):
        return name
    return re.sub(r"[^\w.-]+", "-", name.rstrip("/").rpartition("/")[2].lower()).strip("-.") or "unknown"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = lambda value: _one_line(value).replace("|", "\\|")
    environment.filters["setting"] = setting
    environment.filters["public"] = public_name
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _one_space(value: Any) -> str:
    return " ".join(str(value).split())


def _one_line(value: Any) -> str:
    """Return any name as text within a line of Markdown: it starts no block, and no HTML tag."""
    return _one_space(value).replace("<", "&lt;")


def _summary(release: Release) -> str:
    run, name, base = release.run, _one_line(release.title), release.public_base
    link = f"[{base}](https://huggingface.co/{base})" if base else _code(public_name(run.base))
    how = {
        "full": f"{name} is {link}, all of its weights trained",
        "adapter": f"{name} is a LoRA adapter for {link}, trained",
        "merged": f"{name} is {link} with a LoRA adapter merged into its weights, which was trained",
    }[release.variant]
    what = "supervised fine-tuning (SFT)"
    if run.loss is not None:
        what = (
            "Direct Preference Optimization (DPO)"
            if _is_dpo(run.loss)
            else f"preference optimization ({run.loss.name})"
        )
        what += "" if run.loss.rows == "pairs" else f" with {run.unit}"
    sources = dict.fromkeys(_code(public_name(source["path"])) for source in run.settings["data"]["train"])
    return f"{how} by {what} on {', '.join(sources)}."


def _code(name: str) -> str:
    """Return a name between backticks, which cannot hold one."""
    return "`" + _one_space(name).replace("`", "'") + "`"


def _counts(data: Mapping[str, Any], unit: str) -> Iterator[str]:
    """Yield each split's rows, called `unit`, their sources, and what was dropped."""
    for purpose, key in (("training", "train"), ("evaluation", "eval")):
        split = data.get(key)
        if not split:
            continue
        yield f"{purpose}: {split['rows']:,} {unit}"
        if labels := split.get("labels"):
            yield f"{purpose}: {labels['true']:,} good and {labels['false']:,} bad completions"
        if split.get("sources"):
            yield f"{purpose}, rows by source: {_listed(split['sources'])}"
        report = split.get("report")
        if report:
            dropped = _listed(report["dropped"]) or "none"
            cut = f"{report['prompts_cut']:,} prompts, {report['completions_cut']:,} rows' completions"
            yield f"{purpose}: {report['read']:,} rows read; dropped: {dropped}; cut to length: {cut}"
            if report.get("left_out"):
                yield f"{purpose}: {report['left_out']:,} completions of lists left out, without a rating or text"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{_one_line(name)} {number:,}" for name, number in counts.items())


def _machine(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if environment.get("hardware"):
        yield "hardware", f"{environment['hardware']} (processes: {environment['world_size']})"
    if environment.get("seconds"):
        yield "training time", duration(float(environment["seconds"]))
    if environment.get("versions"):
        yield "software", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())


def _course(metrics: Sequence[Mapping[str, Any]], rows: str, model_step: int) -> Iterator[dict[str, str]]:
    """Yield the first and the last value of each metric that the card shows; `first` is "" if there is only one.

    The last evaluation is that of the model, which `training.best_metric` may have chosen.
    """
    shown = {key: f"{name}, training" for key, name in _COURSE.items()} | {"loss": "training loss"}
    sides = zip(("chosen", "rejected"), _SIDES.get(rows, ()), strict=False)
    held_out = {**_COURSE, **{f"rewards/{key}": f"reward of {name}" for key, name in sides}}
    shown |= {f"eval_{key}": f"{name}, held-out" for key, name in held_out.items()}
    for key, name in shown.items():
        until = model_step if key.startswith("eval_") else math.inf
        lines = [line for line in metrics if key in line and math.isfinite(line[key]) and line["step"] <= until]
        if not lines:
            continue
        unit = "share" if key.removeprefix("eval_") in _SHARES else ""
        first, last = (f"{number(float(line[key]), unit)} (step {line['step']:,})" for line in (lines[0], lines[-1]))
        if not key.startswith("eval_") and len(lines) > 2 * _LAST:  # single steps are noisy, the last one often small
            mean = number(fmean(line[key] for line in lines[-_LAST:]), unit)
            last = f"{mean} (mean of the last {_LAST}, to step {lines[-1]['step']:,})"
        yield {"name": name, "first": first if len(lines) > 1 else "", "last": last}


def _held_out(size: float | None) -> str:
    """Say how many training rows were held out: a number of rows, or a share of them; nothing for none."""
    if not size:
        return ""
    return f"{number(float(size), 'share')} of the training rows" if size < 1 else f"{size:,} of the training rows"


def _last_tokens(release: Release) -> int:
    """Return how many tokens the tokenizer adds at the end (an EOS, say), which a prompt of training lacks."""
    from tokenizers import Tokenizer

    from notus.training.run_folder import MODEL

    final = release.run.folder / MODEL / "tokenizer.json"
    path = final if final.is_file() else _base_file(release.run.base, final.name)
    if path is None:
        return 0
    tokenizer = Tokenizer.from_file(str(path))
    plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return max(0, len(full) - start - len(plain))


def _table(result: Result, release: Release) -> dict[str, Any]:
    peers = list(dict.fromkeys(peer for figure in result.figures for peer in figure.reference))
    rows = [
        {
            "label": _figure_label(figure),
            "metric": figure.metric,
            "value": number(figure.value, figure.unit),
            "stderr": NONE if figure.stderr is None else number(figure.stderr, figure.unit),
            "count": NONE if figure.count is None else f"{figure.count:,}",
            "peers": [number(figure.reference.get(peer, math.nan), figure.unit) for peer in peers],
        }
        for figure in result.figures
    ]
    return {
        "suite": result.suite,
        "date": result.date,
        "other": _other_model(result, release),
        "peers": peers,
        "rows": rows,
    }
