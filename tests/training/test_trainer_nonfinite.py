"""A NaN on one of two ranks ends the run on both, before an update could carry it into the weights."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_ports, launched, run_ranks
from runs import settings

from notus.config import config_from_dict
from notus.model.policy import Policy
from notus.training import dpo, objective, trainer


def _poison_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its third step, one pair's loss."""
    inner, calls = objective.pair_loss, []

    def poisoned(*args: Any, **options: Any) -> Any:
        losses, rewards = inner(*args, **options)
        calls.append(1)
        if len(calls) == 3:
            losses = losses * torch.tensor([float("nan")] + [1.0] * (len(losses) - 1))
        return losses, rewards

    monkeypatch.setattr(objective, "pair_loss", poisoned)


def _poison_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its third step, one element of one gradient."""
    inner, calls = trainer.local_gradients, []

    def poisoned(parameters: Any) -> Any:
        gradients = inner(parameters)
        calls.append(1)
        if len(calls) == 3:
            next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = float("nan")
        return gradients

    monkeypatch.setattr(trainer, "local_gradients", poisoned)


def _poison_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row that the reference scores."""
    inner, calls = Policy.forward, []

    def poisoned(*args: Any) -> Any:
        calls.append(1)
        return inner(*args) * (float("nan") if len(calls) == 1 else 1.0)

    monkeypatch.setattr(Policy, "forward", poisoned)


POISONS = {"loss": _poison_loss, "gradient": _poison_gradient, "reference": _poison_reference}


def _train_on_ranks(trees: dict[int, tuple[str, Any]], folder: Path) -> None:
    for port, (kind, tree) in trees.items():
        with launched(port) as rank, pytest.MonkeyPatch.context() as monkeypatch:
            if rank == 1:
                POISONS[kind](monkeypatch)
            with pytest.raises(ValueError, match="not finite") as caught:
                dpo.run(config_from_dict(tree, "dpo"))
            (folder / f"{kind}-{rank}.txt").write_text(str(caught.value))


def test_a_nan_on_one_rank_stops_both_before_the_update(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    options: dict[str, Any] = {"data__shuffle": False, "training__save_every": 1, "training__keep_checkpoints": None}
    trees = {
        port: (kind, settings(tmp_path / kind, model_folder, pairs_file, **options))
        for port, kind in zip(free_ports(3), POISONS, strict=True)
    }
    run_ranks(_train_on_ranks, 2, tmp_path, trees, tmp_path)
    told = {kind: {(tmp_path / f"{kind}-{rank}.txt").read_text() for rank in (0, 1)} for kind in POISONS}
    assert {kind: len(texts) for kind, texts in told.items()} == dict.fromkeys(POISONS, 1)  # both ranks say the same
    loss, gradient, reference = (texts.pop() for texts in told.values())
    place = rf"{re.escape(str(pairs_file))}, line (9|10|11|12)"
    assert re.match(rf"step 3: the loss of rows \({place}\) is not finite; the update was not made", loss)
    assert gradient.startswith("step 3: the gradient (every loss is finite) is not finite; the update was not made")
    assert reference.startswith("the reference model gives log-probs that are not finite for rows (")
    assert gradient.endswith(" Lower training.learning_rate")  # the run is in fp32 already
    assert "precision" not in loss + reference
    for kind, steps in {"loss": 2, "gradient": 2, "reference": 0}.items():
        saved = [path.name for path in sorted((tmp_path / kind / "checkpoints").glob("step-*"))]
        assert saved == [f"step-{step:08d}" for step in range(1, steps + 1)]
        assert not (tmp_path / kind / "model").exists()
    assert not list((tmp_path / "reference" / "reference").rglob("*.safetensors"))
