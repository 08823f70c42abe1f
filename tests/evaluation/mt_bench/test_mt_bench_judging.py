"""The judge, a real server on loopback: what it is told, what its verdicts become, and what happens when it fails."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastchat
import pytest
from judges import Reply, Served, serving

from notus.evaluation.endpoint import Endpoint
from notus.evaluation.mt_bench import fastchat as inputs
from notus.evaluation.mt_bench.fastchat import Judgment
from notus.evaluation.mt_bench.suite import judge, matches, read_rating


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def wanted(tmp_path: Path) -> list[Judgment]:
    return find(tmp_path)


def find(folder: Path, mark: str = "", model: str = "gpt-4") -> list[Judgment]:
    """The eight matches of four questions, two of them judged against a reference."""
    questions = inputs.read_questions(str(fastchat.write_questions(folder)))
    answers = inputs.read_answers(str(fastchat.write_answers(folder, mark=mark)))
    return matches(questions, answers, inputs.read_judge_prompts(str(fastchat.write_prompts(folder))), model)


def ask(served: Served, wanted: list[Judgment], folder: Path, **options: Any) -> SimpleNamespace:
    options = {"timeout": 20.0, "retries": 2, **options}
    parallel = options.pop("parallel", 3)

    async def sleep(seconds: float) -> None:
        pass

    endpoint = Endpoint(served.url, wanted[0].judge[0], sleep=sleep, **options)
    verdicts, failures = judge(wanted, endpoint, parallel=parallel, kept=folder / "gpt-4_single.jsonl")
    unread = sum(verdict.score == -1 for verdict in verdicts)
    return SimpleNamespace(verdicts=verdicts, unread=unread, missing=len(failures), reason=failures and failures[0])


def said(request: dict[str, Any]) -> str:
    return request["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[8]]", 8),
        ("Rating: [[7.5]].", 7.5),
        ("[[10]]", 10),
        ("[[3]] or rather [[9]]", 3),
        ("see [1]; Rating: [[6]]", 6),  # double brackets first
        ("Rating: [4]", 4),
        ("Rating: [[ 8 ]]", -1),
        ("Rating: 8", -1),
        ("[[8/10]]", -1),
        ("[[-3]]", -1),
        ("[[85]]", -1),
        ("[[11]]", -1),
        ("[[eight]]", -1),
        ("", -1),
    ],
)
def test_a_rating_is_read_as_fastchat_reads_it(text: str, rating: float) -> None:
    assert read_rating(text) == rating


def test_every_turn_gets_the_prompt_of_its_category(wanted: list[Judgment]) -> None:
    assert [(match.question_id, match.turn, match.judge[1]) for match in wanted] == [
        (81, 1, "single-v1"),
        (101, 1, "single-math-v1"),
        (111, 1, "single-math-v1"),
        (151, 1, "single-v1"),
        (81, 2, "single-v1-multi-turn"),
        (101, 2, "single-math-v1-multi-turn"),
        (111, 2, "single-math-v1-multi-turn"),
        (151, 2, "single-v1-multi-turn"),
    ]
    assert wanted[0].user_prompt == "Q first 81? A answer 81 one"
    assert wanted[1].user_prompt == "Q first 101? R right 101 one A answer 101 one"
    assert wanted[4].user_prompt == "Q first 81? A answer 81 one Q second 81? A answer 81 two"
    assert wanted[5].user_prompt == (
        "R right 101 one R right 101 two Q first 101? A answer 101 one Q second 101? A answer 101 two"
    )


def test_a_question_of_one_turn_is_judged_once(tmp_path: Path, wanted: list[Judgment]) -> None:
    row = {**fastchat.question(81), "turns": ["only?"]}
    questions = inputs.read_questions(str(fastchat.write_lines(tmp_path / "one.jsonl", [row])))
    prompts = inputs.read_judge_prompts(str(fastchat.write_prompts(tmp_path)))
    found = matches(questions, [inputs.Answer.of(81, "toy", ["mine {question}"])], prompts, "gpt-4")
    assert [match.user_prompt for match in found] == ["Q only? A mine {question}"]


def test_an_answer_that_is_not_there_is_told(tmp_path: Path) -> None:
    questions = inputs.read_questions(str(fastchat.write_questions(tmp_path)))
    prompts = inputs.read_judge_prompts(str(fastchat.write_prompts(tmp_path)))
    with pytest.raises(ValueError, match="toy has no answer to turn 1 of question 101"):
        matches(questions, [inputs.Answer.of(81, "toy", ["a", "b"])], prompts, "gpt-4")


def test_verdicts_are_kept_in_fastchats_format(tmp_path: Path, wanted: list[Judgment]) -> None:
    with serving(lambda request, number: f"So so. Rating: [[{len(said(request)) % 10}]]") as served:
        judged = ask(served, wanted, tmp_path)
    assert (len(judged.verdicts), judged.unread, judged.missing) == (8, 0, 0)
    assert Counter(map(said, served.requests)) == Counter(match.user_prompt for match in wanted)
    first = next(request for request in served.requests if said(request) == wanted[0].user_prompt)
    assert first["messages"][0] == {"role": "system", "content": "You are a helpful assistant."}
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("gpt-4", 0.0, 2048)
    lines = [json.loads(line) for line in (tmp_path / "gpt-4_single.jsonl").read_text().splitlines()]
    line = next(line for line in lines if (line["question_id"], line["turn"]) == (101, 2))
    assert line.pop("tstamp") > 1.7e9
    assert line == {
        "question_id": 101,
        "model": "toy",
        "judge": ["gpt-4", "single-math-v1-multi-turn"],
        "system_prompt": "Judge.",
        "user_prompt": wanted[5].user_prompt,
        "judgment": f"So so. Rating: [[{len(wanted[5].user_prompt) % 10}]]",
        "score": len(wanted[5].user_prompt) % 10,
        "turn": 2,
    }


def test_a_garbage_verdict_is_asked_again(tmp_path: Path, wanted: list[Judgment]) -> None:
    seen: Counter[str] = Counter()

    def respond(request: dict[str, Any], number: int) -> str:
        seen[said(request)] += 1
        return "I cannot judge." if seen[said(request)] < 3 else "[[5]]"

    with serving(respond) as served:
        judged = ask(served, wanted, tmp_path)
    assert [verdict.score for verdict in judged.verdicts] == [5] * 8
    assert len(served.requests) == 24


def test_garbage_for_ever_is_a_counted_failure_that_a_later_call_asks_again(
    tmp_path: Path, wanted: list[Judgment]
) -> None:
    hard = wanted[2].user_prompt
    with serving(lambda request, number: "no" if said(request) == hard else "[[5]]") as served:
        judged = ask(served, wanted, tmp_path)
    assert (len(judged.verdicts), judged.unread, judged.missing) == (8, 1, 0)
    assert Counter(map(said, served.requests))[hard] == 3
    lines = [json.loads(line) for line in (tmp_path / "gpt-4_single.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines if line["user_prompt"] == hard] == [-1]
    with serving(lambda request, number: "[[7]]") as served:
        judged = ask(served, wanted, tmp_path)
    assert [said(request) for request in served.requests] == [hard]
    assert sorted(verdict.score for verdict in judged.verdicts) == [5] * 7 + [7]


def test_what_was_judged_is_not_asked_again(tmp_path: Path, wanted: list[Judgment]) -> None:
    with serving(lambda request, number: "[[5]]") as served:
        first = ask(served, wanted[:3], tmp_path)
        again = ask(served, wanted, tmp_path)
        assert ask(served, wanted, tmp_path).verdicts != []
    assert len(served.requests) == 8
    assert len(first.verdicts) == 3
    assert len(again.verdicts) == 8


def test_new_answers_and_another_judge_are_judged_anew(tmp_path: Path, wanted: list[Judgment]) -> None:
    with serving(lambda request, number: "[[5]]") as served:
        ask(served, wanted, tmp_path)
        assert len(ask(served, find(tmp_path, mark="!"), tmp_path).verdicts) == 8
        assert len(ask(served, find(tmp_path, model="other"), tmp_path).verdicts) == 8
    assert len(served.requests) == 24


def test_another_system_prompt_is_judged_anew(tmp_path: Path, wanted: list[Judgment]) -> None:
    stern = [match.model_copy(update={"system_prompt": "Be stern."}) for match in wanted]
    with serving(lambda request, number: f"[[{len(request['messages'][0]['content']) % 10}]]") as served:
        ask(served, wanted, tmp_path)
        judged = ask(served, stern, tmp_path)
        assert len(ask(served, wanted, tmp_path).verdicts) == 8
    assert len(served.requests) == 16
    assert [verdict.score for verdict in judged.verdicts] == [len("Be stern.")] * 8


def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path, wanted: list[Judgment]) -> None:
    path = tmp_path / "gpt-4_single.jsonl"
    with serving(lambda request, number: "[[5]]") as served:
        ask(served, wanted, tmp_path, parallel=1)
        path.write_bytes(path.read_bytes()[:-20])
        ask(served, wanted, tmp_path)
    assert len(served.requests) == 9
    assert served.requests[8]["messages"] == served.requests[7]["messages"]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 8


UNRATED = {"judge": ["a", "b"], "user_prompt": "", "question_id": 1, "model": "m", "turn": 1, "score": "7"}


@pytest.mark.parametrize("line", ["{}", '{"judge": 3}', '{"judge": ["a", "b", "c"]}', json.dumps(UNRATED)])
def test_a_file_of_something_else_is_told(line: str, tmp_path: Path, wanted: list[Judgment]) -> None:
    (tmp_path / "gpt-4_single.jsonl").write_text(line + "\n")
    with (
        serving(lambda request, number: "[[5]]") as served,
        pytest.raises(ValueError, match=r"line 1: .*remove the line or the file"),
    ):
        ask(served, wanted, tmp_path)
    assert served.requests == []


def test_a_judge_that_refuses_stalls_and_lies_still_judges(tmp_path: Path, wanted: list[Judgment]) -> None:
    misconduct: list[Reply | str] = [
        Reply("", 429, {"Retry-After": "1"}),
        Reply("", 500),
        Reply(conduct=lambda handler: served.closing.wait(1.0)),
        Reply("<html>"),
        "no verdict",
        Reply({"choices": [{"message": {"content": ""}}]}),
    ]
    with serving(lambda request, number: misconduct[number] if number < len(misconduct) else "[[6]]") as served:
        judged = ask(served, wanted, tmp_path, timeout=0.5, retries=6)
    assert [verdict.score for verdict in judged.verdicts] == [6] * 8
    assert (judged.unread, judged.missing) == (0, 0)


def test_a_judge_that_dies_leaves_the_verdicts_it_gave(tmp_path: Path, wanted: list[Judgment]) -> None:
    with serving(lambda request, number: "[[6]]" if number < 3 else Reply("", 503)) as served:
        judged = ask(served, wanted, tmp_path, parallel=1)
    assert (len(judged.verdicts), judged.missing) == (3, 5)
    assert "the server answers 503" in str(judged.reason)
    assert len((tmp_path / "gpt-4_single.jsonl").read_text().splitlines()) == 3


def test_an_answer_that_the_judge_refuses_is_the_only_one_missing(tmp_path: Path, wanted: list[Judgment]) -> None:
    long = wanted[0].user_prompt
    with serving(lambda request, number: Reply("too long", 400) if said(request) == long else "[[6]]") as served:
        judged = ask(served, wanted, tmp_path, parallel=1)
        assert (len(judged.verdicts), judged.missing) == (7, 1)
        judged = ask(served, wanted, tmp_path, parallel=1)
    assert (len(judged.verdicts), judged.missing) == (7, 1)
    assert len(served.requests) == 9
