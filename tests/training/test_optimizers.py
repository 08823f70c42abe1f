from collections.abc import Callable

import pytest
import torch
from torch import nn

from notus.training import optimizers
from notus.training.optim import build_optimizer
from notus.training.optimizers import round_at_random


def _parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (0, 3), (11,), (4, 4))]


def _train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, first: int = 0) -> None:
    """Noisy gradients towards zero, the same for every optimizer."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = 0.1 * parameter.detach() + 0.1 * noise
        optimizer.step()


def _flat(parameters: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


@pytest.mark.parametrize("chunk", [3, 13, 10**6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("name", "kind"), [("rmsprop", torch.optim.RMSprop), ("adamw", torch.optim.AdamW)])
def test_in_pieces_it_is_torchs_own(
    name: str,
    kind: Callable[..., torch.optim.Optimizer],
    weight_decay: float,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(optimizers.CHUNK, "cpu", chunk)
    ours, theirs = _parameters(), _parameters()
    _train(build_optimizer(ours, name=name, learning_rate=0.01, weight_decay=weight_decay), ours, 5)
    options = {"fused": True} if name == "adamw" else {"foreach": True}
    _train(kind(theirs, lr=0.01, weight_decay=weight_decay, **options), theirs, 5)
    if name == "rmsprop":
        assert torch.equal(_flat(ours), _flat(theirs))
    else:  # the vector units' order within the kernel depends on where a piece ends
        torch.testing.assert_close(_flat(ours), _flat(theirs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "bound"), [("rmsprop", 1e-2), ("adamw", 1e-2)])
def test_the_error_of_bf16_states(name: str, bound: float) -> None:
    """Of 400 steps' change; rounded to nearest instead, the averages stall."""
    found = {}
    for dtype in ("fp32", "bf16"):
        parameters = _parameters()
        before = _flat(parameters)
        optimizer = build_optimizer(parameters, name=name, learning_rate=1e-3, weight_decay=0, state_dtype=dtype)
        _train(optimizer, parameters, 400)
        states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
        assert {state.dtype for state in states} == {optimizers.STATE_DTYPES[dtype]}
        found[dtype] = _flat(parameters) - before
    error = ((found["bf16"] - found["fp32"]).norm() / found["fp32"].norm()).item()
    assert 0 < error < bound


def test_an_average_in_bf16_does_not_stall() -> None:
    """The squares' average is to rise from 0 to 1 by α 0.99: 1 - 0.99^n after n steps of gradient 1."""
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = build_optimizer([parameter], name="rmsprop", learning_rate=0.0, weight_decay=0, state_dtype="bf16")
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(300):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        nearest = (nearest.float() * 0.99 + 0.01).bfloat16()
    expected = 1 - 0.99**300
    assert optimizer.state[parameter]["square_avg"].float().mean().item() == pytest.approx(expected, abs=2e-3)
    assert nearest.item() < 0.85  # what plain rounding comes to, against 0.951


def test_random_rounding_keeps_the_expectation_and_what_is_exact() -> None:
    noise = torch.Generator().manual_seed(0)
    for value in (1 + 2**-9, -3.01, 1e-12):
        rounded = round_at_random(torch.full((20_000,), value), noise).float()
        assert rounded.mean().item() == pytest.approx(value, rel=1e-4)
        assert len(rounded.unique()) == 2
    exact = torch.tensor([0.0, 1.0, -0.5, 2**-100])
    assert torch.equal(round_at_random(exact, noise).float(), exact)
