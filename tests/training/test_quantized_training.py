"""QLoRA beside LoRA on a base of the dequantised weights: log-probs, gradients, whole runs, ranks, resuming."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_family
from ranks import free_ports, launched, run_ranks
from runs import assert_same_run, at_call, config, read_metrics, settings, terminate
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from toys import UNEVEN, relative, toy_model_folder, toy_tokenizer
from transformers import AutoTokenizer

from notus import __main__ as entry
from notus.config import LoraConfig, config_from_dict
from notus.data.batching import step_rows
from notus.data.dataset import TokenizedDataset
from notus.data.tokenize import load_pairs
from notus.model import quantization
from notus.model.lora import lora_layers
from notus.model.policy import Policy
from notus.model.quantization import dequantize_rows, quantize_rows, quantized_layers
from notus.runtime.process import STOPPED
from notus.training import dpo
from notus.training.parallelize import build_policy, read_model_config

ADAPTER = LoraConfig(rank=2, alpha=4, dropout=0.0, target_modules=["q_proj", "down_proj"])
QLORA: dict[str, Any] = {"model__quantization": "nf4", "lora__rank": 2}


def dequantised(folder: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A copy of a toy model whose blocks' linear layers hold what 4 bits keep of them."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = dequantize_rows(quantize_rows(tensor), tensor.shape[1], dtype).float().contiguous()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def policy_of(folder: Path, device: torch.device, **options: Any) -> Policy:
    given = {"device": device, "precision": "fp32", "lora": ADAPTER, **options}
    policy = build_policy(folder, read_model_config(folder), **given)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(policy.causal_lm).values():
            start = torch.randn(layer.lora_B.shape, generator=generator) * 0.1
            layer.lora_B.copy_(torch.distributed.tensor.distribute_tensor(start, layer.lora_B.device_mesh))
    return policy


def rows_of(folder: Path, pairs: Path) -> TokenizedDataset:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TokenizedDataset(load_pairs(pairs, tokenizer, max_length=120, max_prompt_length=60)[0])


def logps_and_gradients(policy: Policy, rows: TokenizedDataset) -> dict[str, torch.Tensor]:
    (batch,) = step_rows(rows, np.arange(6), rank=0, world_size=1, tokens_per_row=1000)
    logps = policy(batch)
    (logps[:, 0] - logps[:, 1]).sum().backward()
    gradients = {name: each.grad.full_tensor() for name, each in policy.named_parameters() if each.grad is not None}
    return {"log-probs": logps.detach(), **gradients}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], most: float) -> None:
    assert found.keys() == expected.keys()
    assert len(found) == 1 + 2 * 2 * 2  # A and B of two layers in two blocks
    for name, tensor in expected.items():
        assert tensor.abs().sum() > 0, name
        assert relative(found[name], tensor) <= most, name


@pytest.mark.parametrize("mode", ["none", "products", "selective", "full"])
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-6), ("bf16", 0.0)])
def test_log_probs_and_gradients_are_those_of_the_dequantised_base(
    mode: str, precision: str, most: float, tmp_path: Path, model_folder: Path, pairs_file: Path, device: torch.device
) -> None:
    rows = rows_of(model_folder, pairs_file)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    twin = dequantised(model_folder, tmp_path / "twin", dtype)
    options = {"precision": precision, "activation_checkpointing": mode}
    policy = policy_of(model_folder, device, quantization="nf4", **options)
    assert len(quantized_layers(policy)) == 14
    found = logps_and_gradients(policy, rows)
    assert_equal(found, logps_and_gradients(policy_of(twin, device, **options), rows), most)
    plain = logps_and_gradients(policy_of(model_folder, device, **options), rows)
    assert relative(found["log-probs"], plain["log-probs"]) > 1e-3  # and not those of the base as it was


def test_every_linear_layer_with_an_adapter_and_biases(tmp_path: Path, pairs_file: Path, device: torch.device) -> None:
    folder = toy_model_folder(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    rows, twin = rows_of(folder, pairs_file), dequantised(folder, tmp_path / "twin")
    every = LoraConfig(rank=2, alpha=4, dropout=0.0, target_modules="all-linear")
    found = logps_and_gradients(policy_of(folder, device, lora=every, quantization="nf4"), rows)
    expected = logps_and_gradients(policy_of(twin, device, lora=every), rows)
    assert len(found) == 1 + 2 * 14
    for name, tensor in expected.items():
        assert relative(found[name], tensor) <= 1e-6, name


def test_a_frozen_policy_scores_as_the_one_that_is_trained(
    model_folder: Path, pairs_file: Path, device: torch.device
) -> None:
    config, rows = read_model_config(model_folder), rows_of(model_folder, pairs_file)
    found = []
    for options in ({"lora": ADAPTER}, {"trainable": False}):
        policy = build_policy(
            model_folder, config, device=device, precision="fp32", quantization="nf4", unquantized=["o_proj"], **options
        )
        assert len(quantized_layers(policy)) == 12
        (batch,) = step_rows(rows, np.arange(6), rank=0, world_size=1, tokens_per_row=1000)
        found.append(policy(batch).detach())
    assert torch.equal(*found)


def test_the_log_says_how_much_is_quantised(
    model_folder: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    policy_of(model_folder, device, quantization="nf4")
    assert "model.quantization: 0.0 of 0.0 million weights in" in capsys.readouterr().out


# q, v and gate are kept by "selective", all by "products"; the last, down, is read by nobody unless it has an adapter.
@pytest.mark.parametrize(("mode", "targets", "again"), [
    ("none", ["q_proj"], 0), ("products", ["q_proj"], 0), ("selective", ["q_proj"], 3), ("full", ["q_proj"], 6),
    ("products", ["down_proj"], 0), ("full", ["down_proj"], 7),
])  # fmt: skip
def test_how_often_weights_are_dequantised(
    mode: str, targets: list[str], again: int, model_folder: Path, pairs_file: Path, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    adapter = LoraConfig(rank=2, alpha=4, dropout=0.0, target_modules=targets)
    policy = policy_of(model_folder, device, quantization="nf4", activation_checkpointing=mode, lora=adapter)
    (batch,) = step_rows(rows_of(model_folder, pairs_file), np.arange(6), rank=0, world_size=1, tokens_per_row=1000)
    counted: list[int] = []
    inner = quantization.dequantize_rows
    monkeypatch.setattr(quantization, "dequantize_rows", lambda *args: counted.append(1) or inner(*args))
    logps = policy(batch)
    assert len(counted) == 2 * 7
    logps.sum().backward()
    # the first block's input needs no gradient, so nothing flows back beyond its adapter: through q, k and v, or all
    assert len(counted) == 2 * 7 + 2 * again + 2 * 7 - {"q_proj": 3, "down_proj": 7}[targets[0]]


# --- ranks ---


def _of_this_rank(folder: Path, pairs: Path, out: Path, sharding: str) -> None:
    device = torch.device("cpu")
    policy = policy_of(folder, device, quantization="nf4", sharding=sharding)
    packed = {name: layer.weight for name, layer in quantized_layers(policy.causal_lm).items()}
    # a rank alone keeps them as they are; with others, each has a part
    assert {isinstance(weight.data, DTensor) for weight in packed.values()} == {torch.distributed.get_world_size() > 1}
    whole = {name: w.full_tensor() if isinstance(w.data, DTensor) else w.data for name, w in packed.items()}
    (batch,) = step_rows(rows_of(folder, pairs), np.arange(6), rank=0, world_size=1, tokens_per_row=1000)
    logps = policy(batch)
    (logps[:, 0] - logps[:, 1]).sum().backward()
    world = torch.distributed.get_world_size()
    grads = {n: p.grad.full_tensor() / world for n, p in policy.named_parameters() if p.grad is not None}
    if torch.distributed.get_rank() == 0:
        torch.save({"whole": whole, "found": {"log-probs": logps.detach(), **grads}}, out)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_hold_the_same_values_however_many_they_are(world_size: int, tmp_path: Path, pairs_file: Path) -> None:
    folder = toy_model_folder(tmp_path / "model", **UNEVEN)  # 33 columns, and 49 rows that no number of ranks divides
    for ranks in (1, world_size):
        run_ranks(_of_this_rank, ranks, tmp_path, folder, pairs_file, tmp_path / f"{ranks}.pt", "full")
    one, many = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, world_size))
    weights = load_file(folder / "model.safetensors")
    for name, packed in one["whole"].items():
        expected = quantize_rows(weights[f"{name}.weight"])
        assert torch.equal(packed.view(torch.uint8), expected), name
        assert torch.equal(many["whole"][name].view(torch.uint8), expected), name
    assert_equal(many["found"], one["found"], 1e-6)


def _run_on_ranks(trees: list[dict[str, Any]], ports: list[int]) -> None:
    for tree, port in zip(trees, ports, strict=True):
        with launched(port):
            assert dpo.run(config_from_dict(tree, "dpo")) == 0


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_number_of_ranks(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    more = {**QLORA, "training__max_steps": 4, "training__log_every": 1, "lora__dropout": 0.0}
    for ranks in (1, 2):
        tree = settings(tmp_path / f"{ranks}", model_folder, pairs_file, **more)
        run_ranks(_run_on_ranks, ranks, tmp_path, [tree], free_ports(1))
    one, two = (read_metrics(tmp_path / f"{ranks}") for ranks in (1, 2))
    for first, second in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
            assert first[key] == pytest.approx(second[key], rel=1e-4, abs=1e-6), key


# --- runs ---


def test_a_run_is_the_same_as_one_on_the_dequantised_base(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    twin = dequantised(model_folder, tmp_path / "twin")
    more = {"training__log_every": 1, "data__eval_size": 4, "training__eval_every": 2, "tracking__samples": 2}
    cases = {"quantised": (model_folder, QLORA), "dequantised": (twin, {"lora__rank": 2})}
    for name, (model, kind) in cases.items():
        assert dpo.run(config("dpo", tmp_path / name, model, pairs_file, **more, **kind)) == 0
    found, expected = (read_metrics(tmp_path / name) for name in cases)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in ("loss", "grad_norm", "logps/chosen", "eval_loss", "eval_rewards/margins"):
            if key in one:
                assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), key
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in cases]
    assert samples[0] == samples[1]
    exported = json.loads((tmp_path / "quantised" / "model" / "adapter_config.json").read_text())
    assert exported["base_model_name_or_path"] == str(model_folder.resolve())  # the base as it was
    adapters = [load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in cases]
    for name, tensor in adapters[1].items():
        assert relative(adapters[0][name], tensor) <= 1e-4, name


def test_the_merge_is_into_the_base_as_it_was_and_says_so(
    tmp_path: Path, model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {**QLORA, "training__max_steps": 2, "training__learning_rate": 1e-2, "lora__alpha": 4.0}
    assert dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, **more)) == 0
    assert entry.main(["export", str(tmp_path / "run"), str(tmp_path / "merged"), "--merge"]) == 0
    assert "trained over a base in 4 bits" in capsys.readouterr().out
    base, merged = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "merged"))
    adapter = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    changed = set()
    for key, b in adapter.items():
        if key.endswith("lora_B.weight"):
            name = key.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
            expected = base[name] + 2 * b @ adapter[key.replace("lora_B", "lora_A")]  # alpha / rank
            torch.testing.assert_close(merged[name], expected)
            changed.add(name)
    assert changed
    assert all(torch.equal(merged[name], base[name]) for name in base.keys() - changed)


@pytest.mark.parametrize("task", ["step", "evaluation"])
def test_killed_and_resumed_is_bitwise_undisturbed(
    task: str, tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {**QLORA, "training__save_every": 3, "training__log_every": 4, "training__epochs": 2,
            "training__eval_every": 5, "data__eval_size": 5, "lora__dropout": 0.3}  # fmt: skip
    assert dpo.run(config("dpo", tmp_path / "whole", model_folder, pairs_file, **more)) == 0
    cut = config("dpo", tmp_path / "cut", model_folder, pairs_file, **more)
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, *(("row_loss", 5) if task == "step" else ("evaluate", 1)), terminate)
        assert dpo.run(cut) == STOPPED
    assert dpo.run(cut) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    saved = [name for path in (tmp_path / "cut" / "checkpoints").rglob("*.safetensors") for name in load_file(path)]
    assert saved
    assert all("lora_" in name for name in saved)  # the base is in its folder


def test_the_reference_cache_knows_the_quantization(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    cache = {"reference__cache_dir": str(tmp_path / "cache"), "training__max_steps": 1}
    files = []
    for name, more in {
        "lora": {"lora__rank": 2}, "qlora": QLORA, "again": {**QLORA, "lora__rank": 3},
    }.items():  # fmt: skip
        dpo.run(config("dpo", tmp_path / name, model_folder, pairs_file, **cache, **more))
        files.append(len(list((tmp_path / "cache").glob("*.safetensors"))))
    assert files == [1, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_compiled_blocks_compute_the_same(
    mode: str, model_folder: Path, pairs_file: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="aot_eager", **options))
    rows = rows_of(model_folder, pairs_file)
    options = {"quantization": "nf4", "activation_checkpointing": mode}
    found = logps_and_gradients(policy_of(model_folder, device, compile=True, **options), rows)
    assert_equal(found, logps_and_gradients(policy_of(model_folder, device, **options), rows), 1e-6)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_weights_that_the_model_reads_itself_are_not_quantised(name: str, tmp_path: Path, pairs_file: Path) -> None:
    folder = tmp_path / "model"
    make_family(name).save_pretrained(folder)
    toy_tokenizer(vocab_size=360).save_pretrained(folder)
    lora = {"lora__rank": 1, "lora__target_modules": "all-linear", "training__max_steps": 2}
    dpo.run(config("dpo", tmp_path / "run", folder, pairs_file, model__quantization="nf4", **lora))
    tensors = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in tensors} == {"in_proj", "x_proj"}
    assert all(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)


def test_idle_layers_are_not_quantised() -> None:
    model = make_family("mamba").requires_grad_(False)
    quantization.quantize(model, torch.float32, idle={"backbone.layers.*.mixer.dt_proj"})
    assert {key.rpartition(".")[2] for key in quantized_layers(model)} == {"in_proj", "x_proj", "out_proj"}
