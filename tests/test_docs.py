"""What the documents show works: their code runs, their rows load, their links lead somewhere."""

import json
import math
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from runs import config, read_metrics, write_pairs
from toys import toy_model_folder

from notus.config import SECTIONS, DPOConfig, config_from_dict
from notus.data.formats import normalize, readings
from notus.losses import LOSSES, dpo_loss, label_loss, list_loss
from notus.training import dpo, sft
from notus.training.objective import objective_of

ROOT = Path(__file__).resolve().parents[1]
LOSSES_AT_START = {"sigmoid": math.log(2), "ipo": 25.0, "hinge": 1.0}
"""What docs/metrics.md gives as the loss of a policy that equals its reference, at β = 0.1."""
DOCS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            page = path.parent / target if target else path
            assert page.exists(), target
            assert not anchor or anchor in anchors(page), f"{target}#{anchor}"


def test_the_site_links_to_the_repository():
    links = runpy.run_path(str(ROOT / "docs" / "site_links.py"))["replace_links"]
    text = "[a](../notus/losses.py) [b](data.md#files) [c](../README.md#models), ![d](losses.svg) [e](../configs/demo)"
    assert links(text, "page.md", "https://host/me/notus.git") == (
        "[a](https://host/me/notus/blob/main/notus/losses.py) [b](data.md#files) "
        "[c](https://host/me/notus/blob/main/README.md#models), ![d](losses.svg) "
        "[e](https://host/me/notus/tree/main/configs/demo)"
    )
    assert links(text, "page.md", "") == "a [b](data.md#files) c, ![d](losses.svg) e"
    with pytest.raises(ValueError, match=r"docs/page.md links to ../gone.py"):
        links("[x](../gone.py)", "page.md", "")


def test_the_config_is_described_as_it_is():
    made = runpy.run_path(str(ROOT / "docs" / "make_config.py"))["render"]()
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert text == made, "run: python docs/make_config.py"
    for section, kind in SECTIONS.items():
        table = text.split(f"## `{section}`\n")[1].split("\n## ")[0]
        cells = [re.fullmatch(r"\| `(\w+)` \| .+ \| .+ \| .+ \|", line) for line in table.splitlines()]
        assert [found[1] for found in cells if found] == [item.name.rstrip("_") for item in fields(kind)]


def test_the_keys_that_the_docs_name_are_keys_of_the_config():
    files = {"json", "jsonl", "md", "py", "safetensors"}  # data.md and the like are files
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for section, key in re.findall(rf"(?<![\w./-])(?:--)?({'|'.join(SECTIONS)})\.([a-z_]+)\b(?!\()", text):
            known = {item.name.rstrip("_") for item in fields(SECTIONS[section])}
            assert key in known | files, f"{path.name}: {section}.{key}"


def test_every_loss_is_described_as_it_is():
    made = runpy.run_path(str(ROOT / "docs" / "make_losses.py"))
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert page == made["render"](page), "run: python docs/make_losses.py"
    tables = page.split("## Choose a loss")[1].split("## Options")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE)) == sorted(["loss_type"] * 4 + list(LOSSES))
    assert made["missing_curves"]() == []


def test_the_figure_of_losses_is_the_one_that_is_drawn(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    figure = (ROOT / "docs" / "losses.svg").read_text(encoding="utf-8")
    if f"Matplotlib v{matplotlib.__version__}," not in figure:
        pytest.skip("drawn by another version of matplotlib")
    runpy.run_path(str(ROOT / "docs" / "make_losses.py"))["draw"](tmp_path / "losses.svg")
    assert (tmp_path / "losses.svg").read_text(encoding="utf-8") == figure, "run: python docs/make_losses.py --figure"


def test_the_readme_has_every_loss():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"DPO and {len(LOSSES) - 1} other losses" in readme
    table = readme.split("| learns from | `dpo.loss_type` |\n")[1].split("\n\n")[0]
    named = [line.split("|")[2] for line in table.splitlines()]
    assert sorted(re.findall(r"`(\w+)`", " ".join(named))) == sorted(LOSSES)


def test_the_code_beside_the_losses_runs():
    code, by_name = blocks("losses.md", "python")
    exec(code, {})
    exec(by_name, {})
    wrong = code.replace("softplus(-margin)", "(1 + (-margin).exp()).log()")
    (shown,) = re.findall(r"```\nAssertionError: (.*?), …\n```", (ROOT / "docs" / "losses.md").read_text("utf-8"))
    with pytest.raises(AssertionError, match=re.escape(shown)):
        exec(wrong, {})


def test_the_losses_that_are_shown_in_yaml_are_config():
    tree = {"model": {"name_or_path": "m"}, "data": {"train": "pairs.jsonl"}, "training": {"output_dir": "o"}}
    found = [config_from_dict(tree | yaml.safe_load(block), "dpo").dpo for block in blocks("losses.md", "yaml")]
    assert [each.nll_weight for each in found] == [1, 0, 1, 1, 0]
    assert [each.loss_type for each in found[1:]] == ["simpo", "cpo", "orpo", "kto"]


def test_the_rows_that_the_data_formats_show_are_read():
    pairs, examples, lists, labels = blocks("data.md", "json")
    prompts = [normalize(json.loads(line), "dpo").prompt for line in pairs.splitlines()]
    assert prompts == [
        "The capital of France is",
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "Name a prime."}],
        [{"role": "user", "content": "2 + 2?"}],
    ]
    completions = [normalize(json.loads(line), "sft").completions for line in examples.splitlines()]
    turns = [[{"role": "assistant", "content": text}] for text in ("Hello!", "3")]
    assert completions == [(turns[0],), (" Paris.",), (turns[1],)]
    rated = [readings(json.loads(line), "lists")[0] for line in lists.splitlines()]
    assert [each.ratings for each in rated] == [(5, 1.5), (5, 2, 1)]
    assert rated[1].record.completions == (" Paris.", " Lyon.", " Rome.")
    assert [readings(json.loads(line), "labels")[0].label for line in labels.splitlines()] == [False, True]


def test_the_example_has_a_usage(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["score_pairs.py"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "examples" / "score_pairs.py"))
    assert caught.value.code == 2
    assert "usage: score_pairs.py [-h] POLICY REFERENCE PAIRS" in capsys.readouterr().err


def test_the_example_scores_pairs(tmp_path, monkeypatch, capsys):
    model, other = toy_model_folder(tmp_path / "a"), toy_model_folder(tmp_path / "b", seed=1)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 7)
    outputs = []
    for policy in (model, other):
        monkeypatch.setattr(sys, "argv", ["score_pairs.py", str(policy), str(model), str(pairs)])
        runpy.run_path(str(ROOT / "examples" / "score_pairs.py"), run_name="__main__")
        outputs.append(capsys.readouterr().out)
    assert "7 kept" in outputs[0]
    assert "loss 0.6931  accuracy 0.0%" in outputs[0]  # the policy is the reference: ln 2, and no pair is won
    assert "loss 0.6931" not in outputs[1]


def test_what_the_page_on_adapters_shows_is_config():
    for block in blocks("adapters.md", "yaml"):
        tree = yaml.safe_load(block)
        tree = {"model": {"name_or_path": "m"}, "data": {}, "training": {"output_dir": "o"}, **tree}
        tree["data"] = {"train": "pairs.jsonl", **tree["data"]}
        config_from_dict(tree, "dpo")


# Logged only on a GPU, only by a mixture of experts; held by tests/training/test_throughput.py and test_router_loss.py.
ELSEWHERE = {"system/gpu_memory_gib", "system/mfu", "router_aux_loss"}


def logged_by(**options):
    """The keys that a loss logs, from its objective alone: every sum is 1."""
    objective = objective_of(DPOConfig(**options))
    return set(objective.metrics([1.0] * objective.num_sums))


def test_the_glossary_has_every_metric_that_runs_log(tmp_path, model_folder, pairs_file):
    dpo.run(config("dpo", tmp_path / "dpo", model_folder, pairs_file, training__max_steps=1, data__eval_size=2))
    sft.run(config("sft", tmp_path / "sft", model_folder, pairs_file, training__max_steps=1, data__eval_size=2))
    lines = [read_metrics(tmp_path / task)[-1] for task in ("dpo", "sft")]
    logged = ELSEWHERE.union(*lines)
    logged |= logged_by(loss_type={"sigmoid": 1.0, "hinge": 1.0}, nll_weight=1.0) | logged_by(loss_type="simpo")
    logged |= logged_by(loss_type="plackett_luce") | logged_by(loss_type="kto") | logged_by(loss_type="bco")
    evaluated = {key for key in logged if key.startswith("eval_")}
    assert {key.removeprefix("eval_") for key in evaluated} <= logged  # one glossary does for both
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("## Evaluation")[0]
    first_cells = re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE)
    shown = [key for cell in first_cells for key in re.findall(r"`([^`]+)`", cell)]
    assert len(shown) == len(set(shown))
    parts = {f"loss/{name}" for name in LOSSES}
    assert set(shown) - {"loss/NAME"} == logged - evaluated - parts
    assert ("loss/NAME" in shown) == bool(logged & parts)


def test_the_first_losses_of_the_glossary_are_those_of_the_functions():
    zero = torch.zeros(1, dtype=torch.float64)
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert "0.693 for `sigmoid`" in page
    assert "25 at β = 0.1" in page
    lengths = {"chosen_lengths": zero + 3, "rejected_lengths": zero + 5}
    first = {name: dpo_loss(*[zero] * 4, loss_type=name, beta=0.1, **lengths)[0].item() for name in LOSSES_AT_START}
    assert first == pytest.approx(LOSSES_AT_START)
    assert list_loss("plackett_luce", zero.expand(1, 4), zero.expand(1, 4), beta=0.1)[0].item() == pytest.approx(
        math.log(24)
    )
    good = torch.tensor([True])
    assert label_loss("kto", zero, zero, good, beta=0.1, shift=zero[0])[0].item() == pytest.approx(0.5)
