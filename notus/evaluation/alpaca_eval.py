"""`python -m notus evaluate MODEL --suite alpaca-eval`: AlpacaEval (Li et al. 2023, github.com/tatsu-lab/alpaca_eval).

The model's outputs are written to AlpacaEval's file, and the `alpaca_eval` package judges them. With --annotations FILE
and without a model, existing annotations are scored, which does not need the package.
"""

import argparse
import dataclasses
import difflib
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from notus.evaluation.arguments import add_model_arguments, add_output_argument, check_no_effect
from notus.evaluation.evaluate import add_suite_argument
from notus.evaluation.generate import add_answer_arguments, answer, answer_settings
from notus.evaluation.input_files import check_unique, fetch, read_entries
from notus.evaluation.intervals import stderr
from notus.evaluation.prompts import Prompt
from notus.evaluation.results import Figure, Result, hold_folder, model_name, result_folder, write_result
from notus.runtime.files import replacing, write_text
from notus.runtime.process import first_line

SUITE, NAME = "alpaca-eval", "AlpacaEval"
OUTPUTS, GENERATION, ANNOTATIONS = "model_outputs.json", "generation", "annotations.json"
HUB_ID = "tatsu-lab/alpaca_eval"
# The baselines' outputs on the hub, by the baselines' names; each file holds the same 805 instructions. The dataset has
# a loading script, which `datasets` no longer runs, so its JSON files are downloaded.
BASELINES = {"text_davinci_003": "alpaca_eval.json", "gpt4_1106_preview": "alpaca_eval_gpt4_baseline.json"}
PROMPTS = 805
# Published win rates, in percent, and the judge and the baseline that they are of.
PUBLISHED = {"Zephyr-7B-β": 90.60, "Notus 7B v1": 91.42}
PUBLISHED_BY = (["alpaca_eval_gpt4"], ["text_davinci_003"])
PACKAGE = "pip install alpaca-eval 'setuptools<81'"
CHUNK = 32  # pairs between two saves of what has been judged


Id = Annotated[str, Field(coerce_numbers_to_str=True)]  # files may number their data sets and models
Name = Annotated[Id, BeforeValidator(lambda value: value or "unknown")]


class Instruction(BaseModel):
    """An instruction to answer, and the dataset that it comes from."""

    instruction: str
    dataset: Id | None = None

    @field_validator("instruction")
    @classmethod
    def _is_not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("the instruction is blank")
        return value


class Output(Instruction):
    """A baseline's answer to an instruction; other keys are kept for the package."""

    model_config = ConfigDict(extra="allow")

    output: str
    generator: Id | None = None


class Annotation(BaseModel):
    """A judge's verdict on one pair: `preference` from 1 (the baseline is better) to 2; None: there is none."""

    instruction: str
    output_1: str | None = None
    output_2: str
    generator_1: Name = "unknown"
    generator_2: str
    dataset: Id | None = None
    annotator: Name = "unknown"
    preference: float | None

    @field_validator("preference", mode="before")
    @classmethod
    def _read_preference(cls, value: Any) -> float | None:
        """NaN is what the package writes for None; 0 is what old annotators wrote for a tie."""
        if value is None or value != value:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (value == 0 or 1 <= value <= 2):
            raise ValueError(f"the preference {str(value)[:20]} is out of range; it goes from 1 to 2, or is null")
        return 1.5 if value == 0 else float(value)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a file of annotations says."""

    win_rate: float  # mean of preference - 1 in percent, as the package has it
    # of `win_rate`, in percent: the sample's standard deviation over √count, as the package has it.
    standard_error: float | None
    # wins and half of the ties in percent of `count`, the package's too. The same where every preference is 1, 1.5 or
    # 2, as the judges of AlpacaEval 1 give them; those of AlpacaEval 2 weigh.
    discrete_win_rate: float
    discrete_standard_error: float | None  # of `discrete_win_rate`, in percent
    # wins, losses, ties: preferences above, below and at 1.5.
    wins: int
    losses: int
    ties: int
    count: int  # annotated entries, the sum of these three
    left_out: int  # entries without a preference
    average_length: int  # mean of all the model's outputs in characters, cut to an integer as the package does


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_suite_argument(parser)
    add_model_arguments(parser, optional=True)
    parser.add_argument(
        "--prompts",
        type=os.path.expanduser,
        metavar="FILE",
        help=".json list or .jsonl of {instruction, dataset?} (default: AlpacaEval's 805, from the hub)",
    )
    add_answer_arguments(parser)
    parser.add_argument(
        "--judge",
        type=os.path.expanduser,
        metavar="CONFIG",
        help="have the outputs judged by the alpaca_eval package: its annotator's config, as alpaca_eval_gpt4 or "
        "weighted_alpaca_eval_gpt4_turbo, or the folder of one",
    )
    parser.add_argument(
        "--reference-outputs",
        type=os.path.expanduser,
        metavar="FILE",
        help="outputs to compare with: a file as AlpacaEval has them, or text_davinci_003 or gpt4_1106_preview, from "
        "the hub (default: gpt4_1106_preview for a judge called weighted_..., else text_davinci_003)",
    )
    parser.add_argument(
        "--annotations", type=os.path.expanduser, metavar="FILE", help="score this annotations.json; takes no model"
    )
    add_output_argument(parser, SUITE)


def run(args: argparse.Namespace) -> int:
    """Evaluate as `args` say, return 0; under torchrun the ranks share the generation.

    Raises ValueError or OSError with a message for the user.
    """
    if args.annotations is not None:
        return _score_file(args)
    if args.model is None:
        raise ValueError("name a MODEL_OR_RUN to evaluate, or annotations to score with --annotations FILE")
    if args.reference_outputs is not None and args.judge is None:
        raise ValueError("--reference-outputs has no effect without a judge: set --judge as well")
    answer_settings(args)
    from notus.evaluation.resolve_model import find_together
    from notus.runtime import distributed

    with distributed.process_group() as device:
        source = find_together(args.model, trust_remote_code=args.trust_remote_code)
        folder = result_folder(args.output, source.run, args.model, SUITE)
        # What the judge needs is looked up before the hours of generation.
        asked, judge, baseline = distributed.on_main(lambda: _prepare(args))
        distributed.on_main(lambda: hold_folder(folder))
        instructions = [instruction for _, instruction in asked]
        prompts = [Prompt(place, instruction.instruction) for place, instruction in asked]
        answers, described = answer(source, prompts, args, kept=folder / GENERATION, device=device)
        speaks = distributed.is_main()
    if not speaks:  # judging can take hours, and the other ranks have no part in it
        return 0
    outputs = [
        {**instruction.model_dump(), "output": text, "generator": model_name(args.model)}
        for instruction, text in zip(instructions, answers, strict=True)
    ]
    settings = {**described, "prompts": args.prompts or HUB_ID, "judge": args.judge}
    write_text(folder / OUTPUTS, json.dumps(outputs, indent=2) + "\n")
    print(f"{len(outputs)} outputs of {source.name}: {folder / OUTPUTS}", flush=True)
    if judge is None:
        print("not judged: run again with --judge CONFIG, or score annotations of them with --annotations FILE")
        length = sum(map(len, answers)) // len(answers)
        write_result(folder, Result(SUITE, source.name, [_length(length, len(outputs), settings)], settings))
        return 0
    annotations = judge_outputs(judge, outputs, baseline, folder / f"judge-{Path(judge).name}")
    controlled = None
    if args.prompts is None:  # AlpacaEval's own instructions
        try:
            controlled = length_controlled(annotations)
        except ValueError as error:  # the win rate itself stands
            print(error)
    _report(folder, read_annotations(annotations), source.name, settings, controlled)
    return 0


def _prepare(args: argparse.Namespace) -> tuple[list[tuple[str, Instruction]], str | None, list[dict[str, Any]]]:
    """Return the instructions with their places; the judge's config, if there is one; and the baseline's outputs."""
    judge = find_judge(args.judge) if args.judge else None
    asked = read_instructions(Path(args.prompts) if args.prompts else None)
    if judge is None:
        return asked, None, []
    usual = "gpt4_1106_preview" if Path(judge).name.startswith("weighted_") else "text_davinci_003"
    return asked, judge, baseline_outputs(args.reference_outputs or usual, asked)


def read_instructions(path: Path | None) -> list[tuple[str, Instruction]]:
    """Read a .json list or .jsonl file of {instruction, dataset?}; None: AlpacaEval's 805, from the hub.

    Raises ValueError, naming file and entry, for what is no instruction, one that is there twice, or an empty file.
    """
    if path is None:
        return read_entries(_hub_file(BASELINES["text_davinci_003"]), Instruction, "AlpacaEval's instructions")
    rows = read_entries(path, Instruction, "at least one {instruction, dataset?}")
    check_unique([(place, row.instruction) for place, row in rows], "instruction")
    return [(place, row.model_copy(update={"dataset": row.dataset or path.stem})) for place, row in rows]


def baseline_outputs(name: str, asked: Sequence[tuple[str, Instruction]]) -> list[dict[str, Any]]:
    """Return the outputs of a baseline, or of a file of {instruction, output, generator}, in the order of `asked`.

    Raises ValueError, naming file and entry, for what is no output, and where one is missing.
    """
    path = _hub_file(BASELINES[name]) if name in BASELINES else Path(name)
    outputs = {
        row.instruction: {**row.model_dump(exclude_unset=True), "generator": row.generator or path.stem}
        for _, row in read_entries(path, Output, "outputs: {instruction, output, generator}")
    }
    for place, wanted in asked:
        if wanted.instruction not in outputs:
            raise ValueError(
                f"{name}: holds no output for the instruction of {place}; give the baseline's outputs for the same "
                "instructions with --reference-outputs FILE"
            )
    return [outputs[wanted.instruction] for _, wanted in asked]


def _hub_file(name: str) -> Path:
    remedy = "files of your own: --prompts FILE, and --reference-outputs FILE for a judge"
    return fetch(HUB_ID, name, "dataset", remedy)


def find_judge(name: str) -> str:
    """Return an annotator's config of the package by its name, or a folder with configs.yaml, as the package takes it.

    Raises ValueError if the package is not installed, or has no such config.
    """
    package = _package()
    if (Path(name) / "configs.yaml").is_file():
        return str(Path(name).resolve())
    known = sorted(path.parent.name for path in package.constants.EVALUATORS_CONFIG_DIR.glob("*/configs.yaml"))
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}, or give the folder of one"
    raise ValueError(f"--judge {name}: alpaca_eval has no such annotator's config; {hint}")


def _package() -> ModuleType:
    level = logging.getLogger().level
    try:
        importlib.import_module("alpaca_eval.main")  # a folder of the name alpaca_eval has no such module
        return importlib.import_module("alpaca_eval")
    except ImportError as error:
        raise ValueError(f"a judge needs the package alpaca_eval ({first_line(error)}): {PACKAGE}") from error
    finally:
        logging.getLogger().setLevel(level)  # the package turns every library's log on


def judge_outputs(config: str, outputs: list[dict[str, Any]], baseline: list[dict[str, Any]], folder: Path) -> Path:
    """Have the package compare `outputs` with `baseline`, in the same order, and return its annotations file.

    All files of the package are in `folder`. Verdicts are kept there, chunk by chunk: after a failure the same call
    resumes, and asks again for those that are missing. Raises ValueError, with the package's message, if the judge
    failed.
    """
    package = _package()
    folder.mkdir(parents=True, exist_ok=True)
    # Verdicts under another config or prompt are not this judge's.
    files = sorted((package.constants.EVALUATORS_CONFIG_DIR / config).glob("*.*"))
    texts = b"".join(path.read_bytes() for path in files if path.suffix in (".yaml", ".txt"))
    try:
        _, annotations = package.evaluate(
            outputs,
            baseline,
            annotators_config=config,
            output_path=None,
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            is_cache_leaderboard=False,
            fn_metric="get_winrate",
            sort_by="win_rate",
            annotation_kwargs={"chunksize": CHUNK},
            Annotator=_annotator(package),
            caching_path=folder / f"judged-{hashlib.sha256(texts).hexdigest()[:8]}.json",
        )
    except Exception as error:  # whatever a judge and its client raise
        raise ValueError(
            f"the judge {config} failed ({type(error).__name__}: {first_line(error)}); outputs and verdicts so far "
            f"are kept: fix the cause and run the same command again"
        ) from error
    frame = package.utils.convert_to_dataframe(annotations)
    frame.to_json(folder / ANNOTATIONS, orient="records", indent=2)
    return folder / ANNOTATIONS


def _annotator(package: ModuleType) -> type:
    """Return the package's annotator, but with verdicts that survive a kill, and missing ones asked for again.

    With pandas 3 the package cannot put a tie into verdicts that were read back as integers.
    """
    base: Any = package.annotators.PairwiseAnnotator

    class Annotator(base):
        df_annotations: Any

        def save(self, path: Path | None = None) -> None:
            with replacing(path or self.caching_path) as temporary:
                super().save(temporary)

        def load_(self, path: Path | None = None) -> None:
            super().load_(path)
            if self.df_annotations is not None:
                kept = self.df_annotations.astype({self.annotation_key: float})
                self.df_annotations = kept[kept[self.annotation_key] != self.TMP_MISSING_ANNOTATION]

    return Annotator


def length_controlled(annotations: Path) -> tuple[float, float]:
    """Return the package's length-controlled win rate and its standard error, in percent, for the hub's instructions.

    Raises ValueError if the package cannot compute it; its data come from the hub.
    """
    try:
        metrics = importlib.import_module("alpaca_eval.metrics").get_length_controlled_winrate(
            json.loads(annotations.read_text(encoding="utf-8")), save_weights_dir=annotations.parent / "weights"
        )
    except Exception as error:  # the hub's client, or the fit
        raise ValueError(f"no length-controlled win rate ({type(error).__name__}: {first_line(error)})") from error
    return float(metrics["length_controlled_winrate"]), float(metrics["lc_standard_error"])


def _score_file(args: argparse.Namespace) -> int:
    reason = "with --annotations, which are scored as they are"
    check_no_effect(args, add_arguments, reason, but={"suite", "annotations", "output"})
    entries = read_annotations(Path(args.annotations))
    model = entries[0].generator_2
    _report(result_folder(args.output, None, model, SUITE), entries, model, {"annotations": args.annotations})
    return 0


def read_annotations(path: Path) -> list[Annotation]:
    """Read a JSON list of annotations of one model, AlpacaEval's `annotations.json`.

    Raises ValueError, naming file and entry: a key is missing, a preference is out of range, two models, the same pair
    twice; or no entry has a preference.
    """
    rows = read_entries(path, Annotation, "AlpacaEval's annotations.json")
    entries = [entry for _, entry in rows]
    for place, entry in rows:
        if entry.generator_2 != entries[0].generator_2:
            raise ValueError(
                f"{place}: generator_2 is {entry.generator_2!r}, that of the first entry is "
                f"{entries[0].generator_2!r}; give each model a file of its own"
            )
    pairs = [(entry.dataset, entry.instruction, entry.output_1, entry.output_2, entry.annotator) for entry in entries]
    check_unique([(place, pair) for (place, _), pair in zip(rows, pairs, strict=True)], "pair")
    if all(entry.preference is None for entry in entries):
        raise ValueError(f"{path}: none of its {len(entries)} entries has a preference; have them judged first")
    return entries


def score(annotations: Sequence[Annotation]) -> Scores:
    """Score annotations of one model, at least one of which has a preference."""
    preferences = [entry.preference for entry in annotations if entry.preference is not None]
    wins = [1.0 if preference > 1.5 else 0.5 if preference == 1.5 else 0.0 for preference in preferences]
    return Scores(
        win_rate=100 * fmean(preference - 1 for preference in preferences),
        standard_error=stderr([100 * preference for preference in preferences]),
        discrete_win_rate=100 * fmean(wins),
        discrete_standard_error=stderr([100 * win for win in wins]),
        wins=wins.count(1.0),
        losses=wins.count(0.0),
        ties=wins.count(0.5),
        count=len(wins),
        left_out=len(annotations) - len(wins),
        average_length=int(fmean(len(entry.output_2) for entry in annotations)),
    )


def _report(
    folder: Path,
    entries: list[Annotation],
    model: str,
    settings: dict[str, Any],
    controlled: tuple[float, float] | None = None,
) -> None:
    """Print the scores and write the result."""
    scores = score(entries)
    judges = sorted({entry.annotator for entry in entries})
    baselines = sorted({entry.generator_1 for entry in entries})
    settings = {**settings, "annotators": judges, "baselines": baselines}
    figures = _figures(scores, controlled, settings)
    path = write_result(folder, Result(SUITE, model, figures, settings, dataclasses.asdict(scores)))
    print(f"{model} against {', '.join(baselines)}, judged by {', '.join(judges)}")
    for figure in figures:
        error = f" ± {figure.stderr:.2f}" if figure.stderr is not None else ""
        print(f"  {figure.metric:28}{figure.value:9.2f}{error} {figure.unit}".rstrip())
    print(
        f"  {scores.count} annotated, {scores.left_out} left out: {scores.wins} wins, {scores.losses} losses, "
        f"{scores.ties} ties"
    )
    for name, value in figures[0].reference.items():
        print(f"  published: {name} {value:.2f} %")
    print(f"wrote {path}")


def _figures(scores: Scores, controlled: tuple[float, float] | None, settings: dict[str, Any]) -> list[Figure]:
    """Return win rates in percent and the average length; published ones only beside the same judge and baseline."""
    judges, baselines = settings["annotators"], settings["baselines"]
    setup = f"judged by {', '.join(judges)} against {', '.join(baselines)}"
    prompts = scores.count + scores.left_out
    setup += "" if prompts == PROMPTS else f", {prompts} prompts"
    published = PUBLISHED if (judges, baselines) == PUBLISHED_BY else {}

    def rate(metric: str, value: float, stderr: float | None, reference: dict[str, float]) -> Figure:
        return Figure(NAME, metric, value, "%", stderr, scores.count, setup, _dataset(settings), reference)

    figures = [rate("win_rate", scores.win_rate, scores.standard_error, published)]
    if controlled is not None:
        figures.append(rate("length_controlled_win_rate", *controlled, {}))
    if scores.discrete_win_rate != scores.win_rate:
        figures.append(rate("discrete_win_rate", scores.discrete_win_rate, scores.discrete_standard_error, {}))
    return [*figures, _length(scores.average_length, prompts, settings)]


def _length(length: int, count: int, settings: dict[str, Any]) -> Figure:
    return Figure(NAME, "avg_length", length, "", None, count, "characters", _dataset(settings))


def _dataset(settings: dict[str, Any]) -> str | None:
    """Return how a card names the prompts: the hub's id or a file's name; None where only annotations are known."""
    prompts = settings.get("prompts")
    return prompts if prompts in (None, HUB_ID) else Path(prompts).name
