"""`python -m notus rate RECORDS OUT`: a judge rates the completions of records, in UltraFeedback's form.

The judge sees the different completions of a prompt together, in an order drawn for this prompt and recorded. Verdicts
are kept as they come, so the same command resumes where it was stopped. A share of the prompts is rated a second time
in another order, which measures how far the judge agrees with itself and what the order does.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from notus.curation.ultrafeedback import parse_record
from notus.data.sources import SUFFIXES, is_hub_id, read_file, read_hub
from notus.evaluation.arguments import count, positive
from notus.evaluation.budget import Usage
from notus.evaluation.results import append_records
from notus.evaluation.results import read_records as read_kept
from notus.feedback.agreement import Means, agreement, as_json, positions
from notus.feedback.judge import Annotation, Judge, JudgeError, NotAsked, Question, Verdict
from notus.feedback.records import (
    ASPECTS,
    NOT_RATED,
    Record,
    check_out,
    finish,
    held,
    is_finished,
    kept_folder,
    summary_file,
)
from notus.runtime.process import STOPPED, tell

T = TypeVar("T")

ENDPOINT, LOCAL, REWARD, FUNCTION = "endpoint", "local", "reward", "function"
KINDS = {"judge_model": ENDPOINT, "local_judge": LOCAL, "reward_model": REWARD, "judge_function": FUNCTION}
AGAIN_SHARE = 0.1
_FIRST, _AGAIN = "first", "again"


@dataclasses.dataclass(frozen=True)
class _Option:
    """An option that only some judges have."""

    kinds: tuple[str, ...]
    default: Any


_OPTIONS = {
    "judge_url": _Option((ENDPOINT,), None),
    "api_key_env": _Option((ENDPOINT,), "OPENAI_API_KEY"),
    "judge_timeout": _Option((ENDPOINT,), 120.0),
    "parallel": _Option((ENDPOINT,), 4),
    "max_requests": _Option((ENDPOINT,), None),
    "max_cost": _Option((ENDPOINT,), None),
    "price_in": _Option((ENDPOINT,), None),
    "price_out": _Option((ENDPOINT,), None),
    "aspects": _Option((ENDPOINT, LOCAL), ASPECTS),
    "instructions": _Option((ENDPOINT, LOCAL), None),
    "max_new_tokens": _Option((ENDPOINT, LOCAL), 2048),
    "again_share": _Option((ENDPOINT, LOCAL, FUNCTION), AGAIN_SHARE),
    "batch_size": _Option((LOCAL, REWARD), 8),
    "precision": _Option((LOCAL, REWARD), None),
    "chat_template": _Option((LOCAL, REWARD), None),
    "trust_remote_code": _Option((LOCAL, REWARD), False),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "records",
        type=os.path.expanduser,
        metavar="RECORDS",
        help="records of `notus sample`, or of UltraFeedback: .jsonl, .json or .parquet, a folder, or a hub id",
    )
    parser.add_argument(
        "out", type=os.path.expanduser, metavar="OUT", help="the records with ratings: a .jsonl file, for `notus curate`"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds something else, and start over")
    parser.add_argument("--seed", type=int, default=42, help="of the orders, and of what is rated again (default: 42)")
    parser.add_argument(
        "--again-share",
        type=_share_or_none,
        metavar="SHARE",
        help=f"of the prompts to rate a second time, in another order (default: {AGAIN_SHARE}; no reward model)",
    )
    judge = parser.add_argument_group("the judge, one of the four")
    judge.add_argument("--judge-model", metavar="NAME", help="a model behind the endpoint --judge, as gpt-4o-mini")
    judge.add_argument(
        "--local-judge", type=os.path.expanduser, metavar="MODEL", help="a chat model's folder or run, or a hub id"
    )
    judge.add_argument(
        "--reward-model",
        type=os.path.expanduser,
        metavar="MODEL",
        help="a sequence classifier; its scores become `reward`, for `notus curate --by reward`",
    )
    judge.add_argument(
        "--judge-function",
        type=os.path.expanduser,
        metavar="FILE.py:NAME",
        help="a function (prompt, completions) -> a rating from 1 to 5 for each, or a dict of ratings by aspect for "
        "each; or package.module:NAME",
    )
    _add_asking_arguments(parser)
    _add_endpoint_arguments(parser)
    _add_model_arguments(parser)


def _add_asking_arguments(parser: argparse.ArgumentParser) -> None:
    asking = parser.add_argument_group("what a judge model is asked")
    asking.add_argument(
        "--aspects", nargs="+", metavar="ASPECT", help=f"what is rated (default: {' '.join(ASPECTS)})"
    )
    asking.add_argument(
        "--instructions",
        type=os.path.expanduser,
        metavar="FILE",
        help="in place of our own: with {prompt}, {completions}, {answer_format} and a section for each aspect",
    )
    asking.add_argument(
        "--max-new-tokens", type=count, metavar="N", help="most tokens of an answer of the judge (default: 2048)"
    )


def _add_endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    endpoint = parser.add_argument_group("an endpoint")
    endpoint.add_argument(
        "--judge",
        "--judge-url",
        dest="judge_url",
        metavar="URL",
        help="OpenAI-compatible, without /chat/completions, as http://localhost:8000/v1",
    )
    endpoint.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help="the environment variable that holds the endpoint's key (default: OPENAI_API_KEY)",
    )
    endpoint.add_argument(
        "--timeout",
        "--judge-timeout",
        dest="judge_timeout",
        type=positive,
        metavar="SECONDS",
        help="of one request (default: 120)",
    )
    endpoint.add_argument("--parallel", type=count, help="requests at a time (default: 4)")
    endpoint.add_argument(
        "--max-requests", type=count, metavar="N", help="stop at this many, those of earlier starts included"
    )
    endpoint.add_argument(
        "--max-cost", type=positive, metavar="USD", help="stop before this is spent; needs --price-in and --price-out"
    )
    endpoint.add_argument("--price-in", type=_price, metavar="USD", help="of a million tokens that the judge reads")
    endpoint.add_argument("--price-out", type=_price, metavar="USD", help="of a million tokens that it writes")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("a local judge or a reward model")
    model.add_argument("--batch-size", type=count, metavar="N", help="sequences at a time (default: 8)")
    model.add_argument("--precision", choices=("bf16", "fp32"), help="default: the run's, or bf16")
    model.add_argument(
        "--chat-template",
        type=os.path.expanduser,
        metavar="TEMPLATE",
        help="'zephyr' or a .jinja file (default: the run's, or the tokenizer's own)",
    )
    model.add_argument(
        "--trust-remote-code", action="store_const", const=True, help="run Python code that comes with the model"
    )


def _share_or_none(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def _price(text: str) -> float:
    return 0.0 if float(text) == 0 else positive(text)


def run(args: argparse.Namespace) -> int:
    """Rate as `args` say; under torchrun the ranks share a local judge's or a reward model's work.

    Returns 0, 1 if prompts were left without a verdict, or 75 if a signal stopped it. Raises ValueError or OSError with
    a message for the user.
    """
    kind = settle(args)
    check_out(Path(args.out), args.records)
    if kind in (LOCAL, REWARD):
        from notus.runtime import distributed

        with distributed.process_group():
            return _Command(args, kind, distributed.rank(), distributed.world_size()).run()
    if os.environ.get("RANK", "0") != "0":  # the others have no part in it
        return 0
    return _Command(args, kind, rank=0, world_size=1).run()


def settle(args: argparse.Namespace) -> str:
    """Fill in the defaults that depend on the judge, and return its kind.

    Raises ValueError unless there is one judge, and for options that have no effect on it.
    """
    given = [name for name in KINDS if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(
            "name one judge: --judge URL --judge-model NAME, --local-judge MODEL, --reward-model MODEL or "
            "--judge-function FILE.py:NAME"
        )
    kind = KINDS[given[0]]
    for name, option in _OPTIONS.items():
        if kind in option.kinds:
            if getattr(args, name) is None:
                setattr(args, name, option.default)
        elif getattr(args, name) is not None:
            shown = {"judge_url": "judge", "judge_timeout": "timeout"}.get(name, name).replace("_", "-")
            raise ValueError(f"--{shown} has no effect with --{given[0].replace('_', '-')}: leave it out")
    if kind == ENDPOINT:
        _check_endpoint(args)
    return kind


def _check_endpoint(args: argparse.Namespace) -> None:
    if args.judge_url is None:
        raise ValueError("--judge-model needs its endpoint: set --judge URL, as http://localhost:8000/v1")
    if (args.price_in is None) != (args.price_out is None):
        raise ValueError("--price-in and --price-out belong together; give both, as USD per million tokens")
    if args.max_cost is not None and not (args.price_in or args.price_out):
        raise ValueError("--max-cost needs --price-in and --price-out, in USD per million tokens")


def make_judge(args: argparse.Namespace, kind: str) -> Judge:
    """Return the judge that `args` name. Raises ValueError if it cannot be made."""
    if kind == ENDPOINT:
        from notus.feedback import endpoint_judge

        return endpoint_judge.make_judge(args)
    if kind == FUNCTION:
        from notus.feedback import function_judge

        return function_judge.make_judge(args)
    if kind == LOCAL:
        from notus.feedback import local_judge

        return local_judge.make_judge(args)
    from notus.feedback import reward_judge

    return reward_judge.make_judge(args)


# ---- what is asked ----


@dataclasses.dataclass(frozen=True)
class Item:
    """A record and what the judge is asked about it."""

    record: Record
    first: Question | None  # None: the record has no completions
    again: Question | None  # the same completions in another order; None: they are not rated again


def make_item(place: str, record: Record, *, identity: str, seed: int, again_share: float) -> Item:
    """Return a record with its questions. They depend on the record, the judge and the seed, and on no other record."""
    texts = list(dict.fromkeys(completion["response"] for completion in record["completions"]))
    if not texts:
        return Item(record, None, None)
    prompt = prompt_text(record)
    seen = [prompt, record.get("messages"), record.get("tools"), record.get("chat_template_kwargs")]
    digest = _digest([seen, texts])
    order = _shuffled(len(texts), seed, _FIRST, digest)
    orders = [order]
    if len(texts) > 1 and _fraction([seed, "is rated again", digest]) < again_share:
        other = _shuffled(len(texts), seed, _AGAIN, digest)
        orders.append(other if other != order else other[1:] + other[:1])
    places = [next(place for place, each in enumerate(record["completions"]) if each["response"] == t) for t in texts]
    questions = [
        Question(
            key=_digest([identity, seen, [texts[number] for number in each]]),
            place=place,
            prompt=prompt,
            completions=[texts[number] for number in each],
            order=[places[number] for number in each],
            messages=record.get("messages") or [{"role": "user", "content": record["instruction"]}],
            tools=record.get("tools"),
            template_kwargs=record.get("chat_template_kwargs") or {},
        )
        for each in orders
    ]
    return Item(record, questions[0], questions[1] if len(questions) > 1 else None)


def prompt_text(record: Mapping[str, Any]) -> str:
    """Return the prompt as a judge reads it: a single user turn as it is, several turns with their roles."""
    turns = record.get("messages")
    if not turns:
        return str(record["instruction"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _shuffled(length: int, seed: int, what: str, digest: str) -> list[int]:
    return sorted(range(length), key=lambda number: _digest([seed, what, digest, number]))


def _fraction(value: Any) -> float:
    """Return a number in [0, 1) by a hash."""
    return int(_digest(value)[:13], 16) / 16**13


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_input(source: str) -> list[tuple[str, Record]]:
    """Read records with their places. Raises ValueError, naming file and line, for what is none."""
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
    """Yield the rows of a file, of the files of a folder, or of a hub dataset's split "train", with all columns."""
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
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns):
        raise ValueError("messages must be a list of turns, each with a role and a content; correct it, or remove it")


# ---- what is kept ----


@dataclasses.dataclass
class Kept:
    """What the kept files hold: verdicts by question, the last failure of each other question, and all that it cost."""

    verdicts: dict[str, Verdict] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    usage: Usage = dataclasses.field(default_factory=Usage)


def kept_line(question: Question, outcome: Verdict | JudgeError) -> dict[str, Any]:
    """Return what is kept of an outcome."""
    usage = dataclasses.asdict(outcome.usage)
    if isinstance(outcome, JudgeError):
        return {"key": question.key, "failure": str(outcome), "usage": usage}
    annotations = [
        {aspect: [each.rating, each.rationale, each.unreadable] for aspect, each in of_one.items()}
        for of_one in outcome.annotations
    ]
    rewards = None if outcome.rewards is None else list(outcome.rewards)
    return {"key": question.key, "annotations": annotations, "rewards": rewards, "usage": usage}


def read_verdicts(folder: Path) -> Kept:
    """Read what all ranks kept. Raises ValueError, naming file and line, for what is no kept verdict."""
    kept = Kept()
    for path in sorted(folder.glob("verdicts-*.jsonl")):
        for line in read_kept(path, "not a kept verdict; remove the line, or the file", _is_line):
            kept.usage += Usage(**line["usage"])
            if "failure" in line:
                kept.failures[line["key"]] = line["failure"]
                continue
            annotations = [
                {aspect: Annotation(*each) for aspect, each in of_one.items()} for of_one in line["annotations"]
            ]
            kept.verdicts[line["key"]] = Verdict(annotations, line["rewards"], Usage(**line["usage"]))
    return kept


def _is_line(line: dict[str, Any]) -> bool:
    usage = line.get("usage")
    if not isinstance(line.get("key"), str) or not isinstance(usage, dict):
        return False
    if set(usage) != {each.name for each in dataclasses.fields(Usage)}:
        return False
    if "failure" in line:
        return isinstance(line["failure"], str)
    annotations, rewards = line.get("annotations"), line.get("rewards")
    if not isinstance(annotations, list) or not (rewards is None or isinstance(rewards, list)):
        return False
    each = [value for of_one in annotations if isinstance(of_one, dict) for value in of_one.values()]
    return all(isinstance(of_one, dict) for of_one in annotations) and all(
        isinstance(value, list) and len(value) == 3 for value in each
    )


# ---- the command ----


class _Command:
    """One rank's part. Ranks other than the first read, judge their share of the questions, and wait."""

    def __init__(self, args: argparse.Namespace, kind: str, rank: int, world_size: int) -> None:
        self.args, self.kind, self.rank, self.world_size = args, kind, rank, world_size
        self.out = Path(args.out)
        self.folder = kept_folder(self.out)
        self.started = time.monotonic()

    def run(self) -> int:
        placed = self._on_main(lambda: read_input(self.args.records))
        judge = make_judge(self.args, self.kind)
        with contextlib.ExitStack() as stack:
            if self.rank == 0:
                stack.enter_context(held(self.out))
            items = self._items(placed, judge)
            settings = self._settings(placed, judge)
            if self._on_main(lambda: is_finished(self.out, settings, overwrite=self.args.overwrite)):
                self._say(f"{self.out} is finished already, by the same command; --overwrite rates anew")
                return 0
            return self._rate(judge, items, settings)

    def _on_main(self, work: Callable[[], T]) -> T:
        """Do `work` on the first rank; every rank gets its result, or its error."""
        if self.kind not in (LOCAL, REWARD):
            return work()
        from notus.runtime import distributed

        return distributed.on_main(work)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            tell(text)

    def _items(self, placed: Sequence[tuple[str, Record]], judge: Judge) -> list[Item]:
        share = 0.0 if self.kind == REWARD else self.args.again_share
        return [
            make_item(place, record, identity=judge.identity, seed=self.args.seed, again_share=share)
            for place, record in placed
        ]

    def _settings(self, placed: Sequence[tuple[str, Record]], judge: Judge) -> dict[str, Any]:
        """Return all that decides the ratings: OUT of other settings is somebody else's."""
        settings = {
            "records": Path(self.args.records).name,
            "records_digest": _digest([record for _, record in placed]),
            "judge": judge.name,
            "judge_digest": _digest(judge.identity),
            "seed": self.args.seed,
        }
        if self.kind in (ENDPOINT, LOCAL):
            settings["aspects"] = list(self.args.aspects)
        if self.kind != REWARD:
            settings["again_share"] = self.args.again_share
        return settings

    def _rate(self, judge: Judge, items: Sequence[Item], settings: Mapping[str, Any]) -> int:
        kept = self._on_main(lambda: read_verdicts(self.folder))
        budget = getattr(judge, "budget", None)
        if budget is not None:
            budget.spent = kept.usage
        # equal records ask the same question, once
        asked = {each.key: each for item in items for each in (item.first, item.again) if each}
        left = [question for key, question in asked.items() if key not in kept.verdicts]
        if self.rank == 0:
            self._announce(items, judge, len(asked), len(left))
        try:
            not_asked = self._ask(judge, left)
        except KeyboardInterrupt:
            self._say(f"stopped: the verdicts so far are kept in {self.folder}; the same command resumes there")
            return STOPPED
        return self._on_main(lambda: self._finish(judge, items, settings, not_asked))

    def _announce(self, items: Sequence[Item], judge: Judge, asked: int, left: int) -> None:
        text = f"{len(items)} prompts, rated by {judge.name}: {asked} questions"
        tell(text if left == asked else f"{text}, {asked - left} answered before")
        before = sum(
            any(completion.get("annotations") for completion in item.record["completions"]) for item in items
        )
        if before and self.kind != REWARD:
            tell(f"note: {before} records hold ratings already, which are replaced")

    def _ask(self, judge: Judge, left: Sequence[Question]) -> dict[str, str]:
        """Put this rank's questions, keep each verdict as it comes, and return why questions were not asked, by key."""
        mine = left[self.rank :: self.world_size] if judge.shared else left if self.rank == 0 else []
        path = self.folder / f"verdicts-{self.rank}.jsonl"
        not_asked: dict[str, str] = {}
        with _stoppable(), tqdm(total=len(mine), desc="rating", disable=True if self.rank else None) as bar:

            def done(question: Question, outcome: Verdict | JudgeError) -> None:
                bar.update()
                if isinstance(outcome, NotAsked):
                    not_asked[question.key] = str(outcome)
                else:
                    append_records(path, [kept_line(question, outcome)])

            if mine:
                judge.rate(mine, done)
        return not_asked

    def _finish(
        self, judge: Judge, items: Sequence[Item], settings: Mapping[str, Any], not_asked: Mapping[str, str]
    ) -> int:
        kept = read_verdicts(self.folder)
        failures = {**kept.failures, **not_asked}
        seconds = time.monotonic() - self.started
        summary = summarise(items, kept, settings, judge.name, seconds, prices=self.args.price_in is not None)
        rated = [rated_record(item, kept.verdicts, judge.name, reward=self.kind == REWARD) for item in items]
        finish(self.out, rated, summary, failed=summary["failed"])
        tell(table(summary))
        missing = [item.first.key for item in items if item.first and item.first.key not in kept.verdicts]
        if missing:
            left = len({key for key in missing if key in not_asked})
            first = next((failures[key] for key in missing if key in failures), "no answer came")
            tell(
                f"{len(missing)} prompts are left without ratings ({left} were not asked), the first: {first}; the "
                f"same command asks for them again"
            )
        tell(f"wrote {self.out} and {summary_file(self.out).name}")
        return 1 if missing else 0


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Have SIGTERM raise KeyboardInterrupt, as SIGINT does, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- what comes out ----


def mean_of(annotations: Mapping[str, Annotation]) -> float | None:
    """Return the mean rating of a completion; None if it has no rating."""
    ratings = [each.rating for each in annotations.values() if each.rating is not None]
    return sum(ratings) / len(ratings) if ratings else None


def rated_record(item: Item, verdicts: Mapping[str, Verdict], judge: str, *, reward: bool) -> Record:
    """Return a record with the first verdict's ratings or rewards; those of another judge are taken out.

    Completions with the same text have the same ratings. A record without a verdict has none.
    """
    replaced = ("reward",) if reward else ("annotations", "fine-grained_score")
    record = {key: value for key, value in item.record.items() if key != "rated"}
    completions = [
        {key: value for key, value in completion.items() if key not in replaced}
        for completion in record["completions"]
    ]
    record["completions"] = completions
    question = item.first
    verdict = verdicts.get(question.key) if question else None
    if question is None or verdict is None:
        return record
    by_text = {text: number for number, text in enumerate(question.completions)}
    for completion in completions:
        number = by_text[completion["response"]]
        if verdict.rewards is not None:
            completion["reward"] = verdict.rewards[number]
        else:
            completion |= _annotations(verdict.annotations[number])
    record["rated"] = {"judge": judge, "order": list(question.order)}
    return record


def _annotations(annotations: Mapping[str, Annotation]) -> dict[str, Any]:
    """Return a completion's ratings in UltraFeedback's form; what was unreadable is left out."""
    readable = {aspect: each for aspect, each in annotations.items() if not each.unreadable}
    found: dict[str, Any] = {
        "annotations": {
            aspect: {"Rating": _rating_text(each.rating), "Rationale": each.rationale}
            for aspect, each in readable.items()
        }
    }
    mean = mean_of(annotations)
    return found if mean is None else {**found, "fine-grained_score": mean}


def _rating_text(rating: float | None) -> str:
    if rating is None:
        return NOT_RATED
    return str(int(rating)) if rating == int(rating) else repr(rating)


def summarise(
    items: Sequence[Item],
    kept: Kept,
    settings: Mapping[str, Any],
    judge: str,
    seconds: float,
    *,
    prices: bool,
) -> dict[str, Any]:
    """Return the summary of OUT, in numbers."""
    verdicts = kept.verdicts
    answered = [(item.first, verdicts[item.first.key]) for item in items if item.first and item.first.key in verdicts]
    twice = [
        (item.first, verdicts[item.first.key], item.again, verdicts[item.again.key])
        for item in items
        if item.first and item.again and item.first.key in verdicts and item.again.key in verdicts
    ]
    by_place = [_means(verdict) for _, verdict in answered] + [_means(verdict) for *_, verdict in twice]
    scores = [_scores_by_text(*each) for each in answered]
    ratings = [_rating_counts(item, verdicts) for item in items]
    usage = kept.usage
    rewards = any(verdict.rewards is not None for _, verdict in answered)
    return {
        "settings": dict(settings),
        "judge": judge,
        "prompts": len(items),
        "rated": sum(_rated_completions(item, verdicts) for item in items),
        "unreadable": sum(
            each.unreadable for _, verdict in answered for of_one in verdict.annotations for each in of_one.values()
        ),
        "failed": sum(item.first is not None and item.first.key not in verdicts for item in items),
        "requests": usage.requests,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cost": usage.cost if prices else None,
        "seconds": seconds,
        "ratings": _added(ratings),
        "tied": sum(len(each) > 1 and len(set(each)) == 1 for each in scores),
        "different": len({score for each in scores for score in each}),
        "again": None if rewards else as_json(agreement(_in_order_of_record(*each) for each in twice)),
        "position": None if rewards else as_json(positions(by_place)),
    }


def _means(verdict: Verdict) -> Means:
    return [mean_of(annotations) for annotations in verdict.annotations]


def _scores_by_text(question: Question, verdict: Verdict) -> list[float]:
    """Return the scores of a question's completions that have one."""
    found = _means(verdict) if verdict.rewards is None else verdict.rewards
    return [score for score in found if score is not None]


def _rated_completions(item: Item, verdicts: Mapping[str, Verdict]) -> int:
    """Count the completions with a rating or a reward, equal texts each."""
    if item.first is None or item.first.key not in verdicts:
        return 0
    verdict = verdicts[item.first.key]
    found = _means(verdict) if verdict.rewards is None else verdict.rewards
    rated = {text for text, score in zip(item.first.completions, found, strict=True) if score is not None}
    return sum(completion["response"] in rated for completion in item.record["completions"])


def _rating_counts(item: Item, verdicts: Mapping[str, Verdict]) -> dict[str, dict[str, int]]:
    """Count the ratings of a record's different completions by aspect, each rounded to an integer."""
    if item.first is None or item.first.key not in verdicts:
        return {}
    counts: dict[str, dict[str, int]] = {}
    for of_one in verdicts[item.first.key].annotations:
        for aspect, each in of_one.items():
            of_aspect = counts.setdefault(aspect, dict.fromkeys("12345", 0))
            if each.rating is not None:
                of_aspect[str(int(each.rating + 0.5))] += 1
    return counts


def _added(counts: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for one in counts:
        for aspect, of_one in one.items():
            of_aspect = total.setdefault(aspect, dict.fromkeys("12345", 0))
            for rating, number in of_one.items():
                of_aspect[rating] += number
    return total


def _in_order_of_record(
    first: Question, verdict: Verdict, again: Question, other: Verdict
) -> tuple[Means, Means]:
    """Return two verdicts' mean ratings of the same completions, in the order of the record."""
    sides = []
    for question, each in ((first, verdict), (again, other)):
        by_place = dict(zip(question.order, _means(each), strict=True))
        sides.append([by_place[place] for place in sorted(by_place)])
    return sides[0], sides[1]


def table(summary: Mapping[str, Any]) -> str:
    """Return a summary for people."""
    lines = [
        f"{summary['prompts']} prompts, {summary['rated']} completions rated by {summary['judge']}; "
        f"{summary['unreadable']} ratings unreadable, {summary['failed']} prompts without ratings",
        *_spent(summary),
        *_ratings(summary["ratings"]),
    ]
    if summary["again"]:
        again = summary["again"]
        same_best = "" if again["same_best"] is None else f", the same best one in {again['same_best']:.1%} of prompts"
        correlation = "" if again["correlation"] is None else f", correlation {again['correlation']:.2f}"
        lines.append(
            f"  again in another order, {again['prompts']} prompts: the same rating for {again['exact']:.1%} of "
            f"completions, within 1 for {again['within_one']:.1%}{same_best}{correlation}"
        )
    if summary["position"]:
        places = zip(summary["position"]["mean_rating"], summary["position"]["best"], strict=True)
        shown = (f"{'-' if mean is None else f'{mean:.2f}'} ({best:.1%})" for mean, best in places)
        lines.append(f"  mean rating (and share of wins) by place in the judge's order: {', '.join(shown)}")
    if summary["tied"]:
        lines.append(f"  {summary['tied']} prompts whose completions all have the same score, which make no pair")
    if summary["different"] == 1 and summary["rated"] > 1:
        lines.append(
            f"warning: {summary['judge']} gave everything the same score; nothing can be learned from that: change the "
            "judge or its instructions"
        )
    return "\n".join(lines)


def _spent(summary: Mapping[str, Any]) -> list[str]:
    if not summary["requests"]:
        return []
    tokens = (summary["prompt_tokens"], summary["completion_tokens"])
    counted = "tokens not counted by the server" if None in tokens else f"{tokens[0]:,} tokens read, {tokens[1]:,} written"
    cost = "" if summary["cost"] is None else f", ${summary['cost']:.4f}"
    return [f"  {summary['requests']} requests, {counted}{cost}"]


def _ratings(ratings: Mapping[str, Mapping[str, int]]) -> list[str]:
    if not ratings:
        return []
    width = max(map(len, ratings))
    rows = (f"  {aspect:{width}} {' '.join(f'{number:6d}' for number in counts.values())}" for aspect, counts in ratings.items())
    return [f"  {'':{width}} {' '.join(f'{rating:>6}' for rating in '12345')}", *rows]
