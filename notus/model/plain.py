"""The plain path: a packed batch in, one log-prob per completion out, by the model's own forward pass.

It is for models that the packed path (`notus.model.policy`) cannot express: state-space and hybrid models, attention
outside transformers' interface, heads that do more than a product. Every completion is computed together with its own
copy of the prompt, so a shared prompt costs as often as it is used.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import PreTrainedModel

from notus.data.packing import Batch
from notus.model.logprobs import log_collision
from notus.model.policy import Policy

# Sequences are padded to one length while at most this share of a batch is padding.
MOST_PADDING = 0.25


class History:
    """Stands where the packed policy has a cache of keys and values: the tokens so far, int64 [B, T]."""

    tokens: Tensor | None = None


class PlainPolicy(Policy):
    """A causal language model's own forward pass, as a function from a packed row to completion log-probs.

    Sharded ranks gather a block for each forward pass of the model, so all ranks must make equally many: those that
    have fewer sequences run short ones that weigh nothing.
    """

    path = "plain"

    def __init__(self, causal_lm: PreTrainedModel, *, padded: bool = False, reason: str | None = None) -> None:
        """Wrap a transformers causal LM as it is.

        Args:
            causal_lm: with the attention implementation that it is to use.
            padded: run sequences of similar length together, padded on the right. Only where `verify` found it equal.
            reason: why this path is taken, for the user.
        """
        nn.Module.__init__(self)  # the packed path's has demands of its own
        self.causal_lm = causal_lm
        self.padded, self.path_reason = padded, reason
        taken = inspect.signature(causal_lm.forward).parameters
        passed_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
        # A cache would grow in every recomputation of a block.
        self._options = {"use_cache": False} if passed_on or "use_cache" in taken else {}
        self._keeps = "logits_to_keep" in taken
        self.train()

    def _token_logprobs(self, batch: Batch) -> Tensor:
        return _logprobs_of(self._logits(batch), batch)

    def _token_statistics(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self._logits(batch)
        collisions = [log_collision(each.detach().softmax(-1)) for each in logits]
        return _logprobs_of(logits, batch), torch.cat(collisions)

    @torch.no_grad()
    def token_scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`token_logprobs`, and bool [M]: whether the token is the likeliest. No gradients."""
        logits = self._logits(batch)
        greedy = torch.cat([each.argmax(-1) for each in logits]) == batch.targets
        return _logprobs_of(logits, batch), greedy

    def _logits(self, batch: Batch) -> list[Tensor]:
        """fp32 [n, V] for each sequence: the logits that predict its n completion tokens."""
        layout = batch.layout
        sequences = batch.input_ids[layout.key_index].split(layout.key_lengths)  # a copy of the prompt in each
        return self._forwards(sequences, _per_sequence(batch, batch.position_ids[batch.sources]))

    def _forwards(self, sequences: Sequence[Tensor], positions: Sequence[Tensor]) -> list[Tensor]:
        """fp32 [n, V] for each sequence [T]: its logits at n positions; as many forward passes on every rank."""
        found: dict[int, Tensor] = {}
        nothing: Tensor | None = None
        groups = self._groups([len(each) for each in sequences])
        passes = _most_of_all_ranks(len(groups), sequences[0].device) if isinstance(self, FSDPModule) else len(groups)
        for number in range(passes):
            if number < len(groups):
                found |= self._forward(groups[number], sequences, positions)
            else:
                filler = sequences[0].new_zeros(2)
                more = 0.0 * self._forward([0], [filler], [filler[:1]])[0].logsumexp(-1).sum()
                nothing = more if nothing is None else nothing + more
        if nothing is not None:  # the fillers take part in the backward pass
            found[0] = found[0] + nothing
        return [found[index] for index in range(len(sequences))]

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        """Cut the sequences into those that run together: each alone, in their order, or similar lengths, padded."""
        if not self.padded:
            return [[index] for index in range(len(lengths))]
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        groups: list[list[int]] = []
        for index in order:
            if groups and lengths[index] >= (1 - MOST_PADDING) * lengths[groups[-1][0]]:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups

    def _forward(self, group: list[int], sequences: Sequence[Tensor], positions: Sequence[Tensor]) -> dict[int, Tensor]:
        if len(group) == 1:
            (index,) = group
            keep = {"logits_to_keep": positions[index]} if self._keeps else {}
            logits = self.causal_lm(input_ids=sequences[index][None], **self._options, **keep).logits[0]
            return {index: (logits if self._keeps else logits[positions[index]]).float()}
        ids = nn.utils.rnn.pad_sequence([sequences[index] for index in group], batch_first=True)
        lengths = torch.tensor([len(sequences[index]) for index in group], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        logits = self.causal_lm(input_ids=ids, attention_mask=mask, **self._options).logits
        return {index: logits[row, positions[index]].float() for row, index in enumerate(group)}

    @contextlib.contextmanager
    def own_forward(self) -> Iterator[None]:
        """Do nothing: it is the model's own forward pass already."""
        yield

    def new_cache(self) -> History:
        """Return what `next_token` keeps between its calls."""
        return History()

    def next_token(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """Return the likeliest token after each sequence of a left-padded batch, int64 [B]; see `Policy.next_token`.

        Each sequence is computed from its beginning by itself: not every model has a cache, and not every one is
        indifferent to padding on the left.
        """
        cache.tokens = input_ids if cache.tokens is None else torch.cat([cache.tokens, input_ids], dim=1)
        sequences = [row[mask.bool()] for row, mask in zip(cache.tokens, attention_mask, strict=True)]
        last = [torch.tensor([len(each) - 1], device=each.device) for each in sequences]
        return torch.cat([logits.argmax(-1) for logits in self._forwards(sequences, last)])


def _logprobs_of(logits: Sequence[Tensor], batch: Batch) -> Tensor:
    """fp32 [M]: the log-probs of the row's completion tokens, of logits as `PlainPolicy._logits` gives them."""
    each = zip(logits, _per_sequence(batch, batch.targets), strict=True)
    return torch.cat([-F.cross_entropy(scores, ids, reduction="none") for scores, ids in each])


def _per_sequence(batch: Batch, values: Tensor) -> tuple[Tensor, ...]:
    """Cut what the row's completion tokens have, [M], into a part for each sequence; a missing one has none."""
    return values.split(batch.lengths[batch.present].tolist())


def _most_of_all_ranks(count: int, device: torch.device) -> int:
    if dist.get_world_size() == 1:
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most.item())
