"""Runs that are killed or asked to stop at a random moment, started again by the same command, and compared."""

import dataclasses
import mmap
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fault_ranks import Command, Launch, descendants, end_all, launch, ranks_of, send, told, wait_until
from fault_runs import CASES, SAVE_EVERY, STEPS, Case, Undisturbed, metrics, small_parts, tensor_digests
from fault_runs import digests as digests_of
from fault_runs import undisturbed as run_undisturbed

PHASES = ("start", "reference", "step", "save", "evaluation", "export", "after")
ALONE, ASKED = 5.0, 15.0  # seconds for the other rank to end by itself, and after SIGTERM, which torchrun would send
AGAIN = 0.2  # share of the runs that are disturbed a second time
AIMED = 0.5  # share of the moments that are drawn within a phase, as the short phases would hardly be met otherwise
_START = 0.3  # seconds, before Python runs the entry
_PATIENCE = 120.0
_GRACE = 5.0  # seconds in which processes that were told to end may do so; a loaded machine takes more than one
_GOING_ON = re.compile(r"resuming from .*\(step (\d+) of")
_TRAINS, _EVALUATES = 1, 2
_doing = mmap.mmap(-1, 1)  # shared with the ranks: what no file shows


@dataclasses.dataclass
class Trial:
    """One run, disturbed once or twice.

    Attributes:
        case: what kind of run.
        torchrun: started by torchrun, not by a fork.
        by: names of the signals sent, in turn.
        moments: seconds after the start at which they were sent.
        phases: what the run was doing then.
        ranks: to which ranks they went.
        others: how the ranks without a signal ended: "with it" (all had it), "by itself",
            "by torchrun", "asked" (by SIGTERM) or "orphan".
        orphans: processes that had to be killed.
        again: steps that were taken a second time, at most.
        unwhole: half-written things found under a final name.
        losses: what is not as it would have been without the disturbance.
        seconds: of the whole trial.
        completed: the same command ran to its end with exit code 0.
    """

    case: str
    torchrun: bool
    by: list[str] = dataclasses.field(default_factory=list)
    moments: list[float] = dataclasses.field(default_factory=list)
    phases: list[str] = dataclasses.field(default_factory=list)
    ranks: list[list[int]] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    orphans: int = 0
    again: int = 0
    unwhole: list[str] = dataclasses.field(default_factory=list)
    losses: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    completed: bool = False

    @property
    def equal(self) -> bool:
        return self.completed and not self.losses

    @property
    def whole(self) -> bool:
        return not (self.losses or self.unwhole or self.orphans)


@dataclasses.dataclass
class Harness:
    """Where trials run, what they are compared with, and the dice."""

    scratch: Path
    dice: random.Random
    stopped: int | None
    measures: dict[tuple[str, bool], Undisturbed] = dataclasses.field(default_factory=dict)

    def measure(self, case: Case, torchrun: bool) -> Undisturbed:
        """The undisturbed run of a case, made once."""
        key = (case.name, torchrun)
        if key not in self.measures:
            folder = self.scratch / f"undisturbed-{case.name}-{'torchrun' if torchrun else 'forked'}"
            self.measures[key] = run_undisturbed(case, self.scratch, folder, torchrun)
        return self.measures[key]

    def trials(self, count: int, signals: tuple[signal.Signals, ...], torchrun: bool = False) -> Iterator[Trial]:
        """So many trials, the cases in turn."""
        for number in range(count):
            case = CASES[number % len(CASES)]
            trial = None
            while trial is None:
                trial = self._trial(case, signals, torchrun)
            yield trial

    def _trial(self, case: Case, signals: tuple[signal.Signals, ...], torchrun: bool) -> Trial | None:
        """One trial in a fresh folder; None if the first run was over before its moment came."""
        measure, began = self.measure(case, torchrun), time.monotonic()
        folder = self.scratch / "trial"
        command = case.command(self.scratch, folder, torchrun=torchrun)
        trial = Trial(case.name, torchrun)
        for _ in range(1 + (self.dice.random() < AGAIN)):
            run = _start(command, folder)
            sent = self._disturb(run, folder, trial, self.dice.choice(signals), measure.seconds)
            if not sent:
                break
            trial.unwhole += unwhole(folder, measure)
        if trial.by:
            _finish(trial, _start(command, folder), folder, measure)
            trial.seconds = time.monotonic() - began
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(f"{folder}-rows", ignore_errors=True)
        return trial if trial.by else None

    def _disturb(self, run: Launch, folder: Path, trial: Trial, what: signal.Signals, seconds: float) -> bool:
        """Send `what` at a random moment and see all processes end; whether the run was still there."""
        self._await_moment(run, folder, seconds)
        if run.over():
            return False
        pids = ranks_of(run) or run.pids
        chosen = self.dice.choice([[0], [1], [0, 1]]) if len(pids) == 2 else [0]
        trial.phases.append(phase(folder, run))
        send([pids[rank] for rank in chosen], what)
        trial.by.append(what.name)
        trial.moments.append(round(time.monotonic() - run.began, 3))
        trial.ranks.append(chosen)
        trial.others.append(_let_end(run, [pid for pid in run.pids if pid not in [pids[rank] for rank in chosen]]))
        # a launch that goes on is in its start first, whatever its folder says
        where = "start" if trial.moments[-1] < _START else trial.phases[-1]
        if what != signal.SIGKILL and not self._documented(run, chosen, where, (folder / "model").exists()):
            trial.losses.append(f"{what.name} in {trial.phases[-1]}: exit codes {run.codes()}, not {self.stopped}")
        trial.orphans += len(end_all(_GRACE))
        return True

    def _await_moment(self, run: Launch, folder: Path, seconds: float) -> None:
        """A moment of the whole run, each as likely as any; or one just after the beginning of some phase."""
        moment, share = self.dice.uniform(0, seconds), self.dice.random()
        aim = self.dice.choice(PHASES) if self.dice.random() < AIMED else None
        if aim is None:
            wait_until(lambda: run.over() or time.monotonic() - run.began >= moment, _PATIENCE, 0.001)
        else:
            wait_until(lambda: run.over() or phase(folder, run) == aim, _PATIENCE, 0.001)
            time.sleep(share * (0.002 if aim in ("export", "after") else 0.03))

    def _documented(self, run: Launch, chosen: list[int], where: str, finished: bool) -> bool:
        """Every rank ended with the code that means "run me again", or what it was asked to stop was done.

        Outside the training steps, a rank that has the signal ends at once, and the others for want of it.
        """
        codes = run.codes()
        if set(codes) == {self.stopped} or (finished and set(codes) <= {0, self.stopped}):
            return True
        asked = {code for rank, code in enumerate(codes) if rank in chosen}
        unprepared = {-signal.SIGTERM, -signal.SIGINT, 1} if where == "start" else set()
        return where not in ("step", "evaluation") and 0 not in codes and asked <= {self.stopped, *unprepared}


def _let_end(run: Launch, others: list[int]) -> str:
    """How the ranks without a signal end. torchrun sees to its own, by SIGTERM; a fork has nobody else to do so."""
    if run.wait(_PATIENCE if len(run.pids) == 1 else ALONE):
        return "by torchrun" if len(run.pids) == 1 else "by itself" if others else "with it"
    send(others, signal.SIGTERM)
    return "asked" if run.wait(ASKED) else "orphan"


def _start(command: Command, folder: Path) -> Launch:
    _doing[0] = 0
    return launch(command, folder.with_suffix(".log"), _watched)


def _watched(rank: int) -> None:
    """In a forked rank: small parts, and marks in shared memory while it trains and while it evaluates."""
    small_parts(rank)
    from notus.training.dpo import DPOTask
    from notus.training.sft import SFTTask
    from notus.training.trainer import Trainer

    Trainer.run = _marked(Trainer.run, _TRAINS)  # type: ignore[method-assign]
    for task in (DPOTask, SFTTask):
        task.evaluate = _marked(task.evaluate, _EVALUATES)  # type: ignore[method-assign]


def _marked(work: Callable[..., Any], mark: int) -> Callable[..., Any]:
    def run(*arguments: object) -> Any:
        before, _doing[0] = _doing[0], mark
        try:
            return work(*arguments)
        finally:
            _doing[0] = before

    return run


def phase(folder: Path, run: Launch) -> str:
    """What a run is doing: from what stands in its folder, from its log, and from its marks if it is a fork."""
    said = run.text()
    if (folder / "model").exists():
        return "after"
    if (folder / ".model.partial").exists():
        return "export"
    if "packing: " not in said:  # the last words before the policy is built; the folder may show an earlier start
        return "start"
    if _doing[0] == _EVALUATES:
        return "evaluation"
    if any((folder / "checkpoints").glob(".step-*")):
        return "save"
    if _doing[0] == _TRAINS or (len(run.pids) == 1 and (folder / "metrics.jsonl").exists()):
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
    if (folder / "model").exists() and digests_of(folder / "model") != measure.model:
        found.append("model")
    return found


def _finish(trial: Trial, run: Launch, folder: Path, measure: Undisturbed) -> None:
    """Let the same command run to its end, and compare everything with the undisturbed run."""
    logged = [record["step"] for record in metrics(folder)]
    newest = max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)
    if not run.wait(_PATIENCE) or any(run.codes()):
        trial.losses.append(f"the same command ended with {run.codes()}: {told(run)}")
        end_all(0.0)
        return
    trial.completed = True
    said = _GOING_ON.search(run.text())
    resumed = STEPS if "finished already" in run.text() else int(said[1]) if said else 0
    if resumed < newest:
        trial.losses.append(f"it went on from step {resumed}, though {newest} was there")
    trial.again = max(0, max(logged, default=0) - resumed)
    if trial.again >= 2 * SAVE_EVERY:  # the last save may still be under way in the background, not the one before
        trial.losses.append(f"{trial.again} steps were lost, with a checkpoint every {SAVE_EVERY}")
    if digests_of(folder / "model") != measure.model:
        trial.losses.append("the final model differs")
    if metrics(folder) != measure.metrics:
        trial.losses.append("metrics.jsonl differs")
    trial.unwhole += unwhole(folder, measure)
    trial.orphans += len(end_all(_GRACE)) if descendants() else 0
