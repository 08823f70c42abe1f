"""What evaluations leave on disk: results are read back, folders are locked, records outlive a killed process."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from disks import largest_file

from notus.evaluation import results
from notus.evaluation.results import (
    Figure,
    Result,
    append_records,
    check_output,
    hold_folder,
    read_records,
    read_results,
    result_folder,
    write_result,
)

ROOT = Path(__file__).parents[2]

RESULT = Result(
    suite="open-llm",
    model="runs/dpo",
    figures=[Figure("ARC-Challenge", "acc_norm", 64.59, "%", stderr=1.4, count=1172, reference={"Zephyr": 62.03})],
    settings={"precision": "bf16"},
    details={"tasks": ["arc_challenge"]},
    date="2026-11-22",
)


def test_results_are_read_back(tmp_path):
    write_result(tmp_path / "evaluations" / "open-llm", RESULT)
    assert read_results(tmp_path) == [RESULT]
    assert read_results(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("content", ["{", "[]", '{"suite": "x"}', "[" * 100_000])
def test_a_damaged_result_is_named(tmp_path, content):
    path = write_result(tmp_path / "evaluations" / "open-llm", RESULT)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"open-llm/result\.json: not the result"):
        read_results(tmp_path)


def test_where_results_go(tmp_path):
    assert result_folder("there", tmp_path, "model", "suite") == Path("there")
    assert result_folder(None, tmp_path, "model", "suite") == tmp_path / "evaluations" / "suite"
    assert result_folder(None, None, "org/model", "suite") == Path("evaluations/org__model/suite")
    assert result_folder(None, None, "../model/", "suite") == Path("evaluations/..__model/suite")


def test_results_stay_under_a_name_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "inner")
    assert result_folder(None, None, ".", "suite") == Path("evaluations/inner/suite")
    assert result_folder(None, None, "..", "suite") == Path("evaluations/mine/suite")
    assert result_folder(None, None, "/", "suite") == Path("evaluations/unnamed/suite")


def test_a_folder_is_one_evaluations_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_locks", {})
    code = f"import pathlib, notus.evaluation.results as r; r.hold_folder(pathlib.Path({str(tmp_path)!r}))"
    hold = [sys.executable, "-c", f"{code}; print('held', flush=True); input()"]
    with subprocess.Popen(hold, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another evaluation is writing there; wait for its end, or name another"):
            hold_folder(tmp_path)
        other.kill()
    hold_folder(tmp_path)
    hold_folder(tmp_path)  # the same process may, say with another suite
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "another evaluation is writing there" in again.stderr


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", fail)
    hold_folder(tmp_path / "new")
    append_records(tmp_path / "records.jsonl", [{"a": 1}])
    assert read_records(tmp_path / "records.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "fifo"])
def test_devices_are_not_replaced(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with pytest.raises(ValueError, match=f"{path}: no ordinary file"):
        check_output(Path(path), form="JSON", not_over="input")


def test_records_come_back_and_a_torn_line_does_not(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    assert read_records(path) == []
    append_records(path, [{"a": 1}, {"b": "é\n"}])
    path.write_bytes(path.read_bytes() + b'{"torn": "' + b"x" * 70_000)  # longer than the block that is read
    assert read_records(path) == [{"a": 1}, {"b": "é\n"}]
    append_records(path, [{"c": 3}])
    assert read_records(path) == [{"a": 1}, {"b": "é\n"}, {"c": 3}]
    path.write_bytes(b'{"torn')
    append_records(path, [{"d": 4}])
    assert path.read_bytes() == b'{"d": 4}\n'


@pytest.mark.parametrize("line", [b"notes", b"[1]", b"\xff", b"", b"[" * 100_000])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"records.jsonl, line 2: not a record of finished work"):
        read_records(path)


APPEND = """
import fcntl, sys, time
with open(sys.argv[1], "ab", buffering=0) as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    file.write(b'{"a"')
    print("begun", flush=True)
    time.sleep(0.3)
    file.write(b": 1}\\n")
"""


def test_what_another_process_is_appending_is_no_torn_line(tmp_path):
    path = tmp_path / "records.jsonl"
    with subprocess.Popen([sys.executable, "-c", APPEND, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"begun\n"
        append_records(path, [{"b": 2}])
    assert read_records(path) == [{"a": 1}, {"b": 2}]


def test_a_full_disk_keeps_what_was_there(tmp_path):
    path = tmp_path / "records.jsonl"
    append_records(path, [{"a": 1}])
    with largest_file(100), pytest.raises(OSError, match=r"records.jsonl: cannot be written \(.*GB free"):
        append_records(path, [{"b": "x" * 1000}])
    assert read_records(path) == [{"a": 1}]
