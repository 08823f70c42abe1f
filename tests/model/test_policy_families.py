"""Packed rows of many families against each sequence alone through the model's own forward, with eager attention."""

import pytest
import torch
import transformers
from test_policy import gradients, logps_alone, pairs
from toys import toy_examples
from transformers import AutoModelForCausalLM, DynamicCache

from notus.data.packing import collate
from notus.model.attention import IMPLEMENTATION, recorded_calls
from notus.model.fused import fuse
from notus.model.policy import Policy

SHAPE = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "num_key_value_heads": 4}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "num_key_value_heads": 4,
}  # fmt: skip
DEEPSEEK = {
    **LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 24,
}  # fmt: skip
GRANITE = {"logits_scaling": 0.5, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "embedding_multiplier": 3.0}
# name: (configuration class, its settings beside `SHAPE`)
FAMILIES = {
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 5, **CAPS}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 5}),
    "vaultgemma": ("VaultGemmaConfig", {"head_dim": 8, "sliding_window": 5, **CAPS}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 8, "sliding_window": 5, **EXPERTS}),
    "granite": ("GraniteConfig", GRANITE),
    "granite, experts": ("GraniteMoeConfig", {**GRANITE, **EXPERTS}),
    "hyperclova x": ("HyperCLOVAXConfig", {"logits_scaling": 2.5}),
    "cohere": ("CohereConfig", {"logit_scale": 2.5}),
    "cohere2": ("Cohere2Config", {"logit_scale": 2.5, "head_dim": 8, "sliding_window": 5}),
    "deepseek v2": ("DeepseekV2Config", {**DEEPSEEK, "topk_method": "greedy"}),
    "deepseek v3": ("DeepseekV3Config", DEEPSEEK),
    "minicpm3": ("MiniCPM3Config", {**LATENT, "dim_model_base": 8, "scale_emb": 2, "scale_depth": 1.4}),
    "gpt2": ("GPT2Config", GPT2),
    "gpt-bigcode": ("GPTBigCodeConfig", GPT2),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "stablelm": ("StableLmConfig", {}),
    "nemotron": ("NemotronConfig", {}),
    "nanochat": ("NanoChatConfig", {"final_logit_softcapping": 3.0}),
    "qwen3, experts": ("Qwen3MoeConfig", {"head_dim": 8, **EXPERTS}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 5}),
}
# Families of which transformers knows how they are to be computed, but packed attention is never asked, or not by all.
NEVER_ASK = {
    "falcon": ("FalconConfig", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt-j": ("GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "recurrentgemma": ("RecurrentGemmaConfig", {"lru_width": 32, "num_hidden_layers": 3, "head_dim": 8}),
}


def family(kind, settings):
    config_class = getattr(transformers, kind, None)
    if config_class is None:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    config = config_class(**{**SHAPE, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            elif "sinks" in name or name.endswith("bias"):
                parameter.normal_()
    return model


def packed(kind, settings):
    """A policy with the weights of `family`; not a copy, since not every model can be copied."""
    model = family(kind, settings)
    model.set_attn_implementation(IMPLEMENTATION)
    fuse(model)
    return Policy(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_each_sequence_alone(name):
    model, policy, examples = family(*FAMILIES[name]), packed(*FAMILIES[name]), pairs()
    with recorded_calls() as calls:
        found = policy(collate(examples, 2))
    expected = logps_alone(model, examples)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(any(module in calls for module in block.modules()) for block in policy.blocks)
    got, wanted = gradients(policy.causal_lm, found), gradients(model, expected)
    whole = torch.stack([gradient.norm() for gradient in wanted.values() if gradient is not None]).norm()
    assert got.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        if gradient is None:  # a router that chooses experts and gives no weights
            assert got[parameter] is None, parameter
            continue
        # the second term: gradients that are differences of nearly equal numbers, in the plain model too
        assert (got[parameter] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * whole, parameter


@pytest.mark.parametrize("name", NEVER_ASK)
def test_blocks_that_never_ask_packed_attention_show(name):
    policy = packed(*NEVER_ASK[name])
    with recorded_calls() as calls:
        policy(collate(pairs(), 2))
    assert not all(any(module in calls for module in block.modules()) for block in policy.blocks)


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("DogeConfig", {}, "DogeAttention built an attention mask by itself"),
    ],
)
def test_attention_that_packed_attention_does_not_know_is_refused(kind, settings, told):
    with pytest.raises(ValueError, match=told):
        packed(kind, settings)(collate(pairs(), 2))


def vision_language(kind):
    text = {
        **SHAPE,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1, "embed_dim": 32, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 32, "num_position_embeddings": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16,
    }  # fmt: skip
    config_class = getattr(transformers, f"{kind}Config")
    if kind == "Gemma3":
        text |= {"sliding_window": 5, "rope_parameters": None}
    config = config_class(text_config=text, vision_config=vision, image_token_id=390, vision_start_token_id=391)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Gemma3"])
def test_the_language_part_of_a_vision_language_model(kind):
    model, copy, examples = vision_language(kind), vision_language(kind), pairs()
    copy.set_attn_implementation(IMPLEMENTATION)
    fuse(copy)
    found, expected = Policy(copy)(collate(examples, 2)), logps_alone(model, examples)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    got, wanted = gradients(copy, found), gradients(model, expected)
    for parameter, gradient in wanted.items():
        if gradient is None or gradient.norm() == 0:  # the part that sees
            assert got[parameter] is None or got[parameter].norm() == 0
        else:
            assert (got[parameter] - gradient).norm() <= 1e-5 * gradient.norm(), parameter


@torch.no_grad()
@pytest.mark.parametrize("name", ["phi", "gemma2", "granite", "gpt2", "opt"])
def test_the_next_token_is_the_models_own(name):
    policy = packed(*FAMILIES[name])
    causal_lm, ids = policy.causal_lm, torch.randint(3, 400, (4, 9), generator=torch.Generator().manual_seed(1))
    if causal_lm.get_output_embeddings().bias is not None:
        causal_lm.get_output_embeddings().bias.normal_(std=3.0)  # decides
    positions = torch.arange(9).expand(4, -1)
    with policy.own_forward():
        found = policy.next_token(ids, torch.ones_like(ids), positions, DynamicCache(config=causal_lm.config))
        expected = causal_lm(input_ids=ids).logits[:, -1].argmax(-1)
    assert torch.equal(found, expected)
    batch = collate(toy_examples((6, (4, 5))), 2)
    logps, greedy = policy.token_scores(batch)
    torch.testing.assert_close(logps, policy.token_logprobs(batch))
    assert greedy.shape == logps.shape
