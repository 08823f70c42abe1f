"""Completions from a local model, adapter or run; under torchrun the ranks share the work."""

import argparse
import dataclasses
import datetime
import functools
import gc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from notus.evaluation.decoding import Completion, Decoding, KeptTokens, encode_prompt, generate_completions
from notus.evaluation.prompts import Prompt
from notus.evaluation.resolve_model import ModelOptions, ModelSource, find_together
from notus.feedback.endpoint_sampling import Sampled
from notus.feedback.sampled_models import SampledModel
from notus.model.export import load_tokenizer
from notus.model.make import read_config
from notus.model.supported import context_of
from notus.runtime.distributed import is_main, on_main
from notus.runtime.files import write_text
from notus.training.model_folders import resolve_model, starting_digest

GENERATION_CONFIG = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class LocalModel:
    """A local model, and how it is computed and prompted."""

    name: str  # in the records; of an unfinished run with the step, as "dpo (step 100)"
    source: ModelSource
    options: ModelOptions
    as_turns: bool  # a string prompt is the user's turn
    dated: bool  # its chat template writes --template-date, or the day on which the sampling began

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides its completions, beside the prompts and how they are drawn; read on rank 0, collective."""
        return on_main(self._identity)

    def _identity(self) -> dict[str, Any]:
        folder, trust = self.source.folder, self.options.trust_remote_code
        tokens = self.options.chat.encoder(load_tokenizer(folder, trust)).digest()
        ends = folder / GENERATION_CONFIG  # names the tokens that end a completion
        tokens += hashlib.sha256(ends.read_bytes()).hexdigest() if ends.is_file() else ""
        return {
            "name": self.name,
            "weights": starting_digest(resolve_model(str(folder))),
            "tokens": hashlib.sha256(tokens.encode()).hexdigest(),
            "precision": self.options.precision,
            **self.options.chat.described(),
            "as_turns": self.as_turns,
        }


def find_local(model: SampledModel, args: argparse.Namespace, began: str) -> LocalModel:
    """Find a local model and how it is prompted; collective.

    `began` is --template-date, else the day (YYYY-MM-DD) on which the sampling began. Templates that write today's date
    get it, so that what is resumed after midnight is prompted as before; but where a run or an export has set another,
    only --template-date replaces that.

    Raises ValueError as `find_together`, and for options without effect on it.
    """
    source = find_together(model.model, trust_remote_code=args.trust_remote_code)
    options = source.options(args)
    if args.split_special_tokens:
        options = dataclasses.replace(options, chat=dataclasses.replace(options.chat, split_special_tokens=True))
    tokenizer = load_tokenizer(source.folder, options.trust_remote_code)
    as_turns = options.strings_are_turns(tokenizer)
    if args.raw is False and not as_turns:
        raise ValueError(f"--no-raw has no effect on {model.name}: it has no chat template; name one (--chat-template)")
    encoder = options.chat.encoder(tokenizer)
    today = options.chat.template_date is None and encoder.date == datetime.date.today()
    dated = encoder.writes_date and (today or args.template_date is not None)
    if dated:
        options = dataclasses.replace(options, chat=dataclasses.replace(options.chat, template_date=began))
    return LocalModel(model.name + source.name.removeprefix(model.model), source, options, as_turns, dated)


def check_prompts(model: LocalModel, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError, naming model and line, for a prompt that the model cannot complete; without its weights."""
    folder, trust = model.source.folder, model.options.trust_remote_code
    encoder = model.options.chat.encoder(load_tokenizer(folder, trust))
    context = context_of(read_config(resolve_model(str(folder)).base, trust_remote_code=trust))
    try:
        for prompt in prompts:
            encode_prompt(encoder, prompt, context)
    except ValueError as error:
        raise ValueError(f"{model.name}: {error}") from error


def sample_local(
    model: LocalModel, prompts: Sequence[Prompt], decoding: Decoding, folder: Path, device: torch.device
) -> Sampled:
    """Let a model complete each prompt `decoding.samples` times; collective.

    Finished batches are saved in `folder`, and in the end the whole result, so that the same call resumes without
    loading the model again. Raises ValueError as `generate_completions`.
    """
    whole = folder / "whole.json"
    found = on_main(lambda: _read(whole) if whole.is_file() else None)
    if found is not None:
        return found
    causal_lm, tokenizer = model.source.load(model.options, device)
    kept = KeptTokens(folder, model.identity["weights"])
    generated = generate_completions(causal_lm, model.options.chat.encoder(tokenizer), prompts, decoding, kept=kept)
    completions = [
        [_completion(model.name, each, decoding, sample) for sample, each in enumerate(of_prompt)]
        for of_prompt in generated.completions
    ]
    sampled = Sampled(completions, seconds=generated.seconds, new_tokens=generated.tokens)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(whole, json.dumps(dataclasses.asdict(sampled)))
    return sampled


def free_memory(device: torch.device) -> None:
    """Free what a model took that nobody refers to any more, but for cycles of references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _completion(name: str, completion: Completion, decoding: Decoding, sample: int) -> dict[str, Any]:
    """Return a completion as records have it."""
    settings: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}
    if decoding.temperature:
        settings |= {"top_p": decoding.top_p, "top_k": decoding.top_k, "seed": decoding.seed}
    return {
        "model": name,
        "response": completion.text,
        "settings": {**settings, "sample": sample},
        "finish_reason": completion.finish_reason,
        "tokens": completion.tokens,
    }


def _read(path: Path) -> Sampled:
    try:
        return Sampled(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not what a finished model left ({error}); remove the file") from error
