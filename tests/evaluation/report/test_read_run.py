"""A run's folder is read as it is: going on, torn, resumed, or with files missing."""

import math
import subprocess
import sys

import pytest
from report_runs import dpo_metrics

from notus.evaluation.read_run import read_runs
from notus.evaluation.report.page import render


def read(folder):
    return read_runs([str(folder)])[0]


def test_a_finished_run(make_run):
    run = read(make_run(metrics=dpo_metrics(20, eval_every=10), training__epochs=2))
    assert (run.label, run.task, run.state) == ("run", "dpo", "finished")
    assert (run.step, run.planned_steps) == (20, 20)  # ten steps an epoch, two epochs
    assert run.curves["eval_loss"].steps.tolist() == [10, 20]
    assert run.curves["eval_loss"].values.tolist() == [0.59, 0.58]
    assert run.curves["logps/rejected"].values.tolist() == [-20.0 - step for step in range(1, 21)]


def test_max_steps_end_the_plan(make_run):
    assert read(make_run(training__epochs=3, training__max_steps=12)).planned_steps == 12


def test_a_torn_last_line_is_left_out(make_run):
    folder = make_run(finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 0.')
    run = read(folder)
    assert run.step == 10
    assert run.state == "unfinished"


def test_a_run_whose_folder_is_held_is_running(make_run):
    folder = make_run(finished=False)
    code = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    launch = subprocess.Popen([sys.executable, "-c", code, str(folder / ".lock")], stdin=-1, stdout=-1)
    assert launch.stdout.readline() == b"held\n"
    assert read(folder).state == "running"
    launch.communicate()
    assert read(folder).state == "unfinished"


def test_before_its_first_step_a_run_has_no_curves(make_run):
    folder = make_run(finished=False)
    (folder / "metrics.jsonl").unlink()
    run = read(folder)
    assert (run.curves, run.step, run.planned_steps, run.samples, run.data) == ({}, 0, None, [], {})


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1.0}', '{"step": "1"}'])
def test_a_line_that_is_no_metrics_is_named(make_run, line):
    folder = make_run()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not an object with a step"):
        read(folder)


def test_values_that_are_not_finite_are_gaps(make_run):
    metrics = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf, "bad": math.nan}]
    run = read(make_run(metrics=metrics))
    assert math.isnan(run.curves["loss"].values[1])
    assert math.isnan(run.curves["loss"].values[2])
    assert run.curves["loss"].known.steps.tolist() == [1]
    assert "bad" not in run.curves


def test_labels_are_the_shortest_ends_that_differ(make_run):
    folders = [str(make_run(name)) for name in ("a/dpo", "b/dpo")]
    assert [run.label for run in read_runs(folders)] == ["a/dpo", "b/dpo"]
    with pytest.raises(ValueError, match="given twice"):
        read_runs([folders[0], folders[0] + "/../dpo"])


def test_samples_by_prompt_and_step_and_of_a_step_taken_twice_the_last(make_run):
    def sample(step, index, text):
        return {"step": step, "index": index, "prompt": f"p{index}", "completion": text}

    run = read(make_run(samples=[sample(0, 0, "a"), sample(0, 1, "b"), sample(5, 0, "c"), sample(5, 0, "d")]))
    assert [[(s.step, s.completion) for s in found] for found in run.samples] == [[(0, "a"), (5, "d")], [(0, "b")]]


def test_what_is_no_run_is_named(tmp_path, make_run):
    with pytest.raises(ValueError, match=r"none: not a run \(it has no config\.yaml\)"):
        read(tmp_path / "none")
    with pytest.raises(ValueError, match=r"data\.json: not a JSON object"):
        read(make_run(data=[1]))


def test_files_of_nothing_but_brackets_are_named(make_run):
    run = make_run()
    (run / "data.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"data\.json: not JSON"):
        read(run)
    (run / "metrics.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not an object"):
        read(run)


def test_epochs_that_are_no_numbers_plan_nothing(make_run):
    lines = dpo_metrics(4)
    for line in lines[2:]:
        line["epoch"] = math.nan
    assert read(make_run(metrics=lines, training__epochs=2)).planned_steps == 20  # by the last that is one
    assert read(make_run("zero", metrics=[{"step": 0, "loss": 1.0, "epoch": 0.0}])).planned_steps is None


def test_a_number_beyond_all_floats_is_a_gap(make_run):
    run = read(make_run(metrics=[{"step": 1, "loss": 10**400}, {"step": 2, "loss": 1}]))
    assert math.isnan(run.curves["loss"].values[0])
    assert run.curves["loss"].values[1] == 1.0


@pytest.mark.parametrize("sample", [{}, {"index": 0, "prompt": "a"}])
def test_samples_that_are_none_are_named(make_run, sample):
    with pytest.raises(ValueError, match=r"samples\.jsonl: not as this version writes it"):
        render([read(make_run(samples=[{"step": 1, **sample}]))])
