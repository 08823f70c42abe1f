"""DPO: `python train_dpo.py CONFIG.yaml [--section.key=value ...]`, or under torchrun; the same as `notus dpo`."""

import sys

from notus.__main__ import main
from notus.runtime.process import leave

if __name__ == "__main__":
    leave(main(["dpo", *sys.argv[1:]]))
