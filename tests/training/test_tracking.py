import json
import os
import sys
from pathlib import Path

import pytest
import torch
from disks import largest_file

from notus.runtime import switches
from notus.training import tracking
from notus.training.tracking import EnvironmentFile, Eta, MetricsFile, ProgressBar, Tracker, hardware


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


@pytest.mark.parametrize("end", [b"", b'{"step": 4, "lo', b"\x00\x00\xff\n", b"[4]\n", b'{"step": 2}'])
def test_a_last_line_that_is_not_whole_is_cut(end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + end)
    MetricsFile(path, resume_step=9).close()
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("garbage", [b"\xff\xfe\x00", b"[1]", b'{"loss": 1}', b"null", b"once upon a time"])
def test_a_file_of_something_else_is_left_alone(garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before := b'{"step": 1}\n' + garbage + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a line of metrics; restore the file"):
        MetricsFile(path, resume_step=3)
    assert path.read_bytes() == before


def _log(sink: MetricsFile, steps: range) -> None:
    with Tracker([sink]) as tracker:
        for step in steps:
            tracker.log(step, {"loss": 0.125})


def test_metrics_that_the_disk_does_not_take_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    told = r"metrics\.jsonl: cannot be written \(File too large\); .* GB free in"
    with largest_file(100), pytest.raises(OSError, match=told):
        _log(MetricsFile(path, resume_step=0), range(1, 9))  # lines of 27 bytes
    assert path.stat().st_size == 100
    with largest_file(50), pytest.raises(OSError, match=told):
        MetricsFile(path, resume_step=9)
    MetricsFile(path, resume_step=9).close()  # the part of a line that was written is cut
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(total_steps=3, start_step=0, seconds_between=60)
    for step in (1, 2, 3):
        bar.log(step, {"loss": step / 10, "rewards/margins": 2.0})
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:3] for line in lines] == [
        ["step 1/3", "loss 0.1", "margin 2"],
        ["step 3/3", "loss 0.3", "margin 2"],  # between the first and the last, one a minute
    ]


PAIRS = {
    "loss": 0.625, "rewards/chosen": 0.1, "rewards/rejected": -0.2, "rewards/margins": 0.3, "rewards/accuracies": 0.75,
    "logps/chosen": -55.5, "logps/rejected": -58.25, "logps/chosen_change": 0.5,
}  # fmt: skip
SHORT = "accuracy 0.75  margin 0.3  "
REWARDS = "chosen reward 0.1  rejected reward -0.2"


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        (PAIRS, f"loss 0.625  {SHORT}{REWARDS}"),
        ({**PAIRS, "rewards/top_1": 0.5, "rewards/kendall_tau": 0.25},
         f"loss 0.625  tau 0.25  top-1 0.5  {SHORT}chosen reward 0.1"),
        ({**PAIRS, "kl": 0.125}, f"loss 0.625  {SHORT}kl 0.125  {REWARDS}"),
        ({"loss": 2.5}, "loss 2.5"),
    ],
    ids=["pairs", "lists", "labels", "sft"],
)  # fmt: skip
def test_an_evaluation_is_one_short_line(
    metrics: dict[str, float], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = ProgressBar(total_steps=9, start_step=0, seconds_between=60)
    bar.log(1, {"loss": 1.0})
    bar.log(2, {"loss": 1.0, **{f"eval_{name}": value for name, value in metrics.items()}})
    assert capsys.readouterr().out.splitlines()[1:] == [f"evaluation at step 2: {line}"]


def test_the_eta_counts_steps_and_evaluations_apart() -> None:
    # steps of 2 s, evaluations of 30 s, at 10, 20, ..., 90 and at the last step, 95; compiling takes 490 s
    eta = Eta(total_steps=95, step=0, eval_every=10, now=1000.0)
    assert eta.update(5, 1500.0, evaluated=False) == 90 * 100.0  # all that is known so far
    assert eta.update(10, 1540.0, evaluated=True) == 85 * 8.0  # the first interval does not count any more
    assert eta.update(15, 1550.0, evaluated=False) == 80 * 2.0 + 9 * 30.0
    assert eta.update(20, 1590.0, evaluated=True) == 75 * 2.0 + 8 * 30.0
    assert eta.update(95, 9999.0, evaluated=True) == 0.0


def test_the_eta_of_a_resumed_run_counts_its_own_steps_alone() -> None:
    eta = Eta(total_steps=1000, step=900, eval_every=None, now=0.0)
    assert eta.update(910, 50.0, evaluated=False) == 90 * 5.0
    assert eta.update(920, 60.0, evaluated=False) == 80 * 1.0


def test_the_eta_follows_a_machine_that_becomes_slower() -> None:
    eta = Eta(total_steps=10**6, step=0, eval_every=None, now=0.0)
    now = 0.0
    for step in range(1, 200):
        now += 1.0 if step < 100 else 3.0
        left = eta.update(step, now, evaluated=False)
    assert left == (10**6 - 199) * 3.0


def test_a_line_without_a_step_says_nothing_of_the_eta() -> None:
    """A resumed run makes up for the evaluation that a signal kept it from."""
    eta = Eta(total_steps=10, step=5, eval_every=5, now=0.0)
    assert eta.update(5, 60.0, evaluated=True) is None
    assert eta.update(6, 62.0, evaluated=False) == 4 * 2.0


def test_the_bar_shows_the_eta_and_evaluations_above_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 20.0, 22.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = ProgressBar(total_steps=3602, start_step=0)
    for step in (1, 2):
        bar.log(step, {"loss": 0.5, "eval_loss": 0.25} if step == 1 else {"loss": 0.5})
    bar.close()
    shown = capsys.readouterr()
    assert "loss 0.5  ETA 2:00:00" in shown.err
    assert "left" not in shown.err
    assert shown.out == "evaluation at step 1: loss 0.25\n"


@pytest.mark.parametrize("content", [None, b'{"step": 1}\n{"step": 2}\n'])
def test_lost_lines_are_told(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    MetricsFile(path, resume_step=5, last_logged=4).close()
    assert "has lost lines: step 4 was logged, and is not there" in capsys.readouterr().out
    path.write_bytes(b'{"step": 2}\n{"step": 4}\n{"step": 6}\n')
    MetricsFile(path, resume_step=5, last_logged=4).close()
    assert "lost" not in capsys.readouterr().out
    assert path.read_bytes() == b'{"step": 2}\n{"step": 4}\n'


def test_hardware(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware(device) == f"CPU, {os.cpu_count()} cores"
    monkeypatch.setattr(tracking, "gather_objects", lambda name: [name, name, "B", name])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A")
    assert hardware(torch.device("cuda", 0)) == "3 x A, 1 x B"


def test_launches_add_up(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    path = tmp_path / "environment.json"
    first = EnvironmentFile(path, step=0, hardware="2 x A")
    now[0] += 10
    first.sync(4)
    now[0] += 5  # lost: killed without a word
    with switches.disabled("fp32_addmm"):
        again = EnvironmentFile(path, step=4, hardware="1 x B")
    now[0] += 7
    again.sync(6)
    now[0] += 1
    again.close()
    told = json.loads(path.read_text())
    assert [(each["from_step"], each["to_step"], each["seconds"]) for each in told["launches"]] == [
        (0, 4, 10.0),
        (4, 6, 8.0),
    ]
    assert [each["disabled"] for each in told["launches"]] == [[], ["fp32_addmm"]]
    assert (told["seconds"], told["hardware"], told["world_size"]) == (18.0, "1 x B", 1)
    assert torch.__version__.startswith(told["versions"]["torch"])
    assert told["launches"][0]["started"].endswith("+00:00")
    EnvironmentFile(path, step=0, hardware="1 x B")
    (anew,) = json.loads(path.read_text())["launches"]
    assert anew["started"] > told["launches"][1]["started"]  # another run, though it began within the same second


@pytest.mark.parametrize("content", ["{", "[]", '{"launches": 3}', '{"launches": [1]}', '{"launches": [{}]}'])
def test_a_damaged_environment_is_told_and_begun_again(
    content: str, tmp_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "environment.json"
    path.write_text(content)
    EnvironmentFile(path, step=4, hardware="A")
    assert "environment.json is damaged" in capsys.readouterr().out
    assert [launch["from_step"] for launch in json.loads(path.read_text())["launches"]] == [4]
