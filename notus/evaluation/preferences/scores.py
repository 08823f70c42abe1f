"""Does a model prefer the chosen completions? Accuracy and margins on pairs, alone or against a base."""

import dataclasses
import gc
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from notus.config import LoraConfig
from notus.data.chat import check_vocabulary
from notus.data.dataset import Rows
from notus.evaluation.models import ModelSource
from notus.losses import dpo_loss
from notus.model.adapter import load_adapter, read_adapter_settings
from notus.model.load import resolve_model_folder
from notus.model.lora import adapters_off
from notus.model.policy import Policy
from notus.runtime.distributed import main_first, say
from notus.training.parallelize import build_policy, read_model_config
from notus.training.scoring import score_all, score_tokens

DEFAULT_TOKENS_PER_ROW = 4096


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What to score, and how.

    Attributes:
        pairs: tokenised pairs.
        tokenizer: what made the rows; its ids must fit the model's vocabulary.
        precision: "bf16" or "fp32".
        device: this rank's device.
        samples: other rows, scored token by token; None: there are none.
        tokens_per_row: the most tokens of a packed row; None: 4096, or the longest pair's.
        trust_remote_code: run model code that comes with a folder.
    """

    pairs: Rows
    tokenizer: PreTrainedTokenizerBase
    precision: str
    device: torch.device
    samples: Rows | None = None
    tokens_per_row: int | None = None
    trust_remote_code: bool = False


class Scores(NamedTuple):
    """Log-probs on the host, in nats: of the pairs' completions, fp32 [n, 2]; of the samples' tokens, fp32 [tokens]."""

    pairs: Tensor
    samples: Tensor | None


def score_model(source: ModelSource, scoring: Scoring) -> Scores:
    """Score under a model, which is loaded, sharded, for this and freed again; collective.

    Raises:
        ValueError: a model that cannot be loaded, rows that do not fit, log-probs that are not finite.
    """
    _check_fits(scoring)
    policy = _build(source, scoring)
    scores = _score(policy, source.name, scoring)
    del policy
    free_memory()
    return scores


def score_adapter(source: ModelSource, scoring: Scoring) -> tuple[Scores, Scores]:
    """Score under an adapter and, with it switched off, under its own base, which is loaded once for both."""
    _check_fits(scoring)
    policy = _build(source, scoring)
    adapted = _score(policy, source.name, scoring)
    with adapters_off(policy.causal_lm):
        base = _score(policy, str(source.base), scoring)
    del policy
    free_memory()
    return adapted, base


def _check_fits(scoring: Scoring) -> None:
    longest = int(scoring.pairs.lengths.max())
    if scoring.tokens_per_row is not None and scoring.tokens_per_row < longest:
        raise ValueError(
            f"--tokens-per-row {scoring.tokens_per_row} is less than the longest pair ({longest} tokens): raise it, "
            "or lower --max-length"
        )


def _score(policy: Policy, name: str, scoring: Scoring) -> Scores:
    pairs, samples, device = scoring.pairs, scoring.samples, scoring.device
    room = scoring.tokens_per_row or DEFAULT_TOKENS_PER_ROW
    logps = score_all(
        policy,
        pairs,
        tokens_per_row=max(room, int(pairs.lengths.max())),
        device=device,
        on_part=lambda done, total: say(f"{name}: {done}/{total} pairs"),
    )
    bad = torch.nonzero(~torch.isfinite(logps).all(dim=1)).flatten().tolist()
    if bad:
        raise ValueError(
            f"{name}: log-probs are not finite for kept rows {bad[:10]} ({len(bad)} in all); check "
            "the weights, or use --precision fp32"
        )
    if samples is None:
        return Scores(logps, None)
    tokens = score_tokens(policy, samples, tokens_per_row=max(room, int(samples.lengths.max())), device=device)
    if not torch.isfinite(tokens).all():
        raise ValueError(f"{name}: log-probs of samples are not finite; check the weights, or use --precision fp32")
    return Scores(logps, tokens)


def _build(source: ModelSource, scoring: Scoring) -> Policy:
    trust = scoring.trust_remote_code
    folder: Path = main_first(lambda: resolve_model_folder(source.base or source.folder))
    config = read_model_config(folder, trust_remote_code=trust)
    check_vocabulary(scoring.tokenizer, config.vocab_size)
    policy = build_policy(
        folder,
        config,
        device=scoring.device,
        precision=scoring.precision,
        lora=_lora_config(source.folder) if source.base else None,
        trainable=False,
        trust_remote_code=trust,
    )
    if source.base:
        load_adapter(policy.causal_lm, source.folder)
    return policy


def _lora_config(folder: Path) -> LoraConfig:
    settings = read_adapter_settings(folder)
    return LoraConfig(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings["lora_dropout"],
        target_modules=settings["target_modules"],
        rslora=settings["use_rslora"],
    )


def free_memory() -> None:
    """Give back what the model held: FSDP's state and its modules refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def preference_metrics(policy: Tensor, base: Tensor | None, lengths: Tensor, *, beta: float | None) -> dict[str, float]:
    """Means over pairs of what a model makes of the chosen and the rejected completions.

    Args:
        policy: [n, 2] summed log-probs of (chosen, rejected) under the model, in nats.
        base: [n, 2] the same under the base; None: there is none.
        lengths: [n, 2] completion tokens.
        beta: the scale of the rewards; None without a base.

    Returns:
        For each measure `<measure>/chosen`, `/rejected`, `/margins` (chosen - rejected) and `/accuracies`
        (share of pairs with a positive margin, a tie counting half). The measures are `logps` (summed),
        `logps_per_token` and, with a base, `rewards`, β·(policy - base), beside which stands `loss`, the mean
        sigmoid DPO loss.
    """
    policy = policy.double()
    measures = {"logps": policy, "logps_per_token": policy / lengths}
    metrics: dict[str, float] = {}
    if base is not None:
        assert beta is not None, "rewards need a beta"
        losses, chosen, rejected = dpo_loss(*policy.unbind(1), *base.double().unbind(1), beta=beta)
        metrics["loss"] = losses.mean().item()
        measures = {"rewards": torch.stack([chosen, rejected], dim=1), **measures}
    for name, values in measures.items():
        metrics.update(_compare(name, values))
    return metrics


def _compare(name: str, values: Tensor) -> dict[str, float]:
    chosen, rejected = values.unbind(1)
    margins = chosen - rejected
    return {
        f"{name}/chosen": chosen.mean().item(),
        f"{name}/rejected": rejected.mean().item(),
        f"{name}/margins": margins.mean().item(),
        f"{name}/accuracies": (0.5 * (1 + margins.sign())).mean().item(),
    }
