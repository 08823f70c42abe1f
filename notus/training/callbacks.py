"""What a Python program adds to a run beside its config: callbacks, data in memory, and how signals are handled."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from notus.runtime.preemption import Stop
from notus.training.tracking import Logger

if TYPE_CHECKING:  # it imports more than a run from files needs
    from notus.training.inputs import Inputs


class Callback:
    """Base class of callbacks: override what you need.

    The methods run on rank 0, in the thread that trains, after the metrics have been written to `metrics.jsonl`. If a
    method returns True, the run saves a checkpoint and stops after the next step; the same call resumes it.

    An exception ends the run and reaches the caller. With several ranks, that is before the next update or checkpoint,
    and the other ranks raise RuntimeError with its message.
    """

    def on_log(self, step: int, metrics: Mapping[str, float]) -> bool | None:
        """Receive the training metrics of a logged step.

        Args:
            step: optimizer steps completed.
            metrics: `loss`, `grad_norm`, `rewards/margins` and so on, as in `metrics.jsonl`.
        """
        return None

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> bool | None:
        """Receive the metrics of an evaluation on the held-out rows; their names start with `eval_`.

        The first one is that of the model before training, at step 0, unless `training.eval_at_start` is false.
        """
        return None

    def on_save(self, step: int, path: Path) -> bool | None:
        """Receive the folder of a checkpoint, once all of it is on disk.

        Checkpoints are written in the background, so training may be some steps further by then.
        """
        return None


class CallbackLogger(Logger):
    """Hands what a run reports to the caller's callbacks, in their order."""

    def __init__(self, callbacks: Sequence[Callback], stop: Stop) -> None:
        self._callbacks, self._stop = callbacks, stop

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        held_out = {name: value for name, value in metrics.items() if name.startswith("eval_")}
        trained = {name: value for name, value in metrics.items() if name not in held_out}
        if trained:
            self._each(lambda callback: callback.on_log(step, trained))
        if held_out:
            self._each(lambda callback: callback.on_evaluate(step, held_out))

    def log_initial(self, metrics: Mapping[str, float]) -> None:
        self._each(lambda callback: callback.on_evaluate(0, metrics))

    def saved(self, step: int, path: Path) -> None:
        self._each(lambda callback: callback.on_save(step, path))

    def _each(self, work: Callable[[Callback], bool | None]) -> None:
        for callback in self._callbacks:
            if work(callback) is True:
                self._stop.request()


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who starts a run, and what it needs for that.

    Attributes:
        callbacks: receive what the run logs, evaluates and saves.
        inputs: rows and a model that are in memory; rank 0 writes them to the run's folder before it reads them.
        owns_process: the run is all that the process does, so a signal may end the process. Else signals outside the
            training steps go to the handlers that were there before.
    """

    callbacks: Sequence[Callback] = ()
    inputs: "Inputs | None" = None
    owns_process: bool = True


COMMAND_LINE = Caller()
