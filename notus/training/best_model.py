"""Which evaluation was the best: the metrics that can decide it, and what is kept of them in a run's progress."""

import math
from collections.abc import Iterable, Mapping

from notus.config import Config, nearest
from notus.training.checkpoint import Progress
from notus.training.objective import objective_of

# Whether a higher value is better. Metrics of which neither can be said (`kl`, `rewards/rejected`) decide nothing.
HIGHER_IS_BETTER = {
    "eval_loss": False,
    "eval_nll_loss": False,
    "eval_rewards/accuracies": True,
    "eval_rewards/margins": True,
    "eval_rewards/chosen": True,
    "eval_rewards/kendall_tau": True,
    "eval_rewards/top_1": True,
    "eval_logps/chosen": True,
    "eval_logps/chosen_change": True,
    "eval_logps/chosen_per_token": True,
}


def deciding_metrics(names: Iterable[str]) -> list[str]:
    """Return those of the evaluation metrics `names` for which it is known whether higher or lower is better."""
    return [name for name in names if name in HIGHER_IS_BETTER or name.startswith("eval_loss/")]


def check_best_metric(config: Config) -> None:
    """Raise ValueError, with the valid names, if `training.best_metric` is no metric of this run's evaluations."""
    name = config.training.best_metric
    if name is None:
        return
    # the evaluations of SFT have the loss alone
    names = ["loss"] if config.task == "sft" else objective_of(config.dpo).metric_names()
    valid = deciding_metrics(f"eval_{each}" for each in names)
    if name not in valid:
        what = "SFT" if config.task == "sft" else "this dpo.loss_type"
        hint = nearest(name, valid)
        listed = "" if hint.startswith("; valid") else f" (valid: {', '.join(valid)})"
        raise ValueError(f"training.best_metric: {name!r} cannot choose the best model of {what}{hint}{listed}")


def judge(progress: Progress, name: str, metrics: Mapping[str, float]) -> None:
    """Note in `progress` whether the evaluation after its step is the best so far.

    Of equal values the earlier one stays the best. NaN and infinity are never the best.

    Args:
        progress: changed in place.
        name: the metric that decides.
        metrics: those of the evaluation.

    Raises:
        ValueError: the evaluation data give no such metric.
    """
    check_found(name, metrics)
    value = metrics[name]
    best, higher = progress.best_value, HIGHER_IS_BETTER.get(name, False)
    if math.isfinite(value) and (best is None or (value > best if higher else value < best)):
        progress.best_step, progress.best_value, progress.evaluations_since_best = progress.step, value, 0
    else:
        progress.evaluations_since_best += 1


def check_found(name: str, metrics: Mapping[str, float]) -> None:
    """Raise ValueError if an evaluation has no metric `name`, as that of labels that are all alike has no margins."""
    if name not in metrics:
        raise ValueError(f"training.best_metric: the evaluation data give no {name}; they give {', '.join(metrics)}")
