"""The policy: a packed batch in, one log-prob per completion out."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from notus.data.packing import Batch
from notus.model.logprobs import linear_logprobs, linear_scores


class Policy(nn.Module):
    """A causal language model as a function from a packed row to completion log-probs; the root of FSDP.

    Always call the module itself, never its parts: FSDP gathers the embedding, the norm and the head in the
    root's hooks. The head stays a plain matrix multiplication inside this forward, so that logits exist only
    chunk-wise.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        """Wrap a transformers causal LM whose attention implementation is `attention.IMPLEMENTATION`.

        Raises:
            ValueError: the model's output head has a bias, or its blocks cannot be found.
        """
        super().__init__()
        self.causal_lm: PreTrainedModel = causal_lm
        if self._head.bias is not None:
            raise ValueError(f"{type(causal_lm).__name__}: output heads with a bias are not supported")
        if not hasattr(causal_lm.get_decoder(), "layers"):
            name = type(causal_lm).__name__
            raise ValueError(f"{name}: decoders that do not keep their blocks in `layers` are not supported")

    @property
    def _head(self) -> nn.Linear:
        return self.causal_lm.get_output_embeddings()

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's layers, in order."""
        return self.causal_lm.get_decoder().layers

    def token_logprobs(self, batch: Batch) -> Tensor:
        """fp32 [M]: the log-prob of every completion token of the row, in nats (call through `forward`)."""
        return linear_logprobs(self._sources(batch), self._head.weight, batch.targets)

    @torch.no_grad()
    def token_scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`token_logprobs`, and bool [M]: whether the token is the likeliest. Of an unsharded policy, no gradients."""
        return linear_scores(self._sources(batch), self._head.weight, batch.targets)

    def _sources(self, batch: Batch) -> Tensor:
        """[M, D]: the final hidden states that predict the completion tokens."""
        hidden = self.causal_lm.get_decoder()(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            layout=batch.layout,
        ).last_hidden_state.squeeze(0)
        return hidden.index_select(0, batch.sources)

    def forward(self, batch: Batch, *, per_token: bool = False) -> Tensor:
        """Sum of completion log-probs per branch.

        Args:
            batch: a packed row of E examples with K branches each.
            per_token: give `token_logprobs` in place of the sums.

        Returns:
            fp32 [E, K], nats; per token fp32 [M].
        """
        tokens = self.token_logprobs(batch)
        if per_token:
            return tokens.clone()
        sums = torch.segment_reduce(tokens, "sum", lengths=batch.lengths.flatten(), unsafe=True)
        return sums.view(batch.lengths.shape).clone()  # FSDP hooks its outputs and warns of views
