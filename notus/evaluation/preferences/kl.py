"""KL(model ‖ base) of whole completions, estimated from the model's own samples."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from notus.data.chat import ChatEncoder
from notus.data.dataset import FEATURES, TokenizedDataset
from notus.evaluation import prompts as prompt_files
from notus.evaluation.decoding import Decoding, encode_prompt, generate_ids
from notus.evaluation.intervals import ratio_stderr, stderr
from notus.evaluation.preferences.scores import Scoring
from notus.model.export import load_causal_lm
from notus.model.supported import context_of
from notus.training.parallelize import COMPUTE_DTYPES, free_memory
from notus.training.sampling import end_tokens

SEED = 42


@dataclasses.dataclass(frozen=True)
class Samples:
    """Completions that a model drew."""

    # prompt and completion of each; every token of the completion counts, the one that ends it too.
    rows: TokenizedDataset
    cut: np.ndarray  # bool [n], whether it was stopped before its end
    max_new_tokens: int  # at how many tokens, unless the context ended first


def prompts_of(rows: TokenizedDataset) -> list[list[int]]:
    """The different prompts of tokenised pairs: what stands before the first learned token of the chosen completion."""
    found: dict[tuple[int, ...], None] = {}
    for index in range(len(rows)):
        (example,) = rows(np.array([index]))
        first = int(example.loss_masks[0].argmax())
        found[(*example.trunk.tolist(), *example.branches[0][:first].tolist())] = None
    return [list(ids) for ids in found]


def read_prompts(path: Path, encoder: ChatEncoder, *, strings_are_turns: bool) -> list[list[int]]:
    """The prompts of a file as `notus generate` takes them, as token ids. Raises ValueError, naming the line."""
    prompts = prompt_files.read_prompts(path, strings_are_turns=strings_are_turns)
    return [encode_prompt(encoder, prompt) for prompt in prompts]


def choose(prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """`count` of the prompts, drawn without replacement; all, if there are no more."""
    drawn = np.random.default_rng(SEED).permutation(len(prompts))[:count]
    return [prompts[index] for index in np.sort(drawn)]


def sample(folder: Path, scoring: Scoring, prompts: list[list[int]], max_new_tokens: int) -> Samples:
    """Draw a completion of each prompt at temperature 1 from the model or adapter in `folder`; collective.

    Every rank holds the model while it draws. Generation computes in the precision of the scoring pass, so
    draws and scores are of one distribution but for rounding. Raises ValueError for a prompt that fills the context.
    """
    dtype, trust = COMPUTE_DTYPES[scoring.precision], scoring.trust_remote_code
    causal_lm, _ = load_causal_lm(folder, dtype=dtype, device=scoring.device, trust_remote_code=trust)
    context = context_of(causal_lm.config)
    room = [min(max_new_tokens, context - len(ids)) for ids in prompts]
    if min(room) < 1:
        raise ValueError(f"a prompt's {context - min(room)} tokens fill the model's context of {context}; shorten it")
    drawing = Decoding(temperature=1.0, seed=SEED)
    drawn = generate_ids(causal_lm, scoring.tokenizer, prompts, room, drawing, with_end=True)
    ends = end_tokens(scoring.tokenizer, causal_lm.generation_config)
    del causal_lm
    free_memory()
    columns = {
        "trunk": prompts,
        "branches": [[ids] for ids in drawn],
        "loss_mask": [[[1] * len(ids)] for ids in drawn],
    }
    rows = TokenizedDataset(datasets.Dataset.from_dict(columns, features=FEATURES))
    return Samples(rows, np.array([ids[-1] not in ends for ids in drawn]), max_new_tokens)


def kl(policy: Tensor, base: Tensor, samples: Samples) -> dict[str, Any]:
    """Estimate KL(policy ‖ base), in nats, from log-probs of the samples' tokens, both fp32 [tokens] in their order.

    With r = base(token) / policy(token), two unbiased estimates of a sample's KL, each summed over its tokens (Schulman
    2020, "Approximating KL divergence"): k1 = -log r, whose sum is log policy(y) - log base(y); and k3 = r - 1 - log r,
    never negative, and of lower variance while the models are near each other. It is taken token by token, where the
    chain rule makes the sum a KL again: for whole sequences r spans hundreds of nats. Where the base likes a token far
    more than the policy, which then draws it rarely, k3 is the noisier one, and too low until it is drawn; so k1 leads.

    A sample that is cut counts with the tokens it has, so where there are such, this is the KL of the first
    `max_new_tokens` tokens, and at most that of whole completions.

    Returns:
        `samples`, `tokens`, `cut_share` and `max_new_tokens`; `per_sequence` and `per_token`, means of k1 over samples
        and over tokens; `k3_per_sequence`, `k3_per_token` likewise; each with its `_stderr` (None for one sample).
    """
    lengths = samples.rows.loss_tokens[:, 0]
    ratios = base.double().numpy() - policy.double().numpy()
    result: dict[str, Any] = {
        "samples": len(lengths),
        "tokens": int(lengths.sum()),
        "cut_share": float(samples.cut.mean()),
        "max_new_tokens": samples.max_new_tokens,
    }
    starts = np.cumsum(lengths) - lengths
    for prefix, values in (("", -ratios), ("k3_", np.expm1(ratios) - ratios)):
        sums = np.add.reduceat(values, starts)
        rate = float(sums.sum() / lengths.sum())
        result[f"{prefix}per_sequence"] = float(sums.mean())
        result[f"{prefix}per_sequence_stderr"] = stderr(sums)
        result[f"{prefix}per_token"] = rate
        result[f"{prefix}per_token_stderr"] = ratio_stderr(sums, lengths)
    return result
