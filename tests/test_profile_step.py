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


def test_no_time_of_the_device_counts_twice(profile_step):
    clip = event("clip", 8, 100)
    copy = ("Memcpy DtoH (Device -> Pageable)", 70)
    events = [
        event("aten::mm", 0, 1, kernels=[("sm90_gemm", 50)]),
        event("aten::_foreach_norm", 9, 10, parent=clip, kernels=[("multi_tensor_apply_kernel", 10)]),
        event("aten::copy_", 10, 100, parent=clip, kernels=[copy, ("clip", 75)]),
        # A call and the profiler's own, whose ids are those of other operations: torch shows them the product.
        event("cudaMemcpyAsync", 11, 99, parent=clip, kernels=[("sm90_gemm", 50)]),
        event("Command Buffer Full", 12, 13, parent=clip, kernels=[("sm90_gemm", 50)]),
        # An operation that comes later and lists the same kernel once more.
        event("aten::div", 14, 15, parent=clip, kernels=[("sm90_gemm", 50)]),
        event("sm90_gemm", 20, 70, device=DeviceType.CUDA),
        event("multi_tensor_apply_kernel", 72, 82, device=DeviceType.CUDA),
        event(copy[0], 15, 85, device=DeviceType.CUDA),  # waits from 15 on, and moves 8 bytes at the end
        event("clip", 10, 85, device=DeviceType.CUDA, annotation=True),
        event("Stream Sync", 15, 99, parent=clip, device=DeviceType.CUDA),
    ]
    found = profile_step.shares(events)
    # The copy's own: 15 to 20, 70 to 72, 82 to 85. The device stands idle until 15 and from 85 on.
    expected = {"matmul": 0.5, "optimizer": 0.1 + 0.1, "host": 0.3}
    assert found == pytest.approx({kind: expected.get(kind, 0.0) for kind in profile_step.KINDS})
    assert sum(found.values()) == pytest.approx(1)
    assert profile_step.longest(events, 2) == [("optimizer", copy[0], 70e-6), ("matmul", "sm90_gemm", 50e-6)]


def test_kernels_that_overlap_share_the_time(profile_step):
    reduce = event("FSDP::post_backward_reduce", 0, 5)
    events = [
        event("aten::mm", 0, 5, kernels=[("sm90_gemm", 60)]),
        event("aten::copy_", 1, 2, parent=reduce, kernels=[("copy_kernel", 30)]),
        reduce,
        event("sm90_gemm", 10, 70, device=DeviceType.CUDA),
        event("copy_kernel", 50, 80, device=DeviceType.CUDA),  # on another stream
        event("end", 99, 100),
    ]
    found = profile_step.shares(events)
    expected = {"matmul": 0.4, "communication": 0.3, "host": 0.3}
    assert found == pytest.approx({kind: expected.get(kind, 0.0) for kind in profile_step.KINDS})


def test_a_generated_kernel_is_what_it_does_not_what_its_name_lists(profile_step):
    step = event("Optimizer.step#RMSprop.step", 0, 9)
    names = ["triton_poi_fused__to_copy_mul_silu_0", "triton_red_fused__flash_attention_backward_add_1", "new_kernel"]
    events = [event(name, 10 * n, 10 * n + 10, device=DeviceType.CUDA) for n, name in enumerate(names)]
    events += [event("triton_poi_fused_sqrt_2", 0, 1, parent=step, kernels=[("triton_poi_fused_sqrt_2", 10)])]
    events += [event("triton_poi_fused_sqrt_2", 30, 40, device=DeviceType.CUDA)]
    events += [event("triton_tem_fused_mm_3", 40, 50, device=DeviceType.CUDA)]
    found = profile_step.shares(events)
    expected = {"elementwise": 0.6, "optimizer": 0.2, "matmul": 0.2}
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
