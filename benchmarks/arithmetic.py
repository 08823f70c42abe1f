"""The benchmark's own part of the arithmetic: totals of a run, and the tokens and padding behind them.

What a forward pass cannot do without is counted in `notus/model/flops.py`. Of a whole run:

    run = sum over pairs of forward(pair) * (3 * epochs + 1)

A backward pass is twice a forward pass; the reference is one forward pass more, once. A shared prompt counts
once, padding and recomputation not at all.
"""

from collections.abc import Sequence

import numpy as np

from notus.model.flops import Dimensions, forward_flops

# prompt, chosen and rejected tokens of one pair
Lengths = tuple[int, int, int]


def run_flops(size: Dimensions, pairs: Sequence[Lengths], epochs: int) -> int:
    """Of a whole run, with one reference pass; all tokens but the prompts' are scored."""
    lengths = np.array(pairs)
    trunks, branches = lengths[:, 0], lengths[:, 1:]
    return (3 * epochs + 1) * int(forward_flops(size, trunks, branches, branches.sum(axis=1)).sum())


def shared_tokens(pairs: Sequence[Lengths]) -> int:
    """Tokens with every prompt once."""
    return sum(sum(lengths) for lengths in pairs)


def separate_tokens(pairs: Sequence[Lengths]) -> int:
    """Tokens with every prompt twice, without padding."""
    return sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in pairs)


def padded_tokens(pairs: Sequence[Lengths], rows: int) -> int:
    """Tokens of batches of `rows` pairs, chosen and rejected apart, padded to each batch's longest."""
    batches = [pairs[start : start + rows] for start in range(0, len(pairs), rows)]
    return sum(2 * len(batch) * max(p + max(c, r) for p, c, r in batch) for batch in batches)
