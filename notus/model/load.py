"""From a Hugging Face folder to parameters: find it, give a meta model storage, read each rank's own rows.

Reading is strict: every tensor of the model is in the files, and every tensor of the files in the model.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from notus.model.lora import LoRALinear
from notus.model.sharded_tensors import fill_rows
from notus.runtime.process import first_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
# Other formats of the same weights. Of the subfolders only named chat templates (additional_chat_templates/) are taken.
HUB_IGNORED = [*(f"*/{pattern}" for pattern in HUB_FILES if pattern != "*.jinja"), "consolidated*"]
DIGEST_BLOCK = 64 * 2**20

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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Give a model on the meta device storage on `device`, and its non-persistent buffers their values.

    Pass the root that FSDP manages, so that it learns of its new parameters. Tied parameters stay tied; all
    are empty, like persistent buffers, until they are loaded. Raises ValueError for a buffer without a rule.
    """
    ties = _slots_by_parameter(model)
    model.to_empty(device=device)
    for (owner, name), *others in ties:
        for other, other_name in others:
            setattr(other, other_name, getattr(owner, name))
    _rebuild_buffers(model)
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


@torch.no_grad()
def _rebuild_buffers(model: nn.Module) -> None:
    """Compute what no file holds, such as rotary frequencies, by transformers' own initialisation."""
    causal_lm = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    for owner in causal_lm.modules():
        buffers = {name: owner.get_buffer(name) for name in _non_persistent(owner)}
        for buffer in buffers.values():
            buffer.fill_(_sentinel(buffer.dtype))
        if buffers:
            _initialise_buffers(causal_lm, owner)
        for name, buffer in buffers.items():
            if buffer.isnan().all() or (buffer == _sentinel(buffer.dtype)).all():
                raise ValueError(f"{type(owner).__name__}.{name}: no way to compute it; take another model")


def _non_persistent(module: nn.Module) -> list[str]:
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return [name for name in names if name in module._non_persistent_buffers_set]


def _sentinel(dtype: torch.dtype) -> float | int | bool:
    """A value that marks a buffer that nobody has written to."""
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def _initialise_buffers(causal_lm: PreTrainedModel, owner: nn.Module) -> None:
    parameters = list(owner.parameters(recurse=False))
    for parameter in parameters:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers then leaves it alone
    causal_lm._init_weights(owner)
    for parameter in parameters:
        del parameter._is_hf_initialized  # type: ignore[attr-defined]


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


def load_weights(model: PreTrainedModel, folder: str | Path, *, overlay: Overlay | None = None) -> None:
    """Fill `model` from the safetensors files of `folder`, cast to each parameter's dtype.

    Parameters are plain, or DTensors sharded on dim 0 or replicated; a rank reads the rows of its own shards
    and no others. LoRA parameters are left alone. Every rank finds every mistake, before a value is written.
    `overlay`: what parameters get in place of what the files hold, made from that as it is read, before it is rounded.

    Raises:
        ValueError: missing or unexpected keys, wrong shapes, an unreadable file; naming place and remedy.
    """
    folder = Path(folder)
    with _open_tensors(weight_files(folder)) as found:
        targets = _match(model, found, folder)
        if overlay:
            found |= _laid_over(found, targets, overlay, folder)
        for key, target in targets.items():
            check_shape(found[key], key, target)
        for key, target in targets.items():
            fill_rows(target, found[key][1].get_slice(key))


Found = dict[str, tuple[Path, Any]]  # tensor name -> its file, and the open handle


@contextlib.contextmanager
def _open_tensors(paths: Iterable[Path]) -> Iterator[Found]:
    with contextlib.ExitStack() as stack:
        handles = [(path, stack.enter_context(open_safetensors(path))) for path in paths]
        yield {key: (path, handle) for path, handle in handles for key in handle.keys()}  # noqa: SIM118


def open_safetensors(path: Path) -> Any:
    """A handle on a mapped safetensors file. Raises ValueError, naming the file, if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from error


def check_shape(source: tuple[Path, Any], key: str, target: Tensor) -> None:
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
    """Every tensor that a checkpoint holds, with all its names."""
    adapters = {id(p) for m in model.modules() if isinstance(m, LoRALinear) for p in (m.lora_A, m.lora_B)}
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *_persistent_buffers(model)]:
        if id(tensor) not in adapters:
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    skipped = set(_non_persistent_names(model))
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in skipped]


def _non_persistent_names(model: nn.Module) -> list[str]:
    modules = model.named_modules()
    return [f"{prefix}.{name}".lstrip(".") for prefix, module in modules for name in _non_persistent(module)]


def _match(model: PreTrainedModel, found: Found, folder: Path) -> dict[str, Tensor]:
    """Key in the files -> tensor to fill; for a tied tensor, the first of its names that the files have."""
    targets, missing, known = {}, [], set()
    for names, tensor in _stored(model):
        present = [name for name in names if name in found]
        known.update(present)
        if not present:
            missing.append(names[0])
            continue
        if len(present) > 1:
            _check_tied(present, found)
        targets[present[0]] = tensor
    ignored = [r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or [])]
    ignored += [f"^{re.escape(name)}$" for name in _non_persistent_names(model)]
    unexpected = [key for key in found if key not in known and not any(re.search(p, key) for p in ignored)]
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the weights are not those of {type(model).__name__}: {_listed('missing', missing)}"
            f"{_listed('unexpected', unexpected)}do config.json and the weights come from the same model?"
        )
    return targets


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
    """sha256 (hex) over a model's weights, and over the settings in config.json that alter its computation.

    The same wherever the folder lies. Several threads hash blocks of the files: hashing frees Python's lock.
    """
    folder = Path(folder)
    config = {k: v for k, v in read_json(folder / "config.json").items() if not WITHOUT_EFFECT.fullmatch(k)}
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    files = weight_files(folder)
    blocks = [(path, start) for path in files for start in range(0, path.stat().st_size, DIGEST_BLOCK)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for digest in pool.map(_block_digest, blocks):
            total.update(digest)
    return total.hexdigest()


def _block_digest(block: tuple[Path, int]) -> bytes:
    path, offset = block
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return hashlib.sha256(file.read(DIGEST_BLOCK)).digest()
