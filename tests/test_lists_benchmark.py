"""A small run of `benchmarks/lists.py`, and what its ways are made of, by hand."""

import numpy as np
import pytest
from toys import toy_examples

from notus.estimate.sizes import Lengths

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_the_rows_of_each_way_by_hand() -> None:
    import lists
    import step

    (prompt,) = toy_examples((10, (1, 2, 3, 4)))
    tokens = {way: [step.num_tokens(row) for row in lists.as_rows([prompt], way)] for way in lists.WAYS}
    assert tokens == {
        "one pair, best and worst": [15],
        "all 6 pairs": [13, 14, 15, 15, 16, 17],
        "one list of 4": [20],
    }
    drawn = Lengths(np.array([10]), np.array([[1, 2, 3, 4]]), "by hand")
    assert {way: lists.lengths_of(drawn, way).totals.tolist() for way in lists.WAYS} == tokens
    assert lists.lengths_of(drawn, "all 6 pairs").branches.tolist() == [[1, 2], [1, 3], [1, 4], [2, 3], [2, 4], [3, 4]]


def test_a_few_prompts_have_the_lengths_of_all() -> None:
    import lists
    import step

    prompts = lists.made_prompts(3, 50, lists.TYPICAL_LIST, max_length=2048, seed=0)
    assert np.mean([step.num_tokens(prompt) for prompt in prompts]) == pytest.approx(176 + 4 * 290, rel=0.01)
    assert np.mean([len(prompt.trunk) for prompt in prompts]) == pytest.approx(176, abs=1)


def test_all_ways_start_at_the_losses_of_an_untrained_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy and reference are one model: ln 2 of a pair, ln 4! of a list of four."""
    import lists

    tiny = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    monkeypatch.setitem(lists.common.SIZES, "tiny", tiny)
    policy = lists.made_policy("tiny", head_dim=8)
    prompts = lists.made_prompts(3, 50, (6, 5, 5, 5, 5), max_length=40, seed=0)
    losses = []
    for way in lists.WAYS:
        rows = lists.packed_rows(prompts, way, 200)
        losses.append(lists.train(policy, rows, lists.reference_pass(policy, rows)))
        assert all(parameter.grad.abs().sum() > 0 for parameter in policy.parameters())
    assert losses == pytest.approx([np.log(2), np.log(2), np.log(24)], rel=1e-5)
    plan = lists.plan_of("one list of 4", "h100")
    monkeypatch.setattr(lists, "plan_of", lambda way, gpu: plan)
    text = lists.report(policy, prompts, 2, 100)
    assert sum(line.startswith("| one list of 4 | ") for line in text.splitlines()) == 2
    assert "3 prompts, 2 rounds" in text


def test_each_round_begins_with_another_way_and_the_first_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import lists

    ticks, order = iter(range(1000)), []
    monkeypatch.setattr(lists, "reference_pass", lambda policy, rows: order.append(rows))
    monkeypatch.setattr(lists, "train", lambda policy, rows, reference: None)
    rounds = lists.measure(None, {"a": "a", "b": "b", "c": "c"}, 2, clock=lambda: next(ticks))
    assert "".join(order) == "abc" + "bca" + "cab"
    assert [set(found) for found in rounds] == [{"a", "b", "c"}] * 2
    assert all(each == lists.Round(1, 1) for found in rounds for each in found.values())
