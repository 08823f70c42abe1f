"""`python -m notus export`: write a run's model as a Hugging Face folder or a PEFT adapter, with its card.

A finished run gives its final model, an unfinished one the model of its newest checkpoint. The export runs on the CPU,
in one process. Nothing is sent anywhere without --push. The folder notes what was exported, so that a later --push
uploads it instead of exporting again.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.release.card import (
    CARD,
    Release,
    add_card_arguments,
    digest,
    exported_step,
    has_chat_template,
    has_generation_config,
    model_card,
    release_of,
    repo_id,
)
from notus.evaluation.release.push import Destination, check_no_paths, listing, open_repository, private_paths, upload
from notus.evaluation.results import public_name
from notus.runtime.files import write_text

if TYPE_CHECKING:
    from notus.evaluation.read_run import Run

MARK = ".notus-export.json"  # hidden, so that it is not uploaded
_OTHER_BASE = (
    "note: the adapter was trained over a base in 4 bits; merged into the base as it was, or loaded on it, it makes "
    "another model: see docs/models-on-small-gpus.md"
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True)
class Mark:
    """What was exported into a folder."""

    run: str  # identifies the run; see `run_digest`
    step: int | None  # of the checkpoint; None for a finished run's model
    options: dict[str, Any]  # everything that decides the files besides the card
    card: str = ""  # the digest of the card as it was written
    began: str = ""  # when the run first began; "": not known


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "run_folder", type=os.path.expanduser, metavar="RUN", help="a run's folder (training.output_dir)"
    )
    parser.add_argument("out", type=os.path.expanduser, metavar="OUT", help="the folder to write: new, or empty")
    parser.add_argument("--merge", action="store_true", help="merge a LoRA run's adapter into its base model")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights (default: the run's precision)")
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="most bytes of a weights file, say 500MB (default: 5GB)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    add_card_arguments(parser)
    group = parser.add_argument_group("to the hub", "the login is the hub client's own: `hf auth login`, or HF_TOKEN")
    group.add_argument(
        "--push",
        type=repo_id,
        metavar="REPO_ID",
        help="upload OUT there; where an earlier export of the same has finished OUT, it is not made again",
    )
    group.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    group.add_argument("--revision", metavar="BRANCH", help="default: main")
    group.add_argument("--commit-message", metavar="TEXT", help="default: what is in it")
    group.add_argument("--dry-run", action="store_true", help="write OUT, say what would be uploaded, and send nothing")


def _size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "123456", for argparse."""
    match = re.fullmatch(r"(\d+)([KMG]B)?", text.upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2] or ""]


def run(args: argparse.Namespace) -> int:
    """Export as `args` say, return 0. Raises ValueError or OSError with a message for the user."""
    from notus.evaluation.read_run import read_run

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("export works in one process: leave torchrun out")
    out = Path(args.out)
    release = release_of(args, read_run(Path(args.run_folder)), name=out.resolve().name, repo_id=args.push)
    done = read_mark(out)
    _check_options(args, release, exists=done is not None)
    destination = Destination(args.push, not args.public, args.revision, args.commit_message) if args.push else None
    model_card(release, chat=True)  # fail before the work if it cannot be written
    if done is not None:
        _check_done(args, dataclasses.replace(release, step=exported_step(release.run.folder)), done)
    if destination is not None and not args.dry_run:
        destination = open_repository(destination)
        release = dataclasses.replace(release, repo_id=destination.repo_id)  # with its owner
    if done is None:
        _export(args, release)
        print(f"wrote {out}", flush=True)
        if release.run.settings["model"].get("quantization"):  # not a key of older runs
            print(_OTHER_BASE, flush=True)
    else:
        _renew_card(out, dataclasses.replace(release, step=done.step), done)
    if destination is not None:
        check_no_paths(out, private_paths(release.run))
        print(listing(out, destination) if args.dry_run else f"pushed to {upload(out, destination)}", flush=True)
    return 0


def _check_options(args: argparse.Namespace, release: Release, *, exists: bool) -> None:
    from notus.training.run_folder import MODEL

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
    from notus.model.export import NewFolder
    from notus.runtime.distributed import process_group

    with process_group():
        step, fill = _prepare(args, release)
        exported = dataclasses.replace(release, step=step)

        def write(partial: Path) -> None:
            try:
                fill(partial)
            except OSError as error:  # its message has the path and the free space already
                raise ValueError(str(error)) from error
            _write_card(partial, _card(exported, partial), _mark(args, exported))

        new = NewFolder(args.out, markers=set())
        new.write(write)
        new.publish()


def _prepare(args: argparse.Namespace, release: Release) -> tuple[int | None, Callable[[Path], None]]:
    """Load the final model, or that of the newest checkpoint; return its step, and how to write it into a folder."""
    from notus.evaluation.resolve_model import (
        DEFAULT_SHARD,
        adapter_below,
        load_unfinished,
        run_learned_plain_text,
        starting_folders,
        write_model,
    )
    from notus.model.export import load_causal_lm
    from notus.model.load import read_json, write_json
    from notus.model.peft_format import ADAPTER_CONFIG
    from notus.training.checkpoint import step_of
    from notus.training.run_folder import MODEL, is_extending

    run, dtype, trust, step = release.run, _dtype(args, release.run), args.trust_remote_code, None
    base, below = args.base_model or run.base, None
    final = run.folder / MODEL
    finished = final.is_dir() and not is_extending(run.folder)
    if finished and release.variant == "adapter":

        def copy(partial: Path) -> None:  # which already has PEFT's layout
            shutil.copytree(final, partial, dirs_exist_ok=True)
            if args.base_model:
                config = {**read_json(final / ADAPTER_CONFIG), "base_model_name_or_path": args.base_model}
                write_json(partial / ADAPTER_CONFIG, config)

        return None, copy
    if finished:
        causal_lm, tokenizer = load_causal_lm(final, dtype=dtype, device="cpu", trust_remote_code=trust)
    else:
        causal_lm, tokenizer, checkpoint = load_unfinished(run.folder, run.settings, trust_remote_code=trust)
        base, below = args.base_model or starting_folders(run.settings).name, adapter_below(run.settings)
        print(f"the run has not finished: exporting {checkpoint}", flush=True)
        step = step_of(checkpoint)

    def fill(partial: Path) -> None:
        write_model(
            causal_lm,
            tokenizer,
            partial,
            base=base,
            dtype=dtype,
            merge=args.merge,
            max_shard_bytes=args.max_shard_size or DEFAULT_SHARD,
            plain_text=run_learned_plain_text(run.folder),
            below=below,
        )

    return step, fill


def _dtype(args: argparse.Namespace, run: "Run") -> Any:
    from notus.training.parallelize import COMPUTE_DTYPES

    return COMPUTE_DTYPES[args.dtype or run.settings["training"]["precision"]]


def _mark(args: argparse.Namespace, release: Release) -> Mark:
    from notus.evaluation.resolve_model import DEFAULT_SHARD

    adapter = release.variant == "adapter"
    options = {
        "variant": release.variant,
        "dtype": None if adapter else str(_dtype(args, release.run)),
        "max_shard_size": None if adapter else args.max_shard_size or DEFAULT_SHARD,
        "base_model": args.base_model if adapter else None,  # else it is in the card alone
    }
    return Mark(run_digest(release.run), release.step, options, began=_began(release.run))


def run_digest(run: "Run") -> str:
    """Identify a run by its config and by when it first began: training again in its folder makes another model."""
    from notus.training.run_folder import CONFIG_FILE

    return hashlib.sha256((run.folder / CONFIG_FILE).read_bytes() + _began(run).encode()).hexdigest()


def _began(run: "Run") -> str:
    launches = run.environment.get("launches") or [{}]
    return str(launches[0].get("started", ""))


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
    mine = _mark(args, release)
    theirs, ours = ({"run": m.run, "step": m.step, **m.options} for m in (done, mine))
    name = next((name for name in ours if ours[name] != theirs.get(name)), None)
    if name in ("run", "step"):
        raise ValueError(f"{out}: holds an export of {_other(done, mine)}; name a new folder, or remove this one first")
    if name is not None:
        what = f"{name} {theirs.get(name)}, not {ours[name]}"
        raise ValueError(f"{out}: holds an export of {what}; name a new folder, or give the options that made it")
    asked = args.license or args.language or (args.base_model and release.variant != "adapter")
    if asked and _card_was_edited(out, done):
        raise ValueError(f"{out / CARD}: was edited, so say there what --license, --language and --base-model would")


def _other(done: Mark, mine: Mark) -> str:
    """Say which run an export is of that no options could make from this one."""
    if done.run == mine.run:
        was, now = ("at its end" if mark.step is None else f"at step {mark.step}" for mark in (done, mine))
        return f"this run {was}, not {now}"
    if done.began and done.began == mine.began:
        return "this run before its config changed, as training.extend does"
    return "another run"


def _renew_card(out: Path, release: Release, done: Mark) -> None:
    """Write the card of an earlier export again, with what was evaluated since; but not an edited one."""
    if _card_was_edited(out, done):
        print(f"{out} is there already, and complete; its {CARD} was edited, and stays as it is", flush=True)
        return
    _write_card(out, _card(release, out), done)
    print(f"{out} is there already, and complete: only its {CARD} was written anew", flush=True)


def _card(release: Release, folder: Path) -> str:
    return model_card(release, chat=has_chat_template(folder), generation=has_generation_config(folder))


def _card_was_edited(folder: Path, mark: Mark) -> bool:
    card = folder / CARD
    return card.is_file() and digest(card.read_text(encoding="utf-8")) != mark.card


def _write_card(folder: Path, text: str, mark: Mark) -> None:
    write_text(folder / CARD, text)
    noted = dataclasses.replace(mark, card=digest(text))
    write_text(folder / MARK, json.dumps(dataclasses.asdict(noted), indent=2) + "\n")
