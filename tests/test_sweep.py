"""`notus sweep`: the grid, its names, what is run and resumed, and the table, with runs that are faked or tiny."""

import datetime
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_runs import dpo_metrics, sft_metrics, write_run
from runs import read_metrics, settings, write_messages, write_pairs
from toys import toy_model_folder

from notus import __main__ as entry
from notus import sweep
from notus.config import load_config, save_config
from notus.runtime.process import STOPPED
from notus.training import dpo
from notus.training.data_files import FILES, stamps
from notus.training.scoring import score

BASE = {
    "model": {"name_or_path": "base"},
    "data": {"train": "pairs.jsonl"},
    "training": {"output_dir": "runs/sweep"},
    "dpo": {"beta": 0.1},
}
ROOT = Path(__file__).resolve().parents[1]
ACCURACY = "eval_rewards/accuracies"


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_config(tree: dict[str, Any] = BASE, name: str = "config.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(tree))
    return name


def planned(*words: str, task: Any = "dpo", output: str | None = None, **sections: Any) -> list[sweep.Planned]:
    return sweep.plan(write_config({**BASE, **sections}), words, task=task, output=output)[1]


def test_files_that_no_sweep_wrote_are_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "sweep"
    folder.mkdir(parents=True)
    for name, own in (("sweep.json", '{"sorted_by": null, "runs": []}'), ("report.html", "")):
        (folder / name).write_text("mine")
        with pytest.raises(ValueError, match=rf"{name} was not written by a sweep"):
            planned("--dpo.beta=0.1,0.2")
        (folder / name).write_text(own)
    assert len(planned("--dpo.beta=0.1,0.2")) == 2


class FakeRunner:
    """Writes a run's folder in place of training it; `codes` are the exit codes of the runs in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *codes: int) -> None:
        self.codes, self.commands = list(codes), []
        monkeypatch.setattr(sweep.Child, "run", lambda child, command: self(child, command))
        monkeypatch.setattr(sweep, "_report", lambda runs, output: self.reported.append([run.name for run in runs]))
        self.reported: list[list[str]] = []

    @property
    def names(self) -> list[str]:
        return [Path(load_config(command[4:], "dpo").training.output_dir).name for command in self.commands]

    def __call__(self, child: sweep.Child, command: list[str]) -> int:
        self.commands.append(command)
        code = self.codes.pop(0) if self.codes else 0
        config = load_config(command[4:], "dpo")
        if code == 1:
            return 1
        folder = Path(config.training.output_dir)
        metrics = dpo_metrics(4, eval_every=2)
        metrics[-1]["eval_rewards/accuracies"] = config.dpo.beta
        write_run(folder, metrics=metrics, environment={"seconds": 7.4}, finished=code == 0)
        save_config(config, folder / "config.yaml")
        return code


# ---- the grid ----


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.05,0.1", ["0.05", "0.1"]),
        ("1e-6", ["1e-6"]),
        ("[q_proj],[q_proj, v_proj]", ["[q_proj]", "[q_proj, v_proj]"]),
        ("sigmoid,{sigmoid: 1, simpo: 0.5}", ["sigmoid", "{sigmoid: 1, simpo: 0.5}"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("don't,won't", ["don't", "won't"]),
        ("['a,]',b],c", ["['a,]',b]", "c"]),
        ("a,,b", ["a", "", "b"]),
    ],
)
def test_commas_outside_brackets_and_quotes_part_values(text, values):
    assert sweep.split_values(text) == values


def test_the_grid_has_every_combination_and_one_cache():
    runs = planned("--dpo.beta=0.05,0.1", "--training.learning_rate=1e-6,5e-7", "--training.epochs=2")
    assert [run.name for run in runs] == [
        "beta-0.05_learning_rate-1e-06",
        "beta-0.05_learning_rate-5e-07",
        "beta-0.1_learning_rate-1e-06",
        "beta-0.1_learning_rate-5e-07",
    ]
    assert [(run.config.dpo.beta, run.config.training.learning_rate) for run in runs] == [
        (0.05, 1e-6), (0.05, 5e-7), (0.1, 1e-6), (0.1, 5e-7),
    ]  # fmt: skip
    assert {run.config.training.epochs for run in runs} == {2}
    assert {run.config.reference.cache_dir for run in runs} == {"runs/sweep/reference"}
    assert [run.config.training.output_dir for run in runs] == [f"runs/sweep/{run.name}" for run in runs]


def test_all_runs_have_the_date_of_the_first():
    (run, _) = planned("--dpo.beta=0.1,0.2")
    assert run.config.data.template_date == datetime.date.today().isoformat()
    write_run(Path("runs/sweep/beta-0.1"), data__template_date="2026-01-31")
    assert [run.config.data.template_date for run in planned("--dpo.beta=0.1,0.2")] == ["2026-01-31"] * 2
    (run, _) = planned("--dpo.beta=0.1,0.2", "--data.template_date=2025-12-24")
    assert run.config.data.template_date == "2025-12-24"


def test_the_folder_may_be_another_one_with_any_letters():
    (first, _) = planned("--dpo.beta=1,2", output="/data/a b: 'ü'")
    assert first.config.training.output_dir == "/data/a b: 'ü'/beta-1"
    assert first.config.reference.cache_dir == "/data/a b: 'ü'/reference"


def test_a_loss_without_reference_gets_no_cache():
    caches = [run.config.reference.cache_dir for run in planned("--dpo.loss_type=sigmoid,simpo")]
    assert caches == ["runs/sweep/reference", None]
    given = planned("--dpo.loss_type=sigmoid,simpo", reference={"cache_dir": "cache"})
    assert [run.config.reference.cache_dir for run in given] == ["cache", None]
    assert [run.config.reference.cache_dir for run in planned("--dpo.beta=1,2", "--reference.cache_dir=c")] == ["c"] * 2
    with pytest.raises(ValueError, match=r"reference.cache_dir has no effect with dpo.loss_type 'simpo'"):
        planned("--dpo.loss_type=simpo,cpo", "--reference.cache_dir=c")


def test_a_loss_without_reference_gets_no_reference_model_either():
    given = planned("--dpo.loss_type=sigmoid,simpo", reference={"model": "first"})
    assert [run.config.reference.model for run in given] == ["first", None]
    assert [run.config.reference.cache_dir for run in given] == ["runs/sweep/reference", None]
    swept = planned("--reference.model=first,null", "--dpo.loss_type=ipo")
    assert [run.config.reference.model for run in swept] == ["first", None]
    with pytest.raises(ValueError, match=r"reference.model has no effect with dpo.loss_type 'simpo'"):
        planned("--dpo.loss_type=simpo,cpo", "--reference.model=first")


def test_sft_is_swept_too():
    tree = {key: value for key, value in BASE.items() if key != "dpo"}
    folder, runs = sweep.plan(write_config(tree), ["--training.learning_rate=1e-5,2e-5"], task="sft", output=None)
    assert folder == Path("runs/sweep")
    assert [run.name for run in runs] == ["learning_rate-1e-05", "learning_rate-2e-05"]
    command = sweep.Launcher("config.yaml", "sft").command(runs[0])
    assert command[:5] == [sys.executable, "-m", "notus", "sft", "config.yaml"]
    assert not any("reference" in word for word in command)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"dpo.beta": 0.1}, "beta-0.1"),
        ({"dpo.beta": 1.0}, "beta-1"),
        ({"dpo.beta": 0.1234567891}, "beta-0.1234567891"),
        ({"training.compile": True, "data.eval_size": 8}, "compile-true_eval_size-8"),
        ({"training.max_grad_norm": None}, "max_grad_norm-null"),
        ({"lora.target_modules": ["q_proj", "v_proj"]}, "target_modules-q_proj+v_proj"),
        ({"dpo.options.simpo_gamma": 0.5}, "simpo_gamma-0.5"),
        ({"dpo.options.alpha": 1.0, "lora.alpha": 2.0}, "dpo.options.alpha-1_alpha-2"),
    ],
)
def test_names_are_readable(values, name):
    assert sweep.run_name(values) == name


def test_names_are_safe_and_differ_where_values_do():
    values: list[Any] = [
        "org/model", "other/model", "model", "../model", "a b", "a-b", "-", "x" * 300, "x" * 301, ["a", "b"], ["a+b"],
        {"sigmoid": 1.0}, {"sigmoid": 0.5}, [{"path": "a/train.jsonl", "weight": 1.0}],
        [{"path": "b/train.jsonl", "weight": 1.0}], "ü", "ö", 1e-6, 0.000001000001,
    ]  # fmt: skip
    names = [sweep.run_name({"model.name_or_path": value}) for value in values]
    assert len(set(names)) == len(values)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._+-") and len(name) < 80 for name in names)
    assert names[0].startswith("name_or_path-model-")
    long = [sweep.run_name({f"data.key{n}": "y" * 40 for n in range(9)} | {"dpo.beta": beta}) for beta in (0.1, 0.2)]
    assert len(set(long)) == 2
    assert all(len(name) < 200 for name in long)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dpo.beta=0.1"], "no key has several values; for example --dpo.beta=0.05,0.1,0.3"),
        (["--dpo.beta=0.1,-1"], r"sweep, run --dpo.beta=-1: command line: dpo.beta must be a number > 0, not -1"),
        (["--dpo.betta=0.1,1"], "dpo.betta does not exist; did you mean 'beta'"),
        (["--dpo.beta=0.1,"], "a comma with no value beside it"),
        (["--dpo.beta=0.1,0.10"], "--dpo.beta=0.1 and --dpo.beta=0.10 are the same run"),
        (["--dpo.beta=0.1,0.2", "--dpo.beta=0.3"], "dpo.beta is given twice"),
        (["--training.output_dir=a,b"], "use --output DIR"),
        (["--training.resume=auto,never"], "remove it"),
        (["--dpo.beta=1,2", "--training.resume=never"], "training.resume=never"),
        (["--lora.target_modules=q_proj,v_proj", "--lora.rank=2"], r"\[q_proj,v_proj\] for one value, or \[q_proj\],"),
        (["--dpo.beta=1,2", "--lora.alpha=3"], "lora.alpha has no effect while lora.rank is 0"),
        (["--dpo.beta", "0.1,0.2", "--training.seed=1,2"], "needs a = between"),
        (["--dpo.beta", "0.1,0.2"], "needs a = between: --dpo.beta=0.1,0.2"),
        (["--learning_rate=1,2"], "--learning_rate has no section; set training.learning_rate"),
    ],
)
def test_a_grid_that_cannot_be_run_is_one_clear_error(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        planned(*words)
    assert "\n" not in str(caught.value)


def test_words_beside_lists_are_values_where_the_key_has_such_words():
    runs = planned("--lora.target_modules=all-linear,[q_proj]", "--lora.rank=2")
    assert [run.name for run in runs] == ["target_modules-all-linear", "target_modules-q_proj"]


def test_the_task_is_found_or_asked_for():
    assert sweep.find_task(write_config()) == "dpo"
    plain = write_config({key: value for key, value in BASE.items() if key != "dpo"}, "plain.yaml")
    assert sweep.find_task(plain, ["--dpo.beta=1,2"]) == "dpo"
    with pytest.raises(ValueError, match=r"add --task dpo or --task sft"):
        sweep.find_task(plain, ["--training.seed=1,2"])  # there are no such rows


def test_demonstrations_are_swept_by_sft(capsys):
    plain = write_config({key: value for key, value in BASE.items() if key != "dpo"}, "plain.yaml")
    rows = write_messages(Path("rows.jsonl"), 3).read_text()
    words = ["--training.learning_rate=1e-5,2e-5", "--data.train=rows.jsonl"]
    assert entry.main(["sweep", plain, *words, "--print"]) == 0
    assert all(" -m notus sft plain.yaml " in line for line in capsys.readouterr().out.splitlines())
    assert sweep.find_task(plain, [*words, "--dpo.beta=0.2"]) == "dpo"
    # SFT could learn the chosen answer of the pair, DPO could drop the others
    Path("rows.jsonl").write_text(rows + write_pairs(Path("pairs.jsonl"), 1).read_text())
    with pytest.raises(ValueError, match=r"add --task dpo or --task sft"):
        sweep.find_task(plain, words)


def test_commands_are_printed_for_a_shell(capsys):
    path = write_config(name="my config.yaml")
    words = ["--dpo.loss_type=sigmoid,{sigmoid: 1, ipo: 0.5}", "--nproc-per-node=4", "--print"]
    assert entry.main(["sweep", path, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        command = shlex.split(line)
        assert command[:5] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
        assert command[5:9] == ["-m", "--", "notus", "dpo"]
        load_config(command[9:], "dpo")
    assert load_config(shlex.split(lines[1])[9:], "dpo").dpo.loss_type == {"sigmoid": 1.0, "ipo": 0.5}
    assert not Path("runs").exists()


# ---- the runs ----


def test_runs_are_skipped_resumed_and_added(monkeypatch, capsys):
    runner, config = FakeRunner(monkeypatch, 0, STOPPED), write_config()
    assert entry.main(["sweep", config, "--dpo.beta=0.1,0.2,0.3"]) == 75
    assert "2 of 3 runs are left" in capsys.readouterr().err
    assert runner.names == ["beta-0.1", "beta-0.2"]
    assert runner.reported == []  # a preempted machine has no time for it
    shutil.rmtree("runs/sweep/beta-0.2")  # the fake writes the folder anew
    assert entry.main(["sweep", config, "--dpo.beta=0.1,0.2,0.3"]) == 0
    assert runner.names[2:] == ["beta-0.2", "beta-0.3"]
    assert entry.main(["sweep", config, "--dpo.beta=0.3,0.4"]) == 0  # another grid: one more run, a table of all
    assert runner.names[4:] == ["beta-0.4"]
    output = capsys.readouterr().out
    assert "run 1 of 2: beta-0.3: finished already" in output
    assert sorted(runner.reported[-1]) == ["beta-0.1", "beta-0.2", "beta-0.3", "beta-0.4"]
    summary = json.loads(Path("runs/sweep/sweep.json").read_text())
    assert summary["sorted_by"] == "eval_rewards/accuracies"
    assert [run["settings"] for run in summary["runs"]] == [{"dpo.beta": beta} for beta in (0.4, 0.3, 0.2, 0.1)]


def test_the_table_compares_the_runs(monkeypatch, capsys):
    FakeRunner(monkeypatch, 0, 0, 1)
    words = ["--dpo.beta=0.1,0.2,0.3", "--sort", "eval_loss"]
    assert entry.main(["sweep", write_config(), *words]) == 1
    shown = capsys.readouterr()
    assert "failed: beta-0.3 (exit code 1)" in shown.err
    lines = shown.out.splitlines()
    # the fake evaluates at steps 2 and 4: accuracies 0.75, then β; losses 0.598, then 0.596; margins 0.25
    assert [line.split() for line in lines[-4:]] == [
        ["beta", ACCURACY, "best", "eval_loss", "best", "eval_rewards/margins", "seconds", "state", "run"],
        ["0.1", "0.1", "0.75", "0.596", "0.596", "0.25", "7", "finished", "beta-0.1"],
        ["0.2", "0.2", "0.75", "0.596", "0.596", "0.25", "7", "finished", "beta-0.2"],
        ["0.3", "failed", "beta-0.3"],
    ]  # fmt: skip
    assert entry.main(["sweep", write_config(), "--dpo.beta=0.1,0.2", "--table", "--sort", "accuracy"]) == 0
    shown = capsys.readouterr()
    assert "--sort accuracy: no run has this metric" in shown.err
    assert [line.split()[0] for line in shown.out.splitlines()[-3:]] == ["beta", "0.2", "0.1"]


def test_data_that_change_before_a_sweep_end_it_and_during_it_do_not(monkeypatch, capsys, tmp_path):
    pairs, config = write_pairs(tmp_path / "train.jsonl", 2), write_config()

    class Changing(FakeRunner):
        def __call__(self, child: sweep.Child, command: list[str]) -> int:
            super().__call__(child, command)
            run = load_config(command[4:], "dpo")
            noted = {"train": {}, "eval": None, FILES: stamps(run, {})}
            (Path(run.training.output_dir) / "data.json").write_text(json.dumps(noted))
            write_pairs(pairs, 3)
            return 0

    runner = Changing(monkeypatch)
    words = ["sweep", config, f"--data.train={pairs}", "--dpo.beta=0.1,0.2"]
    assert entry.main(words) == 0
    assert runner.names == ["beta-0.1", "beta-0.2"]
    assert "finished" in capsys.readouterr().out  # the table
    assert entry.main(words) == 1
    said = capsys.readouterr().err
    assert "other contents of data.train" in said
    assert "--output" in said
    assert "training.resume" not in said  # which a sweep refuses
    assert len(runner.names) == 2


def test_a_failure_stops_the_sweep_only_if_told_so(monkeypatch, capsys):
    runner = FakeRunner(monkeypatch, 1)
    assert entry.main(["sweep", write_config(), "--dpo.beta=0.1,0.2", "--stop-on-error"]) == 1
    assert runner.names == ["beta-0.1"]
    assert "1 of 2 runs are left" in capsys.readouterr().err
    runner.codes = [-signal.SIGKILL]
    assert entry.main(["sweep", write_config(), "--dpo.beta=0.3,0.2"]) == 1
    assert runner.names[1:] == ["beta-0.3", "beta-0.2"]
    assert "failed: beta-0.3 (killed by SIGKILL)" in capsys.readouterr().err


def test_a_run_out_of_its_hours_is_left(monkeypatch, capsys):
    class OutOfHours(FakeRunner):
        def __call__(self, child: sweep.Child, command: list[str]) -> int:
            super().__call__(child, command)
            return 0  # as after training.max_hours

    runner = OutOfHours(monkeypatch, 2, 0)
    assert entry.main(["sweep", write_config(), "--dpo.beta=0.1,0.2"]) == 75
    assert runner.names == ["beta-0.1", "beta-0.2"]
    assert "1 of 2 runs are left; the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_the_sweep(monkeypatch, capsys, number, code):
    class Signalled(FakeRunner):
        def __call__(self, child: sweep.Child, command: list[str]) -> int:
            super().__call__(child, command)
            os.kill(os.getpid(), number)
            return 1  # what torchrun returns then

    runner = Signalled(monkeypatch, STOPPED)
    assert entry.main(["sweep", write_config(), "--dpo.beta=0.1,0.2"]) == code
    assert runner.names == ["beta-0.1"]
    assert f"stopped by {number.name}: 2 of 2 runs are left" in capsys.readouterr().err


def test_a_child_gets_the_signal_and_the_time_to_save(tmp_path):
    code = (
        "import os, signal, sys, time, pathlib\n"
        "assert os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'] == '600'\n"
        "saved = lambda *_: (time.sleep(0.2), sys.exit(75))\n"
        "signal.signal(signal.SIGTERM, saved)\npathlib.Path('ready').touch()\ntime.sleep(60)"
    )

    def terminate() -> None:
        while not Path("ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before, child = signal.getsignal(signal.SIGTERM), sweep.Child()
    threading.Thread(target=terminate).start()
    with child.listening():
        assert child.run([sys.executable, "-c", code]) == 75
    assert child.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_starts_where_a_folder_holds_another_run(monkeypatch):
    runner, config = FakeRunner(monkeypatch), write_config()
    assert entry.main(["sweep", config, "--dpo.beta=0.1,0.2"]) == 0
    assert entry.main(["sweep", config, "--dpo.beta=0.3,0.2", "--training.epochs=2"]) == 1
    assert runner.names == ["beta-0.1", "beta-0.2"]
    with pytest.raises(ValueError, match=r"training.epochs \(was 3, is 2\)"):
        sweep.run(entry._parse(["sweep", config, "--dpo.beta=0.3,0.2", "--training.epochs=2"]))


def test_a_runs_folder_is_no_sweeps_folder():
    write_run(Path("runs/sweep"))
    with pytest.raises(ValueError, match=r"runs/sweep holds a run: .*--output DIR"):
        planned("--dpo.beta=0.1,0.2")


def test_ranks_do_not_start_sweeps(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun, with --nproc-per-node N"):
        sweep.run(entry._parse(["sweep", write_config(), "--dpo.beta=0.1,0.2"]))


# ---- the comparison ----


def test_sft_without_evaluation_is_compared_by_its_last_loss(capsys):
    tree = {key: value for key, value in BASE.items() if key != "dpo"}
    for seed, steps in ((1, 2), (2, 5)):  # the last loss is 5 / steps
        write_run(Path(f"runs/sweep/seed-{seed}"), "sft", metrics=sft_metrics(steps), training__seed=seed)
    assert entry.main(["sweep", write_config(tree), "--task=sft", "--training.seed=1,2", "--table"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith(("run", "-1", "-2"))]
    assert [(line[0], line[-1]) for line in lines] == [("seed", "run"), ("2", "seed-2"), ("1", "seed-1")]
    assert "loss" in lines[0]
    assert "1" in lines[1][1:-1]


def test_the_page_on_sweeps_shows_a_grid_that_is_valid(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("notus sweep ")]
    assert len(commands) == 3
    for command, count in zip(commands, (6, 3, 3), strict=True):
        words = [word for word in shlex.split(command.split(" > ")[0])[1:] if word not in ("--print", "--table")]
        assert entry.main([*words, "--print"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == count


def test_two_real_runs_compute_the_reference_once(tmp_path, monkeypatch):
    tree = settings(
        tmp_path / "sweep", toy_model_folder(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 8),
        data__eval_size=2, dpo__beta=0.1,
    )  # fmt: skip
    monkeypatch.setattr(sweep.Child, "run", lambda child, command: entry.main(list(command[3:])))
    monkeypatch.setattr(sweep, "_report", lambda runs, output: None)
    computed, inner = [], dpo._with_reference

    def counted(job: Any, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(dpo, "score", lambda *given, **named: computed.append(1) or score(*given, **named))
            return inner(job, *arguments)

    monkeypatch.setattr(dpo, "_with_reference", counted)
    assert entry.main(["sweep", write_config(tree), "--dpo.beta=0.1,0.5"]) == 0
    assert len(computed) == 2  # of training and evaluation, by the first run
    assert len(list((tmp_path / "sweep" / "reference").glob("*.safetensors"))) == 2
    first, second = (read_metrics(tmp_path / "sweep" / f"beta-{beta}") for beta in (0.1, 0.5))
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], abs=1e-6)
    # before the first update, both have the same log-probs
    assert first[0]["logps/chosen"] == second[0]["logps/chosen"]
    assert first[-1]["eval_rewards/margins"] != second[-1]["eval_rewards/margins"]
