"""Rows from files or the hub -> the tokenised dataset on disk, and a report of what was dropped and cut.

The columns are those of `dataset.FEATURES` and `dataset.PROVENANCE`. CACHE/rows-FINGERPRINT/ holds the Arrow files that
`datasets` wrote, and `digests.json`, their sha256 by file name. The folder is there whole or not at all, and is
verified before it is used: Arrow itself notices a short file at best, and no altered token.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from notus.data.chat import ChatEncoder, Encoded, Rendered
from notus.data.dataset import FEATURES, PROVENANCE
from notus.data.formats import Provenance, Task, normalize, read_provenance
from notus.data.sources import Part, Source, open_source, parts, read_rows
from notus.runtime.files import disk_error, sync

_COLUMNS = datasets.Features({**FEATURES, **PROVENANCE, "outcome": datasets.Value("int8")})
_DIGESTS = "digests.json"
BATCH_ROWS = 500  # rows tokenised at a time; a worker's memory is some of these

# The column `outcome`, as bits: the row was cut at either end and kept, or dropped; a chat template rendered it.
PROMPT_CUT, COMPLETION_CUT, EMPTY, CUT_AWAY, IDENTICAL, TEMPLATED = 1, 2, 4, 8, 16, 32
DROPPED = {
    EMPTY: "empty completion",
    CUT_AWAY: "completion cut away by max_length",
    IDENTICAL: "chosen and rejected identical",
}


@dataclasses.dataclass(frozen=True)
class DropReport:
    """How many rows were read, dropped for which reason, and cut; `str()` is the text to print.

    Attributes:
        read: rows read, before weights and the split.
        dropped: rows per reason, reasons that occurred only.
        prompts_cut, completions_cut: kept rows that lost tokens of the prompt, or of a completion.
        templated: kept rows that a chat template rendered; the others are plain text.
    """

    read: int = 0
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prompts_cut: int = 0
    completions_cut: int = 0
    templated: int = 0

    @classmethod
    def count(cls, outcomes: np.ndarray) -> "DropReport":
        """Count the outcomes of all rows read."""
        dropped = {reason: int((outcomes == bit).sum()) for bit, reason in DROPPED.items()}
        return cls(
            read=len(outcomes),
            dropped={reason: count for reason, count in dropped.items() if count},
            prompts_cut=int((outcomes & PROMPT_CUT > 0).sum()),
            completions_cut=int((outcomes & COMPLETION_CUT > 0).sum()),
            templated=int((outcomes & TEMPLATED > 0).sum()),
        )

    @property
    def kept(self) -> int:
        """Rows that are left."""
        return self.read - sum(self.dropped.values())

    def __str__(self) -> str:
        reasons = "".join(f"\n  dropped {count}: {reason}" for reason, count in self.dropped.items())
        cut = f"\n  cut to length: {self.prompts_cut} prompts, {self.completions_cut} rows' completions"
        return f"rows: {self.read} read, {self.kept} kept, {self.read - self.kept} dropped{reasons}{cut}"


def load_pairs(
    source: str | Path | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    chat_template: str | None = None,
    add_empty_system: bool = False,
    num_workers: int = 1,
    cache_dir: str | Path | None = None,
    seed: int = 42,
) -> tuple[datasets.Dataset, DropReport]:
    """Read and tokenise preference pairs: rows of K = 2, branch 0 the chosen, branch 1 the rejected.

    Args:
        source: a path or hub id, or a list of {path, split, weight}. The weight is the share of the rows to
            take: 0.5 half of them, drawn with `seed`, 2.0 each twice.
        tokenizer: a fast tokenizer.
        max_length: most tokens of prompt + completion; see `truncate` for what is cut.
        max_prompt_length: prompt tokens kept if a pair is too long.
        chat_template, add_empty_system: see `ChatEncoder`.
        num_workers: processes that tokenise.
        cache_dir: where tokenised rows are kept between runs; None: in the cache folder of `datasets`.
        seed: of the draw for weights.

    Returns:
        The rows, in the order of the sources, memory-mapped from the cache; and the report.

    Raises:
        ValueError: input that cannot be read, naming file, line, key and remedy; lengths that cannot be
            kept; or nothing left, with the report.
    """
    if not 0 < max_prompt_length < max_length:
        raise ValueError(
            f"max_prompt_length is {max_prompt_length}, but must be at least 1 and below max_length "
            f"({max_length}), so that a prompt leaves room for a completion"
        )
    encoder = ChatEncoder(tokenizer, chat_template=chat_template, add_empty_system=add_empty_system)
    return _load(source, _Rule(encoder, "dpo", max_length, max_prompt_length), num_workers, cache_dir, seed)


def load_sft(
    source: str | Path | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: str | None = None,
    add_empty_system: bool = False,
    num_workers: int = 1,
    cache_dir: str | Path | None = None,
    seed: int = 42,
) -> tuple[datasets.Dataset, DropReport]:
    """Read and tokenise demonstrations: rows of K = 1. Rows longer than `max_length` are cut at their end.

    Arguments, result and errors as in `load_pairs`.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; it must leave room for a prompt and a completion token")
    encoder = ChatEncoder(tokenizer, chat_template=chat_template, add_empty_system=add_empty_system)
    return _load(source, _Rule(encoder, "sft", max_length, None), num_workers, cache_dir, seed)


def split_holdout(dataset: datasets.Dataset, size: int, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Hold `size` rows out, drawn with `seed`: (the rest, the held-out rows), each in the order of `dataset`.

    Draws the rows that `datasets`' own `train_test_split(test_size=size, seed=seed)` does, as Notus' split
    was made. Raises ValueError if `size` leaves either side empty.
    """
    if not 0 < size < len(dataset):
        raise ValueError(
            f"cannot hold {size} of {len(dataset)} rows out for evaluation; choose 1 to {len(dataset) - 1}"
        )
    drawn = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.select(np.sort(drawn[size:])), dataset.select(np.sort(drawn[:size]))


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
    return cut, (PROMPT_CUT if excess else 0) | (COMPLETION_CUT if shortened else 0)


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
class _Rule:
    """How a row becomes tokens: all that decides the result, beside the row."""

    encoder: ChatEncoder
    task: Task
    max_length: int
    max_prompt_length: int | None

    def digest(self) -> str:
        """Digest of the rule, and of the code that applies it."""
        names = ("chat.py", "formats.py", "sources.py", "dataset.py", "tokenize.py")
        code = [hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in names]
        versions = [tokenizers.__version__, transformers.__version__]
        decides = [self.encoder.digest(), self.task, self.max_length, self.max_prompt_length, code, versions]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def render(self, row: Any) -> list[Rendered]:
        """Render each of a row's conversations as a string; return none if a completion is empty."""
        record = normalize(row, self.task)
        if not all(self.encoder.has_text(completion) for completion in record.completions):
            return []
        return [self.encoder.render(record.prompt, completion) for completion in record.completions]

    def finish(self, encoded: list[Encoded]) -> tuple[list[Encoded], int]:
        """Cut a row to length. Return its conversations, none if it is dropped, and its outcome."""
        if not encoded:
            return [], EMPTY
        cut, outcome = truncate(encoded, self.max_length, self.max_prompt_length)
        if not all(item.mask.any() for item in cut):
            return [], CUT_AWAY
        if len(cut) > 1 and all(np.array_equal(item.ids, cut[0].ids) for item in cut):
            return [], IDENTICAL
        return cut, outcome


@dataclasses.dataclass(frozen=True)
class _Tokenize:
    """The function that `datasets.map` calls with batches of a source's rows, in its workers."""

    source: Source
    rule: _Rule

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> pa.Table:
        rendered, provenances = [], []
        for place, row in read_rows(self.source, batch, indices):
            try:
                rendered.append(self.rule.render(row))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            provenances.append(read_provenance(row))
        encoded = iter(self.rule.encoder.tokenize([text for row in rendered for text in row]))
        kept, outcomes = [], []
        for row in rendered:
            found, outcome = self.rule.finish([next(encoded) for _ in row])
            kept.append(found)
            outcomes.append(outcome | TEMPLATED if found and row[0].templated else outcome)
        return _table(kept, outcomes, provenances)


def _table(rows: Sequence[Sequence[Encoded]], outcomes: Sequence[int], provenances: Sequence[Provenance]) -> pa.Table:
    """Store rows of K conversations each, none of a dropped row, as `_COLUMNS`.

    Arrow's arrays are made from flat ones: from Python lists they would take as long as the tokenizer.
    """
    shared = [split_trunk(row) if row else 0 for row in rows]
    trunks = [row[0].ids[:start] if row else np.empty(0, np.int32) for row, start in zip(rows, shared, strict=True)]
    branches = [(item.ids[start:], item.mask[start:]) for row, start in zip(rows, shared, strict=True) for item in row]
    per_row = _offsets([len(row) for row in rows])
    columns = {
        "trunk": _lists(trunks),
        "branches": pa.ListArray.from_arrays(per_row, _lists([ids for ids, _ in branches])),
        "loss_mask": pa.ListArray.from_arrays(per_row, _lists([mask for _, mask in branches])),
        "outcome": pa.array(outcomes),
    }
    columns |= {name: pa.array([getattr(each, name) for each in provenances]) for name in Provenance._fields}
    schema = _COLUMNS.arrow_schema
    return pa.table([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)


def _lists(items: Sequence[np.ndarray]) -> pa.ListArray:
    values = np.concatenate(items) if items else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(_offsets([len(item) for item in items]), pa.array(values))


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def _load(
    source: str | Path | Sequence[Mapping[str, Any]],
    rule: _Rule,
    num_workers: int,
    cache_dir: str | Path | None,
    seed: int,
) -> tuple[datasets.Dataset, DropReport]:
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "notus")
    loaded, outcomes = [], []
    for part in parts(source):
        tokenized = _tokenize(open_source(part.path, part.split), rule, num_workers, folder)
        found = tokenized.data.column("outcome").to_numpy()
        kept = ~np.isin(found, list(DROPPED))
        if not kept.any():
            raise ValueError(f"{part.path}: no row is left to learn from\n{DropReport.count(found)}")
        rows = tokenized.remove_columns("outcome")
        loaded.append(_weighted(rows if kept.all() else rows.select(np.flatnonzero(kept)), part, seed))
        outcomes.append(found)
    return datasets.concatenate_datasets(loaded), DropReport.count(np.concatenate(outcomes))


def _tokenize(source: Source, rule: _Rule, num_workers: int, folder: Path) -> datasets.Dataset:
    """Return one row per row of the source, with its outcome; from the cache if it is there."""
    # Our own digest: that of `datasets` knows neither the content of a JSON file nor the text of our code.
    fingerprint = hashlib.sha256(f"{source.digest} {rule.digest()}".encode()).hexdigest()[:32]
    workers = min(num_workers, math.ceil(len(source.rows) / BATCH_ROWS))
    return cached(
        folder,
        f"rows-{fingerprint}",
        lambda file: source.rows.map(
            _Tokenize(source, rule),
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


def _weighted(rows: datasets.Dataset, part: Part, seed: int) -> datasets.Dataset:
    """Take the share `part.weight` of the rows: each as often as fits in whole, and a draw for the rest."""
    if part.weight == 1:
        return rows
    count = round(part.weight * len(rows))
    if count == 0:
        raise ValueError(f"{part.path}: weight {part.weight} of {len(rows)} rows is none; raise the weight")
    repeats, rest = divmod(count, len(rows))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:rest])
    return rows.select(np.concatenate([*[np.arange(len(rows))] * repeats, drawn]))


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
    if final.is_dir() and not _is_whole(final):
        print(f"warning: the tokenised dataset {final} is damaged: it is made again", flush=True)
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
        return bool(json.loads((folder / _DIGESTS).read_text(encoding="utf-8")) == _digests(folder))
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.glob("*.arrow"):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
