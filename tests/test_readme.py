"""The README's commands, run as they stand in a folder of their own.

What is changed: the environment is the one that runs the tests, and training after the demo stops after a few steps.
What trains runs in processes of its own. The other `notus` commands run in this one, since each would import torch and
transformers again, which takes longer than most of them work.
"""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from notus import __main__ as entry

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)]
INSTALL, OWN, USE, DEMO, PATH, LISTS, DATA, PUBLISH, FEEDBACK, STEPS, ESTIMATE, TESTS = BLOCKS
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
IN_A_PROCESS = ("demo", "dpo", "sft")
SHORT = ["--training.max_steps=3", "--training.warmup_ratio=0.0"]


def _commands(block: str) -> list[str]:
    """Its commands, without comments and without what sets the environment up."""
    lines = [line.strip() for line in block.splitlines() if line.strip() and not line.startswith("#")]
    words = [command.strip() for line in lines for command in line.split("&&")]
    return [command for command in words if "-m venv" not in command and "pip install" not in command]


def _run(command: str, folder: Path, *extra: str) -> str:
    words = shlex.split(command)
    called = [*words, *extra][1 if words[0] == "notus" else 3 :]
    if (words[0] == "notus" or words[1:3] == ["-m", "notus"]) and called[0] not in IN_A_PROCESS:
        return _call(called, folder)
    launch = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
        "notus": [sys.executable, "-m", "notus"],
    }
    words = [*launch.get(words[0], [sys.executable]), *words[1:], *extra]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _call(words: list[str], folder: Path) -> str:
    """What a command prints that is called in this process."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        code = entry.main(words)
    assert code == 0, f"{words}\n{printed.getvalue()[-3000:]}"
    return printed.getvalue()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the project's files stand and into which commands may write."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("notus", "configs", "train_sft.py", "train_dpo.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def demo(clone: Path) -> dict[str, float]:
    (command,) = _commands(DEMO)
    _run(command, clone)
    return json.loads((clone / "runs" / "demo" / "summary.json").read_text())


@pytest.mark.slow
def test_the_first_command_learns(demo: dict[str, float]) -> None:
    assert demo["step0_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert 0.3 <= demo["sft_win_rate"] <= 0.7
    assert demo["dpo_win_rate"] >= 0.9
    assert demo["eval_reward_accuracy"] >= 0.85
    assert demo["seconds"] > 0


@pytest.fixture(scope="module")
def own_data(demo: dict[str, float], clone: Path) -> Path:
    """A user's CSV with the README's columns, and prompts to try the model on."""
    header = re.search(r"```csv\n(.*?)\n", README)[1].split(",")
    records = [json.loads(line) for line in (clone / "runs/demo/data/pairs-train.jsonl").read_text().splitlines()[:40]]
    rows = [[record["instruction"], record["chosen_response"], record["rejected_response"]] for record in records]
    with (clone / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    (clone / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt, *_ in rows[:2]), encoding="utf-8")
    return clone


@pytest.mark.slow
def test_own_data_train_an_own_model_that_answers_and_is_merged(own_data: Path) -> None:
    (train,) = _commands(OWN)
    assert HUB_MODEL in train
    output = _run(train.replace(HUB_MODEL, "runs/demo/sft/model"), own_data)
    assert "plain text" not in output  # strings under these columns are turns of a chat
    assert "the model is in runs/mine/model" in output
    assert (own_data / "runs" / "mine" / "model" / "adapter_config.json").is_file()
    for command in _commands(USE):
        _run(command, own_data)
    assert len((own_data / "answers.jsonl").read_text().splitlines()) == 2
    assert (own_data / "runs" / "mine-merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_python_example_trains(own_data: Path) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "notus.train" in block)
    assert HUB_MODEL in code
    (own_data / "example.py").write_text(code.replace(HUB_MODEL, "runs/demo/sft/model"), encoding="utf-8")
    output = _run("python example.py", own_data)
    assert "runs/mine-in-python/model" in output.splitlines()[-1]


@pytest.mark.slow
def test_the_path_runs_on_what_the_demo_left(demo: dict[str, float], clone: Path) -> None:
    commands = _commands(PATH)
    assert len(commands) == 8
    for command in commands:
        trains = "train_sft.py" in command or "train_dpo.py" in command
        _run(command, clone, *(SHORT if trains else []))
    losses = []
    for run in ("demo-dpo", "demo-dpo-2"):
        lines = (clone / "runs" / run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    answers = (clone / "runs" / "answers.jsonl").read_text().splitlines()
    assert all("completion" in json.loads(line) for line in answers)
    assert (clone / "runs" / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_lists_run_from_the_ratings_to_the_report(demo: dict[str, float], clone: Path) -> None:
    curate, curate_eval, train, evaluate, report = _commands(LISTS)
    _run(curate, clone)
    _run(curate_eval, clone)
    _run(train, clone, *SHORT)
    run = clone / "runs" / "demo-lists"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['eval_rewards/kendall_tau']:.4f}" in _run(evaluate, clone)
    _run(report, clone)
    assert "Kendall" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_prompts_become_pairs_and_a_model(demo: dict[str, float], clone: Path) -> None:
    assert _commands(FEEDBACK) == ["python -m notus demo --own-feedback"]  # tests/test_demo.py runs it, smaller
    for command in _commands(STEPS):
        _run(command, clone, *(SHORT if "configs/demo" in command else []))
    records = [json.loads(line) for line in (clone / "runs" / "rated.jsonl").read_text().splitlines()]
    completions = [completion for record in records for completion in record["completions"]]
    assert (len(records), len(completions)) == (400, 1600)
    mean = {
        name: fmean(each["fine-grained_score"] for each in completions if each["model"] == name)
        for name in ("sft", "dpo")
    }
    assert mean["dpo"] > mean["sft"] + 0.5
    assert (clone / "runs" / "own-dpo" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_data_are_shown_as_the_model_sees_them(demo: dict[str, float], clone: Path) -> None:
    text, page = (_run(command, clone) for command in _commands(DATA))
    assert text.count("⟦") == text.count("⟧") >= 4  # the learned part of two pairs
    assert "runs/data.html" in page
    assert "</html>" in (clone / "runs" / "data.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_demos_run_is_measured_shown_described_and_shared_in_four_commands(
    demo: dict[str, float], clone: Path
) -> None:
    commands = _commands(PUBLISH)
    assert len(commands) == 4
    outputs = [_run(command, clone) for command in commands]
    run, release = clone / "runs" / "demo" / "dpo", clone / "runs" / "demo-release"
    accuracy = f"{demo['eval_reward_accuracy']:.4f}"
    assert accuracy in outputs[0]
    percent = f"{100 * demo['eval_reward_accuracy']:.1f}"
    assert percent in (run / "report.html").read_text(encoding="utf-8")
    assert percent in (run / "README.md").read_text(encoding="utf-8")
    assert percent in (release / "README.md").read_text(encoding="utf-8")
    assert (release / "model.safetensors").is_file()


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for part in ("-r requirements.txt -r requirements-dev.txt", "python -m pytest -n 2"):
        assert part in TESTS
        assert part in script


def test_the_estimate_says_what_the_readme_says_of_it(clone: Path) -> None:
    (command,) = _commands(ESTIMATE)
    output = _run(command, clone)
    gib, capacity = re.search(r"in all +([\d.]+)\nFits ([\d.]+) GiB", output).groups()
    hours = re.search(r"in all +([\d.]+) h", output)[1]
    assert f"{float(gib):.1f} GiB of {float(capacity):.1f} and {hours} hours" in README
