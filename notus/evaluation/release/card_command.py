"""`python -m notus card`: a model card, written from a run."""

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from notus.evaluation.read_run import Run
    from notus.evaluation.release.card import Release

README = "README.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder (training.output_dir)")
    parser.add_argument(
        "--output", metavar="FILE", help=f"a new file, or - for the terminal (default: {README} in the run's folder)"
    )
    parser.add_argument("--merge", action="store_true", help="of a LoRA run: the card of the merged model")
    parser.add_argument("--repo-id", type=repo_id, metavar="REPO_ID", help="where on the hub the model will be")
    add_card_arguments(parser)


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """What a card says and no run knows."""
    parser.add_argument(
        "--base-model", type=repo_id, metavar="REPO_ID", help="the base model's hub id, where it was a local folder"
    )
    parser.add_argument(
        "--license", type=_word, metavar="ID", help="as the hub names it, say apache-2.0 (default: the base model's)"
    )
    parser.add_argument("--language", type=_language, metavar="CODE", nargs="+", help="languages, say: en de")


def release_of(args: argparse.Namespace, run: "Run", *, name: str, repo_id: str | None) -> "Release":
    """Return the finished run's model as the command line describes it. Raises ValueError for a merge without LoRA."""
    from notus.evaluation.release.card import Release, variant_of

    return Release(
        run,
        variant_of(run, merge=args.merge),
        name,
        repo_id=repo_id,
        base_model=args.base_model,
        licence=args.license,
        languages=tuple(args.language or ()),
    )


def run(args: argparse.Namespace) -> int:
    """Write the card, return 0. Raises ValueError or OSError with a message for the user."""
    from notus.evaluation.read_run import read_run
    from notus.evaluation.release import card
    from notus.evaluation.results import check_output
    from notus.runtime.files import write_text
    from notus.training.run_folder import MODEL

    folder = Path(args.run_folder)
    release = release_of(args, read_run(folder), name=folder.resolve().name, repo_id=args.repo_id)
    release = dataclasses.replace(release, step=card.exported_step(folder))
    finished = release.step is None
    chat = card.has_chat_template(folder / MODEL) if finished else card.will_have_chat_template(release.run)
    text = card.model_card(release, chat=chat)
    if args.output == "-":
        sys.stdout.write(text)
        return 0
    output = Path(args.output) if args.output else folder / README
    check_output(output, not_over=str(folder))
    if output.exists() and not card.is_untouched(output):
        raise ValueError(
            f"{output}: exists, and was edited, or is no card of ours; remove it, or name another --output"
        )
    write_text(output, card.signed(text))
    print(f"wrote {output}")
    return 0


def repo_id(text: str) -> str:
    """A name that the hub can have, for argparse."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of the hub's form, USER/NAME") from error
    return text


def _word(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no licence id of the hub's, such as apache-2.0 or mit")
    return text


def _language(text: str) -> str:
    if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no language code of two or three letters, such as en")
    return text
