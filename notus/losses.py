"""Direct Preference Optimization and its relatives, as pure functions of summed log-probs.

Notation, for a prompt with a chosen and a rejected completion, log-probs in nats, summed over tokens:

    c = log policy(chosen)   - log reference(chosen)      log-ratio of the chosen completion
    r = log policy(rejected) - log reference(rejected)    log-ratio of the rejected completion
    βc, βr                                                rewards; β(c - r) is their margin
    n_c, n_r                                              numbers of completion tokens
    ε                                                     label smoothing, the assumed share of swapped labels
    σ, ls                                                 the logistic function and its logarithm

Every function takes and returns tensors of shape [B], one value per pair; nothing is reduced. Values and
gradients are finite for log-ratios of any size that training can bring: no exponential overflows.
"""

import difflib
import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

# `notus.config` reads these two from this file's source, since it imports no torch: keep them plain tuples.
LOSS_TYPES = (
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
SMOOTHED_LOSSES = ("sigmoid", "robust", "exo_pair")
LENGTH_NORMALISED_LOSSES = ("ipo", "sigmoid_norm")
DISCOPOP_TAU = 0.05


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A preference loss per pair, computed in the dtype of its inputs: fp32 or fp64.

    Args:
        policy_chosen_logps: [B] log-prob of each chosen completion under the policy, in nats.
        policy_rejected_logps: [B] the same of the rejected completions.
        reference_chosen_logps: [B] the same of the chosen completions under the reference.
        reference_rejected_logps: [B] and of the rejected ones.
        beta: β > 0, how strongly the policy is held to the reference.
        loss_type: one of `LOSS_TYPES`.
        label_smoothing: ε in [0, 0.5], for `SMOOTHED_LOSSES`; below 0.5 for robust, above 0 for exo_pair.
        chosen_lengths: [B] completion tokens n_c, each at least 1; needed by `LENGTH_NORMALISED_LOSSES`.
        rejected_lengths: [B] completion tokens n_r, likewise.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [B]. The rewards are βc and βr, detached.

    Raises:
        ValueError: an unknown loss, an option out of range or without meaning for the loss, missing
            lengths, shapes that differ, or a dtype below fp32.
    """
    _check_options(loss_type, beta, label_smoothing)
    _check_tensors(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    c = policy_chosen_logps - reference_chosen_logps
    r = policy_rejected_logps - reference_rejected_logps
    if loss_type in LENGTH_NORMALISED_LOSSES:
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(f"loss_type {loss_type!r} needs chosen_lengths and rejected_lengths")
        losses = _length_normalised(loss_type, c / chosen_lengths, r / rejected_lengths, beta)
    else:
        losses = _summed(loss_type, c, r, beta, label_smoothing)
    return losses, beta * c.detach(), beta * r.detach()


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


def discopop_loss(margin: Tensor) -> Tensor:
    """DiscoPOP, 2406.08414 eq. 5: (1 - m) · logistic loss + m · exp(-margin), with m = σ(margin/τ), τ = 0.05.

    m and exp(-margin) are multiplied as logarithms, because the latter overflows alone. As τ < 1, their
    product stays below 1 and vanishes on both sides: the loss grows as the logistic loss does.
    """
    logistic = softplus(-margin) * torch.sigmoid(-margin / DISCOPOP_TAU)
    exponential = torch.exp(logsigmoid(margin / DISCOPOP_TAU) - margin)
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


# ---- choice and checks ----


def _summed(loss_type: str, c: Tensor, r: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The losses of log-ratios summed over tokens."""
    match loss_type:
        case "sigmoid":
            return sigmoid_loss(beta * (c - r), label_smoothing)
        case "robust":
            return robust_loss(beta * (c - r), label_smoothing)
        case "hinge":
            return hinge_loss(beta * (c - r))
        case "exo_pair":
            return exo_pair_loss(beta * (c - r), label_smoothing)
        case "discopop":
            return discopop_loss(beta * (c - r))
        case "nca_pair":
            return nca_pair_loss(beta * c, beta * r)
        case "bco_pair":
            return bco_pair_loss(beta * c, beta * r)
        case "apo_zero":
            return apo_zero_loss(beta * c, beta * r)
        case "apo_down":
            return apo_down_loss(beta * c, beta * r)
        case _:
            assert loss_type == "sppo_hard"
            return sppo_hard_loss(c, r, beta)


def _length_normalised(loss_type: str, mean_c: Tensor, mean_r: Tensor, beta: float) -> Tensor:
    """The losses of log-ratios per token."""
    loss = ipo_loss if loss_type == "ipo" else sigmoid_norm_loss
    return loss(mean_c, mean_r, beta)


def _check_options(loss_type: str, beta: float, label_smoothing: float) -> None:
    if loss_type not in LOSS_TYPES:
        close = difflib.get_close_matches(str(loss_type), LOSS_TYPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(LOSS_TYPES)}"
        raise ValueError(f"loss_type {loss_type!r} does not exist; {hint}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a positive number, not {beta}")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must be between 0 and 0.5, not {label_smoothing}")
    if label_smoothing > 0 and loss_type not in SMOOTHED_LOSSES:
        raise ValueError(
            f"label_smoothing has no meaning for loss_type {loss_type!r}; leave it at 0, "
            f"or use one of {', '.join(SMOOTHED_LOSSES)}"
        )
    if loss_type == "robust" and label_smoothing == 0.5:
        raise ValueError("label_smoothing must be below 0.5 for loss_type 'robust', which divides by 1 - 2ε")
    if loss_type == "exo_pair" and label_smoothing == 0:
        raise ValueError("label_smoothing must be above 0 for loss_type 'exo_pair', which takes its log; try 1e-3")


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
