"""The examples of docs/training.md are valid where they stand."""

import re
from pathlib import Path

import pytest
import yaml

from notus.config import config_from_dict, load_config

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
def test_yaml(block: str) -> None:
    tree = yaml.safe_load(block)
    base = {"model": {"name_or_path": "m"}, "data": {"train": "d"}, "training": {"output_dir": "o"}}
    if "eval_every" in tree.get("training", {}):
        assert "eval_size" in tree["data"]
    for name, keys in tree.items():
        base[name] = base.get(name, {}) | keys
    for task in ("dpo",) if "reference" in tree else ("dpo", "sft"):
        config_from_dict(base, task)  # type: ignore[arg-type]


@pytest.mark.parametrize("line", re.findall(r"^notus dpo (.*)$", TEXT, re.MULTILINE))
def test_commands(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_config(line.split(), "dpo").training.lr_schedule == "constant"
