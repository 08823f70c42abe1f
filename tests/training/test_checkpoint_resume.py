"""An interrupted and resumed run is an undisturbed one, bit by bit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import free_ports, launched, run_ranks
from runs import assert_same_run, at_call, config, read_metrics, settings, terminate, write_messages, write_pairs
from toys import toy_model_folder

from notus.config import config_from_dict
from notus.runtime.process import STOPPED
from notus.training import checkpoint, dpo, reference, sft

EVERY = {"training__save_every": 3, "training__log_every": 4, "training__epochs": 2, "training__eval_every": 5,
         "data__eval_size": 5}  # fmt: skip
LORA = {"lora__rank": 2, "lora__dropout": 0.3}


@pytest.mark.parametrize("kind", ["dpo-full", "dpo-lora", "sft-full", "sft-lora"])
@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_preempted_and_resumed_is_bitwise_undisturbed(
    kind: str, place: str, tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _, what = kind.partition("-")
    module, owner = {"dpo": (dpo, dpo.DPOTask), "sft": (sft, sft.SFTTask)}[task]
    data = pairs_file if task == "dpo" else write_messages(tmp_path / "chats.jsonl", 18)
    overrides = EVERY | (LORA if what == "lora" else {})
    assert module.run(config(task, tmp_path / "whole", model_folder, data, **overrides)) == 0
    cut = config(task, tmp_path / "cut", model_folder, data, **overrides)
    with monkeypatch.context() as patch:
        # 13 rows in steps of 4: 4 steps an epoch. The 5th step's loss, or its evaluation; SFT also makes one at step 0.
        evaluation = ("evaluate", 1 if task == "dpo" else 2)
        at_call(patch, owner, *(("row_loss", 5) if place == "step" else evaluation), terminate)
        assert module.run(cut) == STOPPED
    assert (tmp_path / "cut" / "checkpoints" / "latest").read_text() == "step-00000005\n"
    assert not (tmp_path / "cut" / "model").exists()
    assert module.run(cut) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_budget_ends_the_run_cleanly_again_and_again(
    tmp_path: Path, model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo.run(config("dpo", tmp_path / "whole", model_folder, pairs_file, **EVERY))
    cut = config("dpo", tmp_path / "cut", model_folder, pairs_file, training__max_hours=1e-9, **EVERY)
    for step in range(1, 9):
        assert dpo.run(cut) == 0
        # an evaluation that is due, as at the last step, is left to the next launch
        assert f"stopped by training.max_hours after step {step} of 8" in capsys.readouterr().out
    assert dpo.run(config("dpo", tmp_path / "cut", model_folder, pairs_file, **EVERY)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def _run_on_ranks(trees: list[dict[str, Any]], ports: list[int], preempt_at: int) -> None:
    whole, cut = (config_from_dict(tree, "dpo") for tree in trees)
    with launched(ports[0]):
        assert dpo.run(whole) == 0
    with launched(ports[1]) as rank, pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            at_call(patch, dpo.DPOTask, "row_loss", preempt_at, terminate)
        assert dpo.run(cut) == STOPPED
    with launched(ports[2]):
        assert dpo.run(cut) == 0


@pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])
def test_one_rank_of_two_is_preempted(
    lora: dict[str, Any], tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    trees = [settings(tmp_path / name, model_folder, pairs_file, **EVERY, **lora) for name in ("whole", "cut")]
    run_ranks(_run_on_ranks, 2, tmp_path, trees, free_ports(3), 6)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    tmp_path: Path,
    model_folder: Path,
    pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dpo.run(config("dpo", tmp_path / "whole", model_folder, pairs_file, **EVERY))
    cut = config("dpo", tmp_path / "cut", model_folder, pairs_file, **EVERY)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 8, terminate)
        assert dpo.run(cut) == STOPPED
    checkpoints = tmp_path / "cut" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000006", "step-00000008"]
    file = checkpoints / "step-00000008" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert dpo.run(cut) == 0
    told = capsys.readouterr().out
    assert "this checkpoint is now damaged-step-00000008" in told
    assert f"resuming from {checkpoints / 'step-00000006'} (step 6 of 8)" in told
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_reference_cache_that_was_altered_with_its_digest_is_refused(
    tmp_path: Path,
    model_folder: Path,
    pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dpo.run(config("dpo", tmp_path / "whole", model_folder, pairs_file, **EVERY))
    cut = config("dpo", tmp_path / "cut", model_folder, pairs_file, **EVERY)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 8, terminate)
        assert dpo.run(cut) == STOPPED
    caches = sorted((tmp_path / "cut" / "reference").glob("*.safetensors"))
    assert len(caches) == 2  # of training and held-out rows
    for cache in caches:
        right = cache.read_bytes()
        tensors, metadata = reference._open(cache)
        reference._write(cache, {**tensors, "logps": tensors["logps"] + 1.0}, metadata)
        with pytest.raises(ValueError, match=rf"{cache} does not hold the log-probs that this run .*: delete it"):
            dpo.run(cut)
        cache.write_bytes(right)
    caches[0].unlink()  # computed again: on a CPU bit for bit
    capsys.readouterr()
    # a run of an earlier version did not record what the cache held
    for path in (tmp_path / "cut" / "checkpoints").glob("step-*"):
        state = json.loads((path / "state.json").read_text())
        del state["digest"]
        identity = state["progress"]["identity"]
        assert sum(name.endswith(" (content)") for name in identity) == 2
        state["progress"]["identity"] = {key: each for key, each in identity.items() if "content" not in key}
        (path / "state.json").write_text(json.dumps({**state, "digest": checkpoint._digest_of(state)}))
    assert dpo.run(cut) == 0
    assert "warning" not in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_no_whole_checkpoint_is_an_error(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = config("dpo", tmp_path / "cut", model_folder, pairs_file, **EVERY)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 2, terminate)
        assert dpo.run(cut) == STOPPED
    (tmp_path / "cut" / "checkpoints" / "step-00000002" / "state.json").unlink()
    for _ in range(2):  # the second launch finds it under the name that the first gave it
        with pytest.raises(ValueError, match=r"no checkpoint is whole.*training\.resume=never to start over"):
            dpo.run(cut)


def test_a_second_launch_in_the_same_folder_is_refused(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config("dpo", tmp_path / "run", model_folder, pairs_file, **EVERY)

    def launch_again() -> None:
        code = (
            "import sys\nfrom pathlib import Path\nfrom runs import config\n"
            "from notus.training.run_folder import hold_folder\n"
            "hold_folder(config('dpo', *map(Path, sys.argv[1:])))"
        )
        command = [sys.executable, "-c", code, *map(str, (tmp_path / "run", model_folder, pairs_file))]
        paths = os.pathsep.join(str(Path(__file__).parents[number]) for number in (1, 2))
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
        )
        told.append(done.stderr)

    told: list[str] = []
    at_call(monkeypatch, dpo.DPOTask, "row_loss", 2, launch_again)
    assert dpo.run(run) == 0
    assert "is in use by another launch" in told[0]


def test_changed_data_or_another_model_is_refused_before_the_reference_is_computed_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, model = write_pairs(tmp_path / "pairs.jsonl", 18), toy_model_folder(tmp_path / "model")
    cut = config("dpo", tmp_path / "cut", model, pairs, **EVERY)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 2, terminate)
        assert dpo.run(cut) == STOPPED
    before = sorted((tmp_path / "cut" / "reference").iterdir())
    write_pairs(pairs, 18, seed=1)
    with pytest.raises(ValueError, match=r"other contents of data\.train"):
        dpo.run(cut)
    write_pairs(pairs, 18)
    toy_model_folder(model, seed=3)
    with pytest.raises(ValueError, match=r"other contents of model\.name_or_path"):
        dpo.run(cut)
    assert sorted((tmp_path / "cut" / "reference").iterdir()) == before


def test_a_branch_of_a_run_has_a_history_of_its_own(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from notus.training.tracking import Tracker

    monkeypatch.setattr(Tracker, "state", lambda self: {"wandb": "origins"})
    origin = config("dpo", tmp_path / "origin", model_folder, pairs_file, **EVERY)
    assert dpo.run(origin) == 0
    seen = []
    monkeypatch.setattr(dpo.Run, "_tracker", lambda self, progress: seen.append(replace(progress)) or Tracker([]))
    start = str(tmp_path / "origin" / "checkpoints" / "step-00000006")
    assert dpo.run(config("dpo", tmp_path / "branch", model_folder, pairs_file, training__resume=start, **EVERY)) == 0
    assert (seen[0].step, seen[0].trackers, seen[0].logged) == (6, {}, 0)


def test_a_branch_with_another_loss_logs_its_own_steps_alone(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    """Its first line of metrics is of steps 7 and 8, although the origin had logged no line since step 5."""
    assert dpo.run(config("dpo", tmp_path / "origin", model_folder, pairs_file, **EVERY)) == 0
    more = {**EVERY, "dpo__loss_type": {"sigmoid": 1.0, "ipo_sum": 0.5}}
    more["training__resume"] = str(tmp_path / "origin" / "checkpoints" / "step-00000006")
    assert dpo.run(config("dpo", tmp_path / "branch", model_folder, pairs_file, **more)) == 0
    (line,) = read_metrics(tmp_path / "branch")
    assert line["step"] == 8
    assert line["loss"] == pytest.approx(line["loss/sigmoid"] + 0.5 * line["loss/ipo_sum"])
    more["training__log_every"] = 1
    assert dpo.run(config("dpo", tmp_path / "single", model_folder, pairs_file, **more)) == 0
    seventh, eighth = read_metrics(tmp_path / "single")
    sizes = [4, 1]  # 13 rows in steps of 4
    expected = sum(size * each["loss"] for size, each in zip(sizes, (seventh, eighth), strict=True)) / sum(sizes)
    assert line["loss"] == pytest.approx(expected)


def test_a_full_disk_at_a_checkpoint_ends_the_run_and_keeps_the_earlier_one(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from notus.training import checkpoint_writer as saving

    dpo.run(config("dpo", tmp_path / "whole", model_folder, pairs_file, **EVERY))
    cut = config("dpo", tmp_path / "cut", model_folder, pairs_file, **EVERY)

    def full() -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        at_call(patch, saving, "_write_safetensors", 2, full)
        with pytest.raises(OSError, match=r"step-00000006.*No space left on device.*GB free.*earlier .* are whole"):
            dpo.run(cut)
    assert (tmp_path / "cut" / "checkpoints" / "latest").read_text() == "step-00000003\n"
    assert dpo.run(cut) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_how_checkpoints_are_kept_follows_the_config(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    options = {"training__save_every": 1, "training__keep_checkpoints": 1, "training__keep_every": 3}
    for name, background in (("behind", True), ("waiting", False)):
        more = {**options, "training__epochs": 2, "training__async_checkpoints": background}
        assert dpo.run(config("dpo", tmp_path / name, model_folder, pairs_file, **more)) == 0
        kept = sorted(path.name for path in (tmp_path / name / "checkpoints").glob("step-*"))
        assert kept == [f"step-{step:08d}" for step in (3, 6, 9, 10)]  # 18 pairs in steps of 4, twice
    assert_same_run(tmp_path / "behind", tmp_path / "waiting")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training__save_every": 2, "training__keep_every": 3}, r"keep_every \(3\) must be a multiple of .* \(2\)"),
        ({"training__keep_every": 3}, r"must be a multiple of training.save_every \(None\)"),
        (
            {"training__save_every": 1, "training__keep_every": 3, "training__keep_checkpoints": None},
            "has no effect while training.keep_checkpoints is null",
        ),
    ],
)
def test_keeping_what_is_never_saved_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config("dpo", tmp_path, tmp_path, tmp_path / "pairs.jsonl", **options)
