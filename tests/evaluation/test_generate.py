"""`notus generate`: rows keep keys and order, options have their effect, nothing half-written is left."""

import json

import pytest
import torch
import transformers
from decoded import generate
from toys import toy_model, toy_tokenizer

from notus.__main__ import main
from notus.model.export import load_causal_lm

FP32 = ["--precision", "fp32", "--max-new-tokens", "6"]
ROWS = [
    {"id": 1, "prompt": "a long prompt about the sea and the dog"},
    {"id": 2, "prompt": "dog"},
    {"id": 3, "prompt": [{"role": "user", "content": "poem"}], "tag": "é"},
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture
def chat_folder(tmp_path):
    """A model whose tokenizer brings a chat template."""
    folder = tmp_path / "chat"
    toy_model().save_pretrained(folder)
    toy_tokenizer(chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}").save_pretrained(
        folder
    )
    return folder


def run(folder, prompts, *options):
    out = prompts.parent / "results" / "out.jsonl"
    assert main(["generate", str(folder), str(prompts), str(out), "--overwrite", *FP32, *map(str, options)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def completions(folder, prompts, **options):
    model, tokenizer = load_causal_lm(folder, dtype=torch.float32, device="cpu")
    return generate(model, tokenizer, prompts, max_new_tokens=6, **options)


def test_rows_keep_their_keys_and_order(model_folder, prompts, capsys):
    found = run(model_folder, prompts, "--batch-size", 2)
    wanted = completions(model_folder, [row["prompt"] for row in ROWS])
    assert found == [{**row, "completion": text} for row, text in zip(ROWS, wanted, strict=True)]
    assert len(set(wanted)) == 3
    assert "3 prompts: 1 conversations, 2 plain texts" in capsys.readouterr().out
    assert [path.name for path in (prompts.parent / "results").iterdir()] == ["out.jsonl"]


def test_strings_are_user_turns_where_there_is_a_chat_format(chat_folder, model_folder, prompts):
    turn = [{"role": "user", "content": "dog"}]
    assert run(chat_folder, prompts)[1]["completion"] == completions(chat_folder, [turn])[0]
    prompts.write_text(json.dumps(ROWS[1]))
    assert run(chat_folder, prompts, "--raw")[0]["completion"] == completions(chat_folder, ["dog"])[0]
    zephyr = run(model_folder, prompts, "--chat-template", "zephyr")
    assert zephyr[0]["completion"] == completions(model_folder, [turn])[0]


def test_system_turns(chat_folder, prompts):
    def with_system(text):
        return [{"role": "system", "content": text}, {"role": "user", "content": "dog"}]

    brief = run(chat_folder, prompts, "--system", "be brief")
    assert brief[1]["completion"] == completions(chat_folder, [with_system("be brief")])[0]
    empty = run(chat_folder, prompts, "--add-empty-system")
    assert empty[1]["completion"] == completions(chat_folder, [with_system("")])[0]


def test_samples(model_folder, prompts):
    options = ["--temperature", 3, "--top-k", 50, "--top-p", 0.9, "--num-samples", 3, "--seed", 7]
    found = run(model_folder, prompts, *options)
    flat = [row["prompt"] for row in ROWS for _ in range(3)]
    wanted = completions(model_folder, flat, temperature=3.0, top_k=50, top_p=0.9, seed=7)
    assert [row["completions"] for row in found] == [wanted[:3], wanted[3:6], wanted[6:]]
    assert "completion" not in found[0]
    assert found != run(model_folder, prompts, *options[:-1], 8)


def test_runs_and_adapters(lora_run, full_run, model_folder, prompts):
    for trained in (lora_run, lora_run / "model", full_run):
        found = run(trained, prompts)
        assert [row["completion"] for row in found] == completions(trained, [row["prompt"] for row in ROWS])
    assert completions(full_run, ["dog"]) != completions(model_folder, ["dog"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "0.5"], "--top-p has no effect on greedy completions"),
        (["--seed", "1"], "--seed has no effect"),
        (["--num-samples", "2"], "--num-samples above 1 would repeat"),
        (["--raw", "--add-empty-system"], "--raw uses no chat template"),
        (["--raw"], "line 3: holds messages, which --raw does not take"),
    ],
)
def test_rejects_options_without_effect(model_folder, prompts, capsys, options, message):
    out = prompts.parent / "out.jsonl"
    assert main(["generate", str(model_folder), str(prompts), str(out), *options]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_rejects_a_system_turn_for_plain_text(model_folder, prompts, capsys):
    prompts.write_text(json.dumps(ROWS[1]))
    arguments = ["generate", str(model_folder), str(prompts), str(prompts.parent / "out.jsonl")]
    assert main([*arguments, "--system", "be brief"]) == 1
    assert "--system has no effect" in capsys.readouterr().err


def test_an_error_names_the_row_and_leaves_the_last_result(model_folder, prompts, capsys):
    out = prompts.parent / "out.jsonl"
    out.write_text("before")
    prompts.write_text(json.dumps({"prompt": "dog"}) + "\n" + json.dumps({"prompt": "dog " * 300}))
    assert main(["generate", str(model_folder), str(prompts), str(out), "--overwrite", *FP32]) == 1
    assert f"{prompts}, line 2: the prompt's" in capsys.readouterr().err
    assert out.read_text() == "before"


def test_a_file_that_exists_is_replaced_only_on_demand(model_folder, prompts, capsys):
    out = prompts.parent / "out.jsonl"
    command = ["generate", str(model_folder), str(prompts), str(out), *FP32]
    out.touch()
    assert main(command) == 0
    out.write_text("my notes")
    assert main(command) == 1
    assert f"{out}: exists already; name another file, or replace it with --overwrite" in capsys.readouterr().err
    assert out.read_text() == "my notes"
    assert main([*command, "--overwrite"]) == 0
    assert len(out.read_text().splitlines()) == 3


def test_no_progress_bar_of_transformers_is_shown(model_folder, prompts, capsys):
    transformers.utils.logging.enable_progress_bar()
    run(model_folder, prompts)
    assert "Loading weights" not in capsys.readouterr().err


def test_rejects_to_write_over_the_prompts(model_folder, prompts, capsys):
    assert main(["generate", str(model_folder), str(prompts), str(prompts)]) == 1
    assert "would replace the input" in capsys.readouterr().err
    assert main(["generate", str(model_folder), str(prompts), str(prompts.parent)]) == 1
    assert "a folder of that name" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--top-p", "1.5"], ["--temperature", "-1"], ["--batch-size", "0"]])
def test_argparse_refuses_values_out_of_range(model_folder, prompts, option):
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(model_folder), str(prompts), "out.jsonl", *option])
    assert caught.value.code == 2
