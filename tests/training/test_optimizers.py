import math
from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, make_family
from torch import nn
from toys import Root

from notus.runtime import switches
from notus.training import optimizers
from notus.training.gradient_clipping import clipped_update
from notus.training.optimizers import build_optimizer, learning_rate_factor, round_at_random, without_decay


def _parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (0, 3), (11,), (4, 4))]


def _train(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    steps: int,
    first: int = 0,
    update: Callable[[], object] | None = None,
) -> None:
    """Noisy gradients towards zero, the same for every optimizer."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = 0.1 * parameter.detach() + 0.1 * noise
        (update or optimizer.step)()


def _flat(parameters: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        # 2 steps of warm-up, then 8 from 1 to 0.2: 0.1 a step
        ("linear", {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.9, 6: 0.6, 9: 0.3, 10: 0.2}),
        # half of the way after 4 steps of 8; a quarter: 0.2 + 0.8 * (1 + cos 45°) / 2
        ("cosine", {1: 0.5, 2: 1.0, 4: 0.2 + 0.4 * (1 + math.sqrt(0.5)), 6: 0.6, 10: 0.2}),
        # 4 steps at the peak, then 4 of decay: 0.2 a step
        ("wsd", {0: 0.0, 1: 0.5, 2: 1.0, 5: 1.0, 6: 1.0, 7: 0.8, 8: 0.6, 9: 0.4, 10: 0.2}),
    ],
)
def test_schedule_with_a_floor_at_exact_points(schedule: str, points: dict[int, float]) -> None:
    for step, expected in points.items():
        found = learning_rate_factor(step, total_steps=10, warmup_steps=2, schedule=schedule, floor=0.2, decay_steps=4)
        assert found == pytest.approx(expected, abs=1e-12)


def test_wsd_whose_warm_up_and_decay_overlap_warms_up_first() -> None:
    rates = [
        learning_rate_factor(step, total_steps=8, warmup_steps=6, schedule="wsd", decay_steps=4) for step in range(9)
    ]
    assert rates == pytest.approx([0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6, 1, 0.5, 0])


@pytest.mark.parametrize("total", [7, 20])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_schedules_are_those_of_transformers(total: int, floor: float) -> None:
    """Its linear schedule has no floor, and its WSD warms up from the floor, not from 0."""
    from transformers import optimization as theirs

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    ends = {"num_warmup_steps": 2, "num_training_steps": total}
    schedules = {
        "cosine": theirs.get_cosine_with_min_lr_schedule_with_warmup(optimizer, min_lr_rate=floor, **ends),
        "wsd": theirs.get_wsd_schedule(optimizer, num_decay_steps=3, decay_type="linear", min_lr_ratio=floor, **ends),
    }
    if not floor:
        schedules["linear"] = theirs.get_linear_schedule_with_warmup(optimizer, **ends)
    for name, scheduler in schedules.items():
        for step in range(2 if name == "wsd" else 0, total + 1):
            found = learning_rate_factor(
                step, total_steps=total, warmup_steps=2, schedule=name, floor=floor, decay_steps=3
            )
            assert found == pytest.approx(scheduler.lr_lambdas[0](step), abs=1e-12), (name, step)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("linear", {0: 0.0, 1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("cosine", {0: 0.0, 2: 1.0, 6: 0.5, 4: 0.5 * (1 + math.sqrt(0.5)), 10: 0.0}),
        ("constant", {0: 0.0, 1: 0.5, 2: 1.0, 10: 1.0}),
    ],
)
def test_schedule_at_exact_points(schedule: str, points: dict[int, float]) -> None:
    for step, expected in points.items():
        found = learning_rate_factor(step, total_steps=10, warmup_steps=2, schedule=schedule)
        assert found == pytest.approx(expected, abs=1e-12)
    assert learning_rate_factor(0, total_steps=5, warmup_steps=0, schedule=schedule) == 1.0  # no warmup: at the peak


def test_only_trainable_parameters_are_optimized() -> None:
    free, frozen = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    for name, kind in (("rmsprop", torch.optim.RMSprop), ("adamw", torch.optim.AdamW)):
        optimizer = build_optimizer([free, frozen], name=name, learning_rate=0.1, weight_decay=0.2)
        assert isinstance(optimizer, kind)
        assert [group["params"] for group in optimizer.param_groups] == [[free]]
        assert optimizer.param_groups[0]["weight_decay"] == 0.2


@pytest.mark.parametrize("chunk", [3, 13, 10**6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("name", "kind"), [("rmsprop", torch.optim.RMSprop), ("adamw", torch.optim.AdamW)])
def test_in_pieces_it_is_torchs_own(
    name: str,
    kind: Callable[..., torch.optim.Optimizer],
    weight_decay: float,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(optimizers.CHUNK, "cpu", chunk)
    ours, theirs = _parameters(), _parameters()
    _train(build_optimizer(ours, name=name, learning_rate=0.01, weight_decay=weight_decay), ours, 5)
    options = {"fused": True} if name == "adamw" else {"foreach": True}
    _train(kind(theirs, lr=0.01, weight_decay=weight_decay, **options), theirs, 5)
    if name == "rmsprop":
        assert torch.equal(_flat(ours), _flat(theirs))
    else:  # the vector units' order within the kernel depends on where a piece ends
        torch.testing.assert_close(_flat(ours), _flat(theirs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "bound"), [("rmsprop", 1e-2), ("adamw", 1e-2)])
def test_the_error_of_bf16_states(name: str, bound: float) -> None:
    """Of 400 steps' change; rounded to nearest instead, the averages stall."""
    found = {}
    for dtype in ("fp32", "bf16"):
        parameters = _parameters()
        before = _flat(parameters)
        optimizer = build_optimizer(parameters, name=name, learning_rate=1e-3, weight_decay=0, state_dtype=dtype)
        _train(optimizer, parameters, 400)
        states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
        assert {state.dtype for state in states} == {optimizers.STATE_DTYPES[dtype]}
        found[dtype] = _flat(parameters) - before
    error = ((found["bf16"] - found["fp32"]).norm() / found["fp32"].norm()).item()
    assert 0 < error < bound


def test_an_average_in_bf16_does_not_stall() -> None:
    """The squares' average is to rise from 0 to 1 by α 0.99: 1 - 0.99^n after n steps of gradient 1."""
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = build_optimizer([parameter], name="rmsprop", learning_rate=0.0, weight_decay=0, state_dtype="bf16")
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(300):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        nearest = (nearest.float() * 0.99 + 0.01).bfloat16()
    expected = 1 - 0.99**300
    assert optimizer.state[parameter]["square_avg"].float().mean().item() == pytest.approx(expected, abs=2e-3)
    assert nearest.item() < 0.85  # what plain rounding comes to, against 0.951


def test_random_rounding_keeps_the_expectation_and_what_is_exact() -> None:
    noise = torch.Generator().manual_seed(0)
    for value in (1 + 2**-9, -3.01, 1e-12):
        rounded = round_at_random(torch.full((20_000,), value), noise).float()
        assert rounded.mean().item() == pytest.approx(value, rel=1e-4)
        assert len(rounded.unique()) == 2
    exact = torch.tensor([0.0, 1.0, -0.5, 2**-100])
    assert torch.equal(round_at_random(exact, noise).float(), exact)


def _clipped(name: str, dtype: str, max_norm: float | None = 0.1, weight_decay: float = 0.1) -> torch.Tensor:
    """The weights after five steps whose gradients are clipped."""
    parameters = _parameters()
    optimizer = build_optimizer(parameters, name=name, learning_rate=0.01, weight_decay=weight_decay, state_dtype=dtype)

    def update() -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        clipped_update(optimizer, gradients, norm, max_norm)

    _train(optimizer, parameters, 5, update=update)
    return _flat(parameters)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_the_factor_folded_in_is_clipping_beforehand(name: str, dtype: str) -> None:
    found = _clipped(name, dtype)
    with switches.disabled("fused_optimizer"):
        expected = _clipped(name, dtype)
    assert torch.equal(found, expected)
    assert not torch.equal(found, _clipped(name, dtype, max_norm=None))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_the_kernel_is_the_plain_update(name: str, weight_decay: float, kernels_on_cpu: None) -> None:
    found = _clipped(name, "fp32", weight_decay=weight_decay)
    with switches.disabled("fused_optimizer"):
        expected = _clipped(name, "fp32", weight_decay=weight_decay)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, expected)


def test_a_kernel_that_is_wrong_is_told_and_not_used(
    kernels_on_cpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = optimizers.RMSprop.kernel
    monkeypatch.setattr(kernel, "_function", lambda value, *_: value.add_(1.0))
    build_optimizer(_parameters(), name="rmsprop", learning_rate=0.01, weight_decay=0.0)
    assert "warning: kernel rmsprop is not used: its relative error is" in capsys.readouterr().out
    assert kernel.failure is not None


def test_parameters_of_any_size_are_two_graphs(kernels_on_cpu: None) -> None:
    """One for sizes that are whole lines, one for others, whatever the learning rate and the step."""
    parameters = [nn.Parameter(torch.ones(size)) for size in (2048, 4096, 10240, 5, 77, 300)]
    optimizer = build_optimizer(parameters, name="adamw", learning_rate=0.01, weight_decay=0.0)
    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()
    for rate in (0.01, 0.02, 0.03):
        optimizer.param_groups[0]["lr"] = rate
        _train(optimizer, parameters, 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "gpt2", "opt", "phi", "mamba", "mixtral", "nemotron", "falcon"],
)
def test_without_decay_is_what_transformers_trainer_leaves_out(family: str) -> None:
    from transformers.trainer import Trainer

    name = next(each for each in FAMILIES if each.split("/")[0] == family)
    model = make_family(name)
    decayed = Trainer.get_decay_parameter_names(None, model)
    theirs = {each for each, _ in model.named_parameters() if each not in decayed}
    found = without_decay(Root(model), ["bias", "norm"])
    excluded = {id(parameter) for parameters in found.values() for parameter in parameters}
    assert {each for each, parameter in model.named_parameters() if id(parameter) in excluded} == theirs
    assert 0 < len(theirs) < len(list(model.parameters()))


def test_words_of_ones_own_are_parts_of_names() -> None:
    model = make_family("gpt2")
    found = without_decay(model, ["WTE", "attn.c_proj", "nothing"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(each)] for each in found["WTE"]] == ["transformer.wte.weight"]
    assert {names[id(each)] for each in found["attn.c_proj"]} == {
        f"transformer.h.{layer}.attn.c_proj.{kind}" for layer in (0, 1) for kind in ("weight", "bias")
    }
    assert found["nothing"] == []


@pytest.mark.parametrize("chunk", [3, 10**6])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "kind"), [("rmsprop", torch.optim.RMSprop), ("adamw", torch.optim.AdamW)])
def test_parameters_without_decay_are_updated_without(
    name: str, kind: Callable[..., torch.optim.Optimizer], dtype: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(optimizers.CHUNK, "cpu", chunk)
    ours, theirs = _parameters(), _parameters()
    optimizer = build_optimizer(
        ours, name=name, learning_rate=0.01, weight_decay=0.5, undecayed=[ours[0], ours[2]], state_dtype=dtype
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    _train(optimizer, ours, 5)
    groups = [{"params": theirs[1::2], "weight_decay": 0.5}, {"params": theirs[::2], "weight_decay": 0.0}]
    options = {"fused": True} if name == "adamw" else {"foreach": True}
    _train(kind(groups, lr=0.01, **options), theirs, 5)
    accuracy = {"rtol": 1e-6, "atol": 1e-7} if dtype == "fp32" else {"rtol": 0.0, "atol": 5e-3}
    torch.testing.assert_close(_flat(ours), _flat(theirs), **accuracy)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_without_gradients_only_weights_that_decay_move(dtype: str) -> None:
    """AdamW's averages stay 0: after 3 steps the weights are (1 - 0.1 * 0.5)³ times those before."""
    parameters = [nn.Parameter(torch.ones(64, 128)) for _ in range(2)]
    optimizer = build_optimizer(
        parameters, name="adamw", learning_rate=0.1, weight_decay=0.5, undecayed=parameters[:1], state_dtype=dtype
    )
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert torch.equal(parameters[0].detach(), torch.ones(64, 128))
    torch.testing.assert_close(parameters[1].detach(), torch.full((64, 128), 0.95**3))


def test_the_kernel_knows_the_groups(kernels_on_cpu: None) -> None:
    found = []
    for disabled in ((), ("fused_optimizer",)):
        for name in ("rmsprop", "adamw"):
            parameters = _parameters()
            with switches.disabled(*disabled):
                optimizer = build_optimizer(
                    parameters, name=name, learning_rate=0.01, weight_decay=0.5, undecayed=parameters[2:]
                )
                _train(optimizer, parameters, 3)
            found.append(_flat(parameters))
    for with_kernel, plain in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(with_kernel, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("undecayed", "decays"), [([], [0.1]), ([0, 1, 2, 3], [0.0])])
def test_a_group_without_parameters_is_left_out(undecayed: list[int], decays: list[float]) -> None:
    parameters = _parameters()
    optimizer = build_optimizer(
        parameters, name="adamw", learning_rate=0.01, weight_decay=0.1, undecayed=[parameters[i] for i in undecayed]
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays
