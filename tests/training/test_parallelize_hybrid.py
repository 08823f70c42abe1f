"""Hybrid sharding: two nodes of two ranks do what one rank does, and what full sharding does."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import free_ports, launched, run_ranks
from runs import config, read_metrics, read_samples, settings
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import Replicate, Shard

from notus.config import config_from_dict
from notus.model.export import export_model, load_tokenizer
from notus.model.load import weights_digest
from notus.model.policy import Policy
from notus.runtime.distributed import ranks_per_node
from notus.training import dpo
from notus.training.gradient_clipping import is_first_replica
from notus.training.parallelize import build_policy, read_model_config

KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora__rank": 3}}
COMMON = {
    "training__max_steps": 4, "data__eval_size": 5, "training__save_every": 2, "training__keep_checkpoints": None,
    "tracking__samples": 3, "tracking__sample_tokens": 5,
}  # fmt: skip
STEP_2 = Path("checkpoints") / "step-00000002"


def _runs(trees: list[dict[str, Any]], ports: list[int]) -> None:
    for tree, port in zip(trees, ports, strict=True):
        with launched(port, per_node=2):
            dpo.run(config_from_dict(tree, "dpo"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, pairs_file: Path) -> Path:
    """A folder of finished runs, named by their kind of training and by their layout."""
    top = tmp_path_factory.mktemp("runs")

    def launch(world_size: int, *layouts: tuple[str, str, str | None]) -> None:
        """Runs of (layout, sharding, layout whose step 2 they go on from), each full and LoRA, on so many ranks."""
        trees = []
        for kind, overrides in KINDS.items():
            for name, sharding, origin in layouts:
                resume = str(top / f"{kind}-{origin}" / STEP_2) if origin else "auto"
                more = {**COMMON, **overrides, "training__sharding": sharding, "training__resume": resume}
                trees.append(settings(top / f"{kind}-{name}", model_folder, pairs_file, **more))
        run_ranks(_runs, world_size, top, trees, free_ports(len(trees)))

    for kind, overrides in KINDS.items():
        dpo.run(config("dpo", top / f"{kind}-one", model_folder, pairs_file, **COMMON, **overrides))
    launch(2, ("two", "full", None))
    launch(4, ("four", "full", None), ("hybrid", "hybrid", None), ("hybrid-from-two", "hybrid", "two"))
    launch(2, ("two-from-hybrid", "full", "hybrid"))
    return top


def _weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "model").glob("*model.safetensors")
    return load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["four", "hybrid", "hybrid-from-two", "two-from-hybrid"])
def test_every_layout_learns_the_same(kind: str, layout: str, runs: Path, model_folder: Path) -> None:
    one, other = runs / f"{kind}-one", runs / f"{kind}-{layout}"
    lines, expected = read_metrics(other), read_metrics(one)[-len(read_metrics(other)) :]
    assert [line["step"] for line in lines] == ([3, 4] if "from" in layout else [1, 2, 3, 4])
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in expected], rel=1e-5), key
    for key in ("rewards/margins", "num_tokens"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in expected], abs=2e-5), key
    assert lines[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], abs=2e-5)
    samples = [[line for line in read_samples(run) if line["step"] == 4] for run in (one, other)]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 3
    start, wanted = load_file(model_folder / "model.safetensors"), _weights(one)
    for name, found in _weights(other).items():
        moved = (wanted[name] - start.get(name, torch.zeros(()))).norm()
        assert (found - wanted[name]).norm() < 1e-4 * moved, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_each_shard_once(kind: str, runs: Path) -> None:
    def bytes_held(run: str) -> int:
        files = sorted((runs / f"{kind}-{run}" / STEP_2).glob("*.safetensors"))
        return sum(_tensor_bytes(path) for path in files)

    assert bytes_held("hybrid") == bytes_held("one") > 0


def _tensor_bytes(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return sum(tensor.numel() * tensor.element_size() for tensor in map(file.get_tensor, file.keys()))


def _export(model_folder: Path, target: Path, device: torch.device, sharding: str) -> Policy:
    model_config = read_model_config(model_folder)
    policy = build_policy(model_folder, model_config, device=device, precision="fp32", sharding=sharding)
    tokenizer = load_tokenizer(model_folder, False)
    export_model(policy.causal_lm, target, hf_config=model_config, tokenizer=tokenizer, dtype=torch.float32)
    return policy


def _on_two_nodes(model_folder: Path, target: Path) -> None:
    rank = dist.get_rank()
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    policy = _export(model_folder, target, torch.device("cpu"), "hybrid")
    head = policy.causal_lm.lm_head.weight
    assert head.placements == (Replicate(), Shard(0))
    assert head.to_local().shape[0] == head.shape[0] // 2
    assert is_first_replica(policy.parameters()) == (rank < 2)
    os.environ["LOCAL_WORLD_SIZE"] = "1" if rank == 0 else "3"
    with pytest.raises(ValueError, match=r"same number of ranks on every node, not \[1, 3\] of 4 .*sharding=full"):
        ranks_per_node()
    os.environ["LOCAL_WORLD_SIZE"] = "3"
    with pytest.raises(ValueError, match=r"not \[3\] of 4"):
        ranks_per_node()
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    with pytest.raises(ValueError, match="has no effect on one node"):
        ranks_per_node()


def test_what_is_loaded_by_slices_is_exported_whole(tmp_path: Path, model_folder: Path, device: torch.device) -> None:
    run_ranks(_on_two_nodes, 4, tmp_path, model_folder, tmp_path / "hybrid")
    _export(model_folder, tmp_path / "one", device, "full")
    assert weights_digest(tmp_path / "hybrid") == weights_digest(tmp_path / "one")


def test_one_node_refuses_hybrid_before_the_data_is_read(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ValueError, match="no effect on one node"):
        dpo.run(config("dpo", tmp_path / "run", model_folder, tmp_path / "none", training__sharding="hybrid"))
