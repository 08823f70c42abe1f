"""A model's answers to both turns of every question, each turn kept batch by batch."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notus.data.chat import ChatEncoder
from notus.data.formats import Message
from notus.evaluation.files import replacing
from notus.evaluation.generation import generate_kept, model_digest
from notus.evaluation.mt_bench.inputs import Answer, Question

# FastChat's temperature_config, by category, and what it takes for others.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
OTHER_TEMPERATURE = 0.7


def generate_answers(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    model: str,
    kept: Path,
    temperature: float | None,
    **options: Any,
) -> tuple[list[Answer], int]:
    """Answer both turns; the second turn's conversation holds the first answer. A collective, as `generate_kept`.

    Args:
        causal_lm, tokenizer: as `generate` has them.
        questions: what to answer.
        model: its name in the answers.
        kept: a folder in which finished batches are kept.
        temperature: for all; None: FastChat's, by category.
        options: of `generate`: max_new_tokens, seed, batch_size, chat_template, add_empty_system.

    Returns:
        The answers, without white space around them; and how many are empty because the conversation had filled the
        model's context.

    Raises:
        ValueError: a first turn that is empty or that the chat template refuses.
    """
    identity = model_digest(causal_lm)
    talks: list[list[Message]] = [[] for _ in questions]
    cut_off = 0
    for turn in (0, 1):
        asked = [index for index, question in enumerate(questions) if len(question.turns) > turn]
        for index in asked:
            talks[index].append({"role": "user", "content": questions[index].turns[turn]})
        answerable = _that_fit(causal_lm, tokenizer, talks, asked, options)
        cut_off += len(asked) - len(answerable)
        texts = dict.fromkeys(asked, "")
        for degree, indices in _by_temperature(questions, answerable, temperature).items():
            completions = generate_kept(
                causal_lm,
                tokenizer,
                [talks[index] for index in indices],
                places=[questions[index].place for index in indices],
                kept=kept,
                identity=identity,
                temperature=degree,
                **options,
            )
            texts.update(zip(indices, completions, strict=True))
        for index in asked:
            talks[index].append({"role": "assistant", "content": texts[index].strip()})
    pairs = zip(questions, talks, strict=True)
    return [Answer(question.id, model, [said["content"] for said in talk[1::2]]) for question, talk in pairs], cut_off


def _that_fit(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    talks: Sequence[list[Message]],
    asked: Sequence[int],
    options: Mapping[str, Any],
) -> list[int]:
    """Those of `asked` that leave room for an answer: a long first answer must not end the whole."""
    context = getattr(causal_lm.config, "max_position_embeddings", None)
    if context is None:
        return list(asked)
    template, system = options["chat_template"], options["add_empty_system"]
    encoder = ChatEncoder(tokenizer, chat_template=template, add_empty_system=system)
    return [index for index in asked if len(encoder.encode_prompt(talks[index])) < context]


def _by_temperature(
    questions: Sequence[Question], indices: Iterable[int], temperature: float | None
) -> dict[float, list[int]]:
    groups: dict[float, list[int]] = {}
    for index in indices:
        usual = TEMPERATURES.get(questions[index].category, OTHER_TEMPERATURE)
        groups.setdefault(usual if temperature is None else temperature, []).append(index)
    return groups


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write answers in FastChat's format, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for answer in answers:
            said = json.dumps([answer.model, answer.question_id, list(answer.turns)])
            line = {
                "question_id": answer.question_id,
                "answer_id": hashlib.sha256(said.encode()).hexdigest()[:22],
                "model_id": answer.model,
                "choices": [{"index": 0, "turns": list(answer.turns)}],
                "tstamp": time.time(),
            }
            file.write(json.dumps(line) + "\n")
