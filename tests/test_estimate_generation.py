"""The sampling and judging parts of the estimate, against numbers worked out by hand."""

import numpy as np
import pytest
from toys import toy_config

from notus.estimate.generation import (
    Answers,
    Decoder,
    Judging,
    Machine,
    decoder,
    draw_answers,
    expected_longest,
    generation,
    judging,
)
from notus.estimate.sizes import find_config, sizes
from notus.model.flops import GPU, Dimensions
from notus.training.memory_estimate import RUNTIME_MARGIN

# 2 blocks of 400 weights each, a head of 200, attention of width 10; a token keeps 2 blocks * (5 + 5) numbers
TOY = Decoder(
    Dimensions(layers=2, attention_width=10, body_weights=800, head_weights=200),
    weights=1000,
    parameters=1200,
    cache=20,
    precision="bf16",
)
FEW = np.array([6])


def machine(*, gigabytes: float = 1e-3, tera: float = 1e-3, gpus: int = 1) -> Machine:
    gpu = GPU(memory=1000, teraflops=tera, teraflops_fp32=tera, link=1, network=1, bandwidth=gigabytes)
    return Machine(gpu, gpus, utilisation=0.5, bandwidth_share=0.5)


def test_a_step_that_is_bound_by_memory_by_hand():
    # 4 sequences, 10 tokens of prompt and half of 6: 1000 + 4 * 13 * 20 = 2040 numbers of 2 bytes at 0.5e6 bytes/s
    found = generation(TOY, machine(), Answers(2, 2, 10, FEW, batch_size=4))
    assert found.bound == "memory"
    assert found.step == pytest.approx(4080 / 0.5e6)
    assert found.decode == pytest.approx(6 * found.step)
    # each prompt once, whatever n is: 2 * 800 * 10 + 2 * 200 + 4 * 2 * 10 * 55 operations at 0.5e9 per second
    assert found.prefill == pytest.approx(2 * (16000 + 400 + 4400) / 0.5e9)
    assert found.seconds == found.prefill + found.decode
    held = 2 * (1200 + 4 * 16 * 20)
    assert found.missing == held + RUNTIME_MARGIN - 1000 * 2**20


def test_a_step_that_is_bound_by_computation_by_hand():
    # 4 * (2 * 1000 + 4 * 2 * 10 * 13) operations at 0.5e6 per second
    found = generation(TOY, machine(gigabytes=1, tera=1e-6), Answers(2, 2, 10, FEW, batch_size=4))
    assert found.bound == "computation"
    assert found.step == pytest.approx(4 * 3040 / 0.5e6)


def test_a_step_is_never_shorter_than_python_takes_to_launch_it():
    found = generation(TOY, machine(gigabytes=1e3, tera=1e3), Answers(2, 2, 10, FEW, batch_size=4))
    assert found.bound == "host"
    assert found.step == pytest.approx(2 * 0.5e-3)


def test_ranks_share_the_sequences_and_batches_wait_for_their_longest():
    # 12 sequences on 2 GPUs in batches of 4: two batches on each, of which the second has 2
    lengths = np.array([2, 4])
    assert expected_longest(lengths, 1) == 3
    assert expected_longest(lengths, 2) == 3.5  # (2, 2), (2, 4), (4, 2), (4, 4)
    fast = machine(gigabytes=1e3, tera=1e3, gpus=2)
    found = generation(TOY, fast, Answers(6, 2, 10, lengths, batch_size=4))
    assert found.decode == pytest.approx(2 * 3.875 * 1e-3)  # 2 in one of 16 cases, else 4
    # a continuous engine makes 6 * 3 tokens in steps of 4
    found = generation(TOY, fast, Answers(6, 2, 10, lengths, batch_size=4, continuous=True))
    assert found.decode == pytest.approx(6 * 3 / 4 * 1e-3)


def test_no_batch_is_larger_than_what_there_is_to_do():
    found = generation(TOY, machine(), Answers(3, 1, 10, FEW, batch_size=32))
    assert found.batch == 3
    assert found.step == pytest.approx(2 * (1000 + 3 * 13 * 20) / 0.5e6)


def test_what_a_decode_step_reads_of_a_model():
    config, _ = find_config("mistral-7b-v0.1")
    found = decoder(*sizes(config), "bf16")
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert found.weights == 32 * block + 32000 * 4096  # the head, and of the embedding nothing
    assert found.parameters == found.weights + 32000 * 4096 + 4096
    assert found.cache == 32 * 2 * 8 * 128
    tied = toy_config(tie_word_embeddings=True)
    size, dimensions = sizes(tied)
    assert decoder(size, dimensions, "fp32").weights == size.parameters - tied.hidden_size  # all but the final norm


def test_drawn_answers_have_the_mean_and_the_cut():
    lengths = draw_answers(100, 10_000)
    assert lengths.mean() == pytest.approx(100, rel=0.05)
    assert (draw_answers(100, 10_000) == lengths).all()
    assert draw_answers(100, 50).max() == 50


def test_a_judges_tokens_by_hand():
    found = judging(
        100, 4, instructions=600, around=12, prompt_tokens=176, completion_tokens=250, aspects=4, again_share=0.1
    )  # 110 requests of 600 + 176 + 4 * (250 + 12) tokens; 4 * 4 ratings of 50 tokens
    assert found == Judging(110, 110 * 1824, 110 * 800)
    assert found.cost(0.5, 2.0) == pytest.approx((200640 * 0.5 + 88000 * 2) / 1e6)
