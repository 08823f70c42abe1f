"""A judge behind an OpenAI-compatible endpoint: all completions of a prompt in one request, answered as JSON."""

import argparse
import asyncio
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from notus.evaluation.budget import Budget, OverBudget, Prices, Tally
from notus.evaluation.endpoint import Endpoint, EndpointError, RejectedError, ask_all
from notus.feedback.instructions import Instructions, answer_schema, read_instructions
from notus.feedback.judge import Annotation, JudgeError, NotAsked, Question, Verdict
from notus.feedback.parse_ratings import parse_ratings
from notus.runtime.process import tell

READINGS = 2  # replies in words that are asked for until one holds a rating
REMINDER = "\n\nNo rating could be read in your last reply to this. Answer with the JSON object alone."
SHOWN = 200  # characters of a reply in a message


def make_judge(args: argparse.Namespace) -> "EndpointJudge":
    """Return the judge that `args` name; no key is sent where its variable is unset, as for a local server."""
    prices = Prices(args.price_in or 0.0, args.price_out or 0.0)
    endpoint = Endpoint(
        args.judge_url,
        args.judge_model,
        api_key=os.environ.get(args.api_key_env, "").strip() or None,
        timeout=args.judge_timeout,
        max_tokens=args.max_new_tokens,
        budget=Budget(max_requests=args.max_requests, max_cost=args.max_cost, prices=prices),
    )
    return EndpointJudge(endpoint, read_instructions(args.instructions, args.aspects), args.parallel)


class EndpointJudge:
    """Asks a chat model. It wants JSON by a schema; a server that rejects this is asked in words alone, from then on.

    The form is asked for in words in either case, so a server that ignores the schema is no different.
    """

    shared = False  # requests overlap within one process

    def __init__(self, endpoint: Endpoint, instructions: Instructions, parallel: int) -> None:
        """`endpoint` needs a budget, which may be without limits."""
        assert endpoint.budget is not None
        self.endpoint, self.instructions, self.parallel = endpoint, instructions, parallel
        self.budget = endpoint.budget
        self.name = endpoint.model
        # not the address, which moves, nor the most tokens, which decide about replies that were cut alone
        self.identity = f"endpoint\n{endpoint.model}\n{endpoint.temperature}\n{instructions.digest}"
        self._sampling: dict[str, Any] = {"max_tokens": endpoint.max_tokens, "temperature": endpoint.temperature}
        self._by_schema: bool | None = None  # whether the server takes a schema; None: not known yet
        self._has_answered = False  # whether the server took our parameters
        self._was_cut = False  # whether a reply was too long, which is noted once

    def rate(self, questions: Sequence[Question], done: Callable[[Question, Verdict | JudgeError], None]) -> None:
        """Ask, several at a time. Raises ValueError and KeyboardInterrupt as `ask_all`."""
        asked: set[str] = set()

        async def ask(question: Question) -> Verdict:
            asked.add(question.key)
            tally = Tally()
            try:
                return dataclasses.replace(await self._ask(question, tally), usage=tally.usage)
            except (EndpointError, OverBudget, asyncio.CancelledError) as error:
                # what it cost so far is spent all the same
                kind = NotAsked if isinstance(error, OverBudget) and not tally.usage.requests else JudgeError
                failures[question.key] = kind(str(error) or "stopped before the answer came", tally.usage)
                if isinstance(error, asyncio.CancelledError):
                    done(question, failures[question.key])
                    raise
                raise EndpointError(str(error)) from error

        failures: dict[str, JudgeError] = {}

        def on_done(question: Question, outcome: Verdict | Exception) -> None:
            if isinstance(outcome, Verdict):
                done(question, outcome)
            elif question.key in asked:
                done(question, failures.get(question.key) or JudgeError(str(outcome)))
            else:
                done(question, NotAsked(str(outcome)))

        ask_all(ask, questions, parallel=self.parallel, on_done=on_done)

    async def _ask(self, question: Question, tally: Tally) -> Verdict:
        """Ask until a rating can be read. What one reply lacks is left out: only a reply without any is asked again."""
        text = self.instructions.text(question)
        if self._by_schema is not False:
            annotations = await self._ask_by_schema(text, question, tally)
            if annotations is not None:
                self._by_schema = True
                return Verdict(annotations)
        for _ in range(READINGS):
            reply = await self._complete(text, question, tally, schema=False)
            annotations = self._read(reply, question)
            if annotations is not None:
                self._note_words()
                return Verdict(annotations)
            text = self.instructions.text(question) + REMINDER
        raise EndpointError(f"{question.place}: no rating in its replies, the last: {reply[:SHOWN]!r}")

    async def _ask_by_schema(self, text: str, question: Question, tally: Tally) -> list[dict[str, Annotation]] | None:
        """Return the annotations; None if the server rejects the schema, or a rating cannot be read all the same."""
        try:
            return self._read(await self._complete(text, question, tally, schema=True), question)
        except RejectedError:
            if self._by_schema:  # then it is the question that it rejects
                raise
            return None

    def _adapt(self, error: str) -> bool:
        """Send other parameters from now on, where the server's message names one of ours; whether there is a change.

        Models that reason take `max_completion_tokens`, and no temperature. After a first reply the parameters are
        known to be fine, and such a word in a message is something else, such as a part of the question.
        """
        if self._has_answered:
            return False
        sent = self._sampling
        if "max_tokens" in sent and "max_completion_tokens" in error:
            self._sampling = {**sent, "max_completion_tokens": sent["max_tokens"]}
            del self._sampling["max_tokens"]
        elif "temperature" in sent and "temperature" in error:
            self._sampling = {name: value for name, value in sent.items() if name != "temperature"}
            tell(f"note: {self.name} takes no temperature of {sent['temperature']:g}: it is asked with its own")
        return self._sampling is not sent

    def _note_words(self) -> None:
        """Remember that words served where a schema did not, unless it has served before."""
        if self._by_schema is None:
            tell(f"note: {self.name} gives no ratings by a JSON schema: it is asked for JSON in words alone")
            self._by_schema = False

    def _read(self, reply: str, question: Question) -> list[dict[str, Annotation]] | None:
        return parse_ratings(reply, len(question.completions), self.instructions.aspects)

    async def _complete(self, text: str, question: Question, tally: Tally, *, schema: bool) -> str:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        if schema:
            wanted = answer_schema(len(question.completions), self.instructions.aspects)
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "ratings", "strict": True, "schema": wanted},
            }
        while True:
            sampling = self._sampling
            try:
                reply = await self.endpoint.complete({**body, **sampling}, tally)
                self._has_answered = True
                break
            except RejectedError as error:
                if self._sampling is sampling and not self._adapt(str(error)):  # another question may have changed it
                    raise
        if reply.finish_reason == "length" and not self._was_cut:
            self._was_cut = True
            tell(f"note: a reply of {self.name} was cut at --max-new-tokens {self.endpoint.max_tokens}; set it higher")
        return reply.text
