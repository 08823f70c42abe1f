"""How the user called this program, for usage lines and messages that name a command. Imports no torch."""

import os
import sys
from pathlib import Path

_SCRIPTS = {"train_dpo.py": "dpo", "train_sft.py": "sft"}


def called_as(command: str = "") -> str:
    """Return what the user types to run `command`, in the form in which this process was started.

    `notus dpo`, `python -m notus dpo`, `torchrun -m notus dpo`, or, if a root script was called and does the same,
    `python train_dpo.py` or `torchrun train_dpo.py`. Without a command: the program alone.
    """
    started = Path(sys.argv[0])
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    if started.name in _SCRIPTS:
        scripts = {name: script for script, name in _SCRIPTS.items()}
        program = [launcher, scripts[command]] if command in scripts else [launcher, "-m notus", command]
    elif started.name == "__main__.py" and started.parent.name == "notus":
        program = [launcher, "-m notus", command]
    else:
        program = ["notus", command]
    return " ".join(filter(None, program))
