import functools
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.distributed.tensor import DTensor
from toys import toy_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from notus.config import LoraConfig
from notus.data.batching import step_rows
from notus.data.dataset import TokenizedDataset
from notus.data.packing import Batch
from notus.data.tokenize import load_pairs
from notus.model.policy import Policy
from notus.runtime import switches
from notus.runtime.distributed import rank, world_size
from notus.training.parallelize import build_policy, expect_last_row, hand_over_gradients, read_model_config
from notus.training.scoring import score


def _policy(folder: Path, device: torch.device, **options: object) -> Policy:
    settings: dict[str, object] = {"device": device, "precision": "fp32", **options}
    return build_policy(folder, read_model_config(folder), **settings)  # type: ignore[arg-type]


def _rows(folder: Path, pairs: Path) -> TokenizedDataset:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TokenizedDataset(load_pairs(pairs, tokenizer, max_length=120, max_prompt_length=60)[0])


def _score(policy: Policy, rows: TokenizedDataset, device: torch.device) -> torch.Tensor:
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


@pytest.mark.parametrize("checkpointing", ["none", "products"])
def test_a_policy_that_nobody_holds_is_freed_with_the_garbage(
    checkpointing: str, model_folder: Path, pairs_file: Path, device: torch.device
) -> None:
    policy = _policy(model_folder, device, activation_checkpointing=checkpointing)
    (batch,) = step_rows(_rows(model_folder, pairs_file), np.arange(3), rank=0, world_size=1, tokens_per_row=400)
    policy(batch).sum().backward()
    weights = [weakref.ref(parameter) for parameter in policy.parameters()]
    del policy
    gc.collect()
    assert [weight() for weight in weights if weight() is not None] == []


def test_a_fresh_adapter_changes_nothing_and_alone_is_trained(
    model_folder: Path, pairs_file: Path, device: torch.device
) -> None:
    adapter = LoraConfig(rank=2, alpha=4, dropout=0.0, target_modules=["q_proj", "v_proj"], rslora=False)
    policy, rows = _policy(model_folder, device, lora=adapter), _rows(model_folder, pairs_file)
    assert torch.equal(_score(policy, rows, device), _score(_policy(model_folder, device), rows, device))
    trainable = {name.rpartition(".")[2] for name, p in policy.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}


@pytest.mark.parametrize(("trainable", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_masters_are_fp32_and_a_frozen_policy_is_not(
    trainable: bool, dtype: torch.dtype, model_folder: Path, device: torch.device
) -> None:
    policy = _policy(model_folder, device, precision="bf16", trainable=trainable)
    assert {parameter.dtype for parameter in policy.parameters()} == {dtype}


def _step_gradients(policy: Policy, rows: TokenizedDataset, steps: int = 2) -> list[dict[str, torch.Tensor]]:
    """The gradients of some steps of several rows, as the loop takes them; a plain update between the steps."""
    found = []
    for _ in range(steps):
        batches = list(step_rows(rows, np.arange(6), rank=0, world_size=1, tokens_per_row=70))
        assert len(batches) >= 2
        for number, batch in enumerate(batches):
            expect_last_row(policy, number == len(batches) - 1)
            policy(batch).sum().backward()
        hand_over_gradients(policy)
        trained = {name: each for name, each in policy.named_parameters() if each.grad is not None}
        found.append({name: each.grad.to_local().clone() for name, each in trained.items()})
        with torch.no_grad():
            for parameter in trained.values():
                parameter.to_local().sub_(parameter.grad.to_local(), alpha=1e-3)
                parameter.grad = None
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_a_lone_rank_takes_over_the_gradients_that_fsdp_would_reduce(
    kind: str, precision: str, tmp_path: Path, pairs_file: Path, device: torch.device
) -> None:
    folder = toy_model_folder(tmp_path / "model", tie_word_embeddings=kind == "tied")
    rows = _rows(folder, pairs_file)
    adapter = LoraConfig(rank=2, alpha=4, dropout=0.0, target_modules=["q_proj", "v_proj"], rslora=False)
    options = {"precision": precision, "lora": adapter if kind == "lora" else None}
    found = _step_gradients(_policy(folder, device, **options), rows)
    with switches.disabled("gradient_handover"):
        expected = _step_gradients(_policy(folder, device, **options), rows)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert len(one) == sum(parameter.requires_grad for parameter in _policy(folder, device, **options).parameters())
        for name, wanted in other.items():
            assert one[name].dtype == torch.float32
            assert one[name].abs().sum() > 0 or "lora_A" in name  # B is zero at first
            assert torch.equal(one[name], wanted), name


def test_the_gradient_handed_over_is_the_one_that_was_added_up(
    model_folder: Path, pairs_file: Path, device: torch.device
) -> None:
    policy, rows = _policy(model_folder, device, precision="bf16"), _rows(model_folder, pairs_file)
    (batch,) = step_rows(rows, np.arange(2), rank=0, world_size=1, tokens_per_row=400)
    expect_last_row(policy, True)
    policy(batch).sum().backward()
    group = policy.blocks[0]._get_fsdp_state()._fsdp_param_group
    places = {parameter.unsharded_accumulated_grad.data_ptr() for parameter in group.fsdp_params}
    hand_over_gradients(policy)
    assert {parameter.grad.to_local().data_ptr() for parameter in policy.blocks[0].parameters()} == places
    assert all(isinstance(parameter.data, DTensor) for parameter in policy.parameters())


# ---- token by token ----

METHODS = ("forward", "token_logprobs", "token_statistics")


def _sums(policy: Policy, batch: Batch, method: str) -> torch.Tensor:
    """[E, K]: the completions' log-probs by one of `METHODS`, which give sums or something of each token."""
    if method == "forward":
        return policy(batch)
    found = getattr(policy, method)(batch)
    if method == "token_statistics":
        found, collisions = found
        assert collisions.shape == found.shape
        assert not collisions.requires_grad
    sums = torch.segment_reduce(found, "sum", lengths=batch.lengths.flatten(), unsafe=True)
    return sums.view(batch.lengths.shape)


def _two_steps(policy: Policy, rows: TokenizedDataset, method: str) -> list[dict[str, torch.Tensor]]:
    """This rank's gradients of two steps of several rows, a plain update between them."""
    found = []
    for _ in range(2):
        batches = list(step_rows(rows, np.arange(9), rank=rank(), world_size=world_size(), tokens_per_row=70))
        assert len(batches) >= 2
        for number, batch in enumerate(batches):
            if world_size() == 1:
                expect_last_row(policy, number == len(batches) - 1)
            logps = _sums(policy, batch, method) * batch.weights[:, None]
            torch.nn.functional.softplus(0.1 * (logps[:, 1] - logps[:, 0])).sum().backward()
        if world_size() == 1:
            hand_over_gradients(policy)
        trained = {name: each for name, each in policy.named_parameters() if each.grad is not None}
        found.append({name: each.grad.to_local().clone() for name, each in trained.items()})
        with torch.no_grad():
            for parameter in trained.values():
                parameter.to_local().sub_(parameter.grad.to_local(), alpha=1e-2)
                parameter.grad = None
    return found


def _check_methods(folder: Path, pairs: Path, device: torch.device, **options: object) -> None:
    rows = _rows(folder, pairs)
    expected, *others = (_two_steps(_policy(folder, device, **options), rows, method) for method in METHODS)
    for found in others:
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            for name, wanted in other.items():
                assert one[name].any() or "lora_A" in name  # B is zero at first
                assert torch.equal(one[name], wanted), name


# what differs in how a gradient comes about
OPTIONS: dict[str, dict[str, object]] = {
    "none": {},
    "products": {"activation_checkpointing": "products"},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "bf16": {"activation_checkpointing": "full", "precision": "bf16"},
    "compiled, full": {"compile": True, "activation_checkpointing": "full"},
    "plain path": {"path": "plain", "longest": 120},
    "adapters": {"lora": LoraConfig(rank=2, alpha=4, dropout=0.0, target_modules=["q_proj", "v_proj"], rslora=False)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_through_tokens_are_those_through_sums(
    name: str, model_folder: Path, pairs_file: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    _check_methods(model_folder, pairs_file, device, **OPTIONS[name])


def _check_methods_sharded(folder: Path, pairs: Path, names: list[str]) -> None:
    torch.compile = functools.partial(torch.compile, backend="eager")  # in this process alone
    for name in names:
        _check_methods(folder, pairs, torch.device("cpu"), **OPTIONS[name])


COMPILED = [name for name, options in OPTIONS.items() if "compile" in options]


@pytest.mark.parametrize(
    "names", [[name for name in OPTIONS if name not in COMPILED], pytest.param(COMPILED, marks=pytest.mark.slow)]
)
def test_gradients_through_tokens_are_those_through_sums_on_two_ranks(
    names: list[str], tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    run_ranks(_check_methods_sharded, 2, tmp_path, model_folder, pairs_file, names)


def _statistics_of_both_ranks(folder: Path, pairs: Path, expected: Path) -> None:
    policy, rows = _policy(folder, torch.device("cpu")), _rows(folder, pairs)
    (batch,) = step_rows(rows, np.arange(4), rank=0, world_size=1, tokens_per_row=1000)
    logps, collisions = policy.token_statistics(batch)
    wanted = torch.load(expected, weights_only=True)
    torch.testing.assert_close(torch.stack([logps.detach(), collisions]), wanted, rtol=1e-6, atol=1e-6)


def test_statistics_of_a_sharded_policy_are_those_of_the_model(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    rows = _rows(model_folder, pairs_file)
    (batch,) = step_rows(rows, np.arange(4), rank=0, world_size=1, tokens_per_row=1000)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    found, place = [], 0
    for example in rows(batch.indices.numpy()):
        for branch, mask in zip(example.branches, example.loss_masks, strict=True):
            ids = torch.tensor([*example.trunk, *branch])
            logits = model(input_ids=ids[None]).logits[0].double()
            learned = len(example.trunk) + torch.from_numpy(mask.nonzero()[0])
            before = logits[learned - 1]
            logps = before.log_softmax(-1).gather(-1, ids[learned, None]).squeeze(-1)
            found.append(torch.stack([logps, torch.logsumexp(2 * before, -1) - 2 * torch.logsumexp(before, -1)]))
            place += len(learned)
    assert place == len(batch.targets)
    torch.save(torch.cat(found, dim=1).detach().float(), tmp_path / "expected.pt")
    run_ranks(_statistics_of_both_ranks, 2, tmp_path, model_folder, pairs_file, tmp_path / "expected.pt")
