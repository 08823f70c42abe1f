"""`notus sweep CONFIG --dpo.beta=0.05,0.1,0.3 ...`: train one run for each combination of values, then compare them.

A key with several values, separated by commas, is an axis of the grid. A key with one value is an override of all runs.
A value in brackets, braces or quotes is one value: `--lora.target_modules=[q_proj],[q_proj,v_proj]`.

OUTPUT_DIR/beta-0.05/  beta-0.1/  ...  reference/  sweep.json  report.html
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import itertools
import json
import keyword
import os
import re
import shlex
import signal
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from notus.runtime.children import Child, hold, notus_command, process_count
from notus.runtime.process import STOPPED, tell

if TYPE_CHECKING:
    from notus.config import Config, Task

SUMMARY = "sweep.json"
REPORT = "report.html"
_NOT_SWEPT = {
    "training.output_dir": "each run gets a folder of its own: use --output DIR",
    "training.resume": "the sweep resumes its own runs: remove it",
    "reference.cache_dir": "all runs share one cache: give one folder",
}
_NO_MODEL = "--reference.model=null"  # of a run whose loss has no reference
_MAX_VALUE, _MAX_NAME = 40, 180


@dataclasses.dataclass(frozen=True)
class Axis:
    """A key with its values, as they stand on the command line."""

    key: str
    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of the grid.

    Attributes:
        name: its folder's name.
        values: what the grid's keys are in it.
        words: the overrides that make it.
        config: what these give.
    """

    name: str
    values: Mapping[str, Any]
    words: tuple[str, ...]
    config: "Config"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.training.output_dir)


@dataclasses.dataclass(frozen=True)
class Launcher:
    """How a run is started: `nproc_per_node` None: plain Python, else torchrun with as many processes."""

    config: str
    task: "Task"
    nproc_per_node: int | None = None

    def command(self, run: Planned) -> list[str]:
        """Return the complete command line that trains `run`."""
        return notus_command([self.task, self.config, *run.words], self.nproc_per_node)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("config", type=os.path.expanduser, metavar="CONFIG.yaml", help="as for `notus dpo`")
    _add_options(parser)
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--section.key=value[,value ...]")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="DIR",
        help="the folder of the sweep, which holds the runs (default: the config's training.output_dir)",
    )
    parser.add_argument("--task", choices=("dpo", "sft"), help="default: found from the config and its training rows")
    parser.add_argument("--nproc-per-node", type=process_count, metavar="N", help="GPUs of each run, under torchrun")
    parser.add_argument("--sort", metavar="METRIC", help="sort the table by the last value of this metric")
    parser.add_argument("--stop-on-error", action="store_true", help="stop at the first run that fails")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--print", action="store_true", help="print one command per run for a scheduler, start nothing")
    only.add_argument("--table", action="store_true", help="show the table of the runs so far, start nothing")


def run(args: argparse.Namespace) -> int:
    """Run the sweep and return its exit code.

    Returns:
        0; 1 if a run failed; 75 if it was stopped by SIGTERM or by `training.max_hours`, 130 by SIGINT. The same
        command then resumes.

    Raises:
        ValueError: a user's mistake, in one line, before the first run starts.
    """
    # options may stand after CONFIG, among the overrides
    options = argparse.ArgumentParser(prog="notus sweep", allow_abbrev=False)
    _add_options(options)
    args, overrides = options.parse_known_args(args.overrides, args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a sweep starts its runs itself: start it without torchrun, with --nproc-per-node N")
    task = args.task or find_task(args.config, overrides)
    folder, runs = plan(args.config, overrides, task=task, output=args.output)
    launcher = Launcher(args.config, task, args.nproc_per_node)
    if args.print:
        for planned in runs:
            tell(shlex.join(launcher.command(planned)))
        return 0
    outcome = Outcome({}) if args.table else _train_all(folder, runs, launcher, stop_on_error=args.stop_on_error)
    _compare(folder, runs, outcome, sort=args.sort)
    return outcome.report(runs)


# ---- the grid ----


def find_task(config: str, overrides: Sequence[str] = ()) -> "Task":
    """Return which task a config file is for: DPO if it has one of its sections, SFT if its rows are demonstrations.

    DPO can't learn from demonstrations. Other rows leave a doubt: SFT learns the chosen answers of pairs.

    Raises ValueError if the config leaves a doubt, or is not valid.
    """
    from notus.config import DPO_SECTIONS, load_config, read_yaml

    tree = read_yaml(Path(config))
    sections = {str(name) for name in tree} if isinstance(tree, dict) else set()
    sections |= {word.removeprefix("--").split(".")[0] for word in overrides}
    if sections & set(DPO_SECTIONS):
        return "dpo"
    axes, fixed = read_grid(overrides)
    data = load_config([config, *fixed, *(f"--{axis.key}={axis.values[0]}" for axis in axes)], "dpo").data
    from notus.training.run_data import guessed_tasks  # imports torch and more: mistakes above answer at once

    try:
        found = set(guessed_tasks(data))
    except (ValueError, OSError):  # a scheduler's machine may not have the data; where they are read, they are named
        found = set()
    if found == {"sft"}:
        return "sft"
    raise ValueError(f"{config} has no section dpo, so it may be for DPO or SFT: add --task dpo or --task sft")


def read_grid(overrides: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """Return the keys with several values, and the other words. Raises ValueError for what cannot be swept."""
    from notus.config import check_spaces

    check_spaces(overrides)
    axes: list[Axis] = []
    fixed: list[str] = []
    for word in overrides:
        match = re.fullmatch(r"--([\w.]+)=(.*)", word, flags=re.DOTALL)
        values = split_values(match[2]) if match else []
        if match is None or len(values) == 1:
            fixed.append(word)
            continue
        key = match[1]
        if "" in values:
            raise ValueError(f"command line: {word!r} has a comma with no value beside it")
        if key in _NOT_SWEPT:
            raise ValueError(f"command line: {key} cannot have several values in a sweep; {_NOT_SWEPT[key]}")
        _check_lists(key, values)
        axes.append(Axis(key, tuple(values)))
    keys = [axis.key for axis in axes] + [word.removeprefix("--").split("=")[0] for word in fixed]
    if twice := next((axis.key for axis in axes if keys.count(axis.key) > 1), None):
        raise ValueError(f"command line: {twice} is given twice; give all its values at once")
    if not axes:
        raise ValueError("command line: no key has several values; for example --dpo.beta=0.05,0.1,0.3")
    return axes, fixed


def split_values(text: str) -> list[str]:
    """Split at the commas that stand outside brackets, braces and quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            values.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and (depth or not values[-1].strip()):  # elsewhere it is an apostrophe
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        values[-1] += letter
    return [value.strip() for value in values]


def _check_lists(key: str, values: Sequence[str]) -> None:
    """Raise ValueError where `a,b` may be meant as one list: the key holds a list of strings."""
    from notus.config import SECTIONS

    section, _, name = key.partition(".")
    hints = get_type_hints(SECTIONS[section]) if section in SECTIONS else {}
    kinds = [hints.get(name), *get_args(hints.get(name))]
    words = [word for kind in kinds for word in get_args(kind) if get_origin(kind) is Literal]
    if list[str] in kinds and any(not value.startswith("[") and value not in words for value in values):
        listed, each = f"[{','.join(values)}]", ",".join(f"[{value}]" for value in values)
        raise ValueError(f"command line: {key} is a list: write {listed} for one value, or {each} for several")


def plan(config: str, overrides: Sequence[str], *, task: "Task", output: str | None) -> tuple[Path, list[Planned]]:
    """Return the sweep's folder and its runs, all of them checked.

    Raises:
        ValueError: naming the combination that is no valid config, or whose folder holds another run.
    """
    from notus.config import load_config

    axes, fixed = read_grid(overrides)
    cache, model = _given(config, fixed, "cache_dir"), _given(config, fixed, "model")
    grid = [[f"--{axis.key}={value}" for axis, value in zip(axes, values, strict=True)] for values in _product(axes)]
    drafts = []
    for words in grid:
        with _naming(words):
            null = ["--reference.cache_dir=null"] if task == "dpo" else []
            if model and not _has_reference(load_config([config, *fixed, _NO_MODEL, *words, *null], task)):
                words.append(_NO_MODEL)
            drafts.append(load_config([config, *fixed, *words, *null], task))
    if (cache or model) and not any(map(_has_reference, drafts)):
        given = [word for word in grid[0] if word != _NO_MODEL]
        load_config([config, *fixed, *given], task)  # raises: they have no effect on any run
    from notus.training.run_folder import CONFIG_FILE  # imports torch and more: mistakes above answer at once

    folder = Path(output or drafts[0].training.output_dir)
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} holds a run: choose another folder for the sweep with --output DIR")
    _check_replaced(folder)
    if any(draft.training.resume == "never" for draft in drafts):
        raise ValueError("training.resume=never: a sweep resumes its own runs; to start over, choose another --output")
    date = _shared_date(folder)
    runs = []
    for words, draft in zip(grid, drafts, strict=True):
        with _naming(words):
            dated = [] if draft.data.template_date else [f"--data.template_date={date}"]
            runs.append(_planned(config, [*fixed, *words, *dated], axes, draft, folder, cache))
    _check_names(runs, grid)
    return folder, runs


def _check_replaced(folder: Path) -> None:
    """Raise ValueError if a file that the sweep would replace was not written by one."""
    marks = {SUMMARY: b'{"sorted_by":', REPORT: b'content="notus report"'}
    for name, mark in marks.items():
        path = folder / name
        if os.path.lexists(path) and not (path.is_file() and _has(path, mark)):
            raise ValueError(f"{path} was not written by a sweep: choose another folder with --output, or move it away")


def _has(path: Path, mark: bytes) -> bool:
    """Whether a file is empty, or has `mark` near its beginning, whatever the blanks."""
    with path.open("rb") as file:
        begin = file.read(1000)
    return not begin or mark in b"".join(begin.split()) or mark in begin


def _product(axes: Sequence[Axis]) -> Iterator[tuple[str, ...]]:
    return itertools.product(*(axis.values for axis in axes))


@contextlib.contextmanager
def _naming(words: Sequence[str]) -> Iterator[None]:
    """Name the combination in a mistake that is found within."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"sweep, run {' '.join(words)}: {error}") from None


def _given(config: str, fixed: Sequence[str], key: str) -> str | None:
    """Return `reference.KEY` as the file or the command line sets it for all runs."""
    from notus.config import read_yaml

    tree = read_yaml(Path(config))
    section = tree.get("reference") if isinstance(tree, dict) else None
    given = section.get(key) if isinstance(section, dict) else None
    for word in fixed:
        if word.startswith(f"--reference.{key}="):
            given = word.partition("=")[2]
    return None if given in (None, "null") else str(given)


def _shared_date(folder: Path) -> str:
    """Return the date that chat templates of all runs take for today: that of the sweep's first run, else today.

    Otherwise runs of different days could have different prompts, and need a reference of their own.
    """
    from notus.config import read_yaml
    from notus.training.run_folder import CONFIG_FILE

    dates = [read_yaml(path).get("data", {}).get("template_date") for path in folder.glob(f"*/{CONFIG_FILE}")]
    return min((date for date in dates if date), default=datetime.date.today().isoformat())


def _has_reference(config: "Config") -> bool:
    from notus.losses import loss_components

    return config.task == "dpo" and any(loss.reference for loss in loss_components(config.dpo.loss_type))


def _planned(
    config: str, words: Sequence[str], axes: Sequence[Axis], draft: "Config", folder: Path, cache: str | None
) -> Planned:
    """Return a run with its own folder and the cache that all share; a loss without a reference has none."""
    from notus.config import load_config

    values = {axis.key: value_of(draft, axis.key) for axis in axes}
    name = run_name(values)
    more = [f"--training.output_dir={_yaml_string(folder / name)}"]
    if _has_reference(draft) and not cache:
        more.append(f"--reference.cache_dir={_yaml_string(folder / 'reference')}")
    elif cache and not _has_reference(draft):
        more.append("--reference.cache_dir=null")
    all_words = (*words, *more)
    return Planned(name, values, all_words, load_config([config, *all_words], draft.task))


def _yaml_string(path: Path) -> str:
    """Return a path as YAML: as it is where that is a string in YAML, else in quotes."""
    return str(path) if re.fullmatch(r"[\w/.][\w/.+-]*", str(path)) else json.dumps(str(path), ensure_ascii=False)


def _check_names(runs: Sequence[Planned], grid: Sequence[Sequence[str]]) -> None:
    """Raise ValueError where two combinations are one."""
    first: dict[str, Sequence[str]] = {}
    for planned, words in zip(runs, grid, strict=True):
        if planned.name in first:
            raise ValueError(f"sweep: {' '.join(first[planned.name])} and {' '.join(words)} are the same run")
        first[planned.name] = words


def value_of(config: "Config", key: str) -> Any:
    """Return the value of `section.key` or `section.key.entry` in a resolved config."""
    section, name, *entry = key.split(".")
    value = getattr(getattr(config, section), name + "_" * keyword.iskeyword(name))
    return value[entry[0]] if entry else value


def run_name(values: Mapping[str, Any]) -> str:
    """Return the name of the folder of a run with these values by key: `beta-0.1_learning_rate-1e-06`.

    The same values always give the same name, and different values different names.
    """
    shorts = [_short_key(key) for key in values]
    if len(set(shorts)) < len(shorts):
        shorts = list(values)
    name = "_".join(f"{short}-{_short_value(value)}" for short, value in zip(shorts, values.values(), strict=True))
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}-{_digest(name)}"


def _short_key(key: str) -> str:
    """Return the last part of a key, with its section where another section has the same key."""
    from notus.config import SECTIONS

    last = key.rsplit(".", 1)[-1]
    homes = [section for section, cls in SECTIONS.items() if last in cls.__dataclass_fields__]
    return last if [f"{home}.{last}" for home in homes] in ([], [key]) else key


def _short_value(value: Any) -> str:
    """Return a value as part of a file name, with a digest where that leaves something out."""
    text = _in_words(value)
    safe = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-.")[:_MAX_VALUE]
    whole = text.split("+") == value if isinstance(value, list) else not isinstance(value, str | dict) or text == value
    return safe if whole and safe == text else f"{safe}-{_digest(json.dumps(value, sort_keys=True))}".lstrip("-")


def _in_words(value: Any) -> str:
    match value:
        case float():
            return f"{value:g}" if float(f"{value:g}") == value else repr(value)
        case list():
            return "+".join(map(_in_words, value))
        case {"path": path}:
            return _in_words(path)
        case dict():
            return "+".join(f"{name}-{_in_words(each)}" for name, each in value.items())
        case str():
            return value.rstrip("/").rsplit("/", 1)[-1]
        case _:
            return json.dumps(value)  # an integer, true, false or null


def _digest(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


# ---- the runs ----


@dataclasses.dataclass
class Outcome:
    """What became of the runs of this launch.

    Attributes:
        failed: the exit code of each run that failed, by name.
        signal: the signal that stopped the sweep; 0: none.
        left: runs that the same command resumes or starts.
    """

    failed: dict[str, int]
    signal: int = 0
    left: int = 0

    def report(self, runs: Sequence[Planned]) -> int:
        """Print what failed and what is left, and return the sweep's exit code."""
        for name, code in self.failed.items():
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            tell(f"failed: {name} ({how}); its error stands above, below its header", sys.stderr)
        if self.left:
            why = f"stopped by {signal.Signals(self.signal).name}: " if self.signal else ""
            tell(f"{why}{self.left} of {len(runs)} runs are left; the same command continues", sys.stderr)
        if self.signal and self.left:
            return STOPPED if self.signal == signal.SIGTERM else 128 + self.signal
        return 1 if self.failed else STOPPED if self.left else 0


def _train_all(folder: Path, runs: Sequence[Planned], launcher: Launcher, *, stop_on_error: bool) -> Outcome:
    """Train what is not finished, one run after another.

    Raises ValueError, before the first, if a folder holds another run, or a finished one of other data.
    """
    from notus.training.data_files import check_unchanged
    from notus.training.run_folder import holds_finished

    for planned in runs:
        if holds_finished(planned.config):
            finished = Path(planned.config.training.output_dir)
            check_unchanged(planned.config, finished, remedy="choose another folder for the sweep with --output DIR")
    outcome, child = Outcome({}), Child()
    with hold(folder, "sweep", "choose another --output"), child.listening():
        for number, planned in enumerate(runs, start=1):
            header = f"\n== run {number} of {len(runs)}: {planned.name}"
            if holds_finished(planned.config):
                tell(f"{header}: finished already")
                continue
            tell(header)
            code = child.run(launcher.command(planned))
            if child.signal or code == STOPPED:
                outcome.signal = child.signal or signal.SIGTERM
                break
            if code:
                outcome.failed[planned.name] = code
                if stop_on_error:
                    break
        # a run that stopped at training.max_hours is left, too
        outcome.left = sum(each.name not in outcome.failed and not holds_finished(each.config) for each in runs)
    return outcome


# ---- the comparison ----


def _compare(folder: Path, runs: Sequence[Planned], outcome: Outcome, *, sort: str | None) -> None:
    """Print the table, and write it as `sweep.json` and the runs as `report.html`."""
    from notus.evaluation.compare_runs import METRICS, compared_settings, read_rows, sorted_rows, table
    from notus.runtime.files import write_text

    rows = read_rows(folder, {run.name: _settings(run.config) for run in runs}, outcome.failed)
    known = {metric for row in rows for metric in row.metrics}
    if sort is not None and known and sort not in known:
        tell(f"warning: --sort {sort}: no run has this metric; there are {', '.join(sorted(known))}", sys.stderr)
    key = sort if sort in known else next((metric for metric in METRICS if metric in known), None)
    rows = sorted_rows(rows, key)
    settings = compared_settings(rows, dict.fromkeys(".".join(key.split(".")[:2]) for key in runs[0].values))
    tell("\n" + table(rows, settings, key))
    if folder.is_dir():
        shown = [
            dataclasses.asdict(row) | {"settings": {key: values[place] for key, values in settings.items()}}
            for place, row in enumerate(rows)
        ]
        write_text(folder / SUMMARY, json.dumps({"sorted_by": key, "runs": shown}, indent=1) + "\n")
        if not outcome.signal:  # what stopped the sweep doesn't wait for long
            _report([folder / row.name for row in rows if row.state != "not begun" and row.metrics], folder / REPORT)


def _report(runs: Sequence[Path], output: Path) -> None:
    """Write the overlaid report of the runs that have metrics."""
    from notus.__main__ import run_command

    if not runs:
        return
    if importlib.util.find_spec("plotly") is None:
        tell(
            "no report: it is drawn with plotly. Install that (pip install plotly), then run `notus sweep ... --table`"
        )
        return
    run_command("report", *runs, "--output", output)


def _settings(config: "Config") -> dict[str, dict[str, Any]]:
    """Return the config as the run's folder will hold it."""
    from notus.config import DPO_SECTIONS, SECTIONS

    tree = dataclasses.asdict(config)
    sections = [name for name in SECTIONS if config.task == "dpo" or name not in DPO_SECTIONS]
    return {name: {key.rstrip("_"): value for key, value in tree[name].items()} for name in sections}
