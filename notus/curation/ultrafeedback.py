"""Rated completions -> preference pairs, by the rule of Notus 7B v1. Pure rules: no files, no torch.

A record of openbmb/UltraFeedback has `source`, `instruction` and `completions`; a completion has `model`,
`response`, `annotations` (per aspect an object with a `Rating`, "1" to "5" or "N/A") and `overall_score`.

The rule, after the data card of argilla/ultrafeedback-binarized-preferences:

1. A completion's score is the unweighted mean over the aspects whose rating is present and not "N/A"; with
   none rated it has no score. `by="overall_score"` takes the critique's score instead, faults and all.
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

The two schemas are columns, not contents: `v1` and `cleaned` hold the same pairs. The cleaned release also
left out what TruthfulQA contaminates: the records of source `truthful_qa` (`drop_sources`), and the ShareGPT prompts
that match one of its questions. `decontaminate` drops the prompts of every source that hold a listed question, by the
rule of `decontamination.py`. No pair holds the `custom_system_prompt` of a completion, as in the originals.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

from notus.curation.decontamination import CONTAINED, DEFAULT_NGRAM, EQUAL, Questions

RULES = ("ratings", "overall_score")
REJECTED = ("lower", "any")
SCHEMAS = ("v1", "cleaned")
SOURCE = "source left out"
TOO_FEW, TIED = "fewer than two scored completions", "all scored completions tie"
IDENTICAL = "chosen and rejected responses are the same text"
REASONS = (SOURCE, EQUAL, CONTAINED, TOO_FEW, TIED, IDENTICAL)
SHOWN_SOURCES, SHOWN_EXAMPLES = 20, 3


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


@dataclass
class Report:
    """Where the records went, and how the two rules compare.

    `compared` counts the records, contaminated and left out ones aside, in which both rules give a pair;
    `differing` those of them in which the chosen responses differ. `examples` are the first prompts that contain a
    question, with the question.
    """

    by: str
    rejected: str = "lower"
    records: Counter[str] = field(default_factory=Counter)  # per source
    pairs: Counter[str] = field(default_factory=Counter)  # per source
    dropped: Counter[str] = field(default_factory=Counter)  # per reason
    examples: list[tuple[str, str]] = field(default_factory=list)
    unscored: int = 0  # completions of the ranked records
    repeated_prompts: int = 0
    identical: int = 0  # pairs kept though their responses are the same text
    empty: int = 0  # pairs kept though a response is empty
    compared: int = 0
    differing: int = 0

    @property
    def differing_share(self) -> float:
        """Share of the compared records in which the rules choose different responses; 0 if none compares."""
        return self.differing / self.compared if self.compared else 0.0

    def __str__(self) -> str:
        drawn = "a strictly lower one" if self.rejected == "lower" else "any other"
        lines = [
            f"{self.records.total():,} records -> {self.pairs.total():,} pairs by {self.by}, {drawn} rejected",
            *self._drops(),
            f"  completions without a score, neither chosen nor rejected: {self.unscored:,}",
            f"  kept, with a prompt seen before: {self.repeated_prompts:,}",
            f"  kept, with an empty response (training drops these): {self.empty:,}",
        ]
        if self.identical:
            lines.append(f"  kept, though both responses are the same text (training drops these): {self.identical:,}")
        lines += [
            f"  ratings and overall_score choose different responses in {self.differing:,} of the "
            f"{self.compared:,} prompts where both give a pair ({self.differing_share:.1%})",
            *self._sources(),
        ]
        if self.pairs["truthful_qa"]:
            lines.append("  note: training on pairs from truthful_qa makes a TruthfulQA score meaningless")
        return "\n".join(lines)

    def _drops(self) -> Iterator[str]:
        for reason in REASONS:
            yield f"  dropped, {reason}: {self.dropped[reason]:,}"
            if reason == CONTAINED:
                yield from (f"    {_excerpt(question)} in {_excerpt(prompt)}" for prompt, question in self.examples)

    def _sources(self) -> Iterator[str]:
        for name, count in self.records.most_common(SHOWN_SOURCES):
            yield f"  from {name}: {self.pairs[name]:,} of {count:,}"
        if (more := len(self.records) - SHOWN_SOURCES) > 0:
            yield f"  and from {more:,} more sources"


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
    )
    placed = ((f"record {number}", record) for number, record in enumerate(records, start=1))
    return list(curator.pairs(placed)), curator.report


@dataclass(kw_only=True)
class Curator:
    """Turns records into pairs one at a time, and keeps the `report`. ValueError for a wrong option."""

    by: str = "ratings"
    """The score that ranks: "ratings", the mean over the aspects, or "overall_score", the critique's."""
    rejected: str = "lower"
    """What the rejected response is drawn from: "lower", the strictly lower scores, or "any", all other scored ones."""
    schema: str = "v1"
    """The columns of a pair: "v1" or "cleaned". Its rating columns hold the score that ranked."""
    seed: int = 42
    """Seed of the draw of the rejected response."""
    decontaminate: Iterable[str] = ()
    """Questions. Prompts that hold one are dropped."""
    ngram: int = DEFAULT_NGRAM
    """Words in the n-grams that find a question in a longer prompt."""
    drop_sources: Collection[str] = ()
    """Values of `source` to drop."""
    min_rating: int = 1
    """Lowest valid rating. The scale starts at 1; 0 admits zeros, which the published data holds a few of
    (a parsing fault), and averages them in as the original did."""
    keep_identical: bool = False
    """Keep the pairs whose two responses are the same text."""

    def __post_init__(self) -> None:
        options: list[tuple[str, object, tuple[object, ...]]] = [
            ("by", self.by, RULES),
            ("rejected", self.rejected, REJECTED),
            ("schema", self.schema, SCHEMAS),
            ("min_rating", self.min_rating, (0, 1)),
        ]
        for name, value, allowed in options:
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; choose one of {allowed}")
        self.report = Report(self.by, self.rejected)
        self._questions = Questions(self.decontaminate, self.ngram)
        self._seen: set[bytes] = set()

    def pairs(self, placed_records: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
        """The pairs of (place, record) tuples; a ValueError for a malformed record starts with its place."""
        for place, record in placed_records:
            try:
                pair = self.pair(record)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            if pair is not None:
                yield pair

    def pair(self, record: Any) -> dict[str, Any] | None:
        """The pair of one record in the schema's columns; None if it is dropped, and the report says why.

        Raises ValueError, naming the key and the remedy, for a record that does not have the form above.
        """
        source, instruction, completions = parse_record(record, min_rating=self.min_rating)
        self.report.records[source] += 1
        selected = self._select(source, instruction, completions)
        if isinstance(selected, str):
            self.report.dropped[selected] += 1
            return None
        self._count_pair(source, instruction, *selected)
        return _COLUMNS[self.schema](source, instruction, *selected, self.by)

    def _select(
        self, source: str, instruction: str, completions: list[Completion]
    ) -> tuple[Completion, Completion] | str:
        """(chosen, rejected), or the reason to drop the record."""
        if source in self.drop_sources:
            return SOURCE
        if (match := self._questions.find(instruction)) is not None:
            if match.how == CONTAINED and len(self.report.examples) < SHOWN_EXAMPLES:
                self.report.examples.append((instruction, match.question))
            return match.how
        selected = self._rank_and_draw(source, instruction, completions)
        if isinstance(selected, str) or self.keep_identical or not _identical(*selected):
            return selected
        return IDENTICAL

    def _rank_and_draw(
        self, source: str, instruction: str, completions: list[Completion]
    ) -> tuple[Completion, Completion] | str:
        choices = {}
        for rule in RULES:
            scores = [completion.scores[rule] for completion in completions]
            choices[rule] = rank(scores, ties=self.rejected == "any")
        self.report.unscored += sum(completion.scores[self.by] is None for completion in completions)
        self._compare([completions[choice[0]].response for choice in choices.values() if choice and choice[1]])
        if (choice := choices[self.by]) is None:
            return TOO_FEW
        best, others = choice
        if not others:
            return TIED
        drawn = draw(len(others), self.seed, source, instruction, completions)
        return completions[best], completions[others[drawn]]

    def _compare(self, chosen_responses: list[str]) -> None:
        both = len(chosen_responses) == len(RULES)
        self.report.compared += both
        self.report.differing += both and len(set(chosen_responses)) > 1

    def _count_pair(self, source: str, instruction: str, chosen: Completion, rejected: Completion) -> None:
        self.report.pairs[source] += 1
        self.report.identical += _identical(chosen, rejected)
        self.report.empty += not (chosen.response.strip() and rejected.response.strip())
        prompt = hashlib.blake2b(instruction.encode(), digest_size=16).digest()  # a few MB for 64k prompts
        self.report.repeated_prompts += prompt in self._seen
        self._seen.add(prompt)


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
    for text in texts:
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise ValueError(f"a string holds half a surrogate pair, {half}; remove it") from error
        digest.update(len(data).to_bytes(8, "big") + data)  # with lengths, so that no two lists read alike
    return int.from_bytes(digest.digest(), "big") % count


def _excerpt(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else f"{text[:length]}...")


def _identical(chosen: Completion, rejected: Completion) -> bool:
    return chosen.response.strip() == rejected.response.strip()


def parse_record(record: Any, *, min_rating: int = 1) -> tuple[str, str, list[Completion]]:
    """(source, instruction, completions) of a raw record. ValueError, naming the key, if it is malformed."""
    if not isinstance(record, dict):
        raise ValueError(f"{_kind(record)} is no record; give objects with source, instruction, completions")
    source, instruction = _text(record, "source"), _text(record, "instruction")
    raw = _value(record, "completions")
    if not isinstance(raw, list):
        raise ValueError(f"completions must be a list of rated completions, not {_kind(raw)}")
    completions = []
    for index, item in enumerate(raw):
        try:
            completions.append(_completion(item, min_rating))
        except ValueError as error:
            raise ValueError(f"completions[{index}]: {error}") from error
    return source, instruction, completions


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


def _completion(item: Any, min_rating: int) -> Completion:
    if not isinstance(item, dict):
        raise ValueError(f"a completion must be an object, not {_kind(item)}")
    ratings = mean_rating(item.get("annotations"), min_rating=min_rating)
    overall_score = _number(item.get("overall_score"), "overall_score", 0, 10)
    scores = {"ratings": ratings, "overall_score": overall_score}
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


@lru_cache(maxsize=1024)
def _parsed(value: str | int | float, lowest: int, highest: int) -> Fraction | None:
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


_COLUMNS = {"v1": _v1, "cleaned": _cleaned}
