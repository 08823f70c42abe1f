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
from notus.model.size import Linear, ModelSize, model_size
from notus.training import footprint as footprint_module
from notus.training import optimizers
from notus.training.footprint import (
    RUNTIME_MARGIN,
    Job,
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
    heads=2,
    vocabulary=10,
    linears=(
        Linear("q_proj", 4, 4), Linear("k_proj", 4, 2), Linear("v_proj", 4, 2), Linear("o_proj", 4, 4),
        Linear("gate_proj", 4, 6), Linear("up_proj", 4, 6), Linear("down_proj", 6, 4),
    ),
    norms=(4, 4),
    block=128,
    block_trained=128,
    root=84,
    root_trained=84,
)  # fmt: skip
JOB = Job(shard_size=2, tokens_per_row=10, scored_per_row=6, key_ratio=1.0)


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
    # norms: 8 wide, in bf16: 16. Attention: queries and output 2 * 2 * 4, keys and values 2 * 2 * 2, and 2
    # normalisers in fp32: 32. MLP: 3 * 2 * 6 = 36. Inputs of q, gate, down: 2 * (4 + 4 + 6) = 28. In all 112 a token.
    assert activations_per_block(TOY, JOB) == 1120
    assert kept_per_block(TOY, dataclasses.replace(JOB, activation_checkpointing="none")) == 1120
    assert kept_per_block(TOY, JOB) == 10 * 2 * 4
    # the input 4, q 4, v 2, gate 6, down 4, attention's output 4, in bf16, and the normalisers
    assert kept_per_block(TOY, dataclasses.replace(JOB, activation_checkpointing="selective")) == 10 * (2 * 24 + 8)


def test_the_head_by_hand():
    head = moments(TOY, JOB)[0]
    # logits 6 * 10 in fp32 and bf16, the gradient 10 * 4 in fp32; the product added to it and hidden states in bf16
    assert head.head == 6 * 10 * 6 + 40 * 4 + 40 * 2 + 6 * 4 * 2
    assert head.gathered == 2 * (84 + 128)


def test_offloaded_weights_gradients_and_states_take_no_device_memory():
    found = footprint(TOY, dataclasses.replace(JOB, cpu_offload=True))
    assert (found.weights, found.gradients, found.optimizer_state, found.optimizer_temporaries) == (0, 0, 0, 0)
    assert found.total > 0


@pytest.mark.parametrize("wanted", ["none", "selective", "full"])
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
    assert size.norms == ((8 * 4, 8 * 2, 32, 32) if kind == "qwen3" else (32, 32))
    one = model_size(toy_model(kind, num_hidden_layers=1), layers=2)
    assert one.parameters == sum(each.numel() for each in toy_model(kind).parameters())


def test_a_norm_that_is_not_fused_keeps_more():
    plain = dataclasses.replace(TOY, fused=False)
    # of 8 elements, the input in fp32 and what the weight is multiplied with in bf16, in place of the input in bf16
    assert activations_per_block(plain, JOB) == 1120 + 10 * 8 * (6 - 2)
    frozen = dataclasses.replace(plain, block_trained=0)
    assert activations_per_block(plain, JOB) - activations_per_block(frozen, JOB) == 10 * 2 * (8 + 4 + 4 + 6)


def test_gate_and_up_in_one_product_count_as_two():
    one = (Linear("qkv_proj", 4, 8), Linear("o_proj", 4, 4), Linear("gate_up_proj", 4, 12), Linear("down_proj", 6, 4))
    assert activations_per_block(dataclasses.replace(TOY, linears=one), JOB) == 1120


def test_the_mlps_width_is_not_that_of_wide_queries():
    wide = (Linear("q_proj", 4, 100), *TOY.linears[1:])
    assert activations_per_block(dataclasses.replace(TOY, linears=wide), JOB) == 1120


def test_a_rank_alone_holds_all_weights_cast_unless_they_are_offloaded():
    alone = dataclasses.replace(JOB, shard_size=1)
    assert moments(TOY, alone)[0].gathered == 2 * (84 + 2 * 128)
    assert moments(TOY, dataclasses.replace(alone, cpu_offload=True))[0].gathered == 2 * (84 + 128)


def test_the_linear_layers_are_in_the_order_of_the_forward_pass():
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    with torch.device("meta"):
        phi = AutoModelForCausalLM.from_config(transformers.Phi3Config(**SHAPE))
    size = model_size(phi)
    assert [linear.name for linear in size.linears] == names
    assert not size.fused


SHAPE = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("Mistral", Case(0, "full", "adamw")),
        ("Mistral", Case(0, "none", "rmsprop")),
        ("Mistral", Case(0, "selective", "rmsprop", "bf16")),
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
