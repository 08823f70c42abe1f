"""`benchmarks/qlora_merge.py`: each model is what it is said to be."""

import importlib
from pathlib import Path

import pytest
from runs import config

from notus.training import dpo


def test_each_model_is_what_its_name_says(
    benchmarks: Path, tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    qlora = {"model__quantization": "nf4", "lora__rank": 2, "data__eval_size": 6, "training__learning_rate": 1e-2}
    assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, **qlora)) == 0
    module, output = importlib.import_module("qlora_merge"), tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["qlora_merge.py", str(tmp_path / "run"), "--output", str(output)])
    module.main()
    assert "| merged into the original base |" in capsys.readouterr().out
    found = importlib.import_module("json").loads(output.read_text())
    off = {name: row["mean_difference"] for name, row in found.items()}
    trained, original, dequantised, bare, unquantised = off
    assert off[trained] == 0
    assert 0 < off[dequantised] < 0.02  # rounded to bf16, and nothing else
    assert off[original] > 5 * off[dequantised]  # a toy of random weights, scaled up, has much to lose
    assert off[bare] > off[dequantised]
    assert found[bare]["reward_margin"] == found[unquantised]["reward_margin"] == 0
    assert found[trained]["reward_margin"] == pytest.approx(found[dequantised]["reward_margin"], abs=0.05)
    assert found[trained]["tokens"] > 0
    assert found[trained]["pairs"] == 6
