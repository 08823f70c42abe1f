"""Second stages: a run from an adapter, merged or trained further; modules trained in full; all by PEFT's log-probs."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import free_port, launched, run_ranks
from runs import config, read_metrics, write_pairs
from safetensors.torch import load_file
from toys import UNEVEN, logits, relative, toy_config, toy_model_folder, toy_tokenizer
from transformers import AutoModelForCausalLM

from notus import __main__ as entry
from notus.config import LoraConfig, save_config
from notus.data.batching import step_rows
from notus.data.dataset import TokenizedDataset
from notus.data.tokenize import load_pairs
from notus.estimate.sizes import sizes
from notus.evaluation.preferences.scores import Scoring, score_model
from notus.evaluation.resolve_model import (
    adapter_below,
    find_base,
    find_source,
    load_unfinished,
    read_run_settings,
    switches_to,
)
from notus.model.export import export_adapter, load_causal_lm
from notus.model.lora import merge_lora, saved_parameters
from notus.runtime.distributed import process_group
from notus.training import dpo
from notus.training.parallelize import build_policy, expect_last_row, hand_over_gradients, read_model_config
from notus.training.scoring import score
from notus.training.setup import start

peft = pytest.importorskip("peft")
QUICK = {"training__max_steps": 2, "training__learning_rate": 2e-2, "training__optimizer": "adamw"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toy_model_folder(tmp_path / "base")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl", 10)


def write_peft(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter as PEFT makes it, whose B is not zero, and whose saved modules are not the base's."""
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **settings}
    torch.manual_seed(5)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **given),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name and parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def with_peft(base: Path, *adapters: Path) -> torch.nn.Module:
    """The base with adapters on it, one merged before the next."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.requires_grad_(False).eval()


def plain_logps(model: torch.nn.Module, rows: TokenizedDataset) -> torch.Tensor:
    """fp32 [n, 2], by the model's own forward on each whole sequence."""
    found = []
    for example in rows(np.arange(len(rows))):
        for branch, mask in zip(example.branches, example.loss_masks, strict=True):
            ids = torch.tensor([[*example.trunk, *branch]], dtype=torch.long)
            logps = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            found.append(logps[len(example.trunk) - 1 :][torch.from_numpy(mask)].sum())
    return torch.stack(found).view(-1, 2)  # with gradients, if the model's parameters have them


def train(settings: Any) -> tuple[torch.Tensor, torch.Tensor, TokenizedDataset]:
    """Run DPO; return the reference's log-probs, the trained policy's, and the rows."""
    with start(settings) as job:
        assert job is not None
        task = dpo.build_task(job, settings)
        assert job.train(task) == 0
        rows = job.train_rows
        logps = score(job.policy, rows, np.arange(len(rows)), tokens_per_row=400, device=job.device)
        return task._train.reference, logps, rows


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-4)


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"up_proj": 2}},
    "regex": {"target_modules": r".*\.1\..*(k_proj|down_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [1]},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_starts_from_pefts_adapter(name: str, rank: int, base: Path, pairs: Path, tmp_path: Path) -> None:
    adapter = write_peft(base, tmp_path / "adapter", **ADAPTERS[name])
    lora = {"lora__rank": rank, "lora__target_modules": ["q_proj", "v_proj"]} if rank else {}
    out = tmp_path / "run"
    reference, trained, rows = train(config("dpo", out, base, pairs, model__adapter=str(adapter), **lora, **QUICK))
    assert_near(reference, plain_logps(with_peft(base, adapter), rows))
    assert (plain_logps(with_peft(base), rows) - reference).abs().max() > 0.3
    assert (trained - reference).abs().max() > 0.1
    result = with_peft(base, out / "model") if rank else AutoModelForCausalLM.from_pretrained(out / "model")
    assert_near(plain_logps(result, rows), trained)
    assert read_metrics(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_trained_further(rslora: bool, base: Path, pairs: Path, tmp_path: Path) -> None:
    adapter = write_peft(base, tmp_path / "adapter", use_rslora=rslora)
    lora = {"lora__rank": 3, "lora__alpha": 6, "lora__target_modules": ["up_proj", "q_proj"], "lora__rslora": rslora}
    out = tmp_path / "run"
    settings = config("dpo", out, base, pairs, model__adapter=str(adapter), lora__continue=True, **lora, **QUICK)
    reference, trained, rows = train(settings)
    assert_near(reference, plain_logps(with_peft(base, adapter), rows))
    assert (trained - reference).abs().max() > 0.1
    assert_near(plain_logps(with_peft(base, out / "model"), rows), trained)
    assert read_metrics(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    before, after = (peft.LoraConfig.from_pretrained(folder) for folder in (adapter, out / "model"))
    assert (before.r, before.lora_alpha, before.target_modules) == (after.r, after.lora_alpha, after.target_modules)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora__rank": 2}, r"lora\.rank is 2, but 3 in the adapter: set lora\.rank=3"),
        ({"lora__alpha": 12}, r"lora\.alpha is 12, but 6 in the adapter: set lora\.alpha=6"),
        ({"lora__rslora": True}, r"lora\.rslora is true, but false in the adapter: set lora\.rslora=false"),
        ({"lora__target_modules": ["q_proj"]}, r"set lora\.target_modules=\[q_proj, up_proj\]"),
        ({"lora__modules_to_save": ["lm_head"]}, r"set lora\.modules_to_save=\[\]"),
    ],
)
def test_training_further_needs_the_adapters_settings(
    change: dict[str, Any], message: str, base: Path, pairs: Path, tmp_path: Path
) -> None:
    adapter = write_peft(base, tmp_path / "adapter")
    lora = {"lora__rank": 3, "lora__alpha": 6, "lora__target_modules": ["up_proj", "q_proj"], "lora__continue": True}
    with pytest.raises(ValueError, match=message):
        dpo.run(config("dpo", tmp_path / "run", base, pairs, model__adapter=str(adapter), **{**lora, **change}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head", "model.norm", "mlp"]])
def test_modules_are_trained_in_full_beside_the_adapters(
    names: list[str], tied: bool, pairs: Path, tmp_path: Path
) -> None:
    base = toy_model_folder(tmp_path / "base", "qwen3", tie_word_embeddings=tied)
    lora = {"lora__rank": 2, "lora__modules_to_save": names}
    out = tmp_path / "run"
    reference, trained, rows = train(config("dpo", out, base, pairs, **lora, **QUICK))
    assert_near(reference, plain_logps(with_peft(base), rows))
    found = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "model").eval()
    assert_near(plain_logps(found, rows), trained)
    embedding, head = found.get_input_embeddings().weight, found.get_output_embeddings().weight
    start_embedding = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert torch.equal(embedding, head) is tied
    assert torch.equal(embedding, start_embedding) is (not tied and "embed_tokens" not in names)
    merged, _ = load_causal_lm(out / "model", dtype=torch.float32, device="cpu")
    assert_near(plain_logps(merged, rows), trained)
    # and further, by merging, and by training the same
    again = {"lora__rank": 2, "model__name_or_path": str(out), **QUICK}
    reference, trained, _ = train(config("dpo", tmp_path / "merged", base, pairs, **again))
    assert_near(reference, plain_logps(found, rows))
    assert_near(plain_logps(with_peft(base, tmp_path / "merged" / "model"), rows), trained)
    more = {**again, "lora__continue": True, "lora__modules_to_save": names}
    reference, trained, _ = train(config("dpo", tmp_path / "more", base, pairs, **more))
    assert_near(reference, plain_logps(found, rows))
    assert_near(plain_logps(with_peft(base, tmp_path / "more" / "model"), rows), trained)


@pytest.mark.parametrize("kind", ["merged", "continued"])
def test_evaluation_takes_the_starting_model_for_the_reference(
    kind: str, base: Path, pairs: Path, tmp_path: Path
) -> None:
    adapter, out = write_peft(base, tmp_path / "adapter"), tmp_path / "run"
    lora = {"lora__rank": 3, "lora__alpha": 6, "lora__target_modules": ["up_proj", "q_proj"]}
    more = {"lora__continue": True} if kind == "continued" else {}
    given = {"model__adapter": str(adapter), **lora, **more, **QUICK}
    reference, trained, rows = train(config("dpo", out, base, pairs, training__save_every=1, **given))
    with process_group() as device:
        scoring = Scoring(pairs=rows, tokenizer=toy_tokenizer(), precision="fp32", device=device)
        model = find_source(str(out))
        start_model = find_base(model)
        assert start_model is not None
        assert not switches_to(model, start_model)
        assert_near(score_model(start_model, scoring).pairs, reference)
        assert_near(score_model(model, scoring).pairs, trained)
        shutil.rmtree(out / "model")  # an unfinished run
        snapshot, tokenizer, _ = load_unfinished(out, read_run_settings(out))
    below = adapter_below(read_run_settings(out))
    export_adapter(snapshot, tmp_path / "new", base_model_name_or_path=str(base), tokenizer=tokenizer, below=below)
    assert_near(plain_logps(with_peft(base, tmp_path / "new"), rows), trained)
    merge_lora(snapshot)
    assert_near(plain_logps(snapshot.eval(), rows), trained)


def test_a_reference_of_another_adapter_is_not_taken(base: Path, pairs: Path, tmp_path: Path) -> None:
    cache = {"reference__cache_dir": str(tmp_path / "cache")}
    found = []
    for name in ("plain", "rslora"):
        adapter = write_peft(base, tmp_path / name, **ADAPTERS[name])
        found.append(
            train(config("dpo", tmp_path / f"{name} run", base, pairs, model__adapter=str(adapter), **cache, **QUICK))
        )
    assert (found[0][0] - found[1][0]).abs().max() > 0.3
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_the_reference_command_fills_what_the_run_reads(base: Path, pairs: Path, tmp_path: Path, capsys) -> None:
    adapter = write_peft(base, tmp_path / "adapter")
    lora = {"lora__rank": 3, "lora__alpha": 6, "lora__target_modules": ["up_proj", "q_proj"], "lora__continue": True}
    settings = config("dpo", tmp_path / "run", base, pairs, model__adapter=str(adapter), **lora, **QUICK)
    dpo.fill_reference(settings)
    capsys.readouterr()
    reference, _, rows = train(settings)
    assert "rows read from" in capsys.readouterr().out
    assert_near(reference, plain_logps(with_peft(base, adapter), rows))


def test_tied_weights_that_peft_would_load_apart_are_refused(pairs: Path, tmp_path: Path) -> None:
    base = toy_model_folder(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    adapter = write_peft(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match=r"gives lm_head\.weight and model\.embed_tokens\.weight different weights"):
        dpo.run(config("dpo", tmp_path / "run", base, pairs, model__adapter=str(adapter)))
    adapter = write_peft(base, tmp_path / "tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    reference, _, rows = train(config("dpo", tmp_path / "run", base, pairs, model__adapter=str(adapter), **QUICK))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    assert_near(reference, plain_logps(theirs, rows))


@pytest.mark.parametrize("names", [["nothing"], ["q_proj"], ["self_attn"]])
def test_modules_that_cannot_be_saved(names: list[str], base: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"lora\.modules_to_save: (no module is named 'nothing'|.* is trained in full)"
    ):
        dpo.run(config("dpo", tmp_path / "run", base, pairs, lora__rank=2, lora__modules_to_save=names))


def on_two_ranks(port: int, base: str, pairs: str, out: str, settings: dict[str, Any]) -> None:
    with launched(port):
        dpo.run(config("dpo", Path(out), Path(base), Path(pairs), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_two_ranks_merge_and_stack_as_one(rank: int, pairs: Path, tmp_path: Path) -> None:
    base = toy_model_folder(tmp_path / "base", "qwen3", **{**UNEVEN, "tie_word_embeddings": False})
    adapter = write_peft(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    lora = {"lora__rank": rank, "lora__modules_to_save": ["embed_tokens"]} if rank else {}
    settings = {**QUICK, **lora, "training__optimizer": "rmsprop", "model__adapter": str(adapter)}
    dpo.run(config("dpo", tmp_path / "one", base, pairs, **settings))
    run_ranks(on_two_ranks, 2, tmp_path, free_port(), str(base), str(pairs), str(tmp_path / "two"), settings)
    for key in ("loss", "logps/chosen", "grad_norm"):
        ones, twos = ([line[key] for line in read_metrics(tmp_path / name)] for name in ("one", "two"))
        assert twos == pytest.approx(ones, rel=1e-4)
    found = []
    for name in ("one", "two"):
        model, _ = load_causal_lm(tmp_path / name / "model", dtype=torch.float32, device="cpu")
        found.append(logits(model))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    if rank:
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "two" / "model")
        torch.testing.assert_close(logits(model.eval()), found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["packed", "plain"])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_modules_trained_in_full_are_the_models_own(
    tied: bool, path: str, pairs: Path, tmp_path: Path
) -> None:
    base = toy_model_folder(tmp_path / "base", "qwen3", tie_word_embeddings=tied)
    names = ["embed_tokens", "lm_head", "input_layernorm", "model.norm", "down_proj"]
    lora = LoraConfig(rank=2, target_modules=["q_proj"], modules_to_save=names)
    rows = TokenizedDataset(load_pairs(pairs, toy_tokenizer(), max_length=120, max_prompt_length=60)[0])
    with process_group() as device:
        policy = build_policy(base, read_model_config(base), device=device, precision="fp32", lora=lora, path=path)
        batches = list(step_rows(rows, np.arange(len(rows)), rank=0, world_size=1, tokens_per_row=150))
        for number, batch in enumerate(batches):
            expect_last_row(policy, number == len(batches) - 1)
            policy(batch).sum().backward()
        hand_over_gradients(policy)
        saved = saved_parameters(policy.causal_lm)
        found = {name: each.grad.full_tensor() for name, each in saved.items() if each.grad is not None}
    model = AutoModelForCausalLM.from_pretrained(base)
    plain_logps(model, rows).sum().backward()
    expected = dict(model.named_parameters(remove_duplicate=False))
    assert len(found) == 1 + 1 + 2 + 1 + 2
    for name, gradient in found.items():
        assert relative(gradient, expected[name].grad) < 1e-5, name
    others = {name for name, each in policy.causal_lm.named_parameters() if each.requires_grad} - found.keys()
    assert {name.rpartition(".")[2] for name in others} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("kind", ["merged", "continued"])
def test_in_bf16_masters_are_fp32_and_the_start_is_the_reference(
    kind: str, base: Path, pairs: Path, tmp_path: Path
) -> None:
    names = ["embed_tokens", "lm_head"]
    adapter, out = write_peft(base, tmp_path / "adapter", modules_to_save=names), tmp_path / "run"
    lora = {"lora__rank": 3, "lora__alpha": 6, "lora__target_modules": ["up_proj", "q_proj"]}
    more = {"lora__continue": True} if kind == "continued" else {}
    given = {"model__adapter": str(adapter), "lora__modules_to_save": names, **lora, **more, **QUICK}
    given |= {"training__precision": "bf16", "training__learning_rate": 1e-5}
    reference, _, rows = train(config("dpo", out, base, pairs, **given))
    expected = plain_logps(with_peft(base, adapter), rows)
    assert relative(reference, expected) < 0.02
    assert read_metrics(out)[0]["loss"] == pytest.approx(math.log(2), abs=5e-3)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, out / "model"))
    key = "base_model.model.model.embed_tokens.weight"
    assert after[key].dtype == torch.float32
    moved = (after[key] - before[key]).abs().max()
    assert 0 < moved < 1e-4  # which bf16 would have rounded away
    assert relative(plain_logps(with_peft(base, out / "model"), rows), expected) < 0.02


@pytest.mark.parametrize("kind", ["merged", "continued"])
def test_a_resumed_second_stage_ends_as_an_undisturbed_one(kind: str, base: Path, pairs: Path, tmp_path: Path) -> None:
    adapter = write_peft(base, tmp_path / "adapter")
    lora = {"lora__rank": 3, "lora__alpha": 6, "lora__target_modules": ["up_proj", "q_proj"], "lora__dropout": 0.1}
    more = {"lora__continue": True} if kind == "continued" else {}
    given = {"model__adapter": str(adapter), **lora, **more, **QUICK, "training__save_every": 1}
    dpo.run(config("dpo", tmp_path / "whole", base, pairs, **given))
    given["training__resume"] = str(tmp_path / "whole" / "checkpoints" / "step-00000001")
    dpo.run(config("dpo", tmp_path / "resumed", base, pairs, **given))
    ours, theirs = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    write_peft(base, adapter, r=5)  # other contents under the same name
    with pytest.raises(ValueError, match=r"(made from other contents of model\.adapter|set lora\.rank=5)"):
        dpo.run(config("dpo", tmp_path / "other", base, pairs, **given))


def test_dropout_on_a_trained_adapter_does_not_hide_a_wrong_reference(
    base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_peft(base, tmp_path / "adapter")
    lora = {"lora__rank": 3, "lora__alpha": 6, "lora__target_modules": ["up_proj", "q_proj"], "lora__dropout": 0.5}
    given = {"model__adapter": str(adapter), "lora__continue": True, **lora, **QUICK}
    dpo.run(config("dpo", tmp_path / "run", base, pairs, **given))
    assert read_metrics(tmp_path / "run")[0]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    passes = []

    def other(*args: Any, **options: Any) -> torch.Tensor:
        passes.append(1)
        found = score(*args, **options)
        return found + torch.tensor([0.0, 1.0]) if len(passes) == 1 else found

    monkeypatch.setattr(dpo, "score", other)
    with pytest.raises(ValueError, match=r"at step 0 the sigmoid loss is .*, not ln 2"):
        dpo.run(config("dpo", tmp_path / "other", base, pairs, **given))


def test_another_base_than_the_adapters_is_told(base: Path, pairs: Path, tmp_path: Path, capsys) -> None:
    adapter = write_peft(base, tmp_path / "adapter")
    given = {"model__adapter": str(adapter), **QUICK, "training__max_steps": 1}
    dpo.run(config("dpo", tmp_path / "run", base, pairs, **given))
    assert "names" not in capsys.readouterr().out
    copy = shutil.copytree(base, tmp_path / "copy")
    dpo.run(config("dpo", tmp_path / "other", copy, pairs, **given))
    assert f"note: the adapter {adapter} names {base} as its base; here it is {copy}" in capsys.readouterr().out


def test_the_estimate_of_a_second_stage(base: Path, pairs: Path, tmp_path: Path, capsys) -> None:
    dpo.run(config("dpo", tmp_path / "run", base, pairs, lora__rank=2, **QUICK))
    found = {}
    for name, more in {
        "full": {}, "lora": {"lora__rank": 2}, "saved": {"lora__rank": 2, "lora__modules_to_save": ["lm_head"]},
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        save_config(config("dpo", tmp_path / name, tmp_path / "run", pairs, **more), path)
        capsys.readouterr()
        assert entry.main(["estimate", str(path), "--gpus", "1", "--task", "dpo"]) == 0
        text = capsys.readouterr().out
        assert "10 examples of the data, tokenised" in text
        found[name] = text
    size = dict.fromkeys(found, 0)
    for name, names in {"lora": [], "saved": ["lm_head"]}.items():
        sized, _ = sizes(toy_config(), lora_rank=2, target_modules=["q_proj"], modules_to_save=names)
        size[name] = sized.trained
    assert size["saved"] - size["lora"] == 400 * 32


@pytest.mark.parametrize("names", [[], ["lm_head"]])
def test_an_adapter_is_merged_before_weights_are_quantised(
    names: list[str], base: Path, pairs: Path, tmp_path: Path
) -> None:
    adapter, merged = write_peft(base, tmp_path / "adapter"), tmp_path / "merged"
    with_peft(base, adapter).save_pretrained(merged)
    toy_tokenizer().save_pretrained(merged)
    given = {"lora__rank": 2, "lora__modules_to_save": names, "model__quantization": "nf4", **QUICK}
    once = train(config("dpo", tmp_path / "one", base, pairs, model__adapter=str(adapter), **given))
    other = train(config("dpo", tmp_path / "other", merged, pairs, **given))
    assert_near(once[0], other[0])
    assert_near(once[1], other[1])
    assert (once[0] - plain_logps(with_peft(merged), once[2])).abs().max() > 0.1  # 4 bits are not 32
