"""The entries as a user starts them: processes, exit codes, and who speaks."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import read_metrics, settings, write_pairs
from toys import assets_dir, toy_model_folder

from notus.config import load_config
from notus.training import dpo, sft

ROOT = Path(__file__).resolve().parents[1]


def _start(*words: str | Path, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, *(str(word) for word in words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entry")
    model, pairs = toy_model_folder(folder / "model"), write_pairs(folder / "pairs.jsonl", 8)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings(folder / "run", model, pairs)))
    return path


@pytest.mark.slow
def test_two_ranks_by_torchrun_log_the_same_losses_as_plain_python(config_file: Path) -> None:
    folder = config_file.parent
    losses = []
    for name, ranks, entry in (("one", 0, ["train_dpo.py"]), ("two", 2, ["-m", "notus", "dpo"])):
        done = _start(*entry, config_file, f"--training.output_dir={folder / name}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in read_metrics(folder / name)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    again = _start("-m", "notus", "dpo", config_file, f"--training.output_dir={folder / 'one'}")
    assert again.returncode == 0
    assert "finished" in again.stdout


def test_a_mistake_is_one_line_and_exit_code_1(config_file: Path) -> None:
    done = _start("train_dpo.py", config_file, "--dpo.betta=0.2")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "dpo.betta" in line
    assert "did you mean 'beta'" in line


def test_one_of_two_ranks_reports_the_mistake(config_file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n{"prompt": "a", "chosen"\n')
    done = _start(
        "train_dpo.py", config_file, f"--data.train={bad}", f"--training.output_dir={tmp_path / 'run'}", ranks=2
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "bad.jsonl" in errors[0]
    assert "2" in errors[0]
    assert "]: Traceback" not in done.stderr  # torchrun prints one of its own, the ranks none


@pytest.mark.parametrize("lora", [[], ["--lora.rank=4"]], ids=["full", "lora"])
def test_real_pairs_on_a_real_model(lora: list[str], tmp_path: Path) -> None:
    assets = assets_dir()
    if assets is None:
        pytest.skip("the optional test data is not here")
    pairs = json.loads((assets / "preferences" / "dpo_en_demo.json").read_text())[:40]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    tree = settings(
        tmp_path / "run", assets / "stories260K", tmp_path / "pairs.json", data__max_length=256,
        data__max_prompt_length=128, data__eval_size=8, training__batch_size=8, training__tokens_per_row=2048,
        training__learning_rate=1e-5, training__epochs=2,
    )  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = _start("train_dpo.py", path, *lora)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert lines[-1]["loss"] < 0.69
    assert lines[-1]["eval_logps/chosen"] < 0


def test_a_mistake_under_another_launcher_is_one_line_too(config_file: Path) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environment = {**os.environ, **launched}
    command = [sys.executable, "train_dpo.py", str(config_file), "--dpo.betta=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr


def test_a_mistyped_optimisation_is_reported_before_any_work(config_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "NOTUS_DISABLE": "fused"}
    command = [sys.executable, "train_dpo.py", str(config_file), f"--training.output_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert done.stderr.startswith("error: NOTUS_DISABLE")
    assert "'fused'" in done.stderr
    assert not (tmp_path / "run").exists()


# Stops an entry at its first import of torch, and prints what torch would read.
FIRST_IMPORT = """
import os, runpy, sys

class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Stop())
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
run = runpy.run_module if sys.argv[0] == "notus" else runpy.run_path
run(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, "expandable_segments:True None"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64 None"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None max_split_size_mb:64"),
    ],
)
@pytest.mark.parametrize("entry", ["train_dpo.py", "train_sft.py", "notus reference"])
def test_gpu_memory_may_grow_unless_the_user_has_configured_it(
    entry: str, given: dict[str, str], seen: str, config_file: Path
) -> None:
    path = config_file
    if entry == "train_sft.py":
        path = config_file.with_name("sft.yaml")
        tree = yaml.safe_load(config_file.read_text())
        path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if key not in ("dpo", "reference")}))
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | given
    words = [*entry.split(), str(path)]
    command = [sys.executable, "-c", FIRST_IMPORT, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[0] == seen, done.stderr


@pytest.mark.parametrize(
    "command", ["python train_dpo.py", "python train_sft.py", "python -m notus dpo", "torchrun -m notus sft"]
)
def test_usage_names_the_command_as_it_was_called(command: str) -> None:
    """Without arguments: one line and exit code 1."""
    launcher, *words = command.split()
    environment = {**os.environ, **({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"} if launcher == "torchrun" else {})}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    usage = f"error: usage: {command} CONFIG.yaml [--section.key=value ...]; `{command} --help` lists every key\n"
    assert done.stderr == usage


STARTERS = {
    "dpo": ("prompt", "chosen", "rejected"),
    "dpo-lora": ("prompt", "chosen", "rejected"),
    "sft": ("prompt", "completion"),
}


@pytest.mark.parametrize("name", STARTERS)
def test_a_starter_config_trains_on_a_file_of_ones_own(name: str, config_file: Path, tmp_path: Path) -> None:
    """As it stands, on a CPU: only the model, the data and the run's folder are given."""
    columns, table = STARTERS[name], tmp_path / "mine.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for number in range(20):
            writer.writerow([f"What is {number}, plus one?", f"It is {number + 1}.", "No idea."][: len(columns)])
    model, run = config_file.parent / "model", tmp_path / "run"
    given = {"model.name_or_path": model, "data.train": table, "training.output_dir": run}
    words = [f"--{key}={value}" for key, value in given.items()]
    config = load_config([str(ROOT / "configs" / f"{name}.yaml"), *words, f"--data.cache_dir={tmp_path}"], name[:3])
    assert (sft if config.task == "sft" else dpo).run(config) == 0
    lines = read_metrics(run)
    assert len(lines) == {"dpo": 1, "dpo-lora": 2, "sft": 2}[name]  # 19 rows are left: batches of 32, 16, 32; 2 epochs
    assert lines[-1]["eval_loss"] > 0
    if config.task == "dpo":
        assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-3)  # bf16
    weights = "adapter_model.safetensors" if name == "dpo-lora" else "model.safetensors"
    assert (run / "model" / weights).is_file()
