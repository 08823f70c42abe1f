import dataclasses
from pathlib import Path

import pytest
import torch
from runs import config
from toys import toy_model

from notus.model.size import model_size
from notus.training import memory_estimate as automatic
from notus.training.dpo import run
from notus.training.memory_estimate import (
    CHECKPOINTING,
    RUNTIME_MARGIN,
    Job,
    capacity_of,
    choose_checkpointing,
    footprint,
)

JOB = Job(shard_size=1, tokens_per_row=400, scored_per_row=200, precision="fp32")


def test_the_fastest_that_fits(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = toy_model(num_hidden_layers=16)
    need = {
        mode: RUNTIME_MARGIN
        + footprint(model_size(model), dataclasses.replace(JOB, activation_checkpointing=mode)).total
        for mode in CHECKPOINTING
    }
    fitting = [(need[mode], mode) for mode in CHECKPOINTING[:-1]]
    for capacity, expected in (*fitting, (need["full"] - 1, "full")):
        monkeypatch.setattr(automatic, "capacity_of", lambda _, capacity=capacity: capacity)
        assert choose_checkpointing(model, JOB, device) == expected
    told = capsys.readouterr().out.splitlines()
    assert [line.startswith("warning: ") for line in told] == [False, False, False, True]
    assert "training.activation_checkpointing=auto: none, estimated to need 3.0 GiB per rank of 3.0 GiB" in told[0]


def test_ranks_of_a_node_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "_available", lambda: 80)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert capacity_of(torch.device("cpu")) == 20


def test_a_run_chooses(tmp_path: Path, model_folder: Path, pairs_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = config("dpo", tmp_path, model_folder, pairs_file, training__activation_checkpointing="auto",
                 training__max_steps=1)  # fmt: skip
    assert run(job) == 0
    assert "training.activation_checkpointing=auto: none, estimated" in capfd.readouterr().out


def test_offload_without_a_gpu_is_refused(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    job = config("dpo", tmp_path, model_folder, pairs_file, training__cpu_offload=True)
    with pytest.raises(ValueError, match=r"training\.cpu_offload has no effect without a GPU"):
        run(job)
