"""`notus report OUTPUT` for the folder of `notus iterate`: what happened over the rounds, as one HTML file.

For any other folder it is the report of runs, `notus.evaluation.report`.
"""

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from notus.evaluation.report import page
from notus.evaluation.report.page import REPORT
from notus.feedback import rounds
from notus.feedback.rounds import Round

if TYPE_CHECKING:
    from notus.evaluation.report.headlines import Headline
    from notus.evaluation.report.tables import Cell, Table

TEMPLATE = Path(__file__).parent / "rounds.html.j2"
SHOWN_PROMPTS = 12
Score = Literal["rating", "reward"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    page.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write the report of runs, or of one iteration. Raises ValueError and OSError as `page.run`."""
    iterations = [name for name in args.runs if is_iteration(Path(name).expanduser())]
    if not iterations:
        return page.run(args)
    if len(args.runs) > 1:
        raise ValueError(f"{iterations[0]}: an iteration of rounds has a report of its own; name it alone")
    page.check_plotly()
    folder = Path(iterations[0]).expanduser()
    output = Path(args.output) if args.output else folder / REPORT
    page.write_report(output, render(read_iteration(folder), output.parent), not_over=str(folder))
    return 0


def is_iteration(folder: Path) -> bool:
    """Return whether a folder is that of an iteration."""
    return (folder / rounds.CONFIG).is_file()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered to an evaluation prompt, and what it is called."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt with the start's answer and that of every round."""

    prompt: str
    answers: Sequence[Answer]


@dataclasses.dataclass(frozen=True)
class Iteration:
    """The folder of `notus iterate`, finished or not.

    Attributes:
        folder: where it is.
        settings: its config by section; a key may be missing.
        config_text: the file itself.
        rounds: by number, from 1.
        finished: the numbers of the rounds that are complete.
    """

    folder: Path
    settings: Mapping[str, Mapping[str, Any]]
    config_text: str
    rounds: Mapping[int, Round]
    finished: Sequence[int]

    def setting(self, key: str) -> Any:
        """Return the value of `section.key`; None where it is not set."""
        section, name = key.split(".")
        return self.settings.get(section, {}).get(name)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.folder.resolve().name

    @property
    def score(self) -> Score:
        """What its judge gives."""
        parts = [part for one in self.rounds.values() for part in (one.comparison, one.rated) if part is not None]
        return parts[-1].scale if parts else "rating"

    @property
    def stop(self) -> str | None:
        """Which rule stopped it after its last round; None if none did."""
        if not self.finished:
            return None
        last = self.finished[-1]
        rules = {name: self.setting(f"iterate.{name}") for name in ("stop_win_rate", "stop_kl")}
        return rounds.stop_reason(last, self.rounds[last], **rules)

    @property
    def result(self) -> str:
        """Which model is the result of the finished rounds: the last one within the KL budget."""
        budget = self.setting("iterate.stop_kl")
        within = [number for number in self.finished if rounds.is_within(self.rounds[number], budget)]
        return f"the model of round {within[-1]}" if within else "the starting model"

    @property
    def state(self) -> Literal["finished", "running", "unfinished"]:
        """Whether all of its rounds are there, or a rule stopped it; if not, whether a process is at it."""
        planned = self.setting("iterate.rounds")
        if self.stop or (planned is not None and len(self.finished) >= planned):
            return "finished"
        from notus.runtime.children import LOCK
        from notus.runtime.files import is_locked

        return "running" if is_locked(self.folder / LOCK) else "unfinished"


def read_iteration(folder: Path) -> Iteration:
    """Read an iteration's folder. Raises ValueError, naming the file, for one that is damaged."""
    from notus.config import read_yaml

    path = folder / rounds.CONFIG
    tree = read_yaml(path)
    if not isinstance(tree, dict) or not all(isinstance(keys, dict | None) for keys in tree.values()):
        raise ValueError(
            f"{path}: not the config of an iteration; restore it from the one that `notus iterate` was given"
        )
    folders = {int(found.name.removeprefix("round-")): found for found in rounds.round_folders(folder)}
    return Iteration(
        folder=folder,
        settings={str(name): keys or {} for name, keys in tree.items()},
        config_text=path.read_text(encoding="utf-8"),
        rounds={number: rounds.read_round(found) for number, found in folders.items()},
        finished=[number for number, found in folders.items() if (found / rounds.ROUND).exists()],
    )


def render(iteration: Iteration, place: Path) -> str:
    """Return the report as HTML. Every string from the folder is escaped, and only our own scripts may run in it.

    Args:
        iteration: what to show.
        place: the folder of the page, for its links to the reports of the rounds' runs.

    Raises ValueError, naming the file, for one that is damaged.
    """
    from notus.feedback.round_charts import round_panels

    panels = round_panels(iteration.rounds, iteration.score) if iteration.rounds else []
    of_judge = ("agreement", "position", "judge-tokens", "judge-cost")
    samples = read_samples(iteration)
    return page.fill_page(
        TEMPLATE,
        panels,
        runs=[],  # the macros ask how many there are
        iteration=iteration,
        summary=_summary(iteration),
        headlines=_headlines(iteration),
        table=_table(iteration),
        links=_links(iteration, place),
        charts=[panel for panel in panels if panel.name not in of_judge],
        judge_charts=[panel for panel in panels if panel.name in of_judge],
        judge_table=_judge_table(iteration),
        all_figures=_all_figures(iteration),
        samples=samples,
        facts=_facts(iteration),
    )


def _links(iteration: Iteration, place: Path) -> dict[int, str]:
    """Return the relative address of each round's own report, if it exists."""
    found = {number: iteration.folder / f"round-{number}" / rounds.RUN / REPORT for number in iteration.rounds}
    return {
        number: quote(os.path.relpath(path.resolve(), place.resolve()))
        for number, path in found.items()
        if path.is_file()
    }


def _summary(iteration: Iteration) -> str:
    done, planned = len(iteration.finished), iteration.setting("iterate.rounds")
    counted = f"{done}" if planned is None or done == planned else f"{done} of {planned}"
    start = iteration.setting("model.name_or_path")
    text = f"{counted} {'round' if counted == '1' else 'rounds'} of sampling, rating and DPO"
    text += f", from {_short(start)}" if start is not None else ""
    text += f". Stopped: {iteration.stop}" if iteration.stop else ""
    return text + (f". The result is {iteration.result}" if iteration.state == "finished" else "")


def _short(path: Any) -> str:
    from notus.evaluation.formatting import short_path

    return short_path(str(path))


# ---- headlines ----


def _headlines(iteration: Iteration) -> "dict[str, Headline]":
    """Return what a reader wants first: how good, how far from the start, and what the judge took in all."""
    compared = [number for number, one in iteration.rounds.items() if one.win_rate is not None]
    found = {
        "Win rate against the start": _win_rate(iteration, compared[-1]) if compared else None,
        f"Mean {iteration.score}": _score(iteration, compared[-1]) if compared else None,
        "KL to the start": _kl(iteration),
        "Length": _length(iteration),
        "Judge, in all": _judge(iteration),
        "Pairs, in all": _pairs(iteration),
    }
    return {title: headline for title, headline in found.items() if headline is not None}


def _win_rate(iteration: Iteration, number: int) -> "Headline":
    from notus.evaluation.formatting import number as written
    from notus.evaluation.report.headlines import Headline

    found = iteration.rounds[number].comparison
    assert found is not None
    assert found.win_rate is not None
    assert found.interval is not None
    notes = [f"round {number}, {found.prompts:,} prompts", _counts(found)]
    if found.unrated:
        notes.append(f"{found.unrated:,} more without both {iteration.score}s")
    interval = " to ".join(written(end, "share") for end in found.interval)
    return Headline(written(found.win_rate, "share"), notes, interval)


def _counts(found: rounds.Comparison) -> str:
    same = f", of these {found.same:,} the same text" if found.same else ""
    return f"{found.wins:,} won, {found.losses:,} lost, {found.ties:,} tied{same}"


def _score(iteration: Iteration, number: int) -> "Headline":
    found = iteration.rounds[number].comparison
    assert found is not None
    assert found.rating is not None
    assert found.start_rating is not None
    return _moved(found.rating, found.start_rating, [f"round {number}"], higher_is_better=True)


def _moved(value: float, start: float, notes: Sequence[str], *, higher_is_better: bool | None = None) -> "Headline":
    """Return a value beside that of the start."""
    from notus.evaluation.formatting import change, number
    from notus.evaluation.report.headlines import Headline

    arrow = "" if value == start else "▲" if value > start else "▼"
    better = None if higher_is_better is None or value == start else (value > start) == higher_is_better
    return Headline(number(value), notes, change=change(value, start), start=number(start), arrow=arrow, better=better)


def _kl(iteration: Iteration) -> "Headline | None":
    from notus.evaluation.formatting import with_error
    from notus.evaluation.report.headlines import Headline

    measured = {number: one.evaluation for number, one in iteration.rounds.items() if one.kl is not None}
    if not measured:
        return None
    number, found = list(measured.items())[-1]
    assert found is not None
    assert found.kl is not None
    notes = [f"nats per completion, round {number}"]
    if found.kl_cut:
        notes.append(f"{found.kl_cut:.0%} of the samples were cut: a lower bound")
    return Headline(with_error(found.kl, found.kl_stderr), notes)


def _length(iteration: Iteration) -> "Headline | None":
    known = {n: (one.start, one.answers) for n, one in iteration.rounds.items() if one.start and one.answers}
    if not known:
        return None
    number, (start, answers) = list(known.items())[-1]
    if start.tokens is None or answers.tokens is None:
        return None
    return _moved(float(answers.tokens), float(start.tokens), [f"tokens per answer, round {number}"])


def _judge(iteration: Iteration) -> "Headline | None":
    from notus.evaluation.formatting import duration, number
    from notus.evaluation.report.headlines import Headline

    parts = [part for one in iteration.rounds.values() for part in one.judged]
    if not parts:
        return None
    requests, rated = sum(part.requests for part in parts), sum(part.rated for part in parts)
    counts = {f"{requests:,} requests": requests, f"{number(rated)} completions rated": rated}
    notes = [words for words, count in counts.items() if count]
    read, wrote = ([getattr(part, f"{side}_tokens") for part in parts] for side in ("prompt", "completion"))
    if None not in read + wrote and sum(read + wrote):
        notes.append(f"{number(sum(read))} tokens read, {number(sum(wrote))} written")
    notes.append(duration(sum(part.seconds for part in parts)))
    costs = [part.cost for part in parts if part.cost is not None]
    if len(costs) == len(parts):
        return Headline(f"${sum(costs):,.2f}", notes)
    return Headline(notes[0].split(" ", 1)[0], notes[1:], unit=notes[0].split(" ", 1)[1]) if len(notes) > 1 else None


def _pairs(iteration: Iteration) -> "Headline | None":
    from notus.evaluation.formatting import number
    from notus.evaluation.report.headlines import Headline

    found = [one.pairs for one in iteration.rounds.values() if one.pairs is not None]
    prompts = sum(one.sampling.prompts for one in iteration.rounds.values() if one.pairs and one.sampling)
    if not found:
        return None
    fresh = sum(part.rows - part.old for part in found)
    return Headline(number(fresh), [f"from {prompts:,} prompts"] if prompts else [])


# ---- tables ----


def _table(iteration: Iteration) -> "Table":
    """Return a row for the start and for each round; a column that no row has is left out."""
    from notus.evaluation.formatting import NONE
    from notus.evaluation.report.tables import Table

    first = next((one for one in iteration.rounds.values() if one.start is not None), Round())
    made = [_start_cells(iteration, first), *(_cells(iteration, one) for one in iteration.rounds.values())]
    columns = list(dict.fromkeys(name for cells in made[::-1] for name in cells))
    names = ["Start", *(f"Round {number}" for number in iteration.rounds)]
    rows: list[list[Cell]] = [
        [name, *(cells.get(column, NONE) for column in columns)] for name, cells in zip(names, made, strict=True)
    ]
    notes = ["Ranges are 95% intervals."] if "Win rate" in columns else []
    if of_answers := [name for name in ("Tokens", "Distinct-2") if name in columns]:
        notes.append(f"{' and '.join(of_answers)}: of the answers to the evaluation prompts.")
    return Table("Rounds", ["", *columns], rows if first.start else rows[1:], " ".join(notes))


def _start_cells(iteration: Iteration, first: Round) -> "dict[str, Cell]":
    from notus.evaluation.formatting import number

    found: dict[str, Cell] = {}
    if first.comparison and first.comparison.start_rating is not None:
        found[iteration.score.capitalize()] = number(first.comparison.start_rating)
    return found | _answer_cells(first.start)


def _answer_cells(answers: rounds.Answers | None) -> "dict[str, Cell]":
    from notus.evaluation.formatting import number

    found: dict[str, Cell] = {}
    if answers is not None and answers.tokens is not None:
        cut = f"{number(answers.cut, 'share')} cut" if answers.cut else ""
        found["Tokens"] = (number(float(answers.tokens)), cut)
    if answers is not None and answers.diversity.distinct[1] is not None:
        found["Distinct-2"] = number(answers.diversity.distinct[1], "share")
    return found


def _cells(iteration: Iteration, one: Round) -> "dict[str, Cell]":
    """Return a round's cells by column."""
    from notus.evaluation.formatting import number, with_error

    found: dict[str, Cell] = {}
    comparison, evaluation, sampling, pairs = one.comparison, one.evaluation, one.sampling, one.pairs
    if comparison and comparison.win_rate is not None and comparison.interval is not None:
        ends = " to ".join(number(end, "share") for end in comparison.interval)
        found["Win rate"] = (number(comparison.win_rate, "share"), ends)
    if comparison and comparison.rating is not None and comparison.start_rating is not None:
        beside = f"start {number(comparison.start_rating)}"
        found[iteration.score.capitalize()] = (number(comparison.rating), beside)
    if evaluation and evaluation.kl is not None:
        found["KL"] = with_error(evaluation.kl, evaluation.kl_stderr)
    found |= _answer_cells(one.answers)
    if sampling and sampling.policy.diversity.self_similarity is not None:
        found["Self-similarity"] = number(sampling.policy.diversity.self_similarity, "share")
    if pairs:
        prompts = f"of {sampling.prompts:,} prompts" if sampling else ""
        found["Pairs"] = (f"{pairs.rows:,}", f"{pairs.old:,} of earlier rounds" if pairs.old else prompts)
        if pairs.margin is not None:
            found["Margin"] = number(pairs.margin)
    if one.judge_cost is not None:
        found["Judge"] = f"${one.judge_cost:,.2f}"
    elif one.judge_requests:
        found["Judge"] = (f"{one.judge_requests:,}", "requests")
    return found


def _judge_table(iteration: Iteration) -> "Table | None":
    """Return what every rating took, a row for each file; None if nothing was rated."""
    from notus.evaluation.formatting import NONE, duration, number
    from notus.evaluation.report.tables import Table

    rows: list[list[Cell]] = []
    for at, one in iteration.rounds.items():
        for what, part in (("to learn from", one.judging), ("answers", one.judging_of_answers)):
            if part is None:
                continue
            counts = [part.rated, part.unreadable, part.failed, part.requests]
            tokens = [NONE if n is None else number(n) for n in (part.prompt_tokens, part.completion_tokens)]
            cost = NONE if part.cost is None else f"${part.cost:,.2f}"
            words = [*map(number, counts), *tokens, cost, duration(part.seconds)]
            rows.append([(f"Round {at}, {what}", part.judge), *words])
    columns = [
        "", "Completions rated", "Unreadable", "Prompts without verdict", "Requests", "Tokens read", "Tokens written",
        "Cost", "Time",
    ]  # fmt: skip
    return Table("What the judge did", columns, rows) if rows else None


def _all_figures(iteration: Iteration) -> "Table | None":
    """Return every figure of the charts, by round."""
    from notus.evaluation.formatting import NONE, number
    from notus.evaluation.report.tables import Table
    from notus.feedback.round_charts import CHARTS, figure_of

    rows: list[list[Cell]] = []
    for chart in CHARTS:
        for figure, name in chart.lines.items():
            values = [figure_of(one, figure) for one in iteration.rounds.values()]
            if any(value is not None for value in values):
                title = chart.title.format(score=iteration.score)
                rows.append([f"{title}: {name}", *(NONE if v is None else number(v, chart.unit) for v in values)])
    columns = ["Figure", *(f"Round {number_}" for number_ in iteration.rounds)]
    return Table("All figures", columns, rows) if rows else None


def _facts(iteration: Iteration) -> dict[str, str]:
    """Return what the iteration is and was made with, by name."""
    from notus.evaluation.formatting import setting

    judges = ("rate.judge_model", "rate.local_judge", "rate.reward_model", "rate.judge_function")
    judge = next((iteration.setting(key) for key in judges if iteration.setting(key) is not None), None)
    named = {
        "Starting model": iteration.setting("model.name_or_path"),
        "Judge": judge,
        "Prompts": iteration.setting("iterate.prompts"),
        "Evaluation prompts": iteration.setting("iterate.eval_prompts"),
        "Rounds": iteration.setting("iterate.rounds"),
        "Completions per prompt and model": iteration.setting("sample.n"),
        "Models beside the policy": iteration.setting("sample.models") or None,
        "Reference of DPO": iteration.setting("iterate.reference"),
        "Share of old pairs": iteration.setting("iterate.old_share") or None,
        "Stop at a win rate of": iteration.setting("iterate.stop_win_rate"),
        "Stop above a KL of": iteration.setting("iterate.stop_kl"),
    }
    return {name: setting(value) for name, value in named.items() if value is not None}


# ---- samples ----


def read_samples(iteration: Iteration, count: int = SHOWN_PROMPTS) -> list[Sample]:
    """Return `count` evaluation prompts, evenly spread over the file, each with the answers of the start and rounds.

    Raises ValueError, naming file and line, for records that are damaged.
    """
    files = {number: _answers_file(iteration.folder / f"round-{number}") for number in iteration.rounds}
    known = {number: path for number, path in files.items() if path is not None}
    if not known:
        return []
    prompts = [_prompt(place, record) for place, record in rounds.rows_of(known[max(known)])]
    shown = min(count, len(prompts))
    # each prompt with its answers by round, that of the start as round 0
    found: dict[str, dict[int, Answer]] = {prompts[len(prompts) * at // shown]: {} for at in range(shown)}
    for number, path in known.items():
        for place, record in rounds.rows_of(path):
            of_prompt = found.get(_prompt(place, record))
            if of_prompt is not None and number not in of_prompt:  # the file may have a prompt twice
                start, own = rounds.both_answers(place, record)
                of_prompt.setdefault(0, Answer("Start", start["response"]))
                of_prompt[number] = Answer(_rated(place, start, own, number), own["response"])
    return [Sample(prompt, list(of_prompt.values())) for prompt, of_prompt in found.items()]


def _prompt(place: str, record: Mapping[str, Any]) -> str:
    """Return a record's prompt. Raises ValueError, beginning with its place, for a record without one."""
    if not isinstance(record.get("instruction"), str):
        raise ValueError(f"{place}: instruction is missing or no string; {rounds.REMEDY}")
    return str(record["instruction"])


def _answers_file(folder: Path) -> Path | None:
    """Return the file with a round's answers, rated if they are."""
    return next((folder / name for name in (rounds.COMPARED, rounds.ANSWERS) if (folder / name).exists()), None)


def _rated(place: str, start: Mapping[str, Any], own: Mapping[str, Any], at: int) -> str:
    """Return what a round's answer is called: "Round 2: 4.25, the start 3.00"."""
    from notus.evaluation.formatting import number

    before, after = rounds.score_of(place, start), rounds.score_of(place, own)
    words = f"Round {at}" if after is None else f"Round {at}: {number(after)}"
    return words if before is None else f"{words}, the start {number(before)}"
