"""What the property tests share: how hard they look, and text, turns and rows of every kind."""

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# NOTUS_FUZZ=20 looks twenty times as hard, elsewhere at each call.
_EFFORT = int(os.environ.get("NOTUS_FUZZ", "1"))


def fuzz(max_examples: int) -> settings:
    """Settings of a property test: the same examples in every run, unless NOTUS_FUZZ asks for more."""
    return settings(
        max_examples=max_examples * _EFFORT,
        derandomize=_EFFORT == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# Strings that mean something to a tokenizer, a template, a line reader or a normaliser.
TELLING = [
    "</s>", "<s>", "<unk>", "<|user|>\n", "<|assistant|>\n", "<|im_end|>", " ", "\n", "\r\n", "\t", "\x00", "\x1b[31m",
    "\x85", "\u2028", "\ufeff", "\u200b", "\u202e", "\ufffd", "\U0001f469\u200d\U0001f467", "e\u0301", "\xa0",
    "{{ x }}", "hello world", '"', "\\",
]  # fmt: skip
texts = st.lists(st.sampled_from(TELLING) | st.text(max_size=8), max_size=6).map("".join)
half_surrogates = st.tuples(texts, st.characters(categories=["Cs"]), texts).map("".join)

scalars: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from([10**400, "N/A", "nan", "5"])
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


def replaced(value: Any, chooser: st.DataObject) -> Any:
    """`value` with one part of it, chosen anywhere, replaced by something else or left out."""
    if isinstance(value, dict) and value and chooser.draw(st.integers(0, 3)):
        key = chooser.draw(st.sampled_from(sorted(value)))
        if not chooser.draw(st.integers(0, 5)):
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: replaced(value[key], chooser)}
    if isinstance(value, list) and value and chooser.draw(st.integers(0, 3)):
        place = chooser.draw(st.integers(0, len(value) - 1))
        return [*value[:place], replaced(value[place], chooser), *value[place + 1 :]]
    return chooser.draw(json_values | half_surrogates)
