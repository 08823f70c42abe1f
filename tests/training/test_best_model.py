"""The best model by an evaluation metric: which it is, that it is kept and exported, and when a run ends early."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_ports, launched, run_ranks
from runs import assert_same_run, at_call, config, read_metrics, settings, terminate, write_messages
from safetensors.torch import load_file

from notus.config import config_from_dict
from notus.runtime.process import STOPPED
from notus.training import dpo, sft
from notus.training.best_model import judge
from notus.training.checkpoint import Progress, checkpoints_in, step_of

# 13 rows in steps of 4: 4 steps an epoch, 8 in all, an evaluation after every second.
BEST = {"data__eval_size": 5, "training__epochs": 2, "training__eval_every": 2, "training__best_metric": "eval_loss",
        "training__save_every": 3}  # fmt: skip
LORA = {"lora__rank": 2, "lora__dropout": 0.3}


@pytest.mark.parametrize(
    ("name", "values", "best", "since"),
    [
        ("eval_loss", [0.7, 0.6, 0.65], 2, 1),
        ("eval_loss", [0.7, 0.6, 0.6, 0.6], 2, 2),  # of equal ones the earlier
        ("eval_loss/sigmoid", [1.0, 2.0], 1, 1),
        ("eval_rewards/accuracies", [0.5, 0.6, 0.4, 0.7], 4, 0),
        ("eval_loss", [math.nan, 0.6, math.nan], 2, 1),
        ("eval_loss", [-math.inf, 5.0], 2, 0),
        ("eval_rewards/margins", [math.inf, -1.0, -2.0], 2, 1),
        ("eval_loss", [math.nan, math.inf], 0, 2),
    ],
)
def test_which_evaluation_is_the_best(name: str, values: list[float], best: int, since: int) -> None:
    progress = Progress()
    for step, value in enumerate(values, start=1):
        progress.step = step
        judge(progress, name, {name: value})
    assert (progress.best_step, progress.evaluations_since_best) == (best, since)
    assert progress.best_value == (values[best - 1] if best else None)


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("dpo", {"training__best_metric": "loss"}, "'loss' cannot choose the best model .* did you mean 'eval_loss'"),
        ("dpo", {"training__best_metric": "eval_rewards/accuracy"}, "did you mean 'eval_rewards/accuracies'"),
        ("dpo", {"training__best_metric": "eval_rewards/top_1"}, "valid: eval_loss, eval_rewards/chosen, "),
        ("dpo", {"training__best_metric": "eval_rewards/rejected"}, r"\(valid: eval_loss, "),
        ("dpo", {"dpo__loss_type": "simpo", "training__best_metric": "eval_logps/chosen_change"}, "cannot choose"),
        ("sft", {"training__best_metric": "eval_rewards/margins"}, "best model of SFT.*eval_loss"),
    ],
)
def test_an_unknown_metric_is_an_error_before_the_folder_is_made(
    task: str, given: dict[str, Any], message: str, tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        {"dpo": dpo.run, "sft": sft.run}[task](
            config(task, tmp_path / "run", model_folder, pairs_file, **{**BEST, **given})
        )
    assert not (tmp_path / "run").exists()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an exported model or adapter."""
    (file,) = folder.glob("*.safetensors")
    found: dict[str, torch.Tensor] = load_file(file)
    return found


def assert_equal(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def scripted(patch: pytest.MonkeyPatch, owner: type, values: dict[int, float]) -> None:
    """Let the evaluation after a step have this loss."""
    inner = owner.evaluate  # type: ignore[attr-defined]
    steps: dict[int, int] = {}

    def remember(task: Any, policy: Any, batch: Any, indices: Any) -> Any:
        steps[id(task)] = steps.get(id(task), 0)
        return row_loss(task, policy, batch, indices)

    row_loss = owner.row_loss  # type: ignore[attr-defined]
    patch.setattr(owner, "row_loss", remember)

    def evaluate(task: Any, policy: Any, on_row: Any) -> dict[str, float]:
        return {**inner(task, policy, on_row), "eval_loss": next(script)}

    script = iter(values.values())
    patch.setattr(owner, "evaluate", evaluate)
