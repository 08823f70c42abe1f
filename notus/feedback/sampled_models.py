"""The models of `notus sample`: local ones and endpoints, each with a name of its own in the records."""

import dataclasses
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from notus.evaluation.results import public_name

_ENDPOINT = re.compile(r"(?P<model>[^@].*?)@(?P<url>https?://.*)", re.DOTALL | re.IGNORECASE)
_NAMED = re.compile(r"(?P<name>[^/=@]+)=(?P<rest>.+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class SampledModel:
    """A model as --models names it."""

    name: str  # in the records
    model: str  # a folder or hub id; or the model's name at its endpoint
    url: str | None = None  # the endpoint's; None for a local model


def parse_models(words: Sequence[str], taken: Collection[str] = ()) -> list[SampledModel]:
    """Return the models that the command line names, each as MODEL, NAME@URL, or as either behind NAME=.

    A name that the user does not give is the public one: the hub id, the folder's last part, or the model's name at its
    endpoint. Where two are the same, or one is among `taken`, more of the path, or the endpoint's address, tells them
    apart. Raises ValueError for a model that is named twice, and where names cannot be told apart.
    """
    found = [_parse(word) for word in words]
    seen = set()
    for _, model, url in found:
        place = (url, model if url else _place(model))
        if place in seen:  # the draws would be the same
            raise ValueError(f"--models names {_without_url(model, url)} twice; leave one out, or ask for more by --n")
        seen.add(place)
    candidates = [[given] if given is not None else _names(model, url) for given, model, url in found]
    return [
        SampledModel(name, model, url)
        for name, (_, model, url) in zip(_tell_apart(candidates, taken), found, strict=True)
    ]


def _parse(word: str) -> tuple[str | None, str, str | None]:
    """The name that the user gave, the model, and its endpoint's address."""
    name, rest = None, word
    if not Path(word).expanduser().exists() and (named := _NAMED.fullmatch(word)):
        name, rest = named["name"].strip(), named["rest"]
    if endpoint := _ENDPOINT.fullmatch(rest):
        return name, endpoint["model"], endpoint["url"]
    path = Path(rest).expanduser()
    if "@" in rest and not path.exists():
        raise ValueError("--models: a model behind an endpoint is NAME@http://host:8000/v1, with its scheme")
    return name, str(path) if path.exists() else rest, None


def _place(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).exists() else model


def _without_url(model: str, url: str | None) -> str:
    return f"{model} at one endpoint" if url else model  # an address may hold a password


def _names(model: str, url: str | None) -> list[str]:
    """Return names for a model, each longer than the one before it."""
    if url is not None:
        host = re.sub(r"^https?://", "", url, flags=re.IGNORECASE)
        name = public_name(model)  # some servers call a model by its folder
        return [name, f"{name}@{host.split('/')[0]}", f"{name}@{host.rstrip('/')}"]
    if not Path(model).exists():
        return [public_name(model)]
    name, parts = public_name(model), Path(model).resolve().parts[1:]
    if name not in parts:  # "." and the like
        return ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    end = len(parts) - parts[::-1].index(name)
    return ["/".join(parts[end - count : end]) for count in range(1, end + 1)]


def _tell_apart(candidates: Sequence[Sequence[str]], taken: Collection[str]) -> list[str]:
    """Return for each model the first of its candidates that is nobody else's."""
    level = [0] * len(candidates)
    while True:
        names = [each[at] for each, at in zip(candidates, level, strict=True)]
        same = [number for number, name in enumerate(names) if names.count(name) > 1 or name in taken]
        if not same:
            return names
        longer = [number for number in same if level[number] + 1 < len(candidates[number])]
        if not longer:
            where = "the completions of --with" if names[same[0]] in taken else "another of --models"
            raise ValueError(
                f"--models: {names[same[0]]} is the name of {where} as well; tell them apart as NAME={names[same[0]]}"
            )
        for number in longer:
            level[number] += 1
