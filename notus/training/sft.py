"""Supervised fine-tuning: what a step is, and the run around it."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from notus.config import Config
from notus.data.batching import StepPlan
from notus.data.dataset import TokenizedDataset
from notus.data.packing import Batch
from notus.losses import nll_loss
from notus.model.policy import Policy
from notus.training.callbacks import COMMAND_LINE, Caller
from notus.training.scoring import score
from notus.training.setup import start
from notus.training.trainer import RowLoss
from notus.training.warnings import Guard


class SFTTask:
    """Next-token loss on completion tokens, averaged over the tokens of the whole step."""

    num_sums = 3
    guards: tuple[Guard, ...] = ()

    def __init__(
        self,
        train: TokenizedDataset,
        held_out: TokenizedDataset | None,
        *,
        plan: StepPlan,
        tokens_per_row: int,
        device: torch.device,
    ) -> None:
        self.rows, self.plan = train, plan
        self._held_out, self._tokens_per_row, self._device = held_out, tokens_per_row, device

    def prepare(self, batch: Batch) -> Batch:
        """Add nothing: the loss needs the row alone."""
        return batch

    def begin_step(self, policy: Policy, step_indices: np.ndarray) -> None:
        """Do nothing: every row is learned by itself."""

    def row_loss(self, policy: Policy, batch: Batch, step_indices: np.ndarray) -> RowLoss:
        """The row's share of the mean negative log-likelihood over the step's loss tokens, in nats."""
        logps, weights, lengths = policy(batch), batch.weights, batch.lengths
        nll = nll_loss(logps[:, 0], int(self.rows.loss_tokens[step_indices].sum()))
        per_example = -logps[:, 0].detach()
        columns = torch.stack([per_example.double(), lengths[:, 0].double(), torch.ones_like(per_example).double()])
        return RowLoss(loss=(nll * weights).sum(), sums=columns @ weights.double(), per_example=per_example)

    def state(self) -> dict[str, list[float]]:
        """Return nothing: there is nothing but the weights."""
        return {}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Do nothing; see `state`."""

    def metrics(self, sums: list[float], seconds: float) -> dict[str, float]:
        """Mean loss per token, and the speed."""
        metrics = {"loss": sums[0] / sums[1]}
        if seconds:
            metrics["examples_per_second"] = sums[2] / seconds
        return metrics

    def check_first_step(self, sums: list[float]) -> None:
        """Nothing is known of SFT's first loss."""

    def evaluate(self, policy: Policy, on_row: Callable[[], None]) -> dict[str, float]:
        """Mean loss per token on held-out rows."""
        if self._held_out is None:
            return {}
        everything = np.arange(len(self._held_out))
        logps = score(
            policy,
            self._held_out,
            everything,
            tokens_per_row=self._tokens_per_row,
            device=self._device,
            on_row=on_row,
        )
        return {"eval_loss": -logps.double().sum().item() / int(self._held_out.loss_tokens.sum())}

    def evaluate_start(self, policy: Policy, on_row: Callable[[], None]) -> dict[str, float]:
        """The same before the first step: nothing is known of the model without a pass."""
        return self.evaluate(policy, on_row)


def run(config: Config, caller: Caller = COMMAND_LINE) -> int:
    """Fine-tune as `config` says: `train_sft.py`, and `notus.train`.

    Returns:
        The exit code: 0, or `notus.runtime.process.STOPPED` if a signal ended the run before its last step.

    Raises:
        ValueError: a user's mistake, in one line.
    """
    with start(config, caller) as job:
        if job is None:
            return 0
        task = SFTTask(
            job.train_rows,
            job.eval_rows,
            plan=job.plan,
            tokens_per_row=config.training.tokens_per_row,
            device=job.device,
        )
        return job.train(task)
