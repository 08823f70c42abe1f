"""Reward margins of pairs under a DPO run: β·((policy − reference) of the chosen − the same of the rejected)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from notus.data_browser.rows import Data
from notus.evaluation.preferences.scores import Scoring, score_adapter, score_model
from notus.evaluation.resolve_model import ModelSource, find_base, find_together, switches_to
from notus.runtime.distributed import on_main, say
from notus.training.checkpoint import checkpoints_in, read_identity
from notus.training.reference import stored_logps
from notus.training.run_folder import CHECKPOINTS, REFERENCE


def reward_margins(run: str, data: Data, device: torch.device, *, trust_remote_code: bool) -> np.ndarray:
    """Score a split's pairs under a run's newest model; collective.

    The reference's log-probs are those that the run keeps, if it trained on or evaluated these very rows; else, and
    with `model.quantization`, its reference is scored, too.

    Returns:
        fp64 [n] margins in nats.

    Raises:
        ValueError: rows that are no pairs, a folder that is no DPO run, or a model that does not fit the rows.
    """
    if data.task != "dpo":
        raise ValueError("--run has no effect on demonstrations, which have no margin: leave it out")
    model = find_together(run, trust_remote_code=trust_remote_code)
    if model.run is None or "dpo" not in model.settings:
        raise ValueError(f"{run}: no DPO run; name the folder in training.output_dir of one")
    scoring = Scoring(
        pairs=data.rows,
        tokenizer=data.tokenizer,
        precision=model.settings["training"]["precision"],
        device=device,
        trust_remote_code=trust_remote_code,
    )
    policy, reference = _logps(model, scoring)
    ratios = policy.double() - reference.double()
    return np.asarray(model.settings["dpo"]["beta"] * (ratios[:, 0] - ratios[:, 1]).numpy())


def _logps(model: ModelSource, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Log-probs of the pairs under the policy and its reference, fp32 [n, 2] each."""
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
    """The log-probs that the run's checkpoints name, if they cover all of the pairs.

    Those of a run with a quantised base do not count: here the policy is scored on the base as it was.
    """
    assert model.run is not None
    if model.settings["model"].get("quantization"):
        return None
    folder = Path(model.settings["reference"]["cache_dir"] or model.run / REFERENCE).expanduser()
    identities = [read_identity(path) for path in checkpoints_in(model.run / CHECKPOINTS)]
    names = {each[key] for each in identities for key in ("reference.train", "reference.eval") if key in each}
    return stored_logps([folder / f"{name}.safetensors" for name in sorted(names)], scoring.pairs.digests())
