"""NF4: rows by hand and beside torchao's, the linear layer and its gradient, which layers, and how they are filled."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import relative, toy_config, toy_model
from transformers import AutoModelForCausalLM

from notus.model import quantization
from notus.model.lora import LoRALinear, cast_frozen, inject_lora
from notus.model.quantization import (
    LEVELS,
    PackedRow,
    QuantizedLinear,
    QuantizedLoRALinear,
    RowsToQuantize,
    dequantize_rows,
    describe,
    quantize,
    quantize_rows,
    quantized_layers,
    quantized_linear,
    summary,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(weights: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return dequantize_rows(quantize_rows(weights), weights.shape[1], dtype)


# --- rows ---


def test_a_row_by_hand():
    levels = torch.tensor(LEVELS)
    # Three blocks of 64: the levels four times each, of largest magnitude 1, 2 and 256: scales 0, 1 and 255 steps of 1.
    row = torch.cat([scale * levels.repeat(4) for scale in (1.0, 2.0, 256.0)])[None]
    before = row.clone()
    packed = quantize_rows(row)
    assert torch.equal(row, before)
    # codes 0 to 15 in pairs: 0x01, 0x23, ...
    assert packed[0, :8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert packed[0, 96:99].tolist() == [0, 1, 255]
    assert packed[0, 112:120].view(torch.float32).tolist() == [1.0, 1.0]
    assert packed.shape == (1, 128)  # 96 of codes, 3 scales in 16, low and step in 16
    assert torch.equal(there_and_back(row), row)


def test_the_nearest_level_is_taken_with_the_scale_as_it_is_read():
    # Scales 1, 1.1, 3: step 2/255, so that 1.1 is read as 1 + 13 steps = 1.10196.
    row = torch.zeros(1, 192)
    row[0, 0], row[0, 64], row[0, 128] = 1.0, 1.1, 3.0
    scale = 1 + 13 * 2 / 255
    middle = (LEVELS[14] + LEVELS[15]) / 2  # 0.8615
    row[0, 65], row[0, 66] = scale * middle * 0.999, scale * middle * 1.001
    found = there_and_back(row)[0]
    assert found[65].item() == pytest.approx(LEVELS[14] * scale, rel=1e-6)
    assert found[66].item() == pytest.approx(scale, rel=1e-6)


def test_beside_torchaos_tensor():
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    weights = normal(3, 16384)  # a row is one of torchao's blocks of scales
    theirs = torch.stack([nf4.to_nf4(row, 64, 256).get_original_weight() for row in weights])
    ours = there_and_back(weights)
    assert relative(ours, theirs) < 0.03  # the two round the scales otherwise, 8 bits each
    assert relative(ours, weights) <= 1.0001 * relative(theirs, weights)
    # the codes themselves, with scales that both keep exactly: all blocks have the same
    weights[:, ::64] = 4.0
    codes = torch.stack([nf4.NF4Tensor.from_tensor(row, 64, 256).quantized_data for row in weights.clamp(-4, 4)])
    same = codes == quantize_rows(weights.clamp(-4, 4))[:, :8192]
    assert same.float().mean() > 0.999  # torchao rounds the levels to four digits


def test_the_error_is_what_four_bits_cost():
    # The paper's levels quantise a normal distribution with a relative error of 9 to 10 % in blocks of 64.
    assert 0.085 < relative(there_and_back(normal(64, 4096)), normal(64, 4096)) < 0.1


def test_zeros_stay_zeros_and_a_row_need_not_fill_its_blocks():
    for width in (1, 33, 64, 65, 200):
        weights = normal(5, width)
        weights[2] = 0
        weights[3, width // 2 :] = 0
        found = there_and_back(weights)
        assert found.shape == weights.shape
        assert (found[weights == 0] == 0).all()
        assert relative(found, weights) < 0.13
    assert there_and_back(torch.full((2, 70), -0.3)).sub(-0.3).abs().max() < 1e-7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_an_error(bad):
    weights = normal(4, 100)
    weights[1, 99] = bad
    with pytest.raises(ValueError, match="infinite or not a number"):
        quantize_rows(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_each_other(dtype):
    weights = (normal(37, 1000) * torch.linspace(0.1, 3, 37)[:, None]).to(dtype)
    whole = quantize_rows(weights)
    for start, stop in ((0, 1), (5, 18), (19, 37)):
        assert torch.equal(quantize_rows(weights[start:stop]), whole[start:stop])
        part = dequantize_rows(whole[start:stop], 1000, dtype)
        assert torch.equal(part, dequantize_rows(whole, 1000, dtype)[start:stop])


def test_bytes_in_other_dtypes_are_the_same_bytes():
    packed = quantize_rows(normal(6, 200))
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(dequantize_rows(packed.view(dtype), 200, dtype), dequantize_rows(packed, 200, dtype))


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_computes_what_its_plain_twin_does(dtype):
    packed = quantize_rows(normal(7, 200))
    found = dequantize_rows(packed, 200, dtype)
    assert quantization.DEQUANTIZE.failure is None
    assert "_compiled" in vars(quantization.DEQUANTIZE)
    assert quantization.check_dequantize(torch.device("cpu"), dtype) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization.DEQUANTIZE, "failure", "no")
        assert torch.equal(dequantize_rows(packed, 200, dtype), found)


def test_many_rows_are_dequantised_some_at_a_time(monkeypatch):
    packed = quantize_rows(normal(50, 128))
    expected = dequantize_rows(packed, 128, torch.bfloat16)
    monkeypatch.setattr(quantization, "_CHUNK", 128 * 7)
    assert torch.equal(dequantize_rows(packed, 128, torch.bfloat16), expected)


# --- the linear layer ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_output_and_gradient_are_those_of_the_dequantised_weight(dtype, biased):
    weights = quantize_rows(normal(24, 100)).view(dtype)
    bias = normal(24, seed=1).to(dtype) if biased else None
    exact = dequantize_rows(weights, 100, dtype)
    given, twin = (normal(2, 5, 100, seed=2).to(dtype).requires_grad_() for _ in range(2))
    out, expected = quantized_linear(given, weights, bias), F.linear(twin, exact, bias)
    assert torch.equal(out, expected)
    upstream = normal(2, 5, 24, seed=3).to(dtype)
    out.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(given.grad, twin.grad)


def test_the_operator_is_what_torch_asks_of_one():
    weights = quantize_rows(normal(24, 100)).view(torch.float32)
    given = normal(3, 100).requires_grad_()
    torch.library.opcheck(quantized_linear, (given, weights, None))
    torch.library.opcheck(quantized_linear, (given, weights, normal(24)))


def test_only_the_packed_weight_is_kept_for_the_backward_pass():
    weights, kept = quantize_rows(normal(64, 256)).view(torch.bfloat16), []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    given = normal(8, 256).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        quantized_linear(given, weights, None)
    assert [tensor.data_ptr() for tensor in kept] == [weights.data_ptr()]


# --- which layers ---

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def meta(kind="mistral", *, targets=("q_proj",), **overrides):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(toy_config(kind, **overrides), dtype=torch.float32)
    if targets:
        inject_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=list(targets))
    else:
        model.requires_grad_(False)
    cast_frozen(model, torch.bfloat16)
    return model


def last(names):
    return {name.rpartition(".")[2] for name in names}


def test_frozen_linear_layers_of_the_blocks_are_quantised_and_nothing_else():
    model = meta(tie_word_embeddings=True)
    before = dict(model.named_parameters())
    quantize(model, torch.bfloat16)
    layers = quantized_layers(model)
    assert len(layers) == 2 * 7
    assert last(layers) == {*ATTENTION, *MLP}
    assert {type(layer) for name, layer in layers.items() if name.endswith("q_proj")} == {QuantizedLoRALinear}
    assert {type(layer) for name, layer in layers.items() if not name.endswith("q_proj")} == {QuantizedLinear}
    after = dict(model.named_parameters())
    assert list(after) == list(before)  # names and order stay
    changed = {name for name in before if after[name] is not before[name]}
    assert changed == {f"{name}.weight" for name in layers}
    for layer in layers.values():
        assert layer.weight.shape == (layer.out_features, PackedRow(layer.in_features).size // 2)
        assert layer.weight.dtype == torch.bfloat16
        assert not layer.weight.requires_grad
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_trained_or_named_keeps_its_weights():
    model = meta()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    quantize(model, torch.bfloat16, keep=["o_proj"])
    assert last(quantized_layers(model)) == {"q_proj", "k_proj", "v_proj", *MLP}
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    other = meta()
    quantize(other, torch.bfloat16, keep=["mlp"])
    assert last(quantized_layers(other)) == set(ATTENTION)
    assert len({describe(model), describe(other), describe(meta())}) == 3
    assert describe(meta()) == ""


def test_biases_stay(monkeypatch):
    model = meta("qwen2")
    quantize(model, torch.bfloat16)
    layer = model.model.layers[0].self_attn.k_proj
    assert isinstance(layer, QuantizedLinear)
    assert layer.bias.shape == (16,)


@pytest.mark.parametrize("name", ["gate", "router", "shared_expert_gate", "classifier"])
def test_routers_stay(name):
    model = meta()
    model.model.layers[0].mlp.add_module(name, nn.Linear(32, 4, device="meta"))
    model.requires_grad_(False)
    quantize(model, torch.bfloat16)
    assert name not in last(quantized_layers(model))


def test_a_model_without_such_layers_is_refused():
    model = meta(targets=())
    for name in (*ATTENTION, *MLP):
        for block in model.model.layers:
            owner = block.self_attn if name in ATTENTION else block.mlp
            delattr(owner, name)
    with pytest.raises(ValueError, match=r"model\.quantization: MistralForCausalLM has no frozen nn\.Linear"):
        quantize(model, torch.bfloat16)


def test_the_summary_counts():
    model = meta(hidden_size=128, intermediate_size=256, head_dim=32)
    total = sum(parameter.numel() for parameter in model.parameters())
    quantize(model, torch.bfloat16)
    # q, o: 128 x 128; k, v: 64 x 128; gate, up: 256 x 128; down: 128 x 256; two blocks
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
    # rows of 128: 64 codes, 2 scales in 16, 16: 96 bytes; of 256: 128 + 16 + 16 = 160
    stored = 2 * ((2 * 128 + 2 * 64 + 2 * 256) * 96 + 128 * 160)
    assert f"{weights / 1e6:,.1f} of {total / 1e6:,.1f} million weights in {8 * stored / weights:.2f} bits" in summary(
        model
    )


# --- filling ---


def layer_of(rows: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> QuantizedLinear:
    layer = QuantizedLinear(inputs, rows, bias=False, device="meta")
    stored = torch.zeros(rows, PackedRow(inputs).size // dtype.itemsize, dtype=dtype)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    return layer


def test_a_layer_is_filled_some_rows_at_a_time(monkeypatch):
    weights, read = normal(50, 128).bfloat16(), []

    class Source:
        def __getitem__(self, rows):
            read.append((rows.start, rows.stop))
            return weights[rows]

    monkeypatch.setattr(quantization, "_CHUNK", 128 * 20)
    layer = layer_of(50, 128)
    RowsToQuantize(layer, "name").fill(Source())
    assert read == [(0, 20), (20, 40), (40, 50)]
    assert torch.equal(layer.weight.view(torch.uint8), quantize_rows(weights))
    assert torch.equal(layer.dequantized(), there_and_back(weights, torch.bfloat16))


def test_a_bad_weight_is_named():
    weights = normal(4, 64)
    weights[3, 3] = math.nan
    with pytest.raises(ValueError, match=r"blocks\.0\.weight cannot be quantised: some of its weights"):
        RowsToQuantize(layer_of(4, 64), "blocks.0.weight").fill(weights)


def test_a_lora_layer_adds_its_adapter_to_the_quantised_product():
    model = toy_model()
    inject_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj"])
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoRALinear)
    weights = layer.weight.detach().clone()
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    quantize(model, torch.float32)
    RowsToQuantize(layer, "q").fill(weights)
    given = normal(3, 32)
    expected = given @ there_and_back(weights).T + 2 * (given @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(given), expected)
    layer.adapter_on = False
    torch.testing.assert_close(layer(given), given @ there_and_back(weights).T)
