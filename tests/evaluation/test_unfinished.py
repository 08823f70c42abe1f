"""A run in progress stands for its newest whole checkpoint, whatever the run does meanwhile."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from notus.data.chat import ZEPHYR_TEMPLATE
from notus.evaluation import models, unfinished
from notus.evaluation.models import find_source, find_together
from notus.model.export import load_causal_lm
from notus.runtime import distributed
from notus.training.checkpoint import DamagedCheckpointError, Progress, describe

ROOT = Path(__file__).parents[2]


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
    elsewhere = models.ModelSource("run (step 2)", tmp_path / "none", run=tmp_path)
    monkeypatch.setattr(models, "on_main", lambda _: elsewhere)
    with pytest.raises(ValueError, match="use a disk that all share"):
        find_together("run")
    monkeypatch.setattr(models, "on_main", lambda _: models.ModelSource("org/model", tmp_path / "none"))
    monkeypatch.setattr(models, "find_source", lambda name, **_: models.ModelSource(name, tmp_path))
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


def test_older_snapshots_go_when_nobody_reads_them(full_run, in_progress, monkeypatch, capsys):
    run, reading = in_progress(full_run), []
    monkeypatch.setattr(unfinished, "_read_here", reading)

    def write(run, settings, folder, trust_remote_code):
        newest = unfinished.checkpoints_in(run / "checkpoints")[0]
        (folder / newest.name).mkdir()
        (folder / newest.name / "config.json").touch()
        (folder / newest.name / "checkpoint.sha256").write_text(unfinished._digest(newest))
        return folder / newest.name

    monkeypatch.setattr(unfinished, "_write_apart", write)

    def snapshots_after(step):
        newest = run / "checkpoints" / f"step-{step:08d}"
        if not newest.exists():
            shutil.copytree(run / "checkpoints" / "step-00000002", newest)
        assert unfinished.snapshot(run, {})[0] == step
        return sorted(path.name for path in (run / "snapshots").glob("step-*"))

    assert snapshots_after(2) == ["step-00000002"]
    assert snapshots_after(3) == ["step-00000002", "step-00000003"]  # this process still reads the first
    reading.pop(0).close()
    assert snapshots_after(3) == ["step-00000002", "step-00000003"]  # nothing written, nothing removed
    assert snapshots_after(4) == ["step-00000003", "step-00000004"]
    while reading:
        reading.pop().close()

    def refused(path, ignore_errors=False):
        (path / "config.json").unlink()  # some of it is gone
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(unfinished.shutil, "rmtree", refused)
        assert snapshots_after(5) == ["step-00000005"]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "step-00000004: cannot be removed (Permission denied)" in warnings[0]
    shutil.rmtree(run / "checkpoints" / "step-00000005")  # moved away, to go back to what was half removed
    while reading:
        reading.pop().close()
    assert snapshots_after(4) == ["step-00000004", "step-00000005"]
    assert not list((run / "snapshots").glob(".step-*"))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def is_writer(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_who_writes_a_snapshot_goes_with_the_evaluation(full_run, in_progress):
    """Else it would write on without the lock, beside the next evaluation's writer."""
    run = in_progress(full_run)
    code = f"from notus.evaluation.models import find_source; find_source({str(run)!r})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as evaluation:
        (writer,) = wait_for(lambda: [pid for pid in children_of(evaluation.pid) if is_writer(pid)])
        evaluation.kill()
    wait_for(lambda: not is_writer(writer))
    assert not list((run / "snapshots").glob("step-*"))


def test_what_a_killed_writer_left_goes(full_run, in_progress):
    run = in_progress(full_run)
    for name in (".step-00000001.partial", ".step-00000001.removed"):
        (run / "snapshots" / name).mkdir(parents=True)
        (run / "snapshots" / name / "model.safetensors").touch()
    find_source(str(run))
    assert {path.name for path in (run / "snapshots").iterdir()} == {".lock", "step-00000002"}


def test_a_file_system_without_locks_is_used_without(full_run, in_progress, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(unfinished.fcntl, "lockf", refused)
    monkeypatch.setattr(unfinished.fcntl, "flock", refused)
    run = in_progress(full_run)
    assert find_source(str(run)).name.endswith("(step 2)")


def test_where_no_snapshot_can_be_written(full_run, in_progress):
    run = in_progress(full_run)
    (run / "snapshots").write_text("")
    with pytest.raises(OSError, match=r"snapshots: the newest checkpoint's model cannot be written there \(.*`notus"):
        find_source(str(run))


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
    return {"model": {"name_or_path": str(model_folder)}, "data": {"chat_template": None}, "lora": {"rank": 0}}


def test_the_learned_chat_template_is_the_tokenizers(full_run, in_progress, model_folder):
    run = in_progress(full_run)
    (run / "data.json").write_text(json.dumps({"train": {"report": {"templated": 0}}}))
    with distributed.process_group():
        _, plain, _ = unfinished.load_unfinished(run, settings(model_folder))
        (run / "data.json").write_text(json.dumps({"train": {"report": {"templated": 3}}}))
        _, chat, _ = unfinished.load_unfinished(run, settings(model_folder))
    assert plain.chat_template is None
    assert chat.chat_template == ZEPHYR_TEMPLATE


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
