"""Routers of mixtures of experts: the loss that balances their experts, and the noise that is switched off.

The loss of an example, over its T tokens (the trunk once) and the E experts of a layer, of which each token is sent to
k (Switch Transformer, arXiv 2101.03961, equations 4 to 6; sequence by sequence as in DeepSeek-V2, arXiv 2405.04434):

    L = E * sum over i of f_i P_i,    f_i = tokens sent to expert i / T,    P_i = mean probability of expert i

averaged over the layers, and over the step's examples. It is k where experts are used evenly. f is counted, so the
gradient goes through P. transformers' `load_balancing_loss_func` is the same for one sequence and one layer; it takes
all tokens of a batch, and those of all layers, together. Taken example by example, the loss depends neither on what is
packed together nor on the ranks; taken layer by layer, one layer's imbalance does not hide another's.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from notus.data.packing import Batch
from notus.model.make import make_model
from notus.model.structure import decoder_of, text_config

# Softmax routers of families whose code has no balancing loss of its own.
_SOFTMAX = ("DeepseekV2TopkRouter",)


class Routers:
    """Reads the routers of a model during its forward pass, for the loss that balances them."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        """Find the routers. Works before and after the model is sharded.

        Raises:
            ValueError: there are none, or they are not balanced by such a loss.
        """
        found = {name: module for name, module in decoder_of(causal_lm).named_modules() if _is_router(module)}
        kind = type(causal_lm).__name__
        if not found:
            raise ValueError(f"training.router_aux_loss_coef has no effect: {kind} has no routers; set it to 0")
        for module in found.values():
            _check(module, kind)
        self._routers = list(found.values())
        self._read: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep what the routers give within the context: of the policy's forward pass, not of its recomputation."""
        self._read = {router: [] for router in self._routers}
        hooks = [router.register_forward_hook(self._note) for router in self._routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, router: nn.Module, _: Any, output: Any) -> None:
        self._read[router].append(_logits_and_experts(output))

    def losses(self, batch: Batch) -> Tensor:
        """Return each example's loss, fp32 [E] with gradient, after a forward pass of `batch` within `reading`.

        The pass ran the packed row, or its sequences one by one, unpadded, in the order of the layout's segments.
        """
        ends = batch.layout.query_starts[batch.present.sum(1).cumsum(0)]  # of each example's last segment
        tokens = torch.arange(len(batch.input_ids), device=ends.device)
        examples = torch.bucketize(tokens, ends, right=True)
        read, self._read = self._read, {}
        layers = [_balance(*_of_row(each, batch), examples, len(batch.weights)) for each in read.values() if each]
        assert layers, "the forward pass ran outside of `reading`"
        return torch.stack(layers).mean(0)


def _logits_and_experts(output: Any) -> tuple[Tensor, Tensor]:
    """Of a router's output: logits [N, E], and the experts that it chose [N, k], integers; some give these first."""
    first, _, last = output
    logits, experts = (first, last) if first.is_floating_point() else (last, first)
    assert logits.is_floating_point()
    assert not experts.is_floating_point()
    return logits, experts


def _of_row(read: list[tuple[Tensor, Tensor]], batch: Batch) -> tuple[Tensor, Tensor]:
    """A layer's logits and experts of the row's tokens, each once: of sequences, the trunk is read in the first."""
    logits, experts = (torch.cat(column) for column in zip(*read, strict=True))
    if len(logits) == len(batch.input_ids):
        return logits, experts
    assert len(logits) >= len(batch.layout.key_index)  # more where a rank ran fillers after its sequences
    return logits[batch.layout.first_copy], experts[batch.layout.first_copy]


def _balance(logits: Tensor, experts: Tensor, examples: Tensor, count: int) -> Tensor:
    """The loss of one layer for each of `count` examples, fp32 [count].

    Args:
        logits: [N, E].
        experts: [N, k], those that each token is sent to.
        examples: [N], which example a token is of.
        count: number of examples.
    """
    probabilities = logits.float().softmax(-1)
    member = (examples[:, None] == torch.arange(count, device=examples.device)).float()  # products, since these are
    chosen = torch.zeros_like(probabilities).scatter(1, experts, 1.0)  # deterministic on a GPU, unlike index_add
    sent, summed = member.T @ chosen, member.T @ probabilities
    return logits.shape[-1] * (sent * summed).sum(1) / member.sum(0).square()


def _is_router(module: nn.Module) -> bool:
    """Whether a module of transformers gives logits over experts, weights, and the experts that it chose."""
    kind = type(module).__name__
    return kind.endswith(("Router", "TopKGating", "TopKGate")) or (kind.endswith("Gate") and hasattr(module, "top_k"))


def _check(router: nn.Module, model: str) -> None:
    """Raise ValueError for a router that is no softmax, or is balanced by a bias on its choice."""
    kind, own = type(router).__name__, [*vars(router), *router._parameters, *router._buffers]
    code = sys.modules[type(router).__module__]
    biased = any("correction_bias" in name for name in own)
    if biased or not (kind in _SOFTMAX or hasattr(code, "load_balancing_loss_func")) or kind in _OTHER_OUTPUTS:
        how = "are balanced by a bias on their choice" if biased else "are of another kind"
        raise ValueError(
            f"training.router_aux_loss_coef: the routers of {model} ({kind}) {how}, to which this loss does not apply; "
            "set it to 0"
        )


# Routers whose output is not (logits, weights, experts).
_OTHER_OUTPUTS = ("DbrxRouter", "JetMoeTopKGating")


def check_routers(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Raise ValueError if a model has no routers that `Routers` could read; from its configuration alone."""
    with torch.device("meta"):
        Routers(make_model(config, trust_remote_code=trust_remote_code, attn_implementation=None, dtype=torch.float32))


def asks_for_own_loss(config: PreTrainedConfig) -> bool:
    """Whether a configuration asks for transformers' own router loss, which is no part of the log-probs."""
    return bool(getattr(text_config(config), "output_router_logits", False))


def disable_router_noise(model: nn.Module) -> None:
    """Let every router choose as in evaluation: without jitter on its input and without sampling.

    The reference log-probs hold for the policy at step 0 only if both take the same experts. Modules that add noise are
    known by a field with "jitter" in its name; they take no notice of `train()`.
    """
    for module in model.modules():
        if any("jitter" in name for name in vars(module)) and _quiet not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_quiet)


def _quiet(module: nn.Module, _: Any) -> None:
    module.training = False
