"""The device that this process uses, and its peak memory: the resident set as Linux counts it, or allocated on CUDA."""

from pathlib import Path

import torch

_MIB = 2**20


def describe_machine() -> str:
    """Device, threads and version of torch."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}"


class PeakMemory:
    """Counts from its creation on; create it after the imports."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.baseline_mib = 0.0
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
            self.baseline_mib = _status("VmRSS")

    def peak_mib(self) -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / _MIB
        return _status("VmHWM")


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
