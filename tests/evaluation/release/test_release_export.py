"""`notus export`: transformers and PEFT load what it writes, from finished runs and from checkpoints."""

import json
import shutil

import pytest
import torch
from disks import largest_file
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from notus.__main__ import main
from notus.model.export import load_causal_lm

IDS = torch.tensor([[1, 7, 30, 55, 4, 99]])


@torch.no_grad()
def logits(folder, load=AutoModelForCausalLM.from_pretrained):
    return load(folder, dtype=torch.float32).eval()(IDS).logits


def export(run, out, *options):
    assert main(["export", str(run), str(out), *options]) == 0
    return out


@pytest.fixture
def unfinished(tmp_path):
    """A copy of a run as it was before its final model."""

    def without_model(run):
        return shutil.copytree(run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("model"))

    return without_model


def test_full_run(full_run, tmp_path):
    out = export(full_run, tmp_path / "out", "--max-shard-size", "20KB")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits(out), logits(full_run / "model"))
    assert AutoTokenizer.from_pretrained(out)("hello").input_ids[0] == 1
    assert GenerationConfig.from_pretrained(out).eos_token_id == 2
    half = export(full_run, tmp_path / "half", "--dtype", "bf16")
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_adapter_is_pefts(lora_run, model_folder, tmp_path):
    peft = pytest.importorskip("peft")
    out = export(lora_run, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        theirs = adapted(IDS).logits
    ours = load_causal_lm(lora_run, dtype=torch.float32, device="cpu")[0]
    with torch.no_grad():
        torch.testing.assert_close(theirs, ours(IDS).logits)


def test_merged_is_the_adapter_on_its_base(lora_run, model_folder, tmp_path):
    out = export(lora_run, tmp_path / "merged", "--merge")
    assert not (out / "adapter_config.json").exists()
    weights = load_file(out / "model.safetensors")
    adapter = load_file(lora_run / "model" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    base = load_file(model_folder / "model.safetensors")
    scaling = 16 / 3**0.5  # rank-stabilised: alpha / sqrt(rank)
    torch.testing.assert_close(weights[f"{name}.weight"], base[f"{name}.weight"] + scaling * b @ a)
    assert not torch.equal(weights[f"{name}.weight"], base[f"{name}.weight"])
    assert torch.equal(weights["lm_head.weight"], base["lm_head.weight"])


def test_checkpoint_of_a_full_run(full_run, unfinished, tmp_path, capsys):
    out = export(unfinished(full_run), tmp_path / "out")
    assert "has not finished: exporting" in capsys.readouterr().out
    assert torch.equal(logits(out), logits(full_run / "model"))


def test_checkpoint_of_a_lora_run(lora_run, unfinished, tmp_path):
    run = unfinished(lora_run)
    adapter = export(run, tmp_path / "adapter")
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, lora_run / "model"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((adapter / "adapter_config.json").read_text()) == json.loads(
        (lora_run / "model" / "adapter_config.json").read_text()
    )
    merged = export(run, tmp_path / "merged", "--merge")
    assert torch.equal(logits(merged), logits(export(lora_run, tmp_path / "final", "--merge")))


def refuse(capsys, *arguments):
    assert main(["export", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_refuses(full_run, lora_run, unfinished, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert "nothing to merge" in refuse(capsys, full_run, out, "--merge")
    assert "have no effect on an adapter" in refuse(capsys, lora_run, out, "--dtype", "bf16")
    assert "not a run (it has no config.yaml)" in refuse(capsys, tmp_path, out)
    run = unfinished(full_run)
    assert "puts its final model" in refuse(capsys, run, run / "model")
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint yet" in refuse(capsys, run, out)
    assert not out.exists()
    out.mkdir()
    (out / "config.json").write_text("mine")
    assert "not empty" in refuse(capsys, full_run, out)
    assert (out / "config.json").read_text() == "mine"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refuse(capsys, full_run, tmp_path / "new")


def test_a_full_disk_is_told_once_and_leaves_nothing(full_run, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    with largest_file(50_000):
        error = refuse(capsys, full_run, out)
    assert error.count("cannot be written") == 1
    assert "File too large" in error
    assert not out.exists()


def test_the_card_goes_with_every_export(full_run, lora_run, model_folder, tmp_path):
    for run, name, options, library in (
        (full_run, "full", [], "transformers"),
        (lora_run, "merged", ["--merge"], "transformers"),
        (lora_run, "adapter", [], "peft"),
    ):
        out = export(run, tmp_path / name, "--license", "mit", "--base-model", "org/base", *options)
        data = ModelCard.load(out / "README.md").data
        assert (data.library_name, data.license, data.base_model) == (library, "mit", "org/base")
        assert 'from_pretrained("."' in (out / "README.md").read_text()  # beside the card
        assert {path.name for path in out.iterdir() if path.suffix == ".tmp"} == set()
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    )
    unnamed = export(lora_run, tmp_path / "unnamed")  # PEFT finds the base by its path, which the card does not tell
    path = json.loads((unnamed / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert path == str(model_folder)
    assert path not in (unnamed / "README.md").read_text()


def test_refuses_sizes_that_are_none(tmp_path):
    for size in ("0", "5XB", "big"):
        with pytest.raises(SystemExit):
            main(["export", "run", str(tmp_path / "out"), "--max-shard-size", size])
