"""An export is read again before it is published: each rank compares its own rows, rank 0 loads the rest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from notus.model.shards import is_rank_zero, local_rows
from notus.runtime.process import first_line


def check_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Compare a safetensors file with what it was written from, bit by bit; each rank reads its own rows alone.

    Args:
        path: the file.
        tensors: name -> plain tensor, or DTensor sharded on dim 0 or replicated: all that the file must hold.
        dtype: what floating-point tensors were cast to.

    Raises:
        ValueError: naming the file, and the tensor that differs.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            differing = sorted(set(handle.keys()) ^ set(tensors))
            differing += (
                [] if differing else [n for n, t in tensors.items() if not _same(t, handle.get_slice(n), dtype)]
            )
    except (SafetensorError, OSError) as error:
        raise not_as_written(path, f"it cannot be read ({error})") from error
    if differing:
        raise not_as_written(path, differing[0])


@torch.no_grad()
def _same(tensor: Tensor, source: Any, dtype: torch.dtype) -> bool:
    """Whether this rank's rows of a safetensors slice are those of `tensor`, to the bit."""
    if list(source.get_shape()) != list(tensor.shape):
        return False
    start, stop = local_rows(tensor) if tensor.dim() else (0, 1)
    if start == stop:
        return True
    mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    expected = (mine.to(dtype) if mine.is_floating_point() else mine).cpu()
    found = source[start:stop] if tensor.dim() else source[...]
    # As bytes, since not-a-number is unequal to itself, and -0.0 equal to 0.0.
    return found.dtype == expected.dtype and torch.equal(_bytes(found), _bytes(expected))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def check_loads(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None = None) -> None:
    """Load what goes with the weights, on rank 0; raises ValueError, naming the file, if that fails.

    Their own classes load them, so that no code that comes with a model has to be trusted once more.
    """
    if not is_rank_zero():
        return
    if config is not None:
        again = _load(folder, config)
        if (again.model_type, again.vocab_size) != (config.model_type, config.vocab_size):
            raise not_as_written(folder / "config.json", "model_type or vocab_size")
    if len(_load(folder, tokenizer)) != len(tokenizer):
        raise not_as_written(folder / "tokenizer.json", "the vocabulary")


def _load(folder: Path, like: Any) -> Any:
    try:
        return type(like).from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise errors of every kind for damaged files
        reason = first_line(error)
        raise not_as_written(folder, f"{type(like).__name__} cannot load it ({reason})") from error


def not_as_written(path: Path, what: str) -> ValueError:
    """What to raise where `what` in `path` differs from what was written there."""
    return ValueError(
        f"{path}: read again after writing, it is not what was written: {what}. Nothing was put in place; look at the "
        "disk, and run the same command again"
    )
