"""The bytes of a step: by hand for a toy, and beside PyTorch's memory tracker on the real step with fake tensors."""

import dataclasses
import sys
from pathlib import Path

import pytest
from toys import toy_config, toy_model
from transformers import MistralConfig

from notus.model.lora import inject_lora
from notus.training.footprint import (
    RUNTIME_MARGIN,
    Job,
    Linear,
    ModelSize,
    activations_per_block,
    fastest_checkpointing,
    footprint,
    kept_per_block,
    model_size,
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
    assert adamw.optimizer_temporaries == 2.5 * 680  # all in one piece


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


@pytest.mark.parametrize("case", [Case(0, "full", "adamw"), Case(8, "selective", "rmsprop")])
def test_agrees_with_pytorchs_memory_tracker(case):
    settings = {"hidden_size": 256, "intermediate_size": 896, "head_dim": 32, "num_attention_heads": 8}
    config: MistralConfig = toy_config(vocab_size=4000, **settings)
    row = (90, [150, 140], 4)
    rows, update, seen = compare(case, config, row)
    assert rows.total == pytest.approx(seen.backward_peak, rel=0.1)
    assert update.total == pytest.approx(seen.optimizer_peak, rel=0.1)
    assert flops_ratio(case, config, row, seen.flops) == pytest.approx(1, abs=0.1)
