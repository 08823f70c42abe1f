"""A judge that is a reward model: `notus rate --reward-model MODEL`.

MODEL is a folder or a hub id of an `AutoModelForSequenceClassification` with one label, whose logit is the reward. The
conversation, with the completion as its last turn, is rendered by the tokenizer's own chat template and tokenised as
`apply_chat_template(..., tokenize=True)` does it. The reward stands as it is: any finite number, on the model's scale.

Rows are padded on the right, which suits both heads there are: one that looks at the first token, and one that looks
for the last token that is not padding. The latter finds it by the config's `pad_token_id`. If the config names none,
padding is a token that does not occur in the batch, so the head looks at each row's own last token, as it does for a
row alone. A head that looks elsewhere is found out by a check on the first rows, and then computes row by row.

The head is computed in fp32, so that rewards are not rounded to the 8 bits of bf16. Nothing is cut: a completion that
does not fit the model's context makes its question fail. Out of scope: reward models that are no sequence
classification models, such as an AutoModel with code of its own.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from notus.data.chat import check_ids, check_vocabulary, resolve_template
from notus.feedback.judge import Judge, JudgeError, Question, Verdict
from notus.model.buffers import rebuild_attributes
from notus.model.export import load_tokenizer
from notus.model.load import check_dtypes, find_folder, resolve_model_folder, weight_files, weights_digest
from notus.model.make import read_config
from notus.model.new_tokens import vocabulary_rows
from notus.model.peft_format import ADAPTER_CONFIG
from notus.model.structure import text_config
from notus.model.supported import context_of
from notus.runtime.distributed import on_main, pick_device
from notus.runtime.process import first_line, tell
from notus.training.parallelize import COMPUTE_DTYPES

BATCH_SIZE = 32
_WINDOW = 8  # batches whose rows are sorted by length together
# Largest relative difference between rows alone and in a batch, by the dtype of the weights.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_KIND = "ForSequenceClassification"


def make_judge(args: argparse.Namespace) -> Judge:
    """Return the judge that `args.reward_model` names, on this rank's device; all ranks call this.

    Raises ValueError, naming the folder, for what is no reward model, or cannot be loaded.
    """
    folder = find_together(args.reward_model)
    dtype = COMPUTE_DTYPES[args.precision or "bf16"]
    model, tokenizer = load_reward_model(folder, dtype, pick_device(), trust_remote_code=args.trust_remote_code)
    identity = on_main(lambda: _identity(folder, model.config, args.chat_template, dtype))
    return RewardJudge(
        args.reward_model,
        identity,
        model,
        tokenizer,
        chat_template=args.chat_template,
        batch_size=args.batch_size or BATCH_SIZE,
    )


def find_together(name: str) -> Path:
    """Find a folder, or a hub id's copy, which rank 0 downloads first. Raises ValueError if there is none."""
    folder = on_main(lambda: find_folder(name))
    return folder if folder.is_dir() else find_folder(name)  # each machine has its own copies of the hub's


def load_reward_model(
    folder: Path, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classification model with one label, and its tokenizer; the model is in evaluation mode.

    Raises ValueError, naming the folder, for a model of another kind, with several labels, or without the weights of
    its head, for which transformers would draw random ones.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder}: an adapter; merge it into its base, with the head, and name the merged model")
    folder = resolve_model_folder(folder)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    _check_kind(folder, config, trust_remote_code)
    model = _load(folder, config, dtype, trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    check_vocabulary(tokenizer, text_config(config).vocab_size)
    _compute_head_in_fp32(model)
    nn.Module.to(model, device)
    return model.eval(), tokenizer


def _check_kind(folder: Path, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Raise ValueError for a config of another kind of model, or of several labels."""
    named = (config.architectures or ["no architecture"])[0]
    has_own_code = trust_remote_code and AutoModelForSequenceClassification.__name__ in (
        getattr(config, "auto_map", None) or {}
    )
    if not named.endswith(_KIND) and not has_own_code:
        raise ValueError(
            f"{folder / 'config.json'}: a {named}, which has no score head; --reward-model takes a sequence "
            "classification model, and --local-judge a model that writes its ratings"
        )
    if type(config) not in AutoModelForSequenceClassification._model_mapping and not has_own_code:
        raise ValueError(f"{folder}: transformers has no sequence classification model of type {config.model_type!r}")
    if config.num_labels != 1:
        labels = ", ".join(map(str, (config.id2label or {}).values()))
        raise ValueError(
            f"{folder / 'config.json'}: the model has {config.num_labels} labels ({labels}), but a reward model has "
            "one; take a model whose single logit is the reward, or call this one from a --judge-function"
        )


def _load(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    weight_files(folder)  # refuses what is no safetensors, and an index that leads out of the folder
    disable_progress_bar()
    config.use_cache = False
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot be loaded as a reward model ({first_line(error)})") from error
    model, report = loaded
    if absent := sorted(report["missing_keys"]):  # transformers makes up values for these, with a warning
        raise ValueError(
            f"{folder}: the weights lack {absent[0]}, and with random values in its place the rewards would mean "
            "nothing; save the reward model with its head"
        )
    # A language model's head may have been left in the file; any other tensor would change what is computed.
    if more := sorted(name for name in report["unexpected_keys"] if not name.startswith("lm_head.")):
        raise ValueError(
            f"{folder}: the weights hold {more[0]}, for which {type(model).__name__} has no place; the rewards would "
            "be computed without it"
        )
    if getattr(model, "hf_quantizer", None) is None:
        check_dtypes(model, folder)
    rebuild_attributes(model, "cpu")
    found: PreTrainedModel = model
    return found


def _compute_head_in_fp32(model: PreTrainedModel) -> None:
    """Turn what stands beside the base model, the head, to fp32, and what it is given as well."""
    for name, module in model.named_children():
        if name != model.base_model_prefix and any(True for _ in module.parameters()):
            module.float()
            module.register_forward_pre_hook(_to_fp32)


def _to_fp32(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in given)


def _identity(folder: Path, config: PreTrainedConfig, chat_template: str | None, dtype: torch.dtype) -> str:
    """A digest of all that decides rewards: the weights, the tokenizer, the template and the precision."""
    parts: list[Any] = [weights_digest(folder), text_config(config).pad_token_id, config.pad_token_id, str(dtype)]
    files = sorted(path for path in folder.iterdir() if path.suffix in _TOKENIZER_FILES and path.name != "config.json")
    parts += [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    if chat_template is not None:
        path = Path(chat_template)
        parts.append(path.read_text(encoding="utf-8") if path.is_file() else chat_template)
    return "reward model\n" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class RewardJudge:
    """Scores completions with a sequence classification model of one label."""

    shared = True

    def __init__(
        self,
        name: str,
        identity: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """`model` and `tokenizer` are as `load_reward_model` returns them; `batch_size` counts completions.

        Raises ValueError for a tokenizer without a chat template, unless `chat_template` names one.
        """
        if chat_template is None and not tokenizer.chat_template:
            raise ValueError(
                f"{name}: the tokenizer has no chat template, so nothing says how the model was shown conversations; "
                "name the template with --chat-template FILE.jinja"
            )
        self.name, self.identity = name, identity
        self._model, self._tokenizer = model, tokenizer
        self._templates = {
            with_tools: resolve_template(tokenizer, chat_template, with_tools=with_tools)
            for with_tools in (False, True)
        }
        self._batch_size = batch_size
        self._context = context_of(model.config)
        self._vocabulary = vocabulary_rows(model)
        self._pads = text_config(model.config).pad_token_id is not None
        self._checked = False  # whether rows in a batch were found to get the rewards of rows alone

    def rate(self, questions: Sequence[Question], done: Callable[[Question, Verdict | JudgeError], None]) -> None:
        """Score the completions of all questions, several questions together; see `Judge`."""
        for window in self._windows(questions, done):
            scores = iter(self._scores([ids for _, encoded in window for ids in encoded]))
            for question, encoded in window:
                done(question, _verdict(question, [next(scores) for _ in encoded]))

    def _windows(
        self, questions: Sequence[Question], done: Callable[[Question, Verdict | JudgeError], None]
    ) -> Iterator[list[tuple[Question, list[list[int]]]]]:
        """Yield questions with the token ids of their completions, some batches together; those that fail are done."""
        window: list[tuple[Question, list[list[int]]]] = []
        rows = 0
        for question in questions:
            try:
                window.append((question, self._encoded(question)))
            except JudgeError as error:
                done(question, error)
                continue
            rows += len(question.completions)
            if rows >= _WINDOW * self._batch_size:
                yield window
                window, rows = [], 0
        if window:
            yield window

    def _encoded(self, question: Question) -> list[list[int]]:
        """The token ids of the conversation with each completion. Raises JudgeError for one that cannot be scored."""
        found = []
        for number, completion in enumerate(question.completions, start=1):
            place = f"{question.place}: completion {number}"
            ids = self._ids(question, completion, place)
            if len(ids) > self._context:
                raise JudgeError(
                    f"{place} with its prompt has {len(ids)} tokens, and the reward model's context is {self._context}"
                )
            try:
                check_ids(self._tokenizer, place, max(ids), self._vocabulary)
            except ValueError as error:
                raise JudgeError(str(error)) from error
            found.append(ids)
        return found

    def _ids(self, question: Question, completion: str, place: str) -> list[int]:
        turns = list(question.messages) or [{"role": "user", "content": question.prompt}]
        messages = [*turns, {"role": "assistant", "content": completion}]
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(turn) for turn in messages],
                tools=list(question.tools) if question.tools else None,
                chat_template=self._templates[bool(question.tools)],
                tokenize=False,
                **question.template_kwargs,
            )
        except Exception as error:  # besides Jinja's own, a template's expressions raise whatever Python's do
            raise JudgeError(f"{place}: the reward model's chat template refuses it ({first_line(error)})") from error
        if completion.strip() not in str(text):
            raise JudgeError(f"{place}: the reward model's chat template leaves out a part of it")
        ids = self._tokenizer(str(text), add_special_tokens=False)["input_ids"]
        if not ids:
            raise JudgeError(f"{place}: the reward model's chat template makes no text of it")
        return list(ids)

    @torch.inference_mode()
    def _scores(self, rows: list[list[int]]) -> list[float]:
        """The reward of each row of token ids."""
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        if not self._checked:
            self._check_batches(rows, order)
        scores: dict[int, float] = {}
        for start in range(0, len(order), self._batch_size):
            numbers = order[start : start + self._batch_size]
            scores |= dict(zip(numbers, self._forward([rows[number] for number in numbers]), strict=True))
        return [scores[number] for number in range(len(rows))]

    def _forward(self, rows: list[list[int]]) -> list[float]:
        """The rewards of the rows of one batch, padded on the right."""
        config = text_config(self._model.config)
        if not self._pads:
            pad = _unused(rows) if len(rows) > 1 else None
            if pad is not None and pad >= self._vocabulary:  # every token occurs
                return [score for row in rows for score in self._forward([row])]
            config.pad_token_id = self._model.config.pad_token_id = pad
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), config.pad_token_id or 0)
        attention_mask = torch.zeros_like(input_ids)
        for number, ids in enumerate(rows):
            input_ids[number, : len(ids)] = torch.tensor(ids)
            attention_mask[number, : len(ids)] = 1
        device = self._model.device
        logits = self._model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)).logits
        if logits.shape != (len(rows), 1):
            raise ValueError(f"{self.name}: the model gives logits {list(logits.shape)} for {len(rows)} conversations")
        found: list[float] = logits[:, 0].float().tolist()
        return found

    def _check_batches(self, rows: list[list[int]], order: list[int]) -> None:
        """Compute row by row from now on, if rows of different lengths get other rewards together than alone."""
        longest, shortest = rows[order[0]], rows[order[-1]]
        if self._batch_size == 1 or len(longest) == len(shortest):
            return
        self._checked = True
        together = self._forward([longest, shortest])
        alone = [*self._forward([longest]), *self._forward([shortest])]
        tolerance = _TOLERANCE[self._model.dtype]
        if all(math.isclose(*pair, rel_tol=tolerance, abs_tol=tolerance) for pair in zip(together, alone, strict=True)):
            return
        tell(
            f"note: {self.name} scores padded rows differently ({together[1]:g} instead of {alone[1]:g}), so each "
            "completion is computed by itself"
        )
        self._batch_size = 1


def _unused(rows: list[list[int]]) -> int:
    """The smallest token id that stands in no row."""
    used = {token for ids in rows for token in ids}
    return next(token for token in range(len(used) + 1) if token not in used)


def _verdict(question: Question, rewards: list[float]) -> Verdict | JudgeError:
    for number, reward in enumerate(rewards, start=1):
        if not math.isfinite(reward):
            return JudgeError(f"{question.place}: the reward of completion {number} is {reward}")
    return Verdict([{} for _ in rewards], rewards)
