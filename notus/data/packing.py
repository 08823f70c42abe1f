"""Examples to packed batches.

`collate` lays the examples of a packed row end to end: `[trunk branch_1 ... branch_K][trunk ...]...`, without padding.
Which examples a packed row holds is decided in `batching`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Example:
    """One trunk and its branches of token ids: up to K of them, where a batch has K.

    Attributes:
        index: the example's row in its dataset; -1 marks a filler that carries no weight.
        trunk: [T] token ids that all branches share.
        branches: arrays [B_k] of token ids.
        loss_masks: an array [B_k] of bool for each: which branch tokens the loss sees.
    """

    index: int
    trunk: np.ndarray
    branches: tuple[np.ndarray, ...]
    loss_masks: tuple[np.ndarray, ...]


def check_fits(longest: int, tokens_per_row: int) -> None:
    """Raises ValueError if an example of `longest` tokens does not fit into a row."""
    if longest > tokens_per_row:
        raise ValueError(
            f"training.tokens_per_row={tokens_per_row} is less than the longest example ({longest} tokens): "
            f"set training.tokens_per_row to at least {longest}, or lower data.max_length"
        )


@dataclasses.dataclass
class Layout:
    """Where the segments of a packed row stand, for prefix-shared attention.

    Segment by segment, queries are the row's own tokens in order and keys are gathered: an example's first
    segment has queries trunk + branch_1 over the same keys; segment k > 1 has queries branch_k over keys
    trunk + branch_k. Both are causal, aligned at the last query and the last key.

    Attributes:
        key_index: [N_kv] row position of every gathered key.
        first_copy: [N] where each token stands in the gather for the first time.
        copies: [2, C] gather positions and row positions of the trunks' further copies: first all second copies, then
            all third ones, and so on. Among those of one number, the row positions are unique.
        copy_lengths: how many of them are second, third, ... copies.
        copy_starts: [len(copy_lengths) + 1] the same, cumulative from 0, as a tensor that stays on the host.
        query_starts, key_starts: [S + 1] int32, cumulative segment lengths (cu_seqlens).
        query_lengths, key_lengths: the same lengths as Python integers, S each.
        lengths: [2 S] both, as a tensor that stays on the host.
        longest_query, longest_key: the largest of them.
    """

    key_index: Tensor
    first_copy: Tensor
    copies: Tensor
    copy_lengths: list[int]
    copy_starts: Tensor
    query_starts: Tensor
    key_starts: Tensor
    query_lengths: list[int]
    key_lengths: list[int]
    lengths: Tensor
    longest_query: int
    longest_key: int

    @property
    def extra_copies(self) -> list[tuple[Tensor, Tensor]]:
        """(gather positions, row positions) of the second, third, ... copies of the trunks."""
        gathered, own = (each.split(self.copy_lengths) for each in self.copies)
        return list(zip(gathered, own, strict=True))

    def to(self, device: torch.device) -> "Layout":
        """The same layout with its tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Layout":
        """The same layout with its tensors changed."""
        return dataclasses.replace(
            self,
            key_index=change(self.key_index),
            first_copy=change(self.first_copy),
            copies=change(self.copies),
            query_starts=change(self.query_starts),
            key_starts=change(self.key_starts),
        )


@dataclasses.dataclass
class Batch:
    """One packed row: N tokens, E examples of up to K branches, M completion tokens.

    Attributes:
        input_ids: [N] token ids.
        position_ids: [N]; each branch starts again at its trunk's length.
        layout: the attention segments.
        sources: [M] row position whose hidden state predicts a completion token.
        targets: [M] the completion token ids, branch by branch.
        lengths: [E, K] completion tokens per branch, 0 for one that the example lacks; they sum to M.
        present: [E, K] bool, which branches there are; the last ones may be missing.
        weights: [E] fp32, 1 for an example and 0 for a filler.
        indices: [E] dataset rows, -1 for a filler.
        reference: [E, K] fp32, the reference's log-probs in nats, where the loss compares with them.
        public_reference: [E, K] fp32, the same, summed over a pair's common length alone (LD-DPO).
        ratings: [E, K] fp32, how good the completions are, where the loss needs it; NaN: not known, or no completion.
        labels: [E] bool, whether an example's completion is a good one, where the data say so.
        places: where the row's results belong among those of a whole pass, where there is one; None for a filler.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout
    sources: Tensor
    targets: Tensor
    lengths: Tensor
    present: Tensor
    weights: Tensor
    indices: Tensor
    reference: Tensor | None = None
    public_reference: Tensor | None = None
    ratings: Tensor | None = None
    labels: Tensor | None = None
    places: Tensor | None = None

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, from which a copy to a GPU waits for nothing."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; the dataset rows stay on the host. From `pin`ned memory it does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        indices, layout = fields.pop("indices"), fields.pop("layout")
        changed: dict[str, Any] = {name: None if tensor is None else change(tensor) for name, tensor in fields.items()}
        return Batch(**changed, indices=indices, layout=layout.map(change))


def filler(num_branches: int) -> Example:
    """A two-to-five token example of weight 0 that keeps a rank without work in step with the others."""
    one = np.zeros(1, dtype=np.int64)
    return Example(-1, one, (one,) * num_branches, (np.ones(1, dtype=bool),) * num_branches)


def collate(examples: Sequence[Example], num_branches: int) -> Batch:
    """Pack the examples of one row.

    Args:
        examples: the row's examples, each with 1 to `num_branches` branches; none for an empty row.
        num_branches: K.

    Returns:
        A Batch on the host.
    """
    examples = list(examples) or [filler(num_branches)]
    assert all(1 <= len(example.branches) <= num_branches for example in examples)
    tokens, positions, sources, targets, lengths = [], [], [], [], []
    offset = 0
    for example in examples:
        tokens.extend([example.trunk, *example.branches])
        trunk_length = len(example.trunk)
        positions.append(np.arange(trunk_length))
        start = offset + trunk_length
        for branch, mask in zip(example.branches, example.loss_masks, strict=True):
            positions.append(np.arange(trunk_length, trunk_length + len(branch)))
            learned = np.flatnonzero(mask)
            if trunk_length == 0:
                learned = learned[learned > 0]  # nothing stands before the first token to predict it
            before = start + learned - 1
            before[learned == 0] = offset + trunk_length - 1
            sources.append(before)
            targets.append(branch[learned])
            lengths.append(len(learned))
            start += len(branch)
        lengths.extend([0] * (num_branches - len(example.branches)))
        offset = start
    counts = torch.tensor([len(example.branches) for example in examples])
    return Batch(
        input_ids=_join(tokens),
        position_ids=_join(positions),
        layout=build_layout(
            [len(example.trunk) for example in examples],
            [[len(branch) for branch in example.branches] for example in examples],
        ),
        sources=_join(sources),
        targets=_join(targets),
        lengths=torch.tensor(lengths, dtype=torch.int64).view(len(examples), num_branches),
        present=torch.arange(num_branches) < counts[:, None],
        weights=torch.tensor([float(example.index >= 0) for example in examples]),
        indices=torch.tensor([example.index for example in examples]),
    )


def _join(parts: Sequence[np.ndarray], axis: int = 0) -> Tensor:
    return torch.from_numpy(np.concatenate(parts, axis=axis).astype(np.int64, copy=False))


def build_layout(trunks: Sequence[int], branches: Sequence[Sequence[int]]) -> Layout:
    """The attention layout of a row.

    Args:
        trunks: trunk length of each example.
        branches: branch lengths of each example; their number may differ.
    """
    key_index, query_lengths, key_lengths = [], [], []
    first_copy: list[np.ndarray] = []
    copies: list[list[np.ndarray]] = [[] for _ in max(branches, key=len)[1:]]
    row, gathered = 0, 0
    for trunk, parts in zip(trunks, branches, strict=True):
        shared = np.arange(row, row + trunk)
        for number, length in enumerate(parts):
            own = np.arange(row + trunk, row + trunk + length)
            key_index.extend([shared, own])
            if number == 0:
                first_copy.append(np.arange(gathered, gathered + trunk))
            else:
                copies[number - 1].append(np.stack([np.arange(gathered, gathered + trunk), shared]))
            first_copy.append(np.arange(gathered + trunk, gathered + trunk + length))
            query_lengths.append(length + trunk * (number == 0))
            key_lengths.append(trunk + length)
            gathered += trunk + length
            row += length
        row += trunk
    copy_lengths = [sum(part.shape[1] for part in parts) for parts in copies]
    return Layout(
        key_index=_join(key_index),
        first_copy=_join(first_copy),
        copies=_join([part for parts in copies for part in parts] or [np.empty((2, 0))], axis=1),
        copy_lengths=copy_lengths,
        copy_starts=torch.tensor([0, *np.cumsum(copy_lengths)], dtype=torch.int64),
        query_starts=_starts(query_lengths),
        key_starts=_starts(key_lengths),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        lengths=torch.tensor([*query_lengths, *key_lengths]),
        longest_query=max(query_lengths),
        longest_key=max(key_lengths),
    )


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
