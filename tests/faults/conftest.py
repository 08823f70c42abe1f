"""Options and fixtures of the fault suite.

    pytest tests/faults                                                # a few faults, five killed runs
    pytest tests/faults --all-faults --kills 200 --terms 50 --torchrun-kills 5 --fault-results FILE.md

The second command makes the tables of docs/faults.md. Linux; full and read-only disks need root, or
`unshare --map-root-user --mount pytest ...`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import Case, Undisturbed, make_inputs, undisturbed

TABLES = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--all-faults", action="store_true", help="cause every fault of docs/faults.md, not only a few")
    group.addoption("--kills", type=int, default=3, help="runs to kill at a random moment")
    group.addoption("--terms", type=int, default=2, help="runs to stop by SIGTERM or SIGINT at a random moment")
    group.addoption("--torchrun-kills", type=int, default=0, help="runs to kill under torchrun itself")
    group.addoption("--fault-seed", type=int, default=0, help="of the moments")
    group.addoption("--fault-results", type=Path, help="write the tables to this Markdown file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in config.stash[TABLES].items())
    if text:
        terminalreporter.write_line(f"\n{text}")
        if path := config.getoption("--fault-results", None):
            path.write_text(f"{text}\n")


@pytest.fixture(scope="session")
def tables(pytestconfig: pytest.Config) -> dict[str, str]:
    """Tables to print at the end, by title."""
    return pytestconfig.stash[TABLES]


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, the data and the configs."""
    folder = tmp_path_factory.mktemp("faults")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def measure(scratch: Path) -> Callable[[Case, bool], Undisturbed]:
    """What the undisturbed run of a case leaves; it is made once."""
    found: dict[tuple[str, bool], Undisturbed] = {}

    def of(case: Case, torchrun: bool = False) -> Undisturbed:
        key = (case.name, torchrun)
        if key not in found:
            found[key] = undisturbed(case, scratch, torchrun)
        return found[key]

    return of
