"""The judge behind transformers' own server, `transformers serve`; needs its extra, transformers[serving]."""

from pathlib import Path

import fastchat
import pytest
from serving import saying, served, wait_for

from notus.__main__ import main
from notus.evaluation.results import read_result

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


def test_a_judge_that_transformers_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model = str(saying(tmp_path / "judge", "[", "7", "]"))
    answers, questions = str(fastchat.write_answers(tmp_path)), str(fastchat.write_questions(tmp_path))
    with served(tmp_path / "log") as url:
        assert wait_for(url, model) == "[7]"
        command = ["evaluate", "--suite", "mt-bench", "--answers", answers, "--questions", questions]
        judge = ["--judge-model", model, "--judge-url", url, "--judge-prompts", str(fastchat.write_prompts(tmp_path))]
        assert main([*command, *judge, "--output", str(tmp_path / "out")]) == 0
    result = read_result(tmp_path / "out" / "result.json")
    assert (result.figures[0].value, result.figures[0].count, result.settings["unread"]) == (7.0, 8, 0)
