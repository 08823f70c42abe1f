"""`python -m notus evaluate --suite preferences`: held-out accuracy and margins of a model, alone or against a base.

Both models are computed as in training: packed, prefix-shared, sharded, under plain `python` or torchrun.
With a base, pairs are ranked by reward, β·(log-prob - the base's log-prob); an adapter's base is the model it
adapts, unless --base names another. Without one they are ranked by the log-prob itself.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.arguments import add_model_arguments, count, positive
from notus.evaluation.evaluate import add_suite_argument
from notus.evaluation.files import check_output, replacing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from notus.data.rows import Rows
    from notus.evaluation.models import ModelSource


_MEASURES = {"rewards": "reward", "logps": "log-prob", "logps_per_token": "log-prob per token"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_suite_argument(parser)
    add_model_arguments(parser)
    parser.add_argument("--pairs", required=True, help="held-out pairs: a file, a folder or a hub id")
    parser.add_argument("--split", default="train", help="of a hub dataset (default: train)")
    parser.add_argument(
        "--base",
        metavar="MODEL_OR_RUN",
        help="the model to compare with (default: an adapter's own base; for other models none)",
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
    parser.add_argument("--output", metavar="FILE.json", help="write the figures there, too")


def run(args: argparse.Namespace) -> int:
    """Evaluate as `args` say, print a table, return 0; collective under torchrun.

    Raises ValueError or OSError with a message for the user.
    """
    from notus.training import distributed

    with distributed.process_group() as device:
        if args.output:
            distributed.on_main(lambda: check_output(Path(args.output), not_over=args.pairs))
        result = _evaluate(args, device)
        distributed.say(_table(result))
        if args.output:
            distributed.on_main(lambda: _write(Path(args.output), result))
    return 0


def _evaluate(args: argparse.Namespace, device: "torch.device") -> dict[str, Any]:
    """What the table shows and the file gets: how it was computed, then the metrics."""
    import torch

    from notus.evaluation.models import find_source
    from notus.evaluation.preferences.scores import preference_metrics, score_model
    from notus.model.export import load_tokenizer
    from notus.training.distributed import main_first

    model = main_first(lambda: find_source(args.model))
    base_name = args.base or model.base
    base = main_first(lambda: find_source(base_name)) if base_name else None
    if args.beta is not None and base is None:
        raise ValueError("--beta has no effect without a base: give --base, or leave it out")
    tokenizer = load_tokenizer(model.folder, args.trust_remote_code)
    options = _data_options(args, model)
    rows = _load_rows(args, tokenizer, options)
    precision = model.choose(args.precision, "training.precision", "bf16")
    beta = model.choose(args.beta, "dpo.beta", 0.1) if base else None
    score = functools.partial(
        score_model,
        rows=rows,
        tokenizer=tokenizer,
        precision=precision,
        tokens_per_row=args.tokens_per_row,
        device=device,
        trust_remote_code=args.trust_remote_code,
    )
    logps = score(model)
    base_logps = score(base) if base else None
    described = {
        "model": args.model,
        "base": base_name,
        "ranked_by": "rewards" if base else "logps",
        "pairs": args.pairs,
        "num_pairs": len(rows),
        "precision": precision,
        "beta": beta,
    }
    lengths = torch.from_numpy(rows.loss_tokens)
    return {**described, **options, **preference_metrics(logps, base_logps, lengths, beta=beta)}


def _load_rows(args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", options: dict[str, Any]) -> "Rows":
    from notus.data.dataset import load_pairs
    from notus.data.rows import Rows
    from notus.training.distributed import main_first, say

    source = [{"path": args.pairs, "split": args.split}]
    dataset, report = main_first(lambda: load_pairs(source, tokenizer, **options))
    say(f"{args.pairs} {report}")
    return Rows(dataset)


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


def _table(result: dict[str, Any]) -> str:
    """The figures for a terminal."""
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
    return "\n".join(lines)


def _write(path: Path, result: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(result, indent=2) + "\n")
