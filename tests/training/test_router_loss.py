"""Runs that balance a mixture's routers: what is logged and learned, on one rank and on two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_ports, launched, run_ranks
from runs import assert_same_run, at_call, config, read_metrics, settings, terminate
from safetensors.torch import load_file
from toys import toy_tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig

from notus.config import config_from_dict
from notus.model import supported
from notus.runtime.process import STOPPED
from notus.training import dpo

BALANCED = {"training__router_aux_loss_coef": 0.5, "training__log_every": 1, "training__epochs": 2}


@pytest.fixture(scope="session")
def mixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    made = MixtralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=None, bos_token_id=1, eos_token_id=2, pad_token_id=None, router_jitter_noise=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder, save_original_format=False)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def mixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch)


def allow(patch: pytest.MonkeyPatch) -> None:
    """Let the packed path train mixtures, whatever else decides."""
    patch.setattr(supported, "NEUTRAL", {}, raising=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in (folder / "model").glob("*.safetensors") for name, each in load_file(file).items()}


@pytest.mark.usefixtures("mixtures")
def test_the_loss_is_logged_and_falls(tmp_path: Path, mixture_folder: Path, pairs_file: Path) -> None:
    found = {}
    for name, coefficient in (("with", 0.5), ("without", 0.0)):
        options = {**BALANCED, "training__router_aux_loss_coef": coefficient}
        assert dpo.run(config("dpo", tmp_path / name, mixture_folder, pairs_file, **options)) == 0
        found[name] = read_metrics(tmp_path / name)
    balance = [line["router_aux_loss"] for line in found["with"]]
    assert balance[-1] < balance[0] - 0.05
    assert all(2 - 1e-3 < value < 4 for value in balance)  # of two experts for each token, even is 2
    assert "router_aux_loss" not in found["without"][0]
    first = {key: found["with"][0][key] for key in ("loss", "rewards/margins", "logps/chosen")}
    assert first == {key: found["without"][0][key] for key in first}  # the task's own metrics leave it out


@pytest.mark.usefixtures("mixtures")
def test_what_stops_is_resumed_bit_for_bit(
    tmp_path: Path, mixture_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**BALANCED, "training__log_every": 4, "training__save_every": 3}
    assert dpo.run(config("dpo", tmp_path / "whole", mixture_folder, pairs_file, **options)) == 0
    cut = config("dpo", tmp_path / "cut", mixture_folder, pairs_file, **options)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 5, terminate)
        assert dpo.run(cut) == STOPPED
    assert dpo.run(cut) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def _run(tree: dict[str, Any], port: int) -> None:
    with launched(port), pytest.MonkeyPatch.context() as patch:
        allow(patch)
        assert dpo.run(config_from_dict(tree, "dpo")) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("mixtures")
def test_two_ranks_and_smaller_rows_are_one_rank(tmp_path: Path, mixture_folder: Path, pairs_file: Path) -> None:
    one, two, rows = (
        settings(tmp_path / name, mixture_folder, pairs_file, training__tokens_per_row=tokens, **BALANCED)
        for name, tokens in (("one", 400), ("two", 400), ("rows", 130))
    )
    run_ranks(_run, 2, tmp_path, two, *free_ports(1))
    for tree in (one, rows):
        assert dpo.run(config_from_dict(tree, "dpo")) == 0
    expected, before = weights(tmp_path / "one"), load_file(next(mixture_folder.glob("*.safetensors")))
    for name in ("two", "rows"):
        for line, other in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / name), strict=True):
            for key in ("loss", "router_aux_loss", "grad_norm"):
                assert line[key] == pytest.approx(other[key], rel=1e-4), (name, key)
        for key, value in weights(tmp_path / name).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-4)
    assert any(not torch.equal(value, before[key]) for key, value in expected.items() if key in before)


def test_a_dense_model_is_refused_before_data_is_read(tmp_path: Path, model_folder: Path) -> None:
    job = config("dpo", tmp_path / "run", model_folder, tmp_path / "none.jsonl", training__router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="router_aux_loss_coef has no effect: MistralForCausalLM has no routers"):
        dpo.run(job)


@pytest.mark.usefixtures("mixtures")
def test_the_models_own_router_loss_is_left_out_and_told(
    tmp_path: Path, mixture_folder: Path, pairs_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "asks"
    folder.mkdir()
    for file in mixture_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "output_router_logits": True}))
    options = {"training__max_steps": 1, "training__warmup_ratio": 0.0}
    assert dpo.run(config("dpo", tmp_path / "run", folder, pairs_file, **options)) == 0
    assert capfd.readouterr().out.count("its own router loss is not added") == 1
    assert dpo.run(config("dpo", tmp_path / "plain", mixture_folder, pairs_file, **options)) == 0
    loss, grad = ((read_metrics(tmp_path / name)[0][key] for name in ("run", "plain")) for key in ("loss", "grad_norm"))
    assert len(set(loss)) == len(set(grad)) == 1


def test_compile_is_refused(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    with pytest.raises(ValueError, match="router_aux_loss_coef reads routers between operations"):
        config("dpo", tmp_path, model_folder, pairs_file, training__router_aux_loss_coef=0.1, training__compile=True)
