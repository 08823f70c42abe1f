import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import largest_file
from runs import at_call, config, read_metrics, read_samples, terminate

from notus.runtime.process import STOPPED
from notus.training import dpo, tracking
from notus.training.sampling import Sample
from notus.training.tracking import MetricsFile, TensorBoardLogger, Tracker, WandbLogger


def _events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def _scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in _events(folder).Scalars(name)]


def _texts(folder: Path, name: str) -> list[tuple[int, str]]:
    tensors = _events(folder).Tensors(f"{name}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in tensors]


def test_tensorboard_shows_steps_that_are_taken_again_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for resume_step, last in ((0, 4), (2, 5)):
        sink = TensorBoardLogger(tmp_path, resume_step=resume_step, texts={})
        for step in range(resume_step + 1, last + 1):
            sink.log(step, {"loss": step + resume_step / 4})
        sink.close()
    assert _scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]


def test_tensorboard_shows_texts_verbatim_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(8))  # in file names, 10 comes before 9
    # a launch, one that began anew before any checkpoint, one that goes on after step 2
    for resume_step, text in ((-1, "a: 1"), (-1, "a: 1\nb: *2*"), (2, "a: 3")):
        sink = TensorBoardLogger(tmp_path, resume_step=resume_step, texts={"config": text})
        for step in range(resume_step + 1, 5):
            sink.log(step, {"loss": 0.5})
            sink.log_samples(step, [Sample(0, "one\n# two", f"{text} at {step}"), Sample(1, "", "`")])
        sink.close()
    assert _texts(tmp_path, "config") == [(0, "    a: 1\n    b: *2*"), (3, "    a: 3")]
    samples = _texts(tmp_path, "samples")
    assert [step for step, _ in samples] == [0, 1, 2, 3, 4]
    assert samples[3][1] == (
        "**0: prompt**\n\n    one\n    # two\n\n**0: completion**\n\n    a: 3 at 3\n\n"
        "**1: prompt**\n\n\n\n**1: completion**\n\n    `"
    )
    assert [step for step, _ in _scalars(tmp_path, "train/loss")] == [0, 1, 2, 3, 4]


def test_tensorboard_on_a_full_disk_is_switched_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    told = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: told.set())  # TensorBoard's thread has its say as well
    metrics = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    with Tracker([metrics, TensorBoardLogger(tmp_path, resume_step=-1, texts={})]) as tracker, largest_file(1000):
        for step in range(1, 31):
            tracker.log(step, {"a": 0.5})
    assert told.wait(10)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert lines == [
        "warning: TensorBoard fails ([Errno 27] File too large) and is off for the rest; "
        "metrics.jsonl and samples.jsonl have everything"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 30


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Weights & Biases without a key, with short waits, and a service of its own."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(tracking, "WANDB_INIT_TIMEOUT", 3.0)
    monkeypatch.setattr(tracking, "WANDB_FINISH_TIMEOUT", 2.0)
    wandb.teardown()
    yield tmp_path
    try:
        wandb.teardown()
    except ConnectionError:  # the test has killed the service
        wandb.setup._singleton = None
        wandb.sdk.lib.module.unset_globals()  # the dead run


def _sink(folder: Path, **options: Any) -> WandbLogger:
    return WandbLogger(project="notus-test", name="toy", folder=folder, config={"dpo": {"beta": 0.1}}, **options)


def _records(file: Path) -> list[Any]:
    """What a .wandb file holds: LevelDB's log format behind 7 bytes, each record a protocol buffer."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # it writes what it still holds, as it does when the process ends
    data, place, part, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header is split between two blocks
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(part))
            part = b""
    return found


def _full_history(records: list[Any]) -> list[dict[str, Any]]:
    """The lines of metrics; a nested key is written with slashes."""
    items = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in each} for each in items]


def _history(file: Path) -> list[dict[str, Any]]:
    """The step and the loss of each line."""
    return [{"_step": line["_step"], "loss": line["train/loss"]} for line in _full_history(_records(file))]


def _only_file(folder: Path, kind: str) -> Path:
    (file,) = folder.glob(f"wandb/{kind}-*/run-*.wandb")
    return file


class _Server:
    """A Weights & Biases server on this machine, as much of it as a run needs; or one that answers with `broken`."""

    def __init__(self, broken: tuple[int, bytes] | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self.streamed: list[dict[str, Any]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                status, text = broken or (200, json.dumps(outer.reply(self.path, body)).encode())
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def reply(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            files = json.loads(body).get("files", {})
            self.streamed += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        self.requests.append(asked)
        if asked["operationName"] == "Viewer":
            return {"data": {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}"}}}
        if asked["operationName"] == "UpsertBucket":
            project = {"name": "notus-test", "entity": {"name": "me"}}
            bucket = {"id": "1", "name": asked["variables"]["name"], "displayName": "toy", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if asked["operationName"] == "CreateRunFiles":
            return {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}}
        if asked["operationName"] == "CreateArtifact":
            return {"errors": [{"message": "no artifacts here"}]}
        return {"data": {}}

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _online(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)


SAMPLE_COLUMNS = ["step", "index", "prompt", "completion"]


def _table(folder: Path, line: dict[str, Any]) -> list[list[Any]] | None:
    """The rows of the table `samples`, which is a file beside the run's."""
    path = line.get("samples/path") or line.get("samples", {}).get("path")
    if path is None:
        return None
    table = json.loads((folder / "files" / path).read_text())
    assert table["columns"] == SAMPLE_COLUMNS
    rows: list[list[Any]] = table["data"]
    return rows


@pytest.mark.parametrize("server", ["closed", "silent", "500", "garbage"])
def test_a_wandb_server_out_of_reach_leaves_the_run_offline(
    server: str, wandb_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if server == "silent":
            bound.listen()
        broken = {"500": (500, b"oops"), "garbage": (200, b"<html>")}.get(server)
        url = _Server(broken).url if broken else "http://{}:{}".format(*bound.getsockname())
        _online(monkeypatch, url)
        began = time.monotonic()
        with Tracker([_sink(wandb_folder, run_id="abcd1234")]) as tracker:
            tracker.log(1, {"loss": 0.5})
            tracker.log(2, {"loss": 0.25})
        assert time.monotonic() - began < 45  # wandb by itself: minutes
    assert tracker.state() == {"wandb": "abcd1234"}
    assert _history(_only_file(wandb_folder, "offline-run")) == [{"_step": 1, "loss": 0.5}, {"_step": 2, "loss": 0.25}]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: Weights & Biases is out of reach (")


def test_a_stored_key_is_found_without_what_wandb_warns_of(
    wandb_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb
    from wandb.sdk.lib import wbauth

    monkeypatch.delenv("WANDB_SILENT")
    monkeypatch.setattr(wandb, "api", None)  # deprecated: any use of it prints a warning
    assert not tracking._has_wandb_key()
    (wandb_folder / "no-netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    (wandb_folder / "no-netrc").chmod(0o600)
    try:
        assert tracking._has_wandb_key()
    finally:
        wbauth.unauthenticate_session(update_settings=False)
    assert "deprecated" not in "".join(capfd.readouterr())
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "login", None)  # not even looked at
    assert tracking._has_wandb_key()


def test_settings_that_wandb_refuses_are_an_error_at_the_start(wandb_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"tracking\.wandb: Weights & Biases rejects the run \(Invalid project name"):
        WandbLogger(project="a/b", name=None, folder=wandb_folder, config={})


def test_a_resumed_run_asks_for_its_own_id(wandb_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = _Server()
    _online(monkeypatch, server.url)
    with Tracker([_sink(wandb_folder, run_id="abcd1234")]) as tracker:
        tracker.log(1, {"loss": 0.5})
    operations = {asked["operationName"]: asked["variables"] for asked in server.requests}
    assert operations["RunResumeStatus"]["name"] == "abcd1234"
    assert operations["UpsertBucket"]["name"] == "abcd1234"
    server.stop()


def test_wandb_failing_at_the_end_is_waited_for_briefly(
    wandb_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = _Server()
    _online(monkeypatch, server.url)
    metrics = MetricsFile(wandb_folder / "metrics.jsonl", resume_step=0)
    with Tracker([metrics, _sink(wandb_folder)]) as tracker:
        tracker.log(1, {"loss": 0.5})
        server.stop()  # the network is gone, and stays so
        tracker.log(2, {"loss": 0.25})
        began = time.monotonic()
    assert time.monotonic() - began < 45  # wandb by itself: minutes
    file = _only_file(wandb_folder, "run")
    assert _history(file) == [{"_step": 1, "loss": 0.5}, {"_step": 2, "loss": 0.25}]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert warnings == [
        "warning: Wandb fails (Timed out finishing run.) and is off for the rest; what it has got is in "
        f"{file.parent}, and `wandb sync {file.parent}` uploads it"
    ]
    assert len((wandb_folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_wandb_dying_mid_run_is_switched_off_once(wandb_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import psutil

    metrics = MetricsFile(wandb_folder / "metrics.jsonl", resume_step=0)
    known = set(psutil.Process().children(recursive=True))
    with Tracker([metrics, _sink(wandb_folder)]) as tracker:
        tracker.log(1, {"loss": 0.5})
        service = next(c for c in set(psutil.Process().children(recursive=True)) - known if c.name() == "wandb-core")
        service.send_signal(signal.SIGKILL)
        service.wait()
        for step in (2, 3, 4):
            tracker.log(step, {"loss": 0.25})
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: Wandb fails (")]
    assert len(warnings) == 1
    assert len((wandb_folder / "metrics.jsonl").read_text().splitlines()) == 4
    assert list(tracker.state()) == ["wandb"]  # a resumed run goes on with the same one


def test_a_preempted_run_is_one_run_offline_and_after_the_sync(
    wandb_folder: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = {"wandb": True, "samples": 2, "sample_tokens": 3}
    overrides = {f"tracking__{key}": value for key, value in tracked.items()} | {"training__eval_every": 2}
    run = config("dpo", wandb_folder / "run", model_folder, pairs_file, data__eval_size=5, **overrides)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 3, terminate)
        assert dpo.run(run) == STOPPED
    assert dpo.run(run) == 0
    files = sorted(
        (wandb_folder / "run").glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime
    )
    assert len(files) == 2
    found = [_records(file) for file in files]
    runs = [[record.run for record in records if record.WhichOneof("record_type") == "run"] for records in found]
    (name,) = {each.run_id for part in runs for each in part}
    config_told = {item.key: json.loads(item.value_json) for each in runs[0] for item in each.config.update}
    assert config_told["training"]["batch_size"] == 4
    written = json.loads((wandb_folder / "run" / "data.json").read_text())
    assert written.pop("files")  # of this machine
    assert config_told["data_summary"] == written
    lines = [{**line, "table": _table(file.parent, line)} for file, records in zip(files, found, strict=True)
             for line in _full_history(records)]  # fmt: skip
    assert [line["_step"] for line in lines] == [0, 1, 2, 3, 4]
    samples = [
        [line[key] for key in ("step", "index", "prompt", "completion")] for line in read_samples(wandb_folder / "run")
    ]
    assert [row for line in lines for row in line["table"] or []] == samples
    assert sorted({step for step, *_ in samples}) == [0, 2, 4]
    assert not (wandb_folder / ".local").exists()  # what the sync needs is with the run
    kept = read_metrics(wandb_folder / "run")
    assert [line.get("train/loss") for line in lines] == [None, *(line["loss"] for line in kept)]
    start = json.loads((wandb_folder / "run" / "initial_evaluation.json").read_text())
    assert [line.get("eval/loss") for line in lines] == [start["eval_loss"], *(line.get("eval_loss") for line in kept)]
    assert all(line["system/tokens_per_second"] > 0 for line in lines[1:])
    _sync(files, _Server(), name, [(line["_step"], line.get("train/loss")) for line in lines])


def _sync(files: list[Path], server: _Server, name: str, expected: list[tuple[int, float | None]]) -> None:
    """What is kept offline goes to the server by wandb's own command, under one name."""
    away = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
    for file in files:
        command = [sys.executable, "-m", "wandb", "sync", str(file.parent)]
        # it keeps a log where it stands
        done = subprocess.run(
            command, env={**os.environ, **away}, cwd=file.parent, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    asked = [request for request in server.requests if request["operationName"] == "UpsertBucket"]
    assert {request["variables"]["name"] for request in asked} == {name}
    assert [(line["_step"], line.get("train/loss")) for line in server.streamed] == expected
    server.stop()
