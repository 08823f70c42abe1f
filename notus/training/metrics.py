"""What the steps take of the machines: tokens and necessary operations per second, and memory."""

import dataclasses
import resource
import sys
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from notus.data.dataset import Rows
from notus.data.schedule import StepPlan
from notus.model.flops import dimensions, gpu_of_driver, training_flops
from notus.model.policy import Policy
from notus.runtime.distributed import world_size


def peak_rate(device: torch.device, precision: str) -> float | None:
    """Operations per second of a rank's device by its data sheet, in "bf16" or "fp32"; None if it is not known."""
    gpu = gpu_of_driver(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.rate(precision) * 1e12 if gpu else None


class Meter:
    """Figures under `system/`, over some steps at a time."""

    def __init__(self, policy: Policy, rows: Rows, plan: StepPlan, *, device: torch.device, precision: str) -> None:
        """Measure a run of `policy` on the steps that `plan` makes of `rows`, computing in "bf16" or "fp32"."""
        self._rows, self._plan, self._device = rows, plan, device
        self._peak = peak_rate(device, precision)
        self._costs = _step_costs(policy, rows) if self._peak else None

    def memory(self) -> float:
        """GiB that this rank has needed at most so far: allocated on its GPU, or else of the host's memory."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        unit = 1 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def figures(self, steps: range, seconds: float, memory: float) -> dict[str, float]:
        """Metrics of some steps that took so many seconds, and of the ranks' largest `memory` in GiB."""
        where = "gpu" if self._device.type == "cuda" else "host"
        found = {f"system/{where}_memory_gib": memory}
        if not (steps and seconds):
            return found
        indices = np.concatenate([self._plan.indices(step) for step in steps])
        found["system/tokens_per_second"] = self._rows.lengths[indices].sum() / seconds
        if self._peak and self._costs is not None:
            found["system/mfu"] = self._costs[indices].sum() / seconds / self._peak / world_size()
        return {name: float(value) for name, value in found.items()}


def _step_costs(policy: Policy, rows: Rows) -> np.ndarray:
    """Necessary operations of a forward and backward pass, for each example."""
    trained = [parameter.numel() for parameter in policy.parameters() if parameter.requires_grad]
    frozen = len(trained) < len(list(policy.parameters()))
    return training_flops(
        dimensions(policy.causal_lm),
        rows.trunk_lengths,
        rows.branch_lengths,
        rows.loss_tokens.sum(axis=1),
        adapter_weights=sum(trained) if frozen else None,
    )


@dataclasses.dataclass(frozen=True)
class Guard:
    """Watches one metric.

    Attributes:
        metric: its name in a line of metrics.
        trips: whether a value is out of bounds.
        meaning: what that says of the run, and what to change.
    """

    metric: str
    trips: Callable[[float], bool]
    meaning: str


# Beyond 20 the logistic function is within 2.1e-9 of its end: pairs on the right side have a gradient that fp32 sums
# lose beside any other's, and on the wrong side the policy has run away from the reference.
MARGIN_LIMIT = 20.0
# Losses that average over tokens aim at margins per token; the sum over a long completion passes 20 by design.
SUMMED_MARGINS = Guard(
    "rewards/margins",
    lambda margin: abs(margin) > MARGIN_LIMIT,
    f"is beyond {MARGIN_LIMIT:g} either way: the sigmoid is saturated, and where the margin is positive its gradient "
    "is below 2.1e-9 and teaches nothing more. Lower training.learning_rate, train fewer epochs, or take a loss with a "
    "bounded target (dpo.loss_type=ipo)",
)
# One nat per token: every token of the preferred answers has become e times less likely, on average.
CHANGE_LIMIT = -1.0
CHOSEN_CHANGE = Guard(
    "logps/chosen_change",
    lambda change: change < CHANGE_LIMIT,
    f"is below {CHANGE_LIMIT:g} nat per token: the chosen answers have become e times less likely at every token than "
    "under the reference. Lower training.learning_rate, raise dpo.beta, or set dpo.nll_weight",
)


class Guards:
    """Tells of each guard once per run."""

    def __init__(self, guards: Iterable[Guard]) -> None:
        self._armed = list(guards)

    def check(self, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that a line of metrics gives cause for, each naming its metric."""
        tripped = [guard for guard in self._armed if guard.metric in metrics and guard.trips(metrics[guard.metric])]
        self._armed = [guard for guard in self._armed if guard not in tripped]
        return [f"warning: {guard.metric} = {metrics[guard.metric]:.3g} {guard.meaning}" for guard in tripped]
