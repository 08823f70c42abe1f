"""Rows and models in memory become files that read back as the same."""

import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from toys import toy_model, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from notus.data.sources import Source, open_rows, open_source, read_rows
from notus.training import inputs as inputs_module
from notus.training.inputs import Inputs

CALL = {"name": "weather", "arguments": {"city": "Köln", "days": 2, "exact": True, "limits": [0.5, None]}}
TALK: list[dict[str, Any]] = [
    {
        "prompt": [
            {"role": "system", "content": "a\u2028b"},
            {"role": "user", "content": "Hi 🙂\n", "name": None},
        ],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}],
        "rejected": [{"role": "assistant", "content": ""}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
        "chosen_avg_rating": 4.75,
        "rejected_avg_rating": 2,
    },
    {"prompt": "text", "chosen": "none", "rejected": "null", "label": True, "id": 2**63, "score": -0.0, "more": []},
]


def read(source: Source) -> list[Any]:
    every = source.rows.with_format("arrow")[:]
    return [row for _, row in read_rows(source, every, range(len(source.rows)))]


def written(tmp_path: Path, rows: Any) -> tuple[Path, list[Any]]:
    """Where rows are written, and what is read from there."""
    inputs = Inputs(tmp_path / "run")
    path = inputs.add_rows("train", rows)
    inputs.write()
    return path, read(open_source(str(path), cache_dir=tmp_path / "cache"))


def test_a_list_reads_back_exactly(tmp_path: Path) -> None:
    path, found = written(tmp_path, TALK)
    assert path == tmp_path / "run" / "inputs" / "train.jsonl"
    assert found == TALK
    assert [[type(value) for value in row.values()] for row in found] == [
        [type(value) for value in row.values()] for row in TALK
    ]
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == TALK


def test_numpys_values_and_tuples_become_plain(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completions": ("b", "c"), "ratings": np.array([1.5, 2.0]), "label": np.bool_(True)}]
    plain = [{"prompt": "a", "completions": ["b", "c"], "ratings": [1.5, 2.0], "label": True}]
    assert written(tmp_path, rows)[1] == plain


@pytest.mark.parametrize(
    "rows",
    [
        datasets.Dataset.from_list([TALK[0], {**TALK[0], "tools": None, "rejected_avg_rating": None}]),
        datasets.Dataset.from_dict(
            {"prompt": ["a", "b"], "label": [True, None], "day": [datetime.date(2026, 1, 2)] * 2}
        ),
        datasets.Dataset.from_dict({"prompt": ["a"] * 3, "n": [1, 2, 3]}).filter(lambda row: row["n"] != 2),
        datasets.Dataset.from_dict({"prompt": ["c", "a", "b"]}).sort("prompt"),
        datasets.Dataset.from_dict(
            {"kind": [1, 0], "prompt": ["a", "b"]},
            features=datasets.Features(
                {"kind": datasets.ClassLabel(names=["x", "y"]), "prompt": datasets.Value("large_string")}
            ),
        ),
    ],
    ids=["messages", "none", "filtered", "sorted", "types"],
)
def test_a_dataset_reads_back_as_it_is_in_memory(tmp_path: Path, rows: datasets.Dataset) -> None:
    path, found = written(tmp_path, rows)
    assert path.name == "train.parquet"
    assert found == read(open_rows(rows))
    assert len(found) == len(rows)


def test_hidden_columns_and_types_that_do_not_agree(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"prompt": ["a"], "secret": [1]}).with_format("numpy", columns=["prompt"])
    assert written(tmp_path, rows)[1] == [{"prompt": "a"}]
    mixed = datasets.Dataset.from_list(
        [{"a": {"x": 1}}, {"a": {"x": "one", "y": None}}], features=datasets.Features({"a": datasets.Json()})
    )
    assert written(tmp_path / "mixed", mixed)[1] == [{"a": {"x": 1}}, {"a": {"x": "one", "y": None}}]


def test_a_write_that_fails_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, run = Inputs(tmp_path), tmp_path / "inputs"
    first.add_rows("train", [{"prompt": "a"}])
    first.add_rows("eval", [{"prompt": "b"}])
    write = inputs_module._write_rows

    def fails(source: Source, path: Path) -> None:
        if path.stem == "eval":
            raise OSError("disk full")
        write(source, path)

    with monkeypatch.context() as patch:
        patch.setattr(inputs_module, "_write_rows", fails)
        broken = Inputs(tmp_path)
        broken.add_rows("train", [{"prompt": "other"}])
        broken.add_rows("eval", [{"prompt": "b"}])
        with pytest.raises(OSError, match="disk full"):
            broken.write()
    assert (run / "inputs.json").read_text() == "{}\n"  # it is a run's folder, and nothing in it is known
    first.write()
    assert json.loads((run / "train.jsonl").read_text()) == {"prompt": "a"}
    before = (run / "train.jsonl").stat().st_mtime_ns
    first.write()  # what is there is not written again
    assert (run / "train.jsonl").stat().st_mtime_ns == before


def test_a_begun_run_keeps_its_inputs(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path)
    inputs.add_rows("train", [{"prompt": "a"}])
    inputs.write()
    (tmp_path / "checkpoints").mkdir()
    other = Inputs(tmp_path)
    other.add_rows("train", [{"prompt": "b"}])
    with pytest.raises(ValueError, match="began with another train"):
        other.write()
    assert json.loads((tmp_path / "inputs" / "train.jsonl").read_text()) == {"prompt": "a"}
    (tmp_path / "inputs" / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="began with another train"):
        other.write()
    inputs.write()
    assert json.loads((tmp_path / "inputs" / "train.jsonl").read_text()) == {"prompt": "a"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_reads_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = toy_model("qwen2", tie_word_embeddings=True).to(dtype)
    model.generation_config.max_new_tokens = 7
    inputs = Inputs(tmp_path)
    folder = inputs.add_model(model, toy_tokenizer(chat_template="{{ messages }}"))
    inputs.write()
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert found.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"


def test_the_tokenizer_is_found_where_the_model_is_from(tmp_path: Path, model_folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model_folder)
    folder, inputs = tmp_path / "inputs" / "model", Inputs(tmp_path)
    assert inputs.add_model(loaded, None) == folder
    inputs.write()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == toy_tokenizer().get_vocab()
    with pytest.raises(ValueError, match="tokenizer: is required with this model"):
        inputs.add_model(toy_model(), None)
    loaded.config._name_or_path = loaded.name_or_path = str(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"tokenizer: is required, none can be loaded from .*gone"):
        inputs.add_model(loaded, None)


def test_models_that_cannot_be_saved_whole_are_named(tmp_path: Path) -> None:
    inputs, tokenizer = Inputs(tmp_path), toy_tokenizer()
    with torch.device("meta"):
        offloaded = AutoModelForCausalLM.from_config(toy_model().config)
    with pytest.raises(ValueError, match="not all in memory"):
        inputs.add_model(offloaded, tokenizer)
    compiled = torch.nn.Module()
    compiled._orig_mod = toy_model()  # as torch.compile wraps a model
    with pytest.raises(ValueError, match=r"is a Module; .* that torch\.compile got"):
        inputs.add_model(compiled, tokenizer)
    adapted = toy_model()
    adapted.add_adapter(__import__("peft").LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has PEFT adapters"):
        inputs.add_model(adapted, tokenizer)
