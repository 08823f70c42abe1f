"""NF4 on CUDA: the same codes as on the CPU, the kernel beside its plain twin, its memory, whole runs. Needs a GPU."""

from pathlib import Path

import pytest
import torch
from runs import config, read_metrics, write_pairs
from safetensors.torch import load_file
from torch.nn import functional as F
from toys import relative, toy_model_folder

from notus.model import quantization
from notus.model.quantization import check_dequantize, dequantize_rows, quantize_rows, quantized_linear
from notus.runtime import switches
from notus.training import dpo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("inputs", [33, 1000, 4096])
def test_packed_rows_are_those_of_the_cpu(inputs):
    weights = normal(50, inputs).bfloat16()
    assert torch.equal(quantize_rows(weights.to(CUDA)).cpu(), quantize_rows(weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 33), (1024, 4096), (4096, 14336)])
def test_the_kernel_is_its_plain_twin(dtype, shape):
    assert check_dequantize(CUDA, dtype) == []
    packed = quantize_rows(normal(*shape).to(CUDA))
    found = dequantize_rows(packed, shape[1], dtype)
    assert quantization.DEQUANTIZE.failure is None
    with switches.disabled("fused_elementwise"):
        expected = dequantize_rows(packed, shape[1], dtype)
    assert relative(found, expected) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert relative(expected.cpu(), dequantize_rows(packed.cpu(), shape[1], dtype)) < 1e-6


def test_the_linear_layer_and_its_gradient():
    weights = quantize_rows(normal(512, 1024).to(CUDA)).view(torch.bfloat16)
    exact = dequantize_rows(weights, 1024, torch.bfloat16)
    given, twin = (normal(2, 100, 1024, seed=1).to(CUDA).bfloat16().requires_grad_() for _ in range(2))
    out, expected = quantized_linear(given, weights, None), F.linear(twin, exact)
    assert torch.equal(out, expected)
    upstream = normal(2, 100, 512, seed=2).to(CUDA).bfloat16()
    out.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(given.grad, twin.grad)


def test_no_more_than_one_dequantised_weight_is_alive():
    inputs, outputs, layers = 4096, 4096, 6
    weights = [quantize_rows(normal(outputs, inputs, seed=n).to(CUDA)).view(torch.bfloat16) for n in range(layers)]
    given = normal(16, inputs).to(CUDA).bfloat16().requires_grad_()
    dequantize_rows(weights[0], inputs, torch.bfloat16)  # compiled
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = given
    for weight in weights:
        out = quantized_linear(out, weight, None) / 64
    out.sum().backward()
    one = 2 * inputs * outputs
    assert torch.cuda.max_memory_allocated() - before < 1.5 * one  # and some vectors


@pytest.mark.parametrize("more", [
    {}, {"training__compile": True}, {"training__cpu_offload": True},
    {"training__activation_checkpointing": "products"},
], ids=str)  # fmt: skip
def test_a_run_on_a_gpu_is_that_on_the_dequantised_base(tmp_path: Path, more: dict[str, object]) -> None:
    from safetensors.torch import save_file

    model = toy_model_folder(tmp_path / "model", hidden_size=128, intermediate_size=192, head_dim=32)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    twin = toy_model_folder(tmp_path / "twin", hidden_size=128, intermediate_size=192, head_dim=32)
    tensors = load_file(twin / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = dequantize_rows(quantize_rows(tensor), tensor.shape[1], torch.float32).contiguous()
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    found = {}
    for name, folder, kind in (("q", model, {"model__quantization": "nf4"}), ("plain", twin, {})):
        options = {"lora__rank": 4, "lora__alpha": 8.0, "lora__dropout": 0.0, "training__log_every": 1, **more, **kind}
        assert dpo.run(config("dpo", tmp_path / name, folder, pairs, **options)) == 0
        found[name] = [line["loss"] for line in read_metrics(tmp_path / name)]
    assert found["q"] == pytest.approx(found["plain"], rel=1e-4)
