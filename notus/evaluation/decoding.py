"""Completions of many prompts: batched, left-padded, greedy or sampled, with transformers' own generation.

Prompts are tokenised by the encoder that training uses, so the model sees what it was trained on. Several completions
of a prompt share its computation: the prompt is computed once, and its cache of keys and values is repeated. Under
torchrun the ranks share the batches. Finished batches can be saved, so that the same call resumes after it was killed.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from notus.runtime.distributed import gather_objects, is_main, tell
from notus.training.sampling import end_tokens

TOGETHER = 4  # times the batch size, what continuous batching takes at once


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How completions are generated."""

    max_new_tokens: int = 512  # most tokens of a completion
    temperature: float = 0.0  # 0 is greedy; else logits are divided by it, and tokens are drawn
    top_p: float = 1.0  # draw from the likeliest tokens that hold this share of the probability; 1: from all
    top_k: int = 0  # draw from the k likeliest tokens; 0: from all
    seed: int = 42  # of the draws; the state of torch's own generators is left as it was
    batch_size: int = 32  # completions computed together
    samples: int = 1  # completions of each prompt; they share its computation
    engine: str = "batched"  # or "continuous": see `notus.evaluation.continuous`


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model said to a prompt."""

    text: str  # without special tokens
    ids: list[int]  # its tokens, without the one that ended it
    finish_reason: str  # "stop": the model ended it; "length": it was cut at its most tokens or the end of the context
    tokens: int  # how many it took, with the one that ended it


@dataclasses.dataclass(frozen=True)
class Generated:
    """The completions of a call, and how fast it computed them."""

    completions: list[list[Completion]]  # of each prompt, in the prompts' order
    tokens: int  # that this call computed, on all ranks; completions that it found saved are not counted
    seconds: float  # that this took the slowest rank

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens per second of all ranks together; None if everything was found saved."""
        return self.tokens / self.seconds if self.seconds else None


@dataclasses.dataclass(frozen=True)
class Row:
    """A completion as token ids."""

    ids: list[int]  # without the token that ended it
    end: int | None  # the token that ended it; None: it was cut, or a string of `stop` ended it
    finish_reason: str  # see Completion

    @property
    def tokens(self) -> int:
        """How many tokens it took."""
        return len(self.ids) + (self.end is not None)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that are completed together, each `samples` times: its rows, one prompt after the other."""

    indices: list[int]  # which prompts of the call these are
    prompts: list[list[int]]  # their token ids
    room: list[int]  # for each, the most tokens that it may get
    seed: int | None  # of the batch's draws; None: greedy
    samples: int = 1  # completions of each prompt here
    first: int = 0  # which of a prompt's samples these begin with

    @property
    def places(self) -> list[tuple[int, int]]:
        """For each row, the prompt and which of its samples it is."""
        return [(index, self.first + sample) for index in self.indices for sample in range(self.samples)]

    @property
    def row_room(self) -> list[int]:
        """For each row, the most tokens that it may get."""
        return [room for room in self.room for _ in range(self.samples)]


class KeptTokens(KeptRecords):
    """Finished completions, as token ids, with how they ended.

    A greedy completion is found again by its prompt's tokens and the settings, a sampled one also by its batch, so
    `batch_size` and the other prompts may change between greedy calls, but not between sampled ones.
    """

    what = "completion"

    def is_valid(self, record: dict[str, Any]) -> bool:
        """Return whether `ids` are token ids; an earlier version's records, which do not say how they ended, are."""
        ids, end = record.get("ids"), record.get("end")
        if not isinstance(ids, list) or record.get("finish_reason", "stop") not in ("stop", "length"):
            return False
        return all(type(token) is int and token >= 0 for token in [*ids, 0 if end is None else end])

    def keys(self, batch: Batch, settings: dict[str, Any]) -> list[str]:
        """Return a digest per prompt of all that decides its completion; where it is drawn, so do its neighbours."""
        drawn = None if batch.seed is None else [batch.seed, batch.prompts, batch.room, batch.samples]
        of_batch = _digest(["with ends", self.identity, settings, drawn])
        prompts = [prompt for prompt in batch.prompts for _ in range(batch.samples)]
        rows = enumerate(zip(prompts, batch.row_room, strict=True))
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
    """Return the texts of `generate_completions`: `samples` of each prompt, one prompt after the other."""
    generated = generate_completions(causal_lm, encoder, prompts, decoding, kept=kept)
    return [completion.text for of_prompt in generated.completions for completion in of_prompt]


def generate_completions(
    causal_lm: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    kept: KeptTokens | None = None,
    alone: bool = False,
) -> Generated:
    """Complete each prompt up to EOS, `max_new_tokens` or the end of the model's context.

    Greedy completions do not depend on `batch_size`, to rounding; sampled ones are drawn batch by batch. Of
    the model's own generation config only the EOS tokens are used. Within a process group this is a collective: the
    batches are dealt to the ranks, each of which holds the model, and every rank gets all completions. If it is called
    `alone`, this rank completes its own prompts by itself, without a progress bar.

    `causal_lm` is an unsharded model in evaluation mode, as `load_causal_lm` returns it. The `encoder` has its
    tokenizer. Prompts are message lists, which get the generation prompt, or strings, which are continued as they are.
    Finished batches are saved and found again in `kept`.

    Raises ValueError for a prompt that is empty, fills the context, or that the chat template rejects; OSError if a
    finished batch cannot be saved.
    """
    tokenizer, context = encoder.tokenizer, context_of(causal_lm.config)
    encoded = [encode_prompt(encoder, prompt, context) for prompt in prompts]
    room = [min(decoding.max_new_tokens, context - len(ids)) for ids in encoded]
    rows, tokens, seconds = _generate_rows(causal_lm, tokenizer, encoded, room, decoding, (), kept, alone=alone)
    completions = [
        [Completion(_decode(tokenizer, ids, row.ids), row.ids, row.finish_reason, row.tokens) for row in of_prompt]
        for ids, of_prompt in zip(encoded, rows, strict=True)
    ]
    return Generated(completions, tokens, seconds)


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

    A completion also ends where its text holds one of `stop`, which stays in it. Returns `samples` completions of each
    prompt, one prompt after the other.
    """
    rows, _, _ = _generate_rows(causal_lm, tokenizer, prompts, room, decoding, stop, kept)
    flat = [row for of_prompt in rows for row in of_prompt]
    return [row.ids if row.end is None or not with_end else [*row.ids, row.end] for row in flat]


def _generate_rows(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    room: list[int],
    decoding: Decoding,
    stop: Sequence[str],
    kept: KeptTokens | None,
    *,
    alone: bool = False,
) -> tuple[list[list[Row]], int, float]:
    """Return the completions of each prompt, and the tokens and the seconds that this call took for new ones."""
    config = _generation_config(causal_lm, tokenizer, decoding)
    rows = vocabulary_rows(causal_lm)
    for number, ids in enumerate(prompts, start=1):
        check_ids(tokenizer, f"prompt {number}", max(ids, default=-1), rows)
    batches = _batches(prompts, room, decoding)
    settings = _settings(causal_lm, config, decoding, stop)
    keys = [kept.keys(batch, settings) for batch in batches] if kept else []
    found = kept.find([key for of_batch in keys for key in of_batch]) if kept else {}
    done = {
        number: [_row(found[key]) for key in of_batch]
        for number, of_batch in enumerate(keys)
        if found.keys() >= set(of_batch)
    }
    left = [number for number in range(len(batches)) if number not in done]
    engine = _Engine(causal_lm, tokenizer, config, decoding, stop, prompts) if left else None
    new: dict[int, list[Row]] = {}
    # This rank's batches; a progress bar on rank 0, if there is a terminal.
    together = dist.is_initialized() and not alone
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    left = left[rank::ranks]
    began, tokens = time.perf_counter(), 0
    total = sum(len(batches[number].places) for number in left)
    quiet = True if rank or alone else None
    with tqdm(total=total, desc="generating", unit="completion", disable=quiet) as progress:
        for number in left:
            assert engine
            new[number] = engine.complete(batches[number], progress.update)
            tokens += sum(row.tokens for row in new[number])
            progress.set_postfix_str(f"{tokens / (time.perf_counter() - began):.0f} tokens/s")
            if kept:
                records = (dataclasses.asdict(row) for row in new[number])
                kept.add({"key": key, **record} for key, record in zip(keys[number], records, strict=True))
    mine = (new, tokens, time.perf_counter() - began if new else 0.0)
    shares = gather_objects(mine, patient=True) if together else [mine]
    for of_rank, _, _ in shares:
        done |= of_rank
    completed: dict[tuple[int, int], Row] = {}
    for number, batch in enumerate(batches):
        completed |= dict(zip(batch.places, done[number], strict=True))
    of_prompts = [[completed[index, sample] for sample in range(decoding.samples)] for index in range(len(prompts))]
    return of_prompts, sum(share[1] for share in shares), max(share[2] for share in shares)


def _settings(
    causal_lm: PreTrainedModel, config: GenerationConfig, decoding: Decoding, stop: Sequence[str]
) -> dict[str, Any]:
    """Return what decides completions beside weights, prompts and room."""
    names = ("do_sample", "temperature", "top_p", "top_k", "eos_token_id")
    settings: dict[str, Any] = {"dtype": str(causal_lm.dtype), **{name: getattr(config, name) for name in names}}
    if stop:
        settings["stop"] = list(stop)
    if decoding.engine != "batched" and config.do_sample:  # the order of the draws
        settings["engine"] = [decoding.engine, decoding.batch_size]
    return settings


class _Engine:
    """Completes batches."""

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        decoding: Decoding,
        stop: Sequence[str],
        prompts: list[list[int]],
    ) -> None:
        self.causal_lm, self.tokenizer, self.config, self.stop = causal_lm, tokenizer, config, stop
        self.most, self.continuous = decoding.batch_size, decoding.engine == "continuous"
        assert decoding.engine in ("batched", "continuous")
        assert not (stop and self.continuous), "continuous batching knows end tokens alone"
        begun = [max(prompts, key=len)[:12], min(prompts, key=len)[:7]]
        self.shared = decoding.samples > 1 and not self.continuous and _can_share(causal_lm, begun, config.pad_token_id)
        if self.continuous:
            with _seeded(0, causal_lm.device):
                _check_continuous(causal_lm, begun, config.pad_token_id)

    def complete(self, batch: Batch, on_done: Callable[[int], object]) -> list[Row]:
        """Complete the rows of a batch; `on_done` is called with how many more are complete."""
        with _seeded(batch.seed or 0, self.causal_lm.device):
            if self.continuous:
                return self._continuously(batch, on_done)
            stopping = _Stop(self.tokenizer, self.stop, max(map(len, batch.prompts))) if self.stop else None
            rows = _complete(self.causal_lm, batch, self.config, stopping, self.shared)
        on_done(len(rows))
        return rows

    def _continuously(self, batch: Batch, on_done: Callable[[int], object]) -> list[Row]:
        from notus.evaluation.continuous import complete_continuously

        new = complete_continuously(
            self.causal_lm,
            batch.prompts,
            batch.room,
            batch.samples,
            self.config,
            seed=batch.seed or 0,
            most=self.most,
            on_done=lambda: on_done(1),
        )
        ends = self.config.eos_token_id
        return [_ended(ids, limit, ends, None) for ids, limit in zip(new, batch.row_room, strict=True)]


def _row(record: dict[str, Any]) -> Row:
    return Row(record["ids"], record["end"], record["finish_reason"])


class _Stop(StoppingCriteria):
    """Ends a row once the text of its new tokens holds one of some strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.lengths: dict[int, int] = {}  # of the rows that it ended, in new tokens
        # a token that ends such a string has at least a byte of it, and so has each before
        self.longest = max(len(text.encode()) for text in stop) + 1

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        new = input_ids[:, self.width :][:, -self.longest :]
        # with special tokens: tasks name "<|im_end|>" and its like, which ends a turn whether it is the EOS or not
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        done = [any(end in text for end in self.stop) for text in texts]
        for row in (row for row, ended in enumerate(done) if ended):
            self.lengths.setdefault(row, input_ids.shape[1] - self.width)
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
    """Batches of prompts of similar lengths, the longest first: memory runs out at once or not at all.

    The completions of a prompt stand in one batch, unless they alone are more than `batch_size`. Continuous batching
    takes several batches at once, to have a next completion where one ends.
    """
    order = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index]), index))
    most, samples = decoding.batch_size * (TOGETHER if decoding.engine == "continuous" else 1), decoding.samples
    together = max(1, most // samples)
    batches: list[Batch] = []
    for start in range(0, len(order), together):
        indices = order[start : start + together]
        for first in range(0, samples, most):
            number = (decoding.seed << 20) + len(batches) if decoding.temperature > 0 else None
            prompts, rooms = [encoded[i] for i in indices], [room[i] for i in indices]
            batches.append(Batch(indices, prompts, rooms, number, min(most, samples - first), first))
    return batches


def _complete(
    causal_lm: PreTrainedModel, batch: Batch, config: GenerationConfig, stopping: "_Stop | None", shared: bool
) -> list[Row]:
    """Complete the rows of a batch; `shared`: each prompt is computed once."""
    ids, mask = _left_padded(batch.prompts, config.pad_token_id, causal_lm.device)
    inputs = _inputs(causal_lm, ids, mask, batch.samples, shared=shared)
    config.max_new_tokens = max(batch.room)
    with _defaults(causal_lm, config), _within_context(causal_lm):
        output = causal_lm.generate(  # type: ignore[operator]
            **inputs, stopping_criteria=StoppingCriteriaList([stopping] if stopping else [])
        )
    stopped = stopping.lengths if stopping else {}
    return [
        _ended(new, limit, config.eos_token_id, stopped.get(number))
        for number, (new, limit) in enumerate(zip(output[:, ids.shape[1] :].tolist(), batch.row_room, strict=True))
    ]


def _ended(new: list[int], limit: int, ends: Sequence[int], stopped: int | None) -> Row:
    """Cut the new tokens of a row where it ended first: at an end token, a string that stops it, or its limit."""
    limit = min(limit, len(new))
    end = next((at for at, token in enumerate(new[:limit]) if token in ends), None)
    if end is not None and (stopped is None or end < stopped):
        return Row(new[:end], new[end], "stop")
    if stopped is not None and stopped <= limit:
        return Row(new[:stopped], None, "stop")
    return Row(new[:limit], None, "length")


def _left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids and the attention mask of a batch, [prompts, longest]."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _inputs(
    causal_lm: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, samples: int, *, shared: bool
) -> dict[str, Any]:
    """Return what `generate` takes to continue each left-padded prompt `samples` times; `shared`: with its cache."""
    rows = torch.arange(len(ids), device=ids.device).repeat_interleave(samples)
    inputs = {"input_ids": ids[rows], "attention_mask": mask[rows]}
    if not shared or ids.shape[1] == 1:
        return inputs
    # The last token is left to each row: its logits are what the row's first token is drawn from.
    config = GenerationConfig(do_sample=False, max_new_tokens=1, use_cache=True, return_dict_in_generate=True)
    with _defaults(causal_lm, config):
        output = causal_lm.generate(input_ids=ids[:, :-1], attention_mask=mask[:, :-1])  # type: ignore[operator]
    cache = output.past_key_values
    cache.reorder_cache(rows)  # of all kinds of layers, also those with a recurrent state
    return {**inputs, "past_key_values": cache}


def _can_share(causal_lm: PreTrainedModel, prompts: list[list[int]], pad: int) -> bool:
    """Return whether rows that share their prompt's computation get the logits of rows that do not; report it if not.

    It is tried on some prompts and three new tokens. It shows a cache that cannot be repeated, a state that is kept
    elsewhere, and positions that start anew.
    """
    try:
        difference = _difference(
            *(_greedy(causal_lm, prompts, pad, samples=2, shared=shared) for shared in (False, True))
        )
        reason = f"its logits would be off by {difference:.1g}"
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        difference, reason = float("inf"), (str(error).splitlines() or [type(error).__name__])[0]
    # as far apart as sums in another order are, and no further
    can = difference < (1e-3 if causal_lm.dtype == torch.float32 else 0.1)
    if not can and (not dist.is_initialized() or is_main()):
        tell(f"{type(causal_lm).__name__}'s cache cannot be shared, so each sample computes its prompt again: {reason}")
    return can


def _check_continuous(causal_lm: PreTrainedModel, prompts: list[list[int]], pad: int) -> None:
    from notus.evaluation.continuous import check_continuous

    check_continuous(causal_lm, prompts, _greedy(causal_lm, prompts, pad, samples=1, shared=False))


def _greedy(
    causal_lm: PreTrainedModel, prompts: list[list[int]], pad: int, *, samples: int, shared: bool
) -> torch.Tensor:
    """Return the logits of three greedy tokens after each prompt, [tokens, rows, vocabulary]."""
    config = GenerationConfig(do_sample=False, max_new_tokens=3, use_cache=True, return_dict_in_generate=True)
    config.output_logits = True
    inputs = _inputs(causal_lm, *_left_padded(prompts, pad, causal_lm.device), samples, shared=shared)
    with _defaults(causal_lm, config):
        return torch.stack(causal_lm.generate(**inputs).logits)  # type: ignore[operator]


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference of a row's logits, as a share of their spread; up to where a row's tokens differ."""
    wanted, found = wanted.float(), found.float()
    apart = (wanted - found).norm(dim=-1) / (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1)
    differ = (wanted.argmax(-1) != found.argmax(-1)).int()
    comparable = differ.cumsum(0) - differ == 0  # the tokens before are the same
    return float(apart[comparable].nan_to_num(float("inf")).max())


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
def _within_context(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Keep positions within the model's context: those of a row that has used up its room run on with its batch.

    What such a row gets is cut off. But a model with learned positions has no more of them, and one whose rotary
    positions are scaled by the longest row would compute the other rows differently.
    """
    last = context_of(causal_lm.config) - 1

    def clamp(_: object, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = given.get("position_ids")
        return args, given if positions is None else {**given, "position_ids": positions.clamp(max=last)}

    hook = causal_lm.register_forward_pre_hook(clamp, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


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
