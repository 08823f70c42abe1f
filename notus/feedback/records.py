"""The record that `notus sample` writes, `notus rate` fills with ratings, and `notus curate` takes: UltraFeedback's.

A record is one line of JSON:

    source          where the prompt comes from: its own `source`, or the prompts file's name
    instruction     the prompt as a judge reads it
    messages        only where the prompt is more than one user turn: the turns before the answer
    tools, chat_template_kwargs
                    only where the prompt has them, for the chat template
    plain_text      only where it is true: the models continued `instruction` as it is, without a chat template
    models          the different models of the completions
    completions     a list of
        model           the model's name
        response        its text
        settings        how it was generated: temperature, top_p, ..., and `sample`, from 0 on, among the prompt's own
        finish_reason   "stop": it ended by itself; "length": it was cut at its most tokens
        tokens          how many it took; null if an endpoint does not say
        annotations     once it is rated: per aspect an object with a `Rating`, "1" to "5" or "N/A", and a `Rationale`
        fine-grained_score
                        once it is rated: the mean of these ratings; absent without any
        reward          once a reward model scored it: a finite number on that model's own scale
    rated           once it is rated: `judge`, and `order`, the places of `completions` in the order the judge saw

Keys of the prompt's own row that do not collide with these stay where they are (`correct_answers`, an id).
Beside a file records.jsonl stand records.summary.json (what the command printed) and records.jsonl.kept/ (finished
work, for resuming).
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from notus.curation.ultrafeedback import parse_record
from notus.data.sources import SUFFIXES, is_hub_id, read_file, read_hub
from notus.evaluation.prompts import CONTEXT, KEYS, Prompt
from notus.evaluation.results import check_output
from notus.runtime.files import check_regular, lock, replacing, write_text

Record = dict[str, Any]

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
NOT_RATED = "N/A"
RATINGS = ("annotations", "fine-grained_score", "reward")  # what a judge adds to a completion
_SETTINGS, _LOCK = "settings.json", ".lock"
_ANEW = "overwrite"  # marks work that --overwrite began, and so resumes
_SHOWN = 60  # characters of a setting in a message


def summary_file(records: Path) -> Path:
    """Return where the summary of a file of records stands: records.summary.json beside records.jsonl."""
    return records.with_suffix(".summary.json")


def kept_folder(records: Path) -> Path:
    """Return where unfinished work on a file of records is kept: records.jsonl.kept beside records.jsonl."""
    return records.with_name(records.name + ".kept")


# ---- records ----


def prompt_record(prompt: Prompt, file: Path) -> Record:
    """Return a prompt's record without completions; its turns are messages, and `file` is where it was read.

    Raises ValueError, naming its place, for a value that JSON does not have, and for a `source` that is no string.
    """
    assert not isinstance(prompt.turns, str), "strings are read as user turns"
    source = prompt.row.get("source", file.name)
    if not isinstance(source, str):
        raise ValueError(f"{prompt.place}: key 'source' must be a string, not {type(source).__name__}; correct it")
    record: Record = {"source": source, "instruction": prompt.text}
    turns = [dict(turn) for turn in prompt.turns]
    if turns != [{"role": "user", "content": prompt.text}]:
        record["messages"] = turns
    if prompt.tools:
        record["tools"] = list(prompt.tools)
    if prompt.template_kwargs:
        record["chat_template_kwargs"] = dict(prompt.template_kwargs)
    own = {
        *KEYS,
        *CONTEXT,
        "source",
        "models",
        "rated",
        "plain_text",
    }  # said by the record's keys above, or about to be
    record |= {key: value for key, value in prompt.row.items() if key not in own}
    for key, value in record.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{prompt.place}: key {key!r} cannot be written as JSON ({error}); remove it") from error
    return record


def with_completions(record: Record, completions: Sequence[Mapping[str, Any]]) -> Record:
    """Return a record with these completions, in their order, and their models."""
    models = list(dict.fromkeys(completion["model"] for completion in completions))
    return {**record, "models": models, "completions": list(completions)}


def prompt_key(record: Mapping[str, Any]) -> str:
    """Return what two records of the same prompt have in common: their turns, tools and template settings."""
    turns = record.get("messages") or [{"role": "user", "content": record["instruction"]}]
    said = [turns, record.get("tools") or None, record.get("chat_template_kwargs") or None]
    return json.dumps(said, sort_keys=True)


def digest_of(value: Any) -> str:
    """Return a digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_records(source: str) -> list[tuple[str, Record]]:
    """Return each record of a file, of the files of a folder, or of a hub dataset, with its place.

    Raises ValueError, naming file and line, for what is no record, and where there is none.
    """
    placed = []
    for place, record in _rows(source):
        try:
            parse_record(record, min_rating=0)
            _check_turns(record.get("messages"))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        placed.append((place, record))
    return placed


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows, of a hub dataset those of its split "train", with all columns."""
    path = Path(source)
    if not path.exists() and "/" in source and is_hub_id(source):
        yield from read_hub(source, "train")
        return
    if not path.exists():
        raise ValueError(f"{path}: there is no such file; give records, as `notus sample` writes them")
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    rows = itertools.chain.from_iterable(map(read_file, files))
    if (first := next(rows, None)) is None:
        raise ValueError(f"{path}: holds no records; give at least one")
    yield first
    yield from rows


def _check_turns(turns: Any) -> None:
    if turns is None:
        return
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns
    ):
        raise ValueError("messages must be a list of turns, each with a role and a content; correct it, or remove it")


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines; the file appears whole. Raises OSError."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        for record in records:
            file.write(_line(record))


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which has no UTF-8
        return json.dumps(record).encode() + b"\n"


def join(records: Sequence[Record], places: Sequence[str], others: Sequence[tuple[str, Record]]) -> list[Record]:
    """Return for each of `records`, which stand at `places`, the one of `others` with the same prompt.

    Of a prompt that occurs several times, the first goes with the first, and so on. Raises ValueError, naming a place,
    unless both have the same prompts, each as often.
    """
    by_key: dict[str, list[tuple[str, Record]]] = {}
    for place, other in others:
        by_key.setdefault(prompt_key(other), []).append((place, other))
    found: list[Record] = []
    missing = []
    for place, record in zip(places, records, strict=True):
        same = by_key.get(prompt_key(record))
        if same:
            found.append(same.pop(0)[1])
        else:
            missing.append(place)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"no record of the prompt of {'; '.join(missing[:3])}{more}; both need the same prompts")
    if left := next((place for same in by_key.values() for place, _ in same), None):
        raise ValueError(f"{left}: its prompt is not among the prompts; both need the same prompts")
    return found


def repeated(records: Iterable[Mapping[str, Any]]) -> int:
    """Return how many records have the prompt of an earlier one."""
    return sum(count - 1 for count in Counter(map(prompt_key, records)).values())


# ---- an output that is finished, half done or somebody else's ----


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other processes away from `out` for the block. A file system without locks is used without one.

    Raises ValueError if another process is at work on it; OSError if nothing can be written there.
    """
    folder = kept_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with check_regular(folder / _LOCK).open("a") as file:
        try:
            lock(file)
        except BlockingIOError as error:
            raise ValueError(f"{out}: another process is at work on it; wait for its end, or name another") from error
        except OSError:
            pass
        try:
            yield
        finally:
            _remove_unused(folder)


def _holds_work(folder: Path) -> bool:
    """Whether a kept folder holds more than its own files."""
    return any(entry.name not in (_LOCK, _SETTINGS, _ANEW) for entry in folder.iterdir())


def _remove_unused(folder: Path) -> None:
    """Remove a kept folder without work."""
    with contextlib.suppress(OSError):
        if not _holds_work(folder):
            shutil.rmtree(folder)


def check_out(out: Path, *inputs: str | None) -> None:
    """Make the parent folder of `out`, before the work that fills it.

    Raises ValueError if it is no name for records, or one of the inputs; OSError if nothing can be written there.
    """
    if out.suffix != ".jsonl":
        raise ValueError(f"{out}: records are JSON lines; choose a name that ends with .jsonl")
    summary = summary_file(out)
    for given in inputs:
        check_output(out, form="JSON Lines", not_over=given or "")
        if given and summary.exists() and Path(given).exists() and summary.samefile(given):
            raise ValueError(f"{out}: its summary would replace the input {given}; choose another name")


def is_finished(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Return whether `out` holds all that a command with these settings makes; else prepare its kept folder.

    Work that an interrupted command with the same settings has kept stays there. `overwrite` starts over where the
    settings differ, and where `out` exists, finished or not. Call it within `held`.

    Raises ValueError, naming the setting, if `out` or its kept folder are of other settings and `overwrite` is not set.
    """
    folder, settings = kept_folder(out), json.loads(json.dumps(settings))
    kept = _read_json(folder / _SETTINGS)
    if out.exists() and out.stat().st_size and not overwrite:
        summary = _summary(out)
        if not summary:
            if kept != settings:  # else the process was killed between the records and their summary
                raise ValueError(
                    f"{out}: exists already, and is not what this command wrote; name another file, or replace it with "
                    "--overwrite"
                )
        elif (change := changed(summary.get("settings"), settings)) is not None:
            raise ValueError(f"{out}: made with other settings ({change}); name another file, or --overwrite")
        elif not summary.get("failed"):
            if kept == settings:  # else it is unfinished work of others, which --overwrite began
                shutil.rmtree(folder, ignore_errors=True)
            return True
    if kept is not None and (change := changed(kept, settings)) is not None:
        if not overwrite and _holds_work(folder):
            raise ValueError(
                f"{folder}: holds unfinished work of other settings ({change}); set these again, or start over with "
                "--overwrite"
            )
        _empty(folder)
    elif kept is None or (overwrite and _summary(out).get("failed") and not (folder / _ANEW).exists()):
        _empty(folder)  # what stands there without settings is nobody's; else it is the work that `out` is made of
    if overwrite:
        write_text(folder / _ANEW, "")
    write_text(folder / _SETTINGS, json.dumps(settings, indent=2) + "\n")
    return False


def earlier_settings(out: Path, *, overwrite: bool) -> dict[str, Any]:
    """Return the settings of unfinished work on `out`; else, unless it is replaced, of what it holds; else nothing."""
    kept = _read_json(kept_folder(out) / _SETTINGS)
    held = {} if overwrite else _summary(out).get("settings")
    return next((settings for settings in (kept, held) if isinstance(settings, dict)), {})


def _summary(out: Path) -> dict[str, Any]:
    """Return the summary of what `out` holds; empty if there is none, or it is of something else."""
    summary = _read_json(summary_file(out))
    whole = isinstance(summary, dict) and out.is_file() and summary.get("sha256") == _sha256(out)
    return summary if whole else {}


def finish(out: Path, records: Iterable[Mapping[str, Any]], summary: Mapping[str, Any], *, failed: int) -> None:
    """Write the records and their summary. Kept work is removed, unless something failed, which may be tried again."""
    write_records(out, records)
    ends = {"failed": failed, "sha256": _sha256(out)}
    write_text(summary_file(out), json.dumps({**summary, **ends}, indent=2) + "\n")
    (kept_folder(out) / _ANEW).unlink(missing_ok=True)
    if not failed:
        shutil.rmtree(kept_folder(out), ignore_errors=True)


def changed(before: Any, now: Mapping[str, Any]) -> str | None:
    """Return the first setting that differs, with both values; None if all are the same."""
    one, other = dict(_flat(before)), dict(_flat(now))
    for key in [*other, *one]:
        if key not in one or key not in other or one[key] != other[key]:
            there, here = (_shown(values[key]) if key in values else "not set" for values in (one, other))
            return f"{key}: {there} there, {here} here"
    return None


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and tree:
        for number, value in enumerate(tree, start=1):
            yield from _flat(value, f"{path} {number}")
    else:
        yield path, tree


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _read_json(path: Path) -> Any:
    """Return what a file holds; None if there is none, or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _empty(folder: Path) -> None:
    """Remove what a kept folder holds, but for the lock, which this process holds."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
