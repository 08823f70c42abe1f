"""A model that answers and a judge, both behind transformers' own server, through one round of `notus iterate`."""

import json
from pathlib import Path

import pytest
from serving import saying, served, wait_for
from toy_iterations import in_process, read_lines, tree, write_config, write_prompts, write_start

from notus.feedback.iterate import iterate
from notus.feedback.records import summary_file

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
RATINGS = '{"1":5,"2":2}'


def test_a_round_with_a_sampled_model_and_a_judge_that_transformers_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write_start(tmp_path / "start")
    write_prompts(tmp_path / "prompts.txt", 6)
    judge = str(saying(tmp_path / "judge", RATINGS, added=[RATINGS]))
    other = str(saying(tmp_path / "other", "[", "7", "]"))
    with served(tmp_path / "log") as url:
        assert wait_for(url, judge) == RATINGS
        assert wait_for(url, other) == "[7]"
        config = tree(
            tmp_path,
            iterate__eval_prompts=None, iterate__rounds=1, iterate__kl_samples=0,
            sample__n=1, sample__temperature=0.0, sample__models=[f"{other}@{url}"],
            rate__judge_function=None, rate__judge=url, rate__judge_model=judge, rate__aspects=["helpfulness"],
        )  # fmt: skip
        assert iterate([write_config(tmp_path / "iterate.yaml", config)], in_process) == 0
    of_round = tmp_path / "out" / "round-1"
    records = read_lines(of_round / "records.jsonl")
    assert [len(record["completions"]) for record in records] == [2] * 6
    assert {record["completions"][1]["response"] for record in records} == {"[7]"}
    summary = json.loads(summary_file(of_round / "rated.jsonl").read_text())
    # the judge prefers what stands first, in whatever order the completions stand
    assert summary["position"] == {"mean_rating": [5.0, 2.0], "best": [2.0, 0.0]}
    for record in read_lines(of_round / "rated.jsonl"):
        given = [item["annotations"]["helpfulness"]["Rating"] for item in record["completions"]]
        assert given == (["5", "2"] if record["rated"]["order"] == [0, 1] else ["2", "5"])
    assert len(read_lines(of_round / "pairs.jsonl")) == 6
    assert (of_round / "run" / "model" / "model.safetensors").is_file()
