"""Completion log-probs of a whole dataset: the reference pass, evaluation on held-out pairs, `notus evaluate`.

The same forward, kernels and precision as training, so that at step 0 policy and reference agree.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from notus.data.rows import Rows, step_rows
from notus.model.policy import Policy
from notus.training.distributed import rank, sum_across_ranks, world_size
from notus.training.feed import prefetched, row_costs
from notus.training.parallel import reshard


@torch.no_grad()
def score(
    policy: Policy,
    rows: Rows,
    indices: np.ndarray,
    *,
    tokens_per_row: int,
    device: torch.device,
    on_row: Callable[[], None] | None = None,
) -> Tensor:
    """Score some rows of a dataset; collective, every rank takes a share and gets the whole.

    Args:
        policy: evaluated without dropout.
        rows: the tokenised dataset.
        indices: int64 [n], which rows.
        tokens_per_row: the most tokens of a packed row.
        device: where the policy computes.
        on_row: called before each packed row, of which every rank has the same number; what it raises ends the pass.

    Returns:
        fp32 [n, K] on the host: the sum of each completion's log-probs, in nats, in the order of `indices`.
    """
    place = {int(index): position for position, index in enumerate(indices)}
    found = torch.zeros(len(indices), rows.num_branches, dtype=torch.float32, device=device)
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
        with prefetched(share, device) as batches:
            for batch in batches:
                if on_row is not None:
                    on_row()
                logps = policy(batch.to(device))
                if int(batch.indices[0]) >= 0:  # not a filler
                    where = torch.tensor([place[index] for index in batch.indices.tolist()])
                    found[where.to(device)] = logps
    finally:
        reshard(policy)
        policy.train(was_training)
    return sum_across_ranks(found).cpu()


def score_all(
    policy: Policy,
    rows: Rows,
    *,
    tokens_per_row: int,
    device: torch.device,
    part_size: int = 2048,
    on_part: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Score a whole dataset part by part; `on_part(done, total)` is told of the progress. fp32 [n, K]."""
    parts = []
    for start in range(0, len(rows), part_size):
        indices = np.arange(start, min(start + part_size, len(rows)))
        parts.append(score(policy, rows, indices, tokens_per_row=tokens_per_row, device=device))
        if on_part is not None:
            on_part(int(indices[-1]) + 1, len(rows))
    return torch.cat(parts)
