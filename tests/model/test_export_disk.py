"""A full disk, or one that returns other bits than were written, leaves the earlier export as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from disks import largest_file
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toys import toy_model, toy_tokenizer

from notus.model import export
from notus.model.export import check_tensors, export_adapter, export_model
from notus.model.load import weights_digest
from notus.model.lora import init_lora, inject_lora

TIED = {"kind": "qwen3", "tie_word_embeddings": True}
HEAD, NORM = "lm_head.weight", "model.norm.weight"


def _write(model: Any, folder: Path, **options: Any) -> Path:
    options = {"hf_config": model.config, "tokenizer": toy_tokenizer(), "dtype": torch.bfloat16, **options}
    export_model(model, folder, **options)
    return folder


def _adapted(**options: Any) -> Any:
    model = toy_model(**options)
    inject_lora(model, rank=3, alpha=6, dropout=0.0, target_modules=["q_proj"], rslora=False)
    init_lora(model, seed=1)
    return model


def _write_adapter(model: Any, folder: Path) -> Path:
    export_adapter(model, folder, base_model_name_or_path="base", tokenizer=toy_tokenizer())
    return folder


def _flip(path: Path, name: str, byte: int) -> None:
    """Change the lowest bit of one byte of a tensor; -1 is its last."""
    size = int.from_bytes(path.read_bytes()[:8], "little")
    start, stop = json.loads(path.read_bytes()[8 : 8 + size])[name]["data_offsets"]
    content = bytearray(path.read_bytes())
    content[8 + size + (start if byte >= 0 else stop) + byte] ^= 1
    path.write_bytes(content)


def _damage(monkeypatch: pytest.MonkeyPatch, name: str, byte: int) -> None:
    """From here on, files that hold the tensor `name` are written with one bit flipped."""

    def damaged(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        if name in tensors:
            _flip(path, name, byte)

    monkeypatch.setattr(export, "save_file", damaged)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "name", "file"),
    [
        ({}, HEAD, "model.safetensors"),
        (TIED, "model.embed_tokens.weight", "model.safetensors"),
        ({"max_shard_bytes": 20_000}, NORM, r"model-0000\d-of-0000\d.safetensors"),
    ],
    ids=["full", "tied", "several-files"],
)
def test_one_flipped_bit_is_named_and_nothing_is_published(
    options: dict[str, Any], name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model(**{key: value for key, value in options.items() if key in ("kind", "tie_word_embeddings")})
    shards = {key: value for key, value in options.items() if key == "max_shard_bytes"}
    folder = _write(model, tmp_path / "out", **shards)
    before = weights_digest(folder)
    _damage(monkeypatch, name, -1)
    with pytest.raises(ValueError, match=rf"{file}: read again after writing, it is not what was written: {name}\."):
        _write(model, folder, **shards)
    assert weights_digest(folder) == before


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_what_goes_with_the_weights_must_load(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = toy_tokenizer()
    save = tokenizer.save_pretrained

    def damage(folder: Path) -> None:  # the tokenizer is the last to be written
        save(folder)
        (folder / file).write_text((folder / file).read_text()[:-20])

    monkeypatch.setattr(tokenizer, "save_pretrained", damage)
    with pytest.raises(ValueError, match=r"\.out\.partial"):
        _write(toy_model(), tmp_path / "out", tokenizer=tokenizer, max_shard_bytes=30_000)
    assert not (tmp_path / "out").exists()


def test_an_index_of_other_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json = export.write_json

    def shortened(path: Path, content: dict[str, Any]) -> None:
        if "weight_map" in content:
            lost = content["weight_map"]["lm_head.weight"]
            content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != lost}
        write_json(path, content)

    monkeypatch.setattr(export, "write_json", shortened)
    with pytest.raises(ValueError, match=r"index\.json: .*weight_map"):
        _write(toy_model(), tmp_path / "out", max_shard_bytes=30_000)


def test_the_comparison_is_of_bits(tmp_path: Path) -> None:
    path, special = tmp_path / "x.safetensors", torch.tensor([[float("nan"), 0.0], [-0.0, float("inf")]])
    tensors = {"special": special, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 2), "int": torch.arange(3)}
    written = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(written, path)
    check_tensors(path, tensors, torch.bfloat16)
    for name, other in {
        "special": special.abs(), "scalar": torch.tensor(3.625), "empty": torch.zeros(0, 3), "int": torch.arange(1, 4),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"x\.safetensors: .*: {name}\."):
            check_tensors(path, {**tensors, name: other}, torch.bfloat16)
    with pytest.raises(ValueError, match=r": special\."):
        check_tensors(path, tensors, torch.float32)
    for changed in ({"special": special}, {**tensors, "zzz": special}):
        with pytest.raises(ValueError, match=r": (empty|zzz)\."):
            check_tensors(path, changed, torch.bfloat16)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="it cannot be read"):
        check_tensors(path, tensors, torch.bfloat16)


def test_a_disk_that_fills_up_leaves_the_earlier_export(tmp_path: Path) -> None:
    folder = _write(toy_model(), tmp_path / "out")
    before = _content(folder)
    with (
        largest_file(50_000),
        pytest.raises(
            OSError, match=rf"{folder}: cannot be written \(.*File too large.*; [\d.]+ GB free in {tmp_path}"
        ),
    ):
        _write(toy_model(seed=1), folder)
    assert _content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _shard(model: Any) -> Any:
    root = nn.Module()
    root.causal_lm = model
    fully_shard(root, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def _export_damaged(folder: Path) -> None:
    writers: dict[str, tuple[Any, Any, str]] = {
        "full": (_write, _shard(toy_model(vocab_size=401)), HEAD),
        "tied": (_write, _shard(toy_model(vocab_size=401, **TIED)), "model.embed_tokens.weight"),
        "lora": (_write_adapter, _shard(_adapted()), "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    }
    for kind, (write, model, name) in writers.items():
        write(model, folder / kind)
        for byte in (0, -1):  # in the rows of the first rank, and of the second
            with pytest.MonkeyPatch.context() as monkeypatch:
                _damage(monkeypatch, name, byte)
                with pytest.raises(ValueError, match=rf"not what was written: {name}\."):
                    write(model, folder / kind)


def test_damage_in_the_rows_of_one_rank_is_told_on_both(tmp_path: Path) -> None:
    run_ranks(_export_damaged, 2, tmp_path, tmp_path)
    with safe_open(tmp_path / "full" / "model.safetensors", "pt") as handle:
        assert torch.equal(handle.get_tensor(HEAD), toy_model(vocab_size=401).lm_head.weight.bfloat16())
