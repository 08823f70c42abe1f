"""What happens at a print, as a user meets it: processes whose stdout or stderr is closed, full, left or in ASCII.

They begin and end as every entry does, by `run_entry` and `leave`; between, they print, and end with a code.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from notus.runtime import process

# Prints like a run: by `tell`, by `print`, by tqdm's bar, on both streams. `code` is what the run ends with.
RUN = """
import sys
from notus.runtime.process import leave, run_entry, tell

def work():
    from tqdm import tqdm
    for _ in tqdm(range(3), desc="Träining"):
        tell("step → 1")
        print("a path: rün/\\udcff")
    tell("told", sys.stderr)
    if sys.argv[1] == "error":
        raise ValueError("the run failed → here")
    open(sys.argv[2], "w").write("all of the work is done")
    return int(sys.argv[1])

leave(run_entry(work))
"""


def _start(code: str, redirects: str, folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run `RUN` under the shell's redirects; returns the process, and what the work left."""
    done = folder / "done"
    command = f'"$0" -c "$1" {code} {done} {redirects}'
    found = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}", sys.executable, RUN],
        env={**os.environ, **environment}, capture_output=True, text=True, errors="replace", timeout=60,
    )  # fmt: skip
    return found, done.read_text() if done.exists() else ""


SINKS = [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full", "| head -0", "| head -1"]


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("code", ["0", "75"])  # finished, or at the end of training.max_hours; stopped by SIGTERM
def test_a_print_changes_no_exit_code(sink: str, code: str, tmp_path: Path) -> None:
    run, left = _start(code, sink, tmp_path)
    assert (run.returncode, left) == (int(code), "all of the work is done"), run.stderr
    assert "Traceback" not in run.stdout + run.stderr


@pytest.mark.parametrize("sink", SINKS)
def test_nor_does_it_make_a_success_of_a_failure(sink: str, tmp_path: Path) -> None:
    run, left = _start("error", sink, tmp_path)
    assert (run.returncode, left) == (1, "")
    assert "Traceback" not in run.stdout + run.stderr


@pytest.mark.parametrize(("full", "other"), [("stdout", "stderr"), ("stderr", "stdout")])
def test_a_full_disk_is_named_once_on_the_other_stream(full: str, other: str, tmp_path: Path) -> None:
    run, _ = _start("error", f"{'2' if full == 'stderr' else ''}>/dev/full", tmp_path)
    shown = getattr(run, other)
    assert shown.count("No space left on device") == 1
    assert f"warning: {full} cannot be written (No space left on device)" in shown
    assert "error: the run failed" in shown  # of a failure the reason is shown where it can be


def test_of_several_ranks_an_error_begins_a_line() -> None:
    """Another rank may have left the line of its progress bar unended, in the terminal or log that they share."""
    code = """
import sys
from notus.runtime.process import leave, run_entry

def work():
    sys.stderr.write("\\rTokenizing:   0%")  # as the other rank would
    raise ValueError("the run failed")

leave(run_entry(work))
"""
    ranks = {"WORLD_SIZE": "2", "RANK": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ranks}, capture_output=True, text=True, timeout=60
    )
    assert run.stderr.splitlines() == ["", "Tokenizing:   0%", "error: the run failed"]


def test_a_reader_that_leaves_is_no_fault(tmp_path: Path) -> None:
    run, _ = _start("0", "| head -1", tmp_path)
    assert run.stdout == "step → 1\n"
    assert "warning" not in run.stderr


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}], ids=["ascii", "C"])
def test_characters_that_the_encoding_lacks_are_escaped(environment: dict[str, str], tmp_path: Path) -> None:
    run, left = _start("0", "", tmp_path, **environment)
    assert (run.returncode, left) == (0, "all of the work is done"), run.stderr
    if environment == {"PYTHONIOENCODING": "ascii"}:
        assert run.stdout.splitlines()[:2] == ["step \\u2192 1", "a path: r\\xfcn/\\udcff"]


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Else what a C library prints would end up in the checkpoint that happens to be open."""
    code = (
        "import os, sys; from notus.runtime.process import guard_streams; guard_streams(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'from C'); os.write(2, b'from C'); "
        "sys.exit(0 if file.fileno() > 2 else 5)"
    )
    assert subprocess.run(["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code]).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    code = (
        "import os; from notus.runtime.process import guard_streams, leave\n"
        "os.set_blocking(1, False); guard_streams(); print('x' * 10**6); leave(0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, len(run.stdout)) == (0, 10**6 + 1), run.stderr


@pytest.mark.parametrize("words", [["-m", "notus", "--help"], ["train_dpo.py", "--help"], ["-m", "notus", "estimate"]])
def test_help_and_usage_end_as_they_do_on_a_terminal(words: list[str]) -> None:
    root = Path(__file__).resolve().parents[2]
    usual = subprocess.run([sys.executable, *words], cwd=root, capture_output=True).returncode
    for sink in ("/dev/full", "/dev/null"):
        with open(sink, "w") as stream:
            assert subprocess.run([sys.executable, *words], cwd=root, stdout=stream, stderr=stream).returncode == usual


def test_tell_without_a_guard_never_raises_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the user's own, which trains by the package, has the streams that it has."""
    code = "import sys; from notus.runtime.process import tell; kept = tell('text'); print('more'); sys.exit(3 - kept)"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE).returncode == 3
    with open(tmp_path / "ascii", "w", encoding="ascii") as stream:
        assert process.tell("step → 1", stream)
    assert (tmp_path / "ascii").read_text() == "step \\u2192 1\n"
    assert process.tell("text", stream)  # closed
    monkeypatch.setattr(sys, "stdout", None)
    assert process.tell("text")


def test_a_command_whose_result_is_what_it_prints_fails_on_a_full_disk(tmp_path: Path) -> None:
    code = "import sys\nfrom notus.runtime.process import *\nleave(run_entry(lambda: 0 if tell('result') else 1))"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE).returncode == 1
    head = subprocess.run(["bash", "-c", 'set -o pipefail; "$0" -c "$1" | true', sys.executable, code])
    assert head.returncode == 0
