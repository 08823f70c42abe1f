"""`notus COMMAND`, or `python -m notus COMMAND`, or `torchrun -m notus COMMAND`.

The module of a command is imported only when that command runs, so that help and mistakes answer at once.
"""

import argparse
import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from notus import __version__
from notus.runtime.command_line import called_as
from notus.runtime.process import configure_allocator, guard_streams, leave, run_entry

HELP = {
    "dpo": "train with DPO or another preference loss",
    "sft": "fine-tune on demonstrations",
    "demo": "make data, train a small model on it and align it, to see the whole path work",
    "sample": "let models answer the prompts of a file, several times each, as UltraFeedback records",
    "rate": "let a judge rate the completions of UltraFeedback records",
    "curate": "turn UltraFeedback records into preference pairs",
    "iterate": "train in rounds: sample, rate, curate, DPO, each round from the last round's model",
    "data": "show the rows of a config as the model sees them; --html: as a page to browse, compare and mark them",
    "sweep": "train one run for each combination of several values, and compare them in a table and a report",
    "reference": "compute the reference log-probs of a DPO config, and stop",
    "evaluate": "measure a model: preferences on held-out pairs, or another --suite",
    "generate": "complete the prompts of a file",
    "estimate": "say whether a run fits on given GPUs, how long it takes and what it costs",
    "report": "show one or more runs, or the rounds of an iteration, as one HTML file: curves, figures, samples",
    "card": "write a model card from a run",
    "export": "write a run's model out with its card, as a Hugging Face folder or a PEFT adapter; --push: to the hub",
}
MODULES = {
    "demo": "notus.demo",
    "sample": "notus.feedback.sample",
    "rate": "notus.feedback.rate",
    "curate": "notus.curation.command",
    "iterate": "notus.feedback.iterate",
    "data": "notus.data_browser.command",
    "sweep": "notus.sweep",
    "evaluate": "notus.evaluation.evaluate",
    "generate": "notus.evaluation.generate",
    "estimate": "notus.feedback.estimate",
    "report": "notus.feedback.report",
    "card": "notus.evaluation.release.card",
    "export": "notus.evaluation.release.export",
}

# Their arguments are CONFIG.yaml [--section.key=value ...]. The same command resumes a run that a signal has stopped.
TRAINING = ("dpo", "sft", "reference")

KEYS = """The keys of the config, with their defaults. Set them in CONFIG.yaml, or here as --section.key=value, such as
--training.learning_rate=1e-6. The values are YAML; a list of strings may also be written a,b. docs/config.md has the
full descriptions."""

Declare = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names and return the exit code: 0, 1 for a user's mistake, 75 for a stopped run.

    Raises SystemExit as argparse does: 2 for a command line that cannot be read, 0 after help.
    """
    configure_allocator()  # before torch is imported
    guard_streams()
    words = sys.argv[1:] if argv is None else list(argv)
    return run_entry(_find(words), resumable=words[0] in ("dpo", "sft", "rate"))


def entry() -> NoReturn:
    """Run the command line of this process, and end the process: the installed `notus`."""
    leave(main())


def run_command(*words: object) -> None:
    """Run a command within another one: its errors are raised, and exit codes other than 0 end the process."""
    if code := _find([str(word) for word in words])():
        sys.exit(code)


def _find(words: list[str]) -> Callable[[], int]:
    """Return the command that `words` name, ready to run."""
    if words and words[0] in TRAINING:
        command, arguments = words[0], words[1:]
        if {"-h", "--help"} & set(arguments):
            _print_help(command)
            sys.exit(0)
        return lambda: _train(command, arguments)
    args = _parse(words)
    return lambda: args.run(args)


def _train(command: str, arguments: list[str]) -> int:
    """Check the config, then import torch and train, or compute the reference alone. Returns the exit code."""
    from notus.config import load_config

    if not arguments:
        raise ValueError(f"usage: {_usage(command)}; `{called_as(command)} --help` lists every key")
    if command == "sft":
        config = load_config(arguments, "sft")
        from notus.training import sft

        return sft.run(config)
    config = load_config(arguments, "dpo")
    from notus.training import dpo

    if command == "dpo":
        return dpo.run(config)
    dpo.fill_reference(config)
    return 0


def _usage(command: str) -> str:
    return f"{called_as(command)} CONFIG.yaml [--section.key=value ...]"


def _print_help(command: str) -> None:
    from notus.config_reference import help_text

    if os.environ.get("RANK", "0") == "0":
        head = f"usage: {_usage(command)}\n\n{HELP[command]}\n\n{KEYS}\n"
        print(head, help_text("sft" if command == "sft" else "dpo"), sep="\n")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=called_as(), description="Direct Preference Optimization.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    # Every rank reads the same command line. Rank 0 reports what is wrong with it.
    with contextlib.redirect_stderr(io.StringIO() if os.environ.get("RANK", "0") != "0" else sys.stderr):
        if wanted is not None and wanted not in HELP:
            near = difflib.get_close_matches(wanted, HELP, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(HELP)}"
            parser.error(f"there is no command {wanted!r}; {hint}")
        for name, line in HELP.items():
            subparser = subparsers.add_parser(name, help=line, description=line)
            if name == wanted:
                declare, run = _load(name, argv)
                declare(subparser)
                subparser.set_defaults(run=run)
        return parser.parse_args(argv)


def _load(name: str, argv: list[str]) -> tuple[Declare, Run]:
    module = importlib.import_module(MODULES[name])
    if name == "evaluate":  # its suites have arguments of their own
        module = module.find_suite(argv)
    return module.add_arguments, module.run


if __name__ == "__main__":
    entry()
