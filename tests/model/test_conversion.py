"""Published names: what the files hold, what a rank reads of it, and what is said of files that do not fit."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from families import FAMILIES, make_family
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_load_families import assert_same_model, from_meta, logits, stored_keys
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toys import Root, toy_model_folder, toy_tokenizer
from transformers import PreTrainedModel

from notus.model import export
from notus.model import load as weights
from notus.model.export import export_model
from notus.model.load import load_weights, materialise, stored_tensors
from notus.model.make import make_model, read_config
from notus.model.structure import blocks_of

Tensors = dict[str, Tensor]


def saved(name: str, folder: Path) -> PreTrainedModel:
    """A family's tiny model, and a folder that plain transformers wrote of it."""
    model = make_family(name)
    model.save_pretrained(folder)
    return model


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite a folder's single safetensors file after `change` has altered its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def written(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    given = {"hf_config": model.config, "tokenizer": toy_tokenizer(), "dtype": torch.float32, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "tokenizer_difference", lambda *_: None)  # some model types fix a tokenizer class
        export_model(model, folder, **given)
    return folder


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("mixtral", ["model.layers.1.block_sparse_moe.experts.3.w2.weight"]),
        ("qwen3_moe", ["model.layers.0.mlp.experts.3.gate_proj.weight"]),
        ("deepseek_v3", ["model.layers.2.mlp.experts.0.up_proj.weight"]),
        ("deepseek_v3", ["model.layers.2.mlp.gate.e_score_correction_bias"]),
        ("jamba", ["model.layers.1.feed_forward.experts.2.gate_proj.weight", "model.layers.0.mamba.A_log"]),
        ("gpt_oss", ["model.layers.0.self_attn.sinks", "model.layers.0.mlp.experts.gate_up_proj_bias"]),
        ("gpt_neox", ["embed_out.weight", "gpt_neox.embed_in.weight"]),
        ("gpt2", ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"]),
        ("gemma3", ["language_model.model.layers.0.mlp.up_proj.weight"]),
        ("gemma3", ["multi_modal_projector.mm_input_projection_weight"]),
        ("qwen2_5_vl", ["model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"]),
    ],
)
def test_an_export_has_the_names_that_are_published(name: str, keys: list[str], tmp_path: Path) -> None:
    folder = written(make_family(name), tmp_path / "out")
    assert set(keys) <= set(stored_keys(folder))


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("gpt2", lambda key: key.removeprefix("transformer.")),  # as the first published GPT-2
        ("gemma3", lambda key: key.replace("language_model.model.", "model.language_model.")),  # as models of 5.x
        ("qwen2_5_vl", lambda key: f"model.language_{key}" if key.startswith("model.") else key),
        ("gemma3", lambda key: key.replace("vision_tower.", "vision_tower.vision_model.")),  # gemma-3-4b's
        ("llava", lambda key: key.replace("vision_tower.", "vision_tower.vision_model.")),
        ("llama", lambda key: key.removeprefix("model.")),
        ("bloom", lambda key: key.removeprefix("transformer.")),  # bloom-560m's
        ("opt", lambda key: key.removeprefix("model.")),  # opt-350m's
    ],
)
def test_other_published_names_of_the_same_tensors_load(
    name: str, rename: Callable[[str], str], tmp_path: Path
) -> None:
    theirs = saved(name, tmp_path)
    edit(tmp_path, lambda tensors: [tensors.update({rename(key): tensors.pop(key)}) for key in list(tensors)])
    expected, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    ours = from_meta(tmp_path)
    assert_same_model(ours, expected.eval())
    assert torch.equal(logits(ours), logits(theirs))
    expected.save_pretrained(tmp_path / "theirs")
    assert stored_keys(written(ours, tmp_path / "ours")) == stored_keys(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gpt2", "h.{}.attn.bias"),
        ("gpt2", "transformer.h.{}.attn.bias"),
        ("gpt_neo", "transformer.h.{}.attn.attention.bias"),
        ("gptj", "transformer.h.{}.attn.bias"),
        ("codegen", "transformer.h.{}.attn.causal_mask"),
        ("gpt_neox", "gpt_neox.layers.{}.attention.bias"),
    ],
)
def test_masks_of_old_files_are_ignored(name: str, path: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    masks = {path.format(i): torch.ones(1, 1, 256, 256, dtype=torch.uint8) for i in range(2)}
    values = {path.format(i).rpartition(".")[0] + ".masked_bias": torch.tensor(-1e9) for i in range(2)}
    edit(tmp_path, lambda tensors: tensors.update(masks | values))
    assert torch.equal(logits(from_meta(tmp_path)), logits(model))


def test_a_bias_that_the_model_does_not_have_is_no_mask(tmp_path: Path) -> None:
    model = saved("gptj", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(32)}))
    with pytest.raises(ValueError, match=r"unexpected transformer\.h\.0\.attn\.bias; do config"):
        load_weights(model, tmp_path)


def test_the_language_part_alone_is_exported_with_its_own_config(tmp_path: Path) -> None:
    config = FAMILIES["llama4"].config()
    config.architectures = ["Llama4ForCausalLM"]
    with torch.device("cpu"):
        model = make_model(config, trust_remote_code=False, attn_implementation=None, dtype=torch.float32).eval()
    written(model, tmp_path / "out", hf_config=config)
    found, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(found.eval()), logits(model))
    assert read_config(tmp_path / "out").model_type == "llama4_text"


def test_buffers_that_a_file_may_lack_are_those_of_a_new_model(tmp_path: Path) -> None:
    model, name = saved("axk1", tmp_path), "e_score_correction_bias"
    edit(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if name in key])
    theirs, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    if report["missing_keys"]:
        with pytest.raises(ValueError, match=f"missing .*{name}"):
            from_meta(tmp_path)
        pytest.skip(f"transformers {transformers.__version__} does not do without it")
    assert_same_model(from_meta(tmp_path), theirs.eval())


W1, W2, W3 = (f"model.layers.1.block_sparse_moe.experts.2.{name}.weight" for name in ("w1", "w2", "w3"))


def without_an_expert(tensors: Tensors) -> None:
    for name in (W1, W2, W3):
        del tensors[name]


def without_a_layers_experts(tensors: Tensors) -> None:
    for name in [name for name in tensors if "layers.1.block_sparse_moe.experts" in name]:
        del tensors[name]


def other_shape(tensors: Tensors) -> None:
    tensors[W2] = tensors[W2][:, :-1].contiguous()


def a_layer_too_many(tensors: Tensors) -> None:
    tensors[W1.replace("layers.1", "layers.7")] = torch.ones(48, 32)


def in_eight_bits(tensors: Tensors) -> None:
    tensors[W1] = tensors[W1].to(torch.float8_e4m3fn)


EXPERTS = r"model\.layers\.1\.mlp\.experts"
FIRST = r"model\.layers\.1\.block_sparse_moe\.experts\.0\.w"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without_an_expert,
            rf"safetensors: 6 tensors such as {FIRST}1\.weight make a {EXPERTS}\.gate_up_proj of shape \[3, 96, 32\], "
            r"the model needs \[4, 96, 32\]",
        ),
        (
            lambda tensors: tensors.pop(W1),
            rf"safetensors: cannot convert {FIRST}1\.weight, .* to {EXPERTS}\.gate_up_proj \(.*\); do config and",
        ),
        (
            without_a_layers_experts,
            rf"MixtralForCausalLM: missing {EXPERTS}\.gate_up_proj, {EXPERTS}\.down_proj; do config",
        ),
        (other_shape, rf"safetensors: cannot convert {FIRST}2\.weight.* to {EXPERTS}\.down_proj"),
        (
            a_layer_too_many,
            rf"MixtralForCausalLM: unexpected {re.escape(W1.replace('layers.1', 'layers.7'))}; do config",
        ),
        (
            in_eight_bits,
            rf"{W1} is stored as F8_E4M3, and weights must be F64, F32, F16 or BF16; dequantize them first",
        ),
    ],
    ids=["an-expert", "a-matrix", "a-layer", "shape", "unexpected", "dtype"],
)
def test_files_that_do_not_fit_are_one_error_and_nothing_is_written(
    damage: Callable[[Tensors], None], message: str, tmp_path: Path
) -> None:
    model = saved("mixtral", tmp_path)
    edit(tmp_path, damage)
    before = {name: tensor.clone() for name, tensor in stored_tensors(model).items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored_tensors(model).items())


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.int8, "I8"), (torch.uint8, "U8"), (torch.bool, "BOOL"), (torch.complex64, "C64"), (torch.int64, "I64"),
        (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"),
    ],
)  # fmt: skip
def test_weights_that_are_no_plain_floats_are_refused(dtype: torch.dtype, stored: str, tmp_path: Path) -> None:
    folder, key = toy_model_folder(tmp_path / "m"), "model.layers.0.mlp.up_proj.weight"
    edit(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    message = rf"model\.safetensors: {key} is stored as {stored}, and weights must be F64, F32, F16 or BF16; dequantize"
    with pytest.raises(ValueError, match=message):
        from_meta(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_plain_floats_of_any_size_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()}))
    expected = {name: tensor.to(dtype).float() for name, tensor in stored_tensors(model).items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored_tensors(from_meta(tmp_path)).items())


def test_experts_in_several_dtypes_are_joined(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({W1: tensors[W1].bfloat16(), W3: tensors[W3].half()}))
    stored = load_file(tmp_path / "model.safetensors")
    found = from_meta(tmp_path).model.layers[1].mlp.experts.gate_up_proj[2]
    assert torch.equal(found, torch.cat([stored[W1].float(), stored[W3].float()]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "mxfp4"}, r"quantized \(mxfp4\); dequantize them first, .*Mxfp4Config\(dequantize=True\)"),
        ({"quant_method": "fp8"}, r"quantized \(fp8\); .*FineGrainedFP8Config\(dequantize=True\)"),
        ({"quant_method": "gptq"}, r"config\.json: by its quantization_config .*\(gptq\); .*with the tool that quant"),
    ],
)
def test_a_quantized_checkpoint_says_how_to_dequantize_it(
    settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    model = saved("llama", tmp_path)
    model.config.quantization_config = settings
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path)


def test_packed_blocks_are_named_before_what_they_leave_missing(tmp_path: Path) -> None:
    model, name = saved("gpt_oss", tmp_path), "model.layers.0.mlp.experts.gate_up_proj"
    blocks = {f"{name}_blocks": torch.ones(4, 2, dtype=torch.uint8), f"{name}_scales": torch.ones(4, dtype=torch.uint8)}
    edit(tmp_path, lambda tensors: [tensors.pop(name), tensors.update(blocks)])
    with pytest.raises(ValueError, match=rf"{name}_blocks is stored as U8, and weights must be"):
        load_weights(model, tmp_path)


def test_what_text_does_not_reach_is_exported_bit_for_bit(tmp_path: Path) -> None:
    model = make_family("gemma3").bfloat16()
    model.save_pretrained(tmp_path / "base")
    ours = from_meta(tmp_path / "base")  # in fp32
    with torch.no_grad():
        ours.get_input_embeddings().weight.add_(1)
    written(ours, tmp_path / "out", dtype=torch.bfloat16)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert set(before) == set(after)
    changed = {key for key in before if not torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8))}
    assert changed == {"language_model.model.embed_tokens.weight"}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["deepseek_v3", "lfm2_moe", "mixtral"])
def test_a_bf16_export_keeps_in_fp32_what_transformers_does(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "base")
    theirs = type(make_family(name)).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_meta(tmp_path / "base")
    written(ours, tmp_path / "ours", dtype=torch.bfloat16, max_shard_bytes=50_000)
    kept = set(theirs._keep_in_fp32_modules_strict or ())
    found, expected = stored_keys(tmp_path / "ours"), stored_keys(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    for key, (shape, dtype) in found.items():
        assert shape == expected[key][0]
        assert dtype == ("F32" if any(each in key for each in kept) else "BF16")


SHARDED = [
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "jamba",
    "gemma3",
    "gpt2",
    "mamba2",
    "dbrx",
    "qwen3_vl_moe",
]


def sharded(folder: Path, *, whole: bool) -> PreTrainedModel:
    """A model of a folder, loaded under FSDP; `whole`: FSDP manages transformers' model itself, not a wrapper of it."""
    with torch.device("meta"):
        model = make_model(read_config(folder), trust_remote_code=False, attn_implementation=None, dtype=torch.float32)
    root = model if whole else Root(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [*blocks_of(model), root]:
        fully_shard(block, mesh=mesh)
    materialise(root, "cpu")
    load_weights(model, folder)
    return model


def ranks_load_and_export(base: Path, out: Path) -> None:
    for number, name in enumerate(SHARDED):
        model = sharded(base / name, whole=number % 2 == 0)
        expected = from_meta(base / name)
        reference = stored_tensors(expected)
        found = stored_tensors(model)
        assert set(found) == set(reference)
        for key, tensor in found.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(full, reference[key]), f"{name}: {key}"
        for key, buffer in model.named_buffers():
            assert torch.equal(buffer, expected.get_buffer(key)), f"{name}: {key}"
        written(model, out / name, max_shard_bytes=50_000)


def test_ranks_load_and_export_published_names(tmp_path: Path) -> None:
    for name in SHARDED:
        saved(name, tmp_path / "base" / name)
    run_ranks(ranks_load_and_export, 2, tmp_path, tmp_path / "base", tmp_path / "out")
    for name in SHARDED:
        model = make_family(name)
        found, report = type(model).from_pretrained(tmp_path / "out" / name, output_loading_info=True)
        assert not any(report.values())
        assert stored_keys(tmp_path / "out" / name) == stored_keys(tmp_path / "base" / name)
        assert torch.equal(logits(found.eval()), logits(model))


def ranks_read_their_own_experts(folder: Path, shares: list[str]) -> None:
    read: list[str] = []
    open_file = weights.open_safetensors

    class Handle:
        def __init__(self, inner: Any) -> None:
            self.inner, self.keys, self.get_slice = inner, inner.keys, inner.get_slice

        def __enter__(self) -> "Handle":
            return self

        def __exit__(self, *error: object) -> None:
            self.inner.__exit__(*error)

        def get_tensor(self, key: str) -> Tensor:
            read.append(key)
            return self.inner.get_tensor(key)  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "open_safetensors", lambda path: Handle(open_file(path)))
        model = sharded(folder, whole=False)
    own = shares[dist.get_rank()]
    assert len(read) == 2 * 3 * len(own)  # of two layers, three matrices of each expert
    assert {key.split("experts.")[1][0] for key in read} == set(own)
    reference = stored_tensors(from_meta(folder))
    for key, tensor in stored_tensors(model).items():
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.full_tensor(), reference[key]), key


@pytest.mark.parametrize("shares", [["01", "23"], ["01", "23", ""]])
def test_a_rank_reads_its_own_experts_alone(shares: list[str], tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "m")
    run_ranks(ranks_read_their_own_experts, len(shares), tmp_path, tmp_path / "m", shares)
