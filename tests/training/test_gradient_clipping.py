import math

import pytest
import torch
import transformers

from notus.training.gradient_clipping import clip_gradients, gradient_norm, local_gradients
from notus.training.optimizers import build_optimizer, learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("linear", {0: 0.0, 1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("cosine", {0: 0.0, 2: 1.0, 6: 0.5, 4: 0.5 * (1 + math.sqrt(0.5)), 10: 0.0}),
        ("constant", {0: 0.0, 1: 0.5, 2: 1.0, 10: 1.0}),
    ],
)
def test_schedule_at_exact_points(schedule: str, points: dict[int, float]) -> None:
    for step, expected in points.items():
        found = learning_rate_factor(step, total_steps=10, warmup_steps=2, schedule=schedule)
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_is_that_of_transformers(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = transformers.get_scheduler(schedule, optimizer, num_warmup_steps=3, num_training_steps=17)
    for step in range(17):
        found = learning_rate_factor(step, total_steps=17, warmup_steps=3, schedule=schedule)
        assert found == pytest.approx(peer.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        peer.step()


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    assert learning_rate_factor(0, total_steps=5, warmup_steps=0, schedule="linear") == 1.0


def test_clipping_is_that_of_torch(device: torch.device) -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))]
    for parameter in ours:
        parameter.grad = torch.randn_like(parameter)
    peers = [torch.nn.Parameter(torch.zeros_like(parameter)) for parameter in ours]
    for peer, parameter in zip(peers, ours, strict=True):
        peer.grad = parameter.grad.clone()
    gradients = local_gradients(ours)
    norm, _ = gradient_norm(gradients, torch.zeros(1))
    clip_gradients(gradients, norm, 0.5)
    assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(peers, 0.5).item(), rel=1e-6)
    for peer, parameter in zip(peers, ours, strict=True):
        torch.testing.assert_close(parameter.grad, peer.grad)


def test_a_small_gradient_is_left_alone(device: torch.device) -> None:
    gradient = torch.tensor([0.3, 0.4])
    norm, _ = gradient_norm([gradient], torch.zeros(1))
    clip_gradients([gradient], norm, 1.0)
    assert norm.item() == pytest.approx(0.5)
    assert gradient.tolist() == pytest.approx([0.3, 0.4])


def test_flags_travel_with_the_norm(device: torch.device) -> None:
    flags = torch.tensor([True, False, True])
    assert gradient_norm([torch.tensor([3.0, 4.0]), torch.zeros(0)], flags).tolist() == [5.0, 1.0, 0.0, 1.0]
    assert gradient_norm([], flags).tolist() == [0.0, 1.0, 0.0, 1.0]


def test_only_trainable_parameters_are_optimized() -> None:
    free, frozen = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    for name, kind in (("rmsprop", torch.optim.RMSprop), ("adamw", torch.optim.AdamW)):
        optimizer = build_optimizer([free, frozen], name=name, learning_rate=0.1, weight_decay=0.2)
        assert isinstance(optimizer, kind)
        assert [group["params"] for group in optimizer.param_groups] == [[free]]
        assert optimizer.param_groups[0]["weight_decay"] == 0.2
