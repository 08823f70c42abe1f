"""`notus evaluate`: every suite is found, has its own arguments, and starts no torch for its help."""

import subprocess
import sys
from pathlib import Path

import pytest

from notus.__main__ import main
from notus.evaluation.evaluate import SUITES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_answers_for_help_without_torch(suite):
    code = (
        "import sys, contextlib\nfrom notus.__main__ import main\n"
        f"with contextlib.suppress(SystemExit): main(['evaluate', '--suite', {suite!r}, '--help'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--suite" in done.stdout


def test_a_wrong_suite_lists_the_valid_ones(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "model", "--suite=open-lm"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert all(suite in message for suite in SUITES)


@pytest.mark.parametrize("option", ["--suit=win-rate", "--su=win-rate"])
def test_a_shortened_option_names_the_suite_too(capsys, option):
    assert main(["evaluate", "model", option]) == 1  # else the default suite would run, and say nothing of it
    assert "name what to compare with: --against" in capsys.readouterr().err


def test_without_a_suite_preferences_are_meant(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "--pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("suite", "asked"),
    [
        ("alpaca-eval", ["--prompts", "prompts.jsonl"]),
        ("mt-bench", ["--questions", "questions.jsonl"]),
        ("win-rate", ["--prompts", "prompts.jsonl", "--against", "MODEL", "--judge-function", "judge.py:first"]),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_model_is_loaded(
    tmp_path, capsys, monkeypatch, model_folder, suite, asked
):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"instruction": "One?"}\n')
    Path("questions.jsonl").write_text('{"question_id": 1, "category": "math", "turns": ["One?", "Two?"]}\n')
    Path("judge.py").write_text("def first(prompt, a, b):\n    return 'A'\n")
    Path("file").touch()
    monkeypatch.setattr("notus.evaluation.resolve_model.load_causal_lm", None)
    words = [str(model_folder) if word == "MODEL" else word for word in asked]
    assert main(["evaluate", str(model_folder), "--suite", suite, *words, "--output", "file/out"]) == 1
    assert "file/out: no results can be written there" in capsys.readouterr().err
