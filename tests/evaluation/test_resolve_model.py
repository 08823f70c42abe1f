"""What MODEL_OR_RUN may be; an unfinished run stands for its newest whole checkpoint."""

import contextlib
import errno
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import make_family
from ranks import run_ranks
from runs import config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import toy_tokenizer
from transformers import AutoTokenizer

from notus.data.chat import ChatEncoder, template_to_export
from notus.evaluation import resolve_model
from notus.evaluation.resolve_model import ModelSource, find_source, find_together, load_unfinished
from notus.model.export import load_causal_lm
from notus.runtime import distributed
from notus.training import dpo
from notus.training.checkpoint import DamagedCheckpointError, Progress, describe

ROOT = Path(__file__).parents[2]
CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def test_model_adapter_and_run(model_folder, full_run, lora_run):
    assert find_source(str(model_folder)) == ModelSource(str(model_folder), model_folder)
    adapter = find_source(str(lora_run / "model"))
    assert (adapter.folder, adapter.base, adapter.settings) == (lora_run / "model", str(model_folder), {})
    of_run = find_source(str(lora_run))
    assert (of_run.folder, of_run.base) == (lora_run / "model", str(model_folder))
    assert of_run.settings["lora"]["rank"] == 3
    assert find_source(str(full_run)).base is None


def test_the_user_goes_before_the_run_before_the_default():
    source = ModelSource(
        "", None, settings={"data": {"max_length": 7, "chat_template": None, "add_empty_system": False}}
    )
    assert source.choose(3, "data.max_length", 9) == 3
    assert source.choose(None, "data.max_length", 9) == 7
    assert source.choose(None, "data.chat_template", "zephyr") == "zephyr"
    assert source.choose(None, "data.add_empty_system", True) is False
    assert source.choose(False, "data.add_empty_system", True) is False
    assert source.choose(None, "dpo.beta", 0.1) == 0.1


def test_every_setting_of_the_chat_format_reaches_the_encoder(monkeypatch):
    found = {}
    monkeypatch.setattr(resolve_model, "ChatEncoder", lambda tokenizer, **options: found.update(options))
    data = {
        "chat_template": "zephyr", "add_empty_system": True, "chat_template_kwargs": {"enable_thinking": False},
        "template_date": "2026-11-27", "mask_history": True, "split_special_tokens": True,
    }  # fmt: skip
    source = ModelSource("", None, settings={"data": {**data, "max_length": 9}, "training": {"precision": "fp32"}})
    arguments = {"precision": None, "chat_template": None, "add_empty_system": None, "trust_remote_code": False}
    source.options(Namespace(**arguments)).chat.encoder(toy_tokenizer())
    assert found == data
    assert {name for name in data if name not in inspect.signature(ChatEncoder).parameters} == set()
    source.options(Namespace(**{**arguments, "add_empty_system": False})).chat.encoder(toy_tokenizer())
    assert found == {**data, "add_empty_system": False}
    old = ModelSource("", None, settings={"data": {"chat_template": None, "add_empty_system": False}})
    old.options(Namespace(**arguments)).chat.encoder(toy_tokenizer())
    assert found == {
        "chat_template": None, "add_empty_system": False, "chat_template_kwargs": {}, "template_date": None,
        "mask_history": False, "split_special_tokens": False,
    }  # fmt: skip


def test_a_snapshot_keeps_the_named_templates(chat_base, tmp_path):
    named = {"default": CHAT_TEMPLATE, "tool_use": "tools" + CHAT_TEMPLATE}
    base = shutil.copytree(chat_base, tmp_path / "base")
    toy_tokenizer(chat_template=named).save_pretrained(base)
    answers = {name: [{"role": "assistant", "content": f"{name} dog"}] for name in ("chosen", "rejected")}
    data = tmp_path / "chat.jsonl"
    row = {"prompt": [{"role": "user", "content": "hello"}], **answers}
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    run = tmp_path / "run"
    dpo.run(config("dpo", run, base, data, data__chat_template="zephyr", training__max_steps=1))
    shutil.rmtree(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(find_source(str(run)).folder)
    trained = template_to_export(ChatEncoder(toy_tokenizer(), chat_template="zephyr"))
    assert tokenizer.chat_template == {**named, "default": trained}


@pytest.mark.parametrize("text", ["a: [", "- 1", "model: 3", "\udcff", "model: {name: resnet}\ndata: {}", "{}"])
def test_rejects_a_damaged_or_foreign_config(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.yaml: not"):
        find_source(str(tmp_path))


@pytest.fixture
def in_progress(tmp_path):
    """A copy of a run as it was before its final model."""

    def copy(run):
        ignored = shutil.ignore_patterns("model", "snapshots", "evaluations")
        return shutil.copytree(run, tmp_path / "run", ignore=ignored)

    return copy


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_causal_lm(folder, dtype=torch.float32, device="cpu")[0].named_parameters())


def same(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_unfinished_run(full_run, in_progress):
    run = in_progress(full_run)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    source = find_source(str(run))
    assert (source.name, source.run) == (f"{run} (step 2)", run)
    assert source.folder == run / "snapshots" / "step-00000002"
    assert same(source.folder, full_run / "model")
    assert set(before) <= {path.relative_to(run) for path in run.rglob("*")}
    written = (source.folder / "config.json").stat().st_ino
    assert find_source(str(run)) == source
    assert (source.folder / "config.json").stat().st_ino == written  # used again


def find_on_two_ranks(run, reached):
    source = find_together(str(run))
    (reached / f"{dist.get_rank()}.txt").write_text(f"{source.name} {source.folder}")


def test_other_ranks_take_what_the_first_found(full_run, in_progress, tmp_path):
    run = in_progress(full_run)
    source = find_source(str(run))
    # of a checkpoint that was moved away to go back, say, or of one that another evaluation saw a moment later
    shutil.copytree(source.folder, run / "snapshots" / "step-00000003")
    run_ranks(find_on_two_ranks, 2, tmp_path, run, tmp_path)
    found = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert found == [f"{run} (step 2) {source.folder}"] * 2


def test_a_rank_that_does_not_see_the_snapshot_tells(monkeypatch, tmp_path):
    elsewhere = ModelSource("run (step 2)", tmp_path / "none", run=tmp_path)
    monkeypatch.setattr(resolve_model, "on_main", lambda _: elsewhere)
    with pytest.raises(ValueError, match="use a disk that all share"):
        find_together("run")
    monkeypatch.setattr(resolve_model, "on_main", lambda _: ModelSource("org/model", tmp_path / "none"))
    monkeypatch.setattr(resolve_model, "find_source", lambda name, **_: ModelSource(name, tmp_path))
    assert find_together("org/model").folder == tmp_path  # from this machine's own cache


def test_a_snapshot_of_an_earlier_run_is_not_taken_for_this_ones(full_run, in_progress):
    run = in_progress(full_run)
    find_source(str(run))
    made_of = run / "checkpoints" / "step-00000002"
    tensors = load_file(made_of / "rank-00000.safetensors")
    changed = next(name for name in tensors if name.startswith("model."))
    with safe_open(made_of / "rank-00000.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors[changed] += 1
    save_file(tensors, made_of / "rank-00000.safetensors", metadata)
    content = (made_of / "rank-00000.safetensors").read_bytes()
    state = json.loads((made_of / "state.json").read_text())
    progress = Progress(**state["progress"])
    files = {"rank-00000.safetensors": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    (made_of / "state.json").write_text(describe(progress, state["optimizer"], files))
    assert not same(find_source(str(run)).folder, full_run / "model")


def test_the_snapshot_of_an_older_checkpoint_is_not_written_again(full_run, in_progress):
    run = in_progress(full_run)
    newer = shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000003")
    (newer / "state.json").write_text("{}")
    first = find_source(str(run))
    assert first.name.endswith("(step 2)")
    before = (first.folder / "config.json").stat().st_ino
    assert find_source(str(run)) == first
    assert (first.folder / "config.json").stat().st_ino == before  # others may be reading it


def export_quickly(run, folder, trust_remote_code):
    newest = resolve_model.checkpoints_in(run / "checkpoints")[0]
    (folder / newest.name).mkdir()
    shutil.copyfile(newest / "state.json", folder / newest.name / "checkpoint.json")
    return folder / newest.name


READER = """
import sys
from pathlib import Path
from notus.evaluation.resolve_model import export_newest
export_newest(Path(sys.argv[1]))
print("reads", flush=True)
input()
"""


def test_older_snapshots_go_when_nobody_reads_them(full_run, in_progress, monkeypatch, capsys):
    run, reading = in_progress(full_run), {}
    monkeypatch.setattr(resolve_model, "_reading", reading)
    monkeypatch.setattr(resolve_model, "_export_apart", export_quickly)

    def snapshots_after(step):
        newest = run / "checkpoints" / f"step-{step:08d}"
        if not newest.exists():
            shutil.copytree(run / "checkpoints" / "step-00000002", newest)
        assert resolve_model.export_newest(run).name == newest.name
        return [resolve_model.step_of(path) for path in reversed(resolve_model.checkpoints_in(run / "snapshots"))]

    def stop_reading():
        while reading:
            reading.popitem()[1].close()

    assert snapshots_after(2) == [2]
    assert snapshots_after(3) == [2, 3]  # this process still reads the first
    command = [sys.executable, "-c", READER, str(run)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "reads\n"
        stop_reading()
        assert snapshots_after(4) == [3, 4]  # another process reads the second
        other.communicate("\n")
    assert snapshots_after(4) == [3, 4]  # nothing written, nothing removed
    stop_reading()
    assert snapshots_after(5) == [5]
    stop_reading()

    def fail(path, **options):
        if Path(path).name.startswith("step-"):
            raise PermissionError(13, "Permission denied")
        return rmtree(path, **options)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        snapshots_after(6)
    assert "step-00000005: cannot be removed (Permission denied)" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints" / "step-00000006")  # moved away, to go back to what may be half removed
    before = (run / "snapshots" / "step-00000005").stat().st_ino
    snapshots_after(5)
    assert (run / "snapshots" / "step-00000005").stat().st_ino != before


def test_what_a_killed_writer_left_goes(full_run, in_progress, monkeypatch):
    monkeypatch.setattr(resolve_model, "_export_apart", export_quickly)
    run = in_progress(full_run)
    (run / "snapshots" / ".export-killed" / "step-00000001").mkdir(parents=True)
    resolve_model.export_newest(run)
    assert {path.name for path in (run / "snapshots").iterdir()} == {".lock", "step-00000002"}


def test_without_locks_nothing_is_removed(full_run, in_progress, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(resolve_model, "lock", fail)
    monkeypatch.setattr(resolve_model, "_export_apart", export_quickly)
    run = in_progress(full_run)
    others = {".export-now", "step-00000001"}
    for name in others:
        (run / "snapshots" / name).mkdir(parents=True)
    assert resolve_model.export_newest(run).name == "step-00000002"
    assert {path.name for path in (run / "snapshots").iterdir()} == {*others, "step-00000002", ".lock"}


EXPORTER = """
import shutil, sys, time
from pathlib import Path
from notus.runtime.files import lock
made, out = map(Path, sys.argv[1:])
with (out.parent / ".lock").open("a") as file:
    lock(file)
    print("exports", flush=True)
    time.sleep(1)
    shutil.copytree(made, out)
"""


def test_one_of_several_evaluations_exports(full_run, in_progress, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(resolve_model, "_export_apart", export_quickly)
        out = resolve_model.export_newest(in_progress(full_run))
    made = out.rename(tmp_path / "made")
    monkeypatch.setattr(resolve_model, "_export_apart", lambda *_: pytest.fail("exported a second time"))
    command = [sys.executable, "-c", EXPORTER, str(made), str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "exports\n"
        assert resolve_model.export_newest(tmp_path / "run") == out


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def writers_of(pid: int) -> list[int]:
    """Child processes that have begun to export."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if is_writer(int(child))]


def is_writer(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"follow_parent" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_who_writes_a_snapshot_goes_with_the_evaluation(full_run, in_progress):
    """Else it would write on without the lock, beside the next evaluation's writer."""
    run = in_progress(full_run)
    with subprocess.Popen([sys.executable, "-c", READER, str(run)], cwd=ROOT) as evaluation:
        (writer,) = wait_for(lambda: writers_of(evaluation.pid))
        evaluation.kill()
    wait_for(lambda: not is_writer(writer))
    assert not list((run / "snapshots").rglob("step-*"))


def test_who_would_write_a_snapshot_for_an_evaluation_that_is_gone_ends(full_run, tmp_path):
    command = [sys.executable, "-c", resolve_model._START, "1", str(full_run), str(tmp_path), "False"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert not list(tmp_path.iterdir())


def test_code_in_the_working_folder_does_not_run(full_run, in_progress, tmp_path, monkeypatch):
    (tmp_path / "yaml.py").write_text("raise SystemExit('in the working folder')")
    monkeypatch.chdir(tmp_path)
    assert find_source(str(in_progress(full_run))).name.endswith("(step 2)")


def test_the_first_of_two_exports_stays(full_run, in_progress, tmp_path):
    out = find_source(str(in_progress(full_run))).folder
    written = (out / "config.json").stat().st_ino
    made = shutil.copytree(out, tmp_path / "made")
    resolve_model._publish(made, out)
    assert (out / "config.json").stat().st_ino == written
    (made / "checkpoint.json").write_text("of another checkpoint")
    resolve_model._publish(made, out)
    assert (out / "config.json").stat().st_ino != written


def test_where_no_snapshot_can_be_written(full_run, in_progress):
    run = in_progress(full_run)
    (run / "snapshots").write_text("")
    with pytest.raises(OSError, match=r"snapshots: no results can be written there .*`notus export`"):
        find_source(str(run))


def test_no_checkpoint_yet(full_run, in_progress):
    run = in_progress(full_run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        find_source(str(run))


def test_a_failed_export_says_why(full_run, in_progress):
    run = in_progress(full_run)
    (run / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        find_source(str(run))
    assert [path.name for path in (run / "snapshots").iterdir()] == [".lock"]


def test_a_failed_export_says_all(full_run, in_progress, tmp_path, monkeypatch, capfd):
    run = in_progress(full_run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text("a: [\nb: 1")
    with pytest.raises(ValueError, match=r"config\.yaml: not readable as YAML \(.*line.*\); restore the file$"):
        resolve_model._export_apart(run, tmp_path, False)
    assert "Traceback" not in capfd.readouterr().err
    (run / "config.yaml").write_text(config.replace("rank: 0", "rank: 3").replace("alpha:", "beta:"))
    with pytest.raises(ValueError, match=r"run: exporting its newest checkpoint ended with code 1$"):
        resolve_model._export_apart(run, tmp_path, False)
    shown = capfd.readouterr().err
    assert "Traceback" in shown
    assert "KeyError: 'alpha'" in shown
    monkeypatch.setattr(resolve_model, "_START", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ValueError, match=r"ended with signal 9 \(Killed\)$"):
        resolve_model._export_apart(run, tmp_path, False)


def settings(model_folder):
    return {"model": {"name_or_path": str(model_folder)}, "data": {"chat_template": None}, "lora": {"rank": 0}}


def test_the_learned_chat_template_is_the_tokenizers(full_run, in_progress, model_folder):
    run = in_progress(full_run)
    (run / "data.json").write_text(json.dumps({"train": {"report": {"templated": 0}}}))
    with distributed.process_group():
        _, plain, _ = load_unfinished(run, settings(model_folder))
        (run / "data.json").write_text(json.dumps({"train": {"report": {"templated": 3}}}))
        _, chat, _ = load_unfinished(run, settings(model_folder))
    assert plain.chat_template is None
    assert chat.chat_template == template_to_export(ChatEncoder(plain))


def test_a_damaged_checkpoint_gives_way_to_an_older_one(full_run, in_progress, model_folder, capsys):
    run = in_progress(full_run)
    newer = shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000003")
    state = json.loads((newer / "state.json").read_text())
    (newer / "state.json").write_text(json.dumps({**state, "digest": "0"}))
    with distributed.process_group():
        _, _, checkpoint = load_unfinished(run, settings(model_folder))
    assert checkpoint.name == "step-00000002"
    assert "warning" in capsys.readouterr().out


def test_a_checkpoint_that_the_run_replaces_meanwhile(full_run, in_progress, model_folder, monkeypatch):
    run = in_progress(full_run)
    folder, load = run / "checkpoints", resolve_model.load_checkpoint

    def replaced(path, *args, **options):
        if path.name == "step-00000002":
            path.rename(folder / "step-00000003")
            raise DamagedCheckpointError("gone")
        return load(path, *args, **options)

    monkeypatch.setattr(resolve_model, "load_checkpoint", replaced)
    with distributed.process_group():
        _, _, checkpoint = load_unfinished(run, settings(model_folder))
    assert checkpoint.name == "step-00000003"


def test_an_unfinished_run_has_no_adapters_on_idle_layers(tmp_path, pairs_file):
    folder, run = tmp_path / "model", tmp_path / "run"
    make_family("mamba").save_pretrained(folder)
    toy_tokenizer(vocab_size=360).save_pretrained(folder)
    lora = {"lora__rank": 1, "lora__target_modules": "all-linear", "training__max_steps": 1}
    dpo.run(config("dpo", run, folder, pairs_file, **lora))
    finished = load_file(run / "model" / "adapter_model.safetensors")
    shutil.rmtree(run / "model")
    found = load_file(find_source(str(run)).folder / "adapter_model.safetensors")
    assert found.keys() == finished.keys()
    assert all(torch.equal(found[name], finished[name]) for name in found)
    assert not any("dt_proj" in name for name in found)


@pytest.mark.parametrize("output", [".", "./", "run", "other/.."])
def test_relative_paths_of_a_run_start_from_where_it_was_trained(output, tmp_path, monkeypatch):
    run = tmp_path / "run"
    place = run if output in (".", "./") else tmp_path
    run.mkdir()
    (place / "pairs.jsonl").touch()
    monkeypatch.chdir("/")
    settings = {"data": {"train": [{"path": "pairs.jsonl"}]}, "model": {}, "training": {"output_dir": output}}
    found = resolve_model.with_paths(settings, run)
    assert found["data"]["train"] == [{"path": str(place / "pairs.jsonl")}]
