"""Tiny models of every family of decoder-only language models in transformers, with random weights that tell.

Each family has its own config class of transformers, shrunk to a few thousand parameters but with every kind of layer
that it may have: sliding beside full attention, state-space or linear attention beside softmax attention, dense beside
mixture-of-experts layers. Soft caps, scalings, sinks and biases get values that change the result, so that whoever
forgets one computes something else.

`FAMILIES` holds those that the installed transformers knows.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Path = Literal["packed", "plain", "refused"]

# What a config gets of these is what its class knows.
SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "sliding_window": 8,
    # experts
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    # latent attention, and attention to an indexed few
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 8,  # enough that scores behind a ReLU seldom tie at 0
    # state-space and linear attention
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
    "use_mamba_kernels": False,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # scalings
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "query_pre_attn_scalar": 16,
    "logit_scale": 0.25,
    "logits_scaling": 2.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
LATENT: dict[str, Any] = {"num_key_value_heads": 4}  # every head of latent attention has its own keys
FULL_AND_SLIDING = ["sliding_attention", "full_attention"]
DENSE_AND_SPARSE = ["dense", "sparse"]
LINEAR_AND_FULL = ["linear_attention", "full_attention"]
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": 32,
}
ENCODER_SIZES = {
    name: VISION[name]
    for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    )
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", **ENCODER_SIZES}
CLIP = {**SIGLIP, "model_type": "clip_vision_model"}
PIXTRAL = {**SIGLIP, "model_type": "pixtral", "head_dim": 8}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family, or a variant of it.

    Attributes:
        name: of the family; a variant's name follows a slash.
        config: makes its tiny config.
        expected_path: how `model.path: auto` computes it; "refused": not at all.
        tolerance: the largest difference of a token's log-prob from the model's own forward, in nats, that counts as
            rounding: some families compute in steps that magnify it.
        slow: takes seconds rather than tenths.
        note: published models of this family.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    expected_path: Path = "packed"
    tolerance: float = 5e-5
    slow: bool = False
    note: str = ""


def tiny_config(model_type: str, **overrides: object) -> PreTrainedConfig:
    """Return a small config of a model type; `overrides` win over `SIZES`."""
    config_class: Any = CONFIG_MAPPING[model_type]
    return config_class(**_settings(config_class, SIZES, overrides))


def tiny_vision_language_config(
    model_type: str, text: Mapping[str, object], vision: Mapping[str, object], **overrides: object
) -> PreTrainedConfig:
    """Return a small config of a model that reads images and text; `text` and `vision` say what its parts are."""
    config_class: Any = CONFIG_MAPPING[model_type]
    return config_class(
        text_config=_part(config_class.sub_configs["text_config"], SIZES, text),
        vision_config=_part(config_class.sub_configs["vision_config"], VISION, vision),
        **overrides,
    )


def _part(config_class: Any, sizes: Mapping[str, Any], overrides: Mapping[str, object]) -> dict[str, Any]:
    if "model_type" in overrides:  # a part of any type
        config_class = CONFIG_MAPPING[str(overrides["model_type"])]
    return {"model_type": config_class.model_type, **_settings(config_class, sizes, overrides)}


def _settings(config_class: Any, sizes: Mapping[str, Any], overrides: Mapping[str, object]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(config_class)}
    settings = {}
    for name, value in sizes.items():
        own = name if name in known else (config_class.attribute_map or {}).get(name)
        if own in known:
            settings[own] = value
    return copy.deepcopy({**settings, **overrides})  # a config may write into what it is given


def _family(
    name: str,
    published: str,
    *,
    path: Path = "packed",
    tolerance: float = 5e-5,
    slow: bool = False,
    **overrides: object,
) -> Family:
    kind = name.split("/")[0]
    return Family(name, lambda: tiny_config(kind, **overrides), path, tolerance, slow, published)


def _vision_language(
    name: str,
    published: str,
    text: Mapping[str, object],
    vision: Mapping[str, object],
    *,
    path: Path = "packed",
    tolerance: float = 5e-5,
    **overrides: object,
) -> Family:
    kind = name.split("/")[0]
    return Family(
        name, lambda: tiny_vision_language_config(kind, text, vision, **overrides), path, tolerance, False, published
    )


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0], "original_max_position_embeddings": 256,
}  # fmt: skip

DENSE = [
    _family("llama", "Llama 2, 3, 3.1, 3.2, 3.3; Yi; SmolLM2; TinyLlama; DeepSeek LLM", rope_parameters=LLAMA3),
    _family(
        "llama/biases",
        "Llama with biases and a tied head",
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    _family("llama/yarn", "Llama with YaRN, such as Yarn-Llama-2", rope_parameters=YARN),
    _family("llama/linear", "Vicuna 16k", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    _family("llama/dynamic", "Llama with dynamic RoPE, such as InternLM2's", rope_parameters=DYNAMIC),
    _family("mistral", "Mistral 7B v0.1; Zephyr 7B; Notus 7B; Mistral Nemo"),
    _family("mistral/full", "Mistral 7B v0.2, v0.3", sliding_window=None),
    _family("ministral", "Ministral 8B", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family("ministral3", "Ministral 3 (text)", rope_parameters={**YARN, "llama_4_scaling_beta": 0.1}),
    _family("qwen2", "Qwen1.5, Qwen2, Qwen2.5, QwQ", tie_word_embeddings=True),
    _family(
        "qwen2/sliding",
        "Qwen2 with a sliding window",
        num_hidden_layers=4,
        use_sliding_window=True,
        max_window_layers=2,
    ),
    _family("qwen3", "Qwen3 dense"),
    _family("gemma", "Gemma 1, CodeGemma", num_key_value_heads=1),
    _family("gemma2", "Gemma 2", num_hidden_layers=4),
    _family("gemma2/uncapped", "Gemma 2 without soft caps", final_logit_softcapping=None, attn_logit_softcapping=None),
    _family(
        "gemma3_text",
        "Gemma 3 270M, 1B",
        num_hidden_layers=4,
        layer_types=FULL_AND_SLIDING * 2,
        final_logit_softcapping=None,
        attn_logit_softcapping=None,
    ),
    _family(
        "gemma3n_text",
        "Gemma 3n (text)",
        num_hidden_layers=4,
        layer_types=FULL_AND_SLIDING * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=400,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        intermediate_size=[48] * 4,
    ),
    _family(
        "gemma4_text",
        "Gemma 4 E2B, E4B (text)",
        num_hidden_layers=4,
        layer_types=FULL_AND_SLIDING * 2,
        global_head_dim=16,
        vocab_size_per_layer_input=400,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
    ),
    _family(
        "gemma4_text/moe",
        "Gemma 4 26B-A4B (text)",
        num_hidden_layers=4,
        layer_types=FULL_AND_SLIDING * 2,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        top_k_experts=2,
        attention_k_eq_v=True,
    ),
    _family("vaultgemma", "VaultGemma 1B", num_hidden_layers=4),
    _family(
        "phi",
        "phi-1, phi-1.5, phi-2",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    _family("phi3", "Phi-3 mini 4k, Phi-3 medium, Phi-4", original_max_position_embeddings=256),
    _family(
        "phi3/longrope",
        "Phi-3/3.5 mini 128k, Phi-4-mini",
        original_max_position_embeddings=256,
        max_position_embeddings=1024,
        rope_parameters=LONGROPE,
    ),
    _family("olmo", "OLMo 1", clip_qkv=1.0),
    _family("olmo2", "OLMo 2"),
    _family("olmo3", "OLMo 3", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family("smollm3", "SmolLM3", num_hidden_layers=4),
    _family("starcoder2", "StarCoder2", residual_dropout=0.1, embedding_dropout=0.1),
    _family("stablelm", "StableLM 2, StableLM 3B", use_qkv_bias=True),
    _family("stablelm/parallel", "StableLM 2 12B", use_parallel_residual=True, qk_layernorm=True),
    _family("glm", "GLM-4 9B"),
    _family("glm4", "GLM-4-0414"),
    _family("cohere", "Command-R, Aya 23, Aya Expanse", use_qk_norm=True),
    _family("cohere2", "Command-R7B, Command-A, Tiny Aya", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family("granite", "Granite 3, Granite 4 dense"),
    _family("granite_swa", "Granite with sliding windows", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family("hyperclovax", "HyperCLOVA X SEED"),
    _family("helium", "Helium 2B", num_key_value_heads=2),
    _family("nemotron", "Nemotron-4, Minitron"),
    _family("arcee", "Arcee AFM 4.5B"),
    _family("apertus", "Apertus 8B, 70B"),
    _family("bitnet", "BitNet b1.58 2B"),
    _family("cwm", "Code World Model", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family("exaone4", "EXAONE 4.0", num_hidden_layers=4),
    _family("ernie4_5", "ERNIE 4.5 0.3B", use_bias=True),
    _family("seed_oss", "Seed-OSS 36B"),
    _family("hunyuan_v1_dense", "Hunyuan 0.5B to 7B"),
    _family("jais2", "Jais 2"),
    _family("internlm3", "InternLM 3"),
    _family("iquestcoder", "IQuest-Coder"),
    _family("nanochat", "nanochat"),
    _family(
        "modernbert-decoder",
        "Ettin decoders",
        path="plain",
        num_hidden_layers=4,
        layer_types=FULL_AND_SLIDING * 2,
        local_attention=16,
        pad_token_id=0,
    ),
    _family("minicpm3", "MiniCPM3 4B", **LATENT, dim_model_base=16),
    _family("youtu", "Youtu-LLM 2B", **LATENT),
    _family("persimmon", "Persimmon 8B"),
    _family("diffllama", "DiffLlama"),
    _family("doge", "Doge (dense)", keep_window_size=64, path="plain"),
    _family(
        "gemma4_unified_text",
        "Gemma 4 12B (text)",
        num_hidden_layers=4,
        layer_types=FULL_AND_SLIDING * 2,
        global_head_dim=16,
    ),
    _family(
        "cohere_compass_text",
        "North Micro (text)",
        num_hidden_layers=4,
        layer_types=FULL_AND_SLIDING * 2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "full_attention": None,
        },
    ),
    _family(
        "lfm3",
        "LFM3",
        num_hidden_layers=4,
        path="plain",
        layer_types=["conv", "full_attention", "conv", "sliding_attention"],
    ),
]
OLDER = [
    _family("gpt2", "GPT-2, DialoGPT"),
    _family("gpt-sw3", "GPT-SW3", scale_attn_by_inverse_layer_idx=True),
    _family("gpt_bigcode", "StarCoder 1, SantaCoder"),
    _family("gpt_neo", "GPT-Neo", attention_types=[[["global", "local"], 1]], window_size=8, path="plain"),
    _family("gpt_neox", "Pythia, GPT-NeoX 20B, Dolly 2", tie_word_embeddings=False),
    _family("gpt_neox/tied", "GPT-NeoX, tied", tie_word_embeddings=True, use_parallel_residual=False),
    _family("gpt_neox_japanese", "GPT-NeoX Japanese", path="plain"),
    _family("gptj", "GPT-J 6B", rotary_dim=4, path="plain"),
    _family("codegen", "CodeGen", rotary_dim=4, path="plain"),
    _family("opt", "OPT", ffn_dim=48, pad_token_id=1, layerdrop=0.3),
    _family("xglm", "XGLM", ffn_dim=48, pad_token_id=1, layerdrop=0.3, path="plain"),
    _family("biogpt", "BioGPT", pad_token_id=1, layerdrop=0.3),
    _family("bloom", "BLOOM, BLOOMZ", path="plain"),
    _family("mpt", "MPT 7B, 30B", path="plain"),
    _family("falcon", "Falcon 7B", path="plain"),
    _family("falcon/new", "Falcon 40B, Falcon 2", new_decoder_architecture=True, num_kv_heads=2, path="plain"),
    _family("falcon/alibi", "Falcon RW", alibi=True, multi_query=False, parallel_attn=False, bias=True, path="plain"),
    _family("ctrl", "CTRL", dff=48),
    _family("openai-gpt", "GPT-1", path="plain"),
]
EXPERTS = [
    _family("mixtral", "Mixtral 8x7B, 8x22B", sliding_window=None),
    _family("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", num_hidden_layers=3, mlp_only_layers=[1]),
    _family("qwen3_moe", "Qwen3-30B-A3B, Qwen3-235B-A22B", num_hidden_layers=3, mlp_only_layers=[1]),
    _family("gpt_oss", "gpt-oss 20B, 120B", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family("olmoe", "OLMoE", clip_qkv=1.0),
    _family("flex_olmo", "FlexOlmo"),
    _family("granitemoe", "Granite 3 MoE"),
    _family("granitemoeshared", "Granite MoE with shared experts"),
    _family(
        "granitemoe_swa", "Granite MoE with sliding windows", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2
    ),
    _family("phimoe", "Phi-3.5-MoE", lm_head_bias=True, attention_bias=True, sliding_window=None),
    _family("deepseek_v2", "DeepSeek-V2, V2-Lite, Coder-V2", **LATENT, num_hidden_layers=3, first_k_dense_replace=1),
    _family(
        "deepseek_v3",
        "DeepSeek-V3, R1, Kimi K2",
        **LATENT,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
    ),
    _family("deepseek_v32", "DeepSeek-V3.2", **LATENT, num_hidden_layers=3, first_k_dense_replace=1, path="plain"),
    _family("glm4_moe", "GLM-4.5, GLM-4.6", num_hidden_layers=3, first_k_dense_replace=1, use_qk_norm=True),
    _family("glm4_moe_lite", "GLM-4.7-Flash", **LATENT, mlp_layer_types=DENSE_AND_SPARSE),
    _family("glm_moe_dsa", "GLM-5", **LATENT, mlp_layer_types=DENSE_AND_SPARSE, path="plain"),
    _family(
        "dots1",
        "dots.llm1",
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_shared_experts=1,
        layer_types=None,
    ),
    _family(
        "ernie4_5_moe", "ERNIE 4.5 21B-A3B", num_hidden_layers=3, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1
    ),
    _family("exaone_moe", "K-EXAONE", num_hidden_layers=4),
    _family("hunyuan_v1_moe", "Hunyuan A13B", moe_topk=2),
    _family("hy_v3", "HY 3", mlp_layer_types=DENSE_AND_SPARSE),
    _family("jetmoe", "JetMoE 8B", kv_channels=8, num_key_value_heads=2, path="plain"),
    _family(
        "dbrx",
        "DBRX",
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
    ),
    _family("minimax_m2", "MiniMax-M2"),
    _family("solar_open", "Solar Open 100B"),
    _family("afmoe", "Arcee Trinity", path="plain", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family(
        "mimo_v2_flash",
        "MiMo-V2-Flash",
        num_hidden_layers=4,
        layer_types=FULL_AND_SLIDING * 2,
        mlp_layer_types=DENSE_AND_SPARSE * 2,
    ),
    _family(
        "llama4_text",
        "Llama 4 (text)",
        num_hidden_layers=4,
        intermediate_size_mlp=48,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
        floor_scale=4,
        path="plain",
    ),
    _family("longcat_flash", "LongCat-Flash", **LATENT, num_layers=2, zero_expert_num=2),
    _family("aria_text", "Aria (text)", moe_num_experts=4),
    _family(
        "doge/moe",
        "Doge-MoE (transformers' router mixes the tokens of a batch)",
        path="refused",
        keep_window_size=64,
        is_moe=True,
        num_experts=16,
    ),
    _family("laguna", "Laguna", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family("mellum", "Mellum 2", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family("flint", "Flint", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family("kolibri1", "Kolibri 1", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family(
        "beam", "Beam", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2, mlp_layer_types=DENSE_AND_SPARSE * 2
    ),
    _family("axk1", "A.X K1", **LATENT, mlp_layer_types=DENSE_AND_SPARSE),
    _family("cohere2_moe", "Cohere 2 MoE", num_hidden_layers=4, layer_types=FULL_AND_SLIDING * 2),
    _family("axk2", "A.X K2", **LATENT, mlp_layer_types=DENSE_AND_SPARSE, gated_norm_rank=4, path="plain"),
    _family("hy_v4", "HY 4", **LATENT, mlp_layer_types=DENSE_AND_SPARSE, hc_mult=2, path="plain"),
    _family(
        "dots3_note_text",
        "dots.note 3 (text)",
        **LATENT,
        mlp_layer_types=DENSE_AND_SPARSE,
        path="plain",
        shared_experts_intermediate_size=24,
    ),
    _family(
        "minimax_m3_vl_text",
        "MiniMax-M3 (text)",
        path="plain",
        layer_types=["full_attention", "minimax_m3_sparse"],
        dense_intermediate_size=48,
        rotary_dim=4,
        mlp_layer_types=DENSE_AND_SPARSE,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=8,
        index_topk_blocks=2,
    ),
    _family("mistral4", "Mistral Small 4 (text)", **LATENT, num_hidden_layers=3, first_k_dense_replace=1),
]
INKLING: dict[str, Any] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "unpadded_vocab_size": 396,
}
OTHER_MIXERS = [
    _family("mamba", "Mamba", state_size=4, path="plain"),
    _family(
        "mamba2",
        "Mamba 2, Codestral Mamba",
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=2,
        chunk_size=16,
        path="plain",
    ),
    _family("falcon_mamba", "Falcon Mamba 7B", state_size=4, path="plain"),
    _family(
        "jamba", "Jamba", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, path="plain", mamba_d_state=4
    ),
    _family("bamba", "Bamba 9B", num_hidden_layers=3, attn_layer_indices=[1], path="plain"),
    _family(
        "falcon_h1",
        "Falcon-H1",
        mamba_d_ssm=64,
        path="plain",
        lm_head_multiplier=0.5,
        embedding_multiplier=2.0,
        key_multiplier=0.7,
        attention_out_multiplier=0.8,
        ssm_out_multiplier=1.5,
    ),
    _family(
        "granitemoehybrid",
        "Granite 4 H",
        num_hidden_layers=4,
        layer_types=["mamba", "attention"] * 2,
        position_embedding_type="rope",
        path="plain",
    ),
    _family(
        "granitemoehybrid/attention",
        "Granite 4 dense",
        layer_types=["attention"] * 2,
        num_local_experts=0,
        num_experts_per_tok=0,
        position_embedding_type="rope",
    ),
    _family(
        "zamba",
        "Zamba 7B",
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        num_key_value_heads=4,
        attention_head_dim=16,
        mamba_d_state=4,
        path="plain",
    ),
    _family(
        "zamba2",
        "Zamba2",
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        num_key_value_heads=4,
        attention_head_dim=16,
        mamba_d_state=8,
        chunk_size=16,
        n_mamba_heads=4,
        adapter_rank=4,
        path="plain",
    ),
    _family(
        "nemotron_h",
        "Nemotron-H, Nemotron Nano 2",
        layers_block_type=["mamba", "attention", "mlp", "moe"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=16,
        moe_shared_expert_intermediate_size=24,
        sliding_window=None,
        path="plain",
    ),
    _family(
        "recurrent_gemma",
        "RecurrentGemma, Griffin",
        num_hidden_layers=3,
        logits_soft_cap=3.0,
        lru_width=32,
        attention_window_size=64,
        path="plain",
    ),
    _family("rwkv", "RWKV-4", path="plain", rescale_every=0),
    _family(
        "xlstm",
        "xLSTM 7B",
        hidden_size=64,
        num_heads=4,
        qk_dim_factor=1.0,
        output_logit_soft_cap=3.0,
        ffn_round_up_to_multiple_of=8,
        path="plain",
    ),
    _family(
        "lfm2",
        "LFM2",
        num_hidden_layers=4,
        layer_types=["conv", "full_attention"] * 2,
        block_multiple_of=8,
        path="plain",
    ),
    _family("lfm2_moe", "LFM2 8B-A1B", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2, path="plain"),
    _family("qwen3_next", "Qwen3-Next 80B-A3B", num_hidden_layers=4, layer_types=LINEAR_AND_FULL * 2, path="plain"),
    _family("qwen3_5_text", "Qwen3.5 (text)", num_hidden_layers=4, layer_types=LINEAR_AND_FULL * 2, path="plain"),
    _family(
        "qwen3_5_moe_text", "Qwen3.5-MoE (text)", num_hidden_layers=4, layer_types=LINEAR_AND_FULL * 2, path="plain"
    ),
    _family("olmo_hybrid", "OLMo Hybrid", num_hidden_layers=4, layer_types=LINEAR_AND_FULL * 2, path="plain"),
    _family(
        "minimax", "MiniMax-Text-01", num_hidden_layers=4, layer_types=LINEAR_AND_FULL * 2, block_size=16, path="plain"
    ),
    _family(
        "kimi_linear",
        "Kimi Linear 48B-A3B",
        **LATENT,
        num_hidden_layers=4,
        layer_types=LINEAR_AND_FULL * 2,
        mlp_layer_types=DENSE_AND_SPARSE * 2,
        linear_head_dim=8,
        linear_num_heads=4,
        path="plain",
    ),
    _family("hrm_text", "HRM-Text"),
    _family(
        "deepseek_v4",
        "DeepSeek-V4",
        num_hidden_layers=3,
        head_dim=16,
        num_key_value_heads=1,
        o_groups=2,
        o_lora_rank=8,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"],
        hc_mult=2,
        partial_rotary_factor=0.5,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        path="plain",
    ),
    _family("inkling_text", "Inkling (text)", num_hidden_layers=4, path="plain", **INKLING),
    _family("zaya", "ZAYA1", num_hidden_layers=4, num_experts_per_tok=1, router_hidden_size=16, path="plain"),
    _family(
        "bailing_hybrid",
        "Ling 2.5",
        **LATENT,
        num_hidden_layers=4,
        layer_group_size=2,
        first_k_dense_replace=1,
        path="plain",
    ),
    _family("inkling2_text", "Inkling 2 (text)", num_hidden_layers=4, path="plain", **INKLING),
    _family(
        "qwen4_exp_text",
        "Qwen 4 preview (text)",
        num_hidden_layers=4,
        path="plain",
        layer_types=LINEAR_AND_FULL * 2,
        hc_count=2,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
        ple_layer_ids=[1],
        ngram_size=2,
        heads_per_ngram=2,
        ngram_vocab_size_base=100,
        split_ngram_parts=1,
        make_ngram_vocab_size_divisible_by=8,
    ),
]
LLAMA_TEXT = {"model_type": "llama"}
QWEN2_TEXT = {"model_type": "qwen2"}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
VISION_LANGUAGE = [
    _vision_language(
        "gemma3",
        "Gemma 3 4B, 12B, 27B; MedGemma",
        {
            "num_hidden_layers": 4,
            "layer_types": FULL_AND_SLIDING * 2,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        },
        SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=399,
        boi_token_index=397,
        eoi_token_index=398,
    ),
    _vision_language(
        "mistral3",
        "Mistral Small 3.1, 3.2; Ministral 3; Magistral",
        {"model_type": "mistral"},
        PIXTRAL,
        image_token_index=10,
        tie_word_embeddings=False,
    ),
    _vision_language("llava", "LLaVA 1.5", LLAMA_TEXT, CLIP, image_token_index=399),
    _vision_language("llava_next", "LLaVA 1.6", {"model_type": "mistral"}, CLIP, image_token_index=399),
    _vision_language(
        "llava_onevision", "LLaVA-OneVision", QWEN2_TEXT, SIGLIP, image_token_index=399, video_token_index=398
    ),
    _vision_language(
        "aya_vision", "Aya Vision", {"model_type": "cohere2"}, SIGLIP, path="plain", image_token_index=399
    ),
    _vision_language(
        "qwen2_vl",
        "Qwen2-VL",
        {"rope_parameters": MROPE},
        {"in_channels": 3},
        image_token_id=399,
        video_token_id=398,
        vision_start_token_id=397,
        vision_end_token_id=396,
    ),
    _vision_language(
        "qwen2_5_vl",
        "Qwen2.5-VL",
        {"rope_parameters": MROPE},
        {"fullatt_block_indexes": [1]},
        image_token_id=399,
        video_token_id=398,
        vision_start_token_id=397,
        vision_end_token_id=396,
    ),
    _vision_language(
        "qwen3_vl",
        "Qwen3-VL",
        {"rope_parameters": MROPE},
        {"deepstack_visual_indexes": [1], "num_position_embeddings": 16},
        image_token_id=399,
        video_token_id=398,
        vision_start_token_id=397,
        vision_end_token_id=396,
    ),
    _vision_language(
        "qwen3_vl_moe",
        "Qwen3-VL-MoE",
        {"rope_parameters": MROPE},
        {"deepstack_visual_indexes": [1], "num_position_embeddings": 16},
        image_token_id=399,
        video_token_id=398,
        vision_start_token_id=397,
        vision_end_token_id=396,
    ),
    _vision_language(
        "qwen3_5",
        "Qwen3.5",
        {"num_hidden_layers": 4, "layer_types": LINEAR_AND_FULL * 2},
        {"num_position_embeddings": 16},
        image_token_id=399,
        video_token_id=398,
        vision_start_token_id=397,
        vision_end_token_id=396,
        path="plain",
    ),
    _vision_language(
        "llama4",
        "Llama 4 Scout, Maverick",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "floor_scale": 4,
        },
        {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        image_token_index=399,
        boi_token_index=397,
        eoi_token_index=398,
        path="plain",
    ),
    _vision_language(
        "internvl", "InternVL 3, 3.5", QWEN2_TEXT, {"image_size": [32, 32], "patch_size": [8, 8]}, image_token_id=399
    ),
    _vision_language(
        "gemma4",
        "Gemma 4 E2B, E4B, 26B-A4B, 31B",
        {
            "num_hidden_layers": 4,
            "layer_types": FULL_AND_SLIDING * 2,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 400,
            "hidden_size_per_layer_input": 8,
            "pad_token_id": 0,
            "num_kv_shared_layers": 2,
        },
        {"num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 16},
        image_token_id=399,
        video_token_id=398,
        boi_token_id=397,
        eoi_token_id=396,
        audio_token_id=395,
        boa_token_id=394,
        eoa_token_index=393,
    ),
    _vision_language(
        "qwen3_5_moe",
        "Qwen3.5-35B-A3B",
        {"num_hidden_layers": 4, "layer_types": LINEAR_AND_FULL * 2},
        {"num_position_embeddings": 16},
        image_token_id=399,
        video_token_id=398,
        vision_start_token_id=397,
        vision_end_token_id=396,
        path="plain",
    ),
    _vision_language(
        "mllama",
        "Llama 3.2 Vision",
        {"num_hidden_layers": 4, "cross_attention_layers": [1]},
        {
            "vision_output_dim": 64,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
            "max_num_tiles": 1,
        },
        path="plain",
        image_token_index=399,
    ),
    _vision_language(
        "cohere2_vision",
        "Command-A Vision",
        {"model_type": "cohere2"},
        SIGLIP,
        path="plain",
        image_token_id=399,
        alignment_intermediate_size=32,
    ),
    _vision_language(
        "lfm2_vl",
        "LFM2-VL",
        {
            "model_type": "lfm2",
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention"] * 2,
            "block_multiple_of": 8,
        },
        {**SIGLIP, "model_type": "siglip2_vision_model"},
        image_token_id=399,
        projector_hidden_size=32,
        path="plain",
    ),
    _vision_language(
        "glm4v_moe",
        "GLM-4.5V",
        {"rope_parameters": MROPE, "head_dim": 16, "first_k_dense_replace": 1, "num_hidden_layers": 3},
        {},
        image_token_id=399,
        video_token_id=398,
        image_start_token_id=397,
        image_end_token_id=396,
        video_start_token_id=395,
        video_end_token_id=394,
    ),
    _vision_language(
        "aria",
        "Aria",
        {"moe_num_experts": 4},
        {"model_type": "idefics3_vision", **ENCODER_SIZES},
        image_token_index=9,
        projector_patch_to_query_dict={16: 4},
    ),
    _vision_language("smolvlm", "SmolVLM 2", LLAMA_TEXT, {}, image_token_id=399),
    _vision_language("idefics3", "Idefics 3, SmolVLM 1", LLAMA_TEXT, {}, image_token_id=399),
    _vision_language(
        "glm4v",
        "GLM-4.1V",
        {"rope_parameters": MROPE},
        {},
        image_token_id=399,
        video_token_id=398,
        image_start_token_id=397,
        image_end_token_id=396,
        video_start_token_id=395,
        video_end_token_id=394,
    ),
]
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (*DENSE, *OLDER, *EXPERTS, *OTHER_MIXERS, *VISION_LANGUAGE)
    if family.name.split("/")[0] in CONFIG_MAPPING
}


# Model types that transformers has among its causal language models, but that are no family here, by the reason.
LEFT_OUT = {
    "encoders and decoders of encoder-decoders, which have a causal head but no published causal language model": [
        "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert",
        "data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "mvp", "pegasus", "plbart",
        "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm",
        "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
    ],
    "not causal: the prompt is read in both directions": ["cpmant"],
    "computes in buckets of a length that the input must be padded to": ["reformer"],
    "reads bytes, and needs a second model that cuts them into patches": ["blt"],
    "speaks or writes music: its input is not text alone": [
        "moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody",
    ],
    "helps another model to generate, and reads its hidden states": ["gemma4_assistant", "gemma4_unified_assistant"],
    "reads images; not measured": [
        "dots3_note", "emu3", "fuyu", "gemma3n", "gemma4_unified", "git", "got_ocr2", "phi4_multimodal", "qwen4_exp",
    ],
}  # fmt: skip


def make_family(name: str, seed: int = 0) -> PreTrainedModel:
    """Build a family's tiny model with vivid random weights, in fp32 on CPU, in evaluation mode."""
    torch.manual_seed(seed)
    config = FAMILIES[name].config()
    images: Any = AutoModelForImageTextToText._model_mapping  # what is published, where both classes exist
    factory: Any = AutoModelForImageTextToText if type(config) in images else AutoModelForCausalLM
    model: PreTrainedModel = factory.from_config(config, dtype=torch.float32)
    enliven(model, seed)
    return model.eval()


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> None:
    """Give a model random weights under which no setting of it is without effect.

    Matrices keep the size of what passes through them, vectors (norms, biases, sinks) are moved off their start, and
    so are the buffers that are stored with the weights, such as the biases by which routers choose experts.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)

    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            parameter.copy_(normal(parameter) * 1.5 / math.sqrt(parameter.shape[-1]))
        else:
            parameter.add_(normal(parameter) * 0.2)
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer.add_(normal(buffer) * 0.2)
