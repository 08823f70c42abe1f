"""`--suite alpaca-eval`: outputs in AlpacaEval's format, resumed; the real package judges over a loopback endpoint."""

import json
import sys

import pytest
import torch
from decoded import generate
from judges import Reply, completion, serving

from notus.__main__ import main
from notus.evaluation import decoding as generation
from notus.evaluation.alpaca_eval import (
    Instruction,
    baseline_outputs,
    length_controlled,
    read_instructions,
)
from notus.evaluation.results import read_result
from notus.model.export import load_causal_lm

ROWS = [
    {"instruction": "a long question about the sea and the dog", "dataset": "koala"},
    {"instruction": "dog"},
    {"instruction": "write a poem"},
]
OPTIONS = ["--precision", "fp32", "--max-new-tokens", "6", "--chat-template", "zephyr"]
SUITE = ["evaluate", "--suite", "alpaca-eval"]


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.json"
    path.write_text(json.dumps(ROWS))
    return path


def completions(folder, **options):
    model, tokenizer = load_causal_lm(folder, dtype=torch.float32, device="cpu")
    turns = [[{"role": "user", "content": row["instruction"]}] for row in ROWS]
    options = {"max_new_tokens": 6, "chat_template": "zephyr", **options}
    return [text.strip() for text in generate(model, tokenizer, turns, **options)]


def outputs(folder):
    return json.loads((folder / "model_outputs.json").read_text())


def test_outputs_are_in_alpaca_evals_format(full_run, asked, capsys):
    assert main([*SUITE, str(full_run), "--prompts", str(asked), *OPTIONS]) == 0
    folder = full_run / "evaluations" / "alpaca-eval"
    texts = completions(full_run)
    assert outputs(folder) == [
        {**row, "output": text, "generator": "full", "dataset": row.get("dataset", "asked")}
        for row, text in zip(ROWS, texts, strict=True)
    ]
    result = read_result(folder / "result.json")
    assert [(figure.metric, figure.value) for figure in result.figures] == [("avg_length", sum(map(len, texts)) // 3)]
    assert result.settings["chat_template"] == "zephyr"
    assert "not judged" in capsys.readouterr().out


def test_a_second_run_computes_nothing_again(model_folder, asked, tmp_path, monkeypatch):
    greedy = [*SUITE, str(model_folder), "--prompts", str(asked), *OPTIONS, "--output", str(tmp_path / "o")]
    drawn = [*greedy, "--temperature", "2", "--top-p", "0.9", "--seed", "3", "--batch-size", "2"]
    wanted = {"temperature": 2.0, "top_p": 0.9, "seed": 3, "batch_size": 2}
    found = []
    for command in (greedy, drawn, greedy, drawn):
        assert main(command) == 0
        found.append([row["output"] for row in outputs(tmp_path / "o")])
        if command is drawn:
            monkeypatch.setattr(generation, "_complete", None)
    assert found[:2] == found[2:]
    monkeypatch.undo()
    assert found[:2] == [completions(model_folder), completions(model_folder, **wanted)]


@pytest.fixture
def server():
    """A judge that ranks the longer answer first, cannot make up its mind about poems, and may be out of money."""

    def respond(request, number):
        if number >= served.limit:
            return Reply({"error": {"message": "no money left", "type": "billing"}}, 400)
        question, first, second = request["messages"][-1]["content"].split("|||")
        ranks = (1, 2) if len(first) > len(second) else (2, 1)
        text = str([{"model": f"model_{number}", "rank": rank} for number, rank in enumerate(ranks, start=1)])
        body = completion(text if served.decided or "poem" not in question else "a hard question")
        return Reply({**body, "usage": {"total_tokens": 2}}, headers={"Content-Type": "application/json"})

    with serving(respond) as served:
        served.limit, served.decided = 99, False
        yield served


@pytest.fixture
def config(tmp_path, server):
    """An annotator's config for the server."""
    pytest.importorskip("alpaca_eval.main")
    folder = tmp_path / "annotators" / "longer"
    folder.mkdir(parents=True)
    (folder / "prompt.txt").write_text("<|im_start|>user\n{instruction}|||{output_1}|||{output_2}\n<|im_end|>")
    (folder / "configs.yaml").write_text(
        f"""longer:
  prompt_template: longer/prompt.txt
  fn_completions: openai_completions
  completions_kwargs:
    {{model_name: gpt-4, max_tokens: 10, temperature: 0, num_procs: 1, openai_api_keys: [key],
      openai_api_base: "{server.url}"}}
  fn_completion_parser: ranking_parser
  batch_size: 1
"""
    )
    return folder


def baseline(folder, texts):
    """One longer than the model's output, one shorter; of the poem it does not matter."""
    longer = {"instruction": ROWS[1]["instruction"], "output": texts[1] + " and more", "generator": "base"}
    shorter = {"instruction": ROWS[0]["instruction"], "output": "", "generator": "base"}
    other = {"instruction": ROWS[2]["instruction"], "output": "poem", "generator": "base"}
    path = folder / "baseline.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (other, longer, shorter)))
    return path


def test_the_package_judges(model_folder, asked, tmp_path, server, config, capsys):
    texts = completions(model_folder)
    out = tmp_path / "o"
    command = [*SUITE, str(model_folder), "--prompts", str(asked), *OPTIONS, "--output", str(out)]
    command += ["--judge", str(config), "--reference-outputs", str(baseline(tmp_path, texts))]
    server.limit = 0
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "no money left" in told
    assert "outputs and verdicts so far are kept: fix the cause and run the same command again" in told
    assert [row["output"] for row in outputs(out)] == texts
    server.limit = 99
    assert main(command) == 0
    annotations = json.loads((out / "judge-longer" / "annotations.json").read_text())
    assert [row["preference"] for row in annotations] == [2, 1, None]
    assert [row["output_2"] for row in annotations] == texts
    assert {row["annotator"] for row in annotations} == {"longer"}
    result = read_result(out / "result.json")
    rate, length = result.figures
    assert (rate.metric, rate.value, rate.count) == ("win_rate", 50, 2)
    assert (rate.setup, rate.dataset) == ("judged by longer against base, 3 prompts", "asked.json")
    assert length.count == 3
    assert result.details["left_out"] == 1
    asked_so_far = len(server.requests)
    server.decided = True
    assert main(command) == 0  # verdicts are kept, and that which was none is asked for again
    assert len(server.requests) == asked_so_far + 1
    assert read_result(out / "result.json").details["left_out"] == 0
    assert main(command) == 0
    assert len(server.requests) == asked_so_far + 1
    prompt = (config / "prompt.txt").read_text()
    (config / "prompt.txt").write_text(prompt.replace("user", "user\nWhich is longer?"))
    assert main(command) == 0  # another prompt is another judge
    assert len(server.requests) == asked_so_far + 4


def test_length_controlled_win_rate_is_the_packages(tmp_path, monkeypatch):
    glm = pytest.importorskip("alpaca_eval.metrics.glm_winrate")
    entries = []
    for number in range(40):
        won = number % 4 != 0  # 30 of 40, whatever the lengths
        entries.append(
            {
                "instruction": f"question {number}",
                "output_1": "x" * (10 + number % 5),
                "output_2": "x" * (10 + number % 7),
                "generator_1": "base",
                "generator_2": "mine",
                "annotator": "judge",
                "preference": 2.0 if won else 1.0,
            }
        )
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(entries))
    gamed = ["model,index,instruction_difficulty,preference,std_delta_len,not_gamed_baseline"]
    gamed += [f"m,{i},{(i % 3) - 1.0},0.5,{(i % 5) - 2.0},False" for i in range(40)]
    (tmp_path / "df_gamed.csv").write_text("\n".join(gamed))
    monkeypatch.setattr(glm, "hf_hub_download", lambda **_: tmp_path / "df_gamed.csv")
    found = length_controlled(path)
    assert 60 < found[0] < 90
    assert found[1] >= 0
    assert (tmp_path / "weights").is_dir()  # not in the package's own folder
    monkeypatch.setattr(glm, "hf_hub_download", lambda **_: tmp_path / "none.csv")
    with pytest.raises(ValueError, match="no length-controlled win rate"):
        length_controlled(path)


def test_the_hubs_files_are_the_default(model_folder, tmp_path, config, monkeypatch, capsys):
    baselines = [{**row, "output": "no", "generator": "text_davinci_003", "dataset": "koala"} for row in ROWS]
    fetched = []

    def fetch(repo, name, repo_type):
        fetched.append((repo, name, repo_type))
        (tmp_path / name).write_text(json.dumps(baselines))
        return tmp_path / name

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("notus.evaluation.alpaca_eval.length_controlled", lambda path: (12.5, 1.0))
    command = [*SUITE, str(model_folder), *OPTIONS, "--output", str(tmp_path / "o"), "--judge", str(config)]
    assert main(command) == 0
    assert set(fetched) == {("tatsu-lab/alpaca_eval", "alpaca_eval.json", "dataset")}
    figures = read_result(tmp_path / "o" / "result.json").figures
    assert [figure.metric for figure in figures] == ["win_rate", "length_controlled_win_rate", "avg_length"]
    assert (figures[1].value, figures[0].dataset) == (12.5, "tatsu-lab/alpaca_eval")
    assert main([*command, "--reference-outputs", "gpt4_1106_preview"]) == 0
    assert fetched[-1][1] == "alpaca_eval_gpt4_baseline.json"
    capsys.readouterr()

    def refuse(repo, name, repo_type):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    assert main(command) == 1
    assert "alpaca_eval.json: cannot be fetched from the hub (no network); give files" in capsys.readouterr().err


def test_a_missing_package_says_how_to_install_it(model_folder, asked, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "alpaca_eval", None)
    assert main([*SUITE, str(model_folder), "--prompts", str(asked), "--judge", "alpaca_eval_gpt4"]) == 1
    assert "pip install alpaca-eval 'setuptools<81'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--top-p", "0.5"], "--top-p has no effect on greedy answers"),
        (["--reference-outputs", "x"], "--reference-outputs has no effect without a judge"),
        (["--judge", "alpaca_eval_gpt5"], "did you mean alpaca_eval_gpt4"),
        (["--judge", "alpaca_eval_gpt4", "--reference-outputs", "no.json"], "no.json: there is no such file"),
    ],
)
def test_mistakes_show_before_the_generation(model_folder, asked, monkeypatch, capsys, more, told):
    pytest.importorskip("alpaca_eval.main")
    monkeypatch.setattr(generation, "_complete", None)
    assert main([*SUITE, str(model_folder), "--prompts", str(asked), *more]) == 1
    assert told in capsys.readouterr().err


def test_a_model_or_annotations_are_needed(capsys):
    assert main(SUITE) == 1
    assert "name a MODEL_OR_RUN to evaluate, or annotations" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file is empty"),
        ("[]", "the file is empty"),
        ('["a"]', "row 1 .*: Input should be"),
        ('[{"instruction": "a"}, {"prompt": "b"}]', "row 2 .*: key 'instruction': Field required"),
        ('[{"instruction": " "}]', "row 1 .*: key 'instruction': the instruction is blank"),
        ('[{"instruction": "a"}, {"instruction": "a"}]', "row 2 .*: the same instruction as"),
        ('{"instruction": "a"}\n{"instruction": 5}', "line 2: key 'instruction'"),
    ],
)
def test_wrong_prompts_are_named(tmp_path, text, told):
    path = tmp_path / "asked.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        read_instructions(path)


def test_data_sets_and_models_may_be_numbers(tmp_path):
    path = tmp_path / "base.json"
    path.write_text('[{"instruction": "a", "output": "b", "dataset": 7, "generator": 3}]')
    ((_, asked),) = read_instructions(path)
    assert asked.dataset == "7"
    (row,) = baseline_outputs(str(path), [("here", asked)])
    assert row["generator"] == "3"


def test_a_baseline_without_an_output_is_rejected(tmp_path):
    path = tmp_path / "base.json"
    path.write_text('[{"instruction": "a", "output": ""}]')
    asked = [("here", Instruction(instruction=text)) for text in ("a", "b")]
    assert baseline_outputs(str(path), asked[:1]) == [{"instruction": "a", "output": "", "generator": "base"}]
    with pytest.raises(ValueError, match=r"base.json: holds no output for the instruction of here"):
        baseline_outputs(str(path), asked)


def test_a_run_on_plain_text_answers_instructions_as_text(plain_run, asked, tmp_path):
    command = [*SUITE, str(plain_run), "--prompts", str(asked), "--precision", "fp32", "--max-new-tokens", "6"]
    model, tokenizer = load_causal_lm(plain_run, dtype=torch.float32, device="cpu")
    texts = [row["instruction"] for row in ROWS]
    turns = [[{"role": "user", "content": text}] for text in texts]
    for options, prompts in (([], texts), (["--raw"], texts), (["--no-raw"], turns)):
        out = tmp_path / "".join(["out", *options])
        assert main([*command, *options, "--output", str(out)]) == 0
        wanted = generate(model, tokenizer, prompts, max_new_tokens=6)
        assert [row["output"] for row in outputs(out)] == [text.strip() for text in wanted]
        assert read_result(out / "result.json").settings["as_turns"] is (prompts is turns)
