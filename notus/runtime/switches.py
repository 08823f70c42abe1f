"""Optimisations that can be switched off. Each one has a plain twin that computes the same, to rounding.

Two uses: to compare both sides in one run (`benchmarks/gpu.py --without NAME`), and to keep training where a new kernel
fails on some machine:

    NOTUS_DISABLE=fused_elementwise,fused_optimizer python train_dpo.py CONFIG.yaml
"""

import contextlib
import functools
import os
from collections.abc import Iterator

OPTIMISATIONS = {
    "fused_elementwise": "SwiGLU, residual + norm, rotary embeddings: one function each (on CUDA one kernel each)",
    "fused_optimizer": "the update in one pass over the weights, with the clipping factor folded in",
    "fp32_addmm": "the head's weight gradient is accumulated in fp32 by the matrix product itself (CUDA)",
    "gradient_handover": "a lone rank takes its gradients from FSDP without copies",
    "graph_attention": "compiled blocks see the attention kernel itself, in place of an operator that hides it (CUDA)",
    "attention_variants": "attention with soft caps or sinks by one kernel, in place of one pass per segment (CUDA)",
}
VARIABLE = "NOTUS_DISABLE"

_disabled: frozenset[str] | None = None  # None: what the environment says


def enabled(name: str) -> bool:
    """Return whether the optimisation `name` is on.

    Raises:
        ValueError: the environment variable names an optimisation that does not exist.
    """
    assert name in OPTIMISATIONS, name
    return name not in disabled_names()


def disabled_names() -> frozenset[str]:
    """Return the names of all optimisations that are off.

    Raises:
        ValueError: the environment variable names an optimisation that does not exist.
    """
    if _disabled is not None:
        return _disabled
    return _parse(os.environ.get(VARIABLE, ""))


@contextlib.contextmanager
def disabled(*names: str) -> Iterator[None]:
    """Switch off exactly these optimisations within the context, whatever the environment says."""
    global _disabled
    _check(frozenset(names))
    before, _disabled = _disabled, frozenset(names)
    try:
        yield
    finally:
        _disabled = before


@functools.lru_cache
def _parse(text: str) -> frozenset[str]:
    names = frozenset(filter(None, (word.strip() for word in text.split(","))))
    _check(names)
    return names


def _check(names: frozenset[str]) -> None:
    unknown = sorted(names - OPTIMISATIONS.keys())
    if unknown:
        known = ", ".join(OPTIMISATIONS)
        raise ValueError(
            f"{VARIABLE}: there is no optimisation {unknown[0]!r}; commas separate names, choose from {known}"
        )
