"""Throughput and memory of a run: tokens per second, MFU, peak memory, under `system/` in the metrics."""

import resource
import sys

import numpy as np
import torch

from notus.data.batching import StepPlan
from notus.data.dataset import TokenizedDataset
from notus.model.flops import dimensions, gpu_of_driver, training_flops
from notus.model.new_tokens import vocabulary_parameters
from notus.model.policy import Policy
from notus.runtime.distributed import world_size


def peak_rate(device: torch.device, precision: str) -> float | None:
    """Operations per second of a rank's device by its data sheet, in "bf16" or "fp32"; None if it is not known."""
    gpu = gpu_of_driver(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.rate(precision) * 1e12 if gpu else None


class Meter:
    """Figures under `system/`, over some steps at a time."""

    def __init__(
        self, policy: Policy, rows: TokenizedDataset, plan: StepPlan, *, device: torch.device, precision: str
    ) -> None:
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


def _step_costs(policy: Policy, rows: TokenizedDataset) -> np.ndarray:
    """Necessary operations of a forward and backward pass, for each example."""
    everything = list(policy.parameters())
    frozen = not all(parameter.requires_grad for parameter in everything)
    # An embedding that is trained beside adapters takes no products, and a head some for scored tokens alone.
    left_out = {id(parameter) for parameter in vocabulary_parameters(policy.causal_lm)}
    trained = [each.numel() for each in everything if each.requires_grad and id(each) not in left_out]
    return training_flops(
        dimensions(policy.causal_lm),
        rows.trunk_lengths,
        rows.branch_lengths,
        rows.loss_tokens.sum(axis=1),
        adapter_weights=sum(trained) if frozen else None,
    )
