"""docs/coming-from-trl.md: its tables follow foreign_keys, its configs load, and its Python trains."""

import csv
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from runs import read_metrics, write_pairs

from notus.config import Config, load_config
from notus.foreign_keys import TABLES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "coming-from-trl.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_tables_are_those_of_foreign_keys() -> None:
    make = runpy.run_path(str(ROOT / "docs" / "make_coming_from_trl.py"))
    assert make["render"](PAGE) == PAGE, "run: python docs/make_coming_from_trl.py"
    for name, settings in TABLES.items():
        table = PAGE.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
        first_cells = " ".join(line.split(" | ")[0] for line in table.splitlines()[2:])
        assert sorted(re.findall(r"`(\w+)`", first_cells)) == sorted(settings)


def test_every_row_has_a_key_or_says_why_there_is_none() -> None:
    rows = [line.strip("|").split("|") for line in PAGE.splitlines() if re.match(r"\| `\w+`[,|` \w]*\|", line)]
    assert len(rows) > 200
    for _, here, note, *more in rows:
        assert not more, "an unescaped | in a cell"
        assert here.strip().startswith("`") or (here.strip() in ("not needed", "not available") and note.strip())


def test_trls_command_line_has_arguments_that_the_tables_have() -> None:
    (command,) = [block for block in blocks("bash") if block.startswith("trl dpo")]
    names = re.findall(r"--(\w+)", command)
    assert len(names) > 15
    assert set(names) <= {name for table in TABLES.values() for name in table}


def loaded(number: int, folder: Path) -> Config:
    path = folder / f"{number}.yaml"
    path.write_text(blocks("yaml")[number])
    return load_config(path, "dpo")


def test_the_run_is_that_of_trls_command_line(tmp_path: Path) -> None:
    (command,) = [block for block in blocks("bash") if block.startswith("trl dpo")]
    theirs = dict(re.findall(r"--(\w+) ([^\s-]\S*)", command))
    config = loaded(0, tmp_path)
    training, lora = config.training, config.lora
    assert config.model.name_or_path == theirs["model_name_or_path"]
    # one GPU
    assert training.batch_size == int(theirs["per_device_train_batch_size"]) * int(
        theirs["gradient_accumulation_steps"]
    )
    assert training.epochs == int(theirs["num_train_epochs"])
    assert training.learning_rate == float(theirs["learning_rate"])
    assert training.lr_schedule == theirs["lr_scheduler_type"]
    assert training.warmup_ratio == float(theirs["warmup_steps"])  # a share, below 1
    assert (training.eval_every, training.save_every) == (int(theirs["eval_steps"]), int(theirs["save_steps"]))
    assert config.dpo.beta == float(theirs["beta"])
    assert config.data.max_length == int(theirs["max_length"])
    assert (lora.rank, lora.alpha) == (int(theirs["lora_r"]), float(theirs["lora_alpha"]))
    assert (lora.dropout, lora.target_modules) == (float(theirs["lora_dropout"]), theirs["lora_target_modules"])


def source(split: str) -> dict[str, Any]:
    return {"path": "HuggingFaceH4/ultrafeedback_binarized", "split": split, "weight": 1.0}


def test_the_handbooks_recipes_say_the_same_here(tmp_path: Path) -> None:
    """Values of recipes/zephyr-7b-beta/dpo at commits 19f0345 (full) and 4231254 (qlora)."""
    full, qlora = loaded(1, tmp_path), loaded(2, tmp_path)
    for config in (full, qlora):
        training, data = config.training, config.data
        assert (training.epochs, training.lr_schedule, training.warmup_ratio) == (1, "cosine", 0.1)
        assert (training.optimizer, training.weight_decay, training.precision) == ("adamw", 0.0, "bf16")
        assert (training.log_every, training.eval_every, training.save_every) == (10, 100, 100)
        assert (training.keep_checkpoints, training.seed, training.activation_checkpointing) == (1, 42, "full")
        assert (data.max_length, data.max_prompt_length, data.num_workers) == (1024, 512, 12)
        assert (config.dpo.beta, config.dpo.loss_type) == (0.01, "sigmoid")
    assert full.model.name_or_path == "alignment-handbook/zephyr-7b-sft-full"
    assert full.training.batch_size == 8 * 2 * 8
    assert full.training.learning_rate == 5e-7
    assert full.data.train == [source("train_prefs"), source("test_prefs")]
    assert full.data.eval_size == 2000
    assert full.lora.rank == 0
    assert (qlora.model.name_or_path, qlora.model.quantization) == ("alignment-handbook/zephyr-7b-sft-qlora", "nf4")
    assert qlora.training.batch_size == 4 * 1 * 8
    assert qlora.training.learning_rate == 5e-6
    assert (qlora.data.train, qlora.data.eval) == ([source("train_prefs")], [source("test_prefs")])
    assert (qlora.lora.rank, qlora.lora.alpha, qlora.lora.dropout) == (16, 16, 0.05)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert qlora.lora.target_modules == modules


def test_the_python_trains(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl", 20).read_text().splitlines()]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(rows)
    _, ours = blocks("python")
    assert "Qwen/Qwen2.5-0.5B-Instruct" in ours
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    exec(ours.replace("Qwen/Qwen2.5-0.5B-Instruct", str(model_folder)), {})
    assert len(read_metrics(tmp_path / "runs" / "notus")) == 2  # 19 pairs in steps of 16
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1
    assert (tmp_path / "runs" / "notus" / "model" / "adapter_config.json").is_file()
