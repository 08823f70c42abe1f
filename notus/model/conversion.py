"""Published weight names, and transformers' conversions between them and a model's own tensors.

A published checkpoint often differs from the model's tensors: Mixtral's files hold each expert's matrices, the model
all experts of a layer in one tensor. transformers says how (`transformers.conversion_mapping`) and converts by its
operation classes (`transformers.core_model_loading`), which are used here. The plans are made from names and shapes
alone, on the meta device, so that every mistake is known before a value is read.
"""

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import custom_object_save


@dataclass
class Conversion:
    """Tensors of the files that together become one or several tensors of the model.

    Attributes:
        target: the name of the (first) tensor of the model that they become.
        converter: transformers' conversion.
        sources: the pattern that a key matched -> such keys, in the order in which they are joined.
    """

    target: str
    converter: WeightConverter
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """All keys that it reads."""
        return [key for keys in self.sources.values() for key in keys]

    def of_rows(self, start: int, stop: int) -> "Conversion | None":
        """Return the conversion that makes rows [start, stop) of the target alone; None where rows have no own keys.

        They have if the first operation stacks one tensor per row (an expert each) and the others stay within a row.
        """
        stack, *others = self.converter.operations
        stacks = isinstance(stack, MergeModulelist) and stack.dim == 0 and len(self.converter.target_patterns) == 1
        if not stacks or not all(map(_stays_within_rows, others)):
            return None
        return replace(self, sources={pattern: keys[start:stop] for pattern, keys in self.sources.items()})

    def run(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return name in the model -> full tensor, made of what `read` returns for each key."""
        converter = copy.deepcopy(self.converter)
        for pattern, keys in self.sources.items():
            for key in keys:
                converter.add_tensor(self.target, key, pattern, functools.partial(read, key))  # type: ignore[arg-type]
        made: dict[str, Any] = converter.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _stays_within_rows(operation: ConversionOps) -> bool:
    if isinstance(operation, Concatenate):
        return operation.dim > 0
    return type(operation) is Transpose and not operation.check_dims and operation.dim0 > 0 and operation.dim1 > 0


@dataclass
class LoadPlan:
    """How the tensors of some files become those of a model.

    Attributes:
        direct: name in the model -> the keys that hold that tensor as it is; more than one is rare.
        conversions: what has to be converted.
        unexpected: key -> its name in the model's way of naming, for keys that the model has no place for.
        transforms: the renamings and conversions that any key needed: an export reverses them.
    """

    direct: dict[str, list[str]]
    conversions: list[Conversion]
    unexpected: dict[str, str]
    transforms: list[WeightTransform]


def plan_loading(model: PreTrainedModel, names: Mapping[str, Tensor], keys: Iterable[str]) -> LoadPlan:
    """Decide, as `from_pretrained` does, what each key of a checkpoint is for.

    Args:
        model: the model; its class and configuration choose the conversions.
        names: every name that a tensor of the model has -> that tensor.
        keys: all keys of the files.
    """
    with _own_class_names(model):
        transforms = list(get_model_conversion_mapping(model))
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    tensors = dict(names)
    direct: dict[str, list[str]] = {}
    conversions: dict[str, Conversion] = {}
    unexpected: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, tensors)
        if name not in names and key in names:  # it has the model's name already, which looks like another
            name, pattern = rename_source_key(key, [], [], prefix, tensors)
        if name not in names:
            unexpected[key] = name
        elif pattern is None:
            direct.setdefault(name, []).append(key)
        else:
            conversion = conversions.setdefault(name, Conversion(name, converter_of[pattern]))
            conversion.sources.setdefault(pattern, []).append(key)
    used = [each for each in transforms if each.was_used()]
    return LoadPlan(direct, list(conversions.values()), unexpected, used)


@dataclass(frozen=True)
class Stored:
    """Tensors of a model that are published together.

    Attributes:
        names: their names in the model.
        sizes: published name -> bytes.
        converted: whether they have to be converted; if not, there is one of them, under another name or the same.
    """

    names: list[str]
    sizes: dict[str, int]
    converted: bool

    def publish(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return published name -> tensor, of full tensors by their names in the model."""
        if not self.converted:
            return {next(iter(self.sizes)): tensors[self.names[0]]}
        made = _revert(model, {name: tensors[name] for name in self.names})
        return {name: tensor.contiguous() for name, tensor in made.items()}


def plan_export(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> list[Stored]:
    """Decide, as `save_pretrained` does, under which names a model's tensors are published, and which go together.

    Args:
        model: the model. One that was loaded is published in the names that it was loaded from.
        tensors: name -> tensor, of every tensor to be published.
        dtypes: name -> the dtype in which it is to be stored.
    """
    empty = {name: torch.empty(tensor.shape, dtype=dtypes[name], device="meta") for name, tensor in tensors.items()}
    published = _revert(model, empty)
    renamed = {id(tensor): name for name, tensor in published.items()}
    plans: dict[str, Stored] = {}
    for group, names in _converted_together(model, empty).items():
        if len(names) == 1 and id(empty[names[0]]) in renamed:
            sizes = {renamed[id(empty[names[0]])]: empty[names[0]].nbytes}
            plans[group] = Stored(names, sizes, converted=False)
        else:
            made = _revert(model, {name: empty[name] for name in names})
            plans[group] = Stored(names, {name: tensor.nbytes for name, tensor in made.items()}, converted=True)
    found = sorted(name for plan in plans.values() for name in plan.sizes)
    assert found == sorted(published), f"conversions that depend on each other: {set(found) ^ set(published)}"
    return list(plans.values())


def _converted_together(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Some name -> the tensors that one reversed conversion needs together; a tensor by itself if none needs it."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        with _own_class_names(model):
            transforms = get_model_conversion_mapping(model, add_legacy=False)
    reverse = [each.reverse_transform() for each in transforms[::-1] if isinstance(each, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in tensors:
        group = name
        for converter in reverse:
            renamed, pattern = converter.rename_source_key(name)
            if pattern is not None:
                group = f"-> {renamed}"
                break
        groups.setdefault(group, []).append(name)
    return groups


def write_code(model: PreTrainedModel, folder: Path, config: PreTrainedConfig) -> None:
    """Copy the code that came with a model into a folder, and name it in `config`; do nothing for transformers' own."""
    with _own_class_names(model):
        if model.is_remote_code():
            custom_object_save(model, folder, config=config)  # type: ignore[arg-type]  # it takes either


def _revert(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with _own_class_names(model):
        published: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return published


@contextlib.contextmanager
def _own_class_names(model: PreTrainedModel) -> Iterator[None]:
    """Give the classes that FSDP puts in front of a model's the name and module by which transformers knows them."""
    managed = {type(each) for each in model.modules() if isinstance(each, PreTrainedModel | FSDPModule)}
    names = {kind: (kind.__name__, kind.__module__) for kind in managed if issubclass(kind, FSDPModule)}
    for kind in names:
        own = next(base for base in kind.__mro__ if not issubclass(base, FSDPModule))
        kind.__name__, kind.__module__ = own.__name__, own.__module__
    try:
        yield
    finally:
        for kind, (name, module) in names.items():
            kind.__name__, kind.__module__ = name, module


def ignorable(model: PreTrainedModel, non_persistent: Iterable[str]) -> Callable[[str], bool]:
    """Return what says of a name that no tensor of the model has whether transformers skips it without a word.

    These are buffers that older versions stored, and parts that the model has no use for (layers that predict several
    tokens, for one).
    """
    patterns = [r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or [])]
    if any(name.endswith("position_ids") for name, _ in model.named_buffers()):
        patterns.append(r"(^|\.)position_ids$")
    buffers = set(non_persistent)

    def skipped(name: str) -> bool:
        known = name in buffers or f"{model.base_model_prefix}.{name}" in buffers
        return known or any(re.search(pattern, name) for pattern in patterns)

    return skipped
