"""What other trainers' settings are called here: TRL, the alignment-handbook, LLaMA-Factory and axolotl.

`TABLES` has a table for each of them, from which error messages and docs/coming-from-trl.md are made.
`VALUES` has values that other trainers use for a key of ours. Imports nothing of this project.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Counterpart:
    """What stands here for a setting of another trainer.

    Attributes:
        keys: our keys that do it, as "section.key"; none: there is no such key.
        note: what differs, or why there is no key.
        kind: "set": set those keys. "none needed": it is always so, or is done without a setting. "missing": Notus
            does not have it.
    """

    keys: tuple[str, ...]
    note: str
    kind: Literal["set", "none needed", "missing"]

    def advice(self) -> str:
        """Return what to do, for a message that has already named the key."""
        if self.kind == "set":
            return f"set {' and '.join(self.keys)}" + (f" ({self.note})" if self.note else "")
        return f"{'leave it out' if self.kind == 'none needed' else 'Notus does not have it'}: {self.note}"


def _set(*keys: str, note: str = "") -> Counterpart:
    return Counterpart(keys, note, "set")


def _always(note: str) -> Counterpart:
    return Counterpart((), note, "none needed")


def _missing(note: str) -> Counterpart:
    return Counterpart((), note, "missing")


# ---- what several settings have in common ----

_BATCH = _set(
    "training.batch_size",
    note="the examples per optimizer step over all GPUs: per-device batch x gradient accumulation x GPUs; one pass "
    "computes as many as fit into training.tokens_per_row, which bounds the memory",
)
_EVAL_BATCH = _always("training.tokens_per_row bounds the memory of evaluation, too")
_GRAPH = _always("FSDP2 shards the model on any number of GPUs; there is no DDP to configure")
_SHARD = _always("FSDP2 shards the model over torchrun's ranks; training.sharding and training.cpu_offload tune it")
_BF16 = _set("training.precision", note="bf16 or fp32; master weights are always fp32")
_FP16 = _set("training.precision", note="bf16 or fp32; fp16 is not supported, because it needs loss scaling")
_METRICS = _always("DPO's metrics are always computed")
_HUB = _always("`notus export RUN OUT --push YOU/NAME` uploads a finished run; training itself uploads nothing")
_CHECKPOINT = _set("training.activation_checkpointing", note="none, products, selective, full or auto")
_LOADER = _always("rows are tokenized once and cached; the loader has nothing to tune")
_COMPILE = _set("training.compile", note="true or false")
_FUSED = _always("fused kernels are on by themselves, and checked at the start of a run")
_CURVE = _set("training.lr_schedule", note="linear, cosine, wsd or constant")
_OPTIMIZER = _set("training.optimizer", note="rmsprop or adamw; training.optimizer_dtype=int8 for 8-bit AdamW")
_DATA = _set("data.train", note="a file, a folder, a hub id, or a list of {path, split, weight}")
_EVAL_DATA = _set("data.eval", note="as data.train; or set data.eval_size to hold rows out of data.train")
_SAMPLES = _set("data.train", note="as {path, weight: 0.1} for a tenth of the rows")
_MIX = _set("data.train", note="a list of {path, weight}; a weight is the share of that source's rows, not of the mix")
_FORMAT = _always("the columns of a row determine its format; data.columns renames them")
_TEMPLATE = _set("data.chat_template", note="a .jinja file or 'zephyr'; by default the tokenizer's own")
_PACKED = _always("rows are always packed, without padding, and examples do not see each other")
_LOCAL = _always("torchrun says it to each process")
_LOG = _always("each logged step is one line of metrics.jsonl and of the terminal")
_WORKERS = _set("data.num_workers", note="the processes that tokenize")
_LORA_TARGETS = _set("lora.target_modules", note="a list of names, or all-linear")
_NO_ADAPTER_KIND = _missing("LoRA and rsLoRA (lora.rslora) are the adapters that Notus trains")
_QLORA = _set("model.quantization", note="nf4; needs lora.rank above 0")
_QUANT = _always("model.quantization=nf4 has one format: NF4 with bf16 arithmetic")
_BITS8 = _missing("the frozen weights can be quantized to 4 bits: model.quantization=nf4")
_CONFIGURATION = _missing("download that configuration of the dataset, and name its file or folder in data.train")
_ATTENTION = _always("attention is chosen and checked against the model's own at the start of a run")
_SYSTEM = _set("data.train", note="a system message in each row; data.add_empty_system adds an empty one")
_ONE_GPU = _missing("a row lies on one GPU; training.activation_checkpointing=full takes the least memory")
_TRUST = _set("model.trust_remote_code")
_REVISION = _missing("download the revision (`hf download ID --revision REV --local-dir DIR`) and name that folder")
_OWN_REFERENCE = _set("reference.model", note="null: the model that the run starts from")
_SAME_REFERENCE = _always("the reference is loaded as the policy is, in its precision and quantization")
_GALORE = _missing("training.optimizer_dtype=int8 or bf16, LoRA or model.quantization=nf4 save memory instead")
_TRACKER = _set("tracking.wandb", "tracking.tensorboard", note="true or false each")
_PROMPT_ON = _missing("only completions are learned, never prompts")
_FTX = _set("dpo.nll_weight", "dpo.nll_mean", note="LLaMA-Factory's mean is dpo.nll_mean=completions")
_RL_ONLY = _missing("it is a setting of online RL, and Notus trains on given completions")

_TRAINER: dict[str, Counterpart] = {
    "output_dir": _set("training.output_dir"),
    "per_device_train_batch_size": _BATCH,
    "num_train_epochs": _set("training.epochs"),
    "max_steps": _set("training.max_steps"),
    "learning_rate": _set("training.learning_rate"),
    "lr_scheduler_type": _CURVE,
    "lr_scheduler_kwargs": _set("training.min_lr_ratio", "training.decay_ratio", note="the floor, and WSD's decay"),
    "warmup_steps": _set("training.warmup_steps", note="an integer; a share of all steps is training.warmup_ratio"),
    "optim": _OPTIMIZER,
    "optim_args": _missing("the optimizers have PyTorch's defaults, except for learning rate and weight decay"),
    "weight_decay": _set("training.weight_decay", note="biases and norms are excluded, as there"),
    "adam_beta1": _missing("AdamW's betas are 0.9 and 0.999, which are TRL's defaults"),
    "adam_beta2": _missing("AdamW's betas are 0.9 and 0.999, which are TRL's defaults"),
    "adam_epsilon": _missing("AdamW's epsilon is 1e-8, which is TRL's default"),
    "optim_target_modules": _GALORE,
    "gradient_accumulation_steps": _BATCH,
    "average_tokens_across_devices": _always("the loss is always divided by the step's count over all GPUs"),
    "max_grad_norm": _set("training.max_grad_norm"),
    "label_smoothing_factor": _missing(
        "TRL's DPO ignores it, and SFT learns from labels as they are; dpo.label_smoothing is that of preferences"
    ),
    "bf16": _BF16,
    "fp16": _FP16,
    "bf16_full_eval": _always("evaluation has the precision of training"),
    "fp16_full_eval": _always("evaluation has the precision of training"),
    "tf32": _missing("set torch's own environment variable TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1"),
    "activation_checkpointing": _CHECKPOINT,
    "activation_checkpointing_kwargs": _CHECKPOINT,
    "gradient_checkpointing": _CHECKPOINT,
    "gradient_checkpointing_kwargs": _CHECKPOINT,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _FUSED,
    "liger_kernel_config": _FUSED,
    "use_cache": _always("training never keeps a key-value cache"),
    "neftune_noise_alpha": _missing("there is no noise on embeddings"),
    "torch_empty_cache_steps": _always("the allocator's segments grow in place, so that no holes are left"),
    "auto_find_batch_size": _always(
        "set training.tokens_per_row for the memory; training.activation_checkpointing=auto takes what fits"
    ),
    "logging_strategy": _set("training.log_every", note="in steps"),
    "logging_steps": _set("training.log_every", note="in steps"),
    "logging_first_step": _set("training.log_every", note="1, the default, logs every step"),
    "log_on_each_node": _always("rank 0 logs for all"),
    "logging_nan_inf_filter": _always("a loss or gradient that is not finite stops the run with an error"),
    "include_num_input_tokens_seen": _always("`num_tokens` in metrics.jsonl counts them"),
    "log_level": _LOG,
    "log_level_replica": _LOG,
    "disable_tqdm": _LOG,
    "report_to": _TRACKER,
    "run_name": _set("tracking.run_name"),
    "project": _set("tracking.project", note="of Weights & Biases"),
    "trackio_space_id": _TRACKER,
    "trackio_bucket_id": _TRACKER,
    "trackio_static_space_id": _TRACKER,
    "eval_strategy": _set("training.eval_every", note="in steps; null: at the end only"),
    "eval_steps": _set("training.eval_every", note="in steps"),
    "eval_delay": _missing("evaluations begin with the first training.eval_every steps"),
    "per_device_eval_batch_size": _EVAL_BATCH,
    "prediction_loss_only": _METRICS,
    "eval_on_start": _set("training.eval_at_start"),
    "eval_do_concat_batches": _EVAL_BATCH,
    "eval_use_gather_object": _EVAL_BATCH,
    "eval_accumulation_steps": _EVAL_BATCH,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "save_only_model": _always("a checkpoint always holds what a resume needs; the final model stands in model/"),
    "save_strategy": _set("training.save_every", note="in steps; null: at the end of each epoch"),
    "save_steps": _set("training.save_every", note="in steps"),
    "save_on_each_node": _always("all nodes share training.output_dir"),
    "save_total_limit": _set("training.keep_checkpoints", note="the newest to keep; null: all"),
    "enable_jit_checkpoint": _always("SIGTERM always ends a run with a checkpoint, and the same command resumes it"),
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "load_best_model_at_end": _set("training.best_metric", note="the name of an evaluation metric, such as eval_loss"),
    "metric_for_best_model": _set("training.best_metric", note="the name of an evaluation metric, such as eval_loss"),
    "greater_is_better": _always("the direction of training.best_metric is known by its name"),
    "ignore_data_skip": _always("a resumed run continues at the right row, at once"),
    "restore_callback_states_from_checkpoint": _always("a checkpoint holds the whole state of the run"),
    "full_determinism": _set("training.deterministic"),
    "seed": _set("training.seed"),
    "data_seed": _set("training.seed", note="one seed for data and weights"),
    "use_cpu": _always("the CPU is used where there is no GPU; CUDA_VISIBLE_DEVICES= hides the GPUs"),
    "accelerator_config": _SHARD,
    "parallelism_config": _SHARD,
    "dataloader_drop_last": _always("no row is dropped: the last step of an epoch takes what is left"),
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_in_order": _LOADER,
    "remove_unused_columns": _set("data.columns", note="{their name: unused} leaves a column out"),
    "label_names": _FORMAT,
    "train_sampling_strategy": _set("data.shuffle", note="true or false"),
    "length_column_name": _FORMAT,
    "ddp_find_unused_parameters": _GRAPH,
    "ddp_bucket_cap_mb": _GRAPH,
    "ddp_broadcast_buffers": _GRAPH,
    "ddp_static_graph": _GRAPH,
    "ddp_backend": _GRAPH,
    "ddp_timeout": _set("training.timeout_minutes", note="in minutes"),
    "fsdp": _SHARD,
    "fsdp_config": _SHARD,
    "deepspeed": _SHARD,
    "debug": _always("errors name the rank and the step"),
    "skip_memory_metrics": _always("`system/` keys in metrics.jsonl show the memory"),
    "do_train": _always("`notus dpo` and `notus sft` train; `notus evaluate RUN` only evaluates"),
    "do_eval": _EVAL_DATA,
    "do_predict": _always("`notus generate RUN PROMPTS OUT` writes completions"),
    "resume_from_checkpoint": _set("training.resume", note="auto (the default), never, or a checkpoint's folder"),
    "local_rank": _LOCAL,
}
"""Settings of transformers' `TrainingArguments`, which TRL, the handbook and LLaMA-Factory share."""

_DPO: dict[str, Counterpart] = {
    "model_init_kwargs": _always("the precision is training.precision; attention is chosen and checked by itself"),
    "trust_remote_code": _TRUST,
    "router_aux_loss_coef": _set(
        "training.router_aux_loss_coef", note="0 by default, whatever the model's config says"
    ),
    "disable_dropout": _always("the model's own dropout is always off; lora.dropout is the adapters'"),
    "dataset_num_proc": _WORKERS,
    "max_length": _set("data.max_length"),
    "truncation_mode": _set(
        "data.max_prompt_length", "data.too_long", note="a long prompt loses its start, a long completion its end"
    ),
    "padding_free": _PACKED,
    "pad_to_multiple_of": _PACKED,
    "precompute_ref_log_probs": _always(
        "the reference log-probs are always computed once and cached; reference.cache_dir shares them between runs"
    ),
    "precompute_ref_batch_size": _always("training.tokens_per_row bounds the memory of the reference pass, too"),
    "loss_type": _set("dpo.loss_type", note="a name, or {name: weight, ...}"),
    "loss_weights": _set("dpo.loss_type", note="as {name: weight, ...}; the weight of `sft` is dpo.nll_weight"),
    "ld_alpha": _set("dpo.ld_alpha"),
    "f_divergence_type": _set("dpo.options.f_divergence"),
    "f_alpha_divergence_coef": _set(
        "dpo.options.f_alpha",
        note="1 minus TRL 1.16's value; older releases, with (1 - u^-alpha)/alpha, have the value itself",
    ),
    "label_smoothing": _set("dpo.label_smoothing", note="it acts on sigmoid, too, where TRL 1.16 ignores it"),
    "beta": _set("dpo.beta"),
    "use_weighting": _set("dpo.wpo", note="a pair's weight is at most 1, as in the authors' code"),
    "discopop_tau": _set("dpo.options.discopop_tau"),
    "activation_offloading": _missing("training.activation_checkpointing=full keeps the fewest activations"),
    "sync_ref_model": _missing("the reference does not move (no TR-DPO): its log-probs are computed once"),
    "ref_model_mixup_alpha": _missing("the reference does not move (no TR-DPO): its log-probs are computed once"),
    "ref_model_sync_steps": _missing("the reference does not move (no TR-DPO): its log-probs are computed once"),
    "pad_token": _always("nothing is padded"),
}

_OLDER: dict[str, Counterpart] = {
    "max_prompt_length": _set("data.max_prompt_length"),
    "max_completion_length": _set(
        "data.max_length", "data.max_prompt_length", note="completions may have the difference of the two, at least"
    ),
    "max_target_length": _set("data.max_length", "data.max_prompt_length"),
    "warmup_ratio": _set("training.warmup_ratio"),
    "evaluation_strategy": _set("training.eval_every", note="in steps; null: at the end only"),
    "rpo_alpha": _set("dpo.nll_weight", note="the mean over chosen tokens, as there"),
    "reference_free": _set("dpo.loss_type", note="cpo is sigmoid without a reference, and slic is hinge"),
    "force_use_ref_model": _set("reference.model", note="null: the model that the run starts from"),
    "ref_model_init_kwargs": _SAME_REFERENCE,
    "model_adapter_name": _set("model.adapter"),
    "ref_adapter_name": _OWN_REFERENCE,
    "reference_adapter": _OWN_REFERENCE,
    "generate_during_eval": _set("tracking.samples", note="how many prompts are completed at each evaluation"),
    "label_pad_token_id": _always("nothing is padded"),
    "padding_value": _always("nothing is padded"),
    "base_model_attribute_name": _always("the model's structure is found by itself"),
    "use_logits_to_keep": _always("logits are computed for learned tokens only"),
    "use_num_logits_to_keep": _always("logits are computed for learned tokens only"),
    "is_encoder_decoder": _missing("Notus trains decoder-only models"),
    "tools": _set("data.train", note="a column `tools` of the rows"),
    "simpo_gamma": _set("dpo.options.simpo_gamma"),
    "cpo_alpha": _set("dpo.nll_weight", note="1 by default in TRL, 0 here"),
    "gamma_beta_ratio": _set("dpo.options.simpo_gamma", note="that ratio times dpo.beta"),
    "desirable_weight": _set("dpo.options.desirable_weight", note="of dpo.loss_type=kto"),
    "undesirable_weight": _set("dpo.options.undesirable_weight", note="of dpo.loss_type=kto"),
    "group_by_length": _always("each step is balanced by length over the GPUs"),
    "half_precision_backend": _BF16,
    "no_cuda": _always("the CPU is used where there is no GPU; CUDA_VISIBLE_DEVICES= hides the GPUs"),
    "overwrite_output_dir": _set("training.resume", note="never: start over"),
    "logging_dir": _set("tracking.tensorboard", note="writes to `tensorboard` in the run's folder"),
    "save_safetensors": _always("weights are always safetensors"),
    "adafactor": _OPTIMIZER,
}

_SFT: dict[str, Counterpart] = {
    "chat_template_path": _TEMPLATE,
    "dataset_text_field": _set("data.columns", note="{their name: ours}; docs/data.md has ours"),
    "dataset_kwargs": _FORMAT,
    "eos_token": _always("the chat template and the tokenizer say where a turn ends; data.new_tokens adds tokens"),
    "shuffle_dataset": _set("data.shuffle"),
    "packing": _PACKED,
    "packing_strategy": _PACKED,
    "eval_packing": _PACKED,
    "completion_only_loss": _PROMPT_ON,
    "assistant_only_loss": _set("data.mask_history", note="only assistant turns are learned; true: only the last one"),
    "max_seq_length": _set("data.max_length"),
    "num_of_sequences": _PACKED,
}

_MODEL: dict[str, Counterpart] = {
    "model_name_or_path": _set("model.name_or_path"),
    "model_revision": _REVISION,
    "dtype": _BF16,
    "torch_dtype": _BF16,
    "attn_implementation": _ATTENTION,
    "use_peft": _set("lora.rank", note="above 0: LoRA; 0: full fine-tuning"),
    "lora_r": _set("lora.rank"),
    "lora_alpha": _set("lora.alpha"),
    "lora_dropout": _set("lora.dropout"),
    "lora_target_modules": _LORA_TARGETS,
    "lora_target_parameters": _missing("adapters are on linear layers: lora.target_modules"),
    "lora_modules_to_save": _set("lora.modules_to_save"),
    "lora_task_type": _always("Notus trains causal language models"),
    "use_rslora": _set("lora.rslora"),
    "use_dora": _NO_ADAPTER_KIND,
    "load_in_8bit": _BITS8,
    "load_in_4bit": _QLORA,
    "bnb_4bit_quant_type": _QLORA,
    "use_bnb_nested_quant": _QUANT,
    "bnb_4bit_quant_storage": _QUANT,
    "dataset_name": _DATA,
    "dataset_config": _CONFIGURATION,
    "dataset_train_split": _set("data.train", note="as {path, split}"),
    "dataset_test_split": _set("data.eval", note="as {path, split}"),
    "dataset_streaming": _missing("the rows are tokenized once and kept on disk"),
    "ignore_bias_buffers": _GRAPH,
}

_HANDBOOK: dict[str, Counterpart] = {
    "dataset_mixer": _set("data.train", note="a list of {path, split, weight}"),
    "dataset_mixture": _set("data.train", note="a list of {path, split, weight}"),
    "dataset_splits": _set("data.train", "data.eval", note="as {path, split} each"),
    "dataset_configs": _CONFIGURATION,
    "preprocessing_num_workers": _WORKERS,
    "chat_template": _TEMPLATE,
    "auto_insert_empty_system_msg": _set("data.add_empty_system"),
    "tokenizer_name_or_path": _always("the tokenizer is the model's"),
    "truncation_side": _always("a long prompt loses its start, a long completion its end"),
    "use_flash_attention_2": _ATTENTION,
    "hub_model_revision": _HUB,
    "push_to_hub_revision": _HUB,
    "model_code_revision": _REVISION,
    "base_model_revision": _REVISION,
    "wandb_enabled": _set("tracking.wandb"),
    "text_column": _set("data.columns", note="{their name: ours}"),
    "log_every_n_steps": _set("training.log_every"),
}

_LLAMA_FACTORY: dict[str, Counterpart] = {
    "stage": _always("the command says it: `notus dpo` or `notus sft`; dpo.loss_type=kto learns from labels"),
    "finetuning_type": _set("lora.rank", note="above 0: LoRA; 0: full fine-tuning"),
    "lora_rank": _set("lora.rank"),
    "lora_target": _LORA_TARGETS,
    "additional_target": _set("lora.modules_to_save"),
    "create_new_adapter": _set("lora.continue", note="false (the default): merge model.adapter and train a new one"),
    "adapter_name_or_path": _set("model.adapter", note="lora.continue=true trains it further"),
    "loraplus_lr_ratio": _NO_ADAPTER_KIND,
    "pissa_init": _NO_ADAPTER_KIND,
    "oft_rank": _NO_ADAPTER_KIND,
    "freeze_trainable_layers": _missing("train all weights, or LoRA (lora.rank)"),
    "freeze_trainable_modules": _missing("train all weights, or LoRA (lora.rank)"),
    "use_llama_pro": _missing("train all weights, or LoRA (lora.rank)"),
    "pref_beta": _set("dpo.beta"),
    "pref_loss": _set("dpo.loss_type"),
    "pref_ftx": _FTX,
    "pref_bco_weight": _set("dpo.loss_type", note="for a weight w: {sigmoid: 1/(1+w), bco_pair: w/(1+w)}"),
    "dpo_beta": _set("dpo.beta"),
    "dpo_loss": _set("dpo.loss_type"),
    "dpo_ftx": _FTX,
    "dpo_label_smoothing": _set("dpo.label_smoothing"),
    "kto_chosen_weight": _set("dpo.options.desirable_weight", note="of dpo.loss_type=kto"),
    "kto_rejected_weight": _set("dpo.options.undesirable_weight", note="of dpo.loss_type=kto"),
    "ref_model": _OWN_REFERENCE,
    "ref_model_adapters": _OWN_REFERENCE,
    "ref_model_quantization_bit": _SAME_REFERENCE,
    "cutoff_len": _set("data.max_length"),
    "template": _TEMPLATE,
    "dataset": _DATA,
    "dataset_dir": _DATA,
    "eval_dataset": _EVAL_DATA,
    "val_size": _set("data.eval_size", note="rows held out of data.train, or their share"),
    "max_samples": _SAMPLES,
    "overwrite_cache": _always("tokenized rows are kept by what they depend on, so a stale one is never read"),
    "tokenized_path": _set("data.cache_dir"),
    "train_on_prompt": _PROMPT_ON,
    "neat_packing": _PACKED,
    "streaming": _missing("the rows are tokenized once and kept on disk"),
    "mix_strategy": _MIX,
    "interleave_probs": _MIX,
    "default_system": _SYSTEM,
    "enable_thinking": _set("data.chat_template_kwargs", note="as {enable_thinking: false}"),
    "quantization_bit": _QLORA,
    "quantization_method": _QUANT,
    "quantization_type": _QUANT,
    "double_quantization": _QUANT,
    "flash_attn": _ATTENTION,
    "use_unsloth": _FUSED,
    "enable_liger_kernel": _FUSED,
    "rope_scaling": _missing("the model's config.json says how its positions are scaled"),
    "shift_attn": _missing("the model's own attention is trained"),
    "disable_gradient_checkpointing": _CHECKPOINT,
    "upcast_layernorm": _BF16,
    "upcast_lmhead_output": _always("log-probs are always computed in fp32"),
    "pure_bf16": _BF16,
    "resize_vocab": _set("data.new_tokens"),
    "add_tokens": _set("data.new_tokens"),
    "add_special_tokens": _set("data.new_tokens"),
    "new_special_tokens": _set("data.new_tokens"),
    "split_special_tokens": _set("data.split_special_tokens"),
    "mask_history": _set("data.mask_history"),
    "use_galore": _GALORE,
    "use_apollo": _GALORE,
    "use_badam": _GALORE,
    "plot_loss": _always("`notus report RUN` draws the curves"),
    "use_swanlab": _TRACKER,
    "model_max_length": _set("data.max_length"),
    "cache_dir": _set("data.cache_dir", note="of tokenized rows; HF_HOME is the cache of downloads"),
    "moe_aux_loss_coef": _set("training.router_aux_loss_coef"),
    "early_stopping_steps": _set("training.early_stopping_patience", "training.best_metric"),
    "predict_with_generate": _set("tracking.samples"),
    "export_dir": _always("`notus export RUN OUT` writes a model's folder"),
}

_AXOLOTL: dict[str, Counterpart] = {
    "base_model": _set("model.name_or_path"),
    "base_model_config": _set("model.name_or_path"),
    "revision_of_model": _REVISION,
    "model_type": _always("the model's config.json says its class"),
    "tokenizer_type": _always("the tokenizer is the model's"),
    "tokenizer_config": _always("the tokenizer is the model's"),
    "rl": _always("the command says it: `notus dpo`, with dpo.loss_type=sigmoid, ipo, simpo, orpo, kto, ..."),
    "rl_beta": _set("dpo.beta"),
    "dpo_use_weighting": _set("dpo.wpo"),
    "dpo_label_smoothing": _set("dpo.label_smoothing"),
    "dpo_padding_free": _PACKED,
    "dpo_use_logits_to_keep": _always("logits are computed for learned tokens only"),
    "orpo_alpha": _set("dpo.beta", "dpo.nll_weight", note="with dpo.loss_type=orpo, that value and 1"),
    "rpo_alpha": _set("dpo.nll_weight", note="the mean over chosen tokens, as there"),
    "kto_desirable_weight": _set("dpo.options.desirable_weight", note="of dpo.loss_type=kto"),
    "kto_undesirable_weight": _set("dpo.options.undesirable_weight", note="of dpo.loss_type=kto"),
    "trl": _set("dpo.beta", note="and other keys of the section dpo"),
    "peft": _set("lora.rank", note="and other keys of the section lora"),
    "datasets": _DATA,
    "test_datasets": _EVAL_DATA,
    "val_set_size": _set("data.eval_size", note="rows held out of data.train, or their share"),
    "shuffle_merged_datasets": _set("data.shuffle"),
    "dataset_prepared_path": _set("data.cache_dir"),
    "dataset_processes": _WORKERS,
    "dataset_shard_num": _SAMPLES,
    "skip_prepare_dataset": _FORMAT,
    "sequence_len": _set("data.max_length"),
    "excess_length_strategy": _set("data.too_long", note="cut or drop"),
    "sample_packing": _PACKED,
    "eval_sample_packing": _PACKED,
    "pad_to_sequence_len": _PACKED,
    "group_by_length": _always("each step is balanced by length over the GPUs"),
    "train_on_inputs": _PROMPT_ON,
    "roles_to_train": _always("assistant turns alone are learned; data.mask_history keeps the last of them"),
    "default_system_message": _SYSTEM,
    "special_tokens": _set("data.new_tokens", note="those that the tokenizer lacks; no pad token is needed"),
    "tokens": _set("data.new_tokens"),
    "adapter": _set("lora.rank", note="above 0: LoRA; QLoRA also needs model.quantization=nf4"),
    "lora_model_dir": _set("model.adapter", note="lora.continue=true trains it further"),
    "lora_target_linear": _set("lora.target_modules", note="all-linear"),
    "lora_fan_in_fan_out": _always("the layers' kind is found by itself"),
    "lora_mlp_kernel": _FUSED,
    "lora_qkv_kernel": _FUSED,
    "lora_o_kernel": _FUSED,
    "peft_use_rslora": _set("lora.rslora"),
    "peft_use_dora": _NO_ADAPTER_KIND,
    "relora_steps": _NO_ADAPTER_KIND,
    "loraplus_lr_embedding": _NO_ADAPTER_KIND,
    "micro_batch_size": _BATCH,
    "eval_batch_size": _EVAL_BATCH,
    "batch_size": _set("training.batch_size", note="the examples per optimizer step over all GPUs"),
    "num_epochs": _set("training.epochs"),
    "optimizer": _OPTIMIZER,
    "lr_scheduler": _CURVE,
    "cosine_min_lr_ratio": _set("training.min_lr_ratio"),
    "evals_per_epoch": _set("training.eval_every", note="in steps"),
    "saves_per_epoch": _set("training.save_every", note="in steps; null: at the end of each epoch"),
    "early_stopping_patience": _set("training.early_stopping_patience", "training.best_metric"),
    "auto_resume_from_checkpoints": _set("training.resume", note="auto, which is the default"),
    "flash_attention": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "xformers_attention": _ATTENTION,
    "eager_attention": _ATTENTION,
    "bfloat16": _BF16,
    "float16": _FP16,
    "fp8": _missing("training.precision is bf16 or fp32"),
    "wandb_project": _set("tracking.wandb", "tracking.project"),
    "wandb_name": _set("tracking.wandb", "tracking.run_name"),
    "wandb_run_id": _always("a resumed run continues its Weights & Biases run"),
    "wandb_entity": _always("set the environment variable WANDB_ENTITY"),
    "wandb_mode": _always("set the environment variable WANDB_MODE"),
    "wandb_watch": _always("gradients' norm is logged"),
    "wandb_log_model": _always("Weights & Biases gets metrics, no weights"),
    "use_wandb": _set("tracking.wandb"),
    "use_tensorboard": _set("tracking.tensorboard"),
    "use_mlflow": _TRACKER,
    "use_comet": _TRACKER,
    "strict": _always("an unknown key is always an error"),
    "plugins": _missing("Notus has no plugins"),
    "sequence_parallel_degree": _ONE_GPU,
    "context_parallel_size": _ONE_GPU,
    "tensor_parallel_size": _SHARD,
    "dp_shard_size": _set("training.sharding", note="full or hybrid"),
    "fsdp_version": _SHARD,
    "debug_dataset": _always("`notus data CONFIG` shows the rows as the model sees them"),
    "unfrozen_parameters": _missing("train all weights, or LoRA (lora.rank)"),
}

_SHORT: dict[str, Counterpart] = {
    "lr": _set("training.learning_rate"),
    "epochs": _set("training.epochs"),
    "grad_accum": _BATCH,
    "gradient_accumulation": _BATCH,
    "accumulate_grad_batches": _BATCH,
    "per_device_batch_size": _BATCH,
    "global_batch_size": _set("training.batch_size"),
    "train_batch_size": _BATCH,
    "r": _set("lora.rank"),
    "bias": _missing("adapters have no bias"),
    "task_type": _always("Notus trains causal language models"),
    "lr_scheduler": _CURVE,
    "scheduler": _CURVE,
    "warmup": _set("training.warmup_ratio", "training.warmup_steps", note="one of them"),
    "grad_clip": _set("training.max_grad_norm"),
    "clip_grad": _set("training.max_grad_norm"),
    "gradient_clipping": _set("training.max_grad_norm"),
    "max_seq_len": _set("data.max_length"),
    "seq_len": _set("data.max_length"),
    "model_id": _set("model.name_or_path"),
    "model_path": _set("model.name_or_path"),
    "tokenizer": _always("the tokenizer is the model's"),
    "train_file": _DATA,
    "train_data": _DATA,
    "train_dataset": _DATA,
    "data_path": _DATA,
    "eval_file": _EVAL_DATA,
    "validation_file": _EVAL_DATA,
    "test_size": _set("data.eval_size"),
    "mixed_precision": _BF16,
    "wandb": _set("tracking.wandb"),
    "tensorboard": _set("tracking.tensorboard"),
    "num_generations": _RL_ONLY,
    "num_workers": _WORKERS,
    "optimizer_type": _OPTIMIZER,
    "gamma": _set("dpo.options.simpo_gamma"),
    "revision": _REVISION,
}

TABLES: Mapping[str, Mapping[str, Counterpart]] = MappingProxyType(
    {
        "TRL's DPOConfig": {**_TRAINER, **_DPO},
        "TRL's ModelConfig and ScriptArguments": _MODEL,
        "TRL's SFTConfig, beyond DPOConfig": _SFT,
        "TRL and transformers, older releases": _OLDER,
        "alignment-handbook": _HANDBOOK,
        "LLaMA-Factory": _LLAMA_FACTORY,
        "axolotl": _AXOLOTL,
        "common short names": _SHORT,
    }
)
"""For each trainer, its settings and what stands here for them. The first table is complete, for TRL 1.16."""

_OPTIMIZERS_OF_8_BITS = dict.fromkeys(
    ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), "adamw with training.optimizer_dtype=int8"
)
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adam", "paged_adamw_32bit", "AdamW")
_SIGMOID = ("dpo", "sigmoid_dpo", "dpo_sigmoid", "standard", "default", "cdpo", "bt", "bradley_terry")

_NO_FP16 = (
    "fp16 needs loss scaling, which is not implemented, and bf16 has the range of fp32. On a GPU without bf16, set fp32"
)

VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "dpo.loss_type": {
            **dict.fromkeys(_SIGMOID, "the loss of DPO is 'sigmoid'; cDPO is it with dpo.label_smoothing"),
            "kto_pair": "KTO learns from labels: set 'kto', which reads a pair as a good and a bad completion",
            "kto_unpaired": "set 'kto'",
            "bco_unpaired": "set 'bco'",
            "rdpo": "robust DPO is 'robust'; R-DPO, which penalises length, is not available",
            "robust_dpo": "set 'robust'",
            "sft": "the likelihood of the chosen completions is dpo.nll_weight",
            "rpo": "set 'sigmoid' and dpo.nll_weight",
            "ld_dpo": "set 'sigmoid' and dpo.ld_alpha",
            "wpo": "set 'sigmoid' and dpo.wpo=true",
            "mpo": "set {sigmoid: 0.8, bco_pair: 0.2} and dpo.nll_weight",
            "dpop_loss": "set 'dpop'",
            "smaug": "set 'dpop'",
            "sppo": "set 'sppo_hard'",
            "exo": "set 'exo_pair'",
            "apo": "set 'apo_zero' or 'apo_down'",
            "ipo_norm": "set 'ipo', which averages over tokens",
            "aot": "AOT depends on the batch: use a loss of docs/losses.md",
            "aot_pair": "AOT depends on the batch: use a loss of docs/losses.md",
            "aot_unpaired": "AOT depends on the batch: use a loss of docs/losses.md",
            "tr_dpo": "the reference does not move: use a loss of docs/losses.md",
            "grpo": "Notus trains on given completions: use a loss of docs/losses.md",
            "ppo": "Notus trains on given completions: use a loss of docs/losses.md",
        },
        "training.optimizer": {
            **dict.fromkeys(_ADAMW, "set 'adamw'"),
            **{name: f"set {words}" for name, words in _OPTIMIZERS_OF_8_BITS.items()},
            "RMSprop": "set 'rmsprop'",
        },
        "training.lr_schedule": {
            "cosine_with_min_lr": "set 'cosine' and training.min_lr_ratio",
            "warmup_stable_decay": "set 'wsd'",
            "constant_with_warmup": "set 'constant', which has a warm-up, too",
            "cosine_with_restarts": "set 'cosine', which has no restarts",
            "none": "set 'constant'",
        },
        "training.precision": {
            **dict.fromkeys(("bfloat16", "true", "True", "16", "bf16-mixed", "auto"), "set 'bf16'"),
            **dict.fromkeys(("fp16", "float16", "fp16-mixed"), _NO_FP16),
            **dict.fromkeys(("float32", "32", "no", "False", "false"), "set 'fp32'"),
        },
        "training.activation_checkpointing": {
            "True": "set 'full'",
            "False": "set 'none'",
        },
        "training.resume": {
            "True": "set 'auto', which is the default",
            "False": "set 'never'",
        },
        "model.quantization": {
            **dict.fromkeys(("4", "4bit", "int4", "bnb", "bitsandbytes", "qlora", "True"), "set 'nf4'"),
            **dict.fromkeys(("8", "8bit", "int8"), "only 4 bits are possible: set 'nf4'"),
            "False": "set null",
        },
        "lora.target_modules": {
            **dict.fromkeys(("all", "all_linear", "linear"), "set 'all-linear'"),
        },
        "data.chat_template": {
            "tokenizer_default": "set null, the tokenizer's own template",
            "default": "set null, the tokenizer's own template",
        },
    }
)
"""For our keys, what to set in place of a value of another trainer; by the value's text in Python."""


def _every_name() -> dict[str, Counterpart]:
    """Return all names of all tables; earlier tables win."""
    return {name: found for table in reversed(list(TABLES.values())) for name, found in table.items()}


_NAMES = _every_name()


def find(name: str) -> Counterpart | None:
    """Return what stands here for another trainer's setting; None if `name` is none that we know."""
    return _NAMES.get(name.lstrip("-").replace("-", "_").lower())


def find_value(key: str, value: object) -> str | None:
    """Return what to set in place of a value that another trainer takes for our `key`; None if we know none."""
    names = value.split(",") if isinstance(value, str) else value
    if key == "dpo.loss_type" and isinstance(names, list) and not (isinstance(value, str) and len(names) == 1):
        return _sum_of([str(name).strip(" []'\"") for name in names])
    return VALUES.get(key, {}).get(str(value))


def _sum_of(names: list[str]) -> str:
    """Return how to set what TRL has as a list of losses."""
    losses = [name for name in names if name != "sft"]
    whole = f"'{losses[0]}'" if len(losses) == 1 else f"{{{', '.join(f'{name}: 1' for name in losses)}}}"
    return f"set {whole}" + " and dpo.nll_weight" * ("sft" in names)
