"""SFT: `python train_sft.py CONFIG.yaml [--section.key=value ...]`, or under torchrun; the same as `notus sft`."""

import sys

from notus.__main__ import main
from notus.runtime.process import leave

if __name__ == "__main__":
    leave(main(["sft", *sys.argv[1:]]))
