"""Token ids as people can read them: the exact text of every token, special tokens included, and what is learned.

A tokenizer's own `decode` joins, trims and cleans up. Here each token stands for the bytes that it adds to the text, so
that text may be shown piece by piece and is the same as a whole.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from notus.data.packing import Example

LEARNED, LEARNED_END = "⟦", "⟧"
GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What a terminal would obey rather than show: control characters but tab and newline, and changes of direction.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Span(NamedTuple):
    """Neighbouring tokens that are learned or not, all of them special or none."""

    text: str
    learned: bool
    special: bool


class Pieces:
    """The bytes that each token of a tokenizer adds to the text, looked up as they are asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {int(number): str(token.content) for number, token in added.items()}
        self.special = {int(number) for number, token in added.items() if token.special}
        self.special |= set(tokenizer.all_special_ids)
        self._special_ids = np.array(sorted(self.special))
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
        kinds = {part["type"] for part in _parts(decoder)}
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        """The bytes of a token id; those of a character may be spread over several tokens."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._find(token)
        return found

    def are_special(self, ids: np.ndarray) -> np.ndarray:
        """Which of these tokens [T] are special: bool [T]."""
        return np.isin(ids, self._special_ids)

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens; � stands for what is no whole character."""
        return b"".join([self[int(token)] for token in ids]).decode("utf-8", "replace")

    def spans(self, ids: np.ndarray, mask: np.ndarray | None = None) -> Iterator[Span]:
        """Yield the text of tokens [T] in runs; `mask` [T] says what is learned, None: nothing."""
        learned = np.zeros(len(ids), bool) if mask is None else np.asarray(mask, bool)
        special = self.are_special(ids)
        edges = np.flatnonzero(np.diff(learned) | np.diff(special)) + 1
        for part in np.split(np.arange(len(ids)), edges):
            if len(part):
                yield Span(self.text(ids[part]), bool(learned[part[0]]), bool(special[part[0]]))

    def _find(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode("utf-8", "replace")
        piece = self._tokenizer.backend_tokenizer.id_to_token(token)
        if piece is None:  # an id of the model's vocabulary that the tokenizer does not have
            return f"<{token}>".encode()
        if self._byte_fallback and (match := _BYTE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        if self._byte_level:
            return b"".join(map(_byte_level_bytes, piece))
        return self._added_text(token).encode("utf-8", "replace")

    def _added_text(self, token: int) -> str:
        """What a token adds to the text before it: decoders treat the first token as none of the others."""
        before, both = self._decode([self._anchor]), self._decode([self._anchor, token])
        return both[len(before) :]

    @functools.cached_property
    def _anchor(self) -> int:
        return int(self._tokenizer("a", add_special_tokens=False)["input_ids"][-1])

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A tokenizer's decoders in the order in which they apply."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for each in decoder["decoders"] for part in _parts(each)]
    return [decoder]


def _byte_level_bytes(character: str) -> bytes:
    byte = _byte_level_characters().get(character)
    return character.encode("utf-8", "replace") if byte is None else bytes([byte])


@functools.cache
def _byte_level_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as GPT-2 chose them.

    Printable bytes stand for themselves; the others, in their order, are the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def shown(text: str) -> str:
    """The text for a terminal: control characters, which it would obey, are written as escapes."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def marked(spans: Iterator[Span], *, colour: bool = False) -> str:
    """Spans as text: what is learned is green and special tokens are dim, or without colour what is learned is in ⟦…⟧.

    Control characters are written as escapes.
    """
    if colour:
        return "".join(_coloured(span) for span in spans)
    text, inside = "", False
    for span in spans:
        if span.learned != inside:
            text, inside = text + (LEARNED if span.learned else LEARNED_END), span.learned
        text += shown(span.text)
    return text + LEARNED_END * inside


def _coloured(span: Span) -> str:
    codes = GREEN * span.learned + DIM * span.special
    return f"{codes}{shown(span.text)}{RESET}" if codes else shown(span.text)


def branch_names(count: int, *, is_list: bool = False) -> list[str]:
    """What the branches of an example are called. Two are a pair, unless they are of a list."""
    if count == 1:
        return ["completion"]
    if count == 2 and not is_list:
        return ["chosen", "rejected"]
    return [f"completion {number}" for number in range(1, count + 1)]


def describe_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, is_list: bool = False, colour: bool = False
) -> str:
    """An example as the model sees it, over several lines: prompt and completions, with what is learned marked.

    Args:
        example: its trunk is called the prompt, and what the loss sees of a branch is learned.
        tokenizer: the fast tokenizer that made it.
        is_list: its completions are rated ones, the best first; see `branch_names`.
        colour: mark with colours of a terminal in place of ⟦…⟧.
    """
    pieces = Pieces(tokenizer)
    lines = [f"prompt ({_tokens(len(example.trunk))}):", marked(pieces.spans(example.trunk), colour=colour)]
    columns = zip(
        branch_names(len(example.branches), is_list=is_list), example.branches, example.loss_masks, strict=True
    )
    for name, ids, mask in columns:
        lines += [
            f"{name} ({_tokens(len(ids))}, {int(mask.sum())} learned):",
            marked(pieces.spans(ids, mask), colour=colour),
        ]
    return "\n".join(lines)


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count:,} tokens"
