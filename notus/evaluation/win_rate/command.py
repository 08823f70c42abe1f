"""`python -m notus evaluate MODEL --against OTHER --suite win-rate`: how often a judge prefers MODEL's answers.

Each side is a model, which answers the prompts of --prompts, or a file of answers. The judge is a function of
the user's, or a model behind an OpenAI-compatible endpoint; it sees every pair in both orders.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.answers import add_answer_arguments, answer, answer_settings
from notus.evaluation.arguments import add_judge_arguments, add_model_arguments, add_output_argument
from notus.evaluation.evaluate import add_suite_argument
from notus.evaluation.files import hold_folder, replacing
from notus.evaluation.results import Figure, Result, result_folder, write_result
from notus.runtime.process import STOPPED, tell

if TYPE_CHECKING:
    import torch

    from notus.evaluation.models import ModelSource
    from notus.evaluation.win_rate.judges import Judge
    from notus.evaluation.win_rate.pairs import Asked, Pair
    from notus.evaluation.win_rate.verdicts import Judged, Scores

SUITE = "win-rate"
VERDICTS = "verdicts.jsonl"
PAIRS = "pairs.jsonl"
GENERATION = "generation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_suite_argument(parser)
    add_model_arguments(parser, optional=True)
    parser.add_argument("--against", metavar="MODEL_OR_RUN", help="the model to compare with, prompted in the same way")
    parser.add_argument(
        "--prompts", metavar="FILE", help=".jsonl, .json or .txt, as `notus generate` reads it; where both are models"
    )
    parser.add_argument(
        "--answers", metavar="FILE", help="in place of MODEL: prompts with its answers, as `notus generate` writes them"
    )
    parser.add_argument("--against-answers", metavar="FILE", help="the same in place of --against")
    add_answer_arguments(parser)
    parser.add_argument(
        "--judge-function",
        metavar="FILE.py:NAME",
        help='judge by a Python function (prompt, answer_a, answer_b) -> "A", "B" or "tie"; or package.module:NAME',
    )
    add_judge_arguments(parser)
    parser.add_argument(
        "--judge-prompt",
        metavar="FILE",
        help="prompt for --judge-model, with {prompt}, {answer_a} and {answer_b}; asks for a last line "
        '"Verdict: A", "Verdict: B" or "Verdict: tie", or [[A]], [[B]], [[C]] (default: one of our own)',
    )
    add_output_argument(parser, SUITE)


def run(args: argparse.Namespace) -> int:
    """Evaluate as `args` say; under torchrun the ranks share the generation, and the first one asks the judge.

    Returns 0, or 75 if a signal left verdicts open. Raises ValueError or OSError with a message for the user.
    """
    _check_sides(args)
    answer_settings(args)
    judge = _judge(args)
    from notus.runtime import distributed

    with distributed.process_group() as device:
        sources = _sources(args)
        files = (args.answers, args.against_answers)
        name, other = (source.name if source else file for source, file in zip(sources, files, strict=True))
        folder = result_folder(
            args.output, sources[0].run if sources[0] else None, args.model or Path(args.answers).stem, SUITE
        )
        distributed.on_main(lambda: hold_folder(folder))
        pairs, settings = _pairs(args, sources, folder / GENERATION, device)
        prompts = args.prompts or args.answers or args.against_answers
        settings = {**settings, "prompts": prompts, "judge": judge.name}
        speaks = distributed.is_main()
    # Judging can take hours, and the other ranks have no part in it.
    return _compare(folder, name, other, pairs, judge, settings) if speaks else 0


def _check_sides(args: argparse.Namespace) -> None:
    """Raise ValueError unless there are two sides, and prompts for them if need be."""
    if (args.model is None) == (args.answers is None):
        raise ValueError("name a MODEL_OR_RUN or a file of its answers with --answers, one of them")
    if (args.against is None) == (args.against_answers is None):
        raise ValueError("name what to compare with: --against MODEL_OR_RUN or --against-answers FILE, one of them")
    files = [file for file in (args.answers, args.against_answers) if file]
    if not files and args.prompts is None:
        raise ValueError("two models need prompts to answer: set --prompts FILE")
    if files and args.prompts is not None:
        raise ValueError(f"--prompts has no effect: the prompts stand in {files[0]}; leave it out")
    if len(files) == 2:
        parser = argparse.ArgumentParser()
        add_model_arguments(parser, optional=True)
        add_answer_arguments(parser)
        _refuse_given(args, parser, "two files of answers, which are taken as they are")


def _refuse_given(args: argparse.Namespace, parser: argparse.ArgumentParser, reason: str) -> None:
    """Raise ValueError if `args` hold something else than the default of one of `parser`'s arguments."""
    for name, default in vars(parser.parse_args([])).items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} has no effect with {reason}: leave it out")


def _judge(args: argparse.Namespace) -> "Judge":
    if (args.judge_function is None) == (args.judge_model is None):
        raise ValueError("name a judge: --judge-function FILE.py:NAME or --judge-model NAME, one of them")
    from notus.evaluation.endpoint import judge_endpoint
    from notus.evaluation.win_rate.judges import PROMPT, endpoint_judge, function_judge

    if args.judge_model is not None:
        template = _template(Path(args.judge_prompt)) if args.judge_prompt else PROMPT
        return endpoint_judge(judge_endpoint(args), template, args.parallel)
    parser = argparse.ArgumentParser()
    add_judge_arguments(parser)
    parser.add_argument("--judge-prompt")
    _refuse_given(args, parser, "--judge-function")
    return function_judge(args.judge_function)


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--judge-prompt {path}: cannot be read ({error}); check the path") from error


def _sources(args: argparse.Namespace) -> tuple["ModelSource | None", "ModelSource | None"]:
    from notus.evaluation.models import find_together

    find = functools.partial(find_together, trust_remote_code=args.trust_remote_code)
    return (
        find(args.model) if args.model is not None else None,
        find(args.against) if args.against is not None else None,
    )


def _pairs(
    args: argparse.Namespace,
    sources: tuple["ModelSource | None", "ModelSource | None"],
    kept: Path,
    device: "torch.device",
) -> tuple[list["Pair"], dict[str, Any]]:
    """Both sides' answers, generated where a side is a model, and how. A collective."""
    from notus.evaluation.win_rate.pairs import Pair
    from notus.runtime.distributed import on_main

    asked, read = on_main(lambda: _read(args))
    sides: list[list[str]] = []
    settings: dict[str, Any] = {}
    for side, source, texts in zip(("model", "against"), sources, read, strict=True):
        if source is not None:
            prompts, places = [one.turns for one in asked], [one.place for one in asked]
            answers = answer(source, prompts, places, args, kept=kept, device=device)
            texts, settings[side] = answers.texts, answers.settings
        assert texts is not None
        sides.append(texts)
    pairs = [Pair(one.text, ours, theirs) for one, ours, theirs in zip(asked, *sides, strict=True)]
    return pairs, settings


def _read(args: argparse.Namespace) -> tuple[list["Asked"], tuple[list[str] | None, list[str] | None]]:
    """The prompts, and the answers of the sides that are files."""
    from notus.evaluation.win_rate.pairs import match, read_answers, read_asked

    if args.answers is None and args.against_answers is None:
        return read_asked(Path(args.prompts)), (None, None)
    if args.answers is None:
        asked, theirs = read_answers(Path(args.against_answers))
        return asked, (None, theirs)
    asked, ours = read_answers(Path(args.answers))
    if args.against_answers is None:
        return asked, (ours, None)
    others, theirs = read_answers(Path(args.against_answers))
    return asked, (ours, match(asked, others, theirs, args.against_answers))


def _compare(folder: Path, name: str, other: str, pairs: list["Pair"], judge: "Judge", settings: dict[str, Any]) -> int:
    """Have the pairs judged, write and print the result; for rank 0. Returns the exit code."""
    from notus.evaluation.win_rate.verdicts import judge_pairs, score

    try:
        judged, failures, unread = judge_pairs(pairs, judge, folder / VERDICTS)
    except KeyboardInterrupt:
        tell(f"stopped: the verdicts that came are in {folder / VERDICTS}; the same command resumes from there")
        return STOPPED
    _write_pairs(folder, judged)
    missing = failures + unread
    if missing:
        print(f"{len(missing)} verdicts failed, the first: {missing[0]}; the same command asks for them again")
    scores = score(judged)
    if scores is None:
        asked = sum(not one.same for one in judged)
        raise ValueError(
            f"not one of {asked} pairs has both verdicts ({missing[0]}); mend the judge and run the same command "
            f"again: answers and verdicts so far are kept in {folder}"
        )
    figures = _figures(scores, other, judge.name, Path(settings["prompts"]).name)
    path = write_result(
        folder, Result(SUITE, name, figures, {**settings, "against": other}, dataclasses.asdict(scores))
    )
    print(_table(scores, name, other, judge.name))
    print(f"wrote {path}")
    return 1 if failures else 0


def _write_pairs(folder: Path, judged: list["Judged"]) -> None:
    """What was compared, and how it was judged, to read."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / PAIRS) as file:
        for one in judged:
            row = {**dataclasses.asdict(one), "points": one.points}
            file.write(json.dumps(row) + "\n")


def _figures(scores: "Scores", other: str, judge: str, dataset: str) -> list[Figure]:
    from notus.evaluation.names import public_name

    model, step, rest = other.partition(" (step ")
    setup = f"against {public_name(model)}{step}{rest}, judged by {public_name(judge)} in both orders"
    setup += f", {scores.failed} pairs without both verdicts" if scores.failed else ""
    rate = Figure("win rate", "win_rate", scores.win_rate, "%", scores.standard_error, scores.count, setup, dataset)
    if scores.flip_rate is None:
        return [rate]
    asked = scores.count - scores.same
    flips = Figure("position bias", "position_bias", scores.flip_rate, "%", None, asked, "pairs that flip", dataset)
    return [rate, flips]


def _table(scores: "Scores", name: str, other: str, judge: str) -> str:
    """The figures for a terminal."""
    low, high = scores.interval
    lines = [
        f"{name} against {other}, judged by {judge} in both orders",
        f"  win rate        {scores.win_rate:6.2f} %, 95% interval {low:.2f} to {high:.2f}",
        f"  {scores.count} pairs: {scores.wins} wins, {scores.losses} losses, {scores.ties} ties; "
        f"{scores.failed} without both verdicts; {scores.same} ties are equal answers, not asked about",
        f"  average length  {scores.length:.1f} characters, of the other {scores.against_length:.1f}",
    ]
    if scores.flip_rate is not None:
        asked = scores.count - scores.same
        lines.append(f"  position bias   {scores.flip_rate:6.2f} % of the {asked} pairs judged flip with the order")
    return "\n".join(lines)
