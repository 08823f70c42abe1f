"""PEFT's adapter folders: what they hold, merging them into a model, loading them into LoRA layers, writing them.

Which layers an adapter has is read from the names of its tensors, not from `target_modules`, so that patterns, lists of
layers and ranks of their own need no rules of their own here.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from notus.model.load import open_safetensors, read_json
from notus.model.lora import LayerSettings, inject_layers, lora_layers, saved_parameters
from notus.model.new_tokens import Rows, vocabulary_parameters
from notus.model.sharded_tensors import fill_rows, gather, is_rank_zero
from notus.model.structure import pattern_of

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
Change = Callable[[Any], Any]  # a source of a parameter's rows -> the one to use in its place
# Settings that do not alter what the tensors, read by their names, mean.
_PLAIN = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
        "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
        "lora_dropout", "megatron_core", "modules_to_save", "modules_to_tie", "peft_type", "peft_version", "r",
        "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip
# Other ways of initialising, such as PiSSA's, change the base's weights, which the adapter does not hold.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# Last components of the names that families give to modules with a row for each token.
_VOCABULARY = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "output")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a PEFT adapter folder holds.

    Attributes:
        folder: where it is.
        settings: its config.
        layers: module name -> rank and scaling of its A and B.
        saved: parameter name -> shape, of what it holds in full (`modules_to_save`).
    """

    folder: Path
    settings: Mapping[str, Any]
    layers: Mapping[str, LayerSettings]
    saved: Mapping[str, list[int]]

    @property
    def base(self) -> str:
        """The model that it adapts, as its config names it."""
        return str(self.settings["base_model_name_or_path"])

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.folder / ADAPTER_WEIGHTS

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding or head that it holds; 0 if it holds neither."""
        rows = [shape[0] for name, shape in self.saved.items() if name.split(".")[-2:-1][0] in _VOCABULARY]
        return max(rows, default=0)

    @property
    def untied(self) -> bool:
        """Whether PEFT gives each module of `modules_to_save` a weight of its own, also where the base ties them."""
        return bool(self.settings.get("modules_to_save")) and not self.settings.get("ensure_weight_tying")


def read_adapter(folder: str | Path) -> Adapter:
    """Read a PEFT adapter's config, and the names and shapes of its tensors.

    Raises:
        ValueError: naming file and setting or tensor: it is damaged, or more than LoRA and modules saved in full.
    """
    folder = Path(folder)
    settings = read_adapter_settings(folder)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder}: no {ADAPTER_WEIGHTS} there; save the adapter again as safetensors")
    with open_safetensors(path) as handle:
        shapes = {key: list(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    ranks: dict[str, dict[str, list[int]]] = {}
    saved = {}
    for key, shape in shapes.items():
        part = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if part:
            ranks.setdefault(part[1], {})[part[2]] = shape
        elif key.startswith(PREFIX) and "." in key.removeprefix(PREFIX) and ".lora_" not in key:
            saved[key.removeprefix(PREFIX)] = shape
        else:
            raise ValueError(f"{path}: {key} is no part of a plain LoRA adapter; merge it into its base with PEFT")
    layers = {name: _layer(path, name, parts, settings) for name, parts in ranks.items()}
    for module in settings.get("modules_to_save") or ():
        if not any(
            f".{name.rpartition('.')[0]}".endswith(f".{module}") or f".{module}." in f".{name}" for name in saved
        ):
            raise ValueError(
                f"{path}: no weights of {module}, which {ADAPTER_CONFIG} names in modules_to_save; take both files "
                "from the same adapter"
            )
    return Adapter(folder, settings, layers, saved)


def read_adapter_settings(folder: str | Path) -> dict[str, Any]:
    """Read a PEFT adapter's config, with lora_dropout and use_rslora always there.

    Raises ValueError, naming file and setting, if it is more than LoRA and modules that are saved whole.
    """
    path = Path(folder) / ADAPTER_CONFIG
    settings = {"lora_dropout": 0.0, "use_rslora": False, **read_json(path)}
    beyond = [name for name, value in settings.items() if name not in _PLAIN and _is_set(value)]
    if settings.get("peft_type") != "LORA" or settings.get("bias") not in (None, "none"):
        beyond.append("peft_type or bias")
    if settings.get("init_lora_weights") not in _PLAIN_STARTS:
        beyond.append(f"init_lora_weights={settings['init_lora_weights']!r}")
    if beyond:
        raise ValueError(
            f"{path}: only plain LoRA adapters are supported; this one sets {', '.join(sorted(beyond))}: merge it into "
            "its base with PEFT, and name the merged model"
        )
    for name in ("r", "lora_alpha", "base_model_name_or_path"):
        if settings.get(name) is None:
            raise ValueError(f"{path}: {name} is missing")
    return settings


def _is_set(value: object) -> bool:
    """Whether a setting that is not known here switches something on; names and sizes alone do not."""
    return value is True or (isinstance(value, list | dict) and bool(value))


def _layer(path: Path, name: str, parts: dict[str, list[int]], settings: Mapping[str, Any]) -> LayerSettings:
    missing = {"A", "B"} - parts.keys()
    if missing:
        raise ValueError(f"{path}: {PREFIX}{name} has no lora_{missing.pop()}; save the adapter again")
    rank, alpha = _by_pattern(settings, "rank_pattern", name), _by_pattern(settings, "alpha_pattern", name)
    if len(parts["A"]) != 2 or len(parts["B"]) != 2 or not parts["A"][0] == parts["B"][1] == rank:
        raise ValueError(
            f"{path}: {PREFIX}{name} has A {parts['A']} and B {parts['B']}, but {ADAPTER_CONFIG} says rank {rank}; "
            "take both files from the same adapter"
        )
    return LayerSettings(int(rank), float(alpha), bool(settings["use_rslora"]))


def _by_pattern(settings: Mapping[str, Any], kind: str, name: str) -> float:
    """A layer's rank or alpha: of the first pattern that matches the end of its name, as PEFT takes it."""
    default: float = settings["r" if kind == "rank_pattern" else "lora_alpha"]
    patterns: Mapping[str, float] = settings.get(kind) or {}
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def adapter_digest(folder: str | Path) -> str:
    """sha256 (hex) of an adapter's tensors and of all that scales them; the same wherever the folder lies."""
    adapter = read_adapter(folder)
    scalings = {name: settings.scaling for name, settings in sorted(adapter.layers.items())}
    total = hashlib.sha256(json.dumps([scalings, adapter.untied], sort_keys=True).encode())
    with adapter.weights.open("rb") as file:
        total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# ---- into a model ----


@contextlib.contextmanager
def merging(model: PreTrainedModel, adapter: Adapter, *, new_rows: int = 0) -> Iterator[dict[int, Change]]:
    """Yield what `load_weights` lays over the base's weights: W + s·BA, and what the adapter saved in full.

    Each sum is fp32, and rounded once as it is stored, whatever it is stored in. A rank computes its own rows alone.
    `new_rows`: as many rows of embedding and head may be new, beyond the adapter's.

    Raises:
        ValueError: naming file and tensor: the model has no such layer, or one of another shape; or the adapter has
            separate weights for what the model ties.
    """
    linears = _linears(model, adapter)
    with open_safetensors(adapter.weights) as handle:
        found: dict[int, Change] = {}
        for name, linear in linears.items():
            part_a, part_b = (handle.get_slice(f"{PREFIX}{name}.lora_{part}.weight") for part in "AB")
            scaling = adapter.layers[name].scaling
            found[id(linear.weight)] = functools.partial(MergedRows, part_a, part_b, scaling)
        for target, source in _saved_targets(model, adapter, handle, new_rows):
            found[id(target)] = functools.partial(_instead, source)
        yield found


def _instead(source: Any, _: Any) -> Any:
    return source


class MergedRows:
    """The rows of W + s·BA in fp32, computed as they are sliced; `base`, A and B are sources of rows themselves."""

    def __init__(self, part_a: Any, part_b: Any, scaling: float, base: Any) -> None:
        """`base` is W [out, in], `part_a` A [r, in], `part_b` B [out, r]."""
        self._a, self._b, self._scaling, self._base = part_a, part_b, scaling, base

    def get_shape(self) -> list[int]:
        """Return the shape of W."""
        return list(self._base.get_shape() if hasattr(self._base, "get_shape") else self._base.shape)

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows [start, stop), in order."""
        base = self._base[rows].float()
        rows_b, part_a = (part.to(base.device, torch.float32) for part in (self._b[rows], self._a[:]))
        return torch.addmm(base, rows_b, part_a, alpha=self._scaling)


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: Adapter, *, new_rows: int = 0) -> None:
    """Merge an adapter into an unsharded model that is loaded already, in place; see `merging`, also for errors."""
    with merging(model, adapter, new_rows=new_rows) as changes:
        for parameter in model.parameters():
            if id(parameter) in changes:
                parameter.copy_(changes[id(parameter)](parameter.detach())[0 : parameter.shape[0]])


def inject_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Put LoRA layers, without values, where an adapter has some; what it saved in full is trained, as in its training.

    Raises ValueError as `merging`.
    """
    _linears(model, adapter)
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in adapter.saved:
        if name not in named:
            raise ValueError(f"{adapter.weights}: the model has no {name}; is its base another?")
        named[name].requires_grad_(True)
    inject_layers(model, adapter.layers)


def load_adapter(model: PreTrainedModel, adapter: Adapter | str | Path, *, new_rows: int = 0) -> None:
    """Fill the LoRA layers of `model`, and what it trains in full, from an adapter; each rank reads its own rows.

    Raises ValueError, naming the adapter and what to set, if its layers, scaling or shapes are not the model's.
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    check_adapter(model, adapter, new_rows=new_rows)
    with open_safetensors(adapter.weights) as handle:
        targets = _saved_targets(model, adapter, handle, new_rows)
        for key, target in _parts(model).items():
            fill_rows(target, handle.get_slice(key))
        for target, source in targets:
            fill_rows(target, source)


def check_adapter(model: PreTrainedModel, adapter: Adapter, *, new_rows: int = 0) -> None:
    """Raise the ValueErrors of `load_adapter`, without reading any values."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    check_continued(adapter, layers={name: layer.settings for name, layer in layers.items()}, alike=first.settings)
    trained = saved_parameters(model)
    if not adapter.saved.keys() <= trained.keys() or any(
        not _names_of(model, parameter) & adapter.saved.keys() for parameter in trained.values()
    ):
        modules = sorted({name.rpartition(".")[0] for name in adapter.saved})
        raise ValueError(
            f"{adapter.folder}: other modules are saved in full in the adapter: set lora.modules_to_save={modules}"
        )
    _linears(model, adapter)
    with open_safetensors(adapter.weights) as handle:
        _saved_targets(model, adapter, handle, new_rows)


def without_layers(idle: Set[str], continued: Adapter | None) -> Set[str]:
    """Return what `inject_lora` leaves out: the idle layers, but for those of an adapter that is trained further."""
    layers = () if continued is None else continued.layers
    return idle - set(layers) - {pattern_of(name) for name in layers}


def check_continued(
    adapter: Adapter, *, layers: Mapping[str, LayerSettings] | None = None, alike: LayerSettings | None = None
) -> None:
    """Raise ValueError, with what to set, unless an adapter's layers are these, or `alike` each of them.

    Args:
        adapter: to be trained further.
        layers: those that the config gives the model; None: not known yet.
        alike: what the config says of every layer.
    """
    found = set(adapter.layers.values())
    where = f"{adapter.folder}: cannot be trained further as configured"
    if layers == adapter.layers:
        return
    if alike is not None and len(found) != 1:
        raise ValueError(f"{where}: its layers differ in rank or alpha; set lora.continue=false to merge it")
    theirs = next(iter(found))
    for key, name in (("rank", "rank"), ("alpha", "alpha"), ("rslora", "rslora")):
        mine, other = getattr(alike, name, None), getattr(theirs, name)
        if alike is not None and mine != other:
            raise ValueError(
                f"{where}: lora.{key} is {_plain(mine)}, but {_plain(other)} in the adapter: set "
                f"lora.{key}={_plain(other)}"
            )
    if layers is None:
        return
    names = sorted({name.rpartition(".")[2] for name in adapter.layers})
    if names != sorted({name.rpartition(".")[2] for name in layers}):
        raise ValueError(
            f"{where}: lora.target_modules does not name its layers: set lora.target_modules=[{', '.join(names)}]"
        )
    odd = sorted(layers.keys() ^ adapter.layers.keys())[0]
    raise ValueError(
        f"{where}: {'the model has no' if odd in adapter.layers else 'it does not adapt the'} layer {odd}; leave "
        "lora.continue out to merge it, if its base is this model"
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _linears(model: nn.Module, adapter: Adapter) -> dict[str, nn.Linear]:
    """The adapter's layers in a model. Raises ValueError for one that is not there, or of another shape."""
    modules = dict(model.named_modules())
    found = {}
    with open_safetensors(adapter.weights) as handle:
        for name in adapter.layers:
            linear = modules.get(name)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{adapter.weights}: the model has no linear layer {name}; is its base another?")
            wanted = {"A": linear.in_features, "B": linear.out_features}
            for part, dim in (("A", 1), ("B", 0)):
                key = f"{PREFIX}{name}.lora_{part}.weight"
                shape = list(handle.get_slice(key).get_shape())
                if shape[dim] != wanted[part]:
                    expected = [*shape]
                    expected[dim] = wanted[part]
                    raise ValueError(
                        f"{adapter.weights}: {key} has shape {shape}, the model needs {expected}; is its base another?"
                    )
            found[name] = linear
    return found


def _names_of(model: nn.Module, parameter: Tensor) -> set[str]:
    """All names of a parameter, which may be tied."""
    return {name for name, each in model.named_parameters(remove_duplicate=False) if each is parameter}


def _saved_targets(
    model: PreTrainedModel, adapter: Adapter, handle: Any, new_rows: int
) -> list[tuple[nn.Parameter, Any]]:
    """Parameters that the adapter holds in full, each with its source of rows."""
    named = dict(model.named_parameters(remove_duplicate=False))
    growing = {id(parameter) for parameter in vocabulary_parameters(model)}
    found: dict[int, tuple[nn.Parameter, Any]] = {}
    for name, shape in adapter.saved.items():
        if name not in named:
            raise ValueError(f"{adapter.weights}: the model has no {name}; is its base another?")
        target, source = named[name], handle.get_slice(PREFIX + name)
        expected = list(target.shape)
        grown = id(target) in growing and shape[1:] == expected[1:] and 0 < expected[0] - shape[0] <= new_rows
        if shape != expected and not grown:
            raise ValueError(
                f"{adapter.weights}: {PREFIX}{name} has shape {shape}, the model needs {expected}; is its base another?"
            )
        _check_tie(adapter, handle, name, _names_of(model, target))
        found[id(target)] = target, Rows(source, expected[0]) if grown else source
    return list(found.values())


def _check_tie(adapter: Adapter, handle: Any, name: str, names: set[str]) -> None:
    """A tied parameter must have one value: under each name that PEFT would load for itself."""
    present = sorted(names & adapter.saved.keys())
    apart = adapter.untied and len(present) < len(names)
    values = handle.get_tensor(PREFIX + name)
    if apart or not all(torch.equal(values, handle.get_tensor(PREFIX + other)) for other in present if other != name):
        raise ValueError(
            f"{adapter.weights}: gives {' and '.join(sorted(names))} different weights, which the model ties; set "
            "tie_word_embeddings to false in the base's config.json, and give it both weights"
        )


# ---- writing ----


def adapter_tensors(causal_lm: PreTrainedModel) -> dict[str, Tensor]:
    """Return PEFT's name -> A, B, or what is trained in full beside them."""
    saved = {f"{PREFIX}{name}": parameter for name, parameter in saved_parameters(causal_lm).items()}
    return _parts(causal_lm) | saved


def _parts(causal_lm: nn.Module) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{name}.{part}.weight": getattr(layer, part)
        for name, layer in lora_layers(causal_lm).items()
        for part in ("lora_A", "lora_B")
    }


def adapter_settings(causal_lm: PreTrainedModel, base: str) -> dict[str, Any]:
    """Return the config that PEFT reads: the layers' scaling and targets, and the name of their base."""
    layers = {name: layer.settings for name, layer in lora_layers(causal_lm).items()}
    dropout = next(iter(lora_layers(causal_lm).values())).dropout
    return settings_of(causal_lm, layers, saved_parameters(causal_lm), base=base, dropout=dropout)


def settings_of(
    causal_lm: PreTrainedModel,
    layers: Mapping[str, LayerSettings],
    saved: Mapping[str, object],
    *,
    base: str,
    dropout: float,
) -> dict[str, Any]:
    """Return PEFT's config of an adapter.

    Args:
        causal_lm: the model; its other modules decide how long the names must be.
        layers: module name -> rank and scaling, all with or all without rsLoRA.
        saved: by name, the parameters that it holds in full.
        base: name of the model that it adapts.
        dropout: on the adapters' input.
    """
    counts: dict[LayerSettings, int] = {}
    for settings in layers.values():
        counts[settings] = counts.get(settings, 0) + 1
    usual = max(counts, key=lambda each: counts[each])
    linears = [name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear)]
    whole = sorted({name.rpartition(".")[0] for name in saved})
    modules = [name for name, _ in causal_lm.named_modules() if name]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": usual.rank,
        "lora_alpha": _number(usual.alpha),
        "rank_pattern": _pattern({n: each.rank for n, each in layers.items()}, usual.rank, linears),
        "alpha_pattern": _pattern(
            {n: _number(each.alpha) for n, each in layers.items()}, _number(usual.alpha), linears
        ),
        "lora_dropout": dropout,
        "target_modules": _short(list(layers), modules),  # also of other kinds: PEFT fails on those
        "use_rslora": usual.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": _short(whole, modules) or None,
        # PEFT from 0.18 on then keeps one weight; earlier versions load two that are equal
        "ensure_weight_tying": _holds_a_tie(causal_lm, saved),
    }


def _holds_a_tie(causal_lm: nn.Module, saved: Mapping[str, object]) -> bool:
    named = causal_lm.named_parameters(remove_duplicate=False)
    counted: dict[int, int] = {}
    for name, parameter in named:
        counted[id(parameter)] = counted.get(id(parameter), 0) + (name in saved)
    return any(count > 1 for count in counted.values())


def _number(value: float) -> float:
    """An integer where it is one, as PEFT writes it."""
    return int(value) if value == int(value) else value


def _short(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """Modules by the last component of their names, where no other module's name ends like that; else in full."""
    found = set()
    for name in names:
        last = name.rpartition(".")[2]
        # PEFT takes the end of a name in `modules_to_save` as it stands: "norm" is the end of "q_norm", too
        found.add(last if all(other in names for other in all_names if other.endswith(last)) else name)
    return sorted(found)


def _pattern(values: Mapping[str, float], usual: float, linears: Sequence[str]) -> dict[str, float]:
    """What differs from the usual value, by the shortest name that stands for these layers alone."""
    by_value: dict[float, list[str]] = {}
    for name, value in values.items():
        if value != usual:
            by_value.setdefault(value, []).append(name)
    others = set(linears) - values.keys()
    return {
        short: value
        for value, names in by_value.items()
        for short in _short(names, [name for name in linears if name not in others])
    }


def stacked(causal_lm: PreTrainedModel, below: Adapter, *, base: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of one adapter that is `below` and the model's LoRA layers together. All ranks call it.

    The model is `below` merged into its base, and LoRA layers on top: W + s₁B₁A₁ + s₂B₂A₂. As one adapter of that base
    it is [s₁B₁ s₂B₂] times A₁ over A₂, of rank r₁ + r₂ and scaling 1. What `below` saved in full, and the model did not
    train, is taken over.

    Returns:
        the config; and by PEFT's names fp32 tensors, on rank 0 alone.
    """
    above, parts = lora_layers(causal_lm), gather(adapter_tensors(causal_lm), torch.float32)
    ranks = {name: settings.rank for name, settings in below.layers.items()}
    for name, layer in above.items():
        ranks[name] = ranks.get(name, 0) + layer.rank
    layers = {name: LayerSettings(rank, float(rank)) for name, rank in ranks.items()}
    saved = dict.fromkeys([*below.saved, *saved_parameters(causal_lm)])
    dropout = next(iter(above.values())).dropout
    settings = settings_of(causal_lm, layers, saved, base=base, dropout=dropout)
    if not is_rank_zero():
        return settings, {}
    with open_safetensors(below.weights) as handle:
        for name in below.layers:
            part_a, part_b = (handle.get_tensor(f"{PREFIX}{name}.lora_{part}.weight").float() for part in "AB")
            _stack(parts, name, part_a, below.layers[name].scaling * part_b, above)
        for name in above.keys() - below.layers.keys():
            parts[f"{PREFIX}{name}.lora_B.weight"] = above[name].scaling * parts[f"{PREFIX}{name}.lora_B.weight"]
        for name in below.saved:
            if PREFIX + name not in parts:
                parts[PREFIX + name] = handle.get_tensor(PREFIX + name).float()
    return settings, parts


def _stack(parts: dict[str, Tensor], name: str, part_a: Tensor, scaled_b: Tensor, above: Mapping[str, Any]) -> None:
    keys = [f"{PREFIX}{name}.lora_{part}.weight" for part in "AB"]
    if name in above:
        part_a = torch.cat([part_a, parts[keys[0]]])
        scaled_b = torch.cat([scaled_b, above[name].scaling * parts[keys[1]]], dim=1)
    parts.update(zip(keys, (part_a, scaled_b), strict=True))
