"""From a Hugging Face folder to parameters: find it, give a meta model storage, read each rank's own rows.

Reading is strict: every tensor of the model is in the files, and every tensor of the files in the model.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightTransform

from notus.model.buffers import initial_buffers, non_persistent, rebuild_buffers
from notus.model.conversion import Conversion, LoadPlan, ignorable, plan_loading
from notus.model.lora import LoRALinear
from notus.model.quantization import RowsToQuantize, rows_to_quantize
from notus.model.sharded_tensors import fill_rows, local, local_rows
from notus.model.structure import text_config
from notus.runtime.files import check_regular
from notus.runtime.process import first_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]
# Other formats of the same weights. Of the subfolders only named chat templates (additional_chat_templates/) are taken.
HUB_IGNORED = [*(f"*/{pattern}" for pattern in HUB_FILES if pattern != "*.jinja"), "consolidated*"]
DIGEST_BLOCK = 64 * 2**20

# Names of dtypes in safetensors files. Parameters are read from floating point alone; a model's buffers may be others.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED_DTYPES = FLOATS | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Causal masks, which older versions of transformers stored with GPT-2, GPT-Neo, GPT-J, GPT-NeoX and CodeGen.
MASKS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$")
QUANTIZED = re.compile(r"F4.*|F6_.*|F8_.*|E8.*|[IU][48]|I32")

# How transformers loads the weights of a quantization method as plain ones.
DEQUANTIZE = {
    "mxfp4": "AutoModelForCausalLM.from_pretrained(..., quantization_config=Mxfp4Config(dequantize=True))",
    "fp8": "AutoModelForCausalLM.from_pretrained(..., quantization_config=FineGrainedFP8Config(dequantize=True))",
    "bitsandbytes": "AutoModelForCausalLM.from_pretrained(...).dequantize()",
}

# Settings of config.json that leave a packed, causal forward as it is; any other one is part of the digest.
WITHOUT_EFFECT = re.compile(
    r"transformers_version|_.*|architectures|auto_map|(torch_)?dtype|use_cache|(bos|eos|pad)_token_id|initializer_range"
    r"|output_attentions|output_hidden_states|return_dict|id2label|label2id|problem_type|chunk_size_feed_forward"
    r"|.*dropout.*|.*_pdrop|pretraining_tp"
)


def resolve_model_folder(name_or_path: str | Path) -> Path:
    """The folder of a model in Hugging Face layout: a local one, or a hub id's, downloaded if not cached.

    `HF_HUB_OFFLINE=1` forbids the download. Raises ValueError if there is no such folder or id, or no model.
    """
    folder = find_folder(name_or_path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there; name a model's folder in Hugging Face layout")
    return folder


def find_folder(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """A local folder or a hub id's local copy, whatever it holds; `weights=False` downloads all but the weights.

    Raises ValueError if there is neither.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    try:
        ignored = HUB_IGNORED if weights else [*HUB_IGNORED, "*.safetensors"]
        copy = snapshot_download(str(name_or_path), allow_patterns=HUB_FILES, ignore_patterns=ignored)
        return Path(copy)
    except HFValidationError as error:
        raise ValueError(f"{name_or_path}: no such folder, nor can it be a hub id; check the path") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise ValueError(
            f"{name_or_path}: no such folder or hub id; check the name, and the access to the hub ({reason})"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: a single one, or those that the index names.

    Raises ValueError, naming the file and the remedy, if there are none, or one of them is missing.
    """
    if not (folder / INDEX).is_file():
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        old = sorted(path.name for path in folder.glob("*.bin"))
        remedy = f"save {old[0]} again as safetensors" if old else "name a folder that has one"
        raise ValueError(f"{folder}: no {WEIGHTS} and no {INDEX}; {remedy}")
    index = read_json(folder / INDEX)
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{folder / INDEX}: no weight_map; download the file again")
    names = index["weight_map"].values()
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(
                f"{folder / INDEX}: {name!r} is no safetensors file of this folder; take the model from its source"
            )
    paths = [folder / name for name in sorted(set(names))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: missing, though {INDEX} names it; download it again")
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError, naming the file, if it holds none."""
    try:
        content = json.loads(check_regular(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Give a model on the meta device storage on `device`, and what no file holds its values.

    Pass the root that FSDP manages, so that it learns of its new parameters. Tied parameters stay tied; all
    are empty, like persistent buffers, until they are loaded. Raises ValueError for a buffer without a rule.
    """
    ties = _slots_by_parameter(model)
    model.to_empty(device=device)
    for (owner, name), *others in ties:
        for other, other_name in others:
            setattr(other, other_name, getattr(owner, name))
    rebuild_buffers(model, device)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"still on the meta device: {left}"


def _slots_by_parameter(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """For each parameter, all (module, attribute) places that hold it."""
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            slots.setdefault(id(parameter), []).append((module, name))
    return list(slots.values())


Overlay = Mapping[int, Callable[[Any], Any]]  # id of a parameter -> source of its rows in the files -> the one to use


class _Overlaid:
    """An open safetensors file of which one tensor is changed."""

    def __init__(self, handle: Any, change: Callable[[Any], Any]) -> None:
        self._handle, self._change = handle, change

    def get_slice(self, key: str) -> Any:
        return self._change(self._handle.get_slice(key))


def _laid_over(found: "Found", targets: Mapping[str, Tensor], overlay: Overlay, folder: Path) -> "Found":
    """The files of the tensors that an overlay changes. Raises ValueError if one of them is not stored as it is."""
    keys = {id(target): key for key, target in targets.items()}
    left = len(overlay.keys() - keys.keys())
    if left:
        raise ValueError(
            f"{folder}: {left} of the weights that an adapter or new tokens change are stored in another arrangement: "
            "save the model again with transformers' save_pretrained, merged with its adapter"
        )
    return {
        keys[number]: (found[keys[number]][0], _Overlaid(found[keys[number]][1], change))
        for number, change in overlay.items()
    }


@torch.no_grad()
def load_weights(model: PreTrainedModel, folder: str | Path, *, overlay: Overlay | None = None) -> None:
    """Fill `model` from the safetensors files of `folder`, cast to each parameter's dtype.

    The files may have the published names of a model whose tensors transformers names or arranges otherwise: see
    `notus.model.conversion`. Parameters are plain, or DTensors sharded on dim 0 or replicated. A rank reads the rows
    of its own shards and no others, and quantises those of layers in 4 bits; of a tensor that has to be converted, it
    holds all for a moment, one conversion at a time. LoRA parameters are left alone. Every rank finds every mistake but
    a weight that cannot be quantised before a value is written.
    `overlay`: what parameters get in place of what the files hold, made from that as it is read, before it is rounded.

    Raises:
        ValueError: missing or unexpected keys, wrong shapes, a dtype that cannot be trained from, an unreadable file;
            naming place and remedy.
    """
    folder = Path(folder)
    _check_unquantized(folder, model.config)
    packed = rows_to_quantize(model)
    with open_tensors(weight_files(folder)) as found:
        match = match_tensors(model, found, folder)
        if overlay:
            found |= _laid_over(found, match.direct, overlay, folder)
        direct = {key: packed.get(id(target), target) for key, target in match.direct.items()}
        for key, target in direct.items():
            check_shape(found[key], key, target)
        computed = initial_buffers(model, match.computed) if match.computed else {}
        for key, target in direct.items():
            fill_rows(target, found[key][1].get_slice(key))
        for conversion in match.conversions:
            for name, rows in converted_rows(conversion, model, match.targets, found).items():
                local(match.targets[name]).copy_(rows)
        for name, tensor in computed.items():
            fill_rows(match.targets[name], tensor)
    # An export then writes the names that were read, as save_pretrained does.
    vars(model)["_weight_conversions"] = match.transforms


Found = dict[str, tuple[Path, Any]]  # tensor name -> its file, and the open handle


@contextlib.contextmanager
def open_tensors(paths: Iterable[Path]) -> Iterator[Found]:
    """Tensor name -> its file and a handle, for all safetensors files of a model."""
    with contextlib.ExitStack() as stack:
        handles = [(path, stack.enter_context(open_safetensors(path))) for path in paths]
        yield {key: (path, handle) for path, handle in handles for key in handle.keys()}  # noqa: SIM118


def open_safetensors(path: Path) -> Any:
    """A handle on a mapped safetensors file. Raises ValueError, naming the file, if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from error


def check_shape(source: tuple[Path, Any], key: str, target: Tensor | RowsToQuantize) -> None:
    """Raises ValueError, naming file and key, unless the tensor `key` has the full shape of `target`."""
    path, handle = source
    shape = list(handle.get_slice(key).get_shape())
    if shape != list(target.shape):
        raise ValueError(
            f"{path}: {key} has shape {shape}, the model needs {list(target.shape)}; "
            "do config and weights come from the same model?"
        )


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or persistent buffer, as a checkpoint has them: tied ones once, LoRA's not at all."""
    return {names[0]: tensor for names, tensor in _stored(model)}


def _stored(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Every tensor that a checkpoint holds, with all its names; first the one under which a tied one is saved."""
    adapters = {id(p) for m in model.modules() if isinstance(m, LoRALinear) for p in (m.lora_A, m.lora_B)}
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *_persistent_buffers(model)]:
        if id(tensor) not in adapters:
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    tied = getattr(model, "all_tied_weights_keys", {})
    return [(sorted(names, key=lambda name: name in tied), tensor) for names, tensor in found.values()]


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    skipped = set(_non_persistent_names(model))
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in skipped]


def _non_persistent_names(model: nn.Module) -> list[str]:
    modules = model.named_modules()
    return [f"{prefix}.{name}".lstrip(".") for prefix, module in modules for name in non_persistent(module)]


@dataclass
class Match:
    """What the files hold, matched with a model's tensors.

    Attributes:
        direct: key -> the tensor that it is, for keys that need no conversion.
        conversions: what has to be converted.
        targets: name in the model -> tensor.
        computed: names of buffers that transformers computes where the files lack them.
        transforms: transformers' rules that any key needed.
    """

    direct: dict[str, Tensor]
    conversions: list[Conversion]
    targets: dict[str, Tensor]
    computed: list[str]
    transforms: list[WeightTransform]


def match_tensors(model: PreTrainedModel, found: Found, folder: Path) -> Match:
    """Match the tensors of the files with those of the model; of a tied tensor, the first of its names is read.

    Raises:
        ValueError: missing or unexpected keys, or keys that cannot be converted.
    """
    stored = _stored(model)
    targets = {name: tensor for names, tensor in stored for name in names}
    plan = plan_loading(model, targets, found)
    skipped = ignorable(model, _non_persistent_names(model))
    left = [key for key, name in plan.unexpected.items() if not skipped(name) and not skipped(key)]
    unexpected = [key for key in left if not _is_mask(key, found)]
    _check_dtypes(plan, targets, found, unexpected)
    packed = rows_to_quantize(model)
    for each in plan.conversions:
        if id(targets.get(each.target)) in packed:
            raise ValueError(
                f"model.quantization: {each.target} is converted as it is read, which works unquantized alone: remove "
                "model.quantization"
            )
    made = {name for each in plan.conversions for name in _check_conversion(each, model, targets, found)}
    direct: dict[str, Tensor] = {}
    missing: list[str] = []
    computed: list[str] = []
    for names, tensor in stored:
        keys = [key for name in names for key in plan.direct.get(name, [])]
        if len(keys) > 1:
            _check_tied(keys, found)
        if keys:
            direct[keys[0]] = tensor
        elif not made & set(names):
            (computed if _is_computed(model, names[0], tensor) else missing).append(names[0])
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the weights are not those of {type(model).__name__}: {_listed('missing', missing)}"
            f"{_listed('unexpected', unexpected)}do config.json and the weights come from the same model?"
        )
    return Match(direct, plan.conversions, targets, computed, plan.transforms)


def _is_mask(key: str, found: Found) -> bool:
    """Whether a key that the model has no place for is a causal mask [1, 1, queries, keys], or the value that masks."""
    if MASKS.search(key) is None:
        return False
    shape = found[key][1].get_slice(key).get_shape()
    return len(shape) == 4 or (key.endswith("masked_bias") and shape in ([], [1]))


def check_weights(model: PreTrainedModel, folder: Path) -> None:
    """Check a folder's weights, if it has any, against a model on the meta device. Raises as `load_weights`."""
    if any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        _check_unquantized(folder, model.config)
        with open_tensors(weight_files(folder)) as found:
            match_tensors(model, found, folder)


def check_dtypes(model: PreTrainedModel, folder: Path) -> None:
    """Raises ValueError for a weight in a model's files that is no plain floating point; see `load_weights`."""
    with open_tensors(weight_files(folder)) as found:
        targets = {name: tensor for names, tensor in _stored(model) for name in names}
        _check_dtypes(plan_loading(model, targets, found), targets, found, [])


def _is_computed(model: PreTrainedModel, name: str, tensor: Tensor) -> bool:
    """Whether a tensor may be absent from the files by transformers' word: a buffer whose value a new model has."""
    allowed = [*(model._keys_to_ignore_on_load_missing or []), *map(re.escape, model._keys_to_ignore_on_save or [])]
    return not isinstance(tensor, nn.Parameter) and any(re.search(pattern, name) for pattern in allowed)


def _check_conversion(
    conversion: Conversion, model: PreTrainedModel, targets: dict[str, Tensor], found: Found
) -> list[str]:
    """Return what a conversion makes, by a trial without values. Raises ValueError if that is not what is needed."""
    path, keys = found[conversion.keys[0]][0], conversion.keys

    def empty(key: str) -> Tensor:
        return torch.empty(found[key][1].get_slice(key).get_shape(), device="meta")

    try:
        made = conversion.run(model, empty)
    except (ValueError, RuntimeError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: {_listed('cannot convert', keys)}to {conversion.target} ({first_line(error)}); do config and "
            "weights come from the same model?"
        ) from error
    for name, tensor in made.items():
        if name not in targets or list(tensor.shape) != list(targets[name].shape):
            needed = f"the model needs {list(targets[name].shape)}" if name in targets else "the model has none"
            raise ValueError(
                f"{path}: {len(keys)} tensors such as {keys[0]} make a {name} of shape {list(tensor.shape)}, {needed}; "
                "do config and weights come from the same model?"
            )
    return list(made)


@torch.no_grad()
def converted_rows(
    conversion: Conversion, model: PreTrainedModel, targets: dict[str, Tensor], found: Found
) -> dict[str, Tensor]:
    """Name in the model -> this rank's rows of a tensor that has to be converted, in the dtype of the files.

    Where rows come from different keys, as one expert's do, only those of this rank are read.
    """
    dtype = _common_dtype(conversion, found)

    def read(key: str) -> Tensor:
        tensor: Tensor = found[key][1].get_tensor(key)
        return tensor.to(dtype)

    start, stop = local_rows(targets[conversion.target])
    part = conversion.of_rows(start, stop)
    if part is None:
        made = conversion.run(model, read)
        return {name: tensor[slice(*local_rows(targets[name]))] for name, tensor in made.items()}
    return part.run(model, read) if stop > start else {}


def _common_dtype(conversion: Conversion, found: Found) -> torch.dtype:
    """The dtype in which tensors are joined: that of all of them, or one that holds each one's values."""
    dtypes = {STORED_DTYPES[found[key][1].get_slice(key).get_dtype()] for key in conversion.keys}
    return functools.reduce(torch.promote_types, dtypes)


def _check_unquantized(folder: Path, config: PreTrainedConfig) -> None:
    """Raises ValueError, saying how to dequantize, if the configuration says that the weights are quantized."""
    settings = getattr(config, "quantization_config", None) or getattr(text_config(config), "quantization_config", None)
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = str(getattr(method, "value", method))
    how = DEQUANTIZE.get(method, "with the tool that quantized them")
    raise ValueError(
        f"{folder / 'config.json'}: by its quantization_config the weights are quantized ({method}); dequantize them "
        f"first, {how}, save the model with save_pretrained, and name the new folder"
    )


def _check_dtypes(plan: LoadPlan, targets: dict[str, Tensor], found: Found, unexpected: list[str]) -> None:
    """Raises ValueError for a tensor that is not stored as the kind of numbers that the model has there."""
    wanted = {key: targets[name] for name, keys in plan.direct.items() for key in keys}
    wanted |= {key: targets[each.target] for each in plan.conversions for key in each.keys}
    stored = {key: found[key][1].get_slice(key).get_dtype() for key in [*wanted, *unexpected]}
    for key, target in wanted.items():
        if target.is_floating_point() and stored[key] not in FLOATS:
            raise _not_trainable(found[key][0], key, stored[key])
        if not target.is_floating_point() and STORED_DTYPES.get(stored[key]) != target.dtype:
            raise ValueError(
                f"{found[key][0]}: {key} is stored as {stored[key]}, the model needs {target.dtype}; do config and "
                "weights come from the same model?"
            )
    for key in unexpected:  # packed blocks and scales have names of their own
        if QUANTIZED.fullmatch(stored[key]):
            raise _not_trainable(found[key][0], key, stored[key])


def _not_trainable(path: Path, key: str, stored: str) -> ValueError:
    return ValueError(
        f"{path}: {key} is stored as {stored}, and weights must be F64, F32, F16 or BF16; dequantize them first (load "
        "them with transformers in bfloat16, and save them with save_pretrained), and name the new folder"
    )


def _listed(what: str, keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{what} {', '.join(keys[:3])}{more}; " if keys else ""


def _check_tied(names: list[str], found: Found) -> None:
    """A tied tensor that is stored under several names must hold the same values under each."""
    first, *others = (found[name][1].get_tensor(name) for name in names)
    if not all(torch.equal(first, other) for other in others):
        raise ValueError(
            f"{found[names[0]][0].parent}: {' and '.join(names)} differ, though the config ties them; "
            "set tie_word_embeddings to false in config.json"
        )


def weights_digest(folder: str | Path) -> str:
    """sha256 (hex) over a model's weights, the settings in config.json that alter its computation, and its own code.

    The code is every Python file of the folder, and of other repositories that `auto_map` names, as far as they are in
    the cache. The same wherever the folder lies. Several threads hash blocks of the files: hashing frees Python's lock.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    total = hashlib.sha256(json.dumps(_with_effect(config), sort_keys=True).encode())
    if auto_map := config.get("auto_map"):  # without it, transformers never runs code of a model
        total.update(json.dumps(auto_map, sort_keys=True).encode())
        for place, path in _code_files(folder, auto_map):
            total.update(f"{place}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    files = weight_files(folder)
    blocks = [(path, start) for path in files for start in range(0, path.stat().st_size, DIGEST_BLOCK)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for digest in pool.map(_block_digest, blocks):
            total.update(digest)
    return total.hexdigest()


def _with_effect(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that alter a computation, also of configurations inside a configuration."""
    return {
        name: _with_effect(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if not WITHOUT_EFFECT.fullmatch(name)
    }


def _code_files(folder: Path, auto_map: dict[str, Any]) -> list[tuple[str, Path]]:
    """Return (where it belongs, path) of each Python file that may compute the model.

    They are the files in its folder, and those of other repositories of code: `auto_map` names a class as
    `module.Class`, or as `repository--module.Class`, where the repository is a hub id or a folder.
    """
    references = {each for value in auto_map.values() for each in (value if isinstance(value, list) else [value])}
    elsewhere = sorted(each for each in references if isinstance(each, str) and "--" in each)
    found = [(path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.py") if path.is_file()]
    for repository, _, name in (each.partition("--") for each in elsewhere):
        place = _code_folder(repository, name.rpartition(".")[0])
        files = place.glob("*.py") if place is not None else ()
        found += [(f"{repository}--{path.name}", path) for path in files if path.is_file()]
    return sorted(set(found))


def _code_folder(repository: str, module: str) -> Path | None:
    """The local copy of a repository of code; None if the hub's cache has none."""
    if Path(repository).is_dir():
        return Path(repository)
    try:
        cached = try_to_load_from_cache(repository, f"{module}.py")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _block_digest(block: tuple[Path, int]) -> bytes:
    path, offset = block
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return hashlib.sha256(file.read(DIGEST_BLOCK)).digest()
