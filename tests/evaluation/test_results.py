"""Results of evaluations: read back as they were written; anything else names the file."""

from pathlib import Path

import pytest

from notus.evaluation.results import Figure, Result, read_results, result_folder, write_result

RESULT = Result(
    suite="open-llm",
    model="runs/dpo",
    figures=[Figure("ARC-Challenge", "acc_norm", 64.59, "%", stderr=1.4, count=1172, reference={"Zephyr": 62.03})],
    settings={"precision": "bf16"},
    details={"tasks": ["arc_challenge"]},
    date="2026-11-22",
)


def test_results_are_read_back(tmp_path):
    write_result(tmp_path / "evaluations" / "open-llm", RESULT)
    assert read_results(tmp_path) == [RESULT]
    assert read_results(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("content", ["{", "[]", '{"suite": "x"}', "[" * 100_000])
def test_a_damaged_result_is_named(tmp_path, content):
    path = write_result(tmp_path / "evaluations" / "open-llm", RESULT)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"open-llm/result\.json: not the result"):
        read_results(tmp_path)


def test_where_results_go(tmp_path):
    assert result_folder("there", tmp_path, "model", "suite") == Path("there")
    assert result_folder(None, tmp_path, "model", "suite") == tmp_path / "evaluations" / "suite"
    assert result_folder(None, None, "org/model", "suite") == Path("evaluations/org__model/suite")
    assert result_folder(None, None, "../model/", "suite") == Path("evaluations/..__model/suite")


def test_results_stay_under_a_name_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "inner")
    assert result_folder(None, None, ".", "suite") == Path("evaluations/inner/suite")
    assert result_folder(None, None, "..", "suite") == Path("evaluations/mine/suite")
    assert result_folder(None, None, "/", "suite") == Path("evaluations/unnamed/suite")
