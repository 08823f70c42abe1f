"""`python -m notus evaluate MODEL --suite alpaca-eval`: AlpacaEval's outputs file, its judging, and the scores.

With --annotations FILE and without a model, the scores of annotations that are there already.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.answers import add_answer_arguments, answer, answer_settings
from notus.evaluation.arguments import add_model_arguments, add_output_argument
from notus.evaluation.evaluate import add_suite_argument
from notus.evaluation.files import hold_folder, replacing
from notus.evaluation.results import Figure, Result, model_name, result_folder, write_result

if TYPE_CHECKING:
    from notus.evaluation.alpaca_eval.annotations import Annotation, Scores
    from notus.evaluation.alpaca_eval.prompts import Instruction

SUITE = "alpaca-eval"
OUTPUTS = "model_outputs.json"
GENERATION = "generation"
NAME = "AlpacaEval"
PROMPTS = 805  # of its own
# Published win rates, in percent, and whose they are: of this judge against this baseline.
PUBLISHED = {"Zephyr-7B-β": 90.60, "Notus 7B v1": 91.42}
PUBLISHED_BY = ("alpaca_eval_gpt4", "text_davinci_003")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_suite_argument(parser)
    add_model_arguments(parser, optional=True)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help=".json list or .jsonl of {instruction, dataset?} (default: AlpacaEval's 805, from the hub)",
    )
    add_answer_arguments(parser)
    parser.add_argument(
        "--judge",
        metavar="CONFIG",
        help="have the outputs judged by the alpaca_eval package: its annotator's config, as alpaca_eval_gpt4 or "
        "weighted_alpaca_eval_gpt4_turbo, or the folder of one",
    )
    parser.add_argument(
        "--reference-outputs",
        metavar="FILE",
        help="outputs to compare with: a file as AlpacaEval has them, or text_davinci_003 or gpt4_1106_preview, from "
        "the hub (default: gpt4_1106_preview for a judge called weighted_..., else text_davinci_003)",
    )
    parser.add_argument("--annotations", metavar="FILE", help="score this annotations.json; takes no model")
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
    from notus.evaluation.alpaca_eval.prompts import HUB_ID
    from notus.evaluation.models import find_together
    from notus.runtime import distributed

    with distributed.process_group() as device:
        source = find_together(args.model, trust_remote_code=args.trust_remote_code)
        folder = result_folder(args.output, source.run, args.model, SUITE)
        # What the judge needs is looked up before the hours of generation.
        instructions, judge = distributed.on_main(lambda: _prepare(args))
        distributed.on_main(lambda: hold_folder(folder))
        answers = answer(
            source,
            [instruction.text for instruction in instructions],
            [instruction.place for instruction in instructions],
            args,
            kept=folder / GENERATION,
            device=device,
        )
        outputs = [
            {"instruction": asked.text, "output": text, "generator": model_name(args.model), "dataset": asked.dataset}
            for asked, text in zip(instructions, answers.texts, strict=True)
        ]
        settings = {**answers.settings, "prompts": args.prompts or HUB_ID, "judge": args.judge}
        speaks = distributed.is_main()
    if speaks:  # judging can take hours, and the other ranks have no part in it
        _finish(folder, source.name, outputs, judge, settings)
    return 0


@dataclasses.dataclass(frozen=True)
class _Judge:
    """An annotator's config, and what it compares with; `standard`: AlpacaEval's own instructions, in their order."""

    config: str
    baseline: list[dict[str, Any]]
    standard: bool


def _prepare(args: argparse.Namespace) -> tuple[list["Instruction"], _Judge | None]:
    from notus.evaluation.alpaca_eval import judge, prompts

    config = judge.find_judge(args.judge) if args.judge else None
    instructions = prompts.read_instructions(Path(args.prompts)) if args.prompts else prompts.hub_instructions()
    if config is None:
        return instructions, None
    name = args.reference_outputs
    if name is None:
        name = "gpt4_1106_preview" if Path(config).name.startswith("weighted_") else "text_davinci_003"
    path = prompts.hub_file(prompts.BASELINES[name]) if name in prompts.BASELINES else Path(name)
    baseline = prompts.match_outputs(prompts.read_outputs(path), instructions, name)
    return instructions, _Judge(config, baseline, standard=args.prompts is None)


def _finish(
    folder: Path, model: str, outputs: list[dict[str, Any]], judge: _Judge | None, settings: dict[str, Any]
) -> None:
    """Write the outputs, have them judged, write the result; for rank 0."""
    from notus.evaluation.alpaca_eval import judge as judging
    from notus.evaluation.alpaca_eval.annotations import read_annotations

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / OUTPUTS) as file:
        file.write(json.dumps(outputs, indent=2) + "\n")
    print(f"{len(outputs)} outputs of {model}: {folder / OUTPUTS}", flush=True)
    if judge is None:
        print("not judged: run again with --judge CONFIG, or score annotations of them with --annotations FILE")
        write_result(folder, Result(SUITE, model, [_length(outputs, settings)], settings))
        return
    annotations = judging.judge_outputs(
        judge.config, outputs, judge.baseline, folder / f"judge-{Path(judge.config).name}"
    )
    controlled = _length_controlled(annotations) if judge.standard else None
    _report(folder, read_annotations(annotations), model, settings, controlled)


def _length_controlled(annotations: Path) -> dict[str, float] | None:
    from notus.evaluation.alpaca_eval.judge import length_controlled

    try:
        return length_controlled(annotations)
    except ValueError as error:  # the win rate itself stands
        print(error)
        return None


def _score_file(args: argparse.Namespace) -> int:
    from notus.evaluation.alpaca_eval.annotations import read_annotations

    own = {"suite", "annotations", "output", "run"}
    for name, value in vars(args).items():
        if name not in own and value is not None and value is not False:
            option = f"the model {value}" if name == "model" else "--" + name.replace("_", "-")
            raise ValueError(f"{option} has no effect with --annotations, which are scored as they are: leave it out")
    entries = read_annotations(Path(args.annotations))
    model = entries[0].generator
    _report(result_folder(args.output, None, model, SUITE), entries, model, {"annotations": args.annotations})
    return 0


def _report(
    folder: Path,
    entries: list["Annotation"],
    model: str,
    settings: dict[str, Any],
    controlled: dict[str, float] | None = None,
) -> None:
    """Print the scores and write the result."""
    from notus.evaluation.alpaca_eval.annotations import score

    scores = score(entries)
    judges = sorted({entry.annotator for entry in entries})
    baselines = sorted({entry.baseline for entry in entries})
    dataset = _dataset(settings)
    figures = _figures(scores, judges, baselines, controlled, dataset)
    settings = {**settings, "annotators": judges, "baselines": baselines}
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


def _figures(
    scores: "Scores",
    judges: list[str],
    baselines: list[str],
    controlled: dict[str, float] | None,
    dataset: str | None,
) -> list[Figure]:
    """Win rates in percent, and the average length; published ones only beside the same judge and baseline."""
    setup = f"judged by {', '.join(judges)} against {', '.join(baselines)}"
    count = scores.count + scores.left_out
    setup += "" if count == PROMPTS else f", {count} prompts"
    comparable = (judges, baselines) == ([PUBLISHED_BY[0]], [PUBLISHED_BY[1]])

    def rate(metric: str, value: float, stderr: float | None, reference: dict[str, float]) -> Figure:
        return Figure(NAME, metric, value, "%", stderr, scores.count, setup, dataset, reference)

    figures = [rate("win_rate", scores.win_rate, scores.standard_error, PUBLISHED if comparable else {})]
    if controlled is not None:
        figures.append(rate("length_controlled_win_rate", controlled["win_rate"], controlled["stderr"], {}))
    if scores.discrete_win_rate != scores.win_rate:
        figures.append(rate("discrete_win_rate", scores.discrete_win_rate, scores.discrete_standard_error, {}))
    return [*figures, Figure(NAME, "avg_length", scores.average_length, "", None, count, "characters", dataset)]


def _length(outputs: list[dict[str, Any]], settings: dict[str, Any]) -> Figure:
    length = sum(len(output["output"]) for output in outputs) // len(outputs)
    return Figure(NAME, "avg_length", length, "", None, len(outputs), "characters", _dataset(settings))


def _dataset(settings: dict[str, Any]) -> str | None:
    """The prompts as a card names them: the hub's id, or a file's name; None where annotations alone are known."""
    from notus.evaluation.alpaca_eval.prompts import HUB_ID

    prompts = settings.get("prompts")
    return prompts if prompts in (None, HUB_ID) else Path(prompts).name
