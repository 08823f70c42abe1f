"""`python -m notus report RUN [RUN ...]`: write what the runs' folders tell as one HTML file."""

import argparse
from pathlib import Path

from notus.evaluation.files import check_output, replacing
from notus.runtime.process import tell

REPORT = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, finished or not; several: overlaid")
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help=f"default: {REPORT} in the run's folder, or for several runs in the working folder; an earlier report is "
        "replaced",
    )


def run(args: argparse.Namespace) -> int:
    """Write the report. Raises ValueError for what is no run and without plotly, OSError where it cannot be written."""
    try:
        import plotly  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("the report draws with plotly, which is not installed: pip install plotly") from error
    from notus.evaluation.report.page import GENERATOR, render
    from notus.evaluation.report.reading import read_runs

    default = Path(args.runs[0]).expanduser() / REPORT if len(args.runs) == 1 else Path(REPORT)
    output = Path(args.output) if args.output else default
    # half a character that stood alone in the data is no text that a file can hold
    page = render(read_runs(args.runs)).encode("utf-8", "replace").decode("utf-8")
    check_output(output, not_over=args.runs[0], remedy="choose another place with --output")
    if output.exists() and GENERATOR not in output.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise ValueError(f"{output}: there is a file of that name that is no report; choose another")
    with replacing(output) as file:
        file.write(page)
    tell(f"report: {output} ({len(page.encode()) / 2**20:.1f} MiB)")
    return 0
