"""`python -m notus evaluate`: which suite is meant. Each has its own arguments, in a `command` module of its own."""

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType

from notus.runtime.command_line import called_as

DEFAULT = "preferences"
# By name: the module that has `add_arguments` and `run`, imported when it is asked for.
SUITES = {
    "preferences": "notus.evaluation.preferences.command",
    "open-llm": "notus.evaluation.open_llm.suite",
    "alpaca-eval": "notus.evaluation.alpaca_eval",
    "mt-bench": "notus.evaluation.mt_bench.suite",
    "win-rate": "notus.evaluation.win_rate",
}


def find_suite(argv: Sequence[str]) -> ModuleType:
    """The module of the suite that a command line names with --suite; exits as argparse does if there is none such."""
    parser = argparse.ArgumentParser(prog=called_as("evaluate"), add_help=False)  # --suit, too, as the suite does
    add_suite_argument(parser)
    known, _ = parser.parse_known_args(argv)
    return importlib.import_module(SUITES[known.suite])


def add_suite_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --suite, for the help of every suite."""
    parser.add_argument(
        "--suite",
        choices=tuple(SUITES),
        default=DEFAULT,
        help=f"what to measure (default: {DEFAULT}); --suite NAME --help lists the suite's own options",
    )
