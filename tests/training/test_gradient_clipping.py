import pytest
import torch

from notus.training.gradient_clipping import clip_gradients, gradient_norm, local_gradients


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
