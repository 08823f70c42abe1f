"""What a round of `notus iterate` came to, as plain numbers read from its folder, and as round.json.

A round that is still in progress lacks files, and an iteration without evaluation prompts never has some: what they
would say is None. Shares are from 0 to 1, lengths are tokens, KL is in nats.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

import pydantic

from notus.data.sources import read_file
from notus.evaluation.intervals import stderr, wilson
from notus.evaluation.results import read_records
from notus.feedback.diversity import Diversity, diversity
from notus.feedback.records import summary_file
from notus.runtime.files import write_text

T = TypeVar("T")

# the files of a round's folder
PROMPTS, RECORDS, RATED, PAIRS = "prompts.jsonl", "records.jsonl", "rated.jsonl", "pairs.jsonl"
RUN, ANSWERS, COMPARED, EVALUATION, ROUND = "run", "answers.jsonl", "compared.jsonl", "evaluation.json", "round.json"
OWN_PAIRS = "own-pairs.jsonl"  # the round's pairs before those of earlier rounds are added, if any are
CONFIG = "iterate.yaml"  # of the iteration, in its folder
REMEDY = "restore the file, or remove it and run the same `notus iterate` again"
# The columns of a pair with its ratings, in either schema of `notus curate`.
_PAIR_RATINGS = (("chosen_avg_rating", "rejected_avg_rating"), ("chosen-rating", "rejected-rating"))

Scale = Literal["rating", "reward"]  # a judge's mean rating from 1 to 5, or a reward model's own scale


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model wrote."""

    count: int
    tokens: float | None  # mean length; None: not known of every text
    empty: float  # share of texts that are empty or white space
    cut: float  # share that reached the most tokens a completion may have
    diversity: Diversity


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The judge's ratings of this round's answers to the evaluation prompts beside those of the starting model."""

    prompts: int  # of which both answers have a rating
    unrated: int  # of which one or both have none; they do not count
    # wins, losses, ties: prompts on which this round's answer is rated higher, lower or the same
    wins: int
    losses: int
    ties: int
    same: int  # of the ties, those where both answers are the same text, whatever their ratings
    win_rate: float | None  # wins and half of the ties / prompts; None: no prompt counts
    interval: tuple[float, float] | None  # 95%; see `win_interval`
    scale: Scale
    rating: float | None  # mean over `prompts`, of this round's answers
    start_rating: float | None  # the same of the starting model's


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `notus evaluate` says of the round's model."""

    kl: float | None  # to the starting model, per sampled completion; None: not asked for
    kl_stderr: float | None
    kl_per_token: float | None
    kl_samples: int | None
    kl_cut: float | None  # share of the samples that were cut; they understate the KL
    accuracy: float | None  # share of pairs whose chosen answer has the higher reward
    accuracy_interval: tuple[float, float] | None
    pairs: int | None  # these pairs
    held_out: bool  # whether these are other pairs than those that the round learned from

    @property
    def held_out_accuracy(self) -> float | None:
        """The accuracy, if it is that of held-out pairs."""
        return self.accuracy if self.held_out else None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The completions that were sampled for training."""

    prompts: int
    models: Mapping[str, int]  # completions by model; the first is the model that the round starts from
    policy: Answers  # that model's
    dropped_duplicates: int | None  # of all models; these three are None without the summary
    seconds: float | None
    tokens_per_second: float | None  # of the first model


@dataclasses.dataclass(frozen=True)
class Rated:
    """The ratings of these completions."""

    scale: Scale
    unrated: int  # completions without one
    mean: float | None  # of the model that the round starts from
    mean_of_all: float | None


@dataclasses.dataclass(frozen=True)
class Again:
    """How far a judge agrees with itself on prompts that it rated twice, in two orders."""

    prompts: int
    exact: float | None  # share of completions with the same mean rating
    within_one: float | None  # share whose two mean ratings are at most 1 apart
    same_best: float | None  # share of prompts whose best completion is the same
    correlation: float | None


@dataclasses.dataclass(frozen=True)
class Position:
    """Whether a judge prefers a place: each list goes by the place in the order that it saw."""

    mean_rating: tuple[float | None, ...]
    best: tuple[float | None, ...]  # how often the best completion stood there, over how often by chance


@dataclasses.dataclass(frozen=True)
class Judging:
    """What rating a file cost, and how it went."""

    judge: str
    rated: int  # completions with a rating
    unreadable: int  # completions for which the judge's rating could not be read
    failed: int  # prompts without a verdict
    requests: int
    prompt_tokens: int | None  # None: the endpoint does not say; and so on
    completion_tokens: int | None
    cost: float | None  # in US dollars; None: no prices were given
    seconds: float
    again: Again | None = None  # None: nothing was rated twice
    position: Position | None = None


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What `notus curate` made."""

    rows: int  # pairs, or lists of completions
    old: int  # of them those of earlier rounds
    chosen: float | None  # mean score of the chosen answers; of lists, of their best. None: the rows have none
    rejected: float | None  # of the rejected ones; of lists, of their worst
    margin: float | None  # mean difference of the two


@dataclasses.dataclass(frozen=True)
class Training:
    """Where the round's run stands: the last logged value of each metric; None: not logged."""

    step: int
    loss: float | None
    accuracy: float | None
    margin: float | None
    eval_loss: float | None
    eval_accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Round:
    """What a round came to. A part is None where its files are not there."""

    prompts: int | None = None  # of the training prompts
    sampling: Sampling | None = None
    rated: Rated | None = None
    judging: Judging | None = None
    pairs: Pairs | None = None
    training: Training | None = None
    evaluation: Evaluation | None = None
    start: Answers | None = None  # the starting model's answers to the evaluation prompts
    answers: Answers | None = None  # this round's
    comparison: Comparison | None = None
    judging_of_answers: Judging | None = None

    @property
    def win_rate(self) -> float | None:
        """The share of evaluation prompts on which the judge prefers this round's answer; see `Comparison`."""
        return self.comparison.win_rate if self.comparison else None

    @property
    def kl(self) -> float | None:
        """The KL to the starting model, in nats per completion."""
        return self.evaluation.kl if self.evaluation else None

    @property
    def judged(self) -> list[Judging]:
        """What the judge did in this round."""
        return [part for part in (self.judging, self.judging_of_answers) if part is not None]

    @property
    def judge_requests(self) -> int | None:
        """Requests to the judge; None before it rated anything."""
        return _total([part.requests for part in self.judged])

    @property
    def judge_tokens(self) -> int | None:
        """Tokens that the judge read and wrote; None: not known of all."""
        counts = [(part.prompt_tokens, part.completion_tokens) for part in self.judged]
        return _total([count for both in counts for count in both])

    @property
    def judge_cost(self) -> float | None:
        """US dollars; None: not known of all."""
        return _total([part.cost for part in self.judged])


Number = TypeVar("Number", int, float)


def _total(values: Sequence[Number | None]) -> Number | None:
    """Return a sum; None for the sum of nothing, or of anything not known."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def summarise(folder: Path) -> Round:
    """Read a round's folder. Raises ValueError, naming the file, for one that is damaged."""
    answers = _read_answers(folder / ANSWERS)
    records = next((folder / name for name in (RATED, RECORDS) if (folder / name).exists()), None)
    sampling = _read_sampling(records, folder / RECORDS) if records else None
    return Round(
        prompts=sum(1 for _ in rows_of(folder / PROMPTS)) if (folder / PROMPTS).exists() else None,
        sampling=sampling,
        rated=_read_rated(folder / RATED),
        judging=_load(summary_file(folder / RATED), Judging),
        pairs=_read_pairs(folder / PAIRS, folder / OWN_PAIRS),
        training=_read_training(folder / RUN),
        evaluation=_read_evaluation(folder / EVALUATION),
        start=answers[0] if answers else None,
        answers=answers[1] if answers else None,
        comparison=_read_comparison(folder / COMPARED),
        judging_of_answers=_load(summary_file(folder / COMPARED), Judging),
    )


def write_round(folder: Path, summary: Round) -> None:
    """Write a round's summary to its round.json. Raises OSError."""
    text = json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / ROUND, text + "\n")


def read_round(folder: Path) -> Round:
    """Return a round's summary: that of round.json, which a finished round has, else read from its other files.

    Raises ValueError, naming the file, for one that is damaged.
    """
    return _load(folder / ROUND, Round) or summarise(folder)


def round_folders(iteration: Path) -> list[Path]:
    """Return the folders of an iteration's rounds, in their order."""
    found = [path for path in iteration.glob("round-*") if path.name.removeprefix("round-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round-")))


def stop_reason(number: int, summary: Round, *, stop_win_rate: float | None, stop_kl: float | None) -> str | None:
    """Return which rule of `iterate` stops the rounds after round `number`; None if none does."""
    if not is_within(summary, stop_kl):
        return f"the KL of round {number} to the start is {summary.kl:.4g}, above iterate.stop_kl={stop_kl:g}"
    rate = summary.win_rate
    if stop_win_rate is not None and rate is not None and rate >= stop_win_rate:
        return f"round {number} wins {rate:.1%} against the start, and iterate.stop_win_rate is {stop_win_rate:g}"
    return None


def is_within(summary: Round, stop_kl: float | None) -> bool:
    """Return whether a round's model is within the KL budget, as the result of the rounds must be."""
    return stop_kl is None or summary.kl is None or summary.kl <= stop_kl


def win_interval(points: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of a win rate: Wilson's, of as many trials without ties as would be as sure.

    Points are 1 for a win, 0 for a loss and 0.5 for a tie. Ties vary less than wins and losses do, so a share with
    many of them is surer than Wilson's interval of as many prompts says. The number of trials is the share's binomial
    variance over the square of its standard error, as for any share of a known error (Franco et al. 2019, doi
    10.1093/jssam/smy019); where all points are equal, it is theirs.
    """
    share, error = fmean(points), stderr(points)
    trials = max(1, round(share * (1 - share) / error**2)) if error else len(points)
    return wilson(share * trials, trials)


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) over a file of JSON objects. Raises ValueError, naming file and line, for any other."""
    for place, row in read_file(path):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: not a JSON object; {REMEDY}")
        yield place, row


def completions_of(place: str, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a record's completions. Raises ValueError, beginning with its place, where they are not as written."""
    found = record.get("completions")
    if not isinstance(found, list) or not all(map(_is_completion, found)):
        raise ValueError(f"{place}: completions are not as `notus sample` writes them; {REMEDY}")
    return found


def _is_completion(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("model", "response"))


def score_of(place: str, completion: Mapping[str, Any]) -> float | None:
    """Return a completion's reward, else its mean rating; None without one. Raises ValueError for what is no number."""
    value = completion.get("reward", completion.get("fine-grained_score"))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{place}: a score is {value!r:.60}, not a finite number; {REMEDY}")
    return float(value)


def _scale(completions: Sequence[Mapping[str, Any]]) -> Scale:
    return "reward" if any("reward" in completion for completion in completions) else "rating"


@dataclasses.dataclass
class _Texts:
    """Collects completions of one model, prompt by prompt."""

    prompts: list[list[str]] = dataclasses.field(default_factory=list)
    tokens: list[Any] = dataclasses.field(default_factory=list)
    cut: int = 0

    def add(self, completions: Sequence[Mapping[str, Any]]) -> None:
        self.prompts.append([completion["response"] for completion in completions])
        self.tokens += [completion.get("tokens") for completion in completions]
        self.cut += sum(completion.get("finish_reason") == "length" for completion in completions)

    def sum_up(self) -> Answers | None:
        """Return what they come to; None without any."""
        texts = [text for of_prompt in self.prompts for text in of_prompt]
        if not texts:
            return None
        known = [count for count in self.tokens if isinstance(count, int)]
        return Answers(
            count=len(texts),
            tokens=fmean(known) if len(known) == len(texts) else None,
            empty=sum(not text.strip() for text in texts) / len(texts),
            cut=self.cut / len(texts),
            diversity=diversity(self.prompts),
        )


def _read_sampling(records: Path, sampled: Path) -> Sampling | None:
    """Read sampled completions from `records`, rated or not; their summary is that of `sampled`."""
    counts: Counter[str] = Counter()
    texts, prompts = _Texts(), 0
    for place, record in rows_of(records):
        completions = completions_of(place, record)
        counts.update(completion["model"] for completion in completions)
        prompts += 1
        texts.add([completion for completion in completions if completion["model"] == next(iter(counts))])
    policy = texts.sum_up()
    if policy is None:
        return None
    summary = _load(summary_file(sampled), _SampleSummary)
    speed = summary.models.get(next(iter(counts))) if summary else None
    return Sampling(
        prompts=prompts,
        models=dict(counts),
        policy=policy,
        dropped_duplicates=summary.dropped_duplicates if summary else None,
        seconds=summary.seconds if summary else None,
        tokens_per_second=speed.tokens_per_second if speed else None,
    )


def _read_rated(path: Path) -> Rated | None:
    if not path.exists():
        return None
    scores: dict[str, list[float | None]] = {}
    scale: Scale = "rating"
    for place, record in rows_of(path):
        completions = completions_of(place, record)
        scale = "reward" if scale == "reward" else _scale(completions)
        for completion in completions:
            scores.setdefault(completion["model"], []).append(score_of(place, completion))
    every = [score for of_model in scores.values() for score in of_model]
    return Rated(
        scale=scale,
        unrated=every.count(None),
        mean=_mean(next(iter(scores.values()), [])),
        mean_of_all=_mean(every),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def both_answers(place: str, record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the starting model's and the round's completion of a record, which are in this order.

    Raises ValueError, beginning with its place, for a record with another number of completions.
    """
    completions = completions_of(place, record)
    if len(completions) != 2:
        raise ValueError(
            f"{place}: {len(completions)} completions, where the starting model's and the round's are meant; {REMEDY}"
        )
    return completions[0], completions[1]


def _read_answers(path: Path) -> tuple[Answers | None, Answers | None] | None:
    """Read the starting model's answers and the round's."""
    if not path.exists():
        return None
    start, own = _Texts(), _Texts()
    for place, record in rows_of(path):
        one, other = both_answers(place, record)
        start.add([one])
        own.add([other])
    return start.sum_up(), own.sum_up()


def _read_comparison(path: Path) -> Comparison | None:
    if not path.exists():
        return None
    points, scores, same, unrated = [], [], 0, 0
    scale: Scale = "rating"
    for place, record in rows_of(path):
        start, own = both_answers(place, record)
        scale = "reward" if scale == "reward" else _scale((start, own))
        before, after = score_of(place, start), score_of(place, own)
        if before is None or after is None:
            unrated += 1
            continue
        is_same = start["response"] == own["response"]
        same += is_same
        points.append(0.5 if is_same or before == after else float(after > before))
        scores.append((before, after))
    return Comparison(
        prompts=len(points),
        unrated=unrated,
        wins=points.count(1.0),
        losses=points.count(0.0),
        ties=points.count(0.5),
        same=same,
        win_rate=fmean(points) if points else None,
        interval=win_interval(points) if points else None,
        scale=scale,
        rating=_mean([after for _, after in scores]),
        start_rating=_mean([before for before, _ in scores]),
    )


def _read_pairs(path: Path, own: Path) -> Pairs | None:
    if not path.exists():
        return None
    ends, rows = [], 0
    for place, row in rows_of(path):
        rows += 1
        if (found := _ends(place, row)) is not None:
            ends.append(found)
    return Pairs(
        rows=rows,
        old=rows - sum(1 for _ in rows_of(own)) if own.exists() else 0,
        chosen=_mean([best for best, _ in ends]),
        rejected=_mean([worst for _, worst in ends]),
        margin=_mean([best - worst for best, worst in ends]),
    )


def _ends(place: str, row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the scores of a pair's two answers, or of a list's best and worst; None where the row has none."""
    values = next(([row[name] for name in names] for names in _PAIR_RATINGS if all(map(row.__contains__, names))), None)
    if values is None and isinstance(row.get("ratings"), list) and row["ratings"]:
        values = row["ratings"]
    if values is None:
        return None
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise ValueError(f"{place}: a rating is no number; {REMEDY}")
    return (max(values), min(values)) if "ratings" in row else (values[0], values[1])


def _read_training(run: Path) -> Training | None:
    if not run.exists():
        return None
    from notus.training.tracking import METRICS_FILE  # imports torch

    last: dict[str, float | None] = {}
    lines = read_records(run / METRICS_FILE, f"not a line of metrics; {REMEDY}", lambda line: "step" in line)
    for line in lines:
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        last |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    if not lines:
        return None
    return Training(
        step=int(lines[-1]["step"]),
        loss=last.get("loss"),
        accuracy=last.get("rewards/accuracies"),
        margin=last.get("rewards/margins"),
        eval_loss=last.get("eval_loss"),
        eval_accuracy=last.get("eval_rewards/accuracies"),
    )


def _read_evaluation(path: Path) -> Evaluation | None:
    found = _load(path, _EvaluationFile)
    if found is None:
        return None
    kl, overall = found.kl or _Kl(), found.overall
    return Evaluation(
        kl=kl.per_sequence,
        kl_stderr=kl.per_sequence_stderr,
        kl_per_token=kl.per_token,
        kl_samples=kl.samples,
        kl_cut=kl.cut_share,
        accuracy=overall.accuracy,
        accuracy_interval=overall.accuracy_interval,
        pairs=overall.count,
        held_out=(Path(found.pairs).parent.name, Path(found.pairs).name) != (path.parent.name, PAIRS),
    )


# What is read of files that commands write for people; they hold more.


@dataclasses.dataclass(frozen=True)
class _Speed:
    tokens_per_second: float | None = None


@dataclasses.dataclass(frozen=True)
class _SampleSummary:
    models: Mapping[str, _Speed]
    dropped_duplicates: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Kl:
    per_sequence: float | None = None
    per_sequence_stderr: float | None = None
    per_token: float | None = None
    samples: int | None = None
    cut_share: float | None = None


@dataclasses.dataclass(frozen=True)
class _Overall:
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    count: int | None = None


@dataclasses.dataclass(frozen=True)
class _EvaluationFile:
    pairs: str
    overall: _Overall
    kl: _Kl | None = None


def _load(path: Path, kind: type[T]) -> T | None:
    """Read a JSON file as a dataclass; None if there is none. Raises ValueError, naming file and key, if it differs."""
    if not path.exists():
        return None
    try:
        return pydantic.TypeAdapter(kind).validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {f'{key}: ' if key else ''}{first['msg']}; {REMEDY}") from error
