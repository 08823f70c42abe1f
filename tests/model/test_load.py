"""Weights: strict loading with clear errors, meta models brought to life, sharded reading, the digest."""

import json
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
import transformers
from huggingface_hub.utils import filter_repo_objects
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from toys import UNEVEN, Root, logits, toy_config, toy_model, toy_model_folder
from transformers import AutoModelForCausalLM

from notus.model import load as weights
from notus.model.export import load_causal_lm
from notus.model.load import find_folder, load_weights, materialise, resolve_model_folder, weights_digest
from notus.model.lora import cast_frozen, init_lora, inject_lora, lora_layers
from notus.model.sharded_tensors import fill_rows, gather, local_rows
from notus.model.supported import check_context, check_supported, context_of, disable_dropout

IDS = torch.tensor([[1, 7, 30, 55, 4, 99]])
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def meta_model(kind, **overrides):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(toy_config(kind, **overrides), dtype=torch.float32)


def loaded(folder, kind="mistral", **overrides):
    model = meta_model(kind, **overrides)
    materialise(model, "cpu")
    load_weights(model, folder)
    return model.eval()


def edit_weights(folder, change):
    """Rewrite a folder's single safetensors file after `change` has altered its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


KINDS = [
    ("mistral", {}),
    ("mistral", {"tie_word_embeddings": True}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
]


@pytest.mark.parametrize(("kind", "overrides"), KINDS)
def test_meta_to_loaded_equals_the_saved_model(tmp_path, kind, overrides):
    folder = toy_model_folder(tmp_path / "m", kind, **overrides)
    assert torch.equal(logits(loaded(folder, kind, **overrides)), logits(toy_model(kind, **overrides)))


@pytest.mark.parametrize(("kind", "overrides"), KINDS)
def test_materialised_buffers_equal_those_of_a_model_built_on_cpu(kind, overrides):
    model = meta_model(kind, **overrides)
    materialise(model, "cpu")
    built = dict(toy_model(kind, **overrides).named_buffers())
    assert {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"} <= set(built)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == built[name].dtype
        assert torch.equal(buffer, built[name]), name
    tied = bool(overrides.get("tie_word_embeddings"))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_scaled_embedding_gets_its_scale_back():
    model = meta_model("gemma")
    materialise(model, "cpu")
    assert model.model.embed_tokens.embed_scale.item() == pytest.approx(32**0.5)


def test_a_buffer_that_no_rule_fills_is_an_error():
    model = meta_model("mistral")
    model.model.register_buffer("secret", torch.empty(2, device="meta"), persistent=False)
    with pytest.raises(ValueError, match=r"MistralModel\.secret: no way to compute it"):
        materialise(model, "cpu")


def test_values_are_cast_to_the_parameters_dtype(tmp_path):
    folder = toy_model_folder(tmp_path / "m")
    model = meta_model("mistral").requires_grad_(False)
    cast_frozen(model, torch.bfloat16)
    materialise(model, "cpu")
    load_weights(model, folder)
    expected = toy_model().model.layers[0].mlp.up_proj.weight.bfloat16()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


def test_several_files_with_an_index(tmp_path):
    folder = toy_model_folder(tmp_path / "m")
    toy_model().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(loaded(folder)), logits(toy_model()))
    (folder / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    missing = sorted(folder.glob("model-*.safetensors"))[-1]
    missing.unlink()
    with pytest.raises(ValueError, match=r"safetensors: missing, though model.safetensors.index.json names it"):
        loaded(folder)


def test_a_tied_head_may_be_in_the_file_if_it_is_the_same(tmp_path):
    folder = toy_model_folder(tmp_path / "m", "qwen2", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    expected = logits(toy_model("qwen2", tie_word_embeddings=True))
    assert torch.equal(logits(loaded(folder, "qwen2", tie_word_embeddings=True)), expected)
    edit_weights(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"lm_head.weight differ, though the config ties them; set tie_word"):
        loaded(folder, "qwen2", tie_word_embeddings=True)


def test_only_the_heads_name_of_a_tied_pair_is_enough(tmp_path):
    folder = toy_model_folder(tmp_path / "m", tie_word_embeddings=True)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(logits(loaded(folder, tie_word_embeddings=True)), logits(toy_model(tie_word_embeddings=True)))


def test_rotary_frequencies_in_old_files_are_ignored(tmp_path):
    folder = toy_model_folder(tmp_path / "m")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_weights(folder, lambda t: t.update(old))
    assert torch.equal(logits(loaded(folder)), logits(toy_model()))


def test_lora_parameters_are_not_expected_in_the_file(tmp_path):
    folder = toy_model_folder(tmp_path / "m")
    model = meta_model("mistral")
    inject_lora(model, rank=2, alpha=2, dropout=0.0, target_modules=["q_proj"])
    materialise(model, "cpu")
    load_weights(model, folder)
    init_lora(model, seed=0)
    assert torch.equal(logits(model.eval()), logits(toy_model()))


def drop_key(folder):
    edit_weights(folder, lambda t: t.pop("model.norm.weight"))


def rename_key(folder):
    edit_weights(folder, lambda t: t.update({"model.nörm.weight": t.pop("model.norm.weight")}))


def wrong_shape(folder):
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(31)}))


def not_safetensors(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")


def only_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def bad_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_key, r"m: the weights are not those of MistralForCausalLM: missing model\.norm\.weight; do config"),
        (rename_key, r"missing model\.norm\.weight; unexpected model\.nörm\.weight; do config\.json and"),
        (wrong_shape, r"model\.safetensors: model\.norm\.weight has shape \[31\], the model needs \[32\]"),
        (not_safetensors, r"model\.safetensors: not a whole safetensors file \(.*\); download it again"),
        (only_bin, r"no model\.safetensors and .*; save pytorch_model\.bin again as safetensors"),
        (bad_index, r"index\.json: not readable as JSON"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(tmp_path, damage, message):
    folder = toy_model_folder(tmp_path / "m")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        loaded(folder)


def header_length(data):
    return 8 + int.from_bytes(data[:8], "little")


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "cut in its header": lambda data: data[:100],
    "cut in its tensors": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "a header of noise": lambda data: data[:8] + b"\xff" * (header_length(data) - 8) + data[header_length(data) :],
    "a length of the header that is too large": lambda data: flip(data, 5),
    "a bit of the header flipped": lambda data: flip(data, data.index(b"shape")),
    "a bit of a name flipped": lambda data: flip(data, data.index(b"embed_tokens")),
    "a bit of an offset flipped": lambda data: flip(data, data.index(b"data_offsets") + len('data_offsets":[')),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights_are_one_line_that_names_the_file(name, tmp_path):
    folder = toy_model_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(DAMAGES[name](path.read_bytes()))
    with pytest.raises(ValueError, match=str(folder)) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=str(folder)):
        load_causal_lm(folder, dtype=torch.float32, device="cpu")


def test_a_flip_anywhere_in_the_header_changes_no_weight_silently(tmp_path):
    folder = toy_model_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    whole, expected, told = path.read_bytes(), toy_model().state_dict(), []
    for place in range(0, header_length(whole), 5):
        path.write_bytes(flip(whole, place))
        model = toy_model(seed=1)
        try:
            load_weights(model, folder)
        except ValueError as error:
            told.append(str(error))
        else:  # a flip in what nobody reads, as the padding
            assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert told
    assert all(str(folder) in message for message in told)


def test_a_mistake_is_found_before_anything_is_written(tmp_path):
    folder = toy_model_folder(tmp_path / "m")
    wrong_shape(folder)
    model = toy_model(seed=1)
    with pytest.raises(ValueError, match="has shape"):
        load_weights(model, folder)
    assert torch.equal(logits(model), logits(toy_model(seed=1)))


def test_resolving_a_folder(tmp_path, monkeypatch):
    folder = toy_model_folder(tmp_path / "m")
    assert resolve_model_folder(str(folder)) == folder
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no config\.json there"):
        resolve_model_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match="absent: no such folder, nor can it be a hub id; check the path"):
        resolve_model_folder(tmp_path / "absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing: no such folder or hub id"):
        resolve_model_folder("nobody/nothing")


def test_a_hub_id_is_downloaded_without_other_formats(tmp_path, monkeypatch):
    folder = toy_model_folder(tmp_path / "m")
    asked = {}

    def fake_download(name, *, allow_patterns, ignore_patterns):
        asked.update(name=name, allow=allow_patterns, ignore=ignore_patterns)
        return str(folder)

    monkeypatch.setattr(weights, "snapshot_download", fake_download)
    assert resolve_model_folder("someone/model") == folder
    assert asked["name"] == "someone/model"
    held = [
        "config.json", "model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja", "onnx/config.json", "original/model.safetensors",
        "original/tokenizer.model", "src/code.py", "modeling_odd.py",
    ]  # fmt: skip
    taken = filter_repo_objects(held, allow_patterns=asked["allow"], ignore_patterns=asked["ignore"])
    assert list(taken) == [
        "config.json", "model.safetensors", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
        "modeling_odd.py",
    ]  # fmt: skip
    assert find_folder("someone/model", weights=False) == folder
    assert "*.safetensors" in asked["ignore"]


def test_digest_follows_weights_and_computation_alone(tmp_path):
    folder = toy_model_folder(tmp_path / "m")
    digest = weights_digest(folder)
    assert len(digest) == 64
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    (copy / "README.md").write_text("a model")
    edit_config(copy, transformers_version="9.9", _name_or_path="x", use_cache=False, attention_dropout=0.5)
    assert weights_digest(copy) == digest
    edit_config(copy, rms_norm_eps=1e-3)
    changed = weights_digest(copy)
    assert changed != digest
    edit_config(copy, rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    assert weights_digest(copy) not in (digest, changed)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert weights_digest(folder) != digest


def test_digest_covers_settings_of_configs_inside_the_config(tmp_path):
    folder = toy_model_folder(tmp_path / "m")
    edit_config(folder, text_config={"rms_norm_eps": 1e-5, "use_cache": True, "vision": {"patch": 8, "dtype": "x"}})
    digest = weights_digest(folder)
    edit_config(folder, text_config={"rms_norm_eps": 1e-5, "use_cache": False, "vision": {"patch": 8, "dtype": "y"}})
    assert weights_digest(folder) == digest
    edit_config(folder, text_config={"rms_norm_eps": 1e-5, "use_cache": True, "vision": {"patch": 9, "dtype": "x"}})
    assert weights_digest(folder) != digest


def test_digest_covers_code_that_comes_with_the_model(tmp_path, monkeypatch):
    folder = toy_model_folder(tmp_path / "m")
    bare = weights_digest(folder)
    (folder / "modeling_odd.py").write_text("scale = 1")
    assert weights_digest(folder) == bare  # nobody runs it
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_odd.Odd"})
    seen = {bare, weights_digest(folder)}
    assert weights_digest(shutil.copytree(folder, tmp_path / "copy")) in seen
    (folder / "modeling_odd.py").write_text("scale = 2")
    seen.add(weights_digest(folder))
    (folder / "parts").mkdir()
    (folder / "parts" / "head.py").write_text("scale = 1")
    seen.add(weights_digest(folder))
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_odd.Other"})
    seen.add(weights_digest(folder))
    edit_config(folder, auto_map={"AutoModelForCausalLM": "someone/code--modeling_odd.Odd"})
    seen.add(weights_digest(folder))
    cached = tmp_path / "cache" / "modeling_odd.py"
    cached.parent.mkdir()
    cached.write_text("scale = 1")
    asked = []
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *args: asked.append(args) or str(cached))
    seen.add(weights_digest(folder))
    cached.write_text("scale = 2")
    seen.add(weights_digest(folder))
    assert set(asked) == {("someone/code", "modeling_odd.py")}
    assert len(seen) == 8


def test_digest_covers_every_block(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "DIGEST_BLOCK", 1000)
    folder = toy_model_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    original = path.read_bytes()
    seen = {weights_digest(folder)}
    for position in range(0, len(original), 10_000):
        path.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
        seen.add(weights_digest(folder))
    assert len(seen) == 1 + len(range(0, len(original), 10_000))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.BartConfig(), "it is an encoder-decoder"),
        (transformers.MistralConfig(quantization_config={"quant_method": "fp8"}), "its weights are quantized"),
    ],
)
def test_models_that_no_path_trains_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_supported(config)


def test_dropout_is_off_in_the_base_and_stays_in_lora():
    model = toy_model("mistral", attention_dropout=0.5)
    inject_lora(model, rank=2, alpha=2, dropout=0.25, target_modules=["q_proj"])
    init_lora(model, seed=0)
    model.model.layers[0].mlp.add_module("drop", nn.Dropout(0.5))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    disable_dropout(model)
    assert model.model.layers[0].mlp.drop.p == 0
    assert lora_layers(model)["model.layers.0.self_attn.q_proj"].dropout == 0.25
    assert torch.equal(logits(model), logits(model))  # B is still zero


LORA = {"rank": 1, "alpha": 2.0, "dropout": 0.0, "target_modules": "all-linear"}


def sharded(folder, *, frozen=torch.float32, compute=torch.float32, **overrides):
    causal_lm = meta_model("qwen2", **overrides)
    inject_lora(causal_lm, **LORA)
    cast_frozen(causal_lm, frozen)
    root = Root(causal_lm)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for block in [*causal_lm.model.layers, root]:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    materialise(root, "cpu")
    load_weights(causal_lm, folder)
    init_lora(causal_lm, seed=5)
    return root


def alone(folder, **overrides):
    model = meta_model("qwen2", **overrides)
    inject_lora(model, **LORA)
    materialise(model, "cpu")
    load_weights(model, folder)
    init_lora(model, seed=5)
    return model


def count_rows(monkeypatch):
    """Note the rows that `load_weights` reads, by key."""
    read, open_file = {}, weights.open_safetensors

    class Slice:
        def __init__(self, inner, key):
            self.inner, self.key = inner, key
            self.get_shape, self.get_dtype = inner.get_shape, inner.get_dtype

        def __getitem__(self, rows):
            read[self.key] = (rows.start, rows.stop)
            return self.inner[rows]

    class Handle:
        def __init__(self, inner):
            self.inner, self.keys = inner, inner.keys

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

        def get_slice(self, key):
            return Slice(self.inner.get_slice(key), key)

    monkeypatch.setattr(weights, "open_safetensors", lambda path: Handle(open_file(path)))
    return read


def check_sharded_parameters(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        read = count_rows(monkeypatch)
        root = sharded(folder, **UNEVEN)
    expected = alone(folder, **UNEVEN)
    causal_lm = root.causal_lm
    assert causal_lm.lm_head.weight is causal_lm.model.embed_tokens.weight
    reference = dict(expected.named_parameters())
    for name, parameter in causal_lm.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), reference[name]), name
        rows = local_rows(parameter)
        wanted = rows if rows[0] < rows[1] else None
        assert read.get(name) == (None if "lora" in name else wanted), name
    for name, buffer in causal_lm.named_buffers():
        assert torch.equal(buffer, expected.get_buffer(name))
    torch.testing.assert_close(root(IDS), expected(IDS).logits, rtol=1e-5, atol=1e-5)


def check_mixed_dtypes(folder):
    """A frozen bf16 base and fp32 adapters share FSDP groups; gradients are fp32, for the adapters alone."""
    root = sharded(folder, frozen=torch.bfloat16, compute=torch.bfloat16, **UNEVEN)
    output = root(IDS)
    assert output.dtype == torch.bfloat16
    output.float().logsumexp(-1).sum().backward()
    for name, parameter in root.named_parameters():
        if "lora" in name:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
        else:
            assert parameter.dtype == torch.bfloat16
            assert parameter.grad is None
    update = gather({"B": root.causal_lm.model.layers[0].mlp.up_proj.lora_B.grad}, torch.float32)
    assert (dist.get_rank() == 0) == bool(update)
    assert all(value.abs().sum() > 0 for value in update.values())


def check_replicated():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = torch.arange(10.0).view(5, 2)
    target = distribute_tensor(torch.zeros(5, 2), mesh, [Replicate()])
    fill_rows(target, full)
    assert local_rows(target) == (0, 5)
    assert torch.equal(target.to_local(), full)


def ranks_agree_with_one_process(folder):
    check_sharded_parameters(folder)
    check_mixed_dtypes(folder)
    check_replicated()


def test_each_rank_reads_its_own_rows_and_no_others(tmp_path):
    folder = toy_model_folder(tmp_path / "m", "qwen2", **UNEVEN)
    run_ranks(ranks_agree_with_one_process, 2, tmp_path, folder)


class Custom(transformers.PreTrainedConfig):
    """A config whose code came with the model, under a name of its own."""

    seq_length = 700


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (toy_config("llama", max_position_embeddings=512), 512),
        (toy_config("mistral", max_position_embeddings=512, sliding_window=64), 512),
        (toy_config("opt", max_position_embeddings=512), 512),
        (transformers.GPT2Config(n_positions=512), 512),
        (transformers.DbrxConfig(max_seq_len=512), 512),
        (transformers.BloomConfig(), sys.maxsize),  # ALiBi
        (Custom(), 700),
        # stretched by 4, from what the model learned or from what the config says
        (toy_config("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}), 1024),
        (toy_config("llama", rope_parameters=YARN), 1024),
        (toy_config("llama", rope_parameters={**YARN, "original_max_position_embeddings": 64}), 256),
        (toy_config("llama", rope_parameters={**YARN, "original_max_position_embeddings": 100}), 400),
        # Llama 3.2: the config's 131,072 positions are fewer than 32 times 8,192
        (
            toy_config(
                "llama",
                max_position_embeddings=131_072,
                rope_parameters={
                    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                },
            ),
            131_072,
        ),
    ],
)  # fmt: skip
def test_the_context_is_what_the_model_has_learned_positions_of(config, context):
    assert context_of(config) == context
    check_context(config, min(context, 2**40), "data.max_length")
    if context < sys.maxsize:
        with pytest.raises(ValueError, match=f"has {context + 1:,} tokens.* ends at {context:,}.* set data.max_length"):
            check_context(config, context + 1, "data.max_length")
