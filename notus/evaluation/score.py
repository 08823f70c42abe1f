"""Log-probs of rows that are in memory, under models that may be: what `notus.score` computes."""

import contextlib
import copy
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notus.data.chat import ChatEncoder, check_vocabulary
from notus.data.dataset import TokenizedDataset
from notus.data.drop_report import DropReport
from notus.data.formats import Task, guess_task
from notus.data.mixture import mixed
from notus.data.sources import open_rows
from notus.data.tokenize import Rule, read_shares
from notus.evaluation.preferences.scores import Scoring, build_scored, guess_rows
from notus.evaluation.resolve_model import ChatSettings, ModelSource, find_together
from notus.model.export import load_tokenizer
from notus.model.policy import Policy
from notus.model.structure import text_config
from notus.model.supported import check_context
from notus.model.verify import PathChoice, make_policy, new_model
from notus.runtime.distributed import main_first
from notus.training.inputs import tokenizer_of
from notus.training.parallelize import check_attention, find_path, free_memory, fuse_or_check_graph
from notus.training.run_data import check_rows
from notus.training.scoring import score_all

NO_LIMIT = 2**30  # tokens: what does not fit the model is an error, and nothing is cut
AnyModel = nn.Module | ModelSource


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Most tokens of a row, and prompt tokens to keep of a longer one; None: no limit, and half of that."""

    row: int | None
    prompt: int | None

    def rule(self, encoder: ChatEncoder, task: Task, columns: Mapping[str, str]) -> Rule:
        """Return how rows become tokens. Raises ValueError for lengths that leave nothing."""
        longest = NO_LIMIT if self.row is None else self.row
        prompt = max(1, longest // 2) if self.prompt is None else self.prompt
        return Rule(encoder, task, longest, None if task == "sft" else prompt, columns)


class Scored(NamedTuple):
    """What a model says of the rows: log-probs fp32 [n, K] on the host, by which path, and why it is not packed."""

    logps: Tensor
    path: str
    reason: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Log-probs of n rows of K completions; of pairs, K = 2: chosen, rejected.

    Attributes:
        logps: fp32 [n, K], sums over the completion's tokens, in nats.
        tokens: int64 [n, K], how many tokens that are.
        rows: int64 [n], which of the rows that were passed. Rows that training would drop are left out, such as those
            with an empty completion.
        report: what was dropped or cut, and why.
        reference_logps: fp32 [n, K], the same under the reference; None: there is none.
        beta: scale of the rewards.
        path: "packed", where the prompt is computed once and sequences are packed; or "plain", the model's own forward
            pass, because of `path_reason`.
        path_reason: why the path is plain; None: it is packed.
    """

    logps: Tensor
    tokens: Tensor
    rows: Tensor
    report: DropReport
    reference_logps: Tensor | None
    beta: float
    path: str
    path_reason: str | None

    @property
    def chosen(self) -> Tensor:
        """fp32 [n]: the log-probs of the first completions, which of pairs are the chosen ones."""
        return self.logps[:, 0]

    @property
    def rejected(self) -> Tensor:
        """fp32 [n]: the log-probs of the rejected completions. Raises ValueError if the rows are not pairs."""
        self._check_pairs()
        return self.logps[:, 1]

    @property
    def rewards(self) -> Tensor:
        """fp32 [n, K]: β·(log-prob - the reference's). Raises ValueError without a reference."""
        if self.reference_logps is None:
            raise ValueError("rewards and margins are relative to a reference: pass reference= to notus.score")
        return self.beta * (self.logps - self.reference_logps)

    @property
    def margins(self) -> Tensor:
        """fp32 [n]: the chosen completion's reward minus the rejected one's. Raises ValueError as `rewards`."""
        self._check_pairs()
        return self.rewards[:, 0] - self.rewards[:, 1]

    def _check_pairs(self) -> None:
        if self.logps.shape[1] != 2:
            raise ValueError(f"the rows have {self.logps.shape[1]} completions each, so they are not pairs: use logps")


def read_model(model: object, name: str, *, device: torch.device, trust: bool) -> tuple[AnyModel, torch.device]:
    """Find what a model argument means, and the device to compute on; collective.

    Raises:
        ValueError: naming the argument, if it is no model.
    """
    if isinstance(model, str | os.PathLike):
        return find_together(os.path.expanduser(model), trust_remote_code=trust), device
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(f"{name}: is a {type(model).__name__}; give a folder, a hub id or a transformers model")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        places = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{name}: its weights are on {places}; put them on one device, or give the model's folder")
    return model, devices.pop()


def tokenizer_for(model: AnyModel, given: PreTrainedTokenizerBase | None, trust: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was passed, or that of the model. Raises ValueError if there is none."""
    if given is not None:
        return given
    return load_tokenizer(model.folder, trust) if isinstance(model, ModelSource) else tokenizer_of(model, trust)


def tokenize(
    rows: "str | os.PathLike[str] | datasets.Dataset | Sequence[Any]",
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatSettings,
    lengths: Lengths,
    columns: Mapping[str, str],
) -> tuple[TokenizedDataset, DropReport]:
    """Tokenize rows of any form that training takes, or (prompt, completion) tuples; collective.

    Raises:
        ValueError: as `load_pairs`.
    """
    source: Any = rows
    if isinstance(rows, str | os.PathLike):
        source = os.path.expanduser(os.fspath(rows))
        task = main_first(lambda: guess_rows(source, "train"))
    else:
        source = _named_columns(rows)
        task = _task_of(source, columns)
    rule = lengths.rule(chat.encoder(tokenizer), task, columns)
    shares, report = main_first(lambda: read_shares(source, rule))
    return TokenizedDataset(mixed(shares, seed=0)), report


def _named_columns(rows: Any) -> Any:
    """Turn (prompt, completion) tuples into mappings."""
    if not isinstance(rows, Sequence) or not rows or not isinstance(rows[0], tuple):
        return rows
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, tuple) or len(row) != 2:
            raise ValueError(f"rows, row {number}: is not a tuple (prompt, completion), as the first is")
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows]


def _task_of(rows: Any, columns: Mapping[str, str]) -> Task:
    """Return what the first row is for."""
    first = rows[0] if isinstance(rows, Sequence | datasets.Dataset) and len(rows) else None
    if isinstance(first, Mapping):
        return guess_task(first, columns)
    open_rows(rows)  # raises what is wrong with them
    raise AssertionError(type(first))


def score_rows(model: AnyModel, name: str, scoring: Scoring) -> Scored:
    """Score rows under a model; collective.

    Raises:
        ValueError: the rows do not fit the model, or log-probs are not finite.
    """
    policy = build_scored(model, scoring) if isinstance(model, ModelSource) else _borrow(model, name, scoring)
    path, reason = policy.path, policy.path_reason
    room = max(scoring.tokens_per_row or 0, int(scoring.pairs.lengths.max()))
    on_device: Any = torch.cuda.device(scoring.device) if scoring.device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        logps = score_all(policy, scoring.pairs, tokens_per_row=room, device=scoring.device)
    del policy
    free_memory()
    bad = torch.nonzero(~torch.isfinite(logps).all(dim=1)).flatten().tolist()
    if bad:
        place = scoring.pairs.info(bad[0]).place
        raise ValueError(
            f"{name}: {len(bad)} rows have log-probs that are not finite, the first is {place}; check the weights"
        )
    return Scored(logps, path, reason)


def _borrow(causal_lm: nn.Module, name: str, scoring: Scoring) -> Policy:
    """Make a policy of a loaded model: other modules over the same weights, so that the model stays as it is."""
    longest, config = scoring.pairs.longest_sequence, text_config(causal_lm.config)  # type: ignore[arg-type]
    check_vocabulary(scoring.tokenizer, config.vocab_size)
    check_rows(scoring.pairs, scoring.tokenizer, config.vocab_size)
    check_context(config, longest, "max_length", model=name)
    tensors = [*causal_lm.parameters(), *causal_lm.buffers()]
    twin: Any = copy.deepcopy(causal_lm, {id(tensor): tensor for tensor in tensors})
    reason = _changed(causal_lm, scoring.trust_remote_code)
    if reason is not None:
        return make_policy(twin, PathChoice("plain", reason))
    path = find_path(
        twin.config, "auto", longest=longest, device=scoring.device, trust_remote_code=scoring.trust_remote_code
    )
    twin.set_attn_implementation(path.implementation)
    if path.name == "packed":
        dtype = next(causal_lm.parameters()).dtype
        check_attention(twin, scoring.device, dtype)
        fuse_or_check_graph(twin, scoring.device, dtype, compile=False)
    return make_policy(twin, path)


def _changed(causal_lm: nn.Module, trust_remote_code: bool) -> str | None:
    """Say why a loaded model may not compute what its config says, so that only its own forward pass is right."""
    if not isinstance(causal_lm, PreTrainedModel):
        return f"it is a {type(causal_lm).__name__}, and no model of transformers itself"
    if getattr(causal_lm, "hf_quantizer", None) is not None:
        return "its weights are quantized"
    if len({parameter.dtype for parameter in causal_lm.parameters()}) > 1:
        return "its weights have several dtypes"
    for path, module in causal_lm.named_modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return f"{path or 'the model'} has a hook or another forward"
    try:
        fresh = new_model(copy.deepcopy(causal_lm.config), "eager", trust_remote_code, torch.float32, "meta")
    except ValueError as error:
        return f"no model can be made of its config ({error})"
    kinds = functools.partial(map, lambda pair: (pair[0], type(pair[1])))
    if list(kinds(fresh.named_modules())) != list(kinds(causal_lm.named_modules())):
        return "it has other modules than its config says"
    return None
