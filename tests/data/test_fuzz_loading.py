"""From files of any conversations to tokens on ranks: a clear error, or every kept token once."""

import json
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
from fuzzing import fuzz, replaced, texts
from hypothesis import given
from hypothesis import strategies as st
from toys import toy_tokenizer
from transformers import PreTrainedTokenizerFast

from notus.data.batching import StepPlan, step_rows
from notus.data.dataset import TokenizedDataset
from notus.data.tokenize import load_labels, load_lists, load_pairs, load_sft

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (  # as Mistral's: refuses turns that do not alternate, writes BOS itself
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}{% endif %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]{% else %}{{ message.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
TEMPLATES = {"none": None, "chatml": CHATML, "alternating": ALTERNATING}
TOKENIZERS = {
    (bos, name): toy_tokenizer(bos=bos, chat_template=template)
    for bos in (True, False)
    for name, template in TEMPLATES.items()
}


@pytest.fixture(autouse=True, scope="module")
def no_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def turns(*roles: str, least: int = 1, most: int = 4) -> st.SearchStrategy[list[dict[str, str]]]:
    return st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(roles), "content": texts}), min_size=least, max_size=most
    )


answer = turns("assistant", most=1)
plain = st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts})
messages = st.fixed_dictionaries(
    {"prompt": turns("system", "user", "assistant"), "chosen": answer | turns("assistant", "user"), "rejected": answer}
)
argilla = st.fixed_dictionaries({"instruction": texts, "chosen_response": texts, "rejected_response": texts})
pairs = plain | messages | argilla
demonstrations = pairs | st.fixed_dictionaries({"messages": turns("system", "user", "assistant", least=2)})
ratings = st.none() | st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from(["4.5", float("nan")])
entries = st.lists(st.tuples(st.none() | texts | answer, ratings), min_size=1, max_size=5)
lists = st.builds(
    lambda prompt, rated: {
        "prompt": prompt,
        "completions": [completion for completion, _ in rated],
        "ratings": [rating for _, rating in rated],
    },
    texts | turns("system", "user"),
    entries,
)
labelled = st.fixed_dictionaries(
    {
        "prompt": texts | turns("user", most=1),
        "completion": texts | answer,
        "label": st.sampled_from([True, False, "1"]),
    }
) | st.fixed_dictionaries({"messages": turns("user", "assistant", least=2), "kto_tag": st.booleans()})
tokenizers = st.sampled_from(sorted(TOKENIZERS)).map(TOKENIZERS.__getitem__)


LOADERS: dict[str, Any] = {"dpo": load_pairs, "sft": load_sft, "lists": load_lists, "labels": load_labels}


def load(
    rows: list[Any], tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any
) -> tuple[datasets.Dataset, Any]:
    """Write the rows as JSON lines and read them; an error must say where."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    default = "dpo" if "max_prompt_length" in options else "sft"
    read = LOADERS[options.pop("task", default)]
    source: Any = [{"path": str(path), "weight": options.pop("weight", 1.0)}]
    try:
        return read(source, tokenizer, cache_dir=folder / "cache", **options)
    except ValueError as error:
        told = str(error)
        of_all = "no row is left" in told or "raise the weight" in told
        assert told.startswith(f"{path}: " if of_all else f"{path}, line ")
        raise


def check(dataset: datasets.Dataset, report: Any, read: int, max_length: int) -> None:
    assert report.read == read
    assert report.kept == len(dataset) == read - sum(report.dropped.values())
    assert all(report.dropped.values())
    assert max(report.prompts_cut, report.completions_cut, report.templated) <= report.kept
    for row in dataset:
        for ids, mask in zip(row["branches"], row["loss_mask"], strict=True):
            assert len(ids) == len(mask)
            assert sum(mask) >= 1
            assert 2 <= len(row["trunk"]) + len(ids) <= max_length
        assert len(row["branches"]) == 1 or any(ids != row["branches"][0] for ids in row["branches"])


def check_epoch(dataset: datasets.Dataset, world_size: int, batch_size: int) -> None:
    """Every kept token once, over all steps and ranks."""
    rows = TokenizedDataset(dataset)
    plan = StepPlan(len(rows), batch_size)
    expected = [sum(map(len, row["branches"]), len(row["trunk"])) for row in dataset]
    learned = [[sum(mask) for mask in row["loss_mask"]] for row in dataset]
    targets = [
        [token for token, bit in zip(chain(*row["branches"]), chain(*row["loss_mask"]), strict=True) if bit]
        for row in dataset
    ]
    seen: list[int] = []
    for step in range(plan.steps_per_epoch):
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "tokens_per_row": max(expected)}
            for batch in step_rows(rows, plan.indices(step), **options):
                real = [index for index in batch.indices.tolist() if index >= 0]
                seen += real
                if real:
                    assert len(batch.input_ids) == sum(expected[index] for index in real)
                    lengths = [[count for count in counts if count] for counts in batch.lengths.tolist()]
                    assert lengths == [[count for count in learned[index] if count] for index in real]
                    assert batch.targets.tolist() == list(chain(*(targets[index] for index in real)))
    assert sorted(seen) == list(range(len(dataset)))


@fuzz(120)
@given(
    st.lists(pairs, min_size=1, max_size=6),
    tokenizers,
    st.integers(2, 80),
    st.integers(1, 79),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
)
def test_pairs_of_any_text_become_rows_that_an_epoch_sees_once(
    rows: list[Any],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    max_prompt_length: int,
    world_size: int,
    batch_size: int,
    add_empty_system: bool,
) -> None:
    lengths = {"max_length": max_length, "max_prompt_length": min(max_prompt_length, max_length - 1)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset, report = load(rows, tokenizer, Path(folder), add_empty_system=add_empty_system, **lengths)
        except ValueError:
            return
        check(dataset, report, len(rows), max_length)
        check_epoch(dataset, world_size, batch_size)
        again, same = load(rows, tokenizer, Path(folder), add_empty_system=add_empty_system, **lengths)
        assert again.to_list() == dataset.to_list()
        assert same == report


@fuzz(80)
@given(st.lists(demonstrations, min_size=1, max_size=6), tokenizers, st.integers(2, 80), st.integers(1, 5))
def test_demonstrations_of_any_turns(
    rows: list[Any], tokenizer: PreTrainedTokenizerFast, max_length: int, world_size: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset, report = load(rows, tokenizer, Path(folder), max_length=max_length)
        except ValueError:
            return
        check(dataset, report, len(rows), max_length)
        check_epoch(dataset, world_size, 3)


@fuzz(150)
@given(pairs | demonstrations, st.data(), tokenizers, st.booleans())
def test_a_malformed_row_is_read_or_a_clear_error(
    row: Any, data: st.DataObject, tokenizer: PreTrainedTokenizerFast, sft: bool
) -> None:
    row = json.loads(json.dumps(replaced(row, data)))
    lengths = {"max_length": 40} if sft else {"max_length": 40, "max_prompt_length": 20}
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset, report = load([row], tokenizer, Path(folder), **lengths)
        except ValueError:
            return
        check(dataset, report, 1, 40)


@fuzz(50)
@given(
    st.lists(lists | pairs, min_size=1, max_size=6),
    tokenizers,
    st.integers(2, 80),
    st.integers(1, 79),
    st.integers(1, 5),
)
def test_lists_of_any_completions_are_best_first(
    rows: list[Any], tokenizer: PreTrainedTokenizerFast, max_length: int, max_prompt_length: int, world_size: int
) -> None:
    lengths = {"max_length": max_length, "max_prompt_length": min(max_prompt_length, max_length - 1)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset, report = load(rows, tokenizer, Path(folder), task="lists", on_bad_row="skip", **lengths)
        except ValueError:
            return
        check(dataset, report, len(rows), max_length)
        check_epoch(dataset, world_size, 3)
        found = TokenizedDataset(dataset)
        for index, row in enumerate(dataset):
            assert 2 <= len(row["branches"]) <= 5
            if row["ratings"] is not None:
                assert row["ratings"] == sorted(row["ratings"], reverse=True)
                assert found.ratings is not None
                padded = [*row["ratings"], *[None] * (found.num_branches - len(row["branches"]))]
                assert [None if value != value else value for value in found.ratings[index].tolist()] == padded


@fuzz(50)
@given(
    st.lists(labelled | pairs, min_size=1, max_size=6),
    tokenizers,
    st.integers(2, 80),
    st.integers(1, 79),
    st.integers(1, 5),
)
def test_labelled_completions_of_any_turns(
    rows: list[Any], tokenizer: PreTrainedTokenizerFast, max_length: int, max_prompt_length: int, world_size: int
) -> None:
    lengths = {"max_length": max_length, "max_prompt_length": min(max_prompt_length, max_length - 1)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset, report = load(rows, tokenizer, Path(folder), task="labels", on_bad_row="skip", **lengths)
        except ValueError:
            return
        assert len(rows) <= report.read <= 2 * len(rows)
        check(dataset, report, report.read, max_length)
        check_epoch(dataset, world_size, 3)
        assert all(len(row["branches"]) == 1 and row["label"] is not None for row in dataset)


@fuzz(80)
@given(lists | labelled, st.data(), tokenizers, st.sampled_from(["lists", "labels"]))
def test_a_malformed_rated_row_is_read_or_a_clear_error(
    row: Any, data: st.DataObject, tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    row = json.loads(json.dumps(replaced(row, data)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset, report = load([row], tokenizer, Path(folder), task=task, max_length=40, max_prompt_length=20)
        except ValueError:
            return
        check(dataset, report, report.read, 40)
