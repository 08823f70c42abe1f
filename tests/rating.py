"""Records, judges behind a real server and command lines for the tests of `notus rate`."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from judges import Reply, completion

from notus.feedback import rate

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
COMPLETION = re.compile(r'<completion number="(\d+)" mark="(\w+)">\n(.*?)\n</completion mark="\2">', re.DOTALL)


def record(number: int, responses: list[str], **more: Any) -> dict[str, Any]:
    """A record as `notus sample` writes it, by as many models as there are responses."""
    completions = [{"model": f"model-{place}", "response": text} for place, text in enumerate(responses)]
    return {"source": "tests", "instruction": f"Question {number}?", "completions": completions, **more}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    rate.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def run(*words: object) -> int:
    return rate.run(parse(*words))


def summary(out: Path) -> dict[str, Any]:
    return json.loads(out.with_suffix(".summary.json").read_text())


def seen(request: dict[str, Any]) -> list[str]:
    """The completions of a request, in the order in which the judge sees them."""
    return [text for _, _, text in COMPLETION.findall(request["messages"][0]["content"])]


def ratings(texts: list[str], rate_one: Callable[[str], Any], aspects: tuple[str, ...] = ASPECTS) -> dict[str, Any]:
    """The answer that is asked for: each text rated by a function, the same in each aspect."""
    return {
        f"completion_{number}": {aspect: {"rationale": f"as {text}", "rating": rate_one(text)} for aspect in aspects}
        for number, text in enumerate(texts, start=1)
    }


def counted(text: str, prompt_tokens: int = 100, completion_tokens: int = 10) -> Reply:
    """A completion with the tokens that it took."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return Reply({**completion(text), "usage": usage})


def by_length(request: dict[str, Any], number: int) -> Reply:
    """A judge that rates by length: one character is a 1, five are a 5."""
    return counted(json.dumps(ratings(seen(request), lambda text: str(len(text)))))
