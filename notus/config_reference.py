"""Every key of the config with its type, default and description, for `--help` and docs/config.md.

The descriptions are the docstrings below the fields in `notus.config`. Imports no torch.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, get_type_hints

import yaml

from notus.config import DPO_SECTIONS, SECTIONS, Task, describe

REQUIRED = "required"
_KEY, _DEFAULT, _WIDTH = 26, 14, 120  # columns of the help


@dataclass(frozen=True)
class Entry:
    """One key of a section.

    Attributes:
        key: its name in YAML, without the section.
        default: its default as YAML, or `REQUIRED`.
        type: what values it takes, in words.
        text: its description, in one line.
    """

    key: str
    default: str
    type: str
    text: str


def summary(section: type) -> str:
    """Return what a section is for, in one line."""
    return inspect.cleandoc(section.__doc__ or "").replace("\n", " ")


def entries(section: type) -> list[Entry]:
    """Return the keys of a section, which is a dataclass of `notus.config`, in their order."""
    texts, hints = _descriptions(section), get_type_hints(section, include_extras=True)
    return [
        Entry(item.name.rstrip("_"), _default(item), describe(hints[item.name]), texts[item.name])
        for item in fields(section)
    ]


def help_text(task: Task) -> str:
    """Return all keys that a task uses; see `sections_text`."""
    used = {name: section for name, section in SECTIONS.items() if task == "dpo" or name not in DPO_SECTIONS}
    return sections_text(used)


def sections_text(sections: Mapping[str, type]) -> str:
    """Return all keys of sections, a line or two for each, for a terminal of 120 columns."""
    lines = []
    for name, section in sections.items():
        lines += ["", f"{name}: {first_sentence(summary(section))}"]
        lines += [line for entry in entries(section) for line in _help_lines(entry)]
    return "\n".join(lines[1:])


def first_sentence(text: str) -> str:
    """Return the text up to the first period that ends a sentence; all of it if there is none."""
    found = re.match(r".*?\.(?=\s+[A-Z0-9\"`]|\s*$)", text)
    return found[0] if found else text


def _help_lines(entry: Entry) -> list[str]:
    """Return key, default, and the first sentence with the type in brackets, the latter two wrapped."""
    text = f"{first_sentence(entry.text)} [{entry.type}]"
    head = f"  {entry.key:<{_KEY}}{entry.default:<{_DEFAULT}}"
    indent = " " * (2 + _KEY + _DEFAULT)
    if len(head) > len(indent):  # a long default has a line of its own
        return [head.rstrip(), *textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)]
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=indent)


def _descriptions(section: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, on one line."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for item, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[ast.unparse(item.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def _default(item: "Field[Any]") -> str:
    if item.default_factory is not MISSING:
        value = item.default_factory()
    elif item.default is not MISSING:
        value = item.default
    else:
        return REQUIRED
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]
