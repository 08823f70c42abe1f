"""`python -m notus evaluate --suite preferences`: does a model prefer the chosen completions of held-out pairs?

Both models are computed as in training: packed, prefix-shared, sharded, under plain `python` or torchrun.
With a base, pairs are ranked by reward, β·(log-prob - the base's log-prob). Unless --base names another, an adapter's
base is the model it adapts, a DPO run's the model it started from. Without one they are ranked by the log-prob itself,
and there is no calibration and no KL.

A run's figures are also written to RUN/evaluations/preferences/result.json. Its `details`, and those keys of --output:

    overall           `metrics.compare` of all pairs
    by_source         [{source, + compare}], or null: the data name none
    by_length         [{low, high, + compare}]: completion tokens of chosen and rejected together
    by_longer         [{longer: "chosen" | "rejected" | "neither", + compare}]
    length_bias       see `metrics.length_bias`; null: undefined
    calibration       {bins: [{low, high, count, confidence, frequency, interval}], ece, brier, best_beta, best_loss},
                      see `metrics.calibration`; null: no base
    kl                see `kl.kl`; null: not asked for

where compare is {count, accuracy, accuracy_stderr, accuracy_interval, margin, margin_stderr, margin_interval}.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.arguments import add_model_arguments, count, positive
from notus.evaluation.evaluate import add_suite_argument
from notus.evaluation.results import (
    EVALUATIONS,
    Figure,
    Result,
    check_folder,
    check_output,
    public_name,
    write_result,
)
from notus.runtime.files import write_text

if TYPE_CHECKING:
    import torch

    from notus.evaluation.preferences.kl import Samples
    from notus.evaluation.preferences.scores import Scores, Scoring, Tokenization
    from notus.evaluation.resolve_model import ModelSource

SUITE = "preferences"
DETAILS = ("overall", "by_source", "by_length", "by_longer", "length_bias", "calibration", "kl")
DEFAULT_KL_TOKENS = 512
_OF_PAIRS = ("split", "max_length", "max_prompt_length", "chat_template", "add_empty_system")
_MEASURES = {"rewards": "reward", "logps": "log-prob", "logps_per_token": "log-prob per token"}
_MOST_SOURCES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_suite_argument(parser)
    add_model_arguments(parser)
    parser.add_argument(
        "--pairs",
        type=os.path.expanduser,
        help="held-out pairs: a file, a folder or a hub id (default: those that the run held out)",
    )
    parser.add_argument("--split", help="of a hub dataset (default: train)")
    parser.add_argument(
        "--base",
        type=os.path.expanduser,
        metavar="MODEL_OR_RUN",
        help="the model to compare with (default: an adapter's own base, a DPO run's start; for other models none)",
    )
    parser.add_argument("--beta", type=positive, help="scale of the rewards (default: the run's, or 0.1)")
    parser.add_argument(
        "--max-length", type=count, help="longest prompt + completion in tokens (default: the run's, or 1024)"
    )
    parser.add_argument(
        "--max-prompt-length",
        type=count,
        help="prompt tokens kept if a pair is too long (default: the run's, or 512, at most half of the "
        "maximal length)",
    )
    parser.add_argument(
        "--tokens-per-row",
        type=count,
        help="tokens of one forward pass: sets memory and speed, not the result (default: 4096, or the longest pair's)",
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
        help="where these prompts are, as `generate` reads them (default: the pairs')",
    )
    parser.add_argument(
        "--kl-max-new-tokens", type=count, help=f"of a sampled completion (default: {DEFAULT_KL_TOKENS})"
    )
    parser.add_argument("--output", type=os.path.expanduser, metavar="FILE.json", help="write the figures there, too")


def run(args: argparse.Namespace) -> int:
    """Evaluate as `args` say, print a table, return 0; collective under torchrun.

    Raises ValueError or OSError with a message for the user.
    """
    from notus.evaluation.resolve_model import find_base, find_together
    from notus.runtime import distributed

    with distributed.process_group() as device:
        if args.output:
            distributed.on_main(lambda: check_output(Path(args.output), not_over=args.pairs or args.model))
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
    from notus.evaluation.preferences.scores import Scoring, load_pairs_of, name_pairs, score_adapter, score_model
    from notus.evaluation.resolve_model import switches_to
    from notus.model.export import load_tokenizer

    tokenizer = load_tokenizer(model.folder, args.trust_remote_code)
    tokenization = _tokenization(args, model)
    scoring = Scoring(
        pairs=load_pairs_of(model, args.pairs, args.split, tokenizer, tokenization),
        tokenizer=tokenizer,
        precision=model.options(args).precision,
        tokens_per_row=args.tokens_per_row,
        device=device,
        trust_remote_code=args.trust_remote_code,
    )
    samples = _sample(args, model, scoring) if args.kl_samples else None
    rows = samples.rows if samples else None
    base_scores: Scores | None
    if not args.base and switches_to(model, base):
        scores, base_scores = score_adapter(model, scoring, rows)
    else:
        scores = score_model(model, scoring, rows)
        base_scores = score_model(base, scoring, rows) if base else None
    beta = model.choose(args.beta, "dpo.beta", 0.1) if base else None
    return {
        "model": model.name,
        "base": base.name if base else None,
        "ranked_by": "rewards" if base else "logps",
        "pairs": name_pairs(model, args.pairs),
        "num_pairs": len(scoring.pairs),
        "precision": scoring.precision,
        "beta": beta,
        "max_length": tokenization.max_length,
        "max_prompt_length": tokenization.max_prompt_length,
        **tokenization.chat.described(),
        **_metrics(scoring, scores, base_scores, beta, samples),
    }


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


def _metrics(
    scoring: "Scoring", scores: "Scores", base: "Scores | None", beta: float | None, samples: "Samples | None"
) -> dict[str, Any]:
    import torch

    from notus.evaluation.preferences import metrics
    from notus.evaluation.preferences.kl import kl

    lengths, sources = scoring.pairs.loss_tokens, scoring.pairs.sources
    of_base = base.pairs if base else None
    ratios = scores.pairs.double() - (0 if of_base is None else of_base.double())
    margins = (1.0 if beta is None else beta) * (ratios[:, 0] - ratios[:, 1]).numpy()
    estimated = None
    if samples is not None:
        assert scores.samples is not None
        assert base is not None
        assert base.samples is not None
        estimated = kl(scores.samples, base.samples, samples)
    return {
        **metrics.preference_metrics(scores.pairs, of_base, torch.from_numpy(lengths), beta=beta),
        "overall": metrics.compare(margins),
        "by_source": metrics.by_source(margins, sources) if sources else None,
        "by_length": metrics.by_length(margins, lengths),
        "by_longer": metrics.by_longer(margins, lengths),
        "length_bias": metrics.length_bias(margins, lengths),
        "calibration": metrics.calibration(margins, beta) if beta is not None else None,
        "kl": estimated,
    }


def _write(args: argparse.Namespace, model: "ModelSource", result: dict[str, Any]) -> None:
    if args.output:
        write_text(Path(args.output), json.dumps(result, indent=2) + "\n")
    if model.run:
        hidden = (*DETAILS, "loss")
        settings = {name: value for name, value in result.items() if name not in hidden and "/" not in name}
        details = {name: result[name] for name in DETAILS}
        write_result(
            model.run / EVALUATIONS / SUITE, Result(SUITE, model.name, list(_figures(result)), settings, details)
        )


def _figures(result: dict[str, Any]) -> Iterator[Figure]:
    overall, kl, known = result["overall"], result["kl"], result["calibration"]
    what = _MEASURES[result["ranked_by"]]
    shared: dict[str, Any] = {
        "count": overall["count"],
        "dataset": ", ".join(public_name(name) for name in result["pairs"].split(", ")),
        "setup": f"beta {result['beta']:g}, against {public_name(result['base'])}" if result["base"] else "no base",
    }
    error = overall["accuracy_stderr"]
    percent = None if error is None else 100 * error
    yield Figure(f"{what} accuracy", "accuracy", 100 * overall["accuracy"], "%", stderr=percent, **shared)
    yield Figure(f"{what} margin", "margin", overall["margin"], stderr=overall["margin_stderr"], **shared)
    if known:
        yield Figure("sigmoid loss", "loss", result["loss"], **shared)
        yield Figure("expected calibration error", "ece", known["ece"], **shared)
    if kl:
        shared |= {"count": kl["samples"], "setup": f"sampled, at most {kl['max_new_tokens']} tokens"}
        yield Figure(
            "KL to the base", "kl_per_sequence", kl["per_sequence"], stderr=kl["per_sequence_stderr"], **shared
        )


def table(result: dict[str, Any]) -> str:
    """Return the figures as a table for a terminal."""
    against = f"against {result['base']}, beta {result['beta']:g}" if result["base"] else "without a base"
    lines = [
        f"{result['model']} {against}: {result['num_pairs']} pairs, {result['precision']}",
        f"{'':18}{'chosen':>12}{'rejected':>12}{'margin':>12}{'accuracy':>12}",
    ]
    for name, title in _MEASURES.items():
        if f"{name}/chosen" in result:
            parts = (result[f"{name}/{part}"] for part in ("chosen", "rejected", "margins", "accuracies"))
            lines.append(f"{title:18}{''.join(f'{value:12.4f}' for value in parts)}")
    if "loss" in result:
        lines.append(f"sigmoid loss {result['loss']:.6f}")
    return "\n".join([*lines, *_sentences(result), "", *_breakdowns(result)])


def _sentences(result: dict[str, Any]) -> Iterator[str]:
    if known := result["calibration"]:
        best = known["best_beta"]
        fits = "no finite beta fits best" if best is None else f"beta {best:.3g} would fit these pairs best"
        yield f"calibration: expected error {known['ece']:.4f}, Brier score {known['brier']:.4f}; {fits}"
    if bias := result["length_bias"]:
        slope, error = bias["slope_per_token"], bias["slope_stderr"]
        yield (
            f"length: margin {slope:+.4g} ± {error:.2g} per token that the chosen is longer; correlation "
            f"{bias['pearson']:.2f}, of ranks {bias['spearman']:.2f}"
        )
    if kl := result["kl"]:
        names = ("per_sequence", "per_token", "k3_per_sequence")
        errors = ("" if kl[f"{name}_stderr"] is None else f" ± {kl[f'{name}_stderr']:.4f}" for name in names)
        per_sequence, per_token, k3 = (f"{kl[name]:.4f}{error}" for name, error in zip(names, errors, strict=True))
        yield (
            f"KL to the base: {per_sequence} nats a completion, {per_token} a token (k3: {k3}); {kl['samples']} "
            f"samples, {kl['cut_share']:.0%} of them cut at {kl['max_new_tokens']} tokens"
        )


def _breakdowns(result: dict[str, Any]) -> Iterator[str]:
    ranked = _MEASURES[result["ranked_by"]]
    yield f"{ranked + ', 95% intervals':34}{'pairs':>7}  {'margin':>30}  {'accuracy':>24}"
    yield _line("all pairs", result["overall"])
    sources = result["by_source"] or []
    for row in sources[:_MOST_SOURCES]:
        yield _line(row["source"], row)
    if len(sources) > _MOST_SOURCES:
        yield f"  ... and {len(sources) - _MOST_SOURCES} more sources, see --output"
    for row in result["by_length"]:
        yield _line(f"{row['low']} to {row['high']} tokens together", row)
    for row in result["by_longer"]:
        yield _line("of equal length" if row["longer"] == "neither" else f"{row['longer']} is longer", row)


def _line(title: str, row: dict[str, Any]) -> str:
    margin = f"{row['margin']:.4f}"
    if row["margin_interval"]:  # of one pair there is none
        low, high = row["margin_interval"]
        margin += f" [{low:.4f}, {high:.4f}]"
    low, high = row["accuracy_interval"]
    accuracy = f"{row['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
    return f"  {title[:31]:32}{row['count']:7}  {margin:>30}  {accuracy:>24}"
