"""Losses and metrics of rows, from numbers worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from notus.config import DPOConfig
from notus.losses import LOSSES, dpo_loss, ld_logps, pair_loss
from notus.training.objective import (
    Measured,
    Objective,
    Scored,
    Totals,
    check_ratings,
    objective_of,
    ratings_or_order,
)

PAIRS = {
    # log-ratios c = 1, -2 and r = -1, 2
    "policy": Measured(torch.tensor([[-9.0, -21.0], [-12.0, -8.0]])),
    "reference": torch.tensor([[-10.0, -20.0], [-10.0, -10.0]]),
    "lengths": torch.tensor([[2, 4], [5, 3]]),
    "weights": torch.ones(2),
}
LISTS = {
    # log-ratios 3, 1, 2 and 0, 1: of the first list two of three pairs are in order, of the second none
    "policy": Measured(torch.tensor([[-2.0, -4.0, -3.0], [-5.0, -4.0, 77.0]])),
    "reference": torch.tensor([[-5.0, -5.0, -5.0], [-5.0, -5.0, 9.0]]),
    "lengths": torch.tensor([[1, 2, 3], [4, 5, 0]]),
    "weights": torch.ones(2),
    "ratings": torch.tensor([[5.0, 3.0, 1.0], [4.0, 2.0, 0.0]]),
}
LABELS = {
    # log-ratios 2, -1, 3: good, bad, bad
    "policy": Measured(torch.tensor([[-3.0], [-6.0], [-2.0]])),
    "reference": torch.tensor([[-5.0], [-5.0], [-5.0]]),
    "lengths": torch.tensor([[2], [3], [4]]),
    "weights": torch.ones(3),
    "labels": torch.tensor([True, False, False]),
}


def metrics_of(objective: Objective, rows: Scored, totals: Totals | None = None) -> dict[str, float]:
    outcome = objective(rows, totals or Totals(len(rows.weights), int(rows.lengths[:, 0].sum())))
    sums = objective.sums(rows, outcome)
    assert sums.shape == (objective.num_sums,)
    assert sums.dtype == torch.float64
    return objective.metrics(sums.tolist())


def test_metrics_of_pairs() -> None:
    found = metrics_of(objective_of(DPOConfig(beta=0.5)), Scored(**PAIRS))
    assert found == pytest.approx({
        # margins 0.5 * 2 and 0.5 * -4
        "loss": (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2,
        "rewards/chosen": 0.5 * (1 - 2) / 2,
        "rewards/rejected": 0.5 * (-1 + 2) / 2,
        "rewards/margins": 0.5 * (2 - 4) / 2,
        "rewards/accuracies": 0.5,
        "logps/chosen": -10.5,
        "logps/rejected": -14.5,
        "logps/chosen_change": (1 - 2) / 7,
    })  # fmt: skip


def test_a_sum_of_losses_logs_each_and_rewards_are_those_of_one_with_a_reference() -> None:
    config = DPOConfig(beta=0.5, loss_type={"cpo": 0.25, "hinge": 2.0}, nll_weight=3.0, nll_mean="completions")
    found = metrics_of(objective_of(config), Scored(**PAIRS))
    # CPO: margins 0.5 * (-9 + 21) = 6 and 0.5 * (-12 + 8) = -2
    cpo, hinge = (math.log1p(math.exp(-6)) + math.log1p(math.exp(2))) / 2, (0 + 3) / 2
    nll = (9 / 2 + 12 / 5) / 2
    assert found["loss/cpo"] == pytest.approx(cpo)
    assert found["loss/hinge"] == pytest.approx(hinge)
    assert found["nll_loss"] == pytest.approx(nll)
    assert found["loss"] == pytest.approx(0.25 * cpo + 2 * hinge + 3 * nll)
    assert found["rewards/chosen"] == pytest.approx(-0.25)
    assert found["rewards/margins"] == pytest.approx(-0.5)


def test_a_weight_counts_where_it_stands_alone() -> None:
    plain = objective_of(DPOConfig(loss_type="hinge"))(Scored(**PAIRS), Totals(2, 7)).losses
    halved = objective_of(DPOConfig(loss_type={"hinge": 0.5}))(Scored(**PAIRS), Totals(2, 7)).losses
    assert halved.tolist() == (0.5 * plain).tolist()
    assert "loss/hinge" not in metrics_of(objective_of(DPOConfig(loss_type={"hinge": 0.5})), Scored(**PAIRS))


def test_the_nll_over_tokens_does_not_depend_on_how_a_step_is_cut() -> None:
    objective = objective_of(DPOConfig(nll_weight=1.0))
    rows = Scored(**PAIRS)
    halves = [Scored(Measured(rows.policy.logps[at]), rows.reference[at], rows.lengths[at], rows.weights[at])
              for at in (slice(0, 1), slice(1, 2))]  # fmt: skip
    totals = Totals(2, 7)
    whole = objective(rows, totals).losses
    assert torch.cat([objective(half, totals).losses for half in halves]).tolist() == whole.tolist()
    assert metrics_of(objective, rows)["nll_loss"] == pytest.approx(21 / 7)
    plain = objective_of(DPOConfig())(rows, totals).losses
    assert (whole - plain).mean().item() == pytest.approx(21 / 7)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.rows == "pairs"])
def test_every_loss_of_pairs_is_its_function(name: str) -> None:
    loss = LOSSES[name]
    smoothing = 0.1 if name in ("exo_pair", "robust") else 0.0
    config = DPOConfig(beta=0.3, loss_type=name, label_smoothing=smoothing)
    ratings = torch.tensor([[5.0, 2.0], [4.0, 3.0]]) if loss.ratings else None
    rows = Scored(**PAIRS, ratings=ratings)
    outcome = objective_of(config)(rows, Totals(2, 7))
    reference = PAIRS["reference"].unbind(1) if loss.reference else (None, None)
    lengths = {"chosen_lengths": rows.lengths[:, 0], "rejected_lengths": rows.lengths[:, 1]}
    rated = {} if ratings is None else {"chosen_ratings": ratings[:, 0], "rejected_ratings": ratings[:, 1]}
    expected, chosen, rejected = dpo_loss(
        *rows.policy.logps.unbind(1),
        *reference,
        beta=0.3,
        loss_type=name,
        label_smoothing=smoothing,
        **lengths,
        **rated,
    )
    assert torch.equal(outcome.losses, expected)
    assert torch.equal(outcome.rewards, torch.stack([chosen, rejected], dim=1))
    assert ("logps/chosen_change" in metrics_of(objective_of(config), rows)) == loss.reference


def test_without_a_reference_rewards_are_those_of_the_loss() -> None:
    rows = Scored(**{**PAIRS, "reference": None})
    objective = objective_of(DPOConfig(beta=2.0, loss_type="simpo"))
    assert not objective.reference
    found = metrics_of(objective, rows)
    assert found["rewards/chosen"] == pytest.approx(2 * (-9 / 2 - 12 / 5) / 2)
    assert found["rewards/accuracies"] == 1.0  # -4.5 against -5.25, -2.4 against -2.67: both right
    assert "logps/chosen_change" not in found
    assert found["logps/chosen_per_token"] == pytest.approx(-21 / 7)


def test_ld_dpo_compares_weighted_tokens_and_its_rewards_are_of_whole_completions() -> None:
    public, public_reference = torch.tensor([[-9.0, -10.0], [-7.0, -8.0]]), torch.tensor([[-10.0, -9.0], [-6.0, -10.0]])
    rows = Scored(**{**PAIRS, "policy": Measured(PAIRS["policy"].logps, public)}, public_reference=public_reference)
    outcome = objective_of(DPOConfig(beta=0.5, ld_alpha=0.25))(rows, Totals(2, 7))
    policy, reference = ld_logps(rows.policy.logps, public, 0.25), ld_logps(PAIRS["reference"], public_reference, 0.25)
    expected, _ = pair_loss(LOSSES["sigmoid"], policy, reference, beta=0.5)
    assert torch.equal(outcome.losses, expected)
    # first pair: c = -9 + 10 = 1, r = (-10 + 0.25 * -11) - (-9 + 0.25 * -11) = -1
    assert outcome.losses[0].item() == pytest.approx(math.log1p(math.exp(-1)))
    assert outcome.rewards.tolist() == [[0.5, -0.5], [-1.0, 1.0]]


def test_wpo_weighs_each_pair() -> None:
    likelihood = torch.tensor([0.5, 0.25])
    rows = Scored(**{**PAIRS, "policy": Measured(PAIRS["policy"].logps, likelihood=likelihood)})
    config = DPOConfig(wpo=True, loss_type={"hinge": 2.0, "sigmoid": 1.0}, nll_weight=1.0)
    plain = objective_of(DPOConfig(loss_type={"hinge": 2.0, "sigmoid": 1.0}))(Scored(**PAIRS), Totals(2, 7))
    nll = torch.tensor([9.0, 12.0]) * 2 / 7
    outcome = objective_of(config)(rows, Totals(2, 7))
    torch.testing.assert_close(outcome.losses, likelihood * plain.losses + nll)
    torch.testing.assert_close(outcome.parts["loss/hinge"], likelihood * plain.parts["loss/hinge"])


def test_a_table_holds_what_was_measured() -> None:
    objective = objective_of(DPOConfig(wpo=True, ld_alpha=0.5))
    table = torch.arange(10.0).view(2, 5)
    assert objective.table_width(2) == 5
    found = objective.read_table(table, 2)
    assert found.logps.tolist() == [[0, 1], [5, 6]]
    assert found.public.tolist() == [[2, 3], [7, 8]]
    assert found.likelihood.tolist() == [4, 9]


def test_metrics_of_lists() -> None:
    found = metrics_of(objective_of(DPOConfig(beta=0.5, loss_type="all_pairs")), Scored(**LISTS))

    def loss(margin: float) -> float:
        return math.log1p(math.exp(-0.5 * margin))

    assert found == pytest.approx({
        "loss": ((loss(2) + loss(1) + loss(-1)) / 3 + loss(-1)) / 2,
        "rewards/chosen": 0.5 * (3 + 0) / 2,
        "rewards/rejected": 0.5 * (2 + 1) / 2,  # the last that is there
        "rewards/margins": 0.0,
        "rewards/accuracies": 2 / 4,
        "rewards/kendall_tau": (1 / 3 - 1) / 2,
        "rewards/top_1": 0.5,
        "logps/chosen": -3.5,
        "logps/rejected": -3.5,
        "logps/chosen_change": 3 / 5,
    })  # fmt: skip


def test_lists_whose_ratings_are_all_equal_say_nothing_of_the_order() -> None:
    rows = Scored(**{**LISTS, "ratings": torch.ones(2, 3)})
    found = metrics_of(objective_of(DPOConfig(loss_type="plackett_luce")), rows)
    assert "rewards/kendall_tau" not in found
    assert "rewards/accuracies" not in found
    assert "rewards/top_1" not in found


def test_a_missing_completion_gets_no_gradient() -> None:
    logps = LISTS["policy"].logps.clone().requires_grad_()
    for name in (name for name, loss in LOSSES.items() if loss.rows == "lists"):
        rows = Scored(**{**LISTS, "policy": Measured(logps)})
        outcome = objective_of(DPOConfig(loss_type=name))(rows, Totals(2, 5))
        (gradient,) = torch.autograd.grad(outcome.losses.sum(), logps)
        assert gradient[1, 2] == 0
        assert outcome.rewards[1, 2] == 0
        assert gradient.abs().sum() > 0


def _labelled(shift: float, **more: Any) -> Scored:
    kl = torch.tensor(shift)
    return Scored(**LABELS, shifts={"kl": kl, "running_mean": kl}, **more)


def test_metrics_of_labels() -> None:
    found = metrics_of(objective_of(DPOConfig(beta=0.5, loss_type="kto")), _labelled(0.5))

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    assert found == pytest.approx({
        "loss": (1 - sigmoid(0.75) + sigmoid(-0.75) + sigmoid(1.25)) / 3,
        "rewards/chosen": 1.0,
        "rewards/rejected": 0.5 * (-1 + 3) / 2,
        "rewards/margins": 1.0 - 0.5,
        "rewards/accuracies": 2 / 3,  # 1 > 0.25, -0.5 < 0.25, 1.5 > 0.25
        "logps/chosen": -3.0,
        "logps/rejected": -4.0,
        "logps/chosen_change": 2 / 2,
        "kl": 0.5,
    })  # fmt: skip


def test_bco_subtracts_a_shift_of_rewards() -> None:
    found = metrics_of(objective_of(DPOConfig(beta=0.5, loss_type="bco")), _labelled(-0.75))
    # rewards 1, -0.5, 1.5 less -0.75
    assert found["loss"] == pytest.approx(sum(map(_softplus, (-1.75, 0.25, 2.25))) / 3)
    assert found["rewards/accuracies"] == pytest.approx(1 / 3)
    assert found["rewards/shift"] == -0.75


def _softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def test_a_step_of_good_labels_alone_has_no_metrics_of_bad_ones() -> None:
    rows = Scored(**{**LABELS, "labels": torch.ones(3, dtype=torch.bool)}, shifts={"kl": torch.tensor(0.0)})
    found = metrics_of(objective_of(DPOConfig(loss_type="kto")), rows)
    assert "rewards/rejected" not in found
    assert "rewards/margins" not in found
    assert "logps/rejected" not in found
    assert all(map(math.isfinite, found.values()))


def test_fillers_weigh_nothing() -> None:
    for rows, name in ((PAIRS, "sigmoid"), (LISTS, "plackett_luce"), (LABELS, "kto")):
        shifts = {"shifts": {"kl": torch.tensor(0.1)}} if name == "kto" else {}
        objective = objective_of(DPOConfig(loss_type=name))
        doubled: dict[str, Any] = {
            key: torch.cat([value, value]) for key, value in rows.items() if isinstance(value, Tensor)
        }
        doubled["policy"] = Measured(torch.cat([rows["policy"].logps, rows["policy"].logps - 3]))
        count = len(rows["weights"])
        doubled["weights"] = torch.tensor([1.0] * count + [0.0] * count)
        totals = Totals(count, int(rows["lengths"][:, 0].sum()))
        found = metrics_of(objective, Scored(**doubled, **shifts), totals)
        assert found == pytest.approx(metrics_of(objective, Scored(**rows, **shifts), totals))


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        ([1, 0], {}, None),
        ([1, 1, 1, 0, 0], {}, None),
        ([1, 1, 0], {}, "note: 2 training rows are good and 1 bad; weighted, 2 to 1."),
        ([1, 1, 0], {"undesirable_weight": 1.5}, None),
        ([1, 0, 0], {"desirable_weight": 1.5}, "note: 1 training rows are good and 2 bad; weighted, 1.5 to 2."),
        ([1, 1], {}, "warning: no training row is bad"),
        ([0], {}, "warning: no training row is good"),
    ],
)
def test_kto_says_once_that_its_labels_are_not_balanced(
    labels: list[int], options: dict[str, Any], expected: str | None
) -> None:
    given = torch.tensor(labels, dtype=torch.bool)
    present = torch.ones(len(given), 1) > 0
    _check_notes(objective_of(DPOConfig(loss_type="kto", options=options)).notes(None, given, present), expected)
    one_sided = expected is not None and "warning" in expected
    notes = objective_of(DPOConfig(loss_type="bco")).notes(None, given, present)
    _check_notes(notes, expected if one_sided else None)


def _check_notes(notes: list[str], expected: str | None) -> None:
    assert len(notes) == (expected is not None)
    assert expected is None or expected in notes[0]


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        ("odpo", {}, "in 2 of 3 training rows, no answer is rated below the first one: 'odpo' learns nothing"),
        ("odpo", {"odpo_alpha": 0.0}, None),
        ({"sigmoid": 1.0, "odpo": 1.0, "slic": 1.0}, {"slic_delta": 1e-3}, "the first one: 'odpo' learns nothing"),
        ("sigmoid", {}, None),
    ],
)
def test_pairs_that_are_ignored_for_their_ratings_are_counted(
    loss: str, options: dict[str, float], expected: str | None
) -> None:
    ratings = torch.tensor([[5.0, 1.0], [3.0, 3.0], [2.0, 4.0]])
    notes = objective_of(DPOConfig(loss_type=loss, options=options)).notes(ratings, None, torch.ones(3, 2) > 0)
    _check_notes(notes, expected)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.rows == "lists"])
def test_lists_that_are_ignored_for_their_ties_are_counted(name: str) -> None:
    ratings = torch.tensor([[5.0, 5.0, 0.0], [5.0, 5.0, 5.0], [5.0, 4.0, 0.0], [-1.0, -2.0, 0.0]])
    present = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0]]) > 0
    expected = f"in 2 of 4 training rows, no answer is rated below the first one: {name!r} learns nothing from them"
    notes = objective_of(DPOConfig(loss_type=name)).notes(ratings, None, present)
    _check_notes(notes, expected if name in ("all_pairs", "lipo_lambda") else None)


@pytest.mark.parametrize(
    ("name", "best", "options", "expected"),
    [
        ("lipo_lambda", 100.0, {}, "the best rating is 100, and 'lipo_lambda' weighs by 2^(rating / 1)"),
        ("lipo_lambda", 100.0, {"rating_scale": 100.0}, None),
        ("lipo_lambda", 10.0, {}, None),
        ("info_nca", 100.0, {}, None),
    ],
)
def test_ratings_that_are_large_for_lipo_are_named(
    name: str, best: float, options: dict[str, float], expected: str | None
) -> None:
    objective = objective_of(DPOConfig(loss_type=name, options=options))
    _check_notes(objective.notes(torch.tensor([[best, 1.0]]), None, torch.ones(1, 2) > 0), expected)


def test_lists_without_ratings_have_their_own_order() -> None:
    tokens = np.array([[3, 2, 1], [1, 1, 0], [1, 1, 0], [2, 2, 2]])
    nan = float("nan")
    ratings = np.array([[5, 5, 1], [4, 2, nan], [4, nan, nan], [nan, 2, 1]], dtype=np.float32)
    assert ratings_or_order(ratings, tokens).tolist() == [[5, 5, 1], [4, 2, 0], [3, 2, 0], [3, 2, 1]]
    assert ratings_or_order(None, tokens[:2]).tolist() == [[3, 2, 1], [3, 2, 0]]


def test_a_missing_rating_is_named() -> None:
    tokens, nan = np.array([[3, 2], [1, 1], [2, 2]]), float("nan")
    place = "file.jsonl, line {}".format
    check_ratings(np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32), tokens, place, "key")
    check_ratings(np.array([[1, nan]], dtype=np.float32), np.array([[1, 0]]), place, "key")
    with pytest.raises(ValueError, match=r"^key, but 2 of 3 rows have .* \(the first: file\.jsonl, line 1\)"):
        check_ratings(np.array([[1, 2], [nan, 4], [5, nan]], dtype=np.float32), tokens, place, "key")
    with pytest.raises(ValueError, match="3 of 3 rows"):
        check_ratings(None, tokens, place, "key")
