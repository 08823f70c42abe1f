"""`notus generate`: rows keep keys and order, options have their effect, nothing half-written is left."""

import json
import shutil

import pytest
import torch
import transformers
import yaml
from decoded import generate
from runs import config
from toys import toy_model, toy_tokenizer

from notus.__main__ import main
from notus.evaluation import decoding
from notus.model.export import load_causal_lm
from notus.training import dpo

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


def test_the_other_engine(model_folder, prompts, monkeypatch):
    seen, complete = [], decoding._Engine._continuously
    monkeypatch.setattr(decoding._Engine, "_continuously", lambda *args: seen.append(args) or complete(*args))
    wanted = completions(model_folder, [row["prompt"] for row in ROWS])
    assert [row["completion"] for row in run(model_folder, prompts, "--engine", "continuous")] == wanted
    assert len(seen) == 1


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
        (["--raw", "--system", "be brief"], "--raw takes prompts as plain text, which has no turns"),
        (["--no-raw"], "--no-raw has no effect: "),
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


def as_text_and_as_turn(folder):
    return completions(folder, ["dog"]), completions(folder, [[{"role": "user", "content": "dog"}]])


def said_to_dog(folder, prompts, *options):
    prompts.write_text(json.dumps(ROWS[1]))
    return [row["completion"] for row in run(folder, prompts, *options)]


def test_a_run_on_plain_text_takes_strings_as_text(plain_run, prompts, tmp_path):
    text, turn = as_text_and_as_turn(plain_run)
    assert text != turn
    assert said_to_dog(plain_run, prompts) == text
    assert said_to_dog(plain_run / "model", prompts) == text
    assert said_to_dog(plain_run, prompts, "--raw") == text
    assert said_to_dog(plain_run, prompts, "--no-raw") == turn
    assert said_to_dog(plain_run, prompts, "--chat-template", "zephyr") not in (text, turn)
    # messages are rendered with the template, always
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": "dog"}]}))
    assert [row["completion"] for row in run(plain_run, prompts)] == turn


@pytest.mark.parametrize("finished", [True, False])
def test_so_does_the_model_exported_from_it(plain_run, prompts, tmp_path, finished, capsys):
    source = plain_run
    if not finished:
        source = shutil.copytree(plain_run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("model"))
    assert main(["export", str(source), str(tmp_path / "out")]) == 0
    text, turn = as_text_and_as_turn(tmp_path / "out")
    assert said_to_dog(tmp_path / "out", prompts) == said_to_dog(source, prompts) == text != turn
    assert "apply_chat_template" not in (tmp_path / "out" / "README.md").read_text()
    assert main(["card", str(source), "--output", "-"]) == 0
    assert "apply_chat_template" not in capsys.readouterr().out


def test_an_adapter_on_plain_text_does_too(chat_base, pairs_file, prompts, tmp_path):
    dpo.run(config("dpo", tmp_path / "lora", chat_base, pairs_file, lora__rank=2, training__max_steps=1))
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "adapter")]) == 0
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "merged"), "--merge"]) == 0
    for folder in (tmp_path / "lora", tmp_path / "adapter", tmp_path / "merged"):
        text, turn = as_text_and_as_turn(folder)
        assert said_to_dog(folder, prompts) == text != turn


def test_a_run_on_conversations_takes_strings_as_turns(chat_base, prompts, tmp_path):
    answers = {name: [{"role": "assistant", "content": f"{name} dog"}] for name in ("chosen", "rejected")}
    row = {"prompt": [{"role": "user", "content": "hello"}], **answers}
    plain = {"prompt": "a", "chosen": " b", "rejected": " c"}
    for name, rows in (("chat", [row] * 4), ("mixed", [row, plain] * 2)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(each) + "\n" for each in rows))
        dpo.run(config("dpo", tmp_path / name, chat_base, data, training__max_steps=1))
        text, turn = as_text_and_as_turn(tmp_path / name)
        assert said_to_dog(tmp_path / name, prompts) == turn != text
        assert said_to_dog(tmp_path / name, prompts, "--raw") == text


def test_a_damaged_report_of_the_data_is_named(plain_run, prompts, tmp_path, capsys):
    copy = shutil.copytree(plain_run, tmp_path / "copy")
    (copy / "data.json").write_text('{"train": 3}')
    (copy / "model" / "notus.json").unlink()  # of a run of an earlier version
    assert main(["generate", str(copy), str(prompts), str(tmp_path / "out.jsonl")]) == 1
    assert "data.json: not a report of a run's data" in capsys.readouterr().err


def test_system_turns_need_turns(plain_run, prompts, capsys):
    prompts.write_text(json.dumps(ROWS[1]))
    command = ["generate", str(plain_run), str(prompts), str(prompts.parent / "out.jsonl"), "--system", "be brief"]
    assert main([*command, *FP32]) == 1
    assert "add --chat-template or --no-raw" in capsys.readouterr().err
    assert main([*command, "--no-raw", *FP32]) == 0


def test_a_prompt_is_rendered_with_the_settings_of_the_run(plain_run, prompts, tmp_path, monkeypatch):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ tools | length if tools else 'no' }} tools"
        "{% if enable_thinking is defined %} thinking {{ enable_thinking }}{% endif %}:"
    )
    run_folder = shutil.copytree(plain_run, tmp_path / "run")
    path = run_folder / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["data"] |= {"chat_template": str(template), "chat_template_kwargs": {"enable_thinking": "off"}}
    path.write_text(yaml.safe_dump(tree))
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": "dog"}]}))
    seen, complete = [], decoding._complete
    monkeypatch.setattr(decoding, "_complete", lambda *args: seen.extend(args[1].prompts) or complete(*args))
    run(run_folder, prompts)
    assert [toy_tokenizer().decode(ids) for ids in seen] == ["<s>[user]dogno tools thinking off:"]


def test_prompts_that_are_not_there_are_known_before_the_model_is_loaded(model_folder, tmp_path, capsys):
    assert main(["generate", str(model_folder), str(tmp_path / "none.txt"), str(tmp_path / "out.jsonl")]) == 1
    assert "none.txt: there is no such file; give one with prompts" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl.gz", "out"])
def test_the_result_is_json_lines_and_so_is_its_name(model_folder, prompts, tmp_path, capsys, name):
    assert main(["generate", str(model_folder), str(prompts), str(tmp_path / name)]) == 1
    message = f"{name}: the result is JSON Lines; choose a name that ends with .jsonl, .ndjson or .json\n"
    assert capsys.readouterr().err.endswith(message)
    assert not (tmp_path / name).exists()
