"""The necessary arithmetic, against counts worked out by hand and against torch's counter."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toys import toy_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from notus.model.flops import GPUS, Dimensions, dimensions, forward_flops, gpu_of_driver, visible_pairs


def test_visible_pairs_by_hand() -> None:
    # trunk 3: 1+2+3 = 6. Branch 2 after it: 4+5 = 9. Branch 1: 4. No trunk, branches 2 and 3: 3 + 6.
    assert visible_pairs(np.array([3, 0]), np.array([[2, 1], [2, 3]])).tolist() == [19, 9]


def test_a_missing_completion_costs_nothing() -> None:
    size = Dimensions(layers=2, attention_width=3, body_weights=5, head_weights=7)
    trunks, branches = np.array([3, 3]), np.array([[2, 1, 4], [2, 0, 0]])
    found = forward_flops(size, trunks, branches, branches.sum(axis=1))
    # 2 * 5 * tokens + 2 * 7 * scored + 4 * 2 * 3 * pairs; pairs: 6 + 9 + 4 + (4 + 5 + 6 + 7) and 6 + 9
    assert found.tolist() == [100 + 98 + 24 * 41, 50 + 28 + 24 * 15]


def test_dimensions_of_a_model_by_hand() -> None:
    # per layer: q and o 32*32, k and v 16*32, three of 48*32; the head 400*32
    size = dimensions(toy_model())
    assert size == Dimensions(layers=2, attention_width=32, body_weights=2 * 7680, head_weights=12800)


def test_linear_part_is_what_torch_counts() -> None:
    model = toy_model()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(7)[None])
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    size = dimensions(model)
    attention = 4 * size.layers * size.attention_width * 28
    assert forward_flops(size, np.array([3]), np.array([[4]]), np.array([7])).tolist() == [counted + attention]


SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_head_dim": 24, "rotary_dim": 8,
    "n_embd": 64, "n_layer": 4, "n_head": 4, "d_model": 64, "n_heads": 4, "n_layers": 4, "ffn_dim": 96,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "word_embed_proj_dim": 64, "n_positions": 128, "max_seq_len": 128, "num_layers": 4,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "sliding_window": 64,
}  # fmt: skip
EXACT = [
    "apertus", "biogpt", "bloom", "codegen", "cohere", "cohere2", "diffllama", "exaone4", "gemma", "gemma2", "glm4",
    "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite", "llama", "mistral", "mpt", "nemotron", "olmo2",
    "openai-gpt", "opt", "persimmon", "phi", "phi3", "qwen3", "stablelm", "starcoder2", "xglm",
    # mixtures of experts, with and without shared ones, multi-head latent attention, first blocks that are dense
    "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "jetmoe", "minimax_m2",
    "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
]  # fmt: skip
# Their recurrences or short convolutions are left out, or counted by the weights alone.
NEARLY = {"jamba": 0.05, "mamba": 0.06, "falcon_mamba": 0.06, "rwkv": 0.02, "lfm2": 0.01, "recurrent_gemma": 0.05}


def small_model(kind: str) -> PreTrainedModel:
    """A narrow model of a family, whose settings go by the names that the family knows."""
    default = AutoConfig.for_model(kind)
    settings = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    if hasattr(default, "qk_rope_head_dim"):
        settings |= {"head_dim": 8, "num_key_value_heads": 4}
    elif getattr(default, "head_dim", None) is None:
        settings.pop("head_dim", None)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", [*EXACT, *NEARLY])
def test_every_family_computes_what_torch_counts(kind: str) -> None:
    """Eager attention multiplies every query with every key: all pairs are counted, not those that the mask shows.

    Older versions of torch count the products that make rotary angles, too: a ten-thousandth.
    """
    model, tokens = small_model(kind), 16
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():  # grouped products are not counted
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(tokens)[None], use_cache=False)
    size = dimensions(model)
    found = 2 * tokens * (size.body_weights + size.head_weights) + 4 * size.layers * size.attention_width * tokens**2
    assert found == pytest.approx(counter.get_total_flops(), rel=NEARLY.get(kind, 5e-4))


def test_experts_count_by_their_active_share_by_hand() -> None:
    # per block: attention 64*64 + 2*64*32 + 64*64, router 4*64, 2 of 4 experts of 3*64*96
    size = dimensions(small_model("mixtral"))
    assert size == Dimensions(4, 64, 4 * (12288 + 256 + 2 * 18432), 300 * 64)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A30", "a30"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Quadro RTX 6000", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_by_the_name_that_their_driver_gives(name: str, key: str | None) -> None:
    assert gpu_of_driver(name) is (GPUS[key] if key else None)
