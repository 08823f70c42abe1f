"""Write a run's model with its card into a folder, and push that folder to the hub.

The folder notes what was exported, so that a later --push uploads it instead of exporting again.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from notus.evaluation.read_run import Run, read_run
from notus.evaluation.release.card import Release, digest, exported_step, has_chat_template, model_card
from notus.evaluation.release.card_command import release_of
from notus.evaluation.release.push import Destination, check_no_paths, listing, open_repository, private_paths, upload
from notus.evaluation.resolve_model import DEFAULT_SHARD, load_unfinished, public_name, write_model
from notus.model.export import NewFolder, load_causal_lm, write_json
from notus.model.load import read_json
from notus.model.peft_format import ADAPTER_CONFIG
from notus.runtime.distributed import process_group
from notus.runtime.files import write_text
from notus.training.checkpoint import step_of
from notus.training.parallelize import COMPUTE_DTYPES
from notus.training.run_folder import CONFIG_FILE, MODEL

MARK = ".notus-export.json"  # hidden, so that it is not uploaded
CARD = "README.md"


@dataclasses.dataclass(frozen=True)
class Mark:
    """What was exported into a folder.

    Attributes:
        run: identifies the run; see `run_digest`.
        step: of the checkpoint; None for a finished run's model.
        options: everything that decides the files besides the card.
        card: the digest of the card as it was written.
    """

    run: str
    step: int | None
    options: dict[str, Any]
    card: str = ""


def export(args: argparse.Namespace) -> None:
    """Export as `args` say. Raises ValueError or OSError with a message for the user."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("export works in one process: leave torchrun out")
    run, out = read_run(Path(args.run_folder)), Path(args.out)
    release = release_of(args, run, name=out.resolve().name, repo_id=args.push)
    done = read_mark(out)
    _check_options(args, release, exists=done is not None)
    destination = Destination(args.push, not args.public, args.revision, args.commit_message) if args.push else None
    model_card(release, chat=True)  # fail before the work if it cannot be written
    if done is not None:
        _check_done(args, dataclasses.replace(release, step=exported_step(run.folder)), done)
    if destination is not None and not args.dry_run:
        destination = open_repository(destination)
        release = dataclasses.replace(release, repo_id=destination.repo_id)  # with its owner
    if done is None:
        _export(args, release)
        print(f"wrote {out}", flush=True)
    else:
        _renew_card(out, dataclasses.replace(release, step=done.step), done)
    if destination is not None:
        check_no_paths(out, private_paths(run))
        print(listing(out, destination) if args.dry_run else f"pushed to {upload(out, destination)}", flush=True)


def _check_options(args: argparse.Namespace, release: Release, *, exists: bool) -> None:
    out, adapter = Path(args.out), release.variant == "adapter"
    if not args.push and (args.public or args.revision or args.commit_message or args.dry_run):
        raise ValueError("--public, --revision, --commit-message and --dry-run have no effect without --push REPO_ID")
    if adapter and (args.dtype or args.max_shard_size):
        raise ValueError(
            "--dtype and --max-shard-size have no effect on an adapter, which is one fp32 file: add --merge, "
            "or leave them out"
        )
    if out.resolve() == (release.run.folder / MODEL).resolve():
        raise ValueError(f"{out}: the run itself puts its final model there; name another folder")
    if not exists and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; name a new folder, or remove it first")
    if args.push and adapter and release.public_base is None:
        raise ValueError(
            f"the adapter's base model is a local folder, {public_name(release.run.base)}, which others do not have: "
            "name its hub id with --base-model REPO_ID, or give --merge"
        )


def _export(args: argparse.Namespace, release: Release) -> None:
    with process_group():
        step, fill = _prepare(args, release)
        exported = dataclasses.replace(release, step=step)

        def write(partial: Path) -> None:
            try:
                fill(partial)
            except OSError as error:  # its message has the path and the free space already
                raise ValueError(str(error)) from error
            card = model_card(exported, chat=has_chat_template(partial))
            _write_card(partial, card, _mark(args, exported))

        new = NewFolder(args.out, markers=set())
        new.write(write)
        new.publish()


def _prepare(args: argparse.Namespace, release: Release) -> tuple[int | None, Callable[[Path], None]]:
    """Load the final model, or that of the newest checkpoint; return its step, and how to write it into a folder."""
    run, dtype, trust, step = release.run, _dtype(args, release.run), args.trust_remote_code, None
    final = run.folder / MODEL
    if final.is_dir() and release.variant == "adapter":
        return None, lambda partial: _copy_adapter(final, partial, args.base_model)
    if final.is_dir():
        causal_lm, tokenizer = load_causal_lm(final, dtype=dtype, device="cpu", trust_remote_code=trust)
    else:
        causal_lm, tokenizer, checkpoint = load_unfinished(run.folder, run.settings, trust_remote_code=trust)
        print(f"the run has not finished: exporting {checkpoint}", flush=True)
        step = step_of(checkpoint)

    def fill(partial: Path) -> None:
        write_model(
            causal_lm,
            tokenizer,
            partial,
            base=args.base_model or run.base,
            dtype=dtype,
            merge=args.merge,
            max_shard_bytes=args.max_shard_size or DEFAULT_SHARD,
        )

    return step, fill


def _copy_adapter(source: Path, partial: Path, base_model: str | None) -> None:
    """Copy a finished run's adapter, which already has PEFT's layout."""
    shutil.copytree(source, partial, dirs_exist_ok=True)
    if base_model:
        settings = read_json(partial / ADAPTER_CONFIG)
        write_json(partial / ADAPTER_CONFIG, {**settings, "base_model_name_or_path": base_model})


def _dtype(args: argparse.Namespace, run: Run) -> Any:
    return COMPUTE_DTYPES[args.dtype or run.settings["training"]["precision"]]


def _mark(args: argparse.Namespace, release: Release) -> Mark:
    adapter = release.variant == "adapter"
    options = {
        "variant": release.variant,
        "dtype": None if adapter else str(_dtype(args, release.run)),
        "max_shard_size": None if adapter else args.max_shard_size or DEFAULT_SHARD,
        "base_model": args.base_model if adapter else None,  # else it is in the card alone
    }
    return Mark(run_digest(release.run), release.step, options)


def run_digest(run: Run) -> str:
    """Identify a run by its config and by when it first began: training again in its folder makes another model."""
    launches = run.environment.get("launches") or [{}]
    began = str(launches[0].get("started", ""))
    return hashlib.sha256((run.folder / CONFIG_FILE).read_bytes() + began.encode()).hexdigest()


def read_mark(folder: Path) -> Mark | None:
    """Read what an export noted; None if the folder is no export. Raises ValueError for a damaged note."""
    path = folder / MARK
    if not path.is_file():
        return None
    try:
        return Mark(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not what an export notes ({error}); remove {folder}, and export again") from error


def _check_done(args: argparse.Namespace, release: Release, done: Mark) -> None:
    """Raise ValueError if OUT holds another export, or its card was edited and cannot take what `args` say of it."""
    out = Path(args.out)
    theirs, ours = ({"run": m.run, "step": m.step, **m.options} for m in (done, _mark(args, release)))
    name = next((name for name in ours if ours[name] != theirs.get(name)), None)
    if name is not None:
        what = "another run" if name == "run" else f"{name} {theirs.get(name)}, not {ours[name]}"
        raise ValueError(f"{out}: holds an export of {what}; name a new folder, or give the options that made it")
    asked = args.license or args.language or (args.base_model and release.variant != "adapter")
    if asked and _card_was_edited(out, done):
        raise ValueError(f"{out / CARD}: was edited, so say there what --license, --language and --base-model would")


def _renew_card(out: Path, release: Release, done: Mark) -> None:
    """Write the card of an earlier export again, with what was evaluated since; but not an edited one."""
    if _card_was_edited(out, done):
        print(f"{out} is there already, and complete; its {CARD} was edited, and stays as it is", flush=True)
        return
    _write_card(out, model_card(release, chat=has_chat_template(out)), done)
    print(f"{out} is there already, and complete: only its {CARD} was written anew", flush=True)


def _card_was_edited(folder: Path, mark: Mark) -> bool:
    card = folder / CARD
    return card.is_file() and digest(card.read_text(encoding="utf-8")) != mark.card


def _write_card(folder: Path, text: str, mark: Mark) -> None:
    write_text(folder / CARD, text)
    noted = dataclasses.replace(mark, card=digest(text))
    write_text(folder / MARK, json.dumps(dataclasses.asdict(noted), indent=2) + "\n")
