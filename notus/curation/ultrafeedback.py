"""Rated completions -> preference pairs, by the rule of Notus 7B v1, or lists. Pure rules: no files, no torch.

A record of openbmb/UltraFeedback has `source`, `instruction` and `completions`; a completion has `model`,
`response`, `annotations` (per aspect an object with a `Rating`, "1" to "5" or "N/A") and `overall_score`. `notus rate`
writes the same form. There a completion may have a `reward` instead, any finite number, and a record may have the
prompt's `messages`, its `tools` and its `chat_template_kwargs`: then the prompt is more than one user turn, and
`instruction` is only how a judge reads it. A record with `plain_text` was completed as text, without a chat template.

The rule, after the data card of argilla/ultrafeedback-binarized-preferences:

1. A completion's score is the unweighted mean over the aspects whose rating is present and not "N/A"; with
   none rated it has no score. `by="overall_score"` takes the critique's score instead, faults and all, and
   `by="reward"` the reward model's.
2. Chosen is the highest score, the first of several. Rejected is a random one of those strictly lower.
3. Prompts with fewer than two scored completions, and prompts whose scored completions all tie, are dropped.

Zephyr's rule is `by="overall_score", rejected="any"`. The card of HuggingFaceH4/ultrafeedback_binarized says: chosen
is the highest overall score, rejected one of the remaining three at random. So the two may tie, and no prompt is
dropped: its first release has 63,966 pairs of UltraFeedback's 63,967 prompts. The card says neither which of several
highest scores was chosen (here the first) nor how the draw was seeded.

Pairs whose two responses are the same text, but for white space around it, are dropped: there is nothing to prefer.
The draw does not avoid them, so that every other pair is the one that the original rule gives. `keep_identical`
keeps them, as the original rule does.

The draw is a function of the seed and of the record's own text. So it depends neither on the order of the
records nor on what else the data holds, and a prompt that occurs again with other completions draws anew.
Repeated prompts are kept, as the original kept them, and counted.

The two schemas are columns, not contents: `v1` and `cleaned` hold the same pairs. With `conversations`, the prompt of a
`cleaned` row is a list of messages and its answers are what follows it, so that system turns, earlier answers and tools
can stand there. Only so can records with `messages`, `tools` or `chat_template_kwargs` be curated. Of a `plain_text`
record, prompt and answers are strings in a `cleaned` row or a list, which training reads as text to continue. If it
would read these strings otherwise (an answer that looks like a dialogue, two that repeat the prompt), the record is
dropped, because the model would learn another text than was sampled.

The cleaned release also
left out what TruthfulQA contaminates: the records of source `truthful_qa` (`drop_sources`), and the ShareGPT prompts
that match one of its questions. `decontaminate` drops the prompts of every source that hold a listed question, by the
rule of `decontamination.py`. No pair holds the `custom_system_prompt` of a completion, as in the originals.

`curate_lists` keeps all scored completions of a record instead, for losses of lists: at least two of them, not all the
same text. Nothing is drawn, and ties stay.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

from notus.curation.decontamination import CONTAINED, DEFAULT_NGRAM, EQUAL, Questions
from notus.data.formats import normalize
from notus.data.messages import read_messages

RULES = ("ratings", "overall_score", "reward")
COMPARED = ("ratings", "overall_score")  # a report says how often these two choose differently
REJECTED = ("lower", "any")
SCHEMAS = ("v1", "cleaned")
SOURCE = "source left out"
TOO_FEW, TIED = "fewer than two scored completions", "all scored completions tie"
IDENTICAL = "chosen and rejected responses are the same text"
ALL_IDENTICAL = "all scored responses are the same text"
NOT_PLAIN = "plain text that training would read as a conversation, or as repeating the prompt"
REASONS = (SOURCE, EQUAL, CONTAINED, TOO_FEW, TIED, IDENTICAL)
LIST_REASONS = (SOURCE, EQUAL, CONTAINED, TOO_FEW, ALL_IDENTICAL)
SHOWN_SOURCES, SHOWN_EXAMPLES, SHOWN_JUDGES = 20, 3, 3
LARGEST_REWARD = 1e30  # training reads nothing larger, which fp32 may not hold
_OF_TEMPLATE = ("tools", "chat_template_kwargs")


class ConversationError(ValueError):
    """A record's prompt is more than one user turn, which rows without `conversations` cannot hold."""


class PlainTextError(ValueError):
    """A record's prompt is plain text, which rows of the schema `v1` cannot hold: they have a user turn."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a record asks, and who judged the answers."""

    source: str
    instruction: str  # the prompt as a judge reads it
    messages: list[Any] | None = None  # the turns before the answer; None: `instruction` is the only one
    of_template: dict[str, Any] = field(default_factory=dict)  # tools and chat_template_kwargs, where there are some
    judge: str | None = None
    plain_text: bool = False  # `instruction` was continued as it is, without a chat template

    @property
    def is_conversation(self) -> bool:
        """Whether there is more than one user turn."""
        return self.messages is not None or bool(self.of_template)

    @property
    def turns(self) -> list[Any]:
        """The prompt as messages."""
        return self.messages or [{"role": "user", "content": self.instruction}]

    @property
    def prompt(self) -> str | list[Any]:
        """The prompt as training reads it: messages, or text to continue."""
        return self.instruction if self.plain_text else self.turns

    def answer(self, completion: "Completion") -> str | list[Any]:
        """What follows `prompt`."""
        text = completion.response
        return text if self.plain_text else [{"role": "assistant", "content": text}]


@dataclass(frozen=True, slots=True)
class Completion:
    """One model's response, and its exact score under each of the RULES; None where it has none."""

    model: str
    response: str
    scores: dict[str, Fraction | None]

    def score(self, rule: str) -> float:
        """The score that the completion was ranked by."""
        score = self.scores[rule]
        assert score is not None, "only scored completions are ranked"
        return float(score)


@dataclass(kw_only=True)
class Counts:
    """Where the records went.

    `made` counts the pairs or lists that they became. `examples` are the first prompts that contain a question, with
    the question.
    """

    by: str
    records: Counter[str] = field(default_factory=Counter)  # per source
    made: Counter[str] = field(default_factory=Counter)  # per source
    dropped: Counter[str] = field(default_factory=Counter)  # per reason
    examples: list[tuple[str, str]] = field(default_factory=list)
    unscored: int = 0  # completions of the ranked records
    repeated_prompts: int = 0
    empty: int = 0  # pairs or lists kept though a response is empty
    scored: int = 0  # completions of the ranked records
    scored_records: int = 0  # those with two or more of them
    judges: Counter[str] = field(default_factory=Counter)  # of the ranked records that name theirs
    _only_score: Fraction | None = None
    _scores_differ: bool = False

    def count_scores(self, completions: Iterable[Completion], judge: str | None) -> None:
        """Count the scores of a ranked record."""
        scores = [score for completion in completions if (score := completion.scores[self.by]) is not None]
        self.scored += len(scores)
        self.scored_records += len(scores) > 1
        if judge is not None:
            self.judges[judge] += 1
        if scores and self._only_score is None:
            self._only_score = scores[0]
        self._scores_differ |= any(score != self._only_score for score in scores)

    @property
    def same_score(self) -> str | None:
        """Says so, and names the judge, if all completions of several records have the same score; else None."""
        if self._scores_differ or self.scored_records < 2 or self._only_score is None:
            return None
        names = [name for name, _ in self.judges.most_common(SHOWN_JUDGES)]
        judge = f"the judge {' or '.join(names)}" if names else "the judge"
        score = f"{float(self._only_score):g}"
        return (
            f"{judge} gave all {self.scored:,} completions the same score by {self.by}, {score}, so there is nothing "
            "to prefer; use another judge, or other instructions for it"
        )

    def _drops(self, reasons: Iterable[str]) -> Iterator[str]:
        for reason in (*reasons, NOT_PLAIN) if self.dropped[NOT_PLAIN] else reasons:
            yield f"  dropped, {reason}: {self.dropped[reason]:,}"
            if reason == CONTAINED:
                yield from (f"    {_excerpt(question)} in {_excerpt(prompt)}" for prompt, question in self.examples)

    def _sources(self, kind: str) -> Iterator[str]:
        for name, count in self.records.most_common(SHOWN_SOURCES):
            yield f"  from {name}: {self.made[name]:,} of {count:,}"
        if (more := len(self.records) - SHOWN_SOURCES) > 0:
            yield f"  and from {more:,} more sources"
        if self.made["truthful_qa"]:
            yield f"  note: training on {kind} from truthful_qa makes a TruthfulQA score meaningless"


@dataclass(kw_only=True)
class Report(Counts):
    """Where the records went on the way to pairs, and how the two rules compare.

    `compared` counts the records, contaminated and left out ones aside, in which both rules give a pair;
    `differing` those of them in which the chosen responses differ.
    """

    rejected: str = "lower"
    identical: int = 0  # pairs kept though their responses are the same text
    compared: int = 0
    differing: int = 0

    @property
    def pairs(self) -> Counter[str]:
        """The pairs per source."""
        return self.made

    @property
    def differing_share(self) -> float:
        """Share of the compared records in which the rules choose different responses; 0 if none compares."""
        return self.differing / self.compared if self.compared else 0.0

    def __str__(self) -> str:
        drawn = "a strictly lower one" if self.rejected == "lower" else "any other"
        lines = [
            f"{self.records.total():,} records -> {self.pairs.total():,} pairs by {self.by}, {drawn} rejected",
            *self._drops(REASONS),
            f"  completions without a score, neither chosen nor rejected: {self.unscored:,}",
            f"  kept, with a prompt seen before: {self.repeated_prompts:,}",
            f"  kept, with an empty response (training drops these): {self.empty:,}",
        ]
        if self.identical:
            lines.append(f"  kept, though both responses are the same text (training drops these): {self.identical:,}")
        if self.compared:
            lines.append(
                f"  ratings and overall_score choose different responses in {self.differing:,} of the "
                f"{self.compared:,} prompts where both give a pair ({self.differing_share:.1%})"
            )
        return "\n".join([*lines, *self._sources("pairs")])


@dataclass(kw_only=True)
class ListReport(Counts):
    """Where the records went on the way to lists."""

    sizes: Counter[int] = field(default_factory=Counter)  # lists per number of completions
    tied: int = 0  # lists kept though all scores are the same

    def __str__(self) -> str:
        completions = sum(size * count for size, count in self.sizes.items())
        lists = f"{self.made.total():,} lists of {completions:,} completions"
        lines = [
            f"{self.records.total():,} records -> {lists}, rated by {self.by}",
            *self._drops(LIST_REASONS),
            f"  completions without a score, left out: {self.unscored:,}",
            *(f"  lists of {size} completions: {count:,}" for size, count in sorted(self.sizes.items())),
            f"  kept, though all completions have the same score: {self.tied:,}",
            f"  kept, with a prompt seen before: {self.repeated_prompts:,}",
            f"  kept, with an empty response (training leaves it out): {self.empty:,}",
            *self._sources("lists"),
        ]
        return "\n".join(lines)


def curate(
    records: Iterable[Any],
    *,
    by: str = "ratings",
    rejected: str = "lower",
    schema: str = "v1",
    seed: int = 42,
    decontaminate: Iterable[str] = (),
    ngram: int = DEFAULT_NGRAM,
    drop_sources: Collection[str] = (),
    min_rating: int = 1,
    keep_identical: bool = False,
    conversations: bool = False,
) -> tuple[list[dict[str, Any]], Report]:
    """Return all the pairs of `records`, in their order, and the report. The options are the fields of `Curator`.

    Raises ValueError for a wrong option, and for a malformed record, which it names by its number from 1.
    """
    curator = Curator(
        by=by,
        rejected=rejected,
        schema=schema,
        seed=seed,
        decontaminate=decontaminate,
        ngram=ngram,
        drop_sources=drop_sources,
        min_rating=min_rating,
        keep_identical=keep_identical,
        conversations=conversations,
    )
    return list(curator.rows(_numbered(records))), curator.report


def curate_lists(
    records: Iterable[Any],
    *,
    by: str = "ratings",
    decontaminate: Iterable[str] = (),
    ngram: int = DEFAULT_NGRAM,
    drop_sources: Collection[str] = (),
    min_rating: int = 1,
    conversations: bool = False,
) -> tuple[list[dict[str, Any]], ListReport]:
    """Return all the lists of `records`, in their order, and the report. The options are the fields of `ListCurator`.

    Raises ValueError as `curate` does.
    """
    curator = ListCurator(
        by=by,
        decontaminate=decontaminate,
        ngram=ngram,
        drop_sources=drop_sources,
        min_rating=min_rating,
        conversations=conversations,
    )
    return list(curator.rows(_numbered(records))), curator.report


def _numbered(records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"record {number}", record) for number, record in enumerate(records, start=1))


@dataclass(kw_only=True)
class RecordCurator(ABC):
    """Turns records into rows one at a time, and counts in `report`. ValueError for a wrong option."""

    by: str = "ratings"
    """The score that ranks: "ratings", the mean over the aspects, "overall_score", the critique's, or "reward"."""
    decontaminate: Iterable[str] = ()
    """Questions. Prompts that hold one are dropped."""
    ngram: int = DEFAULT_NGRAM
    """Words in the n-grams that find a question in a longer prompt."""
    drop_sources: Collection[str] = ()
    """Values of `source` to drop."""
    min_rating: int = 1
    """Lowest valid rating. The scale starts at 1; 0 admits zeros, which the published data holds a few of
    (a parsing fault), and averages them in as the original did."""
    conversations: bool = False
    """Whether prompts may be more than one user turn. Then a prompt is a list of messages, and each row has `tools` and
    `chat_template_kwargs`, None where there are none."""

    def __post_init__(self) -> None:
        self._check("by", self.by, RULES)
        self._check("min_rating", self.min_rating, (0, 1))
        self._questions = Questions(self.decontaminate, self.ngram)
        self._seen: set[bytes] = set()

    @property
    @abstractmethod
    def report(self) -> Counts:
        """Where the records went so far."""

    @abstractmethod
    def _made(self, asked: Asked, completions: list[Completion]) -> dict[str, Any] | str:
        """The row of a record that is not left out, or the reason to drop it."""

    def rows(self, placed_records: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows of (place, record) tuples; a ValueError for a malformed record starts with its place."""
        for place, record in placed_records:
            try:
                row = self.row(record)
            except (ConversationError, PlainTextError) as error:
                raise type(error)(f"{place}: {error}") from error
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            if row is not None:
                yield row

    def row(self, record: Any) -> dict[str, Any] | None:
        """The row of one record; None if it is dropped, and the report says why.

        Raises ValueError, naming the key and the remedy, for a record that does not have the form above.
        """
        asked, completions = parse_record(record, min_rating=self.min_rating, with_reward=self.by == "reward")
        if asked.is_conversation and not self.conversations:
            raise ConversationError(
                "the prompt has messages, tools or chat_template_kwargs, which a single user turn cannot hold; set "
                "conversations=True, with schema='cleaned' for pairs"
            )
        self.report.records[asked.source] += 1
        made = self._left_out(asked.source, asked.instruction) or self._made(asked, completions)
        if isinstance(made, str):
            self.report.dropped[made] += 1
            return None
        if self.conversations:
            made |= {name: asked.of_template.get(name) for name in _OF_TEMPLATE}
        self.report.made[asked.source] += 1
        prompt = hashlib.blake2b(asked.instruction.encode(), digest_size=16).digest()  # a few MB for 64k prompts
        self.report.repeated_prompts += prompt in self._seen
        self._seen.add(prompt)
        return made

    def _left_out(self, source: str, instruction: str) -> str | None:
        """The reason to drop a record, whatever its completions."""
        if source in self.drop_sources:
            return SOURCE
        if (match := self._questions.find(instruction)) is None:
            return None
        if match.how == CONTAINED and len(self.report.examples) < SHOWN_EXAMPLES:
            self.report.examples.append((instruction, match.question))
        return match.how

    @staticmethod
    def _check(name: str, value: object, allowed: tuple[object, ...]) -> None:
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; choose one of {allowed}")


@dataclass(kw_only=True)
class Curator(RecordCurator):
    """Turns records into pairs."""

    rejected: str = "lower"
    """What the rejected response is drawn from: "lower", the strictly lower scores, or "any", all other scored ones."""
    schema: str = "v1"
    """The columns of a pair: "v1" or "cleaned". Its rating columns hold the score that ranked."""
    seed: int = 42
    """Seed of the draw of the rejected response."""
    keep_identical: bool = False
    """Keep the pairs whose two responses are the same text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("rejected", self.rejected, REJECTED)
        self._check("schema", self.schema, SCHEMAS)
        if self.conversations and self.schema != "cleaned":
            raise ValueError(f"the schema {self.schema} has a string for a prompt; for conversations choose 'cleaned'")
        self._report = Report(by=self.by, rejected=self.rejected)

    @property
    def report(self) -> Report:
        """Where the records went so far."""
        return self._report

    def _made(self, asked: Asked, completions: list[Completion]) -> dict[str, Any] | str:
        selected = self._rank_and_draw(asked, completions)
        if isinstance(selected, str):
            return selected
        if _identical(selected) and not self.keep_identical:
            return IDENTICAL
        row = self._row(asked, *selected)
        if asked.plain_text and not _is_read_as_text(row):
            return NOT_PLAIN
        self.report.identical += _identical(selected)
        self.report.empty += not all(completion.response.strip() for completion in selected)
        return row

    def _row(self, asked: Asked, chosen: Completion, rejected: Completion) -> dict[str, Any]:
        if asked.plain_text and self.schema == "v1":
            raise PlainTextError("the prompt is plain text, and schema 'v1' makes a user turn of it; choose 'cleaned'")
        if asked.plain_text or self.conversations:
            return _messages_or_text(asked, chosen, rejected, self.by)
        return _COLUMNS[self.schema](asked.source, asked.instruction, chosen, rejected, self.by)

    def _rank_and_draw(self, asked: Asked, completions: list[Completion]) -> tuple[Completion, Completion] | str:
        choices = {}
        for rule in {*COMPARED, self.by}:
            scores = [completion.scores[rule] for completion in completions]
            choices[rule] = rank(scores, ties=self.rejected == "any")
        self.report.unscored += sum(completion.scores[self.by] is None for completion in completions)
        self.report.count_scores(completions, asked.judge)
        compared = [choices[rule] for rule in COMPARED]
        self._compare([completions[choice[0]].response for choice in compared if choice and choice[1]])
        if (choice := choices[self.by]) is None:
            return TOO_FEW
        best, others = choice
        if not others:
            return TIED
        drawn = draw(len(others), self.seed, asked.source, asked.instruction, completions)
        return completions[best], completions[others[drawn]]

    def _compare(self, chosen_responses: list[str]) -> None:
        both = len(chosen_responses) == len(COMPARED)
        self.report.compared += both
        self.report.differing += both and len(set(chosen_responses)) > 1


@dataclass(kw_only=True)
class ListCurator(RecordCurator):
    """Turns records into lists of all their scored completions, in the order of the record.

    The columns are `source`, `prompt`, `completions`, `ratings` (the score that `by` names) and `models`. Prompt and
    completions are messages, so no text of theirs can be taken for a conversation; of plain text they are strings.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._report = ListReport(by=self.by)

    @property
    def report(self) -> ListReport:
        """Where the records went so far."""
        return self._report

    def _made(self, asked: Asked, completions: list[Completion]) -> dict[str, Any] | str:
        scored = [completion for completion in completions if completion.scores[self.by] is not None]
        self.report.unscored += len(completions) - len(scored)
        self.report.count_scores(scored, asked.judge)
        if len(scored) < 2:
            return TOO_FEW
        for text in (
            asked.source,
            asked.instruction,
            *(each for item in scored for each in (item.model, item.response)),
        ):
            _encoded(text)
        if _identical(scored):
            return ALL_IDENTICAL
        row = {
            "source": asked.source,
            "prompt": asked.prompt,
            "completions": [asked.answer(completion) for completion in scored],
            "ratings": [completion.score(self.by) for completion in scored],
            "models": [completion.model for completion in scored],
        }
        if asked.plain_text and not _is_read_as_text(row):
            return NOT_PLAIN
        self.report.sizes[len(scored)] += 1
        self.report.tied += len({completion.scores[self.by] for completion in scored}) == 1
        self.report.empty += not all(completion.response.strip() for completion in scored)
        return row


def rank(scores: Sequence[Fraction | None], *, ties: bool = False) -> tuple[int, list[int]] | None:
    """(index of the first of the highest, indices of all strictly lower); None for fewer than two scores.

    With `ties` the indices are of all other scores, lower or not. Scores are exact, so that rounding neither makes
    nor breaks a tie. When all tie the list is empty.
    """
    scored = [(i, score) for i, score in enumerate(scores) if score is not None]
    if len(scored) < 2:
        return None
    highest = max(score for _, score in scored)
    best = scores.index(highest)
    return best, [i for i, score in scored if (i != best if ties else score < highest)]


def draw(count: int, seed: int, source: str, instruction: str, completions: Iterable[Completion]) -> int:
    """Return a number in [0, count) by a hash of the seed and the record's strings. ValueError for broken Unicode."""
    texts = [str(seed), source, instruction]
    for completion in completions:
        texts += completion.model, completion.response
    digest = hashlib.blake2b(digest_size=8)
    for data in map(_encoded, texts):
        digest.update(len(data).to_bytes(8, "big") + data)  # with lengths, so that no two lists read alike
    return int.from_bytes(digest.digest(), "big") % count


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(f"a string holds half a surrogate pair, {half}; remove it") from error


def _excerpt(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else f"{text[:length]}...")


def _identical(completions: Sequence[Completion]) -> bool:
    """Whether all responses are the same text, but for white space around it."""
    return len({completion.response.strip() for completion in completions}) == 1


def parse_record(record: Any, *, min_rating: int = 1, with_reward: bool = False) -> tuple[Asked, list[Completion]]:
    """(what is asked, completions) of a raw record. ValueError, naming the key, if it is malformed.

    A `reward` is read only `with_reward`: elsewhere it may be anything.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{_kind(record)} is no record; give objects with source, instruction, completions")
    source, instruction = _text(record, "source"), _text(record, "instruction")
    raw = _value(record, "completions")
    if not isinstance(raw, list):
        raise ValueError(f"completions must be a list of rated completions, not {_kind(raw)}")
    completions = []
    for index, item in enumerate(raw):
        try:
            completions.append(_completion(item, min_rating, with_reward))
        except ValueError as error:
            raise ValueError(f"completions[{index}]: {error}") from error
    rated = record.get("rated")
    judge = rated.get("judge") if isinstance(rated, dict) else None
    of_template = {name: record[name] for name in _OF_TEMPLATE if record.get(name)}
    name = judge if isinstance(judge, str) else None
    asked = Asked(source, instruction, _messages(record), of_template, name, _plain_text(record))
    if asked.plain_text and asked.is_conversation:
        raise ValueError("plain_text is true, but messages, tools or chat_template_kwargs are for a chat; remove one")
    return asked, completions


def _plain_text(record: dict[str, Any]) -> bool:
    value = record.get("plain_text")
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"plain_text must be true or false, not {_kind(value)}")
    return bool(value)


def _is_read_as_text(row: dict[str, Any]) -> bool:
    """Whether training reads the strings of a row as they are: a prompt, and what continues it."""
    texts = row["completions"] if "completions" in row else [row["chosen"], row["rejected"]]
    try:
        found = normalize(row, "lists" if "completions" in row else "dpo")
    except ValueError:  # a dialogue, for instance, whose speakers do not take turns
        return False
    return found.prompt == row["prompt"] and sorted(map(str, found.completions)) == sorted(texts)


def _messages(record: dict[str, Any]) -> list[Any] | None:
    """The turns before the answer, as they stand. ValueError if they are no messages, or end with an answer."""
    messages = record.get("messages")
    if messages is None:
        return None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list of the turns before the answer, not {_kind(messages)}")
    if read_messages(messages, "messages", "user")[-1]["role"] == "assistant":
        raise ValueError("messages ends with an assistant turn; it must end with the turn that is answered")
    return messages


def mean_rating(annotations: Any, *, min_rating: int = 1) -> Fraction | None:
    """The exact mean over the rated aspects of one completion's `annotations`; None if none is rated.

    An aspect is an object with a `Rating`, or a list of one such object (the form of an early release).
    Raises ValueError for any other form, and for a rating that is neither a number in range nor "N/A".
    """
    if annotations is None:
        return None
    if not isinstance(annotations, dict):
        raise ValueError(f"annotations must be an object of aspects, not {_kind(annotations)}")
    ratings = [_aspect_rating(aspect, value, min_rating) for aspect, value in annotations.items()]
    rated = [rating for rating in ratings if rating is not None]
    return sum(rated, start=Fraction(0)) / len(rated) if rated else None


def _aspect_rating(aspect: str, value: Any, min_rating: int) -> Fraction | None:
    if isinstance(value, list):
        if len(value) > 1:
            raise ValueError(f"annotations.{aspect} lists {len(value)} annotations; leave one")
        value = value[0] if value else None
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"annotations.{aspect} must be an object with a Rating, not {_kind(value)}")
    return _number(value.get("Rating"), f"annotations.{aspect}.Rating", min_rating, 5)


def _completion(item: Any, min_rating: int, with_reward: bool) -> Completion:
    if not isinstance(item, dict):
        raise ValueError(f"a completion must be an object, not {_kind(item)}")
    ratings = mean_rating(item.get("annotations"), min_rating=min_rating)
    overall_score = _number(item.get("overall_score"), "overall_score", 0, 10)
    reward = _reward(item.get("reward")) if with_reward else None
    scores = {"ratings": ratings, "overall_score": overall_score, "reward": reward}
    return Completion(_text(item, "model"), _text(item, "response"), scores)


def _value(mapping: dict[str, Any], key: str) -> Any:
    if key not in mapping:
        found = ", ".join(map(str, mapping)) or "nothing"
        raise ValueError(f"{key} is missing (there is {found}); give UltraFeedback's own, unpaired records")
    return mapping[key]


def _text(mapping: dict[str, Any], key: str) -> str:
    value = _value(mapping, key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, not {_kind(value)}")
    return value


def _number(value: Any, key: str, lowest: int, highest: int) -> Fraction | None:
    if value is None or value == "N/A":
        return None
    number = None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        number = _parsed(value, lowest, highest)
    if number is None:
        remedy = 'correct it, or make it "N/A" or null to leave it out'
        if value in ("0", 0):
            remedy += "; --min-rating 0 (min_rating=0) averages zeros in"
        raise ValueError(f"{key} is {value!r:.60}, not a number from {lowest} to {highest}; {remedy}")
    return number


def _reward(value: Any) -> Fraction | None:
    if value is None or value == "N/A":
        return None
    number = None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        number = _parsed(value, -LARGEST_REWARD, LARGEST_REWARD)
    if number is None:
        raise ValueError(
            f"reward is {value!r:.60}, not a number within ±{LARGEST_REWARD:g}; correct it, or make it null to leave "
            "it out"
        )
    return number


@lru_cache(maxsize=1024)
def _parsed(value: str | int | float, lowest: float, highest: float) -> Fraction | None:
    """The number exactly as it reads in decimals; None where it is none, not finite, or out of range."""
    try:
        number = Fraction(repr(float(value)))
    except (ValueError, OverflowError):
        return None
    return number if lowest <= number <= highest else None


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"


def _v1(source: str, instruction: str, chosen: Completion, rejected: Completion, by: str) -> dict[str, Any]:
    return {
        "source": source,
        "instruction": instruction,
        "chosen_response": chosen.response,
        "rejected_response": rejected.response,
        "chosen_avg_rating": chosen.score(by),
        "rejected_avg_rating": rejected.score(by),
        "chosen_model": chosen.model,
    }


def _cleaned(source: str, prompt: str, chosen: Completion, rejected: Completion, by: str) -> dict[str, Any]:
    pair: dict[str, Any] = {"source": source, "prompt": prompt}
    for side, completion in (("chosen", chosen), ("rejected", rejected)):
        answer = {"role": "assistant", "content": completion.response}
        pair[side] = [{"role": "user", "content": prompt}, answer]
        pair[f"{side}-rating"] = completion.score(by)
        pair[f"{side}-model"] = completion.model
    return pair


def _messages_or_text(asked: Asked, chosen: Completion, rejected: Completion, by: str) -> dict[str, Any]:
    pair: dict[str, Any] = {"source": asked.source, "prompt": asked.prompt}
    for side, completion in (("chosen", chosen), ("rejected", rejected)):
        pair[side] = asked.answer(completion)
        pair[f"{side}-rating"] = completion.score(by)
        pair[f"{side}-model"] = completion.model
    return pair


_COLUMNS = {"v1": _v1, "cleaned": _cleaned}
