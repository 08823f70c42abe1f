"""DPO: what a step is, and the run around it."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from notus.config import Config, DPOConfig, options_of
from notus.data.batching import StepPlan
from notus.data.dataset import TokenizedDataset
from notus.data.packing import Batch
from notus.losses import loss_components, nll_loss, pair_loss
from notus.model.policy import Policy
from notus.runtime.distributed import say
from notus.training.reference import ReferenceKey, digest_of_rows, reference_logps
from notus.training.run_folder import REFERENCE
from notus.training.scoring import score
from notus.training.setup import Run, start
from notus.training.trainer import RowLoss
from notus.training.warnings import CHOSEN_CHANGE, SUMMED_MARGINS, Guard

# By how much ln 2 may be missed at step 0: policy and reference differ by rounding alone, but rows are packed
# differently in the reference pass, and matrix products of another shape may round differently. In bf16 that moves a
# log-prob by about 0.03 nats per square root of its tokens (simulated, logits of standard deviation 3), so the mean
# loss by 0.05 * 0.03 * sqrt(tokens) / pairs; five times that is let pass.
FIRST_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
_BF16_NOISE = 5 * 0.05 * 0.03
_PROBE_BETA = 0.1


@dataclasses.dataclass
class Preferences:
    """Tokenised pairs with the reference's log-probs, fp32 [n, 2] in nats."""

    rows: TokenizedDataset
    reference: Tensor


class PairSums(NamedTuple):
    """What `DPOTask.metrics` divides: sums over pairs, fp64; fillers weigh nothing.

    Attributes:
        pairs: how many there are.
        loss: of the loss that is trained, with the NLL's part.
        chosen_reward, rejected_reward: β·(policy − reference).
        accuracy: 1 for each pair whose chosen reward is larger; a tie counts half.
        margin: chosen − rejected reward.
        chosen_logp, rejected_logp: of the policy, in nats.
        sigmoid_loss: the plain sigmoid loss at β = 0.1, which must be ln 2 at step 0 whatever loss is trained.
        chosen_tokens: completion tokens of the chosen answers.
    """

    pairs: float
    loss: float
    chosen_reward: float
    rejected_reward: float
    accuracy: float
    margin: float
    chosen_logp: float
    rejected_logp: float
    sigmoid_loss: float
    chosen_tokens: float


class DPOTask:
    """The preference loss on packed pairs, against cached reference log-probs."""

    num_sums = len(PairSums._fields)
    _start_checked = False

    def __init__(
        self,
        train: Preferences,
        held_out: Preferences | None,
        *,
        plan: StepPlan,
        config: DPOConfig,
        precision: str,
        tokens_per_row: int,
        device: torch.device,
    ) -> None:
        self.rows, self.plan = train.rows, plan
        self._train, self._held_out, self._config = train, held_out, config
        self._precision, self._tokens_per_row, self._device = precision, tokens_per_row, device
        per_token = any(loss.per_token for loss in loss_components(config.loss_type))
        self.guards: tuple[Guard, ...] = (CHOSEN_CHANGE,) if per_token else (SUMMED_MARGINS, CHOSEN_CHANGE)

    def prepare(self, batch: Batch) -> Batch:
        """Add the reference's log-probs of the row; of a filler those of any row, since it weighs nothing."""
        return dataclasses.replace(batch, reference=self._train.reference[batch.indices])

    def row_loss(self, logps: Tensor, batch: Batch, step_indices: np.ndarray) -> RowLoss:
        """The row's share of: mean loss over the step's pairs + nll_weight * mean NLL over its chosen tokens."""
        reference, weights, lengths = batch.reference, batch.weights, batch.lengths
        assert reference is not None  # see prepare
        pairs, chosen_tokens = len(step_indices), int(self.rows.loss_tokens[step_indices, 0].sum())
        preference, rewards = self._losses(logps, reference, lengths)
        losses = self._with_nll(preference, logps, pairs, chosen_tokens)
        sums = _sums(losses.detach(), rewards, logps.detach(), reference, weights, lengths)
        return RowLoss(loss=(losses * weights).sum() / pairs, sums=sums, per_example=losses.detach())

    def _losses(self, logps: Tensor, reference: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [E] and rewards [E, 2]."""
        total, rewards = torch.zeros_like(logps[:, 0]), torch.zeros_like(logps)
        for loss, weight in loss_components(self._config.loss_type).items():
            options = options_of(self._config, loss)
            losses, rewards = pair_loss(
                loss, logps, reference, beta=self._config.beta, options=options, lengths=lengths
            )
            total = total + weight * losses
        return total, rewards

    def _with_nll(self, losses: Tensor, logps: Tensor, pairs: int, chosen_tokens: int) -> Tensor:
        """Add the NLL of the chosen [E], so that the mean over `pairs` holds its mean over `chosen_tokens`."""
        if not self._config.nll_weight:
            return losses
        return losses + self._config.nll_weight * pairs * nll_loss(logps[:, 0], chosen_tokens)

    def metrics(self, sums: list[float], seconds: float) -> dict[str, float]:
        """Means over pairs; those of the NLL and of the chosen log-probs' change over chosen tokens."""
        total = PairSums(*sums)
        metrics = {
            "loss": total.loss / total.pairs,
            "rewards/chosen": total.chosen_reward / total.pairs,
            "rewards/rejected": total.rejected_reward / total.pairs,
            "rewards/accuracies": total.accuracy / total.pairs,
            "rewards/margins": total.margin / total.pairs,
            "logps/chosen": total.chosen_logp / total.pairs,
            "logps/rejected": total.rejected_logp / total.pairs,
            # the reward is β times this change, summed over tokens
            "logps/chosen_change": total.chosen_reward / self._config.beta / total.chosen_tokens,
        }
        if self._config.nll_weight:
            metrics["nll_loss"] = -total.chosen_logp / total.chosen_tokens
        if seconds:
            metrics["pairs_per_second"] = total.pairs / seconds
        return metrics

    def check_first_step(self, sums: list[float]) -> None:
        """Policy and reference are one model at step 0, so the sigmoid loss is ln 2, whichever loss is trained.

        Raises:
            ValueError: it is not.
        """
        if self._start_checked:
            return
        total, tolerance = PairSums(*sums), FIRST_LOSS_TOLERANCE[self._precision]
        found = total.sigmoid_loss / total.pairs
        if self._precision == "bf16":
            tolerance = max(tolerance, _BF16_NOISE * math.sqrt(total.chosen_tokens) / total.pairs)
        if not abs(found - math.log(2)) <= tolerance:
            raise ValueError(
                f"at step 0 the sigmoid loss is {found:.6f}, not ln 2 = {math.log(2):.6f} (tolerance {tolerance:g}): "
                "policy and reference log-probs disagree before training. Delete the reference cache; if it happens "
                "again, the attention kernel or the precision differs between the two passes"
            )

    def check_start(self, policy: Policy) -> None:
        """Make the check of `check_first_step` now, by a pass without dropout; collective.

        Dropout changes what a trained adapter adds: the loss of the first step itself is not ln 2 then.
        """
        indices = self.plan.indices(0)
        logps = score(policy, self.rows, indices, tokens_per_row=self._tokens_per_row, device=self._device)
        reference, lengths = self._train.reference[indices], torch.from_numpy(self.rows.loss_tokens[indices])
        losses, rewards = self._losses(logps, reference, lengths)
        self.check_first_step(_sums(losses, rewards, logps, reference, torch.ones(len(indices)), lengths).tolist())
        self._start_checked = True

    def evaluate(self, policy: Policy, on_row: Callable[[], None]) -> dict[str, float]:
        """Loss, rewards and log-probs on the held-out pairs, under `eval_` names."""
        if self._held_out is None:
            return {}
        rows, reference = self._held_out.rows, self._held_out.reference
        everything = np.arange(len(rows))
        logps = score(policy, rows, everything, tokens_per_row=self._tokens_per_row, device=self._device, on_row=on_row)
        lengths = torch.from_numpy(rows.loss_tokens)
        losses, rewards = self._losses(logps, reference, lengths)
        losses = self._with_nll(losses, logps, len(rows), int(lengths[:, 0].sum()))
        sums = _sums(losses, rewards, logps, reference, torch.ones(len(rows)), lengths)
        return {f"eval_{name}": value for name, value in self.metrics(sums.tolist(), 0.0).items()}


def _sums(
    losses: Tensor, rewards: Tensor, logps: Tensor, reference: Tensor, weights: Tensor, lengths: Tensor
) -> Tensor:
    """The fields of `PairSums`, in their order, fp64 [`DPOTask.num_sums`]: on the device, so without a host sync."""
    chosen, rejected = rewards.double().unbind(1)
    margins = chosen - rejected
    log_ratios = (logps - reference).double()
    columns = {
        "pairs": torch.ones_like(margins),
        "loss": losses.double(),
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "accuracy": 0.5 * (1.0 + margins.sign()),
        "margin": margins,
        "chosen_logp": logps[:, 0].double(),
        "rejected_logp": logps[:, 1].double(),
        "sigmoid_loss": torch.nn.functional.softplus(-_PROBE_BETA * (log_ratios[:, 0] - log_ratios[:, 1])),
        "chosen_tokens": lengths[:, 0].double(),
    }
    return torch.stack([columns[name] for name in PairSums._fields], dim=1).T @ weights.double()


def run(config: Config) -> int:
    """Train with DPO as `config` says: `train_dpo.py`.

    Returns:
        The exit code: 0, or `notus.runtime.process.STOPPED` if a signal ended the run before its last step.

    Raises:
        ValueError: a user's mistake, in one line.
    """
    with start(config, "dpo") as job:
        return 0 if job is None else job.train(build_task(job, config))


def fill_reference(config: Config) -> None:
    """Fill the reference cache of `config` and stop: `python -m notus reference`."""
    with start(config, "dpo", train=False) as job:
        assert job is not None
        for name, rows in (("train", job.train_rows), ("eval", job.eval_rows)):
            if rows is not None:
                _with_reference(job, config, name, rows)


def build_task(job: Run, config: Config) -> DPOTask:
    """The task of a run: its pairs, with the reference log-probs read or computed here; collective."""
    task = DPOTask(
        _with_reference(job, config, "train", job.train_rows),
        None if job.eval_rows is None else _with_reference(job, config, "eval", job.eval_rows),
        plan=job.plan,
        config=config.dpo,
        precision=config.training.precision,
        tokens_per_row=config.training.tokens_per_row,
        device=job.device,
    )
    if config.lora.continue_ and config.lora.dropout:
        task.check_start(job.policy)
    return task


def _with_reference(job: Run, config: Config, name: str, rows: TokenizedDataset) -> Preferences:
    """Attach the reference's log-probs, from the cache or by a pass of the untrained policy."""
    digests = rows.digests()
    key = ReferenceKey(
        weights=job.weights_digest,
        rows=digest_of_rows(digests),
        precision=config.training.precision,
        kernel=job.kernel,
    )
    folder = Path(config.reference.cache_dir or Path(config.training.output_dir) / REFERENCE)

    def pass_over(indices: np.ndarray) -> Tensor:
        logps = score(job.policy, rows, indices, tokens_per_row=config.training.tokens_per_row, device=job.device)
        say(f"reference log-probs: {indices[-1] + 1}/{len(rows)}")
        return logps

    try:
        logps, read = reference_logps(pass_over, rows, key=key, digests=digests, folder=folder)
    except OSError as error:
        raise ValueError(
            f"the reference cache cannot be kept in {folder} ({error}): set reference.cache_dir"
        ) from error
    job.identity[f"reference.{name}"] = key.name
    say(f"reference log-probs: {len(rows)} rows {'read from' if read else 'written to'} {folder / key.name}")
    return Preferences(rows, logps)
