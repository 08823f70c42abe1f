"""`notus estimate CONFIG.yaml`: the estimate of one run, or of all rounds where the config has a section `iterate`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from notus.config import read_yaml
from notus.estimate.command import add_arguments, estimate_run, make_setting, passes_of, read_options
from notus.feedback.instructions import read_instructions
from notus.feedback.judge import Question
from notus.feedback.records import ASPECTS
from notus.feedback.settings import Settings, load_settings
from notus.feedback.stages import holds_out
from notus.runtime.process import tell

if TYPE_CHECKING:
    from notus.estimate.generation import Decoder
    from notus.estimate.iteration import Iteration, Kind, Rater
    from notus.estimate.sizes import Lengths

__all__ = ["add_arguments", "run"]

CHARACTERS = 4  # of English, to a token: an assumption
AGAIN_SHARE = 0.1  # `notus rate`'s default
BATCH_SIZE = 32  # `notus sample`'s default
JUDGE_BATCH_SIZE = 8  # `notus rate`'s


def run(args: argparse.Namespace) -> int:
    """Print the estimate. Raises ValueError: a user's mistake, in one line."""
    args, overrides = read_options(args)
    tree = read_yaml(Path(args.config))
    if not isinstance(tree, dict) or "iterate" not in tree:
        return estimate_run(args, overrides)
    if args.task is not None:
        raise ValueError(f"--task has no effect on {args.config}, an iteration: leave it out")
    return 0 if tell("\n".join(estimate_rounds(load_settings([args.config, *overrides]), args))) else 1


def estimate_rounds(settings: Settings, args: argparse.Namespace) -> list[str]:
    """Return the report's lines: memory and step of the training, then the rounds."""
    from notus.estimate import iteration, report
    from notus.estimate.generation import Machine
    from notus.estimate.plan import make_plan

    config = settings.dpo(1)
    prompt_tokens, answer_tokens = _means(settings, args)
    rounds = _iteration(settings, args, prompt_tokens, answer_tokens)
    setting, source = make_setting(config, args, _lengths(settings, rounds), passes_of(config))
    plan = make_plan(setting)
    lines = [*report.head(setting, source, args.gpu), "", *report.memory(plan), ""]
    if setting.cpu_offload:
        return [*lines, report.OFFLOADED]
    lines += [*report.step(plan, "lists" if settings.curate.listwise else "pairs"), ""]
    machine = Machine(setting.gpu, setting.gpus, setting.utilisation)
    prices = iteration.Prices(
        args.price_in if args.price_in is not None else settings.rate.price_in,
        args.price_out if args.price_out is not None else settings.rate.price_out,
    )
    return lines + iteration.report(rounds, plan, machine, price=args.price, judge=prices)


def _means(settings: Settings, args: argparse.Namespace) -> tuple[float, float]:
    """Mean tokens of a prompt and of an answer before it is cut."""
    from notus.estimate.sizes import TYPICAL_LIST, parse_means

    rows = settings.dpo(1).rows
    means = parse_means(args.lengths, rows) if args.lengths else TYPICAL_LIST
    return means[0], sum(means[1:]) / len(means[1:])


def _lengths(settings: Settings, rounds: "Iteration") -> "Lengths":
    """Draw the lengths of the rows that a round trains on."""
    from notus.estimate.sizes import draw

    config = settings.dpo(1)
    branches = {"lists": rounds.completions, "labels": 1}.get(config.rows, 2)
    means = (rounds.prompt_tokens, *[float(rounds.lengths.mean())] * branches)
    longest = config.data.max_length
    return draw(means, max_length=longest, max_prompt_length=config.data.max_prompt_length or longest // 2)


def _iteration(settings: Settings, args: argparse.Namespace, prompt_tokens: float, answer_tokens: float) -> "Iteration":
    from notus.estimate.iteration import Iteration

    iterate, sample, config = settings.iterate, settings.sample, settings.dpo(1)
    precision = sample.precision or config.training.precision
    local = [name for name in sample.models if "://" not in name]
    return Iteration(
        prompts=_prompts(settings, args.examples),
        eval_prompts=0 if iterate.eval_prompts is None else _count(iterate.eval_prompts, "iterate.eval_prompts"),
        kl_samples=iterate.kl_samples,
        n=sample.n,
        policy=_decoder(args.model_config or settings.start, precision),
        others={name: _decoder(name, precision) for name in local},
        endpoints=[name.partition("@")[0] for name in sample.models if "://" in name],
        batch_size=sample.batch_size or BATCH_SIZE,
        continuous=sample.engine == "continuous",
        max_new_tokens=sample.max_new_tokens,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        rater=_rater(settings, precision),
        old_share=iterate.old_share,
        epochs=config.training.epochs,
        max_steps=config.training.max_steps,
        reference=passes_of(config).reference,
        holds_out=holds_out(settings),
    )


def _prompts(settings: Settings, examples: int | None) -> list[int]:
    """How many prompts each round has."""
    iterate = settings.iterate
    each = iterate.prompts_per_round
    if each is None:
        total = examples or _count(iterate.prompts, "iterate.prompts")
        each = total // iterate.rounds
        if not each:
            raise ValueError(f"{total} prompts are fewer than iterate.rounds={iterate.rounds}: give more prompts")
    return [each] * iterate.rounds


def _count(path: str, key: str) -> int:
    from notus.evaluation.prompts import read_prompts

    if not Path(path).is_file():
        remedy = (
            "give --examples N"
            if key == "iterate.prompts"
            else "write it, or leave it out with --iterate.eval_prompts=null"
        )
        raise ValueError(f"{key}={path}: there is no such file; {remedy}")
    return len(read_prompts(Path(path), strings_are_turns=True))


def _decoder(name: str, precision: str) -> "Decoder":
    """Sizes of a model without its adapter, which is merged before it generates."""
    from notus.estimate.generation import decoder
    from notus.estimate.sizes import find_config, sizes
    from notus.training.model_folders import local_names

    path = Path(name).expanduser()
    config, _ = find_config(name if path.is_file() else local_names(name).base)
    return decoder(*sizes(config), precision)


def _rater(settings: Settings, precision: str) -> "Rater":
    from notus.estimate.iteration import Rater

    rate = settings.rate
    aspects = tuple(rate.aspects or ASPECTS)
    again = AGAIN_SHARE if rate.again_share is None else rate.again_share
    model = rate.local_judge or rate.reward_model
    asked = [_tokens_asked(rate.instructions, aspects, completions) for completions in (0, 1)]
    return Rater(
        kind=_kind(settings),
        model=None if model is None else _decoder(model, precision),
        batch_size=rate.batch_size or JUDGE_BATCH_SIZE,
        aspects=len(aspects),
        instructions=asked[0],
        around=asked[1] - asked[0],
        again_share=again,
    )


def _kind(settings: Settings) -> "Kind":
    rate = settings.rate
    if rate.local_judge:
        return "local"
    if rate.reward_model:
        return "reward"
    return "endpoint" if rate.judge else "function"


def _tokens_asked(path: str | None, aspects: Sequence[str], completions: int) -> float:
    """Tokens of the judge's prompt with so many empty completions."""
    question = Question("", "", "", [""] * completions, range(completions))
    return len(read_instructions(path, aspects).text(question)) / CHARACTERS
