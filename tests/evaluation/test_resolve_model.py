"""What MODEL_OR_RUN may be; an unfinished run stands for its newest whole checkpoint."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from notus.data.chat import ZEPHYR_TEMPLATE
from notus.evaluation import resolve_model as models
from notus.evaluation.resolve_model import ModelSource, find_source, find_together, load_unfinished
from notus.model.export import load_causal_lm
from notus.runtime import distributed
from notus.training.checkpoint import DamagedCheckpointError, Progress, describe


def test_model_adapter_and_run(model_folder, full_run, lora_run):
    assert find_source(str(model_folder)) == ModelSource(str(model_folder), model_folder)
    adapter = find_source(str(lora_run / "model"))
    assert (adapter.folder, adapter.base, adapter.settings) == (lora_run / "model", str(model_folder), {})
    of_run = find_source(str(lora_run))
    assert (of_run.folder, of_run.base) == (lora_run / "model", str(model_folder))
    assert of_run.settings["lora"]["rank"] == 3
    assert find_source(str(full_run)).base is None


def test_the_user_goes_before_the_run_before_the_default():
    source = ModelSource(
        "", None, settings={"data": {"max_length": 7, "chat_template": None, "add_empty_system": False}}
    )
    assert source.choose(3, "data.max_length", 9) == 3
    assert source.choose(None, "data.max_length", 9) == 7
    assert source.choose(None, "data.chat_template", "zephyr") == "zephyr"
    assert source.choose(None, "data.add_empty_system", True) is False
    assert source.choose(False, "data.add_empty_system", True) is False
    assert source.choose(None, "dpo.beta", 0.1) == 0.1


@pytest.mark.parametrize("text", ["a: [", "- 1", "model: 3", "\udcff", "model: {name: resnet}\ndata: {}", "{}"])
def test_rejects_a_damaged_or_foreign_config(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.yaml: not"):
        find_source(str(tmp_path))


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


def test_an_unfinished_run(full_run, in_progress):
    run = in_progress(full_run)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    source = find_source(str(run))
    assert (source.name, source.run) == (f"{run} (step 2)", run)
    assert source.folder == run / "snapshots" / "step-00000002"
    assert same(source.folder, full_run / "model")
    assert set(before) <= {path.relative_to(run) for path in run.rglob("*")}
    written = (source.folder / "config.json").stat().st_ino
    assert find_source(str(run)) == source
    assert (source.folder / "config.json").stat().st_ino == written  # used again


def find_on_two_ranks(run, reached):
    source = find_together(str(run))
    (reached / f"{dist.get_rank()}.txt").write_text(f"{source.name} {source.folder}")


def test_other_ranks_take_what_the_first_found(full_run, in_progress, tmp_path):
    run = in_progress(full_run)
    source = find_source(str(run))
    # of a checkpoint that was moved away to go back, say, or of one that another evaluation saw a moment later
    shutil.copytree(source.folder, run / "snapshots" / "step-00000003")
    run_ranks(find_on_two_ranks, 2, tmp_path, run, tmp_path)
    found = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert found == [f"{run} (step 2) {source.folder}"] * 2


def test_a_rank_that_does_not_see_the_snapshot_tells(monkeypatch, tmp_path):
    elsewhere = ModelSource("run (step 2)", tmp_path / "none", run=tmp_path)
    monkeypatch.setattr(models, "on_main", lambda _: elsewhere)
    with pytest.raises(ValueError, match="use a disk that all share"):
        find_together("run")
    monkeypatch.setattr(models, "on_main", lambda _: ModelSource("org/model", tmp_path / "none"))
    monkeypatch.setattr(models, "find_source", lambda name, **_: ModelSource(name, tmp_path))
    assert find_together("org/model").folder == tmp_path  # from this machine's own cache


def test_a_snapshot_of_an_earlier_run_is_not_taken_for_this_ones(full_run, in_progress):
    run = in_progress(full_run)
    find_source(str(run))
    made_of = run / "checkpoints" / "step-00000002"
    tensors = load_file(made_of / "rank-00000.safetensors")
    changed = next(name for name in tensors if name.startswith("model."))
    with safe_open(made_of / "rank-00000.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors[changed] += 1
    save_file(tensors, made_of / "rank-00000.safetensors", metadata)
    content = (made_of / "rank-00000.safetensors").read_bytes()
    state = json.loads((made_of / "state.json").read_text())
    progress = Progress(**state["progress"])
    files = {"rank-00000.safetensors": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    (made_of / "state.json").write_text(describe(progress, state["optimizer"], files))
    assert not same(find_source(str(run)).folder, full_run / "model")


def test_the_snapshot_of_an_older_checkpoint_is_not_written_again(full_run, in_progress):
    run = in_progress(full_run)
    newer = shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000003")
    (newer / "state.json").write_text("{}")
    first = find_source(str(run))
    assert first.name.endswith("(step 2)")
    before = (first.folder / "config.json").stat().st_ino
    assert find_source(str(run)) == first
    assert (first.folder / "config.json").stat().st_ino == before  # others may be reading it


def test_what_nobody_used_for_a_day_is_removed(full_run, in_progress):
    run = in_progress(full_run)
    two_days_ago = time.time() - 2 * 24 * 3600
    names = ("step-00000000", ".export-killed", "step-00000001", ".export-now")
    for name in names:
        (run / "snapshots" / name).mkdir(parents=True)
        (run / "snapshots" / name / "model.safetensors").touch()
    for name in names[:2]:
        os.utime(run / "snapshots" / name, (two_days_ago, two_days_ago))
    used = find_source(str(run)).folder
    assert {path.name for path in (run / "snapshots").iterdir()} == {"step-00000001", ".export-now", "step-00000002"}
    os.utime(used, (two_days_ago, two_days_ago))
    find_source(str(run))
    assert time.time() - used.stat().st_mtime < 3600


def test_the_first_of_two_exports_stays(full_run, in_progress, tmp_path):
    out = find_source(str(in_progress(full_run))).folder
    written = (out / "config.json").stat().st_ino
    made = shutil.copytree(out, tmp_path / "made")
    models._publish(made, out)
    assert (out / "config.json").stat().st_ino == written
    (made / "checkpoint.json").write_text("of another checkpoint")
    models._publish(made, out)
    assert (out / "config.json").stat().st_ino != written


def test_where_no_snapshot_can_be_written(full_run, in_progress):
    run = in_progress(full_run)
    (run / "snapshots").write_text("")
    with pytest.raises(OSError, match=r"snapshots: no results can be written there .*`notus export`"):
        find_source(str(run))


def test_no_checkpoint_yet(full_run, in_progress):
    run = in_progress(full_run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        find_source(str(run))


def test_a_failed_export_says_why(full_run, in_progress):
    run = in_progress(full_run)
    (run / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        find_source(str(run))
    assert not list((run / "snapshots").iterdir())


def settings(model_folder):
    return {"model": {"name_or_path": str(model_folder)}, "data": {"chat_template": None}, "lora": {"rank": 0}}


def test_the_learned_chat_template_is_the_tokenizers(full_run, in_progress, model_folder):
    run = in_progress(full_run)
    (run / "data.json").write_text(json.dumps({"train": {"report": {"templated": 0}}}))
    with distributed.process_group():
        _, plain, _ = load_unfinished(run, settings(model_folder))
        (run / "data.json").write_text(json.dumps({"train": {"report": {"templated": 3}}}))
        _, chat, _ = load_unfinished(run, settings(model_folder))
    assert plain.chat_template is None
    assert chat.chat_template == ZEPHYR_TEMPLATE


def test_a_damaged_checkpoint_gives_way_to_an_older_one(full_run, in_progress, model_folder, capsys):
    run = in_progress(full_run)
    newer = shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000003")
    state = json.loads((newer / "state.json").read_text())
    (newer / "state.json").write_text(json.dumps({**state, "digest": "0"}))
    with distributed.process_group():
        _, _, checkpoint = load_unfinished(run, settings(model_folder))
    assert checkpoint.name == "step-00000002"
    assert "warning" in capsys.readouterr().out


def test_a_checkpoint_that_the_run_replaces_meanwhile(full_run, in_progress, model_folder, monkeypatch):
    run = in_progress(full_run)
    folder, load = run / "checkpoints", models.load_checkpoint

    def replaced(path, *args, **options):
        if path.name == "step-00000002":
            path.rename(folder / "step-00000003")
            raise DamagedCheckpointError("gone")
        return load(path, *args, **options)

    monkeypatch.setattr(models, "load_checkpoint", replaced)
    with distributed.process_group():
        _, _, checkpoint = load_unfinished(run, settings(model_folder))
    assert checkpoint.name == "step-00000003"
