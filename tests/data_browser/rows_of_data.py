"""Rows, and configs of them, for the tests of the data browser."""

import json
from pathlib import Path
from typing import Any

import yaml
from runs import settings

from notus.data_browser.rows import Data, choose_task, load

PAIR = {"prompt": "The sea is", "chosen": " blue.", "rejected": " red."}
# Lists of three and of two completions; good and bad completions. Best first after loading: blue, grey, red.
LISTS = [
    {"prompt": "The sea is", "completions": [" red.", " blue.", " grey."], "ratings": [1, 4.2, 3], "source": "mine"},
    {"prompt": "The sky is", "completions": [" green.", " low."], "ratings": [2, 2]},
]
LABELLED = [
    {"prompt": "The sea is", "completion": " blue.", "label": True},
    {"prompt": "The sky is", "completion": " green.", "label": False},
]


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
