"""Preference losses as pure functions of log-probs, and the registry that names them.

Notation, for a prompt with a chosen and a rejected completion, log-probs in nats, summed over tokens:

    c = log policy(chosen)   - log reference(chosen)      log-ratio of the chosen completion
    r = log policy(rejected) - log reference(rejected)    log-ratio of the rejected completion
    βc, βr                                                rewards; m = β(c - r) is their margin
    n_c, n_r                                              numbers of completion tokens
    ε                                                     label smoothing, the assumed share of swapped labels
    σ, ls                                                 the logistic function and its logarithm

For K completions of one prompt, u_k is the log-ratio of completion k and s_k = βu_k its reward. A loss without a
reference has log policy(completion) in place of the log-ratio. A loss per token has c/n_c and r/n_r.

Every function returns one value per row, [B]; nothing is reduced. Values and gradients are finite for log-ratios up to
±10,000: no exponential overflows.

A loss is a function and a row of `LOSSES`. The row says which rows of data it learns from, what it is computed from and
which options it takes. Config checks, error messages and docs are made from these rows.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

Rows = Literal["pairs", "lists", "labels"]
"""Rows of data: a chosen and a rejected completion; K rated completions; one completion with a label, good or bad."""

Takes = Literal["margin", "rewards", "log_ratios", "logps"]
"""What the function of a loss takes. "margin": m. "rewards": βc and βr. "log_ratios": c, r and β. "logps": log-probs of
policy and reference as they are; these are the losses of lists and labels."""

Shift = Literal["kl", "running_mean"]
"""A number from outside the batch that a loss of labels subtracts. "kl": the mean log-ratio of mismatched completions,
at least 0, in nats. "running_mean": a running mean of rewards."""

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
        only_with: another option and the value that it must have, or this one would have no effect.
    """

    name: str
    default: OptionValue
    meaning: str
    low: float = 0.0
    high: float = math.inf
    above: bool = False
    below: bool = False
    choices: tuple[str, ...] = ()
    only_with: tuple[str, OptionValue] | None = None

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
        reference: whether it compares with a reference model.
        per_token: whether log-probs are divided by the completions' lengths.
        ratings: whether it needs the rows' ratings. Losses of lists use them in any case where they are known.
        shift: what a loss of labels subtracts.
    """

    name: str
    function: Callable[..., Tensor]
    takes: Takes
    source: str
    options: tuple[Option, ...] = ()
    rows: Rows = "pairs"
    reference: bool = True
    per_token: bool = False
    ratings: bool = False
    shift: Shift | None = None

    def option(self, name: str) -> Option | None:
        """Return its option of this name; None if it has none."""
        return next((option for option in self.options if option.name == name), None)


# ---- from log-probs to a loss: by name, and by rows of data ----


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
    _check_pairs(loss, tensors)
    losses, rewards = pair_loss(
        loss,
        torch.stack([policy_chosen_logps, policy_rejected_logps], dim=-1),
        _stacked(reference_chosen_logps, reference_rejected_logps),
        beta=beta,
        options=options,
        lengths=_stacked(chosen_lengths, rejected_lengths),
        ratings=_stacked(chosen_ratings, rejected_ratings),
    )
    return losses, rewards[..., 0], rewards[..., 1]


def _check_pairs(loss: Loss, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError for arguments of `dpo_loss` that are missing, superfluous, or of another shape or dtype."""
    _check_tensors(**tensors)
    for name, tensor in tensors.items():
        if _needs(loss, name):
            _required(loss, name, tensor)
        if tensor is not None and "reference" in name and not loss.reference:
            raise ValueError(f"loss_type {loss.name!r} has no reference: give None as {name}")


def _needs(loss: Loss, name: str) -> bool:
    """Whether a loss of pairs needs the tensor with this name in `dpo_loss`."""
    needs = {"policy": True, "reference": loss.reference, "lengths": loss.per_token, "ratings": loss.ratings}
    return next(needed for part, needed in needs.items() if part in name)


def _stacked(chosen: Tensor | None, rejected: Tensor | None) -> Tensor | None:
    return None if chosen is None or rejected is None else torch.stack([chosen, rejected], dim=-1)


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
        losses [B] and rewards [B, 2], detached.

    Raises:
        ValueError: an option out of range or without meaning, or missing tensors.
    """
    settings: dict[str, Any] = resolve_options(loss, beta, options)
    log_ratios = policy - _required(loss, "reference", reference) if loss.reference else policy
    measured = log_ratios
    if loss.per_token:
        measured = log_ratios / _required(loss, "lengths", lengths)
    if loss.ratings:
        ratings = _required(loss, "ratings", ratings)
        settings |= {"chosen_ratings": ratings[..., 0], "rejected_ratings": ratings[..., 1]}
    # rewards are those of the whole completions, whatever the loss looks at
    rewards = beta * (log_ratios if loss.reference else measured).detach()
    if "f_divergence" in settings:
        measured = f_divergence_map(measured, settings.pop("f_divergence"), settings.pop("f_alpha"))
    chosen, rejected = measured.unbind(-1)
    match loss.takes:
        case "margin":
            losses = loss.function(beta * (chosen - rejected), **settings)
        case "rewards":
            losses = loss.function(beta * chosen, beta * rejected, **settings)
        case _:
            losses = loss.function(chosen, rejected, beta, **settings)
    return losses, rewards


def list_loss(
    loss: Loss | str,
    policy: Tensor,
    reference: Tensor | None,
    *,
    beta: float = 0.1,
    options: Mapping[str, OptionValue] = MappingProxyType({}),
    ratings: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A loss of K completions per prompt.

    Args:
        loss: the name of a loss of lists, or its row in `LOSSES`.
        policy: [B, K] log-probs under the policy, in nats; columns from best to worst, or in any order with ratings.
        reference: [B, K] the same under the reference, which all of these losses have.
        beta: β > 0.
        options: of the loss, by name.
        ratings: [B, K] how good the completions are; equal ratings are ties. NaN for a completion that is there makes
            the loss of its row NaN.
        mask: [B, K] bool, False for columns that hold no completion; None: all do.

    Returns:
        losses [B] and rewards [B, K], detached; the reward of a masked column is 0.

    Raises:
        ValueError: a loss of other rows, an option out of range or without meaning, a missing reference or missing
            ratings, shapes that differ, a dtype below fp32, a mask that is not bool.
    """
    loss = find_loss(loss, "lists")
    settings: dict[str, Any] = resolve_options(loss, beta, options)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, not {mask.dtype}")
    if loss.ratings:
        _required(loss, "ratings", ratings)
    reference = _required(loss, "reference", reference)  # no loss of lists is without one
    losses = loss.function(policy, reference, beta=beta, ratings=ratings, mask=mask, **settings)
    rewards = beta * (policy - reference).detach()
    return losses, rewards if mask is None else rewards.where(mask, 0)


def label_loss(
    loss: Loss | str,
    policy: Tensor,
    reference: Tensor | None,
    labels: Tensor,
    *,
    beta: float = 0.1,
    options: Mapping[str, OptionValue] = MappingProxyType({}),
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A loss of single completions, each with a label.

    Args:
        loss: the name of a loss of labels, or its row in `LOSSES`.
        policy: [B] log-probs under the policy, in nats.
        reference: [B] the same under the reference, which all of these losses have.
        labels: [B] bool, True for good completions.
        beta: β > 0.
        options: of the loss, by name.
        shift: scalar, detached: what `loss.shift` says.

    Returns:
        losses [B] and rewards [B], detached.

    Raises:
        ValueError: a loss of other rows, an option out of range or without meaning, a missing reference or shift,
            shapes that differ, a dtype below fp32, labels that are not bool.
    """
    loss = find_loss(loss, "labels")
    settings: dict[str, Any] = resolve_options(loss, beta, options)
    if loss.shift and shift is None:
        raise ValueError(f"loss_type {loss.name!r} needs shift, its {loss.shift}")
    reference = _required(loss, "reference", reference)  # no loss of labels is without one
    losses = loss.function(policy, reference, labels, beta=beta, shift=shift, **settings)
    return losses, beta * (policy - reference).detach()


def nll_loss(logps: Tensor, num_tokens: float | Tensor) -> Tensor:
    """Negative log-likelihood: SFT's loss, and what `dpo.nll_weight` adds for the chosen completions.

    Args:
        logps: [B] log-prob of each completion under the policy, summed over its tokens, nats.
        num_tokens: completion tokens of the whole optimizer step, over all micro-batches and ranks; or [B], those of
            each completion.

    Returns:
        [B]; with the tokens of the step, the sum over the step is the mean over its tokens. With those of each
        completion, it is the mean over that completion, as in Iterative RPO (2404.19733 eq. 1): tokens of short
        completions weigh more.

    Raises:
        ValueError: a dtype below fp32, or shapes that differ.
    """
    _check_tensors(logps=logps, num_tokens=num_tokens if isinstance(num_tokens, Tensor) else None)
    return -logps / num_tokens


# ---- losses of the margin m = β(c - r): ∂L/∂c = β dL/dm = -∂L/∂r ----


def sigmoid_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO, 2305.18290 eq. 7: -ls(m). dL/dm = ε - σ(-m).

    With ε > 0, conservative DPO (Mitchell 2023): the expected loss if a share ε of the labels is swapped.
    """
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def robust_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO, 2403.00409 sec. 3.1: an unbiased estimate of the loss on true labels.

    It takes a share ε of the given labels to be swapped. Unlike the others it is not bounded below.
    dL/dm = -(ε + (1 - 2ε) σ(-m)) / (1 - 2ε).
    """
    as_labelled, swapped = -logsigmoid(margin), -logsigmoid(-margin)
    return ((1 - label_smoothing) * as_labelled - label_smoothing * swapped) / (1 - 2 * label_smoothing)


def hinge_loss(margin: Tensor) -> Tensor:
    """The hinge-norm loss of RSO, 2309.06657: max(0, 1 - m). dL/dm = -1 where m < 1, else 0."""
    return torch.relu(1 - margin)


def slic_loss(margin: Tensor, slic_delta: float = 1.0) -> Tensor:
    """SLiC, 2305.10425, on log-probs without a reference: max(0, δ - m). dL/dm = -1 where m < δ, else 0.

    β = 1 gives the paper's loss. Its cross-entropy regulariser is `dpo.nll_weight`.
    """
    return torch.relu(slic_delta - margin)


def exo_pair_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    """EXO, 2402.00856 eq. 16 with two completions: KL(q || p).

    q = (σ(m), σ(-m)) is the policy's belief of which one is better, p = (1 - ε, ε) the label's.
    dL/dm = σ(m) σ(-m) (m - log((1 - ε)/ε)).
    """
    as_labelled = torch.sigmoid(margin) * (logsigmoid(margin) - math.log1p(-label_smoothing))
    swapped = torch.sigmoid(-margin) * (logsigmoid(-margin) - math.log(label_smoothing))
    return as_labelled + swapped


def discopop_loss(margin: Tensor, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP, 2406.08414 eq. 5: (1 - g) · logistic loss + g · exp(-m), with g = σ(m/τ).

    g and exp(-m) are multiplied as logarithms, because the latter overflows alone. As τ < 1, their product stays
    below 1 and vanishes on both sides: the loss grows as the logistic loss does.
    dL/dm = -(1 - g) σ(-m) - g exp(-m) + g(1 - g)/τ · (exp(-m) + ls(m)).
    """
    logistic = softplus(-margin) * torch.sigmoid(-margin / discopop_tau)
    exponential = torch.exp(logsigmoid(margin / discopop_tau) - margin)
    return logistic + exponential


def odpo_loss(margin: Tensor, chosen_ratings: Tensor, rejected_ratings: Tensor, odpo_alpha: float = 1.0) -> Tensor:
    """ODPO, 2402.10571, with the offset of its authors' code, α log(rating gap): -ls(m - α log(gap)).

    That is log(1 + gap^α exp(-m)). So a pair with equal ratings teaches nothing, and one whose chosen completion is
    rated lower counts as equal. dL/dm = -σ(α log(gap) - m). α = 0 is `sigmoid`, whatever the ratings. (The paper allows
    any growing function of the gap; the code has the log of the ratio of the ratings, too.)
    """
    gap = (chosen_ratings - rejected_ratings).to(margin.dtype).clamp(min=0)
    return -logsigmoid(margin - torch.xlogy(odpo_alpha, gap))


def sigmoid_norm_loss(margin: Tensor) -> Tensor:
    """Length-normalised DPO, Tülu 3, 2411.15124: DPO on log-ratios per token, c/n_c and r/n_r.

    dL/dm = -σ(-m), and ∂L/∂c = β/n_c dL/dm, ∂L/∂r = -β/n_r dL/dm.
    """
    return -logsigmoid(margin)


def cpo_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """CPO, 2401.08417 eq. 3: DPO with a uniform reference, so on log-probs. dL/dm = ε - σ(-m).

    The paper adds the chosen completions' NLL: `dpo.nll_weight` 1, as a mean over tokens in the authors' code, which
    also has the ε.
    """
    return sigmoid_loss(margin, label_smoothing)


def simpo_loss(margin: Tensor, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """SimPO, 2405.14734 eq. 6: -ls(m - γ), on log-probs per token without a reference.

    dL/dm = ε - σ(γ - m), and ∂L/∂log π(chosen) = β/n_c dL/dm. The authors' code sets γ/β in place of γ, and has the ε.
    β is larger than in DPO, 2 to 10.
    """
    return sigmoid_loss(margin - simpo_gamma, label_smoothing)


F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_EXPONENT_CAP = 50.0  # e^50 times a log-ratio of 10,000 is finite in fp32


def f_divergence_map(log_ratios: Tensor, f_divergence: str = "reverse_kl", f_alpha: float = 0.5) -> Tensor:
    """f-DPO, 2309.16240 table 1: the map f'(e^u) of log-ratios u that takes another divergence than DPO's to its loss.

    A loss of the margin takes β(f'(e^c) - f'(e^r)) in place of β(c - r).

    "reverse_kl": u, as in DPO. "js_divergence": log 2 + ls(u). "alpha_divergence": (1 - e^(-αu))/α for α in (0, 1];
    towards α = 0 it is "reverse_kl". "forward_kl": the same with α = 1. Where -αu exceeds 50, the exponential is
    continued by its tangent: the gradient stays e^50 there, times the loss's own, so that a completion that the policy
    has all but lost still pulls back. (TRL clamps instead, so its gradient is 0 there; its coefficient is 1 - α.)

    Args:
        log_ratios: of any shape, nats.
        f_divergence: one of `F_DIVERGENCES`.
        f_alpha: α.

    Returns:
        f'(e^u), of the same shape.

    Raises:
        ValueError: there is no such divergence, or α is out of range.
    """
    if f_divergence not in F_DIVERGENCES or not 0 < f_alpha <= 1:
        raise ValueError(
            f"f_divergence must be one of {', '.join(F_DIVERGENCES)}, and f_alpha above 0 and at most 1, "
            f"not {f_divergence!r} and {f_alpha}"
        )
    if f_divergence == "reverse_kl":
        return log_ratios
    if f_divergence == "js_divergence":
        return math.log(2) + logsigmoid(log_ratios)
    alpha = f_alpha if f_divergence == "alpha_divergence" else 1.0
    exponent = -alpha * log_ratios
    capped = exponent.clamp(max=_EXPONENT_CAP)
    return -(torch.expm1(capped) + torch.exp(capped) * (exponent - capped)) / alpha


# ---- losses of each completion's own reward βc, βr ----


def nca_pair_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """NCA, 2402.05369 sec. 4.1, for a pair: each completion against noise, not against the other one.

    Both of them also stand as noise samples, with weight 1/2.
    ∂L/∂c = β(σ(βc)/2 - σ(-βc)), ∂L/∂r = β σ(βr)/2.
    """
    noise = -0.5 * logsigmoid(-chosen_rewards) - 0.5 * logsigmoid(-rejected_rewards)
    return -logsigmoid(chosen_rewards) + noise


def bco_pair_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """BCO, 2404.04656: a binary classifier of chosen against rejected completions.

    The paper subtracts the running mean of all rewards from each reward (`bco` does). Here nothing is subtracted, so
    that a pair's loss does not depend on the pairs before it. ∂L/∂c = -β σ(-βc), ∂L/∂r = β σ(βr).
    """
    return -logsigmoid(chosen_rewards) - logsigmoid(-rejected_rewards)


def apo_zero_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """APO-zero, 2408.06266 eq. 7, plus 1: chosen up, rejected down; for data better than the model.

    1 - σ(x) is written σ(-x), which keeps its precision where σ(x) rounds to 1.
    ∂L/∂c = -β σ(βc) σ(-βc), ∂L/∂r = β σ(βr) σ(-βr).
    """
    return torch.sigmoid(-chosen_rewards) + torch.sigmoid(rejected_rewards)


def apo_down_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """APO-down, 2408.06266 eq. 8, plus 1: both down, rejected further; for a model better than its data.

    ∂L/∂c = β σ(βc) σ(-βc) - β σ(m) σ(-m), ∂L/∂r = β σ(m) σ(-m).
    """
    return torch.sigmoid(chosen_rewards) + torch.sigmoid(rejected_rewards - chosen_rewards)


def dpop_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive, 2402.13228: DPO with a penalty where the chosen completion is less likely than before.

    L = -ls(x), x = m - λ max(0, -βc). ∂L/∂c = -β (1 + λ [c < 0]) σ(-x), ∂L/∂r = β σ(-x).
    """
    return -logsigmoid(chosen_rewards - rejected_rewards - dpop_lambda * torch.relu(-chosen_rewards))


# ---- losses of c and r with β in a place of its own ----


def sppo_hard_loss(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """SPPO, 2405.00675 eq. 4.7 with win probabilities 1 and 0: regress c on 1/(2β) and r on -1/(2β).

    ∂L/∂c = 2(c - 1/(2β)), ∂L/∂r = 2(r + 1/(2β)).
    """
    return (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2


def ipo_sum_loss(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """IPO as published, 2310.12036 eq. 17, where β is called τ: regress c - r on 1/(2β).

    ∂L/∂c = 2(c - r - 1/(2β)) = -∂L/∂r.
    """
    return (c - r - 1 / (2 * beta)) ** 2


def ipo_loss(mean_c: Tensor, mean_r: Tensor, beta: float) -> Tensor:
    """IPO, 2310.12036 eq. 17, on log-ratios per token, c/n_c and r/n_r: regress their difference on 1/(2β).

    The paper writes sums (`ipo_sum`). TRL says that its authors confirmed means as what they used; the meaning of β is
    then the same for short and long ones. ∂L/∂c = 2/n_c (c/n_c - r/n_r - 1/(2β)); ∂L/∂r likewise, with -2/n_r.
    """
    return (mean_c - mean_r - 1 / (2 * beta)) ** 2


def cal_dpo_loss(c: Tensor, r: Tensor, beta: float, cal_weight: float = 0.5) -> Tensor:
    """Cal-DPO, 2412.14516: -ls(c - r), without β, + w · SPPO's regression of c on 1/(2β) and r on -1/(2β).

    The paper's equation has w = 1; of the authors' two repositories one has 1, the other 1/2, the default here.
    ∂L/∂c = -σ(r - c) + 2w (c - 1/(2β)), ∂L/∂r = σ(r - c) + 2w (r + 1/(2β)).
    """
    return -logsigmoid(c - r) + cal_weight * sppo_hard_loss(c, r, beta)


def orpo_loss(mean_chosen: Tensor, mean_rejected: Tensor, beta: float) -> Tensor:
    """ORPO's odds-ratio term, 2403.07691 eq. 7, times β, which is called λ there: -β ls(x), without a reference.

    With the log-probs per token a and b of the two completions, x = a - log(1 - e^a) - b + log(1 - e^b). The paper adds
    the chosen completions' NLL: set `dpo.nll_weight` to 1. (The authors' code takes that over the prompt, too.)
    ∂L/∂log π(chosen) = -β σ(-x) / (n_c (1 - e^a)), ∂L/∂log π(rejected) = β σ(-x) / (n_r (1 - e^b)).

    A log-prob that rounds to 0 would have infinite odds. It is taken as minus the dtype's ε, with the gradient there.
    """
    return -beta * logsigmoid(_log_odds(mean_chosen) - _log_odds(mean_rejected))


def _log_odds(logps: Tensor) -> Tensor:
    """log(p/(1 - p)) of p = e^logps."""
    limit = -torch.finfo(logps.dtype).eps
    logps = logps + (logps.clamp(max=limit) - logps).detach()
    return logps - torch.log(-torch.expm1(logps))


# ---- losses of lists: K completions per prompt, rewards s_k = βu_k ----


@dataclasses.dataclass(frozen=True)
class _Lists:
    """Checked inputs of a loss of lists; masked columns hold 0, so that nothing in them reaches value or gradient.

    Attributes:
        log_ratios: [B, K].
        ratings: [B, K]; where none are given, the order of the columns.
        mask: [B, K], False for columns without a completion.
        gaps: [B, K, K], s_j - s_k at [k, j].
        others: [B, K, K], whether j is there, k too, and another completion.
    """

    log_ratios: Tensor
    ratings: Tensor
    mask: Tensor
    gaps: Tensor
    others: Tensor

    @classmethod
    def of(
        cls, policy: Tensor, reference: Tensor, beta: float, ratings: Tensor | None, mask: Tensor | None
    ) -> "_Lists":
        _check_beta(beta)
        _check_tensors(policy_logps=policy, reference_logps=reference, ratings=ratings, mask=mask)
        if policy.ndim != 2:
            raise ValueError(f"log-probs of lists must have the shape [B, K], not {tuple(policy.shape)}")
        mask = torch.ones_like(policy, dtype=torch.bool) if mask is None else mask.bool()
        log_ratios = (policy - reference).masked_fill(~mask, 0)
        if ratings is None:
            ratings = -torch.arange(policy.shape[1], device=policy.device).expand_as(policy)
        ratings = ratings.to(policy.dtype).masked_fill(~mask, 0)
        log_ratios = log_ratios + 0 * ratings  # an unknown rating, NaN, must not pass for a tie
        # multiplied last, so that two completions give bit by bit the margin of a pair
        gaps = beta * _differences(log_ratios)
        itself = torch.eye(policy.shape[1], dtype=torch.bool, device=policy.device)
        return cls(log_ratios, ratings, mask, gaps, mask.unsqueeze(1) & mask.unsqueeze(2) & ~itself)

    @property
    def worse(self) -> Tensor:
        """[B, K, K], whether j is rated lower than k; true of NaN, so that it reaches the loss."""
        return self.others & ~(self.ratings.unsqueeze(1) >= self.ratings.unsqueeze(2))

    @property
    def tied(self) -> Tensor:
        """[B, K, K], whether j is another completion with the rating of k."""
        return self.others & (self.ratings.unsqueeze(1) == self.ratings.unsqueeze(2))


def _differences(values: Tensor) -> Tensor:
    """Of [B, K]: [B, K, K], values_j - values_k at [k, j]."""
    return values.unsqueeze(1) - values.unsqueeze(2)


def _choice_loss(gaps: Tensor, others: Tensor) -> Tensor:
    """-log of the probability to choose k among itself and `others`: log(1 + Σ_j e^gap_kj), [B, K].

    As -ls(-logsumexp), it is `sigmoid_loss` to the last bit if there is one other, and 0 if there is none.
    """
    return -logsigmoid(-gaps.masked_fill(~others, -math.inf).logsumexp(dim=2))


def plackett_luce_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    beta: float = 0.1,
    ratings: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """DPO on rankings, 2305.18290 app. A.3: choose the best, then the best of the rest, and so on.

    L = Σ_k log Σ_{j not before k} exp(s_j - s_k). ∂L/∂u_j = β (Σ_k p_kj - 1), where p_kj is the probability of j among
    k and all after it. With K = 2 it is `sigmoid`.

    Ties, equal ratings, by Efron's rule (1977): in the sum of the i-th of m tied completions, i from 0, each of the m
    counts 1 - i/m, because i of them have been chosen by then, whichever they are. p_kj has these weights, too.

    Args:
        policy_logps: [B, K] log-probs under the policy, nats; columns from best to worst.
        reference_logps: [B, K] under the reference.
        beta: β > 0.
        ratings: [B, K]; they make the order, whatever that of the columns. None: the columns' order, without ties.
        mask: [B, K] bool, False for columns without a completion; None: there are none.

    Returns:
        [B].

    Raises:
        ValueError: shapes that differ or are not [B, K], a dtype below fp32, β not positive.
    """
    lists = _Lists.of(policy_logps, reference_logps, beta, ratings, mask)
    worse, tied = lists.worse, lists.tied
    gone = tied.tril().sum(2).to(lists.gaps.dtype) / (1 + tied.sum(2))
    log_left = torch.log1p(-gone)
    # log(w + w Σ_tied e^gap + Σ_worse e^gap), with w = 1 - i/m taken out of the sum
    gaps = lists.gaps - log_left.unsqueeze(2) * worse
    return (log_left + _choice_loss(gaps, worse | tied)).sum(1)


def all_pairs_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    beta: float = 0.1,
    ratings: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`sigmoid`, averaged over all pairs of a list that differ in rating: 2203.02155 eq. 1 with DPO's rewards.

    L = 1/N Σ_{k better than j} -ls(s_k - s_j), N pairs. ∂L/∂u_k = β/N (Σ_{j better} σ(s_k - s_j) - Σ_{j worse} σ(s_j -
    s_k)). LiPO (2402.01878) has the sum; the mean gives every prompt the same weight, however long its list. A list
    without such pairs gives 0. Arguments, result and errors as for `plackett_luce_loss`.
    """
    lists = _Lists.of(policy_logps, reference_logps, beta, ratings, mask)
    pairs = lists.worse
    return (-logsigmoid(-lists.gaps) * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def lipo_lambda_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    beta: float = 0.1,
    ratings: Tensor,
    mask: Tensor | None = None,
    rating_scale: float = 1.0,
) -> Tensor:
    """LiPO-λ, 2402.01878: each pair weighs by what swapping it would change in the list's DCG.

    L = Σ_{k better than j} Δ_kj · -ls(s_k - s_j), Δ_kj = |2^ψ_k - 2^ψ_j| · |1/log(1 + τ_k) - 1/log(1 + τ_j)|: ψ are the
    ratings over `rating_scale`, τ the ranks by s, from 1; they are constants for the gradient, as in LambdaRank.
    ∂L/∂u_k = β (Σ_{j better} Δ_kj σ(s_k - s_j) - Σ_{j worse} Δ_kj σ(s_j - s_k)). Equal rewards, as at the first step,
    rank in the order of the columns. In the paper ψ is in [0, 1]: `rating_scale` should be about the best rating. (The
    equation there has a minus before the sum that it cannot mean.) Arguments, result and errors as for
    `plackett_luce_loss`; `ratings` are needed.
    """
    lists = _Lists.of(policy_logps, reference_logps, beta, ratings, mask)
    scores = lists.log_ratios.detach().masked_fill(~lists.mask, -math.inf)
    ranks = 1 + scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    gains, discounts = torch.exp2(lists.ratings / rating_scale), 1 / torch.log1p(ranks.to(policy_logps.dtype))
    weights = _differences(gains).abs() * _differences(discounts).abs() * lists.worse
    return (-logsigmoid(-lists.gaps) * weights).sum((1, 2))


def info_nca_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    beta: float = 0.1,
    ratings: Tensor | None = None,
    mask: Tensor | None = None,
    rating_scale: float = 1.0,
) -> Tensor:
    """InfoNCA, 2402.05369 sec. 3: the cross-entropy of softmax(s) under p = softmax(ratings/α), α = `rating_scale`.

    L = -Σ_k p_k log softmax(s)_k. ∂L/∂u_k = β (softmax(s)_k - p_k). Without ratings, the limit of small α: p is 1 for
    the first column; with K = 2 that is `sigmoid`. (The authors' published settings come close to it, with α = 1e-4.)
    Arguments, result and errors as for `plackett_luce_loss`.
    """
    lists = _Lists.of(policy_logps, reference_logps, beta, ratings, mask)
    target = _target(lists, ratings is not None, rating_scale)
    return (target * _choice_loss(lists.gaps, lists.others)).sum(1)


def nca_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    beta: float = 0.1,
    ratings: Tensor | None = None,
    mask: Tensor | None = None,
    rating_scale: float = 1.0,
) -> Tensor:
    """NCA, 2402.05369 sec. 4: each completion against noise, weighted by p = softmax(ratings/α), α = `rating_scale`.

    L = -Σ_k (p_k ls(s_k) + 1/K ls(-s_k)), K without the masked. ∂L/∂u_k = β (σ(s_k)/K - p_k σ(-s_k)). Without
    ratings p is 1 for the first column; with K = 2 that is `nca_pair`. Arguments, result and errors as for
    `plackett_luce_loss`.
    """
    lists = _Lists.of(policy_logps, reference_logps, beta, ratings, mask)
    target = _target(lists, ratings is not None, rating_scale)
    rewards = beta * lists.log_ratios
    noise = lists.mask.to(rewards.dtype) / lists.mask.sum(1, keepdim=True).clamp(min=1)
    return -(target * logsigmoid(rewards) + noise * logsigmoid(-rewards)).sum(1)


def _target(lists: _Lists, rated: bool, scale: float) -> Tensor:
    """[B, K] the distribution that InfoNCA and NCA aim at: softmax of the ratings, or all on the first column."""
    if not rated:
        first = torch.arange(lists.mask.shape[1], device=lists.mask.device) == 0
        return first.to(lists.ratings.dtype).expand_as(lists.ratings)
    lowest = torch.finfo(lists.ratings.dtype).min
    return (lists.ratings / scale).masked_fill(~lists.mask, lowest).softmax(dim=1) * lists.mask


# ---- losses of labels: one completion, good or bad ----


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.1,
    shift: Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, 2402.01306 sec. 4: λ_D σ(-x) for a good completion, λ_U σ(x) for a bad one, x = β(u - z).

    z is the policy's KL to the reference, estimated as the mean log-ratio of the step's mismatched completions and at
    least 0. No gradient flows through it. ∂L/∂u = ∓βλ σ(x) σ(-x), minus for a good one.

    Args:
        policy_logps: [B] log-probs under the policy, nats.
        reference_logps: [B] under the reference.
        labels: [B] bool, True for good completions.
        beta: β > 0.
        shift: z, a scalar in nats, before β; None: 0.
        desirable_weight: λ_D. The paper holds λ_D n_D / (λ_U n_U) to 1 to 3/2, where n count the rows of each label.
        undesirable_weight: λ_U.

    Returns:
        [B].

    Raises:
        ValueError: shapes that differ, a dtype below fp32, β not positive.
    """
    rewards = _label_rewards(policy_logps, reference_logps, labels, beta, shift, beta)
    good, bad = desirable_weight * torch.sigmoid(-rewards), undesirable_weight * torch.sigmoid(rewards)
    return torch.where(labels, good, bad)


def bco_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.1,
    shift: Tensor | None = None,
) -> Tensor:
    """BCO, 2404.04656: a binary classifier of rewards: -ls(x) for good, -ls(-x) for bad, x = βu - δ.

    δ is the shift, a running mean of rewards, without gradient: in the paper, half the sum of the means over good and
    over bad completions; in the authors' code, the mean over all. None: 0. Then a good and a bad one are `bco_pair`.
    ∂L/∂u = -β σ(-x) for a good completion, β σ(x) for a bad one. The other arguments, result and errors as for
    `kto_loss`.
    """
    rewards = _label_rewards(policy_logps, reference_logps, labels, beta, shift, 1.0)
    return -logsigmoid(torch.where(labels, rewards, -rewards))


def _label_rewards(
    policy: Tensor, reference: Tensor, labels: Tensor, beta: float, shift: Tensor | None, shift_scale: float
) -> Tensor:
    """[B] βu - shift_scale · shift, after the checks."""
    _check_beta(beta)
    _check_tensors(policy_logps=policy, reference_logps=reference, labels=labels)
    if labels.dtype != torch.bool:
        raise ValueError(f"labels must be bool, not {labels.dtype}")
    rewards = beta * (policy - reference)
    return rewards if shift is None else rewards - shift_scale * shift.detach()


# ---- log-probs and weights from single tokens, for any loss of pairs ----


def public_sums(token_logps: Tensor, lengths: Tensor) -> Tensor:
    """LD-DPO's public part of each completion: the sum over as many first tokens as the pair's shorter one has.

    Args:
        token_logps: [M] log-probs of completion tokens, nats, completion by completion: a pair's chosen, its rejected,
            the next pair's chosen, and so on.
        lengths: [E, 2] how many of them each completion has.

    Returns:
        [E, 2].

    Raises:
        ValueError: a dtype below fp32.
    """
    _check_tensors(token_logps=token_logps)
    flat, shorter = lengths.flatten(), lengths.amin(1, keepdim=True).expand_as(lengths).flatten()
    size = len(token_logps)  # given to repeat_interleave, which would otherwise wait for the device to learn it
    starts = (flat.cumsum(0) - flat).repeat_interleave(flat, output_size=size)
    positions = torch.arange(size, device=token_logps.device) - starts
    public = positions < shorter.repeat_interleave(flat, output_size=size)
    return _segment_sums(token_logps.where(public, 0), flat).view_as(lengths)


def ld_logps(logps: Tensor, public_logps: Tensor, ld_alpha: float) -> Tensor:
    """LD-DPO, 2409.06411: log-probs in which tokens beyond the shorter completion's length count α.

    Args:
        logps: of any shape, summed over each completion, nats.
        public_logps: the same shape, from `public_sums`.
        ld_alpha: α in [0, 1]; 1 returns `logps`.

    Returns:
        public + α (logps - public), for policy and reference alike, in place of their log-probs.
    """
    _check_tensors(logps=logps, public_logps=public_logps)
    return torch.lerp(public_logps, logps, ld_alpha)


def wpo_weights(token_logps: Tensor, log_collision: Tensor, lengths: Tensor) -> Tensor:
    """WPO, 2406.11827 eq. 2: how likely the policy itself is to write a pair, as the weight of its loss.

    Of each completion: exp of the mean over tokens of log π(y_t) - log Σ_v π(v)². The sum is the mean probability of a
    sampled token, so that a sampled completion has about 1 ("sampled alignment"). The weight is the product of both, at
    most 1 as in the authors' code; TRL has no such limit.

    Args:
        token_logps: [M] log-probs of completion tokens under the policy, nats, in the order of `public_sums`.
        log_collision: [M] log Σ_v π(v)² at these tokens, nats.
        lengths: [E, 2] tokens of each completion.

    Returns:
        [E], detached.

    Raises:
        ValueError: a dtype below fp32, or shapes that differ.
    """
    _check_tensors(token_logps=token_logps, log_collision=log_collision)
    sums = _segment_sums((token_logps - log_collision).detach(), lengths.flatten()).view_as(lengths)
    return (sums / lengths.clamp(min=1)).sum(1).clamp(max=0).exp()


def _segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """[M] values, in segments of `lengths` [N]: their sums [N]."""
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0, unsafe=True)  # no wait for the device


# ---- the registry ----

SMOOTHING = Option(
    "label_smoothing", 0.0, "ε, the assumed share of swapped labels; `dpo.label_smoothing` in a config", 0.0, 0.5
)
_SMOOTHING_BELOW_HALF = dataclasses.replace(SMOOTHING, below=True)  # robust divides by 1 - 2ε
_SMOOTHING_ABOVE_ZERO = dataclasses.replace(SMOOTHING, above=True)  # exo_pair takes the logarithm of ε
_DISCOPOP_TAU = Option(
    "discopop_tau", 0.05, "τ, how sharply the two parts are switched", 0.0, 1.0, above=True, below=True
)
_ODPO_ALPHA = Option("odpo_alpha", 1.0, "α, how much of the log of the rating gap is the offset")
_DPOP_LAMBDA = Option("dpop_lambda", 50.0, "λ, the weight of the penalty on chosen completions that lose likelihood")
_SIMPO_GAMMA = Option("simpo_gamma", 0.5, "γ, the margin that is aimed at")
_SLIC_DELTA = Option("slic_delta", 1.0, "δ, the margin from which a pair counts as learned", above=True)
_CAL_WEIGHT = Option("cal_weight", 0.5, "w, the weight of the calibration of the rewards")
_RATING_SCALE = Option("rating_scale", 1.0, "α, what the ratings are divided by", above=True)
_DESIRABLE = Option("desirable_weight", 1.0, "λ_D, the weight of good completions", above=True)
_UNDESIRABLE = Option("undesirable_weight", 1.0, "λ_U, the weight of bad completions", above=True)
_DIVERGENCE = (
    Option("f_divergence", "reverse_kl", "the divergence that holds the policy back", choices=F_DIVERGENCES),
    Option(
        "f_alpha", 0.5, "α of alpha_divergence; towards 0 it is reverse_kl, at 1 forward_kl", 0.0, 1.0, above=True,
        only_with=("f_divergence", "alpha_divergence"),
    ),
)  # fmt: skip

LOSSES = {
    loss.name: loss
    for loss in (
        Loss("sigmoid", sigmoid_loss, "margin", "2305.18290 eq. 7", (SMOOTHING, *_DIVERGENCE)),
        Loss("robust", robust_loss, "margin", "2403.00409 sec. 3.1", (_SMOOTHING_BELOW_HALF, *_DIVERGENCE)),
        Loss("hinge", hinge_loss, "margin", "2309.06657, after 2305.10425", _DIVERGENCE),
        Loss("ipo", ipo_loss, "log_ratios", "2310.12036 eq. 17, per token", per_token=True),
        Loss("ipo_sum", ipo_sum_loss, "log_ratios", "2310.12036 eq. 17"),
        Loss("sigmoid_norm", sigmoid_norm_loss, "margin", "2411.15124", per_token=True),
        Loss("exo_pair", exo_pair_loss, "margin", "2402.00856 eq. 16", (_SMOOTHING_ABOVE_ZERO, *_DIVERGENCE)),
        Loss("nca_pair", nca_pair_loss, "rewards", "2402.05369 sec. 4.1"),
        Loss("bco_pair", bco_pair_loss, "rewards", "2404.04656, without its running shift"),
        Loss("sppo_hard", sppo_hard_loss, "log_ratios", "2405.00675 eq. 4.7"),
        Loss("apo_zero", apo_zero_loss, "rewards", "2408.06266 eq. 7"),
        Loss("apo_down", apo_down_loss, "rewards", "2408.06266 eq. 8"),
        Loss("discopop", discopop_loss, "margin", "2406.08414 eq. 5", (_DISCOPOP_TAU, *_DIVERGENCE)),
        Loss("dpop", dpop_loss, "rewards", "2402.13228", (_DPOP_LAMBDA,)),
        Loss("odpo", odpo_loss, "margin", "2402.10571", (_ODPO_ALPHA, *_DIVERGENCE), ratings=True),
        Loss("cal_dpo", cal_dpo_loss, "log_ratios", "2412.14516", (_CAL_WEIGHT,)),
        Loss("simpo", simpo_loss, "margin", "2405.14734 eq. 6", (_SIMPO_GAMMA, SMOOTHING), reference=False,
             per_token=True),
        Loss("cpo", cpo_loss, "margin", "2401.08417 eq. 3", (SMOOTHING,), reference=False),
        Loss("orpo", orpo_loss, "log_ratios", "2403.07691 eq. 7", reference=False, per_token=True),
        Loss("slic", slic_loss, "margin", "2305.10425", (_SLIC_DELTA,), reference=False),
        Loss("plackett_luce", plackett_luce_loss, "logps", "2305.18290 app. A.3", rows="lists"),
        Loss("all_pairs", all_pairs_loss, "logps", "2203.02155 eq. 1 with DPO's rewards", rows="lists"),
        Loss("lipo_lambda", lipo_lambda_loss, "logps", "2402.01878", (_RATING_SCALE,), "lists", ratings=True),
        Loss("info_nca", info_nca_loss, "logps", "2402.05369 sec. 3", (_RATING_SCALE,), "lists", ratings=True),
        Loss("nca", nca_loss, "logps", "2402.05369 sec. 4", (_RATING_SCALE,), "lists", ratings=True),
        Loss("kto", kto_loss, "logps", "2402.01306 sec. 4", (_DESIRABLE, _UNDESIRABLE), "labels", shift="kl"),
        Loss("bco", bco_loss, "logps", "2404.04656", rows="labels", shift="running_mean"),
    )
}  # fmt: skip
LOSS_TYPES = tuple(LOSSES)


def find_loss(loss: str | Loss, rows: Rows | None = None) -> Loss:
    """Return the row of a loss.

    Args:
        loss: its name, or the row itself.
        rows: the rows of data that it must learn from; None: any.

    Raises:
        ValueError: there is no such loss, or it learns from other rows.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss_type {loss!r} does not exist; {_nearest(loss, LOSSES, 'use one of')}")
        loss = LOSSES[loss]
    elif not isinstance(loss, Loss):
        raise ValueError(f"loss_type must be the name of one loss, not {loss!r}; a config's dpo.loss_type takes sums")
    if rows is not None and loss.rows != rows:
        raise ValueError(f"loss_type {loss.name!r} is a loss of {loss.rows}, not of {rows}; use {_ENTRIES[loss.rows]}")
    return loss


def _nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """How a message about an unknown name ends."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise} {', '.join(names)}"


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
        raise ValueError("loss_type names no loss: give one at least, such as {sigmoid: 1.0}")
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
    _check_beta(beta)
    for name in options:
        if loss.option(name) is None:
            takers = [other.name for other in LOSSES.values() if other.option(name)]
            if not takers:
                own = [option.name for option in loss.options]
                remedy = _nearest(name, own, f"the options of {loss.name} are") if own else f"{loss.name} has no option"
                raise ValueError(f"no loss has an option {name}; {remedy}")
            raise ValueError(
                f"{name} has no meaning for loss_type {loss.name!r}; leave it out, or use one of {', '.join(takers)}"
            )
    found = {option.name: options.get(option.name, option.default) for option in loss.options}
    for option in loss.options:
        if not option.allows(found[option.name]):
            raise ValueError(
                f"{option.name} must be {option.limits} for loss_type {loss.name!r}, not {found[option.name]}"
            )
        if option.name in options and option.only_with and found[option.only_with[0]] != option.only_with[1]:
            raise ValueError(f"{option.name} has no effect unless {option.only_with[0]} is {option.only_with[1]}")
    return found


# ---- hold yours against it ----

# Fractions with few binary digits: in fp32, too, differences of log-probs are exact, in whatever order they are taken.
# No log-ratio is 0 and no two rewards of a list are equal, where max and ranks have more than one right gradient.
_CHECK_PAIR_COLUMNS = (
    "policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps",
    "chosen_lengths", "rejected_lengths", "chosen_ratings", "rejected_ratings",
)  # fmt: skip
_CHECK_PAIRS = (
    (-40.0, -55.5, -42.25, -50.75, 20, 31, 5.0, 2.0),  # learned
    (-60.5, -38.0, -52.75, -41.25, 25, 16, 4.0, 3.5),  # still wrong
    (-12.25, -90.0, -12.5, -90.25, 7, 64, 3.0, 1.0),  # a margin of 0
    (-33.0, -33.0, -35.5, -30.5, 11, 11, 4.0, 4.0),  # rated alike
    (-210.0, -180.0, -204.75, -150.0, 128, 96, 9.0, 2.0),  # both less likely than before
    (-8.5, -9.75, -21.0, -30.0, 5, 6, 2.0, 1.75),  # both more likely
    (-0.25, -6.0, -1.5, -2.0, 1, 3, 5.0, 1.0),  # a single token, almost certain
    (-99.0, -0.5, -98.5, -0.75, 400, 2, 4.0, 3.0),  # lengths far apart
    (-250.0, -1750.0, -1250.0, -750.0, 300, 320, 5.0, 1.0),  # 1,000 nats apart on each side
    (-1250.0, -750.0, -250.0, -1750.0, 310, 290, 5.0, 1.0),
    (-500.0, -10500.0, -10500.0, -500.0, 600, 610, 5.0, 1.0),  # 10,000 nats
    (-10500.0, -500.0, -500.0, -10500.0, 590, 620, 5.0, 1.0),
)
_CHECK_LISTS = (  # log-probs of policy, of reference; ratings; 0 for a column that holds no completion
    ((-40.0, -55.5, -31.0, -72.25), (-42.25, -50.75, -33.5, -70.0), (5.0, 4.0, 2.0, 1.0), (1, 1, 1, 1)),
    ((-38.0, -60.5, -44.0, -20.75), (-41.25, -52.75, -40.5, -26.0), (4.5, 3.0, 3.0, 2.0), (1, 1, 1, 1)),  # a tie
    ((-12.25, -90.0, -33.0, -8.0), (-12.5, -90.5, -32.75, -7.5), (5.0, 3.5, 2.5, 1.0), (1, 1, 1, 1)),  # close together
    ((-15.0, -25.5, -50.0, -1.0), (-18.0, -22.25, -44.5, -9.0), (3.0, 2.0, 1.0, 0.0), (1, 1, 1, 0)),
    ((-60.0, -45.75, -2.0, -3.0), (-52.5, -49.0, -7.0, -1.0), (4.0, 1.0, 0.0, 0.0), (1, 1, 0, 0)),
    ((-30.0, -28.5, -35.0, -31.25), (-33.0, -30.0, -31.0, -31.0), (4.0, 4.0, 4.0, 1.0), (1, 1, 1, 1)),  # a tie of three
    ((-500.0, -10500.0, -250.0, -1750.0), (-10500.0, -500.0, -1250.0, -750.0), (5.0, 4.0, 3.0, 2.0), (1, 1, 1, 1)),
    ((-10500.0, -500.0, -1250.0, -750.0), (-500.0, -10500.0, -250.0, -1750.0), (5.0, 4.0, 3.0, 2.0), (1, 1, 1, 1)),
)  # fmt: skip
_CHECK_LABELS = (  # log-probs of policy, of reference; whether the completion is good
    (-40.0, -42.25, True), (-55.5, -50.75, False), (-60.5, -52.75, True), (-38.0, -41.25, False),
    (-12.25, -12.25, True), (-90.0, -90.0, False), (-250.0, -1250.0, True), (-250.0, -1250.0, False),
    (-1250.0, -250.0, True), (-500.0, -10500.0, True), (-10500.0, -500.0, True),
    (-500.0, -10500.0, False), (-10500.0, -500.0, False),
)  # fmt: skip
_CHECK_SHIFT = 0.75
_CHECK_TOLERANCES = {torch.float64: (1e-9, 1e-11), torch.float32: (2e-5, 2e-6)}


def check(my_loss: Callable[..., Any], name: str, *, beta: float = 0.1, **options: OptionValue) -> None:
    """Hold a loss of yours against the one here: values and gradients on built-in inputs, in fp64 and in fp32.

    Among the inputs are log-ratios of ±10,000, a margin of 0, ties and lists of different K.

        check(lambda *logps: my_dpo_loss(*logps, beta=0.1), "sigmoid", beta=0.1)

    Args:
        my_loss: returns losses [B], or a tuple that starts with them; or one number, their sum or mean: then it is
            called on each row alone. It sets β and options itself, and is called with these tensors:

            - pairs: `(policy_chosen, policy_rejected, reference_chosen, reference_rejected)`, log-probs [B] as in
              `dpo_loss`, only the first two for a loss without a reference; by keyword `chosen_lengths`,
              `rejected_lengths` for a loss per token and `chosen_ratings`, `rejected_ratings` for one that needs them.
            - lists: `(policy, reference, ratings=..., mask=...)`, [B, K] as in `list_loss`.
            - labels: `(policy, reference, labels, shift=...)`, [B] and a scalar as in `label_loss`.
        name: of the loss here.
        beta: β of the loss here.
        options: its further options.

    Raises:
        AssertionError: it differs; the text has the first difference and its input.
        ValueError: an unknown loss, an option out of range or without meaning for it.
    """
    loss = find_loss(name)
    keywords: dict[str, Any] = {"beta": beta, **resolve_options(loss, beta, options)}
    ours: Callable[..., Any] = loss.function
    if loss.rows == "pairs":
        ours, keywords = dpo_loss, {"beta": beta, "loss_type": name, **options}
        if not loss.reference:
            keywords |= {"reference_chosen_logps": None, "reference_rejected_logps": None}
    ours = functools.partial(ours, **keywords)
    for dtype, (rtol, atol) in _CHECK_TOLERANCES.items():
        inputs = _check_inputs(loss, dtype)
        expected, found = _evaluate(ours, inputs), _evaluate(my_loss, inputs)
        for what, values in expected.items():
            differs = ~torch.isclose(found[what].to(dtype), values, rtol, atol).reshape(len(values), -1).all(1)
            if differs.any():
                row = int(differs.nonzero()[0])
                given = ", ".join(f"{key}={tensor[row].tolist()}" for key, tensor in inputs.items() if tensor.ndim)
                raise AssertionError(
                    f"{name} in {dtype}: {what} of input {row} is {found[what][row].tolist()}, not "
                    f"{values[row].tolist()}, at beta={beta}, {given}"
                )


def _check_inputs(loss: Loss, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that a loss is called with, by the names of its arguments here."""
    if loss.rows == "lists":
        policy, reference, ratings, mask = torch.tensor(_CHECK_LISTS, dtype=dtype).unbind(1)
        return {"policy_logps": policy, "reference_logps": reference, "ratings": ratings, "mask": mask.bool()}
    if loss.rows == "labels":
        policy, reference, labels = torch.tensor(_CHECK_LABELS, dtype=dtype).unbind(1)
        shift = torch.tensor(_CHECK_SHIFT, dtype=dtype)
        return {"policy_logps": policy, "reference_logps": reference, "labels": labels.bool(), "shift": shift}
    columns = zip(_CHECK_PAIR_COLUMNS, torch.tensor(_CHECK_PAIRS, dtype=dtype).unbind(1), strict=True)
    return {name: column.long() if "lengths" in name else column for name, column in columns if _needs(loss, name)}


def _evaluate(function: Callable[..., Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses [B] of a function and their gradients by the policy's log-probs."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items() if "policy" in name}
    by_place = [leaves.get(name, tensor) for name, tensor in inputs.items() if "logps" in name or name == "labels"]
    by_name = {name: tensor for name, tensor in inputs.items() if not ("logps" in name or name == "labels")}

    def call(rows: slice) -> Tensor:
        keywords = {name: tensor[rows] if tensor.ndim else tensor for name, tensor in by_name.items()}
        result = function(*(tensor[rows] for tensor in by_place), **keywords)
        losses = result[0] if isinstance(result, tuple | list) and result else result
        if not isinstance(losses, Tensor):
            raise AssertionError(f"the function must return losses, a tensor [B] or a scalar, not {losses!r}")
        return losses

    losses, count = call(slice(None)), len(by_place[0])
    if losses.ndim == 0:
        losses = torch.stack([call(slice(row, row + 1)) for row in range(count)])
    if losses.shape != (count,):
        raise AssertionError(f"{count} rows must have losses of shape [{count}], not {list(losses.shape)}")
    if not losses.requires_grad:
        raise AssertionError("the losses have no gradient: they were computed from detached log-probs")
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
    return {"the loss": losses.detach()} | {f"the gradient by {k}": g for k, g in zip(leaves, gradients, strict=True)}


# ---- validation ----


def _check_beta(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a positive number, not {beta}")


def _required(loss: Loss, name: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError(f"loss_type {loss.name!r} needs {name}")
    return tensor


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
        raise ValueError(f"all tensors must have one shape, not {shapes}")
