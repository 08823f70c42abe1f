import resource
from typing import Any

import numpy as np
import pytest
import torch

from notus.config import LoraConfig
from notus.data.batching import StepPlan
from notus.training import throughput
from notus.training.parallelize import build_policy, read_model_config
from notus.training.throughput import Meter, peak_rate


class _Rows:
    """Lengths alone, of three examples."""

    trunk_lengths = np.array([4, 2, 3])
    branch_lengths = np.array([[3, 5], [2, 2], [1, 6]])
    loss_tokens = np.array([[3, 5], [2, 2], [1, 6]])
    lengths = np.array([12, 6, 10])

    def __len__(self) -> int:
        return 3


def _meter(folder: Any, device: torch.device, **options: Any) -> Meter:
    policy = build_policy(folder, read_model_config(folder), device=device, precision="bf16", **options)
    return Meter(policy, _Rows(), StepPlan(3, 2, shuffle=False), device=device, precision="bf16")  # type: ignore[arg-type]


def test_tokens_per_second_are_those_of_the_window_and_a_device_without_a_peak_has_no_utilisation(
    model_folder: Any, device: torch.device
) -> None:
    meter = _meter(model_folder, device)
    # steps 1 and 2 of [0, 1], [2], [0, 1], [2]: rows 2, 0, 1
    assert meter.figures(range(1, 3), 4.0, 1.5) == {
        "system/host_memory_gib": 1.5,
        "system/tokens_per_second": (10 + 12 + 6) / 4.0,
    }
    assert meter.figures(range(3, 3), 0.0, 1.5) == {"system/host_memory_gib": 1.5}


@pytest.mark.parametrize("rank", [0, 2])
def test_utilisation_is_the_necessary_operations_share_of_the_peak(
    rank: int, model_folder: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "peak_rate", lambda *_: 1e6)
    monkeypatch.setattr(throughput, "world_size", lambda: 4)
    adapter = LoraConfig(rank=rank, target_modules=["q_proj"]) if rank else None
    found = _meter(model_folder, device, lora=adapter).figures(range(1, 2), 2.0, 1.0)["system/mfu"]
    # two blocks of 32 x (32 + 16 + 16 + 32) and 3 x 32 x 48 weights, a head of 400 x 32; row 2 alone: 10 tokens, 7 of
    # them scored; pairs of trunk 3, branches 1 and 6: 6 + (3 + 1) + (18 + 21) = 49
    body, head, attention = 2 * 2 * (32 * 96 + 96 * 48) * 10, 2 * 400 * 32 * 7, 4 * 2 * 32 * 49
    work = 3 * (body + head + attention)
    if rank:  # no gradient of the weights, but A [2, 32] and B [32, 2] of two blocks, forward and both gradients
        work = 2 * (body + head) + 3 * attention + 6 * 2 * (2 * 32 + 32 * 2) * 10
    assert found == pytest.approx(work / 2.0 / 1e6 / 4, rel=1e-12)


def test_the_peak_is_the_data_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    assert peak_rate(torch.device("cuda", 0), "bf16") == 312e12
    assert peak_rate(torch.device("cuda", 0), "fp32") == 19.5e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card 9000")
    assert peak_rate(torch.device("cuda", 0), "bf16") is None
    assert peak_rate(torch.device("cpu"), "bf16") is None


def test_memory_is_the_process_peak_on_the_host_and_the_allocators_on_a_gpu(
    model_folder: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = _meter(model_folder, device)
    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])  # touched, so resident
    assert meter.memory() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, rel=0.01)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    meter._device = torch.device("cuda", 0)
    assert meter.memory() == 3.0
    assert meter.figures(range(0), 0.0, 3.0) == {"system/gpu_memory_gib": 3.0}
