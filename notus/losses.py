"""Preference losses as pure functions of summed log-probs, and the registry that names them.

Notation, for a prompt with a chosen and a rejected completion, log-probs in nats, summed over tokens:

    c = log policy(chosen)   - log reference(chosen)      log-ratio of the chosen completion
    r = log policy(rejected) - log reference(rejected)    log-ratio of the rejected completion
    βc, βr                                                rewards; β(c - r) is their margin
    n_c, n_r                                              numbers of completion tokens
    ε                                                     label smoothing, the assumed share of swapped labels
    σ, ls                                                 the logistic function and its logarithm

Every function returns one value per row, [B]; nothing is reduced. Values and gradients are finite for log-ratios of any
size that training can bring: no exponential overflows.

A loss is a function and a row of `LOSSES`. The row says which rows of data it learns from, what it is computed from and
which options it takes. Config checks, error messages and docs are made from these rows.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

Rows = Literal["pairs", "lists", "labels"]
"""Rows of data: a chosen and a rejected completion; K rated completions; one completion with a label, good or bad."""

Takes = Literal["margin", "rewards", "log_ratios", "mean_log_ratios", "logps", "mean_logps"]
"""What a loss is computed from. "margin": β(c - r). "rewards": βc and βr. "log_ratios": c, r and β. "logps": the same
without a reference, so log policy(completion), and β. "mean_...": per token, c/n_c and r/n_r."""

OptionValue = float | str


@dataclasses.dataclass(frozen=True)
class Option:
    """A setting of a loss beside β.

    Attributes:
        name: of the keyword argument, and of the key in `dpo.options`.
        default: its value if it is not given.
        meaning: for the docs.
        low, high: the least and the largest value.
        above, below: whether these two themselves are excluded.
        choices: the values of an option that is a word; it has no limits then.
    """

    name: str
    default: OptionValue
    meaning: str
    low: float = 0.0
    high: float = math.inf
    above: bool = False
    below: bool = False
    choices: tuple[str, ...] = ()

    def allows(self, value: object) -> bool:
        """Return whether the option may have this value."""
        if self.choices:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return self.low <= value <= self.high and not (
            (self.above and value == self.low) or (self.below and value == self.high)
        )

    @property
    def limits(self) -> str:
        """Return the values that it may have, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Loss:
    """A row of the registry.

    Attributes:
        name: `dpo.loss_type`.
        function: the loss, a pure function.
        takes: what the function is computed from.
        source: where it was published.
        options: what it takes beside that, as keyword arguments.
        rows: which rows of data it learns from.
        ratings: whether it needs the rows' ratings.
    """

    name: str
    function: Callable[..., Tensor]
    takes: Takes
    source: str
    options: tuple[Option, ...] = ()
    rows: Rows = "pairs"
    ratings: bool = False

    @property
    def reference(self) -> bool:
        """Whether it compares with a reference model."""
        return not self.takes.endswith("logps")

    @property
    def per_token(self) -> bool:
        """Whether it needs the lengths of the completions."""
        return self.takes.startswith("mean_")

    def option(self, name: str) -> Option | None:
        """Return its option of this name; None if it has none."""
        return next((option for option in self.options if option.name == name), None)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_ratings: Tensor | None = None,
    rejected_ratings: Tensor | None = None,
    **options: OptionValue,
) -> tuple[Tensor, Tensor, Tensor]:
    """A preference loss per pair, computed in the dtype of its inputs: fp32 or fp64.

    Args:
        policy_chosen_logps: [B] log-prob of each chosen completion under the policy, in nats.
        policy_rejected_logps: [B] the same of the rejected completions.
        reference_chosen_logps: [B] the same of the chosen completions under the reference; None for a loss without one.
        reference_rejected_logps: [B] and of the rejected ones.
        beta: β > 0, how strongly the policy is held to the reference.
        loss_type: the name of a loss of pairs in `LOSSES`.
        label_smoothing: ε in [0, 0.5], for losses that have this option.
        chosen_lengths: [B] completion tokens n_c, each at least 1; needed by losses per token.
        rejected_lengths: [B] completion tokens n_r, likewise.
        chosen_ratings: [B] how good the chosen completions are; needed by losses that weigh pairs by their ratings.
        rejected_ratings: [B] and the rejected ones.
        options: further options of the loss, by name; see its row.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [B]. The rewards are βc and βr, detached; without a reference,
        β times the log-prob (per token, if the loss is).

    Raises:
        ValueError: an unknown loss, an option out of range or without meaning for the loss, missing
            tensors, shapes that differ, or a dtype below fp32.
    """
    loss = find_loss(loss_type, rows="pairs")
    if label_smoothing != 0:
        options["label_smoothing"] = label_smoothing
    tensors = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        "chosen_ratings": chosen_ratings,
        "rejected_ratings": rejected_ratings,
    }
    _check_tensors(**tensors)
    needed = ["policy", *["reference"] * loss.reference, *["lengths"] * loss.per_token, *["ratings"] * loss.ratings]
    for name, tensor in tensors.items():
        if tensor is None and any(need in name for need in needed):
            raise ValueError(f"loss_type {loss.name!r} needs {name}")
        if tensor is not None and "reference" in name and not loss.reference:
            raise ValueError(f"loss_type {loss.name!r} has no reference: give None as {name}")
    losses, rewards = pair_loss(
        loss,
        torch.stack([policy_chosen_logps, policy_rejected_logps], dim=1),
        _stacked(reference_chosen_logps, reference_rejected_logps),
        beta=beta,
        options=options,
        lengths=_stacked(chosen_lengths, rejected_lengths),
        ratings=_stacked(chosen_ratings, rejected_ratings),
    )
    return losses, rewards[:, 0], rewards[:, 1]


def pair_loss(
    loss: Loss,
    policy: Tensor,
    reference: Tensor | None,
    *,
    beta: float,
    options: Mapping[str, OptionValue] = MappingProxyType({}),
    lengths: Tensor | None = None,
    ratings: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dpo_loss` of columns: [B, 2] of chosen and rejected. What the loss does not need is not looked at.

    Returns:
        losses [B] and rewards [B, 2].
    """
    settings: dict[str, Any] = resolve_options(loss, beta, options)
    ratios = policy
    if loss.reference:
        assert reference is not None
        ratios = policy - reference
    measured = ratios
    if loss.per_token:
        assert lengths is not None
        measured = ratios / lengths
    if loss.ratings:
        assert ratings is not None
        settings |= {"chosen_ratings": ratings[:, 0], "rejected_ratings": ratings[:, 1]}
    chosen, rejected = measured.unbind(1)
    match loss.takes:
        case "margin":
            losses = loss.function(beta * (chosen - rejected), **settings)
        case "rewards":
            losses = loss.function(beta * chosen, beta * rejected, **settings)
        case _:
            losses = loss.function(chosen, rejected, beta, **settings)
    # rewards are those of the whole completions, whatever the loss looks at
    return losses, beta * (ratios if loss.reference else measured).detach()


def _stacked(chosen: Tensor | None, rejected: Tensor | None) -> Tensor | None:
    return None if chosen is None or rejected is None else torch.stack([chosen, rejected], dim=1)


def nll_loss(logps: Tensor, num_tokens: float) -> Tensor:
    """Negative log-likelihood: SFT's loss, and what `dpo.nll_weight` adds for the chosen completions.

    Args:
        logps: [B] log-prob of each completion under the policy, summed over its tokens, nats.
        num_tokens: completion tokens of the whole optimizer step, over all micro-batches and ranks.

    Returns:
        [B]; its sum over the whole step is the mean over tokens. (The term in Iterative RPO, 2404.19733
        eq. 1, is a mean over each completion instead: there, tokens of short completions weigh more.)

    Raises:
        ValueError: a dtype below fp32.
    """
    _check_tensors(logps=logps)
    return -logps / num_tokens


# ---- losses of the margin β(c - r) ----


def sigmoid_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO, 2305.18290 eq. 7: -ls(margin).

    With ε > 0, conservative DPO (Mitchell 2023): the expected loss if a share ε of the labels is swapped.
    """
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def robust_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO, 2403.00409 sec. 3.1: an unbiased estimate of the loss on true labels.

    It takes a share ε of the given labels to be swapped. Unlike the others it is not bounded below.
    """
    as_labelled, swapped = -logsigmoid(margin), -logsigmoid(-margin)
    return ((1 - label_smoothing) * as_labelled - label_smoothing * swapped) / (1 - 2 * label_smoothing)


def hinge_loss(margin: Tensor) -> Tensor:
    """max(0, 1 - margin): the hinge of SLiC, 2305.10425, which itself has no reference.

    On log-ratios to a reference, as here, it is the hinge-norm loss of RSO, 2309.06657.
    """
    return torch.relu(1 - margin)


def exo_pair_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    """EXO, 2402.00856 eq. 16 with two completions: KL(q || p).

    q = (σ(margin), σ(-margin)) is the policy's belief of which one is better, p = (1 - ε, ε) the label's.
    """
    as_labelled = torch.sigmoid(margin) * (logsigmoid(margin) - math.log1p(-label_smoothing))
    swapped = torch.sigmoid(-margin) * (logsigmoid(-margin) - math.log(label_smoothing))
    return as_labelled + swapped


def discopop_loss(margin: Tensor, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP, 2406.08414 eq. 5: (1 - m) · logistic loss + m · exp(-margin), with m = σ(margin/τ).

    m and exp(-margin) are multiplied as logarithms, because the latter overflows alone. As τ < 1, their
    product stays below 1 and vanishes on both sides: the loss grows as the logistic loss does.
    """
    logistic = softplus(-margin) * torch.sigmoid(-margin / discopop_tau)
    exponential = torch.exp(logsigmoid(margin / discopop_tau) - margin)
    return logistic + exponential


# ---- losses of each completion's own reward βc, βr ----


def nca_pair_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """NCA, 2402.05369 sec. 4.1, for a pair: each completion against noise, not against the other one.

    Both of them also stand as noise samples, with weight 1/2.
    """
    noise = -0.5 * logsigmoid(-chosen_rewards) - 0.5 * logsigmoid(-rejected_rewards)
    return -logsigmoid(chosen_rewards) + noise


def bco_pair_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """BCO, 2404.04656: a binary classifier of chosen against rejected completions.

    The paper subtracts the running mean of all rewards from each reward. Here nothing is subtracted, so that
    a pair's loss does not depend on the pairs before it.
    """
    return -logsigmoid(chosen_rewards) - logsigmoid(-rejected_rewards)


def apo_zero_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """APO-zero, 2408.06266 eq. 7, plus 1: chosen up, rejected down; for data better than the model.

    1 - σ(x) is written σ(-x), which keeps its precision where σ(x) rounds to 1.
    """
    return torch.sigmoid(-chosen_rewards) + torch.sigmoid(rejected_rewards)


def apo_down_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """APO-down, 2408.06266 eq. 8, plus 1: both down, rejected further; for a model better than its data."""
    return torch.sigmoid(chosen_rewards) + torch.sigmoid(rejected_rewards - chosen_rewards)


# ---- losses with a target of their own for the log-ratios ----


def sppo_hard_loss(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """SPPO, 2405.00675 eq. 4.7 with win probabilities 1 and 0: regress c on 1/(2β) and r on -1/(2β)."""
    return (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2


def ipo_loss(mean_c: Tensor, mean_r: Tensor, beta: float) -> Tensor:
    """IPO, 2310.12036 eq. 17, where β is called τ: regress the difference of the log-ratios on 1/(2β).

    `mean_c` and `mean_r` are log-ratios per token, c/n_c and r/n_r. The paper writes sums. TRL says that its
    authors confirmed means as what they used; the meaning of β is then the same for short and long ones.
    """
    return (mean_c - mean_r - 1 / (2 * beta)) ** 2


def sigmoid_norm_loss(mean_c: Tensor, mean_r: Tensor, beta: float) -> Tensor:
    """Length-normalised DPO, Tülu 3, 2411.15124: DPO on log-ratios per token, c/n_c and r/n_r."""
    return -logsigmoid(beta * (mean_c - mean_r))


# ---- the registry ----

SMOOTHING = Option(
    "label_smoothing", 0.0, "ε, the assumed share of swapped labels; `dpo.label_smoothing` in a config", 0.0, 0.5
)
_SMOOTHING_BELOW_HALF = dataclasses.replace(SMOOTHING, below=True)  # robust divides by 1 - 2ε
_SMOOTHING_ABOVE_ZERO = dataclasses.replace(SMOOTHING, above=True)  # exo_pair takes the logarithm of ε
DISCOPOP_TAU = Option(
    "discopop_tau", 0.05, "τ, how sharply the two parts are switched", 0.0, 1.0, above=True, below=True
)

LOSSES = {
    loss.name: loss
    for loss in (
        Loss("sigmoid", sigmoid_loss, "margin", "2305.18290 eq. 7", (SMOOTHING,)),
        Loss("robust", robust_loss, "margin", "2403.00409 sec. 3.1", (_SMOOTHING_BELOW_HALF,)),
        Loss("hinge", hinge_loss, "margin", "2309.06657, after 2305.10425"),
        Loss("ipo", ipo_loss, "mean_log_ratios", "2310.12036 eq. 17, per token"),
        Loss("sigmoid_norm", sigmoid_norm_loss, "mean_log_ratios", "2411.15124"),
        Loss("exo_pair", exo_pair_loss, "margin", "2402.00856 eq. 16", (_SMOOTHING_ABOVE_ZERO,)),
        Loss("nca_pair", nca_pair_loss, "rewards", "2402.05369 sec. 4.1"),
        Loss("bco_pair", bco_pair_loss, "rewards", "2404.04656, without its running shift"),
        Loss("sppo_hard", sppo_hard_loss, "log_ratios", "2405.00675 eq. 4.7"),
        Loss("apo_zero", apo_zero_loss, "rewards", "2408.06266 eq. 7"),
        Loss("apo_down", apo_down_loss, "rewards", "2408.06266 eq. 8"),
        Loss("discopop", discopop_loss, "margin", "2406.08414 eq. 5", (DISCOPOP_TAU,)),
    )
}
LOSS_TYPES = tuple(LOSSES)


def find_loss(name: str, rows: Rows | None = None) -> Loss:
    """Return the row of a loss.

    Args:
        name: the loss.
        rows: the rows of data that it must learn from; None: any.

    Raises:
        ValueError: there is no such loss, or it learns from other rows.
    """
    if name not in LOSSES:
        close = difflib.get_close_matches(str(name), LOSSES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(LOSSES)}"
        raise ValueError(f"loss_type {name!r} does not exist; {hint}")
    loss = LOSSES[name]
    if rows is not None and loss.rows != rows:
        raise ValueError(f"loss_type {name!r} is a loss of {loss.rows}, not of {rows}; use {_ENTRIES[loss.rows]}")
    return loss


_ENTRIES: dict[Rows, str] = {"pairs": "dpo_loss", "lists": "list_loss", "labels": "label_loss"}


def loss_components(loss_type: str | Mapping[str, float]) -> dict[Loss, float]:
    """Return the losses of a sum, with their weights: of a name alone, that loss with weight 1.

    Raises:
        ValueError: a loss that does not exist, a weight that is not positive, or losses of different rows of data.
    """
    weights = {loss_type: 1.0} if isinstance(loss_type, str) else loss_type
    found = {find_loss(name): float(weight) for name, weight in weights.items()}
    for loss, weight in found.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of loss_type {loss.name!r} must be a positive number, not {weight}")
    if not found:
        raise ValueError("loss_type names no loss")
    kinds = {loss.rows: loss.name for loss in found}
    if len(kinds) > 1:
        described = ", ".join(f"{name!r} learns from {rows}" for rows, name in kinds.items())
        raise ValueError(f"the losses of a sum must learn from the same rows of data: {described}")
    return found


def resolve_options(loss: Loss, beta: float, options: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """Return every option of a loss: as given, else its default.

    Raises:
        ValueError: β or an option is out of range, or the loss does not take an option.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a positive number, not {beta}")
    for name in options:
        if loss.option(name) is None:
            takers = [other.name for other in LOSSES.values() if other.option(name)]
            known = sorted({option.name for other in LOSSES.values() for option in other.options})
            remedy = f"use one of {', '.join(takers)}" if takers else f"the options are {', '.join(known)}"
            raise ValueError(f"{name} has no meaning for loss_type {loss.name!r}; leave it out, or {remedy}")
    found = {option.name: options.get(option.name, option.default) for option in loss.options}
    for option in loss.options:
        if not option.allows(found[option.name]):
            raise ValueError(
                f"{option.name} must be {option.limits} for loss_type {loss.name!r}, not {found[option.name]}"
            )
    return found


# ---- checks ----


def _check_tensors(**tensors: Tensor | None) -> None:
    """Broadcasting [B] against [B, 1] would give [B, B] without a word, and bf16 knows no odd numbers above 256."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32:
            raise ValueError(
                f"{name} is {tensor.dtype}, too coarse for sums over a completion: use fp32 or fp64, "
                "with .float() before the sum over tokens"
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"all tensors must have one shape [B], not {shapes}")
