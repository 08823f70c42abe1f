"""The packed path on CUDA: FlashAttention in bf16, plain attention in fp32. Needs a GPU."""

import copy

import pytest
import torch
from toys import relative, toy_examples, toy_model

from notus.data.packing import build_layout, collate
from notus.model import attention
from notus.model.attention import IMPLEMENTATION, check_kernel, dense_kernel, kernel_for, packed_attention
from notus.model.fused import fuse
from notus.model.policy import Policy
from notus.runtime.determinism import deterministic

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
TRUNKS, BRANCHES = [300, 1, 40], [[120, 77], [1, 260], [3, 1]]


def run(kernel, leaves, upstream, layout, window):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output, _ = packed_attention(
        torch.nn.Identity(), *leaves, None, scaling=0.125, layout=layout, sliding_window=window, kernel=kernel
    )
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("window", [None, 16, 299])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (4, 1)])
def test_the_devices_kernel_is_the_dense_reference(heads, kv_heads, window, dtype, tolerance):
    layout = build_layout(TRUNKS, BRANCHES).to(CUDA)
    num_tokens = sum(layout.query_lengths)
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = [(1, count, num_tokens, 64) for count in (heads, kv_heads, kv_heads)]
    leaves = [torch.randn(shape, generator=generator, device=CUDA).to(dtype) for shape in shapes]
    upstream = torch.randn(1, num_tokens, heads, 64, generator=generator, device=CUDA)
    found = run(kernel_for(CUDA, dtype)[1], leaves, upstream, layout, window)
    expected = run(dense_kernel, [leaf.float() for leaf in leaves], upstream, layout, window)
    assert all(relative(got, wanted) < tolerance for got, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2)])
def test_fp32_masks_are_aligned_where_the_widest_is_a_multiple_of_16(heads, kv_heads, window):
    layout = build_layout([296, 96, 31], [[24, 40], [6, 7], [1, 2]]).to(CUDA)  # the widest mask: 40 x 336 numbers
    shapes = [(1, count, sum(layout.query_lengths), 64) for count in (heads, kv_heads, kv_heads)]
    generator = torch.Generator(CUDA).manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, device=CUDA) for shape in shapes]
    upstream = torch.randn(1, shapes[0][2], heads, 64, generator=generator, device=CUDA)
    found = run(kernel_for(CUDA, torch.float32)[1], leaves, upstream, layout, window)
    expected = run(dense_kernel, leaves, upstream, layout, window)
    assert all(relative(got, wanted) < 1e-5 for got, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 4096])
def test_check_accepts_the_devices_kernel(dtype, window):
    check_kernel(CUDA, dtype, num_heads=32, num_kv_heads=8, head_dim=128, window=window)


def test_the_gathers_backward_is_the_same_in_every_run():
    layout = build_layout([500], [[20] * 4]).to(CUDA)
    x = torch.randn(580, 8, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(len(layout.key_index), 8, 64, device=CUDA, dtype=torch.bfloat16)

    def gradient():
        return torch.autograd.grad(attention._GatherKeys.apply(x, layout), x, upstream)[0]

    assert all(torch.equal(gradient(), gradient()) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2)])
def test_attention_repeats_bit_for_bit_in_deterministic_mode(heads, kv_heads, dtype):
    layout = build_layout([2000, 700], [[900, 800], [300, 280]]).to(CUDA)  # many blocks add to one gradient
    shapes = [(1, count, sum(layout.query_lengths), 128) for count in (heads, kv_heads, kv_heads)]
    generator = torch.Generator(CUDA).manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, device=CUDA).to(dtype) for shape in shapes]
    upstream = torch.randn(1, shapes[0][2], heads, 128, generator=generator, device=CUDA)
    with deterministic(True):
        first, *others = [run(kernel_for(CUDA, dtype)[1], leaves, upstream, layout, None) for _ in range(4)]
    assert all(torch.equal(got, wanted) for other in others for got, wanted in zip(other, first, strict=True))


LENGTHS = [(60, (40, 9)), (1, (1, 5)), (20, (7, 30)), (33, (12, 12))]


def on_cuda(model, batch):
    policy = Policy(copy.deepcopy(model).to(CUDA))
    policy.causal_lm.set_attn_implementation(IMPLEMENTATION)
    fuse(policy.causal_lm)
    logps = policy(batch.to(CUDA))
    logps.sum().backward()
    return torch.cat([logps.detach().flatten(), *(p.grad.flatten() for p in policy.parameters())]).float().cpu()


@pytest.mark.parametrize("overrides", [{}, {"sliding_window": 10}, {"num_key_value_heads": 1}])
def test_the_policy_on_cuda_is_the_policy_on_cpu(overrides):
    model, batch = toy_model(**overrides), collate(toy_examples(*LENGTHS), 2)
    policy = Policy(copy.deepcopy(model))
    policy.causal_lm.set_attn_implementation(IMPLEMENTATION)
    logps = policy(batch)
    logps.sum().backward()
    expected = torch.cat([logps.detach().flatten(), *(p.grad.flatten() for p in policy.parameters())])
    assert relative(on_cuda(model, batch), expected) < 1e-4
    assert relative(on_cuda(model.bfloat16(), batch), expected) < 2e-2


def test_a_pass_makes_no_host_wait_for_the_device():
    model = toy_model().to(CUDA).bfloat16()
    model.set_attn_implementation(IMPLEMENTATION)
    policy, batch = Policy(model), collate(toy_examples(*LENGTHS), 2)
    policy(batch.to(CUDA)).sum().backward()  # the first pass sets libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy(batch.to(CUDA)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
