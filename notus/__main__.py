"""`python -m notus COMMAND`: everything but training itself, which is `train_sft.py` and `train_dpo.py`.

A command's module is imported only when that command runs, so that help and mistakes answer at once.
"""

import argparse
import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from notus.runtime.process import configure_allocator, guard_streams, leave, run_entry

HELP = {
    "demo": "make data, train a small model on it and align it, to see the whole path work",
    "curate": "turn UltraFeedback records into preference pairs",
    "data": "show the rows of a config as the model sees them; --html: as a page to browse, compare and mark them",
    "reference": "fill the reference log-prob cache of a DPO config, and stop",
    "evaluate": "measure a model: preferences on held-out pairs, or another --suite",
    "generate": "complete the prompts of a file",
    "estimate": "say whether a run fits on given GPUs, how long it takes and what it costs",
    "report": "show one or more runs as one HTML file: curves, data, evaluations, samples",
    "card": "write a model card from a run",
    "export": "write a run's model out with its card, as a Hugging Face folder or a PEFT adapter; --push: to the hub",
}
MODULES = {
    "demo": "notus.demo",
    "curate": "notus.curation.command",
    "data": "notus.data_browser.command",
    "evaluate": "notus.evaluation.evaluate",
    "generate": "notus.evaluation.generate",
    "estimate": "notus.estimate.command",
    "report": "notus.evaluation.report.page",
    "card": "notus.evaluation.release.card",
    "export": "notus.evaluation.release.export",
}

Declare = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names and return the exit code: 0, 1 for a user's mistake.

    Raises SystemExit as argparse does: 2 for a command line that cannot be read, 0 after help.
    """
    configure_allocator()
    guard_streams()
    args = _parse(sys.argv[1:] if argv is None else list(argv))
    return run_entry(lambda: args.run(args))


def run_command(*words: object) -> None:
    """Run a command within another one: its errors are raised, and exit codes other than 0 end the process."""
    args = _parse([str(word) for word in words])
    if code := args.run(args):
        sys.exit(code)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m notus", description="Direct Preference Optimization.")
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
    if name == "reference":
        return _declare_reference, _run_reference
    module = importlib.import_module(MODULES[name])
    if name == "evaluate":  # its suites have arguments of their own
        module = module.find_suite(argv)
    return module.add_arguments, module.run


def _declare_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=os.path.expanduser, metavar="CONFIG.yaml", help="as for train_dpo.py")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--section.key=value")


def _run_reference(args: argparse.Namespace) -> int:
    from notus.config import load_config
    from notus.training.dpo import fill_reference

    fill_reference(load_config([args.config, *args.overrides], "dpo"))
    return 0


if __name__ == "__main__":
    leave(main())
