"""Reward margins of rows under a run of `train_dpo.py`: how far the policy agrees with what the data say of a row.

A completion's reward is that of the run's loss, β·(policy − reference) of its log-probs where the loss has a reference.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from notus.data.dataset import TokenizedDataset
from notus.data_browser.rows import Data
from notus.evaluation.preferences.metrics import Rewards
from notus.evaluation.preferences.scores import Scoring, score_adapter, score_model
from notus.evaluation.resolve_model import ModelSource, find_base, find_together, switches_to
from notus.evaluation.run_loss import read_loss
from notus.runtime.distributed import on_main, say
from notus.training.checkpoint import checkpoints_in, read_identity
from notus.training.reference import stored_logps
from notus.training.run_folder import CHECKPOINTS, REFERENCE


def reward_margins(run: str, data: Data, device: torch.device, *, trust_remote_code: bool) -> np.ndarray:
    """Score a split's rows under a run's newest model; collective.

    The reference's log-probs are those that the run keeps, if it trained on or evaluated these very rows; else, and
    with `model.quantization`, its reference is scored, too.

    Returns:
        fp64 [n] margins in nats, see `margins_of`.

    Raises:
        ValueError: rows that are demonstrations, a folder that is no DPO run, or a model that does not fit the rows.
    """
    if data.task == "sft":
        raise ValueError("--run has no effect on demonstrations, which have no margin: leave it out")
    model = find_together(run, trust_remote_code=trust_remote_code)
    if model.run is None or "dpo" not in model.settings:
        raise ValueError(f"{run}: no DPO run; name the folder in training.output_dir of one")
    loss = read_loss(model.settings, run)
    assert loss is not None
    scoring = Scoring(
        pairs=data.rows,
        tokenizer=data.tokenizer,
        precision=model.settings["training"]["precision"],
        device=device,
        trust_remote_code=trust_remote_code,
    )
    policy, reference = _logps(model, scoring) if loss.reference else (score_model(model, scoring).pairs, None)
    rewards = Rewards(loss.beta, relative=loss.reference, per_token=loss.per_token)
    return margins_of(rewards(policy, reference, torch.from_numpy(data.rows.loss_tokens)).numpy(), data.rows)


def margins_of(rewards: np.ndarray, rows: TokenizedDataset) -> np.ndarray:
    """The margin of every row: the best completion's reward minus the worst's.

    That is the chosen's minus the rejected's of a pair, and the first's minus the last's of a list. The margin of a
    labelled completion is its reward, with the sign changed if it is a bad one.

    Args:
        rewards: fp64 [n, K]; those of missing completions are not looked at.
        rows: the rows [n].

    Returns:
        fp64 [n].
    """
    if rows.labels is not None:
        return np.where(rows.labels, rewards[:, 0], -rewards[:, 0])
    return np.asarray(rewards[:, 0] - rewards[np.arange(len(rows)), rows.branch_counts - 1])


def _logps(model: ModelSource, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Log-probs of the rows under the policy and its reference, fp32 [n, K] each."""
    stored = on_main(lambda: _stored_reference(model, scoring))
    if stored is not None:
        say("reference log-probs: read from the run")
        return score_model(model, scoring).pairs, stored
    start = find_base(model, trust_remote_code=scoring.trust_remote_code)
    assert start is not None  # of a DPO run
    if switches_to(model, start):
        adapted, base = score_adapter(model, scoring)
        return adapted.pairs, base.pairs
    return score_model(model, scoring).pairs, score_model(start, scoring).pairs


def _stored_reference(model: ModelSource, scoring: Scoring) -> Tensor | None:
    """The log-probs that the run's checkpoints name, if they cover all of the rows.

    Those of a run with a quantised base do not count: here the policy is scored on the base as it was.
    """
    assert model.run is not None
    if model.settings["model"].get("quantization"):
        return None
    folder = Path(model.settings["reference"]["cache_dir"] or model.run / REFERENCE).expanduser()
    identities = [read_identity(path) for path in checkpoints_in(model.run / CHECKPOINTS)]
    names = {each[key] for each in identities for key in ("reference.train", "reference.eval") if key in each}
    files = [folder / f"{name}.safetensors" for name in sorted(names)]
    return stored_logps(files, scoring.pairs.digests(), scoring.pairs.num_branches)
