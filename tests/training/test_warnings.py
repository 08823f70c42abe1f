import re
from pathlib import Path
from typing import Any

import pytest
from runs import config, read_metrics, write_messages
from toys import toy_model_folder, toy_tokenizer
from transformers import AutoTokenizer

from notus.config import DPOConfig
from notus.data.tokenize import DropReport
from notus.training import dpo, sft
from notus.training.objective import objective_of
from notus.training.warnings import CHOSEN_CHANGE, CHOSEN_FALL, SUMMED_MARGINS, Guards, plain_text_notice


def test_each_guard_speaks_once_and_names_its_metric() -> None:
    guards = Guards([SUMMED_MARGINS, CHOSEN_CHANGE])
    assert guards.check({"loss": 99.0, "rewards/margins": 20.0, "logps/chosen_change": -1.0}) == []
    (first,) = guards.check({"rewards/margins": -20.5, "logps/chosen_change": 5.0})
    assert first.startswith("warning: rewards/margins = -20.5 is beyond 20 either way: ")
    assert guards.check({"rewards/margins": 30.0}) == []
    (second,) = guards.check({"rewards/margins": 30.0, "logps/chosen_change": -1.25})
    assert second.startswith("warning: logps/chosen_change = -1.25 is below -1 nat per token: ")
    assert guards.check({"rewards/margins": 30.0, "logps/chosen_change": -9.0}) == []


def test_a_guard_of_a_change_compares_with_the_first_line() -> None:
    guards = Guards([CHOSEN_FALL])
    assert guards.check({"loss": 1.0}) == []
    assert guards.check({"logps/chosen_per_token": -4.0}) == []
    assert guards.check({"logps/chosen_per_token": -5.0}) == []
    (found,) = guards.check({"logps/chosen_per_token": -5.1})
    assert found.startswith("warning: logps/chosen_per_token = -5.1 has fallen by over 1 nat: ")
    assert guards.check({"logps/chosen_per_token": -9.0}) == []


def test_labels_are_not_told_of_a_key_that_they_lack() -> None:
    found = {loss: objective_of(DPOConfig(loss_type=loss)).guards[-1].meaning for loss in ("bco", "sigmoid")}
    assert {loss: "dpo.nll_weight" in meaning for loss, meaning in found.items()} == {"bco": False, "sigmoid": True}


def _warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def test_a_run_that_works_is_silent(
    tmp_path: Path, model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, training__epochs=3))
    assert _warnings(capsys) == []


@pytest.mark.parametrize(
    ("loss", "beta", "expected"),
    [
        ("sigmoid", 1.0, {"rewards/margins", "logps/chosen_change"}),
        ("ipo", 5.0, {"logps/chosen_change"}),
        ("cpo", 1.0, {"logps/chosen_per_token"}),
    ],
)
def test_an_absurd_learning_rate_is_told(
    loss: str, beta: float, expected: set[str], tmp_path: Path, model_folder: Path, pairs_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    settings: dict[str, Any] = {"dpo__loss_type": loss, "dpo__beta": beta, "training__learning_rate": 0.1}
    dpo.run(config("dpo", run, model_folder, pairs_file, **settings))
    assert sorted(line.split()[1] for line in _warnings(capsys)) == sorted(expected)
    assert max(abs(line["rewards/margins"]) for line in read_metrics(run)) > 20


def test_the_change_of_the_chosen_is_per_token(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run, beta = tmp_path / "run", 0.3
    overrides: dict[str, Any] = {"training__batch_size": 18, "dpo__beta": beta, "data__shuffle": False}
    dpo.run(config("dpo", run, model_folder, pairs_file, training__epochs=2, **overrides))
    first, second = read_metrics(run)
    assert first["logps/chosen_change"] == pytest.approx(0.0, abs=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokens = _chosen_tokens(tokenizer, pairs_file)
    change = second["logps/chosen"] - first["logps/chosen"]  # a mean over the 18 pairs
    assert second["logps/chosen_change"] == pytest.approx(18 * change / tokens, rel=1e-4)


def _chosen_tokens(tokenizer: Any, pairs: Path) -> int:
    import json

    total = 0
    for pair in map(json.loads, pairs.read_text().splitlines()):
        whole = tokenizer(pair["prompt"] + pair["chosen"], return_offsets_mapping=True)
        total += sum(end > len(pair["prompt"]) for _, end in whole["offset_mapping"]) + 1  # end-of-sequence
    return total


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("templated", "own", "named", "said"),
    [
        (0, None, None, None),  # a model without a chat format
        (0, TEMPLATE, None, "note: 1,200 of 1,200 training rows are plain text.* give it string prompts as they are"),
        (0, None, "zephyr", "note: 1,200 of 1,200 training rows are plain text"),
        (200, TEMPLATE, None, "note: 1,000 of 1,200 training rows are plain text.* as the user's turn: set --raw"),
        (1200, TEMPLATE, "zephyr", None),
    ],
)
def test_plain_text_is_said_where_there_is_a_template(
    templated: int, own: str | None, named: str | None, said: str | None
) -> None:
    report = DropReport(read=1300, dropped={"empty completion": 100}, templated=templated)
    found = plain_text_notice(report, toy_tokenizer(chat_template=own), named)
    assert found is None if said is None else re.match(said, str(found))


def test_a_run_says_at_its_start_that_a_chat_model_learns_plain_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = toy_model_folder(tmp_path / "chat")
    toy_tokenizer(chat_template=TEMPLATE).save_pretrained(folder)
    data = write_messages(tmp_path / "rows.jsonl", 6)
    sft.run(config("sft", tmp_path / "run", folder, data, training__max_steps=1))
    lines = capsys.readouterr().out.splitlines()
    said = next(number for number, line in enumerate(lines) if line.startswith("note: 6 of 6 training rows are plain"))
    assert not any("step 1" in line for line in lines[:said])
