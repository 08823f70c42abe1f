"""A judge that is a local chat model: `notus rate --local-judge MODEL`.

MODEL is any causal language model, adapter or run with a chat template. It gets the instructions of `instructions.py`
as a user turn, answers greedily, several questions at a time, and its answer is read as that of an endpoint is. Under
torchrun every rank loads the model and rates its share of the questions.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from notus.data.chat import ChatEncoder, check_ids
from notus.evaluation.budget import Usage
from notus.evaluation.decoding import Completion, Decoding, encode_prompt, generate_completions
from notus.evaluation.prompts import Prompt
from notus.evaluation.resolve_model import ModelOptions, ModelSource, find_together
from notus.feedback.instructions import Instructions, read_instructions
from notus.feedback.judge import Judge, JudgeError, Question, Verdict
from notus.feedback.parse_ratings import parse_ratings
from notus.model.export import load_tokenizer
from notus.model.new_tokens import vocabulary_rows
from notus.model.supported import context_of
from notus.runtime.distributed import on_main, pick_device
from notus.training.model_folders import resolve_model, starting_digest

MAX_NEW_TOKENS, BATCH_SIZE = 2048, 8
SHOWN = 200  # characters of an answer in a message
_SOME_DAY = "2000-01-01"


def make_judge(args: argparse.Namespace) -> Judge:
    """Return the judge that `args.local_judge` names, on this rank's device; all ranks call this.

    Raises ValueError for a model that cannot be loaded or has no chat template, and for wrong instructions.
    """
    instructions = read_instructions(args.instructions, args.aspects)
    source = find_together(args.local_judge, trust_remote_code=args.trust_remote_code)
    options = source.options(argparse.Namespace(**{**vars(args), "add_empty_system": None}))
    if not options.strings_are_turns(load_tokenizer(source.folder, options.trust_remote_code)):
        raise ValueError(
            f"{source.name}: a judge is asked in a user turn, and this model has no chat template or learned plain "
            "text only; name a template with --chat-template, or take a chat model"
        )
    decoding = Decoding(max_new_tokens=args.max_new_tokens or MAX_NEW_TOKENS, batch_size=args.batch_size or BATCH_SIZE)
    identity = on_main(lambda: _identity(source, options, instructions, decoding))
    causal_lm, tokenizer = source.load(options, pick_device())
    return LocalJudge(source.name, identity, causal_lm, options.chat.encoder(tokenizer), instructions, decoding)


def _identity(source: ModelSource, options: ModelOptions, instructions: Instructions, decoding: Decoding) -> str:
    """A digest of all that decides what the judge answers; for rank 0, because it reads the weights.

    A template that writes today's date gets the same date here every day: else a judge would be another one tomorrow.
    """
    chat = dataclasses.replace(options.chat, template_date=options.chat.template_date or _SOME_DAY)
    parts: list[Any] = [
        starting_digest(resolve_model(str(source.folder))),
        chat.encoder(load_tokenizer(source.folder, options.trust_remote_code)).digest(),
        options.precision,
        decoding.max_new_tokens,
        instructions.digest,
    ]
    ends = source.folder / "generation_config.json"  # names the tokens that end an answer
    parts.append(hashlib.sha256(ends.read_bytes()).hexdigest() if ends.is_file() else None)
    return "local judge\n" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class LocalJudge:
    """Asks a causal language model that this process computes."""

    shared = True

    def __init__(
        self,
        name: str,
        identity: str,
        causal_lm: PreTrainedModel,
        encoder: ChatEncoder,
        instructions: Instructions,
        decoding: Decoding,
    ) -> None:
        """`causal_lm` is in evaluation mode, `encoder` has its tokenizer, `decoding` is greedy."""
        assert decoding.temperature == 0
        self.name, self.identity = name, identity
        self._causal_lm, self._encoder = causal_lm, encoder
        self._instructions, self._decoding = instructions, decoding

    def rate(self, questions: Sequence[Question], done: Callable[[Question, Verdict | JudgeError], None]) -> None:
        """Ask, a batch at a time, the longest questions first: memory runs out at once or not at all."""
        asked: list[tuple[Question, Prompt, int]] = []
        for question in sorted(questions, key=lambda each: -len(self._instructions.text(each))):
            prompt = Prompt(question.place, [{"role": "user", "content": self._instructions.text(question)}])
            try:
                tokens = self._count(prompt)
            except ValueError as error:
                done(question, JudgeError(f"{error} (it is what {self.name} is asked)"))
                continue
            asked.append((question, prompt, tokens))
            if len(asked) == self._decoding.batch_size:
                self._ask(asked, done)
                asked = []
        if asked:
            self._ask(asked, done)

    def _count(self, prompt: Prompt) -> int:
        """The tokens of a prompt. Raises ValueError, naming its place, for one that the model cannot be given."""
        ids = encode_prompt(self._encoder, prompt, context_of(self._causal_lm.config))
        check_ids(self._encoder.tokenizer, prompt.place, max(ids), vocabulary_rows(self._causal_lm))
        return len(ids)

    def _ask(
        self, asked: Sequence[tuple[Question, Prompt, int]], done: Callable[[Question, Verdict | JudgeError], None]
    ) -> None:
        prompts = [prompt for _, prompt, _ in asked]
        generated = generate_completions(self._causal_lm, self._encoder, prompts, self._decoding, alone=True)
        for (question, _, tokens), (answer,) in zip(asked, generated.completions, strict=True):
            done(question, self._read(question, answer, Usage(1, tokens, answer.tokens)))

    def _read(self, question: Question, answer: Completion, usage: Usage) -> Verdict | JudgeError:
        annotations = parse_ratings(answer.text, len(question.completions), self._instructions.aspects)
        if annotations is not None:
            return Verdict(annotations, usage=usage)
        cut = f", which was cut after {answer.tokens} tokens" if answer.finish_reason == "length" else ""
        return JudgeError(f"{question.place}: no rating in the answer{cut}: {answer.text[:SHOWN]!r}", usage)
