"""The evaluation before the first step: what it says, where it goes, and that it changes nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rated import write_labels, write_lists
from runs import assert_same_run, at_call, config, read_metrics, terminate, write_messages, write_pairs

from notus.runtime.process import STOPPED
from notus.training import dpo, sft

HELD = {"data__eval_size": 5, "training__eval_every": 2, "training__epochs": 2}


def initial(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "initial_evaluation.json").read_text())
    return found


KINDS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "lora": {"lora__rank": 2, "lora__dropout": 0.3},
    "ld": {"dpo__ld_alpha": 0.5},
    "sum": {"dpo__loss_type": {"ipo": 1.0, "simpo": 0.5}, "dpo__nll_weight": 0.5, "dpo__nll_mean": "completions"},
    "wpo": {"dpo__wpo": True},
    "no reference": {"dpo__loss_type": "orpo"},
    "kto": {"dpo__loss_type": "kto"},
    "bco": {"dpo__loss_type": "bco"},
    "lists": {"dpo__loss_type": "plackett_luce", "dpo__nll_weight": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_a_pass_of_the_untrained_model_gives(
    kind: str, tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pairs_file
    if kind in ("kto", "bco"):
        data = write_labels(tmp_path / "labels.jsonl", 18)
    elif kind == "lists":
        data = write_lists(tmp_path / "lists.jsonl", 18)
    without_a_pass = dpo.DPOTask.evaluate_start
    expected: dict[str, float] = {}

    def evaluate_both_ways(task: dpo.DPOTask, *given: Any) -> dict[str, float]:
        expected.update(task.evaluate(*given))
        if kind in ("wpo", "no reference"):
            return without_a_pass(task, *given)
        with monkeypatch.context() as patch:
            patch.setattr(dpo, "score", None)
            return without_a_pass(task, *given)

    monkeypatch.setattr(dpo.DPOTask, "evaluate_start", evaluate_both_ways)
    run = config("dpo", tmp_path / "run", model_folder, data, data__eval_size=5, training__max_steps=1, **KINDS[kind])
    assert dpo.run(run) == 0
    (line,) = read_metrics(tmp_path / "run")  # of step 1 alone
    assert {"eval_loss", *expected} == {name for name in line if name.startswith("eval_")}
    assert initial(tmp_path / "run") == pytest.approx({"step": 0, **expected}, abs=2e-5)


def test_of_the_sigmoid_loss_it_is_known(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, **HELD)) == 0
    found = initial(tmp_path / "run")
    assert found["eval_loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    names = ("eval_rewards/margins", "eval_rewards/accuracies", "eval_rewards/chosen", "eval_logps/chosen_change")
    assert [found[name] for name in names] == [0.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("task", ["dpo", "sft"])
def test_training_is_bitwise_the_same_with_and_without(
    task: str, tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    data = pairs_file if task == "dpo" else write_messages(tmp_path / "chats.jsonl", 18)
    run = {"dpo": dpo.run, "sft": sft.run}[task]
    more = {**HELD, "lora__rank": 2, "lora__dropout": 0.3}
    if task == "dpo":
        more["dpo__wpo"] = True  # makes a pass
    for name, given in (("with", True), ("without", False)):
        assert run(config(task, tmp_path / name, model_folder, data, training__eval_at_start=given, **more)) == 0
    assert_same_run(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "without" / "initial_evaluation.json").exists()
    if task == "sft":
        assert set(initial(tmp_path / "with")) == {"step", "eval_loss"}


def test_without_evaluation_data_there_is_none(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file)) == 0
    assert not (tmp_path / "run" / "initial_evaluation.json").exists()


class Killed(Exception):
    pass


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("how", ["signal", "kill"])
def test_it_is_made_again_until_there_is_a_checkpoint(
    how: str, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_messages(tmp_path / "chats.jsonl", 18)
    assert sft.run(config("sft", tmp_path / "whole", model_folder, data, **HELD)) == 0
    cut = config("sft", tmp_path / "cut", model_folder, data, tracking__tensorboard=True, **HELD)
    calls: list[int] = []
    inner = sft.SFTTask.evaluate_start
    monkeypatch.setattr(sft.SFTTask, "evaluate_start", lambda *given: calls.append(1) or inner(*given))
    with monkeypatch.context() as patch:
        if how == "signal":
            at_call(patch, sft.SFTTask, "evaluate", 1, terminate)
            assert sft.run(cut) == STOPPED
        else:
            at_call(patch, sft.SFTTask, "evaluate", 1, kill)
            with pytest.raises(Killed):
                sft.run(cut)
    assert not (tmp_path / "cut" / "initial_evaluation.json").exists()
    with monkeypatch.context() as patch:  # two lines of metrics, and no checkpoint
        at_call(patch, sft.SFTTask, "row_loss", 3, kill)
        with pytest.raises(Killed):
            sft.run(cut)
    assert (initial(tmp_path / "cut"), len(calls)) == (initial(tmp_path / "whole"), 2)
    assert sft.run(cut) == 0  # from step 0 again
    assert len(calls) == 3
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert initial(tmp_path / "cut") == initial(tmp_path / "whole")
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(tmp_path / "cut" / "tensorboard"))
    events.Reload()
    assert sorted(event.step for event in events.Scalars("eval/loss")) == [0, 2, 4, 6, 8]
    assert 0 not in [event.step for event in events.Scalars("train/loss")]


def test_that_of_a_run_which_failed_before_its_first_step_is_not_taken_for_another(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 1, kill)
        with pytest.raises(Killed):
            dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, **HELD))
    assert initial(tmp_path / "run")["eval_loss"] == pytest.approx(0.6931472)
    assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, dpo__loss_type="ipo", **HELD)) == 0
    assert initial(tmp_path / "run")["eval_loss"] == pytest.approx(25.0)  # (0 - 1 / (2 * 0.1))²


@pytest.mark.parametrize("again", [True, False])
def test_that_of_other_data_under_the_same_name_does_not_stay(
    again: bool, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint binds the data yet, so they may be corrected."""
    train, held = write_messages(tmp_path / "chats.jsonl", 18), write_messages(tmp_path / "held.jsonl", 4)
    more = {"data__eval": str(held), "training__eval_every": 2}
    with monkeypatch.context() as patch:
        at_call(patch, sft.SFTTask, "row_loss", 3, kill)  # two lines of metrics
        with pytest.raises(Killed):
            sft.run(config("sft", tmp_path / "run", model_folder, train, **more))
    before = initial(tmp_path / "run")
    held.write_text("".join(held.read_text().splitlines(keepends=True)[:1]))
    assert sft.run(config("sft", tmp_path / "run", model_folder, train, training__eval_at_start=again, **more)) == 0
    if again:
        assert initial(tmp_path / "run")["eval_loss"] != pytest.approx(before["eval_loss"])
    else:
        assert not (tmp_path / "run" / "initial_evaluation.json").exists()


def test_a_resumed_run_makes_none(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config("dpo", tmp_path / "run", model_folder, write_pairs(tmp_path / "pairs.jsonl", 18), **HELD)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 3, terminate)
        assert dpo.run(run) == STOPPED
    (tmp_path / "run" / "initial_evaluation.json").unlink()  # as with a run of an earlier version
    assert dpo.run(run) == 0
    assert not (tmp_path / "run" / "initial_evaluation.json").exists()
