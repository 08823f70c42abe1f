"""`python -m notus export`: a run's model for others, as a Hugging Face folder or a PEFT adapter.

A finished run gives its final model, an unfinished one that of its newest checkpoint. All happens on the CPU,
in one process.
"""

import argparse
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

Settings = dict[str, dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder (training.output_dir)")
    parser.add_argument("out", metavar="OUT", help="the folder to write: new, or empty")
    parser.add_argument("--merge", action="store_true", help="merge a LoRA run's adapter into its base model")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights (default: the run's precision)")
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="most bytes of a weights file, say 500MB (default: 5GB)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def run(args: argparse.Namespace) -> int:
    """Export as `args` say, return 0. Raises ValueError or OSError with a message for the user."""
    from notus.evaluation.models import is_run, read_run_settings
    from notus.training.distributed import process_group
    from notus.training.folder import CONFIG_FILE, MODEL

    run_folder, out = Path(args.run_folder), Path(args.out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("export works in one process: leave torchrun out")
    if not is_run(run_folder):
        raise ValueError(f"{run_folder}: no run's folder, it has no {CONFIG_FILE}; name a training.output_dir")
    settings = read_run_settings(run_folder)
    adapter = bool(settings.get("lora", {}).get("rank"))
    _check(args, adapter, final=run_folder / MODEL)
    with process_group():
        if (run_folder / MODEL).is_dir() and adapter and not args.merge:
            _copy(run_folder / MODEL, out)
        else:
            _write(args, settings, *_load(args, settings, run_folder))
    print(f"wrote {out}")
    return 0


def _check(args: argparse.Namespace, adapter: bool, final: Path) -> None:
    out = Path(args.out)
    if args.merge and not adapter:
        raise ValueError(f"{args.run_folder}: a full fine-tuning run has nothing to merge; leave --merge out")
    if adapter and not args.merge and (args.dtype or args.max_shard_size):
        raise ValueError(
            "--dtype and --max-shard-size have no effect on an adapter, which is one fp32 file: add --merge, "
            "or leave them out"
        )
    if out.resolve() == final.resolve():
        raise ValueError(f"{out}: is where the run itself puts its final model; name another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; name a new folder, or remove it first")


def _copy(source: Path, out: Path) -> None:
    """A finished adapter is already in PEFT's layout."""
    from notus.model.publish import NewFolder

    new = NewFolder(out, markers=set())
    new.write(lambda partial: shutil.copytree(source, partial, dirs_exist_ok=True))
    new.publish()


def _load(
    args: argparse.Namespace, settings: Settings, run_folder: Path
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The run's final model, its adapter merged; or the model of its newest checkpoint."""
    from notus.evaluation.unfinished import load_unfinished
    from notus.model.export import load_causal_lm
    from notus.training.folder import MODEL

    final, trust = run_folder / MODEL, args.trust_remote_code
    if final.is_dir():
        return load_causal_lm(final, dtype=_dtype(args, settings), device="cpu", trust_remote_code=trust)
    causal_lm, tokenizer, checkpoint = load_unfinished(run_folder, settings, trust_remote_code=trust)
    print(f"the run has not finished: exporting {checkpoint}", flush=True)
    return causal_lm, tokenizer


def _write(
    args: argparse.Namespace,
    settings: Settings,
    causal_lm: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    from notus.evaluation.unfinished import DEFAULT_SHARD, write_model

    write_model(
        causal_lm,
        tokenizer,
        Path(args.out),
        base=settings["model"]["name_or_path"],
        dtype=_dtype(args, settings),
        merge=args.merge,
        max_shard_bytes=args.max_shard_size or DEFAULT_SHARD,
    )


def _dtype(args: argparse.Namespace, settings: Settings) -> Any:
    from notus.training.parallel import COMPUTE_DTYPES

    return COMPUTE_DTYPES[args.dtype or settings["training"]["precision"]]


def _size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "123456", for argparse."""
    match = re.fullmatch(r"(\d+)([KMG]B)?", text.upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2] or ""]
