"""Where a run goes on: the newest of its checkpoints that is whole, if its data and model are still the same."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from notus.runtime.distributed import on_main, say
from notus.training.checkpoint import DamagedCheckpointError, Progress, load_checkpoint, read_identity
from notus.training.optimizers import InPieces
from notus.training.run_folder import set_aside_damaged

# Contents that a run cannot change when it goes on.
_BOUND = ("data.train", "data.eval", "model.name_or_path")


def check_contents(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Compare the digests in the checkpoint `path` with those of this launch.

    Raises:
        ValueError: the data or the starting model are others.
    """
    changed = [key for key in now if before.get(key) != now[key]]
    for key in changed:
        if key in _BOUND:
            raise ValueError(
                f"{path} was made from other contents of {key}: restore them to go on, or start over with "
                "training.resume=never"
            )
        say(
            f"warning: {key} is not that of {path}: another device, another version, or other optimisations "
            "(NOTUS_DISABLE) computed it"
        )


def check_newest(checkpoints: Sequence[Path], now: Mapping[str, str]) -> None:
    """The same for the newest checkpoint, before any work is done on its account; collective."""
    for path in checkpoints[:1]:
        before = on_main(functools.partial(read_identity, path))
        if before:
            check_contents(path, before, now)


def load_newest(
    checkpoints: Sequence[Path],
    own: Path,
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: InPieces,
) -> tuple[Path, Progress]:
    """Load the first checkpoint that is whole; damaged ones are set aside, saying so. Collective.

    Args:
        checkpoints: the newest first.
        own: the run's `checkpoints` folder. A checkpoint elsewhere is another run's: its history is not taken over,
            and it is an error if it is damaged.
        parameters, optimizer: filled; see `load_checkpoint`.

    Raises:
        ValueError: none is whole.
    """
    named = list(parameters)
    for path in checkpoints:
        is_own = path.parent.resolve() == own.resolve()
        try:
            progress = load_checkpoint(path, named, optimizer)
        except DamagedCheckpointError as error:
            if not is_own:
                raise
            aside = on_main(functools.partial(set_aside_damaged, path))
            say(f"warning: {error}; this checkpoint is now {aside.name}")
            continue
        if not is_own:
            progress.logged, progress.trackers = 0, {}
        return path, progress
    raise ValueError(f"{own}: no checkpoint is whole (see above); set training.resume=never to start over")
