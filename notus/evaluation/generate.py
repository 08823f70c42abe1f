"""`python -m notus generate`: complete the prompts of a file to JSON lines; and `answer`, which suites use for theirs.

A string prompt is the user's turn if the model has a chat format: its tokenizer brings a template, or --chat-template
or the run's config names one. Otherwise it is plain text to continue; so it is for a model that learned plain text
only, whatever template its tokenizer has. --raw and --no-raw decide for the user. Message lists are always rendered as
in training.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.arguments import add_model_arguments, count, share, temperature
from notus.evaluation.results import check_output
from notus.runtime.files import replacing

if TYPE_CHECKING:
    import torch

    from notus.evaluation.decoding import Decoding
    from notus.evaluation.prompts import Prompt
    from notus.evaluation.resolve_model import ModelOptions, ModelSource


ENGINES = ("batched", "continuous")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_model_arguments(parser)
    parser.add_argument(
        "prompts",
        type=os.path.expanduser,
        metavar="PROMPTS",
        help="a .jsonl, .json, .csv or .parquet file of rows with prompt, messages, conversations or instruction; or a "
        ".txt file, one prompt a line",
    )
    parser.add_argument(
        "out",
        type=os.path.expanduser,
        metavar="OUT",
        help="a .jsonl file: each object with its completion, there when complete; it must not exist, or be empty",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it exists, once the result is complete"
    )
    add_answer_arguments(parser, "completion", max_new_tokens=512)
    parser.add_argument("--top-k", type=count, help="draw from the k likeliest tokens")
    parser.add_argument(
        "--num-samples",
        type=count,
        default=1,
        help="completions per prompt, which is computed once for all of them (default: 1)",
    )
    add_engine_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system turn for conversations without one")


def run(args: argparse.Namespace) -> int:
    """Generate as `args` say, return 0; under torchrun the ranks share the work.

    Raises ValueError or OSError with a message for the user.
    """
    settings = answer_settings(args, "completions", max_new_tokens=512)
    settings = dataclasses.replace(settings, samples=args.num_samples, engine=args.engine)
    if settings.temperature == 0 and args.num_samples > 1:
        raise ValueError("--num-samples above 1 would repeat a greedy completion: set --temperature")
    if args.raw and args.system is not None:
        raise ValueError("--raw takes prompts as plain text, which has no turns: leave --system out")
    from notus.runtime import distributed

    with distributed.process_group() as device:
        distributed.on_main(lambda: _check_out(Path(args.out), args))
        prompts, completions = _generate(args, settings, device)
        distributed.on_main(lambda: _write(Path(args.out), prompts, completions, args.num_samples))
        distributed.say(f"wrote {len(completions)} completions of {len(prompts)} prompts to {args.out}")
    return 0


def _check_out(path: Path, args: argparse.Namespace) -> None:
    """Check before the work that the prompts are there and OUT may be written; an empty file is nobody's loss."""
    if not Path(args.prompts).exists():
        raise ValueError(f"{args.prompts}: there is no such file; give one with prompts")
    check_output(path, form="JSON Lines", not_over=args.prompts)
    if path.exists() and path.stat().st_size and not args.overwrite:
        raise ValueError(f"{path}: exists already; name another file, or replace it with --overwrite")


def _generate(
    args: argparse.Namespace, settings: "Decoding", device: "torch.device"
) -> tuple[list["Prompt"], list[str]]:
    """Return the prompts, and num_samples completions of each, one after the other."""
    from notus.evaluation.resolve_model import find_together
    from notus.runtime.distributed import on_main

    source = find_together(args.model, trust_remote_code=args.trust_remote_code)
    # Prompts are read before the weights: their mistakes show at once.
    options = source.options(args)
    strings_are_turns = _strings_are_turns(source, options, args)
    prompts = on_main(lambda: _read(args, strings_are_turns=strings_are_turns))
    return prompts, _complete(source, options, prompts, settings, device)


def _strings_are_turns(source: "ModelSource", options: "ModelOptions", args: argparse.Namespace) -> bool:
    """Whether a string prompt is the user's turn. Raises ValueError for options without effect."""
    from notus.model.export import load_tokenizer

    if args.raw and (args.chat_template or args.add_empty_system):
        raise ValueError("--raw uses no chat template: leave --chat-template and --add-empty-system out")
    found = options.strings_are_turns(load_tokenizer(source.folder, options.trust_remote_code))
    if args.raw is False and not found:
        raise ValueError(f"--no-raw has no effect: {source.name} has no chat template; name one with --chat-template")
    return found


def _complete(
    source: "ModelSource",
    options: "ModelOptions",
    prompts: "Sequence[Prompt]",
    settings: "Decoding",
    device: "torch.device",
    kept: Path | None = None,
) -> list[str]:
    from notus.evaluation.decoding import KeptTokens, generate, model_digest
    from notus.runtime.distributed import on_main

    causal_lm, tokenizer = source.load(options, device)
    return generate(
        causal_lm,
        options.chat.encoder(tokenizer),
        prompts,
        settings,
        kept=KeptTokens(kept, on_main(lambda: model_digest(causal_lm))) if kept else None,
    )


def _read(args: argparse.Namespace, *, strings_are_turns: bool) -> list["Prompt"]:
    """Read the prompts and log how they are taken; for rank 0."""
    from notus.evaluation.prompts import read_prompts

    prompts = read_prompts(Path(args.prompts), strings_are_turns=strings_are_turns, system=args.system)
    chats = [prompt for prompt in prompts if not isinstance(prompt.turns, str)]
    _check_raw(args, prompts)
    if args.system is not None and not chats:
        raise ValueError(
            "--system has no effect: the prompts are strings, and the model has no chat format or learned plain text "
            "only; add --chat-template or --no-raw"
        )
    plain = len(prompts) - len(chats)
    print(f"{len(prompts)} prompts: {len(chats)} conversations, {plain} plain texts", flush=True)
    return prompts


def _check_raw(args: argparse.Namespace, prompts: "Sequence[Prompt]") -> None:
    chat = next((prompt for prompt in prompts if not isinstance(prompt.turns, str)), None)
    if args.raw and chat is not None:
        raise ValueError(f"{chat.place}: holds messages, which --raw does not take: leave --raw out")


def _write(path: Path, prompts: list["Prompt"], completions: list[str], num_samples: int) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            samples = completions[number * num_samples : (number + 1) * num_samples]
            result = {"completion": samples[0]} if num_samples == 1 else {"completions": samples}
            file.write(json.dumps({**prompt.row, **result}, ensure_ascii=False) + "\n")


def add_engine_argument(parser: argparse.ArgumentParser) -> None:
    """Declare what computes the completions of a local model."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="batched: completions of --batch-size at a time, until the longest ends; continuous: transformers' "
        "continuous batching, where the next takes the place of one that ends. Both compute a prompt once for all its "
        "completions, and both draw from --seed, but not the same (default: batched)",
    )


def add_answer_arguments(
    parser: argparse.ArgumentParser, what: str = "answer", max_new_tokens: int = 2048, heat: str = "0"
) -> None:
    """Declare how completions are generated; see `answer_settings`. `heat` says the default temperature."""
    parser.add_argument("--max-new-tokens", type=count, help=f"of one {what} (default: {max_new_tokens})")
    parser.add_argument("--temperature", type=temperature, help=f"0 is greedy (default: {heat})")
    parser.add_argument("--top-p", type=share, help="draw from the likeliest tokens with this share of the probability")
    parser.add_argument("--seed", type=int, help="of the draws (default: 42)")
    parser.add_argument("--batch-size", type=count, help=f"{what}s at a time (default: 32)")
    parser.add_argument(
        "--raw",
        action=argparse.BooleanOptionalAction,
        help="take string prompts as plain text, without a chat template; --no-raw: as the user's turn (default: plain "
        "text if the model has no chat template or learned plain text only)",
    )


def answer_settings(args: argparse.Namespace, what: str = "answers", max_new_tokens: int = 2048) -> "Decoding":
    """Return how `args` let the model complete prompts. Raises ValueError for options without effect."""
    top_k = getattr(args, "top_k", None)  # suites have no such option
    for option, value in (("--top-p", args.top_p), ("--top-k", top_k), ("--seed", args.seed)):
        if not args.temperature and value is not None:
            raise ValueError(f"{option} has no effect on greedy {what}: set --temperature as well")
    from notus.evaluation.decoding import Decoding

    return Decoding(
        max_new_tokens=args.max_new_tokens or max_new_tokens,
        temperature=args.temperature or 0.0,
        top_p=args.top_p or 1.0,
        top_k=top_k or 0,
        seed=42 if args.seed is None else args.seed,
        batch_size=args.batch_size or 32,
    )


def answer(
    source: "ModelSource",
    prompts: "Sequence[Prompt]",
    args: argparse.Namespace,
    *,
    kept: Path,
    device: "torch.device",
) -> tuple[list[str], dict[str, Any]]:
    """Let a model answer each prompt of a suite; return the answers, and the settings that bear on them; collective.

    Prompts are messages that end before the answer; or strings, which are the user's turn if the model has a chat
    format and learned with it, else text to continue. Finished batches are saved in the folder `kept`, so the same call
    resumes where it stopped. Raises ValueError if the model cannot be loaded, or a prompt fills its context.
    """
    options, settings = source.options(args), answer_settings(args)
    _check_raw(args, prompts)
    as_turns = _strings_are_turns(source, options, args)
    prompts = [_as_turn(prompt) if as_turns else prompt for prompt in prompts]
    texts = _complete(source, options, prompts, settings, device, kept)
    described = {
        **dataclasses.asdict(settings),
        **options.chat.described(),
        "precision": options.precision,
        "as_turns": as_turns,
    }
    for option in ("top_k", "samples", "engine"):  # suites have no such options
        del described[option]
    return [text.strip() for text in texts], described


def _as_turn(prompt: "Prompt") -> "Prompt":
    if not isinstance(prompt.turns, str):
        return prompt
    return dataclasses.replace(prompt, turns=[{"role": "user", "content": prompt.turns}])
