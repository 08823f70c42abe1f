"""What `model.name_or_path` and `model.adapter` may name, and what identifies the start of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import toy_model_folder, toy_tokenizer
from transformers import AutoModelForCausalLM

from notus.model.export import export_adapter
from notus.model.load import weights_digest
from notus.model.lora import init_lora, inject_lora
from notus.training.model_folders import ModelFolders, ModelNames, local_names, resolve_model, starting_digest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    inject_lora(model, rank=2, alpha=4, dropout=0.0, target_modules=["q_proj"])
    init_lora(model, seed=1)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    export_adapter(model, folder, base_model_name_or_path=str(base), tokenizer=toy_tokenizer())
    return folder


def run_of(model: Path | None, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {name_or_path: x}\n")
    if model is not None:
        shutil.copytree(model, folder / "model")
    return folder


def test_models_adapters_and_runs(base: Path, adapter: Path, tmp_path: Path) -> None:
    full, lora = run_of(base, tmp_path / "full"), run_of(adapter, tmp_path / "lora")
    assert resolve_model(str(base)) == ModelFolders(base, None, str(base))
    assert resolve_model(str(adapter)) == ModelFolders(base, adapter, str(base))
    assert resolve_model(str(base), str(adapter)) == ModelFolders(base, adapter, str(base))
    assert resolve_model(str(full)) == ModelFolders(full / "model", None, str(full / "model"))
    assert resolve_model(str(lora)) == ModelFolders(base, lora / "model", str(base))
    assert resolve_model(str(full), str(lora)) == ModelFolders(full / "model", lora / "model", str(full / "model"))
    assert local_names("owner/model") == ModelNames("owner/model")
    assert resolve_model(str(adapter)).tokenizer == adapter
    (lora / "model" / "tokenizer_config.json").unlink()
    assert resolve_model(str(lora)).tokenizer == base


def test_what_names_no_start_is_one_line(base: Path, adapter: Path, tmp_path: Path) -> None:
    unfinished, full = run_of(None, tmp_path / "unfinished"), run_of(base, tmp_path / "full")
    for given, message in (
        ((str(unfinished), None), r"model\.name_or_path=.*: this run has not finished; finish it, or write"),
        ((str(base), str(unfinished)), r"model\.adapter=.*: this run has not finished"),
        ((str(base), str(base)), r"no adapter_config\.json in .*base, which holds a whole model"),
        ((str(base), str(full)), r"no adapter_config\.json in .*model, which holds a whole model: name it as"),
        ((str(adapter), str(adapter)), r"is an adapter already, beside model\.adapter"),
        ((str(base), str(tmp_path / "absent")), r"absent: no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_model(*given)


def test_the_start_is_identified_by_its_content(base: Path, adapter: Path, tmp_path: Path) -> None:
    plain, start = ModelFolders(base), ModelFolders(base, adapter)
    assert starting_digest(plain) == weights_digest(base)
    other = shutil.copytree(adapter, tmp_path / "other")
    known = starting_digest(start)
    assert starting_digest(ModelFolders(base, other)) == known  # wherever it lies
    found = {starting_digest(plain), known, starting_digest(start, continues=True), starting_digest(plain, new_rows=1)}
    path = other / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 8}))
    found.add(starting_digest(ModelFolders(base, other)))
    weights = {name: tensor + 1 for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    shutil.copyfile(adapter / "adapter_config.json", path)
    save_file(weights, other / "adapter_model.safetensors")
    found.add(starting_digest(ModelFolders(base, other)))
    assert len(found) == 6
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
