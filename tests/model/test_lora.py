"""LoRA: the arithmetic by hand, what injection touches, what a seed fixes, switching off and merging."""

import math

import pytest
import torch
from families import make_family
from torch import nn
from toys import logits, toy_model

from notus.model.lora import (
    LoRALinear,
    adapters_off,
    cast_frozen,
    init_lora,
    inject_lora,
    lora_layers,
    merge_lora,
    saved_parameters,
)
from notus.model.verify import choose_path

IDS = torch.tensor([[1, 7, 30, 55, 4, 99]])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapted(kind="mistral", *, targets=ATTENTION, rank=4, alpha=8.0, dropout=0.0, rslora=False, **overrides):
    """A toy model with LoRA layers whose B is not zero."""
    model = toy_model(kind, **overrides)
    inject_lora(model, rank=rank, alpha=alpha, dropout=dropout, target_modules=targets, rslora=rslora)
    init_lora(model, seed=3)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.5, generator=generator)
    return model.eval()


def small_layer(rslora, dropout=0.0):
    """W = [[1, 2]], b = 10, A = [[1, 0], [0, 1], [1, 1], [0, 0]], B = [[1, 1, 1, 1]], α = 8, r = 4."""
    base = nn.Linear(2, 1)
    layer = LoRALinear(base, rank=4, alpha=8.0, dropout=dropout, rslora=rslora)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.bias.fill_(10.0)
        layer.lora_A.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
        layer.lora_B.fill_(1.0)
    return layer


# x = [3, 5]: Wx + b = 3 + 10 + 10 = 23; BAx = 3 + 5 + 8 + 0 = 16; α/r = 2, α/√r = 4.
@pytest.mark.parametrize(("rslora", "expected"), [(False, 23 + 2 * 16), (True, 23 + 4 * 16)])
def test_forward_by_hand(rslora, expected):
    layer = small_layer(rslora)
    assert layer(torch.tensor([3.0, 5.0])).item() == expected


def test_dropout_acts_on_the_adapters_input_alone_and_only_in_training():
    layer = small_layer(False, dropout=0.5)
    torch.manual_seed(0)
    # Each input is doubled or dropped, and BA = [2, 2]:
    possible = {23 + 2 * (2 * 6 * a + 2 * 10 * b) for a in (0, 1) for b in (0, 1)}
    seen = {layer(torch.tensor([3.0, 5.0])).item() for _ in range(40)}
    assert seen == possible
    assert layer.eval()(torch.tensor([3.0, 5.0])).item() == 55


def test_gradients_reach_a_and_b_and_nothing_else():
    model = adapted("qwen2").train()
    model(IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    expected = {f"{name}.{part}" for name in lora_layers(model) for part in ("lora_A", "lora_B")}
    assert with_gradient == expected
    assert len(expected) == 2 * 4 * 2


def test_injection_keeps_the_base_names_and_freezes_the_base():
    before = set(dict(toy_model("qwen2").named_parameters()))
    model = adapted("qwen2", targets=["q_proj", "down_proj"])
    after = dict(model.named_parameters())
    assert before < set(after)
    new = set(after) - before
    assert new == {
        f"model.layers.{i}.{name}.{part}"
        for i in (0, 1)
        for name in ("self_attn.q_proj", "mlp.down_proj")
        for part in ("lora_A", "lora_B")
    }
    assert {name for name, p in after.items() if p.requires_grad} == new
    layer = model.model.layers[0].mlp.down_proj
    assert layer.lora_A.shape == (4, 48)
    assert layer.lora_B.shape == (32, 4)
    assert model.model.layers[0].self_attn.q_proj.bias is not None


def test_all_linear_spares_the_head():
    model = adapted(targets="all-linear")
    assert len(lora_layers(model)) == 2 * 7
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        (["k_proj", "qproj"], 4, "'qproj' matches no linear layer; take one of: q_proj"),
        (["embed_tokens"], 4, "'embed_tokens' matches no linear layer"),
        (["lm_head"], 4, "'lm_head' is the output head"),
        (["q_proj"], 33, r"lora\.rank 33 is above what model\.layers\.0\.self_attn\.q_proj can hold, 32"),
    ],
)
def test_wrong_targets_and_ranks_are_errors(targets, rank, message):
    with pytest.raises(ValueError, match=message):
        adapted(targets=targets, rank=rank)


def test_init_is_kaiming_uniform_and_fixed_by_seed_and_name():
    models = [adapted(targets=targets, rank=16) for targets in (["q_proj"], "all-linear")]
    first, second = (model.model.layers[1].self_attn.q_proj.lora_A for model in models)
    assert torch.equal(first, second)  # other adapters do not shift the draw
    bound = 1 / math.sqrt(32)  # √(6 / ((1 + 5) · fan_in)), fan_in = 32
    assert first.abs().max() <= bound
    # uniform on [-bound, bound]: standard deviation bound/√3; 512 draws
    assert first.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.08)
    assert not torch.equal(first, models[0].model.layers[0].self_attn.q_proj.lora_A)
    init_lora(models[1], seed=4)
    assert not torch.equal(first, second)


def test_adapters_off_is_the_base_and_ends_with_the_context():
    model = adapted(targets="all-linear")
    on, base = logits(model), logits(toy_model())
    assert (on - base).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(logits(model), base)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])  # without and with biases
def test_merged_is_the_adapters_forward(kind):
    model = adapted(kind, targets="all-linear", rslora=True)
    expected = logits(model)
    merge_lora(model)
    assert not lora_layers(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert set(dict(model.named_parameters())) == set(dict(toy_model(kind).named_parameters()))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_merging_into_bf16_rounds_once():
    base = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    model = nn.Sequential(LoRALinear(base, rank=1, alpha=1.0, dropout=0.0, rslora=False))
    with torch.no_grad():
        base.weight.fill_(1.0)
        model[0].lora_A.fill_(1.0)
        model[0].lora_B.fill_(2**-8 + 2**-18)
    merge_lora(model)
    # Above 1, bf16 has steps of 2⁻⁷. The sum 1 + 2⁻⁸ + 2⁻¹⁸ is past the middle of one and rounds up. Rounded
    # before, BA would be 2⁻⁸, and the sum, a tie, would go to the even 1.
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].weight.item() == 1 + 2**-7


def test_cast_frozen_keeps_ties_and_spares_the_trained():
    model = toy_model("qwen2", tie_word_embeddings=True)
    inject_lora(model, rank=2, alpha=2, dropout=0.0, target_modules=["v_proj"])
    cast_frozen(model, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert dtypes["model.embed_tokens.weight"] == torch.bfloat16
    assert dtypes["model.layers.0.self_attn.v_proj.lora_A"] == torch.float32
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_beside_routed_experts_layers_that_peft_misreads_are_refused() -> None:
    """PEFT takes `gate_proj` of DeepSeek's dense first layer for its experts'."""
    model = make_family("deepseek_v3")
    with pytest.raises(ValueError, match=r"set lora.target_modules=\[kv_a_proj_with_mqa, kv_b_proj, o_proj"):
        inject_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear")
    with pytest.raises(ValueError, match="gate_proj"):
        inject_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=["o_proj", "gate_proj"])
    inject_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=["o_proj"])


def test_a_layer_that_does_more_than_a_product_takes_no_adapter() -> None:
    model = make_family("llama4_text")  # its router is a subclass of nn.Linear
    with pytest.raises(ValueError, match="router"):
        inject_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=["router"])


def test_a_model_without_linear_layers_says_so() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layers"):
        inject_lora(make_family("gpt2"), rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear")


ATTENTION_OF_DEEPSEEK = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("deepseek_v32", ATTENTION_OF_DEEPSEEK),
        ("falcon_mamba", "all-linear"),
        ("gemma3", "all-linear"),
        ("jamba", ["q_proj", "in_proj", "x_proj", "out_proj"]),
        ("llama", "all-linear"),
        ("mamba", "all-linear"),
        ("mixtral", "all-linear"),
        ("zamba2", "all-linear"),
    ],
)
def test_a_gradient_reaches_every_adapter(name, targets):
    model = make_family(name)
    inject_lora(
        model, rank=1, alpha=4.0, dropout=0.0, target_modules=targets, idle=choose_path(make_family(name).config).idle
    )
    init_lora(model, seed=0)
    model(IDS, labels=IDS).loss.backward()
    layers = lora_layers(model)
    assert layers
    assert [name for name, layer in layers.items() if layer.lora_B.grad is None or not layer.lora_B.grad.any()] == []


def test_idle_layers_are_no_targets():
    model, idle = make_family("mamba"), {"backbone.layers.*.mixer.dt_proj"}
    with pytest.raises(ValueError, match=r"^LoRA target 'dt_proj': an adapter would have no effect there, .*leave it"):
        inject_lora(model, rank=1, alpha=4.0, dropout=0.0, target_modules=["in_proj", "dt_proj"], idle=idle)
    with pytest.raises(ValueError, match=r"take one of: in_proj, x_proj, all-linear$"):
        inject_lora(model, rank=1, alpha=4.0, dropout=0.0, target_modules=["zzz"], idle=idle)
    inject_lora(model, rank=1, alpha=4.0, dropout=0.0, target_modules="all-linear", idle=idle)
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {"in_proj", "x_proj"}
    with pytest.raises(ValueError, match=r"^LoRA target 'out_proj': .* PEFT would not load it: leave it out"):
        inject_lora(make_family("mamba"), rank=1, alpha=4.0, dropout=0.0, target_modules=["out_proj"], idle=idle)


def test_the_layers_to_take_beside_routed_experts_are_not_idle():
    model = make_family("deepseek_v32")
    with pytest.raises(ValueError, match=r"set lora.target_modules=\[(?!.*wq_b)(?!.*weights_proj).*o_proj"):
        inject_lora(
            model, rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", idle=choose_path(model.config).idle
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("multi_modal_projector", "no text goes through model.multi_modal_projector, .*: leave it out$"),
        ("model", "no text goes through model, or through a part of it"),
        (
            "nothing",
            "no module is named 'nothing'; take one of: embed_tokens, input_layernorm, k_norm, lm_head, norm, ",
        ),
        ("embed_token", "no module is named 'embed_token'; take one of: embed_tokens$"),
        ("q_proj", r"model\.language_model\.layers\.0\.self_attn\.q_proj is trained in full and a LoRA target, both"),
        ("self_attn", r"layers\.0\.self_attn is trained in full and holds a LoRA target \(.*q_proj\), both"),
    ],
)
def test_modules_that_cannot_be_trained_in_full(name, message):
    with pytest.raises(ValueError, match=rf"^lora\.modules_to_save: .*{message}"):
        inject_lora(
            make_family("gemma3"), rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear", modules_to_save=[name]
        )


def test_a_name_that_the_vision_part_has_too_means_the_text_part():
    model = make_family("gemma3")
    inject_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj"], modules_to_save=["k_proj"])
    expected = {f"model.language_model.layers.{block}.self_attn.k_proj.weight" for block in range(4)}
    assert saved_parameters(model).keys() == expected
