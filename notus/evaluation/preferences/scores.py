"""Held-out pairs, and their log-probs under a model, an adapter or its base."""

import dataclasses
import gc
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from notus.config import config_from_dict
from notus.data.chat import check_vocabulary
from notus.data.dataset import TokenizedDataset
from notus.data.tokenize import load_pairs
from notus.evaluation.resolve_model import ChatSettings, ModelSource
from notus.model.load import resolve_model_folder
from notus.model.lora import adapters_off
from notus.model.new_tokens import enlarge
from notus.model.peft_format import read_adapter
from notus.model.policy import Policy
from notus.model.structure import text_config
from notus.model.supported import check_context
from notus.runtime.distributed import main_first, on_main, say
from notus.training.checkpoint import checkpoints_in, read_identity
from notus.training.parallelize import build_policy, read_model_config
from notus.training.reference import digest_of_rows
from notus.training.run_data import check_rows, load_held_out
from notus.training.run_folder import CHECKPOINTS
from notus.training.scoring import score_all, score_tokens

DEFAULT_TOKENS_PER_ROW = 4096


class Tokenization(NamedTuple):
    """How pairs become tokens; see `load_pairs`."""

    max_length: int
    max_prompt_length: int
    chat: ChatSettings


def name_pairs(model: ModelSource, given: str | None) -> str:
    """Return what the figures call the pairs: as the user named them, or those that the model's run held out.

    Raises ValueError if none are given, and the model is no run with held-out pairs.
    """
    if given is not None:
        return given
    data = model.settings.get("data", {})
    if "dpo" not in model.settings or not (data.get("eval") or data.get("eval_size")):
        raise ValueError(f"{model.name}: no DPO run that held pairs out: name held-out pairs with --pairs")
    if data.get("eval"):
        return ", ".join(source["path"] for source in data["eval"])  # a resolved config has a list
    return f"{data['eval_size']} rows held out of data.train"


def load_pairs_of(
    model: ModelSource,
    given: str | None,
    split: str | None,
    tokenizer: PreTrainedTokenizerBase,
    tokenization: Tokenization,
) -> TokenizedDataset:
    """Read and tokenise the pairs; within a process group, rank 0 first.

    Raises ValueError as `load_pairs` does, or if what the run held out is not there any more.
    """
    name = name_pairs(model, given)
    if given is None:
        config = config_from_dict(dict(model.settings), "dpo", source=model.name)
        rows = load_held_out(config.data, tokenizer, task="dpo", seed=config.training.seed)
    else:
        dataset, report = main_first(
            lambda: load_pairs(
                [{"path": given, "split": split or "train"}],
                tokenizer,
                max_length=tokenization.max_length,
                max_prompt_length=tokenization.max_prompt_length,
                chat_template=tokenization.chat.chat_template,
                chat_template_kwargs=tokenization.chat.chat_template_kwargs,
                template_date=tokenization.chat.template_date,
                add_empty_system=tokenization.chat.add_empty_system,
                mask_history=tokenization.chat.mask_history,
                split_special_tokens=tokenization.chat.split_special_tokens,
            )
        )
        say(f"{name} {report}")
        rows = TokenizedDataset(dataset)
    if model.run is not None and given is None:
        # From data that changed since, others would be held out, which the model may have learned from.
        run = model.run
        known = on_main(lambda: [read_identity(path).get("data.eval") for path in checkpoints_in(run / CHECKPOINTS)])
        if any(known) and digest_of_rows(rows.digests()) not in known:
            raise ValueError(
                f"{model.name}: the pairs that it held out are no longer what they were: its data, or how they become "
                "tokens, changed since; restore them, or name held-out pairs with --pairs"
            )
    return rows


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What to score, and how."""

    pairs: TokenizedDataset  # tokenised pairs
    tokenizer: PreTrainedTokenizerBase  # what made the rows; its ids must fit the model's vocabulary
    precision: str  # "bf16" or "fp32"
    device: torch.device  # this rank's device
    tokens_per_row: int | None = None  # the most tokens of a packed row; None: 4096, or the longest pair's
    trust_remote_code: bool = False  # run model code that comes with a folder


class Scores(NamedTuple):
    """Log-probs on the host, in nats: of the pairs' completions, fp32 [n, 2]; of the samples' tokens, fp32 [tokens]."""

    pairs: Tensor
    samples: Tensor | None


def score_model(source: ModelSource, scoring: Scoring, samples: TokenizedDataset | None = None) -> Scores:
    """Score under a model, which is loaded, sharded, for this and freed again; collective.

    `samples` are other rows, scored token by token. Raises ValueError for a model that cannot be loaded, rows that do
    not fit, and log-probs that are not finite.
    """
    policy = _build(source, scoring)
    scores = _score(policy, source.name, scoring, samples)
    del policy
    free_memory()
    return scores


def score_adapter(
    source: ModelSource, scoring: Scoring, samples: TokenizedDataset | None = None
) -> tuple[Scores, Scores]:
    """Score under an adapter and, with it switched off, under its own base, which is loaded once for both.

    The base must be what is left then: see `switches_to`.
    """
    policy = _build(source, scoring)
    adapted = _score(policy, source.name, scoring, samples)
    with adapters_off(policy.causal_lm):
        base = _score(policy, str(source.base), scoring, samples)
    del policy
    free_memory()
    return adapted, base


def _score(policy: Policy, name: str, scoring: Scoring, samples: TokenizedDataset | None) -> Scores:
    pairs, device = scoring.pairs, scoring.device
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
    longest = int(scoring.pairs.lengths.max())
    if scoring.tokens_per_row is not None and scoring.tokens_per_row < longest:
        raise ValueError(
            f"--tokens-per-row {scoring.tokens_per_row} is less than the longest pair ({longest} tokens): raise it, "
            "or lower --max-length"
        )
    trust = scoring.trust_remote_code
    folder: Path = main_first(lambda: resolve_model_folder(source.base or source.folder))
    config = read_model_config(folder, trust_remote_code=trust)
    held = read_adapter(source.folder) if source.base else None
    new_rows = enlarge(config, max(source.rows, 0 if held is None else held.vocabulary))
    vocabulary = text_config(config).vocab_size
    check_vocabulary(scoring.tokenizer, vocabulary)
    check_rows(scoring.pairs, scoring.tokenizer, vocabulary)
    check_context(config, scoring.pairs.longest_sequence, "--max-length", model=source.name)
    return build_policy(
        folder,
        config,
        device=scoring.device,
        precision=scoring.precision,
        adapter=None if held is None else held.folder,
        continue_adapter=held is not None,
        new_tokens=new_rows,
        trainable=False,
        trust_remote_code=trust,
        path=source.choose(None, "model.path", "auto"),
        longest=scoring.pairs.longest_sequence,
    )


def free_memory() -> None:
    """Give back what the model held: FSDP's state and its modules refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
