"""Conversations to token ids and completion mask, together.

Each whole conversation is rendered to one string and tokenised once; the mask comes from the character offsets
of the same tokenisation, so ids and mask cannot disagree and no word is split or lost where prompt and
completion meet.

What is learned of an assistant turn:

- It begins behind the generation prompt: the text of its prompt, rendered alone, is how the conversation begins.
- It ends with what the template writes to close the turn, before the next turn begins, whatever its role. That may be
  the end-of-sequence token (EOS), another special token, an ordinary one or mere text. White space behind it is not
  learned, unless EOS follows. See `turns` for how it is found; no content can be mistaken for it.
- The last turn ends in EOS. A template that closes it with something else (ChatML's <|im_end|> beside a different
  EOS), or with nothing, gets the EOS appended: the model learns the template's own ending, and then to stop. What the
  template writes after EOS is cut, and so are turns after the last that is learned.
- Turns without text, reasoning or tool calls, an answer to nothing (the first turn), turns marked `"learn": False` and,
  with `mask_history`, all but the last of the rest are context.
- A turn is learned as the row says it, or not at all. Templates may trim it. One that drops or alters its content,
  reasoning or tool calls is an error that says what to do, and so is one that leaves out other turns or the tools.
- The arguments of calls are objects for the template, or JSON text for one that would print Python's form of an object.
- EOS at the end of an assistant turn's content, or of a plain completion, is left to the template. That of other
  turns stays.

The beginning-of-sequence token (BOS) stands where the tokenizer's post-processor or the template puts one, once.
Special tokens in what a row says are counted. They become control tokens, as they do where the model is served, unless
`split_special_tokens` has them read as plain text.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from notus.data import special_tokens
from notus.data.chat_template import (
    EMPTY_SYSTEM_HEAD,
    check_arguments,
    date_head,
    defaults_head,
    names_in,
    parse_date,
    split_date_head,
    with_head,
)
from notus.data.chat_template import ZEPHYR_TEMPLATE as ZEPHYR_TEMPLATE
from notus.data.chat_template import resolve_template as resolve_template
from notus.data.chat_template import uses_date as uses_date
from notus.data.formats import Message, Turns
from notus.data.messages import is_letter, listed
from notus.data.turns import Conversation, json_text, with_arguments

Tools = Sequence[Any]
_NO_ARGUMENTS: Mapping[str, Any] = {}
_OWN_TEMPLATE = "the tokenizer's chat template"


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: the text, special tokens included, except BOS where the tokenizer adds it.
        spans: the character ranges [start, end) that are learned.
        templated: whether a chat template made the text.
        glued: plain text of which the completion begins with a letter or digit right after one of the prompt, in
            scripts that put spaces between words.
        special_tokens: how many special tokens stand in what the row says, split or not.
        plain: the ranges of those that are read as plain text.
        empty_system: whether an empty system turn was added.
        history_masked: whether an earlier answer is not learned, but would be without `mask_history`.
    """

    text: str
    spans: list[tuple[int, int]]
    templated: bool = False
    glued: bool = False
    special_tokens: int = 0
    plain: tuple[tuple[int, int], ...] = ()
    empty_system: bool = False
    history_masked: bool = False


class Encoded(NamedTuple):
    """A conversation as tokens: `ids` int32 [T], and `mask` int8 [T], 1 where the token is learned."""

    ids: np.ndarray
    mask: np.ndarray


class EncodingError(ValueError):
    """A text whose tokens cannot be used; `item` is its index in what was given to `ChatEncoder.tokenize`."""

    def __init__(self, message: str, item: int) -> None:
        super().__init__(message)
        self.item = item

    def __reduce__(self) -> tuple[type["EncodingError"], tuple[str, int]]:
        """Pickle both arguments: worker processes raise it, too."""
        return type(self), (str(self), self.item)


class ChatEncoder:
    """Turns conversations into token ids and completion mask, with one tokenizer and one template.

    Args:
        tokenizer: a fast tokenizer with EOS.
        chat_template: None (the tokenizer's own template, Zephyr's where it has none), "zephyr", or the path of a
            .jinja file. Of a tokenizer's several templates, rows with tools get the one named "tool_use".
        add_empty_system: put an empty system turn in front of conversations that have no system turn.
        chat_template_kwargs: further arguments of the template, for all conversations; those of a row win.
        template_date: the date YYYY-MM-DD that the template takes for today; None: the one that an exported template
            was trained with, or else the present day, read once.
        mask_history: learn the last assistant turn only.
        split_special_tokens: read special tokens in what a row says as plain text, so that no message can write
            control tokens. This concerns the tokenizer's special tokens, and ordinary added tokens that the template
            writes between turns. The cost: where a message quotes a special token, the tokens learned differ from
            those that a server makes of the same message, unless it splits them too; and tokens merge with those of
            the text around. All other tokens are the same.

    Raises:
        ValueError: a tokenizer without offsets or EOS, or one whose special tokens cannot be split; an unknown
            template; arguments that the template does not read; another form of date.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        add_empty_system: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        template_date: str | None = None,
        mask_history: bool = False,
        split_special_tokens: bool = False,
    ) -> None:
        _check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.eos = str(tokenizer.eos_token)
        self.template, frozen = split_date_head(resolve_template(tokenizer, chat_template))
        self.tool_template, _ = split_date_head(resolve_template(tokenizer, chat_template, with_tools=True))
        self.template_name = _OWN_TEMPLATE if chat_template is None else f"the chat template {chat_template!r}"
        self.template_kwargs = dict(chat_template_kwargs or {})
        check_arguments(self.template_kwargs, self._templates, tokenizer, "chat_template_kwargs")
        self.date = frozen if frozen and template_date is None else parse_date(template_date)
        self.add_empty_system = add_empty_system
        self.mask_history = mask_history
        self.prefix = _prefix_ids(tokenizer)
        self.added = special_tokens.pattern_of(
            [*(token.content for token in tokenizer.added_tokens_decoder.values()), *tokenizer.all_special_tokens]
        )
        self.special = special_tokens.pattern_of(self._special_tokens())
        self._reader = special_tokens.PlainReader(tokenizer, self.special) if split_special_tokens else None

    def encode(self, conversations: Sequence[tuple[Turns, Turns]]) -> list[Encoded]:
        """Tokenise (prompt, completion) conversations, each as one string; errors as in `render` and `tokenize`."""
        return self.tokenize([self.render(prompt, completion) for prompt, completion in conversations])

    def encode_prompt(
        self, prompt: Turns, *, tools: Tools | None = None, template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the ids of a prompt that awaits its completion: generation prompt last, BOS where it belongs.

        Raises ValueError where the template refuses the prompt, or leaves out what it says; see `render`.
        """
        if isinstance(prompt, str):
            self._check_plain(tools, template_kwargs)
            self._check_private(prompt)
            rendered = Rendered(prompt, [], plain=self._regions(prompt) if self._reader else ())
        else:
            rendered = _Row(self, prompt, tools, template_kwargs).prompt()
        return self.tokenize([rendered], closed=False)[0].ids.tolist()

    def has_text(self, completion: Turns) -> bool:
        """Whether a completion holds anything to learn: text, or an assistant turn that says or calls something."""
        if isinstance(completion, str):
            return bool(self._without_eos(completion).strip())
        return any(self._is_answer(message) for message in completion)

    def render(
        self,
        prompt: Turns,
        completion: Turns,
        *,
        tools: Tools | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Render one conversation and find what is learned: the answers of the completion.

        Args:
            prompt: what stands before.
            completion: what follows; it `has_text`.
            tools: functions that the conversation may call, as JSON schemas.
            template_kwargs: the row's own arguments of the template.

        Raises:
            ValueError: the template refuses the conversation, leaves out or alters what it says, or renders a
                prompt differently once its completion follows; a plain text with tools or arguments; two BOS; half
                of a surrogate pair.
        """
        if isinstance(prompt, str):
            assert isinstance(completion, str), "prompt and completion are both plain text or both messages"
            self._check_plain(tools, template_kwargs)
            rendered = self._render_plain(prompt, completion)
        else:
            assert not isinstance(completion, str), "prompt and completion are both plain text or both messages"
            row = _Row(self, [*prompt, *completion], tools, template_kwargs)
            rendered = row.rendered(first=len(row.messages) - len(completion))
        bos = self.tokenizer.bos_token
        if bos and bos != self.eos and rendered.text.startswith(bos * 2) and (0, len(bos)) not in rendered.plain:
            raise ValueError(_TWO_BOS)
        return rendered

    def tokenize(self, rendered: Sequence[Rendered], *, closed: bool = True) -> list[Encoded]:
        """Tokenise texts, each as one.

        Raises EncodingError, which says the first text that is at fault: it begins with two BOS; or `closed` texts
        end in EOS, and the tokenizer does not read it as one token.
        """
        tokens: list[tuple[list[int], list[tuple[int, int]]]] = [([], [])] * len(rendered)
        for plain in (False, True):
            numbers = [number for number, item in enumerate(rendered) if bool(item.plain) == plain]
            for number, found in zip(numbers, self._read([rendered[number] for number in numbers]), strict=True):
                tokens[number] = found
        encoded = [self._mask(*found, item.spans) for found, item in zip(tokens, rendered, strict=True)]
        for number, item in enumerate(encoded):
            self._check_ends(item.ids, closed, number)
        return encoded

    def digest(self) -> str:
        """Return the digest of all that decides the tokens: the tokenizer's content, template and options."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # A call of the tokenizer elsewhere leaves these two set; they do not bear on ours.
        del backend["truncation"], backend["padding"]
        date = str(self.date) if self.writes_date else None
        parts = [
            backend,
            self.eos,
            self.tokenizer.bos_token,
            *self._templates,
            self.special.pattern,
            self.added.pattern,
        ]
        options = [self.add_empty_system, self.template_kwargs, date, self.mask_history, self._reader is not None]
        return hashlib.sha256(json.dumps([*parts, *options], sort_keys=True, default=str).encode()).hexdigest()

    def apply(
        self,
        messages: list[Message],
        *,
        generation: bool = False,
        tools: Tools | None = None,
        template_kwargs: Mapping[str, Any] = _NO_ARGUMENTS,
        template: str | None = None,
    ) -> str:
        """Render messages as they are, by `template` or the encoder's own. ValueError where it refuses them."""
        template = template or (self.tool_template if tools else self.template)
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                chat_template=self._with_date(template),
                add_generation_prompt=generation,
                tokenize=False,
                **{**self.template_kwargs, **template_kwargs},
            )
        except Exception as error:  # besides Jinja's own, a template's expressions raise whatever Python's do
            roles = listed(message["role"] for message in messages)
            calls = any(message.get("tool_calls") for message in messages)
            other = "a template for tools" if calls or tools else "chat_template=zephyr, which takes any"
            raise ValueError(
                f"the chat template refuses a conversation of the turns {roles}: {' '.join(str(error).split())}; "
                f"change these turns, or use {other}"
            ) from error
        try:
            str(text).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self.template_name} writes half of a surrogate pair at character {error.start} of a conversation; "
                "correct the template"
            ) from error
        return str(text)

    @property
    def writes_date(self) -> bool:
        """Whether a template of this encoder asks for today's date."""
        return any(map(uses_date, self._templates))

    @property
    def _templates(self) -> list[str]:
        return list(dict.fromkeys([self.template, self.tool_template]))

    def _with_date(self, template: str) -> str:
        return with_head(template, date_head(self.date)) if uses_date(template) else template

    def _special_tokens(self) -> set[str]:
        """The special tokens, and other added tokens that the template writes between turns."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        roles = ["user", "assistant", "user", "assistant", "user"]
        names = [f"Turn{number}n" for number in range(len(roles))]
        try:
            text = self.apply([{"role": role, "content": name} for role, name in zip(roles, names, strict=True)])
        except ValueError:  # a template for other conversations; it is refused where it is used
            return special
        _, _, between = text.partition(names[0])
        return special | set(self.added.findall(between.partition(names[-1])[0]))

    def _render_plain(self, prompt: str, completion: str) -> Rendered:
        said = prompt + self._without_eos(completion)
        regions = self._regions(said)
        start, text = len(prompt), said + self.eos
        self._check_private(said)
        return Rendered(
            text,
            [(start, len(text))],
            glued=is_letter(said[start - 1 : start]) and is_letter(said[start : start + 1]),
            special_tokens=len(regions),
            plain=regions if self._reader else (),
        )

    def _check_plain(self, tools: Tools | None, template_kwargs: Mapping[str, Any] | None) -> None:
        if tools or template_kwargs:
            what = "tools" if tools else "chat_template_kwargs"
            raise ValueError(f"the row is plain text, for which no template is used, but has {what}; give it messages")

    def _check_private(self, text: str) -> None:
        if self._reader:
            self._reader.check(text)

    def _regions(self, text: str) -> tuple[tuple[int, int], ...]:
        return tuple(match.span() for match in self.special.finditer(text))

    def _is_answer(self, message: Message) -> bool:
        if message["role"] != "assistant" or not message.get("learn", True):
            return False
        said = (self._without_eos(message["content"]), message.get("reasoning_content") or "")
        return any(text.strip() for text in said) or bool(message.get("tool_calls"))

    def _without_eos(self, text: str) -> str:
        """The text without EOS at its end, and without white space behind that."""
        kept = len(text)
        end = len(text.rstrip())
        while text.endswith(self.eos, 0, end):
            kept = end = end - len(self.eos)
            while end and text[end - 1].isspace():
                end -= 1
        return text[:kept]

    def _read(self, rendered: Sequence[Rendered]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and offsets of strings, all with plain regions or all without."""
        if not rendered:
            return []
        texts = [item.text for item in rendered]
        if rendered[0].plain:
            assert self._reader, "only this finds plain regions"
            return self._reader.encode(texts, [item.plain for item in rendered])
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,  # the prefix is added below, where the text does not bring it already
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(zip(batch["input_ids"], batch["offset_mapping"], strict=True))

    def _mask(self, ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> Encoded:
        """Mark every token that holds a character of a span.

        A span's tokens are a run, found by its ends: several byte tokens of one character share an offset,
        and tokenizers that trim offsets give a token of spaces an empty one.
        """
        mask = np.zeros(len(ids), dtype=np.int8)
        for start, end in spans:
            first = bisect.bisect_right(offsets, start, key=lambda offset: offset[1])
            last = bisect.bisect_left(offsets, end, key=lambda offset: offset[0])
            mask[first:last] = 1
        if self.prefix and tuple(ids[: len(self.prefix)]) != self.prefix:
            ids = [*self.prefix, *ids]
            mask = np.concatenate([np.zeros(len(self.prefix), dtype=np.int8), mask])
        mask[:1] = 0  # nothing stands before the first token to predict it from
        return Encoded(np.array(ids, dtype=np.int32), mask)

    def _check_ends(self, ids: np.ndarray, closed: bool, item: int) -> None:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and bos != eos and len(ids) > 1 and ids[0] == bos == ids[1]:
            raise EncodingError(_TWO_BOS, item)
        if closed and ids[-1] != eos:
            raise EncodingError(
                f"the tokenizer does not read its own EOS {self.eos!r} as the one token {eos}; "
                "declare it as a special token in the tokenizer",
                item,
            )


_TWO_BOS = "the text begins with two BOS tokens: the chat template must write one at most, and so must plain text"


class _Row:
    """A row of messages as its template gets it: EOS left to the template, empty system turn added, and marked.

    Attributes:
        messages: the turns as they are rendered.
        learned: for each, whether it is an answer that may be learned.
    """

    def __init__(
        self,
        encoder: ChatEncoder,
        messages: Sequence[Message],
        tools: Tools | None,
        template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.encoder, self.tools, self.template_kwargs = encoder, tools, dict(template_kwargs or {})
        templates = [encoder.tool_template if tools else encoder.template]
        check_arguments(self.template_kwargs, templates, encoder.tokenizer, "the row's chat_template_kwargs")
        adds_system = encoder.add_empty_system and not any(message["role"] == "system" for message in messages)
        self.extra = int(adds_system)
        given = [{"role": "system", "content": ""}, *messages] if adds_system else list(messages)
        self.learned = [encoder._is_answer(message) for message in given]
        self.messages = [self._prepared(message) for message in given]
        said = list(special_tokens.strings_in([self.messages, self.tools, self.template_kwargs]))
        self.special_tokens = sum(len(encoder.special.findall(text)) for text in said)
        self.mark = ""
        if encoder._reader:
            for text in said:
                encoder._check_private(text)
            if self.special_tokens:
                self._mark_all(special_tokens.free_mark(said, encoder.special))
        if any(message.get("tool_calls") for message in self.messages):
            self._choose_form_of_arguments()

    def prompt(self) -> Rendered:
        """Render the conversation with the generation prompt of its next answer behind it."""
        self._conversation(self.messages)
        text, _, plain = self.unmarked(self.render(self.messages, True), [])
        return Rendered(text, [], templated=True, special_tokens=self.special_tokens, plain=plain)

    def rendered(self, first: int) -> Rendered:
        """Render the conversation up to the last answer that is learned, of those from turn `first` on."""
        learned = [turn for turn in range(max(first, 1), len(self.messages)) if self.learned[turn]]
        assert learned, "a completion without text is dropped before it is rendered"
        whole = self._conversation(self.messages[: learned[-1] + 1])
        answers = [whole.answer(turn) for turn in (learned[-1:] if self.encoder.mask_history else learned)]
        text, spans = whole.text[: answers[-1].end], [(answer.start, answer.end) for answer in answers]
        if not answers[-1].closed:
            text += self.encoder.eos
            spans[-1] = (answers[-1].start, len(text))
        text, spans, plain = self.unmarked(text, spans)
        return Rendered(
            text,
            spans,
            templated=True,
            special_tokens=self.special_tokens,
            plain=plain,
            empty_system=self.extra > 0,
            history_masked=len(answers) < len(learned),
        )

    def render(self, messages: list[Message], generation: bool) -> str:
        """Render turns with this row's tools and arguments; see `ChatEncoder.apply`."""
        kwargs = self.template_kwargs
        return self.encoder.apply(messages, generation=generation, tools=self.tools, template_kwargs=kwargs)

    def unmarked(
        self, text: str, spans: list[tuple[int, int]]
    ) -> tuple[str, list[tuple[int, int]], tuple[tuple[int, int], ...]]:
        """The text without marks, the spans in it, and the ranges that are read as plain text."""
        return special_tokens.unmarked(text, spans, self.encoder.special, self.mark) if self.mark else (text, spans, ())

    def _prepared(self, message: Message) -> Message:
        prepared = {key: value for key, value in message.items() if key != "learn"}
        if message["role"] == "assistant":
            prepared["content"] = self.encoder._without_eos(message["content"])
        return prepared

    def _mark_all(self, mark: str) -> None:
        self.mark = mark
        self.messages, self.tools, self.template_kwargs = (
            special_tokens.marked(value, self.encoder.special, mark)
            for value in (self.messages, self.tools, self.template_kwargs)
        )

    def _choose_form_of_arguments(self) -> None:
        """Give the arguments of calls as JSON text to a template that takes text, or prints objects as Python does."""
        free = next(f"Value{number}n" for number in itertools.count() if f"Value{number}n" not in str(self.messages))
        probes: list[str] = []

        def probe(arguments: Any) -> Any:
            if not isinstance(arguments, Mapping):
                return arguments
            probed = dict.fromkeys(arguments or [free], free)
            probes.append(repr(probed))
            return probed

        messages = [with_arguments(message, probe) for message in self.messages]
        as_text = [with_arguments(message, json_text) for message in self.messages]
        text = self._rendered_or_none(messages)
        if text is None:
            takes_text = self._rendered_or_none(self.messages) is None and self._rendered_or_none(as_text) is not None
        else:  # where the whole call is printed, its arguments are part of Python's form anyway
            takes_text = any(each in text and "'arguments': " + each not in text for each in probes)
        if takes_text:
            self.messages = as_text

    def _rendered_or_none(self, messages: list[Message]) -> str | None:
        """The conversation as the template writes it; None if it refuses it, which is said where it is used."""
        try:
            return self.render(messages, False)
        except ValueError:
            return None

    def _conversation(self, messages: list[Message]) -> Conversation:
        """The conversation, after a check that the template leaves nothing out but what assistants say."""
        beside = list(special_tokens.strings_in([self.tools, self.template_kwargs, self.encoder.template_kwargs]))
        whole = Conversation(messages, self.render, self.encoder.eos, self.encoder.added, self.extra, beside)
        whole.check_context()
        if self.tools and self._without_tools(messages) == whole.text:
            raise ValueError(
                "the row has tools, but the chat template leaves them out; use a template for tools, or remove them"
            )
        return whole

    def _without_tools(self, messages: list[Message]) -> str | None:
        """What the template for tools writes where there are none; None if it requires some."""
        kwargs, template = self.template_kwargs, self.encoder.tool_template
        try:
            return self.encoder.apply(messages, template_kwargs=kwargs, template=template)
        except ValueError:
            return None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ValueError if the model's embedding of `vocab_size` rows lacks a token that every text may have.

    Such are those of the tokenizer's own vocabulary, BOS and EOS. An added token without a row, such as the image's
    that a text model shares with a larger one, does no harm before it is used: `check_ids` looks for that.
    """
    added = tokenizer.added_tokens_decoder
    every = {token: number for token, number in tokenizer.get_vocab().items() if number not in added}
    for token in (tokenizer.bos_token, tokenizer.eos_token):
        if token is not None:
            every[token] = tokenizer.get_vocab()[token]
    token, largest = max(every.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer does not fit the model: its token {token!r} has id {largest}, but the model's "
            f"vocabulary ends at {vocab_size - 1}; use the model's own tokenizer"
        )


def check_ids(tokenizer: PreTrainedTokenizerBase, place: str, largest: int, vocab_size: int) -> None:
    """Raise ValueError if the largest token id of `place` is beyond the model's embedding of `vocab_size` rows."""
    if largest >= vocab_size:
        raise ValueError(
            f"{place}: its token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, but the model's "
            f"vocabulary ends at {vocab_size - 1}; take that token out, or use a model that has it"
        )


# What the export is checked with, as far as a template takes it.
_SAMPLES: list[list[Message]] = [
    [{"role": "user", "content": "Hello?"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}],
    [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "What is 1 + 1?"},
    ],
]


def template_to_export(encoder: ChatEncoder) -> str | dict[str, str]:
    """Return the chat template to export: with it, `apply_chat_template(..., tokenize=True)` gives what was learned.

    It is the encoder's template where that is so already. Else it has a head, which writes the BOS that the tokenizer
    adds in training only, freezes the date that it asks for, gives the run's `chat_template_kwargs` unless the caller
    does, and adds the empty system turn. Of a tokenizer with several templates all are returned, by name.

    What no template can carry: arguments and tools of single rows; `split_special_tokens` (ask `apply_chat_template`
    to `sanitize_control_tokens`); the way plain-text rows were read. To give the model each day's date again, remove
    the macro `strftime_now` from the head.

    A template that refuses every sample conversation, because it needs tools or a row's own arguments, gets its head
    unchecked. Raises ValueError if no head gives the prompts that the model learned.
    """
    stored = encoder.tokenizer.chat_template
    if encoder.template_name != _OWN_TEMPLATE or not isinstance(stored, dict):
        return _template_with_head(encoder, encoder.template)
    return {name: _template_with_head(encoder, split_date_head(template)[0]) for name, template in stored.items()}


def check_exported(tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder) -> None:
    """Raise ValueError if prompts tokenised by the exported tokenizer and its template are not those of training."""
    for sample, expected in _sample_prompts(encoder, encoder.template):
        found = _served_ids(tokenizer, None, sample)
        if found != expected:
            at = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(found), len(expected)) if at is None else at
            one, other = (tokenizer.decode(ids[at : at + 1]) for ids in (found, expected))
            raise ValueError(
                "the exported chat template gives other prompts than the model learned: token "
                f"{at} is {one!r}, but was {other!r} in training; export the template that `template_to_export` returns"
            )


def _template_with_head(encoder: ChatEncoder, template: str) -> str:
    prompts = _sample_prompts(encoder, template)
    if not prompts and template not in encoder._templates:
        return template  # for other uses than conversations
    heads = [date_head(encoder.date)] if uses_date(template) else []
    if encoder.template_kwargs:
        heads.append(defaults_head(encoder.template_kwargs))
    if encoder.add_empty_system:
        heads.append(EMPTY_SYSTEM_HEAD)
    prefix = "".join(encoder.tokenizer.convert_ids_to_tokens(list(encoder.prefix)))
    if not prompts:  # it needs the rows' own arguments, or tools: then the head cannot be checked
        writes_bos = "bos_token" in names_in(template) or prefix in template
        return with_head(template, *heads, written="" if writes_bos else prefix)
    # A tokenizer may write a space in front of the first word only, which then is no longer the first.
    for written in ("", prefix, prefix + " "):
        exported = with_head(template, *heads, written=written)
        if all(_served_ids(encoder.tokenizer, exported, sample) == ids for sample, ids in prompts):
            return exported
    raise ValueError(
        "no chat template gives this tokenizer's training prompts: apply_chat_template reads the text after "
        f"{prefix!r} differently; use a template that writes BOS itself"
    )


def _sample_prompts(encoder: ChatEncoder, template: str) -> list[tuple[list[Message], list[int]]]:
    """The sample conversations that a template takes, each with the ids of its prompt as they were in training."""
    found = []
    for sample in _SAMPLES:
        row = _Row(encoder, sample, None, None)
        try:
            text = encoder.apply(row.messages, generation=True, template=template)
        except ValueError:  # a conversation that it refuses was not learned either
            continue
        found.append((sample, encoder.tokenize([Rendered(text, [])], closed=False)[0].ids.tolist()))
    return found


def _served_ids(tokenizer: PreTrainedTokenizerBase, template: str | None, messages: list[Message]) -> list[int]:
    """The ids of a prompt as whoever serves the model gets them."""
    ids = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return list(ids)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer (tokenizer.json)"
        )
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no EOS token; set eos_token in its tokenizer_config.json")


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer's post-processor puts in front of a string: most often BOS, or nothing."""
    # Not the backend's own `encode`, which cuts strings if an earlier call has set it to.
    plain, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return tuple(full[:at])
