"""`python -m notus export`: write a run's model as a Hugging Face folder or a PEFT adapter, with its card.

A finished run gives its final model, an unfinished one the model of its newest checkpoint. The export runs on the CPU,
in one process. Nothing is sent anywhere without --push.
"""

import argparse
import re

from notus.evaluation.release.card_command import add_card_arguments, repo_id

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


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
    from notus.evaluation.release.export import export

    export(args)
    return 0


def _size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "123456", for argparse."""
    match = re.fullmatch(r"(\d+)([KMG]B)?", text.upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2] or ""]
