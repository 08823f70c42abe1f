"""`training.deterministic`: it reaches every operation of a run, leaves nothing behind, and runs repeat bit for bit."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_ports, launched, run_ranks
from runs import assert_same_run, config, settings, write_pairs
from toys import toy_model_folder

from notus.config import config_from_dict
from notus.runtime.determinism import deterministic
from notus.training import dpo


def _state() -> tuple[bool, bool, bool, bool, bool, str | None]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def _nondeterministic() -> torch.Tensor:
    return torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))  # which of the two stays is left open


def test_an_operation_that_cannot_repeat_raises_and_all_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = _state()
    with deterministic(True):
        assert _state() == (True, False, False, True, False, ":4096:8")
        with pytest.raises(RuntimeError, match=r"put_ .*does not have a deterministic implementation"):
            _nondeterministic()
    assert _state() == before
    with deterministic(False):
        assert _state() == before
        _nondeterministic()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own choice, deterministic as well
    with deterministic(True):
        assert _state()[-1] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_it_is_on_before_a_device_is_chosen_and_off_after_the_run(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from notus.runtime import distributed

    before, seen = _state(), []
    pick, row_loss = distributed.pick_device, dpo.DPOTask.row_loss
    monkeypatch.setattr(distributed, "pick_device", lambda: (seen.append(_state()), pick())[1])
    monkeypatch.setattr(dpo.DPOTask, "row_loss", lambda *args: (seen.append(_state()), row_loss(*args))[1])
    for wanted in (False, True):
        overrides = {"training__deterministic": wanted, "training__max_steps": 1}
        dpo.run(config("dpo", tmp_path / str(wanted), model_folder, pairs_file, **overrides))
    assert [state[0] for state in seen] == [False, False, True, True]
    assert _state() == before


def _train_on_ranks(trees: dict[int, Any]) -> None:
    for port, tree in trees.items():
        with launched(port):
            dpo.run(config_from_dict(tree, "dpo"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_runs_are_bitwise_equal(ranks: int, tmp_path: Path) -> None:
    # Wide enough that torch's operators share their work among threads.
    model = toy_model_folder(tmp_path / "base", hidden_size=256, intermediate_size=512, head_dim=64)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 16)
    options: dict[str, Any] = {"training__deterministic": True, "training__batch_size": 8}
    names = zip(free_ports(2), ("one", "other"), strict=True)
    trees = {port: settings(tmp_path / name, model, pairs, **options) for port, name in names}
    if ranks > 1:
        run_ranks(_train_on_ranks, ranks, tmp_path, trees)
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(4)
        try:
            for tree in trees.values():
                dpo.run(config_from_dict(tree, "dpo"))
        finally:
            torch.set_num_threads(threads)
    assert_same_run(tmp_path / "one", tmp_path / "other")
