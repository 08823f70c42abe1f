"""The policy: a packed batch in, one log-prob per completion out."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from notus.data.packing import Batch
from notus.model.logprobs import linear_logprobs


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
        hidden = self._hidden(batch)
        return linear_logprobs(hidden.index_select(0, batch.sources), self._head.weight, batch.targets)

    def _hidden(self, batch: Batch) -> Tensor:
        """[N, D]: what the head sees of the row's tokens."""
        decoded = self.causal_lm.get_decoder()(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            layout=batch.layout,
        )
        return decoded.last_hidden_state.squeeze(0)

    def _likeliest(self, batch: Batch) -> Tensor:
        """int64 [E, K]: the likeliest token after each branch."""
        ends = batch.layout.query_starts[1:] - 1  # a segment's queries end with its branch
        logits = self._hidden(batch).index_select(0, ends) @ self._head.weight.t()
        return logits.argmax(-1).view(batch.lengths.shape).clone()

    def forward(self, batch: Batch, *, next_tokens: bool = False) -> Tensor:
        """Sum of completion log-probs per branch.

        Args:
            batch: a packed row of E examples with K branches each.
            next_tokens: return instead the likeliest token after each branch, int64 [E, K]; no branch may be empty.

        Returns:
            fp32 [E, K], nats.
        """
        if next_tokens:
            return self._likeliest(batch)
        tokens = self.token_logprobs(batch)
        sums = torch.segment_reduce(tokens, "sum", lengths=batch.lengths.flatten(), unsafe=True)
        return sums.view(batch.lengths.shape).clone()  # FSDP hooks its outputs and warns of views
