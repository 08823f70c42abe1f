"""The commands of the reproduction guide, run small: a tiny model, local data, two ranks for eight, a few steps.

Each command is the guide's own; hub ids are replaced by local folders and files, and overrides follow.
"""

import contextlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest
from ranks import free_ports, launched, run_ranks
from runs import read_metrics
from toys import toy_model_folder

from notus.__main__ import main
from notus.curation import synthetic

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "reproduce-notus-7b-v1.md").read_text(encoding="utf-8")
BLOCKS = [
    [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
    for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
]
CURATE, ESTIMATES, TRAIN, EVALUATE, RELEASE = BLOCKS
SMALL = [
    "--data.eval_size=6", "--data.num_workers=1", "--training.max_steps=2", "--training.batch_size=4",
    "--training.tokens_per_row=2048", "--training.eval_every=2", "--training.log_every=1",
]  # fmt: skip
TASK = """\
task: small_choice
dataset_path: json
dataset_kwargs: {data_files: FILE}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
SUITES = {
    "preferences": [],
    "open-llm": ["--tasks", "small_choice", "--include-path", "tasks"],
    "alpaca-eval": ["--prompts", "prompts.json", "--max-new-tokens", "4"],
    "mt-bench": ["--questions", "questions.jsonl", "--max-new-tokens", "4"],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project's files, a toy model, and small data of each kind."""
    folder = tmp_path_factory.mktemp("reproduce")
    for name in ("notus", "configs", "train_sft.py", "train_dpo.py"):
        (folder / name).symlink_to(ROOT / name)
    toy_model_folder(folder / "zephyr-7b-sft-full", max_position_embeddings=2048)
    (prompts,) = synthetic.make_prompts([40], seed=0)
    records = synthetic.ultrafeedback_records(prompts, seed=0)
    write(folder / "UltraFeedback.jsonl", records)
    write(folder / "questions.jsonl", [{"question_id": 1, "category": "math", "turns": ["One?", "Two?"]}])
    (folder / "prompts.json").write_text(json.dumps([{"instruction": "Say it.", "dataset": "small"}]))
    (folder / "tasks").mkdir()
    write(folder / "choices.jsonl", [{"question": "Yes or no?", "choices": [" yes", " no"], "label": 1}] * 3)
    (folder / "tasks" / "small_choice.yaml").write_text(TASK.replace("FILE", str(folder / "choices.jsonl")))
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words_of(command: str) -> list[str]:
    """The words that follow `notus` in a command of the guide; whoever calls starts the ranks."""
    words = shlex.split(command.replace("openbmb/UltraFeedback", "UltraFeedback.jsonl"))
    if words[0] == "torchrun":
        assert words[1] == "--nproc-per-node=8", command
        words = ["python", *words[2:]]
    starts = {("python", "train_dpo.py"): ["dpo"], ("python", "-m", "notus"): []}
    for start, command_name in starts.items():
        if tuple(words[: len(start)]) == start:
            return [*command_name, *words[len(start) :]]
    raise AssertionError(command)


def run(command: str, folder: Path, *extra: str) -> None:
    """One command of the guide for one process, in this one, which has imported everything."""
    with contextlib.chdir(folder):
        assert main([*words_of(command), *extra]) == 0, command


def run_ranks_of(commands: list[str], folder: Path, extra: list[list[str]]) -> None:
    """Commands for torchrun, one after the other, on the same two ranks; two stand for eight."""
    words = [[*words_of(command), *more] for command, more in zip(commands, extra, strict=True)]
    run_ranks(_rank, 2, folder, words, free_ports(len(words)), folder)


def _rank(commands: list[list[str]], ports: list[int], folder: Path) -> None:
    os.chdir(folder)
    for words, port in zip(commands, ports, strict=True):
        with launched(port):
            assert main(words) == 0, words


@pytest.fixture(scope="module")
def trained(work: Path) -> Path:
    """After steps 2 and 3 of the guide."""
    (command,) = CURATE
    run(command, work)
    data = ["--model.name_or_path=zephyr-7b-sft-full", "--data.train=runs/notus-7b-v1/pairs.parquet", *SMALL]
    extra = [[*data, *(["--lora.rank=4"] if "dpo-lora" in command else [])] for command in TRAIN]
    many = [command.startswith("torchrun") for command in TRAIN]
    assert many == [True, True, False, False]
    run_ranks_of(TRAIN[:2], work, extra[:2])
    for command, more in zip(TRAIN[2:], extra[2:], strict=True):
        run(command, work, *more)
    return work


def test_what_is_trained_begins_at_ln_2_and_does_not_depend_on_the_gpus(trained: Path) -> None:
    runs = trained / "runs" / "notus-7b-v1"
    for name in ("dpo-full", "dpo-lora"):
        many, one = read_metrics(runs / name), read_metrics(runs / f"{name}-1")
        assert many[0]["loss"] == pytest.approx(0.693147, abs=5e-3)
        assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in many], abs=2e-3)  # bf16
        assert "eval_rewards/accuracies" in many[-1]


def test_every_suite_leaves_its_result_for_report_and_card(trained: Path) -> None:
    suites = [(re.search(r"--suite (\S+)", command) or ["", "preferences"])[1] for command in EVALUATE]
    run_ranks_of(EVALUATE, trained, [SUITES[suite] for suite in suites])
    found = trained / "runs" / "notus-7b-v1" / "dpo-full" / "evaluations"
    assert (found / "preferences" / "result.json").is_file()
    assert "small_choice" in (found / "open-llm" / "table.md").read_text()
    for command in RELEASE:
        run(command, trained)
    runs = trained / "runs" / "notus-7b-v1"
    assert "small_choice" in (runs / "report.html").read_text()
    assert "model-index" in (runs / "release" / "full" / "README.md").read_text()
    assert (runs / "release" / "adapter" / "adapter_model.safetensors").is_file()
    assert (runs / "release" / "merged" / "model.safetensors").is_file()


def test_memory_and_hours_are_the_estimators(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = re.findall(r"^\| (?:full|LoRA) \|.*\| ([\d.]+) \| ([\d.]+) \|$", GUIDE, re.MULTILINE)
    assert len(rows) == len(ESTIMATES) == 4
    for command, row in zip(ESTIMATES, rows, strict=True):
        assert main(shlex.split(command)[3:]) == 0
        told = capsys.readouterr().out
        gib, hours = (float(figure) for figure in re.findall(r"in all +([\d.]+)", told))
        assert (f"{gib:.1f}", f"{hours:.1f}") == row
