from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from notus.data.dataset import load_pairs
from notus.data.rows import Rows
from notus.model.policy import Policy
from notus.training.build import Adapter, build_policy, read_model_config
from notus.training.scoring import score


def _policy(folder: Path, device: torch.device, **options: object) -> Policy:
    settings: dict[str, object] = {"device": device, "precision": "fp32", **options}
    return build_policy(folder, read_model_config(folder), **settings)  # type: ignore[arg-type]


def _rows(folder: Path, pairs: Path) -> Rows:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Rows(load_pairs(pairs, tokenizer, max_length=120, max_prompt_length=60)[0])


def _score(policy: Policy, rows: Rows, device: torch.device) -> torch.Tensor:
    return score(policy, rows, np.arange(6), tokens_per_row=100, device=device)


def test_names_stay_hugging_faces(model_folder: Path, device: torch.device) -> None:
    policy = _policy(model_folder, device, activation_checkpointing="full")
    expected = dict(AutoModelForCausalLM.from_pretrained(model_folder).named_parameters())
    found = dict(policy.causal_lm.named_parameters())
    assert list(found) == list(expected)
    for name, parameter in found.items():
        assert torch.equal(parameter.full_tensor(), expected[name]), name


def test_checkpointing_computes_each_block_once_more(
    model_folder: Path, pairs_file: Path, device: torch.device
) -> None:
    from notus.data.rows import step_rows

    rows = _rows(model_folder, pairs_file)
    calls = {}
    for checkpointing in ("none", "full"):
        policy = _policy(model_folder, device, activation_checkpointing=checkpointing)
        count: list[int] = []
        mlp = policy.blocks[0].mlp
        mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        (batch,) = step_rows(rows, np.arange(3), rank=0, world_size=1, tokens_per_row=400)
        policy(batch).sum().backward()
        calls[checkpointing] = len(count)
    assert calls == {"none": 1, "full": 2}


def test_after_a_scoring_pass_the_masters_are_in_place_and_their_changes_seen(
    model_folder: Path, pairs_file: Path, device: torch.device
) -> None:
    policy, rows = _policy(model_folder, device, precision="bf16"), _rows(model_folder, pairs_file)
    before = _score(policy, rows, device)
    assert {(type(parameter.data), parameter.dtype) for parameter in policy.parameters()} == {(DTensor, torch.float32)}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(_score(policy, rows, device), before, atol=1e-2)


def test_scores_do_not_depend_on_the_rows_they_share(
    model_folder: Path, pairs_file: Path, device: torch.device
) -> None:
    policy, rows = _policy(model_folder, device), _rows(model_folder, pairs_file)
    together = _score(policy, rows, device)
    alone = torch.cat([score(policy, rows, np.array([i]), tokens_per_row=10_000, device=device) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_alone_is_trained(
    model_folder: Path, pairs_file: Path, device: torch.device
) -> None:
    adapter = Adapter(rank=2, alpha=4, dropout=0.0, target_modules=["q_proj", "v_proj"], rslora=False)
    policy, rows = _policy(model_folder, device, adapter=adapter), _rows(model_folder, pairs_file)
    assert torch.equal(_score(policy, rows, device), _score(_policy(model_folder, device), rows, device))
    trainable = {name.rpartition(".")[2] for name, p in policy.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}


@pytest.mark.parametrize(("trainable", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_masters_are_fp32_and_a_frozen_policy_is_not(
    trainable: bool, dtype: torch.dtype, model_folder: Path, device: torch.device
) -> None:
    policy = _policy(model_folder, device, precision="bf16", trainable=trainable)
    assert {parameter.dtype for parameter in policy.parameters()} == {dtype}
