"""Every loss of the registry: its closed-form gradient against autograd, gradcheck, extremes, masks, lists by hand.

The closed forms are those of the docstrings, written again: for pairs as tensors, for lists and labels as plain loops
over floats. A loss without one fails `test_every_loss_has_a_closed_form`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from notus.losses import F_DIVERGENCES, LOSSES, f_divergence_map, label_loss, list_loss, pair_loss

ROWS = {kind: [name for name, loss in LOSSES.items() if loss.rows == kind] for kind in ("pairs", "lists", "labels")}
SMOOTHING = {name: 0.1 for name, loss in LOSSES.items() if loss.option("label_smoothing")}
DIVERGENT = [name for name, loss in LOSSES.items() if loss.option("f_divergence")]
BETA, SHIFT = 0.3, 0.75


def losses_of(name: str, ratios: Tensor, *, beta: float = BETA, **changes: object) -> Tensor:
    """The losses of log-ratios, [B, 2], [B, K] or [B]; of log-probs, for a loss without a reference."""
    loss = LOSSES[name]
    options = {"label_smoothing": SMOOTHING[name]} if name in SMOOTHING else {}
    options |= changes.pop("options", {})
    zeros = torch.zeros_like(ratios) if loss.reference else None
    count = len(ratios)
    if loss.rows == "pairs":
        given = {"lengths": torch.tensor([[10, 5]] * count), "ratings": torch.tensor([[5.0, 2.0]] * count)}
        return pair_loss(loss, ratios, zeros, beta=beta, options=options, **given | changes)[0]
    if loss.rows == "lists":
        given = {"ratings": torch.arange(ratios.shape[1], 0, -1).expand_as(ratios)}
        return list_loss(loss, ratios, zeros, beta=beta, options=options, **given | changes)[0]
    given = {"labels": torch.arange(count) % 2 == 0, "shift": torch.tensor(SHIFT, dtype=ratios.dtype)}
    return label_loss(loss, ratios, zeros, beta=beta, options=options, **given | changes)[0]


def gradient_of(name: str, ratios: Tensor, **changes: object) -> Tensor:
    ratios = ratios.clone().requires_grad_()
    return torch.autograd.grad(losses_of(name, ratios, **changes).sum(), ratios)[0]


def draw(name: str, count: int = 32, spread: float = 8.0) -> Tensor:
    """Log-ratios in fp64 of the shape that a loss needs; log-probs where it has no reference."""
    shape = {"pairs": (count, 2), "lists": (count, 4), "labels": (count,)}[LOSSES[name].rows]
    ratios = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * spread
    return ratios if LOSSES[name].reference else -0.1 - ratios.abs()


# ---- closed forms ----


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def discopop(m: Tensor, tau: float = 0.05) -> Tensor:
    g = sig(m / tau)
    return -(1 - g) * sig(-m) - g * torch.exp(-m) + g * (1 - g) / tau * (torch.exp(-m) + torch.log(sig(m)))


# dL/dm of losses of the margin; ε = 0.1 where there is one, ratings 5 and 2
OF_THE_MARGIN: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda m: 0.1 - sig(-m),
    "robust": lambda m: -(0.1 + 0.8 * sig(-m)) / 0.8,
    "hinge": lambda m: -(m < 1).double(),
    "exo_pair": lambda m: sig(m) * sig(-m) * (m - math.log(9)),
    "discopop": discopop,
    "odpo": lambda m: -sig(math.log(3) - m),
    "sigmoid_norm": lambda m: -sig(-m),
    "cpo": lambda m: 0.1 - sig(-m),
    "simpo": lambda m: 0.1 - sig(0.5 - m),
    "slic": lambda m: -(m < 1).double(),
}

Pair = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
# (∂L/∂c, ∂L/∂r) of (c, r, β)
OF_PAIRS: dict[str, Pair] = {
    "nca_pair": lambda c, r, b: (b * (sig(b * c) / 2 - sig(-b * c)), b * sig(b * r) / 2),
    "bco_pair": lambda c, r, b: (-b * sig(-b * c), b * sig(b * r)),
    "apo_zero": lambda c, r, b: (-b * sig(b * c) * sig(-b * c), b * sig(b * r) * sig(-b * r)),
    "apo_down": lambda c, r, b: (
        b * sig(b * c) * sig(-b * c) - b * sig(b * (c - r)) * sig(b * (r - c)),
        b * sig(b * (c - r)) * sig(b * (r - c)),
    ),
    "dpop": lambda c, r, b: (
        -b * (1 + 50 * (c < 0).double()) * sig(-b * (c - r) + 50 * (-b * c).clamp(min=0)),
        b * sig(-b * (c - r) + 50 * (-b * c).clamp(min=0)),
    ),
    "sppo_hard": lambda c, r, b: (2 * (c - 0.5 / b), 2 * (r + 0.5 / b)),
    "ipo_sum": lambda c, r, b: (2 * (c - r - 0.5 / b), -2 * (c - r - 0.5 / b)),
    "ipo": lambda c, r, b: (0.2 * (c / 10 - r / 5 - 0.5 / b), -0.4 * (c / 10 - r / 5 - 0.5 / b)),
    "cal_dpo": lambda c, r, b: (-sig(r - c) + c - 0.5 / b, sig(r - c) + r + 0.5 / b),
    "orpo": lambda c, r, b: (
        -b * sig(-odds_ratio(c / 10, r / 5)) / (10 * (1 - torch.exp(c / 10))),
        b * sig(-odds_ratio(c / 10, r / 5)) / (5 * (1 - torch.exp(r / 5))),
    ),
}


def odds_ratio(a: Tensor, b: Tensor) -> Tensor:
    return a - torch.log(1 - torch.exp(a)) - b + torch.log(1 - torch.exp(b))


def of_a_margin(name: str) -> Pair:
    n_c, n_r = (10, 5) if LOSSES[name].per_token else (1, 1)

    def gradient(c: Tensor, r: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        slope = beta * OF_THE_MARGIN[name](beta * (c / n_c - r / n_r))
        return slope / n_c, -slope / n_r

    return gradient


Floats = Sequence[float]


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def plackett_luce(u: Floats, ratings: Floats, b: float) -> list[float]:
    gradient = [0.0] * len(u)
    for k, rating in enumerate(ratings):
        tied = [j for j, other in enumerate(ratings) if other == rating]
        left = 1 - tied.index(k) / len(tied)
        weights = {j: left if j in tied else 1 for j, other in enumerate(ratings) if other <= rating}
        terms = {j: weight * math.exp(b * u[j]) for j, weight in weights.items()}
        for j, term in terms.items():
            gradient[j] += b * term / sum(terms.values())
        gradient[k] -= b
    return gradient


def weighted_pairs(weight: Callable[[int, int], float], u: Floats, ratings: Floats, b: float) -> list[float]:
    gradient = [0.0] * len(u)
    for k, j in itertools.permutations(range(len(u)), 2):
        if ratings[k] > ratings[j]:
            gradient[k] -= b * weight(k, j) * s(b * (u[j] - u[k]))
            gradient[j] += b * weight(k, j) * s(b * (u[j] - u[k]))
    return gradient


def all_pairs(u: Floats, ratings: Floats, b: float) -> list[float]:
    count = sum(x > y for x, y in itertools.permutations(ratings, 2))
    return weighted_pairs(lambda k, j: 1 / count, u, ratings, b)


def lipo_lambda(u: Floats, ratings: Floats, b: float) -> list[float]:
    ranks = [1 + sum(x > y for x in u) for y in u]
    return weighted_pairs(
        lambda k, j: (
            abs(2 ** ratings[k] - 2 ** ratings[j]) * abs(1 / math.log(1 + ranks[k]) - 1 / math.log(1 + ranks[j]))
        ),
        u, ratings, b,
    )  # fmt: skip


def softmax(x: Floats) -> list[float]:
    return [math.exp(y) / sum(map(math.exp, x)) for y in x]


def info_nca(u: Floats, ratings: Floats, b: float) -> list[float]:
    return [b * (q - p) for q, p in zip(softmax([b * x for x in u]), softmax(ratings), strict=True)]


def nca(u: Floats, ratings: Floats, b: float) -> list[float]:
    return [b * (s(b * x) / len(u) - p * s(-b * x)) for x, p in zip(u, softmax(ratings), strict=True)]


OF_LISTS = {
    "plackett_luce": plackett_luce,
    "all_pairs": all_pairs,
    "lipo_lambda": lipo_lambda,
    "info_nca": info_nca,
    "nca": nca,
}
# of u, the label, β and the shift
OF_LABELS: dict[str, Callable[[float, bool, float, float], float]] = {
    "kto": lambda u, good, b, z: (-1 if good else 1) * b * s(b * (u - z)) * s(-b * (u - z)),
    "bco": lambda u, good, b, d: -b * s(d - b * u) if good else b * s(b * u - d),
}


def test_every_loss_has_a_closed_form() -> None:
    assert {*OF_THE_MARGIN, *OF_PAIRS} == set(ROWS["pairs"])
    assert set(OF_LISTS) == set(ROWS["lists"])
    assert set(OF_LABELS) == set(ROWS["labels"])
    assert set(DIVERGENT) < set(OF_THE_MARGIN)


@pytest.mark.parametrize("name", ROWS["pairs"])
def test_gradients_of_pairs(name: str) -> None:
    ratios = draw(name)
    expected = (OF_PAIRS.get(name) or of_a_margin(name))(ratios[:, 0], ratios[:, 1], BETA)
    torch.testing.assert_close(gradient_of(name, ratios), torch.stack(expected, 1), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ROWS["lists"])
@pytest.mark.parametrize(
    "ratings", [(4.0, 3.0, 2.0, 1.0), (3.0, 3.0, 1.0, 1.0), (2.0, 2.0, 2.0, 1.0), (1.0, 3.5, 2.0, 3.5)]
)
def test_gradients_of_lists(name: str, ratings: tuple[float, ...]) -> None:
    ratios = draw(name)
    expected = torch.tensor([OF_LISTS[name](u, ratings, BETA) for u in ratios.tolist()], dtype=torch.float64)
    found = gradient_of(name, ratios, ratings=torch.tensor(ratings).expand_as(ratios))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ROWS["labels"])
def test_gradients_of_labels(name: str) -> None:
    ratios = draw(name)
    expected = [OF_LABELS[name](u, i % 2 == 0, BETA, SHIFT) for i, u in enumerate(ratios.tolist())]
    found = gradient_of(name, ratios)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-10)


# f'(e^u) by u, and its slope
DIVERGENCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "reverse_kl": (lambda u: u, torch.ones_like),
    "forward_kl": (lambda u: 1 - torch.exp(-u), lambda u: torch.exp(-u)),
    "js_divergence": (lambda u: torch.log(2 * torch.exp(u) / (1 + torch.exp(u))), lambda u: sig(-u)),
    "alpha_divergence": (lambda u: (1 - torch.exp(-0.4 * u)) / 0.4, lambda u: torch.exp(-0.4 * u)),
}


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("name", DIVERGENT)
def test_gradients_with_another_divergence(name: str, divergence: str) -> None:
    ratios = draw(name, spread=2.0)
    mapped, slope = DIVERGENCES[divergence]
    options = {"f_divergence": divergence} | ({"f_alpha": 0.4} if divergence == "alpha_divergence" else {})
    c, r = ratios.unbind(1)
    by_margin = BETA * OF_THE_MARGIN[name](BETA * (mapped(c) - mapped(r)))
    expected = torch.stack([by_margin * slope(c), -by_margin * slope(r)], 1)
    torch.testing.assert_close(gradient_of(name, ratios, options=options), expected, rtol=1e-8, atol=1e-10)


def test_beyond_the_cap_a_divergence_continues_as_its_tangent() -> None:
    u = torch.tensor([-50.0, -60.0, -1e4], requires_grad=True, dtype=torch.float64)
    found = f_divergence_map(u, "forward_kl")
    e50 = math.exp(50)
    torch.testing.assert_close(found, torch.tensor([1 - e50, 1 - 11 * e50, 1 - 9951 * e50], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found.sum(), u)
    torch.testing.assert_close(gradient, torch.full_like(gradient, e50))


@pytest.mark.parametrize(("divergence", "alpha"), [("kl", 0.5), ("alpha_divergence", 0.0), ("alpha_divergence", 1.5)])
def test_a_divergence_that_does_not_exist_is_an_error(divergence: str, alpha: float) -> None:
    with pytest.raises(ValueError, match=f"reverse_kl, .* not '{divergence}' and {alpha}"):
        f_divergence_map(torch.zeros(1), divergence, alpha)


# ---- autograd's own check, extremes, masks ----


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    ratios = draw(name, count=6, spread=3.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses_of(name, x), (ratios,))


EXTREMES = (-1e4, -1e3, -100.0, -30.0, -1.0, 0.0, 1.0, 30.0, 100.0, 1e3, 1e4)


def extremes(name: str) -> Tensor:
    values = [x for x in EXTREMES if LOSSES[name].reference or x <= 0]
    size = {"pairs": 2, "lists": 3, "labels": 1}[LOSSES[name].rows]
    combinations = torch.tensor(list(itertools.product(values, repeat=size)))
    return combinations.repeat_interleave(2, 0)[:, 0] if size == 1 else combinations  # each label


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("lengths", [1, 500])
def test_values_and_gradients_are_finite_up_to_ten_thousand_nats(name: str, beta: float, lengths: int) -> None:
    ratios = extremes(name)
    changes = {"lengths": torch.full(ratios.shape, lengths)} if LOSSES[name].rows == "pairs" else {}
    assert losses_of(name, ratios, beta=beta, **changes).isfinite().all()
    assert gradient_of(name, ratios, beta=beta, **changes).isfinite().all()


@pytest.mark.parametrize("name", DIVERGENT)
@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_they_are_finite_with_every_divergence(name: str, divergence: str) -> None:
    ratios = extremes(name)
    for beta in (0.01, 1.0, 10.0):
        options = {"f_divergence": divergence}
        assert losses_of(name, ratios, beta=beta, options=options).isfinite().all()
        assert gradient_of(name, ratios, beta=beta, options=options).isfinite().all()


@pytest.mark.parametrize("name", [*ROWS["lists"], *ROWS["labels"]])
def test_fp32_is_as_exact_as_its_inputs(name: str) -> None:
    ratios = draw(name)
    for function in (losses_of, gradient_of):
        found, exact = function(name, ratios.float()).double(), function(name, ratios)
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROWS["lists"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e38])
def test_what_stands_in_masked_columns_has_no_effect(name: str, garbage: float) -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 3, 5, generator=generator) * 5
    ratings = torch.tensor([[5.0, 4, 4, 2, 1], [3, 3, 2, 0, 0], [2, 1, 0, 0, 0]])
    sizes = (5, 3, 2)
    mask = torch.arange(5) < torch.tensor(sizes)[:, None]
    tensors = [tensor.masked_fill(~mask, garbage) for tensor in (policy, reference, ratings)]
    policy, reference, ratings = tensors
    policy.requires_grad_()
    found, rewards = list_loss(LOSSES[name], policy, reference, beta=BETA, ratings=ratings, mask=mask)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    assert not rewards.requires_grad
    assert (rewards[~mask] == 0).all()
    assert (gradient[~mask] == 0).all()
    for row, size in enumerate(sizes):  # each list alone, without its empty columns
        alone = policy[row : row + 1, :size].detach().requires_grad_()
        rest = {"ratings": ratings[row : row + 1, :size], "beta": BETA}
        expected, expected_rewards = list_loss(LOSSES[name], alone, reference[row : row + 1, :size], **rest)
        torch.testing.assert_close(found[row : row + 1], expected)
        torch.testing.assert_close(gradient[row, :size], torch.autograd.grad(expected.sum(), alone)[0][0])
        torch.testing.assert_close(rewards[row, :size], expected_rewards[0])


@pytest.mark.parametrize("name", ROWS["lists"])
@pytest.mark.parametrize("ratings", [None, (-1.0, -2.0, -2.0, -5.0), (0.0, 0.0, -3.0, -3.0), (2.0, 1.0, 0.0, 0.0)])
def test_a_masked_column_is_no_rating_of_zero(name: str, ratings: tuple[float, ...] | None) -> None:
    ratios = draw(name)
    if ratings is None and LOSSES[name].ratings:
        pytest.skip("needs ratings")
    given = {} if ratings is None else {"ratings": torch.tensor(ratings).expand_as(ratios)}
    zeros, mask = torch.zeros_like(ratios), torch.tensor([True, True, True, False]).expand_as(ratios)
    found = list_loss(LOSSES[name], ratios, zeros, beta=BETA, mask=mask, **given)[0]
    cut = {key: value[:, :3] for key, value in given.items()}
    torch.testing.assert_close(found, list_loss(LOSSES[name], ratios[:, :3], zeros[:, :3], beta=BETA, **cut)[0])


@pytest.mark.parametrize("name", ROWS["lists"])
def test_lists_of_one_or_of_none_are_finite(name: str) -> None:
    policy = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    found, _ = list_loss(
        LOSSES[name], policy, torch.zeros(2, 3), beta=BETA, ratings=torch.ones(2, 3), mask=mask
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    if name != "nca":  # which compares with noise
        assert found.tolist() == [0.0, 0.0]
    assert list_loss(LOSSES[name], policy[:0], policy[:0], beta=BETA, ratings=policy[:0])[0].shape == (0,)


# ---- lists and labels by hand ----

LN2 = math.log(2)
# e^s is 4, 2 and 1 at β = 0.1
HAND = SimpleNamespace(u=torch.tensor([[20 * LN2, 10 * LN2, 0.0]], dtype=torch.float64), beta=0.1)
D12, D13, D23 = (1 / math.log(1 + i) - 1 / math.log(1 + j) for i, j in ((1, 2), (1, 3), (2, 3)))
P = (4 / 7, 2 / 7, 1 / 7)
BY_HAND = [
    # the best of all, 4/7, then the best of the rest, 2/3
    ("plackett_luce", (3.0, 2.0, 1.0), math.log(7 / 4) + math.log(3 / 2)),
    ("plackett_luce", (1.0, 2.0, 3.0), math.log(7) + math.log(6 / 2)),
    # two tied: all 7 for the first, half of the tied 6 gone for the second
    ("plackett_luce", (2.0, 2.0, 1.0), math.log(7 / 4) + math.log(4 / 2)),
    ("plackett_luce", (2.0, 1.0, 1.0), math.log(7 / 4) + math.log(3 / 2) + math.log(1.5 / 1)),
    ("plackett_luce", (1.0, 1.0, 1.0), math.log(7 / 4) + math.log(7 * 2 / 3 / 2) + math.log(7 / 3)),
    ("all_pairs", (3.0, 2.0, 1.0), (2 * math.log(1 + 1 / 2) + math.log(1 + 1 / 4)) / 3),
    ("all_pairs", (2.0, 2.0, 1.0), (math.log(1 + 1 / 2) + math.log(1 + 1 / 4)) / 2),
    ("all_pairs", (1.0, 1.0, 1.0), 0.0),
    # gains 4, 2 and 1; ranks 1, 2 and 3
    ("lipo_lambda", (2.0, 1.0, 0.0), (2 * D12 + 1 * D23) * math.log(1 + 1 / 2) + 3 * D13 * math.log(1 + 1 / 4)),
    ("lipo_lambda", (0.0, 1.0, 2.0), (2 * D23 + 1 * D12) * math.log(1 + 2) + 3 * D13 * math.log(1 + 4)),
    ("lipo_lambda", (1.0, 1.0, 1.0), 0.0),
    # p is 4/7, 2/7, 1/7 as well
    ("info_nca", (2 * LN2, LN2, 0.0), -sum(p * math.log(p) for p in P)),
    ("nca", (2 * LN2, LN2, 0.0), -P[0] * math.log(4 / 5) - P[1] * math.log(2 / 3) - P[2] * math.log(1 / 2)
     + (math.log(5) + math.log(3) + math.log(2)) / 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ratings", "expected"), BY_HAND)
def test_lists_by_hand(name: str, ratings: tuple[float, ...], expected: float) -> None:
    given = torch.tensor([ratings], dtype=torch.float64)
    found, rewards = list_loss(LOSSES[name], HAND.u - 3, torch.full_like(HAND.u, -3), beta=HAND.beta, ratings=given)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))
    torch.testing.assert_close(rewards, torch.tensor([[2 * LN2, LN2, 0.0]], dtype=torch.float64))


def test_every_loss_of_lists_and_labels_has_a_hand_worked_value() -> None:
    assert {row[0] for row in BY_HAND} == set(ROWS["lists"])
    assert set(ROWS["labels"]) == {"kto", "bco"}  # below


def test_labels_by_hand() -> None:
    ln3 = math.log(3)
    labels = torch.tensor([True, False])
    # kto: 10 ln 3 above z = 5 nats, so x = ln 3
    u = torch.full((2,), 10 * ln3 + 5, dtype=torch.float64)
    found, rewards = label_loss(
        LOSSES["kto"], u - 3, torch.full_like(u, -3), labels, beta=0.1, shift=torch.tensor(5.0),
        options={"desirable_weight": 2.0, "undesirable_weight": 0.5},
    )  # fmt: skip
    torch.testing.assert_close(found, torch.tensor([2 * 1 / 4, 0.5 * 3 / 4], dtype=torch.float64))
    torch.testing.assert_close(rewards, torch.full((2,), ln3 + 0.5, dtype=torch.float64))
    # bco: the shift is one of rewards
    found, rewards = label_loss(
        LOSSES["bco"], u - 3, torch.full_like(u, -3), labels, beta=0.1, shift=torch.tensor(0.5)
    )  # fmt: skip
    torch.testing.assert_close(found, torch.tensor([-math.log(3 / 4), -math.log(1 / 4)], dtype=torch.float64))
    torch.testing.assert_close(rewards, torch.full((2,), ln3 + 0.5, dtype=torch.float64))


OTHER_VALUES = {
    "label_smoothing": 0.3, "discopop_tau": 0.5, "odpo_alpha": 2.0, "dpop_lambda": 1.0, "simpo_gamma": 2.0,
    "slic_delta": 5.0, "cal_weight": 1.0, "rating_scale": 3.0, "desirable_weight": 2.0, "undesirable_weight": 2.0,
    "f_divergence": "js_divergence", "f_alpha": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "option"), [(name, option.name) for name, loss in LOSSES.items() for option in loss.options]
)
def test_every_option_has_an_effect(name: str, option: str) -> None:
    ratios = draw(name, spread=2.0)
    base = {"f_divergence": "alpha_divergence"} if option == "f_alpha" else {}
    found = [losses_of(name, ratios, options=base | other) for other in ({}, {option: OTHER_VALUES[option]})]
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["lipo_lambda", "info_nca", "nca"])
def test_the_scale_of_ratings_divides_them(name: str) -> None:
    ratios, ratings = draw(name), torch.tensor([4.0, 3.0, 3.0, 1.0], dtype=torch.float64)
    scaled = losses_of(name, ratios, ratings=(10 * ratings).expand_as(ratios), options={"rating_scale": 10.0})
    torch.testing.assert_close(scaled, losses_of(name, ratios, ratings=ratings.expand_as(ratios)))


@pytest.mark.parametrize("name", ROWS["labels"])
def test_no_gradient_flows_through_the_shift(name: str) -> None:
    shift = torch.tensor(0.5, requires_grad=True)
    found = losses_of(name, torch.ones(2, requires_grad=True), shift=shift)
    assert torch.autograd.grad(found.sum(), shift, allow_unused=True)[0] is None
