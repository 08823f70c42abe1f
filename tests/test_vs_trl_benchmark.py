"""Small runs of `benchmarks/vs_trl.py`: Notus alone, as TRL is not among the tests' packages."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("benchmarks")
ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *options: object) -> str:
    command = [sys.executable, f"benchmarks/{script}", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_notus_alone_on_pairs_of_a_shape(tmp_path: Path) -> None:
    sizes = ["--ratios", "3:1", "--length", 32, "--spread", 0, "--num-pairs", 2, "--batch-size", 2]
    results = ["--epochs", 3, "--results", tmp_path / "found.json"]
    shown = run("vs_trl.py", "--sides", "notus", "trl-liger", *sizes, *results)
    [first] = json.loads((tmp_path / "found.json").read_text())["shapes"]
    assert first["name"] == "prompts of 24 tokens, completions of 8"
    [measured] = first["runs"]
    assert len(measured["outcome"]["losses"]) == len(measured["outcome"]["step_seconds"]) == 3
    # the reference pass is counted in all, and in no step
    assert measured["outcome"]["seconds"] > sum(measured["outcome"]["step_seconds"])
    assert list(first["not_run"]) == ["trl-liger"]
    assert "trl-liger: not run" in shown


def test_made_pairs_have_the_lengths_asked_for(tmp_path: Path) -> None:
    from common import make_pairs
    from vs_trl import split

    assert split("4:1", 1000) == (800, 200)
    pairs = tmp_path / "pairs.jsonl"
    make_pairs(pairs, 3, seed=0, prompt=80, completion=20, spread=0.0)
    # <s> and </s> are of the 80 and the 20
    assert {len(json.loads(line)["prompt"].split()) for line in pairs.read_text().splitlines()} == {79}


@pytest.mark.parametrize(("size", "millions"), [("15m", 15.6), ("100m", 100.1), ("1b", 1100.0)])
def test_a_made_model_is_as_large_as_it_says(size: str, millions: float) -> None:
    from common import model_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(size))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def outcome(losses: list[float], step_seconds: list[float], ids: str = "x", reference: float = 1.0) -> Any:
    from common import Outcome

    seconds = sum(step_seconds) + reference
    return Outcome(
        seconds, reference, seconds + 1, losses, step_seconds, 100.0, 400.0, "CPU", [[3, 2, 1, ids], [3, 2, 1, ids]]
    )


def comparison(*others: Any, side: str = "trl", mine: tuple[list[float], ...] = ([3.0, 0.5],)) -> Any:
    """Two sides, two steps of one pair each; a reference pass of a second ahead. One round per outcome."""
    from notus.model.flops import Dimensions
    from vs_trl_report import Comparison, Machine, Measured

    runs = []
    for seconds, other in zip(mine, others, strict=True):
        runs.append(Measured("notus", 1, outcome([0.69, 0.6], seconds)))
        runs.append(Measured(side, 1, other, {"per_device_train_batch_size": 2, "gradient_checkpointing": False}))
    machine = Machine(1e3, Dimensions(layers=1, attention_width=2, body_weights=10, head_weights=5), 20, "CPU")
    return Comparison(runs, [machine], num_pairs=2, batch_size=1)


def test_what_is_counted() -> None:
    both = comparison(outcome([0.69, 0.6], [4.0, 1.0]))
    assert both.speed("notus", 1) == pytest.approx(2 / 4.5)  # the reference pass and the first step are in it
    assert both.rates("notus", 1)[1] == [pytest.approx(1 / 0.5)]
    assert both.rates("notus", 1)[2] == [pytest.approx(2 / 5.5)]  # loading takes another second
    # A = 3*4/2 + (2*3 + 2*3/2) + (1*3 + 1*2/2) = 19; forward = 2*10*6 + 2*5*3 + 4*1*2*19 = 302;
    # two pairs, forward + backward + reference = 4 forwards: 2416 operations in 4.5 seconds at 1000 a second
    assert both.share("notus", 1) == pytest.approx(2.416 / 4.5)


def test_each_round_is_compared_with_itself() -> None:
    from vs_trl_report import table

    # Notus takes 2, 4 and 8 seconds, the other 4, 20 and 24: ratios of 2, 5 and 3. The medians alone would give 20 / 4.
    others = [outcome([0.69, 0.6], [seconds - 2, 1.0]) for seconds in (4.0, 20.0, 24.0)]
    rounds = comparison(*others, side="trl-fastest", mine=([0.5, 0.5], [2.5, 0.5], [6.5, 0.5]))
    assert rounds.ratios("notus", "trl-fastest", 1)[0] == pytest.approx([2, 5, 3])
    shown = table(rounds, "fp32")
    mine, other, ratio = (line for line in shown.splitlines() if line.startswith(("notus", "trl-fastest  ")))
    assert "0.50 (0.25 to 1.00)" in mine
    assert "0.10 (0.08 to 0.50)" in other
    assert ratio.startswith("notus / trl-fastest")
    assert "3.00x (2.00 to 5.00)  2.00x (2.00 to 2.00)  2.78x (1.67 to 4.20)" in ratio
    assert shown.endswith("trl-fastest, 1 ep.: 2 pairs per device, reference live, no checkpointing")


def test_one_round_has_no_range_and_one_step_no_steady_rate() -> None:
    from vs_trl_report import spread

    assert spread([2.0], "x") == "2.00x"
    assert spread([float("nan")]) == "-"
    assert spread([3.0, 1.0]) == "2.00 (1.00 to 3.00)"


def test_another_side_begins_in_each_round() -> None:
    from vs_trl import rotated

    sides = ["a", "b", "c"]
    assert [rotated(sides, turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert all(sorted(rotated(sides, turn)) == sides for turn in range(4))


PRECOMPUTED = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}


def made_search(steady: Any, changes: tuple[dict[str, Any], ...] | None = None) -> Any:
    """A search over 4 steps of 8 pairs, where `steady(options)` has the seconds of a step or an error to raise.

    The reference pass of a probe's 16 pairs takes 2 seconds, where there is one, and the first step a second more.
    """
    from trl_search import CHANGES, Search, Work

    def train(options: dict[str, Any], limit: float | None) -> Any:
        found = steady(options)
        if isinstance(found, BaseException):
            raise found
        return outcome([0.69, 0.69], [found + 1, found], reference=2.0 if options["precompute_ref_log_probs"] else 0.0)

    return Search(train, Work(num_pairs=32, batch_size=8), CHANGES[:2] if changes is None else changes)


def test_a_probe_says_what_a_whole_run_would_cost() -> None:
    from trl_search import Work

    work = Work(num_pairs=32, batch_size=8, probe_steps=2)
    assert (work.probe_pairs, work.probe_epochs) == (24, 1)
    assert (Work(8, 8).probe_pairs, Work(8, 8).probe_epochs) == (8, 2)  # too few pairs: twice over
    # the pass over 24 pairs took 3 seconds, that over 32 takes 4; then 5 + 11 steps of 2.5 in three epochs
    assert work.whole_run(outcome([], [5.0, 2.0, 3.0], reference=3.0), epochs=3) == pytest.approx(4 + 5 + 11 * 2.5)


def made_seconds(options: dict[str, Any]) -> float:
    """Seconds of a step: two pairs at a time are the fastest, with checkpointing; a live reference takes half a second.

    Eager attention doubles the speed.
    """
    seconds = {1: 4.0, 2: 3.0, 4: 3.5, 8: 9.0}[options["per_device_train_batch_size"]]
    seconds *= (0.8 if options["gradient_checkpointing"] else 1) * (0.5 if "model_init_kwargs" in options else 1)
    return seconds if options["precompute_ref_log_probs"] else seconds + 0.5


def test_the_fastest_value_of_each_option_is_kept() -> None:
    from trl_search import CHANGES, PAIRS

    eager = {"model_init_kwargs": {"attn_implementation": "eager"}}
    search = made_search(made_seconds, changes=(*CHANGES[:2], eager, {"torch_compile": True}))
    best = search.fastest(epochs=3)
    assert best == {"precompute_ref_log_probs": True, "gradient_checkpointing": True, PAIRS: 2, **eager}
    tried = [probe.options for probe in search.probes.values()]
    assert {**best, "torch_compile": True} in tried
    assert {**best, PAIRS: 8} in tried  # sizes are tried again when the other options have changed


def test_a_precomputed_reference_pays_with_the_epochs() -> None:
    # two seconds for 16 pairs are four for 32; live, the reference takes half a second in each of 4 steps an epoch
    runs = []
    search = made_search(lambda options: runs.append(options) or made_seconds(options))
    assert search.fastest(epochs=3)["precompute_ref_log_probs"] is True
    assert search.fastest(epochs=1)["precompute_ref_log_probs"] is False
    assert len(runs) == len(search.probes)  # none was run again for the other number of epochs


def test_what_fails_is_recorded_and_memory_is_saved_by_checkpointing() -> None:
    from trl_search import PAIRS, RunFailed, TimedOut, table, tried

    def steady(options: dict[str, Any]) -> float | BaseException:
        if options[PAIRS] == 4:
            return TimedOut("too slow", "stopped after 9 s")
        if options[PAIRS] == 8 and not options["gradient_checkpointing"]:
            return RunFailed("a long log", "killed by signal 9")
        seconds = 1.0 if options[PAIRS] == 8 else 2.0 if options["gradient_checkpointing"] else 2.1
        return seconds if options["precompute_ref_log_probs"] else seconds + 1

    search = made_search(steady)
    assert search.fastest(epochs=3) == {**PRECOMPUTED, "gradient_checkpointing": True, PAIRS: 8}
    shown = table(tried(search, [1, 3]), [1, 3]).splitlines()
    # 2 seconds per 16 pairs: 4 for all; a first step of 2, then 3 of 1 in an epoch and 11 in three
    assert shown[1] == "  8 pairs per device, reference precomputed, checkpointing: 9.0, 17.0"
    assert "  4 pairs per device, reference precomputed, no checkpointing: stopped after 9 s" in shown
    assert "  8 pairs per device, reference precomputed, no checkpointing: killed by signal 9" in shown


def test_nothing_works() -> None:
    from trl_search import RunFailed

    assert made_search(lambda _: RunFailed("", "no")).fastest(epochs=1) is None


def test_a_probe_is_stopped_when_it_is_far_behind() -> None:
    from trl_search import Search, Work

    limits = []

    def train(options: dict[str, Any], limit: float | None) -> Any:
        limits.append(limit)
        return outcome([], [2.0, 1.0], reference=2.0)

    Search(train, Work(32, 8), ()).fastest(epochs=3)
    assert limits[:2] == [None, 4 + 2 + 11 * 1.0]  # what the fastest would need for the whole run


def test_a_run_that_takes_too_long_ends_with_its_children(tmp_path: Path) -> None:
    from trl_search import RunFailed, TimedOut
    from vs_trl import call

    script = tmp_path / "scripts" / "script.py"
    script.parent.mkdir()
    child = f"import time; time.sleep(2); open({str(tmp_path / 'child')!r}, 'w')"
    script.write_text(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    with pytest.raises(TimedOut, match="stopped after 1 s"):
        call(tmp_path, script, limit=1.0)
    script.write_text("raise ValueError('no such option')")
    with pytest.raises(RunFailed, match="exit code 1") as failure:
        call(tmp_path, script)
    assert failure.value.reason == "ValueError: no such option"
    time.sleep(1.5)
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-pairs", "10", "--batch-size", "4"], "no multiple of --batch-size 4"),
        (["--pairs", "pairs.jsonl"], "--pairs needs --model"),
        (["--repeats", "0"], "are 1 or more"),
        (["--sides", "trl-slowest"], "invalid choice"),
    ],
)
def test_wrong_arguments(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vs_trl import parse_arguments

    monkeypatch.setattr(sys, "argv", ["vs_trl.py", *options])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert message in capsys.readouterr().err


def test_sides_stand_in_the_table_s_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from vs_trl import parse_arguments

    monkeypatch.setattr(sys, "argv", ["vs_trl.py", "--sides", "trl", "trl-fastest", "notus", "--against", "old"])
    assert parse_arguments().sides == ["notus", "trl-fastest", "notus-old", "trl"]


def test_old_notus_is_a_folder_or_a_revision(tmp_path: Path) -> None:
    from vs_trl import old_checkout

    assert old_checkout(None, tmp_path) is None
    assert old_checkout(str(ROOT), tmp_path) == ROOT
    with pytest.raises(SystemExit, match=r"has no benchmarks/notus_side\.py"):
        old_checkout(str(tmp_path), tmp_path)
    with pytest.raises(SystemExit, match="neither a folder nor a git revision"):
        old_checkout("no-such-revision", tmp_path)


@pytest.mark.slow
def test_new_notus_beside_old_on_given_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import common

    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    monkeypatch.setitem(common.SIZES, "15m", {**common.SIZES["15m"], **small})
    common.make_model(tmp_path / "model", seed=0)
    rows = [{"prompt": f"w{n}", "chosen": " w7", "rejected": " w8"} for n in (1, 2, 3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = run(
        "vs_trl.py", "--sides", "notus", "--against", ROOT, "--model", tmp_path / "model", "--epochs", 1,
        "--pairs", tmp_path / "pairs.jsonl", "--num-pairs", 2, "--batch-size", 1, "--results", tmp_path / "found.json",
    )  # fmt: skip
    results = json.loads((tmp_path / "found.json").read_text())
    assert [measured["side"] for measured in results["runs"]] == ["notus", "notus-old"]
    assert results["runs"][0]["options"] == {"tokens_per_row": 4096}
    [mine] = (measured["outcome"] for measured in results["runs"][:1])
    assert len(mine["losses"]) == len(mine["step_seconds"]) == 2
    assert mine["total_seconds"] > mine["seconds"] > sum(mine["step_seconds"])
    assert "notus / notus-old" in shown
    assert "losses within 0.0e+00 over 2 steps" in shown


def test_sides_that_did_other_work_are_found() -> None:
    from vs_trl_report import check_losses, check_tokens

    good = comparison(outcome([0.69, 0.6005], [1.0, 1.0]))
    assert check_tokens(good, 10) == check_losses(good, 1e-3) == []
    assert "differ by more than 0.0001" in check_losses(good, 1e-4)[0]
    assert "differ" in check_losses(comparison(outcome([0.69, float("nan")], [1.0, 1.0])), 1e-3)[0]
    assert "pair 1" in check_tokens(comparison(outcome([0.69, 0.6], [1.0, 1.0], ids="y")), 10)[0]
    assert "longer than --max-length 4" in check_tokens(good, 4)[0]
