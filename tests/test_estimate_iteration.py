"""The stages of a round of `notus iterate`, against numbers worked out by hand."""

import dataclasses
from argparse import Namespace

import numpy as np
import pytest

from notus.estimate.generation import Decoder, Judging, Machine, scoring
from notus.estimate.iteration import Iteration, Prices, Rater, Stage, pairs_of_round, report, stages
from notus.model.flops import GPU, Dimensions

MODEL = Decoder(
    Dimensions(layers=2, attention_width=10, body_weights=800, head_weights=200),
    weights=1000,
    parameters=1200,
    cache=20,
    precision="bf16",
)
# so fast that a step takes what Python takes: 2 blocks of 0.5 ms
MACHINE = Machine(GPU(40_000, 1e3, 1e3, 1, 1, bandwidth=1e6), gpus=2, utilisation=0.5)
FUNCTION = Rater("function", None, 32, aspects=4, instructions=100, around=10, again_share=0.1)
PLAN = Namespace(setting=Namespace(batch_size=32), seconds=2.0, scoring=0.01)


@pytest.fixture
def iteration(monkeypatch: pytest.MonkeyPatch) -> Iteration:
    """Two rounds of 100 prompts, every answer of 6 tokens."""
    monkeypatch.setattr("notus.estimate.iteration.draw_answers", lambda mean, most: np.array([6]))
    return Iteration(
        prompts=[100, 100],
        eval_prompts=10,
        kl_samples=0,
        n=2,
        policy=MODEL,
        others={"a/second": MODEL},
        endpoints=["far"],
        batch_size=50,
        continuous=False,
        max_new_tokens=6,
        prompt_tokens=10,
        answer_tokens=6,
        rater=FUNCTION,
        old_share=0.5,
        epochs=1,
        max_steps=None,
        reference=True,
        holds_out=True,
    )


def found(iteration: Iteration, number: int = 0) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages(iteration, PLAN, MACHINE, number)}


def test_every_stage_of_a_round_by_hand(iteration: Iteration) -> None:
    of_round = found(iteration)
    assert list(of_round) == ["sample policy", "sample second", "sample far", "rate", "dpo", "evaluate", "compare"]
    # 200 sequences on 2 GPUs are 2 batches of 50 on each: 12 steps of 1 ms; the prefill takes next to nothing
    assert of_round["sample policy"].seconds == pytest.approx(12e-3, rel=1e-3)
    assert of_round["sample second"].seconds == of_round["sample policy"].seconds
    assert of_round["sample far"].seconds == 0
    assert "200 completions, 2,000 tokens in, 1,200 out" in of_round["sample far"].what
    assert of_round["rate"] == Stage("rate", 0.0, "600 completions, by a function: not counted")
    # 100 pairs are 4 steps of 32, and each is scored once for the reference
    assert of_round["dpo"].seconds == pytest.approx(4 * 2.0 + 100 * 0.01)
    assert of_round["evaluate"].seconds == pytest.approx(6e-3, rel=1e-3)  # 5 answers on each GPU
    assert of_round["compare"].what.startswith("20 completions")


def test_old_pairs_come_with_the_second_round_as_far_as_there_are_some(iteration: Iteration) -> None:
    assert [pairs_of_round(iteration, number) for number in (0, 1)] == [100, 200]
    most = dataclasses.replace(iteration, old_share=0.9)  # 900 old ones are asked for
    assert pairs_of_round(most, 1) == 200
    few = dataclasses.replace(iteration, old_share=0.2)
    assert pairs_of_round(few, 1) == 125
    assert found(few, 1)["dpo"].seconds == pytest.approx(4 * 2.0 + 125 * 0.01)
    short = dataclasses.replace(iteration, max_steps=3, reference=False)
    assert found(short, 1)["dpo"].seconds == pytest.approx(3 * 2.0)


def test_the_kl_costs_a_completion_and_a_pass_of_both_models(iteration: Iteration) -> None:
    measured = found(dataclasses.replace(iteration, kl_samples=8))["evaluate"].seconds
    passes = 2 * 8 / 2 * scoring(MODEL, MACHINE, 16)
    assert measured == pytest.approx(found(iteration)["evaluate"].seconds + 6e-3 + passes, rel=1e-3)
    on_pairs = dataclasses.replace(iteration, kl_samples=8, holds_out=False)  # 200 of the second round, by two models
    assert found(on_pairs, 1)["evaluate"].seconds == pytest.approx(measured + 2 * 200 * 0.01, rel=1e-3)


def test_rounds_without_evaluation_prompts_answer_and_compare_nothing(iteration: Iteration) -> None:
    without = dataclasses.replace(iteration, eval_prompts=0)
    assert list(found(without))[-1] == "dpo"
    of_round = found(dataclasses.replace(without, kl_samples=8))
    assert list(of_round)[-1] == "evaluate"
    assert of_round["evaluate"].what == "0 answers, 8 completions for the KL"
    assert "All 2 rounds" in "\n".join(report(without, PLAN, MACHINE, price=None, judge=Prices(None, None)))


def test_a_judge_at_an_endpoint_takes_tokens_and_a_local_one_time(iteration: Iteration) -> None:
    endpoint = dataclasses.replace(FUNCTION, kind="endpoint")
    asked = found(dataclasses.replace(iteration, rater=endpoint))["rate"].asked
    # 6 completions of a prompt: 100 + 10 + 6 * (6 + 10) tokens in, 6 * 4 * 50 out; a tenth of the prompts twice
    assert asked == Judging(110, 110 * 206, 110 * 1200)
    local = dataclasses.replace(FUNCTION, kind="local", model=MODEL, batch_size=55)
    assert found(dataclasses.replace(iteration, rater=local))["rate"].seconds == pytest.approx(1.2, rel=1e-3)
    reward = dataclasses.replace(FUNCTION, kind="reward", model=MODEL)
    seconds = found(dataclasses.replace(iteration, rater=reward))["rate"].seconds
    assert seconds == pytest.approx(600 / 2 * scoring(MODEL, MACHINE, 16))


def test_the_report_sums_over_rounds(iteration: Iteration) -> None:
    paid = dataclasses.replace(iteration, rater=dataclasses.replace(FUNCTION, kind="endpoint"))
    text = "\n".join(report(paid, PLAN, MACHINE, price=2.0, judge=Prices(1.0, 10.0)))
    # rate 110 and compare 10 requests, twice; in: 110 * 206 + 10 * 142, out: 110 * 1200 + 10 * 400
    assert "240 requests, 48,160 tokens in, 272,000 out, 2.77 USD" in text
    # training: 4 steps of 2 s and 100 pairs of 10 ms, then 7 steps and 200 pairs: 25 s on 2 GPUs
    assert "GPUs       0.01 h, 0.0 GPU-hours, 0.03 USD at 2 USD per GPU-hour" in text
    assert "USD" not in "\n".join(report(paid, PLAN, MACHINE, price=None, judge=Prices(None, None)))
    assert "does NOT fit" not in text
    small = dataclasses.replace(MACHINE, gpu=dataclasses.replace(MACHINE.gpu, memory=100))
    text = "\n".join(report(paid, PLAN, small, price=None, judge=Prices(None, None)))
    assert "Sampling the policy does NOT fit one GPU: 2.90 GiB too much; lower sample.batch_size" in text
