import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from runs import config, write_messages

from notus.data.dataset import FEATURES, TokenizedDataset
from notus.training import dpo, run_data, sft
from notus.training.run_data import data_summary, length_histogram


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


def test_what_data_json_says_of_pairs(tmp_path: Path, model_folder: Path) -> None:
    rows = [
        {"prompt": "a b", "chosen": " one two", "rejected": " b", "source": source, "chosen-rating": rating,
         "rejected-rating": 1.0}
        for source, rating in (("x", 5.0), ("y", 4.0), ("x", 3.0), (None, None), ("y", 3.4))
    ]  # fmt: skip
    rows += [{"prompt": "a", "chosen": " x", "rejected": " x"}] * 2  # identical
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dpo.run(config("dpo", tmp_path / "run", model_folder, data, data__eval_size=2))
    told = json.loads((tmp_path / "run" / "data.json").read_text())
    report = {
        "read": 7,
        "kept": 5,
        "dropped": {"chosen and rejected identical": 2},
        "prompts_cut": 0,
        "completions_cut": 0,
        "templated": 0,
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


def test_many_sources_are_counted_together() -> None:
    names = [str(number) for number in range(103) for _ in range(1 + (number == 50))]
    counted = run_data._count(names)
    assert (len(counted), next(iter(counted)), counted["50"], counted["(others)"]) == (101, "50", 2, 3)
