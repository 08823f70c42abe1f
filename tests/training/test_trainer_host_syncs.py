"""How often the host waits for the device: once in a step, never in a row of the reference pass.

On fake CUDA tensors, so that no GPU is needed; `test_the_host_waits_once` holds a real one to it.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, fake_cuda, move
from rated import write_labels, write_lists
from runs import config, write_pairs
from toys import toy_model, toy_model_folder

from notus.config import TrainingConfig
from notus.data.batching import StepPlan
from notus.data.dataset import mismatched
from notus.model.attention import IMPLEMENTATION
from notus.model.fused import fuse
from notus.model.policy import Policy
from notus.training import scoring
from notus.training.checkpoint import Progress
from notus.training.dpo import DPOTask, LogRatioMean, Preferences
from notus.training.optimizers import build_optimizer
from notus.training.setup import start
from notus.training.sft import SFTTask
from notus.training.trainer import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "sft": {},
    "tokens": {"dpo__ld_alpha": 0.5, "dpo__wpo": True, "dpo__nll_weight": 1.0},
    "lists": {"dpo__loss_type": "plackett_luce"},
    "labels": {"dpo__loss_type": "bco"},
    "mismatched": {"dpo__loss_type": "kto"},
}


@pytest.fixture(params=KINDS)
def job(request: pytest.FixtureRequest, tmp_path: Path):
    kind, data = request.param, tmp_path / "data.jsonl"
    {"lists": write_lists, "labels": write_labels, "mismatched": write_labels}.get(kind, write_pairs)(data, 11)
    task = "sft" if kind == "sft" else "dpo"
    with start(config(task, tmp_path / "run", toy_model_folder(tmp_path / "model"), data, **KINDS[kind])) as found:
        found.kind = kind
        yield found


@pytest.fixture
def without_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo takes no fake tensors, and CUDA no device of a machine without one."""
    monkeypatch.setattr("notus.training.gradient_clipping.sum_across_ranks", lambda tensor: tensor)
    monkeypatch.setattr("notus.training.scoring.sum_across_ranks", lambda tensor: tensor)
    monkeypatch.setattr("notus.training.dpo.sum_across_ranks", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        "notus.training.optimizers.PiecewiseOptimizer._noise", lambda *_: None
    )  # a generator on the device


def fast_policy(dtype: torch.dtype) -> Policy:
    model = toy_model().to(dtype)
    model.set_attn_implementation(IMPLEMENTATION)
    fuse(model)
    return Policy(model)


def task_of(job: Any, device: torch.device) -> DPOTask | SFTTask:
    rows, plan = job.train_rows, StepPlan(11, 8)
    others = mismatched(rows, 120) if job.kind == "mismatched" else rows
    longest = max(int(each.lengths.max()) for each in (rows, others))
    options: dict[str, Any] = {"plan": plan, "tokens_per_row": longest, "device": device}
    if job.kind == "sft":
        return SFTTask(rows, None, **options)
    data = Preferences(rows, torch.zeros(len(rows), rows.num_branches))
    if job.kind == "tokens":
        data.public_reference = torch.zeros(len(rows), 2)
    if job.kind == "lists":
        data.ratings = torch.from_numpy(rows.ratings).nan_to_num()
    if job.kind in ("labels", "mismatched"):
        data.labels = torch.from_numpy(rows.labels)
    if job.kind == "mismatched":
        data.mismatched = Preferences(others, torch.zeros(len(rows), 1))
    return DPOTask(data, None, config=job.config.dpo, precision="bf16", **options)


def trainer_of(task: DPOTask | SFTTask, policy: Policy, optimizer: str, device: torch.device) -> Trainer:
    nothing: Any = None
    return Trainer(
        policy,
        build_optimizer(policy.parameters(), name=optimizer, learning_rate=1e-3, weight_decay=0.0),
        task,
        TrainingConfig(output_dir="run", learning_rate=1e-3, tokens_per_row=int(task.rows.lengths.max())),
        total_steps=2,
        progress=Progress(),
        tracker=nothing,
        checkpoints=SimpleNamespace(failed=lambda: False, wait=lambda: None),  # type: ignore[arg-type]
        stop=SimpleNamespace(signalled=True, overdue=False),  # type: ignore[arg-type]
        meter=nothing,
        sample=None,
        device=device,
    )


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_a_step_makes_the_host_wait_once(
    optimizer: str, job: Any, without_a_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = fast_policy(torch.float32)  # as FSDP's masters; the kernels of bf16 are called elsewhere

    def backward(loss: torch.Tensor) -> None:
        assert loss.device == CUDA
        for parameter in policy.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    is_labelled = job.kind == "labels"  # the tensor that it keeps on the device is a fake one, so made within
    task = task_of(job, job.device if is_labelled else CUDA)  # its reference is real: the feed's thread reads it
    with fake_cuda() as waits:
        if is_labelled:
            task._log_ratios = LogRatioMean(CUDA)
        trainer = trainer_of(task, move(policy), optimizer, CUDA)
        with trainer._dataloader() as loader:
            waits.found.clear()
            assert trainer._step(0, loader) is None  # a fake tensor's values are read as zeros
            assert waits.copies > 20  # there were rows, and they came over
            assert waits.found == ["tolist"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_row_of_the_reference_pass_makes_the_host_wait_for_nothing(
    per_token: bool, dtype: torch.dtype, job: Any, without_a_group: None
) -> None:
    rows, policy = job.train_rows, fast_policy(dtype)
    options: dict[str, Any] = {"tokens_per_row": int(rows.lengths.max()), "device": CUDA}
    with fake_cuda() as waits:
        move(policy)
        if per_token:
            size = scoring.score_tokens(policy, rows, **options).shape
        else:
            size = scoring.score(policy, rows, np.arange(len(rows)), **options).shape
        assert waits.copies > 20
        assert waits.found == [f"aten._to_copy.default to the host, {tuple(size)}"]  # the scores, once, at the end


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_waits_once(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("notus.training.gradient_clipping.sum_across_ranks", lambda tensor: tensor)
    reads: list[int] = []

    def tolist(tensor: torch.Tensor) -> list[float]:
        if not tensor.is_cuda:
            return inner(tensor)
        reads.append(tensor.numel())
        torch.cuda.set_sync_debug_mode("default")
        found = inner(tensor)
        torch.cuda.set_sync_debug_mode("error")
        return found

    inner = torch.Tensor.tolist
    trainer = trainer_of(task_of(job, job.device), fast_policy(torch.float32).to(job.device), "rmsprop", job.device)
    with trainer._dataloader() as loader:
        trainer._step(0, loader)  # the first sets libraries up
        monkeypatch.setattr(torch.Tensor, "tolist", tolist)
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer._step(0, loader)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert reads == [5]
