"""Several completions of a prompt: what it saves to compute the prompt once.

    python benchmarks/sampling.py [--model FOLDER] [--prompts 4] [--prompt-tokens 300] [--samples 4]
                                  [--new-tokens 48] [--repeats 3] [--ways plain shared continuous]

Three ways complete the same prompts with the same model in one process:

    plain       transformers' `generate` on a left-padded batch with `samples` copies of each prompt
    shared      Notus's `--engine batched`: the prompt once, its cache repeated, then transformers' `generate`
    continuous  Notus's `--engine continuous`: transformers' continuous batching, which shares the prompt's pages

First, all complete greedily; the texts must be equal. Then they draw at temperature 1. The ways take turns, and each
round begins with another. A ratio compares tokens per second of the same round; the table has the medians. What counts
is the processor time of the process, which other work on the machine does not enter; on a GPU, read the wall clock.
Without --model, it is a made model of 15.6M parameters on random words. The prompts of a real one are parts of this
project's documentation, rendered by its chat template; their lengths spread by a quarter around --prompt-tokens.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

import common
from notus.data.chat import ChatEncoder
from notus.evaluation.decoding import Decoding, generate_completions
from notus.evaluation.prompts import Prompt
from notus.model.export import load_causal_lm

WAYS = ("plain", "shared", "continuous")


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one way took in one round."""

    tokens: int  # new ones
    wall: float  # seconds
    processor: float  # seconds of all threads


def make_prompts(tokenizer: Any, count: int, tokens: int, *, real: bool) -> list[Prompt]:
    """Return prompts of about `tokens` tokens: with a chat template around parts of the documentation, or words."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(int(0.75 * tokens), int(1.25 * tokens) + 1, size=count)
    if not real:
        words = [generator.integers(0, common.VOCABULARY - 3, size=length - 1) for length in lengths]
        texts = [" ".join(f"w{word}" for word in each) for each in words]
    else:
        docs = "\n".join(path.read_text() for path in sorted((common.ROOT / "docs").glob("*.md")))
        ids = tokenizer(docs[: 20 * tokens * count], add_special_tokens=False).input_ids
        starts = np.cumsum([0, *lengths])
        texts = [tokenizer.decode(ids[start : start + size]) for start, size in zip(starts, lengths, strict=False)]
    chat = real and tokenizer.chat_template is not None
    ask = "What does this say? Explain it in your own words.\n\n"
    turns = [[{"role": "user", "content": ask + text}] if chat else text for text in texts]
    return [Prompt(f"prompt {number}", each) for number, each in enumerate(turns, start=1)]


def complete(
    way: str, causal_lm: Any, encoder: ChatEncoder, prompts: Sequence[Prompt], decoding: Decoding
) -> tuple[list[str], Timing]:
    """Let one way complete the prompts; return the texts, of one prompt after the other, and what it took."""
    if way == "plain":
        prompts = [prompt for prompt in prompts for _ in range(decoding.samples)]
        decoding = dataclasses.replace(decoding, samples=1)
    if way == "continuous":
        decoding = dataclasses.replace(decoding, engine="continuous")
    began = time.process_time()
    found = generate_completions(causal_lm, encoder, prompts, decoding)
    timing = Timing(found.tokens, found.seconds, time.process_time() - began)
    return [completion.text for of_prompt in found.completions for completion in of_prompt], timing


def measure(
    ways: Sequence[str],
    causal_lm: Any,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    repeats: int,
) -> list[dict[str, Timing]]:
    """Check that greedy texts are equal, then draw in turns; one dict of timings per round."""
    greedy = dataclasses.replace(decoding, temperature=0.0)
    texts = {way: complete(way, causal_lm, encoder, prompts, greedy)[0] for way in ways}
    for way, found in texts.items():
        assert found == texts[ways[0]], f"{way} and {ways[0]} differ: {found} {texts[ways[0]]}"
    print("greedy texts are equal", flush=True)
    rounds: list[dict[str, Timing]] = []
    for number in range(repeats):
        order = [*ways[number % len(ways) :], *ways[: number % len(ways)]]
        seeded = dataclasses.replace(decoding, seed=number)
        rounds.append({way: complete(way, causal_lm, encoder, prompts, seeded)[1] for way in order})
        print(f"round {number + 1}: {rounds[-1]}", flush=True)
    return rounds


def report(ways: Sequence[str], rounds: Sequence[Mapping[str, Timing]]) -> str:
    """Return a table of medians: tokens per second of both clocks, and their ratios to the first way's."""
    clocks = ("processor", "wall")
    lines = [
        "| | tokens per processor second | times the first | tokens per second | times the first |",
        "|---|---|---|---|---|",
    ]
    for way in ways:
        cells = []
        for clock in clocks:
            rates = [found[way].tokens / getattr(found[way], clock) for found in rounds]
            firsts = [found[ways[0]].tokens / getattr(found[ways[0]], clock) for found in rounds]
            ratios = [rate / first for rate, first in zip(rates, firsts, strict=True)]
            spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if way != ways[0] else ""
            cells += [f"{statistics.median(rates):.1f}", f"{statistics.median(ratios):.2f}{spread}"]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; without it, a made model")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=16, help="completions at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = args.model or Path(name)
        if args.model is None:
            common.make_model(folder, seed=0)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
        causal_lm, tokenizer = load_causal_lm(folder, dtype=dtype, device=args.device)
    prompts = make_prompts(tokenizer, args.prompts, args.prompt_tokens, real=args.model is not None)
    decoding = Decoding(args.new_tokens, temperature=1.0, batch_size=args.batch_size, samples=args.samples)
    rounds = measure(args.ways, causal_lm, ChatEncoder(tokenizer), prompts, decoding, args.repeats)
    print(report(args.ways, rounds))
    print(f"{vars(args)}, {common.describe_machine()}")


if __name__ == "__main__":
    main()
