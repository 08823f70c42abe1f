import json
from pathlib import Path

import pytest

from notus.training.tracking import MetricsFile, ProgressBar, TensorBoardSink, Tracker, WandbSink


def test_one_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Tracker([MetricsFile(path, resume_step=0)]) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.log(2, {"loss": 0.25})
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'


def test_resuming_drops_the_steps_that_are_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    sink = MetricsFile(path, resume_step=2)
    sink.log(3, {"loss": 1.0})
    sink.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(
        total_steps=3, start_step=0, shown={"loss": "loss", "margin": "rewards/margins"}, seconds_between=60
    )
    for step in (1, 2, 3):
        bar.log(step, {"loss": step / 10, "rewards/margins": 2.0})
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:3] for line in lines] == [
        ["step 1/3", "loss 0.1", "margin 2"],
        ["step 3/3", "loss 0.3", "margin 2"],  # between the first and the last, one a minute
    ]


def test_evaluations_are_always_told(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(total_steps=9, start_step=0, shown={}, seconds_between=60)
    bar.log(1, {})
    bar.log(2, {"eval_loss": 0.625})
    assert "eval_loss 0.625" in capsys.readouterr().out.splitlines()[1]


def test_tensorboard_files_hold_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    sink.log(3, {"rewards/margins": 1.5})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("rewards/margins")] == [(3, 1.5)]


def test_wandb_is_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = WandbSink(project="notus-test", name="toy", folder=tmp_path, config={"dpo": {"beta": 0.1}})
    sink.log(1, {"loss": 0.5})
    sink.close()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
