"""A finished full and a finished LoRA run on a toy model, and a cache folder that is the tests' own."""

from pathlib import Path

import datasets
import pytest
from runs import config, write_pairs
from toys import toy_model_folder, toy_tokenizer

from notus.training import dpo

QUICK = {"training__max_steps": 2, "training__learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model_folder(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 10)


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, pairs_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "full"
    dpo.run(config("dpo", folder, model_folder, pairs_file, dpo__beta=0.5, **QUICK))
    return folder


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, pairs_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    dpo.run(config("dpo", folder, model_folder, pairs_file, lora__rank=3, lora__rslora=True, **QUICK))
    return folder


CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer brings a chat template."""
    folder = toy_model_folder(tmp_path_factory.mktemp("models") / "chat")
    toy_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory, chat_base: Path, pairs_file: Path) -> Path:
    """A run of a chat model on pairs of plain text, with two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    dpo.run(config("dpo", folder, chat_base, pairs_file, training__save_every=1, training__max_steps=2))
    return folder
