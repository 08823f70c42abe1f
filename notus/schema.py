"""From YAML to typed dataclasses: knows types and bounds, and nothing of what the keys mean.

`notus.config` declares the keys and says where a mistake stands.
"""

import difflib
import itertools
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """The finite numbers from `low` to `high`; `open_low` and `open_high` leave out the ends themselves."""

    low: float
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def hold(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and abs(value) != float("inf")

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        if self.high == float("inf"):
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"


class Refused(Exception):
    """The value of `key` is wrong; the message goes on from the key's name."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


class Mismatch(Exception):
    """A value is not of the wanted type; the message, if any, says more."""


@dataclass(frozen=True)
class OneOrMore:
    """Marks a list of mappings, each with the keys of the dataclass `item`.

    A mapping alone stands for a list of one, and a text for a mapping that holds it under the key `short`.
    """

    item: type
    short: str

    def convert(self, value: Any) -> list[dict[str, Any]]:
        mappings = []
        for each in value if isinstance(value, list) else [value]:
            try:
                mappings.append(asdict(fill(self.item, each if isinstance(each, dict) else {self.short: each})))
            except Refused as refusal:
                raise Mismatch(f": {refusal.key} {refusal}") from None
        if not mappings:
            raise Mismatch(", not an empty list")
        return mappings

    def __str__(self) -> str:
        return f"a {self.short}, or a list of {{{', '.join(item.name for item in fields(self.item))}}}"


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number (in YAML 1.1 it is a text) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text such as "1e-6" gets quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def dump_yaml(tree: Any) -> str:
    """YAML that reads back to the same value, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; ValueError if it cannot be read or is not valid."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot read the config file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text, so not a config file") from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{source}: {line}not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {error}") from error


def read_arguments(words: Sequence[str], sections: Mapping[str, Any]) -> tuple[dict[str, Any], str, dict[str, str]]:
    """`CONFIG.yaml [--section.key=value ...]` -> (nested mapping, file name, origins of the overrides)."""
    _refuse_spaces(words)
    paths = [word for word in words if not word.startswith("-")]
    if len(paths) != 1:
        got = " ".join(words) or "nothing"
        raise ValueError(f"command line: expected CONFIG.yaml [--section.key=value ...], but got {got}")
    tree = read_yaml(Path(paths[0]))
    if not isinstance(tree, dict) or not all(isinstance(keys, dict | None) for keys in tree.values()):
        raise ValueError(f"{paths[0]}: expected the sections {', '.join(sections)}, with lines `key: value` below them")
    origins = {}
    for word in words:
        if word.startswith("-"):
            section, key, value = _parse_override(word, sections)
            tree[section] = {**(tree.get(section) or {}), key: value}
            origins[f"{section}.{key}"] = "command line"
    return tree, paths[0], origins


def _refuse_spaces(words: Sequence[str]) -> None:
    """Tell a value that stands after a space from a second config."""
    for key, value in itertools.pairwise(words):
        if re.fullmatch(r"--\w+\.\w+", key) and not value.startswith("-"):
            raise ValueError(f"command line: '{key} {value}' needs a = between: {key}={value}")


def _parse_override(word: str, sections: Mapping[str, Any]) -> tuple[str, str, Any]:
    """`--section.key=value` -> (section, key, value), the value read as YAML."""
    match = re.fullmatch(r"--(\w+)\.(\w+)=(.+)", word, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"command line: {word!r} is not of the form --section.key=value (no value is null)")
    section, key, text = match.groups()
    if section not in sections:
        raise ValueError(f"command line: section {section!r} does not exist{nearest(section, sections)}")
    return section, key, _parse_yaml(text, f"command line: --{section}.{key}")


# ---- typed values ----


def build_sections(tree: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """{name: dataclass} of the `sections`, from `{section: {key: value}}`. Raises `Refused`."""
    for name, keys in tree.items():
        if name not in sections:
            raise Refused(str(name), f"is not a section{nearest(str(name), sections)}")
        for key in keys or {}:
            homes = [home for home, cls in sections.items() if key in {item.name for item in fields(cls)}]
            if homes and name not in homes:
                raise Refused(f"{name}.{key}", f"does not exist; did you mean '{homes[0]}.{key}'?")
    return {name: _build_section(name, cls, tree.get(name) or {}) for name, cls in sections.items()}


def _build_section(name: str, cls: type[T], keys: dict[Any, Any]) -> T:
    try:
        return fill(cls, keys)
    except Refused as refusal:
        raise Refused(f"{name}.{refusal.key}", str(refusal)) from None


def fill(cls: type[T], values: dict[Any, Any]) -> T:
    """The dataclass `cls`, `values` converted to the types of its fields. Raises `Refused`."""
    hints = get_type_hints(cls, include_extras=True)
    converted = {}
    for key, value in values.items():
        if key not in hints:
            raise Refused(str(key), f"does not exist{nearest(str(key), hints)}")
        try:
            converted[key] = convert(value, hints[key])
        except Mismatch as mismatch:
            detail = str(mismatch) or f", not {value!r}{_spelling(value, hints[key])}"
            raise Refused(key, f"must be {describe(hints[key])}{detail}") from None
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name not in converted and item.default is MISSING and item.default_factory is MISSING:
            raise Refused(item.name, "is required")
    return cls(**converted)


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; an int may stand for a float, no text is empty. Raises `Mismatch`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, parts)
    if origin is Annotated and isinstance(parts[1], OneOrMore):
        return parts[1].convert(value)
    if origin is Annotated:
        base, bounds = parts
        if _is_number(value, base) and bounds.hold(value):
            return base(value)
    elif origin is list:
        if isinstance(value, list) and value:
            return [convert(item, parts[0]) for item in value]
    elif origin is Literal:
        if value in parts:
            return value
    elif isinstance(value, hint) and value != "":
        return value
    raise Mismatch


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    mismatches = []
    for member in members:
        try:
            return convert(value, member)
        except Mismatch as mismatch:
            mismatches.append(mismatch)
    raise max(mismatches, key=lambda mismatch: len(str(mismatch)))


def _is_number(value: Any, base: type) -> bool:
    """Whether `value` is of type `base`; a bool is not a number, an int may stand for a float."""
    return not isinstance(value, bool) and isinstance(value, (int, float) if base is float else base)


def describe(hint: Any) -> str:
    """The type `hint` in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in parts)
    if origin is Annotated and isinstance(parts[1], OneOrMore):
        return str(parts[1])
    if origin is Annotated:
        return f"a {'whole number' if parts[0] is int else 'number'} {parts[1]}"
    if origin is Literal:
        return " or ".join(filter(None, [", ".join(map(repr, parts[:-1])), repr(parts[-1])]))
    if origin is list:
        return "a list of texts"
    words = {str: "a text (in quotes if it reads as something else)", bool: "true or false"}
    return words.get(hint, "null")


def nearest(name: str, valid: Iterable[str]) -> str:
    """How a message about the unknown `name` ends: the most similar valid one, or all if none is similar."""
    names = list(valid)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else f"; valid: {', '.join(names)}"


def _spelling(value: Any, hint: Any) -> str:
    """The nearest choice, for a value that should have been one of several."""
    return nearest(str(value), get_args(hint)) if get_origin(hint) is Literal else ""
