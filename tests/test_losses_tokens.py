"""Log-probs and weights from single tokens: LD-DPO and WPO by hand, against plain loops, and their gradients."""

import math

import pytest
import torch

from notus.losses import dpo_loss, ld_logps, public_sums, wpo_weights

# two pairs, of 3 and 2 tokens and of 1 and 4: chosen, rejected, chosen, rejected
LENGTHS = torch.tensor([[3, 2], [1, 4]])
LOGPS = [-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -1.0, -2.0, -4.0, -8.0]


def test_the_public_part_is_as_long_as_the_shorter_completion() -> None:
    assert public_sums(torch.tensor(LOGPS), LENGTHS).tolist() == [[-3.0, -24.0], [-32.0, -1.0]]


def test_gradients_reach_public_tokens_alone() -> None:
    tokens = torch.tensor(LOGPS, requires_grad=True)
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (gradient,) = torch.autograd.grad((public_sums(tokens, LENGTHS) * weights).sum(), tokens)
    assert gradient.tolist() == [1.0, 1.0, 0.0, 2.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0]


def test_public_sums_equal_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (16, 2), generator=generator)
    tokens = -torch.rand(int(lengths.sum()), generator=generator, dtype=torch.float64)
    pieces = iter(tokens.split(lengths.flatten().tolist()))
    expected = [[next(pieces)[: min(pair)].sum() for _ in pair] for pair in lengths.tolist()]
    torch.testing.assert_close(public_sums(tokens, lengths), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    "lengths", [torch.zeros(0, 2, dtype=torch.long), torch.tensor([[0, 0]]), torch.tensor([[0, 3]])]
)
def test_rows_without_tokens_have_no_public_part(lengths: torch.Tensor) -> None:
    tokens = -torch.ones(int(lengths.sum()))
    assert public_sums(tokens, lengths).tolist() == [[0.0, 0.0]] * len(lengths)
    weights = wpo_weights(tokens, torch.zeros_like(tokens), lengths)
    assert weights.shape == (len(lengths),)
    assert weights.isfinite().all()


def test_ld_dpo_by_hand() -> None:
    public = public_sums(torch.tensor(LOGPS), LENGTHS)
    sums = torch.tensor([[-7.0, -24.0], [-32.0, -15.0]])
    assert ld_logps(sums, public, 0.5).tolist() == [[-5.0, -24.0], [-32.0, -8.0]]
    assert ld_logps(sums, public, 0.0).tolist() == public.tolist()
    tenths = torch.tensor([0.1, 0.7, 1e8])
    assert ld_logps(tenths, torch.tensor([-3.3, -0.9, 0.1]), 1.0).tolist() == tenths.tolist()  # bit by bit


def test_with_alpha_1_or_equal_lengths_ld_dpo_is_dpo() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[4, 4], [2, 2]])
    tokens = -torch.rand(12, generator=generator)
    sums = torch.stack([piece.sum() for piece in tokens.split([4, 4, 2, 2])]).view(2, 2)
    torch.testing.assert_close(ld_logps(sums, public_sums(tokens, lengths), 0.3), sums)


def test_ld_dpo_weighs_the_gradient_of_the_excess() -> None:
    tokens = torch.tensor(LOGPS, requires_grad=True, dtype=torch.float64)
    sums = torch.stack([piece.sum() for piece in tokens.split([3, 2, 1, 4])]).view(2, 2)
    policy = ld_logps(sums, public_sums(tokens, LENGTHS), 0.25)
    zeros = torch.zeros(2, dtype=torch.float64)
    losses, _, _ = dpo_loss(policy[:, 0], policy[:, 1], zeros, zeros, beta=0.1)
    (gradient,) = torch.autograd.grad(losses.sum(), tokens)
    assert (gradient[2] / gradient[0]).item() == pytest.approx(0.25)  # the third token of the first chosen one
    assert (gradient[7:] / gradient[6]).tolist() == pytest.approx([0.25, 0.25, 0.25])


def test_wpo_by_hand() -> None:
    # per token, log π - log Σ π²; means -1/2 and -1, so exp(-3/2); then +1 and -1/4, at most 1
    excess = torch.tensor([-0.5, -1.5, 0.5, -1.5, -0.5, 1.0, -1.0, 0.0, 0.0, 0.0])
    collision = torch.tensor([-0.25, -2.0] * 5)
    tokens = (excess + collision).requires_grad_()
    weights = wpo_weights(tokens, collision, LENGTHS)
    torch.testing.assert_close(weights, torch.tensor([math.exp(-1.5), 1.0]))
    assert not weights.requires_grad


def test_wpo_of_a_uniform_policy_is_1() -> None:
    # π = 1/V for all: log π = log Σ π² = -log V
    tokens = torch.full((10,), -math.log(50))
    assert wpo_weights(tokens, tokens, LENGTHS).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("function", [public_sums, lambda tokens, lengths: wpo_weights(tokens, tokens, lengths)])
def test_coarse_dtypes_are_rejected(function) -> None:
    with pytest.raises(ValueError, match=r"token_logps is torch.bfloat16"):
        function(torch.tensor(LOGPS).bfloat16(), LENGTHS)


def test_shapes_that_differ_are_rejected() -> None:
    with pytest.raises(ValueError, match="one shape"):
        wpo_weights(torch.zeros(10), torch.zeros(9), LENGTHS)
    with pytest.raises(ValueError, match="one shape"):
        ld_logps(torch.zeros(2, 2), torch.zeros(2), 0.5)
