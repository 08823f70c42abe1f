"""What the packed path does on CUDA alone, without a GPU.

Its forward passes run on fake CUDA tensors, which an index left on the host or a wrong dtype would stop. Its backward
passes run on the CPU with the branches of CUDA taken: with values where the CPU has the same operators, on fake tensors
where it has not.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import _config as symbols
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toys import toy_examples, toy_model

from notus.data.packing import build_layout, collate
from notus.model import attention
from notus.model import attention_variants as variants
from notus.model.attention import IMPLEMENTATION, packed_attention
from notus.model.compiled_attention import graph_attention
from notus.model.fused import fuse
from notus.model.logprobs import _HeadLogprobs, _LinearLogprobs, full_logprobs, linear_logprobs, linear_statistics
from notus.model.policy import Policy


class Calls(TorchDispatchMode):
    """The arguments of every call of one operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.found = operator, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.operator._opoverload:
            self.found.append(args)
        return func(*args, **(kwargs or {}))


class TakenForCuda(TorchFunctionMode):
    """CPU tensors say that they are on CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return True if func is Tensor.is_cuda.__get__ else func(*args, **(kwargs or {}))


class Context(SimpleNamespace):
    """What autograd hands to a function's forward and backward."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        self.without_gradient = tensors


def row(kv_heads=2, **overrides):
    """A policy on toy Mistral, and a packed row of three pairs."""
    model = toy_model(num_key_value_heads=kv_heads, **overrides)
    model.set_attn_implementation(IMPLEMENTATION)
    fuse(model)
    return Policy(model), collate(toy_examples((20, (4, 9)), (1, (1, 5)), (33, (7, 3))), 2)


def test_lists_of_different_length_are_one_call_too():
    layout = build_layout([5, 3], [[4, 6, 1], [2]])
    with fake_cuda() as waits, Calls(varlen._varlen_attn) as calls:
        query = torch.empty(1, 4, 21, 16, dtype=torch.bfloat16, device=CUDA)
        on_device = layout.map(waits.pin).to(CUDA)
        out, _ = packed_attention(torch.nn.Identity(), query, query, query, None, layout=on_device)
        assert (out.shape, waits.found) == ((1, 21, 4, 16), [])
    ((_, keys, _, starts, key_starts, longest_query, longest_key, *_),) = calls.found
    assert (len(keys), len(starts), len(key_starts)) == (9 + 11 + 6 + 5, 5, 5)
    assert (longest_query, longest_key) == (9, 11)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_bf16_attention_is_one_call_of_flash_attention(kv_heads, window):
    layout = build_layout([5, 3], [[4, 6], [2, 7]])
    with fake_cuda() as waits, Calls(varlen._varlen_attn) as calls:
        query = torch.empty(1, 4, 27, 16, dtype=torch.bfloat16, device=CUDA)
        key = torch.empty(1, kv_heads, 27, 16, dtype=torch.bfloat16, device=CUDA)
        on_device = layout.map(waits.pin).to(CUDA)
        out, _ = packed_attention(
            torch.nn.Identity(), query, key, key, None, scaling=0.25, layout=on_device, sliding_window=window
        )
        assert (out.shape, out.dtype, out.device) == ((1, 27, 4, 16), torch.bfloat16, CUDA)
        assert waits.found == []
    ((_, keys, _, _, _, longest_query, longest_key, causal, scale, left_right, *rest),) = calls.found
    assert keys.shape == (35, kv_heads, 16)  # with a copy of each trunk
    assert (longest_query, longest_key, scale) == (11 - 2, 11, 0.25)
    assert (causal, left_right) == ((True, [-1, 0]) if window is None else (False, [3, 0]))
    assert rest[:1] in ([], [kv_heads != 4])  # torch 2.12 and later want to be told


def test_the_gathers_backward_stays_on_the_device():
    layout = build_layout([5, 2], [[2, 3, 4], [1]])
    with fake_cuda() as waits:
        on_device = layout.map(waits.pin).to(CUDA)
        grad = torch.empty(len(layout.key_index), 2, 8, dtype=torch.bfloat16, device=CUDA)
        total, _ = attention._GatherKeys.backward(SimpleNamespace(layout=on_device), grad)
        assert (total.shape, total.device, waits.found) == ((14 + 3, 2, 8), CUDA, [])


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trains_head", [True, False])
def test_logprobs_forward_and_backward_stay_on_the_device(trains_head, dtype, statistics):
    context = Context(needs_input_grad=(True, trains_head, False, False, False))
    with fake_cuda() as waits:
        hidden, weight = (torch.empty(size, 16, dtype=dtype, device=CUDA) for size in (21, 50))
        targets = torch.empty(21, dtype=torch.int64, device=CUDA)
        logps, collisions = _LinearLogprobs.forward(context, hidden, weight, targets, 8, statistics)
        assert (logps.shape, logps.dtype, logps.device) == ((21,), torch.float32, CUDA)
        if statistics:
            assert (collisions.shape, collisions.dtype, collisions.device) == ((21,), torch.float32, CUDA)
            assert context.without_gradient == (collisions,)
        else:
            assert collisions is None
        grads = _LinearLogprobs.backward(context, torch.empty_like(logps), None)
        assert waits.found == []
    assert (grads[0].shape, grads[0].dtype, grads[0].device) == ((21, 16), dtype, CUDA)
    assert (grads[1].shape, grads[1].dtype) == ((50, 16), dtype) if trains_head else grads[1] is None


def test_statistics_of_a_head_with_a_bias_and_a_cap_stay_on_the_device():
    context = Context(needs_input_grad=(True, True, True, False, False, False, False, False))
    with fake_cuda() as waits:
        hidden, weight = (torch.empty(size, 16, device=CUDA) for size in (21, 50))
        bias = torch.empty(50, device=CUDA)
        targets = torch.empty(21, dtype=torch.int64, device=CUDA)
        found = _HeadLogprobs.forward(context, hidden, weight, bias, targets, 0.5, 30.0, 8, True)
        assert [(each.shape, each.device) for each in found] == [((21,), CUDA)] * 2
        grads = _HeadLogprobs.backward(context, torch.empty_like(found[0]), None)
        assert [each.shape for each in grads[:3]] == [(21, 16), (50, 16), (50,)]
        assert waits.found == []


def test_logprobs_as_on_cuda_are_the_plain_ones():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 16, generator=generator).requires_grad_() for size in (21, 50))
    targets = torch.randint(50, (21,), generator=generator)
    upstream = torch.randn(21, generator=generator)
    plain = full_logprobs(hidden, weight, targets)
    expected = torch.autograd.grad(plain, (hidden, weight), upstream)
    with TakenForCuda():
        found = linear_logprobs(hidden, weight, targets, chunk_tokens=8)
        gradients = torch.autograd.grad(found, (hidden, weight), upstream)
        logps, collisions = linear_statistics(hidden, weight, targets, chunk_tokens=8)
    torch.testing.assert_close(found, plain)
    assert torch.equal(logps, found)
    torch.testing.assert_close(collisions, (hidden @ weight.t()).softmax(-1).square().sum(-1).log().detach())
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_policys_norms_as_on_cuda_are_the_plain_ones():
    gradients = []
    for mode in (contextlib.nullcontext(), TakenForCuda()):
        policy, batch = row()
        with mode:
            policy(batch).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 8])
def test_the_policy_differentiates_through_flash_attention(window, kv_heads):
    policy, batch = row(kv_heads, sliding_window=window)
    policy = policy.bfloat16()
    flash = mock.patch.object(attention, "kernel_for", return_value=("varlen", attention.varlen_kernel))
    with flash, FakeTensorMode(allow_non_fake_inputs=True) as mode, TakenForCuda():
        for part in policy.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = torch.nn.Parameter(mode.from_tensor(parameter.detach()))
        with Calls(varlen._varlen_attn_backward) as calls:
            policy(batch).sum().backward()
        assert len(calls.found) == 2  # one for each layer
        assert all(parameter.grad.shape == parameter.shape for parameter in policy.parameters())


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="a build without CUDA compiles nothing for it")
def test_compiled_blocks_see_torchs_operator_and_one_graph_serves_every_row():
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    attend = torch.compile(graph_attention, dynamic=True, backend=backend)
    lengths = [
        ([5, 3], [[4, 6], [2, 7]]),
        ([9, 30, 4], [[14, 6], [12, 17], [3, 3]]),
        ([50], [[4, 5]]),
        ([9, 4], [[4, 5, 2, 8], [3, 6]]),
        ([9, 4, 3], [[4, 5, 2, 8, 5, 7, 2, 3], [3, 6, 2], [2]]),
    ]
    with symbols.patch(use_duck_shape=False), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for trunks, branches in lengths:
            layout = build_layout(trunks, branches).to(CUDA)
            count = sum(layout.query_lengths)
            query, key = (torch.empty(1, heads, count, 64, dtype=torch.bfloat16, device=CUDA) for heads in (8, 2))
            out, _ = attend(None, query, key, key, None, scaling=0.1, layout=layout, sliding_window=4096)
            assert (out.shape, out.device) == ((1, count, 8, 64), CUDA)
    assert len(graphs) == 1
    assert any("varlen_attn" in name for name in graphs[0])


def _sink_call(waits, kv_heads=2):
    layout = build_layout([5, 3], [[4, 6], [2, 7]]).map(waits.pin).to(CUDA)
    query = torch.empty(27, 4, 16, dtype=torch.bfloat16, device=CUDA)
    key = torch.empty(35, kv_heads, 16, dtype=torch.bfloat16, device=CUDA)
    sinks = torch.empty(4, dtype=torch.bfloat16, device=CUDA)
    starts = (layout.query_starts, layout.key_starts, layout.longest_query, layout.longest_key)
    return query, key, sinks, starts


@pytest.mark.parametrize(("window", "side"), [(None, [-1, 0]), (4, [3, 0])])
def test_sinks_are_one_call_of_flash_attention_forward_and_one_backward(window, side):
    with fake_cuda() as waits, Calls(varlen._varlen_attn) as calls, Calls(varlen._varlen_attn_backward) as back:
        query, key, sinks, starts = _sink_call(waits)
        out, total = variants._flash._init_fn(query, key, key, sinks, *starts, 0.25, window)
        assert (out.shape, out.dtype, out.device) == ((27, 4, 16), torch.bfloat16, CUDA)
        assert (total.shape, total.dtype, total.device) == ((27, 4), torch.float32, CUDA)
        grads = variants._flash_backward._init_fn(out, query, key, key, out, total, *starts, 0.25, window)
        assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
        of_sinks = variants.sink_gradient(sinks, out, out, total)
        assert (of_sinks.shape, of_sinks.dtype, of_sinks.device) == ((4,), torch.bfloat16, CUDA)
        assert waits.found == []
    ((*_, longest_query, longest_key, causal, scale, left_right), _) = calls.found[0][:10], calls.found[0][10:]
    assert (longest_query, longest_key, causal, scale, left_right) == (9, 11, window is None, 0.25, side)
    _, _, _, _, _, lse, *_, longest_query, longest_key, causal, _, scale, left_right = back.found[0]
    assert lse.shape == (4, 27)  # as the kernel has it
    assert (longest_query, longest_key, causal, scale, left_right) == (9, 11, window is None, 0.25, side)


def test_values_of_another_size_are_one_call_of_flash_attention():
    with fake_cuda() as waits, Calls(varlen._varlen_attn) as calls:
        layout = build_layout([5, 3], [[4, 6], [2, 7]]).map(waits.pin).to(CUDA)
        query = torch.empty(1, 4, 27, 24, dtype=torch.bfloat16, device=CUDA)
        value = torch.empty(1, 4, 27, 16, dtype=torch.bfloat16, device=CUDA)
        out, _ = packed_attention(torch.nn.Identity(), query, query, value, None, scaling=0.25, layout=layout)
        assert (out.shape, out.device, waits.found) == ((1, 27, 4, 16), CUDA, [])
    assert [call[2].shape[-1] for call in calls.found] == [24]


@pytest.mark.parametrize("kind", ["sinks", "soft cap in fp32", "sinks in fp32"])
def test_variants_stay_on_the_device(kind):
    dtype = torch.float32 if "fp32" in kind else torch.bfloat16
    with fake_cuda() as waits:
        layout = build_layout([5, 3], [[4, 6], [2, 7]]).map(waits.pin).to(CUDA)
        query = torch.empty(1, 4, 27, 16, dtype=dtype, device=CUDA)
        options = {"softcap": 2.0} if "cap" in kind else {"s_aux": torch.empty(4, dtype=dtype, device=CUDA)}
        out, _ = packed_attention(
            torch.nn.Identity(), query, query, query[..., :8], None, scaling=0.25, layout=layout, **options
        )
        assert (out.shape, out.dtype, out.device, waits.found) == ((1, 27, 4, 8), dtype, CUDA, [])


def test_the_plain_kernel_stays_on_the_device_forward_and_backward():
    layout = build_layout([5, 3], [[4, 6], [2, 7]])
    lengths = [layout.query_lengths, layout.key_lengths]  # a tensor on the host, which is fake here
    with fake_cuda() as waits, mock.patch.object(FakeTensor, "tolist", return_value=lengths):
        query = torch.empty(27, 4, 16, dtype=torch.bfloat16, device=CUDA)
        key = torch.empty(35, 2, 16, dtype=torch.bfloat16, device=CUDA)
        sinks = torch.empty(4, dtype=torch.bfloat16, device=CUDA)
        out, total = variants._plain._init_fn(query, key, key, sinks, layout.lengths, 0.25, 4, 2.0)
        assert (out.shape, out.dtype, total.shape, total.dtype) == ((27, 4, 16), torch.bfloat16, (27, 4), torch.float32)
        grads = variants._plain_backward._init_fn(out, query, key, key, sinks, out, total, layout.lengths, 0.25, 4, 2.0)
        assert [(grad.shape, grad.device) for grad in grads] == [(each.shape, CUDA) for each in (query, key, key)]
        assert waits.found == []
