"""Special tokens that a run adds, and the rows that the embedding and the head get for them.

A new row starts as the mean of the old ones, as transformers' `resize_token_embeddings` has it, but without a random
part: every rank, and every launch, must start from the same model.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from notus.model.make import make_model
from notus.model.structure import text_config

_CHUNK = 8192  # rows that are read at a time to take their mean


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add special tokens to a tokenizer, in place, and return their ids.

    Raises:
        ValueError: a token is there already, or is given twice; or the tokenizer has no id of its own for it.
    """
    known = tokenizer.get_vocab()
    for number, token in enumerate(tokens):
        if token in known:
            raise ValueError(f"data.new_tokens: {token!r} is in the tokenizer already: remove it")
        if token in tokens[:number]:
            raise ValueError(f"data.new_tokens: {token!r} is given twice: remove one")
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    if added:
        tokenizer.add_tokens(added, special_tokens=True)
    ids = [int(tokenizer.get_vocab()[token]) for token in tokens]
    taken = set(ids) & set(known.values())
    if taken:
        raise ValueError(f"data.new_tokens: the tokenizer gives id {min(taken)} to two tokens; take another tokenizer")
    return ids


def enlarge(config: PreTrainedConfig, rows: int) -> int:
    """Let a model's configuration have at least so many rows; return how many it got beyond those that it had.

    A vocabulary that is padded already, and so has room for the new ids, stays as it is.
    """
    text = text_config(config)
    added = max(0, rows - int(text.vocab_size))
    text.vocab_size += added
    return added


def vocabulary_parameters(causal_lm: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters with a row for each token: the embedding's, and the head's if it is not the same."""
    modules: list[Any] = [causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()]
    found = [parameter for module in modules if module is not None for parameter in module.parameters()]
    return list(dict.fromkeys(found))


def check_saved_vocabulary(
    config: PreTrainedConfig, modules_to_save: Sequence[str], *, trust_remote_code: bool = False
) -> None:
    """Raise ValueError unless `lora.modules_to_save` has the embedding and the head train: new tokens are new rows.

    Where they are tied, one of the two is enough.
    """
    with torch.device("meta"):
        causal_lm = make_model(
            config, trust_remote_code=trust_remote_code, attn_implementation=None, dtype=torch.float32
        )
    names: dict[int, list[str]] = {}
    for parameter in vocabulary_parameters(causal_lm):
        named = causal_lm.named_parameters(remove_duplicate=False)
        names[id(parameter)] = [name.rpartition(".")[0] for name, each in named if each is parameter]
    missing = [
        alike[0].rpartition(".")[2]
        for alike in names.values()
        if not any(f".{name}".endswith(f".{wanted}") for name in alike for wanted in modules_to_save)
    ]
    if missing:
        wanted = ", ".join([*modules_to_save, *dict.fromkeys(missing)])
        raise ValueError(
            f"data.new_tokens: with LoRA the rows of new tokens would stay as they start: set "
            f"lora.modules_to_save=[{wanted}]"
        )


class Rows:
    """A safetensors slice, or a tensor, followed by rows that are the mean of its own.

    It can be sliced like what it stands for.
    """

    def __init__(self, source: Any, rows: int) -> None:
        """`source` has fewer than `rows` rows, the rows of the whole."""
        self._source = source
        self._shape = list(source.get_shape() if hasattr(source, "get_shape") else source.shape)
        self._rows = rows
        self._mean: Tensor | None = None

    def get_shape(self) -> list[int]:
        """Return the shape with the new rows."""
        return [self._rows, *self._shape[1:]]

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows [start, stop), in order."""
        start, stop = rows.start or 0, self._rows if rows.stop is None else min(rows.stop, self._rows)
        old = self._shape[0]
        kept = self._source[min(start, old) : min(stop, old)]
        new = stop - max(start, old)
        if new <= 0:
            return kept
        mean = self.mean().to(kept.dtype)
        return torch.cat([kept, mean.expand(new, *mean.shape)])

    def mean(self) -> Tensor:
        """Return the mean of the old rows, summed in fp64, so that the order of summation does not matter."""
        if self._mean is None:
            old = self._shape[0]
            total = torch.zeros(self._shape[1:], dtype=torch.float64)
            for start in range(0, old, _CHUNK):
                total += self._source[start : min(start + _CHUNK, old)].double().cpu().sum(0)
            self._mean = total / old
        return self._mean


def new_rows_overlay(causal_lm: PreTrainedModel, new_rows: int) -> dict[int, Callable[[Any], Any]]:
    """Return what `load_weights` lays over a base's embedding and head, which lack so many rows of the model's."""
    if not new_rows:
        return {}
    found = {id(parameter): parameter.shape[0] for parameter in vocabulary_parameters(causal_lm)}
    return {parameter: functools.partial(_grown, rows, new_rows) for parameter, rows in found.items()}


def _grown(rows: int, new_rows: int, source: Any) -> Any:
    """A source with its new rows; one of another length stays as it is, for whoever checks shapes."""
    return Rows(source, rows) if source.get_shape()[0] == rows - new_rows else source


def vocabulary_rows(causal_lm: PreTrainedModel) -> int:
    """Return how many token ids a model's embedding has rows for."""
    embedding = causal_lm.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    return int(embedding.shape[0])


@torch.no_grad()
def grow(causal_lm: PreTrainedModel, rows: int) -> None:
    """Give an unsharded model at least so many rows, in place; the new ones are the mean of the old ones."""
    if rows <= vocabulary_rows(causal_lm):
        return
    whole = [Rows(parameter.clone(), rows)[0:rows] for parameter in vocabulary_parameters(causal_lm)]
    causal_lm.resize_token_embeddings(rows, mean_resizing=False)
    for parameter, values in zip(vocabulary_parameters(causal_lm), whole, strict=True):
        parameter.copy_(values)
