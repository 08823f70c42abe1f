"""`python -m notus evaluate MODEL --suite mt-bench`: answers to MT-Bench, a judge's verdicts on them, and the scores.

With --answers FILE answers that are there already are judged, with --judgments FILE judgments are scored; both take no
model. All files are FastChat's. Answers and verdicts are kept as they come: the same command resumes where it stopped.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.arguments import add_judge_arguments, add_model_arguments, add_output_argument, count, temperature
from notus.evaluation.evaluate import add_suite_argument
from notus.evaluation.files import hold_folder
from notus.runtime.process import STOPPED, tell

if TYPE_CHECKING:
    import torch

    from notus.evaluation.endpoint import Endpoint
    from notus.evaluation.models import ModelSource
    from notus.evaluation.mt_bench.inputs import Answer, JudgePrompt, Question
    from notus.evaluation.mt_bench.judging import Judged

SUITE = "mt-bench"
ANSWERS, GENERATION = "answers.jsonl", "generation"
_ANYWHERE = {"suite", "run", "questions", "output"}
_JUDGING = {"references", "judge_prompts", "judge_model", "judge_url", "api_key_env", "judge_timeout", "parallel"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_suite_argument(parser)
    add_model_arguments(parser, optional=True)
    parser.add_argument(
        "--questions", metavar="FILE", help="FastChat's question.jsonl (default: LMSYS's 80, on the hub)"
    )
    parser.add_argument("--max-new-tokens", type=count, default=1024, help="of an answer (default: 1024)")
    parser.add_argument(
        "--temperature", type=temperature, help="0 is greedy (default: FastChat's, 0 to 0.7 by the question's category)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the draws (default: 42)")
    parser.add_argument("--batch-size", type=count, default=8, help="answers at a time (default: 8)")
    add_judge_arguments(parser)
    parser.add_argument("--judge-prompts", metavar="FILE", help="FastChat's judge_prompts.jsonl")
    parser.add_argument(
        "--references",
        metavar="FILE",
        help="FastChat's reference_answer/gpt-4.jsonl (default: the questions' own reference)",
    )
    parser.add_argument("--answers", metavar="FILE", help="judge these answers; takes no model")
    parser.add_argument("--judgments", metavar="FILE", help="score FastChat's JUDGE_single.jsonl; takes no model")
    add_output_argument(parser, SUITE)


def run(args: argparse.Namespace) -> int:
    """Evaluate as `args` say; under torchrun the ranks share the answers, and the first one asks the judge.

    Returns 0, 1 if the judge's endpoint left verdicts open, 75 if a signal did. Raises ValueError or OSError with a
    message for the user.
    """
    _check_options(args)
    if args.judgments is not None:
        return _score_file(args)
    if args.answers is not None:
        return _judge_file(args)
    from notus.evaluation.models import find_together
    from notus.evaluation.results import result_folder
    from notus.runtime import distributed

    with distributed.process_group() as device:
        source = find_together(args.model, trust_remote_code=args.trust_remote_code)
        folder = result_folder(args.output, source.run, args.model, SUITE)
        # What the judge needs is looked at before the hours of generation.
        plan = distributed.on_main(lambda: _plan(args))
        distributed.on_main(lambda: hold_folder(folder))
        answers, settings = _generate(args, source, plan.questions, folder, device)
        speaks = distributed.is_main()
    # Judging can take hours, and the other ranks have no part in it.
    return _judge(args, plan, answers, source.name, folder, settings) if speaks else 0


def _check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that exclude each other or have no effect."""
    for name in ("answers", "judgments"):
        if getattr(args, name) is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"--{name} works in one process: leave torchrun out")
    if args.judgments is not None:
        _refuse_others(args, _ANYWHERE | {"judgments"}, "with --judgments, which are scored as they are")
    elif args.answers is not None:
        if args.judge_model is None:
            raise ValueError("--answers are there to be judged: name the judge with --judge-model")
        _refuse_others(args, _ANYWHERE | _JUDGING | {"answers"}, "with --answers, which are there already")
    elif args.model is None:
        raise ValueError(
            "name a MODEL_OR_RUN, or answers to judge with --answers, or judgments to score with --judgments"
        )
    elif args.judge_model is None:
        _refuse_others(args, set(vars(args)) - _JUDGING, "without a judge, whom --judge-model names")
    if args.judge_model is not None and args.judge_prompts is None:
        from notus.evaluation.mt_bench.inputs import FASTCHAT

        raise ValueError(f"the judge needs its prompts: give --judge-prompts FILE ({FASTCHAT}judge_prompts.jsonl)")
    if args.temperature == 0 and args.seed != 42:
        raise ValueError("--seed has no effect on greedy answers: leave it or --temperature out")


def _refuse_others(args: argparse.Namespace, allowed: set[str], why: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, value in vars(args).items():
        if name not in allowed and value != parser.get_default(name):
            option = f"the model {value}" if name == "model" else "--" + name.replace("_", "-")
            raise ValueError(f"{option} has no effect {why}: leave it out")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is asked, and of whom; `endpoint` and `prompts` are None where nobody judges."""

    questions: Sequence["Question"]
    endpoint: "Endpoint | None"
    prompts: "dict[str, JudgePrompt] | None"


def _plan(args: argparse.Namespace) -> _Plan:
    """Read and check all inputs; for rank 0."""
    from notus.evaluation.endpoint import judge_endpoint
    from notus.evaluation.mt_bench import inputs

    questions = inputs.read_questions(args.questions or inputs.QUESTIONS, args.references)
    print(f"{len(questions)} questions, {sum(len(question.turns) for question in questions)} turns", flush=True)
    if args.judge_model is None:
        return _Plan(questions, None, None)
    inputs.check_references(questions)
    return _Plan(questions, judge_endpoint(args), dict(inputs.read_judge_prompts(args.judge_prompts)))


def _generate(
    args: argparse.Namespace,
    source: "ModelSource",
    questions: Sequence["Question"],
    folder: Path,
    device: "torch.device",
) -> tuple[list["Answer"], dict[str, Any]]:
    """The answers, which are then in the folder, and how they came about. A collective."""
    from notus.data.chat import check_vocabulary
    from notus.evaluation.mt_bench.answers import generate_answers, write_answers
    from notus.evaluation.results import model_name
    from notus.model.export import load_causal_lm
    from notus.runtime.distributed import on_main, say
    from notus.training.parallelize import COMPUTE_DTYPES

    precision = source.choose(args.precision, "training.precision", "bf16")
    causal_lm, tokenizer = load_causal_lm(
        source.folder, dtype=COMPUTE_DTYPES[precision], device=device, trust_remote_code=args.trust_remote_code
    )
    check_vocabulary(tokenizer, causal_lm.config.vocab_size)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "chat_template": source.choose(args.chat_template, "data.chat_template", None),
        "add_empty_system": source.choose(args.add_empty_system, "data.add_empty_system", False),
    }
    answers, cut_off = generate_answers(
        causal_lm,
        tokenizer,
        questions,
        model=source.name.replace(args.model, model_name(args.model), 1),  # with the step of a run in progress
        kept=folder / GENERATION,
        temperature=args.temperature,
        **options,
    )
    if cut_off:
        say(f"{cut_off} answers are empty: the conversation before them fills the model's context")
    on_main(lambda: write_answers(folder / ANSWERS, answers))
    say(f"wrote the answers to {folder / ANSWERS}")
    by_category = "FastChat's, by category"
    temperatures = by_category if args.temperature is None else args.temperature
    return answers, {"precision": precision, "temperature": temperatures, **options, "empty_answers": cut_off}


def _judge_file(args: argparse.Namespace) -> int:
    from notus.evaluation.mt_bench.inputs import read_answers
    from notus.evaluation.results import result_folder

    answers, plan = read_answers(args.answers), _plan(args)
    models = sorted({answer.model for answer in answers})
    folder = result_folder(args.output, None, _folder_name(models, args.answers), SUITE)
    hold_folder(folder)
    return _judge(args, plan, answers, ", ".join(models), folder, {"answers": args.answers})


def _judge(
    args: argparse.Namespace,
    plan: _Plan,
    answers: list["Answer"],
    model: str,
    folder: Path,
    settings: dict[str, Any],
) -> int:
    """Have the answers judged and report; or say how, if there is no judge."""
    from notus.evaluation.mt_bench import inputs, judging

    if plan.endpoint is None or plan.prompts is None:
        told = "--judge-model NAME --judge-prompts FILE [--judge-url URL]"
        print(f"not judged: run again with {told}; the answers are not generated anew")
        return 0
    wanted = judging.matches(plan.questions, answers, plan.prompts)
    kept = folder / f"{args.judge_model.replace('/', '--')}_single.jsonl"
    try:
        judged = judging.judge(wanted, plan.endpoint, parallel=args.parallel, kept=kept)
    except KeyboardInterrupt:
        tell(f"stopped: the verdicts that came are in {kept}; the same command resumes from there")
        return STOPPED
    settings |= {
        "questions": args.questions or inputs.QUESTIONS,
        "references": args.references or "the questions' own",
        "judge": args.judge_model,
        "judge_url": args.judge_url,
        "judge_prompts": args.judge_prompts,
        "verdicts": len(wanted),
        "unread": judged.unread,
        "missing": judged.missing,
    }
    _tell_failures(judged, len(wanted), kept)
    _report(args, judged.verdicts, plan.questions, model, folder, settings)
    return 1 if judged.missing else 0


def _tell_failures(judged: "Judged", wanted: int, kept: Path) -> None:
    """Say which verdicts are not there, and why. Raises ValueError if that is all of them."""
    again = "the same command asks again for those that failed, and for no others"
    if judged.missing + judged.unread == wanted:
        last = judged.reason or f"no verdict holds a rating, see {kept}"
        raise ValueError(f"not one of {wanted} verdicts came: {last}; mend the judge, {again}")
    if judged.unread:
        print(f"{judged.unread} of {wanted} verdicts hold no rating and count nowhere; {again}")
    if judged.missing:
        print(f"{judged.missing} of {wanted} verdicts did not come: {judged.reason}; {again}")


def _score_file(args: argparse.Namespace) -> int:
    from notus.evaluation.mt_bench.inputs import read_questions
    from notus.evaluation.mt_bench.scores import read_judgments
    from notus.evaluation.results import result_folder

    lines = read_judgments(Path(args.judgments))
    questions = read_questions(args.questions) if args.questions else []
    models = sorted({line["model"] for line in lines})
    folder = result_folder(args.output, None, _folder_name(models, args.judgments), SUITE)
    _report(args, lines, questions, ", ".join(models), folder, {"judgments": args.judgments})
    return 0


def _report(
    args: argparse.Namespace,
    lines: Sequence[dict[str, Any]],
    questions: Sequence["Question"],
    model: str,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Print the table and write the result."""
    from notus.evaluation.mt_bench import scores
    from notus.evaluation.mt_bench.inputs import HUB_ID
    from notus.evaluation.results import Result, write_result

    dataset = Path(args.questions).name if args.questions else None if args.judgments else HUB_ID
    found = scores.score(lines, {question.id: question.category for question in questions})
    figures = scores.figures(found, dataset)
    if not figures:
        raise ValueError("no judgment holds a score, all are -1; judge the answers again")
    details = {"scores": [scores.plain(each) for each in found]}
    path = write_result(folder, Result(SUITE, model, figures, settings, details))
    print(f"{scores.table(found)}\nwrote {path}")


def _folder_name(models: Sequence[str], file: str) -> str:
    """What results of models in a file go under: the model, or of several the file's name."""
    return models[0] if len(models) == 1 else Path(file).stem
