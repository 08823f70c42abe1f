"""Under torchrun the ranks share a local judge's questions; verdicts do not depend on how many there are."""

import os
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from ranks import free_port, launched, run_ranks
from rating import parse, read, record, summary, write

from notus.feedback import rate
from notus.feedback.judge import Annotation, JudgeError, Question, Verdict

RECORDS = [record(number, ["a", "bb", "ccc"]) for number in range(5)]


class Lengths:
    """A local judge that computes nothing: it rates by length, and writes down what it was asked.

    On the second rank it is slow: the first one must not write the result before all verdicts are there.
    """

    name, identity, shared = "lengths", "lengths 1", True

    def __init__(self, log: Path) -> None:
        self.log = log

    def rate(self, questions: Sequence[Question], done: Callable[[Question, Verdict | JudgeError], None]) -> None:
        for question in questions:
            with self.log.open("a") as file:
                file.write(f'{{"prompt": "{question.prompt}"}}\n')
            time.sleep(0.5 * int(os.environ["RANK"]))
            done(question, Verdict([{"honesty": Annotation(float(len(text)))} for text in question.completions]))


def _rate(port: int, folder: Path) -> None:
    with launched(port) as rank:
        module = types.ModuleType("notus.feedback.local_judge")
        vars(module)["make_judge"] = lambda args: Lengths(folder / f"asked-{rank}.jsonl")
        sys.modules[module.__name__] = module
        args = parse(folder / "records.jsonl", folder / "rated.jsonl", "--local-judge", "m", "--again-share", "0")
        assert rate.run(args) == 0


@pytest.mark.slow
def test_two_ranks_share_the_questions(tmp_path: Path) -> None:
    write(tmp_path / "records.jsonl", RECORDS)
    run_ranks(_rate, 2, tmp_path, free_port(), tmp_path)
    asked = [[row["prompt"] for row in read(tmp_path / f"asked-{rank}.jsonl")] for rank in range(2)]
    assert [len(each) for each in asked] == [3, 2]
    assert sorted(asked[0] + asked[1]) == [each["instruction"] for each in RECORDS]
    rated = read(tmp_path / "rated.jsonl")
    assert [[each["fine-grained_score"] for each in row["completions"]] for row in rated] == [[1.0, 2.0, 3.0]] * 5
    assert summary(tmp_path / "rated.jsonl")["rated"] == 15


def test_ranks_beside_the_first_leave_an_endpoint_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    source = write(tmp_path / "records.jsonl", RECORDS)
    args = parse(source, tmp_path / "rated.jsonl", "--judge", "http://localhost:1/v1", "--judge-model", "m")
    assert rate.run(args) == 0
    assert not (tmp_path / "rated.jsonl").exists()
