"""Reads ratings from what a language model answers. What cannot be read is left out, never guessed.

Models that no schema binds wrap the JSON in prose and code fences, use single quotes and trailing commas, name the
completions in their own way, write a rating as "4/5", or are cut off. All that is read. A rating that is out of range,
or given twice with different values, or that nothing ties to one completion and one aspect, is unreadable.
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from notus.feedback.judge import Annotation

# Bounds on the work that a hostile reply can make.
LONGEST = 200_000  # characters of a reply that are looked at
TRIES = 200  # places in a reply at which JSON seems to begin, but does not
DEEPEST = 12  # brackets within brackets
LOWEST, HIGHEST = 1, 5
_THOUGHT = re.compile(r"<(think|thinking|thought)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_END_OF_THOUGHT = re.compile(r"</(think|thinking|thought)>", re.IGNORECASE)
_RATING = re.compile(
    r"(?:rating\s*[:=]?\s*)?([0-9]+(?:\.[0-9]+)?)\s*(?:(?:/|out\s+of)\s*5(?:\.0)?|stars?|points?)?\.?", re.IGNORECASE
)
_NOT_RATED = re.compile(r"n\s*/?\s*a|not applicable", re.IGNORECASE)
_NUMBERED = re.compile(
    r"(?:(?:completion|response|answer|output|assistant|text)[\s_#-]*)?([0-9]{1,4}|[a-z])", re.IGNORECASE
)
_RATING_KEYS = ("rating", "score", "value")
_RATIONALE_KEYS = ("rationale", "reason", "reasoning", "explanation", "justification", "comment")
_NUMBER_KEYS = ("completion", "number", "id", "index", "completionnumber", "completionid", "completionindex")

Place = tuple[int, str]  # a completion's number from 1, and an aspect


def parse_ratings(reply: str, count: int, aspects: Sequence[str]) -> list[dict[str, Annotation]] | None:
    """Return the annotations of each of `count` completions by aspect, in order; None if no rating could be read.

    What the reply lacks, or what cannot be read in it, is an annotation that is `unreadable`.
    """
    reader = _Reader(count, aspects)
    for value in _values(_answer(reply[:LONGEST])):
        reader.read(value)
    # A number that no completion has: the judge counts from 0, or saw one more. Then the others are not sure either.
    if reader.is_miscounted or all(annotation.unreadable for annotation in reader.found.values()):
        return None
    lacking = Annotation(None, unreadable=True)
    return [
        {aspect: reader.found.get((number, aspect), lacking) for aspect in aspects} for number in range(1, count + 1)
    ]


def _answer(reply: str) -> str:
    """Return a reply without the model's thoughts. Where its template opened them, only their end is in the reply."""
    without = _THOUGHT.sub("", reply)
    end = _END_OF_THOUGHT.search(without)
    return without[end.end() :] if end else without


class _Reader:
    """Collects annotations from parsed JSON of any of the usual shapes."""

    def __init__(self, count: int, aspects: Sequence[str]) -> None:
        self.count, self.aspects = count, {_plain(aspect): aspect for aspect in aspects}
        self.found: dict[Place, Annotation] = {}
        self.conflicting: set[Place] = set()
        self.is_miscounted = False

    def read(self, value: Any) -> None:
        """Read what may hold several completions: an object by number or by aspect, or a list."""
        if isinstance(value, list):
            self._read_list(value)
        elif isinstance(value, dict):
            number = self._own_number(value)
            if number is not None:
                self._read_completion(number, value)
                return
            for key, part in value.items():
                self._read_key(str(key), part)

    def _read_key(self, key: str, part: Any) -> None:
        if (aspect := self._aspect(key)) is not None:
            self._read_aspect(aspect, part)
        elif (number := _number(key)) is not None:
            self._read_completion(number, part)
        elif isinstance(part, dict | list):
            self.read(part)

    def _read_list(self, parts: list[Any]) -> None:
        """Read a list of completions, each with its number, or all without and in order."""
        numbers = [self._own_number(part) if isinstance(part, dict) else None for part in parts]
        if any(number is not None for number in numbers):
            for part, number in zip(parts, numbers, strict=True):
                if number is not None:
                    self._read_completion(number, part)
        elif len(parts) == self.count > 1 and all(isinstance(part, dict) for part in parts):
            for number, part in enumerate(parts, start=1):
                self._read_completion(number, part)
        else:
            for part in parts:
                self.read(part)

    def _read_completion(self, number: int, part: Any) -> None:
        """Read the ratings of one completion: by aspect; or one rating, where there is one aspect."""
        if not 1 <= number <= self.count:
            self.is_miscounted = True
            return
        if isinstance(part, list) and len(part) == 1:
            part = part[0]
        aspects = {}
        if isinstance(part, dict):
            aspects = {key: self._aspect(str(key)) for key in part}
            if not any(aspects.values()):  # {"completion": 1, "ratings": {"honesty": 4}}
                inner = [each for each in part.values() if isinstance(each, dict)]
                if len(inner) == 1 and len(self.aspects) > 1:
                    part, aspects = inner[0], {key: self._aspect(str(key)) for key in inner[0]}
        for key, aspect in aspects.items():
            if aspect is not None:
                rationale = next((part[name] for name in part if _plain(str(name)) in _rationale_of(aspect)), "")
                self._add((number, aspect), _annotation(part[key], rationale))
        if not any(aspects.values()) and len(self.aspects) == 1:
            self._add((number, next(iter(self.aspects.values()))), _annotation(part))

    def _read_aspect(self, aspect: str, part: Any) -> None:
        """Read the ratings of all completions in one aspect: by number, or a list of all; of a single one as it is."""
        if self.count == 1:
            if isinstance(part, list) and len(part) == 1:
                part = part[0]
            numbered = isinstance(part, dict) and [key for key in part if _number(str(key)) is not None]
            if not numbered:
                self._add((1, aspect), _annotation(part))
                return
        parts: list[tuple[int, Any]] = []
        if isinstance(part, list) and len(part) == self.count:
            parts = list(enumerate(part, start=1))
        elif isinstance(part, dict):
            found = [(_number(str(key)), each) for key, each in part.items()]
            parts = [(number, each) for number, each in found if number is not None]
        for number, each in parts:
            if 1 <= number <= self.count:
                self._add((number, aspect), _annotation(each))
            else:
                self.is_miscounted = True

    def _add(self, place: Place, annotation: Annotation) -> None:
        before = self.found.get(place)
        if before is None or (before.unreadable and place not in self.conflicting):  # as where the form is repeated
            self.found[place] = annotation
        elif not annotation.unreadable and before.rating != annotation.rating:
            self.conflicting.add(place)
            self.found[place] = Annotation(None, unreadable=True)  # which of the two is meant, nobody knows

    def _aspect(self, key: str) -> str | None:
        plain = _plain(key)
        for name in (plain, *(plain.removesuffix(each) for each in _RATING_KEYS)):
            if name in self.aspects:
                return self.aspects[name]
        return None

    def _own_number(self, part: dict[str, Any]) -> int | None:
        """Return the number that an object gives itself: {"completion": 2, "honesty": ...}."""
        for key, value in part.items():
            if _plain(str(key)) in _NUMBER_KEYS and isinstance(value, int | str) and not isinstance(value, bool):
                number = _number(str(value))
                if number is not None:
                    return number
        return None


def _rationale_of(aspect: str) -> set[str]:
    return {_plain(aspect) + name for name in _RATIONALE_KEYS}


def _plain(key: str) -> str:
    return "".join(letter for letter in key.lower() if letter.isalnum())


def _number(key: str) -> int | None:
    """Return the number in "2", "completion_2", "Completion 2" or "B"; None if it names none."""
    match = _NUMBERED.fullmatch(key.strip())
    if match is None:
        return None
    return int(match[1]) if match[1].isdigit() else ord(match[1].lower()) - ord("a") + 1


def _annotation(value: Any, rationale: Any = "") -> Annotation:
    """Return what an aspect's value says: an object with a rating, or the rating alone."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        plain = {_plain(str(key)): each for key, each in value.items()}
        rationale = next((plain[key] for key in _RATIONALE_KEYS if key in plain), rationale)
        value = next((plain[key] for key in _RATING_KEYS if key in plain), None)
    rating, unreadable = read_rating(value)
    return Annotation(rating, rationale if isinstance(rationale, str) else "", unreadable)


def read_rating(value: Any) -> tuple[float | None, bool]:
    """Return a rating from 1 to 5, or None for one that does not apply; and whether it is unreadable."""
    if isinstance(value, str):
        if _NOT_RATED.fullmatch(value.strip()):
            return None, False
        match = _RATING.fullmatch(value.strip())
        value = float(match[1]) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, True
    if not LOWEST <= value <= HIGHEST:  # NaN is not, either
        return None, True
    return float(value), False


def _values(text: str) -> Iterator[Any]:
    """Yield the JSON objects and lists of a text, outermost ones, in order."""
    start, tries, scanned = 0, 0, 0
    while tries < TRIES and scanned < 4 * LONGEST and (match := _OPENING.search(text, start)):
        end, value = _value_at(text, match.start())
        if value is None:
            tries, scanned = tries + 1, scanned + end - match.start()
            start = match.start() + 1
        else:
            start = end
            yield value


_OPENING = re.compile(r"[{\[]")


def _value_at(text: str, start: int) -> tuple[int, Any]:
    """Return the end and the value of what opens at `start`; the value is None if it cannot be read."""
    try:
        value, end = json.JSONDecoder(strict=False, object_pairs_hook=_object).raw_decode(text, start)
        return end, value
    except (ValueError, RecursionError):
        pass
    end, closers = _extent(text, start)
    piece = text[start:end]
    if closers is None:
        return end, None
    if closers:  # cut off: what is complete in it counts
        cut = piece.rfind("}") + 1
        _, closers = _extent(piece[:cut], 0)
        piece = piece[:cut] + (closers or "")
    for read in (_read_json, _read_literal):
        value = read(piece)
        if isinstance(value, dict | list):
            return end, value
    return end, None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; a key that stands there twice with different values has none."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        result[key] = value if key not in result or result[key] == value else None
    return result


def _extent(text: str, start: int) -> tuple[int, str | None]:
    """Return where the brackets that open at `start` are closed again, and the closers lacking at the text's end.

    The closers are None for brackets that do not match, or are too deep.
    """
    stack: list[str] = []
    quoted = False
    position = start
    while position < len(text):
        letter = text[position]
        if quoted:
            position += letter == "\\"
            quoted = letter != '"'
        elif letter == '"':
            quoted = True
        elif letter in "{[":
            stack.append("}" if letter == "{" else "]")
            if len(stack) > DEEPEST:
                return position + 1, None
        elif letter in "}]":
            if stack.pop() != letter:
                return position + 1, None
            if not stack:
                return position + 1, ""
        position += 1
    return len(text), "".join(reversed(stack))


def _read_json(piece: str) -> Any:
    """Read JSON with trailing commas, which are taken out where no string holds them."""
    plain = re.sub(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', lambda match: match[1] or "", piece, flags=re.DOTALL)
    try:
        return json.JSONDecoder(strict=False, object_pairs_hook=_object).decode(plain)
    except (ValueError, RecursionError):
        return None


def _read_literal(piece: str) -> Any:
    """Read an object in Python's spelling: single quotes, None."""
    try:
        tree = ast.parse(piece.strip(), mode="eval")
        objects = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
        if any(len({ast.dump(key) for key in each.keys if key}) < len(each.keys) for each in objects):
            return None  # a key that stands there twice: which value is meant, nobody knows
        return ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
