"""Keys and values of TRL, the handbook, LLaMA-Factory and axolotl: each gets the key here, or why there is none."""

import ast
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from notus import foreign_keys
from notus.config import SECTIONS, load_config
from notus.losses import LOSSES

MINIMAL = "model: {name_or_path: m}\ndata: {train: d}\ntraining: {output_dir: o}\n"

# ruff: noqa: SIM905
# [field.name for field in dataclasses.fields(trl.DPOConfig)], TRL 1.16.0
FIELDS_OF_TRL = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm
    label_smoothing_factor bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha
    torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step log_on_each_node
    logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps
    save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    remove_unused_columns label_names train_sampling_strategy length_column_name ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
    debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank model_init_kwargs
    trust_remote_code router_aux_loss_coef disable_dropout dataset_num_proc max_length truncation_mode padding_free
    pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type loss_weights ld_alpha
    f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau activation_offloading
    sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token
""".split()

HINTS = {
    f"{section}.{name.rstrip('_')}": hint
    for section, cls in SECTIONS.items()
    for name, hint in get_type_hints(cls, include_extras=True).items()
}
OPTIONS = {f"dpo.options.{option.name}" for loss in LOSSES.values() for option in loss.options}
COUNTERPARTS = [(table, name) for table, names in foreign_keys.TABLES.items() for name in names]


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return str(path)


def message(*words: str) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_config(list(words), "dpo")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_of_trls_dpo_config_is_covered() -> None:
    assert len(FIELDS_OF_TRL) == 139
    assert list(foreign_keys.TABLES["TRL's DPOConfig"]) == FIELDS_OF_TRL


def test_trls_fields_are_those_of_the_installed_trl() -> None:
    trl = pytest.importorskip("trl")
    if trl.__version__.startswith("1.16."):
        assert sorted(trl.DPOConfig.__dataclass_fields__) == sorted(FIELDS_OF_TRL)


@pytest.mark.parametrize(("table", "name"), COUNTERPARTS)
def test_a_counterpart_is_a_key_that_exists_or_a_reason(table: str, name: str) -> None:
    found = foreign_keys.TABLES[table][name]
    assert bool(found.keys) == (found.kind == "set")
    assert found.keys or found.note
    assert set(found.keys) <= {*HINTS, *OPTIONS}
    named = re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z]\w+(?:\.\w+)?", found.note)
    assert {key for key in named if Path(key).suffix not in (".json", ".md")} <= {*HINTS, *OPTIONS}


def test_no_name_is_a_section_of_ours() -> None:
    assert not {name for _, name in COUNTERPARTS} & set(SECTIONS)


def test_a_name_means_the_same_in_every_table() -> None:
    """So that it does not matter which trainer a user comes from: the first keys agree."""
    first: dict[str, tuple[str, ...]] = {}
    for table, name in COUNTERPARTS:
        keys = foreign_keys.TABLES[table][name].keys
        assert first.setdefault(name, keys)[:1] == keys[:1], name


def choices(key: str) -> set[str]:
    """The strings that a key may have, where they are listed."""
    parts = [part for part in (HINTS[key], *get_args(HINTS[key])) if get_origin(part) is Literal]
    return set(LOSSES) if key == "dpo.loss_type" else {word for part in parts for word in get_args(part)}


@pytest.mark.parametrize("key", foreign_keys.VALUES)
def test_values_of_others_are_none_of_ours_and_get_one_that_is(key: str) -> None:
    valid = choices(key)
    assert not valid & set(foreign_keys.VALUES[key])
    for advice in foreign_keys.VALUES[key].values():
        named = re.findall(r"set '([\w-]+)'", advice)
        assert not valid or set(named) <= valid, advice


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--learning_rate=1e-6", "--learning_rate has no section; set training.learning_rate"),
        ("--beta=0.1", "--beta has no section; set dpo.beta"),
        ("--per-device-train-batch-size=4", "set training.batch_size (the examples per optimizer step over all GPUs"),
        ("--tokens_per_row=9", "--tokens_per_row has no section; set training.tokens_per_row"),
        ("--training.lr=1", "training.lr does not exist; set training.learning_rate"),
        ("--lora.r=8", "lora.r does not exist; set lora.rank"),
        ("--lora.lora_alpha=8", "lora.lora_alpha does not exist; set lora.alpha"),
        ("--training.gradient_accumulation_steps=2", "set training.batch_size (the examples per optimizer step"),
        ("--model.base_model=x", "set model.name_or_path"),
        ("--dpo.pref_loss=simpo", "set dpo.loss_type"),
        ("--training.fsdp=x", "training.fsdp does not exist; leave it out: FSDP2 shards the model"),
        ("--lora.use_dora=true", "Notus does not have it: LoRA and rsLoRA"),
        ("--trl.beta=0.1", "section 'trl' does not exist; set dpo.beta"),
        ("--dpo.loss_type=dpo", "dpo.loss_type 'dpo' does not exist: the loss of DPO is 'sigmoid'"),
        ("--dpo.loss_type=sigmoid_dpo", "the loss of DPO is 'sigmoid'"),
        ("--dpo.loss_type=kto_pair", "KTO learns from labels: set 'kto'"),
        ("--dpo.loss_type={sigmoid: 1, sft: 1}", "dpo.nll_weight"),
        ("--dpo.loss_type=[sigmoid]", "not ['sigmoid']: set 'sigmoid'"),
        ("--dpo.loss_type=[sigmoid, bco_pair, sft]", ": set {sigmoid: 1, bco_pair: 1} and dpo.nll_weight"),
        ("--dpo.loss_type=sigmoid,bco_pair", ": set {sigmoid: 1, bco_pair: 1}"),
        ("--dpo.options.f_alpha_divergence_coef=0.3", "; set dpo.options.f_alpha (1 minus TRL 1.16's value"),
        ("--training.eval_delay=3", "Notus does not have it: evaluations begin with"),
        ("--dpo.pref_ftx=1", "set dpo.nll_weight and dpo.nll_mean (LLaMA-Factory's mean is dpo.nll_mean=completions)"),
        ("--training.optimizer=adamw_torch", "'rmsprop' or 'adamw', not 'adamw_torch': set 'adamw'"),
        ("--training.optimizer=paged_adamw_8bit", "set adamw with training.optimizer_dtype=int8"),
        ("--training.resume=true", "not True: set 'auto', which is the default"),
        ("--training.activation_checkpointing=true", "not True: set 'full'"),
        ("--lora.target_modules=all", "not 'all': set 'all-linear'"),
        ("--data.chat_template=tokenizer_default", "set null, the tokenizer's own template"),
    ],
)
def test_the_command_line_names_the_key_here(minimal: str, word: str, expected: str) -> None:
    found = message(minimal, word)
    assert found.startswith("command line: ")
    assert expected in found


def test_a_value_after_a_space_gets_the_key_too(minimal: str) -> None:
    assert "set training.learning_rate" in message(minimal, "--learning_rate", "1e-6")


FILES = {
    "the handbook": (
        "model_name_or_path: m\ntorch_dtype: null\ndataset_mixer: {a/b: 1.0}\nbf16: true\nbeta: 0.01\n"
        "gradient_accumulation_steps: 2\nlearning_rate: 5.0e-7\nhub_model_id: x\nmy_own: 1\n",
        "write the keys in sections: model_name_or_path -> model.name_or_path, torch_dtype -> training.precision, "
        "dataset_mixer -> data.train, bf16 -> training.precision, and 4 more",
    ),
    "LLaMA-Factory": (
        "stage: dpo\ndo_train: true\nfinetuning_type: lora\npref_beta: 0.1\ncutoff_len: 2048\n",
        "finetuning_type -> lora.rank, pref_beta -> dpo.beta, cutoff_len -> data.max_length, "
        "stage -> (none needed), and 1 more",
    ),
    "axolotl": (
        "base_model: m\nrl: dpo\ndatasets:\n- {path: a}\nsequence_len: 8\nmicro_batch_size: 2\n",
        "base_model -> model.name_or_path, datasets -> data.train, sequence_len -> data.max_length, "
        "micro_batch_size -> training.batch_size, and 1 more",
    ),
    "one key beside our sections": (MINIMAL + "beta: 0.2\n", "write the keys in sections: beta -> dpo.beta; see"),
    "a mapping": (MINIMAL + "trl: {beta: 0.2}\n", "write the keys in sections: trl -> dpo.beta; see"),
    "a key of another trainer in a section": (MINIMAL + "lora: {r: 8}\n", "lora.r does not exist; set lora.rank"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_trainer_is_translated_in_a_line(tmp_path: Path, name: str) -> None:
    text, expected = FILES[name]
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    found = message(str(path))
    assert found.startswith(f"{path}: ")
    assert expected in found


def test_a_key_of_ours_is_never_taken_for_anothers(minimal: str) -> None:
    """`mask_history` is LLaMA-Factory's, too."""
    assert load_config([minimal, "--data.mask_history=true"], "dpo").data.mask_history


def test_the_table_is_data_alone() -> None:
    """Nothing is imported from the project, so that a table for the docs can be made of it anywhere."""
    tree = ast.parse(Path(foreign_keys.__file__).read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if name and name.startswith("notus")]
