"""A policy from a model folder: meta device -> adapters -> checkpointing -> sharding -> storage -> weights."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from notus.model.attention import IMPLEMENTATION, check_kernel
from notus.model.compiled_attention import check_graph_attention
from notus.model.fused import check_fused, fuse
from notus.model.load import load_weights, materialise
from notus.model.lora import cast_frozen, init_lora, inject_lora
from notus.model.policy import Policy
from notus.model.supported import check_supported, disable_dropout
from notus.runtime.distributed import gather_objects, mesh, say
from notus.runtime.process import first_line
from notus.training.parallelize import COMPUTE_DTYPES, parallelize


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA's settings; the names are those of the config's `lora` section."""

    rank: int
    alpha: float
    dropout: float
    target_modules: Sequence[str] | str
    rslora: bool


def read_model_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration, refused with ValueError if the policy could not reproduce its computation."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises errors of every kind for what it does not understand
        reason = first_line(error)
        raise ValueError(
            f"{folder / 'config.json'}: not the configuration of a model ({reason}); restore it from the model's source"
        ) from error
    check_supported(config)
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
    adapter: Adapter | None = None,
    trainable: bool = True,
    seed: int = 0,
    sharding: str = "full",
    trust_remote_code: bool = False,
) -> Policy:
    """Build, shard and load a policy; collective. No rank ever holds a full copy of the weights.

    Args:
        folder: a Hugging Face model folder.
        config: its configuration, from `read_model_config`.
        device: this rank's device.
        precision: "bf16" or "fp32", of the computation. Trainable parameters are fp32 either way.
        activation_checkpointing: a mode, see `parallelize`, or what chooses one, given the model on the meta device.
        compile, cpu_offload: see `parallelize`.
        adapter: train LoRA adapters over a frozen base; None: train every parameter.
        trainable: False for scoring alone: every parameter frozen and in the computation's dtype.
        seed: of the adapters' start.
        sharding: "full" or "hybrid", see `distributed.mesh`.
        trust_remote_code: run model code that comes with the folder.
    """
    check_attention(config, device, COMPUTE_DTYPES[precision])
    causal_lm = _meta_model(config, trust_remote_code)
    fuse_or_check_graph(causal_lm, device, COMPUTE_DTYPES[precision], compile=compile)
    if not trainable:
        causal_lm.requires_grad_(False)
    if adapter is not None:
        inject_lora(causal_lm, **dataclasses.asdict(adapter))
    cast_frozen(causal_lm, COMPUTE_DTYPES[precision])
    mode = activation_checkpointing
    if not isinstance(mode, str):
        mode = mode(causal_lm)
    policy = Policy(causal_lm)
    ranks = mesh(device, sharding)
    parallelize(
        policy,
        ranks,
        precision=precision,
        activation_checkpointing=mode,
        compile=compile,
        cpu_offload=cpu_offload,
    )
    materialise(policy, torch.device("cpu") if cpu_offload else device)
    if cpu_offload:
        _move_buffers(policy, device)
    load_weights(causal_lm, folder)
    if adapter is not None:
        init_lora(causal_lm, seed)
    return policy


def _meta_model(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=IMPLEMENTATION,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
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
        problems = check_graph_attention(device, dtype, **_attention_sizes(causal_lm.config), gather=gather_objects)
    else:
        fuse(causal_lm)
        problems = check_fused(causal_lm, device, dtype, gather_objects)
    for problem in problems:
        say(f"warning: {problem}")


def check_attention(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Try the attention kernel of this device and dtype on the model's sizes; see `check_kernel`."""
    check_kernel(device, dtype, **_attention_sizes(config))


def _attention_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    num_heads = config.num_attention_heads
    return {
        "num_heads": num_heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or num_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        "window": getattr(config, "sliding_window", None),
    }
