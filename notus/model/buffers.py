"""Values that no weight file holds: rotary frequencies, masks, tables, and plain tensors kept as attributes.

A model that was built on the meta device has none of them. transformers' own `_init_weights` computes most buffers.
What it leaves alone is taken from a twin: the same class, built on the CPU from the same configuration, with
parameters that have no storage. What neither can say is an error, never garbage.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from notus.runtime.process import first_line


@dataclass(frozen=True)
class _Place:
    """A module, the outermost and the nearest transformers model that it belongs to, its path in the outermost."""

    module: nn.Module
    outermost: PreTrainedModel | None
    nearest: PreTrainedModel | None
    path: str


@torch.no_grad()
def rebuild_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Give all non-persistent buffers their values, and put plain tensors that are on the meta device on `device`.

    Raises:
        ValueError: there is no way to compute one of them.
    """
    twins: dict[int, nn.Module] = {}
    for place in _places(model):
        for name in _left_by_init(place):
            buffer = place.module.get_buffer(name)
            value = _from_twin(place, name, twins)
            if not isinstance(value, Tensor) or value.is_meta or value.shape != buffer.shape:
                raise _unknown(place.module, name)
            buffer.copy_(value)
        _rebuild_attributes(place, device, twins)


def rebuild_attributes(model: nn.Module, device: torch.device | str) -> None:
    """Put plain tensors that are on the meta device, which `from_pretrained` leaves there, on `device`.

    Raises:
        ValueError: there is no way to compute one of them.
    """
    twins: dict[int, nn.Module] = {}
    for place in _places(model):
        _rebuild_attributes(place, device, twins)


def _rebuild_attributes(place: _Place, device: torch.device | str, twins: dict[int, nn.Module]) -> None:
    for name in [name for name, value in vars(place.module).items() if _is_own(name) and _on_meta(value)]:
        value = _from_twin(place, name, twins)
        if value is None or _on_meta(value):
            raise _unknown(place.module, name)
        setattr(place.module, name, _moved(value, device))


def initial_buffers(causal_lm: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """Return name -> the value that a newly built model has in these buffers. Raises ValueError if it has none."""
    twin = _twin(causal_lm)
    found = dict(twin.named_buffers())
    for name in names:
        if name not in found:
            raise _unknown(causal_lm, name)
    return {name: found[name] for name in names}


def non_persistent(module: nn.Module) -> list[str]:
    """Return the names of a module's own buffers that no checkpoint holds."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return [name for name in names if name in module._non_persistent_buffers_set]


def _unknown(module: nn.Module, name: str) -> ValueError:
    return ValueError(f"{type(module).__name__}.{name}: no way to compute it; take another model")


def _places(model: nn.Module) -> list[_Place]:
    """Every module, once."""
    found: dict[int, _Place] = {}

    def visit(module: nn.Module, outermost: PreTrainedModel | None, nearest: PreTrainedModel | None, path: str) -> None:
        if isinstance(module, PreTrainedModel):
            nearest = module
            outermost, path = (module, "") if outermost is None else (outermost, path)
        if id(module) not in found:
            found[id(module)] = _Place(module, outermost, nearest, path)
        for name, child in module.named_children():
            visit(child, outermost, nearest, f"{path}.{name}" if path else name)

    visit(model, None, None, "")
    return list(found.values())


def _left_by_init(place: _Place) -> list[str]:
    """Compute a module's non-persistent buffers by transformers' initialisation; return those that it left alone."""
    buffers = {name: place.module.get_buffer(name) for name in non_persistent(place.module)}
    for buffer in buffers.values():
        buffer.fill_(_sentinel(buffer.dtype))
    if buffers and place.nearest is not None:
        _initialise(place.nearest, place.module)
    return [name for name, buffer in buffers.items() if _unwritten(buffer)]


def _sentinel(dtype: torch.dtype) -> float | int | bool:
    """A value that marks a buffer that nobody has written to."""
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


def _unwritten(buffer: Tensor) -> bool:
    """Whether nobody has written to a buffer, or only to some of it; or it may be so, which costs a look at a twin."""
    if buffer.dtype.is_floating_point or buffer.dtype.is_complex:
        return bool(buffer.isnan().any())
    return buffer.numel() > 0 and bool((buffer == _sentinel(buffer.dtype)).all())


def _initialise(nearest: PreTrainedModel, owner: nn.Module) -> None:
    parameters = list(owner.parameters(recurse=False))
    for parameter in parameters:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers then leaves it alone
    nearest._init_weights(owner)
    for parameter in parameters:
        del parameter._is_hf_initialized  # type: ignore[attr-defined]


def _is_own(name: str) -> bool:
    return name not in ("_parameters", "_buffers", "_modules")


def _on_meta(value: Any) -> bool:
    """Whether an attribute is, or holds, a tensor on the meta device."""
    if isinstance(value, Tensor):
        return value.is_meta
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(_on_meta(each) for each in inner)


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    return type(value)(_moved(each, device) for each in value) if isinstance(value, (list, tuple)) else value


def _from_twin(place: _Place, name: str, twins: dict[int, nn.Module]) -> Any:
    """A module's attribute or buffer in a model that was built on the CPU; None if it has none."""
    if place.outermost is None:
        return None
    if id(place.outermost) not in twins:
        twins[id(place.outermost)] = _twin(place.outermost)
    try:
        return getattr(twins[id(place.outermost)].get_submodule(place.path), name, None)
    except AttributeError:
        return None


def _twin(causal_lm: PreTrainedModel) -> nn.Module:
    """A model of the same class and configuration on the CPU, whose parameters are on the meta device."""
    kind: Any = next(base for base in type(causal_lm).__mro__ if not issubclass(base, FSDPModule))
    config = copy.deepcopy(causal_lm.config)
    try:
        with torch.device("cpu"), no_init_weights(), _parameters_on_meta():
            twin: nn.Module = kind._from_config(config, dtype=config.dtype or torch.float32)
    except Exception as error:  # the code of a model may raise anything
        reason = first_line(error)
        raise ValueError(
            f"{kind.__name__}: its buffers cannot be computed, since it cannot be built a second time ({reason}); take "
            "another model"
        ) from error
    return twin


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put every parameter on the meta device as soon as a module gets it."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
