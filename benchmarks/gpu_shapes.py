"""What is measured: the model's shape for the memory at hand, pairs of UltraFeedback's lengths, and their batches."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import MistralConfig

from notus.data.packing import Example
from notus.data.schedule import deal

PAIRS_PER_STEP = 64
LONGEST = 1024  # prompt and completion, as `data.max_length`
# Means of trunk, chosen and rejected, and the spread of their logarithms.
LENGTHS = ((176, 0.9), (300, 0.7), (280, 0.7))
# Per parameter, on one rank: master, gradient, RMSprop's state, and either the gathered bf16 copy or the optimizer's
# temporaries; with a frozen bf16 base the weight and its gathered copy.
BYTES_FULL, BYTES_LORA = 4 + 4 + 4 + 4, 2 + 2
SHARE_FOR_ACTIVATIONS = 0.15

MISTRAL_7B = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=32768, sliding_window=4096, pad_token_id=None,
)  # fmt: skip
SMALL = MistralConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=32768, sliding_window=4096, pad_token_id=None,
)  # fmt: skip
TOY = MistralConfig(
    vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=None, pad_token_id=None,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        shapes: by name, the largest first; layers are left out until one fits.
        pairs_per_step: of an optimizer step.
        divisor: lengths are UltraFeedback's divided by this.
        tokens_per_row: to begin with, by activation checkpointing; halved while memory does not suffice.
        least_tokens_per_row: below which it is not halved.
    """

    shapes: dict[str, MistralConfig]
    pairs_per_step: int
    divisor: int
    tokens_per_row: dict[str, int]
    least_tokens_per_row: int


GPU = Scale(
    shapes={"Mistral-7B": MISTRAL_7B, "Mistral, width 2048": SMALL},
    pairs_per_step=PAIRS_PER_STEP,
    divisor=1,
    tokens_per_row={"full": 16384, "selective": 8192, "products": 8192, "none": 4096},
    least_tokens_per_row=2048,
)
CPU = Scale(
    shapes={"toy": TOY},
    pairs_per_step=8,
    divisor=16,
    tokens_per_row={"full": 512, "selective": 256, "products": 256, "none": 256},
    least_tokens_per_row=128,
)


def parameters(config: MistralConfig) -> int:
    """Of a model with an untied head."""
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * config.hidden_size * heads * config.head_dim
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    return config.num_hidden_layers * layer + 2 * config.vocab_size * config.hidden_size + config.hidden_size


def fitting(scale: Scale, memory: int | None, *, lora: bool) -> tuple[str, MistralConfig]:
    """The name and the largest shape whose weights and optimizer fit into `memory` bytes (None: any fits).

    Raises:
        ValueError: not even four layers of the smallest shape do.
    """
    per_parameter = BYTES_LORA if lora else BYTES_FULL
    for name, whole in scale.shapes.items():
        for layers in sorted({whole.num_hidden_layers, 24, 16, 12, 8, 4}, reverse=True):
            config = MistralConfig(**{**whole.to_dict(), "num_hidden_layers": min(layers, whole.num_hidden_layers)})
            if memory is None or parameters(config) * per_parameter <= (1 - SHARE_FOR_ACTIVATIONS) * memory:
                cut = layers < whole.num_hidden_layers
                return f"{name}, {layers} of {whole.num_hidden_layers} layers" if cut else name, config
    raise ValueError("less than 4 GB of memory: run with --cpu")


def pairs(count: int, scale: Scale, vocab: int, *, num_branches: int = 2, seed: int = 0) -> list[Example]:
    """`count` examples of random tokens with UltraFeedback's lengths; with one branch, the chosen one alone."""
    rng = np.random.default_rng(seed)
    longest, found = LONGEST // scale.divisor, []
    for number in range(count):
        trunk, *branches = (
            max(1, int(rng.lognormal(np.log(mean / scale.divisor) - spread**2 / 2, spread))) for mean, spread in LENGTHS
        )
        trunk = min(trunk, longest // 2)
        branches = [min(branch, longest - trunk) for branch in branches][:num_branches]
        tokens = [rng.integers(0, vocab, length) for length in (trunk, *branches)]
        masks = tuple(np.ones(length, dtype=bool) for length in branches)
        found.append(Example(number, tokens[0], tuple(tokens[1:]), masks))
    return found


# ---- how a step's examples become rows ----


def rows(variant: str, examples: Sequence[Example], tokens_per_row: int, longest: int) -> list[list[Example]]:
    """A step's rows.

    Args:
        variant: "shared": packed, a trunk once; "packed": a trunk before each of its branches; "padded": sequences
            apart, each as long as the longest of its micro-batch, in the order of the data.
        examples: of the step.
        tokens_per_row: the most tokens of a row.
        longest: sequence there may be, which says how many fit into a padded micro-batch.
    """
    if variant == "padded":
        size = max(1, tokens_per_row // (len(examples[0].branches) * longest))
        batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        return [[_apart(item, _longest(batch)) for item in batch] for batch in batches]
    whole = list(examples) if variant == "shared" else [_apart(item, 0) for item in examples]
    lengths = [num_tokens(item) for item in whole]
    positions = deal(lengths, lengths, 1, tokens_per_row)[0]
    return [[whole[position] for position in row] for row in positions]


def num_tokens(example: Example) -> int:
    """Tokens of an example as it stands in a row."""
    return len(example.trunk) + sum(len(branch) for branch in example.branches)


def _longest(examples: Sequence[Example]) -> int:
    return max(len(item.trunk) + len(branch) for item in examples for branch in item.branches)


def _apart(example: Example, length: int) -> Example:
    """The trunk copied into every branch, and further tokens that carry no loss up to `length`."""
    branches, masks = [], []
    for branch, mask in zip(example.branches, example.loss_masks, strict=True):
        padding = max(0, length - len(example.trunk) - len(branch))
        branches.append(np.concatenate([example.trunk, branch, np.zeros(padding, dtype=np.int64)]))
        unscored = (np.zeros(len(example.trunk), dtype=bool), np.zeros(padding, dtype=bool))
        masks.append(np.concatenate([unscored[0], mask, unscored[1]]))
    return Example(example.index, example.trunk[:0], tuple(branches), tuple(masks))
