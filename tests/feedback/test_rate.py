"""The command: what it asks, what it writes, how it resumes and where it stops."""

import json
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from judges import Reply, serving
from pyarrow import parquet
from rating import by_length, counted, parse, ratings, read, record, run, seen, summary, write

from notus.curation.ultrafeedback import curate
from notus.feedback.judge import JudgeError, Question, Verdict
from notus.feedback.questions import make_item, prompt_text


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of this machine stands between client and server, and no wait between two tries."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("notus.evaluation.endpoint.FIRST_WAIT", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


RECORDS = [record(number, ["a", "bb", "ccccc", "dddd"]) for number in range(6)]


def endpoint(url: str) -> list[str]:
    return ["--judge", url, "--judge-model", "judge"]


def test_ratings_reach_the_completions_they_are_of_whatever_the_order(tmp_path: Path) -> None:
    source, out = write(tmp_path / "records.jsonl", RECORDS), tmp_path / "rated.jsonl"
    with serving(by_length) as served:
        assert run(source, out, *endpoint(served.url), "--again-share", 0) == 0
    assert len(served.requests) == 6
    rated = read(out)
    for row in rated:
        assert [each["annotations"]["honesty"]["Rating"] for each in row["completions"]] == ["1", "2", "5", "4"]
        assert [each["fine-grained_score"] for each in row["completions"]] == [1.0, 2.0, 5.0, 4.0]
        assert row["completions"][1]["annotations"]["helpfulness"] == {"Rating": "2", "Rationale": "as bb"}
    by_prompt = {row["instruction"]: row for row in rated}
    for request in served.requests:
        text = request["messages"][0]["content"]
        row = by_prompt[text[text.index("Question ") : text.index("?", text.index("Question ")) + 1]]
        assert [row["completions"][place]["response"] for place in row["rated"]["order"]] == seen(request)
    assert len({tuple(row["rated"]["order"]) for row in rated}) > 1
    pairs, _ = curate(rated)
    assert [pair["chosen_response"] for pair in pairs] == ["ccccc"] * 6


def test_the_order_is_of_the_record_and_the_seed_not_of_its_neighbours() -> None:
    def order(each: dict[str, Any], seed: int = 1) -> Any:
        return make_item("here", each, identity="judge", seed=seed, again_share=0.0).first.order

    orders = [order(each) for each in RECORDS]
    assert [order(each) for each in reversed(RECORDS)] == orders[::-1]
    assert [order(each, seed=2) for each in RECORDS] != orders


def test_the_summary_counts(tmp_path: Path) -> None:
    source, out = write(tmp_path / "records.jsonl", RECORDS[:3]), tmp_path / "rated.jsonl"
    with serving(by_length) as served:
        priced = ["--price-in", 2, "--price-out", 50]
        assert run(source, out, *endpoint(served.url), "--again-share", 1, *priced) == 0
    figures = summary(out)
    counts = {name: figures[name] for name in ("prompts", "rated", "unreadable", "failed", "requests")}
    assert counts == {"prompts": 3, "rated": 12, "unreadable": 0, "failed": 0, "requests": 6}
    assert (figures["prompt_tokens"], figures["completion_tokens"]) == (600, 60)
    assert figures["cost"] == pytest.approx((600 * 2 + 60 * 50) / 1e6)
    assert figures["ratings"]["honesty"] == {"1": 3, "2": 3, "3": 0, "4": 3, "5": 3}
    again = {"prompts": 3, "exact": 1.0, "within_one": 1.0, "same_best": 1.0, "correlation": pytest.approx(1.0)}
    assert figures["again"] == again


def test_a_second_rating_is_in_another_order_and_does_not_count(tmp_path: Path) -> None:
    """A judge that always prefers what it sees first: it contradicts itself, and the first verdict stands."""

    def first_wins(request: dict[str, Any], number: int) -> Reply:
        texts = seen(request)
        return counted(json.dumps(ratings(texts, lambda text: "5" if text == texts[0] else "2")))

    source, out = write(tmp_path / "records.jsonl", RECORDS), tmp_path / "rated.jsonl"
    with serving(first_wins) as served:
        assert run(source, out, *endpoint(served.url), "--again-share", 1) == 0
    assert len({tuple(seen(request)) for request in served.requests}) > 1
    assert len(served.requests) == 12
    for row in read(out):
        best = max(range(4), key=lambda place: row["completions"][place]["fine-grained_score"])
        assert best == row["rated"]["order"][0]
    position = summary(out)["position"]
    assert position == {"mean_rating": [5.0, 2.0, 2.0, 2.0], "best": [4.0, 0.0, 0.0, 0.0]}
    assert summary(out)["again"]["exact"] < 1


def test_a_prompt_that_occurs_again_and_equal_texts_are_asked_once(tmp_path: Path) -> None:
    twice = record(1, ["a", "bb", "a"])
    source, out = write(tmp_path / "records.jsonl", [twice, twice]), tmp_path / "rated.jsonl"
    with serving(by_length) as served:
        assert run(source, out, *endpoint(served.url), "--again-share", 0) == 0
    assert [sorted(seen(request)) for request in served.requests] == [["a", "bb"]]
    rows = read(out)
    assert rows[0] == rows[1]
    assert [each["fine-grained_score"] for each in rows[0]["completions"]] == [1.0, 2.0, 1.0]
    assert summary(out)["rated"] == 6


def test_records_with_one_many_or_no_completions(tmp_path: Path) -> None:
    many = [("x" * (1 + number % 5)) + str(number) for number in range(30)]
    source = write(tmp_path / "records.jsonl", [record(0, []), record(1, ["aaa"]), record(2, many)])
    out = tmp_path / "rated.jsonl"

    def judge(request: dict[str, Any], number: int) -> Reply:
        return counted(json.dumps(ratings(seen(request), lambda text: str(text.count("x") or len(text)))))

    with serving(judge) as served:
        assert run(source, out, *endpoint(served.url), "--again-share", 1) == 0
    empty, one, thirty = read(out)
    assert empty == record(0, [])
    assert one["completions"][0]["fine-grained_score"] == 3.0
    assert [each["fine-grained_score"] for each in thirty["completions"]] == [text.count("x") for text in many]
    assert len(served.requests) == 3  # a single completion has no other order


def test_several_turns_are_shown_with_their_roles(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    source = write(tmp_path / "records.jsonl", [record(0, ["a", "bb"], messages=turns)])
    with serving(by_length) as served:
        run(source, tmp_path / "rated.jsonl", *endpoint(served.url), "--again-share", 0)
    assert "system: Be brief.\n\nuser: Hello?" in served.requests[0]["messages"][0]["content"]
    assert read(tmp_path / "rated.jsonl")[0]["messages"] == turns


def test_a_folder_of_files_is_read_parquet_too(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    annotated = record(1, ["a", "bb"])
    annotated["completions"][0]["annotations"] = {"honesty": {"Rating": "5", "Rationale": "old"}}
    write(folder / "1.jsonl", [record(0, ["a", "bb"])])
    parquet.write_table(pyarrow.Table.from_pylist([annotated]), folder / "2.parquet")
    with serving(by_length) as served:
        assert run(folder, tmp_path / "rated.jsonl", *endpoint(served.url)) == 0
    rows = read(tmp_path / "rated.jsonl")
    assert [row["instruction"] for row in rows] == ["Question 0?", "Question 1?"]
    assert [row["completions"][0]["annotations"]["honesty"]["Rating"] for row in rows] == ["1", "1"]


class Rewards:
    """A reward model that computes nothing: the longer, the better."""

    name, identity, shared = "rewards", "rewards 1", True

    def rate(self, questions: Sequence[Question], done: Callable[[Question, Verdict | JudgeError], None]) -> None:
        for question in questions:
            done(question, Verdict([], rewards=[10.0 * len(text) - 17 for text in question.completions]))


def test_a_reward_model_adds_rewards_and_leaves_ratings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("notus.feedback.reward_judge")
    vars(module)["make_judge"] = lambda args: Rewards()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rated = record(0, ["a", "ccc", "bb"])
    for completion in rated["completions"]:
        completion |= {"annotations": {"style": {"Rating": "3"}}, "fine-grained_score": 3.0, "reward": 99.0}
    source, out = write(tmp_path / "records.jsonl", [rated, record(1, [])]), tmp_path / "rated.jsonl"
    assert run(source, out, "--reward-model", "m") == 0
    completions = read(out)[0]["completions"]
    assert [each["reward"] for each in completions] == [-7.0, 13.0, 3.0]
    assert all(each["annotations"] == {"style": {"Rating": "3"}} for each in completions)
    figures = summary(out)
    assert (figures["rated"], figures["again"], figures["position"], figures["ratings"]) == (3, None, None, {})
    pairs, _ = curate(read(out)[:1], by="reward")
    assert pairs[0]["chosen_response"] == "ccc"


def test_tools_and_calls_are_shown() -> None:
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "rain"},
    ]
    text = prompt_text(record(0, ["a"], messages=turns, tools=[{"name": "look"}]))
    assert text == 'tools: [{"name": "look"}]\n\nuser: Weather?\n\nassistant: [{"name": "look"}]\n\ntool: rain'
    assert prompt_text(record(0, ["a"], messages=[{"role": "user", "content": "Hi"}])) == "Hi"


def test_ratings_of_another_judge_are_replaced_even_where_this_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"annotations": {"style": {"Rating": "5"}}, "fine-grained_score": 5.0}
    records = [record(number, ["a", "bb"]) for number in range(2)]
    for each in records:
        each["completions"] = [completion | old for completion in each["completions"]]
    source, out = write(tmp_path / "records.jsonl", records), tmp_path / "rated.jsonl"

    def judge(request: dict[str, Any], number: int) -> Reply:
        if "Question 1" in request["messages"][0]["content"]:
            return Reply("no", status=400)
        return by_length(request, number)

    with serving(judge) as served:
        assert run(source, out, *endpoint(served.url), "--again-share", 0) == 1
    good, bad = read(out)
    assert "style" not in good["completions"][0]["annotations"]
    assert bad == record(1, ["a", "bb"])
    assert "2 records hold ratings already, which are replaced" in capsys.readouterr().out


def test_a_finished_output_is_left_alone_and_anothers_is_never_replaced(tmp_path: Path) -> None:
    source, out = write(tmp_path / "records.jsonl", RECORDS[:2]), tmp_path / "rated.jsonl"
    with serving(by_length) as served:
        command = [source, out, *endpoint(served.url)]
        assert run(*command) == 0
        asked, before = len(served.requests), out.read_bytes()
        assert run(*command) == 0
        assert len(served.requests) == asked
        with pytest.raises(ValueError, match="seed"):
            run(*command, "--seed", 7)
        assert out.read_bytes() == before
        assert run(*command, "--seed", 7, "--overwrite") == 0
        assert len(served.requests) > asked
        with pytest.raises(ValueError, match=r"records\.jsonl"):
            run(source, source, *endpoint(served.url), "--overwrite")


def test_overwrite_asks_everything_anew_where_a_budget_left_prompts_out(tmp_path: Path) -> None:
    source, out = write(tmp_path / "records.jsonl", RECORDS[:3]), tmp_path / "rated.jsonl"
    with serving(by_length) as served:
        command = [source, out, *endpoint(served.url), "--again-share", 0]
        assert run(*command, "--max-requests", 1, "--parallel", 1) == 1
        assert run(*command, "--overwrite") == 0
        assert len(served.requests) == 1 + 3
        assert summary(out)["requests"] == 3


@pytest.mark.parametrize(("given", "warned"), [(None, True), (3, False)])
def test_a_judge_that_answers_without_ratings_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: int | None, warned: bool
) -> None:
    (tmp_path / "judge.py").write_text(
        f"def rate(prompt, completions):\n    return [{given}, *range(1, len(completions))]\n"
    )
    source = write(tmp_path / "records.jsonl", [record(0, ["a", "bb", "ccc"])])
    assert (
        run(source, tmp_path / "rated.jsonl", "--judge-function", f"{tmp_path}/judge.py:rate", "--again-share", 0) == 0
    )
    assert summary(tmp_path / "rated.jsonl")["unrated"] == int(warned)
    assert ("33% of the completions have no rating" in capsys.readouterr().out) is warned


def test_failed_prompts_are_asked_again_by_the_same_command_and_only_they(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "records.jsonl", RECORDS), tmp_path / "rated.jsonl"
    is_broken = True

    def judge(request: dict[str, Any], number: int) -> Reply | str:
        broken = is_broken and "Question 3?" in request["messages"][0]["content"]
        return "I would rather not say." if broken else by_length(request, number)

    with serving(judge) as served:
        command = [source, out, *endpoint(served.url), "--again-share", 0]
        assert run(*command) == 1
        assert [bool(row.get("rated")) for row in read(out)] == [True, True, True, False, True, True]
        assert summary(out)["failed"] == 1
        assert "rather not say" in capsys.readouterr().out
        is_broken, before = False, len(served.requests)
        assert run(*command) == 0
    assert len(served.requests) == before + 1
    assert summary(out)["failed"] == 0
    assert summary(out)["requests"] == len(served.requests)
    assert all(row["completions"][2]["fine-grained_score"] == 5.0 for row in read(out))


def test_a_budget_of_requests_keeps_what_there_is_and_a_larger_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "records.jsonl", RECORDS), tmp_path / "rated.jsonl"
    with serving(by_length) as served:
        command = [source, out, *endpoint(served.url), "--again-share", 0, "--parallel", 3]
        assert run(*command, "--max-requests", 2) == 1
        assert len(served.requests) == 2
        assert sum("rated" in row for row in read(out)) == 2
        assert "4 prompts are left without ratings (4 were not asked)" in capsys.readouterr().out
        assert run(*command, "--max-requests", 2) == 1
        assert len(served.requests) == 2
        assert run(*command, "--max-requests", 6) == 0
    assert len(served.requests) == 6
    assert all("rated" in row for row in read(out))


def test_a_budget_is_for_first_ratings_before_it_is_for_second_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "records.jsonl", RECORDS), tmp_path / "rated.jsonl"
    with serving(by_length) as served:
        assert run(source, out, *endpoint(served.url), "--again-share", 1, "--max-requests", 8) == 0
    assert all("rated" in row for row in read(out))
    assert summary(out)["again"]["prompts"] == 2
    assert "4 second ratings did not come" in capsys.readouterr().out


def test_a_budget_of_dollars_is_never_overspent(tmp_path: Path) -> None:
    """A request reserves its bytes at --price-in and --max-new-tokens at --price-out until it says what it took."""
    source, out = write(tmp_path / "records.jsonl", RECORDS), tmp_path / "rated.jsonl"
    with serving(by_length) as served:
        priced = ["--price-in", 0, "--price-out", 1000, "--max-new-tokens", 100]  # $0.1 at most, $0.01 in truth
        command = [source, out, *endpoint(served.url), "--again-share", 0, "--parallel", 6, *priced]
        assert run(*command, "--max-cost", 0.125) == 1
        # after three requests 0.03 are spent, and 0.03 + 0.1 would be too much
        assert len(served.requests) == 3
        assert summary(out)["cost"] == pytest.approx(0.03)
        assert run(*command, "--max-cost", 1) == 0
    assert summary(out)["cost"] == pytest.approx(0.06)


def test_without_the_servers_count_the_most_is_charged(tmp_path: Path) -> None:
    source, out = write(tmp_path / "records.jsonl", RECORDS[:1]), tmp_path / "rated.jsonl"
    with serving(lambda request, _: json.dumps(ratings(seen(request), lambda text: "3"))) as served:
        priced = ["--price-in", 1, "--price-out", 1000, "--max-new-tokens", 100]
        assert run(source, out, *endpoint(served.url), *priced) == 0
    figures = summary(out)
    assert figures["prompt_tokens"] is None
    assert 0.1 < figures["cost"] < 0.12  # 100 tokens to write, and a few thousand bytes to read


def test_a_stopped_command_resumes_without_asking_again(tmp_path: Path) -> None:
    source, out = write(tmp_path / "records.jsonl", RECORDS), tmp_path / "rated.jsonl"
    release = threading.Event()

    def judge(request: dict[str, Any], number: int) -> Reply:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            release.wait(5)
        return by_length(request, number)

    with serving(judge) as served:
        command = [source, out, *endpoint(served.url), "--again-share", 0, "--parallel", 1]
        assert run(*command) == 75
        release.set()
        assert not out.exists()
        first = [request["messages"][0]["content"] for request in served.requests[:3]]
        assert run(*command) == 0
        later = [request["messages"][0]["content"] for request in served.requests[4:]]
    assert len(later) == 3
    assert not set(first) & set(later)
    assert summary(out)["requests"] == 7  # the one that was cut off was sent all the same


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_a_function_keeps_the_verdicts_before(tmp_path: Path, number: signal.Signals) -> None:
    """And a line that a kill cut off is asked again."""
    source, out = write(tmp_path / "records.jsonl", RECORDS), tmp_path / "rated.jsonl"
    calls, judge = tmp_path / "calls", tmp_path / "judge.py"
    judge.write_text(
        f"""
import os, pathlib
calls = pathlib.Path({str(calls)!r})
def rate(prompt, completions):
    with calls.open("a") as file:
        file.write(prompt + "\\n")
    if len(calls.read_text().splitlines()) == 3:
        os.kill(os.getpid(), {int(number)})
    return [len(text) for text in completions]
"""
    )
    command = [source, out, "--judge-function", f"{judge}:rate", "--again-share", 0]
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert run(*command) == 75
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    kept = tmp_path / "rated.jsonl.kept" / "verdicts-0.jsonl"
    with kept.open("a") as file:
        file.write(kept.read_text().splitlines()[0][:40])
    assert run(*command) == 0
    asked = calls.read_text().splitlines()
    assert (len(asked), len(set(asked))) == (7, 6)
    assert all(row["completions"][2]["fine-grained_score"] == 5.0 for row in read(out))


def test_kept_verdicts_that_are_none_are_named(tmp_path: Path) -> None:
    source, out = write(tmp_path / "records.jsonl", RECORDS), tmp_path / "rated.jsonl"
    with serving(by_length) as served:
        command = [source, out, *endpoint(served.url)]
        assert run(*command, "--max-requests", 1) == 1
        kept = tmp_path / "rated.jsonl.kept" / "verdicts-0.jsonl"
        line = json.loads(kept.read_text().splitlines()[0])
        of_one = [{"annotations": [{"honesty": each}]} for each in ([4], [9, "", False], [4, None, False], "4")]
        for wrong in ({"annotations": 3}, {"usage": {**line["usage"], "cost": "1"}}, {"key": 1}, *of_one):
            kept.write_text(json.dumps(line | wrong) + "\n")
            with pytest.raises(ValueError, match=r"verdicts-0\.jsonl, line 1"):
                run(*command)


def test_unreadable_ratings_are_left_out_and_counted(tmp_path: Path) -> None:
    def judge(request: dict[str, Any], number: int) -> Reply:
        answer = ratings(seen(request), lambda text: str(len(text)))
        of_first = answer["completion_1"]
        of_first["honesty"]["rating"], of_first["truthfulness"]["rating"] = "nine", 7
        of_first["helpfulness"]["rating"] = "N/A"
        return counted(json.dumps(answer))

    source, out = write(tmp_path / "records.jsonl", [record(0, ["bb", "bbb"])]), tmp_path / "rated.jsonl"
    with serving(judge) as served:
        assert run(source, out, *endpoint(served.url), "--again-share", 0) == 0
    row = read(out)[0]
    first = row["completions"][row["rated"]["order"][0]]
    assert {aspect: each["Rating"] for aspect, each in first["annotations"].items()} == {
        "instruction_following": str(len(first["response"])),
        "helpfulness": "N/A",
    }
    assert first["fine-grained_score"] == len(first["response"])
    assert summary(out)["unreadable"] == 2
    assert len(served.requests) == 1  # there was something to read, so it is not asked again


def test_a_judge_that_gives_everything_the_same_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "records.jsonl", RECORDS)
    with serving(lambda request, _: json.dumps(ratings(seen(request), lambda text: "4"))) as served:
        assert run(source, tmp_path / "rated.jsonl", *endpoint(served.url)) == 0
    assert "warning: judge gave everything the same score" in capsys.readouterr().out


def test_a_key_is_sent_and_never_written_or_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    source = write(tmp_path / "records.jsonl", RECORDS)

    def judge(request: dict[str, Any], number: int) -> Reply:
        if number % 2:
            return Reply('{"error": {"message": "bad request with sk-very-secret"}}', status=400)
        return by_length(request, number)

    with serving(judge) as served:
        run(source, tmp_path / "rated.jsonl", *endpoint(served.url), "--api-key-env", "JUDGE_KEY")
    assert served.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in "".join(capsys.readouterr())
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-very-secret" not in path.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one judge"),
        (["--judge-model", "m", "--judge-function", "f.py:f"], "name one judge"),
        (["--judge-model", "m"], "--judge URL"),
        (["--judge-function", "f.py:f", "--max-cost", "1"], "--max-cost has no effect"),
        (["--reward-model", "m", "--again-share", "0.5"], "--again-share has no effect"),
        (["--judge-function", "f.py:f", "--judge", "http://x/v1"], "--judge has no effect"),
        (["--judge", "http://x/v1", "--judge-model", "m", "--max-cost", "1"], "--price-in"),
        (["--judge", "http://x/v1", "--judge-model", "m", "--price-in", "1"], "--price-out"),
        (["--judge", "http://u:secret@x/v1", "--judge-model", "m"], "password"),
        (["--judge", "http://x/v1", "--judge-model", "m", "--aspects", "wit"], "## Aspect: wit"),
        (["--judge", "http://x/v1", "--judge-model", "m", "--aspects", "honesty", "Honesty"], "twice"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, words: list[str], message: str) -> None:
    source = write(tmp_path / "records.jsonl", RECORDS[:1])
    with pytest.raises(ValueError, match=message) as raised:
        run(source, tmp_path / "rated.jsonl", *words)
    assert "secret" not in str(raised.value)
    assert not (tmp_path / "rated.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3", "no record"),
        ('{"source": "x", "instruction": "y"}', "completions is missing"),
        ('{"source": "x", "instruction": "y", "completions": [{"model": "m"}]}', "response is missing"),
        ('{"source": "x", "instruction": "y", "completions": [], "messages": 3}', "messages must be a list"),
    ],
)
def test_what_is_no_record_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    source = tmp_path / "records.jsonl"
    source.write_text(json.dumps(RECORDS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"line 2.*{message}"):
        run(source, tmp_path / "rated.jsonl", "--judge", "http://x/v1", "--judge-model", "m")


def test_a_judge_that_is_gone_fails_the_rest_at_once(tmp_path: Path) -> None:
    source, out = write(tmp_path / "records.jsonl", [record(n, ["a", "bb"]) for n in range(40)]), tmp_path / "o.jsonl"
    with serving(lambda request, number: Reply("gone", status=400)) as served:
        start = time.monotonic()
        assert run(source, out, *endpoint(served.url), "--again-share", 0, "--parallel", 1) == 1
        assert time.monotonic() - start < 20
    assert len(served.requests) <= 20  # ten questions, each by a schema and in words
    assert summary(out)["failed"] == 40


def test_parse_takes_both_names_of_the_endpoint() -> None:
    assert parse("a", "b", "--judge-url", "u").judge_url == parse("a", "b", "--judge", "u").judge_url == "u"
