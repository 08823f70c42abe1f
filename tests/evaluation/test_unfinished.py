"""A run in progress stands for its newest whole checkpoint, whatever the run does meanwhile."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from notus.evaluation import unfinished
from notus.evaluation.models import find_source
from notus.model.export import load_causal_lm
from notus.training import distributed
from notus.training.checkpoint import DamagedCheckpointError


@pytest.fixture
def in_progress(tmp_path):
    """A copy of a run as it was before its final model."""

    def copy(run):
        ignored = shutil.ignore_patterns("model", "snapshots", "evaluations")
        return shutil.copytree(run, tmp_path / "run", ignore=ignored)

    return copy


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_causal_lm(folder, dtype=torch.float32, device="cpu")[0].named_parameters())


def same(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_full_run(full_run, in_progress, monkeypatch):
    run = in_progress(full_run)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    source = find_source(str(run))
    assert (source.name, source.run) == (f"{run} (step 2)", run)
    assert source.folder == run / "snapshots" / "step-00000002"
    assert same(source.folder, full_run / "model")
    assert set(before) <= {path.relative_to(run) for path in run.rglob("*")}
    monkeypatch.setattr(unfinished, "_write_apart", lambda *_: pytest.fail("written twice"))
    assert find_source(str(run)) == source


def test_other_ranks_take_what_the_first_found(full_run, in_progress, monkeypatch):
    run = in_progress(full_run)
    shutil.copytree(full_run / "model", run / "snapshots" / "step-00000002")
    source = find_source(str(run))
    assert source.name.endswith("(step 2)")
    shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000003")  # the run goes on
    monkeypatch.setattr(unfinished.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(unfinished.dist, "get_rank", lambda: 1)
    assert find_source(str(run)) == source


def test_no_checkpoint_yet(full_run, in_progress):
    run = in_progress(full_run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        find_source(str(run))


def test_mistakes_of_the_writing_process_are_told(full_run, in_progress):
    run = in_progress(full_run)
    (run / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        find_source(str(run))
    assert not list((run / "snapshots").glob("step-*"))


def settings(model_folder):
    return {"model": {"name_or_path": str(model_folder)}, "lora": {"rank": 0}, "data": {"chat_template": None}, "data": {"chat_template": None}}


def test_a_damaged_checkpoint_gives_way_to_an_older_one(full_run, in_progress, model_folder, capsys):
    run = in_progress(full_run)
    newer = shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000003")
    state = json.loads((newer / "state.json").read_text())
    (newer / "state.json").write_text(json.dumps({**state, "digest": "0"}))
    with distributed.process_group():
        _, _, checkpoint = unfinished.load_unfinished(run, settings(model_folder))
    assert checkpoint.name == "step-00000002"
    assert "warning" in capsys.readouterr().out


def test_a_checkpoint_that_the_run_replaces_meanwhile(full_run, in_progress, model_folder, monkeypatch):
    run = in_progress(full_run)
    folder, load = run / "checkpoints", unfinished.load_checkpoint

    def replaced(path, *args, **options):
        if path.name == "step-00000002":
            path.rename(folder / "step-00000003")
            raise DamagedCheckpointError("gone")
        return load(path, *args, **options)

    monkeypatch.setattr(unfinished, "load_checkpoint", replaced)
    with distributed.process_group():
        _, _, checkpoint = unfinished.load_unfinished(run, settings(model_folder))
    assert checkpoint.name == "step-00000003"
