"""Trained weights out, as a Hugging Face folder; and any such folder, adapter or run back in, to generate."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from notus.model.adapter import ADAPTER_CONFIG, load_adapter, read_adapter_settings
from notus.model.load import INDEX, WEIGHTS, find_folder, resolve_model_folder, stored_tensors, weight_files
from notus.model.lora import inject_lora, lora_layers, merge_lora
from notus.model.publish import NewFolder, write_json, write_tensors, write_tokenizer
from notus.model.readback import check_loads, check_tensors, not_as_written
from notus.model.shards import gather
from notus.runtime.process import first_line


def export_model(
    causal_lm: PreTrainedModel,
    folder: str | Path,
    *,
    hf_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None = None,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face folder: weights in `dtype`, config, tokenizer, generation config. A collective.

    Rank 0 gathers the tensors of one file at a time (`max_shard_bytes` at most), so no rank ever holds the
    model. Tied tensors are stored once. What was written is read again, by each rank its own rows, and compared bit by
    bit; then a folder of an earlier export is replaced, whole. Without `generation_config`, that of `causal_lm` is
    written. FSDP modules must be resharded before.

    Raises:
        ValueError: `folder` holds something other than a model, the model has LoRA layers, or the files differ from it.
        OSError: the disk refuses; both on every rank.
    """
    if lora_layers(causal_lm):
        raise ValueError("the model has LoRA layers: export its adapter, or merge it into the base first")
    tensors = stored_tensors(causal_lm)
    _check_resharded(tensors)
    new = NewFolder(folder, markers={"config.json", ADAPTER_CONFIG})
    sizes = {name: _stored_bytes(tensor, dtype) for name, tensor in tensors.items()}
    files = _plan_files(sizes, max_shard_bytes)
    for file, names in files.items():
        full = gather({name: tensors[name] for name in names}, dtype)
        new.write(functools.partial(_write_file, name=file, tensors=full))
        del full  # or the next file's tensors would join these in memory
    if len(files) > 1:
        new.write(functools.partial(_write_index, files=files, total=sum(sizes.values())))
    new.write(functools.partial(_write_config, config=hf_config, causal_lm=causal_lm, dtype=dtype))
    generation = generation_config or causal_lm.generation_config
    if generation is not None:
        # save_pretrained refuses settings that published models have, such as temperature without sampling.
        new.write(lambda partial: generation.to_json_file(partial / "generation_config.json"))
    new.write(functools.partial(write_tokenizer, tokenizer))

    def check(partial: Path) -> None:
        if [path.name for path in weight_files(partial)] != sorted(files):
            raise not_as_written(partial / INDEX, "weight_map")
        for file, names in files.items():
            check_tensors(partial / file, {name: tensors[name] for name in names}, dtype)
        check_loads(partial, tokenizer, hf_config)

    new.publish(check)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """How a model folder says to generate, with all its end-of-sequence ids; None where it does not say."""
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder)


def _check_resharded(tensors: dict[str, Tensor]) -> None:
    kinds = {isinstance(tensor, DTensor) for tensor in tensors.values() if isinstance(tensor, nn.Parameter)}
    assert len(kinds) == 1, "some parameters are gathered in the dtype of the computation: reshard first"


def _stored_bytes(tensor: Tensor, dtype: torch.dtype) -> int:
    return tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize


def _plan_files(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> tensor names, in order; a file holds at most `limit` bytes, or one larger tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _write_file(partial: Path, *, name: str, tensors: dict[str, Tensor]) -> None:
    write_tensors(partial / name, tensors)


def _write_index(partial: Path, *, files: dict[str, list[str]], total: int) -> None:
    weight_map = {name: file for file, names in files.items() for name in names}
    write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_config(partial: Path, *, config: PreTrainedConfig, causal_lm: PreTrainedModel, dtype: torch.dtype) -> None:
    config = copy.deepcopy(config)
    config.dtype = dtype
    # FSDP puts a class of its own in front of a module that it manages.
    classes = type(causal_lm).__mro__
    config.architectures = [next(base.__name__ for base in classes if not issubclass(base, FSDPModule))]
    config.save_pretrained(partial)


def load_causal_lm(
    model: str | Path, *, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An ordinary transformers model in evaluation mode, and its tokenizer.

    `model` is a model folder, a PEFT adapter folder (merged into its base here), a run's folder (its `model/`
    is taken), or a hub id. Raises ValueError, naming the folder, if it is none of them or the weights misfit.
    """
    folder = find_folder(model)
    if not _is_model(folder) and _is_model(folder / "model"):
        folder = folder / "model"
    if not _is_model(folder):
        raise ValueError(f"{folder}: no model, no adapter, and no run that has ended: it has no config.json")
    load = _load_merged if (folder / ADAPTER_CONFIG).is_file() else _load_full
    causal_lm = load(folder, dtype, trust_remote_code)
    torch.nn.Module.to(causal_lm, device)
    return causal_lm.eval(), load_tokenizer(folder, trust_remote_code)


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def _load_full(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    weight_files(folder)  # refuses what is no safetensors, and an index that leads out of the folder
    disable_progress_bar()  # transformers shows one per model, of file handles: over before it can be read
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot be loaded as a causal language model ({error})") from error
    causal_lm, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:  # transformers makes up values for these, with a warning
        raise ValueError(f"{folder}: the weights lack {absent[0]}; do they belong to this config.json?")
    return causal_lm


def _load_merged(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    settings = read_adapter_settings(folder)
    base = resolve_model_folder(settings["base_model_name_or_path"])
    causal_lm = _load_full(base, dtype, trust_remote_code)
    inject_lora(
        causal_lm,
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings["lora_dropout"],
        target_modules=settings["target_modules"],
        rslora=settings["use_rslora"],
    )
    load_adapter(causal_lm, folder)
    merge_lora(causal_lm)
    return causal_lm


def load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises ValueError, naming the folder, if there is none that loads."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise errors of every kind for damaged files
        reason = first_line(error)
        raise ValueError(
            f"{folder}: no tokenizer can be loaded from it ({reason}); copy the model's tokenizer files there"
        ) from error
