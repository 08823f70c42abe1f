"""Completions by transformers' continuous batching: a completion that has ended makes room for the next one at once.

Keys and values stand in pages, which the samples of a prompt share. All requests are queued before the first step, and
the numbers of pages and of tokens per step do not depend on the memory that happens to be free. So the steps, and with
them the draws, follow from the seed. transformers' own `generate_batch` promises neither.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

PAGE = 256  # tokens of a page, transformers' default
TOKENS_PER_STEP = 1024  # of prompts and completions together; longer prompts take several steps


def complete_continuously(
    causal_lm: PreTrainedModel,
    prompts: list[list[int]],
    room: list[int],
    samples: int,
    config: GenerationConfig,
    *,
    seed: int,
    most: int,
    on_done: Callable[[], object],
) -> list[list[int]]:
    """Return the new tokens of each prompt's samples, one prompt after the other, each with the token that ended it.

    `room`: the most new tokens of each prompt. `most`: completions computed at a time. `on_done` is called as each
    completion ends. Draws from `seed`, with torch's global generators. The model's attention is left as it was.

    Raises ValueError if continuous batching does not serve the model.
    """
    outputs = _run(causal_lm, prompts, room, samples, config, seed, most, on_done)
    return [list(output.generated_tokens) for output in outputs]


def check_continuous(causal_lm: PreTrainedModel, prompts: list[list[int]], wanted: torch.Tensor) -> None:
    """Compare the engine with `wanted`, the logits of greedy tokens after `prompts`: [tokens, prompts, vocabulary].

    Raises ValueError if the model's log-probs differ by more than rounding, or it is not supported. Some models
    compute something else, without an error: those whose own code leaves out what transformers' pages need.
    """
    tokens = len(wanted)
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=-1, use_cache=True)
    room = [tokens] * len(prompts)
    outputs = _run(causal_lm, prompts, room, 1, config, 0, len(prompts), lambda: None, logprobs=True)
    differences = []
    for row, output in enumerate(outputs):
        for logits, token, logp in zip(wanted[:, row].float(), output.generated_tokens, output.logprobs, strict=True):
            differences.append(abs(float(logits.log_softmax(-1)[token]) - float(logp)))
            if token != int(logits.argmax()):
                break  # from here on, the two continue different tokens
    difference = sum(differences) / len(differences)
    if not difference < (0.01 if causal_lm.dtype == torch.float32 else 0.1):
        raise ValueError(_refusal(causal_lm, f"log-probs would be off by {difference:.1g}"))


def _refusal(causal_lm: PreTrainedModel, reason: str) -> str:
    return f"continuous batching does not work for {type(causal_lm).__name__} ({reason}); use --engine batched"


def _run(
    causal_lm: PreTrainedModel,
    prompts: list[list[int]],
    room: list[int],
    samples: int,
    config: GenerationConfig,
    seed: int,
    most: int,
    on_done: Callable[[], object],
    *,
    logprobs: bool = False,
) -> list[Any]:
    """Return transformers' outputs of each prompt's samples, one prompt after the other."""
    attention = causal_lm.config._attn_implementation
    config.num_return_sequences = samples
    settings = _settings(prompts, room, samples, seed, most, logprobs)
    try:
        manager = causal_lm.init_continuous_batching(  # type: ignore[operator]
            generation_config=config, continuous_batching_config=settings
        )
        requests = [
            manager.add_request(ids, max_new_tokens=limit, eos_token_id=config.eos_token_id or -1)
            for ids, limit in zip(prompts, room, strict=True)
        ]
        found = _results(manager, len(prompts) * samples, on_done)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(_refusal(causal_lm, reason)) from error
    finally:
        config.num_return_sequences = None
        if causal_lm.config._attn_implementation != attention:
            causal_lm.set_attn_implementation(attention)
    names = ([request, *(f"{request}__child#{child}" for child in range(samples - 1))] for request in requests)
    return [found[name] for of_prompt in names for name in of_prompt]


def _settings(
    prompts: list[list[int]], room: list[int], samples: int, seed: int, most: int, logprobs: bool
) -> ContinuousBatchingConfig:
    """Return settings that are the same on every machine; by default, they would follow from its free memory."""
    longest = max(len(ids) + limit for ids, limit in zip(prompts, room, strict=True))
    pages = -(-longest // PAGE) + 1
    return ContinuousBatchingConfig(
        # for the completions at a time and those of the prompt that was forked last; the scheduler keeps 15% free
        num_blocks=pages * (most + samples) * 5 // 4,
        max_batch_tokens=max(TOKENS_PER_STEP, most),
        max_requests_per_batch=most,
        use_async_batching=False,
        return_logprobs=logprobs,
        seed=seed - (dist.get_rank() if dist.is_initialized() else 0),  # to which the rank is added
    )


def _results(manager: Any, count: int, on_done: Callable[[], object]) -> dict[str, Any]:
    """Run until all requests are done; return the outputs by request. Raises RuntimeError if one fails."""
    found: dict[str, Any] = {}
    manager.start()
    try:
        while len(found) < count:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("its thread ended early")
            if result is None or not result.is_finished():
                continue
            if result.error is not None:
                raise RuntimeError(result.error)
            found[result.request_id] = result
            on_done()
    finally:
        manager.stop(block=True, hard_stop=len(found) < count)
        manager.destroy()
    return found
