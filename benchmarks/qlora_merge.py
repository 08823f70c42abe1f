"""What a QLoRA run's model loses when its adapter is put on the base as it was, on the pairs that the run held out.

    python benchmarks/qlora_merge.py RUN [--output FILE.json]

Three models are scored, token by token, in the run's precision: the trained one, whose base is in 4 bits; the adapter
merged into the original base, rounded to bf16, as PEFT and `notus export --merge` do it; and the adapter merged into
the dequantised base, rounded to bf16. Rewards are β·(policy − reference), of each model against its own base.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import common  # noqa: F401  (the project's path)
from notus.config import Config, load_config
from notus.data.dataset import TokenizedDataset
from notus.model.export import load_causal_lm
from notus.model.load import load_weights, resolve_model_folder
from notus.model.lora import cast_frozen, inject_lora, lora_layers, merge_lora
from notus.model.peft_format import load_adapter
from notus.model.policy import Policy
from notus.model.quantization import QuantizedLinear, quantize, quantized_layers
from notus.runtime.distributed import process_group
from notus.training.parallelize import build_policy, read_model_config
from notus.training.run_data import load_held_out
from notus.training.scoring import score_tokens


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, help="the folder of a finished run with model.quantization and held-out pairs"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    config = load_config([str(args.run / "config.yaml")], "dpo")
    with process_group() as device, tempfile.TemporaryDirectory() as temporary:
        found = measure(config, args.run / "model", Path(temporary), device)
    print(table(found))
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(config: Config, adapter: Path, temporary: Path, device: torch.device) -> dict[str, dict[str, float]]:
    """Figures of each model, by its name."""
    base = resolve_model_folder(config.model.name_or_path)
    rows = load_held_out(config.data, AutoTokenizer.from_pretrained(adapter), task="dpo", seed=config.training.seed)
    folders = {"original": temporary / "original", "dequantised": temporary / "dequantised"}
    merged, _ = load_causal_lm(adapter, dtype=torch.bfloat16, device="cpu")
    merged.save_pretrained(folders["original"])
    _merged_dequantised(config, base, adapter).save_pretrained(folders["dequantised"])

    def scored(folder: Path, **options: Any) -> tuple[Policy, Tensor]:
        policy = build_policy(
            folder,
            read_model_config(folder),
            device=device,
            precision=config.training.precision,
            trainable=False,
            **options,
        )
        return policy, _score(policy, rows, config, device)

    trained, in_4_bits = scored(base, lora=config.lora, quantization=config.model.quantization)
    load_adapter(trained.causal_lm, adapter)
    expected = _score(trained, rows, config, device)
    references = {"in 4 bits": in_4_bits, "original": scored(base)[1]}
    models = {
        "trained: base in 4 bits": (expected, "in 4 bits"),
        "merged into the original base": (scored(folders["original"])[1], "original"),
        "merged into the dequantised base": (scored(folders["dequantised"])[1], "in 4 bits"),
        "no adapter, base in 4 bits": (in_4_bits, "in 4 bits"),
        "no adapter, original base": (references["original"], "original"),
    }
    return {
        name: _figures(logps, references[reference], expected, rows, config.dpo.beta)
        for name, (logps, reference) in models.items()
    }


def _score(policy: Policy, rows: TokenizedDataset, config: Config, device: torch.device) -> Tensor:
    return score_tokens(policy.eval(), rows, tokens_per_row=config.training.tokens_per_row, device=device).double()


def _merged_dequantised(config: Config, base: Path, adapter: Path) -> Any:
    """The adapter merged in fp32 into what 4 bits keep of the base, rounded to bf16 once."""
    dtype = torch.float32
    causal_lm = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    settings, kept = config.lora, {}
    inject_lora(
        causal_lm,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        target_modules=settings.target_modules,
        rslora=settings.rslora,
    )
    kinds = {name: type(module) for name, module in causal_lm.named_modules()}
    cast_frozen(causal_lm, dtype)
    quantize(causal_lm, dtype)
    load_weights(causal_lm, base)
    load_adapter(causal_lm, adapter)
    for name, layer in quantized_layers(causal_lm).items():
        kept[name] = layer.dequantized().contiguous()
    for name, weight in kept.items():
        layer = causal_lm.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        layer.__class__ = kinds[name]
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert lora_layers(causal_lm)
    merge_lora(causal_lm)
    return causal_lm.bfloat16()


def _figures(
    logps: Tensor, reference: Tensor, expected: Tensor, rows: TokenizedDataset, beta: float
) -> dict[str, float]:
    lengths = torch.from_numpy(rows.loss_tokens)
    sums = torch.segment_reduce(logps - reference, "sum", lengths=lengths.flatten()).view(-1, 2)
    margins = beta * (sums[:, 0] - sums[:, 1])
    difference = (logps - expected).abs()
    return {
        "pairs": len(margins),
        "tokens": len(logps),
        "nats_per_token": -logps.mean().item(),
        "mean_difference": difference.mean().item(),
        "largest_difference": difference.max().item(),
        "reward_margin": margins.mean().item(),
        "reward_accuracy": ((margins > 0).double() + (margins == 0).double() / 2).mean().item(),
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """The figures in Markdown."""
    first = next(iter(found.values()))
    lines = [
        f"{first['pairs']:.0f} held-out pairs, {first['tokens']:.0f} tokens",
        "",
        "| model | nats a token | off the trained model's, mean | largest | reward margin | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['nats_per_token']:.4f} | {row['mean_difference']:.4f} | {row['largest_difference']:.2f} "
            f"| {row['reward_margin']:+.3f} | {row['reward_accuracy']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
