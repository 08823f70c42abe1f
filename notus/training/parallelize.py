"""From a model folder to a policy that is spread over ranks, and in which order.

`build_policy`: meta device -> adapters -> `parallelize` -> storage -> weights. `parallelize`:

1. Activation checkpointing wraps each block's `forward`, not the module: names stay Hugging Face's, and FSDP's hooks
   stay outside the recomputation, so a block is gathered once for its backward.
2. `torch.compile` on each block's checkpointed forward: the compiler sees what is to be recomputed, and one graph
   serves all blocks (two with LoRA, where the first block's input needs no gradient; one more without gradients). Row
   lengths are symbols, and attention shows no list of segments (`notus.model.compiled_attention`): other rows do not
   recompile, but for fillers, since 1 is no symbol. FSDP's hooks stay outside.
3. `fully_shard` on each block, then on the root, which holds what is left: embedding, final norm, head. The head's
   log-probs are computed inside the root's forward. FSDP2 gathers the next block while one computes: in the forward
   pass as each block's hook runs ahead of the device, in the backward pass in the reverse order of the forward.
   An explicit `set_modules_to_forward_prefetch` would only help a host that is slower than the device, at the cost
   of one more gathered block, and is left out. On a GPU: not run.

Activation offload is not built: "full" leaves little to move, 1 GiB for 7B parameters and rows of 4,096 tokens.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.fx.experimental import _config as symbols
from transformers import PreTrainedConfig, PreTrainedModel

from notus.model.attention import attention_sizes, check_kernel
from notus.model.check_config import check_names, check_shapes, check_values, explained
from notus.model.compiled_attention import check_graph_attention, compiled_implementation
from notus.model.fused import check_fused, fuse
from notus.model.load import check_weights, load_weights, materialise
from notus.model.lora import LayerSettings, cast_frozen, init_lora, inject_lora
from notus.model.make import read_config
from notus.model.new_tokens import new_rows_overlay
from notus.model.peft_format import (
    Adapter,
    check_adapter,
    check_continued,
    inject_adapter,
    load_adapter,
    merging,
    read_adapter,
    without_layers,
)
from notus.model.policy import Policy
from notus.model.quantization import check_dequantize, quantize, quantized_layers, summary
from notus.model.structure import text_parameters
from notus.model.supported import check_supported, disable_dropout
from notus.model.verify import PathChoice, choose_path, make_policy, new_model
from notus.runtime import switches
from notus.runtime.distributed import gather_objects, mesh, say, world_size
from notus.training.activation_checkpointing import checkpointed

if TYPE_CHECKING:
    from notus.config import LoraConfig

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def read_model_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the model's configuration.

    Raises:
        ValueError: it is damaged, of a model that no path can train, or not that of the folder's weights.
    """
    check_values(folder)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    check_supported(config)
    check_names(config, folder)
    with explained(folder / "config.json", config.to_dict(), "no model can be built from it"):
        causal_lm = new_model(config, "eager", trust_remote_code, torch.float32, "meta")
    check_shapes(config, causal_lm, folder)
    check_weights(causal_lm, folder)
    return config


def build_policy(
    folder: Path,
    config: PreTrainedConfig,
    *,
    device: torch.device,
    precision: str,
    activation_checkpointing: str | Callable[[PreTrainedModel], str] = "none",
    compile: bool = False,
    cpu_offload: bool = False,
    lora: "LoraConfig | None" = None,
    adapter: Path | None = None,
    continue_adapter: bool = False,
    new_tokens: int = 0,
    trainable: bool = True,
    seed: int = 0,
    sharding: str = "full",
    trust_remote_code: bool = False,
    path: str | PathChoice = "auto",
    longest: int = 0,
    quantization: str | None = None,
    unquantized: Sequence[str] = (),
    weights: bool = True,
) -> Policy:
    """Build, shard and load a policy; collective. No rank ever holds a full copy of the weights.

    Args:
        folder: a Hugging Face model folder.
        config: its configuration, from `read_model_config`.
        device: this rank's device.
        precision: "bf16" or "fp32", of the computation. Trainable parameters are fp32 either way.
        activation_checkpointing: a mode, see `parallelize`, or what chooses one, given the model on the meta device.
        compile, cpu_offload: see `parallelize`.
        lora: train LoRA adapters over a frozen base; None: train every parameter.
        adapter: a PEFT adapter folder; it is merged into the weights as they are loaded.
        continue_adapter: it is loaded into the LoRA layers instead: those of `lora`, or without that its own.
        new_tokens: rows of embedding and head, counted in `config`, that `folder` does not have.
        trainable: False for scoring alone: every parameter frozen and in the computation's dtype.
        seed: of the adapters' start.
        sharding: "full" or "hybrid", see `distributed.mesh`.
        trust_remote_code: run model code that comes with the folder.
        path: "auto", "packed", "plain", or what `find_path` returned.
        longest: most tokens of a sequence, see `choose_path`.
        quantization: "nf4": frozen weights of the blocks in 4 bits, see `notus.model.quantization`; None: as computed.
        unquantized: names of modules that keep their weights whatever `quantization` says.
        weights: False: leave the policy on the meta device, for `load_policy`.

    Raises:
        ValueError: the path that is asked for is not the model's, or cannot be compiled.
    """
    if isinstance(path, str):
        path = find_path(config, path, longest=longest, device=device, trust_remote_code=trust_remote_code)
    dtype = COMPUTE_DTYPES[precision]
    causal_lm = _meta_model(config, trust_remote_code, path)
    _choose_kernels(causal_lm, path, device, dtype, compile=compile)
    if not trainable:
        causal_lm.requires_grad_(False)
    freeze_other_inputs(causal_lm)
    held = None if adapter is None else read_adapter(adapter)
    continued = held if continue_adapter else None
    _inject(causal_lm, lora, continued, path.idle)
    cast_frozen(causal_lm, dtype)
    if quantization is not None:
        quantize_or_warn(causal_lm, device, dtype, keep=unquantized, idle=path.idle)
    mode = activation_checkpointing
    policy = parallelize(
        make_policy(causal_lm, path),
        mesh(device, sharding),
        precision=precision,
        activation_checkpointing=mode if isinstance(mode, str) else mode(causal_lm),
        compile=compile,
        cpu_offload=cpu_offload,
    )
    if weights:
        load_policy(
            policy,
            folder,
            device=device,
            cpu_offload=cpu_offload,
            adapter=adapter,
            continue_adapter=continue_adapter,
            new_tokens=new_tokens,
        )
        if lora is not None and continued is None:
            init_lora(causal_lm, seed)
    return policy


def load_policy(
    policy: Policy,
    folder: Path,
    *,
    device: torch.device,
    cpu_offload: bool = False,
    adapter: Path | None = None,
    continue_adapter: bool = False,
    new_tokens: int = 0,
) -> None:
    """Give memory and weights to a policy that `build_policy` left on the meta device; collective.

    The arguments are those of `build_policy`.
    """
    _give_storage(policy, device, cpu_offload=cpu_offload)
    held = None if adapter is None else read_adapter(adapter)
    _load(policy.causal_lm, folder, held, held if continue_adapter else None, new_tokens)


def free_memory() -> None:
    """Give back what a policy held that nothing names any more: FSDP's state and its modules refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _choose_kernels(
    causal_lm: PreTrainedModel, path: PathChoice, device: torch.device, dtype: torch.dtype, *, compile: bool
) -> None:
    """Try the kernels of the packed path and replace those that fail. Raises ValueError if there is none to compile."""
    if path.name == "packed":
        check_attention(causal_lm, device, dtype)
        fuse_or_check_graph(causal_lm, device, dtype, compile=compile)
    elif compile:
        raise ValueError(
            f"training.compile has no effect on the plain path ({path.reason}): set training.compile=false"
        )


def _give_storage(policy: Policy, device: torch.device, *, cpu_offload: bool) -> None:
    """Give every rank memory for its shards, on the host with `cpu_offload`."""
    materialise(policy, torch.device("cpu") if cpu_offload else device)
    if cpu_offload:
        _move_buffers(policy, device)


def _load(
    causal_lm: PreTrainedModel, folder: Path, held: Adapter | None, continued: Adapter | None, new_tokens: int
) -> None:
    """Read the weights, with an adapter merged into them or into the LoRA layers, and rows for new tokens."""
    with contextlib.ExitStack() as stack:
        overlay = new_rows_overlay(causal_lm, new_tokens)
        if held is not None and continued is None:
            overlay |= stack.enter_context(merging(causal_lm, held, new_rows=new_tokens))
        load_weights(causal_lm, folder, overlay=overlay)
    if continued is not None:
        load_adapter(causal_lm, continued, new_rows=new_tokens)


def check_adapters(
    config: PreTrainedConfig,
    path: PathChoice,
    *,
    precision: str,
    lora: "LoraConfig | None",
    adapter: Path | None = None,
    continue_adapter: bool = False,
    new_tokens: int = 0,
    quantization: str | None = None,
    unquantized: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> None:
    """Raise what `build_policy` would raise about LoRA and quantization, from a model that has no weights.

    The arguments are those of `build_policy`.
    """
    causal_lm = _meta_model(config, trust_remote_code, path)
    causal_lm.requires_grad_(False)  # quantization is for a frozen base alone
    held = None if adapter is None else read_adapter(adapter)
    continued = held if continue_adapter else None
    _inject(causal_lm, lora, continued, path.idle)
    if continued is not None:
        check_adapter(causal_lm, continued, new_rows=new_tokens)
    elif held is not None:
        with merging(causal_lm, held, new_rows=new_tokens):
            pass
    if quantization is not None:
        quantize(causal_lm, COMPUTE_DTYPES[precision], keep=unquantized, idle=path.idle)


def _inject(
    causal_lm: PreTrainedModel, lora: "LoraConfig | None", continued: Adapter | None, idle: Set[str] = frozenset()
) -> None:
    """Put LoRA layers, without values, where the config, or else an adapter, has them."""
    if lora is None:
        if continued is not None:
            inject_adapter(causal_lm, continued)
        return
    if continued is not None:
        check_continued(continued, alike=LayerSettings(lora.rank, lora.alpha, lora.rslora))
    inject_lora(
        causal_lm,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        rslora=lora.rslora,
        modules_to_save=lora.modules_to_save,
        idle=without_layers(idle, continued),
    )


def find_path(
    config: PreTrainedConfig, wanted: str, *, longest: int, device: torch.device, trust_remote_code: bool = False
) -> PathChoice:
    """Choose the path of a model, the same on every rank: see `choose_path`; collective.

    Raises:
        ValueError: as `choose_path`.
    """
    found: PathChoice | ValueError
    try:
        found = choose_path(config, wanted=wanted, longest=longest, device=device, trust_remote_code=trust_remote_code)
    except ValueError as error:  # to be raised by all ranks: none waits for one that has given up
        found = error
    choices: list[PathChoice] = []
    for each in [found] if world_size() == 1 else gather_objects(found):
        if isinstance(each, ValueError):
            raise each
        choices.append(each)
    # Where ranks round differently, all take the most careful choice of any.
    return max(choices, key=lambda each: (each.name == "plain", not each.padded, each.attention == "eager"))


def freeze_other_inputs(causal_lm: PreTrainedModel) -> None:
    """Freeze what text does not go through: the vision and audio parts of a multimodal model."""
    of_text = text_parameters(causal_lm)
    for name, parameter in causal_lm.named_parameters():
        if name not in of_text:
            parameter.requires_grad_(False)


def _meta_model(config: PreTrainedConfig, trust_remote_code: bool, path: PathChoice) -> PreTrainedModel:
    causal_lm = new_model(config, path.implementation, trust_remote_code, torch.float32, "meta")
    disable_dropout(causal_lm)
    return causal_lm


def _move_buffers(policy: Policy, device: torch.device) -> None:
    """Parameters are offloaded, buffers are not: FSDP moves the former alone."""
    for module in policy.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def fuse_or_check_graph(causal_lm: PreTrainedModel, device: torch.device, dtype: torch.dtype, *, compile: bool) -> None:
    """Fuse the blocks' small work, or see to it that the compiler, which fuses by itself, can. Collective on CUDA.

    What cannot be used on this machine is replaced by its plain twin, with a warning.
    """
    if compile:
        problems = [
            problem
            for sizes in attention_sizes(causal_lm)
            for problem in check_graph_attention(device, dtype, **dataclasses.asdict(sizes), gather=gather_objects)
        ]
    else:
        fuse(causal_lm)
        problems = check_fused(causal_lm, device, dtype, gather_objects)
    for problem in problems:
        say(f"warning: {problem}")


def quantize_or_warn(
    causal_lm: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    keep: Sequence[str] = (),
    idle: Set[str] = frozenset(),
) -> None:
    """`quantize` the model, and warn if the kernel that reads its weights is not used. Collective on CUDA."""
    quantize(causal_lm, dtype, keep=keep, idle=idle)
    for problem in check_dequantize(device, dtype, gather_objects):
        say(f"warning: {problem}")
    say(summary(causal_lm))


def check_attention(causal_lm: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Try the attention kernels of this device and dtype on the model's sizes; see `check_kernel`. Collective."""
    for sizes in attention_sizes(causal_lm):
        for problem in check_kernel(device, dtype, **dataclasses.asdict(sizes), gather=gather_objects):
            say(f"warning: {problem}")


def parallelize(
    policy: Policy,
    mesh: DeviceMesh,
    *,
    precision: str,
    activation_checkpointing: str,
    compile: bool = False,
    cpu_offload: bool = False,
) -> Policy:
    """Shard a policy in place, typically still on the meta device.

    Args:
        policy: trainable parameters in fp32 (the masters).
        mesh: all ranks, in one dimension, or (replicate, shard): see `distributed.mesh`.
        precision: "bf16" or "fp32", the dtype of gathered parameters and of the computation.
        activation_checkpointing: "none", "products", "selective" or "full": see `activation_checkpointing`.
        compile: torch.compile each block.
        cpu_offload: keep parameters, gradients and what the optimizer makes of them in (pinned) host memory.
    """
    run = torch.compile(_run, dynamic=True) if compile else None
    for block in policy.blocks:
        forward = checkpointed(block, activation_checkpointing, compiled=compile)
        block.forward = forward if run is None else functools.partial(run, forward)
    if compile:
        implementation = compiled_implementation(torch.device(mesh.device_type), COMPUTE_DTYPES[precision])
        policy.causal_lm.set_attn_implementation(implementation)
        # Sizes that happen to be equal in the first row are not the same; a row in which they differ would recompile.
        symbols.use_duck_shape = False
    # With gradients in fp32, the sum over ranks rounds as little as the masters do.
    precision_policy = MixedPrecisionPolicy(param_dtype=COMPUTE_DTYPES[precision], reduce_dtype=torch.float32)
    # A rank that holds all rows has nothing to gather: freeing and copying its own weights twice a step would be waste.
    # Unless they are on the host: then one block at a time is to be on the device.
    gathers = cpu_offload or mesh.size(mesh.ndim - 1) > 1
    # Weights in 4 bits are stored as they are gathered: a rank that has them all need not copy them.
    packed = {layer.weight for layer in quantized_layers(policy).values()}
    shard = functools.partial(
        fully_shard,
        mesh=mesh,
        mp_policy=precision_policy,
        reshard_after_forward=gathers,
        offload_policy=CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
        ignored_params=None if gathers else packed,
    )
    for unit in _units(policy):
        shard(unit)
    # The backward pass begins with the root's head: freed after the forward pass, it would be gathered at once again.
    shard(policy, reshard_after_forward=False)
    # like `forward`, these gather and free what the root holds
    for method in ("token_logprobs", "token_statistics", "next_token"):
        register_fsdp_forward_method(policy, method)
    for module in fsdp_modules(policy) if mesh.size() > 1 else []:
        # The loss is divided by the step's global count, so gradients are summed, not averaged; as a plain sum,
        # because gloo knows no sum with a factor.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return policy


def _units(policy: Policy) -> list[nn.Module]:
    """What FSDP gathers by itself: each block, and each part that reads no text, which is therefore never gathered.

    Blocks that share parameters with each other (Zamba) stay with the root, because FSDP shards a parameter once.
    """
    owners = collections.Counter(id(each) for block in policy.blocks for each in block.parameters())
    blocks = [] if max(owners.values(), default=0) > 1 else list(policy.blocks)
    of_text = text_parameters(policy.causal_lm)
    return blocks + _without(policy.causal_lm, of_text)


def _without(module: nn.Module, names: set[str], prefix: str = "") -> list[nn.Module]:
    """The largest modules that have parameters, but none of those names."""
    found = []
    for name, child in module.named_children():
        own = [f"{prefix}{name}.{each}" for each, _ in child.named_parameters(remove_duplicate=False)]
        if own and names.isdisjoint(own):
            found.append(child)
        elif own and not names.issuperset(own):
            found += _without(child, names, f"{prefix}{name}.")
    return found


def _run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What is compiled: one function for all blocks, whose weights are inputs to it, so it is compiled once for all."""
    return forward(*args, **kwargs)


def fsdp_modules(policy: nn.Module) -> list[FSDPModule]:
    """Every module that FSDP manages, the root first."""
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def expect_last_row(policy: nn.Module, last: bool) -> None:
    """Prepare a lone rank for a row's forward pass, `last` for the last row of a step.

    A rank that holds the whole model has nobody to send gradients to: they add up in place over the step's rows, and
    its weights stay gathered. With shards, that would keep whole gradients on every rank. `hand_over_gradients` ends
    the step; with the optimisation "gradient_handover" off, FSDP reduces on the last row, by copying.
    """
    reduces = last and not switches.enabled("gradient_handover")
    for module in fsdp_modules(policy):
        # what is frozen may never have been gathered
        if isinstance(module, nn.Module) and any(each.requires_grad for each in module.parameters()):
            module.set_requires_gradient_sync(reduces, recurse=False)
            module.set_reshard_after_backward(reduces, recurse=False)


def hand_over_gradients(policy: nn.Module) -> None:
    """Give a lone rank's accumulated gradients to the sharded parameters, after the last row's backward pass.

    FSDP would copy them twice, into and out of the buffers of a reduction over one rank, which come from a memory pool
    of their own: 4 bytes per parameter that no other allocation can use. Here the tensor in which they were added up
    becomes the sharded parameter's gradient. The values are the same, bit for bit.
    """
    if not switches.enabled("gradient_handover"):
        return
    for module in fsdp_modules(policy):
        group = module._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params if group else []:
            gradient = _take_gradient(parameter)
            if gradient is not None:
                parameter.sharded_param.grad = parameter.to_sharded_dtensor(gradient)
        module.reshard()


def _take_gradient(parameter: Any) -> torch.Tensor | None:
    """The fp32 gradient that FSDP has accumulated for a parameter of one rank; FSDP forgets it."""
    whole = getattr(parameter, "_unsharded_param", None)
    if whole is None:  # never gathered, so it took no part
        return None
    found = parameter.unsharded_accumulated_grad
    if found is None:
        found = whole.grad  # already in fp32: there is nothing to cast
    whole.grad = parameter.unsharded_accumulated_grad = None
    assert found is None or found.dtype == torch.float32
    return found


def reshard(policy: nn.Module) -> None:
    """Free gathered parameters and put the sharded ones back in their place.

    A forward without a backward may leave modules gathered. `parameters()` then hands out the gathered copies, in the
    computation's dtype, and what is written to them (a checkpoint's weights, say) is lost at the next gathering.
    """
    for module in fsdp_modules(policy):
        module.reshard()
