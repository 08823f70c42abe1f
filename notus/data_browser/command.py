"""`python -m notus data`: show the rows of a config as the model sees them, and what became of the data on the way.

`--json` prints an object per row:

    index             the row's number in the split, from 0
    id                its id, which `data.exclude` takes
    place             where it stands in the data
    source            what the data call its source, or null
    ratings           how the data rate each completion, with null for one that they do not, or null
    label             whether the completion is a good one, where the data say so, or null
    flags             names of what is peculiar about the row
    margin            its reward margin under --run, or null
    trunk             token ids that its completions share
    branches          [{ids, mask, text}] for each completion; mask is 1 where a token is learned
    cut               {prompt, completions}: tokens that were cut from the prompt, and from each completion
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from notus.runtime.command_line import called_as
from notus.runtime.process import tell

if TYPE_CHECKING:
    import torch

    from notus.data_browser.rows import Data

SHOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "config", type=os.path.expanduser, metavar="CONFIG.yaml", help="as for the commands dpo and sft"
    )
    _add_options(parser)
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--section.key=value")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n",
        dest="count",
        type=_count,
        metavar="N",
        help=f"how many rows to show; 0: all of them (default: {SHOWN}, with --html all)",
    )
    parser.add_argument("--split", choices=("train", "eval"), default="train", help="default: train")
    parser.add_argument("--task", choices=("dpo", "sft"), help="default: sft if the rows are demonstrations, else dpo")
    parser.add_argument("--ids", action="store_true", help="show token ids, too")
    parser.add_argument("--json", action="store_true", help="print an object per row, and all else to stderr")
    parser.add_argument(
        "--html",
        type=os.path.expanduser,
        metavar="FILE",
        help="write one page to browse, search, compare and mark the rows",
    )
    parser.add_argument(
        "--run",
        dest="scored_by",
        type=os.path.expanduser,
        metavar="RUN",
        help="a run of DPO: compute each row's reward margin (the best completion's reward minus the worst's; "
        "of a bad completion, minus its reward), and show the most wrongly ordered first",
    )


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from error
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Show the rows. Raises ValueError: a user's mistake, in one line; OSError if the page cannot be written."""
    # options may stand after CONFIG, among the overrides
    options = argparse.ArgumentParser(prog=called_as("data"), allow_abbrev=False)
    _add_options(options)
    args, overrides = options.parse_known_args(args.overrides, args)
    _check(args)

    from notus.runtime.distributed import is_main, process_group

    with process_group() as device:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the rows
            data = _load(args, overrides, device)
        return 0 if not is_main() or _show(data, args) else 1


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options without effect, and for a page that would replace something else."""
    if args.json and args.html:
        raise ValueError("--json and --html: choose one of them")
    if args.ids and (args.json or args.html):
        other = "--json" if args.json else "--html"
        raise ValueError(f"--ids has no effect with {other}, which has the ids: leave it out")
    if args.html:
        from notus.data_browser.page import check_page

        check_page(Path(args.html), args.config)


def _load(args: argparse.Namespace, overrides: Sequence[str], device: "torch.device") -> "Data":
    from notus.data_browser.rows import choose_task, load

    config = choose_task([args.config, *overrides], args.task)
    data = load(config, args.split, name=args.config, run=args.scored_by)
    if args.scored_by is None:
        return data
    from notus.data_browser.margins import reward_margins

    trust = config.model.trust_remote_code
    return data.with_margins(reward_margins(args.scored_by, data, device, trust_remote_code=trust))


def _show(data: "Data", args: argparse.Namespace) -> bool:
    """Write the page, or print the rows; returns False if a full disk behind stdout took them."""
    count = (0 if args.html else SHOWN) if args.count is None else args.count
    shown = data.order[: count or len(data)]
    if args.html:
        from notus.data_browser.page import write_page

        size = write_page(Path(args.html), data, shown)
        tell(f"page: {args.html} ({len(shown):,} rows, {size / 2**20:.1f} MiB)")
        return True
    return _print_json(data, shown) if args.json else _print_rows(data, shown, ids=args.ids)


def _print_json(data: "Data", shown: Sequence[int]) -> bool:
    from notus.data_browser.rows import as_json
    from notus.data_browser.terminal import report_lines

    # in another encoding, a character that is escaped as a terminal shows it would be no JSON
    escape = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    kept = True
    for index in shown:
        kept = tell(as_json(data.row(index), data.pieces, escape=escape)) and kept
    tell("\n".join(report_lines(data)), sys.stderr)
    return kept


def _print_rows(data: "Data", shown: Sequence[int], *, ids: bool) -> bool:
    from notus.data_browser.terminal import report_lines, row_lines, template_lines

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    tell("\n".join(template_lines(data, colour=colour)))
    for index in shown:
        tell("\n".join(["", *row_lines(data.row(index), data.pieces, ids=ids, colour=colour)]))
    return tell("\n".join(["", *report_lines(data)]))
