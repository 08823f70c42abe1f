"""`python -m notus evaluate MODEL --suite mt-bench`: answers to MT-Bench, a judge's verdicts on them, and the scores.

With --answers FILE existing answers are judged, with --judgments FILE judgments are scored; neither takes a model. All
files are FastChat's. Answers and verdicts are kept as they come: the same command resumes where it stopped.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from notus.evaluation.arguments import (
    add_judge_arguments,
    add_model_arguments,
    add_output_argument,
    check_no_effect,
    count,
    temperature,
)
from notus.evaluation.endpoint import Endpoint, EndpointError, collect_verdicts, judge_endpoint
from notus.evaluation.evaluate import add_suite_argument
from notus.evaluation.input_files import parse_entry
from notus.evaluation.mt_bench import fastchat
from notus.evaluation.mt_bench.fastchat import HIGHEST, UNREAD, Answer, JudgePrompt, Judgment, Question
from notus.evaluation.results import (
    Figure,
    Result,
    hold_folder,
    model_name,
    public_name,
    read_records,
    result_folder,
    write_result,
)
from notus.runtime.process import STOPPED, tell

if TYPE_CHECKING:
    import torch

    from notus.data.formats import Message
    from notus.evaluation.resolve_model import ModelSource

SUITE, NAME = "mt-bench", "MT-Bench"
ANSWERS, GENERATION = "answers.jsonl", "generation"
# FastChat's temperature_config, by category, and what it takes for others.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
OTHER_TEMPERATURE = 0.7
ASKED = 3  # times at most for one verdict, if it cannot be read
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
# Mean scores, of how many turns of how many questions, and the judges that count as the one that gave them.
PUBLISHED = {"Zephyr-7B-β": 7.34, "Notus 7B v1": 7.30}
PUBLISHED_QUESTIONS, PUBLISHED_TURNS = 80, 160
PUBLISHED_BY = ("gpt-4", "gpt-4-0314", "gpt-4-0613")
Judge = tuple[Endpoint, Mapping[str, JudgePrompt]]  # and its prompts, by name
_ANYWHERE = {"suite", "questions", "output"}
_JUDGING = {"references", "judge_prompts", "judge_model", "judge_url", "api_key_env", "judge_timeout", "parallel"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_suite_argument(parser)
    add_model_arguments(parser, optional=True)
    parser.add_argument(
        "--questions",
        type=os.path.expanduser,
        metavar="FILE",
        help="FastChat's question.jsonl (default: LMSYS's 80, on the hub)",
    )
    parser.add_argument("--max-new-tokens", type=count, default=1024, help="of an answer (default: 1024)")
    parser.add_argument(
        "--temperature", type=temperature, help="0 is greedy (default: FastChat's, 0 to 0.7 by the question's category)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the draws (default: 42)")
    parser.add_argument("--batch-size", type=count, default=8, help="answers at a time (default: 8)")
    _add_judging_arguments(parser)
    parser.add_argument(
        "--answers", type=os.path.expanduser, metavar="FILE", help="judge these answers; takes no model"
    )
    parser.add_argument(
        "--judgments",
        type=os.path.expanduser,
        metavar="FILE",
        help="score FastChat's JUDGE_single.jsonl; takes no model",
    )
    add_output_argument(parser, SUITE)


def _add_judging_arguments(parser: argparse.ArgumentParser) -> None:
    add_judge_arguments(parser)
    parser.add_argument(
        "--judge-prompts", type=os.path.expanduser, metavar="FILE", help="FastChat's judge_prompts.jsonl"
    )
    parser.add_argument(
        "--references",
        type=os.path.expanduser,
        metavar="FILE",
        help="FastChat's reference_answer/gpt-4.jsonl (default: the questions' own reference)",
    )


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
    from notus.evaluation.resolve_model import find_together
    from notus.runtime import distributed

    with distributed.process_group() as device:
        source = find_together(args.model, trust_remote_code=args.trust_remote_code)
        folder = result_folder(args.output, source.run, args.model, SUITE)
        # What the judge needs is looked at before the hours of generation.
        questions, judge = distributed.on_main(lambda: _read_inputs(args))
        distributed.on_main(lambda: hold_folder(folder))
        answers, settings = _answer(args, source, questions, folder, device)
        speaks = distributed.is_main()
    # Judging can take hours, and the other ranks have no part in it.
    return _judge(args, questions, judge, answers, source.name, folder, settings) if speaks else 0


def _check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that exclude each other or have no effect."""
    for name in ("answers", "judgments"):
        if getattr(args, name) is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"--{name} works in one process: leave torchrun out")
    if args.judgments is not None:
        reason = "with --judgments, which are scored as they are"
        check_no_effect(args, add_arguments, reason, but=_ANYWHERE | {"judgments"})
    elif args.answers is not None:
        if args.judge_model is None:
            raise ValueError("--answers are there to be judged: name the judge with --judge-model")
        reason = "with --answers, which are there already"
        check_no_effect(args, add_arguments, reason, but=_ANYWHERE | _JUDGING | {"answers"})
    elif args.model is None:
        raise ValueError(
            "name a MODEL_OR_RUN, or answers to judge with --answers, or judgments to score with --judgments"
        )
    elif args.judge_model is None:
        check_no_effect(args, _add_judging_arguments, "without a judge, which --judge-model names")
    if args.judge_model is not None and args.judge_prompts is None:
        raise ValueError(
            f"the judge needs its prompts: give --judge-prompts FILE ({fastchat.FASTCHAT}judge_prompts.jsonl)"
        )
    if args.temperature == 0 and args.seed != 42:
        raise ValueError("--seed has no effect on greedy answers: leave it or --temperature out")


def _read_inputs(args: argparse.Namespace) -> tuple[list[Question], Judge | None]:
    """Read and check the questions, and what the judge needs if there is one; for rank 0."""
    questions = fastchat.read_questions(args.questions or fastchat.QUESTIONS, args.references)
    print(f"{len(questions)} questions, {sum(len(question.turns) for question in questions)} turns", flush=True)
    if args.judge_model is None:
        return questions, None
    fastchat.check_references(questions)
    return questions, (judge_endpoint(args), fastchat.read_judge_prompts(args.judge_prompts))


# The answers


def _answer(
    args: argparse.Namespace, source: "ModelSource", questions: Sequence[Question], folder: Path, device: "torch.device"
) -> tuple[list[Answer], dict[str, Any]]:
    """Generate the answers, write them to the folder, and return them with the settings. A collective."""
    from notus.evaluation.decoding import Decoding, KeptTokens, generate, model_digest
    from notus.evaluation.prompts import Prompt
    from notus.model.supported import context_of
    from notus.runtime.distributed import on_main, say

    options = source.options(args)
    causal_lm, tokenizer = source.load(options, device)
    encoder = options.chat.encoder(tokenizer)
    context = context_of(causal_lm.config)
    kept = KeptTokens(folder / GENERATION, model_digest(causal_lm))

    def complete(talks: Sequence[list["Message"]], places: Sequence[str], temperature: float) -> list[str]:
        return generate(
            causal_lm,
            encoder,
            [Prompt(place, talk) for place, talk in zip(places, talks, strict=True)],
            Decoding(args.max_new_tokens, temperature, seed=args.seed, batch_size=args.batch_size),
            kept=kept,
        )

    answers, cut_off = answer_turns(
        questions,
        complete,
        lambda talk: len(encoder.encode_prompt(talk)) < context,
        model=source.name.replace(args.model, model_name(args.model), 1),  # with the step of a run in progress
        temperature=args.temperature,
    )
    if cut_off:
        say(f"{cut_off} answers are empty: the conversation before them fills the model's context")
    on_main(lambda: fastchat.write_answers(folder / ANSWERS, answers))
    say(f"wrote the answers to {folder / ANSWERS}")
    return answers, {
        "precision": options.precision,
        "temperature": "FastChat's, by category" if args.temperature is None else args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "batch_size": args.batch_size,
        **options.chat.described(),
        "empty_answers": cut_off,
    }


def answer_turns(
    questions: Sequence[Question],
    complete: Callable[..., list[str]],
    fits: Callable[[list["Message"]], bool],
    *,
    model: str,
    temperature: float | None,
) -> tuple[list[Answer], int]:
    """Answer both turns; the second turn's conversation holds the first answer.

    `complete` makes (conversations, places=, temperature=) into the next message of each, `fits` says whether a
    conversation leaves room for an answer. `model` is its name in the answers. `temperature` is for all; None:
    FastChat's, by category. Returns the answers, without white space around them; and how many are empty because their
    conversation does not fit.
    """
    talks: list[list[Message]] = [[] for _ in questions]
    cut_off = 0
    for turn in (0, 1):
        asked = [index for index, question in enumerate(questions) if len(question.turns) > turn]
        groups: dict[float, list[int]] = {}
        for index in asked:
            talks[index].append({"role": "user", "content": questions[index].turns[turn]})
            if not fits(talks[index]):  # a long first answer must not end the whole
                cut_off += 1
                continue
            usual = TEMPERATURES.get(questions[index].category, OTHER_TEMPERATURE)
            groups.setdefault(usual if temperature is None else temperature, []).append(index)
        texts = dict.fromkeys(asked, "")
        for degree, indices in groups.items():
            places = [questions[index].place for index in indices]
            completions = complete([talks[index] for index in indices], places=places, temperature=degree)
            texts.update(zip(indices, completions, strict=True))
        for index in asked:
            talks[index].append({"role": "assistant", "content": texts[index].strip()})
    answers = [
        Answer.of(question.question_id, model, [message["content"] for message in talk[1::2]])
        for question, talk in zip(questions, talks, strict=True)
    ]
    return answers, cut_off


# The verdicts


def matches(
    questions: Sequence[Question], answers: Sequence[Answer], prompts: Mapping[str, JudgePrompt], judge: str
) -> list[Judgment]:
    """Return all that the judge of this name is to judge, first turns first, as judgments without a verdict.

    Raises ValueError for a question that a model left out.
    """
    models = list(dict.fromkeys(answer.model_id for answer in answers))
    by_key = {(answer.model_id, answer.question_id): answer for answer in answers}
    turns: tuple[Literal[1, 2], ...] = (1, 2)
    found = []
    for turn, question, model in itertools.product(turns, questions, models):
        if len(question.turns) < turn:
            continue
        answer = by_key.get((model, question.question_id))
        if answer is None or len(answer.turns) < turn:
            raise ValueError(
                f"{model} has no answer to turn {turn} of question {question.question_id}; generate it again"
            )
        # All that a template can hold: `fastchat.read_judge_prompts` checked which of it each does.
        fields = {"question": question.turns[0], "answer": answer.turns[0]}
        named = {"question": question.turns, "answer": answer.turns, "ref_answer": question.reference}
        for name, texts in named.items():
            fields |= {f"{name}_{number}": text for number, text in enumerate(texts, start=1)}
        prompt = prompts[fastchat.PROMPTS[turn, question.needs_reference][0]]
        found.append(
            Judgment(
                question_id=question.question_id,
                model=model,
                judge=[judge, prompt.name],
                system_prompt=prompt.system_prompt,
                user_prompt=prompt.prompt_template.format(**fields),
                score=UNREAD,
                turn=turn,
            )
        )
    return found


def judge(
    wanted: Sequence[Judgment], endpoint: Endpoint, *, parallel: int, kept: Path
) -> tuple[list[Judgment], list[str]]:
    """Ask for the verdicts that the file `kept` does not hold yet, and append each as it comes.

    A verdict that cannot be read after `ASKED` requests is a line with score -1, which a later call asks for again.
    Returns the verdicts that came, and the endpoint's errors for the others. Raises ValueError if the endpoint rejects
    every request, or the file holds something else; KeyboardInterrupt as `ask_all`.
    """
    lines = [
        parse_entry(row, Judgment, f"{kept}, line {number}", "judgments, or remove the line or the file")
        for number, row in enumerate(read_records(kept), start=1)
    ]
    known = {line.key for line in lines if line.score != UNREAD}
    left = [match for match in wanted if match.key not in known]
    wanted_keys = {match.key for match in wanted}
    verdicts = [
        line for line in lines if line.score != UNREAD and line.key in wanted_keys
    ]  # twice, if they are there so
    there = len(wanted) - len(left)
    if there:
        print(f"{there} of {len(wanted)} verdicts are in {kept}, and not asked for again", flush=True)
    with tqdm(total=len(wanted), initial=there, desc="judging", disable=None) as bar:

        def record(match: Judgment, reply: str | Exception) -> dict[str, Any] | None:
            bar.update()
            if isinstance(reply, Exception):
                return None
            verdict = {"judgment": reply, "score": read_rating(reply), "tstamp": time.time()}
            verdicts.append(match.model_copy(update=verdict))
            return verdicts[-1].model_dump()

        failures = collect_verdicts(lambda match: _ask(endpoint, match), left, record, parallel=parallel, kept=kept)
    return verdicts, failures


async def _ask(endpoint: Endpoint, match: Judgment) -> str:
    """Return a reply that holds a rating, or the last one if none of several does."""
    parts = {"system": match.system_prompt, "user": match.user_prompt}
    messages = [{"role": role, "content": text} for role, text in parts.items() if text]
    reply = await endpoint.ask(messages)
    for _ in range(ASKED - 1):
        if read_rating(reply) != UNREAD:
            break
        with contextlib.suppress(EndpointError):  # the reply that came is a verdict, though it cannot be read
            reply = await endpoint.ask(messages)
    return reply


def read_rating(text: str) -> float:
    """Return the first [[8]] of a judgment, else the first [8], as FastChat does; -1 if there is none up to 10."""
    for pattern in _RATINGS:
        found = pattern.search(text)
        if found:
            rating = float(found[1])
            return (int(rating) if rating.is_integer() else rating) if rating <= HIGHEST else UNREAD
    return UNREAD


def _judge(
    args: argparse.Namespace,
    questions: list[Question],
    judged_by: Judge | None,
    answers: list[Answer],
    model: str,
    folder: Path,
    settings: dict[str, Any],
) -> int:
    """Have the answers judged and report; or print how, if there is no judge."""
    if judged_by is None:
        options = "--judge-model NAME --judge-prompts FILE [--judge-url URL]"
        print(f"not judged: run again with {options}; the answers are not generated again")
        return 0
    endpoint, prompts = judged_by
    wanted = matches(questions, answers, prompts, endpoint.model)
    kept = folder / f"{args.judge_model.replace('/', '--')}_single.jsonl"
    try:
        verdicts, failures = judge(wanted, endpoint, parallel=args.parallel, kept=kept)
    except KeyboardInterrupt:
        tell(f"stopped: the verdicts that came are in {kept}; the same command resumes there")
        return STOPPED
    unread = sum(verdict.score == UNREAD for verdict in verdicts)
    settings |= {
        "questions": args.questions or fastchat.QUESTIONS,
        "references": args.references or "the questions' own",
        "judge": args.judge_model,
        "judge_url": args.judge_url,
        "judge_prompts": args.judge_prompts,
        "verdicts": len(wanted),
        "unread": unread,
        "missing": len(failures),
    }
    again = "the same command asks again for those that failed, and for no others"
    if len(failures) + unread == len(wanted):
        last = failures[-1] if failures else f"no verdict holds a rating, see {kept}"
        raise ValueError(f"not one of {len(wanted)} verdicts came: {last}; fix the judge, {again}")
    if unread:
        print(f"{unread} of {len(wanted)} verdicts hold no rating and count nowhere; {again}")
    if failures:
        print(f"{len(failures)} of {len(wanted)} verdicts did not come: {failures[-1]}; {again}")
    _report(args, verdicts, questions, model, folder, settings)
    return 1 if failures else 0


# The scores


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one judge gave one model, out of 10."""

    # model, judge: their names.
    model: str
    judge: str
    questions: Mapping[int | str, list[float]]  # the scores by question
    turns: Mapping[int, list[float]]  # the same scores by turn
    categories: Mapping[str, list[float]]  # the same scores by category; empty where the questions are not known
    unread: int  # verdicts that could not be read; they count nowhere else
    repeated: int = 0  # scores of a turn that has one already; they count like the others

    @property
    def count(self) -> int:
        """How many scores there are."""
        return sum(map(len, self.turns.values()))

    @property
    def mean(self) -> float:
        """The score of all turns together, as FastChat has it; NaN of none."""
        return _mean([value for values in self.turns.values() for value in values])

    @property
    def stderr(self) -> float:
        """Of `mean`, over questions, whose turns are not independent; NaN of a single one.

        Some questions have a turn less, so this is the error of a ratio of two means, to first order.
        """
        if len(self.questions) < 2:
            return math.nan
        excess = [sum(values) - self.mean * len(values) for values in self.questions.values()]
        return statistics.stdev(excess) * math.sqrt(len(excess)) / self.count

    def as_json(self) -> dict[str, Any]:
        """Return the scores as JSON, in which there is no NaN."""

        def means(parts: Mapping[Any, list[float]]) -> dict[str, Any]:
            return {str(key): {"score": _mean(each), "count": len(each)} for key, each in parts.items() if each}

        own = {"model": self.model, "judge": self.judge, "score": self.mean if self.count else None}
        counts = {"scored": self.count, "unread": self.unread, "repeated": self.repeated}
        return {**own, **counts, "turns": means(self.turns), "categories": means(self.categories)}

    @property
    def is_like_published(self) -> bool:
        """Whether published scores may stand beside these."""
        whole = (len(self.questions), self.count) == (PUBLISHED_QUESTIONS, PUBLISHED_TURNS)
        return self.judge in PUBLISHED_BY and whole and not self.repeated


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def score(judgments: Iterable[Judgment], categories: Mapping[int | str, str] | None = None) -> list[Scores]:
    """Return the scores of each model by each judge, the best first; `categories` are the questions', by their ids.

    Every judgment with a score counts, also several of the same turn, as in FastChat's `show_result`. A judgment
    without one is unread only if its turn has no other: the judge was asked again then.
    """
    judged: dict[tuple[str, str], dict[tuple[int | str, int], list[float]]] = {}
    for judgment in judgments:
        by_turn = judged.setdefault((judgment.model, judgment.judge[0]), {})
        values = by_turn.setdefault((judgment.question_id, judgment.turn), [])
        if judgment.score != UNREAD:
            values.append(judgment.score)
    found = []
    for (model, judge), by_turn in judged.items():
        questions: dict[int | str, list[float]] = {}
        turns: dict[int, list[float]] = {1: [], 2: []}
        of_category: dict[str, list[float]] = {name: [] for name in (categories or {}).values()}  # in their order
        read = {key: values for key, values in by_turn.items() if values}
        for (question, number), values in read.items():
            questions.setdefault(question, []).extend(values)
            turns[number] += values
            if categories and question in categories:
                of_category[categories[question]] += values
        of_category = {name: values for name, values in of_category.items() if values}
        repeated = sum(len(values) - 1 for values in read.values())
        found.append(Scores(model, judge, questions, turns, of_category, len(by_turn) - len(read), repeated))
    return sorted(found, key=lambda scores: (math.isnan(scores.mean), -scores.mean, scores.model))


def _score_file(args: argparse.Namespace) -> int:
    judgments = fastchat.read_judgments(Path(args.judgments))
    questions = fastchat.read_questions(args.questions) if args.questions else []
    model, folder = _model_and_folder(args, {judgment.model for judgment in judgments}, args.judgments)
    _report(args, judgments, questions, model, folder, {"judgments": args.judgments})
    return 0


def _judge_file(args: argparse.Namespace) -> int:
    answers, (questions, judge) = fastchat.read_answers(args.answers), _read_inputs(args)
    model, folder = _model_and_folder(args, {answer.model_id for answer in answers}, args.answers)
    hold_folder(folder)
    return _judge(args, questions, judge, answers, model, folder, {"answers": args.answers})


def _model_and_folder(args: argparse.Namespace, models: Collection[str], file: str) -> tuple[str, Path]:
    """Return the models' names, and where results go: under the model, or for several under the file's name."""
    name = next(iter(models)) if len(models) == 1 else Path(file).stem
    return ", ".join(sorted(models)), result_folder(args.output, None, name, SUITE)


def _report(
    args: argparse.Namespace,
    judgments: Sequence[Judgment],
    questions: Sequence[Question],
    model: str,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Print the table and write the result."""
    dataset = Path(args.questions).name if args.questions else None if args.judgments else fastchat.HUB_ID
    scores = score(judgments, {question.question_id: question.category for question in questions})
    found = figures(scores, dataset)
    if not found:
        raise ValueError("no judgment holds a score, all are -1; judge the answers again")
    details = {"scores": [each.as_json() for each in scores]}
    path = write_result(folder, Result(SUITE, model, found, settings, details))
    print(f"{table(scores)}\nwrote {path}")


def figures(scores: Sequence[Scores], dataset: str | None = None) -> list[Figure]:
    """Return the overall score of each model, then its turns and categories; none of a model without any score.

    Published scores stand beside those by the same judge of as many questions and turns. Of several models the setup
    names the one that a figure is of.
    """
    found = []
    for each in scores:
        if not each.count:
            continue
        setup = f"{public_name(each.model)}, " if len(scores) > 1 else ""
        setup += f"judged by {public_name(each.judge)}"  # a server of one's own names a model by its folder
        setup += f", {each.unread} verdicts not readable" if each.unread else ""
        setup += f", {each.repeated} of {each.count} judge a turn again" if each.repeated else ""
        questions = len(each.questions)
        setup += "" if questions == PUBLISHED_QUESTIONS else f", {questions} questions"
        stderr = None if math.isnan(each.stderr) else each.stderr
        published = PUBLISHED if each.is_like_published else {}
        found.append(Figure(NAME, "score", each.mean, "", stderr, each.count, setup, dataset, published))
        for part, values in [*((f"turn {turn}", each.turns[turn]) for turn in each.turns), *each.categories.items()]:
            if values:
                found.append(Figure(NAME, f"score, {part}", _mean(values), "", None, len(values), setup, dataset))
    return found


def table(scores: Sequence[Scores]) -> str:
    """Return the scores for a terminal, a line for every model."""
    categories = list(dict.fromkeys(name for each in scores for name in each.categories))
    rows = [["model", "judge", "all", "s.e.", "turn 1", "turn 2", *categories, "scored", "unread"]]
    for each in scores:
        parts = [*each.turns.values(), *(each.categories.get(name, []) for name in categories)]
        values = [each.mean, each.stderr, *map(_mean, parts)]
        cells = ["-" if math.isnan(value) else f"{value:.2f}" for value in values]
        rows.append([each.model, each.judge, *cells, str(each.count), str(each.unread)])
    widths = [max(8, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for model, judge, *cells in rows:
        numbers = [f"{cell:>{width}}" for cell, width in zip(cells, widths[2:], strict=True)]
        lines.append("  ".join([f"{model:{widths[0]}}", f"{judge:{widths[1]}}", *numbers]))
    for each in scores:
        if each.repeated:
            lines.append(
                f"{each.model}: {each.repeated} of {each.count} judgments judge a turn that was judged before; all are "
                "averaged, as FastChat does"
            )
    if any(each.is_like_published for each in scores):
        published = ", ".join(f"{name} {value:.2f}" for name, value in PUBLISHED.items())
        lines.append(f"published, judged by GPT-4: {published}")
    return "\n".join(lines)
