"""The bytes of a step: by hand for a toy, and beside PyTorch's memory tracker on the real step with fake tensors."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import transformers
from runs import config
from toys import toy_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from notus.model.flops import dimensions
from notus.model.lora import inject_lora
from notus.model.size import ATTENTION, Linear, ModelSize, Norm, UnknownSizeError, model_size
from notus.model.structure import blocks_of
from notus.model.supported import check_supported
from notus.runtime import switches
from notus.training import memory_estimate, optimizers
from notus.training.dpo import run
from notus.training.memory_estimate import (
    CHECKPOINTING,
    RUNTIME_MARGIN,
    Job,
    _working,
    activations_per_block,
    capacity_of,
    choose_checkpointing,
    footprint,
    kept_per_block,
    moments,
)

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from estimator import Case, compare, flops_ratio, job_of, packed_row

TOY = ModelSize(
    layers=2,
    hidden=4,
    query_width=4,
    key_width=2,
    value_width=2,
    attended=4,
    heads=2,
    vocabulary=10,
    linears=(
        Linear("q_proj", 4, 4, "attn"), Linear("k_proj", 4, 2, "attn"), Linear("v_proj", 4, 2, "attn"),
        Linear("o_proj", 4, 4, ATTENTION),
        Linear("gate_proj", 4, 6, "mlp"), Linear("up_proj", 4, 6, "mlp"), Linear("down_proj", 6, 4, "mlp, 6"),
    ),
    norms=(Norm(4, 12, 20), Norm(4, 12, 20)),
    block=128,
    block_trained=128,
    root=84,
    root_trained=84,
)  # fmt: skip
JOB = Job(shard_size=2, tokens_per_row=10, scored_per_row=6, key_ratio=1.0)
SMALL_JOB = Job(shard_size=1, tokens_per_row=400, scored_per_row=200, precision="fp32")


def mode(name: str) -> Job:
    return dataclasses.replace(JOB, activation_checkpointing=name)


def test_the_update_by_hand():
    update = moments(TOY, JOB)[-1]
    # 2 * 128 + 84 = 340 parameters, half of them here, 4 bytes each: 680
    assert update.parts == {
        "weights": 680, "gradients": 680, "optimizer_state": 680, "optimizer_temporaries": 680,
        "gathered": 0, "whole_gradients": 0, "activations": 0, "working": 0, "head": 0, "batch": 0,
    }  # fmt: skip
    assert update.total == 4 * 680
    adamw = moments(TOY, dataclasses.replace(JOB, optimizer="adamw", optimizer_dtype="bf16"))[-1]
    assert adamw.optimizer_state == 680  # two states of half the size
    assert adamw.optimizer_temporaries == 3 * 680  # all in one piece


def test_what_a_block_keeps_by_hand():
    # norms: 2 of 12. Attention: queries and output 2 * 2 * 4, keys and values 2 * 2 * 2, and 2 normalisers in fp32: 32.
    # MLP: 3 * 2 * 6 = 36. Inputs of q, gate, down: 2 * (4 + 4 + 6) = 28. In all 120 a token.
    assert activations_per_block(TOY, JOB) == 1200
    assert kept_per_block(TOY, mode("none")) == 1200
    assert kept_per_block(TOY, JOB) == 10 * 2 * 4
    # the input 4, q 4, v 2, gate 6, attention's output 4, in bf16, and the normalisers
    assert kept_per_block(TOY, mode("selective")) == 10 * (2 * 20 + 8)
    # k 2, o 4, up 6 as well; the last product, 4, where a norm reads it
    assert kept_per_block(TOY, mode("products")) == 10 * (2 * 32 + 8)
    assert kept_per_block(dataclasses.replace(TOY, reads_last=True), mode("products")) == 10 * (2 * 36 + 8)


def test_a_block_in_work_computes_again_what_was_not_kept():
    # gradients: both factors 12, the hidden states 4, of 10 tokens; the weights' of down 4 * 6: in all 368
    again = {name: _working(TOY, mode(name)) - 368 for name in CHECKPOINTING}
    # of 120 a token, attention's output and normalisers 16 are there; so are gate and up, 24. q, k, v and o, also kept,
    # are no activations: their memory, 24, is free again
    assert again == {"none": 0, "products": 10 * (120 - 16 - 24 - 24), "selective": 10 * (120 - 16 - 12 - 12),
                     "full": 1200}  # fmt: skip


def test_the_head_by_hand():
    head = moments(TOY, JOB)[0]
    # logits 6 * 10 in fp32 and bf16, the gradient 10 * 4 in fp32; the product added to it and hidden states in bf16
    assert head.head == 6 * 10 * 6 + 40 * 4 + 40 * 2 + 6 * 4 * 2
    assert head.gathered == 2 * (84 + 128)


def test_offloaded_weights_gradients_and_states_take_no_device_memory():
    found = footprint(TOY, dataclasses.replace(JOB, cpu_offload=True))
    assert (found.weights, found.gradients, found.optimizer_state, found.optimizer_temporaries) == (0, 0, 0, 0)
    assert found.total > 0


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_sizes_are_those_of_the_model(kind):
    model = toy_model(kind)
    inject_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj"])
    size = model_size(model)
    assert size.parameters == sum(each.numel() for each in model.parameters())
    assert size.trained == sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert [linear.rank for linear in size.linears] == [2, 0, 0, 0, 0, 0, 0]
    # the input and the scale; those of heads are as many norms as there are heads
    streams, heads = [Norm(32, 68, 132)] * 2, [Norm(8 * 4, 4 * 20, 4 * 36), Norm(8 * 2, 2 * 20, 2 * 36)]
    assert sorted(size.norms, key=str) == sorted([*streams, *(heads if kind == "qwen3" else [])], key=str)
    assert size.norms[0] == streams[0]
    one = model_size(toy_model(kind, num_hidden_layers=1), layers=2)
    assert one.parameters == sum(each.numel() for each in toy_model(kind).parameters())


@pytest.mark.parametrize(("trained", "bf16"), [(True, 6), (False, 4)])
def test_a_norm_that_is_not_fused_keeps_more(trained, bf16):
    model = small("Phi3")
    model.requires_grad_(trained)
    # the input in fp32, and where the weight is trained what it is multiplied with, in bf16; two scales in fp32 or bf16
    norm = model_size(model).norms[0]
    assert norm.width == 256
    assert bf16 * 256 <= norm.bf16 <= bf16 * 256 + 8
    assert norm.fp32 == pytest.approx(4 * (1 + trained) * 256, abs=8)


def test_gate_and_up_in_one_product_count_as_two():
    one = (
        Linear("qkv_proj", 4, 8, "attn"), Linear("o_proj", 4, 4, ATTENTION), Linear("gate_up_proj", 4, 12, "mlp"),
        Linear("down_proj", 6, 4, "mlp, 6"),
    )  # fmt: skip
    assert activations_per_block(dataclasses.replace(TOY, linears=one), JOB) == 1200


def test_the_mlps_width_is_not_that_of_wide_queries():
    wide = (Linear("q_proj", 4, 100, "attn"), *TOY.linears[1:])
    assert activations_per_block(dataclasses.replace(TOY, linears=wide), JOB) == 1200


def test_a_rank_alone_has_no_buffers_of_a_reduction():
    alone = dataclasses.replace(JOB, shard_size=1, handover=True)
    reduced = dataclasses.replace(alone, handover=False)
    names = [moment.moment for moment in moments(TOY, alone)]
    found = dict(zip(names, (moment.whole_gradients for moment in moments(TOY, alone)), strict=True))
    copies = dict(zip(names, (moment.whole_gradients for moment in moments(TOY, reduced)), strict=True))
    # the head's gradient 2 * 40 and a block's 2 * 128, in bf16; two fp32 buffers of 4 * 128, and of the root's 4 * 84
    assert found["hand-over of the last block's gradients"] == 80 + 256
    assert copies["hand-over of the last block's gradients"] == 80 + 256 + 2 * 512
    assert found["hand-over of the root's gradients"] == 2 * 84
    assert copies["hand-over of the root's gradients"] == 2 * 84 + 2 * 336
    offloaded = dataclasses.replace(alone, cpu_offload=True)
    assert moments(TOY, offloaded) == moments(TOY, dataclasses.replace(reduced, cpu_offload=True))


def test_the_gradients_switch_is_that_of_the_run():
    with switches.disabled("gradient_handover"):
        assert not Job(1, 10, 6).handover
    with switches.disabled():
        assert Job(1, 10, 6).handover


def test_a_rank_alone_holds_all_weights_cast_unless_they_are_offloaded():
    alone = dataclasses.replace(JOB, shard_size=1)
    assert moments(TOY, alone)[0].gathered == 2 * (84 + 2 * 128)
    assert moments(TOY, dataclasses.replace(alone, cpu_offload=True))[0].gathered == 2 * (84 + 128)


def test_the_linear_layers_are_in_the_order_of_the_forward_pass():
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert [linear.name for linear in model_size(small("Phi3")).linears] == names


# --- beside the tracker, and for every supported family ---

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
SHAPE = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False,
    **NO_TOKENS,
}  # fmt: skip


def small(kind: str, **settings: object) -> transformers.PreTrainedModel:
    return build(getattr(transformers, f"{kind}Config")(**{**SHAPE, **settings}))


def build(config: PreTrainedConfig) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the update and the conversions in some pieces, as a large model has them."""
    monkeypatch.setitem(optimizers.CHUNK, "cuda", 2**17)
    monkeypatch.setattr(memory_estimate, "PIECE", 2**19)


ROW = (90, [150, 140], 6)
SPECIAL = {"Mistral": {"sliding_window": None}, "Youtu": LATENT, "NanoChat": {"final_logit_softcapping": None}}


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("Mistral", Case(0, "full", "adamw")),
        ("Mistral", Case(0, "none", "rmsprop")),
        ("Mistral", Case(0, "products", "rmsprop")),
        ("Mistral", Case(0, "selective", "rmsprop", "bf16")),
        ("Mistral", Case(8, "products", "rmsprop")),
        ("Mistral", Case(8, "none", "rmsprop")),
        ("Mistral", Case(8, "full", "adamw", "bf16")),
        *(("Mistral", Case(8, mode, "adamw", quantization="nf4")) for mode in CHECKPOINTING),
        ("Mistral", Case(0, "none", "adamw", "int8")),
        ("Qwen3", Case(0, "full", "adamw", "bf16")),
        ("Phi3", Case(0, "none", "rmsprop")),
        *((kind, Case(0, mode, "rmsprop")) for kind, mode in [
            ("Olmo", "none"), ("Olmo2", "products"), ("DiffLlama", "none"), ("DiffLlama", "products"),
            ("NanoChat", "selective"), ("Youtu", "none"), ("Youtu", "products"), ("Gemma3Text", "products"),
            ("Phi3", "products"), ("Glm", "selective"), ("Glm4", "full"), ("GPTNeoX", "full"),
        ]),
    ],
    ids=str,
)  # fmt: skip
def test_agrees_with_pytorchs_memory_tracker(kind, case):
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **SPECIAL.get(kind, {})})
    rows, update, seen = compare(case, config, ROW)
    assert rows.total == pytest.approx(seen.backward_peak, rel=0.1)
    # the row's batch is still there, which counts beside weights as small as these in 4 bits
    assert update.total == pytest.approx(seen.optimizer_peak, rel=0.1, abs=2**16 if case.quantization else 0)
    assert flops_ratio(case, config, ROW, seen.flops) == pytest.approx(1, abs=0.1)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize(
    ("row", "case"),
    [
        ((176, [290] * 4, 2), Case(0, "none", "rmsprop")),
        ((176, [290] * 4, 2), Case(0, "full", "rmsprop")),
        ((176, [290] * 4, 2), Case(0, "products", "adamw", "bf16")),
        ((176, [290] * 4, 2), Case(8, "none", "rmsprop")),
        ((400, [60] * 8, 3), Case(0, "none", "rmsprop")),
        ((400, [60] * 8, 3), Case(0, "full", "rmsprop")),
        ((400, [60] * 8, 3), Case(8, "selective", "rmsprop")),
    ],
    ids=str,
)
def test_lists_agree_with_the_tracker(row, case):
    """Keys of a long trunk are gathered once for each of its completions."""
    config = transformers.MistralConfig(**{**SHAPE, "sliding_window": None})
    rows, update, seen = compare(case, config, row)
    assert rows.total == pytest.approx(seen.backward_peak, rel=0.1)
    assert update.total == pytest.approx(seen.optimizer_peak, rel=0.1, abs=rows.batch)  # the row's batch is still there
    assert flops_ratio(case, config, row, seen.flops) == pytest.approx(1, abs=0.1)


def test_the_batch_of_a_list_is_as_large_as_counted():
    trunk, branches, examples = 40, [6, 5, 3, 8], 3
    batch = packed_row(trunk, branches, examples)
    layout = batch.layout
    tensors = [batch.input_ids, batch.position_ids, batch.sources, batch.targets]
    tensors += [layout.key_index, layout.first_copy, layout.copies]
    job = job_of(Case(0, "full", "rmsprop"), (trunk, branches, examples))
    assert memory_estimate._batch(job) == sum(each.nbytes for each in tensors)


EXPERTS = {
    "num_local_experts": 8, "num_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "moe_intermediate_size": 384,
    "shared_expert_intermediate_size": 512, "sliding_window": None,
}  # fmt: skip


def mixture(kind: str, **settings: object) -> PreTrainedConfig:
    made = getattr(transformers, f"{kind}Config")
    default = made()
    known = {name: value for name, value in (EXPERTS | settings).items() if hasattr(default, name)}
    latent = LATENT if hasattr(default, "kv_lora_rank") else {}
    return made(**{**SHAPE, "num_hidden_layers": 3, **known, **latent})


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("Mixtral", Case(0, "products", "rmsprop")),
        ("Mixtral", Case(0, "full", "adamw", "int8")),
        ("Mixtral", Case(8, "selective", "rmsprop")),
        ("Qwen2Moe", Case(0, "none", "rmsprop")),
        ("DeepseekV3", Case(0, "full", "rmsprop")),
    ],
    ids=str,
)
def test_mixtures_of_experts_agree_with_the_tracker(kind, case):
    rows, update, seen = compare(case, mixture(kind), ROW)
    assert rows.total == pytest.approx(seen.backward_peak, rel=0.1)
    assert update.total == pytest.approx(seen.optimizer_peak, rel=0.1)


@pytest.mark.usefixtures("in_pieces")
def test_experts_that_do_not_divide_by_the_ranks_are_held_whole():
    """Of 4 experts on 8 ranks, a rank holds one or none."""
    rows, update, seen = compare(Case(0, "none", "rmsprop"), mixture("Mixtral", num_local_experts=4), ROW)
    assert rows.total == pytest.approx(seen.backward_peak, rel=0.1)
    assert update.total == pytest.approx(seen.optimizer_peak, rel=0.02)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GraniteMoe", "DeepseekV2", "DeepseekV3"])
def test_the_parameters_of_a_mixture_are_exact(kind):
    """Also where the first block is another: DeepSeek's has no experts."""
    model = build(mixture(kind))
    size = model_size(model)
    assert size.parameters == size.trained == sum(each.numel() for each in model.parameters())
    first, last = size.experts
    assert (first.copies, first.experts, last.outputs, first.outputs) == (2, 8, 256, 2 * last.inputs)


@pytest.mark.parametrize("kind", ["Mamba", "GPT2", "Jamba", "Qwen3Next"])
def test_a_model_of_unknown_blocks_is_told_in_a_line(kind, device, capsys):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**NO_TOKENS))
    with pytest.raises(ValueError, match="not known"):
        model_size(model)
    assert choose_checkpointing(model, SMALL_JOB, device) == "full"
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    assert "auto: full, since memory cannot be estimated" in told[0]


def test_states_in_8_bits_by_hand():
    update = moments(TOY, dataclasses.replace(JOB, optimizer="adamw", optimizer_dtype="int8"))[-1]
    assert update.optimizer_state == round(2 * (1 + 4 / 256) * 170)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("handover", [True, False])
def test_a_rank_alone_agrees_with_the_tracker(checkpointing, handover):
    with switches.disabled(*([] if handover else ["gradient_handover"])):
        case, config = Case(0, checkpointing, "rmsprop"), transformers.MistralConfig(**SHAPE, sliding_window=None)
        rows, update, seen = compare(case, config, ROW, world_size=1)
    assert rows.total == pytest.approx(seen.backward_peak, rel=0.05)
    assert update.total == pytest.approx(seen.optimizer_peak, rel=0.05)


def test_weights_in_4_bits_by_hand():
    # of a block's 128 parameters 100 take 60 bytes; the root is in bf16, and nothing is trained
    size = dataclasses.replace(TOY, block_trained=0, root_trained=0, quantized=100, quantized_bytes=60, dequantized=24)
    frozen = dataclasses.replace(TOY, block_trained=0, root_trained=0)
    found, plain = ({each.moment: each for each in moments(one, JOB)} for one in (size, frozen))
    block = 2 * 28 + 60
    assert found["optimizer"].weights == (2 * block + 2 * 84) // 2
    assert found["head"].gathered == 2 * 84 + block
    last = "backward of the last block"
    assert found[last].working == plain[last].working + 2 * 24
    alone = dataclasses.replace(JOB, shard_size=1)
    assert moments(size, alone)[0].gathered == 2 * 84 + 2 * 2 * 28  # those in 4 bits are used where they are


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


def test_the_sizes_of_every_supported_family():
    found = []
    for kind in sorted(CONFIG_MAPPING):
        config, model = small_config(kind), None
        with contextlib.suppress(Exception):
            model = build(config)
        if model is None or not hasattr(model.get_decoder(), "layers"):
            continue
        try:
            size = model_size(model)
        except UnknownSizeError:
            continue
        blocks = blocks_of(model)
        if size.experts or len({sum(each.numel() for each in block.parameters()) for block in blocks}) > 1:
            continue  # mixtures, and layers that differ, are held to the tracker above
        linears = sum(linear.weights for linear in size.linears)
        assert linears == sum(
            each.weight.numel() for each in model.get_decoder().layers[0].modules() if isinstance(each, torch.nn.Linear)
        ), kind
        assert dimensions(model).body_weights == len(blocks) * linears, kind
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


# --- the choice of a run ---


def test_the_fastest_that_fits(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = toy_model(num_hidden_layers=16)
    need = {
        mode: RUNTIME_MARGIN
        + footprint(model_size(model), dataclasses.replace(SMALL_JOB, activation_checkpointing=mode)).total
        for mode in CHECKPOINTING
    }
    fitting = [(need[mode], mode) for mode in CHECKPOINTING[:-1]]
    for capacity, expected in (*fitting, (need["full"] - 1, "full")):
        monkeypatch.setattr(memory_estimate, "capacity_of", lambda _, capacity=capacity: capacity)
        assert choose_checkpointing(model, SMALL_JOB, device) == expected
    told = capsys.readouterr().out.splitlines()
    assert [line.startswith("warning: ") for line in told] == [False, False, False, True]
    assert "training.activation_checkpointing=auto: none, estimated to need 3.0 GiB per rank of 3.0 GiB" in told[0]


def test_ranks_of_a_node_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_estimate, "_available", lambda: 80)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert capacity_of(torch.device("cpu")) == 20


def test_a_run_chooses(tmp_path: Path, model_folder: Path, pairs_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = config("dpo", tmp_path, model_folder, pairs_file, training__activation_checkpointing="auto",
                 training__max_steps=1)  # fmt: skip
    assert run(job) == 0
    assert "training.activation_checkpointing=auto: none, estimated" in capfd.readouterr().out


def test_offload_without_a_gpu_is_refused(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    job = config("dpo", tmp_path, model_folder, pairs_file, training__cpu_offload=True)
    with pytest.raises(ValueError, match=r"training\.cpu_offload has no effect without a GPU"):
        run(job)
