import datetime
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks
from runs import config

from notus.config import Config
from notus.training import run_folder
from notus.training.run_folder import FREE_KEYS, Opening, check_shared, open_folder, template_date


def _config(tmp_path: Path, **overrides: Any) -> Config:
    return config("dpo", tmp_path / "run", tmp_path / "model", tmp_path / "pairs.jsonl", **overrides)


def _begin(tmp_path: Path) -> None:
    """A run whose first step was logged."""
    open_folder(_config(tmp_path))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')


def test_a_new_folder_is_claimed(tmp_path: Path) -> None:
    assert open_folder(_config(tmp_path)) == Opening(finished=False, checkpoints=[])
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_auto_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    open_folder(_config(tmp_path))
    for name in ("step-00000002", "step-00000010", ".step-00000011.partial"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    opening = open_folder(_config(tmp_path))
    assert [path.name for path in opening.checkpoints] == ["step-00000010", "step-00000002"]


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    open_folder(_config(tmp_path))
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "config.json").touch()
    assert open_folder(_config(tmp_path)).finished


def test_a_run_that_failed_before_its_first_step_binds_nobody(tmp_path: Path) -> None:
    open_folder(_config(tmp_path))
    assert not open_folder(_config(tmp_path, dpo__beta=0.2)).finished
    assert "beta: 0.2" in (tmp_path / "run" / "config.yaml").read_text()


def test_sft_and_dpo_do_not_share_a_folder(tmp_path: Path) -> None:
    _begin(tmp_path)
    sft = config("sft", tmp_path / "run", tmp_path / "model", tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match=r"holds a run of train_dpo\.py"):
        open_folder(sft)


def test_a_folder_named_model_is_no_finished_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert not open_folder(_config(tmp_path)).finished


def test_a_folder_that_cannot_be_made_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match=r"training\.output_dir=.*run cannot be written"):
        open_folder(_config(tmp_path))


def test_going_back_behind_the_newest_is_refused(tmp_path: Path) -> None:
    folders = [tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (2, 4)]
    for folder in folders:
        folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="has a newer checkpoint, step-00000004"):
        open_folder(_config(tmp_path, training__resume=str(folders[0])))
    assert open_folder(_config(tmp_path, training__resume=str(folders[1]))).checkpoints == folders[::-1]


def test_another_config_is_refused_by_key(tmp_path: Path) -> None:
    _begin(tmp_path)
    with pytest.raises(ValueError, match=r"dpo\.beta \(was 0\.1, is 0\.2\)"):
        open_folder(_config(tmp_path, dpo__beta=0.2))


def test_a_run_from_before_weight_decay_had_exclusions_is_not_continued_with_some(tmp_path: Path) -> None:
    saved = tmp_path / "run" / "config.yaml"
    for decay, message in ((0.1, r'weight_decay_exclude \(was \[\], is \["bias", "norm"\]\)'), (0.0, None)):
        open_folder(_config(tmp_path, training__weight_decay=decay))
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
        saved.write_text(saved.read_text().replace("  weight_decay_exclude:\n  - bias\n  - norm\n", ""))
        assert "weight_decay_exclude" not in saved.read_text()
        if message is None:
            open_folder(_config(tmp_path, training__weight_decay=decay))
            continue
        with pytest.raises(ValueError, match=message):
            open_folder(_config(tmp_path, training__weight_decay=decay))
        open_folder(_config(tmp_path, training__weight_decay=decay, training__weight_decay_exclude=[]))
        (tmp_path / "run" / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
    "change",
    [
        {"training__log_every": 5},
        {"training__tokens_per_row": 999},
        {"training__deterministic": True},
        {"tracking__tensorboard": True},
    ],
)
def test_what_does_not_change_the_result_may_change(change: dict[str, Any], tmp_path: Path) -> None:
    _begin(tmp_path)
    assert not open_folder(_config(tmp_path, **change)).finished


def test_never_sets_the_earlier_run_aside(tmp_path: Path) -> None:
    open_folder(_config(tmp_path))
    (tmp_path / "run" / "model").mkdir()
    for name in ("metrics.jsonl", "samples.jsonl", "data.json", "environment.json"):
        (tmp_path / "run" / name).write_text("kept")
    opening = open_folder(_config(tmp_path, dpo__beta=0.2, training__resume="never"))
    assert opening == Opening(finished=False, checkpoints=[])
    (aside,) = (tmp_path / "run").glob("previous-*")
    for name in ("metrics.jsonl", "samples.jsonl", "data.json", "environment.json"):
        assert (aside / name).read_text() == "kept"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", aside.name]


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.resume=.*nowhere: no such checkpoint"):
        open_folder(_config(tmp_path, training__resume=str(tmp_path / "nowhere")))


def test_a_named_checkpoint_starts_the_run_and_its_own_take_over(tmp_path: Path) -> None:
    origin = tmp_path / "other" / "step-00000004"
    origin.mkdir(parents=True)
    settings = _config(tmp_path, training__resume=str(origin))
    assert open_folder(settings).checkpoints == [origin]
    own = tmp_path / "run" / "checkpoints" / "step-00000006"
    own.mkdir(parents=True)
    assert open_folder(settings).checkpoints == [own]


def test_never_begins_anew_once_and_torchruns_restart_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _begin(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (found,) = open_folder(_config(tmp_path, training__resume="never")).checkpoints
    assert found.name == "step-00000002"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert open_folder(_config(tmp_path, training__resume="never")).checkpoints == []


@pytest.mark.parametrize("moves", range(4))
@pytest.mark.parametrize("then", ["auto", "never"])
def test_setting_aside_may_be_interrupted(
    moves: int, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _begin(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "model").mkdir()
    (run / "model" / "config.json").touch()
    rename, left = Path.rename, [moves]

    def interrupted(path: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_folder(_config(tmp_path, training__resume="never"))
    again = open_folder(_config(tmp_path, training__resume=then))
    assert again.finished == (moves == 0 and then == "auto")  # nothing was moved: it is the finished run still
    kept = [path.name for folder in run.glob("previous-*") for path in folder.iterdir()]
    assert "metrics.jsonl" in kept or (run / "metrics.jsonl").read_text() == '{"step": 1}\n'
    if then == "never":
        assert again.checkpoints == []
        assert {"metrics.jsonl", "checkpoints", "model"} <= set(kept)


@pytest.mark.parametrize("content", ["", "- a", "a: [", "\x00"])
def test_a_damaged_config_is_named(content: str, tmp_path: Path) -> None:
    _begin(tmp_path)
    (tmp_path / "run" / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        open_folder(_config(tmp_path))


def test_a_foreign_folder_in_the_models_place_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something else than the model"):
        open_folder(_config(tmp_path))


def test_the_docs_list_the_keys_that_may_change() -> None:
    text = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
    listed = text.split("<!-- free keys: a test compares -->")[1].split("<!-- end -->")[0]
    assert set(re.findall(r"`([^`]+)`", listed)) == FREE_KEYS


def _check_shared_on_ranks(top: Path) -> None:
    rank = dist.get_rank()
    for name in ("0", "1"):
        (top / name).mkdir(exist_ok=True)
    dist.barrier()
    check_shared(top / "0")
    run_folder.PATIENCE = 0.5
    message = rf"rank 1 on \S+, whose folder is {re.escape(str(top / '1'))}, does not see .*: training\.output_dir must"
    with pytest.raises(ValueError, match=message):
        check_shared(top / str(rank))
    with pytest.raises(OSError, match="No such file"):
        check_shared(top / "none")
    dist.barrier()
    assert not os.listdir(top / "0")


def test_every_rank_must_see_the_same_folder(tmp_path: Path) -> None:
    run_ranks(_check_shared_on_ranks, 2, tmp_path, tmp_path)


def test_the_date_of_templates_is_that_of_the_runs_first_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NextYear(datetime.date):
        @classmethod
        def today(cls) -> "NextYear":
            return cls(2031, 1, 2)

    today = datetime.date.today().isoformat()
    assert template_date(_config(tmp_path)) == today
    open_folder(_config(tmp_path, data__template_date=today))
    monkeypatch.setattr(run_folder.datetime, "date", NextYear)
    assert template_date(_config(tmp_path)) == today  # its reference may be computed already
    assert template_date(config("dpo", tmp_path / "new", tmp_path, tmp_path)) == "2031-01-02"
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert template_date(_config(tmp_path)) == today
    assert template_date(_config(tmp_path, data__template_date="2020-02-03")) == "2020-02-03"
    assert template_date(_config(tmp_path, training__resume="never")) == "2031-01-02"
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    other = config("dpo", tmp_path / "other", tmp_path, tmp_path, training__resume=str(checkpoint))
    assert template_date(other) == today
    # the recorded date is no change of the config; another one is
    assert not open_folder(_config(tmp_path, data__template_date=today)).finished
    with pytest.raises(ValueError, match=r"data\.template_date"):
        open_folder(_config(tmp_path, data__template_date="2020-02-03"))


def test_a_run_from_before_dates_were_recorded_is_resumed(tmp_path: Path) -> None:
    _begin(tmp_path)
    open_folder(_config(tmp_path, data__template_date="2020-02-03"))
    assert "template_date: '2020-02-03'" in (tmp_path / "run" / "config.yaml").read_text()
