"""`--suite win-rate`: worked-out scores, both orders, judges that fail or talk nonsense, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from decoded import generate
from judges import Reply, serving

from notus.__main__ import main
from notus.evaluation import decoding as generation
from notus.evaluation.endpoint import Endpoint
from notus.evaluation.intervals import wilson
from notus.evaluation.results import read_result
from notus.evaluation.win_rate import (
    PROMPT,
    Judge,
    Judged,
    Pair,
    endpoint_judge,
    figures_of,
    function_judge,
    judge_pairs,
    match,
    parse_verdict,
    read_answers,
    read_asked,
    score,
)
from notus.model.export import load_causal_lm

SUITE = ["evaluate", "--suite", "win-rate"]
JUDGE = '''
def longer(prompt, a, b):
    """The longer answer is better; both are as good where the lengths are equal."""
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"

def first(prompt, a, b):
    return "A"

def broken(prompt, a, b):
    raise RuntimeError("no idea")

def odd(prompt, a, b):
    return "tie" if prompt == "q0" else {"best": "A"}

number = 3
'''


@pytest.fixture
def judge_file(tmp_path):
    path = tmp_path / "my_judge.py"
    path.write_text(JUDGE)
    return path


def write(path, answers, key="completion"):
    path.write_text("".join(json.dumps({"prompt": f"q{n}", key: text}) + "\n" for n, text in enumerate(answers)))
    return path


def compare(tmp_path, ours, theirs, *options):
    a, b = write(tmp_path / "ours.jsonl", ours), write(tmp_path / "theirs.jsonl", theirs, "output")
    out = ["--output", str(tmp_path / "o")]
    return main([*SUITE, "--answers", str(a), "--against-answers", str(b), *out, *map(str, options)])


def test_scores_worked_out_by_hand():
    def judged(first, second, answer="abc"):
        return Judged(Pair("q", answer, "a"), first, second)

    verdicts = [
        judged("A", "B"),  # a win in both orders
        judged("A", "B"),
        judged("B", "A"),  # a loss
        judged("A", "A"),  # the first place, twice
        judged("B", "B"),
        judged("tie", "B"),  # no flip, and no win either
        judged("tie", "tie"),
        judged("A", None),  # not both
        judged(None, None, answer="a"),  # equal answers, about which nobody was asked
    ]
    found = score(verdicts)
    assert (found.wins, found.losses, found.ties, found.flips, found.same) == (2, 1, 5, 2, 1)
    assert (found.count, found.failed) == (8, 1)
    assert found.win_rate == pytest.approx(100 * (2 + 2.5) / 8)
    assert found.interval == pytest.approx(tuple(100 * end for end in wilson(4.5, 8)))
    # points 1, 1, 0 and five halves: mean 9/16, squared deviations 2·(7/16)² + (9/16)² + 5·(1/16)²
    squares = (2 * 49 + 81 + 5) / 256
    assert found.standard_error == pytest.approx(100 * (squares / 7 / 8) ** 0.5)
    assert found.flip_rate == pytest.approx(100 * 2 / 7)
    assert found.first_rate == pytest.approx(100 * 5 / 11)  # A in 1, 2, 3, 4 and 4 again, of 11 that name a winner
    assert found.length == pytest.approx((8 * 3 + 1) / 9)
    assert found.against_length == 1
    assert score([judged("A", None)]) is None
    assert score([judged("A", None), judged(None, None, answer="a")]) is None  # equal answers tell nothing of the judge
    alone = score([judged(None, None, answer="a")])
    assert (alone.win_rate, alone.standard_error, alone.flip_rate, alone.first_rate) == (50, None, None, None)


def test_two_files_and_a_function(tmp_path, judge_file, capsys):
    assert (
        compare(tmp_path, ["aaa", "a", "bb", "c"], ["a", "aaa", "cc", "c"], "--judge-function", f"{judge_file}:longer")
        == 0
    )
    result = read_result(tmp_path / "o" / "result.json")
    assert (result.figures[0].metric, result.figures[0].value, result.figures[0].count) == ("win_rate", 50, 4)
    assert {figure.dataset for figure in result.figures} == {"ours.jsonl"}
    details = result.details
    assert (details["wins"], details["losses"], details["ties"], details["same"]) == (1, 1, 2, 1)
    assert details["flip_rate"] == 0
    assert details["length"] == (3 + 1 + 2 + 1) / 4
    low, high = (100 * end for end in wilson(2, 4))
    told = capsys.readouterr().out
    assert f"win rate         50.00 %, 95% interval {low:.2f} to {high:.2f}" in told
    assert "0 without both verdicts; 1 ties are equal answers, not asked about\n" in told
    assert "position bias     0.00 % of the 3 pairs judged flip with the order\n" in told
    rows = [json.loads(line) for line in (tmp_path / "o" / "pairs.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "pair": {"prompt": "q0", "answer": "aaa", "against": "a"},
        "first": "A",
        "second": "B",
        "points": 1.0,
    }


def test_a_judge_of_positions_gives_nothing_but_ties(tmp_path, judge_file):
    assert compare(tmp_path, ["a", "b"], ["c", "d"], "--judge-function", f"{judge_file}:first") == 0
    rate, bias = read_result(tmp_path / "o" / "result.json").figures
    assert (rate.value, bias.metric, bias.value, bias.count) == (50, "position_bias", 100, 2)
    assert read_result(tmp_path / "o" / "result.json").details["first_rate"] == 100


def test_figures_name_the_other_and_the_judge_without_the_way_to_them(tmp_path, judge_file):
    assert compare(tmp_path, ["a", "b"], ["c", "d"], "--judge-function", f"{judge_file}:odd") == 0
    result = read_result(tmp_path / "o" / "result.json")
    assert {figure.setup for figure in result.figures} == {
        "against theirs.jsonl, judged by my_judge.py:odd in both orders, 1 pairs without both verdicts",
        "pairs that flip",
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    verdicts = score([Judged(Pair("q", "a", "b"), "A", "B")])
    for other, told in ((tmp_path / "run", "run"), (f"{tmp_path}/run (step 20)", "run (step 20)"), ("o/m", "o/m")):
        rate, _ = figures_of(verdicts, str(other), "gpt-4", "prompts.jsonl")
        assert rate.setup == f"against {told}, judged by gpt-4 in both orders"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_verdicts_and_says_how_to_go_on(tmp_path, capsys, number):
    def respond(request, at):
        if at == 3:
            os.kill(os.getpid(), number)
            served.closing.wait(20)
        return "Verdict: A"

    with serving(respond) as served:
        options = ["--judge-model", "gpt-4", "--judge-url", served.url, "--parallel", "1"]
        assert compare(tmp_path, ["a", "b", "c"], ["d", "e", "f"], *options) == 75
        assert "stopped: the verdicts that came are in" in capsys.readouterr().out
        assert not (tmp_path / "o" / "result.json").exists()
        assert compare(tmp_path, ["a", "b", "c"], ["d", "e", "f"], *options) == 0
        assert len(served.requests) == 7


def test_a_signal_ends_the_process_while_a_judge_function_hangs(tmp_path):
    judge, came = tmp_path / "slow.py", tmp_path / "came"
    judge.write_text(
        f"import pathlib, time\ndef slow(*_):\n    pathlib.Path({str(came)!r}).touch()\n    time.sleep(60)\n"
    )
    options = ["--answers", write(tmp_path / "a.jsonl", ["a"]), "--against-answers", write(tmp_path / "b.jsonl", ["b"])]
    command = [sys.executable, "-m", "notus", *SUITE, *options, "--judge-function", f"{judge}:slow"]
    with subprocess.Popen([*command, "--output", tmp_path / "o"]) as process:
        try:
            deadline = time.monotonic() + 240
            while not came.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 75
        finally:
            process.kill()


def test_nobody_waits_in_the_process_group_while_the_judge_is_asked(tmp_path, judge_file, monkeypatch):
    grouped = []

    def judging(*_):
        grouped.append(torch.distributed.is_initialized())
        return [Judged(Pair("q", "a", "b"), "A", "B")], [], []

    monkeypatch.setattr("notus.evaluation.win_rate.judge_pairs", judging)
    assert compare(tmp_path, ["a"], ["b"], "--judge-function", f"{judge_file}:first") == 0
    assert grouped == [False]


def test_nonsense_is_counted(tmp_path, judge_file, capsys):
    assert compare(tmp_path, ["a", "b"], ["c", "d"], "--judge-function", f"{judge_file}:odd") == 0
    details = read_result(tmp_path / "o" / "result.json").details
    assert (details["count"], details["failed"], details["ties"]) == (1, 1, 1)
    told = capsys.readouterr().out
    assert "2 verdicts failed, the first: a reply without a verdict: \"returned {'best': 'A'}\"" in told


def test_a_judge_that_only_fails_ends_in_one_line(tmp_path, judge_file, capsys):
    sides = ["a"] * 9 + ["same"], ["c"] * 9 + ["same"]
    assert compare(tmp_path, *sides, "--judge-function", f"{judge_file}:broken") == 1
    told = capsys.readouterr().err
    assert "not one of 9 pairs has both verdicts" in told
    assert "RuntimeError: no idea" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "o" / "result.json").exists()


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("{file}", "give file.py:name or package.module:name"),
        ("{file}:", "give file.py:name"),
        ("{file}:none", "has no function 'none'"),
        ("{file}:number", "has no function 'number'"),
        ("{folder}/other.py:f", "cannot import"),
        ("no.such.package:f", "cannot import no.such.package (ModuleNotFoundError"),
        ("{folder}/bad.py:f", "cannot import {folder}/bad.py (ZeroDivisionError: division by zero)"),
    ],
)
def test_a_function_that_is_none(tmp_path, judge_file, spec, told):
    (tmp_path / "bad.py").write_text("1 / 0")
    names = {"file": judge_file, "folder": tmp_path}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        function_judge(spec.format(**names))
    assert told.format(**names) in str(caught.value)


def test_a_function_of_a_module():
    assert function_judge("operator:add").ask is not None


def counting(verdict):
    """A judge that counts its calls."""
    calls = []

    async def ask(prompt, a, b):
        calls.append((prompt, a, b))
        return verdict(prompt, a, b)

    return Judge("test", "one", ask, parallel=2), calls


def test_what_a_kept_reply_means_is_read_again(tmp_path):
    pair, kept = Pair("q", "a", "b"), tmp_path / "verdicts.jsonl"
    judge, calls = counting(lambda *_: "Verdict: A\nB is too long.")
    judge_pairs([pair], judge, kept)
    kept.write_text(kept.read_text().replace('"verdict": "A"', '"verdict": "B"'))  # as an earlier version took it
    (judged,), *_ = judge_pairs([pair], judge, kept)
    assert (judged.first, judged.second, len(calls)) == ("A", "A", 2)


def test_verdicts_are_kept_one_by_one(tmp_path):
    pairs = [Pair(f"q{number}", "a", "b") for number in range(5)]
    kept = tmp_path / "verdicts.jsonl"

    def killed(prompt, a, b):
        if prompt == "q2":
            raise SystemExit
        return "A"

    judge, _ = counting(killed)
    with pytest.raises(SystemExit):
        judge_pairs(pairs, Judge("test", "one", judge.ask, 1), kept)
    assert len(kept.read_text().splitlines()) == 4
    with kept.open("a") as file:
        file.write('{"key": "torn')
    judge, calls = counting(lambda *_: "B")
    judged, failures, unread = judge_pairs(pairs, judge, kept)
    assert {prompt for prompt, *_ in calls} == {"q2", "q3", "q4"}
    assert [one.first for one in judged] == ["A", "A", "B", "B", "B"]
    assert (failures, unread) == ([], [])
    judge_pairs(pairs, judge, kept)
    assert len(calls) == 6
    other = Judge("test", "another prompt", judge.ask, 1)
    judge_pairs(pairs, other, kept)
    assert len(calls) == 16
    judge_pairs([Pair("q0", "a", "c")], judge, kept)
    assert len(calls) == 18


@pytest.mark.parametrize("record", [{}, {"key": ["a"], "verdict": "A"}, {"key": "a", "verdict": "C"}])
def test_a_file_of_something_else_is_named(tmp_path, record):
    (tmp_path / "verdicts.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=r"verdicts.jsonl, line 1: not a kept verdict"):
        judge_pairs([Pair("q", "a", "b")], counting(lambda *_: "A")[0], tmp_path / "verdicts.jsonl")


def test_what_failed_is_asked_again(tmp_path):
    replies = iter(["hm", "B", "A"])
    judge, calls = counting(lambda *_: next(replies))
    judge = Judge("test", "one", judge.ask, 1)
    pair = Pair("q", "a", "b")
    judged, failures, unread = judge_pairs([pair], judge, tmp_path / "kept.jsonl")
    assert (judged[0].first, judged[0].second, failures) == (None, "B", [])
    assert unread == ["a reply without a verdict: 'hm'"]
    judged, _, unread = judge_pairs([pair], judge, tmp_path / "kept.jsonl")
    assert (judged[0].first, judged[0].second, unread) == ("A", "B", [])
    assert calls == [("q", "a", "b"), ("q", "b", "a"), ("q", "a", "b")]


def test_an_edited_function_is_another_judge(judge_file):
    before = function_judge(f"{judge_file}:longer")
    assert function_judge(f"{judge_file}:longer").identity == before.identity
    assert function_judge(f"{judge_file}:first").identity != before.identity
    judge_file.write_text(JUDGE + "\n")
    assert function_judge(f"{judge_file}:longer").identity != before.identity


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: A", "A"),
        ("Both are fine.\n**Verdict:** B", "B"),
        ("verdict: a tie", "tie"),
        ("verdict: b", "B"),
        ("Verdict: A\nI hope this helps.", "A"),
        ("Verdict: a close call, but B", None),
        ("Verdict: A closer look favours B", None),
        ("Verdict: A is better", "A"),
        ("Verdict: A\nB is too long.", "A"),
        ("Verdict: A\n\nTie was not an option.", "A"),
        ("Verdict: A/B", None),
        ('"Verdict: tie"', "tie"),
        ("I prefer A. [[B]]", "B"),
        ("[[C]]", "tie"),
        ("[[A]] it is, so [[a]]", "A"),
        ("B.", "B"),
        ("tie", "tie"),
        ("[[A]] or [[B]]", None),
        ("Verdict: A\nVerdict: B", None),
        ("Verdict: All of them", None),
        ("A is better", None),
        ("", None),
        ("Verdict: C", None),
    ],
)
def test_verdicts_are_read(reply, verdict):
    assert parse_verdict(reply) == verdict


def test_an_endpoint_judges(tmp_path, capsys):
    def respond(request, number):
        text = request["messages"][0]["content"]
        if "q3" in text:
            return Reply("bad", 400)  # refused for good
        if "q2" in text:
            return "I would rather not say"
        a, b = (text.split(f"<answer_{place}>\n")[1].split("\n</answer")[0] for place in "ab")
        return f"Because.\nVerdict: {'A' if len(a) > len(b) else 'B'}"

    with serving(respond) as served:
        options = ["--judge-model", "gpt-4", "--judge-url", served.url]
        assert (
            compare(tmp_path, ["long", "{answer_b}", "b", "b"], ["a", "12", "c", "c"], *options) == 1
        )  # two never came
        told = capsys.readouterr().out
        assert "4 verdicts failed" in told
        details = read_result(tmp_path / "o" / "result.json").details
        assert (details["wins"], details["count"], details["failed"]) == (2, 2, 2)
        assert len(served.requests) == 8
        assert compare(tmp_path, ["long", "{answer_b}", "b", "b"], ["a", "12", "c", "c"], *options) == 1
        assert len(served.requests) == 12  # what failed is asked again
        prompt = tmp_path / "judge.txt"
        prompt.write_text("{prompt} <answer_a>\n{answer_a}\n</answer_a> <answer_b>\n{answer_b}\n</answer_b>")
        assert compare(tmp_path, ["long"], ["a"], *options, "--judge-prompt", prompt) == 0
        assert served.requests[-1]["messages"][0]["content"].startswith("q0 <answer_a>")


def test_an_endpoint_that_refuses_the_key_ends_at_once(tmp_path, capsys):
    with serving(lambda request, number: Reply("no", 401)) as served:
        assert compare(tmp_path, ["a"] * 9, ["b"] * 9, "--judge-model", "x", "--judge-url", served.url) == 1
    assert "set the environment variable that --api-key-env names" in capsys.readouterr().err


def test_a_prompt_of_the_judge_needs_its_places():
    endpoint = Endpoint("http://127.0.0.1:1/v1", "x")
    assert endpoint_judge(endpoint, PROMPT, 1).name == "x"
    with pytest.raises(ValueError, match=r"has no \{answer_b\}"):
        endpoint_judge(endpoint, "{prompt} {answer_a}", 1)


def test_two_models(model_folder, full_run, tmp_path, judge_file, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "poem"}]
    prompts.write_text("\n".join(map(json.dumps, [{"prompt": "the dog"}, {"messages": turns}, {"instruction": "12"}])))
    options = ["--precision", "fp32", "--max-new-tokens", "6", "--chat-template", "zephyr"]
    judge = ["--judge-function", f"{judge_file}:longer"]
    command = [*SUITE, str(full_run), "--against", str(model_folder), "--prompts", str(prompts), *options, *judge]
    assert main(command) == 0
    folder = full_run / "evaluations" / "win-rate"
    rows = [json.loads(line)["pair"] for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the dog", "poem", "12"]
    conversations = [[{"role": "user", "content": text}] for text in ("the dog", "poem", "12")]
    for key, place in (("answer", full_run), ("against", model_folder)):
        model, tokenizer = load_causal_lm(place, dtype=torch.float32, device="cpu")
        wanted = generate(model, tokenizer, conversations, max_new_tokens=6, chat_template="zephyr")
        assert [row[key] for row in rows] == [text.strip() for text in wanted]
    result = read_result(folder / "result.json")
    assert result.settings["against"] == str(model_folder)
    monkeypatch.setattr(generation, "_complete", None)
    assert main(command) == 0  # all is kept


def test_a_model_against_answers(model_folder, tmp_path, judge_file):
    theirs = write(tmp_path / "theirs.jsonl", ["a", "b"])
    options = ["--precision", "fp32", "--max-new-tokens", "3", "--output", str(tmp_path / "o")]
    judge = ["--judge-function", f"{judge_file}:longer"]
    assert main([*SUITE, str(model_folder), "--against-answers", str(theirs), *options, *judge]) == 0
    rows = [json.loads(line)["pair"] for line in (tmp_path / "o" / "pairs.jsonl").read_text().splitlines()]
    model, tokenizer = load_causal_lm(model_folder, dtype=torch.float32, device="cpu")
    wanted = generate(model, tokenizer, ["q0", "q1"], max_new_tokens=3)
    assert [row["answer"] for row in rows] == [text.strip() for text in wanted]
    assert [row["against"] for row in rows] == ["a", "b"]


def test_each_model_is_prompted_as_it_was_trained(plain_run, chat_base, tmp_path, judge_file):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the dog")
    options = ["--precision", "fp32", "--max-new-tokens", "6", "--judge-function", f"{judge_file}:longer"]
    command = [*SUITE, str(plain_run), "--against", str(chat_base), "--prompts", str(prompts), *options]
    turn = [{"role": "user", "content": "the dog"}]
    for more, theirs in (([], turn), (["--raw"], "the dog")):
        out = tmp_path / "".join(["out", *more])
        assert main([*command, *more, "--output", str(out)]) == 0
        (row,) = [json.loads(line)["pair"] for line in (out / "pairs.jsonl").read_text().splitlines()]
        for key, place, prompt in (("answer", plain_run, "the dog"), ("against", chat_base, theirs)):
            model, tokenizer = load_causal_lm(place, dtype=torch.float32, device="cpu")
            assert [row[key]] == [text.strip() for text in generate(model, tokenizer, [prompt], max_new_tokens=6)]


FILES = ["--answers", "a", "--against-answers", "b"]
FUNCTION = ["--judge-function", "x:y"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "name a MODEL_OR_RUN or a file of its answers"),
        (["model", "--answers", "a"], "name a MODEL_OR_RUN or a file of its answers"),
        (["model"], "name what to compare with"),
        (["model", "--against", "other"], "two models need prompts"),
        ([*FILES, "--prompts", "p"], "--prompts has no effect"),
        ([*FILES, "--temperature", "0"], "--temperature has no effect with two files"),
        ([*FILES, "--precision", "fp32"], "--precision has no effect with two files"),
        (["model", "--against-answers", "b", "--seed", "1"], "--seed has no effect on greedy answers"),
        (FILES, "name a judge"),
        ([*FILES, *FUNCTION, "--judge-model", "m"], "name a judge"),
        ([*FILES, *FUNCTION, "--judge-prompt", "p"], "--judge-prompt has no effect with --judge-function"),
        ([*FILES, *FUNCTION, "--parallel", "9"], "--parallel has no effect with --judge-function"),
        ([*FILES, "--judge-model", "m", "--judge-prompt", "no.txt"], "--judge-prompt no.txt: cannot be read"),
        ([*FILES, "--judge-model", "m", "--judge-url", "ftp://x"], "not an endpoint's address"),
    ],
)
def test_options_that_do_not_go_together(capsys, options, told):
    assert main([*SUITE, *options]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file is empty"),
        ("[1]", "row 1 .*: int, not an object"),
        ('{"prompt": "a"}', "line 1: no string under one of the keys completion, output, answer"),
        ('{"prompt": "a", "completions": ["b"]}', "line 1: no string under one of the keys"),
        ('{"completion": "a"}', "line 1: holds no prompt"),
        ('{"prompt": "a", "output": "b"}\n{"instruction": "a", "output": "c"}', "line 2: the same prompt as .*line 1"),
    ],
)
def test_wrong_answer_files_are_named(tmp_path, text, told):
    path = tmp_path / "answers.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"answers.json.*{told}"):
        read_answers(path)


def test_files_of_different_prompts_are_refused(tmp_path):
    ours, answers = read_answers(write(tmp_path / "a.jsonl", ["x", "y"]))
    theirs, _ = read_answers(write(tmp_path / "b.jsonl", ["x"]))
    assert read_answers(write(tmp_path / "c.jsonl", [" x\n"]))[1] == ["x"]
    assert match(ours[::-1], ours, answers, "a") == ["y", "x"]
    with pytest.raises(ValueError, match=r"b.jsonl: no answer to the prompt of .*a.jsonl, line 2"):
        match(ours, theirs, ["x"], "b.jsonl")
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: the other side has no such prompt"):
        match(theirs, ours, answers, "a.jsonl")


def test_prompts_may_be_there_once(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\na\n")
    with pytest.raises(ValueError, match=r"line 3: the same prompt as .*line 1"):
        read_asked(tmp_path / "p.txt")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": turns}))
    assert read_asked(tmp_path / "p.jsonl")[0].text == "system: be brief\n\nuser: a"
