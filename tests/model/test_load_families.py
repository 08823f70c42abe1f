"""Published checkpoints of every family load, and export again, as with plain transformers.

transformers writes a tiny model of each family in its published names. Loaded by us it must hold the same values, with
every buffer; exported by us it must hold the same keys and load in transformers without a word, to the same logits.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, make_family
from safetensors import safe_open
from torch import Tensor, nn
from toys import toy_tokenizer
from transformers import PreTrainedModel

from notus.model import export
from notus.model.export import export_model
from notus.model.load import load_weights, materialise, stored_tensors, weight_files
from notus.model.make import make_model, read_config

IDS = torch.tensor([[1, 7, 30, 55, 4, 99, 12, 13, 201, 5]])


def stored_keys(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Key -> shape and dtype, of all weight files of a folder."""
    found = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                piece = handle.get_slice(key)
                found[key] = (piece.get_shape(), piece.get_dtype())
    return found


def from_meta(folder: Path) -> PreTrainedModel:
    """A model of a folder, built on the meta device and loaded by us."""
    with torch.device("meta"):
        model = make_model(read_config(folder), trust_remote_code=False, attn_implementation=None, dtype=torch.float32)
    materialise(model, "cpu")
    load_weights(model, folder)
    return model.eval()


def plain_tensors(model: nn.Module) -> dict[str, Any]:
    """Tensors that modules keep as plain attributes."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def assert_same_model(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Every parameter, buffer and plain tensor has the same dtype and the same values."""
    assert type(ours) is type(theirs)
    for kind in (stored_tensors, lambda model: dict(model.named_buffers()), plain_tensors):
        found, expected = kind(ours), kind(theirs)
        assert set(found) == set(expected)
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_checkpoint_is_loaded_and_exported_as_transformers_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "tokenizer_difference", lambda *_: None)  # some model types fix a tokenizer class
    made = make_family(name)
    for key, buffer in made.named_buffers():
        if key.endswith("balancing_biases"):
            buffer[-1] = -1.0  # whatever Zaya's files hold, transformers puts this there
    made.save_pretrained(tmp_path / "theirs")
    theirs, report = type(made).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values()), report
    ours = from_meta(tmp_path / "theirs")
    assert_same_model(ours, theirs.eval())
    try:
        expected = logits(theirs)
    except TypeError as error:
        pytest.skip(f"transformers {transformers.__version__} cannot run it: {error}")
    assert torch.equal(logits(ours), expected)

    export_model(
        ours, tmp_path / "ours", hf_config=ours.config, tokenizer=toy_tokenizer(), dtype=torch.float32,
        max_shard_bytes=100_000,
    )  # fmt: skip
    assert stored_keys(tmp_path / "ours") == stored_keys(tmp_path / "theirs")
    again, report = type(made).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(again.eval()), expected)
