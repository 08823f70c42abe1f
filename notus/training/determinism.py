"""Runs that repeat bit for bit, on the same machine with the same number of ranks."""

import contextlib
import os
from collections.abc import Iterator

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within, operations repeat bit for bit, and one that cannot raises RuntimeError; enter it before CUDA starts.

    cuBLAS reads how much workspace its kernels may take, which decides their order of summation, when it starts.
    Nothing is changed if not `wanted`, and all is as before afterwards.
    """
    if not wanted:
        yield
        return
    workspace = os.environ.get(_WORKSPACE)
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.flags(deterministic=True, benchmark=False)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        with cudnn:
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        if workspace is None:
            del os.environ[_WORKSPACE]
