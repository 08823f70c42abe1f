import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from runs import config, write_messages, write_pairs
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from notus.config import DataConfig
from notus.data.chat import ChatEncoder
from notus.data.dataset import FEATURES, TokenizedDataset
from notus.data.drop_report import DropReport
from notus.model.export import load_tokenizer
from notus.runtime.distributed import process_group
from notus.training import dpo, run_data, sft
from notus.training.run_data import (
    data_summary,
    date_notice,
    length_histogram,
    load_held_out,
    load_inputs,
    rule_of,
    unused_settings,
)


@pytest.mark.parametrize(
    ("lengths", "edges", "counts"),
    [
        ([5], [5, 6], [1]),
        ([1, 2, 2, 4], [1, 2, 3, 4, 5], [1, 2, 0, 1]),
        ([0, 47, 24, 25], list(range(0, 50, 2)), [1, *[0] * 11, 2, *[0] * 10, 1]),  # 48 values: 24 buckets of 2
        ([10, 58], list(range(10, 62, 3)), [1, *[0] * 15, 1]),  # 49 values: buckets of 3
    ],
)
def test_histograms_of_lengths(lengths: list[int], edges: list[int], counts: list[int]) -> None:
    assert length_histogram(np.array(lengths)) == {"edges": edges, "counts": counts}


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (1, ["completion"]),
        (2, ["chosen", "rejected"]),
        (4, ["completion_1", "completion_2", "completion_3", "completion_4"]),
    ],
)
def test_a_summary_of_rows_with_any_number_of_completions(count: int, names: list[str]) -> None:
    branches = [[7] * length for length in range(1, count + 1)]
    columns = {"trunk": [[5, 6]], "branches": [branches], "loss_mask": [[[1] * len(ids) for ids in branches]]}
    summary = data_summary(TokenizedDataset(datasets.Dataset.from_dict(columns, features=FEATURES)), None)
    assert summary["rows"] == 1
    assert list(summary["lengths"]) == ["prompt", *names]
    assert [found["edges"][0] for found in summary["lengths"].values()] == [2, *range(1, count + 1)]


def test_what_data_json_says_of_pairs(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "a b", "chosen": " one" + word, "rejected": " b", "source": source, "chosen-rating": rating,
         "rejected-rating": 1.0}
        for source, rating, word in zip(("x", "y", "x", None, "y"), (5.0, 4.0, 3.0, None, 3.4), "abcde", strict=True)
    ]  # fmt: skip
    rows += [{"prompt": "a", "chosen": " x", "rejected": " x"}] * 2  # identical
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data__eval_size": 2, "data__template_date": "2024-01-01"}
    dpo.run(config("dpo", tmp_path / "run", model_folder, data, **settings))
    assert "note: data.template_date has no effect: all rows are plain text" in capsys.readouterr().out
    told = json.loads((tmp_path / "run" / "data.json").read_text())
    report = {
        "read": 7,
        "kept": 5,
        "dropped": {"chosen and rejected identical": 2},
        "prompts_cut": 0,
        "completions_cut": 0,
        "templated": 0,
        "cut_share": 0.0,
        "glued": 0,
        "special_tokens": 0,
        "left_out": 0,
        "duplicates": 0,
        "held": 0,
        "excluded": [],
        "unreadable": [],
        "unknown_columns": [],
        "missing_columns": [],
        "reversed": 0,
        "empty_systems": 0,
        "masked": 0,
    }
    assert told["train"]["report"] == report
    assert told["eval"]["report"] == {}  # its rows were read with the others
    ratings = [told[side]["ratings"] for side in ("train", "eval")]
    counts = [sum(sum(each[name]["counts"]) for each in ratings) for name in ("chosen", "rejected")]
    assert counts == [4, 5]  # one is not known
    assert ratings[0]["chosen"]["edges"] == ratings[0]["rejected"]["edges"]
    assert ratings[0]["rejected"]["counts"][0] == 3
    named = [Counter(told[side]["sources"]) for side in ("train", "eval")]
    assert named[0] + named[1] == {"x": 2, "y": 2, "(unknown)": 1}
    assert [told[side]["rows"] for side in ("train", "eval")] == [3, 2]
    lengths = told["train"]["lengths"]
    assert list(lengths) == ["prompt", "chosen", "rejected"]
    assert all(sum(histogram["counts"]) == 3 for histogram in lengths.values())
    assert lengths["chosen"]["edges"][0] > lengths["rejected"]["edges"][0]


def test_what_data_json_says_of_demonstrations(tmp_path: Path, model_folder: Path) -> None:
    data = write_messages(tmp_path / "chats.jsonl", 6)
    sft.run(config("sft", tmp_path / "run", model_folder, data))
    told = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (told["train"]["ratings"], told["train"]["sources"]) == (None, None)
    assert (told["eval"], list(told["train"]["lengths"])) == (None, ["prompt", "completion"])


@pytest.fixture
def alone() -> Iterator[None]:
    with process_group():
        yield


def read_rows(rows: TokenizedDataset | None) -> list[bytes]:
    assert rows is not None
    return [digest.tobytes() for digest in rows.digests()]


@pytest.mark.parametrize("weight", [1, 1.5, 3])
@pytest.mark.usefixtures("alone")
def test_no_held_out_row_is_trained_on_whatever_its_weight(tmp_path: Path, model_folder: Path, weight: float) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 37)
    settings = config("dpo", tmp_path / "run", model_folder, data, data__eval_size=10).data
    settings = dataclasses.replace(settings, train=[{**settings.train[0], "weight": weight}])
    inputs = load_inputs(settings, load_tokenizer(model_folder, False), task="dpo", seed=42)
    train, held = read_rows(inputs.train), read_rows(inputs.eval)
    assert (len(held), len(train)) == (10, round(27 * weight))
    assert not set(train) & set(held)
    again = load_held_out(settings, load_tokenizer(model_folder, False), task="dpo", seed=42)
    assert read_rows(again) == held


@pytest.mark.usefixtures("alone")
def test_named_evaluation_rows_are_left_out_of_training_and_counted(tmp_path: Path, model_folder: Path) -> None:
    data, other = write_pairs(tmp_path / "pairs.jsonl", 9), tmp_path / "eval.jsonl"
    other.write_text("".join(data.read_text().splitlines(keepends=True)[2:5]))
    settings = config("dpo", tmp_path / "run", model_folder, data, data__eval=str(other)).data
    inputs = load_inputs(settings, load_tokenizer(model_folder, False), task="dpo", seed=42)
    assert (len(inputs.train), inputs.reports["train"].held) == (6, 3)
    assert "left out of training: 3 rows that are copies of evaluation rows" in str(inputs.reports["train"])
    assert not set(read_rows(inputs.train)) & set(read_rows(inputs.eval))


@pytest.mark.usefixtures("alone")
def test_excluded_ids_come_from_a_file(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, ids = write_pairs(tmp_path / "pairs.jsonl", 5), tmp_path / "ids.txt"
    settings = config("dpo", tmp_path / "run", model_folder, data, data__exclude=str(ids)).data
    load = functools.partial(load_inputs, settings, load_tokenizer(model_folder, False), task="dpo", seed=42)
    ids.write_text("# none yet\n\n")
    rows = load().train
    ids.write_text(f"{rows.info(1).id}  # wrong\n{'0' * 16}\n")
    left = load()
    assert read_rows(left.train) == [each for at, each in enumerate(read_rows(rows)) if at != 1]
    assert left.reports["train"].dropped == {"excluded by data.exclude": 1}
    assert f"no row has 1 of its 2 ids ({'0' * 16}" in capsys.readouterr().out
    ids.write_text("0" * 16)
    with pytest.raises(ValueError, match=r"data.exclude=.*ids.txt: no row has one of its 1 ids"):
        load()
    ids.write_text(f"{'0' * 16}\nline 3 of pairs.jsonl\n")
    with pytest.raises(ValueError, match=r"ids.txt, line 2: 'line 3 of pairs.jsonl' is no row id"):
        load()
    ids.unlink()
    with pytest.raises(ValueError, match=r"data.exclude=.*ids.txt cannot be read"):
        load()


def test_many_sources_are_counted_together() -> None:
    names = [str(number) for number in range(103) for _ in range(1 + (number == 50))]
    counted = run_data._count(names)
    assert (len(counted), next(iter(counted)), counted["50"], counted["(others)"]) == (101, "50", 2, 3)


@pytest.mark.parametrize(("end", "joined"), [("", False), ("!", True)])
def test_a_prompt_that_the_tokenizer_joins_with_the_answer_is_said(tmp_path: Path, end: str, joined: bool) -> None:
    pieces = ["</s>", "!Y", *"!:HYaeis.", "<", ">", "/"]
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [("!", "Y")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    (tmp_path / "a.jinja").write_text(
        "{% for m in messages %}{{ ':' + (end if m['role'] == 'assistant' else '') + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ ':' + end }}{% endif %}"
    )
    encoder = ChatEncoder(tokenizer, chat_template=str(tmp_path / "a.jinja"), chat_template_kwargs={"end": end})
    assert (run_data.boundary_notice(encoder) is not None) == joined


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed(number: int, *ratings: float | None) -> dict[str, Any]:
    completions = [f" {'x' * (number + place + 1)}" for place in range(len(ratings))]
    return {"prompt": f"Sea {number}", "completions": completions, "ratings": list(ratings), "source": "flan"}


def data_of(path: Path, **overrides: Any) -> DataConfig:
    return config("dpo", path.parent / "run", path.parent, path, **overrides).data


@pytest.mark.usefixtures("alone")
def test_lists_are_loaded_held_out_and_counted(tmp_path: Path, model_folder: Path) -> None:
    rows = [listed(number, *[1, 4.5, 3][: 2 + number % 2]) for number in range(6)]
    path = write_rows(tmp_path / "lists.jsonl", [*rows, listed(6, 1, None), {**listed(0, 1, 4.5), "source": "copy"}])
    settings, tokenizer = data_of(path, data__eval_size=2), load_tokenizer(model_folder, False)
    inputs = load_inputs(settings, tokenizer, task="lists", seed=42)
    assert inputs.eval is not None
    told = inputs.summary()
    train, held = told["train"], told["eval"]
    assert train["rows"] + held["rows"] + inputs.reports["train"].held == 7
    assert not set(read_rows(inputs.train)) & set(read_rows(inputs.eval))
    assert train["report"]["dropped"] == {"fewer than two rated completions": 1}
    names = [f"completion_{number}" for number in (1, 2, 3)]
    assert list(train["lengths"]) == ["prompt", *names]
    counted = [sum(train["lengths"][name]["counts"]) for name in names]
    assert counted == [train["rows"]] * 2 + [int((inputs.train.branch_counts == 3).sum())]
    assert [sum(train["ratings"][name]["counts"]) for name in names] == counted
    assert train["labels"] is None
    again = load_held_out(settings, tokenizer, task="lists", seed=42)
    assert read_rows(again) == read_rows(inputs.eval)
    assert again.ratings is not None
    assert again.ratings[:, 0].tolist() == [4.5] * 2


@pytest.mark.usefixtures("alone")
def test_labels_are_loaded_and_counted(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"prompt": f"Sea {number}", "completion": " x", "label": number % 3 == 0} for number in range(6)]
    path = write_rows(tmp_path / "labels.jsonl", [*rows, {"prompt": "a", "chosen": " b", "rejected": " c"}])
    inputs = load_inputs(data_of(path), load_tokenizer(model_folder, False), task="labels", seed=42)
    assert inputs.train.labels is not None
    assert inputs.train.labels.tolist() == [True, False, False, True, False, False, True, False]
    told = inputs.summary()["train"]
    assert (told["rows"], told["labels"], told["ratings"]) == (8, {"true": 3, "false": 5}, None)
    assert list(told["lengths"]) == ["prompt", "completion"]


@pytest.mark.parametrize(("task", "longest"), [("dpo", 32), ("lists", 32), ("labels", 32), ("sft", None)])
def test_prompts_are_cut_for_preferences_alone(model_folder: Path, task: Any, longest: int | None) -> None:
    settings = data_of(Path("x.jsonl"), data__max_length=64, data__max_prompt_length=32)
    assert rule_of(settings, load_tokenizer(model_folder, False), task).max_prompt_length == longest


def test_two_completions_of_a_list_are_no_chosen_and_rejected() -> None:
    columns = {"trunk": [[1]], "branches": [[[2], [3]]], "loss_mask": [[[1], [1]]]}
    rows = TokenizedDataset(datasets.Dataset.from_dict(columns, features=FEATURES))
    assert list(data_summary(rows, None, "lists")["lengths"]) == ["prompt", "completion_1", "completion_2"]
    assert list(data_summary(rows, None)["lengths"]) == ["prompt", "chosen", "rejected"]


CONVERSATIONAL = {
    "data__chat_template": "zephyr",
    "data__chat_template_kwargs": {"thinking": True},
    "data__add_empty_system": True,
    "data__mask_history": True,
    "data__split_special_tokens": True,
}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({}, ["split_special_tokens", "chat_template chat_template_kwargs add_empty_system mask_history"]),
        ({"special_tokens": 1}, ["chat_template chat_template_kwargs add_empty_system mask_history"]),
        ({"templated": 1}, ["add_empty_system", "mask_history", "split_special_tokens"]),
        ({"templated": 1, "masked": 1, "empty_systems": 1, "special_tokens": 1}, []),
    ],
)
def test_settings_that_change_no_row_are_said(counts: dict[str, int], expected: list[str]) -> None:
    reports = {"train": DropReport(read=2), "eval": DropReport(read=2, **counts)}
    told = unused_settings(data_of(Path("x.jsonl"), **CONVERSATIONAL), reports)
    assert [" ".join(re.findall(r"data\.(\w+)", note)) for note in told] == expected
    assert all(note.startswith("note: ") and "no effect" in note for note in told)
    assert unused_settings(data_of(Path("x.jsonl")), reports) == []


@pytest.mark.usefixtures("alone")
def test_a_run_counts_what_its_settings_change(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
    talks = [[{"role": "system", "content": "s"}, user, answer], [user, answer, user, answer], [user, answer]]
    path = write_rows(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    settings = {"data__mask_history": True, "data__add_empty_system": True}
    load = functools.partial(load_inputs, tokenizer=load_tokenizer(model_folder, False), task="sft", seed=42)
    report = load(data_of(path, **settings)).reports["train"]
    assert (report.masked, report.empty_systems) == (1, 2)
    assert "no effect" not in capsys.readouterr().out
    inputs = load(data_of(write_rows(path, [{"messages": talks[0]}]), **settings))
    assert capsys.readouterr().out.count("no effect") == 2
    assert "chat template writes no date" in str(date_notice("2024-01-01", inputs))
    assert date_notice(None, inputs) is None
    plain = load(data_of(write_pairs(path, 3), data__mask_history=True))
    assert "note: data.mask_history has no effect: all rows are plain text" in capsys.readouterr().out
    assert "all rows are plain text" in str(date_notice("2024-01-01", plain))


@pytest.mark.usefixtures("alone")
def test_weights_say_how_many_rows_a_pass_has(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write_pairs(tmp_path / "one.jsonl", 20), write_pairs(tmp_path / "two.jsonl", 7, seed=1)
    sources = [{"path": str(one), "weight": 0.2}, {"path": str(two), "weight": 2}]
    load = functools.partial(load_inputs, tokenizer=load_tokenizer(model_folder, False), task="dpo", seed=42)
    for settings, count in (({}, 7), ({"data__eval_size": 1}, None)):
        inputs = load(data_of(one, data__train=sources, **settings))
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("by the weights")]
        first, second = (int(number) for number in re.findall(r"(\d+) of ", line))
        assert f"an epoch has {len(inputs.train)} rows: {first} of {one}, {second} of {two}" in line
        assert first + second == len(inputs.train)
        assert count is None or (first, second) == (4, 14)
    load(data_of(one, data__train=str(two), data__eval=[{"path": str(one), "weight": 0.5}]))
    assert f"an evaluation has 10 rows: 10 of {one}" in capsys.readouterr().out
    load(data_of(one))
    assert "by the weights" not in capsys.readouterr().out
