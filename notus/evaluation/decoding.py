"""Completions of many prompts: batched, left-padded, greedy or sampled, with transformers' own generation.

Prompts are tokenised by the encoder that training uses, so the model sees what it was trained on. Under torchrun the
ranks share the batches. Finished batches can be saved, so that the same call resumes after it was killed.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from notus.data.chat import ChatEncoder, check_ids
from notus.evaluation.prompts import Prompt
from notus.evaluation.results import KeptRecords
from notus.model.load import WITHOUT_EFFECT
from notus.model.new_tokens import vocabulary_rows
from notus.model.supported import context_of
from notus.runtime.distributed import gather_objects
from notus.training.sampling import end_tokens


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How completions are generated."""

    max_new_tokens: int = 512  # most tokens of a completion
    temperature: float = 0.0  # 0 is greedy; else logits are divided by it, and tokens are drawn
    top_p: float = 1.0  # draw from the likeliest tokens that hold this share of the probability; 1: from all
    top_k: int = 0  # draw from the k likeliest tokens; 0: from all
    seed: int = 42  # of the draws; the state of torch's own generators is left as it was
    batch_size: int = 32  # prompts computed together


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that are completed together."""

    indices: list[int]  # which prompts of the call these are
    prompts: list[list[int]]  # their token ids
    room: list[int]  # for each, the most tokens that it may get
    seed: int | None  # of the batch's draws; None: greedy


class KeptTokens(KeptRecords):
    """Finished completions, as token ids.

    A greedy completion is found again by its prompt's tokens and the settings, a sampled one also by its batch, so
    `batch_size` and the other prompts may change between greedy calls, but not between sampled ones.
    """

    what = "completion"

    def is_valid(self, record: dict[str, Any]) -> bool:
        """Return whether `ids` are token ids."""
        ids = record.get("ids")
        return isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)

    def keys(self, batch: Batch, settings: dict[str, Any]) -> list[str]:
        """Return a digest per prompt of all that decides its completion; where it is drawn, so do its neighbours."""
        drawn = None if batch.seed is None else [batch.seed, batch.prompts, batch.room]
        of_batch = _digest([self.identity, settings, drawn])
        rows = enumerate(zip(batch.prompts, batch.room, strict=True))
        return [_digest([of_batch, prompt, room, row if drawn else None]) for row, (prompt, room) in rows]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def generate(
    causal_lm: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    kept: KeptTokens | None = None,
) -> list[str]:
    """Complete each prompt up to EOS, `max_new_tokens` or the end of the model's context.

    Greedy completions do not depend on `batch_size`, to rounding; sampled ones are drawn batch by batch. Of
    the model's own generation config only the EOS tokens are used. Within a process group this is a collective: the
    batches are dealt to the ranks, each of which holds the model, and every rank gets all completions.

    `causal_lm` is an unsharded model in evaluation mode, as `load_causal_lm` returns it. The `encoder` has its
    tokenizer. Prompts are message lists, which get the generation prompt, or strings, which are continued as they are.
    Finished batches are saved and found again in `kept`.

    Returns the completions in the order of `prompts`, without special tokens. Raises ValueError for a prompt that is
    empty, fills the context, or that the chat template rejects; OSError if a finished batch cannot be saved.
    """
    tokenizer, context = encoder.tokenizer, context_of(causal_lm.config)
    encoded = [encode_prompt(encoder, prompt, context) for prompt in prompts]
    room = [min(decoding.max_new_tokens, context - len(ids)) for ids in encoded]
    completed = generate_ids(causal_lm, tokenizer, encoded, room, decoding, kept=kept)
    return [_decode(tokenizer, ids, new) for ids, new in zip(encoded, completed, strict=True)]


def generate_ids(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    room: list[int],
    decoding: Decoding,
    *,
    stop: Sequence[str] = (),
    with_end: bool = False,
    kept: KeptTokens | None = None,
) -> list[list[int]]:
    """Generate from token ids to token ids: what follows each prompt, at most its `room`; EOS only if `with_end`.

    A completion also ends where its text holds one of `stop`; that, and what the batch took to end, stays in it.
    """
    assert not (with_end and kept), "saved completions have no ends"
    config = _generation_config(causal_lm, tokenizer, decoding)
    rows = vocabulary_rows(causal_lm)
    for number, ids in enumerate(prompts, start=1):
        check_ids(tokenizer, f"prompt {number}", max(ids, default=-1), rows)
    batches = _batches(prompts, room, decoding)
    # What decides completions beside weights, prompts and room.
    names = ("do_sample", "temperature", "top_p", "top_k", "eos_token_id")
    settings: dict[str, Any] = {"dtype": str(causal_lm.dtype), **{name: getattr(config, name) for name in names}}
    if stop:
        settings["stop"] = list(stop)
    keys = [kept.keys(batch, settings) for batch in batches] if kept else []
    found = kept.find([key for of_batch in keys for key in of_batch]) if kept else {}
    done = {
        number: [found[key]["ids"] for key in of_batch]
        for number, of_batch in enumerate(keys)
        if found.keys() >= set(of_batch)
    }
    new: dict[int, list[list[int]]] = {}
    # This rank's batches; a progress bar on rank 0, if there is a terminal.
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    left = [number for number in range(len(batches)) if number not in done][rank::ranks]
    for number in tqdm(left, desc="generating", disable=True if rank else None):
        batch = batches[number]
        stopping = _Stop(tokenizer, stop, max(map(len, batch.prompts))) if stop else None
        with _seeded(batch.seed or 0, causal_lm.device):
            new[number] = _complete(causal_lm, batch, config, stopping, with_end)
        if kept:
            kept.add({"key": key, "ids": ids} for key, ids in zip(keys[number], new[number], strict=True))
    for share in gather_objects(new) if dist.is_initialized() else [new]:
        done |= share
    completed = {
        index: ids
        for number, batch in enumerate(batches)
        for index, ids in zip(batch.indices, done[number], strict=True)
    }
    return [completed[index] for index in range(len(prompts))]


class _Stop(StoppingCriteria):
    """Ends a row once the text of its new tokens holds one of some strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        # a token that ends such a string has at least a byte of it, and so has each before
        self.longest = max(len(text.encode()) for text in stop) + 1

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        new = input_ids[:, self.width :][:, -self.longest :]
        # with special tokens: tasks name "<|im_end|>" and its like, which ends a turn whether it is the EOS or not
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        done = [any(end in text for end in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def model_digest(causal_lm: PreTrainedModel) -> str:
    """Return the sha256 (hex) of a model as it was loaded: its tensors, and the settings that alter its computation."""
    config = {k: v for k, v in causal_lm.config.to_dict().items() if not WITHOUT_EFFECT.fullmatch(k)}
    total = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(causal_lm.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy())
    return total.hexdigest()


def encode_prompt(encoder: ChatEncoder, prompt: Prompt, context: int = sys.maxsize) -> list[int]:
    """Return a prompt's token ids. Raises ValueError, naming its place, if it is empty or fills the context."""
    place = prompt.place
    try:
        ids = encoder.encode_prompt(prompt.turns, tools=prompt.tools, template_kwargs=prompt.template_kwargs)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not ids:
        raise ValueError(f"{place}: the prompt is empty; there is nothing to continue")
    if len(ids) >= context:
        raise ValueError(f"{place}: the prompt's {len(ids)} tokens fill the model's context of {context}; shorten it")
    return ids


def _generation_config(
    causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> GenerationConfig:
    """Greedy or sampled, up to one of `end_tokens`."""
    pad = tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=decoding.temperature > 0,
        eos_token_id=end_tokens(tokenizer, causal_lm.generation_config),
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        use_cache=True,
    )
    if decoding.temperature > 0:
        config.update(temperature=decoding.temperature, top_p=decoding.top_p, top_k=decoding.top_k)
    return config


def _batches(encoded: list[list[int]], room: list[int], decoding: Decoding) -> list[Batch]:
    """Batches of prompts of similar lengths, the longest first: memory runs out at once or not at all."""
    order = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index]), index))
    batches = []
    for number, start in enumerate(range(0, len(order), decoding.batch_size)):
        indices = order[start : start + decoding.batch_size]
        own = (decoding.seed << 20) + number if decoding.temperature > 0 else None
        batches.append(Batch(indices, [encoded[i] for i in indices], [room[i] for i in indices], own))
    return batches


def _complete(
    causal_lm: PreTrainedModel,
    batch: Batch,
    config: GenerationConfig,
    stopping: StoppingCriteria | None,
    with_end: bool,
) -> list[list[int]]:
    """New token ids of one batch, EOS left out unless `with_end`, each at most as long as its room."""
    prompts = batch.prompts
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    config.max_new_tokens = max(batch.room)
    with _defaults(causal_lm, config):
        output = causal_lm.generate(  # type: ignore[operator]
            input_ids=input_ids.to(causal_lm.device),
            attention_mask=attention_mask.to(causal_lm.device),
            stopping_criteria=StoppingCriteriaList([stopping] if stopping else []),
        )
    completions = []
    for ids, limit in zip(output[:, width:].tolist(), batch.room, strict=True):
        end = next((at for at, token in enumerate(ids) if token in config.eos_token_id), len(ids))
        completions.append(ids[: min(limit, end + with_end)])
    return completions


@contextlib.contextmanager
def _defaults(causal_lm: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put `config` in the place of the model's own, which would otherwise fill in what `config` leaves open."""
    own = causal_lm.generation_config
    causal_lm.generation_config = config
    try:
        yield
    finally:
        causal_lm.generation_config = own


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` within the context, and leave the global generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _decode(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """The text of `new`. Decoded after its prompt, because many tokenizers strip the first space."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before, whole = decode(prompt), decode([*prompt, *new])
    # New bytes that are not UTF-8 can spoil the prompt's last byte tokens, and so its text.
    return whole.removeprefix(before) if whole.startswith(before) else decode(new)
