"""Each loss of pairs: hand-worked values, a plain expression, TRL's own code, extremes; and mistakes of every kind."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from notus.losses import (
    LOSSES,
    check,
    dpo_loss,
    f_divergence_map,
    find_loss,
    kto_loss,
    label_loss,
    list_loss,
    nll_loss,
    pair_loss,
    plackett_luce_loss,
    resolve_options,
)

PAIR_LOSSES = [name for name, loss in LOSSES.items() if loss.rows == "pairs"]
# those that TRL's DPO trainer has under the same name
TRL_LOSSES = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
              "apo_zero", "apo_down", "discopop")  # fmt: skip

LN3, LN9 = math.log(3), math.log(9)

# Beta is 0.1, c = 10 ln 3 and r = -10 ln 3. So the rewards are ln 3 and -ln 3, with sigmoids 3/4 and 1/4, and
# the margin is ln 9, with the sigmoid 9/10. Completion lengths are 10 and 5: per token, ln 3 and -2 ln 3. The chosen
# completion is rated 5, the rejected one 2. Without a reference, these are the log-probs themselves.
# One column for these pairs, one for the same with chosen and rejected (and their lengths) swapped.
BY_HAND = [
    ("sigmoid", 0.0, -math.log(0.9), -math.log(0.1)),
    ("sigmoid", 0.2, -0.8 * math.log(0.9) - 0.2 * math.log(0.1), -0.8 * math.log(0.1) - 0.2 * math.log(0.9)),
    ("robust", 0.0, -math.log(0.9), -math.log(0.1)),
    ("robust", 0.25, (-0.75 * math.log(0.9) + 0.25 * math.log(0.1)) / 0.5,
     (-0.75 * math.log(0.1) + 0.25 * math.log(0.9)) / 0.5),
    ("hinge", 0.0, 0.0, 1 + LN9),
    ("ipo", 0.0, (3 * LN3 - 5) ** 2, (-3 * LN3 - 5) ** 2),
    ("sigmoid_norm", 0.0, math.log(1 + 3**-0.3), math.log(1 + 3**0.3)),
    ("exo_pair", 0.1, 0.0, 0.8 * LN9),  # the belief (0.9, 0.1) is the label's; then its mirror image
    ("nca_pair", 0.0, -1.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4),
     -1.5 * math.log(1 / 4) - 0.5 * math.log(3 / 4)),
    ("bco_pair", 0.0, -2 * math.log(3 / 4), -2 * math.log(1 / 4)),
    ("sppo_hard", 0.0, 2 * (10 * LN3 - 5) ** 2, 2 * (10 * LN3 + 5) ** 2),
    ("apo_zero", 0.0, 1 / 2, 3 / 2),
    ("apo_down", 0.0, 3 / 4 + 1 / 10, 1 / 4 + 9 / 10),
    ("ipo_sum", 0.0, (20 * LN3 - 5) ** 2, (-20 * LN3 - 5) ** 2),
    ("dpop", 0.0, -math.log(0.9), math.log(1 + 9 * 3**50)),  # swapped, the margin is less by 50 ln 3
    ("odpo", 0.0, math.log(1 + 3 / 9), math.log(1 + 3 * 9)),  # the margin is less by ln 3
    ("cal_dpo", 0.0, math.log(1 + 3**-20) + (10 * LN3 - 5) ** 2, math.log(1 + 3**20) + (10 * LN3 + 5) ** 2),
    ("cpo", 0.2, -0.8 * math.log(0.9) - 0.2 * math.log(0.1), -0.8 * math.log(0.1) - 0.2 * math.log(0.9)),
    ("slic", 0.0, 0.0, 1 + LN9),
    ("simpo", 0.0, math.log(1 + math.exp(0.5) * 3**-0.3), math.log(1 + math.exp(0.5) * 3**0.3)),
    ("discopop", 0.0, (-math.log(0.9) + 9**20 / 9) / (1 + 9**20), (-math.log(0.1) * 9**20 + 9) / (1 + 9**20)),
]  # fmt: skip


def smoothing_for(loss_type: str) -> float:
    return 0.1 if loss_type == "exo_pair" else 0.0


def loss_of(c: Tensor, r: Tensor, loss_type: str, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """`dpo_loss` of log-ratios, on references that are not zero; or of log-probs, for a loss without a reference."""
    reference: tuple[Tensor | None, Tensor | None] = (None, None)
    if LOSSES[loss_type].reference:
        reference = (torch.full_like(c, -4.0), torch.full_like(r, -8.0))
        c, r = c + reference[0], r + reference[1]
    options.setdefault("label_smoothing", smoothing_for(loss_type))
    options.setdefault("chosen_lengths", torch.full(c.shape, 10))
    options.setdefault("rejected_lengths", torch.full(r.shape, 5))
    ratings = {"chosen_ratings": torch.full_like(c, 5.0), "rejected_ratings": torch.full_like(r, 2.0)}
    return dpo_loss(c, r, *reference, loss_type=loss_type, **ratings, **options)


@pytest.mark.parametrize(("loss_type", "smoothing", "expected", "expected_swapped"), BY_HAND)
def test_hand_worked_values(loss_type: str, smoothing: float, expected: float, expected_swapped: float) -> None:
    c = torch.tensor([10 * LN3, -10 * LN3], dtype=torch.float64)
    lengths = torch.tensor([10, 5])
    found, chosen_rewards, rejected_rewards = loss_of(
        c, -c, loss_type, label_smoothing=smoothing, chosen_lengths=lengths, rejected_lengths=lengths.flip(0)
    )
    torch.testing.assert_close(found, torch.tensor([expected, expected_swapped], dtype=torch.float64))
    if loss_type == "simpo":  # its rewards are per token
        chosen_rewards, rejected_rewards = chosen_rewards * lengths, rejected_rewards * lengths.flip(0)
    torch.testing.assert_close(chosen_rewards, torch.tensor([LN3, -LN3], dtype=torch.float64))
    torch.testing.assert_close(rejected_rewards, torch.tensor([-LN3, LN3], dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss_type", "options", "expected", "expected_swapped"),
    [
        ("slic", {"slic_delta": 3.0}, 3 - LN9, 3 + LN9),
        ("simpo", {"simpo_gamma": 0.0}, math.log(1 + 3**-0.3), math.log(1 + 3**0.3)),
        ("simpo", {"simpo_gamma": 0.0, "label_smoothing": 0.2},
         0.8 * math.log(1 + 3**-0.3) + 0.2 * math.log(1 + 3**0.3),
         0.8 * math.log(1 + 3**0.3) + 0.2 * math.log(1 + 3**-0.3)),
        ("odpo", {"odpo_alpha": 2.0}, math.log(1 + 9 / 9), math.log(1 + 9 * 9)),
        ("dpop", {"dpop_lambda": 2.0}, -math.log(0.9), math.log(1 + 81)),
        ("cal_dpo", {"cal_weight": 1.0}, math.log(1 + 3**-20) + 2 * (10 * LN3 - 5) ** 2,
         math.log(1 + 3**20) + 2 * (10 * LN3 + 5) ** 2),
        ("discopop", {"discopop_tau": 0.5}, (-math.log(0.9) + 9**2 / 9) / (1 + 9**2),
         (-math.log(0.1) * 9**2 + 9) / (1 + 9**2)),
        # 1 - e^(-c) and so on; at α = 1/(10 ln 3) the exponentials are 1/e and e
        ("hinge", {"f_divergence": "alpha_divergence", "f_alpha": 0.1 / LN3},
         max(0, 1 - LN3 * (math.e - 1 / math.e)), 1 + LN3 * (math.e - 1 / math.e)),
        ("hinge", {"f_divergence": "js_divergence"}, 0.0, 1 + LN3),  # ls(c) - ls(-c) is c
    ],
)  # fmt: skip
def test_hand_worked_values_with_options(
    loss_type: str, options: dict[str, float], expected: float, expected_swapped: float
) -> None:
    c = torch.tensor([10 * LN3, -10 * LN3], dtype=torch.float64)
    lengths = torch.tensor([10, 5])
    found, _, _ = loss_of(c, -c, loss_type, chosen_lengths=lengths, rejected_lengths=lengths.flip(0), **options)
    torch.testing.assert_close(found, torch.tensor([expected, expected_swapped], dtype=torch.float64))


def test_orpo_by_hand() -> None:
    # chosen: probability 1/2 per token, odds 1; rejected: 1/4, odds 1/3. The ratio of odds is 3, its sigmoid 3/4.
    half, quarter = torch.tensor([-10 * math.log(2)]), torch.tensor([-5 * math.log(4)])
    ten, five = torch.tensor([10]), torch.tensor([5])
    found, chosen, rejected = dpo_loss(
        half, quarter, None, None, beta=0.2, loss_type="orpo", chosen_lengths=ten, rejected_lengths=five
    )
    torch.testing.assert_close(found, torch.tensor([-0.2 * math.log(3 / 4)]))
    torch.testing.assert_close(chosen, torch.tensor([-0.2 * math.log(2)]))
    torch.testing.assert_close(rejected, torch.tensor([-0.2 * math.log(4)]))
    found, _, _ = dpo_loss(
        quarter, half, None, None, beta=0.2, loss_type="orpo", chosen_lengths=five, rejected_lengths=ten
    )
    torch.testing.assert_close(found, torch.tensor([-0.2 * math.log(1 / 4)]))


def test_every_loss_of_pairs_has_a_hand_worked_value() -> None:
    assert {row[0] for row in BY_HAND} | {"orpo"} == set(PAIR_LOSSES)


def plain(loss_type: str) -> Callable[..., Tensor]:
    """The loss in plain exponentials and logarithms, of (c, r, beta, smoothing, n_c, n_r); rated 5 and 2."""

    def sig(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    def log_sig(x: Tensor) -> Tensor:
        return torch.log(sig(x))

    def odds(x: Tensor) -> Tensor:
        return torch.exp(x) / (1 - torch.exp(x))

    def discopop(c: Tensor, r: Tensor, b: float, *_: object) -> Tensor:
        m = sig(b * (c - r) / 0.05)
        return -log_sig(b * (c - r)) * (1 - m) + torch.exp(-b * (c - r)) * m

    def exo(c: Tensor, r: Tensor, b: float, e: float, *_: object) -> Tensor:
        q = torch.stack([b * c, b * r]).softmax(0)
        return (q * (q / torch.tensor([[1 - e], [e]], dtype=q.dtype)).log()).sum(0)

    return {
        "sigmoid": lambda c, r, b, e, *_: -(1 - e) * log_sig(b * (c - r)) - e * log_sig(b * (r - c)),
        "robust": lambda c, r, b, e, *_: (e * log_sig(b * (r - c)) - (1 - e) * log_sig(b * (c - r))) / (1 - 2 * e),
        "hinge": lambda c, r, b, *_: (1 - b * c + b * r).clamp(min=0),
        "ipo": lambda c, r, b, e, n, m: (c / n - r / m - 0.5 / b) ** 2,
        "sigmoid_norm": lambda c, r, b, e, n, m: -log_sig(b * c / n - b * r / m),
        "exo_pair": exo,
        "nca_pair": lambda c, r, b, *_: -log_sig(b * c) - log_sig(-b * c) / 2 - log_sig(-b * r) / 2,
        "bco_pair": lambda c, r, b, *_: -log_sig(b * c) - log_sig(-b * r),
        "sppo_hard": lambda c, r, b, *_: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
        "apo_zero": lambda c, r, b, *_: 1 - sig(b * c) + sig(b * r),
        "apo_down": lambda c, r, b, *_: sig(b * c) + 1 - sig(b * (c - r)),
        "discopop": discopop,
        "ipo_sum": lambda c, r, b, *_: (c - r - 0.5 / b) ** 2,
        "dpop": lambda c, r, b, *_: -log_sig(b * (c - r - 2 * (-c).clamp(min=0))),
        "odpo": lambda c, r, b, *_: torch.log(1 + 3 * torch.exp(-b * (c - r))),
        "cal_dpo": lambda c, r, b, *_: -log_sig(c - r) + ((c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2) / 2,
        "cpo": lambda c, r, b, e, *_: -(1 - e) * log_sig(b * (c - r)) - e * log_sig(b * (r - c)),
        "slic": lambda c, r, b, *_: (1 - b * c + b * r).clamp(min=0),
        "simpo": lambda c, r, b, e, n, m: (
            -(1 - e) * log_sig(b * c / n - b * r / m - 0.5) - e * log_sig(b * r / m - b * c / n + 0.5)
        ),
        "orpo": lambda c, r, b, e, n, m: -b * torch.log(odds(c / n) / (odds(c / n) + odds(r / m))),
    }[loss_type]


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_values_and_gradients_equal_the_plain_expression(loss_type: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = torch.randn(2, 64, generator=generator, dtype=torch.float64) * 8
    lengths = torch.randint(1, 40, (2, 64), generator=generator)
    smoothing = 0.2 if LOSSES[loss_type].option("label_smoothing") else 0.0
    penalty = {"dpop_lambda": 2.0} if loss_type == "dpop" else {}  # at 50, the plain expression overflows
    if not LOSSES[loss_type].reference:
        ratios = -0.1 - ratios.abs()  # log-probs

    exact = ratios.clone().requires_grad_()
    expected = plain(loss_type)(exact[0], exact[1], 0.3, smoothing, lengths[0], lengths[1])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)

    given = ratios.to(dtype).requires_grad_()
    found, _, _ = loss_of(
        given[0], given[1], loss_type, beta=0.3, label_smoothing=smoothing, chosen_lengths=lengths[0],
        rejected_lengths=lengths[1], **penalty,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(found.sum(), given)
    assert found.dtype == gradient.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


# Values at margins of -10,000 and +10,000 (c = -r, beta 1): linear, quadratic or bounded growth, no overflow.
EXTREMES = {
    "sigmoid": (1e4, 0.0),
    "robust": (1e4, 0.0),
    "hinge": (1e4 + 1, 0.0),
    "ipo": ((-5e2 - 1e3 - 0.5) ** 2, (5e2 + 1e3 - 0.5) ** 2),
    "sigmoid_norm": (1.5e3, 0.0),
    "exo_pair": (-math.log(0.1), -math.log(0.9)),
    "nca_pair": (5e3 + 2.5e3, 2.5e3),
    "bco_pair": (1e4, 0.0),
    "sppo_hard": (2 * 5000.5**2, 2 * 4999.5**2),
    "apo_zero": (2.0, 0.0),
    "apo_down": (1.0, 1.0),
    "discopop": (1e4, 0.0),
    "ipo_sum": (10000.5**2, 9999.5**2),
    "dpop": (1e4 + 50 * 5e3, 0.0),
    "odpo": (1e4 + LN3, 0.0),
    "cal_dpo": (1e4 + 5000.5**2, 4999.5**2),
    "cpo": (1e4, 0.0),
    "slic": (1e4 + 1, 0.0),
    "simpo": (1.5e3 + 0.5, 0.0),
}


@pytest.mark.parametrize("loss_type", [name for name in PAIR_LOSSES if name != "orpo"])
def test_far_from_the_reference_values_and_gradients_are_finite_and_right(loss_type: str) -> None:
    c = torch.tensor([-5e3, 5e3], requires_grad=True)
    found, _, _ = loss_of(c, -c, loss_type, beta=1.0)
    torch.testing.assert_close(found, torch.tensor(EXTREMES[loss_type]))
    (gradient,) = torch.autograd.grad(found.sum(), c)
    assert torch.isfinite(gradient).all()


def test_orpo_stays_finite_where_a_completion_is_certain_or_impossible() -> None:
    logps = torch.tensor([0.0, -1e4], requires_grad=True)  # the log-odds of a certain completion are -log(ε)
    one = torch.ones(2)
    found, _, _ = dpo_loss(
        logps, logps.flip(0), None, None, beta=0.5, loss_type="orpo", chosen_lengths=one, rejected_lengths=one
    )
    epsilon = torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5 * (1e4 - math.log(epsilon))]))
    (gradient,) = torch.autograd.grad(found.sum(), logps)
    torch.testing.assert_close(gradient, torch.tensor([0.5 / epsilon, -0.5]))  # the second pair pulls both back


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_rewards_are_detached_and_pairs_do_not_touch_each_other(loss_type: str) -> None:
    c = torch.tensor([-3.0, -20.0, -0.5], requires_grad=True)
    r = torch.tensor([-2.0, -40.0, -0.5])
    found, chosen, rejected = loss_of(c, r, loss_type)
    assert found.requires_grad
    assert not chosen.requires_grad
    assert not rejected.requires_grad
    for i in range(3):
        torch.testing.assert_close(found[i : i + 1], loss_of(c[i : i + 1], r[i : i + 1], loss_type)[0])
    assert loss_of(c[:0], r[:0], loss_type)[0].shape == (0,)


def test_nll_sums_to_the_mean_over_the_tokens_of_the_step() -> None:
    first, second = (torch.tensor([-2.0, -10.0]), torch.tensor([-6.0]))  # 1 + 5 tokens, and 3 in another micro-batch
    found = nll_loss(first, 9).sum() + nll_loss(second, 9).sum()
    torch.testing.assert_close(found, torch.tensor(18 / 9))


def test_nll_over_completions_is_a_mean_of_each() -> None:
    found = nll_loss(torch.tensor([-2.0, -10.0, -6.0]), torch.tensor([1, 5, 3]))
    torch.testing.assert_close(found, torch.tensor([2.0, 2.0, 2.0]))
    with pytest.raises(ValueError, match="one shape"):
        nll_loss(torch.zeros(2), torch.ones(2, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmod"}, "'sigmod' does not exist; did you mean 'sigmoid'"),
        ({"loss_type": "zzz"}, "use one of sigmoid, robust"),
        ({"beta": 0.0}, "beta must be a positive number, not 0.0"),
        ({"beta": -0.1}, "beta must be"),
        ({"beta": math.nan}, "beta must be"),
        ({"label_smoothing": 0.6}, "label_smoothing must be at least 0 and at most 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and at most 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "no meaning for loss_type 'hinge'"),
        ({"label_smoothing": 0.5, "loss_type": "robust"}, "below 0.5"),
        ({"loss_type": "exo_pair"}, "above 0"),
        ({"loss_type": "ipo"}, "'ipo' needs chosen_lengths"),
        ({"loss_type": "sigmoid_norm", "chosen_lengths": torch.ones(2)}, "needs rejected_lengths"),
        ({"loss_type": "ipo", "chosen_lengths": torch.ones(2), "rejected_lengths": torch.ones(1)}, "one shape"),
        ({"loss_type": "odpo"}, "'odpo' needs chosen_ratings"),
        ({"loss_type": "cpo"}, "'cpo' has no reference: give None as reference_chosen_logps"),
        ({"loss_type": "plackett_luce"}, "'plackett_luce' is a loss of lists, not of pairs; use list_loss"),
        ({"loss_type": "kto"}, "'kto' is a loss of labels, not of pairs; use label_loss"),
        ({"simpo_gamma": 1.0}, "simpo_gamma has no meaning for loss_type 'sigmoid'; leave it out, or use one of simpo"),
        ({"gamma": 1.0}, "no loss has an option gamma; the options of sigmoid are label_smoothing, f_divergence"),
        ({"loss_type": "dpop", "dpop_lamda": 1.0}, "an option dpop_lamda; did you mean 'dpop_lambda'"),
        ({"loss_type": "apo_zero", "gamma": 1.0}, "no loss has an option gamma; apo_zero has no option"),
        ({"loss_type": {"sigmoid": 1.0}}, "must be the name of one loss, not .*takes sums"),
        ({"loss_type": "discopop", "discopop_tau": 1.0}, "discopop_tau must be above 0 and below 1"),
        ({"f_divergence": "kl"}, "f_divergence must be one of reverse_kl, forward_kl"),
        ({"f_alpha": 0.5}, "f_alpha has no effect unless f_divergence is alpha_divergence"),
        ({"f_alpha": 0.0, "f_divergence": "alpha_divergence"}, "f_alpha must be above 0 and at most 1"),
        ({"f_divergence": "forward_kl", "loss_type": "ipo_sum"}, "f_divergence has no meaning for loss_type 'ipo_sum'"),
    ],
)
def test_wrong_options_are_rejected(options: dict[str, object], message: str) -> None:
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match=message):
        dpo_loss(zeros, zeros, zeros, zeros, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", range(6))
def test_coarse_dtypes_are_rejected(dtype: torch.dtype, position: int) -> None:
    names = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps",
             "chosen_lengths", "rejected_lengths")  # fmt: skip
    tensors = {name: torch.ones(2) for name in names}
    tensors[names[position]] = tensors[names[position]].to(dtype)
    with pytest.raises(ValueError, match=rf"^{names[position]} is {dtype}.*\.float\(\)"):
        dpo_loss(**tensors, loss_type="ipo")


def test_nll_rejects_coarse_dtypes_and_takes_fp64() -> None:
    with pytest.raises(ValueError, match=r"^logps is torch\.bfloat16.*\.float\(\)"):
        nll_loss(torch.ones(2, dtype=torch.bfloat16), 3)
    assert nll_loss(torch.ones(2, dtype=torch.float64), 3).dtype == torch.float64


def test_shapes_that_would_broadcast_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"one shape.*'policy_rejected_logps': \(2, 1\)"):
        dpo_loss(torch.zeros(2), torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("loss_type", [name for name in PAIR_LOSSES if not LOSSES[name].option("label_smoothing")])
def test_label_smoothing_is_never_ignored(loss_type: str) -> None:
    with pytest.raises(ValueError, match="label_smoothing has no meaning"):
        loss_of(torch.zeros(1), torch.zeros(1), loss_type, label_smoothing=0.1)


def test_a_missing_reference_is_named() -> None:
    with pytest.raises(ValueError, match="'sigmoid' needs reference_chosen_logps"):
        dpo_loss(torch.zeros(2), torch.zeros(2), None, None)


def test_pairs_as_columns_name_what_is_missing() -> None:
    for name, missing in (("sigmoid", "reference"), ("simpo", "lengths"), ("odpo", "ratings")):
        reference = torch.zeros(2, 2) if name == "odpo" else None
        with pytest.raises(ValueError, match=f"'{name}' needs {missing}"):
            pair_loss(LOSSES[name], torch.zeros(2, 2), reference, beta=0.1)


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
@pytest.mark.parametrize("shape", [(), (3, 1), (2, 3)])
def test_every_shape_of_pairs_is_taken(loss_type: str, shape: tuple[int, ...]) -> None:
    c, r = -torch.arange(1.0, 13.0).view(2, 6)[:, : math.prod(shape)]
    found = loss_of(c.view(shape), r.view(shape), loss_type)
    for values, expected in zip(found, loss_of(c, r, loss_type), strict=True):
        assert torch.equal(values, expected.view(shape))


def test_losses_are_called_by_name_and_for_their_own_rows() -> None:
    logps, zeros, labels = -torch.arange(6.0).view(2, 3), torch.zeros(2, 3), torch.tensor([True, False, True])
    for given in ("plackett_luce", LOSSES["plackett_luce"]):
        expected = plackett_luce_loss(logps, zeros, beta=0.1)
        assert torch.equal(list_loss(given, logps, zeros)[0], expected)
    expected = kto_loss(logps[0], zeros[0], labels, shift=torch.tensor(1.0))
    assert torch.equal(label_loss("kto", logps[0], zeros[0], labels, shift=torch.tensor(1.0))[0], expected)
    for name, function in (("sigmoid", list_loss), (LOSSES["bco"], list_loss)):
        with pytest.raises(ValueError, match=r"not of lists; use (dpo|label)_loss"):
            function(name, logps, zeros)
    with pytest.raises(ValueError, match="'nca' is a loss of lists, not of labels; use list_loss"):
        label_loss("nca", logps[0], zeros[0], labels)
    with pytest.raises(ValueError, match=r"mask must be bool, not torch\.int64"):
        list_loss("plackett_luce", logps, zeros, mask=torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize("returned", [None, 1.0, ()])
def test_check_says_what_a_function_must_return(returned: object) -> None:
    with pytest.raises(AssertionError, match="must return losses, a tensor"):
        check(lambda *_: returned, "sigmoid")


def test_ratings_that_are_not_known_do_not_pass_unnoticed() -> None:
    zero, one, nan = torch.zeros(1), torch.ones(1), torch.tensor([math.nan])
    found, _, _ = dpo_loss(zero, zero, zero, zero, loss_type="odpo", chosen_ratings=nan, rejected_ratings=one)
    assert found.isnan()
    ratings = torch.tensor([[2.0, math.nan, 1.0], [3.0, 2.0, 1.0]])
    for name, loss in LOSSES.items():
        if loss.rows == "lists":
            found, _ = list_loss(loss, torch.zeros(2, 3), torch.zeros(2, 3), beta=0.1, ratings=ratings)
            assert found.isnan().tolist() == [True, False], name


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("plackett_luce", {"policy": torch.zeros(2, 3).bfloat16()}, r"policy_logps is torch.bfloat16.*\.float\(\)"),
        ("nca", {"ratings": torch.zeros(2, 3).half()}, "ratings is torch.float16"),
        ("nca", {"ratings": None}, "'nca' needs ratings"),
        ("all_pairs", {"reference": None}, "'all_pairs' needs reference"),
        ("kto", {"reference": None}, "'kto' needs reference"),
        ("all_pairs", {"mask": torch.ones(2, 2, dtype=torch.bool)}, r"one shape.*'mask': \(2, 2\)"),
        ("all_pairs", {"policy": torch.zeros(2), "reference": torch.zeros(2), "ratings": None}, r"shape \[B, K\]"),
        ("info_nca", {"beta": 0.0}, "beta must be a positive number"),
        ("lipo_lambda", {"options": {"rating_scale": 0.0}}, "rating_scale must be above 0"),
        (
            "plackett_luce",
            {"options": {"rating_scale": 1.0}},
            "rating_scale has no meaning for loss_type",
        ),
        ("kto", {"shift": None}, "'kto' needs shift, its kl"),
        ("bco", {"shift": None}, "'bco' needs shift, its running_mean"),
        ("kto", {"labels": torch.ones(2)}, "labels must be bool, not torch.float32"),
        ("kto", {"labels": torch.ones(2, 1, dtype=torch.bool)}, "one shape"),
        ("bco", {"reference": torch.zeros(2).half()}, "reference_logps is torch.float16"),
        ("kto", {"options": {"desirable_weight": -1.0}}, "desirable_weight must be above 0"),
    ],
)
def test_mistakes_with_lists_and_labels(name: str, changes: dict[str, object], message: str) -> None:
    loss, shape = find_loss(name), (2, 3) if LOSSES[name].rows == "lists" else (2,)
    given = {"policy": torch.zeros(shape), "reference": torch.zeros(shape), "beta": 0.1}
    if loss.rows == "lists":
        given |= {"ratings": torch.zeros(shape)}
    else:
        given |= {"labels": torch.ones(2, dtype=torch.bool), "shift": torch.tensor(0.0)}
    with pytest.raises(ValueError, match=message):
        (list_loss if loss.rows == "lists" else label_loss)(loss, **given | changes)


def test_beta_is_checked_without_the_registry_too() -> None:
    with pytest.raises(ValueError, match="beta must be a positive number"):
        LOSSES["plackett_luce"].function(torch.zeros(1, 2), torch.zeros(1, 2), beta=-1.0)
    with pytest.raises(ValueError, match="beta must be a positive number"):
        LOSSES["kto"].function(torch.zeros(1), torch.zeros(1), torch.tensor([True]), beta=math.nan)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_and_its_function_agree(name: str) -> None:
    loss = LOSSES[name]
    settings = resolve_options(loss, 0.1, {"label_smoothing": 0.1} if name == "exo_pair" else {})
    assert set(settings) == {option.name for option in loss.options}
    assert loss.function.__name__ == f"{name}_loss"
    parameters = inspect.signature(loss.function).parameters
    for option in loss.options:
        if option.name in ("f_divergence", "f_alpha"):
            assert inspect.signature(f_divergence_map).parameters[option.name].default == option.default
        elif name != "exo_pair":
            assert parameters[option.name].default == option.default
