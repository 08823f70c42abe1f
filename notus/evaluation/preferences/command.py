"""`python -m notus evaluate --suite preferences`: does a model prefer the chosen completions of held-out pairs?

Both models are computed as in training: packed, prefix-shared, sharded, under plain `python` or torchrun.
With a base, pairs are ranked by reward, β·(log-prob - the base's log-prob). Unless --base names another, an adapter's
base is the model it adapts, a DPO run's the model it started from. Without one they are ranked by the log-prob itself,
and there is no calibration and no KL.

A run's figures are also written to RUN/evaluations/preferences/result.json. Its `details`, and those keys of --output:

    overall           `breakdowns.compare` of all pairs
    by_source         [{source, + compare}], or null: the data name none
    by_length         [{low, high, + compare}]: completion tokens of chosen and rejected together
    by_longer         [{longer: "chosen" | "rejected" | "neither", + compare}]
    length_bias       see `breakdowns.length_bias`; null: undefined
    calibration       {bins: [{low, high, count, confidence, frequency, interval}], ece, brier, best_beta, best_loss},
                      see `calibration.calibration`; null: no base
    kl                see `kl.kl`; null: not asked for

where compare is {count, accuracy, accuracy_stderr, accuracy_interval, margin, margin_stderr, margin_interval}.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.arguments import add_model_arguments, count, positive
from notus.evaluation.evaluate import add_suite_argument
from notus.evaluation.files import check_folder, check_output, replacing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from notus.data.dataset import Rows
    from notus.evaluation.models import ModelSource
    from notus.evaluation.preferences.kl import Samples
    from notus.evaluation.preferences.scores import Scores, Scoring


DEFAULT_KL_TOKENS = 512
# How pairs become tokens.
ROW_OPTIONS = ("max_length", "max_prompt_length", "chat_template", "add_empty_system")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_suite_argument(parser)
    add_model_arguments(parser)
    parser.add_argument(
        "--pairs", help="held-out pairs: a file, a folder or a hub id (default: those that the run held out)"
    )
    parser.add_argument("--split", help="of a hub dataset (default: train)")
    parser.add_argument(
        "--base",
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
        "--kl-prompts", metavar="FILE", help="where these prompts are, as `generate` reads them (default: the pairs')"
    )
    parser.add_argument(
        "--kl-max-new-tokens", type=count, help=f"of a sampled completion (default: {DEFAULT_KL_TOKENS})"
    )
    parser.add_argument("--output", metavar="FILE.json", help="write the figures there, too")


def run(args: argparse.Namespace) -> int:
    """Evaluate as `args` say, print a table, return 0; collective under torchrun.

    Raises ValueError or OSError with a message for the user.
    """
    from notus.evaluation.models import find_together
    from notus.evaluation.preferences.table import SUITE, table
    from notus.evaluation.results import EVALUATIONS
    from notus.runtime import distributed

    with distributed.process_group() as device:
        if args.output:
            distributed.on_main(lambda: check_output(Path(args.output), not_over=args.pairs or args.model))
        model = find_together(args.model, trust_remote_code=args.trust_remote_code)
        base = _find_base(args, model)
        _check_options(args, base)
        if model.run:
            folder, remedy = model.run / EVALUATIONS / SUITE, f"evaluate {model.folder}, which keeps none"
            distributed.on_main(lambda: check_folder(folder, remedy=remedy))
        result = _evaluate(args, device, model, base)
        distributed.say(table(result))
        distributed.on_main(lambda: _write(args, model, result))
    return 0


def _find_base(args: argparse.Namespace, model: "ModelSource") -> "ModelSource | None":
    from notus.evaluation.models import find_together

    start = model.settings["model"]["name_or_path"] if "dpo" in model.settings else None
    name = args.base or model.base or start
    return find_together(name, trust_remote_code=args.trust_remote_code) if name else None


def _check_options(args: argparse.Namespace, base: "ModelSource | None") -> None:
    if base is None:
        for option, value in (("--beta", args.beta), ("--kl-samples", args.kl_samples)):
            if value is not None:
                raise ValueError(f"{option} has no effect without a base: give --base, or leave it out")
    if args.pairs is None:
        for option in ("split", *ROW_OPTIONS):  # cut otherwise, other rows would be held out
            if getattr(args, option) is not None:
                raise ValueError(f"--{option.replace('_', '-')} needs --pairs: the run's own are taken as they are")
    if args.kl_samples is None:
        for option, value in (("--kl-prompts", args.kl_prompts), ("--kl-max-new-tokens", args.kl_max_new_tokens)):
            if value is not None:
                raise ValueError(f"{option} has no effect without --kl-samples: say how many, or leave it out")


def _evaluate(
    args: argparse.Namespace, device: "torch.device", model: "ModelSource", base: "ModelSource | None"
) -> dict[str, Any]:
    """What the table shows and the file gets: how it was computed, then the metrics."""
    import torch

    from notus.evaluation.preferences import pairs
    from notus.evaluation.preferences.scores import Scoring, preference_metrics
    from notus.model.export import load_tokenizer

    tokenizer = load_tokenizer(model.folder, args.trust_remote_code)
    options = _data_options(args, model)
    precision = model.choose(args.precision, "training.precision", "bf16")
    rows = pairs.load(args.pairs, args.split, model, tokenizer, options)
    samples = _sample(args, model, tokenizer, rows, options, precision, device) if args.kl_samples else None
    scoring = Scoring(
        pairs=rows,
        samples=samples.rows if samples else None,
        tokenizer=tokenizer,
        precision=precision,
        tokens_per_row=args.tokens_per_row,
        device=device,
        trust_remote_code=args.trust_remote_code,
    )
    scores, base_scores = _score(args, model, base, scoring)
    beta = model.choose(args.beta, "dpo.beta", 0.1) if base else None
    described = {
        "model": model.name,
        "base": base.name if base else None,
        "ranked_by": "rewards" if base else "logps",
        "pairs": pairs.name_of(args.pairs, model),
        "num_pairs": len(rows),
        "precision": precision,
        "beta": beta,
    }
    lengths = torch.from_numpy(rows.loss_tokens)
    of_base = base_scores.pairs if base_scores else None
    metrics = preference_metrics(scores.pairs, of_base, lengths, beta=beta)
    return {**described, **options, **metrics, **_details(rows, scores, base_scores, beta, samples)}


def _score(
    args: argparse.Namespace, model: "ModelSource", base: "ModelSource | None", scoring: "Scoring"
) -> "tuple[Scores, Scores | None]":
    from notus.evaluation.preferences.scores import score_adapter, score_model

    if model.base and not args.base:
        return score_adapter(model, scoring)
    scores = score_model(model, scoring)
    return scores, score_model(base, scoring) if base else None


def _details(
    rows: "Rows", scores: "Scores", base: "Scores | None", beta: float | None, samples: "Samples | None"
) -> dict[str, Any]:
    from notus.evaluation.preferences import breakdowns
    from notus.evaluation.preferences.calibration import calibration
    from notus.evaluation.preferences.kl import kl

    ratios = scores.pairs.double() - (base.pairs.double() if base else 0)
    margins = (1.0 if beta is None else beta) * (ratios[:, 0] - ratios[:, 1]).numpy()
    estimated = None
    if samples is not None:
        assert scores.samples is not None
        assert base is not None
        assert base.samples is not None
        estimated = kl(scores.samples, base.samples, samples)
    return {
        "overall": breakdowns.compare(margins),
        "by_source": breakdowns.by_source(margins, rows.sources) if rows.sources else None,
        "by_length": breakdowns.by_length(margins, rows.loss_tokens),
        "by_longer": breakdowns.by_longer(margins, rows.loss_tokens),
        "length_bias": breakdowns.length_bias(margins, rows.loss_tokens),
        "calibration": calibration(margins, beta) if beta is not None else None,
        "kl": estimated,
    }


def _sample(
    args: argparse.Namespace,
    model: "ModelSource",
    tokenizer: "PreTrainedTokenizerBase",
    rows: "Rows",
    options: dict[str, Any],
    precision: str,
    device: "torch.device",
) -> "Samples":
    """Completions for the KL, of the prompts that the user chose."""
    from notus.evaluation.preferences.kl import choose, prompts_of, read_prompts, sample
    from notus.runtime.distributed import on_main, say

    prompts = prompts_of(rows)
    if args.kl_prompts:
        chat = {name: options[name] for name in ("chat_template", "add_empty_system")}
        prompts = on_main(lambda: read_prompts(Path(args.kl_prompts), tokenizer, **chat))
    chosen = choose(prompts, args.kl_samples)
    if len(chosen) < args.kl_samples:
        say(f"--kl-samples {args.kl_samples}: there are only {len(chosen)} different prompts")
    return sample(
        model.folder,
        tokenizer,
        chosen,
        max_new_tokens=args.kl_max_new_tokens or DEFAULT_KL_TOKENS,
        precision=precision,
        device=device,
        trust_remote_code=args.trust_remote_code,
    )


def _data_options(args: argparse.Namespace, model: "ModelSource") -> dict[str, Any]:
    """How pairs become tokens: as the user says, else as the run had it."""
    max_length = model.choose(args.max_length, "data.max_length", 1024)
    of_prompt = max(1, min(512, max_length // 2))
    return {
        "max_length": max_length,
        "max_prompt_length": model.choose(args.max_prompt_length, "data.max_prompt_length", of_prompt),
        "chat_template": model.choose(args.chat_template, "data.chat_template", None),
        "add_empty_system": model.choose(args.add_empty_system, "data.add_empty_system", False),
    }


def _write(args: argparse.Namespace, model: "ModelSource", result: dict[str, Any]) -> None:
    from notus.evaluation.preferences.table import SUITE, as_result
    from notus.evaluation.results import EVALUATIONS, write_result

    if args.output:
        with replacing(Path(args.output)) as file:
            file.write(json.dumps(result, indent=2) + "\n")
    if model.run:
        write_result(model.run / EVALUATIONS / SUITE, as_result(result, model.name))
