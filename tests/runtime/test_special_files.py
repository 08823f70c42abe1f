"""A FIFO, or something else that is no file, in the place of each file that is opened for reading: no launch waits."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from runs import config, write_pairs
from toys import toy_tokenizer

from notus.config import load_config
from notus.data.tokenize import load_pairs
from notus.evaluation.mt_bench.fastchat import read_judgments
from notus.evaluation.prompts import read_prompts
from notus.evaluation.results import append_records, hold_folder, read_records
from notus.model.load import read_json
from notus.runtime.files import check_regular
from notus.training import checkpoint, reference, run_folder, tracking
from notus.training.checkpoint import DamagedCheckpointError, read_identity
from notus.training.run_data import read_ids


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("it waits for a writer")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


OPENED: dict[str, Callable[[Path], object]] = {
    "config": lambda path: load_config(path, "dpo"),
    "exclude": read_ids,
    "data.jsonl": lambda path: load_pairs(str(path), toy_tokenizer(), max_length=64, max_prompt_length=32),
    "prompts.jsonl": lambda path: read_prompts(path, strings_are_turns=True),
    "judgments.jsonl": read_judgments,
    "config.json": read_json,
    "reference.safetensors": lambda path: reference.stored_logps([path], np.zeros((1, 16), np.uint8), 2),
    "metrics.jsonl": lambda path: tracking.MetricsFile(path, resume_step=0),
    "records.jsonl": lambda path: append_records(path, [{}]),
}


@pytest.mark.parametrize("name", OPENED)
def test_a_fifo_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises((ValueError, OSError), match=name) as raised:
        OPENED[name](tmp_path / name)
    assert not isinstance(raised.value, TimeoutError)
    assert "\n" not in str(raised.value)


def test_files_that_are_made_again_are_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "environment.json")
    assert tracking._launches(tmp_path / "environment.json") == []
    assert "environment.json is damaged" in capsys.readouterr().out
    os.mkfifo(tmp_path / "part")
    assert reference._read_part(tmp_path / "part", torch.zeros(1)) is None
    assert "part is damaged" in capsys.readouterr().out
    assert read_records(tmp_path / "part") == []


def test_a_runs_own_files(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    os.mkfifo(tmp_path / "step-00000001" / "state.json")
    assert read_identity(tmp_path / "step-00000001") == {}
    with pytest.raises(DamagedCheckpointError, match="not a whole one"):
        checkpoint._read_state(tmp_path / "step-00000001")
    run = config("dpo", tmp_path / "run", tmp_path, write_pairs(tmp_path / "pairs.jsonl", 2))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    os.mkfifo(tmp_path / "run" / "config.yaml")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged \(.*it is a FIFO, not a file"):
        run_folder.open_folder(run)
    for hold in (lambda: run_folder.hold_folder(run), lambda: hold_folder(tmp_path / "run")):
        (tmp_path / "run" / ".lock").unlink(missing_ok=True)
        os.mkfifo(tmp_path / "run" / ".lock")
        with pytest.raises((ValueError, OSError), match=r"it is a FIFO, not a file"):
            hold()


def test_what_a_shell_pipes_in_is_read(tmp_path: Path) -> None:
    assert check_regular(Path("/dev/stdin")) == Path("/dev/stdin")
    assert check_regular(tmp_path / "absent") == tmp_path / "absent"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="it is a FIFO"):
        check_regular(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="it is a device"):
        check_regular(tmp_path / "link")


def _rows(pairs: Path, cache: Path) -> tuple[list[list[int]], Path]:
    rows, _ = load_pairs(str(pairs), toy_tokenizer(), max_length=64, max_prompt_length=32, cache_dir=cache)
    return [row["trunk"] for row in rows], next(cache.glob("rows-*"))


@pytest.mark.parametrize("harm", ["cut behind a link", "dangling link", "empty folder", "no rows in it", "FIFO"])
def test_a_damaged_row_cache_is_made_again(harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, cache = write_pairs(tmp_path / "pairs.jsonl", 3), tmp_path / "cache"
    expected, folder = _rows(pairs, cache)
    elsewhere = tmp_path / "elsewhere"
    (arrow,) = folder.glob("*.arrow")
    if "link" in harm:
        folder.rename(elsewhere)
        folder.symlink_to(elsewhere)
    if harm == "cut behind a link":
        arrow.write_bytes(arrow.read_bytes()[:-9])
    elif harm == "dangling link":
        shutil.rmtree(elsewhere)
    else:
        for path in folder.iterdir():
            path.unlink()
        if harm == "no rows in it":
            (folder / "digests.json").write_text("{}")
        elif harm == "FIFO":
            os.mkfifo(arrow)
            os.mkfifo(folder / "digests.json")
    capsys.readouterr()
    assert _rows(pairs, cache)[0] == expected
    assert f"warning: the tokenised dataset {folder} is damaged: it is made again" in capsys.readouterr().out
    assert _rows(pairs, cache)[0] == expected
    assert "warning" not in capsys.readouterr().out
    assert elsewhere.is_dir() == (harm == "cut behind a link")  # it is somebody else's
