"""One answer of a model to each prompt of a suite: kept as it is done; the ranks share the work."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.arguments import count, share, temperature

if TYPE_CHECKING:
    import torch

    from notus.data.formats import Turns
    from notus.evaluation.models import ModelSource

DEFAULTS = {"max_new_tokens": 2048, "temperature": 0.0, "top_p": 1.0, "seed": 42, "batch_size": 32}


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """How answers are generated; None stands for `DEFAULTS`."""
    parser.add_argument("--max-new-tokens", type=count, help="of an answer (default: 2048)")
    parser.add_argument("--temperature", type=temperature, help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=share, help="draw from the likeliest tokens with this share of the probability")
    parser.add_argument("--seed", type=int, help="of the draws (default: 42)")
    parser.add_argument("--batch-size", type=count, help="answers at a time (default: 32)")


def answer_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `generate` that `args` give. Raises ValueError for one without effect."""
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    settings = {**DEFAULTS, **given}
    if settings["temperature"] == 0:
        for name in ("top_p", "seed"):
            if name in given:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} has no effect on greedy answers: set --temperature as well")
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
    """Let a model answer each prompt. A string is the user's turn if it has a chat format, else a text to go on from.

    Args:
        source: the model.
        prompts: what to answer: strings, or messages that end before the answer.
        places: what errors call each prompt.
        args: as `add_model_arguments` and `add_answer_arguments` declare them.
        kept: a folder for finished batches; the same call goes on where it stopped. A collective.
        device: this rank's.

    Raises:
        ValueError: the model cannot be loaded, or a prompt fills its context.
    """
    from notus.data.chat import check_vocabulary
    from notus.evaluation.generation import generate_kept, model_digest
    from notus.model.export import load_causal_lm, load_tokenizer
    from notus.runtime.distributed import on_main
    from notus.training.parallelize import COMPUTE_DTYPES

    trust = args.trust_remote_code
    tokenizer = load_tokenizer(source.folder, trust)
    prompting = {
        "chat_template": source.choose(args.chat_template, "data.chat_template", None),
        "add_empty_system": source.choose(args.add_empty_system, "data.add_empty_system", False),
    }
    as_turns = bool(prompting["chat_template"] or tokenizer.chat_template)
    precision = source.choose(args.precision, "training.precision", "bf16")
    causal_lm, _ = load_causal_lm(
        source.folder, dtype=COMPUTE_DTYPES[precision], device=device, trust_remote_code=trust
    )
    check_vocabulary(tokenizer, causal_lm.config.vocab_size)
    texts = generate_kept(
        causal_lm,
        tokenizer,
        [[{"role": "user", "content": each}] if as_turns and isinstance(each, str) else each for each in prompts],
        places=places,
        kept=kept,
        identity=on_main(lambda: model_digest(causal_lm)),
        **answer_settings(args),
        **prompting,
    )
    settings = {**answer_settings(args), **prompting, "precision": precision, "as_turns": as_turns}
    return Answers([text.strip() for text in texts], settings)
