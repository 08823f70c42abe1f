import json
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import largest_file
from families import make_family
from runs import config, write_messages, write_pairs
from safetensors.torch import load_file
from toys import assets_dir, toy_model_folder, toy_tokenizer

from notus.training import dpo, setup, sft


def test_a_disk_that_fills_up_at_the_export_costs_nothing_but_the_export(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("dpo", tmp_path / "run", model_folder, pairs_file, training__max_steps=2)
    export_model = setup.export_model

    def on_full_disk(*args: Any, **options: Any) -> None:
        with largest_file(20_000):
            export_model(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(setup, "export_model", on_full_disk)
        with pytest.raises(OSError, match=r"run/model: cannot be written \(.*File too large.* GB free in"):
            dpo.run(settings)
    assert not (tmp_path / "run" / "model").exists()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    dpo.run(settings)  # the same command resumes from the last checkpoint
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    dpo.run(config("dpo", tmp_path / "undisturbed", model_folder, pairs_file, training__max_steps=2))
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "undisturbed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["mistral", "opt"])  # rotary positions and learned ones
def test_rows_beyond_the_models_context_stop_a_run_before_any_work(tmp_path: Path, kind: str) -> None:
    folder = toy_model_folder(tmp_path / "model", kind, max_position_embeddings=16)
    pairs, demonstrations = write_pairs(tmp_path / "pairs.jsonl", 30), write_messages(tmp_path / "rows.jsonl", 30)
    for task, run, data in (("dpo", dpo.run, pairs), ("sft", sft.run, demonstrations)):
        with pytest.raises(ValueError, match=r"longest row has \d\d tokens, but the context of the model ends at 16"):
            run(config(task, tmp_path / task, folder, data))
        assert not (tmp_path / task / "reference").exists()
        # rows within it are trained, whatever data.max_length allows
        run(config(task, tmp_path / task, folder, data, data__max_length=16, training__max_steps=1))
    short = tmp_path / "short.jsonl"
    short.write_text('{"prompt": "a", "completion": " b"}\n' * 4)
    sft.run(config("sft", tmp_path / "short", folder, short, training__max_steps=1))


def test_the_evaluation_rows_must_fit_the_context_too(tmp_path: Path) -> None:
    folder = toy_model_folder(tmp_path / "model", max_position_embeddings=16)
    short, long = tmp_path / "short.jsonl", write_messages(tmp_path / "long.jsonl", 30)
    short.write_text('{"prompt": "a", "completion": " b"}\n' * 4)
    with pytest.raises(ValueError, match=r"set data\.max_length to 16 or less"):
        sft.run(config("sft", tmp_path / "run", folder, short, data__eval=str(long)))


@pytest.mark.skipif(assets_dir() is None, reason="needs the stories260K checkpoint")
def test_stories_of_1030_tokens_are_beyond_its_context(tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": " b" * 1500}) + "\n")
    folder = assets_dir() / "stories260K"  # type: ignore[operator]
    settings = {"data__max_length": 1030, "training__tokens_per_row": 1100}
    with pytest.raises(ValueError, match=r"longest row has 1,030 tokens, but the context of the model ends at 512"):
        sft.run(config("sft", tmp_path / "run", folder, data, **settings))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_exports_a_model_that_stops_where_it_learned_to(
    tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = toy_model_folder(tmp_path / "model")  # its configs end at 2
    tokenizer = toy_tokenizer(chat_template="{{ messages[0].content }}")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(8)
    tokenizer.save_pretrained(folder)
    data = write_messages(tmp_path / "rows.jsonl", 4)
    sft.run(config("sft", tmp_path / "run", folder, data, training__max_steps=1, lora__rank=rank))
    model = tmp_path / "run" / "model"
    for name in ["generation_config.json"] if rank else ["generation_config.json", "config.json"]:
        assert json.loads((model / name).read_text())["eos_token_id"] == [2, 8]
    assert ("note: the adapter learned to stop at" in capsys.readouterr().out) == bool(rank)
    assert json.loads((model / "notus.json").read_text()) == {"string_prompts": "text"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora__target_modules": ["qproj"]}, r"LoRA target 'qproj' matches no linear layer"),
        ({"lora__rank": 64}, r"lora\.rank 64 is above what"),
        ({"lora__modules_to_save": ["nothing"]}, r"lora\.modules_to_save: no module is named 'nothing'"),
        (
            {"lora__modules_to_save": ["q_proj"]},
            r"lora\.modules_to_save: .*q_proj is trained in full and a LoRA target",
        ),
        ({"model__quantization": "nf4", "lora__modules_to_save": ["layers"]}, r"holds a LoRA target"),
        ({"lora__continue": True}, r"set lora\.rank=2"),
        ({"lora__continue": True, "lora__rank": 2, "lora__target_modules": ["q_proj"]}, r"set lora\.target_modules="),
        (
            {"lora__continue": True, "lora__rank": 2, "lora__modules_to_save": ["lm_head"]},
            r"set lora\.modules_to_save=",
        ),
    ],
)
def test_wrong_adapters_stop_a_run_before_any_data_is_read(
    overrides: dict[str, Any], message: str, tmp_path: Path, model_folder: Path, pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if overrides.get("lora__continue"):
        first = {"lora__rank": 2, "training__max_steps": 1}
        dpo.run(config("dpo", tmp_path / "first", model_folder, pairs_file, **first))
        overrides = {**overrides, "model__adapter": str(tmp_path / "first" / "model")}
    monkeypatch.setattr(setup, "load_inputs", lambda *_, **__: pytest.fail("data was read first"))
    with pytest.raises(ValueError, match=message):
        dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, **{"lora__rank": 4, **overrides}))


def test_an_adapter_of_another_base_stops_a_run_before_any_data_is_read(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dpo.run(config("dpo", tmp_path / "first", model_folder, pairs_file, lora__rank=2, training__max_steps=1))
    other, adapter = toy_model_folder(tmp_path / "wide", hidden_size=64), str(tmp_path / "first" / "model")
    monkeypatch.setattr(setup, "load_inputs", lambda *_, **__: pytest.fail("data was read first"))
    with pytest.raises(ValueError, match="is its base another"):
        dpo.run(config("dpo", tmp_path / "run", other, pairs_file, model__adapter=adapter))


def test_nothing_to_quantise_stops_a_run_before_any_data_is_read(
    tmp_path: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    make_family("gpt2").save_pretrained(folder)  # its layers are `Conv1D`
    toy_tokenizer(vocab_size=360).save_pretrained(folder)
    # Without this, it is LoRA that finds no layer.
    monkeypatch.setattr("notus.training.parallelize.inject_lora", lambda *_, **__: None)
    monkeypatch.setattr(setup, "load_inputs", lambda *_, **__: pytest.fail("data was read first"))
    with pytest.raises(
        ValueError, match=r"^model\.quantization: GPT2LMHeadModel has no frozen nn\.Linear in its blocks"
    ):
        dpo.run(config("dpo", tmp_path / "run", folder, pairs_file, model__quantization="nf4", lora__rank=1))
