"""Runs that are killed or asked to stop at a random moment, started again by the same command, and compared.

Half of the moments are drawn from the whole duration of an undisturbed run; half lie just after the beginning of a
phase drawn at random, as the short phases would hardly be met otherwise. A fifth of the runs are disturbed twice.
"""

import dataclasses
import functools
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Hook, Launch, around, launch, send, small_parts, wait_until
from safetensors.torch import save_file
from small_runs import CASES, SAVE_EVERY, STEPS, Case, Undisturbed, digests, metrics, tensor_digests

from notus.runtime.process import STOPPED

PHASES = ("start", "reference", "step", "save", "evaluation", "export", "after")
LOOP = "notus.training.trainer:Trainer.run"
EVALUATIONS = ("notus.training.dpo:DPOTask.evaluate", "notus.training.sft:SFTTask.evaluate")
ALONE, ASKED = 5.0, 15.0  # seconds for the other rank to end by itself, and after SIGTERM, which torchrun would send
AGAIN, AIMED = 0.2, 0.5  # shares of the runs that are disturbed twice, and of the moments drawn within a phase
START = 0.3  # seconds, before Python runs the entry
PATIENCE = 120.0
GRACE = 5.0  # seconds in which processes that were told to end may do so; a loaded machine takes more than one
RESUMED = re.compile(r"from .*\(step (\d+) of")


@dataclasses.dataclass
class Trial:
    """One run, disturbed once or twice.

    Attributes:
        case: what kind of run.
        torchrun: started by torchrun, not by a fork.
        signals: names of the signals sent, in turn.
        phases: what the run was doing then.
        others: how the ranks without a signal ended: "with it" (all had it), "by itself", "by torchrun", "asked" (by
            SIGTERM) or "orphan".
        orphans: processes that had to be killed.
        again: steps that were taken a second time, at most.
        unwhole: half-written things found under a final name.
        losses: what is not as it would have been without the disturbance.
        seconds: of the whole trial.
        completed: the same command ran to its end with exit code 0.
    """

    case: str
    torchrun: bool
    signals: list[str] = dataclasses.field(default_factory=list)
    phases: list[str] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    orphans: int = 0
    again: int = 0
    unwhole: list[str] = dataclasses.field(default_factory=list)
    losses: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    completed: bool = False

    @property
    def faults(self) -> list[str]:
        orphans = [f"{self.orphans} processes stayed behind"] if self.orphans else []
        return [*self.losses, *(f"half-written: {name}" for name in self.unwhole), *orphans]


@dataclasses.dataclass
class Harness:
    """Where trials run, what they are compared with, and the dice."""

    scratch: Path
    dice: random.Random
    measure: Callable[[Case, bool], Undisturbed]

    def trials(self, count: int, signals: Sequence[signal.Signals], torchrun: bool = False) -> Iterator[Trial]:
        """So many trials, the cases in turn; a run that is over before its moment does not count."""
        for number in range(count):
            trial = None
            while trial is None:
                trial = self._trial(CASES[number % len(CASES)], signals, torchrun)
            yield trial

    def _trial(self, case: Case, signals: Sequence[signal.Signals], torchrun: bool) -> Trial | None:
        """One trial in a fresh folder; None if the first run was over before its moment came."""
        measure, began = self.measure(case, torchrun), time.monotonic()
        folder, trial = self.scratch / "trial", Trial(case.name, torchrun)
        start = functools.partial(_start, case.command(self.scratch, folder, torchrun=torchrun), folder)
        for _ in range(1 + (self.dice.random() < AGAIN)):
            if not self._disturb(start(), folder, trial, self.dice.choice(signals), measure.seconds):
                break
            trial.unwhole += unwhole(folder, measure)
        if trial.signals:
            _finish(trial, start(), folder, measure)
            trial.seconds = time.monotonic() - began
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(f"{folder}-rows", ignore_errors=True)
        return trial if trial.signals else None

    def _disturb(self, run: Launch, folder: Path, trial: Trial, what: signal.Signals, seconds: float) -> bool:
        """Send `what` at a random moment and see all processes end; return whether the run was still there."""
        self._await_moment(run, folder, seconds)
        if run.over():
            return False
        pids = run.ranks() or run.pids
        chosen = self.dice.choice([[0], [1], [0, 1]]) if len(pids) == 2 else [0]
        trial.phases.append(phase(folder, run))
        # a launch that resumes is in its start first, whatever its folder says
        where = "start" if time.monotonic() - run.began < START else trial.phases[-1]
        send([pids[rank] for rank in chosen], what)
        trial.signals.append(what.name)
        trial.others.append(_let_end(run, [pid for pid in run.pids if pid not in [pids[rank] for rank in chosen]]))
        if what != signal.SIGKILL and not _as_documented(run.codes(), chosen, where, (folder / "model").exists()):
            trial.losses.append(f"{what.name} in {trial.phases[-1]}: exit codes {run.codes()}, not {STOPPED}")
        trial.orphans += len(run.end(GRACE))
        return True

    def _await_moment(self, run: Launch, folder: Path, seconds: float) -> None:
        moment, share = self.dice.uniform(0, seconds), self.dice.random()
        aim = self.dice.choice(PHASES) if self.dice.random() < AIMED else None
        if aim is None:
            wait_until(lambda: run.over() or time.monotonic() - run.began >= moment, PATIENCE, 0.001)
        else:
            wait_until(lambda: run.over() or phase(folder, run) == aim, PATIENCE, 0.001)
            time.sleep(share * (0.002 if aim in ("export", "after") else 0.03))


def _as_documented(codes: list[int | None], chosen: list[int], where: str, finished: bool) -> bool:
    """Every rank ended with the code that means "run me again", or what it was asked to stop was done.

    Outside the training steps, a rank that has the signal ends at once, and the others for want of it.
    """
    if set(codes) == {STOPPED} or (finished and set(codes) <= {0, STOPPED}):
        return True
    asked = {code for rank, code in enumerate(codes) if rank in chosen}
    unprepared = {-signal.SIGTERM, -signal.SIGINT, 1} if where == "start" else set()
    return where not in ("step", "evaluation") and 0 not in codes and asked <= {STOPPED, *unprepared}


def _let_end(run: Launch, others: list[int]) -> str:
    """How the ranks without a signal end. torchrun sees to its own, by SIGTERM; a fork has nobody else to do so."""
    if run.wait(PATIENCE if len(run.pids) == 1 else ALONE):
        return "by torchrun" if len(run.pids) == 1 else "by itself" if others else "with it"
    send(others, signal.SIGTERM)
    return "asked" if run.wait(ASKED) else "orphan"


def _start(command: Any, folder: Path) -> Launch:
    activity = folder.with_suffix(".activity")
    activity.write_text(" ")
    marks = [(LOOP, "t"), *((target, "e") for target in EVALUATIONS)]
    hooks: list[Hook] = [around(name, functools.partial(_marked, activity, mark)) for name, mark in marks]
    return launch(command, folder.with_suffix(".log"), small_parts, *hooks)


def _marked(activity: Path, mark: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run `work` while a file beside the run's folder says so."""
    before = activity.read_text()
    activity.write_text(mark)
    try:
        return work(*arguments, **options)
    finally:
        activity.write_text(before)


def phase(folder: Path, run: Launch) -> str:
    """What a run is doing: from what stands in its folder, from its log, and from its marks if it is a fork."""
    log, activity = run.text(), folder.with_suffix(".activity").read_text()
    if (folder / "model").exists():
        return "after"
    if (folder / ".model.partial").exists():
        return "export"
    if "packing: " not in log:  # the last words before the policy is built; the folder may show an earlier start
        return "start"
    if activity == "e":
        return "evaluation"
    if any((folder / "checkpoints").glob(".step-*")):
        return "save"
    if activity == "t" or (len(run.pids) == 1 and (folder / "metrics.jsonl").exists()):
        return "step"
    return "reference" if (folder / "reference").exists() else "start"


def unwhole(folder: Path, measure: Undisturbed) -> list[str]:
    """Whatever bears a final name, but is not what an undisturbed run has under that name."""
    found = []
    for path in (folder / "checkpoints").glob("step-*"):
        if tensor_digests(path) != measure.checkpoints.get(path.name) or not (path / "state.json").is_file():
            found.append(f"checkpoints/{path.name}")
    caches = tensor_digests(folder / "reference")
    found += [f"reference/{name}" for name, digest in caches.items() if digest != measure.caches.get(name)]
    if (folder / "model").exists() and digests(folder / "model") != measure.model:
        found.append("model")
    return found


def _finish(trial: Trial, run: Launch, folder: Path, measure: Undisturbed) -> None:
    """Let the same command run to its end, and compare everything with the undisturbed run."""
    logged = [record["step"] for record in metrics(folder)]
    newest = max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)
    if not run.wait(PATIENCE) or any(run.codes()):
        trial.losses.append(f"the same command ended with {run.codes()}: {run.message()}")
        run.end(0.0)
        return
    trial.completed = True
    found = RESUMED.search(run.text())
    resumed = STEPS if "finished already" in run.text() else int(found[1]) if found else 0
    if resumed < newest:
        trial.losses.append(f"it resumed from step {resumed}, though {newest} was there")
    trial.again = max(0, max(logged, default=0) - resumed)
    if trial.again >= 2 * SAVE_EVERY:  # the last save may still be under way in the background, not the one before
        trial.losses.append(f"{trial.again} steps were lost, with a checkpoint every {SAVE_EVERY}")
    if digests(folder / "model") != measure.model:
        trial.losses.append("the final model differs")
    if metrics(folder) != measure.metrics:
        trial.losses.append("metrics.jsonl differs")
    trial.unwhole += unwhole(folder, measure)
    trial.orphans += len(run.end(GRACE))


# ---- the table ----


def trials_table(trials: Sequence[Trial]) -> str:
    """A row per kind of run, signal and launcher; below, where the signals fell and how the other ranks ended."""
    kinds = list(dict.fromkeys(map(_kind, trials)))
    heads = ("run", "runs", "signals", "completed", "bitwise equal", "half-written taken for whole", "orphans",
             "most steps again", "seconds each")  # fmt: skip
    rows = [_row(kind, [trial for trial in trials if _kind(trial) == kind]) for kind in kinds]
    lines = [f"| {' | '.join(map(str, line))} |" for line in (heads, ["---"] * len(heads), *rows, _row("all", trials))]
    fell = Counter(phase for trial in trials for phase in trial.phases)
    ends = Counter(end for trial in trials for end in trial.others)
    lines += ["", "signals fell in: " + ", ".join(f"{phase} {fell[phase]}" for phase in PHASES)]
    return "\n".join([*lines, "the other rank ended: " + ", ".join(f"{end} {n}" for end, n in ends.most_common())])


def _kind(trial: Trial) -> str:
    signals = "SIGKILL" if "SIGKILL" in trial.signals else "SIGTERM, SIGINT"
    return f"{trial.case}, {signals}{' (torchrun)' * trial.torchrun}"


def _row(name: str, trials: Sequence[Trial]) -> list[object]:
    count = len(trials)
    return [
        name,
        count,
        sum(len(trial.signals) for trial in trials),
        f"{sum(trial.completed for trial in trials)} of {count}",
        f"{sum(trial.completed and not trial.losses for trial in trials)} of {count}",
        sum(len(trial.unwhole) for trial in trials),
        sum(trial.orphans for trial in trials),
        max(trial.again for trial in trials),
        f"{sum(trial.seconds for trial in trials) / count:.1f}",
    ]


@pytest.mark.slow
def test_runs_that_are_killed_or_stopped_end_as_undisturbed_ones(scratch, measure, tables, pytestconfig):
    harness = Harness(scratch, random.Random(pytestconfig.getoption("--fault-seed", 0)), measure)
    kill, stop = (signal.SIGKILL,), (signal.SIGTERM, signal.SIGINT)
    trials = [
        *harness.trials(pytestconfig.getoption("--kills", 3), kill),
        *harness.trials(pytestconfig.getoption("--terms", 2), stop),
        *harness.trials(pytestconfig.getoption("--torchrun-kills", 0), kill, torchrun=True),
    ]
    tables["Runs disturbed at random moments"] = trials_table(trials)
    assert [f"{t.case}, {t.signals} in {t.phases}: {t.faults}" for t in trials if t.faults] == []
    assert all(trial.completed and trial.phases for trial in trials)


def test_what_is_not_whole_is_found(tmp_path):
    step, reference, model = (tmp_path / name for name in ("checkpoints/step-00000003", "reference", "model"))
    for folder in (step, reference, model):
        folder.mkdir(parents=True)
        save_file({"a": torch.arange(9.0)}, folder / "a.safetensors", {"x": "1", "y": "2"})
    (step / "state.json").write_text("{}")
    measure = Undisturbed(1.0, digests(model), {step.name: tensor_digests(step)}, [], tensor_digests(reference))
    assert unwhole(tmp_path, measure) == []
    for folder in (step, reference, model):
        file = folder / "a.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    assert unwhole(tmp_path, measure) == [f"checkpoints/{step.name}", "reference/a.safetensors", "model"]
