"""What the demo rejects, and its tokenizer. `test_readme.py` shows that it learns."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from notus import demo


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
