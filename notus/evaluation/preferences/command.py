"""`python -m notus evaluate --suite preferences`: does a model rank held-out completions as their data do?

The rows are pairs, lists of rated completions, or completions with a label; the first row of the file decides, or what
a run was trained on. Both models are computed as in training: packed, prefix-shared, sharded, under plain `python` or
torchrun.

With a base, completions are ranked by reward, β·(log-prob - the base's log-prob). Unless --base names another, an
adapter's base is the model it adapts, a DPO run's the model it started from. The reward of a run whose losses have no
reference is what these train, β times the log-prob, per token if they take it so; the base is then there for comparison
alone. Without a base completions are ranked by the log-prob itself, and there is no calibration and no KL.

A run's figures are also written to RUN/evaluations/preferences/result.json. Its `details`, and those keys of --output:

    overall           `metrics.compare` of all pairs: of lists, those of one prompt with different ratings. Of labels,
                      `labels.compare_labels`
    by_source         [{source, + overall's keys, of lists + ranking's}], or null: the data name none
    by_length         [{low, high, + overall's keys}]: completion tokens, of pairs those of both together
    by_longer         [{longer: "chosen" | "rejected" | "neither", + compare}]; null: labels
    length_bias       see `metrics.length_bias`; null: undefined, and for labels
    calibration       {bins: [{low, high, count, confidence, frequency, interval}], quantiles: [the same], ece, brier,
                      best_beta, best_loss}, see `metrics.calibration`; null: no base, and for labels
    ranking           see `lists.ranking`; null: not for lists. Files of early versions lack it
    kl                see `kl.kl`; null: not asked for

where compare is {count, accuracy, accuracy_stderr, accuracy_interval, margin, margin_stderr, margin_interval}.
"""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.arguments import add_model_arguments, count, positive
from notus.evaluation.evaluate import add_suite_argument
from notus.evaluation.results import (
    EVALUATIONS,
    Result,
    check_folder,
    check_output,
    write_result,
)
from notus.runtime.files import write_text

if TYPE_CHECKING:
    import torch

    from notus.data.dataset import TokenizedDataset
    from notus.data.formats import Task
    from notus.evaluation.preferences.figures import Judged
    from notus.evaluation.preferences.kl import Samples
    from notus.evaluation.preferences.metrics import Rewards
    from notus.evaluation.preferences.scores import Scores, Scoring, Tokenization
    from notus.evaluation.resolve_model import ModelSource
    from notus.evaluation.run_loss import RunLoss

SUITE = "preferences"
DETAILS = ("overall", "by_source", "by_length", "by_longer", "length_bias", "calibration", "ranking", "kl")
DEFAULT_KL_TOKENS = 512
_OF_PAIRS = ("split", "max_length", "max_prompt_length", "chat_template", "add_empty_system")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_suite_argument(parser)
    add_model_arguments(parser)
    parser.add_argument(
        "--pairs",
        type=os.path.expanduser,
        help="held-out pairs, lists of rated completions, or labelled completions: a file, a folder or a hub id "
        "(default: the rows that the run held out)",
    )
    parser.add_argument("--split", help="of a hub dataset (default: train)")
    parser.add_argument(
        "--base",
        type=os.path.expanduser,
        metavar="MODEL_OR_RUN",
        help="the model to compare with (default: an adapter's own base, a DPO run's start; for other models none)",
    )
    parser.add_argument(
        "--beta",
        type=positive,
        help="scale of the rewards (default: the run's; 0.1 for other models, and with --base for a run whose loss has "
        "no reference)",
    )
    parser.add_argument(
        "--max-length", type=count, help="longest prompt + completion in tokens (default: the run's, or 1024)"
    )
    parser.add_argument(
        "--max-prompt-length",
        type=count,
        help="prompt tokens kept if a row is too long (default: the run's, or 512, at most half of the maximal length)",
    )
    parser.add_argument(
        "--tokens-per-row",
        type=count,
        help="tokens of one forward pass: sets memory and speed, not the result (default: 4096, or the longest row's)",
    )
    parser.add_argument(
        "--kl-samples",
        type=count,
        metavar="N",
        help="estimate the KL to the base from completions that the model samples for N prompts (default: no KL)",
    )
    parser.add_argument(
        "--kl-prompts",
        type=os.path.expanduser,
        metavar="FILE",
        help="where these prompts are, as `generate` reads them (default: the rows')",
    )
    parser.add_argument(
        "--kl-max-new-tokens", type=count, help=f"of a sampled completion (default: {DEFAULT_KL_TOKENS})"
    )
    parser.add_argument("--output", type=os.path.expanduser, metavar="FILE.json", help="write the figures there, too")


def run(args: argparse.Namespace) -> int:
    """Evaluate as `args` say, print a table, return 0; collective under torchrun.

    Raises ValueError or OSError with a message for the user.
    """
    from notus.evaluation.preferences.table import table
    from notus.evaluation.resolve_model import find_base, find_together
    from notus.runtime import distributed

    with distributed.process_group() as device:
        if args.output:
            distributed.on_main(lambda: _check_output(Path(args.output), args))
        model = find_together(args.model, trust_remote_code=args.trust_remote_code)
        base = find_base(model, args.base, trust_remote_code=args.trust_remote_code)
        _check_options(args, base)
        if model.run:
            folder, remedy = model.run / EVALUATIONS / SUITE, f"evaluate {model.folder}, which keeps none"
            distributed.on_main(lambda: check_folder(folder, remedy=remedy))
        result = _evaluate(args, device, model, base)
        distributed.say(table(result))
        distributed.on_main(lambda: _write(args, model, result))
    return 0


def _check_output(path: Path, args: argparse.Namespace) -> None:
    """Raise ValueError, before the work, if the figures would replace anything but earlier ones or an empty file."""
    check_output(path, form="JSON", not_over=args.pairs or args.model)
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:  # which may be a large one of rows
        begin = file.read(1000)
    if not begin.startswith(b"{") or b'"model":' not in begin or b'"base":' not in begin:
        raise ValueError(f"{path}: there is a file of that name that `notus evaluate` did not write; choose another")


def _check_options(args: argparse.Namespace, base: "ModelSource | None") -> None:
    """Raise ValueError for options without effect."""
    checks = (
        (base is None, ("beta", "kl_samples"), "has no effect without a base: give --base, or leave it out"),
        # cut otherwise, other rows would be held out
        (args.pairs is None, _OF_PAIRS, "needs --pairs: the run's own are taken as they are"),
        (
            args.kl_samples is None,
            ("kl_prompts", "kl_max_new_tokens"),
            "has no effect without --kl-samples: say how many, or leave it out",
        ),
    )
    for is_void, names, reason in checks:
        for name in names:
            if is_void and getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} {reason}")


def _evaluate(
    args: argparse.Namespace, device: "torch.device", model: "ModelSource", base: "ModelSource | None"
) -> dict[str, Any]:
    """Return what the table shows and the file gets: how it was computed, then the metrics."""
    from notus.evaluation.preferences.scores import Scoring, load_rows_of, name_pairs, score_adapter, score_model
    from notus.evaluation.resolve_model import switches_to
    from notus.evaluation.run_loss import read_loss
    from notus.model.export import load_tokenizer

    loss = read_loss(model.settings, model.name)
    rewards = _rewards(args, base, loss)
    tokenizer = load_tokenizer(model.folder, args.trust_remote_code)
    tokenization = _tokenization(args, model)
    rows, task = load_rows_of(model, args.pairs, args.split, tokenizer, tokenization)
    judged = _judged(rows, task, rewards, name_pairs(model, args.pairs))
    scoring = Scoring(
        pairs=rows,
        tokenizer=tokenizer,
        precision=model.options(args).precision,
        tokens_per_row=args.tokens_per_row,
        device=device,
        trust_remote_code=args.trust_remote_code,
    )
    samples = _sample(args, model, scoring) if args.kl_samples else None
    sampled = samples.rows if samples else None
    base_scores: Scores | None
    if not args.base and switches_to(model, base):
        scores, base_scores = score_adapter(model, scoring, sampled)
    else:
        scores = score_model(model, scoring, sampled)
        base_scores = score_model(base, scoring, sampled) if base else None
    return {
        "model": model.name,
        "base": base.name if base else None,
        "rows": judged.rows,
        "ranked_by": judged.ranked_by,
        "pairs": name_pairs(model, args.pairs),
        "num_rows": len(rows),
        "num_pairs": judged.num_pairs,
        "precision": scoring.precision,
        "loss_type": loss.name if loss else None,
        "beta": rewards.beta if rewards else None,
        "reward": rewards.formula if rewards else None,
        "is_relative": rewards.relative if rewards else None,
        "max_length": tokenization.max_length,
        "max_prompt_length": tokenization.max_prompt_length,
        **tokenization.chat.described(),
        **judged.metrics(scores.pairs, base_scores.pairs if base_scores else None),
        "kl": _estimated(scores, base_scores, samples),
    }


def _rewards(args: argparse.Namespace, base: "ModelSource | None", loss: "RunLoss | None") -> "Rewards | None":
    """How rewards are made: as the run trained them, or relative to the base that the user names."""
    from notus.evaluation.preferences.metrics import Rewards

    if base is None:
        return None
    if loss is None or (args.base and not loss.reference):
        return Rewards(args.beta or 0.1)
    return Rewards(args.beta or loss.beta, relative=loss.reference, per_token=loss.per_token)


def _judged(rows: "TokenizedDataset", task: "Task", rewards: "Rewards | None", name: str) -> "Judged":
    """What the rows say is better. Raises ValueError, beginning with their name, for rows that say nothing."""
    from notus.evaluation.preferences.figures import Labels, Lists, Pairs

    kinds: dict[str, type[Judged]] = {"lists": Lists, "labels": Labels}
    try:
        return kinds.get(task, Pairs)(rows, rewards)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _tokenization(args: argparse.Namespace, model: "ModelSource") -> "Tokenization":
    """How pairs become tokens: as the user says, else as the run had it."""
    from notus.evaluation.preferences.scores import Tokenization

    max_length = model.choose(args.max_length, "data.max_length", 1024)
    of_prompt = max(1, min(512, max_length // 2))
    return Tokenization(
        max_length=max_length,
        max_prompt_length=model.choose(args.max_prompt_length, "data.max_prompt_length", of_prompt),
        chat=model.options(args).chat,
    )


def _sample(args: argparse.Namespace, model: "ModelSource", scoring: "Scoring") -> "Samples":
    """Draw completions for the KL, of the prompts that the user chose."""
    from notus.evaluation.preferences.kl import choose, prompts_of, read_prompts, sample
    from notus.runtime.distributed import on_main, say

    if args.kl_prompts:
        options, tokenizer = model.options(args), scoring.tokenizer
        are_turns, encoder = options.strings_are_turns(tokenizer), options.chat.encoder(tokenizer)
        prompts = on_main(lambda: read_prompts(Path(args.kl_prompts), encoder, strings_are_turns=are_turns))
    else:
        prompts = prompts_of(scoring.pairs)
    chosen = choose(prompts, args.kl_samples)
    if len(chosen) < args.kl_samples:
        say(f"--kl-samples {args.kl_samples}: there are only {len(chosen)} different prompts")
    return sample(model.folder, scoring, chosen, args.kl_max_new_tokens or DEFAULT_KL_TOKENS)


def _estimated(scores: "Scores", base: "Scores | None", samples: "Samples | None") -> dict[str, Any] | None:
    """Return the KL of the samples; None if it is not asked for."""
    from notus.evaluation.preferences.kl import kl

    if samples is None:
        return None
    assert scores.samples is not None
    assert base is not None
    assert base.samples is not None
    return kl(scores.samples, base.samples, samples)


def _write(args: argparse.Namespace, model: "ModelSource", result: dict[str, Any]) -> None:
    from notus.evaluation.preferences.table import figures

    if args.output:
        write_text(Path(args.output), json.dumps(result, indent=2) + "\n")
    if model.run:
        hidden = (*DETAILS, "loss")
        settings = {name: value for name, value in result.items() if name not in hidden and "/" not in name}
        details = {name: result[name] for name in DETAILS}
        write_result(
            model.run / EVALUATIONS / SUITE, Result(SUITE, model.name, list(figures(result)), settings, details)
        )
