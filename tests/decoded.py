"""`generate` with the decoding's settings as keywords."""

from typing import Any

from notus.evaluation import decoding


def generate(causal_lm: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[str]:
    """Complete `prompts`; options of `Decoding` and of `decoding.generate`."""
    own = {
        name: options.pop(name) for name in ("chat_template", "add_empty_system", "places", "kept") if name in options
    }
    return decoding.generate(causal_lm, tokenizer, prompts, decoding.Decoding(**options), **own)
