"""On a CUDA device (a fake one): every loss stays on it, and the host never waits for it."""

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from torch import Tensor

from notus.losses import LOSSES, label_loss, ld_logps, list_loss, nll_loss, pair_loss, public_sums, wpo_weights


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=CUDA)


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_waits_for_the_device(name: str) -> None:
    loss = LOSSES[name]
    options = {"label_smoothing": 0.1} if loss.option("label_smoothing") else {}
    options |= {"f_divergence": "alpha_divergence"} if loss.option("f_divergence") else {}
    with fake_cuda() as waits:
        shape = {"pairs": (3, 2), "lists": (3, 4), "labels": (3,)}[loss.rows]
        policy, reference = ones(*shape), ones(*shape) if loss.reference else None
        if loss.rows == "pairs":
            lengths = ones(3, 2, dtype=torch.long)
            results = pair_loss(
                loss, policy, reference, beta=0.1, options=options, lengths=lengths, ratings=ones(3, 2)
            )  # fmt: skip
        elif loss.rows == "lists":
            mask = ones(3, 4, dtype=torch.bool)
            results = list_loss(loss, policy, reference, beta=0.1, options=options, ratings=ones(3, 4), mask=mask)
        else:
            labels = ones(3, dtype=torch.bool)
            results = label_loss(loss, policy, reference, labels, beta=0.1, options=options, shift=ones())
    assert waits.found == []
    assert all(result.is_cuda for result in results)


def test_nor_do_log_probs_and_weights_from_tokens() -> None:
    with fake_cuda() as waits:
        tokens, lengths = ones(12), ones(3, 2, dtype=torch.long)
        public = public_sums(tokens, lengths)
        results = [ld_logps(public, public, 0.5), wpo_weights(tokens, tokens, lengths)]
        results.append(nll_loss(public[:, 0], lengths[:, 0]))
    assert waits.found == []
    assert all(result.is_cuda for result in results)
