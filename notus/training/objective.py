"""What is learned from rated answers: from the log-probs of a row's completions to losses and metrics.

It knows tensors, and neither steps nor ranks. The run around it is in `dpo.py`.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from notus.config import DPOConfig, options_of
from notus.losses import Loss, loss_components, nll_loss, pair_loss
from notus.training.warnings import CHOSEN_CHANGE, SUMMED_MARGINS, Guard

_PROBE_BETA = 0.1


@dataclasses.dataclass(frozen=True)
class Scored:
    """E rows of K completions, with all that a loss may need. Training makes one of a packed row.

    Attributes:
        policy: fp32 [E, K], the policy's log-probs in nats, summed over each completion.
        reference: the same of the reference; None: the loss has none.
        lengths: int64 [E, K], completion tokens; 0: there is no such completion.
        weights: fp32 [E], 1 for a row and 0 for a filler.
        ratings: fp32 [E, K], how good the completions are, where the loss needs it.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    weights: Tensor
    ratings: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Totals:
    """What a step's rows are divided by, over all of its packed rows and ranks.

    Attributes:
        examples: how many there are.
        chosen_tokens: completion tokens of the chosen answers.
    """

    examples: int
    chosen_tokens: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an objective makes of E rows.

    Attributes:
        losses: fp32 [E], with gradient, what is trained; its mean over the step's examples is the step's loss.
        rewards: fp32 [E, K], detached.
        parts: fp32 [E] each, detached: what else is logged as a mean over examples, by its name.
    """

    losses: Tensor
    rewards: Tensor
    parts: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over rows, of which metrics are made; fillers weigh nothing.

    Attributes:
        examples: how many there are.
        loss: of the loss that is trained, with the NLL's part.
        chosen_reward, rejected_reward: as the loss defines rewards.
        accuracy: of the pairs, those whose chosen reward is larger; a tie counts half.
        chosen_logp, rejected_logp: of the policy, in nats.
        sigmoid_loss: the plain sigmoid loss at β = 0.1, which must be ln 2 at step 0 whatever loss is trained.
        chosen_tokens: completion tokens of the chosen answers.
    """

    examples: float
    loss: float
    chosen_reward: float
    rejected_reward: float
    accuracy: float
    chosen_logp: float
    rejected_logp: float
    sigmoid_loss: float
    chosen_tokens: float

    @property
    def chosen(self) -> float:
        """How many chosen answers there are."""
        return self.examples

    @property
    def rejected(self) -> float:
        """How many rejected answers there are."""
        return self.examples

    @property
    def compared(self) -> float:
        """How many of the things that `accuracy` counts there are."""
        return self.examples


class Objective(ABC):
    """The losses of `dpo.loss_type`, summed with their weights, and the metrics of what they learn from.

    Attributes:
        reference: whether rows need the reference's log-probs.
        ratings: whether they need ratings.
        guards: metrics to warn about.
        num_sums: how many sums the metrics are made of.
    """

    _sums: type[Sums] = Sums

    def __init__(self, config: DPOConfig) -> None:
        self._config = config
        self._losses = loss_components(config.loss_type)
        self.reference = any(loss.reference for loss in self._losses)
        self.ratings = any(loss.ratings for loss in self._losses)
        # rewards are those of the first loss that has a reference, or else of the first
        self._leading = next((loss for loss in self._losses if loss.reference), next(iter(self._losses)))
        self._parts = [f"loss/{loss.name}" for loss in self._losses] if len(self._losses) > 1 else []
        if config.nll_weight and config.nll_mean == "completions":
            self._parts.append("nll_loss")
        self._names = [field.name for field in dataclasses.fields(self._sums)]
        self.num_sums = len(self._names) + len(self._parts)
        self.guards = self._guards()

    @abstractmethod
    def _apply(self, loss: Loss, rows: Scored, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Losses [E] and rewards [E, K] of one loss."""

    @abstractmethod
    def _sides(self, rows: Scored, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of what completions have, [E, K]: that of the chosen and of the rejected answer of each row, [E]; else 0."""

    @abstractmethod
    def _columns(self, rows: Scored, rewards: Tensor) -> dict[str, Tensor]:
        """Those of the fields of its sums that depend on the kind of rows, [E] each: `accuracy`, and more."""

    def __call__(self, rows: Scored, totals: Totals) -> Outcome:
        """Return the losses of some rows of a step."""
        total, rewards = torch.zeros_like(rows.policy[:, 0]), torch.zeros_like(rows.policy)
        parts: dict[str, Tensor] = {}
        for loss, weight in self._losses.items():
            losses, own_rewards = self._apply(loss, rows, dict(options_of(self._config, loss)))
            total = total + weight * losses
            parts[f"loss/{loss.name}"] = losses.detach()
            if loss is self._leading:
                rewards = own_rewards
        nll = self._nll(rows, totals)
        if nll is not None:
            total = total + self._config.nll_weight * nll
            parts["nll_loss"] = nll.detach()
        return Outcome(total, rewards, parts)

    def _nll(self, rows: Scored, totals: Totals) -> Tensor | None:
        """The NLL of the chosen [E], whose mean over the step's examples is the mean that `dpo.nll_mean` names."""
        if not self._config.nll_weight:
            return None
        logps = rows.policy[:, 0]
        if self._config.nll_mean == "completions":
            return nll_loss(logps / rows.lengths[:, 0], 1)
        return totals.examples * nll_loss(logps, totals.chosen_tokens)

    def sums(self, rows: Scored, outcome: Outcome) -> Tensor:
        """Return what the rows add to the metrics, fp64 [`num_sums`]: on their device, so without a host sync."""
        rewards, policy = outcome.rewards.double(), rows.policy.detach()
        chosen_reward, rejected_reward = self._sides(rows, rewards)
        chosen_logp, rejected_logp = self._sides(rows, policy)
        columns = {
            "examples": torch.ones_like(rows.weights),
            "loss": outcome.losses.detach(),
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "chosen_logp": chosen_logp,
            "rejected_logp": rejected_logp,
            "sigmoid_loss": self._probe(rows),
            "chosen_tokens": self._sides(rows, rows.lengths)[0],
            **self._columns(rows, rewards),
        }
        found = [columns[name] for name in self._names] + [outcome.parts[name] for name in self._parts]
        return torch.stack([column.double() for column in found]) @ rows.weights.double()

    def _probe(self, rows: Scored) -> Tensor:
        """The plain sigmoid loss [E] of chosen against rejected; 0 without a reference."""
        if rows.reference is None:
            return torch.zeros_like(rows.weights)
        chosen, rejected = self._sides(rows, (rows.policy.detach() - rows.reference).double())
        return softplus(-_PROBE_BETA * (chosen - rejected))

    def read(self, sums: Sequence[float]) -> Sums:
        """Return the sums by name."""
        return self._sums(*sums[: len(self._names)])

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Return means over rows; those of the NLL and of the chosen log-probs' change may be over chosen tokens."""
        total = self.read(sums)
        parts = zip(self._parts, sums[len(self._names) :], strict=True)
        metrics = _means(
            ("loss", total.loss, total.examples),
            *((name, value, total.examples) for name, value in parts),
            ("rewards/chosen", total.chosen_reward, total.chosen),
            ("rewards/rejected", total.rejected_reward, total.rejected),
            ("rewards/accuracies", total.accuracy, total.compared),
            ("logps/chosen", total.chosen_logp, total.chosen),
            ("logps/rejected", total.rejected_logp, total.rejected),
        )
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        if self.reference:
            # the reward is β times this change, summed over tokens
            change = total.chosen_reward / self._config.beta
            metrics |= _means(("logps/chosen_change", change, total.chosen_tokens))
        if self._config.nll_weight and self._config.nll_mean == "tokens":
            metrics |= _means(("nll_loss", -total.chosen_logp, total.chosen_tokens))
        return metrics | self._more_metrics(total)

    def _more_metrics(self, total: Sums) -> dict[str, float]:
        """Metrics that depend on the kind of rows."""
        return {}

    def _guards(self) -> tuple[Guard, ...]:
        if not self.reference:
            return ()
        per_token = any(loss.per_token for loss in self._losses)
        return (CHOSEN_CHANGE,) if per_token else (SUMMED_MARGINS, CHOSEN_CHANGE)


class PairObjective(Objective):
    """Of a chosen and a rejected completion: K = 2."""

    def _apply(self, loss: Loss, rows: Scored, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return pair_loss(
            loss,
            rows.policy,
            rows.reference,
            beta=self._config.beta,
            options=options,
            lengths=rows.lengths,
            ratings=rows.ratings,
        )

    def _sides(self, rows: Scored, values: Tensor) -> tuple[Tensor, Tensor]:
        return values[:, 0], values[:, 1]

    def _columns(self, rows: Scored, rewards: Tensor) -> dict[str, Tensor]:
        return {"accuracy": 0.5 * (1.0 + (rewards[:, 0] - rewards[:, 1]).sign())}


def _means(*rates: tuple[str, float, float]) -> dict[str, float]:
    """{name: total / count} of (name, total, count), without those of which there are none."""
    return {name: total / count for name, total, count in rates if count}
