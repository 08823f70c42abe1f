"""`python -m notus export`: a run's model for others, as a Hugging Face folder or a PEFT adapter, with its card.

A finished run gives its final model, an unfinished one that of its newest checkpoint. All happens on the CPU,
in one process. Nothing is sent anywhere without --push.
"""

import argparse
import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notus.evaluation.release.command import add_card_arguments, choices, repo_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from notus.evaluation.release.facts import Facts, Variant
    from notus.evaluation.release.finished import Mark
    from notus.evaluation.release.push import Destination

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

Settings = dict[str, dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder (training.output_dir)")
    parser.add_argument("out", metavar="OUT", help="the folder to write: new, or empty")
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
    _add_push_arguments(parser)


def _add_push_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> int:
    """Export as `args` say, return 0. Raises ValueError or OSError with a message for the user."""
    from notus.evaluation.models import is_run, read_run_settings
    from notus.evaluation.release.facts import read_facts, variant_of
    from notus.evaluation.release.finished import read_mark
    from notus.evaluation.release.push import open_repository
    from notus.training.run_folder import CONFIG_FILE, MODEL

    run_folder, out = Path(args.run_folder), Path(args.out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("export works in one process: leave torchrun out")
    if not is_run(run_folder):
        raise ValueError(f"{run_folder}: no run's folder, it has no {CONFIG_FILE}; name a training.output_dir")
    settings = read_run_settings(run_folder)
    adapter = bool(settings.get("lora", {}).get("rank"))
    done = read_mark(out)
    _check(args, adapter, final=run_folder / MODEL, done=done is not None)
    facts, variant = read_facts(run_folder, settings), variant_of(lora=adapter, merge=args.merge)
    destination = _destination(args, facts, variant)
    _card(args, facts, variant, chat=True)  # what it cannot be written from is told before the work
    if done is not None:
        _check_done(args, facts, variant, done)
    if destination is not None and not args.dry_run:
        destination = open_repository(destination)
        args.push = destination.repo_id  # with its owner, as the card is to name it
    if done is None:
        _export(args, facts, variant)
        print(f"wrote {out}", flush=True)
    else:
        _renew(args, facts, variant, done)
    if destination is not None:
        _push(args, facts, destination)
    return 0


def _check(args: argparse.Namespace, adapter: bool, final: Path, done: bool) -> None:
    out = Path(args.out)
    if not args.push and (args.public or args.revision or args.commit_message or args.dry_run):
        raise ValueError("--public, --revision, --commit-message and --dry-run have no effect without --push REPO_ID")
    if args.merge and not adapter:
        raise ValueError(f"{args.run_folder}: a full fine-tuning run has nothing to merge; leave --merge out")
    if adapter and not args.merge and (args.dtype or args.max_shard_size):
        raise ValueError(
            "--dtype and --max-shard-size have no effect on an adapter, which is one fp32 file: add --merge, "
            "or leave them out"
        )
    if out.resolve() == final.resolve():
        raise ValueError(f"{out}: is where the run itself puts its final model; name another folder")
    if not done and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; name a new folder, or remove it first")


def _destination(args: argparse.Namespace, facts: "Facts", variant: "Variant") -> "Destination | None":
    from notus.evaluation.names import hub_id, public_name
    from notus.evaluation.release.push import Destination

    if not args.push:
        return None
    if variant == "adapter" and not args.base_model and hub_id(facts.base) is None:
        raise ValueError(
            f"the adapter's base model is a local folder, {public_name(facts.base)}, which others do not have: name "
            "its hub id with --base-model REPO_ID, or give --merge"
        )
    return Destination(args.push, not args.public, args.revision, args.commit_message)


def _export(args: argparse.Namespace, facts: "Facts", variant: "Variant") -> None:
    from notus.evaluation.release.card import has_chat_template
    from notus.evaluation.release.finished import write_card
    from notus.model.export import NewFolder
    from notus.runtime.distributed import process_group
    from notus.training.run_folder import MODEL

    run_folder, settings = Path(args.run_folder), facts.settings
    with process_group():
        if (run_folder / MODEL).is_dir() and variant == "adapter":
            step, fill = None, functools.partial(_copy, args, run_folder / MODEL)
        else:
            causal_lm, tokenizer, step = _load(args, settings, run_folder)
            fill = functools.partial(_write, args, settings, causal_lm, tokenizer)
        new = NewFolder(args.out, markers=set())
        new.write(functools.partial(_filled, fill))

        def add_card(partial: Path) -> None:
            text = _card(args, facts.at(step), variant, chat=has_chat_template(partial))
            write_card(partial, text, _mark(args, settings, variant, step))

        new.write(add_card)
        new.publish()


def _filled(fill: Callable[[Path], None], partial: Path) -> None:
    try:
        fill(partial)
    except OSError as error:  # it tells of the disk already
        raise ValueError(str(error)) from error


def _card(args: argparse.Namespace, facts: "Facts", variant: "Variant", *, chat: bool) -> str:
    from notus.evaluation.release.card import model_card

    return model_card(facts, variant, choices(args, name=Path(args.out).resolve().name, repo_id=args.push), chat=chat)


def _mark(args: argparse.Namespace, settings: Settings, variant: "Variant", step: int | None) -> "Mark":
    from notus.evaluation.release.facts import run_digest
    from notus.evaluation.release.finished import Mark
    from notus.evaluation.unfinished import DEFAULT_SHARD

    adapter = variant == "adapter"
    options = {
        "variant": variant,
        "dtype": None if adapter else str(_dtype(args, settings)),
        "max_shard_size": None if adapter else args.max_shard_size or DEFAULT_SHARD,
        "base_model": args.base_model if adapter else None,  # else it is the card's alone
    }
    return Mark(run_digest(Path(args.run_folder)), step, options)


def _check_done(args: argparse.Namespace, facts: "Facts", variant: "Variant", done: "Mark") -> None:
    """Raise ValueError if what OUT holds is another export, or its card can no longer say what `args` want of it."""
    from notus.evaluation.release.facts import standing_step
    from notus.evaluation.release.finished import CARD, card_was_edited, check_same

    out = Path(args.out)
    check_same(out, done, _mark(args, facts.settings, variant, standing_step(Path(args.run_folder))))
    asked = args.license or args.language or (args.base_model and variant != "adapter")
    if asked and card_was_edited(out, done):
        raise ValueError(f"{out / CARD}: was edited, so say there what --license, --language and --base-model would")


def _renew(args: argparse.Namespace, facts: "Facts", variant: "Variant", done: "Mark") -> None:
    """Of an export that is there already, write the card anew, with what was evaluated since; but not an edited one."""
    from notus.evaluation.release.card import has_chat_template
    from notus.evaluation.release.finished import CARD, card_was_edited, write_card

    out = Path(args.out)
    if card_was_edited(out, done):
        print(f"{out} is there already, and complete; its {CARD} was edited, and stays as it is", flush=True)
        return
    write_card(out, _card(args, facts.at(done.step), variant, chat=has_chat_template(out)), done)
    print(f"{out} is there already, and complete: only its {CARD} was written anew", flush=True)


def _push(args: argparse.Namespace, facts: "Facts", destination: "Destination") -> None:
    from notus.evaluation.release.facts import private_paths
    from notus.evaluation.release.push import check_no_paths, listing, upload

    out = Path(args.out)
    check_no_paths(out, private_paths(Path(args.run_folder), facts.settings))
    print(listing(out, destination) if args.dry_run else f"pushed to {upload(out, destination)}", flush=True)


def _copy(args: argparse.Namespace, source: Path, partial: Path) -> None:
    """A finished adapter is already in PEFT's layout."""
    from notus.model.adapter import ADAPTER_CONFIG
    from notus.model.export import write_json
    from notus.model.load import read_json

    shutil.copytree(source, partial, dirs_exist_ok=True)
    if args.base_model:
        settings = read_json(partial / ADAPTER_CONFIG)
        write_json(partial / ADAPTER_CONFIG, {**settings, "base_model_name_or_path": args.base_model})


def _load(
    args: argparse.Namespace, settings: Settings, run_folder: Path
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", int | None]:
    """The run's final model, its adapter merged, and None; or the model of its newest checkpoint, and its step."""
    from notus.evaluation.unfinished import load_unfinished
    from notus.model.export import load_causal_lm
    from notus.training.checkpoint import step_of
    from notus.training.run_folder import MODEL

    final, trust = run_folder / MODEL, args.trust_remote_code
    if final.is_dir():
        return *load_causal_lm(final, dtype=_dtype(args, settings), device="cpu", trust_remote_code=trust), None
    causal_lm, tokenizer, checkpoint = load_unfinished(run_folder, settings, trust_remote_code=trust)
    print(f"the run has not finished: exporting {checkpoint}", flush=True)
    return causal_lm, tokenizer, step_of(checkpoint)


def _write(
    args: argparse.Namespace,
    settings: Settings,
    causal_lm: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    partial: Path,
) -> None:
    from notus.evaluation.unfinished import DEFAULT_SHARD, write_model

    write_model(
        causal_lm,
        tokenizer,
        partial,
        base=args.base_model or settings["model"]["name_or_path"],
        dtype=_dtype(args, settings),
        merge=args.merge,
        max_shard_bytes=args.max_shard_size or DEFAULT_SHARD,
    )


def _dtype(args: argparse.Namespace, settings: Settings) -> Any:
    from notus.training.parallelize import COMPUTE_DTYPES

    return COMPUTE_DTYPES[args.dtype or settings["training"]["precision"]]


def _size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "123456", for argparse."""
    match = re.fullmatch(r"(\d+)([KMG]B)?", text.upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2] or ""]
