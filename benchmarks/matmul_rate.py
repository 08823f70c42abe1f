"""The machine's own matmul rate at a model's shapes.

`python matmul_rate.py MODEL TOKENS SCORED PRECISION OUTPUT_FILE`

For every linear layer, the three products of a training step (output, gradient of the input, gradient of the
weight) are timed alone, at the number of tokens of one step (the head: of its scored tokens). The rate is the
arithmetic of one step's products over their time, each product at its fastest.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from job import Machine
from memory import describe_machine
from notus.model.flops import dimensions

_SECONDS_PER_PRODUCT = 0.4


def measure(model_folder: str, tokens: int, scored: int, precision: str) -> Machine:
    """`tokens` and `scored`: rows of the left operand, in the body and in the head."""
    config = AutoConfig.from_pretrained(model_folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    body = Counter(tuple(linear.weight.shape) for linear in linears)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layers = [(shape, tokens, count) for shape, count in body.items()]
    layers.append((tuple(head.weight.shape), scored, 1))
    seconds = sum(count * _layer_seconds(shape, rows, dtype) for shape, rows, count in layers)
    flops = sum(count * 6 * rows * shape[0] * shape[1] for shape, rows, count in layers)
    return Machine(
        flops_per_second=flops / seconds,
        size=dimensions(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        description=describe_machine(),
    )


def _layer_seconds(shape: tuple[int, ...], rows: int, dtype: torch.dtype) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(shape, dtype=dtype, device=device)
    inputs = torch.randn(rows, shape[1], dtype=dtype, device=device)
    gradient = torch.randn(rows, shape[0], dtype=dtype, device=device)
    products = (lambda: inputs @ weight.T, lambda: gradient @ weight, lambda: gradient.T @ inputs)
    return sum(_fastest(product) for product in products)


def _fastest(product: Callable[[], torch.Tensor]) -> float:
    """Seconds of the fastest call, after one to warm up."""
    product()
    calls, end = [_seconds(product)], time.perf_counter() + _SECONDS_PER_PRODUCT
    while time.perf_counter() < end:
        calls.append(_seconds(product))
    return min(calls)


def _seconds(product: Callable[[], torch.Tensor]) -> float:
    _synchronize()
    start = time.perf_counter()
    product()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    folder, tokens, scored, precision, output = sys.argv[1:]
    measure(folder, int(tokens), int(scored), precision).write(output)
