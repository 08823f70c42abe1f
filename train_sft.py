"""Supervised fine-tuning: `python train_sft.py CONFIG.yaml [--section.key=value ...]`, or the same under torchrun."""

import sys

from notus.config import load_config
from notus.entry import run_entry


def main() -> None:
    """Read the settings, then train; torch is imported once they are known to be right."""
    config = load_config(sys.argv[1:], "sft")
    from notus.training.sft import run

    run(config)


if __name__ == "__main__":
    sys.exit(run_entry(main))
