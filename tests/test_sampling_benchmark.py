"""A small run of `benchmarks/sampling.py`, and its table by hand."""

import pytest
from toys import toy_model, toy_tokenizer

from notus.data.chat import ChatEncoder
from notus.evaluation.decoding import Decoding

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_the_table_by_hand() -> None:
    import sampling

    rounds = [
        {"plain": sampling.Timing(10, 2.0, 5.0), "shared": sampling.Timing(12, 2.0, 2.0)},
        {"plain": sampling.Timing(10, 1.0, 4.0), "shared": sampling.Timing(10, 2.0, 2.0)},
        {"plain": sampling.Timing(10, 5.0, 10.0), "shared": sampling.Timing(10, 2.0, 2.0)},
    ]
    # per processor second: 2, 2.5, 1 and 6, 5, 5; per second: 5, 10, 2 and 6, 5, 5
    assert sampling.report(("plain", "shared"), rounds).splitlines()[2:] == [
        "| plain | 2.0 | 1.00 | 5.0 | 1.00 |",
        "| shared | 5.0 | 3.00 (2.00 to 5.00) | 5.0 | 1.20 (0.50 to 2.50) |",
    ]


def test_a_small_run_completes_all_and_each_round_begins_with_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import sampling

    order, complete = [], sampling.complete
    monkeypatch.setattr(sampling, "complete", lambda way, *rest: order.append(way) or complete(way, *rest))
    tokenizer = toy_tokenizer()
    prompts = sampling.make_prompts(tokenizer, 2, 20, real=True)
    decoding = Decoding(3, temperature=1.0, samples=2, batch_size=4)
    rounds = sampling.measure(("plain", "shared"), toy_model(), ChatEncoder(tokenizer), prompts, decoding, 2)
    assert order == ["plain", "shared"] * 2 + ["shared", "plain"]
    assert len(rounds) == 2
    for timing in (timing for found in rounds for timing in found.values()):
        assert 4 <= timing.tokens <= 12
        assert timing.wall > 0


def test_ways_that_say_something_else_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sampling

    timing = sampling.Timing(1, 1.0, 1.0)
    monkeypatch.setattr(sampling, "complete", lambda way, *rest: ([way], timing))
    with pytest.raises(AssertionError, match="shared and plain differ"):
        sampling.measure(("plain", "shared"), None, None, [], Decoding(), 1)
