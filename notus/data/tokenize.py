"""Rows from files, the hub or memory -> the tokenised dataset on disk, and a report of what was dropped and cut.

The columns are those of `dataset.FEATURES`, `PROVENANCE` and `TRACE`. CACHE/rows-FINGERPRINT/ holds the Arrow files
that `datasets` wrote, and `digests.json`, their sha256 by file name. The folder is there whole or not at all, and is
verified before it is used: Arrow itself notices a short file at best, and no altered token.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from notus.data.chat import ChatEncoder, Encoded, EncodingError, Rendered
from notus.data.dataset import FEATURES, PROVENANCE, TRACE, Outcome, row_digest
from notus.data.drop_report import DropReport, Tally, report_of
from notus.data.formats import (
    Reading,
    Record,
    Task,
    readings,
    unknown_columns,
    used_columns,
)
from notus.data.mixture import Share, copies, mixed
from notus.data.sources import Part, Source, is_mixture, open_rows, open_source, parts, read_rows
from notus.runtime.files import check_regular, disk_error, sync
from notus.runtime.process import tell

RowSource: TypeAlias = str | Path | datasets.Dataset | Sequence[Mapping[str, Any]]
OnBadRow = Literal["error", "skip"]
TooLong = Literal["cut", "drop"]

# `note`, for the report alone: what is wrong with the row; or the names of the columns that nothing reads, and of those
# that `data.columns` maps.
_COLUMNS = datasets.Features({**FEATURES, **PROVENANCE, **TRACE, "note": datasets.Value("string")})
_DIGESTS = "digests.json"
BATCH_ROWS = 500  # rows that a worker is given at a time
# A worker tokenises so many characters at a time; a longer row than that, and than 16 characters for each token that
# could be kept, is dropped, because the tokenizer takes about 400 bytes for each character.
MOST_CHARACTERS = 1_000_000
CHARACTERS_PER_TOKEN = 16
LONGEST_SOURCE = 200  # characters of a row's `source` that are kept


class LoadOptions(TypedDict, total=False):
    """What `load_pairs`, `load_lists`, `load_labels` and `load_sft` take besides lengths, each with a default.

    Attributes:
        chat_template, chat_template_kwargs, template_date, add_empty_system, mask_history, split_special_tokens: see
            `ChatEncoder`.
        columns: what the rows call their columns, {their name: ours}.
        too_long: "drop" leaves out what "cut", the default, cuts.
        on_bad_row: "skip" counts rows that cannot be read, "error", the default, raises at the first.
        exclude: ids of rows to leave out, see `dataset.RowInfo`.
        num_workers: processes that tokenise; 1.
        cache_dir: where tokenised rows are kept between runs; None: in the cache folder of `datasets`.
        seed: of the draw for weights; 42.
    """

    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    template_date: str | None
    add_empty_system: bool
    mask_history: bool
    split_special_tokens: bool
    columns: Mapping[str, str] | None
    too_long: TooLong
    on_bad_row: OnBadRow
    exclude: Collection[str]
    num_workers: int
    cache_dir: str | Path | None
    seed: int


def load_pairs(
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    **options: Unpack[LoadOptions],
) -> tuple[datasets.Dataset, DropReport]:
    """Read and tokenise preference pairs: rows of K = 2, branch 0 the chosen, branch 1 the rejected.

    Args:
        source: a path or hub id; a list of {path, split, weight}, whose weight is the share of the rows to take: 0.5
            half of them, drawn with `seed`, 2.0 each twice; or the rows themselves, a list of dicts or a
            `datasets.Dataset`.
        tokenizer: a fast tokenizer.
        max_length: most tokens of prompt + completion; see `truncate` for what is cut.
        max_prompt_length: prompt tokens kept if a pair is too long.
        options: see `LoadOptions`.

    Returns:
        The rows, in the order of the sources, memory-mapped from the cache; and the report.

    Raises:
        ValueError: input that cannot be read, naming file, line, key and remedy; lengths that cannot be
            kept; or nothing left, with the report.
    """
    return _load("dpo", source, tokenizer, max_length, max_prompt_length, **options)


def load_lists(
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    **options: Unpack[LoadOptions],
) -> tuple[datasets.Dataset, DropReport]:
    """Read and tokenise lists of rated completions: rows of two branches or more, the best rated first.

    Completions without a rating or text are left out. Arguments, result and errors as in `load_pairs`.
    """
    return _load("lists", source, tokenizer, max_length, max_prompt_length, **options)


def load_labels(
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    **options: Unpack[LoadOptions],
) -> tuple[datasets.Dataset, DropReport]:
    """Read and tokenise completions with a label, good or bad: rows of K = 1; of a pair, two rows, chosen first.

    Arguments, result and errors as in `load_pairs`.
    """
    return _load("labels", source, tokenizer, max_length, max_prompt_length, **options)


def load_sft(
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    **options: Unpack[LoadOptions],
) -> tuple[datasets.Dataset, DropReport]:
    """Read and tokenise demonstrations: rows of K = 1. Rows longer than `max_length` are cut at their end.

    Arguments, result and errors as in `load_pairs`.
    """
    return _load("sft", source, tokenizer, max_length, None, **options)


def _load(
    task: Task,
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int | None,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    template_date: str | None = None,
    add_empty_system: bool = False,
    mask_history: bool = False,
    split_special_tokens: bool = False,
    columns: Mapping[str, str] | None = None,
    too_long: TooLong = "cut",
    on_bad_row: OnBadRow = "error",
    exclude: Collection[str] = (),
    num_workers: int = 1,
    cache_dir: str | Path | None = None,
    seed: int = 42,
) -> tuple[datasets.Dataset, DropReport]:
    encoder = ChatEncoder(
        tokenizer,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
        template_date=template_date,
        add_empty_system=add_empty_system,
        mask_history=mask_history,
        split_special_tokens=split_special_tokens,
    )
    rule = Rule(encoder, task, max_length, max_prompt_length, columns or {}, too_long)
    shares, report = read_shares(
        source, rule, on_bad_row=on_bad_row, exclude=exclude, num_workers=num_workers, cache_dir=cache_dir
    )
    return mixed(shares, seed), report


def truncate(encoded: Sequence[Encoded], max_length: int, max_prompt_length: int | None) -> tuple[list[Encoded], int]:
    """Cut a row's conversations to `max_length` tokens each; also the bits that say what was cut.

    As the original's (TRL's `keep_end`): if the longest is too long, first the prompt keeps its last
    `max_prompt_length` tokens, in all conversations the same; BOS goes with the rest. If the longest is still too
    long, every completion is cut to max_length - max_prompt_length tokens, EOS with the rest; so a prompt shorter
    than max_prompt_length leaves room unused. `max_prompt_length=None`: only the end is cut, to max_length.
    """
    if max(len(item.ids) for item in encoded) <= max_length:
        return list(encoded), 0
    prompts = [_prompt_length(item) for item in encoded]
    excess = 0 if max_prompt_length is None else max(0, max(prompts) - max_prompt_length)
    starts = [min(excess, prompt - 1) for prompt in prompts]  # the first token learned needs one before it
    too_long = max(len(item.ids) - start for item, start in zip(encoded, starts, strict=True)) > max_length
    cut = []
    for item, start, prompt in zip(encoded, starts, prompts, strict=True):
        end = len(item.ids)
        if too_long:
            end = max_length if max_prompt_length is None else prompt + max_length - max_prompt_length
        cut.append(Encoded(item.ids[start:end], item.mask[start:end]))
    shortened = any(a.mask.sum() < b.mask.sum() for a, b in zip(cut, encoded, strict=True))
    return cut, (Outcome.PROMPT_CUT if excess else 0) | (Outcome.COMPLETION_CUT if shortened else 0)


def split_trunk(encoded: Sequence[Encoded]) -> int:
    """Length of the longest token prefix that all conversations share within their prompts."""
    first = encoded[0].ids
    shared = min(_prompt_length(item) for item in encoded)
    for item in encoded[1:]:
        different = np.flatnonzero(first[:shared] != item.ids[:shared])
        shared = int(different[0]) if len(different) else shared
    return shared


def _prompt_length(item: Encoded) -> int:
    """Tokens before the first that is learned."""
    return int(item.mask.argmax()) if item.mask.any() else len(item.ids)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a row becomes tokens: all that decides the result, beside the row. `load_pairs` says what the settings do.

    Raises ValueError for lengths that leave no room for a prompt or a completion.
    """

    encoder: ChatEncoder
    task: Task
    max_length: int
    max_prompt_length: int | None = None  # None: demonstrations, which are cut at their end
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    too_long: TooLong = "cut"

    def __post_init__(self) -> None:
        longest = self.max_prompt_length
        if longest is None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; it must leave room for a prompt and a completion token")
        if longest is not None and not 0 < longest < self.max_length:
            raise ValueError(
                f"max_prompt_length is {longest}, but must be at least 1 and below max_length ({self.max_length}), so "
                "that a prompt leaves room for a completion"
            )

    def digest(self) -> str:
        """Digest of the rule, and of the code that applies it."""
        sources = sorted(Path(__file__).parent.glob("*.py"))
        code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
        versions = [tokenizers.__version__, transformers.__version__]
        settings = [self.task, self.max_length, self.max_prompt_length, dict(self.columns), self.too_long]
        return hashlib.sha256(json.dumps([self.encoder.digest(), settings, code, versions]).encode()).hexdigest()

    def read(self, place: str, row: Any) -> list["_Row"]:
        """Render each of a row's conversations as a string, none of a row that is dropped.

        Raises ValueError for a row of no known form, and one that the template does not take.
        """
        found = readings(row, self.task, self.columns)
        unread = unknown_columns(row, self.task, self.columns)
        mapped = [name for name in self.columns if name in row]
        note = json.dumps([unread, mapped]) if unread or mapped else None
        is_reversed = self.task != "lists" and _is_reversed(found)
        made = [_Row(place, reading, note=note, is_reversed=is_reversed) for reading in found]
        for each in made:
            self._render(each)
        return made

    def _render(self, row: "_Row") -> None:
        is_list = self.task == "lists"
        if is_list:
            self._leave_out_empty(row)
        record = row.reading.record
        if is_list and len(record.completions) < 2:
            row.outcome = Outcome.TOO_FEW
            return
        if not all(self.encoder.has_text(completion) for completion in record.completions):
            row.outcome = Outcome.EMPTY
            return
        row.rendered = [
            self.encoder.render(record.prompt, completion, tools=record.tools, template_kwargs=record.template_kwargs)
            for completion in record.completions
        ]
        if row.characters > max(MOST_CHARACTERS, CHARACTERS_PER_TOKEN * self.max_length):
            row.rendered, row.outcome = [], Outcome.HUGE

    def _leave_out_empty(self, row: "_Row") -> None:
        """Take the completions without text out of a list, with their ratings."""
        record, ratings = row.reading.record, row.reading.ratings
        kept = [number for number, each in enumerate(record.completions) if self.encoder.has_text(each)]
        row.reading = row.reading._replace(
            record=record._replace(completions=tuple(record.completions[number] for number in kept)),
            ratings=None if ratings is None else tuple(ratings[number] for number in kept),
            left_out=row.reading.left_out + len(record.completions) - len(kept),
        )

    def finish(self, row: "_Row", encoded: list[Encoded]) -> None:
        """Cut a row to length, and say what became of it."""
        if not encoded:
            return
        cut, outcome = truncate(encoded, self.max_length, self.max_prompt_length)
        row.outcome, row.cut = outcome | row.flags(), _tokens_cut(encoded, cut)
        if outcome and self.too_long == "drop":
            row.outcome = Outcome.TOO_LONG
        elif not all(item.mask.any() for item in cut):
            row.outcome = Outcome.CUT_AWAY
        elif len(cut) > 1 and all(np.array_equal(item.ids, cut[0].ids) for item in cut):
            row.outcome = Outcome.ALIKE if self.task == "lists" else Outcome.IDENTICAL
        else:
            row.encoded = cut


def _is_reversed(found: Sequence[Reading]) -> bool:
    """Whether a pair's chosen answer, or the one that is labelled good, is rated below the other."""
    ratings = [rating for reading in found for rating in reading.ratings or ()]
    if len(ratings) != 2:
        return False
    chosen, rejected = ratings
    return chosen is not None and rejected is not None and chosen < rejected


_UNREAD = Reading(Record("", ()))


@dataclasses.dataclass
class _Row:
    """A row on its way. `encoded` is empty if it is dropped."""

    place: str
    reading: Reading = _UNREAD
    rendered: list[Rendered] = dataclasses.field(default_factory=list)
    encoded: list[Encoded] = dataclasses.field(default_factory=list)
    outcome: int = 0
    cut: list[int] = dataclasses.field(default_factory=list)
    note: str | None = None
    is_reversed: bool = False

    @property
    def stored(self) -> dict[str, Any]:
        """What stands beside the tokens, by the names of columns."""
        reading, source = self.reading, self.reading.source
        return {
            "source": None if source is None else source[:LONGEST_SOURCE],
            "ratings": reading.ratings,
            "label": reading.label,
            "id": record_id(reading.record) if reading.record.completions else "",
            "place": self.place,
            "outcome": self.outcome,
            "cut": self.cut,
            "left_out": reading.left_out,
            "note": self.note,
        }

    @property
    def characters(self) -> int:
        return sum(len(item.text) for item in self.rendered)

    def flags(self) -> int:
        flags = Outcome.TEMPLATED if self.rendered[0].templated else 0
        flags |= Outcome.GLUED if any(item.glued for item in self.rendered) else 0
        flags |= Outcome.REVERSED if self.is_reversed else 0
        flags |= Outcome.EMPTY_SYSTEM if any(item.empty_system for item in self.rendered) else 0
        flags |= Outcome.HISTORY_MASKED if any(item.history_masked for item in self.rendered) else 0
        return flags | (Outcome.SPECIAL_TOKENS if any(item.special_tokens for item in self.rendered) else 0)


def record_id(record: Record) -> str:
    """The id of a row: 16 hexadecimal digits, a digest of what it says, whatever the tokenizer and the file."""
    said = [record.prompt, record.completions, record.tools, dict(record.template_kwargs)]
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _tokens_cut(before: Sequence[Encoded], after: Sequence[Encoded]) -> list[int]:
    """Tokens cut from the prompt, then from each completion."""
    prompts = [_prompt_length(a) - _prompt_length(b) for a, b in zip(before, after, strict=True)]
    lost = [len(a.ids) - len(b.ids) for a, b in zip(before, after, strict=True)]
    return [prompts[0], *(whole - prompt for whole, prompt in zip(lost, prompts, strict=True))]


@dataclasses.dataclass(frozen=True)
class _Tokenize:
    """The function that `datasets.map` calls with batches of a source's rows, in its workers."""

    source: Source
    rule: Rule
    on_bad_row: OnBadRow

    def __call__(self, batch: Any, indices: Sequence[int]) -> pa.Table:
        made: list[_Row] = []
        for group in _groups(self._rendered(batch, indices)):
            self._encode(group)
            made += group
        _drop_contradictions(made)
        return _table(made)

    def _rendered(self, batch: Any, indices: Sequence[int]) -> Iterator[_Row]:
        for place, row in read_rows(self.source, batch, indices):
            try:
                if isinstance(row, ValueError):
                    raise row
                yield from self.rule.read(place, row)
            except ValueError as error:
                yield self._bad(_Row(place), error)

    def _encode(self, rows: list[_Row]) -> None:
        """Tokenise what is rendered, at once."""
        while True:
            owners = [row for row in rows for _ in row.rendered]
            try:
                encoded = iter(self.rule.encoder.tokenize([text for row in rows for text in row.rendered]))
                break
            except EncodingError as error:
                self._bad(owners[error.item], error)
        for row in rows:
            self.rule.finish(row, [next(encoded) for _ in row.rendered])
            row.rendered = []

    def _bad(self, row: _Row, error: ValueError) -> _Row:
        if self.on_bad_row == "error":
            raise ValueError(f"{row.place}: {error}") from error
        row.rendered, row.outcome, row.note = [], Outcome.UNREADABLE, str(error)
        return row


def _drop_contradictions(rows: Sequence[_Row]) -> None:
    """Drop the two labelled rows of a pair where nothing is left that tells them apart: none is both good and bad."""
    for one, other in itertools.pairwise(rows):
        is_pair = one.place == other.place and one.encoded and other.encoded
        if is_pair and np.array_equal(one.encoded[0].ids, other.encoded[0].ids):
            one.encoded, other.encoded = [], []
            one.outcome = other.outcome = Outcome.IDENTICAL


def _groups(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Neighbouring rows, of `MOST_CHARACTERS` together or little more."""
    group: list[_Row] = []
    characters = 0
    for row in rows:
        group.append(row)
        characters += row.characters
        if characters >= MOST_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _table(rows: Sequence[_Row]) -> pa.Table:
    """Store rows, each of some conversations, or of none if it is dropped, as `_COLUMNS`.

    Arrow's arrays are made from flat ones: from Python lists they would take as long as the tokenizer.
    """
    shared = [split_trunk(row.encoded) if row.encoded else 0 for row in rows]
    trunks = [
        row.encoded[0].ids[:start] if row.encoded else np.empty(0, np.int32)
        for row, start in zip(rows, shared, strict=True)
    ]
    branches = [
        [(item.ids[start:], item.mask[start:]) for item in row.encoded] for row, start in zip(rows, shared, strict=True)
    ]
    per_row = _offsets([len(row) for row in branches])
    columns = {
        "trunk": _lists(trunks),
        "branches": pa.ListArray.from_arrays(per_row, _lists([ids for row in branches for ids, _ in row])),
        "loss_mask": pa.ListArray.from_arrays(per_row, _lists([mask for row in branches for _, mask in row])),
        "digest": pa.array([_digest_of(*row) for row in zip(trunks, branches, strict=True)], pa.binary()),
    }
    schema, stored = _COLUMNS.arrow_schema, [row.stored for row in rows]
    names = [name for name in schema.names if name not in columns]
    columns |= {name: pa.array([row[name] for row in stored], schema.field(name).type) for name in names}
    return pa.table([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)


def _digest_of(trunk: np.ndarray, branches: Sequence[tuple[np.ndarray, np.ndarray]]) -> bytes:
    if not branches:
        return b""
    ids, masks = (np.concatenate(parts) for parts in zip(*branches, strict=True))
    return row_digest(trunk, ids, masks, [len(part) for part, _ in branches])


def _lists(items: Sequence[np.ndarray]) -> pa.ListArray:
    values = np.concatenate(items) if items else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(_offsets([len(item) for item in items]), pa.array(values))


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


# ---- sources ----


def read_shares(
    source: RowSource,
    rule: Rule,
    *,
    on_bad_row: OnBadRow = "error",
    exclude: Collection[str] = (),
    num_workers: int = 1,
    cache_dir: str | Path | None = None,
) -> tuple[list[Share], DropReport]:
    """Tokenise every source. Return what is left of each with its weight, not applied yet, and the report.

    Arguments and errors as in `load_pairs`.
    """
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "notus").expanduser()
    shares, tallies = [], []
    for part, opened in _opened(source, rule, folder):
        tokenized = _tokenize(opened, rule, on_bad_row, num_workers, folder)
        tally = Tally(tokenized, exclude, opened.unread, rule.columns)
        if on_bad_row == "error" and tally.unreadable:
            raise ValueError(tally.unreadable[0])
        if not tally.kept.any():
            raise ValueError(f"{part.path}: no row is left to learn from\n{report_of([tally])}")
        rows = tokenized.remove_columns("note")
        rows = rows if tally.kept.all() else rows.select(np.flatnonzero(tally.kept))
        shares.append(Share(part.path, rows, part.weight))
        tallies.append(tally)
    return shares, dataclasses.replace(report_of(tallies, rule.columns), duplicates=copies(shares))


def _opened(source: RowSource, rule: Rule, folder: Path) -> Iterator[tuple[Part, Source]]:
    """Each source with its weight; rows in memory are one source."""
    pick = functools.partial(used_columns, task=rule.task, columns=rule.columns)
    if isinstance(source, str | Path) or is_mixture(source):
        for part in parts(source):
            yield part, open_source(part.path, part.split, columns=pick, cache_dir=folder)
    else:
        opened = open_rows(source, columns=pick)
        yield Part(opened.name), opened


def _tokenize(source: Source, rule: Rule, on_bad_row: OnBadRow, num_workers: int, folder: Path) -> datasets.Dataset:
    """Return one row per row of the source, with its outcome; from the cache if it is there."""
    # Our own digest: that of `datasets` knows neither the content of a JSON file nor the text of our code.
    fingerprint = hashlib.sha256(f"{source.name} {source.digest} {rule.digest()}".encode()).hexdigest()[:32]
    workers = min(num_workers, math.ceil(len(source.rows) / BATCH_ROWS))
    return cached(
        folder,
        f"rows-{fingerprint}",
        lambda file: source.rows.map(
            _Tokenize(source, rule, on_bad_row),
            with_indices=True,
            batched=True,
            batch_size=BATCH_ROWS,
            remove_columns=source.rows.column_names,
            features=_COLUMNS,
            num_proc=workers if workers > 1 else None,
            new_fingerprint=fingerprint,
            cache_file_name=file,
            desc=f"Tokenizing {source.name}",
        ),
    )


def cached(folder: Path, name: str, make: Callable[[str], object]) -> datasets.Dataset:
    """Return the dataset `name` from the cache, or make it. Several processes may do so at once.

    Args:
        folder: where datasets are cached.
        name: stands for the content.
        make: writes the dataset to the Arrow file of this name, or to numbered files beside it.

    Raises:
        OSError: the disk fails; see `disk_error`. An earlier state is untouched.
    """
    final = folder / name
    if (final.is_dir() and not _is_whole(final)) or (final.is_symlink() and not final.exists()):
        tell(f"warning: the tokenised dataset {final} is damaged: it is made again")
        if final.is_symlink():
            final.unlink()  # what it points to is somebody else's
        else:
            shutil.rmtree(final)
    if not final.is_dir():
        try:
            _publish(final, make)
        except OSError as error:
            raise disk_error(final, error) from error
    files = sorted(final.glob("*.arrow"))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in files])


def _publish(final: Path, make: Callable[[str], object]) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(final)
    owner = f".{final.name}.{socket.gethostname()}.{os.getpid()}."
    with tempfile.TemporaryDirectory(prefix=owner, dir=final.parent) as beside:
        partial = Path(beside) / "whole"
        partial.mkdir()  # with the user's usual permissions, unlike the temporary folder
        make(str(partial / "rows.arrow"))
        (partial / _DIGESTS).write_text(json.dumps(_digests(partial)), encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            sync(path)
        try:
            os.rename(partial, final)
        except OSError:
            if not final.is_dir():  # else another process was first, with the same rows
                raise


def _clear_leftovers(final: Path) -> None:
    """Remove what killed processes of this machine have left of the same dataset."""
    for path in final.parent.glob(f".{final.name}.{socket.gethostname()}.*"):
        owner = path.name.split(".")[-2]
        if Path("/proc/self").exists() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True)  # another process may clear it, too


def _is_whole(folder: Path) -> bool:
    try:
        found = _digests(folder)
        return bool(found) and bool(json.loads(check_regular(folder / _DIGESTS).read_text(encoding="utf-8")) == found)
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.glob("*.arrow"):
        with check_regular(path).open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
