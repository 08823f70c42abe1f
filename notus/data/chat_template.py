"""The text of a chat template: which one is used, the names it reads, and what stands at its head.

A head is Jinja text in front of a template that writes nothing, but decides what the template sees: the date it takes
for today, arguments it has by default, an empty system turn. `apply_chat_template` renders head and template as one,
so a model exported with its head is prompted as it was trained.
"""

import datetime
import functools
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from transformers import PreTrainedTokenizerBase

# Each turn is <|role|>, a newline, the text, EOS, a newline: the format of Zephyr and Notus.
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

EMPTY_SYSTEM_HEAD = (
    '{%- set messages = messages if messages | selectattr("role", "equalto", "system") | list '
    'else [{"role": "system", "content": ""}] + (messages | list) %}'
)
# What strftime writes for a date at midnight, by directive. %s and %z would depend on the machine's time zone.
_DIRECTIVES = "aAbBcCdDeFgGhHIjmMnprRStTuUVwWxXyY"
_DATE_HEAD = """\
{%%- macro strftime_now(format) -%%}
{%%- for part in format.split("%%%%") -%%}
{%%- set written = namespace(text=part) -%%}
{%%- for directive, value in %s.items() -%%}
{%%- set written.text = written.text.replace(directive, value) -%%}
{%%- endfor -%%}
{{- "" if loop.first else "%%" -}}{{- written.text -}}
{%%- endfor -%%}
{%%- endmacro %%}"""
_AFTER_TEXT = "{#- the conversation #}"  # for the line break behind it to be dropped
# Groups: text that a head writes first; the dates that `date_head` knows; the head's line break, if it ends there.
_DATED = re.compile(
    r'(\{\{- "(?:[^"\\\n]|\\.)*" \}\})?'
    + re.escape(_DATE_HEAD % "DATES").replace("DATES", r"(\{[^\n{}]*\})")
    + r"(\n)?"
)

_PARAMETERS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def resolve_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, *, with_tools: bool = False) -> str:
    """Return the Jinja text of the template to use; see `ChatEncoder`.

    Of a tokenizer's several templates, conversations `with_tools` get the one named "tool_use", others "default".
    Raises ValueError for a name that is no template, and a file that is not UTF-8.
    """
    if chat_template is None:
        if not tokenizer.chat_template:
            return ZEPHYR_TEMPLATE
        return str(tokenizer.get_chat_template(tools=[{}] if with_tools else None))
    if chat_template == "zephyr":
        return ZEPHYR_TEMPLATE
    path = Path(chat_template).expanduser()
    if path.suffix != ".jinja" or not path.is_file():
        raise ValueError(
            f"chat_template {chat_template!r} is neither 'zephyr' nor an existing .jinja file; leave it out, or "
            "set it to null, to use the tokenizer's own template"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template {chat_template!r} is no UTF-8 text: {error}; save it as UTF-8") from error


@functools.cache
def names_in(template: str) -> set[str]:
    """Return the names that a template's code reads or sets: variables, functions, attributes and keywords."""
    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateSyntaxError:  # said where the template is first used
        return set(re.findall(r"\w+", template))
    return {value for _, kind, value in tokens if kind == "name"}


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %} of transformers, as far as parsing goes."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parse the block as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.cache
def arguments_of(template: str) -> set[str]:
    """Return the names that a template takes from whoever renders it; all `names_in` it if it cannot be parsed."""
    # As transformers sets it up; what it defines itself is no argument.
    environment = jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])  # never renders
    environment.globals |= {"raise_exception": None, "strftime_now": None}
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateError:  # said where the template is first used
        return names_in(template)


def uses_date(template: str) -> bool:
    """Whether a template asks for today's date (`strftime_now`)."""
    return "strftime_now" in names_in(template)


def parse_date(template_date: str | None) -> datetime.date:
    """Return the date that templates take for today: "YYYY-MM-DD", or the present day for None; else ValueError."""
    if template_date is None:
        return datetime.date.today()
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", template_date):
            raise ValueError("it has another form")
        return datetime.date.fromisoformat(template_date)
    except ValueError as error:
        raise ValueError(f"template_date {template_date!r} is no date YYYY-MM-DD: {error}") from error


def split_date_head(template: str) -> tuple[str, datetime.date | None]:
    """Return a template without the `date_head` that an export put in front, and the date that this wrote or None."""
    date = None
    while match := _DATED.match(template):
        text, dates, line_break = match.groups()
        date = date or datetime.date.fromisoformat(json.loads(dates)["%F"])
        head = text or ""
        if line_break and text:
            head += _AFTER_TEXT + "\n"
        template = head + template[match.end() :]
    return template, date


@functools.cache
def date_head(date: datetime.date) -> str:
    """Return a head with which `strftime_now` writes this date, at midnight, whatever the day."""
    moment = datetime.datetime.combine(date, datetime.time())
    written = {f"%{directive}": moment.strftime(f"%{directive}") for directive in _DIRECTIVES}
    # without leading zeros, as glibc writes them
    written |= {f"%-{directive}": str(int(written[f"%{directive}"])) for directive in "dmHIMSyj"}
    return _DATE_HEAD % json.dumps(written)


def defaults_head(arguments: Mapping[str, Any]) -> str:
    """Return a head that gives a template these arguments, unless the caller does."""
    return "".join(
        f"{{%- if {_is_absent(name)} %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in arguments.items()
    )


def _is_absent(name: str) -> str:
    """A Jinja condition: the caller has not given this argument."""
    # apply_chat_template always defines its own parameters, with none for those that it was not given.
    return f"{name} is not defined" + (f" or {name} is none" if name in _PARAMETERS else "")


def with_head(template: str, *heads: str, written: str = "") -> str:
    """Put heads in front of a template, and text that it writes first; unchanged if there are none."""
    output = "{{- " + _literal(written) + " }}" if written else ""
    head = output + "".join(heads)
    if not head:
        return template
    # The line break after a tag is dropped, and the template begins a line, as it did.
    return head + (_AFTER_TEXT if not head.endswith("%}") else "") + "\n" + template


def check_arguments(
    arguments: Mapping[str, Any], templates: Sequence[str], tokenizer: PreTrainedTokenizerBase, key: str
) -> None:
    """Raise ValueError for template arguments that would have no effect, or that are not the template's."""
    if not arguments:
        return
    reserved = _PARAMETERS - {"documents"}
    reserved |= {"messages", "strftime_now", *tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    known = set().union(*map(arguments_of, templates))
    for name in arguments:
        if name in reserved:
            raise ValueError(f"{key}: {name!r} is not for templates to be given; remove it")
        if name not in known:
            raise ValueError(f"{key}: the chat template has no argument {name!r}; remove or correct it")


def _literal(value: Any) -> str:
    """A value of JSON's kinds as a Jinja expression."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
