"""DPO: `python train_dpo.py CONFIG.yaml [--section.key=value ...]`, or the same under torchrun."""

import sys

from notus.config import load_config
from notus.runtime.process import configure_allocator, leave, run_entry


def main() -> int:
    """Read the settings, then train. Returns the exit code."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n\ndocs/config.md describes every key.")
        return 0
    configure_allocator()  # before torch, which the check of the loss imports
    config = load_config(sys.argv[1:], "dpo")
    from notus.training.dpo import run

    return run(config)


if __name__ == "__main__":
    leave(run_entry(main, resumable=True))
