"""Completions of many prompts: batched, left-padded, greedy or sampled, with transformers' own generation.

Prompts are tokenised by the encoder that training uses, so the model sees what it was trained on.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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

from notus.data.chat import ChatEncoder
from notus.data.formats import Turns
from notus.evaluation.kept import Batch, KeptTokens
from notus.model.load import WITHOUT_EFFECT
from notus.training.sampling import end_tokens


def generate(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Turns],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 42,
    batch_size: int = 32,
    chat_template: str | None = None,
    add_empty_system: bool = False,
    places: Sequence[str] | None = None,
    kept: KeptTokens | None = None,
) -> list[str]:
    """Complete each prompt up to EOS, `max_new_tokens` or the end of the model's context.

    Greedy completions do not depend on `batch_size`, to rounding; sampled ones are drawn batch by batch. Of
    the model's own generation config only the EOS tokens are used. Within a process group the batches are
    dealt to the ranks, each of which holds the model: a collective, and every rank gets the whole.

    Args:
        causal_lm: an unsharded model in evaluation mode, as `load_causal_lm` returns it.
        tokenizer: its tokenizer.
        prompts: message lists, which get the generation prompt, or strings, which are continued as they are.
        max_new_tokens: most tokens of a completion.
        temperature: 0 is greedy; else logits are divided by it, and tokens are drawn.
        top_p: draw from the likeliest tokens that hold this share of the probability; 1: from all.
        top_k: draw from the k likeliest tokens; 0: from all.
        seed: of the draws; the state of torch's own generators is left as it was.
        batch_size: prompts computed together.
        chat_template, add_empty_system: see `ChatEncoder`.
        places: what errors call each prompt; None: by its number.
        kept: where finished batches are kept and found again; see `generate_kept`.

    Returns:
        The completions in the order of `prompts`, without special tokens.

    Raises:
        ValueError: a prompt that is empty, fills the context, or that the chat template refuses.
    """
    encoder = ChatEncoder(tokenizer, chat_template=chat_template, add_empty_system=add_empty_system)
    places = places or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    context = getattr(causal_lm.config, "max_position_embeddings", None) or sys.maxsize
    encoded = [_encode(encoder, prompt, context, at) for prompt, at in zip(prompts, places, strict=True)]
    completed = generate_ids(
        causal_lm,
        tokenizer,
        encoded,
        [min(max_new_tokens, context - len(ids)) for ids in encoded],
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        batch_size=batch_size,
        kept=kept,
    )
    return [_decode(tokenizer, ids, new) for ids, new in zip(encoded, completed, strict=True)]


def generate_ids(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    room: list[int],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 42,
    batch_size: int = 32,
    stop: Sequence[str] = (),
    with_end: bool = False,
    kept: KeptTokens | None = None,
) -> list[list[int]]:
    """`generate` from token ids to token ids: what follows each prompt, at most its `room`; EOS only if `with_end`.

    A completion also ends where its text holds one of `stop`; that, and what the batch took to end, stays in it.
    """
    assert not (with_end and kept), "what is kept has no ends"
    config = _generation_config(causal_lm, tokenizer, temperature, top_p, top_k)
    batches = _batches(prompts, room, batch_size, seed if temperature > 0 else None)
    settings = {**_settings(causal_lm, config), **({"stop": list(stop)} if stop else {})}
    done = kept.find(batches, settings) if kept else {}
    new: dict[int, list[list[int]]] = {}
    for number in _share([number for number in range(len(batches)) if number not in done]):
        batch = batches[number]
        stopping = _Stop(tokenizer, stop, max(map(len, batch.prompts))) if stop else None
        with _seeded(batch.seed or 0, causal_lm.device):
            new[number] = _complete(causal_lm, batch, config, stopping, with_end)
        if kept:
            kept.add(number, new[number])
    done |= _of_all_ranks(new)
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


def generate_kept(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Turns],
    *,
    kept: Path,
    identity: str,
    **options: Any,
) -> list[str]:
    """As `generate`, but what is finished is kept: the same call, on any number of ranks, goes on where it stopped.

    Every rank appends its finished batches to a file of its own in the folder `kept`, which all ranks must see.
    A greedy completion is found again by its prompt's tokens and the settings, a sampled one also by its batch,
    so `batch_size` and the other prompts may change between calls of the one kind, but not of the other.

    Args:
        causal_lm, tokenizer, prompts: as `generate` has them.
        kept: a folder, made if need be; calls with other prompts, settings or models may share it.
        identity: says which weights these are, as `model_digest` does.
        options: of `generate`.

    Raises:
        ValueError: as `generate`; also a file in `kept` that holds something else.
        OSError: the disk refuses.
    """
    return generate(causal_lm, tokenizer, prompts, kept=KeptTokens(kept, identity), **options)


def model_digest(causal_lm: PreTrainedModel) -> str:
    """sha256 (hex) over a model as it was loaded: its tensors, and the settings that alter its computation."""
    config = {k: v for k, v in causal_lm.config.to_dict().items() if not WITHOUT_EFFECT.fullmatch(k)}
    total = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(causal_lm.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy())
    return total.hexdigest()


def _encode(encoder: ChatEncoder, prompt: Turns, context: int | None, place: str) -> list[int]:
    try:
        ids = encoder.encode_prompt(prompt)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not ids:
        raise ValueError(f"{place}: the prompt is empty; there is nothing to continue")
    if context is not None and len(ids) >= context:
        raise ValueError(f"{place}: the prompt's {len(ids)} tokens fill the model's context of {context}; shorten it")
    return ids


def _generation_config(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    top_p: float,
    top_k: int,
) -> GenerationConfig:
    """Greedy or sampled, up to one of `end_tokens`."""
    pad = tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=temperature > 0,
        eos_token_id=end_tokens(tokenizer, causal_lm.generation_config),
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        use_cache=True,
    )
    if temperature > 0:
        config.update(temperature=temperature, top_p=top_p, top_k=top_k)
    return config


def _settings(causal_lm: PreTrainedModel, config: GenerationConfig) -> dict[str, Any]:
    """What decides completions beside weights, prompts and room."""
    names = ("do_sample", "temperature", "top_p", "top_k", "eos_token_id")
    return {"dtype": str(causal_lm.dtype), **{name: getattr(config, name) for name in names}}


def _batches(encoded: list[list[int]], room: list[int], batch_size: int, seed: int | None) -> list[Batch]:
    """Batches of prompts of similar lengths, the longest first: memory runs out at once or not at all."""
    order = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index]), index))
    batches = []
    for number, start in enumerate(range(0, len(order), batch_size)):
        indices = order[start : start + batch_size]
        own = None if seed is None else (seed << 20) + number
        batches.append(Batch(indices, [encoded[i] for i in indices], [room[i] for i in indices], own))
    return batches


def _share(numbers: list[int]) -> Iterable[int]:
    """This rank's batches; a progress bar on rank 0, if there is a terminal."""
    if not dist.is_initialized():
        return tqdm(numbers, desc="generating", disable=None)
    share = numbers[dist.get_rank() :: dist.get_world_size()]
    return share if dist.get_rank() else tqdm(share, desc="generating", disable=None)


def _of_all_ranks(new: dict[int, list[list[int]]]) -> dict[int, list[list[int]]]:
    if not dist.is_initialized():
        return new
    shares: list[dict[int, list[list[int]]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, new)
    return {number: ids for share in shares for number, ids in share.items()}


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
    with _own_defaults(causal_lm, config):
        output = causal_lm.generate(  # type: ignore[operator]
            input_ids=input_ids.to(causal_lm.device),
            attention_mask=attention_mask.to(causal_lm.device),
            stopping_criteria=StoppingCriteriaList([stopping] if stopping else []),
        )
    rows = output[:, width:].tolist()
    ends = [_end(row, config.eos_token_id) + with_end for row in rows]
    return [row[: min(limit, end)] for row, limit, end in zip(rows, batch.room, ends, strict=True)]


@contextmanager
def _own_defaults(causal_lm: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put `config` in the place of the model's, which would else fill in what it leaves open."""
    kept = causal_lm.generation_config
    causal_lm.generation_config = config
    try:
        yield
    finally:
        causal_lm.generation_config = kept


def _end(ids: list[int], ends: list[int]) -> int:
    """How many tokens stand before the first of `ends`."""
    return next((at for at, token in enumerate(ids) if token in ends), len(ids))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws within the context follow from `seed` and leave the global generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _decode(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """The text of `new`. Decoded after its prompt, because many tokenizers strip a text's first space."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before, whole = decode(prompt), decode([*prompt, *new])
    # New bytes that are not UTF-8 can spoil the prompt's last byte tokens, and so its text.
    return whole.removeprefix(before) if whole.startswith(before) else decode(new)
