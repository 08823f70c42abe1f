"""AdamW's states in 8 bits: beside torchao's own, beside fp32, on several ranks, and through a checkpoint."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from runs import config, read_metrics
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from notus.training import dpo, int8_states, optimizers
from notus.training.checkpoint import Progress, load_checkpoint
from notus.training.checkpoint_writer import Checkpoints
from notus.training.optimizers import AdamW, build_optimizer

pytest.importorskip("torchao")


def quantized(values: torch.Tensor, *, signed: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = int8_states.new_state(nn.Parameter(values.clone()))
    noise = torch.Generator().manual_seed(seed)
    rows = values.reshape(len(values), -1).clone()
    int8_states.quantize(rows, codes.view(len(values), -1), scales, signed=signed, noise=noise)
    return codes, scales


def restored(values: torch.Tensor, *, signed: bool, seed: int = 0) -> torch.Tensor:
    codes, scales = quantized(values, signed=signed, seed=seed)
    return int8_states.dequantize(codes.view(len(values), -1), scales, signed=signed).view(values.shape)


@pytest.mark.parametrize("shape", [(16, 256), (9, 300), (5, 3, 700), (70, 64), (8, 512)])
def test_a_number_is_rounded_to_one_of_the_two_codes_beside_it(shape: tuple[int, ...]) -> None:
    from torchao.optim.quant_utils import create_dynamic_map

    torch.manual_seed(0)
    values = torch.randn(shape) * torch.exp(torch.randn(shape))
    places = torch.tensor(create_dynamic_map(signed=True))
    rows = values.flatten(1)
    for start in range(0, rows.shape[1], 256):
        block = rows[:, start : start + 256]
        scale = block.abs().amax(1, keepdim=True)
        found = restored(values, signed=True).flatten(1)[:, start : start + 256] / scale
        low = (torch.searchsorted(places, block / scale, right=True) - 1).clamp(0, 254)
        away = torch.minimum((found - places[low]).abs(), (found - places[low + 1]).abs())
        assert away.max() < 1e-6
        assert torch.equal(found.abs().amax(1) > 0.99, torch.ones(len(found), dtype=torch.bool))


def test_the_expectation_is_the_number_itself() -> None:
    values = torch.full((1000, 256), 0.3337)
    values[:, 0] = 1.0
    found = restored(values, signed=False)[:, 1:]
    assert len(found.unique()) == 2
    assert found.mean().item() == pytest.approx(0.3337, rel=1e-4)


def test_a_square_does_not_become_zero_and_zero_stays() -> None:
    values = torch.full((16, 256), 1e-12)
    values[:, 0], values[:, 1] = 1.0, 0.0
    found = restored(values, signed=False)
    assert (found[:, 2:] > 0).all()
    assert (found[:, 1] == 0).all()
    assert (restored(torch.zeros(16, 256), signed=False) == 0).all()


def test_squares_of_tiny_gradients_keep_their_resolution() -> None:
    """torchao clips scales at 1e-12, which the squares of a large model's gradients are below."""
    values = torch.rand(16, 256) * 1e-20
    assert ((restored(values, signed=False) - values).norm() / values.norm()).item() < 0.01


def trained(
    kind: object, steps: int, shapes: list[tuple[int, ...]]
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = kind(parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape) * 0.1 + 0.05
        optimizer.step()
    return parameters, optimizer


def ours(parameters: list[nn.Parameter]) -> AdamW:
    return build_optimizer(parameters, name="adamw", learning_rate=1e-2, weight_decay=0.1, state_dtype="int8")


def test_beside_torchaos_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.optim import AdamW8bit

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    shapes = [(64, 256), (48, 512), (10, 10), (4, 3, 1024)]
    for steps, bound in ((1, 2e-5), (2, 0.02), (30, 0.08)):
        (mine, optimizer), (other, theirs) = (
            trained(kind, steps, shapes) for kind in (ours, lambda each: AdamW8bit(each, lr=1e-2, weight_decay=0.1))
        )
        begin, _ = trained(ours, 0, shapes)
        for one, two, start in zip(mine, other, begin, strict=True):
            change, expected = one.detach() - start.detach(), two.detach() - start.detach()
            assert ((change - expected).norm() / expected.norm()).item() < bound
        if steps == 1:  # the averages are the same, rounded at random or to the nearest: at most one code apart
            for one, two in zip(mine, other, strict=True):
                if not optimizer.in_int8(one):
                    torch.testing.assert_close(optimizer.state[one]["exp_avg"], theirs.state[two]["exp_avg"])
                    continue
                for moment in optimizer.moments:
                    codes, stored = optimizer.state[one][moment].int(), theirs.state[two][moment]
                    assert (codes - stored.codes.int()).abs().max() <= 1
                    torch.testing.assert_close(optimizer.state[one][moment + ".scale"].flatten(), stored.scale)


def test_what_is_small_or_a_vector_stays_in_fp32() -> None:
    parameters, optimizer = trained(ours, 1, [(64, 64), (63, 64), (8192,), (4, 3)])
    kept = [optimizer.state[parameter]["exp_avg"].dtype for parameter in parameters]
    assert kept == [torch.uint8, torch.float32, torch.float32, torch.float32]
    assert {key: value.dtype for key, value in optimizer.state[parameters[0]].items() if key != "step"} == {
        "exp_avg": torch.uint8, "exp_avg.scale": torch.float32,
        "exp_avg_sq": torch.uint8, "exp_avg_sq.scale": torch.float32,
    }  # fmt: skip


def test_pieces_of_any_size_are_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the random numbers, which the pieces draw in another order: the first update knows none."""
    shapes = [(16, 700), (3, 5, 512), (5000, 8)]
    whole, _ = trained(ours, 1, shapes)
    monkeypatch.setitem(optimizers.CHUNK, "cpu", 4 * 512)
    pieces, optimizer = trained(ours, 1, shapes)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        for moment in optimizer.moments:
            assert optimizer.state[other][moment + ".scale"].min() > 0


@pytest.mark.parametrize("spread", [1.0, 2.5])
def test_averages_move_and_updates_stay_bounded(spread: float) -> None:
    """Gradients of very different sizes in a block, which all become other ones: rounded to nearest, the averages of
    squares end at 0.73 of what they should be, and some updates are thousands of times too large."""
    torch.manual_seed(0)
    sizes = torch.exp(torch.randn(16, 1024) * spread)
    found = {}
    for dtype in ("fp32", "int8"):
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.zeros(16, 1024))
        optimizer = build_optimizer([parameter], name="adamw", learning_rate=1.0, weight_decay=0, state_dtype=dtype)
        for step in range(1200):
            before = parameter.detach().clone()
            parameter.grad = torch.randn_like(parameter) * (sizes if step < 400 else 0.3 * sizes.flip(1))
            optimizer.step()
            assert (parameter.detach() - before).abs().max() < 40, step
        state = optimizer.state[parameter]
        square = state["exp_avg_sq"]
        if dtype == "int8":
            square = int8_states.dequantize(square, state["exp_avg_sq.scale"], signed=False)
        found[dtype] = square, parameter.detach() - before
    ratio = found["int8"][0] / found["fp32"][0]
    large = found["fp32"][0] > 1e-4 * found["fp32"][0].view(-1, 256).amax(1).repeat_interleave(256).view(16, 1024)
    assert ratio[large].mean().item() == pytest.approx(1.0, abs=0.03)


def test_a_run_ends_as_with_states_in_fp32(tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch) -> None:
    monkeypatch.setattr(int8_states, "SMALLEST", 512)  # the toy's matrices are small
    losses = {}
    for dtype in ("fp32", "int8"):
        job = config("dpo", tmp_path / dtype, model_folder, pairs_file, training__optimizer="adamw",
                     training__optimizer_dtype=dtype, training__epochs=6, training__log_every=1)  # fmt: skip
        assert dpo.run(job) == 0
        losses[dtype] = torch.tensor([line["loss"] for line in read_metrics(tmp_path / dtype)])
    assert losses["fp32"][0] - losses["fp32"][-1] > 0.3  # it learns
    assert not torch.equal(losses["fp32"], losses["int8"])
    assert (losses["fp32"] - losses["int8"]).abs().max().item() < 0.05


# ---- ranks and checkpoints ----

SHAPES = [(1, 5000), (37, 300), (64, 256), (3, 40, 64), (7,), (300, 16)]


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in SHAPES])


def step_of(model: Parts, optimizer: AdamW, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter, shape in zip(model.parts, SHAPES, strict=True):
            gradient = torch.randn(shape, generator=generator)
            if hasattr(parameter, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def built(sharded: bool) -> tuple[Parts, AdamW]:
    model = Parts()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, ours(list(model.parameters()))


def _two_ranks(folder: Path) -> None:
    """The first step is a lone rank's; a checkpoint of two ranks resumes bit for bit; and one rank reads it."""
    model, optimizer = built(sharded=True)
    step_of(model, optimizer, 0, 1)
    alone, single = built(sharded=False)
    step_of(alone, single, 0, 1)
    for one, other in zip(model.parts, alone.parts, strict=True):
        torch.testing.assert_close(whole(one), other, rtol=1e-6, atol=1e-7)
        for key, value in optimizer.state[one].items():
            if key.endswith(".scale"):  # the same blocks
                torch.testing.assert_close(whole(value), single.state[other][key])
            elif single.state[other][key].dtype == torch.uint8:
                assert (whole(value).int() - single.state[other][key].int()).abs().max() <= 1
    step_of(model, optimizer, 1, 4)
    checkpoints = Checkpoints(folder, torch.device("cpu"), background=False, keep=None, keep_every=None)
    checkpoints.save(Progress(step=4), model.named_parameters(), optimizer)
    checkpoints.wait()
    fresh, resumed = built(sharded=True)
    assert load_checkpoint(folder / "step-00000004", fresh.named_parameters(), resumed).step == 4
    for going_on in ((model, optimizer), (fresh, resumed)):
        step_of(*going_on, 4, 6)
    for one, other in zip(model.parts, fresh.parts, strict=True):
        assert torch.equal(one.to_local(), other.to_local())
        for key, value in optimizer.state[one].items():
            assert torch.equal(whole(value), whole(resumed.state[other][key]))
    torch.save([{key: whole(value) for key, value in optimizer.state[each].items()} for each in model.parts],
               folder / f"rank{dist.get_rank()}.pt")  # fmt: skip
    checkpoints.save(Progress(step=6), model.named_parameters(), optimizer)


@pytest.mark.slow
def test_two_ranks_and_a_checkpoint_that_one_rank_reads(tmp_path: Path, device: torch.device) -> None:
    run_ranks(_two_ranks, 2, tmp_path, tmp_path)
    model, optimizer = built(sharded=False)
    load_checkpoint(tmp_path / "step-00000006", model.named_parameters(), optimizer)
    for parameter, written in zip(model.parts, torch.load(tmp_path / "rank0.pt"), strict=True):
        for key, value in optimizer.state[parameter].items():
            assert value.dtype == written[key].dtype
            assert torch.equal(value, written[key]), key


@pytest.mark.parametrize(("written", "now"), [("int8", "fp32"), ("bf16", "int8"), ("fp32", "bf16")])
def test_states_of_another_dtype_are_refused(written: str, now: str, tmp_path: Path, device: torch.device) -> None:
    model = Parts()
    options = {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.0}
    optimizer = build_optimizer(model.parameters(), state_dtype=written, **options)
    checkpoints = Checkpoints(tmp_path, torch.device("cpu"), background=False, keep=None, keep_every=None)
    checkpoints.save(Progress(step=1), model.named_parameters(), optimizer)
    other = build_optimizer(model.parameters(), state_dtype=now, **options)
    with pytest.raises(ValueError, match=f"written with training.optimizer_dtype={written}, not {now}"):
        load_checkpoint(tmp_path / "step-00000001", model.named_parameters(), other)


def test_without_torchao_a_run_ends_before_data_is_read(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", None)
    job = config("dpo", tmp_path / "run", model_folder, tmp_path / "none.jsonl", training__optimizer="adamw",
                 training__optimizer_dtype="int8")  # fmt: skip
    with pytest.raises(ValueError, match=r'optimizer_dtype=int8 needs torchao.*pip install "notus-dpo\[int8\]"'):
        dpo.run(job)
