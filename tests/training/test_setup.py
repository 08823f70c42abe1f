from pathlib import Path
from typing import Any

import pytest
import torch
from disks import largest_file
from runs import config
from safetensors.torch import load_file

from notus.training import dpo, setup


def test_a_disk_that_fills_up_at_the_export_costs_nothing_but_the_export(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("dpo", tmp_path / "run", model_folder, pairs_file, training__max_steps=2)
    export_model = setup.export_model

    def on_full_disk(*args: Any, **options: Any) -> None:
        with largest_file(20_000):
            export_model(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(setup, "export_model", on_full_disk)
        with pytest.raises(OSError, match=r"run/model: cannot be written \(.*File too large.* GB free in"):
            dpo.run(settings)
    assert not (tmp_path / "run" / "model").exists()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    dpo.run(settings)  # the same command resumes from the last checkpoint
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    dpo.run(config("dpo", tmp_path / "undisturbed", model_folder, pairs_file, training__max_steps=2))
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "undisturbed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
