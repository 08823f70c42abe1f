"""The judge is asked about every turn of every answer; each verdict is kept as it comes, in FastChat's format."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from notus.evaluation.endpoint import Endpoint, EndpointError, ask_all
from notus.evaluation.kept import keep, read_kept
from notus.evaluation.mt_bench.inputs import HIGHEST, PROMPTS, UNREAD, Answer, JudgePrompt, Question, QuestionId

ASKED = 3  # times at most for one verdict, if it cannot be read
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


@dataclasses.dataclass(frozen=True)
class Match:
    """A turn of an answer to judge: `turn` 1 or 2, and what the judge is told."""

    question_id: QuestionId
    model: str
    turn: int
    prompt: JudgePrompt
    user_prompt: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What a verdict is about; whoever answered anew, or is judged by other prompts, is judged anew."""
        return self.question_id, self.model, self.turn, self.prompt.name, self.prompt.system, self.user_prompt


@dataclasses.dataclass
class Judged:
    """What came of it: a line in FastChat's format for every verdict, and why there is none for the others.

    Attributes:
        verdicts: of every match that was answered, `score` -1 where no rating could be read.
        missing: matches that got no answer from the endpoint.
        reason: the last of the endpoint's errors; None if there was none.
    """

    verdicts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    missing: int = 0
    reason: str | None = None

    @property
    def unread(self) -> int:
        """How many verdicts could not be read."""
        return sum(verdict["score"] == UNREAD for verdict in self.verdicts)


def matches(
    questions: Sequence[Question], answers: Sequence[Answer], prompts: Mapping[str, JudgePrompt]
) -> list[Match]:
    """All that is to judge, first turns first. Raises ValueError for a question that a model left out."""
    models = list(dict.fromkeys(answer.model for answer in answers))
    of = {(answer.model, answer.question_id): answer for answer in answers}
    found = []
    for turn in (1, 2):
        for question in (question for question in questions if len(question.turns) >= turn):
            for model in models:
                answer = of.get((model, question.id))
                if answer is None or len(answer.turns) < turn:
                    raise ValueError(
                        f"{model} has no answer to turn {turn} of question {question.id}; generate it anew"
                    )
                prompt = prompts[PROMPTS[question.needs_reference][turn - 1]]
                found.append(Match(question.id, model, turn, prompt, _fill(prompt, question, answer, turn)))
    return found


def judge(wanted: Sequence[Match], endpoint: Endpoint, *, parallel: int, kept: Path) -> Judged:
    """Ask for the verdicts that the file `kept` does not hold yet, and append each as it comes.

    A verdict that was asked for `ASKED` times in vain is a line with score -1, which a later call asks for again.

    Raises:
        ValueError: the endpoint refuses every request, or the file holds something else.
        OSError: the disk refuses.
        KeyboardInterrupt: SIGINT or SIGTERM; what has come is kept.
    """
    known = _read_verdicts(kept, endpoint.model)
    left = [match for match in wanted if match.key not in known]
    judged = Judged([known[match.key] for match in wanted if match.key in known])
    if judged.verdicts:
        print(f"{len(judged.verdicts)} of {len(wanted)} verdicts are in {kept}, and not asked for again", flush=True)
    with tqdm(total=len(wanted), initial=len(judged.verdicts), desc="judging", disable=None) as bar:

        def take(match: Match, verdict: tuple[float, str] | Exception) -> None:
            bar.update()
            if isinstance(verdict, Exception):
                judged.missing, judged.reason = judged.missing + 1, str(verdict)
                return
            line = _line(match, endpoint.model, *verdict)
            keep(kept, [line])
            judged.verdicts.append(line)

        ask_all(lambda match: _verdict(endpoint, match), left, parallel=parallel, on_done=take)
    return judged


def read_rating(text: str) -> float:
    """The rating in a judgment: the first [[8]], else the first [8], as FastChat reads it; -1 for none up to 10."""
    for pattern in _RATINGS:
        found = pattern.search(text)
        if found:
            rating = float(found[1])
            return (int(rating) if rating.is_integer() else rating) if rating <= HIGHEST else UNREAD
    return UNREAD


def _verdict(endpoint: Endpoint, match: Match) -> tuple[float, str]:
    """The rating and the judgment that holds it; the last judgment and -1 if none of several can be read."""
    messages = [{"role": "user", "content": match.user_prompt}]
    if match.prompt.system:
        messages.insert(0, {"role": "system", "content": match.prompt.system})
    judgment = endpoint.ask(messages)
    for _ in range(ASKED - 1):
        if read_rating(judgment) != UNREAD:
            break
        with contextlib.suppress(EndpointError):  # the verdict that came is one, though it cannot be read
            judgment = endpoint.ask(messages)
    return read_rating(judgment), judgment


def _fill(prompt: JudgePrompt, question: Question, answer: Answer, turn: int) -> str:
    references = {f"ref_answer_{number}": text for number, text in enumerate(question.reference, start=1)}
    if turn == 1:
        return prompt.template.format(question=question.turns[0], answer=answer.turns[0], **references)
    first, second = question.turns
    return prompt.template.format(
        question_1=first, question_2=second, answer_1=answer.turns[0], answer_2=answer.turns[1], **references
    )


def _line(match: Match, judge_model: str, score: float, judgment: str) -> dict[str, Any]:
    return {
        "question_id": match.question_id,
        "model": match.model,
        "judge": [judge_model, match.prompt.name],
        "system_prompt": match.prompt.system,  # FastChat has no such key, and leaves it aside
        "user_prompt": match.user_prompt,
        "judgment": judgment,
        "score": score,
        "turn": match.turn,
        "tstamp": time.time(),
    }


def _read_verdicts(path: Path, judge_model: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """By match: the lines of this judge that hold a rating."""
    verdicts = {}
    for number, line in enumerate(read_kept(path), start=1):
        try:
            model, prompt = line["judge"]
            told = (line.get("system_prompt"), line["user_prompt"])
            key = (line["question_id"], line["model"], line["turn"], prompt, *told)
            if not (line["score"] == UNREAD or 0 <= line["score"] <= HIGHEST):
                raise ValueError("no rating")
            if model == judge_model and line["score"] != UNREAD:
                verdicts[key] = line
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not a judgment; remove the line, or the file") from error
    return verdicts
