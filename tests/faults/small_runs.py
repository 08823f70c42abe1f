"""The small runs that are disturbed, and what an undisturbed one leaves: the measure for all others."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import yaml
from launching import Command, launch, small_parts
from runs import settings, write_messages, write_pairs
from toys import toy_model_folder

STEPS, SAVE_EVERY, EVAL_EVERY = 12, 3, 4
_ALL_CHECKPOINTS = ("--training.save_every=1", "--training.keep_checkpoints=null")
_TRAINING = {
    "batch_size": 8, "max_steps": STEPS, "epochs": 3, "learning_rate": 1e-2, "optimizer": "adamw", "warmup_ratio": 0.2,
    "save_every": SAVE_EVERY, "eval_every": EVAL_EVERY, "log_every": 2, "keep_checkpoints": 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of run: its entry, and what its config has beyond the common settings."""

    name: str
    entry: str
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)

    def command(self, scratch: Path, folder: Path, *more: str, ranks: int = 2, torchrun: bool = False) -> Command:
        """The command for a run in `folder`, whose tokenised data lie beside it."""
        where = (f"--training.output_dir={folder}", f"--data.cache_dir={folder}-rows")
        return Command(self.entry, (str(scratch / f"{self.name}.yaml"), *where, *more), ranks, torchrun)


FULL = Case("dpo-full", "train_dpo.py")
LORA = Case("dpo-lora", "train_dpo.py", {"rank": 4, "dropout": 0.2, "target_modules": "all-linear"})
SFT = Case("sft-full", "train_sft.py")
CASES = (FULL, LORA, SFT)


def make_inputs(scratch: Path) -> None:
    """Write the model, the data and each case's config to `scratch`."""
    toy_model_folder(scratch / "model")
    for name, count, seed in (("train", 40, 0), ("eval", 24, 1)):
        write_pairs(scratch / f"{name}-dpo.jsonl", count, seed=seed)
        write_messages(scratch / f"{name}-sft.jsonl", count, seed=seed)
    for case in CASES:
        task = case.name[:3]
        tree = settings(
            scratch / "run",
            scratch / "model",
            scratch / f"train-{task}.jsonl",
            data__eval=str(scratch / f"eval-{task}.jsonl"),
            **{f"lora__{key}": value for key, value in case.lora.items()},
            **{f"training__{key}": value for key, value in _TRAINING.items()},
        )
        (scratch / f"{case.name}.yaml").write_text(yaml.safe_dump(tree))


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


def undisturbed(case: Case, scratch: Path, torchrun: bool = False) -> Undisturbed:
    """Run to the end as the trials do, and again with every checkpoint.

    When a run saves does not change what it learns, so both must end alike.

    Raises:
        RuntimeError: a run failed, or the two differ.
    """
    folder = scratch / f"undisturbed-{case.name}{'-torchrun' * torchrun}"
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
    """The whole lines of metrics.jsonl, without timings."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {key: value for key, value in record.items() if not key.endswith("per_second") and "system/" not in key}
        for record in records
    ]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tensor_digests(folder: Path) -> dict[str, str]:
    """Digest of every safetensors file right in a folder; the other files hold times."""
    return {path.name: _tensor_digest(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))}


def _tensor_digest(content: bytes) -> str:
    """SHA-256 of a safetensors file but for the order of its metadata, which the format leaves to chance."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True)
    except ValueError:
        return f"not whole: {hashlib.sha256(content).hexdigest()}"
    return hashlib.sha256(header.encode() + content[8 + size :]).hexdigest()
