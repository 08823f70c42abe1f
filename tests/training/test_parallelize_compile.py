"""Compiled blocks, on backends that need no C++ compiler."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import free_ports, launched, run_ranks
from runs import config, read_metrics
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.tensor import DTensor
from toys import toy_examples, toy_model_folder

from notus.config import LoraConfig
from notus.data.packing import Batch, collate
from notus.model import attention, compiled_attention
from notus.model import attention_variants as variants
from notus.model.compiled_attention import check_graph_attention
from notus.model.policy import Policy
from notus.runtime import switches
from notus.training.dpo import run
from notus.training.parallelize import build_policy, read_model_config

ADAPTER = LoraConfig(rank=2, alpha=4, dropout=0.0, target_modules=["q_proj", "down_proj"], rslora=False)


class _Compiler:
    """Keeps the number of matrix products of each forward and backward graph that is compiled."""

    def __init__(self) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []
        self._inner = aot_autograd(
            fw_compiler=functools.partial(self._graph, self.forward),
            bw_compiler=functools.partial(self._graph, self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    @staticmethod
    def _graph(products: list[int], graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        count = sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes)
        if count:  # else it is attention alone, which is tried at the start
            products.append(count)
        return make_boxed_func(graph.forward)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return self._inner(graph, inputs)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> _Compiler:
    torch._dynamo.reset()
    found = _Compiler()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=found))
    return found


def _rows(count: int) -> list[Batch]:
    """Rows of 1 to 4 pairs, of many lengths."""
    generator = np.random.default_rng(0)
    lengths = [generator.integers(2, 20, (generator.integers(1, 5), 3)).tolist() for _ in range(count)]
    return [collate(toy_examples(*((trunk, branches) for trunk, *branches in row)), 2) for row in lengths]


def _policy(folder: Path, device: torch.device, **options: Any) -> Policy:
    policy = build_policy(folder, read_model_config(folder), device=device, precision="fp32", **options)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("lora_B"):
                parameter.fill_(0.1)
    return policy.train()


def _step(policy: Policy, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    policy.zero_grad()
    logps = policy(batch)
    logps.sum().backward()
    found = [parameter.grad for parameter in policy.parameters() if parameter.requires_grad]
    return logps.detach(), [grad.to_local() if isinstance(grad, DTensor) else grad for grad in found]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, longest: int, longest_key: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch's varlen attention computes, by operations that the compiler sees."""
    place, key_place = torch.arange(len(query)), torch.arange(len(key))
    segment, key_segment = (
        torch.searchsorted(ends[1:], where.int(), right=True)
        for ends, where in ((starts, place), (key_starts, key_place))
    )
    before_end, key_before_end = starts[segment + 1] - place, key_starts[key_segment + 1] - key_place
    seen = (segment[:, None] == key_segment) & (key_before_end >= before_end[:, None])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


def _use_cudas_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kernel_for", lambda device, dtype: ("varlen", attention.varlen_kernel))
    monkeypatch.setattr(attention, "varlen_attn", _varlen)
    monkeypatch.setattr(variants, "TOLD_OF_GROUPS", True)


# The two ways in which compiled blocks compute attention; "graph" is CUDA's, with a stand-in for its kernel. What is
# computed again without attention, and what adapters add, is the same in both.
@pytest.mark.parametrize(
    ("attention_kind", "mode", "adapter", "again"),
    [
        ("operator", "products", None, 0),
        ("operator", "full", None, 6),
        ("operator", "selective", ADAPTER, 3),
        ("graph", "selective", None, 3),
    ],
)
def test_compiled_is_eager_and_other_rows_do_not_compile_again(
    attention_kind: str,
    mode: str,
    adapter: LoraConfig | None,
    again: int,
    monkeypatch: pytest.MonkeyPatch,
    compiler: _Compiler,
    tmp_path: Path,
    device: torch.device,
) -> None:
    if attention_kind == "graph":
        _use_cudas_attention(monkeypatch)
    folder = toy_model_folder(tmp_path / "model", num_hidden_layers=3, head_dim=16)
    options = {"activation_checkpointing": mode, "lora": adapter}
    policy, plain = _policy(folder, device, compile=True, **options), _policy(folder, device, **options)
    for number, batch in enumerate(_rows(12)):
        logps, gradients = _step(policy, batch)
        if number % 5 == 0:
            expected, wanted = _step(plain, batch)
            torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
            for found, right in zip(gradients, wanted, strict=True):
                assert (found - right).norm() <= 1e-5 * right.norm() + 1e-7
    # One graph for three blocks and many rows; beside a frozen embedding the first block's input needs no gradient.
    graphs = 1 if adapter is None else 2
    assert len(compiler.forward) == graphs
    if adapter is None:  # seven products, of which each has two in its backward pass
        assert compiler.backward == [14 + again]
    with torch.no_grad():
        policy.eval()
        for batch in _rows(2):
            torch.testing.assert_close(policy(batch), plain(batch), rtol=1e-5, atol=1e-4)
    assert len(compiler.forward) == graphs + 1  # without gradients, once more


@pytest.mark.slow
def test_lists_of_different_length_do_not_compile_again(
    compiler: _Compiler, tmp_path: Path, device: torch.device
) -> None:
    folder = toy_model_folder(tmp_path / "model", head_dim=16)
    policy, plain = (_policy(folder, device, compile=each) for each in (True, False))
    for lengths in (
        [(9, (4, 6, 3)), (5, (7, 2))],
        [(4, (5, 3, 2, 9, 6, 4, 3, 8))],
        [(6, (5, 3)), (7, (2, 4))],
        [(6, (5, 3)), (3, (2, 4, 6, 9)), (8, (2,))],
    ):
        batch = collate(toy_examples(*lengths), 8)
        logps, gradients = _step(policy, batch)
        expected, wanted = _step(plain, batch)
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
        for found, right in zip(gradients, wanted, strict=True):
            assert (found - right).norm() <= 1e-5 * right.norm() + 1e-7
    assert len(compiler.forward) == len(compiler.backward) == 1


def _train(folder: Path, model: Path, pairs: Path, ports: list[int]) -> None:
    torch.compile = functools.partial(torch.compile, backend="eager")  # in this process alone
    for name, port in zip(("plain", "compiled"), ports, strict=True):
        job = config("dpo", folder / name, model, pairs, training__compile=name == "compiled", training__batch_size=6,
                     training__activation_checkpointing="selective", tracking__samples=3)  # fmt: skip
        with launched(port):
            assert run(job) == 0


def test_a_compiled_run_on_two_ranks(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    run_ranks(_train, 2, tmp_path, tmp_path, model_folder, pairs_file, free_ports(2))
    plain, compiled = (read_metrics(tmp_path / name) for name in ("plain", "compiled"))
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], rel=1e-4)
    assert (tmp_path / "compiled" / "samples.jsonl").read_text() == (tmp_path / "plain" / "samples.jsonl").read_text()
    references = {path.name for name in ("plain", "compiled") for path in (tmp_path / name / "reference").iterdir()}
    assert len(references) == 2  # compiled kernels may round otherwise: a cache of its own


def test_the_operator_is_not_in_the_graph_of_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: torch.device
) -> None:
    def operators(*disabled: str) -> set[str]:
        found: set[str] = set()

        def look(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            found.update(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=aot_autograd(fw_compiler=look)))
        with switches.disabled(*disabled):
            policy = _policy(folder, device, compile=True)
            _step(policy, _rows(1)[0])
        return {name for name in found if name.startswith("notus")}

    compile_, folder = torch.compile, toy_model_folder(tmp_path / "model", head_dim=16)
    _use_cudas_attention(monkeypatch)
    assert operators() == {"notus.gather_keys.default", "notus.gather_keys_backward.default"}
    assert operators("graph_attention") == {"notus.packed_attention.default", "notus.packed_attention_backward.default"}


def test_where_the_compiler_cannot_have_the_kernel_blocks_get_the_operator(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "window": None}
    cpu = torch.device("cpu")
    assert check_graph_attention(cpu, torch.float32, **sizes, gather=lambda mine: [mine]) == []  # no kernel to see
    _use_cudas_attention(monkeypatch)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_attention, "_failure", None)
    assert check_graph_attention(cpu, torch.float32, **sizes, gather=lambda mine: [mine]) == []
    monkeypatch.setattr(attention, "varlen_attn", lambda *args, **options: 1.1 * _varlen(*args, **options))
    torch._dynamo.reset()
    (told,) = check_graph_attention(cpu, torch.float32, **sizes, gather=lambda mine: [mine])
    assert told.startswith("compiled blocks do not see the attention kernel: its relative error is 1.0e-01")
    assert compiled_attention.compiled_implementation(cpu, torch.float32) == compiled_attention.HIDDEN
