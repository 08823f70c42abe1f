"""`python -m notus generate`: complete the prompts of a file to JSON lines; and `answer`, which suites use for theirs.

A string prompt is the user's turn if the model has a chat format: its tokenizer brings a template, or --chat-template
or the run's config names one. Otherwise, or with --raw, it is plain text to continue. Message lists are always rendered
as in training.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.arguments import add_model_arguments, count, share, temperature
from notus.evaluation.results import check_output
from notus.runtime.files import replacing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from notus.data.chat import Turns
    from notus.evaluation.models import ModelSource
    from notus.evaluation.prompts import Prompt

DEFAULT_SEED = 42
ANSWER_DEFAULTS = {"max_new_tokens": 2048, "temperature": 0.0, "top_p": 1.0, "seed": DEFAULT_SEED, "batch_size": 32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_model_arguments(parser)
    parser.add_argument(
        "prompts",
        metavar="PROMPTS",
        help="a .jsonl or .json file of objects with prompt, messages, conversations or instruction; or a "
        ".txt file, one prompt a line",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help="a .jsonl file: each object with its completion, there when complete; it must not exist, or be empty",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it exists, once the result is complete"
    )
    parser.add_argument("--max-new-tokens", type=count, default=512, help="of a completion (default: 512)")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=share, help="draw from the likeliest tokens with this share of the probability")
    parser.add_argument("--top-k", type=count, help="draw from the k likeliest tokens")
    parser.add_argument("--num-samples", type=count, default=1, help="completions per prompt (default: 1)")
    parser.add_argument("--seed", type=int, help=f"of the draws (default: {DEFAULT_SEED})")
    parser.add_argument("--batch-size", type=count, default=32, help="completions at a time (default: 32)")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--system", metavar="TEXT", help="a system turn for conversations without one")
    begin.add_argument("--raw", action="store_true", help="take prompts as plain text, without a chat template")


def run(args: argparse.Namespace) -> int:
    """Generate as `args` say, return 0; under torchrun the ranks share the work.

    Raises ValueError or OSError with a message for the user.
    """
    _check_sampled(args, args.temperature, ("top_p", "top_k", "seed"), "completions")
    if args.temperature == 0 and args.num_samples > 1:
        raise ValueError("--num-samples above 1 would repeat a greedy completion: set --temperature")
    if args.raw and (args.chat_template or args.add_empty_system):
        raise ValueError("--raw uses no chat template: leave --chat-template and --add-empty-system out")
    from notus.runtime import distributed

    with distributed.process_group() as device:
        distributed.on_main(lambda: _check_out(Path(args.out), args))
        prompts, completions = _generate(args, device)
        distributed.on_main(lambda: _write(Path(args.out), prompts, completions, args.num_samples))
        distributed.say(f"wrote {len(completions)} completions of {len(prompts)} prompts to {args.out}")
    return 0


def _check_sampled(args: argparse.Namespace, degree: float, names: Sequence[str], what: str) -> None:
    """Raise ValueError for options that have no effect without sampling."""
    for name in names:
        if degree == 0 and getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} has no effect on greedy {what}: set --temperature as well")


def _check_out(path: Path, args: argparse.Namespace) -> None:
    """Check before the work that OUT may be written; an empty file is nobody's loss."""
    check_output(path, not_over=args.prompts)
    if path.exists() and path.stat().st_size and not args.overwrite:
        raise ValueError(f"{path}: exists already; name another file, or replace it with --overwrite")


def _generate(args: argparse.Namespace, device: "torch.device") -> tuple[list["Prompt"], list[str]]:
    """Return the prompts, and num_samples completions of each, one after the other."""
    from notus.evaluation.generation import generate
    from notus.evaluation.models import find_together
    from notus.model.export import load_tokenizer
    from notus.runtime.distributed import on_main

    source = find_together(args.model, trust_remote_code=args.trust_remote_code)
    chat_template, add_empty_system = _prompting(args, source)
    # Prompts are read before the model: their mistakes show at once.
    tokenizer = load_tokenizer(source.folder, args.trust_remote_code)
    prompts = on_main(lambda: _read(args, has_chat_format=bool(chat_template or tokenizer.chat_template)))
    repeated = [prompt for prompt in prompts for _ in range(args.num_samples)]
    completions = generate(
        _load_model(args, source, tokenizer, device),
        tokenizer,
        [prompt.turns for prompt in repeated],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=1.0 if args.top_p is None else args.top_p,
        top_k=args.top_k or 0,
        seed=DEFAULT_SEED if args.seed is None else args.seed,
        batch_size=args.batch_size,
        chat_template=chat_template,
        add_empty_system=add_empty_system,
        places=[prompt.place for prompt in repeated],
    )
    return prompts, completions


def _prompting(args: argparse.Namespace, source: "ModelSource") -> tuple[str | None, bool]:
    """The chat template and whether an empty system turn is added: as the user says, else as the run had it."""
    return (
        source.choose(args.chat_template, "data.chat_template", None),
        source.choose(args.add_empty_system, "data.add_empty_system", False),
    )


def _precision(args: argparse.Namespace, source: "ModelSource") -> str:
    return str(source.choose(args.precision, "training.precision", "bf16"))


def _load_model(
    args: argparse.Namespace, source: "ModelSource", tokenizer: "PreTrainedTokenizerBase", device: "torch.device"
) -> "PreTrainedModel":
    from notus.data.chat import check_vocabulary
    from notus.model.export import load_causal_lm
    from notus.training.parallelize import COMPUTE_DTYPES

    dtype = COMPUTE_DTYPES[_precision(args, source)]
    causal_lm, _ = load_causal_lm(source.folder, dtype=dtype, device=device, trust_remote_code=args.trust_remote_code)
    check_vocabulary(tokenizer, causal_lm.config.vocab_size)
    return causal_lm


def _read(args: argparse.Namespace, *, has_chat_format: bool) -> list["Prompt"]:
    """Read the prompts and log how they are taken; for rank 0."""
    from notus.evaluation.prompts import read_prompts

    strings_are_turns = has_chat_format and not args.raw
    prompts = read_prompts(Path(args.prompts), strings_are_turns=strings_are_turns, system=args.system)
    chats = [prompt for prompt in prompts if not isinstance(prompt.turns, str)]
    if args.raw and chats:
        raise ValueError(f"{chats[0].place}: holds messages, which --raw does not take: leave --raw out")
    if args.system is not None and not chats:
        raise ValueError(
            "--system has no effect: the prompts are strings and the model has no chat format; add --chat-template"
        )
    plain = len(prompts) - len(chats)
    print(f"{len(prompts)} prompts: {len(chats)} conversations, {plain} plain texts", flush=True)
    return prompts


def _write(path: Path, prompts: list["Prompt"], completions: list[str], num_samples: int) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            samples = completions[number * num_samples : (number + 1) * num_samples]
            result = {"completion": samples[0]} if num_samples == 1 else {"completions": samples}
            file.write(json.dumps({**prompt.row, **result}, ensure_ascii=False) + "\n")


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how a suite's answers are generated; None stands for `ANSWER_DEFAULTS`."""
    parser.add_argument("--max-new-tokens", type=count, help="of an answer (default: 2048)")
    parser.add_argument("--temperature", type=temperature, help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=share, help="draw from the likeliest tokens with this share of the probability")
    parser.add_argument("--seed", type=int, help="of the draws (default: 42)")
    parser.add_argument("--batch-size", type=count, help="answers at a time (default: 32)")


def answer_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `generate` that `args` give. Raises ValueError for one without effect."""
    given = {name: getattr(args, name) for name in ANSWER_DEFAULTS if getattr(args, name) is not None}
    settings = {**ANSWER_DEFAULTS, **given}
    _check_sampled(args, settings["temperature"], ("top_p", "seed"), "answers")
    return settings


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        texts: by prompt, without the white space around them.
        settings: how they came about: precision, chat template and what else bears on them.
    """

    texts: list[str]
    settings: dict[str, Any]


def answer(
    source: "ModelSource",
    prompts: "Sequence[Turns]",
    places: Sequence[str],
    args: argparse.Namespace,
    *,
    kept: Path,
    device: "torch.device",
) -> Answers:
    """Let a model answer each prompt of a suite; collective.

    Args:
        source: the model.
        prompts: messages that end before the answer; or strings, which are the user's turn if the model has a chat
            format, else text to continue.
        places: what errors call each prompt.
        args: as `add_model_arguments` and `add_answer_arguments` declare them.
        kept: a folder for finished batches; the same call resumes where it stopped.
        device: this rank's.

    Raises:
        ValueError: the model cannot be loaded, or a prompt fills its context.
    """
    from notus.evaluation.generation import KeptTokens, generate, model_digest
    from notus.model.export import load_tokenizer
    from notus.runtime.distributed import on_main

    tokenizer = load_tokenizer(source.folder, args.trust_remote_code)
    chat_template, add_empty_system = _prompting(args, source)
    as_turns = bool(chat_template or tokenizer.chat_template)
    causal_lm = _load_model(args, source, tokenizer, device)
    settings = answer_settings(args)
    texts = generate(
        causal_lm,
        tokenizer,
        [[{"role": "user", "content": each}] if as_turns and isinstance(each, str) else each for each in prompts],
        max_new_tokens=settings["max_new_tokens"],
        temperature=settings["temperature"],
        top_p=settings["top_p"],
        seed=settings["seed"],
        batch_size=settings["batch_size"],
        chat_template=chat_template,
        add_empty_system=add_empty_system,
        places=places,
        kept=KeptTokens(kept, on_main(lambda: model_digest(causal_lm))),
    )
    described = {
        **settings,
        "chat_template": chat_template,
        "add_empty_system": add_empty_system,
        "precision": _precision(args, source),
        "as_turns": as_turns,
    }
    return Answers([text.strip() for text in texts], described)
