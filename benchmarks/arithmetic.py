"""The arithmetic that DPO on a set of pairs cannot do without, and the tokens and padding behind it.

Counted as multiply and add, for one pair of trunk T and branches B_k with S scored tokens:

    forward(pair) = 2 * body * (T + sum B_k)  +  2 * head * S  +  4 * layers * width * A
    A             = T (T + 1) / 2  +  sum over k of (B_k T + B_k (B_k + 1) / 2)
    run           = sum over pairs of forward(pair) * (3 * epochs + 1)

where `body` and `head` are the weights of the linear layers, `width` is heads times their dimension, and A
counts the query-key pairs that the causal mask lets through. A backward pass is twice a forward pass; the
reference is one forward pass more, once. A shared prompt counts once, padding and recomputation not at all.
"""

from collections.abc import Sequence

from job import Machine

# prompt, chosen and rejected tokens of one pair
Lengths = tuple[int, int, int]


def forward_flops(machine: Machine, lengths: Lengths) -> int:
    """Of one pair: its shared tokens once, its scored tokens (all but the prompt's) through the head."""
    trunk, *branches = lengths
    visible = trunk * (trunk + 1) // 2 + sum(b * trunk + b * (b + 1) // 2 for b in branches)
    linear = 2 * machine.body_weights * sum(lengths) + 2 * machine.head_weights * sum(branches)
    return linear + 4 * machine.layers * machine.attention_width * visible


def run_flops(machine: Machine, pairs: Sequence[Lengths], epochs: int) -> int:
    """Of a whole run, with one reference pass."""
    return (3 * epochs + 1) * sum(forward_flops(machine, lengths) for lengths in pairs)


def shared_tokens(pairs: Sequence[Lengths]) -> int:
    """Tokens with every prompt once."""
    return sum(sum(lengths) for lengths in pairs)


def padded_tokens(pairs: Sequence[Lengths], rows: int) -> int:
    """Tokens of batches of `rows` pairs, chosen and rejected apart, padded to each batch's longest."""
    batches = [pairs[start : start + rows] for start in range(0, len(pairs), rows)]
    return sum(2 * len(batch) * max(p + max(c, r) for p, c, r in batch) for batch in batches)
