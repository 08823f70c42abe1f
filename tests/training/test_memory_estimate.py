"""The bytes of a step: by hand for a toy, and beside PyTorch's memory tracker on the real step with fake tensors."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import transformers
from toys import toy_model
from transformers import AutoModelForCausalLM

from notus.model.lora import inject_lora
from notus.model.size import ATTENTION, Linear, ModelSize, Norm, model_size
from notus.runtime import switches
from notus.training import memory_estimate as footprint_module
from notus.training import optimizers
from notus.training.memory_estimate import (
    CHECKPOINTING,
    RUNTIME_MARGIN,
    Job,
    _working,
    activations_per_block,
    fastest_checkpointing,
    footprint,
    kept_per_block,
    moments,
)

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from estimator import Case, compare, flops_ratio

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


@pytest.mark.parametrize("wanted", CHECKPOINTING)
def test_the_fastest_checkpointing_that_fits(wanted):
    job = dataclasses.replace(JOB, tokens_per_row=1000)
    needed = footprint(TOY, dataclasses.replace(job, activation_checkpointing=wanted)).total
    assert fastest_checkpointing(needed + RUNTIME_MARGIN, TOY, job) == wanted
    assert fastest_checkpointing(0, TOY, job) == "full"


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


SHAPE = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def small(kind: str, **settings: object) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SHAPE, **settings))


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
        ("Qwen3", Case(0, "full", "adamw", "bf16")),
        ("Phi3", Case(0, "none", "rmsprop")),
    ],
    ids=str,
)
def test_agrees_with_pytorchs_memory_tracker(monkeypatch, kind, case):
    monkeypatch.setitem(optimizers.CHUNK, "cuda", 2**17)  # some pieces, as a large model has
    monkeypatch.setattr(footprint_module, "PIECE", 2**19)
    config = getattr(transformers, f"{kind}Config")(**SHAPE)
    config.sliding_window = None
    row = (90, [150, 140], 6)
    rows, update, seen = compare(case, config, row)
    assert rows.total == pytest.approx(seen.backward_peak, rel=0.1)
    assert update.total == pytest.approx(seen.optimizer_peak, rel=0.1)
    assert flops_ratio(case, config, row, seen.flops) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("handover", [True, False])
def test_a_rank_alone_agrees_with_the_tracker(monkeypatch, checkpointing, handover):
    monkeypatch.setitem(optimizers.CHUNK, "cuda", 2**17)
    monkeypatch.setattr(footprint_module, "PIECE", 2**19)
    with switches.disabled(*([] if handover else ["gradient_handover"])):
        case, config = Case(0, checkpointing, "rmsprop"), transformers.MistralConfig(**SHAPE, sliding_window=None)
        rows, update, seen = compare(case, config, (90, [150, 140], 6), world_size=1)
    assert rows.total == pytest.approx(seen.backward_peak, rel=0.05)
    assert update.total == pytest.approx(seen.optimizer_peak, rel=0.05)
