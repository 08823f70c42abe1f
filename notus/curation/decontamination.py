"""Find prompts that hold a question of a benchmark. Pure rules: no files, no torch.

Prompts alone are searched, as Tulu 3 does; answers are not. Text is compared by its words: NFKC, case folded,
without punctuation. A question counts as asked in a prompt in one of two ways:

`EQUAL`: the prompt is the question and nothing else.

`CONTAINED`: the question stands inside a longer prompt. How much of it must be there depends on its number of words:

| words of the question | asked where |
|---|---|
| n or more (n = 8) | its n-grams that occur in the prompt cover more than half of its words |
| 5 to n - 1 | all its words stand in the prompt, in a row |
| 3 or 4 | the same, as a clause of their own |
| 1 or 2 | nowhere: "Why?" is in too many prompts |

A clause ends with punctuation, a symbol, a line or the prompt, and begins after one or with a capital letter. So "Who
are you?" is found where it is asked, but not in "who are you going to invite?", nor "Do you think?" in "What do you
think?".

The first line is the rule of Tulu 3 (arXiv 2411.15124: 8-grams, more than 50% of the tokens of a test instance),
applied to words. It also finds questions that were shortened or changed in part. GPT-3 (arXiv 2005.14165) used
13-grams, which most questions of TruthfulQA are too short for; with n = 13 this rule asks for the whole of every
shorter question.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

EQUAL, CONTAINED = "the prompt is a listed question", "the prompt contains a listed question"
DEFAULT_NGRAM = 8
SMALLEST_NGRAM = 3
_ANYWHERE, _AS_A_CLAUSE = 5, 3  # fewest words of a question that is found anywhere, and as a clause of its own
_CAPITAL = re.compile(r"(?<=\s)(?=[A-Z])")

# Scripts that put no space between words: each character counts as a word.
_UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")

_Words = tuple[str, ...]


class Match(NamedTuple):
    """A question that a prompt holds: how (`EQUAL` or `CONTAINED`), and the question as it was listed."""

    how: str
    question: str


class Questions:
    """The questions of benchmarks, indexed so that a prompt is searched for all of them at once."""

    def __init__(self, questions: Iterable[str], ngram: int = DEFAULT_NGRAM) -> None:
        """Index `questions`; `ngram` is the n of the rule above.

        Raises ValueError for an `ngram` below 3, and for a question of punctuation alone.
        """
        if ngram < SMALLEST_NGRAM:
            raise ValueError(f"ngram is {ngram}; give {SMALLEST_NGRAM} or more, as shorter ones are in most prompts")
        self._questions: list[str] = []
        self._lengths: list[int] = []  # words of each question
        self._equal: dict[_Words, int] = {}
        self._as_clauses: dict[_Words, int] = {}
        # By number of words: each n-gram or whole question, and where it stands: (question, index of its first word).
        self._places: dict[int, dict[_Words, list[tuple[int, int]]]] = {}
        for question in questions:
            self._add(question, ngram)

    def __len__(self) -> int:
        return len(self._questions)

    def _add(self, question: str, ngram: int) -> None:
        words = tuple(word for clause in clauses(question) for word in clause)
        if not words:
            raise ValueError(f"the prompt {question!r:.40} to decontaminate by has nothing to compare; remove it")
        if words in self._equal:
            return
        number = self._equal[words] = len(self._questions)
        self._questions.append(question)
        self._lengths.append(len(words))
        length = min(ngram, len(words))
        if length >= min(ngram, _ANYWHERE):
            places = self._places.setdefault(length, {})
            for start, gram in enumerate(_ngrams(words, length)):
                places.setdefault(gram, []).append((number, start))
        elif length >= _AS_A_CLAUSE:
            self._as_clauses[words] = number

    def find(self, prompt: str) -> Match | None:
        """Return the first listed question that `prompt` holds, one that it equals before all others, or None."""
        if not self._questions:
            return None
        parts = clauses(prompt)
        words = tuple(word for clause in parts for word in clause)
        if (equal := self._equal.get(words)) is not None:
            return Match(EQUAL, self._questions[equal])
        found = [*self._covered(words), *self._asked(words, _ends(parts), prompt)]
        return Match(CONTAINED, self._questions[min(found)]) if found else None

    def _covered(self, words: _Words) -> Iterator[int]:
        """Yield the questions of which n-grams in `words` cover more than half."""
        covered: dict[int, set[int]] = defaultdict(set)
        for length, places in self._places.items():
            for gram in places.keys() & _ngrams(words, length):
                for number, start in places[gram]:
                    covered[number].update(range(start, start + length))
        for number, indices in covered.items():
            if 2 * len(indices) > self._lengths[number]:
                yield number

    def _asked(self, words: _Words, ends: list[int], prompt: str) -> Iterator[int]:
        """Yield the questions of few words that are clauses of `prompt`; `ends` are the ends of its clauses."""
        if not self._as_clauses:
            return
        spans = [(end - length, end) for end in ends for length in range(_AS_A_CLAUSE, min(_ANYWHERE, end + 1))]
        hits = [span for span in spans if words[slice(*span)] in self._as_clauses]
        if hits:  # rare, so that capitals need not be looked for in every prompt
            starts = {0, *_ends(clauses(_CAPITAL.sub("\n", prompt)))}
            yield from (self._as_clauses[words[start:end]] for start, end in hits if start in starts)


def normalized(prompt: str) -> str:
    """Return the words of `prompt` as they are compared, joined by spaces."""
    return " ".join(word for clause in clauses(prompt) for word in clause)


def clauses(text: str) -> list[list[str]]:
    """Return the words of `text`, NFKC and case folded, one list for each stretch between punctuation or lines."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return [words for line in folded.translate(_SEPARATORS).split("\n") if (words := line.split())]


def _ends(parts: Iterable[Sequence[str]]) -> list[int]:
    """Return for each clause the number of words up to its end."""
    return list(accumulate(map(len, parts)))


class _Separators(dict[int, str]):
    """A `str.translate` table, filled as it is used: punctuation and line ends end a clause, and a symbol is a word."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] == "P" or category in ("Cc", "Zl", "Zp"):
            self[code] = "\n"
        elif category == "Cf":  # soft hyphens, joiners: they are not seen
            self[code] = ""
        elif category[0] in "ZC":
            self[code] = " "
        elif category[0] == "S":
            self[code] = f"\n{character}\n"  # so that neither `code` nor <b>HTML</b> hides a word or a clause
        elif unicodedata.name(character, "").startswith(_UNSPACED):
            self[code] = f" {character} "
        else:
            self[code] = character
        return self[code]


_SEPARATORS = _Separators()


def _ngrams(words: Sequence[str], n: int) -> Iterable[_Words]:
    return zip(*(words[start:] for start in range(n)), strict=False)
