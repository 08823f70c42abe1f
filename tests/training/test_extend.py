"""A run that is made longer: by an explicit key, bit for bit as an undisturbed one, its model replaced at the end."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import assert_same_run, at_call, config, read_metrics, terminate
from test_best_model import assert_equal, scripted

from notus.__main__ import main
from notus.evaluation.read_run import read_run
from notus.evaluation.release.card import exported_step
from notus.evaluation.resolve_model import find_source
from notus.evaluation.results import EVALUATIONS, Result, write_result
from notus.runtime.process import STOPPED
from notus.training import dpo
from notus.training.run_folder import EXTENDING

# 13 rows in steps of 4: 4 steps an epoch.
BASE = {"data__eval_size": 5, "training__epochs": 2, "training__eval_every": 2, "training__save_every": 3,
        "training__keep_checkpoints": 1}  # fmt: skip


def extended(folder: Path, model: Path, pairs: Path, **more: Any) -> Any:
    return config("dpo", folder, model, pairs, training__extend=True, **{**BASE, **more})


def test_at_a_constant_rate_an_extended_run_is_a_longer_one_bit_for_bit(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    """Its first end is within the second epoch, and its last step is evaluated in both."""
    more = {"training__lr_schedule": "constant", "training__epochs": 3}
    for name, steps in (("straight", 10), ("run", 6)):
        run = config("dpo", tmp_path / name, model_folder, pairs_file, **{**BASE, **more, "training__max_steps": steps})
        assert dpo.run(run) == 0
    assert dpo.run(extended(tmp_path / "run", model_folder, pairs_file, **more, training__max_steps=10)) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]
    assert (saved["max_steps"], saved["extend"]) == (10, True)
    assert dpo.run(extended(tmp_path / "run", model_folder, pairs_file, **more, training__max_steps=10)) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 11))


def test_a_longer_schedule_is_followed_from_the_next_step_on(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    """linear, 1e-3 at its peak: of 4 steps 1, 3/4, 2/4, 1/4; then of 8 steps those from 4 on: 4/8, 3/8, 2/8, 1/8."""
    assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, **{**BASE, "training__epochs": 1})) == 0
    assert dpo.run(extended(tmp_path / "run", model_folder, pairs_file, training__epochs=2)) == 0
    rates = [line["learning_rate"] / 1e-3 for line in read_metrics(tmp_path / "run")]
    assert rates == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


class Killed(Exception):
    pass


def kill() -> None:
    raise Killed


# the names of what is called, in the extended launch, when it is killed
MOMENTS = [(dpo.Run, "_progress", 1), (dpo.DPOTask, "row_loss", 2), (dpo.DPOTask, "evaluate", 1),
           (dpo.Run, "_export", 1)]  # fmt: skip


@pytest.mark.parametrize("lora", [{"lora__rank": 2, "lora__dropout": 0.3}], ids=["lora"])
def test_kills_and_signals_at_any_moment_change_nothing(
    lora: dict[str, Any], tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "cut", "earlier"):
        first = config("dpo", tmp_path / name, model_folder, pairs_file, **{**BASE, **lora, "training__epochs": 1})
        assert dpo.run(first) == 0
    assert dpo.run(extended(tmp_path / "whole", model_folder, pairs_file, **lora)) == 0
    longer = extended(tmp_path / "cut", model_folder, pairs_file, **lora)
    for owner, name, number in MOMENTS:
        with monkeypatch.context() as patch:
            at_call(patch, owner, name, number, kill)
            with pytest.raises(Killed):
                dpo.run(longer)
        assert_equal(tmp_path / "cut" / "model", tmp_path / "earlier" / "model")  # the earlier one stays until the end
    assert (tmp_path / "cut" / EXTENDING).exists()
    assert dpo.run(longer) == 0
    assert not (tmp_path / "cut" / EXTENDING).exists()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_that_was_stopped_can_be_extended_too(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "cut"):
        with monkeypatch.context() as patch:
            at_call(patch, dpo.DPOTask, "row_loss", 3, terminate)
            first = config("dpo", tmp_path / name, model_folder, pairs_file, **{**BASE, "training__max_steps": 5})
            assert dpo.run(first) == STOPPED
    more = {"training__max_steps": 9, "training__epochs": 3}  # both at once
    assert dpo.run(extended(tmp_path / "whole", model_folder, pairs_file, **more)) == 0
    assert read_metrics(tmp_path / "whole")[-1]["step"] == 9
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 4, terminate)
        assert dpo.run(extended(tmp_path / "cut", model_folder, pairs_file, **more)) == STOPPED
    # the config on disk has the new length: the key need not be given again
    assert dpo.run(config("dpo", tmp_path / "cut", model_folder, pairs_file, **{**BASE, **more})) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def _finished(tmp_path: Path, model_folder: Path, pairs_file: Path, **more: Any) -> Path:
    given = {**BASE, "training__max_steps": 5, **more}
    assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, **given)) == 0
    return tmp_path / "run"


def test_what_cannot_be_is_an_error_that_changes_nothing(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run = _finished(tmp_path, model_folder, pairs_file)
    before = (run / "config.yaml").read_text()
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"training__max_steps": 9}, r"a shorter run: training\.max_steps \(was 5, is 9\)\. Set training\.extend=true"),
        ({"training__max_steps": None}, r"max_steps \(was 5, is null\)\. Set training\.extend=true"),
        (
            {"training__max_steps": 3, "training__extend": True},
            r"\(was 5, is 3\)\. A run can be made longer, but not sh",
        ),
        ({"training__epochs": 1, "training__max_steps": 9, "training__extend": True}, "longer, but not shorter"),
        ({"training__max_steps": 9, "training__extend": True, "dpo__beta": 0.2}, r"another config: .*dpo\.beta \(was"),
    ]
    for given, message in mistakes:
        with pytest.raises(ValueError, match=message):
            dpo.run(config("dpo", run, model_folder, pairs_file, **{**BASE, "training__max_steps": 5, **given}))
        assert (run / "config.yaml").read_text() == before
        assert not (run / EXTENDING).exists()


def test_a_limit_that_is_taken_away_is_lifted_and_cannot_come_back(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    run = _finished(tmp_path, model_folder, pairs_file)
    assert dpo.run(extended(run, model_folder, pairs_file, training__max_steps=None)) == 0
    assert read_metrics(run)[-1]["step"] == 8
    with pytest.raises(ValueError, match=r"max_steps \(was null, is 12\)\. A run can be made longer, but not shorter"):
        dpo.run(extended(run, model_folder, pairs_file, training__max_steps=12))


def test_a_limit_beyond_the_epochs_warns(tmp_path: Path, model_folder: Path, pairs_file: Path, capsys: Any) -> None:
    run = _finished(tmp_path, model_folder, pairs_file, training__max_steps=20)
    assert dpo.run(extended(run, model_folder, pairs_file, training__max_steps=30)) == 0
    told = capsys.readouterr().out
    assert "training.extend has no effect: the run still ends after 8 steps; raise training.epochs" in told
    assert not (run / EXTENDING).exists()


def test_epochs_beyond_the_limit_warn(tmp_path: Path, model_folder: Path, pairs_file: Path, capsys: Any) -> None:
    run = _finished(tmp_path, model_folder, pairs_file)
    assert dpo.run(extended(run, model_folder, pairs_file, training__max_steps=5, training__epochs=3)) == 0
    told = capsys.readouterr().out
    assert "training.extend has no effect: the run still ends after 5 steps; raise training.max_steps" in told


def test_until_its_end_the_earlier_model_is_not_taken_for_its_own(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = _finished(tmp_path, model_folder, pairs_file)
    assert (read_run(run).state, exported_step(run)) == ("finished", None)
    write_result(run / EVALUATIONS / "preferences", Result("preferences", "run", [], {}))
    longer = extended(run, model_folder, pairs_file, training__max_steps=8)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 2, terminate)  # after step 7
        assert dpo.run(longer) == STOPPED
    assert (read_run(run).state, exported_step(run)) == ("unfinished", 7)
    assert find_source(str(run)).folder.name == "step-00000007"
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "the run has not finished" in capsys.readouterr().out
    assert dpo.run(longer) == 0
    assert (read_run(run).state, exported_step(run), read_run(run).results) == ("finished", None, [])
    (aside,) = run.glob("previous-*")
    assert [path.name for path in aside.glob("evaluations/*/*")] == ["result.json"]


def test_without_a_run_or_its_checkpoint_there_is_nothing_to_extend(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    with pytest.raises(ValueError, match=r"training\.extend: .*nowhere holds no run that could be extended"):
        dpo.run(extended(tmp_path / "nowhere", model_folder, pairs_file))
    run = _finished(tmp_path, model_folder, pairs_file)
    (run / "checkpoints").rename(run / "gone")
    with pytest.raises(ValueError, match="has no checkpoint to continue from"):
        dpo.run(extended(run, model_folder, pairs_file, training__max_steps=8))


def test_patience_begins_anew_in_an_extended_run_and_the_best_stays(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    scripted(monkeypatch, {2: 0.5, 4: 0.6, 6: 0.7, 8: 0.6, 10: 0.6, 12: 0.4})
    best = {"training__best_metric": "eval_loss", "training__early_stopping_patience": 2, "training__epochs": 5}
    run = _finished(tmp_path, model_folder, pairs_file, **best, training__max_steps=8)
    assert read_metrics(run)[-1]["step"] == 6
    capsys.readouterr()
    longer = extended(run, model_folder, pairs_file, **best, training__max_steps=20)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 3, kill)
        with pytest.raises(Killed):
            dpo.run(longer)
    assert dpo.run(longer) == 0
    assert read_metrics(run)[-1]["step"] == 10  # two more evaluations
    assert "the model of step 2 is exported, the best one: eval_loss 0.5" in capsys.readouterr().out
