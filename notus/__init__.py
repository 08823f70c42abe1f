"""Direct Preference Optimization in pure PyTorch.

`notus.train` trains, `notus.score` scores; `docs/python.md` shows both. Their modules are imported when they are first
used: `import notus` imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from notus.api import Callback, Result, Scores, load_result, score, train
    from notus.config import Config, load_config

__all__ = [
    "Callback",
    "Config",
    "Result",
    "Scores",
    "load_config",
    "load_result",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import what `__all__` names from its module, on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'notus' has no attribute {name!r}")
    home = "notus.config" if name in ("Config", "load_config") else "notus.api"
    found = globals()[name] = getattr(importlib.import_module(home), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
