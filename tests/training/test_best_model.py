"""The best model by an evaluation metric: which it is, that it is kept and exported, and when a run ends early."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_ports, launched, run_ranks
from rated import write_labels
from runs import assert_same_run, at_call, config, read_metrics, settings, terminate, write_messages
from safetensors.torch import load_file

from notus.config import config_from_dict
from notus.runtime.process import STOPPED
from notus.training import dpo, sft, trainer
from notus.training.best_model import judge
from notus.training.checkpoint import Progress, checkpoints_in, step_of

# 13 rows in steps of 4: 4 steps an epoch, 8 in all, an evaluation after every second.
BEST = {"data__eval_size": 5, "training__epochs": 2, "training__eval_every": 2, "training__best_metric": "eval_loss",
        "training__save_every": 3}  # fmt: skip
LORA = {"lora__rank": 2, "lora__dropout": 0.3}


@pytest.mark.parametrize(
    ("name", "values", "best", "since"),
    [
        ("eval_loss", [0.7, 0.6, 0.65], 2, 1),
        ("eval_loss", [0.7, 0.6, 0.6, 0.6], 2, 2),  # of equal ones the earlier
        ("eval_loss/sigmoid", [1.0, 2.0], 1, 1),
        ("eval_rewards/accuracies", [0.5, 0.6, 0.4, 0.7], 4, 0),
        ("eval_loss", [math.nan, 0.6, math.nan], 2, 1),
        ("eval_loss", [-math.inf, 5.0], 2, 0),
        ("eval_rewards/margins", [math.inf, -1.0, -2.0], 2, 1),
        ("eval_loss", [math.nan, math.inf], 0, 2),
    ],
)
def test_which_evaluation_is_the_best(name: str, values: list[float], best: int, since: int) -> None:
    progress = Progress()
    for step, value in enumerate(values, start=1):
        progress.step = step
        judge(progress, name, {name: value})
    assert (progress.best_step, progress.evaluations_since_best) == (best, since)
    assert progress.best_value == (values[best - 1] if best else None)


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("dpo", {"training__best_metric": "loss"}, "'loss' cannot choose the best model .* did you mean 'eval_loss'"),
        ("dpo", {"training__best_metric": "eval_rewards/accuracy"}, "did you mean 'eval_rewards/accuracies'"),
        ("dpo", {"training__best_metric": "eval_rewards/top_1"}, "valid: eval_loss, eval_rewards/chosen, "),
        ("dpo", {"training__best_metric": "eval_rewards/rejected"}, r"\(valid: eval_loss, "),
        ("dpo", {"dpo__loss_type": "simpo", "training__best_metric": "eval_logps/chosen_change"}, "cannot choose"),
        ("sft", {"training__best_metric": "eval_rewards/margins"}, "best model of SFT.*eval_loss"),
    ],
)
def test_an_unknown_metric_is_an_error_before_the_folder_is_made(
    task: str, given: dict[str, Any], message: str, tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        {"dpo": dpo.run, "sft": sft.run}[task](
            config(task, tmp_path / "run", model_folder, pairs_file, **{**BEST, **given})
        )
    assert not (tmp_path / "run").exists()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an exported model or adapter."""
    (file,) = folder.glob("*.safetensors")
    found: dict[str, torch.Tensor] = load_file(file)
    return found


def assert_equal(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def scripted(patch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Let `eval_loss` after a step be this."""
    patch.setattr(
        trainer, "judge", lambda progress, name, _: judge(progress, name, {"eval_loss": losses[progress.step]})
    )


def steps_kept(run: Path) -> list[int]:
    return sorted(step_of(path) for path in checkpoints_in(run / "checkpoints"))


@pytest.mark.parametrize("kind", ["dpo-lora", "sft-full"])
def test_the_best_model_is_exported_and_survives_signals_and_pruning(
    kind: str, tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    task, _, what = kind.partition("-")
    module, owner = {"dpo": (dpo, dpo.DPOTask), "sft": (sft, sft.SFTTask)}[task]
    data = pairs_file if task == "dpo" else write_messages(tmp_path / "chats.jsonl", 18)
    more = {**BEST, "training__save_every": 1, "training__keep_checkpoints": 1, "training__lr_schedule": "constant"}
    more |= LORA if what == "lora" else {}
    scripted(monkeypatch, {2: 0.7, 4: 0.5, 6: 0.5, 8: 0.65})
    assert module.run(config(task, tmp_path / "whole", model_folder, data, **more)) == 0
    assert "the model of step 4 is exported, the best one: eval_loss 0.5" in capsys.readouterr().out
    assert steps_kept(tmp_path / "whole") == [4, 8]
    # at a constant learning rate, the first four steps do not know how many there are
    short = {**more, "training__best_metric": None, "training__max_steps": 4}
    assert module.run(config(task, tmp_path / "short", model_folder, data, **short)) == 0
    assert_equal(tmp_path / "whole" / "model", tmp_path / "short" / "model")

    cut = config(task, tmp_path / "cut", model_folder, data, **more)
    for step in (3, 3, 2):  # stopped after steps 3, 6 and 8; 2 is the best until 4 is
        with monkeypatch.context() as patch:
            at_call(patch, owner, "row_loss", step, terminate)
            assert module.run(cut) == STOPPED
    assert module.run(cut) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert steps_kept(tmp_path / "cut") == [4, 8]


def test_the_evaluations_decide(tmp_path: Path, model_folder: Path, pairs_file: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    more = {**BEST, "training__best_metric": "eval_rewards/chosen"}
    assert dpo.run(config("dpo", run, model_folder, pairs_file, training__learning_rate=0.02, **more)) == 0
    values = {line["step"]: line["eval_rewards/chosen"] for line in read_metrics(run) if "eval_loss" in line}
    best = max(values, key=lambda step: (values[step], -step))
    assert f"the model of step {best} is exported, the best one: eval_rewards/chosen" in capsys.readouterr().out


def test_patience_ends_the_run_early_and_a_kill_while_exporting_does_not_train_on(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class Killed(Exception):
        pass

    def kill() -> None:
        raise Killed

    scripted(monkeypatch, {2: 0.5, 4: 0.6, 6: 0.7, 8: 0.1})
    run = tmp_path / "run"
    settings = config("dpo", run, model_folder, pairs_file, training__early_stopping_patience=2, **BEST)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.Run, "_export", 1, kill)
        with pytest.raises(Killed):
            dpo.run(settings)
    assert "stopped early after step 6 of 8: 2 evaluations without a better eval_loss" in capsys.readouterr().out
    assert dpo.run(settings) == 0
    assert "the model of step 2 is exported, the best one: eval_loss 0.5" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert steps_kept(run) == [2, 3, 6]
    assert dpo.run(settings) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_signal_at_the_evaluation_that_is_the_best(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {2: 0.7, 4: 0.5, 6: 0.6, 8: 0.65})
    more = {**BEST, "training__keep_checkpoints": 1}
    assert dpo.run(config("dpo", tmp_path / "whole", model_folder, pairs_file, **more)) == 0
    cut = config("dpo", tmp_path / "cut", model_folder, pairs_file, **more)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "evaluate", 2, terminate)
        assert dpo.run(cut) == STOPPED
    assert dpo.run(cut) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_no_finite_evaluation_exports_the_last_model(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    scripted(monkeypatch, dict.fromkeys((2, 4, 6, 8), math.nan))
    assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, **BEST)) == 0
    assert "warning: no evaluation had a finite eval_loss: the last model is exported" in capsys.readouterr().out
    assert (
        dpo.run(config("dpo", tmp_path / "last", model_folder, pairs_file, **{**BEST, "training__best_metric": None}))
        == 0
    )
    assert_equal(tmp_path / "run" / "model", tmp_path / "last" / "model")


def test_a_best_checkpoint_that_is_damaged_or_gone_is_an_error_before_training(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    scripted(monkeypatch, {2: 0.7, 4: 0.8, 6: 0.9, 8: 0.75})
    folder = tmp_path / "run"
    run = config("dpo", folder, model_folder, pairs_file, **BEST)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 5, terminate)
        assert dpo.run(run) == STOPPED
    checkpoints = folder / "checkpoints"
    best, newest = checkpoints / "step-00000002", checkpoints_in(checkpoints)[0]
    before = read_metrics(folder)
    (file,) = best.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    remedy = rf"Restore it and run the same command again\. Without it, .* training\.resume={newest}: "
    with pytest.raises(ValueError, match=f"the best model by eval_loss cannot be read: {file} does not .* {remedy}"):
        dpo.run(run)
    kept = best.rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=f"the best model by eval_loss cannot be read: {best} is not a .* {remedy}"):
        dpo.run(run)
    assert read_metrics(folder) == before

    # what the message proposes: in another folder, the earlier evaluation no longer decides
    other = {**BEST, "training__resume": str(newest)}
    assert dpo.run(config("dpo", tmp_path / "other", model_folder, pairs_file, **other)) == 0
    assert "the model of step 8 is exported, the best one: eval_loss 0.75" in capsys.readouterr().out

    content[-1] ^= 1
    (kept / file.name).write_bytes(content)
    kept.rename(best)
    with monkeypatch.context() as patch:  # damaged while the run trains
        at_call(patch, dpo.Run, "_choose_best", 1, lambda: file.write_bytes(content[:-1]))
        with pytest.raises(ValueError, match=rf"{file} has \d+ bytes, .*training\.resume=.*/step-00000008: "):
            dpo.run(run)
    file.write_bytes(content)
    assert dpo.run(run) == 0
    assert "the model of step 2 is exported, the best one: eval_loss 0.7" in capsys.readouterr().out


def test_an_evaluation_without_the_metric_is_an_error_before_the_first_step(tmp_path: Path, model_folder: Path) -> None:
    labels = write_labels(tmp_path / "labels.jsonl", 12, good=1.0)
    more = {**BEST, "dpo__loss_type": "kto", "training__best_metric": "eval_rewards/margins"}
    with pytest.raises(ValueError, match="the evaluation data give no eval_rewards/margins; they give eval_loss, "):
        dpo.run(config("dpo", tmp_path / "run", model_folder, labels, **more))
    assert not (tmp_path / "run" / "checkpoints").exists()


def _on_two_ranks(tree: dict[str, Any], ports: list[int]) -> None:
    run = config_from_dict(tree, "dpo")
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, {2: 0.7, 4: 0.5, 6: 0.6, 8: 0.65})
        with launched(ports[0]) as rank, pytest.MonkeyPatch.context() as stop:
            if rank == 1:
                at_call(stop, dpo.DPOTask, "row_loss", 6, terminate)
            assert dpo.run(run) == STOPPED
        with launched(ports[1]):
            assert dpo.run(run) == 0


@pytest.mark.slow
def test_two_ranks_export_the_best_model_of_one(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {2: 0.7, 4: 0.5, 6: 0.6, 8: 0.65})
    more = {**BEST, "training__keep_checkpoints": 1}
    assert dpo.run(config("dpo", tmp_path / "one", model_folder, pairs_file, **more)) == 0
    run_ranks(_on_two_ranks, 2, tmp_path, settings(tmp_path / "two", model_folder, pairs_file, **more), free_ports(2))
    assert steps_kept(tmp_path / "two") == [4, 8]
    one, two = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-5)
