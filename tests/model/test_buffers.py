"""What no file holds: buffers that transformers' initialisation computes, and those that only a built model has."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toys import Root, toy_config
from transformers import MistralConfig, MistralForCausalLM

from notus.model.buffers import non_persistent
from notus.model.load import load_weights, materialise


class Odd(MistralForCausalLM):
    """A model as some come with code of their own: tables that nothing but `__init__` computes."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        rows = torch.arange(12.0).view(3, 4)
        self.model.register_buffer("slopes", rows.sin(), persistent=False)
        self.model.register_buffer("causal", torch.ones(4, 4, dtype=torch.bool).tril(), persistent=False)
        self.model.register_buffer("everything", torch.ones(2, dtype=torch.bool), persistent=False)
        self.model.register_buffer("turns", torch.polar(rows, rows), persistent=False)
        self.model.register_buffer("none", torch.zeros(0, dtype=torch.long), persistent=False)
        self.model.layers[1].scale = torch.full((2,), 0.5)
        self.model.layers[1].tables = {"cos": rows.cos(), "sizes": [torch.arange(3), 7]}


class Empty(MistralForCausalLM):
    """A model with a buffer that is filled by nobody."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.model.register_buffer("slopes", torch.empty(2, device="meta"), persistent=False)


class Held(MistralForCausalLM):
    """A model that keeps a parameter in a list, out of reach of whoever gives it storage."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.model.flat = [self.model.norm.weight]


class Once(MistralForCausalLM):
    """A model that cannot be built on the CPU."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.model.slopes = torch.ones(2)
        if not self.model.slopes.is_meta:
            raise RuntimeError("no room")


def on_meta(kind: type[MistralForCausalLM]) -> MistralForCausalLM:
    with torch.device("meta"):
        return kind(toy_config())


def assert_tables(model: nn.Module, built: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        assert buffer.dtype == built.get_buffer(name).dtype
        assert torch.equal(buffer, built.get_buffer(name)), name
    layer, expected = model.model.layers[1], built.model.layers[1]
    assert torch.equal(layer.scale, expected.scale)
    assert torch.equal(layer.tables["cos"], expected.tables["cos"])
    assert torch.equal(layer.tables["sizes"][0], torch.arange(3))
    assert layer.tables["sizes"][1] == 7


def test_what_only_a_built_model_has_is_taken_from_one() -> None:
    model = on_meta(Odd)
    assert model.model.layers[1].scale.is_meta
    materialise(model, "cpu")
    assert_tables(model, Odd(toy_config()))
    assert not model.model.slopes.requires_grad


def test_values_are_cast_to_the_buffers_dtype() -> None:
    model = on_meta(Odd)
    model.model.slopes = model.model.slopes.bfloat16()
    materialise(model, "cpu")
    assert torch.equal(model.model.slopes, Odd(toy_config()).model.slopes.bfloat16())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Empty, r"MistralModel\.slopes: no way to compute it; take another model"),
        (Held, r"MistralModel\.flat: no way to compute it"),
        (Once, r"Once: its buffers cannot be computed, since it cannot be built a second time \(no room\)"),
    ],
)
def test_what_nobody_computes_is_an_error(kind: type[MistralForCausalLM], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        materialise(on_meta(kind), "cpu")


def test_parameters_of_the_second_copy_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Watched(Odd):
        def __init__(self, config: MistralConfig) -> None:
            super().__init__(config)
            seen.append(all(parameter.is_meta for parameter in self.parameters()))

    register: Callable[..., None] = nn.Module.register_parameter
    materialise(on_meta(Watched), "cpu")
    assert seen == [True, True]
    assert nn.Module.register_parameter is register
    assert not next(Odd(toy_config()).parameters()).is_meta


def ranks_have_tables(folder: Path) -> None:
    model = on_meta(Odd)
    root = Root(model)
    for block in [*model.model.layers, root]:
        fully_shard(block, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    materialise(root, "cpu")
    load_weights(model, folder)
    assert_tables(model, Odd(toy_config()))


def test_a_sharded_model_has_them_too(tmp_path: Path) -> None:
    Odd(toy_config()).save_pretrained(tmp_path / "m")
    run_ranks(ranks_have_tables, 2, tmp_path, tmp_path / "m")


def test_persistent_buffers_are_none_of_these() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("computed", torch.ones(1), persistent=False)
    tensor: Tensor = module.computed
    assert non_persistent(module) == ["computed"]
    assert tensor.item() == 1
