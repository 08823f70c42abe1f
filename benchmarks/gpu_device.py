"""The device: what it is, what it could do by its data sheet, and what it does when it does nothing else."""

import datetime
import importlib.metadata
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig

from notus.model.flops import gpu_of_driver

_SECONDS_PER_PRODUCT = 0.1
_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "trl", "liger-kernel")


def peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of the device of this name by its data sheet; None if there is none like it."""
    gpu = gpu_of_driver(name)
    return gpu.teraflops * 1e12 if gpu else None


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, date and commit."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
    }
    if device.type == "cpu":
        return {"device": f"CPU, {torch.get_num_threads()} threads", **found}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "power_limit": _output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "peak_bf16_flops_per_second": peak(properties.name),
        **found,
    }


def _output(*command: str) -> str | None:
    """The first line that a command prints; None where there is no such command, or it fails."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def matmul_rate(config: MistralConfig, tokens: int, device: torch.device) -> float:
    """FLOP/s of the three products of each linear layer of a block, in bf16, each alone at its fastest."""
    hidden, mlp, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = Counter([(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)])
    shapes.update([(mlp, hidden), (mlp, hidden), (hidden, mlp)])
    seconds = sum(count * _layer_seconds(shape, tokens, device) for shape, count in shapes.items())
    return sum(count * 6 * tokens * shape[0] * shape[1] for shape, count in shapes.items()) / seconds


def _layer_seconds(shape: tuple[int, int], tokens: int, device: torch.device) -> float:
    sizes = (shape, (tokens, shape[1]), (tokens, shape[0]))
    weight, inputs, gradient = (torch.randn(size, dtype=torch.bfloat16, device=device) for size in sizes)
    products = (lambda: inputs @ weight.T, lambda: gradient @ weight, lambda: gradient.T @ inputs)
    return sum(_fastest(product, device) for product in products)


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _fastest(lambda: target.copy_(source), device)


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call, after one to warm up."""
    best, end = float("inf"), time.perf_counter() + _SECONDS_PER_PRODUCT
    call()
    while time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
