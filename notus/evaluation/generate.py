"""`python -m notus generate`: complete the prompts of a file, greedily or by sampling, to JSON lines.

A string prompt is the user's turn if the model has a chat format: its tokenizer brings a template, or
--chat-template or the run's config names one. Otherwise, or with --raw, it is a text to go on from. Message
lists are always rendered as in training.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from notus.evaluation.arguments import add_model_arguments, count, share, temperature
from notus.evaluation.files import check_output, replacing

if TYPE_CHECKING:
    import torch

    from notus.evaluation.prompts import Prompt

DEFAULT_SEED = 42


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
    _check_options(args)
    from notus.runtime import distributed

    with distributed.process_group() as device:
        distributed.on_main(lambda: _check_out(Path(args.out), args))
        prompts, completions = _generate(args, device)
        distributed.on_main(lambda: _write(Path(args.out), prompts, completions, args.num_samples))
        distributed.say(f"wrote {len(completions)} completions of {len(prompts)} prompts to {args.out}")
    return 0


def _check_out(path: Path, args: argparse.Namespace) -> None:
    """Before the work; an empty file is nobody's loss."""
    check_output(path, not_over=args.prompts)
    if path.exists() and path.stat().st_size and not args.overwrite:
        raise ValueError(f"{path}: exists already; name another file, or replace it with --overwrite")


def _check_options(args: argparse.Namespace) -> None:
    if args.temperature == 0:
        for option in ("top_p", "top_k", "seed"):
            if getattr(args, option) is not None:
                name = "--" + option.replace("_", "-")
                raise ValueError(f"{name} has no effect on greedy completions: set --temperature as well")
        if args.num_samples > 1:
            raise ValueError("--num-samples above 1 would repeat a greedy completion: set --temperature")
    if args.raw and (args.chat_template or args.add_empty_system):
        raise ValueError("--raw uses no chat template: leave --chat-template and --add-empty-system out")


def _generate(args: argparse.Namespace, device: "torch.device") -> tuple[list["Prompt"], list[str]]:
    """The prompts, and num_samples completions of each, one after the other."""
    from notus.data.chat import check_vocabulary
    from notus.evaluation.generation import generate
    from notus.evaluation.models import find_together
    from notus.model.export import load_causal_lm, load_tokenizer
    from notus.runtime.distributed import on_main
    from notus.training.parallelize import COMPUTE_DTYPES

    trust = args.trust_remote_code
    source = find_together(args.model, trust_remote_code=trust)
    chat_template = source.choose(args.chat_template, "data.chat_template", None)
    # Prompts are read before the model: their mistakes show at once.
    tokenizer = load_tokenizer(source.folder, trust)
    prompts = on_main(lambda: _read(args, has_chat_format=bool(chat_template or tokenizer.chat_template)))
    repeated = [prompt for prompt in prompts for _ in range(args.num_samples)]
    dtype = COMPUTE_DTYPES[source.choose(args.precision, "training.precision", "bf16")]
    causal_lm, _ = load_causal_lm(source.folder, dtype=dtype, device=device, trust_remote_code=trust)
    check_vocabulary(tokenizer, causal_lm.config.vocab_size)
    completions = generate(
        causal_lm,
        tokenizer,
        [prompt.turns for prompt in repeated],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=1.0 if args.top_p is None else args.top_p,
        top_k=args.top_k or 0,
        seed=DEFAULT_SEED if args.seed is None else args.seed,
        batch_size=args.batch_size,
        chat_template=chat_template,
        add_empty_system=source.choose(args.add_empty_system, "data.add_empty_system", False),
        places=[prompt.place for prompt in repeated],
    )
    return prompts, completions


def _read(args: argparse.Namespace, *, has_chat_format: bool) -> list["Prompt"]:
    """Read the prompts and say how they are taken; for rank 0."""
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
    texts = len(prompts) - len(chats)
    print(f"{len(prompts)} prompts: {len(chats)} conversations, {texts} plain texts", flush=True)
    return prompts


def _write(path: Path, prompts: list["Prompt"], completions: list[str], num_samples: int) -> None:
    with replacing(path) as file:
        for number, prompt in enumerate(prompts):
            samples = completions[number * num_samples : (number + 1) * num_samples]
            result = {"completion": samples[0]} if num_samples == 1 else {"completions": samples}
            file.write(json.dumps({**prompt.row, **result}, ensure_ascii=False) + "\n")
