"""What a judge is asked, what it answers, and what every kind of judge offers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from notus.evaluation.budget import Usage


@dataclasses.dataclass(frozen=True)
class Question:
    """The different completions of one prompt, in the order in which the judge sees them."""

    key: str  # a digest of all that the judge sees, and of the judge's identity; what the verdict is kept under
    place: str  # file and line of the record, for errors
    prompt: str  # the prompt as a judge reads it
    completions: Sequence[str]
    order: Sequence[int]  # the places of these completions in the record
    # the prompt's turns before the answer, tools and template settings, for judges that render a chat template
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What a judge says of one aspect of a completion."""

    rating: float | None  # 1 to 5; None: the judge says that the aspect does not apply, or `unreadable`
    rationale: str = ""
    unreadable: bool = False  # the judge gave no rating that could be read


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A judge's answer to a question: annotations by aspect of each completion, in the question's order."""

    annotations: Sequence[Mapping[str, Annotation]]
    rewards: Sequence[float] | None = None  # of a reward model, which gives no annotations
    usage: Usage = dataclasses.field(default_factory=Usage)


class JudgeError(Exception):
    """A question got no usable answer; the other questions are not concerned. `usage`: what it cost all the same."""

    def __init__(self, message: str, usage: Usage | None = None) -> None:
        super().__init__(message)
        self.usage = usage or Usage()


class NotAsked(JudgeError):
    """A question was not put at all: a budget is used up, or too many before it failed."""


class Judge(Protocol):
    """Rates completions."""

    name: str  # for people
    identity: str  # all that decides its verdicts; kept verdicts of another identity are not used
    shared: bool  # whether the ranks of torchrun each rate a part of the questions; otherwise rank 0 rates all

    def rate(self, questions: Sequence[Question], done: Callable[[Question, Verdict | JudgeError], None]) -> None:
        """Call `done` once for every question, as soon as it is answered, in any order.

        Raises ValueError for what is wrong with the judge itself (a rejected key, a function that cannot be called).
        """
