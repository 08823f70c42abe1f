"""`python -m notus`: commands are found and named, a mistake is one line, help starts no torch."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from runs import settings, write_pairs
from toys import toy_model_folder

from notus import __main__ as entry
from notus.config import DPO_SECTIONS, SECTIONS, config_from_dict, save_config
from notus.config_reference import entries

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", entry.HELP)
def test_every_command_answers_for_help(capsys, name):
    with pytest.raises(SystemExit) as caught:
        entry.main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: notus {name}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        entry.main(["--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("demo", "curate", "reference", "evaluate", "generate", "export"))


@pytest.mark.parametrize("command", ["dpo", "sft", "reference"])
def test_help_of_training_lists_every_key_that_the_task_uses(capsys, command):
    with pytest.raises(SystemExit) as caught:
        entry.main([command, "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 120
    for name, section in SECTIONS.items():
        used = command != "sft" or name not in DPO_SECTIONS
        assert (f"\n{name}: " in output) == used
        found = output.split(f"\n{name}: ")[-1].split("\n\n")[0]
        for key in entries(section) if used else []:
            line = next(line for line in found.splitlines() if line.startswith(f"  {key.key} "))
            assert line.split(maxsplit=1)[1].startswith(key.default)
            assert key.type.split()[0] in found
    assert "learning_rate             5e-7          Peak learning rate. [number > 0]\n" in output


def test_help_is_found_anywhere_and_printed_by_one_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        entry.main(["dpo", "config.yaml", "-h"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", [[], *([name] for name in entry.HELP), ["evaluate", "--suite", "win-rate"]])
def test_help_starts_no_torch(command):
    code = (
        "import sys, contextlib\nfrom notus.__main__ import main\n"
        f"with contextlib.suppress(SystemExit): main({[*command, '--help']!r})\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evalute"], "there is no command 'evalute'; did you mean evaluate?"),
        (["zzz"], "choose from dpo, sft, demo"),
        ([], "required: COMMAND"),
        (["export"], "required: RUN, OUT"),
    ],
)
def test_a_command_line_that_cannot_be_read_exits_2(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        entry.main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_only_rank_0_reports_a_mistake(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        entry.main(["evalute"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


def test_a_users_mistake_is_one_line(tmp_path, capsys):
    assert entry.main(["curate", str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_reference_fills_the_cache_alone(tmp_path, capsys):
    model = toy_model_folder(tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 6)
    capsys.readouterr()
    tree = settings(tmp_path / "run", model, pairs)
    save_config(config_from_dict(tree, "dpo"), tmp_path / "config.yaml")
    command = ["reference", str(tmp_path / "config.yaml"), f"--reference.cache_dir={tmp_path / 'cache'}"]
    assert entry.main(command) == 0
    assert "6 rows" in capsys.readouterr().out
    (cache,) = (tmp_path / "cache").glob("*.safetensors")
    written = cache.stat().st_mtime_ns
    assert not (tmp_path / "run").exists()
    assert entry.main(command) == 0
    assert "6 rows" in capsys.readouterr().out
    assert cache.stat().st_mtime_ns == written  # read, not computed again
    assert entry.main([*command, "--data.max_lenght=3"]) == 1
    assert "max_length" in capsys.readouterr().err


def test_a_line_that_nobody_reads_is_let_go():
    code = (
        "import os, sys, time\nfrom notus.runtime.process import leave, tell\nsys.stdin.read()\n"
        "tell('one'); tell('two'); print('three', flush=True); tell('four', sys.stderr); leave(7)"
    )
    done = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1, stderr=-1)
    done.stdout.close()
    done.stderr.close()
    done.stdin.close()
    assert done.wait(timeout=240) == 7


def test_ctrl_c_ends_in_a_line(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("notus.evaluation.report.page.run", interrupted)
    assert entry.main(["report", "run"]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
    monkeypatch.setenv("RANK", "1")
    assert entry.main(["report", "run"]) == 130
    assert capsys.readouterr().err == ""


PATHS = {"CONFIG", "CONFIG.yaml", "DIR", "FILE", "FILE.html", "FILE.json", "FILE.py:NAME", "MODEL_OR_RUN", "OUT"}
PATHS |= {"PROMPTS", "PROMPTS_FILE", "RUN", "TEMPLATE"}
SUITES = [
    ["evaluate", "--suite", suite] for suite in ("preferences", "win-rate", "mt-bench", "alpaca-eval", "open-llm")
]


@pytest.mark.parametrize("words", [[name] for name in entry.MODULES if name != "evaluate"] + SUITES, ids=" ".join)
def test_home_is_expanded_in_every_path_of_a_command(words, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    declare, _ = entry._load(words[0], words)
    parser = argparse.ArgumentParser()
    declare(parser)
    paths = [action for action in parser._actions if action.metavar in PATHS or action.dest in ("input", "output")]
    assert paths
    for action in paths:
        assert action.type is not None, action
        assert action.type("~/x") == "/home/ada/x", action
        assert action.type("org/name") == "org/name", action
