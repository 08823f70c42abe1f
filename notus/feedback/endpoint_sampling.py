"""Completions from a model behind an OpenAI-compatible endpoint: one request for each, kept as they come.

`n` would ask for several at once, but many servers ignore or reject it. So each completion has a request and a seed of
its own. What is common to all is asked as it is; `seed` and `top_k` are left out where the server rejects them.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from notus.evaluation.endpoint import Endpoint, EndpointError, OverBudget, RejectedError, Reply, ask_all
from notus.evaluation.prompts import Prompt
from notus.evaluation.results import append_records, read_records
from notus.runtime.process import tell

_MESSAGE_KEYS = ("role", "content", "tool_calls", "name", "tool_call_id")  # of a turn; others are this project's own
QUIET = 60.0  # seconds between two lines about the progress, where there is no terminal
_OPTIONAL = ("seed", "top_k")  # what may be left out where a server rejects it: other draws, but no other request


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an endpoint is asked."""

    samples: int  # completions of each prompt
    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int  # of all completions, whose own seeds follow from it


@dataclasses.dataclass(frozen=True)
class Draw:
    """One completion to ask for."""

    prompt: int  # which prompt of the call
    sample: int  # which completion of that prompt
    seed: int


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What a model gave: of each prompt the completions, as records have them, without those that failed."""

    completions: list[list[dict[str, Any]]]
    failures: list[str] = dataclasses.field(default_factory=list)  # a message for each completion that failed
    requests: int = 0
    seconds: float = 0.0  # that the completions below took
    new_tokens: int = 0  # of the completions that this process computed
    over_budget: int = 0  # completions that were not asked for, because the budget is used up

    @property
    def tokens_per_second(self) -> float | None:
        """None where nothing was computed, or the tokens are not known."""
        return self.new_tokens / self.seconds if self.new_tokens and self.seconds else None


def draws(prompts: Sequence[str], occurrences: Sequence[int], sampling: Sampling, model: str) -> list[Draw]:
    """Return what is asked for, prompt after prompt.

    Each seed is a hash of `sampling.seed`, the model, the prompt, how often it came before (`occurrences`) and the
    sample's number. A server draws the same random numbers from equal seeds: with one seed for all prompts, their
    completions would not be independent, nor those of two models.
    """
    return [
        Draw(number, sample, _seed([sampling.seed, model, prompt, before, sample]))
        for number, (prompt, before) in enumerate(zip(prompts, occurrences, strict=True))
        for sample in range(sampling.samples)
    ]


def _seed(value: Any) -> int:
    """Return a hash of a JSON value below 2^31, which every server takes."""
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:4], "big") >> 1


class EndpointSampler:
    """Asks an endpoint for completions; finished ones are in the file `kept`, so the same call resumes."""

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        sampling: Sampling,
        kept: Path,
        *,
        parallel: int,
        max_requests: int | None = None,
    ) -> None:
        """`max_requests`: in all, those of earlier calls included, which `kept` knows of."""
        self.name, self.sampling, self.kept, self.parallel = name, sampling, kept, parallel
        self.max_requests, self.requests = max_requests, kept_requests(kept)
        self.noted = self.requests  # of the requests, those that `kept` knows of
        self.endpoint = dataclasses.replace(endpoint, on_request=self._count)
        self.left_out: set[str] = set()  # of _OPTIONAL, what the server rejects
        self.limit_key = "max_tokens"  # or max_completion_tokens, as newer servers call it
        self.over = False  # the budget is used up

    def sample(self, prompts: Sequence[Prompt], asked: Sequence[Draw]) -> Sampled:
        """Ask for the completions that are not kept yet; several at a time.

        Raises ValueError if the server rejects every request (key, address, model's name), or the file holds something
        else; KeyboardInterrupt as `ask_all`.
        """
        done = self._read()
        left = [draw for draw in asked if (draw.prompt, draw.sample) not in done]
        failures: list[str] = []
        new_tokens, start = 0, time.monotonic()
        told = start
        with tqdm(total=len(asked), initial=len(asked) - len(left), desc=self.name, disable=None) as bar:

            def on_done(draw: Draw, outcome: dict[str, Any] | Exception) -> None:
                nonlocal new_tokens, told
                if isinstance(outcome, Exception):
                    failures.append(str(outcome))
                    return
                done[draw.prompt, draw.sample] = outcome
                new_tokens += outcome["tokens"] or 0
                self._keep({"prompt": draw.prompt, "sample": draw.sample, "completion": outcome})
                speed = f"{new_tokens / (time.monotonic() - start):,.0f} tokens/s"
                bar.set_postfix_str(speed)
                bar.update()
                if bar.disable and time.monotonic() - told > QUIET:
                    told = time.monotonic()
                    tell(f"{self.name}: {len(done):,} of {len(asked):,} completions, {speed}")

            async def ask(draw: Draw) -> dict[str, Any]:
                return await self._ask(prompts[draw.prompt], draw)

            try:
                if left:
                    ask_all(ask, left, parallel=self.parallel, on_done=on_done)
            finally:
                if self.requests > self.noted:  # those without an answer count all the same
                    self._keep({})
        completions: list[list[dict[str, Any]]] = [[] for _ in prompts]
        for draw in asked:
            if (draw.prompt, draw.sample) in done:
                completions[draw.prompt].append(done[draw.prompt, draw.sample])
        seconds = time.monotonic() - start if new_tokens else 0.0
        over = len(asked) - len(done) if self.over else 0
        return Sampled(completions, failures, self.requests, seconds, new_tokens, over)

    def _count(self) -> None:
        if self.max_requests is not None and self.requests >= self.max_requests:
            self.over = True
            raise OverBudget(f"the budget of --max-requests {self.max_requests} is used up")
        self.requests += 1

    def _keep(self, line: dict[str, Any]) -> None:
        """Append a line, with the requests so far."""
        append_records(self.kept, [{**line, "requests": self.requests}])
        self.noted = self.requests

    def _read(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Return the completions that are kept, by prompt and sample."""
        lines = [record for record in _read_kept(self.kept) if "completion" in record]
        return {(line["prompt"], line["sample"]): line["completion"] for line in lines}

    async def _ask(self, prompt: Prompt, draw: Draw) -> dict[str, Any]:
        """Return one completion as records have it. Raises EndpointError and ValueError as `Endpoint.complete`."""
        try:
            reply, body = await self._complete(prompt, draw)
        except OverBudget as error:
            raise EndpointError(str(error)) from error
        if reply.tool_calls and not reply.text.strip():
            raise EndpointError(f"{prompt.place}: the model called a tool instead of writing an answer")
        return {
            "model": self.name,
            "response": _without_lone_surrogates(reply.text),
            "settings": {**_said(body, self.limit_key), "sample": draw.sample},
            "finish_reason": reply.finish_reason,
            "tokens": reply.completion_tokens,
        }

    async def _complete(self, prompt: Prompt, draw: Draw) -> tuple[Reply, dict[str, Any]]:
        """Ask as far as the server lets us; return its reply and the request."""
        first = sent = self._body(prompt, draw)
        while True:
            try:
                reply = await self.endpoint.complete(sent)
            except RejectedError as error:
                other = self._without(sent, str(error))
                if other is None:  # then it is not for a parameter
                    raise
                sent = other
            else:
                self._note(first, sent)
                return reply, sent

    def _body(self, prompt: Prompt, draw: Draw) -> dict[str, Any]:
        assert not isinstance(prompt.turns, str), "an endpoint renders the chat template"
        sampling = self.sampling
        body: dict[str, Any] = {
            "messages": [_message(turn) for turn in prompt.turns],
            self.limit_key: sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        drawn = {"top_p": sampling.top_p, "top_k": sampling.top_k, "seed": draw.seed} if sampling.temperature else {}
        body |= {key: value for key, value in drawn.items() if value is not None and key not in self.left_out}
        if prompt.tools:
            body["tools"] = list(prompt.tools)
        if prompt.template_kwargs:
            body["chat_template_kwargs"] = dict(prompt.template_kwargs)
        return body

    def _without(self, body: Mapping[str, Any], message: str) -> dict[str, Any] | None:
        """Return a request without what the server may have rejected, as its message says; None if there is nothing."""
        if "max_completion_tokens" in message and "max_tokens" in body:
            other = {key: value for key, value in body.items() if key != "max_tokens"}
            return {**other, "max_completion_tokens": body["max_tokens"]}
        there = [key for key in _OPTIONAL if key in body]
        named = [key for key in there if key in message] or there
        return {key: value for key, value in body.items() if key not in named} if named else None

    def _note(self, sent: Mapping[str, Any], accepted: Mapping[str, Any]) -> None:
        """Ask in the same way from now on, and say so once."""
        if "max_completion_tokens" in accepted:
            self.limit_key = "max_completion_tokens"
        gone = {key for key in _OPTIONAL if key in sent and key not in accepted} - self.left_out
        if gone:
            self.left_out |= gone
            names = " and ".join(sorted(gone))
            again = ", so the same command may draw other completions" if "seed" in gone else ""
            tell(f"note: {self.name}: the server rejects {names}, which {_is_are(gone)} left out{again}")


def kept_requests(kept: Path) -> int:
    """Return how many requests a file of kept completions has taken. Raises ValueError if it holds something else."""
    return max((record["requests"] for record in _read_kept(kept)), default=0)


def _read_kept(path: Path) -> list[dict[str, Any]]:
    return read_records(path, "not a kept completion; remove the line, or the file", _is_kept)


def _is_are(names: set[str]) -> str:
    return "are" if len(names) > 1 else "is"


def _is_kept(record: Mapping[str, Any]) -> bool:
    if type(record.get("requests")) is not int:
        return False
    if "completion" not in record:
        return True
    completion = record["completion"]
    numbers = type(record.get("prompt")) is int and type(record.get("sample")) is int
    return numbers and isinstance(completion, dict) and isinstance(completion.get("response"), str)


def _said(body: Mapping[str, Any], limit_key: str) -> dict[str, Any]:
    """Return the settings of a request as records have them."""
    names = ("temperature", "top_p", "top_k", "seed")
    limit = body.get(limit_key, body.get("max_completion_tokens"))
    return {"max_new_tokens": limit, **{name: body[name] for name in names if name in body}}


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn as OpenAI's protocol has it, in which the arguments of a tool call are JSON in a string."""
    message = {key: turn[key] for key in _MESSAGE_KEYS if turn.get(key) is not None}
    if "tool_calls" in message:
        message["tool_calls"] = [_call(call, number) for number, call in enumerate(message["tool_calls"], start=1)]
    return message


def _call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    function = dict(call.get("function", {}))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {})
    return {"id": f"call_{number}", "type": "function", **call, "function": function}


def _without_lone_surrogates(text: str) -> str:
    """JSON may hold halves of surrogate pairs, which no file in UTF-8 can: they become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
