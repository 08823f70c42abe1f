"""The comparison with lm-eval's own class runs, and would not pass if the two differed."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "lm_eval_speed.py"
SMALL = ["--questions", "2", "--shots", "2", "--width", "128", "--layers", "1"]


@pytest.fixture
def speed(monkeypatch):
    spec = importlib.util.spec_from_file_location("lm_eval_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL])
    return module


def test_both_are_timed(speed, capsys):
    speed.main()
    out = capsys.readouterr().out
    assert "notus: " in out
    assert "hflm: " in out
    assert "times as fast" in out


def test_a_difference_ends_it(speed, monkeypatch):
    right = speed.NotusLM.loglikelihood
    wrong = lambda self, *a, **k: [(score + 1, hit) for score, hit in right(self, *a, **k)]  # noqa: E731
    monkeypatch.setattr(speed.NotusLM, "loglikelihood", wrong)
    with pytest.raises(SystemExit, match=r"differ by up to 1"):
        speed.main()
