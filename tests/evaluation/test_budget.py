"""A limit on requests and on money that holds with many requests in flight."""

import asyncio

import pytest

from notus.evaluation.budget import Budget, OverBudget, Prices, Tally, Usage


def test_usage_adds_up_and_one_unknown_count_makes_the_sum_unknown() -> None:
    assert Usage(1, 10, 2, 0.5) + Usage(2, 5, 1, 0.25) == Usage(3, 15, 3, 0.75)
    assert Usage(1, None, 2) + Usage(1, 5, 3) == Usage(2, None, 5)


def test_prices_are_per_million_tokens() -> None:
    assert Prices(2.0, 8.0).cost(500_000, 250_000) == 1.0 + 2.0


def test_requests_in_flight_count() -> None:
    budget = Budget(max_requests=2)

    async def ask(tally: Tally) -> None:
        async with budget.request(10, 10, tally) as charge:
            await asyncio.sleep(0.01)
            charge.tokens(3, 4)

    async def ask_all() -> list[BaseException | None]:
        return await asyncio.gather(*(ask(tally) for tally in tallies), return_exceptions=True)

    tallies = [Tally() for _ in range(5)]
    outcomes = asyncio.run(ask_all())
    assert [type(each) for each in outcomes] == [type(None)] * 2 + [OverBudget] * 3
    assert budget.spent == Usage(2, 6, 8)
    assert [tally.usage.requests for tally in tallies] == [1, 1, 0, 0, 0]


def test_a_request_waits_for_the_room_that_another_may_leave() -> None:
    """Each may cost $1 and costs $0.1: of $1.05 the second must wait for the first, and the third is too much."""
    budget = Budget(max_cost=1.15, prices=Prices(completion=1_000_000.0))
    together = 0

    async def ask() -> None:
        nonlocal together
        async with budget.request(100, 1) as charge:
            together += 1
            assert together == 1
            await asyncio.sleep(0.01)
            together -= 1
            charge.usage = Usage(1, 0, 0, 0.1)

    async def ask_all() -> list[BaseException | None]:
        return await asyncio.gather(ask(), ask(), ask(), return_exceptions=True)

    outcomes = asyncio.run(ask_all())
    assert [type(each) for each in outcomes] == [type(None), type(None), OverBudget]
    assert budget.spent.cost == pytest.approx(0.2)


def test_what_is_not_answered_stays_charged_and_what_is_turned_down_does_not() -> None:
    budget = Budget(prices=Prices(1_000_000.0, 1_000_000.0))
    tally = Tally()

    async def ask(outcome: str) -> None:
        async with budget.request(5, 2, tally) as charge:
            if outcome == "rejected":
                charge.nothing()
            if outcome == "uncounted":
                charge.tokens(None, 1)
            raise RuntimeError(outcome)

    for outcome, cost in (("lost", 7.0), ("rejected", 0.0), ("uncounted", 7.0)):
        before = budget.spent.cost
        with pytest.raises(RuntimeError):
            asyncio.run(ask(outcome))
        assert budget.spent.cost - before == cost
    assert tally.usage == budget.spent == Usage(3, None, None, 14.0)


def test_what_earlier_runs_spent_counts() -> None:
    budget = Budget(max_requests=3)
    budget.spent = Usage(3)

    async def ask() -> None:
        async with budget.request(1, 1):
            pass

    with pytest.raises(OverBudget, match="--max-requests 3"):
        asyncio.run(ask())
