"""Training and evaluation rows of a run, with what became of the data on the way."""

import dataclasses
import datetime
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from notus.config import DataConfig
from notus.data.chat import ChatEncoder, check_ids
from notus.data.dataset import TokenizedDataset
from notus.data.drop_report import DropReport
from notus.data.formats import Task, guess_task, used_columns
from notus.data.mixture import Share, hold_out, mixed, rows_taken, without
from notus.data.sources import open_source, parts, read_rows
from notus.data.tokenize import Rule, read_shares
from notus.model.usage import set_trained_templates
from notus.runtime import distributed
from notus.runtime.files import check_regular

DATA_FILE = "data.json"
BUCKETS = 24
NAMED_SOURCES = 100
_FIRST_ROWS = 100  # rows to look at, to see what they are for


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run learns from and is evaluated on.

    Attributes:
        train: the training rows.
        eval: the evaluation rows, if there are any.
        reports: what reading "train" and "eval" dropped and cut; rows held out of "train" were read with it.
        task: what the rows are for.
        writes_date: whether a chat template that asks for the date rendered rows.
    """

    train: TokenizedDataset
    eval: TokenizedDataset | None
    reports: dict[str, DropReport]
    task: Task = "dpo"
    writes_date: bool = False

    @property
    def plain_text(self) -> bool:
        """Whether the model learns plain text only: no training row is a conversation."""
        return not self.reports["train"].templated

    def summary(self) -> dict[str, Any]:
        """The content of `data.json`, beside the stamps of `data_files.py`."""
        sides = {"train": self.train, "eval": self.eval}
        return {
            name: None if rows is None else data_summary(rows, self.reports.get(name), self.task)
            for name, rows in sides.items()
        }


def load_inputs(data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, task: Task, seed: int) -> Inputs:
    """Read and tokenise what a run learns from. All ranks must call this; rank 0 fills the cache.

    If a chat template rendered the rows, `tokenizer` is given that template, so that it is exported with the model.

    Args:
        data: the settings.
        tokenizer: a fast tokenizer.
        task: what a row is for.
        seed: of all draws.

    Raises:
        ValueError: what `load_pairs` raises, or a file of `data.exclude` that is of no use.
    """
    reader = _Reader(data, rule_of(data, tokenizer, task))
    train = reader.read("train", data.train)
    notices: list[str | None] = []
    held_out = None
    if data.eval is not None:
        shares = reader.read("eval", data.eval)
        held_out = mixed(shares, seed)
        notices.append(draws_notice("an evaluation", data.eval, shares))
        train, copies = without(train, held_out)
        reader.count_held(copies)
    elif data.eval_size:
        train, held_out, copies = hold_out(train, data.eval_size, seed)
        reader.count_held(copies)
    reader.check_exclude()
    reader.say_reports()
    notices += [draws_notice("an epoch", data.train, train), *unused_settings(data, reader.reports)]
    for line in filter(None, notices):
        distributed.say(line)
    templated = any(report.templated for report in reader.reports.values())
    writes_date = templated and reader.rule.encoder.writes_date
    if writes_date:
        distributed.say(f"the chat template writes the date: {reader.rule.encoder.date}, frozen as data.template_date")
    if templated:
        set_trained_templates(tokenizer, reader.rule.encoder)
        if notice := boundary_notice(reader.rule.encoder):
            distributed.say(notice)
    return Inputs(
        TokenizedDataset(mixed(train, seed)),
        None if held_out is None else TokenizedDataset(held_out),
        reader.reports,
        task,
        writes_date,
    )


def draws_notice(pass_: str, sources: Sequence[Mapping[str, Any]], shares: Sequence[Share]) -> str | None:
    """How many rows a pass over weighted sources draws of each; None if no source has a weight.

    `shares` are what is left of the `sources` once evaluation rows are held out.
    """
    if all(source.get("weight", 1) == 1 for source in sources):
        return None
    counts = [rows_taken(share) for share in shares]
    parts = [f"{count:,} of {share.name}" for count, share in zip(counts, shares, strict=True)]
    return f"by the weights of the sources, {pass_} has {sum(counts):,} rows: {', '.join(parts)}"


def unused_settings(data: DataConfig, reports: Mapping[str, DropReport]) -> list[str]:
    """Notes on settings of `data` that change no row that was read. It depends on the data, so it is no error."""
    keys = {
        "chat_template": "templated",
        "chat_template_kwargs": "templated",
        "add_empty_system": "empty_systems",
        "mask_history": "masked",
        "split_special_tokens": "special_tokens",
    }
    counted = {key: sum(getattr(report, name) for report in reports.values()) for key, name in keys.items()}
    unused = [key for key, count in counted.items() if getattr(data, key) and not count]
    reasons = {
        "add_empty_system": "every conversation has a system turn",
        "mask_history": "no conversation has several answers to learn",
        "split_special_tokens": "no row has a special token in its text",
    }
    plain = [] if counted["chat_template"] else [key for key in unused if key != "split_special_tokens"]
    notes = [f"note: data.{key} has no effect: {reasons[key]}" for key in unused if key not in plain]
    if plain:
        names, verb = ", ".join(f"data.{key}" for key in plain), "has" if len(plain) == 1 else "have"
        notes.append(f"note: {names} {verb} no effect: all rows are plain text, and only conversations have turns")
    return notes


def date_notice(given: str | None, inputs: Inputs) -> str | None:
    """What to say of a `data.template_date` that was given and is not written into any row; None: it is, or is today's.

    Sweeps give all their runs the day on which they begin.
    """
    if given in (None, datetime.date.today().isoformat()) or inputs.writes_date:
        return None
    why = "all rows are plain text" if inputs.plain_text else "the chat template writes no date"
    return f"note: data.template_date has no effect: {why}"


def load_held_out(data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, task: Task, seed: int) -> TokenizedDataset:
    """The evaluation rows of a run that has some; arguments and errors as in `load_inputs`."""
    reader = _Reader(data, rule_of(data, tokenizer, task))
    if data.eval is not None:
        held_out = mixed(reader.read("eval", data.eval), seed)
    else:
        held_out = hold_out(reader.read("train", data.train), data.eval_size, seed)[1]
    reader.say_reports()
    return TokenizedDataset(held_out)


def guessed_tasks(data: DataConfig) -> Iterator[Task]:
    """Yield what each of the first training rows is for, by its columns; those of no known form are passed over.

    Raises ValueError or OSError for data that cannot be opened.
    """
    part, columns = parts(data.train)[0], data.columns
    wanted = functools.partial(_used_by_any, columns=columns)
    source = open_source(part.path, part.split, columns=wanted, cache_dir=data.cache_dir)
    first = range(min(_FIRST_ROWS, len(source.rows)))
    for _, row in read_rows(source, source.rows[: len(first)], first):
        if isinstance(row, ValueError):
            continue
        try:
            task = guess_task(row, columns)
        except ValueError:  # reported, with its place, where all rows are read
            continue
        yield task


def _used_by_any(names: list[str], columns: Mapping[str, str]) -> list[str]:
    used = {name for task in get_args(Task) for name in used_columns(names, task, columns)}
    return [name for name in names if name in used]


def check_rows(rows: TokenizedDataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ValueError, naming the first row, if one has a token beyond the model's embedding of `vocab_size` rows."""
    found = rows.first_beyond(vocab_size)
    if found is not None:
        index, largest = found
        check_ids(tokenizer, rows.info(index).place, largest, vocab_size)


def boundary_notice(encoder: ChatEncoder) -> str | None:
    """What to say if the tokenizer joins the end of a generation prompt with the answer; None: it does not.

    Conversations are tokenised as wholes. A server tokenises the prompt alone, so the model would answer after a token
    that it has not seen there.
    """
    prompt, answer = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Yes."}]
    try:
        alone, whole = encoder.encode_prompt(prompt), encoder.encode([(prompt, answer)])[0].ids.tolist()
    except ValueError:  # a template for other conversations
        return None
    if whole[: len(alone)] == alone:
        return None
    end = encoder.tokenizer.decode(alone[-1:])
    return (
        f"warning: alone, the prompt ends in the token {end!r}, but with an answer behind it in others: the tokenizer "
        "joins them, so prompts are learned with other last tokens than servers give. Use a template whose generation "
        "prompt does not end in blanks, or another way of switching reasoning off"
    )


def rule_of(data: DataConfig, tokenizer: PreTrainedTokenizerBase, task: Task) -> Rule:
    """How the rows of a run become tokens."""
    encoder = ChatEncoder(
        tokenizer,
        chat_template=data.chat_template,
        chat_template_kwargs=data.chat_template_kwargs,
        template_date=data.template_date,
        add_empty_system=data.add_empty_system,
        mask_history=data.mask_history,
        split_special_tokens=data.split_special_tokens,
    )
    longest_prompt = None if task == "sft" else data.max_prompt_length
    return Rule(encoder, task, data.max_length, longest_prompt, data.columns, data.too_long)


class _Reader:
    """Reads a run's sources by one rule, and keeps the reports by the key that names the source."""

    def __init__(self, data: DataConfig, rule: Rule) -> None:
        self._data = data
        self.rule = rule
        self._exclude = frozenset() if data.exclude is None else read_ids(Path(data.exclude).expanduser())
        self.reports: dict[str, DropReport] = {}

    def read(self, name: str, sources: Sequence[Mapping[str, Any]]) -> list[Share]:
        """Tokenise the sources of `data.NAME`, rank 0 first, and keep the report. Raises ValueError."""
        try:
            shares, self.reports[name] = distributed.main_first(
                lambda: read_shares(
                    sources,
                    self.rule,
                    on_bad_row=self._data.on_bad_row,
                    exclude=self._exclude,
                    num_workers=self._data.num_workers,
                    cache_dir=self._data.cache_dir,
                )
            )
        except OSError as error:
            raise ValueError(f"data.{name} cannot be read, or data.cache_dir not be written ({error})") from error
        return shares

    def count_held(self, copies: int) -> None:
        self.reports["train"] = dataclasses.replace(self.reports["train"], held=copies)

    def say_reports(self) -> None:
        for name, report in self.reports.items():
            distributed.say(f"{name} {report}")

    def check_exclude(self) -> None:
        """Say how many ids stand nowhere in the data. Raises ValueError if none does."""
        found = {row_id for report in self.reports.values() for row_id in report.excluded}
        missing = sorted(self._exclude - found)
        if not missing:
            return
        file = f"data.exclude={self._data.exclude}"
        if not found:
            raise ValueError(
                f"{file}: no row has one of its {len(missing)} ids; export them again with `notus data --html`, from "
                "the same data, task and data.columns"
            )
        distributed.say(
            f"warning: {file}: no row has {len(missing)} of its {len(self._exclude)} ids ({missing[0]}, ...)"
        )


def read_ids(path: Path) -> frozenset[str]:
    """The row ids of a file, one a line; what follows a # is a comment.

    Raises:
        ValueError: it cannot be read, or a line is no id.
    """
    try:
        lines = check_regular(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.exclude={path} cannot be read ({error})") from error
    found = set()
    for number, line in enumerate(lines, start=1):
        word = line.partition("#")[0].strip().lower()
        if word and not re.fullmatch(r"[0-9a-f]{16}", word):
            raise ValueError(f"{path}, line {number}: {word[:40]!r} is no row id, which has 16 digits 0-9 and a-f")
        found.add(word)
    return frozenset(found - {""})


def data_summary(rows: TokenizedDataset, report: DropReport | None, task: Task = "dpo") -> dict[str, Any]:
    """How many rows there are, what reading them dropped and cut, and histograms of their lengths in tokens."""
    numbered = [f"completion_{number}" for number in range(1, rows.num_branches + 1)]
    named = {1: ["completion"], 2: numbered if task == "lists" else ["chosen", "rejected"]}
    names = named.get(rows.num_branches, numbered)
    lengths, labels = completion_lengths(rows, names), rows.labels
    return {
        "rows": len(rows),
        "report": {} if report is None else {**dataclasses.asdict(report), "kept": report.kept},
        "lengths": {name: length_histogram(values) for name, values in lengths.items()},
        "ratings": None if rows.ratings is None else _rating_histograms(rows.ratings, names),
        "labels": None if labels is None else {"true": int(labels.sum()), "false": int((~labels).sum())},
        "sources": None if rows.sources is None else _count(rows.sources),
    }


def completion_lengths(rows: TokenizedDataset, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Tokens of prompts, and of completions by their K names: int64, one for each row that has such a one."""
    columns = zip(names, rows.branch_lengths.T, strict=True)
    of_completions = {name: values[rows.branch_counts > number] for number, (name, values) in enumerate(columns)}
    return {"prompt": rows.trunk_lengths, **of_completions}


def _count(sources: list[str]) -> dict[str, int]:
    """Rows by source, the largest first; what is beyond `NAMED_SOURCES` is counted together."""
    counted = Counter(sources).most_common()
    rest = sum(count for _, count in counted[NAMED_SOURCES:])
    return dict(counted[:NAMED_SOURCES]) | ({"(others)": rest} if rest else {})


def _rating_histograms(ratings: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Of the known ratings [n, K] of completions by name, over the same buckets; the last one holds its upper edge."""
    edges = np.histogram_bin_edges(ratings[~np.isnan(ratings)], BUCKETS)
    found = {}
    for name, column in zip(names, ratings.T, strict=True):
        counts = np.histogram(column[~np.isnan(column)], edges)[0]
        found[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return found


def length_histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Counts in at most `BUCKETS` buckets of whole, equal width: bucket i holds edges[i] <= length < edges[i + 1]."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    width = -(-(high - low) // BUCKETS)
    edges = np.arange(low, high + width, width)
    counts = np.bincount((lengths - low) // width, minlength=len(edges) - 1)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
