import errno
import json
import shutil
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from runs import wait_until
from safetensors.torch import load_file, save_file
from torch import nn

from notus.runtime.files import disk_error
from notus.training import checkpoint, checkpoint_writer
from notus.training.checkpoint import DamagedCheckpointError, Progress, checkpoints_in, load_checkpoint
from notus.training.checkpoint_writer import Checkpoints
from notus.training.optimizers import AdamW, PiecewiseOptimizer, RMSprop


def _stepped(
    name: str, seed: int, state_dtype: str = "fp32"
) -> tuple[list[tuple[str, nn.Parameter]], PiecewiseOptimizer]:
    torch.manual_seed(seed)
    parameters = [
        ("weight", nn.Parameter(torch.randn(3, 2))),
        ("frozen", nn.Parameter(torch.randn(2), requires_grad=False)),
    ]
    kind = {"rmsprop": RMSprop, "adamw": AdamW}[name]
    optimizer = kind([parameters[0][1]], lr=0.1, state_dtype=state_dtype)
    for _ in range(seed):
        parameters[0][1].grad = torch.randn(3, 2)
        optimizer.step()
    return parameters, optimizer


def save_checkpoint(folder, progress, parameters, optimizer, *, keep=None, keep_every=None, background=True):
    checkpoints = Checkpoints(folder, torch.device("cpu"), background=background, keep=keep, keep_every=keep_every)
    checkpoints.save(progress, parameters, optimizer)
    checkpoints.wait()
    return folder / f"step-{progress.step:08d}"


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("name", "dtype"), [("rmsprop", "fp32"), ("adamw", "fp32"), ("rmsprop", "bf16"), ("adamw", "bf16")]
)
def test_goes_on_as_if_it_had_not_stopped(
    name: str, dtype: str, background: bool, tmp_path: Path, device: torch.device
) -> None:
    parameters, optimizer = _stepped(name, 3, dtype)
    saved = Progress(step=3, num_tokens=99, window_sums=[[1.5]], recorded=False, trackers={"wandb": "x"})
    path = save_checkpoint(tmp_path, saved, parameters, optimizer, background=background)
    others, fresh = _stepped(name, 0, dtype)
    progress = load_checkpoint(path, others, fresh)
    assert progress == saved
    gradient = torch.randn(3, 2)
    for (_, parameter), stepping in ((parameters[0], optimizer), (others[0], fresh)):
        parameter.grad = gradient.clone()
        stepping.step()
    assert torch.equal(parameters[0][1], others[0][1])
    for moment in optimizer.moments:
        assert torch.equal(optimizer.state[parameters[0][1]][moment], fresh.state[others[0][1]][moment])


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_by_step(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, Progress(step), parameters, optimizer, keep=2)
    assert _names(tmp_path) == ["latest", "step-00000010", "step-00000100"]
    assert checkpoints_in(tmp_path) == [tmp_path / "step-00000100", tmp_path / "step-00000010"]
    assert (tmp_path / "latest").read_text() == "step-00000100\n"


def test_what_a_killed_run_left_is_not_seen_and_goes(tmp_path: Path, device: torch.device) -> None:
    (tmp_path / ".step-00000007.partial").mkdir()
    (tmp_path / ".step-00000003.old").mkdir()
    assert checkpoints_in(tmp_path) == []
    parameters, optimizer = _stepped("rmsprop", seed=1)
    save_checkpoint(tmp_path, Progress(7), parameters, optimizer)
    assert _names(tmp_path) == ["latest", "step-00000007"]


def _save_beside_a_late_rank(folder: Path) -> None:
    """Rank 1 makes the folder before rank 0 begins, and looks again when rank 0 has made its plan."""
    plan, set_up = checkpoint_writer._Writer.prepare_local_plan, checkpoint_writer._Writer.set_up_storage_writer
    mark, late = folder / ".step-00000001.partial" / "mark", dist.get_rank() == 0

    def set_up_late(self, *args, **kwargs):
        if late:
            wait_until(mark.exists)
        set_up(self, *args, **kwargs)

    def plan_and_look(self, *args):
        planned = plan(self, *args)
        if late:
            (folder / "planned").touch()
            return planned
        mark.touch()
        wait_until((folder / "planned").exists)
        assert mark.exists(), "the folder was removed while the ranks make it"
        return planned

    checkpoint_writer._Writer.set_up_storage_writer = set_up_late
    checkpoint_writer._Writer.prepare_local_plan = plan_and_look
    save_checkpoint(folder, Progress(step=1), *_stepped("rmsprop", seed=0))


def test_no_rank_finds_the_folder_removed_that_it_makes(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    run_ranks(_save_beside_a_late_rank, 2, tmp_path, tmp_path / "checkpoints")
    written = _names(tmp_path / "checkpoints" / "step-00000001")
    assert "state.json" in written
    assert "mark" not in written


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path, device: torch.device) -> None:
    """Training goes on while the background writes: neither tensors nor progress may move."""
    parameters, optimizer = _stepped("rmsprop", seed=2)
    before, progress = parameters[0][1].detach().clone(), Progress(2)
    checkpoints = Checkpoints(tmp_path, torch.device("cpu"), background=True, keep=None, keep_every=None)
    for step in (2, 3):
        progress.step = step
        checkpoints.save(progress, parameters, optimizer)
        progress.step = 99
        with torch.no_grad():
            parameters[0][1].fill_(step)
        optimizer.state[parameters[0][1]]["square_avg"].fill_(7.0)
    checkpoints.wait()
    others, fresh = _stepped("rmsprop", seed=0)
    assert load_checkpoint(tmp_path / "step-00000002", others, fresh).step == 2
    assert torch.equal(others[0][1], before)
    assert not (fresh.state[others[0][1]]["square_avg"] == 7.0).any()
    assert load_checkpoint(tmp_path / "step-00000003", others, fresh).step == 3
    assert (others[0][1] == 2).all()
    assert (fresh.state[others[0][1]]["square_avg"] == 7.0).all()


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_failed_write_is_told_and_leaves_the_others(
    background: bool, earlier: bool, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    if earlier:
        save_checkpoint(tmp_path, Progress(1), parameters, optimizer, keep=1)

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "_write_safetensors", full)
    checkpoints = Checkpoints(tmp_path, torch.device("cpu"), background=background, keep=1, keep_every=None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=880_000))
    others = "earlier checkpoints are whole" if earlier else "there is no earlier one"
    message = (
        rf"step-00000002 cannot be written \([^(]*No space left on device\); 0\.88 MB free in {tmp_path}; {others}$"
    )

    def save_and_wait() -> None:
        checkpoints.save(Progress(2), parameters, optimizer)
        while not checkpoints.failed():
            time.sleep(0.01)
        checkpoints.wait()

    with pytest.raises(OSError, match=message):
        save_and_wait()
    assert not checkpoints.failed()  # told once
    assert _names(tmp_path) == (["latest", "step-00000001"] if earlier else [])
    if earlier:
        assert load_checkpoint(tmp_path / "step-00000001", parameters, optimizer).step == 1


def test_a_state_that_cannot_be_written_is_told_once(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        raise disk_error(path, OSError(errno.ENOSPC, "No space left on device"))

    parameters, optimizer = _stepped("rmsprop", seed=1)
    monkeypatch.setattr(checkpoint_writer, "write_text", full)
    with pytest.raises(OSError, match=r"step-00000002 cannot be written \(No space left on device\); ") as caught:
        save_checkpoint(tmp_path, Progress(2), parameters, optimizer)
    assert str(caught.value).count("cannot be written") == str(caught.value).count("free in") == 1


def test_what_is_written_is_safetensors(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("adamw", seed=2)
    path = save_checkpoint(tmp_path, Progress(2), parameters, optimizer)
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".safetensors"]  # nothing needs unpickling
    assert json.loads((path / "state.json").read_text())["optimizer"] == "AdamW"
    tensors = load_file(path / "rank-00000.safetensors")  # without what is frozen
    assert set(tensors) == {"model.weight", "optimizer.exp_avg.weight", "optimizer.exp_avg_sq.weight"}
    assert torch.equal(tensors["model.weight"], parameters[0][1])


def test_without_an_optimizer_only_the_model_is_read(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("adamw", seed=2)
    path = save_checkpoint(tmp_path, Progress(2), parameters, optimizer)
    others, _ = _stepped("rmsprop", seed=0)
    load_checkpoint(path, others, None)
    assert torch.equal(others[0][1], parameters[0][1])


def test_a_damaged_state_file_is_named(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(tmp_path, Progress(1, num_tokens=41), parameters, optimizer)
    one_figure_changed = (path / "state.json").read_bytes().replace(b"41", b"42")
    no_digest = b'{"format": 2, "digest": "", "progress": {}}'
    for content in (one_figure_changed, b'{"optimizer": "RMS', b"{}", b"[]", b"\xff\xfe", no_digest):
        (path / "state.json").write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=r"state\.json (is damaged|does not match its digest)"):
            load_checkpoint(path, parameters, optimizer)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    with pytest.raises(ValueError, match=r"not a checkpoint, or not a whole one: it has no state\.json"):
        load_checkpoint(tmp_path, parameters, optimizer)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer)
    _rewritten(path, lambda state: state.update(format=9))
    with pytest.raises(ValueError, match="format 9, this version reads 5"):
        load_checkpoint(path, parameters, optimizer)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state["progress"].update(momentum=1.0), r"state\.json has progress\.momentum: another version"),
        (lambda state: state["progress"].pop("step"), r"state\.json lacks progress\.step: another version"),
        (lambda state: state["progress"].pop("identity"), r"lacks progress\.identity"),
        (lambda state: state.update(shards=2), "has shards"),
        (lambda state: state.pop("files"), "lacks files"),
        (lambda state: state.pop("optimizer"), "lacks optimizer"),
        (lambda state: state.pop("format"), "lacks format"),
        (lambda state: state.pop("progress"), r"lacks progress, progress\."),
        (lambda state: state.update(progress=[]), r"lacks progress\."),
    ],
)
def test_a_checkpoint_with_other_keys_is_of_another_version(
    change: Callable[[dict[str, Any]], None], told: str, tmp_path: Path, device: torch.device
) -> None:
    """Not damaged, by its digest: so it is neither renamed nor passed over, and says what to do in one line."""
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer)
    _rewritten(path, change)
    for read in (
        lambda: load_checkpoint(path, parameters, optimizer),
        lambda: checkpoint.read_identity(path),
        lambda: checkpoint.load_newest([path], tmp_path, parameters, optimizer),
    ):
        with pytest.raises(ValueError, match=told) as raised:
            read()
        assert not isinstance(raised.value, DamagedCheckpointError)
        assert "\n" not in str(raised.value)
        assert "training.resume=never" in str(raised.value)
    assert path.is_dir()


def test_a_checkpoint_without_what_was_added_later_is_read(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(tmp_path, Progress(1, num_tokens=7), parameters, optimizer)

    def change(state: dict[str, Any]) -> None:
        del state["optimizer_dtype"]
        for name in ("task", "total_steps", "best_step", "best_value", "evaluations_since_best"):
            del state["progress"][name]

    _rewritten(path, change)
    assert load_checkpoint(path, parameters, optimizer) == Progress(1, num_tokens=7)


def _rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a checkpoint's state as another version would have written it, digest and all."""
    state = json.loads((path / "state.json").read_text())
    del state["digest"]
    change(state)
    (path / "state.json").write_text(json.dumps({**state, "digest": checkpoint._digest_of(state)}))


def test_ratings_and_labels_may_be_any_where_none_were_learned_from(tmp_path: Path) -> None:
    before = {"data.train": "a", "data.train (ratings)": "b"}
    checkpoint.check_contents(tmp_path, before, {**before, "data.train (labels)": "c", "data.eval (ratings)": "d"})
    with pytest.raises(ValueError, match=r"other contents of data\.train \(ratings\)"):
        checkpoint.check_contents(tmp_path, before, {**before, "data.train (ratings)": "c"})
    with pytest.raises(ValueError, match=r"other contents of data\.eval"):
        checkpoint.check_contents(tmp_path, before, {**before, "data.eval": "c"})


@pytest.mark.parametrize(("written", "count"), [(2, 11), (3, 10)])
def test_a_checkpoint_of_an_earlier_version_is_read(
    written: int, count: int, tmp_path: Path, device: torch.device
) -> None:
    """DPO runs of 0.1 kept the chosen answers' NLL as the tenth of eleven sums; those until 0.3 the margin as the sixth
    of ten. SFT's three are as they were."""
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(
        tmp_path, Progress(1, window_sums=[[1.0, 2.0, 3.0]], identity={"a": "b"}), parameters, optimizer
    )

    def change(state: dict[str, Any]) -> None:
        state["format"] = written
        state["progress"]["window_sums"].append([float(number) for number in range(count)])

    _rewritten(path, change)
    last = {2: 10.0, 3: 9.0}[written]
    expected = [[1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, last]]
    assert load_checkpoint(path, parameters, optimizer).window_sums == expected
    assert checkpoint.read_identity(path) == {"a": "b"}


def test_a_damaged_tensor_file_is_named_and_nothing_is_filled(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer)
    file = path / "rank-00000.safetensors"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 16
    others, fresh = _stepped("rmsprop", seed=0)
    before = others[0][1].detach().clone()
    for content, problem in ((whole[:-1], "bytes, not"), (bytes(flipped), "does not match its digest")):
        file.write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=problem):
            load_checkpoint(path, others, fresh)
    file.write_bytes(whole)
    save_file({"model.weight": torch.zeros(3, 2)}, path / "aaa.safetensors")  # the reader would take its tensors
    with pytest.raises(DamagedCheckpointError, match=r"holds \['aaa.safetensors', 'rank-00000.safetensors'\], not"):
        load_checkpoint(path, others, fresh)
    (path / "aaa.safetensors").unlink()
    file.unlink()
    with pytest.raises(DamagedCheckpointError, match=r"holds \[\], not \['rank-00000\.safetensors'\] as when"):
        load_checkpoint(path, others, fresh)
    assert torch.equal(others[0][1], before)


def test_another_models_or_optimizers_checkpoint_is_refused(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer)
    other = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="into this model"):
        load_checkpoint(path, [("bias", other)], RMSprop([other]))
    with pytest.raises(ValueError, match="written with RMSprop, not AdamW"):
        load_checkpoint(path, *_stepped("adamw", seed=0))


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer)

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(checkpoint, "_problems", stale)
    with pytest.raises(OSError, match=r"cannot be read .Stale file handle.; nothing was changed"):
        load_checkpoint(path, parameters, optimizer)


def test_an_old_checkpoint_that_stays_is_a_warning(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    save_checkpoint(tmp_path, Progress(1), parameters, optimizer, keep=1)

    def busy(path: Path) -> None:
        if path.exists():
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "_remove", busy)
        save_checkpoint(tmp_path, Progress(2), parameters, optimizer, keep=1)
    assert "warning: the old checkpoint" in capsys.readouterr().out
    assert len(checkpoints_in(tmp_path)) == 2
    save_checkpoint(tmp_path, Progress(3), parameters, optimizer, keep=1)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000003"]
