"""`notus.losses.check`: it accepts what is right, in every form it is written in, and names what is not."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from notus.losses import LOSSES, check, dpo_loss, label_loss, list_loss


def ours(name: str, **options: object) -> Callable[..., tuple[Tensor, ...]]:
    loss = LOSSES[name]
    if loss.rows == "pairs":
        references = () if loss.reference else (None, None)
        return lambda *logps, **rest: dpo_loss(*logps, *references, loss_type=name, beta=0.2, **options, **rest)
    entry = list_loss if loss.rows == "lists" else label_loss
    return functools.partial(entry, loss, beta=0.2, options=options)


def required(name: str) -> dict[str, float]:
    return {"label_smoothing": 0.1} if name == "exo_pair" else {}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduced", [lambda x: x, lambda x: x[0], lambda x: x[0].mean(), lambda x: x[0].sum()])
def test_every_loss_passes_against_itself(name: str, reduced: Callable[..., object]) -> None:
    function = ours(name, **required(name))
    check(lambda *args, **rest: reduced(function(*args, **rest)), name, beta=0.2, **required(name))


@pytest.mark.parametrize("name", LOSSES)
def test_another_beta_a_wrong_factor_and_a_detached_part_are_found(name: str) -> None:
    function = ours(name, **required(name))
    with pytest.raises(AssertionError, match=f"^{name} in torch.float64: the loss of input 0 is"):
        check(lambda *args, **rest: function(*args, **rest)[0] * 1.001 + 1e-6, name, beta=0.2, **required(name))
    if name != "slic":  # whose first inputs are learned at either β
        with pytest.raises(AssertionError, match=f"^{name} in torch.float64: the loss of input"):
            check(function, name, beta=0.21, **required(name))

    def half_the_gradient(*args: Tensor, **rest: Tensor) -> Tensor:
        losses = function(*args, **rest)[0]
        return (losses + losses.detach()) / 2

    with pytest.raises(AssertionError, match=f"^{name} in torch.float64: the gradient by policy_"):
        check(half_the_gradient, name, beta=0.2, **required(name))


def test_a_plain_formula_passes_and_its_unstable_forms_are_found() -> None:
    def margin(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor) -> Tensor:
        return 0.1 * ((pc - pr) - (rc - rr))  # another order of terms than here

    check(lambda *logps: -logsigmoid(margin(*logps)), "sigmoid", beta=0.1)
    with pytest.raises(AssertionError, match=r"the loss of input 11 is inf, not 2000\.0, at beta=0.1, policy_chosen_"):
        check(lambda *logps: -torch.log(torch.sigmoid(margin(*logps))), "sigmoid", beta=0.1)
    with pytest.raises(AssertionError, match="the loss of input 11 is inf"):
        check(lambda *logps: torch.log(1 + torch.exp(-margin(*logps))), "sigmoid", beta=0.1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda pc, pr, rc, rr: -logsigmoid(0.1 * (pc - pr - rc + rr)).detach(), "no gradient"),
        (lambda pc, pr, rc, rr: -logsigmoid(0.1 * (pc - pr - rc + rr))[:, None], r"shape \[12\], not \[12, 1\]"),
        (lambda pc, pr, rc, rr: -logsigmoid(0.1 * (pc - pr.detach() - rc + rr)), "gradient by policy_rejected_logps"),
        (lambda pc, pr, rc, rr: -logsigmoid(0.1 * (pc - pr)), "the loss of input 0"),
    ],
)
def test_common_mistakes_are_named(function: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(function, "sigmoid")


def test_other_right_gradients_at_a_kink_and_another_dtype_pass() -> None:
    def dpop(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor) -> Tensor:
        penalty = 50 * torch.maximum(torch.zeros_like(pc), rc - pc)  # has the gradient 1/2 where relu has 0
        return -logsigmoid(0.1 * (pc - rc - pr + rr - penalty)).double()

    check(dpop, "dpop", beta=0.1)


def test_options_are_those_of_the_loss() -> None:
    check(ours("sigmoid", label_smoothing=0.3), "sigmoid", beta=0.2, label_smoothing=0.3)
    check(ours("sigmoid", f_divergence="forward_kl"), "sigmoid", beta=0.2, f_divergence="forward_kl")
    with pytest.raises(AssertionError, match="the loss of input 0"):
        check(ours("sigmoid"), "sigmoid", beta=0.2, label_smoothing=0.3)
    with pytest.raises(ValueError, match="simpo_gamma has no meaning"):
        check(ours("sigmoid"), "sigmoid", simpo_gamma=1.0)
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        check(ours("sigmoid"), "sigmiod")


def test_a_loss_of_lists_that_ignores_the_mask_or_ties_is_found() -> None:
    function = ours("plackett_luce")
    with pytest.raises(AssertionError, match=r"input 3 .*mask=\[True, True, True, False\]"):
        check(lambda *logps, ratings, mask: function(*logps, ratings=ratings), "plackett_luce", beta=0.2)
    with pytest.raises(AssertionError, match=r"input 1 .*ratings=\[4.5, 3.0, 3.0, 2.0\]"):
        check(lambda *logps, ratings, mask: function(*logps, mask=mask), "plackett_luce", beta=0.2)
