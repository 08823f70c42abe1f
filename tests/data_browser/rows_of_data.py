"""Rows, and configs of them, for the tests of the data browser."""

import json
from pathlib import Path
from typing import Any

import yaml
from runs import settings

from notus.data_browser.rows import Data, choose_task, load

PAIR = {"prompt": "The sea is", "chosen": " blue.", "rejected": " red."}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder: Path, model: Path, rows: list[dict[str, Any]], **overrides: Any) -> Path:
    """Write rows and a config of them; overrides are written section__key=value."""
    tree = settings(folder / "run", model, write_rows(folder / "rows.jsonl", rows), **overrides)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def load_data(config: Path, split: str = "train") -> Data:
    return load(choose_task([str(config)], None), split, name=config.name)
