"""Special tokens that stand in what people and models say, and reading them as the plain text they are.

A tokenizer reads "</s>" as the token that ends a text, whoever wrote it. To separate what a message says from what the
template writes, the former is marked before the template is applied: a character that occurs nowhere else is put into
each of its special tokens. Where marks are found in the rendered text, plain text is to be read.

To read it, the tokenizer is copied, and in the copy every special token is called by an alias of the same length, of
characters that no text uses. The template's own special tokens are replaced by their aliases; then the whole text is
tokenised at once. So there is no seam: all else is read as ever, and offsets are those of the text.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # code points that Unicode keeps free of characters
_FIRST_ALIAS = 0x100000  # the second plane of private use

Region = tuple[int, int]


def pattern_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the longest of these strings; it never matches if there are none."""
    longest_first = sorted(set(strings) - {""}, key=lambda string: (-len(string), string))
    if not longest_first:
        return re.compile(r"(?!)")
    # Looking for the first characters alone is fast; a tokenizer may have a thousand special tokens.
    first = "".join(re.escape(character) for character in sorted({string[0] for string in longest_first}))
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, longest_first))})")


def strings_in(value: Any) -> Iterable[str]:
    """Yield every string in a value of JSON's kinds, except the roles of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "role":
                yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


def free_mark(texts: Iterable[str], special: re.Pattern[str]) -> str:
    """Return a character that is in none of the strings. Raises ValueError if all that may serve are used."""
    joined = "".join(texts)
    for mark in _MARKS:
        if mark not in joined and not special.search(mark):
            return mark
    raise ValueError("the text uses every code point from U+FDD0 to U+FDEF, which are no characters; remove them")


def marked(value: Any, special: re.Pattern[str], mark: str) -> Any:
    """Return the value with a mark behind the first character of every special token in its strings, but for roles."""
    if isinstance(value, str):
        return special.sub(lambda match: match[0][0] + mark + match[0][1:], value)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else marked(item, special, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [marked(item, special, mark) for item in value]
    return value


def unmarked(
    text: str, spans: Sequence[Region], special: re.Pattern[str], mark: str
) -> tuple[str, list[Region], tuple[Region, ...]]:
    """Remove the marks: return the text, the spans in it, and the regions of the special tokens that had marks.

    Raises ValueError if the template has escaped the marks, so that the text cannot be restored.
    """
    if f"\\u{ord(mark):04x}" in text.lower():
        raise ValueError("the chat template escapes what messages say, so split_special_tokens cannot be used")
    found = [match.start() for match in re.finditer(mark, text)]
    places = [at - before for before, at in enumerate(found)]
    text = text.replace(mark, "")
    matches = [special.match(text, place - 1) for place in places]
    moved = [(start - bisect_left(found, start), end - bisect_left(found, end)) for start, end in spans]
    return text, moved, tuple(match.span() for match in matches if match)


class PlainReader:
    """Tokenises strings of which some regions are to be read without special tokens.

    Raises ValueError for a tokenizer that reads a special token otherwise than by its name alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str]) -> None:
        backend = tokenizer.backend_tokenizer
        names = [token.content for token in tokenizer.added_tokens_decoder.values() if special.fullmatch(token.content)]
        self.special = special
        self.aliases = {name: chr(_FIRST_ALIAS + number) * len(name) for number, name in enumerate(names)}
        self.private = pattern_of(alias[0] for alias in self.aliases.values())
        self.copy = Tokenizer.from_str(json.dumps(_renamed(json.loads(backend.to_str()), self.aliases)))
        self.copy.no_truncation()
        self.copy.no_padding()
        ids, copied = backend.get_vocab(), self.copy.get_vocab()
        self.ids = {copied[self.aliases.get(name, name)]: number for name, number in ids.items()}
        for name in names:
            text = f"a {name} b{name}\nc"
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            if self.encode([text], [()])[0][0] != expected:
                raise ValueError(
                    f"this tokenizer cannot be used with split_special_tokens: its token {name!r} is matched in "
                    "normalized text; add the token with normalized=False"
                )

    def encode(self, texts: Sequence[str], plain: Sequence[Sequence[Region]]) -> list[tuple[list[int], list[Region]]]:
        """Return each string's ids and offsets; special tokens within its `plain` regions are read as text.

        Raises ValueError for a string that holds an alias.
        """
        named = [self._named(text, regions) for text, regions in zip(texts, plain, strict=True)]
        encodings = self.copy.encode_batch(named, add_special_tokens=False)
        return [([self.ids[token] for token in encoding.ids], encoding.offsets) for encoding in encodings]

    def check(self, text: str) -> None:
        """Raise ValueError for a string with characters that stand for special tokens."""
        used = self.private.search(text)
        if used:
            code = ord(used[0])
            raise ValueError(
                f"the text holds the private-use character U+{code:X}, which split_special_tokens needs; remove it"
            )

    def _named(self, text: str, plain: Sequence[Region]) -> str:
        pieces, at = [], 0
        for start, end in plain:
            pieces += [self._with_aliases(text[at:start]), text[start:end]]
            at = end
        return "".join([*pieces, self._with_aliases(text[at:])])

    def _with_aliases(self, text: str) -> str:
        return self.special.sub(lambda match: self.aliases.get(match[0], match[0]), text)


def _renamed(tokenizer: dict[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The content of a tokenizer.json with these tokens renamed, wherever text is matched against them."""
    for token in tokenizer["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    model = tokenizer["model"]
    if isinstance(model.get("vocab"), Mapping):
        model["vocab"] = {aliases.get(token, token): number for token, number in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):  # Unigram's pairs of token and score
        model["vocab"] = [[aliases.get(token, token), score] for token, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = aliases.get(model["unk_token"], model["unk_token"])
    return tokenizer
