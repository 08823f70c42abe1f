"""`python -m notus report RUN [RUN ...]`: write what the runs' folders hold as one HTML file without links outside."""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from notus.evaluation.html import check_page, environment, script, security_policy, style
from notus.evaluation.results import parse_files
from notus.runtime.files import write_text
from notus.runtime.process import tell

if TYPE_CHECKING:
    from notus.evaluation.read_run import Run
    from notus.evaluation.report.charts import Panel

REPORT = "report.html"
GENERATOR = '<meta name="generator" content="notus report">'  # marks a file as an earlier report
HERE = Path(__file__).parent
COLOURS = 7  # --c0 to --c6 in page.css
MOST_NAMED = 4  # runs that the title names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "runs",
        type=os.path.expanduser,
        nargs="+",
        metavar="RUN",
        help="a run's folder, finished or not; several are compared; or the folder of `notus iterate`",
    )
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="FILE.html",
        help=f"where to write the report (default: {REPORT} in the run's folder, or for several runs in the current "
        "folder); an earlier report is replaced",
    )


def run(args: argparse.Namespace) -> int:
    """Write the report. Raises ValueError for what is no run and without plotly, OSError if it cannot be written."""
    check_plotly()
    from notus.evaluation.read_run import read_runs

    default = Path(args.runs[0]).expanduser() / REPORT if len(args.runs) == 1 else Path(REPORT)
    output = Path(args.output) if args.output else default
    write_report(output, render(read_runs(args.runs)), not_over=args.runs[0])
    return 0


def check_plotly() -> None:
    """Raise ValueError without plotly, which draws the charts."""
    try:
        import plotly  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("the report needs plotly, which is not installed: pip install plotly") from error


def write_report(output: Path, page: str, *, not_over: str) -> None:
    """Write a report and say where. Raises ValueError and OSError as `check_page`, for `output` and `not_over`."""
    # UTF-8 cannot hold half of a surrogate pair, which the data may contain.
    page = page.encode("utf-8", "replace").decode("utf-8")
    new_folder = "" if output.parent.exists() else f"; made its folder {output.parent}"
    check_page(
        output, kind="report", generator=GENERATOR, not_over=not_over, remedy="choose another place with --output"
    )
    write_text(output, page)
    tell(f"Wrote the report to {output} ({len(page.encode()) / 2**20:.1f} MiB){new_folder}")


def render(runs: "Sequence[Run]") -> str:
    """Return the report as HTML. Every string from a run is escaped, and only our own scripts may run in the page."""
    from notus.evaluation.read_run import RESULT_FILES
    from notus.evaluation.report import charts, tables
    from notus.evaluation.report.headlines import headlines
    from notus.training.run_data import DATA_FILE
    from notus.training.run_folder import CONFIG_FILE
    from notus.training.tracking import ENVIRONMENT_FILE, METRICS_FILE, SAMPLES_FILE

    measured = f"{METRICS_FILE}, {RESULT_FILES} or {ENVIRONMENT_FILE}"
    parts: dict[str, tuple[str, Callable[[Sequence[Run]], Any]]] = {  # each from these files of the runs
        "training": (f"{CONFIG_FILE} or {METRICS_FILE}", charts.training_panels),
        "data": (DATA_FILE, charts.data_panels),
        "calibration": (RESULT_FILES, charts.calibration_panels),
        "facts": (f"{CONFIG_FILE} or {ENVIRONMENT_FILE}", lambda runs: [tables.facts(run) for run in runs]),
        "headlines": (measured, lambda runs: [headlines(run) for run in runs]),
        "results": (measured, tables.headline_table),
        "changed": (CONFIG_FILE, tables.changed_settings),
        "summaries": (CONFIG_FILE, lambda runs: [tables.summary(run) for run in runs]),
        "last_values": (METRICS_FILE, tables.last_values),
        "data_table": (DATA_FILE, tables.data_table),
        "sources": (DATA_FILE, tables.source_bars),
        "evaluations": (RESULT_FILES, tables.evaluation_tables),
        "breakdowns": (RESULT_FILES, tables.breakdown_bars),
        "preference_table": (RESULT_FILES, tables.preference_table),
        "samples": (SAMPLES_FILE, tables.sample_groups),
        "differing": (CONFIG_FILE, tables.differing_table),
    }
    folders = [run.folder for run in runs]
    runs = parse_files(CONFIG_FILE, folders, partial(tables.with_labels, runs))
    made = {name: parse_files(files, folders, partial(make, runs)) for name, (files, make) in parts.items()}
    panels = [panel for name in ("training", "data", "calibration") for panel in made[name]]
    return fill_page(HERE / "page.html.j2", panels, most_named=MOST_NAMED, runs=runs, **made)


def fill_page(template: Path, panels: "Sequence[Panel]", **values: object) -> str:
    """Return the page of a template that extends layout.html.j2.

    Args:
        template: its file; layout.html.j2 and macros.html.j2 are found beside this module.
        panels: the charts of the page.
        values: what else the template needs, among them `runs` for the macros.
    """
    from plotly.offline import get_plotlyjs

    scripts = [script(get_plotlyjs()), script((HERE / "page.js").read_text(encoding="utf-8"))]
    return (
        environment(template.parent, HERE)
        .get_template(template.name)
        .render(
            generator=Markup(GENERATOR),
            policy=security_policy(scripts),
            style=style(HERE / "page.css"),
            scripts=scripts,
            colours=COLOURS,
            figures={panel.name: panel.as_json() for panel in panels},
            **values,
        )
    )
