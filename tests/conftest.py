import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# torchao says on import what it cannot load and what it deprecates. pytest would print it behind its last line.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

import pytest
import torch
from runs import write_pairs
from toys import toy_model_folder

from notus.model import fused, quantization
from notus.model.kernels import Kernel
from notus.runtime import switches
from notus.runtime.distributed import process_group
from notus.training import optimizers


@pytest.fixture
def device() -> Iterator[torch.device]:
    """A process group of one rank."""
    with process_group() as found:
        yield found


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """Have every kernel used on the CPU too, compiled by a backend that runs the graph as it is."""
    kernels = [each for each in vars(fused).values() if isinstance(each, Kernel)]
    kernels += [optimizers.RMSprop.kernel, optimizers.AdamW.kernel, quantization.DEQUANTIZE]
    on = switches.enabled
    torch._dynamo.reset()
    monkeypatch.setattr(Kernel, "usable", lambda self, _: self.failure is None and on(self._switch))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for kernel in kernels:
        vars(kernel).pop("_compiled", None)
    yield
    for kernel in kernels:
        vars(kernel).pop("_compiled", None)
        kernel.failure = None


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of benchmarks, whose modules can be imported."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 18)
