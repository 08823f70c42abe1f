"""Conversations to token ids and completion mask, together.

Each whole conversation is rendered to one text and tokenised once; the mask comes from the character offsets
of the same tokenisation, so ids and mask cannot disagree and no word is split or lost where prompt and
completion meet.

What is learned of an assistant turn: all that follows its generation prompt, through the token that closes
the turn. That is the end-of-sequence token (EOS) where the template writes it. A template that closes the
last turn with another special token (ChatML's <|im_end|> beside a different EOS), or with none, gets the EOS
appended: the model learns the template's own ending, and then to stop. What the template writes after that is
cut.

The beginning-of-sequence token (BOS) stands where the tokenizer's post-processor or the template puts one,
once.
"""

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from notus.data.formats import Message, Turns

# Each turn is <|role|>, a newline, the text, EOS, a newline: the format of Zephyr and Notus.
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class Rendered(NamedTuple):
    """A conversation as text, the character ranges [start, end) that are learned, and whether a template made it."""

    text: str
    spans: list[tuple[int, int]]
    templated: bool = False


class Encoded(NamedTuple):
    """A conversation as tokens: `ids` int32 [T], and `mask` int8 [T], 1 where the token is learned."""

    ids: np.ndarray
    mask: np.ndarray


class ChatEncoder:
    """Turns conversations into token ids and completion mask, with one tokenizer and one template.

    `chat_template` is None (the tokenizer's own template, Zephyr's where it has none), "zephyr", or the path
    of a .jinja file. `add_empty_system` puts an empty system turn in front of conversations that have no
    system turn. Raises ValueError for a tokenizer without offsets or EOS, and for an unknown template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        add_empty_system: bool = False,
    ) -> None:
        _check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.eos = str(tokenizer.eos_token)
        self.template = resolve_template(tokenizer, chat_template)
        self.add_empty_system = add_empty_system
        self.prefix = _prefix_ids(tokenizer)
        self.special = _special_token_pattern(tokenizer)

    def encode(self, conversations: Sequence[tuple[Turns, Turns]]) -> list[Encoded]:
        """Tokenise (prompt, completion) conversations, each as one text; errors as in `render`."""
        return self.tokenize([self.render(prompt, completion) for prompt, completion in conversations])

    def encode_prompt(self, prompt: Turns) -> list[int]:
        """Token ids of a prompt that awaits its completion: generation prompt last, BOS where it belongs."""
        text = prompt if isinstance(prompt, str) else self._apply(self._prepare(prompt), generation=True)
        return self.tokenize([Rendered(text, [])], closed=False)[0].ids.tolist()

    def has_text(self, completion: Turns) -> bool:
        """Whether a completion holds anything to learn: text, or an assistant turn with text."""
        if isinstance(completion, str):
            return bool(self._without_eos(completion).strip())
        answers = (message["content"] for message in completion if message["role"] == "assistant")
        return any(self.has_text(answer) for answer in answers)

    def render(self, prompt: Turns, completion: Turns) -> Rendered:
        """Render one conversation and find what is learned: the non-empty assistant turns of the completion.

        Raises ValueError where the template refuses the conversation, or renders a prompt differently once
        its completion follows. Expects a completion that `has_text`.
        """
        if isinstance(prompt, str):
            assert isinstance(completion, str), "prompt and completion are both plain text or both messages"
            text = prompt + self._without_eos(completion) + self.eos
            return Rendered(text, [(len(prompt), len(text))])
        assert not isinstance(completion, str), "prompt and completion are both plain text or both messages"
        messages = self._prepare([*prompt, *completion])
        return self._render_turns(messages, first=len(messages) - len(completion))

    def tokenize(self, rendered: Sequence[Rendered], *, closed: bool = True) -> list[Encoded]:
        """Tokenise texts, each as one. `closed` texts end in EOS; ValueError if the tokenizer splits it."""
        if not rendered:
            return []
        batch = self.tokenizer(
            [item.text for item in rendered],
            add_special_tokens=False,  # the prefix is added below, where the text does not bring it already
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        columns = zip(batch["input_ids"], batch["offset_mapping"], rendered, strict=True)
        encoded = [self._mask(ids, offsets, item.spans) for ids, offsets, item in columns]
        for item in encoded:
            self._check_ends(item.ids, closed)
        return encoded

    def digest(self) -> str:
        """Digest of all that decides the tokens: the tokenizer's content, template and options."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # A call of the tokenizer elsewhere leaves these two set; they do not bear on ours.
        del backend["truncation"], backend["padding"]
        parts = [backend, self.eos, self.tokenizer.bos_token, self.template, self.special.pattern]
        return hashlib.sha256(json.dumps([*parts, self.add_empty_system], sort_keys=True).encode()).hexdigest()

    def _render_turns(self, messages: list[Message], first: int) -> Rendered:
        learned = [i for i in range(max(first, 1), len(messages)) if self.has_text([messages[i]])]
        assert learned, "a completion without text is dropped before it is rendered"
        messages = messages[: learned[-1] + 1]
        whole = self._apply(messages)
        starts = [self._turn_start(messages, turn, whole) for turn in learned]
        # A turn ends before the next one that is learned begins.
        limits = [*starts[1:], len(whole)]
        spans, closed = [], False
        for turn, start, limit in zip(learned, starts, limits, strict=True):
            end, closed = self._turn_end(whole, messages[turn]["content"], start, limit)
            spans.append((start, end))
        text = whole[: spans[-1][1]]
        if not closed:
            text += self.eos
            spans[-1] = (starts[-1], len(text))
        return Rendered(text, spans, templated=True)

    def _turn_start(self, messages: list[Message], turn: int, whole: str) -> int:
        """Where the answer begins in `whole`: behind its prompt as rendered alone."""
        prompt = self._apply(messages[:turn], generation=True)
        if not whole.startswith(prompt):
            raise ValueError(
                f"the chat template renders the prompt of turn {turn + 1} differently once its answer "
                f"follows (alone, the prompt ends {prompt[-40:]!r}), so the answer cannot be found; use "
                "chat_template=zephyr, or a .jinja file whose generation prompt begins an assistant turn"
            )
        return len(prompt)

    def _turn_end(self, whole: str, content: str, start: int, limit: int) -> tuple[int, bool]:
        """Where what is learned of the answer between `start` and `limit` ends, and whether EOS ends it."""
        # Templates may trim the content. One that alters it (say, drops its reasoning) leaves it unfound:
        # then the whole range is searched for the turn's ending.
        found = whole.find(content.strip(), start, limit)
        at = found + len(content.strip()) if found >= 0 else start
        trailing = content[len(content.rstrip()) :]
        if found >= 0 and whole.startswith(trailing, at, limit):
            at += len(trailing)
        eos = whole.find(self.eos, at, limit)
        if eos >= 0:
            return eos + len(self.eos), True
        closing = self.special.search(whole, at, limit)
        if closing:
            return closing.end(), False
        return at if found >= 0 else len(whole[:limit].rstrip()), False

    def _apply(self, messages: list[Message], *, generation: bool = False) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, add_generation_prompt=generation, tokenize=False
            )
            return str(rendered)
        except Exception as error:  # besides Jinja's own, a template's expressions raise whatever Python's do
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the chat template refuses a conversation of the turns {roles}: {error}; "
                "change these turns, or use chat_template=zephyr, which takes any"
            ) from error

    def _prepare(self, messages: list[Message]) -> list[Message]:
        """The messages as they are rendered: EOS is left to the template, the empty system turn is added."""
        messages = [{**message, "content": self._without_eos(message["content"])} for message in messages]
        if self.add_empty_system and not any(message["role"] == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": ""})
        return messages

    def _without_eos(self, text: str) -> str:
        while text.endswith(self.eos):
            text = text.removesuffix(self.eos)
        return text

    def _mask(self, ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> Encoded:
        """Mark every token that holds a character of a span.

        A span's tokens are a run, found by its ends: several byte tokens of one character share an offset,
        and tokenizers that trim offsets give a token of spaces an empty one.
        """
        mask = np.zeros(len(ids), dtype=np.int8)
        for start, end in spans:
            first = bisect_right(offsets, start, key=lambda offset: offset[1])
            last = bisect_left(offsets, end, key=lambda offset: offset[0])
            mask[first:last] = 1
        if self.prefix and tuple(ids[: len(self.prefix)]) != self.prefix:
            ids = [*self.prefix, *ids]
            mask = np.concatenate([np.zeros(len(self.prefix), dtype=np.int8), mask])
        mask[:1] = 0  # nothing stands before the first token to predict it from
        return Encoded(np.array(ids, dtype=np.int32), mask)

    def _check_ends(self, ids: np.ndarray, closed: bool) -> None:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and bos != eos and len(ids) > 1 and ids[0] == bos == ids[1]:
            raise ValueError("the text begins with two BOS tokens: the chat template must write one at most")
        if closed and ids[-1] != eos:
            raise ValueError(
                f"the tokenizer does not read its own EOS {self.eos!r} as the one token {eos}; "
                "declare it as a special token in the tokenizer"
            )


def resolve_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """The Jinja text of the template to use; see `ChatEncoder`. ValueError for a name that is no template."""
    if chat_template is None:
        return tokenizer.get_chat_template() if tokenizer.chat_template else ZEPHYR_TEMPLATE
    if chat_template == "zephyr":
        return ZEPHYR_TEMPLATE
    path = Path(chat_template)
    if path.suffix != ".jinja" or not path.is_file():
        raise ValueError(
            f"chat_template {chat_template!r} is neither 'zephyr' nor an existing .jinja file; leave it out "
            "to use the tokenizer's own template"
        )
    return path.read_text(encoding="utf-8")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ValueError if the tokenizer has ids that the model's embedding of `vocab_size` rows does not."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer does not fit the model: its token {token!r} has id {largest}, but the model's "
            f"vocabulary ends at {vocab_size - 1}; use the model's own tokenizer"
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer (tokenizer.json)"
        )
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no EOS token; set eos_token in its tokenizer_config.json")


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer's post-processor puts in front of a text: most often BOS, or nothing."""
    backend = tokenizer.backend_tokenizer
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return tuple(full[:at])


def _special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(re.escape(token) for token in longest_first))
