"""Completions of many prompts: batched, left-padded, greedy or sampled, with transformers' own generation.

Prompts are tokenised by the encoder that training uses, so the model sees what it was trained on.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from notus.data.chat import ChatEncoder, Turns


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

    Returns:
        The completions in the order of `prompts`, without special tokens.

    Raises:
        ValueError: a prompt that is empty, fills the context, or that the chat template refuses.
    """
    encoder = ChatEncoder(tokenizer, chat_template=chat_template, add_empty_system=add_empty_system)
    places = places or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    context = getattr(causal_lm.config, "max_position_embeddings", None) or sys.maxsize
    encoded = [_encode(encoder, prompt, context, at) for prompt, at in zip(prompts, places, strict=True)]
    room = [min(max_new_tokens, context - len(ids)) for ids in encoded]
    config = _generation_config(causal_lm, tokenizer, temperature, top_p, top_k)
    batches = _batches([len(ids) for ids in encoded], batch_size)
    completed: dict[int, str] = {}
    for number in _share(len(batches)):
        indices = batches[number]
        with _seeded((seed << 20) + number, causal_lm.device):
            new = _complete(causal_lm, [encoded[i] for i in indices], [room[i] for i in indices], config)
        for index, ids in zip(indices, new, strict=True):
            completed[index] = _decode(tokenizer, encoded[index], ids)
    completed = _of_all_ranks(completed)
    return [completed[index] for index in range(len(prompts))]


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
    """Greedy or sampled; ends at the tokenizer's EOS and at those that the model names."""
    of_model = causal_lm.generation_config.eos_token_id if causal_lm.generation_config is not None else None
    ends = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])} - {None}
    pad = tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=temperature > 0,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        use_cache=True,
    )
    if temperature > 0:
        config.update(temperature=temperature, top_p=top_p, top_k=top_k)
    return config


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar lengths, the longest first: memory runs out at once or not at all."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _share(num_batches: int) -> Iterable[int]:
    """This rank's batches; a progress bar on rank 0, if there is a terminal."""
    if not dist.is_initialized():
        return tqdm(range(num_batches), desc="generating", disable=None)
    share = range(dist.get_rank(), num_batches, dist.get_world_size())
    return share if dist.get_rank() else tqdm(share, desc="generating", disable=None)


def _of_all_ranks(completed: dict[int, str]) -> dict[int, str]:
    if not dist.is_initialized():
        return completed
    shares: list[dict[int, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, completed)
    return {index: text for share in shares for index, text in share.items()}


def _complete(
    causal_lm: PreTrainedModel, prompts: list[list[int]], room: list[int], config: GenerationConfig
) -> list[list[int]]:
    """New token ids of one batch, EOS left out, each at most as long as its `room`."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    config.max_new_tokens = max(room)
    with _own_defaults(causal_lm, config):
        output = causal_lm.generate(  # type: ignore[operator]
            input_ids=input_ids.to(causal_lm.device), attention_mask=attention_mask.to(causal_lm.device)
        )
    rows = output[:, width:].tolist()
    return [_until(row[:limit], config.eos_token_id) for row, limit in zip(rows, room, strict=True)]


@contextmanager
def _own_defaults(causal_lm: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put `config` in the place of the model's, which would else fill in what it leaves open."""
    kept = causal_lm.generation_config
    causal_lm.generation_config = config
    try:
        yield
    finally:
        causal_lm.generation_config = kept


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """What stands before the first of `ends`."""
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


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
