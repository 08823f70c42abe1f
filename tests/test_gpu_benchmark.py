"""`benchmarks/gpu.py` on a toy model: what it needs, what it counts, and that it notices what is wrong."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from notus.model import attention
from notus.training.distributed import process_group

ROOT = Path(__file__).resolve().parents[1]
# What the machine of a GPU check need not have.
ABSENT = ("datasets", "wandb", "trl", "pyarrow", "pandas", "peft", "accelerate", "tensorboard")
RUN = f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT})); sys.path.insert(0, 'benchmarks'); "


@pytest.fixture
def module(monkeypatch):
    """Imports a module of benchmarks/."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_the_whole_check_on_a_toy_with_torch_and_transformers_alone(tmp_path):
    output = tmp_path / "found.json"
    command = [sys.executable, "-c", RUN + "runpy.run_path('benchmarks/gpu.py', run_name='__main__')"]
    command += ["--cpu", "--minutes", "4", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["parity"]["passed"]
    assert len(found["parity"]["checks"]) > 100
    assert [row["status"] for row in found["rows"]] == ["measured"] * 15
    for row in found["rows"]:
        assert row["pairs_per_second"] > 0
        assert row.get("predicted_gib", 1.0) > 0
        assert 0 < row["mfu"] < 1
        assert row.get("hardware_utilisation", 1.0) > row["mfu"]
    assert sum(found["rows"][0]["shares"].values()) == pytest.approx(1)
    assert "| DPO full, shared, checkpointing full |" in done.stdout
    assert found["hardware"]["versions"]["torch"] == torch.__version__


def test_a_wrong_kernel_fails_the_check_and_what_there_is_no_time_for_is_said(module, monkeypatch, capsys):
    gpu, gpu_parity = module("gpu"), module("gpu_parity")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which `--cpu` sets, back as it was afterwards

    def wrong(query, key, value, layout, scale, window):
        """Right but for the sliding window, which it does not know."""
        return attention.sdpa_kernel(query, key, value, layout, scale, None)

    monkeypatch.setattr(attention, "kernel_for", lambda device, dtype: ("wrong", wrong))
    monkeypatch.setattr(gpu_parity, "ROWS", {"pairs": gpu_parity.ROWS["pairs"]})
    monkeypatch.setattr(gpu_parity, "HEADS", {"grouped-query": (8, 2)})
    monkeypatch.setattr(gpu_parity, "POLICIES", {"window": {"sliding_window": 9}})
    assert gpu.main(["--cpu", "--minutes", "0"]) == 1
    printed = capsys.readouterr().out
    assert "- FAILED: attention, pairs, grouped-query, window 16, fp32" in printed
    assert "- FAILED: policy, window, K=2, log-probs, fp32" in printed
    assert "- FAILED: attention, pairs, grouped-query, fp32" not in printed
    assert "| DPO full, shared, checkpointing full | not run: out of time |" in printed


def test_wrong_logprobs_fail_the_check(module, monkeypatch):
    gpu_parity = module("gpu_parity")
    monkeypatch.setattr(gpu_parity, "linear_logprobs", lambda *args, **_: gpu_parity.full_logprobs(*args) * 1.00001)
    assert not any(check.passed for check in gpu_parity._logprob_checks(torch.device("cpu")) if "fp32" in check.name)
    assert not gpu_parity.Check("an error that is no number", float("nan"), 1.0).passed


@pytest.mark.parametrize("variant", ["shared", "packed", "padded"])
@pytest.mark.parametrize(("rank", "checkpointing"), [(0, "none"), (0, "selective"), (0, "full"), (4, "full")])
def test_the_operations_of_a_step_are_those_that_torch_counts(module, rank, checkpointing, variant):
    shapes, step, rows = module("gpu_shapes"), module("gpu_step"), module("gpu_rows")
    examples = shapes.pairs(4, shapes.CPU, 400)
    batches = shapes.rows(variant, examples, 256, 64)
    with process_group() as device:
        policy, work = step.build(shapes.TOY, device, rank=rank, checkpointing=checkpointing, compile=False)
        take = step.Step(policy, "dpo", 400)
        with FlopCounterMode(display=False) as counter:
            take(batches)
        rows.release(device)
    products = ("mm", "addmm", "bmm")
    counts = {op.__name__.split(".")[0]: flops for op, flops in counter.get_flop_counts()["Global"].items()}
    found = sum(flops for name, flops in counts.items() if name in products)
    no_attention = shapes.dataclasses.replace(work, size=shapes.dataclasses.replace(work.size, layers=0))
    # the head's last chunk is not computed again; the embedding of a LoRA policy needs no gradient below its adapters
    expected = no_attention.done(batches)
    last_chunks = 2 * work.size.head_weights * sum(mask.sum() for row in batches for i in row for mask in i.loss_masks)
    assert found == pytest.approx(expected - last_chunks, rel=0.06 if rank else 1e-6)
    assert work.necessary(examples) <= work.done(batches)


def test_rows_are_halved_until_they_fit_or_else_memory_is_out(module, monkeypatch):
    rows, shapes = module("gpu_rows"), module("gpu_shapes")
    device, row = torch.device("cpu"), module("gpu_rows").Row("dpo", 0, "shared")
    tried = []

    def fits(row, config, scale, device, seconds, tokens):
        tried.append(tokens)
        return {"tokens_per_row": tokens} if tokens <= limit else None

    monkeypatch.setattr(rows, "_try", fits)
    limit = 128
    assert rows.measure(row, shapes.CPU, device, 0.0, None)["tokens_per_row"] == 128
    assert tried == [512, 256, 128]
    limit = 0
    found = rows.guarded(rows.Clock(1), "x", device, lambda: rows.measure(row, shapes.CPU, device, 0.0, None))
    assert found == {"name": "x", "status": "out of memory"}


def test_the_shape_follows_from_the_memory(module):
    shapes = module("gpu_shapes")
    assert shapes.parameters(shapes.MISTRAL_7B) == 7_241_732_096
    assert shapes.fitting(shapes.GPU, 150_000_000_000, lora=False)[0] == "Mistral-7B"
    name, config = shapes.fitting(shapes.GPU, 85_000_000_000, lora=False)
    assert (name, config.num_hidden_layers) == ("Mistral-7B, 16 of 32 layers", 16)
    assert shapes.fitting(shapes.GPU, 42_000_000_000, lora=True)[0] == "Mistral-7B"
    assert shapes.fitting(shapes.GPU, 16_000_000_000, lora=False)[0] == "Mistral, width 2048, 12 of 24 layers"
    with pytest.raises(ValueError, match="run with --cpu"):
        shapes.fitting(shapes.GPU, 2_000_000_000, lora=False)


def test_lengths_are_ultrafeedbacks_and_variants_hold_the_same_scored_tokens(module):
    shapes = module("gpu_shapes")
    examples = shapes.pairs(2000, shapes.GPU, 32000)
    means = [sum(len(part(item)) for item in examples) / 2000 for part in (
        lambda item: item.trunk, lambda item: item.branches[0], lambda item: item.branches[1])]  # fmt: skip
    assert means == pytest.approx([176, 300, 280], rel=0.1)
    assert max(len(item.trunk) + len(branch) for item in examples for branch in item.branches) == 1024
    few = examples[:8]
    scored = {
        variant: sorted(
            branch[mask].tolist()
            for row in shapes.rows(variant, few, 4096, 1024)
            for item in row
            for branch, mask in zip(item.branches, item.loss_masks, strict=True)
        )
        for variant in ("shared", "packed", "padded")
    }
    assert scored["shared"] == scored["packed"] == scored["padded"]
    padded = shapes.rows("padded", few, 4096, 1024)
    assert all(len({len(branch) for item in row for branch in item.branches}) == 1 for row in padded)
