"""How different texts are from each other: distinct-n over all of them, self-similarity among those of one prompt.

A word is a run of letters, marks and digits in lower case. Scripts that write without spaces between words (Chinese,
Japanese, Thai, Lao, Khmer, Burmese) count by the character. Every other character that is no white space is a word,
too, as punctuation and emoji are.

Only the first `WORDS` words of a text count. The share of different n-grams falls as texts grow longer (Liu et al.
2022, arXiv 2202.13587), and answers do grow in training.
"""

import dataclasses
import functools
import itertools
from array import array
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

WORDS = 100
ORDERS = (1, 2, 3, 4)
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_WORD = rf"{_UNSPACED}\p{{M}}*|(?:(?!{_UNSPACED})[\p{{L}}\p{{M}}\p{{N}}_])+|\S"


@dataclasses.dataclass(frozen=True)
class Diversity:
    """How different some texts are."""

    # distinct-1 to distinct-4: different n-grams / all n-grams, over all texts together (Li et al. 2016,
    # arXiv 1510.03055). None: there is no such n-gram.
    distinct: tuple[float | None, ...]
    # How much two texts of one prompt have in common, see `similarity`; mean over a prompt's pairs, then over the
    # prompts with two texts or more. None: there is none.
    self_similarity: float | None
    # The share of texts that are, to the letter, an earlier text of the same prompt. None: no prompt has two texts.
    duplicates: float | None


def diversity(prompts: Iterable[Sequence[str]]) -> Diversity:
    """Measure texts, given as those of each prompt, in linear time and some 80 bytes a word."""
    known: dict[str, int] = {}
    ids, lengths = array("q"), array("q")
    similar: list[float] = []
    repeats = compared = 0
    for texts in prompts:
        of_prompt = [[known.setdefault(word, len(known)) for word in words(text)] for text in texts]
        for text_ids in of_prompt:
            ids.extend(text_ids)
            lengths.append(len(text_ids))
        if len(texts) > 1:
            similar.append(fmean(itertools.starmap(_dice, itertools.combinations(map(_bigrams, of_prompt), 2))))
            repeats += len(texts) - len(set(texts))
            compared += len(texts)
    return Diversity(
        distinct=_distinct(np.array(ids, dtype=np.int64), np.array(lengths, dtype=np.int64), len(known)),
        self_similarity=fmean(similar) if similar else None,
        duplicates=repeats / compared if compared else None,
    )


def words(text: str) -> list[str]:
    """Return the first `WORDS` words of a text."""
    for part in (text[: 8 * WORDS], text):  # the beginning mostly does; its last word may be cut off, and is one more
        valid = part.encode("utf-8", "replace").decode()  # the splitter takes no half of a surrogate pair
        found = _splitter().pre_tokenize_str(valid.lower())
        if len(found) > WORDS:
            break
    return [word for word, _ in found[:WORDS]]


@functools.cache
def _splitter() -> "PreTokenizer":
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    return Split(Regex(_WORD), behavior="removed", invert=True)


def similarity(one: Sequence[int], other: Sequence[int]) -> float:
    """Return how much two texts, lists of words, have in common: the Dice coefficient of their sets of bigrams.

    That is twice the bigrams in both, over those of the one plus those of the other (Dice 1945, doi 10.2307/1932409):
    1 for texts of the same bigrams, 0 for texts without a common one. A text of fewer than two words is its own bigram.
    """
    return _dice(_bigrams(one), _bigrams(other))


def _bigrams(text: Sequence[int]) -> set[tuple[int, ...]]:
    return set(itertools.pairwise(text)) or {tuple(text)}


def _dice(one: set[tuple[int, ...]], other: set[tuple[int, ...]]) -> float:
    return 2 * len(one & other) / (len(one) + len(other))


def _distinct(ids: np.ndarray, lengths: np.ndarray, vocabulary: int) -> tuple[float | None, ...]:
    """Return distinct-n for each of `ORDERS`; `ids` [words] of all texts one after the other, `lengths` [texts]."""
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(ids))  # words from here to the text's end
    starts, grams = np.arange(len(ids)), np.zeros(len(ids), dtype=np.int64)
    shares = []
    for order in ORDERS:
        fits = left[starts] >= order
        starts = starts[fits]
        # an n-gram is known by the number of its first n - 1 words, and its last word
        keys = grams[fits] * vocabulary + ids[starts + order - 1]
        different, grams = np.unique(keys, return_inverse=True)
        shares.append(len(different) / len(starts) if len(starts) else None)
    return tuple(shares)
