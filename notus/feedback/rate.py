"""`python -m notus rate RECORDS OUT`: a judge rates the completions of records, in UltraFeedback's form.

The judge sees the different completions of a prompt together, in an order drawn for this prompt and recorded. Verdicts
are kept as they come, so the same command resumes where it was stopped. A share of the prompts is rated a second time
in another order, which measures how far the judge agrees with itself and what the order does.
"""

import argparse
import contextlib
import dataclasses
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from notus.evaluation.arguments import count, positive
from notus.evaluation.results import append_records
from notus.feedback.instructions import read_instructions
from notus.feedback.judge import Judge, JudgeError, NotAsked, Question, Verdict
from notus.feedback.questions import Item, make_item
from notus.feedback.rated import rated_record, summarise, table
from notus.feedback.records import (
    ASPECTS,
    Record,
    check_out,
    digest_of,
    finish,
    held,
    is_finished,
    kept_folder,
    read_records,
    summary_file,
)
from notus.feedback.verdicts import kept_line, read_verdicts
from notus.runtime.process import STOPPED, tell

T = TypeVar("T")

ENDPOINT, LOCAL, REWARD, FUNCTION = "endpoint", "local", "reward", "function"
KINDS = {"judge_model": ENDPOINT, "local_judge": LOCAL, "reward_model": REWARD, "judge_function": FUNCTION}
AGAIN_SHARE = 0.1


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
    "batch_size": _Option((LOCAL, REWARD), None),
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
        "out",
        type=os.path.expanduser,
        metavar="OUT",
        help="the records with ratings, a .jsonl file",
    )
    parser.add_argument("--overwrite", action="store_true", help="start over, and replace what OUT holds")
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
    asking.add_argument("--aspects", nargs="+", metavar="ASPECT", help=f"what is rated (default: {' '.join(ASPECTS)})")
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
    model.add_argument(
        "--batch-size", type=count, metavar="N", help="sequences at a time (default: 8; of a reward model 32)"
    )
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
    # only the one that is asked for, because local models bring torch
    judge: Judge = importlib.import_module(f"notus.feedback.{kind}_judge").make_judge(args)
    return judge


class _Command:
    """One rank's part. Ranks other than the first read, judge their share of the questions, and wait."""

    def __init__(self, args: argparse.Namespace, kind: str, rank: int, world_size: int) -> None:
        self.args, self.kind, self.rank, self.world_size = args, kind, rank, world_size
        self.out = Path(args.out)
        self.folder = kept_folder(self.out)
        self.started = time.monotonic()

    def run(self) -> int:
        placed = self._on_main(lambda: read_records(self.args.records))
        judge = make_judge(self.args, self.kind)
        with contextlib.ExitStack() as stack:
            self._on_main(lambda: stack.enter_context(held(self.out)))
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

    def _of_all_ranks(self, mine: dict[str, str]) -> dict[str, str]:
        """Return what the ranks have by key, once each has come here: then all verdicts are on disk."""
        if self.kind not in (LOCAL, REWARD):
            return mine
        from notus.runtime import distributed

        shares = distributed.gather_objects(mine, patient=True)
        return {key: text for of_rank in shares for key, text in of_rank.items()}

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
            "records_digest": digest_of([record for _, record in placed]),
            "judge": judge.name,
            "seed": self.args.seed,
        }
        if self.kind in (ENDPOINT, LOCAL):
            settings["aspects"] = list(self.args.aspects)
            settings["instructions"] = read_instructions(self.args.instructions, self.args.aspects).digest
        if self.kind != REWARD:
            settings["again_share"] = self.args.again_share
        settings["judge_digest"] = digest_of(judge.identity)  # last, because others say better what has changed
        return settings

    def _rate(self, judge: Judge, items: Sequence[Item], settings: Mapping[str, Any]) -> int:
        kept = self._on_main(lambda: read_verdicts(self.folder))
        budget = getattr(judge, "budget", None)
        if budget is not None:
            budget.spent = kept.usage
        # Equal records ask the same question, once. A budget is for first ratings before it is for second ones.
        questions = [*(item.first for item in items), *(item.again for item in items)]
        asked = {each.key: each for each in questions if each}
        left = [question for key, question in asked.items() if key not in kept.verdicts]
        if self.rank == 0:
            self._announce(items, judge, len(asked), len(left))
        try:
            not_asked = self._of_all_ranks(self._ask(judge, left))
        except KeyboardInterrupt:
            self._say(f"stopped: the verdicts so far are kept in {self.folder}; the same command resumes there")
            return STOPPED
        return self._on_main(lambda: self._finish(judge, items, settings, not_asked))

    def _announce(self, items: Sequence[Item], judge: Judge, asked: int, left: int) -> None:
        text = f"{len(items)} prompts, rated by {judge.name}: {asked} questions"
        tell(text if left == asked else f"{text}, {asked - left} answered before")
        before = sum(any(completion.get("annotations") for completion in item.record["completions"]) for item in items)
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
        lost = sum(item.again is not None and item.again.key not in kept.verdicts for item in items)
        if lost:
            tell(f"note: {lost} second ratings did not come, and are not in these figures")
        missing = [item.first.key for item in items if item.first and item.first.key not in kept.verdicts]
        if missing:
            left = len({key for key in missing if key in not_asked})
            first = next((failures[key] for key in missing if key in failures), "no answer came")
            tell(
                f"{len(missing)} prompts are left without ratings ({left} were not asked), the first: {first}; the "
                "same command, with a larger budget if it is used up, asks for them again"
            )
        tell(f"wrote {self.out} and {summary_file(self.out).name}")
        return 1 if missing else 0


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Have SIGTERM and SIGINT raise KeyboardInterrupt, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
