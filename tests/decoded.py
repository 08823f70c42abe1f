"""`generate` with the decoding's settings as keywords."""

from collections.abc import Sequence
from typing import Any

from notus.data.chat import ChatEncoder
from notus.evaluation import decoding
from notus.evaluation.prompts import Prompt


def generate(
    causal_lm: Any, tokenizer: Any, prompts: Sequence[Any], *, kept: Any = None, places: Any = None, **options: Any
) -> list[str]:
    """Complete `prompts`, strings or messages; options of `Decoding` and of `ChatEncoder`."""
    chat = {name: options.pop(name) for name in ("chat_template", "add_empty_system") if name in options}
    named = places or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    given = [Prompt(place, turns) for place, turns in zip(named, prompts, strict=True)]
    return decoding.generate(causal_lm, ChatEncoder(tokenizer, **chat), given, decoding.Decoding(**options), kept=kept)
