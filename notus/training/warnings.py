"""What a run says of itself that its loss does not show: that it goes wrong, or that it learns plain text."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from transformers import PreTrainedTokenizerBase

from notus.data.drop_report import DropReport


def plain_text_notice(
    report: DropReport, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> str | None:
    """Return what to say of training rows that are plain text although there is a chat template; None otherwise.

    `chat_template` is `data.chat_template`. The rows are those of the training data's `report`.
    """
    plain = report.kept - report.templated
    if not plain or not (tokenizer.chat_template or chat_template):
        return None
    counts = f"{plain:,} of {report.kept:,} training rows are plain text"
    if report.templated:
        return (
            f"note: {counts}, for which no chat template is used; the others are conversations. `notus generate` and "
            "the evaluation suites take a string prompt as the user's turn: set --raw for plain text"
        )
    return (
        f"note: {counts}, for which the chat template is not used. The model learns to continue text, and `notus "
        "generate` and the evaluation suites give it string prompts as they are. For a chat model, give messages, or "
        "set data.columns to {prompt: instruction}, which makes chat turns of strings"
    )


@dataclasses.dataclass(frozen=True)
class Guard:
    """Watches one metric.

    Attributes:
        metric: its name in a line of metrics.
        trips: whether a value is out of bounds.
        meaning: what that says of the run, and what to change.
        as_change: look at the change since the first line of metrics of this launch instead.
    """

    metric: str
    trips: Callable[[float], bool]
    meaning: str
    as_change: bool = False


# Beyond 20 the logistic function is within 2.1e-9 of its end: pairs on the right side have a gradient that fp32 sums
# lose beside any other's, and on the wrong side the policy has run away from the reference.
MARGIN_LIMIT = 20.0


# Losses that average over tokens aim at margins per token; the sum over a long completion passes 20 by design.
SUMMED_MARGINS = Guard(
    "rewards/margins",
    lambda margin: abs(margin) > MARGIN_LIMIT,
    f"is beyond {MARGIN_LIMIT:g} either way: the sigmoid is saturated, and where the margin is positive its gradient "
    "is below 2.1e-9 and teaches nothing more. Lower training.learning_rate, train fewer epochs, or take a loss with a "
    "bounded target (dpo.loss_type=ipo)",
)
# Of lists and labels, for which no loss has a bounded target.
OTHER_MARGINS = dataclasses.replace(
    SUMMED_MARGINS,
    meaning=f"is beyond {MARGIN_LIMIT:g} either way: the sigmoids of most answers are saturated, and teach nothing "
    "more. Lower training.learning_rate, raise dpo.beta, or train fewer epochs",
)


# One nat per token: every token of the preferred answers has become e times less likely, on average.
CHANGE_LIMIT = -1.0


_UNLIKELY = (
    f"is below {CHANGE_LIMIT:g} nat per token: the chosen answers have become e times less likely at every token than "
    "under the reference. Lower training.learning_rate"
)
CHOSEN_CHANGE = Guard(
    "logps/chosen_change",
    lambda change: change < CHANGE_LIMIT,
    f"{_UNLIKELY}, raise dpo.beta or dpo.nll_weight",
)
# Of labels, for which there is no dpo.nll_weight.
GOOD_CHANGE = dataclasses.replace(CHOSEN_CHANGE, meaning=f"{_UNLIKELY}, or raise dpo.beta")

# The same where there is no reference to compare with.
CHOSEN_FALL = Guard(
    "logps/chosen_per_token",
    lambda change: change < CHANGE_LIMIT,
    f"has fallen by over {-CHANGE_LIMIT:g} nat: the chosen answers have become e times less likely at every token than "
    "when this launch began. Lower training.learning_rate, or raise dpo.nll_weight",
    as_change=True,
)


def since_start(guard: Guard) -> Guard:
    """Return what watches a run whose policy does not start at its reference: changes since the launch began."""
    if guard not in (CHOSEN_CHANGE, GOOD_CHANGE):
        return guard
    advice = guard.meaning.rpartition(". ")[2]
    return dataclasses.replace(
        guard,
        meaning=f"has fallen by over {-CHANGE_LIMIT:g} nat: the chosen answers have become e times less likely at "
        f"every token than when this launch began. {advice}",
        as_change=True,
    )


class Guards:
    """Tells of each guard once per run."""

    def __init__(self, guards: Iterable[Guard]) -> None:
        self._armed = list(guards)
        self._first: dict[str, float] = {}

    def check(self, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that a line of metrics gives cause for, each naming its metric."""
        self._first = {**metrics, **self._first}
        tripped = [
            guard for guard in self._armed if guard.metric in metrics and guard.trips(self._seen(guard, metrics))
        ]
        self._armed = [guard for guard in self._armed if guard not in tripped]
        return [f"warning: {guard.metric} = {metrics[guard.metric]:.3g} {guard.meaning}" for guard in tripped]

    def _seen(self, guard: Guard, metrics: Mapping[str, float]) -> float:
        return metrics[guard.metric] - (self._first[guard.metric] if guard.as_change else 0.0)
