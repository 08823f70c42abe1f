"""The shares of a step's time: of operations on CPU, of kernels on CUDA (with events made by hand)."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType


@pytest.fixture
def profile_step(benchmarks):
    return importlib.import_module("profile_step")


def event(name, start, end, parent=None, own=0.0, kernels=(), device=DeviceType.CPU, annotation=False):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name, time_range=span, cpu_parent=parent, self_cpu_time_total=own, device_type=device,
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        is_user_annotation=annotation,
    )  # fmt: skip


def test_operations_on_cpu_by_hand(profile_step):
    head = event("_LinearLogprobs", 50, 80, own=2)
    events = [
        event("aten::mm", 0, 40, own=40),
        event("aten::transpose", 40, 45, own=5),
        head,
        event("aten::mm", 50, 78, parent=head, own=28),
        event("aten::silu", 80, 90, own=10),
        event("Optimizer.step#RMSprop.step", 90, 100, own=10),
    ]
    found = profile_step.shares(events)
    expected = {"matmul": 0.4, "head": 0.3, "elementwise": 0.1, "optimizer": 0.1, "host": 0.1}
    assert found == pytest.approx({kind: expected.get(kind, 0.0) for kind in profile_step.KINDS})


def test_kernels_on_cuda_by_hand(profile_step):
    step = event("Optimizer.step#RMSprop.step", 0, 10)
    events = [
        event("aten::mm", 0, 1, kernels=[("sm90_gemm", 30)]),
        event("aten::mul", 1, 2, parent=step, kernels=[("elementwise_kernel", 20)]),
        event("sm90_gemm", 10, 40, device=DeviceType.CUDA),
        event("elementwise_kernel", 40, 60, device=DeviceType.CUDA),
        event("elementwise_kernel", 60, 70, device=DeviceType.CUDA),  # nobody owns up to it
        event("triton_poi_fused_mul", 80, 90, device=DeviceType.CUDA),
        event("Optimizer.step#RMSprop.step", 40, 60, device=DeviceType.CUDA, annotation=True),
        event("flash_fwd_kernel", 90, 100, device=DeviceType.CUDA),
    ]
    found = profile_step.shares(events)
    expected = {"matmul": 0.3, "optimizer": 0.2, "elementwise": 0.2, "attention": 0.1, "host": 0.2}
    assert found == pytest.approx({kind: expected.get(kind, 0.0) for kind in profile_step.KINDS})


def test_a_real_step_on_cpu(profile_step):
    layer = torch.nn.Linear(512, 512)
    optimizer = torch.optim.RMSprop(layer.parameters())
    inputs = torch.randn(1024, 512)

    def step():
        layer(inputs).sum().backward()
        optimizer.step()

    step()
    found = profile_step.profiled(step, steps=3)
    assert sum(found.values()) == pytest.approx(1)
    assert found["matmul"] > found["optimizer"] > 0
    assert found["head"] == found["attention"] == 0
    assert profile_step.table(found).count("\n") == 1 + len(profile_step.KINDS)
