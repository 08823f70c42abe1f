"""Our losses against stored numbers of TRL's own trainers and of authors' own code (see tests/make_golden.py)."""

import itertools
import json
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import make_golden
import pytest
import torch
from torch import Tensor

from notus.losses import (
    LOSSES,
    find_loss,
    label_loss,
    ld_logps,
    list_loss,
    loss_components,
    pair_loss,
    public_sums,
    wpo_weights,
)

Case = dict[str, Any]

INPUTS = json.loads((make_golden.FOLDER / "inputs.json").read_text(encoding="utf-8"))
STORED = {
    name: json.loads((make_golden.FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in ("trl", "authors")
}
CASES = STORED["trl"]["cases"] + STORED["authors"]["cases"]


def title(case: Case) -> str:
    """Name a case by its loss, its options and where it comes from."""
    named = {"beta": case["settings"]["beta"], **case["options"]}
    named |= {key: case[key] for key in ("ld_alpha", "wpo", "kl", "nll_weight") if key in case}
    loss = case["loss"] if isinstance(case["loss"], str) else "+".join(case["loss"])
    source = case.get("trainer") or case["source"].split(" ")[0]
    return " ".join([loss, *(f"{key}={value}" for key, value in named.items()), source])


def flat(name: str) -> Tensor:
    """Return the log-probs of all tokens of all pairs, branch by branch: [M]."""
    return torch.tensor([value for pair in INPUTS["pairs"][name] for row in pair for value in row], dtype=torch.float64)


LENGTHS = torch.tensor([[len(row) for row in pair] for pair in INPUTS["pairs"]["policy"]])
RATINGS = torch.tensor(INPUTS["pairs"]["ratings"], dtype=torch.float64)


def sums(tokens: Tensor) -> Tensor:
    """Return sums over the tokens of each branch: [B, 2]."""
    return torch.stack([row.sum() for row in tokens.split(LENGTHS.flatten().tolist())]).view(-1, 2)


def wpo_weights_without_limit() -> Tensor:
    """Return WPO's weights [B] by a plain expression: means over tokens, and the product over a pair."""
    pairs = zip(INPUTS["pairs"]["policy"], INPUTS["pairs"]["log_collision"], strict=True)
    means = [
        sum((sum(logps) - sum(collision)) / len(logps) for logps, collision in zip(*pair, strict=True))
        for pair in pairs
    ]
    return torch.tensor(means, dtype=torch.float64).exp()


def of_pairs(case: Case) -> tuple[Tensor, Tensor]:
    """Return our losses [B] and their gradients with respect to every token's log-prob [M]."""
    tokens = flat("policy").requires_grad_()
    policy, reference = sums(tokens), sums(flat("reference"))
    plain = policy
    if "ld_alpha" in case:
        policy = ld_logps(policy, public_sums(tokens, LENGTHS), case["ld_alpha"])
        reference = ld_logps(reference, public_sums(flat("reference"), LENGTHS), case["ld_alpha"])
    losses = torch.zeros(len(LENGTHS), dtype=torch.float64)
    for loss, weight in loss_components(case["loss"]).items():
        part, _ = pair_loss(
            loss,
            policy,
            reference if loss.reference else None,
            beta=case["settings"]["beta"],
            options=case["options"],
            lengths=LENGTHS,
            ratings=RATINGS,
        )
        losses = losses + weight * part
    if case.get("wpo"):
        weights, unlimited = wpo_weights(tokens, flat("log_collision"), LENGTHS), wpo_weights_without_limit()
        torch.testing.assert_close(weights, unlimited.clamp(max=1), rtol=1e-12, atol=0)
        losses = losses * (unlimited if "trainer" in case else weights)  # TRL has no limit, the authors and we have
    if "nll_weight" in case and "mean" not in case:  # of one pair, so a mean over its tokens
        losses = losses - case["nll_weight"] * plain[:, 0] / LENGTHS[:, 0]
    (gradient,) = torch.autograd.grad(losses.sum(), tokens)
    return losses, gradient


def of_lists(case: Case) -> tuple[Tensor, Tensor]:
    """Return our losses and gradients of the lists that a case names."""
    rows = {
        name: torch.tensor([INPUTS["lists"][name][i] for i in case["lists"]], dtype=torch.float64)
        for name in INPUTS["lists"]
    }
    policy = rows["policy"].requires_grad_()
    losses, _ = list_loss(
        find_loss(case["loss"]),
        policy,
        rows["reference"],
        beta=case["settings"]["beta"],
        options=case["options"],
        ratings=rows["ratings"],
        mask=None,
    )
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    return losses, gradient


def of_labels(case: Case) -> tuple[Tensor, Tensor]:
    """Return our losses and gradients of the completions with labels."""
    rows = INPUTS["labels"]
    policy = torch.tensor(rows["policy"], dtype=torch.float64, requires_grad=True)
    shift = case.get("shift")
    if "kl" in case:  # the mean log-ratio of the mismatched completions; the reference gives each of them -52
        shift = max(0.0, sum(rows[case["kl"]]) / len(rows[case["kl"]]) + 52)
    losses, _ = label_loss(
        find_loss(case["loss"]),
        policy,
        torch.tensor(rows["reference"], dtype=torch.float64),
        torch.tensor(rows["labels"]),
        beta=case["settings"]["beta"],
        options=case["options"],
        shift=None if shift is None else torch.tensor(shift, dtype=torch.float64),
    )
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    return losses, gradient


def stored_gradient(case: Case) -> Tensor:
    """Return the stored gradient in the shape of ours: of every token, for pairs."""
    if "token_gradients" in case:
        branches = itertools.chain.from_iterable(case["token_gradients"])
        return torch.tensor(list(itertools.chain.from_iterable(branches)), dtype=torch.float64)
    gradients = torch.tensor(case["gradients"], dtype=torch.float64)
    if "lists" in case or gradients.ndim == 1:
        return gradients
    return gradients.flatten().repeat_interleave(LENGTHS.flatten())


@pytest.mark.parametrize("case", CASES, ids=title)
def test_losses_and_gradients_are_the_stored_numbers(case: Case) -> None:
    rows = loss_components(case["loss"]).popitem()[0].rows
    losses, gradient = {"pairs": of_pairs, "lists": of_lists, "labels": of_labels}[rows](case)
    # TRL computes some losses in fp32
    tolerance = 2e-5 if case.get("dtype") == "float32" else 1e-10
    expected = stored_gradient(case)
    if "mean" in case:  # of the whole batch, with the likelihood of its chosen tokens
        chosen, count = sums(flat("policy"))[:, 0].sum(), LENGTHS[:, 0].sum()
        mean = losses.mean() - case["nll_weight"] * chosen / count
        torch.testing.assert_close(mean.item(), case["mean"], rtol=tolerance, atol=0)
        is_chosen = (
            torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(LENGTHS)).repeat_interleave(LENGTHS.flatten())
        )
        gradient = gradient / len(LENGTHS) - case["nll_weight"] * is_chosen / count
    else:
        stored = torch.tensor(case["losses"], dtype=torch.float64)
        # stored as the authors scale it: half of it, or without a constant
        stored = stored / case.get("times", 1.0) + case.get("plus", 0.0)
        expected = expected / case.get("times", 1.0)
        torch.testing.assert_close(losses.detach(), stored, rtol=tolerance, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=1e-12)


def test_the_numbers_cover_every_loss_that_trl_or_authors_code_has() -> None:
    covered = {name for case in CASES for name in ([case["loss"]] if isinstance(case["loss"], str) else case["loss"])}
    without_code = {"dpop", "plackett_luce", "all_pairs", "lipo_lambda"}
    assert covered | without_code == set(LOSSES)


@pytest.mark.skipif(find_spec("trl") is None, reason="to compare with TRL: pip install -r requirements-bench.txt")
def test_trl_still_computes_the_stored_numbers() -> None:
    if version("trl") != STORED["trl"]["trl"]:
        pytest.skip(f"the numbers are of TRL {STORED['trl']['trl']}, installed is {version('trl')}")
    assert make_golden.make_inputs() == INPUTS
    for made, stored in zip(make_golden.make_cases(INPUTS), STORED["trl"]["cases"], strict=True):
        assert {key: made[key] for key in ("loss", "options", "settings")} == {
            key: stored[key] for key in ("loss", "options", "settings")
        }
        for key in ("losses", "mean", "gradients", "token_gradients"):
            assert (key in made) == (key in stored)
            if key in made:
                assert numbers(made[key]) == pytest.approx(numbers(stored[key]), rel=1e-9, abs=1e-12), title(stored)


def numbers(value: Any) -> list[float]:
    """Return the numbers of nested lists, in order."""
    return [number for item in value for number in numbers(item)] if isinstance(value, list) else [value]
