"""What requests to an endpoint cost, and a limit that holds with many requests in flight."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

WAIT = 0.05  # seconds between two looks at the requests in flight
MILLION = 1_000_000


class OverBudget(Exception):
    """Nothing more may be asked: the budget is spent."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """What requests took. Tokens are None where an endpoint does not say."""

    requests: int = 0
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    cost: float = 0.0  # USD by the prices that were given; 0 without prices

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.requests + other.requests,
            _sum(self.prompt_tokens, other.prompt_tokens),
            _sum(self.completion_tokens, other.completion_tokens),
            self.cost + other.cost,
        )


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


@dataclasses.dataclass
class Tally:
    """What the requests for one question took so far."""

    usage: Usage = dataclasses.field(default_factory=Usage)


class Charge:
    """What one request is charged: the most that it can cost, until somebody knows better."""

    def __init__(self, prices: "Prices", most: float) -> None:
        self.prices, self.usage = prices, Usage(1, None, None, most)

    def nothing(self) -> None:
        """The server turned the request down, and computed nothing."""
        self.usage = Usage(1)

    def tokens(self, prompt: int | None, completion: int | None) -> None:
        """The server says what it computed; where it does not, the most stays charged."""
        cost = self.usage.cost
        if prompt is not None and completion is not None:
            cost = self.prices.cost(prompt, completion)
        self.usage = Usage(1, prompt, completion, cost)


@dataclasses.dataclass(frozen=True)
class Prices:
    """USD per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return what these tokens cost, in USD."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / MILLION


class Budget:
    """Counts requests before they are sent, and keeps them within a limit.

    A request reserves the most that it can cost: a prompt token for every byte of its body (a token has at least one)
    and its `max_tokens`. Once it is answered, what the server says that it took is charged instead. Where the server
    does not say, or no answer came to a request that may have been computed, the reserve stays charged. So the limit
    holds whatever is in flight, as far as the server counts its tokens rightly.
    """

    def __init__(
        self, *, max_requests: int | None = None, max_cost: float | None = None, prices: Prices | None = None
    ) -> None:
        """`max_cost` is in USD and needs `prices`. Without any limit everything is counted all the same."""
        self.max_requests, self.max_cost, self.prices = max_requests, max_cost, prices or Prices()
        self.spent = Usage()  # settled requests; set it to what earlier runs of the same command spent
        self._reserved: list[float] = []  # USD of each request in flight

    @contextlib.asynccontextmanager
    async def request(self, body_bytes: int, max_tokens: int, tally: Tally | None = None) -> AsyncIterator[Charge]:
        """Wait until a request fits in, and charge it, here and in `tally`, when the block ends, however it ends.

        Raises OverBudget if it does not fit, and no request in flight can make room for it.
        """
        most = self.prices.cost(body_bytes, max_tokens)
        while not self._fits(most):
            if not self._reserved or self._requests_used_up():
                raise OverBudget(self._limit())
            await asyncio.sleep(WAIT)
        self._reserved.append(most)
        charge = Charge(self.prices, most)
        try:
            yield charge
        finally:
            self._reserved.remove(most)
            self.spent += charge.usage
            if tally is not None:
                tally.usage += charge.usage

    def _requests_used_up(self) -> bool:
        sent = self.spent.requests + len(self._reserved)
        return self.max_requests is not None and sent >= self.max_requests

    def _fits(self, cost: float) -> bool:
        if self._requests_used_up():
            return False
        return self.max_cost is None or self.spent.cost + sum(self._reserved) + cost <= self.max_cost

    def _limit(self) -> str:
        if self._requests_used_up():
            return f"the budget of --max-requests {self.max_requests} is used up"
        left = max(0.0, (self.max_cost or 0.0) - self.spent.cost)
        return (
            f"the budget of --max-cost {self.max_cost:g} is used up: ${self.spent.cost:.4f} are spent, and the next "
            f"request could cost more than the ${left:.4f} left"
        )
