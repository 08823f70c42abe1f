import json
from pathlib import Path

import pytest
import torch
from torch import nn

from notus.training.checkpoint import Progress, latest_checkpoint, load_checkpoint, save_checkpoint


def _stepped(name: str, seed: int) -> tuple[list[tuple[str, nn.Parameter]], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    parameters = [
        ("weight", nn.Parameter(torch.randn(3, 2))),
        ("frozen", nn.Parameter(torch.randn(2), requires_grad=False)),
    ]
    kind = {"rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW}[name]
    optimizer = kind([parameters[0][1]], lr=0.1)
    for _ in range(seed):
        parameters[0][1].grad = torch.randn(3, 2)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_goes_on_as_if_it_had_not_stopped(name: str, tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped(name, seed=3)
    path = save_checkpoint(tmp_path, Progress(3, 99, [1.5]), parameters, optimizer, keep=None)
    others, fresh = _stepped(name, seed=0)
    progress = load_checkpoint(path, others, fresh)
    assert progress == Progress(step=3, num_tokens=99, window_sums=[1.5])
    gradient = torch.randn(3, 2)
    for (_, parameter), stepping in ((parameters[0], optimizer), (others[0], fresh)):
        parameter.grad = gradient.clone()
        stepping.step()
    assert torch.equal(parameters[0][1], others[0][1])


def test_frozen_parameters_are_left_out(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer, keep=None)
    others, fresh = _stepped("rmsprop", seed=0)
    before = others[1][1].clone()
    load_checkpoint(path, others, fresh)
    assert torch.equal(others[1][1], before)


def test_the_newest_are_kept_by_step(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, Progress(step), parameters, optimizer, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000100"


def test_a_half_written_one_is_not_seen(tmp_path: Path, device: torch.device) -> None:
    (tmp_path / ".step-00000007.partial").mkdir()
    assert latest_checkpoint(tmp_path) is None
    parameters, optimizer = _stepped("rmsprop", seed=1)
    save_checkpoint(tmp_path, Progress(7), parameters, optimizer, keep=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_saving_a_step_again_replaces_it(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    save_checkpoint(tmp_path, Progress(7, 1), parameters, optimizer, keep=None)
    path = save_checkpoint(tmp_path, Progress(7, 2), parameters, optimizer, keep=None)
    assert load_checkpoint(path, parameters, optimizer).num_tokens == 2


def test_another_optimizer_is_refused(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer, keep=None)
    with pytest.raises(ValueError, match="written with RMSprop, not AdamW"):
        load_checkpoint(path, *_stepped("adamw", seed=0))


def test_a_damaged_state_file_is_named(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer, keep=None)
    (path / "state.json").write_text('{"optimizer": "RMS')
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        load_checkpoint(path, parameters, optimizer)
    for content in ("{}", "[]", '{"format": 1, "optimizer": "RMSprop", "progress": {"steps": 1}}', '{"format": 9}'):
        (path / "state.json").write_text(content)
        with pytest.raises(ValueError, match=r"state\.json is damaged"):
            load_checkpoint(path, parameters, optimizer)
    (path / "state.json").unlink()
    with pytest.raises(ValueError, match=r"has no state\.json"):
        load_checkpoint(path, parameters, optimizer)


def test_a_truncated_tensor_file_is_named(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer, keep=None)
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        load_checkpoint(path, parameters, optimizer)


def test_another_models_checkpoint_is_refused(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("rmsprop", seed=1)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer, keep=None)
    other = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        load_checkpoint(path, [("bias", other)], torch.optim.RMSprop([other]))


def test_nothing_on_disk_needs_unpickling(tmp_path: Path, device: torch.device) -> None:
    parameters, optimizer = _stepped("adamw", seed=1)
    path = save_checkpoint(tmp_path, Progress(1), parameters, optimizer, keep=None)
    names = sorted(file.suffix for file in path.iterdir())
    assert names == [".json", ".safetensors"]
    assert json.loads((path / "state.json").read_text())["optimizer"] == "AdamW"
