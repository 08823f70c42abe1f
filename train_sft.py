"""Supervised fine-tuning: `python train_sft.py CONFIG.yaml [--section.key=value ...]`, or the same under torchrun."""

import sys

from notus.config import load_config
from notus.runtime.process import configure_allocator, leave, run_entry


def main() -> int:
    """Read the settings, then train; torch is imported once they are known to be right. Returns the exit code."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n\ndocs/config.md describes every key.")
        return 0
    configure_allocator()
    config = load_config(sys.argv[1:], "sft")
    from notus.training.sft import run

    return run(config)


if __name__ == "__main__":
    leave(run_entry(main, resumable=True))
