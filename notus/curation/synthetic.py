"""UltraFeedback-shaped data made from nothing, and a judge that knows the right answers.

Four tasks on short strings of digits. Four imaginary models of differing skill answer every prompt. On the two
easy tasks most of them are right. On the two hard tasks most of them make the same mistake, so a model that
imitates them all makes it too; only the ratings say which answer was better. The critic's ratings are noisy, and
its `overall_score` has UltraFeedback's known fault: a 1 was often stored as a 10.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

DIGITS = range(4, 6)
"""How many digits a prompt holds."""


@dataclass(frozen=True)
class Task:
    """One kind of question about a string of digits."""

    name: str
    hard: bool
    """Whether most models make this task's usual mistake."""
    phrasings: tuple[str, ...]
    """Instructions; `{}` stands for the digits."""
    answer: Callable[[str], str]
    mistake: Callable[[str], str]


@dataclass(frozen=True)
class Model:
    """An imaginary model: how often it is right. Otherwise it makes the usual mistake, or now and then a slip."""

    name: str
    easy: float
    hard: float
    slip: float


@dataclass(frozen=True)
class Prompt:
    """A question: the task, the digits, and the words that ask it."""

    task: Task
    digits: str
    instruction: str


@dataclass(frozen=True)
class Answer:
    """What a model said, and of which kind it is: `right`, `mistake` or `slip`."""

    model: str
    text: str
    kind: str


TASKS = (
    Task(
        name="repeat",
        hard=False,
        phrasings=("Repeat these digits: {}", "Write once more: {}"),
        answer=lambda digits: digits,
        mistake=lambda digits: digits[:-1],
    ),
    Task(
        name="largest",
        hard=False,
        phrasings=("Name the largest of these digits: {}", "Which digit is the largest? {}"),
        answer=lambda digits: max(digits),
        mistake=lambda digits: digits[-1],
    ),
    Task(
        name="count",
        hard=True,
        phrasings=("Count these digits: {}", "How many digits are here? {}"),
        answer=lambda digits: str(len(digits)),
        mistake=lambda digits: "10",
    ),
    Task(
        name="sort",
        hard=True,
        phrasings=("Sort these digits: {}", "Write from low to high: {}"),
        answer=lambda digits: "".join(sorted(digits)),
        mistake=lambda digits: "".join(sorted(digits, reverse=True)),
    ),
)

MODELS = (
    Model("imaginary-70b", easy=0.95, hard=0.75, slip=0.01),
    Model("imaginary-13b", easy=0.90, hard=0.40, slip=0.02),
    Model("imaginary-7b", easy=0.80, hard=0.20, slip=0.04),
    Model("imaginary-1b", easy=0.60, hard=0.05, slip=0.06),
)

# What the critic thinks of an answer of each kind, per aspect, before its noise.
OPINIONS = {
    "right": {"instruction_following": 5, "honesty": 4, "truthfulness": 5, "helpfulness": 5},
    "mistake": {"instruction_following": 2, "honesty": 4, "truthfulness": 2, "helpfulness": 2},
    "slip": {"instruction_following": 3, "honesty": 3, "truthfulness": 1, "helpfulness": 2},
}


def make_prompts(sizes: Sequence[int], *, seed: int) -> list[list[Prompt]]:
    """Lists of prompts of the given sizes, tasks in turn. No task meets the same digits twice, within a list or
    between lists, whatever the phrasing.

    Digits whose usual mistake would be right (a palindrome to reverse) are passed over.
    """
    rng = random.Random(f"prompts {seed}")
    seen: set[tuple[str, str]] = set()
    return [[_draw_prompt(TASKS[i % len(TASKS)], seen, rng) for i in range(size)] for size in sizes]


def right_answer(instruction: str) -> str:
    """The answer to an instruction that `make_prompts` wrote; ValueError for any other."""
    task, digits = _question(instruction)
    return task.answer(digits)


def _question(instruction: str) -> tuple[Task, str]:
    """Return the task and the digits of an instruction that `make_prompts` wrote; ValueError for any other."""
    for task in TASKS:
        for phrasing in task.phrasings:
            pattern = re.escape(phrasing).replace(re.escape("{}"), r"(\d+)")
            if match := re.fullmatch(pattern, instruction):
                return task, match[1]
    raise ValueError(f"the judge knows no answer to {instruction!r}: give it an instruction of the synthetic tasks")


def judge(instruction: str, response: str) -> bool:
    """Whether `response` is the right answer and nothing else; white space around it does not count."""
    return response.strip() == right_answer(instruction)


def rate(prompt: str, completions: Sequence[str]) -> list[dict[str, int]]:
    """Rate completions as the critic does: `notus rate --judge-function notus.curation.synthetic:rate`.

    Right answers have about 5, the task's usual mistake and other wrong answers about 2, empty ones 1. The mean rating
    of a right answer is above that of every wrong one. The critic's noise is drawn from task, digits and answer, so
    the same answer always has the same ratings, in whatever order and company.

    Args:
        prompt: an instruction that `make_prompts` wrote.
        completions: answers to it; white space around them does not count.

    Returns:
        For each completion, a rating from 1 to 5 by aspect.

    Raises:
        ValueError: the prompt is no instruction of the synthetic tasks.
    """
    task, digits = _question(prompt)
    return [_ratings(task, digits, completion.strip()) for completion in completions]


def _ratings(task: Task, digits: str, text: str) -> dict[str, int]:
    kinds = {task.mistake(digits): "mistake", task.answer(digits): "right"}
    opinion = OPINIONS[kinds.get(text, "slip")]
    if not text:
        return dict.fromkeys(opinion, 1)
    rng = random.Random(f"ratings {task.name} {digits} {text}")
    return {aspect: int(_rating(mean, rng, missing_rate=0.0)) for aspect, mean in opinion.items()}


def win_rate(instructions: Sequence[str], responses: Sequence[str]) -> float:
    """Share of the responses that the judge passes; the two lists are parallel and not empty."""
    pairs = zip(instructions, responses, strict=True)
    return sum(judge(instruction, response) for instruction, response in pairs) / len(instructions)


def demonstrations(prompts: Sequence[Prompt], *, seed: int) -> list[dict[str, Any]]:
    """SFT rows, `{"messages": [user, assistant]}`: each prompt answered by one of the models, right or wrong."""
    rng = random.Random(f"demonstrations {seed}")
    return [
        {
            "messages": [
                {"role": "user", "content": prompt.instruction},
                {"role": "assistant", "content": _answer(rng.choice(MODELS), prompt, rng).text},
            ]
        }
        for prompt in prompts
    ]


def ultrafeedback_records(
    prompts: Sequence[Prompt], *, seed: int, fault_rate: float = 0.5, missing_rate: float = 0.1
) -> list[dict[str, Any]]:
    """Records in the form of `openbmb/UltraFeedback`: each prompt answered by all models, in shuffled order.

    `fault_rate` is how often an overall score of 1 is stored as 10; `missing_rate`, how often a rating is "N/A".
    """
    rng = random.Random(f"records {seed}")
    return [_record(prompt, rng, fault_rate, missing_rate) for prompt in prompts]


def _draw_prompt(task: Task, seen: set[tuple[str, str]], rng: random.Random) -> Prompt:
    while True:
        digits = "".join(rng.sample("0123456789", k=rng.choice(DIGITS)))
        if (task.name, digits) not in seen and task.answer(digits) != task.mistake(digits):
            seen.add((task.name, digits))
            return Prompt(task, digits, rng.choice(task.phrasings).format(digits))


def _answer(model: Model, prompt: Prompt, rng: random.Random) -> Answer:
    right, chance = prompt.task.answer(prompt.digits), rng.random()
    accuracy = model.hard if prompt.task.hard else model.easy
    if chance < accuracy:
        return Answer(model.name, right, "right")
    if chance < accuracy + model.slip:
        return Answer(model.name, _slip(right, rng), "slip")
    return Answer(model.name, prompt.task.mistake(prompt.digits), "mistake")


def _slip(right: str, rng: random.Random) -> str:
    """The right answer with one digit changed."""
    place = rng.randrange(len(right))
    changed = rng.choice([digit for digit in "0123456789" if digit != right[place]])
    return right[:place] + changed + right[place + 1 :]


def _record(prompt: Prompt, rng: random.Random, fault_rate: float, missing_rate: float) -> dict[str, Any]:
    answers = [_answer(model, prompt, rng) for model in rng.sample(MODELS, k=len(MODELS))]
    return {
        "source": f"synthetic_{prompt.task.name}",
        "instruction": prompt.instruction,
        "models": [answer.model for answer in answers],
        "completions": [_completion(answer, rng, fault_rate, missing_rate) for answer in answers],
        "correct_answers": [prompt.task.answer(prompt.digits)],
        "incorrect_answers": [prompt.task.mistake(prompt.digits)],
    }


def _completion(answer: Answer, rng: random.Random, fault_rate: float, missing_rate: float) -> dict[str, Any]:
    ratings = {aspect: _rating(mean, rng, missing_rate) for aspect, mean in OPINIONS[answer.kind].items()}
    given = [int(rating) for rating in ratings.values() if rating != "N/A"]
    return {
        "model": answer.model,
        "principle": "helpfulness",
        "custom_system_prompt": "",
        "response": answer.text,
        "critique": "The answer is right." if answer.kind == "right" else "The answer is wrong.",
        "overall_score": _overall_score(answer, rng, fault_rate),
        "fine-grained_score": sum(given) / len(given) if given else 0.0,
        "annotations": {aspect: _annotation(aspect, rating) for aspect, rating in ratings.items()},
    }


def _rating(mean: int, rng: random.Random, missing_rate: float) -> str:
    if rng.random() < missing_rate:
        return "N/A"
    return str(min(5, max(1, mean + rng.choice((-1, 0, 0, 0, 1)))))


def _overall_score(answer: Answer, rng: random.Random, fault_rate: float) -> float:
    score = rng.randint(7, 9) if answer.kind == "right" else rng.randint(1, 3)
    if score == 1 and rng.random() < fault_rate:
        return 10.0
    return float(score)


def _annotation(aspect: str, rating: str) -> dict[str, Any]:
    rationale = "Rated by the synthetic critic."
    if aspect in ("instruction_following", "honesty"):
        return {"Rating": rating, "Rationale": rationale}
    return {"Type": "None", "Rationale": rationale, "Rating": rating, "Rationale For Rating": rationale}
