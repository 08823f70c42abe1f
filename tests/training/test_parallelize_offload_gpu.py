"""Offloaded training on a GPU is the same training. Not run where there is none."""

from pathlib import Path

import pytest
import torch
from runs import config, read_metrics, write_pairs
from safetensors.torch import load_file
from toys import toy_model_folder

from notus.training import dpo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("rank", [0, 4])
def test_offloaded_training_is_the_same(tmp_path: Path, rank: int) -> None:
    model, pairs = toy_model_folder(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 12)
    found, samples = {}, {}
    for offload in (False, True):
        folder = tmp_path / f"run-{offload}"
        options = {"training__cpu_offload": offload, "training__save_every": 1, "tracking__samples": 2}
        if rank:
            options |= {"lora__rank": rank, "lora__alpha": 8.0}
        assert dpo.run(config("dpo", folder, model, pairs, **options)) == 0
        weights = load_file(next((folder / "model").glob("*.safetensors")))
        found[offload] = ([line["loss"] for line in read_metrics(folder)], weights)
        samples[offload] = (folder / "samples.jsonl").read_text()
    assert len(found[True][0]) == 3
    assert samples[True] == samples[False]
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-4)
    for name, expected in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], expected, rtol=1e-4, atol=1e-5)
