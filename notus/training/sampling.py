"""What the model says while it trains: greedy continuations of a few prompts, through the sharded policy as it stands.

The model's own forward pass computes them, with a cache of keys and values, on a left-padded batch of each rank's
prompts. It draws no random numbers and leaves nothing behind, so training continues as it would have without samples.

Time. A token is one forward pass, in which sharded ranks gather every block once. For a few prompts, that takes longer
than to compute. With P parameters, each token brings 2 P bytes to every rank (bf16), and under cpu_offload also reads
4 P bytes from the hosts of all ranks together. An estimate for 7B parameters, 48 tokens and 8 A100s: 14.5 GB per token.
Over NVLink, at 230 GB/s, these take 0.06 s per token and 3 s for all. Over PCIe or between nodes, at 25 GB/s, they take
0.6 s per token and 28 s for all. Samples at the start and at the end are 0.2% or 1.6% of a run of an hour. One GPU that
trains and offloads all of 7B parameters needs 56 s each time, which is 3%. None of this was run on a GPU.

Memory. A rank's batch, with its padding, has no more tokens than a packed row. The cache holds two vectors per token
and block: of the model's width, or of a quarter of it with grouped-query attention as in Mistral 7B. A training step
keeps one vector of the model's width per token and block where it keeps the least, and gradients besides.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from notus.data.dataset import TokenizedDataset
from notus.model.policy import Policy
from notus.model.supported import context_of
from notus.runtime.distributed import gather_objects, rank, sum_across_ranks, world_size
from notus.training.parallelize import reshard

SEARCHED = 10_000  # rows, in about 0.3 s
AGREE_EVERY = 8  # forward passes until the ranks ask each other again whether all completions have ended


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt's number, its text, and the model's continuation; both without special tokens."""

    index: int
    prompt: str
    completion: str


class Sampler:
    """Continues the same prompts each time it is called."""

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
            longest: most tokens of prompt and completion, and of a rank's batch.
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
        """Return the new token ids of this rank's prompts; every rank makes as many forward passes."""
        new: dict[int, list[int]] = {}
        with self._policy.own_forward():
            for shares in self._groups():
                passes = max(self._room[index] for share in shares for index in share)
                mine = shares[rank()]
                new |= dict(zip(mine, self._continue(mine, passes, on_row), strict=True))
        return new

    def _groups(self) -> list[list[list[int]]]:
        """Return `[group][rank]`, the prompts that ranks complete at the same time; a rank may have none.

        There are as few groups as possible, because each takes all the forward passes.
        """
        ranks, count = world_size(), len(self._prompts)
        number = math.ceil(len(self._batches(count)) / ranks) * ranks
        small = next(found for size in range(1, count + 1) if len(found := self._batches(size)) <= number)
        batches = small + [[]] * (number - len(small))
        return [batches[start : start + ranks] for start in range(0, number, ranks)]

    def _batches(self, size: int) -> list[list[int]]:
        """Cut all prompts, the longest first, into batches of at most `size`, with padding at most `longest` tokens."""
        batches: list[list[int]] = []
        for index in sorted(range(len(self._prompts)), key=lambda index: -len(self._prompts[index])):
            batch = batches[-1] if batches else []
            padded = (len(batch) + 1) * (len(self._prompts[(batch or [index])[0]]) + self._room[index])
            if batch and len(batch) < size and padded <= self._longest:
                batch.append(index)
            else:
                batches.append([index])
        return batches

    def _continue(self, indices: list[int], passes: int, on_row: Callable[[], None]) -> list[list[int]]:
        """Return the new token ids after each of some prompts, after at most so many passes; none still takes part."""
        prompt, mask, positions = self._left_padded(indices, passes)
        room = torch.tensor([self._room[index] for index in indices] or [0], device=self._device)
        ends = torch.tensor(sorted(self._ends), dtype=torch.int64, device=self._device)
        cache = self._policy.new_cache()
        tokens, begin, end = [prompt], 0, prompt.shape[1]
        going = room > 0
        for number in range(passes):
            if number and number % AGREE_EVERY == 0 and not self._any_rank(going):
                break
            on_row()
            next_ = self._policy.next_token(tokens[-1], mask[:, :end], positions[:, begin:end], cache)
            tokens.append(next_[:, None])
            begin, end = end, end + 1
            going &= ~torch.isin(next_, ends) & (number + 1 < room)
        found = torch.cat(tokens[1:], dim=1).tolist()
        return [self._cut(found[row], self._room[index]) for row, index in enumerate(indices)]

    def _any_rank(self, mine: Tensor) -> bool:
        return bool(sum_across_ranks(mine.any().float().cpu()).item())

    def _left_padded(self, indices: list[int], passes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the token ids of some prompts, and mask and positions of these and of `passes` more tokens.

        Without prompts, it is a filler of one token.
        """
        prompts = [self._prompts[index] for index in indices] or [np.zeros(1, dtype=np.int64)]
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.ones(len(prompts), width + passes, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, : width - len(prompt)] = 0
        # A row without room left runs on with the others, and its tokens are cut off later. Its positions must exist.
        positions = (mask.cumsum(1) - 1).clamp(0, self._longest - 1)
        return ids.to(self._device), mask.to(self._device), positions.to(self._device)

    def _cut(self, new: list[int], room: int) -> list[int]:
        """Return what stands before the first end token, at most `room` tokens."""
        return list(itertools.takewhile(lambda token: token not in self._ends, new[:room]))

    def _sample(self, index: int, new: list[int]) -> Sample:
        prompt = self._prompts[index].tolist()
        before, whole = self._decode(prompt), self._decode([*prompt, *new])
        # decoded after its prompt, because many tokenizers strip the first space; bytes that are not UTF-8 can
        # spoil the prompt's last ones
        completion = whole.removeprefix(before) if whole.startswith(before) else self._decode(new)
        return Sample(index, before, completion)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def build_sampler(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    rows: TokenizedDataset,
    *,
    count: int,
    max_new_tokens: int,
    tokens_per_row: int,
    generation_config: GenerationConfig | None,
    device: torch.device,
) -> Sampler | None:
    """A sampler of the first `count` prompts of `rows`; None for none. Ends where the tokenizer or the config says.

    `generation_config` is the base model's; None: it has none, and its config says where it ends.
    """
    if not count:
        return None
    longest = min(tokens_per_row, context_of(policy.causal_lm.config))
    return Sampler(
        policy,
        tokenizer,
        first_prompts(rows, count, longest),
        max_new_tokens=max_new_tokens,
        longest=longest,
        ends=end_tokens(tokenizer, generation_config or policy.causal_lm.generation_config),
        device=device,
    )


def first_prompts(rows: TokenizedDataset, count: int, longest: int) -> list[np.ndarray]:
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
