"""Held-out pairs, lists or labelled completions, and their log-probs under a model, an adapter or its base."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from notus.config import config_from_dict
from notus.data.chat import check_vocabulary
from notus.data.dataset import TokenizedDataset
from notus.data.formats import Task, guess_task
from notus.data.mixture import mixed
from notus.data.sources import data_suffix, open_source, read_rows
from notus.data.tokenize import Rule, read_shares
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
from notus.training.parallelize import build_policy, free_memory, read_model_config
from notus.training.reference import digest_of_rows
from notus.training.run_data import check_rows, load_held_out
from notus.training.run_folder import CHECKPOINTS
from notus.training.scoring import score_all, score_tokens

DEFAULT_TOKENS_PER_ROW = 4096
_FIRST_ROWS = 100  # rows to look at, to see what they are for


class Tokenization(NamedTuple):
    """How rows become tokens; see `load_pairs`."""

    max_length: int
    max_prompt_length: int
    chat: ChatSettings

    def rule(self, tokenizer: PreTrainedTokenizerBase, task: Task) -> Rule:
        """Return the same as a rule for rows of a task. Raises ValueError as `ChatEncoder` and `Rule`."""
        return Rule(self.chat.encoder(tokenizer), task, self.max_length, self.max_prompt_length)


def name_pairs(model: ModelSource, given: str | None) -> str:
    """Return what the figures call the rows: as the user named them, or those that the model's run held out.

    Raises ValueError if none are given, and the model is no run with held-out rows.
    """
    if given is not None:
        return given
    data = model.settings.get("data", {})
    if "dpo" not in model.settings or not (data.get("eval") or data.get("eval_size")):
        raise ValueError(f"{model.name}: no DPO run that held rows out: name held-out pairs or lists with --pairs")
    if data.get("eval"):
        return ", ".join(source["path"] for source in data["eval"])  # a resolved config has a list
    size = data["eval_size"]
    return f"{size} rows held out of data.train" if isinstance(size, int) else f"{size:g} of the rows of data.train"


def guess_rows(path: str, split: str) -> Task:
    """Return what the first readable row of a file or data set is for: "lists", "labels", else "dpo".

    Raises ValueError or OSError as `open_source`; for rows of no known form, reading them as pairs does.
    """
    source = open_source(path, split)
    first = range(min(_FIRST_ROWS, len(source.rows)))
    for _, row in read_rows(source, source.rows[: len(first)], first):
        if isinstance(row, ValueError):
            continue
        try:
            task = guess_task(row)
        except ValueError:  # reported, with its place, where all rows are read
            continue
        return "dpo" if task == "sft" else task
    return "dpo"


def load_rows_of(
    model: ModelSource,
    given: str | None,
    split: str | None,
    tokenizer: PreTrainedTokenizerBase,
    tokenization: Tokenization,
) -> tuple[TokenizedDataset, Task]:
    """Read and tokenise the rows, and say what they are; within a process group, rank 0 first.

    Raises ValueError as `load_pairs` does, or if what the run held out is not there any more.
    """
    name = name_pairs(model, given)
    if given is None:
        config = config_from_dict(dict(model.settings), "dpo", source=model.name)
        _check_there(model, config.data.eval or config.data.train)
        rows = load_held_out(config.data, tokenizer, task=config.rows, seed=config.training.seed)
        _check_held_out(model, rows)
        return rows, config.rows
    part = split or "train"
    task: Task = main_first(lambda: guess_rows(given, part))
    rule = tokenization.rule(tokenizer, task)
    shares, report = main_first(lambda: read_shares([{"path": given, "split": part}], rule))
    say(f"{name} {report}")
    return TokenizedDataset(mixed(shares, seed=0)), task


def _check_there(model: ModelSource, sources: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if a data file of the run is not where it was: its path may be relative to another folder."""
    for source in sources:
        path = Path(str(source["path"])).expanduser()
        if data_suffix(path) and not path.exists() and "://" not in str(source["path"]):
            raise ValueError(
                f"{model.name}: {path}, where its held-out rows are, is not there: call this from the folder that the "
                "run was trained in, restore the file, or name held-out pairs or lists with --pairs"
            )


def _check_held_out(model: ModelSource, rows: TokenizedDataset) -> None:
    """Raise ValueError if these are not the rows that the run held out.

    From data that changed since, others would be held out, which the model may have learned from.
    """
    if model.run is None:
        return
    run = model.run
    known = on_main(lambda: [read_identity(path).get("data.eval") for path in checkpoints_in(run / CHECKPOINTS)])
    if any(known) and digest_of_rows(rows.digests()) not in known:
        raise ValueError(
            f"{model.name}: the rows that it held out are no longer what they were: its data, or how they become "
            "tokens, changed since; restore them, or name held-out pairs or lists with --pairs"
        )


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What to score, and how."""

    pairs: TokenizedDataset  # tokenised pairs, or lists or labelled completions
    tokenizer: PreTrainedTokenizerBase  # what made the rows; its ids must fit the model's vocabulary
    precision: str  # "bf16" or "fp32"
    device: torch.device  # this rank's device
    tokens_per_row: int | None = None  # the most tokens of a packed row; None: 4096, or the longest row's
    trust_remote_code: bool = False  # run model code that comes with a folder


class Scores(NamedTuple):
    """Log-probs on the host, in nats: of the completions, fp32 [n, K]; of the samples' tokens, fp32 [tokens].

    That of a completion that a list lacks is 0.
    """

    pairs: Tensor
    samples: Tensor | None


def score_model(source: ModelSource, scoring: Scoring, samples: TokenizedDataset | None = None) -> Scores:
    """Score under a model, which is loaded, sharded, for this and freed again; collective.

    `samples` are other rows, scored token by token. Raises ValueError for a model that cannot be loaded, rows that do
    not fit, and log-probs that are not finite.
    """
    policy = build_scored(source, scoring)
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
    policy = build_scored(source, scoring)
    adapted = _score(policy, source.name, scoring, samples)
    with adapters_off(policy.causal_lm):
        base = _score(policy, str(source.base), scoring, samples)
    del policy
    free_memory()
    return adapted, base


def _score(policy: Policy, name: str, scoring: Scoring, samples: TokenizedDataset | None) -> Scores:
    rows, device = scoring.pairs, scoring.device
    instead = "" if scoring.precision == "fp32" else ", or use --precision fp32"
    room = scoring.tokens_per_row or DEFAULT_TOKENS_PER_ROW
    logps = score_all(
        policy,
        rows,
        tokens_per_row=max(room, int(rows.lengths.max())),
        device=device,
        on_part=lambda done, total: say(f"{name}: {done}/{total} rows"),
    )
    bad = torch.nonzero(~torch.isfinite(logps).all(dim=1)).flatten().tolist()
    if bad:
        raise ValueError(
            f"{name}: log-probs are not finite for kept rows {bad[:10]} ({len(bad)} in all); check the weights{instead}"
        )
    if samples is None:
        return Scores(logps, None)
    tokens = score_tokens(policy, samples, tokens_per_row=max(room, int(samples.lengths.max())), device=device)
    if not torch.isfinite(tokens).all():
        raise ValueError(f"{name}: log-probs of samples are not finite; check the weights{instead}")
    return Scores(logps, tokens)


def build_scored(source: ModelSource, scoring: Scoring) -> Policy:
    """Load a model for scoring; collective. Raises ValueError if that fails, or if the rows do not fit it."""
    longest = int(scoring.pairs.lengths.max())
    if scoring.tokens_per_row is not None and scoring.tokens_per_row < longest:
        raise ValueError(
            f"--tokens-per-row {scoring.tokens_per_row} is less than the longest row ({longest} tokens): raise it, "
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
