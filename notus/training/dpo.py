"""DPO: what a step is, and the run around it."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from notus.config import Config, DPOConfig, loss_name
from notus.data.batching import StepPlan
from notus.data.dataset import TokenizedDataset, mismatched
from notus.data.packing import Batch, check_fits
from notus.losses import Shift
from notus.model.policy import Policy
from notus.model.supported import check_context
from notus.runtime.distributed import say, sum_across_ranks
from notus.training.callbacks import COMMAND_LINE, Caller
from notus.training.checkpoint import CONTENT, recorded_content
from notus.training.objective import (
    PROBE_BETA,
    Measured,
    Scored,
    Totals,
    measure_public,
    objective_of,
    ratings_or_order,
)
from notus.training.reference import ReferenceKey, content_digest, digest_of_rows, reference_logps
from notus.training.reference_model import Reference
from notus.training.run_folder import REFERENCE
from notus.training.scoring import score
from notus.training.setup import Run, start
from notus.training.trainer import RowLoss
from notus.training.warnings import since_start

# By how much ln 2 may be missed at step 0: policy and reference differ by rounding alone, but rows are packed
# differently in the reference pass, and matrix products of another shape may round differently. How far that moves a
# log-prob in bf16 depends on the model: by 0.03 nats per square root of its tokens if logits have a standard deviation
# of 3 (simulated), by up to 0.2 for short answers of a model of 135M parameters on a CPU (measured). Four times the
# latter is allowed, so that no sound run stops. A nat of a mean log-ratio moves the mean loss by half of its β. Where
# enough completions show the model's own noise, five standard errors are the limit if that is less.
FIRST_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
_BF16_NOISE = 4 * 0.2
_BF16_SIMULATED_NOISE = 5 * 0.03
_ENOUGH_COMPLETIONS = 16
_DISAGREE = {
    "fp32": "policy and reference log-probs disagree before training. Delete the reference cache. If it happens again, "
    "please report it",
    "bf16": "policy and reference log-probs disagree before training. Delete the reference cache. If it happens again, "
    "set training.precision=fp32: if that run starts, bf16 is too coarse for this model, else please report it",
}


@dataclasses.dataclass
class Preferences:
    """Tokenised rows with what their loss needs beside their tokens.

    Attributes:
        rows: n rows of K completions.
        reference: fp32 [n, K] in nats, the reference's log-probs; None: the loss has no reference.
        public_reference: fp32 [n, 2], the same up to the length of a pair's shorter completion; for LD-DPO.
        ratings: fp32 [n, K], of lists, and where the loss needs them.
        labels: bool [n], which completions are good ones; of labelled completions.
        mismatched: for KTO's KL, each row's prompt with the completion of another one.
    """

    rows: TokenizedDataset
    reference: Tensor | None
    public_reference: Tensor | None = None
    ratings: Tensor | None = None
    labels: Tensor | None = None
    mismatched: "Preferences | None" = None

    def totals(self, indices: np.ndarray) -> Totals:
        """What the rows of a step are divided by."""
        return Totals(len(indices), int(self.rows.loss_tokens[indices, 0].sum()))

    def add_to(self, batch: Batch) -> Batch:
        """Add what the loss needs of a row; of a filler that of any row, since it weighs nothing."""
        return dataclasses.replace(
            batch,
            reference=_at(self.reference, batch.indices),
            public_reference=_at(self.public_reference, batch.indices),
            ratings=_at(self.ratings, batch.indices),
            labels=_at(self.labels, batch.indices),
        )

    def scored(self, indices: np.ndarray, policy: Measured, shifts: Mapping[Shift, Tensor]) -> Scored:
        """These rows with what a forward pass of the policy says of them, on the host."""
        places = torch.from_numpy(indices)
        return Scored(
            policy=policy,
            reference=_at(self.reference, places),
            lengths=torch.from_numpy(self.rows.loss_tokens[indices]),
            weights=torch.ones(len(indices)),
            public_reference=_at(self.public_reference, places),
            ratings=_at(self.ratings, places),
            labels=_at(self.labels, places),
            shifts=shifts,
        )


def _at(values: Tensor | None, places: Tensor) -> Tensor | None:
    return None if values is None else values[places]


class DPOTask:
    """The preference loss on packed rows, against cached reference log-probs if it has a reference."""

    _start_checked = False
    _starts_at_reference = True  # whether the policy is the reference before its first step
    _begun = False  # whether this launch has begun a step
    _first_ratios: Tensor | None = None  # during its first step: `_log_ratio_sums` so far, on the device
    _mismatched_mean: Tensor | None = None  # mean log-ratio of the last mismatched completions, in nats, on the device

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
        starts_at_reference: bool = True,
    ) -> None:
        """Set the task up.

        Args:
            train: what is learned.
            held_out: what it is evaluated on; None: nothing.
            plan: which of its rows each step takes.
            config: the loss.
            precision: "bf16" or "fp32", of the computation.
            tokens_per_row: the most tokens of a packed row.
            device: this rank's.
            starts_at_reference: whether the policy is the reference before its first step.
        """
        self.rows, self.plan = train.rows, plan
        self._train, self._held_out = train, held_out
        self._objective = objective_of(config)
        self._precision, self._tokens_per_row, self._device = precision, tokens_per_row, device
        self._starts_at_reference = starts_at_reference
        self.num_sums, self.guards = self._objective.num_sums, self._objective.guards
        if not starts_at_reference:
            self.guards = tuple(map(since_start, self.guards))
        self._shifts: dict[Shift, Tensor] = {}
        self._beta, self._wpo = config.beta, config.wpo
        self._log_ratios = LogRatioMean(device) if "running_mean" in self._objective.shifts else None

    def prepare(self, batch: Batch) -> Batch:
        """Add what the loss needs of the row."""
        return self._train.add_to(batch)

    def begin_step(self, policy: Policy, step_indices: np.ndarray) -> None:
        """Find what a loss of labels subtracts from all of the step's rows alike; collective."""
        watch = self._objective.reference and not (self._begun or self._start_checked)
        self._first_ratios = torch.zeros((), dtype=torch.float64, device=self._device) if watch else None
        self._begun = True
        self._shifts = self._shifts_of(policy, self._train, step_indices)

    def _shifts_of(
        self, policy: Policy, data: Preferences, indices: np.ndarray, on_row: Callable[[], None] | None = None
    ) -> dict[Shift, Tensor]:
        """What the losses subtract, on the device.

        KTO's KL is the mean log-ratio of these rows' mismatched completions, and at least 0. BCO's shift is the mean
        reward of the steps before, as far as training has come.
        """
        found: dict[Shift, Tensor] = {}
        if self._log_ratios is not None:
            found["running_mean"] = self._beta * self._log_ratios.value()
        if "kl" in self._objective.shifts:
            assert data.mismatched is not None
            self._mismatched_mean = self._mean_log_ratio(policy, data.mismatched, indices, on_row)
            found["kl"] = self._mismatched_mean.clamp(min=0).float()
        return found

    def _mean_log_ratio(
        self, policy: Policy, data: Preferences, indices: np.ndarray, on_row: Callable[[], None] | None
    ) -> Tensor:
        """The mean log-ratio of these rows, fp64 in nats. On the device, so that a step does not wait for it."""
        assert data.reference is not None
        reference = data.reference[torch.from_numpy(indices)]
        if self._device.type == "cuda":
            reference = reference.pin_memory()
        logps = self._score(policy, data.rows, indices, on_row, to_host=False)
        return (logps.double() - reference.to(self._device, non_blocking=True).double()).mean()

    def row_loss(self, policy: Policy, batch: Batch, step_indices: np.ndarray) -> RowLoss:
        """The row's share of: mean loss over the step's examples + nll_weight * mean NLL of its chosen answers."""
        rows = Scored(
            policy=self._objective.measure(policy, batch),
            reference=batch.reference,
            lengths=batch.lengths,
            weights=batch.weights,
            public_reference=batch.public_reference,
            ratings=batch.ratings,
            labels=batch.labels,
            shifts=self._shifts,
        )
        outcome = self._objective(rows, self._train.totals(step_indices))
        if self._first_ratios is not None:
            self._first_ratios = self._first_ratios + _log_ratio_sums(rows)
        if self._log_ratios is not None:
            assert batch.reference is not None
            self._log_ratios.add((rows.policy.logps.detach() - batch.reference)[:, 0], batch.weights)
        return RowLoss(
            loss=(outcome.losses * batch.weights).sum() / len(step_indices),
            sums=self._objective.sums(rows, outcome),
            per_example=outcome.losses.detach(),
        )

    def state(self) -> dict[str, list[float]]:
        """Return what a resumed run needs beside its weights; collective."""
        return {} if self._log_ratios is None else {"log_ratios": self._log_ratios.state()}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Continue from what `state` returned."""
        if self._log_ratios is not None and "log_ratios" in state:  # a branch of a run with another loss has none
            self._log_ratios.load(state["log_ratios"])

    def metrics(self, sums: list[float], seconds: float) -> dict[str, float]:
        """Means over examples, and the speed."""
        metrics = self._objective.metrics(sums)
        if seconds:
            metrics["pairs_per_second"] = self._objective.read(sums).examples / seconds
        return metrics

    def check_first_step(self, sums: list[float]) -> None:
        """Policy and reference are one model at step 0, so the sigmoid loss is ln 2, whichever loss is trained.

        The log-ratios of mismatched completions must be 0 to the same accuracy, and so must those of the chosen, of the
        rejected and of each further completion, because a shift that they share cancels in the loss. Of another
        reference (`reference.model`) nothing is known but that the log-ratios are finite. Collective.

        Raises:
            ValueError: it is not.
        """
        if self._start_checked or not self._objective.reference:
            return
        if not self._starts_at_reference:
            self._report_start()
            return
        total, tolerance = self._objective.read(sums), FIRST_LOSS_TOLERANCE[self._precision]
        found = total.sigmoid_loss / total.examples
        if self._precision == "bf16":
            noise = _BF16_NOISE * math.sqrt(total.noisy_tokens) / total.examples
            tolerance = max(tolerance, 0.5 * PROBE_BETA * noise)
        mismatched = 0.0 if self._mismatched_mean is None else self._mismatched_mean.item()
        # a nat moves the sigmoid loss by half of its β
        if not abs(mismatched) <= tolerance / (0.5 * PROBE_BETA):
            raise ValueError(
                f"at step 0 the mean log-ratio of mismatched completions is {mismatched:.6f}, not 0: policy "
                "and reference log-probs disagree before training. Delete the reference cache"
            )
        if not abs(found - math.log(2)) <= tolerance:
            raise ValueError(
                f"at step 0 the sigmoid loss is {found:.6f}, not ln 2 = {math.log(2):.6f} (tolerance {tolerance:g}): "
                f"{_DISAGREE[self._precision]}"
            )
        if self._first_ratios is not None:
            self._check_log_ratios(sum_across_ranks(self._first_ratios).tolist())
            self._first_ratios = None

    def _report_start(self) -> None:
        """Say how far from another reference the policy starts. Raises ValueError if that is not finite. Collective."""
        assert self._first_ratios is not None
        lengths = self._train.rows.loss_tokens[self.plan.indices(0)]
        sums, self._first_ratios = sum_across_ranks(self._first_ratios).tolist(), None
        mean = sum(sums[: lengths.shape[1]]) / int((lengths > 0).sum())
        if not math.isfinite(mean):
            raise ValueError(
                f"at step 0 the mean log-ratio of policy and reference.model is {mean}: check the weights of both"
            )
        say(
            f"reference.model: at step 0 the policy's log-probs are {mean:+.4g} nats per completion from the "
            "reference's (so the loss is not checked against ln 2)"
        )

    def _check_log_ratios(self, sums: list[float]) -> None:
        """Raise ValueError if a completion's mean log-ratio over the first step is not 0; `sums`: `_log_ratio_sums`."""
        lengths = self._train.rows.loss_tokens[self.plan.indices(0)]
        if self._objective.public:  # the first parts are as long as the shorter completion
            lengths = np.concatenate([lengths, lengths.min(axis=1, keepdims=True).repeat(2, axis=1)], axis=1)
        totals, squares = sums[: lengths.shape[1]], sums[lengths.shape[1] :]
        counts = (lengths > 0).sum(axis=0).tolist()
        columns = zip(totals, squares, lengths.sum(axis=0).tolist(), counts, strict=True)
        for column, (total, square, tokens, count) in enumerate(columns):
            if not count:
                continue
            tolerance = FIRST_LOSS_TOLERANCE[self._precision] / (0.5 * PROBE_BETA)
            if self._precision == "bf16":
                tolerance = max(tolerance, _bf16_tolerance(total, square, tokens, count))
            if not abs(total / count) <= tolerance:
                raise ValueError(
                    f"at step 0 the mean log-ratio of {self._column_name(column)} is {total / count:.6f} nats, not 0 "
                    f"(tolerance {tolerance:.3g}): {_DISAGREE[self._precision]}"
                )

    def _column_name(self, column: int) -> str:
        branches = self._train.rows.num_branches
        if branches == 1:
            return "the completions"
        if branches > 2:
            return f"completion {column + 1} of the lists"
        part = "completions" if column < branches else "completions' first parts"
        return f"the {('chosen', 'rejected')[column % 2]} {part}"

    def check_start(self, policy: Policy) -> None:
        """Make the check of `check_first_step` now, by a pass without dropout; collective.

        Dropout changes what a trained adapter adds: the loss of the first step itself is not ln 2 then.
        """
        if self._objective.reference:
            indices = self.plan.indices(0)
            measured, shifts = self._measured(policy, self._train, indices)
            self.check_first_step(self._sums(self._train, indices, measured, shifts))
            self._check_log_ratios(_log_ratio_sums(self._train.scored(indices, measured, {})).tolist())
        self._start_checked = True

    def evaluate(self, policy: Policy, on_row: Callable[[], None]) -> dict[str, float]:
        """Loss, rewards and log-probs on the held-out rows, under `eval_` names."""
        held_out = self._held_out
        if held_out is None:
            return {}
        everything = np.arange(len(held_out.rows))
        return self._evaluation(self._sums_of(policy, held_out, everything, on_row))

    def evaluate_start(self, policy: Policy, on_row: Callable[[], None]) -> dict[str, float]:
        """The same before the first step: the policy is the reference, so the cached log-probs are its own.

        A pass is needed where there is no reference, or another one than the policy's start, and for WPO, whose weights
        are of the policy's single tokens.
        """
        held_out = self._held_out
        if held_out is None or held_out.reference is None or self._wpo or not self._starts_at_reference:
            return self.evaluate(policy, on_row)
        # no completion's log-ratio has moved: KTO's KL and BCO's mean reward are 0
        shifts = {kind: torch.zeros(()) for kind in self._objective.shifts}
        everything = np.arange(len(held_out.rows))
        measured = Measured(held_out.reference, held_out.public_reference)
        return self._evaluation(self._sums(held_out, everything, measured, shifts))

    def _evaluation(self, sums: list[float]) -> dict[str, float]:
        return {f"eval_{name}": value for name, value in self.metrics(sums, 0.0).items()}

    def _sums_of(
        self, policy: Policy, data: Preferences, indices: np.ndarray, on_row: Callable[[], None] | None = None
    ) -> list[float]:
        """The metric sums of some rows, by a pass without dropout; collective."""
        return self._sums(data, indices, *self._measured(policy, data, indices, on_row))

    def _measured(
        self, policy: Policy, data: Preferences, indices: np.ndarray, on_row: Callable[[], None] | None = None
    ) -> tuple[Measured, dict[Shift, Tensor]]:
        """What a pass without dropout says of some rows, and what their losses subtract, on the host; collective."""
        measured = self._objective.read_table(self._score(policy, data.rows, indices, on_row), data.rows.num_branches)
        return measured, {kind: shift.cpu() for kind, shift in self._shifts_of(policy, data, indices, on_row).items()}

    def _sums(
        self, data: Preferences, indices: np.ndarray, measured: Measured, shifts: Mapping[Shift, Tensor]
    ) -> list[float]:
        """The metric sums of some rows of which a pass has been made."""
        rows = data.scored(indices, measured, shifts)
        found: list[float] = self._objective.sums(rows, self._objective(rows, data.totals(indices))).tolist()
        return found

    def _score(
        self,
        policy: Policy,
        rows: TokenizedDataset,
        indices: np.ndarray,
        on_row: Callable[[], None] | None = None,
        *,
        to_host: bool = True,
    ) -> Tensor:
        """`Objective.measure_table` of some rows; collective."""
        return score(
            policy,
            rows,
            indices,
            tokens_per_row=self._tokens_per_row,
            device=self._device,
            on_row=on_row,
            measure=functools.partial(self._objective.measure_table, policy),
            width=self._objective.table_width(rows.num_branches),
            to_host=to_host,
        )


def _bf16_tolerance(total: float, square: float, tokens: int, count: int) -> float:
    """How far the mean of `count` log-ratios of `tokens` tokens may be from 0 in bf16, in nats; see `_BF16_NOISE`.

    `total` and `square` are the sums of the log-ratios and of their squares.
    """
    limit = _BF16_NOISE * math.sqrt(tokens) / count
    if count < _ENOUGH_COMPLETIONS:
        return limit
    variance = max(0.0, square / count - (total / count) ** 2) / (count - 1)
    return min(limit, max(5 * math.sqrt(variance), _BF16_SIMULATED_NOISE * math.sqrt(tokens) / count))


def _log_ratio_sums(rows: Scored) -> Tensor:
    """Sums over rows of log(policy / reference), then of its squares: fp64 [2 K] on their device.

    With LD-DPO there are 2 more columns of each, of the first parts. A list with fewer than K completions adds 0 beyond
    them; fillers weigh nothing.
    """
    assert rows.reference is not None
    ratios = (rows.policy.logps.detach() - rows.reference).masked_fill(rows.lengths == 0, 0.0)
    if rows.policy.public is not None and rows.public_reference is not None:
        ratios = torch.cat([ratios, rows.policy.public.detach() - rows.public_reference], dim=1)
    ratios = ratios.double()
    return rows.weights.double() @ torch.cat([ratios, ratios.square()], dim=1)


class LogRatioMean:
    """The mean log-ratio of all examples of the steps so far: β times it is what BCO subtracts (2404.04656).

    The paper has half the sum of the means over good and over bad completions; the authors' code has the mean over all
    so far, those of the current micro-batch among them. Here it is the mean over all of the steps before the current
    one, so that it depends neither on ranks nor on how a step is cut into rows. It is kept without β, so that a branch
    of a run may have another one.
    """

    def __init__(self, device: torch.device) -> None:
        # sum and number, fp64: of all ranks, and of this rank since
        self._total = torch.zeros(2, dtype=torch.float64, device=device)
        self._own = torch.zeros_like(self._total)

    def add(self, log_ratios: Tensor, weights: Tensor) -> None:
        """Add the log-ratios of a row, fp32 [E] in nats, those of fillers with weight 0."""
        self._own += torch.stack([log_ratios.double(), torch.ones_like(log_ratios).double()]) @ weights.double()

    def value(self) -> Tensor:
        """Return the mean of what all ranks have added, fp32 in nats; 0 before the first. Collective."""
        self._gather()
        return (self._total[0] / self._total[1].clamp(min=1)).float()

    def state(self) -> list[float]:
        """Return sum and number; collective."""
        self._gather()
        found: list[float] = self._total.tolist()
        return found

    def load(self, state: list[float]) -> None:
        """Continue from what `state` returned."""
        self._total.copy_(torch.tensor(state, dtype=torch.float64))

    def _gather(self) -> None:
        self._total += sum_across_ranks(self._own)
        self._own.zero_()


def run(config: Config, caller: Caller = COMMAND_LINE) -> int:
    """Train with DPO as `config` says: `train_dpo.py`, and `notus.train`.

    Returns:
        The exit code: 0, or `notus.runtime.process.STOPPED` if a signal ended the run before its last step.

    Raises:
        ValueError: a user's mistake, in one line.
    """
    with start(config, caller) as job:
        return 0 if job is None else job.train(build_task(job, config))


def fill_reference(config: Config) -> None:
    """Fill the reference cache of `config` and stop: `python -m notus reference`.

    Raises:
        ValueError: a user's mistake, in one line; also a loss without a reference.
    """
    if not objective_of(config.dpo).reference:
        raise ValueError(f"dpo.loss_type {loss_name(config.dpo)} has no reference: there is nothing to compute")
    with start(config, train=False) as job:
        assert job is not None
        with job.reference() as reference:
            for name, rows in (("train", job.train_rows), ("eval", job.eval_rows)):
                if rows is not None:
                    _preferences(job, config, name, rows, reference)


def build_task(job: Run, config: Config) -> DPOTask:
    """The task of a run: its rows, with the reference log-probs read or computed here; collective.

    Another reference than the policy's start is freed again when this returns.
    """
    objective = objective_of(config.dpo)
    if not objective.reference:
        say(f"dpo.loss_type {loss_name(config.dpo)} has no reference: no reference pass, and no cache")
    if job.named_reference is not None and job.other_reference is None:
        say(f"reference.model: {job.named_reference.name} has the weights that the policy starts with")
    held_out = None
    with job.reference() if objective.reference else contextlib.nullcontext() as reference:
        train = _preferences(job, config, "train", job.train_rows, reference)
        if job.eval_rows is not None:
            held_out = _preferences(job, config, "eval", job.eval_rows, reference)
    for note in objective.notes(train.ratings, train.labels, torch.from_numpy(train.rows.loss_tokens) > 0):
        say(note)
    task = DPOTask(
        train,
        held_out,
        plan=job.plan,
        config=config.dpo,
        precision=config.training.precision,
        tokens_per_row=config.training.tokens_per_row,
        device=job.device,
        starts_at_reference=job.other_reference is None,
    )
    if config.lora.continue_ and config.lora.dropout and job.other_reference is None:
        task.check_start(job.policy)
    return task


def _preferences(
    job: Run, config: Config, name: str, rows: TokenizedDataset, reference: Reference | None
) -> Preferences:
    """Rows of "train" or "eval" with what their loss needs. Raises ValueError if none has another prompt, for KTO.

    `reference` is None for a loss that has none.
    """
    objective = objective_of(config.dpo)
    found = Preferences(rows, None)
    if config.rows == "lists":
        found.ratings = torch.from_numpy(ratings_or_order(rows.ratings, rows.loss_tokens))
    elif objective.ratings:
        assert rows.ratings is not None  # checked when the data were loaded
        found.ratings = torch.from_numpy(rows.ratings)
    if config.rows == "labels":
        assert rows.labels is not None
        found.labels = torch.from_numpy(rows.labels)
    if reference is not None:
        logps = _with_reference(job, config, name, rows, reference)
        found.reference = logps[:, : rows.num_branches]
        found.public_reference = logps[:, rows.num_branches :] if objective.public else None
    if "kl" in objective.shifts:
        try:
            others = mismatched(rows, config.data.max_length)
        except ValueError as error:
            raise ValueError(f"data.{name}: {error}") from error
        check_fits(int(others.lengths.max()), config.training.tokens_per_row)
        check_context(job.model_config, others.longest_sequence, "data.max_length")
        if job.other_reference is not None:
            job.other_reference.check_length(others.longest_sequence)
        assert reference is not None  # every loss with a KL term has one
        logps = _with_reference(job, config, f"{name}, mismatched", others, reference)
        found.mismatched = Preferences(others, logps)
    return found


def _check_content(job: Run, name: str, cache: str, logps: Tensor, folder: Path | None) -> None:
    """Record which log-probs the run learns from; `folder`: where they were read, None if they were computed now.

    Raises:
        ValueError: the checkpoint was made with other log-probs of the same name, so the file and its own digest were
            changed since then. If they were computed again (on another device, say), they may differ by rounding, which
            is only logged.
    """
    found, before = content_digest(logps), recorded_content(job.checkpoints, name, cache)
    if before not in (None, found):
        if folder is not None:
            path = folder / f"{cache}.safetensors"
            raise ValueError(
                f"the reference cache {path} does not hold the log-probs that this run has learned from so far: delete "
                "it to compute them again, or set reference.cache_dir to a folder of this run's own"
            )
        say(f"note: {name} was computed again, and is not bit for bit that of the launch before")
    job.identity[name], job.identity[name + CONTENT] = cache, found


def _with_reference(job: Run, config: Config, name: str, rows: TokenizedDataset, reference: Reference) -> Tensor:
    """The reference's log-probs, fp32 [n, K], from the cache or by a pass of the model.

    With LD-DPO [n, 4]: then those up to the length of each pair's shorter completion.
    """
    digests = rows.digests()
    public = objective_of(config.dpo).public
    key = ReferenceKey(
        weights=reference.weights,
        rows=digest_of_rows(digests),
        precision=config.training.precision,
        kernel=reference.kernel,
        public=public,
    )
    folder = Path(config.reference.cache_dir or Path(config.training.output_dir) / REFERENCE)

    def pass_over(indices: np.ndarray) -> Tensor:
        policy = reference.policy()
        logps = score(
            policy,
            rows,
            indices,
            tokens_per_row=config.training.tokens_per_row,
            device=job.device,
            measure=functools.partial(measure_public, policy) if public else None,
            width=2 * rows.num_branches if public else None,
        )
        if len(indices) < len(rows):
            say(f"reference log-probs: {indices[-1] + 1}/{len(rows)} rows")
        return logps

    try:
        logps, read = reference_logps(pass_over, rows, key=key, digests=digests, folder=folder)
    except OSError as error:
        raise ValueError(
            f"the reference cache cannot be kept in {folder} ({error}): set reference.cache_dir"
        ) from error
    _check_content(job, f"reference.{name}", key.name, logps, folder if read else None)
    done = "read from" if read else "written to"
    say(f"reference log-probs of {name}: {len(rows)} rows {done} {folder / key.name}.safetensors")
    return logps
