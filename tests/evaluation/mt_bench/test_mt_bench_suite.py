"""The command from end to end: answers, a judge on loopback, scores; killed, resumed, on two ranks."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import fastchat
import pytest
from judges import Reply, Served, serving
from ranks import free_port

from notus.__main__ import main
from notus.evaluation import endpoint
from notus.evaluation.results import read_result, read_results

KEY = "sk-secret-of-the-tests"
EVALUATE = ["evaluate", "--suite", "mt-bench"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy between judge and client, no waiting between requests, and a working folder of the test's own."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.0)
    monkeypatch.chdir(tmp_path)


def inputs(folder: Path) -> list[str]:
    return ["--questions", str(fastchat.write_questions(folder))]


def judge(folder: Path, url: str) -> list[str]:
    prompts = str(fastchat.write_prompts(folder))
    return ["--judge-model", "gpt-4", "--judge-url", url, "--judge-prompts", prompts, "--parallel", "2"]


def judge_answers(folder: Path, served: Served) -> list[str]:
    answers = str(fastchat.write_answers(folder))
    return [
        *EVALUATE,
        "--answers",
        answers,
        *inputs(folder),
        *judge(folder, served.url),
        "--output",
        str(folder / "out"),
    ]


def said(request: dict[str, Any]) -> str:
    return request["messages"][-1]["content"]


def rate(request: dict[str, Any], number: int) -> str:
    """8 for first turns, 6 for second ones; one less in mathematics."""
    text = said(request)
    return f"Rating: [[{(6 if 'two' in text else 8) - ('111' in text)}]]"


def test_answers_are_judged_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(rate) as served:
        assert main(judge_answers(tmp_path, served)) == 0
    assert len(served.requests) == 8
    assert served.headers[0]["Authorization"] == f"Bearer {KEY}"
    result = read_result(tmp_path / "out" / "result.json")
    # 8 8 7 8 and 6 6 5 6
    assert {figure.metric: (figure.value, figure.count) for figure in result.figures} == {
        "score": (6.75, 8),
        "score, turn 1": (7.75, 4),
        "score, turn 2": (5.75, 4),
        "score, writing": (7.0, 2),
        "score, reasoning": (7.0, 2),
        "score, math": (6.0, 2),
        "score, humanities": (7.0, 2),
    }
    assert result.figures[0].dataset == "question.jsonl"
    assert (result.model, result.settings["judge"], result.settings["missing"]) == ("toy", "gpt-4", 0)
    out = capsys.readouterr()
    assert "4 questions, 8 turns" in out.out
    assert KEY not in out.out + out.err
    for path in (tmp_path / "out").iterdir():
        assert KEY not in path.read_text()


def test_fastchats_own_judgments_are_scored_with_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [fastchat.judgment(81, 1, 9, "b"), fastchat.judgment(81, 2, 8, "b"), fastchat.judgment(81, 1, 4, "a")]
    path = fastchat.write_lines(tmp_path / "gpt-4_single.jsonl", lines)
    assert main([*EVALUATE, "--judgments", str(path), *inputs(tmp_path)]) == 0
    result = read_result(tmp_path / "evaluations" / "gpt-4_single" / "mt-bench" / "result.json")
    assert result.model == "a, b"
    assert [figure.value for figure in result.figures if figure.metric == "score"] == [8.5, 4.0]
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "b gpt-4 8.50 - 9.00 8.00 8.50 2 0" in rows
    assert "a gpt-4 4.00 - 4.00 - 4.00 1 0" in rows


def test_judgments_without_a_single_score_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fastchat.write_lines(tmp_path / "gpt-4_single.jsonl", [fastchat.judgment(81, 1, -1)])
    assert main([*EVALUATE, "--judgments", str(path)]) == 1
    assert "no judgment holds a score" in capsys.readouterr().err


def test_a_judge_of_garbage_alone_is_an_error_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda request, number: "I like it.") as served:
        assert main(judge_answers(tmp_path, served)) == 1
    assert len(served.requests) == 24
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: not one of 8 verdicts came: no verdict holds a rating")
    assert not (tmp_path / "out" / "result.json").exists()


def test_an_endpoint_that_is_not_there_is_an_error_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(judge_answers(tmp_path, Served(f"http://127.0.0.1:{free_port()}/v1"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: not one of 8 verdicts came: http://127.0.0.1")


def test_an_endpoint_that_dies_keeps_what_came_and_the_same_command_asks_for_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda request, number: rate(request, number) if number < 3 else Reply("", 500)) as served:
        assert main(judge_answers(tmp_path, served)) == 1
    assert "5 of 8 verdicts did not come" in capsys.readouterr().out
    result = read_result(tmp_path / "out" / "result.json")
    assert (result.figures[0].count, result.settings["missing"]) == (3, 5)
    with serving(rate) as served:
        assert main(judge_answers(tmp_path, served)) == 0
    assert len(served.requests) == 5
    result = read_result(tmp_path / "out" / "result.json")
    assert (result.figures[0].value, result.figures[0].count, result.settings["missing"]) == (6.75, 8, 0)


def test_a_few_garbage_verdicts_are_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda request, number: "?" if "111" in said(request) else rate(request, number)) as served:
        assert main(judge_answers(tmp_path, served)) == 0
    result = read_result(tmp_path / "out" / "result.json")
    assert (result.figures[0].value, result.figures[0].count, result.settings["unread"]) == (7.0, 6, 2)
    assert "2 of 8 verdicts hold no rating" in capsys.readouterr().out


def test_a_run_is_answered_first_and_judged_later(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*EVALUATE, str(lora_run), *inputs(tmp_path), "--max-new-tokens", "4", "--temperature", "0"]
    assert main(command) == 0
    assert "not judged: run again with --judge-model" in capsys.readouterr().out
    folder = lora_run / "evaluations" / "mt-bench"
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in answers] == [81, 101, 111, 151]
    assert {line["model_id"] for line in answers} == {"lora"}
    kept = {path.name: path.read_bytes() for path in (folder / "generation").iterdir()}
    with serving(rate) as served:
        assert main([*command, *judge(tmp_path, served.url)]) == 0
    assert {path.name: path.read_bytes() for path in (folder / "generation").iterdir()} == kept
    assert any(answers[0]["choices"][0]["turns"][0] in said(request) for request in served.requests)
    (result,) = [result for result in read_results(lora_run) if result.suite == "mt-bench"]
    assert (result.model, result.figures[0].count) == (str(lora_run), 8)
    assert result.settings["temperature"] == 0


MISTAKES = {
    "name a MODEL_OR_RUN": [],
    "the model m has no effect with --judgments": ["m", "--judgments", "j"],
    "--judge-model has no effect with --judgments": ["--judgments", "j", "--judge-model", "x"],
    "--answers has no effect with --judgments": ["--judgments", "j", "--answers", "a"],
    "name the judge with --judge-model": ["--answers", "a"],
    "the model m has no effect with --answers": ["m", "--answers", "a", "--judge-model", "x"],
    "--batch-size has no effect with --answers": ["--answers", "a", "--judge-model", "x", "--batch-size", "3"],
    "--trust-remote-code has no effect with --answers": [
        *["--answers", "a", "--judge-model", "x", "--trust-remote-code"]
    ],
    "--judge-url has no effect without a judge": ["m", "--judge-url", "http://host/v1"],
    "--references has no effect without a judge": ["m", "--references", "r"],
    "--parallel has no effect without a judge": ["m", "--parallel", "3"],
    "give --judge-prompts FILE": ["m", "--judge-model", "x"],
    "--seed has no effect on greedy": ["m", "--temperature", "0", "--seed", "1"],
    "not an endpoint's address": ["A", "--judge-url", "host:80/v1"],
}


@pytest.mark.parametrize("option", ["--answers", "--judgments"])
def test_what_needs_no_model_is_done_once(
    option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*EVALUATE, option, "file"]) == 1
    assert f"{option} works in one process: leave torchrun out" in capsys.readouterr().err


@pytest.mark.parametrize("told", MISTAKES)
def test_mistakes_on_the_command_line(told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = MISTAKES[told]
    if given[:1] == ["A"]:
        answers = str(fastchat.write_answers(tmp_path))
        given = ["--answers", answers, *inputs(tmp_path), *judge(tmp_path, "http://host/v1"), *given[1:]]
    assert main([*EVALUATE, *given]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_what_the_judge_needs_is_looked_at_before_the_model(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("notus.evaluation.resolve_model.load_causal_lm", None)  # any use of it fails
    row = {key: value for key, value in fastchat.question(101).items() if key != "reference"}
    questions = fastchat.write_lines(tmp_path / "q.jsonl", [row])
    command = [*EVALUATE, str(lora_run), "--questions", str(questions), *judge(tmp_path, "http://host/v1")]
    assert main(command) == 1
    assert "question 101 (reasoning) is judged against reference answers" in capsys.readouterr().err


def start(command: list[str]) -> subprocess.Popen[str]:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen(
        [sys.executable, "-m", "notus", *command],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_stopped_in_the_middle_and_resumed(number: signal.Signals, code: int, tmp_path: Path) -> None:
    came, release = threading.Event(), threading.Event()

    def three(request: dict[str, Any], count: int) -> str:
        if count >= 4:  # two at a time: by the fifth request three answers have come
            came.set()
            release.wait(300)
        return rate(request, count)

    with serving(three) as served:
        process = start(judge_answers(tmp_path, served))
        assert came.wait(240)
        process.send_signal(number)
        out, _ = process.communicate(timeout=240)
        release.set()
        assert process.returncode == code
        assert ("the same command resumes there" in out) == (number == signal.SIGTERM)
    kept = [json.loads(line) for line in (tmp_path / "out" / "gpt-4_single.jsonl").read_text().split("\n")[:-1]]
    assert 1 <= len(kept) <= 4
    with serving(rate) as served:
        assert main(judge_answers(tmp_path, served)) == 0
    judged = Counter(line["user_prompt"] for line in kept) + Counter(map(said, served.requests))
    assert len(judged) == 8
    assert set(judged.values()) == {1}
    assert read_result(tmp_path / "out" / "result.json").figures[0].value == 6.75


def test_two_ranks_answer_and_one_judges(lora_run: Path, tmp_path: Path) -> None:
    with serving(rate) as served:
        options = [*inputs(tmp_path), *judge(tmp_path, served.url), "--max-new-tokens", "4", "--batch-size", "1"]
        one = [*EVALUATE, str(lora_run), *options, "--output", str(tmp_path / "one")]
        assert main(one) == 0
        asked = Counter(map(said, served.requests))
        served.requests.clear()
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "notus"]
        done = subprocess.run(
            [sys.executable, *torchrun, *one[:-1], str(tmp_path / "two")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Counter(map(said, served.requests)) == asked
    assert done.stdout.count("result.json") == 1
    assert sorted(path.name for path in (tmp_path / "two" / "generation").iterdir()) == ["rank-0.jsonl", "rank-1.jsonl"]
    figures = [read_result(tmp_path / name / "result.json").figures for name in ("one", "two")]
    assert figures[0] == figures[1]
