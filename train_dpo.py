"""Train with DPO: `python train_dpo.py CONFIG.yaml [--section.key=value ...]`, or the same under torchrun."""

import sys

from notus.config import load_config
from notus.training.dpo import run
from notus.training.distributed import run_entry

if __name__ == "__main__":
    sys.exit(run_entry(lambda: run(load_config(sys.argv[1:], "dpo"))))
