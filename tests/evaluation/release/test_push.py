"""`notus export --push` against a stand-in for the hub: what arrives is what was exported, and nothing goes unasked.

The hub itself was not reached: not run. The client is kept from Xet's storage, which the stand-in has not.
"""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from hub import TOKEN

from notus.__main__ import main
from notus.evaluation.read_run import Run
from notus.evaluation.release.push import private_paths

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")  # the client's own


def export(*words):
    return main(["export", *map(str, words)])


def refused(capsys, *words):
    capsys.readouterr()
    assert export(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert TOKEN not in error
    return error


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_full_model_arrives_byte_for_byte(full_run, tmp_path, hub, capsys):
    out = tmp_path / "out"
    options = ("--max-shard-size", "20KB", "--license", "mit", "--language", "en")
    assert export(full_run, out, "--push", "ada/tiny", *options) == 0
    assert hub.files("ada/tiny") == content(out)
    assert len([name for name in content(out) if name.endswith(".safetensors")]) > 2
    assert "README.md" in content(out)
    assert not any(TOKEN.encode() in path.read_bytes() for path in out.iterdir())
    assert hub.repositories["ada/tiny"]["private"]
    assert hub.commits == [("ada/tiny", "main", "Model, tokenizer and card")]
    assert f"pushed to {hub.address}/ada/tiny\n" in capsys.readouterr().out


def test_an_adapter_needs_a_base_that_others_have(lora_run, model_folder, tmp_path, hub, capsys):
    out = tmp_path / "out"
    error = refused(capsys, lora_run, out, "--push", "tiny-lora")
    assert f"a local folder, {model_folder.name}, which others do not have" in error
    assert "--base-model" in error
    assert not out.exists()
    assert hub.requests == []
    assert export(lora_run, out, "--push", "tiny-lora", "--base-model", "org/base") == 0
    sent = hub.files("ada/tiny-lora")  # the name alone is the user's own repository
    assert sent == content(out)
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert b'from_pretrained("ada/tiny-lora"' in sent["README.md"]
    assert all(str(tmp_path.parent).encode() not in text for text in sent.values())


def test_an_unfinished_adapter_and_a_merged_model(lora_run, tmp_path, hub):
    run = shutil.copytree(lora_run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    options = ("--base-model", "org/base", "--push")
    assert export(run, tmp_path / "adapter", *options, "ada/adapter") == 0
    assert json.loads(hub.files("ada/adapter")["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert b"the model after step 2" in hub.files("ada/adapter")["README.md"]
    assert export(run, tmp_path / "merged", *options, "ada/merged", "--merge") == 0
    assert hub.files("ada/merged") == content(tmp_path / "merged")
    assert "model.safetensors" in hub.files("ada/merged")


def test_nothing_is_sent_without_push(full_run, tmp_path, hub, capsys):
    assert export(full_run, tmp_path / "out") == 0
    assert hub.requests == []
    for option in ("--public", "--dry-run"):
        assert "no effect without --push" in refused(capsys, full_run, tmp_path / "new", option)
    assert hub.requests == []


def test_a_dry_run_sends_nothing_and_says_what_would_go(full_run, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    out = tmp_path / "out"
    assert export(full_run, out, "--push", "ada/tiny", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "would upload to ada/tiny (private), bytes and name:" in told
    for name, text in content(out).items():
        assert f"{len(text):>15,}  {name}\n" in told
    assert ".notus-export" not in told
    assert hub.requests == []


def test_an_export_that_is_there_goes_without_another(full_run, tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "out"
    assert export(full_run, out) == 0
    before = content(out)
    monkeypatch.setattr("notus.model.export.load_causal_lm", None)  # fails if it is called
    assert export(full_run, out, "--push", "ada/tiny", "--revision", "v1/a", "--commit-message", "First") == 0
    assert "only its README.md was written anew" in capsys.readouterr().out
    after = content(out)
    assert after["README.md"] != before["README.md"]
    assert b'from_pretrained("ada/tiny"' in after["README.md"]
    assert hub.files("ada/tiny", "v1/a") == after == {**before, "README.md": after["README.md"]}
    assert hub.files("ada/tiny") == {}
    assert hub.commits == [("ada/tiny", "v1/a", "First")]


def test_an_edited_card_is_never_overwritten(full_run, tmp_path, hub, capsys):
    out = tmp_path / "out"
    assert export(full_run, out) == 0
    card = out / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    edited = card.read_text()
    assert "was edited, so say there" in refused(capsys, full_run, out, "--push", "ada/tiny", "--license", "mit")
    assert export(full_run, out, "--push", "ada/tiny") == 0
    assert card.read_text() == edited
    assert hub.files("ada/tiny")["README.md"] == edited.encode()
    for place, written in ((full_run, full_run), (Path.home(), Path.home()), (full_run, f"file://{full_run}")):
        card.write_text(f"{edited}\nTrained in {written}/x.\n")
        assert f"README.md: names {place}, a place on this" in refused(capsys, full_run, out, "--push", "ada/tiny")
    assert len(hub.commits) == 1


def test_an_export_of_something_else_is_not_pushed(full_run, lora_run, tmp_path, hub, capsys):
    out = tmp_path / "out"
    assert export(full_run, out) == 0
    error = refused(capsys, full_run, out, "--push", "ada/tiny", "--dtype", "bf16")
    assert "dtype torch.float32, not torch.bfloat16" in error
    assert "another run" in refused(capsys, lora_run, out, "--push", "ada/tiny", "--base-model", "org/base")
    assert hub.requests == []


def test_a_run_that_was_trained_anew_is_not_the_one_that_was_exported(full_run, tmp_path, hub, capsys):
    """The same config in the same folder, so other weights: those of before must not go out under the new card."""
    run = shutil.copytree(full_run, tmp_path / "run")
    noted = run / "environment.json"
    launches = [{"started": "2026-11-22T18:45:19+00:00", "from_step": 0, "seconds": 1.0}]
    noted.write_text(json.dumps({"launches": launches}))
    assert export(run, tmp_path / "out") == 0
    later = [*launches, {"started": "2026-11-23T01:00:00+00:00", "from_step": 2, "seconds": 1.0}]
    noted.write_text(json.dumps({"launches": later}))
    assert export(run, tmp_path / "out", "--push", "ada/tiny") == 0  # it went on, and is the same run
    noted.write_text(json.dumps({"launches": later[1:]}))
    assert "an export of another run" in refused(capsys, run, tmp_path / "out", "--push", "ada/tiny")
    assert len(hub.commits) == 1


def test_an_export_of_the_run_as_it_was_says_what_to_do(full_run, tmp_path, capsys):
    run, out = shutil.copytree(full_run, tmp_path / "run"), tmp_path / "out"
    (run / "environment.json").write_text(json.dumps({"launches": [{"started": "2026-11-22T18:45:19+00:00"}]}))
    (run / "model").rename(tmp_path / "model")  # as before the last step
    assert export(run, out) == 0
    (tmp_path / "model").rename(run / "model")
    remedy = "; name a new folder, or remove this one first\n"
    assert refused(capsys, run, out).endswith(f"of this run at step 2, not at its end{remedy}")
    shutil.rmtree(out)
    assert export(run, out) == 0
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 1\n", "epochs: 2\n"))
    assert refused(capsys, run, out).endswith(f"of this run before its config changed, as training.extend does{remedy}")


def test_a_path_as_the_config_writes_it_is_found(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    settings = {
        "model": {"name_or_path": "org/base"},
        "data": {"train": [{"path": str(tmp_path / "link" / "p.jsonl")}], "eval": None, "chat_template": "zephyr"},
        "training": {"output_dir": str(tmp_path / "was-here")},
    }
    found = private_paths(Run(tmp_path / "run", settings, [], {}, {}, []))
    for place in ("link/p.jsonl", "disk/p.jsonl", "was-here", "run"):
        assert str(tmp_path / place) in found
    assert not any("zephyr" in place or "org/base" in place for place in found)


def test_visibility_is_never_changed(full_run, tmp_path, hub, capsys):
    out = tmp_path / "out"
    hub.add("ada/open", private=False)
    assert "ada/open is public" in refused(capsys, full_run, out, "--push", "ada/open")
    assert not out.exists()
    assert export(full_run, out, "--push", "ada/open", "--public") == 0
    hub.add("ada/closed", **{"pytorch_model.bin": b"old", "README.md": b"old"})
    assert export(full_run, out, "--push", "ada/closed", "--public") == 0
    told = capsys.readouterr().out
    assert "ada/closed is private, and stays so" in told
    assert "ada/closed holds pytorch_model.bin, README.md already" in told
    assert hub.repositories["ada/closed"]["private"]
    assert hub.files("ada/closed") == {**content(out), "pytorch_model.bin": b"old"}
    assert export(full_run, tmp_path / "new", "--push", "ada/new", "--public") == 0
    assert not hub.repositories["ada/new"]["private"]


def test_login_and_access_are_asked_before_the_work(full_run, tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "out"
    assert "may not write there" in refused(capsys, full_run, out, "--push", "others/tiny")
    hub.add("others/theirs", writable=False)
    assert "may not write there" in refused(capsys, full_run, out, "--push", "others/theirs")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "does not accept the login" in refused(capsys, full_run, out, "--push", "ada/tiny")
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no login; run `hf auth login`" in refused(capsys, full_run, out, "--push", "ada/tiny")
    assert not out.exists()
    assert hub.commits == []
    hub.requests.clear()
    with pytest.raises(SystemExit):  # before any work
        export(full_run, out, "--push", "no//name")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("request_name", "fault", "told"),
    [
        ("validate", 401, "does not accept the login"),
        ("preupload", 403, "may not write there"),
        ("put", 403, "may not write there"),
        ("put", "cut", ""),
        ("batch", 503, "the hub has a fault"),
        ("commit", 500, "the hub has a fault"),
        ("commit", "cut", "disconnected"),
    ],
)
def test_an_upload_that_fails_keeps_the_export(full_run, tmp_path, hub, capsys, request_name, fault, told):
    out = tmp_path / "out"
    hub.faults[request_name] = fault
    error = refused(capsys, full_run, out, "--push", "ada/tiny")
    assert "cannot upload to ada/tiny" in error
    assert told in error
    assert "the same command pushes it" in error
    assert hub.commits == []
    kept = content(out)
    hub.faults.clear()
    assert export(full_run, out, "--push", "ada/tiny") == 0
    assert hub.files("ada/tiny") == content(out) == kept


def test_a_header_that_the_hub_refuses_is_told(full_run, tmp_path, hub, capsys):
    out = tmp_path / "out"
    assert export(full_run, out) == 0
    (out / "README.md").write_text("---\nmodel-index: 3\n---\nMine.\n")
    assert "Invalid metadata in README.md" in refused(capsys, full_run, out, "--push", "ada/tiny")
    assert hub.commits == []


def test_a_hub_without_xet_is_told_of(full_run, tmp_path, hub, monkeypatch, capsys):
    """The client does not fall back by itself."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    error = refused(capsys, full_run, tmp_path / "out", "--push", "ada/tiny")
    assert "404 Not Found" in error
    assert "HF_HUB_DISABLE_XET=1 does without that storage" in error
