"""`notus demo --real` on a toy model and a few pairs: what it prints, keeps and rejects. Its settings."""

import dataclasses
import json
from argparse import ArgumentParser
from pathlib import Path

import huggingface_hub.constants
import pytest
from runs import write_pairs

from notus import demo, real_demo
from notus.config import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "smollm2-135m"


def _run(*words: object) -> int:
    parser = ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args(["--real", *map(str, words)]))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_demo, "DATA", {"eval_size": 4, "max_length": 120})
    monkeypatch.setitem(real_demo.TRAINING, "precision", "fp32")
    monkeypatch.setattr(real_demo, "TRACKING", {"samples": 2, "sample_tokens": 3})
    monkeypatch.setattr(real_demo.importlib.util, "find_spec", lambda _: None)  # the report has tests of its own


@pytest.mark.parametrize("name", ["dpo", "dpo-lora"])
def test_the_settings_are_those_of_the_configs(name: str) -> None:
    """A key that only one of the two sets, or sets otherwise, shows here."""
    config = load_config([str(CONFIGS / f"{name}.yaml")], "dpo")
    (pairs,) = config.data.train
    assert Path(pairs["path"]).name == real_demo.PAIRS[1]
    lora = name == "dpo-lora"
    ours = real_demo.settings(real_demo.MODEL, pairs["path"], Path(real_demo.OUTPUT), lora=lora, seed=42)
    assert dataclasses.asdict(ours) == dataclasses.asdict(config)


@pytest.mark.usefixtures("small")
def test_it_trains_evaluates_and_shows_answers_once(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With LoRA; without it there is nothing else to see but its settings, see above."""
    pairs, folder = write_pairs(tmp_path / "pairs.jsonl", 12), tmp_path / "out" / "dpo-lora"
    words = ("--model", model_folder, "--pairs", pairs, "--output", folder.parent, "--lora", "--seed", 1)
    assert _run(*words) == 0
    shown = capsys.readouterr().out
    assert (folder / "model" / "adapter_config.json").is_file()
    config = load_config([str(folder / "config.yaml")], "dpo")
    assert (config.lora.rank, config.training.learning_rate, config.training.seed) == (16, 2e-4, 1)
    evaluation = folder.parent / "dpo-lora-evaluation.json"
    result = json.loads(evaluation.read_text())
    assert result["num_rows"] == 4
    table = [
        f"held-out loss (before: 0.693)     {result['loss']:.3f}",
        f"report: pip install plotly, then notus report {folder}",
    ]
    assert set(table) <= set(shown.splitlines())
    for title in ("prompt", "before", "after"):
        assert sum(line.startswith(f"{title:8}") for line in shown.splitlines()) == 2
    before = [path.stat().st_mtime_ns for path in (folder / "metrics.jsonl", evaluation)]
    assert _run(*words) == 0
    assert [path.stat().st_mtime_ns for path in (folder / "metrics.jsonl", evaluation)] == before
    assert table[0] in capsys.readouterr().out


def test_without_a_network_it_says_what_to_pass(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(real_demo, "MODEL", "nobody/no-such-model")
    monkeypatch.setattr(real_demo, "PAIRS", ("nobody/no-such-pairs", "pairs.json"))
    for words, missing in (((), "no-such-model"), (("--model", model_folder), "no-such-pairs")):
        with pytest.raises(ValueError, match=f"{missing}.*--pairs FILE") as raised:
            _run("--output", tmp_path / "out", *words)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_figures_and_their_intervals() -> None:
    """The mean log-ratio is the mean reward over beta: -0.1 / 0.1 = -1 nat."""
    overall = {"count": 16, "accuracy": 0.75, "margin": 0.5}
    overall |= {"accuracy_interval": [0.537, 0.963], "margin_interval": [0.287, 0.713]}
    result = {"overall": overall, "loss": 0.6, "beta": 0.1, "rewards/chosen": -0.1, "rewards/rejected": 0.2}
    assert dict(real_demo.measured(result)) == {
        "held-out pairs": "16",
        "held-out loss (before: 0.693)": "0.600",
        "reward accuracy (before: 50%)": "75.0% (95% interval 53.7% to 96.3%)",
        "reward margin (before: 0)": "0.500 (95% interval 0.287 to 0.713)",
        "log-prob change, chosen": "-1.00 nats",
        "log-prob change, rejected": "+2.00 nats",
    }
