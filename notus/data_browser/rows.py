"""A config and the name of a split -> its rows as plain objects, with all that is known of each.

All access to how data are loaded and tokenised stands here; terminal, JSON and page see `Data` and `Row`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from notus.config import Config, DataConfig, load_config
from notus.config import Task as RunTask
from notus.data.chat import check_vocabulary
from notus.data.chat_template import parse_date, resolve_template, uses_date
from notus.data.dataset import FLAGS, Outcome, TokenizedDataset
from notus.data.display import Pieces, branch_names
from notus.data.drop_report import DropReport
from notus.data.formats import Task
from notus.model.export import load_tokenizer
from notus.model.load import find_folder
from notus.model.new_tokens import add_tokens
from notus.model.structure import text_config
from notus.runtime.distributed import main_first, on_main
from notus.training.model_folders import local_names
from notus.training.parallelize import read_model_config
from notus.training.run_data import completion_lengths, guessed_tasks, length_histogram, load_inputs
from notus.training.run_folder import template_date

CUT, DUPLICATE, OVERLAP, REVERSED, PLAIN = "cut", "duplicate", "prompt in both splits", "reversed ratings", "plain text"
# Settings of `data` that are arguments of the template, or change what it is given.
_TEMPLATE_SETTINGS = (
    "chat_template_kwargs",
    "add_empty_system",
    "mask_history",
    "split_special_tokens",
)


class Branch(NamedTuple):
    """A completion: token ids int32 [T], and mask bool [T], true where a token is learned."""

    ids: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as the model sees it, and what is known of it.

    Attributes:
        index: its number in the split, from 0.
        id: 16 hex digits, what `data.exclude` takes.
        place: where it stands in the data.
        source: as the data say; None: they do not.
        names: what its completions are called.
        ratings: of each completion, as the data say; None: they do not, of one or of all.
        label: whether its completion is a good one, where the data say so.
        cut: tokens cut from the prompt, then from each completion.
        flags: names of what is peculiar about it.
        trunk: token ids that its completions share.
        branches: the completions.
        margin: see `margins.reward_margins`; None: no run was given.
    """

    index: int
    id: str
    place: str
    source: str | None
    names: tuple[str, ...]
    ratings: tuple[float | None, ...] | None
    label: bool | None
    cut: tuple[int, ...]
    flags: tuple[str, ...]
    trunk: np.ndarray
    branches: tuple[Branch, ...]
    margin: float | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """A split of a config's data.

    Attributes:
        name: the config, as the user named it.
        split: "train" or "eval".
        task: what the rows are for.
        rows: the rows.
        other: those of the other split, if it has any.
        report: what reading the rows dropped and cut; rows held out of "train" were read with it.
        tokenizer: what made the tokens.
        template: which template rendered the rows, with which settings, in words.
        margins: fp64 [n] reward margins; None: no run was given.
    """

    name: str
    split: str
    task: Task
    rows: TokenizedDataset
    other: TokenizedDataset | None
    report: DropReport
    tokenizer: PreTrainedTokenizerBase
    template: tuple[str, ...]
    margins: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def other_split(self) -> str:
        """The name of the other split."""
        return "eval" if self.split == "train" else "train"

    @functools.cached_property
    def pieces(self) -> Pieces:
        """The text of tokens."""
        return Pieces(self.tokenizer)

    @property
    def order(self) -> Sequence[int]:
        """Rows in the order to show them: as the data have them, or by margin, the most wrongly ordered first."""
        if self.margins is None:
            return range(len(self))
        return [int(index) for index in np.argsort(self.margins, kind="stable")]

    def with_margins(self, margins: np.ndarray) -> "Data":
        """The same data with reward margins, fp64 [n]."""
        return dataclasses.replace(self, margins=margins)

    def row(self, index: int) -> Row:
        """The row of this number."""
        (example,) = self.rows(np.array([index]))
        info = self.rows.info(index)
        return Row(
            index=index,
            id=info.id,
            place=info.place.encode(errors="replace").decode(),  # a file's name need not be Unicode
            source=info.source,
            names=tuple(self._names(len(example.branches))),
            ratings=None if info.ratings is None else tuple(map(_exact, info.ratings)),
            label=info.label,
            cut=info.cut,
            flags=tuple(name for name, column in self._flag_columns.items() if column[index]),
            trunk=example.trunk,
            branches=tuple(Branch(*pair) for pair in zip(example.branches, example.loss_masks, strict=True)),
            margin=None if self.margins is None else float(self.margins[index]),
        )

    @functools.cached_property
    def _flag_columns(self) -> dict[str, np.ndarray]:
        """Which rows have which flag: bool [n] each."""
        outcomes, ratings = self.rows.outcomes, self.rows.ratings
        none = np.zeros(len(self), bool)
        found = {
            CUT: none,
            DUPLICATE: _repeats(self.rows),
            OVERLAP: none if self.other is None else np.isin(self.rows.prompt_digests(), self.other.prompt_digests()),
            REVERSED: none,
        }
        if self.task == "dpo" and ratings is not None:
            found[REVERSED] = ratings[:, 0] < ratings[:, 1]  # NaN, if unknown, is not less
        if outcomes is not None:
            found[CUT] = outcomes & (Outcome.PROMPT_CUT | Outcome.COMPLETION_CUT) > 0
            found[PLAIN] = outcomes & Outcome.TEMPLATED == 0
            found |= {name: outcomes & bit > 0 for bit, name in FLAGS.items()}
        return found

    @property
    def flag_counts(self) -> dict[str, int]:
        """Rows by flag, for those that occur."""
        counts = {name: int(column.sum()) for name, column in self._flag_columns.items()}
        return {name: count for name, count in counts.items() if count}

    @property
    def names(self) -> list[str]:
        """What the completions of a row are called, as many as the longest list has."""
        return self._names(self.rows.num_branches)

    def _names(self, count: int) -> list[str]:
        return branch_names(count, is_list=self.task == "lists")

    @property
    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of each row's prompt and of its completions, by name: int64, one for each row that has such a one."""
        return completion_lengths(self.rows, self.names)

    @property
    def histograms(self) -> dict[str, dict[str, list[int]]]:
        """See `length_histogram`, by name."""
        return {name: length_histogram(values) for name, values in self.lengths.items()}


def _repeats(rows: TokenizedDataset) -> np.ndarray:
    """Whether each row's tokens stand in an earlier row: bool [n]. One that a weight repeats is the same row."""
    digests = np.ascontiguousarray(rows.digests()).view("S16").ravel()
    first, inverse = np.unique(digests, return_index=True, return_inverse=True)[1:]
    return rows.stored_rows[first][inverse] != rows.stored_rows


def _exact(rating: float | None) -> float | None:
    """The shortest decimal that a rating, which was stored in fp32, stands for: 4.2, not 4.199999809265137."""
    return None if rating is None else float(str(np.float32(rating)))


def as_json(row: Row, pieces: Pieces, *, escape: bool = False) -> str:
    """A row as a line of JSON, in ASCII alone with `escape`; see `command`."""
    tree = {
        "index": row.index,
        "id": row.id,
        "place": row.place,
        "source": row.source,
        "ratings": row.ratings,
        "label": row.label,
        "flags": row.flags,
        "margin": row.margin,
        "trunk": row.trunk.tolist(),
        "branches": [
            {"ids": ids.tolist(), "mask": mask.astype(int).tolist(), "text": pieces.text(ids)}
            for ids, mask in row.branches
        ],
        "cut": {"prompt": row.cut[0], "completions": row.cut[1:]},
    }
    return json.dumps(tree, ensure_ascii=escape)


def digest(data: Data) -> str:
    """16 hex digits that stand for the rows of the split."""
    return hashlib.sha256(data.rows.digests().tobytes()).hexdigest()[:16]


def choose_task(words: Sequence[str], given: RunTask | None) -> Config:
    """The config of a command line, for the task that was given, or else for what its first readable row is.

    Raises ValueError as `load_config` does, and for data that cannot be opened.
    """
    if given is not None:
        return load_config(words, given)
    config = load_config(words, "dpo")
    task = next(guessed_tasks(config.data), "dpo")
    return load_config(words, "sft") if task == "sft" else config


def load(config: Config, split: str, *, name: str, run: str | None = None) -> Data:
    """Read and tokenise a config's data as training does, without the model's weights; collective.

    Templates take the date for today that the folder of the config's run has recorded, or that of the folder `run`.

    Raises ValueError for data that training could not read either, and for a split that the config does not have.
    """
    place = (
        config
        if run is None
        else dataclasses.replace(config, training=dataclasses.replace(config.training, output_dir=run))
    )
    today = on_main(lambda: template_date(place))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, template_date=today))
    data = config.data
    if split == "eval" and data.eval is None and not data.eval_size:
        raise ValueError(f"{name}: no evaluation rows: set data.eval or data.eval_size, or leave --split eval out")
    folder = main_first(lambda: _tokenizer_folder(config))
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
    added = add_tokens(tokenizer, config.data.new_tokens)
    if not added and (folder / "config.json").is_file():
        model = read_model_config(folder, trust_remote_code=config.model.trust_remote_code)
        check_vocabulary(tokenizer, text_config(model).vocab_size)
    template = _describe_template(data, tokenizer)  # before loading gives the tokenizer that template
    with _quiet_reports() as said:
        inputs = load_inputs(config.data, tokenizer, task=config.rows, seed=config.training.seed)
    for line in _unreported(said.getvalue(), inputs.reports):
        print(line, file=sys.stderr)
    rows, other = (inputs.train, inputs.eval) if split == "train" else (inputs.eval, inputs.train)
    assert rows is not None
    report = inputs.reports.get(split, inputs.reports["train"])
    return Data(name, split, config.rows, rows, other, report, tokenizer, template)


def _tokenizer_folder(config: Config) -> Path:
    """Where the tokenizer of a run's starting model is; weights are not downloaded."""
    names = local_names(config.model.name_or_path, config.model.adapter)
    for name in filter(None, (names.adapter, names.base)):
        folder = find_folder(name, weights=False)
        if (folder / "tokenizer_config.json").is_file():
            return folder
    return folder


@contextlib.contextmanager
def _quiet_reports() -> Iterator[io.StringIO]:
    """Keep what is printed in the block; if it fails, print it to stderr."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield said
    except BaseException:
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def _unreported(said: str, reports: dict[str, DropReport]) -> list[str]:
    """The lines that loading printed beside its reports, which are shown later."""
    for name, report in reports.items():
        said = said.replace(f"{name} {report}\n", "")
    return said.splitlines()


def _describe_template(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Which template renders the rows, and with what."""
    if data.chat_template is None:
        name = "the tokenizer's own" if tokenizer.chat_template else "zephyr (the tokenizer has none)"
    else:
        name = data.chat_template
    text = resolve_template(tokenizer, data.chat_template)
    default = DataConfig(train=data.train)
    settings = {key: getattr(data, key) for key in _TEMPLATE_SETTINGS if getattr(data, key) != getattr(default, key)}
    if uses_date(text):
        settings["template_date"] = str(parse_date(data.template_date))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return (f"{name}, sha256 {digest}", *(f"data.{key}: {json.dumps(value)}" for key, value in settings.items()))
