"""`notus estimate` of an iteration's config: what it takes from the config, and what it rejects."""

import json
import re
from pathlib import Path

import pytest
from toys import toy_config

from notus import __main__ as entry
from notus.config import dump_yaml
from notus.feedback.settings import load_settings

RATE = {"judge": "http://localhost:8000/v1", "judge_model": "judge"}


def write(folder: Path, **sections: dict[str, object]) -> str:
    """An iteration of 90 prompts in 3 rounds, of toy models' configurations."""
    for name, settings in (("policy", {}), ("second", {}), ("huge", {"vocab_size": 10**9})):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(toy_config(**settings).to_dict()))
    for name, count in (("prompts", 90), ("eval", 20)):
        lines = (json.dumps({"prompt": f"{name} {number}"}) for number in range(count))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tree: dict[str, dict[str, object]] = {
        "model": {"name_or_path": str(folder / "policy")},
        "training": {"output_dir": str(folder / "out"), "batch_size": 10, "epochs": 1},
        "iterate": {"prompts": str(folder / "prompts.jsonl"), "eval_prompts": str(folder / "eval.jsonl")},
        "sample": {"n": 2, "models": [str(folder / "second"), "far@http://localhost:8001/v1"]},
        "rate": dict(RATE),
    }
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    (folder / "iterate.yaml").write_text(dump_yaml(tree))
    return str(folder / "iterate.yaml")


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert entry.main(["estimate", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert entry.main(["estimate", *words]) == 1
    return capsys.readouterr().err


def test_an_iteration_is_estimated_stage_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, iterate={"old_share": 0.5})
    text = told(capsys, config, "--gpu=h100", "--price=2", "--price-in=1", "--price-out=2")
    assert "Rounds: 3, of 30, 30, 30 prompts; 2 completions of each prompt and model; 20 prompts" in text
    for line in ("sample policy", "sample second", "sample far"):
        assert re.search(rf"{line} .* 60 completions", text), text
    # 30 prompts and a tenth again, each with 6 completions of 4 ratings of 50 tokens
    asked = re.search(r"rate .* 33 requests, ([\d,]+) tokens in, 39,600 out", text)
    assert asked, text
    # the answers' mean length stands in the report; prompts have 176 tokens, and the instructions theirs
    (mean, around, instructions) = (
        float(re.search(pattern, text)[1])  # type: ignore[index]
        for pattern in (r"Answers: (\d+) tokens", r"and (\d+) around", r"assumed: (\d+) tokens of instructions")
    )
    assert int(asked[1].replace(",", "")) == pytest.approx(33 * (instructions + 176 + 6 * (mean + around)), rel=0.01)
    assert "30 pairs at most, 3 steps" in text
    assert re.search(r"GPUs .* GPU-hours, .* USD at 2 USD", text)
    # 3 rounds of 33 and 20 requests
    assert re.search(r"judge +159 requests, .* USD", text)


def test_the_configs_own_settings_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, rate={"price_in": 1.0, "price_out": 2.0, "again_share": 0.0, "aspects": ["helpfulness"]})
    text = told(capsys, config, "--iterate.rounds=2", "--sample.models=[]", "--sample.n=4", "--lengths=50,20,40")
    assert "Rounds: 2, of 45, 45 prompts; 4 completions" in text
    assert "Answers: 30 tokens" in text or "Answers: 29 tokens" in text
    assert "45 requests" in text
    assert f"{45 * 4 * 50:,} out" in text  # one aspect
    assert re.search(r"judge .* USD", text)
    assert "10 prompts" in told(capsys, config, "--iterate.prompts_per_round=10").replace("10, 10, 10", "10")


def test_a_function_and_a_reward_model_need_no_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, write(tmp_path, rate={"judge": None, "judge_model": None, "judge_function": "m:f"}))
    assert "180 completions, by a function: not counted" in text
    assert "requests" not in text
    reward = {"judge": None, "judge_model": None, "reward_model": str(tmp_path / "second")}
    assert re.search(r"rate +[\d.]+ min  180 completions", told(capsys, write(tmp_path, rate=reward)))


def test_a_model_too_large_for_a_gpu_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, sample={"models": [str(tmp_path / "huge")]})
    text = told(capsys, config, "--gpu=a100-40gb")
    assert f"Sampling {tmp_path / 'huge'} does NOT fit one GPU" in text
    assert "Sampling the policy" not in text


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--task", "dpo"], "--task has no effect on"),
        (["--iterate.rounds=100"], "90 prompts are fewer than iterate.rounds=100"),
        (["--iterate.prompts=nosuch.jsonl"], "iterate.prompts=nosuch.jsonl: there is no such file; give --examples N"),
        (["--sample.nn=3"], "sample.nn"),
        (["--sample.models=[nobody/nothing]"], "nobody/nothing: no such folder"),
    ],
)
def test_mistakes_are_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], error: str
) -> None:
    found = refused(capsys, write(tmp_path), *words)
    assert error in found
    assert found.count("\n") == 1


def test_prices_of_a_judge_have_no_effect_on_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "notus-7b-v1" / "dpo-full-8xa100-40gb.yaml"
    assert "--price-in has no effect on a run without a judge" in refused(capsys, str(recipe), "--price-in", "2")


def test_prompts_elsewhere_are_counted_by_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path)
    assert load_settings([config]).iterate.rounds == 3
    assert "of 200, 200, 200 prompts" in told(capsys, config, "--iterate.prompts=nosuch.jsonl", "--examples=600")
