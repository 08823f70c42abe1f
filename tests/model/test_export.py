"""Export: what is written is what transformers and PEFT load; folders appear whole; adapters come back."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import run_ranks
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toys import UNEVEN, Root, assets_dir, logits, toy_config, toy_model, toy_model_folder, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from notus.model import export
from notus.model.export import export_adapter, export_model, load_causal_lm, load_tokenizer, read_generation_config
from notus.model.load import load_weights, materialise, resolve_model_folder, weight_files
from notus.model.lora import LoRALinear, init_lora, inject_lora, lora_layers
from notus.model.make import make_model, read_config
from notus.model.peft_format import load_adapter

IDS = torch.tensor([[1, 7, 30, 55, 4, 99]])
CPU = {"dtype": torch.float32, "device": "cpu"}


def write(model, folder, *, dtype=torch.float32, **options):
    export_model(model, folder, hf_config=model.config, tokenizer=toy_tokenizer(), dtype=dtype, **options)
    return folder


def adapted(folder, *, targets=("q_proj", "up_proj"), rslora=False):
    """The toy model of `folder` with LoRA layers whose B is not zero."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    inject_lora(model, rank=3, alpha=6, dropout=0.1, target_modules=list(targets), rslora=rslora)
    init_lora(model, seed=1)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.5, generator=generator)
    return model.eval()


def write_adapter(model, folder, base):
    export_adapter(model, folder, base_model_name_or_path=str(base), tokenizer=toy_tokenizer())
    return folder


@pytest.mark.parametrize(("kind", "tied"), [("mistral", False), ("llama", False), ("qwen3", True)])
def test_transformers_loads_the_export_to_the_same_logits(tmp_path, kind, tied):
    model = toy_model(kind, tie_word_embeddings=tied)
    folder = write(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert type(loaded) is type(model)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Hello world").input_ids == toy_tokenizer()("Hello world").input_ids


def test_config_and_dtype_are_those_of_what_is_written(tmp_path):
    model = toy_model()
    model.config.architectures = None
    folder = write(model, tmp_path / "out", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["dtype"] == "bfloat16"
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["model.norm.weight"], model.model.norm.weight.bfloat16())
    assert model.config.dtype == torch.float32  # the caller's config is left alone


def test_large_models_are_written_in_several_files(tmp_path):
    model = toy_model()
    folder = write(model, tmp_path / "out", max_shard_bytes=30_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    # Embedding and head, of 400·32·4 = 51,200 bytes, exceed the limit: alone in the first and the last file.
    # A layer has q and o of 32·32, k and v of 16·32, three of 48·32 and two norms of 32 values: 30,976 bytes,
    # just above the limit; two layers and the last norm take three files.
    assert len(files) == 5
    assert files[0] == "model-00001-of-00005.safetensors"
    assert [set(load_file(folder / files[i])) for i in (0, 4)] == [{"model.embed_tokens.weight"}, {"lm_head.weight"}]
    assert all((folder / name).stat().st_size < 30_000 + 2_000 for name in files[1:4])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert [path.name for path in weight_files(folder)] == files
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), logits(model))


def test_nothing_says_that_the_tokenizer_came_from_a_folder(tmp_path):
    model = toy_model()
    tokenizer = load_tokenizer(toy_model_folder(tmp_path / "base"), trust_remote_code=False)
    export_model(model, tmp_path / "out", hf_config=model.config, tokenizer=tokenizer, dtype=torch.float32)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "</s>"
    assert not {"is_local", "local_files_only"} & set(settings)


def test_generation_settings_travel_even_when_transformers_would_not_save_them(tmp_path):
    model, settings = toy_model(), GenerationConfig(temperature=0.7, do_sample=False, eos_token_id=[2, 5])
    folder = write(model, tmp_path / "given", generation_config=settings)
    assert read_generation_config(folder).eos_token_id == [2, 5]
    assert read_generation_config(folder).temperature == 0.7
    own = write(model, tmp_path / "own")
    assert read_generation_config(own).eos_token_id == 2
    (own / "generation_config.json").unlink()
    assert read_generation_config(own) is None


def test_an_earlier_export_is_replaced_whole(tmp_path):
    folder = write(toy_model(), tmp_path / "out", max_shard_bytes=30_000)
    write(toy_model(seed=1), folder)
    assert {path.name for path in folder.glob("*.safetensors*")} == {"model.safetensors"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), logits(toy_model(seed=1)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def full_disk(*args):
    raise SafetensorError("No space left on device")


def test_an_export_that_died_between_its_renames_is_recovered(tmp_path, monkeypatch):
    folder = write(toy_model(), tmp_path / "out")
    folder.rename(tmp_path / ".out.old")  # the state after the first rename
    (tmp_path / ".out.partial").mkdir()
    monkeypatch.setattr(export, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(toy_model(seed=1), folder)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), logits(toy_model()))


def test_files_reach_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    synced = []
    sync = export.sync
    monkeypatch.setattr(export, "sync", lambda path: (synced.append(path.name), sync(path)))
    folder = write(toy_model(), tmp_path / "out")
    written = {path.name for path in folder.iterdir()}
    assert set(synced) == written | {".out.partial", tmp_path.name}
    assert synced[-2:] == [".out.partial", tmp_path.name]


def test_weights_are_as_readable_as_the_config(tmp_path):
    folder = write(toy_model(), tmp_path / "out")
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_foreign_files_are_never_replaced(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis: holds files of another kind; name a new or empty folder"):
        write(toy_model(), folder)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_a_model_with_adapters_is_not_exported_as_if_it_had_none(tmp_path):
    model = adapted(toy_model_folder(tmp_path / "base"))
    with pytest.raises(ValueError, match="export its adapter, or merge it"):
        write(model, tmp_path / "out")


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_the_adapter_to_the_same_logits(tmp_path, rslora):
    peft = pytest.importorskip("peft")
    base = toy_model_folder(tmp_path / "base", "qwen2")
    model = adapted(base, rslora=rslora)
    folder = write_adapter(model, tmp_path / "adapter", base)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    assert (logits(theirs) - logits(toy_model("qwen2"))).abs().max() > 0.1
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_pefts_own_adapter_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    base = toy_model_folder(tmp_path / "base")
    settings = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    toy_tokenizer().save_pretrained(tmp_path / "adapter")
    merged, _ = load_causal_lm(tmp_path / "adapter", **CPU)
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-5, atol=1e-5)


def test_an_adapter_comes_back_into_an_injected_model(tmp_path):
    base = toy_model_folder(tmp_path / "base")
    model = adapted(base)
    folder = write_adapter(model, tmp_path / "adapter", base)
    other = AutoModelForCausalLM.from_pretrained(base).eval()
    inject_lora(other, rank=3, alpha=6, dropout=0.0, target_modules=["up_proj", "q_proj"])
    load_adapter(other, folder)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, r"adapter: cannot be .*: lora\.rank is 2, but 3 in the adapter: set lora\.rank=3"),
        ({"alpha": 12}, r"lora\.alpha is 12, but 6 in the adapter: set lora\.alpha=6"),
        ({"rslora": True}, r"lora\.rslora is true, but false in the adapter: set lora\.rslora=false"),
        ({"target_modules": ["q_proj"]}, r"does not name its layers: set lora\.target_modules=\[q_proj, up_proj\]"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(tmp_path, change, message):
    base = toy_model_folder(tmp_path / "base")
    folder = write_adapter(adapted(base), tmp_path / "adapter", base)
    settings = {"rank": 3, "alpha": 6, "dropout": 0.0, "target_modules": ["q_proj", "up_proj"], **change}
    other = AutoModelForCausalLM.from_pretrained(base)
    inject_lora(other, **settings)
    with pytest.raises(ValueError, match=message):
        load_adapter(other, folder)


def test_adapters_that_do_not_fit_are_one_clear_error(tmp_path):
    base = toy_model_folder(tmp_path / "base")
    model = adapted(base)
    folder = write_adapter(model, tmp_path / "adapter", base)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file({**tensors, key: torch.ones(3, 31)}, weights)
    with pytest.raises(ValueError, match=r"up_proj\.lora_A\.weight has shape \[3, 31\], the model needs \[3, 32\]"):
        load_adapter(model, folder)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, weights)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .*layers\.0\.mlp\.up_proj has no lora_A"):
        load_adapter(model, folder)
    without = {name: tensor for name, tensor in tensors.items() if "layers.0.mlp.up_proj" not in name}
    save_file(without, weights)
    with pytest.raises(ValueError, match=r"it does not adapt the layer model\.layers\.0\.mlp\.up_proj"):
        load_adapter(model, folder)
    save_file({name: torch.ones(4, *tensor.shape[1:]) for name, tensor in tensors.items()}, weights)
    with pytest.raises(ValueError, match=r"has A \[4, 32\] and B .* but adapter_config\.json says rank 3"):
        load_adapter(model, folder)
    save_file({**tensors, key.replace("lora_A", "lora_magnitude_vector"): torch.ones(3)}, weights)
    with pytest.raises(ValueError, match=r"lora_magnitude_vector\.weight is no part of a plain LoRA adapter"):
        load_adapter(model, folder)
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_dora": True}, "only plain LoRA adapters are supported; this one sets use_dora"),
        ({"modules_to_save": ["lm_head"]}, "no weights of lm_head, which adapter_config.json names in modules_to_save"),
        ({"init_lora_weights": "pissa"}, "this one sets init_lora_weights='pissa'"),
        ({"alora_invocation_tokens": [3]}, "this one sets alora_invocation_tokens"),
        ({"lora_bias": True}, "this one sets lora_bias"),
        ({"trainable_token_indices": [3]}, "this one sets trainable_token_indices"),
        ({"of_the_future": True}, "this one sets of_the_future"),
        ({"peft_type": "IA3"}, "this one sets peft_type or bias"),
        ({"r": None}, "r is missing"),
        ({"base_model_name_or_path": "/absent"}, "/absent: no such folder"),
    ],
)
def test_adapters_beyond_lora_are_refused(tmp_path, setting, message):
    base = toy_model_folder(tmp_path / "base")
    folder = write_adapter(adapted(base), tmp_path / "adapter", base)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    with pytest.raises(ValueError, match=message):
        load_causal_lm(folder, **CPU)


def test_loading_a_model_a_run_and_an_adapter_to_generate(tmp_path, monkeypatch):
    base = toy_model_folder(tmp_path / "base")
    model, tokenizer = load_causal_lm(base, **CPU)
    assert torch.equal(logits(model), logits(toy_model()))
    assert not model.training
    assert tokenizer("Hello").input_ids == toy_tokenizer()("Hello").input_ids
    trained = adapted(base)
    monkeypatch.chdir(tmp_path)  # the base is named by a relative path, and found from elsewhere
    write_adapter(trained, tmp_path / "run" / "model", "base")
    monkeypatch.chdir("/")
    merged, _ = load_causal_lm(tmp_path / "run", **CPU)
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    half, _ = load_causal_lm(base, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_what_is_no_model_cannot_be_loaded(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="run: no model, no adapter, and no run that has ended"):
        load_causal_lm(tmp_path / "run", **CPU)
    folder = toy_model_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"m: the weights lack model\.norm\.weight"):
        load_causal_lm(folder, **CPU)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="m: cannot be loaded"):
        load_causal_lm(folder, **CPU)
    bare = write(toy_model(), tmp_path / "bare")
    for path in bare.glob("token*"):
        path.unlink()
    with pytest.raises(ValueError, match="bare: no tokenizer can be loaded"):
        load_causal_lm(bare, **CPU)


def test_stories_reproduce_their_golden_text(tmp_path):
    assets = assets_dir()
    if assets is None or not (assets / "stories260K").is_dir():
        pytest.skip("the stories260K asset is not here")
    source = resolve_model_folder(assets / "stories260K")
    config = transformers.AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    materialise(model, "cpu")
    load_weights(model, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    out = tmp_path / "out"
    export_model(model, out, hf_config=config, tokenizer=tokenizer, dtype=torch.float32, max_shard_bytes=200_000)
    loaded, tokenizer = load_causal_lm(out, **CPU)
    start = torch.tensor([[tokenizer.bos_token_id]])
    tokens = loaded.generate(start, max_new_tokens=256, do_sample=False)[0]
    assert len(tokens) == 1 + 256
    golden = (assets / "stories260K" / "golden-greedy.txt").read_text()
    assert tokenizer.decode(tokens, skip_special_tokens=True) + "\n" == golden  # a text file's last newline


CODE = """
import torch
from transformers import MistralConfig, MistralForCausalLM

from .odd_parts import SCALE


class OddConfig(MistralConfig):
    model_type = "odd"


class OddForCausalLM(MistralForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.arange(config.vocab_size) * SCALE

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = output.logits + self.table
        return output
"""


@pytest.fixture
def code_cache(tmp_path, monkeypatch):
    """An empty folder for the code of models, which is not the user's, and no such code in memory, before and after."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, "transformers_modules").is_dir()])
    forget()
    yield
    forget()


@pytest.mark.usefixtures("code_cache")
def test_code_that_came_with_a_model_goes_with_its_export(tmp_path):
    base = toy_model_folder(tmp_path / "base")
    (base / "modeling_odd.py").write_text(CODE)
    (base / "odd_parts.py").write_text("SCALE = 0.25\n")
    kinds = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "odd", "auto_map": kinds}))
    config = read_config(base, trust_remote_code=True)
    with torch.device("meta"):
        model = make_model(config, trust_remote_code=True, attn_implementation=None, dtype=torch.float32)
    materialise(model, "cpu")
    load_weights(model, base)
    expected = logits(toy_model()) + 0.25 * torch.arange(400)
    assert torch.equal(logits(model.eval()), expected)
    export_model(model, tmp_path / "out", hf_config=config, tokenizer=toy_tokenizer(), dtype=torch.float32)
    shutil.rmtree(base)
    again, _ = load_causal_lm(tmp_path / "out", **CPU, trust_remote_code=True)
    assert torch.equal(logits(again), expected)
    with pytest.raises(ValueError, match=r"out/config\.json: the model comes with code of its own"):
        load_causal_lm(tmp_path / "out", **CPU)


def test_weights_that_are_no_plain_floats_are_not_evaluated_either(tmp_path):
    base, key = toy_model_folder(tmp_path / "base"), "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, key: tensors[key].to(torch.int8)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{key} is stored as I8, and weights must be"):
        load_causal_lm(base, **CPU)


def shard(causal_lm, folder):
    root = Root(causal_lm)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [*causal_lm.model.layers, root]:
        fully_shard(block, mesh=mesh)
    materialise(root, "cpu")
    load_weights(causal_lm, folder)
    return root


def export_from_ranks(base, out):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(toy_config("qwen3", **UNEVEN))
        with_lora = AutoModelForCausalLM.from_config(toy_config("qwen3", **UNEVEN))
    root = shard(model, base)
    with torch.no_grad():
        root(IDS)
    with pytest.raises(AssertionError, match="reshard first"):
        write(model, out / "model")
    root.reshard()
    write(model, out / "model", max_shard_bytes=30_000)
    inject_lora(with_lora, rank=1, alpha=2, dropout=0.0, target_modules="all-linear")
    shard(with_lora, base)
    init_lora(with_lora, seed=1)
    for layer in lora_layers(with_lora).values():
        nn.init.ones_(layer.lora_B)
    write_adapter(with_lora, out / "adapter", base)
    for layer in lora_layers(with_lora).values():
        nn.init.zeros_(layer.lora_B)
    load_adapter(with_lora, out / "adapter")
    for layer in lora_layers(with_lora).values():
        assert torch.equal(layer.lora_B.full_tensor(), torch.ones(layer.out_features, 1))
    (out / "foreign").mkdir(exist_ok=True)
    (out / "foreign" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds files of another kind"):  # on every rank
        write(model, out / "foreign")


def test_ranks_export_together(tmp_path):
    base = toy_model_folder(tmp_path / "base", "qwen3", **UNEVEN)
    run_ranks(export_from_ranks, 2, tmp_path, base, tmp_path)
    expected = toy_model("qwen3", **UNEVEN)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(loaded), logits(expected))
    inject_lora(expected, rank=1, alpha=2, dropout=0.0, target_modules="all-linear")
    init_lora(expected, seed=1)
    for layer in lora_layers(expected).values():
        nn.init.ones_(layer.lora_B)
    merged, _ = load_causal_lm(tmp_path / "adapter", **CPU)
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-4, atol=1e-4)
