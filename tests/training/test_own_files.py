"""A run neither replaces nor moves what is not its own."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from runs import config, settings, write_pairs

import notus
from notus.config import Config, save_config
from notus.training import dpo
from notus.training.own_files import check_folder, is_own_config, reads_own_inputs
from notus.training.run_folder import WRITTEN, open_folder


def _config(folder: Path, **overrides: Any) -> Config:
    return config("dpo", folder, folder.parent / "model", folder.parent / "pairs.jsonl", **overrides)


def _rows(folder: Path) -> Path:
    """Where the training rows of a program go."""
    return folder / "inputs" / "train.jsonl"


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refused(settings: Config, match: str, *, written: Collection[Path] = ()) -> None:
    """The run is refused, and nothing has changed."""
    folder = Path(settings.training.output_dir)
    before = _content(folder)
    with pytest.raises(ValueError, match=match) as caught:
        check_folder(settings, written=written)
    assert "\n" not in str(caught.value)
    assert _content(folder) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.json", '[{"prompt": "a", "chosen": "b", "rejected": "c"}]'),
        ("data.json", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": 0.5}\n'),
        ("metrics.jsonl", "my notes"),
        ("samples.jsonl", '{"prompt": "a", "completion": "b"}\n'),
        ("environment.json", '{"CUDA": "12"}'),
        ("environment.json", ""),
        ("initial_evaluation.json", '{"step": 0, "accuracy": 1}'),
        ("config.yaml", "# mine\nmodel: {name_or_path: base}\n"),
        ("config.json", "{}"),
        ("adapter_config.json", "{}"),
        ("model/thesis.tex", "text"),
        ("checkpoints/best.pt", "weights"),
        ("inputs/train.jsonl", "{}"),
        ("tensorboard/events.out.tfevents.1", "events"),
    ],
)
def test_files_of_others_are_named_and_left(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    run = _config(tmp_path / "run", tracking__tensorboard=True)
    if content:
        _refused(run, str(path.parent if "/" in name else path.name), written=[_rows(tmp_path / "run")])
    else:
        check_folder(run, written=[_rows(tmp_path / "run")])  # nothing is lost


def test_what_is_no_name_of_a_run_may_stand_in_its_folder(tmp_path: Path) -> None:
    for name in (
        "notes.json",
        "inputs/train.jsonl",
        "reference/book.txt",
        "src/main.py",
        "evaluations/hub/result.json",
    ):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    check_folder(_config(tmp_path / "run"))


def test_a_link_to_a_file_of_others_is_left(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.json").symlink_to(tmp_path / "elsewhere.json")
    _refused(_config(tmp_path / "run"), r"data\.json")


def test_links_that_lead_in_a_circle_are_no_inputs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "a.jsonl")
    run = _config(tmp_path / "run", data__train=str(tmp_path / "a.jsonl"))
    check_folder(run)  # who opens it says what is wrong
    assert not reads_own_inputs(run)


@pytest.mark.parametrize("key", ["data__train", "data__eval", "data__exclude", "model__name_or_path", "model__adapter"])
def test_an_input_where_the_run_writes_is_named(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "rows.jsonl").write_text("{}\n")
    (tmp_path / "link").symlink_to(run / "model" / "rows.jsonl")
    monkeypatch.chdir(run)
    for name in ("model/rows.jsonl", str(tmp_path / "link")):
        message = rf"{key.replace('__', '.')}=\S+ lies where a run"
        for resume in ("auto", "never"):
            _refused(_config(run, training__resume=resume, **{key: name}), message)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_base_model_is_no_folder_for_a_run(resume: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    run = _config(tmp_path / "run", model__name_or_path=str(tmp_path / "run"), training__resume=resume)
    _refused(run, r"model\.name_or_path=\S+ is also training\.output_dir")


def test_the_config_that_a_run_wrote_is_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for task in ("dpo", "sft"):
        settings_ = config(task, run, tmp_path / "model", tmp_path / "pairs # 1.jsonl")
        open_folder(settings_)
        assert is_own_config(run / "config.yaml")
        check_folder(settings_)
    text = (run / "config.yaml").read_text()
    for changed in (f"# tried\n{text}", text.replace("  seed:", "  # lucky\n  seed:"), "training: {}\n", "- a", ""):
        (run / "config.yaml").write_text(changed)
        assert not is_own_config(run / "config.yaml")


def test_a_run_whose_config_was_edited_or_removed_is_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_folder(_config(run))
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    (run / "environment.json").write_text("damaged")
    (run / "config.yaml").write_text("# noted\n" + (run / "config.yaml").read_text())
    check_folder(_config(run))
    (run / "config.yaml").unlink()
    check_folder(_config(run))


def test_a_run_is_known_by_its_metrics(tmp_path: Path) -> None:
    """Its checkpoints may be removed to save room, and its config may be annotated."""
    run = tmp_path / "run"
    open_folder(_config(run))
    (run / "config.yaml").write_text("# noted\n" + (run / "config.yaml").read_text())
    (run / "metrics.jsonl").write_text("")
    _refused(_config(run), r"config\.yaml was not written by a run")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7, "learning_rate": 0.1, "num_tokens": 9}\n')
    check_folder(_config(run))


def test_a_run_that_began_in_the_folder_of_its_model_is_resumed(tmp_path: Path) -> None:
    """As earlier versions let it."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    check_folder(_config(run, model__name_or_path=str(run)))
    _refused(_config(run, model__name_or_path=str(run), training__resume="never"), r"is also training\.output_dir")


@pytest.mark.parametrize(
    "killed_in", ["config.yaml", "metrics.jsonl", "environment.json", "data.json", "samples.jsonl"]
)
def test_a_launch_that_was_killed_among_its_first_files_goes_on(killed_in: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_folder(_config(run))
    first = {
        "metrics.jsonl": "",
        "environment.json": '{"launches": [], "versions": {}}',
        "samples.jsonl": '{"step": 0,',
    }
    first |= {"data.json": '{"train": {}, "eval": null}'}
    for name in first:
        if killed_in != "config.yaml":
            (run / name).write_text(first[name])
        if name == killed_in:
            break
    (run / ".0123.partial").write_text("half")
    check_folder(_config(run), written=[_rows(tmp_path / "run")])


def test_never_moves_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_folder(_config(run))
    (run / "model").mkdir()
    for name in ("metrics.jsonl", ".git/HEAD", "src/main.py", "wandb/other", "tensorboard/events", "inputs/mine.jsonl",
                 "report.html", "evaluations/preferences/result.json", "reference/cache"):  # fmt: skip
        (run / name).parent.mkdir(exist_ok=True, parents=True)
        (run / name).write_text("kept")
    open_folder(_config(run, training__resume="never"))
    (aside,) = run.glob("previous-*")
    assert {path.name for path in aside.iterdir()} == {"config.yaml", "metrics.jsonl", "model", "evaluations"}
    stay = {".git", "src", "wandb", "tensorboard", "inputs", "report.html", "reference", "config.yaml", aside.name}
    assert {path.name for path in run.iterdir()} == stay


def test_never_moves_all_that_a_run_wrote(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_folder(_config(run, tracking__tensorboard=True, tracking__wandb=True))
    for name in WRITTEN:
        if "." not in name[1:]:
            (run / name).mkdir()
        elif name != "config.yaml":
            (run / name).write_text('<meta name="generator" content="notus report">')
    (run / "inputs" / "inputs.json").write_text("{}")
    open_folder(_config(run, training__resume="never"))
    (aside,) = run.glob("previous-*")
    assert {path.name for path in aside.iterdir()} == set(WRITTEN)


def test_never_moves_events_that_the_new_run_would_drop(tmp_path: Path) -> None:
    """An earlier launch of the run may have logged them, before tracking.tensorboard was switched off."""
    run = tmp_path / "run"
    open_folder(_config(run))
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "events.out.tfevents.1").write_text("events")
    open_folder(_config(run, training__resume="never", tracking__tensorboard=True))
    (aside,) = run.glob("previous-*")
    assert (aside / "tensorboard" / "events.out.tfevents.1").read_text() == "events"
    assert not (run / "tensorboard").exists()


def test_a_project_folder_with_its_data_is_refused_as_it_is(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    write_pairs(project / "pairs.jsonl", 4)
    rows = [json.loads(line) for line in (project / "pairs.jsonl").read_text().splitlines()]
    (project / "data.json").write_text(json.dumps(rows))
    monkeypatch.chdir(project)
    before = sorted(path.name for path in project.iterdir())
    for resume in ("auto", "never"):
        run = config(
            "dpo", Path(), model_folder, Path("data.json"), training__resume=resume, data__cache_dir="../cache"
        )
        with pytest.raises(ValueError, match=r"data\.train=data\.json lies where a run"):
            dpo.run(run)
    assert sorted(path.name for path in project.iterdir()) == before
    assert json.loads((project / "data.json").read_text()) == rows


def test_a_run_with_rows_of_a_program_starts_over_from_them(tmp_path: Path, model_folder: Path) -> None:
    tree = settings(tmp_path / "run", model_folder, tmp_path / "none", training__max_steps=1)
    del tree["data"]["train"]
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl", 4).read_text().splitlines()]
    notus.train(tree, train=rows)
    saved = tmp_path / "config.yaml"
    shutil.copy(tmp_path / "run" / "config.yaml", saved)
    assert dpo.run(notus.load_config([str(saved), "--training.resume=never"], "dpo")) == 0
    (aside,) = (tmp_path / "run").glob("previous-*")
    assert (aside / "model").is_dir()
    assert (tmp_path / "run" / "inputs" / "train.jsonl").is_file()
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("passed", ["nothing", "eval"])
def test_a_program_starts_a_run_over_from_rows_of_an_earlier_one(
    passed: str, tmp_path: Path, model_folder: Path
) -> None:
    tree = settings(tmp_path / "run", model_folder, tmp_path / "none", training__max_steps=1)
    del tree["data"]["train"]
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl", 4).read_text().splitlines()]
    notus.train(tree, train=rows)
    given, overrides = tmp_path / "run" / "config.yaml", {"training.resume": "never"}
    if passed == "nothing":
        assert notus.train(given, overrides=overrides).finished
        return
    before = _content(tmp_path / "run")
    with pytest.raises(ValueError, match=r"data\.train=\S+ belongs to the earlier run, .*: pass it as well"):
        notus.train(given, eval=rows, overrides=overrides)
    assert _content(tmp_path / "run") == before


def test_rows_of_the_user_in_inputs_are_read_and_not_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _rows(run).parent.mkdir(parents=True)
    write_pairs(_rows(run), 4)
    settings_ = _config(run, data__train=str(_rows(run)))
    for _ in range(2):  # also once the run is known
        check_folder(settings_)
        _refused(settings_, r"inputs was not written by a run", written=[_rows(run)])
        open_folder(settings_)


def test_a_copied_config_does_not_vouch_for_other_files(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save_config(_config(tmp_path / "other"), run / "config.yaml")
    (run / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    _refused(_config(run), r"metrics\.jsonl was not written by a run")


@pytest.mark.parametrize("key", ["data__train", "data__eval", "data__exclude", "data__chat_template", "model__adapter"])
def test_never_moves_no_run_for_one_whose_inputs_are_not_there(key: str, tmp_path: Path) -> None:
    for name in ("model", "pairs.jsonl"):
        (tmp_path / name).touch()
    run = tmp_path / "run"
    open_folder(_config(run))
    (run / "model").mkdir()
    missing = f"{tmp_path}/missing{'.jinja' if 'template' in key else ''}"
    message = rf"{key.replace('__', '.')}=\S+missing\S*: there is no such file"
    _refused(_config(run, training__resume="never", **{key: missing}), message)
    check_folder(_config(run, training__resume="never", data__eval="some/dataset"))
    rows = _rows(run)  # that a program will write
    check_folder(_config(run, training__resume="never", data__train=str(rows)), written=[rows])


def test_the_config_of_a_run_that_started_over_resumes_it(tmp_path: Path) -> None:
    open_folder(_config(tmp_path / "run", training__resume="never"))
    assert notus.load_config([str(tmp_path / "run" / "config.yaml")], "dpo").training.resume == "auto"
