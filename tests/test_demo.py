"""What the demo rejects, and its tokenizer. `test_readme.py` shows that it learns."""

import contextlib
import io
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from notus import __main__ as entry
from notus import demo
from notus.__main__ import run_command
from notus.curation import synthetic


def _args(*words: object) -> Namespace:
    parser = ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_a_folder_with_something_else_in_it_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no finished demo; name a new folder"):
        demo.run(_args("--output", tmp_path, "--seed", 0))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_another_seeds_demo_is_not_passed_off(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"seed": 1}))
    with pytest.raises(ValueError, match="holds a demo with seed 1, not 2"):
        demo.run(_args("--output", tmp_path, "--seed", 2))


def test_it_is_one_process_and_no_negative_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--seed -1 is negative"):
        demo.run(_args("--output", tmp_path / "new", "--seed=-1"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        demo.run(_args("--output", tmp_path / "new"))


@pytest.mark.parametrize("words", [("--model", "somewhere"), ("--pairs", "some.jsonl"), ("--lora",)])
def test_options_of_the_real_demo_need_it(tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"{words[0]} has no effect .*; add --real"):
        demo.run(_args("--output", tmp_path / "new", *words))


def test_roles_and_digits_are_single_tokens() -> None:
    tokenizer = demo.make_tokenizer()
    ids = tokenizer("<|user|>\nCount these digits: 4071</s>").input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:2] == ["<s>", "<|user|>"]
    assert tokens[-5:] == ["4", "0", "7", "1", "</s>"]


def test_the_same_seed_writes_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SIZES", {"sft": 12, "preferences": 8, "held_out": 4})
    for name in ("one", "two"):
        demo.write_data(tmp_path / name, seed=3)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert set(one) == {"sft-train.jsonl", "records-train.jsonl", "records-eval.jsonl", "prompts-eval.jsonl"}
    assert len(one["sft-train.jsonl"].splitlines()) == 12


def test_curation_leaves_no_pair_that_training_would_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SIZES", {"sft": 4, "preferences": 200, "held_out": 100})
    folder = tmp_path / "data"
    demo.write_data(folder, seed=0)
    demo._curate(folder, seed=0)
    for name in ("pairs-train", "pairs-train-by-overall-score", "pairs-eval"):
        pairs = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert pairs
        assert all(pair["chosen_response"] != pair["rejected_response"] for pair in pairs)
    assert "dropped, chosen and rejected responses are the same text: " in capsys.readouterr().out


# ---- --own-feedback ----

OWN = ("--own-feedback", "--rounds", "1", "--seed", "3", "--output")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def own_feedback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A demo of own feedback, tiny and untrained, its stages run in this process, and what it prints."""
    from notus.feedback.iterate import iterate

    def command(*words: object) -> None:
        if words[0] != "iterate":
            return run_command(*words)
        return _check(iterate([str(words[1])], lambda stage, spread: entry.main(list(stage))))

    folder = tmp_path_factory.mktemp("own") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "OWN_SIZES", {"sft": 64, "prompts": 12, "held_out": 8})
        patch.setattr(demo, "SECOND_STEPS", 1)
        patch.setattr(demo, "ITERATION", {**demo.ITERATION, "iterate": {"kl_samples": 0}})
        patch.setattr(demo, "run_command", command)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert demo.run(_args(*OWN, folder)) == 0
        yield folder, printed.getvalue()


def _check(code: int) -> None:
    assert code == 0


@pytest.mark.slow
def test_own_feedback_goes_from_prompts_to_a_trained_model(own_feedback: tuple[Path, str]) -> None:
    folder, printed = own_feedback
    asked = [row["instruction"] for row in _rows(folder / "data" / "prompts.jsonl")]
    held_out = [row["instruction"] for row in _rows(folder / "data" / "prompts-eval.jsonl")]
    shown = [row["messages"][0]["content"] for row in _rows(folder / "data" / "sft-train.jsonl")]
    assert (len(asked), len(held_out), len(shown)) == (12, 8, 64)
    assert not set(asked) & set(held_out)
    assert not set(shown) & {*asked, *held_out}
    place = folder / "rounds" / "round-1"
    records = _rows(place / "rated.jsonl")
    assert sorted(record["instruction"] for record in records) == sorted(asked)
    # two models answer twice, and the program judge rates all aspects
    assert all(len(record["completions"]) == 4 and len(record["models"]) == 2 for record in records)
    rated = records[0]["completions"][0]
    expected = synthetic.rate(records[0]["instruction"], [rated["response"]])[0]
    assert {aspect: float(each["Rating"]) for aspect, each in rated["annotations"].items()} == expected
    assert (place / "run" / "model" / "model.safetensors").is_file()
    table = printed.splitlines()
    start = next(line for line in table if line.startswith("start "))
    after = next(line for line in table if line.startswith("round 1"))
    answers = [record["completions"] for record in _rows(place / "answers.jsonl")]
    for line, which in ((start, 0), (after, 1)):
        share = synthetic.win_rate(held_out, [both[which]["response"] for both in answers])
        assert f" {share:.1%}" in line
    assert "iterate.yaml" in printed


@pytest.mark.slow
def test_own_feedback_resumes_and_is_not_another_demo(
    own_feedback: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, printed = own_feedback
    before = (folder / "rounds" / "round-1" / "rated.jsonl").stat().st_mtime_ns
    assert demo.run(_args(*OWN, folder)) == 0
    assert (folder / "rounds" / "round-1" / "rated.jsonl").stat().st_mtime_ns == before
    assert capsys.readouterr().out.splitlines()[-4:] == printed.splitlines()[-4:]
    with pytest.raises(ValueError, match="holds a demo with seed 3, rounds 1; name a new folder"):
        demo.run(_args("--own-feedback", "--seed", 4, "--output", folder))
    with pytest.raises(ValueError, match="holds no finished demo"):
        demo.run(_args("--seed", 3, "--output", folder))


def test_own_feedback_rejects_what_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no demo with --own-feedback"):
        demo.run(_args("--own-feedback", "--output", tmp_path))
    with pytest.raises(ValueError, match="two demos"):
        demo.run(_args("--own-feedback", "--real"))
    with pytest.raises(ValueError, match="--rounds has no effect"):
        demo.run(_args("--rounds", 2))
    for bad in ("0", "21", "two"):
        with pytest.raises(SystemExit):
            _args("--own-feedback", "--rounds", bad)
