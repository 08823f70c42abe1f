"""A configuration of which no model can be built: one line that names file, key and value, and never another error."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, make_family
from toys import toy_model_folder

from notus.model.verify import choose_path
from notus.training.parallelize import read_model_config

HUGE = 2**40
CASES: list[tuple[str, object, str]] = [
    ("num_key_value_heads", 3, "does not divide num_attention_heads, 4"),
    ("num_attention_heads", 0, "at least 1"),
    ("num_attention_heads", -4, "at least 1"),
    ("num_key_value_heads", 0, "at least 1"),
    ("hidden_size", 0, "at least 1"),
    ("hidden_size", 30, "hidden_size"),
    ("num_hidden_layers", HUGE, "more than any model has"),
    ("num_hidden_layers", 3, "the weights lack model.layers.2"),
    ("vocab_size", HUGE, "more than any model has"),
    ("vocab_size", 401, "vocab_size is 401, where the weights have 400"),
    ("intermediate_size", 49, "intermediate_size is 49, where the weights have 48"),
    ("intermediate_size", -1, "intermediate_size (-1)"),
    ("head_dim", 4, "head_dim 4"),
    ("head_dim", 7, "head_dim (7)"),
    ("hidden_act", "sillu", "did you mean 'silu'?"),
    ("hidden_act", None, "hidden_act (None)"),
    ("rope_scaling", {"rope_type": "yarm", "factor": 2.0}, "rope_type is 'yarm'"),
    ("sliding_window", 0, "write null"),
    ("torch_dtype", "garbage", "no dtype of torch"),
    ("dtype", 16, "no dtype of torch"),
    ("model_type", "lama", "did you mean 'llama'?"),
    ("model_type", None, "model_type is None"),
    ("pad_token_id", 4000, "pad_token_id (4000)"),
    ("rms_norm_eps", "tiny", "rms_norm_eps ('tiny')"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    return toy_model_folder(folder, "llama")


@pytest.fixture
def settings(model_folder: Path) -> Iterator[dict[str, Any]]:
    """The configuration's content; the file is as it was after the test."""
    path = model_folder / "config.json"
    before = path.read_text()
    yield json.loads(before)
    path.write_text(before)


def write(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(("key", "value", "expected"), CASES)
def test_one_line_names_the_file_the_key_and_the_value(
    model_folder: Path, settings: dict[str, Any], key: str, value: object, expected: str
) -> None:
    write(model_folder, {**settings, key: value})
    with pytest.raises(ValueError, match=re.escape(str(model_folder / "config.json"))) as caught:
        read_model_config(model_folder)
    line = str(caught.value)
    assert "\n" not in line
    assert key.removeprefix("rope_scaling") in line
    assert expected in line


def test_a_missing_size_is_named_by_the_default_that_takes_its_place(
    model_folder: Path, settings: dict[str, Any]
) -> None:
    del settings["vocab_size"]
    write(model_folder, settings)
    with pytest.raises(ValueError, match=r"vocab_size is 32000, where the weights have 400"):
        read_model_config(model_folder)


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
def test_the_file_does_not_decide_about_the_attention(model_folder: Path, settings: dict[str, Any], name: str) -> None:
    write(model_folder, {**settings, name: "flash_attention_2"})
    assert choose_path(read_model_config(model_folder)).name == "packed"


def test_without_the_names_of_architectures_a_model_is_read_by_its_type(
    model_folder: Path, settings: dict[str, Any]
) -> None:
    del settings["architectures"]
    write(model_folder, settings)
    assert choose_path(read_model_config(model_folder)).name == "packed"


def test_a_folder_without_weights_is_read(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    assert read_model_config(tmp_path).vocab_size == 400


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_is_taken_for_damaged(name: str, tmp_path: Path) -> None:
    make_family(name).save_pretrained(tmp_path)
    read_model_config(tmp_path)


MUTATIONS: list[object] = [0, -1, 3, HUGE, "nonsense", None, []]
FUZZED = [
    "llama",
    "gemma2",
    "qwen2_moe",
    "gpt_oss",
    "deepseek_v3",
    "gpt2",
    "mamba2",
    "falcon_h1",
    "phi3/longrope",
    "opt",
]


def _mutated(name: str, folder: Path) -> Iterator[tuple[str, object]]:
    """Write the configuration of a family with one value changed, again and again."""
    make_family(name).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    for key, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str | None):
            continue
        for mutation in MUTATIONS:
            if mutation != value:
                write(folder, {**settings, key: mutation})
                yield key, mutation


def _refusal(folder: Path) -> str:
    """What is said against a model; any other error than a ValueError is a fault."""
    try:
        choose_path(read_model_config(folder))
    except ValueError as error:
        return str(error)
    return ""


def _fuzz(name: str, folder: Path, every: int) -> None:
    for number, (key, value) in enumerate(_mutated(name, folder)):
        if number % every:
            continue
        assert "\n" not in _refusal(folder), (key, value)


@pytest.mark.parametrize("name", FUZZED)
def test_a_changed_value_is_refused_in_one_line_or_harmless(name: str, tmp_path: Path) -> None:
    _fuzz(name, tmp_path, every=23)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZED)
def test_every_changed_value_is_refused_in_one_line_or_harmless(name: str, tmp_path: Path) -> None:
    _fuzz(name, tmp_path, every=1)
