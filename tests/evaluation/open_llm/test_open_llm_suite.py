"""`notus evaluate --suite open-llm`: the real lm-eval on local tasks gives what a plain forward pass gives."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from notus.__main__ import main
from notus.evaluation.open_llm import harness, suite
from notus.evaluation.open_llm.suite import BY_TASK
from notus.evaluation.results import read_result

ALL = "toy_choice,toy_generate,toy_rolling"


def evaluate(model, task_folder, out, *options, tasks=ALL):
    local = ["--tasks", tasks, "--include-path", str(task_folder), "--precision", "fp32"]
    assert main(["evaluate", str(model), "--suite", "open-llm", *local, "--output", str(out), *options]) == 0


def read_task(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def results(out):
    return json.loads((out / "lm-eval.json").read_text())["results"]


@torch.no_grad()
def log_likelihood(causal_lm, tokenizer, context, continuation):
    before, whole = tokenizer(context).input_ids, tokenizer(context + continuation).input_ids
    ids = torch.tensor([[*before, *whole[len(before) :]]])
    logps = causal_lm(ids[:, :-1]).logits.log_softmax(-1)[0, len(before) - 1 :]
    return logps.gather(1, ids[0, len(before) :, None]).sum().item()


def expected_choice(causal_lm, tokenizer, docs):
    """Accuracy by log-likelihood, and by log-likelihood per character of the option; two examples before each."""
    hits = [0, 0]
    for doc in docs:
        shots = [other for other in docs[:3] if other is not doc][:2]
        prompt = "".join(f"Question: {d['question']}\nAnswer: {d['choices'][d['answer']]}\n\n" for d in shots)
        prompt += f"Question: {doc['question']}\nAnswer:"
        scores = torch.tensor([log_likelihood(causal_lm, tokenizer, prompt, f" {c}") for c in doc["choices"]])
        lengths = torch.tensor([len(choice) for choice in doc["choices"]])
        hits[0] += int(scores.argmax()) == doc["answer"]
        hits[1] += int((scores / lengths).argmax()) == doc["answer"]
    return [hit / len(docs) for hit in hits]


def test_three_kinds_of_tasks(model_folder, task_folder, tmp_path, capsys):
    evaluate(model_folder, task_folder, tmp_path)
    found = results(tmp_path)
    causal_lm = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    acc, acc_norm = expected_choice(causal_lm, tokenizer, read_task(task_folder, "toy_choice"))
    assert (found["toy_choice"]["acc,none"], found["toy_choice"]["acc_norm,none"]) == pytest.approx((acc, acc_norm))
    assert found["toy_generate"]["exact_match,none"] == 2 / 5
    texts = [row["text"] for row in read_task(task_folder, "toy_rolling")]
    # the tokenizer puts BOS in front, and so does lm-eval
    total = sum(log_likelihood(causal_lm, tokenizer, "", f"<s>{text}") for text in texts)
    perplexity = math.exp(-total / sum(len(text.split()) for text in texts))
    assert found["toy_rolling"]["word_perplexity,none"] == pytest.approx(perplexity, rel=1e-4)

    result = read_result(tmp_path / "result.json")
    assert (result.suite, result.model) == ("open-llm", str(model_folder))
    figures = {(figure.name, figure.metric): figure for figure in result.figures}
    figure = figures["toy_choice", "acc_norm"]
    assert (figure.value, figure.unit, figure.count) == (pytest.approx(100 * acc_norm), "%", 9)
    assert (figure.setup, figure.reference) == ("2-shot", {})
    assert figures["toy_rolling", "word_perplexity"].unit == ""
    table = (tmp_path / "table.md").read_text()
    assert "| toy_generate | exact_match, 0-shot | 5 | 40.00 % ± 24.49 | - | - |" in table
    assert table in capsys.readouterr().out


def test_same_command_again_computes_nothing(model_folder, task_folder, tmp_path, monkeypatch):
    from notus.evaluation import decoding as generation
    from notus.model.policy import Policy

    evaluate(model_folder, task_folder, tmp_path)
    before = results(tmp_path)
    monkeypatch.setattr(Policy, "token_scores", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(generation, "_complete", lambda *_: pytest.fail("generated again"))
    evaluate(model_folder, task_folder, tmp_path)
    assert results(tmp_path) == before


def test_limit_shots_and_chat_format(model_folder, task_folder, tmp_path, monkeypatch):
    from notus.evaluation.open_llm.harness import NotusLM

    seen = []
    encode = NotusLM._encode_pair
    monkeypatch.setattr(NotusLM, "_encode_pair", lambda self, *pair: seen.append(pair) or encode(self, *pair))
    chat = ["--apply-chat-template", "--chat-template", "zephyr", "--system-instruction", "Be brief."]
    options = ["--limit", "2", "--num-fewshot", "1", *chat]
    evaluate(model_folder, task_folder, tmp_path, *options, tasks="toy_choice")
    first, second = read_task(task_folder, "toy_choice")[:2]
    asked, answer = f"Question: {first['question']}\nAnswer:", second["choices"][second["answer"]]
    assert seen[0][0].startswith("<s><|system|>\nBe brief.</s>\n<|user|>\n")
    assert seen[0][0].endswith(
        f"<|user|>\nQuestion: {second['question']}\nAnswer:</s>\n<|assistant|>\n{answer}</s>\n"
        f"<|user|>\n{asked}</s>\n<|assistant|>\n"
    )
    assert len(seen) == sum(len(doc["choices"]) for doc in (first, second))
    result = read_result(tmp_path / "result.json")
    assert (result.figures[0].count, result.figures[0].setup) == (2, "1-shot, the first 2 examples")
    assert (result.settings["limit"], result.settings["chat_template"]) == (2, True)
    assert "first 2 examples" in (tmp_path / "table.md").read_text()
    seen.clear()
    evaluate(model_folder, task_folder, tmp_path, *options, "--no-fewshot-as-multiturn", tasks="toy_choice")
    assert seen[0][0].count("<|user|>") == 1
    seen.clear()
    evaluate(model_folder, task_folder, tmp_path, "--limit", "1", tasks="toy_choice")
    assert "<|" not in seen[0][0]


def test_adapter_is_its_merged_model(lora_run, task_folder, tmp_path):
    evaluate(lora_run / "model", task_folder, tmp_path / "adapter")
    assert main(["export", str(lora_run), str(tmp_path / "merged"), "--merge"]) == 0
    evaluate(tmp_path / "merged", task_folder, tmp_path / "merged-out")
    rolling = [results(tmp_path / name)["toy_rolling"]["word_perplexity,none"] for name in ("adapter", "merged-out")]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-5)


@pytest.fixture
def unfinished(tmp_path, lora_run):
    ignored = shutil.ignore_patterns("model", "evaluations", "snapshots")
    return shutil.copytree(lora_run, tmp_path / "unfinished", ignore=ignored)


def test_two_ranks_and_a_run_in_progress(lora_run, unfinished, task_folder, tmp_path):
    evaluate(lora_run, task_folder, tmp_path / "one", "--tokens-per-row", "200")
    # each rank as torchrun starts it; the checkpoint is written out by one of them
    command = ["evaluate", str(unfinished), "--suite", "open-llm", "--tasks", ALL, "--include-path", str(task_folder)]
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys\nfrom notus.__main__ import leave, main\nif __name__ == '__main__': leave(main(sys.argv[1:]))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*torchrun, *command, "--tokens-per-row", "200"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = unfinished / "evaluations" / "open-llm"
    assert results(out) == results(tmp_path / "one")
    assert read_result(out / "result.json").model == f"{unfinished} (step 2)"
    kept = [len(path.read_text().splitlines()) for path in sorted((out / "kept" / "log-likelihoods").iterdir())]
    assert len(kept) == 2
    assert all(kept)
    assert done.stdout.count("| toy_choice | acc,") == 1


def told(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments), "--suite", "open-llm"]) == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def manager(task_folder):
    """All of lm-eval's tasks and those of the tests; reading the files takes a while."""
    return harness._manager(["toy_group"], str(task_folder))


def test_wrong_names_are_told_before_the_model_is_loaded(task_folder, manager, tmp_path, capsys, monkeypatch):
    assert set(BY_TASK) <= set(manager.all_tasks)
    local = ["--include-path", task_folder]
    with monkeypatch.context() as patch:
        patch.setattr(harness, "_manager", lambda *_: manager)
        error = told(capsys, tmp_path / "none", "--tasks", "toy_choise,toy_choice,hellaswaq", *local)
        assert "no task 'toy_choise', near it are toy_choice" in error
        assert "no task 'hellaswaq', near it are" in error
        assert "hellaswag" in error
        assert "found in both" in told(capsys, tmp_path / "none", "--tasks", "toy_choice,toy_group", *local)
    assert "no such folder" in told(capsys, tmp_path / "none", "--tasks", "a", "--include-path", tmp_path / "gone")
    shutil.copytree(task_folder, tmp_path / "tasks")
    (tmp_path / "tasks" / "broken.yaml").write_text("task: broken\ndataset_path: json\noutput_type: generate_until\n")
    error = told(capsys, tmp_path / "none", "--tasks", "broken", "--include-path", tmp_path / "tasks")
    assert "the task broken or its data cannot be loaded" in error


def test_a_group_stands_for_its_tasks(model_folder, task_folder, manager, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_manager", lambda *_: manager)
    evaluate(model_folder, task_folder, tmp_path, tasks="toy_gr*")
    names = [figure.name for figure in read_result(tmp_path / "result.json").figures]
    assert names == ["toy_choice", "toy_choice", "toy_generate"]


def test_what_would_have_no_effect_is_refused(model_folder, task_folder, tmp_path, capsys):
    assert "--include-path has no effect" in told(capsys, model_folder, "--include-path", task_folder)
    for option in (["--chat-template", "zephyr"], ["--add-empty-system"], ["--fewshot-as-multiturn"]):
        assert f"{option[0]} has no effect" in told(capsys, model_folder, *option)
    local = ["--include-path", task_folder, "--tasks", "toy_choice"]
    assert "context of 256 tokens" in told(capsys, model_folder, *local, "--max-length", 300)
    with pytest.raises(SystemExit):
        told(capsys, model_folder, "--tasks", ",")
    with pytest.raises(SystemExit):
        told(capsys, model_folder, "--num-fewshot", "-1")


def test_a_place_that_cannot_be_written_is_told_before_the_work(model_folder, task_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    local = ["--include-path", task_folder, "--tasks", "toy_choice", "--output", tmp_path / "file" / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "_load", lambda *_: pytest.fail("it was loaded first"))
        assert "no results can be written there (Not a directory); name another" in told(capsys, model_folder, *local)


@pytest.mark.parametrize("absent", ["lm_eval", "lm_eval.api.group"])  # the second: by an old version
def test_a_missing_extra_is_told(monkeypatch, capsys, absent):
    for name in (absent, "lm_eval.api.group"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "0.4.13 or later (" in (error := told(capsys, "model"))
    assert error.endswith("pip install -U lm-eval\n")
