"""What must hold whatever the numbers are: symmetries, invariances, limits, and losses that are others in disguise."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from notus.losses import (
    F_DIVERGENCES,
    LOSSES,
    all_pairs_loss,
    bco_loss,
    dpo_loss,
    f_divergence_map,
    info_nca_loss,
    kto_loss,
    lipo_lambda_loss,
    nca_loss,
    plackett_luce_loss,
)

PAIR_LOSSES = [name for name, loss in LOSSES.items() if loss.rows == "pairs"]
LIST_LOSSES = [name for name, loss in LOSSES.items() if loss.rows == "lists"]
LN2 = math.log(2)

quick = fuzz(25)
nats = st.floats(-200, 200, allow_subnormal=False)
ratio_pairs = st.lists(st.tuples(nats, nats), min_size=1, max_size=4)
betas = st.sampled_from([0.01, 0.1, 0.5, 2.0])


@st.composite
def ratio_lists(draw: st.DrawFn) -> Tensor:
    """Log-ratios [B, K] in fp64."""
    size = draw(st.integers(2, 5))
    rows = draw(st.lists(st.lists(nats, min_size=size, max_size=size), min_size=1, max_size=3))
    return torch.tensor(rows, dtype=torch.float64)


@st.composite
def rated_lists(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Log-ratios and ratings [B, K], with ties."""
    ratios = draw(ratio_lists())
    count = ratios.numel()
    ratings = draw(st.lists(st.sampled_from([1.0, 2.0, 2.5, 4.0]), min_size=count, max_size=count))
    return ratios, torch.tensor(ratings, dtype=torch.float64).view_as(ratios)


def pair_losses(name: str, c: Tensor, r: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    zeros = (torch.zeros_like(c), torch.zeros_like(r)) if LOSSES[name].reference else (None, None)
    options.setdefault("label_smoothing", 0.1 if name == "exo_pair" else 0.0)
    given_lengths = {"chosen_lengths": torch.full_like(c, 4), "rejected_lengths": torch.full_like(r, 4)}
    given_ratings = {"chosen_ratings": torch.full_like(c, 3), "rejected_ratings": torch.full_like(r, 1)}
    return dpo_loss(c, r, *zeros, loss_type=name, **given_lengths | given_ratings | options)


def list_losses(name: str, ratios: Tensor, ratings: Tensor, beta: float = 0.1, **options: object) -> Tensor:
    return LOSSES[name].function(ratios, torch.zeros_like(ratios), beta=beta, ratings=ratings, **options)


def columns(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    return torch.tensor(pairs, dtype=torch.float64).unbind(1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ---- symmetries and invariances ----


@pytest.mark.parametrize("name", PAIR_LOSSES)
@quick
@given(pairs=ratio_pairs, beta=betas)
def test_swapping_chosen_and_rejected_flips_the_margin(
    name: str, pairs: list[tuple[float, float]], beta: float
) -> None:
    c, r = columns(pairs)
    _, chosen, rejected = pair_losses(name, c, r, beta=beta)
    _, swapped_chosen, swapped_rejected = pair_losses(name, r, c, beta=beta)
    assert torch.equal(chosen - rejected, -(swapped_chosen - swapped_rejected))


@pytest.mark.parametrize(
    ("name", "difference"),
    [  # of L(m) and L(-m)
        ("sigmoid", lambda m: -m),
        ("hinge", lambda m: (1 - m).clamp(min=0) - (1 + m).clamp(min=0)),
        ("exo_pair", lambda m: -torch.tanh(m / 2) * math.log(9)),
        ("cpo", lambda m: -m),
    ],
)
@quick
@given(pairs=ratio_pairs, beta=betas)
def test_what_a_swap_adds(name: str, difference: Callable[[Tensor], Tensor], pairs: list, beta: float) -> None:
    c, r = columns(pairs)
    found = pair_losses(name, c, r, beta=beta)[0] - pair_losses(name, r, c, beta=beta)[0]
    close(found, difference(beta * (c - r)))


SHIFT_INVARIANT = {  # a constant added to c and r alike changes nothing; with a divergence other than DPO's it would
    "sigmoid", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm", "exo_pair", "discopop", "odpo", "cpo", "simpo",
    "slic",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SHIFT_INVARIANT))
@quick
@given(pairs=ratio_pairs, constant=nats)
def test_losses_of_the_difference_do_not_see_a_shift(name: str, pairs: list, constant: float) -> None:
    c, r = columns(pairs)
    close(pair_losses(name, c + constant, r + constant)[0], pair_losses(name, c, r)[0], 1e-7)


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name not in SHIFT_INVARIANT])
def test_the_others_do(name: str) -> None:
    c, r = torch.tensor([-4.0]), torch.tensor([-6.0])
    assert abs(pair_losses(name, c - 3, r - 3)[0] - pair_losses(name, c, r)[0]) > 1e-4


@pytest.mark.parametrize("divergence", [name for name in F_DIVERGENCES if name != "reverse_kl"])
def test_with_another_divergence_dpo_does(divergence: str) -> None:
    c, r = torch.tensor([1.0]), torch.tensor([-1.0])
    found = [pair_losses("sigmoid", c + x, r + x, f_divergence=divergence)[0] for x in (0, 2)]
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize("name", [name for name in LIST_LOSSES if name != "nca"])
@quick
@given(lists=rated_lists(), constant=nats)
def test_losses_of_lists_do_not_see_a_shift(name: str, lists: tuple[Tensor, Tensor], constant: float) -> None:
    ratios, ratings = lists
    ratios = torch.round(ratios * 16) / 16  # so that a shift is exact, and makes or breaks no tie of rewards
    found = list_losses(name, ratios + round(constant), ratings)
    close(found, list_losses(name, ratios, ratings), 1e-7)


def test_nca_does() -> None:
    ratios, ratings = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[3.0, 2.0, 1.0]])
    assert abs(list_losses("nca", ratios + 5, ratings) - list_losses("nca", ratios, ratings)) > 1e-2


@pytest.mark.parametrize("name", LIST_LOSSES)
@quick
@given(lists=rated_lists(), seed=st.integers(0, 99))
def test_with_ratings_the_order_of_the_columns_has_no_effect(
    name: str, lists: tuple[Tensor, Tensor], seed: int
) -> None:
    ratios, ratings = lists
    ratios = ratios + torch.arange(ratios.shape[1]) / 7  # equal rewards would rank by column
    order = torch.randperm(ratios.shape[1], generator=torch.Generator().manual_seed(seed))
    close(list_losses(name, ratios[:, order], ratings[:, order]), list_losses(name, ratios, ratings), 1e-8)


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_permuting_tied_columns_permutes_their_gradients(name: str) -> None:
    ratios = torch.tensor([[3.0, -2.0, 0.5, 7.0]], dtype=torch.float64, requires_grad=True)
    ratings = torch.tensor([[4.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    (expected,) = torch.autograd.grad(list_losses(name, ratios, ratings).sum(), ratios)
    for order in itertools.permutations((1, 2, 3)):
        permuted = ratios.detach()[:, [0, *order]].requires_grad_()
        (found,) = torch.autograd.grad(list_losses(name, permuted, ratings).sum(), permuted)
        close(found, expected[:, [0, *order]])


# ---- limits of β ----


AT_ZERO = {  # for log-ratios of 0, so as β vanishes
    "sigmoid": LN2, "robust": LN2, "hinge": 1, "sigmoid_norm": LN2, "nca_pair": 2 * LN2, "bco_pair": 2 * LN2,
    "apo_zero": 1, "apo_down": 1, "discopop": LN2 / 2 + 1 / 2, "dpop": LN2, "odpo": math.log(3), "cpo": LN2,
    "simpo": math.log(1 + math.exp(0.5)), "slic": 1, "exo_pair": -LN2 - math.log(0.09) / 2,
}  # fmt: skip
# for a pair that is right, or wrong, by far; None: without limit
FAR = {
    "sigmoid": (0, None), "hinge": (0, None), "exo_pair": (-math.log(0.9), -math.log(0.1)), "bco_pair": (0, None),
    "apo_zero": (0, 2), "apo_down": (1, 1), "discopop": (0, None), "nca_pair": (None, None), "dpop": (0, None),
    "odpo": (0, None), "cpo": (0, None), "simpo": (0, None), "slic": (0, None), "sigmoid_norm": (0, None),
    "robust": (0, None),
}  # fmt: skip


def test_limits_are_stated_for_all_but_those_whose_targets_have_beta() -> None:
    assert set(AT_ZERO) == set(FAR) == set(PAIR_LOSSES) - {"ipo", "ipo_sum", "sppo_hard", "cal_dpo", "orpo"}


@pytest.mark.parametrize("name", AT_ZERO)
@quick
@given(pairs=ratio_pairs)
def test_as_beta_vanishes_all_pairs_are_alike(name: str, pairs: list[tuple[float, float]]) -> None:
    found, _, _ = pair_losses(name, *columns(pairs), beta=1e-12)
    close(found, torch.full_like(found, AT_ZERO[name]), 1e-6)


@pytest.mark.parametrize("name", FAR)
def test_as_beta_grows_a_pair_is_right_or_wrong(name: str) -> None:
    c, r = torch.tensor([3.0, -3.0], dtype=torch.float64), torch.tensor([-3.0, 3.0], dtype=torch.float64)
    for found, limit in zip(pair_losses(name, c, r, beta=1e3)[0].tolist(), FAR[name], strict=True):
        assert found > 500 if limit is None else found == pytest.approx(limit, abs=1e-12)


@pytest.mark.parametrize("name", ["ipo", "ipo_sum", "sppo_hard"])
def test_targets_vanish_as_beta_grows(name: str) -> None:
    zeros = torch.zeros(1, dtype=torch.float64)
    assert pair_losses(name, zeros, zeros, beta=1e6)[0].item() < 1e-11


@quick
@given(lists=ratio_lists())
def test_as_beta_vanishes_every_ranking_is_as_likely(lists: Tensor) -> None:
    found = plackett_luce_loss(lists, torch.zeros_like(lists), beta=1e-12)
    close(found, torch.full_like(found, math.log(math.factorial(lists.shape[1]))), 1e-6)
    found = all_pairs_loss(lists, torch.zeros_like(lists), beta=1e-12)
    close(found, torch.full_like(found, LN2), 1e-6)


# ---- one loss is another ----


@quick
@given(pairs=ratio_pairs, beta=betas)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_list_of_two_is_a_pair(dtype: torch.dtype, pairs: list[tuple[float, float]], beta: float) -> None:
    policy = torch.tensor(pairs, dtype=dtype)
    reference = policy.flip(0) / 3
    expected, _, _ = dpo_loss(*policy.unbind(1), *reference.unbind(1), beta=beta)
    for function in (plackett_luce_loss, all_pairs_loss, info_nca_loss):
        assert torch.equal(function(policy, reference, beta=beta), expected), function.__name__  # to the last bit
    ratings = torch.tensor([[3.0, 1.0]], dtype=dtype).expand_as(policy)
    weight = (2**3 - 2) * (1 / math.log(2) - 1 / math.log(3))
    close(lipo_lambda_loss(policy, reference, beta=beta, ratings=ratings), weight * expected, 1e-5)
    one_hot = ratings * 1e4
    close(info_nca_loss(policy, reference, beta=beta, ratings=one_hot), expected, 1e-5)
    expected, _, _ = dpo_loss(*policy.unbind(1), *reference.unbind(1), beta=beta, loss_type="nca_pair")
    close(nca_loss(policy, reference, beta=beta), expected, 1e-5)
    close(nca_loss(policy, reference, beta=beta, ratings=one_hot), expected, 1e-5)


@quick
@given(pairs=ratio_pairs, beta=betas)
def test_a_good_and_a_bad_label_are_a_pair(pairs: list[tuple[float, float]], beta: float) -> None:
    c, r = columns(pairs)
    zeros, good = torch.zeros_like(c), torch.ones_like(c, dtype=torch.bool)
    for function, pair in ((bco_loss, "bco_pair"), (kto_loss, "apo_zero")):
        found = function(c, zeros, good, beta=beta) + function(r, zeros, ~good, beta=beta)
        close(found, pair_losses(pair, c, r, beta=beta)[0])


@pytest.mark.parametrize(
    ("name", "options", "other", "other_options"),
    [
        ("robust", {}, "sigmoid", {}),
        ("odpo", {"odpo_alpha": 0.0}, "sigmoid", {}),
        ("dpop", {"dpop_lambda": 0.0}, "sigmoid", {}),
        ("cpo", {"label_smoothing": 0.3}, "sigmoid", {"label_smoothing": 0.3}),
        ("slic", {}, "hinge", {}),
        ("simpo", {"simpo_gamma": 0.0}, "sigmoid_norm", {}),
        ("cal_dpo", {"cal_weight": 0.0, "beta": 0.2}, "sigmoid", {"beta": 1.0}),
        ("sigmoid", {"f_divergence": "alpha_divergence", "f_alpha": 1.0}, "sigmoid", {"f_divergence": "forward_kl"}),
        ("robust", {"f_divergence": "reverse_kl"}, "sigmoid", {}),
    ],
)
@quick
@given(pairs=ratio_pairs)
def test_reductions(name: str, options: dict, other: str, other_options: dict, pairs: list) -> None:
    c, r = columns(pairs)
    close(pair_losses(name, c, r, **options)[0], pair_losses(other, c, r, **other_options)[0])


@quick
@given(pairs=ratio_pairs)
def test_with_completions_of_one_token_means_are_sums(pairs: list[tuple[float, float]]) -> None:
    c, r = columns(pairs)
    ones = {"chosen_lengths": torch.ones_like(c), "rejected_lengths": torch.ones_like(r)}
    for name, other in (("ipo", "ipo_sum"), ("sigmoid_norm", "sigmoid")):
        close(pair_losses(name, c, r, **ones)[0], pair_losses(other, c, r)[0])


@quick
@given(pairs=ratio_pairs)
def test_discopop_as_tau_vanishes_is_exponential_on_the_right_and_logistic_on_the_wrong(pairs: list) -> None:
    c, r = columns(pairs)
    c = c.where((c - r).abs() > 1, r + 1)
    margin = 0.1 * (c - r)
    expected = torch.exp(-margin).where(margin > 0, torch.log1p(torch.exp(-margin)))
    close(pair_losses("discopop", c, r, discopop_tau=1e-3)[0], expected)


def test_odpo_of_a_gap_of_one_is_dpo_and_of_equal_or_swapped_ratings_nothing() -> None:
    c = torch.tensor([2.0, -3.0, 8.0], requires_grad=True)
    r = torch.tensor([1.0, 4.0, -8.0])
    ratings = {"chosen_ratings": torch.tensor([2.0, 3.0, 1.0]), "rejected_ratings": torch.tensor([1.0, 3.0, 5.0])}
    found = pair_losses("odpo", c, r, **ratings)[0]
    assert found[0] == pair_losses("sigmoid", c, r)[0][0]
    assert found[1:].tolist() == [0.0, 0.0]
    assert torch.autograd.grad(found.sum(), c)[0][1:].tolist() == [0.0, 0.0]
    assert torch.equal(pair_losses("odpo", c, r, odpo_alpha=0.0, **ratings)[0], pair_losses("sigmoid", c, r)[0])


@quick
@given(ratios=st.lists(st.floats(-40, 40, allow_subnormal=False), min_size=1, max_size=5))
def test_small_alpha_is_the_reverse_kl_and_every_divergence_grows(ratios: list[float]) -> None:
    u = torch.tensor(ratios, dtype=torch.float64)
    close(f_divergence_map(u, "alpha_divergence", 1e-9), u, 1e-5)
    for divergence in F_DIVERGENCES:
        assert f_divergence_map(torch.zeros(1), divergence).abs().item() < 1e-6  # f'(1) = 0
        assert (f_divergence_map(u + 0.5, divergence) > f_divergence_map(u, divergence)).all() or u.max() > 30


@quick
@given(lists=ratio_lists())
def test_efrons_rule_without_ties_changes_nothing_and_all_tied_prefers_equal_rewards(lists: Tensor) -> None:
    zeros = torch.zeros_like(lists)
    ratings = torch.arange(lists.shape[1], 0, -1).expand_as(lists)
    assert torch.equal(plackett_luce_loss(lists, zeros, ratings=ratings), plackett_luce_loss(lists, zeros))
    tied = torch.ones_like(lists)
    equal = plackett_luce_loss(zeros, zeros, ratings=tied)
    assert (plackett_luce_loss(lists, zeros, ratings=tied) >= equal - 1e-9).all()
