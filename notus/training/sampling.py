"""What the model says while it trains: greedy continuations of a few prompts, through the sharded policy as it stands.

One packed forward pass of the whole prefixes for every new token, with the kernels of training and no cache of keys and
values: never more of the model in one place than a training step has, and no more tokens than a packed row. Draws
nothing, so training goes on as it would have without.
"""

import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from notus.data.dealing import deal
from notus.data.packing import Example, collate
from notus.data.rows import Rows
from notus.model.policy import Policy
from notus.training.distributed import gather_objects, rank, sum_across_ranks, world_size
from notus.training.parallel import reshard

SEARCHED = 10_000  # rows, in about 0.3 s


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt's number, its text, and how the model goes on; both without special tokens."""

    index: int
    prompt: str
    completion: str


class Sampler:
    """Goes on after the same prompts each time it is called."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        longest: int,
        ends: Collection[int],
        device: torch.device,
    ) -> None:
        """Sample nothing yet.

        Args:
            policy: sampled without dropout.
            tokenizer: what token ids mean.
            prompts: token ids, see `first_prompts`.
            max_new_tokens: most tokens of a completion.
            longest: most tokens of prompt and completion, and of a packed row.
            ends: token ids that end a completion, and are no part of it.
            device: where the policy computes.
        """
        self._policy, self._tokenizer, self._device = policy, tokenizer, device
        self._prompts, self._ends, self._longest = list(prompts), frozenset(ends), longest
        self._room = [min(max_new_tokens, longest - len(prompt)) for prompt in prompts]
        assert all(room > 0 for room in self._room)

    def __call__(self, on_row: Callable[[], None]) -> list[Sample]:
        """Sample; collective, the prompts are dealt to the ranks and every rank gets the whole.

        `on_row` is called before each forward pass, of which every rank has the same number; what it raises ends it.
        """
        if not self._prompts:
            return []
        was_training = self._policy.training
        self._policy.eval()
        try:
            mine = self._complete(on_row)
        finally:
            reshard(self._policy)
            self._policy.train(was_training)
        completed = {index: new for part in gather_objects(mine) for index, new in part.items()}
        return [self._sample(index, completed[index]) for index in range(len(self._prompts))]

    @torch.no_grad()
    def _complete(self, on_row: Callable[[], None]) -> dict[int, list[int]]:
        """New token ids of this rank's prompts; as many forward passes on every rank."""
        final = [len(prompt) + room for prompt, room in zip(self._prompts, self._room, strict=True)]
        rows = deal(final, final, world_size(), self._longest)[rank()]
        new: dict[int, list[int]] = {index: [] for row in rows for index in row}
        open_ = set(new)
        while self._any_rank(bool(open_)):
            for row in rows:
                on_row()
                going = [index for index in row if index in open_]
                for index, token in zip(going, self._next_tokens(going, new), strict=True):
                    if token in self._ends:
                        open_.remove(index)
                        continue
                    new[index].append(token)
                    if len(new[index]) == self._room[index]:
                        open_.remove(index)
        return new

    def _any_rank(self, mine: bool) -> bool:
        return bool(sum_across_ranks(torch.tensor([float(mine)])).item())  # on the host

    def _next_tokens(self, going: list[int], new: dict[int, list[int]]) -> list[int]:
        """The likeliest next token of each prefix; an empty row goes along with a filler."""
        examples = []
        for index in going:
            prefix = np.concatenate([self._prompts[index], new[index]]).astype(np.int64)
            examples.append(Example(index, prefix[:0], (prefix,), (np.zeros(len(prefix), dtype=bool),)))
        batch = collate(examples, 1).to(self._device)
        tokens: list[int] = self._policy(batch, next_tokens=True).flatten().tolist()
        return tokens[: len(going)]

    def _sample(self, index: int, new: list[int]) -> Sample:
        prompt = self._prompts[index].tolist()
        before, whole = self._decode(prompt), self._decode([*prompt, *new])
        # decoded after its prompt, because many tokenizers strip a text's first space; bytes that are not UTF-8 can
        # spoil the prompt's last ones
        completion = whole.removeprefix(before) if whole.startswith(before) else self._decode(new)
        return Sample(index, before, completion)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def build_sampler(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    count: int,
    max_new_tokens: int,
    tokens_per_row: int,
    generation_config: GenerationConfig | None,
    device: torch.device,
) -> Sampler | None:
    """A sampler of the first `count` prompts of `rows`; None for none. Ends where the tokenizer or the config says."""
    if not count:
        return None
    context = getattr(policy.causal_lm.config, "max_position_embeddings", None) or sys.maxsize
    longest = min(tokens_per_row, context)
    return Sampler(
        policy,
        tokenizer,
        first_prompts(rows, count, longest),
        max_new_tokens=max_new_tokens,
        longest=longest,
        ends=end_tokens(tokenizer, generation_config),
        device=device,
    )


def first_prompts(rows: Rows, count: int, longest: int) -> list[np.ndarray]:
    """Token ids of the first `count` different prompts (trunks) that leave room below `longest` tokens.

    Of `SEARCHED` such rows: where a million rows share one prompt, there is no other to wait for.
    """
    found: dict[bytes, np.ndarray] = {}
    for index in np.flatnonzero((rows.trunk_lengths > 0) & (rows.trunk_lengths < longest))[:SEARCHED]:
        if len(found) == count:
            break
        (example,) = rows(np.array([index]))
        found.setdefault(example.trunk.tobytes(), example.trunk)
    return list(found.values())


def end_tokens(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None) -> list[int]:
    """The tokens that end a completion: the tokenizer's EOS, and those that the model's own settings name."""
    named = None if config is None else config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})
