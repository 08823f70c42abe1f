"""Kernels compiled from pure functions, on a CPU: by the eager backend, and (slow) by the CPU's own compiler."""

import pytest
import torch
from toys import toy_model

from notus.model import fused, kernels
from notus.model.kernels import Kernel
from notus.runtime import switches
from notus.training.activation_checkpointing import checkpointed

CPU = torch.device("cpu")


def kernel_of(function, plain=torch.neg):
    return Kernel(function, plain=plain, switch="fused_elementwise", varying=1)


def _block_gradients(mode, rows):
    model = toy_model()
    fused.fuse(model)
    block = model.model.layers[0]
    block.self_attn.forward = lambda hidden_states, **_: (hidden_states.tanh(), None)
    run = checkpointed(block, mode)
    for count in rows:
        generator = torch.Generator().manual_seed(count)
        hidden = torch.randn(1, count, 32, generator=generator, requires_grad=True)
        (run(hidden) * torch.linspace(-1, 1, 32)).sum().backward()
    return [parameter.grad for parameter in block.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("mode", ["none", "products", "full"])
def test_a_block_with_kernels_is_the_block_without_also_when_checkpointed(kernels_on_cpu, mode):
    found = _block_gradients(mode, [5, 9])
    with switches.disabled("fused_elementwise"):
        expected = _block_gradients("none", [5, 9])
    assert len(found) == len(expected) > 0
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_rows_of_any_length_are_one_graph_each_kernel(kernels_on_cpu):
    torch._dynamo.utils.counters.clear()
    _block_gradients("none", [5, 9, 16, 33])
    # forward and backward of residual + norm, and of SwiGLU
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def test_a_kernel_that_raises_or_is_wrong_is_not_used_and_told():
    def fine(x):
        return x + 1

    def wrong(x):
        return x + 2

    def raises(x):
        raise RuntimeError("no compiler\nmore")

    made = [kernel_of(function) for function in (fine, wrong, raises)]

    def errors(kernel):
        x = torch.zeros(1, 3)
        return (kernel._function(x) - 1).norm().item(), 1e-6

    told = kernels.check(made, errors)
    assert told == [
        "kernel wrong is not used: its relative error is 1.7e+00, more than 1e-06",
        "kernel raises is not used: it cannot be compiled here (no compiler)",
    ]
    assert [kernel.failure is None for kernel in made] == [True, False, False]


def test_a_nan_is_an_error():
    assert kernels.check([kernel_of(torch.neg)], lambda _: (float("nan"), 1.0))


def test_what_fails_on_one_rank_is_used_on_none():
    made = [kernel_of(torch.neg), kernel_of(torch.abs)]
    told = kernels.check(made, lambda _: (0.0, 1.0), lambda mine: [mine, {"abs": "no compiler"}])
    assert told == ["kernel abs is not used: no compiler"]
    assert made[0].failure is None


def test_a_kernel_that_fails_later_hands_over_to_its_twin(kernels_on_cpu, capsys):
    def broken(x):
        raise RuntimeError("a new kind of argument")

    kernel = kernel_of(broken, plain=torch.neg)
    assert kernel(torch.ones(1, 2)).tolist() == [[-1.0, -1.0]]
    assert "warning: kernel broken is not used: it failed (a new kind of argument)" in capsys.readouterr().out
    assert kernel(torch.ones(1, 2)).tolist() == [[-1.0, -1.0]]
    assert capsys.readouterr().out == ""


def test_what_rounds_otherwise_has_another_name(monkeypatch):
    cuda = torch.device("cuda")
    assert fused.rounding(CPU) == ""
    assert fused.rounding(cuda) == "-fused"
    monkeypatch.setattr(fused.TURN, "failure", "no compiler")
    assert fused.rounding(cuda) == "-fused-without-turn"
    with switches.disabled("fused_elementwise"):
        assert fused.rounding(cuda) == ""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_are_their_plain_twins(monkeypatch, dtype):
    torch._dynamo.reset()
    monkeypatch.setattr(Kernel, "usable", lambda self, tensor: True)
    checks = list(fused.fused_checks(CPU, dtype))
    assert len(checks) == 5
    assert all(error <= most for _, error, most in checks), checks
    assert any(error > 0 for _, error, _ in checks)  # they were compiled, and round otherwise


def test_on_a_cpu_nothing_is_compiled():
    assert not fused.SWIGLU.usable(torch.zeros(1))
    assert fused.check_fused(toy_model(), CPU, torch.float32) == []
