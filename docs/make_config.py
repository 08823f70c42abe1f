"""Make docs/config.md: `python docs/make_config.py`. The descriptions stand in notus/config.py, below each field."""

import ast
import inspect
import re
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from notus.config import SECTIONS, DataSource
from notus.schema import describe

HEAD = """# Config

<!-- Made by `python docs/make_config.py`; the descriptions stand in notus/config.py. -->

A run is described by a YAML file, and by what follows it on the command line, which wins:

```
python train_dpo.py CONFIG.yaml --training.learning_rate=1e-6 --data.eval=null --lora.target_modules='[q_proj, v_proj]'
```

The file has a section for each heading below, with lines `key: value`; values on the command line are read as YAML too.
An unknown key, a wrong type, a value out of range and a setting that others leave without effect are errors, which
name the place, the key and what to change. What the run then does stands, every key, in `OUTPUT_DIR/config.yaml`,
which is itself a config. Start from [those for the demo](../configs/demo) or
[for Notus 7B v1](../configs/notus-7b-v1).
"""


def render() -> str:
    """The document."""
    tables = [_table(f"`{name}`", cls) for name, cls in SECTIONS.items()]
    return "\n".join([HEAD, *tables, _table("A source, in `data.train` and `data.eval`", DataSource)])


def _table(title: str, cls: type) -> str:
    told, hints = _descriptions(cls), get_type_hints(cls, include_extras=True)
    summary = inspect.cleandoc(cls.__doc__ or "").replace("\n", " ")
    rows = [f"| `{item.name}` | {_default(item)} | {_cell(describe(hints[item.name]))} | {_cell(told[item.name])} |"
            for item in fields(cls)]  # fmt: skip
    return "\n".join([f"## {title}", "", summary, "", "| key | default | value | |", "|---|---|---|---|", *rows, ""])


def _descriptions(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, on one line."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def _default(item: "Field[Any]") -> str:
    if item.default_factory is not MISSING:
        value = item.default_factory()
    elif item.default is not MISSING:
        value = item.default
    else:
        return "required"
    if isinstance(value, float):
        return f"`{value:g}`".replace("e-0", "e-")
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}`"


def _cell(text: str) -> str:
    """Text for a cell of a table; what every text needs in YAML is not said at each."""
    return re.sub(r"'([\w-]+)'", r"`\1`", text.replace(" (in quotes if it reads as something else)", ""))


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(render(), encoding="utf-8")
