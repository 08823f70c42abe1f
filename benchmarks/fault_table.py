"""The faults, what a user should see of each, and whether that is what is seen."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import fault_causes as causes
from fault_ranks import end_all, told
from fault_report import table
from fault_runs import digests, metrics
from fault_scene import Scene, cut, damage, damage_logps, scenes


@dataclasses.dataclass
class Seen:
    """What happened.

    Attributes:
        codes: the broken run's exit codes by rank; None: it did not end and was killed.
        told: the error's line, or the warnings.
        seconds: of the broken run.
        orphans: processes it left.
        again: the exit codes of the same command, once the cause was gone.
        equal: whether that left the final model and the metrics of an undisturbed run.
    """

    codes: list[int | None]
    told: str
    seconds: float
    orphans: int
    again: list[int | None]
    equal: bool

    @property
    def recovered(self) -> bool:
        return self.orphans == 0 and not any(self.again) and self.equal


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, its cause, and what must be seen."""

    name: str
    cause: causes.Cause
    expect: Callable[[Seen], bool]


@dataclasses.dataclass
class Row:
    """A line of the table."""

    fault: str
    seen: Seen
    as_expected: bool


def refused(*words: str) -> Callable[[Seen], bool]:
    """The run ends with an error that has these words, and the same command finishes once the cause is gone."""
    return lambda seen: _has(seen, words) and 0 not in seen.codes and None not in seen.codes and seen.recovered


def survived(*words: str) -> Callable[[Seen], bool]:
    """The run itself finishes, and says these words."""
    return lambda seen: _has(seen, words) and not any(seen.codes) and seen.recovered


def _has(seen: Seen, words: Sequence[str]) -> bool:
    return "Traceback" not in seen.told and all(word in seen.told for word in words)


_TENSORS, _STATE = "*.safetensors", "state.json"
FAULTS = (
    Fault("kill -9 of one of two ranks", causes.killed, refused("error: ", "rank")),
    Fault("kill -9 of torchrun itself", causes.torchrun_killed, lambda seen: seen.recovered),
    Fault("disk full: checkpoint", causes.disk_full("notus.training.trainer:Trainer._save"),
          refused("checkpoints", "free")),
    Fault("disk full: reference cache", causes.disk_full("notus.training.dpo:reference_logps"),
          refused("reference", "free")),
    Fault("disk full: export", causes.disk_full("notus.training.setup:Run._export"), refused("model", "free")),
    Fault(
        "disk full: metrics", causes.disk_full("notus.training.trainer:Trainer.run"), refused("metrics.jsonl", "free")
    ),
    Fault("newest checkpoint: a bit flipped", causes.bad_checkpoint(damage, _TENSORS), survived("step-00000006")),
    Fault("newest checkpoint: truncated", causes.bad_checkpoint(cut, _TENSORS), survived("step-00000006")),
    Fault("newest checkpoint: a file missing", causes.bad_checkpoint(Path.unlink, _TENSORS), survived("step-00000006")),
    Fault("newest checkpoint: state.json truncated", causes.bad_checkpoint(cut, _STATE), survived("step-00000006")),
    Fault("every checkpoint damaged", causes.no_checkpoint_whole, refused("no checkpoint is whole")),
    Fault("reference cache: a bit flipped", causes.bad_cache(damage_logps),
          refused("error: the reference cache", "delete")),
    Fault("reference cache: truncated", causes.bad_cache(cut), refused("error: the reference cache", "delete")),
    Fault("reference cache of another model", causes.cache_of_another_model, refused("another model", "delete")),
    Fault("starting weights: truncated", causes.bad_model(cut), refused("error: ", "model.safetensors")),
    Fault("tokenised dataset: truncated", causes.bad_rows, lambda seen: seen.recovered),
    Fault("a changed key on resume", causes.changed_key, refused("dpo.beta", "another config")),
    Fault("changed data on resume", causes.changed_data, refused("data.train", "resume=never")),
    Fault("NaN in the loss", causes.poisoned("notus.training.dpo:DPOTask.row_loss"), refused("step 1", "rows")),
    Fault(
        "NaN in a gradient", causes.poisoned("notus.training.trainer:local_gradients"), refused("step 1", "gradient")
    ),
    Fault("NaN in the reference pass", causes.poisoned("notus.training.dpo:score"), refused("reference", "not finite")),
    Fault("a slow rank", causes.slow_rank, survived()),
    Fault("a rank that hangs", causes.stopped_rank,
          lambda seen: seen.codes == [1, -9] and seen.told.startswith("error: ") and seen.recovered),
    Fault("a second SIGTERM", causes.stopped_twice, lambda seen: set(seen.codes) == {128 + 15} and seen.recovered),
    Fault("W&B unreachable", causes.wandb_unreachable, survived("warning: ")),
    Fault("W&B fails in mid-run", causes.wandb_fails, survived("warning: ")),
    Fault("output folder read-only", causes.read_only_disk, refused("training.output_dir", "cannot be written")),
    Fault("output folder is a file", causes.file_in_the_way, refused("training.output_dir", "cannot be written")),
)  # fmt: skip


def cause_all(shared: Path, only: str = "") -> list[Row]:
    """Cause every fault whose name contains `only`."""
    rows = []
    with scenes(shared) as scene:
        for fault in FAULTS:
            if only in fault.name:
                with scene() as fresh:
                    seen = _see(fault, fresh)
                rows.append(Row(fault.name, seen, fault.expect(seen)))
                print(f"{'ok ' if rows[-1].as_expected else 'BAD'} {fault.name}: {seen}", file=sys.stderr, flush=True)
    return rows


def _see(fault: Fault, scene: Scene) -> Seen:
    with fault.cause(scene) as broken:
        seconds, codes, said = time.monotonic() - broken.began, broken.codes(), _plain(told(broken), scene)
        orphans = len(end_all(1.0))
    again = scene.run()
    equal = digests(scene.folder / "model") == scene.measure.model and metrics(scene.folder) == scene.measure.metrics
    codes_again = again.codes()
    end_all(1.0)
    return Seen(codes, said, round(seconds, 1), orphans, codes_again, equal)


def _plain(text: str, scene: Scene) -> str:
    """Without this machine's folders, and not longer than a cell may be."""
    plain = text.replace(str(scene.disk), "OUTPUT").replace(str(scene.root), "INPUT")
    return plain if len(plain) <= 400 else plain[:400] + " ..."


def faults_table(rows: Sequence[Row]) -> str:
    """What was seen of each fault."""
    heading = ("fault", "exit codes", "what the user is told", "seconds", "the same command then", "as it should be")
    return table(
        heading,
        [
            (
                row.fault,
                ", ".join(map(str, row.seen.codes)),
                row.seen.told,
                row.seen.seconds,
                "ends as an undisturbed run does" if row.seen.recovered else _failure(row.seen),
                "yes" if row.as_expected else "**no**",
            )
            for row in rows
        ],
    )


def _failure(seen: Seen) -> str:
    return f"exit codes {seen.again}, equal {seen.equal}, orphans {seen.orphans}"
