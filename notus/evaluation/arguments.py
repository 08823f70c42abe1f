"""Command-line arguments that the commands of this package share; importing this starts no torch."""

import argparse
import datetime
import math
import os
from collections.abc import Callable, Collection


def add_model_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The model, which may be left out if `optional`, and how it is computed and prompted."""
    parser.add_argument(
        "model",
        type=os.path.expanduser,
        metavar="MODEL_OR_RUN",
        nargs="?" if optional else None,
        help="a model's, an adapter's or a run's folder, or a hub id",
    )
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a model is computed and prompted."""
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: the run's, or bf16")
    parser.add_argument(
        "--chat-template",
        type=os.path.expanduser,
        metavar="TEMPLATE",
        help="'zephyr' or a .jinja file (default: the run's, or the tokenizer's own)",
    )
    parser.add_argument(
        "--add-empty-system",
        action=argparse.BooleanOptionalAction,
        help="an empty system turn before conversations without one (default: as the run did, or none)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """The judge, a model behind an OpenAI-compatible endpoint; see `endpoint.judge_endpoint`."""
    parser.add_argument("--judge-model", metavar="NAME", help="the judge's name at its endpoint, as gpt-4")
    parser.add_argument(
        "--judge-url",
        metavar="URL",
        default="https://api.openai.com/v1",
        help="an OpenAI-compatible endpoint, without /chat/completions (default: OpenAI's)",
    )
    parser.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        default="OPENAI_API_KEY",
        help="the environment variable that holds the endpoint's key (default: OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--judge-timeout", type=positive, default=120.0, metavar="SECONDS", help="of one request (default: 120)"
    )
    parser.add_argument("--parallel", type=count, default=4, help="requests at a time (default: 4)")


def add_output_argument(parser: argparse.ArgumentParser, suite: str) -> None:
    """Where a suite's results go; see `results.result_folder`."""
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="DIR",
        help=f"folder of the results (default: RUN/evaluations/{suite}, or evaluations/MODEL/{suite})",
    )


def check_no_effect(
    args: argparse.Namespace,
    declare: Callable[[argparse.ArgumentParser], None],
    reason: str,
    *,
    but: Collection[str] = (),
) -> None:
    """Raise ValueError if `args` change an argument that `declare` declares, other than those in `but`.

    `reason` says why the argument has no effect, as "with --judgments".
    """
    parser = argparse.ArgumentParser()
    declare(parser)
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if name not in but and value != default:
            option = f"the model {value}" if name == "model" else "--" + name.replace("_", "-")
            raise ValueError(f"{option} has no effect {reason}: leave it out")


def count(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def day(text: str) -> str:
    """A date as YYYY-MM-DD, for argparse."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no date YYYY-MM-DD ({error})") from error


def temperature(text: str) -> float:
    """0, which is greedy, or a finite number above 0, for argparse."""
    return 0.0 if float(text) == 0 else positive(text)


def share(text: str) -> float:
    """A number above 0 and at most 1, for argparse."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value
