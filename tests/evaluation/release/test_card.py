"""`notus card`: the hub's client reads it back as it was meant, it tells what the run tells, and no path of ours."""

import ast
import json
import math
import re
import shutil

import huggingface_hub
import pytest
from huggingface_hub import EvalResult, ModelCard
from runs import settings, write_pairs
from tokenizers import processors
from toys import toy_model_folder, toy_tokenizer
from transformers import GenerationMixin

from notus.__main__ import main
from notus.config import config_from_dict, to_yaml
from notus.data.chat import ZEPHYR_TEMPLATE, ChatEncoder
from notus.evaluation.release.card import citations
from notus.evaluation.results import Figure, Result, write_result
from notus.losses import LOSSES
from notus.training import dpo

BASE, DATA = "alignment-handbook/zephyr-7b-sft-full", "argilla/ultrafeedback-binarized-preferences"
METRICS = [
    {"step": 1, "loss": 0.69314, "rewards/accuracies": 0.5},
    {"step": 2, "loss": 0.5, "rewards/accuracies": 0.75, "eval_loss": 0.6},
    {"step": 3, "loss": 0.25, "rewards/accuracies": 1.0, "eval_loss": 0.4},
]


def make_run(folder, task="dpo", *, model=BASE, data=DATA, **overrides):
    """A finished run's folder, as far as a card looks into it."""
    tree = settings(folder, model, folder / "unused.jsonl", **{"data__train": str(data), **overrides})
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "chat_template.jinja").write_text(ZEPHYR_TEMPLATE)
    (folder / "config.yaml").write_text(to_yaml(config_from_dict(tree, task)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    return folder


def card(run, *options):
    """The card's path, text, and header as the hub's client reads it."""
    path = run / "card.md"
    path.unlink(missing_ok=True)
    assert main(["card", str(run), "--output", str(path), *options]) == 0
    return path, path.read_text(), ModelCard.load(path).data


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["card", *map(str, words)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_header_and_text_of_the_recipe(tmp_path):
    more = {"data__eval_size": 2000, "data__add_empty_system": True, "data__shuffle": False}
    more |= {"dpo__label_smoothing": 0.1, "dpo__nll_weight": 0.25, "training__warmup_ratio": 0.005}
    run = make_run(tmp_path / "notus", training__max_grad_norm=0, **more)
    _, text, data = card(run, "--license", "apache-2.0", "--language", "en", "de", "--repo-id", "ada/notus-7b")
    assert data.to_dict() == {
        "base_model": BASE,
        "base_model_relation": "finetune",
        "datasets": [DATA],
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["notus", "dpo", "alignment", "preference-optimization"],
    }
    assert f"notus-7b is [{BASE}](https://huggingface.co/{BASE}), all of its weights trained by Direct Prefer" in text
    assert 'from_pretrained("ada/notus-7b", dtype="auto")' in text
    assert 'messages = [{"role": "system", "content": ""}, {"role": "user"' in text
    assert "2,000 of the training rows were held out for evaluation (seed 42)" in text
    for row in ("loss | sigmoid", "beta | 0.1", "label smoothing | 0.1", "pairs per step | 4", "learning rate | 0.001"):
        assert f"| {row} |\n" in text
    assert "| weight of the chosen completions' negative log-likelihood | 0.25, mean over tokens |\n" in text
    assert "| schedule | linear, warm-up over 0.5% of the steps |\n" in text
    assert "| system turn | empty where a conversation has none |\n" in text
    assert "| order of the data | not shuffled |\n" in text
    assert "gradient norm" not in text
    assert "| training loss | 0.693 (step 1) | 0.250 (step 3) |" in text
    assert "| loss, held-out | 0.600 (step 2) | 0.400 (step 3) |" in text
    assert text.count("were not recorded.") == 2
    assert re.findall(r"@\w+\{(\w+),", text) == [
        "rafailov2023direct",
        "cui2023ultrafeedback",
        "notus2023",
        "notus",
    ]
    assert "Training has not finished" not in text
    assert "There is no evaluation beyond the figures of its training." in text


def test_adapter_merged_and_sft(tmp_path):
    run = make_run(tmp_path / "lora", lora__rank=8, lora__alpha=32, lora__dropout=0.1)
    _, text, data = card(run)
    assert (data.library_name, data.base_model_relation, "lora" in data.tags) == ("peft", "adapter", True)
    assert "AutoPeftModelForCausalLM" in text
    assert "| LoRA | rank 8, alpha 32, dropout 0.1 |\n| LoRA on | q_proj, k_proj, v_proj, o_proj |" in text
    _, text, data = card(run, "--merge")
    assert (data.library_name, data.base_model_relation) == ("transformers", "finetune")
    assert "with a LoRA adapter merged into its weights" in text
    assert "AutoPeft" not in text
    _, text, data = card(make_run(tmp_path / "sft", "sft", data="HuggingFaceH4/ultrachat_200k"))
    assert data.tags == ["notus", "sft"]
    assert "supervised fine-tuning (SFT) on `HuggingFaceH4/ultrachat_200k`" in text
    assert "beta" not in text
    assert "rafailov" not in text


def test_what_the_run_noted_of_data_and_machine(tmp_path):
    run = make_run(tmp_path / "run")
    report = {"read": 1010, "dropped": {"empty completion": 7, "other": 3}, "prompts_cut": 4, "completions_cut": 1200}
    train = {"rows": 1000, "report": report, "sources": {"flan": 600, "sharegpt": 400}}
    (run / "data.json").write_text(json.dumps({"train": train, "eval": {"rows": 20, "report": {}, "sources": None}}))
    noted = {"hardware": "8 x A100", "world_size": 8, "versions": {"torch": "2.13.0"}, "launches": [], "seconds": 7200}
    (run / "environment.json").write_text(json.dumps(noted))
    _, text, _ = card(run)
    assert "- training: 1,000 pairs\n- training, rows by source: flan 600, sharegpt 400\n" in text
    assert "1,010 rows read; dropped: empty completion 7, other 3; cut to length: 4 prompts, 1,200 rows' compl" in text
    assert "- evaluation: 20 pairs\n" in text
    assert "- hardware: 8 x A100 (processes: 8)\n- training time: 2 h 0 min\n- software: torch 2.13.0\n" in text
    assert "not recorded" not in text


def keys_of(text):
    return re.findall(r"@\w+\{(\w+),", text)


def test_a_sum_of_losses_with_what_is_added_to_it(tmp_path):
    loss = {"sigmoid": 0.8, "bco_pair": 0.2}
    more = {"dpo__nll_weight": 0.5, "dpo__nll_mean": "completions", "dpo__ld_alpha": 0.25, "dpo__wpo": True}
    run = make_run(tmp_path / "run", dpo__loss_type=loss, dpo__options={"f_divergence": "js_divergence"}, **more)
    _, text, data = card(run)
    assert "| loss | 0.8 sigmoid + 0.2 bco_pair |\n| beta | 0.1 |\n| f divergence | js_divergence |\n" in text
    assert "negative log-likelihood | 0.5, mean over completions |\n| LD-DPO α | 0.25 |\n| pairs weighted" in text
    assert "dpo" in data.tags
    papers = ["jung2024binary", "wang2023beyond", "pang2024iterative", "liu2024length", "zhou2024wpo"]
    assert keys_of(text) == ["rafailov2023direct", *papers, "cui2023ultrafeedback", "notus2023", "notus"]


def test_a_loss_without_a_reference(tmp_path):
    run = make_run(tmp_path / "run", dpo__loss_type="simpo", dpo__beta=2.5)
    _, text, data = card(run)
    assert "| loss | simpo |\n| reference model | none |\n| beta | 2.5 |\n| simpo gamma | " in text
    assert "trained by preference optimization (simpo) on" in text
    assert data.tags == ["notus", "simpo", "alignment", "preference-optimization"]
    assert keys_of(text)[0] == "meng2024simpo"
    assert "rafailov2023direct" not in text


@pytest.mark.parametrize(
    ("loss", "unit", "better", "paper"),
    [
        ("lipo_lambda", "lists", "best rated", "liu2024lipo"),
        ("kto", "labelled completions", "good", "ethayarajh2024kto"),
    ],
)
def test_lists_and_labels_are_no_pairs(tmp_path, loss, unit, better, paper):
    run = make_run(tmp_path / "run", dpo__loss_type=loss)
    (run / "data.json").write_text(json.dumps({"train": {"rows": 1000, "labels": {"true": 600, "false": 400}}}))
    line = {"step": 1, "rewards/kendall_tau": 0.25, "eval_rewards/top_1": 0.5, "eval_rewards/chosen": 0.75}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    _, text, data = card(run)
    assert f"by preference optimization ({loss}) with {unit} on" in text
    assert f"- training: 1,000 {unit}\n" in text
    assert "- training: 600 good and 400 bad completions\n" in text
    assert f"| {unit} per step | 4 |\n" in text
    assert "| Kendall's τ of rewards and ratings, training | 0.250 (step 1) |" in text
    assert "| top-1 accuracy of rewards, held-out | 50.0% (step 1) |" in text
    assert f"| reward of {better}, held-out | 0.750 (step 1) |" in text
    assert "| measure | value |" in text  # there is only one step
    assert loss.replace("_", "-") in data.tags
    assert keys_of(text)[:2] == ["rafailov2023direct", paper]
    assert "pairs" not in text.partition("## Citation")[0]


def test_every_paper_of_the_registry_has_its_entry():
    papers = {paper for loss in LOSSES.values() for paper in re.findall(r"\d{4}\.\d{5}", loss.source)}
    for paper in sorted(papers):
        (entry,) = citations([paper])
        assert "title = " in entry, paper
        assert f"https://arxiv.org/abs/{paper}}}" in entry
    assert citations(["9999.99999"]) == ["@misc{arxiv9999.99999,\n  url = {https://arxiv.org/abs/9999.99999}\n}"]


def test_a_run_of_an_early_version_has_its_card(tmp_path):
    run = make_run(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    kept = ("beta", "loss_type", "label_smoothing", "nll_weight")
    start, end = text.index("dpo:\n"), text.index("reference:\n")
    lines = [line for line in text[start:end].splitlines() if line.strip().startswith((*kept, "dpo:"))]
    (run / "config.yaml").write_text(text[:start] + "\n".join(lines) + "\n" + text[end:])
    assert "| loss | sigmoid |\n| beta | 0.1 |\n" in card(run)[1]


def test_a_loss_that_this_version_lacks_is_named(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("loss_type: sigmoid", "loss_type: sigmoidal"))
    assert "config.yaml: loss_type 'sigmoidal' does not exist" in refused(capsys, run, "--output", "-")


def figures(*found):
    return {"figures": list(found), "settings": {"path": "/home/ada/secret"}, "date": "2026-11-22"}


def test_evaluations_are_read_back_by_the_hubs_client(tmp_path):
    run = make_run(tmp_path / "run")
    few = {"unit": "%", "stderr": 1.4, "count": 1172}
    arc = Figure("ARC-Challenge", "acc_norm", 64.59, setup="25-shot", reference={"Zephyr": 62.03}, **few)
    bench = Figure("MT-Bench", "score", 7.3, dataset="lmsys/mt_bench_human_judgments", count=80)
    turn = Figure("MT-Bench, turn 2", "score", 7.1, dataset="lmsys/mt_bench_human_judgments")
    nan = Figure("broken", "acc", math.nan)
    local = Figure("reward | accuracy", "accuracy", 90.5, "%", dataset="/home/ada/My pairs.jsonl")
    write_result(run / "evaluations" / "open-llm", Result("open-llm", "/home/ada/run", **figures(arc, nan)))
    write_result(run / "evaluations" / "mt-bench", Result("mt-bench", "run (step 3)", **figures(bench, turn)))
    write_result(run / "evaluations" / "preferences", Result("preferences", "run", **figures(local)))
    write_result(run / "evaluations" / "old", Result("old", "run (step 2)", **figures(arc)))
    _, text, data = card(run)
    task = {"task_type": "text-generation", "task_name": "Text Generation"}
    mt = {"dataset_type": "lmsys/mt_bench_human_judgments", "dataset_name": "MT-Bench", "metric_type": "score", **task}
    assert data.eval_results == [
        EvalResult(metric_value=7.3, metric_name="score", **mt),
        EvalResult(metric_value=7.1, metric_name="MT-Bench, turn 2: score", **mt),
        EvalResult(
            dataset_type="arc-challenge", dataset_name="ARC-Challenge (25-shot)", metric_type="acc_norm",
            metric_name="acc_norm", metric_value=64.59, **task,
        ),
        EvalResult(
            dataset_type="my-pairs.jsonl", dataset_name="reward | accuracy", metric_type="accuracy",
            metric_name="accuracy", metric_value=90.5, **task,
        ),
    ]  # fmt: skip
    assert data.model_name == "run"
    assert "| ARC-Challenge (25-shot) | acc_norm | 64.6% | 1.4% | 1,172 | 62.0% |\n" in text
    assert (
        "| benchmark | measure | this model | standard error | examples | Zephyr |\n|---|---|---|---|---|---|\n" in text
    )
    assert "| broken | acc | – | – | – | – |\n" in text
    assert "| reward \\| accuracy | accuracy | 90.5% | – | – |\n" in text
    assert "`old`, 2026-11-22, **of the model after step 2, not of this model**:" in text
    assert "| benchmark | measure | that model | standard error | examples | Zephyr |\n" in text
    assert "/home/ada" not in text


def test_what_a_judged_file_says_of_another_model_is_not_this_ones(tmp_path):
    run = make_run(tmp_path / "run")
    rate = Figure("AlpacaEval", "win_rate", 70.0, "%")
    for number, model in enumerate(("mine", "run", "ada/runs/run", "run (step 3)")):
        result = Result("alpaca-eval", model, [rate], {"annotations": "/home/ada/annotations.json"})
        write_result(run / "evaluations" / str(number), result)
    write_result(run / "evaluations" / "4", Result("preferences", "other name of it", [rate], {"pairs": "x"}))
    _, text, data = card(run)
    assert text.count("**of `mine`, as its file has it, not of this model**") == 1
    assert text.count("not of this model") == 1
    assert len(data.eval_results) == 4


def test_the_last_training_figure_is_a_mean_where_steps_are_many(tmp_path):
    run = make_run(tmp_path / "run")
    losses = [0.75, *[0.5] * 18, 0.25]  # ten steps are 0.5 but for the last
    for more, told in (([], "0.250 (step 20)"), ([0.25], "0.450 (mean of the last 10, to step 21)")):
        lines = [{"step": step, "loss": loss, "eval_loss": loss} for step, loss in enumerate([*losses, *more], start=1)]
        lines += [{"step": len(lines) + 1, "loss": math.nan, "eval_loss": math.inf}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        _, text, _ = card(run)
        assert f"| training loss | 0.750 (step 1) | {told} |" in text
        assert f"| loss, held-out | 0.750 (step 1) | 0.250 (step {len(lines) - 1}) |" in text


def test_figures_of_the_header_are_rounded_to_six_digits(tmp_path):
    run = make_run(tmp_path / "run")
    exact = [0.2478398925207633, 91.41791044776119, 1234567.0, 7.3, 0.0]
    found = figures(*(Figure(f"f{number}", "m", value) for number, value in enumerate(exact)))
    write_result(run / "evaluations" / "x", Result("x", "run", **found))
    _, text, data = card(run)
    assert [result.metric_value for result in data.eval_results] == [0.24784, 91.4179, 1234570.0, 7.3, 0.0]
    assert "0.2478398925207633" not in text


def test_names_that_hold_anything_stay_names(tmp_path):
    """A folder, a source of rows and a judge may be called anything; a reader's Python and the header still work."""
    name = "we\"ird: 'run' \\ `é`\n---\n# {{ 7 }} <b>"
    data = tmp_path / "my`\ndata| #.jsonl"
    data.touch()
    run = make_run(tmp_path / name, model=tmp_path / "b`\n# ase", data=data)
    counts = {"read": 1, "dropped": {}, "prompts_cut": 0, "completions_cut": 0}
    (run / "data.json").write_text(json.dumps({"train": {"rows": 3, "report": counts, "sources": {"a\n\n# x": 3}}}))
    (run / "environment.json").write_text(json.dumps({"hardware": "8 x\n# A100", "world_size": 8}))
    odd = Figure("win rate", "win_rate", 1.0, setup="by: 'y'\n# |z <b>", dataset='we: "ird\n')
    write_result(run / "evaluations" / "x", Result("x", "run", **figures(odd)))
    _, text, header = card(run)
    assert header.model_name == "we\"ird: 'run' \\ `é` --- # {{ 7 }} <b>"
    assert header.eval_results[0].dataset_name == "win rate (by: 'y' # |z <b>)"
    body = text[text.index("\n---\n", 4) + 5 :]
    headings = re.findall(r"^#+ .*", body, re.MULTILINE)
    assert headings == ["# we\"ird: 'run' \\ `é` --- # {{ 7 }} &lt;b>"] + [
        f"## {title}"
        for title in ("Use", "Intended use and limits", "Data", "Training", "Evaluation", "Licence", "Citation")
    ]
    assert "| win rate (by: 'y' # \\|z &lt;b>) | win_rate |" in text
    assert "on `my' data| #.jsonl`." in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    loaded = [node.args[0].value for node in ast.walk(ast.parse(code)) if is_load(node)]
    assert loaded == ["model", "model"]
    assert main(["card", str(run), "--output", str(tmp_path / "card.html")]) == 1
    elsewhere = tmp_path / "card.md"
    assert main(["card", str(run), "--output", str(elsewhere)]) == 0
    code = re.search(r"```python\n(.*?)```", elsewhere.read_text(), re.DOTALL)[1]
    assert [node.args[0].value for node in ast.walk(ast.parse(code)) if is_load(node)] == [f"{name}/model"] * 2


def is_load(node):
    return isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "from_pretrained"


OLD_CLIENT = int(huggingface_hub.__version__.split(".")[0]) < 2


@pytest.mark.skipif(OLD_CLIENT, reason="this client asks the real hub, whatever the endpoint is")
def test_the_hubs_check_by_its_client(tmp_path, hub):
    run = make_run(tmp_path / "run")
    write_result(run / "evaluations" / "x", Result("x", "run", **figures(Figure("ARC", "acc", 1.0))))
    path, text, _ = card(run)
    ModelCard.load(path).validate()
    assert hub.requests == ["validate"]
    broken = ModelCard(text)
    broken.data["base_model"] = "/home/ada/base"
    with pytest.raises(ValueError, match="home/ada/base"):
        broken.validate()


def test_nothing_of_this_machine_is_in_it(tmp_path):
    base = toy_model_folder(tmp_path / "models" / "my-base")
    data = tmp_path / "private" / "pairs.jsonl"
    data.parent.mkdir()
    data.touch()
    template = tmp_path / "private" / "chat.jinja"
    run = make_run(tmp_path / "runs" / "mine", model=base, data=data, data__chat_template=str(template))
    _, text, data = card(run)
    assert "mine is `my-base`, all of its weights trained" in text
    assert "| pairs.jsonl | train | 1.0 | training |" in text
    assert "| chat template | chat.jinja |" in text
    assert (data.base_model, data.datasets, data.get("base_model_relation")) == (None, None, None)
    for part in (str(tmp_path), "private", "models/", "runs"):
        assert part not in text
    after_sft = make_run(tmp_path / "dpo", model=run / "model")
    assert "dpo is `mine`, all" in card(after_sft)[1]
    _, text, data = card(run, "--base-model", "org/base")
    assert (data.base_model, data.base_model_relation) == ("org/base", "finetune")
    assert "my-base" not in text


def test_licence_is_the_bases_or_given_and_never_guessed(tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    run = make_run(tmp_path / "run", model=base)
    _, text, data = card(run)
    assert data.license is None
    assert "The licence is not stated" in text
    stated = base / "README.md"
    stated.write_text("---\nlicense: other\nlicense_name: llama3\nlicense_link: https://l.org\n---\nText\n")
    _, text, data = card(run)
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3", "https://l.org")
    assert "llama3, as the base model's card states (https://l.org)." in text
    _, text, data = card(run, "--license", "mit")
    assert (data.license, data.license_name) == ("mit", None)
    assert "\nmit.\n" in text
    stated.write_text("No header\n")
    assert card(run)[2].license is None
    stated.write_text("---\nlicense: [\n---\n")
    assert f"{stated}: its metadata is no YAML" in refused(capsys, run, "--output", "-")


def test_an_unfinished_run_says_its_step(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "model")
    assert "no checkpoint yet; train it first" in refused(capsys, run)
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    _, text, _ = card(run)
    assert "**Training has not finished**: this is the model after step 2." in text
    assert "| training loss | 0.693 (step 1) | 0.500 (step 2) |" in text
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the run is writing it
    card(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    assert "metrics.jsonl, line 4: not an object with a step" in refused(capsys, run, "--output", "-")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("environment.json", '{"hardware": "one GPU"}'),
        ("environment.json", "[" * 100_000),
        ("metrics.jsonl", "\udcff\n"),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
        ("config.yaml", "[" * 100_000),
        ("data.json", '{"train": {"rows": 1, "sources": {"a": {}}}}'),
        ("data.json", '{"train": {"rows": "many"}}'),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n'),
        ("evaluations/own/result.json", '{"suite": "own", "model": 1, "figures": [], "settings": {}}'),
    ],
)
def test_files_that_hold_something_else_are_named(tmp_path, capsys, file, text):
    run = make_run(tmp_path / "run")
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    (run / file).write_text(text, errors="surrogateescape")
    assert file.replace("/own/", "/*/") in refused(capsys, run, "--output", "-")


@pytest.mark.parametrize(
    ("before", "after"), [("beta: 0.1", "beta: {}"), ("  epochs: 1\n", ""), ("eval_size: 0", "eval_size: {a: 1}")]
)
def test_damaged_settings_are_named(tmp_path, capsys, before, after):
    run = make_run(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    assert before in text
    (run / "config.yaml").write_text(text.replace(before, after))
    assert "config.yaml: not as this version writes it" in refused(capsys, run, "--output", "-")


def test_half_a_character_in_the_data_is_no_obstacle(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "data.json").write_text('{"train": {"rows": 1, "sources": {"half \\ud83d": 1}}}')
    assert "half ? 1" in card(run)[1]


def test_nothing_is_overwritten(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["card", str(run)]) == 0
    written = (run / "README.md").read_text()
    assert main(["card", str(run), "--license", "mit"]) == 0  # its own, untouched, is written anew
    assert "license: mit" in (run / "README.md").read_text()
    assert main(["card", str(run)]) == 0
    assert (run / "README.md").read_text() == written
    for edited in (written.replace("# run", "# Run"), written + "More.\n", "Mine.\n"):
        (run / "README.md").write_text(edited)
        assert "this file was edited after" in refused(capsys, run)
        assert (run / "README.md").read_text() == edited
    assert main(["card", str(run), "--output", "-"]) == 0
    assert capsys.readouterr().out == written.rpartition("\n<!--")[0]
    assert "nothing to merge" in refused(capsys, run, "--merge")
    assert "not a run (it has no config.yaml)" in refused(capsys, tmp_path)
    for wrong in (["--license", "MIT license"], ["--language", "english"], ["--base-model", "/home/x"]):
        with pytest.raises(SystemExit):
            main(["card", str(run), *wrong])
    (run / "environment.json").write_text("[1]")
    assert "environment.json: not a JSON object" in refused(capsys, run, "--output", "-")


def run_example(folder, monkeypatch, capsys):
    """Run the card's Python in the folder of the card, as a reader would."""
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out


def test_the_examples_work(full_run, lora_run, tmp_path, monkeypatch, capsys):
    for run, name, options in ((full_run, "full", []), (lora_run, "merged", ["--merge"]), (lora_run, "adapter", [])):
        if name == "adapter":
            pytest.importorskip("peft")
        assert main(["export", str(run), str(tmp_path / name), *options]) == 0
        assert run_example(tmp_path / name, monkeypatch, capsys).strip()


@pytest.mark.parametrize("finished", [True, False])
def test_the_example_of_a_chat_model_works(model_folder, tmp_path, monkeypatch, capsys, finished):
    message = {"role": "assistant", "content": "hello world"}
    other = {"role": "assistant", "content": "lazy dog"}
    row = {"prompt": [{"role": "user", "content": "hello"}], "chosen": [message], "rejected": [other]}
    pairs = write_pairs(tmp_path / "pairs.jsonl", 1)
    pairs.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    tree = settings(tmp_path / "run", model_folder, pairs, training__max_steps=1)
    tree["data"] |= {"add_empty_system": True, "chat_template": "zephyr"}
    dpo.run(config_from_dict(tree, "dpo"))
    if not finished:
        shutil.rmtree(tmp_path / "run" / "model")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "chat")]) == 0
    assert "apply_chat_template" in (tmp_path / "chat" / "README.md").read_text()
    assert (tmp_path / "chat" / "chat_template.jinja").read_text().endswith(ZEPHYR_TEMPLATE)
    assert run_example(tmp_path / "chat", monkeypatch, capsys).strip()
    if finished:  # the run's own card, whose model is in a folder beside it
        assert main(["card", str(tmp_path / "run")]) == 0
        assert run_example(tmp_path / "run", monkeypatch, capsys).strip()
    example = card(tmp_path / "run", "--repo-id", "chat")[1].partition("```python\n")[2].partition("```")[0]
    assert example.replace('"chat"', '"."') in (tmp_path / "chat" / "README.md").read_text()


def ids_of_example(folder, monkeypatch):
    """The ids that the card's own Python hands to the model."""
    asked = []
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, input_ids, **_: asked.append(input_ids) or input_ids)
    monkeypatch.chdir(folder)
    exec(re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1], {})
    (ids,) = asked
    return ids[0].tolist()


@pytest.mark.parametrize("add_empty_system", [False, True])
def test_the_example_gives_a_chat_models_ids_of_training(tmp_path, monkeypatch, add_empty_system):
    """The tokenizer alone writes BOS, the template none: training has it once, and so has the example."""
    base = toy_model_folder(tmp_path / "base")
    toy_tokenizer(bos=True).save_pretrained(base)
    row = {"prompt": [{"role": "user", "content": "Name three primes."}]}
    row |= {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(row) + "\n")
    more = {"data__add_empty_system": add_empty_system, "data__chat_template": "zephyr", "training__max_steps": 1}
    dpo.run(config_from_dict(settings(tmp_path / "run", base, pairs, **more), "dpo"))
    assert main(["card", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    system = "<|system|>\n</s>\n" if add_empty_system else ""
    text = f"<s>{system}<|user|>\nName three primes.</s>\n<|assistant|>\n"
    expected = toy_tokenizer(bos=True)(text, add_special_tokens=False)["input_ids"]
    trunk = trained_prompt(toy_tokenizer(bos=True), row["prompt"], add_empty_system)
    assert trunk == expected
    assert expected.count(1) == 1
    for folder in ("run", "out"):
        assert ids_of_example(tmp_path / folder, monkeypatch) == expected


def trained_prompt(tokenizer, messages, add_empty_system):
    """The ids of training before the completion: those that no loss is taken of."""
    encoder = ChatEncoder(tokenizer, chat_template="zephyr", add_empty_system=add_empty_system)
    (encoded,) = encoder.encode([(messages, [{"role": "assistant", "content": "chosen"}])])
    return encoded.ids[: int(encoded.mask.argmax())].tolist()


@pytest.mark.parametrize(("single", "last"), [("<s> $A", 0), ("<s> $A </s>", 1), ("$A </s>", 1)])
def test_the_example_gives_a_plain_models_ids_of_training(tmp_path, monkeypatch, single, last):
    """A prompt ends in no EOS, even if the tokenizer puts one behind every text."""
    base = toy_model_folder(tmp_path / "base")
    tokenizer = toy_tokenizer()
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save_pretrained(base)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Once upon a time", "chosen": " a", "rejected": " b"}) + "\n")
    dpo.run(config_from_dict(settings(tmp_path / "run", base, pairs, training__max_steps=1), "dpo"))
    assert main(["card", str(tmp_path / "run")]) == 0
    plain = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    expected = [1, *plain] if "<s>" in single else plain
    assert ChatEncoder(tokenizer).encode_prompt("Once upon a time") == expected
    assert len(tokenizer("Once upon a time")["input_ids"]) == len(expected) + last
    assert ids_of_example(tmp_path / "run", monkeypatch) == expected


def test_first_and_last_only_where_there_are_two(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5, "eval_loss": 0.6}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| loss, held-out | – | 0.600 (step 2) |" in card(run)[1]
    start = {"step": 0, "eval_loss": 0.69315, "eval_rewards/accuracies": 0.5}
    (run / "initial_evaluation.json").write_text(json.dumps(start))
    text = card(run)[1]
    assert "| loss, held-out | 0.693 (step 0) | 0.600 (step 2) |" in text
    assert "| reward accuracy, held-out | – | 50.0% (step 0) |" in text


def test_settings_of_later_versions_are_in_the_table(tmp_path):
    more = {"training__lr_schedule": "cosine", "training__min_lr_ratio": 0.1, "training__warmup_steps": 1500}
    more |= {"training__warmup_ratio": 0.1, "training__best_metric": "eval_loss", "training__eval_every": 10}
    run = make_run(tmp_path / "run", data__eval_size=0.05, training__max_steps=5000, **more)
    text = card(run)[1]
    assert "| schedule | cosine, warm-up over 1,500 steps, down to 0.1 of the peak |" in text
    assert "| exported model | that of the evaluation with the best `eval_loss` |" in text
    assert "5.0% of the training rows were held out for evaluation" in text


def test_the_evaluation_is_that_of_the_exported_model(tmp_path):
    run = make_run(tmp_path / "run", training__best_metric="eval_loss", training__eval_every=1, data__eval_size=2)
    (run / "model" / "config.json").write_text("{}")
    lines = [{"step": step, "loss": 0.5, "eval_loss": loss} for step, loss in ((1, 0.6), (2, 0.4), (3, 0.5))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = card(run)[1]
    assert "| loss, held-out | 0.600 (step 1) | 0.400 (step 2) |" in text
    assert "| training loss | 0.500 (step 1) | 0.500 (step 3) |" in text
