"""Sizes and footprint of all families that the project supports, beside PyTorch's memory tracker for some of them."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from notus.model.flops import dimensions
from notus.model.size import model_size
from notus.model.supported import check_supported
from notus.training import memory_estimate as footprint_module
from notus.training import optimizers
from notus.training.memory_estimate import CHECKPOINTING, Job, footprint

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from estimator import Case, compare, flops_ratio

NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "dim_model_base": 64,
}  # fmt: skip
# What these families set by default, and this project does not support.
NEUTRAL = {"final_logit_softcapping": None, "attn_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}
LATENT = {
    "num_key_value_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8,
    "v_head_dim": 32, "head_dim": 8,
}  # fmt: skip


def small_config(kind: str) -> PreTrainedConfig | None:
    """Two narrow layers of a model type; None if it cannot be built so, or is not supported."""
    with contextlib.suppress(Exception):  # each family has its own ideas of what fits together
        default = CONFIG_MAPPING[kind]()
        settings = {name: value for name, value in SMALL.items() if hasattr(default, name)}
        settings |= {name: value for name, value in NEUTRAL.items() if name in default.to_dict()}
        if getattr(default, "head_dim", None) is None:
            settings.pop("head_dim", None)
        config = AutoConfig.for_model(kind, **settings, **NO_TOKENS)
        check_supported(config)
        return config
    return None


def build(config: PreTrainedConfig) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_the_sizes_of_every_supported_family():
    found = []
    for kind in sorted(CONFIG_MAPPING):
        config, model = small_config(kind), None
        with contextlib.suppress(Exception):
            model = build(config)
        if model is None or not hasattr(model.get_decoder(), "layers"):
            continue
        size = model_size(model)
        linears = sum(linear.weights for linear in size.linears)
        assert linears == sum(
            each.weight.numel() for each in model.get_decoder().layers[0].modules() if isinstance(each, torch.nn.Linear)
        ), kind
        assert dimensions(model).body_weights == 2 * linears, kind
        for mode in CHECKPOINTING:
            assert footprint(size, Job(8, 512, 256, activation_checkpointing=mode)).total > 0, (kind, mode)
        found.append(kind)
    expected = {"olmo", "olmo2", "diffllama", "nanochat", "gemma3_text", "phi3", "glm", "youtu", "gpt_neox", "minicpm3"}
    assert expected <= set(found)
    assert len(found) >= 30


def test_the_widths_of_latent_attention_by_hand():
    size = model_size(build(small_config("youtu")))
    # 4 heads of 16 + 8 in queries and keys, of 12 in values
    assert (size.query_width, size.key_width, size.value_width, size.attended) == (96, 96, 48, 48)
    assert [linear.name for linear in size.linears[:5]] == [
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
    ]  # fmt: skip
    assert dimensions(build(small_config("youtu"))).attention_width == (96 + 48) // 2


def test_differential_attention_attends_twice():
    size = model_size(build(small_config("diffllama")))
    assert size.attentions == 2
    assert dimensions(build(small_config("diffllama"))).attention_width == 2 * 64


def test_norms_without_weight_have_the_width_of_what_they_treat():
    # of 64 in fp32, with mean and scale: 4 * 64 + 8
    assert [(norm.width, norm.bf16) for norm in model_size(build(small_config("olmo"))).norms] == [(64, 264)] * 2
    assert [norm.width for norm in model_size(build(small_config("nanochat"))).norms] == [64, 64, 64, 32]


SHAPE = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False, **NO_TOKENS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("Olmo", "none"), ("Olmo2", "products"), ("DiffLlama", "none"), ("DiffLlama", "products"),
        ("NanoChat", "selective"), ("Youtu", "none"), ("Youtu", "products"), ("Gemma3Text", "products"),
        ("Phi3", "products"), ("Glm", "selective"), ("Glm4", "full"), ("GPTNeoX", "full"),
    ],
)  # fmt: skip
def test_agrees_with_pytorchs_memory_tracker(monkeypatch, kind, mode):
    monkeypatch.setitem(optimizers.CHUNK, "cuda", 2**17)
    monkeypatch.setattr(footprint_module, "PIECE", 2**19)
    more = {"Youtu": LATENT, "NanoChat": {"final_logit_softcapping": None}}.get(kind, {})
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **more})
    case, row = Case(0, mode, "rmsprop"), (90, [150, 140], 6)
    rows, update, seen = compare(case, config, row)
    assert rows.total == pytest.approx(seen.backward_peak, rel=0.1)
    assert update.total == pytest.approx(seen.optimizer_peak, rel=0.1)
    assert flops_ratio(case, config, row, seen.flops) == pytest.approx(1, abs=0.1)
