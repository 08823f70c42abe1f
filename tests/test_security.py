"""What a stranger could hand over (code, pickles, paths, templates) does nothing, and no secret leaves."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
import yaml
from runs import config, settings, write_pairs
from toys import toy_model_folder, toy_tokenizer

from notus.__main__ import main
from notus.config import load_config
from notus.data.chat import ChatEncoder
from notus.model.load import INDEX, weight_files
from notus.runtime.process import run_entry
from notus.training import dpo

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a finished LoRA run on it whose config trusts remote code."""
    folder = tmp_path_factory.mktemp("finished")
    pairs, model = write_pairs(folder / "pairs.jsonl", 8), toy_model_folder(folder / "model")
    quick = {"training__max_steps": 2, "training__save_every": 1, "training__keep_checkpoints": None}
    dpo.run(config("dpo", folder / "run", model, pairs, model__trust_remote_code=True, lora__rank=2, **quick))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of them, the run being one on the copied model."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    for path in (copy / "run" / "config.yaml", copy / "run" / "model" / "adapter_config.json"):
        path.write_text(path.read_text().replace(str(finished), str(copy)))
    (copy / "prompts.txt").write_text("hello\n")
    (copy / "new.yaml").write_text(yaml.safe_dump(settings(copy / "new", copy / "model", copy / "pairs.jsonl")))
    return copy


def command(*words: str | Path) -> int:
    return main([str(word) for word in words])


COMMANDS: dict[str, Callable[[Path], int]] = {
    "train": lambda at: run_entry(lambda: dpo.run(load_config(at / "new.yaml", "dpo"))),
    "reference": lambda at: command("reference", at / "new.yaml"),
    "evaluate": lambda at: command("evaluate", at / "model", "--pairs", at / "pairs.jsonl"),
    "evaluate the run": lambda at: command("evaluate", at / "run", "--pairs", at / "pairs.jsonl"),
    "generate": lambda at: command("generate", at / "model", at / "prompts.txt", at / "out.jsonl"),
    "generate from the run": lambda at: command("generate", at / "run", at / "prompts.txt", at / "out.jsonl"),
    "export the run": lambda at: command("export", at / "run", at / "out", "--merge"),
}
every_command = pytest.mark.parametrize("name", COMMANDS)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def plant(path: Path) -> None:
    """Put a pickle at `path` that leaves a mark when it is read."""
    path.write_bytes(pickle.dumps(Trap(path.with_name("was unpickled"))))


def test_a_trap_works(tmp_path: Path) -> None:
    plant(tmp_path / "x.bin")
    pickle.loads((tmp_path / "x.bin").read_bytes())
    assert marks(tmp_path)


def marks(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name in ("was unpickled", "was imported")]


def plant_code(model: Path) -> None:
    """Make the model one of its own kind, whose code leaves a mark when it is imported."""
    code = f"from pathlib import Path\nPath({str(model / 'was imported')!r}).touch()\nraise RuntimeError('ran')\n"
    (model / "stranger.py").write_text(code)
    kinds = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    edit(model / "config.json", model_type="stranger", auto_map=kinds)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["stranger.Tokenizer", None]})


@every_command
def test_code_that_comes_with_a_model_is_not_run(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "trust_remote_code: true" in (folder / "run" / "config.yaml").read_text()
    plant_code(folder / "model")
    assert COMMANDS[name](folder) == 1
    assert "error: " in capsys.readouterr().err
    assert not marks(folder)


def test_it_is_run_where_the_flag_is_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant_code(folder / "model")
    assert command("evaluate", folder / "model", "--pairs", folder / "pairs.jsonl", "--trust-remote-code") == 1
    assert "(ran)" in capsys.readouterr().err
    assert marks(folder) == [folder / "model" / "was imported"]


def test_trust_does_not_leave_with_a_model(folder: Path) -> None:
    assert COMMANDS["export the run"](folder) == 0
    written = [path for place in ("out", "run/model") for path in (folder / place).iterdir()]
    assert len(written) > 6
    assert not [path for path in written if b"trust_remote_code" in path.read_bytes()]


@every_command
def test_pickled_weights_are_rejected(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model" / "model.safetensors").unlink()
    plant(folder / "model" / "pytorch_model.bin")
    assert COMMANDS[name](folder) == 1
    assert "save pytorch_model.bin again as safetensors" in capsys.readouterr().err
    assert not marks(folder)


@pytest.mark.parametrize("name", ["evaluate the run", "generate from the run", "export the run"])
def test_a_pickled_adapter_is_rejected(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run" / "model" / "adapter_model.safetensors").unlink()
    plant(folder / "run" / "model" / "adapter_model.bin")
    assert COMMANDS[name](folder) == 1
    assert "adapter_model.safetensors" in capsys.readouterr().err
    assert not marks(folder)


def test_pickles_beside_what_is_read_are_left_alone(folder: Path) -> None:
    run = folder / "run"
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    places = [path for path in [folder / "model", *run.rglob("*"), *(folder / "cache").rglob("*")] if path.is_dir()]
    assert run / "checkpoints" / "step-00000001" in places
    for place in places:
        for file in (".metadata", "__0_0.distcp", "rng_state.pth", "optimizer.pt", "training_args.bin", "state.pkl"):
            plant(place / file)
        if not (place / "model.safetensors.index.json").exists():
            plant(place / "pytorch_model.bin")
    assert run_entry(lambda: dpo.run(load_config(run / "config.yaml", "dpo"))) == 0
    for name in ("evaluate the run", "generate", "export the run"):
        assert COMMANDS[name](folder) == 0
    assert not marks(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/secret.safetensors", "a/../../b.safetensors", 5, "x.bin"])
def test_an_index_of_weights_names_safetensors_of_its_own_folder(shard: str | int, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": shard}}))
    for path in (tmp_path / "secret.safetensors", tmp_path / "b.safetensors", model / "model-1.safetensors"):
        path.touch()
    with pytest.raises(ValueError, match=f"{INDEX}: {shard!r} is no safetensors file of this folder"):
        weight_files(model)


@every_command
def test_no_command_follows_an_index_out_of_the_folder(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "model" / "model.safetensors"
    weights.rename(folder / "secret.safetensors")
    (folder / "model" / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    assert COMMANDS[name](folder) == 1
    assert "'../secret.safetensors' is no safetensors file of this folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.__class__.__base__ }}",
        "{{ messages.append(messages[0]) }}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ messages[0] + 1 }}",
        "{{ 'x' * 10**18 }}",
        "{{ messages",
    ],
)
def test_a_hostile_or_broken_template_is_a_clear_error(template: str) -> None:
    encoder = ChatEncoder(toy_tokenizer(chat_template=template))
    conversation = ([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}])
    with pytest.raises(ValueError, match=r"chat template .* user, assistant"):
        encoder.encode([conversation])


SECRETS = {
    "HF_TOKEN": "hf_PlantedSecretOfTheHub0123456789abcd",
    "HUGGING_FACE_HUB_TOKEN": "hf_PlantedOlderSecretOfTheHub01234567",
    "WANDB_API_KEY": "0123456789planted0secret0of0wandb0123456",
    "OPENAI_API_KEY": "sk-PlantedSecretOfOpenAI0123456789",
}


@pytest.mark.slow
def test_no_secret_is_written_or_said(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pairs, model, run = write_pairs(tmp_path / "pairs.jsonl", 8), toy_model_folder(tmp_path / "model"), tmp_path / "run"
    tracked = settings(run, model, pairs, tracking__wandb=True, tracking__tensorboard=True, training__max_steps=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tracked))
    home = tmp_path / "home"  # where wandb and the hub keep theirs
    home.mkdir()
    environment = {**os.environ, **SECRETS, "HOME": str(home), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    environment |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(home)}
    said = b""
    for words in (
        ["train_dpo.py", tmp_path / "run.yaml"],
        ["train_dpo.py", tmp_path / "run.yaml", "--dpo.beta=x"],  # an error quotes settings
        ["-m", "notus", "export", run, tmp_path / "out"],
        ["-m", "notus", "evaluate", run, "--pairs", pairs, "--output", tmp_path / "figures.json"],
    ):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, timeout=300)
        assert done.returncode == ("--dpo.beta=x" in words), done.stderr.decode()
        said += done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for expected in ("figures.json", "metrics.jsonl", "debug.log", "debug-internal.log"):
        assert expected in {path.name for path in files}
    assert [path for path in files if path.suffix == ".wandb"]
    assert [path for path in files if path.name.startswith("events.out.tfevents")]
    for name, secret in SECRETS.items():
        assert secret.encode() not in said, name
        assert not [path for path in files if secret.encode() in path.read_bytes()], name
