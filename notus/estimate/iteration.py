"""What the rounds of `notus iterate` take: sampling, rating, training and evaluation, in hours, tokens and dollars.

Every prompt is taken to give one pair, or one list. The curation drops prompts whose ratings tie, so training takes at
most as long as estimated. Not counted: the start of each command, the curation, retries, waiting for an endpoint, and
the evaluation of rows that are held out.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from notus.estimate.generation import (
    ANNOTATION,
    HOST_SECONDS,
    Answers,
    Decoder,
    Generation,
    Judging,
    Machine,
    draw_answers,
    generation,
    judging,
    scoring,
)
from notus.estimate.plan import Plan

Kind = Literal["endpoint", "local", "reward", "function"]
BOUNDS = {"memory": "reading the weights and the cache", "computation": "computation", "host": "launching kernels"}


@dataclasses.dataclass(frozen=True)
class Rater:
    """Who rates.

    Attributes:
        kind: a model behind an endpoint, a local model, a reward model, or a Python function.
        model: of a local judge or a reward model.
        batch_size: sequences at a time of a local judge.
        aspects: ratings of each completion.
        instructions: tokens of the instructions.
        around: tokens that each completion adds to them beside its own.
        again_share: share of the prompts that is rated a second time.
    """

    kind: Kind
    model: Decoder | None
    batch_size: int
    aspects: int
    instructions: float
    around: float
    again_share: float


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What the rounds are.

    Attributes:
        prompts: of each round.
        eval_prompts: that every round's model and the start answer.
        kl_samples: completions that a round's KL is measured on.
        n: completions of each prompt and model.
        policy: the model that is trained.
        others: the other local models that are sampled, by name.
        endpoints: names of the models that are sampled behind an endpoint.
        batch_size, continuous, max_new_tokens: of sampling.
        prompt_tokens, answer_tokens: means; answers are cut at max_new_tokens.
        rater: who rates.
        old_share: share of a round's pairs that comes from earlier rounds, from the second round on.
        epochs, max_steps: of each round's training.
        reference: whether the loss needs a reference pass.
        holds_out: whether rows are held out; if not, the KL's command scores the training pairs.
    """

    prompts: Sequence[int]
    eval_prompts: int
    kl_samples: int
    n: int
    policy: Decoder
    others: dict[str, Decoder]
    endpoints: Sequence[str]
    batch_size: int
    continuous: bool
    max_new_tokens: int
    prompt_tokens: float
    answer_tokens: float
    rater: Rater
    old_share: float
    epochs: int
    max_steps: int | None
    reference: bool
    holds_out: bool

    @property
    def lengths(self) -> np.ndarray:
        """int64 [4096], tokens of sampled answers."""
        return draw_answers(self.answer_tokens, self.max_new_tokens)

    @property
    def completions(self) -> int:
        """Of each prompt, by all models."""
        return self.n * (1 + len(self.others) + len(self.endpoints))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a round: what it does, its seconds on the GPUs, and what a judge behind an endpoint is asked."""

    name: str
    seconds: float
    what: str
    asked: Judging | None = None


def report(iteration: Iteration, plan: Plan, machine: Machine, *, price: float | None, judge: "Prices") -> list[str]:
    """Return the estimate's lines: the stages of the first round, then the sum over rounds."""
    rounds = [list(stages(iteration, plan, machine, number)) for number in range(len(iteration.prompts))]
    start = _sampled(iteration.policy, machine, iteration, iteration.eval_prompts, 1)
    seconds = start.seconds + sum(stage.seconds for stages in rounds for stage in stages)
    asked = [stage.asked for stages in rounds for stage in stages if stage.asked is not None]
    lines = [*_assumptions(iteration, machine), "", f"Round 1 of {len(rounds)}"]
    lines += [_line(stage) for stage in rounds[0]]
    lines += [f"All {len(rounds)} rounds" if len(rounds) > 1 else "In all", *_hours(seconds, machine, price)]
    if asked:
        total = Judging(*(sum(getattr(each, field.name) for each in asked) for field in dataclasses.fields(Judging)))
        lines.append(f"  {'judge':<10} {_asked(total)}{judge.of(total)}")
    return [*lines, *_memory_notes(iteration, machine)]


@dataclasses.dataclass(frozen=True)
class Prices:
    """USD per million tokens that a judge reads and writes; None: not given."""

    tokens_in: float | None
    tokens_out: float | None

    def of(self, asked: Judging) -> str:
        """Return what it costs, as the end of a line."""
        if self.tokens_in is None or self.tokens_out is None:
            return ""
        return f", {asked.cost(self.tokens_in, self.tokens_out):.2f} USD"


def stages(iteration: Iteration, plan: Plan, machine: Machine, number: int) -> Iterator[Stage]:
    """Yield the stages of round `number`, counted from 0."""
    prompts = iteration.prompts[number]
    for name, model in {"policy": iteration.policy, **iteration.others}.items():
        found = _sampled(model, machine, iteration, prompts, iteration.n)
        yield Stage(f"sample {_short(name)}", found.seconds, _generated(found, iteration, prompts * iteration.n))
    for name in iteration.endpoints:
        count, tokens = prompts * iteration.n, float(iteration.lengths.mean())
        what = f"{count:,} completions, {count * iteration.prompt_tokens:,.0f} tokens in, {count * tokens:,.0f} out"
        yield Stage(f"sample {name}", 0.0, f"{what}; an endpoint's hours are not known")
    yield _rating("rate", iteration, machine, prompts, iteration.completions, again_share=iteration.rater.again_share)
    yield _training(iteration, plan, number)
    if iteration.eval_prompts or iteration.kl_samples:
        yield _evaluation(iteration, plan, machine, number)
    if iteration.eval_prompts:  # no answer is rated again here
        yield _rating("compare", iteration, machine, iteration.eval_prompts, 2, again_share=0.0)


def _sampled(model: Decoder, machine: Machine, iteration: Iteration, prompts: int, n: int) -> Generation:
    answers = Answers(
        prompts=prompts,
        n=n,
        prompt_tokens=iteration.prompt_tokens,
        lengths=iteration.lengths,
        batch_size=iteration.batch_size,
        continuous=iteration.continuous,
    )
    return generation(model, machine, answers)


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _generated(found: Generation, iteration: Iteration, count: int) -> str:
    tokens = count * float(iteration.lengths.mean())
    return (
        f"{count:,} completions, {tokens:,.0f} tokens; a step of {found.batch} sequences on each GPU takes "
        f"{found.step * 1e3:.1f} ms, bound by {BOUNDS[found.bound]}"
    )


def _rating(
    name: str, iteration: Iteration, machine: Machine, prompts: int, completions: int, *, again_share: float
) -> Stage:
    """Rate `completions` completions of each of `prompts` prompts."""
    rater, tokens = iteration.rater, float(iteration.lengths.mean())
    if rater.kind == "function":
        return Stage(name, 0.0, f"{prompts * completions:,} completions, by a function: not counted")
    if rater.kind == "reward":
        assert rater.model is not None, "a reward model has sizes"
        alone = scoring(rater.model, machine, iteration.prompt_tokens + tokens)
        return Stage(name, prompts * completions * alone / machine.gpus, f"{prompts * completions:,} completions")
    asked = judging(
        prompts,
        completions,
        instructions=rater.instructions,
        around=rater.around,
        prompt_tokens=iteration.prompt_tokens,
        completion_tokens=tokens,
        aspects=rater.aspects,
        again_share=again_share,
    )
    if rater.kind == "endpoint" or not asked.requests:
        return Stage(name, 0.0, _asked(asked), asked)
    assert rater.model is not None, "a local judge has sizes"
    answers = Answers(
        prompts=asked.requests,
        n=1,
        prompt_tokens=asked.tokens_in / asked.requests,
        lengths=np.array([asked.tokens_out // asked.requests]),
        batch_size=rater.batch_size,
    )
    return Stage(name, generation(rater.model, machine, answers).seconds, _asked(asked))


def _asked(asked: Judging) -> str:
    return f"{asked.requests:,} requests, {asked.tokens_in:,} tokens in, {asked.tokens_out:,} out"


def pairs_of_round(iteration: Iteration, number: int) -> int:
    """Return how many pairs round `number` (from 0) trains on: its own, and earlier ones by their share."""
    fresh = iteration.prompts[number]
    if number == 0:
        return fresh
    # share s of all is old: old = fresh * s / (1 - s), but no more than there are
    old = min(sum(iteration.prompts[:number]), fresh * iteration.old_share / (1 - iteration.old_share))
    return fresh + round(old)


def _training(iteration: Iteration, plan: Plan, number: int) -> Stage:
    pairs = pairs_of_round(iteration, number)
    steps = math.ceil(pairs / plan.setting.batch_size) * iteration.epochs
    steps = steps if iteration.max_steps is None else min(steps, iteration.max_steps)
    reference = pairs * plan.scoring if iteration.reference else 0.0
    what = f"{pairs:,} pairs at most, {steps} steps of {plan.seconds:.2f} s"
    return Stage("dpo", steps * plan.seconds + reference, what + (", after the reference pass" if reference else ""))


def _evaluation(iteration: Iteration, plan: Plan, machine: Machine, number: int) -> Stage:
    """The answers to the evaluation prompts, and the KL: completions of the policy, scored by both models."""
    answers = _sampled(iteration.policy, machine, iteration, iteration.eval_prompts, 1).seconds
    if not iteration.kl_samples:
        return Stage("evaluate", answers, f"{iteration.eval_prompts:,} answers")
    tokens = iteration.prompt_tokens + float(iteration.lengths.mean())
    kl = _sampled(iteration.policy, machine, iteration, iteration.kl_samples, 1).seconds
    kl += 2 * iteration.kl_samples / machine.gpus * scoring(iteration.policy, machine, tokens)
    what = f"{iteration.eval_prompts:,} answers, {iteration.kl_samples:,} completions for the KL"
    if not iteration.holds_out:
        pairs = pairs_of_round(iteration, number)
        kl += 2 * pairs * plan.scoring
        what += f", {pairs:,} pairs scored twice"
    return Stage("evaluate", answers + kl, what)


def _line(stage: Stage) -> str:
    minutes = f"{stage.seconds / 60:.1f} min" if stage.seconds else "-"
    return f"  {stage.name:<24} {minutes:>10}  {stage.what}"


def _hours(seconds: float, machine: Machine, price: float | None) -> list[str]:
    hours = seconds / 3600
    lines = [f"  {'GPUs':<10} {hours:.2f} h, {hours * machine.gpus:.1f} GPU-hours"]
    if price is not None:
        lines[0] += f", {hours * machine.gpus * price:.2f} USD at {price:g} USD per GPU-hour"
    return lines


def _assumptions(iteration: Iteration, machine: Machine) -> list[str]:
    lines = [
        f"Rounds: {len(iteration.prompts)}, of {', '.join(f'{count:,}' for count in iteration.prompts)} prompts; "
        f"{iteration.n} completions of each prompt and model; {iteration.eval_prompts:,} prompts for evaluation",
        f"Answers: {iteration.lengths.mean():.0f} tokens in the mean, at most {iteration.max_new_tokens} (drawn)",
        f"Decoding, assumed: {machine.bandwidth_share:.0%} of {machine.gpu.bandwidth:,} GB/s of memory, and "
        f"{HOST_SECONDS * 1e3:g} ms of Python per block and step",
    ]
    if iteration.rater.kind in ("endpoint", "local"):
        lines.append(_judge_assumed(iteration.rater))
    return lines


def _judge_assumed(rater: Rater) -> str:
    return (
        f"Judge, assumed: {rater.instructions:.0f} tokens of instructions and {rater.around:.0f} around a completion, "
        f"{ANNOTATION} written for each of {rater.aspects} ratings of a completion, {rater.again_share:.0%} of the "
        "prompts rated twice"
    )


def _memory_notes(iteration: Iteration, machine: Machine) -> list[str]:
    """Name the models whose weights and cache do not fit one GPU."""
    lines = []
    for name, model in {"the policy": iteration.policy, **iteration.others}.items():
        missing = _sampled(model, machine, iteration, iteration.prompts[0], iteration.n).missing
        if missing > 0:
            lines.append(
                f"Sampling {name} does NOT fit one GPU: {missing / 2**30:.2f} GiB too much; lower sample.batch_size or "
                "serve it on several GPUs behind an endpoint (NAME@URL)."
            )
    return lines
