"""What is learned from rated answers: from the log-probs of a row's completions to losses and metrics.

It knows tensors, and neither steps nor ranks. The run around it is in `dpo.py`.
"""

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from notus.config import DPOConfig, options_of
from notus.data.packing import Batch
from notus.losses import (
    Loss,
    Rows,
    Shift,
    label_loss,
    ld_logps,
    list_loss,
    loss_components,
    nll_loss,
    pair_loss,
    public_sums,
    resolve_options,
    wpo_weights,
)
from notus.model.policy import Policy
from notus.training.ranking import kendall_tau, pairwise_accuracy, top_1
from notus.training.warnings import CHOSEN_CHANGE, CHOSEN_FALL, GOOD_CHANGE, OTHER_MARGINS, SUMMED_MARGINS, Guard

PROBE_BETA = 0.1
MOST_DOUBLINGS = 10.0  # of LiPO-λ's gains, before a note: ratings from 1 to 10 are the largest scale in common use


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a forward pass says of E rows of K completions.

    Attributes:
        logps: fp32 [E, K], log-probs in nats, summed over each completion.
        public: fp32 [E, 2], the same of a pair, up to the length of its shorter completion alone; for LD-DPO.
        likelihood: fp32 [E], detached: how likely the model itself is to write a pair's completions; for WPO.
    """

    logps: Tensor
    public: Tensor | None = None
    likelihood: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """E rows of K completions, with all that a loss may need. Training makes one of a packed row.

    Attributes:
        policy: of the policy's forward pass.
        reference: fp32 [E, K], the reference's log-probs in nats; None: the loss has no reference.
        public_reference: fp32 [E, 2], the same up to the length of a pair's shorter completion; for LD-DPO.
        lengths: int64 [E, K], completion tokens; 0: there is no such completion.
        weights: fp32 [E], 1 for a row and 0 for a filler.
        ratings: fp32 [E, K], how good the completions are; of lists, and where the loss needs it.
        labels: bool [E], which completions are good ones.
        shifts: scalars, detached: what a loss of labels subtracts, by its kind.
    """

    policy: Measured
    reference: Tensor | None
    lengths: Tensor
    weights: Tensor
    public_reference: Tensor | None = None
    ratings: Tensor | None = None
    labels: Tensor | None = None
    shifts: Mapping[Shift, Tensor] = dataclasses.field(default_factory=dict)

    def good(self) -> Tensor:
        """Which completions are good ones, bool [E]; the rows have labels."""
        assert self.labels is not None
        return self.labels


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

    @property
    def noisy_tokens(self) -> float:
        """Of how many tokens the log-probs make `sigmoid_loss` noisy, roughly."""
        return self.chosen_tokens


class Objective(ABC):
    """The losses of `dpo.loss_type`, summed with their weights, and the metrics of what they learn from.

    Attributes:
        reference: whether rows need the reference's log-probs.
        public: whether log-probs are also needed up to the length of a pair's shorter completion.
        ratings: whether rows need ratings.
        shifts: what its losses of labels subtract.
        guards: metrics to warn about.
        num_sums: how many sums the metrics are made of.
    """

    _sums: type[Sums] = Sums
    _margins, _change = OTHER_MARGINS, CHOSEN_CHANGE

    def __init__(self, config: DPOConfig) -> None:
        self._config = config
        self._losses = loss_components(config.loss_type)
        self._options: dict[Loss, dict[str, Any]] = {loss: dict(options_of(config, loss)) for loss in self._losses}
        self.reference = any(loss.reference for loss in self._losses)
        self.public = config.ld_alpha is not None
        self.ratings = any(loss.ratings for loss in self._losses)
        self.shifts = {loss.shift for loss in self._losses if loss.shift}
        # rewards are those of the first loss that has a reference, or else of the first
        self._leading = next((loss for loss in self._losses if loss.reference), next(iter(self._losses)))
        self._parts = [f"loss/{loss.name}" for loss in self._losses] if len(self._losses) > 1 else []
        if config.nll_weight and config.nll_mean == "completions":
            self._parts.append("nll_loss")
        self._names = [field.name for field in dataclasses.fields(self._sums)]
        self.num_sums = len(self._names) + len(self._parts)
        self.guards = self._guards()

    @abstractmethod
    def _apply(self, loss: Loss, rows: Scored) -> tuple[Tensor, Tensor]:
        """Losses [E] and rewards [E, K] of one loss."""

    @abstractmethod
    def _sides(self, rows: Scored, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's value of the chosen and of the rejected answer, [E] each, of values [E, K]; 0 for none."""

    @abstractmethod
    def _columns(self, rows: Scored, rewards: Tensor) -> dict[str, Tensor]:
        """Return the fields of `_sums` that depend on the kind of rows, [E] each: `accuracy`, and more."""

    def measure(self, policy: Policy, batch: Batch) -> Measured:
        """Run a packed row forward: for sums of completions, or for single tokens where the losses need these."""
        if self._config.wpo:
            tokens, collisions = policy.token_statistics(batch)
            return self._of_tokens(tokens, batch.lengths, wpo_weights(tokens, collisions, batch.lengths))
        if self.public:
            return self._of_tokens(policy.token_logprobs(batch), batch.lengths, None)
        return Measured(policy(batch))

    def _of_tokens(self, tokens: Tensor, lengths: Tensor, likelihood: Tensor | None) -> Measured:
        public = public_sums(tokens, lengths) if self.public else None
        return Measured(_completion_sums(tokens, lengths), public, likelihood)

    def measure_table(self, policy: Policy, batch: Batch) -> Tensor:
        """What `measure` finds as one table for `score`, fp32 [E, `table_width`]; `read_table` reads it."""
        found = self.measure(policy, batch)
        likelihood = [] if found.likelihood is None else [found.likelihood[:, None]]
        return torch.cat([found.logps, *([] if found.public is None else [found.public]), *likelihood], dim=1)

    def table_width(self, branches: int) -> int:
        """How many columns `measure_table` has, for rows of so many completions."""
        return branches + 2 * self.public + self._config.wpo

    def read_table(self, table: Tensor, branches: int) -> Measured:
        """Return what `measure_table` wrote."""
        public = table[:, branches : branches + 2] if self.public else None
        return Measured(table[:, :branches], public, table[:, -1] if self._config.wpo else None)

    def __call__(self, rows: Scored, totals: Totals) -> Outcome:
        """Return the losses of some rows of a step."""
        weighted: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        rewards = rows.policy.logps
        for loss, weight in self._losses.items():
            losses, own_rewards = self._apply(loss, rows)
            if rows.policy.likelihood is not None:
                losses = rows.policy.likelihood * losses
            parts[f"loss/{loss.name}"] = losses.detach()
            weighted.append(losses if weight == 1 else weight * losses)
            if loss is self._leading:
                rewards = own_rewards
        nll = self._nll(rows, totals)
        if nll is not None:
            weighted.append(self._config.nll_weight * nll)
            parts["nll_loss"] = nll.detach()
        return Outcome(functools.reduce(torch.add, weighted), rewards, parts)

    def _compared(self, rows: Scored) -> tuple[Tensor, Tensor | None]:
        """The log-probs [E, K] that the losses compare: those of whole completions, or LD-DPO's."""
        logps, reference, alpha = rows.policy.logps, rows.reference, self._config.ld_alpha
        if alpha is None:
            return logps, reference
        assert rows.policy.public is not None
        if reference is not None:
            assert rows.public_reference is not None
            reference = ld_logps(reference, rows.public_reference, alpha)
        return ld_logps(logps, rows.policy.public, alpha), reference

    def _nll(self, rows: Scored, totals: Totals) -> Tensor | None:
        """The NLL of the chosen [E], whose mean over the step's examples is the mean that `dpo.nll_mean` names."""
        if not self._config.nll_weight:
            return None
        logps = rows.policy.logps[:, 0]
        if self._config.nll_mean == "completions":
            return nll_loss(logps, rows.lengths[:, 0])
        return totals.examples * nll_loss(logps, totals.chosen_tokens)

    def sums(self, rows: Scored, outcome: Outcome) -> Tensor:
        """Return what the rows add to the metrics, fp64 [`num_sums`]: on their device, so without a host sync."""
        rewards = outcome.rewards.double()
        chosen_reward, rejected_reward = self._sides(rows, rewards)
        chosen_logp, rejected_logp = self._sides(rows, rows.policy.logps.detach())
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
        logps, reference = self._compared(rows)
        if reference is None:
            return torch.zeros_like(rows.weights)
        chosen, rejected = self._sides(rows, (logps.detach() - reference).double())
        return softplus(-PROBE_BETA * (chosen - rejected))

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
        )
        if total.chosen and total.rejected:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics |= _means(
            ("rewards/accuracies", total.accuracy, total.compared),
            ("logps/chosen", total.chosen_logp, total.chosen),
            ("logps/rejected", total.rejected_logp, total.rejected),
        )
        if self.reference:
            # the reward is β times this change, summed over tokens
            change = total.chosen_reward / self._config.beta
            metrics |= _means(("logps/chosen_change", change, total.chosen_tokens))
        else:
            metrics |= _means(("logps/chosen_per_token", total.chosen_logp, total.chosen_tokens))
        if self._config.nll_weight and self._config.nll_mean == "tokens":
            metrics |= _means(("nll_loss", -total.chosen_logp, total.chosen_tokens))
        return metrics | self._more_metrics(total)

    def metric_names(self) -> list[str]:
        """Return the names of all metrics there can be; some rows may lack some, such as labels that are all alike."""
        return list(self.metrics([1.0] * self.num_sums))

    def _more_metrics(self, total: Sums) -> dict[str, float]:
        """Metrics that depend on the kind of rows."""
        return {}

    def notes(self, ratings: Tensor | None, labels: Tensor | None, present: Tensor) -> list[str]:
        """Return what to say of the training rows before the first step.

        Of pairs and lists: how many have no two answers in the order of their ratings, if a loss ignores such rows.

        Args:
            ratings: fp32 [n, K], as in `Scored`.
            labels: bool [n], likewise.
            present: bool [n, K], which completions there are.
        """
        if ratings is None:
            return []
        count = int((ratings[:, 0] <= ratings.masked_fill(~present, math.inf).amin(1)).sum())
        ignoring = [repr(loss.name) for loss in self._losses if self._ignores_ties(loss)]
        if not count or not ignoring:
            return []
        return [
            f"note: in {count:,} of {len(ratings):,} training rows, no answer is rated below the first one: "
            f"{', '.join(ignoring)} learns nothing from them"
        ]

    def _ignores_ties(self, loss: Loss) -> bool:
        """Whether a loss is 0 for two completions that are rated alike, although their rewards are far apart."""
        logps, zeros, ones = torch.tensor([[-1000.0, -1.0]]), torch.zeros(1, 2), torch.ones(1, 2)
        rows = Scored(Measured(logps, logps), zeros, ones, ones[:, 0], public_reference=zeros, ratings=ones)
        return self._apply(loss, rows)[0].item() == 0

    def _guards(self) -> tuple[Guard, ...]:
        """Warn of saturated margins where rewards are sums over tokens, and of chosen answers that become unlikely."""
        if not self.reference:
            return (CHOSEN_FALL,)
        per_token = any(loss.per_token for loss in self._losses)
        return (self._change,) if per_token else (self._margins, self._change)


class PairObjective(Objective):
    """The objective of pairs, a chosen and a rejected completion: K = 2."""

    _margins = SUMMED_MARGINS

    def _apply(self, loss: Loss, rows: Scored) -> tuple[Tensor, Tensor]:
        logps, reference = self._compared(rows)
        beta, lengths, ratings = self._config.beta, rows.lengths, rows.ratings
        losses, rewards = pair_loss(
            loss, logps, reference, beta=beta, options=self._options[loss], lengths=lengths, ratings=ratings
        )
        if self.public:  # rewards are those of the whole completions, whatever the loss looks at
            whole = rows.policy.logps.detach()
            rewards = beta * (whole - rows.reference if loss.reference and rows.reference is not None else whole)
        return losses, rewards

    def _sides(self, rows: Scored, values: Tensor) -> tuple[Tensor, Tensor]:
        return values[:, 0], values[:, 1]

    def _columns(self, rows: Scored, rewards: Tensor) -> dict[str, Tensor]:
        return {"accuracy": 0.5 * (1.0 + (rewards[:, 0] - rewards[:, 1]).sign())}


@dataclasses.dataclass(frozen=True)
class ListSums(Sums):
    """Sums over lists: of all pairs of different ratings, `accuracy` counts those whose better one's reward is larger.

    The best rated completion counts as chosen, the worst as rejected.

    Attributes:
        pairs: how many pairs of different ratings there are.
        ranked: how many lists have such a pair; the others say nothing.
        tau: of these, Kendall's τ-b between rewards and ratings; 0 where all rewards are equal.
        top_1: of these, whether the largest reward is that of a best rated completion.
    """

    pairs: float
    tau: float
    ranked: float
    top_1: float

    @property
    def compared(self) -> float:
        return self.pairs


class ListObjective(Objective):
    """The objective of lists: K rated completions, the best first."""

    _sums = ListSums

    def _apply(self, loss: Loss, rows: Scored) -> tuple[Tensor, Tensor]:
        return list_loss(
            loss,
            rows.policy.logps,
            rows.reference,
            beta=self._config.beta,
            options=self._options[loss],
            ratings=rows.ratings,
            mask=rows.lengths > 0,
        )

    def _sides(self, rows: Scored, values: Tensor) -> tuple[Tensor, Tensor]:
        last = (rows.lengths > 0).sum(1, keepdim=True) - 1
        return values[:, 0], values.gather(1, last)[:, 0]

    def _columns(self, rows: Scored, rewards: Tensor) -> dict[str, Tensor]:
        assert rows.ratings is not None
        ratings, mask = rows.ratings, rows.lengths > 0
        right, pairs = pairwise_accuracy(rewards, ratings, mask)
        ranked = pairs > 0
        return {
            "accuracy": right,
            "pairs": pairs,
            "tau": kendall_tau(rewards, ratings, mask).nan_to_num(0.0),
            "ranked": ranked,
            "top_1": top_1(rewards, ratings, mask).masked_fill(~ranked, 0.0),
        }

    def notes(self, ratings: Tensor | None, labels: Tensor | None, present: Tensor) -> list[str]:
        """Say also if LiPO-λ's gains, 2^(rating / rating_scale), are far beyond the paper's 1 to 2."""
        assert ratings is not None
        found, best = super().notes(ratings, labels, present), ratings.max().item()
        for loss in self._losses:
            if loss.name == "lipo_lambda":
                scale = float(resolve_options(loss, self._config.beta, self._options[loss])["rating_scale"])
                if best > MOST_DOUBLINGS * scale:
                    found.append(
                        f"note: the best rating is {best:g}, and 'lipo_lambda' weighs by 2^(rating / {scale:g}): set "
                        f"rating_scale in dpo.options to about {best:g}, as the paper's ratings are from 0 to 1"
                    )
        return found

    def _more_metrics(self, total: Sums) -> dict[str, float]:
        assert isinstance(total, ListSums)
        return _means(("rewards/kendall_tau", total.tau, total.ranked), ("rewards/top_1", total.top_1, total.ranked))


@dataclasses.dataclass(frozen=True)
class LabelSums(Sums):
    """Sums over labelled completions: `accuracy` counts those whose reward is on the right side of the loss's shift.

    The good completions count as chosen, the bad ones as rejected.

    Attributes:
        good, bad: how many there are.
        shift: what the first loss subtracts, for each of them.
        tokens: of all completions.
    """

    good: float
    bad: float
    shift: float
    tokens: float

    @property
    def noisy_tokens(self) -> float:
        return self.tokens

    @property
    def chosen(self) -> float:
        return self.good

    @property
    def rejected(self) -> float:
        return self.bad


class LabelObjective(Objective):
    """The objective of labels: one completion, good or bad, so K = 1."""

    _sums = LabelSums
    _change = GOOD_CHANGE

    def _apply(self, loss: Loss, rows: Scored) -> tuple[Tensor, Tensor]:
        losses, rewards = label_loss(
            loss,
            rows.policy.logps[:, 0],
            None if rows.reference is None else rows.reference[:, 0],
            rows.good(),
            beta=self._config.beta,
            options=self._options[loss],
            shift=None if loss.shift is None else rows.shifts[loss.shift],
        )
        return losses, rewards[:, None]

    def _sides(self, rows: Scored, values: Tensor) -> tuple[Tensor, Tensor]:
        own, good = values[:, 0], rows.good()
        return own.masked_fill(~good, 0), own.masked_fill(good, 0)

    def _columns(self, rows: Scored, rewards: Tensor) -> dict[str, Tensor]:
        kind, good = self._leading.shift, rows.good()
        shift = torch.zeros_like(rows.weights) if kind is None else rows.shifts[kind].expand_as(rows.weights)
        beyond = rewards[:, 0] - (self._config.beta * shift if kind == "kl" else shift)
        return {
            "accuracy": 0.5 * (1.0 + torch.where(good, beyond, -beyond).sign()),
            "good": good,
            "bad": ~good,
            "shift": shift,
            "tokens": rows.lengths[:, 0],
        }

    def _more_metrics(self, total: Sums) -> dict[str, float]:
        assert isinstance(total, LabelSums)
        if self._leading.shift is None:
            return {}
        return _means(("kl" if self._leading.shift == "kl" else "rewards/shift", total.shift, total.examples))

    def notes(self, ratings: Tensor | None, labels: Tensor | None, present: Tensor) -> list[str]:
        """Warn of labels that are all alike, and of KTO's weights if they do not balance them.

        By KTO's paper (2402.01306), λ_D n_D / (λ_U n_U) should be from 1 to 3/2.
        """
        assert labels is not None
        good, bad = int(labels.sum()), int((~labels).sum())
        if not good or not bad:
            missing = "good" if bad else "bad"
            return [
                f"warning: no training row is {missing}: the loss needs both good and bad answers to tell them apart"
            ]
        found = []
        for loss in self._losses:
            if loss.option("desirable_weight") is None:
                continue
            weights = resolve_options(loss, self._config.beta, self._options[loss])
            desirable, undesirable = float(weights["desirable_weight"]), float(weights["undesirable_weight"])
            if not undesirable * bad <= desirable * good <= 1.5 * undesirable * bad:
                found.append(
                    f"note: {good:,} training rows are good and {bad:,} bad; weighted, {desirable * good:g} to "
                    f"{undesirable * bad:g}. KTO's authors advise a ratio from 1 to 3/2: see desirable_weight and "
                    "undesirable_weight in dpo.options"
                )
        return found


def objective_of(config: DPOConfig) -> Objective:
    """Return the objective of `dpo.loss_type`, by the rows that it learns from."""
    kinds: dict[Rows, Callable[[DPOConfig], Objective]] = {
        "pairs": PairObjective,
        "lists": ListObjective,
        "labels": LabelObjective,
    }
    return kinds[next(iter(loss_components(config.loss_type))).rows](config)


def measure_public(policy: Policy, batch: Batch) -> Tensor:
    """Return a packed row's log-probs, and those up to the length of a pair's shorter completion: fp32 [E, 4]."""
    tokens = policy.token_logprobs(batch)
    return torch.cat([_completion_sums(tokens, batch.lengths), public_sums(tokens, batch.lengths)], dim=1)


def _completion_sums(tokens: Tensor, lengths: Tensor) -> Tensor:
    """What `Policy.forward` makes of the log-probs of tokens [M]: their sums [E, K]."""
    return torch.segment_reduce(tokens, "sum", lengths=lengths.flatten(), unsafe=True).view(lengths.shape)


def check_ratings(ratings: np.ndarray | None, loss_tokens: np.ndarray, place: Callable[[int], str], key: str) -> None:
    """Raise ValueError if a completion has no rating.

    Args:
        ratings: fp32 [n, K], NaN where unknown; None: all are.
        loss_tokens: int64 [n, K], 0 where there is no completion.
        place: where a row stands in its data, by its number.
        key: what the error begins with: the data, and who needs the ratings.
    """
    unknown = np.ones_like(loss_tokens, dtype=bool) if ratings is None else np.isnan(ratings)
    missing = np.flatnonzero((unknown & (loss_tokens > 0)).any(axis=1))
    if len(missing):
        raise ValueError(
            f"{key}, but {len(missing):,} of {len(loss_tokens):,} rows have a completion without one (the first: "
            f"{place(int(missing[0]))}). docs/data.md names the columns of ratings. Leave these rows out, or take "
            "another loss"
        )


def ratings_or_order(ratings: np.ndarray | None, loss_tokens: np.ndarray) -> np.ndarray:
    """Return what orders the completions of lists, fp32 [n, K]: their ratings, or else their own order, best first.

    A list of which any rating is unknown has its own order. Columns without a completion are 0. Arguments as in
    `check_ratings`.
    """
    there = loss_tokens > 0
    order = np.arange(loss_tokens.shape[1], 0, -1, dtype=np.float32) * np.ones_like(loss_tokens, dtype=np.float32)
    if ratings is not None:
        known = (~np.isnan(ratings) | ~there).all(axis=1, keepdims=True)
        order = np.where(known, ratings, order)
    return np.where(there, order, np.float32(0))


def _means(*rates: tuple[str, float, float]) -> dict[str, float]:
    """{name: total / count} of (name, total, count), without those of which there are none."""
    return {name: total / count for name, total, count in rates if count}
