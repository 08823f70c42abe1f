"""DPO against another reference than the policy's start, `reference.model`, beside two models loaded apart."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import free_port, launched, run_ranks
from rated import write_labels, write_lists
from runs import assert_same_run, at_call, config, read_metrics, terminate, write_pairs
from toys import toy_model_folder, toy_tokenizer
from transformers import AutoModelForCausalLM

from notus import __main__ as entry
from notus.config import Config
from notus.data.dataset import TokenizedDataset
from notus.evaluation.formatting import short_path
from notus.evaluation.read_run import read_run
from notus.evaluation.release.card import Release, model_card
from notus.evaluation.release.push import private_paths
from notus.evaluation.report.headlines import headlines
from notus.evaluation.report.tables import facts
from notus.evaluation.resolve_model import find_base, find_source
from notus.model.policy import Policy
from notus.runtime.distributed import process_group
from notus.runtime.process import STOPPED
from notus.training import dpo, reference_model, setup
from notus.training.checkpoint import read_identity
from notus.training.parallelize import build_policy, load_policy
from notus.training.setup import start
from notus.training.warnings import CHOSEN_CHANGE, SUMMED_MARGINS, Guards, since_start


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer."""
    return toy_model_folder(tmp_path_factory.mktemp("other"), seed=1)


@torch.no_grad()
def plain_logps(folder: Path, rows: TokenizedDataset) -> np.ndarray:
    """fp64 [n, K], by transformers' own forward on each whole sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = np.zeros((len(rows), rows.num_branches))
    for number, example in enumerate(rows(np.arange(len(rows)))):
        for column, (branch, mask) in enumerate(zip(example.branches, example.loss_masks, strict=True)):
            ids = torch.tensor([[*example.trunk, *branch]], dtype=torch.long)
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(example.trunk) - 1 :, 0]
            found[number, column] = logps[torch.from_numpy(mask)].double().sum()
    return found


def reference_of(settings: Config) -> torch.Tensor:
    """The reference log-probs of a run's training rows; it is not trained."""
    with start(settings, train=False) as job:
        assert job is not None
        found = dpo.build_task(job, settings)._train.reference
    assert found is not None
    return found


def initial(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "initial_evaluation.json").read_text())
    return found


def test_the_first_losses_are_those_of_two_models(
    tmp_path: Path, model_folder: Path, other_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step's loss and metrics, the reference's log-probs and the evaluation before training."""
    given = {"reference__model": str(other_folder), "data__eval_size": 5, "training__max_steps": 1}
    settings = config("dpo", tmp_path / "run", model_folder, pairs_file, training__batch_size=13, **given)
    with start(settings) as job:
        assert job is not None
        task = dpo.build_task(job, settings)
        train, held, reference = job.train_rows, job.eval_rows, task._train.reference
        assert job.train(task) == 0
    assert held is not None
    assert reference is not None
    assert reference.numpy() == pytest.approx(plain_logps(other_folder, train), abs=2e-4)
    (line,) = read_metrics(tmp_path / "run")
    for rows, found, prefix in ((train, line, ""), (held, initial(tmp_path / "run"), "eval_")):
        ratios = plain_logps(model_folder, rows) - plain_logps(other_folder, rows)
        margins = 0.1 * (ratios[:, 0] - ratios[:, 1])
        assert found[f"{prefix}loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=2e-5)
        assert found[f"{prefix}rewards/chosen"] == pytest.approx(0.1 * ratios[:, 0].mean(), abs=2e-5)
        assert found[f"{prefix}rewards/accuracies"] == (margins > 0).mean()
        assert abs(found[f"{prefix}loss"] - math.log(2)) > 1e-3
    ratios = plain_logps(model_folder, train) - plain_logps(other_folder, train)
    said = re.search(r"policy's log-probs are (\S+) nats per completion", capsys.readouterr().out)
    assert said is not None
    # the commands on a run take the same model for its reference
    assert entry.main(["evaluate", str(tmp_path / "run"), "--output", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["base"] == str(other_folder)
    assert figures["overall"]["margin"] == pytest.approx(line["eval_rewards/margins"], abs=1e-5)
    run = read_run(tmp_path / "run")
    assert headlines(run)["Held-out reward margin"].start is not None  # comparable with the evaluation before training
    assert facts(run)["Reference"] == short_path(str(other_folder))
    card = model_card(Release(run, "full", "toy"), chat=False)
    assert f"| reference model | {other_folder.name} |" in card
    assert str(other_folder) in private_paths(run)
    assert float(said[1]) == pytest.approx(ratios.mean(), rel=1e-3)


KINDS: dict[str, dict[str, Any]] = {
    "kto": {"dpo__loss_type": "kto"},
    "lists": {"dpo__loss_type": "plackett_luce"},
    "ld": {"dpo__ld_alpha": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rows_is_compared_with_the_other_model(
    kind: str, tmp_path: Path, model_folder: Path, other_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what KTO joins for its KL term, which the first evaluation must not take for 0."""
    write = {"kto": write_labels, "lists": write_lists}.get(kind, write_pairs)
    held: list[dpo.Preferences] = []
    inner = dpo.DPOTask.evaluate_start
    monkeypatch.setattr(
        dpo.DPOTask, "evaluate_start", lambda task, *given: (held.append(task._held_out), inner(task, *given))[1]
    )
    given = {"reference__model": str(other_folder), "data__eval_size": 5, "training__max_steps": 1, **KINDS[kind]}
    run = tmp_path / "run"
    assert dpo.run(config("dpo", run, model_folder, write(tmp_path / "data.jsonl", 18), **given)) == 0
    data = held[0]
    assert data.reference is not None
    ratios = []
    for part in filter(None, (data, data.mismatched)):
        there = part.rows.loss_tokens > 0
        expected = plain_logps(other_folder, part.rows)
        assert part.reference is not None
        assert part.reference.numpy()[there] == pytest.approx(expected[there], abs=2e-4)
        ratios.append((plain_logps(model_folder, part.rows) - expected)[:, 0].mean())
    if kind == "kto":
        assert initial(run)["eval_kl"] == pytest.approx(max(0.0, ratios[1]), abs=1e-4)
    chosen = np.ones(5, bool) if data.labels is None else data.labels.numpy()
    if kind != "lists":
        change = (plain_logps(model_folder, data.rows) - plain_logps(other_folder, data.rows))[chosen, 0]
        if kind != "ld":
            assert initial(run)["eval_rewards/chosen"] == pytest.approx(0.1 * change.mean(), abs=2e-5)
    assert initial(run)["eval_loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_the_policys_own_start_named_as_reference_is_the_same_run(
    tmp_path: Path, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy elsewhere has the same weights: nothing is loaded for it, and all checks of the start are made."""
    copy = toy_model_folder(tmp_path / "copy")
    monkeypatch.setattr(reference_model, "build_policy", None)
    for name, given in (("named", {"reference__model": str(copy)}), ("null", {})):
        more = {"data__eval_size": 4, "training__eval_every": 2, "lora__rank": 2, **given}
        assert dpo.run(config("dpo", tmp_path / name, model_folder, pairs_file, **more)) == 0
    assert_same_run(tmp_path / "named", tmp_path / "null")
    assert initial(tmp_path / "named")["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    caches = [sorted(path.name for path in (tmp_path / name / "reference").iterdir()) for name in ("named", "null")]
    assert caches[0] == caches[1]


def test_models_share_a_cache_folder_and_never_a_cache(
    tmp_path: Path, model_folder: Path, other_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cache for each reference, whatever its name; the model behind it is not loaded again."""
    loads: list[Path] = []

    def load(policy: Policy, folder: Path, **more: Any) -> None:
        loads.append(folder)
        load_policy(policy, folder, **more)

    monkeypatch.setattr(reference_model, "load_policy", load)
    third = toy_model_folder(tmp_path / "model", seed=2)

    def found(name: str, model: Path, reference: Path | None) -> torch.Tensor:
        more = {"reference__cache_dir": str(tmp_path / "cache"), "reference__model": reference and str(reference)}
        return reference_of(config("dpo", tmp_path / name, model, pairs_file, **more))

    own, other = found("null", model_folder, None), found("other", model_folder, other_folder)
    assert torch.equal(found("again", model_folder, other_folder), other)
    before = found("third", model_folder, third)
    assert torch.equal(found("start", other_folder, None), other)  # reads what "other" computed
    assert loads == [other_folder, third]
    assert not any(map(torch.equal, (own, own, other), (other, before, before)))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    changed = toy_model_folder(third, seed=3)  # other weights under the same name
    assert not torch.equal(found("changed", model_folder, changed), before)
    assert loads == [other_folder, third, third]


def test_a_run_resumes_with_its_reference_and_no_other(
    tmp_path: Path, model_folder: Path, other_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = toy_model_folder(tmp_path / "reference", seed=1)
    given = {"reference__model": str(reference), "training__max_steps": 4}
    whole = config("dpo", tmp_path / "whole", model_folder, pairs_file, **given)
    cut = config("dpo", tmp_path / "cut", model_folder, pairs_file, **given)
    assert dpo.run(whole) == 0
    with monkeypatch.context() as patch:
        at_call(patch, dpo.DPOTask, "row_loss", 3, terminate)
        assert dpo.run(cut) == STOPPED
    for other, message in (
        (None, "reference.model (was "), (str(other_folder), "reference.model (was "),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            dpo.run(config("dpo", tmp_path / "cut", model_folder, pairs_file, **{**given, "reference__model": other}))
    branch = {**given, "training__resume": str(tmp_path / "cut" / "checkpoints" / "step-00000003")}
    for other in (None, str(toy_model_folder(tmp_path / "third", seed=3))):  # a branch learns against the same one
        branched = config("dpo", tmp_path / "branch", model_folder, pairs_file, **{**branch, "reference__model": other})
        with pytest.raises(ValueError, match=r"other contents of reference\.model"):
            dpo.run(branched)
    (saved,) = (tmp_path / "cut" / "checkpoints").glob("step-00000003")
    assert {"model.name_or_path", "reference.model"} <= read_identity(saved).keys()
    toy_model_folder(reference, seed=4)  # under the same name
    with pytest.raises(ValueError, match=r"other contents of reference\.model"):
        dpo.run(cut)
    toy_model_folder(reference, seed=1)
    monkeypatch.setattr(reference_model, "load_policy", None)  # its log-probs are in the cache
    assert dpo.run(cut) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def lives(policy: Policy) -> list[Any]:
    import weakref

    return [weakref.ref(parameter) for parameter in policy.parameters()]


def on_ranks(model: Path, other: Path, pairs: Path, folder: Path, port: int) -> None:
    """Train as a rank of two; the reference must be gone when the policy is built, shards and all."""
    held: list[Any] = []
    shapes: list[tuple[int, int]] = []

    def load(policy: Policy, *given: Any, **more: Any) -> None:
        load_policy(policy, *given, **more)
        held.extend(lives(policy))
        shapes.extend((each.numel(), each.to_local().numel()) for each in policy.parameters())

    def build(*given: Any, **more: Any) -> Policy:
        assert held
        assert all(each() is None for each in held)
        return build_policy(*given, **more)

    with launched(port), pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_model, "load_policy", load)
        patch.setattr(setup, "build_policy", build)
        given = {"reference__model": str(other), "data__eval_size": 4, "training__max_steps": 2}
        assert dpo.run(config("dpo", folder, model, pairs, **given)) == 0
    assert sum(own for _, own in shapes) * 2 == sum(whole for whole, _ in shapes)  # each rank had half of it


def test_two_ranks_hold_one_model_at_a_time_and_learn_the_same(
    tmp_path: Path, model_folder: Path, other_folder: Path, pairs_file: Path
) -> None:
    ports = [free_port()]
    run_ranks(on_ranks, 2, tmp_path, model_folder, other_folder, pairs_file, tmp_path / "two", *ports)
    given = {"reference__model": str(other_folder), "data__eval_size": 4, "training__max_steps": 2}
    assert dpo.run(config("dpo", tmp_path / "one", model_folder, pairs_file, **given)) == 0
    for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "rewards/chosen", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=2e-5, abs=2e-6)
    assert initial(tmp_path / "two") == pytest.approx(initial(tmp_path / "one"), abs=2e-5)


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, pairs_file: Path) -> Path:
    """A finished run that trained an adapter of the model."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    more = {"training__max_steps": 2, "training__learning_rate": 2e-2, "lora__rank": 2}
    assert dpo.run(config("dpo", folder, model_folder, pairs_file, **more)) == 0
    return folder


POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora__rank": 3, "lora__dropout": 0.2},
    "qlora": {"lora__rank": 2, "model__quantization": "nf4"},
}


@pytest.mark.parametrize("kind", [*POLICIES, "continue"])
def test_any_policy_may_have_an_adapter_as_reference(
    kind: str, tmp_path: Path, model_folder: Path, adapter_run: Path, pairs_file: Path
) -> None:
    """Two rounds: the second starts from the first one's adapter, and the reference is the first model, or round."""
    if kind == "continue":  # trains the adapter on, with dropout; the reference is the model below it
        given = {"model__name_or_path": str(adapter_run), "lora__continue": True, "lora__rank": 2, "lora__dropout": 0.3}
        reference, expected = model_folder, model_folder
    else:
        from notus.model.export import load_causal_lm

        given, reference = POLICIES[kind], adapter_run
        merged, _ = load_causal_lm(adapter_run / "model", dtype=torch.float32, device="cpu")
        merged.save_pretrained(tmp_path / "merged")
        toy_tokenizer().save_pretrained(tmp_path / "merged")
        expected = tmp_path / "merged"
    more = {"training__max_steps": 1, **given}
    settings = config("dpo", tmp_path / "run", model_folder, pairs_file, reference__model=str(reference), **more)
    with start(settings) as job:
        assert job is not None
        task = dpo.build_task(job, settings)
        found, rows = task._train.reference, job.train_rows
        assert job.train(task) == 0
    assert found is not None
    if kind == "qlora":  # in 4 bits, as the merged model would be
        with start(config("dpo", tmp_path / "again", expected, pairs_file, **more)) as job:
            assert job is not None
            again = dpo.build_task(job, job.config)._train.reference
        assert again is not None
        assert found.numpy() == pytest.approx(again.numpy(), abs=1e-3)
    else:
        assert found.numpy() == pytest.approx(plain_logps(expected, rows), abs=3e-4)
    with process_group():
        base = find_base(find_source(str(tmp_path / "run")))
    assert base is not None
    assert base.folder == (model_folder if kind == "continue" else adapter_run / "model")


def test_new_tokens_are_added_to_the_reference_as_to_the_policy(
    tmp_path: Path, model_folder: Path, other_folder: Path
) -> None:
    """Its new rows are the mean of its own; a reference that has the tokens keeps its rows."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    pairs.write_text(pairs.read_text().replace("sea", "<tool>"))
    given = {"data__new_tokens": ["<tool>"], "training__max_steps": 1, "training__learning_rate": 1e-2}
    settings = config("dpo", tmp_path / "start", other_folder, pairs, **given)
    with start(settings) as job:
        assert job is not None
        task, rows = dpo.build_task(job, settings), job.train_rows
        assert job.train(task) == 0

    def found(reference: Path) -> torch.Tensor:
        return reference_of(
            config(
                "dpo", tmp_path / f"of-{reference.name}", model_folder, pairs, reference__model=str(reference), **given
            )
        )

    assert task._train.reference is not None
    assert torch.equal(found(other_folder), task._train.reference)
    trained = found(tmp_path / "start")
    assert trained.numpy() == pytest.approx(plain_logps(tmp_path / "start" / "model", rows), abs=2e-4)


def test_another_tokenizer_is_refused(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    def refusal(reference: Path, **more: Any) -> str:
        with pytest.raises(ValueError, match=r"reference\.model=") as caught:
            dpo.run(config("dpo", tmp_path / "run", model_folder, pairs_file, reference__model=str(reference), **more))
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return str(caught.value)

    other = toy_model_folder(tmp_path / "other", seed=1)
    small = toy_tokenizer(vocab_size=300)
    small.save_pretrained(other)
    message = refusal(other)
    assert "its tokenizer is not the policy's: " in message
    assert "none for the reference" in message
    swapped = toy_tokenizer()
    backend = json.loads(swapped.backend_tokenizer.to_str())
    backend["model"]["merges"].reverse()  # the same vocabulary
    swapped.save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(backend))
    assert "other tokens than the policy's of text such as" in refusal(other)
    toy_tokenizer(bos=False).save_pretrained(other)
    assert "begins or ends texts with another token" in refusal(other)
    assert "no such" in refusal(tmp_path / "nowhere")


def test_the_template_counts_where_there_are_conversations(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    other = toy_model_folder(tmp_path / "other", seed=1)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    toy_tokenizer(chat_template=template).save_pretrained(other)
    given = {"reference__model": str(other)}
    reference_of(config("dpo", tmp_path / "plain", model_folder, pairs_file, **given))
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    chats = tmp_path / "chats.jsonl"

    def turns(row, side):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]

    chats.write_text(
        "".join(json.dumps({side: turns(row, side) for side in ("chosen", "rejected")}) + "\n" for row in rows)
    )
    with pytest.raises(ValueError, match=r"its chat template is another one.*data\.chat_template"):
        dpo.run(config("dpo", tmp_path / "chat", model_folder, chats, **given))
    reference_of(config("dpo", tmp_path / "named", model_folder, chats, data__chat_template="zephyr", **given))


def test_a_reference_that_cannot_score_the_rows_is_refused(
    tmp_path: Path, model_folder: Path, pairs_file: Path, adapter_run: Path
) -> None:
    short = toy_model_folder(tmp_path / "short", max_position_embeddings=16)
    small = toy_model_folder(tmp_path / "small", vocab_size=390)
    for reference, message in (
        (short, r"context of reference\.model=.*data\.max_length"), (small, r"reference\.model=.*ends at 389"),
        (tmp_path / "run", r"reference\.model=.*this run has not finished"),
    ):  # fmt: skip
        if reference.name == "run":
            reference.mkdir()
            (reference / "config.yaml").write_text("")
        with pytest.raises(ValueError, match=message):
            dpo.run(config("dpo", tmp_path / "new", model_folder, pairs_file, reference__model=str(reference)))
    damaged = toy_model_folder(tmp_path / "damaged", seed=1)
    model = AutoModelForCausalLM.from_pretrained(damaged)
    model.lm_head.weight.data[7] = float("nan")
    model.save_pretrained(damaged)
    with pytest.raises(ValueError, match="the reference model gives log-probs that are not finite"):
        dpo.run(config("dpo", tmp_path / "new", model_folder, pairs_file, reference__model=str(damaged)))


def test_it_has_no_effect_without_a_reference(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    with pytest.raises(ValueError, match=r"reference\.model has no effect with dpo\.loss_type 'orpo'"):
        config("dpo", tmp_path / "run", model_folder, pairs_file, dpo__loss_type="orpo", reference__model="m")
    with pytest.raises(ValueError, match=r"reference\.model has no effect in SFT"):
        config("sft", tmp_path / "run", model_folder, pairs_file, reference__model="m")


def test_the_reference_command_fills_the_cache_that_a_run_reads(
    tmp_path: Path, model_folder: Path, other_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"reference__model": str(other_folder), "data__eval_size": 4}
    settings = config("dpo", tmp_path / "run", model_folder, pairs_file, **given)
    with monkeypatch.context() as patch:
        patch.setattr(setup, "build_policy", None)  # the policy is not needed
        dpo.fill_reference(settings)
    monkeypatch.setattr(reference_model, "load_policy", None)
    reference_of(settings)


def test_without_ln_2_a_policy_that_is_not_finite_still_stops_the_run() -> None:
    """The log-ratios of the first step are looked at; a loss that is not finite is an error before."""
    task = object.__new__(dpo.DPOTask)
    lengths = np.array([[3, 2], [1, 4]])
    task.__dict__.update(
        _starts_at_reference=False,
        _objective=type("Objective", (), {"reference": True})(),
        _train=type("Data", (), {"rows": type("Rows", (), {"loss_tokens": lengths})()})(),
        plan=type("Plan", (), {"indices": staticmethod(lambda _: np.array([0, 1]))})(),
        _first_ratios=torch.tensor([1.0, math.nan, 1.0, 1.0], dtype=torch.float64),
    )
    with process_group(), pytest.raises(ValueError, match=r"mean log-ratio of policy and reference\.model is nan"):
        task.check_first_step([])


def test_chosen_answers_are_watched_from_where_they_start() -> None:
    guards = Guards(map(since_start, (CHOSEN_CHANGE, SUMMED_MARGINS)))
    assert guards.check({"logps/chosen_change": -1.8, "rewards/margins": 0.0}) == []
    assert guards.check({"logps/chosen_change": -2.7, "rewards/margins": 0.0}) == []
    (warning,) = guards.check({"logps/chosen_change": -2.9, "rewards/margins": 0.0})
    assert "has fallen by over 1 nat" in warning
    assert "Lower training.learning_rate" in warning
