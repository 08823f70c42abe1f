"""The machine's matmul rate at a model's shapes: `python matmul_rate.py MODEL TOKENS SCORED PRECISION OUTPUT_FILE`.

For every linear layer, the three products of a training step (output, gradient of the input, gradient of the weight)
are timed alone, at the number of tokens of one step (the head: of its scored tokens). The rate is the arithmetic of
one step's products over their time.
"""

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import describe_machine, matmul_rate, write_json
from notus.model.flops import dimensions

SECONDS_PER_PRODUCT = 0.4


def measure(model_folder: str, tokens: int, scored: int, precision: str) -> dict[str, object]:
    """What `vs_trl_report.Machine` holds; `tokens` and `scored`: rows of the operand in the body and in the head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    body = Counter(tuple(linear.weight.shape) for linear in linears)
    layers = [*((shape, tokens, count) for shape, count in body.items()), (tuple(head.weight.shape), scored, 1)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {
        "flops_per_second": matmul_rate(layers, device, dtype, SECONDS_PER_PRODUCT),
        "size": dataclasses.asdict(dimensions(model)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "description": describe_machine(),
    }


if __name__ == "__main__":
    folder, tokens, scored, precision, output = sys.argv[1:]
    write_json(Path(output), measure(folder, int(tokens), int(scored), precision))
