"""Completion log-probs of a whole dataset: the reference pass, evaluation on held-out pairs, `notus evaluate`.

The same forward, kernels and precision as training, so that at step 0 policy and reference agree.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from notus.data.batching import step_rows
from notus.data.dataset import TokenizedDataset
from notus.data.packing import Batch
from notus.model.policy import Policy
from notus.runtime.distributed import rank, sum_across_ranks, world_size
from notus.training.dataloader import prefetched, row_costs
from notus.training.parallelize import reshard


@torch.no_grad()
def score(
    policy: Policy,
    rows: TokenizedDataset,
    indices: np.ndarray,
    *,
    tokens_per_row: int,
    device: torch.device,
    on_row: Callable[[], None] | None = None,
    measure: Callable[[Batch], Tensor] | None = None,
    width: int | None = None,
    to_host: bool = True,
) -> Tensor:
    """Score some rows of a dataset; collective, every rank takes a share and gets the whole.

    Args:
        policy: evaluated without dropout.
        rows: the tokenised dataset.
        indices: int64 [n], which rows.
        tokens_per_row: the most tokens of a packed row.
        device: where the policy computes.
        on_row: called before each packed row, of which every rank has the same number; what it raises ends the pass.
        measure: what to find of a packed row by the policy, fp32 [E, `width`]; None: `policy(batch)`.
        width: its columns; None: K.
        to_host: wait for the device and return the result on the host; False: leave it on the device.

    Returns:
        fp32 [n, K]: the sum of each completion's log-probs, in nats, in the order of `indices`; or
        [n, `width`], what `measure` finds.
    """
    place = {int(index): position for position, index in enumerate(indices)}
    found = torch.zeros(len(indices), width or rows.num_branches, dtype=torch.float32, device=device)

    def keep(batch: Batch) -> None:
        columns = policy(batch) if measure is None else measure(batch)
        if batch.places is not None:
            found.index_copy_(0, batch.places, columns)

    def places(row: list[int]) -> np.ndarray:
        return np.array([place[index] for index in row])

    _pass(policy, rows, indices, keep, places, tokens_per_row=tokens_per_row, device=device, on_row=on_row)
    total = sum_across_ranks(found)
    return total.cpu() if to_host else total


@torch.no_grad()
def score_tokens(policy: Policy, rows: TokenizedDataset, *, tokens_per_row: int, device: torch.device) -> Tensor:
    """Score a whole dataset token by token; collective, every rank takes a share and gets the whole.

    Arguments as in `score`. Returns fp32 [rows.loss_tokens.sum()] on the host: the log-prob of every completion token,
    in nats, row by row and branch by branch.
    """
    starts = np.cumsum([0, *rows.loss_tokens.sum(axis=1)])
    found = torch.zeros(int(starts[-1]), dtype=torch.float32, device=device)

    def keep(batch: Batch) -> None:
        logps = policy.token_logprobs(batch)
        if batch.places is not None:
            found.index_copy_(0, batch.places, logps)

    def places(row: list[int]) -> np.ndarray:
        return np.concatenate([np.arange(starts[index], starts[index + 1]) for index in row])

    _pass(policy, rows, np.arange(len(rows)), keep, places, tokens_per_row=tokens_per_row, device=device)
    return sum_across_ranks(found).cpu()


def _pass(
    policy: Policy,
    rows: TokenizedDataset,
    indices: np.ndarray,
    keep: Callable[[Batch], None],
    places: Callable[[list[int]], np.ndarray],
    *,
    tokens_per_row: int,
    device: torch.device,
    on_row: Callable[[], None] | None = None,
) -> None:
    """Hand each of this rank's packed rows, on the device, to `keep`, which computes with the policy.

    `places` says where the results of a row belong, given its dataset rows. It runs on the thread that makes the rows.
    """
    was_training = policy.training
    policy.eval()
    share = step_rows(
        rows,
        indices,
        rank=rank(),
        world_size=world_size(),
        tokens_per_row=tokens_per_row,
        costs=row_costs(policy, rows, indices),
    )
    try:
        with prefetched((_placed(batch, places) for batch in share), device) as batches:
            for batch in batches:
                if on_row is not None:
                    on_row()
                keep(batch.to(device))
    finally:
        reshard(policy)
        policy.train(was_training)


def _placed(batch: Batch, places: Callable[[list[int]], np.ndarray]) -> Batch:
    row = batch.indices.tolist()
    return batch if row[0] < 0 else dataclasses.replace(batch, places=torch.from_numpy(places(row)))


def score_all(
    policy: Policy,
    rows: TokenizedDataset,
    *,
    tokens_per_row: int,
    device: torch.device,
    part_size: int = 2048,
    on_part: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Score a whole dataset part by part; `on_part(done, total)` is called after each. fp32 [n, K]."""
    parts = []
    for start in range(0, len(rows), part_size):
        indices = np.arange(start, min(start + part_size, len(rows)))
        parts.append(score(policy, rows, indices, tokens_per_row=tokens_per_row, device=device))
        if on_part is not None:
            on_part(int(indices[-1]) + 1, len(rows))
    return torch.cat(parts)
