"""The entries of a JSON file, each checked against a pydantic model: how the suites read their inputs."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from notus.data.sources import read_file
from notus.runtime.process import first_line

Entry = TypeVar("Entry", bound=BaseModel)


def read_entries(path: Path, model: type[Entry], wanted: str) -> list[tuple[str, Entry]]:
    """Read a .jsonl or .json file, and return each entry with the place where it stands.

    `model` is what an entry must hold; other keys are ignored. Raises ValueError, naming file and entry, if the file is
    missing or empty, or an entry does not fit; `wanted` is what the message asks for, as "FastChat's questions".
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; check the path")
    rows = read_file(path, any_numbers=True)  # pandas writes NaN for what is missing
    entries = [(place, parse_entry(value, model, place, wanted)) for place, value in rows]
    if not entries:
        raise ValueError(f"{path}: the file is empty; give {wanted}")
    return entries


def parse_entry(value: Any, model: type[Entry], place: str, wanted: str) -> Entry:
    """Check one entry; see `read_entries`."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{place}: {f'key {key!r}: ' if key else ''}{what}; give {wanted}") from error


def check_unique(places: list[tuple[str, Any]], what: str) -> None:
    """Raise ValueError if a key of the (place, key) pairs stands at two places."""
    seen: dict[Any, str] = {}
    for place, key in places:
        if key in seen:
            raise ValueError(f"{place}: the same {what} as {seen[key]}; remove one of them")
        seen[key] = place


def fetch(repo: str, name: str, kind: str, remedy: str) -> Path:
    """Return the local copy of a file of a hub's repository; `kind` is "dataset" or "space".

    Raises ValueError if it cannot be fetched; `remedy` says what to give instead.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, repo_type=kind))
    except Exception as error:  # the hub's client raises errors of many kinds
        where = f"hf://{kind}s/{repo}/{name}"
        raise ValueError(f"{where}: cannot be fetched from the hub ({first_line(error)}); give {remedy}") from error
