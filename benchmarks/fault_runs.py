"""The small runs that are disturbed, and what an undisturbed one leaves: the measure for all others."""

import dataclasses
import hashlib
import json
import random
import time
from pathlib import Path
from typing import Any

import yaml

from fault_ranks import Command, call, launch

VOCABULARY = 96
STEPS, SAVE_EVERY, EVAL_EVERY, LOG_EVERY = 12, 3, 4, 2
PART_SIZE = 16  # rows of the reference pass between two of its files
TIMINGS = ("pairs_per_second", "examples_per_second")
_ALL_CHECKPOINTS = ("--training.save_every=1", "--training.keep_checkpoints=null")
_TRAINING = {
    "batch_size": 8, "max_steps": STEPS, "epochs": 3, "tokens_per_row": 320, "precision": "fp32",
    "learning_rate": 1e-2, "optimizer": "adamw", "warmup_ratio": 0.2, "activation_checkpointing": "none",
    "save_every": SAVE_EVERY, "eval_every": EVAL_EVERY, "log_every": LOG_EVERY, "keep_checkpoints": 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of run: its entry, and what its config has beyond the common settings."""

    name: str
    entry: str
    options: dict[str, dict[str, Any]]

    def command(self, scratch: Path, folder: Path, *more: str, ranks: int = 2, torchrun: bool = False) -> Command:
        """The command for a run in `folder`, whose tokenised data lie beside it."""
        where = (f"--training.output_dir={folder}", f"--data.cache_dir={folder}-rows")
        config = str(scratch / f"{self.name}.yaml")
        return Command(self.entry, (config, *where, *more), ranks, torchrun)


_LORA = {"rank": 4, "dropout": 0.2, "target_modules": "all-linear"}
CASES = (
    Case("dpo-full", "train_dpo.py", {}),
    Case("dpo-lora", "train_dpo.py", {"lora": _LORA}),
    Case("sft-full", "train_sft.py", {}),
)


def make_inputs(scratch: Path, seed: int) -> None:
    """Write model, data and each case's config to `scratch`."""
    generator = random.Random(seed)
    for name, count in (("train", 40), ("eval", 24)):
        rows = [{key: _words(generator) for key in ("prompt", "chosen", "rejected")} for _ in range(count)]
        _write_lines(scratch / f"{name}-dpo.jsonl", rows)
        _write_lines(scratch / f"{name}-sft.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows])
    for case in CASES:
        task = case.name[:3]
        tree = {
            "model": {"name_or_path": str(scratch / "model")},
            "data": {name: str(scratch / f"{name}-{task}.jsonl") for name in ("train", "eval")} | {"max_length": 120},
            "training": {**_TRAINING, "output_dir": str(scratch / "run"), "seed": seed},
            "tracking": {"samples": 0},
            **case.options,
        }
        (scratch / f"{case.name}.yaml").write_text(yaml.safe_dump(tree))
    call(lambda: make_model(scratch / "model", seed), scratch / "model.log")


def make_model(folder: Path, seed: int) -> None:
    """Write a tiny random Mistral and a tokenizer with one token per word `w0`, `w1`, ..."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, sliding_window=None, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


def _words(generator: random.Random) -> str:
    return " " + " ".join(f"w{generator.randrange(VOCABULARY - 3)}" for _ in range(generator.randint(2, 24)))


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small_parts(_rank: int) -> None:
    """Cut the reference pass into several files, as that of a large dataset is; for a forked rank."""
    from notus.training import reference

    reference.PART_SIZE = PART_SIZE


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What a run leaves that nobody disturbed; digests are of contents.

    Attributes:
        seconds: from its start to its end.
        model: digest of each file of the final model.
        checkpoints: per checkpoint's name, the digest of each of its tensor files.
        metrics: the lines of metrics.jsonl, without timings.
        caches: digest of each reference cache.
    """

    seconds: float
    model: dict[str, str]
    checkpoints: dict[str, dict[str, str]]
    metrics: list[dict[str, Any]]
    caches: dict[str, str]


def undisturbed(case: Case, scratch: Path, folder: Path, torchrun: bool) -> Undisturbed:
    """Run to the end as the trials do, and again with every checkpoint; raises RuntimeError if that fails.

    When a run saves does not change what it learns, so both must end alike.
    """
    every = folder.with_name(f"{folder.name}-every")
    seconds = _run(case.command(scratch, folder, torchrun=torchrun), folder)
    _run(case.command(scratch, every, *_ALL_CHECKPOINTS, torchrun=torchrun), every)
    if digests(folder / "model") != digests(every / "model") or metrics(folder) != metrics(every):
        raise RuntimeError(f"{case.name}: two undisturbed runs differ, so nothing can be compared")
    checkpoints = {path.name: tensor_digests(path) for path in (every / "checkpoints").glob("step-*")}
    caches = tensor_digests(folder / "reference")
    return Undisturbed(seconds, digests(folder / "model"), checkpoints, metrics(folder), caches)


def _run(command: Command, folder: Path) -> float:
    run = launch(command, folder.with_suffix(".log"), small_parts)
    if not run.wait(300) or any(run.codes()):
        raise RuntimeError(f"an undisturbed run ended with {run.codes()}:\n{run.text()[-3000:]}")
    return time.monotonic() - run.began


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl, without timings."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {key: value for key, value in record.items() if key not in TIMINGS and not key.startswith("system/")}
        for record in records
    ]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def tensor_digests(folder: Path) -> dict[str, str]:
    """Digest of every safetensors file right in a folder; other files tell the time."""
    return {path.name: tensor_digest(path) for path in sorted(folder.glob("*.safetensors"))}


def tensor_digest(path: Path) -> str:
    """SHA-256 of a safetensors file but for the order of its metadata, which the format leaves to chance."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True)
    except ValueError:
        return f"not whole: {digest(path)}"
    return hashlib.sha256(header.encode() + content[8 + size :]).hexdigest()
