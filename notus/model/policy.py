"""The policy: a packed batch in, one log-prob per completion out."""

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from notus.data.packing import Batch
from notus.model.attention import hand_layout_on
from notus.model.head import head_of
from notus.model.logprobs import linear_logprobs, linear_scores, linear_statistics
from notus.model.lora import lora_layers
from notus.model.structure import blocks_of, decoder_of


class Policy(nn.Module):
    """A causal language model as a function from a packed row to completion log-probs; the root of FSDP.

    Four methods run a sharded policy: `forward` (sums per completion), `token_logprobs` and `token_statistics` (per
    token) and `next_token` (generation); `token_scores` is for an unsharded one. FSDP gathers the embedding, the norm
    and the head in the hooks of these four (see `parallelize`), so never call the parts. The head stays a plain matrix
    multiplication inside them, so that logits exist only chunk-wise.
    """

    path = "packed"
    path_reason: str | None = None

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        """Wrap a transformers causal LM whose attention implementation is `attention.IMPLEMENTATION`.

        Raises:
            ValueError: the model's output head is not understood, or its blocks cannot be found.
        """
        super().__init__()
        self.causal_lm: PreTrainedModel = causal_lm
        self._head = head_of(causal_lm)
        for block in blocks_of(causal_lm):
            hand_layout_on(block)
        self.train()

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's layers, in order."""
        return blocks_of(self.causal_lm)

    def forward(self, batch: Batch) -> Tensor:
        """Sum the completion log-probs of a packed row of E examples with up to K branches: fp32 [E, K], in nats.

        A completion that an example lacks has 0, without a gradient.
        """
        tokens = self._token_logprobs(batch)
        sums = torch.segment_reduce(tokens, "sum", lengths=batch.lengths.flatten(), unsafe=True)
        return sums.view(batch.lengths.shape).clone()  # FSDP hooks its outputs and warns of views

    def token_logprobs(self, batch: Batch) -> Tensor:
        """Return the log-prob of every completion token of a packed row: fp32 [M], in nats."""
        return self._token_logprobs(batch).clone()  # as in `forward`

    def _token_logprobs(self, batch: Batch) -> Tensor:
        hidden, head = self._hidden(batch, batch.sources), self._head
        weight, bias = head.linear.weight, head.linear.bias
        return linear_logprobs(hidden, weight, batch.targets, bias=bias, scale=head.scale, softcap=head.softcap)

    def token_statistics(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return `token_logprobs`, and from the same logits how concentrated the policy is at each of these tokens.

        Returns:
            fp32 [M], the log-probs, with gradients; and fp32 [M], log of the sum over the vocabulary of p², detached.
            Both in nats.
        """
        logps, collisions = self._token_statistics(batch)
        return logps.clone(), collisions  # as in `forward`

    def _token_statistics(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, head = self._hidden(batch, batch.sources), self._head
        weight, bias = head.linear.weight, head.linear.bias
        return linear_statistics(hidden, weight, batch.targets, bias=bias, scale=head.scale, softcap=head.softcap)

    @torch.no_grad()
    def token_scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`token_logprobs`, and bool [M]: whether the token is the likeliest. Of an unsharded policy, no gradients."""
        hidden, head = self._hidden(batch, batch.sources), self._head
        weight, bias = head.linear.weight, head.linear.bias
        return linear_scores(hidden, weight, batch.targets, bias=bias, scale=head.scale, softcap=head.softcap)

    def _hidden(self, batch: Batch, positions: Tensor) -> Tensor:
        """[n, D]: the final hidden states at n row positions."""
        output = decoder_of(self.causal_lm)(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            layout=batch.layout,
        )
        return _last_hidden(output).squeeze(0).index_select(0, positions)

    @contextlib.contextmanager
    def own_forward(self) -> Iterator[None]:
        """Let the model compute as transformers wrote it: no fused, checkpointed or compiled forwards within.

        Packed attention cannot continue from cached keys and values; the model's own code can. All that this project
        replaces are `forward` attributes of modules, so FSDP's hooks, which belong to the call, stay.
        """
        causal_lm = self.causal_lm
        replaced = {module: vars(module).pop("forward") for module in causal_lm.modules() if "forward" in vars(module)}
        attention = causal_lm.config._attn_implementation
        try:
            causal_lm.set_attn_implementation("sdpa" if causal_lm._supports_sdpa else "eager")
            yield
        finally:
            causal_lm.set_attn_implementation(attention)
            for module, forward in replaced.items():
                module.forward = forward

    def new_cache(self) -> Any:
        """Return what `next_token` keeps between its calls."""
        return DynamicCache(config=self.causal_lm.config)

    def train(self, mode: bool = True) -> Self:
        """Switch the adapters' dropout on or off; the model itself stays in evaluation mode.

        The reference log-probs hold for that forward pass. In training mode some models choose at random beside
        dropout: their experts (Phi-3.5-MoE), or which layers to leave out.
        """
        super().train(mode)
        self.causal_lm.train(False)
        for layer in lora_layers(self.causal_lm).values():
            layer.train(mode)
        return self

    def next_token(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """Return the likeliest token after each sequence of a left-padded batch. Within `own_forward`, no gradients.

        Of a sharded policy, this is a forward pass of its own beside `forward`, see `parallelize`.

        Args:
            input_ids: int64 [B, T], the tokens that follow those in `cache`.
            attention_mask: int64 [B, tokens in the cache + T], 0 for padding.
            position_ids: int64 [B, T].
            cache: from `new_cache`: keys and values of the tokens before; those of `input_ids` are added.

        Returns:
            int64 [B].
        """
        output = decoder_of(self.causal_lm)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return self._head.logits(_last_hidden(output)[:, -1]).argmax(-1)


def _last_hidden(output: Any) -> Tensor:
    """[B, T, D] of what a decoder returns: its first output, a tuple's first."""
    hidden: Tensor = output[0]
    return hidden
