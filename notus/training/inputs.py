"""Rows and models in memory -> files in the run's folder, so that such a run is a run like any other.

OUTPUT_DIR/inputs/train.jsonl  eval.jsonl (or .parquet, of a `datasets.Dataset`)  model/  inputs.json

`inputs.json` has a digest of each, once all are written. A run that has begun is resumed with the same inputs only.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from notus.data.sources import Source, open_rows
from notus.runtime.files import disk_error, replacing, sync, write_text
from notus.training.run_folder import INPUTS, INPUTS_DIGESTS, has_begun

if TYPE_CHECKING:
    import datasets

# Of a model's config: what is no part of what it computes, and changes as it is saved, loaded or trained.
_VOLATILE = frozenset({"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"})


class Inputs:
    """What a program hands over in memory, and where it goes."""

    def __init__(self, output_dir: Path) -> None:
        """Collect inputs of the run in `output_dir`; nothing is written before `write`."""
        self._run = output_dir
        self.folder = output_dir.absolute() / INPUTS
        self._given: dict[str, _Given] = {}

    def add_rows(self, name: str, rows: "datasets.Dataset | Sequence[Mapping[str, Any]]") -> Path:
        """Add the rows of `train` or `eval`; returns the file that will hold them.

        Raises:
            ValueError: naming the row, for what is no list of mappings or has values that JSON does not have.
        """
        source = open_rows(rows, name)
        path = self.folder / f"{name}{'.jsonl' if source.as_json else '.parquet'}"
        self._given[name] = _Given(path, source.digest, functools.partial(_write_rows, source))
        return path

    def add_model(self, causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Path:
        """Add a model with its tokenizer; returns the folder that will hold them.

        Raises:
            ValueError: it is a kind of model that cannot be saved whole, or its tokenizer is not found.
        """
        check_model(causal_lm)
        tokenizer = tokenizer or tokenizer_of(causal_lm)
        path = self.folder / "model"
        write = functools.partial(_write_model, causal_lm, tokenizer)
        self._given["model"] = _Given(path, _model_digest(causal_lm, tokenizer), write)
        return path

    @property
    def paths(self) -> list[Path]:
        """The files and folders that `write` fills."""
        return [given.path for given in self._given.values()]

    @contextlib.contextmanager
    def naming_rows(self) -> Iterator[None]:
        """Have errors within the block name rows as the caller knows them, as "train, row 21", not the written files.

        Row 21 of a list is line 21 of its file.
        """
        try:
            yield
        except ValueError as error:
            error.args = tuple(self._renamed(each) if isinstance(each, str) else each for each in error.args)
            raise

    def _renamed(self, message: str) -> str:
        for name, given in self._given.items():
            if name != "model":
                message = re.sub(rf"{re.escape(str(given.path))}(?:, (?:line|row) (\d+))?", _place_in(name), message)
        return message

    def write(self) -> None:
        """Write what is not there yet; for the one process that holds the run's folder.

        Raises:
            ValueError: the run has begun with other inputs.
            OSError: the disk fails.
        """
        known = self._known()
        changed = [name for name, given in self._given.items() if known.get(name, given.digest) != given.digest]
        if changed and has_begun(self._run):
            raise ValueError(
                f"{self._run} holds a run that began with another {' and another '.join(changed)}: pass the same to "
                "resume it, choose another training.output_dir, or set training.resume to 'never' to start over"
            )
        new = [each for name, each in self._given.items() if known.get(name) != each.digest or not each.path.exists()]
        if not new:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.folder, error) from error
        write_text(self.folder / INPUTS_DIGESTS, "{}\n")  # marks the folder as a run's, and vouches for nothing in it
        for given in new:
            given.write(given.path)
        digests = {name: given.digest for name, given in self._given.items()}
        write_text(self.folder / INPUTS_DIGESTS, json.dumps(digests, indent=1) + "\n")

    def _known(self) -> dict[str, str]:
        """The digests of what was written. Without them all is written again, and checked against the checkpoint."""
        try:
            found = json.loads((self.folder / INPUTS_DIGESTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


@dataclasses.dataclass(frozen=True)
class _Given:
    """One input: where it goes, the digest of its content, and what writes it."""

    path: Path
    digest: str
    write: Callable[[Path], None]


def _place_in(name: str) -> Callable[[re.Match[str]], str]:
    return lambda found: name if found[1] is None else f"{name}, row {found[1]}"


# ---- rows ----


def _write_rows(source: Source, path: Path) -> None:
    """Write the rows as JSON Lines, or as Parquet where they are Arrow data with types of their own."""
    with replacing(path) as temporary:
        if not source.as_json:
            _write_parquet(source, temporary)
            return
        with temporary.open("wb") as file:
            for batch in source.rows.iter(1000):
                (column,) = batch.columns
                file.writelines(row.as_py() + b"\n" for row in column)


def _write_parquet(source: Source, path: Path) -> None:
    writer = None
    try:
        for table in source.rows.iter(1000):
            table = table.replace_schema_metadata(None)  # which would have images and audio decoded
            writer = writer or pa.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


# ---- models ----


def check_model(causal_lm: object) -> None:
    """Raise ValueError for what cannot be saved as a model folder of its own."""
    kind = type(causal_lm).__name__
    if hasattr(causal_lm, "peft_config") and hasattr(causal_lm, "merge_and_unload"):
        raise ValueError(
            f"model: is a {kind}, a model with PEFT adapters. Pass model.merge_and_unload(), or save the adapter and "
            "name its folder as model.adapter"
        )
    if not isinstance(causal_lm, PreTrainedModel):
        hint = ": pass the model that torch.compile got" if hasattr(causal_lm, "_orig_mod") else ""
        raise ValueError(f"model: is a {kind}; give a folder, a hub id or a transformers model{hint}")
    if getattr(causal_lm, "_hf_peft_config_loaded", False):
        raise ValueError("model: has PEFT adapters; save them, and name their folder as model.adapter")
    if getattr(causal_lm, "hf_quantizer", None) is not None:
        raise ValueError("model: is quantized; pass its folder or hub id, and set model.quantization for QLoRA")
    if any(parameter.is_meta for parameter in causal_lm.parameters()):
        raise ValueError("model: its weights are not all in memory (offloaded, or meta tensors); pass its folder")


def tokenizer_of(causal_lm: nn.Module, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the folder or hub id that a model was loaded from. Raises ValueError if there is none."""
    name = getattr(causal_lm, "name_or_path", None)
    if not name:
        raise ValueError("tokenizer: is required with this model, which does not say where it was loaded from")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub's client raise errors of every kind
        raise ValueError(f"tokenizer: is required, none can be loaded from {name}, where the model is from") from error


def _model_digest(causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of the weights, the config and the tokenizer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(causal_lm.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for block in flat.split(2**26):
            digest.update(block.cpu().numpy().data)
    config = {key: value for key, value in causal_lm.config.to_dict().items() if key not in _VOLATILE}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    generation = causal_lm.generation_config
    digest.update(b"" if generation is None else generation.to_json_string().encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = repr(tokenizer) if backend is None else json.loads(backend.to_str())
    if isinstance(content, dict):
        content |= {"padding": None, "truncation": None}  # of its last call
    digest.update(json.dumps([content, tokenizer.chat_template, tokenizer.special_tokens_map], default=str).encode())
    return digest.hexdigest()


def _write_model(causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save both in Hugging Face layout; the folder is there whole or not at all, and the caller's objects unchanged."""
    partial = path.with_name(f".{path.name}.partial")
    for leftover in (partial, path):
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        with _config_unchanged(causal_lm):
            causal_lm.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            sync(file)
        os.rename(partial, path)
    except OSError as error:
        raise disk_error(path, error) from error


@contextlib.contextmanager
def _config_unchanged(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Undo what `save_pretrained` writes into the config of a model."""
    before = copy.deepcopy(vars(causal_lm.config))
    try:
        yield
    finally:
        vars(causal_lm.config).clear()
        vars(causal_lm.config).update(before)
