"""The page: everything that the runs tell, set by the template into one file without links to anything outside."""

import base64
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from notus.evaluation.files import told
from notus.evaluation.report import overview
from notus.evaluation.report.data import data_panels, data_table, source_bars
from notus.evaluation.report.evaluations import evaluation_tables
from notus.evaluation.report.preferences import breakdown_bars, calibration_panels, detail_table
from notus.evaluation.report.reading import RunRecord
from notus.evaluation.report.samples import sample_groups
from notus.evaluation.report.training import training_panels
from notus.evaluation.results import EVALUATIONS, RESULT
from notus.training.inputs import DATA_FILE
from notus.training.loggers import ENVIRONMENT_FILE, METRICS_FILE
from notus.training.run_folder import CONFIG_FILE

T = TypeVar("T")

GENERATOR = '<meta name="generator" content="notus report">'  # by which an earlier report is known
HERE = Path(__file__).parent
RESULTS = f"{EVALUATIONS}/*/{RESULT}"
COLOURS = 7  # --c0 to --c6 in page.css


def render(runs: Sequence[RunRecord]) -> str:
    """The report of runs as HTML. Every text from a run is escaped; only scripts of ours may run in the page."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breaks"] = _breaks
    scripts = [_script(get_plotlyjs()), _script((HERE / "page.js").read_text(encoding="utf-8"))]
    made = functools.partial(_made, runs)
    training = made(f"{CONFIG_FILE} or {METRICS_FILE}", training_panels)
    data = made(DATA_FILE, data_panels)
    calibration = made(RESULTS, calibration_panels)
    return environment.get_template("page.html.j2").render(
        generator=Markup(GENERATOR),
        policy=_security_policy(scripts),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        scripts=scripts,
        colours=COLOURS,
        runs=runs,
        facts=made(f"{CONFIG_FILE} or {ENVIRONMENT_FILE}", lambda runs: [overview.facts(run) for run in runs]),
        tiles=made(RESULTS, overview.tiles),
        training=training,
        last_values=overview.last_values(runs),
        data=data,
        data_table=made(DATA_FILE, data_table),
        sources=made(DATA_FILE, source_bars),
        evaluations=made(RESULTS, evaluation_tables),
        calibration=calibration,
        breakdowns=made(RESULTS, breakdown_bars),
        preference_table=made(RESULTS, detail_table),
        samples=sample_groups(runs),
        differing=overview.differing_settings(runs),
        figures={panel.name: panel.as_json() for panel in (*training, *data, *calibration)},
    )


def _made(runs: Sequence[RunRecord], files: str, make: Callable[[Sequence[RunRecord]], T]) -> T:
    """A part of the page, which shows what these files of the runs hold; see `told`."""
    return told(files, [run.folder for run in runs], lambda: make(runs))


def _breaks(text: str) -> Markup:
    """A name as HTML that may go on in the next line after its / and _, rather than anywhere in a word."""
    return Markup(re.sub(r"([/_])(?=\w)", r"\1<wbr>", str(escape(text))))


def _script(text: str) -> Markup:
    """A script as it stands in the page, where a carriage return would be read as a newline and change its digest."""
    assert "</script" not in text.lower()
    return Markup(text.replace("\r\n", "\n").replace("\r", "\n"))


def _security_policy(scripts: Sequence[str]) -> str:
    """Nothing is loaded, and no script runs but these: what data might smuggle in stays text."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    closed = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{closed}; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
