"""Where the answers of a conversation stand in the text that a chat template writes of it.

Contents are not searched for, because a turn may quote any other, or a control token. An answer begins behind its
prompt, rendered alone. The rest is read off a second rendering, in which unique placeholders stand for the answer and
for the turn after it: between the two stands what the template writes to close the turn and to begin the next. The
first of these is what it also writes where the conversation ends with this turn. Both renderings must agree in every
character but the placeholders; where they do not, the template has altered or dropped what the row says.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from notus.data.formats import Message
from notus.data.special_tokens import strings_in

Render = Callable[[list[Message], bool], str]  # (messages, whether a generation prompt follows) -> text

# Tags by which templates recognise reasoning in the content: <think>, </seed:think>, [THINK], ...
_REASONING_TAG = re.compile(r"(<[/|]?[\w:]{0,20}think\w{0,10}\|?>|\[/?think\])", re.IGNORECASE)
_SHORT = 24  # characters; shorter words may be part of what a template writes between turns
_SAID = ("reasoning_content", "content", "tool_calls")  # the fields of an answer


class Answer(NamedTuple):
    """Characters [start, end) of an answer with what closes its turn, and whether EOS closes it."""

    start: int
    end: int
    closed: bool


class _Found(NamedTuple):
    """How an answer was found.

    Attributes:
        end: where its own words end.
        after: what the template writes after them.
        bounded: whether `after` is the template's alone, up to the words of the next turn.
        message: the answer with placeholders.
    """

    end: int
    after: str
    bounded: bool
    message: Message


@dataclass(frozen=True)
class Conversation:
    """A conversation and the template that writes it.

    Attributes:
        messages: the turns.
        render: renders turns; raises ValueError where the template refuses them.
        eos: the end-of-sequence token.
        added: matches the tokenizer's added tokens; a closing is never cut inside one.
        extra: leading turns that the row does not have, for errors to count turns as the row does.
        beside: what the template may write that no turn says: strings of tools and arguments.
    """

    messages: list[Message]
    render: Render
    eos: str
    added: re.Pattern[str]
    extra: int = 0
    beside: Sequence[str] = ()

    @cached_property
    def text(self) -> str:
        """The whole conversation as the template writes it."""
        return self.render(self.messages, False)

    def answer(self, turn: int) -> Answer:
        """Find the answer of an assistant turn in `text`.

        Raises ValueError if its prompt is rendered differently once the answer follows, and if `text` does not
        hold all that the turn says, but for white space at its ends.
        """
        start = self._start(turn)
        # A template may read the next turn's words, and trim white space behind a tag that ends this one's.
        ways = ((next_hidden, at_tag) for at_tag in (False, True) for next_hidden in (True, False))
        found = next(filter(None, (self._match(turn, start, *way) for way in ways)), None)
        if found is None:
            raise self._altered(turn, start)
        length, closed = self._closing(turn, found)
        if found.end + length == start:
            raise self._altered(turn, start)
        return Answer(start, found.end + length, closed)

    def check_context(self) -> None:
        """Raise ValueError if the template leaves out a turn that is no answer, or a call of a tool."""
        for turn in self._left_out():
            raise ValueError(
                f"the chat template leaves out what {self.name(turn)} ({self.messages[turn]['role']}) says, or "
                "alters it; use a template that has a place for it, or remove the turn"
            )
        calling = [turn for turn, message in enumerate(self.messages) if message.get("tool_calls")]
        if not calling:
            return
        for turn in self._unseen(calling, "tool_calls"):
            raise ValueError(
                f"the chat template leaves out the tool calls of {self.name(turn)}; use a template for tools"
            )
        for turn in self._without_arguments(calling):
            raise ValueError(
                f"the chat template leaves out the arguments of the tool calls of {self.name(turn)}; use a template "
                "for tools"
            )

    def name(self, turn: int) -> str:
        """What errors call a turn: its number in the row."""
        return f"turn {turn + 1 - self.extra}"

    def _start(self, turn: int) -> int:
        prompt = self.render(self.messages[:turn], True)
        if not self.text.startswith(prompt):
            raise ValueError(
                f"the chat template renders the prompt of {self.name(turn)} differently once its answer "
                f"follows (alone, the prompt ends {prompt[-40:]!r}), so the answer cannot be found; use "
                "chat_template=zephyr, or a .jinja file whose generation prompt begins an assistant turn"
                + self._or_last_only(turn)
            )
        return len(prompt)

    def _match(self, turn: int, start: int, next_hidden: bool, at_tag: bool) -> _Found | None:
        """Find the answer by placeholders for its words, and for the next turn's if `next_hidden`; see `_hide`."""
        said: list[str] = []
        messages = list(self.messages)
        messages[turn] = self._hidden(messages[turn], said, at_tag=at_tag)
        if next_hidden and turn + 1 < len(messages):
            following = messages[turn + 1]
            messages[turn + 1] = {**following, "content": _hide(following["content"], self._placeholder, [*said])}
        rendered = self.render(messages, False)
        if not rendered.startswith(self.text[:start]):
            return None
        first, *rest = re.split(self._placeholder + r"(\d+)x", rendered[start:])
        at, after, seen, bounded = start, first, set(), turn + 1 == len(messages)
        for number, literal in zip(map(int, rest[::2]), rest[1::2], strict=True):
            if number >= len(said) or number in seen:  # the next turn's text, or its header names the tool again
                bounded = True
                break
            if not self.text.startswith(after + said[number], at):
                return None
            at += len(after) + len(said[number])
            after = literal
            seen.add(number)
        complete = len(seen) == len(said) and self.text.startswith(after, at) and self._keeps_tags(turn, start, at)
        return _Found(at, after, bounded, messages[turn]) if complete else None

    def _keeps_tags(self, turn: int, start: int, end: int) -> bool:
        """Whether the tags of reasoning in the content are in the answer, or the first of them in its prompt."""
        said = _REASONING_TAG.findall(self.messages[turn]["content"])
        written = _REASONING_TAG.findall(self.text[start:end])
        missing = max(0, len(said) - len(written))
        prompt_end = "".join(self.text[max(0, start - 200) : start].split())
        return not said or (said[missing:] == written[-len(said) :] and prompt_end.endswith("".join(said[:missing])))

    def _closing_alone(self, turn: int, found: _Found) -> str:
        """What the template writes behind this turn's words where the conversation ends with it."""
        # Rendered once for all turns that are closed alike.
        alike = found.after if found.bounded and not found.message.get("tool_calls") else None
        if alike is not None and alike in self._closings:
            return self._closings[alike]
        try:
            rendered = self.render([*self.messages[:turn], found.message], False)
        except ValueError:  # no conversation may end here (say, with an unanswered call): only EOS shows the end
            return ""
        _, *after = re.split(self._placeholder + r"\d+x", rendered)
        alone = after[-1] if after else ""
        if alike is not None:
            self._closings[alike] = alone
        return alone

    def _closing(self, turn: int, found: _Found) -> tuple[int, bool]:
        """How much of what follows the answer closes its turn, and whether EOS is the end of it.

        All but white space behind it, up to EOS where there is one. A template may end a whole conversation with
        EOS, and its earlier turns without; or close no last turn, and its earlier ones with EOS.
        """
        _, *ends = re.split(self._placeholder + r"\d+x", found.message["content"])
        trailing = ends[-1] if ends else ""
        kept = len(trailing) if found.after.startswith(trailing) else 0
        if turn == len(self.messages) - 1:
            to_eos = self._through_eos(turn, found.after)
            return (to_eos, True) if to_eos else (max(kept, len(found.after.rstrip())), False)
        alone = self._closing_alone(turn, found)
        to_eos = self._through_eos(turn, alone)
        for closing in (alone[:to_eos], alone.rstrip().removesuffix(self.eos).rstrip()):
            if closing.strip() and found.after.startswith(closing):
                return len(closing), closing.endswith(self.eos)
        to_eos = self._through_eos(turn, found.after) if found.bounded else 0
        return (to_eos, True) if to_eos else (max(kept, self._shared_tokens(alone, found.after)), False)

    def _through_eos(self, turn: int, text: str) -> int:
        """Length of `text` through the EOS that the template writes; 0 without one."""
        quoted = str(self.messages[turn].get("tool_calls", "")).count(self.eos)
        if text.rstrip().endswith(self.eos):
            quoted = min(quoted, text.count(self.eos) - 1)
        at = -1
        for _ in range(quoted + 1):
            at = text.find(self.eos, at + 1)
            if at < 0:
                return 0
        return at + len(self.eos)

    def _shared_tokens(self, one: str, other: str) -> int:
        """Length of what both texts begin with, through its last whole added token; 0 without one."""
        same = (a == b for a, b in zip(one, other, strict=False))
        shared = sum(takewhile(bool, same))
        ends = [match.end() for match in self.added.finditer(one) if match.end() <= shared]
        return ends[-1] if ends else 0

    def _hidden(
        self, message: Message, said: list[str], fields: Sequence[str] = _SAID, *, at_tag: bool = False
    ) -> Message:
        """The message with placeholders for its words and the names of called tools, which are added to `said`."""
        hidden: dict[str, Any] = dict(message)
        for field in fields:
            if isinstance(message.get(field), str):
                hidden[field] = _hide(message[field], self._placeholder, said, at_tag)
            elif message.get(field):
                hidden[field] = [_hide_name(call, self._placeholder, said) for call in message[field]]
        return hidden

    @cached_property
    def _closings(self) -> dict[str, str]:
        return {}

    @cached_property
    def _placeholder(self) -> str:
        return next(name for name in (f"Text{number}n" for number in range(10**9)) if name not in self.text)

    def _left_out(self) -> list[int]:
        """The turns, other than assistants', whose words the template does not write.

        Words that are found in the text may be those of another turn, or a mark of the template. Only long ones that
        are said once are surely the turn's own; the others need placeholders.
        """
        context = {turn: each["content"].strip() for turn, each in enumerate(self.messages)}
        said = "\0".join([*strings_in(self.messages), *self.beside])
        doubtful = [
            turn
            for turn, words in context.items()
            if words and self.messages[turn]["role"] != "assistant"
            if len(words) < _SHORT or words not in self.text or said.count(words) > 1
        ]
        if not doubtful:
            return []
        try:
            unseen = self._unseen(doubtful, "content")
        except ValueError:  # a template that reads the words, and refuses others
            unseen = [turn for turn in doubtful if context[turn] not in self.text]
        return [turn for turn in unseen if self._unseen([turn], "content")]

    def _unseen(self, turns: Sequence[int], field: str) -> list[int]:
        """Those of the turns of which the template does not write, in some form (say, as JSON), all of a field."""
        said: list[str] = []
        messages, numbers = list(self.messages), {}
        for turn in turns:
            first = len(said)
            messages[turn] = self._hidden(messages[turn], said, [field])
            numbers[turn] = range(first, len(said))
        text = self.render(messages, False)
        return [turn for turn in turns if any(f"{self._placeholder}{each}x" not in text for each in numbers[turn])]

    def _without_arguments(self, turns: Sequence[int]) -> list[int]:
        """Those of the turns of whose calls the template does not write, in some form, every argument."""
        values: list[str] = []

        def hidden(arguments: Any) -> Any:
            given = json.loads(arguments) if isinstance(arguments, str) else arguments
            first = len(values)
            values.extend(f"{self._placeholder}{first + number}x" for number in range(len(given)))
            named = dict(zip(given, values[first:], strict=True))
            return json_text(named) if isinstance(arguments, str) else named

        messages, own = list(self.messages), {}
        for turn in turns:
            first = len(values)
            messages[turn] = with_arguments(messages[turn], hidden)
            own[turn] = values[first:]
        text = self.render(messages, False) if values else ""
        return [turn for turn in turns if any(value not in text for value in own[turn])]

    def _altered(self, turn: int, start: int) -> ValueError:
        message = self.messages[turn]
        *reasoning, answer = _REASONING_TAG.split(message["content"])
        reasons = bool(reasoning or message.get("reasoning_content")) and answer.strip() in self.text[start:]
        what = f"drops the reasoning of {self.name(turn)}" if reasons else f"alters what {self.name(turn)} says"
        return ValueError(
            f"the chat template {what}, so it would be learned as the row does not say it; use a template that "
            "keeps it" + self._or_last_only(turn)
        )

    def _or_last_only(self, turn: int) -> str:
        last = turn == len(self.messages) - 1
        return "" if last else ", or data.mask_history: true, which learns the last assistant turn only"


def _hide(text: str, placeholder: str, said: list[str], at_tag: bool = False) -> str:
    """Put numbered placeholders for the words between tags of reasoning. Tags and white space stay.

    A placeholder also stands at the end of a string that ends with a tag: right behind it if `at_tag`, else behind all
    white space.
    """
    parts = []
    split = _REASONING_TAG.split(text)  # words and tags in turn
    for number, part in enumerate(split):
        words = part.strip()
        ends_with_tag = 0 < number == len(split) - 1 and not words
        if number % 2 == 1 or not (words or ends_with_tag):
            parts.append(part)
            continue
        at = part.index(words) if words or at_tag else len(part)
        parts.append(f"{part[:at]}{placeholder}{len(said)}x{part[at + len(words) :]}")
        said.append(words)
    return "".join(parts)


def with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    """Return the message with the arguments of its calls changed, where OpenAI's form of a call has them."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_arguments(call, change) for call in message["tool_calls"]]}


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def json_text(value: Any) -> str:
    """Return a value as the JSON text that a template's `tojson` writes; a string stays."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _hide_name(call: Any, placeholder: str, said: list[str]) -> Any:
    """Put a placeholder for the name of the tool that is called, where OpenAI's form of a call has it."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _hide_name(call["function"], placeholder, said)}
    name = call.get("name")
    return {**call, "name": _hide(name, placeholder, said)} if isinstance(name, str) else call
